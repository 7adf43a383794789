"""Universal scope: one move for all items, judged on the whole test set. B at half advantage, metric at b bits."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from elk_stress.core.bits import Bits, BitsBatch, Kind
from elk_stress.core.flags import Flag, flag
from elk_stress.estimators.limit_state import LimitState, both
from elk_stress.thoughts.baseline import Baseline, score_gradients
from elk_stress.thoughts.conformal import proportion_interval
from elk_stress.thoughts.event_bits import event_bits, joined, joint_bits
from elk_stress.thoughts.events import (
    failures_of_linear,
    item_event,
    kept_event,
    nearest_kept,
    ranks_of_levels,
    universal_auroc_event,
    universal_recall_event,
)
from elk_stress.thoughts.item_scope import SCALES, TAILS
from elk_stress.thoughts.prepared import Prepared
from elk_stress.thoughts.result import Curve, ThreatResult
from elk_stress.thoughts.survival import bits_of_margin, grid_of, margin_of_bits, moved_bits, wide_interval
from elk_stress.thoughts.universal_items import JudgedItems, judged_on

__all__ = ["bits_of_levels", "stress_universal", "universal_event", "universal_joint_event"]

# of the metric's curve for probes without a closed form, beside half advantage
_LEVELS = 7


def universal_event(judged: JudgedItems, baseline: Baseline, levels: np.ndarray) -> LimitState:
    """One problem per level: the real metric on all items is at most that level."""
    if baseline.threat.metric == "auroc":
        return universal_auroc_event(baseline.probe, baseline.prior, judged.origins, judged.labels, levels)
    return universal_recall_event(
        baseline.probe, baseline.prior, judged.positives, baseline.detection.threshold, levels
    )


def stress_universal(
    prepared: Prepared, baseline: Baseline, *, max_bits: float, n_particles: int, seed: int
) -> ThreatResult:
    """B at half advantage with its interval, and the metric at b bits over the whole curve."""
    threat = baseline.threat
    judged = judged_on(prepared, baseline)
    tau = judged.tau
    clean = baseline.detection.recall if threat.metric == "recall" else baseline.detection.auroc
    floor = 0.0 if threat.metric == "recall" else 0.5
    worthless = clean <= floor
    n = len(prepared.positives)
    levels = np.arange(n) / n if threat.metric == "recall" else np.linspace(0.5, 1, 21)
    coarse = not baseline.probe.traits.linear
    if coarse:
        # without a closed form every level is an estimate, in which a particle is scored on all items
        levels = levels[np.unique(np.linspace(0, len(levels) - 1, _LEVELS).astype(int))]
    levels = np.unique(np.concatenate([[tau], levels[levels < clean]]))
    at_tau = int(np.searchsorted(levels, tau))
    every = bits_of_levels(universal_event(judged, baseline, levels), at_tau, max_bits, n_particles, seed)
    bits = every[at_tau]
    epsilon: float | None = None
    b_kept: Bits | None = None
    status = bits.status
    if threat.metric == "auroc" and status == "ok":
        status = "ok: the interval is the estimate's own error; for the AUROC items and contexts are not resampled"
    flags: tuple[Flag, ...] = baseline.flags + bits.flags
    if threat.kept and not worthless and not (math.isinf(bits.value) and bits.kind is Kind.EXACT):
        epsilon = threat.epsilon if threat.epsilon is not None else prepared.epsilon
        bits, b_kept, note = _kept(
            judged, baseline, universal_event(judged, baseline, np.array([tau])), bits, epsilon, max_bits, seed
        )
        status = note if note != "ok" else status
        if b_kept.kind is not Kind.CENSORED and bits.value - every[at_tau].value > 1 and b_kept.value < 1:
            flags += (flag("behaviour_broken", "most moves that break it also break behaviour"),)
    free = _descending(every, at_tau)
    extra = 0.0 if bits.value == free[at_tau] else float(bits.value - free[at_tau])
    cost = free + extra
    replicates, metric_rows = _replicates(prepared, baseline, free, levels, at_tau, extra, max_bits)
    low, high = np.quantile(replicates, [0.025, 0.975])
    if math.isnan(low):
        low, high = bits.low, bits.high
    conditional = (bits.low, bits.high)
    if worthless:
        headline = Bits(0.0, 0.0, 0.0, Kind.EXACT, "half_advantage", status="the probe has no advantage to lose")
        flags += () if any(f.name == "flipped" for f in baseline.flags) else (flag("catches_nothing"),)
    elif bits.value >= max_bits and not (math.isinf(bits.value) and bits.kind is Kind.EXACT):
        headline = Bits(max_bits, min(float(low), bits.low, max_bits), math.inf, Kind.CENSORED, "half_advantage")
    elif math.isinf(bits.value):
        headline = Bits(math.inf, min(float(low), max_bits), math.inf, Kind.EXACT, "half_advantage")
    else:
        kind = Kind.CENSORED if bits.kind is Kind.CENSORED else Kind.ESTIMATE
        top = math.inf if kind is Kind.CENSORED or high >= max_bits else max(float(high), bits.high)
        headline = Bits(
            bits.value, min(float(low), bits.low), top, kind, "half_advantage", bits.evaluations, bits.gradients
        )
        if headline.value < 1 and kind is Kind.ESTIMATE:
            flags += (flag("brittle", f"B at half advantage {headline.value:.2f} bits"),)
        flags += wide_interval(headline)
    plain = threat.kept or worthless
    return ThreatResult(
        threat=threat,
        quantity="B at half advantage",
        headline=headline,
        detection=baseline.detection,
        curve=_curve(levels, n if threat.metric == "recall" else 10_000, cost, clean, metric_rows, max_bits, coarse),
        conditional=conditional,
        b_kept=b_kept,
        b_given_kept=None if b_kept is None else _difference(headline, b_kept),
        epsilon=epsilon,
        scale={} if plain else {f"{c:g}": _at_scale(baseline, tau, every[at_tau], c, max_bits) for c in SCALES},
        tails={} if plain else _other_tails(baseline, every[at_tau], max_bits),
        replicates=np.stack([replicates, np.minimum(replicates, max_bits)], axis=1),
        flags=flags,
        status=status,
    )


def universal_joint_event(
    judged: JudgedItems, baseline: Baseline, epsilon: float, *, slack: float = 0.0
) -> tuple[LimitState, LimitState]:
    """Half advantage lost *and* the mean quadratic shift kept, and the latter alone: one problem each.

    The mean of the items' quadratic forms is that of their stacked factors. Recall under a linear probe is decided by
    one positive, whose own event is the universal one; with ``slack`` it must fall that far below the threshold.
    """
    assert judged.behaviour is not None
    stacked = judged.behaviour.factors(judged.watched).reshape(1, -1, judged.origins.shape[1])
    stacked = stacked / math.sqrt(len(judged.watched))
    kept = kept_event(baseline.prior, stacked, epsilon)
    i = _deciding(judged.margin, judged.tau)
    origin = judged.positives[i][None]
    if baseline.threat.metric == "recall" and baseline.probe.traits.linear:
        failing = item_event(baseline.probe, baseline.prior, origin, baseline.detection.threshold - slack, closed=False)
    else:
        failing = universal_event(judged, baseline, np.array([judged.tau]))
    if failing.backend != kept.backend:
        raise ValueError(
            "a common shift of all items never changes the AUROC of a linear probe, with or without behaviour kept; "
            "use the metric 'recall'"
        )
    slope = score_gradients(baseline.probe, origin)
    corner = nearest_kept(baseline.prior, slope, judged.margin[i : i + 1], stacked, epsilon)
    return replace(both(failing, kept), starts=corner), kept


def bits_of_levels(event: LimitState, at_tau: int, max_bits: float, n_particles: int, seed: int) -> BitsBatch:
    """B of every level. Where it is estimated the headline's has a budget of its own, and with a gradient splitting
    checks it alone: the rest of the curve takes nothing from it."""
    options: dict[str, Any] = {"max_bits": max_bits, "n_particles": n_particles, "seed": seed}
    if event.linear is not None or event.n_problems == 1:
        return event_bits(event, **options)
    others = np.delete(np.arange(event.n_problems), at_tau)
    return joined(
        event_bits(event.select(others[others < at_tau]), check_fraction=0.0, **options),
        event_bits(event.select(np.array([at_tau])), **options),
        event_bits(event.select(others[others > at_tau]), check_fraction=0.0, **options),
    )


def _kept(
    judged: JudgedItems, baseline: Baseline, failed: LimitState, bits: Bits, epsilon: float, max_bits: float, seed: int
) -> tuple[Bits, Bits, str]:
    """B_joint and B_kept of one move for all.

    Where the shift is its quadratic form, from limit states; on a real model ``B_failed - log2 P[kept | failed]``,
    counted on draws given failure with the true mean shift.
    """
    behaviour = judged.behaviour
    assert behaviour is not None
    n = behaviour.n_verify
    prior = baseline.prior
    if behaviour.exact:
        joint, kept = universal_joint_event(judged, baseline, epsilon)
        ends = (np.array([x]) for x in (bits.value, bits.low, bits.high))
        found = BitsBatch.build(next(ends), next(ends), next(ends), bits.kind, bits.method)
        options: dict[str, Any] = {"max_bits": max_bits, "n_particles": 1000, "seed": seed}
        return joint_bits(joint, found, baseline.probe, prior, **options)[0], event_bits(kept, **options)[0], "ok"
    moves = prior.sample(n, np.random.SeedSequence([seed, 0x0C0F]))
    b_kept = _count(judged.mean_shifts(moves) <= epsilon)
    if math.isinf(bits.value):
        return bits, b_kept, "ok"
    if failed.linear is not None:
        draws = failures_of_linear(failed, n, np.random.default_rng(np.random.SeedSequence([seed, 0xFA12])))[0]
    else:
        again = event_bits(failed, max_bits=max_bits, n_particles=max(1000, n), seed=seed, keep_failures=n)
        draws = np.asarray(again.diagnostics["failures"])[0]
        draws = draws[np.isfinite(draws).all(axis=1)]
    share = _count(judged.mean_shifts(np.asarray(prior.move(draws))) <= epsilon)
    if share.kind is Kind.CENSORED or bits.kind is Kind.CENSORED:
        value = min(bits.low + share.value, max_bits)
        return (
            Bits(
                value, value, math.inf, Kind.CENSORED, f"{bits.method} x verified", bits.evaluations + n, bits.gradients
            ),
            b_kept,
            f"none of {len(draws)} breaking draws kept behaviour; at least this many bits",
        )
    return bits + share, b_kept, "ok"


def _count(kept: np.ndarray) -> Bits:
    low, high = proportion_interval(int(kept.sum()), len(kept))
    if not kept.any():
        least = -math.log2(high)
        return Bits(least, least, math.inf, Kind.CENSORED, "monte_carlo", len(kept))
    value = -math.log2(kept.mean())
    return Bits(
        value,
        min(-math.log2(high), value),
        -math.log2(low) if low > 0 else math.inf,
        Kind.ESTIMATE,
        "monte_carlo",
        len(kept),
    )


def _descending(every: BitsBatch, at_tau: int) -> np.ndarray:
    """Bits of ascending levels, never rising: a lower level's event is part of a higher one's.

    The headline's stands. What importance sampling overlooks makes bits too many, so of two that contradict each other
    the fewer are believed, unless they are but a lower limit.
    """
    value = every.value.copy()
    value[:at_tau] = np.maximum(value[:at_tau], value[at_tau])
    value[at_tau + 1 :] = np.minimum(value[at_tau + 1 :], value[at_tau])
    limit = np.array([kind is Kind.CENSORED for kind in every.kind])
    value = np.where(limit, value, np.minimum.accumulate(np.where(limit, math.inf, value)))
    return np.asarray(np.maximum.accumulate(value[::-1])[::-1])


def _replicates(
    prepared: Prepared,
    baseline: Baseline,
    free: np.ndarray,
    levels: np.ndarray,
    at_tau: int,
    extra: float,
    max_bits: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Replicates of B at half advantage, and of the metric along the grid, over items, contexts and negatives.

    Recall falls to a level when the positive that decides it does. So each positive has the bits of its own level
    (``free``, between the levels that were measured on a straight line in distance); the distance that explains them
    grows like its margin and falls like its deviation.
    """
    grid = grid_of(max_bits)
    if baseline.threat.metric == "auroc":
        # the deciding score difference is not resampled: no interval over items, hence no comparison either
        return np.full(len(baseline.margins), math.nan), np.full(
            (len(baseline.margins), len(grid)), baseline.detection.auroc
        )
    weights = prepared.resamples.positives
    tail = baseline.prior.tail
    spread = baseline.deviation[None, :] * baseline.deviation_factor[:, None]
    own = _own_bits(baseline, free, levels, at_tau, max_bits)
    cost = moved_bits(tail, own, baseline.margin, baseline.deviation, baseline.margins, spread, max_bits) + extra
    order = np.argsort(-baseline.margins, axis=1, kind="stable")
    mass = np.cumsum(np.take_along_axis(weights, order, axis=1), axis=1)
    total = np.maximum(mass[:, -1:], 1e-12)
    clean = (weights * (baseline.margins > 0)).sum(axis=1, keepdims=True) / total
    position = np.minimum((mass <= 0.5 * clean * total + 1e-9).sum(axis=1), cost.shape[1] - 1)
    chosen = np.take_along_axis(order, position[:, None], axis=1)
    value = np.clip(np.take_along_axis(cost, chosen, axis=1)[:, 0], 0.0, max_bits)
    # the metric at b bits: share of caught positives whose own bits exceed b (one move along the probe moves them all)
    alive = np.where(baseline.margins > 0, cost, -1.0)
    rows = np.stack([(weights * (alive > b)).sum(axis=1) / total[:, 0] for b in grid], axis=1)
    return value, rows


def _own_bits(baseline: Baseline, free: np.ndarray, levels: np.ndarray, at_tau: int, max_bits: float) -> np.ndarray:
    """``(positives,)`` bits at which each is lost to one move for all; NaN for those missed from the start."""
    if baseline.probe.traits.linear:
        # every level is a positive's own, in closed form
        closed = bits_of_margin(baseline.prior.tail, baseline.margin, baseline.deviation)
        return np.where(baseline.margin > 0, closed, math.nan)
    n = len(baseline.margin)
    rank = np.empty(n)
    rank[np.argsort(-baseline.margin, kind="stable")] = np.arange(n)
    deciding = ranks_of_levels(levels, n)
    distance = margin_of_bits(baseline.prior.tail, np.minimum(free, max_bits))
    between = np.interp(rank, deciding, distance)
    # beyond the last level lies what costs nothing: the first positive that is missed
    last, clean = deciding[-1], float((baseline.margin > 0).sum())
    rest = np.clip((clean - rank) / max(clean - last, 1.0), 0.0, 1.0) * distance[-1]
    own = bits_of_margin(baseline.prior.tail, np.where(rank > last, rest, between), np.ones(n))
    own = np.where(rank == deciding[at_tau], free[at_tau], own)
    return np.where(baseline.margin > 0, own, math.nan)


def _curve(
    levels: np.ndarray, n: int, cost: np.ndarray, clean: float, rows: np.ndarray, max_bits: float, coarse: bool
) -> Curve:
    """Metric at b bits: the lowest attainable value (a multiple of 1/n) that costs at most b.

    Where only some levels were estimated (``coarse``), straight lines between them, within 0.1 of the exact curve
    either way; steps would favour the probe everywhere.
    """
    grid = grid_of(max_bits)
    attained = np.minimum(np.floor(levels * n + 1e-9) / n, clean)
    if coarse and np.isfinite(cost).all():
        reached = np.interp(grid, np.concatenate([[0.0], cost[::-1]]), np.concatenate([[clean], attained[::-1]]))
    else:
        reached = np.array([min([clean, *attained[cost <= b]]) for b in grid])
    low, high = np.quantile(rows, [0.025, 0.975], axis=0)
    censored = max_bits if (cost >= max_bits).any() else math.inf
    return Curve(grid, reached, np.minimum(low, reached), np.maximum(high, reached), reached, reached, censored)


def _other_tails(baseline: Baseline, found: Bits, max_bits: float) -> dict[str, float]:
    """B at half advantage under other tails of the same covariance, at the same distance: exact for half-spaces."""
    if baseline.threat.metric == "auroc":
        return {}
    if math.isinf(found.value):
        return {t.name: max_bits for t in TAILS}
    at = margin_of_bits(baseline.prior.tail, np.asarray(found.value))
    return {t.name: float(np.clip(bits_of_margin(t, at, np.ones(())), 0.0, max_bits)) for t in TAILS}


def _at_scale(baseline: Baseline, tau: float, found: Bits, c: float, max_bits: float) -> float:
    """B at half advantage under a prior c times as large."""
    if baseline.threat.metric == "auroc":
        return math.nan
    i = _deciding(baseline.margin, tau)
    own = baseline.margin[i], baseline.deviation[i]
    moved = moved_bits(baseline.prior.tail, np.asarray(found.value), *own, own[0], own[1] * c, max_bits)
    return float(np.clip(moved, 0.0, max_bits))


def _deciding(margin: np.ndarray, tau: float) -> int:
    """The positive whose fall brings recall down to tau."""
    return int(np.argsort(-margin, kind="stable")[ranks_of_levels(tau, len(margin))])


def _difference(joint: Bits, kept: Bits) -> Bits:
    if joint.kind in (Kind.EXACT, Kind.ESTIMATE) and kept.kind in (Kind.EXACT, Kind.ESTIMATE):
        return joint - kept
    least = max(joint.low - (kept.high if math.isfinite(kept.high) else kept.value), 0.0)
    return Bits(least, least, math.inf, Kind.CENSORED, "joint - kept")
