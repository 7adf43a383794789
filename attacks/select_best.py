r"""Select the best: no gradients at all; of N candidates the one whose positives the probe likes best is kept.

Threat model: whoever trains many models, or draws many, ships the one that the monitor likes. Choosing one of N spends
exactly ``log2 N`` bits, relative to the distribution that the candidates come from:

* ``prior``: draws ``theta_0 + sigma z`` of the Gaussian weight prior, so that the bits are those of the threat, and
  ``B - log2 N`` is what is left (:func:`elk_stress.core.bits.selection_guarantee`);
* ``finetunes``: N real fine-tunes of the original model (other examples in another order, no probe in the loss), a
  prior of its own: its bits compare with nothing but itself.

Strength 0 keeps the latest candidate without looking, which is the benign control; every positive strength is an
independent repetition of the same selection. Nobody optimizes here beyond the choice, so strengths mean nothing else.

Shapes: cells ``(strengths, models, n_parameters)``.

Reference: best-of-n as optimization, Gao et al. 2022 (2210.10760).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from elk_stress.training.gradient_loop import evade_positives
from elk_stress.training.protocols import Log, State, Subject, Targets

__all__ = ["SelectBest"]


@dataclass(frozen=True)
class SelectBest:
    """Best of N candidates; spends exactly log2 N bits.

    Attributes:
        steps: N, candidates drawn in a run.
        source: where candidates come from: draws of the weight ``prior``, or real ``finetunes``.
        finetune_steps, learning_rate, batch_size: of one fine-tune.
        n_items: labelled items on which the probe's liking is judged; the same for all candidates.
    """

    steps: int = 1024
    source: Literal["prior", "finetunes"] = "prior"
    finetune_steps: int = 100
    learning_rate: float = 1e-3
    batch_size: int = 128
    n_items: int = 512

    name: ClassVar[str] = "select_best"
    access: ClassVar[Literal["none", "score", "weights"]] = "score"
    scopes: ClassVar[tuple[Literal["weights"], ...]] = ("weights",)
    subject: ClassVar[Subject] = "organism"

    def __post_init__(self) -> None:
        if self.source not in ("prior", "finetunes"):
            raise ValueError(f"candidates come from 'prior' or 'finetunes', got source={self.source!r}")

    def start(self, trainee: Any, strengths: np.ndarray, seed: int) -> State:
        """No candidate yet: the original weights."""
        cells = np.broadcast_to(trainee.original, (len(strengths), *trainee.original.shape)).copy()
        return {
            "weights": cells,
            "evasion": np.full(cells.shape[:2], np.inf, dtype=np.float32),
            "strengths": np.asarray(strengths, dtype=np.float32),
            "step": np.zeros((), dtype=np.int32),
            "seed": np.asarray(seed, dtype=np.uint32),
        }

    def advance(self, trainee: Any, state: State, targets: Targets, steps: int) -> tuple[State, Log]:
        """Draw ``steps`` more candidates per cell and keep the best so far."""
        if steps == 0:
            empty = np.zeros((0, *state["weights"].shape[:2]), dtype=np.float32)
            return dict(state), {"task": empty, "evasion": empty}
        program = trainee.remembered(
            ("select_best", self, targets.recipes, steps), lambda: _program(self, trainee, targets, steps)
        )
        weights, evasion, log = program(
            state["weights"],
            state["evasion"],
            state["strengths"],
            np.arange(len(state["strengths"])),
            np.arange(trainee.n_models),
            trainee.original,
            trainee.sigma,
            list(targets.arrays),
            state["step"],
            state["seed"],
        )
        moved = {"weights": np.asarray(weights), "evasion": np.asarray(evasion)}
        rows = np.moveaxis(np.asarray(log), -1, 0)
        step = np.asarray(state["step"] + np.int32(steps))
        return {**state, **moved, "step": step}, {"task": np.full_like(rows, np.nan), "evasion": rows}

    def weights(self, trainee: Any, state: State) -> np.ndarray:
        """The best candidate of every cell so far."""
        return np.asarray(state["weights"])

    def spent(self, trainee: Any, state: State) -> np.ndarray:
        """``log2 N`` where a choice was made, 0 in the benign control."""
        bits = np.log2(max(int(state["step"]), 1))
        return np.where(state["strengths"] > 0, bits, 0.0)[:, None] * np.ones(state["weights"].shape[1])


def _program(attack: SelectBest, trainee: Any, targets: Targets, steps: int) -> Any:
    import jax
    import jax.numpy as jnp
    import optax

    organism, unravel = trainee.organism, trainee.unravel
    adam = optax.adam(attack.learning_rate)

    def drawn(original: Any, sigma: Any, key: Any) -> Any:
        if attack.source == "prior":
            return original + sigma * jax.random.normal(key, original.shape)

        def loss(flat: Any, batch: Any) -> Any:
            return organism.loss(organism.outputs(unravel(flat), batch), batch).mean()

        def step(carry: Any, i: Any) -> Any:
            flat, inner = carry
            slope = jax.grad(loss)(flat, organism.batch(jax.random.fold_in(key, i), attack.batch_size))
            update, inner = adam.update(slope, inner, flat)
            return (optax.apply_updates(flat, update), inner), None

        (flat, _), _ = jax.lax.scan(step, (original, adam.init(original)), jnp.arange(attack.finetune_steps))
        return flat

    def one(
        weights: Any, best: Any, strength: Any, repeat: Any, model: Any, original: Any, sigma: Any, arrays: Any,
        begin: Any, seed: Any,
    ) -> Any:  # fmt: skip
        base = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), repeat), model)
        evasion = evade_positives(organism, unravel, targets.recipes, arrays, jax.random.key(seed), attack.n_items)

        def step(carry: Any, i: Any) -> Any:
            weights, best = carry
            candidate = drawn(original, sigma, jax.random.fold_in(base, begin + i))
            value = evasion(candidate)
            take = (value < best) | (strength == 0)
            carry = jnp.where(take, candidate, weights), jnp.where(take, value, best)
            return carry, carry[1]

        (weights, best), log = jax.lax.scan(step, (weights, best), jnp.arange(steps))
        return weights, best, log

    models = jax.vmap(one, in_axes=(0, 0, None, None, 0, 0, 0, 0, None, None))
    return jax.jit(jax.vmap(models, in_axes=(0, 0, 0, 0, None, None, None, 0, None, None)))


if __name__ == "__main__":
    from elk_stress.cli.script import run_training_attack

    sys.exit(run_training_attack(SelectBest.name))
