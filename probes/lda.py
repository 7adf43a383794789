"""Linear discriminant analysis with shrunk correlations; works with fewer rows than dimensions, in any units.

Equations: class means m1, m0; rows centred on their own class mean, each class given half of the total weight; S their
covariance with its correlations shrunk towards zero (:mod:`elk_stress.probing.fit.density`): ``S' = D ((1 - a) R + a I)
D`` for S = D R D. Then ``w = S'^-1 (m1 - m0)`` and ``score(x) = w . (x - (m0 + m1) / 2)``: the log-odds if both classes
are Gaussian with covariance S' and equally frequent.

a is the oracle-approximating share for ``4 / (1/n1 + 1/n0)`` rows, as many as a mean of two covariances of n1 and n0
rows is worth. Rows are one per (item, context); rows of one item are correlated, so a is somewhat smaller than for
independent ones. Fitting commutes with any change of the features' units: the scores stay as they are.

Shapes: activations ``(*batch, d)`` -> scores ``(*batch,)`` in nats of log-odds.

References: Chen, Wiesel, Eldar & Hero 2010 (0907.4698); the "iid" mass-mean probe of Marks & Tegmark 2310.06824 is this
one without shrinkage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from elk_stress.probing.fit.density import shrunk
from elk_stress.probing.fit.moments import Moments
from elk_stress.probing.fit.streaming import Fitter
from elk_stress.probing.probe import FittedProbe, Traits

__all__ = ["LDA"]


@dataclass(frozen=True)
class LDA:
    """Linear discriminant with shrunk correlations.

    Attributes:
        shrinkage: the share a of the identity in [0, 1], or ``None`` for the oracle-approximating one.
    """

    shrinkage: float | None = None

    name: ClassVar[str] = "lda"
    traits: ClassVar[Traits] = Traits(linear=True, flips=True, streams=True)

    def __post_init__(self) -> None:
        if self.shrinkage is not None and not 0 <= self.shrinkage <= 1:
            raise ValueError(
                f"lda: shrinkage is a share of the identity from 0 to 1, got {self.shrinkage}; None chooses it from "
                "the data"
            )

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
        """The same, batch by batch (:mod:`elk_stress.probing.fit.streaming`)."""
        return Fitter(self._finish, "scatter")

    def _finish(self, moments: tuple[Moments, Moments], rows: object, seed: int) -> FittedProbe:
        from scipy.linalg import LinAlgError, solve

        low, high = (part.mean for part in moments)
        n0, n1 = (part.count for part in moments)
        covariance = (moments[0].covariance + moments[1].covariance) / 2
        spread, correlation, share = shrunk((low + high) / 2, covariance, 4 * n0 * n1 / (n0 + n1), self.shrinkage)
        try:
            towards = np.asarray(solve(correlation, (high - low) / spread, assume_a="pos"))
        except LinAlgError:
            raise ValueError(
                f"lda: the covariance of {n0 + n1} rows in {len(high)} dimensions is singular at shrinkage "
                f"{share:.3g}; give more rows of different items, or shrinkage= a larger number up to 1"
            ) from None
        # the two means were fitted to the same rows
        weight = towards / spread * (max(n0 + n1 - 2, 1) / (n0 + n1))
        parameters = {"weight": weight, "bias": np.asarray(-weight @ (high + low) / 2)}
        return FittedProbe(self, parameters, notes={"shrinkage": share})

    def score(self, xp: Any, parameters: Mapping[str, Any], activations: Any) -> Any:
        """``activations @ weight + bias``."""
        return xp.matmul(activations, parameters["weight"]) + parameters["bias"]
