r"""Mahalanobis distance from the negatives: a detector of anomalies that never saw a positive (Lee et al. 1807.03888).

Equations: with the negatives' mean m and covariance C, its correlations shrunk as ``C' = D ((1 - a) R + a I) D`` with
the oracle-approximating share a of Chen, Wiesel, Eldar & Hero 2010 (0907.4698; :mod:`elk_stress.probing.fit.density`),

    score(x) = sqrt(1 + (x - m)^T C'^-1 (x - m)).

a needs count, mean and scatter alone, so merged moments fit the same probe. Units do not matter: a feature times 1000
leaves every score as it is.

Why this form. Every increasing function of the distance ranks alike and fails at the same points. The square's slope
grows without bound; the plain distance has no slope at the mean itself (0/0). The root of one plus the square is smooth
everywhere, nearly linear away from the mean, and no steeper than 1 in whitened coordinates: that is the bound of
``lipschitz``, ``||W^T F||`` for moves ``F u`` (W whitens), and gives certified bits.

Shapes: activations ``(*batch, d)`` -> ``(*batch,)``, in standard deviations, at least 1. Centred before it is whitened,
so that float32 does not cancel.

As a baseline of mechanistic anomaly detection: Johnston et al. 2504.08812.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from elk_stress.probing.fit.density import enough_negatives, shrunk, spectrum
from elk_stress.probing.fit.moments import Moments
from elk_stress.probing.fit.streaming import Fitter
from elk_stress.probing.probe import FittedProbe, Traits

__all__ = ["Mahalanobis"]


@dataclass(frozen=True)
class Mahalanobis:
    """Distance from the negatives' mean in their own covariance, correlations shrunk; learns from negatives alone.

    Attributes:
        shrinkage: the share a of the identity in (0, 1], or ``None`` for the oracle-approximating one.
    """

    shrinkage: float | None = None

    name: ClassVar[str] = "mahalanobis"
    traits: ClassVar[Traits] = Traits(negatives_only=True, streams=True)

    def __post_init__(self) -> None:
        if self.shrinkage is not None and not 0 < self.shrinkage <= 1:
            raise ValueError(
                f"mahalanobis: shrinkage is a share of the identity above 0 and up to 1, got {self.shrinkage}; "
                "None chooses it from the data"
            )

    def fit(
        self, activations: np.ndarray, labels: np.ndarray, *, pairs: np.ndarray | None = None, seed: int = 0
    ) -> FittedProbe:
        """Fit on the negatives among ``activations (n, d)``; deterministic, ``seed`` is not used.

        Raises:
            ValueError: fewer than two different negatives.
        """
        fitter = self.fitter()
        fitter.update(activations, labels)
        return fitter.fit(seed=seed)

    def fitter(self) -> Fitter:
        """The same, batch by batch (:mod:`elk_stress.probing.fit.streaming`)."""
        return Fitter(self._finish, "scatter", negatives_only=True)

    def _finish(self, moments: tuple[Moments, Moments], rows: object, seed: int) -> FittedProbe:
        enough_negatives(moments[0].count, self.name)
        return self.from_moments(moments[0])

    def from_moments(self, negatives: Moments) -> FittedProbe:
        """The probe of the negatives' moments (count, mean and scatter), however they were gathered.

        Raises:
            ValueError: fewer than two different negatives, or moments without a scatter matrix.
        """
        spread, correlation, share = shrunk(negatives.mean, negatives.covariance, negatives.count, self.shrinkage)
        sizes, axes = spectrum(correlation)
        # symmetric but for the units, so that the signs and order of the axes do not matter
        whitener = (axes / np.sqrt(sizes)) @ axes.T / spread[:, None]
        return FittedProbe(
            self,
            {"centre": negatives.mean, "whitener": whitener},
            notes={"shrinkage": share, "n_negatives": negatives.count},
            dim=len(negatives.mean),
        )

    def score(self, xp: Any, parameters: Mapping[str, Any], activations: Any) -> Any:
        """``sqrt(1 + ||(activations - centre) @ whitener||^2)``."""
        white = xp.matmul(activations - parameters["centre"], parameters["whitener"])
        return xp.sqrt(1.0 + xp.sum(white * white, axis=-1))

    def lipschitz(self, parameters: Mapping[str, np.ndarray], factor: np.ndarray) -> float:
        """The spectral norm of ``whitener^T @ factor``: the score is 1-Lipschitz in whitened coordinates."""
        return float(np.linalg.norm(parameters["whitener"].T @ factor, 2))
