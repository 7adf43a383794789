r"""Annealed importance sampling: sequential Monte Carlo inside the failure set, from the centres back to the prior.

Importance sampling from ``N(c, I)`` has the weight ``exp(-c.u + ||c||^2/2)``. Where the boundary is blurred by the
other coordinates (curvature in many directions) ``c.u`` varies among failing draws by more than ``1/||c||``, and a
handful of draws carries the estimate. Here the same change of measure is made in steps that each keep the weights even:

``pi_t ~ 1_E(u) q_t(u)``,  ``q_t = sum_j a_j N(t c_j, I)``,  t from 1 down to 0, where pi_0 is the prior given failure.

``P[E] = q_1(E) prod_l E_{pi_t(l)}[q_t(l+1) / q_t(l)]``: ``q_1(E)`` by counting, every further factor the mean weight of
the particles of its level, a function of ``c_j.u`` alone. Each t is the lowest at which the effective sample size of
the weights stays at ``keep`` of the particles. Particles are then resampled (systematically, within their run) and
moved by a kernel that leaves pi_t invariant: draw a component j given u; with ``s`` the coordinate of u along ``c_j``
and z the rest, propose the autoregression (pCN) ``s - t||c_j|| -> sqrt(1-b^2)(s - t||c_j||) + b xi`` and
``z -> sqrt(1-b'^2) z + b' xi'``, accepted if ``g <= 0``. Moves of s alone alternate with moves of both, because the
failure set is thin along c (``1/||c||``) and wide across it; both steps adapt to their acceptance.

If few draws fail at the centres, the path starts farther out, at the first t >= 1 where a fifth of a pilot fails.

Runs share the schedule and the steps, nothing else; the answer is the mean of their p. Its interval: Student's t on log
p, with a variance pooled from the runs' spread and a model's: ``sum_l var_l`` (var_l the relative variance of level l's
mean weight), plus covariances between levels by the correlation r of ``c.u`` before and after a level's moves, over
``(1-r)^2`` (r does not see all that is slow; the factor fits the ratios measured on half-spaces and on paraboloids, r
from 0.03 to 0.6). Runs that spread beyond the model are flagged and speak alone. Particles that move too slowly lag
behind their level in all runs alike, and B comes out too high: the drift of ``c.u`` within the levels, extrapolated by
r, shows about half of it (``lag``), so that ``low`` goes down by twice that.

Shapes: centres ``(problems, m, dim)``, NaN padded; all of a problem's centres share one path. Without centres the path
is the prior alone, by counting. Units: bits. Guarantee: p is unbiased for a fixed schedule and fixed steps, consistent
for adapted ones. The answer covers the failure that is reached from the centres; a slow kernel (low acceptance,
``correlation`` near 1) shows as spread between the runs, not in any one of them.

References: Neal 2001 (physics/9803008); Del Moral, Doucet & Jasra 2006 (cond-mat/0212648); Cotter et al. 2013
(1202.0709) for pCN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats
from scipy.special import betaincinv, gammaincinv, logsumexp

from elk_stress.core.bits import LN2, BitsBatch, Kind
from elk_stress.core.flags import Flag, flag
from elk_stress.estimators.annealed_path import FEWEST, Found, Path
from elk_stress.estimators.limit_state import LimitState, Meter
from elk_stress.estimators.mixture import Mixture, blocks, check_centres

__all__ = ["Annealed"]

# weight of the model's variance against the runs' own, in degrees of freedom
_MODEL_FREEDOM = 8
# mean correlation beyond which particles count as stuck
_STUCK = 0.8
# chance that runs which differ only by their errors are flagged, per problem
_FALSE_ALARM = 1e-4


@dataclass(frozen=True)
class Annealed:
    """Sequential Monte Carlo from the centres to the prior, restricted to failure.

    Attributes:
        n_particles: particles per run.
        n_runs: independent runs per problem.
        n_moves: moves of each particle per level at the least.
        max_moves: moves per level at the most.
        forget: moves go on until the correlation with what the particles were before falls to this.
        keep: effective share of the particles that each step of t keeps.
        min_effective: effective particles (all runs) below which the result is flagged.
    """

    n_particles: int = 64
    n_runs: int = 4
    n_moves: int = 6
    max_moves: int = 24
    forget: float = 0.1
    keep: float = 0.7
    min_effective: float = 30.0

    def __post_init__(self) -> None:
        if (
            min(self.n_runs, self.n_moves) < 1
            or self.max_moves < self.n_moves
            or self.n_particles < FEWEST
            or not 0 < self.keep < 1
        ):
            raise ValueError(
                "n_runs and n_moves are at least 1, max_moves at least n_moves, n_particles at least 4 and keep lies "
                f"between 0 and 1; got {self.n_runs}, {self.n_moves}, {self.max_moves}, {self.n_particles}, {self.keep}"
            )

    def __call__(
        self,
        limit_state: LimitState,
        *,
        seed: int,
        centres: np.ndarray,
        max_evaluations: int | None = None,
        keep_failures: int = 0,
    ) -> BitsBatch:
        """Estimate every problem.

        Args:
            limit_state: the problems.
            seed: all randomness.
            centres: ``(problems, m, dim)``, NaN padded; a problem without centres samples the prior.
            max_evaluations: budget per problem. Where it is short, steps of t get longer and particles fewer.
            keep_failures: draws from the prior *given failure* to return in ``diagnostics["failures"]``, at the price
                of one level more.

        Returns:
            Estimates; ``diagnostics`` per problem: ``levels``, ``moves`` (all levels), ``accepted``, ``effective`` (the
            least of any level), ``correlation`` (mean over levels), ``lag`` (bits), ``run_bits`` (problems, runs),
            ``model_variance`` (of one run's log p, nats^2), and ``failures`` (problems, keep_failures, dim), NaN where
            nothing failed.
        """
        check_centres(limit_state, centres)
        n = self.n_particles
        if max_evaluations is not None:
            # eight levels at the least: fewer particles are better than steps that leave one particle
            n = int(max(0, min(n, max_evaluations // (self.n_runs * (2 + 8 * self.n_moves)))))
        rng = np.random.default_rng(np.random.SeedSequence(seed))
        meter = Meter(limit_state, max_evaluations)
        found = Found.empty(limit_state.n_problems, self.n_runs, n, keep_failures, limit_state.dim)
        if n >= FEWEST:
            mixture = Mixture.at(centres, n, 0.0)
            for block in blocks(limit_state.n_problems, n * self.n_runs, limit_state.dim):
                Path(self, meter, mixture, block, found, rng).run()
        return _combine(self, meter, found, max_evaluations is not None and n < self.n_particles)


def _combine(config: Annealed, meter: Meter, found: Found, cut: bool) -> BitsBatch:
    """Runs -> one value, interval, kind and flags per problem."""
    p, runs = found.log_p.shape
    n_live = np.isfinite(found.log_p).sum(axis=1)
    some = n_live > 0
    log_p = logsumexp(np.where(some[:, None], found.log_p, 0.0), axis=1) - math.log(runs)
    between = np.array(
        [x[np.isfinite(x)].var(ddof=1) if k > 1 else 0.0 for x, k in zip(found.log_p, n_live, strict=True)]
    )
    model = found.variance / np.maximum(1.0 - found.correlation, 0.05) ** 2
    freedom = np.maximum(n_live - 1, 0)
    spread = (freedom * between + _MODEL_FREEDOM * model) / (freedom + _MODEL_FREEDOM)
    beyond = stats.f.isf(_FALSE_ALARM, np.maximum(freedom, 1), 3 * _MODEL_FREEDOM)
    apart = (freedom > 0) & (between > beyond * model)
    t = stats.t.ppf(0.975, np.where(apart, np.maximum(freedom, 1), freedom + _MODEL_FREEDOM))
    half = t * np.sqrt(np.where(apart, between, spread) / np.maximum(n_live, 1))
    # particles that lag behind their level make every factor too small: twice the lag, which is seen only in part
    low_p, high_p = log_p - half, log_p + half + 2.0 * np.maximum(found.lag, 0.0)
    k = np.maximum(found.effective, 1.0)
    poor = some & (found.effective < config.min_effective)
    low_p = np.where(poor, np.minimum(low_p, log_p + np.log(gammaincinv(k, 0.025) / k)), low_p)
    # were all particles as heavy as the few that carry the estimate
    crowd = np.log(np.maximum(found.n * runs, k) / k) + np.log(gammaincinv(k + 1, 0.975) / k)
    high_p = np.where(poor, np.maximum(high_p, log_p + crowd), high_p)
    # by counting alone the interval is exact (Clopper & Pearson)
    count, drawn = found.counted, np.maximum(found.drawn, 1)
    plain = some & (found.levels == 0)
    with np.errstate(divide="ignore"):
        exact_low = np.log(betaincinv(np.maximum(count, 1), np.maximum(drawn - count, 0) + 1, 0.025))
        exact_high = np.where(count < drawn, np.log(betaincinv(count + 1, np.maximum(drawn - count, 1), 0.975)), 0.0)
        silent = -np.log(-np.expm1(np.log(0.05) / drawn)) / LN2
    low_p, high_p = np.where(plain, exact_low, low_p), np.where(plain, exact_high, high_p)
    value = np.where(some, -log_p / LN2, np.where(found.from_prior & (found.drawn > 0), silent, 0.0))
    value = np.maximum(0.0, value)
    flags: list[tuple[Flag, ...]] = []
    status: list[str] = []
    for i in range(p):
        raised: list[Flag] = []
        told = "ok"
        if cut or found.forced[i]:
            raised.append(flag("budget_exhausted", f"{found.n} particles, {found.levels[i]} levels"))
        if not some[i]:
            told = "no draw failed, neither at the centres nor beyond them: censored; add centres on the boundary"
            if found.from_prior[i]:
                told = "no draw failed: censored by the draws from the prior; add centres on the boundary"
            if found.n < FEWEST:
                told = "the budget pays for no particles; raise max_evaluations"
        elif not plain[i]:
            if poor[i]:
                raised.append(flag("low_effective_sample_size", f"{found.effective[i]:.1f} effective particles"))
                told = (
                    f"only {found.effective[i]:.1f} effective particles at the worst level: the interval was widened; "
                    "add centres on the boundary, or raise n_particles or max_evaluations"
                )
            elif found.correlation[i] > _STUCK:
                raised.append(
                    flag("low_effective_sample_size", f"particles hardly move: correlation {found.correlation[i]:.2f}")
                )
                told = "particles hardly move between levels: the answer may be too high; raise max_moves"
            if apart[i] or 1 < runs > n_live[i]:
                bits = -found.log_p[i] / LN2
                raised.append(flag("runs_disagree", f"runs range from {bits.min():.1f} to {bits.max():.1f} bits"))
                told = "runs disagree beyond their errors: the interval is theirs; raise n_particles or max_moves"
        flags.append(tuple(raised))
        status.append(told)
    diagnostics = {
        "levels": found.levels,
        "moves": found.moves,
        "accepted": found.accepted,
        "effective": found.effective,
        "correlation": found.correlation,
        "lag": found.lag / LN2,
        "run_bits": -found.log_p / LN2,
        "model_variance": model,
    }
    if found.failures.shape[1]:
        diagnostics["failures"] = found.failures
    return BitsBatch.build(
        value,
        np.where(some, np.maximum(0.0, -np.minimum(high_p, 0.0) / LN2), value),
        np.where(some, np.maximum(0.0, -low_p / LN2), np.inf),
        [Kind.ESTIMATE if s else Kind.CENSORED for s in some],
        "annealed",
        evaluations=meter.evaluations,
        gradients=meter.gradients,
        status=status,
        flags=flags,
        diagnostics=diagnostics,
    )
