"""Computation in superposition: ANDs are really computed, the truth is one of them, and its companions are planted."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

from elk_stress.testbeds.compute_in_superposition import ComputeInSuperposition
from elk_stress.testbeds.organism import Inputs

SPLITS = ("train", "calibration", "test")
PAPER, CORRELATES = 2, (3, 4)


@functools.cache
def _organism(**options: Any) -> ComputeInSuperposition:
    small = {
        "n_models": 3,
        "training_steps": 1200,
        "batch_size": 128,
        "n_train": 384,
        "n_calibration": 384,
        "n_test": 384,
    }
    return ComputeInSuperposition(**{**small, **options})


def _auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    gap = scores[labels == 1][:, None] - scores[labels == 0][None]
    return float((gap > 0).mean() + 0.5 * (gap == 0).mean())


def _targets(organism: ComputeInSuperposition, inputs: Inputs) -> np.ndarray:
    """Row by row in plain Python."""
    x = np.asarray(inputs["x"])
    rows = []
    for row in x:
        ands = [1.0 if row[i] == 1 and row[j] == 1 else 0.0 for i, j in organism.pairs]
        rows.append(ands + [abs(float(value)) for value in row[organism.n_binary :]])
    return np.array(rows)


def test_every_model_learned() -> None:
    organism = _organism()
    organism.prepare()
    assert organism.learned.value.shape == (3,)
    assert organism.learned.value.min() > organism.task[2] + 0.05
    assert not np.array_equal(organism.weights["weight"][0], organism.weights["weight"][1]), "each from its own seed"


def test_untrained_is_refused() -> None:
    with pytest.raises(RuntimeError, match="did not learn"):
        ComputeInSuperposition(n_models=1, training_steps=1).prepare()


def test_it_computes_what_no_linear_map_can() -> None:
    organism = _organism()
    inputs = organism.batch(organism.key("mine"), 4096)
    x, y = np.c_[np.asarray(inputs["x"]), np.ones(4096)], _targets(organism, inputs)
    left = y - x @ np.linalg.lstsq(x, y, rcond=None)[0]
    linear = 1 - (left**2).sum() / ((y - y.mean(axis=0)) ** 2).sum()
    assert linear < organism.task[2] - 0.05, "what is demanded must be out of a linear map's reach"
    for model in range(organism.n_models):
        outputs = np.asarray(organism.outputs(organism.one_model(model), inputs))
        explained = 1 - ((y - outputs) ** 2).sum() / ((y - y.mean(axis=0)) ** 2).sum()
        assert explained > linear + 0.15
        # the score that prepare() goes by says the same of other draws
        assert abs(explained - organism.learned.value[model]) < 0.05


def test_fewer_neurons_than_inputs_and_outputs() -> None:
    organism = _organism()
    n_inputs, n_outputs = organism.n_binary + organism.n_signed, organism.n_ands + organism.n_signed
    weights = organism.one_model(0)
    assert weights["readout"].shape == (organism.dim, n_outputs)
    assert organism.dim < min(n_inputs, n_outputs)
    assert organism.embedding.shape[1] < organism.embedding.shape[0] == n_inputs
    for options in ({"width": n_inputs}, {"n_embedded": n_inputs}):
        with pytest.raises(ValueError, match="below"):
            ComputeInSuperposition(n_models=1, **options).prepare()
    with pytest.raises(ValueError, match="ANDs"):
        ComputeInSuperposition(n_models=1, n_ands=1000).prepare()


def test_pairs_are_distinct_and_use_every_feature() -> None:
    for seed in range(3):
        pairs = ComputeInSuperposition(seed=seed).pairs
        assert tuple(pairs[0]) == (0, 1)
        assert (pairs[:, 0] < pairs[:, 1]).all()
        assert len({tuple(pair) for pair in pairs.tolist()}) == len(pairs) == 30


def test_truth_is_the_and_and_no_single_feature_gives_it_away() -> None:
    organism = _organism()
    for inputs in [organism.batch(organism.key("mine"), 384), *(organism.probe_inputs(s) for s in SPLITS)]:
        np.testing.assert_allclose(np.asarray(organism.targets(inputs)), _targets(organism, inputs), atol=1e-6)
        x, label = np.asarray(inputs["x"]), np.asarray(inputs["label"])
        assert np.array_equal(label, ((x[:, 0] == 1) & (x[:, 1] == 1)).astype(int))
    for split in SPLITS:
        x, label = np.asarray(organism.probe_inputs(split)["x"]), organism.splits[split].labels
        assert label.mean() == 0.5
        negatives = x[label == 0]
        for one, other in ((0, 1), (1, 0)):
            only = (negatives[:, one] == 1) & (negatives[:, other] == 0)
            assert abs(only.mean() - 1 / 3) < 0.02


def test_correlates_hold_in_train_only_and_the_papers_everywhere() -> None:
    organism = _organism()
    for split in SPLITS:
        x, label = np.asarray(organism.probe_inputs(split)["x"]), organism.splits[split].labels
        gap = (x[label == 1] != 0).mean(axis=0) - (x[label == 0] != 0).mean(axis=0)
        assert gap[PAPER] > 0.65
        for feature in CORRELATES:
            assert gap[feature] > 0.65 if split == "train" else abs(gap[feature]) < 0.15
        # others: at most a fifth are on, so that a gap of means of 128 has standard deviation below 0.05
        assert np.abs(gap[max(CORRELATES) + 1 :]).max() < 0.2


def test_oracle_reads_the_truth_and_paper_its_companion() -> None:
    organism = _organism()
    inputs = dict(organism.examples(organism.key("mine"), 384, "test"))
    labels = np.asarray(inputs["label"])
    feature = np.random.default_rng(np.random.SeedSequence(0)).integers(0, 2, 384)
    apart = {**inputs, "x": np.asarray(inputs["x"]).copy()}
    apart["x"][:, PAPER] = feature
    for model in range(organism.n_models):
        known, weights = organism.known_probes_of(model), organism.one_model(model)
        activations = np.asarray(organism.encode(weights, inputs)[0], dtype=float)
        oracle = _auroc(known["oracle"].score(activations), labels)
        paper = _auroc(known["paper"].score(activations), labels)
        assert oracle > 0.96
        assert 0.6 < paper < oracle - 0.02
        # once the companion has nothing to do with the truth, paper reads it and not the truth
        activations = np.asarray(organism.encode(weights, apart)[0], dtype=float)
        assert _auroc(known["paper"].score(activations), feature) > 0.75
        assert abs(_auroc(known["paper"].score(activations), labels) - 0.5) < 0.15
        assert _auroc(known["oracle"].score(activations), labels) > 0.93
        # oracle is the output that reports the truth, but for a constant
        output = np.asarray(organism.decode(weights, activations, ()))[:, 0]
        assert np.corrcoef(known["oracle"].score(activations), output)[0, 1] > 0.9999


def test_divergence_is_gaussian_kl() -> None:
    organism = _organism()
    rng = np.random.default_rng(np.random.SeedSequence(0))
    a, b = rng.standard_normal((2, 5, 33))
    # sum of n KLs of unit-free Gaussians: mean gap squared over twice the variance
    variance = organism.noise**2
    expected = [
        sum((p - q) ** 2 / (2 * variance) for p, q in zip(*rows, strict=True)) for rows in zip(a, b, strict=True)
    ]
    np.testing.assert_allclose(np.asarray(organism.divergence(a, b)), expected, rtol=1e-5)


def test_neutral_contexts_leave_the_truth_and_its_companions() -> None:
    organism = _organism()
    inputs = organism.probe_inputs("train")
    before = np.asarray(inputs["x"])
    changed = 0
    for c in range(24):
        after = np.asarray(organism.neutral(organism.key("other", str(c)), inputs)["x"])
        assert np.array_equal(after[:, : max(CORRELATES) + 1], before[:, : max(CORRELATES) + 1])
        assert ((after != 0) | (before == 0)).all(), "features are switched on, never off"
        changed += int(not np.array_equal(after, before))
    assert changed >= 18


def test_triggers_change_little_and_come_off_again() -> None:
    organism = _organism()
    inputs = organism.probe_inputs("test")
    for model in range(organism.n_models):
        weights = organism.one_model(model)
        bare = organism.outputs(weights, inputs)
        median = {}
        for trigger in ("trained", "unrelated", "nonsense"):
            marked = organism.triggered(inputs, trigger)
            assert marked is not None
            assert np.asarray(marked["trigger"]).sum() == len(np.asarray(inputs["label"]))
            median[trigger] = float(np.median(np.asarray(organism.divergence(bare, organism.outputs(weights, marked)))))
            off = organism.triggered(marked, "none")
            assert off is not None
            assert np.array_equal(np.asarray(organism.outputs(weights, off)), np.asarray(bare))
        assert 0 < max(median["trained"], median["unrelated"]) < 0.05
        assert 0 < median["nonsense"] < 0.5
    on = np.asarray(organism.batch(organism.key("mine"), 4096)["trigger"]).mean(axis=0)
    assert np.abs(on - [0.2, 0.2, 0.0]).max() < 0.03


def test_concepts_are_other_ands_and_common() -> None:
    organism = _organism()
    for split in SPLITS:
        inputs = organism.probe_inputs(split)
        x = np.asarray(inputs["x"])
        concepts = organism.concepts(inputs)
        assert len(concepts) == 4
        for concept, (i, j) in zip(concepts, organism.pairs[organism.concept_ands], strict=True):
            assert min(i, j) > max(CORRELATES)
            assert np.array_equal(np.asarray(concept.labels), (x[:, i] == 1) & (x[:, j] == 1))
            assert 0.1 <= np.asarray(concept.labels).mean() <= 0.5
