r"""Choosing a probe's hyperparameters on training rows alone: folds by item, and what held-out rows say.

Rows come as (item x context): the rows of one item stand together and have one label. A row must not vouch for a probe
that saw the same item in another context, so that an item's rows stay in one fold (:func:`item_folds`). Two figures,
both the mean over folds, each fold judged by a probe fitted on the others:

* :func:`held_out_auroc`: how well it ranks (:func:`fewest_columns` chooses by it),
* :func:`kept_bits`: what a defence is for. At the threshold that a share ``fpr`` of held-out negatives exceed, the bits
  ``-log2 Phi(-m / s)`` of each held-out positive, m its margin (0 if missed), s the score's standard deviation under
  the prior: the bits kept per positive of a linear probe under a Gaussian prior.

Units: bits; AUROC in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from elk_stress.core.bits import bits_of_beta
from elk_stress.probing.fit.folds import rows_per_item, stretch_folds

if TYPE_CHECKING:
    from elk_stress.probing.probe import FittedProbe

__all__ = ["auroc", "fewest_columns", "held_out", "held_out_auroc", "item_folds", "kept_bits"]


def item_folds(labels: np.ndarray, folds: int) -> np.ndarray:
    """``(n,)`` fold of each row: a class's items dealt in turn; fewer folds where a class has fewer items.

    Labels that do not show items of several rows (sorted rows are one run a class, or contexts differ in number) are
    cut into stretches of consecutive rows (:func:`~elk_stress.probing.fit.folds.stretch_folds`): a cut splits at most
    one item, where single rows dealt in turn would split them all.
    """
    labels = np.asarray(labels).astype(int)
    counts = np.bincount(labels, minlength=2)
    block = rows_per_item(labels)
    if block == 1 or counts.min() < 2 * block:
        return stretch_folds(labels, folds)
    folds = max(1, min(folds, int(counts.min()) // block))
    fold = np.zeros(len(labels), dtype=int)
    for label in (0, 1):
        own = np.flatnonzero(labels == label)
        fold[own] = np.arange(len(own)) // block % folds
    return fold


def held_out(labels: np.ndarray, folds: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of indices (to fit on, held out); with too few items for two folds, all rows serve as both."""
    fold = item_folds(labels, folds)
    for k in range(int(fold.max()) + 1):
        out = fold == k
        yield (np.flatnonzero(out), np.flatnonzero(out)) if out.all() else (np.flatnonzero(~out), np.flatnonzero(out))


def auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Chance that a positive scores above a negative, ties counting half."""
    from scipy.stats import rankdata

    positive = np.asarray(labels) == 1
    n, m = int(positive.sum()), int((~positive).sum())
    return float((rankdata(scores)[positive].sum() - n * (n + 1) / 2) / (n * m))


def held_out_auroc(
    fit: Callable[[np.ndarray, np.ndarray], FittedProbe], rows: np.ndarray, labels: np.ndarray, folds: int
) -> float:
    """Mean AUROC on held-out items of the probes that ``fit(rows, labels)`` returns."""
    splits = held_out(labels, folds)
    found = [auroc(np.asarray(fit(rows[a], labels[a]).score(rows[b])), labels[b]) for a, b in splits]
    return float(np.mean(found))


def kept_bits(scores: np.ndarray, labels: np.ndarray, deviation: float, fpr: float) -> float:
    """Bits kept per positive at the false-positive rate ``fpr``; ``deviation``: of the score under the prior."""
    positive = np.asarray(labels) == 1
    margin = np.maximum(scores[positive] - np.quantile(scores[~positive], 1.0 - fpr), 0.0)
    bits = np.abs(bits_of_beta(margin / max(deviation, np.finfo(float).tiny)))
    return float(np.mean(np.where(margin > 0, np.minimum(bits, 1e6), 0.0)))


def fewest_columns(
    fit: Callable[[np.ndarray, np.ndarray], FittedProbe],
    rows: np.ndarray,
    labels: np.ndarray,
    numbers: Iterable[int],
    *,
    tolerance: float,
    folds: int,
) -> tuple[int, dict[str, float]]:
    """The fewest leading columns whose held-out AUROC is within ``tolerance`` of the best, and that of each number."""
    found = {q: held_out_auroc(fit, rows[:, :q], labels, folds) for q in numbers}
    least = max(found.values()) - tolerance
    return min(q for q, value in found.items() if value >= least), {str(q): value for q, value in found.items()}
