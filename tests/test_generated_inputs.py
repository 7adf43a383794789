"""A few hundred of the generated inputs of the statistics step, and what judges them (:mod:`generated`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import generated
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings

import elk_stress

FEW = settings(
    max_examples=150, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def ready() -> None:
    generated.ready()


@pytest.mark.parametrize(
    ("strategy", "judge"),
    [(generated.calls(), generated.call), (generated.command_lines(), generated.command)],
    ids=["calls", "command lines"],
)
def test_an_input_gives_a_result_or_an_error_of_ours(strategy: Any, judge: Callable[..., None]) -> None:
    tally = generated.Tally()

    @FEW
    @given(strategy)
    def run(drawn: tuple[Any, ...]) -> None:
        judge(*drawn, tally)

    run()
    assert tally.failures == []
    assert tally.results > 0
    assert sum(tally.errors.values()) > 50


def test_every_export_is_called_or_said_to_be_nobody_s_input() -> None:
    callables = {name for name in elk_stress.__all__ if callable(getattr(elk_stress, name))}
    functions = {name.partition(".")[0] for name in generated.called()}
    assert callables == functions | generated.CONTAINERS.keys()
    assert not functions & generated.CONTAINERS.keys()


def planted(result: Any) -> Callable[..., Any]:
    def function(seed: Any) -> Any:
        return result() if callable(result) else result

    return function


@pytest.mark.parametrize(
    ("result", "forbidden", "failure"),
    [
        (None, True, "was accepted though seed is forbidden"),
        (lambda: np.asarray({}, dtype=float), False, "somebody else's code"),
        (lambda: {}["x"], False, "a class that no caller expects"),
        (lambda: int("x"), False, "somebody else's code"),
        (elk_stress.direction(np.ones(2), float("1e3")), False, ""),
    ],
)
def test_the_judge_sees_what_is_wrong(
    result: Any, forbidden: bool, failure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generated, "called", lambda: {"planted": planted(result)})
    tally = generated.Tally()
    generated.call("planted", {"seed": generated.Drawn(-1, forbidden)}, tally)
    assert len(tally.failures) == bool(failure)
    assert failure in "".join(tally.failures)
