"""Survival curves and half-lives against their definitions; the bootstrap against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from elk_stress.core.bits import Bits, BitsBatch, Kind
from elk_stress.thoughts.survival import (
    ItemReplicates,
    Resamples,
    curve_from_items,
    grid_of,
    half_life,
    margin_of_bits,
    moved_bits,
    replicate_bits,
    weighted_half_life,
    wide_interval,
)
from elk_stress.threats.priors import Gaussian, Logistic, StudentT, Tail

finite_bits = arrays(float, st.integers(1, 30), elements=st.floats(0, 90))


def batch(value: np.ndarray, low: np.ndarray | None = None, high: np.ndarray | None = None, **kw: object) -> BitsBatch:
    return BitsBatch.build(
        value, value if low is None else low, value if high is None else high, kw.pop("kind", Kind.ESTIMATE), "m", **kw
    )


def still(bits: np.ndarray, caught: np.ndarray) -> ItemReplicates:
    """Replicates that all equal the data."""
    return ItemReplicates(np.tile(bits, (4, 1)), np.tile(caught, (4, 1)), np.ones((4, len(bits))))


@given(finite_bits)
def test_half_life_is_where_at_most_half_survive(values: np.ndarray) -> None:
    life = half_life(values)
    assert (values > life).mean() <= 0.5
    assert (values >= life).mean() >= 0.5


@given(finite_bits, st.integers(0, 99))
def test_weighted_half_life_is_that_of_repeated_items(values: np.ndarray, seed: int) -> None:
    weights = np.random.default_rng(seed).integers(0, 4, (3, len(values)))
    got = weighted_half_life(np.tile(values, (3, 1)), weights.astype(float))
    for row, w in zip(got, weights, strict=True):
        expected = half_life(np.repeat(values, w))
        assert (math.isnan(row) and math.isnan(expected)) or row == expected


@given(finite_bits)
def test_recall_never_rises_and_starts_at_recall(values: np.ndarray) -> None:
    n_positives = len(values) + 3
    padded = np.concatenate([values, np.zeros(3)])
    caught = np.concatenate([np.ones(len(values), bool), np.zeros(3, bool)])
    curve, survival, headline, rows = curve_from_items(
        batch(values), n_positives, still(padded, caught), grid_of(100), 100
    )
    assert (np.diff(curve.value) <= 0).all()
    assert curve.value[0] == (values > 0).mean() * len(values) / n_positives
    np.testing.assert_allclose(curve.value * n_positives, survival.value * len(values))
    assert (curve.low <= curve.value).all()
    assert (curve.value <= curve.high).all()
    assert headline.value == half_life(values)
    assert math.isclose(rows[0, 1] * n_positives, padded.sum(), abs_tol=1e-9)


def test_items_beyond_max_bits_are_censored_not_lost() -> None:
    values = np.array([5.0, 100.0, 100.0])
    bits = BitsBatch.build(
        values, values, np.array([5.0, np.inf, np.inf]), (Kind.ESTIMATE, Kind.CENSORED, Kind.CENSORED), "m"
    )
    curve, _, headline, _ = curve_from_items(bits, 3, still(values, np.ones(3, bool)), grid_of(100), 100)
    assert curve.value[-1] == 2 / 3
    assert curve.censored_from == 100
    assert headline.kind is Kind.CENSORED
    assert str(headline) == ">= 100.0"


def test_failed_searches_widen_the_curve_between_worst_and_best_case() -> None:
    values = np.array([10.0, 12.0])
    bits = BitsBatch.build(values, values, np.array([10.0, np.inf]), (Kind.ESTIMATE, Kind.CENSORED), "m")
    curve, _, headline, _ = curve_from_items(bits, 2, still(values, np.ones(2, bool)), grid_of(100), 100)
    late = curve.x > 20
    assert (curve.worst[late] == 0).all()
    assert (curve.best[late] == 0.5).all()
    assert headline.value == 10.0


def test_infinite_items_give_an_exact_infinite_half_life() -> None:
    values = np.full(3, np.inf)
    bits = batch(values, kind=Kind.EXACT)
    headline = curve_from_items(bits, 3, still(np.full(3, 100.0), np.ones(3, bool)), grid_of(100), 100)[2]
    assert math.isinf(headline.value)
    assert headline.kind is Kind.EXACT


def test_a_linear_replicate_is_the_closed_form_of_its_margin() -> None:
    margin, deviation = np.array([2.0, 3.0, -1.0]), np.array([1.0, 0.5, 1.0])
    margins = np.array([[2.5, 2.0, -0.5], [1.0, 4.0, 0.3]])
    factor = np.array([1.0, 2.0])
    for tail in (Gaussian(), Logistic()):
        value = np.where(margin > 0, tail.bits(margin / deviation), np.nan)
        got = replicate_bits(
            tail=tail, low=value, high=value, value=value, margin=margin, deviation=deviation, margins=margins,
            deviation_factor=factor, weights=np.ones((2, 3)), max_bits=100.0, seed=0,
        )  # fmt: skip
        expected = np.where(margins > 0, tail.bits(margins / (deviation * factor[:, None])), 0.0)
        np.testing.assert_allclose(got.bits, expected)
        assert (got.caught == (margins > 0)).all()


def test_entities_come_along_whole() -> None:
    groups = np.array([0, 0, 1, 1, 2])
    labels = np.array([1, 0, 1, 0, 1])
    found = Resamples.draw(groups, labels, np.array([5, 6, 6]), 7, replicates=50, seed=0)
    assert (found.test[:, 0] == found.test[:, 1]).all()
    assert (found.positives == found.test[:, labels == 1]).all()
    assert (found.negatives[:, 1] == found.negatives[:, 2]).all()
    assert (found.contexts.sum(axis=1) == 7).all()
    again = Resamples.draw(groups, labels, np.array([5, 6, 6]), 7, replicates=50, seed=0)
    assert (found.test == again.test).all()


@pytest.mark.parametrize("tail", [Gaussian(), Logistic(), StudentT(5.0)], ids=lambda t: t.name)
def test_measured_bits_move_with_the_distance_that_explains_them(tail: Tail) -> None:
    z = np.array([0.5, 2.0, 6.0, 20.0])
    bits = np.asarray(tail.bits(z))
    np.testing.assert_allclose(margin_of_bits(tail, bits), z, rtol=1e-7)
    # a linear score: its closed form at the new margin and deviation
    margin, deviation = 3.0 * z, np.full(4, 3.0)
    moved = moved_bits(tail, bits, margin, deviation, 1.5 * margin, 0.8 * deviation, 1e6)
    np.testing.assert_allclose(moved, tail.bits(z * 1.5 / 0.8), rtol=1e-7)
    # a saturated copy of it has the same bits and hardly a gradient: another scale of the prior moves both alike
    flat = moved_bits(tail, bits, np.tanh(margin), 1e-4 * deviation, np.tanh(margin), 2e-4 * deviation, 1e6)
    np.testing.assert_allclose(flat, tail.bits(z / 2), rtol=1e-7)
    unknown = moved_bits(tail, np.array([np.nan, np.inf]), z[:2], np.ones(2), 2 * z[:2], np.ones(2), 1e6)
    np.testing.assert_allclose(unknown, [float(tail.bits(1.0)), np.inf])


@pytest.mark.parametrize(
    ("bits", "raised"),
    [
        (Bits(3.0, 2.1, 7.0, Kind.ESTIMATE, "m"), True),
        (Bits(3.3, 1.1, math.inf, Kind.ESTIMATE, "m"), True),
        (Bits(3.0, 2.1, 4.0, Kind.ESTIMATE, "m"), False),
        (Bits(100.0, 90.0, math.inf, Kind.CENSORED, "m"), False),
        (Bits(math.inf, 90.0, math.inf, Kind.EXACT, "m"), False),
        (Bits(0.0, 0.0, 0.0, Kind.ESTIMATE, "m"), False),
    ],
)
def test_an_interval_without_an_upper_end_is_wide(bits: Bits, raised: bool) -> None:
    assert [f.name for f in wide_interval(bits)] == ["wide_interval"] * raised
