"""Evidence bounds of attacks where behaviour is judged draw by draw."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from elk_stress.estimators.evidence_bound import EvidenceBound
from elk_stress.testbeds.linear import Linear
from elk_stress.thoughts.attacks.target import Arena, arena, judged_event
from elk_stress.thoughts.baseline import situation
from elk_stress.thoughts.events import nearest_of_linear
from elk_stress.thoughts.prepared import prepare_scene
from elk_stress.threats.threat import Threat

_EPSILON = 0.5


@cache
def _field(epsilon: float = _EPSILON) -> Arena:
    testbed = Linear(dim=8, n_items=160, n_contexts=8)
    scene = replace(prepare_scene(testbed, prior=testbed.true_prior()), replicates=100)
    threat = Threat(kept=True, epsilon=epsilon)
    return arena(scene, situation(scene, testbed.known_probes()["paper"], threat, 0.05), epsilon)


def _exact(field: Arena) -> np.ndarray:
    """Joint bits by integration, per attacked item."""
    testbed = field.scene.testbed
    assert isinstance(testbed, Linear)
    margin = field.place.margin[field.place.caught]
    weight = testbed.known_probes()["paper"].parameters["weight"]
    return np.array([testbed.exact_bits(weight, float(m), field.place.prior, field.epsilon).value for m in margin])


def verified_bound(field: Arena, centres: np.ndarray, confidence: float, *, seed: int) -> np.ndarray:
    """As on a real model: 64 draws, each that fails judged by its own forward pass."""
    return EvidenceBound(64, 0.25, confidence)(judged_event(field), seed=seed, centres=centres[:, None]).value


def test_it_lies_above_the_exact_bits_and_not_far() -> None:
    field = _field()
    found = verified_bound(field, nearest_of_linear(field.failed), 0.999, seed=0)
    excess = found - _exact(field)
    assert np.isfinite(found).mean() > 0.9
    assert (excess[np.isfinite(found)] >= 0).all()
    assert np.median(excess) < 5


@pytest.mark.parametrize("confidence", [0.5, 0.95])
def test_it_covers_at_its_confidence(confidence: float) -> None:
    field = _field()
    centres, exact = nearest_of_linear(field.failed), _exact(field)
    above = np.mean([verified_bound(field, centres, confidence, seed=seed) >= exact for seed in range(10)])
    # several hundred bounds: five standard deviations below what is promised
    n = 10 * len(exact)
    assert above >= confidence - 5 * np.sqrt(confidence * (1 - confidence) / n)


def test_behaviour_counts() -> None:
    field = _field()
    strict = replace(field, epsilon=1e-12)
    assert np.isinf(verified_bound(strict, nearest_of_linear(field.failed), 0.95, seed=0)).all()


def test_a_centre_that_does_not_fail_proves_nothing() -> None:
    field = _field()
    away = -4 * nearest_of_linear(field.failed)
    assert np.isinf(verified_bound(field, away, 0.95, seed=0)).all()
