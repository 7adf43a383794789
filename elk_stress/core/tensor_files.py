"""Safetensors and JSON from anybody: a file is held against its own size before a byte of it is used.

A safetensors file is 8 bytes of header length, a JSON header ``{name: {dtype, shape, data_offsets}}`` and the numbers,
offsets counted from the header's end. Its header is whatever its author wrote. So: the header lies within the file, a
tensor's bytes are its shape times its type, tensors lie within the file, touch and do not overlap, and together with
the header they are all of it. Nothing is allocated by what a header says before that is known to be there.

JSON is read strictly: valid UTF-8, no key twice, no NaN, infinity or number beyond a float64, and nested no deeper than
whatever is done with it later can follow; everything else is a ``ValueError``.

File format: https://github.com/huggingface/safetensors
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

__all__ = ["Tensor", "mapped", "parse_json", "tensors_of"]

# what safetensors calls numpy's types
_DTYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1"}
_DTYPES |= {"U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?", "C64": "<c8"}
# types that numpy does not have, by bits per number
_FOREIGN = {"BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}
_MOST_HEADER = 100_000_000
"""Bytes; the format's own limit."""
_DEEPEST = 64


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: numpy's type (``None`` where numpy has none), shape, and bytes from the file's beginning."""

    kind: str
    dtype: str | None
    shape: tuple[int, ...]
    start: int
    stop: int


def parse_json(content: str | bytes, what: object) -> Any:
    """Strict JSON; ``what`` names the source in errors.

    Raises:
        ValueError: anything that the module forbids.
    """
    try:
        text = content.decode("utf-8") if isinstance(content, bytes) else content
        found = json.loads(text, object_pairs_hook=_once, parse_constant=_no_number, parse_float=_finite)
        level = [found]
        for _ in range(_DEEPEST):
            level = [
                v for c in level if isinstance(c, (dict, list)) for v in (c.values() if isinstance(c, dict) else c)
            ]
        if level:
            raise RecursionError
        return found
    except RecursionError:
        raise ValueError(f"{what} is not JSON that can be read: it is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} is not JSON: byte {error.start} is no UTF-8") from None
    except ValueError as error:
        raise ValueError(f"{what} is not JSON ({error})") from None


def tensors_of(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """Tensors and metadata of a safetensors file, checked against its size.

    Raises:
        ValueError: no safetensors file, or one whose header does not fit what is there.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MOST_HEADER):
            raise _refused(path, f"its header would be {length} bytes long and the file is {size}")
        content = file.read(length)
    base = 8 + length
    try:
        header = parse_json(content, "its header")
    except ValueError as error:
        raise _refused(path, str(error)) from None
    if not isinstance(header, dict):
        raise _refused(path, "its header is no table of tensors")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise _refused(path, "its metadata are no texts by name")
    found = {name: _tensor(path, name, entry, base, size) for name, entry in header.items()}
    end = base
    for tensor in sorted(found.values(), key=lambda t: (t.start, t.stop)):
        if tensor.start != end:
            raise _refused(path, "its tensors overlap, or leave gaps")
        end = tensor.stop
    if end != size:
        raise _refused(path, f"its tensors end at byte {end} and the file at {size}: it is cut off, or longer")
    return found, metadata


def mapped(path: Path, name: str, tensor: Tensor) -> np.ndarray:
    """A tensor's numbers, read-only, from the disk as they are used.

    Raises:
        ValueError: a type that numpy does not have.
    """
    if tensor.dtype is None:
        raise ValueError(f"{path} holds {name!r} as {tensor.kind}, which numpy does not have; save it as float32")
    if tensor.stop == tensor.start:
        return np.empty(tensor.shape, tensor.dtype)
    return np.memmap(path, tensor.dtype, "r", tensor.start, tensor.shape)


def _tensor(path: Path, name: str, entry: Any, base: int, size: int) -> Tensor:
    try:
        kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError):
        raise _refused(path, f"tensor {name!r} lacks its type, shape or place") from None
    for numbers in (shape, offsets):
        # true is no number here, though Python counts with it
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n <= 2**63 - 1 for n in numbers):
            raise _refused(path, f"tensor {name!r} has a shape or place that is no list of whole numbers from 0 on")
    dtype = _DTYPES.get(kind) if isinstance(kind, str) else None
    if dtype is None and not (isinstance(kind, str) and kind in _FOREIGN):
        raise _refused(path, f"tensor {name!r} is of the unknown type {str(kind)[:40]!r}")
    bits = 8 * np.dtype(dtype).itemsize if dtype is not None else _FOREIGN[kind]
    if len(offsets) != 2 or len(shape) > 32 or (offsets[1] - offsets[0]) * 8 != math.prod(shape) * bits:
        raise _refused(path, f"tensor {name!r} has {offsets} for the bytes of shape {shape} in {kind}")
    # of an empty tensor no byte is there, and numpy counts its other axes all the same
    if math.prod(max(n, 1) for n in shape) * bits >= 2**63:
        raise _refused(path, f"tensor {name!r} has the shape {shape}, more than memory has addresses")
    if base + offsets[1] > size:
        raise _refused(path, f"tensor {name!r} would end at byte {base + offsets[1]} and the file is {size} long")
    return Tensor(kind, dtype, tuple(shape), base + offsets[0], base + offsets[1])


def _refused(path: Path, why: str) -> ValueError:
    return ValueError(
        f"{path} is not a safetensors file that numpy can read ({why}); write one with safetensors.numpy.save_file"
    )


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError("a number is too large")
    return number
