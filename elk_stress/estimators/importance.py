r"""Importance sampling from Gaussians at the design points.

Draws come from ``q = defensive N(0, I) + sum_j a_j N(c_j, I)``; with ``w = prior/q`` and E the failure,

``p_hat = mean(w 1_E)``, unbiased whatever the centres are.

Centred *on* the boundary of a half-space at distance beta about half of the draws fail and the relative variance per
draw is ``beta sqrt(pi/2)`` (times ``1/(1 - defensive)``). A centre beyond the boundary degenerates to a single heavy
draw, so the estimate is gated on its effective sample size ``(sum w)^2 / sum w^2`` over failing draws.

Interval: ``log p_hat -+ t s`` with ``s^2 = var(w 1_E) / (n p_hat^2)`` and Student's t on the effective sample size
(the delta method on log p). Below ``min_effective`` effective draws it is the Poisson interval of that many counts,
which is wider and skewed, and the result is flagged. Without a failing draw only the defensive draws speak:
``B >= -log2(1 - 0.05^(1/n))``, censored.

Shapes: centres ``(problems, m, dim)``, NaN padded. Units: bits. Guarantee: p is unbiased; the interval is asymptotic
and covers the failure that the centres can reach, which is why ``auto`` checks it against splitting.

References: Owen & Zhou 2000 (defensive mixtures); Tit, Furon & Rousset 2021; Wu & Hilton 2024 (2410.13211).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import gammaincinv, logsumexp, stdtrit

from elk_stress.core.bits import LN2, BitsBatch, Kind
from elk_stress.core.flags import Flag, flag
from elk_stress.estimators.limit_state import LimitState, Meter
from elk_stress.estimators.mixture import Mixture, affordable, blocks, check_centres

__all__ = ["Importance", "weighted_interval"]


@dataclass(frozen=True)
class Importance:
    """Mixture importance sampling.

    Attributes:
        n_particles: draws per problem.
        defensive: share of the draws that comes from the prior; bounds every weight by its inverse.
        min_effective: effective failing draws below which the interval widens and the result is flagged.
    """

    n_particles: int = 2048
    defensive: float = 0.1
    min_effective: float = 30.0

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
            seed: of the draws.
            centres: ``(problems, m, dim)``, NaN padded; a problem without centres samples the prior.
            max_evaluations: budget per problem; fewer draws are taken where it is smaller.
            keep_failures: draws from the prior *given failure* to return in ``diagnostics["failures"]``.

        Returns:
            Estimates; ``diagnostics``: ``effective`` (problems,), ``failed`` (problems,), and ``failures``
            (problems, keep_failures, dim), resampled by weight, NaN where nothing failed.
        """
        check_centres(limit_state, centres)
        p = limit_state.n_problems
        rng = np.random.default_rng(np.random.SeedSequence(seed))
        meter = Meter(limit_state, max_evaluations)
        n = affordable(self.n_particles, meter)
        failures = np.full((p, keep_failures, limit_state.dim), np.nan)
        log_weight = np.full((p, n), -np.inf)
        mixture = Mixture.at(centres, n, self.defensive)
        for block in blocks(p, n, limit_state.dim):
            if n == 0:
                break
            u, log_ratio = mixture.draw(block, rng)
            failed = meter.value(block, u) <= 0
            log_weight[block] = np.where(failed, -log_ratio, -np.inf)
            if keep_failures:
                failures[block] = _resample(u, log_weight[block], keep_failures, rng)
        return self._result(meter, log_weight, mixture.counts[:, 0], failures if keep_failures else None)

    def _result(
        self, meter: Meter, log_weight: np.ndarray, from_prior: np.ndarray, failures: np.ndarray | None
    ) -> BitsBatch:
        p, n = log_weight.shape
        log_p, low, high, effective = weighted_interval(log_weight, self.min_effective)
        count = np.isfinite(log_weight).sum(axis=1)
        found = count > 0
        # nothing failed: the draws from the prior alone are a rigorous upper limit on p (Clopper-Pearson)
        with np.errstate(divide="ignore"):
            silent = -np.log(-np.expm1(np.log(0.05) / np.maximum(from_prior, 1e-9))) / LN2
        value = np.where(found, np.maximum(0.0, -np.where(found, log_p, 0.0) / LN2), np.maximum(silent, 0.0))
        flags: list[tuple[Flag, ...]] = []
        status: list[str] = []
        for i in range(p):
            if n < self.n_particles:
                cut: tuple[Flag, ...] = (flag("budget_exhausted", f"{n} of {self.n_particles} draws"),)
            else:
                cut = ()
            if not found[i]:
                flags.append(cut)
                status.append("no draw failed: censored by the draws from the prior; add centres on the boundary")
            elif effective[i] < self.min_effective:
                flags.append((*cut, flag("low_effective_sample_size", f"{effective[i]:.1f} effective failing draws")))
                status.append(
                    f"only {effective[i]:.1f} effective failing draws carry this estimate: the interval was widened; "
                    "add centres on the boundary or raise n_particles"
                )
            else:
                flags.append(cut)
                status.append("ok")
        diagnostics = {"effective": effective, "failed": count}
        if failures is not None:
            diagnostics["failures"] = failures
        return BitsBatch.build(
            value,
            np.where(found, np.maximum(0.0, -high / LN2), value),
            np.where(found, np.maximum(0.0, -low / LN2), np.inf),
            [Kind.ESTIMATE if f else Kind.CENSORED for f in found],
            "importance",
            evaluations=meter.evaluations,
            gradients=meter.gradients,
            status=status,
            flags=flags,
            diagnostics=diagnostics,
        )


def weighted_interval(
    log_weight: np.ndarray, min_effective: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """``log p``, its 95% interval and the effective sample size from ``(problems, n)`` log weights (-inf: no failure).

    All zero draws give ``log p = -inf`` and no effective draws. The interval's upper end is at most log 1.
    """
    p, n = log_weight.shape
    if n == 0:
        nothing = np.full(p, -np.inf)
        return nothing, nothing, np.zeros(p), np.zeros(p)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_sum, log_squares = logsumexp(log_weight, axis=1), logsumexp(2 * log_weight, axis=1)
        effective = np.where(np.isfinite(log_sum), np.exp(2 * log_sum - log_squares), 0.0)
    log_p = log_sum - np.log(n)
    k = np.maximum(effective, 1e-9)
    # var(w 1_E) / (n p^2) = 1/effective - 1/n, with the unbiased n - 1
    spread = np.sqrt(np.maximum(1 / k - 1 / n, 0.0) * n / max(1, n - 1))
    # Satterthwaite: the variance itself is only as well known as its own effective number of terms
    with np.errstate(invalid="ignore"):
        terms = np.exp(np.where(k > 0.5, 2 * log_squares - logsumexp(4 * log_weight, axis=1), 0.0))
    t = stdtrit(np.maximum(np.minimum(k - 1, terms), 1.0), 0.975)
    low, high = log_p - t * spread, log_p + t * spread
    poor = k < min_effective
    shape = np.maximum(k, 1.0)
    low = np.where(poor, np.minimum(low, log_p + np.log(gammaincinv(shape, 0.025) / shape)), low)
    high = np.where(poor, np.maximum(high, log_p + np.log(gammaincinv(shape + 1, 0.975) / shape)), high)
    found = np.isfinite(log_sum)
    return log_p, np.where(found, low, -np.inf), np.where(found, np.minimum(high, 0.0), 0.0), effective


def _resample(u: np.ndarray, log_weight: np.ndarray, keep: int, rng: np.random.Generator) -> np.ndarray:
    """``(p, keep, dim)`` draws of the prior given failure: rows of ``u`` chosen by weight, NaN where nothing failed."""
    top = log_weight.max(axis=1, keepdims=True)
    found = np.isfinite(top[:, 0])
    cumulative = np.cumsum(np.exp(log_weight - np.where(found[:, None], top, 0.0)), axis=1)
    # one sorted search for all problems: problem i's cumulative shares are shifted to [i, i + 1]
    rows, (p, n) = np.arange(u.shape[0])[:, None], log_weight.shape
    shares = cumulative / np.maximum(cumulative[:, -1:], 1e-300)
    flat = np.searchsorted((shares + rows).ravel(), (rng.random((p, keep)) + rows).ravel(), side="right")
    chosen = np.clip(flat.reshape(p, keep) - rows * n, 0, n - 1)
    picked = np.take_along_axis(u, chosen[..., None], axis=1)
    return np.where(found[:, None, None], picked, np.nan)
