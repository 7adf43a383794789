r"""Finished pieces of a run on disk, so that a run that was killed goes on where it stopped, to the same numbers.

A piece is one row: one probe under one threat, one attack on it, its best-of-n curves, an audit, a control. It lies in
``<folder>/<settings>/<kind>-<key>.json``: the two names are digests of everything that the piece depends on. What all
pieces of a run share is in the first (the code of this package, versions, platform, seed, false-positive rate, budgets,
and the prepared testbed: every activation, label and option of the testbed); what tells pieces apart in the second (the
probe's fitted parameters, the threat, the attack's hyperparameters). A piece that was made under anything else has
another name, and nobody asks for it.

The first line of a file is a header with both digests and the checksum of the second, which is the piece
(:mod:`elk_stress.thoughts.records`). Files are renamed into place whole; one that is torn, altered or foreign all the
same is said, ignored and replaced.

**The same numbers.** A piece depends on the pieces before it in one way: true shifts of a real model are kept in the
prepared testbed's :class:`~elk_stress.thoughts.behaviour.Behaviour`, and in single precision the last digits of a
forward pass depend on which items shared its batch. So (1) a piece carries what its making added there, and reading it
adds the same; (2) where shifts are forward passes, all positives are run once, unmoved, before the first piece is made,
in every session alike: the model's kept keys and values then never depend on who asked first.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import inspect
import json
import os
import platform
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from elk_stress.core.files import replace_bytes
from elk_stress.core.versions import versions
from elk_stress.thoughts.prepared import Prepared
from elk_stress.thoughts.records import decode, encode

__all__ = ["FORGETFUL", "Keeps", "Memory", "Pieces", "digest", "identity", "prepared_identity"]

T = TypeVar("T")
Tell = Callable[[str], None]

FORMAT = "elk-stress piece 1"
_PACKAGE = Path(__file__).parent.parent
# these show what was computed, and compute nothing
_SHOWING = ("report", "cli")


class Keeps(Protocol):
    """What the engine asks: ``make()``, or what it returned once."""

    def keep(self, kind: str, key: Any, make: Callable[[], T]) -> T: ...


class _Forgetful:
    """No folder: everything is made."""

    def keep(self, kind: str, key: Any, make: Callable[[], T]) -> T:
        return make()


FORGETFUL: Keeps = _Forgetful()


class Memory:
    """The folder of a run's pieces.

    Args:
        folder: made when the first piece is kept.
        fresh: read nothing that an earlier session left.
        tell: gets lines for the user: how many pieces were found, what was ignored.
    """

    def __init__(self, folder: Path, *, fresh: bool = False, tell: Tell = lambda line: None) -> None:
        self.folder, self.fresh, self.tell = folder, fresh, tell
        # now, at the start: whoever edits the source meanwhile must not sign what the old one computes
        self._code = _code()
        self._made: set[Path] = set()
        self._prepared: list[Prepared] = []
        self._told: set[str] = set()

    def under(self, prepared: Prepared, settings: Mapping[str, Any]) -> Keeps:
        """The pieces that were, and will be, made on this prepared testbed under these settings."""
        try:
            shared = digest(
                {
                    "code": self._code,
                    "versions": versions(),
                    "platform": f"{platform.system()} {platform.machine()}",
                    "prepared": prepared_identity(prepared),
                    "settings": identity(settings),
                }
            )
        except TypeError as error:
            self._once(f"finished pieces are not kept: {error}")
            return FORGETFUL
        self._announce(shared)
        return Pieces(self, prepared, shared)

    def _announce(self, shared: str) -> None:
        own, others = 0, 0
        with suppress(OSError):
            for folder in self.folder.iterdir():
                files = [path for path in folder.glob("*.json") if not path.name.startswith(".")]
                if folder.name == _short(shared):
                    # of a session that died while it wrote
                    for part in folder.glob(".*"):
                        part.unlink(missing_ok=True)
                    own = sum(path not in self._made for path in files)
                else:
                    others += len(files)
        if own and not self._made:
            fate = "are ignored (fresh)" if self.fresh else "are not computed again"
            self._once(f"{_pieces(own)} of an earlier run found; they {fate}")
        if others and not self._made:
            self._once(
                f"{_pieces(others)} of runs with other settings found; they are not used, and a report that is there "
                "is replaced when this run ends"
            )

    def _once(self, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            self.tell(line)


class Pieces:
    """The pieces of one prepared testbed under one set of settings."""

    def __init__(self, memory: Memory, prepared: Prepared, shared: str) -> None:
        self._memory, self._prepared_testbed, self._shared = memory, prepared, shared

    def keep(self, kind: str, key: Any, make: Callable[[], T]) -> T:
        """What ``make()`` returned when it was called under this key, or else ``make()`` itself, and keep it.

        A piece that cannot be written (a full disk, a value that is no result) is said and lost; the run goes on.
        """
        memory = self._memory
        try:
            name = digest(identity(key))
        except TypeError as error:
            memory._once(f"a piece ({kind}) is not kept: {error}")
            return make()
        path = memory.folder / _short(self._shared) / f"{kind}-{_short(name)}.json"
        header = {"format": FORMAT, "settings": self._shared, "kind": kind, "key": name}
        if not memory.fresh or path in memory._made:
            try:
                value, learned = _read(path, header)
                _teach(self._prepared_testbed, learned)
                return value  # type: ignore[no-any-return]
            except FileNotFoundError:
                pass
            except (OSError, ValueError) as error:
                memory._once(f"ignored a damaged piece, {path.name}: {error}")
        self._prepare()
        before = _known(self._prepared_testbed)
        value = make()
        try:
            body = json.dumps(encode((value, _learned(self._prepared_testbed, before)))).encode()
            path.parent.mkdir(parents=True, exist_ok=True)
            checksum = hashlib.sha256(body).hexdigest()
            replace_bytes(path, json.dumps({**header, "sha256": checksum}).encode() + b"\n" + body + b"\n")
            memory._made.add(path)
        except (OSError, TypeError) as error:
            memory._once(f"a piece ({kind}) is not kept: {error}")
        return value

    def _prepare(self) -> None:
        """Run all positives once, unmoved, where behaviour is a model's: see (2) above."""
        prepared, done = self._prepared_testbed, self._memory._prepared
        if any(other is prepared for other in done):
            return
        done.append(prepared)
        if prepared.behaviour is None or prepared.behaviour.exact or not len(prepared.positives):
            return
        prepared.behaviour.shift(prepared.positives, np.zeros((len(prepared.positives), 1, prepared.testbed.dim)))


def digest(tree: Any) -> str:
    """SHA-256 of a JSON-able tree."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def identity(value: Any) -> Any:
    """A JSON-able tree that two values share only if they compute the same.

    An object is its class and its attributes; a class from outside this package counts with the source of its file.
    Private attributes of dataclasses (caches) do not count.

    Raises:
        TypeError: a value whose content cannot be told (a function, say).
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, enum.Enum):
        return {"enum": type(value).__name__, "value": value.value}
    if isinstance(value, (float, np.generic)):
        # repr tells -0.0 from 0.0 and every float64 from its neighbours
        return {"number": repr(value.item() if isinstance(value, np.generic) else value)}
    if isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            return {"objects": identity(value.tolist()), "shape": list(value.shape)}
        content = hashlib.sha256(np.ascontiguousarray(value)).hexdigest()  # type: ignore[arg-type]
        return {"array": content, "dtype": value.dtype.str, "shape": list(value.shape)}
    if isinstance(value, os.PathLike):
        return {"path": os.fspath(value)}
    if isinstance(value, Mapping):
        return {"map": [[identity(k), identity(v)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        return [identity(v) for v in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value) if not f.name.startswith("_")]
        return {"class": _class(type(value)), "of": {name: identity(getattr(value, name)) for name in names}}
    if isinstance(value, type) or callable(value) or not hasattr(value, "__dict__"):
        raise TypeError(f"what a {type(value).__name__} computes cannot be told from its content")
    return {"class": _class(type(value)), "of": {name: identity(v) for name, v in vars(value).items()}}


def prepared_identity(prepared: Prepared) -> Any:
    """A testbed with every activation, and what was prepared of it; one that is no dataclass is what it describes."""
    testbed = prepared.testbed
    parts = [f.name for f in dataclasses.fields(prepared) if f.name != "testbed" and not f.name.startswith("_")]
    return {
        "testbed": identity(testbed) if dataclasses.is_dataclass(testbed) else _class(type(testbed)),
        "described": identity(testbed.describe()),
        "at": [testbed.name, testbed.site, testbed.dim, testbed.shift_cost],
        "splits": identity(testbed.splits),
        "prepared": {name: identity(getattr(prepared, name)) for name in parts},
    }


def _read(path: Path, header: Mapping[str, str]) -> tuple[Any, Any]:
    first, _, rest = path.read_bytes().partition(b"\n")
    found = json.loads(first)
    body = rest.removesuffix(b"\n")
    if found != {**header, "sha256": hashlib.sha256(body).hexdigest()}:
        same = isinstance(found, dict) and {**found, "sha256": ""} == {**header, "sha256": ""}
        raise ValueError("its checksum does not hold" if same else "it is of another run or format")
    piece = decode(json.loads(body))
    if not isinstance(piece, tuple) or len(piece) != 2:
        raise ValueError("it is no piece")
    return piece


def _known(prepared: Prepared) -> tuple[dict[Any, set[int]], set[int]]:
    """Which true shifts and quadratic forms the prepared testbed holds already."""
    behaviour = prepared.behaviour
    if behaviour is None:
        return {}, set()
    return {key: set(items.tolist()) for key, (items, _) in behaviour._natural.items()}, set(behaviour._factors)


def _learned(prepared: Prepared, before: tuple[dict[Any, set[int]], set[int]]) -> dict[str, Any] | None:
    """What the prepared testbed holds beyond ``before``: shifts ``(new items, draws)`` by prior, and forms by item."""
    behaviour = prepared.behaviour
    if behaviour is None:
        return None
    natural, factors = before
    shifts = {}
    for key, (items, rows) in behaviour._natural.items():
        new = [i for i, item in enumerate(items.tolist()) if item not in natural.get(key, ())]
        if new:
            shifts[key] = (items[new], rows[new])
    return {"shifts": shifts, "factors": {i: f for i, f in behaviour._factors.items() if i not in factors}}


def _teach(prepared: Prepared, learned: dict[str, Any] | None) -> None:
    behaviour = prepared.behaviour
    if behaviour is None or learned is None:
        return
    for item, factor in learned["factors"].items():
        behaviour._factors.setdefault(item, factor)
    for key, (items, rows) in learned["shifts"].items():
        if key not in behaviour._natural:
            behaviour._natural[key] = (items, rows)
            continue
        known, had = behaviour._natural[key]
        new = ~np.isin(items, known)
        behaviour._natural[key] = (np.concatenate([known, items[new]]), np.concatenate([had, rows[new]]))


def _class(made: type) -> dict[str, str]:
    name = {"name": f"{made.__module__}.{made.__qualname__}"}
    if made.__module__.split(".")[0] == "elk_stress":
        return name
    try:
        source = Path(inspect.getfile(made)).read_bytes()
    except OSError as error:
        raise TypeError(f"the source of {name['name']} is not to be found ({error})") from None
    return {**name, "source": hashlib.sha256(source).hexdigest()}


@cache
def _code() -> str:
    """This package's own source: a version number alone does not tell two states of a working tree apart."""
    total = hashlib.sha256()
    # probes and attacks may be links to folders beside the package
    for folder, folders, names in os.walk(_PACKAGE, followlinks=True):
        folders[:] = sorted(name for name in folders if name not in _SHOWING)
        for name in sorted(name for name in names if name.endswith(".py") and name not in _SHOWING):
            path = Path(folder) / name
            total.update(f"{path.relative_to(_PACKAGE)}\0".encode() + path.read_bytes() + b"\0")
    return total.hexdigest()


def _short(name: str) -> str:
    return name[:32]


def _pieces(n: int) -> str:
    return f"{n} finished piece{'' if n == 1 else 's'}"
