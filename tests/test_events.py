"""Events against brute force: the limit states fail exactly where the real metric does."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import kstest, norm
from sklearn.metrics import roc_auc_score

from elk_stress.probing.probe import FittedProbe, direction
from elk_stress.thoughts.events import (
    failures_of_linear,
    item_event,
    kept_event,
    nearest_kept,
    nearest_of_linear,
    ranks_of_levels,
    universal_auroc_event,
    universal_recall_event,
)
from elk_stress.threats.priors import EllipticalPrior, Gaussian, Logistic, StudentT

TAILS = {"gaussian": Gaussian(), "logistic": Logistic(), "student_t": StudentT(5.0)}
D = 5


class Quadratic:
    """A probe that is not linear, for the general paths."""

    name = "quadratic_of_tests"

    from elk_stress.probing.probe import Traits

    traits = Traits()

    def fit(self, activations, labels, *, pairs=None, seed=0):  # type: ignore[no-untyped-def]
        raise NotImplementedError

    def score(self, xp, parameters, activations):  # type: ignore[no-untyped-def]
        return xp.matmul(activations, parameters["weight"]) - 0.1 * xp.sum(activations * activations, axis=-1)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def prior_of(rng: np.random.Generator, tail: str = "gaussian") -> EllipticalPrior:
    return EllipticalPrior(rng.standard_normal((D, D)) * 0.7, TAILS[tail])


def probes(rng: np.random.Generator) -> dict[str, FittedProbe]:
    weight = rng.standard_normal(D).astype(np.float32)
    return {"linear": direction(weight, 0.3), "curved": FittedProbe(Quadratic(), {"weight": weight})}


def test_rank_of_a_level_is_where_recall_comes_down_to_it():
    """Counted: the most that may still be caught when recall is at most the level."""
    for n in range(1, 60):
        caught = np.arange(n)  # so many are still caught
        for k in caught:
            level = k * (1 / n)  # not always k / n: 3 * (1 / 49) is less than 3 / 49
            rank = ranks_of_levels(level, n)
            assert rank == caught[caught / n <= level + 1e-12].max()
    assert ranks_of_levels(1.0, 10) == 9


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("kind", ["linear", "curved"])
def test_item_event_fails_where_the_score_is_at_most_the_threshold(kind: str, tail: str, rng) -> None:
    prior, probe = prior_of(rng, tail), probes(rng)[kind]
    origins = rng.standard_normal((4, D)).astype(np.float32)
    state = item_event(probe, prior, origins, -0.2)
    u = rng.standard_normal((4, 200, prior.dim))
    scores = np.asarray(probe.score((origins[:, None] + prior.move(u)).astype(np.float32)))
    clear = np.abs(scores + 0.2) > 1e-4
    assert ((state.value(np.arange(4), u) <= 0) == (scores <= -0.2))[clear].all()
    assert 0.1 < (scores <= -0.2).mean() < 0.9


@pytest.mark.parametrize("kind", ["linear", "curved"])
def test_universal_events_fail_exactly_where_the_metric_does(kind: str, rng) -> None:
    prior, probe = prior_of(rng), probes(rng)[kind]
    items = rng.standard_normal((17, D)).astype(np.float32) * 2
    labels = (np.arange(17) % 2 == 0).astype(int)
    u = rng.standard_normal((1, 300, prior.dim))
    moved = (items[None] + prior.move(u[0])[:, None]).astype(np.float32)
    scores = np.asarray(probe.score(moved))
    levels = np.array([0.0, 2 / 9, 0.5, 0.6])
    state = universal_recall_event(probe, prior, items[labels == 1], 0.1, levels)
    g = state.value(np.arange(4), np.repeat(u, 4, axis=0))
    recall = (scores[:, labels == 1] > 0.1).mean(axis=1)
    for row, level in zip(g, levels, strict=True):
        assert ((row <= 0) == (recall <= level + 1e-9)).all()
    assert 0 < (g[2] <= 0).mean() < 1

    area = np.array([roc_auc_score(labels, s) for s in scores])
    levels = np.array([np.quantile(area, 0.3), np.quantile(area, 0.7)]) + 1e-6
    g = universal_auroc_event(probe, prior, items, labels, levels).value(np.arange(2), np.repeat(u, 2, axis=0))
    for row, level in zip(g, levels, strict=True):
        assert ((row <= 0) == (area <= level)).all()


@pytest.mark.parametrize("tail", TAILS)
def test_nearest_of_linear_is_the_shortest_failure(tail: str, rng) -> None:
    prior, probe = prior_of(rng, tail), probes(rng)["linear"]
    origins = rng.standard_normal((3, D)) + 4 * probe.parameters["weight"]
    state = item_event(probe, prior, origins, 0.0)
    u = nearest_of_linear(state)
    g = state.value(np.arange(3), u[:, None])[:, 0]
    assert (g <= 1e-6).all()
    for i in range(3):
        best = minimize(
            lambda v: v @ v,
            u[i] + 0.2 * rng.standard_normal(prior.dim),
            constraints={"type": "ineq", "fun": lambda v, i=i: -state.value(np.array([i]), v[None, None])[0, 0]},
            method="SLSQP",
        )
        assert np.linalg.norm(u[i]) <= np.sqrt(best.fun) * 1.002


@pytest.mark.parametrize("tail", TAILS)
def test_nearest_kept_solves_the_constrained_problem(tail: str, rng) -> None:
    prior = prior_of(rng, tail)
    weight, factors = rng.standard_normal(D), rng.standard_normal((3, 2, D))
    margins = np.array([2.0, 4.0, 6.0])
    u = nearest_kept(prior, weight, margins, factors, 0.3)[:, 0]
    for i in range(3):

        def shift(v: np.ndarray, i: int = i) -> float:
            return float(0.5 * np.sum((factors[i] @ prior.move(v)) ** 2))

        assert weight @ prior.move(u[i]) <= -margins[i]
        assert shift(u[i]) <= 0.3
        best = minimize(
            lambda v: v @ v,
            u[i],
            constraints=[
                {"type": "ineq", "fun": lambda v, i=i: -margins[i] - weight @ prior.move(v)},
                {"type": "ineq", "fun": lambda v, shift=shift: 0.3 - shift(v)},
            ],
            method="SLSQP",
        )
        assert np.linalg.norm(u[i]) <= np.sqrt(best.fun) * 1.01


def test_nearest_kept_says_where_nothing_fails_and_keeps(rng) -> None:
    prior = EllipticalPrior(np.eye(D))
    weight = np.eye(D)[0]
    # behaviour reads the very direction: a margin of 3 needs a shift of 4.5 nats
    u = nearest_kept(prior, weight, np.array([3.0]), weight[None, None], 0.5)
    assert np.isnan(u).all()


@pytest.mark.parametrize("tail", TAILS)
def test_draws_given_failure_are_the_prior_given_failure(tail: str, rng) -> None:
    prior, probe = prior_of(rng, tail), probes(rng)["linear"]
    weight = probe.parameters["weight"].astype(float)
    deviation = float(prior.standard_deviation(weight))
    origin = (1.2 * deviation / (weight @ weight)) * weight[None]
    state = item_event(probe, prior, origin, 0.3)
    draws = failures_of_linear(state, 6000, rng)
    assert (state.value(np.array([0]), draws) <= 1e-7).all()
    # rejection sampling as the reference: same law along the probe and across it, and of the scale
    many = rng.standard_normal((60_000, prior.dim))
    kept = many[state.value(np.array([0]), many[None])[0] <= 0]
    across = rng.standard_normal(D)
    for functional in (weight, across):
        a, b = prior.move(draws[0]) @ functional, prior.move(kept) @ functional
        assert kstest(a, b).pvalue > 1e-4
    if prior.tail.extra:
        assert kstest(draws[0, :, -1], kept[:, -1]).pvalue > 1e-4
        assert kstest(draws[0, :, -1], norm.cdf).pvalue < 1e-4  # failing does select large scales


def test_kept_event_is_the_quadratic_shift(rng) -> None:
    prior, factors = prior_of(rng, "logistic"), rng.standard_normal((2, 3, D))
    state = kept_event(prior, factors, 0.8)
    u = rng.standard_normal((2, 50, prior.dim))
    shift = 0.5 * (np.einsum("prd,pnd->pnr", factors, prior.move(u)) ** 2).sum(-1)
    np.testing.assert_allclose(state.value(np.arange(2), u), (shift - 0.8) / 0.8, rtol=1e-4, atol=1e-4)
