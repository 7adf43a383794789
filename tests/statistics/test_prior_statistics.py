"""Priors by simulation: unbiased covariance, shrinkage that helps, elliptical projections, tails named rightly.

Each test states its false-alarm rate where it has one; seeds are fixed.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from elk_stress.threats.priors import EllipticalPrior, Gaussian, Logistic, StudentT, Tail, fit_tails, natural

pytestmark = pytest.mark.statistics


def _model(d: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(np.random.SeedSequence([1, seed]))
    return rng.standard_normal((d, d)), 0.7 * rng.standard_normal((d, d))


def _draw(rng: np.random.Generator, n: int, contexts: int, between: np.ndarray, interaction: np.ndarray) -> np.ndarray:
    d = len(between)
    shared = rng.standard_normal((1, contexts, d)) @ between.T
    return 3.0 * rng.standard_normal((n, 1, d)) + shared + rng.standard_normal((n, contexts, d)) @ interaction.T


@pytest.mark.parametrize(("n", "contexts"), [(3, 4), (10, 6)])
def test_unshrunk_covariances_are_unbiased_in_the_two_way_model(n, contexts):
    """4000 repeats; every entry within 5 standard errors (15 entries, two scopes: false alarm about 2e-5)."""
    between, interaction = _model()
    rng = np.random.default_rng(np.random.SeedSequence([2, n]))
    item, universal = [], []
    for _ in range(4000):
        x = _draw(rng, n, contexts, between, interaction)
        item.append(natural(x, shrink=0.0).covariance)
        universal.append(natural(x, scope="universal", shrink=0.0).covariance)
    sigma_b, sigma_e = between @ between.T, interaction @ interaction.T
    for sample, expected in ((item, sigma_b + sigma_e), (universal, sigma_b + sigma_e / n)):
        error = np.std(sample, axis=0) / np.sqrt(len(sample))
        assert (np.abs(np.mean(sample, axis=0) - expected) < 5 * error).all()


@pytest.mark.parametrize("contexts", [8, 16])
def test_shrinkage_beats_none_and_full_when_contexts_are_few(contexts):
    """Squared error of the universal covariance, d = 40 with a decaying spectrum, over 60 data sets."""
    d = 40
    rng = np.random.default_rng(np.random.SeedSequence([3, contexts]))
    between = np.diag(1.0 / np.sqrt(1.0 + np.arange(d)))
    interaction = 0.5 * np.eye(d)
    errors = dict.fromkeys((0.0, 0.5, 1.0, 2.0, 1e9), 0.0)
    for _ in range(60):
        x = _draw(rng, 12, contexts, between, interaction)
        target = between @ between.T + interaction @ interaction.T / 12
        for shrink in errors:
            errors[shrink] += np.sum((natural(x, scope="universal", shrink=shrink).covariance - target) ** 2)
    assert errors[1.0] < errors[0.0]
    assert errors[1.0] < errors[1e9]
    assert errors[1.0] < 1.1 * min(errors.values())


@pytest.mark.parametrize("tail", [Logistic(), StudentT(3), StudentT(12)], ids=lambda tail: tail.name)
def test_projections_of_a_million_moves(tail):
    """Kolmogorov-Smirnov on 10^6 draws in d = 20 along 4 directions; false alarm 4e-6."""
    rng = np.random.default_rng(4)
    prior = EllipticalPrior(rng.standard_normal((20, 8)), tail)
    moves = prior.sample(1_000_000, 5)
    for weight in rng.standard_normal((4, 20)):
        standard = moves @ weight / prior.standard_deviation(weight)
        assert stats.kstest(standard, lambda x: 1.0 - 2.0 ** -tail.bits(x)).pvalue > 1e-6


def _elliptical(tail: Tail, n: int, contexts: int, seed: int, shared: float = 0.0) -> np.ndarray:
    """Item-by-context draws of the tail, plus a part shared by all items with share ``shared`` of the variance."""
    d = 32
    own = EllipticalPrior(np.eye(d), tail).sample(n * contexts, seed).reshape(n, contexts, d)
    common = EllipticalPrior(np.eye(d), tail).sample(contexts, seed + 10_000)
    return np.sqrt(1 - shared) * own + np.sqrt(shared) * common


@pytest.mark.parametrize(("n", "contexts"), [(80, 16), (200, 64)])
@pytest.mark.parametrize("tail", [Gaussian(), Logistic(), StudentT(4)], ids=lambda tail: tail.name)
def test_the_planted_tail_wins(tail, n, contexts):
    """At least 10 of 12 data sets, along 16 random directions; at the demo's and the full run's sizes."""
    right = 0
    for seed in range(12):
        directions = np.random.default_rng(np.random.SeedSequence([6, seed])).standard_normal((16, 32))
        fit = fit_tails(_elliptical(tail, n, contexts, seed), None, {"random": directions}).groups["random"]
        right += fit.winner.name.split("(")[0] == tail.name.split("(")[0]
    assert right >= 10


def test_clustered_z_holds_its_level_when_contexts_are_shared():
    """Gaussian data, half of the variance shared by all items: a heavy tail "wins" by z > 3 in at most 2 of 40 sets."""
    strong = 0
    for seed in range(40):
        directions = np.random.default_rng(np.random.SeedSequence([7, seed])).standard_normal((8, 32))
        activations = _elliptical(Gaussian(), 40, 16, seed, shared=0.5)
        fit = fit_tails(activations, None, {"random": directions}).groups["random"]
        strong += fit.winner.name != "gaussian" and fit.clustered_z > 3
    assert strong <= 2
