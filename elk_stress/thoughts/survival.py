r"""Survival curves: how many catches are left when b bits are spent on each.

For caught positives with bits ``B_i``, ``S(b) = share of B_i > b`` and ``recall(b) = recall * S(b)`` over all
positives; the half-life is the smallest b with ``S(b) <= 1/2``. Intervals come from one bootstrap over entities,
contexts and calibration negatives together: every replicate moves the threshold, the origins and the prior's scale,
and with them every ``B_i``. For a linear probe the replicate is exact in closed form; for others the distance that
explains the measured bits grows like the margin and falls like the deviation (:func:`moved_bits`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from elk_stress.core.bits import Bits, BitsBatch, Kind
from elk_stress.core.flags import Flag, flag
from elk_stress.thoughts.result import Curve
from elk_stress.threats.tails import Tail

__all__ = [
    "ItemReplicates",
    "Resamples",
    "bits_of_margin",
    "curve_from_items",
    "excess_bits",
    "explaining_distance",
    "grid_of",
    "half_life",
    "margin_of_bits",
    "moved_bits",
    "replicate_bits",
    "weighted_half_life",
    "wide_interval",
]


@dataclass(frozen=True)
class Resamples:
    """Multiplicities of one bootstrap, shared by every probe and threat so that comparisons are paired.

    Attributes:
        positives: ``(replicates, n)`` of test positives, by entity.
        negatives: ``(replicates, n)`` of calibration negatives, by entity.
        contexts: ``(replicates, C)`` of prior contexts.
        test: ``(replicates, n)`` of all test items, by entity.
    """

    positives: np.ndarray
    negatives: np.ndarray
    contexts: np.ndarray
    test: np.ndarray

    @classmethod
    def draw(
        cls,
        test_groups: np.ndarray,
        test_labels: np.ndarray,
        negative_groups: np.ndarray,
        n_contexts: int,
        *,
        replicates: int,
        seed: int,
    ) -> Resamples:
        """Draw all resamples. Entities are drawn with replacement; their items come along."""
        rng = np.random.default_rng(np.random.SeedSequence([seed, 0x5EED]))
        test = _group_counts(test_groups, replicates, rng)
        return cls(
            positives=test[:, test_labels == 1],
            negatives=_group_counts(negative_groups, replicates, rng),
            contexts=_counts(n_contexts, replicates, rng),
            test=test,
        )


def _counts(n: int, replicates: int, rng: np.random.Generator) -> np.ndarray:
    if n == 1:
        return np.ones((replicates, 1))
    return rng.multinomial(n, np.full(n, 1 / n), size=replicates).astype(np.float32)


def _group_counts(groups: np.ndarray, replicates: int, rng: np.random.Generator) -> np.ndarray:
    _, index = np.unique(groups, return_inverse=True)
    return _counts(int(index.max()) + 1, replicates, rng)[:, index]


def half_life(bits: np.ndarray) -> float:
    """Smallest b with at most half of ``bits`` above it: the ``ceil(n/2)``-th smallest; NaN for none."""
    return math.nan if len(bits) == 0 else float(np.sort(bits)[(len(bits) + 1) // 2 - 1])


def bits_of_margin(tail: Tail, margin: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """Closed-form bits of scores that stand ``margin`` above the threshold and vary by ``deviation`` under the prior.

    A score that the prior cannot move (``deviation`` 0) has infinite bits above the threshold and none at or below it.
    """
    margin, deviation = np.broadcast_arrays(np.asarray(margin, dtype=float), np.asarray(deviation, dtype=float))
    moves = deviation > 0
    bits = tail.bits(np.where(moves, margin / np.where(moves, deviation, 1.0), 0.0))
    return np.where(moves, bits, np.where(margin > 0, math.inf, 0.0))


def margin_of_bits(tail: Tail, bits: np.ndarray) -> np.ndarray:
    """The inverse of :func:`bits_of_margin` at deviation 1: how many standard deviations away a half-space of so many
    bits lies; infinite for infinite bits, NaN for NaN."""
    bits = np.asarray(bits, dtype=float)
    low, high = np.full(bits.shape, -40.0), np.full(bits.shape, 40.0)
    for _ in range(90):
        middle = 0.5 * (low + high)
        # heavy tails reach many bits only at astronomical distances
        beyond = tail.bits(np.sinh(middle)) > bits
        low, high = np.where(beyond, low, middle), np.where(beyond, middle, high)
    return np.where(np.isnan(bits), np.nan, np.where(np.isposinf(bits), math.inf, np.sinh(high)))


def wide_interval(headline: Bits) -> tuple[Flag, ...]:
    """A flag where the interval of an estimate is wider than the estimate, or has no upper end."""
    wide = headline.kind is Kind.ESTIMATE and headline.high - headline.low > headline.value > 0
    told = f"[{headline.low:.1f}, {headline.high:.1f}] around {headline.value:.1f}"
    return (flag("wide_interval", told),) if wide and math.isfinite(headline.value) else ()


def explaining_distance(
    tail: Tail, value: np.ndarray, margin: np.ndarray, deviation: np.ndarray, max_bits: float
) -> np.ndarray:
    """How many standard deviations away failure is, by the measured bits ``value``; infinite for infinite bits.

    Without a measured value (NaN), or where it is censored at ``max_bits`` below the linearization's, the latter
    stands: ``margin / deviation``.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        closed = margin / deviation
    at = margin_of_bits(tail, np.minimum(value, max_bits))
    at = np.where(np.isnan(at) | ((value >= max_bits) & (closed > at)), closed, at)
    return np.where(np.isposinf(value), math.inf, at)


def moved_bits(
    tail: Tail,
    value: np.ndarray,
    margin: np.ndarray,
    deviation: np.ndarray,
    new_margin: np.ndarray,
    new_deviation: np.ndarray,
    max_bits: float,
) -> np.ndarray:
    """Bits at another margin and deviation of the score, from ``value`` bits measured at ``margin`` and ``deviation``.

    The distance to failure that explains the measured bits, in standard deviations, grows like the margin and falls
    like the deviation: exact for a half-space, and for the scale of the prior under any monotone map of its score. The
    linearization at the origin would be exact for neither: where a score saturates its gradient there says nothing.
    """
    at = explaining_distance(tail, value, margin, deviation, max_bits)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = new_margin / margin * (deviation / new_deviation)
        # nothing is known of an item that fails at its origin but the linearization
        distance = np.where(np.isfinite(ratio) & (margin > 0), at * ratio, new_margin / new_deviation)
        out = bits_of_margin(tail, np.where(np.isfinite(distance), distance, 0.0), np.ones_like(distance))
    return np.where(np.isfinite(distance), out, np.where(np.isnan(distance) | (distance < 0), 0.0, math.inf))


def excess_bits(value: np.ndarray, free: np.ndarray, max_bits: float) -> np.ndarray:
    """What a constraint adds to the bits without it: infinite where they are, 0 where unknown (NaN).

    An estimate censored at ``max_bits`` says nothing against a larger one without the constraint.
    """
    known = np.isfinite(value) & np.isfinite(free)
    excess = np.where(known, value, 0.0) - np.where(known, free, 0.0)
    excess = np.where(value >= max_bits, np.maximum(excess, 0.0), excess)
    return np.where(known, excess, np.where(np.isposinf(value), math.inf, 0.0))


def weighted_half_life(bits: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Half-lives of weighted rows: ``(replicates, n)`` each -> ``(replicates,)``; NaN where all weights are 0."""
    order = np.argsort(bits, axis=1, kind="stable")
    mass = np.cumsum(np.take_along_axis(weights, order, axis=1), axis=1)
    total = mass[:, -1:]
    position = np.minimum((mass < total / 2 - 1e-9).sum(axis=1), bits.shape[1] - 1)
    out = np.take_along_axis(bits, np.take_along_axis(order, position[:, None], axis=1), axis=1)[:, 0]
    return np.where(total[:, 0] > 0, out, math.nan)


@dataclass(frozen=True)
class ItemReplicates:
    """Bootstrap replicates over all test positives.

    Attributes:
        bits: ``(replicates, n)``, 0 where not caught.
        caught: ``(replicates, n)``.
        weights: ``(replicates, n)`` multiplicities.
    """

    bits: np.ndarray
    caught: np.ndarray
    weights: np.ndarray


def replicate_bits(
    *,
    tail: Tail,
    low: np.ndarray,
    high: np.ndarray,
    value: np.ndarray,
    margin: np.ndarray,
    deviation: np.ndarray,
    margins: np.ndarray,
    deviation_factor: np.ndarray,
    weights: np.ndarray,
    max_bits: float,
    seed: int,
    free: np.ndarray | None = None,
) -> ItemReplicates:
    """Replicates of every item's bits from replicates of its margin and of the prior's scale (:func:`moved_bits`).

    Args:
        tail: of the prior along the probe.
        low, high, value: ``(n,)`` bits of all positives; NaN where the item is not caught.
        margin, deviation: ``(n,)`` score minus threshold at the origin; the prior's standard deviation of the score.
        margins: ``(replicates, n)`` resampled margins.
        deviation_factor: ``(replicates,)`` resampled standard deviation over the original.
        weights: ``(replicates, n)``.
        max_bits: common censoring.
        seed: of the estimator's own noise.
        free: ``(n,)`` bits without the constraint on behaviour, where ``value`` has it: what keeping behaviour adds
            stays as it is at another margin.
    """
    spread = deviation[None, :] * deviation_factor[:, None]
    with np.errstate(invalid="ignore"):
        noise = np.where(np.isfinite(high - low), (high - low) / (2 * 1.96), 0.0)
    rng = np.random.default_rng(np.random.SeedSequence([seed, 0xB17]))
    with np.errstate(invalid="ignore"):
        alone = value if free is None else free
        drawn = moved_bits(tail, alone, margin, deviation, margins, spread, max_bits)
        if free is not None:
            drawn = drawn + excess_bits(value, free, max_bits)
        out = drawn + (noise * rng.standard_normal(drawn.shape) if noise.any() else 0.0)
    caught = margins > 0
    out = np.where(caught, np.clip(np.nan_to_num(out, nan=0.0, posinf=max_bits), 0.0, max_bits), 0.0)
    return ItemReplicates(out, caught, weights)


def grid_of(max_bits: float, n: int = 81) -> np.ndarray:
    """The common grid of bits, finer near 0 where brittle probes die."""
    return np.asarray(max_bits * np.linspace(0.0, 1.0, n) ** 1.5)


def curve_from_items(
    bits: BitsBatch, n_positives: int, replicates: ItemReplicates, grid: np.ndarray, max_bits: float
) -> tuple[Curve, Curve, Bits, np.ndarray]:
    """recall(b), S(b), the half-life with its interval, and replicates ``(replicates, 2)`` of (half-life, bits kept).

    *Bits kept* is ``mean over positives of min(B_i, max_bits)`` (0 for those not caught): the area under recall(b).
    Items whose search failed earlier enter with their interval: ``worst`` takes low ends, ``best`` high ends.
    """
    n_caught = len(bits)
    worst = np.minimum(
        [b.low if b.kind is Kind.CENSORED or math.isinf(b.high) or _disputed(b) else b.value for b in bits], max_bits
    )
    best = np.minimum([max_bits if b.kind is Kind.CENSORED else _upper(b) for b in bits], max_bits)
    value = np.minimum(
        [max_bits if b.kind is Kind.CENSORED and b.value >= max_bits else b.value for b in bits], max_bits
    )
    weights, caught = replicates.weights, replicates.caught
    total = weights.sum(axis=1)
    n_all, n_kept = np.maximum(total, 1e-12), np.maximum((weights * caught).sum(axis=1), 1e-12)
    recall_rows, survival_rows = np.empty((len(total), len(grid))), np.empty((len(total), len(grid)))
    for j, b in enumerate(grid):
        alive = (weights * (caught & ((replicates.bits > b) | (replicates.bits >= max_bits)))).sum(axis=1)
        recall_rows[:, j], survival_rows[:, j] = alive / n_all, alive / n_kept

    def share(items: np.ndarray, of: int) -> np.ndarray:
        # an item censored at max_bits is still alive there: "at least b bits" survives every b on the grid
        alive = (items[:, None] > grid[None, :]) | (items[:, None] >= max_bits)
        return np.asarray(alive.sum(axis=0) / max(of, 1))

    censored_from = max_bits if (value >= max_bits).any() or (best >= max_bits).any() else math.inf

    def curve(rows: np.ndarray, of: int) -> Curve:
        low, high = np.quantile(rows, [0.025, 0.975], axis=0)
        middle = share(np.asarray(value), of)
        return Curve(
            grid,
            middle,
            np.minimum(low, middle),
            np.maximum(high, middle),
            share(np.asarray(worst), of),
            share(np.asarray(best), of),
            censored_from,
        )

    lives = weighted_half_life(replicates.bits, weights * caught)
    kept = (weights * replicates.bits).sum(axis=1) / n_all
    headline = _headline(np.asarray(value), np.asarray(worst), np.asarray(best), lives, max_bits, bits, n_caught)
    return curve(recall_rows, n_positives), curve(survival_rows, n_caught), headline, np.stack([lives, kept], axis=1)


def _disputed(bits: Bits) -> bool:
    """Whether the interval is no sampling error but what estimators that disagree hold possible."""
    return any(f.name == "runs_disagree" for f in bits.flags)


def _upper(bits: Bits) -> float:
    return bits.high if math.isinf(bits.high) or _disputed(bits) else bits.value


def _headline(
    value: np.ndarray,
    worst: np.ndarray,
    best: np.ndarray,
    lives: np.ndarray,
    max_bits: float,
    bits: BitsBatch,
    n_caught: int,
) -> Bits:
    finite = lives[~np.isnan(lives)]
    if n_caught == 0:
        return Bits(0.0, 0.0, 0.0, Kind.EXACT, "half_life", status="the probe catches nothing at its threshold")
    low, high = np.quantile(finite, [0.025, 0.975]) if len(finite) else (half_life(worst), half_life(best))
    spent = int(np.median(bits.evaluations)), int(np.median(bits.gradients))
    life, surest = half_life(value), half_life(worst)
    if half_life(best) >= max_bits:
        # half of the catches may outlive max_bits: only a lower end is known
        impossible = np.array([k is Kind.EXACT for k in bits.kind]) & np.isposinf(bits.value)
        if impossible.mean() > 0.5:
            return Bits(math.inf, float(min(low, max_bits)), math.inf, Kind.EXACT, "half_life", *spent)
        least = min(surest, max_bits)
        return Bits(least, float(min(low, least)), math.inf, Kind.CENSORED, "half_life", *spent)
    low = min(float(low), surest, life)
    high = max(float(high), half_life(best), life)
    # a replicate at the censoring limit says only "at least": the interval is then open above
    high = math.inf if high >= max_bits else high
    return Bits(life, low, high, Kind.ESTIMATE, "half_life", *spent)
