"""Nearest neighbours against scikit-learn's, what a Gaussian detector cannot see, and the promises."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.covariance import OAS
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler

from elk_stress.probes.nearest_neighbours import NearestNeighbours
from elk_stress.probing.probe import as_fitted
from elk_stress.testing import planted_classes


def _rows(n: int, dim: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(np.random.SeedSequence([seed, 1]))
    mix = np.random.default_rng(np.random.SeedSequence(9)).standard_normal((dim, dim))
    return rng.standard_normal((n, dim)) @ mix + 4.0


def _whitener(rows: np.ndarray) -> np.ndarray:
    """Of scikit-learn's OAS on standardized rows, in the rows' own units."""
    scaler = StandardScaler().fit(rows)
    white = np.linalg.cholesky(np.linalg.inv(OAS().fit(scaler.transform(rows)).covariance_))
    return np.asarray(white / scaler.scale_[:, None])


@pytest.mark.parametrize("k", [1, 5])
def test_it_is_scikit_learns_neighbours_in_whitened_space(k: int) -> None:
    rows, test = _rows(200, 7), _rows(40, 7, seed=1)
    white = _whitener(rows)
    distances, _ = NearestNeighbors(n_neighbors=k).fit(rows @ white).kneighbors(test @ white)
    fitted = NearestNeighbours(k=k).fit(rows, np.zeros(200))
    np.testing.assert_allclose(fitted.score(test), np.sqrt(1 + distances**2).mean(axis=1), rtol=1e-8)


def test_with_fewer_axes_the_rest_is_measured_as_a_whole() -> None:
    """Written out: prototypes on the leading axes, and everything else in units of its mean variance."""
    rows, test = _rows(300, 9), _rows(30, 9, seed=1)
    fitted = NearestNeighbours(k=3, rank=4).fit(rows, np.zeros(300))
    scaler = StandardScaler().fit(rows)
    sizes, axes = np.linalg.eigh(OAS().fit(scaler.transform(rows)).covariance_)
    sizes, axes = sizes[::-1], axes[:, ::-1]
    y, p = (scaler.transform(z) @ axes for z in (test, rows))
    squares = ((y[:, None, :4] - p[None, :, :4]) ** 2 / sizes[:4]).sum(-1)
    squares += (y[:, None, 4:] ** 2).sum(-1) / sizes[4:].mean()
    expected = np.sqrt(1 + np.sort(squares, axis=1)[:, :3]).mean(axis=1)
    np.testing.assert_allclose(fitted.score(test), expected, rtol=1e-8)
    # a move out of the leading axes does not go unseen
    assert (fitted.score(test + 50 * axes[:, 7] * scaler.scale_) > fitted.score(test) + 10).all()


def test_repeated_prototypes_count_as_often_as_they_stand_there() -> None:
    rows = np.concatenate([np.repeat(_rows(1, 3), 4, axis=0), _rows(20, 3, seed=2)])
    fitted = NearestNeighbours(k=5).fit(rows, np.zeros(24))
    white = _whitener(rows)
    distances, _ = NearestNeighbors(n_neighbors=5).fit(rows @ white).kneighbors(rows[:1] @ white)
    assert distances[0, 3] == pytest.approx(0.0, abs=1e-6)
    assert distances[0, 4] > 0.1
    assert fitted.score(rows[0]) == pytest.approx(np.sqrt(1 + distances[0] ** 2).mean())


def test_positives_change_nothing_bit_for_bit() -> None:
    data = planted_classes()
    moved = data.activations.copy()
    moved[data.labels == 1] = 1e6 * np.random.default_rng(np.random.SeedSequence(0)).standard_normal((160, 16))
    first, second = (
        as_fitted(NearestNeighbours(prototypes=50), rows, data.labels, seed=3) for rows in (data.activations, moved)
    )
    for name, value in first.parameters.items():
        np.testing.assert_array_equal(value, second.parameters[name])


def test_it_sees_an_anomaly_in_the_middle_of_a_ring() -> None:
    """Where the distance from the mean says "most normal of all"."""
    rng = np.random.default_rng(np.random.SeedSequence(0))

    def ring(n: int) -> np.ndarray:
        angle = rng.uniform(0, 2 * np.pi, n)
        plane = 5 * np.stack([np.cos(angle), np.sin(angle)], axis=1) + 0.3 * rng.standard_normal((n, 2))
        return np.concatenate([plane, rng.standard_normal((n, 2))], axis=1)

    middle = np.concatenate([0.3 * rng.standard_normal((200, 2)), rng.standard_normal((200, 2))], axis=1)
    rows, labels = np.concatenate([ring(200), middle]), np.repeat([0, 1], 200)
    train = ring(600)
    aurocs = {
        name: roc_auc_score(labels, as_fitted(name, *_with_a_positive(train)).score(rows))
        for name in ("nearest_neighbours", "mahalanobis")
    }
    assert aurocs["nearest_neighbours"] > 0.95
    assert aurocs["mahalanobis"] < 0.2


def _with_a_positive(negatives: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([negatives, negatives[:1] + 1]), np.append(np.zeros(len(negatives), dtype=int), 1)


def test_slope_is_finite_on_a_prototype_and_bounded_as_promised() -> None:
    import jax
    import jax.numpy as jnp

    rows = _rows(120, 6)
    for rank in (3, 64):
        fitted = NearestNeighbours(rank=rank).fit(rows, np.zeros(120))
        factor = np.random.default_rng(np.random.SeedSequence(4)).standard_normal((6, 6))
        bound = fitted.lipschitz(factor)
        assert bound is not None

        def along(u: jax.Array, start: np.ndarray, fitted=fitted, factor=factor) -> jax.Array:  # type: ignore[no-untyped-def]
            return fitted.score(jnp.asarray(start, dtype=u.dtype) + u @ jnp.asarray(factor.T, dtype=u.dtype))

        for start in (rows[5], rows[5] + 100.0, rows.mean(axis=0)):
            slope = jax.jit(jax.grad(along))(jnp.zeros(6, dtype=jnp.float32), start)
            assert np.isfinite(slope).all()
            assert float(jnp.linalg.norm(slope)) <= bound * 1.0001


def test_neighbours_hardly_change_the_ranking() -> None:
    """The reason why k is fixed: the AUROCs of k = 1, 5 and 20 lie less than 0.02 apart."""
    train, test = planted_classes(seed=2), planted_classes(500, seed=3)
    values = [
        roc_auc_score(
            test.labels, as_fitted(NearestNeighbours(k=k), train.activations, train.labels).score(test.activations)
        )
        for k in (1, 5, 20)
    ]
    assert max(values) - min(values) < 0.02


def test_refusals() -> None:
    with pytest.raises(ValueError, match="k <= prototypes"):
        NearestNeighbours(k=6, prototypes=5)
    with pytest.raises(ValueError, match="needs at least 2"):
        NearestNeighbours().fit(_rows(3, 2), np.ones(3))
