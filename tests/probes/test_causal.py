"""The causal probe reads what behaviour depends on, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from elk_stress.core import registry
from elk_stress.probing.probe import as_fitted
from elk_stress.testbeds.linear import Linear


def fit(testbed: Linear, **options: object):  # type: ignore[no-untyped-def]
    items = testbed.splits["train"]
    rows = testbed.activations("train", "fit")[::2]
    labels = np.repeat(items.labels[::2], rows.shape[1])
    factors = testbed.shift_factor("train", np.arange(4))
    recipe = registry.load("probes", "causal", **options)
    return as_fitted(recipe, rows.reshape(-1, rows.shape[-1]), labels, behaviour=factors)


def test_its_weight_lies_where_behaviour_reads() -> None:
    testbed = Linear(n_items=240, n_outputs=3)
    fitted = fit(testbed)
    weight, readout = fitted.parameters["weight"], testbed.readout
    inside = readout.T @ np.linalg.lstsq(readout.T, weight)[0]
    np.testing.assert_allclose(inside, weight, atol=1e-9 * np.linalg.norm(weight))
    # so the planted correlate, which behaviour ignores, cannot be used
    assert abs(weight @ testbed.incidental) < 1e-9 * np.linalg.norm(weight)


def test_truth_alone_suffices_on_the_linear_testbed() -> None:
    """Behaviour reads the truth at twice the gain of the rest: it leads, and more directions are not worth it."""
    testbed = Linear(n_items=240, n_outputs=3)
    fitted = fit(testbed)
    assert fitted.notes["directions"] == 1
    weight = fitted.parameters["weight"]
    assert weight @ testbed.truth / np.linalg.norm(weight) == pytest.approx(1.0)
    # gains 1, 1/2, 1/2
    assert fitted.notes["fisher_share"] == pytest.approx(1 / 1.5)


def test_a_fixed_number_is_kept_and_capped_by_what_is_known() -> None:
    testbed = Linear(n_items=80, n_outputs=2)
    assert fit(testbed, directions=2).notes["directions"] == 2
    assert fit(testbed, directions=9).notes["directions"] == 2


def test_refused_behaviour() -> None:
    rows, labels = np.random.default_rng(np.random.SeedSequence(0)).standard_normal((20, 4)), np.arange(20) % 2
    with pytest.raises(ValueError, match="needs behaviour"):
        as_fitted("causal", rows, labels)
    with pytest.raises(ValueError, match=r"\(m, rank, 4\)"):
        as_fitted("causal", rows, labels, behaviour=np.ones((2, 1, 5)))
    with pytest.raises(ValueError, match="depends on nothing"):
        as_fitted("causal", rows, labels, behaviour=np.zeros((2, 1, 4)))
    with pytest.raises(ValueError, match="at least one direction"):
        registry.load("probes", "causal", directions=0)
