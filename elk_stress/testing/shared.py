"""What the suites share: running named checks, refusals, hidden state, and what hypothesis is asked to do.

Hypothesis draws the same examples each time (``derandomize``) and keeps no files (``database=None``), so that a suite
that passed passes again.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar, cast

import numpy as np

__all__ = [
    "Checks",
    "auroc",
    "declared",
    "fields_of",
    "no_global_randomness",
    "no_hidden_state",
    "read_only",
    "refuses",
    "rotation",
    "run_checks",
    "settings",
]

F = TypeVar("F", bound=Callable[..., None])

_ODD = 2_718_281_828

Checks = dict[str, Callable[[], None]]


def run_checks(what: str, checks: Checks) -> list[str]:
    """Run all checks and return their names; the first that fails is named, with ``what`` it was that failed it.

    Raises:
        AssertionError: the first check that fails, by name, with the broken promise.
    """
    for name, check in checks.items():
        try:
            check()
        except Exception as error:
            reason = str(error) if isinstance(error, AssertionError) else f"it raised {type(error).__name__}: {error}"
            raise AssertionError(f"{what} fails the check {name!r}: {reason}") from error
    return list(checks)


def settings(max_examples: int) -> Callable[[F], F]:
    """Hypothesis settings: the same examples each time, no time limit, no files."""
    from hypothesis import HealthCheck, Phase
    from hypothesis import settings as hypothesis_settings

    made = hypothesis_settings(
        max_examples=max_examples,
        deadline=None,
        database=None,
        derandomize=True,
        # one failure with its own message, not a group of all that were met on the way
        report_multiple_bugs=False,
        # a busy machine is no failure of a probe; what fails is shrunk, and that fits nothing anew
        suppress_health_check=list(HealthCheck),
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
    )
    return cast(Callable[[F], F], made)


def declared(thing: Any, kind: str) -> None:
    """``thing`` is a frozen dataclass with a name and a docstring."""
    assert dataclasses.is_dataclass(thing), f"{kind} is a frozen dataclass of hyperparameters"
    assert getattr(type(thing), "__dataclass_params__").frozen, "the dataclass must be frozen"  # noqa: B009
    name: Any = getattr(thing, "name", None)
    assert isinstance(name, str), "it needs a name"
    assert name, "it needs a name"
    assert (type(thing).__doc__ or "").strip(), "it needs a docstring: its first line is its description"


def fields_of(thing: Any) -> dict[str, Any]:
    """A deep copy of the fields of a dataclass."""
    return {each.name: copy.deepcopy(getattr(thing, each.name)) for each in dataclasses.fields(thing)}


@contextmanager
def no_global_randomness(who: str) -> Iterator[None]:
    """What runs inside must leave alone the global random states of numpy, torch and Python.

    Meanwhile these are where no seed is likely to put them, so that seeding them is seen too; then they are put back.
    """
    for library in ("jax", "torch"):
        # the first import of jax draws from numpy's state, and that is not the probe's doing
        with suppress(ModuleNotFoundError):
            importlib.import_module(library)
    kept, kept_too = np.random.get_state(), random.getstate()  # noqa: NPY002
    np.random.seed(_ODD)  # noqa: NPY002
    random.seed(_ODD)
    torch = sys.modules.get("torch")
    if torch is not None:
        kept_of_torch = torch.random.get_rng_state()
        torch.random.set_rng_state(torch.Generator().manual_seed(_ODD).get_state())
    before = _random_states()
    try:
        yield
        after = _random_states()
    finally:
        np.random.set_state(kept)  # noqa: NPY002
        random.setstate(kept_too)
        if torch is not None:
            torch.random.set_rng_state(kept_of_torch)
    for library, state in before.items():
        assert after[library] == state, f"{who} used {library}'s global random state; draw from a seed of its own"


@contextmanager
def no_hidden_state(thing: Any) -> Iterator[None]:
    """What runs inside must leave alone the global random states, and the fields of the dataclass ``thing``."""
    fields = repr(fields_of(thing))
    with no_global_randomness("it"):
        yield
    assert repr(fields_of(thing)) == fields, f"it changed its own fields from {fields} to {fields_of(thing)!r}"


def _random_states() -> dict[str, Any]:
    with np.printoptions(threshold=sys.maxsize):
        states: dict[str, Any] = {"numpy": repr(np.random.get_state()), "Python": random.getstate()}  # noqa: NPY002
    # whoever has not imported torch has not drawn from it
    if "torch" in sys.modules:
        states["torch"] = sys.modules["torch"].random.get_rng_state().numpy().tobytes()
    return states


def refuses(action: Callable[[], Any], word: str) -> str:
    """The message of the ValueError that ``action`` must raise; it must contain ``word``."""
    try:
        action()
    except ValueError as refusal:
        message = str(refusal)
    else:
        raise AssertionError(f"bad input was accepted; expected a ValueError that speaks of {word!r}")
    assert word in message, f"the error should speak of {word!r} but says: {message}"
    return message


def read_only(array: np.ndarray) -> np.ndarray:
    """A copy that cannot be written to."""
    copied = array.copy()
    copied.flags.writeable = False
    return copied


def rotation(dim: int, seed: int) -> np.ndarray:
    """A random orthogonal matrix ``(dim, dim)``."""
    draws = np.random.default_rng(np.random.SeedSequence([seed, 7])).standard_normal((dim, dim))
    return np.asarray(np.linalg.qr(draws)[0])


def auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Chance that a positive scores above a negative; ties count half."""
    from scipy.stats import rankdata

    positive = np.asarray(labels) == 1
    n_high, n_low = int(positive.sum()), int((~positive).sum())
    ranks = rankdata(np.asarray(scores))[positive].sum()
    return float((ranks - n_high * (n_high + 1) / 2) / (n_high * n_low))
