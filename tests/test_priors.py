"""Priors: covariance and tails of moves, the shortest inverse, one value in every array library, natural thoughts."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import optimize, stats

from elk_stress.threats.priors import (
    ChoicePrior,
    EllipticalPrior,
    Gaussian,
    Logistic,
    StudentT,
    isotropic,
    natural,
    origins,
)

TAILS = {"gaussian": Gaussian(), "logistic": Logistic(), "t5": StudentT(5)}


def _factor(d: int = 6, r: int = 4, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((d, r))


def _two_way(
    rng: np.random.Generator, n: int, contexts: int, between: np.ndarray, interaction: np.ndarray
) -> np.ndarray:
    d = len(between)
    means = 10.0 * rng.standard_normal((n, 1, d))
    shared = rng.standard_normal((1, contexts, d)) @ between.T
    return means + shared + rng.standard_normal((n, contexts, d)) @ interaction.T


@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS)
class TestElliptical:
    def test_every_projection_has_the_tail(self, tail):
        # Kolmogorov-Smirnov at level 1e-4 on three directions, one of them random
        prior = EllipticalPrior(_factor(), tail)
        moves = prior.sample(20_000, 1)
        for weight in (np.eye(6)[0], np.ones(6), np.random.default_rng(2).standard_normal(6)):
            standard = moves @ weight / prior.standard_deviation(weight)
            p_value = stats.kstest(standard, lambda x: 1.0 - 2.0 ** -tail.bits(x)).pvalue
            assert p_value > 1e-4
            if tail.extra:  # the test has the power to tell it from a Gaussian
                assert stats.kstest(standard, "norm").pvalue < 1e-4

    def test_covariance_is_the_factors(self, tail):
        prior = EllipticalPrior(_factor(), tail)
        sample = prior.sample(400_000, 3)
        scale = np.sqrt(np.outer(np.diag(prior.covariance), np.diag(prior.covariance)))
        np.testing.assert_allclose(sample.T @ sample / len(sample) / scale, prior.covariance / scale, atol=0.04)

    def test_closed_form_bits_match_counting(self, tail):
        # 400,000 draws at about 5 bits: 1.3% relative error; five of those
        prior = EllipticalPrior(_factor(), tail)
        weight = np.arange(6.0) - 2
        margin = float(tail.quantile_of_bits(5.0) * prior.standard_deviation(weight))
        failed = np.mean(margin + prior.sample(400_000, 4) @ weight <= 0)
        assert failed * 2**5 == pytest.approx(1.0, abs=5 * math.sqrt(2**5 / 400_000))

    def test_same_moves_in_every_library(self, tail):
        import array_api_strict
        import jax
        import jax.numpy as jnp
        import torch

        prior = EllipticalPrior(_factor(), tail)
        u = np.random.default_rng(5).standard_normal((3, 2, prior.dim)) * 3
        u.setflags(write=False)
        expected = prior.move(u)
        assert expected.shape == (3, 2, 6)
        np.testing.assert_allclose(prior.move(u[0, 0]), expected[0, 0], rtol=1e-12)
        np.testing.assert_allclose(prior.move(torch.tensor(u)).numpy(), expected, rtol=1e-12)
        np.testing.assert_allclose(np.asarray(prior.move(array_api_strict.asarray(u))), expected, rtol=1e-12)
        with jax.enable_x64(True):
            moved = jax.jit(prior.move)(jnp.asarray(u))
            np.testing.assert_allclose(np.asarray(moved), expected, rtol=1e-12)
            mapped = jax.vmap(prior.move)(jnp.asarray(u))
            np.testing.assert_allclose(np.asarray(mapped), expected, rtol=1e-12)
        single = prior.move(torch.tensor(u, dtype=torch.float32))
        assert single.dtype == torch.float32
        np.testing.assert_allclose(single.numpy(), expected, rtol=1e-3, atol=1e-4)

    def test_move_has_gradients(self, tail):
        import torch

        prior = EllipticalPrior(_factor(), tail)
        u = torch.tensor(np.random.default_rng(6).standard_normal((2, prior.dim)), requires_grad=True)
        assert torch.autograd.gradcheck(prior.move, (u,), eps=1e-6, atol=1e-6)

    def test_inverse_is_the_shortest(self, tail):
        prior = EllipticalPrior(_factor(), tail)
        moves = (
            np.random.default_rng(7).standard_normal((5, 4)) @ prior.factor.T * np.array([[0.1], [1], [3], [10], [100]])
        )
        u = prior.inverse(moves)
        np.testing.assert_allclose(prior.move(u), moves, rtol=1e-9, atol=1e-12)
        for found, move in zip(u, moves, strict=True):
            if not tail.extra:
                best = float(np.sum(found**2))
                other = np.linalg.lstsq(prior.factor, move, rcond=None)[0]
                assert best == pytest.approx(float(np.sum(other**2)), rel=1e-9)
                continue
            inside = float(np.sum((np.linalg.pinv(prior.factor) @ move) ** 2))

            def squared(z, inside=inside):
                return inside / float(tail.scale(np.array(z), np)) ** 2 + z**2

            best = min(
                optimize.minimize_scalar(squared, bounds=(a, a + 3), method="bounded", options={"xatol": 1e-8}).fun
                for a in np.arange(-3.0, 30.0, 3.0)
            )
            assert float(np.sum(found**2)) == pytest.approx(best, rel=1e-6)

    def test_inverse_of_no_move_is_the_origin(self, tail):
        prior = EllipticalPrior(_factor(), tail)
        np.testing.assert_array_equal(prior.inverse(np.zeros((2, 6))), np.zeros((2, prior.dim)))

    def test_same_seed_same_moves(self, tail):
        prior = EllipticalPrior(_factor(), tail)
        np.testing.assert_array_equal(prior.sample(5, 11), prior.sample(5, 11))
        assert not np.array_equal(prior.sample(5, 11), prior.sample(5, 12))


def test_inverse_leaves_out_what_the_prior_cannot_do():
    prior = EllipticalPrior(np.eye(4)[:, :2])
    np.testing.assert_allclose(prior.inverse(np.array([1.0, 2.0, 3.0, 4.0])), [1.0, 2.0], rtol=1e-12)


def test_restriction_confines_moves_and_projects_the_covariance():
    prior = EllipticalPrior(_factor(8, 8), Logistic())
    basis = np.random.default_rng(8).standard_normal((8, 3)) @ np.diag([1.0, 5.0, 0.1])
    q, _ = np.linalg.qr(basis)
    projector = q @ q.T
    restricted = prior.restrict(basis)
    assert restricted.dim == 3 + 1
    np.testing.assert_allclose(restricted.covariance, projector @ prior.covariance @ projector, atol=1e-12)
    moves = restricted.sample(10, 0)
    np.testing.assert_allclose(moves @ projector, moves, atol=1e-9)
    # a repeated column adds nothing; a subspace outside the span leaves nothing
    assert prior.restrict(np.column_stack([basis, basis[:, 0]])).dim == 3 + 1
    with pytest.raises(ValueError, match="no moves"):
        EllipticalPrior(np.eye(4)[:, :2]).restrict(np.eye(4)[:, 2:])
    with pytest.raises(ValueError, match="transpose"):
        prior.restrict(basis.T)


def test_scaling_and_tails():
    prior = EllipticalPrior(_factor())
    np.testing.assert_allclose(prior.scaled(3.0).covariance, 9 * prior.covariance)
    assert prior.scaled(2.0).scaled(2.0).notes["scaled"] == 4.0
    assert prior.lipschitz == pytest.approx(np.linalg.svd(prior.factor, compute_uv=False)[0])
    heavy = prior.with_tail(StudentT(5))
    assert heavy.lipschitz is None
    assert heavy.dim == prior.dim + 1
    np.testing.assert_array_equal(heavy.covariance, prior.covariance)
    with pytest.raises(ValueError, match="positive"):
        prior.scaled(0.0)
    with pytest.raises(ValueError, match="coordinates"):
        heavy.move(np.zeros((2, prior.dim)))
    with pytest.raises(ValueError, match="finite matrix"):
        EllipticalPrior(np.full((3, 2), np.nan))


class TestChoice:
    def test_every_option_is_equally_likely(self):
        prior = ChoicePrior(7)
        u = stats.norm.ppf((np.arange(7000) + 0.5) / 7000)[:, None]
        np.testing.assert_array_equal(np.bincount(prior.index(u), minlength=7), 1000)

    def test_tails_stay_in_range(self):
        assert ChoicePrior(5).index(np.array([[-40.0], [40.0]])).tolist() == [0, 4]

    def test_bits_are_exact(self):
        np.testing.assert_array_equal(ChoicePrior(64).bits(np.array([64, 1, 16, 0])), [0.0, 6.0, 2.0, math.inf])
        with pytest.raises(ValueError, match="between 0 and 64"):
            ChoicePrior(64).bits(65)


class TestNatural:
    def test_unshrunk_parts_are_the_two_way_analysis_of_variance(self):
        # by hand, with sums over items and contexts
        x = np.random.default_rng(9).standard_normal((5, 4, 3))
        n, contexts, _ = x.shape
        r = x - x.mean(1, keepdims=True)
        means = r.mean(0)
        between = sum(np.outer(m, m) for m in means) / (contexts - 1)
        e = r - means
        within = sum(np.outer(e[i, c], e[i, c]) for i in range(n) for c in range(contexts)) / ((n - 1) * (contexts - 1))
        item, universal = natural(x, shrink=0.0), natural(x, scope="universal", shrink=0.0)
        np.testing.assert_allclose(item.covariance, between + (1 - 1 / n) * within, rtol=1e-10)
        np.testing.assert_allclose(universal.covariance, between, rtol=1e-10)
        np.testing.assert_allclose(origins(x), x.mean(1))

    def test_origin_and_item_means_do_not_matter(self):
        rng = np.random.default_rng(10)
        x = rng.standard_normal((6, 5, 4))
        moved = x + 100.0 * rng.standard_normal((6, 1, 4))
        np.testing.assert_allclose(natural(moved).covariance, natural(x).covariance, rtol=1e-8)

    def test_turns_with_the_activations(self):
        rng = np.random.default_rng(11)
        x = rng.standard_normal((6, 5, 4)) * np.array([1.0, 2.0, 0.1, 3.0])
        q, _ = np.linalg.qr(rng.standard_normal((4, 4)))
        np.testing.assert_allclose(natural(x @ q).covariance, q.T @ natural(x).covariance @ q, atol=1e-10)

    def test_shrinkage_intensity_is_sklearns_oas(self):
        # the context means are samples of known mean 0 after orthonormal contrasts: there sklearn's estimator applies
        from scipy.linalg import helmert
        from sklearn.covariance import oas

        x = np.random.default_rng(12).standard_normal((9, 8, 5)) * np.array([3.0, 1, 1, 1, 0.2])
        means = (x - x.mean(1, keepdims=True)).mean(0)
        expected, intensity = oas(helmert(8) @ means, assume_centered=True)
        prior = natural(x, scope="universal")
        np.testing.assert_allclose(prior.covariance, expected, rtol=1e-10)
        assert prior.notes["between"]["intensity"] == pytest.approx(intensity)
        assert 0 < intensity < 1

    def test_more_shrinkage_is_rounder_and_keeps_the_trace(self):
        x = np.random.default_rng(13).standard_normal((9, 6, 5)) * np.array([9.0, 1, 1, 1, 0.2])
        priors = [natural(x, shrink=s) for s in (0.0, 0.5, 1.0, 2.0, 1e9)]
        traces = [np.trace(p.covariance) for p in priors]
        np.testing.assert_allclose(traces, traces[0])
        spreads = [p.lipschitz for p in priors]
        assert all(a > b for a, b in itertools.pairwise(spreads))
        np.testing.assert_allclose(priors[-1].covariance, np.eye(5) * traces[0] / 5, atol=1e-9)

    def test_fewer_samples_than_dimensions(self):
        x = np.random.default_rng(14).standard_normal((3, 4, 50)) * np.linspace(0.1, 5, 50)
        assert natural(x, shrink=0.0).dim == 3 * 3
        full = natural(x)
        assert full.dim == 50
        assert np.linalg.eigvalsh(full.covariance)[0] > 0

    def test_one_item_has_its_own_contexts_only(self):
        x = np.random.default_rng(15).standard_normal((1, 12, 3))
        np.testing.assert_allclose(natural(x, shrink=0).covariance, np.cov(x[0].T), rtol=1e-10)

    def test_float32_and_read_only(self):
        x = np.random.default_rng(16).standard_normal((6, 5, 4)).astype(np.float32) + 1000
        x.setflags(write=False)
        np.testing.assert_allclose(natural(x).covariance, natural(x.astype(float)).covariance, rtol=1e-10)

    def test_refuses(self):
        x = np.random.default_rng(17).standard_normal((6, 5, 4))
        with pytest.raises(ValueError, match="n_contexts >= 2"):
            natural(x[:, :1])
        with pytest.raises(ValueError, match="do not vary"):
            natural(np.repeat(x[:, :1], 5, axis=1))
        with pytest.raises(ValueError, match="1 \\(item, context\\) rows"):
            natural(np.where(np.arange(6 * 5 * 4).reshape(6, 5, 4) == 3, np.nan, x))
        with pytest.raises(ValueError, match="scope"):
            natural(x, scope="weights")
        with pytest.raises(ValueError, match="negative"):
            natural(x, shrink=-1.0)


def test_isotropic_has_c_times_the_rms_of_the_reference():
    reference = EllipticalPrior(_factor())
    prior = isotropic(reference, c=0.3, tail=Logistic())
    sigma = 0.3 * math.sqrt(np.trace(reference.covariance) / 6)
    np.testing.assert_allclose(prior.covariance, sigma**2 * np.eye(6))
    np.testing.assert_allclose(isotropic(reference.covariance, 0.3).covariance, prior.covariance)
    assert prior.tail == Logistic()
    with pytest.raises(ValueError, match="c > 0"):
        isotropic(reference, c=0.0)
