"""Contrastive representation clustering against scikit-learn's PCA and Platt scaling, and what it promises."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from elk_stress.core import registry
from elk_stress.probes.crc import CRC
from elk_stress.probing.fit.pairs import platt_scaling
from elk_stress.probing.probe import as_fitted
from elk_stress.testing import planted_classes


def test_it_is_scikit_learns_first_component_of_the_differences() -> None:
    """Away from the direction of the halves' means, which a single statement's score must not read."""
    data = planted_classes()
    plus, minus = (data.activations[data.pairs[:, i]] for i in (0, 1))
    spread = np.sqrt((plus.var(axis=0) + minus.var(axis=0)) / 2)
    form = (plus.mean(axis=0) - minus.mean(axis=0)) / spread
    form /= np.linalg.norm(form)
    keep = np.eye(len(form)) - np.outer(form, form)
    rival = PCA(n_components=1).fit((plus - minus) / spread @ keep)
    fitted = as_fitted("crc", data.activations, data.labels, pairs=data.pairs)
    direction = fitted.parameters["weight"] * spread
    assert abs(direction @ rival.components_[0]) == pytest.approx(1.0, abs=1e-9)
    assert fitted.notes["variance_share"] == pytest.approx(rival.explained_variance_ratio_[0])


def test_a_single_statement_scores_alike_in_either_half() -> None:
    data = planted_classes()
    fitted = as_fitted("crc", data.activations, data.labels, pairs=data.pairs)
    plus, minus = (data.activations[data.pairs[:, i]].mean(axis=0) for i in (0, 1))
    assert abs((plus - minus) @ fitted.parameters["weight"]) < 1e-9
    assert np.linalg.norm(plus - minus) > 1.9


def test_labels_settle_the_sign_only() -> None:
    data = planted_classes()
    upright = as_fitted("crc", data.activations, data.labels, pairs=data.pairs)
    noisy = data.labels.copy()
    noisy[data.pairs[:40].ravel()] ^= 1
    again = as_fitted("crc", data.activations, noisy, pairs=data.pairs)
    np.testing.assert_array_equal(upright.parameters["weight"], again.parameters["weight"])
    assert upright.notes["sign_agreement"] > 0.95
    assert again.notes["sign_agreement"] == pytest.approx(upright.notes["sign_agreement"] - 0.25, abs=0.03)


@pytest.mark.parametrize("platt", [False, True])
def test_swapped_labels_negate_the_score(platt: bool) -> None:
    data = planted_classes(separation=2.0)
    recipe = CRC(platt=platt)
    upright = as_fitted(recipe, data.activations, data.labels, pairs=data.pairs)
    swapped = as_fitted(recipe, data.activations, 1 - data.labels, pairs=data.pairs)
    np.testing.assert_allclose(upright.score(data.activations), -swapped.score(data.activations), atol=1e-9)


def test_platt_scaling_is_the_likeliest_line() -> None:
    """Against scikit-learn's logistic regression without a penalty, on Platt's targets as weighted copies."""
    rng = np.random.default_rng(np.random.SeedSequence(0))
    targets = np.repeat([0.0, 1.0], [60, 40])
    scores = rng.standard_normal(100) * 3 + targets * 2 + 5
    n1, n0 = 40, 60
    wanted = np.where(targets == 1, (n1 + 1) / (n1 + 2), 1 / (n0 + 2))
    rival = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(
        np.tile(scores, 2)[:, None], np.repeat([1, 0], 100), sample_weight=np.concatenate([wanted, 1 - wanted])
    )
    np.testing.assert_allclose(platt_scaling(scores, targets), [rival.coef_[0, 0], rival.intercept_[0]], rtol=1e-4)


def test_platt_scaling_calibrates_and_keeps_the_ranking() -> None:
    train, test = planted_classes(400, separation=2.0, seed=1), planted_classes(1000, separation=2.0, seed=2)
    plain, scaled = (as_fitted(CRC(platt=p), train.activations, train.labels, pairs=train.pairs) for p in (False, True))
    raw, logits = plain.score(test.activations), scaled.score(test.activations)
    np.testing.assert_array_equal(np.argsort(raw), np.argsort(logits))
    chance = 1 / (1 + np.exp(-logits))
    confident = np.abs(logits) > 1.0
    assert chance[confident & (logits > 0)].mean() == pytest.approx(
        test.labels[confident & (logits > 0)].mean(), abs=0.05
    )
    # separable classes must not send the slope to infinity
    far = planted_classes(separation=30.0)
    assert np.isfinite(as_fitted(CRC(platt=True), far.activations, far.labels, pairs=far.pairs).notes["platt_slope"])


def test_a_component_that_is_not_the_truth_is_followed_and_noted() -> None:
    """A larger planted direction of disagreement, independent of the labels: unsupervised clustering takes it."""
    data = planted_classes(separation=4.0)
    rng = np.random.default_rng(np.random.SeedSequence(5))
    loud = np.zeros(data.activations.shape[1])
    loud[[3, 9]] = 1.0, -1.0
    side = rng.choice([-1.0, 1.0], len(data.pairs))
    rows = data.activations.copy()
    rows[data.pairs[:, 0]] += 30 * side[:, None] * loud
    rows[data.pairs[:, 1]] -= 30 * side[:, None] * loud
    # without the shared spread per feature it would be larger still; it must win over the truth all the same
    rows = rows @ np.linalg.qr(rng.standard_normal((16, 16)))[0]
    fitted = as_fitted("crc", rows, data.labels, pairs=data.pairs)
    assert fitted.notes["sign_agreement"] < 0.7
    assert roc_auc_score(data.labels, fitted.score(rows)) < 0.7


def test_refusals_name_the_probe() -> None:
    data = planted_classes()
    with pytest.raises(ValueError, match="crc learns from contrast pairs"):
        as_fitted("crc", data.activations, data.labels)
    same = data.activations.copy()
    same[data.pairs[:, 1]] = same[data.pairs[:, 0]] + 1.0
    with pytest.raises(ValueError, match="crc: the differences of the pairs do not vary"):
        registry.load("probes", "crc").fit(same, data.labels, pairs=data.pairs)
