"""Every estimator of scikit-learn that two classes can be fitted to, and what pipelines are made of.

The right values are scikit-learn's own: the score ranks rows as the estimator does, and what is linear is it to 1e-8.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from sklearn.base import (
    DensityMixin,
    MetaEstimatorMixin,
    OutlierMixin,
    is_classifier,
    is_outlier_detector,
    is_regressor,
)  # fmt: skip
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import ColumnTransformer
from sklearn.decomposition import PCA, FactorAnalysis
from sklearn.ensemble import RandomForestClassifier
from sklearn.feature_selection import RFE, SelectKBest
from sklearn.impute import KNNImputer, SimpleImputer
from sklearn.linear_model import LogisticRegression, PoissonRegressor, Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.multiclass import OneVsOneClassifier, OneVsRestClassifier, OutputCodeClassifier
from sklearn.neighbors import LocalOutlierFactor
from sklearn.pipeline import make_pipeline, make_union
from sklearn.preprocessing import FunctionTransformer, MinMaxScaler, Normalizer, StandardScaler
from sklearn.svm import SVC, LinearSVC, OneClassSVM
from sklearn.utils import all_estimators

from elk_stress import wrap
from elk_stress.probing.probe import FittedProbe

DIM = 5
_RNG = np.random.default_rng(np.random.SeedSequence([17, 3]))
X = 2 * _RNG.standard_normal((80, DIM)) + 3
Y = (X[:, 0] - X[:, 1] + 0.3 * _RNG.standard_normal(80) > 0).astype(int)
Z = X + 0.3 * _RNG.standard_normal(X.shape)

# the score of a linear estimator is a linear probe: these, besides those with ``coef_``
LINEAR = {
    "FixedThresholdClassifier", "TunedThresholdClassifierCV", "OneVsRestClassifier", "OneVsOneClassifier",
    "OutputCodeClassifier", "RFE", "RFECV", "SelfTrainingClassifier", "RANSACRegressor", "KernelRidge", "GridSearchCV",
    "RandomizedSearchCV", "FrozenEstimator",
}  # fmt: skip
# real rows have no score here: negative counts, rows without neighbours, a detector of what it was fitted on alone
REFUSED = {
    "CategoricalNB": "does not score", "RadiusNeighborsClassifier": "does not score",
    "LocalOutlierFactor": "cannot wrap",
}  # fmt: skip


def _made(cls: Any) -> Any:
    """The estimator fitted to two classes, or ``None`` where it is not made for that."""
    name = cls.__name__
    inner = LogisticRegression()
    make: dict[str, Callable[[], Any]] = {
        "GridSearchCV": lambda: cls(inner, {"C": [0.1, 1.0]}),
        "RandomizedSearchCV": lambda: cls(inner, {"C": [0.1, 1.0]}, n_iter=2),
        "FrozenEstimator": lambda: cls(inner.fit(X, Y)),
        "SelfTrainingClassifier": lambda: cls(inner),
        "OutputCodeClassifier": lambda: cls(inner, code_size=3, random_state=0),
        "VotingClassifier": lambda: cls([("a", inner), ("b", SVC(kernel="linear"))]),
        "VotingRegressor": lambda: cls([("a", Ridge())]),
        "StackingClassifier": lambda: cls([("a", inner)], cv=2),
        "StackingRegressor": lambda: cls([("a", Ridge())], cv=2),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            try:
                made = make.get(name, cls)()
            except TypeError:
                made = cls(inner)
            small = {"n_estimators": 10, "random_state": 0, "n_components": 1, "n_jobs": None, "max_iter": 300}
            if not name.endswith(("Search", "SearchCV")):
                given = made.get_params(deep=False)
                made.set_params(**{k: v for k, v in small.items() if k in given})
            return made.fit(np.abs(X) if name.endswith("NB") else X, Y + 1.0 if name == "GammaRegressor" else Y)
        except (TypeError, ValueError, AttributeError, IndexError):
            return None


def _scoring() -> list[str]:
    """Names of all classifiers and regressors of one target, detectors, densities, and what goes around one."""
    found = {name for name, _ in all_estimators(type_filter=["classifier", "regressor"])}
    found |= {
        name for name, cls in all_estimators() if issubclass(cls, (OutlierMixin, DensityMixin, MetaEstimatorMixin))
    }
    # transformers, several targets, one feature; without neighbours a row has no score
    several = (
        "RandomTreesEmbedding", "RadiusNeighborsRegressor", "Multi", "ClassifierChain", "RegressorChain", "Isotonic",
        "SelectFromModel", "SequentialFeature",
    )  # fmt: skip
    return sorted(n for n in found | {"KernelDensity"} if not n.startswith(several))


ALL = dict(all_estimators())


def _own_score(fitted: Any) -> np.ndarray:
    """What scikit-learn itself says, higher = more strongly positive."""
    if hasattr(fitted, "decision_function"):
        own = fitted.decision_function(Z)
    elif hasattr(fitted, "predict_proba") and is_classifier(fitted):
        p = fitted.predict_proba(Z)[:, 1]
        own = np.log(np.clip(p, 1e-6, 1 - 1e-6)) - np.log1p(-np.clip(p, 1e-6, 1 - 1e-6))
    elif hasattr(fitted, "predict") and (is_classifier(fitted) or is_regressor(fitted)):
        own = fitted.predict(Z)
    else:
        own = fitted.score_samples(Z)
    kind = type(fitted).__name__
    normal = is_outlier_detector(fitted) or kind.endswith("Mixture") or kind == "KernelDensity"
    return np.asarray(-own if normal else own, dtype=float)


def _ranks_alike(score: np.ndarray, own: np.ndarray) -> bool:
    """Whether no two rows stand in opposite order, beyond rounding."""
    size = 1e-9 * (1 + np.abs(own).max())
    ordered = own[np.argsort(score, kind="stable")]
    return bool((ordered - np.maximum.accumulate(ordered) >= -size).all())


@pytest.mark.parametrize("name", _scoring())
def test_every_estimator_is_ranked_as_it_ranks_itself_and_linear_ones_exactly(name: str) -> None:
    fitted = _made(ALL[name])
    if fitted is None:
        pytest.skip(f"{name} cannot be fitted to two classes")
    if name in REFUSED:
        with pytest.raises((TypeError, ValueError), match=REFUSED[name]):
            wrap(fitted)
        return
    probe, own = wrap(fitted), _own_score(fitted)
    score = np.asarray(probe.score(Z))
    assert np.isfinite(score).all()
    if name == "OutputCodeClassifier":
        # it only predicts; ranks of a margin are held against the decisions
        assert np.array_equal(score > 0, fitted.predict(Z) == 1)
    else:
        assert _ranks_alike(score, own)
        assert np.ptp(score) > 0 or np.ptp(own) == 0
    linear = hasattr(fitted, "coef_") or name in LINEAR
    assert probe.traits.linear == linear, probe.notes
    if linear and hasattr(fitted, "decision_function") and name != "OneVsOneClassifier":
        np.testing.assert_allclose(score, own, rtol=1e-8, atol=1e-8)


def test_the_estimators_above_are_about_all_that_there_are() -> None:
    assert sum(_made(ALL[name]) is not None for name in _scoring()) >= 85


# features of very different sizes and a large offset: digits must not get lost where a map is read off
_W = 3 * _RNG.standard_normal((200, 6)) + 5
_W[:, 2] *= 100
_W[:, 3] += 1e6
V = (_W[:, 0] - _W[:, 1] + 0.5 * _RNG.standard_normal(200) > 0).astype(int)
NEAR = _W[:50] + _RNG.standard_normal((50, 6))


def _logistic() -> Any:
    return make_pipeline(StandardScaler(), LogisticRegression())


AFFINE: dict[str, Any] = {
    "imputer": make_pipeline(SimpleImputer(add_indicator=True), _logistic()),
    "neighbours' imputer": make_pipeline(KNNImputer(), _logistic()),
    "columns": make_pipeline(
        ColumnTransformer(
            [("a", StandardScaler(), [0, 3]), ("b", "passthrough", [1]), ("c", "drop", [2])], remainder=MinMaxScaler()
        ),
        _logistic(),
    ),
    "union": make_pipeline(StandardScaler(), make_union(PCA(2), SelectKBest(k=2), "passthrough"), _logistic()),
    "no function": make_pipeline(FunctionTransformer(), _logistic()),
    "one against the rest": OneVsRestClassifier(_logistic()),
    "elimination": make_pipeline(StandardScaler(), RFE(LogisticRegression(), n_features_to_select=3)),
    "search in a pipeline": make_pipeline(StandardScaler(), GridSearchCV(LogisticRegression(), {"C": [0.1, 1.0]})),
    "linear kernel": make_pipeline(StandardScaler(), SVC(kernel="linear")),
    "one class": make_pipeline(StandardScaler(), OneClassSVM(kernel="linear")),
}


@pytest.mark.parametrize("name", AFFINE)
def test_affine_parts_are_multiplied_into_one_exact_direction(name: str) -> None:
    fitted = AFFINE[name].fit(_W, V)
    probe = wrap(fitted)
    assert probe.traits.linear
    expected = fitted.decision_function(NEAR) * (-1 if name == "one class" else 1)
    np.testing.assert_allclose(probe.score(NEAR), expected, rtol=1e-8, atol=1e-8)


NOT_AFFINE: dict[str, Any] = {
    "clipped": make_pipeline(MinMaxScaler(clip=True), _logistic()),
    "a number for missing": make_pipeline(SimpleImputer(missing_values=999.0), _logistic()),
    "a function": make_pipeline(FunctionTransformer(np.arctan), _logistic()),
    "a column's function": make_pipeline(
        ColumnTransformer([("a", FunctionTransformer(np.arctan), [0])], remainder="passthrough"), _logistic()
    ),
    "normalized": make_pipeline(make_union(Normalizer(), "passthrough"), _logistic()),
}


@pytest.mark.parametrize("name", NOT_AFFINE)
def test_what_is_not_affine_for_every_row_is_called_as_it_is(name: str) -> None:
    fitted = NOT_AFFINE[name].fit(_W, V)
    probe = wrap(fitted)
    assert not probe.traits.differentiable
    # where it bends is far from the rows that a conversion is tried on
    rows = np.concatenate([NEAR, 10 * NEAR, np.where(np.eye(6) > 0, 999.0, NEAR[:6])])
    np.testing.assert_array_equal(probe.score(rows), fitted.decision_function(rows))


def test_a_clip_beyond_all_rows_that_are_tried_is_still_a_clip() -> None:
    wide = 1000 * np.random.default_rng(4).standard_normal((100, DIM))
    fitted = make_pipeline(MinMaxScaler(clip=True), LogisticRegression()).fit(wide, wide[:, 0] > 0)
    np.testing.assert_array_equal(wrap(fitted).score(5 * wide), fitted.decision_function(5 * wide))


@pytest.mark.parametrize("folds", [1, 2, 5])
def test_a_linear_estimator_calibrated_by_sigmoids_is_the_logit_of_its_probability(folds: int) -> None:
    import jax
    import jax.numpy as jnp

    inner = make_pipeline(StandardScaler(), LinearSVC())
    fitted = CalibratedClassifierCV(inner, cv=max(folds, 2), ensemble=folds > 1).fit(_W, V)
    probe = wrap(fitted)
    assert probe.traits.linear == (folds == 1)
    assert probe.traits.differentiable
    p = fitted.predict_proba(NEAR)[:, 1]
    np.testing.assert_allclose(probe.score(NEAR), np.log(p) - np.log1p(-p), rtol=1e-8, atol=1e-8)
    # far out, where probabilities have no digits left, it goes on in single precision
    far = jnp.asarray(_W.mean(axis=0) + 30 * (NEAR - _W.mean(axis=0)), dtype=jnp.float32)
    assert len(np.unique(np.asarray(probe.score(far)))) == len(far)
    assert np.isfinite(jax.grad(lambda v: probe.score(v).sum())(far)).all()


def test_a_calibrated_probe_of_several_folds_is_saved(tmp_path: Any) -> None:
    probe = wrap(CalibratedClassifierCV(LinearSVC(), cv=3).fit(X, Y))
    assert probe.name == "layers"
    loaded = FittedProbe.load(probe.save(tmp_path))
    np.testing.assert_array_equal(loaded.score(Z), probe.score(Z))


def test_isotonic_calibration_and_forests_under_codes_stay_opaque() -> None:
    isotonic = wrap(CalibratedClassifierCV(LinearSVC(), method="isotonic", cv=3).fit(X, Y))
    coded = OutputCodeClassifier(RandomForestClassifier(5, random_state=0), code_size=4, random_state=1).fit(X, Y)
    assert not isotonic.traits.differentiable
    probe = wrap(coded)
    assert not probe.traits.differentiable
    assert np.array_equal(np.asarray(probe.score(Z)) > 0, coded.predict(Z) == 1)


def test_one_against_one_is_the_estimator_inside() -> None:
    fitted = OneVsOneClassifier(_logistic()).fit(X, Y)
    np.testing.assert_allclose(wrap(fitted).score(Z), fitted.estimators_[0].decision_function(Z), rtol=1e-10)


def test_a_log_link_is_left_off() -> None:
    fitted = make_pipeline(StandardScaler(), PoissonRegressor()).fit(X, Y)
    probe = wrap(fitted)
    assert probe.traits.linear
    np.testing.assert_allclose(probe.score(Z), np.log(fitted.predict(Z)), rtol=1e-10, atol=1e-12)


def test_a_transformer_of_one_output_is_that_output_and_no_outlier_score() -> None:
    for fitted in (make_pipeline(StandardScaler(), PCA(1)), PCA(1), FactorAnalysis(1)):
        probe = wrap(fitted.fit(X))
        assert probe.traits.linear
        np.testing.assert_allclose(probe.score(Z), fitted.transform(Z)[:, 0], rtol=1e-10, atol=1e-10)
        assert probe.notes["score"] == "transform"
    bent = make_pipeline(FunctionTransformer(np.tanh), PCA(1)).fit(X)
    np.testing.assert_array_equal(wrap(bent).score(Z), bent.transform(Z)[:, 0])
    for several in (PCA(2).fit(X), make_pipeline(StandardScaler(), PCA(3)).fit(X), StandardScaler().fit(X)):
        with pytest.raises(ValueError, match=r"outputs a row; .*n_components=1"):
            wrap(several)
    with pytest.raises(TypeError, match="cannot wrap LocalOutlierFactor"):
        wrap(LocalOutlierFactor().fit(X))


@pytest.mark.parametrize("classes", [(-1, 1), ("lie", "truth"), (False, True), (3, 7)], ids=str)
def test_the_second_class_is_the_positive_whatever_it_is_called(classes: tuple[Any, Any]) -> None:
    fitted = LogisticRegression().fit(X, np.array(classes)[Y])
    probe = wrap(fitted)
    np.testing.assert_allclose(probe.score(Z), LogisticRegression().fit(X, Y).decision_function(Z), atol=1e-10)
    assert probe.notes["positive"] == str(classes[1])


def test_what_was_fitted_under_column_names_is_called_under_them() -> None:
    pd = pytest.importorskip("pandas")
    table = pd.DataFrame(X, columns=[f"f{i}" for i in range(DIM)])
    columns = ColumnTransformer([("s", StandardScaler(), ["f0", "f3"])], remainder="passthrough")
    linear = make_pipeline(columns.set_output(transform="pandas"), LogisticRegression()).fit(table, Y)
    forest = RandomForestClassifier(5, random_state=0).fit(table, Y)
    # a warning about missing names would be an error here
    np.testing.assert_allclose(
        wrap(linear).score(Z), linear.decision_function(pd.DataFrame(Z, columns=table.columns)), atol=1e-10
    )
    assert wrap(linear).traits.linear
    assert np.ptp(wrap(forest).score(Z)) > 0
