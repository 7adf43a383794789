"""Activations on disk, by content: a file's name is a hash of everything that its numbers depend on.

The key covers the weights' fingerprint, dtype, device kind, site, the exact list of texts and the version of the code
that reads them. A block of texts is stored whole, because the last bits of an activation depend on how texts were
batched: a run that finds half of its blocks here gives the same numbers as one that finds none.

A file is a ``.npy`` array and, after it, a digest over the key and every byte of it, which is checked on every read: a
disk that flips a bit costs time, never a number.

Guarantee: files appear atomically (written aside, then renamed), a damaged one counts as absent, is said once
(:class:`DamagedCache`) and written anew, and the folder stays below ``max_bytes`` (least recently used go first). A
folder that cannot be written costs time, never a result.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

__all__ = ["ActivationCache", "DamagedCache", "say_damaged"]

# raise when the meaning of a stored activation changes
_VERSION = 2
_DIGEST = 32
# seconds after which a file that was being written belongs to a process that was killed
_ABANDONED = 3600
# folders whose damage was told
_told: set[Path] = set()


class DamagedCache(UserWarning):
    """Something that was stored is not what was stored. It was not used, and is made anew."""


def say_damaged(folder: Path, message: str) -> None:
    """Warn, once for a folder and process. Never an error, whatever the filters: the run goes on without the cache."""
    if folder not in _told:
        _told.add(folder)
        with contextlib.suppress(DamagedCache):
            warnings.warn(message, DamagedCache, stacklevel=3)


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
        content = json.dumps([_VERSION, list(identity), site, list(texts)])
        return hashlib.sha256(content.encode()).hexdigest()

    def load(self, key: str) -> np.ndarray | None:
        """The block ``(n, d)`` float32, or ``None`` if it is absent or damaged."""
        path = self._path(key)
        try:
            content = path.read_bytes()
        except OSError:
            return None
        try:
            if content[-_DIGEST:] != _digest(key, memoryview(content)[:-_DIGEST]):
                raise ValueError("not what was stored")
            # numpy reads what its header names and leaves the digest
            block = np.load(io.BytesIO(content), allow_pickle=False)
        except (ValueError, EOFError):
            say_damaged(
                self.folder,
                f"a block of cached activations is damaged ({path}): it is not used and read anew from the model, as "
                f"are others of its kind. If this happens again, check the disk; {self.folder} may be deleted at any "
                "time",
            )
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return np.asarray(block)

    def save(self, key: str, block: np.ndarray) -> bool:
        """Store a block; whether that worked."""
        stream = io.BytesIO()
        np.save(stream, block, allow_pickle=False)
        body = stream.getbuffer()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, partial = tempfile.mkstemp(dir=self.folder, prefix=".partial-")
        except OSError:
            return False
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(body)
                file.write(_digest(key, body))
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
        for path in self.folder.glob(".partial-*"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _ABANDONED:
                    path.unlink()
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


def _digest(key: str, body: memoryview) -> bytes:
    """Of the key too, so that no block is taken for another."""
    return hashlib.blake2b(body, digest_size=_DIGEST, key=hashlib.sha256(key.encode()).digest()).digest()
