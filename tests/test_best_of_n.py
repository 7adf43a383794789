"""Best of n: the hypergeometric chance against counting, its monotonicity, exact bits."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from elk_stress.core.bits import Kind, best_of_n_half_chance
from elk_stress.estimators.best_of_n import BestOfN, holds, observed_curve, predicted_curve
from elk_stress.estimators.limit_state import LimitState


def test_holds_is_the_share_of_subsets_without_a_failure() -> None:
    for failing, n in itertools.product(range(7), range(7)):
        subsets = list(itertools.combinations(range(6), n))
        share = np.mean([all(i >= failing for i in subset) for subset in subsets])
        assert holds(6, failing, n) == pytest.approx(share, abs=1e-12)


def test_holds_is_scipys_hypergeometric_for_large_pools() -> None:
    n = np.array([1, 10, 1000, 50_000])
    expected = stats.hypergeom(100_000, 37, n).pmf(0)
    np.testing.assert_allclose(holds(100_000, 37, n), expected, rtol=1e-8)


@given(st.integers(1, 500), st.data())
def test_holds_never_rises_with_n_or_with_failures(pool: int, data: st.DataObject) -> None:
    failing = data.draw(st.integers(0, pool))
    curve = holds(pool, failing, np.arange(pool + 1))
    assert (np.diff(curve) <= 1e-12).all()
    assert curve[0] == 1.0
    assert curve[-1] == (failing == 0)
    assert (np.diff(holds(pool, np.arange(pool + 1), failing)) <= 1e-12).all()


@given(st.integers(2, 300), st.data())
def test_a_finite_pool_breaks_sooner_than_independent_draws(pool: int, data: st.DataObject) -> None:
    failing, n = data.draw(st.integers(1, pool)), data.draw(st.integers(1, pool))
    assert holds(pool, failing, n) <= (1 - failing / pool) ** n + 1e-12


def test_bits_of_a_pool_are_exact() -> None:
    batch = BestOfN().from_counts(64, np.array([0, 1, 16, 64]))
    np.testing.assert_allclose(batch.value, [6, 6, 2, 0])
    assert batch.kind == (Kind.CENSORED, Kind.EXACT, Kind.EXACT, Kind.EXACT)
    np.testing.assert_array_equal(batch.low, batch.value)
    np.testing.assert_array_equal(batch.high, [np.inf, 6, 2, 0])


def test_bits_of_the_population_have_the_exact_interval() -> None:
    batch = BestOfN("population").from_counts(64, np.array([0, 3, 64]))
    expected = stats.binomtest(3, 64).proportion_ci(method="exact")
    assert batch.low[1] == pytest.approx(-np.log2(expected.high))
    assert batch.high[1] == pytest.approx(-np.log2(expected.low))
    assert batch.kind[0] is Kind.CENSORED
    assert batch.value[0] == batch.low[0] == pytest.approx(-np.log2(1 - 0.025 ** (1 / 64)))
    assert batch.low[2] == 0.0


def test_a_pool_is_evaluated_and_counted() -> None:
    pool = np.linspace(-1, 1, 21)[None, :, None] * np.array([1.0, 0.0])[:, None, None]
    state = LimitState(lambda problems, u: 0.95 - u[..., 0], 1, 2)
    batch = BestOfN()(state, pool)
    np.testing.assert_allclose(batch.value, np.log2(21))
    assert batch.kind == (Kind.EXACT, Kind.CENSORED)
    assert (batch.evaluations == 21).all()
    short = BestOfN()(state, pool, max_evaluations=10)[0]
    assert (short.evaluations, short.flags[0].name) == (10, "budget_exhausted")
    # ten of its own alternatives say less than log2 21 about the pool
    assert short.value < np.log2(10)


def test_predicted_and_observed_curves_agree_when_the_prediction_is_right() -> None:
    rng = np.random.default_rng(0)
    bits = rng.uniform(2, 9, 400)
    n = np.array([1, 4, 16, 64])
    counts = rng.binomial(4096, 2.0**-bits)
    observed, predicted = observed_curve(4096, counts, n), predicted_curve(bits, n)
    np.testing.assert_allclose(observed.holds, predicted.holds, atol=0.02)
    assert (observed.low < observed.holds).all()
    assert (observed.holds < observed.high).all()
    np.testing.assert_allclose(observed.bits, [0, 2, 4, 6])


def test_prediction_at_the_half_chance_and_at_the_edges() -> None:
    n = 2 ** best_of_n_half_chance(20.0)
    assert predicted_curve(np.array([20.0]), np.array([n])).holds[0] == pytest.approx(0.5)
    np.testing.assert_array_equal(predicted_curve(np.array([0.0, np.inf]), np.array([1, 8])).holds, [0.5, 0.5])
    # far below machine precision the power still falls
    assert predicted_curve(np.array([60.0]), np.array([2.0**60])).holds[0] == pytest.approx(np.exp(-1))


def test_groups_widen_the_interval() -> None:
    counts = np.repeat(np.random.default_rng(1).integers(0, 20, 20), 20)
    alone = observed_curve(64, counts, np.array([8]))
    together = observed_curve(64, counts, np.array([8]), groups=np.repeat(np.arange(20), 20))
    assert together.high - together.low > 2 * (alone.high - alone.low)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="0 <= n <= N"):
        holds(5, 1, 6)
    with pytest.raises(ValueError, match="failing"):
        holds(5, 6, 1)
    with pytest.raises(ValueError, match="a pool has shape"):
        BestOfN()(LimitState(lambda p, u: u[..., 0], 1, 2), np.zeros((1, 5, 1)))
    with pytest.raises(ValueError, match="can fail"):
        BestOfN().from_counts(5, np.array([6]))
