"""A testbed without a model and an engine without science, for the tests of the run and of the command line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import fabricated
import numpy as np
import pytest

from elk_stress.bits import Bits
from elk_stress.result import StressResult
from elk_stress.testbed import Items


class FakeTestbed:
    """What the run asks of a testbed, and nothing more."""

    name = "fake"
    site = "layers.0"
    dim = 4

    def __init__(self, size: str = "demo", seed: int = 0, *, pairs: bool = False, known: tuple[str, ...] = ()) -> None:
        self.size, self.seed, self.prepared, self._known = size, seed, 0, known
        labels = np.array([0, 1])
        items = Items(("a", "b"), labels, labels, np.array([[0, 1]]) if pairs else None)
        self.splits = {"train": items, "calibration": items, "test": items}

    def prepare(self, progress: Any = None) -> None:
        self.prepared += 1

    def describe(self) -> Mapping[str, Any]:
        return {"size": self.size, "model": "none"}

    def known_probes(self) -> Mapping[str, Any]:
        return {name: name for name in self._known}


def install(
    monkeypatch: pytest.MonkeyPatch, behaviour: Mapping[str, BaseException | Callable[[], StressResult]] | None = None
) -> list[dict[str, Any]]:
    """Put a fake ``elk_stress.stress`` in place; returns the calls made. ``behaviour``: probe -> error or result."""
    calls: list[dict[str, Any]] = []
    acts = dict(behaviour or {})

    def stress(testbed: Any, probe: Any, **options: Any) -> StressResult:
        calls.append({"probe": probe, **options})
        act = acts.get(probe)
        if isinstance(act, BaseException):
            raise act
        if act is not None:
            return act()
        return fabricated.result(probe, 12.0, kept=False)

    def prepare_scene(testbed: Any, *, seed: int = 0, progress: Any = None) -> str:
        act = acts.get("scene")
        if isinstance(act, BaseException):
            raise act
        return f"scene {seed}"

    engine = ModuleType("elk_stress.stress")
    vars(engine).update(stress=stress, prepare_scene=prepare_scene, compare_all=lambda results: [{"a": "x", "b": "y"}])
    monkeypatch.setitem(sys.modules, "elk_stress.stress", engine)
    return calls


def bits(value: float) -> Bits:
    return fabricated.estimate(value)
