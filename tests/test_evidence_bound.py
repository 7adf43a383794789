"""The evidence bound: never below B beyond its rate, finite where q fails, and tight where it can be."""

from __future__ import annotations

import math

import numpy as np
import pytest
from known_answers import KNOWN
from scipy import stats
from scipy.special import log_ndtr

from elk_stress.core.bits import Kind
from elk_stress.estimators.design_point import DesignPoint
from elk_stress.estimators.evidence_bound import EvidenceBound, bound_of, level_of
from elk_stress.estimators.limit_state import LimitState, from_function


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_bounds_every_known_answer(name):
    case = KNOWN[name]
    state = from_function(case.function, case.dim)
    centres = DesignPoint()(state, seed=0).diagnostics["centres"]
    bits = EvidenceBound()(state, seed=1, centres=centres)[0]
    assert bits.kind is Kind.UPPER_BOUND
    assert bits.value >= case.bits


def test_close_to_a_half_space():
    beta = 7.0
    state = from_function(lambda u: beta - u[:, 0], 8)
    centres = np.zeros((1, 1, 8))
    centres[0, 0, 0] = beta
    bits = EvidenceBound(n_particles=8192)(state, seed=0, centres=centres)[0]
    # the best t gives 1.5 bits of slack in the limit of many draws
    assert 0 <= bits.value + log_ndtr(-beta) / math.log(2) < 1.8
    assert bits.diagnostics["jensen"] > bits.value


def test_from_the_prior_it_is_clopper_pearson():
    state = from_function(lambda u: 0.5 - u[:, 0], 2)
    bits = EvidenceBound(n_particles=2000, pilot=0.1)(state, seed=3, centres=np.full((1, 1, 2), np.nan))[0]
    k = round(float(bits.diagnostics["attack_success"]) * 1800)
    low = stats.binomtest(k, 1800, alternative="greater").proportion_ci(0.95).low
    assert bits.value == pytest.approx(-math.log2(low), abs=1e-9)


def test_violated_at_its_rate_and_not_more():
    """From the prior t is 0 and only the Clopper-Pearson limit is left: it fails just under 5% of the time."""
    repeats = 2000
    state = LimitState(lambda p, u: 0.5 - u[..., 0], dim=1, n_problems=repeats)
    batch = EvidenceBound(n_particles=1000, pilot=0.1)(state, seed=0, centres=np.full((repeats, 1, 1), np.nan))
    violated = int((batch.value < -log_ndtr(-0.5) / math.log(2)).sum())
    # binomial(2000, 0.05) exceeds 147 with chance 1e-6; and a bound that is never violated would not be a 95% bound
    assert 50 <= violated <= 147


def test_no_failing_draw_means_no_bound():
    bits = EvidenceBound(n_particles=64)(
        from_function(lambda u: np.ones(len(u)), 2), seed=0, centres=np.zeros((1, 1, 2))
    )[0]
    assert bits.value == math.inf
    assert str(bits) == "<= inf (bound)"
    assert "no fresh draw failed" in bits.status


def test_jensen_form_is_an_estimate_of_a_looser_bound():
    # q = N(c, I) at a half-space: a = 1/2 and E[L | E] = (beta^2/2 + beta sqrt(2/pi)) / ln 2
    beta = 5.0
    state = from_function(lambda u: beta - u[:, 0], 1)
    bits = EvidenceBound(n_particles=40_000, form="jensen")(state, seed=0, centres=np.array([[[beta]]]))[0]
    exact = 1 + (beta**2 / 2 + beta * math.sqrt(2 / math.pi)) / math.log(2)
    assert bits.kind is Kind.ESTIMATE
    assert bits.value == pytest.approx(exact, abs=2 * (bits.high - bits.value))
    assert bits.high - bits.low < 0.3


def _half_space_ratios(beta: float, problems: int, n: int, seed: int) -> np.ndarray:
    """L in bits at draws of N(beta, 1) that fail, ``u >= beta``; ``inf`` at the others."""
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    z = rng.standard_normal((problems, n))
    return np.where(z >= 0, (beta**2 / 2 + beta * z) / math.log(2), math.inf)


@pytest.mark.parametrize("n", [16, 48, 256])
@pytest.mark.parametrize("beta", [0.5, 3.0, 20.0])
def test_a_level_from_few_pilot_draws_is_rigorous_and_nearly_always_finite(n, beta):
    pilot, fresh = (_half_space_ratios(beta, 2000, n, seed) for seed in (0, 1))
    level = level_of(pilot, 0.95)
    bound = bound_of(fresh, level, 0.95)
    assert (bound < -log_ndtr(-beta) / math.log(2)).sum() <= 147
    # a level at the sixth failing draw is missed by as many fresh ones with a chance of 2^-6
    assert np.isinf(bound).mean() < 0.03


def test_a_level_never_rests_on_one_lucky_draw():
    """One failing draw far below the others would give the lowest bound on the pilot, and none on fresh draws."""
    pilot = np.full((1, 20), math.inf)
    pilot[0, :8] = [1.0, 100.0, 101.0, 102.0, 103.0, 104.0, 105.0, 106.0]
    assert level_of(pilot, 0.95)[0] >= 103.0
    # with fewer failures than that, all of them
    pilot[0, 3:8] = math.inf
    assert level_of(pilot, 0.95)[0] == 101.0
    assert level_of(np.full((1, 20), math.inf), 0.95)[0] == math.inf
    assert level_of(np.empty((1, 0)), 0.95)[0] == math.inf


def test_the_level_is_the_best_of_those_allowed():
    """On many draws of a half-space: where t minimizes t - log2 q(E, L <= t)."""
    beta = 7.0
    t = level_of(_half_space_ratios(beta, 1, 200_000, 3), 0.95)[0]
    z = np.linspace(1e-3, 3, 30_000)
    value = (beta**2 / 2 + beta * z) / math.log(2) - np.log2(stats.norm.cdf(z) - 0.5)
    best = (beta**2 / 2 + beta * z[value.argmin()]) / math.log(2)
    assert t == pytest.approx(best, abs=0.6)
