"""The bound from where an attack stood, on models whose failure is an exact half-space: rigorous, finite, tight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.special import log_ndtr

from elk_stress.training.upper_bound import attack_bound

MODELS = 400


@dataclass(frozen=True)
class HalfSpaces:
    """Models in u-space that fail at ``u_0 >= beta``; behaviour is kept up to ``most`` along the same axis.

    Every model has its own noise, so that the models are independent repetitions.
    """

    beta: float
    subject: str = "organism"
    most: float = math.inf
    seed: int = 0
    n_models: int = MODELS
    dim: int = 3
    epsilon: float = 1.0
    name: str = "half-spaces"
    site: str = "nowhere"
    splits = {"test": SimpleNamespace(labels=np.array([0, 1]))}  # noqa: RUF012

    @property
    def bits(self) -> float:
        kept = 1.0 if math.isinf(self.most) else -math.expm1(log_ndtr(-self.most) - log_ndtr(-self.beta))
        return float(-(log_ndtr(-self.beta) + math.log(kept)) / math.log(2))

    def noise(self, draw: int) -> np.ndarray:
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, draw]))
        return rng.standard_normal((self.n_models, self.dim))

    def moved(self, weights: np.ndarray, noise: int | None) -> np.ndarray:
        return weights if noise is None else weights + self.noise(noise)

    def scaled(self, weights: np.ndarray, factor: np.ndarray) -> np.ndarray:
        return factor[..., None] * weights

    def length(self, weights: np.ndarray) -> np.ndarray:
        return np.linalg.norm(weights, axis=-1)

    def along(self, weights: np.ndarray, noise: int) -> np.ndarray:
        return (weights * self.noise(noise)).sum(axis=-1) / self.length(weights)

    def activations(self, weights: np.ndarray, split: str, noise: int | None = None) -> np.ndarray:
        u = self.moved(weights, noise)
        # one negative at 0, one positive above it until the model fails: AUROC 1, then 0
        return np.stack([np.zeros(u.shape[:2]), self.beta - u[..., 0]], axis=-1)[..., None]

    def shift(self, weights: np.ndarray, noise: int | None = None) -> np.ndarray:
        return np.where(self.moved(weights, noise)[..., 0] <= self.most, 0.0, 2.0)


PROBES = [SimpleNamespace(score=lambda a: a[..., 0])] * MODELS


def bound(trainee: HalfSpaces, over: float, aside: float = 0.0, **more) -> np.ndarray:
    """From an attack that stood ``over`` times as far out as the boundary, and ``aside`` off its direction."""
    weights = np.zeros((1, trainee.n_models, trainee.dim))
    weights[..., 0], weights[..., 1] = over * trainee.beta, aside
    return attack_bound(trainee, weights, PROBES, np.full(trainee.n_models, 0.25), **more)


# below 359 of 400 a coverage of 95% falls once in 10^5
COVERED = 359


@pytest.mark.parametrize("subject", ["organism", "language_model"])
@pytest.mark.parametrize("beta", [1.5, 5.0, 20.0])
@pytest.mark.parametrize("over", [0.95, 1.0, 1.3, 3.0])
def test_never_below_the_truth_beyond_its_rate(subject, beta, over):
    trainee = HalfSpaces(beta, subject)
    found = bound(trainee, over, seed=1)
    assert (found >= trainee.bits).sum() >= COVERED


def test_rigorous_where_the_level_matters_most():
    """From the prior itself every ratio is 0 and only the Clopper-Pearson limit is left: it is violated at its rate."""
    trainee = HalfSpaces(0.0)
    weights = np.zeros((1, MODELS, 3))
    weights[..., 1] = 1e-9
    found = attack_bound(trainee, weights, PROBES, np.full(MODELS, 0.25), seed=3)
    assert 1 <= (found < trainee.bits).sum() <= MODELS - COVERED


@pytest.mark.parametrize("beta", [3.0, 7.0, 12.0])
@pytest.mark.parametrize("over", [1.0, 1.2, 1.5])
def test_finite_and_tight_from_near_the_boundary(beta, over):
    trainee = HalfSpaces(beta)
    excess = bound(trainee, over, seed=2) - trainee.bits
    assert np.isfinite(excess).mean() > 0.85
    assert np.median(excess) < 4 + 0.5 * beta
    few = bound(HalfSpaces(beta, "language_model"), over, seed=2)
    assert np.isfinite(few).mean() > 0.85
    assert np.median(few) - trainee.bits < 4 + 2 * beta


def test_more_draws_are_tighter():
    trainee = HalfSpaces(7.0)
    medians = [np.median(bound(trainee, 1.0, seed=0, draws=n)) for n in (64, 256, 1024)]
    assert medians[0] > medians[1] > medians[2] > trainee.bits


def test_an_attack_that_overshot_wastes_its_bits():
    """Three times as far as needed spends nine times the bits; the pilot walks back, however far that is asked."""
    trainee = HalfSpaces(12.0)
    spent = (3 * 12.0) ** 2 / (2 * math.log(2))
    found = bound(trainee, 3.0, seed=0)
    assert np.isfinite(found).mean() > 0.95
    assert np.median(found) < 0.4 * spent


def test_off_the_direction_is_loose_and_never_wrong():
    trainee = HalfSpaces(6.0)
    found = bound(trainee, 1.0, aside=4.0, seed=0)
    assert (found >= trainee.bits).sum() >= COVERED
    assert np.median(found) > trainee.bits + 8


def test_behaviour_counts():
    """Failure in a slab: moves beyond it break behaviour and prove nothing."""
    trainee = HalfSpaces(5.0, most=5.3)
    found = bound(trainee, 1.0, seed=4)
    assert (found >= trainee.bits).sum() >= COVERED
    beyond = bound(HalfSpaces(5.0, most=4.9), 1.0, seed=4)
    assert (beyond == math.inf).all()


def test_an_attack_far_from_the_boundary_has_no_bound():
    assert (bound(HalfSpaces(20.0), 0.5, seed=0) == math.inf).all()


def test_seeds_use_other_draws():
    trainee = HalfSpaces(7.0)
    assert (bound(trainee, 1.0, seed=0) == bound(trainee, 1.0, seed=0)).all()
    assert (bound(trainee, 1.0, seed=0) != bound(trainee, 1.0, seed=1)).mean() > 0.9
