"""The isoperimetric bound: exact in the limit on half-spaces, below the truth everywhere else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from known_answers import KNOWN, half_space
from scipy import stats

from elk_stress.core.bits import Kind, beta_of_bits
from elk_stress.estimators.isoperimetric_bound import IsoperimetricBound
from elk_stress.estimators.limit_state import LimitState, from_function


@pytest.mark.parametrize("beta", [2.0, 5.0, 20.0])
def test_exact_on_half_spaces_in_the_limit(beta: float) -> None:
    case = half_space(8, beta)
    state = from_function(case.function, 8, lipschitz=1.0)
    few, many = (IsoperimetricBound(n, 2000)(state, seed=1)[0] for n in (500, 200_000))
    assert few.value < many.value <= case.bits
    # the distance is missed by the error of one quantile and of its limit
    assert beta_of_bits(many.value) > beta - 0.05
    assert many.kind is Kind.LOWER_BOUND
    assert many.high == np.inf
    assert "(bound)" in str(many)


def test_below_the_truth_where_the_constant_is_loose() -> None:
    # the min of a sqrt(3)- and a 1-Lipschitz function is sqrt(3)-Lipschitz
    two_planes = KNOWN["RP33"]
    state = from_function(two_planes.function, 3, lipschitz=np.sqrt(3.0))
    bits = IsoperimetricBound()(state, seed=2)[0]
    assert 0.5 < bits.value < two_planes.bits


def test_balls_in_many_dimensions() -> None:
    # failure outside a ball: the norm is 1-Lipschitz, the truth a chi-square tail
    radius, dim = 8.0, 20
    state = from_function(lambda u: radius - np.linalg.norm(u, axis=1), dim, lipschitz=1.0)
    truth = -stats.chi2.logsf(radius**2, dim) / np.log(2)
    bits = IsoperimetricBound()(state, seed=3)[0]
    assert 5.0 < bits.value < truth


@settings(max_examples=40, deadline=None)
@given(st.floats(0.2, 6), st.floats(1.0, 4.0), st.integers(0, 2**31))
def test_scaling_g_with_its_constant_changes_nothing_and_no_constant_says_too_much(
    beta: float, factor: float, seed: int
) -> None:
    # 99.9999% confidence on 40 examples
    bound = IsoperimetricBound(400, 200, confidence=1 - 1e-6)
    scaled = LimitState(lambda p, u: factor * (beta - u[..., 0]), 2, 1, lipschitz=np.array([factor]))
    loose = LimitState(lambda p, u: beta - u[..., 0], 2, 1, lipschitz=np.array([factor]))
    tight = LimitState(lambda p, u: beta - u[..., 0], 2, 1, lipschitz=np.array([1.0]))
    values = [bound(state, seed=seed).value[0] for state in (tight, scaled, loose)]
    assert values[0] == pytest.approx(values[1], rel=1e-6, abs=1e-9)
    assert max(values) <= half_space(2, beta).bits


def test_a_batch_keeps_its_problems_apart() -> None:
    betas = np.array([1.0, 3.0, 6.0])
    state = LimitState(lambda p, u: betas[p][:, None] - u[..., 0], 4, 3, lipschitz=np.ones(3))
    batch = IsoperimetricBound()(state, seed=4)
    truth = [half_space(4, beta).bits for beta in betas]
    assert (batch.value < truth).all()
    assert (batch.value > np.array(truth) - 0.7).all()
    assert (batch.evaluations == 12_000).all()


def test_a_probe_that_fails_as_often_as_not_has_a_bound_near_one_bit_at_most() -> None:
    state = from_function(lambda u: u[:, 0], 2, lipschitz=1.0)
    bits = IsoperimetricBound()(state, seed=5)[0]
    assert 0.8 < bits.value <= 1.0


def test_a_budget_is_kept() -> None:
    state = from_function(half_space(2, 3.0).function, 2, lipschitz=1.0)
    bits = IsoperimetricBound()(state, seed=6, max_evaluations=300)[0]
    assert bits.evaluations <= 300
    assert bits.flags[0].name == "budget_exhausted"
    assert 0 < bits.value < half_space(2, 3.0).bits
    assert IsoperimetricBound()(state, seed=6, max_evaluations=0)[0].value == 0.0


def test_no_constant_no_bound() -> None:
    with pytest.raises(ValueError, match="needs a Lipschitz constant"):
        IsoperimetricBound()(from_function(lambda u: u[:, 0], 2), seed=0)
    with pytest.raises(ValueError, match="positive and finite"):
        IsoperimetricBound()(from_function(lambda u: u[:, 0], 2, lipschitz=np.inf), seed=0)
