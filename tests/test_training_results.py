"""Summaries over models: intervals that hold what they claim to hold."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy import stats

from elk_stress.core.bits import Bits, BitsBatch, Kind
from elk_stress.core.flags import flag
from elk_stress.thoughts.result import plain
from elk_stress.training.result import WeightBits, median_bits, over_models


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed))


def exact_coverage(n: int, j: int) -> float:
    """Chance that the j-th smallest and j-th largest of n enclose the median."""
    return 1 - 2 * sum(math.comb(n, i) for i in range(j)) / 2**n


@pytest.mark.parametrize("n", range(6, 17))
def test_median_interval_is_the_narrowest_of_order_statistics(n):
    values = np.arange(1.0, n + 1)
    bits = median_bits(rng(n).permutation(values), np.full(n, math.inf), "bits spent")
    j = round(bits.low)
    assert bits.value == np.median(values)
    assert (bits.low, bits.high) == (j, n + 1 - j)
    assert exact_coverage(n, j) >= 0.95 > exact_coverage(n, j + 1)
    assert bits.kind is Kind.ESTIMATE


@pytest.mark.parametrize("n", [6, 8, 11, 16])
def test_median_interval_covers_at_its_rate(n):
    """Of a skewed distribution; the exact rate is known, so that both too few and too many hits are a fault."""
    draws = rng(n, 1).lognormal(4.0, 1.5, (2000, n))
    rows = [median_bits(row, np.full(n, math.inf), "x") for row in draws]
    hits = sum(row.low <= math.exp(4.0) <= row.high for row in rows)
    rate = min(c for c in (exact_coverage(n, j) for j in range(1, n // 2 + 1)) if c >= 0.95)
    assert stats.binomtest(hits, 2000, rate).pvalue > 1e-6


@pytest.mark.parametrize("n", [1, 2, 5])
def test_few_models_have_no_interval(n):
    bits = median_bits(np.full(n, 30.0), np.full(n, 50.0), "x")
    assert (bits.value, bits.low, bits.high) == (30.0, 0.0, math.inf)


@pytest.mark.parametrize("n", [6, 9, 16])
def test_median_interval_with_a_common_end_covers(n):
    """Runs that all end at the same bits: the truth lies inside, whether or not half of the models got there."""
    for end in (40.0, 60.0, 120.0):
        draws = rng(n, 2).lognormal(4.0, 0.7, (2000, n))
        rows = [median_bits(np.where(row <= end, row, math.inf), np.full(n, end), "x") for row in draws]
        hits = sum(row.low <= math.exp(4.0) <= row.high for row in rows)
        assert hits >= 1851  # below 95% by a chance of one in a million
        for row, values in zip(rows, draws, strict=True):
            assert (row.kind is Kind.CENSORED) == (np.sum(values <= end) < n / 2 + 0.5 * (n % 2 == 0))


def test_censored_median_claims_no_more_than_was_reached():
    bits = median_bits(np.array([10.0, 20.0, *[math.inf] * 6]), np.full(8, 100.0), "x")
    assert bits.kind is Kind.CENSORED
    assert bits.value <= 100.0
    assert bits.low <= 10.0
    assert bits.high == math.inf


def test_nothing_broke():
    bits = median_bits(np.full(8, math.inf), np.full(8, 100.0), "x")
    assert (bits.kind, bits.value, bits.low, bits.high) == (Kind.CENSORED, 100.0, 100.0, math.inf)


@pytest.mark.parametrize("n", [2, 6, 8, 16])
def test_mean_over_models_is_the_t_interval(n):
    values = rng(n, 3).normal(0.8, 0.1, (5, n))
    mean, low, high = over_models(values)
    expected = stats.t.interval(0.95, n - 1, values.mean(axis=1), stats.sem(values, axis=1))
    assert mean == pytest.approx(values.mean(axis=1))
    assert low == pytest.approx(expected[0])
    assert high == pytest.approx(expected[1])


def test_missing_models_are_left_out():
    values = rng(4).normal(size=9)
    holes = np.concatenate([values, [np.nan, np.nan]])
    for found, expected in zip(over_models(holes), over_models(values), strict=True):
        assert found == pytest.approx(expected)
    mean, low, high = over_models(np.array([0.7]))
    assert (mean, low, high) == (0.7, -math.inf, math.inf)
    assert np.isnan(over_models(np.full(3, np.nan))[0])


def test_t_interval_covers_for_gaussian_models():
    values = rng(5).normal(size=(4000, 8))
    _, low, high = over_models(values)
    assert stats.binomtest(int(((low <= 0) & (high >= 0)).sum()), 4000, 0.95).pvalue > 1e-6


def test_weight_bits_come_back_from_json() -> None:
    models = BitsBatch.build(
        np.array([3.0, 8.0]),
        np.array([2.0, 8.0]),
        np.array([4.0, np.inf]),
        [Kind.ESTIMATE, Kind.CENSORED],
        "importance",
        evaluations=np.array([10, 20]),
        status=["ok", "starved"],
        flags=[(), (flag("low_effective_sample_size", "2.0"),)],
    )
    made = WeightBits(Bits(3.0, 2.0, 4.0, Kind.ESTIMATE, "x"), models, np.array([5.0, np.inf]), {"0.5": 12.0, "1": 3.0})
    again = WeightBits.from_json(json.loads(json.dumps(plain(made), allow_nan=False)))
    assert plain(again) == plain(made)
