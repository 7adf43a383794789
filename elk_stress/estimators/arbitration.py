"""Who is believed when estimators of one number are held against each other.

Pure rules on what is known about one problem (:class:`Evidence`), in bits; :mod:`.auto` gathers it. The order:

1. Counting settles what failed often enough.
2. Importance sampling is *trusted* with enough effective draws and no blind share. Trusted and in agreement with
   splitting, it is the answer (not whichever is narrower: choosing by a random width would spoil the coverage).
3. Trusted, with more probability than splitting, and splitting's interval above the evidence bound, which is rigorous:
   splitting missed a mode.
4. Not trusted, and no more probability than splitting: splitting, if its own runs agree.
5. Splitting that its budget ended before any failure is a lower limit, never an estimate: without trusted importance
   sampling the answer is censored there.
6. Otherwise the union, flagged. Nothing found by anyone: censored.

Every answer is then held against counting and the bounds, widened and flagged where it contradicts them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from elk_stress.core.bits import Kind
from elk_stress.core.flags import Flag, flag

__all__ = ["Estimate", "Evidence", "Verdict", "agree", "decide"]

# standard errors at which two estimates disagree (two-sided false alarm 1e-3)
_APART = 3.3


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% interval, in bits."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1f} [{self.low:.1f}, {self.high:.1f}]"


@dataclass(frozen=True)
class Evidence:
    """What is known about one problem.

    Attributes:
        counted: prior draws that failed, with the Clopper-Pearson interval (value infinite where none did).
        settled: enough of them failed.
        weighed: importance sampling; ``None`` where it found nothing.
        trusted: it has enough effective draws and is not blind where splitting's particles are.
        blind: share of splitting's failing particles that importance sampling cannot see.
        split: splitting; ``None`` where it was not run.
        split_censored: splitting met no failure; its value is a lower limit.
        split_cut: and that because its budget ended.
        split_doubts: its own runs disagree or were cut short.
        split_status: its status.
        upper, lower: rigorous bounds.
    """

    counted: Estimate
    settled: bool
    weighed: Estimate | None = None
    trusted: bool = False
    blind: float = 0.0
    split: Estimate | None = None
    split_censored: bool = False
    split_cut: bool = False
    split_doubts: bool = False
    split_status: str = "ok"
    upper: float = math.inf
    lower: float = 0.0


@dataclass(frozen=True)
class Verdict:
    """One answer and why."""

    value: float
    low: float
    high: float
    kind: Kind
    source: str
    status: str = "ok"
    flags: tuple[Flag, ...] = field(default=())


def agree(evidence: Evidence) -> bool:
    """Whether importance sampling and splitting say the same, within their errors. False if either is missing."""
    weighed, split = evidence.weighed, evidence.split
    if weighed is None or split is None:
        return False
    if evidence.split_censored:
        return weighed.high >= split.low
    errors = math.hypot((weighed.high - weighed.low) / 3.92, (split.high - split.low) / 3.92)
    return abs(weighed.value - split.value) <= _APART * errors


def decide(evidence: Evidence, max_bits: float, budget_limited: bool) -> Verdict:
    """The answer for one problem; beyond ``max_bits`` it is censored there."""
    verdict = _believe(evidence, max_bits, budget_limited)
    if verdict.kind is Kind.CENSORED:
        return verdict
    return _censor(_bracket(verdict, evidence), max_bits)


def _believe(e: Evidence, max_bits: float, budget_limited: bool) -> Verdict:
    if e.settled:
        return Verdict(e.counted.value + 0.0, e.counted.low + 0.0, e.counted.high, Kind.ESTIMATE, "monte_carlo")
    weighed, split = e.weighed, e.split
    if weighed is not None and e.trusted:
        # probability that it is known not to see widens its interval
        seen = Estimate(weighed.value, weighed.low + math.log2(1 - min(e.blind, 0.5)), weighed.high)
        importance = Verdict(seen.value, max(0.0, seen.low), seen.high, Kind.ESTIMATE, "importance")
        if split is None or agree(e):
            return importance
        if weighed.value < split.value and e.upper < split.low:
            seen_mode = flag("missed_mode", f"splitting says {split}, but B <= {e.upper:.1f} is a bound")
            return Verdict(seen.value, max(0.0, seen.low), seen.high, Kind.ESTIMATE, "importance", "ok", (seen_mode,))
        if e.split_cut:
            # a lower limit has no say in the value, only in how far up the truth may lie
            named = f"importance sampling {weighed}, splitting at least {split.low:.1f}"
            status = f"estimates disagree: {named} ({e.split_status}); raise n_particles"
            doubt = flag("runs_disagree", named)
            return Verdict(seen.value, max(0.0, seen.low), math.inf, Kind.ESTIMATE, "importance", status, (doubt,))
        return _union(e, weighed, split)
    if split is None and weighed is not None:
        why = "importance sampling is starved or doubted, and nothing checked it: its lower end is what counting allows"
        low, high = min(weighed.low, e.counted.low), weighed.high
        doubt = flag("low_effective_sample_size", f"importance sampling says {weighed}, unchecked")
        status = f"{why}; raise n_particles or check_fraction"
        return Verdict(weighed.value, low, high, Kind.ESTIMATE, "importance", status, (doubt,))
    if split is None:
        return _nothing(e, e.counted.low, max_bits, budget_limited, "raise n_particles or check_fraction")
    if e.split_cut:
        return _at_least(e, weighed, split, max_bits)
    if e.split_censored:
        if weighed is not None:
            return _union(e, weighed, split)
        if split.value >= max_bits:
            return Verdict(max_bits, max_bits, math.inf, Kind.CENSORED, "subset_simulation")
        at_least = max(split.value, e.counted.low)
        return _nothing(e, at_least, max_bits, budget_limited, e.split_status)
    if not e.split_doubts and (weighed is None or weighed.high >= split.low):
        status = "ok: taken from splitting; importance sampling is starved or blind to a part of the failure set"
        return Verdict(split.value, split.low, split.high, Kind.ESTIMATE, "subset_simulation", status)
    return _union(e, weighed, split)


def _union(e: Evidence, weighed: Estimate | None, split: Estimate) -> Verdict:
    """Nothing settles who is right: everything that either holds possible, and the mean p in the middle."""
    parts = [("splitting", split)] if weighed is None else [("importance sampling", weighed), ("splitting", split)]
    values = np.array([part.value for _, part in parts])
    value = float(math.log2(len(values)) - np.logaddexp2.reduce(-values))
    named = ", ".join(f"{name} {part}" for name, part in parts)
    high = math.inf if e.split_censored else max(part.high for _, part in parts)
    why = "" if e.split_status == "ok" else f" ({e.split_status})"
    return Verdict(
        value,
        min(part.low for _, part in parts),
        high,
        Kind.ESTIMATE,
        "union",
        f"estimates disagree: {named}{why}; raise n_particles, n_runs or max_evaluations",
        (flag("runs_disagree", named),),
    )


def _at_least(e: Evidence, weighed: Estimate | None, split: Estimate, max_bits: float) -> Verdict:
    """Splitting ended by its budget, and no importance sampling to trust: censored at what it reached."""
    flags = [flag("budget_exhausted", f"splitting reached {split.low:.1f} bits")]
    low, also = split.low, ""
    if weighed is not None:
        also = f"; importance sampling, starved or blind, says {weighed}"
        if weighed.high < split.low:
            flags.append(flag("runs_disagree", f"importance sampling {weighed}, splitting at least {split.low:.1f}"))
            low = weighed.low
    # what counting proves holds whatever splitting reached
    low = min(max(low, e.counted.low), max_bits)
    status = (
        f"splitting's budget ended before failure: at least {low:.1f} bits{also}; raise n_particles (stress(..., "
        "n_particles=...) scales the budget), or stress fewer items"
    )
    return Verdict(low, low, math.inf, Kind.CENSORED, "subset_simulation", status, tuple(flags))


def _nothing(e: Evidence, at_least: float, max_bits: float, budget_limited: bool, why: str) -> Verdict:
    at_least = min(at_least, max_bits)
    name = "budget_exhausted" if budget_limited else "low_effective_sample_size"
    status = f"no estimator carried this problem: {why}"
    return Verdict(at_least, at_least, math.inf, Kind.CENSORED, "monte_carlo", status, (flag(name, why),))


def _bracket(v: Verdict, e: Evidence) -> Verdict:
    low, high, status, flags = v.low, v.high, v.status, v.flags
    if high < e.counted.low or low > e.counted.high:
        flags += (flag("runs_disagree", f"{v.source} says {v.value:.1f}, counting {e.counted}"),)
        low, high = min(low, e.counted.low), max(high, e.counted.high)
        status = f"{v.source} and counting disagree: the interval is their union; raise n_particles"
    if low > e.upper or high < e.lower:
        bound = f"B <= {e.upper:.1f}" if low > e.upper else f"B >= {e.lower:.1f}"
        flags += (flag("bounds_violated", f"{v.source} says {v.value:.1f} [{low:.1f}, {high:.1f}], but {bound}"),)
        low, high = min(low, e.upper), max(high, e.lower)
        status = f"the estimate violates the bound {bound}: trust the bound; raise n_particles"
    return Verdict(v.value, low, high, v.kind, v.source, status, flags)


def _censor(v: Verdict, max_bits: float) -> Verdict:
    if v.value <= max_bits:
        return v
    return Verdict(max_bits, min(v.low, max_bits), math.inf, Kind.CENSORED, v.source, v.status, v.flags)
