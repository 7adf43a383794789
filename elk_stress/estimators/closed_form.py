r"""Closed forms: a linear probe under an elliptical prior, and its limit when behaviour must be kept exactly.

For ``g(u) = offset + s(z) (weight . v)`` with standardized margin ``z = offset/||weight||`` the probability of failure
is the prior's one-dimensional tail beyond z, exactly (:mod:`elk_stress.threats.tails`):

Gaussian ``-log2 Phi(-z)``; elliptical logistic ``log2(1 + exp(pi z/sqrt 3))``; elliptical t
``-log2 T_nu(-z sqrt(nu/(nu-2)))``.

With behaviour kept to within ``0.5 ||R move||^2 <= epsilon`` and ``epsilon -> 0`` only moves that behaviour ignores are
left: ``B_given_kept -> -log2 Phi(-m/||P L^T w||)``, P the projector, in u, onto the null space of ``R L``. Under a
heavy tail the scale is then weighted by ``s^-k`` (the density at 0 of k read coordinates of scale s), so the limit is
``E[s^-k Phi(-m/(s ||P L^T w||))] / E[s^-k]``; a Student-t turns into one with ``nu + k`` degrees of freedom.

A probe that reads only what behaviour depends on (an oracle) has no such move: infinite, exactly, not censored.
Units: bits. Guarantee: exact up to floating point (the heavy-tailed limit: quadrature, relative error below 1e-8).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import special

from elk_stress.core.bits import LN2, BitsBatch, Kind
from elk_stress.estimators.limit_state import LimitState
from elk_stress.threats.tails import Gaussian, Tail, scale_table

__all__ = ["ClosedForm", "conditional_limit"]

# singular values and residual norms below this share of the largest are rounding, not moves
_RELATIVE_ZERO = 1e-10


@dataclass(frozen=True)
class ClosedForm:
    """Exact bits of limit states that declare themselves linear; spends no evaluations."""

    def __call__(self, limit_state: LimitState) -> BitsBatch:
        """Bits of every problem from ``limit_state.linear``.

        A zero weight never fails (infinite bits) when the offset is positive, and always does (0 bits) otherwise.

        Raises:
            ValueError: the limit state is not known to be linear, or its coordinates do not fit weight and tail.
        """
        linear = limit_state.linear
        if linear is None:
            raise ValueError("closed_form needs a limit state with a known linear form; use method='auto' instead")
        tail: Tail = Gaussian() if linear.tail is None else linear.tail
        weight, offset = np.asarray(linear.weight, dtype=float), np.asarray(linear.offset, dtype=float)
        if weight.ndim != 2 or offset.shape != weight.shape[:1] or weight.shape[1] + tail.extra != limit_state.dim:
            raise ValueError(
                f"a linear form with tail {tail.name} on {limit_state.dim} coordinates needs weight "
                f"(problems, {limit_state.dim - tail.extra}) and offset (problems,), got {weight.shape}, {offset.shape}"
            )
        value = _bits(offset, np.linalg.norm(weight, axis=1), tail)
        return BitsBatch.build(value, value, value, Kind.EXACT, "closed_form")


def conditional_limit(
    margin: np.ndarray | float,
    factor: np.ndarray,
    weight: np.ndarray,
    readout: np.ndarray,
    tail: Tail | None = None,
) -> BitsBatch:
    """The limit of ``B_given_kept`` as the allowed behaviour shift goes to 0.

    Args:
        margin: score minus threshold at the origin, ``()`` or ``(problems,)``.
        factor: the prior's L, ``(d, r)``.
        weight: the probe's direction, ``(d,)`` or ``(problems, d)``.
        readout: R with shift ``0.5 ||R move||^2``, ``(k, d)``, the same for all problems.
        tail: the prior's tail; Gaussian by default.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    factor, readout = np.asarray(factor, dtype=float), np.atleast_2d(np.asarray(readout, dtype=float))
    weight = np.atleast_2d(np.asarray(weight, dtype=float))
    if weight.shape[1] != len(factor) or readout.shape[1] != len(factor):
        raise ValueError(
            f"factor {factor.shape}, weight {weight.shape} and readout {readout.shape} must share the width d"
        )
    margins, gradients = np.broadcast_arrays(np.atleast_1d(np.asarray(margin, dtype=float))[:, None], weight @ factor)
    margins = margins[:, 0]
    _, sizes, rows = np.linalg.svd(readout @ factor, full_matrices=False)
    read = rows[sizes > _RELATIVE_ZERO * sizes.max(initial=0.0)]
    whole = np.linalg.norm(gradients, axis=1)
    left = np.linalg.norm(gradients - gradients @ read.T @ read, axis=1)
    left = np.where(left > _RELATIVE_ZERO * whole, left, 0.0)
    value = _bits(margins, left, tail or Gaussian(), len(read))
    # at margin 0 exactly, vanishing moves of a probe that reads behaviour fail on one side of the origin
    value = np.where((margins == 0) & (left == 0) & (whole > 0), 1.0, value)
    return BitsBatch.build(value, value, value, Kind.EXACT, "closed_form")


def _bits(margin: np.ndarray, deviation: np.ndarray, tail: Tail, read: int = 0) -> np.ndarray:
    """Bits beyond ``margin`` for a projection of this standard deviation, the scale weighted by ``s^-read``."""
    still = deviation == 0
    z = np.where(still, 0.0, margin) / np.where(still, 1.0, deviation)
    moving = tail.bits(z) if read == 0 or not tail.extra else _weighted_bits(z, tail, read)
    return np.where(still, np.where(margin > 0, math.inf, 0.0), moving)


def _weighted_bits(z: np.ndarray, tail: Tail, read: int) -> np.ndarray:
    """``-log2 (E[s^-read Phi(-z/s)] / E[s^-read])``: trapezoidal in the scale coordinate, where all is analytic."""
    knots, log_s, _ = scale_table(tail)
    log_weight = -0.5 * knots**2 - read * log_s
    inside = special.log_ndtr(-z[:, None] * np.exp(-log_s))
    return np.asarray((special.logsumexp(log_weight) - special.logsumexp(log_weight + inside, axis=1)) / LN2)
