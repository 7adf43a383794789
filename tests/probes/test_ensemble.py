"""The ensemble over seeds: bootstraps of items, standardized members, linear ones folded into one weight."""

from __future__ import annotations

import numpy as np
import pytest

from elk_stress.probes.ensemble import Ensemble, _bootstrap
from elk_stress.probing.probe import FittedProbe, as_fitted
from elk_stress.testing import planted_classes
from elk_stress.thoughts.conformal import auroc


def noisy(n: int, seed: int, dim: int = 40) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    labels = np.repeat(rng.integers(0, 2, n // 2), 2)
    return rng.standard_normal((n, dim)) + np.outer(labels, np.linspace(0.0, 0.6, dim)), labels


def test_the_linear_ensemble_is_the_mean_of_its_standardized_members() -> None:
    rows, labels = noisy(200, 0)
    recipe = Ensemble(base="logistic", members=3)
    fitted = as_fitted(recipe, rows, labels, seed=5)
    total = np.zeros(200)
    for own in np.random.SeedSequence(5).spawn(3):
        drawn = _bootstrap(labels, np.random.default_rng(own))
        scores = as_fitted("logistic", rows[drawn], labels[drawn]).score(rows)
        total += (scores - scores.mean()) / scores.std() / 3
    np.testing.assert_allclose(fitted.score(rows), total)
    assert set(fitted.parameters) == {"weight", "bias"}
    assert recipe.traits.linear
    assert 0.5 < fitted.notes["agreement"] < 0.999


def test_rows_of_an_item_are_drawn_together() -> None:
    rng = np.random.default_rng(np.random.SeedSequence(1))
    labels = np.repeat(rng.integers(0, 2, 60), 5)
    drawn = _bootstrap(labels, rng)
    assert len(drawn) == 300
    np.testing.assert_array_equal(drawn.reshape(60, 5) - drawn.reshape(60, 5)[:, :1], np.tile(np.arange(5), (60, 1)))
    share = len(np.unique(drawn)) / 300
    assert 0.5 < share < 0.75  # 1 - 1/e of the items are drawn
    # a sorted table says nothing of items: rows are drawn one by one
    drawn = _bootstrap(np.repeat([0, 1], 50), rng)
    assert 45 < len(np.unique(drawn)) < 80


def test_members_see_different_items() -> None:
    labels = np.random.default_rng(np.random.SeedSequence(2)).integers(0, 2, 50)
    first, second = (_bootstrap(labels, np.random.default_rng(s)) for s in np.random.SeedSequence(0).spawn(2))
    assert not np.array_equal(first, second)


def test_a_handful_of_items_still_gives_both_classes() -> None:
    labels = np.array([0, 0, 0, 0, 0, 1])
    for seed in range(40):
        drawn = _bootstrap(labels, np.random.default_rng(np.random.SeedSequence(seed)))
        assert set(labels[drawn]) == {0, 1}


def test_the_ensemble_beats_its_member_where_rows_are_few() -> None:
    """Trees of bagging aside: on noisy data the mean of bootstraps is no worse than a single bootstrap's fit."""
    (rows, labels), (fresh, truth) = noisy(80, 3), noisy(3000, 4)
    single = [
        auroc(as_fitted(Ensemble("logistic", 1), rows, labels, seed=seed).score(fresh), truth) for seed in range(8)
    ]
    many = auroc(as_fitted(Ensemble("logistic", 16), rows, labels).score(fresh), truth)
    assert many > np.mean(single) + 0.01


def test_a_nonlinear_base_keeps_its_members(tmp_path) -> None:  # type: ignore[no-untyped-def]
    data, held_out = planted_classes(seed=2), planted_classes(seed=3)
    fitted = as_fitted(Ensemble("mlp", 2), data.activations, data.labels)
    assert auroc(fitted.score(held_out.activations), held_out.labels) > 0.98
    base, parts = fitted.probe._recipe, []  # type: ignore[attr-defined]
    for k in range(2):
        own = {name[2:]: value for name, value in fitted.parameters.items() if name.startswith(f"{k}.")}
        scores = base.score(np, own, data.activations)
        parts.append((scores - scores.mean()) / scores.std())
    assert not np.allclose(parts[0], parts[1])
    np.testing.assert_allclose(fitted.score(data.activations), np.mean(parts, axis=0))
    loaded = FittedProbe.load(fitted.save(tmp_path))
    assert loaded.probe == fitted.probe
    np.testing.assert_array_equal(loaded.score(data.activations), fitted.score(data.activations))


def test_pairs_are_drawn_with_their_items() -> None:
    data, held_out = planted_classes(seed=2), planted_classes(seed=3)
    recipe = Ensemble("ccs", 2)
    assert recipe.traits.needs_pairs
    fitted = as_fitted(recipe, data.activations, data.labels, pairs=data.pairs)
    assert auroc(fitted.score(held_out.activations), held_out.labels) > 0.95
    with pytest.raises(ValueError, match="pairs"):
        as_fitted(recipe, data.activations, data.labels)


def test_the_base_of_negatives_draws_among_negatives() -> None:
    labels = np.array([0, 0, 1, 0, 1, 0, 0, 0, 1, 0])
    drawn = _bootstrap(labels, np.random.default_rng(np.random.SeedSequence(0)), negatives_only=True)
    assert (labels[drawn[:7]] == 0).all()
    np.testing.assert_array_equal(drawn[7:], np.flatnonzero(labels))


def test_constant_members_say_nothing() -> None:
    rows, labels = noisy(40, 6)
    fitted = as_fitted(Ensemble("rock", 2), rows, labels)
    assert np.isfinite(fitted.score(rows)).all()
    assert not Ensemble("rock").traits.learns


@pytest.mark.parametrize("base", ["max_pool", "ensemble"])
def test_unsuitable_bases_are_refused(base: str) -> None:
    with pytest.raises(ValueError, match="one activation per item"):
        Ensemble(base)
    with pytest.raises(ValueError, match="at least 1 member"):
        Ensemble(members=0)
