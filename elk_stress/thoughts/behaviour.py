r"""Bits of "failed and kept" when behaviour is judged by true forward passes.

The joint event splits exactly: ``B_joint = B_failed - log2 P[kept | failed]``. The first term costs no forward pass;
the second is a share, measured on draws from the prior *given failure* with one true forward pass each
(Clopper-Pearson interval). Only where no such draw keeps behaviour is a search needed: the local quadratic form of the
shift (Fisher) leads to the nearest point that fails and is kept, importance sampling around it is again judged by true
passes, and what is still not found is reported as censored at what was searched.

``B_kept`` and the default epsilon come from draws of the prior itself, shared by all probes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from elk_stress.core.bits import LN2, BitsBatch, Kind
from elk_stress.core.flags import Flag, flag
from elk_stress.estimators.limit_state import LimitState
from elk_stress.testbeds.protocol import SplitName, Testbed
from elk_stress.thoughts.conformal import proportion_interval
from elk_stress.threats.priors import EllipticalPrior

__all__ = ["Behaviour", "joint_of_failed", "kept_bits", "searched_joint"]

SearchEvents = Callable[[np.ndarray], LimitState]


@dataclass
class Behaviour:
    """True shifts of a testbed, with the draws that several probes and threats share kept in memory.

    Attributes:
        testbed: asked for shifts.
        n_verify: true forward passes per item for each share that is measured.
        seed: of the shared prior draws.
    """

    testbed: Testbed
    n_verify: int = 64
    seed: int = 0
    split: SplitName = "test"
    _natural: dict[tuple[str, str, float], tuple[np.ndarray, np.ndarray]] = field(default_factory=dict, repr=False)
    _factors: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    @property
    def exact(self) -> bool:
        """Whether the shift is its quadratic form, so that no forward pass is needed."""
        return self.testbed.shift_cost == "exact"

    def shift(self, items: np.ndarray, moves: np.ndarray) -> np.ndarray:
        """``(p, n)`` nats."""
        return np.asarray(self.testbed.shift(self.split, items, np.asarray(moves, dtype=np.float32)), dtype=float)

    def factors(self, items: np.ndarray) -> np.ndarray:
        """``(p, rank, d)`` quadratic forms, computed once per item."""
        missing = np.array([i for i in items.tolist() if i not in self._factors], dtype=int)
        if len(missing):
            for i, factor in zip(missing.tolist(), self.testbed.shift_factor(self.split, missing), strict=True):
                self._factors[i] = np.asarray(factor, dtype=np.float32)
        return np.stack([self._factors[i] for i in items.tolist()])

    def prior_shifts(self, prior: EllipticalPrior, items: np.ndarray, key: tuple[str, str, float]) -> np.ndarray:
        """Shifts ``(p, n_verify)`` of the prior's own draws for each item, computed once per prior."""
        known_items, known = self._natural.get(key, (np.empty(0, dtype=int), np.empty((0, self.n_verify))))
        missing = np.setdiff1d(items, known_items)
        if len(missing):
            moves = np.stack(
                [
                    prior.sample(self.n_verify, np.random.SeedSequence([self.seed, 0xBE4A, int(i)]))
                    for i in missing.tolist()
                ]
            )
            known = np.concatenate([known, self.shift(missing, moves)])
            known_items = np.concatenate([known_items, missing])
            self._natural[key] = (known_items, known)
        position = {int(i): row for row, i in enumerate(known_items)}
        return np.asarray(known[[position[int(i)] for i in items]])


def kept_bits(shifts: np.ndarray, epsilon: float) -> BitsBatch:
    """``B_kept`` per item, counted on the prior's draws, with Clopper-Pearson intervals."""
    n = shifts.shape[1]
    count = (shifts <= epsilon).sum(axis=1)
    low_p, high_p = np.array([proportion_interval(int(c), n) for c in count]).reshape(-1, 2).T
    with np.errstate(divide="ignore"):
        value = np.where(count > 0, -np.log2(np.maximum(count, 1) / n), -np.log2(high_p))
        high = np.where(count > 0, -np.log2(np.where(low_p > 0, low_p, 1.0)), math.inf)
    kinds = tuple(Kind.ESTIMATE if c > 0 else Kind.CENSORED for c in count)
    return BitsBatch.build(value, -np.log2(high_p), high, kinds, "monte_carlo", evaluations=n)


def joint_of_failed(failed: BitsBatch, shifts: np.ndarray, epsilon: float, max_bits: float) -> BitsBatch:
    """``B_joint`` from the bits of failing and the true shifts ``(p, n)`` of draws given failure.

    An item none of whose draws is kept is interval-censored: at least ``B_failed - log2`` of the Clopper-Pearson upper
    limit, open above.
    """
    share = kept_bits(shifts, epsilon)
    kept_none = np.array([k is Kind.CENSORED for k in share.kind])
    infinite = np.isposinf(failed.value)
    value = failed.value + share.value
    with np.errstate(invalid="ignore"):
        below, above = _finite(failed.value - failed.low), _finite(failed.high - failed.value)
    down = np.hypot(below, share.value - np.where(kept_none, share.value, share.low))
    up = np.hypot(above, np.where(kept_none, 0.0, share.high - share.value))
    low, high = value - down, np.where(kept_none, math.inf, value + up)
    capped = np.minimum(value, max_bits)
    kinds, flags, status = [], [], []
    for i in range(len(failed)):
        extra: tuple[Flag, ...] = ()
        if infinite[i]:
            kinds.append(Kind.EXACT)
        elif kept_none[i] or value[i] >= max_bits or failed.kind[i] is Kind.CENSORED:
            kinds.append(Kind.CENSORED)
        else:
            kinds.append(Kind.ESTIMATE)
        if not infinite[i] and (shifts[i] <= epsilon).mean() < 0.5:
            extra = (flag("behaviour_broken", f"{(shifts[i] <= epsilon).mean():.0%} of breaking draws keep behaviour"),)
        flags.append(failed.flags[i] + extra)
        nothing = kept_none[i] and not infinite[i]
        status.append(f"none of {shifts.shape[1]} breaking draws kept behaviour" if nothing else failed.status[i])
    return BitsBatch.build(
        np.where(infinite, math.inf, np.where([k is Kind.CENSORED for k in kinds], capped, value)),
        np.where(infinite, math.inf, np.minimum(low, np.where([k is Kind.CENSORED for k in kinds], capped, value))),
        np.where(infinite | (value >= max_bits), math.inf, high),
        kinds,
        f"{failed.method} x verified",
        evaluations=failed.evaluations + shifts.shape[1],
        gradients=failed.gradients,
        status=status,
        flags=flags,
    )


def searched_joint(
    joint: BitsBatch,
    items: np.ndarray,
    prior: EllipticalPrior,
    failed: LimitState,
    surrogate: LimitState,
    behaviour: Behaviour,
    epsilon: float,
    *,
    max_bits: float,
    seed: int,
) -> BitsBatch:
    """Second look at items of which no breaking draw kept behaviour: importance sampling at the surrogate's break.

    Args:
        joint: the first look; items that are not open above are left as they are.
        failed, surrogate: limit states of failing (cheap, exact) and of failing and kept (quadratic shift).

    Every draw is judged by a true forward pass, so the upper end is a rigorous evidence bound whatever the quadratic
    form is worth, and the lower end stays that of the first look; the point between them is an importance estimate.
    """
    from elk_stress.estimators.design_point import DesignPoint

    open_above = np.array(
        [np.isposinf(h) and np.isfinite(v) and v < max_bits for h, v in zip(joint.high, joint.value, strict=True)]
    )
    chosen = np.flatnonzero(open_above)
    if len(chosen) == 0:
        return joint
    found = DesignPoint()(surrogate.select(chosen), seed=seed)
    centres = np.asarray(found.diagnostics["centres"])[:, 0, :]
    usable = np.isfinite(centres).all(axis=1)
    chosen, centres = chosen[usable], centres[usable]
    if len(chosen) == 0:
        return joint
    rng = np.random.default_rng(np.random.SeedSequence([seed, 0x15EA]))
    n, every = behaviour.n_verify, np.arange(len(chosen))

    def draw(size: int) -> tuple[np.ndarray, np.ndarray]:
        u = centres[:, None, :] + rng.standard_normal((len(chosen), size, prior.dim))
        # bits of attack density over prior density: (|u|^2 - |u - c|^2) / (2 ln 2)
        return u, (np.einsum("pnk,pk->pn", u, centres) - 0.5 * (centres**2).sum(axis=1)[:, None]) / LN2

    # pilots cost no forward pass: the quadratic form says which density ratio a hit usually has
    pilot, pilot_ratio = draw(256)
    pilot_hit = surrogate.select(chosen).value(every, pilot) <= 0
    u, ratio = draw(n)
    hit = failed.select(chosen).value(every, u) <= 0
    hit &= behaviour.shift(items[chosen], np.asarray(prior.move(u))) <= epsilon
    value, low, high = joint.value.copy(), joint.low.copy(), joint.high.copy()
    kinds, status = list(joint.kind), list(joint.status)
    for row, i in enumerate(chosen):
        status[i] += f"; {int(hit[row].sum())} of {n} draws at the nearest break of the quadratic shift kept it"
        at_hits = pilot_ratio[row][pilot_hit[row]] if pilot_hit[row].any() else pilot_ratio[row]
        limit = float(np.quantile(at_hits, 0.8))
        share, _ = proportion_interval(int((hit[row] & (ratio[row] <= limit)).sum()), n)
        if share <= 0:
            continue
        # evidence bound: P >= 2^-limit q(E and ratio <= limit), the ratio's limit fixed before these draws
        bound = max(limit - math.log2(share), low[i])
        high[i] = bound if bound < max_bits else math.inf
        estimate = -np.logaddexp2.reduce(-ratio[row][hit[row]]) + math.log2(n)
        value[i] = min(max(float(estimate), low[i]), high[i], max_bits)
        kinds[i] = Kind.ESTIMATE if value[i] < max_bits else Kind.CENSORED
    return BitsBatch.build(
        value,
        low,
        high,
        kinds,
        joint.method,
        evaluations=joint.evaluations,
        gradients=joint.gradients,
        status=status,
        flags=joint.flags,
    )


def _finite(x: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(x), x, 0.0)
