"""``elk-stress run --activations a.safetensors --labels y.npy``: files of arrays as a testbed, no model needed.

Arrays are mapped, not read: ``.npy``, or ``.safetensors`` with one tensor or one called ``activations``. Nothing is
unpickled. Activations are ``(n, d)`` or, read under several neutral contexts, ``(n, contexts, d)``; labels ``(n,)`` in
{0, 1}, 1 = positive; groups ``(n,)``, the same for items that must stay in one split
(:class:`elk_stress.testbeds.arrays.Arrays`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from elk_stress.core.tensor_files import mapped, tensors_of
from elk_stress.probing.probe import FittedProbe
from elk_stress.testbeds.arrays import Arrays, shares_for

__all__ = ["arrays_testbed", "read_array"]

_NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


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
        return _npy(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: expected {key} as .safetensors or .npy, got {path.suffix or 'no ending'}")
    tensors, _ = tensors_of(path)
    chosen = next(iter(tensors)) if len(tensors) == 1 else key
    if chosen not in tensors:
        raise ValueError(
            f"{path} holds {len(tensors)} tensors ({', '.join(sorted(tensors)[:5])}); expected one, "
            f"or one called {key!r}"
        )
    return mapped(path, chosen, tensors[chosen])


def _npy(path: Path) -> np.ndarray:
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            shape, fortran, dtype = _NPY_HEADERS[np.lib.format.read_magic(file)](file)
            start = file.tell()
        if dtype.kind not in "biufcSU" or dtype.itemsize == 0:
            raise ValueError(f"it holds {dtype}, and nothing that could run is read")
        # before numpy is asked to map it: an axis of -1, or more than memory has addresses, is its author's invention
        there, said = path.stat().st_size - start, math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or math.prod(max(n, 1) for n in shape) * dtype.itemsize >= 2**63 or said > there:
            raise ValueError(f"its header says {dtype} of shape {shape}, {said} bytes, and {there} are there")
    except OSError:
        raise
    except Exception as error:
        # a header is a Python literal, and its reader raises whatever Python's own does
        raise ValueError(f"{path} is no .npy file of numbers ({error}); write one with numpy.save") from None
    if said == 0:
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, "r", start, shape, "F" if fortran else "C")


def arrays_testbed(
    activations: Path,
    labels: Path,
    groups: Path | None,
    probes: Sequence[str | FittedProbe],
    seed: int,
    positive: str | None = None,
) -> Arrays:
    """Files as a testbed. Where every probe comes fitted, a tenth of the entities is for training, else four.

    Raises:
        FileNotFoundError, TypeError, ValueError: as :func:`read_array` and :class:`Arrays`.
    """
    data, truth = read_array(activations, "activations"), read_array(labels, "labels")
    together = None if groups is None else read_array(groups, "groups")
    return Arrays(data, truth, together, shares=shares_for(probes), seed=seed, positive=positive)
