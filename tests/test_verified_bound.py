"""Evidence bounds of attacks where behaviour is judged draw by draw."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from elk_stress.estimators.evidence_bound import EvidenceBound
from elk_stress.testbeds.linear import Linear
from elk_stress.thoughts.attacks.target import AttackTarget, attack_target, judged_event
from elk_stress.thoughts.baseline import baseline_of
from elk_stress.thoughts.events import nearest_of_linear
from elk_stress.thoughts.prepared import prepare
from elk_stress.threats.threat import Threat

_EPSILON = 0.5


@cache
def _field(epsilon: float = _EPSILON) -> AttackTarget:
    testbed = Linear(dim=8, n_items=160, n_contexts=8)
    prepared = replace(prepare(testbed, prior=testbed.true_prior()), replicates=100)
    threat = Threat(kept=True, epsilon=epsilon)
    return attack_target(prepared, baseline_of(prepared, testbed.known_probes()["paper"], threat, 0.05), epsilon)


def _exact(target: AttackTarget) -> np.ndarray:
    """Joint bits by integration, per attacked item."""
    testbed = target.prepared.testbed
    assert isinstance(testbed, Linear)
    margin = target.baseline.margin[target.baseline.caught]
    weight = testbed.known_probes()["paper"].parameters["weight"]
    return np.array([testbed.exact_bits(weight, float(m), target.baseline.prior, target.epsilon).value for m in margin])


def verified_bound(target: AttackTarget, centres: np.ndarray, confidence: float, *, seed: int) -> np.ndarray:
    """As on a real model: 64 draws, each that fails judged by its own forward pass."""
    return EvidenceBound(64, 0.25, confidence)(judged_event(target), seed=seed, centres=centres[:, None]).value


def test_it_lies_above_the_exact_bits_and_not_far() -> None:
    target = _field()
    found = verified_bound(target, nearest_of_linear(target.failed), 0.999, seed=0)
    excess = found - _exact(target)
    assert np.isfinite(found).mean() > 0.9
    assert (excess[np.isfinite(found)] >= 0).all()
    assert np.median(excess) < 5


@pytest.mark.parametrize("confidence", [0.5, 0.95])
def test_it_covers_at_its_confidence(confidence: float) -> None:
    target = _field()
    centres, exact = nearest_of_linear(target.failed), _exact(target)
    above = np.mean([verified_bound(target, centres, confidence, seed=seed) >= exact for seed in range(10)])
    # several hundred bounds: five standard deviations below what is promised
    n = 10 * len(exact)
    assert above >= confidence - 5 * np.sqrt(confidence * (1 - confidence) / n)


def test_behaviour_counts() -> None:
    target = _field()
    strict = replace(target, epsilon=1e-12)
    assert np.isinf(verified_bound(strict, nearest_of_linear(target.failed), 0.95, seed=0)).all()


def test_a_centre_that_does_not_fail_proves_nothing() -> None:
    target = _field()
    away = -4 * nearest_of_linear(target.failed)
    assert np.isinf(verified_bound(target, away, 0.95, seed=0)).all()
