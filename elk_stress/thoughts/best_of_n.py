r"""Best of n real contexts: the curve that the prior predicts beside the one that test items under contexts B show.

A second prediction takes no prior at all: the left tail of per-item chances that contexts A show
(:mod:`elk_stress.thoughts.power_law`), and the power law that follows from it. Only its band draws how contexts sway
all items alike, as if normally: on the linear testbed, where that is true, it covers the true curve at any n in 23 of
23 and in 23 of 24 testbeds of 8 and 16 contexts. A band that resamples items alone covers it in 65-83% there, and one
that resamples the contexts too in hardly more: it holds none that is worse than those that were seen.

The prediction is made from training items and contexts A, the observation from test items and contexts B: it can fail.
With ``x_ib = mu_i + b_b + e_ib`` and an origin that is a mean over C contexts A, the score of item i in a new context
stands ``margin_i + (b' - mean_A b) + (e'_i - mean_A e_i)`` above the threshold. ``mean_A b`` is one number for all
items and all n draws, ``mean_A e_i`` one per item: neither averages out over n. Each replicate draws them,

``m*_i = shrunk margin_i + N(0, v_b f/C) + N(0, keep v_e/C)``, ``f = (C-1)/chi2_{C-1}``, ``keep = 1 - v_e/(C var(m))``,

and predicts ``1 - (1 - p_i)^n`` with ``p_i`` the tail's chance beyond ``m*_i`` at variance ``v_b f + v_e``. The band is
that of these replicates; whether the observation fits is asked of curves simulated from them with as many contexts as
were observed (a predictive check: Box 1980).
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from elk_stress.core.bits import BitsBatch
from elk_stress.core.flags import Flag, flag
from elk_stress.estimators.best_of_n import holds
from elk_stress.thoughts.baseline import Baseline, context_scores, score_gradients, score_spread
from elk_stress.thoughts.power_law import LeftTail, fit_left_tail
from elk_stress.thoughts.prepared import Prepared
from elk_stress.thoughts.result import BestOfNCurves, Curve
from elk_stress.thoughts.survival import bits_of_margin
from elk_stress.threats.threat import Threat

__all__ = ["best_of_n_curves", "prediction_flags"]

# false-alarm rate of the predictive check: a run makes a dozen of them
_ALARM = 0.01
# resamples of entities and contexts for the left tail
_REPLICATES = 200
# bits beyond which a break is never seen among contexts
_NEVER = 1000.0


def best_of_n_curves(
    prepared: Prepared, baselines: dict[str, Baseline], bits: dict[str, BitsBatch], epsilon: float | None
) -> BestOfNCurves | None:
    """Predicted curves per tail and the observed one.

    Args:
        prepared: with observed contexts, else ``None`` is returned.
        places: tail name -> situation (all under per-item natural thoughts, same threshold and catches).
        bits: tail name -> per-item bits of the same event.
        epsilon: if given, a break must keep behaviour: the real context's edit at the site is judged like any move.
    """
    first = next(iter(baselines.values()))
    if prepared.observed is None or not len(first.caught):
        return None
    items = prepared.positives[first.caught]
    n_contexts = prepared.observed.shape[1]
    scores = np.asarray(first.probe.score(prepared.observed[items]), dtype=float)
    fails = scores <= first.detection.threshold
    if epsilon is not None:
        assert prepared.behaviour is not None
        edits = prepared.observed[items] - prepared.test_origins[items][:, None, :]
        fails = fails & (prepared.behaviour.shift(items, edits) <= epsilon)
    n = np.arange(1, n_contexts + 1)
    weights = prepared.resamples.positives[:, first.caught]
    total = np.maximum(weights.sum(axis=1), 1e-12)

    rng = np.random.default_rng(np.random.SeedSequence([prepared.seed, 0xB0B]))
    counts = rng.multinomial(n_contexts, np.full(n_contexts, 1 / n_contexts), size=len(weights))
    rows = np.empty((len(weights), len(n)))
    for r in range(len(weights)):
        resampled = (fails * counts[r]).sum(axis=1)
        rows[r] = weights[r] @ (1 - holds(n_contexts, resampled[:, None], n[None, :])) / total[r]
    observed = _curve(n, (1 - holds(n_contexts, fails.sum(axis=1)[:, None], n[None, :])).mean(axis=0), rows)

    predicted, agreement = {}, {}
    for name in baselines:
        many, like_observed = _replicates(prepared, baselines[name], bits[name], n, weights)
        predicted[name] = _curve(n, many.mean(axis=0), many)
        agreement[name] = _agreement(like_observed, observed.value)
    tail = None if epsilon is not None else _left_tail(prepared, first)
    if tail is not None:
        value, (low, high) = tail.broken(n), tail.band(n)
        predicted["power_law"] = Curve(n, value, np.minimum(low, value), np.maximum(high, value), value, value)
    return BestOfNCurves(epsilon is not None, predicted, observed, n_contexts, len(items), agreement, tail)


def _left_tail(prepared: Prepared, baseline: Baseline) -> LeftTail | None:
    """Per-item chances as contexts A show them, with no prior in between.

    Who is caught is decided on one half of the contexts and failures are counted on the other, both ways round: an item
    that was chosen for being caught on the very contexts that count would seem safer than it is.
    """
    scores = np.asarray(baseline.probe.score(prepared.test[prepared.positives]), dtype=float)
    threshold, half = baseline.detection.threshold, scores.shape[1] // 2
    if half < 1:
        return None
    folds = [(scores[:, :half], scores[:, half : 2 * half]), (scores[:, half : 2 * half], scores[:, :half])]
    _, entity = np.unique(prepared.items.groups[prepared.positives], return_inverse=True)
    caught = np.stack([chosen_on.mean(axis=1) > threshold for chosen_on, _ in folds])
    counts = np.stack([(counted_on <= threshold).sum(axis=1) for _, counted_on in folds])
    # an item that both halves catch is counted twice: resampled by entity, both counts come along
    groups = np.broadcast_to(entity.ravel(), caught.shape)
    tallies = _context_tallies(scores[:, : 2 * half], threshold, entity.ravel(), prepared.seed)
    found = fit_left_tail(counts[caught], half, groups=groups[caught], seed=prepared.seed, tallies=tallies)
    return None if found is None else replace(found, n_items=int(caught.any(axis=0).sum()))


def _context_tallies(scores: np.ndarray, threshold: float, entity: np.ndarray, seed: int) -> np.ndarray | None:
    """How often each count occurs among the caught when entities and contexts are drawn anew, ``(replicates, m + 1)``.

    A context's sway of all items alike is drawn from a normal distribution of the variance that the sways seen have,
    itself uncertain, ``(C-1)/chi2_{C-1}``: a resample of few contexts holds none that is worse than these, though the
    next one may be. What is particular to an item in a context is resampled. Draws that catch nothing say nothing.
    """
    n_contexts = scores.shape[1]
    half = n_contexts // 2
    rng = np.random.default_rng(np.random.SeedSequence([seed, 0x1EF8]))
    sway = scores.mean(axis=0) - scores.mean()
    own = scores - sway
    spread = float(sway @ sway)
    n_entities = int(entity.max()) + 1
    rows = np.zeros((_REPLICATES, half + 1))
    for row in rows:
        weights = rng.multinomial(n_entities, np.full(n_entities, 1 / n_entities))[entity].astype(float)
        common = math.sqrt(spread / rng.chisquare(n_contexts - 1)) * rng.standard_normal(2 * half)
        drawn = own[:, rng.integers(0, n_contexts, 2 * half)] + common
        folds = drawn[:, :half], drawn[:, half:]
        for chosen_on, counted_on in (folds, folds[::-1]):
            caught = chosen_on.mean(axis=1) > threshold
            count = (counted_on <= threshold).sum(axis=1)
            row += np.bincount(count[caught], weights=weights[caught], minlength=half + 1)
    rows = rows[rows.sum(axis=1) > 0]
    return rows if len(rows) else None


def prediction_flags(curves: BestOfNCurves) -> tuple[Flag, ...]:
    """Raised when under every tail the observed curve is more extreme than 99% of curves that the prior predicts."""
    if not curves.p_values or max(curves.p_values.values()) >= _ALARM:
        return ()
    seen = ", ".join(f"{v:.0%}" for v in (curves.observed.value[0], curves.observed.value[-1]))
    own = {name: curve.value for name, curve in curves.predicted.items() if name in curves.p_values}
    told = "; ".join(f"{name} {value[0]:.0%}, {value[-1]:.0%}" for name, value in own.items())
    kind = "kept" if curves.kept else "free"
    return (
        flag("prediction_failed", f"best of 1 and {curves.n_contexts} ({kind}): observed {seen}; predicted {told}"),
    )


def _replicates(
    prepared: Prepared, baseline: Baseline, bits: BitsBatch, n: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Predicted curves, and curves as they would be observed under as many contexts, ``(replicates, n)`` each."""
    tail, caught, c = baseline.prior.tail, baseline.caught, prepared.test.shape[1]
    origins = prepared.test_origins[prepared.positives]
    gradient = score_gradients(baseline.probe, origins)
    weight = gradient if gradient.ndim == 1 else gradient.mean(axis=0)
    smooth = baseline.probe.traits.differentiable

    def variance(threat: Threat) -> float:
        """Of the score under a prior: linearized, or of prior draws where there is no gradient."""
        prior = prepared.prior(threat)
        if smooth:
            return float(prior.standard_deviation(weight)) ** 2
        return float((score_spread(baseline.probe, prior, origins, seed=prepared.seed) ** 2).mean())

    universal = variance(Threat(scope="universal"))
    means, own = context_scores(prepared, weight if smooth else baseline.probe)
    common = max(float(means @ means) / max(c - 1, 1) - own / len(prepared.plain_train), universal)
    own = max(own, variance(Threat()) - universal)
    # in units of the score; of a probe or an event that is not linear, the margin that costs as many bits
    margin = tail.quantile_of_bits(np.minimum(bits.value, _NEVER)) * baseline.deviation[caught]
    spread = max(float(baseline.margin.var(ddof=1)) if len(baseline.margin) > 1 else 0.0, 1e-300)
    keep = max(1 - own / c / spread, 0.0)
    margin = margin + (1 - keep) * (baseline.margin.mean() - baseline.margin[caught])
    rng = np.random.default_rng(np.random.SeedSequence([prepared.seed, 0xB0C]))
    predicted, seen = np.empty((len(weights), len(n))), np.empty((len(weights), len(n)))
    for r, row in enumerate(weights):
        f = (c - 1) / rng.chisquare(c - 1) if c > 1 else 1.0
        at = margin + rng.standard_normal(len(margin)) * math.sqrt(keep * own / c)
        at = at + rng.standard_normal() * math.sqrt(common * f / c)
        p = 2.0 ** -bits_of_margin(tail, at, np.full(len(at), math.sqrt(common * f + own)))
        predicted[r] = row @ (1 - (1 - p[:, None]) ** n) / max(float(row.sum()), 1e-12)
        z = rng.standard_normal((len(margin), len(n)))
        scale = np.asarray(tail.scale(z, np)) if tail.extra else 1.0
        sway = math.sqrt(common * f) * rng.standard_normal(len(n)) + math.sqrt(own) * rng.standard_normal(z.shape)
        count = (scale * sway >= at[:, None]).sum(axis=1)
        seen[r] = (1 - holds(len(n), count[:, None], n[None, :])).mean(axis=0)
    return predicted, seen


def _agreement(seen: np.ndarray, observed: np.ndarray) -> float:
    """Share of simulated curves that lie at least as far out as the observed one, by the depth of their worst point."""

    def depth(curves: np.ndarray) -> np.ndarray:
        pairs = [(np.sort(x), x) for x in curves.T]
        at_most = np.stack([np.searchsorted(s, x, side="right") for s, x in pairs])
        below = np.stack([np.searchsorted(s, x, side="left") for s, x in pairs])
        return np.asarray(np.minimum(at_most, len(curves) - below).min(axis=0))

    # the observed curve is one of the pool: without it, rounding alone would be an alarm
    pool = np.concatenate([seen, observed[None]])
    ranks = depth(pool)
    return float((ranks <= ranks[-1]).mean())


def _curve(x: np.ndarray, value: np.ndarray, rows: np.ndarray) -> Curve:
    low, high = np.quantile(rows, [0.025, 0.975], axis=0)
    made = Curve(x, value, low, high, value, value)
    return replace(made, low=np.minimum(low, value), high=np.maximum(high, value))
