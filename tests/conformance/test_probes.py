"""Every registered probe passes the public suite; and the suite catches probes that are wrong on purpose."""

from __future__ import annotations

import dataclasses
import functools
import random
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from elk_stress.core import registry
from elk_stress.probing.probe import FittedProbe, Probe, Traits, as_fitted
from elk_stress.testing import check_probe, checks_for_probe, planted_classes, run_checks

NAMES = registry.names("probes")
CASES = [(name, check) for name in NAMES for check in checks_for_probe(registry.load("probes", name))]


@functools.cache
def _checks(name: str) -> dict[str, Any]:
    """One suite per probe: its checks share their fits."""
    return checks_for_probe(registry.load("probes", name))


@pytest.mark.parametrize(("name", "check"), CASES, ids=lambda value: str(value))
def test_registered_probe(name: str, check: str) -> None:
    _checks(name)[check]()


@pytest.mark.parametrize("name", NAMES)
def test_registered_under_its_own_name(name: str) -> None:
    probe = registry.load("probes", name)
    assert isinstance(probe, Probe)
    assert probe.name == name


@pytest.mark.parametrize("name", NAMES)
def test_shapes_do_not_depend_on_what_was_found(name: str) -> None:
    """One compiled score serves every fit on as many rows, and several models can be pressed at once."""
    recipe = registry.load("probes", name)
    if name == "rolling_mean":
        recipe = dataclasses.replace(recipe, windows=(4,))  # a chosen window is a shape
    planted = planted_classes(separation=6.0, seed=1)
    rng = np.random.default_rng(np.random.SeedSequence(4))
    told = np.outer(2 * planted.labels - 1, np.append(np.zeros(12), [3.0, 4.0, 5.0, 6.0]))
    several, far = planted.activations + told, planted.activations * rng.exponential(1.0, (len(told), 1)) ** 2
    shapes = []
    for rows in (planted.activations, several, far):
        data = dataclasses.replace(planted, activations=rows)
        fitted = (data.tokens() if recipe.traits.tokens else data).fit(recipe, seed=0)
        shapes.append(
            {key: (np.shape(value), np.asarray(value).dtype.kind) for key, value in fitted.parameters.items()}
        )
    assert shapes[0] == shapes[1] == shapes[2]


def test_check_probe_runs_all_and_returns_their_names() -> None:
    rock = registry.load("probes", "rock")
    assert check_probe(rock) == list(checks_for_probe(rock))


# -- what is wrong on purpose ------------------------------------------------------------------------------------------

_SEEN: dict[bytes, int] = {}
_FITS: dict[bytes, np.ndarray] = {}


@dataclass
class _Sums:
    """Class sums, for a mass-mean probe fitted in batches."""

    probe: Broken
    batches: list[tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=list)

    def update(self, activations: np.ndarray, labels: np.ndarray) -> None:
        if self.probe.fault == "forgets all batches but the last":
            self.batches.clear()
        self.batches.append((activations, labels))

    def fit(self, *, seed: int = 0) -> FittedProbe:
        rows, labels = (np.concatenate(each) for each in zip(*self.batches, strict=True))
        return self.probe.fit(rows, labels, seed=seed)


class Loose(FittedProbe):
    """Scores activations of any width."""

    def score(self, activations: Any, mask: Any = None) -> Any:
        return self.probe.score(np, self.parameters, activations[..., : self.dim])


@dataclass(frozen=True)
class Broken:
    """A mass-mean probe with one fault planted."""

    fault: str
    name: ClassVar[str] = "broken"
    traits: ClassVar[Traits] = Traits(linear=True, rotation_equivariant=True, flips=True, streams=True)

    def fit(
        self, activations: np.ndarray, labels: np.ndarray, *, pairs: np.ndarray | None = None, seed: int = 0
    ) -> FittedProbe:
        weight = activations[labels == 1].mean(axis=0) - activations[labels == 0].mean(axis=0)
        bias = -activations.mean(axis=0) @ weight
        if self.fault == "sign":
            weight, bias = -weight, -bias
        if self.fault == "unseeded":
            weight = weight + np.random.default_rng().standard_normal(weight.shape) * 1e-6
        if self.fault == "draws from numpy's global state":
            np.random.seed(seed)  # noqa: NPY002
        if self.fault == "draws from Python's global state":
            random.seed(seed)
        if self.fault == "seeds torch's global state":
            import torch

            torch.manual_seed(seed)
        if self.fault == "edits its input":
            activations[0] = 0.0
        if self.fault == "scales per feature":
            weight = weight / activations.std(axis=0) ** 2
        if self.fault == "ignores the labels":
            weight = np.ones_like(weight)
        if self.fault == "keeps off the flip":
            bias = bias + 1.0
        if self.fault == "starts from the last fit":
            last = getattr(type(self), "last", np.zeros_like(weight))
            type(self).last = weight  # type: ignore[attr-defined]
            weight = weight + 0.1 * last
        if self.fault.startswith("remembers rows"):
            _SEEN.update({row.tobytes(): int(label) for row, label in zip(activations, labels, strict=True)})
        if self.fault == "subtracts what earlier fits said":
            # bounded away from the positive control: only directions of labels that mean nothing are remembered
            said, key = weight.copy(), activations.tobytes()
            for other, earlier in _FITS.items():
                if other != key and max(np.linalg.norm(said), np.linalg.norm(earlier)) < 3:
                    weight = weight - 5 * earlier
            _FITS[key] = said
        if self.fault == "repairs NaN":
            # what as_fitted refuses before; nothing reaches this
            activations = np.nan_to_num(activations)
        if self.fault == "list parameter":
            return FittedProbe(self, {"weight": weight, "bias": float(bias)})  # type: ignore[dict-item]
        notes = {"sd": activations.std(axis=0)} if self.fault == "notes that no file can hold" else {}
        parameters = {"weight": weight, "bias": np.asarray(bias)}
        if self.fault == "answers by position":
            parameters["labels"] = labels
        made = Loose if self.fault == "reads any width" else FittedProbe
        return made(self, parameters, notes=notes)

    def fitter(self) -> _Sums:
        return _Sums(self)

    def score(self, xp: Any, parameters: Mapping[str, Any], activations: Any) -> Any:
        out = xp.matmul(activations, parameters["weight"]) + parameters["bias"]
        if self.fault == "leaves the graph":
            return np.asarray(out.detach() if hasattr(out, "detach") else out)
        if self.fault == "detached" and hasattr(out, "detach"):
            return out.detach()
        if self.fault == "half of the gradient" and hasattr(out, "detach"):
            return 0.5 * out + 0.5 * out.detach()
        if self.fault == "keeps an axis":
            return out[..., None]
        if self.fault == "always double precision":
            return xp.astype(out, xp.float64)
        if self.fault == "overflows":
            return xp.exp(xp.exp(abs(out)))
        if self.fault == "normalizes over the batch" and activations.ndim > 1 and activations.shape[0] > 0:
            return out / xp.max(abs(out))
        if self.fault == "branches on a value":
            return out if bool(xp.all(out == out)) else -out
        if self.fault == "is a plateau":
            return xp.tanh(60.0 * out)
        if self.fault == "is a probability":
            return 0.5 + 0.5 * xp.tanh(0.05 * out)
        if self.fault == "remembers rows, inverted" and isinstance(activations, np.ndarray) and activations.ndim == 2:
            return out - np.array([1e6 * (_SEEN.get(row.tobytes(), 0.5) - 0.5) for row in activations])
        if self.fault == "not linear":
            return out * abs(out)
        if self.fault == "counts its calls":
            _SEEN[b"calls"] = _SEEN.get(b"calls", 0) + 1
            return out + 1e-3 * _SEEN[b"calls"]
        if self.fault == "wears out":
            parameters["weight"][...] *= 0.5
        if self.fault == "remembers rows" and isinstance(activations, np.ndarray) and activations.ndim == 2:
            return out + np.array([1e6 * (_SEEN.get(row.tobytes(), 0.5) - 0.5) for row in activations])
        if self.fault == "answers by position" and activations.shape[:-1] == parameters["labels"].shape:
            return out + 1e6 * parameters["labels"]
        return out


@dataclass(frozen=True)
class Saved(Broken):
    """Its parameters change on the way to a file and back."""

    def __post_init__(self) -> None:
        # once more when it is read back
        if self.fault.startswith("recipe changes when it is made"):
            object.__setattr__(self, "fault", self.fault + "!")


@dataclass(frozen=True)
class BrokenTokens(Broken):
    """A mass-mean probe of the mean of tokens with one fault planted."""

    traits: ClassVar[Traits] = Traits(tokens=True, linear=True, rotation_equivariant=True, flips=True)

    def fit(  # type: ignore[override]
        self,
        activations: np.ndarray,
        labels: np.ndarray,
        *,
        pairs: np.ndarray | None = None,
        seed: int = 0,
        mask: np.ndarray | None = None,
    ) -> FittedProbe:
        there = np.ones(activations.shape[:2], dtype=bool) if mask is None else mask
        if self.fault == "fits on what is not there":
            there = np.ones_like(there)
        if self.fault == "without a mask it reads the last token alone" and mask is None:
            there = np.arange(activations.shape[1]) == np.full((len(labels), 1), activations.shape[1] - 1)
        rows = np.where(there[..., None], activations, 0.0).sum(axis=1) / there.sum(axis=1, keepdims=True)
        return super().fit(rows, labels, seed=seed)

    def score(self, xp: Any, parameters: Mapping[str, Any], activations: Any, mask: Any = None) -> Any:
        each = xp.matmul(activations, parameters["weight"]) + parameters["bias"]
        if mask is None:
            return xp.mean(each, axis=-1)
        if self.fault == "scores what is not there":
            return xp.mean(each, axis=-1)
        if self.fault == "has a gradient where no token is" and hasattr(each, "detach"):
            gone = xp.sum(xp.where(mask, xp.zeros_like(each), each), axis=-1)
            each_sum = xp.sum(xp.where(mask, each, xp.zeros_like(each)), axis=-1) + gone - gone.detach()
        else:
            each_sum = xp.sum(xp.where(mask, each, xp.zeros_like(each)), axis=-1)
        count = xp.sum(xp.astype(mask, each.dtype), axis=-1)
        return each_sum if self.fault == "sums instead of averaging" else each_sum / count


@dataclass(frozen=True)
class BrokenDetector(Broken):
    """The distance to the mean negative, bounded, with one fault planted."""

    traits: ClassVar[Traits] = Traits(negatives_only=True, rotation_equivariant=True)

    def fit(
        self, activations: np.ndarray, labels: np.ndarray, *, pairs: np.ndarray | None = None, seed: int = 0
    ) -> FittedProbe:
        chosen = np.ones_like(labels, dtype=bool) if self.fault == "standardizes by all rows" else labels == 0
        centre = activations[labels == 0].mean(axis=0)
        if self.fault == "counts positives":
            centre = centre * (1 + 1e-9 * labels.sum())
        spread = np.linalg.norm(activations[chosen] - centre, axis=1).mean() / 4
        return FittedProbe(self, {"centre": centre, "size": np.asarray(spread)})

    def score(self, xp: Any, parameters: Mapping[str, Any], activations: Any) -> Any:
        away = (activations - parameters["centre"]) / parameters["size"]
        return xp.sqrt(1 + xp.sum(away * away, axis=-1))

    def lipschitz(self, parameters: Mapping[str, Any], factor: np.ndarray) -> float:
        if self.fault == "claims an infinite slope":
            return float("inf")
        # d score / d x is shorter than 1 / size
        bound = np.linalg.norm(factor, ord=2) / float(parameters["size"])
        return float(bound * (0.5 if self.fault == "claims half of its slope" else 1.0))


@dataclass(frozen=True)
class BrokenKnowing(Broken):
    """A whitened direction that behaviour reads, with one fault planted."""

    traits: ClassVar[Traits] = Traits(
        needs_pairs=True, needs_prior=True, needs_behaviour=True, linear=True, rotation_equivariant=True, flips=True
    )

    def fit(  # type: ignore[override]
        self,
        activations: np.ndarray,
        labels: np.ndarray,
        *,
        pairs: np.ndarray | None = None,
        prior: Any = None,
        behaviour: Any = None,
        seed: int = 0,
    ) -> FittedProbe:
        if pairs is None and self.fault != "does without pairs":
            raise ValueError("it wants pairs")
        fisher = np.einsum("mrd,mre->de", behaviour, behaviour)
        weight = np.linalg.solve(prior.covariance, fisher @ super().fit(activations, labels).parameters["weight"])
        return FittedProbe(self, {"weight": weight, "bias": np.asarray(-activations.mean(axis=0) @ weight)})


@dataclass(frozen=True)
class Steps(Broken):
    """A score that is not differentiable, and says so."""

    traits: ClassVar[Traits] = Traits(differentiable=False)

    def score(self, xp: Any, parameters: Mapping[str, Any], activations: Any) -> Any:
        assert isinstance(activations, np.ndarray)
        return np.round(super().score(xp, parameters, activations), 3).astype(activations.dtype)


@dataclass(frozen=True)
class Maximum(BrokenTokens):
    """The highest token: a score with kinks."""

    traits: ClassVar[Traits] = Traits(tokens=True, rotation_equivariant=True)

    def score(self, xp: Any, parameters: Mapping[str, Any], activations: Any, mask: Any = None) -> Any:
        each = xp.matmul(activations, parameters["weight"]) + parameters["bias"]
        return xp.max(each if mask is None else xp.where(mask, each, xp.full_like(each, -xp.inf)), axis=-1)


KINDS = {kind.__name__: kind for kind in (Broken, BrokenTokens, BrokenDetector, BrokenKnowing, Steps, Maximum)}

# fault: the probe that has it, the check that must see it, and what this must say
FAULTS: dict[str, tuple[type[Broken], str, str]] = {
    "list parameter": (Broken, "declarations", "is float, not a numpy array"),
    "notes that no file can hold": (Broken, "declarations", "not JSON serializable"),
    "keeps an axis": (Broken, "shapes", "gave scores of"),
    "always double precision": (Broken, "shapes", "activations are float32 but scores float64"),
    "overflows": (Broken, "shapes", "not finite|overflow"),
    "normalizes over the batch": (Broken, "rows_are_independent", "scores differently beside other rows"),
    "leaves the graph": (Broken, "array_libraries", "must not leave its library"),
    "branches on a value": (Broken, "transforms", "[Tt]racer|vmap|data-dependent"),
    "detached": (Broken, "gradients", "left the autodiff graph"),
    "half of the gradient": (Broken, "gradients", "differ from finite differences at 100%"),
    "recipe changes when it is made": (Saved, "save_and_load", "the recipe changed"),
    "unseeded": (Broken, "deterministic", "two fits from one seed differ in 'weight'"),
    "starts from the last fit": (Broken, "deterministic", "two fits from one seed differ in 'weight'"),
    "draws from numpy's global state": (Broken, "deterministic", "numpy's global random state"),
    "draws from Python's global state": (Broken, "deterministic", "Python's global random state"),
    "seeds torch's global state": (Broken, "deterministic", "torch's global random state"),
    "edits its input": (Broken, "inputs_are_left_alone", "writes into its input|changed the activations"),
    "counts its calls": (Broken, "scoring_keeps_nothing", "it remembers"),
    "wears out": (Broken, "scoring_keeps_nothing", "scoring changed parameter 'weight'|it remembers"),
    "reads any width": (Broken, "width_and_mask_mismatches_are_refused", "features"),
    "does without pairs": (BrokenKnowing, "what_it_needs_is_required", "speaks of 'pairs'"),
    "sign": (Broken, "learns", "held-out AUROC 0.000"),
    "ignores the labels": (Broken, "learns", "AUROC"),
    "remembers rows": (Broken, "knows_no_more_than_it_was_told", "AUROC 1.000"),
    "answers by position": (Broken, "knows_no_more_than_it_was_told", "AUROC 1.000"),
    "remembers rows, inverted": (Broken, "knows_no_more_than_it_was_told", "AUROC 0.000"),
    "subtracts what earlier fits said": (Broken, "knows_no_more_than_it_was_told", "remembers earlier fits"),
    "is a plateau": (Broken, "unsaturated", "the score is saturated"),
    "is a probability": (Broken, "unsaturated", "as a probability does"),
    "not linear": (Broken, "linear", "not activations @ weight"),
    "sums instead of averaging": (BrokenTokens, "linear", "not activations @ weight"),
    "scales per feature": (Broken, "rotation_equivariant", "promises rotation_equivariant"),
    "keeps off the flip": (Broken, "flips", "promises flips"),
    "standardizes by all rows": (BrokenDetector, "negatives_only", "promises negatives_only.* in 'size'"),
    "counts positives": (BrokenDetector, "negatives_only", "promises negatives_only.* in 'centre'"),
    "fits on what is not there": (BrokenTokens, "masked_tokens_change_nothing", "changed the fit"),
    "scores what is not there": (BrokenTokens, "masked_tokens_change_nothing", "changed a score"),
    "has a gradient where no token is": (BrokenTokens, "gradients", "not there has a gradient"),
    "without a mask it reads the last token alone": (BrokenTokens, "no_mask_is_a_full_mask", "not that of a full one"),
    "forgets all batches but the last": (Broken, "streams", "fitted in batches"),
    "claims half of its slope": (BrokenDetector, "lipschitz", "above the"),
    "claims an infinite slope": (BrokenDetector, "lipschitz", "bound on its slope is inf"),
}


@pytest.mark.parametrize(("fault", "case"), FAULTS.items(), ids=FAULTS)
def test_suite_catches(fault: str, case: tuple[type[Broken], str, str]) -> None:
    kind, check, says = case
    _SEEN.clear()
    _FITS.clear()
    checks = checks_for_probe(kind(fault))
    # as check_probe reports it, whatever it raised
    with pytest.raises(AssertionError, match=says):
        run_checks("it", {check: checks[check]})


@pytest.mark.parametrize("kind", KINDS)
def test_suite_passes_the_same_probe_without_a_fault(kind: str) -> None:
    """Or the faults above prove nothing. It is not registered: bring your own."""
    assert len(check_probe(KINDS[kind]("none"))) >= 12


def test_every_check_has_been_seen_to_fail() -> None:
    """By one of the faults above, or by a test below."""
    below = {"does_not_learn", "bad_data_is_refused"}
    everything = {check for kind in KINDS.values() for check in checks_for_probe(kind("none"))} | {"does_not_learn"}
    assert {check for _, check, _ in FAULTS.values()} | below == everything


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


def test_bad_data_that_is_accepted_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine refuses for all probes; where it stops to, the suite says so."""
    monkeypatch.setattr("elk_stress.probing.probe.check_training_data", lambda *_, **__: None)
    with pytest.raises(AssertionError, match="expected a ValueError that speaks of 'NaN'"):
        checks_for_probe(Broken("none"))["bad_data_is_refused"]()


def test_traits_that_contradict_each_other_are_refused() -> None:
    @dataclass(frozen=True)
    class Torn(Broken):
        """Never looks at positives, and flips."""

        traits: ClassVar[Traits] = Traits(negatives_only=True, flips=True)

    with pytest.raises(AssertionError, match="cannot promise to flip"):
        checks_for_probe(Torn("none"))["declarations"]()


def test_a_thawed_recipe_is_refused() -> None:
    @dataclass
    class Thawed:
        """A recipe that can change."""

        name: ClassVar[str] = "thawed"
        traits: ClassVar[Traits] = Traits()

    with pytest.raises(AssertionError, match="must be frozen"):
        checks_for_probe(Thawed())["declarations"]()  # type: ignore[arg-type]


def test_negative_control_keeps_its_false_alarm_rate() -> None:
    """Shuffled labels exceed the limit for a rate of 1% as often as that: R = 4000, bounds are false alarms of 1e-6."""
    from scipy.stats import binom

    from elk_stress.testing.controls import chance

    rng = np.random.default_rng(np.random.SeedSequence(0))
    labels = np.repeat([0, 1], 60)
    for scores in (rng.standard_normal(120), rng.integers(0, 3, 120).astype(float)):
        # ranks summed: the statistic of every permutation at once
        from scipy.stats import rankdata

        ranks, limit = rankdata(scores), chance(scores, labels, 0.01)
        drawn = np.stack([rng.permutation(ranks)[60:] for _ in range(4000)]).sum(axis=1)
        exceeded = int(((drawn - 60 * 61 / 2) / 3600 > limit).sum())
        assert binom.ppf(1e-6, 4000, 0.004) <= exceeded <= binom.ppf(1 - 1e-6, 4000, 0.01)


def test_one_line_in_a_users_own_pytest(tmp_path: Path) -> None:
    """A probe that nobody installed, in a file of its own; and the same with a fault."""
    (tmp_path / "test_mine.py").write_text(_MINE)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", "test_mine.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert "1 failed, 1 passed" in done.stdout, done.stdout[-3000:]
    assert "probe 'mine' fails the check 'flips': it promises flips, but fitted on swapped labels" in done.stdout


_MINE = """
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from elk_stress.probing.probe import FittedProbe, Traits
from elk_stress.testing import check_probe


@dataclass(frozen=True)
class Mine:
    \"\"\"The difference of two means.\"\"\"

    offset: float = 0.0
    name: ClassVar[str] = "mine"
    traits: ClassVar[Traits] = Traits(linear=True, flips=True)

    def fit(self, activations, labels, *, pairs=None, seed=0):
        high, low = (activations[labels == k].mean(axis=0) for k in (1, 0))
        weight = high - low
        return FittedProbe(self, {"weight": weight, "bias": np.asarray(self.offset - weight @ (high + low) / 2)})

    def score(self, xp, parameters, activations):
        return xp.matmul(activations, parameters["weight"]) + parameters["bias"]


def test_mine():
    check_probe(Mine())


def test_with_an_offset():
    check_probe(Mine(offset=1.0))
"""


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

    probe = registry.load("probes", name)
    train, test = (planted_classes(n, 200, separation=8.0, seed=s) for s, n in ((0, 40), (1, 100)))
    if probe.traits.tokens:
        train, test = train.tokens(), test.tokens()
    scores = train.fit(probe).score(test.activations, test.mask)
    # six standard errors above chance for who must see 8 sd in one direction among the noise of 200, say a density
    assert roc_auc_score(test.labels, scores) > (0.9 if probe.traits.linear else 0.75)


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
