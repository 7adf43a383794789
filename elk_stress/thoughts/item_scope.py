"""Per-item scope: each item gets its own move. Bits of every caught positive, survival curve, half-life."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from elk_stress.core.bits import Bits, BitsBatch, Kind
from elk_stress.core.flags import Flag, flag
from elk_stress.estimators.importance import Importance
from elk_stress.estimators.limit_state import LimitState, both
from elk_stress.thoughts.baseline import Baseline, score_gradients, score_spread
from elk_stress.thoughts.behaviour import joint_of_failed, kept_bits, searched_joint
from elk_stress.thoughts.certificate import certified_bits, is_certifiable
from elk_stress.thoughts.conformal import (
    conformal_threshold,
)
from elk_stress.thoughts.event_bits import CLOSED_ELEMENTS, event_bits, joint_bits
from elk_stress.thoughts.events import (
    failures_of_linear,
    item_event,
    kept_event,
    nearest_kept,
    nearest_of_linear,
)
from elk_stress.thoughts.prepared import Prepared
from elk_stress.thoughts.result import ItemBits, ThreatResult
from elk_stress.thoughts.survival import (
    bits_of_margin,
    curve_from_items,
    explaining_distance,
    grid_of,
    half_life,
    moved_bits,
    replicate_bits,
    wide_interval,
)
from elk_stress.threats.priors import EllipticalPrior, Gaussian, Logistic, StudentT

__all__ = ["SCALES", "TAILS", "stress_items"]

SCALES = (0.5, 0.71, 1.0, 1.41, 2.0)
EPSILONS = (1.0, 10.0)
# under which every free headline is shown, whichever fits best
TAILS = (Gaussian(), Logistic(), StudentT(5.0))


def stress_items(
    prepared: Prepared, baseline: Baseline, *, max_bits: float, n_particles: int, seed: int
) -> ThreatResult:
    """The headline half-life of one probe under one per-item threat, with curves and sensitivities."""
    threat, probe, prior = baseline.threat, baseline.probe, baseline.prior
    chosen = prepared.positives[baseline.caught]
    epsilon: float | None = None
    b_kept: BitsBatch | None = None
    epsilons: dict[str, float] = {}
    failed = item_event(probe, prior, prepared.test_origins[chosen], baseline.detection.threshold)
    bits = event_bits(failed, max_bits=max_bits, n_particles=n_particles, seed=seed)
    unconstrained = bits
    if threat.kept and len(chosen):
        epsilon = threat.epsilon if threat.epsilon is not None else prepared.epsilon
        bits, b_kept, epsilons = _joint(
            prepared, baseline, chosen, failed, bits, epsilon, max_bits=max_bits, n_particles=n_particles, seed=seed
        )
    elif threat.kept:
        epsilon = threat.epsilon if threat.epsilon is not None else prepared.epsilon

    dropped = threat.kept and threat.epsilon is None and len(chosen) > 0 and not epsilons

    n = len(prepared.positives)
    low, high, value, free = (np.full(n, math.nan) for _ in range(4))
    low[baseline.caught], high[baseline.caught], value[baseline.caught] = bits.low, bits.high, bits.value
    free[baseline.caught] = unconstrained.value
    replicates = replicate_bits(
        tail=prior.tail,
        low=low,
        high=high,
        value=value,
        margin=baseline.margin,
        deviation=baseline.deviation,
        margins=baseline.margins,
        deviation_factor=baseline.deviation_factor,
        weights=prepared.resamples.positives,
        max_bits=max_bits,
        seed=seed,
        free=free if threat.kept else None,
    )
    curve, survival, headline, rows = curve_from_items(bits, n, replicates, grid_of(max_bits), max_bits)
    ids = tuple(prepared.items.ids[i] for i in chosen.tolist())
    distance = np.array([]) if not len(chosen) else _distances(failed, bits)
    given = None
    if b_kept is not None and len(b_kept) and headline.kind in (Kind.EXACT, Kind.ESTIMATE):
        given = _given_kept(bits, b_kept, max_bits)
    return ThreatResult(
        threat=threat,
        quantity="half-life",
        headline=headline,
        detection=baseline.detection,
        curve=curve,
        survival=survival,
        items=ItemBits(ids, bits, None if b_kept is None else b_kept.value, baseline.margin[baseline.caught], distance),
        b_kept=None if b_kept is None or not len(b_kept) else _median_bits(b_kept),
        b_given_kept=given,
        epsilon=epsilon,
        scale={} if threat.kept else {f"{c:g}": _rescaled(baseline, bits, c, max_bits) for c in SCALES},
        tails={} if threat.kept else _other_tails(baseline, bits, max_bits),
        shrink=_shrunk(prepared, baseline, bits, max_bits),
        epsilons=epsilons,
        bare_threshold=_bare(prepared, baseline, bits, max_bits),
        replicates=rows,
        certified=certified_half_life(failed, seed),
        flags=baseline.flags + _item_flags(bits, headline, baseline),
        # of a row of 0 bits with a status the report says that it was not measured
        status=_status(bits, dropped and headline.value > 0),
    )


def certified_half_life(failed: LimitState, seed: int) -> Bits | None:
    """Median of the caught items' certified bits, which hold together at 95%; ``None`` where nothing is certifiable.

    A closed form is its own certificate, and needs no draws. What keeps behaviour is a smaller event.
    """
    if failed.n_problems == 0 or not is_certifiable(failed):
        return None
    if failed.linear is not None:
        every = event_bits(failed, max_bits=math.inf, n_particles=10, seed=seed)
    else:
        every = certified_bits(failed, seed, confidence=1 - 0.05 / failed.n_problems)
    value = half_life(every.low)
    return Bits(value, value, math.inf, Kind.LOWER_BOUND, "certificate", int(np.sum(every.evaluations)))


def _joint(
    prepared: Prepared,
    baseline: Baseline,
    chosen: np.ndarray,
    failed: LimitState,
    bits: BitsBatch,
    epsilon: float,
    *,
    max_bits: float,
    n_particles: int,
    seed: int,
) -> tuple[BitsBatch, BitsBatch, dict[str, float]]:
    """B_joint and B_kept of the caught items, and the half-life at other epsilons."""
    behaviour = prepared.behaviour
    assert behaviour is not None
    prior, probe = baseline.prior, baseline.probe
    # the quick look at other epsilons is importance sampling at a corner, which nothing knows without a gradient
    looks = baseline.threat.epsilon is None and (probe.traits.differentiable or not behaviour.exact)
    others = {f"{m:g}": m * epsilon / prepared.epsilon_factor for m in EPSILONS} if looks else {}

    def event(eps: float) -> LimitState:
        # one compiled function serves every epsilon: it is data
        corner = nearest_kept(prior, slope, baseline.margin[baseline.caught], behaviour.factors(chosen), eps)
        data = {**(joint_event.data or {}), "epsilon": np.full(len(chosen), eps, dtype=np.float32)}
        return replace(joint_event, data=data, starts=corner)

    def quick(eps: float) -> float:
        """Half-life at another epsilon by importance sampling at the corner alone."""
        at = event(eps)
        assert at.starts is not None
        found = Importance(n_particles=8 * n_particles)(at, seed=seed, centres=at.starts)
        censored = np.array([k is Kind.CENSORED for k in found.kind])
        return half_life(np.minimum(np.where(censored, max_bits, found.value), max_bits))

    def kept_alone() -> LimitState:
        return kept_event(prior, behaviour.factors(chosen), epsilon)

    # the corner where failed and kept meet is known for a linear probe, and near it for the linearization of another
    slope = score_gradients(probe, prepared.test_origins[chosen])
    failing = item_event(probe, prior, prepared.test_origins[chosen], baseline.detection.threshold, closed=False)
    if behaviour.exact:
        joint_event = both(failing, kept_alone())
        joint = joint_bits(event(epsilon), bits, probe, prior, max_bits=max_bits, n_particles=n_particles, seed=seed)
        kept = event_bits(kept_alone(), max_bits=max_bits, n_particles=n_particles, seed=seed, check_fraction=0.0)
        # fewer than half of the breaking moves keep behaviour, as most moves do
        broken = (joint.value > bits.value + 1) & (kept.value < 1)
        found_out = (flag("behaviour_broken", "most moves that break it also break behaviour"),)
        raised = tuple(row + found_out if b else row for row, b in zip(joint.flags, broken, strict=True))
        return replace(joint, flags=raised), kept, {name: quick(eps) for name, eps in others.items()}

    kept = kept_bits(
        behaviour.prior_shifts(prior, chosen, (*prepared.key(baseline.threat), 1.0)),
        epsilon,
    )
    breakable = np.isfinite(bits.value)
    shifts = np.full((len(chosen), behaviour.n_verify), math.inf)
    if breakable.any():
        draws = _draws_given_failure(failed, bits, breakable, behaviour.n_verify, n_particles, max_bits, seed)
        found = np.isfinite(draws).all(axis=-1)
        measured = behaviour.shift(chosen[breakable], np.asarray(prior.move(np.where(found[..., None], draws, 0.0))))
        # a draw that was not found is no evidence that behaviour can be kept
        shifts[breakable] = np.where(found, measured, math.inf)
    joint = joint_of_failed(bits, shifts, epsilon, max_bits)
    sensitivity = {
        name: half_life(np.minimum(joint_of_failed(bits, shifts, eps, max_bits).value, max_bits))
        for name, eps in others.items()
    }
    if np.isposinf(joint.high[breakable]).any():
        joint_event = both(failing, kept_alone())
        joint = searched_joint(
            joint, chosen, prior, failed, event(epsilon), behaviour, epsilon, max_bits=max_bits, seed=seed
        )
    return joint, kept, sensitivity


def _draws_given_failure(
    failed: LimitState,
    bits: BitsBatch,
    breakable: np.ndarray,
    n: int,
    n_particles: int,
    max_bits: float,
    seed: int,
) -> np.ndarray:
    state = failed.select(np.flatnonzero(breakable))
    if state.linear is not None:
        return failures_of_linear(state, n, np.random.default_rng(np.random.SeedSequence([seed, 0xFA11])))
    again = event_bits(state, max_bits=max_bits, n_particles=n_particles, seed=seed, keep_failures=n)
    draws: np.ndarray = np.asarray(again.diagnostics["failures"])
    return draws


def _rescaled(baseline: Baseline, bits: BitsBatch, c: float, max_bits: float) -> float:
    """Half-life under a prior c times as large: each item's distance to failure shrinks by it."""
    margin, deviation = baseline.margin[baseline.caught], baseline.deviation[baseline.caught]
    return half_life(_at(baseline, bits, margin, deviation * c, max_bits)) if len(margin) else 0.0


def _at(baseline: Baseline, bits: BitsBatch, margin: np.ndarray, deviation: np.ndarray, max_bits: float) -> np.ndarray:
    old = baseline.margin[baseline.caught], baseline.deviation[baseline.caught]
    new = moved_bits(baseline.prior.tail, bits.value, *old, margin, deviation, max_bits)
    return np.where(margin > 0, np.clip(new, 0.0, max_bits), 0.0)


def _other_tails(baseline: Baseline, bits: BitsBatch, max_bits: float) -> dict[str, float]:
    """Half-life under other tails of the same covariance: exact for half-spaces, at the distance that each item has."""
    if not len(baseline.caught):
        return {}
    margin, deviation = baseline.margin[baseline.caught], baseline.deviation[baseline.caught]
    at = explaining_distance(baseline.prior.tail, bits.value, margin, deviation, max_bits)
    ones = np.ones_like(at)
    found = {tail.name: bits_of_margin(tail, np.minimum(at, 1e15), ones) for tail in TAILS}
    return {name: half_life(np.clip(np.where(np.isinf(at), max_bits, b), 0.0, max_bits)) for name, b in found.items()}


def _shrunk(prepared: Prepared, baseline: Baseline, bits: BitsBatch, max_bits: float) -> dict[str, float]:
    threat = baseline.threat
    if threat.kept or threat.prior != "natural" or prepared.given_prior is not None or not len(baseline.caught):
        return {}
    origins, smooth = prepared.test_origins[prepared.positives], baseline.probe.traits.differentiable
    gradient = score_gradients(baseline.probe, origins)
    out = {}
    for factor in (0.5, 1.0, 2.0):
        prior = prepared.prior(threat, shrink=factor)
        found = prior.standard_deviation(gradient) if smooth else _spread(prepared, baseline, prior)
        deviation = np.broadcast_to(found, baseline.margin.shape)
        out[f"{factor:g}"] = half_life(
            _at(baseline, bits, baseline.margin[baseline.caught], deviation[baseline.caught], max_bits)
        )
    return out


def _spread(prepared: Prepared, baseline: Baseline, prior: EllipticalPrior) -> np.ndarray:
    return score_spread(baseline.probe, prior, prepared.test_origins[prepared.positives], seed=prepared.seed)


def _bare(prepared: Prepared, baseline: Baseline, bits: BitsBatch, max_bits: float) -> float | None:
    """Half-life when the threshold is set at the bare items (uncalibrated): a secondary figure."""
    if prepared.bare_calibration is None or baseline.threat.kept or baseline.threat.prior != "natural":
        return None
    labels = prepared.testbed.splits["calibration"].labels
    bare = conformal_threshold(
        np.asarray(baseline.probe.score(prepared.bare_calibration[labels == 0]), dtype=float), baseline.detection.fpr
    )
    margin = baseline.margin + baseline.detection.threshold - bare
    measured = np.full(len(margin), math.nan)
    measured[baseline.caught] = bits.value
    found = moved_bits(
        baseline.prior.tail, measured, baseline.margin, baseline.deviation, margin, baseline.deviation, max_bits
    )
    found = found[margin > 0]
    return half_life(np.clip(found, 0.0, max_bits)) if len(found) else 0.0


def _distances(failed: LimitState, bits: BitsBatch) -> np.ndarray:
    if failed.linear is not None:
        if not failed.linear.weight[:1].any():
            return np.full(len(bits), math.inf)
        step = max(1, CLOSED_ELEMENTS // failed.dim)
        parts = [np.arange(i, min(i + step, len(bits))) for i in range(0, len(bits), step)]
        return np.concatenate([np.linalg.norm(nearest_of_linear(failed.select(part)), axis=1) for part in parts])
    found = bits.diagnostics.get("beta")
    return np.full(len(bits), math.nan) if found is None else np.asarray(found, dtype=float)


def _median_bits(batch: BitsBatch) -> Bits:
    i = int(np.argsort(batch.value, kind="stable")[(len(batch) - 1) // 2])
    found: Bits = batch[i]
    return replace(found, flags=())


def _given_kept(joint: BitsBatch, kept: BitsBatch, max_bits: float) -> Bits:
    differences = np.minimum(joint.value, max_bits) - kept.value
    i = int(np.argsort(differences, kind="stable")[(len(differences) - 1) // 2])
    if joint.kind[i] is Kind.CENSORED or kept.kind[i] is Kind.CENSORED:
        low = max(float(joint.low[i] - min(kept.high[i], max_bits)), 0.0)
        return Bits(low, low, math.inf, Kind.CENSORED, "joint - kept")
    found: Bits = joint[i] - kept[i]
    return replace(found, flags=())


def _item_flags(bits: BitsBatch, headline: Bits, baseline: Baseline) -> tuple[Flag, ...]:
    flags: list[Flag] = []
    if not len(bits):
        # of a probe whose sign is wrong that says enough
        return () if any(f.name == "flipped" for f in baseline.flags) else (flag("catches_nothing"),)
    names = sorted({f.name for row in bits.flags for f in row})
    for name in names:
        count = sum(any(f.name == name for f in row) for row in bits.flags)
        # a flag on one item in hundreds is in the per-item record; on many it is the result's own
        if count >= max(1, math.ceil(0.1 * len(bits))) and (name != "behaviour_broken" or count > len(bits) / 2):
            flags.append(flag(name, f"{count} of {len(bits)} items"))
    if headline.value < 1 and headline.kind is not Kind.CENSORED:
        flags.append(flag("brittle", f"half-life {headline.value:.2f} bits"))
    return (*flags, *wide_interval(headline))


def _status(bits: BitsBatch, dropped: bool) -> str:
    """What went wrong with some items, and what was left out: half-lives at other epsilons, where ``dropped``."""
    troubled = [s for s in bits.status if not s.startswith("ok") and not s.startswith("no move fails")]
    said = "ok" if not troubled else f"{len(troubled)} of {len(bits)} items: {troubled[0]}"
    if not dropped:
        return said
    return f"{said}; no half-lives at other epsilons: they are sought where a gradient points, and this probe has none"
