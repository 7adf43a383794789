r"""The automatic method: several estimators that fail differently, and one honest answer.

1. *closed form*, where the limit state declares itself linear.
2. *counting* settles what fails often (``n_settled`` failures or more); its Clopper-Pearson interval brackets the rest.
3. *design points* from several starts feed *importance sampling*.
4. *splitting* runs with different kernels check it (on a random share of the problems where there are many). Their
   failing particles go back as starts and centres for a second, independent round of importance sampling, so that a
   mode that only splitting found is covered.
   Without a gradient (``LimitState.differentiable`` false) splitting comes first, for every problem that counting left
   open, and importance sampling checks it: where it drew at least four failing particles per coordinate, at their mean.
5. *bounds* bracket the result: the evidence bound from above, the isoperimetric one from below (needs ``lipschitz``).

Who is believed. Importance sampling is unbiased but may be blind: its *blind share* is the fraction of splitting's
failing particles (draws from the prior given failure) at which a single draw would weigh more than a fifth of the whole
estimate. With enough effective draws and no blind share it is believed; if splitting then lies above the evidence bound
it missed a mode (flag ``missed_mode``). If importance sampling is blind or starved and finds no more probability than
splitting, splitting and its interval are taken. If they disagree and nothing settles it, the result is flagged
``runs_disagree`` and its interval is the union.

Units: bits. Guarantee: none beyond its parts; never a confident number where they disagree. A mode that no start, no
prior draw and no particle met stays unseen; only a lower bound speaks about it.

References: Au & Beck 2001; Owen & Zhou 2000; Wu & Hilton 2024 (2410.13211).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import betaincinv

from elk_stress.core.bits import BitsBatch, Kind
from elk_stress.estimators.arbitration import Estimate, Evidence, agree, decide
from elk_stress.estimators.closed_form import ClosedForm
from elk_stress.estimators.design_point import DesignPoint, distinct
from elk_stress.estimators.evidence_bound import EvidenceBound
from elk_stress.estimators.importance import Importance
from elk_stress.estimators.limit_state import LimitState, Meter
from elk_stress.estimators.mixture import Mixture
from elk_stress.estimators.particles import draw_from, far_apart, with_means
from elk_stress.estimators.subset_simulation import SubsetSimulation
from elk_stress.estimators.typical import typical_centres

__all__ = ["Auto", "restrict"]

# more problems than this are a batch: fewer draws each, and splitting checks so many of them by default
_FEW = 16
# effective draws that the second round of importance sampling aims for: a standard error of 0.1 bits
_AMPLE = 200.0
# numbers moved by splitting, over all problems: about ten seconds of one core
_SPLITTING_ELEMENTS = 1.5e9
# where the probe has no gradient, over all problems: activations scored for counting and to be aimed at ...
_BLACK_BOX_SCORES = 5e5
# ... and by splitting: the most (a minute of a forest's), and the numbers in them, so that wide activations get fewer.
# A hundred problems reach 40 bits; raised with n_particles beyond _BLACK_BOX_PARTICLES
_BLACK_BOX_SPLITTING, _BLACK_BOX_ELEMENTS, _BLACK_BOX_PARTICLES = 5e6, 1.5e9, 1000
# numbers drawn for counting, over all problems
_COUNTING_ELEMENTS = 1 << 24
# shares of the evaluation budget: counting, design points, importance, splitting, second design points, second
# importance, evidence bound, isoperimetric bound
_SHARES = (0.15, 0.2, 0.1, 0.25, 0.1, 0.1, 0.05, 0.05)


@dataclass(frozen=True)
class Auto:
    """The estimators of DESIGN 2.5, combined.

    Attributes:
        n_particles: importance draws per problem; ``None``: 2048, or 512 for more than 16 problems.
        n_runs: splitting runs per checked problem; ``None``: 8, or 4 for more than 16 problems (2 without a gradient).
        n_starts: design-point starts; ``None``: 8, or 2 for more than 16 problems with gradients.
        check_fraction: share of the problems that splitting checks, chosen at random; ``None``: all, or 16 of more than
            16, or all without a gradient, whatever is given. Up to 16 problems whose importance sampling is starved are
            checked too. If the check contradicts more than a tenth of its sample, 64 others are checked and those
            beyond are flagged.
        max_bits: results beyond are censored there.
        n_settled: failures at which counting alone settles a problem.
        min_effective: effective draws that importance sampling needs.
        max_blind: largest blind share at which importance sampling is believed.
    """

    n_particles: int | None = None
    n_runs: int | None = None
    n_starts: int | None = None
    check_fraction: float | None = None
    max_bits: float = 400.0
    n_settled: int = 100
    min_effective: float = 20.0
    max_blind: float = 0.1

    def __post_init__(self) -> None:
        if self.check_fraction is not None and not 0 <= self.check_fraction <= 1:
            raise ValueError(f"check_fraction is a share of the problems, in [0, 1], got {self.check_fraction}")

    def __call__(
        self, limit_state: LimitState, *, seed: int, max_evaluations: int | None = None, keep_failures: int = 0
    ) -> BitsBatch:
        """Estimate every problem.

        Args:
            limit_state: the problems.
            seed: all randomness.
            max_evaluations: budget per problem, gradients included.
            keep_failures: draws from the prior given failure to return in ``diagnostics["failures"]``.

        Returns:
            Bits; ``diagnostics``: ``source`` (which estimator speaks); ``importance``, ``splitting``, ``upper_bound``
            and ``lower_bound`` in bits (NaN where not run); ``effective``; ``blind``; ``checked``; ``centres``;
            ``failures``.
        """
        if limit_state.linear is not None:
            exact = ClosedForm()(limit_state)
            if not keep_failures:
                return exact
            drawn = _Run(self, limit_state, seed, max_evaluations, keep_failures)
            drawn.aim()
            extra = {"failures": drawn.failures, "centres": drawn.centres}
            return _with(exact, drawn.evaluations, drawn.gradients, extra)
        run = _Run(self, limit_state, seed, max_evaluations, keep_failures)
        run.count()
        run.aim()
        run.check()
        run.bound()
        return run.result()


def restrict(limit_state: LimitState, index: np.ndarray) -> LimitState:
    """The chosen problems, renumbered; shares compiled functions with ``limit_state``."""
    if len(index) == limit_state.n_problems:
        return limit_state
    if limit_state.backend != "jax" or limit_state.data is not None:
        return limit_state.select(index)

    # a new jax function would be compiled anew: evaluate through the one that exists
    def function(problems: np.ndarray, u: np.ndarray) -> np.ndarray:
        return limit_state.value(index[problems], u)

    def gradient(problems: np.ndarray, u: np.ndarray) -> np.ndarray:
        return limit_state.value_and_gradient(index[problems], u)[1]

    return LimitState(
        function=function,
        dim=limit_state.dim,
        n_problems=len(index),
        gradient=gradient,
        lipschitz=None if limit_state.lipschitz is None else limit_state.lipschitz[index],
        dtype=limit_state.dtype,
        starts=None if limit_state.starts is None else limit_state.starts[index],
        differentiable=limit_state.differentiable,
        cost=limit_state.cost,
    )


class _Run:
    """What is known about each problem so far; private state of :class:`Auto`."""

    def __init__(
        self, config: Auto, limit_state: LimitState, seed: int, max_evaluations: int | None, keep_failures: int
    ) -> None:
        p, dim = limit_state.n_problems, limit_state.dim
        self.config, self.limit_state, self.keep = config, limit_state, keep_failures
        few = p <= _FEW
        self.limited, self.many = max_evaluations is not None, not few
        self.n_particles = config.n_particles or (2048 if few else 512)
        self.n_runs = config.n_runs or (8 if few and limit_state.cost == 1 else 4)
        self.scores = self.split_scores = math.inf
        if not limit_state.differentiable:
            self.scores = _BLACK_BOX_SCORES / limit_state.cost
            afforded = np.clip(_BLACK_BOX_ELEMENTS / dim, _BLACK_BOX_SCORES, _BLACK_BOX_SPLITTING)
            more = max(1.0, (config.n_particles or 0) / _BLACK_BOX_PARTICLES)
            self.split_scores = float(afforded) * more / limit_state.cost
            self.n_runs = config.n_runs or (8 if few and limit_state.cost == 1 else 2)
        self.splitting_particles = min(1000 if few else 128, self.n_particles)
        self.n_starts = config.n_starts or (8 if few or not limit_state.has_gradient else 2)
        shares: tuple[float | None, ...] = _SHARES if max_evaluations else (None,) * len(_SHARES)
        self.budgets = [None if s is None or max_evaluations is None else int(s * max_evaluations) for s in shares]
        children = np.random.SeedSequence(seed).spawn(len(_SHARES) + 2)
        self.seeds = [int(c.generate_state(1, np.uint64)[0]) for c in children[:-1]]
        self.rng = np.random.default_rng(children[-1])
        self.evaluations, self.gradients = np.zeros(p, np.int64), np.zeros(p, np.int64)
        self.failures = np.full((p, keep_failures, dim), np.nan)
        self.counted, self.count_low, self.count_high = np.full(p, np.inf), np.zeros(p), np.full(p, np.inf)
        self.counted_failures = np.full((p, 1, dim), np.nan)
        self.settled = np.zeros(p, bool)
        self.centres = np.full((p, 8, dim), np.nan)  # design points
        self.aimed = self.centres  # where importance sampling and the bound draw
        nan = np.full(p, np.nan)
        self.importance = np.stack([nan, nan, nan])  # value, low, high
        self.splitting = np.stack([nan, nan, nan])
        self.effective, self.blind = np.zeros(p), np.zeros(p)
        self.splitting_censored, self.splitting_doubts = np.zeros(p, bool), np.zeros(p, bool)
        self.splitting_cut = np.zeros(p, bool)
        self.splitting_status = ["ok"] * p
        self.checked, self.doubted = np.zeros(p, bool), np.zeros(p, bool)
        self.upper, self.lower = np.full(p, np.inf), np.zeros(p)

    # -- the stages -------------------------------------------------------------------------------------------------

    def count(self) -> None:
        """Draw from the prior; settle what fails often."""
        p, dim = self.limit_state.n_problems, self.limit_state.dim
        scores = min(self.scores, _COUNTING_ELEMENTS / (dim * self.limit_state.cost))
        n = int(min(1 << 16, _COUNTING_ELEMENTS // (p * dim), max(scores // p, 256)))
        if self.budgets[0] is not None:
            n = min(n, self.budgets[0])
        if n < 256:
            return
        nowhere = np.empty((p, 0, dim))
        batch = Importance(n_particles=n)(
            self.limit_state, seed=self.seeds[0], centres=nowhere, keep_failures=max(self.keep, 8)
        )
        self._spent(np.arange(p), batch)
        k = batch.diagnostics["failed"].astype(float)
        with np.errstate(divide="ignore"):
            self.counted = -np.log2(k / n)
            top = np.where(k < n, betaincinv(np.minimum(k + 1, n), np.maximum(n - k, 1), 0.975), 1.0)
            bottom = np.where(k > 0, betaincinv(np.maximum(k, 1), n - k + 1, 0.025), 0.0)
            self.count_low, self.count_high = -np.log2(top), -np.log2(bottom)
        self.settled = k >= self.config.n_settled
        found = batch.diagnostics["failures"]
        self.failures[self.settled] = found[self.settled, : self.keep]
        self.counted_failures = found[:, :8]

    def aim(self) -> None:
        """Design points, then importance sampling there."""
        open_ = np.flatnonzero(~self.settled)
        if not open_.size or not self.limit_state.differentiable:
            return
        given = self.counted_failures
        if self.limit_state.starts is not None:
            given = np.concatenate([given, self.limit_state.starts], axis=1)
        starts = None if np.isnan(given[open_]).all() else given[open_]
        # for many problems a shorter search: norms within 0.5% of the long one's on an MLP of 384 inputs
        search = DesignPoint(n_starts=self.n_starts)
        if self.many and self.limit_state.has_gradient:
            search = replace(search, quick=4, max_iterations=16)
        self._design(open_, search, self.seeds[1], self.budgets[1], starts)
        self.aimed = self.centres.copy()
        if self.limit_state.has_gradient or self.limit_state.dim <= 64:
            budget = None if self.budgets[1] is None else self.budgets[1] // 4
            meter = Meter(restrict(self.limit_state, open_), budget)
            self.aimed[open_] = typical_centres(meter, self.centres[open_], self.rng, n_pairs=4 if self.many else 32)
            self.evaluations[open_] += meter.evaluations
            self.gradients[open_] += meter.gradients
            self.aimed = distinct(self.aimed, DesignPoint().separation, self.aimed.shape[1])[0]
        self._weigh(open_, self.n_particles, self.seeds[2], self.budgets[2])
        starved = open_[self.effective[open_] < self.config.min_effective]
        starved = starved[self.effective[starved] > 2]
        if starved.size and not self.limited:
            # independent draws, and only those: their number depends on the first round, their values do not
            self._weigh(starved, 4 * self.n_particles, self.seeds[8], None)

    def check(self) -> None:
        """Splitting on a random share, on what importance sampling could not carry, and on all if it objects."""
        open_ = np.flatnonzero(~self.settled)
        if not open_.size:
            return
        fraction = self.config.check_fraction if self.limit_state.differentiable else 1.0
        wanted = min(len(open_), _FEW) if fraction is None else math.ceil(fraction * len(open_))
        sample = np.sort(self.rng.choice(open_, size=wanted, replace=False))
        starved = open_[self.effective[open_] < self.config.min_effective]
        starved = starved[:_FEW]  # more would take long: those left over are reported as starved
        # what the unchecked problems rest on is the first round of importance sampling: that is what is judged
        first, carried = self.importance.copy(), self.effective >= self.config.min_effective
        self._split(np.union1d(sample, starved).astype(np.int64))
        objected = [i for i in sample if carried[i] and self._objects(i, first[:, i])]
        if wanted and len(objected) > 0.1 * wanted and wanted < len(open_):
            rest = open_[~self.checked[open_] & (self.effective[open_] >= self.config.min_effective)]
            self._split(rest[: 4 * _FEW])
            self.doubted[rest[4 * _FEW :]] = True

    def bound(self) -> None:
        """Bracket what was checked from above, and everything from below where a Lipschitz constant is known."""
        some = np.flatnonzero(self.checked & ~np.isnan(self.aimed[..., 0]).all(axis=1))
        if some.size:
            bound = EvidenceBound(n_particles=self.n_particles)
            part = restrict(self.limit_state, some)
            batch = bound(part, seed=self.seeds[6], centres=self.aimed[some], max_evaluations=self.budgets[6])
            self._spent(some, batch)
            self.upper[some] = batch.value
        if self.limit_state.lipschitz is not None:
            from elk_stress.estimators.isoperimetric_bound import IsoperimetricBound

            batch = IsoperimetricBound()(self.limit_state, seed=self.seeds[7], max_evaluations=self.budgets[7])
            self._spent(np.arange(len(batch)), batch)
            self.lower = np.array(batch.value)

    def result(self) -> BitsBatch:
        """One answer per problem."""
        verdicts = [
            decide(self._evidence(i), self.config.max_bits, self.limited) for i in range(self.limit_state.n_problems)
        ]
        return BitsBatch.build(
            np.array([v.value for v in verdicts]),
            np.array([v.low for v in verdicts]),
            np.array([v.high for v in verdicts]),
            [v.kind for v in verdicts],
            "auto",
            evaluations=self.evaluations,
            gradients=self.gradients,
            status=[v.status for v in verdicts],
            flags=[v.flags for v in verdicts],
            diagnostics={
                "source": np.array([v.source for v in verdicts]),
                "importance": self.importance[0],
                "splitting": self.splitting[0],
                "upper_bound": self.upper,
                "lower_bound": self.lower,
                "effective": self.effective,
                "blind": self.blind,
                "checked": self.checked,
                "centres": self.centres,
                "failures": self.failures,
            },
        )

    # -- parts of the stages ----------------------------------------------------------------------------------------

    def _spent(self, index: np.ndarray, batch: BitsBatch) -> None:
        self.evaluations[index] += batch.evaluations
        self.gradients[index] += batch.gradients

    def _design(
        self, index: np.ndarray, search: DesignPoint, seed: int, budget: int | None, starts: np.ndarray | None
    ) -> None:
        batch = search(restrict(self.limit_state, index), seed=seed, max_evaluations=budget, starts=starts)
        self._spent(index, batch)
        every = np.concatenate([self.centres[index], batch.diagnostics["centres"]], axis=1)
        self.centres[index] = distinct(every, search.separation, self.centres.shape[1])[0]

    def _weigh(self, index: np.ndarray, n: int, seed: int, budget: int | None) -> None:
        """Importance sampling; keeps failing draws for the caller."""
        batch = Importance(n_particles=n, min_effective=self.config.min_effective)(
            restrict(self.limit_state, index),
            seed=seed,
            centres=self.aimed[index],
            max_evaluations=budget,
            keep_failures=max(self.keep, 1),
        )
        self._spent(index, batch)
        estimated = np.array([k is Kind.ESTIMATE for k in batch.kind])
        self.importance[:, index] = np.where(estimated, np.stack([batch.value, batch.low, batch.high]), np.nan)
        self.effective[index] = batch.diagnostics["effective"]
        self.failures[index] = batch.diagnostics["failures"][:, : self.keep]

    def _split(self, index: np.ndarray) -> None:
        """Splitting, its failures fed back, and the second round of importance sampling."""
        if not index.size:
            return
        part = restrict(self.limit_state, index)
        # kills, clones and moves: about 6 evaluations per particle and bit; deep and wide problems get fewer particles
        depth = np.nanmedian(self.importance[0, index]) if np.isfinite(self.importance[0, index]).any() else 20.0
        moved = 6.0 * self.n_runs * len(index) * max(1.0, float(depth))
        afforded, fewest = _SPLITTING_ELEMENTS / (moved * self.limit_state.dim * self.limit_state.cost), 128
        # enough for every run to have a place, which shows whether it finished
        n_failures = max(max(32, self.n_runs) * self.n_runs, self.keep)
        if not self.limit_state.differentiable:
            afforded, fewest = min(afforded, self.split_scores / moved), 64
            # as many as a mean of them needs, to aim at
            n_failures = max(n_failures, min(4 * self.limit_state.dim, self.n_runs * self.splitting_particles))
        config = SubsetSimulation(
            n_particles=int(np.clip(afforded, min(fewest, self.splitting_particles), self.splitting_particles)),
            n_runs=self.n_runs,
            max_bits=self.config.max_bits,
            n_failures=n_failures,
        )
        budget = self.budgets[3]
        if budget is None and math.isfinite(self.split_scores):
            # a probe that nothing breaks would be asked until max_bits
            budget = int(2 * self.split_scores / len(index))
        batch = config(part, seed=self.seeds[3], max_evaluations=budget)
        self._spent(index, batch)
        self.checked[index] = True
        self.splitting[:, index] = np.stack(_of_finished(batch, config))
        self.splitting_censored[index] = [k is Kind.CENSORED for k in batch.kind]
        self.splitting_cut[index] = self.splitting_censored[index] & _cut_short(batch)
        self.splitting_doubts[index] = [any(f.red for f in flags) for flags in batch.flags]
        for i, status in zip(index, batch.status, strict=True):
            self.splitting_status[i] = status
        particles = np.asarray(batch.diagnostics["failures"], dtype=float)
        search = DesignPoint(n_starts=1, max_iterations=30)
        if self.limit_state.differentiable:
            starts = far_apart(particles, 6)
            self._design(index, search, self.seeds[4], self.budgets[4], None if np.isnan(starts).all() else starts)
        every = np.concatenate([self.aimed[index], self.centres[index]], axis=1)
        every = distinct(every, search.separation, self.aimed.shape[1])[0]
        self.aimed[index] = with_means(every, particles, search.separation)
        if not self.limit_state.differentiable:
            if self.keep:
                self.failures[index] = draw_from(particles, self.keep, self.rng)
            aimed = ~np.isnan(self.aimed[index, :, 0]).all(axis=1)
            index, particles = index[aimed], particles[aimed]
            if not index.size:
                return
        # the first round's effective share says how many draws the second, independent one needs
        n = self.n_particles
        if len(index) <= _FEW:
            n *= (
                1
                if math.isfinite(self.scores)
                else int(np.clip(np.ceil(_AMPLE / np.maximum(self.effective[index], 1.0)), 1, 8).max())
            )
        n = n if self.budgets[5] is None else max(1, min(n, self.budgets[5]))
        self._weigh(index, n, self.seeds[5], self.budgets[5])
        self.blind[index] = self._blind_share(index, particles, n)
        if self.keep:
            # failing particles serve where importance sampling does not
            poor = (self.effective[index] < self.config.min_effective) | (self.blind[index] > self.config.max_blind)
            use = index[poor & ~np.isnan(particles[:, 0, 0])]
            rows = np.flatnonzero(poor & ~np.isnan(particles[:, 0, 0]))
            for_use = draw_from(particles[rows], self.keep, self.rng)
            self.failures[use] = for_use

    def _blind_share(self, index: np.ndarray, particles: np.ndarray, n: int) -> np.ndarray:
        """Share of failing particles at which one importance draw would weigh over a fifth of the estimate."""
        mixture = Mixture.at(self.aimed[index], n, Importance().defensive)
        present = ~np.isnan(particles[..., 0])
        rows = np.arange(len(index))
        log_ratio = mixture.log_ratio(rows, np.where(present[..., None], particles, 0.0))
        log_p = -self.importance[0, index] * math.log(2.0)
        limit = np.where(np.isnan(log_p), -np.inf, log_p)[:, None] + math.log(0.2 * n)
        heavy = present & (-log_ratio > limit)
        return np.asarray(heavy.sum(axis=1) / np.maximum(present.sum(axis=1), 1))

    def _evidence(self, i: int) -> Evidence:
        """What is known about problem i."""
        weighed, split = (_estimate(x[:, i]) for x in (self.importance, self.splitting))
        return Evidence(
            counted=Estimate(float(self.counted[i]), float(self.count_low[i]), float(self.count_high[i])),
            settled=bool(self.settled[i]),
            weighed=weighed,
            trusted=bool(
                self.effective[i] >= self.config.min_effective
                and self.blind[i] <= self.config.max_blind
                and not self.doubted[i]
            ),
            blind=float(self.blind[i]),
            split=split,
            split_censored=bool(self.splitting_censored[i]),
            split_cut=bool(self.splitting_cut[i]),
            split_doubts=bool(self.splitting_doubts[i]),
            split_status=self.splitting_status[i],
            upper=float(self.upper[i]),
            lower=float(self.lower[i]),
        )

    def _objects(self, i: int, first: np.ndarray) -> bool:
        """Whether splitting contradicts the first round of importance sampling on problem i."""
        evidence = replace(self._evidence(i), weighed=_estimate(first))
        return not (agree(evidence) or evidence.split_doubts)


def _estimate(column: np.ndarray) -> Estimate | None:
    return None if np.isnan(column[0]) else Estimate(float(column[0]), float(column[1]), float(column[2]))


def _cut_short(batch: BitsBatch) -> np.ndarray:
    """Which problems had a run that its budget ended."""
    return np.array([any(f.name == "budget_exhausted" for f in row) for row in batch.flags], dtype=bool)


def _of_finished(batch: BitsBatch, config: SubsetSimulation) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Value, low and high of splitting where the budget ended some runs: those that finished speak.

    A run cut short bounds p from above by the level that it reached, and would outweigh all others in a mean of p.
    ``high`` counts such runs as ``p = 0``, or is infinite where one came further without failure.
    """
    value, low, high = batch.value.copy(), batch.low.copy(), batch.high.copy()
    particles, bits = batch.diagnostics["failures"], batch.diagnostics["run_bits"]
    # each run has its own block of failing particles, empty where it did not finish
    first = np.arange(config.n_runs) * -(-config.n_failures // config.n_runs)
    finished = ~np.isnan(particles[:, first, 0])
    mixed = _cut_short(batch) & finished.any(axis=1) & ~finished.all(axis=1)
    for i in np.flatnonzero(mixed):
        mine = finished[i]
        log2_p = batch.diagnostics["run_log2_p"][i, mine]
        r = float(np.clip(batch.diagnostics["correlation"][i, mine].mean(), 0.0, 0.95))
        stretch = ((1.0 + r) / (1.0 - r)) ** 1.5
        ideal = float(batch.diagnostics["ideal_variance"][i, mine].mean())
        own = math.sqrt(ideal * stretch / mine.sum())
        value[i] = math.log2(mine.sum()) - np.logaddexp2.reduce(log2_p)
        low[i] = max(0.0, value[i] - 1.96 * own - 0.5 * math.log(2.0) * ideal * (stretch - 1.0))
        high[i] = max(value[i] + 1.96 * own, value[i] + math.log2(config.n_runs / mine.sum()))
        if bits[i, ~mine].max() > high[i]:
            high[i] = math.inf
    return value, low, high


def _with(batch: BitsBatch, evaluations: np.ndarray, gradients: np.ndarray, extra: dict[str, np.ndarray]) -> BitsBatch:
    return replace(batch, evaluations=evaluations, gradients=gradients, diagnostics={**batch.diagnostics, **extra})
