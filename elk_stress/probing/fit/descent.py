r"""Many trials of a recipe in one compiled descent, and the choice among them on rows they did not learn from.

A trial is one configuration (a penalty, a rank, a window) on one fold, or on all rows. Every trial owns some columns of
one weight matrix ``W (d, C)``, so that a step of all of them is one matrix product forward and one back. Trial j, of m,
descends

    sum_i learned_ij softplus(-y_i f_j(x_i)) + (1/2) sum over its columns of penalty_c ||W_c||^2,
    f_j = pool(x W)_j + b_j,      y_i = +-1,

where ``pool`` is what makes a recipe that recipe: a quadratic form, a maximum or an attended mean over tokens. The
weights ``learned`` and ``judged`` come from :func:`elk_stress.probing.fit.folds.cross_weights`; the configuration of
the least mean held-out loss is chosen, and the fit of it on all rows, which descended beside the folds', is kept
(:func:`choose`). So nothing is fitted twice, and no row vouches for what it taught.

Optimizer: Adam, the step size falling to zero along a cosine, in which all weights that enter a unit (a column) share
the mean of their second moments (:func:`adam_by_unit`, as in 2406.16793): one step size per weight would move the
weights of features that say nothing as fast as those of features that do. Figures: the docstring of the ``mlp`` probe.

A step looks at one batch of rows in a seeded order. Float32. jax and optax are imported when something descends.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Trials", "adam_by_unit", "checked_options", "choose", "cross_fit", "dealer"]

# length of the first step of a column of weights (and of a bias), in standardized units
_STEP = 0.2


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


def checked_options(name: str, penalties: Any, folds: int, steps: int, batch: int) -> tuple[float, ...]:
    """Penalties as floats, after all options of the descent of the recipe ``name`` were checked.

    Raises:
        ValueError: no penalty or one that is not above 0, or folds, steps or batch below 1.
    """
    found = tuple(float(penalty) for penalty in penalties)
    if not found or not min(found) > 0 or min(folds, steps, batch) < 1:
        raise ValueError(
            f"{name} needs at least one penalty, each above 0, and folds, steps and batch of at least 1; got penalties "
            f"{found}, folds {folds}, steps {steps}, batch {batch}"
        )
    return found


def choose(losses: np.ndarray, fits: int) -> tuple[int, int, float]:
    """The configuration of the least mean held-out loss, the member of it that learned from all rows, and that loss.

    ``losses (m,)`` are in the order (configuration, fold), ``fits`` of each: its folds, and last the one on all rows.
    """
    by_configuration = losses.reshape(-1, fits)[:, :-1].mean(axis=1)
    chosen = int(by_configuration.argmin())
    return chosen, chosen * fits + fits - 1, float(by_configuration[chosen])


def dealer(rows: int, batch: int, rng: np.random.Generator) -> Callable[[np.ndarray], np.ndarray]:
    """A function that deals arrays ``(rows, ...)`` into ``(batches, size, ...)`` float32, all in one order drawn here.

    Batches are of equal size, at most ``batch``; the places that are left over hold zeros, also where weights stand: so
    they weigh nothing.
    """
    batches = -(-rows // batch)
    size = -(-rows // batches)
    place = rng.permutation(batches * size)[:rows]

    def dealt(columns: np.ndarray) -> np.ndarray:
        out = np.zeros((batches * size, *columns.shape[1:]), dtype=np.float32)
        out[place] = columns
        return out.reshape(batches, size, *columns.shape[1:])

    return dealt


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
    dealt = dealer(len(rows), batch, np.random.default_rng(np.random.SeedSequence(seed)))
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


def adam_by_unit() -> Any:
    """Adam (an ``optax`` transformation) in which the weights that enter a unit share the mean of their second moments.

    Parameters are a dict of arrays of one dtype with an entry ``bias``; units are the columns of the entry ``weight``.
    """
    import jax.numpy as jnp
    import optax

    def size(slopes: Any) -> Any:
        return {name: (g**2).mean(axis=0) if name == "weight" else g**2 for name, g in slopes.items()}

    def begin(at: Any) -> Any:
        zero = {name: jnp.zeros_like(a) for name, a in at.items()}
        return jnp.zeros((), dtype=at["bias"].dtype), zero, size(zero)

    def update(slopes: Any, state: Any, at: Any = None) -> Any:
        count, mean, square = state
        count, sizes = count + 1, size(slopes)
        mean = {name: 0.9 * mean[name] + 0.1 * g for name, g in slopes.items()}
        square = {name: 0.99 * square[name] + 0.01 * v for name, v in sizes.items()}
        rise = jnp.sqrt(1 - 0.99**count) / (1 - 0.9**count)
        moves = {name: rise * mean[name] / (jnp.sqrt(square[name]) + 1e-8) for name in slopes}
        return moves, (count, mean, square)

    return optax.GradientTransformation(begin, update)


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
            adam_by_unit(),
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
