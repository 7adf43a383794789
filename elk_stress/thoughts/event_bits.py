"""Bits of many events at once, in blocks that bound memory; and of "failed and kept", from its corner."""

from __future__ import annotations

import math

import numpy as np

from elk_stress.core.bits import BitsBatch, Kind, bits_of_beta
from elk_stress.core.flags import Flag
from elk_stress.estimators import estimate_batch
from elk_stress.estimators.limit_state import LimitState
from elk_stress.probing.probe import FittedProbe
from elk_stress.threats.priors import EllipticalPrior

__all__ = ["event_bits", "joined", "joint_bits"]

# coordinates of weights at once where a closed form needs no particles (32 MB)
CLOSED_ELEMENTS = 1 << 22
# draws per item for "failed and kept": near the corner where the two meet only about one draw in ten is in the event
_CORNER_PARTICLES = 24_000
# elements of particles x coordinates estimated at once: bounds memory (float64: 256 MB)
_ELEMENTS = 1 << 25


def event_bits(
    state: LimitState,
    *,
    max_bits: float,
    n_particles: int,
    seed: int,
    keep_failures: int = 0,
    check_fraction: float | None = None,
) -> BitsBatch:
    """``estimate_batch`` in blocks of problems that bound its memory."""
    step = max(1, _ELEMENTS // (n_particles * state.dim))
    if state.n_problems == 0:
        return BitsBatch.build(np.empty(0), np.empty(0), np.empty(0), (), "auto")
    if state.linear is not None:
        step = max(1, CLOSED_ELEMENTS // state.dim)
    if state.n_problems <= step:
        return estimate_batch(
            state,
            n_particles=n_particles,
            max_bits=max_bits,
            seed=seed,
            keep_failures=keep_failures,
            check_fraction=check_fraction,
        )
    parts = [
        estimate_batch(
            state.select(np.arange(i, min(i + step, state.n_problems))),
            n_particles=n_particles,
            max_bits=max_bits,
            seed=seed + i,
            keep_failures=keep_failures,
            check_fraction=check_fraction,
        )
        for i in range(0, state.n_problems, step)
    ]
    return joined(*parts)


def joined(*parts: BitsBatch) -> BitsBatch:
    """The problems of several batches as one; diagnostics that all of them hold in the same shape are kept."""
    parts = tuple(part for part in parts if len(part))
    shared = [name for name in parts[0].diagnostics if all(name in p.diagnostics for p in parts)]
    shapes = {name: {p.diagnostics[name].shape[1:] for p in parts} for name in shared}
    return BitsBatch.build(
        np.concatenate([p.value for p in parts]),
        np.concatenate([p.low for p in parts]),
        np.concatenate([p.high for p in parts]),
        [k for p in parts for k in p.kind],
        parts[0].method,
        evaluations=np.concatenate([p.evaluations for p in parts]),
        gradients=np.concatenate([p.gradients for p in parts]),
        status=[s for p in parts for s in p.status],
        flags=[f for p in parts for f in p.flags],
        diagnostics={
            name: np.concatenate([p.diagnostics[name] for p in parts]) for name in shared if len(shapes[name]) == 1
        },
    )


def joint_bits(
    joint: LimitState,
    failed: BitsBatch,
    probe: FittedProbe,
    prior: EllipticalPrior,
    *,
    max_bits: float,
    n_particles: int,
    seed: int,
) -> BitsBatch:
    """Bits of "failed and kept" where both are limit states (the shift is its quadratic form).

    ``joint.starts`` holds the corner where they meet; for a linear probe a problem without one (NaN) cannot be broken
    within epsilon at all: its bits are infinite, exactly. No problem has fewer bits than failing alone, nor, under a
    linear probe and a Gaussian prior, than the half-space behind that corner.
    """
    assert joint.starts is not None
    n = joint.n_problems
    impossible = np.isnan(joint.starts).any(axis=(1, 2)) & probe.traits.linear
    floor = np.minimum(failed.low, max_bits)
    if probe.traits.linear and not prior.tail.extra:
        # a half-space cut by an ellipsoid is convex, so it lies behind the plane through its nearest point
        distance = 0.99 * np.linalg.norm(np.nan_to_num(joint.starts[:, 0]), axis=1)
        floor = np.minimum(np.maximum(floor, bits_of_beta(distance)), max_bits)
    beyond = ~impossible & (floor >= max_bits)
    value, high = np.where(beyond, max_bits, math.inf), np.full(n, math.inf)
    low = value.copy()
    kinds = [Kind.CENSORED if far else Kind.EXACT for far in beyond]
    status = ["ok" if far else "no move fails within epsilon" for far in beyond]
    flags: list[tuple[Flag, ...]] = [()] * n
    evaluations, gradients = np.zeros(n, dtype=int), np.zeros(n, dtype=int)
    open_ = np.flatnonzero(~impossible & ~beyond)
    if len(open_):
        found = event_bits(
            joint.select(open_),
            max_bits=max_bits,
            n_particles=max(n_particles, _CORNER_PARTICLES),
            seed=seed,
            check_fraction=min(1.0, 2 / len(open_)),
        )
        value[open_] = np.maximum(found.value, floor[open_])
        low[open_], high[open_] = np.maximum(found.low, floor[open_]), np.maximum(found.high, floor[open_])
        evaluations[open_], gradients[open_] = found.evaluations, found.gradients
        for row, i in enumerate(open_.tolist()):
            kinds[i], status[i], flags[i] = found.kind[row], found.status[row], found.flags[row]
    return BitsBatch.build(
        value, low, high, kinds, "auto", evaluations=evaluations, gradients=gradients, status=status, flags=flags
    )
