"""Files that are whole or not there: written beside themselves, synced, and renamed into place.

``os.replace`` is atomic on one file system, so whoever reads (or dies) meanwhile sees the old content or the new one,
never half of it.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path

__all__ = ["replace_bytes", "replace_file"]


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a file beside ``path`` (ending alike, for writers that go by that) and put it in place."""
    _replace(path, path.suffix, write)


def replace_bytes(path: Path, content: bytes) -> None:
    """Put ``content`` in place as the file ``path``."""
    _replace(path, ".part", lambda part: part.write_bytes(content))


def _replace(path: Path, suffix: str, write: Callable[[Path], object]) -> None:
    part = path.with_name(f".{uuid.uuid4().hex}{suffix}")
    try:
        write(part)
        with part.open("rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
