"""The run: nothing finished is lost, a failing probe stops nobody, what does not apply is said."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_engine import FakeTestbed, install, light

from elk_stress.core.flags import flag
from elk_stress.runs.folder import UnusableFolder
from elk_stress.runs.stress import Interrupted, run
from elk_stress.testbeds.arrays import Arrays
from elk_stress.testbeds.linear import Linear
from elk_stress.threats.threat import parse_threat


def saved(folder: Path) -> dict[str, Any]:
    record = json.loads((folder / "result.json").read_text())
    assert isinstance(record, dict)
    return record


def test_a_run_writes_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = install(monkeypatch)
    result = run(FakeTestbed(), ["lda", "logistic"], out=tmp_path / "new" / "folder", attacks=["gradient"], seed=3)
    folder = tmp_path / "new" / "folder"
    assert sorted(p.name for p in folder.iterdir()) == [
        "best_of_n.png",
        "bits.png",
        "report.md",
        "result.json",
        "survival.png",
    ]
    assert result.status == "ok"
    assert [r.probe for r in result.results] == ["lda", "logistic"]
    record = saved(folder)
    assert record["status"] == "ok"
    assert record["seed"] == 3
    assert record["versions"]["python"]
    assert record["config"]["probes"] == ["lda", "logistic"]
    assert record["description"] == {"size": "demo", "model": "none"}
    assert {(row["a"], row["b"]) for row in record["comparisons"]} == {("lda", "logistic")}
    assert len(record["comparisons"]) == 1
    assert calls[0]["prepared"] == calls[1]["prepared"] == "prepared testbed 3"
    assert calls[0]["attacks"] == ("gradient",)
    assert "max_bits" not in calls[0], "the engine's own default must hold"


def test_settings_reach_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = install(monkeypatch)
    run(FakeTestbed(), ["lda"], out=tmp_path, max_bits=33.0, fpr=0.1, behaviour_epsilon=0.7)
    assert (calls[0]["max_bits"], calls[0]["fpr"], calls[0]["behaviour_epsilon"]) == (33.0, 0.1, 0.7)
    assert calls[0]["attacks"] == "all"


def test_the_folder_is_checked_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = install(monkeypatch)
    (tmp_path / "file").write_text("")
    testbed = FakeTestbed()
    with pytest.raises(UnusableFolder):
        run(testbed, ["lda"], out=tmp_path / "file")
    assert testbed.prepared == 0
    assert calls == []


def test_results_are_written_after_every_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int]] = []

    def second() -> Any:
        record = saved(tmp_path)
        seen.append((record["status"], len(record["results"])))
        return light("logistic", 5.0)

    install(monkeypatch, {"logistic": second})
    run(FakeTestbed(), ["lda", "logistic"], out=tmp_path)
    assert seen == [("partial", 1)]


def test_ctrl_c_keeps_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, {"logistic": KeyboardInterrupt()})
    with pytest.raises(Interrupted) as caught:
        run(FakeTestbed(), ["lda", "logistic", "mass_mean"], out=tmp_path)
    assert [r.probe for r in caught.value.result.results] == ["lda"]
    record = saved(tmp_path)
    assert record["status"] == "interrupted"
    assert [r["probe"] for r in record["results"]] == ["lda"]
    assert "This run is interrupted" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "survival.png").exists()


def test_ctrl_c_before_the_first_probe_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, {"lda": KeyboardInterrupt()})
    with pytest.raises(Interrupted):
        run(FakeTestbed(), ["lda"], out=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_probe_is_recorded_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, {"lda": ValueError("labels hold one class only"), "mass_mean": ZeroDivisionError("oh")})
    result = run(FakeTestbed(), ["lda", "mass_mean", "logistic"], out=tmp_path)
    assert [r.probe for r in result.results] == ["logistic"]
    assert result.failures == {"lda": "labels hold one class only", "mass_mean": "ZeroDivisionError: oh"}
    assert result.refused == ("lda",), "bad input and no defect"
    assert result.red
    assert saved(tmp_path)["failures"] == dict(result.failures)
    assert "labels hold one class only" in (tmp_path / "report.md").read_text()


def test_all_probes_failing_still_writes_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, {"lda": ValueError("no")})
    result = run(FakeTestbed(), ["lda"], out=tmp_path)
    assert result.results == ()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.md", "result.json"]


def test_ccs_without_pairs_is_skipped_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = install(monkeypatch)
    without = run(FakeTestbed(), ["ccs", "lda"], out=tmp_path)
    assert "contrast pairs" in without.skipped["ccs"]
    assert [c["probe"] for c in calls] == ["lda"]
    having = run(FakeTestbed(pairs=True), ["ccs", "lda"], out=tmp_path)
    assert having.skipped == {}
    assert [r.probe for r in having.results] == ["ccs", "lda"]


def test_controls_of_the_results_are_gathered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    def other() -> Any:
        return dataclasses.replace(light("logistic", 9.0), controls={"random_direction": {}, "paper": "no"})

    install(monkeypatch, {"logistic": other})
    controls = run(FakeTestbed(), ["lda", "logistic"], out=tmp_path).controls
    assert list(controls) == ["rock", "random_direction", "oracle", "paper"]
    assert controls["random_direction"] == {}, "numbers replace a sentence"
    assert not isinstance(controls["paper"], str), "a sentence does not replace numbers"


def test_two_probes_of_one_name_are_both_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    rows = run(FakeTestbed(), ["lda", "lda"], out=tmp_path).comparisons
    assert {(row.a, row.b) for row in rows} == {("lda", "lda 2")}
    assert {row.better for row in rows} == {None}, "a probe does not survive more than itself"


def test_one_probe_is_compared_with_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    assert run(FakeTestbed(), ["lda"], out=tmp_path).comparisons == ()


def test_red_flags_make_a_run_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    def red() -> Any:
        return dataclasses.replace(light("lda", 9.0), flags=(flag("leak"),))

    def pale() -> Any:
        return dataclasses.replace(light("lda", 9.0), flags=(flag("origin_fails"),))

    install(monkeypatch, {"lda": red})
    assert run(FakeTestbed(), ["lda"], out=tmp_path).red
    install(monkeypatch, {"lda": pale})
    assert not run(FakeTestbed(), ["lda"], out=tmp_path).red


def test_a_disk_that_fills_up_meanwhile_loses_no_finished_probe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from elk_stress.runs import stress as module

    install(monkeypatch)
    tries: list[int] = []

    def sometimes(state: Any, folder: Path) -> Path:
        tries.append(len(state.results))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_result", sometimes)
    result = run(FakeTestbed(), ["lda", "logistic"], out=tmp_path)
    assert tries == [1, 2]
    assert [r["probe"] for r in saved(tmp_path)["results"]] == [r.probe for r in result.results]


def test_planted_probes_run_where_they_are_known(tmp_path: Path) -> None:
    threats = [parse_threat("item/natural/gaussian/kept")]
    result = run(
        Linear(dim=8, n_items=160, n_contexts=8), ["oracle", "paper"], out=tmp_path, attacks=[], threats=threats
    )
    assert [r.probe for r in result.results] == ["oracle", "paper"]
    oracle, paper = (r.threats["item/natural/gaussian/kept"].headline for r in result.results)
    assert oracle.value == math.inf
    assert paper.value < 100
    arrays = Arrays(np.random.default_rng(0).standard_normal((200, 4, 6)), np.tile([0, 1], 100))
    free = [parse_threat("item/natural/gaussian")]
    none = run(arrays, ["oracle", "lda"], out=tmp_path / "arrays", attacks=[], threats=free)
    assert none.skipped == {"oracle": "arrays does not know one"}
