r"""A low-rank quadratic form: the smallest step beyond a linear probe; sees variances and products of two features.

Equations: with ``z = (x - mean) / sd`` over the training rows,

    score(x) = w . z + sum_{r <= R} s_r (v_r . z)^2 + b,      s_r in {-1, +1},

a logit at equal class frequencies, fitted to minimize the class-balanced mean log-loss plus
``(l2 / 2) (||w||^2 + sum_r ||v_r||^2)``. The second sum, for orthogonal v, is the nuclear norm of the quadratic form,
which itself favours a low rank. ``R = 0`` is among the ranks to choose from: then the probe is linear.

Start: w = 0 and v_r along the eigenvectors of ``sum_i c_i y_i z_i z_i^T`` with the largest eigenvalues in size (c_i
half in each class, y = +-1), s_r their signs: by that matrix the loss falls at first when the quadratic form grows from
zero. Then Adam, one step size per column (as the ``mlp`` probe does it), all trials in one compiled program.

Rank and l2 are those of the least held-out loss on folds of *items* (:mod:`elk_stress.probes.mlp`), start included in
the fold; the fit on all rows descends beside the folds' and is the one that is kept.

Shapes: activations ``(*batch, d)`` -> ``(*batch,)``. Float32 while fitting. Not Lipschitz: the score's slope grows
with distance, so no certificate. References: truncated polynomials as monitors, of which this is the second order with
a symmetric low-rank form: Oldfield et al. 2025 (2509.26238); what a bilinear layer computes is such forms: Pearce et
al. 2024 (2410.08417).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, NamedTuple

import numpy as np

from elk_stress.probe import FittedProbe, Traits
from elk_stress.probes.mlp import _adam_by_unit, _balanced, _folds

__all__ = ["Quadratic"]

# length of every v at the start, in standardized units: small beside what it grows to, far enough from the saddle at 0
_FIRST = 0.3
# length of the first step of a column of weights (and of a bias), in standardized units
_STEP = 0.2


@dataclass(frozen=True)
class Quadratic:
    """A low-rank quadratic form plus a linear one, its rank and penalty chosen on training rows.

    Attributes:
        ranks: numbers R of squares to choose from, ascending; 0 is the linear probe.
        penalties: l2 to choose from.
        folds: of items, for the choice; fewer where a class has fewer rows.
        steps: of Adam; the step size falls to zero along a cosine.
        batch: rows per step; with no more rows than this every step sees all of them.
    """

    ranks: tuple[int, ...] = (0, 2, 6)
    penalties: tuple[float, ...] = (0.01, 0.1, 0.5)
    folds: int = 3
    steps: int = 200
    batch: int = 1024

    name: ClassVar[str] = "quadratic"
    traits: ClassVar[Traits] = Traits()

    def __post_init__(self) -> None:
        # JSON gives lists back
        object.__setattr__(self, "ranks", tuple(sorted(int(rank) for rank in self.ranks)))
        object.__setattr__(self, "penalties", tuple(float(penalty) for penalty in self.penalties))
        if not self.ranks or min(self.ranks) < 0 or not self.penalties or min(self.penalties) <= 0:
            raise ValueError(f"quadratic needs ranks of 0 or more and penalties above 0, at least one each; got {self}")
        if min(self.folds, self.steps, self.batch) < 1:
            raise ValueError(f"quadratic needs folds, steps and batch of at least 1; got {self}")

    def fit(
        self, activations: np.ndarray, labels: np.ndarray, *, pairs: np.ndarray | None = None, seed: int = 0
    ) -> FittedProbe:
        """Fit on ``activations (n, d)``, ``labels (n,)``; ``seed`` draws the order of rows.

        Notes: ``rank`` and ``penalty`` that were chosen and the ``held_out_loss`` in nats, class-balanced.
        """
        rows, targets = np.asarray(activations, dtype=float), np.asarray(labels).astype(int)
        centre, spread = standardization(rows)
        rows = ((rows - centre) / spread).astype(np.float32)
        dim = rows.shape[1]
        ranks = tuple(dict.fromkeys(min(rank, dim) for rank in self.ranks))
        learned, judged = cross_weights(targets, self.folds)
        starts = [_steepest(rows, targets, share, max(ranks)) for share in learned.T]
        # columns and members in the order: rank, penalty, fold
        columns, linear, square, owner, members = [], [], [], [], 0
        for rank in ranks:
            for _ in self.penalties:
                for vectors, signs in starts:
                    columns += [np.zeros((dim, 1)), _FIRST * vectors[:, :rank]]
                    linear += [1.0] + [0.0] * rank
                    square += [0.0, *signs[:rank]]
                    owner += [members] * (rank + 1)
                    members += 1
        fits = learned.shape[1]
        penalties = np.tile(np.repeat(self.penalties, fits), len(ranks))
        weight, bias, losses = cross_fit(
            _forms,
            (tuple(linear), tuple(square), tuple(owner)),
            Trials(np.concatenate(columns, axis=1), penalties[owner], *_tiled(learned, judged, members // fits)),
            rows,
            targets,
            steps=self.steps,
            batch=self.batch,
            seed=seed,
        )
        chosen, kept, loss = choose(losses, fits)
        own = np.flatnonzero(np.asarray(owner) == kept)
        parameters = {
            "weight": weight[:, own] / spread[:, None],
            "centre": centre,
            "linear": np.asarray(linear)[own],
            "square": np.asarray(square)[own],
            "bias": np.asarray(bias[kept]),
        }
        rank, penalty = divmod(chosen, len(self.penalties))
        notes = {"rank": ranks[rank], "penalty": self.penalties[penalty], "held_out_loss": loss}
        return FittedProbe(self, parameters, notes=notes)

    def score(self, xp: Any, parameters: Mapping[str, Any], activations: Any) -> Any:
        """``inner @ linear + inner^2 @ square + bias`` with ``inner = (activations - centre) @ weight``."""
        inner = xp.matmul(activations - parameters["centre"], parameters["weight"])
        form = xp.matmul(inner, parameters["linear"]) + xp.matmul(inner**2, parameters["square"])
        return form + parameters["bias"]


def _steepest(rows: np.ndarray, targets: np.ndarray, share: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """``(d, rank)`` unit vectors and ``(rank,)`` signs of the largest class differences in second moments."""
    from scipy.linalg import eigh
    from scipy.sparse.linalg import eigsh

    dim = rows.shape[1]
    signed = (share * (2.0 * targets - 1.0)).astype(np.float32)
    moments = np.asarray((rows * signed[:, None]).T @ rows, dtype=float)
    if rank == 0 or dim <= max(512, 2 * rank + 1):
        values, vectors = eigh(moments)
    else:
        values, vectors = eigsh(moments, k=rank, which="LM", v0=np.ones(dim))
    largest = np.argsort(-np.abs(values), kind="stable")[:rank]
    return vectors[:, largest], np.where(values[largest] >= 0, 1.0, -1.0)


def _forms(projections: Any, mask: Any, bias: Any, layout: Any, softness: Any) -> Any:
    """Logits ``(b, members)`` of projections ``(b, columns)``."""
    import jax.numpy as jnp

    linear, square, owner = (np.asarray(part) for part in layout)
    own = (owner[:, None] == np.arange(owner.max() + 1)).astype(np.float32)
    coefficients = jnp.asarray(linear, dtype=bias.dtype), jnp.asarray(square, dtype=bias.dtype)
    terms = projections * (coefficients[0] + coefficients[1] * projections)
    return terms @ jnp.asarray(own, dtype=bias.dtype) + bias


# -- cross-fitted descent: what this probe shares with the probes of tokens --------------------------------------------


class Trials(NamedTuple):
    """What descends together: C columns of weights that belong to m members.

    Attributes:
        weight: ``(d, C)`` first weights.
        penalties: ``(C,)`` l2 of each column.
        learned: ``(n, m)`` weights of the rows that a member learns from; each column sums to 1.
        judged: ``(n, m)`` weights of the rows that it is judged on; sums to 1, or 0 for a member fitted on all rows.
    """

    weight: np.ndarray
    penalties: np.ndarray
    learned: np.ndarray
    judged: np.ndarray


def standardization(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of the rows; infinite for a feature that is constant but for rounding."""
    mean, spread = rows.mean(axis=0), rows.std(axis=0)
    return mean, np.where(spread > 1e-10 * np.maximum(1.0, np.abs(mean)), spread, np.inf)


def cross_weights(targets: np.ndarray, folds: int) -> tuple[np.ndarray, np.ndarray]:
    """Class-balanced weights ``(n, folds + 1)`` to learn by and to judge by; the last member learns from all rows."""
    fold = _folds(targets, folds)
    own = fold[:, None] == np.arange(int(fold.max()) + 1)
    others = ~own if own.shape[1] > 1 else own  # with one fold there is nothing to hold out
    every = np.ones((len(targets), 1), dtype=bool)
    return (
        _balanced(targets, np.concatenate([others, every], axis=1)),
        _balanced(targets, np.concatenate([own, ~every], axis=1)),
    )


def _tiled(learned: np.ndarray, judged: np.ndarray, times: int) -> tuple[np.ndarray, np.ndarray]:
    return np.tile(learned, (1, times)), np.tile(judged, (1, times))


def choose(losses: np.ndarray, fits: int) -> tuple[int, int, float]:
    """The configuration of the least mean held-out loss, the member of it that learned from all rows, and that loss."""
    by_configuration = losses.reshape(-1, fits)[:, :-1].mean(axis=1)
    chosen = int(by_configuration.argmin())
    return chosen, chosen * fits + fits - 1, float(by_configuration[chosen])


def cross_fit(
    pool: Callable[..., Any],
    layout: Any,
    trials: Trials,
    rows: np.ndarray,
    targets: np.ndarray,
    *,
    mask: np.ndarray | None = None,
    steps: int,
    batch: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Descend all trials: weights ``(d, C)``, biases ``(m,)`` and held-out losses ``(m,)`` in nats.

    Args:
        pool: ``(projections (b, [T,] C), mask (b, T), bias (m,), layout, softness) -> (b, m)`` logits; softness falls
            from 1 to 0 over the first half of the descent, for pools that are annealed; 0 is the score itself.
        layout: what else the pool must know; hashable.
        trials: see there.
        rows: ``(n, [T,] d)`` standardized float32.
        targets: ``(n,)`` in {0, 1}.
        mask: ``(n, T)`` or ``None``.
        steps: of Adam.
        batch: rows per step at most.
        seed: order of the rows.
    """
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    batches = -(-len(rows) // batch)
    size = -(-len(rows) // batches)
    place = rng.permutation(batches * size)[: len(rows)]

    def dealt(columns: np.ndarray) -> np.ndarray:
        """Rows in batches; the places that are left over weigh nothing."""
        out = np.zeros((batches * size, *columns.shape[1:]), dtype=np.float32)
        out[place] = columns
        return out.reshape(batches, size, *columns.shape[1:])

    there = np.ones(rows.shape[:-1]) if mask is None else np.asarray(mask)
    found = _program(pool, layout, steps)(
        dealt(rows),
        dealt(there),
        dealt(1.0 - 2.0 * targets),
        dealt(trials.learned * len(rows)),
        dealt(trials.judged),
        trials.penalties.astype(np.float32),
        trials.weight.astype(np.float32),
    )
    weight, bias, losses = (np.asarray(part, dtype=float) for part in found)
    return weight, bias, losses


@cache
def _program(pool: Callable[..., Any], layout: Any, steps: int) -> Any:
    """The compiled descent; compiled once for each shape of its arguments, all float32."""
    import jax
    import jax.numpy as jnp
    import optax

    def margins(at: Any, rows: Any, there: Any, signs: Any, softness: Any) -> Any:
        return signs[:, None] * pool(rows @ at["weight"], there > 0.5, at["bias"], layout, softness)

    def loss(at: Any, penalties: Any, rows: Any, there: Any, signs: Any, weights: Any, softness: Any) -> Any:
        data = (weights * jax.nn.softplus(margins(at, rows, there, signs, softness))).sum() / len(rows)
        return data + 0.5 * (penalties * at["weight"] ** 2).sum()

    def descend(
        rows: Any, there: Any, signs: Any, learned: Any, judged: Any, penalties: Any, weight: Any
    ) -> tuple[Any, Any, Any]:
        at = {"weight": weight, "bias": jnp.zeros_like(learned[0, 0])}
        # Adam's first move is one step size in every coordinate: the same length for any width
        size = {"weight": _STEP / np.sqrt(weight.shape[0]), "bias": _STEP}
        method = optax.chain(
            _adam_by_unit(),
            optax.stateless(lambda moves, now: {name: moves[name] * size[name] for name in moves}),
            optax.scale_by_learning_rate(optax.cosine_decay_schedule(1.0, steps)),
        )

        def step(carry: Any, count: Any) -> Any:
            at, state = carry
            batch = count % rows.shape[0]
            softness = jnp.maximum(0.0, 1.0 - count.astype(weight.dtype) * (2.0 / steps))
            slopes = jax.grad(loss)(at, penalties, rows[batch], there[batch], signs[batch], learned[batch], softness)
            moves, state = method.update(slopes, state, at)
            return (optax.apply_updates(at, moves), state), None

        (at, _), _ = jax.lax.scan(step, (at, method.init(at)), jnp.arange(steps, dtype=jnp.int32))

        def held_out(total: Any, part: Any) -> Any:
            found = margins(at, part[0], part[1], part[2], jnp.zeros((), dtype=weight.dtype))
            return total + (part[3] * jax.nn.softplus(found)).sum(axis=0), None

        losses, _ = jax.lax.scan(held_out, jnp.zeros_like(at["bias"]), (rows, there, signs, judged))
        return at["weight"], at["bias"], losses

    return jax.jit(descend)
