"""Units: no probe sees less because a few features hold nearly all variance, as they do in real language models.

Activations are rewritten feature by feature (one of noise times 1000, an informative one times 1000, units spread over
six decades, an offset of 1e4), and the prior and what behaviour depends on with them. Every registered probe must rank
new rows as before, but for those whose definition speaks of lengths.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from sklearn.covariance import OAS, LedoitWolf
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from elk_stress.core import registry
from elk_stress.probing.fit.streaming import fit_streaming
from elk_stress.probing.probe import as_fitted
from elk_stress.threats.priors import EllipticalPrior

DIM = 24
# what their docstrings define is a length in the units of the activations
LENGTHS = {
    "mass_mean": "the difference of the class means itself",
    "random_direction": "a direction drawn alike in all directions: a control that learns nothing",
    "causal": "the leading directions of what the output depends on, nats per unit of length",
}


def world(seed: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Correlated rows of two classes in turn, so that each two are a pair; feature 0 is noise, 1 informative."""
    plan, rng = (np.random.default_rng(np.random.SeedSequence([0, 5, s])) for s in (0, seed))
    mix = 0.4 * plan.standard_normal((DIM, DIM)) + np.eye(DIM)
    truth = plan.standard_normal(DIM)
    truth *= 2.2 / np.linalg.norm(truth)
    truth[:2] = 0.0, 1.2
    labels = np.arange(n) % 2
    rows = rng.standard_normal((n, DIM)) @ mix
    rows[:, 0] = rng.standard_normal(n)
    return rows + labels[:, None] * truth, labels


def scaled(feature: int) -> np.ndarray:
    return np.where(np.arange(DIM) == feature, 1000.0, 1.0)


CHANGES: dict[str, tuple[np.ndarray, float]] = {
    "noise x 1000": (scaled(0), 0.0),
    "informative x 1000": (scaled(1), 0.0),
    "informative / 1000": (1 / scaled(1), 0.0),
    "six decades": (10.0 ** np.random.default_rng(np.random.SeedSequence(1)).uniform(-3, 3, DIM), 0.0),
    "all tiny": (np.full(DIM, 1e-9), 0.0),
    "offset 1e4": (np.ones(DIM), 1e4),
}


def fitted_scores(name: str, units: np.ndarray, offset: float) -> tuple[np.ndarray, np.ndarray]:
    recipe: Any = registry.load("probes", name)
    (rows, labels), (test, truth) = world(1, 240), world(2, 600)

    def given(at: np.ndarray) -> np.ndarray:
        at = at * units + offset
        return np.stack([at, at], axis=1) if recipe.traits.tokens else at

    extra: dict[str, Any] = {}
    if recipe.traits.needs_pairs:
        extra["pairs"] = np.arange(len(rows)).reshape(-1, 2)
    if recipe.traits.needs_prior:
        extra["prior"] = EllipticalPrior(np.diag(0.5 * units))
    if recipe.traits.needs_behaviour:
        extra["behaviour"] = np.random.default_rng(np.random.SeedSequence(4)).standard_normal((8, 2, DIM)) / units
    return np.asarray(as_fitted(recipe, given(rows), labels, **extra).score(given(test))), truth


@cache
def plain(name: str) -> float:
    scores, truth = fitted_scores(name, np.ones(DIM), 0.0)
    return float(roc_auc_score(truth, scores))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", [name for name in registry.names("probes") if name not in LENGTHS])
def test_units_do_not_change_what_a_probe_sees(name: str, change: str) -> None:
    scores, truth = fitted_scores(name, *CHANGES[change])
    assert roc_auc_score(truth, scores) == pytest.approx(plain(name), abs=0.01)


def test_who_is_excused_is_there_and_does_hang_on_units() -> None:
    assert set(LENGTHS) <= set(registry.names("probes"))
    for name in LENGTHS:
        found = [roc_auc_score(truth, s) for s, truth in (fitted_scores(name, *c) for c in CHANGES.values())]
        assert max(abs(auroc - plain(name)) for auroc in found) > 0.01, f"{name} needs no excuse"


LINEAR = {
    "lda": lambda: LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto"),
    "logistic": lambda: LogisticRegression(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", LINEAR)
def test_a_linear_probe_is_not_behind_scikit_learns(name: str, change: str) -> None:
    units, offset = CHANGES[change]
    (rows, labels), (test, truth) = world(1, 240), world(2, 600)
    rival = make_pipeline(StandardScaler(), LINEAR[name]()).fit(rows * units + offset, labels)
    ours, _ = fitted_scores(name, units, offset)
    theirs = roc_auc_score(truth, rival.decision_function(test * units + offset))
    assert theirs > 0.85
    assert roc_auc_score(truth, ours) > theirs - 0.03


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["mahalanobis", "logistic_tails"])
def test_a_distance_is_not_behind_scikit_learns(name: str, change: str) -> None:
    units, offset = CHANGES[change]
    (rows, labels), (test, truth) = world(1, 240), world(2, 600)
    scaler = StandardScaler().fit(rows[labels == 0] * units + offset)
    known, new = (scaler.transform(at * units + offset) for at in (rows[labels == 0], test))
    ours = roc_auc_score(truth, fitted_scores(name, units, offset)[0])
    for rival in (OAS(), LedoitWolf()):
        assert ours > roc_auc_score(truth, rival.fit(known).mahalanobis(new)) - 0.03


@pytest.mark.parametrize("name", ["lda", "mahalanobis"])
def test_scores_are_the_same_number_in_any_units_however_they_were_gathered(name: str) -> None:
    (rows, labels), (test, _) = world(1, 240), world(2, 600)
    base = np.asarray(as_fitted(name, rows, labels).score(test))
    for units in (scaled(0), scaled(1), CHANGES["six decades"][0], CHANGES["all tiny"][0]):
        batches = [(rows[i : i + 7] * units, labels[i : i + 7]) for i in range(0, 240, 7)]
        for fitted in (as_fitted(name, rows * units, labels), fit_streaming(name, batches)):
            np.testing.assert_allclose(np.asarray(fitted.score(test * units)), base, rtol=1e-10, atol=1e-10)
