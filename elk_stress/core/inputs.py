"""Arrays that a user brings: activations, labels and groups, checked and converted once, whoever brings them.

Python calls, the command line and files all pass through here, so that the same array gets the same answer and the same
words. Arrays of numpy, torch, jax and pandas and nested lists are taken; memory maps stay mapped, and are read in
chunks. What would lose something on the way is refused: complex numbers (their imaginary part), masked arrays (their
mask), text, objects.

Shapes: activations ``(n, d)``, ``(n, contexts, d)`` or ``(n, contexts, tokens, d)``; labels and groups ``(n,)`` or one
column ``(n, 1)``.
"""

from __future__ import annotations

from collections.abc import Iterator
from numbers import Real
from typing import Any

import numpy as np

from elk_stress.core.arrays import to_numpy
from elk_stress.core.settings import shown

__all__ = [
    "as_activations",
    "as_groups",
    "as_labels",
    "as_numbers",
    "check_activations",
    "check_training_data",
]

LARGEST = 1e17
"""Squares of larger numbers, summed over 10,000 features, leave float32."""
_SMALLEST = 1e-17
# numbers looked at together: 8 MB in float64
_CHUNK = 1 << 20


def as_numbers(value: Any, name: str) -> np.ndarray:
    """An array of real numbers as numpy: any shape, the type that came (bfloat16 and the like as float32).

    Raises:
        TypeError: no array, or one of text or objects.
        ValueError: it cannot come without loss: complex, masked, ragged, sparse.
    """
    array = _as_array(value, name)
    kind = array.dtype.kind
    if kind == "c":
        raise ValueError(
            f"{name} are complex numbers, whose imaginary part would be lost; pass real ones, e.g. "
            "numpy.concatenate([x.real, x.imag], axis=-1)"
        )
    if kind == "O":
        return _unboxed(array, name)
    if kind == "V" and array.dtype.names is None and "float" in array.dtype.name:
        # bfloat16 and float8, which numpy itself does not have
        return array.astype(np.float32)
    if kind not in "biuf":
        what = "text" if kind in "US" else f"of type {array.dtype.name}"
        raise TypeError(f"{name} are {what}; expected an array of numbers")
    return array


def as_activations(value: Any, name: str = "activations") -> np.ndarray:
    """Activations as numpy, of two to four axes, finite, within float32 and not constant.

    Raises:
        TypeError, ValueError: :func:`as_numbers`; another number of axes; no rows or no features;
            :func:`check_activations`.
    """
    array = as_numbers(value, name)
    if array.ndim not in (2, 3, 4):
        raise ValueError(
            f"expected {name} (n, d), (n, contexts, d) or (n, contexts, tokens, d), got shape {array.shape}"
        )
    if 0 in array.shape:
        raise ValueError(f"{name} are empty: shape {array.shape}; every axis needs at least one entry")
    check_activations(array, name)
    return array


def as_labels(value: Any, n: int, positive: Any = None) -> np.ndarray:
    """Labels ``(n,)`` as int64, 1 = positive.

    Args:
        value: 0 and 1, truth values (true = positive), or with ``positive`` any two different values.
        n: how many there must be.
        positive: the value that is positive; a text stands for a number or truth value that reads so.

    Raises:
        TypeError: labels of a type that is none.
        ValueError: another number of labels; NaN, masked or missing ones; one class only; more than two; two others
            than 0 and 1 without ``positive``; no label is ``positive``.
    """
    array = _column(_as_array(value, "labels"), n, "labels")
    if array.dtype.kind not in "biufUSO":
        raise TypeError(f"labels are of type {array.dtype.name}; expected 0 and 1 (1 = positive), or two names")
    if array.dtype.kind == "O":
        array = _unboxed(array, "labels", text=True)
    _refuse_missing(array, "labels", "drop these items")
    values = np.unique(array)
    listed = ", ".join(shown(v) for v in values.tolist()[:5]) + (", ..." if len(values) > 5 else "")
    if len(values) < 2:
        raise ValueError(f"labels hold one class only ({listed}); positives and negatives are needed")
    if positive is not None:
        chosen = _meant(values, positive)
        if chosen is None:
            raise ValueError(f"no label is {shown(positive)}, which was to be the positive one; there are: {listed}")
        if len(values) > 2:
            raise ValueError(
                f"labels hold {len(values)} values ({listed}); two are needed: pass labels == {shown(chosen)}, or drop "
                "the items of other classes"
            )
        return np.asarray(array == chosen, dtype=np.int64)
    if array.dtype.kind == "b":
        return array.astype(np.int64)
    if array.dtype.kind in "US":
        way = "say which is positive: positive=... (--positive on the command line)"
        if len(values) > 2:
            way = "two are needed: pass labels == the positive one"
        raise ValueError(f"labels are text ({listed}); {way}")
    if not np.isin(values, (0, 1)).all():
        largest = shown(values.max().item())
        way = f"pass positive={largest} (--positive {largest}) or labels == {largest}"
        if len(values) > 2:
            way = "pass labels == the positive one"
        raise ValueError(f"labels must be 0 or 1 (1 = positive), got {listed}; {way}")
    return array.astype(np.int64)


def as_groups(value: Any, n: int) -> np.ndarray:
    """Groups ``(n,)``: numbers or text, the same for items that must stay in one split.

    Raises:
        TypeError: neither numbers nor text, or both.
        ValueError: another number of them; NaN, masked or missing ones (each would need a group of its own).
    """
    array = _column(_as_array(value, "groups"), n, "groups")
    if array.dtype.kind not in "biufUSO":
        raise TypeError(f"groups are of type {array.dtype.name}; expected numbers or names")
    if array.dtype.kind == "O":
        array = _unboxed(array, "groups", text=True)
    _refuse_missing(array, "groups", "give each of these items a group of its own")
    return array


def check_activations(activations: np.ndarray, what: str = "activations") -> None:
    """Refuse NaN, inf, numbers beyond float32 and constant activations, with the count and the way out.

    ``(n, ..., d)``, read in chunks of rows.
    """
    largest = _largest(activations)
    if not np.isfinite(largest):
        bad = _count_rows(activations, lambda chunk: ~np.isfinite(chunk))
        raise ValueError(
            f"{what} hold NaN or inf in {bad} of {len(activations)} rows; "
            "drop these items, or read the activations in float32"
        )
    if largest > LARGEST:
        bad = _count_rows(activations, lambda chunk: np.abs(chunk) > LARGEST)
        raise ValueError(
            f"{what} reach {largest:.3g} in {bad} of {len(activations)} rows, and float32 ends when numbers "
            f"beyond {LARGEST:g} are squared; drop these items, or divide all activations by one constant"
        )
    rows = activations.size // activations.shape[-1] if activations.size else 0
    if rows > 1:
        widest = _widest(activations)
        if widest == 0:
            raise ValueError(f"{what} are constant over all {rows} rows; the site reads the same for every item")
        if widest < _SMALLEST:
            raise ValueError(
                f"{what} differ by {widest:.3g} at most, whose squares float32 takes for 0; multiply all activations "
                "by one constant"
            )


def check_training_data(activations: np.ndarray, labels: np.ndarray, *, tokens: bool = False) -> None:
    """Refuse what no probe can be fitted on: bad activations, mismatched lengths, one class only, other labels."""
    if activations.ndim != 2 + tokens or np.shape(labels) != (len(activations),):
        shape = "(n, tokens, d)" if tokens else "(n, d)"
        raise ValueError(
            f"expected activations {shape} and labels (n,), got {activations.shape} and {np.shape(labels)}"
        )
    check_activations(activations, "training activations")
    values = set(np.unique(labels).tolist())
    if not values <= {0, 1}:
        raise ValueError(f"labels must be 0 or 1 (1 = positive), got {shown(sorted(values))}")
    if len(values) < 2:
        raise ValueError(f"labels hold one class only ({values}); a probe needs both positives and negatives")


def _as_array(value: Any, name: str) -> np.ndarray:
    """An array of any type as numpy, without a copy where there is a way."""
    if value is None or isinstance(value, (str, bytes, dict, set)) or callable(value):
        raise TypeError(f"{name} are an array, e.g. of numpy, torch, jax or pandas; got {shown(value)}")
    if isinstance(value, (list, tuple)) and any(np.ma.is_masked(each) for each in value):
        value = np.ma.stack(value)
    if isinstance(value, np.ma.MaskedArray):
        masked = int(np.ma.getmaskarray(value).sum())
        if masked:
            raise ValueError(
                f"{name} are a masked array with {masked} masked entries, which would be read "
                f"as if they were there; drop these items, or pass {name}.filled(...)"
            )
        return np.asarray(value.data)
    if hasattr(value, "toarray") and hasattr(value, "nnz"):
        raise TypeError(f"{name} are a sparse matrix; pass {name}.toarray()")
    try:
        # pandas and polars
        array = value.to_numpy() if hasattr(value, "to_numpy") else to_numpy(value)
    except Exception as error:
        raise TypeError(
            f"{name} cannot be read as one array ({type(error).__name__}: {shown(str(error))[1:-1]}); pass a numpy "
            "array in which every row has the same length"
        ) from None
    if array.dtype.kind == "V" and array.dtype.names is not None:
        raise TypeError(f"{name} are records with fields {', '.join(array.dtype.names)}; pass one array of numbers")
    array = np.asarray(array)
    if isinstance(value, (list, tuple)) and array.dtype.kind in "US" and not all(isinstance(x, str) for x in value):
        # numpy would make text of the numbers among them
        return np.asarray(value, dtype=object)
    return array


def _unboxed(array: np.ndarray, name: str, *, text: bool = False) -> np.ndarray:
    """Python objects as numbers (or text), if all of them are."""
    flat = array.ravel().tolist()
    missing = sum(
        item is None or type(item).__name__ in ("NAType", "NaTType") or (isinstance(item, float) and item != item)
        for item in flat
    )
    if missing:
        way = "give each of them a group of its own" if name == "groups" else "drop these items"
        raise ValueError(f"{name} are missing in {missing} of {len(flat)} places; {way}")
    if all(isinstance(item, (bool, np.bool_)) for item in flat):
        return array.astype(bool)
    if all(isinstance(item, Real) or hasattr(item, "as_integer_ratio") for item in flat):
        try:
            return array.astype(float)
        except OverflowError:
            raise ValueError(f"{name} hold whole numbers beyond float64; divide them by one constant") from None
    if text and all(isinstance(item, str) for item in flat):
        return array.astype(str)
    kinds = sorted({type(item).__name__ for item in flat})
    raise TypeError(f"{name} are Python objects ({', '.join(kinds[:3])}); expected numbers{' or text' * text}")


def _column(array: np.ndarray, n: int, name: str) -> np.ndarray:
    """``(n,)`` of ``(n,)`` or of one column."""
    if array.shape == (n, 1):
        array = array[:, 0]
    if array.shape != (n,):
        raise ValueError(
            f"expected activations (n, ...) and {name} (n,), got {n} rows of activations and {name} of shape "
            f"{array.shape}"
        )
    return array


def _refuse_missing(array: np.ndarray, name: str, way: str) -> None:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).sum())
        raise ValueError(f"{name} hold NaN or inf in {bad} of {len(array)} places; {way}")


def _meant(values: np.ndarray, positive: Any) -> Any:
    """Which of the values ``positive`` is: itself, or what a text from the command line says; else ``None``."""
    if isinstance(positive, str) and values.dtype.kind not in "US":
        readings = {"true": True, "false": False}
        try:
            positive = readings[positive.lower()] if values.dtype.kind == "b" else float(positive)
        except (KeyError, ValueError):
            return None
    if isinstance(positive, bytes) != (values.dtype.kind == "S"):
        positive = positive.encode() if isinstance(positive, str) else positive
    return next((value for value in values.tolist() if type(value == positive) is bool and value == positive), None)


def _chunks(array: np.ndarray) -> Iterator[np.ndarray]:
    step = max(1, _CHUNK // max(1, int(np.prod(array.shape[1:]))))
    return (array[start : start + step] for start in range(0, len(array), step))


def _count_rows(array: np.ndarray, bad: Any) -> int:
    return sum(int(bad(chunk).reshape(len(chunk), -1).any(axis=1).sum()) for chunk in _chunks(array))


def _largest(array: np.ndarray) -> float:
    """The largest size of a number; NaN or inf if there is one."""
    largest = 0.0
    for chunk in _chunks(array):
        ends = float(chunk.min()), float(chunk.max())
        largest = max(largest, *map(abs, ends))
        if not np.isfinite(ends).all():
            return np.nan
    return largest


def _widest(array: np.ndarray) -> float:
    """The largest spread of a feature over all rows."""
    low = np.array(array[(0,) * (array.ndim - 1)], dtype=float)
    high = low.copy()
    for chunk in _chunks(array):
        rows = chunk.reshape(-1, array.shape[-1])
        np.minimum(low, rows.min(axis=0), out=low)
        np.maximum(high, rows.max(axis=0), out=high)
    return float((high - low).max())
