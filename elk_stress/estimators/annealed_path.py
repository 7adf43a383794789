"""The path of annealed importance sampling: its particles, their levels, weights and moves.

See :mod:`elk_stress.estimators.annealed` for the method. Private to it.

Shapes: particles ``(problems, runs x n, dim)``; the schedule and the steps are shared by the runs of a problem.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy.special import logsumexp

from elk_stress.estimators.limit_state import Meter
from elk_stress.estimators.mixture import Mixture

__all__ = ["FEWEST", "Found", "Path"]

FEWEST = 4
"""Fewest particles of a run."""

# elements of the proposals in flight (float64: 32 MB an array)
_CHUNK_ELEMENTS = 1 << 22
# acceptance aimed at: one dimension (0.44 is best), many (0.23); Roberts & Rosenthal 2001
_TARGET_ALONG, _TARGET_BOTH = 0.44, 0.35
# outward steps of one standard deviation that the start may take
_OUTWARD = 12


class Schedule(Protocol):
    """What the path needs of :class:`~elk_stress.estimators.annealed.Annealed`, which has the meaning of each."""

    @property
    def n_runs(self) -> int: ...
    @property
    def n_moves(self) -> int: ...
    @property
    def max_moves(self) -> int: ...
    @property
    def forget(self) -> float: ...
    @property
    def keep(self) -> float: ...


@dataclass
class Found:
    """What each problem has come to: ``(problems, runs)`` log p; the rest ``(problems,)``."""

    n: int
    log_p: np.ndarray
    variance: np.ndarray
    effective: np.ndarray
    levels: np.ndarray
    moves: np.ndarray
    lag: np.ndarray
    from_prior: np.ndarray
    accepted: np.ndarray
    correlation: np.ndarray
    forced: np.ndarray
    counted: np.ndarray
    drawn: np.ndarray
    failures: np.ndarray

    @classmethod
    def empty(cls, p: int, runs: int, n: int, keep: int, dim: int) -> Found:
        def zeros(dtype: type = float) -> np.ndarray:
            return np.zeros(p, dtype=dtype)

        return cls(
            n=n,
            log_p=np.full((p, runs), -np.inf),
            variance=zeros(),
            effective=zeros(),
            levels=zeros(np.int64),
            moves=zeros(np.int64),
            lag=zeros(),
            from_prior=zeros(bool),
            accepted=zeros(),
            correlation=zeros(),
            forced=zeros(bool),
            counted=zeros(np.int64),
            drawn=zeros(np.int64),
            failures=np.full((p, keep, dim), np.nan),
        )


@dataclass
class _Rows:
    """The active problems of a block; every array has one row per problem. Particles are ordered run by run."""

    problem: np.ndarray
    centre: np.ndarray
    log_share: np.ndarray
    square: np.ndarray
    t: np.ndarray
    u: np.ndarray
    x: np.ndarray
    log_p: np.ndarray
    alive: np.ndarray
    along: np.ndarray
    across: np.ndarray
    variance: np.ndarray
    covariance: np.ndarray
    deviation: np.ndarray
    lag: np.ndarray
    bias: np.ndarray

    def only(self, rows: np.ndarray) -> _Rows:
        return _Rows(**{name: array[rows] for name, array in vars(self).items()})

    def log_density(self, t: np.ndarray) -> np.ndarray:
        """``log q_t/prior`` at the particles, nats."""
        return np.asarray(logsumexp(self.terms(t), axis=-1))

    def terms(self, t: np.ndarray) -> np.ndarray:
        """The same by component."""
        at = t[:, None, None]
        return np.asarray(self.log_share[:, None] + at * self.x - 0.5 * at**2 * self.square[:, None])


@dataclass
class Path:
    """One block of problems on the way from t = 1 to t = 0."""

    config: Schedule
    meter: Meter
    mixture: Mixture
    block: np.ndarray
    found: Found
    rng: np.random.Generator

    def run(self) -> None:
        found, keep = self.found, self.found.failures.shape[1]
        rows = self._start()
        while rows.problem.size:
            before = rows.log_density(rows.t)
            old = rows.t
            rows.t, forced = self._next(rows, before)
            rows.bias = rows.bias + rows.lag * (old - rows.t)
            found.forced[rows.problem] |= forced
            log_weight = rows.log_density(rows.t) - before
            found.levels[rows.problem] += 1
            self._weigh(rows, log_weight)
            self._resample(rows, log_weight)
            arrived = rows.t == 0.0
            if keep == 0 and arrived.any():
                self._finish(rows.only(arrived))
                rows, arrived = rows.only(~arrived), arrived[~arrived]
            if rows.problem.size:
                self._move(rows)
            if arrived.any():
                self._finish(rows.only(arrived))
                rows = rows.only(~arrived)
        found.accepted[self.block] /= np.maximum(found.moves[self.block], 1)
        found.correlation[self.block] /= np.maximum(found.levels[self.block], 1)

    def _start(self) -> _Rows:
        """Draws of q_t at the first t where enough of a pilot fail; those that fail become the particles."""
        n, runs = self.found.n, self.config.n_runs
        counts = self.mixture.counts[self.block]
        used = counts.any(axis=0)
        centre, counts = self.mixture.centres[self.block][:, used], counts[:, used]
        norm = np.linalg.norm(centre, axis=-1)
        component = (np.arange(n)[None, :, None] >= np.cumsum(counts, axis=1)[:, None, :]).sum(axis=-1)
        t = self._outward(centre, component, norm.max(axis=1))
        labels = np.tile(component, (1, runs))
        self.found.from_prior[self.block] = norm.max(axis=1) == 0.0
        u = self._draw(centre, labels, t)
        failed = self.meter.value(self.block, u) <= 0
        count = failed.reshape(-1, runs, n).sum(axis=-1)
        with np.errstate(divide="ignore"):
            log_share, log_p = np.log(counts / n), np.log(count / n)
        p1 = count.sum(axis=1) / (n * runs)
        self.found.counted[self.block], self.found.drawn[self.block] = count.sum(axis=1), n * runs
        self.found.effective[self.block] = count.sum(axis=1)
        variance = np.where(p1 > 0, (1 - p1) / np.maximum(n * p1, 1e-300), 0.0)
        p = self.block.size
        rows = _Rows(
            problem=self.block,
            centre=centre,
            log_share=log_share,
            square=norm**2,
            t=t,
            u=u,
            x=u @ centre.transpose(0, 2, 1),
            log_p=log_p,
            alive=count > 0,
            along=np.full(p, 2.0),
            across=np.full(p, 0.5),
            variance=variance,
            covariance=np.zeros(p),
            deviation=np.sqrt(variance),
            lag=np.zeros(p),
            bias=np.zeros(p),
        )
        some = np.asarray(rows.alive.any(axis=1))
        rows = rows if some.all() else rows.only(some)
        self._resample(rows, np.where(failed[some], 0.0, -np.inf))
        # nothing to anneal without a centre: q_1 is the prior
        plain = np.asarray(rows.square.max(axis=1, initial=0.0) == 0.0)
        if plain.any():
            rows.t[plain] = 0.0
            self._finish(rows.only(plain))
            rows = rows.only(~plain)
        if rows.problem.size:
            self._move(rows)
        return rows

    def _draw(self, centre: np.ndarray, labels: np.ndarray, t: np.ndarray) -> np.ndarray:
        u = self.rng.standard_normal((*labels.shape, centre.shape[-1]))
        u += _one_hot(labels, centre.shape[1], t[:, None]) @ centre
        return u

    def _outward(self, centre: np.ndarray, component: np.ndarray, norm: np.ndarray) -> np.ndarray:
        """The t to start from, per problem: independent of the draws that will be counted there."""
        n = self.found.n
        t, best = np.ones(self.block.size), np.full(self.block.size, -1.0)
        open_, chosen = np.flatnonzero(norm > 0), t.copy()
        for step in range(_OUTWARD):
            cost = -(-n // 4) * self.config.n_runs
            if not open_.size or self._affordable(self.block[open_], cost) < 2:
                break
            t[open_] = 1.0 + step / norm[open_]
            # every fourth draw, so that the pilot has the components' shares
            labels = np.tile(component[open_][:, ::4], (1, self.config.n_runs))
            share = (self.meter.value(self.block[open_], self._draw(centre[open_], labels, t[open_])) <= 0).mean(axis=1)
            better = share > best[open_]
            best[open_] = np.maximum(best[open_], share)
            chosen[open_[better]] = t[open_[better]]
            open_ = open_[share < 0.2]
        return np.asarray(chosen)

    def _affordable(self, problems: np.ndarray, cost: int) -> float:
        """How often ``cost`` more evaluations can be paid by each of some problems."""
        if self.meter.max_evaluations is None:
            return math.inf
        spent = (self.meter.evaluations + self.meter.gradients)[problems].max(initial=0)
        return float((int(self.meter.max_evaluations) - int(spent)) // cost)

    def _next(self, rows: _Rows, before: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The next t, and whether the budget forced it below what ``keep`` asks for."""
        runs = self.config.n_runs
        dead = np.repeat(~rows.alive, self.found.n, axis=1)
        target = self.config.keep * self.found.n * rows.alive.sum(axis=1)

        def enough(t: np.ndarray) -> np.ndarray:
            return np.asarray(_effective(np.where(dead, -np.inf, rows.log_density(t) - before)) >= target)

        low, high = np.zeros_like(rows.t), rows.t.copy()
        for _ in range(24):
            middle = 0.5 * (low + high)
            fine = enough(middle)
            low, high = np.where(fine, low, middle), np.where(fine, middle, high)
        step = np.where(enough(np.zeros_like(rows.t)), 0.0, high)
        # levels still affordable; the last is free unless its particles are moved
        left = self._affordable(rows.problem, self.config.n_moves * self.found.n * runs)
        left += self.found.failures.shape[1] == 0
        latest = 0.0 if left <= 1 else 1.0 - 1.0 / left
        forced = rows.t * latest
        return np.minimum(step, np.minimum(forced, rows.t * (1.0 - 1e-4))), forced < step

    def _weigh(self, rows: _Rows, log_weight: np.ndarray) -> None:
        """Multiply the mean weights into p, and add up the variance of its logarithm."""
        p, n = rows.problem.size, self.found.n
        by_run = log_weight.reshape(p, -1, n)
        rows.log_p = rows.log_p + logsumexp(by_run, axis=-1) - math.log(n)
        live = np.where(np.repeat(rows.alive, n, axis=1), log_weight, -np.inf)
        effective = _effective(live)
        self.found.effective[rows.problem] = np.minimum(self.found.effective[rows.problem], effective)
        # relative variance of one run's mean weight, from all live runs
        total = n * rows.alive.sum(axis=1)
        variance = np.maximum(total / np.maximum(effective, 1e-9) - 1.0, 0.0) / n
        deviation = np.sqrt(variance)
        rows.variance = rows.variance + variance + 2.0 * deviation * rows.covariance
        rows.deviation = deviation

    def _resample(self, rows: _Rows, log_weight: np.ndarray) -> None:
        """Systematic resampling within each run; a dead run stays as it is."""
        p, n, runs = rows.problem.size, self.found.n, self.config.n_runs
        by_run = log_weight.reshape(p * runs, n)
        by_run = np.where(rows.alive.reshape(-1, 1), by_run, 0.0)
        shares = np.cumsum(np.exp(by_run - by_run.max(axis=1, keepdims=True)), axis=1)
        shares /= shares[:, -1:]
        comb = (np.arange(n)[None] + self.rng.random((p * runs, 1))) / n
        # one sorted search for all runs: run i's shares are shifted to [i, i + 1]
        row = np.arange(p * runs)[:, None]
        chosen = np.searchsorted((shares + row).ravel(), (comb + row).ravel(), side="right").reshape(-1, n)
        parent = np.clip(chosen, row * n, row * n + n - 1).ravel()
        rows.u = rows.u.reshape(-1, rows.u.shape[-1])[parent].reshape(rows.u.shape)
        rows.x = rows.x.reshape(-1, rows.x.shape[-1])[parent].reshape(rows.x.shape)

    def _move(self, rows: _Rows) -> None:
        """``n_moves`` moves at the current t, and the correlation that they leave."""
        if self._affordable(rows.problem, self.config.n_moves * self.found.n * self.config.n_runs) < 1:
            return
        config = self.config
        start, first = self._statistic(rows)
        scale = np.sqrt(rows.square.max(axis=1))
        # spread of s: the scale of its steps
        spread = np.sqrt(start.var(axis=-1).mean(axis=1)) / scale
        going = np.arange(rows.problem.size)
        correlation, drift = np.ones(going.size), np.zeros(going.size)
        done = 0
        while going.size and done < config.max_moves:
            if done and self._affordable(rows.problem[going], config.n_moves * self.found.n * config.n_runs) < 8:
                break
            every = going.size == rows.problem.size
            part = rows if every else rows.only(going)
            for move in range(config.n_moves):
                both = move % 2 == 1
                along = np.clip(part.along * spread[going], 1e-6, 1.0)
                rate = self._propose(part, along, part.across if both else None)
                self.found.accepted[part.problem] += rate
                if both:
                    part.across = np.clip(part.across * np.exp(rate - _TARGET_BOTH), 1e-4, 1.0)
                else:
                    part.along = np.clip(part.along * np.exp(rate - _TARGET_ALONG), 1e-3, 10.0)
            if not every:
                rows.u[going], rows.x[going] = part.u, part.x
                rows.along[going], rows.across[going] = part.along, part.across
            self.found.moves[part.problem] += config.n_moves
            done += config.n_moves
            end, last = self._statistic(part)
            norms = np.sqrt((start[going] ** 2).sum(axis=(1, 2)) * (end**2).sum(axis=(1, 2)))
            correlation[going] = np.clip((start[going] * end).sum(axis=(1, 2)) / np.maximum(norms, 1e-300), 0.0, 1.0)
            drift[going] = first[going] - last
            going = going[correlation[going] > config.forget]
        self.found.correlation[rows.problem] += correlation
        rows.covariance = correlation * (rows.covariance + rows.deviation)
        rows.lag = drift * correlation / np.maximum(1 - correlation, 0.05)

    def _statistic(self, rows: _Rows) -> tuple[np.ndarray, np.ndarray]:
        """``(problems, runs, n)``: d log q_t / dt, by which the next weights will differ, centred by run."""
        terms = rows.terms(rows.t)
        share = np.exp(terms - logsumexp(terms, axis=-1, keepdims=True))
        slope = (share * (rows.x - rows.t[:, None, None] * rows.square[:, None])).sum(axis=-1)
        by_run = slope.reshape(rows.problem.size, -1, self.found.n)
        by_run = np.where(rows.alive[:, :, None], by_run, 0.0)
        mean = by_run.mean(axis=-1, keepdims=True)
        return by_run - mean, mean[..., 0].sum(axis=1) / rows.alive.sum(axis=1)

    def _propose(self, rows: _Rows, along: np.ndarray, across: np.ndarray | None) -> np.ndarray:
        """One move of every particle, in chunks; returns the share accepted per problem."""
        p, total, dim = rows.u.shape
        m = rows.square.shape[1]
        norm = np.sqrt(rows.square)
        unit = rows.centre / np.where(norm > 0, norm, 1.0)[..., None]
        accepted = np.zeros(p)
        step = max(1, _CHUNK_ELEMENTS // (p * dim))
        for first in range(0, total, step):
            part = slice(first, min(first + step, total))
            u, x = rows.u[:, part], rows.x[:, part]
            label = self._label(rows, part)
            length = np.take_along_axis(norm, label, axis=1)
            mean = rows.t[:, None] * length
            safe = np.where(length > 0, length, 1.0)
            s = np.take_along_axis(x, label[..., None], axis=-1)[..., 0] / safe
            kept, noise = np.sqrt(1.0 - along**2)[:, None], self.rng.standard_normal(s.shape)
            s_new = mean + kept * (s - mean) + along[:, None] * noise
            if across is None:
                proposal = u + _one_hot(label, m, s_new - s) @ unit
            else:
                proposal = self.rng.standard_normal(u.shape)
                proposal *= across[:, None, None]
                proposal += np.sqrt(1.0 - across**2)[:, None, None] * u
                now = np.take_along_axis(proposal @ unit.transpose(0, 2, 1), label[..., None], axis=-1)[..., 0]
                proposal += _one_hot(label, m, s_new - now) @ unit
            inside = self.meter.value(rows.problem, proposal) <= 0
            x_new = proposal @ rows.centre.transpose(0, 2, 1)
            np.copyto(u, proposal, where=inside[..., None])
            np.copyto(x, x_new, where=inside[..., None])
            live = np.repeat(rows.alive, self.found.n, axis=1)[:, part]
            accepted += (inside & live).sum(axis=1)
        return np.asarray(accepted / np.maximum(rows.alive.sum(axis=1) * self.found.n, 1))

    def _label(self, rows: _Rows, part: slice) -> np.ndarray:
        """A component for each particle, drawn given where it is."""
        p, m = rows.square.shape
        count = rows.x[:, part].shape[1]
        if m == 1:
            return np.zeros((p, count), dtype=np.int64)
        terms = rows.terms(rows.t)[:, part]
        share = np.cumsum(np.exp(terms - logsumexp(terms, axis=-1, keepdims=True)), axis=-1)
        pick = self.rng.random((p, count, 1)) * share[..., -1:]
        return np.asarray((pick >= share[..., :-1]).sum(axis=-1))

    def _finish(self, rows: _Rows) -> None:
        self.found.log_p[rows.problem] = rows.log_p
        self.found.variance[rows.problem] = rows.variance
        self.found.lag[rows.problem] = rows.bias
        keep = self.found.failures.shape[1]
        for i, problem in enumerate(rows.problem):
            if not keep or not np.isfinite(rows.log_p[i]).any():
                continue
            # a run stands for as much of the failure set as its p says
            share = np.exp(rows.log_p[i] - rows.log_p[i].max())
            weight = np.repeat(share / share.sum(), self.found.n) / self.found.n
            few = keep <= (weight > 0).sum()
            chosen = self.rng.choice(weight.size, size=keep, replace=not few, p=weight)
            self.found.failures[problem] = rows.u[i, chosen]


def _one_hot(label: np.ndarray, m: int, value: np.ndarray) -> np.ndarray:
    """``(p, n, m)``: ``value`` at each point's component, zero at the others."""
    return np.asarray(np.where(label[..., None] == np.arange(m), np.broadcast_to(value, label.shape)[..., None], 0.0))


def _effective(log_weight: np.ndarray) -> np.ndarray:
    """``(sum w)^2 / sum w^2`` along the last axis."""
    weight = np.exp(log_weight - log_weight.max(axis=-1, keepdims=True))
    return np.asarray(weight.sum(axis=-1) ** 2 / (weight**2).sum(axis=-1))
