r"""What is left after the break: is the probe still right, miscalibrated, moved, hidden, or is the information gone?

Every training, calibration and test row is attacked first. Positives that the probe scores above the median negative
move, by the shortest way in the prior's metric, to the median negative's score: past the threshold, so that lowering
it does not undo the break. All other rows move by a prior draw of equal length, so that a refit cannot simply learn
"was moved". Stages, each a class-balanced log-loss in nats per item on attacked test rows, beside the rock's ln 2:

============  ====================================================================================
raw           scores Platt-scaled on clean calibration rows, then frozen (can be worse than a rock)
recalibrated  an affine map of the score, refitted on attacked calibration rows
refitted      the same recipe fitted on attacked training rows
strongest     the best of several recipes fitted there, chosen on attacked calibration rows
============  ====================================================================================

The verdict is the first stage whose gain over the rock is at least half of the clean gain at its 95% lower bound
(bootstrap over entities): *still works*, *miscalibrated*, *moved*, *hidden*; otherwise *gone*. When no stage passes but
the data cannot exclude one either, it is *undecided*; when the clean gain itself may be nothing, *no signal*.
"""

from __future__ import annotations

import math

import numpy as np

from elk_stress import registry
from elk_stress.events import item_event, linear_weight, nearest_of_linear
from elk_stress.limit_state import LimitState
from elk_stress.priors import EllipticalPrior
from elk_stress.probe import FittedProbe
from elk_stress.result import Audit, AuditStage
from elk_stress.scene import Scene, fit_probe
from elk_stress.threat import Threat

__all__ = ["audit"]

_VERDICTS = {"raw": "still works", "recalibrated": "miscalibrated", "refitted": "moved", "strongest": "hidden"}
_CANDIDATES = ("logistic", "lda", "mass_mean")
# (item, context) rows of a split that are attacked at most
_MOST_ROWS = 8_000


def audit(scene: Scene, probe: FittedProbe, *, seed: int = 0) -> Audit:
    """Attack every row under per-item natural thoughts and look for what is left, stage by stage."""
    threat = Threat()
    prior = scene.prior(threat)
    target = float(np.median(_scores(probe, scene.negatives)))
    rng = np.random.default_rng(np.random.SeedSequence([seed, 0xA0D1]))
    splits = scene.testbed.splits
    every = {"train": scene.train, "calibration": scene.calibration, "test": scene.test}
    chosen = {name: _sample(rows, splits[name].pairs, rng) for name, rows in every.items()}  # type: ignore[index]
    labels = {name: splits[name].labels[chosen[name]] for name in every}  # type: ignore[index]
    clean = {name: rows[chosen[name]] for name, rows in every.items()}
    attacked = {name: _attack(probe, prior, rows, labels[name], target, rng) for name, rows in clean.items()}

    weights = _balanced(scene.resamples.test[:, chosen["test"]], labels["test"])

    def losses(fitted: FittedProbe, fit_on: np.ndarray, judge_on: np.ndarray) -> np.ndarray:
        slope, intercept = _platt(_scores(fitted, fit_on), labels["calibration"])
        logit = slope * _scores(fitted, judge_on) + intercept
        sign = 1.0 - 2.0 * labels["test"][:, None]
        return np.asarray(np.logaddexp(0.0, sign * logit).mean(axis=1))

    def stage(name: str, loss: np.ndarray) -> AuditStage:
        gains = math.log(2) - weights @ loss
        own = math.log(2) - float(_balanced(np.ones((1, len(loss))), labels["test"])[0] @ loss)
        low, high = np.quantile(gains, [0.025, 0.975])
        return AuditStage(name, math.log(2) - own, own, min(float(low), own), max(float(high), own))

    found = {
        "clean": losses(probe, clean["calibration"], clean["test"]),
        "raw": losses(probe, clean["calibration"], attacked["test"]),
        "recalibrated": losses(probe, attacked["calibration"], attacked["test"]),
    }
    moved_scene = _with_train(scene, attacked["train"], chosen["train"])
    tried = {name: _refit(moved_scene, name) for name in _CANDIDATES}
    refits = {name: fitted for name, fitted in tried.items() if fitted is not None}
    same = _refit(moved_scene, probe)
    if same is not None:
        found["refitted"] = losses(same, attacked["calibration"], attacked["test"])
        refits[probe.name] = same
    strongest = "none"
    if refits:
        quality = {
            name: _calibration_loss(f, attacked["calibration"], labels["calibration"]) for name, f in refits.items()
        }
        strongest = min(quality, key=quality.__getitem__)
        found["strongest"] = losses(refits[strongest], attacked["calibration"], attacked["test"])

    stages = {name: stage(name, loss) for name, loss in found.items()}
    verdict = "gone"
    if stages["clean"].low <= 0:
        verdict = "no signal"
    else:
        excess = {
            name: (math.log(2) - weights @ found[name]) - 0.5 * (math.log(2) - weights @ found["clean"])
            for name in found
        }
        passed = [name for name in _VERDICTS if name in found and np.quantile(excess[name], 0.025) >= 0]
        open_ = [name for name in _VERDICTS if name in found and np.quantile(excess[name], 0.975) >= 0]
        if passed:
            verdict = _VERDICTS[passed[0]]
        elif open_:
            verdict = "undecided"
    return Audit(verdict, stages.pop("clean"), tuple(stages.values()), strongest, threat.name)


def nearest_breaks(
    probe: FittedProbe, prior: EllipticalPrior, rows: np.ndarray, level: float, seed: int = 0
) -> np.ndarray:
    """``(n, dim)`` shortest u that brings each row's score down to ``level``; NaN where none was found."""
    state: LimitState = item_event(probe, prior, rows, level)
    if state.linear is not None:
        return nearest_of_linear(state)
    from elk_stress.estimators.design_point import DesignPoint

    step = max(1, (1 << 23) // (state.dim * 64))
    parts = [np.arange(i, min(i + step, len(rows))) for i in range(0, len(rows), step)]
    return np.concatenate(
        [np.asarray(DesignPoint()(state.select(part), seed=seed).diagnostics["centres"])[:, 0] for part in parts]
    )


def _attack(
    probe: FittedProbe,
    prior: EllipticalPrior,
    rows: np.ndarray,
    labels: np.ndarray,
    target: float,
    rng: np.random.Generator,
) -> np.ndarray:
    if not len(rows):
        return rows
    flat = rows.reshape(-1, rows.shape[-1])
    positive = np.repeat(labels == 1, rows.shape[1])
    scores = np.asarray(probe.score(flat), dtype=float)
    weight = linear_weight(probe)
    breakable = positive & (scores > target)
    if weight is not None and not np.any(prior.factor.T @ weight):
        breakable[:] = False
    moves = np.zeros_like(flat)
    lengths = np.array([0.0])
    if breakable.any():
        u = nearest_breaks(probe, prior, flat[breakable], target)
        found = np.isfinite(u).all(axis=1)
        moves[np.flatnonzero(breakable)[found]] = prior.move(u[found])
        lengths = np.linalg.norm(u[found], axis=1) if found.any() else lengths
    rest = np.flatnonzero(~breakable)
    direction = rng.standard_normal((len(rest), prior.dim))
    direction *= rng.choice(lengths, size=len(rest))[:, None] / np.linalg.norm(direction, axis=1, keepdims=True)
    moves[rest] = prior.move(direction)
    return np.asarray((flat + moves).reshape(rows.shape), dtype=np.float32)


def _refit(scene: Scene, probe: FittedProbe | str) -> FittedProbe | None:
    """The recipe fitted on this scene's training rows; ``None`` if it cannot be (not registered, or no recipe)."""
    recipe = probe.probe if isinstance(probe, FittedProbe) else probe
    if isinstance(probe, FittedProbe) and not probe.traits.learns:
        return None
    if isinstance(recipe, str) and recipe not in registry.names("probes"):
        return None
    return fit_probe(scene, recipe)


def _with_train(scene: Scene, train: np.ndarray, chosen: np.ndarray) -> Scene:
    """The scene with attacked training rows; rows that were not sampled keep their clean activations unused."""
    from dataclasses import replace

    if len(chosen) == len(scene.train):
        return replace(scene, train=train, _priors={}, _controls={})
    items = scene.testbed.splits["train"]
    ids = tuple(items.ids[i] for i in chosen)
    part = replace(items, ids=ids, labels=items.labels[chosen], groups=items.groups[chosen], texts=None)
    return replace(scene, train=train, train_items=part, _priors={}, _controls={})


def _sample(rows: np.ndarray, pairs: np.ndarray | None, rng: np.random.Generator) -> np.ndarray:
    """All items, or a random part of very many: enough to judge a log-loss, and bounded memory. Pairs stay whole."""
    limit = max(1, _MOST_ROWS // max(rows.shape[1], 1))
    if len(rows) <= limit or pairs is not None:
        return np.arange(len(rows))
    return np.sort(rng.choice(len(rows), limit, replace=False))


def _scores(probe: FittedProbe, rows: np.ndarray) -> np.ndarray:
    return np.asarray(probe.score(rows), dtype=float)


def _platt(scores: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Slope and intercept of a class-balanced affine map to log-odds; a weak ridge keeps separable data finite."""
    from sklearn.linear_model import LogisticRegression

    y = np.repeat(labels, scores.shape[1])
    spread = float(scores.std())
    if len(np.unique(y)) < 2 or spread == 0:
        return 0.0, 0.0
    centre = float(scores.mean())
    x = (scores.ravel() - centre) / spread
    fitted = LogisticRegression(C=1.0, class_weight="balanced").fit(x[:, None], y)
    slope = float(fitted.coef_[0, 0]) / spread
    return slope, float(fitted.intercept_[0]) - slope * centre


def _calibration_loss(probe: FittedProbe, rows: np.ndarray, labels: np.ndarray) -> float:
    scores = _scores(probe, rows)
    slope, intercept = _platt(scores, labels)
    loss = np.logaddexp(0.0, (1.0 - 2.0 * labels[:, None]) * (slope * scores + intercept)).mean(axis=1)
    return float(_balanced(np.ones((1, len(labels))), labels)[0] @ loss)


def _balanced(weights: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Rows of weights scaled so that each class carries one half."""
    out = np.asarray(weights, dtype=float).copy()
    for label in (0, 1):
        total = out[:, labels == label].sum(axis=1, keepdims=True)
        out[:, labels == label] /= np.maximum(2 * total, 1e-12)
    return out
