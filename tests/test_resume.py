"""A run that dies goes on where it stopped: the same numbers, nothing twice, nothing of another run trusted."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elk_stress.cli import main
from elk_stress.core import registry
from elk_stress.core.bits import Bits, BitsBatch, Kind
from elk_stress.core.flags import FlagEntry, flag
from elk_stress.probing.probe import FittedProbe
from elk_stress.runs.stress import PIECES, Interrupted, RunResult, run
from elk_stress.testbeds.linear import Linear
from elk_stress.thoughts import engine, memory, records
from elk_stress.thoughts.engine import prepare, stress
from elk_stress.thoughts.incidental import IncidentalFraction
from elk_stress.thoughts.memory import Memory, identity
from elk_stress.thoughts.power_law import LeftTail
from elk_stress.thoughts.result import (
    AttackResult,
    Audit,
    AuditStage,
    BestOfNCurves,
    Curve,
    Detection,
    ItemBits,
    StressResult,
    ThreatResult,
)
from elk_stress.threats.threat import Threat

THREATS = (Threat(), Threat(scope="universal"))
ATTACKS = ("natural_thoughts", "gradient")
PROBES = ("lda", "mass_mean")
# where the engine finds what it computes with
MADE = ("stress_items", "stress_universal", "run_attack", "_best_of_n", "audit", "_tails", "incidental_fraction")


def linear(**options: Any) -> Linear:
    return Linear(**{"dim": 6, "n_items": 240, "n_contexts": 6, **options})


def small_run(out: Path, **options: Any) -> RunResult:
    return run(linear(), PROBES, out=out, **{"attacks": ATTACKS, "threats": THREATS, **options})


def numbers(result: Any) -> str:
    """Everything but the seconds, exactly: NaN, infinities, types and dtypes too."""
    if isinstance(result, RunResult):
        own = result.to_json()
        own = {name: own[name] for name in own.keys() - {"results", "seconds"}}
        for probe in own["controls"].values():
            assert probe
        return json.dumps([own, [numbers(one) for one in result.results]], sort_keys=True)
    return json.dumps(records.encode(dataclasses.replace(result, seconds=0.0)))


def folder(out: Path) -> tuple[Any, str]:
    """What the reader finds: result.json and report.md, but for the seconds."""
    record = json.loads((out / "result.json").read_text())
    report = (out / "report.md").read_text().replace(f"in {record['seconds']:.0f} s", "in SECONDS")
    for one in (record, *record["results"]):
        del one["seconds"]
    return record, report


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunResult, tuple[Any, str]]:
    """The run that nobody interrupts."""
    out = tmp_path_factory.mktemp("whole")
    return small_run(out), folder(out)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each computation was begun, by name, whose and what."""
    counted: Counter[str] = Counter()

    def counting(name: str, compute: Callable[..., Any]) -> Callable[..., Any]:
        def counted_call(*arguments: Any, **options: Any) -> Any:
            about = []
            for value in arguments:
                if isinstance(value, engine.Baseline):
                    about += [value.probe.name, digest_of(value.probe), value.threat.name]
                elif isinstance(value, FittedProbe) or hasattr(value, "propose"):
                    about += [value.name]
                elif hasattr(value, "baseline"):
                    about += [value.baseline.probe.name, value.baseline.threat.name]
                elif isinstance(value, engine._Baselines):
                    about += [value.probe.name]
            counted[" ".join([name, *about])] += 1
            return compute(*arguments, **options)

        return counted_call

    for name in MADE:
        monkeypatch.setattr(engine, name, counting(name, getattr(engine, name)))
    return counted


def digest_of(probe: FittedProbe) -> str:
    return memory.digest(identity(dict(probe.parameters)))[:8]


def pieces(out: Path) -> list[Path]:
    return sorted((out / PIECES).glob("*/*.json"))


# -- death --------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


@pytest.mark.parametrize("after", ["written", "renamed"])
def test_death_at_every_write_loses_the_row_in_progress_and_nothing_else(
    after: str,
    whole: tuple[RunResult, tuple[Any, str]],
    made: Counter[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sessions that die at their first write (once it is in place), or at their second before it is."""
    real_replace, real_unlink, deaths = os.replace, Path.unlink, 0
    for _ in range(200):
        count = 0

        def replace(source: Path, target: Path) -> None:
            nonlocal count
            if Path(target).parent.parent.name != PIECES:
                return real_replace(source, target)
            count += 1
            if after == "written" and count == 2:
                content = Path(source).read_bytes()
                Path(source).write_bytes(content[: len(content) // 2])
                raise Killed
            real_replace(source, target)
            if after == "renamed":
                raise Killed
            return None

        with monkeypatch.context() as dying:
            dying.setattr(os, "replace", replace)
            # what was being written stays behind
            dying.setattr(Path, "unlink", lambda *_, **__: None)
            try:
                result = small_run(tmp_path)
                break
            except Killed:
                deaths += 1
    assert Path.unlink is real_unlink
    assert numbers(result) == numbers(whole[0])
    assert folder(tmp_path) == whole[1]
    n = len(pieces(tmp_path))
    assert deaths == n - (after == "written"), "one row a session"
    assert n == len(set(made)) + 1, "a file for each, and the default epsilon"
    if after == "renamed":
        assert set(made.values()) == {1}, "nothing is computed twice"
    else:
        assert set(made.values()) <= {1, 2}
        assert sum(made.values()) <= n + deaths, "the row in progress alone"


_CHILD = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
import test_resume
out, at, seen = Path(sys.argv[1]), int(sys.argv[2]), 0

def die(event, arguments):
    # a piece is opened beside itself, opened to be synced, renamed; then what is left of it is removed
    global seen
    if event in ("open", "os.rename", "os.remove") and str(arguments[0]).endswith(".part"):
        seen += 1
        if seen == at:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(die)
test_resume.small_run(out)
"""


def test_a_process_that_is_killed_goes_on_to_the_same_numbers(
    whole: tuple[RunResult, tuple[Any, str]], tmp_path: Path
) -> None:
    rng = np.random.default_rng(np.random.SeedSequence(20))
    found = 0
    for _ in range(3):
        command = [sys.executable, "-c", _CHILD, str(tmp_path), str(rng.integers(5, 20)), str(Path(__file__).parent)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        assert len(pieces(tmp_path)) > found, "every session got on"
        found = len(pieces(tmp_path))
    assert not (tmp_path / "report.md").exists()
    told: list[str] = []
    assert numbers(small_run(tmp_path, tell=told.append)) == numbers(whole[0])
    assert told == [f"{found} finished pieces of an earlier run found; they are not computed again"]
    assert folder(tmp_path) == whole[1]


def test_ctrl_c_keeps_every_finished_row(
    whole: tuple[RunResult, tuple[Any, str]], made: Counter[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = engine.run_attack

    def interrupted(recipe: Any, field: Any, **options: Any) -> Any:
        if recipe.name == "gradient" and field.baseline.probe.name == "mass_mean":
            raise KeyboardInterrupt
        return real(recipe, field, **options)

    with monkeypatch.context() as stopping:
        stopping.setattr(engine, "run_attack", interrupted)
        with pytest.raises(Interrupted) as caught:
            small_run(tmp_path)
    assert [r.probe for r in caught.value.result.results] == ["lda"]
    before = Counter(made)
    assert numbers(small_run(tmp_path)) == numbers(whole[0])
    assert folder(tmp_path) == whole[1]
    again = {name for name in made if before[name] and made[name] > before[name]}
    assert not again
    assert any(name.startswith("run_attack") and "mass_mean" in name for name in made.keys() - before.keys())


def test_a_finished_run_computes_nothing_again_unless_fresh(
    whole: tuple[RunResult, tuple[Any, str]], made: Counter[str], tmp_path: Path
) -> None:
    small_run(tmp_path)
    first, told = Counter(made), list[str]()
    assert numbers(small_run(tmp_path, tell=told.append)) == numbers(whole[0])
    assert made == first
    assert told == [f"{len(pieces(tmp_path))} finished pieces of an earlier run found; they are not computed again"]
    told.clear()
    assert numbers(small_run(tmp_path, fresh=True, tell=told.append)) == numbers(whole[0])
    assert made == Counter({name: 2 * count for name, count in first.items()})
    assert told == [f"{len(pieces(tmp_path))} finished pieces of an earlier run found; they are ignored (fresh)"]


def test_another_probe_or_attack_adds_to_what_is_there(made: Counter[str], tmp_path: Path) -> None:
    run(linear(), ["lda"], out=tmp_path / "a", attacks=["gradient"], threats=THREATS[:1])
    first = Counter(made)
    small_run(tmp_path / "a")
    assert all(made[name] == first[name] for name in first if "_best_of_n" not in name)
    assert len(made) > len(first)


# -- other settings -----------------------------------------------------------------------------------------------

_BASE: dict[str, Any] = {
    "seed": 0, "fpr": 0.05, "max_bits": 100.0, "n_particles": 100, "budget": 100, "behaviour_epsilon": None,
    "probe": "logistic", "attack": {}, "threat": Threat(), "testbed": {}, "prepared": {},
}  # fmt: skip


def one(out: Path | None, tell: Callable[[str], None] = lambda line: None, **changed: Any) -> StressResult:
    """One probe under one threat, with anything changed."""
    given = {**_BASE, **changed}
    probe = registry.load("probes", given["probe"], **given.get("recipe", {}))
    attack = registry.load("attacks", "gradient", **given["attack"])
    prepared = prepare(linear(**given["testbed"]), seed=given["seed"], **given["prepared"])
    names = ("seed", "fpr", "max_bits", "n_particles", "budget", "behaviour_epsilon")
    options = {name: given[name] for name in names}
    kept = None if out is None else Memory(out, tell=tell)
    return stress(prepared, probe, threats=[given["threat"]], attacks=[attack], memory=kept, **options)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pieces of the base settings, for reading."""
    out = tmp_path_factory.mktemp("stored")
    one(out)
    return out


def copied(stored: Path, out: Path) -> Path:
    import shutil

    return Path(shutil.copytree(stored, out / "copy"))


_SHARED = {
    "seed": {"seed": 1},
    "false-positive rate": {"fpr": 0.1},
    "max_bits": {"max_bits": 3.0},
    "particles": {"n_particles": 50},
    "budget": {"budget": 40},
    "behaviour's epsilon": {"behaviour_epsilon": 0.1},
    "testbed's data": {"testbed": {"truth_gap": 5.0}},
    "testbed's output alone": {"testbed": {"gain": 2.0}},
    "testbed's seed": {"testbed": {"seed": 1}},
    "prepared": {"prepared": {"replicates": 300}},
}
_OWN = {
    "probe's hyperparameter": {"recipe": {"l2": 3.0}},
    "another probe": {"probe": "mass_mean"},
    "attack's hyperparameter": {"attack": {"starts": 1}},
    "threat": {"threat": Threat(prior="isotropic")},
    "threat's size": {"threat": Threat(prior="isotropic", c=1.0)},
}


@pytest.mark.parametrize("changed", _SHARED.values(), ids=_SHARED)
def test_under_other_settings_nothing_is_reused(
    changed: dict[str, Any], stored: Path, made: Counter[str], tmp_path: Path
) -> None:
    out, told = copied(stored, tmp_path), list[str]()
    held = len(list(out.glob("*/*")))
    kept = one(out, told.append, **changed)
    expected = Counter(made)
    assert len(told) == 1
    assert told[0].startswith(f"{held} finished pieces of runs with other settings found; they are not used")
    made.clear()
    assert numbers(kept) == numbers(one(None, **changed))
    assert set(expected) == set(made), "all of it was computed"
    made.clear()
    assert numbers(one(out)) == numbers(one(stored)), "and what was there still serves its own settings"
    assert not made


@pytest.mark.parametrize("changed", _OWN.values(), ids=_OWN)
def test_a_piece_of_another_probe_attack_or_threat_is_not_taken(
    changed: dict[str, Any], stored: Path, made: Counter[str], tmp_path: Path
) -> None:
    kept = one(copied(stored, tmp_path), **changed)
    assert any(name.startswith("run_attack") for name in made)
    assert numbers(kept) == numbers(one(None, **changed))


@pytest.mark.parametrize("what", ["version", "code", "platform"])
def test_pieces_of_other_versions_are_not_used(
    what: str, stored: Path, made: Counter[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if what == "version":
        monkeypatch.setattr(memory, "versions", lambda: {"elk-stress": "0.0.1"})
    elif what == "code":
        monkeypatch.setattr(memory, "_code", lambda: "another state of the source")
    else:
        monkeypatch.setattr(memory.platform, "machine", lambda: "abacus")
    one(copied(stored, tmp_path))
    assert {"stress_items", "run_attack", "audit"} <= {name.split()[0] for name in made}


def test_the_source_of_the_package_is_in_the_code_and_what_only_shows_is_not(tmp_path: Path) -> None:
    import shutil

    tree = Path(shutil.copytree(memory._PACKAGE, tmp_path / "elk_stress", ignore=shutil.ignore_patterns("*.pyc")))
    real, memory._PACKAGE = memory._PACKAGE, tree
    try:

        def code() -> str:
            memory._code.cache_clear()
            return memory._code()

        first = code()
        assert code() == first
        for name, counts in {
            "thoughts/engine.py": True, "probes/lda.py": True, "attacks/gradient.py": True, "testbeds/linear.py": True,
            "report/plots.py": False, "cli/__init__.py": False,
        }.items():  # fmt: skip
            with (tree / name).open("a") as file:
                file.write("\n# another state\n")
            assert (code() != first) == counts, name
            first = code()
    finally:
        memory._PACKAGE = real
        memory._code.cache_clear()


def test_more_threats_make_new_curves_from_old_rows(made: Counter[str], tmp_path: Path) -> None:
    prepared = prepare(linear(), replicates=100)
    options: dict[str, Any] = {"attacks": (), "controls": False}
    more = [Threat(), Threat(tail="logistic")]
    stress(prepared, "lda", threats=more[:1], memory=Memory(tmp_path), **options)
    made.clear()
    found = stress(prepared, "lda", threats=more, memory=Memory(tmp_path), **options)
    assert sorted(name.split()[0] for name in made) == ["_best_of_n", "stress_items"]
    assert numbers(found) == numbers(stress(prepared, "lda", threats=more, **options))


def test_a_testbed_that_is_no_record_is_what_it_describes() -> None:
    class Other:
        """The linear testbed behind a class of its own."""

        def __init__(self, **described: Any) -> None:
            self._bed, self._described = linear(), described

        def __getattr__(self, name: str) -> Any:
            return getattr(self._bed, name)

        def describe(self) -> dict[str, Any]:
            return self._described

    found = [memory.digest(memory.prepared_identity(prepare(Other(rank=rank)))) for rank in (1, 2, 1)]
    assert found[0] == found[2] != found[1]


# -- damage -------------------------------------------------------------------------------------------------------


def _flip(content: bytes) -> bytes:
    at = content.index(b"\n") + 40
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def _retold(content: bytes, **changed: str) -> bytes:
    first, rest = content.split(b"\n", 1)
    return json.dumps({**json.loads(first), **changed}).encode() + b"\n" + rest


def _resigned(content: bytes, body: str) -> bytes:
    import hashlib

    head = _retold(content, sha256=hashlib.sha256(body.encode()).hexdigest()).split(b"\n", 1)[0]
    return head + b"\n" + body.encode() + b"\n"


_DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "torn in the header": lambda content: content[:30],
    "torn in the body": lambda content: content[: len(content) // 2],
    "last byte lost": lambda content: content[:-2],
    "one bit": _flip,
    "not text": lambda content: bytes(range(256)),
    "other JSON": lambda content: b'{"a": 1}\n',
    "a list": lambda content: b"[1]\n[2]\n",
    "other format": lambda content: _retold(content, format="elk-stress piece 0"),
    "other settings": lambda content: _retold(content, settings="0" * 64),
    "other key": lambda content: _retold(content, key="0" * 64),
    "whole, but no result": lambda content: _resigned(content, '{"!": "tuple", "of": [{"!": "os.system"}, null]}'),
    "whole, but of other fields": lambda content: _resigned(
        content, '{"!": "tuple", "of": [{"!": "Flag", "of": {"nme": "leak"}}, null]}'
    ),
    "whole, but one value": lambda content: _resigned(content, "3"),
}


@pytest.mark.parametrize("kind", ["threat", "attack", "audit"])
@pytest.mark.parametrize("damage", _DAMAGE.values(), ids=_DAMAGE)
def test_a_damaged_piece_is_said_ignored_and_replaced(
    damage: Callable[[bytes], bytes], kind: str, stored: Path, made: Counter[str], tmp_path: Path
) -> None:
    out, told = copied(stored, tmp_path), list[str]()
    path = sorted(out.glob(f"*/{kind}-*.json"))[0]
    content = path.read_bytes()
    assert content != damage(content)
    path.write_bytes(damage(content))
    assert numbers(one(out, told.append)) == numbers(one(stored))
    assert sum(made.values()) == 1
    assert len(told) == 2
    assert told[1].startswith(f"ignored a damaged piece, {path.name}: ")
    assert all("\n" not in line for line in told)
    assert path.read_bytes() == content, "the same again, byte by byte"


def test_foreign_files_beside_the_pieces_disturb_nobody(stored: Path, made: Counter[str], tmp_path: Path) -> None:
    out = copied(stored, tmp_path)
    (inside,) = out.iterdir()
    (inside / "notes.txt").write_text("mine")
    (inside / ".0f.part").write_bytes(b"half of a piece")
    (inside / "attack-0.json").write_text("{")
    (out / "file").write_text("")
    assert numbers(one(out)) == numbers(one(stored))
    assert not made
    assert (inside / "notes.txt").read_text() == "mine"
    assert not (inside / ".0f.part").exists(), "what a dead session was writing is swept away"


def test_a_full_disk_costs_the_pieces_and_not_the_run(
    whole: tuple[RunResult, tuple[Any, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(memory, "replace_bytes", full)
    told: list[str] = []
    assert numbers(small_run(tmp_path, tell=told.append)) == numbers(whole[0])
    assert pieces(tmp_path) == []
    assert told
    assert all("No space left" in line for line in told)


# -- what a piece depends on --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Alone:
    """An attack from elsewhere, whose content may be anything."""

    how: Any = None
    name: str = "alone"
    access: str = "none"
    scopes: tuple[str, ...] = ("item",)
    needs: tuple[str, ...] = ()
    priors: tuple[str, ...] = ()

    def propose(self, oracle: Any, *, seed: int) -> Any:
        from elk_stress.thoughts.attacks.protocol import Proposal

        return Proposal(np.full((oracle.n_problems, 2, oracle.dim), 0.5))


@pytest.mark.parametrize(("how", "kept"), [(3, True), (len, False), (object(), False), ({1, 2}, False)])
def test_what_cannot_be_told_apart_is_not_kept(how: Any, kept: bool, tmp_path: Path) -> None:
    told: list[str] = []
    prepared = prepare(linear(), replicates=100)
    for _ in range(2):
        found = stress(
            prepared,
            "lda",
            threats=[Threat()],
            attacks=[Alone(how)],
            controls=False,
            memory=Memory(tmp_path, tell=told.append),
        )
        assert found.threats["item/natural/gaussian"].attacks[0].attack == "alone"
    assert bool(list(tmp_path.glob("*/attack-*"))) == kept
    assert any(line.startswith("a piece (attack) is not kept: what a ") for line in told) != kept


def test_identities_differ_where_anything_does() -> None:
    logistic = registry.load("probes", "logistic")
    values: list[Any] = [
        None, True, 1, 1.0, "1", math.nan, math.inf, 0.0, -0.0, 1 / 3, np.nextafter(1 / 3, 1), Kind.EXACT, "exact",
        np.zeros(2), np.zeros(2, dtype=np.float32), np.zeros((1, 2)), np.zeros(0), np.array([0.0, -0.0]), [], [[]],
        {}, {"a": 1}, {"a": 2}, Path("a"), "a", Threat(), Threat(c=0.5), Threat(epsilon=0.1), logistic,
        dataclasses.replace(logistic, l2=0.5), Alone(), Alone(1), np.array(["a"]), np.array(["a"], dtype=object),
    ]  # fmt: skip
    found = [memory.digest(identity(value)) for value in values]
    assert len(set(found)) == len(values)
    assert found == [memory.digest(identity(value)) for value in values]
    assert memory.digest(identity(np.ones((3, 2)).T)) == memory.digest(
        identity(np.ascontiguousarray(np.ones((3, 2)).T))
    )
    assert "source" in identity(Alone())["class"], "an attack from elsewhere counts with its source"
    assert "source" not in identity(logistic)["class"], "the package's own source counts once, for everything"


@dataclasses.dataclass(frozen=True)
class Rounding(Linear):
    """Behaviour as a model has it, exaggerated: it rounds by who is run together, now and when first read."""

    shift_cost = "model"
    _hosts: dict[int, float] = dataclasses.field(default_factory=dict, compare=False)
    _passes: list[int] = dataclasses.field(default_factory=list, compare=False)

    def describe(self) -> dict[str, Any]:
        return {"testbed": "a model that rounds"}

    def shift(self, split: Any, items: np.ndarray, moves: np.ndarray) -> np.ndarray:
        missing = [i for i in items.tolist() if i not in self._hosts]
        self._hosts.update({i: 1e-2 * len(missing) for i in missing})
        self._passes.append(moves.shape[0] * moves.shape[1])
        together = 1.0 + 1e-2 * len(items) + np.array([self._hosts[i] for i in items.tolist()])
        return np.asarray(super().shift(split, items, moves) * together[:, None])

    def shift_factor(self, split: Any, items: np.ndarray) -> np.ndarray:
        self.shift(split, items, np.zeros((len(items), 1, self.dim)))
        rounding = np.array([self._hosts[i] for i in items.tolist()])[:, None, None]
        return np.asarray(super().shift_factor(split, items) * (1 + rounding))


def _rounding(out: Path, passes: list[int], stop: int | None = None) -> list[str]:
    """Two probes whose catches differ, under two priors; ``stop`` after so many new pieces."""
    bed = Rounding(dim=6, n_items=240, n_contexts=6, _passes=passes)
    prepared = prepare(bed, replicates=100, n_verify=16)
    store, made = Memory(out), iter(range(10**6))
    real = memory.replace_bytes

    def replace(path: Path, content: bytes) -> None:
        real(path, content)
        if next(made) + 1 == stop:
            raise Killed

    memory.replace_bytes = replace
    try:
        threats = [Threat(kept=True), Threat(kept=True, tail="logistic")]
        options: dict[str, Any] = {"attacks": ["natural_thoughts"], "controls": False, "n_particles": 50, "budget": 50}
        # they read what behaviour ignores, more or less, so most breaks are kept and none is searched for
        tilted = bed.incidental + 0.1 * np.ones(6) / math.sqrt(6)
        return [
            numbers(stress(prepared, p, threats=threats, memory=store, **options)) for p in (bed.incidental, tilted)
        ]
    finally:
        memory.replace_bytes = real


def test_what_a_model_rounds_does_not_depend_on_where_the_run_died(tmp_path: Path) -> None:
    whole: list[int] = []
    expected = _rounding(tmp_path / "whole", whole)
    n = len(list((tmp_path / "whole").glob("*/*")))
    # the positives, unmoved, before anything else
    first = whole[0]
    for stop in range(1, n + 1):
        passes: list[int] = []
        with pytest.raises(Killed):
            _rounding(tmp_path / str(stop), passes, stop)
        assert _rounding(tmp_path / str(stop), passes) == expected, f"after a death at write {stop}"
        assert sum(passes) == sum(whole) + (first if stop < n else 0), "no forward pass is made twice"
    passes = []
    assert _rounding(tmp_path / "whole", passes) == expected
    assert passes == [], "no forward pass for what is there"


# -- records ------------------------------------------------------------------------------------------------------

nan, inf = math.nan, math.inf
_BITS = Bits(inf, 3.0, inf, Kind.EXACT, "m", 3, 4, "ok", (flag("leak", "ü"),), {"x": np.float32(0.1), "y": (1, None)})
_BATCH = BitsBatch.build(
    np.array([1 / 3, inf]), np.array([0.1, -0.0]), np.array([inf, inf]), [Kind.ESTIMATE, Kind.CENSORED], "m",
    evaluations=7, flags=[(flag("brittle"),), ()], diagnostics={"c": np.array([[nan], [-inf]], dtype=np.float32)},
)  # fmt: skip
_NONE = BitsBatch.build(np.zeros(0), np.zeros(0), np.zeros(0), (), "m")
_DETECTION = Detection(
    nan, 0.05, 1 / 3, (0.0, 1.0), -0.0, (nan, inf), 1e-308, (5e-324, 1.7976931348623157e308), 1, 0, 2
)
_CURVE = Curve(np.arange(3.0), np.array([nan, inf, -inf]), np.zeros(0), np.zeros((0, 3)), np.ones(2), np.array(0.1))
_STAGE = AuditStage("raw", nan, 0.1 + 0.2, -inf, inf)
_AUDIT = Audit("gone", _STAGE, (_STAGE, _STAGE), "none", "t")
_ATTACK = AttackResult("a", "t", nan, (0.0, 1.0), None, None, 0, 0.5, None, None)
_ITEMS = ItemBits(("a", "é"), _BATCH, None, np.array([1.0, nan]), np.array([inf, 0.1], dtype=np.float32))
_THREAT = ThreatResult(Threat(kept=True, epsilon=0.1), "half-life", _BITS, _DETECTION, _CURVE)
_TAIL = LeftTail(**{f.name: np.zeros((0, 2)) if "ndarray" in str(f.type) else 3 for f in dataclasses.fields(LeftTail)})
_CURVES = BestOfNCurves(True, {"gaussian": _CURVE}, _CURVE, 3, 4, {"gaussian": nan}, _TAIL)
_INCIDENTAL = IncidentalFraction(nan, nan, nan, np.array([nan, 0.5]), 2, 3, 0.0)
_RESULT = StressResult(
    "p", "t", "s", {"x": _THREAT}, (_CURVES,), None, {"groups": {"a": [1, (2.0, None)]}, 3: nan},
    {"rock": "none", "o": {}}, {}, (), {"n": np.int64(3), "b": np.bool_(True)}, {}, 0, 1.5, incidental=None,
)  # fmt: skip
_RECORDS: dict[str, Any] = {
    "Bits": _BITS,
    "BitsBatch": _BATCH,
    "BitsBatch of nothing": _NONE,
    "Kind": Kind.LOWER_BOUND,
    "Flag": flag("leak", "more\nlines"),
    "FlagEntry": FlagEntry("a", "b", False),
    "Threat": Threat(scope="universal", metric="auroc", c=1 / 3),
    "Detection": _DETECTION,
    "Curve": _CURVE,
    "ItemBits": _ITEMS,
    "AttackResult": _ATTACK,
    "AttackResult with all": dataclasses.replace(_ATTACK, upper_bound=_BITS, audit=_AUDIT, flags=(flag("leak"),)),
    "AuditStage": _STAGE,
    "Audit": _AUDIT,
    "LeftTail": _TAIL,
    "BestOfNCurves": _CURVES,
    "BestOfNCurves without": dataclasses.replace(_CURVES, left_tail=None, predicted={}),
    "IncidentalFraction": _INCIDENTAL,
    "ThreatResult": _THREAT,
    "ThreatResult with all": dataclasses.replace(
        _THREAT, survival=_CURVE, conditional=(0.1, inf), items=_ITEMS, b_kept=_BITS, epsilon=0.1, scale={"1": nan},
        replicates=np.array([[0.1, inf]]), attacks=(_ATTACK,), flags=(flag("leak"),),
    ),
    "StressResult": _RESULT,
    "StressResult with all": dataclasses.replace(
        _RESULT, audit=_AUDIT, incidental=_INCIDENTAL, controls={"o": {"x": _BITS}}
    ),
}  # fmt: skip


def same(a: Any, b: Any) -> bool:
    """Equal in type and in every bit, NaN and signs of zero included."""
    if type(a) is not type(b):
        return False
    if isinstance(a, (np.ndarray, np.generic)):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, float):
        return a.hex() == b.hex()
    if dataclasses.is_dataclass(a):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, dict):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a.items(), b.items(), strict=True))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.parametrize("value", _RECORDS.values(), ids=_RECORDS)
def test_every_record_comes_back_as_it_was(value: Any) -> None:
    found = records.decode(json.loads(json.dumps(records.encode(value))))
    assert same(found, value)
    assert same(found, records.decode(json.loads(json.dumps(records.encode(found)))))


def test_no_record_is_left_out() -> None:
    assert set(records.kinds()) == {name.split(" ")[0] for name in _RECORDS}


def test_a_real_result_comes_back_as_it_was(whole: tuple[RunResult, tuple[Any, str]]) -> None:
    for result in whole[0].results:
        assert same(records.decode(json.loads(json.dumps(records.encode(result)))), result)


@pytest.mark.parametrize(
    "value", [object(), {1, 2}, len, np.array([None]), b"x", registry, Alone()], ids=lambda v: type(v).__name__
)
def test_what_is_no_result_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="cannot be written"):
        records.encode([value])


@pytest.mark.parametrize(
    "tree",
    [
        {"a": 1},
        {"!": "Path", "of": {}},
        {"!": "Bits", "of": {"value": 1.0}},
        {"!": "Kind", "value": "none"},
        {"!": "array", "dtype": "<f8", "shape": [2], "bytes": "AAAA"},
        {"!": "array", "dtype": "|O", "shape": [1], "bytes": "AAAAAAAAAAA="},
        {"!": "array", "dtype": "no", "shape": [1], "bytes": ""},
        {"!": "map", "of": [[[1], 2]]},
        {"!": "tuple"},
    ],
    ids=str,
)
def test_what_was_never_written_is_refused(tree: Any) -> None:
    with pytest.raises(ValueError):
        records.decode(tree)


# -- the command line ---------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("shown", [["--no-progress"], []], ids=["quiet", "progress"])
def test_the_command_goes_on_and_says_so(shown: list[str], here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["run", "--testbed", "linear", "--probes", "mass_mean", "--attacks", "natural_thoughts", "--threats"]
    command += ["item/natural/gaussian", "--out", "out", *shown]
    assert main(command) == 0
    first, err = folder(here / "out"), capsys.readouterr().err
    assert "finished piece" not in err
    n = len(pieces(here / "out"))
    for extra, said in (([], "not computed again"), (["--fresh"], "ignored (fresh)")):
        assert main([*command, *extra]) == 0
        assert f"elk-stress: {n} finished pieces of an earlier run found; they are {said}" in " ".join(
            capsys.readouterr().err.split()
        )
        assert folder(here / "out") == first
    assert main([*command, "--seed", "1"]) == 0
    assert f"{n} finished pieces of runs with other settings found; they are not used" in capsys.readouterr().err
