"""Logistic regression on standardized features with an L2 penalty; the classes weigh the same.

Equations: features standardized to ``z = (x - mean) / sd`` over the training rows, then

    minimize over v, b:  sum_i c_i log(1 + exp(-y_i (v . z_i + b))) + (l2 / 2) ||v||^2,   y in {-1, +1},

with weights c_i that sum to 1, half in each class. The standardization is folded into the parameters:
``w = v / sd``, ``bias = b - w . mean``, so that a saved probe carries its scaler.

The penalty is on the *mean* loss: repeating every row (the same items under more contexts) leaves the probe as it is,
where scikit-learn's ``C`` would weaken the penalty. ``l2 = 0.01`` equals ``C = 1`` at 100 rows.

Shapes: activations ``(*batch, d)`` -> log-odds ``(*batch,)`` in nats at equal class frequencies.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from elk_stress.probe import FittedProbe, Traits

__all__ = ["Logistic"]


@dataclass(frozen=True)
class Logistic:
    """L2-penalized logistic regression on standardized features.

    Attributes:
        l2: weight of ``||v||^2 / 2`` against the mean log-loss; above 0.
        max_iterations: of L-BFGS; whether it converged is written in the notes.
    """

    l2: float = 0.01
    max_iterations: int = 2000

    name: ClassVar[str] = "logistic"
    traits: ClassVar[Traits] = Traits(linear=True)

    def fit(
        self, activations: np.ndarray, labels: np.ndarray, *, pairs: np.ndarray | None = None, seed: int = 0
    ) -> FittedProbe:
        """Fit on ``activations (n, d)``, ``labels (n,)``; the problem is convex, ``seed`` is not used.

        Raises:
            ValueError: ``l2`` is not positive (separable classes would send the weights to infinity).
        """
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        if not self.l2 > 0:
            raise ValueError(f"logistic: l2 must be above 0, got {self.l2}; for almost no penalty use 1e-6")
        rows, targets = np.asarray(activations, dtype=float), np.asarray(labels).astype(int)
        mean, spread = rows.mean(axis=0), rows.std(axis=0)
        # a feature that is constant but for rounding carries nothing; dividing by its spread would amplify noise
        spread = np.where(spread > 1e-10 * np.maximum(1.0, np.abs(mean)), spread, np.inf)
        model = LogisticRegression(
            C=1.0 / (self.l2 * len(rows)), class_weight="balanced", max_iter=self.max_iterations, tol=1e-6
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            model.fit((rows - mean) / spread, targets)
        converged = not any(issubclass(w.category, ConvergenceWarning) for w in caught)
        weight = model.coef_[0] / spread
        parameters = {"weight": weight, "bias": np.asarray(model.intercept_[0] - weight @ mean)}
        return FittedProbe(self, parameters, notes={"converged": converged})

    def score(self, xp: Any, parameters: Mapping[str, Any], activations: Any) -> Any:
        """``activations @ weight + bias``."""
        return xp.matmul(activations, parameters["weight"]) + parameters["bias"]
