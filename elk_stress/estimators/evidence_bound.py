r"""A rigorous upper bound on B from one attack distribution, whatever it missed.

For any q and any t, with ``L = log2 dq/dprior``,

``2^-B = P[E] >= P[E, L <= t] = E_q[1{E, L <= t} 2^-L] >= 2^-t q(E, L <= t)``,

so ``B <= t - log2 q(E, L <= t)``. t is fixed on pilot draws (it minimizes the bound there); fresh draws from q give a
Clopper-Pearson lower limit on ``q(E, L <= t)``, hence

``B <= t - log2 CP_low[q(E, L <= t)]``  with probability at least ``confidence``.

q is the mixture of ``N(c_j, I)`` at the given centres: an attacker who aims there. At a half-space the bound lies
about 1.5 bits above B. The Jensen form ``B <= -log2 a + E_{q given E}[L]``, a = q(E), averages instead: looser, and
only estimated, so its kind is ``estimate`` (of a bound, not of B).

Shapes: centres ``(problems, m, dim)``, NaN padded. Units: bits. Guarantee: one-sided, at ``confidence``, for every g;
without a failing draw the bound is infinite.

References: the change-of-measure argument behind DESIGN 2.2; Clopper & Pearson 1934; Webb et al. 1811.07209 for the
quantity bounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy.special import betaincinv

from elk_stress.core.bits import LN2, BitsBatch, Kind
from elk_stress.core.flags import Flag, flag
from elk_stress.estimators.limit_state import LimitState, Meter
from elk_stress.estimators.mixture import Mixture, affordable, blocks, check_centres

__all__ = ["EvidenceBound", "bound_of", "level_of"]

# no fresh draw lies below the level of k pilot draws with chance (1 + fresh / pilot)^-k: 2^-6 for as many fresh ones
_PILOT_FAILURES = 6


@dataclass(frozen=True)
class EvidenceBound:
    """Upper bound on B from draws of a Gaussian mixture.

    Attributes:
        n_particles: draws per problem, pilot included.
        pilot: share of the draws that fixes t.
        confidence: one-sided confidence of the bound.
        form: ``"rigorous"``, or ``"jensen"`` for the estimate of the looser bound.
    """

    n_particles: int = 1024
    pilot: float = 0.5
    confidence: float = 0.95
    form: Literal["rigorous", "jensen"] = "rigorous"

    def __call__(
        self, limit_state: LimitState, *, seed: int, centres: np.ndarray, max_evaluations: int | None = None
    ) -> BitsBatch:
        """Bound every problem.

        Args:
            limit_state: the problems.
            seed: of the draws.
            centres: ``(problems, m, dim)``, NaN padded; a problem without one has the prior itself as q.
            max_evaluations: budget per problem; fewer draws are taken where it is smaller.

        Returns:
            Kind ``upper_bound`` (``low = 0``, ``high = value``), or ``estimate`` for the Jensen form. ``diagnostics``:
            ``jensen`` and ``attack_success`` (problems,), from the fresh draws.
        """
        check_centres(limit_state, centres)
        if not 0 < self.pilot < 1:
            raise ValueError(
                f"pilot is the share of draws that fixes t, in (0, 1), got {self.pilot}; 0.5 is the default"
            )
        p = limit_state.n_problems
        rng = np.random.default_rng(np.random.SeedSequence(seed))
        meter = Meter(limit_state, max_evaluations)
        n = affordable(self.n_particles, meter)
        n_pilot = max(1, round(self.pilot * n)) if n >= 2 else 0
        pilot = self._ratios(meter, centres, n_pilot, rng)
        fresh = self._ratios(meter, centres, n - n_pilot if n_pilot else 0, rng)
        # with three times as many fresh draws as pilot draws, half as many failing ones fix a level that is met again
        fewest = max(3, round(_PILOT_FAILURES * min(1.0, self.pilot / (1 - self.pilot))))
        bound = bound_of(fresh, level_of(pilot, self.confidence, fewest), self.confidence)
        jensen, success, error = _jensen(fresh)
        flags: tuple[tuple[Flag, ...], ...] = ()
        if n < self.n_particles:
            flags = ((flag("budget_exhausted", f"{n} of {self.n_particles} draws"),),) * p
        silent = "no fresh draw failed: the bound is infinite; give centres inside the failure set or raise n_particles"
        common: dict[str, Any] = {
            "evaluations": meter.evaluations,
            "gradients": meter.gradients,
            "flags": flags,
            "diagnostics": {"jensen": jensen, "attack_success": success},
        }
        if self.form == "jensen":
            status = ["ok" if a > 0 else silent for a in success]
            finite = np.where(np.isfinite(jensen), jensen, 0.0)
            low = np.where(np.isfinite(jensen), np.maximum(0.0, finite - 1.96 * error), 0.0)
            high = np.where(np.isfinite(jensen), finite + 1.96 * error, np.inf)
            return BitsBatch.build(jensen, low, high, Kind.ESTIMATE, "evidence_bound", status=status, **common)
        status = ["ok" if np.isfinite(b) else silent for b in bound]
        return BitsBatch.build(bound, np.zeros(p), bound, Kind.UPPER_BOUND, "evidence_bound", status=status, **common)

    def _ratios(self, meter: Meter, centres: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
        """``(problems, n)`` L in bits at failing draws, ``+inf`` at the others."""
        p, dim = meter.limit_state.n_problems, meter.limit_state.dim
        out = np.full((p, n), np.inf)
        if n == 0:
            return out
        # independent components: Clopper-Pearson needs identically distributed draws, not fixed counts
        mixture = Mixture.at(centres, n, 0.0)
        for block in blocks(p, n, dim):
            u, log_ratio = mixture.draw_independent(block, n, rng)
            out[block] = np.where(meter.value(block, u) <= 0, log_ratio / LN2, np.inf)
        return out


def level_of(pilot: np.ndarray, confidence: float, fewest: int = _PILOT_FAILURES) -> np.ndarray:
    """``(p,)`` the t that gives the lowest bound on pilot draws' L ``(p, n)`` (``inf`` where none failed).

    At least ``fewest`` failing pilot draws lie at or below it: a level that one lucky draw sets is met by no fresh one,
    and the bound would be infinite. With three times as many fresh draws as pilot draws 3 do what 6 do with as many.
    """
    p, n = pilot.shape
    if n == 0:
        return np.full(p, np.inf)
    ordered = np.sort(pilot, axis=1)
    low = _lower_limit(np.arange(1, n + 1), n, confidence)
    least = np.minimum(fewest, np.isfinite(ordered).sum(axis=1))
    allowed = np.isfinite(ordered) & (np.arange(1, n + 1)[None, :] >= least[:, None])
    with np.errstate(invalid="ignore"):
        best = np.argmin(np.where(allowed, ordered - np.log2(low)[None, :], np.inf), axis=1)
    return np.asarray(ordered[np.arange(p), best])


def bound_of(fresh: np.ndarray, t: np.ndarray, confidence: float) -> np.ndarray:
    """``(p,)`` rigorous bound from fresh draws' L ``(p, n)`` (``inf``: did not fail) at levels t fixed beforehand."""
    n = fresh.shape[1]
    count = (np.isfinite(fresh) & (fresh <= t[:, None])).sum(axis=1)
    some = (count > 0) & np.isfinite(t)
    low = _lower_limit(np.where(some, count, 1), max(n, 1), confidence)
    return np.where(some, np.maximum(0.0, np.where(some, t, 0.0) - np.log2(low)), np.inf)


def _lower_limit(count: np.ndarray, n: int, confidence: float) -> np.ndarray:
    """Clopper-Pearson lower limit on a share, one-sided."""
    return np.asarray(betaincinv(count, n - count + 1, 1 - confidence))


def _jensen(fresh: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The Jensen form, q's success rate, and the standard error of the form (delta method)."""
    p, n = fresh.shape
    failed = np.isfinite(fresh)
    count = failed.sum(axis=1)
    if n == 0:
        return np.full(p, np.inf), np.zeros(p), np.zeros(p)
    success = count / n
    safe = np.maximum(count, 1)
    ratios = np.where(failed, fresh, 0.0)
    mean = ratios.sum(axis=1) / safe
    variance = np.where(failed, (ratios - mean[:, None]) ** 2, 0.0).sum(axis=1) / np.maximum(count - 1, 1)
    error = np.sqrt(variance / safe + (1 - success) / (safe * LN2**2))
    with np.errstate(divide="ignore"):
        value = np.where(count > 0, np.maximum(0.0, mean - np.log2(np.where(count > 0, success, 1.0))), np.inf)
    return value, success, error
