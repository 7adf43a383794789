"""Inputs made from declared signatures, and what must come of them: a result with finite fields, or an error of ours.

Python: every name of ``elk_stress.__all__`` that can be called (and the methods of :class:`~elk_stress.Ledger`). A call
starts from arguments that are right (by the parameter's name); one or two of them are replaced by draws that follow
from the parameter's annotation and from the declared domains (:data:`elk_stress.core.settings.SETTINGS`, registries,
``Literal``). The command line: every option of every command, from its argparse action, with files as hostile as
arrays.

An input that a declared domain forbids must not be accepted. An error is ours if a ``raise`` statement of this package
raised it, with a class that a caller can expect and a message that says more than a word.
"""

from __future__ import annotations

import argparse
import ast
import atexit
import contextlib
import inspect
import io
import json
import math
import shutil
import tempfile
import typing
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from hypothesis import strategies as st

import elk_stress
from elk_stress import cli
from elk_stress.core import registry
from elk_stress.core.settings import SETTINGS
from elk_stress.estimators import METHODS
from elk_stress.ledger.ledger import BudgetExceeded, BudgetWarning, Ledger, LedgerError, Terms
from elk_stress.testbeds.arrays import Arrays
from elk_stress.testbeds.linear import Linear
from elk_stress.thoughts.engine import prepare
from elk_stress.threats.priors import EllipticalPrior

D = 4
N = 160
HERE = Path(elk_stress.__file__).parent
SOURCES = tuple({path.resolve() for path in (HERE, HERE / "probes", HERE / "attacks")})
EXPECTED = (ValueError, TypeError, LookupError, OSError, LedgerError, BudgetExceeded)


@dataclass(frozen=True)
class Drawn:
    """A value, and whether a declared domain forbids it."""

    value: Any
    forbidden: bool = False


@dataclass
class Tally:
    """What came of the inputs."""

    cases: int = 0
    results: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    where: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        kinds = ", ".join(f"{name} {count}" for name, count in self.errors.most_common())
        return (
            f"{self.cases} inputs: {self.results} results, {sum(self.errors.values())} refusals ({kinds}), "
            f"{len(self.failures)} failures"
        )


# -- what is right, by the name of a parameter ------------------------------------------------------------------------


@cache
def data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(np.random.SeedSequence(11))
    labels = np.arange(N) % 2
    return rng.standard_normal((N, D)) + 3.0 * labels[:, None] * np.eye(D)[0], labels


@cache
def prepared() -> Any:
    return prepare(Arrays(*data(), shares=(0.1, 0.45, 0.45)), replicates=100)


@cache
def with_output() -> Any:
    return prepare(Linear(dim=8, n_items=120, n_contexts=4), replicates=100)


@cache
def results() -> list[Any]:
    return [
        elk_stress.stress(prepared(), probe, attacks=(), controls=False, threats="item/isotropic0.3/gaussian")
        for probe in ("mass_mean", "lda")
    ]


def half_space(u: Any) -> Any:
    return 1.5 - u[:, 0]


TERMS = Terms("mine", "v1", "item/natural/gaussian", (12.0, 15.0, 20.0))


@cache
def folder() -> Path:
    made = Path(tempfile.mkdtemp(prefix="elk_stress_generated_"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    x, y = data()
    np.save(made / "x.npy", x)
    np.save(made / "y.npy", y)
    (made / "file").write_text("not a folder")
    (made / "text.jsonl").write_text('{"text": "a", "label": 1}\n')
    elk_stress.direction(np.eye(D)[0]).save(made / "probe.safetensors")
    with Ledger(made / "made.ledger", TERMS):
        pass
    return made


def ready() -> None:
    """Make what all inputs share; not while inputs are drawn, when nothing else may be random."""
    prepared(), with_output(), results(), folder(), called(), commands()


def good(where: str, name: str) -> Any:
    """A right argument for the parameter ``name`` of ``where``, or ``...`` where its default is."""
    x, y = data()
    special: dict[tuple[str, str], Any] = {
        ("estimate_bits", "method"): "monte_carlo",
        ("estimate_bits", "n_particles"): 64,
        ("estimate_bits", "dim"): 3,
        ("estimate_bits", "max_evaluations"): 500,
        ("incidental_fraction", "testbed"): with_output(),
        ("incidental_fraction", "probe"): np.eye(8)[0],
        ("stress_training", "testbed"): Arrays(x, y),
        ("Ledger", "path"): folder() / "opened.ledger",
    }
    usual: dict[str, Any] = {
        "probe": np.eye(D)[0], "activations": x, "labels": y, "testbed": prepared(), "weight": np.ones(D),
        "obj": np.ones(D), "limit_state": half_space, "attacks": (), "controls": False, "n_particles": 16,
        "threats": "item/isotropic0.3/gaussian", "a": results()[0], "b": results()[1], "results": [],
        "terms": TERMS, "account": "selection", "amount": 1.0, "head": None,
        "candidates": list("abcd"), "score": [0.3, -1.0, 2.0, 0.1],
    }  # fmt: skip
    return special.get((where, name), usual.get(name, ...))


# -- hostile values ---------------------------------------------------------------------------------------------------

ODD: tuple[Any, ...] = (
    None, True, False, "", "x", "\u00e9\u202e\n", b"bytes", [], (), {}, set(), object(), 1j, Ellipsis, math.nan,
    math.inf, -math.inf, -1, 0, 1, 2**31, 10**12, 10**400, -1e-300, 0.5, 1e300, np.nan, np.array([]), np.ones(3), int,
    lambda: 0,
)  # fmt: skip


def odd() -> st.SearchStrategy[Any]:
    return st.sampled_from(ODD) | st.integers() | st.floats() | st.text(max_size=8)


def of_setting(name: str) -> st.SearchStrategy[Drawn]:
    domain = SETTINGS[name]

    def judged(value: Any) -> Drawn:
        try:
            domain.convert(value)
        except ValueError:
            # nothing forbids leaving it out
            return Drawn(value, value is not None)
        return Drawn(value)

    if domain.whole:
        inside: Any = st.integers(int(domain.least), int(min(domain.most, domain.least + 40)))
        inside = inside | inside.map(np.int64)
    else:
        inside = st.floats(domain.least, min(domain.most, 100.0), exclude_min=True, exclude_max=True)
    return st.one_of(inside, odd()).map(judged)


def names_of(known: Any) -> st.SearchStrategy[Drawn]:
    known = [str(name) for name in known]
    return st.sampled_from(known).map(Drawn) | odd().map(
        lambda value: Drawn(value, not (isinstance(value, str) and value in known))
    )


@st.composite
def arrays(draw: st.DrawFn) -> Drawn:
    """Activations: of many libraries, types, layouts, shapes, and spoiled ones."""
    x = data()[0]
    how = draw(st.sampled_from(sorted(_SPOILED) + sorted(_LAID_OUT)))
    if how in _LAID_OUT:
        return Drawn(_LAID_OUT[how](x))
    return Drawn(_SPOILED[how](x, draw(st.integers(0, N - 1))), forbidden=True)


def _set(x: np.ndarray, row: int, value: Any) -> np.ndarray:
    out = x.astype(object if isinstance(value, (str, type(None))) else np.result_type(x, type(value)))
    out[row, row % D] = value
    return out


def _torch(x: np.ndarray, **options: Any) -> Any:
    import torch

    return torch.tensor(x, **options)


def _jax(x: np.ndarray) -> Any:
    import jax.numpy as jnp

    return jnp.asarray(x)


_LAID_OUT: dict[str, Callable[[np.ndarray], Any]] = {
    "lists": lambda x: x.tolist(),
    "float16": lambda x: x.astype(np.float16),
    "float32": lambda x: x.astype(np.float32),
    "big-endian": lambda x: x.astype(">f4"),
    "int": lambda x: np.round(10 * x).astype(int),
    "bool": lambda x: x > 0,
    "offset": lambda x: x + 1e6,
    "wide": lambda x: x * 1e9,
    "narrow": lambda x: x * 1e-9,
    "strided": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "fortran": np.asfortranarray,
    "objects": lambda x: x.astype(object),
    "torch": lambda x: _torch(x, requires_grad=True),
    "jax": _jax,
    "constant feature": lambda x: np.hstack([x[:, :-1], np.ones((N, 1))]),
    "contexts": lambda x: np.stack([x, x + 0.1, x - 0.1], axis=1),
}
_SPOILED: dict[str, Callable[[np.ndarray, int], Any]] = {
    "NaN": lambda x, i: _set(x, i, math.nan),
    "inf": lambda x, i: _set(x, i, -math.inf),
    "beyond float32": lambda x, i: _set(x, i, 1e39),
    "below float32": lambda x, i: x * 1e-40,
    "complex": lambda x, i: x + 1j,
    "masked": lambda x, i: np.ma.masked_less(x, x[i, 0] + 1e-9),
    "text": lambda x, i: x.astype(str),
    "one text": lambda x, i: _set(x, i, "a"),
    "missing": lambda x, i: _set(x, i, None),
    "rows cut": lambda x, i: x[:i] if i else x[:1],
    "no features": lambda x, i: x[:, :0],
    "one axis": lambda x, i: x[:, 0],
    "five axes": lambda x, i: x[:, :, None, None, None],
    "constant": lambda x, i: np.ones_like(x),
    "dates": lambda x, i: x.astype("datetime64[s]"),
    "records": lambda x, i: np.zeros(N, dtype=[("a", float)]),
    "a number": lambda x, i: i,
    "nothing": lambda x, i: None,
    "a word": lambda x, i: "activations",
    "ragged": lambda x, i: [[1.0], *x.tolist()],
    "sparse": lambda x, i: __import__("scipy.sparse").sparse.csr_matrix(x),
}


@st.composite
def per_item(draw: st.DrawFn, *, labels: bool) -> Drawn:
    y = data()[1]
    i = draw(st.integers(0, N - 2))
    rest = np.arange(N)
    fine: list[Any] = [y, y == 1, y.astype(float), y[:, None], y.tolist()] if labels else [rest // 2, rest.astype(str)]
    bad: list[Any] = [
        rest[:i], rest[None], np.where(rest == i, np.nan, y), np.where(rest == i, None, "a"), "abc", 3, {}, object(),
        np.ma.masked_equal(rest, i), [[1], [1, 2]], np.zeros((N, 2)), y + 1j, rest.astype("datetime64[s]"),
    ]  # fmt: skip
    if labels:
        bad += [np.full(N, i), rest % 3, 2 * y - 1, np.where(y, "yes", "no"), y * i + 2, None]
    where = draw(st.integers(0, len(fine) + 2 * len(bad) - 1))
    return Drawn(fine[where]) if where < len(fine) else Drawn(bad[(where - len(fine)) % len(bad)], True)


def probes() -> st.SearchStrategy[Drawn]:
    cheap = ["mass_mean", "lda", "rock", "random_direction"]
    fine = [np.eye(D)[0], elk_stress.direction(np.ones(D), -3.0), *cheap]
    bad = [
        np.ones(D + 1),
        np.full(D, np.nan),
        np.ones((2, D)),
        elk_stress.direction(np.ones(9)),
        elk_stress.FittedProbe,
    ]
    return either(fine, bad) | odd().map(lambda value: Drawn(value, True))


def either(fine: list[Any], bad: list[Any]) -> st.SearchStrategy[Drawn]:
    return st.sampled_from(fine).map(Drawn) | st.sampled_from(bad).map(lambda value: Drawn(value, True))


def threats() -> st.SearchStrategy[Drawn]:
    fine = ["item/isotropic0.3/gaussian", "item/isotropic1/logistic", elk_stress.Threat(prior="isotropic", c=0.1)]
    bad = ["item/isotropic/cauchy", "item/natural/gaussian/kept", "item", "item/isotropic-1/best", ["item", 3], [None]]
    return either(fine, bad) | odd().map(_unless_none)


def _unless_none(value: Any) -> Drawn:
    return Drawn(value, value is not None)


def several(known: tuple[str, ...]) -> st.SearchStrategy[Drawn]:
    """Names of several things: none of them may be fine, strange ones never."""

    def judged(value: Any) -> Drawn:
        each = value if isinstance(value, (list, tuple)) else None
        fine = each is not None and all(isinstance(v, str) and v in known for v in each) and len(set(each)) == len(each)
        return Drawn(value, not fine and not (isinstance(value, str) and value in (*known, "all")))

    return (st.lists(st.sampled_from([*known, "x"]), max_size=2) | odd()).map(judged).filter(_sized)


def _sized(drawn: Drawn) -> bool:
    # containers of nothing are lists of nothing; what an empty set or mapping says is nobody's business
    return not (isinstance(drawn.value, (set, dict, np.ndarray, str)) and len(drawn.value) == 0)


def for_parameter(where: str, parameter: inspect.Parameter, hint: Any) -> st.SearchStrategy[Drawn]:
    """Draws for a parameter, by its name, else by its annotation."""
    name = parameter.name
    if name in SETTINGS and name not in ("strengths", "shares") and not (where == "stress_training" and name == "bits"):
        return of_setting(name)
    if name == "activations":
        return arrays()
    if name in ("labels", "groups"):
        made = per_item(labels=name == "labels")
        return made if name == "labels" else made | st.just(Drawn(None))
    if name == "probe" and where in ("stress", "stress_activations", "incidental_fraction"):
        return probes()
    if name == "threats":
        return threats()
    if name == "attacks":
        return several(("natural_thoughts", "isotropic_noise"))
    if name == "method" and where == "estimate_bits":
        return names_of([m for m in METHODS if m != "auto"])
    if name == "attack" and where == "stress_training":
        return names_of(registry.names("attacks"))
    if name == "prior" and where != "Threat":
        wide = EllipticalPrior(np.eye(D + 1))
        return either([EllipticalPrior(np.eye(D)), None], [wide, np.eye(D)]) | odd().map(_unless_none)
    if name == "weight":
        fine_weights = st.sampled_from(
            [np.ones(D), np.arange(D), np.ones(D, np.float16), _torch(np.ones(D)), [1.0, 2.0]]
        )
        bad_weights = st.sampled_from(
            [np.ones((2, D)), np.full(D, np.inf), np.ones(D) + 1j, np.ones(0), "abc", None, [["a"]]]
        )
        return fine_weights.map(Drawn) | bad_weights.map(lambda v: Drawn(v, True))
    if hint is bool:
        return odd().map(lambda value: Drawn(value, not isinstance(value, (bool, np.bool_))))
    if typing.get_origin(hint) is Literal:
        return names_of(typing.get_args(hint))
    return odd().map(Drawn)


# -- calls ------------------------------------------------------------------------------------------------------------

CONTAINERS = {
    "StressResult": "what a stress test found; made by stress",
    "PressureResult": "what training pressure found; made by stress_training",
    "BudgetExceeded": "an error; made by the ledger",
    "Kind": "an enumeration",
    "Bits": "a result; its numbers are checked, the rest is the estimator's",
    "Flag": "a row of a result; made by elk_stress.core.flags.flag",
    "FittedProbe": "a result of fit; made by direction, wrap and the recipes",
}
"""Exports that nobody calls with input of their own."""


def called() -> dict[str, Callable[..., Any]]:
    """Every export that is called with a user's input, and the methods of the ledger."""
    found: dict[str, Callable[..., Any]] = {
        name: getattr(elk_stress, name)
        for name in elk_stress.__all__
        if name not in CONTAINERS and callable(getattr(elk_stress, name))
    }
    for name, method in vars(Ledger).items():
        if inspect.isfunction(method) and not name.startswith("_") and name != "close":
            found[f"Ledger.{name}"] = method
    return found


@st.composite
def calls(draw: st.DrawFn) -> tuple[str, dict[str, Drawn]]:
    """A call: a name and its arguments."""
    where = draw(st.sampled_from([*called(), "stress_activations", "stress_activations", "estimate_bits", "Threat"]))
    function = called()[where]
    hints = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
    parameters = [p for p in inspect.signature(function).parameters.values() if p.name not in ("self", "options")]
    skip = {"progress", "memory", "out"}
    parameters = [p for p in parameters if p.name not in skip]
    base = where.partition(".")[0]
    given = {p.name: Drawn(value) for p in parameters if (value := good(base, p.name)) is not ...}
    changed = (
        draw(st.lists(st.sampled_from(parameters), min_size=0, max_size=2, unique_by=lambda p: p.name))
        if parameters
        else []
    )
    for parameter in changed:
        given[parameter.name] = draw(for_parameter(base, parameter, hints.get(parameter.name)))
    if where == "stress_activations":
        options = draw(
            st.sampled_from([None, "max_bits", "fpr", "n_particles", "budget", "behaviour_epsilon", "attacks"])
        )
        given |= {"attacks": Drawn(()), "controls": Drawn(False), "n_particles": Drawn(16)}
        if options is not None:
            given[options] = draw(for_parameter(where, inspect.Parameter(options, inspect.Parameter.KEYWORD_ONLY), Any))
    return where, given


def call(where: str, given: Mapping[str, Drawn], tally: Tally) -> None:
    """Make a call and judge what came."""
    arguments = {name: drawn.value for name, drawn in given.items()}
    forbidden = [name for name, drawn in given.items() if drawn.forbidden]
    told = f"{where}({', '.join(f'{k}={_short(v)}' for k, v in arguments.items())})"
    tally.cases += 1
    tally.where[where] += 1
    ledger = None
    try:
        # some make files of the names that they get
        with warnings.catch_warnings(), contextlib.chdir(folder()):
            warnings.simplefilter("ignore", BudgetWarning)
            if where.startswith("Ledger"):
                for path in folder().glob("opened.ledger*"):
                    path.unlink()
            if where.startswith("Ledger."):
                ledger = Ledger(folder() / "opened.ledger", TERMS)
                result = getattr(ledger, where.partition(".")[2])(**arguments)
            else:
                result = called()[where](**arguments)
    except Exception as error:
        _judge(error, told, tally)
        return
    finally:
        if ledger is not None:
            ledger.close()
    tally.results += 1
    if isinstance(result, Ledger):
        result.close()
    if forbidden:
        tally.failures.append(f"{told} was accepted though {', '.join(forbidden)} is forbidden")
    elif not _finite(result):
        tally.failures.append(f"{told} gave what is not finite: {_short(result)}")


def _judge(error: Exception, told: str, tally: Tally) -> None:
    name = type(error).__name__
    problem = ""
    if not isinstance(error, EXPECTED) or type(error) in (KeyError, IndexError, LookupError):
        problem = "a class that no caller expects"
    elif not _raised_here(error):
        problem = "it was raised by somebody else's code"
    elif len(str(error).split()) < 4:
        problem = "it says too little"
    elif len(str(error)) > 3000:
        problem = "it says too much"
    if problem:
        tally.failures.append(f"{told} raised {name}: {str(error)[:200]!r} at {_place(error)}; {problem}")
    tally.errors[name] += 1


def _last(error: BaseException) -> Any:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace


def _place(error: BaseException) -> str:
    trace = _last(error)
    return "nowhere" if trace is None else f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"


def _raised_here(error: BaseException) -> bool:
    """Whether a ``raise`` statement of this package raised it."""
    trace = _last(error)
    path = Path(trace.tb_frame.f_code.co_filename)
    if not any(source in path.resolve().parents for source in SOURCES):
        return False
    return any(first <= trace.tb_lineno <= last for first, last in _raises(path))


@cache
def _raises(path: Path) -> list[tuple[int, int]]:
    tree = ast.parse(path.read_text())
    return [(n.lineno, n.end_lineno or n.lineno) for n in ast.walk(tree) if isinstance(n, ast.Raise)]


def _finite(result: Any) -> bool:
    if isinstance(result, elk_stress.Bits):
        return not any(math.isnan(x) for x in (result.value, result.low, result.high)) and math.isfinite(result.low)
    if isinstance(result, elk_stress.StressResult):
        json.dumps(result.to_json(), allow_nan=False)
        return all(not math.isnan(row.headline.value) for row in result.threats.values())
    if isinstance(result, elk_stress.FittedProbe):
        return all(np.isfinite(np.asarray(v, dtype=float)).all() for v in result.parameters.values())
    return True


def _short(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"array{value.shape}:{value.dtype}"
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."


# -- the command line -------------------------------------------------------------------------------------------------


@cache
def commands() -> dict[str, argparse.ArgumentParser]:
    """Every command by its words: ``run``, ``ledger spend``, ..."""

    def walk(parser: argparse.ArgumentParser, words: str) -> Iterator[tuple[str, argparse.ArgumentParser]]:
        inner = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        if not inner:
            yield words, parser
        for action in inner:
            for name, child in action.choices.items():
                yield from walk(child, f"{words} {name}".strip())

    return dict(walk(cli._parser(), ""))


def right(words: str) -> list[str]:
    """Arguments with which a command would do its work; ``train`` stops where it would write."""
    at = folder()
    if words == "run":
        return [
            *("--activations", str(at / "x.npy"), "--labels", str(at / "y.npy"), "--probes", "mass_mean"),
            *(
                "--attacks",
                "none",
                "--threats",
                "item/isotropic0.3/gaussian",
                "--no-progress",
                "--out",
                str(at / "file"),
            ),
        ]
    if words == "train":
        return ["--no-progress", "--out", str(at / "file")]
    if words == "ledger spend":
        return [str(at / "opened.ledger"), "selection", "1"]
    if words.startswith("ledger"):
        return [str(at / "opened.ledger")]
    return []


TEXTS = (
    "", "x", "-1", "0", "1", "2", "0.5", "nan", "inf", "-inf", "1e400", "\u00b2", "\u0663", "9" * 5000, "1,2", ",", ":",
    "a:b", "--", "item/natural/gaussian", "item/isotropicnan/gaussian", "mass_mean,lda", "all", "none", "true",
    "a\x1b[31mb", "\n",
)  # fmt: skip


def value_for(action: argparse.Action) -> st.SearchStrategy[Drawn]:
    """Texts for an option, judged by the domain of its type and by its choices."""
    setting = getattr(action.type, "__name__", "")
    texts = st.sampled_from(TEXTS) | st.text(max_size=6).filter(lambda t: not t.startswith("-"))
    if action.choices is not None:
        known = [str(c) for c in action.choices]
        return st.sampled_from(known).map(Drawn) | texts.map(lambda t: Drawn(t, t not in known))
    if setting in SETTINGS:
        domain = SETTINGS[setting]

        def judged(text: str) -> Drawn:
            try:
                domain.parse(text)
            except ValueError:
                return Drawn(text, True)
            return Drawn(text)

        return (texts | st.integers(-2, 5).map(str) | st.floats(-1, 2).map(str)).map(judged)
    if action.type is Path:
        names = ["missing.npy", "x.npy", "y.npy", "file", "text.jsonl", "probe.safetensors", "made.ledger", "."]
        return st.sampled_from(names).map(lambda name: Drawn(str(folder() / name)))
    return texts.map(Drawn)


@st.composite
def command_lines(draw: st.DrawFn) -> tuple[list[str], bool, Any]:
    """Words of a command line, whether a declared domain forbids one, and an array for its files (or ``None``)."""
    words = draw(st.sampled_from([*commands(), "run", "run", "run", "train", "ledger spend"]))
    parser = commands()[words]
    options = [a for a in parser._actions if a.option_strings and a.dest not in ("help", "out", "traceback", "model")]
    chosen = draw(st.lists(st.sampled_from(options), max_size=2, unique_by=lambda a: a.dest)) if options else []
    line, forbidden = [*words.split(), *right(words)], False
    for action in chosen:
        line.append(action.option_strings[-1])
        if action.nargs != 0:
            drawn = draw(value_for(action))
            line[-1] = f"{line[-1]}={drawn.value}"
            forbidden |= drawn.forbidden
    spoiled = None
    if words == "run" and draw(st.integers(0, 2)) == 0:
        spoiled = draw(arrays().filter(lambda d: isinstance(d.value, np.ndarray) and type(d.value) is np.ndarray))
        line = [str(folder() / "spoiled.npy") if word == str(folder() / "x.npy") else word for word in line]
        if spoiled.forbidden or draw(st.integers(0, 9)) == 0:
            # these are read, and the sound ones among them run
            line = [str(folder() / "made") if word == str(folder() / "file") else word for word in line]
    return line, forbidden, spoiled


def command(line: list[str], forbidden: bool, spoiled: Drawn | None, tally: Tally) -> None:
    """Run a command line in this process and judge what came."""
    told = "elk-stress " + " ".join(_short(word)[1:-1] for word in line)
    tally.cases += 1
    tally.where["elk-stress " + line[0]] += 1
    for path in folder().glob("opened.ledger*"):
        path.unlink()
    shutil.copy(folder() / "made.ledger", folder() / "opened.ledger")
    if spoiled is not None:
        np.save(folder() / "spoiled.npy", spoiled.value)
        told += f" with {_short(spoiled.value)}"
        forbidden |= spoiled.forbidden and "made" in "".join(line[-1:])
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.chdir(folder()):
            code = cli.main(line)
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException as error:
        tally.failures.append(f"{told} raised {type(error).__name__}: {str(error)[:200]!r} at {_place(error)}")
        return
    said = err.getvalue()
    if code == 0 or (code == 3 and "--strict" in line):
        tally.results += 1
        if forbidden:
            tally.failures.append(f"{told} was accepted though it is forbidden")
        return
    tally.errors[f"exit {code}"] += 1
    if code not in (1, 2) or (code == 1 and line[0] != "ledger"):
        tally.failures.append(f"{told} exited with {code}: {said[:300]!r}")
    elif not said.startswith("elk-stress: ") or said.count("\n") != 1 or len(said.split()) < 5 or len(said) > 3000:
        tally.failures.append(f"{told} said {said[:300]!r}")
