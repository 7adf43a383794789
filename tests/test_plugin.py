"""A third party's package plugs in like our own: installed, it is listed, conforms and runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent / "plugin_package"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example package, installed by pip into a folder of its own (a copy: building writes beside the source)."""
    base = tmp_path_factory.mktemp("plugin")
    source, target = base / "source", base / "site"
    shutil.copytree(PACKAGE, source)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return target


def _python(installed: Path | None, code: str, *arguments: str) -> str:
    environment = {**os.environ}
    environment.pop("PYTHONPATH", None)
    if installed is not None:
        environment["PYTHONPATH"] = str(installed)
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


LIST = """
import json
from elk_stress.core import registry
print(json.dumps({group: registry.describe(group) for group in ("probes", "attacks")}))
"""


def test_listed_after_our_own(installed: Path) -> None:
    listed = json.loads(_python(installed, LIST))
    theirs = ["broken_median_difference", "broken_rotation", "median_difference"]
    assert list(listed["probes"])[-3:] == theirs
    assert listed["probes"]["median_difference"] == "Difference of the class medians, zero halfway between them."
    assert list(listed["attacks"])[-2:] == ["broken_first_order", "first_order"]


def test_not_listed_where_it_is_not_installed() -> None:
    listed = json.loads(_python(None, LIST))
    assert "median_difference" not in listed["probes"]
    assert "first_order" not in listed["attacks"]


def test_conforms_and_runs(installed: Path) -> None:
    """The public suites, saving and loading by name included, and its attack against its probe."""
    code = """
import numpy as np
from elk_stress.core import registry
from elk_stress.thoughts.attacks.protocol import Oracle
from elk_stress.estimators.limit_state import LimitState
from elk_stress.probing.probe import as_fitted
from elk_stress.testing import check_attack, check_probe, planted_classes

probe, attack = registry.load("probes", "median_difference"), registry.load("attacks", "first_order", overshoot=0.02)
print(len(check_probe(probe)), len(check_attack(attack)))

data = planted_classes()
fitted = as_fitted("median_difference", data.activations, data.labels)
caught = data.activations[(data.labels == 1) & (fitted.score(data.activations) > 0)]
limit_state = LimitState(
    lambda p, u: fitted.score(caught[p][:, None] + u), caught.shape[1], len(caught),
    gradient=lambda p, u: np.broadcast_to(fitted.parameters["weight"], u.shape),
)
moves = attack.propose(Oracle(limit_state, attack.access, 10), seed=0).moves
assert len(caught) > 100
assert (limit_state.value(np.arange(len(caught)), moves) <= 0).all()
"""
    n_probe, n_attack = map(int, _python(installed, code).split())
    assert n_probe >= 17
    assert n_attack >= 8


# what each broken twin breaks, the check that must name it, and what it must say
PROBES = {
    "shape": ("shapes", "gave scores of"),
    "rows": ("rows_are_independent", "a row scores differently beside other rows"),
    "library": ("array_libraries", "a score must not leave its library"),
    "gradient": ("gradients", "the score left the autodiff graph"),
    "memory": ("scoring_keeps_nothing", "scoring"),
    "file": ("save_and_load", "the recipe changed"),
    "seed": ("declarations", "numpy's global random state"),
    "input": ("deterministic", "it writes into its input"),
    "sign": ("learns", "learns=True promises above 0.95"),
    "flip": ("flips", "it promises flips"),
    "linear": ("linear", "it declares linear=True"),
    "rotation": ("rotation_equivariant", "it promises rotation_equivariant"),
}
ATTACKS = {
    "shape": ("proposals", "moves have shape"),
    "budget": ("proposals", "budget"),
    "access": ("access", "declare what it uses"),
    "seed": ("deterministic", "numpy's global random state"),
    "every problem": ("breaks_what_must_break", "does each problem get a move of its own?"),
    "nearest": ("finds_the_nearest_failure", "the half-space lies at 3 but the move has length"),
    "prior": ("draws_from_the_prior", "the same for every seed"),
}

BREAK = """
import json, sys
from elk_stress.core import registry
from elk_stress.testing import check_attack, check_probe

said = {}
for group, name, breaks in json.loads(sys.argv[1]):
    check = check_probe if group == "probes" else check_attack
    try:
        check(registry.load(group, name, breaks=breaks))
    except AssertionError as error:
        said[group + ": " + breaks] = str(error)
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said(installed: Path) -> dict[str, str]:
    """What the suites say of each broken twin; one process for all."""
    asked = [("probes", "broken_rotation" if b == "rotation" else "broken_median_difference", b) for b in PROBES]
    asked += [("attacks", "broken_first_order", b) for b in ATTACKS]
    return dict(json.loads(_python(installed, BREAK, json.dumps(asked))))


CASES = [("probes", *row) for row in PROBES.items()] + [("attacks", *row) for row in ATTACKS.items()]


@pytest.mark.parametrize(("group", "breaks", "names"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_broken_twin_fails_with_the_promise(
    said: dict[str, str], group: str, breaks: str, names: tuple[str, str]
) -> None:
    check, promise = names
    message = said.get(f"{group}: {breaks}", "it passed")
    twin = "attack 'broken_first_order'" if group == "attacks" else "probe 'broken_"
    assert message.startswith(twin)
    assert f"fails the check {check!r}: " in message
    assert promise in message
