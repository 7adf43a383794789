"""``elk-stress run --activations a.safetensors --labels y.npy``: files of arrays as a testbed, no model needed.

Arrays are mapped, not read: ``.npy``, or ``.safetensors`` with one tensor or one called ``activations``. Nothing is
unpickled. Activations are ``(n, d)`` or, read under several neutral contexts, ``(n, contexts, d)``; labels ``(n,)`` in
{0, 1}, 1 = positive; groups ``(n,)``, the same for items that must stay in one split
(:class:`elk_stress.testbeds.arrays.Arrays`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from elk_stress.probe import FittedProbe
from elk_stress.testbeds.arrays import Arrays

__all__ = ["arrays_testbed", "read_array"]

# what safetensors calls numpy's types
_DTYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1"}
_DTYPES |= {"BOOL": "?"}


def read_array(path: Path, key: str) -> np.ndarray:
    """The array of a ``.npy`` file, or the only tensor (or the one called ``key``) of a ``.safetensors`` file, mapped.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, Python objects in it, several tensors and none called so, or a type that
            numpy does not have.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected {key} as .safetensors or .npy")
    if path.suffix == ".npy":
        try:
            return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path} is no .npy file of numbers ({error}); write one with numpy.save") from None
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: expected {key} as .safetensors or .npy, got {path.suffix or 'no ending'}")
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        # a header beyond this is none (the format's own limit)
        header = file.read(size) if size < 100_000_000 else b""
    try:
        tensors = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        chosen = next(iter(tensors)) if len(tensors) == 1 else key
        if chosen not in tensors:
            raise ValueError(
                f"{path} holds {len(tensors)} tensors ({', '.join(sorted(tensors)[:5])}); expected one, or one called "
                f"{key!r}"
            )
        entry = tensors[chosen]
        kind, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is not a safetensors file; write one with safetensors.numpy.save_file") from None
    if kind not in _DTYPES:
        raise ValueError(f"{path} holds {chosen!r} as {kind}, which numpy does not have; save it as float32")
    if stop == start:
        return np.empty(shape, _DTYPES[kind])
    return np.memmap(path, _DTYPES[kind], "r", 8 + size + start, shape)


def arrays_testbed(
    activations: Path, labels: Path, groups: Path | None, probes: Sequence[str | FittedProbe], seed: int
) -> Arrays:
    """Files as a testbed. Where every probe comes fitted, a tenth of the entities is for training, else four.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_array`; arrays that do not fit each other.
    """
    data, truth = read_array(activations, "activations"), np.asarray(read_array(labels, "labels"))
    together = None if groups is None else np.asarray(read_array(groups, "groups"))
    if truth.ndim != 1 or (together is not None and together.shape != truth.shape):
        got = "" if together is None else f" and groups {together.shape}"
        raise ValueError(f"expected labels (n,) and groups (n,), got labels {truth.shape}{got}")
    fitted = all(isinstance(probe, FittedProbe) for probe in probes)
    return Arrays(data, truth, together, shares=(0.1, 0.45, 0.45) if fitted else (0.4, 0.3, 0.3), seed=seed)
