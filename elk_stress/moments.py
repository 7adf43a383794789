r"""Counts, means and scatter of one class of rows, gathered batch by batch and merged without loss of precision.

About the mean m of n rows, with ``y = x - m``:

    S = sum y y^T (d, d),    t = sum ||y||^2 y (d,),    q = sum ||y||^4,

or the diagonal of S alone, or m alone. Two sets of rows are merged by moving both to the mean of all, by s = new - old
mean, and adding. Moving is exact algebra, since ``sum y = 0``:

    S -> S + n s s^T
    t -> t - tr(S) s - 2 S s - n ||s||^2 s
    q -> q - 4 t.s + 4 s^T S s + 2 ||s||^2 tr(S) + n ||s||^4

Nothing is ever a difference of large sums, as ``sum x^2 - n m^2`` would be (Chan, Golub & LeVeque 1983, "Algorithms for
computing the sample variance"). q is what Ledoit and Wolf's shrinkage needs beside S, so that it streams too.

Shapes: rows ``(n, d)`` of any float dtype; everything is kept in float64, O(d^2) or O(d) numbers whatever n is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

__all__ = ["Moments", "Order", "ledoit_wolf_share"]

Order = Literal["mean", "spread", "scatter"]


@dataclass(frozen=True)
class Moments:
    """Moments of a set of rows.

    Attributes:
        count: n.
        mean: ``(d,)``; zero where there are no rows.
        square: S ``(d, d)`` of order ``scatter``, its diagonal ``(d,)`` of order ``spread``, else ``None``.
        third: t ``(d,)``, of order ``scatter`` only.
        fourth: q, of order ``scatter`` only.
    """

    count: int
    mean: np.ndarray
    square: np.ndarray | None = None
    third: np.ndarray | None = None
    fourth: float = 0.0

    @classmethod
    def of(cls, rows: np.ndarray, order: Order) -> Moments:
        """The moments of ``rows (n, d)``."""
        rows = np.asarray(rows, dtype=float)
        if not len(rows):
            dim = rows.shape[1]
            square = {"mean": None, "spread": np.zeros(dim), "scatter": np.zeros((dim, dim))}[order]
            return cls(0, np.zeros(dim), square, np.zeros(dim) if order == "scatter" else None)
        mean = rows.mean(axis=0)
        if order == "mean":
            return cls(len(rows), mean)
        centred = rows - mean
        # the mean is rounded; what it is off by would add up over many batches
        rest = centred.mean(axis=0)
        mean, centred = mean + rest, centred - rest
        if order == "spread":
            return cls(len(rows), mean, np.einsum("ij,ij->j", centred, centred))
        norms = np.einsum("ij,ij->i", centred, centred)
        return cls(len(rows), mean, centred.T @ centred, norms @ centred, float(norms @ norms))

    def merged(self, other: Moments) -> Moments:
        """The moments of both sets of rows together."""
        if not self.count or not other.count:
            return self if self.count else other
        gap = other.mean - self.mean
        count = self.count + other.count
        mean = self.mean + gap * (other.count / count)
        if self.square is None or other.square is None:
            return Moments(count, mean)
        if self.third is None:
            return Moments(count, mean, self.square + other.square + gap**2 * (self.count * other.count / count))
        square, third, fourth = np.outer(gap, gap), np.zeros_like(mean), 0.0
        square *= self.count * other.count / count
        square += self.square
        square += other.square
        for part, move in ((self, gap * (other.count / count)), (other, gap * (-self.count / count))):
            moved_third, moved_fourth = part._moved(move)
            third, fourth = third + moved_third, fourth + moved_fourth
        return Moments(count, mean, square, third, fourth)

    def _moved(self, move: np.ndarray) -> tuple[np.ndarray, float]:
        assert self.square is not None
        assert self.third is not None
        trace, length = float(np.trace(self.square)), float(move @ move)
        turned = self.square @ move
        third = self.third - trace * move - 2 * turned - self.count * length * move
        fourth = self.fourth - 4 * self.third @ move + 4 * move @ turned + 2 * length * trace + self.count * length**2
        return third, float(fourth)


def ledoit_wolf_share(covariance: np.ndarray, fourth: float, count: int) -> float:
    """Ledoit and Wolf's share of the identity in a covariance of n rows about a known mean.

    Args:
        covariance: S ``(d, d)``, the mean outer product of the centred rows.
        fourth: the sum of ``||y||^4`` over these rows.
        count: n.

    Returns:
        a in [0, 1] of ``(1 - a) S + a tr(S)/d I``: ``min(b, e) / e`` with ``e = ||S - tr(S)/d I||^2`` and
        ``b = (fourth / n - ||S||^2) / n`` (Ledoit & Wolf 2004, J. Multivariate Analysis 88); 0 for d = 1.
    """
    dim = len(covariance)
    size = float(np.einsum("ij,ij->", covariance, covariance))
    away = size - float(np.trace(covariance)) ** 2 / dim
    noise = (fourth / count - size) / count
    # in one dimension, or where S is a multiple of the identity already, nothing is left to shrink
    if dim == 1 or noise <= 0 or away <= 0:
        return 0.0
    return min(noise, away) / away
