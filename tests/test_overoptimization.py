"""Over-optimization forms: named where they are right and the models say so, and only there."""

from __future__ import annotations

import numpy as np
import pytest

from elk_stress.training.overoptimization import FORMS, FREE, fit_overoptimization

TRUTHS = {
    "best_of_n": lambda d: d * (0.05 - 0.0022 * d),
    "reinforcement": lambda d: d * (0.05 - 0.016 * np.log(np.maximum(d, 1e-9))),
    "flat": lambda d: 0 * d,
    "line": lambda d: 0.03 * d,
    "sigmoid": lambda d: 0.5 / (1 + np.exp(8 - d)),
}


def made(truth, models, seed, noise=0.01, spread=0.1, points=25, most=20.0):
    """``(points, models)`` d and drop; each model follows the truth at its own size."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, models]))
    d = np.linspace(0, most, points)[:, None] * rng.uniform(0.8, 1.2, models)
    return d, TRUTHS[truth](d) * (1 + spread * rng.standard_normal(models)) + noise * rng.standard_normal(d.shape)


def names(truth, models, n=20, **more):
    return [fit_overoptimization("proxy", *made(truth, models, seed, **more)).better for seed in range(n)]


@pytest.mark.parametrize("form", FORMS)
def test_names_the_form_that_made_the_data(form):
    assert names(form, 8).count(form) >= 19
    assert names(form, 16).count(form) == 20


@pytest.mark.parametrize("form", FORMS)
def test_finds_its_coefficients(form):
    d, drop = made(form, 400, 0, spread=0.0)
    found = fit_overoptimization("proxy", d, drop)
    assert found.alpha[form] == pytest.approx(0.05, rel=0.02)
    assert found.beta[form] == pytest.approx({"best_of_n": 0.0022, "reinforcement": 0.016}[form], rel=0.02)


def test_exact_without_noise():
    d = np.linspace(0, 10, 11)[:, None] * np.ones(7)
    found = fit_overoptimization("gold", d, d * (3.0 - 0.25 * d))
    assert (found.alpha["best_of_n"], found.beta["best_of_n"]) == (pytest.approx(3.0), pytest.approx(0.25))
    assert found.r2["best_of_n"] == pytest.approx(1.0)


@pytest.mark.parametrize("models", [2, 5, 8, 16])
def test_flat_noise_is_neither(models):
    assert set(names("flat", models)) == {"neither"}


@pytest.mark.parametrize("models", [8, 16])
def test_a_shape_that_is_neither(models):
    """A sigmoid is fitted at R^2 0.8, better by one wrong form than by the other in every model: that names nothing."""
    found = [fit_overoptimization("proxy", *made("sigmoid", models, seed)) for seed in range(20)]
    assert min(max(f.r2[form] for form in FORMS) for f in found) > 0.5
    assert [f.better for f in found].count("neither") >= 19


def test_a_line_is_either():
    """Both forms contain it (beta = 0)."""
    assert names("line", 8).count("either") >= 18


@pytest.mark.parametrize("models", [2, 3, 5])
@pytest.mark.parametrize("form", FORMS)
def test_few_models_name_nothing(form, models):
    assert set(names(form, models)) <= {"either", "neither"}
    assert names(form, 5).count("either") >= 17


def test_cross_validation_is_honest():
    """Six features' worth of freedom explain nothing of noise on a model that was left out."""
    r2 = [fit_overoptimization("proxy", *made("flat", 6, seed)).r2 for seed in range(40)]
    for form in (*FORMS, FREE):
        values = np.array([r[form] for r in r2])
        assert values.max() < 0.15
        assert values.mean() < 0.02


def test_models_that_differ_entirely_are_not_predicted():
    """Each model on a curve of its own, as often up as down: a pooled fit would look at its own answers."""
    d, _ = made("line", 8, 0)
    sign = np.array([1, -1] * 4)
    found = fit_overoptimization("proxy", d, 0.03 * d * sign)
    assert found.better == "neither"
    assert max(found.r2.values()) < 0.1


def test_unmeasured_models_do_not_vote():
    d, drop = made("best_of_n", 8, 0)
    drop[:, 6:] = np.nan
    found = fit_overoptimization("gold", d, drop)
    assert found.n_models == 6
    assert found.wins <= 6
    assert found.alpha == pytest.approx(fit_overoptimization("gold", d[:, :6], drop[:, :6]).alpha)
    nothing = fit_overoptimization("gold", d, np.full_like(d, np.nan))
    assert (nothing.better, nothing.n_models) == ("neither", 0)
    alone = fit_overoptimization("gold", d[:, :1], drop[:, :1])
    assert (alone.better, alone.n_models) == ("neither", 0)


def test_points_at_the_origin_count_for_nothing():
    d, drop = made("best_of_n", 8, 1)
    padded = fit_overoptimization("gold", np.vstack([0 * d, d]), np.vstack([0 * d + 5.0, drop]))
    assert padded.alpha == pytest.approx(fit_overoptimization("gold", d, drop).alpha)
