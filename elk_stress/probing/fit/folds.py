r"""Folds that keep the rows of an item together, and weights to learn by and to judge by.

Rows come as (item x context): the rows of one item stand together and have one label. A row must not vouch for a member
that saw the same item in another context, so an item's rows stay in one fold. Labels alone are given, so items are read
off them: every run of equal labels is a whole number of items, hence the greatest common divisor of the runs' lengths
is a multiple of the rows per item (:func:`rows_per_item`). Where neighbouring items happen to join into longer blocks
nothing is lost but resolution.

Folds here are made of *stretches*: items that follow each other (often of one topic) mostly stay together, each fold
gets two stretches of a class. :func:`elk_stress.probing.fit.held_out.item_folds` deals items in turn instead.

Weights: a member's rows of either class weigh 1/2 in total, so that a weighted mean of losses is class-balanced and a
score that minimizes it is a logit at equal class frequencies.
"""

from __future__ import annotations

import numpy as np

__all__ = ["balanced", "cross_weights", "rows_per_item", "stretch_folds", "stretches"]

# stretches of consecutive items per fold and class: topics that follow each other reach every fold's members
_STRETCHES = 2


def rows_per_item(labels: np.ndarray) -> int:
    """Greatest common divisor of the lengths of runs of equal ``labels (n,)`` in {0, 1}.

    A sorted table (all negatives, then all positives) has runs that say nothing of items: it is up to the caller to
    take 1 where too few items would be left.
    """
    ends = np.flatnonzero(np.diff(labels, append=2))
    return int(np.gcd.reduce(np.diff(ends, prepend=-1)))


def stretches(rows: int, count: int) -> np.ndarray:
    """``(rows,)`` the place of each row's stretch when consecutive rows are cut into ``count`` of nearly equal length.

    All but a few items then stand on one side of any cut between stretches, without knowing where items end.
    """
    return np.arange(rows) * min(count, rows) // rows


def stretch_folds(labels: np.ndarray, folds: int) -> np.ndarray:
    """``(n,)`` fold of each row: a class's items in their order, cut into stretches that are dealt round-robin.

    There are as many folds as the rarer class has rows, at most. Where the rows per item leave too few pieces, a row
    counts as an item.
    """
    counts = np.bincount(labels, minlength=2)
    folds = max(1, min(folds, int(counts.min())))
    block = rows_per_item(labels)
    block = block if counts.min() >= folds * block else 1
    fold = np.zeros(len(labels), dtype=int)
    for label in (0, 1):
        own = np.flatnonzero(labels == label)
        items = len(own) // block
        fold[own] = (np.arange(len(own)) // block) * min(folds * _STRETCHES, items) // items % folds
    return fold


def balanced(labels: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """``(n, members)`` weights of each member's ``chosen (n, members)`` rows: half in each class, 0 elsewhere."""
    out = chosen.astype(float)
    for label in (0, 1):
        own = labels == label
        out[own] /= 2 * np.maximum(out[own].sum(axis=0), 1.0)
    return out


def cross_weights(labels: np.ndarray, folds: int) -> tuple[np.ndarray, np.ndarray]:
    """Class-balanced weights ``(n, folds + 1)`` to learn by and to judge by; the last member learns from all rows.

    Member k < folds learns from the other folds and is judged on its own. The last one is judged on nothing (weights
    0): it descends beside the others, so that what they choose need not be fitted again.
    """
    fold = stretch_folds(labels, folds)
    own = fold[:, None] == np.arange(int(fold.max()) + 1)
    others = ~own if own.shape[1] > 1 else own  # with one fold there is nothing to hold out
    every = np.ones((len(labels), 1), dtype=bool)
    return (
        balanced(labels, np.concatenate([others, every], axis=1)),
        balanced(labels, np.concatenate([own, ~every], axis=1)),
    )
