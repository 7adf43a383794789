"""Mahalanobis distance against scikit-learn, closed forms, and the promise that positives change nothing."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.covariance import OAS, oas
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from elk_stress.probes.mahalanobis import Mahalanobis
from elk_stress.probing.fit.density import shrunk
from elk_stress.probing.fit.moments import Moments
from elk_stress.probing.probe import as_fitted
from elk_stress.testing import planted_classes
from elk_stress.threats.priors import EllipticalPrior
from elk_stress.threats.tails import Gaussian


def _rows(n: int, dim: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    return rng.standard_normal((n, dim)) @ rng.standard_normal((dim, dim)) + 5 * rng.standard_normal(dim)


@pytest.mark.parametrize(("n", "dim"), [(300, 12), (20, 60)], ids=["many rows", "few rows"])
def test_it_is_scikit_learns_distance_with_oas(n: int, dim: int) -> None:
    rows, test = _rows(n, dim), _rows(50, dim, seed=1)
    fitted = Mahalanobis().fit(rows, np.zeros(n))
    scaler = StandardScaler().fit(rows)
    rival = OAS().fit(scaler.transform(rows))
    assert fitted.notes["shrinkage"] == pytest.approx(oas(scaler.transform(rows))[1])
    np.testing.assert_allclose(fitted.score(test) ** 2 - 1, rival.mahalanobis(scaler.transform(test)), rtol=1e-8)


def test_positives_change_nothing_bit_for_bit() -> None:
    data = planted_classes()
    moved = data.activations.copy()
    moved[data.labels == 1] = 1e6 * np.random.default_rng(np.random.SeedSequence(0)).standard_normal((160, 16))
    first, second = (as_fitted("mahalanobis", rows, data.labels) for rows in (data.activations, moved))
    for name, value in first.parameters.items():
        np.testing.assert_array_equal(value, second.parameters[name])


def test_merged_moments_fit_the_same_probe() -> None:
    rows = _rows(200, 8)
    whole = Mahalanobis().fit(rows, np.zeros(200))
    parts = Moments.of(rows[:30], "scatter").merged(Moments.of(rows[30:], "scatter"))
    for name, value in Mahalanobis().from_moments(parts).parameters.items():
        np.testing.assert_allclose(value, whole.parameters[name], rtol=1e-9, atol=1e-12)


def test_auroc_is_the_chi_squared_one() -> None:
    """Known covariance: negatives' squared distances are chi-squared, positives' noncentral, at a shift of 4."""
    from scipy.stats import chi2, ncx2

    rng = np.random.default_rng(np.random.SeedSequence(2))
    mix = rng.standard_normal((10, 10))
    shift = 4.0 * np.eye(10)[3]
    train = rng.standard_normal((20000, 10)) @ mix
    test = np.concatenate([rng.standard_normal((20000, 10)), rng.standard_normal((20000, 10)) + shift]) @ mix
    labels = np.repeat([0, 1], 20000)
    grid = np.linspace(0, 200, 200001)
    expected = np.sum(chi2.cdf(grid, 10) * ncx2.pdf(grid, 10, 16.0)) * (grid[1] - grid[0])
    fitted = Mahalanobis().fit(train, np.zeros(len(train)))
    # standard error of the AUROC about 0.001
    assert roc_auc_score(labels, fitted.score(test)) == pytest.approx(expected, abs=0.005)


def test_slope_is_finite_everywhere_and_bounded_as_promised() -> None:
    import torch

    rows = _rows(300, 6)
    fitted = Mahalanobis().fit(rows, np.zeros(300))
    prior = EllipticalPrior(np.linalg.cholesky(np.cov(_rows(99, 6, 3).T)), Gaussian(), "natural", {})
    bound = fitted.lipschitz(prior.factor)
    assert bound is not None
    for distance in (0.0, 1.0, 100.0):
        rng = np.random.default_rng(np.random.SeedSequence(4))
        u = torch.tensor(distance * rng.standard_normal((64, 6)), requires_grad=True)
        origin = torch.tensor(fitted.parameters["centre"])
        score = fitted.score(origin + u @ torch.tensor(prior.factor).T)
        (slope,) = torch.autograd.grad(score.sum(), u)
        assert torch.isfinite(slope).all()
        assert float(slope.norm(dim=1).max()) <= bound * (1 + 1e-9)
    # the bound is attained, far out along the steepest direction
    _, _, axes = np.linalg.svd(fitted.parameters["whitener"].T @ prior.factor)
    far = fitted.parameters["centre"] + np.array([1e5, 1e5 + 1.0])[:, None] * (prior.factor @ axes[0])
    assert np.diff(fitted.score(far))[0] == pytest.approx(bound, rel=1e-4)


def test_float32_far_from_the_origin_does_not_cancel() -> None:
    rows = _rows(400, 20) * 1e-2 + 30.0
    fitted = Mahalanobis().fit(rows, np.zeros(400))
    single = rows.astype(np.float32)
    np.testing.assert_allclose(fitted.score(single), fitted.score(single.astype(float)), rtol=1e-3)


def test_fixed_shrinkage_and_refusals() -> None:
    rows = _rows(50, 5)
    spread, correlation, share = shrunk(rows.mean(axis=0), np.cov(rows.T, bias=True), 50, 1.0)
    assert share == 1.0
    np.testing.assert_allclose(spread, rows.std(axis=0))
    np.testing.assert_allclose(correlation, np.eye(5))
    with pytest.raises(ValueError, match="share of the identity"):
        Mahalanobis(shrinkage=0.0)
    with pytest.raises(ValueError, match="needs at least 2"):
        Mahalanobis().fit(rows, np.ones(50))
    with pytest.raises(ValueError, match="do not differ"):
        Mahalanobis().fit(np.ones((4, 3)), np.zeros(4))
    with pytest.raises(ValueError, match="of order 'scatter'"):
        Mahalanobis().from_moments(Moments.of(rows, "spread"))
