"""The perceptron probe: it sees what linear probes cannot, and nothing where there is nothing."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from elk_stress.core import registry
from elk_stress.probes.mlp import MLP, _program
from elk_stress.probing.fit.folds import stretch_folds
from elk_stress.probing.probe import FittedProbe, as_fitted
from elk_stress.testing import planted_classes
from elk_stress.thoughts.conformal import auroc


def signs(n: int, seed: int, dim: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Positive where two features have the same sign: no linear function of the features says anything."""
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    rows = rng.standard_normal((n, dim)) * np.linspace(0.2, 20.0, dim) + 100.0
    return rows, (rows[:, 1] > 100.0).astype(int) ^ (rows[:, 4] > 100.0).astype(int) ^ 1


def radius(n: int, seed: int, dim: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Positive where two features are far out: the truth sits in a variance."""
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    labels = rng.integers(0, 2, n)
    rows = rng.standard_normal((n, dim))
    rows[:, :2] *= np.where(labels == 1, 3.0, 0.5)[:, None]
    return rows, labels


@pytest.mark.parametrize("draw", [signs, radius])
def test_it_sees_what_no_linear_probe_sees(draw) -> None:  # type: ignore[no-untyped-def]
    (rows, labels), (fresh, truth) = draw(600, 0), draw(2000, 1)
    found = {name: auroc(as_fitted(name, rows, labels).score(fresh), truth) for name in ("mlp", "logistic")}
    assert found["mlp"] > 0.95
    # chance: the AUROC of 2,000 rows has standard deviation 0.013
    assert abs(found["logistic"] - 0.5) < 0.05


def test_it_is_no_worse_than_logistic_where_the_truth_is_linear() -> None:
    # 600 rows of 200 independent features, three of which tell: one step size per weight would lose 0.2 here
    rng = np.random.default_rng(np.random.SeedSequence(2))
    rows, fresh = rng.standard_normal((600, 200)), rng.standard_normal((3000, 200))
    labels, truth = (x[:, :3].sum(axis=1) > 0 for x in (rows, fresh))
    ours, logistic = (
        auroc(as_fitted(name, rows, labels.astype(int)).score(fresh), truth) for name in ("mlp", "logistic")
    )
    assert logistic > 0.85
    assert ours > logistic - 0.03


def test_shuffled_labels_stay_at_chance() -> None:
    rng = np.random.default_rng(np.random.SeedSequence(3))
    (rows, labels), (fresh, truth) = signs(600, 4), signs(2000, 5)
    fits = [as_fitted("mlp", rows, rng.permutation(labels), seed=seed) for seed in range(8)]
    # each has standard deviation 0.013 from the fresh rows; what shuffled labels share with true ones adds to it
    assert all(abs(auroc(fitted.score(fresh), truth) - 0.5) < 0.1 for fitted in fits)
    # and it does not claim to know: the loss on its own folds is a constant's or nearly
    assert all(fitted.notes["held_out_loss"] > np.log(2) - 0.02 for fitted in fits)


@pytest.mark.parametrize("draw", [signs, radius])
def test_it_is_as_good_as_scikit_learns(draw) -> None:  # type: ignore[no-untyped-def]
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    (rows, labels), (fresh, truth) = draw(600, 6), draw(4000, 7)
    rival = make_pipeline(StandardScaler(), MLPClassifier((64,), alpha=0.01, random_state=0, max_iter=300))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        rival.fit(rows, labels)
    theirs = auroc(rival.predict_proba(fresh)[:, 1], truth)
    ours = auroc(as_fitted("mlp", rows, labels).score(fresh), truth)
    assert theirs > 0.9
    assert ours > theirs - 0.01


def test_the_score_is_a_logit_at_equal_class_frequencies() -> None:
    # two Gaussians four deviations apart: the true log-odds are linear; one class in four is positive
    rng = np.random.default_rng(np.random.SeedSequence(8))
    labels = (rng.random(2000) < 0.25).astype(int)
    rows = rng.standard_normal((2000, 6))
    rows[:, 0] += 2.0 * labels
    fitted = as_fitted("mlp", rows, labels)
    fresh = rng.standard_normal((4000, 6)) + np.eye(6)[0]
    slope, offset = np.polyfit(2.0 * fresh[:, 0] - 2.0, fitted.score(fresh), 1)
    assert slope == pytest.approx(1.0, abs=0.2)
    assert offset == pytest.approx(0.0, abs=0.3)


def test_same_seed_same_probe_and_another_seed_another() -> None:
    rows, labels = signs(600, 9)
    first, again, other = (as_fitted("mlp", rows, labels, seed=seed) for seed in (0, 0, 1))
    for name, value in first.parameters.items():
        np.testing.assert_array_equal(value, again.parameters[name])
    assert not np.array_equal(first.parameters["weight"], other.parameters["weight"])


def test_a_second_fit_of_the_same_shape_compiles_nothing() -> None:
    rows, labels = signs(600, 10)
    probe = MLP()
    probe.fit(rows, labels)
    program = _program(probe.width, probe.steps // 10, probe.learning_rate)
    before = program._cache_size()
    probe.fit(rows + 1.0, 1 - labels, seed=5)
    assert program._cache_size() == before > 0


@pytest.mark.parametrize(("items", "contexts"), [(60, 10), (60, 1), (41, 7)])
def test_the_rows_of_an_item_are_held_out_together(items: int, contexts: int) -> None:
    rng = np.random.default_rng(np.random.SeedSequence(11))
    labels = np.repeat(rng.permutation(np.arange(items) % 2), contexts)
    fold = stretch_folds(labels, 8).reshape(items, contexts)
    assert (fold == fold[:, :1]).all()
    sizes = np.bincount(fold[:, 0], minlength=8)
    assert items // 16 <= sizes.min() <= sizes.max() <= items // 4


def test_rows_that_are_sorted_by_label_still_makestretch_folds() -> None:
    fold = stretch_folds(np.repeat([0, 1], 300), 8)
    for half in (fold[:300], fold[300:]):
        assert set(np.bincount(half).tolist()) <= {36, 37, 38, 39}


def test_it_does_not_learn_items_by_heart() -> None:
    # labels of items are noise, but each item has eight rows: rows in random folds would vouch for each other
    rng = np.random.default_rng(np.random.SeedSequence(12))
    means = rng.standard_normal((60, 20))
    rows = np.repeat(means, 8, axis=0) + 0.1 * rng.standard_normal((480, 20))
    labels = np.repeat(np.arange(60) % 2, 8)
    assert as_fitted("mlp", rows, labels).notes["held_out_loss"] > 0.6
    order = rng.permutation(480)
    assert as_fitted("mlp", rows[order], labels[order]).notes["held_out_loss"] < 0.4


def test_more_rows_than_a_batch_are_all_used() -> None:
    (rows, labels), (fresh, truth) = signs(600, 13), signs(2000, 14)
    few = as_fitted(registry.load("probes", "mlp", batch=100), rows, labels)
    assert auroc(few.score(fresh), truth) > 0.95
    # the second half alone is another probe
    assert not np.array_equal(
        few.parameters["weight"],
        as_fitted(registry.load("probes", "mlp", batch=100), rows[:500], labels[:500]).parameters["weight"],
    )


@pytest.mark.parametrize("positives", [1, 2, 5])
def test_few_rows_of_a_class_are_enough_to_fit(positives: int) -> None:
    data = planted_classes(separation=8.0)
    chosen = np.concatenate([np.flatnonzero(data.labels == 1)[:positives], np.flatnonzero(data.labels == 0)[:40]])
    fitted = as_fitted("mlp", data.activations[chosen], data.labels[chosen])
    assert np.isfinite(fitted.score(data.activations)).all()
    assert len(fitted.notes["steps"]) == positives


def test_far_out_the_score_and_its_gradient_are_finite() -> None:
    import torch

    rows, labels = signs(600, 15)
    fitted = as_fitted("mlp", rows, labels)
    far = torch.tensor(rows[:4] * 1e5, dtype=torch.float32, requires_grad=True)
    scores = fitted.score(far)
    (slope,) = torch.autograd.grad(scores.sum(), far)
    assert torch.isfinite(scores).all()
    assert torch.isfinite(slope).all()
    assert (slope.abs().sum(dim=1) > 0).all()


def test_a_constant_feature_gets_no_weight_and_options_come_back(tmp_path) -> None:  # type: ignore[no-untyped-def]
    rows, labels = signs(600, 16)
    rows = np.concatenate([rows, np.full((600, 1), 1e4)], axis=1)
    fitted = as_fitted(registry.load("probes", "mlp", decays=(1, 2), steps=10), rows, labels)
    assert not fitted.parameters["weight"][-1].any()
    assert FittedProbe.load(fitted.save(tmp_path)).probe == MLP(decays=(1.0, 2.0), steps=10)


@pytest.mark.parametrize(
    "options", [{"width": 0}, {"steps": 3}, {"decays": ()}, {"decays": (-1.0,)}, {"learning_rate": 0.0}]
)
def test_bad_options_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match="mlp needs"):
        MLP(**options)
