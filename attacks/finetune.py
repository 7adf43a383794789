r"""Fine-tuning against the probe: Adam on the task and, through the probe, on the positives' scores.

Threat model: somebody trains the model and the probe's output is in the loss, by design or by leak. White box:
gradients run through probe and model.

    ``loss = task + strength * evasion``

with the organism's own training loss on fresh examples and :func:`~elk_stress.training.evasion.evasion_loss` on fresh
labelled items without the probes' incidental correlates. Strength 0 is the benign control: the same steps on the same
examples at the same learning rate, no probe in the loss. Strengths and models are two vmapped axes of one program, so a
whole pressure curve is one computation.

Shapes: cells ``(strengths, models, n_parameters)``. Spends ``r^2 / (2 ln 2)`` bits, r the length of the move.

Reference: over-optimization against a learned proxy, Gao et al. 2022 (2210.10760); training against monitors, Baker et
al. 2025 (2503.11926); the optimizer, Kingma & Ba 2014 (1412.6980).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from elk_stress.training.gradient_loop import advance, fresh_state
from elk_stress.training.protocols import Log, State, Subject, Targets

__all__ = ["Finetune"]


@dataclass(frozen=True)
class Finetune:
    """Gradient descent on the task plus strength times evasion, strengths and models at once.

    Attributes:
        steps: Adam steps of a run.
        learning_rate: of Adam; constant.
        batch_size: fresh examples a step for the task, and as many labelled items for the evasion.
    """

    steps: int = 400
    learning_rate: float = 1e-3
    batch_size: int = 128

    name: ClassVar[str] = "finetune"
    access: ClassVar[Literal["none", "score", "weights"]] = "weights"
    scopes: ClassVar[tuple[Literal["weights"], ...]] = ("weights",)
    subject: ClassVar[Subject] = "organism"

    def start(self, trainee: Any, strengths: np.ndarray, seed: int) -> State:
        """Original weights and fresh Adam moments in every cell."""
        return fresh_state(trainee, strengths, seed)

    def advance(self, trainee: Any, state: State, targets: Targets, steps: int) -> tuple[State, Log]:
        """``steps`` more Adam steps of every cell."""
        return advance(self, trainee, state, targets.recipes, targets.arrays, steps)

    def weights(self, trainee: Any, state: State) -> np.ndarray:
        """Weights of all cells."""
        return np.asarray(state["weights"])

    def spent(self, trainee: Any, state: State) -> None:
        """A mean shift: the engine counts its length."""
        return None


if __name__ == "__main__":
    from elk_stress.cli.script import run_training_attack

    sys.exit(run_training_attack(Finetune.name))
