"""Annealed importance sampling: known answers where plain importance sampling degenerates, coverage, honesty."""

from __future__ import annotations

import math

import numpy as np
import pytest
from known_answers import KNOWN
from scipy import stats
from scipy.special import log_ndtr, logsumexp

from elk_stress.core.bits import Kind
from elk_stress.estimators.annealed import Annealed
from elk_stress.estimators.design_point import DesignPoint
from elk_stress.estimators.importance import Importance
from elk_stress.estimators.limit_state import LimitState, from_function


def half_spaces(beta: float, dim: int, repeats: int) -> tuple[LimitState, np.ndarray, float]:
    """``repeats`` copies of one half-space, the centre on its boundary, and its bits."""
    weight = np.ones(dim) / math.sqrt(dim)
    state = LimitState(lambda p, u: beta - u @ weight, dim=dim, n_problems=repeats)
    return state, np.tile(beta * weight, (repeats, 1, 1)), float(-log_ndtr(-beta) / math.log(2))


def paraboloids(beta: float, bend: float, dim: int, repeats: int) -> tuple[LimitState, np.ndarray, float]:
    """``g = beta + bend (chi2 - (dim-1)) - u_1``: curved along every other coordinate; bits by quadrature over chi2."""

    def g(problems: np.ndarray, u: np.ndarray) -> np.ndarray:
        return beta + bend * ((u[..., 1:] ** 2).sum(-1) - (dim - 1)) - u[..., 0]

    chi2 = np.linspace(0.05, 3.0, 100_001) * (dim - 1)
    log_p = logsumexp(stats.chi2(dim - 1).logpdf(chi2) + log_ndtr(-(beta + bend * (chi2 - (dim - 1)))))
    centres = np.zeros((repeats, 1, dim))
    centres[:, :, 0] = beta
    return LimitState(g, dim=dim, n_problems=repeats), centres, -float(log_p + np.log(chi2[1] - chi2[0])) / math.log(2)


@pytest.mark.parametrize(("beta", "dim"), [(7.8, 50), (19.84, 20)])
def test_unbiased_precise_and_covering_on_half_spaces(beta, dim):
    state, centres, bits = half_spaces(beta, dim, 200)
    batch = Annealed()(state, seed=0, centres=centres)
    ratio = np.exp2(bits - batch.value)
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(200)
    assert batch.value.std() < 0.25
    # binomial(200, 0.95) lies below 176 once in 10^4
    assert ((batch.low <= bits) & (bits <= batch.high)).sum() >= 176
    assert (batch.high - batch.low).mean() < 6 * batch.value.std()
    assert set(batch.status) == {"ok"}


def test_curved_boundary_where_importance_degenerates():
    state, centres, bits = paraboloids(11.5, 0.014, 250, 24)
    batch = Annealed()(state, seed=1, centres=centres)
    plain = Importance(n_particles=int(batch.evaluations.mean()))(state, seed=1, centres=centres)
    assert np.median(plain.diagnostics["effective"]) < 30
    # binomial(24, 0.95) lies below 19 once in 10^3
    assert ((batch.low <= bits) & (bits <= batch.high)).sum() >= 19
    error = [np.sqrt(np.mean((b.value - bits) ** 2)) for b in (batch, plain)]
    assert error[0] < 0.6 * error[1]
    assert batch.evaluations.mean() < 45_000


def test_slow_particles_lag_and_their_interval_knows():
    state, centres, bits = paraboloids(11.5, 0.02, 300, 24)
    hurried = Annealed(n_moves=4, max_moves=4)(state, seed=2, centres=centres)
    patient = Annealed()(state, seed=2, centres=centres)
    assert hurried.diagnostics["lag"].mean() > 2 * patient.diagnostics["lag"].mean()
    assert abs(patient.value.mean() - bits) < abs(hurried.value.mean() - bits)
    assert (hurried.high - hurried.low).mean() > (patient.high - patient.low).mean()


@pytest.mark.parametrize("name", ["RP28", "RP31", "RP33", "RP54", "RP89", "RP110", "tanh_mlp"])
def test_known_answers(name):
    case = KNOWN[name]
    state = from_function(case.function, case.dim)
    centres = DesignPoint()(state, seed=0).diagnostics["centres"]
    bits = Annealed(n_particles=256)(state, seed=2, centres=centres)[0]
    # three standard errors: a 95% interval stretched by 1.53 (false alarm 0.3%)
    assert abs(bits.value - case.bits) <= 1.53 * max(bits.high - bits.value, bits.value - bits.low)
    assert bits.high - bits.low < 3


def test_failure_near_no_design_point_from_a_typical_centre():
    """RP63: the origin fails but draws do not; u_1 = 5.4 is where an average draw starts to fail."""
    case = KNOWN["RP63"]
    state = LimitState(lambda p, u: case.function(u.reshape(-1, 100)).reshape(u.shape[:2]), dim=100, n_problems=20)
    centres = np.tile(np.eye(100)[:1] * 5.4, (20, 1, 1))
    batch = Annealed()(state, seed=2, centres=centres)
    # binomial(20, 0.95) lies below 15 three times in 10^4
    assert ((batch.low <= case.bits) & (case.bits <= batch.high)).sum() >= 15
    assert abs(batch.value.mean() - case.bits) < 0.5
    assert (batch.high - batch.low).mean() < 4


def test_two_modes_share_one_path():
    state = LimitState(lambda p, u: np.minimum(6.0 - u[..., 0], 6.2 + u[..., 1]), dim=30, n_problems=40)
    centres = np.full((40, 3, 30), np.nan)
    centres[:, 0] = np.eye(30)[0] * 6.0
    centres[:, 2] = -np.eye(30)[1] * 6.2
    bits = -float(logsumexp([log_ndtr(-6.0), log_ndtr(-6.2)])) / math.log(2)
    batch = Annealed()(state, seed=3, centres=centres, keep_failures=50)
    ratio = np.exp2(bits - batch.value)
    # either mode alone would give 0.77 or 0.23
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(40) < 0.15
    share = (batch.diagnostics["failures"][..., 1] <= -6.2).mean()
    truth = math.exp(log_ndtr(-6.2)) / 2.0**-bits
    assert abs(share - truth) < 0.06


def test_kept_failures_are_draws_from_the_prior_given_failure():
    state, centres, _ = half_spaces(6.0, 4, 40)
    kept = Annealed(n_particles=256)(state, seed=4, centres=centres, keep_failures=25).diagnostics["failures"]
    assert kept.shape == (40, 25, 4)
    along = (kept @ (np.ones(4) / 2)).ravel()
    assert along.min() >= 6.0
    # 1000 draws, 25 of each 1024 particles: near independent (false alarm 1e-4)
    assert stats.kstest(along, stats.truncnorm(6.0, np.inf).cdf).pvalue > 1e-4
    assert stats.kstest((kept @ np.array([0.5, -0.5, 0.5, -0.5])).ravel(), "norm").pvalue > 1e-4


@pytest.mark.parametrize("scale", [0.6, 1.3])
def test_centres_off_the_boundary_still_serve(scale):
    state, centres, bits = half_spaces(10.0, 40, 60)
    batch = Annealed()(state, seed=5, centres=scale * centres)
    ratio = np.exp2(bits - batch.value)
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(60) < 0.3


def test_without_centres_the_prior_is_counted():
    state = LimitState(lambda p, u: np.array([1.0, 50.0])[p][:, None] - u[..., 0], dim=2, n_problems=2)
    batch = Annealed()(state, seed=0, centres=np.full((2, 1, 2), np.nan), keep_failures=5)
    count = round(256 * 2.0 ** -batch[0].value)
    exact = stats.binomtest(count, 256).proportion_ci()
    assert [2.0 ** -batch[0].high, 2.0 ** -batch[0].low] == pytest.approx([exact.low, exact.high])
    assert batch[1].kind is Kind.CENSORED
    assert batch[1].value == pytest.approx(-math.log2(1 - 0.05 ** (1 / 256)))
    assert (batch.diagnostics["failures"][0, :, 0] >= 1).all()
    assert np.isnan(batch.diagnostics["failures"][1]).all()


def test_nothing_failed_is_censored():
    state = LimitState(lambda p, u: np.ones(u.shape[:2]), dim=4)
    bits = Annealed()(state, seed=0, centres=np.full((1, 1, 4), 3.0))[0]
    assert (bits.kind, bits.low, bits.high) == (Kind.CENSORED, 0.0, math.inf)
    assert "add centres" in bits.status


def test_budget_holds_and_is_honest():
    state, centres, bits = paraboloids(11.5, 0.01, 200, 20)
    # the last pays for all particles, but not for all levels
    for budget in (0, 100, 2000, 6000, 13_000):
        batch = Annealed()(state, seed=6, centres=centres, max_evaluations=budget, keep_failures=3)
        assert (batch.evaluations <= budget).all()
        assert all(any(f.name == "budget_exhausted" for f in b.flags) for b in batch)
        assert ((batch.low <= bits) & (bits <= batch.high)).sum() >= 15
    assert Annealed()(state, seed=6, centres=centres, max_evaluations=100)[0].kind is Kind.CENSORED


def test_one_seed_one_result_and_problems_are_their_own():
    betas = np.array([3.0, 8.0, 15.0])
    state = LimitState(lambda p, u: betas[p][:, None] - u[..., 0], dim=6, n_problems=3)
    centres = np.zeros((3, 1, 6))
    centres[:, 0, 0] = betas
    first, again, other = (Annealed()(state, seed=s, centres=centres) for s in (7, 7, 8))
    np.testing.assert_array_equal(first.value, again.value)
    assert not np.array_equal(first.value, other.value)
    np.testing.assert_allclose(first.value, -log_ndtr(-betas) / math.log(2), atol=1.0)


def test_blocks_of_problems_give_the_same_bits(monkeypatch):
    import elk_stress.estimators.annealed_path as module
    import elk_stress.estimators.mixture as mixture

    state, centres, bits = half_spaces(8.0, 30, 40)
    monkeypatch.setattr(mixture, "_BLOCK_ELEMENTS", 3 * 256 * 30)
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 100 * 30)
    batch = Annealed()(state, seed=9, centres=centres)
    ratio = np.exp2(bits - batch.value)
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(40) < 0.2


def test_wrong_settings_say_what_was_expected():
    state, centres, _ = half_spaces(3.0, 4, 5)
    with pytest.raises(ValueError, match=r"must have shape \(5 problems, m, 4\)"):
        Annealed()(state, seed=0, centres=centres[:2])
    with pytest.raises(ValueError, match="max_moves at least n_moves"):
        Annealed(n_moves=30)
