"""What all conversions share: one score per row, the name and notes, and the proof that nothing changed.

A converted probe f' of an object f is returned only if, on 64 standard normal rows at each of the scales 0.1, 1, 10::

    max |f(x) - f'(x)| <= tolerance * (1 + max |f(x)|)

near the origin and far from it, where clipping and other parts that are not what they seem show.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from elk_stress.probing.probe import FittedProbe, direction
from elk_stress.probing.rowwise import FLOAT32, check_rows, quiet

__all__ = ["Stack", "agrees", "check_opaque", "named", "one_score", "trial_rows"]

# layers as (name, arrays), see elk_stress.probing.wrapping.layers.stacked
Stack = list[tuple[str, Sequence[np.ndarray]]]


def one_score(y: Any, n: int, kind: str) -> Any:
    """``(n,)`` of a module's or function's output: one column as it is, of two the second minus the first."""
    shape = tuple(getattr(y, "shape", ()))
    if shape == (n,):
        return y
    if shape == () and n == 1:
        return y.reshape(1)
    if shape == (n, 1):
        return y[:, 0]
    if shape == (n, 2):
        return y[:, 1] - y[:, 0]
    got = shape if hasattr(y, "shape") else type(y).__name__
    raise ValueError(
        f"{kind} gives {got} for {n} rows; a probe gives ({n},) or ({n}, 1), or two logits ({n}, 2), of which the "
        "score is the second minus the first; wrap a function that picks the one score"
    )


def named(probe: FittedProbe, name: str, notes: dict[str, Any]) -> FittedProbe:
    """A converted probe with its notes; a direction also takes the name."""
    notes = {**notes, "as": probe.name}
    if probe.traits.linear:
        weight, bias = probe.parameters["weight"], float(probe.parameters["bias"])
        return direction(weight, bias, name=name, site=probe.site, notes=notes)
    return FittedProbe(probe.probe, probe.parameters, probe.site, notes, probe.dim)


def agrees(
    made: FittedProbe, score: Callable[[np.ndarray], np.ndarray], tolerance: float, limit: float = math.inf
) -> bool:
    """Whether the converted probe scores as the object does, near the origin and far from it."""
    assert made.dim is not None
    rng = np.random.default_rng(np.random.SeedSequence([0xA6E]))
    for scale in (0.1, 1.0, 10.0):
        x = scale * rng.standard_normal((64, made.dim))
        with quiet():
            expected = np.asarray(score(x), dtype=float)
        got = np.clip(np.asarray(made.score(x), dtype=float), -limit, limit)
        if expected.shape != got.shape or not np.isfinite(got).all():
            return False
        size = 1.0 + float(np.abs(expected).max())
        if float(np.abs(expected - got).max()) > tolerance * size:
            return False
    return True


def trial_rows(dim: int, n: int = 32) -> Iterator[np.ndarray]:
    """Rows ``(n, dim)`` that somebody's object is tried on: normal ones at three scales, and positive ones.

    Never zeros: what divides by a norm or a deviation has no score there.
    """
    rng = np.random.default_rng(np.random.SeedSequence([0x7213]))
    for scale in (0.1, 1.0, 10.0):
        yield scale * rng.standard_normal((n, dim))
    yield np.abs(rng.standard_normal((n, dim)))


def check_opaque(score: Callable[[np.ndarray], Any], dim: int, name: str, resolution: float = FLOAT32) -> None:
    """Refuse an object that is random, or whose scores of a row depend on other rows; see :mod:`..rowwise`."""
    for rows in trial_rows(dim):
        check_rows(score, rows, name, resolution=resolution)
