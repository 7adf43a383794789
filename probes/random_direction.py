"""A random direction: the control that a probe must beat to have learned anything.

Equations: ``v`` uniform on the unit sphere, ``score(x) = v . (x - mean) / sd(v . x)``, mean and sd over the training
rows. Labels are never read. The scale only makes its scores comparable in size with those of a fitted probe; bits,
AUROC and recall do not depend on it.

Shapes: activations ``(*batch, d)`` -> scores ``(*batch,)``, in standard deviations of the training scores. Its clean
AUROC has expectation 1/2 over the *seed*; on data whose classes lie far apart in few dimensions, a single seed may be
well off 1/2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from elk_stress.probing.probe import FittedProbe, Traits

__all__ = ["RandomDirection"]


@dataclass(frozen=True)
class RandomDirection:
    """A seeded random direction, scaled by the data's spread along it; ignores the labels."""

    name: ClassVar[str] = "random_direction"
    traits: ClassVar[Traits] = Traits(learns=False, linear=True)

    def fit(
        self, activations: np.ndarray, labels: np.ndarray, *, pairs: np.ndarray | None = None, seed: int = 0
    ) -> FittedProbe:
        """Draw the direction from ``seed``; centre and scale it on ``activations (n, d)``."""
        rows = np.asarray(activations, dtype=float)
        draw = np.random.default_rng(np.random.SeedSequence(seed)).standard_normal(rows.shape[-1])
        unit = draw / np.linalg.norm(draw)
        along = rows @ unit
        # identical rows have no spread: keep the unit direction instead of dividing by zero
        weight: np.ndarray = np.asarray(unit / (float(along.std()) or 1.0))
        bias: np.ndarray = np.asarray(-(rows.mean(axis=0) @ weight))
        return FittedProbe(self, {"weight": weight, "bias": bias})

    def score(self, xp: Any, parameters: Mapping[str, Any], activations: Any) -> Any:
        """``activations @ weight + bias``."""
        return xp.matmul(activations, parameters["weight"]) + parameters["bias"]
