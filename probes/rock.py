"""The rock: a constant score, which catches nothing and cannot be fooled.

Equation: ``score(x) = 0``. It is the zero of every scale: AUROC 1/2 by definition, log-loss of the base rate, and at no
threshold does it catch a positive (``caught`` means *above* the threshold). A probe is worth what it gains over the
rock, and an attack has taken everything once the probe does no better than it.

Shapes: activations ``(*batch, d)`` -> zeros ``(*batch,)``. Guarantee: its score has gradient zero everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from elk_stress.probing.probe import FittedProbe, Traits

__all__ = ["Rock"]


@dataclass(frozen=True)
class Rock:
    """Constant score 0: the control that learns nothing and catches nothing."""

    name: ClassVar[str] = "rock"
    traits: ClassVar[Traits] = Traits(learns=False, linear=True)

    def fit(
        self, activations: np.ndarray, labels: np.ndarray, *, pairs: np.ndarray | None = None, seed: int = 0
    ) -> FittedProbe:
        """Look at nothing but the width of ``activations (n, d)``."""
        return FittedProbe(self, {"weight": np.zeros(activations.shape[-1]), "bias": np.zeros(())})

    def score(self, xp: Any, parameters: Mapping[str, Any], activations: Any) -> Any:
        """``activations @ 0 + 0``, so that the shape, the namespace and a (zero) gradient are those of any probe."""
        return xp.matmul(activations, parameters["weight"]) + parameters["bias"]
