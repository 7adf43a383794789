r"""What detectors that learn from negatives alone share: a shrunk covariance of the negatives, and its leading axes.

Equations: with the covariance C = S / n of n negatives, shrunk as ``C' = (1 - a) C + a tr(C)/d I`` by the
oracle-approximating share of Chen, Wiesel, Eldar & Hero 2010 (0907.4698; in the form of scikit-learn's ``OAS``),

    mu = tr(C)/d,   e = mean of the squared entries of C,   a = min(1, (e + mu^2) / ((n + 1) (e - mu^2 / d))).

a needs count, mean and scatter alone (Ledoit and Wolf's needs fourth moments besides), so merged moments give the same
matrix. Rows of one item under several contexts are correlated: a is somewhat smaller than for independent rows.

The r leading axes V of C', of eigenvalues l, make coordinates ``y = V^T (x - m) / sqrt(l)``; what they leave, ``rest =
(x - m) - V V^T (x - m)``, is measured as a whole in units of the mean remaining eigenvalue s^2 (:func:`leading_axes`,
:func:`on_axes`). So moves out of the leading axes stay visible. Centred before it is whitened: float32 does not cancel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from elk_stress.moments import Moments

__all__ = ["enough_negatives", "leading_axes", "negatives_of", "oas_covariance", "on_axes", "spectrum"]


def negatives_of(activations: np.ndarray, labels: np.ndarray, name: str) -> np.ndarray:
    """Rows with label 0 in float64; refuses to learn from fewer than two."""
    rows: np.ndarray = np.asarray(activations, dtype=float)[np.asarray(labels) == 0]
    enough_negatives(len(rows), name)
    return rows


def enough_negatives(count: int, name: str) -> None:
    """Refuse to learn from fewer than two."""
    if count < 2:
        raise ValueError(f"{name} learns from negatives (label 0) alone and needs at least 2 of them, got {count}")


def oas_covariance(moments: Moments, shrinkage: float | None = None) -> tuple[np.ndarray, float]:
    """Shrunk covariance ``(d, d)`` and the share of the identity in it, from count, mean and scatter alone.

    Raises:
        ValueError: rows that do not differ, or moments without a scatter matrix.
    """
    if moments.square is None or moments.square.ndim != 2:
        raise ValueError("a covariance needs moments of order 'scatter'; gather them with Moments.of(rows, 'scatter')")
    dim, count = len(moments.square), moments.count
    covariance = moments.square / max(count, 1)
    mean_size = float(np.trace(covariance)) / dim
    if not mean_size > 1e-20 * max(1.0, float(moments.mean @ moments.mean)):
        raise ValueError(f"the {count} negatives do not differ from each other; give negatives of different items")
    share = shrinkage
    if share is None:
        energy = float(np.mean(covariance**2))
        away = (count + 1.0) * (energy - mean_size**2 / dim)
        # in one dimension, or where C is a multiple of the identity, there is nothing to choose
        share = 1.0 if away <= 0 else min(1.0, (energy + mean_size**2) / away)
    return np.asarray((1.0 - share) * covariance + share * mean_size * np.eye(dim)), float(share)


def spectrum(covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues, largest first and kept above rounding, and the orthonormal axes ``(d, d)`` as columns."""
    sizes, axes = np.linalg.eigh(covariance)
    return np.maximum(sizes[::-1], 1e-12 * sizes[-1]), axes[:, ::-1]


def leading_axes(rows: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean ``(d,)``, leading axes ``(d, r)``, and standard deviations ``(r + 1,)``; the last is that of the rest.

    r is at most ``rank``, d, and half as many as there are rows: axes fitted to as many rows would explain them all.
    """
    moments = Moments.of(rows, "scatter")
    covariance, _ = oas_covariance(moments)
    sizes, axes = spectrum(covariance)
    kept = max(1, min(rank, len(sizes), len(rows) // 2 if len(rows) // 2 < len(sizes) else len(sizes)))
    left = float(sizes[kept:].mean()) if kept < len(sizes) else 1.0
    # an eigenvector's sign is arbitrary: the largest entry positive, so that equal data give equal parameters
    axes = axes[:, :kept]
    axes = axes * np.where(axes[np.abs(axes).argmax(axis=0), np.arange(kept)] < 0, -1.0, 1.0)
    return moments.mean, axes, np.sqrt(np.append(sizes[:kept], left))


def on_axes(xp: Any, parameters: Mapping[str, Any], activations: Any) -> tuple[Any, Any]:
    """Whitened coordinates ``(*batch, r)`` and the squared length of the rest ``(*batch,)`` in its own variance."""
    axes, scales = parameters["axes"], parameters["scales"]
    centred = activations - parameters["centre"]
    along = xp.matmul(centred, axes)
    if axes.shape[1] == axes.shape[0]:
        # nothing is left but rounding
        return along / scales[:-1], xp.zeros_like(centred[..., 0])
    rest = (centred - xp.matmul(along, xp.matrix_transpose(axes))) / scales[-1]
    return along / scales[:-1], xp.sum(rest * rest, axis=-1)
