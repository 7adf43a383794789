"""Per-item scope: each item gets its own move. Bits of every caught positive, survival curve, half-life."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from elk_stress.behaviour import joint_of_failed, kept_bits, searched_joint
from elk_stress.bits import Bits, BitsBatch, Kind, bits_of_beta
from elk_stress.detection import (
    auroc,
    check_negatives,
    conformal_threshold,
    proportion_interval,
    weighted_conformal_thresholds,
)
from elk_stress.estimators import estimate_batch
from elk_stress.estimators.importance import Importance
from elk_stress.events import (
    failures_of_linear,
    item_event,
    kept_event,
    linear_weight,
    nearest_kept,
    nearest_of_linear,
)
from elk_stress.flags import Flag, flag
from elk_stress.limit_state import LimitState, both
from elk_stress.priors import EllipticalPrior, Gaussian, Logistic, StudentT
from elk_stress.probe import FittedProbe
from elk_stress.result import Detection, ItemBits, ThreatResult
from elk_stress.scene import Scene
from elk_stress.survival import (
    bits_of_margin,
    curve_from_items,
    excess_bits,
    grid_of,
    half_life,
    replicate_bits,
)
from elk_stress.threat import Threat

__all__ = ["Situation", "context_variances", "item_bits", "joint_bits", "score_gradients", "situation", "stress_items"]

SCALES = (0.5, 0.71, 1.0, 1.41, 2.0)
EPSILONS = (1.0, 10.0)
_DRAWS = 32
# coordinates of weights at once where a closed form needs no particles (32 MB)
_CLOSED_ELEMENTS = 1 << 22
# draws per item for "failed and kept": near the corner where the two meet only about one draw in ten is in the event
_CORNER_PARTICLES = 24_000
# elements of particles x coordinates estimated at once: bounds memory (float64: 256 MB)
_ELEMENTS = 1 << 25


@dataclass(frozen=True)
class Situation:
    """One probe under one threat before anything moves.

    Attributes:
        margin: ``(positives,)`` score minus threshold at the origin.
        deviation: ``(positives,)`` the prior's standard deviation of the score (linearized if need be).
        caught: indices into the test positives.
        margins: ``(replicates, positives)`` resampled margins.
        deviation_factor: ``(replicates,)`` resampled standard deviation over the original.
        flags: of the threshold.
    """

    probe: FittedProbe
    threat: Threat
    prior: EllipticalPrior
    detection: Detection
    margin: np.ndarray
    deviation: np.ndarray
    caught: np.ndarray
    margins: np.ndarray
    deviation_factor: np.ndarray
    flags: tuple[Flag, ...]


def situation(scene: Scene, probe: FittedProbe, threat: Threat, fpr: float) -> Situation:
    """Threshold under the prior, what is caught, and the bootstrap of both.

    Raises:
        ValueError: fewer calibration negatives than the false-positive rate resolves.
    """
    flags = check_negatives(len(scene.negatives), fpr)
    prior = scene.prior(threat)
    negatives, draws = _negative_scores(scene, probe, threat, prior)
    shared = draws is None
    threshold = conformal_threshold(negatives, fpr, shared=shared)
    origins, positives = scene.test_origins, scene.positives
    scores = np.asarray(probe.score(origins), dtype=float)
    margin = scores[positives] - threshold
    gradient = score_gradients(probe, origins[positives])
    deviation = prior.standard_deviation(gradient)
    if gradient.ndim == 1:
        along = np.asarray(probe.score(scene.test[positives]), dtype=float)
    else:
        along = np.einsum("icd,id->ic", scene.test[positives], gradient.astype(np.float32)).astype(float)
    contexts = scene.resamples.contexts
    n_contexts = contexts.shape[1]
    drawn = contexts if draws is None else np.ones((len(contexts), draws))
    thresholds = weighted_conformal_thresholds(negatives, fpr, scene.resamples.negatives, drawn, shared=shared)
    # the deviation of a resample's contexts from all of them moves every origin
    astray = contexts / n_contexts - 1 / n_contexts
    shifted = astray @ along.T if n_contexts > 1 else np.zeros((len(contexts), 1))
    if not shared and n_contexts > 1:
        # drawn scores stand around origins that moved too
        thresholds = thresholds + astray @ np.asarray(probe.score(scene.negatives), dtype=float).mean(axis=0)
    margins = margin[None, :] + shifted - (thresholds - threshold)[:, None]
    caught = np.flatnonzero(margin > 0)
    return Situation(
        probe,
        threat,
        prior,
        _detection(scene, probe, threat, prior, threshold, fpr, scores, margin),
        margin,
        np.broadcast_to(deviation, margin.shape),
        caught,
        margins,
        _deviation_factor(scene, threat, prior, gradient),
        flags,
    )


def stress_items(scene: Scene, place: Situation, *, max_bits: float, n_particles: int, seed: int) -> ThreatResult:
    """The headline half-life of one probe under one per-item threat, with curves and sensitivities."""
    threat, probe, prior = place.threat, place.probe, place.prior
    chosen = scene.positives[place.caught]
    epsilon: float | None = None
    b_kept: BitsBatch | None = None
    epsilons: dict[str, float] = {}
    failed = item_event(probe, prior, scene.test_origins[chosen], place.detection.threshold)
    bits = item_bits(failed, max_bits=max_bits, n_particles=n_particles, seed=seed)
    if threat.kept and len(chosen):
        epsilon = threat.epsilon if threat.epsilon is not None else scene.epsilon
        bits, b_kept, epsilons = _joint(
            scene, place, chosen, failed, bits, epsilon, max_bits=max_bits, n_particles=n_particles, seed=seed
        )
    elif threat.kept:
        epsilon = threat.epsilon if threat.epsilon is not None else scene.epsilon

    n = len(scene.positives)
    low, high, value = (np.full(n, math.nan) for _ in range(3))
    low[place.caught], high[place.caught], value[place.caught] = bits.low, bits.high, bits.value
    replicates = replicate_bits(
        tail=prior.tail,
        low=low,
        high=high,
        value=value,
        margin=place.margin,
        deviation=place.deviation,
        margins=place.margins,
        deviation_factor=place.deviation_factor,
        weights=scene.resamples.positives,
        max_bits=max_bits,
        seed=seed,
    )
    curve, survival, headline, rows = curve_from_items(bits, n, replicates, grid_of(max_bits), max_bits)
    ids = tuple(scene.items.ids[i] for i in chosen.tolist())
    distance = np.array([]) if not len(chosen) else _distances(failed, bits)
    given = None
    if b_kept is not None and len(b_kept) and headline.kind in (Kind.EXACT, Kind.ESTIMATE):
        given = _given_kept(bits, b_kept, max_bits)
    return ThreatResult(
        threat=threat,
        quantity="half-life",
        headline=headline,
        detection=place.detection,
        curve=curve,
        survival=survival,
        items=ItemBits(ids, bits, None if b_kept is None else b_kept.value, place.margin[place.caught], distance),
        b_kept=None if b_kept is None or not len(b_kept) else _median_bits(b_kept),
        b_given_kept=given,
        epsilon=epsilon,
        scale={} if threat.kept else {f"{c:g}": _rescaled(place, bits, c, max_bits) for c in SCALES},
        tails={} if threat.kept else _other_tails(place, bits, max_bits),
        shrink=_shrunk(scene, place, bits, max_bits),
        epsilons=epsilons,
        bare_threshold=_bare(scene, place, bits, max_bits),
        replicates=rows,
        flags=place.flags + _item_flags(bits, headline, place),
        status=_status(bits),
    )


def item_bits(
    state: LimitState,
    *,
    max_bits: float,
    n_particles: int,
    seed: int,
    keep_failures: int = 0,
    check_fraction: float | None = None,
) -> BitsBatch:
    """``estimate_batch`` in blocks of problems that bound its memory."""
    step = max(1, _ELEMENTS // (n_particles * state.dim))
    if state.n_problems == 0:
        return BitsBatch.build(np.empty(0), np.empty(0), np.empty(0), (), "auto")
    if state.linear is not None:
        step = max(1, _CLOSED_ELEMENTS // state.dim)
    if state.n_problems <= step:
        return estimate_batch(
            state,
            n_particles=n_particles,
            max_bits=max_bits,
            seed=seed,
            keep_failures=keep_failures,
            check_fraction=check_fraction,
        )
    parts = [
        estimate_batch(
            state.select(np.arange(i, min(i + step, state.n_problems))),
            n_particles=n_particles,
            max_bits=max_bits,
            seed=seed + i,
            keep_failures=keep_failures,
            check_fraction=check_fraction,
        )
        for i in range(0, state.n_problems, step)
    ]
    shared = [name for name in parts[0].diagnostics if all(name in p.diagnostics for p in parts)]
    shapes = {name: {p.diagnostics[name].shape[1:] for p in parts} for name in shared}
    return BitsBatch.build(
        np.concatenate([p.value for p in parts]),
        np.concatenate([p.low for p in parts]),
        np.concatenate([p.high for p in parts]),
        [k for p in parts for k in p.kind],
        parts[0].method,
        evaluations=np.concatenate([p.evaluations for p in parts]),
        gradients=np.concatenate([p.gradients for p in parts]),
        status=[s for p in parts for s in p.status],
        flags=[f for p in parts for f in p.flags],
        diagnostics={
            name: np.concatenate([p.diagnostics[name] for p in parts]) for name in shared if len(shapes[name]) == 1
        },
    )


def _joint(
    scene: Scene,
    place: Situation,
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
    behaviour = scene.behaviour
    assert behaviour is not None
    prior, probe = place.prior, place.probe
    others = {f"{m:g}": m * epsilon / scene.epsilon_factor for m in EPSILONS} if place.threat.epsilon is None else {}

    def event(eps: float) -> LimitState:
        # one compiled function serves every epsilon: it is data
        corner = nearest_kept(prior, slope, place.margin[place.caught], behaviour.factors(chosen), eps)
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
    slope = score_gradients(probe, scene.test_origins[chosen])
    failing = item_event(probe, prior, scene.test_origins[chosen], place.detection.threshold, closed=False)
    if behaviour.exact:
        joint_event = both(failing, kept_alone())
        joint = joint_bits(event(epsilon), bits, probe, prior, max_bits=max_bits, n_particles=n_particles, seed=seed)
        kept = item_bits(kept_alone(), max_bits=max_bits, n_particles=n_particles, seed=seed, check_fraction=0.0)
        return joint, kept, {name: quick(eps) for name, eps in others.items()}

    kept = kept_bits(
        behaviour.prior_shifts(prior, chosen, (*scene.key(place.threat), 1.0)),
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


def joint_bits(
    joint: LimitState,
    failed: BitsBatch,
    probe: FittedProbe,
    prior: EllipticalPrior,
    *,
    max_bits: float,
    n_particles: int,
    seed: int,
) -> BitsBatch:
    """Bits of "failed and kept" where both are limit states (the shift is its quadratic form).

    ``joint.starts`` holds the corner where they meet; for a linear probe a problem without one (NaN) cannot be broken
    within epsilon at all: its bits are infinite, exactly. No problem has fewer bits than failing alone, nor, under a
    linear probe and a Gaussian prior, than the half-space behind that corner.
    """
    assert joint.starts is not None
    n = joint.n_problems
    impossible = np.isnan(joint.starts).any(axis=(1, 2)) & probe.traits.linear
    floor = np.minimum(failed.low, max_bits)
    if probe.traits.linear and not prior.tail.extra:
        # a half-space cut by an ellipsoid is convex, so it lies behind the plane through its nearest point
        distance = 0.99 * np.linalg.norm(np.nan_to_num(joint.starts[:, 0]), axis=1)
        floor = np.minimum(np.maximum(floor, bits_of_beta(distance)), max_bits)
    beyond = ~impossible & (floor >= max_bits)
    value, high = np.where(beyond, max_bits, math.inf), np.full(n, math.inf)
    low = value.copy()
    kinds = [Kind.CENSORED if far else Kind.EXACT for far in beyond]
    status = ["ok" if far else "no move fails within epsilon" for far in beyond]
    flags: list[tuple[Flag, ...]] = [()] * n
    evaluations, gradients = np.zeros(n, dtype=int), np.zeros(n, dtype=int)
    open_ = np.flatnonzero(~impossible & ~beyond)
    if len(open_):
        found = item_bits(
            joint.select(open_),
            max_bits=max_bits,
            n_particles=max(n_particles, _CORNER_PARTICLES),
            seed=seed,
            check_fraction=min(1.0, 2 / len(open_)),
        )
        value[open_] = np.maximum(found.value, floor[open_])
        low[open_], high[open_] = np.maximum(found.low, floor[open_]), np.maximum(found.high, floor[open_])
        evaluations[open_], gradients[open_] = found.evaluations, found.gradients
        for row, i in enumerate(open_.tolist()):
            kinds[i], status[i], flags[i] = found.kind[row], found.status[row], found.flags[row]
    return BitsBatch.build(
        value, low, high, kinds, "auto", evaluations=evaluations, gradients=gradients, status=status, flags=flags
    )


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
    again = item_bits(state, max_bits=max_bits, n_particles=n_particles, seed=seed, keep_failures=n)
    draws: np.ndarray = np.asarray(again.diagnostics["failures"])
    return draws


def _negative_scores(
    scene: Scene, probe: FittedProbe, threat: Threat, prior: EllipticalPrior
) -> tuple[np.ndarray, int | None]:
    """Scores of calibration negatives under the prior: real contexts for natural thoughts, else prior draws."""
    if threat.prior == "natural" and scene.given_prior is None and scene.negatives.shape[1] > 1:
        return np.asarray(probe.score(scene.negatives), dtype=float), None
    origins = scene.negatives.mean(axis=1)
    weight = linear_weight(probe)
    sequence = np.random.SeedSequence([scene.seed, 0x7123])
    rng = np.random.default_rng(sequence)
    if weight is not None:
        # the projection of a draw, without drawing its other coordinates
        z = rng.standard_normal((len(origins), _DRAWS, 2))
        scale = prior.tail.scale(z[..., 1], np) if prior.tail.extra else 1.0
        spread = float(prior.standard_deviation(weight)) * np.asarray(scale) * z[..., 0]
        return np.asarray(probe.score(origins), dtype=float)[:, None] + spread, _DRAWS
    moves = prior.sample(len(origins) * _DRAWS, sequence).reshape(len(origins), _DRAWS, -1)
    return np.asarray(probe.score((origins[:, None, :] + moves).astype(np.float32)), dtype=float), _DRAWS


def _detection(
    scene: Scene,
    probe: FittedProbe,
    threat: Threat,
    prior: EllipticalPrior,
    threshold: float,
    fpr: float,
    scores: np.ndarray,
    margin: np.ndarray,
) -> Detection:
    labels, weights = scene.items.labels, scene.resamples.test
    negatives = np.flatnonzero(labels == 0)
    if threat.prior == "natural" and scene.given_prior is None and scene.test.shape[1] > 1:
        # on contexts that the threshold never saw, where there are any, resampled together with the items
        fresh = scene.test if scene.observed is None else scene.observed
        alarms = (np.asarray(probe.score(fresh[negatives]), dtype=float) > threshold).astype(float)
        m = alarms.shape[1]
        counts = np.random.default_rng(np.random.SeedSequence([scene.seed, 0xFA])).multinomial(
            m, np.full(m, 1 / m), size=len(weights)
        )
        shares = ((weights[:, negatives] @ alarms) * counts).sum(axis=1) / m
    else:
        spread = prior.standard_deviation(score_gradients(probe, scene.test_origins[negatives]))
        alarms = 2.0 ** -bits_of_margin(prior.tail, threshold - scores[negatives], spread)
        shares = weights[:, negatives] @ alarms
    shares = shares / np.maximum(weights[:, negatives].sum(axis=1), 1e-12)
    caught = int((margin > 0).sum())
    area = auroc(scores, labels)
    v_pos, v_neg = _auroc_components(scores, labels)
    positive = weights[:, labels == 1]
    negative = weights[:, labels == 0]
    areas = (
        positive @ v_pos / np.maximum(positive.sum(axis=1), 1e-12)
        + negative @ v_neg / np.maximum(negative.sum(axis=1), 1e-12)
        - area
    )
    return Detection(
        threshold=threshold,
        fpr=fpr,
        fpr_measured=float(alarms.mean()),
        fpr_interval=_quantiles(shares),
        recall=caught / len(margin),
        recall_interval=proportion_interval(caught, len(margin)),
        auroc=area,
        auroc_interval=tuple(np.clip(_quantiles(areas), 0.0, 1.0).tolist()),
        n_positives=len(margin),
        n_caught=caught,
        n_negatives=len(scene.negatives),
    )


def _auroc_components(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each positive's share of negatives below it, each negative's share of positives above it (DeLong 1988)."""
    from scipy.stats import rankdata

    positive, negative = scores[labels == 1], scores[labels == 0]
    joint = rankdata(scores)
    above = (joint[labels == 1] - rankdata(positive)) / len(negative)
    below = 1 - (joint[labels == 0] - rankdata(negative)) / len(positive)
    return above, below


def score_gradients(probe: FittedProbe, x: np.ndarray) -> np.ndarray:
    """Gradient of the score in activations: ``(d,)`` for a linear probe, else ``(n, d)``."""
    weight = linear_weight(probe)
    if weight is not None:
        return weight
    state = LimitState(
        function=lambda data, v: probe.score(data["x"][:, None, :] + v),
        dim=x.shape[1],
        n_problems=len(x),
        backend="jax",
        dtype="float32",
        data={"x": np.asarray(x, dtype=np.float32)},
    )
    _, slope = state.value_and_gradient(np.arange(len(x)), np.zeros((len(x), 1, x.shape[1])))
    return np.asarray(slope[:, 0])


def _deviation_factor(scene: Scene, threat: Threat, prior: EllipticalPrior, gradient: np.ndarray) -> np.ndarray:
    """Drawn over original standard deviation of the score under the prior: what is not known about it.

    A sample variance over c contexts stands on ``c - 1`` degrees of freedom, and how far a covariance is shrunk is a
    choice. Each replicate draws both: the variance along the probe between no shrinkage and twice the estimated
    intensity, its between-context part divided by a chi-square over its degrees of freedom.
    """
    replicates, c = scene.resamples.contexts.shape
    if threat.prior != "natural" or scene.given_prior is not None or c < 3:
        return np.ones(replicates)
    weight = gradient if gradient.ndim == 1 else gradient.mean(axis=0)
    variance = float(prior.standard_deviation(weight)) ** 2
    if variance == 0:
        return np.ones(replicates)
    common, own = context_variances(scene, weight)
    # from the scene's seed: every probe meets the same choices, so that comparisons stay paired
    rng = np.random.default_rng(np.random.SeedSequence([scene.seed, 0xDF]))
    choice = rng.uniform(0.0, 2.0, replicates)
    size = float(weight @ weight)

    def part(notes: Any, sample: float, factor: np.ndarray | float) -> np.ndarray:
        intensity = np.minimum(choice * notes["oas_intensity"], 1.0)
        return np.asarray((1 - intensity) * sample * factor + intensity * notes["variance"] * size)

    drawn = part(prior.notes["between"], common, (c - 1) / rng.chisquare(c - 1, replicates))
    n = len(scene.plain_train)
    if threat.scope == "item" and n > 1:
        drawn = drawn + (1 - 1 / n) * part(prior.notes["interaction"], own, 1.0)
    return np.asarray(np.sqrt(np.maximum(drawn / variance, 1e-4)))


def context_variances(scene: Scene, weight: np.ndarray) -> tuple[float, float]:
    """Sample variances of the score over contexts: of the context means, and of what is particular to an item."""
    rows = np.asarray(scene.train[scene.plain_train] @ weight.astype(np.float32), dtype=float)
    rows = rows - rows.mean(axis=1, keepdims=True)
    means = rows.mean(axis=0)
    n, c = rows.shape
    own = float(((rows - means) ** 2).sum()) / (max(n - 1, 1) * (c - 1))
    return float((means**2).sum()) / (c - 1), own


def _rescaled(place: Situation, bits: BitsBatch, c: float, max_bits: float) -> float:
    """Half-life under a prior c times as large (the probe linearized at each item if it is not linear)."""
    margin, deviation = place.margin[place.caught], place.deviation[place.caught]
    return half_life(_at(place, bits, margin, deviation * c, max_bits)) if len(margin) else 0.0


def _at(place: Situation, bits: BitsBatch, margin: np.ndarray, deviation: np.ndarray, max_bits: float) -> np.ndarray:
    tail, caught = place.prior.tail, place.caught
    base = bits_of_margin(tail, place.margin[caught], place.deviation[caught])
    new = bits_of_margin(tail, margin, deviation) + excess_bits(bits.value, base, max_bits)
    return np.where(margin > 0, np.clip(new, 0.0, max_bits), 0.0)


def _other_tails(place: Situation, bits: BitsBatch, max_bits: float) -> dict[str, float]:
    """Half-life under other tails of the same covariance; closed forms of each item's linearization."""
    if not len(place.caught):
        return {}
    margin, deviation = place.margin[place.caught], place.deviation[place.caught]
    excess = excess_bits(bits.value, bits_of_margin(place.prior.tail, margin, deviation), max_bits)
    return {
        tail.name: half_life(np.clip(bits_of_margin(tail, margin, deviation) + excess, 0.0, max_bits))
        for tail in (Gaussian(), Logistic(), StudentT(5.0))
    }


def _shrunk(scene: Scene, place: Situation, bits: BitsBatch, max_bits: float) -> dict[str, float]:
    threat = place.threat
    if threat.kept or threat.prior != "natural" or scene.given_prior is not None or not len(place.caught):
        return {}
    gradient = score_gradients(place.probe, scene.test_origins[scene.positives])
    out = {}
    for factor in (0.5, 1.0, 2.0):
        deviation = np.broadcast_to(scene.prior(threat, shrink=factor).standard_deviation(gradient), place.margin.shape)
        out[f"{factor:g}"] = half_life(_at(place, bits, place.margin[place.caught], deviation[place.caught], max_bits))
    return out


def _bare(scene: Scene, place: Situation, bits: BitsBatch, max_bits: float) -> float | None:
    """Half-life when the threshold is set at the bare items (uncalibrated): a secondary figure."""
    if scene.bare_calibration is None or place.threat.kept or place.threat.prior != "natural":
        return None
    labels = scene.testbed.splits["calibration"].labels
    bare = conformal_threshold(
        np.asarray(place.probe.score(scene.bare_calibration[labels == 0]), dtype=float), place.detection.fpr
    )
    margin = place.margin + place.detection.threshold - bare
    found = bits_of_margin(place.prior.tail, margin, place.deviation)[margin > 0]
    return half_life(np.clip(found, 0.0, max_bits)) if len(found) else 0.0


def _distances(failed: LimitState, bits: BitsBatch) -> np.ndarray:
    if failed.linear is not None:
        if not failed.linear.weight[:1].any():
            return np.full(len(bits), math.inf)
        step = max(1, _CLOSED_ELEMENTS // failed.dim)
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


def _item_flags(bits: BitsBatch, headline: Bits, place: Situation) -> tuple[Flag, ...]:
    flags: list[Flag] = []
    if not len(bits):
        return (flag("catches_nothing"),)
    names = sorted({f.name for row in bits.flags for f in row})
    for name in names:
        count = sum(any(f.name == name for f in row) for row in bits.flags)
        # a flag on one item in hundreds is in the per-item record; on many it is the result's own
        if count >= max(1, math.ceil(0.1 * len(bits))) and (name != "behaviour_broken" or count > len(bits) / 2):
            flags.append(flag(name, f"{count} of {len(bits)} items"))
    if headline.value < 1:
        flags.append(flag("brittle", f"half-life {headline.value:.2f} bits"))
    if math.isfinite(headline.high) and headline.high - headline.low > headline.value > 0:
        flags.append(flag("wide_interval", f"[{headline.low:.1f}, {headline.high:.1f}] around {headline.value:.1f}"))
    return tuple(flags)


def _status(bits: BitsBatch) -> str:
    troubled = [s for s in bits.status if not s.startswith("ok") and not s.startswith("no move fails")]
    return "ok" if not troubled else f"{len(troubled)} of {len(bits)} items: {troubled[0]}"


def _quantiles(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
