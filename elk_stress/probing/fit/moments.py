r"""Counts, means and scatter of one class of rows, gathered batch by batch and merged without loss of precision.

About the mean m of n rows, with ``y = x - m``: the scatter ``S = sum y y^T (d, d)``, or its diagonal alone, or m alone.
Two sets of rows are merged by moving both to the mean of all, ``S -> S + n s s^T`` for s = new - old mean, and adding.
Nothing is ever a difference of large sums, as ``sum x^2 - n m^2`` would be (Chan, Golub & LeVeque 1983, "Algorithms for
computing the sample variance").

Shapes: rows ``(n, d)`` of any float dtype; everything is kept in float64, O(d^2) or O(d) numbers whatever n is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

__all__ = ["Moments", "Order"]

Order = Literal["mean", "spread", "scatter"]


@dataclass(frozen=True)
class Moments:
    """Moments of a set of rows.

    Attributes:
        count: n.
        mean: ``(d,)``; zero where there are no rows.
        square: S ``(d, d)`` of order ``scatter``, its diagonal ``(d,)`` of order ``spread``, else ``None``.
    """

    count: int
    mean: np.ndarray
    square: np.ndarray | None = None

    @classmethod
    def of(cls, rows: np.ndarray, order: Order) -> Moments:
        """The moments of ``rows (n, d)``."""
        rows = np.asarray(rows, dtype=float)
        if not len(rows):
            dim = rows.shape[1]
            square = {"mean": None, "spread": np.zeros(dim), "scatter": np.zeros((dim, dim))}[order]
            return cls(0, np.zeros(dim), square)
        mean = rows.mean(axis=0)
        if order == "mean":
            return cls(len(rows), mean)
        centred = rows - mean
        # the mean is rounded; what it is off by would add up over many batches
        rest = centred.mean(axis=0)
        mean, centred = mean + rest, centred - rest
        spread = order == "spread"
        return cls(len(rows), mean, np.einsum("ij,ij->j", centred, centred) if spread else centred.T @ centred)

    @property
    def covariance(self) -> np.ndarray:
        """``S / n``, ``(d, d)``.

        Raises:
            ValueError: moments of another order than ``scatter``.
        """
        if self.square is None or self.square.ndim != 2:
            raise ValueError(
                "a covariance needs moments of order 'scatter'; gather them with Moments.of(rows, 'scatter')"
            )
        return self.square / max(self.count, 1)

    def merged(self, other: Moments) -> Moments:
        """The moments of both sets of rows together."""
        if not self.count or not other.count:
            return self if self.count else other
        gap = other.mean - self.mean
        count = self.count + other.count
        mean = self.mean + gap * (other.count / count)
        if self.square is None or other.square is None:
            return Moments(count, mean)
        square = gap**2 if self.square.ndim == 1 else np.outer(gap, gap)
        square *= self.count * other.count / count
        square += self.square
        square += other.square
        return Moments(count, mean, square)
