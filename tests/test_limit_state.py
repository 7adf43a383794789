"""Limit states: one meaning in numpy, jax and torch; bounded memory; no recompilation; a meter that counts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elk_stress.estimators import limit_state as module
from elk_stress.estimators.limit_state import BudgetExhausted, LimitState, Meter, both, from_function

DIM = 3


def _numpy(u: Any) -> Any:
    return 2.0 + np.tanh(u[:, 0]) - u[:, 1] * u[:, 2]


def _jax(u: Any) -> Any:
    import jax.numpy as jnp

    return 2.0 + jnp.tanh(u[:, 0]) - u[:, 1] * u[:, 2]


def _torch(u: Any) -> Any:
    import torch

    return 2.0 + torch.tanh(u[:, 0]) - u[:, 1] * u[:, 2]


def _slope(u: np.ndarray) -> np.ndarray:
    return np.stack([1 - np.tanh(u[..., 0]) ** 2, -u[..., 2], -u[..., 1]], axis=-1)


FUNCTIONS = {"numpy": _numpy, "jax": _jax, "torch": _torch}
POINTS = np.random.default_rng(np.random.SeedSequence(0)).standard_normal((1, 50, DIM))
ZERO = np.zeros(1, dtype=np.int64)


@pytest.mark.parametrize("backend", FUNCTIONS)
def test_backend_is_detected_and_values_and_gradients_agree(backend: str) -> None:
    state = from_function(FUNCTIONS[backend], DIM)
    assert state.backend == backend
    tolerance = 1e-5 if state.dtype == "float32" else 1e-8
    expected = _numpy(POINTS[0])[None]
    np.testing.assert_allclose(state.value(ZERO, POINTS), expected, atol=tolerance)
    value, gradient = state.value_and_gradient(ZERO, POINTS)
    np.testing.assert_allclose(value, expected, atol=tolerance)
    np.testing.assert_allclose(gradient, _slope(POINTS), atol=10 * tolerance)
    assert value.dtype == gradient.dtype == np.float64


def test_given_gradient_is_used() -> None:
    state = from_function(_numpy, DIM, gradient=_slope)
    assert state.has_gradient
    assert not from_function(_numpy, DIM).has_gradient
    np.testing.assert_array_equal(state.value_and_gradient(ZERO, POINTS)[1], _slope(POINTS))


def test_a_limit_state_passes_through() -> None:
    state = from_function(_numpy, DIM)
    assert from_function(state, DIM) is state  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_many_problems(backend: str) -> None:
    offset = np.arange(5.0)

    def function(problems: Any, u: Any) -> Any:
        if backend == "jax":
            import jax.numpy as jnp

            return jnp.asarray(offset, dtype=u.dtype)[problems][:, None] - u[..., 0]
        import torch

        return torch.as_tensor(offset)[problems][:, None] - u[..., 0]

    dtype = "float32" if backend == "jax" else "float64"
    state = LimitState(function, 2, 5, backend=backend, dtype=dtype)  # type: ignore[arg-type]
    u = np.ones((3, 7, 2))
    expected = np.broadcast_to(np.array([[3.0], [-1.0], [1.0]]), (3, 7))
    np.testing.assert_allclose(state.value(np.array([4, 0, 2]), u), expected)
    value, gradient = state.value_and_gradient(np.array([4, 0, 2]), u)
    np.testing.assert_allclose(value, expected)
    np.testing.assert_allclose(gradient, np.broadcast_to([-1.0, 0.0], (3, 7, 2)))


def test_jax_compiles_once_per_bucket_and_never_again() -> None:
    traces = []

    def counted(u: Any) -> Any:
        traces.append(u.shape)
        return _jax(u)

    state = from_function(counted, DIM, backend="jax")
    for n in (33, 40, 64):
        state.value(ZERO, np.zeros((1, n, DIM)))
    after_first = len(traces)
    for n in (64, 33, 47, 48):
        state.value(ZERO, np.zeros((1, n, DIM)))
    assert len(traces) == after_first, "a size within a bucket was compiled again"
    # the sizes 33 to 64 share one bucket; from_function itself tried two points
    assert after_first == 2
    state.value(ZERO, np.zeros((1, 65, DIM)))
    assert len(traces) == after_first + 1, "a size of another bucket must compile (or nothing was counted)"
    before = len(traces)
    state.value_and_gradient(ZERO, np.zeros((1, 40, DIM)))
    state.value_and_gradient(ZERO, np.zeros((1, 44, DIM)))
    assert len(traces) == before + 1


@given(st.integers(1, 10**7))
def test_buckets_pad_to_less_than_double(n: int) -> None:
    size = module._bucket(n)
    assert n <= size < 2 * n
    assert module._bucket(size) == size


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 60))
def test_chunks_change_nothing(p: int, n: int, limit: int) -> None:
    sizes = []

    def function(problems: np.ndarray, u: np.ndarray) -> np.ndarray:
        sizes.append(u.size)
        return problems[:, None] * 10 - u[..., 0]

    state = LimitState(function, 2, 6)
    u = np.random.default_rng(np.random.SeedSequence([p, n])).standard_normal((p, n, 2))
    problems = np.arange(p)
    whole = state.value(problems, u)
    sizes.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK_ELEMENTS", limit)
        np.testing.assert_array_equal(state.value(problems, u), whole)
        # a chunk holds one point at least
        assert max(sizes) <= max(limit, 2)


def test_both_is_the_maximum_in_every_backend() -> None:
    u = POINTS
    other = {"numpy": lambda x: x[:, 0] - 0.5, "jax": lambda x: x[:, 0] - 0.5, "torch": lambda x: x[:, 0] - 0.5}
    expected = np.maximum(_numpy(u[0]), u[0, :, 0] - 0.5)[None]
    for backend, function in FUNCTIONS.items():
        kept = from_function(other[backend], DIM, backend=backend)  # type: ignore[arg-type]
        joined = both(from_function(function, DIM, backend=backend), kept)  # type: ignore[arg-type]
        np.testing.assert_allclose(joined.value(ZERO, u), expected, atol=1e-5)
        slope = np.where((_numpy(u[0]) >= u[0, :, 0] - 0.5)[:, None], _slope(u[0]), np.array([1.0, 0.0, 0.0]))
        np.testing.assert_allclose(joined.value_and_gradient(ZERO, u)[1][0], slope, atol=1e-4)


def test_both_uses_given_gradients() -> None:
    one = from_function(_numpy, DIM, gradient=_slope)
    two = from_function(lambda u: u[:, 0], DIM, gradient=lambda u: np.broadcast_to(np.array([1.0, 0, 0]), u.shape))
    assert both(one, two).has_gradient
    assert not both(one, from_function(lambda u: u[:, 0], DIM)).has_gradient


def test_both_refuses_what_does_not_fit() -> None:
    one = from_function(_numpy, DIM)
    with pytest.raises(ValueError, match=r"differ in dim \(3 and 2\)"):
        both(one, from_function(lambda u: u[:, 0], 2))
    with pytest.raises(ValueError, match="differ in backend"):
        both(one, from_function(_jax, DIM, backend="jax"))


# -- bad functions -----------------------------------------------------------------------------------------------------


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"for n=2 it returned shape \(2, 3\)"):
        from_function(lambda u: u, DIM)
    with pytest.raises(ValueError, match="3 coordinates but points came with 4"):
        from_function(_numpy, DIM).value(ZERO, np.zeros((1, 1, 4)))
    state = LimitState(lambda p, u: u[..., 0][:, :1], 2)
    with pytest.raises(ValueError, match=r"returned shape \(1, 1\) for points of shape \(1, 5, 2\)"):
        state.value(ZERO, np.zeros((1, 5, 2)))


def test_a_function_of_no_library_is_refused_with_its_own_error() -> None:
    def broken(u: Any) -> Any:
        raise RuntimeError("boom")

    with pytest.raises(TypeError, match="RuntimeError: boom"):
        from_function(broken, DIM)


@pytest.mark.parametrize("backend", FUNCTIONS)
def test_nan_is_refused_and_counted(backend: str) -> None:
    state = LimitState(lambda p, u: u[..., 0] * math.nan, DIM, backend=backend, dtype="float32")  # type: ignore[arg-type]
    for ask in (state.value, state.value_and_gradient):
        with pytest.raises(ValueError, match="NaN at 4 of 4 points"):
            ask(ZERO, np.ones((1, 4, DIM)))


def test_infinite_values_are_allowed() -> None:
    state = LimitState(lambda p, u: np.where(u[..., 0] > 0, np.inf, -1.0), 1)
    assert state.value(ZERO, np.array([[[1.0], [-1.0]]])).tolist() == [[math.inf, -1.0]]


# -- the meter ---------------------------------------------------------------------------------------------------------


def test_meter_counts_each_problem_and_stops_in_time() -> None:
    asked = []

    def function(problems: np.ndarray, u: np.ndarray) -> np.ndarray:
        asked.append(u.shape)
        return u[..., 0]

    meter = Meter(LimitState(function, 1, 3, gradient=lambda p, u: np.ones_like(u)), 10)
    meter.value(np.array([0, 1]), np.zeros((2, 4, 1)))
    meter.value_and_gradient(np.array([1]), np.zeros((1, 5, 1)))
    assert meter.evaluations.tolist() == [4, 4, 0]
    assert meter.gradients.tolist() == [0, 5, 0]
    assert meter.remaining() == 1
    calls = len(asked)
    with pytest.raises(BudgetExhausted, match="2 more evaluations would exceed the budget of 10"):
        meter.value(np.array([1]), np.zeros((1, 2, 1)))
    assert len(asked) == calls, "the function was called although the budget had ended"
    assert meter.evaluations.tolist() == [4, 4, 0]


def test_meter_without_a_budget() -> None:
    meter = Meter(LimitState(lambda p, u: u[..., 0], 1))
    assert meter.remaining() == math.inf
    meter.value(ZERO, np.zeros((1, 1000, 1)))
    assert meter.evaluations.tolist() == [1000]


@settings(max_examples=50)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 7)), max_size=12), st.integers(0, 30))
def test_meter_never_passes_its_budget(calls: list[tuple[bool, int]], budget: int) -> None:
    meter = Meter(LimitState(lambda p, u: u[..., 0], 1, gradient=lambda p, u: np.ones_like(u)), budget)
    for gradient, n in calls:
        before = int(meter.evaluations[0] + meter.gradients[0])
        try:
            (meter.value_and_gradient if gradient else meter.value)(ZERO, np.zeros((1, n, 1)))
        except BudgetExhausted:
            assert before + n > budget
        else:
            assert before + n <= budget
    assert meter.evaluations[0] + meter.gradients[0] <= budget
