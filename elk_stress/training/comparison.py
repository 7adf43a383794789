r"""Comparing probes under training pressure: paired over models, an exact permutation test, Holm over the table.

Two quantities, per point of clean AUROC above chance (``100 (AUROC - 1/2)``), so that a probe is not ranked by what it
never caught: the bits *needed* (B at half advantage, a property of the probe, compared once) and the bits that an
attack *spent* (compared under every attack and mode).

Where an attack ended before the probe broke, only a lower limit is known. A model's difference counts as far as it is
certain: the limit against the other's value where it already lies above it, and 0 where either could be the larger
(both censored, or a run that ended early), so that a short run never makes a probe look weak. The mean then
underestimates how far apart they are.

The models are the sample: the null hypothesis is that for each model either probe could have had either outcome, so all
``2^models`` sign patterns are equally likely. With n models p is at least ``2^(1-n)``, and Holm's correction multiplies
the least by the number of pairs: ``decidable`` says whether any difference could have been enough. Every (quantity,
attack, mode) is a table of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from elk_stress.core.bits import Kind
from elk_stress.core.settings import listed, pairs_of, shown
from elk_stress.thoughts.comparison import holm
from elk_stress.training.result import PressureResult, over_models

__all__ = ["PressureComparison", "compare_pressure", "per_point"]

_EXACT = 14  # models up to which all sign patterns are listed
_LEVEL = 0.05


@dataclass(frozen=True)
class PressureComparison:
    """``a - b`` in bits per point of clean AUROC.

    Attributes:
        quantity: ``needed`` or ``spent``.
        difference, interval: mean over models and its 95% t-interval.
        p: exact two-sided sign-flip p-value; holm: corrected over the table.
        better: whose is larger if Holm's p < 0.05, else ``None``.
        certain: models whose difference is certain, of ``n_models`` that have both probes.
        decidable: whether so many models could have decided it, all of one sign, in a table of this size.
    """

    a: str
    b: str
    quantity: str
    difference: float
    interval: tuple[float, float]
    p: float
    holm: float
    better: str | None
    certain: int
    n_models: int
    decidable: bool

    def __str__(self) -> str:
        undecided = "undecided" if self.decidable else f"undecided ({self.n_models} models cannot decide so many pairs)"
        verdict = f"{self.better} survives more" if self.better else undecided
        what = f"bits {self.quantity} per point: {self.a} - {self.b}"
        if not self.certain:
            return f"{what}: unknown, limits alone cannot be ranked"
        partly = (
            "" if self.certain == self.n_models else f" (known in {self.certain} of {self.n_models} models, else 0)"
        )
        return (
            f"{what}: {self.difference:+.2f} [{self.interval[0]:+.2f}, {self.interval[1]:+.2f}]{partly}, "
            f"Holm p {self.holm:.3g}: {verdict}"
        )


def per_point(result: PressureResult, quantity: str) -> np.ndarray:
    """``(models,)`` bits needed or spent per point of clean AUROC above chance, lower limits where censored; NaN where
    the probe has no advantage or B was not measured."""
    return _limits(result, quantity)[0]


def compare_pressure(
    results: Sequence[PressureResult], pairs: Sequence[tuple[str, str]] | None = None
) -> tuple[PressureComparison, ...]:
    """Pairs of probes under the same attack and mode; Holm's correction over each (quantity, attack, mode).

    Args:
        results: one per probe, attack and mode.
        pairs: names, chosen before the results were seen; by default all with all, and a few models cannot decide the
            pairs of many probes.

    Raises:
        TypeError: something that is no result, or no pair of names.
        ValueError: a pair names a probe without a result; results of different testbeds, models or seeds, which are
            not paired.
    """
    tables: dict[tuple[str, ...], list[PressureComparison]] = {}
    seen: set[tuple[str, str]] = set()
    by_name: dict[str, list[PressureResult]] = {}
    for result in listed("results", results, ()):
        if not hasattr(result, "attack") or not hasattr(result, "mode"):
            raise TypeError(f"results are each of elk_stress.stress_training, got {shown(result)}")
        by_name.setdefault(result.probe, []).append(result)
    chosen = combinations(by_name, 2) if pairs is None else pairs_of(pairs, by_name)
    for a, b in ((a, b) for first, second in chosen for a in by_name[first] for b in by_name[second]):
        if (a.attack, a.mode) != (b.attack, b.mode):
            continue
        for what in ("testbed", "seed", "epsilon"):
            if getattr(a, what) != getattr(b, what):
                raise ValueError(
                    f"cannot compare {a.probe} and {b.probe}: their {what} differs ({getattr(a, what)} and "
                    f"{getattr(b, what)}); run both on the same testbed with the same seed"
                )
        if len(a.clean) != len(b.clean):
            raise ValueError(
                f"cannot compare {a.probe} and {b.probe}: {len(a.clean)} and {len(b.clean)} models; run both on the "
                "same models"
            )
        for quantity in ("needed", "spent"):
            # B does not depend on the attack: one row a pair, or Holm would pay for its copies
            if quantity == "needed" and (a.probe, b.probe) in seen:
                continue
            row = _compare(a, b, quantity)
            if row is not None:
                tables.setdefault((quantity,) if quantity == "needed" else (quantity, a.attack, a.mode), []).append(row)
                if quantity == "needed":
                    seen |= {(a.probe, b.probe), (b.probe, a.probe)}
    return tuple(row for table in tables.values() for row in _corrected(table))


def _compare(a: PressureResult, b: PressureResult, quantity: str) -> PressureComparison | None:
    difference, certain = _difference(_limits(a, quantity), _limits(b, quantity))
    known = difference[np.isfinite(difference)]
    if len(known) < 2:
        return None
    mean, low, high = (float(x) for x in over_models(known))
    p = _sign_flips(known)
    return PressureComparison(
        a.probe, b.probe, quantity, mean, (low, high), p, p, None, int(certain.sum()), len(known), True
    )


def _corrected(table: Sequence[PressureComparison]) -> list[PressureComparison]:
    return [
        replace(
            row,
            holm=p,
            better=None if p >= _LEVEL else (row.a if row.difference > 0 else row.b),
            decidable=2.0 ** (1 - row.n_models) * len(table) < _LEVEL,
        )
        for row, p in zip(table, holm([row.p for row in table]), strict=True)
    ]


def _limits(result: PressureResult, quantity: str) -> tuple[np.ndarray, np.ndarray]:
    """``(models,)`` lower and upper limit of the quantity per point: equal where it is known, ``inf`` above a limit."""
    points = 100 * (result.clean - 0.5)
    if quantity == "spent":
        low, high = np.where(np.isfinite(result.spent), result.spent, result.reached), np.asarray(result.spent)
    elif result.bits is None:
        low = high = np.full(len(points), np.nan)
    else:
        models = result.bits.models
        above = {Kind.CENSORED, Kind.LOWER_BOUND}
        low = np.where([kind is Kind.UPPER_BOUND for kind in models.kind], 0.0, models.value)
        high = np.where([kind in above for kind in models.kind], np.inf, models.value)
    size = np.maximum(points, 1)
    return np.where(points > 1, low / size, np.nan), np.where(points > 1, high / size, np.nan)


def _difference(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """``a - b`` as far as it is certain, 0 where its sign is not; and where its sign is certain."""
    with np.errstate(invalid="ignore"):
        least, most = a[0] - b[1], a[1] - b[0]
        # both limits infinite (inf - inf) is no knowledge at all
        least, most = np.where(np.isnan(least), -np.inf, least), np.where(np.isnan(most), np.inf, most)
    value = np.maximum(least, 0.0) + np.minimum(most, 0.0)
    missing = np.isnan(a[0]) | np.isnan(b[0])
    return np.where(missing, np.nan, value), (least >= 0) | (most <= 0)


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
