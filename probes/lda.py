"""Linear discriminant analysis with a shrunk covariance; works with fewer rows than dimensions.

Equations: class means m1, m0; rows centred on their own class mean, each class given half of the total weight; S their
covariance shrunk towards a multiple of the identity, ``S = (1 - a) S_emp + a tr(S_emp)/d I``, with Ledoit and Wolf's
closed form for a. Then ``w = S^-1 (m1 - m0)`` and ``score(x) = w . (x - (m0 + m1) / 2)``: the log-odds if both classes
are Gaussian with covariance S and equally frequent.

Shapes: activations ``(*batch, d)`` -> scores ``(*batch,)`` in nats of log-odds. Rows are one per (item, context); rows
of one item are correlated, so a is somewhat smaller than independent rows would give. Shrinking towards the identity
makes fitting commute with rotations of the activations.

References: Ledoit & Wolf 2004 (J. Multivariate Analysis 88); the "iid" mass-mean probe of Marks & Tegmark 2310.06824 is
this one without shrinkage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from elk_stress.moments import Moments, ledoit_wolf_share
from elk_stress.probe import FittedProbe, Traits
from elk_stress.streaming import Fitter

__all__ = ["LDA"]


@dataclass(frozen=True)
class LDA:
    """Linear discriminant with a Ledoit-Wolf shrunk covariance.

    Attributes:
        shrinkage: the share a of the identity in [0, 1], or ``None`` for Ledoit and Wolf's own choice.
    """

    shrinkage: float | None = None

    name: ClassVar[str] = "lda"
    traits: ClassVar[Traits] = Traits(linear=True, rotation_equivariant=True, flips=True, streams=True)

    def fit(
        self, activations: np.ndarray, labels: np.ndarray, *, pairs: np.ndarray | None = None, seed: int = 0
    ) -> FittedProbe:
        """Fit on ``activations (n, d)``, ``labels (n,)``; deterministic, ``seed`` is not used.

        Raises:
            ValueError: one row per class, which shows no spread; or a shrinkage that leaves the covariance singular.
        """
        fitter = self.fitter()
        fitter.update(activations, labels)
        return fitter.fit(seed=seed)

    def fitter(self) -> Fitter:
        """The same, batch by batch (:mod:`elk_stress.streaming`)."""
        return Fitter(self._finish, "scatter")

    def _finish(self, moments: tuple[Moments, Moments], rows: object, seed: int) -> FittedProbe:
        from scipy.linalg import LinAlgError, solve

        low, high = moments[0].mean, moments[1].mean
        covariance, share = _pooled_covariance(moments, self.shrinkage)
        try:
            weight = np.asarray(solve(covariance, high - low, assume_a="pos"))
        except LinAlgError:
            raise ValueError(
                f"lda: the covariance of {moments[0].count + moments[1].count} rows in {len(high)} dimensions is "
                f"singular at shrinkage {share:.3g}; give more rows of different items, or shrinkage= a larger number "
                "up to 1"
            ) from None
        parameters = {"weight": weight, "bias": np.asarray(-weight @ (high + low) / 2)}
        return FittedProbe(self, parameters, notes={"shrinkage": share})

    def score(self, xp: Any, parameters: Mapping[str, Any], activations: Any) -> Any:
        """``activations @ weight + bias``."""
        return xp.matmul(activations, parameters["weight"]) + parameters["bias"]


def _pooled_covariance(moments: tuple[Moments, Moments], shrinkage: float | None) -> tuple[np.ndarray, float]:
    """Within-class covariance, each class weighing half, and the share of the identity in it."""
    count = moments[0].count + moments[1].count
    covariance, fourth = np.zeros(()), 0.0
    for part in moments:
        assert part.square is not None
        covariance = covariance + part.square / (2 * part.count)
        # rows scaled by sqrt(n / 2n_c): their mean outer product is the average of the two classes' covariances
        fourth += part.fourth * (count / (2 * part.count)) ** 2
    share = ledoit_wolf_share(covariance, fourth, count) if shrinkage is None else shrinkage
    dim = len(covariance)
    shrunk = (1 - share) * covariance + share * np.trace(covariance) / dim * np.eye(dim)
    # the two means were fitted to the same rows
    return shrunk * (count / max(count - 2, 1)), float(share)
