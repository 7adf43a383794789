"""Design points: the nearest failing points, on the boundary, from several starts."""

from __future__ import annotations

import numpy as np
import pytest
from known_answers import KNOWN
from scipy.optimize import minimize

from elk_stress.core.bits import Kind, bits_of_beta
from elk_stress.estimators.design_point import DesignPoint, distinct
from elk_stress.estimators.limit_state import LimitState, from_function


def centres_of(function, dim, **config):
    bits = DesignPoint(**config)(from_function(function, dim), seed=0)[0]
    centres = bits.diagnostics["centres"]
    return bits, centres[~np.isnan(centres[:, 0])]


@pytest.mark.parametrize("name", ["half_space_d2_b5", "half_space_d64_b30"])
def test_half_space_is_its_own_design_point(name):
    case = KNOWN[name]
    bits, centres = centres_of(case.function, case.dim)
    assert bits.kind is Kind.DISTANCE
    assert bits.status == "ok"
    assert len(centres) == 1
    assert bits.value == pytest.approx(case.bits, abs=1e-2)


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_centres_lie_on_the_boundary(name):
    case = KNOWN[name]
    bits, centres = centres_of(case.function, case.dim)
    sign = 1.0 if case.function(np.zeros((2, case.dim)))[0] > 0 else -1.0
    step = 2e-3 * (1 + np.linalg.norm(centres, axis=1, keepdims=True))
    outward = centres / np.linalg.norm(centres, axis=1, keepdims=True)
    assert (sign * case.function(centres) <= 1e-9).all()
    assert (sign * case.function(centres - step * outward) > 0).all()
    assert (np.diff(np.linalg.norm(centres, axis=1)) >= 0).all()
    assert bits.value == pytest.approx(float(bits_of_beta(bits.diagnostics["beta"])))


def test_several_starts_find_what_one_start_misses():
    # from the origin alone the gradient leads to a point 20 bits away (RP89); the nearest is 2.784 away, twice
    case = KNOWN["RP89"]
    alone, _ = centres_of(case.function, case.dim, n_starts=1)
    several, centres = centres_of(case.function, case.dim)
    assert alone.value > several.value + 15
    assert np.linalg.norm(centres[:2], axis=1) == pytest.approx(2.784, abs=5e-3)
    assert centres[0, 0] * centres[1, 0] < 0


def test_both_modes_of_rp110_and_both_planes_of_rp33():
    assert np.linalg.norm(centres_of(KNOWN["RP110"].function, 2)[1], axis=1) == pytest.approx([4.0, 5.0], abs=1e-2)
    _, centres = centres_of(KNOWN["RP33"].function, 3)
    assert np.linalg.norm(centres, axis=1) == pytest.approx([3.0, 3.0], abs=1e-2)


def test_origin_that_fails_has_negative_beta():
    bits, _ = centres_of(KNOWN["RP63"].function, 100)
    assert bits.diagnostics["beta"] == pytest.approx(-4.5, abs=1e-2)
    assert bits.value < 1e-4
    assert [f.name for f in bits.flags] == ["origin_fails"]


def test_kink_of_two_constraints_against_scipy():
    first, second = np.array([1.0, 0.0, 0.0]), np.array([-0.6, 0.8, 0.0])

    def g(u):
        return np.maximum(3 - u @ first, 2 - u @ second + 0.02 * (u**2).sum(-1))

    bits, _ = centres_of(g, 3, n_starts=2)
    constraint = {"type": "ineq", "fun": lambda x: -np.array([3 - x @ first, 2 - x @ second + 0.02 * x @ x])}
    best = minimize(lambda x: x @ x, [3.0, 5.0, 0.0], constraints=[constraint])
    assert bits.status == "ok"
    assert bits.diagnostics["beta"] == pytest.approx(np.sqrt(best.fun), rel=2e-3)


def test_many_kinks_of_a_relu_network():
    """At a point where many ReLUs switch, every gradient leads away; compare with a search ten times as long."""
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal((64, 32)) / 8, rng.standard_normal(32) / 5

    def g(u):
        return np.maximum(u @ first + 0.1, 0) @ second + 0.8

    def slope(u):
        return ((u @ first + 0.1 > 0) * second) @ first.T

    state = from_function(g, 64, gradient=slope)
    short = DesignPoint(n_starts=1)(state, seed=0)[0].diagnostics["beta"]
    long = DesignPoint(n_starts=1, max_iterations=600)(state, seed=0)[0].diagnostics["beta"]
    assert short == pytest.approx(long, rel=0.01)


def test_not_converging_is_a_status_and_not_a_number():
    bits, centres = centres_of(lambda u: np.ones(len(u)), 3)
    assert bits.kind is Kind.CENSORED
    assert (bits.value, bits.high) == (0.0, np.inf)
    assert "did not converge" in bits.status
    assert len(centres) == 0
    assert np.isnan(bits.diagnostics["beta"])


def test_budget_is_respected_and_flagged():
    case = KNOWN["tanh_mlp"]
    bits = DesignPoint()(from_function(case.function, case.dim), seed=0, max_evaluations=1500)[0]
    assert bits.evaluations + bits.gradients <= 1500
    assert "budget_exhausted" in [f.name for f in bits.flags]


def test_given_starts_are_used():
    # a narrow ball of failure that no random start meets
    def g(u):
        return np.linalg.norm(u - np.array([6.0, 0.0]), axis=1) - 0.5 + 10.0 * (u[:, 0] < 4)

    state = from_function(g, 2)
    found = DesignPoint(n_starts=1)(state, seed=0, starts=np.array([[[6.2, 0.1], [np.nan, np.nan]]]))[0]
    assert found.diagnostics["beta"] == pytest.approx(5.5, abs=0.05)


def test_batch_gives_what_singles_give():
    offsets = np.array([1.0, 3.0, 5.0])
    batch = LimitState(lambda p, u: offsets[p][:, None] - u[..., 0] + 0.05 * u[..., 1] ** 2, dim=2, n_problems=3)
    together = DesignPoint(n_starts=3)(batch, seed=0)
    for i in range(3):
        alone = DesignPoint(n_starts=3)(batch.select(np.array([i])), seed=1)[0]
        assert together[i].value == pytest.approx(alone.value, rel=1e-3)


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_gradients_agree_with_finite_differences(backend):
    case = KNOWN["tanh_mlp"]
    numpy_, _ = centres_of(case.function, case.dim, n_starts=1)
    other, _ = centres_of(getattr(case, backend)(), case.dim, n_starts=1)
    assert other.diagnostics["beta"] == pytest.approx(numpy_.diagnostics["beta"], rel=5e-3)
    assert other.evaluations < numpy_.evaluations / 5


def test_distinct_keeps_the_nearest_of_each_cluster():
    points = np.array([[[3.0, 0.0], [2.9, 0.1], [0.0, 5.0], [np.nan, np.nan]]])
    centres, columns = distinct(points, 0.5, 3)
    np.testing.assert_array_equal(centres[0, :2], [[2.9, 0.1], [0.0, 5.0]])
    assert np.isnan(centres[0, 2]).all()
    assert columns[0, :2].tolist() == [1, 2]
