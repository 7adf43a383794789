"""Best of n real contexts: the curve that the prior predicts beside the one that test items under contexts B show.

The prediction is made from training items and contexts A, the observation from test items and contexts B: it can fail.
An origin is itself a mean over C contexts A, so a new context lies ``sqrt(1 + 1/C)`` standard deviations of the prior
away; the prediction takes that in.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from elk_stress.bits import BitsBatch
from elk_stress.estimators.best_of_n import holds
from elk_stress.flags import Flag, flag
from elk_stress.per_item import Situation
from elk_stress.result import BestOfNCurves, Curve
from elk_stress.scene import Scene
from elk_stress.survival import bits_of_margin, excess_bits

__all__ = ["best_of_n_curves", "prediction_flags"]


def best_of_n_curves(
    scene: Scene, places: dict[str, Situation], bits: dict[str, BitsBatch], epsilon: float | None
) -> BestOfNCurves | None:
    """Predicted curves per tail and the observed one.

    Args:
        scene: with observed contexts, else ``None`` is returned.
        places: tail name -> situation (all under per-item natural thoughts, same threshold and catches).
        bits: tail name -> per-item bits of the same event.
        epsilon: if given, a break must keep behaviour: the real context's edit at the site is judged like any move.
    """
    first = next(iter(places.values()))
    if scene.observed is None or not len(first.caught):
        return None
    items = scene.positives[first.caught]
    n_contexts = scene.observed.shape[1]
    scores = np.asarray(first.probe.score(scene.observed[items]), dtype=float)
    fails = scores <= first.detection.threshold
    if epsilon is not None:
        assert scene.behaviour is not None
        edits = scene.observed[items] - scene.test_origins[items][:, None, :]
        fails = fails & (scene.behaviour.shift(items, edits) <= epsilon)
    n = np.arange(1, n_contexts + 1)
    weights = scene.resamples.positives[:, first.caught]
    total = np.maximum(weights.sum(axis=1), 1e-12)

    rng = np.random.default_rng(np.random.SeedSequence([scene.seed, 0xB0B]))
    counts = rng.multinomial(n_contexts, np.full(n_contexts, 1 / n_contexts), size=len(weights))
    rows = np.empty((len(weights), len(n)))
    for r in range(len(weights)):
        resampled = (fails * counts[r]).sum(axis=1)
        rows[r] = weights[r] @ (1 - holds(n_contexts, resampled[:, None], n[None, :])) / total[r]
    observed = _curve(n, (1 - holds(n_contexts, fails.sum(axis=1)[:, None], n[None, :])).mean(axis=0), rows)

    predicted = {name: _predicted(scene, places[name], bits[name], n, weights, total) for name in places}
    return BestOfNCurves(epsilon is not None, predicted, observed, n_contexts, len(items))


def prediction_flags(curves: BestOfNCurves) -> tuple[Flag, ...]:
    """Raised when every tail's predicted band lies apart from the observed one somewhere."""
    # half an item: a bootstrap of "none of n" has no width, but is no proof of zero
    slack = 0.5 / curves.n_items
    apart = {
        name: (c.low > curves.observed.high + slack) | (c.high < curves.observed.low - slack)
        for name, c in curves.predicted.items()
    }
    if not apart or not all(gap.any() for gap in apart.values()):
        return ()
    where = int(np.argmax(next(iter(apart.values()))))
    n = int(curves.observed.x[where])
    seen = curves.observed.value[where]
    told = ", ".join(f"{name} {c.value[where]:.0%}" for name, c in curves.predicted.items())
    kind = "kept" if curves.kept else "free"
    return (flag("prediction_failed", f"best of {n} real contexts ({kind}): observed {seen:.0%}, predicted {told}"),)


def _predicted(
    scene: Scene, place: Situation, bits: BitsBatch, n: np.ndarray, weights: np.ndarray, total: np.ndarray
) -> Curve:
    tail = place.prior.tail
    contexts = scene.test.shape[1]
    inflated = math.sqrt(1 + 1 / contexts)
    caught = place.caught
    margin, deviation = place.margin[caught], place.deviation[caught]
    closed = bits_of_margin(tail, margin, deviation)
    # where the estimates were censored: the largest finite one is as good a limit, its chance is nil
    limit = float(np.max(bits.value, initial=1.0, where=np.isfinite(bits.value)))
    excess = excess_bits(bits.value, closed, limit)
    p = 2.0 ** -(bits_of_margin(tail, margin, deviation * inflated) + excess)
    moved = deviation[None, :] * place.deviation_factor[:, None] * inflated
    many = 2.0 ** -(bits_of_margin(tail, np.maximum(place.margins[:, caught], 0.0), moved) + excess[None, :])
    p, many = np.nan_to_num(np.clip(p, 0, 1)), np.nan_to_num(np.clip(many, 0, 1))
    rows = np.stack([(weights * (1 - (1 - many) ** k)).sum(axis=1) / total for k in n], axis=1)
    return _curve(n, (1 - (1 - p[:, None]) ** n[None, :]).mean(axis=0), rows)


def _curve(x: np.ndarray, value: np.ndarray, rows: np.ndarray) -> Curve:
    low, high = np.quantile(rows, [0.025, 0.975], axis=0)
    made = Curve(x, value, low, high, value, value)
    return replace(made, low=np.minimum(low, value), high=np.maximum(high, value))
