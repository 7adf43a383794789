"""One probe under one threat as attacks see it: what the oracle answers, what is judged, and what a mind knows.

=========  ======================================  ===========================================================
event      per item                                universal
=========  ======================================  ===========================================================
failed     the item is no longer caught            the metric on *test* items is at most tau
joint      failed, and the item's shift is kept    failed, and the mean shift of test items is kept
searched   joint, by the quadratic shift           the same of *training* items, with the tau that these have
=========  ======================================  ===========================================================

Where behaviour is free, joint is failed. On a real model joint runs forward passes, and the quadratic shift, which is
local and sampled, is searched within half of epsilon.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from elk_stress.estimators.limit_state import LimitState, both
from elk_stress.thoughts.attacks.model_access import ModelAccess
from elk_stress.thoughts.attacks.protocol import Access
from elk_stress.thoughts.baseline import Baseline
from elk_stress.thoughts.events import item_event, kept_event
from elk_stress.thoughts.prepared import Prepared
from elk_stress.thoughts.universal_items import JudgedItems, judged_on, searched_on
from elk_stress.thoughts.universal_scope import universal_event, universal_joint_event

__all__ = ["AttackTarget", "attack_target", "judged_event"]

_SLACK = 0.5
# joint events are searched in single precision, judged in double: a hair beyond the boundary is beyond it in both
_HAIR = 0.998
# half of fewer training catches than these says nothing of half of the test catches
_FEWEST = 5


@dataclass(frozen=True)
class AttackTarget:
    """One (probe, threat) as attacks see it.

    Attributes:
        failed, joint, searched: the events, see the module.
        items: test items of the problems (item scope); all caught positives (universal).
        pool: real contexts B in u-space, ``(problems, n, dim)``, or ``None``.
        epsilon: nats, where behaviour is constrained.
        judged: the test items that one move for all is judged on (universal), or ``None``.
        asked, scored: activations that one question about ``searched``, and one verdict on ``failed``, scores.
        searchable: whether the probe catches enough that a move can be searched on (universal: 5 training positives).
    """

    prepared: Prepared
    baseline: Baseline
    failed: LimitState
    joint: LimitState
    searched: LimitState
    items: np.ndarray
    pool: np.ndarray | None
    epsilon: float | None
    judged: JudgedItems | None = None
    asked: int = 1
    scored: int = 1
    searchable: bool = True

    @property
    def n_problems(self) -> int:
        """Items, or 1 for a universal move."""
        return self.failed.n_problems

    def shift(self, problems: np.ndarray, moves: np.ndarray) -> np.ndarray:
        """True behaviour shift ``(p, n)`` of ``moves (p, n, d)`` of these problems."""
        if self.judged is not None:
            return self.judged.mean_shifts(moves[0])[None]
        assert self.prepared.behaviour is not None
        return self.prepared.behaviour.shift(self.items[problems], moves)

    def model_access(self, access: Access, budget: int) -> ModelAccess:
        """What the model knows of itself, and may ask of the probe."""
        baseline = self.baseline
        return ModelAccess(
            self.prepared, baseline.threat, baseline.prior, self.items, self.epsilon,
            baseline.probe, baseline.detection.threshold, access, budget,
        )  # fmt: skip


def attack_target(prepared: Prepared, baseline: Baseline, epsilon: float | None) -> AttackTarget:
    """Build the events of a threat for its attacks."""
    threat, prior = baseline.threat, baseline.prior
    items = prepared.positives[baseline.caught]
    kept = threat.kept and epsilon is not None and len(items) > 0
    exact = prepared.behaviour is None or prepared.behaviour.exact
    aimed = 0.0 if epsilon is None else (_HAIR if exact else _SLACK) * epsilon
    slack = (1 - _HAIR) * float(np.median(baseline.margin[baseline.caught])) if len(items) else 0.0
    judged = judged_on(prepared, baseline) if threat.scope == "universal" else None
    asked = scored = 1
    searchable = True
    if judged is not None:
        train = searched_on(prepared, baseline)
        searchable = int((train.margin > 0).sum()) >= _FEWEST or threat.metric == "auroc"
        asked, scored = (len(c.margin) if threat.metric == "recall" else len(c.rows) for c in (train, judged))
        failed = universal_event(judged, baseline, np.array([judged.tau]))
        searched = universal_event(train, baseline, np.array([train.tau]))
        joint = failed
        if kept:
            searched, _ = universal_joint_event(train, baseline, aimed, slack=slack)
            if exact:
                joint, _ = universal_joint_event(judged, baseline, aimed, slack=slack)
    else:
        failed = item_event(baseline.probe, prior, prepared.test_origins[items], baseline.detection.threshold)
        joint = searched = failed
        if kept:
            assert prepared.behaviour is not None
            opened = item_event(
                baseline.probe, prior, prepared.test_origins[items], baseline.detection.threshold - slack, closed=False
            )
            joint = searched = both(opened, kept_event(prior, prepared.behaviour.factors(items), aimed))
    pool = None
    if prepared.observed is not None:
        edits = prepared.observed - prepared.test_origins[:, None, :]
        pool = prior.inverse(edits[items] if judged is None else edits.mean(axis=0)[None])
    kept_within = epsilon if threat.kept else None
    target = AttackTarget(
        prepared, baseline, failed, joint, searched, items, pool, kept_within, judged, asked, scored, searchable
    )
    return replace(target, joint=judged_event(target)) if kept and not exact else target


def judged_event(target: AttackTarget) -> LimitState:
    """Failed and kept, by a forward pass of every point that fails; no gradient."""
    failed, epsilon = target.failed, target.epsilon
    assert epsilon is not None

    def function(problems: np.ndarray, u: np.ndarray) -> np.ndarray:
        g = failed.value(problems, u)
        some = np.flatnonzero((g <= 0).any(axis=1))
        if len(some):
            shift = target.shift(problems[some], np.asarray(target.baseline.prior.move(u[some])))
            g[some] = np.maximum(g[some], shift / epsilon - 1)
        return g

    return LimitState(function, failed.dim, failed.n_problems)
