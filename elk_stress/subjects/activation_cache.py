"""Activations on disk, by content: a file's name is a hash of everything that its numbers depend on.

The key covers the weights' fingerprint, dtype, device kind, site, the exact list of texts and the version of the code
that reads them. A block of texts is stored whole, because the last bits of an activation depend on how texts were
batched: a run that finds half of its blocks here gives the same numbers as one that finds none.

Guarantee: files appear atomically (written aside, then renamed), a damaged one counts as absent, and the folder stays
below ``max_bytes`` (least recently used go first). A folder that cannot be written costs time, never a result.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

__all__ = ["ActivationCache"]

# raise when the meaning of a stored activation changes
_VERSION = 1


@dataclass(frozen=True)
class ActivationCache:
    """A bounded folder of activation blocks.

    Attributes:
        folder: where; made on the first write.
        max_bytes: upper bound on its size.
    """

    folder: Path
    max_bytes: int = 4 << 30

    def key(self, identity: Sequence[str], site: str, texts: Sequence[str]) -> str:
        """The content hash of a block; ``identity`` is whatever else the numbers depend on."""
        content = json.dumps([_VERSION, list(identity), site, list(texts)], ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()

    def load(self, key: str) -> np.ndarray | None:
        """The block ``(n, d)`` float32, or ``None`` if it is absent or damaged."""
        path = self._path(key)
        try:
            block = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return np.asarray(block)

    def save(self, key: str, block: np.ndarray) -> bool:
        """Store a block; whether that worked."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, partial = tempfile.mkstemp(dir=self.folder, prefix=".partial-")
        except OSError:
            return False
        try:
            with os.fdopen(handle, "wb") as stream:
                np.save(stream, block, allow_pickle=False)
            os.replace(partial, self._path(key))
        except OSError:
            return False
        finally:
            with contextlib.suppress(OSError):
                os.unlink(partial)
        self._trim()
        return True

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.npy"

    def _trim(self) -> None:
        files = []
        for path in self.folder.glob("*.npy"):
            with contextlib.suppress(OSError):
                status = path.stat()
                files.append((status.st_mtime_ns, status.st_size, path))
        excess = sum(size for _, size, _ in files) - self.max_bytes
        for _, size, path in sorted(files):
            if excess <= 0:
                break
            with contextlib.suppress(OSError):
                path.unlink()
            excess -= size
