r"""One probe per read of an item (a site, a context, a token position), and the mean of their standardized scores.

Equations: member t is the base recipe, fitted on read t alone; m_t and s_t are the mean and standard deviation of its
scores over the training rows, and with R the reads that are there,

    score(x) = (1 / |R|) sum_{t in R} (f_t(x_t) - m_t) / s_t,

in standard deviations of a member's score. Whoever wants to hide from it must hide at all sites by one move, on
average; a member's own direction is worth 1/T of the score. An item without any read scores 0.

With a linear base all members are one weight ``(T, d)``: the score is a single pass over the activations.

Shapes: activations ``(*batch, T, d)``, mask ``(*batch, T)`` or ``None`` -> ``(*batch,)``; T is that of the fit, for a
member belongs to its place. Parameters of the member at read t are stored as ``t.name``, those of a linear base stacked
as ``weight (T, d)`` and ``bias (T,)``, standardization included. Masked reads touch neither the score nor its gradient,
whatever they hold. Reference: probes of several layers together, and their mean as a baseline: Cunningham et al. 2026
(2601.04603) use all layers at once; ensembles: Breiman 1996.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from elk_stress.core import registry
from elk_stress.probing.fit.scaling import score_scale
from elk_stress.probing.probe import FittedProbe, Probe, Traits, as_fitted

__all__ = ["SiteEnsemble"]


@dataclass(frozen=True)
class SiteEnsemble:
    """One probe per read of an item; the mean of their standardized scores.

    Attributes:
        base: registered name of a probe of single activations that is fitted on these and labels alone (or pairs).
    """

    base: str = "logistic"

    name: ClassVar[str] = "site_ensemble"

    def __post_init__(self) -> None:
        traits = self._recipe.traits
        if traits.tokens or traits.needs_prior or traits.needs_behaviour:
            raise ValueError(
                f"site_ensemble: the base must be fitted on one activation per item, without a prior or behaviour "
                f"(these are of all reads together), {self.base!r} is not; take logistic, lda, mass_mean or mlp"
            )

    @property
    def _recipe(self) -> Probe:
        made: Probe = registry.load("probes", self.base)
        return made

    @property
    def traits(self) -> Traits:
        """What the base learns from; it reads tokens, one weight each."""
        base = self._recipe.traits
        return Traits(
            learns=base.learns,
            tokens=True,
            needs_pairs=base.needs_pairs,
            negatives_only=base.negatives_only,
            differentiable=base.differentiable,
            rotation_equivariant=base.rotation_equivariant,
            flips=base.flips,
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
        """Fit on ``activations (n, T, d)``, ``labels (n,)``; each read on the rows that have it.

        Notes: ``sites``, the number of reads.

        Raises:
            ValueError: a read that too few rows have, or contrast pairs together with a mask.
        """
        base, rows, targets = self._recipe, np.asarray(activations), np.asarray(labels).astype(int)
        there = np.ones(rows.shape[:2], dtype=bool) if mask is None else np.asarray(mask, dtype=bool)
        if base.traits.needs_pairs and not there.all():
            raise ValueError(f"site_ensemble: {self.base!r} needs contrast pairs, of which every read must be there")
        fitted, centre, spread = [], [], []
        for site in range(rows.shape[1]):
            own = there[:, site]
            if len(np.unique(targets[own])) < 2:
                raise ValueError(
                    f"site_ensemble: read {site} is there in {int(own.sum())} of {len(rows)} rows, and not in both "
                    "classes; leave that read out"
                )
            member = as_fitted(base, rows[own, site], targets[own], pairs=pairs, seed=seed)
            reference = own & (targets == 0) if base.traits.negatives_only else own
            mean, width = score_scale(np.asarray(member.score(rows[reference, site]), dtype=float)[None])
            fitted.append(member)
            centre.append(mean[0])
            spread.append(width[0])
        notes = {"sites": len(fitted)}
        if base.traits.linear:
            weight = np.stack([m.parameters["weight"] / s for m, s in zip(fitted, spread, strict=True)])
            bias = [(m.parameters["bias"] - c) / s for m, c, s in zip(fitted, centre, spread, strict=True)]
            return FittedProbe(self, {"weight": weight, "bias": np.asarray(bias)}, notes=notes, dim=rows.shape[-1])
        parameters = {f"{t}.{name}": value for t, m in enumerate(fitted) for name, value in m.parameters.items()}
        parameters |= {"centre": np.asarray(centre), "spread": np.asarray(spread)}
        return FittedProbe(self, parameters, notes=notes, dim=rows.shape[-1])

    def score(self, xp: Any, parameters: Mapping[str, Any], activations: Any, mask: Any = None) -> Any:
        """The mean over the reads that are there of their standardized scores.

        Raises:
            ValueError: another number of reads than the probe was fitted on.
        """
        linear = "weight" in parameters
        sites = parameters["bias" if linear else "centre"].shape[0]
        if activations.shape[-2] != sites:
            raise ValueError(
                f"site_ensemble was fitted on {sites} reads per item, got {activations.shape[-2]}: give all of them, "
                "and mask those that are missing"
            )
        if linear:
            scores = xp.sum(activations * parameters["weight"], axis=-1) + parameters["bias"]
        else:
            base, each = self._recipe, []
            for site in range(sites):
                prefix = f"{site}."
                own = {name[len(prefix) :]: value for name, value in parameters.items() if name.startswith(prefix)}
                each.append(base.score(xp, own, activations[..., site, :]))
            scores = (xp.stack(each, axis=-1) - parameters["centre"]) / parameters["spread"]
        if mask is None:
            return xp.mean(scores, axis=-1)
        zeros, ones = xp.zeros_like(scores), xp.ones_like(scores)
        count = xp.sum(xp.where(mask, ones, zeros), axis=-1)
        return xp.sum(xp.where(mask, scores, zeros), axis=-1) / xp.where(count > 0, count, xp.ones_like(count))
