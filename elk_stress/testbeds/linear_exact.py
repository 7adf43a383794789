r"""The exact number of bits of a linear probe when behaviour is read linearly: a reference by numerical integration.

The event is ``offset + w . move <= 0`` and ``0.5 ||R move||^2 <= epsilon``, with ``move = s L v``. Given s, the
pair of the score ``X = w . L v`` and the outputs ``Y = R L v`` (k of them) is jointly Gaussian:
``X | Y ~ N(beta . Y, nu^2)``. In outputs rotated so that beta lies along the first axis the score depends on ``Y_1``
alone, and

``P = integral over |y| <= delta/s of N(y; 0, C_11) Phi(-(offset/s + |beta| y)/nu) Q(y) dy``

with ``delta = sqrt(2 epsilon)`` and ``Q(y)`` the chance that the other outputs stay inside the rest of the ball: 1 for
k = 1, a difference of normal probabilities for k = 2, one more integral of those for k = 3. All in logarithms, by
Gauss-Legendre panels split where the integrand bends; heavy tails add a trapezoidal sum over the scale coordinate. No
sampling, no search, nothing shared with the estimators, so it can judge them.

Guarantee: relative error of P about 1e-8; the tests check it against Monte Carlo and known special cases.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import special

from elk_stress.core.bits import LN2
from elk_stress.threats.priors import EllipticalPrior
from elk_stress.threats.tails import scale_table

__all__ = ["joint_bits"]

_MAX_OUTPUTS = 3
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)
_REACH = 12.0  # standard deviations beyond the mode that are integrated over
_RELATIVE_ZERO = 1e-10


def joint_bits(weight: np.ndarray, offset: float, prior: EllipticalPrior, readout: np.ndarray, epsilon: float) -> float:
    """Bits of "the score falls by ``offset`` and the behaviour shift stays within ``epsilon`` nats".

    Args:
        weight: ``(d,)`` direction of the probe; zero with ``offset <= 0`` gives the bits of keeping behaviour at all.
        offset: score minus threshold at the origin.
        prior: moves in u-space.
        readout: R, ``(k, d)`` with at most three independent outputs under the prior.
        epsilon: allowed shift in nats.

    Raises:
        ValueError: too many outputs that move (heavy tails: two), or a negative epsilon.
    """
    if epsilon < 0:
        raise ValueError(f"a behaviour shift is at least 0 nats, got epsilon={epsilon}")
    _, sizes, right = np.linalg.svd(np.atleast_2d(readout) @ prior.factor, full_matrices=False)
    moving = sizes > _RELATIVE_ZERO * sizes.max(initial=0.0)
    most = _MAX_OUTPUTS - prior.tail.extra
    if moving.sum() > most:
        raise ValueError(
            f"exact joint bits under a {prior.tail.name} prior are integrated for at most {most} outputs, this readout "
            f"moves {moving.sum()}; estimate them instead"
        )
    gradient = np.asarray(weight, dtype=float) @ prior.factor
    size = float(np.linalg.norm(gradient))
    # Y = left diag(sizes) y with y = right v standard normal; the rotation left keeps lengths, so it is dropped
    sizes, right = sizes[moving], right[moving]
    along = right @ gradient
    rest = float(np.linalg.norm(gradient - along @ right))
    rest = rest if rest > _RELATIVE_ZERO * size else 0.0
    if not len(sizes):
        log_p = _log_tail(np.array([offset]), size)[0]
        return float(prior.tail.bits(offset / size)) if size > 0 else float(-log_p / LN2)
    slope = along / sizes  # beta, in these outputs
    rotation = _rotation_to_first(slope)
    covariance = rotation @ np.diag(sizes**2) @ rotation.T
    beta = float(np.linalg.norm(slope))
    beta = beta if beta * sizes.max() > _RELATIVE_ZERO * size else 0.0
    radius = math.sqrt(2.0 * epsilon)
    if not prior.tail.extra:
        return -_log_probability(offset, radius, beta, rest, covariance) / LN2
    knots, log_s, _ = scale_table(prior.tail)
    # every eighth knot: steps of 1/8 in a standard normal coordinate, where the trapezoidal rule is spectral
    z, scale = knots[::8], np.exp(log_s[::8])
    inside = [_log_probability(offset / s, radius / s, beta, rest, covariance) for s in scale]
    log_weight = -0.5 * z**2
    return float((special.logsumexp(log_weight) - special.logsumexp(log_weight + np.array(inside))) / LN2)


def _log_probability(offset: float, radius: float, beta: float, rest: float, covariance: np.ndarray) -> float:
    """``log P[offset + beta Y_1 + rest xi <= 0, ||Y|| <= radius]`` for ``Y ~ N(0, covariance)``."""
    deviation = math.sqrt(covariance[0, 0])
    total = math.hypot(beta * deviation, rest)
    mode = -max(offset, 0.0) * beta * deviation**2 / total**2 if total > 0 else 0.0
    low, high = max(-radius, mode - _REACH * deviation), min(radius, max(mode, 0.0) + _REACH * deviation)
    bends = [0.0, mode]
    if beta > 0:
        edge, width = -offset / beta, rest / beta
        if rest == 0:
            high = min(high, edge)
        bends += [edge + k * width for k in (-8.0, -2.0, 0.0, 2.0, 8.0)]
    if not low < high:
        return -math.inf
    # graded toward the edges of the ball: square roots there, and a steep layer where the score wants to leave it
    bends += [side * radius * (1.0 - 10.0**-j) for j in range(1, 11) for side in (-1.0, 1.0)]
    y, log_weight = _panels(low, high, bends, 0.25 * deviation, 400)
    log_density = -0.5 * (y / deviation) ** 2 - 0.5 * math.log(2 * math.pi) - math.log(deviation)
    log_fail = _log_tail(offset + beta * y, rest)
    return float(special.logsumexp(log_weight + log_density + log_fail + _log_ball(y, radius, covariance)))


def _log_ball(y: np.ndarray, radius: float, covariance: np.ndarray) -> np.ndarray:
    """``log P[||Y_2..k|| <= sqrt(radius^2 - y^2) | Y_1 = y]``."""
    if len(covariance) == 1:
        return np.zeros_like(y)
    share = covariance[1:, 0] / covariance[0, 0]
    conditional = covariance[1:, 1:] - np.outer(share, covariance[0, 1:])
    reach = np.sqrt(np.maximum(radius**2 - y**2, 0.0))
    if len(covariance) == 2:
        return _log_interval(share[0] * y, math.sqrt(conditional[0, 0]), reach)
    # one more output, over the part of its reach that has mass; sin-substituted, so that the ball's edge is smooth
    mean, deviation = (share[0] * y)[:, None], math.sqrt(conditional[0, 0])
    edge = reach[:, None]
    low = np.maximum(-edge, np.minimum(mean, edge) - _REACH * deviation)
    high = np.minimum(edge, np.maximum(mean, -edge) + _REACH * deviation)
    angle, log_weight = _panels(-math.pi / 2, math.pi / 2, [0.0], math.pi / 16, 16)
    half = (high - low) / 2.0
    second = low + half * (1.0 + np.sin(angle))
    with np.errstate(divide="ignore"):
        log_jacobian = np.log(half) + np.log(np.cos(angle))
    log_density = -0.5 * ((second - mean) / deviation) ** 2 - 0.5 * math.log(2 * math.pi) - math.log(deviation)
    slope = conditional[1, 0] / conditional[0, 0]
    third_mean = (share[1] * y)[:, None] + slope * (second - mean)
    third = math.sqrt(conditional[1, 1] - slope * conditional[0, 1])
    log_third = _log_interval(third_mean, third, np.sqrt(np.maximum(edge**2 - second**2, 0.0)))
    return np.asarray(special.logsumexp(log_weight + log_jacobian + log_density + log_third, axis=1))


def _log_tail(level: np.ndarray, deviation: float) -> np.ndarray:
    """``log P[level + deviation xi <= 0]``; a step when nothing is left to vary."""
    if deviation == 0:
        return np.where(level <= 0, 0.0, -math.inf)
    return np.asarray(special.log_ndtr(-level / deviation))


def _log_interval(mean: np.ndarray, deviation: float, reach: np.ndarray) -> np.ndarray:
    """``log P[|N(mean, deviation^2)| <= reach]`` without cancellation: seen from the nearer tail."""
    mean = np.abs(mean)
    upper, lower = special.log_ndtr((reach - mean) / deviation), special.log_ndtr((-reach - mean) / deviation)
    with np.errstate(divide="ignore"):
        return np.asarray(upper + np.log(-np.expm1(np.minimum(lower - upper, 0.0))))


def _panels(low: float, high: float, bends: list[float], width: float, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre nodes and log weights on ``[low, high]``, in panels no wider than ``width`` split at the bends."""
    edges = np.unique([low, *(b for b in bends if low < b < high), high])
    counts = np.clip(np.ceil(np.diff(edges) / width).astype(int), 1, most)
    cuts = np.concatenate(
        [np.linspace(a, b, n, endpoint=False) for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)] + [[high]]
    )
    half = np.diff(cuts) / 2.0
    nodes = (cuts[:-1] + half)[:, None] + half[:, None] * _NODES
    with np.errstate(divide="ignore"):
        log_weights = np.log(half)[:, None] + np.log(_WEIGHTS)
    return nodes.ravel(), log_weights.ravel()


def _rotation_to_first(vector: np.ndarray) -> np.ndarray:
    """An orthogonal matrix whose first row is the unit vector along ``vector`` (any basis for a zero vector)."""
    k = len(vector)
    norm = float(np.linalg.norm(vector))
    if norm == 0:
        return np.eye(k)
    basis, _ = np.linalg.qr(np.column_stack([vector / norm, np.eye(k)]))
    basis[:, 0] = vector / norm
    return np.asarray(basis[:, :k].T)
