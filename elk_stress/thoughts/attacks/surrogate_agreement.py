r"""How much a surrogate must agree with a probe for an attack on the one to break the other: agreement against bits.

An attack without any access fits a *surrogate* of its own and games that (the registered attack ``transfer``). Whether
it gets through depends on what surrogate and probe share. For each surrogate, on test items (each its mean over neutral
contexts):

* ``correlation``: Spearman's, of the two probes' scores over all test items. Two probes that both tell the classes
  apart agree for that reason alone, so
* ``within``: the mean of Spearman's within the positives and within the negatives, where only what is incidental to
  the truth is left to agree on;
* ``success`` of the attack on the probe, and the upper bound on the probe's B that it proves, in bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from elk_stress.core import registry
from elk_stress.core.bits import Bits
from elk_stress.probing.probe import FittedProbe, Probe
from elk_stress.thoughts.attacks.protocol import Attack
from elk_stress.thoughts.attacks.runner import run_attack
from elk_stress.thoughts.attacks.target import attack_target
from elk_stress.thoughts.baseline import baseline_of
from elk_stress.thoughts.prepared import Prepared, fit_probe
from elk_stress.threats.threat import Threat

__all__ = ["Agreement", "agreement"]


@dataclass(frozen=True)
class Agreement:
    """One surrogate and what came of gaming it.

    Attributes:
        surrogate: registered name of the surrogate.
        correlation: Spearman's rank correlation with the probe's scores over all test items; NaN for constant scores.
        within: its mean within positives and within negatives.
        success: share of the probe's catches that the attack on the surrogate broke.
        success_interval: 95%, over items.
        upper_bound: on the probe's B, in bits; ``None`` where the attack proves none.
        status: ``ok``, or why the attack does not apply.
    """

    surrogate: str
    correlation: float
    within: float
    success: float
    success_interval: tuple[float, float]
    upper_bound: Bits | None
    status: str


def agreement(
    prepared: Prepared,
    probe: FittedProbe,
    *,
    surrogates: Sequence[str] | None = None,
    threat: Threat | None = None,
    fpr: float = 0.05,
    attack: Callable[[str], Attack] | None = None,
    seed: int | None = None,
) -> tuple[Agreement, ...]:
    """Attack ``probe`` through each surrogate in turn; one row per surrogate, in their order.

    Args:
        prepared: a prepared testbed.
        probe: the probe that is attacked; no surrogate is told anything of it.
        surrogates: registered names of probes; by default those of ``transfer``.
        threat: per item under natural thoughts by default.
        fpr: of the probe's threshold.
        attack: from a surrogate's name to the attack through it; by default the registered ``transfer``.
        seed: of the fits and of the attacks; by default the prepared testbed's.

    Raises:
        UnknownName: no such surrogate.
    """
    seed = prepared.seed if seed is None else seed
    threat = Threat() if threat is None else threat
    epsilon = (prepared.epsilon if threat.epsilon is None else threat.epsilon) if threat.kept else None
    target = attack_target(prepared, baseline_of(prepared, probe, threat, fpr), epsilon)
    through = attack or (lambda name: registry.load("attacks", "transfer", surrogates=(name,)))
    labels = prepared.items.labels
    own = np.asarray(probe.score(prepared.test_origins), dtype=float)
    rows = []
    for name in surrogates or registry.load("attacks", "transfer").surrogates:
        recipe: Probe = registry.load("probes", name)
        other = np.asarray(fit_probe(prepared, recipe).score(prepared.test_origins), dtype=float)
        row = run_attack(through(name), target, budget=1, seed=seed)
        halves = [_spearman(own[labels == label], other[labels == label]) for label in (0, 1)]
        rows.append(
            Agreement(
                name,
                _spearman(own, other),
                float(np.mean(halves)),
                row.success,
                row.success_interval,
                row.upper_bound,
                row.status,
            )
        )
    return tuple(rows)


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation; NaN where one side is constant (a rock agrees with nothing)."""
    from scipy.stats import spearmanr

    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    return float(spearmanr(a, b).statistic)
