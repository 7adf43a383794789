r"""Steer: one vector for all items, added to the activations whatever the model is thinking about.

Threat model: the model cannot tell items apart, or whoever steers it does not care to. Two kinds of access:

* ``"gradient"``: descend ``mean_i max(0, score(x_i + L u) - threshold)`` over training positives in the metric of the
  prior: repeat ``u <- shortest step that brings the mean caught score of a linearization to the threshold``; then the
  length at which half of the training catches are lost, by bisection.
* ``"none"``: the difference of class means, ``u = L^+ (mean negative - mean positive)``, halved and doubled. It asks
  the probe nothing (Turner et al. 2023, 2308.10248; Marks & Tegmark 2023, 2310.06824).

Searched on training items, judged on test items. Shapes: u ``(1, candidates, k)``, shortest first.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from elk_stress.thoughts.attacks.protocol import Access, Need, Oracle, Proposal, Scope

__all__ = ["Steer", "SteerMeans"]


@dataclass(frozen=True)
class Steer:
    """One universal steering vector, by the probe's gradient on training items or by the difference of means.

    Attributes:
        feedback: ``"gradient"`` or ``"none"``.
        steps: linearizations (gradient).
        bisections: halvings of the length (gradient).
        lengths: of the difference of means, as factors (none).
    """

    feedback: Literal["gradient", "none"] = "gradient"
    steps: int = 16
    bisections: int = 12
    lengths: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0)

    name: ClassVar[str] = "steer"
    scopes: ClassVar[tuple[Scope, ...]] = ("universal",)
    needs: ClassVar[tuple[Need, ...]] = ("model_access",)
    priors: ClassVar[tuple[str, ...]] = ()

    @property
    def access(self) -> Access:
        """What it asks of the probe: its feedback."""
        return self.feedback

    def propose(self, oracle: Oracle, *, seed: int) -> Proposal:
        """Candidates along one direction, shortest first; nothing is random."""
        model_access = oracle.model_access
        rows, truth = model_access.training, model_access.truth("train")
        x = model_access.activations("train")
        positives = x[rows[truth[rows] == 1]]
        if self.feedback == "none":
            means = x[rows[truth[rows] == 0]].mean(axis=0) - positives.mean(axis=0)
            u = model_access.to_u(means)
            return Proposal((u * np.array(self.lengths)[:, None])[None], centre=u[None])
        u = self._descend(oracle, positives)
        return Proposal(u[None, None], centre=u[None])

    def _descend(self, oracle: Oracle, positives: np.ndarray) -> np.ndarray:
        """``(k,)``: the shortest point found at which half of the training catches are lost."""
        model_access = oracle.model_access
        factor = np.asarray(model_access.prior.factor, dtype=float)

        def lost(u: np.ndarray) -> bool:
            return bool((model_access.score(caught + model_access.to_edit(u)) > model_access.threshold).mean() <= 0.5)

        caught = positives[model_access.score(positives) > model_access.threshold]
        if not len(caught):
            return np.zeros(oracle.dim)
        u = np.zeros(oracle.dim)
        for _ in range(self.steps):
            scores, slopes = model_access.gradient(caught + model_access.to_edit(u))
            # half of the catches are lost when the median one is: those around it decide where to go
            middle = np.argsort(scores, kind="stable")[: max(1, (len(scores) + 1) // 2)]
            slope = np.zeros(oracle.dim)
            slope[: factor.shape[1]] = slopes[middle].mean(axis=0) @ factor
            size = float(slope @ slope)
            if size == 0:
                return np.zeros(oracle.dim)
            excess = float(scores[middle].max()) - model_access.threshold
            target = (float(slope @ u) - excess) / size * slope
            if np.linalg.norm(target - u) <= 1e-3 * (1 + np.linalg.norm(target)):
                u = target
                break
            u = u + 0.7 * (target - u)
        longest = 1.0
        while not lost(longest * u) and longest < 16:
            longest *= 2
        inside, outside = 0.0, longest
        for _ in range(self.bisections):
            middle_way = 0.5 * (inside + outside)
            inside, outside = (inside, middle_way) if lost(middle_way * u) else (middle_way, outside)
        return np.asarray(outside * u)


@dataclass(frozen=True)
class SteerMeans(Steer):
    """The difference of class means, in a few lengths: no access to the probe."""

    feedback: Literal["gradient", "none"] = "none"

    name: ClassVar[str] = "steer_means"


if __name__ == "__main__":
    from elk_stress.cli.script import run_attack

    sys.exit(run_attack(Steer.name))
