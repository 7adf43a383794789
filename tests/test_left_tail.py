"""Per-item chances of evasion and the power law of best-of-n."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from scipy.special import gammaln

from elk_stress.left_tail import LeftTail, fit_left_tail


def _counts(a: float, b: float, n_items: int, n_draws: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.binomial(n_draws, rng.beta(a, b, n_items))


@pytest.mark.parametrize(("a", "b"), [(0.3, 2.0), (0.8, 0.8), (2.0, 10.0)])
def test_it_finds_the_distribution(a: float, b: float) -> None:
    found = fit_left_tail(_counts(a, b, 20_000, 20), 20, replicates=20)
    assert found is not None
    assert found.a == pytest.approx(a, rel=0.08)
    assert found.b == pytest.approx(b, rel=0.12)


def test_it_is_at_the_maximum_of_scipys_likelihood() -> None:
    counts = _counts(0.5, 3.0, 300, 12)
    found = fit_left_tail(counts, 12, replicates=2)
    assert found is not None

    def likelihood(a: float, b: float) -> float:
        return float(stats.betabinom.logpmf(counts, 12, a, b).sum())

    best = likelihood(found.a, found.b)
    for factor in (0.9, 1.1):
        assert likelihood(found.a * factor, found.b) < best
        assert likelihood(found.a, found.b * factor) < best


def test_the_curve_is_the_average_over_chances() -> None:
    made = LeftTail(0.6, 2.0, np.array([[0.6, 2.0]]), 10, 10)
    chances = np.random.default_rng(1).beta(0.6, 2.0, 400_000)
    n = np.array([1, 4, 32])
    assert made.broken(n) == pytest.approx([1 - ((1 - chances) ** k).mean() for k in n], rel=5e-3)


def test_survivors_follow_a_power_law() -> None:
    made = LeftTail(0.4, 1.5, np.array([[0.4, 1.5]]), 10, 10)
    n = np.array([1e4, 1e6])
    held = 1 - made.broken(n)
    assert held == pytest.approx(np.exp(gammaln(1.9) - gammaln(1.5)) * n**-0.4, rel=1e-3)


def test_the_exponents_interval_covers() -> None:
    hits = 0
    for seed in range(40):
        found = fit_left_tail(_counts(0.5, 2.0, 150, 16, seed), 16, replicates=100, seed=seed)
        assert found is not None
        low, high = found.interval
        hits += low <= 0.5 <= high
    # at 95% fewer than 33 of 40 has a chance of 0.3%
    assert hits >= 33


@pytest.mark.parametrize("count", [0, 8])
def test_no_tail_where_nothing_or_everything_fails(count: int) -> None:
    assert fit_left_tail(np.full(30, count), 8) is None


def test_refusals() -> None:
    with pytest.raises(ValueError, match="one count of 0 to 8"):
        fit_left_tail(np.array([9.0]), 8)
