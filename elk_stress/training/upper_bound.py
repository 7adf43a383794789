r"""A rigorous upper bound on B from where an attack broke through, on any trainee.

``q = N(theta, diag(sigma^2))``, moved back along the attack's own direction to where about half of the draws fail, by
bisection on a few draws a step (an attack may stand several times too far out); ``log2 dq/dprior`` at a draw
``theta + sigma z`` is ``(r^2/2 + z.u) / ln 2``. The place and the level t are fixed on draws of their own, and fresh
draws give, at 95%, ``B <= t - log2 CP_low[q(failed, kept, log2 dq/dprior <= t)]``
(:mod:`elk_stress.estimators.evidence_bound`). A language model affords a few dozen draws; the bound stays rigorous.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from elk_stress.core.bits import LN2
from elk_stress.estimators.evidence_bound import bound_of, level_of
from elk_stress.probing.probe import FittedProbe
from elk_stress.training.measure import auroc_of, scores_of
from elk_stress.training.protocols import Trainee

__all__ = ["attack_bound"]

# bisections of the attack's own length, on a 32nd of the draws each
_STEPS = 7
# failing draws that fix the level: three times as many fresh draws all miss it with chance 4^-3
_FEWEST = 3
_CONFIDENCE = 0.95
# noise draws 0, 1, ... belong to the measurements
_FIRST_DRAW = 1000


def attack_bound(
    trainee: Trainee,
    weights: np.ndarray,
    probes: Sequence[FittedProbe],
    tau: np.ndarray,
    *,
    seed: int = 0,
    draws: int | None = None,
) -> np.ndarray:
    """``(models,)`` bits; ``inf`` where no fresh draw failed and kept behaviour.

    Args:
        trainee: the models.
        weights: ``(1, models, n_parameters)``: where the attack stood.
        probes: the attacked probe per model.
        tau: ``(models,)``.
        seed: unused draws begin at a place that depends on it.
        draws: all together, pilot included; by default 64 for a language model and 256 for an organism.
    """
    total = draws or (64 if trainee.subject == "language_model" else 256)
    each = max(1, total // 32)
    start = _FIRST_DRAW + 10_000 * (seed % 1000)
    low, high = np.zeros(trainee.n_models), np.ones(trainee.n_models)
    for _ in range(_STEPS):
        middle = 0.5 * (low + high)
        cells = _ratios(trainee, trainee.scaled(weights, middle[None]), probes, tau, range(start, start + each))[0]
        # more than half: a place where too few fail may leave the fresh draws without any
        fails = 2 * np.isfinite(cells).sum(axis=-1) > each
        high, low = np.where(fails, middle, high), np.where(fails, low, middle)
        start += each
    chosen = trainee.scaled(weights, high[None])
    left = max(4, total - _STEPS * each)
    again = _ratios(trainee, chosen, probes, tau, range(start, start + left // 4))[0]
    fresh = _ratios(trainee, chosen, probes, tau, range(start + left // 4, start + left))[0]
    return bound_of(fresh, level_of(again, _CONFIDENCE, _FEWEST), _CONFIDENCE)


def _ratios(
    trainee: Trainee, weights: np.ndarray, probes: Sequence[FittedProbe], tau: np.ndarray, noises: range
) -> np.ndarray:
    """``(strengths, models, draws)``: log2 dq/dprior of the draws that failed and kept behaviour, ``inf`` of others."""
    labels = trainee.splits["test"].labels
    length = trainee.length(weights)
    out = []
    for noise in noises:
        auroc = auroc_of(scores_of(probes, trainee.activations(weights, "test", noise)), labels)
        kept = np.nan_to_num(trainee.shift(weights, noise), nan=np.inf) <= trainee.epsilon
        ratio = (0.5 * length**2 + length * trainee.along(weights, noise)) / LN2
        out.append(np.where((np.nan_to_num(auroc, nan=1.0) <= tau) & kept, ratio, np.inf))
    return np.stack(out, axis=-1)
