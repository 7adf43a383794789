"""Counting: exact limits, censoring, shared draws."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from known_answers import KNOWN
from scipy import stats

from elk_stress.core.bits import Kind
from elk_stress.estimators.limit_state import LimitState, from_function
from elk_stress.estimators.monte_carlo import MonteCarlo, clopper_pearson


@pytest.mark.parametrize("name", ["RP31", "RP33", "RP54", "RP63", "RP89", "half_space_d2_b5"])
def test_known_answers(name: str) -> None:
    case = KNOWN[name]
    bits = MonteCarlo(40_000, confidence=0.9999)(from_function(case.function, case.dim), seed=1)[0]
    assert bits.contains(case.bits)
    assert bits.high - bits.low < 3.0


def test_limits_are_scipys() -> None:
    for count, n in ((0, 50), (1, 50), (17, 50), (50, 50)):
        expected = stats.binomtest(count, n).proportion_ci(0.95, method="exact")
        np.testing.assert_allclose(clopper_pearson(count, n), (expected.low, expected.high), atol=1e-12)


def test_nothing_failed_is_censored_at_the_upper_limit() -> None:
    bits = MonteCarlo(1000)(from_function(lambda u: 1.0 + 0 * u[:, 0], 3), seed=0)[0]
    assert bits.kind is Kind.CENSORED
    assert bits.value == bits.low == pytest.approx(-np.log2(1 - 0.025 ** (1 / 1000)))
    assert bits.high == np.inf
    assert "n_samples" in bits.status


def test_everything_failed_is_zero_bits() -> None:
    bits = MonteCarlo(1000)(from_function(lambda u: 0 * u[:, 0], 3), seed=0)[0]
    assert (bits.value, bits.low, bits.kind) == (0.0, 0.0, Kind.ESTIMATE)
    assert 0 < bits.high < 0.01


@pytest.mark.parametrize("shared", [True, False])
def test_batch_budget_and_count(shared: bool) -> None:
    betas = np.linspace(0.0, 2.0, 5)
    state = LimitState(lambda problems, u: betas[problems][:, None] - u[..., 0], 700, 5)
    batch = MonteCarlo(4000, confidence=0.9999, shared=shared)(state, seed=2)
    truth = -np.log2(stats.norm.sf(betas))
    assert ((batch.low <= truth) & (truth <= batch.high)).all()
    assert (batch.evaluations == 4000).all()
    short = MonteCarlo(4000, shared=shared)(state, seed=2, max_evaluations=100)
    assert (short.evaluations == 100).all()
    assert all(flags[0].name == "budget_exhausted" for flags in short.flags)
    nothing = MonteCarlo(4000)(state, seed=2, max_evaluations=0)[0]
    assert (nothing.kind, nothing.value) == (Kind.CENSORED, 0.0)


def test_same_seed_same_count() -> None:
    state = from_function(lambda u: 1.0 - u[:, 0], 2)
    counts = [MonteCarlo(5000)(state, seed=s).diagnostics["count"][0] for s in (1, 1, 2)]
    assert counts[0] == counts[1] != counts[2]


@settings(max_examples=30, deadline=None)
@given(st.floats(-1, 3), st.floats(0, 2), st.integers(0, 2**31), st.integers(1, 40))
def test_a_smaller_failure_set_never_has_fewer_bits(beta: float, extra: float, seed: int, dim: int) -> None:
    # three nested half-spaces, the last of them cut by a second condition as well
    offset = beta + np.array([0.0, extra, extra])

    def function(problems: np.ndarray, u: np.ndarray) -> np.ndarray:
        joint = np.where(problems == 2, 0.5, -np.inf)[:, None] - u[..., -1]
        return np.maximum(offset[problems][:, None] - u[..., 0], joint)

    state = LimitState(function, dim, 3)
    batch = MonteCarlo(300)(state, seed=seed)
    assert batch.value[0] <= batch.value[1] + 1e-12 or batch.kind[1] is Kind.CENSORED
    assert batch.low[0] <= batch.low[1] + 1e-12
    assert batch.high[0] <= batch.high[1]
    assert batch.low[1] <= batch.low[2] + 1e-12


def test_bad_configurations_are_refused() -> None:
    with pytest.raises(ValueError, match="n_samples >= 1"):
        MonteCarlo(0)
