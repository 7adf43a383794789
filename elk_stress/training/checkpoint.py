"""Checkpoints of a training run: atomic, and a killed run resumes to the same numbers.

A run's folder holds one file per finished checkpoint (weights, log of the steps since the last one, targets) and one
``state.safetensors`` (the attack's state, how many checkpoints are finished). Each is written beside itself, synced and
renamed into place, the checkpoint before the state, so that whenever the process dies the state speaks of files that
are whole; what was computed after it is computed again, to the same numbers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from elk_stress.core.files import replace_bytes

__all__ = ["Checkpoints", "ForeignRun", "digest"]

Tree = Mapping[str, Any]


class ForeignRun(ValueError):
    """The folder holds another run's checkpoints; says which setting differs and the way out."""


@dataclass
class Checkpoints:
    """Where a run's checkpoints are kept: in memory, or in a folder as well.

    Attributes:
        folder: ``None`` keeps them in memory only.
        settings: everything that determines the numbers; a folder is resumed only under the same settings.
    """

    folder: Path | None
    settings: Mapping[str, Any]
    _kept: list[dict[str, Any]] = field(default_factory=list)

    def resume(self) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
        """Finished checkpoints and the state after the last one, or ``([], None)`` for a fresh start.

        Raises:
            ForeignRun: the folder belongs to a run with other settings.
        """
        if self.folder is None:
            return [], None
        self.folder.mkdir(parents=True, exist_ok=True)
        record = self.folder / "settings.json"
        mine = json.loads(json.dumps(dict(self.settings), sort_keys=True, default=str))
        if record.is_file():
            theirs = json.loads(record.read_text())
            different = sorted(k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k))
            if different:
                first = different[0]
                raise ForeignRun(
                    f"{self.folder} holds checkpoints of a run with other settings: {', '.join(different)} differ "
                    f"({first} was {theirs.get(first)!r}, now {mine.get(first)!r}); "
                    "choose another folder with --out (out=), or remove it"
                )
        else:
            replace_bytes(record, (json.dumps(mine, sort_keys=True, indent=1) + "\n").encode())
        state_file = self.folder / "state.safetensors"
        if not state_file.is_file():
            return [], None
        saved = _read(state_file)
        count = int(saved["finished"])
        self._kept = [_read(self._path(i)) for i in range(count)]
        state: dict[str, Any] = saved["state"]
        return list(self._kept), state

    def add(self, checkpoint: Tree, state: Tree) -> None:
        """Keep one more checkpoint and the state to go on from."""
        self._kept.append(dict(checkpoint))
        if self.folder is not None:
            replace_bytes(self._path(len(self._kept) - 1), _dump(checkpoint))
            replace_bytes(
                self.folder / "state.safetensors", _dump({"state": state, "finished": np.asarray(len(self._kept))})
            )

    @property
    def finished(self) -> list[dict[str, Any]]:
        """All checkpoints so far."""
        return list(self._kept)

    def _path(self, i: int) -> Path:
        assert self.folder is not None
        return self.folder / f"checkpoint-{i:04d}.safetensors"


def digest(array: np.ndarray) -> str:
    """Identifies an array in a run's settings."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def _dump(tree: Tree) -> bytes:
    from safetensors.numpy import save

    return bytes(save({name: np.array(value, order="C") for name, value in _flat(tree)}))


def _read(path: Path) -> dict[str, Any]:
    from safetensors.numpy import load

    tree: dict[str, Any] = {}
    for name, value in load(path.read_bytes()).items():
        *parents, last = name.split("/")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return tree


def _flat(tree: Tree, prefix: str = "") -> list[tuple[str, np.ndarray]]:
    out: list[tuple[str, np.ndarray]] = []
    for name, value in tree.items():
        if isinstance(value, Mapping):
            out += _flat(value, f"{prefix}{name}/")
        else:
            out.append((prefix + name, np.asarray(value)))
    return out
