"""One probe under one threat before anything moves: its threshold, what it catches, and the bootstrap of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from elk_stress.core.flags import FLIPPED_AUROC, Flag, flag
from elk_stress.estimators.limit_state import LimitState
from elk_stress.probing.probe import FittedProbe
from elk_stress.probing.rowwise import known_scores
from elk_stress.probing.wrapping.opaque import runs_in_jax
from elk_stress.thoughts.conformal import (
    auroc,
    check_negatives,
    conformal_threshold,
    proportion_interval,
    weighted_conformal_thresholds,
)
from elk_stress.thoughts.events import linear_weight
from elk_stress.thoughts.prepared import Prepared
from elk_stress.thoughts.result import Detection
from elk_stress.thoughts.survival import bits_of_margin
from elk_stress.threats.priors import EllipticalPrior
from elk_stress.threats.threat import Threat

__all__ = ["Baseline", "baseline_of", "context_scores", "score_gradients", "score_spread"]

# prior draws per negative where the prior is sampled
_DRAWS = 32
# and per item where a probe without a gradient shows only so how far the prior moves its score: sd known to 4%
_SPREAD_DRAWS = 256
# scores that may cost, together; fewer draws for many items
_SPREAD_SCORES = 100_000
# share of different scores below which a probe is called saturated
_DIFFERENT = 0.9
# an AUROC below FLIPPED_AUROC that a probe without information has oftener than this is no sign of a flipped one
_CHANCE = 1e-4


@dataclass(frozen=True)
class Baseline:
    """One probe under one threat before anything moves.

    Attributes:
        margin: ``(positives,)`` score minus threshold at the origin.
        deviation: ``(positives,)`` the prior's standard deviation of the score (linearized if need be; of prior draws
            where the probe has no gradient).
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


def baseline_of(prepared: Prepared, probe: FittedProbe, threat: Threat, fpr: float) -> Baseline:
    """Threshold under the prior, what is caught, and the bootstrap of both.

    Raises:
        ValueError: fewer calibration negatives than the false-positive rate resolves.
    """
    flags = check_negatives(len(prepared.negatives), fpr)
    if threat.prior == "natural" and prepared.has_stand_in:
        flags += (flag("no_contexts", f"{len(prepared.train)} training items under one context"),)
    prior = prepared.prior(threat)
    origins, positives = prepared.test_origins, prepared.positives
    scores = known_scores(probe, origins, "unmoved activations")
    negatives, draws = _negative_scores(prepared, probe, threat, prior)
    shared = draws is None
    threshold = conformal_threshold(negatives, fpr, shared=shared)
    margin = scores[positives] - threshold
    flags += _flipped(scores, prepared.items.labels)
    different = len(np.unique(scores[positives].astype(np.float32))) / len(positives)
    if different < _DIFFERENT and np.ptp(scores) > 0:
        flags += (flag("saturated", f"{different:.0%} of the test positives' scores are different"),)
    gradient = score_gradients(probe, origins[positives]) if probe.traits.differentiable else None
    if gradient is None:
        deviation = score_spread(probe, prior, origins[positives], seed=prepared.seed)
    else:
        deviation = prior.standard_deviation(gradient)
    if gradient is None or gradient.ndim == 1:
        along = known_scores(probe, prepared.test[positives], "unmoved activations")
    else:
        along = np.einsum("icd,id->ic", prepared.test[positives], gradient.astype(np.float32)).astype(float)
    contexts = prepared.resamples.contexts
    n_contexts = contexts.shape[1]
    drawn = contexts if draws is None else np.ones((len(contexts), draws))
    thresholds = weighted_conformal_thresholds(negatives, fpr, prepared.resamples.negatives, drawn, shared=shared)
    # the deviation of a resample's contexts from all of them moves every origin
    astray = contexts / n_contexts - 1 / n_contexts
    shifted = astray @ along.T if n_contexts > 1 else np.zeros((len(contexts), 1))
    if not shared and n_contexts > 1:
        # drawn scores stand around origins that moved too
        thresholds = thresholds + astray @ known_scores(probe, prepared.negatives, "unmoved activations").mean(axis=0)
    margins = margin[None, :] + shifted - (thresholds - threshold)[:, None]
    caught = np.flatnonzero(margin > 0)
    return Baseline(
        probe,
        threat,
        prior,
        _detection(prepared, probe, threat, prior, threshold, fpr, scores, margin),
        margin,
        np.broadcast_to(deviation, margin.shape),
        caught,
        margins,
        _deviation_factor(prepared, threat, prior, probe, gradient),
        flags,
    )


def _flipped(scores: np.ndarray, labels: np.ndarray) -> tuple[Flag, ...]:
    """Whether the sign looks wrong: AUROC below 0.4, which a score without information has once in 10,000 times."""
    from scipy.stats import mannwhitneyu

    area = auroc(scores, labels)
    if (
        area >= FLIPPED_AUROC
        or mannwhitneyu(scores[labels == 1], scores[labels == 0], alternative="less").pvalue > _CHANCE
    ):
        return ()
    return (flag("flipped", f"AUROC {area:.2f}"),)


def _negative_scores(
    prepared: Prepared, probe: FittedProbe, threat: Threat, prior: EllipticalPrior
) -> tuple[np.ndarray, int | None]:
    """Scores of calibration negatives under the prior: real contexts for natural thoughts, else prior draws."""
    if threat.prior == "natural" and prepared.given_prior is None and prepared.negatives.shape[1] > 1:
        return known_scores(probe, prepared.negatives, "unmoved activations"), None
    origins = prepared.negatives.mean(axis=1)
    weight = linear_weight(probe)
    sequence = np.random.SeedSequence([prepared.seed, 0x7123])
    rng = np.random.default_rng(sequence)
    if weight is not None:
        # the projection of a draw, without drawing its other coordinates
        z = rng.standard_normal((len(origins), _DRAWS, 2))
        scale = prior.tail.scale(z[..., 1], np) if prior.tail.extra else 1.0
        spread = float(prior.standard_deviation(weight)) * np.asarray(scale) * z[..., 0]
        return known_scores(probe, origins, "unmoved activations")[:, None] + spread, _DRAWS
    moves = prior.sample(len(origins) * _DRAWS, sequence).reshape(len(origins), _DRAWS, -1)
    return known_scores(probe, (origins[:, None, :] + moves).astype(np.float32), _drawn(prior, moves)), _DRAWS


def _detection(
    prepared: Prepared,
    probe: FittedProbe,
    threat: Threat,
    prior: EllipticalPrior,
    threshold: float,
    fpr: float,
    scores: np.ndarray,
    margin: np.ndarray,
) -> Detection:
    labels, weights = prepared.items.labels, prepared.resamples.test
    negatives = np.flatnonzero(labels == 0)
    if threat.prior == "natural" and prepared.given_prior is None and prepared.test.shape[1] > 1:
        # on contexts that the threshold never saw, where there are any, resampled together with the items
        fresh = prepared.test if prepared.observed is None else prepared.observed
        alarms = (known_scores(probe, fresh[negatives], "unmoved activations") > threshold).astype(float)
        m = alarms.shape[1]
        counts = np.random.default_rng(np.random.SeedSequence([prepared.seed, 0xFA])).multinomial(
            m, np.full(m, 1 / m), size=len(weights)
        )
        shares = ((weights[:, negatives] @ alarms) * counts).sum(axis=1) / m
    elif not probe.traits.differentiable:
        drawn = _prior_scores(probe, prior, prepared.test_origins[negatives], prepared.seed)
        alarms = (drawn > threshold).mean(axis=1)
        shares = weights[:, negatives] @ alarms
    else:
        spread = prior.standard_deviation(score_gradients(probe, prepared.test_origins[negatives]))
        above = threshold - scores[negatives]
        # a score that the prior cannot move raises an alarm or not: strictly above the threshold, as for a catch
        alarms = np.where(spread > 0, 2.0 ** -bits_of_margin(prior.tail, above, spread), (above < 0).astype(float))
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
        fpr_interval=_with_counting(_quantiles(shares), float(alarms.mean()), len(negatives)),
        recall=caught / len(margin),
        recall_interval=proportion_interval(caught, len(margin)),
        auroc=area,
        auroc_interval=tuple(np.clip(_quantiles(areas), 0.0, 1.0).tolist()),
        n_positives=len(margin),
        n_caught=caught,
        n_negatives=len(prepared.negatives),
    )


def _auroc_components(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each positive's share of negatives below it, each negative's share of positives above it (DeLong 1988)."""
    from scipy.stats import rankdata

    positive, negative = scores[labels == 1], scores[labels == 0]
    joint = rankdata(scores)
    above = (joint[labels == 1] - rankdata(positive)) / len(negative)
    below = 1 - (joint[labels == 0] - rankdata(negative)) / len(positive)
    return above, below


def score_gradients(probe: FittedProbe, x: np.ndarray, compiled: dict[str, Any] | None = None) -> np.ndarray:
    """Gradient of the score in activations: ``(d,)`` for a linear probe, else ``(n, d)``.

    Zero for a probe without one: searches that would start from a linearization then start from nothing. How far the
    prior moves such a score says :func:`score_spread`.

    ``compiled``: kept by whoever asks about one probe again and again, so that it is compiled once.
    """
    weight = linear_weight(probe)
    if weight is not None:
        return weight
    if not probe.traits.differentiable:
        return np.zeros(x.shape)
    state = LimitState(
        function=lambda data, v: probe.score(data["x"][:, None, :] + v),
        _compiled={} if compiled is None else compiled,
        dim=x.shape[1],
        n_problems=len(x),
        backend="jax",
        dtype="float32",
        data={"x": np.asarray(x, dtype=np.float32)},
        jit=runs_in_jax(probe),
    )
    _, slope = state.value_and_gradient(np.arange(len(x)), np.zeros((len(x), 1, x.shape[1])))
    return np.asarray(slope[:, 0])


def score_spread(probe: FittedProbe, prior: EllipticalPrior, x: np.ndarray, *, seed: int) -> np.ndarray:
    """``(n,)``: the prior's standard deviation of the score at each of ``x (n, d)``, from draws; needs no gradient.

    All items and all probes meet the same draws. 0 where no draw changes the score, as in a tree's leaf.
    """
    return np.asarray(_prior_scores(probe, prior, x, seed).std(axis=1, ddof=1))


def _prior_scores(probe: FittedProbe, prior: EllipticalPrior, x: np.ndarray, seed: int) -> np.ndarray:
    """``(n, draws)`` scores of items ``x (n, d)`` moved by the same prior draws."""
    draws = int(np.clip(_SPREAD_SCORES // max(len(x), 1), _DRAWS, _SPREAD_DRAWS))
    moves = prior.sample(draws, np.random.SeedSequence([seed, 0x59EA]))
    return known_scores(probe, (x[:, None, :] + moves).astype(np.float32), _drawn(prior, moves))


def _drawn(prior: EllipticalPrior, moves: np.ndarray) -> str:
    length = float(np.median(np.linalg.norm(moves, axis=-1)))
    return f"activations moved by draws of the prior {prior.name!r} (of median length {length:.3g})"


def _deviation_factor(
    prepared: Prepared, threat: Threat, prior: EllipticalPrior, probe: FittedProbe, gradient: np.ndarray | None
) -> np.ndarray:
    """Drawn over original standard deviation of the score under the prior: what is not known about it.

    A sample variance over c contexts stands on ``c - 1`` degrees of freedom, and how far a covariance is shrunk is a
    choice. Each replicate draws both: no shrinkage, the estimated intensity or twice it; and for the between-context
    part ``(c-1) s' W^-1 s / s's``, s the scores' context means and W a Wishart matrix that all probes of a prepared
    testbed share. Each probe's factor is then ``(c-1) / chi2_{c-1}``, and two probes' factors are as alike as their
    scores.

    Without a gradient the scores themselves are resampled, and shrinkage, of which they know nothing, is not varied.
    """
    replicates, c = prepared.resamples.contexts.shape
    # a testbed that says how several reads move still has the covariance of one read estimated
    one_read = getattr(prepared.testbed, "as_one_read", None)
    given = prepared.given_prior is not None and (one_read is None or gradient is None)
    if threat.prior != "natural" or given or c < 3:
        return np.ones(replicates)
    # from the prepared testbed's seed: every probe meets the same choices, so that comparisons stay paired
    rng = np.random.default_rng(np.random.SeedSequence([prepared.seed, 0xDF]))
    choice = rng.choice([0.0, 1.0, 2.0], replicates)
    draws = rng.standard_normal((replicates, c, 2 * c - 2))
    wishart = draws @ draws.transpose(0, 2, 1)

    def turned(means: np.ndarray) -> np.ndarray:
        """What a variance of these context means is multiplied with."""
        solved = np.linalg.solve(wishart, np.broadcast_to(means[:, None], (replicates, c, 1)))[..., 0] @ means
        return np.asarray((c - 1) * solved / float(means @ means)) if means.any() else np.ones(replicates)

    n = len(prepared.plain_train)
    if gradient is None:
        means, own = context_scores(prepared, probe)
        common, own = float(means @ means) / (c - 1), own * (1 - 1 / n) * (threat.scope == "item")
        whole = common + own
        return np.asarray(np.sqrt((common * turned(means) + own) / whole)) if whole > 0 else np.ones(replicates)
    weight = gradient if gradient.ndim == 1 else gradient.mean(axis=0)
    if one_read is None:
        means, own = context_scores(prepared, weight)
    else:
        rows, weight, prior = one_read(weight)
        means, own = _parts(rows @ weight)
    variance = float(prior.standard_deviation(weight)) ** 2
    if variance == 0:
        return np.ones(replicates)
    common = float(means @ means) / (c - 1)
    spread = turned(means)
    size = float(weight @ weight)

    def part(notes: Any, sample: float, factor: np.ndarray | float) -> np.ndarray:
        intensity = np.minimum(choice * notes["oas_intensity"], 1.0)
        return np.asarray((1 - intensity) * sample * factor + intensity * notes["variance"] * size)

    drawn = part(prior.notes["between"], common, spread)
    if threat.scope == "item" and n > 1:
        drawn = drawn + (1 - 1 / n) * part(prior.notes["interaction"], own, 1.0)
    return np.asarray(np.sqrt(np.maximum(drawn / variance, 1e-4)))


def context_scores(prepared: Prepared, weight: np.ndarray | FittedProbe) -> tuple[np.ndarray, float]:
    """Centred context means of the score, ``(contexts,)``, and the sample variance of what is particular to an item.

    ``weight``: a linear score, or a probe, which scores the training items itself.
    """
    thoughts = prepared.train[prepared.plain_train]
    found = weight.score(thoughts) if isinstance(weight, FittedProbe) else thoughts @ weight.astype(np.float32)
    return _parts(np.asarray(found, dtype=float))


def _parts(scores: np.ndarray) -> tuple[np.ndarray, float]:
    """The same of scores ``(items, contexts)``."""
    rows = scores - scores.mean(axis=1, keepdims=True)
    means = rows.mean(axis=0)
    n, c = rows.shape
    own = float(((rows - means) ** 2).sum()) / (max(n - 1, 1) * (c - 1))
    return means - means.mean(), own


def _with_counting(interval: tuple[float, float], share: float, n: int) -> tuple[float, float]:
    """The interval widened to that of counting n items: a bootstrap of "none of n" has no width."""
    low, high = proportion_interval(share * n, n)
    return min(interval[0], low), max(interval[1], high)


def _quantiles(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
