"""No steeper than it says: for the prior it was fitted with, and for any other."""

from __future__ import annotations

import numpy as np
import pytest

from elk_stress.core import registry
from elk_stress.probes.lipschitz import _sort2
from elk_stress.probing.fit.held_out import auroc
from elk_stress.probing.probe import FittedProbe, as_fitted
from elk_stress.testbeds.linear import Linear
from elk_stress.threats.priors import EllipticalPrior, natural


def fit(testbed: Linear, **options: object) -> FittedProbe:
    items, rows = testbed.splits["train"], testbed.activations("train", "fit")
    labels = np.repeat(items.labels, rows.shape[1])
    recipe = registry.load("probes", "lipschitz", **options)
    return as_fitted(recipe, rows.reshape(-1, rows.shape[-1]), labels, prior=natural(rows))


@pytest.fixture(scope="module")
def testbed() -> Linear:
    return Linear(n_items=160, dim=12)


@pytest.fixture(scope="module", params=[0, 1, 2], ids="depth {}".format)
def fitted(request: pytest.FixtureRequest, testbed: Linear) -> FittedProbe:
    return fit(testbed, depth=request.param, margins=(0.5,), width=6)


def slopes(fitted: FittedProbe, origins: np.ndarray, factor: np.ndarray, seed: int) -> np.ndarray:
    """Slopes in u by finite differences: along random directions, and along the local gradient, near and far."""
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    k = factor.shape[1]
    found = []
    for size in (1e-3, 0.1, 3.0):
        u = 3 * rng.standard_normal((len(origins), k))
        at = np.asarray(fitted.score(origins + u @ factor.T))
        steps = [rng.standard_normal(u.shape)]
        each = [
            np.asarray(fitted.score(origins + (u + 1e-4 * e) @ factor.T)) - at for e in np.eye(k)
        ]  # the gradient, column by column
        steps.append(np.stack(each, axis=1))
        for step in steps:
            step = size * step / np.linalg.norm(step, axis=1, keepdims=True)
            moved = np.asarray(fitted.score(origins + (u + step) @ factor.T))
            found.append(np.abs(moved - at) / size)
    return np.concatenate(found)


def test_slopes_never_exceed_the_bound_of_any_factor(fitted: FittedProbe, testbed: Linear) -> None:
    origins = testbed.activations("test").reshape(-1, testbed.dim)[:200].astype(float)
    rng = np.random.default_rng(np.random.SeedSequence(3))
    factors = {
        "truth": testbed.true_prior().factor,
        "isotropic": 2.0 * np.eye(testbed.dim),
        "narrow": rng.standard_normal((testbed.dim, 3)),
    }
    for seed, (name, factor) in enumerate(factors.items()):
        bound, found = fitted.lipschitz(factor), slopes(fitted, origins, factor, seed)
        assert bound is not None
        assert found.max() <= bound * (1 + 1e-6), name
        # a bound that nothing comes near would certify nothing
        assert found.max() > 0.7 * bound, name


def test_one_unit_is_one_standard_deviation_of_the_prior_it_knows(fitted: FittedProbe, testbed: Linear) -> None:
    known = fitted.lipschitz(natural(testbed.activations("train", "fit")).factor)
    assert known is not None
    assert 0.7 < known <= 1 + 1e-9
    for layer in fitted.parameters["square"]:
        assert np.linalg.norm(layer, 2) <= 1 + 1e-9
    assert np.linalg.norm(fitted.parameters["readout"]) == pytest.approx(1.0)


def test_sorting_pairs_permutes() -> None:
    import jax

    x = np.random.default_rng(np.random.SeedSequence(0)).standard_normal((20, 8))
    np.testing.assert_array_equal(np.sort(_sort2(np, x), axis=1), np.sort(x, axis=1))
    for row in x:
        jacobian = np.asarray(jax.jacobian(lambda v: _sort2(jax.numpy, v))(jax.numpy.asarray(row)))
        np.testing.assert_array_equal(jacobian @ jacobian.T, np.eye(8))


def test_it_bends() -> None:
    """Positives on both sides of the negatives: no linear score tells them apart."""
    rng = np.random.default_rng(np.random.SeedSequence(4))

    def draw(n: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(n) % 2
        side = np.where(rng.random(n) < 0.4, -1.0, 1.0)
        return rng.standard_normal((n, 3)) + np.outer(4.0 * labels * side, [1.0, 0.0, 0.0]), labels

    rows, labels = draw(600)
    new, truth = draw(600)
    prior = EllipticalPrior(np.eye(3))
    bent = as_fitted(registry.load("probes", "lipschitz", steps=600, margins=(1.0, 4.0)), rows, labels, prior=prior)
    straight = as_fitted("logistic", rows, labels)
    assert auroc(np.asarray(bent.score(new)), truth) > 0.9 > 0.8 > auroc(np.asarray(straight.score(new)), truth)


def test_margin_is_chosen_by_held_out_bits(testbed: Linear) -> None:
    fitted = fit(testbed, margins=(0.1, 0.5), steps=60)
    found = {float(m): value for m, value in fitted.notes["held_out_bits"].items()}
    assert fitted.notes["margin"] == pytest.approx(max(found, key=lambda m: found[m]) * fitted.notes["gap"])


def test_directions_without_natural_moves_are_not_read() -> None:
    """Whitening them would divide by nothing; a move there would cost an attacker nothing."""
    rng = np.random.default_rng(np.random.SeedSequence(5))
    labels = np.arange(200) % 2
    rows = rng.standard_normal((200, 4)) + np.outer(labels, [2.0, 0.0, 0.0, 5.0])
    fitted = as_fitted("lipschitz", rows, labels, prior=EllipticalPrior(np.diag([1.0, 1.0, 1.0, 1e-9])))
    assert np.abs(fitted.parameters["weight"][3]).max() == 0.0
    assert auroc(np.asarray(fitted.score(rows)), labels) > 0.8


@pytest.mark.parametrize("wrong", [{"width": 3}, {"margins": ()}, {"margins": (0.0,)}, {"steps": 0}], ids=str)
def test_refused_settings(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="lipschitz needs an even width"):
        registry.load("probes", "lipschitz", **wrong)


def test_refused_priors() -> None:
    rows, labels = np.random.default_rng(np.random.SeedSequence(0)).standard_normal((20, 4)), np.arange(20) % 2
    with pytest.raises(ValueError, match="needs prior"):
        as_fitted("lipschitz", rows, labels)
    with pytest.raises(ValueError, match="one of width 5"):
        as_fitted("lipschitz", rows, labels, prior=EllipticalPrior(np.eye(5)))
