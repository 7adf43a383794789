"""Numbers that a user sets: what each may be, in one table, for Python, the command line and files alike.

    fpr = setting("fpr", fpr)                      # the value as a plain number, or a ValueError in the same words
    parser.add_argument("--fpr", type=option("fpr"))

A name means the same everywhere, so it has one row in :data:`SETTINGS`. Light to import.
"""

from __future__ import annotations

import argparse
import math
import operator
import os
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

__all__ = [
    "SETTINGS",
    "Domain",
    "as_path",
    "listed",
    "one_of",
    "option",
    "pairs_of",
    "setting",
    "settings",
    "shown",
    "truth",
]


@dataclass(frozen=True)
class Domain:
    """The numbers that a setting may be.

    Attributes:
        what: in words, "a positive number of nats".
        least, most: both allowed, if ``closed``.
        whole: whether it is a count.
        closed: whether ``least`` and ``most`` themselves are allowed, where they are finite.
    """

    what: str
    least: float = 0
    most: float = math.inf
    whole: bool = False
    closed: bool = True

    def __contains__(self, number: float) -> bool:
        inside = self.least <= number <= self.most if self.closed else self.least < number < self.most
        return inside and math.isfinite(number)

    def convert(self, value: Any) -> float | int:
        """``value`` as a plain number. Numbers of numpy, torch and jax are numbers; truth values and text are not.

        Raises:
            ValueError: it is no number, or lies outside; without words.
        """
        if isinstance(value, (bool, str, bytes)) or "bool" in str(getattr(value, "dtype", type(value).__name__)):
            raise ValueError
        try:
            if self.whole:
                number: float | int = operator.index(value)
            elif isinstance(value, Real) or (hasattr(value, "__float__") and getattr(value, "ndim", 0) == 0):
                number = float(value)
            else:
                raise ValueError
        except (TypeError, OverflowError, RuntimeError):
            raise ValueError from None
        if number not in self:
            raise ValueError
        return number

    def parse(self, text: str) -> float | int:
        """The number that a text says."""
        try:
            return self.convert(int(text) if self.whole else float(text))
        except (ValueError, OverflowError):
            raise ValueError from None


def _count(least: int, most: int, what: str = "") -> Domain:
    words = what or (f"a whole number from {least} on" if most >= 10**9 else f"a whole number from {least} to {most:,}")
    return Domain(words, least, most, whole=True)


def _positive(of: str = "") -> Domain:
    return Domain(f"a positive number{of}", closed=False)


_RATE = Domain("a rate between 0 and 1", 0, 1, closed=False)

SETTINGS: Mapping[str, Domain] = {
    # the most that scikit-learn's and jax's generators take
    "seed": _count(0, 2**32 - 1, "a whole number from 0 on, below 2^32"),
    "max_bits": _positive(" of bits"),
    "fpr": _RATE,
    "n_particles": _count(1, 10**8),
    "budget": _count(1, 10**9),
    "behaviour_epsilon": _positive(" of nats"),
    "epsilon": _positive(" of nats"),
    "c": _positive(),
    "observed_contexts": _count(0, 10**9),
    "shares": _positive(),
    "tolerance": Domain("a number of nats of at least 0"),
    "dim": _count(1, 10**6),
    "n_runs": _count(1, 10**4),
    "max_evaluations": _count(0, 10**18),
    "lipschitz": Domain("a number of at least 0"),
    "n_verify": _count(1, 10**6),
    "replicates": _count(1, 10**6),
    "strengths": Domain("a number of at least 0"),
    "steps": _count(1, 10**9),
    "checkpoints": _count(1, 10**6),
    "draws": _count(1, 10**6),
    "audit_points": _count(1, 10**6),
    "n_models": _count(1, 10**4),
    "tokens": _count(1, 10**6),
    "n_items": _count(1, 10**6),
    "n_contexts": _count(1, 10**6),
    "threads": _count(1, 10**4),
    "reads": _count(1, 10**6),
    "timeout": Domain("a number of seconds of at least 0"),
    "tolerated": _RATE,
    "warn_at": Domain("a share of the budget, above 0 and at most 1", 0, 1),
    "amount": Domain("a finite number from 0 on"),
    "of": _count(1, 10**18),
    "keep": _count(1, 10**18),
}
"""Name -> what it may be; a setting of several numbers (``shares``, ``strengths``) is a row for each of them."""


def setting(name: str, value: Any, *, optional: bool = False) -> Any:
    """The value of the setting ``name`` as a plain number (``None`` stays where it is ``optional``).

    Raises:
        ValueError: it is not what :data:`SETTINGS` says; names the setting, what it is, and what came.
    """
    if optional and value is None:
        return None
    try:
        return SETTINGS[name].convert(value)
    except ValueError:
        raise ValueError(f"{name} is {SETTINGS[name].what}, got {shown(value)}") from None


def settings(name: str, values: Any, *, n: int | None = None) -> tuple[Any, ...]:
    """Several numbers of one setting, as a tuple.

    Raises:
        ValueError: they are no sequence, not ``n``, or one of them is not what :data:`SETTINGS` says.
    """
    each = _listed(values)
    if each is None or (n is not None and len(each) != n):
        many = "several numbers" if n is None else f"{n} numbers"
        raise ValueError(f"{name} are {many}, each {SETTINGS[name].what}, got {shown(values)}")
    return tuple(setting(name, value) for value in each)


def option(name: str) -> Callable[[str], Any]:
    """The setting ``name`` as an argparse type."""

    def parse(text: str) -> Any:
        try:
            return SETTINGS[name].parse(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {SETTINGS[name].what}, got {_as_typed(text)}") from None

    # the generated-input suite reads from it what the option takes
    parse.__name__ = name
    return parse


def one_of(name: str, value: Any, known: Sequence[str]) -> str:
    """``value`` if it is one of ``known``.

    Raises:
        ValueError: it is not; lists them.
    """
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} is one of {', '.join(known)}; got {shown(value)}")
    return value


def listed(name: str, given: Any, kinds: tuple[type, ...]) -> list[Any]:
    """One thing or several, each of one of ``kinds`` (or of any kind, if none is said), as a list.

    Raises:
        TypeError: something else came.
    """
    each = [given] if isinstance(given, kinds) else _listed(given)
    if not kinds and each is None:
        raise TypeError(f"{name} are several, in a list or the like; got {shown(given)}")
    strange = [given] if each is None else [x for x in each if not isinstance(x, kinds) or isinstance(x, type)]
    if kinds and strange:
        allowed = " or ".join("a name" if kind is str else f"a {kind.__name__}" for kind in kinds)
        raise TypeError(f"{name} are each {allowed}, got {shown(strange[0])}")
    assert each is not None
    return each


def pairs_of(given: Any, known: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pairs of names to compare.

    Raises:
        TypeError: no sequence of pairs of names.
        ValueError: a name that is not ``known``.
    """
    pairs = [tuple(pair) if isinstance(pair, (tuple, list)) else (pair,) for pair in _listed(given) or [given]]
    for pair in pairs:
        if len(pair) != 2 or not all(isinstance(name, str) for name in pair):
            raise TypeError(f"pairs are each two names, e.g. [('lda', 'logistic')]; got {shown(given)}")
        for name in pair:
            if name not in known:
                raise ValueError(
                    f"no result is called {shown(name)}, so that it cannot be compared; there are: "
                    f"{', '.join(known) or 'none'}"
                )
    return [(first, second) for first, second in pairs]


def as_path(name: str, value: Any) -> Path:
    """A path from a path or a text.

    Raises:
        TypeError: something else.
    """
    if not isinstance(value, (str, os.PathLike)) or isinstance(value, bytes):
        raise TypeError(f"{name} is a path or a text, got {shown(value)}")
    return Path(value)


def truth(name: str, value: Any) -> bool:
    """``True`` or ``False``, and nothing that merely counts as one of them.

    Raises:
        TypeError: something else.
    """
    if type(value).__name__ not in ("bool", "bool_"):
        raise TypeError(f"{name} is True or False, got {shown(value)}")
    return bool(value)


def shown(value: Any) -> str:
    """A short ``repr`` for messages, on one line, whatever came."""
    try:
        return " ".join(_SHORT.repr(value).split())
    except Exception:
        return type(value).__name__


def _listed(values: Any) -> list[Any] | None:
    if isinstance(values, (str, bytes, Mapping)):
        return None
    try:
        return list(values)
    except TypeError:
        return None


def _as_typed(text: str) -> str:
    """A number as it was typed, anything else in quotes."""
    try:
        float(text)
    except ValueError:
        return shown(text)
    return shown(text)[1:-1]


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlong = 30
