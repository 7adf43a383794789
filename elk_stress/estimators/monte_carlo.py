r"""Monte Carlo: count how many draws from the prior fail.

    p_hat = c/n,   B = -log2 p_hat,   interval: Clopper-Pearson for p, in bits

Exact at any n: the interval covers with at least its nominal chance. When nothing failed the answer is censored,
``>= b`` with ``b = -log2 (1 - (alpha/2)^(1/n))`` (about ``log2 n - 1.9`` at 95%), from the upper limit for p.

All problems share the same draws (common random numbers), so that of two nested failure sets the smaller never has
fewer bits; each problem's own interval is unaffected. Shapes: a :class:`BitsBatch` over problems; the points held at a
time are bounded.

Reference: Clopper & Pearson 1934.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

from elk_stress.core.bits import BitsBatch, Kind
from elk_stress.core.flags import flag
from elk_stress.estimators.limit_state import LimitState, Meter

__all__ = ["MonteCarlo", "clopper_pearson"]

# numbers per chunk of draws (float64: 8 MB)
_CHUNK_ELEMENTS = 1 << 20
# draws per block at most: the draws depend on it, so it is fixed
_BLOCK = 1 << 14


@dataclass(frozen=True)
class MonteCarlo:
    """Counting, with the Clopper-Pearson interval.

    Attributes:
        n_samples: draws per problem.
        confidence: of the interval.
        shared: all problems see the same draws; ``False`` draws independently for each.
    """

    n_samples: int = 100_000
    confidence: float = 0.95
    shared: bool = True

    def __post_init__(self) -> None:
        if self.n_samples < 1 or not 0 < self.confidence < 1:
            raise ValueError(
                f"need n_samples >= 1 and a confidence between 0 and 1, got {self.n_samples} and {self.confidence}"
            )

    def __call__(self, limit_state: LimitState, *, seed: int, max_evaluations: int | None = None) -> BitsBatch:
        """Estimate the bits of every problem. A budget below ``n_samples`` ends the count early, with a flag."""
        n_problems, dim = limit_state.n_problems, limit_state.dim
        affordable = self.n_samples if max_evaluations is None else min(self.n_samples, max_evaluations)
        meter = Meter(limit_state)
        rng = np.random.Generator(np.random.SFC64(np.random.SeedSequence(seed)))
        counts = np.zeros(n_problems, dtype=np.int64)
        # a block of draws goes past every problem, a few problems at a time
        block = max(1, min(affordable, _CHUNK_ELEMENTS // dim, _BLOCK))
        group = max(1, _CHUNK_ELEMENTS // (block * dim))
        for start in range(0, affordable, block):
            n = min(block, affordable - start)
            shared = rng.standard_normal((1, n, dim)) if self.shared else None
            for first in range(0, n_problems, group):
                problems = np.arange(first, min(first + group, n_problems))
                shape = (len(problems), n, dim)
                u = rng.standard_normal(shape) if shared is None else np.repeat(shared, len(problems), axis=0)
                counts[problems] += (meter.value(problems, u) <= 0).sum(axis=1)
        return _bits(self, counts, affordable, meter.evaluations)


def clopper_pearson(
    count: np.ndarray | int, n: np.ndarray | int, confidence: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """Two-sided Clopper-Pearson limits of a probability after ``count`` of ``n``; elementwise."""
    count, n = np.broadcast_arrays(np.asarray(count, dtype=float), np.asarray(n, dtype=float))
    tail = 0.5 * (1.0 - confidence)
    inner = np.where(count > 0, stats.beta.ppf(tail, np.maximum(count, 1.0), n - count + 1.0), 0.0)
    outer = np.where(count < n, stats.beta.isf(tail, count + 1.0, np.maximum(n - count, 1.0)), 1.0)
    return inner, outer


def _bits(config: MonteCarlo, counts: np.ndarray, n: int, evaluations: np.ndarray) -> BitsBatch:
    short = n < config.n_samples
    low_p, high_p = (
        clopper_pearson(counts, n, config.confidence) if n else (np.zeros(counts.shape), np.ones(counts.shape))
    )
    with np.errstate(divide="ignore"):
        low, high = -np.log2(high_p), -np.log2(low_p)
        value = np.where(counts > 0, -np.log2(counts / max(n, 1)), low)
    nothing = f"nothing failed in {n} draws; raise n_samples, or use a method that searches"
    ended = f"the budget ended after {n} of {config.n_samples} draws; raise max_evaluations"
    status = [f"{nothing}; {ended}" if short and not c else ended if short else "ok" if c else nothing for c in counts]
    return BitsBatch.build(
        np.abs(value),
        np.abs(low),
        high,
        [Kind.ESTIMATE if c else Kind.CENSORED for c in counts],
        "monte_carlo",
        evaluations=evaluations,
        status=status,
        flags=[(flag("budget_exhausted", ended),) if short else () for _ in counts],
        diagnostics={"count": counts, "draws": np.full(counts.shape, n)},
    )
