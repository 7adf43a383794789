r"""Fitted scikit-learn estimators as probes: linear ones and networks converted, all others called as they are.

``Pipeline``s and searches are opened into transforms ``t_1 .. t_k`` and the estimator at their end. A transform that is
affine for every fit is read off by what it does to the origin and to the axes::

    bias = t(0),  weight[i] = t(e_i) - t(0),  t(x) = x @ weight + bias          x: (n, d), weight: (d, d')

and multiplied into the layers after it (:func:`.layers.stacked`). What a transform does beyond that (clipping, say)
shows when converted and original scores are compared, and the estimator is then kept opaque.

The score, first that there is: ``decision_function``; ``log p - log(1 - p)`` of ``predict_proba``, with p clipped to
[1e-6, 1 - 1e-6]; ``score_samples``; ``predict``. Detectors of outliers and densities are negated: higher is more
strongly positive, and what a monitor must catch is the unusual.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from elk_stress.probe import FittedProbe
from elk_stress.wrapping.converted import Stack, agrees, named
from elk_stress.wrapping.layers import stacked
from elk_stress.wrapping.opaque import Opaque

__all__ = ["from_sklearn"]

_CLIP = 1e-6
# transforms that are affine whatever they were fitted to; what else they do (clipping) shows on the compared rows
_AFFINE = (
    "StandardScaler", "MinMaxScaler", "MaxAbsScaler", "RobustScaler", "PCA", "IncrementalPCA", "TruncatedSVD",
    "FactorAnalysis", "FastICA", "GaussianRandomProjection", "SparseRandomProjection", "LinearDiscriminantAnalysis",
)  # fmt: skip


def from_sklearn(obj: Any, name: str | None, dim: int | None, site: str) -> FittedProbe:
    from sklearn.base import is_clusterer
    from sklearn.exceptions import NotFittedError
    from sklearn.utils.validation import check_is_fitted

    kind = type(obj).__name__
    steps = _steps(obj)
    try:
        for step in steps:
            check_is_fitted(step)
    except NotFittedError:
        raise ValueError(f"{kind} is not fitted; call its fit(activations, labels) first, then wrap it") from None
    last = steps[-1]
    if is_clusterer(last):
        raise TypeError(f"{kind} finds clusters and scores nothing; wrap a classifier, a regressor or a detector")
    classes = getattr(obj, "classes_", None)
    if classes is not None and (isinstance(classes, list) or len(classes) != 2):
        found = "several outputs" if isinstance(classes, list) else f"{len(classes)} classes {np.asarray(classes)!r}"
        raise ValueError(
            f"{kind} has {found}; a probe answers one question: fit it on two classes, of which the second "
            "(classes_[1]) is the positive"
        )
    width = next((int(s.n_features_in_) for s in steps if hasattr(s, "n_features_in_")), dim)
    if width is None:
        raise TypeError(f"{kind} does not tell how many features it reads; pass dim=")
    score, how = _score(obj, last)
    notes = {"from": kind, "score": how}
    if classes is not None:
        notes["positive"] = str(np.asarray(classes)[1])
    stack = _layers(steps, width)
    if stack is not None:
        made = named(stacked(stack, dim=width, site=site), name or kind, notes)
        # probabilities resolve logits up to the clip
        limit = math.log(1 / _CLIP - 1) if how.startswith("logit") else math.inf
        if agrees(made, score, 1e-8, limit):
            return made
    recipe = Opaque(name or kind, score, "numpy", False)
    checked = np.asarray(score(np.zeros((3, width))))
    if checked.shape != (3,):
        raise ValueError(f"{kind} gives {checked.shape[1:]} outputs a row; a probe has one score: fit it on one target")
    return FittedProbe(recipe, {}, site, {**notes, "as": "opaque, without a gradient"}, width)


def _steps(obj: Any) -> list[Any]:
    """Transforms and the estimator at their end, searches and nested pipelines opened; ``passthrough`` left out."""
    if hasattr(obj, "best_estimator_"):
        return _steps(obj.best_estimator_)
    if hasattr(obj, "steps") and hasattr(obj, "named_steps"):
        kept = [step for _, step in obj.steps if step is not None and not isinstance(step, str)]
        return [part for step in kept for part in _steps(step)]
    return [obj]


def _score(obj: Any, last: Any) -> tuple[Callable[[np.ndarray], np.ndarray], str]:
    """The score of numpy rows, higher = more strongly positive, and how it is read."""
    from sklearn.base import is_outlier_detector

    # densities know only what is normal; mixtures would offer the components' responsibilities as probabilities
    density = not hasattr(obj, "classes_") and hasattr(obj, "score_samples")
    sign = -1.0 if is_outlier_detector(last) or density else 1.0
    prefix = "-" if sign < 0 else ""

    def reading(method: str, after: Callable[[Any], Any] = lambda y: y) -> Callable[[np.ndarray], np.ndarray]:
        read = getattr(obj, method)
        # some estimators look for float64, rows in order, writable
        return lambda x: sign * np.asarray(after(read(np.array(x, dtype=float, order="C"))), dtype=float)

    if hasattr(obj, "decision_function"):
        return reading("decision_function"), f"{prefix}decision_function"
    if hasattr(obj, "predict_proba") and not density:

        def logit(p: np.ndarray) -> np.ndarray:
            share = np.clip(np.asarray(p)[:, 1], _CLIP, 1 - _CLIP)
            return np.asarray(np.log(share) - np.log1p(-share))

        return reading("predict_proba", logit), f"logit of predict_proba, clipped to [{_CLIP:g}, 1 - {_CLIP:g}]"
    if density:
        return reading("score_samples"), f"{prefix}score_samples"
    if hasattr(obj, "classes_"):
        positive = obj.classes_[1]
        return reading("predict", lambda y: np.where(np.asarray(y) == positive, 1.0, -1.0)), "predict, as +1 and -1"
    if sign < 0:
        return reading("predict"), "-predict"

    def column(y: np.ndarray) -> np.ndarray:
        y = np.asarray(y)
        return np.asarray(y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y)

    return reading("predict", column), "predict"


def _layers(steps: Sequence[Any], width: int) -> Stack | None:
    """The estimator behind its transforms as layers, or ``None`` where a part is not affine or unknown."""
    from sklearn.feature_selection import SelectorMixin

    found: Stack = []
    for step in steps[:-1]:
        if type(step).__name__ not in _AFFINE and not isinstance(step, SelectorMixin):
            return None
        # an affine map is what it does to the origin and to the axes
        rows = np.asarray(_dense(step.transform(np.concatenate([np.zeros((1, width)), np.eye(width)]))), dtype=float)
        found.append(("affine", (rows[1:] - rows[0], rows[0])))
        width = rows.shape[1]
    last = steps[-1]
    if hasattr(last, "coefs_") and hasattr(last, "intercepts_"):
        hidden = {"identity": None, "relu": "relu", "tanh": "tanh", "logistic": "sigmoid"}
        if last.activation not in hidden or last.out_activation_ not in ("identity", "logistic"):
            return None
        for k, (weight, bias) in enumerate(zip(last.coefs_, last.intercepts_, strict=True)):
            name = hidden[last.activation]
            if k and name is not None:
                found.append((name, ()))
            found.append(("affine", (weight, bias)))
        return found if last.coefs_[-1].shape[1] == 1 else None
    weight, bias = getattr(last, "coef_", None), getattr(last, "intercept_", 0.0)
    if weight is None or np.size(bias) != 1 or _dense(weight).size != width:
        return None
    found.append(("affine", (np.reshape(_dense(weight), (width, 1)), np.reshape(bias, 1))))
    return found


def _dense(array: Any) -> np.ndarray:
    return np.asarray(array.toarray() if hasattr(array, "toarray") else array)
