"""Robust logistic regression is exact; the radius is chosen on training rows; other bases are refitted."""

from __future__ import annotations

import numpy as np
import pytest

from elk_stress.core import registry
from elk_stress.core.bits import bits_of_beta
from elk_stress.probes.adversarially_trained import robust_logistic, worst_rows
from elk_stress.probing.probe import FittedProbe, as_fitted
from elk_stress.testbeds.linear import Linear
from elk_stress.threats.priors import EllipticalPrior, natural


def data(seed: int = 0):  # type: ignore[no-untyped-def]
    """Two features tell the classes apart, the second better; natural thoughts move the second ten times as far."""
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    labels = np.arange(400) % 2
    sign = 2.0 * labels - 1
    rows = rng.standard_normal((400, 4)) * [1.0, 1.0, 1.0, 1.0] + sign[:, None] * [1.5, 2.5, 0.0, 0.0]
    factor = np.diag([0.2, 2.0, 0.5, 0.5])
    return rows, labels, EllipticalPrior(factor)


def test_without_a_radius_it_is_logistic_regression() -> None:
    rows, labels, prior = data()
    ours = as_fitted(registry.load("probes", "adversarially_trained", radius=0.0), rows, labels, prior=prior)
    plain = as_fitted("logistic", rows, labels)
    np.testing.assert_allclose(ours.parameters["weight"], plain.parameters["weight"], atol=1e-4)
    np.testing.assert_allclose(ours.parameters["bias"], plain.parameters["bias"], atol=1e-4)


@pytest.mark.parametrize("radius", [0.5, 1.5])
def test_it_is_where_the_worst_case_loss_is_least(radius: float) -> None:
    """The objective is written out anew, every row moved in full by the worst move of its length."""
    rows, labels, prior = data()
    weight, bias, converged = robust_logistic(rows, labels, prior.factor, radius, 0.01)
    assert converged
    sign, sd = 2.0 * labels - 1, rows.std(axis=0)
    share = np.where(labels == 1, 0.5 / 200, 0.5 / 200)

    def loss(w: np.ndarray, b: float) -> float:
        length = np.linalg.norm(prior.factor.T @ w)
        worst = rows - sign[:, None] * radius * (prior.factor @ prior.factor.T @ w / length)
        return float(share @ np.logaddexp(0, -sign * (worst @ w + b)) + 0.005 * np.sum((w * sd) ** 2))

    least = loss(weight, bias)
    rng = np.random.default_rng(np.random.SeedSequence(1))
    for size in (1e-3, 1e-2, 0.1, 1.0):
        for _ in range(20):
            away = size * rng.standard_normal(5)
            assert loss(weight + away[:4] / sd, bias + away[4]) > least - 1e-9


def test_training_turns_it_from_what_moves_freely() -> None:
    rows, labels, prior = data()
    ratios = [
        abs(w[1] / w[0]) for w in (robust_logistic(rows, labels, prior.factor, r, 0.01)[0] for r in (0.0, 1.0, 2.0))
    ]
    assert ratios[0] > 1.0
    assert ratios[0] > 2 * ratios[1] > 4 * ratios[2]


def test_beyond_what_can_be_separated_it_is_a_constant_that_is_not_chosen() -> None:
    rows, labels, prior = data()
    assert not robust_logistic(rows, labels, prior.factor, 50.0, 0.01)[0].any()
    recipe = registry.load("probes", "adversarially_trained", radii=(1.0, 50.0))
    assert as_fitted(recipe, rows, labels, prior=prior).notes["radius"] == 1.0


def test_the_radius_is_chosen_on_some_of_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, labels, prior = data()
    many = -(-50_000 // len(rows))
    kind = registry.load("probes", "adversarially_trained", radii=(0.0, 1.0))
    seen: list[tuple[int, float]] = []

    def counted(self, x, y, factor, radius):  # type: ignore[no-untyped-def]
        seen.append((len(x), float(y.mean())))
        return radius

    monkeypatch.setattr(type(kind), "_held_out_bits", counted)
    as_fitted(kind, np.tile(rows, (many, 1)), np.tile(labels, many), prior=prior)
    as_fitted(kind, rows, labels, prior=prior)
    assert all(10_000 < n <= 20_000 and abs(share - labels.mean()) < 0.05 for n, share in seen[:2])
    assert [n for n, _ in seen[2:]] == [len(rows)] * 2


def test_a_radius_that_only_folds_can_separate_is_stepped_down(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, labels, prior = data()
    kind = registry.load("probes", "adversarially_trained", radii=(0.0, 1.0, 2.0, 50.0))
    # folds prefer the radius at which all rows together give a constant
    monkeypatch.setattr(type(kind), "_held_out_bits", lambda self, rows, targets, factor, radius: radius)
    fitted = as_fitted(kind, rows, labels, prior=prior)
    assert fitted.parameters["weight"].any()
    assert (fitted.notes["preferred"], fitted.notes["radius"], fitted.notes["edge_of_grid"]) == (50.0, 2.0, True)
    only = registry.load("probes", "adversarially_trained", radii=(50.0,))
    with pytest.raises(ValueError, match="add smaller radii"):
        as_fitted(only, rows, labels, prior=prior)


def test_where_there_is_nothing_to_learn_it_is_logistic_regression_at_radius_zero() -> None:
    rows, labels, prior = data()
    # what an attack that erases the classes leaves: each row occurs once as a positive and once as a negative
    erased, both = np.concatenate([rows, rows]), np.concatenate([labels, 1 - labels])
    fitted = as_fitted(registry.load("probes", "adversarially_trained"), erased, both, prior=prior)
    assert np.abs(fitted.score(rows)).max() < 1e-3


def test_worst_rows_of_a_linear_probe_are_the_closed_form() -> None:
    rows, labels, prior = data()
    fitted = as_fitted("logistic", rows, labels)
    weight = fitted.parameters["weight"]
    moved = worst_rows(fitted, rows, labels, prior.factor, 1.5)
    change = np.asarray(fitted.score(moved)) - np.asarray(fitted.score(rows))
    np.testing.assert_allclose(change, (1 - 2 * labels) * 1.5 * np.linalg.norm(prior.factor.T @ weight), rtol=1e-4)
    assert np.linalg.norm(prior.inverse(moved - rows), axis=1).max() < 1.5 * (1 + 1e-5)


@pytest.fixture(scope="module")
def testbed() -> Linear:
    return Linear(n_items=240)


def fit(testbed: Linear, recipe: object) -> FittedProbe:
    items = testbed.splits["train"]
    rows = testbed.activations("train", "fit")
    labels = np.repeat(items.labels, rows.shape[1])
    return as_fitted(recipe, rows.reshape(-1, rows.shape[-1]), labels, prior=natural(rows))  # type: ignore[arg-type]


def bits(testbed: Linear, fitted: FittedProbe) -> float:
    """Median bits of test positives at the threshold of 5% of calibration negatives, under the true prior."""
    rows, labels = testbed.activations("calibration"), testbed.splits["calibration"].labels
    threshold = np.quantile(np.asarray(fitted.score(rows[labels == 0])), 0.95)
    test = testbed.activations("test")[testbed.splits["test"].labels == 1].mean(axis=1)
    deviation = testbed.true_prior().standard_deviation(fitted.parameters["weight"])
    return float(np.median(bits_of_beta((np.asarray(fitted.score(test)) - threshold) / deviation)))


def test_it_buys_bits_on_the_linear_testbed(testbed: Linear) -> None:
    """A property of this testbed (natural thoughts move some directions far), not of the method."""
    robust = fit(testbed, registry.load("probes", "adversarially_trained"))
    found = {float(r): value for r, value in robust.notes["held_out_bits"].items()}
    assert found[robust.notes["radius"]] == max(found.values())
    assert robust.notes["radius"] > 0
    assert bits(testbed, robust) > bits(testbed, fit(testbed, "logistic")) + 3


def test_another_base_is_refitted_on_moved_rows() -> None:
    rows, labels, prior = data()
    recipe = registry.load("probes", "adversarially_trained", base="lda", radius=1.0, rounds=1)
    fitted = as_fitted(recipe, rows, labels, prior=prior)
    moved = worst_rows(as_fitted("lda", rows, labels), rows, labels, prior.factor, 1.0)
    by_hand = as_fitted("lda", np.stack([rows, moved], 1).reshape(-1, 4), np.repeat(labels, 2))
    np.testing.assert_allclose(fitted.parameters["weight"], by_hand.parameters["weight"])
    assert fitted.traits.linear
    assert not registry.load("probes", "adversarially_trained", base="mlp").traits.linear


def test_refused() -> None:
    rows, labels, prior = data()
    with pytest.raises(ValueError, match="needs prior"):
        as_fitted("adversarially_trained", rows, labels)
    with pytest.raises(ValueError, match="width 4"):
        as_fitted("adversarially_trained", rows[:, :3], labels, prior=prior)
    with pytest.raises(ValueError, match="must be differentiable and need"):
        as_fitted(registry.load("probes", "adversarially_trained", base="ccs"), rows, labels, prior=prior)
    with pytest.raises(ValueError, match="radii of at least 0"):
        registry.load("probes", "adversarially_trained", radius=-1.0)
