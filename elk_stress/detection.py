r"""Thresholds that are honest under the prior, and what a probe catches when nobody attacks.

The threshold is split-conformal: the ``ceil((1-fpr)(n+1))``-th smallest calibration negative. With several prior draws
per negative each draw weighs ``1/((n+1) m)`` and ``1/(n+1)`` stays at infinity, which is the hierarchical rule of Lee,
Barber & Willett 2023 (2306.06342) and reduces to the former at m = 1. ``caught`` = score > threshold.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import beta as beta_distribution

from elk_stress.flags import Flag, flag

__all__ = ["auroc", "check_negatives", "conformal_threshold", "proportion_interval", "weighted_conformal_thresholds"]


def check_negatives(n: int, fpr: float) -> tuple[Flag, ...]:
    """Refuse a false-positive rate finer than ``n`` negatives resolve; flag one that they barely resolve.

    Raises:
        ValueError: ``n < 1/fpr``.
    """
    if not 0 < fpr < 1:
        raise ValueError(f"the false-positive rate lies strictly between 0 and 1, got {fpr}")
    needed = math.ceil(1 / fpr - 1e-9)
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


def conformal_threshold(scores: np.ndarray, fpr: float) -> float:
    """Threshold from calibration negatives' scores, ``(n,)`` or ``(n, m)`` with m prior draws each.

    The chance that a new negative under the prior scores above it is at most ``fpr``.
    """
    pooled = scores.reshape(len(scores), -1)
    check_negatives(len(pooled), fpr)
    return float(
        weighted_conformal_thresholds(pooled, fpr, np.ones((1, len(pooled))), np.ones((1, pooled.shape[1])))[0]
    )


def weighted_conformal_thresholds(
    scores: np.ndarray, fpr: float, item_weights: np.ndarray, draw_weights: np.ndarray
) -> np.ndarray:
    """Conformal thresholds of many bootstrap resamples at once.

    Args:
        scores: ``(n, m)`` calibration negatives x prior draws.
        fpr: nominal rate.
        item_weights, draw_weights: ``(replicates, n)`` and ``(replicates, m)`` multiplicities.

    Returns:
        ``(replicates,)``; the largest score where a resample holds too few distinct negatives.
    """
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
