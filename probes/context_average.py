r"""The mean score over several reads of an item: neutral contexts that the monitor chooses.

Idea: a natural thought has a part that every context shares and a part of its own; averaging T reads divides the
variance of the latter by T and leaves the margin as it is. An attacker must move the mean, so bits grow with T until
the shared part dominates: with independent reads of equal spread ``beta_T = sqrt(T) beta_1``, hence about T times the
bits. Whether reads *are* independent is the prior's to say (moves of all reads together,
:mod:`elk_stress.probing.multi_read`).

Equations: ``score(x_1..x_T) = mean over present t of base(x_t)``, the base fitted on every present read with its item's
label repeated. With a linear base this is ``mean_t x_t . w + b``. Where the mask leaves no read, the score is 0.

Averaging a classifier over randomized inputs for robustness: randomized smoothing, Cohen, Rosenfeld and Kolter 2019
(1902.02918), whose noise is drawn by the defender, too; averaging over rephrasings as a defence of language models:
SmoothLLM, Robey et al. 2023 (2310.03684).

Shapes: activations ``(*batch, T, d)``, mask ``(*batch, T)`` or ``None`` -> ``(*batch,)``. Units: the base's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from elk_stress.core import registry
from elk_stress.probing.probe import FittedProbe, Probe, Traits

__all__ = ["ContextAverage"]


@dataclass(frozen=True)
class ContextAverage:
    """The mean over reads of a probe of one read.

    Attributes:
        base: registered name of that probe; it must need neither pairs nor prior nor behaviour, nor read tokens itself.
    """

    base: str = "logistic"

    name: ClassVar[str] = "context_average"

    @property
    def traits(self) -> Traits:
        """The base's, of tokens; linear in the mean read where the base is linear."""
        base = self._base.traits
        return Traits(
            learns=base.learns,
            linear=base.linear,
            tokens=True,
            negatives_only=base.negatives_only,
            differentiable=base.differentiable,
        )

    def fit(
        self,
        activations: np.ndarray,
        labels: np.ndarray,
        *,
        pairs: np.ndarray | None = None,
        mask: np.ndarray | None = None,
        seed: int = 0,
    ) -> FittedProbe:
        """Fit the base on every present read of ``activations (n, T, d)``, ``labels (n,)``, ``mask (n, T)``.

        Raises:
            ValueError: a base that needs more than activations and labels; a class without a present read.
        """
        base = self._base
        if base.traits.needs_pairs or base.traits.needs_prior or base.traits.needs_behaviour or base.traits.tokens:
            raise ValueError(
                f"context_average: the base {self.base!r} needs more than activations (n, d) and labels; choose one "
                "like 'logistic', 'lda' or 'mlp'"
            )
        rows = np.asarray(activations)
        present = np.ones(rows.shape[:2], dtype=bool) if mask is None else np.asarray(mask, dtype=bool)
        targets = np.broadcast_to(np.asarray(labels).astype(int)[:, None], present.shape)[present]
        if len(np.unique(targets)) < 2:
            raise ValueError("context_average: the mask leaves reads of one class only; both are needed")
        fitted = base.fit(rows[present], targets, seed=seed)
        return replace(fitted, probe=self, dim=rows.shape[-1], notes={**fitted.notes, "reads": int(present.sum())})

    def score(self, xp: Any, parameters: Mapping[str, Any], activations: Any, mask: Any = None) -> Any:
        """Mean over the present reads of the base's score."""
        scores = self._base.score(xp, parameters, activations)
        if mask is None:
            return xp.mean(scores, axis=-1)
        there = xp.astype(mask, scores.dtype)
        count = xp.sum(there, axis=-1)
        # a score where nothing is there may be anything, so it is replaced, not multiplied away
        total = xp.sum(xp.where(mask, scores, xp.zeros_like(scores)), axis=-1)
        return total / xp.where(count > 0, count, xp.ones_like(count))

    @property
    def _base(self) -> Probe:
        found: Probe = registry.load("probes", self.base)
        return found
