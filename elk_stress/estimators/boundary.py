"""Points on a failure boundary: a bracketed root search on many segments at once.

Shared by the estimators that must stand *on* the boundary (design points) or find where a line crosses it (line
sampling).

Each segment runs from a safe end (``g > 0``) to a failing end (``g <= 0``). A secant guess is shifted by a quarter of
the tolerance towards the failing and the safe end in turn, so that a nearly linear g is bracketed to the tolerance in
two or three evaluations; every third step is a bisection, so that any g is bracketed in ``3 log2(length/tolerance)``.
"""

from __future__ import annotations

import numpy as np

from elk_stress.estimators.limit_state import Meter

__all__ = ["cross"]


def cross(
    meter: Meter,
    problems: np.ndarray,
    safe: np.ndarray,
    failing: np.ndarray,
    g_safe: np.ndarray,
    g_failing: np.ndarray,
    *,
    sign: np.ndarray | float = 1.0,
    tolerance: float = 1e-4,
    max_steps: int = 90,
) -> np.ndarray:
    """Fractions of the way from ``safe`` to ``failing`` at which the boundary is crossed.

    Args:
        meter: counts evaluations; its ``BudgetExhausted`` passes through.
        problems: ``(k,)`` problem of each segment; indices may repeat.
        safe, failing: ``(k, dim)`` ends.
        g_safe, g_failing: ``(k,)`` signed values at the ends, ``> 0`` and ``<= 0``.
        sign: multiplies g (``-1`` searches the boundary from a failing origin).
        tolerance: length of the final bracket, in u.

    Returns:
        ``(k,)`` fractions in (0, 1]; the point there fails and is at most ``tolerance`` from the boundary.
    """
    k = problems.shape[0]
    signs = np.broadcast_to(np.asarray(sign, dtype=float), (k,))
    span = failing - safe
    width = np.maximum(tolerance / np.maximum(np.linalg.norm(span, axis=1), 1e-300), 1e-15)
    low, high = np.zeros(k), np.ones(k)
    g_low, g_high = np.array(g_safe, dtype=float), np.array(g_failing, dtype=float)
    for step in range(max_steps):
        active = np.flatnonzero(high - low > width)
        if active.size == 0:
            break
        a, b, gap = low[active], high[active], (high - low)[active]
        guess = 0.5 * (a + b)
        if step % 3 != 2:
            with np.errstate(invalid="ignore", over="ignore"):
                secant = a + gap * (g_low[active] / (g_low[active] - g_high[active]))
            nudge = 0.25 * width[active] * (1 if step % 3 == 0 else -1)
            inside = np.clip(secant + nudge, a + 0.2 * width[active], b - 0.2 * width[active])
            guess = np.where(np.isfinite(inside), inside, guess)
        points = safe[active] + guess[:, None] * span[active]
        g = signs[active] * meter.value(problems[active], points[:, None, :])[:, 0]
        failed = g <= 0
        low[active], g_low[active] = np.where(failed, a, guess), np.where(failed, g_low[active], g)
        high[active], g_high[active] = np.where(failed, guess, b), np.where(failed, g, g_high[active])
    return high
