r"""Where on the boundary to look: the shortest mean shift of the weights that breaks the probe and keeps behaviour.

For importance sampling and evidence bounds the *average* draw of ``q = N(theta_0 + sigma c, diag(sigma^2))`` should sit
on the boundary, and in thousands of dimensions that is not where the centre itself is. So

``minimize ||c||^2 / 2  subject to  E_z[margin(c + z)] <= -0.05,  E_z[shift(c + z)] <= 0.8 epsilon``

by an augmented Lagrangian: Adam on c with fresh antithetic noise z in every step, multipliers raised between rounds.
The linearized distance ``beta = margin / ||grad margin||`` at the origin sets the scales: at a flat boundary the
multiplier of a margin that is 1 at the origin is ``beta^2``. White box, in u-space, this is the strongest way to spend
few bits that we know; fine-tuning is compared with it (attack efficiency).

Shapes: ``(models, n_parameters)``. Guarantee: none needed; importance sampling is unbiased for any centre, and the
evidence bound rigorous.

Reference: the design point of structural reliability (Hasofer & Lind 1974) in weight space; augmented Lagrangians,
Nocedal & Wright 2006, chapter 17.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

__all__ = ["WeightSearch"]

_REACH_PAIRS = 4
# of the penalty, over all rounds
_GROWTH = 200.0
# margin (1 at the origin) by which the average draw is to fail: draws differ little, and one just outside never fails
_INSIDE = 0.05


@dataclass(frozen=True)
class WeightSearch:
    """Augmented Lagrangian in u-space, all models at once.

    Attributes:
        rounds, steps: multiplier updates, and Adam steps between them.
        learning_rate: of Adam, relative to the size of a coordinate at the linearized boundary; decays to a twentieth.
        n_pairs: antithetic pairs of noise per step.
        slack: share of epsilon that the mean draw may use.
    """

    rounds: int = 16
    steps: int = 50
    learning_rate: float = 0.15
    n_pairs: int = 1
    slack: float = 0.8

    def __call__(self, parts: Any, data: dict[str, Any], dim: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Search every model.

        Args:
            parts: ``(row, u) -> (margin, shift / epsilon)`` of one model at one point, in jax.
            data: rows of all models.
            dim: number of weights.
            seed: of the noise.

        Returns:
            Centres ``(models, dim)`` and the constraints ``(models, 2)`` there, averaged over the last round: margin
            plus 0.05 and shift / epsilon minus the slack; both at most about 0 where the search succeeded.
        """
        import jax
        import jax.numpy as jnp

        keys = jax.random.split(jax.random.key(seed), len(data["theta"]))
        rows = {name: jnp.asarray(value) for name, value in data.items()}
        centres, seen = _program(self, parts, dim)(rows, keys)
        return np.asarray(centres, dtype=float), np.asarray(seen, dtype=float)


@lru_cache(maxsize=8)
def _program(search: WeightSearch, parts: Any, dim: int) -> Any:
    """The compiled search: ``(rows, keys) -> (centres, constraints)``, models on the first axis."""
    import jax
    import jax.numpy as jnp
    import optax

    total = search.rounds * search.steps
    adam = optax.adam(optax.cosine_decay_schedule(search.learning_rate, total, 0.05))
    # the boundary is curved: the linearization is a scale, not an answer
    nearest, farthest = 3.0, 300.0
    growth = _GROWTH ** (1 / search.rounds)

    def reach(row: Any, key: Any) -> Any:
        """Linearized distance to the boundary of the margin, from the average draw at the origin."""
        half = jax.random.normal(key, (_REACH_PAIRS, dim))

        def margin(c: Any) -> Any:
            return jax.lax.map(lambda z: parts(row, c + z)[0], jnp.concatenate([half, -half])).mean()

        level, slope = jax.value_and_grad(margin)(jnp.zeros(dim))
        return jnp.clip(level / jnp.maximum(jnp.linalg.norm(slope), 1e-12), nearest, farthest)

    def constraints(c: Any, row: Any, key: Any) -> Any:
        half = jax.random.normal(key, (search.n_pairs, dim))
        margin, shift = jax.lax.map(lambda z: parts(row, c + z), jnp.concatenate([half, -half]))
        return jnp.stack([margin.mean() + _INSIDE, jnp.minimum(shift.mean(), 1e3) - search.slack])

    def one(row: Any, key: Any) -> Any:
        beta = reach(row, jax.random.fold_in(key, total))
        unit = beta / dim**0.5

        def lagrangian(c: Any, multiplier: Any, penalty: Any, key: Any) -> Any:
            g = constraints(c, row, key)
            pressed = jax.nn.relu(g + multiplier / penalty)
            return 0.5 * c @ c + 0.5 * penalty * (pressed**2).sum(), g

        def step(carry: Any, i: Any) -> Any:
            c, state, multiplier, penalty = carry
            slope, g = jax.grad(lagrangian, has_aux=True)(c, multiplier, penalty, jax.random.fold_in(key, i))
            slope = jnp.nan_to_num(slope)
            # Adam ignores the size of slopes, so steps are in units of a coordinate at the boundary
            update, state = adam.update(slope, state, c)
            update = unit * update
            return (optax.apply_updates(c, update), state, multiplier, penalty), g

        def turn(carry: Any, r: Any) -> Any:
            carry, seen = jax.lax.scan(step, carry, r * search.steps + jnp.arange(search.steps))
            c, state, multiplier, penalty = carry
            g = seen[-search.steps // 2 :].mean(axis=0)
            return (c, state, jax.nn.relu(multiplier + penalty * g), penalty * growth), g

        start = jnp.zeros(dim)
        carry = (start, adam.init(start), jnp.array([0.5, 0.0]) * beta**2, 0.5 * beta**2)
        (c, _, _, _), seen = jax.lax.scan(turn, carry, jnp.arange(search.rounds))
        return c, seen[-1]

    return jax.jit(jax.vmap(one))
