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


def _python(installed: Path | None, code: str) -> str:
    environment = {**os.environ}
    environment.pop("PYTHONPATH", None)
    if installed is not None:
        environment["PYTHONPATH"] = str(installed)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


LIST = """
import json
from elk_stress import registry
print(json.dumps({group: registry.describe(group) for group in ("probes", "attacks")}))
"""


def test_listed_after_our_own(installed: Path) -> None:
    listed = json.loads(_python(installed, LIST))
    assert list(listed["probes"])[-1] == "median_difference"
    assert listed["probes"]["median_difference"] == "Difference of the class medians, zero halfway between them."
    assert list(listed["attacks"])[-1] == "first_order"


def test_not_listed_where_it_is_not_installed() -> None:
    listed = json.loads(_python(None, LIST))
    assert "median_difference" not in listed["probes"]
    assert "first_order" not in listed["attacks"]


def test_conforms_and_runs(installed: Path) -> None:
    """The public suites, saving and loading by name included, and its attack against its probe."""
    code = """
import numpy as np
from elk_stress import registry
from elk_stress.attack import Oracle
from elk_stress.limit_state import LimitState
from elk_stress.probe import as_fitted
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
    assert n_probe >= 10
    assert n_attack >= 7
