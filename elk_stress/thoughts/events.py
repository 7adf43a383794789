r"""From probe, prior, threshold and behaviour to limit states: the events whose bits are measured.

============  ====================================================================================
event         limit state (failure when <= 0), scaled so that an unmoved item has |g| about 1
============  ====================================================================================
item failed   ``(score(origin_i + move(u)) - threshold) / scale``
item kept     ``0.5 ||F_i move(u)||^2 / epsilon - 1``
universal     the order statistic of the margins that decides whether the metric is at most tau:
              recall <= tau exactly when the ``(floor(tau n) + 1)``-th largest margin is <= 0, and
              AUROC <= tau exactly when the like order statistic of all score differences is <= 0
============  ====================================================================================

The universal events are thus continuous in u although the metrics are step functions; nothing is smoothed.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.special import log_ndtr, ndtri_exp

from elk_stress.core.arrays import like, namespace
from elk_stress.estimators.limit_state import LimitState, Linear
from elk_stress.probing.probe import FittedProbe
from elk_stress.probing.wrapping.opaque import runs_in_jax
from elk_stress.threats.priors import EllipticalPrior

__all__ = [
    "failures_of_linear",
    "item_event",
    "kept_event",
    "linear_weight",
    "nearest_kept",
    "nearest_of_linear",
    "ranks_of_levels",
    "universal_auroc_event",
    "universal_recall_event",
]


def linear_weight(probe: FittedProbe) -> np.ndarray | None:
    """``(d,)`` float64 weight of a linear probe, else ``None``."""
    return np.asarray(probe.parameters["weight"], dtype=float) if probe.traits.linear else None


def item_event(
    probe: FittedProbe,
    prior: EllipticalPrior,
    origins: np.ndarray,
    threshold: float | np.ndarray,
    *,
    closed: bool = True,
) -> LimitState:
    """One problem per row of ``origins (n, d)``: the probe no longer scores it above ``threshold``, one or ``(n,)``.

    A linear probe carries its closed form unless ``closed`` is false (joint events have none). One that knows how
    steep its score is carries that, under Gaussian tails: its bits are bounded from below (``certificate``).
    """
    weight = linear_weight(probe)
    margins = np.asarray(probe.score(origins), dtype=float) - threshold
    if weight is not None and closed:
        return _linear_state(prior, weight, margins)
    scale = _size(margins)

    def function(data: Any, u: Any) -> Any:
        x = data["origin"][:, None, :] + prior.move(u)
        return (probe.score(x) - data["threshold"][:, None]) / scale

    thresholds = np.broadcast_to(np.asarray(threshold, dtype=np.float32), len(origins))
    data = {"origin": np.asarray(origins, dtype=np.float32), "threshold": thresholds}
    return _searched(function, prior, data, probe, slope=_slope(probe, prior, scale))


def kept_event(prior: EllipticalPrior, factors: np.ndarray, epsilon: float) -> LimitState:
    """One problem per factor ``F (n, rank, d)``: behaviour is kept when the quadratic shift is at most ``epsilon``."""
    inner = np.asarray(factors @ prior.factor, dtype=np.float32)
    rank = prior.factor.shape[1]

    def function(data: Any, u: Any) -> Any:
        xp = namespace(u)
        v = u[..., :rank]
        if prior.tail.extra:
            v = v * prior.tail.scale(u[..., rank:], xp)
        image = xp.einsum("pnk,prk->pnr", v, data["inner"])
        return 0.5 * (image * image).sum(-1) / data["epsilon"][:, None] - 1

    return _searched(function, prior, {"inner": inner, "epsilon": np.full(len(inner), epsilon, dtype=np.float32)})


def ranks_of_levels(levels: float | np.ndarray, n: int) -> np.ndarray:
    """Rank (from 0, best first) of the one of ``n`` margins by whose fall the metric comes down to each level.

    ``floor(level n)``, where 0.3 of 10 is 3 although the product is a little less in floating point; at most the last.
    """
    return np.minimum(np.floor(np.asarray(levels) * n + 1e-9), n - 1).astype(int)


def universal_recall_event(
    probe: FittedProbe, prior: EllipticalPrior, positives: np.ndarray, threshold: float, levels: np.ndarray
) -> LimitState:
    """One problem per level tau: one move for all leaves recall on ``positives (n, d)`` at most tau."""
    n = len(positives)
    ranks = ranks_of_levels(levels, n)
    weight = linear_weight(probe)
    if weight is not None:
        margins = np.asarray(probe.score(positives), dtype=float) - threshold
        return _linear_state(prior, weight, np.sort(margins)[::-1][ranks])
    spread = float(np.std(np.asarray(probe.score(positives), dtype=float))) or 1.0

    def function(data: Any, u: Any) -> Any:
        xp = namespace(u)
        x = prior.move(u)[:, :, None, :] + like(positives.astype(np.float32), u)[None, None]
        ordered = xp.sort((probe.score(x) - threshold) / spread, axis=-1)[..., ::-1]
        return xp.take_along_axis(ordered, xp.asarray(data["rank"])[:, None, None], axis=-1)[..., 0]

    # an order statistic is no steeper than the steepest of what it orders
    return _searched(function, prior, {"rank": ranks.astype(np.int32)}, probe, n, slope=_slope(probe, prior, spread))


def universal_auroc_event(
    probe: FittedProbe, prior: EllipticalPrior, items: np.ndarray, labels: np.ndarray, levels: np.ndarray
) -> LimitState:
    """One problem per level tau: one move for all leaves the AUROC on ``items (n, d)`` at most tau.

    A shift of all items moves every score of a linear probe equally: its AUROC never changes, and no number of bits
    breaks it (an infinite closed form).
    """
    positives, negatives = items[labels == 1], items[labels == 0]
    pairs = len(positives) * len(negatives)
    ranks = ranks_of_levels(levels, pairs)
    weight = linear_weight(probe)
    if weight is not None:
        scores = np.asarray(probe.score(items), dtype=float)
        gaps = np.sort((scores[labels == 1][:, None] - scores[labels == 0][None, :]).ravel())[::-1]
        return _linear_state(prior, np.zeros_like(weight), gaps[ranks])
    spread = float(np.std(np.asarray(probe.score(items), dtype=float))) or 1.0
    stacked = np.concatenate([positives, negatives]).astype(np.float32)

    def function(data: Any, u: Any) -> Any:
        xp = namespace(u)
        scores = probe.score(prior.move(u)[:, :, None, :] + like(stacked, u)[None, None]) / spread
        gaps = scores[..., : len(positives), None] - scores[..., None, len(positives) :]
        ordered = xp.sort(gaps.reshape(*gaps.shape[:2], pairs), axis=-1)[..., ::-1]
        return xp.take_along_axis(ordered, xp.asarray(data["rank"])[:, None, None], axis=-1)[..., 0]

    # a difference of two scores is at most twice as steep
    return _searched(
        function, prior, {"rank": ranks.astype(np.int32)}, probe, len(items), slope=_slope(probe, prior, spread / 2)
    )


def nearest_of_linear(state: LimitState, overshoot: float = 1e-6) -> np.ndarray:
    """``(problems, dim)``: the shortest u that fails, for a state with a closed form and a nonzero weight.

    Under a heavy tail the move grows with the scale coordinate too: minimize ``t^2 + z^2`` with ``t s(z) = beta``,
    ``beta`` the standardized margin.
    """
    assert state.linear is not None
    weight, offset, tail = state.linear.weight, state.linear.offset, state.linear.tail
    length = np.linalg.norm(weight, axis=1)
    beta = (1 + overshoot) * offset / np.where(length > 0, length, np.inf)
    unit = -weight / np.where(length > 0, length, 1.0)[:, None]
    if tail is None or not tail.extra:
        return np.asarray(beta[:, None] * unit)
    z = np.linspace(0.0, 12.0, 2401)
    scale = np.asarray(tail.scale(z, np), dtype=float)
    t = beta[:, None] / scale[None, :]
    best = np.argmin(t**2 + z[None, :] ** 2, axis=1)
    return np.concatenate([np.take_along_axis(t, best[:, None], axis=1) * unit, z[best][:, None]], axis=1)


def nearest_kept(
    prior: EllipticalPrior, weights: np.ndarray, margins: np.ndarray, factors: np.ndarray, epsilon: float
) -> np.ndarray:
    """``(problems, 1, dim)``: the shortest u that fails a linear probe and keeps a quadratic shift.

    Minimize ``||v||^2 + z^2`` with ``s a.v = -m`` and ``0.5 s^2 ||G v||^2 <= epsilon``, a and G the weight and the
    factor F in the prior's coordinates: for each multiplier mu of the second, ``v`` is along ``-(I + mu G'G)^-1 a``, so
    one bisection in mu per point of a grid over the scale coordinate z solves it. The point fails and keeps by a hair's
    breadth; NaN where nothing does.

    Args:
        weights: ``(d,)`` or ``(problems, d)``.
        margins: ``(problems,)`` score minus threshold.
        factors: ``(problems, rank, d)``.
    """
    problems, rank = len(margins), prior.factor.shape[1]
    a = np.broadcast_to(np.asarray(weights, dtype=float) @ prior.factor, (problems, rank))
    inner = np.asarray(factors @ prior.factor, dtype=float)
    _, size, right = np.linalg.svd(inner, full_matrices=False)
    along = np.einsum("prk,pk->pr", right, a)
    whole = (a**2).sum(axis=1)
    rest = whole - (along**2).sum(axis=1)
    # what rounding leaves of a direction that behaviour reads entirely is nothing, not a way round behaviour
    rest = np.where(rest > 1e-9 * whole, rest, 0.0)
    z = np.linspace(0.0, 10.0, 101) if prior.tail.extra else np.zeros(1)
    scale = np.asarray(prior.tail.scale(z, np), dtype=float) if prior.tail.extra else np.ones(1)
    m = 1.001 * margins[:, None] / scale[None, :]
    allowed = 0.998 * epsilon / scale[None, :] ** 2

    def solve(log_mu: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        damped = along[:, None, :] / (1 + np.exp(log_mu)[..., None] * size[:, None, :] ** 2)
        gain = (along[:, None, :] * damped).sum(-1) + rest[:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            times = -m / gain
            shift = 0.5 * times**2 * (size[:, None, :] ** 2 * damped**2).sum(-1)
        return damped, times, shift

    low, high = np.full(m.shape, -40.0), np.full(m.shape, 60.0)
    for _ in range(60):
        middle = 0.5 * (low + high)
        too_much = ~(solve(middle)[2] <= allowed)
        low, high = np.where(too_much, middle, low), np.where(too_much, high, middle)
    damped, times, shift = solve(high)
    # without a slope nothing fails, at any multiple of it
    with np.errstate(invalid="ignore"):
        length = times**2 * ((damped**2).sum(-1) + rest[:, None]) + z[None, :] ** 2
    length = np.where((shift <= allowed) & np.isfinite(length), length, np.inf)
    best = np.argmin(length, axis=1)
    rows = np.arange(problems)
    across = a - np.einsum("pr,prk->pk", along, right)
    with np.errstate(invalid="ignore"):
        v = times[rows, best][:, None] * (across + np.einsum("pr,prk->pk", damped[rows, best], right))
    u = np.concatenate([v, z[best][:, None]], axis=1) if prior.tail.extra else v
    return np.where(np.isfinite(length[rows, best])[:, None], u, np.nan)[:, None, :]


def failures_of_linear(state: LimitState, n: int, rng: np.random.Generator) -> np.ndarray:
    """``(problems, n, dim)``: exact draws of the prior given failure, for a state with a closed form.

    Along the weight a normal truncated beyond the boundary, across it an ordinary normal. Under a heavy tail the scale
    coordinate comes first, from its density given failure, ``phi(z) Phi(-beta/s(z))``, by inverting its distribution
    on a grid of step 0.005.
    """
    assert state.linear is not None
    weight, offset, tail = state.linear.weight, state.linear.offset, state.linear.tail
    length = np.linalg.norm(weight, axis=1)
    if not (length > 0).all():
        raise ValueError("draws given failure need an event of positive probability: the weight is zero in the prior")
    beta = offset / length
    unit = -weight / length[:, None]
    bounds = np.broadcast_to(beta[:, None], (len(beta), n))
    z = None
    if tail is not None and tail.extra:
        grid = np.arange(-8.0, 38.0, 0.005)
        log_scale = np.log(np.asarray(tail.scale(grid, np), dtype=float))
        z = np.empty((len(beta), n))
        for i, b in enumerate(beta):
            log_density = -0.5 * grid**2 + log_ndtr(-b / np.exp(log_scale))
            cumulative = np.cumsum(np.exp(log_density - log_density.max()))
            z[i] = np.interp(rng.random(n) * cumulative[-1], cumulative, grid)
        bounds = beta[:, None] / np.exp(np.interp(z, grid, log_scale))
    # t >= bound: -Phi^-1 of a uniform share of the tail beyond it, in logarithms
    t = -ndtri_exp(log_ndtr(-bounds) + np.log1p(-rng.random((len(beta), n))))
    across = rng.standard_normal((len(beta), n, weight.shape[1]))
    across -= np.einsum("pnk,pk->pn", across, unit)[..., None] * unit[:, None, :]
    v = across + t[..., None] * unit[:, None, :]
    return v if z is None else np.concatenate([v, z[..., None]], axis=-1)


def _searched(
    function: Any,
    prior: EllipticalPrior,
    data: dict[str, np.ndarray],
    probe: FittedProbe | None = None,
    cost: int = 1,
    *,
    slope: float | None = None,
) -> LimitState:
    """A limit state without a closed form: jax in single precision, one problem per row of ``data``.

    Compiled and differentiated as far as the ``probe`` in it can be.
    """
    n_problems = len(next(iter(data.values())))
    return LimitState(
        function=function,
        dim=prior.dim,
        n_problems=n_problems,
        backend="jax",
        dtype="float32",
        data=data,
        lipschitz=None if slope is None else np.full(n_problems, slope),
        differentiable=probe is None or probe.traits.differentiable,
        jit=probe is None or runs_in_jax(probe),
        what="" if probe is None else f"the probe {probe.name!r}",
        cost=cost,
    )


def _slope(probe: FittedProbe, prior: EllipticalPrior, unit: float) -> float | None:
    """A bound on how steep ``score / unit`` is in u; ``None`` where unknown, zero, or under a heavy tail."""
    known = None if prior.tail.extra else probe.lipschitz(prior.factor)
    return None if not known or not math.isfinite(known) else known / unit


def _size(margins: np.ndarray) -> float:
    """Typical size of a margin, never 0: the unit of a limit state."""
    return (float(np.median(np.abs(margins))) if len(margins) else 1.0) or 1.0


def _linear_state(prior: EllipticalPrior, weight: np.ndarray, offset: np.ndarray) -> LimitState:
    inner = prior.factor.T.astype(float) @ weight
    size = _size(offset)
    rows = np.broadcast_to(inner / size, (len(offset), len(inner)))
    rank = len(inner)
    tail = prior.tail

    def function(data: Any, u: Any) -> Any:
        projected = u[..., :rank] @ (inner / size)
        if tail.extra:
            projected = projected * np.asarray(tail.scale(u[..., rank], np))
        return data["offset"][:, None] + projected

    def gradient(data: Any, u: Any) -> Any:
        if not tail.extra:
            return np.broadcast_to(inner / size, u.shape)
        z, h = u[..., rank], 1e-4
        scale = np.asarray(tail.scale(z, np))
        slope = (np.asarray(tail.scale(z + h, np)) - np.asarray(tail.scale(z - h, np))) / (2 * h)
        projected = u[..., :rank] @ (inner / size)
        return np.concatenate([scale[..., None] * (inner / size), (projected * slope)[..., None]], axis=-1)

    return LimitState(
        function=function,
        dim=prior.dim,
        n_problems=len(offset),
        backend="numpy",
        gradient=gradient,
        linear=Linear(rows, offset / size, tail if tail.extra else None),
        data={"offset": offset / size},
        lipschitz=None if tail.extra else np.full(len(offset), math.sqrt(float((inner / size) @ (inner / size)))),
    )
