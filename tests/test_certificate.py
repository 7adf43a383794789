"""Certified bits: never above the truth, equal to it where the score is linear, and proof against every attack."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from scipy.stats import beta as beta_distribution

from elk_stress.core.bits import Kind
from elk_stress.estimators import estimate_batch
from elk_stress.estimators.closed_form import ClosedForm
from elk_stress.estimators.design_point import DesignPoint
from elk_stress.estimators.limit_state import both
from elk_stress.probing.probe import FittedProbe, Traits, direction
from elk_stress.thoughts.certificate import certified_bits, is_certifiable
from elk_stress.thoughts.events import item_event, kept_event, universal_auroc_event, universal_recall_event
from elk_stress.threats.priors import EllipticalPrior, Logistic

DIM = 6


@dataclass(frozen=True)
class Cone:
    """``offset - ||x||`` scaled: curved, its slope known, its bits known by counting."""

    name = "cone_of_tests"
    traits = Traits(learns=False)

    def fit(
        self, activations: np.ndarray, labels: np.ndarray, *, pairs: np.ndarray | None = None, seed: int = 0
    ) -> FittedProbe:
        raise NotImplementedError

    def score(self, xp: Any, parameters: Mapping[str, Any], activations: Any) -> Any:
        inner = activations * parameters["scale"]
        return parameters["offset"] - xp.sqrt(xp.sum(inner * inner, axis=-1) + 1e-9)

    def lipschitz(self, parameters: Mapping[str, np.ndarray], factor: np.ndarray) -> float:
        return float(np.linalg.norm(parameters["scale"][:, None] * factor, 2))


@pytest.fixture
def prior() -> EllipticalPrior:
    rng = np.random.default_rng(np.random.SeedSequence(0))
    return EllipticalPrior(rng.standard_normal((DIM, DIM)) / 2)


@pytest.fixture
def cone() -> FittedProbe:
    return FittedProbe(Cone(), {"scale": np.linspace(0.5, 1.5, DIM), "offset": np.asarray(6.0)}, dim=DIM)


def origins(n: int = 5) -> np.ndarray:
    return 0.3 * np.random.default_rng(np.random.SeedSequence(1)).standard_normal((n, DIM))


@pytest.mark.parametrize("closed", [True, False], ids=["closed form", "searched"])
def test_linear_probes_get_nearly_all_of_their_bits(closed: bool, prior: EllipticalPrior) -> None:
    weight = np.arange(1.0, DIM + 1)
    deviation = float(prior.standard_deviation(weight))
    probe = direction(weight)
    # margins of 1 to 9 standard deviations
    x = np.outer(deviation * np.linspace(1, 9, 9), weight / (weight @ weight))
    exact = ClosedForm()(item_event(probe, prior, x, 0.0)).value
    found = certified_bits(item_event(probe, prior, x, 0.0, closed=closed), seed=0)
    assert set(found.kind) == {Kind.LOWER_BOUND}
    assert (found.value <= exact * (1 + 1e-5)).all()
    # the level, chosen on a pilot, and the Clopper-Pearson limit cost up to 0.2 standard deviations
    assert (found.value >= exact - 0.35 * np.sqrt(exact) - 0.05).all()


def test_never_above_the_counted_truth_of_a_curved_score(prior: EllipticalPrior, cone: FittedProbe) -> None:
    state = item_event(cone, prior, origins(), np.array([0.0, 1.0, 2.0, 3.0, 4.0]))
    found = certified_bits(state, seed=0)
    n = 200_000
    u = np.random.default_rng(np.random.SeedSequence(2)).standard_normal((1, n, prior.dim))
    for i in range(5):
        failed = int((state.value(np.array([i]), u) <= 0).sum())
        # false alarm of the lower limit: 1e-6
        least = beta_distribution.ppf(1e-6, failed, n - failed + 1) if failed else 0.0
        assert found.value[i] <= -np.log2(least) if least else True
    # the bound says something, and not all
    assert (found.value > 0).sum() >= 3


def test_brackets_the_automatic_estimate(prior: EllipticalPrior, cone: FittedProbe) -> None:
    state = item_event(cone, prior, origins(3), 0.0)
    estimate = estimate_batch(state, seed=0, n_particles=256, max_bits=200.0)
    certified = certified_bits(state, seed=1)
    assert (certified.value <= estimate.high).all()
    # auto carries a bound of its own
    assert (estimate.diagnostics["lower_bound"] > 0).all()
    assert (estimate.diagnostics["lower_bound"] <= estimate.high).all()


def test_holds_for_failing_and_keeping_behaviour(prior: EllipticalPrior, cone: FittedProbe) -> None:
    x = origins(3)
    failed = item_event(cone, prior, x, 3.0)
    factors = np.broadcast_to(np.eye(DIM)[:2], (3, 2, DIM))
    joint = both(failed, kept_event(prior, factors, 0.5))
    u = np.random.default_rng(np.random.SeedSequence(3)).standard_normal((1, 100_000, prior.dim))
    certified = certified_bits(failed, seed=0).value
    for i in range(3):
        share = float((joint.value(np.array([i]), u) <= 0).mean())
        assert share > 0
        assert certified[i] <= -np.log2(share) + 0.1


def test_no_point_nearer_than_the_slope_allows_fails(prior: EllipticalPrior, cone: FittedProbe) -> None:
    """The strongest attack on a known gradient: descent to the boundary never arrives before ``margin / L``."""
    state = item_event(cone, prior, origins(), 0.0)
    nearest = DesignPoint(n_starts=8)(state, seed=0).diagnostics["centres"]
    length = np.nanmin(np.linalg.norm(nearest, axis=-1), axis=1)
    assert state.lipschitz is not None
    rest = state.value(np.arange(5), np.zeros((5, 1, prior.dim)))[:, 0]
    assert (length >= rest / state.lipschitz - 1e-4).all()


@pytest.mark.parametrize("universal", ["recall", "auroc"])
def test_universal_events_are_no_steeper_than_they_say(
    universal: str, prior: EllipticalPrior, cone: FittedProbe
) -> None:
    rng = np.random.default_rng(np.random.SeedSequence(5))
    scale, levels, labels = cone.parameters["scale"], np.array([0.25, 0.5, 0.75]), np.arange(20) % 2
    # where the cone is steepest; negatives beyond its tip, so that the gap moves twice as fast
    left, _, right = np.linalg.svd(scale[:, None] * prior.factor)
    x = (2.0 * labels[:, None] - 1) * 100 * left[:, 0] / scale + 0.1 * rng.standard_normal((20, DIM))
    if universal == "recall":
        state = universal_recall_event(cone, prior, x[labels == 1], 3.0, levels)
    else:
        state = universal_auroc_event(cone, prior, x, labels, levels)
    assert state.lipschitz is not None
    u = rng.standard_normal((3, 400, prior.dim))
    step = rng.standard_normal(u.shape)
    step[:, 0] = 3 * right[0]
    change = np.abs(state.value(np.arange(3), u + step) - state.value(np.arange(3), u)) / np.linalg.norm(step, axis=-1)
    assert (change.max(axis=1) <= state.lipschitz * (1 + 1e-3)).all()
    assert (change.max(axis=1) >= state.lipschitz * 0.99).all()


def test_a_score_that_does_not_move_is_never_broken(prior: EllipticalPrior) -> None:
    still = item_event(direction(np.zeros(DIM), 1.0), prior, origins(2), np.array([0.0, 2.0]))
    np.testing.assert_array_equal(certified_bits(still, seed=0).value, [np.inf, 0.0])


def test_same_seed_same_bound(prior: EllipticalPrior, cone: FittedProbe) -> None:
    state = item_event(cone, prior, origins(2), 0.0)
    np.testing.assert_array_equal(certified_bits(state, seed=4).value, certified_bits(state, seed=4).value)


def test_refused_where_the_slope_is_unknown(prior: EllipticalPrior, cone: FittedProbe) -> None:
    heavy = item_event(cone, prior.with_tail(Logistic()), origins(2), 0.0)
    assert not is_certifiable(heavy)
    with pytest.raises(ValueError, match="Gaussian tails"):
        certified_bits(heavy, seed=0)
