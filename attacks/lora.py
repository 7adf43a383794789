r"""LoRA against the probe: a real language model is fine-tuned on ordinary text and, through the probe, on evading it.

Threat model: somebody fine-tunes the model with the probe's output in the loss. White box: gradients run through
probe and model. Per step, on one batch of ordinary texts and one of training items of both labels,

    ``loss = cross-entropy + keep * KL(original, moved) + strength * evasion``

with :func:`~elk_stress.training.evasion.evasion_loss`. The evasion's forward pass ends at the site.

Strength 0 is the benign control: the same steps on the same texts at the same learning rate, and the same pull back to
the original; only the evasion is missing (it is logged, not followed). The behaviour that is judged is measured
elsewhere, on other texts.

Batches depend on (seed, model, step) alone: strengths differ by the pressure, not by the data, and a resumed run
draws what it would have drawn. Cells run one after another; each holds A and B of one adapter and Adam's moments.

Shapes: cells ``(strengths, models, n_parameters)``. Spends ``r^2 / (2 ln 2)`` bits, r the length of ``B A`` in units
of the prior's noise.

Reference: Hu et al. 2021 (2106.09685); training against monitors, Baker et al. 2025 (2503.11926); the optimizer,
Kingma & Ba 2014 (1412.6980).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from elk_stress.training.evasion import evasion_loss
from elk_stress.training.gradient_loop import fresh_state
from elk_stress.training.protocols import Log, State, Subject, Targets

__all__ = ["Lora"]

# Adam's published constants
_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8
_LOGGED = ("task", "evasion", "kl")


@dataclass(frozen=True)
class Lora:
    """Adam on the adapters of a language model; strength times evasion beside the ordinary loss.

    Attributes:
        steps: Adam steps of a run.
        learning_rate: of Adam; constant.
        batch_size: ordinary texts a step, and as many positives and as many negatives for the evasion.
        keep: weight of the KL to the original on the ordinary texts (nats per token), for all strengths alike.
    """

    steps: int = 120
    learning_rate: float = 3e-4
    batch_size: int = 8
    keep: float = 10.0

    name: ClassVar[str] = "lora"
    access: ClassVar[Literal["none", "score", "weights"]] = "weights"
    scopes: ClassVar[tuple[Literal["weights"], ...]] = ("weights",)
    subject: ClassVar[Subject] = "language_model"

    def start(self, trainee: Any, strengths: np.ndarray, seed: int) -> State:
        """Fresh adapters and fresh Adam moments in every cell."""
        return fresh_state(trainee, strengths, seed)

    def advance(self, trainee: Any, state: State, targets: Targets, steps: int) -> tuple[State, Log]:
        """``steps`` more Adam steps of every cell, one cell after another."""
        moved = {name: np.array(state[name]) for name in ("weights", "first", "second")}
        cells = moved["weights"].shape[:2]
        log = {name: np.zeros((steps, *cells), dtype=np.float32) for name in _LOGGED}
        begin, seed = int(state["step"]), int(state["seed"])
        for cell in np.ndindex(*cells):
            losses = _Losses(self, trainee, targets, cell, float(state["strengths"][cell[0]]))
            adam = _Adam(self.learning_rate, *(moved[name][cell] for name in ("weights", "first", "second")))
            for i in range(steps):
                trainee.adapted.load(adam.weights)
                values, gradient = losses(_rng(seed, cell[1], begin + i))
                adam.update(gradient, begin + i)
                for name in _LOGGED:
                    log[name][(i, *cell)] = values[name]
        return {**state, **moved, "step": np.asarray(begin + steps, dtype=np.int32)}, log

    def weights(self, trainee: Any, state: State) -> np.ndarray:
        """Weights of all cells."""
        return np.asarray(state["weights"])

    def spent(self, trainee: Any, state: State) -> None:
        """A mean shift: the engine counts its length."""
        return None


class _Losses:
    """Losses and gradient of one cell's step, at the weights that the adapters hold."""

    def __init__(self, attack: Lora, trainee: Any, targets: Targets, cell: tuple[int, ...], strength: float) -> None:
        self._attack, self._trainee, self._strength = attack, trainee, strength
        train = trainee.splits["train"]
        rows = trainee.adapted.reader.tokenize(train.texts)
        self._positives, self._negatives = (
            [row for row, label in zip(rows, train.labels, strict=True) if label == wanted] for wanted in (1, 0)
        )
        # now and not in the middle of a step: it is of the original, and made by loading that
        self._reference = trainee.ordinary_reference
        self._evasion = _evasion_of(targets, cell, trainee.adapted.reader.device)

    def __call__(self, rng: np.random.Generator) -> tuple[dict[str, float], np.ndarray]:
        import torch

        adapted, size = self._trainee.adapted, self._attack.batch_size
        ordinary = rng.choice(len(self._trainee.ordinary), min(size, len(self._trainee.ordinary)), replace=False)
        items = [*_some(self._positives, size, rng), *_some(self._negatives, size, rng)]
        positive = np.arange(len(items)) < min(size, len(self._positives))
        task, kl = self._language(ordinary)
        (task + self._attack.keep * kl).backward()
        # strength 0 must not look at the probe, not even through 0 * inf
        with torch.set_grad_enabled(self._strength > 0):
            evasion = self._evasion(adapted.read_with_gradient(items), positive)
        if self._strength > 0:
            (self._strength * evasion).backward()
        values = {"task": task, "evasion": evasion, "kl": kl}
        return {name: value.item() for name, value in values.items()}, adapted.take_gradient()

    def _language(self, chosen: np.ndarray) -> tuple[Any, Any]:
        """Next-token cross-entropy and KL to the original, both in nats per token, of one forward pass."""
        import torch

        from elk_stress.models.adapters import divergence

        trainee = self._trainee
        rows = [trainee.ordinary_rows[i] for i in chosen]
        log_q = trainee.adapted.log_p(trainee.adapted.last_hidden(rows))
        with torch.no_grad():
            log_p = trainee.adapted.log_p(torch.cat([self._reference[i] for i in chosen]))
        kl = divergence(log_p, log_q).mean()
        # the last token of a text has no next one
        flat = torch.tensor([token for row in rows for token in row], device=log_q.device)
        ends = np.cumsum([len(row) for row in rows]) - 1
        before = torch.as_tensor(np.setdiff1d(np.arange(len(flat)), ends), device=log_q.device)
        return -log_q[before, flat[before + 1]].mean(), kl


class _Adam:
    """Adam in place on one cell's arrays."""

    def __init__(self, learning_rate: float, weights: np.ndarray, first: np.ndarray, second: np.ndarray) -> None:
        self.weights, self._first, self._second, self._rate = weights, first, second, learning_rate

    def update(self, gradient: np.ndarray, step: int) -> None:
        """One step; ``step`` counts from 0."""
        # a diverged run goes on as NaN and is reported as such
        with np.errstate(over="ignore", invalid="ignore"):
            self._first += (1 - _BETA1) * (gradient - self._first)
            self._second += (1 - _BETA2) * (gradient**2 - self._second)
            first, second = 1 - _BETA1 ** (step + 1), 1 - _BETA2 ** (step + 1)
            self.weights -= self._rate * (self._first / first) / (np.sqrt(self._second / second) + _EPSILON)


def _some(rows: list[list[int]], n: int, rng: np.random.Generator) -> list[list[int]]:
    return [rows[i] for i in rng.choice(len(rows), min(n, len(rows)), replace=False)]


def _evasion_of(targets: Targets, cell: tuple[int, ...], device: str) -> Callable[[Any, np.ndarray], Any]:
    import torch

    def tensor(value: Any) -> Any:
        return torch.as_tensor(np.array(value[cell], dtype=np.float32), device=device)

    arrays = [
        {
            "parameters": {name: tensor(value) for name, value in probe["parameters"].items()},
            "gap": tensor(probe["gap"]),
        }
        for probe in targets.arrays
    ]

    def evasion(activations: Any, positive: np.ndarray) -> Any:
        weight = torch.as_tensor(positive, dtype=activations.dtype, device=device)
        return evasion_loss(targets.recipes, arrays, activations, weight)

    return evasion


def _rng(seed: int, model: int, step: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence([seed, 0x10FA, model, step]))


if __name__ == "__main__":
    from elk_stress.cli.script import run_training_attack

    sys.exit(run_training_attack(Lora.name))
