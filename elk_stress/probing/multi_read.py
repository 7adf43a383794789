"""Several reads of an item as one point: how probes of tokens, and probes of one token, meet moves of all of them.

A testbed whose items are read several times (tokens of a text, neutral contexts, sites of equal width) says so by an
attribute ``tokens`` = T, and gives its activations flattened, ``dim = T d``: a move then is one of all reads together,
and priors, events, estimators and attacks need not know. A probe is fitted on what it reads, ``(n, T, d)`` or the last
read ``(n, d)``, and laid out over the flat coordinates afterwards (:func:`flatten`):

============================  ====================================================================
probe                         flat score of ``(*batch, T d)``
============================  ====================================================================
of tokens                     its own, of ``(*batch, T, d)``
of tokens, linear             ``mean_t x_t . w + b``: a linear probe with weight ``tile(w, T) / T``
of one activation             its own, of the last read; linear: weight ``(0, ..., 0, w)``
============================  ====================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from elk_stress.probing.probe import FittedProbe, Probe, Traits, as_fitted

__all__ = ["Flat", "flatten", "read", "tokens_of"]


def tokens_of(testbed: Any) -> int | None:
    """How many reads T the testbed's flat activations hold; ``None`` where an item is read once."""
    found = getattr(testbed, "tokens", None)
    return None if found is None else int(found)


def read(activations: np.ndarray, tokens: int, probe: Probe) -> np.ndarray:
    """What ``probe`` is fitted on, of flat activations ``(n, T d)``: ``(n, T, d)``, or the last read ``(n, d)``."""
    split = activations.reshape(*activations.shape[:-1], tokens, -1)
    return np.asarray(split if probe.traits.tokens else split[..., -1, :])


def flatten(fitted: FittedProbe, tokens: int) -> FittedProbe:
    """``fitted`` as a probe of flat activations ``(*batch, T d)``; see the module.

    Raises:
        ValueError: a probe that does not know its width.
    """
    if fitted.dim is None:
        raise ValueError(f"probe {fitted.name!r} does not say how wide its activations are; set FittedProbe.dim")
    parameters = dict(fitted.parameters)
    if fitted.traits.linear:
        weight = np.zeros((tokens, fitted.dim))
        if fitted.traits.tokens:
            weight[:] = parameters["weight"] / tokens
        else:
            weight[-1] = parameters["weight"]
        parameters["weight"] = weight.ravel()
    return replace(fitted, probe=Flat(fitted.probe, tokens), parameters=parameters, dim=tokens * fitted.dim)


@dataclass(frozen=True)
class Flat:
    """A recipe whose score reads flat activations; what it learned stays as it is."""

    recipe: Probe
    tokens: int

    @property
    def name(self) -> str:
        return self.recipe.name

    @property
    def traits(self) -> Traits:
        return replace(self.recipe.traits, tokens=False)

    def fit(
        self,
        activations: np.ndarray,
        labels: np.ndarray,
        *,
        pairs: np.ndarray | None = None,
        seed: int = 0,
        **more: Any,
    ) -> FittedProbe:
        """Fit the recipe on what it reads of flat ``activations (n, T d)``."""
        rows = read(activations, self.tokens, self.recipe)
        return flatten(as_fitted(self.recipe, rows, labels, pairs=pairs, seed=seed, **more), self.tokens)

    def score(self, xp: Any, parameters: Mapping[str, Any], activations: Any) -> Any:
        if self.traits.linear:
            return xp.matmul(activations, parameters["weight"]) + parameters["bias"]
        split = xp.reshape(activations, (*activations.shape[:-1], self.tokens, activations.shape[-1] // self.tokens))
        if self.recipe.traits.tokens:
            return self.recipe.score(xp, parameters, split, None)  # type: ignore[call-arg]
        return self.recipe.score(xp, parameters, split[..., -1, :])

    def lipschitz(self, parameters: Mapping[str, Any], factor: np.ndarray) -> float | None:
        """That of the recipe for moves of what it reads; unknown for probes of tokens."""
        known = getattr(self.recipe, "lipschitz", None)
        if known is None or self.recipe.traits.tokens:
            return None
        found = known(parameters, factor[-(factor.shape[0] // self.tokens) :])
        return None if found is None else float(found)
