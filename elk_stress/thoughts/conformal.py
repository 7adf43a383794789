r"""Thresholds that are honest under the prior, and what a probe catches when nobody attacks.

The threshold is split-conformal: the ``ceil((1-fpr)(n+1))``-th smallest calibration negative; ``caught`` = score >
threshold. With several prior draws per negative there are two rules, which agree at one draw.

* *Independent draws* (a prior that is sampled): the rule for each draw, averaged over draws. A new negative exceeds the
  threshold with chance ``fpr``, up to rank rounding.
* *Shared contexts* (real ones): a context shifts all scores together, so its scores are pooled, each with weight
  ``1/((n+1) m)`` and ``1/(n+1)`` at infinity (the hierarchical rule of Lee, Barber & Willett 2023, 2306.06342). That
  holds for the contexts at hand; for new ones the context means are spread by ``sqrt((m+1)/(m-1))`` first, the factor
  by which a new context lies farther from m known ones than they lie from their own mean. No guarantee, but measured:
  see the false-positive rate on held-out contexts that every result reports.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import beta as beta_distribution

from elk_stress.core.flags import Flag, flag

__all__ = ["auroc", "check_negatives", "conformal_threshold", "proportion_interval", "weighted_conformal_thresholds"]


def check_negatives(n: int, fpr: float) -> tuple[Flag, ...]:
    """Refuse a false-positive rate finer than ``n`` negatives resolve; flag one that they barely resolve.

    Raises:
        ValueError: ``n < 1/fpr``.
    """
    if not 0 < fpr < 1:
        raise ValueError(f"the false-positive rate lies strictly between 0 and 1, got {fpr}")
    needed = math.ceil(min(1 / fpr, 1e18) - 1e-9)
    if n < needed:
        raise ValueError(
            f"a false-positive rate of {fpr:g} needs at least {needed} calibration negatives, got {n}; "
            f"add negatives or use fpr >= {1 / max(n, 1):.3g}"
        )
    if n < 3 / fpr:
        return (
            flag("fpr_unresolved", f"{n} calibration negatives for fpr {fpr:g}; {math.ceil(3 / fpr)} give an interval"),
        )
    return ()


def conformal_threshold(scores: np.ndarray, fpr: float, *, shared: bool = False) -> float:
    """Threshold from calibration negatives' scores, ``(n,)`` or ``(n, m)`` with m prior draws each.

    Args:
        scores: of negatives.
        fpr: nominal rate.
        shared: whether column j is one real context for all negatives, rather than independent draws.

    Raises:
        ValueError: fewer negatives than ``fpr`` resolves.
    """
    columns = scores.reshape(len(scores), -1)
    check_negatives(len(columns), fpr)
    ones = np.ones((1, len(columns))), np.ones((1, columns.shape[1]))
    return float(weighted_conformal_thresholds(columns, fpr, *ones, shared=shared)[0])


def weighted_conformal_thresholds(
    scores: np.ndarray, fpr: float, item_weights: np.ndarray, draw_weights: np.ndarray, *, shared: bool = False
) -> np.ndarray:
    """Conformal thresholds of many bootstrap resamples at once.

    Args:
        scores: ``(n, m)`` calibration negatives x prior draws or contexts.
        fpr: nominal rate.
        item_weights, draw_weights: ``(replicates, n)`` and ``(replicates, m)`` multiplicities.
        shared: see :func:`conformal_threshold`.

    Returns:
        ``(replicates,)``; the largest score where a resample holds too few distinct negatives.
    """
    if shared:
        return _pooled(_spread(scores), fpr, item_weights, draw_weights)
    one = np.ones((len(item_weights), 1))
    each = np.stack([_pooled(column[:, None], fpr, item_weights, one) for column in scores.T], axis=1)
    return np.asarray((each * draw_weights).sum(axis=1) / draw_weights.sum(axis=1))


def _spread(scores: np.ndarray) -> np.ndarray:
    """Scores whose context means lie as far apart as new contexts would."""
    m = scores.shape[1]
    if m < 2:
        return scores
    means = scores.mean(axis=0)
    return np.asarray(scores + (means - means.mean()) * (math.sqrt((m + 1) / (m - 1)) - 1))


def _pooled(scores: np.ndarray, fpr: float, item_weights: np.ndarray, draw_weights: np.ndarray) -> np.ndarray:
    n, m = scores.shape
    order = np.argsort(scores, axis=None, kind="stable")
    ordered = scores.reshape(-1)[order]
    totals = item_weights.sum(axis=1) * draw_weights.sum(axis=1)
    # rank ceil((1-fpr)(n+1) m) among n m scores; a hair off for sums that are integers in exact arithmetic
    needed = np.ceil((1 - fpr) * (item_weights.sum(axis=1) + 1) * draw_weights.sum(axis=1) - 1e-9)
    out = np.empty(len(item_weights))
    rows, columns = order // m, order % m
    step = max(1, (1 << 21) // max(1, n * m))
    for start in range(0, len(out), step):
        part = slice(start, start + step)
        mass = np.cumsum(item_weights[part][:, rows] * draw_weights[part][:, columns], axis=1)
        position = (mass < np.minimum(needed, totals)[part, None]).sum(axis=1)
        out[part] = ordered[np.minimum(position, n * m - 1)]
    return out


def auroc(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Area under the ROC curve; ties count one half. With ``weights``, of the resampled items."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(labels, scores, sample_weight=weights))


def proportion_interval(hits: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """Clopper-Pearson interval of a proportion."""
    if n <= 0:
        return (0.0, 1.0)
    tail = (1 - confidence) / 2
    low = 0.0 if hits <= 0 else float(beta_distribution.ppf(tail, hits, n - hits + 1))
    high = 1.0 if hits >= n else float(beta_distribution.ppf(1 - tail, hits + 1, n - hits))
    return (low, high)
