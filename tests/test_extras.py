"""What works without the extra ``lm``, and the one line that everything else ends in."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from elk_stress.core import extras

# stands in for an installation of the core alone: nothing that the extra installs can be found or imported
WITHOUT = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {extras._MODULES["lm"] + ("tokenizers",)!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
import importlib.util
found = importlib.util.find_spec
def find_spec(name, package=None):
    try:
        return found(name, package)
    except ModuleNotFoundError:
        return None
importlib.util.find_spec = find_spec
"""


def _without(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", WITHOUT + code, *arguments], capture_output=True, text=True)


def _command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return _without("from elk_stress.cli import main\nsys.exit(main(sys.argv[1:]))", *arguments)


def test_arrays_are_stressed_by_the_core_alone(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 240)
    np.save(tmp_path / "x.npy", rng.standard_normal((240, 4)) + 4.0 * labels[:, None])
    np.save(tmp_path / "y.npy", labels)
    done = _command(
        *("run", "--activations", str(tmp_path / "x.npy"), "--labels", str(tmp_path / "y.npy"), "--probes", "logistic"),
        *("--attacks", "gradient", "--out", str(tmp_path / "out"), "--no-progress", "--json"),
    )
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(done.stdout)["results"]
    assert result["probe"] == "logistic"


@pytest.mark.parametrize("command", ["probes", "attacks", "testbeds", "threats"])
def test_what_there_is_is_listed_by_the_core_alone(command: str) -> None:
    if command == "threats":
        done = _without(
            "import elk_stress, elk_stress.threats.threat; print(elk_stress.threats.threat.default_threats())"
        )
    else:
        done = _command(command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize(
    "arguments",
    [("run", "--testbed", "statements"), ("train", "--testbed", "statements", "--attack", "lora")],
    ids=lambda arguments: arguments[0],
)
def test_a_language_model_without_the_extra_is_one_clear_line(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = _command(*arguments, "--no-progress", "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "transformers" in line
    assert "pip install 'elk-stress[lm]'" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "code",
    [
        "from elk_stress.models.sources import resolve; resolve()",
        "from elk_stress.models.language_model import LanguageModel; LanguageModel()",
        "import elk_stress; elk_stress.FittedProbe.pull('owner/name')",
        "import elk_stress; elk_stress.direction([1.0]).push('owner/name')",
    ],
)
def test_every_door_to_a_language_model_or_the_hub_names_the_extra(code: str) -> None:
    done = _without(code)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("elk_stress.core.extras.MissingExtra")
    assert "elk-stress[lm]" in last


def test_nothing_is_refused_where_the_extra_is_installed() -> None:
    extras.need("lm", "a language model")
