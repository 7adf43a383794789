"""A table of training pressure: several probes, one testbed, one attack, one folder. Nothing finished is ever lost.

B, a property of probe and threat, is measured once per probe; then each attack and mode is run against it. After every
finished row ``result.json`` is replaced atomically; a row that fails is recorded and the others go on; Ctrl-C writes
what is finished. Checkpoints of every row lie beside, so that the same command goes on after a kill.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from elk_stress.core.settings import as_path, listed, truth
from elk_stress.runs.folder import check_folder, replace_file
from elk_stress.testbeds.protocol import PLANTED
from elk_stress.thoughts.result import plain
from elk_stress.training.checkpoint import digest
from elk_stress.training.comparison import compare_pressure
from elk_stress.training.curve import NO_SIGNAL
from elk_stress.training.loop import (
    MODES,
    Mode,
    as_trainee,
    check_options,
    defence_of,
    stress_training,
    training_attack,
)
from elk_stress.training.measure import clean_auroc
from elk_stress.training.organism_trainee import DEFAULT_EPSILON, OrganismTrainee
from elk_stress.training.result import WeightBits
from elk_stress.training.run_result import TrainingRun as TrainingRun
from elk_stress.training.weight_bits import measure_weight_bits

__all__ = ["TrainingInterrupted", "TrainingRun", "train"]


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C during a run; ``result`` holds what was finished, which is also written."""

    def __init__(self, result: TrainingRun) -> None:
        super().__init__("the run was interrupted; what was finished is written, and the same command resumes it")
        self.result = result


def train(
    testbed: Any,
    probes: Sequence[str],
    *,
    out: str | Path,
    attack: Any = "finetune",
    modes: Sequence[Mode] = ("frozen",),
    epsilon: float = DEFAULT_EPSILON,
    bits: bool = True,
    pairs: Sequence[tuple[str, str]] | None = None,
    seed: int = 0,
    progress: Any = None,
    **options: Any,
) -> TrainingRun:
    """Press several probes and write the folder ``out``.

    Args:
        testbed: an organism, a language-model testbed or a trainee.
        probes: registered names, or ``oracle`` and ``paper`` of an organism.
        out: folder for ``result.json``, ``report.md``, ``pressure.png`` and ``checkpoints/``.
        attack: registered name or object.
        modes: defender modes, one row each.
        epsilon: nats.
        bits: whether to measure B (organisms only).
        pairs: names of the probes to compare, chosen beforehand; by default all with all.
        seed: all randomness.
        progress: a ``rich.progress.Progress``.
        options: further arguments of :func:`~elk_stress.training.loop.stress_training`.

    Raises:
        UnusableFolder: the folder cannot be written; before any work.
        TrainingInterrupted: Ctrl-C, after what was finished has been written.
    """
    modes, probes = listed("modes", modes, (str,)), listed("probes", probes, (str,))
    for mode in modes:
        if mode not in MODES:
            raise ValueError(f"no defender mode is called {mode!r}; known modes: {', '.join(MODES)}")
    for what, names in (("probes", probes), ("modes", modes)):
        if not names or len(set(names)) < len(names):
            raise ValueError(f"{what} must be named once each and at least one is needed, got {names}")
    bits = truth("bits", bits)
    check_options(seed=seed, epsilon=epsilon, **options)
    if strangers := {name for pair in pairs or () for name in pair} - set(probes):
        raise ValueError(f"pairs to compare name probes that are not pressed: {', '.join(sorted(strangers))}")
    folder = check_folder(as_path("out", out))
    started = time.monotonic()
    recipe = training_attack(attack)
    trainee = as_trainee(testbed, recipe, probes, epsilon=epsilon, seed=seed)
    settings = {"attack": recipe.name, "modes": list(modes), "probes": list(probes), "bits": bits, **options}
    state = TrainingRun(trainee.name, description=dict(trainee.describe()), config=plain(settings), seed=seed)
    try:
        for probe in probes:
            needed: WeightBits | None = None
            for mode in modes:
                row = f"{probe}-{recipe.name}-{mode}"
                try:
                    if bits and needed is None and isinstance(trainee, OrganismTrainee):
                        needed = _bits(trainee, probe, seed, folder, progress)
                    result = stress_training(
                        trainee,
                        probe,
                        attack=recipe,
                        mode=mode,
                        bits=needed,
                        seed=seed,
                        out=folder / "checkpoints" / row,
                        progress=progress,
                        **{k: v for k, v in options.items() if k != "against" or mode == "ensemble"},
                    )
                    state = replace(state, results=(*state.results, result))
                except Exception as error:
                    text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
                    state = replace(state, failures={**state.failures, row: text})
                state = replace(state, seconds=time.monotonic() - started)
                _write_json(state, folder)
        # planted probes are measured beside the others and not ranked among them, unless somebody asks
        wanted = {name for pair in pairs for name in pair} if pairs is not None else set(probes) - set(PLANTED)
        rivals = [result for result in state.results if result.probe in wanted]
        there = {result.probe for result in rivals}
        chosen = None if pairs is None else [pair for pair in pairs if set(pair) <= there]
        state = replace(state, comparisons=compare_pressure(rivals, chosen), status="ok")
    except KeyboardInterrupt:
        state = replace(state, status="interrupted", seconds=time.monotonic() - started)
        _write(state, folder)
        raise TrainingInterrupted(state) from None
    _write(state, folder)
    return state


def _bits(trainee: OrganismTrainee, probe: str, seed: int, folder: Path, progress: Any) -> WeightBits | None:
    """B of a probe, measured once: a later run of the same models in the same folder reads it back."""
    defence = defence_of(trainee, probe, (), (), seed)
    # a probe at chance has nothing to lose, so no bits
    if not np.mean(clean_auroc(trainee, defence.panel[defence.name], defence.clean["test"])) >= NO_SIGNAL:
        return None
    key = digest(np.concatenate([trainee.original, trainee.sigma, np.full((trainee.n_models, 1), seed)], axis=1))
    kept = folder / "checkpoints" / f"bits-{probe}-{key}.json"
    if kept.is_file():
        return WeightBits.from_json(json.loads(kept.read_text()))
    task = None if progress is None else progress.add_task(f"bits of {probe}", total=None)
    found = measure_weight_bits(trainee, list(defence.panel[defence.name]), seed=seed)
    kept.parent.mkdir(exist_ok=True)
    replace_file(kept, lambda part: part.write_text(json.dumps(plain(found), allow_nan=False)))
    if progress is not None:
        progress.update(task, total=1, completed=1)
    return found


def _write_json(state: TrainingRun, folder: Path) -> None:
    text = json.dumps(state.to_json(), allow_nan=False, separators=(",", ":"))
    replace_file(folder / "result.json", lambda part: part.write_text(text + "\n"))


def _write(state: TrainingRun, folder: Path) -> None:
    _write_json(state, folder)
    from elk_stress.report import pressure
    from elk_stress.report.plots import save

    if state.results:
        replace_file(folder / "pressure.png", lambda part: save(pressure.figure(state.results), part))
    replace_file(folder / "report.md", lambda part: part.write_text(pressure.report(state)))
