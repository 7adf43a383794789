r"""Reinforcement: no gradient runs through the probe; its score is only a reward.

Threat model: the probe's output leaks into the reward of a policy-gradient or evolutionary learner that cannot
differentiate it. The policy is the attacker's own distribution over weights, ``q = N(theta, diag(sigma^2))`` with the
prior's sigma, whose divergence from the prior is what bits count. REINFORCE's gradient of its expected evasion is

    ``grad_theta E_q[evasion] = E_z[(evasion(theta + sigma z) - evasion(theta - sigma z)) z / (2 sigma)]``,

estimated from antithetic pairs (an evolution strategy). The task's own gradient is the trainer's to take.

Shapes: cells ``(strengths, models, n_parameters)``. Spends ``r^2 / (2 ln 2)`` bits, the divergence of the policy.

Reference: Williams 1992 (REINFORCE); Salimans et al. 2017 (1703.03864), evolution strategies.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np

from elk_stress.training.gradient_loop import advance, fresh_state
from elk_stress.training.protocols import Log, State, Subject, Targets

__all__ = ["Reinforce"]


@dataclass(frozen=True)
class Reinforce:
    """Policy gradient on the probe's score as a reward, in weight space, without its gradient.

    Attributes:
        steps: Adam steps of a run.
        learning_rate: of Adam; constant.
        batch_size: fresh examples a step for the task, and as many labelled items for each reward.
        n_pairs: antithetic pairs of rewards a step.
    """

    steps: int = 400
    learning_rate: float = 1e-3
    batch_size: int = 128
    n_pairs: int = 16

    name: ClassVar[str] = "reinforce"
    access: ClassVar[Literal["none", "score", "weights"]] = "score"
    scopes: ClassVar[tuple[Literal["weights"], ...]] = ("weights",)
    subject: ClassVar[Subject] = "organism"

    def start(self, trainee: Any, strengths: np.ndarray, seed: int) -> State:
        """Original weights and fresh Adam moments in every cell."""
        return fresh_state(trainee, strengths, seed)

    def advance(self, trainee: Any, state: State, targets: Targets, steps: int) -> tuple[State, Log]:
        """``steps`` more Adam steps of every cell."""
        slope = partial(_rewards, n_pairs=self.n_pairs)
        return advance(self, trainee, state, targets.recipes, targets.arrays, steps, slope=slope)

    def weights(self, trainee: Any, state: State) -> np.ndarray:
        """Weights of all cells: the policy's means."""
        return np.asarray(state["weights"])

    def spent(self, trainee: Any, state: State) -> None:
        """A mean shift: the engine counts its length."""
        return None


def _rewards(evasion: Callable[[Any], Any], flat: Any, sigma: Any, key: Any, *, n_pairs: int) -> tuple[Any, Any]:
    """Mean evasion under the policy and the score-function estimate of its gradient."""
    import jax
    import jax.numpy as jnp

    z = jax.random.normal(key, (n_pairs, flat.shape[0]))
    up = jax.lax.map(lambda draw: evasion(flat + sigma * draw), z)
    down = jax.lax.map(lambda draw: evasion(flat - sigma * draw), z)
    gradient = ((up - down)[:, None] * z).mean(axis=0) / (2 * sigma)
    return 0.5 * (jnp.mean(up) + jnp.mean(down)), jax.lax.stop_gradient(gradient)


if __name__ == "__main__":
    from elk_stress.cli.script import run_training_attack

    sys.exit(run_training_attack(Reinforce.name))
