"""Closed forms of linear limit states, and the limit when behaviour must be kept exactly."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from elk_stress.core.bits import Kind
from elk_stress.estimators.closed_form import ClosedForm, conditional_limit
from elk_stress.estimators.limit_state import LimitState, Linear
from elk_stress.testbeds.linear_exact import joint_bits
from elk_stress.threats.priors import EllipticalPrior, Gaussian, Logistic, StudentT

TAILS = {"gaussian": Gaussian(), "logistic": Logistic(), "t4": StudentT(4)}


def _limit_state(weight: np.ndarray, offset: np.ndarray, tail=None) -> LimitState:
    extra = 0 if tail is None else tail.extra

    def function(problems, u):
        scale = tail.scale(u[..., -1], np) if extra else 1.0
        return offset[problems][:, None] + scale * np.einsum("pnk,pk->pn", u[..., : weight.shape[1]], weight[problems])

    return LimitState(
        function, dim=weight.shape[1] + extra, n_problems=len(weight), linear=Linear(weight, offset, tail)
    )


def test_half_spaces_in_any_dimension():
    # a half-space at distance beta has -log2 Phi(-beta) bits, whatever the dimension; 290 bits included
    for dim in (1, 7, 512):
        weight = np.random.default_rng(dim).standard_normal((4, dim))
        beta = np.array([-1.0, 0.0, 4.0, 19.8])
        batch = ClosedForm()(_limit_state(weight, beta * np.linalg.norm(weight, axis=1)))
        np.testing.assert_allclose(batch.value, -stats.norm.logsf(beta) / math.log(2), rtol=1e-12)
        np.testing.assert_array_equal(batch.low, batch.value)
        assert batch.kind == (Kind.EXACT,) * 4
        assert batch.evaluations.sum() == 0
    assert batch.value[-1] == pytest.approx(288, abs=3)


@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS)
def test_matches_counting_through_the_limit_state(tail):
    weight, offset = np.array([[1.0, -2.0, 0.5]]), np.array([3.0])
    state = _limit_state(weight, offset, tail)
    u = np.random.default_rng(20).standard_normal((1, 400_000, state.dim))
    p = np.mean(state.value(np.zeros(1, dtype=np.int64), u) <= 0)
    bits = ClosedForm()(state).value[0]
    assert p * 2**bits == pytest.approx(1.0, abs=5 * math.sqrt(2**bits / 400_000))


def test_zero_weights_never_or_always_fail():
    batch = ClosedForm()(_limit_state(np.zeros((3, 2)), np.array([1.0, 0.0, -1.0])))
    np.testing.assert_array_equal(batch.value, [math.inf, 0.0, 0.0])
    assert str(batch[0]) == "inf"


def test_refuses_what_is_not_linear():
    with pytest.raises(ValueError, match="known linear form"):
        ClosedForm()(LimitState(lambda p, u: u[..., 0], dim=2))
    with pytest.raises(ValueError, match="needs weight \\(problems, 1\\)"):
        ClosedForm()(LimitState(lambda p, u: u[..., 0], dim=2, linear=Linear(np.ones((1, 2)), np.ones(1), Logistic())))


class TestConditionalLimit:
    rng = np.random.default_rng(21)
    factor = rng.standard_normal((6, 5))
    readout = rng.standard_normal((2, 6))
    weight = rng.standard_normal(6)

    def _left(self) -> float:
        """Standard deviation of the score given that the outputs stay: by conditioning the joint Gaussian."""
        covariance = self.factor @ self.factor.T
        yy = self.readout @ covariance @ self.readout.T
        xy = self.readout @ covariance @ self.weight
        return math.sqrt(self.weight @ covariance @ self.weight - xy @ np.linalg.solve(yy, xy))

    def test_gaussian_is_the_conditional_gaussian(self):
        margins = np.array([-1.0, 0.0, 2.0, 9.0])
        batch = conditional_limit(margins, self.factor, self.weight, self.readout)
        np.testing.assert_allclose(batch.value, -stats.norm.logsf(margins / self._left()) / math.log(2), rtol=1e-9)

    def test_student_gains_the_outputs_as_degrees_of_freedom(self):
        # given Y = 0 of k outputs, a t_nu projection of variance sigma^2 is t_{nu+k} with scale^2 sigma^2 (nu-2)/(nu+k)
        nu, k, margin = 4.0, 2, 3.0
        batch = conditional_limit(margin, self.factor, self.weight, self.readout, StudentT(nu))
        scale = self._left() * math.sqrt((nu - 2) / (nu + k))
        assert batch.value[0] == pytest.approx(-stats.t(nu + k).logsf(margin / scale) / math.log(2), rel=1e-8)

    @pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS)
    def test_is_where_the_integrals_go(self, tail):
        prior = EllipticalPrior(self.factor, tail)
        joint = joint_bits(self.weight, 3.0, prior, self.readout, 1e-10)
        kept = joint_bits(0 * self.weight, -1.0, prior, self.readout, 1e-10)
        limit = conditional_limit(3.0, self.factor, self.weight, self.readout, tail).value[0]
        assert joint - kept == pytest.approx(limit, rel=1e-5)

    def test_oracle_is_infinite_and_exact(self):
        oracles = np.array([[2.0, 0.0], [0.3, -1.0]]) @ self.readout
        batch = conditional_limit(np.array([1.0, 1e-3]), self.factor, oracles, self.readout)
        np.testing.assert_array_equal(batch.value, math.inf)
        assert batch.kind == (Kind.EXACT,) * 2
        # unmoved: already failed, on the edge, and a probe that nothing moves
        at_edge = conditional_limit(np.array([-1.0, 0.0]), self.factor, oracles, self.readout)
        np.testing.assert_array_equal(at_edge.value, [0.0, 1.0])
        assert conditional_limit(1.0, self.factor, 0 * self.weight, self.readout).value[0] == math.inf

    def test_ignored_direction_costs_what_it_costs_without_constraint(self):
        # independent of the outputs under the prior: keeping behaviour changes nothing
        readout, weight = np.array([[1.0, 0.0, 0.0]]), np.array([0.0, 1.0, 1.0])
        value = conditional_limit(3.0, np.eye(3), weight, readout).value[0]
        assert value == pytest.approx(float(Gaussian().bits(3.0 / math.sqrt(2))), rel=1e-12)

    def test_refuses_other_widths(self):
        with pytest.raises(ValueError, match="share the width"):
            conditional_limit(1.0, self.factor, np.ones(5), self.readout)
