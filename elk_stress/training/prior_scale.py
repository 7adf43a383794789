"""How large noise on a real model's weights may be before behaviour notices: few evaluations, each of them costly.

The median shift over a fixed set of draws is a smooth, noise-free function of the scale s, nearly ``c s^2`` while it is
small. Secants in log-log find the s at which it is the target in about four evaluations of all draws. Twice and half of
that scale are evaluated too: the result shows a crossing and not a plateau.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["calibrate"]

# where to begin, how near is near enough (in log shift), how often to try
_BEGIN, _CLOSE, _TRIES = 0.03, 0.02, 12


def calibrate(shifts_of_draws: Callable[[float], np.ndarray], target: float) -> dict[str, Any]:
    """The scale at which the median shift is ``target``, by secants in log-log (shift grows about as the square).

    Args:
        shifts_of_draws: scale -> shifts of a fixed set of draws.
        target: nats.

    Raises:
        ValueError: no scale was found.
    """
    tried: dict[float, np.ndarray] = {}

    def median(scale: float) -> float:
        tried[scale] = shifts_of_draws(scale)
        return float(np.median(tried[scale]))

    scale = _BEGIN
    error = math.log(max(median(scale), 1e-30) / target)
    slope, before = 2.0, (scale, error)
    while abs(error) > _CLOSE:
        if len(tried) >= _TRIES or not math.isfinite(error):
            raise ValueError(
                f"no scale of the prior shifts behaviour by {target:g} nats: {scale:g} shifts it by "
                f"{target * math.exp(error):.3g}; choose another epsilon"
            )
        # a secant of noise-free values; its slope is kept where shifts can be (saturation bends it down)
        scale = float(np.clip(scale * math.exp(-error / slope), scale / 8, scale * 8))
        error = math.log(max(median(scale), 1e-30) / target)
        if scale != before[0]:
            slope = float(np.clip((error - before[1]) / math.log(scale / before[0]), 0.5, 4.0))
        before = (scale, error)
    # the neighbourhood, so that the result shows a crossing and not a plateau
    for neighbour in (scale / 2, scale * 2):
        median(neighbour)
    scales = sorted(tried)
    return {
        "scale": scale,
        "target": target,
        "scales": scales,
        "median_shift": [float(np.median(tried[s])) for s in scales],
        "shifts": [tried[s].tolist() for s in scales],
        "n_draws": len(tried[scale]),
    }
