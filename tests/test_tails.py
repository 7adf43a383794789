"""Tails: closed forms against scipy, the scale map against quantiles and in every library, fitted winners."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import special, stats

from elk_stress.threats.priors import EllipticalPrior, Gaussian, Logistic, StudentT, fit_tails
from elk_stress.threats.tails import Tail, scale_table

TAILS: dict[str, Tail] = {
    "gaussian": Gaussian(),
    "logistic": Logistic(),
    "t2.1": StudentT(2.1),
    "t5": StudentT(5),
    "t60": StudentT(60),
}
HEAVY = {name: tail for name, tail in TAILS.items() if tail.extra}


def _scipy(tail: Tail) -> stats.rv_continuous:
    if isinstance(tail, Gaussian):
        return stats.norm()
    if isinstance(tail, Logistic):
        return stats.logistic(scale=math.sqrt(3) / math.pi)
    return stats.t(tail.nu, scale=math.sqrt((tail.nu - 2) / tail.nu))


@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS)
class TestOneDimension:
    def test_bits_are_scipys(self, tail):
        z = np.linspace(-6.0, 8.0, 57)
        np.testing.assert_allclose(tail.bits(z), -_scipy(tail).logsf(z) / math.log(2), rtol=1e-9)

    def test_density_is_scipys_and_has_unit_variance(self, tail):
        x = np.linspace(-30.0, 30.0, 121)
        np.testing.assert_allclose(tail.log_density(x), _scipy(tail).logpdf(x), rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(_scipy(tail).var(), 1.0, rtol=1e-9)

    def test_quantile_inverts_bits_from_0_to_1000(self, tail):
        bits = np.array([1e-9, 0.01, 0.5, 1.0, 1.5, 7.0, 40.0, 290.0, 1000.0])
        z = tail.quantile_of_bits(bits)
        np.testing.assert_allclose(tail.bits(z), bits, rtol=1e-9)
        assert (np.diff(z) > 0).all()
        assert tail.quantile_of_bits(0.0) == -math.inf


def test_t_bits_far_out_match_the_power_law():
    # P[T > x] ~ c x^-nu once x^2 >> nu: ten times farther costs nu log2(10) bits, also where P underflows
    tail = StudentT(5)
    far = np.array([1e10, 1e60, 1e100])
    np.testing.assert_allclose(tail.bits(10 * far) - tail.bits(far), 5 * math.log2(10), rtol=1e-10)
    assert tail.bits(1e100) > 1074


def test_seven_sigma_is_40_bits_gaussian_and_13_bits_t5():
    assert Gaussian().bits(7.0) == pytest.approx(39.5, abs=0.1)
    assert StudentT(5).bits(7.0) == pytest.approx(13.0, abs=0.5)


@pytest.mark.parametrize("tail", HEAVY.values(), ids=HEAVY)
class TestScale:
    def test_is_the_quantile_map(self, tail):
        z = np.linspace(-4.0, 8.0, 49) + 0.003
        if isinstance(tail, Logistic):
            expected = 2 * special.kolmogi(special.ndtr(-z)) * math.sqrt(3) / math.pi
        else:
            expected = np.sqrt((tail.nu - 2) / stats.chi2(tail.nu).ppf(special.ndtr(-z)))
        np.testing.assert_allclose(tail.scale(z, np), expected, rtol=1e-7)

    def test_has_mean_square_one(self, tail):
        z = np.linspace(-12.0, 40.0, 52 * 64 + 1)
        log_weight = -0.5 * z**2 - 0.5 * math.log(2 * math.pi)
        mean_square = np.trapezoid(np.exp(2 * np.log(tail.scale(z, np)) + log_weight), z)
        # nu = 2.1: the part of E s^2 beyond z = 40 is Phi(-40)^(1 - 2/nu), 2e-17 of it
        np.testing.assert_allclose(mean_square, 1.0, rtol=1e-6)

    def test_far_tails_solve_their_equations_in_logarithms(self, tail):
        for z in (-40.0, -33.0, 33.0, 40.0):
            log_s = math.log(float(tail.scale(np.array(z), np)))
            if isinstance(tail, Logistic):
                k = math.exp(log_s) * math.pi / (2 * math.sqrt(3))
                if z > 0:
                    found = math.log(2) - 2 * k**2
                else:
                    found = 0.5 * math.log(2 * math.pi) - math.log(k) - math.pi**2 / (8 * k**2)
            else:
                a = tail.nu / 2
                log_y = math.log(tail.nu - 2) - math.log(2) - 2 * log_s
                y = math.exp(log_y)
                if z > 0:  # P(a, y) = y^a e^-y 1F1(1; a+1; y) / Gamma(a+1)
                    found = a * log_y - y - special.gammaln(a + 1) + math.log(special.hyp1f1(1, a + 1, y))
                else:  # Q(a, y) = y^a e^-y U(1, a+1, y) / Gamma(a)
                    found = a * log_y - y - special.gammaln(a) + math.log(special.hyperu(1, a + 1, y))
            assert found == pytest.approx(special.log_ndtr(-abs(z)), rel=1e-6)

    def test_slope_matches_finite_differences_and_increases(self, tail):
        z, log_s, slope = scale_table(tail)
        assert (slope > 0).all()
        inside = slice(1, -1)
        np.testing.assert_allclose(np.gradient(log_s, z)[inside], slope[inside], rtol=1e-4)

    def test_gradients_in_torch_and_jax(self, tail):
        import array_api_compat.torch as xp_torch
        import jax
        import jax.numpy as jnp
        import torch

        z = np.array([-50.0, -39.7, -3.0, -1.0 / 64, 0.0, 1.0 / 64, 0.3, 5.2, 11.0])  # on knots and off the table too
        step = 1e-6
        expected = (tail.scale(z + step, np) - tail.scale(z - step, np)) / (2 * step)
        points = torch.tensor(z, requires_grad=True)
        (gradient,) = torch.autograd.grad(tail.scale(points, xp_torch).sum(), points)
        np.testing.assert_allclose(gradient.numpy(), expected, rtol=2e-5)
        with jax.enable_x64(True):
            gradient = jax.grad(lambda z: tail.scale(z, jnp).sum())(jnp.asarray(z))
        np.testing.assert_allclose(np.asarray(gradient), expected, rtol=2e-5)

    def test_stays_finite_in_float32(self, tail):
        assert np.isfinite(tail.scale(np.linspace(-45, 45, 91, dtype=np.float32), np)).all()


def test_far_tail_of_a_nearly_gaussian_t():
    # large nu: the series matters beyond its first term; Phi(-35) is 1e-268, still a number
    tail = StudentT(2000)
    for z in (31.0, 35.0):
        y = (tail.nu - 2) / 2 / float(tail.scale(np.array(z), np)) ** 2
        assert math.log(special.gammainc(tail.nu / 2, y)) == pytest.approx(special.log_ndtr(-z), rel=1e-9)


@pytest.mark.parametrize("nu", [2.0, 1.0, -3.0, 1e6, math.nan])
def test_student_refuses_a_variance_that_does_not_exist(nu):
    with pytest.raises(ValueError, match="2 < nu"):
        StudentT(nu)


class TestFit:
    """The planted winner is named at sizes the default run has."""

    @staticmethod
    def _activations(tail: Tail, n: int, contexts: int, seed: int, dim: int = 24) -> np.ndarray:
        rng = np.random.default_rng(np.random.SeedSequence([seed, 7]))
        moves = EllipticalPrior(np.eye(dim), tail).sample(n * contexts, seed).reshape(n, contexts, dim)
        return moves + 20.0 * rng.standard_normal((n, 1, dim))

    @pytest.mark.parametrize(
        ("tail", "winner"), [(Gaussian(), "gaussian"), (Logistic(), "logistic"), (StudentT(4), "student_t")]
    )
    def test_names_the_planted_tail(self, tail, winner):
        right = 0
        for seed in range(4):
            activations = self._activations(tail, 160, 16, seed)
            random = np.random.default_rng(np.random.SeedSequence([seed, 8])).standard_normal((12, 24))
            fit = fit_tails(activations, None, {"random": random})
            right += fit.groups["random"].winner.name.startswith(winner)
            if winner == "student_t":
                assert 3.0 < fit.groups["random"].nu < 5.5
        assert right >= 3

    def test_few_contexts_do_not_hide_the_tail(self):
        # eight contexts: raw residuals have 3/4 of the excess kurtosis; the fitted nu must not drift up with it
        nus = [
            fit_tails(self._activations(StudentT(4), 300, 8, seed), None, {"axis": np.eye(24)}).groups["axis"].nu
            for seed in range(3)
        ]
        assert np.mean(nus) == pytest.approx(4.0, abs=0.5)

    def test_best_elliptical_is_heavy_and_scale_ratio_compares_with_the_prior(self):
        activations = self._activations(Logistic(), 200, 16, 0)
        half = EllipticalPrior(0.5 * np.eye(24))
        fit = fit_tails(activations, half, {"probe": np.ones(24), "axis": np.eye(24)})
        assert fit.best_elliptical.extra == 1
        assert fit.groups["axis"].scale_ratio == pytest.approx(2.0, rel=0.05)
        assert fit.winners["axis"] == "logistic"
        axis = fit.groups["axis"]
        assert axis.aic["student_t"] + 2 * axis.log_likelihood["student_t"] == pytest.approx(4)  # scale and nu
        assert axis.aic["logistic"] + 2 * axis.log_likelihood["logistic"] == pytest.approx(2)
        record = fit.to_json()
        assert record["groups"]["axis"]["winner"] == "logistic"
        assert record["best_elliptical"] == fit.best_elliptical.name

    def test_two_modes_are_seen(self):
        rng = np.random.default_rng(3)
        modes = np.where(rng.random((100, 32, 1)) < 0.5, -1.0, 1.0) * np.array([3.0, 0.0])
        activations = modes + rng.standard_normal((100, 32, 2))
        fit = fit_tails(activations, None, {"feature": np.array([1.0, 0.0]), "other": np.array([0.0, 1.0])})
        assert fit.groups["feature"].bimodality > 5 / 9 > fit.groups["other"].bimodality

    def test_skewness_is_that_of_the_draws_not_of_the_residuals(self):
        rng = np.random.default_rng(4)
        activations = rng.exponential(size=(2000, 6, 1))
        group = fit_tails(activations, None, {"axis": np.ones(1)}).groups["axis"]
        assert group.skewness == pytest.approx(2.0, abs=0.3)  # exponential: skewness 2, excess kurtosis 6
        assert group.excess_kurtosis == pytest.approx(6.0, abs=2.5)

    def test_refuses_what_says_nothing(self):
        with pytest.raises(ValueError, match="two contexts"):
            fit_tails(np.zeros((4, 2, 3)), None, {"axis": np.eye(3)})
        with pytest.raises(ValueError, match="width 2"):
            fit_tails(np.zeros((4, 5, 3)), None, {"axis": np.eye(2)})
        with pytest.raises(ValueError, match="do not vary"):
            fit_tails(np.ones((4, 5, 3)), None, {"axis": np.eye(3)})
