"""The command line: exit codes, one clear line for bad input, clean output, a fast start."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_engine import FakeTestbed, install, light
from test_printable import rendered

from elk_stress import cli
from elk_stress.core import registry
from elk_stress.core.printable import printable
from elk_stress.probing.probe import direction

Calls = list[dict[str, Any]]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Calls:
    """A fake engine and testbed; the current folder is a temporary one."""
    monkeypatch.chdir(tmp_path)
    real_options, real_load = registry.options, registry.load

    def options(group: Any, name: str) -> list[str]:
        return ["size", "seed"] if (group, name) == ("testbeds", "statements") else real_options(group, name)

    def load(group: Any, name: str, **given: Any) -> Any:
        return FakeTestbed(**given) if group == "testbeds" else real_load(group, name, **given)

    monkeypatch.setattr(registry, "options", options)
    monkeypatch.setattr(registry, "load", load)
    return install(monkeypatch)


def one_line(captured: Any) -> str:
    assert captured.out == ""
    assert "Traceback" not in captured.err
    assert captured.err.count("\n") == 1, captured.err
    return str(captured.err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--probes", "logistik"], "Did you mean 'logistic'? Known probes: "),
        (["run", "--attacks", "gradint"], "Known attacks: "),
        (["run", "--testbed", "statement"], "Known testbeds: "),
        (["run", "--preset", "big"], "Known presets: demo, thoughts, prefixes"),
        (["run", "--threats", "item/natural"], "a threat reads scope/prior/tail"),
        (["run", "--threats", "item/natural/cauchy"], "a threat's tail is one of"),
        (["run", "--threats", ","], "names nothing"),
        (["run", "--probes", ","], "names nothing. Known probes"),
        (["run", "--fpr", "5"], "expected a rate between 0 and 1, got 5"),
        (["run", "--fpr", "x"], "expected a rate between 0 and 1, got 'x'"),
        (["run", "--epsilon", "-1"], "expected a positive number of nats, got -1"),
        (["run", "--epsilon", "nan"], "expected a positive number of nats, got nan"),
        (["run", "--max-bits", "inf"], "expected a positive number of bits, got inf"),
        (["run", "--seed", "-1"], "expected a whole number from 0 on"),
        (["run", "--size", "huge"], "invalid choice"),
        (["run", "--data", "missing.jsonl"], "--data missing.jsonl: no such file"),
        (["run", "--activations", "a.npy"], "--activations needs --labels"),
        (["run", "--labels", "y.npy"], "--labels without --activations"),
        (["run", "--activations", "a.npy", "--labels", "y.npy"], "--activations a.npy: no such file"),
        (
            ["run", "--activations", "a.npy", "--labels", "y.npy", "--model", "m", "--epsilon", "1"],
            "--model, --epsilon d",
        ),
        (["run", "--probe", "mine.pkl", "--out", "o"], "a pickle: a program that runs when it is loaded"),
        (["run", "--probe", "mine.safetensors", "--out", "o"], "mine.safetensors: no such file or folder"),
        (["run", "--relation", "x"], "does not take --relation; it takes: size, seed"),
        (["run", "--wrong"], "unrecognized arguments"),
        (["fly"], "invalid choice"),
        ([], "required: command"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_usage_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, engine: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    assert message in one_line(capsys.readouterr())
    assert engine == [], "nothing may run"


@pytest.mark.parametrize(
    "error",
    [
        ValueError("facts.jsonl line 3: not JSON"),
        ValueError("test activations hold NaN or inf in 2 of 9 rows;\n drop these items"),
        FileNotFoundError("no model there"),
        registry.UnknownName("no testbed is called so"),
    ],
)
def test_bad_input_found_by_the_testbed_is_one_line(
    error: Exception, engine: Calls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, {"prepared": error})
    assert cli.main(["run", "--no-progress"]) == 2
    assert " ".join(str(error).split()) in one_line(capsys.readouterr())
    assert list(Path("runs").iterdir()) == [], "no empty folder may stay"


def test_a_mistake_in_the_code_keeps_its_traceback(engine: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, {"prepared": KeyError("oops")})
    with pytest.raises(KeyError, match="oops"):
        cli.main(["run", "--no-progress"])
    install(monkeypatch, {"prepared": ValueError("bad data")})
    with pytest.raises(ValueError, match="bad data"):
        cli.main(["run", "--no-progress", "--traceback"])


def test_an_unusable_folder_is_refused_first(engine: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").write_text("")
    assert cli.main(["run", "--out", "taken"]) == 2
    assert "a file is in the way" in one_line(capsys.readouterr())
    assert engine == []


def test_a_run_prints_both_tables_and_says_where(
    engine: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", "--preset", "demo", "--out", "here"]) == 0
    out = capsys.readouterr().out
    assert "Bits of optimization that each probe survives" in out
    assert "Attacks on logistic" in out
    assert "not run, since it learns from contrast pairs and these data have none (field pair): ccs" in out
    assert out.rstrip().endswith("written to here")
    assert max(map(len, out.splitlines())) <= 120
    assert [c["probe"] for c in engine] == ["rock", "random_direction", "mass_mean", "lda", "logistic"]
    assert engine[0]["attacks"] == ("isotropic_noise", "natural_thoughts", "gradient", "best_of_n")
    assert json.loads((tmp_path / "here" / "result.json").read_text())["config"]["command"]["preset"] == "demo"


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ([], ["item/natural/gaussian", "item/natural/gaussian/kept"]),
        (["--threats", "universal/natural/gaussian"], ["universal/natural/gaussian"]),
    ],
)
def test_a_presets_threats_give_way_to_a_flag(engine: Calls, flags: list[str], names: list[str]) -> None:
    assert cli.main(["run", "--preset", "prefixes", "--probes", "logistic", "--out", "here", *flags]) == 0
    assert [t.name for t in engine[0]["threats"]] == names
    assert engine[0]["attacks"] == ("soft_prompt", "token_prefix", "token_prefix_search", "token_prefix_random")


def test_the_default_folder_names_testbed_preset_and_time(engine: Calls, tmp_path: Path) -> None:
    assert cli.main(["run", "--preset", "demo", "--probes", "lda", "--no-progress"]) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    name, preset, day, time = folder.name.split("-")
    assert (name, preset, len(day), len(time)) == ("statements", "demo", 8, 6)


def test_json_on_stdout_is_the_whole_result_and_nothing_else(
    engine: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", "--probes", "lda", "--json", "--out", "o"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == json.loads((tmp_path / "o" / "result.json").read_text())
    assert "written to o" in captured.err


def test_ctrl_c_is_130_and_shows_what_is_finished(
    engine: Calls, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, {"logistic": KeyboardInterrupt()})
    assert cli.main(["run", "--probes", "lda,logistic", "--out", "o"]) == 130
    captured = capsys.readouterr()
    assert "interrupted; finished probes: lda" in captured.err
    assert "Attacks on lda" in captured.out
    assert json.loads((tmp_path / "o" / "result.json").read_text())["status"] == "interrupted"


def test_ctrl_c_during_preparation_is_130(
    engine: Calls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, {"prepared": KeyboardInterrupt()})
    assert cli.main(["run", "--probes", "lda", "--no-progress"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_strict_turns_red_flags_into_3(engine: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, {"lda": lambda: light("lda", 0.4)})  # brittle
    assert cli.main(["run", "--probes", "lda", "--no-progress"]) == 0
    assert cli.main(["run", "--probes", "lda", "--no-progress", "--strict"]) == 3
    assert cli.main(["run", "--probes", "mass_mean", "--no-progress", "--strict"]) == 0


def test_a_failing_probe_is_said_on_stderr(
    engine: Calls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, {"lda": ValueError("fewer negatives than the rate resolves")})
    assert cli.main(["run", "--probes", "lda,mass_mean", "--no-progress"]) == 0
    assert "probe lda failed: fewer negatives than the rate resolves" in capsys.readouterr().err
    assert cli.main(["run", "--probes", "lda,mass_mean", "--no-progress", "--strict"]) == 3
    assert cli.main(["run", "--probes", "lda", "--no-progress"]) == 2, "bad input"
    install(monkeypatch, {"lda": ZeroDivisionError("a defect")})
    assert cli.main(["run", "--probes", "lda", "--no-progress"]) == 1


def test_only_inapplicable_probes_is_bad_usage(engine: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "--probes", "ccs", "--no-progress"]) == 2
    assert "contrast pairs" in capsys.readouterr().out


def test_threats_and_epsilon_reach_the_engine(engine: Calls) -> None:
    names = "item/natural/best,universal/natural/gaussian/kept"
    assert cli.main(["run", "--probes", "lda", "--no-progress", "--threats", names, "--epsilon", "0.5"]) == 0
    free, kept = engine[0]["threats"]
    assert (free.tail, free.kept, free.epsilon) == ("best", False, None)
    assert (kept.scope, kept.kept, kept.epsilon) == ("universal", True, 0.5)
    cli.main(["run", "--probes", "lda", "--no-progress", "--threats", "free"])
    assert not any(t.kept for t in engine[1]["threats"])
    cli.main(["run", "--probes", "lda", "--no-progress"])
    assert engine[2]["threats"] is None


@pytest.mark.parametrize("group", ["probes", "attacks", "testbeds"])
def test_lists_name_everything_registered(group: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([group, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == registry.names(group)
    assert all(len(text) > 10 and "\n" not in text for text in found.values())
    assert cli.main([group]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(found)


def test_help_has_examples_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["run", "--help"]):
        with pytest.raises(SystemExit) as done:
            cli.main(arguments)
        assert done.value.code == 0
        assert "elk-stress run --testbed statements --preset demo" in capsys.readouterr().out


def test_help_and_bad_usage_load_nothing_heavy() -> None:
    code = (
        "import sys; from elk_stress.cli import main\n"
        "assert main(['run', '--probes', 'nobody']) == 2\n"
        "assert main(['run', '--threats', 'x']) == 2\n"
        "heavy = {'torch', 'jax', 'sklearn', 'scipy', 'transformers', 'matplotlib', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_threads_are_set_before_anything_heavy_loads() -> None:
    code = (
        "import builtins, os, sys\n"
        "os.environ.pop('OMP_WAIT_POLICY', None)\n"
        "real = builtins.__import__\n"
        "def watch(name, *rest, **more):\n"
        "    if name.split('.')[0] == 'torch':\n"
        "        assert os.environ.get('OMP_WAIT_POLICY') == 'PASSIVE', 'torch before threads'\n"
        "    return real(name, *rest, **more)\n"
        "builtins.__import__ = watch\n"
        "from elk_stress import cli\n"
        "from elk_stress.core import registry\n"
        "def load(*a, **k):\n"
        "    import torch\n"
        "    raise ValueError('seen')\n"
        "registry.options = lambda *a: []\n"
        "registry.load = load\n"
        "sys.exit(cli.main(['run', '--no-progress', '--out', sys.argv[1]]))\n"
    )
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "elk-stress: seen\n")


def test_a_closed_pipe_is_no_error() -> None:
    code = "import sys; from elk_stress.cli import main; sys.exit(main(['probes']))"
    shell = f'"{sys.executable}" -c "{code}" | true; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr


# -- arrays ------------------------------------------------------------------------------------------------------------


def write_arrays(folder: Path, *, contexts: int = 0) -> list[str]:
    """Two overlapping classes in files; the flags that name them."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(np.random.SeedSequence(4))
    labels = np.arange(240) % 2
    shape = (240, contexts, 4) if contexts else (240, 4)
    data = rng.standard_normal(shape) * 0.5 + 2.0 * labels.reshape(-1, *[1] * (len(shape) - 1))
    save_file({"activations": data.astype(np.float32), "other": np.ones(3)}, str(folder / "a.safetensors"))
    np.save(folder / "y.npy", labels)
    np.save(folder / "g.npy", np.arange(240) // 2)
    return ["--activations", "a.safetensors", "--labels", "y.npy", "--groups", "g.npy"]


FAST = ["--attacks", "isotropic_noise", "--max-bits", "12", "--no-progress", "--out", "o"]


def test_a_saved_probe_is_stressed_on_arrays_without_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    files = write_arrays(tmp_path)
    direction(np.ones(4), -4.0, name="mine").save("p.safetensors")
    assert cli.main(["run", "--probe", "p.safetensors", *files, *FAST]) == 0
    out = capsys.readouterr().out
    assert "arrays at given" in out
    assert out.rstrip().endswith("written to o")
    record = json.loads((tmp_path / "o" / "result.json").read_text())
    assert [r["probe"] for r in record["results"]] == ["mine"]
    assert record["status"] == "ok"
    assert record["config"]["command"]["probe"] == ["p.safetensors"]
    (name,) = record["results"][0]["threats"]
    assert name.startswith("item/isotropic")
    assert {f.name for f in (tmp_path / "o").iterdir()} >= {"result.json", "report.md", "survival.png", "pieces"}


@pytest.mark.parametrize(
    "name",
    ["[red]loud[/red][link=http://evil.example]x[/link]", "<script>x</script>|`", "../../../up/$x_{$", "x" * 100],
)
def test_a_saved_probe_is_called_as_it_likes_and_shown_as_text(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "a" / "b" / "c"
    work.mkdir(parents=True)
    monkeypatch.chdir(work)
    files = write_arrays(work)
    notes = {"how": "\x1b]8;;http://evil.example\x1b\\ <img src=x> \x1b[31m"}
    direction(np.ones(4), -4.0, name=name, site=name, notes=notes).save("p.safetensors")
    assert cli.main(["run", "--probe", "p.safetensors", *files, *FAST]) == 0
    said = capsys.readouterr()
    assert all(line.isprintable() for line in (said.out + said.err).split("\n"))
    assert name[:30] in said.out
    written = (work / "o" / "report.md").read_text(encoding="utf-8")
    found = rendered(written)
    assert not {"script", "a"} & set(found.tags)
    assert found.tags.count("img") == len(list((work / "o").glob("*.png")))
    spelled = re.sub(r"[`|<>]", lambda c: f"\\x{ord(c[0]):02x}", name)
    assert printable(spelled) in found.text
    assert "\x1b" not in (work / "o" / "result.json").read_text()
    # nothing beside the folder that was asked for
    assert {p.name for p in work.iterdir()} == {"a.safetensors", "y.npy", "g.npy", "p.safetensors", "o"}
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_messages_carry_no_escapes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    files = write_arrays(tmp_path)
    evil = "p\x1b[31m\u202e.safetensors"
    Path(evil).write_bytes(b"nothing")
    for arguments in (
        ["run", "--probe", evil, *files, *FAST],
        ["run", "--probe", "none\x1b]0;x\x07", *files, *FAST],
        ["run", "--probes", "\x1b[2J", *files, *FAST],
        ["\x9b31m"],
        ["ledger", "show", "\x1b[31m"],
        ["ledger", "verify", evil],
    ):
        assert cli.main(arguments) in (1, 2)
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.count("\n") == 1
        assert said.err[:-1].isprintable()


def test_bits_can_be_had_without_any_attack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ["run", *write_arrays(tmp_path), "--probes", "mass_mean", "--attacks", "none", *FAST[2:]]
    assert cli.main(asked) == 0
    (threat,) = json.loads((tmp_path / "o" / "result.json").read_text())["results"][0]["threats"].values()
    assert threat["attacks"] == []
    assert threat["headline"]["value"] > 0


def test_saved_and_named_probes_are_compared_under_contexts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = write_arrays(tmp_path, contexts=6)
    direction(np.array([1.0, 0, 0, 0]), -1.0, name="mine").save("folder")
    threat = ["--threats", "item/natural/gaussian"]
    assert cli.main(["run", "--probe", "folder", "--probes", "mass_mean,ccs", *files, *threat, *FAST]) == 0
    record = json.loads((tmp_path / "o" / "result.json").read_text())
    assert [r["probe"] for r in record["results"]] == ["mine", "mass_mean"]
    assert "ccs" in record["skipped"]
    assert record["comparisons"], "two probes on the same items are compared"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda: np.save("y.npy", np.zeros(240)), "labels hold one class only"),
        (
            lambda: np.save("y.npy", np.arange(9) % 2),
            "and labels (n,), got 240 rows of activations and labels of shape (9,)",
        ),
        (lambda: np.save("y.npy", np.array([{}], dtype=object)), "is no .npy file of numbers"),
        (lambda: Path("a.safetensors").write_bytes(b"no header"), "is not a safetensors file"),
        (
            lambda: np.save("g.npy", np.arange(3)),
            "and groups (n,), got 240 rows of activations and groups of shape (3,)",
        ),
        (lambda: direction(np.ones(5)).save("p.safetensors"), "fitted on 5 features"),
    ],
)
def test_bad_arrays_are_one_line(
    spoil: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    files = write_arrays(tmp_path)
    direction(np.ones(4)).save("p.safetensors")
    spoil()
    assert cli.main(["run", "--probe", "p.safetensors", *files, *FAST]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err


def test_a_saved_probe_meets_a_testbed_too(engine: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def run(testbed: Any, probes: Any, **_: Any) -> Any:
        seen.extend([testbed.name, *probes])
        raise ValueError("enough")

    monkeypatch.setattr("elk_stress.runs.stress.run", run)
    direction(np.ones(4), name="mine").save("p.safetensors")
    assert cli.main(["run", "--probe", "p.safetensors", "--no-progress"]) == 2
    assert cli.main(["run", "--probe", "p.safetensors", "--probes", "lda", "--no-progress"]) == 2
    assert [getattr(p, "name", p) for p in seen] == ["fake", "mine", "fake", "mine", "lda"]


@pytest.mark.parametrize("kind", ["npy", "safetensors"])
def test_arrays_are_mapped_and_equal(kind: str, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    from elk_stress.testbeds.array_loading import read_array

    for dtype in ("float16", "float32", "float64", "int64", "bool"):
        array = (np.arange(24).reshape(2, 3, 4) % 7).astype(dtype)
        path = tmp_path / f"{dtype}.{kind}"
        np.save(path, array) if kind == "npy" else save_file({"whatever": array}, str(path))
        read = read_array(path, "activations")
        assert read.dtype == array.dtype
        np.testing.assert_array_equal(read, array)
        assert not read.flags.writeable, "it was copied"


def test_of_several_tensors_one_must_be_called_activations(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    from elk_stress.testbeds.array_loading import read_array

    save_file({"a": np.ones(2), "b": np.ones(3)}, str(tmp_path / "two.safetensors"))
    with pytest.raises(ValueError, match=r"holds 2 tensors \(a, b\); expected one, or one called 'activations'"):
        read_array(tmp_path / "two.safetensors", "activations")
    (tmp_path / "x.csv").write_text("")
    with pytest.raises(ValueError, match=r"expected activations as \.safetensors or \.npy, got \.csv"):
        read_array(tmp_path / "x.csv", "activations")


@pytest.mark.parametrize("text", ["a", "a:b:c", ":b", ","])
def test_pairs_that_are_none_are_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "--testbed", "linear", "--probes", "rock", "--compare", text]) == 2
    assert "A:B,C:D" in capsys.readouterr().err


def test_several_reads_of_every_item(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--threats", "item/natural/gaussian", "--attacks", "gradient", "--max-bits", "400", "--no-progress"]
    found = {}
    for moved in ("apart", "together"):
        out = tmp_path / moved
        asked = ["run", "--testbed", "linear", "--reads", "4", "--moved", moved, "--probes", "context_average,logistic"]
        assert cli.main([*asked, *options, "--compare", "context_average:logistic", "--out", str(out)]) == 0
        record = json.loads((out / "result.json").read_text())
        assert record["testbed"] == f"linear x 4 {moved}"
        assert [(row["a"], row["b"]) for row in record["comparisons"]] == [("context_average", "logistic")]
        rows = {r["probe"]: r["threats"]["item/natural/gaussian"]["headline"]["value"] for r in record["results"]}
        found[moved] = rows["context_average"]
    # sigma falls with the root of the number of reads where thoughts are independent, and not where they are the same
    assert found["apart"] > 2.5 * found["together"]
    capsys.readouterr()
    assert cli.main(["run", "--testbed", "linear", "--moved", "apart", "--probes", "rock"]) == 2
    assert "--reads" in capsys.readouterr().err
