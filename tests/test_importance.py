"""Importance sampling: unbiased, near its ideal variance, gated, and its failures are draws given failure."""

from __future__ import annotations

import math

import numpy as np
import pytest
from known_answers import KNOWN
from scipy import stats
from scipy.special import log_ndtr

from elk_stress.core.bits import Kind
from elk_stress.estimators.design_point import DesignPoint
from elk_stress.estimators.importance import Importance, weighted_interval
from elk_stress.estimators.limit_state import LimitState, from_function
from elk_stress.estimators.mixture import Mixture


def half_spaces(beta: float, dim: int, repeats: int) -> tuple[LimitState, np.ndarray, float]:
    """``repeats`` copies of one half-space, the centre on its boundary, and its bits."""
    weight = np.ones(dim) / math.sqrt(dim)
    state = LimitState(lambda p, u: beta - u @ weight, dim=dim, n_problems=repeats)
    return state, np.tile(beta * weight, (repeats, 1, 1)), float(-log_ndtr(-beta) / math.log(2))


@pytest.mark.parametrize(("beta", "dim"), [(3.0, 2), (7.03, 64), (19.6, 8)])
def test_unbiased_and_near_its_ideal_variance(beta, dim):
    n, repeats = 512, 1000
    state, centres, bits = half_spaces(beta, dim, repeats)
    ratio = np.exp2(bits - Importance(n_particles=n)(state, seed=1, centres=centres).value)
    ideal = beta * math.sqrt(math.pi / 2)
    assert abs(ratio.mean() - 1) < 4 * math.sqrt(ideal / (n * repeats))
    # the sampling error of a variance over 1000 repeats is about 5%; the defensive tenth costs 1.11
    assert ratio.var() * n / ideal < 1.35


@pytest.mark.parametrize("name", ["RP28", "RP31", "RP33", "RP54", "RP89", "RP110"])
def test_known_answers(name):
    case = KNOWN[name]
    state = from_function(case.function, case.dim)
    centres = DesignPoint()(state, seed=0).diagnostics["centres"]
    bits = Importance(n_particles=16384)(state, seed=2, centres=centres)[0]
    assert bits.status == "ok"
    # three standard errors: a 95% interval stretched by 1.53 (false alarm 0.3%)
    assert abs(bits.value - case.bits) <= 1.53 * max(bits.high - bits.value, bits.value - bits.low)


def test_unbiased_wherever_the_centres_are():
    state, centres, bits = half_spaces(2.0, 3, 2000)
    elsewhere = np.concatenate([0.5 * centres, -centres], axis=1)
    ratio = np.exp2(bits - Importance(n_particles=512)(state, seed=3, centres=elsewhere).value)
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(len(ratio))


def test_overshooting_centre_is_flagged_and_not_believed():
    state, centres, _ = half_spaces(6.0, 2, 50)
    batch = Importance(n_particles=512)(state, seed=4, centres=centres * 2.0)
    flagged = np.array([any(f.name == "low_effective_sample_size" for f in b.flags) for b in batch])
    assert flagged.mean() > 0.9
    assert np.median(batch.diagnostics["effective"]) < 10


def test_nothing_failed_is_censored_by_the_prior_draws():
    state = from_function(lambda u: np.ones(len(u)), 4)
    bits = Importance(n_particles=1000)(state, seed=0, centres=np.full((1, 2, 4), np.nan))[0]
    assert bits.kind is Kind.CENSORED
    assert bits.value == pytest.approx(-math.log2(1 - 0.05 ** (1 / 1000)))
    assert bits.high == math.inf


def test_kept_failures_are_draws_from_the_prior_given_failure():
    state, centres, _ = half_spaces(3.0, 4, 1)
    kept = Importance(n_particles=200_000)(state, seed=5, centres=centres, keep_failures=2000).diagnostics["failures"]
    assert kept.shape == (1, 2000, 4)
    along = kept[0] @ (np.ones(4) / 2)
    assert along.min() >= 3.0
    truth = stats.truncnorm(3.0, np.inf)
    # the effective sample is tens of thousands, so resampled draws behave as independent ones (false alarm 1e-4)
    assert stats.kstest(along, truth.cdf).pvalue > 1e-4
    across = kept[0] @ np.array([0.5, -0.5, 0.5, -0.5])
    assert stats.kstest(across, "norm").pvalue > 1e-4


def test_kept_failures_share_two_modes_by_their_probability():
    state = from_function(lambda u: np.minimum(3.0 - u[:, 0], 3.3 + u[:, 0]), 2)
    centres = np.array([[[3.0, 0.0], [-3.3, 0.0]]])
    kept = Importance(n_particles=100_000)(state, seed=6, centres=centres, keep_failures=4000).diagnostics["failures"]
    share = math.exp(log_ndtr(-3.3)) / (math.exp(log_ndtr(-3.3)) + math.exp(log_ndtr(-3.0)))
    assert abs((kept[0, :, 0] < 0).mean() - share) < 4 * math.sqrt(share * (1 - share) / 4000) + 0.01


def test_failures_of_each_problem_are_its_own():
    offsets = np.array([2.0, 50.0, 3.0])
    state = LimitState(lambda p, u: offsets[p][:, None] - u[..., 0], dim=2, n_problems=3)
    centres = np.array([[[2.0, 0]], [[2.0, 0]], [[3.0, 0]]])
    kept = Importance(n_particles=500)(state, seed=0, centres=centres, keep_failures=20).diagnostics["failures"]
    assert (kept[0, :, 0] >= 2).all()
    assert np.isnan(kept[1]).all()
    assert (kept[2, :, 0] >= 3).all()


def test_budget_and_seed():
    state, centres, _ = half_spaces(3.0, 4, 5)
    cut = Importance(n_particles=1000)(state, seed=0, centres=centres, max_evaluations=300)
    assert (cut.evaluations == 300).all()
    assert all(f[0].name == "budget_exhausted" for f in cut.flags)
    again = [Importance(n_particles=300)(state, seed=7, centres=centres).value for _ in range(2)]
    np.testing.assert_array_equal(*again)
    assert not np.array_equal(again[0], Importance(n_particles=300)(state, seed=8, centres=centres).value)


def test_wrong_centres_say_what_was_expected():
    state, centres, _ = half_spaces(3.0, 4, 5)
    with pytest.raises(ValueError, match=r"must have shape \(5 problems, m, 4\)"):
        Importance()(state, seed=0, centres=centres[:2])


def test_interval_of_zero_one_weights_matches_the_binomial():
    hits = np.where(np.arange(4000) < 1000, 0.0, -np.inf)[None, :]
    log_p, low, high, effective = weighted_interval(hits, 30.0)
    assert effective[0] == pytest.approx(1000)
    exact = stats.binomtest(1000, 4000).proportion_ci(method="wilson")
    assert np.exp([log_p[0], low[0], high[0]]) == pytest.approx([0.25, exact.low, exact.high], rel=5e-3)


def test_mixture_ratio_matches_scipy_densities():
    centres = np.array([[[1.0, 2.0], [-2.0, 0.5], [np.nan, np.nan]]])
    mixture = Mixture.at(centres, 100, 0.1)
    u, log_ratio = mixture.draw(np.arange(1), np.random.default_rng(0))
    share = mixture.counts[0] / 100
    means = [np.zeros(2), centres[0, 0], centres[0, 1]]
    q = sum(s * stats.multivariate_normal(m, np.eye(2)).pdf(u[0]) for s, m in zip(share, means, strict=False))
    prior = stats.multivariate_normal(np.zeros(2), np.eye(2)).pdf(u[0])
    assert mixture.counts.sum() == 100
    assert share[0] == pytest.approx(0.1)
    np.testing.assert_allclose(log_ratio[0], np.log(q / prior))
