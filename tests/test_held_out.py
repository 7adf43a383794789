"""Folds by item, and the two figures by which hyperparameters are chosen."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from elk_stress.probes.mass_mean import MassMean
from elk_stress.probing.fit.held_out import auroc, fewest_columns, held_out, held_out_auroc, item_folds, kept_bits


@pytest.mark.parametrize("contexts", [1, 3, 7])
def test_rows_of_an_item_stay_together_and_classes_are_dealt_evenly(contexts: int) -> None:
    items = np.array([0, 1, 1, 0, 1, 0, 0, 0, 1, 1, 0, 1])
    labels = np.repeat(items, contexts)
    fold = item_folds(labels, 3)
    assert (fold.reshape(len(items), contexts) == fold[::contexts, None]).all()
    for label in (0, 1):
        np.testing.assert_array_equal(np.bincount(fold[::contexts][items == label]), [2, 2, 2])


def test_sorted_rows_count_as_items_of_their_own() -> None:
    fold = item_folds(np.repeat([0, 1], 6), 3)
    np.testing.assert_array_equal(np.bincount(fold), [4, 4, 4])


def test_one_item_a_class_serves_as_both() -> None:
    ((learned, judged),) = held_out(np.array([0, 1]), 3)
    np.testing.assert_array_equal(learned, judged)


def test_auroc_agrees_with_scikit_learn_with_ties() -> None:
    rng = np.random.default_rng(np.random.SeedSequence(0))
    labels, scores = rng.integers(0, 2, 200), rng.integers(0, 6, 200).astype(float)
    assert auroc(scores, labels) == pytest.approx(roc_auc_score(labels, scores))


def test_memory_of_an_item_is_no_evidence() -> None:
    """A probe that looks rows up scores at chance: its own items' other rows are never held out."""
    rng = np.random.default_rng(np.random.SeedSequence(1))
    items, contexts = 200, 4
    labels = np.repeat(np.arange(items) % 2, contexts)
    rows = np.repeat(rng.standard_normal((items, 8)), contexts, axis=0) + 0.01 * rng.standard_normal((800, 8))

    def nearest(a: np.ndarray, b: np.ndarray):  # type: ignore[no-untyped-def]
        return SimpleNamespace(score=lambda x: b[np.argmin(((x[:, None] - a) ** 2).sum(-1), axis=1)] + 1e-3 * x[:, 0])

    # standard deviation about 0.04
    assert abs(held_out_auroc(nearest, rows, labels, 4) - 0.5) < 0.2
    shuffled = rng.permutation(800)
    assert held_out_auroc(nearest, rows[shuffled], labels[shuffled], 4) > 0.99


def test_kept_bits_of_a_half_space() -> None:
    scores, labels = np.array([0.0, 0.0, 0.0, 6.0, -1.0]), np.array([0, 0, 0, 1, 1])
    assert kept_bits(scores, labels, 2.0, 0.05) == pytest.approx(-norm.logsf(3.0) / np.log(2) / 2)


def test_the_fewest_columns_within_tolerance() -> None:
    """Two columns hold the classes; a third is noise, and what it gains by chance lies within the tolerance."""
    rng = np.random.default_rng(np.random.SeedSequence(2))
    labels = np.arange(600) % 2
    rows = rng.standard_normal((600, 4)) + 1.2 * labels[:, None] * np.array([1.0, 1.0, 0.0, 0.0])
    for tolerance, expected in ((0.02, 2), (0.5, 1)):
        chosen, found = fewest_columns(MassMean().fit, rows, labels, (1, 2, 4), tolerance=tolerance, folds=3)
        assert chosen == expected
        # AUROC of two classes at Mahalanobis distance d: Phi(d / sqrt 2)
        assert found == pytest.approx({str(q): norm.cdf(1.2 * np.sqrt(min(q, 2) / 2)) for q in (1, 2, 4)}, abs=0.04)


def test_sorted_rows_of_several_contexts_split_few_items() -> None:
    """A run of labels says nothing of items: stretches split at most one item per cut, equal classes or not."""
    for negatives, contexts in ((60, 8), (61, 8), (60, 1)):
        labels = np.repeat([0, 1], [negatives * contexts, 60 * contexts])
        fold = item_folds(labels, 3).reshape(-1, contexts)
        # five cuts a class
        assert (fold != fold[:, :1]).any(axis=1).sum() <= 10
        assert set(fold.ravel()) == {0, 1, 2}


def test_items_of_different_numbers_of_contexts_split_few_items() -> None:
    contexts = np.array([3, 4, 5] * 40)
    item = np.repeat(np.arange(120), contexts)
    fold = item_folds(np.repeat([0, 1], 60)[item], 3)
    assert sum(len(set(fold[item == i])) > 1 for i in range(120)) <= 10
