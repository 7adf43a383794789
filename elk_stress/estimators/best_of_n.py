r"""Best of n: choose among a finite pool of real alternatives, of which some fail.

With c failing alternatives in a pool of N, the chance that the best of n different ones still holds is

    C(N-c, n) / C(N, n)          (0 once n > N - c)

and choosing the best of n spends ``log2 n`` bits. Under the uniform prior over the pool, ``P[fail] = c/N`` exactly, so

    B = log2(N/c)   exact when c > 0;   ``>= log2 N`` censored when c = 0

(no alternative fails, and finding one that does would take more choices than there are). The pool may also stand for
the population that it was drawn from: then c is a binomial count and the interval Clopper-Pearson's
(``about="population"``).

Prediction from bits known otherwise: after n independent draws from the prior an item of B bits holds with chance
``(1 - 2^-B)^n``, averaged over items.

Shapes: counts ``(problems,)``; n ``(steps,)``; curves ``(problems, steps)`` or their mean ``(steps,)``.

References: Cobbe et al. 2021 (2110.14168) for the hypergeometric form (pass@k); Gao et al. 2022 (2210.10760).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from scipy.special import gammaln

from elk_stress.core.bits import BitsBatch, Kind
from elk_stress.core.flags import flag
from elk_stress.estimators.limit_state import LimitState, Meter
from elk_stress.estimators.monte_carlo import clopper_pearson

__all__ = ["BestOfN", "Curve", "holds", "observed_curve", "predicted_curve"]


class Curve(NamedTuple):
    """A best-of-n curve: the share of items that still hold after the best of n, with its interval over items."""

    n: np.ndarray
    bits: np.ndarray
    holds: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class BestOfN:
    """Bits of a choice among a finite pool.

    Attributes:
        about: ``"pool"``: the choice prior over these alternatives (exact). ``"population"``: the prior that they were
            drawn from (estimate with a Clopper-Pearson interval; censored at its upper limit when nothing failed).
        confidence: of the population's interval.
    """

    about: Literal["pool", "population"] = "pool"
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if self.about not in ("pool", "population"):
            raise ValueError(f"about must be 'pool' or 'population', got {self.about!r}")

    def __call__(self, limit_state: LimitState, pool: np.ndarray, *, max_evaluations: int | None = None) -> BitsBatch:
        """Evaluate every alternative and count.

        Args:
            limit_state: what fails.
            pool: ``(problems, N, dim)`` alternatives in u-space.
            max_evaluations: with fewer than N, only the first alternatives are tried (flagged).
        """
        if pool.ndim != 3 or pool.shape[::2] != (limit_state.n_problems, limit_state.dim) or not pool.shape[1]:
            raise ValueError(
                f"a pool has shape ({limit_state.n_problems}, N, {limit_state.dim}) with N >= 1, got {pool.shape}"
            )
        n_pool = pool.shape[1]
        n = n_pool if max_evaluations is None else min(n_pool, max_evaluations)
        if n < 1:
            raise ValueError(f"max_evaluations must allow at least one alternative, got {max_evaluations}")
        meter = Meter(limit_state)
        values = meter.value(np.arange(limit_state.n_problems), pool[:, :n])
        return self.from_counts(n, (values <= 0).sum(axis=1), evaluations=meter.evaluations, n_pool=n_pool)

    def from_counts(
        self,
        n: int,
        n_failing: np.ndarray,
        *,
        evaluations: np.ndarray | int = 0,
        n_pool: int | None = None,
    ) -> BitsBatch:
        """Bits when ``n_failing (problems,)`` of ``n`` alternatives failed."""
        count = np.atleast_1d(np.asarray(n_failing))
        if (count < 0).any() or (count > n).any():
            raise ValueError(f"between 0 and {n} alternatives can fail, got counts from {count.min()} to {count.max()}")
        exhausted = n_pool is not None and n < n_pool
        # a pool that was only partly tried is a sample of itself
        exact = self.about == "pool" and not exhausted
        some = count > 0
        value = np.log2(n / np.maximum(count, 1))
        low, high = value.copy(), np.where(some, value, np.inf)
        if not exact:
            inner, outer = clopper_pearson(count, n, self.confidence)
            low = np.abs(np.log2(outer))
            with np.errstate(divide="ignore"):
                high = -np.log2(inner)
            value = np.where(some, value, low)
        none = f"none of {n} alternatives fails; a larger pool could tell more"
        ended = f"the budget ended after {n} of {n_pool} alternatives; raise max_evaluations"
        return BitsBatch.build(
            value,
            low,
            high,
            [(Kind.EXACT if exact else Kind.ESTIMATE) if c else Kind.CENSORED for c in some],
            "best_of_n",
            evaluations=evaluations,
            status=[ended if exhausted else "ok" if c else none for c in some],
            flags=[(flag("budget_exhausted", ended),) if exhausted else () for _ in some],
            diagnostics={"count": count, "draws": np.full(count.shape, n)},
        )


def holds(n_pool: np.ndarray | int, n_failing: np.ndarray | int, n: np.ndarray | int) -> np.ndarray:
    """Chance that the best of ``n`` different alternatives still holds: ``C(N-c, n)/C(N, n)``; broadcasts.

    Raises:
        ValueError: more alternatives asked for than the pool has, or impossible counts.
    """
    total, failing, chosen = np.broadcast_arrays(*(np.asarray(a, dtype=float) for a in (n_pool, n_failing, n)))
    if (chosen > total).any() or (chosen < 0).any():
        raise ValueError(f"the best of n needs 0 <= n <= N; got n up to {chosen.max():.0f} from {total.min():.0f}")
    if (failing < 0).any() or (failing > total).any():
        raise ValueError(f"a pool of {total.min():.0f} cannot have {failing.min():.0f} to {failing.max():.0f} failing")
    left = total - failing - chosen
    # C(N-c, n)/C(N, n) = (N-c)! (N-n)! / (N! (N-c-n)!)
    log = (
        gammaln(total - failing + 1)
        + gammaln(total - chosen + 1)
        - gammaln(total + 1)
        - gammaln(np.maximum(left, 0.0) + 1)
    )
    certain = (failing == 0) | (chosen == 0)
    return np.asarray(np.where(certain, 1.0, np.where(left < 0, 0.0, np.exp(np.minimum(log, 0.0)))))


def observed_curve(
    n_pool: int,
    n_failing: np.ndarray,
    n: np.ndarray,
    *,
    groups: np.ndarray | None = None,
    n_bootstrap: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Curve:
    """The expected best-of-n curve of a pool: mean of :func:`holds` over problems, bootstrapped over problems.

    Args:
        n_pool: alternatives per problem.
        n_failing: ``(problems,)``.
        n: ``(steps,)`` numbers of alternatives tried.
        groups: ``(problems,)`` entities that are resampled together; ``None``: each problem by itself.
        n_bootstrap: resamples.
        confidence: of the interval, for the mean over the population of problems with pools like these.
        seed: of the bootstrap.
    """
    n = np.asarray(n)
    return _averaged(
        n, holds(n_pool, np.asarray(n_failing)[:, None], n[None, :]), groups, n_bootstrap, confidence, seed
    )


def predicted_curve(
    bits: np.ndarray,
    n: np.ndarray,
    *,
    groups: np.ndarray | None = None,
    n_bootstrap: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Curve:
    """The best-of-n curve that bits predict: ``(1 - 2^-B)^n`` averaged over problems (``inf`` bits always hold)."""
    n = np.asarray(n, dtype=float)
    # log1p keeps (1-p)^n exact where p is far below machine precision; 0 bits hold only while n = 0
    with np.errstate(divide="ignore"):
        log_hold = np.log1p(-np.exp2(-np.asarray(bits, dtype=float)))[:, None]
    with np.errstate(invalid="ignore"):
        chance = np.where(n[None, :] == 0, 1.0, np.exp(n[None, :] * log_hold))
    return _averaged(n, chance, groups, n_bootstrap, confidence, seed)


def _averaged(
    n: np.ndarray, chance: np.ndarray, groups: np.ndarray | None, n_bootstrap: int, confidence: float, seed: int
) -> Curve:
    """Mean over problems with a percentile bootstrap over groups of them."""
    labels = np.arange(len(chance)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    size = int(labels.max()) + 1
    sums = np.zeros((size, chance.shape[1]))
    np.add.at(sums, labels, chance)
    weight = np.bincount(labels, minlength=size).astype(float)
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    # resampled groups as multinomial weights: one matrix product for all resamples
    picks = rng.multinomial(size, np.full(size, 1.0 / size), size=n_bootstrap).astype(float)
    means = (picks @ sums) / (picks @ weight)[:, None]
    tail = 0.5 * (1.0 - confidence)
    with np.errstate(divide="ignore"):
        spent = np.log2(np.asarray(n, dtype=float))
    low, high = np.quantile(means, [tail, 1.0 - tail], axis=0)
    return Curve(n, spent, chance.mean(axis=0), low, high)
