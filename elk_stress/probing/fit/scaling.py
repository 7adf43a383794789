r"""Units in which features, or the scores of members, can be compared: a mean and a standard deviation of each.

What is constant but for rounding carries nothing, and dividing by its spread would amplify noise. Its spread is given
as infinite, so that ``(x - mean) / spread`` is 0 and a weight folded back, ``w / spread``, is 0 too. Rounding is told
from variation by the feature's own mean alone: what a probe is fitted to does not hang on units.
"""

from __future__ import annotations

import numpy as np

__all__ = ["deviations", "score_scale", "standardization"]


def deviations(mean: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """``spread (d,)``, infinite for a feature that is constant but for the rounding of its ``mean (d,)``."""
    return np.where(spread > 1e-10 * np.abs(mean), spread, np.inf)


def standardization(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation ``(d,)`` of ``rows (n, d)``; infinite for a feature that is constant."""
    mean, spread = rows.mean(axis=0), rows.std(axis=0)
    return mean, deviations(mean, spread)


def score_scale(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation ``(members,)`` of ``scores (members, n)``; infinite where it says nothing."""
    centre, spread = scores.mean(axis=1), scores.std(axis=1)
    return centre, np.where(spread > 1e-12 * np.maximum(1.0, np.abs(centre)), spread, np.inf)
