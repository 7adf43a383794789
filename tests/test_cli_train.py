"""``elk-stress train``: what it writes, how it goes on after a kill, exit codes, and one clear line for bad input."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from elk_stress import cli
from elk_stress.attacks.finetune import Finetune
from elk_stress.cli.script import run_training_attack
from elk_stress.core import registry
from elk_stress.runs import train as suite
from elk_stress.testbeds.superposition import Superposition
from elk_stress.training.loop import as_trainee
from elk_stress.training.organism_trainee import OrganismTrainee
from elk_stress.training.protocols import Trainee

_SMALL = ["train", "--no-progress", "--models", "2", "--steps", "10", "--checkpoints", "2", "--no-bits"]
_PROBES = ["--probes", "mass_mean", "--strengths", "1"]


@functools.cache
def _organism(n_models: int, seed: int) -> Superposition:
    """As small as it gets; trained once for all tests."""
    return Superposition(
        n_models=n_models,
        seed=seed,
        n_features=16,
        width=6,
        n_train=96,
        n_calibration=48,
        n_test=64,
        n_contexts=2,
        training_steps=600,
        batch_size=128,
    )


@functools.cache
def _trained(organism: Superposition, epsilon: float, seed: int) -> OrganismTrainee:
    return OrganismTrainee(organism, epsilon=epsilon, n_draws=5, seed=seed)


def _trainee(testbed: Any, attack: Any, probes: Any, *, epsilon: float, seed: int) -> Trainee:
    """As the suite makes one, but what it compiles and calibrates is shared by all tests."""
    made = as_trainee(testbed, attack, probes, epsilon=epsilon, seed=seed)
    return _trained(testbed, epsilon, seed) if isinstance(made, OrganismTrainee) else made


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """The registry's superposition is a small one; the current folder is a temporary one. Gives the options asked."""
    monkeypatch.chdir(tmp_path)
    real, asked = registry.load, []

    def load(group: Any, name: str, **options: Any) -> Any:
        if (group, name) != ("testbeds", "superposition"):
            return real(group, name, **options)
        asked.append(options)
        return _organism(**options)

    monkeypatch.setattr(registry, "load", load)
    monkeypatch.setattr(suite, "as_trainee", _trainee)
    return asked


def _saved(folder: str) -> dict[str, Any]:
    record = json.loads(Path(folder, "result.json").read_text())
    assert isinstance(record, dict)
    return record


def _without_time(record: dict[str, Any]) -> dict[str, Any]:
    results = [{k: v for k, v in row.items() if k != "seconds"} for row in record["results"]]
    return {**record, "results": results, "seconds": 0}


def _one_line(captured: Any) -> str:
    assert captured.out == ""
    assert "Traceback" not in captured.err
    assert captured.err.count("\n") == 1, captured.err
    return str(captured.err)


def test_a_run_writes_its_folder_and_the_same_command_goes_on(
    small: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*_SMALL, *_PROBES, "--out", "here"]) == 0
    out = capsys.readouterr().out
    assert "mass_mean" in out
    assert out.rstrip().endswith("written to here")
    assert small == [{"n_models": 2, "seed": 0}]
    assert sorted(p.name for p in Path("here").iterdir()) == ["checkpoints", "pressure.png", "report.md", "result.json"]
    assert Path("here/pressure.png").read_bytes().startswith(b"\x89PNG")
    assert "mass_mean" in Path("here/report.md").read_text()
    record = _saved("here")
    assert record["status"] == "ok"
    assert record["failures"] == {}
    (row,) = record["results"]
    assert (row["probe"], row["attack"], row["mode"], row["bits"]) == ("mass_mean", "finetune", "frozen", None)
    assert row["strengths"] == [0.0, 1.0]
    assert row["steps"] == [0, 4, 10]
    kept = Path("here/checkpoints/mass_mean-finetune-frozen")
    assert sorted(p.name for p in kept.glob("checkpoint-*")) == [f"checkpoint-{i:04d}.safetensors" for i in range(3)]

    # killed after everything was trained and before it was written: nothing is trained again
    Path("here/result.json").unlink()
    trained = Finetune.advance
    monkeypatch.setattr(Finetune, "advance", lambda *_: pytest.fail("trained again"))
    written = {p.name: p.stat().st_mtime_ns for p in kept.iterdir()}
    assert cli.main([*_SMALL, *_PROBES, "--out", "here"]) == 0
    assert _without_time(_saved("here")) == _without_time(record)
    assert {p.name: p.stat().st_mtime_ns for p in kept.iterdir()} == written
    # control: elsewhere all of it is trained again, to the same numbers
    calls: list[int] = []
    monkeypatch.setattr(Finetune, "advance", lambda self, *a: (calls.append(a[-1]), trained(self, *a))[1])
    capsys.readouterr()
    assert cli.main([*_SMALL, *_PROBES, "--out", "again"]) == 0
    assert calls == [4, 6]
    assert _without_time(_saved("again")) == _without_time(record)


def test_only_the_pairs_that_are_asked_for_are_compared(small: list[dict[str, Any]]) -> None:
    asked = ["--probes", "mass_mean,lda,oracle", "--strengths", "1", "--compare", "lda:oracle", "--out", "here"]
    assert cli.main([*_SMALL, *asked]) == 0
    assert {(row["a"], row["b"]) for row in _saved("here")["comparisons"]} == {("lda", "oracle")}


def test_another_command_in_the_same_folder_is_recorded_as_failed(
    small: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*_SMALL, "--probes", "mass_mean", "--out", "here"]
    assert cli.main([*arguments, "--strengths", "1"]) == 0
    capsys.readouterr()
    assert cli.main([*arguments, "--strengths", "2"]) == 1
    captured = capsys.readouterr()
    assert "strengths differ" in captured.err
    assert "choose another folder with --out" in captured.err
    assert list(_saved("here")["failures"]) == ["mass_mean-finetune-frozen"]


def test_json_on_stdout_is_the_whole_result_and_nothing_else(
    small: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*_SMALL, *_PROBES, "--json", "--out", "o", "--seed", "0"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == _saved("o")
    assert captured.err == "written to o\n"


def test_a_probe_that_cannot_be_refitted_fails_and_the_others_go_on(
    small: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*_SMALL, "--probes", "oracle,mass_mean", "--strengths", "1", "--modes", "refit", "--out", "here"]
    assert cli.main(arguments) == 0
    captured = capsys.readouterr()
    assert "elk-stress: oracle-finetune-refit failed: probe 'oracle' cannot be refitted" in captured.err
    record = _saved("here")
    assert [row["probe"] for row in record["results"]] == ["mass_mean"]
    assert list(record["failures"]) == ["oracle-finetune-refit"]
    assert cli.main([*arguments, "--strict"]) == 3


def test_the_default_folder_names_testbed_attack_and_time(
    small: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_training_attack("select_best", ["--no-progress", "--models", "2", "--steps", "4", "--checkpoints", "1",
                                               "--no-bits", *_PROBES]) == 0  # fmt: skip
    (folder,) = Path("runs").iterdir()
    name, attack, day, time = folder.name.split("-")
    assert (name, attack, len(day), len(time)) == ("superposition", "select_best", 8, 6)
    (row,) = _saved(str(folder))["results"]
    assert row["attack"] == "select_best"
    # log2 4 bits, exactly
    assert row["measured"]["spent"][-1] == [[0.0, 0.0], [2.0, 2.0]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--probes", "logistik"], "Did you mean 'logistic'? Known probes: "),
        (["--attack", "finetun"], "Did you mean 'finetune'? Known attacks: "),
        (["--testbed", "superpositon"], "Did you mean 'superposition'? Known testbeds: "),
        (["--strengths", "1;2"], "--strengths are numbers of at least 0 with commas between, e.g. 0.1,1,10; got '1;2'"),
        (["--steps", "-1"], "expected a whole number from 1 on, got -1"),
        (["--epsilon", "0"], "expected a positive number of nats, got 0"),
        (["--source", "nowhere"], "invalid choice"),
        (["--size", "huge"], "invalid choice"),
        (["--wrong"], "unrecognized arguments"),
        (["--models", "0"], "expected a whole number from 1 to 10,000, got 0"),
        (["--source", "prior"], "it takes: steps, learning_rate, batch_size"),
        (["--testbed", "linear"], "has no weights to train; use an organism"),
        (["--compare", "mass_mean"], "--compare reads A:B,C:D"),
        (["--compare", "mass_mean:mlp"], "pairs to compare name probes that are not pressed: mlp"),
        (["--out", "taken"], "a file is in the way"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_usage_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, small: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("taken").write_text("")
    assert cli.main([*_SMALL, *arguments]) == 2
    assert message in _one_line(capsys.readouterr())
    assert not Path("runs").exists() or not any(p.is_file() for p in Path("runs").rglob("*"))


def test_an_attack_on_activations_does_no_training(
    small: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*_SMALL, *_PROBES, "--attack", "gradient", "--out", "here"]) in (1, 2)
    assert "moves activations, not weights" in capsys.readouterr().err
    assert not Path("here/checkpoints").exists()


@pytest.mark.parametrize("name", ["finetune", "lora", "select_best"])
def test_run_says_that_training_is_another_command(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["run", "--testbed", "linear", "--probes", "lda", "--attacks", name, "--no-progress"]
    assert cli.main(arguments) in (1, 2)
    captured = capsys.readouterr()
    assert f"`elk-stress train --attack {name}`" in captured.err
    assert "Traceback" not in captured.err


def test_help_shows_how_to_resume(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--help"])
    assert stop.value.code == 0
    assert "a killed run goes on where it stopped" in capsys.readouterr().out
