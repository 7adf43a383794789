r"""Results as JSON and back, exactly: what is read equals what was written, type by type and bit by bit.

:func:`elk_stress.thoughts.result.plain` is for readers: it names things, rounds nothing, but forgets what was a tuple,
an array, an enum or NaN. This is for machines. A value is tagged by its own type, not by the type that a field
declares, so fields of type ``Any`` come back as what they were too. Python's ``repr`` of a float64 reads back as the
same float64; arrays are the base64 of their bytes with dtype and shape. No pickle: reading can make numbers, arrays and
the frozen records of results, and run nothing.

====================================  ===============================================
value                                 JSON
====================================  ===============================================
None, bool, int, float, str           itself (NaN and infinities as Python's json has)
list                                  a list
tuple                                 ``{"!": "tuple", "of": [...]}``
mapping                               ``{"!": "map", "of": [[key, value], ...]}``
array; numpy scalar                   ``{"!": "array" | "scalar", "dtype", "shape", "bytes"}``
record of results (a frozen class)    ``{"!": name, "of": {field: value}}``
enum                                  ``{"!": name, "value"}``
====================================  ===============================================
"""

from __future__ import annotations

import base64
import dataclasses
import enum
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np

__all__ = ["decode", "encode", "kinds"]

# whose frozen dataclasses and enums may be written and read
_MODULES = ("core.bits", "core.flags", "thoughts.incidental", "thoughts.power_law", "thoughts.result", "threats.threat")


@cache
def kinds() -> Mapping[str, type]:
    """Name -> every class of results that can be written: the dataclasses and enums of the modules of results."""
    found: dict[str, type] = {}
    for module in (import_module(f"elk_stress.{name}") for name in _MODULES):
        for name, value in vars(module).items():
            made_here = isinstance(value, type) and value.__module__ == module.__name__
            if made_here and (dataclasses.is_dataclass(value) or issubclass(value, enum.Enum)):
                found[name] = value
    return found


def encode(value: Any) -> Any:
    """JSON-able form of a value.

    Raises:
        TypeError: a value of another kind than the table above; it names the type.
    """
    if isinstance(value, enum.Enum):
        return {"!": _name(value), "value": value.value}
    if isinstance(value, (np.ndarray, np.generic)):
        return _array(value)
    if value is None or type(value) in (bool, int, float, str):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {"!": _name(value), "of": {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}}
    if isinstance(value, Mapping):
        return {"!": "map", "of": [[encode(k), encode(v)] for k, v in value.items()]}
    if type(value) is tuple:
        return {"!": "tuple", "of": [encode(v) for v in value]}
    if type(value) is list:
        return [encode(v) for v in value]
    raise TypeError(
        f"a result holds a {type(value).__name__}, which cannot be written; expected numbers, texts, arrays"
    )


def decode(tree: Any) -> Any:
    """The value of what :func:`encode` made.

    Raises:
        ValueError: something else; what is wrong with it.
    """
    try:
        return _decode(tree)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a written result ({type(error).__name__}: {error})") from None


def _decode(tree: Any) -> Any:
    if isinstance(tree, list):
        return [_decode(v) for v in tree]
    if not isinstance(tree, dict):
        return tree
    tag = tree["!"]
    if tag == "tuple":
        return tuple(_decode(v) for v in tree["of"])
    if tag == "map":
        return {_decode(k): _decode(v) for k, v in tree["of"]}
    if tag in ("array", "scalar"):
        array = np.empty(tuple(tree["shape"]), np.dtype(tree["dtype"]))
        content = base64.b64decode(tree["bytes"], validate=True)
        if len(content) != array.nbytes:
            raise ValueError(f"an array of {array.nbytes} bytes came with {len(content)}")
        if array.size:
            array = np.frombuffer(content, array.dtype).reshape(array.shape).copy()
        return array[()] if tag == "scalar" else array
    made = kinds()[tag]
    if issubclass(made, enum.Enum):
        return made(tree["value"])
    return made(**{name: _decode(v) for name, v in tree["of"].items()})


def _array(value: np.ndarray | np.generic) -> dict[str, Any]:
    array = np.asarray(value)
    if array.dtype.hasobject:
        raise TypeError("a result holds an array of Python objects, which cannot be written; expected numbers or texts")
    return {
        "!": "array" if isinstance(value, np.ndarray) else "scalar",
        "dtype": array.dtype.str,
        "shape": list(array.shape),
        "bytes": base64.b64encode(array.tobytes()).decode(),
    }


def _name(value: Any) -> str:
    name = type(value).__name__
    if kinds().get(name) is not type(value):
        raise TypeError(f"a result holds a {name}, which is no record of results and cannot be written")
    return name
