"""Checkpoints: a run that dies at any moment goes on to the same numbers, and never under other settings."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load

from elk_stress.training.checkpoint import Checkpoints, ForeignRun, digest

# -- what is kept, and what survives a death between any two writes ----------------------------------------------------

_SETTINGS = {"attack": {"name": "toy", "steps": 5}, "seed": 3}


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def _walk(folder: Path | None, steps: int = 5) -> list[dict[str, Any]]:
    """A toy run: a random walk whose state is nested, of several types, and includes NaN and infinity."""
    kept = Checkpoints(folder, _SETTINGS)
    done, state = kept.resume()
    if state is None:
        state = {"place": np.zeros((2, 3), np.float32), "inner": {"step": np.zeros((), np.int32)}}
        kept.add({"weights": state["place"], "log": np.full(2, np.nan), "spent": np.array([0.0, np.inf])}, state)
        done = kept.finished
    while len(done) <= steps:
        step = int(state["inner"]["step"]) + 1
        rng = np.random.default_rng(np.random.SeedSequence([3, step]))
        place = state["place"] + rng.standard_normal((2, 3), dtype=np.float32)
        state = {"place": place, "inner": {"step": np.asarray(step, dtype=np.int32)}}
        kept.add({"weights": place, "log": rng.standard_normal(2), "spent": np.array([0.0, np.inf])}, state)
        done = kept.finished
    return done


def _same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and a[k].tobytes() == b[k].tobytes() for k in a)
        for a, b in zip(one, other, strict=True)
    )


def test_in_memory_and_on_disk_are_the_same(tmp_path: Path) -> None:
    expected = _walk(None)
    assert len(expected) == 6
    assert _same(_walk(tmp_path / "new" / "folder"), expected)
    # finished: read back, nothing computed or written
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "new" / "folder").iterdir()}
    assert _same(_walk(tmp_path / "new" / "folder"), expected)
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "new" / "folder").iterdir()} == before
    names = {"settings.json", "state.safetensors", *(f"checkpoint-{i:04d}.safetensors" for i in range(6))}
    assert set(before) == names


def test_nested_states_come_back_as_they_were(tmp_path: Path) -> None:
    state = {
        "a": {"b": {"c": np.arange(3, dtype=np.int64), "d": np.float32(2.5)}, "empty": np.zeros((0, 2), np.float32)},
        "transposed": np.arange(6, dtype=np.float64).reshape(2, 3).T,
        "odd": np.array([np.nan, -0.0, np.inf]),
    }
    Checkpoints(tmp_path, {}).add({"weights": np.zeros(1)}, state)
    _, read = Checkpoints(tmp_path, {}).resume()
    assert read is not None
    for place in (("a", "b", "c"), ("a", "b", "d"), ("a", "empty"), ("transposed",), ("odd",)):
        found, expected = read, state
        for name in place:
            found, expected = found[name], expected[name]
        assert np.asarray(found).dtype == np.asarray(expected).dtype
        assert np.asarray(found).shape == np.asarray(expected).shape
        assert np.asarray(found).tobytes() == np.ascontiguousarray(expected).tobytes()


@pytest.mark.parametrize("after", ["written", "renamed"])
def test_death_at_any_write_goes_on_to_the_same_numbers(
    after: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every write, before and after its rename; what is written beside stays behind half-written, as after a kill."""
    expected, real_replace, real_unlink = _walk(None), os.replace, Path.unlink
    # settings, and a checkpoint and a state for each of 6
    writes = 1 + 2 * 6
    for death in range(writes):
        folder, count = tmp_path / str(death), iter(range(10**6))

        def replace(source: Path, target: Path, *, death: int = death, count: Iterator[int] = count) -> None:
            last = next(count) == death
            if last and after == "written":
                content = Path(source).read_bytes()
                Path(source).write_bytes(content[: len(content) // 2])
                raise Killed
            real_replace(source, target)
            if last:
                raise Killed

        monkeypatch.setattr(os, "replace", replace)
        monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
        with pytest.raises(Killed):
            _walk(folder)
        monkeypatch.setattr(os, "replace", real_replace)
        monkeypatch.setattr(Path, "unlink", real_unlink)
        assert any(p.suffix == ".part" for p in folder.iterdir()) == (after == "written")
        assert _same(_walk(folder), expected), f"after a death at write {death}"


def test_a_file_is_never_seen_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever anything is renamed into place, all that the folder then holds can be read."""
    real_replace, seen = os.replace, 0

    def replace(source: Path, target: Path) -> None:
        nonlocal seen
        assert Path(source).parent == Path(target).parent, "a rename is atomic only within a file system"
        real_replace(source, target)
        done, state = Checkpoints(tmp_path, _SETTINGS).resume()
        assert (state is None) == (not done)
        if state is not None:
            assert int(state["inner"]["step"]) == len(done) - 1
            assert np.array_equal(state["place"], done[-1]["weights"])
            seen = len(done)

    monkeypatch.setattr(os, "replace", replace)
    _walk(tmp_path)
    assert seen == 6


def test_without_a_state_the_run_starts_afresh(tmp_path: Path) -> None:
    expected = _walk(tmp_path)
    (tmp_path / "state.safetensors").unlink()
    (tmp_path / ".0123.part").write_bytes(b"half")
    assert Checkpoints(tmp_path, _SETTINGS).resume() == ([], None)
    assert _same(_walk(tmp_path), expected)


def test_another_runs_folder_is_refused(tmp_path: Path) -> None:
    _walk(tmp_path)
    other = {"attack": {"name": "toy", "steps": 6}, "seed": 3, "mode": "refit"}
    with pytest.raises(ForeignRun) as refusal:
        Checkpoints(tmp_path, other).resume()
    message = str(refusal.value)
    assert "attack, mode differ" in message
    assert "attack was {'name': 'toy', 'steps': 5}, now {'name': 'toy', 'steps': 6}" in message
    assert str(tmp_path) in message
    assert "choose another folder with --out (out=), or remove it" in message
    assert isinstance(refusal.value, ValueError)
    # and it is left as it was
    assert _same(_walk(tmp_path), _walk(None))


def test_digests_tell_arrays_apart() -> None:
    rng = np.random.default_rng(np.random.SeedSequence(0))
    array = rng.standard_normal((3, 4)).astype(np.float32)
    assert digest(array) == digest(np.asfortranarray(array))
    other = array.copy()
    other[0, 0] = np.nextafter(other[0, 0], np.float32(9))
    assert digest(array) != digest(other)


# -- kill -9 at random moments -----------------------------------------------------------------------------------------

_RUN = '''
import json, sys
from elk_stress.attacks.finetune import Finetune
from elk_stress.testbeds.superposition import Superposition
from elk_stress.training.loop import stress_training
from elk_stress.training.organism_trainee import OrganismTrainee

class Tell:
    """A progress bar that says when a checkpoint was kept, and goes on when told to (or when nobody is there)."""
    def add_task(self, what, total, completed):
        print("begin", completed, flush=True)
        sys.stdin.readline()
        return 0
    def advance(self, task):
        print("kept", flush=True)
        sys.stdin.readline()

organism = Superposition(n_features=16, width=6, n_models=2, n_train=96, n_calibration=48, n_test=48, n_contexts=2,
                         training_steps=400, batch_size=128)
result = stress_training(
    OrganismTrainee(organism, n_draws=5), "lda", attack=Finetune(learning_rate=1e-2, batch_size=32), mode="refit",
    held_out=("mass_mean",), strengths=(0.3, 3.0), steps=24, checkpoints=24, draws=1, audit_points=1,
    out=sys.argv[1], progress=Tell(),
)
record = result.to_json()
del record["seconds"]
print("result", json.dumps(record, sort_keys=True), flush=True)
'''


class _Process:
    """The run above in a process of its own; compiled programs are shared through a folder."""

    def __init__(self, out: Path, cache: Path) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        self.errors = out.parent / f"{out.name}.stderr"
        with self.errors.open("ab") as sink:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _RUN, str(out)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=sink,
                env=environment,
                text=True,
            )

    def line(self) -> str:
        """The next line; waits for it. Empty at the end."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def go(self) -> None:
        """Let it make one more step."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def begin(self) -> int:
        """Steps of the schedule that it found finished; waits until training begins."""
        words = self.line().split()
        assert words[:1] == ["begin"], self.errors.read_text()
        return int(words[1])

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self._end(-signal.SIGKILL)

    def finish(self) -> dict[str, Any]:
        """The result; lets it go on and waits for the end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        line = "kept"
        while line == "kept":
            line = self.line()
        self._end(0)
        assert line.startswith("result "), self.errors.read_text()
        record = json.loads(line.removeprefix("result "))
        assert isinstance(record, dict)
        return record

    def _end(self, expected: int) -> None:
        assert self.process.stdout is not None
        assert self.process.stdin is not None
        code = self.process.wait()
        self.process.stdout.close()
        self.process.stdin.close()
        assert code == expected, self.errors.read_text()


def test_kill_9_at_random_moments_resumes_to_the_same_numbers(tmp_path: Path) -> None:
    """Again and again in the same folder; the uninterrupted run has one of its own."""
    cache, out = tmp_path / "cache", tmp_path / "killed"
    whole = _Process(tmp_path / "whole", cache)
    assert whole.begin() == 0
    expected = whole.finish()
    last = len(expected["steps"]) - 1
    assert last >= 18
    assert np.isfinite(expected["measured"]["auroc"]["lda"]).all()

    rng = np.random.default_rng(np.random.SeedSequence(9))
    finished = 0
    for _ in range(3):
        run = _Process(out, cache)
        assert run.begin() == finished, "what was finished is not computed again"
        steps = int(rng.integers(1, 3))
        for _ in range(steps):
            run.go()
            assert run.line() == "kept", run.errors.read_text()
        # somewhere in the next step: fitting, training, writing beside, renaming, or at its end
        run.go()
        for _ in range(int(rng.integers(0, 6000))):
            (out / "state.safetensors").stat()
        run.kill()
        reached = int(load((out / "state.safetensors").read_bytes())["finished"]) - 1
        assert finished + steps <= reached <= finished + steps + 1 < last
        finished = reached
    (out / ".0f.part").write_bytes(b"half of a state")

    run = _Process(out, cache)
    assert run.begin() == finished
    assert run.finish() == expected
