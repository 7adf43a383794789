r"""Design points: the failing moves of smallest length, and FORM's distance.

The density of ``u ~ N(0, I)`` falls with ``||u||``, so the failing point nearest the origin is the likeliest one. It
is the min-norm adversarial example in the prior's metric, and the place where importance sampling should look.

HL-RF iterates ``u <- (G.u - g) G / ||G||^2`` (the point of the linearized boundary nearest the origin, G the gradient).
It may cycle, so a step is taken only if it lowers the merit ``||u||^2 / 2 + c |g|`` with
``c = 2 max(||u|| / ||G||, ||v||^2 / (2 |g|))``, v the target; else it is halved. Where ``g = max(a, b)`` (failed *and*
kept) the nearest point is a kink: a rejected step that met another gradient gives a second cut, and the next target is
the nearest point that satisfies both linearizations. A piecewise linear g (ReLU) can have many kinks at its nearest
point, where every gradient leads away: a search that has not settled after ``quick`` steps goes on with a full step to
the linearized boundary and a damped one, ``1/(2 + k/2)``, along it. That averages the gradients, since at such a point
u* is a combination of them; the lowest crossing seen is kept. Every search ends on the ray through its point: the
crossing is bracketed, so that a design point is on the boundary, on its failing side, within ``tolerance``.

Shapes: centres ``(problems, m, dim)``, NaN padded, nearest first, in standard normal coordinates.

Guarantee: none as bits. ``-log2 Phi(-beta)`` is exact for a half-space, an upper bound where the failure set contains
the half-space beyond the design point, and a lower bound where the safe set is convex. Hence kind ``distance``. When
the origin fails, beta is minus the distance to the nearest safe point.

References: Hasofer & Lind 1974; Rackwitz & Fiessler 1978; Zhang & Der Kiureghian 1995 (the merit function);
min-norm attacks: Rony et al. 1811.09600 (DDN), Pintor et al. 2102.12827 (FMN).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from elk_stress.core.bits import BitsBatch, Kind, bits_of_beta
from elk_stress.core.flags import Flag, flag
from elk_stress.estimators.boundary import cross
from elk_stress.estimators.limit_state import BudgetExhausted, LimitState, Meter

__all__ = ["DesignPoint", "distinct"]

# problems x starts x dim per block: bounds the working arrays (float64) to about 64 MB each
_BLOCK_ELEMENTS = 1 << 23


@dataclass(frozen=True)
class DesignPoint:
    """Nearest failing points from several starts.

    Attributes:
        n_starts: the origin and ``n_starts - 1`` random directions at radii that grow up to ``reach``.
        reach: radius of the farthest random start; 6 is where a half-space has 30 bits.
        max_iterations: gradient steps per start.
        quick: steps before a search that has not settled is damped.
        tolerance: distance to the boundary and to the optimum, relative to ``1 + ||u||``.
        max_radius: nothing farther from the origin is looked at (40 is about 1,160 bits).
        separation: centres nearer to each other than this are one.
        n_centres: at most so many are kept.
    """

    n_starts: int = 8
    reach: float = 6.0
    max_iterations: int = 60
    quick: int = 15
    tolerance: float = 1e-3
    max_radius: float = 40.0
    separation: float = 0.5
    n_centres: int = 8

    def __call__(
        self,
        limit_state: LimitState,
        *,
        seed: int,
        max_evaluations: int | None = None,
        starts: np.ndarray | None = None,
    ) -> BitsBatch:
        """Search every problem.

        Args:
            limit_state: the problems.
            seed: of the random starts.
            max_evaluations: budget per problem, gradients included.
            starts: ``(problems, s, dim)`` further starts; NaN rows are skipped.

        Returns:
            Bits of kind ``distance``; ``diagnostics``: ``centres``, ``beta`` (problems,), ``converged`` (problems,).
            A problem without any failing point is ``censored`` at 0 bits with NaN beta: nothing was learned.
        """
        n, dim = limit_state.n_problems, limit_state.dim
        rng = np.random.default_rng(np.random.SeedSequence(seed))
        meter = Meter(limit_state, max_evaluations)
        starts = limit_state.starts if starts is None else starts
        n_starts = max(1, self.n_starts) + (0 if starts is None else starts.shape[1])
        step = max(1, _BLOCK_ELEMENTS // (n_starts * dim))
        parts = []
        for first in range(0, n, step):
            block = np.arange(first, min(n, first + step))
            parts.append(self._block(meter, block, rng, None if starts is None else starts[block]))
        centres, beta, converged, exhausted = (np.concatenate(column) for column in zip(*parts, strict=True))
        found = ~np.isnan(beta)
        # without a failing point nothing is known: censored at 0 bits, so that no number pretends to be a distance
        value = np.where(found, bits_of_beta(np.where(found, beta, 0.0)), 0.0)
        status, flags = [], []
        for i in range(n):
            raised: tuple[Flag, ...] = ()
            if exhausted[i]:
                raised += (flag("budget_exhausted", "the design-point search was cut short"),)
            if found[i] and beta[i] < 0:
                raised += (flag("origin_fails", f"the nearest safe point is {-beta[i]:.2f} away"),)
            flags.append(raised)
            status.append(_status(bool(found[i]), bool(converged[i]), bool(exhausted[i])))
        return BitsBatch.build(
            value,
            value,
            np.where(found, value, np.inf),
            [Kind.DISTANCE if f else Kind.CENSORED for f in found],
            "design_point",
            evaluations=meter.evaluations,
            gradients=meter.gradients,
            status=status,
            flags=flags,
            diagnostics={"centres": centres, "beta": beta, "converged": converged},
        )

    def _block(
        self, meter: Meter, block: np.ndarray, rng: np.random.Generator, given: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        p, dim = block.shape[0], meter.limit_state.dim
        starts = np.zeros((p, max(1, self.n_starts), dim))
        extra = starts.shape[1] - 1
        if extra:
            directions = rng.standard_normal((p, extra, dim))
            directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
            starts[:, 1:] = directions * (self.reach * np.arange(1, extra + 1) / extra)[:, None]
        if given is not None:
            starts = np.concatenate([starts, given], axis=1)
        rows, columns = np.nonzero(~np.isnan(starts).any(axis=-1))
        try:
            origin = meter.value(block, np.zeros((p, 1, dim)))[:, 0]
        except BudgetExhausted:
            nothing = np.full((p, 1, dim), np.nan)
            centres = np.full((p, self.n_centres, dim), np.nan)
            centres[:, :1] = nothing
            return centres, np.full(p, np.nan), np.zeros(p, bool), np.ones(p, bool)
        sign = np.where(origin > 0, 1.0, -1.0)
        search = _Search(self, meter, block[rows], sign[rows], starts[rows, columns])
        exhausted = search.run()
        points, reached, cut = search.on_boundary(np.abs(origin)[rows])
        candidates = np.full(starts.shape, np.nan)
        candidates[rows, columns] = np.where(reached[:, None], points, np.nan)
        centres, kept = distinct(candidates, self.separation, self.n_centres)
        distance = np.linalg.norm(centres[:, 0], axis=-1)
        settled = np.zeros(starts.shape[:2], bool)
        settled[rows, columns] = search.converged
        nearest = kept[:, 0]
        converged = ~np.isnan(distance) & settled[np.arange(p), nearest]
        return centres, sign * distance, converged, np.full(p, exhausted or cut)


class _Search:
    """Safeguarded HL-RF of many (problem, start) pairs; private state of :class:`DesignPoint`."""

    def __init__(self, config: DesignPoint, meter: Meter, owner: np.ndarray, sign: np.ndarray, u: np.ndarray) -> None:
        self.config, self.meter, self.owner, self.sign = config, meter, owner, sign
        k = owner.shape[0]
        self.u, self.g, self.slope = u, np.full(k, np.nan), np.zeros(u.shape)
        self.converged = np.zeros(k, bool)  # settled at a stationary point
        self.ended = np.zeros(k, bool)  # u is a point to look for the boundary at
        self.failing = np.full(u.shape, np.nan)  # the nearest failing point that this search has seen
        self.failing_g, self.failing_radius = np.full(k, np.nan), np.full(k, np.inf)

    def run(self) -> bool:
        """Iterate; returns whether the budget ended the search."""
        tolerance = self.config.tolerance
        active = np.arange(self.owner.shape[0])
        step = np.ones(active.shape[0])
        second = np.full(self.u.shape, np.nan)  # target of two cuts, where a kink was met
        try:
            self.g, self.slope = self._evaluate(active, self.u)
            for _ in range(min(self.config.quick, self.config.max_iterations)):
                u, g, slope = self.u[active], self.g[active], self.slope[active]
                steepness = np.einsum("kd,kd->k", slope, slope)
                flat = steepness <= 1e-30
                safe_steepness = np.where(flat, 1.0, steepness)
                target = slope * ((np.einsum("kd,kd->k", slope, u) - g) / safe_steepness)[:, None]
                cut = ~np.isnan(second[active, 0])
                target = _clip(np.where(cut[:, None], second[active], target), self.config.max_radius)
                move = target - u
                size = 1 + np.linalg.norm(u, axis=1)
                near = np.linalg.norm(move, axis=1) <= tolerance * size
                self.converged[active[near & ~flat]] = self.ended[active[near & ~flat]] = True
                go = ~(near | flat | (step[active] < 1e-3))
                if not go.any():
                    break
                active, u, g, slope, target, move = (x[go] for x in (active, u, g, slope, target, move))
                steepness = safe_steepness[go]
                proposal = u + step[active, None] * move
                g_new, slope_new = self._evaluate(active, proposal)
                radius, aim = np.linalg.norm(u, axis=1), np.einsum("kd,kd->k", target, target)
                c = 2 * np.maximum(
                    radius / np.sqrt(steepness), 0.5 * aim / np.maximum(np.abs(g), tolerance * np.sqrt(steepness))
                )
                before = 0.5 * radius**2 + c * np.abs(g)
                after = 0.5 * np.einsum("kd,kd->k", proposal, proposal) + c * np.abs(g_new)
                taken = after < before
                yes, no = active[taken], active[~taken]
                self.u[yes], self.g[yes], self.slope[yes] = proposal[taken], g_new[taken], slope_new[taken]
                step[yes] = np.minimum(1.0, 2 * step[yes])
                second[yes] = np.nan
                both = _two_cuts(u, g, slope, proposal, g_new, slope_new)[~taken]
                fresh = np.isnan(second[no, 0]) & ~np.isnan(both[:, 0])
                step[no] = np.where(fresh, 1.0, 0.5 * step[no])
                second[no] = np.where(fresh[:, None], both, np.nan)
            self._damped()
        except BudgetExhausted:
            return True
        return False

    def _damped(self) -> None:
        """Go on where the quick steps did not settle; end at the lowest crossing of a ray that was seen."""
        steps = self.config.max_iterations - self.config.quick
        active = np.flatnonzero(~self.converged & (np.einsum("kd,kd->k", self.slope, self.slope) > 1e-30))
        if steps < 1 or not active.size:
            return
        u, g, slope = self.u[active], self.g[active], self.slope[active]
        best, lowest = u.copy(), np.full(active.shape[0], np.inf)
        earlier = lowest
        for k in range(steps):
            steepness = np.maximum(np.einsum("kd,kd->k", slope, slope), 1e-30)
            along = np.einsum("kd,kd->k", slope, u)
            # where the ray through u meets the linearized boundary; trusted only near u
            factor = 1 - g / np.where(along < 0, along, -1e-30)
            crossing = np.linalg.norm(u, axis=1) * factor
            better = (np.abs(factor - 1) < 0.1) & (crossing < lowest)
            lowest, best[better] = np.where(better, crossing, lowest), (factor[:, None] * u)[better]
            if k == 2 * steps // 3:
                earlier = lowest
            nearest = slope * ((along - g) / steepness)[:, None]
            foot = u - slope * (g / steepness)[:, None]
            u = _clip(foot + (nearest - foot) / (2 + 0.5 * k), self.config.max_radius)
            g, slope = self._evaluate(active, u)
        found = np.isfinite(lowest)
        self.u[active[found]] = best[found]
        self.ended[active[found]] = True
        self.converged[active] = found & (lowest >= 0.99 * earlier)

    def on_boundary(self, g_origin: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
        """``(points, reached, cut short)``: each search's end, moved along its ray onto the boundary."""
        points, reached = self.failing.copy(), np.isfinite(self.failing_radius)
        radius = np.linalg.norm(self.u, axis=1)
        eta = np.minimum(4 * self.config.tolerance * (1 + 1 / np.maximum(radius, 1e-6)), 0.5)
        low, high = np.zeros(self.u.shape), self.failing.copy()
        g_low, g_high = g_origin.copy(), self.failing_g.copy()
        try:
            some = np.flatnonzero(self.ended & (radius > 0))
            for wider in (1.0, 16.0):
                if not some.size:
                    break
                stretch = np.minimum(wider * eta[some], 0.5)[:, None]
                inner, outer = self.u[some] * (1 - stretch), self.u[some] * (1 + stretch)
                g = self.sign[some, None] * self.meter.value(self.owner[some], np.stack([inner, outer], axis=1))
                around = (g[:, 0] > 0) & (g[:, 1] <= 0)
                these = some[around]
                low[these], high[these] = inner[around], outer[around]
                g_low[these], g_high[these] = g[around, 0], g[around, 1]
                points[these], reached[these] = outer[around], True
                # a ray that fails already before the search's end is crossed nearer the origin
                early = (g[:, 0] <= 0) & (np.linalg.norm(inner, axis=1) < self.failing_radius[some])
                these = some[early]
                high[these], g_high[these] = inner[early], g[early, 0]
                points[these], reached[these] = inner[early], True
                some = some[(g[:, 0] > 0) & (g[:, 1] > 0)]
            ready = np.flatnonzero(reached)
            if ready.size:
                fraction = cross(
                    self.meter,
                    self.owner[ready],
                    low[ready],
                    high[ready],
                    g_low[ready],
                    g_high[ready],
                    sign=self.sign[ready],
                    tolerance=0.1 * self.config.tolerance,
                )
                points[ready] = low[ready] + fraction[:, None] * (high[ready] - low[ready])
        except BudgetExhausted:
            return points, reached, True
        return points, reached, False

    def _evaluate(self, who: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        value, slope = self.meter.value_and_gradient(self.owner[who], points[:, None, :])
        g = self.sign[who] * value[:, 0]
        radius = np.linalg.norm(points, axis=1)
        closer = (g <= 0) & (radius < self.failing_radius[who]) & (radius > 0)
        these = who[closer]
        self.failing[these], self.failing_g[these] = points[closer], g[closer]
        self.failing_radius[these] = radius[closer]
        slope = self.sign[who, None] * slope[:, 0]
        return g, np.where(np.isfinite(slope), slope, 0.0)


def distinct(points: np.ndarray, separation: float, keep: int) -> tuple[np.ndarray, np.ndarray]:
    """The ``keep`` nearest points of each problem that lie at least ``separation`` apart.

    Args:
        points: ``(problems, s, dim)``, NaN rows are absent.

    Returns:
        ``(problems, keep, dim)`` nearest first, NaN padded, and ``(problems, keep)`` their columns in ``points``.
    """
    p, s, dim = points.shape
    radius = np.linalg.norm(points, axis=-1)
    order = np.argsort(np.where(np.isnan(radius), np.inf, radius), axis=1, kind="stable")
    centres, columns, count = np.full((p, keep, dim), np.nan), np.zeros((p, keep), dtype=np.int64), np.zeros(p, int)
    for rank in range(s):
        column = order[:, rank]
        candidate = points[np.arange(p), column]
        gaps = np.linalg.norm(centres - candidate[:, None, :], axis=-1)
        apart = np.where(np.isnan(gaps), np.inf, gaps).min(axis=1) >= separation
        new = np.flatnonzero(apart & (count < keep) & ~np.isnan(candidate[:, 0]))
        centres[new, count[new]], columns[new, count[new]] = candidate[new], column[new]
        count[new] += 1
    return centres, columns


def _two_cuts(
    u: np.ndarray, g: np.ndarray, slope: np.ndarray, w: np.ndarray, g_w: np.ndarray, slope_w: np.ndarray
) -> np.ndarray:
    """Nearest point that satisfies the linearizations at u and at w; NaN where w does not add a second constraint."""
    a11, a22 = np.einsum("kd,kd->k", slope, slope), np.einsum("kd,kd->k", slope_w, slope_w)
    a12 = np.einsum("kd,kd->k", slope, slope_w)
    b1, b2 = np.einsum("kd,kd->k", slope, u) - g, np.einsum("kd,kd->k", slope_w, w) - g_w
    determinant = a11 * a22 - a12**2
    useful = (g_w > 0) & (a12 < 0.95 * np.sqrt(a11 * a22)) & (determinant > 1e-9 * a11 * a22)
    scale = np.where(useful, determinant, 1.0)
    m1, m2 = (-b1 * a22 + b2 * a12) / scale, (-b2 * a11 + b1 * a12) / scale
    both = -(m1[:, None] * slope + m2[:, None] * slope_w)
    # a negative multiplier: the other constraint alone decides
    alone = slope_w * (b2 / np.where(a22 > 0, a22, 1.0))[:, None]
    point = np.where(((m1 >= 0) & (m2 >= 0))[:, None], both, alone)
    return np.where((useful & (m2 >= 0))[:, None], point, np.nan)


def _clip(u: np.ndarray, radius: float) -> np.ndarray:
    norm = np.linalg.norm(u, axis=1, keepdims=True)
    return np.asarray(u * np.minimum(1.0, radius / np.maximum(norm, 1e-300)))


def _status(found: bool, converged: bool, exhausted: bool) -> str:
    if found and converged:
        return "ok"
    if exhausted:
        return "did not converge: the evaluation budget ended; raise max_evaluations"
    if found:
        return (
            "did not converge: the nearest failing point found may not be the nearest; raise n_starts or max_iterations"
        )
    return "did not converge: no failing point was found; raise n_starts, reach or max_iterations, or give starts"
