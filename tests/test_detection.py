"""Thresholds and intervals against their definitions and outside references."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from elk_stress.thoughts.conformal import (
    auroc,
    check_negatives,
    conformal_threshold,
    proportion_interval,
    weighted_conformal_thresholds,
)


@given(st.integers(20, 200), st.sampled_from([0.05, 0.1, 0.2]), st.integers(0, 10_000))
def test_threshold_is_the_conformal_order_statistic(n: int, fpr: float, seed: int) -> None:
    scores = np.random.default_rng(seed).standard_normal(n)
    rank = math.ceil((1 - fpr) * (n + 1) - 1e-9)
    assert conformal_threshold(scores, fpr) == np.sort(scores)[rank - 1]


def test_false_positive_rate_of_a_new_negative_is_the_nominal_one() -> None:
    # exact for one draw each: E[rate] = 1 - ceil((1-fpr)(n+1))/(n+1) = 0.05 at n = 99; the plain quantile gives 0.04
    rng = np.random.default_rng(0)
    rates = []
    for _ in range(4000):
        calibration, fresh = rng.standard_normal(99), rng.standard_normal(50)
        rates.append((fresh > conformal_threshold(calibration, 0.05)).mean())
    assert abs(np.mean(rates) - 0.05) < 4 * np.std(rates) / math.sqrt(len(rates))


@pytest.mark.parametrize("within", [0.1, 0.5, 3.0])
def test_independent_draws_give_the_nominal_rate_for_new_items(within: float) -> None:
    # n = 59 negatives: the rank rule's own rate is 1 - ceil(0.95 * 60)/60 = 0.05 exactly, whatever the draws share
    rng = np.random.default_rng(1)
    rates = []
    for _ in range(1500):
        calibration = rng.standard_normal(59)[:, None] + within * rng.standard_normal((59, 8))
        fresh = rng.standard_normal(50)[:, None] + within * rng.standard_normal((50, 8))
        rates.append((fresh > conformal_threshold(calibration, 0.05)).mean())
    assert abs(np.mean(rates) - 0.05) < 0.006


def test_shared_contexts_hold_the_rate_in_new_contexts() -> None:
    # a context shifts all scores together; without spreading the means the rate in new contexts is far above nominal
    rng = np.random.default_rng(4)
    spread, plain = [], []
    for _ in range(1500):
        shift = rng.standard_normal(8)
        items = rng.standard_normal(80)[:, None] + 0.3 * rng.standard_normal((80, 8))
        fresh = rng.standard_normal((40, 1)) + rng.standard_normal((1, 40)) + 0.3 * rng.standard_normal((40, 40))
        spread.append((fresh > conformal_threshold(items + shift, 0.05, shared=True)).mean())
        plain.append((fresh > conformal_threshold((items + shift).reshape(-1, 1), 0.05)).mean())
    assert np.mean(spread) < np.mean(plain) - 0.005
    assert np.mean(spread) < 0.075


def test_weighted_thresholds_equal_those_of_repeated_rows() -> None:
    rng = np.random.default_rng(2)
    scores = rng.standard_normal((40, 3))
    items, draws = rng.multinomial(40, np.full(40, 1 / 40), size=20), rng.multinomial(3, np.full(3, 1 / 3), size=20)
    got = weighted_conformal_thresholds(scores, 0.1, items, draws)
    for i in range(20):
        repeated = np.repeat(np.repeat(scores, items[i], axis=0), draws[i], axis=1)
        assert got[i] == pytest.approx(conformal_threshold(repeated, 0.1), rel=1e-12)


def test_too_few_negatives_are_refused_and_few_are_flagged() -> None:
    with pytest.raises(ValueError, match=r"needs at least 20 calibration negatives, got 19"):
        conformal_threshold(np.arange(19.0), 0.05)
    assert [f.name for f in check_negatives(40, 0.05)] == ["fpr_unresolved"]
    assert check_negatives(60, 0.05) == ()


def test_auroc_is_scikit_learns_with_ties() -> None:
    rng = np.random.default_rng(3)
    scores, labels = rng.integers(0, 5, 60).astype(float), rng.integers(0, 2, 60)
    assert auroc(scores, labels) == pytest.approx(roc_auc_score(labels, scores))


@given(st.integers(1, 40), st.data())
def test_proportion_interval_is_clopper_pearson(n: int, data: st.DataObject) -> None:
    from scipy.stats import binomtest

    hits = data.draw(st.integers(0, n))
    expected = binomtest(hits, n).proportion_ci(method="exact")
    assert proportion_interval(hits, n) == pytest.approx((expected.low, expected.high), abs=1e-9)
