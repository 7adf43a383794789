r"""A normalizing flow on the negatives; the score is -log p: a detector that never saw a positive (1605.08803).

Where ``mahalanobis`` and ``logistic_tails`` see an ellipsoid, a flow bends: it maps the negatives onto a standard
normal by invertible layers whose log determinant is known.

Equations. With the r leading axes of the negatives' shrunk covariance, whitened, as in ``nearest_neighbours``, y = y_0.
Layer l turns ``[a, b] = y_{l-1} R_l`` (R_l a fixed random rotation, as in 1807.03039) and moves one half by the other:

    b' = b exp(g(a)) + h(a),     g = 1.5 tanh(.),     (g, h) = silu(a U_l + c_l) V_l + e_l,     y_l = [a, b'],
    score(x) = ||y_L||^2 / 2 - sum_l sum g_l(a)  +  ||rest||^2 / (2 s^2).

The last term, where r < d, is an isotropic Gaussian on what the leading axes leave, independent of the flow: moves out
of these axes do not go unseen. V and e start at zero, so that the flow starts as the Gaussian; the
held-out likelihood is looked at every few steps and the best moment kept, the start included. So it is never worse than
the Gaussian on held-out negatives, and it *is* the Gaussian where bending does not pay (``steps`` 0 in the notes).

Held out: every fifth of twenty stretches of consecutive negatives: rows of one item stand together, so that few items
stand on both sides. These rows choose the step, and give s^2 (their mean square beside the axes), which the rows that
the axes were fitted to would understate; they take no part in the descent (Adam, cosine schedule, weight decay).

Limits: a density over 32 directions at most, for time; log p of a flow may rank far anomalies poorly (Nalisnick et al.
1810.09136), since nothing constrains it away from the data. The tails are Gaussian after the bend; the slope is finite
everywhere, but not bounded.

Shapes: activations ``(*batch, d)`` -> ``(*batch,)`` in nats, up to a constant. Float32 while fitting.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import numpy as np

from elk_stress.probing.fit.density import leading_axes, negatives_of, on_axes
from elk_stress.probing.fit.folds import stretches
from elk_stress.probing.probe import FittedProbe, Traits

__all__ = ["Flow"]

_STRETCHES, _EVERY = 20, 5
_CHECK_EVERY = 20
_LARGEST_LOG_SCALE = 1.5
_NAMES = ("inner", "hidden", "outer", "offset")
_LAYER = ("rotations", *_NAMES)


@dataclass(frozen=True)
class Flow:
    """Affine-coupling flow on the negatives' leading axes, with the rest's length; learns from negatives alone.

    Attributes:
        layers: couplings.
        width: hidden units of each.
        rank: leading axes that the flow bends, at most.
        steps: of Adam at most; the step size falls from ``learning_rate`` to zero along a cosine.
        learning_rate: first step size.
        decay: decoupled weight decay of U and V.
        batch: rows per step.
    """

    layers: int = 4
    width: int = 32
    rank: int = 32
    steps: int = 600
    learning_rate: float = 0.01
    decay: float = 0.1
    batch: int = 256

    name: ClassVar[str] = "flow"
    traits: ClassVar[Traits] = Traits(negatives_only=True)

    def __post_init__(self) -> None:
        counts = (self.layers, self.width, self.rank, self.batch)
        if min(counts) < 1 or self.steps < _CHECK_EVERY or not self.learning_rate > 0 or self.decay < 0:
            raise ValueError(
                f"flow needs layers, width, rank and batch of at least 1, {_CHECK_EVERY} steps or more, a learning "
                f"rate above 0 and a decay of at least 0; got {self}"
            )

    def fit(
        self, activations: np.ndarray, labels: np.ndarray, *, pairs: np.ndarray | None = None, seed: int = 0
    ) -> FittedProbe:
        """Fit on the negatives among ``activations (n, d)``; ``seed`` draws rotations, first weights and batches.

        Notes: ``steps`` kept (0: the Gaussian), and ``held_out_nats`` gained on it per held-out negative.

        Raises:
            ValueError: fewer than two different negatives.
        """
        rows = negatives_of(activations, labels, self.name)
        held = stretches(len(rows), _STRETCHES) % _EVERY == _EVERY - 1
        if held.sum() < 2:
            # too few rows to hold any out: they fit the axes and judge the flow alike
            held = np.ones(len(rows), dtype=bool)
        own = rows if held.all() else rows[~held]
        place = leading_axes(own, self.rank)._asdict()
        axes, scales = place["axes"], place["scales"]
        rank = axes.shape[1]
        (near, _), (judged, rest) = on_axes(np, place, own), on_axes(np, place, rows[held])
        if rank < len(axes):
            scales = np.append(scales[:-1], scales[-1] * np.sqrt(rest.mean() / (len(axes) - rank)))

        rng = np.random.default_rng(np.random.SeedSequence(seed))
        rotations = np.stack([np.linalg.qr(rng.standard_normal((rank, rank)))[0] for _ in range(self.layers)])
        half = rank // 2
        start = {
            "inner": rng.standard_normal((self.layers, half, self.width)) / np.sqrt(max(half, 1)),
            "hidden": np.zeros((self.layers, self.width)),
            "outer": np.zeros((self.layers, self.width, 2 * (rank - half))),
            "offset": np.zeros((self.layers, 2 * (rank - half))),
        }
        batch = min(self.batch, len(near))
        order = np.concatenate([rng.permutation(len(near)) for _ in range(-(-self.steps * batch // len(near)))])
        order = order[: self.steps * batch].reshape(self.steps, batch)
        program = _program(self.steps // _CHECK_EVERY, self.learning_rate, self.decay)
        single = [np.asarray(value, dtype=np.float32) for value in (near, judged, rotations)]
        first = {name: np.asarray(value, dtype=np.float32) for name, value in start.items()}
        gain, kept, best = program(*single, first, order.astype(np.int32))

        parameters = {**place, "scales": scales, "rotations": rotations}
        parameters |= {name: np.asarray(best[name], dtype=float) for name in _NAMES}
        notes = {"steps": int(kept), "held_out_nats": float(gain), "rank": rank, "n_negatives": len(rows)}
        return FittedProbe(self, parameters, notes=notes, dim=len(axes))

    def score(self, xp: Any, parameters: Mapping[str, Any], activations: Any) -> Any:
        """-log density up to a constant, in nats."""
        near, rest = on_axes(xp, parameters, activations)
        score = xp.zeros_like(rest)
        for layer in range(parameters["rotations"].shape[0]):
            near, log_determinant = _couple(xp, {name: parameters[name][layer, ...] for name in _LAYER}, near)
            score = score - log_determinant
        return score + 0.5 * (xp.sum(near * near, axis=-1) + rest)


def _couple(xp: Any, at: Mapping[str, Any], near: Any) -> tuple[Any, Any]:
    """One layer: moved rows ``(*batch, r)`` and the log determinant ``(*batch,)``."""
    half = near.shape[-1] // 2
    width = near.shape[-1] - half
    turned = xp.matmul(near, at["rotations"])
    fixed, moved = turned[..., :half], turned[..., half:]
    inner = xp.matmul(fixed, at["inner"]) + at["hidden"]
    # silu by tanh, whose gradient stays finite where exp would overflow
    active = inner * (0.5 + 0.5 * xp.tanh(0.5 * inner))
    both = xp.matmul(active, at["outer"]) + at["offset"]
    log_scale = _LARGEST_LOG_SCALE * xp.tanh(both[..., :width])
    moved = moved * xp.exp(log_scale) + both[..., width:]
    return xp.concat([fixed, moved], axis=-1), xp.sum(log_scale, axis=-1)


@cache
def _program(checks: int, learning_rate: float, decay: float) -> Any:
    """The compiled descent; arguments float32 ``near (n, r)``, ``judged (m, r)``, rotations, first weights, order.

    Returns the gain on the Gaussian in held-out nats per row, the step of that moment, and the parameters then.
    """
    import jax
    import jax.numpy as jnp
    import optax

    method = optax.chain(
        optax.clip_by_global_norm(5.0),
        optax.adamw(
            optax.cosine_decay_schedule(learning_rate, checks * _CHECK_EVERY),
            weight_decay=decay,
            mask={"inner": True, "hidden": False, "outer": True, "offset": False},
        ),
    )

    def loss(at: Any, rotations: Any, rows: Any) -> Any:
        # a scan over layers compiles in a fraction of the time that a loop takes
        moved, gained = jax.lax.scan(
            lambda near, layer: _couple(jnp, layer, near), rows, {**at, "rotations": rotations}
        )
        return (0.5 * (moved**2).sum(axis=-1) - gained.sum(axis=0)).mean()

    def descend(near: Any, judged: Any, rotations: Any, first: Any, order: Any) -> Any:
        def step(carry: Any, rows: Any) -> Any:
            at, state = carry
            moves, state = method.update(jax.grad(loss)(at, rotations, near[rows]), state, at)
            return (optax.apply_updates(at, moves), state), None

        def check(carry: Any, rows: Any) -> Any:
            at, state, least, count, kept, best = carry
            (at, state), _ = jax.lax.scan(step, (at, state), rows)
            now = loss(at, rotations, judged)
            better, count = now < least, count + _CHECK_EVERY
            best = jax.tree.map(lambda new, old: jnp.where(better, new, old), at, best)
            return (at, state, jnp.where(better, now, least), count, jnp.where(better, count, kept), best), None

        begin = loss(first, rotations, judged)
        nil = jnp.zeros((), dtype=jnp.int32)
        looks = order[: checks * _CHECK_EVERY].reshape(checks, _CHECK_EVERY, -1)
        (_, _, least, _, kept, best), _ = jax.lax.scan(
            check, (first, method.init(first), begin, nil, nil, first), looks
        )
        return begin - least, kept, best

    return jax.jit(descend)
