r"""Contrastive representation clustering: the top principal component of pair differences (Burns et al. 2212.03827).

A pair is a statement x+ (affirmed) and its negation x- (rows 0 and 1 of ``pairs``): exactly one of the two is positive,
so along the direction of truth their difference takes one of two opposite values, and varies much.

Equations. As in ``ccs`` each half is centred on its own mean and both share one standard deviation s per feature,
``z+- = (x+- - mean+-) / s``; then

    v = the unit vector that maximizes  sum over pairs (v . (z+ - z-))^2,   subject to  v . (mean+ - mean-) / s = 0,

found as the first right singular vector. The constraint makes a single statement scorable without knowing its form: a v
orthogonal to the difference of the halves' means gives the same score under either half's normalization,
``score(x) = v . (x - (mean+ + mean-) / 2) / s``, a linear probe with ``w = v / s``. The price is one direction of d.

Sign. v and -v explain the same variance. One bit of label information settles it: the sign under which more training
pairs rank their positive statement higher (``sign_agreement`` in the notes; near 1/2 means that the principal component
is something other than the labels). Otherwise labels play no part, unless Platt scaling is asked for.

Platt scaling (``platt=True``): ``a score + b`` with a and b of least log-loss on the training statements' labels, with
Platt's smoothed targets ``(n1 + 1)/(n1 + 2)`` and ``1/(n0 + 2)``, so that separable classes give a finite a (Platt
1999, "Probabilistic outputs for support vector machines"). Scores are then log-odds. With a > 0 it changes no ranking;
an a < 0 (``platt_slope`` in the notes), possible where labels hardly follow the score, turns the pairs' choice of sign.

Shapes: activations ``(*batch, d)`` -> ``(*batch,)``. ``variance_share`` in the notes: the component's share of the
differences' variance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from elk_stress.probe import FittedProbe, Traits
from elk_stress.probes.ccs import _checked_pairs

__all__ = ["CRC"]


@dataclass(frozen=True)
class CRC:
    """Top principal component of contrast pairs' differences (Burns et al. 2212.03827).

    Attributes:
        platt: scale the score to log-odds by the training labels.
    """

    platt: bool = False

    name: ClassVar[str] = "crc"
    traits: ClassVar[Traits] = Traits(linear=True, needs_pairs=True, flips=True)

    def fit(
        self, activations: np.ndarray, labels: np.ndarray, *, pairs: np.ndarray | None = None, seed: int = 0
    ) -> FittedProbe:
        """Fit on the pairs among ``activations (n, d)``; deterministic, ``seed`` is not used.

        Raises:
            ValueError: no pairs, or pairs that are not two row indices each; differences that do not vary.
        """
        halves = normalized_halves(activations, pairs, self.name)
        differences = halves.affirmed - halves.negated
        _, size, axes = np.linalg.svd(differences, full_matrices=False)
        if not size[0] > 1e-9 * len(differences) ** 0.5:
            raise ValueError("crc: the differences of the pairs do not vary, so they have no principal component")
        notes = {"variance_share": float(size[0] ** 2 / np.sum(size**2)), "n_pairs": len(differences)}
        return oriented(self, axes[0], halves, labels, self.platt, notes)

    def score(self, xp: Any, parameters: Mapping[str, Any], activations: Any) -> Any:
        """``activations @ weight + bias``."""
        return xp.matmul(activations, parameters["weight"]) + parameters["bias"]


class Halves(NamedTuple):
    """Both halves of the pairs, normalized: ``(n_pairs, d)`` each, without the direction that tells the halves apart.

    ``pairs (n_pairs, 2)`` index ``rows (n, d)``; ``spread (d,)`` is s (infinite where a feature is constant) and
    ``middle (d,)`` is midway between the halves' means.
    """

    affirmed: np.ndarray
    negated: np.ndarray
    pairs: np.ndarray
    rows: np.ndarray
    spread: np.ndarray
    middle: np.ndarray


def normalized_halves(activations: np.ndarray, pairs: np.ndarray | None, name: str) -> Halves:
    """Each half centred on its own mean, in units of the common spread, orthogonal to the difference of the means."""
    try:
        index = _checked_pairs(pairs, len(activations))
    except ValueError as error:
        raise ValueError(str(error).replace("ccs ", f"{name} ")) from None
    rows = np.asarray(activations, dtype=float)
    halves = rows[index[:, 0]], rows[index[:, 1]]
    means = halves[0].mean(axis=0), halves[1].mean(axis=0)
    spread = np.sqrt((halves[0].var(axis=0) + halves[1].var(axis=0)) / 2)
    # a feature that is constant but for rounding carries nothing; dividing by its spread would amplify noise
    spread = np.where(spread > 1e-10 * np.maximum(1.0, np.abs(means[0])), spread, np.inf)
    form = (means[0] - means[1]) / spread
    length = float(np.linalg.norm(form))
    form = form / length if length > 1e-9 else np.zeros_like(form)
    affirmed, negated = ((half - mean) / spread for half, mean in zip(halves, means, strict=True))
    affirmed, negated = (z - np.outer(z @ form, form) for z in (affirmed, negated))
    return Halves(affirmed, negated, index, rows, spread, (means[0] + means[1]) / 2)


def oriented(
    probe: Any, axis: np.ndarray, halves: Halves, labels: np.ndarray, platt: bool, notes: Mapping[str, Any]
) -> FittedProbe:
    """The linear probe along ``axis (d,)`` (of normalized halves): its sign, and on request its scale, from labels."""
    targets = np.asarray(labels).astype(float)
    truth = np.sign(targets[halves.pairs[:, 0]] - targets[halves.pairs[:, 1]])
    votes = np.sign((halves.affirmed - halves.negated) @ axis) * truth
    informative = votes[votes != 0]
    agreement = float((informative > 0).mean()) if len(informative) else 0.5
    weight = (axis if agreement >= 0.5 else -axis) / halves.spread
    bias = -weight @ halves.middle
    notes = {**notes, "sign_agreement": max(agreement, 1 - agreement)}
    if platt:
        seen = np.unique(halves.pairs)
        slope, offset = _platt(halves.rows[seen] @ weight + bias, targets[seen])
        weight, bias = slope * weight, slope * bias + offset
        notes["platt_slope"] = slope
    return FittedProbe(probe, {"weight": weight, "bias": np.asarray(bias)}, notes=notes)


def _platt(scores: np.ndarray, targets: np.ndarray) -> tuple[float, float]:
    """Slope and offset of least log-loss against smoothed targets; Newton's method on a convex loss, with halving."""
    from scipy.special import expit

    n1, n0 = float(targets.sum()), float(len(targets) - targets.sum())
    wanted = np.where(targets == 1, (n1 + 1) / (n1 + 2), 1 / (n0 + 2))
    size = float(scores.std()) or 1.0
    design = np.stack([scores / size, np.ones_like(scores)], axis=1)

    def loss(at: np.ndarray) -> float:
        logits = design @ at
        return float(np.mean(np.logaddexp(0.0, logits) - wanted * logits))

    at = np.array([0.0, np.log((n1 + 1) / (n0 + 1))])
    for _ in range(100):
        chance = expit(design @ at)
        slope = design.T @ (chance - wanted) / len(scores)
        curvature = (design * (chance * (1 - chance))[:, None]).T @ design / len(scores)
        step = np.linalg.solve(curvature + 1e-12 * np.eye(2), slope)
        while loss(at - step) > loss(at) and np.abs(step).max() > 1e-12:
            step = step / 2
        at = at - step
        if np.abs(step).max() < 1e-10:
            break
    return float(at[0] / size), float(at[1])
