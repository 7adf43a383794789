"""Limit states: what "the probe failed and behaviour was kept" means, as a function of a standard normal point.

``g(u) <= 0`` is failure. A :class:`LimitState` holds many *problems* at once (one per item, say): it maps problem
indices of shape ``(p,)`` and points of shape ``(p, n, dim)`` to values ``(p, n)``. Estimators are written once, in
numpy; the function behind may be numpy, jax (jitted on padded shapes, so that a second call never recompiles) or torch
(a real model, on its own device). Every evaluation goes through a :class:`Meter`, which counts it and enforces the
budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from elk_stress.core.arrays import backend_of, namespace, to_numpy

__all__ = ["Backend", "BudgetExhausted", "LimitState", "Linear", "Meter", "both", "from_function"]

Backend = Literal["numpy", "jax", "torch"]

# elements of u per call of the underlying function: bounds memory (float64: 32 MB of points)
_CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Linear:
    """A limit state known to be ``g(u) = offset + scale * (weight . u)`` with an elliptical tail, per problem.

    Attributes:
        weight: ``(problems, rank)``: the gradient in the Gaussian coordinates.
        offset: ``(problems,)``: g at the origin.
        tail: the prior's :class:`elk_stress.threats.priors.Tail` (``None``: Gaussian); with a heavy tail ``dim = rank +
            1`` and the last coordinate sets the scale.
    """

    weight: np.ndarray
    offset: np.ndarray
    tail: Any = None


@dataclass(frozen=True)
class LimitState:
    """Many limit states of one shape, evaluated together.

    Attributes:
        function: ``(problems (p,) int, u (p, n, dim)) -> (p, n)`` in the arrays of ``backend``; a pure function.
        dim: number of standard normal coordinates.
        n_problems: how many problems ``function`` knows.
        backend: which library ``function`` is written in.
        gradient: the gradient for a numpy function, ``(problems, u) -> (p, n, dim)``. jax and torch differentiate
            themselves; a numpy function without one is differentiated by finite differences, at ``dim + 1``
            evaluations a point.
        lipschitz: ``(problems,)`` Lipschitz constants of g in u, where known (for the isoperimetric bound).
        linear: closed form, where known.
        device: torch device for ``u`` (torch only).
        dtype: ``"float32"`` or ``"float64"``: what ``function`` receives.
        differentiable: false where slopes say nothing or cannot be had (a forest, somebody's code): then nothing asks
            for gradients, by finite differences neither, and estimators sample instead.
        jit: whether a jax function may be compiled. One that leaves jax on its way (somebody's torch module) is called
            as it is, on numpy arrays for values: a callback from compiled code can wait for a thread that its own
            caller holds.
        what: whose score it is, for the message where that is NaN or infinite; empty: not a probe's.
        cost: activations that one evaluation scores, so that a probe without a gradient, which may be slow, is asked
            within reason.
        starts: ``(problems, m, dim)`` points worth starting a search from, where the builder knows some.
        data: arrays with one row per problem. Where given, ``function`` receives the rows of its problems in place of
            their indices, ``({name: (p, ...)}, u (p, n, dim)) -> (p, n)``, so that one compiled function serves any
            selection of problems (:meth:`select`).
    """

    function: Callable[[Any, Any], Any]
    dim: int
    n_problems: int = 1
    backend: Backend = "numpy"
    gradient: Callable[[Any, Any], Any] | None = None
    lipschitz: np.ndarray | None = None
    linear: Linear | None = None
    device: str = "cpu"
    dtype: str = "float64"
    data: Mapping[str, np.ndarray] | None = None
    starts: np.ndarray | None = None
    differentiable: bool = True
    jit: bool = True
    what: str = ""
    cost: int = 1
    _compiled: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def has_gradient(self) -> bool:
        """Whether a gradient costs about one evaluation (not ``dim`` of them)."""
        return self.differentiable and (self.backend != "numpy" or self.gradient is not None)

    def select(self, problems: np.ndarray) -> LimitState:
        """The limit states of some problems only, renumbered from 0; shares what is compiled if ``data`` is used."""
        chosen = np.asarray(problems)
        linear = self.linear and replace(
            self.linear, weight=self.linear.weight[chosen], offset=self.linear.offset[chosen]
        )
        lipschitz = None if self.lipschitz is None else self.lipschitz[chosen]
        starts = None if self.starts is None else self.starts[chosen]
        if self.data is not None:
            data = {name: rows[chosen] for name, rows in self.data.items()}
            return replace(self, data=data, n_problems=len(chosen), linear=linear, lipschitz=lipschitz, starts=starts)
        function, gradient = self.function, self.gradient
        where: Any = chosen
        if self.backend == "torch":
            import torch

            where = torch.as_tensor(chosen, device=self.device)
        elif self.backend == "jax":
            import jax.numpy as jnp

            where = jnp.asarray(chosen)
        return replace(
            self,
            function=lambda i, u: function(where[i], u),
            gradient=None if gradient is None else (lambda i, u: gradient(where[i], u)),
            n_problems=len(chosen),
            linear=linear,
            lipschitz=lipschitz,
            starts=starts,
            _compiled={},
        )

    def value(self, problems: np.ndarray, u: np.ndarray) -> np.ndarray:
        """g at ``u`` of shape ``(p, n, dim)`` -> ``(p, n)`` float64. Uncounted; estimators use a :class:`Meter`."""
        return self._chunked(self._value_chunk, problems, u)

    def value_and_gradient(self, problems: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """g and its gradient: ``(p, n)`` and ``(p, n, dim)``, float64.

        Raises:
            TypeError: there is no gradient (``differentiable`` is false).
        """
        if not self.differentiable:
            raise TypeError(
                "this limit state has no gradient (its probe is not differentiable); use a method that asks for values "
                "alone: auto, subset_simulation, monte_carlo, best_of_n"
            )
        out = self._chunked(self._gradient_chunk, problems, u)
        return out[..., 0], out[..., 1:]

    def _chunked(self, evaluate: Callable[..., np.ndarray], problems: np.ndarray, u: np.ndarray) -> np.ndarray:
        p, n, dim = u.shape
        if dim != self.dim:
            raise ValueError(
                f"the limit state has {self.dim} coordinates but points came with {dim}; "
                "pass dim= the number of coordinates that the function reads"
            )
        # an evaluation that scores many activations moves them all
        size = dim * self.cost
        if p * n * size <= _CHUNK_ELEMENTS:
            return evaluate(problems, u)
        if n * size <= _CHUNK_ELEMENTS:
            step = max(1, _CHUNK_ELEMENTS // (n * size))
            return np.concatenate([evaluate(problems[i : i + step], u[i : i + step]) for i in range(0, p, step)])
        step = max(1, _CHUNK_ELEMENTS // size)
        rows = [
            np.concatenate(
                [evaluate(problems[i : i + 1], u[i : i + 1, j : j + step]) for j in range(0, n, step)], axis=1
            )
            for i in range(p)
        ]
        return np.concatenate(rows)

    def _value_chunk(self, problems: np.ndarray, u: np.ndarray) -> np.ndarray:
        if self.backend == "numpy":
            out = np.asarray(self.function(self._rows(problems), u.astype(self.dtype, copy=False)), dtype=float)
        elif self.backend == "jax":
            out = self._jax("value", problems, u)
        else:
            import torch

            with torch.no_grad():
                out = to_numpy(self.function(*self._torch_arguments(problems, u))).astype(float)
        return _checked(out, u, self.what)

    def _gradient_chunk(self, problems: np.ndarray, u: np.ndarray) -> np.ndarray:
        if self.backend == "numpy":
            rows = self._rows(problems)
            gradient = self.gradient(rows, u) if self.gradient is not None else self._differences(rows, u)
            value = self._value_chunk(problems, u)
            return np.concatenate([value[..., None], np.asarray(gradient, dtype=float)], axis=-1)
        if self.backend == "jax":
            value, gradient = self._jax("gradient", problems, u)
        else:
            import torch

            indices, points = self._torch_arguments(problems, u)
            points.requires_grad_(True)
            with torch.enable_grad():
                tensor = self.function(indices, points)
                (slope,) = torch.autograd.grad(tensor.sum(), points)
            value, gradient = to_numpy(tensor).astype(float), to_numpy(slope).astype(float)
        _checked(value, u, self.what)
        return np.concatenate([value[..., None], gradient], axis=-1)

    def _torch_arguments(self, problems: np.ndarray, u: np.ndarray) -> tuple[Any, Any]:
        import torch

        points = torch.as_tensor(u, dtype=getattr(torch, self.dtype), device=self.device)
        rows = self._rows(problems)
        if isinstance(rows, Mapping):
            return {name: torch.as_tensor(array, device=self.device) for name, array in rows.items()}, points
        return torch.as_tensor(rows, device=self.device), points

    def _rows(self, problems: np.ndarray) -> Any:
        """What the function receives to know its problems: their indices, or their rows of ``data``."""
        return problems if self.data is None else {name: rows[problems] for name, rows in self.data.items()}

    def _jax(self, what: str, problems: np.ndarray, u: np.ndarray) -> Any:
        """Run the jitted function on shapes padded up to a bucket, so that few shapes are ever compiled."""
        import jax
        import jax.numpy as jnp

        function = self.function

        def total(points: Any, indices: Any) -> tuple[Any, Any]:
            values = function(indices, points)
            return values.sum(), values

        if not self.jit:
            if what == "value":
                # numpy all the way: jax would compile every operation for every shape
                return np.asarray(function(self._rows(problems), u.astype(self.dtype)), dtype=float)
            self._compiled.setdefault(what, lambda i, v: jax.value_and_grad(total, has_aux=True)(v, i))
        elif what not in self._compiled:
            self._compiled[what] = jax.jit(
                function if what == "value" else lambda i, v: jax.value_and_grad(total, has_aux=True)(v, i)
            )
        p, n, _ = u.shape
        pad_p, pad_n = _bucket(p), _bucket(n)
        points = np.zeros((pad_p, pad_n, self.dim), dtype=self.dtype)
        points[:p, :n] = u
        padded = np.zeros(pad_p, dtype=np.int32)
        padded[:p] = problems
        rows = self._rows(padded)
        indices = {k: jnp.asarray(v) for k, v in rows.items()} if isinstance(rows, Mapping) else jnp.asarray(rows)
        dtype = self.dtype if _jax_has_x64() else "float32"
        out = self._compiled[what](indices, jnp.asarray(points, dtype=dtype))
        if what == "value":
            return np.asarray(out, dtype=float)[:p, :n]
        (_, values), gradient = out
        return np.asarray(values, dtype=float)[:p, :n], np.asarray(gradient, dtype=float)[:p, :n]

    def _differences(self, rows: Any, u: np.ndarray) -> np.ndarray:
        """Central differences: ``2 dim`` evaluations a point, one coordinate at a time to bound memory."""
        step = 1e-5 if self.dtype == "float64" else 1e-2
        gradient = np.empty_like(u, dtype=float)
        for axis in range(self.dim):
            shifted = u.astype(float)
            shifted[..., axis] += step
            up = np.asarray(self.function(rows, shifted), dtype=float)
            shifted[..., axis] -= 2 * step
            down = np.asarray(self.function(rows, shifted), dtype=float)
            gradient[..., axis] = (up - down) / (2 * step)
        return gradient


class BudgetExhausted(RuntimeError):
    """The evaluation budget ended. Estimators catch it and return what they know, censored, with a flag."""


class Meter:
    """Counts what an estimator or attack spends on a limit state, per problem, and enforces a budget.

    Args:
        limit_state: what is evaluated.
        max_evaluations: budget per problem (values and gradients together); ``None`` for no limit.
    """

    def __init__(self, limit_state: LimitState, max_evaluations: int | None = None) -> None:
        self.limit_state = limit_state
        self.max_evaluations = max_evaluations
        self.evaluations = np.zeros(limit_state.n_problems, dtype=np.int64)
        self.gradients = np.zeros(limit_state.n_problems, dtype=np.int64)

    def remaining(self) -> float:
        """Evaluations left for the problem that has spent most."""
        if self.max_evaluations is None:
            return math.inf
        return float(self.max_evaluations - (self.evaluations + self.gradients).max(initial=0))

    def value(self, problems: np.ndarray, u: np.ndarray) -> np.ndarray:
        """g at ``(p, n, dim)`` points, counted."""
        self._spend(self.evaluations, problems, u.shape[1])
        return self.limit_state.value(problems, u)

    def value_and_gradient(self, problems: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """g and gradient, counted as one gradient each (finite differences count their ``2 dim`` evaluations too)."""
        if not self.limit_state.has_gradient:
            self._spend(self.evaluations, problems, u.shape[1] * 2 * self.limit_state.dim)
        self._spend(self.gradients, problems, u.shape[1])
        return self.limit_state.value_and_gradient(problems, u)

    def _spend(self, counter: np.ndarray, problems: np.ndarray, amount: int) -> None:
        # an index may come several times in one call: every occurrence is paid for
        amounts = amount * np.bincount(problems, minlength=counter.shape[0])
        if self.max_evaluations is not None:
            spent = (self.evaluations + self.gradients + amounts)[problems]
            if spent.size and spent.max() > self.max_evaluations:
                raise BudgetExhausted(
                    f"{amount} more evaluations would exceed the budget of {self.max_evaluations} per problem; "
                    "raise max_evaluations"
                )
        counter += amounts


def from_function(
    function: Callable[[Any], Any],
    dim: int,
    *,
    backend: Backend | Literal["auto"] = "auto",
    gradient: Callable[[Any], Any] | None = None,
    lipschitz: float | None = None,
    device: str = "cpu",
    dtype: str | None = None,
) -> LimitState:
    """A limit state from ``(n, dim) -> (n,)``, failure when ``<= 0``.

    Args:
        function: plain numpy, jax or torch function.
        dim: number of standard normal coordinates.
        backend: ``"auto"`` tries the function on one numpy point (a jax function answers with a jax array), then, if it
            refuses, on a torch tensor.
        gradient: ``(n, dim) -> (n, dim)`` for numpy functions.
        lipschitz: Lipschitz constant of the function, where known.
        device: torch device of the points.
        dtype: ``"float32"`` or ``"float64"``; by default float64 for numpy and torch, and what jax is configured for.

    Raises:
        TypeError: the function takes neither numpy nor torch arrays.
        ValueError: it returns the wrong shape.
    """
    if isinstance(function, LimitState):
        return function
    found = _detect(function, dim, device) if backend == "auto" else backend
    if dtype is None:
        dtype = "float32" if found == "jax" and not _jax_has_x64() else "float64"

    def batched(problems: Any, u: Any) -> Any:
        return function(u.reshape(-1, dim)).reshape(u.shape[:2])

    slope = None
    if gradient is not None:
        given = gradient

        def slope(problems: Any, u: Any) -> Any:
            return np.asarray(given(u.reshape(-1, dim))).reshape(u.shape)

    state = LimitState(
        function=batched,
        dim=dim,
        backend=found,
        gradient=slope,
        lipschitz=None if lipschitz is None else np.array([lipschitz]),
        device=device,
        dtype=dtype,
    )
    state.value(np.zeros(1, dtype=np.int64), np.zeros((1, 2, dim)))
    return state


def both(failed: LimitState, kept: LimitState) -> LimitState:
    """The joint event: failed *and* kept, ``max`` of the two limit states (each scaled by the caller).

    Raises:
        ValueError: the two differ in coordinates, problems or backend.
    """
    for name in ("dim", "n_problems", "backend"):
        if getattr(failed, name) != getattr(kept, name):
            raise ValueError(
                f"cannot join limit states that differ in {name} ({getattr(failed, name)} and {getattr(kept, name)}); "
                "build both from the same prior and backend"
            )

    if (failed.data is None) != (kept.data is None):
        raise ValueError("cannot join limit states of which only one carries its problems as data; give both data")

    def function(problems: Any, u: Any) -> Any:
        a, b = failed.function(problems, u), kept.function(problems, u)
        return namespace(a, b).maximum(a, b)

    gradient = None
    if failed.backend == "numpy" and failed.gradient is not None and kept.gradient is not None:
        slope_a, slope_b = failed.gradient, kept.gradient

        def gradient(problems: Any, u: Any) -> Any:
            a, b = np.asarray(failed.function(problems, u)), np.asarray(kept.function(problems, u))
            return np.where((a >= b)[..., None], slope_a(problems, u), slope_b(problems, u))

    data = None if failed.data is None or kept.data is None else {**failed.data, **kept.data}
    return replace(
        failed,
        function=function,
        gradient=gradient,
        linear=None,
        lipschitz=None,
        data=data,
        differentiable=failed.differentiable and kept.differentiable,
        jit=failed.jit and kept.jit,
        _compiled={},
    )


def _detect(function: Callable[[Any], Any], dim: int, device: str) -> Backend:
    point = np.zeros((2, dim))
    try:
        out = function(point)
    except Exception as numpy_error:
        try:
            import torch

            out = function(torch.as_tensor(point, device=device))
        except Exception:
            raise TypeError(
                f"the limit state takes neither a numpy nor a torch array of shape (n, {dim}): on numpy it raised "
                f"{type(numpy_error).__name__}: {numpy_error}; pass backend= and check the shape it expects"
            ) from numpy_error
    if getattr(out, "shape", None) != (2,):
        raise ValueError(
            f"the limit state must map (n, {dim}) points to (n,) values; for n=2 it returned shape "
            f"{getattr(out, 'shape', type(out).__name__)}"
        )
    return backend_of(out)  # type: ignore[return-value]


def _jax_has_x64() -> bool:
    import jax.numpy as jnp

    return bool(jnp.zeros(0, dtype=float).dtype == jnp.float64)


def _bucket(n: int) -> int:
    """The next power of 2: on average a third of padding, and a dozen compiled shapes instead of hundreds."""
    return 1 << max(0, (n - 1).bit_length())


def _checked(value: np.ndarray, u: np.ndarray, what: str = "") -> np.ndarray:
    if value.shape != u.shape[:2]:
        raise ValueError(
            f"the limit state returned shape {value.shape} for points of shape {u.shape}; expected {u.shape[:2]}"
        )
    if what and not np.isfinite(value).all():
        length = np.linalg.norm(u, axis=-1)
        known = np.isfinite(value)
        reach = f" (the longest with a score: {length[known].max():.3g})" if known.any() else ""
        raise ValueError(
            f"{what} scores NaN or inf on {(~known).sum()} of {value.size} moved activations; the shortest such move "
            f"is {length[~known].min():.3g} in standard deviations of the prior{reach}. A probe must score whatever a "
            "model may think: bound what a logarithm, a root or a quotient in it gets, or leave it out"
        )
    if np.isnan(value).any():
        bad = int(np.isnan(value).sum())
        raise ValueError(f"the limit state returned NaN at {bad} of {value.size} points; make it finite everywhere")
    return value
