"""One run: a testbed, several probes, one folder. Nothing that is finished is ever lost.

The output folder is checked before the long work. After every finished probe ``result.json`` is replaced atomically
with everything so far (status ``partial``); a probe that fails is recorded with its message and the others go on;
Ctrl-C writes what is finished (status ``interrupted``) before it goes on its way. Probes that do not apply are listed
with the reason.

Finer than probes, every finished row lies in the subfolder ``pieces`` (:mod:`elk_stress.thoughts.memory`): a run that
was killed at any moment loses the row in progress, and the same run into the same folder goes on from there, to the
same result in everything but ``seconds``.
"""

from __future__ import annotations

import importlib
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from elk_stress.core.bits import Bits
from elk_stress.core.settings import as_path, listed, setting, truth
from elk_stress.core.versions import versions
from elk_stress.probing.multi_read import tokens_of
from elk_stress.probing.probe import FittedProbe, Probe
from elk_stress.runs.folder import check_folder, write_folder, write_result
from elk_stress.testbeds.protocol import PLANTED, Testbed
from elk_stress.thoughts.attacks.protocol import Attack
from elk_stress.thoughts.memory import Memory
from elk_stress.thoughts.result import StressResult
from elk_stress.thoughts.run_result import RunResult as RunResult
from elk_stress.threats.threat import Threat, as_threats, check_measurable

__all__ = ["Interrupted", "RunResult", "run"]

PIECES = "pieces"
"""Where a run's folder keeps its finished rows."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a run; ``result`` holds what was finished, which is also written."""

    def __init__(self, result: RunResult) -> None:
        super().__init__("the run was interrupted; what was finished is written")
        self.result = result


def run(
    testbed: Testbed,
    probes: Sequence[str | Probe | FittedProbe],
    *,
    out: str | Path,
    attacks: Literal["all"] | Sequence[str] = "all",
    threats: Sequence[Threat] | None = None,
    behaviour_epsilon: float | None = None,
    max_bits: float | None = None,
    seed: int = 0,
    fpr: float = 0.05,
    progress: Any = None,
    config: Mapping[str, Any] | None = None,
    pairs: Sequence[tuple[str, str]] | None = None,
    fresh: bool = False,
    tell: Callable[[str], None] | None = None,
) -> RunResult:
    """Stress every probe on one testbed and write the folder ``out``.

    Args:
        testbed: prepared here, with progress.
        probes: registered names, recipes, fitted probes, or ``oracle`` and ``paper`` where the testbed knows them.
        out: folder for ``result.json``, ``survival.png``, ``best_of_n.png`` and ``report.md``; checked first.
        attacks: names, or ``"all"`` that apply.
        threats: default: see :func:`elk_stress.threats.threat.default_threats`.
        behaviour_epsilon: nats; default 3 x the median shift under the prior.
        max_bits: where items are censored; default: that of :func:`elk_stress.thoughts.engine.stress`.
        seed: all randomness.
        fpr: false-positive rate of the threshold.
        progress: a ``rich.progress.Progress``, or ``None``.
        config: further settings to record (the command line, say).
        pairs: names of the probes to compare, chosen beforehand; by default all with all.
        fresh: compute everything, whatever an earlier run left in ``out``.
        tell: gets lines about what an earlier run left; by default they are printed above the progress bars, if any.

    Raises:
        TypeError, ValueError: no probes, an unknown one, a threat, attack or setting that is none; before any work.
        UnusableFolder: the folder cannot be written; before any work.
        Interrupted: Ctrl-C, after what was finished has been written.
    """
    seed, fpr = setting("seed", seed), setting("fpr", fpr)
    max_bits = setting("max_bits", max_bits, optional=True)
    behaviour_epsilon = setting("behaviour_epsilon", behaviour_epsilon, optional=True)
    probes, fresh = _asked(probes), truth("fresh", fresh)
    if threats is not None:
        threats = as_threats(threats, behaviour_epsilon)
        check_measurable(testbed, threats)
    if not (isinstance(attacks, str) and attacks == "all"):
        attacks = listed("attacks", attacks, (str, Attack))
    folder = check_folder(as_path("out", out))
    started = time.monotonic()
    if tell is None:
        tell = partial(progress.console.print, markup=False, emoji=False) if progress is not None else lambda line: None
    memory = Memory(folder / PIECES, fresh=fresh, tell=tell)
    engine = importlib.import_module("elk_stress.thoughts.engine")
    # here and not left to the prepared testbed: contrast pairs, for one, are known only afterwards
    testbed.prepare(progress)
    strangers = {name for pair in pairs or () for name in pair} - {_name(probe) for probe in probes}
    if strangers:
        raise ValueError(f"pairs to compare name probes that are not run: {', '.join(sorted(strangers))}")
    apply, skipped = _applicable(testbed, probes)
    settings: dict[str, Any] = {"threats": threats, "behaviour_epsilon": behaviour_epsilon, "seed": seed, "fpr": fpr}
    if max_bits is not None:
        settings["max_bits"] = max_bits
    asked = attacks if isinstance(attacks, str) else tuple(attacks)
    state = RunResult(
        testbed=testbed.name,
        skipped=skipped,
        description=dict(testbed.describe()),
        config={"probes": [_name(p) for p in probes], "attacks": asked, **settings, **(config or {})},
        versions=versions(),
        seed=seed,
    )
    try:
        prepared = engine.prepare(testbed, seed=seed, progress=progress)
        with _task(progress, f"stressing {len(apply)} probes", len(apply)) as advance:
            for probe in apply:
                try:
                    result = engine.stress(prepared, probe, attacks=asked, progress=progress, memory=memory, **settings)
                    state = replace(state, results=(*state.results, result))
                except Exception as error:
                    state = replace(state, failures={**state.failures, _name(probe): _message(error)})
                    if isinstance(error, ValueError):
                        state = replace(state, refused=(*state.refused, _name(probe)))
                state = replace(state, seconds=time.monotonic() - started, controls=_merged(state.results))
                _write_if_possible(state, folder)
                advance()
        if len(state.results) > 1:
            named = _by_name(state.results)
            # a probe that failed or does not apply is said elsewhere
            chosen = None if pairs is None else [pair for pair in pairs if set(pair) <= set(named)]
            state = replace(state, comparisons=engine.compare_all(named, chosen))
    except KeyboardInterrupt:
        state = replace(state, status="interrupted", seconds=time.monotonic() - started)
        if state.results or state.failures:
            write_folder(state, folder)
        raise Interrupted(state) from None
    state = replace(state, status="ok", seconds=time.monotonic() - started)
    write_folder(state, folder)
    return state


def _asked(probes: Any) -> list[str | Probe | FittedProbe]:
    """The probes of a run; there is one at least, and names are known."""
    from elk_stress.core import registry

    each = listed("probes", probes, (str, FittedProbe, Probe))
    for name in (probe for probe in each if isinstance(probe, str)):
        if name not in PLANTED and name not in registry.names("probes"):
            raise registry.unknown("probes", name)
    if not each:
        raise ValueError("probes are a name or a probe or several, and at least one is needed; got none")
    return each


def _applicable(
    testbed: Testbed, probes: Sequence[str | Probe | FittedProbe]
) -> tuple[list[str | Probe | FittedProbe], dict[str, str]]:
    from elk_stress.core import registry

    apply: list[str | Probe | FittedProbe] = []
    skipped: dict[str, str] = {}
    known = testbed.known_probes()
    for probe in probes:
        if isinstance(probe, str) and probe in PLANTED:
            if probe in known:
                apply.append(probe)
            else:
                skipped[probe] = f"{testbed.name} does not know one"
            continue
        recipe = registry.load("probes", probe) if isinstance(probe, str) else probe
        fitted = isinstance(recipe, FittedProbe)
        if recipe.traits.needs_pairs and not fitted and testbed.splits["train"].pairs is None:
            skipped[_name(probe)] = "it learns from contrast pairs and these data have none (field pair)"
        elif recipe.traits.needs_behaviour and not fitted and testbed.shift_cost == "none":
            skipped[_name(probe)] = f"it learns from what the model does, and {testbed.name} has no output"
        elif recipe.traits.tokens and tokens_of(testbed) is None:
            skipped[_name(probe)] = "it reads a token axis and this testbed gives one activation per item"
        else:
            apply.append(probe)
    return apply, skipped


def _by_name(results: Sequence[StressResult]) -> dict[str, StressResult]:
    """Results by probe; a second probe of the same name is numbered."""
    named: dict[str, StressResult] = {}
    for result in results:
        # another one may be called so itself
        names = itertools.chain([result.probe], (f"{result.probe} {again}" for again in itertools.count(2)))
        named[next(name for name in names if name not in named)] = result
    return named


def _merged(results: Sequence[StressResult]) -> dict[str, Mapping[str, Bits] | str]:
    controls: dict[str, Mapping[str, Bits] | str] = {}
    for result in results:
        for name, row in result.controls.items():
            # a sentence why it does not apply gives way to numbers
            if name not in controls or isinstance(controls[name], str):
                controls[name] = row
    return controls


def _write_if_possible(state: RunResult, folder: Path) -> None:
    # the previous file is whole and everything is in memory: go on, and let the last write report the error
    with suppress(OSError):
        write_result(state, folder)


def _task(progress: Any, description: str, total: int) -> Any:
    if progress is None:
        return nullcontext(lambda: None)
    return _Task(progress, description, total)


class _Task:
    def __init__(self, progress: Any, description: str, total: int) -> None:
        self._progress, self._id = progress, progress.add_task(description, total=total)

    def __enter__(self) -> Any:
        return lambda: self._progress.advance(self._id)

    def __exit__(self, *_: object) -> None:
        self._progress.stop_task(self._id)


def _name(probe: str | Probe | FittedProbe) -> str:
    return probe if isinstance(probe, str) else probe.name


def _message(error: Exception) -> str:
    text = str(error).strip()
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text or 'no message'}"
