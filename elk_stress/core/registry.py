"""Names -> probes, attacks and testbeds, by entry points, so that a third party's package plugs in like our own."""

from __future__ import annotations

import difflib
import inspect
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal

__all__ = ["Group", "UnknownName", "describe", "find", "load", "names", "options", "unknown"]

Group = Literal["probes", "attacks", "testbeds"]


class UnknownName(KeyError):
    """No such name in the registry; the message lists the known ones."""

    def __str__(self) -> str:
        return str(self.args[0])


def names(group: Group) -> list[str]:
    """All registered names of a group: the engine's own by name, then others by name."""
    return list(_entries(group))


def load(group: Group, name: str, **options: Any) -> Any:
    """The probe, attack or testbed called ``name``, made with ``options``.

    Raises:
        UnknownName: nothing is called so; lists the known names and the closest one.
        TypeError: an option that it does not take; lists those that it does.
    """
    made = find(group, name)
    try:
        inspect.signature(made).bind(**options)
    except TypeError as error:
        takes = ", ".join(inspect.signature(made).parameters) or "no options"
        raise TypeError(f"{group[:-1]} {name!r}: {error}; it takes: {takes}") from None
    return made(**options)


def find(group: Group, name: str) -> Any:
    """The class (or function) registered as ``name``.

    Raises:
        UnknownName: nothing is called so; lists the known names and the closest one.
    """
    entries = _entries(group)
    if name not in entries:
        raise unknown(group, name)
    return entries[name].load()


def describe(group: Group) -> dict[str, str]:
    """Name -> the first line of its docstring."""
    return {name: (inspect.getdoc(entry.load()) or "").split("\n", 1)[0] for name, entry in _entries(group).items()}


def options(group: Group, name: str) -> list[str]:
    """The options that ``load`` takes for ``name``."""
    if name not in _entries(group):
        raise unknown(group, name)
    return list(inspect.signature(_entries(group)[name].load()).parameters)


def unknown(group: Group, name: str) -> UnknownName:
    """The error for a name that nothing has: the closest one, and all known ones."""
    entries = _entries(group)
    close = difflib.get_close_matches(name, entries, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return UnknownName(f"no {group[:-1]} is called {name!r}.{hint} Known {group}: {', '.join(entries)}")


@cache
def _entries(group: Group) -> dict[str, EntryPoint]:
    found = entry_points(group=f"elk_stress.{group}")
    own = sorted((entry for entry in found if entry.value.startswith("elk_stress.")), key=lambda e: e.name)
    others = sorted((entry for entry in found if not entry.value.startswith("elk_stress.")), key=lambda e: e.name)
    return {entry.name: entry for entry in [*own, *others]}
