r"""A rigorous upper bound on B from where an attack broke through, on any trainee.

``q = N(theta, diag(sigma^2))``, moved along the attack's own direction to where it is best placed; ``log2 dq/dprior``
at a draw ``theta + sigma z`` is ``(r^2/2 + z.u) / ln 2``. The place and the level t are fixed on pilot draws, and
fresh draws give, at 95%, ``B <= t - log2 CP_low[q(failed, kept, log2 dq/dprior <= t)]``
(:mod:`elk_stress.estimators.evidence_bound`). A language model affords a few dozen draws; the bound stays rigorous.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from elk_stress.bits import LN2
from elk_stress.estimators.evidence_bound import bound_of, level_of
from elk_stress.probe import FittedProbe
from elk_stress.training.measure import auroc_of, scores_of
from elk_stress.training.protocols import Trainee

__all__ = ["attack_bound"]

# shares of the attack's own length at which the pilot looks
_FACTORS = np.array([0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
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
    n_pilot = max(2, total // (4 * len(_FACTORS)))
    first = _FIRST_DRAW + 10_000 * (seed % 1000)
    rows = np.concatenate([trainee.scaled(weights, np.full((1, trainee.n_models), f)) for f in _FACTORS])
    pilot = _ratios(trainee, rows, probes, tau, range(first, first + n_pilot))
    levels = np.stack([level_of(cell, _CONFIDENCE) for cell in pilot])
    guess = np.stack([bound_of(cell, t, _CONFIDENCE) for cell, t in zip(pilot, levels, strict=True)])
    best = np.where(np.isfinite(guess).any(axis=0), guess.argmin(axis=0), len(_FACTORS) - 1)
    chosen = trainee.scaled(weights, _FACTORS[best][None])
    fresh_count = max(2, total - n_pilot * len(_FACTORS))
    half = max(2, fresh_count // 4)
    # the level is fixed anew at the chosen place on a quarter of what is left
    start = first + n_pilot
    again = _ratios(trainee, chosen, probes, tau, range(start, start + half))[0]
    fresh = _ratios(trainee, chosen, probes, tau, range(start + half, start + fresh_count))[0]
    return bound_of(fresh, level_of(again, _CONFIDENCE), _CONFIDENCE)


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
