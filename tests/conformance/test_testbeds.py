"""Every registered testbed passes the public suite; and the suite catches a testbed that is wrong on purpose."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

from elk_stress.core import registry
from elk_stress.probing.probe import direction
from elk_stress.testbeds import protocol as testbed
from elk_stress.testing import check_testbed, checks_for_testbed

# the default language model reads these
NEEDS_MODEL = {"statements"}
# what makes a testbed small enough for a test, where its defaults are not
_ITEMS = {"n_models": 1, "n_train": 256, "n_calibration": 128, "n_test": 256, "n_contexts": 4}
SMALL: dict[str, dict[str, Any]] = {
    "statements": {"n_items": 48, "n_contexts": 8},
    "superposition": {**_ITEMS, "n_features": 24, "width": 8, "training_steps": 800},
    "compute_in_superposition": {**_ITEMS, "n_models": 2, "training_steps": 1200, "batch_size": 128},
    "vault": {**_ITEMS, "n_models": 2, "training_steps": 1500},
    "quirky": {**_ITEMS, "training_steps": 2000, "n_known": 4096},
}
CHECKS = (
    "declarations",
    "grouping",
    "items",
    "activations",
    "truth_is_there",
    "known_probes",
    "no_hidden_state",
    "shift_at_zero",
    "shift_grows",
    "shift_of_any_batch",
    "factor_agrees",
)


@functools.cache
def _testbed(name: str) -> testbed.Testbed:
    made = registry.load("testbeds", name, **SMALL.get(name, {}))
    made.prepare()
    return made


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.model if n in NEEDS_MODEL else ()) for n in registry.names("testbeds")],
)
def test_registered_testbed(name: str, check: str) -> None:
    checks_for_testbed(_testbed(name))[check]()


def test_no_check_is_left_out() -> None:
    assert tuple(checks_for_testbed(_testbed("linear"))) == CHECKS


class _Broken:
    """The linear testbed seen through one fault."""

    def __init__(self, fault: str) -> None:
        self._inner, self._fault = _testbed("linear"), fault

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    @property
    def splits(self) -> Any:
        splits = dict(self._inner.splits)
        if self._fault == "leak":
            splits["test"] = splits["train"]
        return splits

    @property
    def tokens(self) -> int | None:
        return 5 if self._fault == "reads of unequal width" else None

    def known_probes(self) -> Any:
        if self._fault == "a known probe of another width":
            return {"paper": direction(np.ones(self._inner.dim + 1))}
        if self._fault == "a bare weight for a known probe":
            return {"paper": np.ones(self._inner.dim)}
        return self._inner.known_probes()

    def activations(self, split: Any, contexts: Any = "prior") -> np.ndarray:
        array = self._inner.activations(split, contexts)
        if self._fault == "draws from the global state":
            np.random.seed(0)  # noqa: NPY002
        if self._fault == "drifts":
            self._read = getattr(self, "_read", 0) + 1
            return (array * (1 + 1e-3 * self._read)).astype(np.float32)
        if self._fault == "hands out its own array":
            self._own = getattr(self, "_own", {})
            return self._own.setdefault((split, contexts), array.copy())
        if self._fault == "one context in two sets" and contexts == "observed":
            return np.concatenate([array, self._inner.activations(split, "prior")[:, :1]], axis=1)
        if self._fault == "fits on the prior's contexts" and contexts == "fit":
            return self._inner.activations(split, "prior")
        if self._fault == "double precision":
            return array.astype(float)
        if self._fault == "nothing to read":
            return np.random.default_rng(np.random.SeedSequence(0)).standard_normal(array.shape).astype(np.float32)
        return array

    def shift(self, split: Any, items: np.ndarray, moves: np.ndarray) -> np.ndarray:
        shift = self._inner.shift(split, items, moves)
        if self._fault == "shift at rest":
            return shift + 0.01
        if self._fault == "shift saturates":
            return np.minimum(shift, 1e-6)
        if self._fault == "looks at its neighbours":
            return shift + shift.mean(axis=0)
        if self._fault == "a negative divergence":
            return np.where(shift > np.median(shift), shift, -shift)
        if self._fault == "not quite exact":
            return shift * (1 + 0.1 * np.tanh(shift))
        return 9 * shift if self._fault == "other units" else shift


FAULTS = {
    "leak": ("grouping", "occur in more than one split"),
    "reads of unequal width": ("declarations", "5 reads of equal width"),
    "double precision": ("activations", "float64, expected float32"),
    "drifts": ("activations", "reading twice gives other activations"),
    "hands out its own array": ("activations", "mark them read-only"),
    "one context in two sets": ("activations", "prior and observed share a context"),
    "fits on the prior's contexts": ("activations", "fit and prior share a context"),
    "nothing to read": ("truth_is_there", "nothing to probe for"),
    "a known probe of another width": ("known_probes", "33"),
    "a bare weight for a known probe": ("known_probes", "ndarray, not a FittedProbe"),
    "draws from the global state": ("no_hidden_state", "numpy's global random state"),
    "shift at rest": ("shift_at_zero", "the unmoved item shifts"),
    "shift saturates": ("shift_grows", "it must grow"),
    "a negative divergence": ("shift_grows", "a shift is negative"),
    "looks at its neighbours": ("shift_of_any_batch", "with the items and moves beside it"),
    "not quite exact": ("factor_agrees", "exactly"),
    "other units": ("factor_agrees", "exactly|times the factor's"),
}


@pytest.mark.parametrize(("fault", "check", "says"), [(f, *row) for f, row in FAULTS.items()], ids=FAULTS)
def test_suite_catches(fault: str, check: str, says: str) -> None:
    broken: Any = _Broken(fault)
    with pytest.raises((AssertionError, ValueError), match=says):
        checks_for_testbed(broken)[check]()


def test_suite_passes_the_same_testbed_without_a_fault() -> None:
    broken: Any = _Broken("none")
    assert check_testbed(broken) == list(CHECKS)


def test_every_check_but_the_items_has_been_seen_to_fail() -> None:
    assert {check for check, _ in FAULTS.values()} == set(CHECKS) - {"items"}


def test_without_an_output_nothing_of_behaviour_is_asked() -> None:
    class Silent(_Broken):
        shift_cost = "none"

    silent: Any = Silent("none")
    assert not any("shift" in check or "factor" in check for check in checks_for_testbed(silent))


def test_failure_names_the_testbed_and_the_check() -> None:
    broken: Any = _Broken("leak")
    with pytest.raises(AssertionError, match=r"testbed 'linear' fails the check 'grouping': \d+ entities occur"):
        check_testbed(broken)
