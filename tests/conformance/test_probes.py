"""Every registered probe passes the public suite; and the suite catches probes that are wrong on purpose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest

from elk_stress import registry
from elk_stress.probe import FittedProbe, Probe, Traits, as_fitted
from elk_stress.testing import check_probe, checks_for_probe, planted_classes

NAMES = registry.names("probes")
CASES = [(name, check) for name in NAMES for check in checks_for_probe(registry.load("probes", name))]


@pytest.mark.parametrize(("name", "check"), CASES, ids=lambda value: str(value))
def test_registered_probe(name: str, check: str) -> None:
    checks_for_probe(registry.load("probes", name))[check]()


@pytest.mark.parametrize("name", NAMES)
def test_registered_under_its_own_name(name: str) -> None:
    probe = registry.load("probes", name)
    assert isinstance(probe, Probe)
    assert probe.name == name


def test_check_probe_runs_all_and_returns_their_names() -> None:
    rock = registry.load("probes", "rock")
    assert check_probe(rock) == list(checks_for_probe(rock))


@dataclass(frozen=True)
class Broken:
    """A mass-mean probe with one fault planted."""

    fault: str
    name: ClassVar[str] = "broken"
    traits: ClassVar[Traits] = Traits(linear=True, rotation_equivariant=True)

    def fit(
        self, activations: np.ndarray, labels: np.ndarray, *, pairs: np.ndarray | None = None, seed: int = 0
    ) -> FittedProbe:
        weight = activations[labels == 1].mean(axis=0) - activations[labels == 0].mean(axis=0)
        bias = -activations.mean(axis=0) @ weight
        if self.fault == "sign":
            weight, bias = -weight, -bias
        if self.fault == "unseeded":
            weight = weight + np.random.default_rng().standard_normal(weight.shape) * 1e-6
        if self.fault == "edits its input":
            activations[0] = 0.0
        if self.fault == "scales per feature":
            weight = weight / activations.std(axis=0) ** 2
        if self.fault == "ignores the labels":
            weight = np.ones_like(weight)
        if self.fault == "list parameter":
            return FittedProbe(self, {"weight": weight, "bias": bias})
        return FittedProbe(self, {"weight": weight, "bias": np.asarray(bias)})

    def score(self, xp: Any, parameters: Mapping[str, Any], activations: Any) -> Any:
        out = xp.matmul(activations, parameters["weight"]) + parameters["bias"]
        if self.fault == "leaves the graph":
            return np.asarray(out.detach() if hasattr(out, "detach") else out)
        if self.fault == "keeps an axis":
            return out[..., None]
        if self.fault == "normalizes over the batch" and activations.ndim > 1:
            return out / xp.max(abs(out))
        if self.fault == "not linear":
            return out * abs(out)
        return out


FAULTS = {
    "sign": "learns",
    "unseeded": "deterministic",
    "edits its input": "inputs_are_left_alone",
    "scales per feature": "rotation_equivariant",
    "ignores the labels": "learns",
    "leaves the graph": "array_libraries",
    "keeps an axis": "shapes",
    "normalizes over the batch": "rows_are_independent",
    "not linear": "linear",
}


@pytest.mark.parametrize(("fault", "check"), FAULTS.items(), ids=FAULTS)
def test_suite_catches(fault: str, check: str) -> None:
    with pytest.raises(AssertionError) if fault != "edits its input" else pytest.raises(ValueError, match="read-only"):
        checks_for_probe(Broken(fault))[check]()


def test_suite_passes_the_same_probe_without_a_fault() -> None:
    checks = checks_for_probe(Broken("none"))
    # saving needs a registered name; every other check must pass, or the faults above prove nothing
    for name in checks.keys() - {"save_and_load"}:
        checks[name]()


def test_failure_names_the_probe_and_the_check() -> None:
    with pytest.raises(AssertionError, match=r"probe 'broken' fails the check 'shapes'"):
        check_probe(Broken("keeps an axis"))


def test_control_that_learns_is_caught() -> None:
    @dataclass(frozen=True)
    class Cheat(Broken):
        """Claims to be a control and learns."""

        traits: ClassVar[Traits] = Traits(learns=False, linear=True)

    with pytest.raises(AssertionError, match="learns=False"):
        checks_for_probe(Cheat("none"))["does_not_learn"]()


def test_uncovered_traits_fail_rather_than_pass_unseen() -> None:
    @dataclass(frozen=True)
    class Tokens(Broken):
        """A probe that no suite covers."""

        traits: ClassVar[Traits] = Traits(tokens=True)

    with pytest.raises(AssertionError, match="no suite covers"):
        check_probe(Tokens("none"))


# -- what only these six promise ---------------------------------------------------------------------------------------


def test_rock_catches_nothing() -> None:
    data = planted_classes()
    scores = as_fitted("rock", data.activations, data.labels).score(data.activations)
    threshold = np.sort(scores[data.labels == 0])[-1]
    assert not (scores > threshold).any()


def test_random_direction_is_scaled_by_the_spread() -> None:
    data = planted_classes()
    scores = as_fitted("random_direction", data.activations * 50, data.labels, seed=3).score(data.activations * 50)
    assert scores.std() == pytest.approx(1.0)
    assert scores.mean() == pytest.approx(0.0, abs=1e-9)


def test_lda_agrees_with_scikit_learn_at_a_fixed_covariance() -> None:
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    data = planted_classes(n_pairs=400)
    ours = as_fitted(registry.load("probes", "lda", shrinkage=0.0), data.activations, data.labels)
    rival = LinearDiscriminantAnalysis(solver="lsqr", priors=[0.5, 0.5]).fit(data.activations, data.labels)
    n = len(data.labels)
    # scikit-learn divides by n, we by n - 2
    np.testing.assert_allclose(ours.score(data.activations) * n / (n - 2), rival.decision_function(data.activations))


@pytest.mark.parametrize("name", [n for n in NAMES if registry.load("probes", n).traits.learns])
def test_learns_with_fewer_rows_than_dimensions(name: str) -> None:
    from sklearn.metrics import roc_auc_score

    train, test = (planted_classes(n, 200, separation=8.0, seed=s) for s, n in ((0, 40), (1, 100)))
    fitted = as_fitted(name, train.activations, train.labels, pairs=train.pairs)
    assert roc_auc_score(test.labels, fitted.score(test.activations)) > 0.9


def test_logistic_is_where_its_objective_is_least() -> None:
    """Its gradient, written out from the docstring in standardized coordinates, vanishes."""
    from scipy.special import expit

    data = planted_classes(seed=4)
    keep = np.flatnonzero((data.labels == 1) | (np.arange(len(data.labels)) % 3 == 0))
    rows, labels = data.activations[keep], data.labels[keep]
    fitted = as_fitted("logistic", rows, labels)
    sd = rows.std(axis=0)
    v = fitted.parameters["weight"] * sd
    share = np.where(labels == 1, 0.5 / (labels == 1).sum(), 0.5 / (labels == 0).sum())
    slope = share * (expit(fitted.score(rows)) - labels)
    np.testing.assert_allclose(slope @ ((rows - rows.mean(axis=0)) / sd) + 0.01 * v, 0.0, atol=1e-5)
    assert abs(slope.sum()) < 1e-5


def test_logistic_does_not_change_when_every_row_is_repeated() -> None:
    data = planted_classes()
    once = as_fitted("logistic", data.activations, data.labels)
    often = as_fitted("logistic", np.repeat(data.activations, 5, axis=0), np.repeat(data.labels, 5))
    np.testing.assert_allclose(once.parameters["weight"], often.parameters["weight"], atol=1e-4)


def test_constant_feature_gets_no_weight() -> None:
    data = planted_classes()
    rows = np.concatenate([data.activations, np.full((len(data.labels), 1), 1e4)], axis=1)
    for name in ("logistic", "ccs"):
        assert as_fitted(name, rows, data.labels, pairs=data.pairs).parameters["weight"][-1] == 0.0


def test_ccs_reads_labels_for_the_sign_only() -> None:
    data = planted_classes()
    upright = as_fitted("ccs", data.activations, data.labels, pairs=data.pairs)
    flipped = as_fitted("ccs", data.activations, 1 - data.labels, pairs=data.pairs)
    for name in ("weight", "bias"):
        np.testing.assert_array_equal(upright.parameters[name], -flipped.parameters[name])
    # a few wrong labels change nothing at all
    noisy = data.labels.copy()
    noisy[data.pairs[:20].ravel()] ^= 1
    again = as_fitted("ccs", data.activations, noisy, pairs=data.pairs)
    np.testing.assert_array_equal(upright.parameters["weight"], again.parameters["weight"])


def test_ccs_scores_a_single_statement_alike_in_either_half() -> None:
    """Under each half's own normalization the scores are the same: the form of a statement is no answer."""
    data = planted_classes()
    fitted = as_fitted("ccs", data.activations, data.labels, pairs=data.pairs)
    affirmed, negated = (data.activations[data.pairs[:, i]] for i in (0, 1))
    form = (affirmed.mean(axis=0) - negated.mean(axis=0)) @ fitted.parameters["weight"]
    assert abs(form) < 1e-9
    # without the constraint the planted form (two units apart) would show: the means do differ
    assert np.linalg.norm(affirmed.mean(axis=0) - negated.mean(axis=0)) > 1.9
    assert fitted.notes["sign_agreement"] > 0.95


def test_ccs_gradient_matches_finite_differences() -> None:
    from elk_stress.probes.ccs import _loss

    rng = np.random.default_rng(np.random.SeedSequence(0))
    plus, minus, point = rng.standard_normal((30, 4)), rng.standard_normal((30, 4)), rng.standard_normal((3, 5))
    _, gradient = _loss(plus, minus, point, 0.1)
    for axis in range(5):
        step = np.eye(5)[axis] * 1e-4
        slope = (_loss(plus, minus, point + step, 0.1)[0] - _loss(plus, minus, point - step, 0.1)[0]) / 2e-4
        # the two large products run in float32 on purpose
        np.testing.assert_allclose(gradient[:, axis], slope, atol=2e-3)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (None, "contrast pairs"),
        (np.zeros((0, 2), dtype=int), "contrast pairs"),
        (np.zeros((4, 3), dtype=int), r"shape \(n_pairs, 2\)"),
        (np.array([[0, 1], [2, 999]]), "999"),
        (np.array([[0, 160]]), "at least 2"),
        (np.array([[0.0, 1.0], [2.0, 3.0]]), "integer"),
    ],
    ids=["none", "empty", "shape", "range", "one", "floats"],
)
def test_ccs_refuses_bad_pairs(pairs: np.ndarray | None, message: str) -> None:
    data = planted_classes()
    with pytest.raises(ValueError, match=message):
        as_fitted("ccs", data.activations, data.labels, pairs=pairs)


def test_refused_hyperparameters_say_the_way_out() -> None:
    data = planted_classes(n_pairs=4, dim=16)
    with pytest.raises(ValueError, match="l2 must be above 0"):
        as_fitted(registry.load("probes", "logistic", l2=0.0), data.activations, data.labels)
    with pytest.raises(ValueError, match="singular at shrinkage 0"):
        as_fitted(registry.load("probes", "lda", shrinkage=0.0), data.activations, data.labels)
