"""The verified split B_joint = B_failed - log2 P[kept | failed] against exact integration on the linear testbed."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from elk_stress.core.bits import BitsBatch, Kind
from elk_stress.estimators.closed_form import ClosedForm
from elk_stress.estimators.limit_state import both
from elk_stress.probing.probe import direction
from elk_stress.testbeds.linear import Linear
from elk_stress.thoughts.behaviour import Behaviour, joint_of_failed, kept_bits, searched_joint
from elk_stress.thoughts.events import failures_of_linear, item_event, kept_event, nearest_kept


@pytest.fixture(scope="module")
def bed() -> Linear:
    return Linear(dim=12, n_items=80, n_contexts=8)


def setting(bed: Linear, probe_name: str, margins: tuple[float, ...], tail: str = "gaussian"):  # type: ignore[no-untyped-def]
    """Items at chosen margins, in prior standard deviations."""
    from elk_stress.threats.priors import Gaussian, Logistic

    known = bed.known_probes()
    probe = known["paper" if probe_name == "mixed" else probe_name]
    if probe_name == "mixed":
        # leans on what behaviour reads as well: its cheapest breaks change behaviour, others need not
        probe = direction(known["paper"].parameters["weight"] + 4 * known["oracle"].parameters["weight"])
    prior = bed.true_prior("item", Gaussian() if tail == "gaussian" else Logistic())
    weight = np.asarray(probe.parameters["weight"], dtype=float)
    offsets = np.array(margins) * float(prior.standard_deviation(weight))
    origins = (offsets - float(probe.parameters["bias"]))[:, None] * weight / (weight @ weight)
    return probe, prior, weight, offsets, origins, item_event(probe, prior, origins, 0.0)


@pytest.mark.parametrize("tail", ["gaussian", "logistic"])
def test_verified_split_holds_the_exact_joint_bits(bed: Linear, tail: str) -> None:
    _, prior, weight, offsets, _, failed = setting(bed, "paper", (1.0, 2.0, 4.0), tail)
    epsilon = 3 * float(np.median(bed.shift("test", np.array([0]), prior.sample(2000, 1)[None])))
    draws = failures_of_linear(failed, 4000, np.random.default_rng(0))
    shifts = bed.shift("test", np.arange(3), prior.move(draws))
    joint = joint_of_failed(ClosedForm()(failed), shifts, epsilon, 100.0)
    exact = [bed.exact_bits(weight, m, prior, epsilon).value for m in offsets]
    np.testing.assert_allclose(joint.value, exact, atol=0.15)
    for bits, truth in zip(joint, exact, strict=True):
        assert bits.low - 0.05 <= truth <= bits.high + 0.05
        assert bits.kind is Kind.ESTIMATE


def test_no_kept_draw_is_open_above_and_the_search_closes_it(bed: Linear) -> None:
    probe, prior, weight, offsets, origins, failed = setting(bed, "mixed", (5.0, 6.0))
    epsilon = 0.3
    behaviour = Behaviour(bed, n_verify=256)
    items = np.arange(2)
    draws = failures_of_linear(failed, 64, np.random.default_rng(0))
    first = joint_of_failed(ClosedForm()(failed), bed.shift("test", items, prior.move(draws)), epsilon, 100.0)
    assert all(k is Kind.CENSORED for k in first.kind)
    assert np.isposinf(first.high).all()
    factors = behaviour.factors(items)
    corner = nearest_kept(prior, weight, offsets, factors, epsilon)
    surrogate = replace(
        both(item_event(probe, prior, origins, 0.0, closed=False), kept_event(prior, factors, epsilon)), starts=corner
    )
    second = searched_joint(first, items, prior, failed, surrogate, behaviour, epsilon, max_bits=100.0, seed=0)
    exact = np.array([bed.exact_bits(weight, m, prior, epsilon).value for m in offsets])
    assert np.isfinite(second.high).all()
    assert (second.low <= exact).all()
    assert (exact <= second.high).all()
    assert (second.high - exact < 16).all()


def test_infinite_bits_stay_infinite_whatever_behaviour() -> None:
    failed = BitsBatch.build(np.array([np.inf]), np.inf, np.inf, Kind.EXACT, "closed_form")
    joint = joint_of_failed(failed, np.full((1, 64), np.inf), 0.1, 100.0)
    assert math.isinf(joint.value[0])
    assert joint.kind[0] is Kind.EXACT


def test_breaking_behaviour_is_flagged() -> None:
    failed = BitsBatch.build(np.array([4.0, 4.0]), 4.0, 4.0, Kind.EXACT, "closed_form")
    shifts = np.stack([np.linspace(0, 1, 64), np.zeros(64)])
    joint = joint_of_failed(failed, shifts, 0.1, 100.0)
    assert [f.name for f in joint.flags[0]] == ["behaviour_broken"]
    assert joint.flags[1] == ()
    assert joint.value[0] > 6 > 4.5 > joint.value[1]


def test_kept_bits_count_with_exact_intervals() -> None:
    shifts = np.concatenate([np.zeros((1, 48)), np.ones((1, 48))], axis=0)
    shifts = np.concatenate([shifts, np.repeat([[0.0, 1.0]], 24, axis=1).reshape(1, 48)])
    kept = kept_bits(shifts, 0.5)
    assert kept.value[0] == 0
    assert kept.kind[1] is Kind.CENSORED
    assert kept.value[2] == 1.0
    assert kept.low[2] < 1 < kept.high[2]


def test_prior_shifts_are_drawn_once_per_item(bed: Linear) -> None:
    calls = []

    class Counting(Behaviour):
        def shift(self, items: np.ndarray, moves: np.ndarray) -> np.ndarray:
            calls.append(len(items))
            return super().shift(items, moves)

    behaviour = Counting(bed, n_verify=8)
    prior = bed.true_prior("item")
    a = behaviour.prior_shifts(prior, np.array([0, 3]), ("item/natural", "gaussian", 1.0))
    b = behaviour.prior_shifts(prior, np.array([3, 5, 0]), ("item/natural", "gaussian", 1.0))
    assert calls == [2, 1]
    np.testing.assert_array_equal(a, b[[2, 0]])
