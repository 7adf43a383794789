r"""One-dimensional tails with mean 0 and variance 1, and the scale variable that makes each an elliptical prior.

An elliptical move is ``s(z) L v`` with ``v ~ N(0, I)`` and one extra coordinate ``z ~ N(0, 1)`` for the scale. ``s`` is
the increasing map that carries a standard normal to the distribution of the multiplier; every projection
``w . (s L v)`` then has the *same* tail with standard deviation ``||L^T w||`` (independent heavy marginals would turn
Gaussian in any random direction instead):

==========  ===============================  ==========================================================
tail        multiplier ``s``                 bits of a linear probe with standardized margin z
==========  ===============================  ==========================================================
Gaussian    1                                ``-log2 Phi(-z)``
Logistic    ``2 K sqrt(3)/pi``, K Kolmogorov  ``log2(1 + exp(pi z/sqrt 3))``
Student-t   ``sqrt((nu-2)/chi2_nu)``          ``-log2 T_nu(-z sqrt(nu/(nu-2)))``
==========  ===============================  ==========================================================

``E s^2 = 1`` in each, so the covariance is ``L L^T`` under any tail. That a normal with scale 2K is logistic is due to
Andrews and Mallows (1974), "Scale mixtures of normal distributions".

Guarantee: ``log s`` is tabulated for ``|z| <= 45`` at steps of 1/64 from equations solved in logarithms, with exact
slopes, and interpolated by cubic Hermite pieces (error below 1e-10); beyond the table it continues on a straight line,
and it stops short of overflow (``exp(80)`` in float32). Only array-API operations touch ``z``, so the map is
differentiable in torch and jax.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from scipy import special

from elk_stress.core.arrays import like
from elk_stress.core.bits import LN2, bits_of_beta

__all__ = ["Gaussian", "Logistic", "StudentT", "Tail", "scale_table"]

Array = Any

_LOGISTIC_RATE = math.pi / math.sqrt(3.0)  # a logistic with this rate has variance 1
_EDGE = 45.0
_STEP = 1.0 / 64.0
# exp() of more than this overflows float32 once multiplied by an ordinary move
_LARGEST_LOG_FLOAT32 = 80.0
_LARGEST_LOG_FLOAT64 = 700.0
# gammainc and betainc are accurate down to the smallest normal number; below this take logarithms by series
_SMALL = 1e-280


@runtime_checkable
class Tail(Protocol):
    """A one-dimensional tail of unit variance and its scale variable."""

    @property
    def name(self) -> str:
        """Short name for tables."""
        ...

    @property
    def extra(self) -> int:
        """Extra standard normal coordinates for the scale: 0 or 1."""
        ...

    def __hash__(self) -> int: ...

    def scale(self, z: Array, xp: Any) -> Array:
        """The multiplier s, increasing in the standard normal ``z``, in z's namespace ``xp``."""
        ...

    def bits(self, z: np.ndarray | float) -> np.ndarray:
        """One-sided bits ``-log2 P[X > z]`` of a linear probe whose margin is z standard deviations (any sign)."""
        ...

    def quantile_of_bits(self, bits: np.ndarray | float) -> np.ndarray:
        """The inverse of ``bits``: the margin z that costs so many bits."""
        ...

    def log_density(self, x: np.ndarray) -> np.ndarray:
        """Natural log of the density of one unit-variance projection."""
        ...


@dataclass(frozen=True)
class Gaussian:
    """The Gaussian: no scale coordinate."""

    name: ClassVar[str] = "gaussian"
    extra: ClassVar[int] = 0

    def scale(self, z: Array, xp: Any) -> Array:
        """1, whatever z."""
        return xp.ones_like(z)

    def bits(self, z: np.ndarray | float) -> np.ndarray:
        """``-log2 Phi(-z)``."""
        return bits_of_beta(z)

    def quantile_of_bits(self, bits: np.ndarray | float) -> np.ndarray:
        """``-Phi^-1(2^-bits)``."""
        return np.asarray(-special.ndtri_exp(-np.asarray(bits, dtype=float) * LN2))

    def log_density(self, x: np.ndarray) -> np.ndarray:
        """``-x^2/2 - log sqrt(2 pi)``."""
        return np.asarray(-0.5 * np.square(x) - 0.5 * math.log(2 * math.pi))


@dataclass(frozen=True)
class Logistic:
    """The elliptical logistic: every projection is exactly logistic with unit variance."""

    name: ClassVar[str] = "logistic"
    extra: ClassVar[int] = 1

    def scale(self, z: Array, xp: Any) -> Array:
        """``2 K sqrt(3)/pi`` with K the Kolmogorov quantile of ``Phi(z)``."""
        return _interpolate(self, z, xp)

    def bits(self, z: np.ndarray | float) -> np.ndarray:
        """``log2(1 + exp(pi z/sqrt 3))``."""
        return np.asarray(np.logaddexp(0.0, _LOGISTIC_RATE * np.asarray(z, dtype=float)) / LN2)

    def quantile_of_bits(self, bits: np.ndarray | float) -> np.ndarray:
        """``log(2^bits - 1) sqrt(3)/pi``, without overflow and without cancellation near 0 bits."""
        nats = np.asarray(bits, dtype=float) * LN2
        with np.errstate(divide="ignore"):
            return np.asarray((nats + np.log(-np.expm1(-nats))) / _LOGISTIC_RATE)

    def log_density(self, x: np.ndarray) -> np.ndarray:
        """``log r - r|x| - 2 log(1 + exp(-r|x|))`` with ``r = pi/sqrt 3``."""
        size = _LOGISTIC_RATE * np.abs(x)
        return np.asarray(math.log(_LOGISTIC_RATE) - size - 2.0 * np.log1p(np.exp(-size)))


@dataclass(frozen=True)
class StudentT:
    """The elliptical Student-t with ``nu > 2`` degrees of freedom, rescaled to unit variance."""

    nu: float
    extra: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not 2.0 < self.nu < 1e4:
            raise ValueError(
                f"a Student-t with unit variance needs 2 < nu < 10000, got nu={self.nu}; "
                "use Gaussian() for light tails, and a smaller scale instead of nu <= 2"
            )

    @property
    def name(self) -> str:
        """``student_t(nu)``."""
        return f"student_t({self.nu:.3g})"

    def scale(self, z: Array, xp: Any) -> Array:
        """``sqrt((nu-2)/x)`` with x the chi-squared quantile of ``Phi(-z)``."""
        return _interpolate(self, z, xp)

    def bits(self, z: np.ndarray | float) -> np.ndarray:
        """``-log2 T_nu(-z sqrt(nu/(nu-2)))``."""
        x = np.asarray(z, dtype=float) * math.sqrt(self.nu / (self.nu - 2.0))
        log_tail = _log_t_tail(self.nu, np.abs(x))
        return np.asarray(np.where(x >= 0, -log_tail, -np.log1p(-np.exp(log_tail))) / LN2)

    def quantile_of_bits(self, bits: np.ndarray | float) -> np.ndarray:
        """Newton in ``(log z, log P)``, which is nearly straight in a polynomial tail."""
        b = np.asarray(bits, dtype=float)
        nats = np.maximum(b * LN2, 0.0)
        with np.errstate(divide="ignore"):
            other = -np.log(-np.expm1(-nats))  # nats of the complementary event
        wanted = np.maximum(nats, other)  # the tail beyond |z|: at least one bit
        p = np.exp(-np.minimum(wanted, -math.log(_SMALL)))
        w = special.betaincinv(self.nu / 2.0, 0.5, np.minimum(2.0 * p, 1.0))
        x = np.sqrt(self.nu * (1.0 - w) / w)
        # beyond the range of p: the power law P ~ x^-nu continues the last point, then Newton corrects it
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            x = x * np.exp((wanted + np.log(p)) / self.nu)
            for _ in range(4):
                log_tail = _log_t_tail(self.nu, x)
                slope = x * np.exp(_log_t_density(self.nu, x) - log_tail)
                step = np.where((x > 0) & np.isfinite(x), -(wanted + log_tail) / np.maximum(slope, 1e-300), 0.0)
                x = np.where(slope > 0, x * np.exp(-np.clip(step, -1.0, 1.0)), x)
        return np.asarray(np.where(nats >= other, x, -x) * math.sqrt((self.nu - 2.0) / self.nu))

    def log_density(self, x: np.ndarray) -> np.ndarray:
        """The t density at ``x sqrt(nu/(nu-2))`` times the Jacobian."""
        stretch = math.sqrt(self.nu / (self.nu - 2.0))
        return np.asarray(_log_t_density(self.nu, np.asarray(x) * stretch) + math.log(stretch))


@cache
def scale_table(tail: Tail) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Knots ``z``, ``log s`` and ``d log s / dz`` of a heavy tail, each ``(n_knots,)``; read-only."""
    z = np.arange(-_EDGE, _EDGE + _STEP / 2, _STEP)
    if isinstance(tail, Logistic):
        log_s, slope = _kolmogorov_scale(z)
    elif isinstance(tail, StudentT):
        log_s, slope = _student_scale(z, tail.nu)
    else:
        raise TypeError(f"no scale table for the tail {tail.name!r}; known: logistic, student_t")
    for array in (z, log_s, slope):
        array.setflags(write=False)
    return z, log_s, slope


def _interpolate(tail: Tail, z: Array, xp: Any) -> Array:
    """``exp`` of the cubic Hermite interpolant of ``log s``, in the namespace ``xp``."""
    knots, log_s, slope = scale_table(tail)
    position = (z + _EDGE) / _STEP
    cell = xp.floor(xp.clip(position, 0, len(knots) - 2))
    index = xp.astype(xp.reshape(cell, (-1,)), xp.int32)
    corners = [
        xp.reshape(xp.take(like(values, z), index + offset, axis=0), z.shape)
        for values in (log_s, slope * _STEP)
        for offset in (0, 1)
    ]
    left, right, left_slope, right_slope = corners
    along = position - cell
    t = xp.clip(along, 0, 1)
    cubic = (
        left
        + t * left_slope
        + t * t * (3.0 * (right - left) - 2.0 * left_slope - right_slope)
        + t * t * t * (2.0 * (left - right) + left_slope + right_slope)
    )
    # outside the table; with each end's own slope, so that a derivative split at a knot (jax halves it there) adds up
    line = (along - t) * xp.where(along > 0.5, right_slope, left_slope)
    single = z.dtype == xp.float32
    return xp.exp(xp.clip(cubic + line, max=_LARGEST_LOG_FLOAT32 if single else _LARGEST_LOG_FLOAT64))


def _solve(
    function: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], target: np.ndarray, start: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Newton for ``h(l) = target`` with h concave and monotone; returns the root and ``h'`` there."""
    root = start.copy()
    for _ in range(60):
        value, slope = function(root)
        step = np.clip((target - value) / slope, -1.0, 1.0)
        root += step
        if np.abs(step).max(initial=0.0) < 1e-15:
            break
    return root, function(root)[1]


def _kolmogorov_scale(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``log(2 K sqrt(3)/pi)`` and its slope: ``P[K <= k] = Phi(z)``, by theta series on either side of the median."""
    odd, whole = np.arange(1.0, 16.0, 2.0), np.arange(1.0, 9.0)
    signs = np.where(whole % 2 == 1, 1.0, -1.0)

    def log_below(log_k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # sqrt(2 pi)/k * sum over odd j of exp(-j^2 a), a = pi^2/(8 k^2)
        a = math.pi**2 / 8.0 * np.exp(-2.0 * log_k)
        terms = np.exp(-(odd**2 - 1.0) * a[:, None])
        total = terms.sum(1)
        value = 0.5 * math.log(2 * math.pi) - log_k - a + np.log(total)
        return value, -1.0 + 2.0 * a * (odd**2 * terms).sum(1) / total

    def log_above(log_k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # 2 sum_j (-1)^(j-1) exp(-2 j^2 k^2)
        b = 2.0 * np.exp(2.0 * log_k)
        terms = signs * np.exp(-(whole**2 - 1.0) * b[:, None])
        total = terms.sum(1)
        return LN2 - b + np.log(total), -2.0 * b * (whole**2 * terms).sum(1) / total

    low, high = z < 0, z >= 0
    log_k, slope = np.empty_like(z), np.empty_like(z)
    near = np.maximum(np.abs(z), 1.0)
    for side, function, start, sign in (
        (low, log_below, np.log(math.pi / 2.0 / near), 1.0),
        (high, log_above, np.log(near / 2.0 + 0.3), -1.0),
    ):
        log_k[side], rate = _solve(function, special.log_ndtr(sign * z[side]), start[side])
        slope[side] = sign * _hazard(sign * z[side]) / rate
    return log_k + math.log(2.0 * math.sqrt(3.0) / math.pi), slope


def _student_scale(z: np.ndarray, nu: float) -> tuple[np.ndarray, np.ndarray]:
    """``log sqrt((nu-2)/x)`` and its slope: ``P[chi2_nu <= x] = Phi(-z)``."""
    a = nu / 2.0
    log_y = np.empty_like(z)
    middle, small, large = np.abs(z) <= 30.0, z > 30.0, z < -30.0
    with np.errstate(divide="ignore"):
        zm = z[middle]
        y = np.where(zm > 0, special.gammaincinv(a, special.ndtr(-zm)), special.gammainccinv(a, special.ndtr(zm)))
        log_y[middle] = np.log(y)

    def log_below(log_y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        y = np.exp(log_y)
        term, total = np.ones_like(y), np.ones_like(y)
        for k in range(1, 500):
            term = term * y / (a + k)
            total += term
        # P(a, y) = y^a e^-y / Gamma(a+1) * total, and dP/d log y = y^a e^-y / Gamma(a)
        return a * log_y - y - special.gammaln(a + 1) + np.log(total), a / total

    def log_above(log_y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        y = np.exp(log_y)
        fraction = y
        for k in range(200, 0, -1):  # Legendre's continued fraction of Gamma(a, y), from the inside out
            fraction = y + (k - a) / (1.0 + k / fraction)
        return a * log_y - y - special.gammaln(a) - np.log(fraction), -fraction

    log_p = special.log_ndtr(-z[small])
    log_y[small], _ = _solve(log_below, log_p, (log_p + special.gammaln(a + 1)) / a)
    log_y[large], _ = _solve(log_above, special.log_ndtr(z[large]), np.log(0.5 * z[large] ** 2 + a))
    # d log y / dz = -phi(z) / (y f(y)); both in logarithms, since each underflows
    log_rate = a * log_y - np.exp(log_y) - special.gammaln(a)
    slope = 0.5 * np.exp(-0.5 * z * z - 0.5 * math.log(2 * math.pi) - log_rate)
    return 0.5 * (math.log(nu - 2.0) - LN2 - log_y), slope


def _hazard(z: np.ndarray) -> np.ndarray:
    """``phi(z)/Phi(z)``, the slope of ``log Phi``."""
    return np.asarray(np.exp(-0.5 * z * z - 0.5 * math.log(2 * math.pi) - special.log_ndtr(z)))


def _log_t_density(nu: float, x: np.ndarray) -> np.ndarray:
    constant = special.gammaln((nu + 1) / 2) - special.gammaln(nu / 2) - 0.5 * math.log(nu * math.pi)
    # log1p((x/sqrt nu)^2) without overflowing the square
    return np.asarray(constant - (nu + 1) / 2 * np.logaddexp(0.0, 2.0 * _safe_log(np.abs(x) / math.sqrt(nu))))


def _log_t_tail(nu: float, x: np.ndarray) -> np.ndarray:
    """``log P[T_nu > x]``, ``x >= 0``: half the incomplete beta at ``nu/(nu+x^2)``; by series once that underflows."""
    a = nu / 2.0
    log_w = -np.logaddexp(0.0, 2.0 * _safe_log(x / math.sqrt(nu)))
    w = np.exp(log_w)
    direct = special.betainc(a, 0.5, w)
    # w^a / (a B(a, 1/2)) * 2F1(a, 1/2; a+1; w)
    series = (
        a * log_w - math.log(a) - special.betaln(a, 0.5) + np.log(special.hyp2f1(a, 0.5, a + 1.0, np.minimum(w, 0.9)))
    )
    return np.asarray(np.where(direct > _SMALL, np.log(np.maximum(direct, _SMALL)), series) - LN2)


def _safe_log(x: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(x))
