r"""Training pressure on one probe: the weights move against it, and the engine says how far that went.

The attack advances the weights of all cells, strengths x models; the defender may refit; the engine measures under q's
noise at every checkpoint, keeps the state on disk, and at the end reads the pressure curve: for b bits, the lowest
AUROC among the cells that spent at most b and kept behaviour. The cell is chosen on calibration items and reported on
test items, so that the choice is no luck.

Defender modes: ``frozen`` (the probe never changes), ``refit`` (refitted on the attacked activations at every
checkpoint; the attack goes on against the new one), ``ensemble`` (the attack trains against several probes at once, and
the others are held out). Strength 0 is the benign control.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from elk_stress.core import registry
from elk_stress.core.flags import Flag, flag
from elk_stress.core.settings import as_path, listed, setting, settings
from elk_stress.core.versions import versions
from elk_stress.probing.probe import FittedProbe, Probe
from elk_stress.thoughts.prepared import check_scores
from elk_stress.training.checkpoint import Checkpoints, digest
from elk_stress.training.curve import account
from elk_stress.training.evasion import targets_from
from elk_stress.training.measure import (
    Measured,
    auroc_of,
    clean_auroc,
    fit_cells,
    half_advantage,
    measure,
    scores_of,
    stack_measured,
)
from elk_stress.training.organism_trainee import DEFAULT_EPSILON, OrganismTrainee
from elk_stress.training.protocols import Targets, Trainee, TrainingAttack
from elk_stress.training.result import PressureResult, WeightBits, over_models

__all__ = [
    "DEFAULT_STRENGTHS",
    "MODES",
    "Defence",
    "Mode",
    "as_trainee",
    "defence_of",
    "stress_training",
    "training_attack",
]

Mode = Literal["frozen", "refit", "ensemble"]
MODES: tuple[Mode, ...] = ("frozen", "refit", "ensemble")
DEFAULT_STRENGTHS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
# rows that a probe is tried on before anything is trained against it
_TRIED = 64
_KINDS = {"organism": "organism", "language_model": "language model"}
_HELD_OUT = ("mass_mean", "lda", "logistic")


def stress_training(
    testbed: Any,
    probe: str | Probe | Mapping[int, FittedProbe],
    *,
    attack: str | TrainingAttack = "finetune",
    mode: Mode = "frozen",
    against: Sequence[str] = (),
    held_out: Sequence[str] = _HELD_OUT,
    strengths: Sequence[float] | None = None,
    steps: int | None = None,
    checkpoints: int = 10,
    epsilon: float = DEFAULT_EPSILON,
    draws: int = 4,
    bits: WeightBits | None = None,
    audit_points: int = 6,
    seed: int = 0,
    out: str | Path | None = None,
    progress: Any = None,
) -> PressureResult:
    """Train a model against a probe and measure what it cost.

    Args:
        testbed: an organism, a language-model testbed, or a :class:`~elk_stress.training.protocols.Trainee`.
        probe: registered name, recipe, or what an organism knows (``oracle``, ``paper``).
        attack: registered name or object.
        mode: what the defender does.
        against: further probes that the attack trains against, for mode ``ensemble``.
        held_out: probes evaluated beside, never trained against.
        strengths: weights of the evasion loss; 0, the benign control, is added where missing.
        steps: of the attack; its own default.
        checkpoints: how often weights are measured (and, in mode ``refit``, the probe refitted).
        epsilon: nats; ignored for a trainee, which has its own.
        draws: noise draws of q per measurement.
        bits: the threat's B, from :func:`~elk_stress.training.weight_bits.measure_weight_bits`, to compare with.
        audit_points: places of the pressure curve that are audited.
        seed: all randomness.
        out: folder for checkpoints; a killed run resumes there to the same numbers.
        progress: a ``rich.progress.Progress``.

    Returns:
        A :class:`~elk_stress.training.result.PressureResult`.

    Raises:
        TypeError: no testbed, probe or attack.
        ValueError: an unknown mode, a setting outside what it may be (:mod:`elk_stress.core.settings`), or an attack
            that does not apply to this testbed; says why; scores that are random or depend on the batch
            (:mod:`elk_stress.probing.rowwise`).
    """
    started = time.monotonic()
    if mode not in MODES:
        raise ValueError(f"no defender mode is called {mode!r}; known modes: {', '.join(MODES)}")
    check_options(
        seed=seed,
        epsilon=epsilon,
        strengths=strengths,
        steps=steps,
        checkpoints=checkpoints,
        draws=draws,
        audit_points=audit_points,
    )
    out = None if out is None else as_path("out", out)
    against, held_out = listed("against", against, (str,)), listed("held_out", held_out, (str,))
    if (mode == "ensemble") != bool(against):
        raise ValueError("mode 'ensemble', and only it, takes further probes to train against (against=)")
    recipe = training_attack(attack)
    trainee = as_trainee(testbed, recipe, (probe, *against), epsilon=epsilon, seed=seed)
    if recipe.subject != trainee.subject:
        raise ValueError(
            f"attack {recipe.name!r} trains {_KINDS[recipe.subject]}s and {trainee.name!r} is no "
            f"{_KINDS[recipe.subject]}; use {'lora' if trainee.subject == 'language_model' else 'finetune'}"
        )
    chosen = sorted({0.0, *(float(x) for x in (DEFAULT_STRENGTHS if strengths is None else strengths))})
    cells = np.asarray(chosen, dtype=np.float32)
    schedule = _schedule(setting("steps", recipe.steps if steps is None else steps), checkpoints)

    defence = defence_of(trainee, probe, against, held_out, seed)
    run = _Run(trainee, recipe, mode, defence, cells, schedule, draws, seed)
    run.train(Checkpoints(out, run.settings()), progress)
    return account(run, bits=bits, audit_points=audit_points, started=started, versions=versions())


def check_options(**given: Any) -> None:
    """Refuse numbers of :func:`stress_training` that are none; others pass.

    Raises:
        ValueError: says which, what it may be, and what came.
    """
    for name in ("seed", "epsilon", "checkpoints", "draws", "audit_points"):
        if name in given:
            setting(name, given[name])
    setting("steps", given.get("steps"), optional=True)
    if given.get("strengths") is not None:
        strengths = settings("strengths", given["strengths"])
        if not any(strengths):
            raise ValueError(f"strengths are non-negative and at least one is positive, got {list(strengths)}")


def training_attack(attack: str | TrainingAttack) -> TrainingAttack:
    """The attack by name or as given.

    Raises:
        ValueError: it moves activations, not weights.
    """
    recipe = registry.load("attacks", attack) if isinstance(attack, str) else attack
    if not isinstance(recipe, TrainingAttack):
        raise ValueError(
            f"attack {getattr(recipe, 'name', attack)!r} moves activations, not weights; use elk_stress.stress or "
            "`elk-stress run` for it"
        )
    return recipe


def as_trainee(testbed: Any, attack: TrainingAttack, probes: Sequence[Any], *, epsilon: float, seed: int) -> Trainee:
    """The testbed as something whose weights can be moved, with the items that these probes are fitted on."""
    from elk_stress.testbeds.organism import Organism

    if isinstance(testbed, Organism):
        return OrganismTrainee(testbed, epsilon=epsilon, seed=seed)
    if isinstance(testbed, Trainee):
        return testbed
    from elk_stress.testbeds.statements import Statements

    if isinstance(testbed, Statements):
        from elk_stress.training.language_model_trainee import LoraTrainee

        return LoraTrainee.of(testbed, epsilon=epsilon, seed=seed, negations=any(map(_needs_pairs, probes)))
    raise ValueError(
        f"testbed {getattr(testbed, 'name', testbed)!r} has no weights to train; use an organism "
        "(superposition, compute_in_superposition, vault, quirky), statements, or a Trainee"
    )


def _needs_pairs(probe: Any) -> bool:
    recipe = registry.load("probes", probe) if isinstance(probe, str) and probe in registry.names("probes") else probe
    return bool(getattr(getattr(recipe, "traits", None), "needs_pairs", False))


@dataclass(frozen=True)
class Defence:
    """The probes of a run.

    Attributes:
        name: of the attacked probe.
        recipe: what is refitted, ``None`` if it cannot be (a known direction).
        panel: name -> one fitted probe per model; the attacked first.
        trained_against: names in the panel.
        clean: split -> ``(models, n, dim)`` activations of the original weights.
    """

    name: str
    recipe: str | Probe | None
    panel: Mapping[str, Sequence[FittedProbe]]
    trained_against: tuple[str, ...]
    clean: Mapping[str, np.ndarray]


def defence_of(trainee: Trainee, probe: Any, against: Sequence[str], held_out: Sequence[str], seed: int) -> Defence:
    """Fit or look up the probes of a run on the original weights' activations."""
    original = trainee.original[None]
    clean = {name: trainee.activations(original, name)[0] for name in ("train", "calibration", "test")}

    # once: an oracle is itself fitted, on many examples, for every model
    known = _known(trainee)

    def fitted(asked: Any) -> tuple[str, Any, list[FittedProbe]]:
        if isinstance(asked, str) and asked in known:
            return asked, None, list(known[asked])
        if isinstance(asked, Mapping):
            name, recipe = next(iter(asked.values())).name, None
            probes = [asked[m] for m in range(trainee.n_models)]
        else:
            recipe = registry.load("probes", asked) if isinstance(asked, str) else asked
            name, probes = recipe.name, fit_cells(trainee, recipe, clean["train"][None], seed)[0]
        for own, rows in zip(probes, clean["test"], strict=True):
            check_scores(own, rows[:_TRIED])
        return name, recipe, probes

    name, recipe, own = fitted(probe)
    panel: dict[str, Sequence[FittedProbe]] = {name: own}
    trained = [name]
    for other in against:
        if other not in panel:
            panel[other] = fitted(other)[2]
            trained.append(other)
    for other in held_out:
        if other not in panel:
            panel[other] = fitted(other)[2]
    return Defence(name, recipe, panel, tuple(trained), clean)


def _known(trainee: Trainee) -> Mapping[str, Sequence[FittedProbe]]:
    """Probes that an organism knows, per model."""
    organism = getattr(trainee, "organism", None)
    if organism is None:
        return {}
    each = [organism.known_probes_of(m) for m in range(trainee.n_models)]
    return {name: [probes[name] for probes in each] for name in each[0]}


def _schedule(steps: int, checkpoints: int) -> np.ndarray:
    """Steps at which weights are measured, from 0 on: denser at the beginning, where most is lost."""
    shares = (np.arange(checkpoints + 1) / checkpoints) ** 1.5
    return np.unique(np.round(shares * steps).astype(int))


class _Run:
    """One run's cells: trains them checkpoint by checkpoint and holds what was measured."""

    def __init__(
        self,
        trainee: Trainee,
        attack: TrainingAttack,
        mode: Mode,
        defence: Defence,
        strengths: np.ndarray,
        schedule: np.ndarray,
        draws: int,
        seed: int,
    ) -> None:
        self.trainee, self.attack, self.mode, self.defence = trainee, attack, mode, defence
        self.strengths, self.schedule, self.draws, self.seed = strengths, schedule, draws, seed
        self.clean = clean_auroc(trainee, defence.panel[defence.name], defence.clean["test"])
        self.tau = half_advantage(self.clean)
        self.weights: list[np.ndarray] = []
        self.log: list[Mapping[str, np.ndarray]] = []
        self.refits: list[np.ndarray] = []
        self.exact: np.ndarray | None = None
        self.measured: Measured
        self.state: Any = None

    def settings(self) -> dict[str, Any]:
        """Everything that determines the numbers."""
        recipe = dict(vars(self.attack))
        return {
            "testbed": self.trainee.name,
            "weights": digest(self.trainee.original),
            "items": digest(self.defence.clean["train"]),
            "probe": self.defence.name,
            "panel": list(self.defence.panel),
            "against": list(self.defence.trained_against),
            "attack": {"name": self.attack.name, **recipe},
            "mode": self.mode,
            "strengths": [float(x) for x in self.strengths],
            "epsilon": self.trainee.epsilon,
            "prior": digest(self.trainee.length(self.trainee.original[None] + 1)),
            "schedule": self.schedule.tolist(),
            "seed": self.seed,
        }

    def train(self, kept: Checkpoints, progress: Any) -> None:
        """Advance to the end of the schedule, resuming where a killed run stopped; then measure every checkpoint."""
        trainee, attack = self.trainee, self.attack
        done, state = kept.resume()
        if state is None:
            state = attack.start(trainee, self.strengths, self.seed)
            nothing = np.full((len(self.strengths), trainee.n_models), np.nan, dtype=np.float32)
            kept.add(
                {
                    "weights": attack.weights(trainee, state),
                    "task": nothing,
                    "evasion": nothing,
                    **self._exactly(state),
                },
                state,
            )
            done = kept.finished
        task = None
        if progress is not None:
            what = f"{attack.name} against {self.defence.name} ({self.mode})"
            task = progress.add_task(what, total=len(self.schedule) - 1, completed=len(done) - 1)
        while len(done) < len(self.schedule):
            i = len(done)
            targets = self._targets(done[-1]["weights"])
            state, log = attack.advance(trainee, state, targets, int(self.schedule[i] - self.schedule[i - 1]))
            means = {name: np.asarray(rows).mean(axis=0) for name, rows in log.items()}
            first = {"evasion_first": np.asarray(log["evasion"])[0]}
            kept.add({"weights": attack.weights(trainee, state), **means, **first, **self._exactly(state)}, state)
            done = kept.finished
            if task is not None:
                progress.advance(task)
        self.state = state
        self.weights = [np.asarray(c["weights"]) for c in done]
        self.log = [{k: v for k, v in c.items() if k not in ("weights", "spent")} for c in done]
        self.exact = done[-1].get("spent")
        rows = []
        for checkpoint, weights in zip(done, self.weights, strict=True):
            exact = checkpoint.get("spent")
            rows.append(
                measure(
                    trainee,
                    weights,
                    self.defence.panel,
                    self.defence.name,
                    self.tau,
                    draws=0 if exact is not None else self.draws,
                    spent=exact,
                )
            )
        self.measured = stack_measured(rows)
        if self.mode == "refit":
            self.refits = [self._refit_auroc(weights) for weights in self.weights]

    def _exactly(self, state: Any) -> dict[str, np.ndarray]:
        spent = self.attack.spent(self.trainee, state)
        return {} if spent is None else {"spent": np.asarray(spent, dtype=np.float64)}

    def _targets(self, weights: np.ndarray) -> Targets:
        """What the attack trains against from these weights on."""
        count = len(self.strengths)
        labels = self.trainee.splits["train"].labels
        if self.mode == "refit" and self.defence.recipe is not None:
            activations = self.trainee.activations(weights, "train")
            own = self.defence.panel[self.defence.name]
            return targets_from(
                [fit_cells(self.trainee, self.defence.recipe, activations, self.seed, own)],
                np.nan_to_num(activations, nan=0.0, posinf=0.0, neginf=0.0),
                labels,
            )
        clean = self.defence.clean["train"]
        probes = [[list(self.defence.panel[name])] * count for name in self.defence.trained_against]
        return targets_from(probes, np.broadcast_to(clean, (count, *clean.shape)), labels)

    def _refit_auroc(self, weights: np.ndarray) -> np.ndarray:
        """AUROC on attacked test items of the probe that the defender refits there, per cell."""
        if self.defence.recipe is None:
            raise ValueError(f"probe {self.defence.name!r} cannot be refitted; use mode 'frozen'")
        own = self.defence.panel[self.defence.name]
        probes = fit_cells(
            self.trainee, self.defence.recipe, self.trainee.activations(weights, "train"), self.seed, own
        )
        test = self.trainee.activations(weights, "test")
        labels = self.trainee.splits["test"].labels
        scores = np.stack([scores_of(row, test[k : k + 1])[0] for k, row in enumerate(probes)])
        return auroc_of(scores, labels)

    def engagement(self) -> tuple[bool, Flag | None]:
        """Whether the evasion loss of the strongest pressure fell, beyond what the benign control's did."""
        begin = over_models(np.asarray(self.log[1]["evasion_first"], dtype=float), axis=1)[0]
        end = over_models(np.asarray(self.log[-1]["evasion"], dtype=float), axis=1)[0]
        with np.errstate(invalid="ignore"):
            falls = (1 - end / begin)[self.strengths > 0]
        best = float(falls[np.isfinite(falls)].max(initial=-np.inf))
        # a choice among candidates engages by choosing, however little there is to gain
        needed = 0.1 if self.exact is None else 0.0
        if best > needed:
            return True, None
        seen = f"evasion fell by {best:.0%} at best" if np.isfinite(best) else "no evasion loss was finite"
        return False, flag("did_not_engage", seen)
