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
from elk_stress.thoughts.attacks.model_access import Mind
from elk_stress.thoughts.attacks.protocol import Access
from elk_stress.thoughts.baseline import Situation
from elk_stress.thoughts.events import item_event, kept_event
from elk_stress.thoughts.prepared import Scene
from elk_stress.thoughts.universal_items import Crowd, judged_on, searched_on
from elk_stress.thoughts.universal_scope import universal_event, universal_joint_event

__all__ = ["Arena", "arena", "judged_event"]

_SLACK = 0.5
# joint events are searched in single precision, judged in double: a hair beyond the boundary is beyond it in both
_HAIR = 0.998
# half of fewer training catches than these says nothing of half of the test catches
_FEWEST = 5


@dataclass(frozen=True)
class Arena:
    """One (probe, threat) as attacks see it.

    Attributes:
        failed, joint, searched: the events, see the module.
        items: test items of the problems (item scope); all caught positives (universal).
        pool: real contexts B in u-space, ``(problems, n, dim)``, or ``None``.
        epsilon: nats, where behaviour is constrained.
        crowd: the test items that one move for all is judged on (universal), or ``None``.
        asked, scored: activations that one question about ``searched``, and one verdict on ``failed``, scores.
        searchable: whether the probe catches enough that a move can be searched on (universal: 5 training positives).
    """

    scene: Scene
    place: Situation
    failed: LimitState
    joint: LimitState
    searched: LimitState
    items: np.ndarray
    pool: np.ndarray | None
    epsilon: float | None
    crowd: Crowd | None = None
    asked: int = 1
    scored: int = 1
    searchable: bool = True

    @property
    def n_problems(self) -> int:
        """Items, or 1 for a universal move."""
        return self.failed.n_problems

    def shift(self, problems: np.ndarray, moves: np.ndarray) -> np.ndarray:
        """True behaviour shift ``(p, n)`` of ``moves (p, n, d)`` of these problems."""
        if self.crowd is not None:
            return self.crowd.mean_shifts(moves[0])[None]
        assert self.scene.behaviour is not None
        return self.scene.behaviour.shift(self.items[problems], moves)

    def mind(self, access: Access, budget: int) -> Mind:
        """What the model knows of itself, and may ask of the probe."""
        place = self.place
        return Mind(
            self.scene, place.threat, place.prior, self.items, self.epsilon,
            place.probe, place.detection.threshold, access, budget,
        )  # fmt: skip


def arena(scene: Scene, place: Situation, epsilon: float | None) -> Arena:
    """Build the events of a threat for its attacks."""
    threat, prior = place.threat, place.prior
    items = scene.positives[place.caught]
    kept = threat.kept and epsilon is not None and len(items) > 0
    exact = scene.behaviour is None or scene.behaviour.exact
    aimed = 0.0 if epsilon is None else (_HAIR if exact else _SLACK) * epsilon
    slack = (1 - _HAIR) * float(np.median(place.margin[place.caught])) if len(items) else 0.0
    crowd = judged_on(scene, place) if threat.scope == "universal" else None
    asked = scored = 1
    searchable = True
    if crowd is not None:
        train = searched_on(scene, place)
        searchable = int((train.margin > 0).sum()) >= _FEWEST or threat.metric == "auroc"
        asked, scored = (len(c.margin) if threat.metric == "recall" else len(c.rows) for c in (train, crowd))
        failed = universal_event(crowd, place, np.array([crowd.tau]))
        searched = universal_event(train, place, np.array([train.tau]))
        joint = failed
        if kept:
            searched, _ = universal_joint_event(train, place, aimed, slack=slack)
            if exact:
                joint, _ = universal_joint_event(crowd, place, aimed, slack=slack)
    else:
        failed = item_event(place.probe, prior, scene.test_origins[items], place.detection.threshold)
        joint = searched = failed
        if kept:
            assert scene.behaviour is not None
            opened = item_event(
                place.probe, prior, scene.test_origins[items], place.detection.threshold - slack, closed=False
            )
            joint = searched = both(opened, kept_event(prior, scene.behaviour.factors(items), aimed))
    pool = None
    if scene.observed is not None:
        edits = scene.observed - scene.test_origins[:, None, :]
        pool = prior.inverse(edits[items] if crowd is None else edits.mean(axis=0)[None])
    kept_within = epsilon if threat.kept else None
    field = Arena(scene, place, failed, joint, searched, items, pool, kept_within, crowd, asked, scored, searchable)
    return replace(field, joint=judged_event(field)) if kept and not exact else field


def judged_event(field: Arena) -> LimitState:
    """Failed and kept, by a forward pass of every point that fails; no gradient."""
    failed, epsilon = field.failed, field.epsilon
    assert epsilon is not None

    def function(problems: np.ndarray, u: np.ndarray) -> np.ndarray:
        g = failed.value(problems, u)
        some = np.flatnonzero((g <= 0).any(axis=1))
        if len(some):
            shift = field.shift(problems[some], np.asarray(field.place.prior.move(u[some])))
            g[some] = np.maximum(g[some], shift / epsilon - 1)
        return g

    return LimitState(function, failed.dim, failed.n_problems)
