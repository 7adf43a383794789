"""A probe seen from another origin: it scores ``x`` as the given probe scores ``x + origin``.

Activations that lie far from 0 for their spread are computed with relative to an origin, because float32 would spend
its digits on the offset. A probe that was given speaks of the original activations, so it moves along:

* linear: ``w.(x + o) + b = w.x + (b + w.o)``, the new bias in float64;
* layers that begin with an affine one: the same of its bias;
* any other: ``x + o`` is handed to it, in float64 where the library has that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from elk_stress.core.arrays import backend_of, like
from elk_stress.probing.probe import FittedProbe, Probe, Traits

__all__ = ["moved"]


def moved(probe: FittedProbe, origin: np.ndarray) -> FittedProbe:
    """``probe`` for activations ``(*batch, d)`` from which ``origin (d,)`` was taken off; see the module."""
    parameters = dict(probe.parameters)
    if probe.traits.linear and not probe.traits.tokens:
        weight = np.asarray(parameters["weight"], dtype=float)
        parameters["bias"] = np.asarray(parameters["bias"], dtype=float) + weight @ origin
        return replace(probe, parameters=parameters)
    layers = getattr(probe.probe, "layers", ())
    if probe.name == "layers" and layers and layers[0] == "affine":
        weight = np.asarray(parameters["weight_0"], dtype=float)
        parameters["bias_0"] = np.asarray(parameters["bias_0"], dtype=float) + origin @ weight
        return replace(probe, parameters=parameters)
    return FittedProbe(_Moved(probe, origin), {}, probe.site, probe.notes, probe.dim)


@dataclass(frozen=True, eq=False)
class _Moved:
    """A fitted probe as a recipe whose score reads activations relative to ``origin``."""

    fitted: FittedProbe
    origin: np.ndarray

    @property
    def recipe(self) -> Probe:
        """The recipe that it moves."""
        return self.fitted.probe

    @property
    def name(self) -> str:
        return self.recipe.name

    @property
    def traits(self) -> Traits:
        return self.recipe.traits

    def fit(
        self,
        activations: np.ndarray,
        labels: np.ndarray,
        *,
        pairs: np.ndarray | None = None,
        seed: int = 0,
        **more: Any,
    ) -> FittedProbe:
        """Fit the recipe: one that is fitted here needs no origin."""
        return self.recipe.fit(activations, labels, pairs=pairs, seed=seed, **more)

    def score(self, xp: Any, parameters: Mapping[str, Any], activations: Any) -> Any:
        wide = activations
        if backend_of(activations) == "torch":
            wide = activations.double()
        elif isinstance(activations, np.ndarray):
            wide = activations.astype(float)
        return xp.astype(self.fitted.score(wide + like(self.origin, wide)), activations.dtype)

    def lipschitz(self, parameters: Mapping[str, Any], factor: np.ndarray) -> float | None:
        """That of the probe: an origin makes nothing steeper."""
        return self.fitted.lipschitz(factor)
