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

from elk_stress.probe import FittedProbe, Traits

__all__ = ["LDA"]


@dataclass(frozen=True)
class LDA:
    """Linear discriminant with a Ledoit-Wolf shrunk covariance.

    Attributes:
        shrinkage: the share a of the identity in [0, 1], or ``None`` for Ledoit and Wolf's own choice.
    """

    shrinkage: float | None = None

    name: ClassVar[str] = "lda"
    traits: ClassVar[Traits] = Traits(linear=True, rotation_equivariant=True)

    def fit(
        self, activations: np.ndarray, labels: np.ndarray, *, pairs: np.ndarray | None = None, seed: int = 0
    ) -> FittedProbe:
        """Fit on ``activations (n, d)``, ``labels (n,)``; deterministic, ``seed`` is not used.

        Raises:
            ValueError: one row per class, which shows no spread; or a shrinkage that leaves the covariance singular.
        """
        from scipy.linalg import LinAlgError, solve

        rows, positive = np.asarray(activations, dtype=float), np.asarray(labels) == 1
        high, low = rows[positive].mean(axis=0), rows[~positive].mean(axis=0)
        covariance, share = _pooled_covariance(rows, positive, high, low, self.shrinkage)
        try:
            weight = np.asarray(solve(covariance, high - low, assume_a="pos"))
        except LinAlgError:
            raise ValueError(
                f"lda: the covariance of {len(rows)} rows in {rows.shape[1]} dimensions is singular at shrinkage "
                f"{share:.3g}; give more rows of different items, or shrinkage= a larger number up to 1"
            ) from None
        parameters = {"weight": weight, "bias": np.asarray(-weight @ (high + low) / 2)}
        return FittedProbe(self, parameters, notes={"shrinkage": share})

    def score(self, xp: Any, parameters: Mapping[str, Any], activations: Any) -> Any:
        """``activations @ weight + bias``."""
        return xp.matmul(activations, parameters["weight"]) + parameters["bias"]


def _pooled_covariance(
    rows: np.ndarray, positive: np.ndarray, high: np.ndarray, low: np.ndarray, shrinkage: float | None
) -> tuple[np.ndarray, float]:
    """Within-class covariance, each class weighing half, and the share of the identity in it."""
    from sklearn.covariance import ledoit_wolf, shrunk_covariance

    n = len(rows)
    n_high = int(positive.sum())
    # rows scaled by sqrt(n / 2n_c): their mean outer product is the average of the two classes' covariances
    scale = np.sqrt(n / 2 / np.where(positive, n_high, n - n_high))
    centred = (rows - np.where(positive[:, None], high, low)) * scale[:, None]
    if shrinkage is None:
        covariance, share = ledoit_wolf(centred, assume_centered=True)
    else:
        covariance, share = shrunk_covariance(centred.T @ centred / n, shrinkage), shrinkage
    # the two means were fitted to the same rows
    return np.asarray(covariance) * (n / max(n - 2, 1)), float(share)
