"""Difference of the class medians, feature by feature: mass-mean for data with outliers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from elk_stress.probing.probe import FittedProbe, Traits

__all__ = ["MedianDifference"]


@dataclass(frozen=True)
class MedianDifference:
    """Difference of the class medians, zero halfway between them."""

    name: ClassVar[str] = "median_difference"
    traits: ClassVar[Traits] = Traits(linear=True, flips=True)

    def fit(
        self, activations: np.ndarray, labels: np.ndarray, *, pairs: np.ndarray | None = None, seed: int = 0
    ) -> FittedProbe:
        """Two medians per feature."""
        high, low = (np.median(np.asarray(activations, dtype=float)[labels == k], axis=0) for k in (1, 0))
        weight = high - low
        return FittedProbe(self, {"weight": weight, "bias": np.asarray(-weight @ (high + low) / 2)})

    def score(self, xp: Any, parameters: Mapping[str, Any], activations: Any) -> Any:
        """``activations @ weight + bias``."""
        return xp.matmul(activations, parameters["weight"]) + parameters["bias"]
