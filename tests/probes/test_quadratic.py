"""The quadratic probe: it finds planted products and variances, and is a linear probe where there are none."""

from __future__ import annotations

import numpy as np
import pytest

from elk_stress.probes.quadratic import Quadratic, _steepest
from elk_stress.probing.fit.folds import cross_weights
from elk_stress.probing.probe import FittedProbe, as_fitted
from elk_stress.thoughts.conformal import auroc


def products(n: int, seed: int, dim: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Positive where two features have the same sign: no linear function of the features says anything."""
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    rows = rng.standard_normal((n, dim)) * np.linspace(0.2, 20.0, dim) + 100.0
    return rows, (rows[:, 1] > 100.0).astype(int) ^ (rows[:, 4] > 100.0).astype(int) ^ 1


def shells(n: int, seed: int, dim: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Two Gaussians of equal mean, the positives three times as wide in one feature: the log-odds are its square."""
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    labels = rng.integers(0, 2, n)
    rows = rng.standard_normal((n, dim))
    rows[:, 3] *= np.where(labels == 1, 3.0, 1.0)
    return rows, labels


def test_it_finds_products_that_no_linear_probe_sees() -> None:
    (rows, labels), (fresh, truth) = products(600, 0), products(2000, 1)
    fitted = as_fitted("quadratic", rows, labels)
    assert auroc(fitted.score(fresh), truth) > 0.97
    # chance: the AUROC of 2,000 rows has standard deviation 0.013
    assert abs(auroc(as_fitted("logistic", rows, labels).score(fresh), truth) - 0.5) < 0.05
    # a product is a difference of two squares: one of each sign
    assert fitted.notes["rank"] == 2
    assert sorted(fitted.parameters["square"][1:3]) == [-1.0, 1.0]
    assert not fitted.parameters["weight"][:, 3:].any()
    assert not fitted.parameters["square"][3:].any()


def test_it_finds_the_log_odds_of_two_gaussians() -> None:
    """They are ``x3^2 (1 - 1/9) / 2 + const``: the probe's form must be that, but for its penalty."""
    fitted = as_fitted(Quadratic(penalties=(1e-4,), ranks=(1,)), *shells(8000, 2))
    weight = fitted.parameters["weight"][:, 1]
    assert fitted.parameters["square"].tolist() == [0.0, 1.0]
    assert weight[3] ** 2 == pytest.approx((1 - 1 / 9) / 2, rel=0.1)
    assert np.abs(np.delete(weight, 3)).max() < 0.1 * abs(weight[3])


def test_it_is_linear_where_the_truth_is() -> None:
    rng = np.random.default_rng(np.random.SeedSequence(2))
    rows, fresh = rng.standard_normal((600, 200)), rng.standard_normal((3000, 200))
    labels, truth = (x[:, :3].sum(axis=1) > 0 for x in (rows, fresh))
    fitted = as_fitted("quadratic", rows, labels.astype(int))
    logistic = auroc(as_fitted("logistic", rows, labels.astype(int)).score(fresh), truth)
    assert fitted.notes["rank"] == 0
    assert auroc(fitted.score(fresh), truth) > logistic - 0.02


def test_shuffled_labels_stay_at_chance() -> None:
    rng = np.random.default_rng(np.random.SeedSequence(3))
    (rows, labels), (fresh, truth) = products(600, 4), products(2000, 5)
    fits = [as_fitted("quadratic", rows, rng.permutation(labels), seed=seed) for seed in range(4)]
    assert all(abs(auroc(fitted.score(fresh), truth) - 0.5) < 0.15 for fitted in fits)
    assert all(fitted.notes["held_out_loss"] > 0.68 for fitted in fits)


def test_the_start_is_where_the_loss_falls_fastest() -> None:
    """Against finite differences of the class-balanced log-loss of ``t (v . z)^2`` at t = 0."""
    rows, labels = products(400, 6, dim=6)
    rows = ((rows - rows.mean(axis=0)) / rows.std(axis=0)).astype(np.float32)
    learned, _ = cross_weights(labels, 3)
    vectors, signs = _steepest(rows, labels, learned[:, -1], 6)

    def slope(vector: np.ndarray) -> float:
        margin = (1.0 - 2.0 * labels) * (rows @ vector) ** 2
        up, down = (learned[:, -1] @ np.logaddexp(0.0, t * margin) for t in (1e-4, -1e-4))
        return float(up - down) / 2e-4

    slopes = np.array([slope(vector) for vector in vectors.T])
    assert (slopes * signs < 0).all()
    assert (np.diff(np.abs(slopes)) < 1e-6).all()
    rng = np.random.default_rng(np.random.SeedSequence(7))
    others = rng.standard_normal((200, 6))
    others /= np.linalg.norm(others, axis=1, keepdims=True)
    assert max(abs(slope(v)) for v in others) < abs(slopes[0]) + 1e-6


def test_folds_do_not_learn_from_what_they_are_judged_on() -> None:
    """Rows of an item stand together: a member never sees a row of an item that it is judged on."""
    items = np.repeat(np.arange(40), 4)
    labels = np.repeat(np.random.default_rng(np.random.SeedSequence(8)).integers(0, 2, 40), 4)
    learned, judged = cross_weights(labels, 3)
    assert learned.shape == judged.shape == (160, 4)
    for member in range(3):
        assert not set(items[learned[:, member] > 0]) & set(items[judged[:, member] > 0])
    assert (learned[:, 3] > 0).all()
    assert not judged[:, 3].any()
    for weights in (learned, judged[:, :3]):
        np.testing.assert_allclose(weights[labels == 1].sum(axis=0), 0.5)
        np.testing.assert_allclose(weights[labels == 0].sum(axis=0), 0.5)


def test_scores_far_from_the_origin_keep_their_digits() -> None:
    """Activations of size 1e4 with a spread of 1, in float32: the centre is taken off before anything is squared."""
    rows, labels = shells(600, 9)
    near = as_fitted("quadratic", rows, labels)
    far = as_fitted("quadratic", rows + 1e4, labels)
    there = far.score((rows + 1e4).astype(np.float32))
    assert np.corrcoef(near.score(rows), there)[0, 1] > 0.999


def test_wide_activations_take_the_partial_eigenproblem() -> None:
    rng = np.random.default_rng(np.random.SeedSequence(10))
    labels = rng.integers(0, 2, 1500)
    rows = rng.standard_normal((1500, 600)).astype(np.float32)
    rows[:, 7] *= np.where(labels == 1, 3.0, 0.3)
    learned, _ = cross_weights(labels, 3)
    vectors, signs = _steepest(rows, labels, learned[:, -1], 2)
    full = _steepest(rows[:, :512], labels, learned[:, -1], 2)
    assert vectors.shape == (600, 2)
    assert signs[0] == full[1][0] == 1.0
    assert abs(vectors[7, 0]) > 0.8


def test_saved_recipe_comes_back(tmp_path) -> None:  # type: ignore[no-untyped-def]
    rows, labels = products(200, 11)
    fitted = as_fitted(Quadratic(ranks=(0,), penalties=(0.3,)), rows, labels)
    loaded = FittedProbe.load(fitted.save(tmp_path))
    assert loaded.probe == fitted.probe
    np.testing.assert_array_equal(loaded.score(rows), fitted.score(rows))


@pytest.mark.parametrize("bad", [{"ranks": ()}, {"ranks": (-1,)}, {"penalties": (0.0,)}, {"folds": 0}, {"steps": 0}])
def test_bad_options_are_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match="quadratic needs"):
        Quadratic(**bad)
