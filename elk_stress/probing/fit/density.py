r"""Shrunk covariances, whatever the features' units, and their leading axes.

Equations: of n rows with covariance C, D the features' standard deviations and ``R = C / (D D^T)`` their correlations,

    C' = D R' D,   R' = (1 - a) R + a I,   a = min(1, (e + 1) / ((n + 1) (e - 1/d))),   e = mean of the squares of R,

a being the oracle-approximating share of Chen, Wiesel, Eldar & Hero 2010 (0907.4698; in the form of scikit-learn's
``OAS``) for R. Shrinking correlations makes every fit commute with a change of units feature by feature: real language
models have a few features a thousand times larger than the rest, and a covariance shrunk towards a multiple of the
identity would be blind to all others. The price: fits no longer commute with rotations.

a needs count, mean and scatter alone, so merged moments give the same matrix. Rows of one item under several contexts
are correlated: a is somewhat smaller than for independent rows. A feature that never varied has no unit of its own: it
gets the median of the others' deviations and of R' the share a, so that a detector sees it move.

With ``z = (x - m) / D`` and the r leading axes V of R', of eigenvalues l, coordinates are ``y = V^T z / sqrt(l)``; what
they leave, ``rest = z - V V^T z``, is measured as a whole in units of the mean remaining eigenvalue s^2
(:func:`leading_axes`, :func:`on_axes`). So moves out of the leading axes stay visible. Centred before it is whitened:
float32 does not cancel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from elk_stress.probing.fit.moments import Moments
from elk_stress.probing.fit.scaling import deviations

__all__ = ["Axes", "axes_factor", "enough_negatives", "leading_axes", "negatives_of", "on_axes", "shrunk", "spectrum"]


def negatives_of(activations: np.ndarray, labels: np.ndarray, name: str) -> np.ndarray:
    """Rows with label 0 in float64; refuses to learn from fewer than two."""
    rows: np.ndarray = np.asarray(activations, dtype=float)[np.asarray(labels) == 0]
    enough_negatives(len(rows), name)
    return rows


def enough_negatives(count: int, name: str) -> None:
    """Refuse to learn from fewer than two."""
    if count < 2:
        raise ValueError(f"{name} learns from negatives (label 0) alone and needs at least 2 of them, got {count}")


def shrunk(
    mean: np.ndarray, covariance: np.ndarray, count: float, shrinkage: float | None = None
) -> tuple[np.ndarray, np.ndarray, float]:
    """Standard deviations D ``(d,)``, shrunk correlations R' ``(d, d)`` and the share of the identity in them.

    Args:
        mean: ``(d,)``: what is far below it is rounding.
        covariance: C ``(d, d)``.
        count: n, how many independent rows it was estimated from.
        shrinkage: a share instead of the oracle-approximating one.

    Raises:
        ValueError: nothing varies.
    """
    spread = deviations(mean, np.sqrt(np.diagonal(covariance)))
    varies = np.isfinite(spread)
    dim = int(varies.sum())
    if not dim:
        raise ValueError("the rows do not differ from each other; give rows of different items")
    correlation = covariance / spread / spread[:, None]
    share = shrinkage
    if share is None:
        # constant features are rows of zeros
        energy = float(np.einsum("ij,ij->", correlation, correlation)) / dim**2
        away = (count + 1.0) * (energy - 1.0 / dim)
        # in one dimension, or where nothing is correlated, there is nothing to choose
        share = 1.0 if away <= 0 else min(1.0, (energy + 1.0) / away)
    spread = np.where(varies, spread, np.median(spread[varies]))
    return spread, np.asarray((1.0 - share) * correlation + share * np.eye(len(spread))), float(share)


def spectrum(covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues, largest first and kept above rounding, and the orthonormal axes ``(d, d)`` as columns."""
    sizes, axes = np.linalg.eigh(covariance)
    return np.maximum(sizes[::-1], 1e-12 * sizes[-1]), axes[:, ::-1]


class Axes(NamedTuple):
    """Mean and unit of each feature ``(d,)``, axes ``(d, r)``, standard deviations ``(r + 1,)``, last of the rest."""

    centre: np.ndarray
    spread: np.ndarray
    axes: np.ndarray
    scales: np.ndarray


def leading_axes(rows: np.ndarray, rank: int) -> Axes:
    """The leading axes of ``rows (n, d)``.

    r is at most ``rank``, d, and half as many as there are rows: axes fitted to as many rows would explain them all.
    """
    moments = Moments.of(rows, "scatter")
    spread, correlation, _ = shrunk(moments.mean, moments.covariance, moments.count)
    sizes, axes = spectrum(correlation)
    kept = max(1, min(rank, len(sizes), len(rows) // 2 if len(rows) // 2 < len(sizes) else len(sizes)))
    left = float(sizes[kept:].mean()) if kept < len(sizes) else 1.0
    # an eigenvector's sign is arbitrary: the largest entry positive, so that equal data give equal parameters
    axes = axes[:, :kept]
    axes = axes * np.where(axes[np.abs(axes).argmax(axis=0), np.arange(kept)] < 0, -1.0, 1.0)
    return Axes(moments.mean, spread, axes, np.sqrt(np.append(sizes[:kept], left)))


def on_axes(xp: Any, parameters: Mapping[str, Any], activations: Any) -> tuple[Any, Any]:
    """Whitened coordinates ``(*batch, r)`` and the squared length of the rest ``(*batch,)`` in its own variance.

    ``parameters``: those of :class:`Axes` by name; a probe saved before there was a ``spread`` has none.
    """
    axes, scales = parameters["axes"], parameters["scales"]
    centred = activations - parameters["centre"]
    if "spread" in parameters:
        centred = centred / parameters["spread"]
    along = xp.matmul(centred, axes)
    if axes.shape[1] == axes.shape[0]:
        # nothing is left but rounding
        return along / scales[:-1], xp.zeros_like(centred[..., 0])
    rest = (centred - xp.matmul(along, xp.matrix_transpose(axes))) / scales[-1]
    return along / scales[:-1], xp.sum(rest * rest, axis=-1)


def axes_factor(parameters: Mapping[str, np.ndarray], factor: np.ndarray) -> np.ndarray:
    """``(r + d, k)`` what a move ``factor u`` does to whitened coordinates and rest."""
    moved = factor / parameters["spread"][:, None] if "spread" in parameters else factor
    along = parameters["axes"].T @ moved
    scales = parameters["scales"]
    return np.concatenate([along / scales[:-1, None], (moved - parameters["axes"] @ along) / scales[-1]])
