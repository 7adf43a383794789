"""The flow is a density (it integrates to one), bends where bending pays, and only there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.covariance import OAS
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from elk_stress.probes.flow import Flow
from elk_stress.probing.fit.density import on_axes
from elk_stress.probing.probe import FittedProbe, as_fitted
from elk_stress.testing import planted_classes


def _ring(n: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(np.random.SeedSequence([seed, 5]))
    angle = rng.uniform(0, 2 * np.pi, n)
    return 5 * np.stack([np.cos(angle), np.sin(angle)], axis=1) + 0.5 * rng.standard_normal((n, 2))


@pytest.fixture(scope="module")
def ring() -> FittedProbe:
    return Flow().fit(_ring(800, 0), np.zeros(800))


def test_it_is_a_density(ring: FittedProbe) -> None:
    """``exp(-score)`` in whitened coordinates integrates to ``(2 pi)^(r/2)``: log determinants are right."""
    side = np.linspace(-12, 12, 601)
    grid = np.stack(np.meshgrid(side, side), axis=-1)
    jacobian = np.prod(ring.parameters["scales"][:-1]) * np.prod(ring.parameters["spread"])
    total = np.exp(-ring.score(grid)).sum() * (side[1] - side[0]) ** 2 / jacobian
    assert total == pytest.approx(2 * np.pi, rel=0.01)
    assert ring.notes["steps"] > 0


def test_it_bends_around_a_ring_that_a_gaussian_fills(ring: FittedProbe) -> None:
    rng = np.random.default_rng(np.random.SeedSequence(1))
    rows = np.concatenate([_ring(300, 2), 0.5 * rng.standard_normal((300, 2))])
    labels = np.repeat([0, 1], 300)
    assert roc_auc_score(labels, ring.score(rows)) > 0.95
    assert ring.notes["held_out_nats"] > 0.3
    # the held-out gain is honest: on new rows it is about the same
    white, _ = on_axes(np, ring.parameters, rows[:300])
    gain = np.mean(0.5 * (white**2).sum(axis=1) - ring.score(rows[:300]))
    assert gain == pytest.approx(ring.notes["held_out_nats"], abs=0.2)


def test_on_gaussian_rows_it_is_the_gaussian() -> None:
    rng = np.random.default_rng(np.random.SeedSequence(3))
    # alike in all directions: else bending would also pay for what shrinking the covariance costs
    mix = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    rows, test = rng.standard_normal((400, 6)) @ mix, rng.standard_normal((50, 6)) @ mix
    fitted = Flow().fit(rows, np.zeros(400))
    assert fitted.notes["held_out_nats"] < 0.05
    own = rows[np.arange(400) * 20 // 400 % 5 != 4]
    scaler = StandardScaler().fit(own)
    gaussian = OAS().fit(scaler.transform(own)).mahalanobis(scaler.transform(test))
    if fitted.notes["steps"] == 0:
        np.testing.assert_allclose(2 * fitted.score(test), gaussian, rtol=1e-6)
    assert np.corrcoef(fitted.score(test), gaussian)[0, 1] > 0.95


def test_moves_out_of_the_leading_axes_are_seen() -> None:
    rng = np.random.default_rng(np.random.SeedSequence(4))
    scales = np.concatenate([np.full(3, 5.0), np.ones(17)])
    turn = np.linalg.qr(rng.standard_normal((20, 20)))[0]
    rows, test = ((rng.standard_normal((n, 20)) * scales) @ turn for n in (600, 300))
    fitted = Flow(rank=3).fit(rows, np.zeros(600))
    assert fitted.notes["rank"] == 3
    moved = test + 6 * turn[15]
    assert roc_auc_score(np.repeat([0, 1], 300), fitted.score(np.concatenate([test, moved]))) > 0.85
    # new negatives are as far from the axes as the scale of the rest says
    assert on_axes(np, fitted.parameters, test)[1].mean() == pytest.approx(17, rel=0.1)


def test_positives_change_nothing_bit_for_bit() -> None:
    data = planted_classes()
    moved = data.activations.copy()
    moved[data.labels == 1] = 1e6 * np.random.default_rng(np.random.SeedSequence(0)).standard_normal((160, 16))
    recipe = Flow(steps=100)
    first, second = (as_fitted(recipe, rows, data.labels, seed=1) for rows in (data.activations, moved))
    for name, value in first.parameters.items():
        np.testing.assert_array_equal(value, second.parameters[name])


def test_slope_is_finite_at_the_centre_and_far_out(ring: FittedProbe) -> None:
    for far in (0.0, 10.0, 1e4):
        at = torch.tensor(ring.parameters["centre"] + far, dtype=torch.float32, requires_grad=True)
        (slope,) = torch.autograd.grad(ring.score(at), at)
        assert torch.isfinite(slope).all()


def test_few_rows_and_one_dimension() -> None:
    rng = np.random.default_rng(np.random.SeedSequence(6))
    for n, dim in ((4, 30), (60, 1)):
        rows = rng.standard_normal((n, dim))
        assert np.isfinite(Flow(steps=20).fit(rows, np.zeros(n)).score(rows)).all()


def test_refusals() -> None:
    with pytest.raises(ValueError, match="flow needs layers"):
        Flow(layers=0)
    with pytest.raises(ValueError, match="needs at least 2"):
        Flow().fit(_ring(5, 0), np.ones(5))
