"""Ten thousand inputs through the public API and the command line: a result, or an error of ours; never anything else.

Inputs follow from the declared signatures (:mod:`generated`). Each test prints its figures.
"""

from __future__ import annotations

import generated
import pytest
from hypothesis import HealthCheck, Phase, given, settings

CALLS, COMMANDS = 8000, 2500


def many(n: int) -> settings:
    """The same inputs every time; all are judged before the test fails, so nothing is shrunk."""
    return settings(
        max_examples=n, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


def told(tally: generated.Tally, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\n{tally}\n  by function: {dict(tally.where.most_common())}")
    assert not tally.failures, "\n".join([str(tally), *tally.failures[:40]])


@pytest.mark.statistics
def test_every_call_gives_a_result_or_an_error_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    generated.ready()
    tally = generated.Tally()

    @many(CALLS)
    @given(generated.calls())
    def run(drawn: tuple[str, dict[str, generated.Drawn]]) -> None:
        generated.call(*drawn, tally)

    run()
    told(tally, capsys)
    assert tally.cases >= 0.9 * CALLS
    assert set(tally.where) == set(generated.called()), "every function must be met"


@pytest.mark.statistics
def test_every_command_line_works_or_says_why_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    generated.ready()
    tally = generated.Tally()

    @many(COMMANDS)
    @given(generated.command_lines())
    def run(drawn: tuple[list[str], bool, generated.Drawn | None]) -> None:
        generated.command(*drawn, tally)

    run()
    told(tally, capsys)
    assert tally.cases >= 0.9 * COMMANDS
