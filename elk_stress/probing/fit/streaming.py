"""Fitting a probe batch by batch: memory that does not grow with the number of rows, and the same probe as in memory.

    fitter = probe.fitter()                         # a recipe with the trait ``streams``
    for activations, labels in batches:
        fitter.update(activations, labels)          # (rows, d), (rows,)
    fitted = fitter.fit(seed=0)

A recipe says what it needs (:class:`Fitter`): the moments of each class (:mod:`elk_stress.probing.fit.moments`), which
take one pass, and for what no moments suffice the rows themselves, spooled to a file (:class:`Rows`) and read again in
chunks. Its ``fit`` on arrays is the same code with one batch, so both give the same probe but for rounding.

Memory: O(d^2) numbers and one chunk of a few MB. Spooled rows are file-backed: the page cache may hold them, anonymous
memory does not. The file has no name on POSIX, so that nothing is left whatever happens; rows that come from a
read-only ``np.memmap`` are not written again.
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from elk_stress.core import registry
from elk_stress.core.inputs import as_numbers
from elk_stress.probing.fit.moments import Moments, Order
from elk_stress.probing.probe import FittedProbe, Probe

__all__ = ["Fitter", "Keep", "Rows", "fit_streaming"]

Keep = Literal["file", "memory"]

# numbers in a chunk: 4 MB as float64, enough for matrix products to run at full speed
_CHUNK = 2**19


class Fitter:
    """Gathers what a recipe is fitted from; mutable, its result is not.

    Args:
        finish: ``finish(moments, rows, seed)`` -> the fitted probe. ``moments`` is (negatives', positives').
        order: which moments: ``mean``, ``spread`` (with the variance of each feature) or ``scatter`` (the covariance).
        keep: whether ``finish`` reads the rows again (otherwise it gets ``None``), from a ``file`` or from ``memory``,
            that is from the arrays that came, which must then stay as they are.
        folder: where the file is made; by default the system's temporary folder.
        negatives_only: of positives nothing is gathered, and there may be none; ``finish`` says how many negatives it
            needs.
    """

    def __init__(
        self,
        finish: Callable[[tuple[Moments, Moments], Rows | None, int], FittedProbe],
        order: Order = "mean",
        *,
        keep: Keep | None = None,
        folder: str | Path | None = None,
        negatives_only: bool = False,
    ) -> None:
        self._finish, self._order, self._negatives_only = finish, order, negatives_only
        self._rows = None if keep is None else Rows(keep, folder)
        self._moments: tuple[Moments, Moments] | None = None
        self._first: np.ndarray | None = None
        self._varies = False
        self._counts = [0, 0]

    def update(self, activations: np.ndarray, labels: np.ndarray) -> None:
        """Take in ``activations (rows, d)`` and ``labels (rows,)`` in {0, 1}; the arrays may be reused afterwards.

        Raises:
            TypeError: no arrays of numbers.
            ValueError: complex or masked numbers, another shape or width than before, labels other than 0 and 1, NaN or
                inf. The batch is then not taken in, not even in part.
        """
        if not isinstance(activations, np.memmap) or activations.dtype.kind not in "biuf":
            # a memory map stays one, and is borrowed
            activations = as_numbers(activations, "training activations")
        labels = as_numbers(labels, "labels")
        self._check(activations, labels)
        gathered, first, varies = self._moments, self._first, self._varies
        for chunk, own in _chunks(activations, labels):
            bad = int((~np.isfinite(chunk).all(axis=1)).sum())
            if bad:
                raise ValueError(
                    f"training activations hold NaN or inf in {bad} of {len(chunk)} rows; drop these items, or read "
                    "the activations in float32"
                )
            first = np.array(chunk[0]) if first is None else first
            varies = varies or bool((chunk != first).any())
            parts = tuple(
                Moments.of(chunk[:0] if label and self._negatives_only else chunk[own == label], self._order)
                for label in (0, 1)
            )
            gathered = (
                (parts[0], parts[1])
                if gathered is None
                else (gathered[0].merged(parts[0]), gathered[1].merged(parts[1]))
            )
        if self._rows is not None:
            self._rows.append(activations, labels)
        self._moments, self._first, self._varies = gathered, first, varies
        positives = int((labels == 1).sum())
        self._counts = [self._counts[0] + len(labels) - positives, self._counts[1] + positives]

    def fit(self, *, seed: int = 0) -> FittedProbe:
        """The probe of all rows so far; more may follow, and another ``fit``.

        Raises:
            ValueError: no rows, one class only, or constant activations.
        """
        if self._moments is None:
            raise ValueError("no rows came; call update(activations, labels) before fit")
        if not all(self._counts) and not self._negatives_only:
            have = 1 if self._counts[1] else 0
            raise ValueError(f"labels hold one class only ({{{have}}}); a probe needs both positives and negatives")
        if not self._varies and sum(self._counts) > 1 and not self._negatives_only:
            raise ValueError(f"training activations are constant over all {sum(self._counts)} rows")
        return self._finish(self._moments, self._rows, seed)

    def close(self) -> None:
        """Remove the file of rows now, not only once nobody holds the fitter."""
        if self._rows is not None:
            self._rows.close()

    def _check(self, activations: np.ndarray, labels: np.ndarray) -> None:
        shape = np.shape(activations)
        if len(shape) != 2 or labels.shape != shape[:1]:
            raise ValueError(f"expected activations (n, d) and labels (n,), got {shape} and {labels.shape}")
        if self._moments is not None and shape[1] != len(self._moments[0].mean):
            raise ValueError(
                f"a batch has {shape[1]} features but earlier ones had {len(self._moments[0].mean)}; read all rows at "
                "one site"
            )
        if not np.isin(labels, (0, 1)).all():
            raise ValueError(f"labels must be 0 or 1 (1 = positive), got {np.unique(labels).tolist()[:5]}")


class Rows:
    """Rows and labels in the order in which they came, to be read again and again in chunks.

    Args:
        keep: ``file`` copies a batch into a file (a read-only memory map is borrowed); ``memory`` borrows all of them.
        folder: where the file is made.
    """

    def __init__(self, keep: Keep = "file", folder: str | Path | None = None) -> None:
        self.keep, self.folder = keep, folder
        self._borrow = keep == "memory"
        self._rows, self._labels = _Spool(folder), _Spool(folder)
        self.count, self.dim = 0, 0

    def append(self, activations: np.ndarray, labels: np.ndarray) -> None:
        """Keep a batch ``(rows, d)``, ``(rows,)``."""
        self._labels.append(labels.astype(np.int8), borrow=self._borrow)
        self._rows.append(activations, borrow=self._borrow or _is_mapped(activations))
        self.count, self.dim = self.count + len(activations), activations.shape[1]

    def chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Rows ``(m, d)`` as they came, with their labels ``(m,)`` int8, a few MB at a time, in order."""
        waiting = (part for array in self._labels.arrays(()) for part in _split(array, _CHUNK))
        labels = np.empty(0, dtype=np.int8)
        for array in self._rows.arrays((self.dim,)):
            for chunk in _split(array, max(1, _CHUNK // self.dim)):
                while len(labels) < len(chunk):
                    labels = np.concatenate([labels, next(waiting)])
                yield np.asarray(chunk), labels[: len(chunk)]
                labels = labels[len(chunk) :]

    def close(self) -> None:
        """Remove the files; the rows are gone."""
        self._rows.close()
        self._labels.close()


class _Spool:
    """Arrays in a row: borrowed ones, and bytes of a nameless file."""

    def __init__(self, folder: str | Path | None) -> None:
        self._folder = None if folder is None else str(folder)
        self._file: Any = None
        # a borrowed array, or (start, bytes, dtype) in the file
        self._pieces: list[np.ndarray | tuple[int, int, np.dtype]] = []

    def append(self, array: np.ndarray, *, borrow: bool) -> None:
        if borrow:
            self._pieces.append(array)
            return
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder, prefix="elk_stress-")  # noqa: SIM115
            # also when nobody says close
            weakref.finalize(self, self._file.close)
        end = self._file.seek(0, 2)
        np.ascontiguousarray(array).tofile(self._file)
        last = self._pieces[-1] if self._pieces else None
        if isinstance(last, tuple) and (last[0] + last[1], last[2]) == (end, array.dtype):
            self._pieces[-1] = (last[0], last[1] + array.nbytes, array.dtype)
        else:
            self._pieces.append((end, array.nbytes, array.dtype))

    def arrays(self, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
        if self._file is not None:
            self._file.flush()
        for piece in self._pieces:
            if isinstance(piece, np.ndarray):
                yield piece
            elif piece[1]:
                start, size, dtype = piece
                rows = size // (dtype.itemsize * int(np.prod(shape, dtype=int)))
                yield np.memmap(self._file, dtype, "r", start, (rows, *shape))

    def close(self) -> None:
        self._pieces = []
        if self._file is not None:
            self._file.close()


def fit_streaming(
    probe: Probe | str, batches: Iterable[tuple[np.ndarray, np.ndarray]], *, seed: int = 0, site: str = ""
) -> FittedProbe:
    """Fit a recipe (or a registered name) on batches of ``(activations (rows, d), labels (rows,))``, read once.

    Raises:
        TypeError: a probe without the trait ``streams``; lists the registered ones that have it.
        ValueError: bad data (:meth:`Fitter.update`, :meth:`Fitter.fit`).
    """
    recipe: Any = registry.load("probes", probe) if isinstance(probe, str) else probe
    if not recipe.traits.streams:
        able = [name for name in registry.names("probes") if registry.load("probes", name).traits.streams]
        raise TypeError(
            f"probe {recipe.name!r} cannot be fitted batch by batch; those that can: {', '.join(able)}. Or read its "
            "rows into memory and call fit"
        )
    fitter: Fitter = recipe.fitter()
    try:
        for activations, labels in batches:
            fitter.update(activations, labels)
        fitted = fitter.fit(seed=seed)
    finally:
        fitter.close()
    return replace(fitted, site=fitted.site or site)


def _is_mapped(array: np.ndarray) -> bool:
    """Whether an array is a view of a file that nobody can change through it."""
    return isinstance(array, np.memmap) and getattr(array, "_mmap", None) is not None and array.mode == "r"


def _split(array: np.ndarray, size: int) -> Iterator[np.ndarray]:
    return (array[start : start + size] for start in range(0, len(array), size))


def _chunks(activations: np.ndarray, labels: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    size = max(1, _CHUNK // max(1, activations.shape[1]))
    return zip(_split(activations, size), _split(labels, size), strict=True)
