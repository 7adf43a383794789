r"""Several probes of one kind, each fitted on a bootstrap of items with a seed of its own; the mean of their scores.

Equations: member k is the base recipe, fitted with seed k on items drawn with replacement (all rows of an item come
together); m_k and s_k are the mean and standard deviation of its scores over the training rows, and

    score(x) = (1 / K) sum_k (f_k(x) - m_k) / s_k,

in standard deviations of a member's score: no member counts more for being louder. What members share survives; what
depends on the draw of items or on the seed averages out. The mean of linear scores is linear: with a linear base the
members are folded into one weight, at the cost (and with the closed-form bits) of one probe; that is bagging.

An item's rows stand together and have one label, so the lengths of the runs of equal labels share the number of rows
per item as a divisor. With contrast pairs the pairs of the drawn items are drawn. Where the base learns from negatives
alone, items are drawn, and scores standardized, among negatives.

Shapes: activations ``(*batch, d)`` -> ``(*batch,)``. Parameters of member k are stored as ``k.name``. References:
Breiman 1996 (bagging); Lakshminarayanan et al. 2017 (1612.01474, ensembles over seeds).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from elk_stress.core import registry
from elk_stress.probing.fit.folds import rows_per_item
from elk_stress.probing.fit.scaling import score_scale
from elk_stress.probing.probe import FittedProbe, Probe, Traits, as_fitted

__all__ = ["Ensemble"]


@dataclass(frozen=True)
class Ensemble:
    """The mean of probes of one kind, each fitted on its own bootstrap of items with its own seed.

    Attributes:
        base: registered name of a probe of single activations.
        members: K.
    """

    base: str = "mlp"
    members: int = 4

    name: ClassVar[str] = "ensemble"

    def __post_init__(self) -> None:
        if self.members < 1:
            raise ValueError(f"ensemble needs at least 1 member, got {self.members}")
        if self.base == self.name or self._recipe.traits.tokens:
            raise ValueError(
                f"ensemble: the base must read one activation per item, {self.base!r} does not; for several reads use "
                "site_ensemble"
            )

    @property
    def _recipe(self) -> Probe:
        made: Probe = registry.load("probes", self.base)
        return made

    @property
    def traits(self) -> Traits:
        """The base's, except that it is not fitted batch by batch."""
        return replace(self._recipe.traits, streams=False)

    def fit(
        self,
        activations: np.ndarray,
        labels: np.ndarray,
        *,
        pairs: np.ndarray | None = None,
        seed: int = 0,
        **needed: Any,
    ) -> FittedProbe:
        """Fit on ``activations (n, d)``, ``labels (n,)``; ``prior`` and ``behaviour`` go to every member as they are.

        Notes: ``agreement``, the mean correlation of two members' scores over the training rows.
        """
        base, rows, targets = self._recipe, np.asarray(activations), np.asarray(labels).astype(int)
        reference = rows[targets == 0] if base.traits.negatives_only else rows
        seeds = np.random.SeedSequence(seed).spawn(self.members)
        fitted, scores = [], []
        for own in seeds:
            rng = np.random.default_rng(own)
            drawn = _bootstrap(targets, rng, negatives_only=base.traits.negatives_only)
            member_seed = int(rng.integers(0, 2**31))
            if base.traits.needs_pairs and pairs is not None:
                times = np.bincount(drawn, minlength=len(rows))[pairs[:, 0]]
                member = as_fitted(
                    base, rows, targets, pairs=np.repeat(pairs, times, axis=0), seed=member_seed, **needed
                )
            else:
                member = as_fitted(base, rows[drawn], targets[drawn], seed=member_seed, **needed)
            fitted.append(member)
            scores.append(np.asarray(member.score(reference), dtype=float))
        centre, spread = score_scale(np.stack(scores))
        notes = {"agreement": _agreement(np.stack(scores))}
        if base.traits.linear:
            weight = sum(m.parameters["weight"] / s for m, s in zip(fitted, spread, strict=True)) / self.members
            shifts = [(m.parameters["bias"] - c) / s for m, c, s in zip(fitted, centre, spread, strict=True)]
            return FittedProbe(self, {"weight": weight, "bias": np.asarray(np.mean(shifts))}, notes=notes)
        parameters = {f"{k}.{name}": value for k, m in enumerate(fitted) for name, value in m.parameters.items()}
        return FittedProbe(self, {**parameters, "centre": centre, "spread": spread}, notes=notes)

    def score(self, xp: Any, parameters: Mapping[str, Any], activations: Any) -> Any:
        """The mean over members of ``(score - centre) / spread``; for a linear base ``activations @ weight + bias``."""
        if "weight" in parameters:
            return xp.matmul(activations, parameters["weight"]) + parameters["bias"]
        base, total = self._recipe, 0.0
        for k in range(self.members):
            prefix = f"{k}."
            own = {name[len(prefix) :]: value for name, value in parameters.items() if name.startswith(prefix)}
            score = base.score(xp, own, activations)
            total = total + (score - parameters["centre"][k]) / parameters["spread"][k]
        return total / self.members


def _agreement(scores: np.ndarray) -> float:
    """Mean correlation of two members; 1 for a single one, 0 with one that is constant."""
    if len(scores) < 2:
        return 1.0
    centre, spread = score_scale(scores)
    z = (scores - centre[:, None]) / spread[:, None]
    among = z @ z.T / scores.shape[1]
    return float((among.sum() - np.trace(among)) / (len(scores) * (len(scores) - 1)))


def _bootstrap(targets: np.ndarray, rng: np.random.Generator, *, negatives_only: bool = False) -> np.ndarray:
    """Row indices of items drawn with replacement; both classes are there.

    With ``negatives_only`` the positives stay as they are, and change nothing of what is drawn.
    """
    block = rows_per_item(targets)
    # fewer than eight items: a sorted table rather, whose runs say nothing of items
    block = block if len(targets) >= 8 * block else 1
    if negatives_only:
        own, others = np.flatnonzero(targets == 0), np.flatnonzero(targets == 1)
        block = block if len(own) % block == 0 else 1
        items = rng.integers(0, len(own) // block, len(own) // block)
        return np.concatenate([own.reshape(-1, block)[items].ravel(), others])
    rows = np.arange(len(targets)).reshape(-1, block)
    while True:
        drawn = rows[rng.integers(0, len(rows), len(rows))].ravel()
        # a class that is absent from the draw cannot be learned; rare but for a handful of items
        if len(np.unique(targets[drawn])) == 2:
            return drawn
