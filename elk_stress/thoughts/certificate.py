r"""Certified bits: a rigorous lower bound for every caught item, where the probe knows how steep its score is.

For a score that is L-Lipschitz in u and any level t, no point nearer than t/L to ``{g >= t}`` fails, and by the
Gaussian isoperimetric inequality that says ``B >= -log2 Phi(-(t/L + Phi^-1 q))`` with ``q = P[g >= t]``
(:mod:`elk_stress.estimators.isoperimetric_bound`). No search is trusted: the bound holds against every attack, known or
not, with the stated confidence per item (from the Clopper-Pearson limit on q). "Fails and keeps behaviour" is a smaller
event, so the same bits are certified for threats that keep behaviour.

What it rests on: the prior (Gaussian tails), L (a product of spectral norms), and single-precision scores.

Randomized smoothing certifies by the same inequality, for a classifier averaged over Gaussian noise (1902.02918); here
nothing is averaged and the noise is the prior itself.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from elk_stress.core.bits import BitsBatch, Kind
from elk_stress.estimators.isoperimetric_bound import IsoperimetricBound
from elk_stress.estimators.limit_state import LimitState

__all__ = ["certified_bits", "is_certifiable"]


def is_certifiable(limit_state: LimitState) -> bool:
    """Whether a bound on the steepness of every problem is known (``item_event`` sets it where the probe has one)."""
    return limit_state.lipschitz is not None


def certified_bits(
    limit_state: LimitState, seed: int, *, n_samples: int = 10_000, confidence: float = 0.95
) -> BitsBatch:
    """Lower bounds in bits, ``(problems,)``, of kind ``lower_bound``; 0 says nothing, ``high`` is infinite.

    A problem whose score does not move at all (L = 0) has infinite bits where it does not fail.

    Args:
        limit_state: from :func:`elk_stress.thoughts.events.item_event`, one problem per caught item.
        seed: all randomness.
        n_samples: draws from the prior per problem, and a fifth of them again to choose the level.
        confidence: one-sided, per problem.

    Raises:
        ValueError: steepness unknown (a probe without ``lipschitz``, or a heavy tail, whose map is not Lipschitz).
    """
    if limit_state.lipschitz is None:
        raise ValueError(
            "certified bits need a bound on how steep the score is in u: a probe with a method lipschitz(parameters, "
            "factor), or a linear one, under a prior with Gaussian tails"
        )
    slopes = np.broadcast_to(np.asarray(limit_state.lipschitz, dtype=float), (limit_state.n_problems,))
    steep = np.flatnonzero(slopes > 0)
    still = np.flatnonzero(slopes == 0)
    value, evaluations = np.zeros(limit_state.n_problems), np.zeros(limit_state.n_problems, dtype=np.int64)
    status = ["ok"] * limit_state.n_problems
    if len(steep):
        bound = IsoperimetricBound(n_samples=n_samples, n_pilot=max(10, n_samples // 5), confidence=confidence)
        found = bound(replace(limit_state.select(steep), lipschitz=slopes[steep]), seed=seed)
        value[steep], evaluations[steep] = found.value, found.evaluations
    if len(still):
        at_rest = limit_state.value(still, np.zeros((len(still), 1, limit_state.dim)))[:, 0]
        value[still] = np.where(at_rest > 0, math.inf, 0.0)
    return BitsBatch.build(
        value,
        value,
        np.full(limit_state.n_problems, math.inf),
        Kind.LOWER_BOUND,
        "certificate",
        evaluations=evaluations,
        status=status,
    )
