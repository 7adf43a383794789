"""Every registered testbed passes the public suite; and the suite catches a testbed that is wrong on purpose."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

from elk_stress import registry, testbed
from elk_stress.testing import checks_for_testbed

# the default language model reads these
NEEDS_MODEL = {"statements"}
# what makes a testbed small enough for a test, where its defaults are not
_ITEMS = {"n_models": 1, "n_train": 256, "n_calibration": 128, "n_test": 256, "n_contexts": 4}
SMALL: dict[str, dict[str, Any]] = {
    "statements": {"n_items": 48, "n_contexts": 8},
    "superposition": {**_ITEMS, "n_features": 24, "width": 8, "training_steps": 800},
    "compute_in_superposition": {**_ITEMS, "training_steps": 1200, "batch_size": 128},
    "vault": {**_ITEMS, "training_steps": 1500},
    "quirky": {**_ITEMS, "training_steps": 2000, "n_known": 4096},
}
CHECKS = (
    "declarations",
    "grouping",
    "items",
    "activations",
    "truth_is_there",
    "shift_at_zero",
    "shift_grows",
    "factor_agrees",
    "known_probes",
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

    def activations(self, split: Any, contexts: Any = "prior") -> np.ndarray:
        array = self._inner.activations(split, contexts)
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
        return 9 * shift if self._fault == "other units" else shift


FAULTS = {
    "leak": "grouping",
    "double precision": "activations",
    "nothing to read": "truth_is_there",
    "shift at rest": "shift_at_zero",
    "shift saturates": "shift_grows",
    "other units": "factor_agrees",
}


@pytest.mark.parametrize(("fault", "check"), FAULTS.items(), ids=FAULTS)
def test_suite_catches(fault: str, check: str) -> None:
    with pytest.raises(AssertionError):
        checks_for_testbed(_Broken(fault))[check]()  # type: ignore[arg-type]
