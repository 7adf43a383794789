"""Estimators of bits: one answer, ten methods of different reach, and ``auto``, which combines them.

Every estimator is a frozen configuration called on a :class:`~elk_stress.estimators.limit_state.LimitState`, batched
over its problems: ``Importance(n_particles=4096)(limit_state, seed=0, centres=centres) -> BitsBatch``.

    >>> from elk_stress import estimate_bits
    >>> bits = estimate_bits(lambda u: 5.0 - u[:, 0], dim=3)  # B = -log2 Phi(-5) = 21.7
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, Literal

import numpy as np

from elk_stress.core.bits import Bits, BitsBatch
from elk_stress.core.settings import one_of, setting, shown
from elk_stress.estimators.limit_state import Backend, LimitState, from_function

__all__ = ["METHODS", "estimate_batch", "estimate_bits", "load_method"]

# draws times coordinates that a method may hold: 4 GB
_MOST_NUMBERS = 1 << 29
# name -> where its class lives; imported on first use
METHODS: dict[str, str] = {
    "auto": "elk_stress.estimators.auto:Auto",
    "closed_form": "elk_stress.estimators.closed_form:ClosedForm",
    "monte_carlo": "elk_stress.estimators.monte_carlo:MonteCarlo",
    "best_of_n": "elk_stress.estimators.best_of_n:BestOfN",
    "design_point": "elk_stress.estimators.design_point:DesignPoint",
    "importance": "elk_stress.estimators.importance:Importance",
    "annealed": "elk_stress.estimators.annealed:Annealed",
    "line_sampling": "elk_stress.estimators.line_sampling:LineSampling",
    "subset_simulation": "elk_stress.estimators.subset_simulation:SubsetSimulation",
    "evidence_bound": "elk_stress.estimators.evidence_bound:EvidenceBound",
    "isoperimetric_bound": "elk_stress.estimators.isoperimetric_bound:IsoperimetricBound",
}


def load_method(name: str) -> Any:
    """The estimator class called ``name``.

    Raises:
        ValueError: no such method; the message lists the known ones.
    """
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"no method is called {shown(name)}; known methods: {', '.join(METHODS)}")
    module, _, attribute = METHODS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def estimate_bits(
    limit_state: Callable[[Any], Any] | LimitState,
    dim: int | None = None,
    *,
    method: str = "auto",
    n_particles: int | None = None,
    n_runs: int | None = None,
    max_evaluations: int | None = None,
    seed: int = 0,
    max_bits: float | None = None,
    lipschitz: float | None = None,
    backend: Backend | Literal["auto"] = "auto",
) -> Bits:
    """``B = -log2 P[g(u) <= 0]``, ``u ~ N(0, I_dim)``.

    Args:
        limit_state: ``(n, dim) -> (n,)``, failure when ``<= 0``: a plain numpy, jax or torch function; or a
            :class:`LimitState` with one problem.
        dim: number of standard normal coordinates; only a ``LimitState`` knows it by itself.
        method: a name in ``METHODS``.
        n_particles: draws, lines or particles (the method's own default if ``None``).
        n_runs: independent splitting runs, where the method has them.
        max_evaluations: budget of evaluations and gradients.
        seed: all randomness; the same seed gives the same result bit for bit on the same machine.
        max_bits: results beyond are censored there (``auto`` and ``subset_simulation``; default 400).
        lipschitz: Lipschitz constant of the function in u, where known: adds the rigorous lower bound.
        backend: what the function is written in; ``"auto"`` finds out.

    Returns:
        Bits with interval, kind, status and flags.

    Raises:
        TypeError: no function.
        ValueError: an unknown method, a setting outside what it may be (:mod:`elk_stress.core.settings`), a missing
            ``dim``, several problems, or a limit state that returns NaN.
    """
    one_of("backend", backend, ["auto", "numpy", "jax", "torch"])
    dim, seed = setting("dim", dim, optional=True), setting("seed", seed)
    n_particles, n_runs = setting("n_particles", n_particles, optional=True), setting("n_runs", n_runs, optional=True)
    max_evaluations = setting("max_evaluations", max_evaluations, optional=True)
    max_bits, lipschitz = setting("max_bits", max_bits, optional=True), setting("lipschitz", lipschitz, optional=True)
    if isinstance(limit_state, LimitState):
        if dim is not None and dim != limit_state.dim:
            raise ValueError(
                f"the limit state has {limit_state.dim} coordinates but dim={dim} was given; leave dim out"
            )
        state = limit_state
    else:
        if dim is None:
            raise ValueError("dim is missing: how many standard normal coordinates does the function read?")
        if not callable(limit_state):
            raise TypeError(f"a limit state is a function (n, dim) -> (n,), or a LimitState; got {shown(limit_state)}")
        state = _state(limit_state, dim, backend)
    if state.n_problems != 1:
        raise ValueError(f"estimate_bits takes one problem, got {state.n_problems}; use estimate_batch for many")
    if n_particles is not None and method != "monte_carlo" and n_particles * state.dim > _MOST_NUMBERS:
        raise ValueError(
            f"n_particles is at most {_MOST_NUMBERS // state.dim:,} where the function reads {state.dim} coordinates, "
            f"since so many draws are held at once; got {n_particles:,}. Give fewer, or count with monte_carlo"
        )
    if lipschitz is not None:
        state = replace(state, lipschitz=np.array([float(lipschitz)]))
    batch = estimate_batch(
        state,
        method=method,
        n_particles=n_particles,
        n_runs=n_runs,
        max_evaluations=max_evaluations,
        seed=seed,
        max_bits=max_bits,
    )
    bits: Bits = batch[0]
    return bits


def estimate_batch(
    limit_state: LimitState,
    *,
    method: str = "auto",
    n_particles: int | None = None,
    n_runs: int | None = None,
    max_evaluations: int | None = None,
    seed: int = 0,
    max_bits: float | None = None,
    check_fraction: float | None = None,
    keep_failures: int = 0,
    **options: Any,
) -> BitsBatch:
    """Bits of many problems in one computation.

    Args:
        limit_state: the problems.
        method, n_particles, n_runs, seed, max_bits: as in :func:`estimate_bits`.
        max_evaluations: budget per problem.
        check_fraction: for ``auto``: share of the problems that splitting checks, chosen at random; ``None``: all of 16
            or fewer, else 16 of them; 0 checks only those that importance sampling could not carry. If the check
            objects to more than a tenth of its sample, 64 more are; the rest is flagged.
        keep_failures: draws from the prior given failure to return in ``diagnostics["failures"]`` (``auto``,
            ``importance``; ``subset_simulation`` keeps ``n_failures``).
        options: further fields of the method's configuration.

    Raises:
        ValueError: an unknown method.
        TypeError: an option that the method does not have.
    """
    kind = load_method(method)
    known = {f.name for f in fields(kind)}
    given = {"n_particles": n_particles, "n_runs": n_runs, "max_bits": max_bits, "check_fraction": check_fraction}
    unknown = sorted(set(options) - known)
    if unknown:
        raise TypeError(f"{method} has no option {', '.join(unknown)}; it has: {', '.join(sorted(known)) or 'none'}")
    if "n_samples" in known:
        given["n_samples"] = n_particles
    settings = {k: v for k, v in given.items() if v is not None and k in known} | options
    if method == "best_of_n":
        # no finite pool was given: the pool is a sample of the prior, and the bits are the prior's
        settings.setdefault("about", "population")
    config = kind(**settings)
    accepted = inspect.signature(config.__call__).parameters
    call: dict[str, Any] = {"seed": seed, "max_evaluations": max_evaluations, "keep_failures": keep_failures}
    call = {k: v for k, v in call.items() if k in accepted}
    if "pool" in accepted:
        rng = np.random.default_rng(np.random.SeedSequence(seed))
        call["pool"] = rng.standard_normal((limit_state.n_problems, n_particles or 4096, limit_state.dim))
    if "centres" not in accepted:
        result: BitsBatch = config(limit_state, **call)
        return result
    # these aim at design points: find them first, on a third of the budget
    search = load_method("design_point")()
    third = None if max_evaluations is None else max_evaluations // 3
    found = search(limit_state, seed=seed + 1, max_evaluations=third)
    if max_evaluations is not None:
        call["max_evaluations"] = max(0, max_evaluations - int((found.evaluations + found.gradients).max(initial=0)))
    result = config(limit_state, centres=found.diagnostics["centres"], **call)
    return replace(
        result,
        evaluations=result.evaluations + found.evaluations,
        gradients=result.gradients + found.gradients,
        diagnostics={**result.diagnostics, "centres": found.diagnostics["centres"]},
    )


def _state(function: Callable[[Any], Any], dim: int, backend: Backend | Literal["auto"]) -> LimitState:
    """The function's limit state; the same object for the same function, so that jax compiles it only once."""
    x64 = "jax" in sys.modules and bool(sys.modules["jax"].config.read("jax_enable_x64"))
    try:
        return _cached_state(function, dim, backend, x64)
    except TypeError:
        # unhashable callables are not remembered; a real TypeError comes again from here
        return from_function(function, dim, backend=backend)


@functools.lru_cache(maxsize=16)
def _cached_state(
    function: Callable[[Any], Any], dim: int, backend: Backend | Literal["auto"], x64: bool
) -> LimitState:
    return from_function(function, dim, backend=backend)
