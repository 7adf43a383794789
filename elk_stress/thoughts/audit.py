r"""What is left after the break: is the probe still right, miscalibrated, moved, hidden, or is the information gone?

Every training, calibration and test row is attacked first, positive or not, by one procedure: it moves the shortest way
in the prior's metric to where the probe scores it like the median negative. That is past the threshold, so that
lowering it does not undo the break; and since negatives go through the same, a refit cannot simply learn "was moved"
(with random moves of equal length for negatives it does: refits then beat the clean probe). A probe without a gradient
is moved the shortest way of a linear map fitted to its own scores (ridge, on the rows as they are), as far as the probe
itself needs, or to where it comes nearest on that way. Stages, each a
class-balanced log-loss in nats per item on attacked test rows, beside the rock's ln 2:

============  ====================================================================================
raw           scores Platt-scaled on clean calibration rows, then frozen (can be worse than a rock)
recalibrated  an affine map of the score, refitted on attacked calibration rows
refitted      the same recipe fitted on attacked training rows
strongest     the best of several recipes fitted there, one of them not linear, chosen on attacked
              calibration rows
============  ====================================================================================

The verdict is the first stage whose gain over the rock is at least half of the clean gain at its 95% lower bound
(bootstrap over entities): *still works*, *miscalibrated*, *moved*, *hidden*; otherwise *gone*. When no stage passes but
the data cannot exclude one either, it is *undecided*; when the clean gain itself may be nothing, *no signal*.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from elk_stress.core import registry
from elk_stress.probing.probe import FittedProbe, Probe
from elk_stress.probing.rowwise import known_scores
from elk_stress.testbeds.protocol import SplitName
from elk_stress.thoughts.attacks.proposal import Edit
from elk_stress.thoughts.events import item_event, nearest_of_linear
from elk_stress.thoughts.prepared import Prepared, fit_probe
from elk_stress.thoughts.result import Audit, AuditStage
from elk_stress.threats.priors import EllipticalPrior
from elk_stress.threats.threat import Threat

__all__ = ["CANDIDATES", "audit", "audit_edit", "examine"]

_VERDICTS = {"raw": "still works", "recalibrated": "miscalibrated", "refitted": "moved", "strongest": "hidden"}
CANDIDATES = ("logistic", "lda", "mass_mean", "mlp")
# coordinates of moves searched at once (64 MB)
_ELEMENTS = 1 << 23
# (item, context) rows of a split that are attacked at most
_MOST_ROWS = 8_000
# lengths tried along the way of a linear map, in multiples of what the map itself asks for; halvings between two
_TIMES, _HALVINGS = np.linspace(0.0, 4.0, 17), 8


def audit(prepared: Prepared, probe: FittedProbe, *, seed: int = 0) -> Audit:
    """Attack every row under per-item natural thoughts and look for what is left, stage by stage."""
    threat = Threat()
    prior = prepared.prior(threat)
    target = float(np.median(_scores(probe, prepared.negatives)))
    rng = np.random.default_rng(np.random.SeedSequence([seed, 0xA0D1]))
    splits = prepared.testbed.splits
    chosen = {name: _sample(rows, splits[name].pairs, rng) for name, rows in _every(prepared).items()}
    clean = {name: rows[chosen[name]] for name, rows in _every(prepared).items()}
    if probe.traits.differentiable:
        attacked = {name: _attack(probe, prior, rows, target, seed) for name, rows in clean.items()}
    else:
        way = _way(probe, prior, clean["train"])
        attacked = {name: _pushed(probe, way, rows, target) for name, rows in clean.items()}
    return _after(prepared, probe, clean, attacked, chosen, threat.name)


def audit_edit(prepared: Prepared, probe: FittedProbe, edit: Edit, threat: str, *, seed: int = 0) -> Audit:
    """The same stages after an edit that the model applies to every item of every split, on items' mean activations.

    ``edit.moved`` is asked once for each split; nothing is random.
    """
    clean = {name: np.asarray(rows.mean(axis=1, keepdims=True)) for name, rows in _every(prepared).items()}
    attacked = {name: np.asarray(edit.moved(name), dtype=np.float32)[:, None] for name in clean}
    return _after(
        prepared, probe, clean, attacked, {name: np.arange(len(rows)) for name, rows in clean.items()}, threat
    )


def _every(prepared: Prepared) -> dict[SplitName, np.ndarray]:
    return {"train": prepared.train, "calibration": prepared.calibration, "test": prepared.test}


def _after(
    prepared: Prepared,
    probe: FittedProbe,
    clean: Mapping[SplitName, np.ndarray],
    attacked: Mapping[SplitName, np.ndarray],
    chosen: Mapping[SplitName, np.ndarray],
    threat: str,
) -> Audit:
    """Refit the probe and every candidate on attacked training rows, and examine them all on the other splits."""
    moved = _with_train(prepared, attacked["train"], chosen["train"])
    same = _refit(moved, probe)
    # the probe's own recipe is a candidate already, and is not fitted twice
    tried = {name: _refit(moved, name) for name in CANDIDATES if same is None or name != probe.name}
    refits = {name: fitted for name, fitted in tried.items() if fitted is not None}
    labels = {name: prepared.testbed.splits[name].labels[rows] for name, rows in chosen.items()}
    weights = prepared.resamples.test[:, chosen["test"]]
    return examine(probe, same, refits, clean, attacked, labels, weights, threat)  # type: ignore[arg-type]


def examine(
    probe: FittedProbe,
    same: FittedProbe | None,
    refits: Mapping[str, FittedProbe],
    clean: Mapping[str, np.ndarray],
    attacked: Mapping[str, np.ndarray],
    labels: Mapping[str, np.ndarray],
    resamples: np.ndarray,
    threat: str,
) -> Audit:
    """The stages and their verdict, however the rows came to be attacked.

    Args:
        probe: the probe before the attack.
        same: its recipe fitted on attacked training rows; ``None`` if it cannot be.
        refits: other recipes fitted there; the strongest is chosen on attacked calibration rows.
        clean, attacked: ``calibration`` and ``test`` rows ``(n, contexts, dim)``.
        labels: of both splits.
        resamples: ``(replicates, n)`` bootstrap multiplicities of the test items.
        threat: named in the result.
    """
    weights = _balanced(resamples, labels["test"])

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
    candidates = dict(refits)
    if same is not None:
        found["refitted"] = losses(same, attacked["calibration"], attacked["test"])
        candidates[probe.name] = same
    strongest = "none"
    if candidates:
        quality = {
            name: _calibration_loss(f, attacked["calibration"], labels["calibration"]) for name, f in candidates.items()
        }
        strongest = min(quality, key=quality.__getitem__)
        found["strongest"] = losses(candidates[strongest], attacked["calibration"], attacked["test"])

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
    return Audit(verdict, stages.pop("clean"), tuple(stages.values()), strongest, threat)


def _attack(probe: FittedProbe, prior: EllipticalPrior, rows: np.ndarray, target: float, seed: int) -> np.ndarray:
    """Every row moved the shortest way, in the prior's metric, to where the probe scores it ``target``.

    For a linear probe this is one oblique projection of all rows, so what they were before is gone along the probe and
    untouched across it, and nothing tells who was moved far.
    """
    flat = rows.reshape(-1, rows.shape[-1])
    scores = known_scores(probe, flat, "moved activations")
    moves = np.zeros(flat.shape, dtype=np.float32)
    for above in (True, False):
        chosen = np.flatnonzero((scores > target) if above else (scores < target))
        step = max(1, _ELEMENTS // prior.dim)
        for part in (chosen[i : i + step] for i in range(0, len(chosen), step)):
            u = _nearest(probe, prior, flat[part], target, above, seed)
            moves[part] = np.nan_to_num(np.asarray(prior.move(np.where(np.isfinite(u), u, 0.0))))
    return np.asarray((flat + moves).reshape(rows.shape), dtype=np.float32)


def _way(probe: FittedProbe, prior: EllipticalPrior, rows: np.ndarray) -> np.ndarray:
    """``(d,)``: the shortest move, in the prior's metric, that adds 1 to a linear map of the probe's scores.

    With w of the ridge regression (penalty 1e-3 of the activations' own variance) this is ``L L^T w / ||L^T w||^2``.
    """
    flat = rows.reshape(-1, rows.shape[-1]).astype(float)
    scores = _scores(probe, flat.astype(np.float32))
    centred = flat - flat.mean(axis=0)
    covariance = centred.T @ centred / len(flat)
    ridge = 1e-3 * float(np.trace(covariance)) / len(covariance)
    w = np.linalg.solve(covariance + ridge * np.eye(len(covariance)), centred.T @ (scores - scores.mean()) / len(flat))
    inner = prior.factor.T.astype(float) @ w
    return np.asarray(prior.factor @ inner / max(float(inner @ inner), 1e-300))


def _pushed(probe: FittedProbe, way: np.ndarray, rows: np.ndarray, target: float) -> np.ndarray:
    """Every row moved along ``way`` to the first place where the probe scores it ``target``, or the nearest to it."""
    flat = rows.reshape(-1, rows.shape[-1]).astype(float)
    gap = _scores(probe, flat.astype(np.float32)) - target

    def beyond(times: np.ndarray) -> np.ndarray:
        """What is left of each row's gap, in its own sign, after so many times the move that the map asks for."""
        moved = flat - (times * gap)[:, None] * way
        return np.asarray((_scores(probe, moved.astype(np.float32)) - target) * np.sign(gap))

    left = np.stack([beyond(np.full(len(flat), t)) for t in _TIMES], axis=1)
    crossed = left <= 0
    first = np.where(crossed.any(axis=1), crossed.argmax(axis=1), np.abs(left).argmin(axis=1))
    low, high = _TIMES[np.maximum(first - 1, 0)], _TIMES[first]
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        there = beyond(middle) <= 0
        low, high = np.where(there, low, middle), np.where(there, middle, high)
    times = np.where(crossed.any(axis=1), high, _TIMES[first])
    return np.asarray((flat - (times * gap)[:, None] * way).reshape(rows.shape), dtype=np.float32)


def _nearest(
    probe: FittedProbe, prior: EllipticalPrior, rows: np.ndarray, target: float, above: bool, seed: int
) -> np.ndarray:
    """``(n, dim)`` shortest u that brings each row's score to ``target`` from above or below; NaN where not found."""
    state = item_event(probe, prior, rows, target)
    if state.linear is not None:
        if not state.linear.weight[:1].any():
            return np.zeros((len(rows), prior.dim))
        return nearest_of_linear(state, overshoot=0.0)
    from elk_stress.estimators.design_point import DesignPoint

    if not above:
        falls = state.function
        state = replace(state, function=lambda data, u: -falls(data, u), _compiled={})
    return np.asarray(DesignPoint(n_starts=2)(state, seed=seed).diagnostics["centres"])[:, 0]


def _refit(prepared: Prepared, probe: FittedProbe | str) -> FittedProbe | None:
    """The recipe fitted on this prepared testbed's attacked training rows; ``None`` if it cannot be.

    That is, if it is not registered, learns nothing, or refuses the rows: an attack may leave nothing to learn from.
    """
    if isinstance(probe, FittedProbe):
        recipe: Probe | str | None = probe.probe if probe.traits.learns else None
    else:
        recipe = probe if probe in registry.names("probes") else None
    try:
        return None if recipe is None else fit_probe(prepared, recipe)
    except ValueError:
        return None


def _with_train(prepared: Prepared, train: np.ndarray, chosen: np.ndarray) -> Prepared:
    """The prepared testbed with attacked training rows; rows that were not sampled keep their clean activations
    unused."""
    # a defence is refitted with the thoughts that it knew before the attack
    thoughts = prepared.known_thoughts
    if len(chosen) == len(prepared.train):
        return replace(prepared, fit=train, train=train, thoughts=thoughts, _priors={}, _controls={})
    items = prepared.testbed.splits["train"]
    ids = tuple(items.ids[i] for i in chosen)
    part = replace(items, ids=ids, labels=items.labels[chosen], groups=items.groups[chosen], texts=None)
    return replace(prepared, fit=train, train=train, thoughts=thoughts, train_items=part, _priors={}, _controls={})


def _sample(rows: np.ndarray, pairs: np.ndarray | None, rng: np.random.Generator) -> np.ndarray:
    """All items, or a random part of very many: enough to judge a log-loss, and bounded memory. Pairs stay whole."""
    limit = max(1, _MOST_ROWS // max(rows.shape[1], 1))
    if len(rows) <= limit or pairs is not None:
        return np.arange(len(rows))
    return np.sort(rng.choice(len(rows), limit, replace=False))


def _scores(probe: FittedProbe, rows: np.ndarray) -> np.ndarray:
    return known_scores(probe, rows, "moved activations")


def _platt(scores: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Slope and intercept of a class-balanced affine map to log-odds; a weak ridge keeps separable data finite."""
    from sklearn.linear_model import LogisticRegression

    y = np.repeat(labels, scores.shape[1])
    spread = float(scores.std())
    # scores that the attack made equal differ by rounding alone
    if len(np.unique(y)) < 2 or spread <= 1e-5 * float(np.abs(scores).max()):
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
