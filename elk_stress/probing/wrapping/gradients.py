r"""Whether a gradient is that of the score: autograd beside central differences, row by row.

Somebody's function may cut its graph (``no_grad``, ``detach``, numpy inside), have a slope that is zero wherever it is
no jump (a step, a rounding, an argmax), or return what is not its slope (straight-through, a custom backward). Such a
gradient makes an attack look weak, and bits too many. On 32 rows x at each of several scales, along a random unit
direction v, with a step ``delta`` in proportion to the scale::

    D(delta) = (s(x + delta v) - s(x - delta v)) / (2 delta)        against        grad s(x) . v

A row counts where D(delta) and D(delta / 2) agree within 5% (no kink, no jump, no rounding between) and stand out of
rounding, ``8 eps |s| / delta``. The gradient is wrong where it is off by more than 10% on most of at least 8 such rows
at some scale. Where too few rows count nothing is said against it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from elk_stress.probing.rowwise import quiet
from elk_stress.probing.wrapping.converted import trial_rows

__all__ = ["CUT", "disagrees", "missing_gradient"]

Scores = Callable[[np.ndarray], np.ndarray]
# rows (n, d) -> scores (n,) and their gradients (n, d)
Slopes = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]

CUT = "its scores lead no way back to the rows (no_grad, detach or numpy inside)"
_FLAT = "its gradient is zero or NaN everywhere (a step, a rounding or an argmax inside)"
_FEWEST = 8


def missing_gradient(dim: int, slopes: Slopes, attempts: Iterable[tuple[Scores, Slopes, float, float]]) -> str | None:
    """Why there is no gradient to be used, or ``None``.

    Args:
        dim: width of the rows.
        slopes: scores and gradients; raises where the graph is cut.
        attempts: ``(scores, slopes, step, eps)``, most exact first: the first that can tell decides, one that raises
            is passed over.
    """
    try:
        with quiet():
            found = [slopes(x) for x in trial_rows(dim)]
    except Exception:  # each library has its own words for a graph that is cut
        return CUT
    if not any(np.nan_to_num(slope).any() for _, slope in found) and any(_varies(s) for s, _ in found):
        return _FLAT
    for scores, own, step, eps in attempts:
        try:
            judged = [disagrees(scores, own, x, step * scale(x), eps) for x in trial_rows(dim)]
        except Exception:  # a copy in double precision of what computes in single
            continue
        told = [verdict for verdict in judged if verdict is not None]
        if told:
            wrong = [verdict for verdict in told if verdict[0] > verdict[1] / 2]
            return (
                None
                if not wrong
                else (
                    f"its gradient is not that of its scores: finite differences are off on {wrong[0][0]} of "
                    f"{wrong[0][1]} rows (a straight-through or custom backward, or a part that is detached)"
                )
            )
    return None


def disagrees(scores: Scores, slopes: Slopes, x: np.ndarray, step: float, eps: float) -> tuple[int, int] | None:
    """On how many rows the gradient is wrong, of how many that can tell; ``None`` where these are too few."""
    v = np.random.default_rng(np.random.SeedSequence([0x96D])).standard_normal(x.shape)
    v /= np.linalg.norm(v, axis=1, keepdims=True)
    with quiet():
        wide, narrow = (
            (np.asarray(scores(x + h * v), dtype=float) - np.asarray(scores(x - h * v), dtype=float)) / (2 * h)
            for h in (step, step / 2)
        )
        value, slope = slopes(x)
        along = np.einsum("nd,nd->n", np.asarray(slope, dtype=float), v)
        rounding = 8 * eps * np.abs(np.asarray(value, dtype=float)) / step
        steady = np.abs(wide - narrow) <= 0.05 * np.maximum(np.abs(wide), np.abs(narrow)) + rounding
        size = np.maximum(np.abs(narrow), np.abs(along))
        counts = steady & (size > 4 * rounding) & np.isfinite(narrow)
        off = ~(np.abs(narrow - along) <= 0.1 * size + rounding)
    n = int(counts.sum())
    return (int((off & counts).sum()), n) if n >= _FEWEST else None


def scale(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(x * x)))


def _varies(scores: np.ndarray) -> bool:
    known = scores[np.isfinite(scores)]
    return len(known) > 1 and bool(np.ptp(known) > 0)
