r"""Line sampling: the tail along the design direction is exact, the rest is averaged.

With a the unit vector to the nearest design point, ``u = z + t a``, z standard normal orthogonal to a, t ~ N(0, 1):

``p = E_z[ P_t(g(z + t a) <= 0) ]``.

On each line g is read on a grid in t that is finer near the design point; every sign change is a root, bracketed by
bisection, and the probability of the failing intervals is summed exactly: ``sum Phi(end) - Phi(start)``, in logarithms
so that hundreds of bits survive. Beyond the grid the sign is taken to stay: what lies there has probability below
``Phi(-(beta + 6))``.

Interval: Student's t over the lines on log p (delta method), widened by the roots' tolerance; where fewer than
``min_effective`` lines carry the estimate it widens to the Poisson interval of that many counts and is flagged.

Shapes: centres ``(problems, m, dim)``; only the nearest of each problem gives a direction. Units: bits.
Guarantee: unbiased if every root on each line is found, wherever the direction points; a direction that misses the
failure set only costs variance.

References: Koutsourelakis et al. 2004; de Angelis et al. 2015.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import log_ndtr, logsumexp

from elk_stress.core.bits import LN2, BitsBatch, Kind
from elk_stress.core.flags import Flag, flag
from elk_stress.estimators.boundary import cross
from elk_stress.estimators.importance import weighted_interval
from elk_stress.estimators.limit_state import BudgetExhausted, LimitState, Meter
from elk_stress.estimators.mixture import affordable, blocks, check_centres

__all__ = ["LineSampling"]


@dataclass(frozen=True)
class LineSampling:
    """Averages exact one-dimensional tails.

    Attributes:
        n_particles: lines per problem.
        n_grid: points read on each line before roots are bracketed; two roots between neighbours are missed.
        tolerance: final bracket of a root, in t.
        min_effective: effective lines below which the interval widens and the result is flagged.
    """

    n_particles: int = 128
    n_grid: int = 33
    tolerance: float = 1e-5
    min_effective: float = 10.0

    def __call__(
        self, limit_state: LimitState, *, seed: int, centres: np.ndarray, max_evaluations: int | None = None
    ) -> BitsBatch:
        """Estimate every problem.

        Args:
            limit_state: the problems.
            seed: of the lines.
            centres: ``(problems, m, dim)`` nearest first; a problem without one uses a random direction.
            max_evaluations: budget per problem; fewer lines are drawn where it is smaller.

        Returns:
            Estimates; ``diagnostics``: ``effective`` lines, ``roots`` per line. No failing line: ``censored``.
        """
        check_centres(limit_state, centres)
        p, dim = limit_state.n_problems, limit_state.dim
        rng = np.random.default_rng(np.random.SeedSequence(seed))
        meter = Meter(limit_state, max_evaluations)
        # a root takes about four evaluations beside the grid
        n = min(self.n_particles, affordable(self.n_particles * (self.n_grid + 4), meter) // (self.n_grid + 4))
        log_tail, roots = np.full((p, n), -np.inf), np.zeros((p, n), dtype=np.int64)
        direction, beta = _direction(centres, rng)
        cut = np.full(p, n < self.n_particles)
        for block in blocks(p, n * self.n_grid, dim):
            if n == 0:
                break
            try:
                log_tail[block], roots[block] = self._block(meter, block, direction[block], beta[block], n, rng)
            except BudgetExhausted:
                cut[block] = True
        return self._result(meter, log_tail, roots, beta, cut)

    def _block(
        self, meter: Meter, block: np.ndarray, direction: np.ndarray, beta: np.ndarray, n: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        p, dim = direction.shape
        z = rng.standard_normal((p, n, dim))
        z -= np.einsum("pnd,pd->pn", z, direction)[..., None] * direction[:, None, :]
        grid = _grid(beta, self.n_grid)
        points = z[:, :, None, :] + grid[:, None, :, None] * direction[:, None, None, :]
        g = meter.value(block, points.reshape(p, n * self.n_grid, dim)).reshape(p, n, self.n_grid)
        failed = g <= 0
        row, line, left = np.nonzero(failed[..., 1:] != failed[..., :-1])
        t_left, t_right = grid[row, left], grid[row, left + 1]
        enters = failed[row, line, left + 1]
        t_safe, t_fail = np.where(enters, t_left, t_right), np.where(enters, t_right, t_left)
        g_left, g_right = g[row, line, left], g[row, line, left + 1]
        base, along = z[row, line], direction[row]
        fraction = cross(
            meter,
            block[row],
            base + t_safe[:, None] * along,
            base + t_fail[:, None] * along,
            np.where(enters, g_left, g_right),
            np.where(enters, g_right, g_left),
            tolerance=self.tolerance,
        )
        # the failing end of the bracket is biased towards failure by half of it
        length = np.abs(t_fail - t_safe)
        root = t_safe + (fraction - 0.5 * np.minimum(self.tolerance / np.maximum(length, 1e-300), fraction)) * (
            t_fail - t_safe
        )
        # failing intervals lie between roots; one opens at an entering root, or at -inf if the line starts failed
        pieces = np.full((p, n, self.n_grid), -np.inf)
        starts = np.full((p, n, self.n_grid), np.nan)
        ends = np.full((p, n, self.n_grid), np.nan)
        opening, closing = enters, ~enters
        starts[row[opening], line[opening], left[opening] + 1] = root[opening]
        starts[..., 0] = np.where(failed[..., 0], -np.inf, np.nan)
        ends[row[closing], line[closing], left[closing]] = root[closing]
        ends[..., -1] = np.where(failed[..., -1], np.inf, ends[..., -1])
        # the k-th start and the k-th end of a line belong together: both sorted, absent ones last
        order_start, order_end = np.sort(starts, axis=-1), np.sort(ends, axis=-1)
        paired = ~np.isnan(order_start)
        pieces[paired] = _log_interval(order_start[paired], order_end[paired])
        return np.asarray(logsumexp(pieces, axis=-1)), (failed[..., 1:] != failed[..., :-1]).sum(axis=-1)

    def _result(
        self, meter: Meter, log_tail: np.ndarray, roots: np.ndarray, beta: np.ndarray, cut: np.ndarray
    ) -> BitsBatch:
        log_p, low, high, effective = weighted_interval(log_tail, self.min_effective)
        found = np.isfinite(log_p) & (effective > 0)
        # d log p / dt is about beta + 1/beta in the tail: what the roots' tolerance may move
        slack = self.tolerance * (np.maximum(beta, 1.0) + 1.0)
        value = np.where(found, np.maximum(0.0, -np.where(found, log_p, 0.0) / LN2), 0.0)
        flags: list[tuple[Flag, ...]] = []
        status: list[str] = []
        for i in range(value.shape[0]):
            raised: tuple[Flag, ...] = (flag("budget_exhausted", "fewer lines than asked for"),) if cut[i] else ()
            if not found[i]:
                status.append("no line met a failure: nothing is known; give a design point or another method")
            elif effective[i] < self.min_effective:
                raised += (flag("low_effective_sample_size", f"{effective[i]:.1f} effective lines"),)
                status.append(f"only {effective[i]:.1f} effective lines: the interval was widened; raise n_particles")
            else:
                status.append("ok")
            flags.append(raised)
        return BitsBatch.build(
            value,
            np.where(found, np.maximum(0.0, -(high + slack) / LN2), 0.0),
            np.where(found, np.maximum(0.0, -(low - slack) / LN2), np.inf),
            [Kind.ESTIMATE if f else Kind.CENSORED for f in found],
            "line_sampling",
            evaluations=meter.evaluations,
            gradients=meter.gradients,
            status=status,
            flags=flags,
            diagnostics={
                "effective": effective,
                "roots": roots.mean(axis=1) if roots.shape[1] else np.zeros(len(value)),
            },
        )


def _direction(centres: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Unit directions ``(problems, dim)`` and distances; a random one (distance 0) where no centre is known."""
    p, _, dim = centres.shape
    norm = np.linalg.norm(centres, axis=-1)
    nearest = np.argmin(np.where(np.isnan(norm), np.inf, norm), axis=1)
    chosen, length = centres[np.arange(p), nearest], norm[np.arange(p), nearest]
    bad = ~(length > 0)
    random = rng.standard_normal((p, dim))
    random /= np.linalg.norm(random, axis=1, keepdims=True)
    beta = np.where(bad, 0.0, length)
    return np.where(bad[:, None], random, np.where(bad[:, None], 0.0, chosen) / np.maximum(beta, 1e-300)[:, None]), beta


def _grid(beta: np.ndarray, n: int) -> np.ndarray:
    """``(problems, n)`` increasing t from ``-(beta + 6)`` to ``beta + 6``: half of the points within 4 of beta."""
    reach = beta + 6.0
    coarse = np.linspace(-1.0, 1.0, n - n // 2)[None, :] * reach[:, None]
    fine = np.linspace(-4.0, 4.0, n // 2)[None, :] + beta[:, None]
    return np.sort(np.concatenate([coarse, fine], axis=1), axis=1)


def _log_interval(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """``log(Phi(end) - Phi(start))`` from whichever tail is the smaller."""
    flip = start > -end
    a, b = np.where(flip, -end, start), np.where(flip, -start, end)
    log_b, log_a = log_ndtr(b), log_ndtr(a)
    with np.errstate(divide="ignore", invalid="ignore"):
        difference = log_b + np.log(-np.expm1(np.minimum(log_a - log_b, 0.0)))
    return np.asarray(np.where(np.isfinite(difference), difference, -np.inf))
