"""Elliptical tails against scipy's densities; what a robust scatter changes, and what tails alone cannot."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from elk_stress.probes.logistic_tails import LogisticTails, _log_density, _log_student, _robust, _weights
from elk_stress.probing.probe import as_fitted
from elk_stress.testing import planted_classes
from elk_stress.threats.tails import Logistic, StudentT


def _student(nu: float, n: int, dim: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(np.random.SeedSequence([seed, 3]))
    mix = np.random.default_rng(np.random.SeedSequence(8)).standard_normal((dim, dim))
    scale = np.sqrt((nu - 2) / rng.chisquare(nu, n))
    return scale[:, None] * rng.standard_normal((n, dim)) @ mix + 2.0


def test_mixture_is_the_logistic_density_in_one_dimension() -> None:
    x = np.linspace(-15, 15, 61)
    np.testing.assert_allclose(
        _log_density(Logistic(), x**2, 1) - 0.5 * np.log(2 * np.pi), Logistic().log_density(x), atol=1e-4
    )


@pytest.mark.parametrize("dim", [2, 30, 576])
@pytest.mark.parametrize("nu", [3.0, 8.0, 50.0])
def test_mixture_is_the_student_density(nu: float, dim: int) -> None:
    squared = dim * np.array([0.1, 0.5, 1.0, 2.0, 20.0, 200.0])
    expected = stats.multivariate_t(shape=(nu - 2) / nu * np.eye(dim), df=nu).logpdf(
        np.sqrt(squared)[:, None] * np.eye(dim)[:1]
    )
    np.testing.assert_allclose(_log_student(nu, squared, dim) - dim / 2 * np.log(2 * np.pi), expected)
    np.testing.assert_allclose(_log_density(StudentT(nu), squared, dim), _log_student(nu, squared, dim), atol=1e-3)


def test_weights_are_the_slope_of_the_density() -> None:
    """``E[1/s^2 | q] = -2 d log p / dq``, for both tails."""
    squared = np.array([1.0, 8.0, 20.0, 90.0])
    for tail in (Logistic(), StudentT(4.0)):
        up, down = (_log_density(tail, squared + h, 6) for h in (1e-4, -1e-4))
        np.testing.assert_allclose(_weights(tail, squared, 6), -2 * (up - down) / 2e-4, rtol=1e-3)


@pytest.mark.parametrize("nu", [3.0, 6.0])
def test_degrees_of_freedom_are_recovered(nu: float) -> None:
    fitted = LogisticTails().fit(_student(nu, 4000, 8, seed=1), np.zeros(4000))
    assert fitted.notes["nu"] == pytest.approx(nu, rel=0.15)
    assert fitted.notes["held_out_nats"] > 0.1


def test_logistic_rows_are_called_logistic_and_gaussian_ones_gain_nothing() -> None:
    from array_api_compat import numpy as xp

    rng = np.random.default_rng(np.random.SeedSequence(2))
    rows = rng.standard_normal((4000, 8))
    scale = Logistic().scale(rng.standard_normal(4000), xp)
    assert LogisticTails().fit(scale[:, None] * rows, np.zeros(4000)).notes["tail"] == "logistic"
    gaussian = LogisticTails().fit(rows, np.zeros(4000)).notes
    assert gaussian["nu"] > 50
    assert abs(gaussian["held_out_nats"]) < 0.01


def test_score_is_the_density_that_was_fitted() -> None:
    rows, test = _student(4.0, 1000, 5, seed=3), _student(4.0, 50, 5, seed=4)
    fitted = LogisticTails(tail="student_t").fit(rows, np.zeros(1000))
    nu, white = fitted.notes["nu"], fitted.parameters["whitener"]
    shape = np.linalg.inv(white @ white.T) * (nu - 2) / nu
    density = stats.multivariate_t(loc=fitted.parameters["centre"], shape=shape, df=nu).logpdf(test)
    gap = fitted.score(test) + density
    np.testing.assert_allclose(gap, gap[0], atol=1e-3)


def test_scatter_is_the_fixed_point_of_maximum_likelihood() -> None:
    """No small change of the scatter makes the training rows likelier (without shrinkage: many rows, round ones)."""
    rows = _student(4.0, 5000, 3, seed=5)
    mean, white, share = _robust(rows, StudentT(4.0), 60)
    assert share < 0.02
    rng = np.random.default_rng(np.random.SeedSequence(0))

    def likelihood(centre: np.ndarray, covariance: np.ndarray) -> float:
        return float(stats.multivariate_t(loc=centre, shape=covariance / 2, df=4.0).logpdf(rows).mean())

    covariance = np.linalg.inv(white @ white.T)
    best = likelihood(mean, covariance)
    for _ in range(10):
        step = 0.1 * rng.standard_normal((3, 3))
        factor = np.eye(3) + step + step.T
        assert likelihood(mean, factor @ covariance @ factor.T) < best
        assert likelihood(mean + 0.1 * rng.standard_normal(3), covariance) < best


def test_it_beats_the_mean_scatter_where_a_few_rows_are_far_out() -> None:
    """Contaminated negatives: 2% of rows hundred times as large along one axis hide what else moves along it."""
    rng = np.random.default_rng(np.random.SeedSequence(6))
    rows = rng.standard_normal((1000, 10))
    rows[::50, 0] *= 100.0
    test = rng.standard_normal((1000, 10))
    test[500:, 0] += 8.0
    labels = np.repeat([0, 1], 500)
    training = np.concatenate([rows, rows[:1]]), np.append(np.zeros(1000, dtype=int), 1)
    robust, plain = (
        roc_auc_score(labels, as_fitted(name, *training).score(test)) for name in ("logistic_tails", "mahalanobis")
    )
    assert robust > plain + 0.2


def test_with_the_same_scatter_it_ranks_as_mahalanobis() -> None:
    """The score is an increasing function of the distance: tails alone change no ranking."""
    data, test = planted_classes(seed=2), planted_classes(seed=3)
    fitted = as_fitted("logistic_tails", data.activations, data.labels)
    white = (test.activations - fitted.parameters["centre"]) @ fitted.parameters["whitener"]
    np.testing.assert_array_equal(np.argsort((white**2).sum(axis=1)), np.argsort(fitted.score(test.activations)))
    gaussian = as_fitted("mahalanobis", data.activations, data.labels)
    values = [roc_auc_score(test.labels, probe.score(test.activations)) for probe in (fitted, gaussian)]
    assert values[0] == pytest.approx(values[1], abs=0.01)


def test_positives_change_nothing_bit_for_bit() -> None:
    data = planted_classes()
    moved = data.activations.copy()
    moved[data.labels == 1] = 1e6 * np.random.default_rng(np.random.SeedSequence(0)).standard_normal((160, 16))
    first, second = (as_fitted("logistic_tails", rows, data.labels) for rows in (data.activations, moved))
    for name, value in first.parameters.items():
        np.testing.assert_array_equal(value, second.parameters[name])


def test_float32_and_slope_hold_far_out_and_at_the_mean() -> None:
    import torch

    rows = _student(5.0, 400, 20, seed=7)
    fitted = LogisticTails().fit(rows, np.zeros(400))
    direction = np.ones(20) / np.sqrt(20)
    for far in (0.0, 10.0, 1e4):
        point = (fitted.parameters["centre"] + far * direction).astype(np.float32)
        at = torch.tensor(point, requires_grad=True)
        score = fitted.score(at)
        (slope,) = torch.autograd.grad(score, at)
        assert torch.isfinite(slope).all()
        exact = fitted.score(point.astype(float))
        assert float(score.detach()) == pytest.approx(float(exact), rel=1e-3, abs=1e-2)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="'fitted', 'logistic' or 'student_t'"):
        LogisticTails(tail="cauchy")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs at least 2"):
        LogisticTails().fit(_student(5.0, 5, 2, seed=0), np.ones(5))
    # fewer rows than dimensions, and very few rows
    for n in (2, 3, 30):
        assert np.isfinite(LogisticTails().fit(_student(5.0, n, 40, seed=0), np.zeros(n)).score(np.zeros(40)))
