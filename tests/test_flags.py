"""Flags: every one says when it is raised and what to do; every one that the engine raises is in the catalogue."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from elk_stress.core.flags import CATALOGUE, flag

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", CATALOGUE)
def test_entry_is_complete(name: str) -> None:
    raised = flag(name, "what was seen")
    assert len(raised.entry.raised_if) > 20
    assert len(raised.entry.what_to_do) > 10
    assert raised.red == CATALOGUE[name].red
    assert str(raised) == f"{name}: what was seen"
    assert str(flag(name)) == name


def test_unknown_flag_lists_the_known_ones() -> None:
    with pytest.raises(KeyError, match=r"no flag is called 'brital'.*brittle"):
        flag("brital")


def test_the_flags_of_the_design_are_there() -> None:
    design = {
        "did_not_engage",
        "bounds_violated",
        "black_box_beats_white_box",
        "weak_beats_strong",
        "runs_disagree",
        "low_effective_sample_size",
        "fpr_unresolved",
        "behaviour_broken",
        "benign_broke_it",
        "brittle",
        "leak",
        "wide_interval",
    }
    assert design <= CATALOGUE.keys()
    assert all(CATALOGUE[name].red for name in design)


def test_every_flag_raised_in_the_engine_is_in_the_catalogue() -> None:
    raised = set()
    for path in (ROOT / "elk_stress").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "flag"
            if called and isinstance(node.args[0], ast.Constant):
                raised.add(node.args[0].value)
    assert raised <= CATALOGUE.keys()
    assert "brittle" in raised
