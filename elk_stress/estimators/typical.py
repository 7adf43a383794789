r"""Centres for importance sampling where failure is typical, not only nearest.

In many dimensions a draw ``c + z`` lies ``sqrt(dim)`` from its centre c, far from where the gradient at
a design point says anything: curvature shifts the boundary, and a centre on it may see almost no draw fail. What should
be on the boundary is the *average* draw. So c is the design point of the smoothed limit state

``g_bar(c) = E_z[g(c + z)]``,  ``c <- (G_bar.c - g_bar) G_bar / ||G_bar||^2``,

with the same antithetic z in every step (a few do: weights correct for the rest). Smoothing also rounds kinks
off. A half-space keeps its design point. Where the iteration leads nowhere the design point stays.

Shapes: centres ``(problems, m, dim)``, NaN padded, in and out. Guarantee: none needed; importance sampling is unbiased
for any centre.
"""

from __future__ import annotations

import numpy as np

from elk_stress.estimators.limit_state import BudgetExhausted, Meter

__all__ = ["typical_centres"]

# problems x draws x dim per block
_BLOCK_ELEMENTS = 1 << 22


def typical_centres(
    meter: Meter,
    centres: np.ndarray,
    rng: np.random.Generator,
    *,
    n_pairs: int = 4,
    steps: int = 5,
    max_radius: float = 40.0,
) -> np.ndarray:
    """Move each centre to the design point of the smoothed limit state.

    Args:
        meter: counts ``2 n_pairs steps`` gradients per centre; a budget that ends leaves the rest unmoved.
        centres: ``(problems, m, dim)`` design points.
        rng: of the smoothing draws.
        n_pairs: antithetic pairs.
        steps: iterations.
        max_radius: a centre beyond is given up.

    Returns:
        ``(problems, m, dim)`` centres; unmoved where the smoothed boundary was not reached.
    """
    out = centres.copy()
    dim = centres.shape[-1]
    half = rng.standard_normal((n_pairs, dim))
    z = np.concatenate([half, -half])
    rows, columns = np.nonzero(~np.isnan(centres[..., 0]))
    block = max(1, _BLOCK_ELEMENTS // (z.size))
    for first in range(0, rows.size, block):
        row, column = rows[first : first + block], columns[first : first + block]
        c = centres[row, column]
        try:
            for _ in range(steps):
                g, slope = meter.value_and_gradient(row, c[:, None, :] + z)
                level, direction = g.mean(axis=1), slope.mean(axis=1)
                steepness = np.maximum(np.einsum("kd,kd->k", direction, direction), 1e-30)
                aim = direction * ((np.einsum("kd,kd->k", direction, c) - level) / steepness)[:, None]
                # half a step where the smoothed boundary is still far: the linearization is then poor
                far = np.linalg.norm(aim - c, axis=1, keepdims=True)
                c = c + (aim - c) * np.minimum(1.0, 4.0 / np.maximum(far, 1e-300))
        except BudgetExhausted:
            break
        good = (np.linalg.norm(c, axis=1) < max_radius) & (np.abs(level) < np.sqrt(steepness))
        out[row[good], column[good]] = c[good]
    return out
