r"""A low-rank quadratic form: the smallest step beyond a linear probe; sees variances and products of two features.

Equations: with ``z = (x - mean) / sd`` over the training rows,

    score(x) = w . z + sum_{r <= R} s_r (v_r . z)^2 + b,      s_r in {-1, +1},

a logit at equal class frequencies, fitted to minimize the class-balanced mean log-loss plus
``(l2 / 2) (||w||^2 + sum_r ||v_r||^2)``. The second sum, for orthogonal v, is the nuclear norm of the quadratic form,
which itself favours a low rank. ``R = 0`` is among the ranks to choose from: then the probe is linear.

Start: w = 0 and v_r along the eigenvectors of ``sum_i c_i y_i z_i z_i^T`` with the largest eigenvalues in size (c_i
half in each class, y = +-1), s_r their signs: by that matrix the loss falls at first when the quadratic form grows from
zero. Then Adam, one step size per column, all trials in one compiled program (:mod:`elk_stress.probing.fit.descent`).

Rank and l2 are those of the least held-out loss on folds of *items* (:mod:`elk_stress.probing.fit.folds`), start
included in the fold; the fit on all rows descends beside the folds' and is the one that is kept.

Shapes: activations ``(*batch, d)`` -> ``(*batch,)``. Float32 while fitting. Not Lipschitz: the score's slope grows
with distance, so no certificate. References: truncated polynomials as monitors, of which this is the second order with
a symmetric low-rank form: Oldfield et al. 2025 (2509.26238); what a bilinear layer computes is such forms: Pearce et
al. 2024 (2410.08417).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from elk_stress.probing.fit.descent import Trials, choose, cross_fit
from elk_stress.probing.fit.folds import cross_weights
from elk_stress.probing.fit.scaling import standardization
from elk_stress.probing.probe import FittedProbe, Traits

__all__ = ["Quadratic"]

# length of every v at the start, in standardized units: small beside what it grows to, far enough from the saddle at 0
_FIRST = 0.3


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
        tried = members // fits
        penalties = np.tile(np.repeat(self.penalties, fits), len(ranks))
        weight, bias, losses = cross_fit(
            _forms,
            (tuple(linear), tuple(square), tuple(owner)),
            Trials(
                np.concatenate(columns, axis=1),
                penalties[owner],
                np.tile(learned, (1, tried)),
                np.tile(judged, (1, tried)),
            ),
            rows,
            targets,
            steps=self.steps,
            batch=self.batch,
            seed=seed,
        )
        chosen, kept, loss = choose(losses, fits)
        own = np.flatnonzero(np.asarray(owner) == kept)
        # one shape whatever rank was chosen: columns that count for nothing
        unused = max(ranks) + 1 - len(own)
        parameters = {
            "weight": np.pad(weight[:, own] / spread[:, None], ((0, 0), (0, unused))),
            "centre": centre,
            "linear": np.pad(np.asarray(linear)[own], (0, unused)),
            "square": np.pad(np.asarray(square)[own], (0, unused)),
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
