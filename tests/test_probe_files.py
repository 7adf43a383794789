"""Probes on disk and on a hub: what goes in comes out, pickles stay shut, and what cannot be stored says why."""

from __future__ import annotations

import base64
import functools
import hashlib
import http.server
import json
import pickle
import re
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from safetensors.numpy import save

from elk_stress.core import registry
from elk_stress.core.registry import UnknownName
from elk_stress.probing.multi_read import Flat, flatten
from elk_stress.probing.probe import FittedProbe, Traits, as_fitted, direction
from elk_stress.probing.saving import model_card
from elk_stress.probing.wrapping.layers import Layers
from elk_stress.testing import planted_classes
from elk_stress.testing.case import Case

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROWS = np.random.default_rng(np.random.SeedSequence(1)).standard_normal((5, 16))


def logistic(**options: Any) -> FittedProbe:
    data = planted_classes()
    return as_fitted(registry.load("probes", "logistic", **options), data.activations, data.labels, site="layers.3")


def network() -> FittedProbe:
    rng = np.random.default_rng(np.random.SeedSequence(2))
    numbers = {"weight_0": rng.standard_normal((16, 4)), "bias_0": np.zeros(4)}
    numbers |= {"weight_2": rng.standard_normal((4, 1)), "bias_2": np.ones(1)}
    return FittedProbe(Layers(("affine", "leaky_relu:0.1", "affine")), numbers, dim=16)


PROBES = {
    "registered": lambda: logistic(l2=0.3),
    "direction": lambda: direction(
        np.arange(16.0),
        2.0,
        name="mine",
        notes={"found": "by hand", "auroc": np.float32(1)},
    ),
    "layers": network,
    "a recipe within one": lambda: flatten(
        as_fitted("mlp", planted_classes(dim=8).activations, planted_classes(dim=8).labels), 2
    ),
}


@pytest.mark.parametrize("where", ["folder", "made/on/demand.safetensors"])
@pytest.mark.parametrize("make", PROBES.values(), ids=PROBES)
def test_a_probe_comes_back(make: Any, where: str, tmp_path: Path) -> None:
    probe = make()
    path = probe.save(tmp_path / where)
    assert path == tmp_path / where
    loaded = FittedProbe.load(str(path))
    assert loaded.probe == probe.probe
    assert (loaded.site, loaded.dim, dict(loaded.notes)) == (probe.site, probe.dim, dict(probe.notes))
    assert np.array_equal(loaded.score(ROWS), probe.score(ROWS))
    assert np.ptp(probe.score(ROWS)) > 0
    for name, value in probe.parameters.items():
        assert (loaded.parameters[name].dtype, loaded.parameters[name].shape) == (value.dtype, value.shape)
    # and again over itself
    assert np.array_equal(FittedProbe.load(loaded.save(path)).score(ROWS), probe.score(ROWS))
    left = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert left == (["folder/probe.json", "folder/probe.safetensors"] if where == "folder" else [where])


def test_the_file_within_a_folder_is_read_with_its_record(tmp_path: Path) -> None:
    folder = logistic().save(tmp_path)
    assert FittedProbe.load(folder / "probe.safetensors").name == "logistic"
    (folder / "probe.json").unlink()
    with pytest.raises(ValueError, match=r"holds arrays but no record of a probe.*elk_stress\.direction"):
        FittedProbe.load(folder / "probe.safetensors")


def test_read_only_and_transposed_parameters_are_saved_as_they_look(tmp_path: Path) -> None:
    weight = np.arange(32.0).reshape(16, 2).T[1]
    weight.setflags(write=False)
    probe = direction(weight)
    np.testing.assert_array_equal(FittedProbe.load(probe.save(tmp_path)).parameters["weight"], weight)


# -- pickles -----------------------------------------------------------------------------------------------------------


class Bomb:
    """Leaves a mark if anybody unpickles it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("name", ["probe.pkl", "p.pickle", "p.pt", "p.PTH", "p.joblib", "p.bin", "p.safetensors", "p"])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_pickle_is_refused_by_name_or_first_bytes_and_never_run(name: str, protocol: int, tmp_path: Path) -> None:
    mark = tmp_path / "boom"
    (tmp_path / name).write_bytes(pickle.dumps(Bomb(mark), protocol=protocol))
    with pytest.raises(ValueError, match=r"a pickle: a program that runs when it is loaded.*elk_stress\.wrap"):
        FittedProbe.load(tmp_path / name)
    assert not mark.exists()
    pickle.loads((tmp_path / name).read_bytes())
    assert mark.exists(), "the bomb is a dud: the test proves nothing"


def test_what_torch_saves_is_refused_by_its_first_bytes(tmp_path: Path) -> None:
    import torch

    torch.save({"weight": torch.ones(3)}, tmp_path / "probe.safetensors")
    with pytest.raises(ValueError, match="is, or may be, a pickle"):
        FittedProbe.load(tmp_path / "probe.safetensors")


def test_no_probe_is_saved_under_a_pickles_name_and_a_folder_of_pickles_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a pickle"):
        direction(np.ones(2)).save(tmp_path / "probe.pkl")
    (tmp_path / "model.pkl").write_bytes(b"\x80\x04N.")
    with pytest.raises(FileNotFoundError, match=r"holds no probe\.json.*model\.pkl may be pickles"):
        FittedProbe.load(tmp_path)


# -- what is wrong with a file -----------------------------------------------------------------------------------------


def test_what_is_not_there_or_no_probe(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        FittedProbe.load(tmp_path / "nowhere.safetensors")
    (tmp_path / "noise.safetensors").write_bytes(b"not a header at all")
    with pytest.raises(ValueError, match="is not a safetensors file that numpy can read"):
        FittedProbe.load(tmp_path / "noise.safetensors")
    folder = direction(np.ones(2)).save(tmp_path / "probe")
    for text, message in (("{", "is not JSON"), ("[]", "holds a list"), ("{}", "is no record of a probe")):
        (folder / "probe.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            FittedProbe.load(folder)


def test_unknown_names_say_which_package_and_unknown_options_which_version(tmp_path: Path) -> None:
    folder = logistic().save(tmp_path)
    record = json.loads((folder / "probe.json").read_text())
    assert record["package"] == "elk_stress"
    (folder / "probe.json").write_text(json.dumps(record | {"name": "theirs", "package": "their_probes"}))
    with pytest.raises(UnknownName, match=r"no probe is called 'theirs'.*install the package.*'theirs'") as caught:
        FittedProbe.load(folder)
    assert "their_probes" in str(caught.value)
    (folder / "probe.json").write_text(json.dumps(record | {"recipe": {"lambda": 3}}))
    with pytest.raises(ValueError, match=r"takes: l2, .*another version of elk_stress"):
        FittedProbe.load(folder)


@dataclass(frozen=True)
class Odd:
    """A recipe with a field that no file can hold."""

    field: Any
    name: ClassVar[str] = "odd"
    traits: ClassVar[Traits] = Traits(learns=False)

    def fit(self, activations: Any, labels: Any, *, pairs: Any = None, seed: int = 0) -> FittedProbe:
        raise TypeError

    def score(self, xp: Any, parameters: Mapping[str, Any], activations: Any) -> Any:
        return xp.sum(activations, axis=-1)


@dataclass(frozen=True)
class Shy(Odd):
    """A recipe that says why it cannot be saved."""

    unsaveable: ClassVar[str] = "it is nobody's business"


def test_what_cannot_be_stored_says_why(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"field 'field' of probe 'odd' is a set, which a file cannot hold"):
        FittedProbe(Odd({1}), {}).save(tmp_path / "no")
    with pytest.raises(ValueError, match=r"field 'field' of probe 'odd' is somebody's code.*to load code is to run it"):
        FittedProbe(Odd(print), {}).save(tmp_path / "no")
    with pytest.raises(ValueError, match="cannot be saved: it is nobody's business"):
        FittedProbe(Shy(1), {}).save(tmp_path / "no")
    with pytest.raises(ValueError, match="cannot be saved: it is nobody's business"):
        FittedProbe(Odd((Shy(1),)), {}).save(tmp_path / "no")
    with pytest.raises(ValueError, match="note 'how' of probe 'direction' is a set"):
        direction(np.ones(2), notes={"how": {1}}).save(tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_somebodys_function_is_not_saved(tmp_path: Path) -> None:
    from elk_stress.probing.wrapping import wrap

    probe = wrap(lambda rows: rows.sum(axis=-1), dim=16)
    with pytest.raises(ValueError, match=r"cannot be (saved|stored)"):
        probe.save(tmp_path / "no.safetensors")


# -- files of anybody --------------------------------------------------------------------------------------------------


def record_of(probe: FittedProbe) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, Any] = json.loads((probe.save(folder) / "probe.json").read_text())
        return found


def written(path: Path, record: Any, numbers: Mapping[str, np.ndarray]) -> Path:
    """A file of one's own making, as whoever means ill writes it."""
    text = record if isinstance(record, str) else json.dumps(record)
    path.write_bytes(save(dict(numbers), metadata={"elk_stress": text}))
    return path


OLD = ("format", "digest", "parameters")
LDA = {"weight": np.arange(16.0), "bias": np.array(0.5)}


def lda_record(**changes: Any) -> dict[str, Any]:
    """What version 0 wrote: neither format nor digest."""
    kept = {"name": "lda", "recipe": {"shrinkage": None}, "package": "elk_stress", "site": "layers.3"}
    return {**kept, "notes": {}, "dim": 16, **changes}


def test_a_file_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    loaded = FittedProbe.load(written(tmp_path / "p.safetensors", lda_record(), LDA))
    np.testing.assert_array_equal(loaded.score(ROWS), ROWS @ LDA["weight"] + 0.5)
    unknown = lda_record(dim=None, anything="else")
    assert FittedProbe.load(written(tmp_path / "p.safetensors", unknown, LDA)).dim == 16


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"format": 2}, r"format 2 by a newer elk_stress; this one reads up to 1: upgrade"),
        ({"format": "1"}, "its format is a whole number"),
        ({"format": True}, "its format is a whole number"),
        ({"name": ["lda"]}, "its name and package are texts"),
        ({"recipe": []}, "its recipe a table"),
        ({"recipe": {"shrinkage": "all"}}, r"field 'shrinkage' of probe 'lda' is float \| None, got 'all'"),
        ({"recipe": {"shrinkage": True}}, "field 'shrinkage'"),
        ({"recipe": {"group": "probes"}}, "another version of elk_stress"),
        ({"recipe": {"name": "mlp"}}, "another version of elk_stress"),
        ({"name": "mahalanobis", "recipe": {"shrinkage": -1}}, "shrinkage is a share"),
        ({"name": "mlp", "recipe": {"width": 1.5}}, "field 'width' of probe 'mlp' is int, got '1.5'"),
        ({"name": "mlp", "recipe": {"decays": [1, "x"]}}, "field 'decays'"),
        ({"name": "mlp", "recipe": {"decays": []}}, "p.safetensors: "),
        ({"name": "logistic_tails", "recipe": {"tail": "none"}}, "field 'tail'"),
        ({"name": "ensemble", "recipe": {"base": ["mlp"]}}, "field 'base'"),
        ({"name": "ensemble", "recipe": {"base": "ensemble"}}, "one activation per item"),
        ({"name": "flat", "recipe": {"recipe": {"probe": {"name": "lda", "recipe": {}}}, "tokens": "4"}}, "'tokens'"),
        (
            {"name": "flat", "recipe": {"recipe": {"probe": {"name": "mlp", "recipe": {}}}, "tokens": 0}},
            "does not hold",
        ),
        ({"name": "flat", "recipe": {"recipe": "lda", "tokens": 4}}, "field 'recipe'"),
        ({"name": "layers", "recipe": {"layers": ["affine"]}}, "parameter 'weight_0' is missing"),
        ({"name": "layers", "recipe": {"layers": [["affine"]]}}, "field 'layers'"),
        ({"name": "direction", "recipe": {"called": "a\x1b[31m"}}, "visible characters"),
        ({"name": "direction", "recipe": {"called": "x" * 101}}, "got 101 characters"),
        ({"name": "direction", "recipe": {"called": 3}}, "field 'called'"),
        ({"name": "mlp", "recipe": {}}, "parameter 'centre' is missing"),
        ({"site": "a\nb"}, "the site of probe 'lda' is one line"),
        ({"site": None}, "its site is a text"),
        ({"notes": [1]}, "its notes a table"),
        ({"dim": 17}, "in shapes that score activations"),
        ({"dim": 0}, "its width is a number of features"),
        ({"dim": True}, "its width is a number of features"),
        ({"dim": 10**12}, "its width is a number of features"),
        ({"dim": "16"}, "its width is a number of features"),
        ({"parameters": ["weight"]}, "the record says that its parameters are"),
        ({"digest": "0" * 64}, "changed after it was saved: its digest does not hold.* take the digest out"),
        ({"digest": ""}, "digest does not hold"),
        ({"digest": None}, "digest does not hold"),
    ],
)
def test_records_that_lie_are_refused(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=told) as caught:
        FittedProbe.load(written(tmp_path / "p.safetensors", lda_record(**changes), LDA))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"notes": NaN}', "NaN is no number"),
        ('{"dim": 1e999}', "too large"),
        ('{"dim": ' + "9" * 5000 + "}", "is not JSON"),
        ('{"name": "lda", "name": "mlp"}', "a key is there twice"),
        ("3", "holds a int"),
    ],
)
def test_records_that_are_no_json_are_refused(text: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=told):
        FittedProbe.load(written(tmp_path / "p.safetensors", text, LDA))
    folder = logistic().save(tmp_path / "folder")
    (folder / "probe.json").write_text(text)
    with pytest.raises(ValueError, match=told):
        FittedProbe.load(folder)


def test_a_recipe_within_recipes_without_end_is_refused(tmp_path: Path) -> None:
    level = '{"name": "flat", "recipe": {"tokens": 1, "recipe": {"probe": '
    for depth in (30, 320, 100_000):
        text = level * depth + '{"name": "lda", "recipe": {}}' + "}}}" * depth
        with pytest.raises(ValueError, match="nested too deeply"):
            FittedProbe.load(written(tmp_path / "p.safetensors", text, LDA))
    notes = json.dumps(lda_record()).replace('"notes": {}', '"notes": {"a": ' + "[" * 99 + "]" * 99 + "}")
    with pytest.raises(ValueError, match="nested too deeply"):
        FittedProbe.load(written(tmp_path / "p.safetensors", notes, LDA))


@pytest.mark.parametrize(
    ("numbers", "told"),
    [
        (
            {"weight": np.full(16, np.nan), "bias": np.array(0.0)},
            r"16 of 16 numbers of parameter 'weight' are not finite",
        ),
        ({"weight": np.ones(16), "bias": np.array(np.inf)}, "1 of 1 numbers of parameter 'bias'"),
        ({"weight": np.ones(16, np.complex64), "bias": np.array(0.0)}, "holds complex64; expected real numbers"),
        ({"weight": np.ones((2, 16)), "bias": np.array(0.0)}, "does not hold the parameters of 'lda' in shapes"),
        ({"weight": np.ones((16, 2)), "bias": np.array(0.0)}, r"scores of shape \(3, 2\)"),
        ({"weight": np.ones(16), "bias": np.ones(2)}, "in shapes that score activations"),
        ({"weight": np.ones(16)}, "parameter 'bias' is missing"),
        ({"weight": np.full(16, 1e308), "bias": np.array(0.0)}, "not finite"),
        ({**LDA, "extra": np.ones(3)}, "holds parameters that 'lda' does not have: extra"),
        ({}, "in shapes that score activations"),
    ],
)
def test_parameters_that_do_not_fit_the_recipe_are_refused(
    numbers: dict[str, np.ndarray], told: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=told):
        FittedProbe.load(written(tmp_path / "p.safetensors", lda_record(), numbers))


def test_a_record_beside_other_numbers_is_refused(tmp_path: Path) -> None:
    one, other = logistic(l2=0.3).save(tmp_path / "one"), logistic(l2=3.0).save(tmp_path / "other")
    (one / "probe.json").write_bytes((other / "probe.json").read_bytes())
    with pytest.raises(ValueError, match="its digest does not hold"):
        FittedProbe.load(one)
    # by hand, and said so
    record = json.loads((other / "probe.json").read_text())
    record["notes"]["mine"] = True
    (other / "probe.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="its digest does not hold"):
        FittedProbe.load(other)
    del record["digest"]
    (other / "probe.json").write_text(json.dumps(record))
    assert FittedProbe.load(other).notes["mine"] is True


def test_a_folder_holds_files_and_they_may_be_links(tmp_path: Path) -> None:
    folder = logistic().save(tmp_path / "probe")
    # as the hub's own cache lies
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in folder.iterdir():
        (linked / file.name).symlink_to(file)
    assert FittedProbe.load(linked).name == "logistic"
    (linked / "probe.json").unlink()
    (linked / "probe.json").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no probe\.json"):
        FittedProbe.load(linked)
    (folder / "probe.json").write_bytes(b"\xff{}")
    with pytest.raises(ValueError, match=r"byte 0 is no UTF-8"):
        FittedProbe.load(folder)


def test_what_could_not_be_read_back_is_not_saved(tmp_path: Path) -> None:
    layers = network()
    with pytest.raises(ValueError, match=r"1 of 1 numbers of parameter 'bias_2' are not finite"):
        replace(layers, parameters={**layers.parameters, "bias_2": np.array([np.nan])}).save(tmp_path / "no")
    with pytest.raises(ValueError, match="is inf, which a file cannot hold"):
        FittedProbe(Odd(float("inf")), {}).save(tmp_path / "no")
    with pytest.raises(ValueError, match=r"field 'tokens' of probe 'layers' is int, got '2\.0'"):
        FittedProbe(Flat(layers.probe, 2.0), layers.parameters).save(tmp_path / "no")  # type: ignore[arg-type]
    assert not (tmp_path / "no").exists()
    # a note may be not known
    probe = direction(np.ones(3), notes={"loss": float("nan"), "all": [1.0, {"of": np.inf}]})
    assert FittedProbe.load(probe.save(tmp_path / "p")).notes == {"loss": None, "all": [1.0, {"of": None}]}


# fitted within moments, one of every kind of parameters and options
QUICK = ("lda", "mlp", "mahalanobis", "nearest_neighbours", "orthogonal_ensemble", "logistic_tails", "context_average")


@functools.cache
def quick(name: str) -> FittedProbe:
    return Case(registry.load("probes", name), 0).fitted if name in QUICK else PROBES[name]()


@pytest.mark.parametrize("digest", [True, False])
@pytest.mark.parametrize("name", [*QUICK, "layers", "a recipe within one"])
def test_damage_is_refused_or_changes_nothing(
    name: str, digest: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Bytes changed, cut and joined: with a digest the same scores or none; without, finite numbers in their shapes."""
    probe, path = quick(name), tmp_path_factory.mktemp("damaged") / "p.safetensors"
    probe.save(path)
    if not digest:
        old = {key: value for key, value in record_of(probe).items() if key not in OLD}
        written(path, old, probe.parameters)
    whole = path.read_bytes()
    rows = np.random.default_rng(np.random.SeedSequence(3)).standard_normal((4, 4, int(probe.dim or 16)))
    rows = rows if probe.traits.tokens else rows[0]
    good, seen = probe.score(rows), {"refused": 0, "same": 0, "other": 0}
    header = 8 + int.from_bytes(whole[:8], "little")
    places = st.one_of(st.integers(0, header - 1), st.integers(0, len(whole) - 1))

    @settings(max_examples=40, deadline=None)
    @given(
        flips=st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=3),
        cut=st.one_of(st.none(), st.tuples(places, places)),
    )
    def damage(flips: list[tuple[int, int]], cut: tuple[int, int] | None) -> None:
        content = bytearray(whole)
        for at, value in flips:
            content[at] = value
        path.write_bytes(content if cut is None else content[: cut[0]] + content[cut[1] :])
        try:
            loaded = FittedProbe.load(path)
        except (ValueError, UnknownName):
            seen["refused"] += 1
            return
        assert all(np.isfinite(value).all() for value in loaded.parameters.values())
        with np.errstate(over="ignore"):
            same = loaded.dim == probe.dim and np.array_equal(loaded.score(rows), good)
        assert same or not digest
        seen["same" if same else "other"] += 1

    damage()
    assert seen["refused"] > 10


@pytest.mark.parametrize("entry", ["digest", "dim", "parameters", "format"])
def test_an_entry_whose_name_was_damaged_is_not_taken_for_absent(entry: str, tmp_path: Path) -> None:
    probe = quick("lda")
    path = probe.save(tmp_path / "p.safetensors")
    whole = path.read_bytes()
    name = f'\\"{entry}\\"'.encode()
    assert whole.count(name) == 1
    path.write_bytes(whole.replace(name, name.replace(entry[:1].encode(), b" ", 1)))
    with pytest.raises(ValueError, match=r"entries of other names|digest does not hold"):
        FittedProbe.load(path)


@pytest.mark.parametrize("name", QUICK)
def test_every_bit_of_a_weight_is_in_the_digest(name: str, tmp_path: Path) -> None:
    probe = quick(name)
    path = probe.save(tmp_path / "p.safetensors")
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    rng = np.random.default_rng(np.random.SeedSequence(4))
    for at in rng.integers(start, len(whole), 20):
        content = bytearray(whole)
        content[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"not finite|digest does not hold|in shapes that score"):
            FittedProbe.load(path)


def test_a_card_is_text_and_no_markup() -> None:
    """Held against a Markdown parser."""
    hostile = "</script><script>alert(1)</script> | [x](http://evil.example) ``` `"
    probe = direction(np.ones(2), name=hostile, site=hostile, notes={hostile: f"{hostile}\n```\n# {hostile}\x1b[31m"})
    card = model_card(probe, "owner/probe")
    shown = MarkdownIt("commonmark", {"html": True}).enable("table").render(card.split("---\n", 2)[2])
    ours = {"h1", "p", "table", "thead", "tbody", "tr", "th", "td", "code", "pre"}
    assert set(re.findall(r"<([a-z0-9]+)", shown)) == ours
    assert "<script" not in card
    assert "\x1b" not in card
    block = card.split("```json\n")[1].rsplit("\n```", 1)[0]
    assert json.loads(block)["notes"][hostile].endswith("\x1b[31m")


# -- the hub -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A hub of one repository, ``owner/probe``, on this machine; the real client talks to it over HTTP."""
    from huggingface_hub import constants

    state: dict[str, Any] = {
        "files": {},
        "requests": [],
        "commit": COMMIT,
        "exists": False,
        "message": None,
        "token": None,
    }

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            state["requests"].append((self.command, self.path))
            state["token"] = self.headers.get("Authorization")
            files = state["files"]
            if not state["exists"]:
                self.answer(404, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"})
            elif self.path.startswith("/api/models/owner/probe"):
                tree = [{"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in files.items()]
                info = {
                    "id": "owner/probe",
                    "sha": state["commit"],
                    "siblings": [{"rfilename": name} for name in files],
                }
                self.answer(200, tree if "/tree/" in self.path else info)
            elif "/resolve/" in self.path and (name := self.path.rsplit("/", 1)[1]) in files:
                etag = hashlib.sha1(files[name], usedforsecurity=False).hexdigest()
                self.answer(200, files[name], {"ETag": f'"{etag}"', "X-Repo-Commit": state["commit"]})
            else:
                self.answer(404, {"error": "no entry"}, {"X-Error-Code": "EntryNotFound"})

        def do_POST(self) -> None:
            state["requests"].append((self.command, self.path))
            state["token"] = self.headers.get("Authorization")
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.path == "/api/repos/create":
                state["exists"] = True
                self.answer(200, {"url": f"{address}/owner/probe"})
            elif self.path == "/api/validate-yaml":
                state["checked"] = json.loads(body)["content"]
                self.answer(200, {"errors": [], "warnings": []})
            elif "/preupload/" in self.path:
                asked = json.loads(body)["files"]
                plain = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]
                self.answer(200, {"files": plain})
            elif "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        state["files"][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                    if line["key"] == "header":
                        state["message"] = line["value"]["summary"]
                self.answer(200, {"commitUrl": f"{address}/owner/probe/commit/{COMMIT}", "commitOid": COMMIT})
            else:
                self.answer(404, {"error": self.path})

        def answer(self, status: int, body: Any, headers: Mapping[str, str] | None = None) -> None:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            kind = {} if isinstance(body, bytes) else {"Content-Type": "application/json"}
            for name, value in {"Content-Length": str(len(content)), **kind, **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    yield state
    server.shutdown()
    server.server_close()


def test_a_pushed_probe_is_pulled_with_its_card(hub: dict[str, Any]) -> None:
    probe = logistic(l2=0.2)
    address = probe.push("owner/probe", token="hf_secret", message="A probe of truth")
    assert address.endswith(COMMIT)
    assert sorted(hub["files"]) == ["README.md", "probe.json", "probe.safetensors"]
    assert (hub["message"], hub["token"]) == ("A probe of truth", "Bearer hf_secret")
    card = hub["files"]["README.md"].decode()
    assert card == model_card(probe, "owner/probe")
    for text in ("library_name: elk-stress", "FittedProbe.pull('owner/probe')", "layers.3", '"l2": 0.2', "17 numbers"):
        assert text in card
    assert b"hf_secret" not in b"".join(hub["files"].values())

    pulled = FittedProbe.pull("owner/probe")
    assert pulled.probe == probe.probe
    assert np.array_equal(pulled.score(ROWS), probe.score(ROWS))
    fetched = [path for command, path in hub["requests"] if command == "GET" and "/resolve/" in path]
    assert all(path.endswith((".json", ".safetensors")) for path in fetched), fetched
    assert FittedProbe.pull("owner/probe", revision=COMMIT).name == "logistic"


def test_a_second_push_replaces_the_probe(hub: dict[str, Any]) -> None:
    logistic().push("owner/probe")
    direction(np.ones(16), name="second").push("owner/probe")
    (record,) = [json.loads(c) for n, c in hub["files"].items() if n.endswith(".json")]
    assert record["name"] == "direction"


def test_nothing_is_sent_of_a_probe_that_cannot_be_saved(hub: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="nobody's business"):
        FittedProbe(Shy(1), {}).push("owner/probe")
    assert hub["requests"] == []


def test_pulling_what_is_no_probe_runs_nothing(hub: dict[str, Any], tmp_path: Path) -> None:
    from huggingface_hub.errors import RepositoryNotFoundError

    with pytest.raises(RepositoryNotFoundError):
        FittedProbe.pull("owner/probe")
    hub["exists"] = True
    mark = tmp_path / "boom"
    hub["files"]["probe.pkl"] = pickle.dumps(Bomb(mark))
    with pytest.raises(FileNotFoundError, match=r"owner/probe on the hub holds no probe\.json"):
        FittedProbe.pull("owner/probe")
    # a pickle in disguise
    hub["commit"] = COMMIT[::-1]
    hub["files"] = {"probe.safetensors": pickle.dumps(Bomb(mark)), "probe.json": b"{}"}
    with pytest.raises(ValueError, match="is, or may be, a pickle"):
        FittedProbe.pull("owner/probe")
    assert not mark.exists()


def test_a_card_says_what_it_does_not_know() -> None:
    card = model_card(replace(network(), dim=None), "a/b")
    assert "any number of features at `an unnamed site`" in card
