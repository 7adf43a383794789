"""Mass-mean probe: the difference of the class means.

Equations: with class means m1 (positives) and m0, ``w = m1 - m0`` and ``score(x) = w . (x - (m0 + m1) / 2)``. Each
class enters by its mean alone, so both weigh the same however many rows they have. Nothing is estimated but two means,
which makes it hard to overfit; it ignores the covariance, so correlated features that say nothing about the truth tilt
it (``lda`` is the same probe with the covariance taken into account).

Shapes: activations ``(*batch, d)`` -> scores ``(*batch,)``. Fitting commutes with rotations of the activations.

Reference: Marks & Tegmark, "The Geometry of Truth", 2310.06824.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from elk_stress.probing.fit.moments import Moments
from elk_stress.probing.fit.streaming import Fitter
from elk_stress.probing.probe import FittedProbe, Traits

__all__ = ["MassMean"]


@dataclass(frozen=True)
class MassMean:
    """Difference of the class means, zero halfway between them (Marks & Tegmark 2310.06824)."""

    name: ClassVar[str] = "mass_mean"
    traits: ClassVar[Traits] = Traits(linear=True, rotation_equivariant=True, flips=True, streams=True)

    def fit(
        self, activations: np.ndarray, labels: np.ndarray, *, pairs: np.ndarray | None = None, seed: int = 0
    ) -> FittedProbe:
        """Two means of ``activations (n, d)``; deterministic, ``seed`` is not used."""
        fitter = self.fitter()
        fitter.update(activations, labels)
        return fitter.fit(seed=seed)

    def fitter(self) -> Fitter:
        """The same, batch by batch (:mod:`elk_stress.probing.fit.streaming`)."""
        return Fitter(self._finish)

    def _finish(self, moments: tuple[Moments, Moments], rows: object, seed: int) -> FittedProbe:
        low, high = moments[0].mean, moments[1].mean
        weight = high - low
        return FittedProbe(self, {"weight": weight, "bias": np.asarray(-weight @ (high + low) / 2)})

    def score(self, xp: Any, parameters: Mapping[str, Any], activations: Any) -> Any:
        """``activations @ weight + bias``."""
        return xp.matmul(activations, parameters["weight"]) + parameters["bias"]
