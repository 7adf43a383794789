r"""Items that are the same: they share an entity, so that none is learned from in one split and judged in another.

A probe that has seen an item needs to know nothing to tell its copy: on pure noise in which every row comes four times
a nearest-neighbour probe reaches an AUROC of 0.92. Equal items are *joined* (:func:`joined`): entities become the
connected components of "in one group" and "equal", whatever groups were given.

The same item with both labels is an error of the data (:func:`conflicts`) wherever an item is known by what it holds.
Texts are. Rows of numbers are where two different items would hardly agree by chance: with U different rows and, per
feature j, the chance c_j that two of them agree in it,

    U^2/2 prod_j max(c_j, 1/U)  <  0.01,

over features of many values alone (more than 32, or than half of the rows if those are few): counts, categories and
flags repeat by their nature, so that rows of them collide rightly and may carry either label. One or two features never
name an item. Where there are less than a tenth as many different rows as rows, and they name none, rows *recur*
(:func:`recur`): they say what kind of item it is, a kind stands in every split, and joining would leave a few entities.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence

import numpy as np

from elk_stress.probing.fit.scaling import standardization

__all__ = ["conflicts", "joined", "names_items", "near_copies", "recur", "row_keys"]

# a feature of no more values than this says what kind of item it is, not which
_FEW_VALUES = 32
# expected pairs of different items that agree by chance, below which equal rows are the same item
_BY_CHANCE = 0.01
# rows per different row beyond which, where they name no item, they recur
_OFTEN = 10
# rows and features that tell; all of them would say the same
_ROWS, _FEATURES = 2000, 64
# bytes compared at a time
_CHUNK = 2**24
# near_copies: rows looked at, and which share of them makes a neighbourhood
_KNOWN, _NEW, _NEIGHBOURS = 5_000, 256, 10
# on this scale of a neighbourhood a density is taken to be smooth; shares of it; and the false-alarm rate of each
_SMOOTH, _SHARES, _ALARM = 0.1, (1e-1, 1e-2, 1e-3), 1e-6


def row_keys(rows: np.ndarray) -> np.ndarray:
    """``(n,)`` numbers that are equal where ``rows (n, ...)`` are, value by value; -0 is 0.

    One pass over the rows, a second per GB or so, and 16 bytes a row.
    """
    keys = []
    step = max(1, _CHUNK // max(1, rows[:1].nbytes))
    for start in range(0, len(rows), step):
        # adding zero turns -0 into 0
        chunk = np.ascontiguousarray(rows[start : start + step].reshape(len(rows[start : start + step]), -1) + 0)
        keys += [hashlib.blake2b(row, digest_size=16).digest() for row in chunk]
    return _numbered(keys)


def joined(*partitions: Sequence[Hashable] | np.ndarray) -> np.ndarray:
    """``(n,)`` for each item the first one of its component: items are joined that share a part in any partition."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    n = len(partitions[0])
    items, parts, total = [], [], n
    for partition in partitions:
        index = _numbered(partition)
        items.append(np.arange(n))
        parts.append(index + total)
        total += int(index.max(initial=-1)) + 1
    edges = (np.ones(n * len(partitions), dtype=np.int8), (np.concatenate(items), np.concatenate(parts)))
    _, component = connected_components(coo_array(edges, shape=(total, total)), directed=False)
    _, first, index = np.unique(component[:n], return_index=True, return_inverse=True)
    return np.asarray(first[index])


def conflicts(keys: Sequence[Hashable] | np.ndarray, labels: np.ndarray) -> list[tuple[int, int]]:
    """Per item that has both labels, the first index with label 0 and the first with label 1, in their order."""
    index = _numbered(keys)
    first = np.full((int(index.max(initial=-1)) + 1, 2), len(index))
    np.minimum.at(first, (index, np.asarray(labels).astype(int)), np.arange(len(index)))
    both = first[first.max(axis=1) < len(index)]
    return [(int(low), int(high)) for low, high in both[np.argsort(both.min(axis=1))]]


def names_items(rows: np.ndarray, keys: np.ndarray) -> bool:
    """Whether rows ``(n, ...)`` with :func:`row_keys` ``keys`` tell different items apart, so that equal ones are one.

    What several items share by their nature (a few counts or categories) names none of them.
    """
    _, different = np.unique(keys, return_index=True)
    count = len(different)
    some = np.sort(different)[np.linspace(0, count - 1, min(count, _ROWS)).astype(int)]
    width = int(np.prod(rows.shape[1:]))
    features = np.linspace(0, width - 1, min(width, _FEATURES)).astype(int)
    sample = rows[some].reshape(len(some), -1)[:, features]
    log_pairs = 2 * np.log(count) - np.log(2)
    for column in sample.T:
        _, times = np.unique(column, return_counts=True)
        if len(times) <= max(2, min(_FEW_VALUES, len(some) / 2)):
            continue
        agree = float((times * (times - 1.0)).sum()) / max(len(some) * (len(some) - 1), 1)
        log_pairs += np.log(max(agree, 1 / len(some)))
    return bool(log_pairs < np.log(_BY_CHANCE))


def recur(rows: np.ndarray, keys: np.ndarray) -> bool:
    """Whether equal rows are different items: each comes more than ten times, and none of them names an item."""
    return len(np.unique(keys)) * _OFTEN < len(keys) and not names_items(rows, keys)


def _numbered(values: Sequence[Hashable] | np.ndarray) -> np.ndarray:
    """Values as numbers from 0, in the order in which they come."""
    seen: dict[Hashable, int] = {}
    each = values.tolist() if isinstance(values, np.ndarray) else values
    return np.array([seen.setdefault(value, len(seen)) for value in each], dtype=np.int64)


def near_copies(known: np.ndarray, new: np.ndarray) -> int:
    r"""How many of some ``new (m, d)`` rows are nearly one of ``known (n, d)``, 0 where chance may have made them so.

    In units of the features' deviations, let a pair's s be its distance over that of the new row to its (n/10)-th known
    one: how near, beside what is near by nature. Where density is smooth on the scale of s = 0.1, a pair below 0.1 is
    below t with a chance of ``(t / 0.1)^k`` on a k-dimensional surface: of N pairs at most ``Binomial(N, t / 0.1)``, in
    one dimension as in many. Copies are many below some t and few between: told if that has a chance below 1e-6 for
    one t of 1e-2, 1e-3, 1e-4.

    Copies with noise of more than about a hundredth of a deviation per feature are thus not told: so near are also
    items that differ in one word.

    Cost: of many rows 256 new ones are held against 5,000 known ones, spread evenly: a few seconds at d = 4096.
    """
    from scipy.stats import binom

    known, new = _spread(known, _KNOWN), _spread(new, _NEW)
    both = np.concatenate([known, new])
    if len(known) < 2 * _NEIGHBOURS or not len(new) or recur(both, row_keys(both)):
        return 0
    mean, spread = standardization(both)
    known, new = (known - mean) / spread, (new - mean) / spread
    far = len(known) // _NEIGHBOURS
    sizes = np.einsum("ij,ij->i", known, known)
    limits = _SMOOTH * np.array([1.0, *_SHARES])
    # pairs below each limit, of each new row
    near = np.zeros((len(new), len(limits)), dtype=int)
    for start in range(0, len(new), 64):
        chunk = new[start : start + 64]
        squares = np.maximum(sizes - 2 * chunk @ known.T + np.einsum("ij,ij->i", chunk, chunk)[:, None], 0.0)
        beside = np.partition(squares, far, axis=1)[:, far, None]
        # what rounding may have made of a distance says nothing
        seen = beside * limits[-1] ** 2 > 1e-13 * sizes.max()
        near[start : start + 64] = np.stack([((squares < limit**2 * beside) & seen).sum(axis=1) for limit in limits], 1)
    total, *counts = near.sum(axis=0).tolist()
    for k, (share, count) in enumerate(zip(_SHARES, counts, strict=True), 1):
        if count and binom.sf(count - 1, total, share) < _ALARM:
            return int((near[:, k] > 0).sum())
    return 0


def _spread(rows: np.ndarray, most: int) -> np.ndarray:
    return np.asarray(rows[np.linspace(0, len(rows) - 1, min(len(rows), most)).astype(int)], dtype=float)
