"""Bits of a probe without a gradient against closed forms, from 5 to 25 bits: scores of many items, nothing else."""

from __future__ import annotations

import math

import numpy as np
import pytest

from elk_stress import wrap
from elk_stress.core.bits import Kind
from elk_stress.core.flags import flag
from elk_stress.estimators.arbitration import Estimate, Evidence, decide
from elk_stress.probing.probe import FittedProbe, direction
from elk_stress.testbeds.linear import Linear
from elk_stress.thoughts.baseline import baseline_of
from elk_stress.thoughts.event_bits import event_bits
from elk_stress.thoughts.events import item_event
from elk_stress.thoughts.item_scope import stress_items
from elk_stress.thoughts.prepared import fit_probe, prepare
from elk_stress.thoughts.survival import _upper
from elk_stress.threats.priors import EllipticalPrior
from elk_stress.threats.threat import Threat

DIM, FLAT = 24, Evidence(Estimate(math.inf, 10.0, math.inf), settled=False)


def opaque(weight: np.ndarray, bias: float = 0.0) -> FittedProbe:
    return wrap(lambda v: np.asarray(v) @ weight + bias, dim=len(weight))


def test_many_items_of_5_to_25_bits() -> None:
    """70 items, enough to spread the budget thin. At least 80% of 95% intervals hold the exact value, and of those
    beyond 14 bits as many: there a budget for fewer bits put the answer 9 bits too low on average."""
    rng = np.random.default_rng(np.random.SeedSequence([21, 1]))
    weight = rng.standard_normal(DIM)
    prior = EllipticalPrior(rng.standard_normal((DIM, DIM)) / math.sqrt(DIM), name="test")
    spread = float(prior.standard_deviation(weight))
    origins = np.linspace(1.9, 5.4, 70)[:, None] * spread * weight / (weight @ weight)
    exact = event_bits(item_event(direction(weight, 0.0), prior, origins, 0.0), max_bits=100, n_particles=500, seed=0)
    found = event_bits(item_event(opaque(weight), prior, origins, 0.0), max_bits=100, n_particles=500, seed=0)
    held = (found.low <= exact.value) & (exact.value <= found.high)
    deep = exact.value > 14
    assert exact.value.min() < 5.2
    assert exact.value.max() > 24.5
    assert held.mean() >= 0.8
    assert held[deep].mean() >= 0.8
    assert np.mean([k is Kind.ESTIMATE for k in found.kind]) > 0.9
    assert np.abs(found.value - exact.value)[deep].mean() < 0.7


@pytest.mark.parametrize("gap", [2.5, 3.5])
def test_half_life_of_a_testbed(gap: float) -> None:
    testbed = Linear(dim=DIM, n_contexts=16, seed=2, truth_gap=gap, incidental_gap=3.0)
    prepared = prepare(testbed, seed=0, replicates=100)
    fitted = fit_probe(prepared, "logistic")
    weight, bias = fitted.parameters["weight"], float(fitted.parameters["bias"])
    exact, found = (
        stress_items(
            prepared, baseline_of(prepared, probe, Threat(), 0.05), max_bits=100, n_particles=500, seed=0
        ).headline
        for probe in (direction(weight, bias), opaque(weight, bias))
    )
    assert found.low <= exact.value <= found.high
    assert found.kind is Kind.CENSORED or abs(found.value - exact.value) < 1.0


def test_what_the_budget_cut_is_a_lower_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a budget for a few bits: no estimate of 20 bits, but "at least so many", and the way out."""
    from elk_stress.estimators import auto

    monkeypatch.setattr(auto, "_BLACK_BOX_SPLITTING", auto._BLACK_BOX_SCORES)
    weight = np.random.default_rng(3).standard_normal(DIM)
    prior = EllipticalPrior(np.eye(DIM), name="test")
    origins = np.full((100, 1), 5.0) * weight / np.linalg.norm(weight)
    exact = event_bits(item_event(direction(weight, 0.0), prior, origins, 0.0), max_bits=100, n_particles=200, seed=0)
    found = event_bits(item_event(opaque(weight), prior, origins, 0.0), max_bits=100, n_particles=200, seed=0)
    censored = np.array([k is Kind.CENSORED for k in found.kind])
    assert censored.mean() > 0.5
    assert np.isposinf(found.high[censored]).all()
    np.testing.assert_array_equal(found.value[censored], found.low[censored])
    assert (found.low <= exact.value).mean() > 0.95
    status = found.status[int(np.flatnonzero(censored)[0])]
    assert "raise n_particles" in status
    assert "budget" in status


CUT = {"split": Estimate(20.8, 20.8, math.inf), "split_censored": True, "split_cut": True, "split_doubts": True}


@pytest.mark.parametrize("trusted", [True, False])
def test_a_run_that_was_cut_never_outvotes(trusted: bool) -> None:
    weighed = Estimate(29.9, 29.4, 30.5)
    verdict = decide(_evidence(weighed, trusted), 100.0, False)
    if trusted:
        assert (verdict.value, verdict.kind, verdict.source) == (29.9, Kind.ESTIMATE, "importance")
    else:
        assert (verdict.value, verdict.low, verdict.high, verdict.kind) == (20.8, 20.8, math.inf, Kind.CENSORED)


def test_importance_sampling_below_what_a_cut_run_reached_keeps_its_value_and_opens_its_interval() -> None:
    verdict = decide(_evidence(Estimate(15.0, 14.5, 15.5), True), 100.0, False)
    assert (verdict.value, verdict.low, verdict.high) == (15.0, 14.5, math.inf)
    assert [f.name for f in verdict.flags] == ["runs_disagree"]
    verdict = decide(_evidence(Estimate(15.0, 14.5, 15.5), False), 100.0, False)
    assert (verdict.value, verdict.kind) == (14.5, Kind.CENSORED)


def _evidence(weighed: Estimate, trusted: bool) -> Evidence:
    return Evidence(FLAT.counted, settled=False, weighed=weighed, trusted=trusted, **CUT)  # type: ignore[arg-type]


def test_disputed_items_enter_the_best_case_with_their_high_end() -> None:
    from elk_stress.core.bits import Bits

    plain = Bits(10.0, 5.0, 18.0, Kind.ESTIMATE, "union")
    assert _upper(plain) == 10.0
    disputed = Bits(10.0, 5.0, 18.0, Kind.ESTIMATE, "union", flags=(flag("runs_disagree", "by 8 bits"),))
    assert _upper(disputed) == 18.0
