r"""Fitted scikit-learn estimators as probes: linear ones and networks converted, all others called as they are.

What only hands rows on is opened: pipelines, searches, thresholds tuned on top, one-vs-rest of two classes, selectors
with an estimator inside. What is left are transforms ``t`` and an estimator. Transforms that are affine whatever they
were fitted to (scalers, projections, selections; imputers, of rows that miss nothing; column transformers and unions of
such) are read off by what they do to the origin and to the axes::

    bias = t(0),  weight[i] = (t(c_i e_i) - t(0)) / c_i,  t(x) = x @ weight + bias      x: (n, d), weight: (d, d')

with ``c_i`` so long that the two stand apart in their leading digits, whatever the offset. They are multiplied into the
layers after them (:func:`.layers.stacked`). The converted probe is compared with the object, and not used where it
differs.

======================================  ====================================================================
at the end                              converted to
======================================  ====================================================================
``coef_`` and ``intercept_``            ``x @ coef + intercept``; what else these mean to a class (an offset, a
                                        centre, a sign) is read off like a transform
... of a log link (Poisson, Gamma)      the same, which is the log of ``predict``
``MLP*``                                its layers, up to the logit
``CalibratedClassifierCV``, sigmoid,    one fold: ``-(a f + b)``, the very logit; several: the logit of the mean of
of linear scores f                      their probabilities (layer ``soft_vote``)
``OutputCodeClassifier`` of linear      ``|y - c_0|^2 - |y - c_1|^2``, by whose sign it decides (y its
ones                                    estimators' scores, c the codes of the classes)
======================================  ====================================================================

The score, first that there is: ``decision_function``; ``log p - log(1 - p)`` of ``predict_proba``, with p clipped to
[1e-6, 1 - 1e-6]; the one column of a transformer; ``predict``. Detectors of outliers and densities, which scikit-learn
marks as such, are negated: higher is more strongly positive, and what a monitor must catch is the unusual.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from elk_stress.probing.probe import FittedProbe
from elk_stress.probing.rowwise import quiet
from elk_stress.probing.wrapping.converted import Stack, agrees, check_opaque, named, trial_rows
from elk_stress.probing.wrapping.layers import stacked
from elk_stress.probing.wrapping.opaque import Opaque

__all__ = ["from_sklearn", "is_sklearn"]

Score = Callable[[np.ndarray], np.ndarray]

_CLIP = 1e-6
# exp of more is infinite or zero in double precision
_LARGEST_LOG = 700.0
# transforms that are affine whatever they were fitted to
_AFFINE = (
    "StandardScaler", "MaxAbsScaler", "RobustScaler", "PCA", "IncrementalPCA", "TruncatedSVD", "SparsePCA",
    "MiniBatchSparsePCA", "FactorAnalysis", "FastICA", "GaussianRandomProjection", "SparseRandomProjection",
    "LinearDiscriminantAnalysis", "NeighborhoodComponentsAnalysis", "PLSRegression", "PLSCanonical", "PLSSVD", "CCA",
)  # fmt: skip
_IMPUTERS = ("SimpleImputer", "KNNImputer", "IterativeImputer")
# whose score is that of the estimator inside
_AROUND_ONE = (
    "FixedThresholdClassifier", "TunedThresholdClassifierCV", "SelfTrainingClassifier", "RANSACRegressor",
)  # fmt: skip


def is_sklearn(obj: Any) -> bool:
    """Whether it is an estimator by its methods: scikit-learn's own, or of a library that keeps to its conventions."""
    return hasattr(obj, "get_params") and any(
        hasattr(obj, method) for method in ("predict", "decision_function", "score_samples", "transform")
    )


def from_sklearn(obj: Any, name: str | None, dim: int | None, site: str) -> FittedProbe:
    from sklearn.base import is_clusterer
    from sklearn.exceptions import NotFittedError
    from sklearn.utils.validation import check_is_fitted

    kind = type(obj).__name__
    steps = _opened(obj)
    try:
        for step in steps:
            check_is_fitted(step)
    except NotFittedError:
        raise ValueError(f"{kind} is not fitted; call its fit(activations, labels) first, then wrap it") from None
    if is_clusterer(steps[-1]):
        raise TypeError(f"{kind} finds clusters and scores nothing; wrap a classifier, a regressor or a detector")
    classes = getattr(obj, "classes_", None)
    if classes is not None and (isinstance(classes, list) or len(classes) != 2):
        found = "several outputs" if isinstance(classes, list) else f"{len(classes)} classes {np.asarray(classes)!r}"
        raise ValueError(
            f"{kind} has {found}; a probe answers one question: fit it on two classes, of which the second "
            "(classes_[1]) is the positive"
        )
    width = next((int(s.n_features_in_) for s in (obj, *steps) if hasattr(s, "n_features_in_")), dim)
    if width is None:
        raise TypeError(f"{kind} does not tell how many features it reads; pass dim=")
    score, how, limit = _score(obj)
    notes = {"from": kind, "score": how}
    if classes is not None:
        notes["positive"] = str(np.asarray(classes)[1])
    for stack in (_stack(obj, width), _read_off(obj, score, width)):
        if stack is not None:
            # what is converted is not clipped
            made = named(stacked(stack, dim=width, site=site), name or kind, {**notes, "score": how.partition(",")[0]})
            if agrees(made, score, 1e-8, limit):
                return made
    called = name or kind
    rows = next(trial_rows(width))
    try:
        with quiet():
            given = np.asarray(score(rows))
    except Exception as error:  # whatever somebody's estimator raises at rows that it was not made for
        raise ValueError(
            f"{kind} does not score real rows of {width} features: {type(error).__name__}: {str(error)[:300]}; a probe "
            "must score whatever a model may think"
        ) from error
    if given.shape != (len(rows),):
        raise ValueError(
            f"{kind} gives {given.shape[1:]} outputs a row; a probe has one score: fit it on one target, or to one "
            "component (n_components=1), or put a classifier behind it"
        )
    check_opaque(score, width, called)
    recipe = Opaque(called, score, "numpy", False)
    return FittedProbe(recipe, {}, site, {**notes, "as": "opaque, without a gradient"}, width)


def _own(obj: Any, *names: str) -> bool:
    """Whether it is a scikit-learn class of one of these names, and not somebody's class of the same name."""
    return type(obj).__module__.startswith("sklearn.") and type(obj).__name__ in names


def _inner(obj: Any) -> Any:
    """The one estimator that an estimator hands its rows to, or ``None``."""
    if hasattr(obj, "best_estimator_"):
        return obj.best_estimator_
    if _own(obj, "FrozenEstimator"):
        return obj.estimator
    if _own(obj, *_AROUND_ONE):
        return getattr(obj, "estimator_", None)
    if _own(obj, "OneVsRestClassifier", "OneVsOneClassifier") and len(getattr(obj, "estimators_", ())) == 1:
        return obj.estimators_[0]
    return None


def _opened(obj: Any) -> list[Any]:
    """Transforms and the estimator at their end, without what only hands rows on; ``passthrough`` left out."""
    inner = _inner(obj)
    if inner is not None:
        return _opened(inner)
    if hasattr(obj, "steps") and hasattr(obj, "named_steps"):
        kept = [step for _, step in obj.steps if step is not None and not isinstance(step, str)]
        return [part for step in kept for part in _opened(step)] or [obj]
    if _own(obj, "RFE", "RFECV") and hasattr(obj, "estimator_"):
        return [obj, *_opened(obj.estimator_)]
    return [obj]


def _score(obj: Any) -> tuple[Score, str, float]:
    """The score of numpy rows, higher = more strongly positive, how it is read, and at what size it is clipped."""
    from sklearn.base import DensityMixin, is_classifier, is_outlier_detector, is_regressor
    from sklearn.neighbors import KernelDensity

    if _own(obj, "OneVsOneClassifier", "OneVsRestClassifier") and _inner(obj) is not None:
        obj = _inner(obj)
    last = _opened(obj)[-1]
    outlier, density = is_outlier_detector(last), isinstance(last, (DensityMixin, KernelDensity))
    sign = -1.0 if outlier or density else 1.0
    prefix = "-" if sign < 0 else ""

    def reading(method: str, after: Callable[[Any], Any] = lambda y: y) -> Score:
        return lambda x: sign * np.asarray(after(getattr(obj, method)(_frame(obj, x))), dtype=float)

    def column(y: Any) -> np.ndarray:
        y = _dense(y)
        return np.asarray(y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y)

    if density:
        return reading("score_samples"), "-score_samples", math.inf
    if hasattr(obj, "decision_function"):
        return reading("decision_function"), f"{prefix}decision_function", math.inf
    if _own(obj, "OutputCodeClassifier"):
        return lambda x: _code_margin(obj, x), "margin between the codes of the classes", math.inf
    if hasattr(obj, "predict_proba"):

        def logit(p: Any) -> np.ndarray:
            share = np.clip(_dense(p)[:, 1], _CLIP, 1 - _CLIP)
            return np.asarray(np.log(share) - np.log1p(-share))

        how = f"logit of predict_proba, clipped to [{_CLIP:g}, 1 - {_CLIP:g}]"
        return reading("predict_proba", logit), how, math.log(1 / _CLIP - 1)
    if outlier and hasattr(obj, "predict"):
        return reading("predict"), "-predict", math.inf
    if hasattr(obj, "predict") and hasattr(obj, "classes_"):
        positive = obj.classes_[1]
        by_class = reading("predict", lambda y: np.where(np.asarray(y) == positive, 1.0, -1.0))
        return by_class, "predict as +1 and -1", math.inf
    if hasattr(obj, "predict") and _log_link(last):

        def log(y: Any) -> np.ndarray:
            with np.errstate(divide="ignore"):
                return np.asarray(np.clip(np.log(y), -_LARGEST_LOG, _LARGEST_LOG))

        return reading("predict", log), "log of predict", _LARGEST_LOG
    if hasattr(obj, "transform") and not (hasattr(obj, "predict") and (is_regressor(last) or is_classifier(last))):
        return reading("transform", column), "transform", math.inf
    if hasattr(obj, "predict"):
        return reading("predict", column), "predict", math.inf
    raise TypeError(
        f"{type(obj).__name__} scores no new rows as a classifier, a regressor, a detector or a transformer would; fit "
        "it so that it does (novelty=True for LocalOutlierFactor), or wrap a function that scores"
    )


def _log_link(last: Any) -> bool:
    if _own(last, "TweedieRegressor"):
        return bool(last.link == "log" or (last.link == "auto" and last.power > 0))
    return _own(last, "PoissonRegressor", "GammaRegressor")


def _frame(estimator: Any, x: np.ndarray) -> Any:
    """Rows as an estimator wants them: float64, in order, writable; under column names, where it was fitted on some."""
    rows = np.array(x, dtype=float, order="C")
    names = getattr(estimator, "feature_names_in_", None)
    if names is None:
        return rows
    try:
        pandas = importlib.import_module("pandas")
    except ImportError:
        return rows
    return pandas.DataFrame(rows, columns=names)


def _code_margin(obj: Any, x: np.ndarray) -> np.ndarray:
    def answer(estimator: Any) -> np.ndarray:
        rows = _frame(estimator, x)
        if hasattr(estimator, "decision_function"):
            return np.ravel(estimator.decision_function(rows))
        known = hasattr(estimator, "predict_proba")
        return np.asarray(estimator.predict_proba(rows)[:, 1] if known else estimator.predict(rows))

    answers = np.stack([answer(e) for e in obj.estimators_], axis=1)
    first, second = (((answers - code) ** 2).sum(axis=1) for code in obj.code_book_)
    return np.asarray(first - second)


# -- conversion -------------------------------------------------------------------------------------------------------


def _stack(obj: Any, width: int) -> Stack | None:
    """The estimator behind its transforms as layers, or ``None`` where a part is not affine or unknown."""
    *transforms, last = _opened(obj)
    found: Stack = []
    if not all(_is_affine(step) for step in transforms):
        return None
    if transforms:

        def carried(x: np.ndarray) -> np.ndarray:
            rows = _frame(transforms[0], x)
            for step in transforms:
                rows = step.transform(rows)
            return _dense(rows)

        weight, bias = _affine_map(carried, width)
        found.append(("affine", (weight, bias)))
        width = weight.shape[1]
    ending = _ending(last, width)
    return None if ending is None else [*found, *ending]


def _ending(last: Any, width: int) -> Stack | None:
    """The estimator at the end, or a transform that stands there."""
    if hasattr(last, "coefs_") and hasattr(last, "intercepts_"):
        return _network(last)
    if _own(last, "CalibratedClassifierCV"):
        return _calibrated(last, width)
    if _own(last, "OutputCodeClassifier"):
        return _coded(last, width)
    weight, bias = getattr(last, "coef_", None), getattr(last, "intercept_", 0.0)
    if weight is None or np.size(bias) != 1 or _dense(weight).size != width:
        return None
    return [("affine", (np.reshape(_dense(weight), (width, 1)), np.reshape(bias, 1)))]


def _read_off(obj: Any, score: Score, width: int) -> Stack | None:
    """A score that is affine by its kind, from what it is at the origin and along the axes."""
    *transforms, last = _opened(obj)
    linear = hasattr(last, "coef_") or (_own(last, "KernelRidge") and last.kernel == "linear") or _is_affine(last)
    if not linear or _log_link(last) or not all(_is_affine(step) for step in transforms):
        return None
    try:
        weight, bias = _affine_map(lambda x: score(x).reshape(len(x), -1), width)
    except Exception:  # rows outside its domain: it is no affine map
        return None
    return [("affine", (weight, bias))] if weight.shape[1] == 1 else None


def _network(last: Any) -> Stack | None:
    hidden = {"identity": None, "relu": "relu", "tanh": "tanh", "logistic": "sigmoid"}
    if last.activation not in hidden or last.out_activation_ not in ("identity", "logistic"):
        return None
    found: Stack = []
    for k, (weight, bias) in enumerate(zip(last.coefs_, last.intercepts_, strict=True)):
        name = hidden[last.activation]
        if k and name is not None:
            found.append((name, ()))
        found.append(("affine", (weight, bias)))
    return found if last.coefs_[-1].shape[1] == 1 else None


def _calibrated(last: Any, width: int) -> Stack | None:
    folds = []
    for fold in last.calibrated_classifiers_:
        linear = _linear(fold.estimator, width) if hasattr(fold.estimator, "decision_function") else None
        if linear is None or not hasattr(fold.calibrators[0], "a_"):
            return None
        (weight, bias), sigmoid = linear, fold.calibrators[0]
        folds.append((-sigmoid.a_ * weight, -sigmoid.a_ * bias - sigmoid.b_))
    weights, biases = (np.stack(parts, axis=-1) for parts in zip(*folds, strict=True))
    return [("affine", (weights, biases)), *([("soft_vote", ())] if len(folds) > 1 else [])]


def _coded(last: Any, width: int) -> Stack | None:
    first, second = last.code_book_
    total, offset = np.zeros(width), float((first**2 - second**2).sum())
    for estimator, factor in zip(last.estimators_, 2 * (second - first), strict=True):
        if factor == 0:
            continue
        linear = _linear(estimator, width)
        if linear is None:
            return None
        total, offset = total + factor * linear[0], offset + factor * linear[1]
    return [("affine", (total[:, None], np.array([offset])))]


def _linear(obj: Any, width: int) -> tuple[np.ndarray, float] | None:
    stack = _stack(obj, width)
    made = None if stack is None else stacked(stack, dim=width)
    if made is None or not made.traits.linear:
        return None
    return np.asarray(made.parameters["weight"]), float(made.parameters["bias"])


def _is_affine(step: Any) -> bool:
    """Whether a transform is affine whatever it was fitted to."""
    from sklearn.feature_selection import SelectorMixin

    if step is None or isinstance(step, str):
        return step in (None, "passthrough", "drop")
    if _own(step, "ColumnTransformer"):
        return all(_is_affine(part) for _, part, _ in step.transformers_)
    if _own(step, "FeatureUnion"):
        return all(_is_affine(part) for _, part in step.transformer_list)
    if _own(step, "Pipeline"):
        return all(_is_affine(part) for _, part in step.steps)
    if _own(step, "FrozenEstimator"):
        return _is_affine(step.estimator)
    if _own(step, "FunctionTransformer"):
        return step.func is None
    if _own(step, "MinMaxScaler"):
        return not step.clip
    if _own(step, "PolynomialFeatures"):
        return bool(step.degree == 1)
    if _own(step, *_IMPUTERS):
        # a number that stands for "missing" makes a jump there
        return bool(step.missing_values is None or step.missing_values != step.missing_values)
    return isinstance(step, SelectorMixin) or _own(step, *_AFFINE)


def _affine_map(transform: Callable[[np.ndarray], np.ndarray], width: int) -> tuple[np.ndarray, np.ndarray]:
    """``(weight (d, d'), bias (d',))`` of an affine map of rows."""
    bias = np.asarray(transform(np.zeros((1, width))), dtype=float)[0]
    weight = np.asarray(transform(np.eye(width)), dtype=float) - bias
    # an offset much larger than the step would leave few digits of it
    steep = np.abs(weight).max(axis=1)
    offset = np.abs(bias).max(initial=0.0)
    with np.errstate(divide="ignore"):
        length = np.exp2(np.clip(np.ceil(np.log2(offset / np.where(steep > 0, steep, np.inf))), 0, 60))
    if (length > 1).any():
        weight = (np.asarray(transform(np.diag(length)), dtype=float) - bias) / length[:, None]
    return weight, bias


def _dense(array: Any) -> np.ndarray:
    return np.asarray(array.toarray() if hasattr(array, "toarray") else array)
