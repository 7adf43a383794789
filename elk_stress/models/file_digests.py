"""What a model's files are, by content: digests that name the weights, and find damage before it becomes numbers.

A file is read whole once in a process; after that its size, times and inode stand for it, and any change of these makes
it be read again.
"""

from __future__ import annotations

import hashlib
import re
import time
from pathlib import Path

__all__ = ["damaged_blob", "hash_files", "sha256"]

_HASHED = {".json", ".safetensors", ".model", ".txt"}
# clocks of file systems are coarse: a file changed this many seconds ago may change again unseen
_SETTLED = 2.0
_known: dict[tuple[object, ...], str] = {}


def sha256(file: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    return _digest(file, "sha256")


def hash_files(folder: Path, *, besides: str) -> str:
    """SHA-256 over names and contents of all files that a model is loaded from, but for the one named ``besides``."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in _HASHED and file.name != besides and file.is_file():
            digest.update(f"{file.name}\0".encode())
            digest.update(bytes.fromhex(sha256(file)))
    return digest.hexdigest()


def damaged_blob(snapshot: Path) -> Path | None:
    """The first file of a hub snapshot whose content is not what its name in the hub's cache, a digest, says.

    Names are SHA-256 of large files, and git's (or a mirror's plain) SHA-1 of small ones. Copies, which a file system
    without links holds, have no such names and are not checked.
    """
    for file in sorted(snapshot.iterdir()):
        blob = file.resolve()
        if blob.parent.name != "blobs" or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blob.name):
            continue
        kinds = ("sha256",) if len(blob.name) == 64 else ("git", "sha1")
        if not any(_digest(blob, kind) == blob.name for kind in kinds):
            return blob
    return None


def _digest(file: Path, kind: str) -> str:
    status = file.stat()
    key = (str(file.resolve()), kind, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    if key in _known:
        return _known[key]
    # git counts in the kind and the size
    head = f"blob {status.st_size}\0".encode() if kind == "git" else b""
    name = "sha256" if kind == "sha256" else "sha1"
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, lambda: hashlib.new(name, head, usedforsecurity=False)).hexdigest()
    if time.time() - max(status.st_mtime, status.st_ctime) > _SETTLED:
        _known[key] = found
    return found
