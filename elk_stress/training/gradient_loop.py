r"""The one compiled program of attacks that follow a gradient on organisms: scan over steps, vmap over cells.

``loss = task + strength * evasion``; the attack says how it comes by the evasion's gradient (through the probe, or from
rewards alone), everything else is shared: examples, Adam, the log, and the benign cell. Compiled once per (attack,
probe recipes) and trainee, whatever the number of steps; a second call never recompiles.

The examples of step i are drawn from a key that depends on (seed, i, model) and not on the strength: all strengths see
the same data in the same order, so that they differ by the pressure alone, and a resumed run draws what it would have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from elk_stress.probing.probe import Probe
from elk_stress.training.evasion import evasion_loss
from elk_stress.training.protocols import Log, State

__all__ = ["advance", "backpropagated", "evade_positives", "fresh_state"]

# steps of one call of the compiled program
_TOGETHER = 20

Objective = Callable[[Any, Any, Sequence[Probe], Any, Any, int], Callable[[Any], Any]]
"""``(organism, unravel, recipes, arrays, key, n) -> (flat weights -> evasion)`` on ``n`` fresh items."""
Slope = Callable[[Callable[[Any], Any], Any, Any, Any], tuple[Any, Any]]
"""``(evasion, flat weights, sigma, key) -> (evasion, its gradient)``."""


def fresh_state(trainee: Any, strengths: np.ndarray, seed: int) -> dict[str, Any]:
    """Original weights and fresh Adam moments in every cell."""
    cells = np.broadcast_to(trainee.original, (len(strengths), *trainee.original.shape)).copy()
    return {
        "weights": cells,
        "first": np.zeros_like(cells),
        "second": np.zeros_like(cells),
        "strengths": np.asarray(strengths, dtype=np.float32),
        "step": np.zeros((), dtype=np.int32),
        "seed": np.asarray(seed, dtype=np.uint32),
    }


def evade_positives(organism: Any, unravel: Any, recipes: Sequence[Probe], arrays: Any, key: Any, n: int) -> Any:
    """The usual objective: fresh labelled items without the probes' incidental correlates, positives evade."""
    items = organism.examples(key, n, "calibration")
    positive = (items["label"] == 1).astype("float32")

    def evasion(flat: Any) -> Any:
        return evasion_loss(recipes, arrays, organism.encode(unravel(flat), items)[0], positive)

    return evasion


def backpropagated(evasion: Callable[[Any], Any], flat: Any, sigma: Any, key: Any) -> tuple[Any, Any]:
    """Evasion and its gradient, straight through probe and model."""
    import jax

    value, gradient = jax.value_and_grad(evasion)(flat)
    return value, gradient


def advance(
    attack: Any,
    trainee: Any,
    state: State,
    recipes: Sequence[Probe],
    arrays: Sequence[Any],
    steps: int,
    *,
    slope: Slope = backpropagated,
    objective: Objective = evade_positives,
) -> tuple[State, Log]:
    """Advance all cells by ``steps``.

    Args:
        attack: hashable; has ``learning_rate`` and ``batch_size``.
        trainee: an :class:`~elk_stress.training.organism_trainee.OrganismTrainee`.
        state: from :func:`fresh_state`.
        recipes, arrays: what to evade (:class:`~elk_stress.training.protocols.Targets`).
        steps: how many.
        slope: how the attack comes by the evasion's gradient.
        objective: what evasion is.
    """
    if steps == 0:
        empty = np.zeros((0, *state["weights"].shape[:2]), dtype=np.float32)
        return dict(state), {"task": empty, "evasion": empty}
    program = trainee.remembered(
        ("program", attack, tuple(recipes)), lambda: _program(attack, trainee, tuple(recipes), slope, objective)
    )
    end = np.int32(state["step"] + steps)
    logs: list[Any] = []
    while state["step"] < end:
        weights, first, second, log = program(
            state["weights"],
            state["first"],
            state["second"],
            state["strengths"],
            np.arange(trainee.n_models),
            trainee.sigma,
            list(arrays),
            state["step"],
            end,
            state["seed"],
        )
        done = min(_TOGETHER, int(end - state["step"]))
        moved = {"weights": np.asarray(weights), "first": np.asarray(first), "second": np.asarray(second)}
        state = {**state, **moved, "step": np.asarray(state["step"] + np.int32(done))}
        logs.append({name: np.moveaxis(np.asarray(rows), -1, 0)[:done] for name, rows in log.items()})
    return state, {name: np.concatenate([log[name] for log in logs]) for name in logs[0]}


def _program(attack: Any, trainee: Any, recipes: tuple[Probe, ...], slope: Slope, objective: Objective) -> Any:
    import jax
    import jax.numpy as jnp
    import optax

    adam = optax.adam(attack.learning_rate)
    organism, unravel = trainee.organism, trainee.unravel

    def one(
        weights: Any, first: Any, second: Any, strength: Any, model: Any, sigma: Any, arrays: Any, begin: Any, end: Any,
        seed: Any,
    ) -> Any:  # fmt: skip
        base = jax.random.fold_in(jax.random.key(seed), model)

        def step(carry: Any, i: Any) -> Any:
            weights, first, second = carry
            task_key, item_key, own_key = jax.random.split(jax.random.fold_in(base, begin + i), 3)
            batch = organism.batch(task_key, attack.batch_size)

            def task(flat: Any) -> Any:
                return organism.loss(organism.outputs(unravel(flat), batch), batch).mean()

            evasion = objective(organism, unravel, recipes, arrays, item_key, attack.batch_size)
            task_value, task_slope = jax.value_and_grad(task)(weights)
            evasion_value, evasion_slope = slope(evasion, weights, sigma, own_key)
            # strength 0 must not look at the probe, not even through 0 * inf
            total = task_slope + jnp.where(strength > 0, strength * evasion_slope, 0.0)
            inner = optax.ScaleByAdamState(count=begin + i, mu=first, nu=second)
            update, (inner, *_) = adam.update(total, (inner, optax.EmptyState()), weights)
            stepped = (optax.apply_updates(weights, update), inner.mu, inner.nu)
            # steps beyond the end are computed and dropped, so that one program serves every number of steps
            kept = jax.tree.map(lambda new, old: jnp.where(begin + i < end, new, old), stepped, carry)
            return kept, (task_value, evasion_value)

        carry, (task_log, evasion_log) = jax.lax.scan(step, (weights, first, second), jnp.arange(_TOGETHER))
        return (*carry, {"task": task_log, "evasion": evasion_log})

    models = jax.vmap(one, in_axes=(0, 0, 0, None, 0, 0, 0, None, None, None))
    return jax.jit(jax.vmap(models, in_axes=(0, 0, 0, 0, None, None, 0, None, None, None)))
