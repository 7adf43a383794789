r"""Contrast pairs: normalized halves, the sign of a direction, Platt scaling (Burns et al. 2212.03827).

A pair is a statement x+ (affirmed) and its negation x- (rows 0 and 1 of ``pairs``): exactly one of the two is positive.

Equations. Each half is normalized by its own mean, so that the form of a statement (affirmed or negated) cannot serve
as the answer; both share one standard deviation s per feature, ``z+- = (x+- - mean+-) / s``, and the direction ``form =
(mean+ - mean-) / s`` is taken out of both. For a v orthogonal to it the score of a single statement does not depend on
which half it belongs to:

    v . (x - mean+) / s = v . (x - mean-) / s = w . (x - middle),      w = v / s,   middle = (mean+ + mean-) / 2.

Sign. Without labels v and -v are equally good. One bit of label information settles it: the sign under which more
training pairs rank their positive statement higher (:func:`agreement`, in [0, 1]; near 1/2 means that the direction is
something other than the labels).

Platt scaling: ``a score + b`` of least log-loss, with smoothed targets ``(n1 + 1)/(n1 + 2)`` and ``1/(n0 + 2)``, so
that separable classes give a finite a (Platt 1999, "Probabilistic outputs for support vector machines").
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from elk_stress.probing.fit.scaling import deviations
from elk_stress.probing.probe import FittedProbe, Probe

__all__ = ["Halves", "agreement", "checked_pairs", "normalized_halves", "oriented", "platt_scaling"]


class Halves(NamedTuple):
    """Both halves of the pairs, normalized: ``(n_pairs, d)`` each, without the direction that tells the halves apart.

    ``pairs (n_pairs, 2)`` index ``rows (n, d)``; ``spread (d,)`` is s (infinite where a feature is constant), ``form
    (d,)`` is that direction at unit length (0 where the halves' means agree), ``middle (d,)`` is midway between them.
    """

    affirmed: np.ndarray
    negated: np.ndarray
    pairs: np.ndarray
    rows: np.ndarray
    spread: np.ndarray
    form: np.ndarray
    middle: np.ndarray


def checked_pairs(pairs: np.ndarray | None, n_rows: int, name: str) -> np.ndarray:
    """``pairs`` as an array ``(n_pairs, 2)`` of row indices, for the recipe ``name``.

    Raises:
        ValueError: no pairs or a single one, or pairs that are not two indices each of ``n_rows`` rows.
    """
    if pairs is None or len(pairs) == 0:
        raise ValueError(
            f"{name} learns from contrast pairs and got none; pass pairs=(n_pairs, 2) row indices (statement, "
            "negation), or use a probe that learns from labels (logistic, lda, mass_mean)"
        )
    index = np.asarray(pairs)
    if index.ndim != 2 or index.shape[1] != 2 or not np.issubdtype(index.dtype, np.integer):
        raise ValueError(f"pairs must be integer row indices of shape (n_pairs, 2), got {index.dtype} {index.shape}")
    if index.min() < 0 or index.max() >= n_rows:
        raise ValueError(f"pairs point at rows {index.min()}..{index.max()} but there are rows 0..{n_rows - 1}")
    if len(index) < 2:
        raise ValueError(f"{name} normalizes each half by its own mean and needs at least 2 pairs, got 1")
    return index


def normalized_halves(activations: np.ndarray, pairs: np.ndarray) -> Halves:
    """Each half centred on its own mean, in units of the common spread, orthogonal to the difference of the means.

    ``activations (n, d)``, ``pairs (n_pairs, 2)`` as :func:`checked_pairs` returns them, or some of these.
    """
    rows = np.asarray(activations, dtype=float)
    halves = rows[pairs[:, 0]], rows[pairs[:, 1]]
    means = halves[0].mean(axis=0), halves[1].mean(axis=0)
    spread = deviations(means[0], np.sqrt((halves[0].var(axis=0) + halves[1].var(axis=0)) / 2))
    form = (means[0] - means[1]) / spread
    length = float(np.linalg.norm(form))
    form = form / length if length > 1e-9 else np.zeros_like(form)
    affirmed, negated = ((half - mean) / spread for half, mean in zip(halves, means, strict=True))
    affirmed, negated = (z - np.outer(z @ form, form) for z in (affirmed, negated))
    return Halves(affirmed, negated, pairs, rows, spread, form, (means[0] + means[1]) / 2)


def agreement(differences: np.ndarray, labels: np.ndarray, pairs: np.ndarray) -> float:
    """Share of pairs whose score difference (statement - negation) ``(n_pairs,)`` has the sign that labels say.

    Ties, and pairs of equal labels, say nothing; 1/2 where all are such.
    """
    targets = np.asarray(labels).astype(float)
    votes = np.sign(differences) * np.sign(targets[pairs[:, 0]] - targets[pairs[:, 1]])
    informative = votes[votes != 0]
    return float((informative > 0).mean()) if len(informative) else 0.5


def oriented(
    probe: Probe, axis: np.ndarray, halves: Halves, labels: np.ndarray, platt: bool, notes: Mapping[str, Any]
) -> FittedProbe:
    """The linear probe along ``axis (d,)`` (of normalized halves): its sign, and on request its scale, from labels.

    Adds to ``notes``: ``sign_agreement``, at least 1/2, and with ``platt`` the ``platt_slope``.
    """
    agreed = agreement((halves.affirmed - halves.negated) @ axis, labels, halves.pairs)
    weight = (axis if agreed >= 0.5 else -axis) / halves.spread
    bias = -weight @ halves.middle
    notes = {**notes, "sign_agreement": max(agreed, 1 - agreed)}
    if platt:
        targets = np.asarray(labels).astype(float)
        seen = np.unique(halves.pairs)
        slope, offset = platt_scaling(halves.rows[seen] @ weight + bias, targets[seen])
        weight, bias = slope * weight, slope * bias + offset
        notes["platt_slope"] = slope
    return FittedProbe(probe, {"weight": weight, "bias": np.asarray(bias)}, notes=notes)


def platt_scaling(scores: np.ndarray, targets: np.ndarray) -> tuple[float, float]:
    """Slope and offset of least log-loss of ``scores (n,)`` against smoothed ``targets (n,)`` in {0, 1}.

    Newton's method on a convex loss, with halving.
    """
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
