r"""Isoperimetric bound: a rigorous lower bound on bits from how steep g can be.

Idea: among sets of equal Gaussian measure a half-space grows least when enlarged (Borell 1975; Sudakov & Tsirelson
1974). If g is L-Lipschitz in u and ``P[g >= t] >= q``, then every point nearer than t/L to ``{g >= t}`` has g > 0, so
the safe set has at least the measure of that enlargement:

    P[g <= 0] <= Phi(-(t/L + Phi^-1(q))),    B >= -log2 Phi(-(t/L + Phi^-1(q)))

The level t is chosen on pilot draws, q is the one-sided Clopper-Pearson lower limit on fresh draws with t fixed, so the
bound holds with the stated confidence (per problem). It is exact in the limit of many draws where g is a half-space's
(linear) and loose where g is steep in few places. It bounds B_joint too, for ``max(g_failed, g_kept) >= g_failed``.

L must be a bound on ``|g(u) - g(v)| / ||u - v||`` in u, after the prior's map: ``limit_state.lipschitz (problems,)``. A
prior whose map to activations is not Lipschitz (heavy tails) has none, and is refused with it.

Shapes: a :class:`BitsBatch` over problems. Kind ``lower_bound``; ``high`` is infinite.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

from elk_stress.core.bits import BitsBatch, Kind, bits_of_beta
from elk_stress.core.flags import flag
from elk_stress.estimators.limit_state import LimitState, Meter

__all__ = ["IsoperimetricBound"]

_CHUNK_ELEMENTS = 1 << 20
# levels tried on the pilot: quantiles of g
_LEVELS = 200


@dataclass(frozen=True)
class IsoperimetricBound:
    """A lower bound on bits from a Lipschitz constant and draws from the prior.

    Attributes:
        n_samples: fresh draws per problem.
        n_pilot: draws on which the level is chosen.
        confidence: that the bound holds (one-sided).
    """

    n_samples: int = 10_000
    n_pilot: int = 2_000
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if min(self.n_samples, self.n_pilot) < 10 or not 0 < self.confidence < 1:
            raise ValueError(
                f"need at least 10 pilot and 10 fresh draws and a confidence between 0 and 1, got {self.n_pilot}, "
                f"{self.n_samples} and {self.confidence}"
            )

    def __call__(self, limit_state: LimitState, *, seed: int, max_evaluations: int | None = None) -> BitsBatch:
        """Bound the bits of every problem from below.

        Raises:
            ValueError: the limit state has no (positive, finite) Lipschitz constant.
        """
        lipschitz = _constants(limit_state)
        pilot, fresh = self.n_pilot, self.n_samples
        short = max_evaluations is not None and max_evaluations < pilot + fresh
        if short and max_evaluations is not None:
            share = max_evaluations / (pilot + fresh)
            pilot, fresh = int(pilot * share), int(fresh * share)
        first, second = (np.random.Generator(np.random.SFC64(s)) for s in np.random.SeedSequence(seed).spawn(2))
        meter = Meter(limit_state)
        n_problems = limit_state.n_problems
        value = np.zeros(n_problems)
        level, share_above = np.full(n_problems, np.nan), np.full(n_problems, np.nan)
        if min(pilot, fresh) >= 1:
            step = max(1, _CHUNK_ELEMENTS // max(pilot, fresh))
            for start in range(0, n_problems, step):
                problems = np.arange(start, min(start + step, n_problems))
                t = _best_level(_draw(meter, problems, pilot, first), lipschitz[problems], fresh, self.confidence)
                above = (_draw(meter, problems, fresh, second) >= t[:, None]).sum(axis=1)
                value[problems] = _bound(t, lipschitz[problems], above, fresh, self.confidence)
                level[problems], share_above[problems] = t, above / fresh
        ended = f"the budget allowed {pilot + fresh} of {self.n_pilot + self.n_samples} draws; raise max_evaluations"
        return BitsBatch.build(
            value,
            value,
            np.full(n_problems, np.inf),
            Kind.LOWER_BOUND,
            "isoperimetric_bound",
            evaluations=meter.evaluations,
            status=ended if short else "ok",
            flags=[(flag("budget_exhausted", ended),) if short else () for _ in range(n_problems)],
            diagnostics={"level": level, "share_above": share_above},
        )


def _constants(limit_state: LimitState) -> np.ndarray:
    if limit_state.lipschitz is None:
        raise ValueError(
            "the isoperimetric bound needs a Lipschitz constant of g in u, and this limit state has none (heavy-tailed "
            "priors have none at all); pass lipschitz= (a product of spectral norms will do), or use another method"
        )
    constants = np.broadcast_to(np.asarray(limit_state.lipschitz, dtype=float), (limit_state.n_problems,))
    if not (np.isfinite(constants) & (constants > 0)).all():
        raise ValueError(
            f"Lipschitz constants must be positive and finite, got {constants.min()} to {constants.max()}; "
            "a constant g has no direction to fail in: leave it out"
        )
    return constants


def _draw(meter: Meter, problems: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """g at n draws for each problem, ``(problems, n)``; the points are held a chunk at a time."""
    dim = meter.limit_state.dim
    block = max(1, _CHUNK_ELEMENTS // (dim * len(problems)))
    parts = []
    for start in range(0, n, block):
        u = rng.standard_normal((len(problems), min(block, n - start), dim))
        parts.append(meter.value(problems, u))
    return np.concatenate(parts, axis=1)


def _best_level(g: np.ndarray, lipschitz: np.ndarray, fresh: int, confidence: float) -> np.ndarray:
    """The level whose bound would be best if as large a share of the fresh draws were above it as of the pilot's."""
    share = np.linspace(0.002, 0.998, _LEVELS)
    levels = np.quantile(g, 1.0 - share, axis=1)
    # a level at or below 0 enlarges nothing: allowed, it only ever says less
    above = (g[None] >= levels[..., None]).mean(axis=2)
    bound = _bound(levels, lipschitz[None], np.floor(above * fresh), fresh, confidence)
    best = np.argmax(bound, axis=0)
    return np.asarray(levels[best, np.arange(g.shape[0])])


def _bound(t: np.ndarray, lipschitz: np.ndarray, above: np.ndarray, n: int, confidence: float) -> np.ndarray:
    """Bits guaranteed when ``above`` of n draws had ``g >= t``; 0 where none had (q = 0 says nothing) or t < 0."""
    q = np.where(above > 0, stats.beta.ppf(1.0 - confidence, np.maximum(above, 1.0), n - above + 1.0), 0.0)
    beta = np.where(q > 0, np.maximum(t, 0.0) / lipschitz + stats.norm.ppf(np.maximum(q, 1e-300)), -np.inf)
    return np.where((q > 0) & (t >= 0), np.abs(bits_of_beta(beta)), 0.0)
