r"""Comparing probes under training pressure: paired over models, an exact permutation test, Holm over the table.

Two quantities, per point of clean AUROC above chance (``100 (AUROC - 1/2)``), so that a probe is not ranked by what it
never caught: the bits *needed* (B at half advantage, a property of the probe) and the bits that an attack *spent*
(censored ones count as what was reached). The models are the sample: the null hypothesis is that for each model either
probe could have had either value, so all ``2^models`` sign patterns are equally likely.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from elk_stress.comparison import holm
from elk_stress.training.results import PressureResult, over_models

__all__ = ["PressureComparison", "compare_pressure", "per_point"]

_EXACT = 14  # models up to which all sign patterns are listed


@dataclass(frozen=True)
class PressureComparison:
    """``a - b`` in bits per point of clean AUROC.

    Attributes:
        quantity: ``needed`` or ``spent``.
        difference, interval: mean over models and its 95% t-interval.
        p: exact two-sided sign-flip p-value; holm: corrected over the table.
        better: whose is larger if Holm's p < 0.05, else ``None``.
    """

    a: str
    b: str
    quantity: str
    difference: float
    interval: tuple[float, float]
    p: float
    holm: float
    better: str | None

    def __str__(self) -> str:
        verdict = f"{self.better} survives more" if self.better else "undecided"
        return (
            f"bits {self.quantity} per point: {self.a} - {self.b}: {self.difference:+.2f} "
            f"[{self.interval[0]:+.2f}, {self.interval[1]:+.2f}], Holm p {self.holm:.3g}: {verdict}"
        )


def per_point(result: PressureResult, quantity: str) -> np.ndarray:
    """``(models,)`` bits needed or spent per point of clean AUROC above chance; NaN where the probe has no advantage
    or B was not measured."""
    points = 100 * (result.clean - 0.5)
    if quantity == "spent":
        bits = np.where(np.isfinite(result.spent), result.spent, result.reached)
    elif result.bits is None or result.bits.models is None:
        return np.full(len(points), np.nan)
    else:
        bits = np.asarray(result.bits.models.value)
    return np.where(points > 1, bits / np.maximum(points, 1), np.nan)


def compare_pressure(results: Sequence[PressureResult]) -> tuple[PressureComparison, ...]:
    """All pairs of probes under the same attack and mode; Holm's correction over all rows together.

    Raises:
        ValueError: results of different testbeds, models or seeds, which are not paired.
    """
    rows: list[PressureComparison] = []
    for a, b in combinations(results, 2):
        if (a.attack, a.mode) != (b.attack, b.mode) or a.probe == b.probe:
            continue
        for what in ("testbed", "seed", "epsilon"):
            if getattr(a, what) != getattr(b, what):
                raise ValueError(
                    f"cannot compare {a.probe} and {b.probe}: their {what} differs ({getattr(a, what)} and "
                    f"{getattr(b, what)}); run both on the same testbed with the same seed"
                )
        for quantity in ("needed", "spent"):
            difference = per_point(a, quantity) - per_point(b, quantity)
            if np.isfinite(difference).sum() < 2:
                continue
            mean, low, high = (float(x) for x in over_models(difference))
            p = _sign_flips(difference[np.isfinite(difference)])
            rows.append(PressureComparison(a.probe, b.probe, quantity, mean, (low, high), p, p, None))
    corrected = holm([row.p for row in rows])
    return tuple(
        replace(row, holm=p, better=None if p >= 0.05 else (row.a if row.difference > 0 else row.b))
        for row, p in zip(rows, corrected, strict=True)
    )


def _sign_flips(difference: np.ndarray) -> float:
    """Share of sign patterns whose mean is at least as far from 0; sampled beyond 14 models."""
    n = len(difference)
    if n <= _EXACT:
        signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    else:
        rng = np.random.default_rng(np.random.SeedSequence([n, 0x51]))
        signs = np.concatenate([np.ones((1, n)), rng.choice([-1.0, 1.0], size=(2**_EXACT, n))])
    means = np.abs(signs @ difference) / n
    return min(1.0, float((means >= abs(difference.mean()) * (1 - 1e-12)).mean())) if math.isfinite(means[0]) else 1.0
