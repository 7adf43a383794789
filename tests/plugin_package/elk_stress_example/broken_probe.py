"""The median difference with promises broken on purpose: what the public suite must catch in an installed package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from elk_stress.probing.probe import FittedProbe, Traits

__all__ = ["BrokenMedianDifference", "BrokenRotation"]


@dataclass(frozen=True)
class BrokenMedianDifference:
    """Difference of the class medians, with a promise broken.

    Attributes:
        breaks: the promise: ``shape``, ``library``, ``gradient``, ``rows``, ``memory``, ``seed``, ``input``, ``sign``,
            ``flip``, ``linear``, ``file``; ``none`` for none.
    """

    breaks: str = "shape"

    name: ClassVar[str] = "broken_median_difference"
    traits: ClassVar[Traits] = Traits(linear=True, flips=True)

    def __post_init__(self) -> None:
        if self.breaks.startswith("file"):
            # a recipe that is another one whenever it is made
            object.__setattr__(self, "breaks", self.breaks + "!")

    def fit(
        self, activations: np.ndarray, labels: np.ndarray, *, pairs: np.ndarray | None = None, seed: int = 0
    ) -> FittedProbe:
        """Two medians per feature."""
        if self.breaks == "input":
            activations -= activations.mean(axis=0)
        high, low = (np.median(np.asarray(activations, dtype=float)[labels == k], axis=0) for k in (1, 0))
        weight = low - high if self.breaks == "sign" else high - low
        if self.breaks == "seed":
            weight = weight + 1e-3 * np.random.standard_normal(weight.shape)  # noqa: NPY002
        bias = float(-weight @ (high + low) / 2) + (1.0 if self.breaks == "flip" else 0.0)
        return FittedProbe(self, {"weight": weight, "bias": np.asarray(bias)})

    def score(self, xp: Any, parameters: Mapping[str, Any], activations: Any) -> Any:
        """``activations @ weight + bias``, or nearly."""
        out = xp.matmul(activations, parameters["weight"]) + parameters["bias"]
        if self.breaks == "shape":
            return out[..., None]
        if self.breaks == "library":
            return np.asarray(out.detach() if hasattr(out, "detach") else out)
        if self.breaks == "gradient" and hasattr(out, "detach"):
            return out.detach()
        if self.breaks == "rows" and activations.ndim > 1 and activations.shape[0] > 0:
            return out - xp.mean(out)
        if self.breaks == "memory":
            parameters["weight"][...] = 0.99 * parameters["weight"]
        return out**3 if self.breaks == "linear" else out


@dataclass(frozen=True)
class BrokenRotation(BrokenMedianDifference):
    """Promises what medians per feature cannot keep: that rotating the activations changes nothing."""

    breaks: str = "rotation"

    name: ClassVar[str] = "broken_rotation"
    traits: ClassVar[Traits] = Traits(linear=True, rotation_equivariant=True)
