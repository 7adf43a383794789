"""A testbed without a model and an engine without science, for the tests of the run and of the command line."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import fabricated
import numpy as np
import pytest

from elk_stress.testbeds.protocol import Items
from elk_stress.thoughts.comparison import compare_all
from elk_stress.thoughts.result import StressResult


class FakeTestbed:
    """What the run asks of a testbed, and nothing more."""

    name = "fake"
    site = "layers.0"
    dim = 4
    shift_cost = "none"

    def __init__(self, size: str = "demo", seed: int = 0, *, pairs: bool = False) -> None:
        self.size, self.seed, self.prepared = size, seed, 0
        labels = np.array([0, 1])
        items = Items(("a", "b"), labels, labels, np.array([[0, 1]]) if pairs else None)
        self.splits = {"train": items, "calibration": items, "test": items}

    def prepare(self, progress: Any = None) -> None:
        self.prepared += 1

    def known_probes(self) -> Mapping[str, Any]:
        return {}

    def describe(self) -> Mapping[str, Any]:
        return {"size": self.size, "model": "none"}


def light(probe: str, half_life: float = 12.0) -> StressResult:
    """A fabricated result under one threat, which is quick to draw."""
    result = fabricated.result(probe, half_life, kept=False)
    name = next(iter(result.threats))
    return dataclasses.replace(result, threats={name: result.threats[name]}, best_of_n=result.best_of_n[:1])


def install(
    monkeypatch: pytest.MonkeyPatch, behaviour: Mapping[str, BaseException | Callable[[], StressResult]] | None = None
) -> list[dict[str, Any]]:
    """Put a fake ``elk_stress.thoughts.engine`` in place; returns the calls made. ``behaviour``: probe -> error or
    result."""
    calls: list[dict[str, Any]] = []
    acts = dict(behaviour or {})

    def stress(prepared: Any, probe: Any, **options: Any) -> StressResult:
        calls.append({"probe": probe, "prepared": prepared, **options})
        act = acts.get(probe)
        if isinstance(act, BaseException):
            raise act
        if act is not None:
            return act()
        return light(probe)

    def prepare(testbed: Any, *, seed: int = 0, progress: Any = None) -> str:
        act = acts.get("prepared")
        if isinstance(act, BaseException):
            raise act
        return f"prepared testbed {seed}"

    engine = ModuleType("elk_stress.thoughts.engine")
    vars(engine).update(stress=stress, prepare=prepare, compare_all=compare_all)
    monkeypatch.setitem(sys.modules, "elk_stress.thoughts.engine", engine)
    return calls
