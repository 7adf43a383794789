"""Every flag of the catalogue is raised on purpose, by a run or an estimate that must raise it; and its twin is quiet.

A case returns the flags of a real result. What goes wrong is planted here: a probe whose gradient is masked, an attack
that does not try, one that lies about its draws, data that leak, a testbed that calls its weak probe the strong one.
The table is held against the catalogue, so a new flag without a case fails.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
from known_answers import KNOWN

from elk_stress import estimate_bits, stress, stress_activations
from elk_stress.attacks.finetune import Finetune
from elk_stress.core import registry
from elk_stress.core.flags import CATALOGUE, Flag
from elk_stress.estimators import estimate_batch, load_method
from elk_stress.estimators.limit_state import from_function
from elk_stress.probing.probe import FittedProbe, Traits
from elk_stress.testbeds.arrays import Arrays
from elk_stress.testbeds.linear import Linear
from elk_stress.testbeds.protocol import ContextSet, Items, SplitName
from elk_stress.testbeds.superposition import Superposition
from elk_stress.thoughts.attacks.protocol import Access, Attack, Oracle, Proposal
from elk_stress.thoughts.prepared import Prepared, prepare
from elk_stress.thoughts.result import StressResult
from elk_stress.threats.threat import Threat
from elk_stress.training.loop import stress_training
from elk_stress.training.organism_trainee import OrganismTrainee

ROOT = Path(__file__).parent.parent

Case = Callable[[], Sequence[Flag]]

SMALL = {"dim": 12, "n_items": 200, "n_contexts": 10}
ITEM = Threat()


@cache
def prepared(kind: type[Linear] = Linear, n_items: int = 200) -> Prepared:
    return replace(prepare(kind(**{**SMALL, "n_items": n_items})), replicates=200)


def told(result: StressResult) -> tuple[Flag, ...]:
    """Every flag of a result: of the run, of its threats and of its attacks."""
    rows = result.threats.values()
    return result.flags + tuple(f for row in rows for f in (*row.flags, *(g for a in row.attacks for g in a.flags)))


def run(
    probe: Any,
    where: Callable[[], Prepared] = prepared,
    *,
    threat: Threat = ITEM,
    attacks: Sequence[str | Attack] = (),
    controls: bool = False,
) -> Case:
    """A whole stress test, run once however often it serves."""

    @cache
    def case() -> Sequence[Flag]:
        here = where()
        chosen = here.testbed.known_probes().get(probe, probe) if isinstance(probe, str) else probe
        options: dict[str, Any] = {"budget": 400, "n_particles": 250, "max_bits": 50.0 if controls else 100.0}
        return told(stress(here, chosen, threats=[threat], attacks=attacks, controls=controls, **options))

    return case


# -- attacks that are broken on purpose --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planted:
    """Proposes to stay, and asks nothing."""

    access: Access = "none"
    name: str = "planted"
    scopes: ClassVar[tuple[Literal["item"], ...]] = ("item",)
    needs: ClassVar[tuple[()]] = ()
    priors: ClassVar[tuple[()]] = ()

    def propose(self, oracle: Oracle, *, seed: int) -> Proposal:
        return Proposal(np.zeros((oracle.n_problems, 1, oracle.dim)))


@dataclass(frozen=True)
class Insider(Planted):
    """Knows of the trapdoor, which no gradient leads to."""

    access: Access = "none"
    name: str = "insider"

    def propose(self, oracle: Oracle, *, seed: int) -> Proposal:
        direction, edge = trapdoor()
        along = direction @ prepared().prior(ITEM).factor
        here = prepared().test_origins[prepared().positives] @ direction
        u = ((edge - here) * 1.01 / (along @ along))[:, None] * along
        return Proposal(u[:, None], centre=u)


# -- probes that are broken on purpose ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Masked:
    """Reads the difference of the class means through a staircase: right, and without a slope anywhere."""

    name: ClassVar[str] = "masked"
    traits: ClassVar[Traits] = Traits()

    def fit(
        self, activations: np.ndarray, labels: np.ndarray, *, pairs: np.ndarray | None = None, seed: int = 0
    ) -> FittedProbe:
        fitted = registry.load("probes", "mass_mean").fit(activations, labels)
        step = np.asarray(fitted.score(activations).std() / 20)
        return FittedProbe(self, {**fitted.parameters, "step": step})

    def score(self, xp: Any, parameters: Mapping[str, Any], activations: Any) -> Any:
        linear = xp.matmul(activations, parameters["weight"]) + parameters["bias"]
        return xp.round(linear / parameters["step"]) * parameters["step"]


@cache
def trapdoor() -> tuple[np.ndarray, float]:
    """A direction that the planted probe does not read, and how far along it lies what no test positive reaches."""
    prior, reads = prepared().prior(ITEM), prepared().testbed.known_probes()["oracle"].parameters["weight"]
    direction = np.linalg.svd(np.atleast_2d(reads))[2][1]
    spread = float(np.linalg.norm(direction @ prior.factor))
    return direction, float((prepared().test_origins[prepared().positives] @ direction).max()) + 3.5 * spread


@dataclass(frozen=True)
class Trapdoor:
    """Reads the truth, but falls silent beyond a threshold in another direction: a cliff without a slope."""

    name: ClassVar[str] = "trapdoor"
    traits: ClassVar[Traits] = Traits()

    def fit(
        self, activations: np.ndarray, labels: np.ndarray, *, pairs: np.ndarray | None = None, seed: int = 0
    ) -> FittedProbe:
        direction, edge = trapdoor()
        reads = prepared().testbed.known_probes()["oracle"].parameters["weight"]
        return FittedProbe(self, {"reads": reads, "direction": direction.astype(reads.dtype), "edge": np.float32(edge)})

    def score(self, xp: Any, parameters: Mapping[str, Any], activations: Any) -> Any:
        beyond = xp.matmul(activations, parameters["direction"]) > parameters["edge"]
        return xp.where(beyond, -100.0, xp.matmul(activations, parameters["reads"]))


@dataclass(frozen=True)
class Island:
    """The nearer to the origin, the more positive: an item's mean over contexts lies nearer than any one context."""

    name: ClassVar[str] = "island"
    traits: ClassVar[Traits] = Traits()

    def fit(
        self, activations: np.ndarray, labels: np.ndarray, *, pairs: np.ndarray | None = None, seed: int = 0
    ) -> FittedProbe:
        return FittedProbe(self, {"none": np.zeros(())})

    def score(self, xp: Any, parameters: Mapping[str, Any], activations: Any) -> Any:
        return -xp.sum(activations * activations, axis=-1)


@cache
def islands() -> Prepared:
    """Positives at the origin, negatives around it; contexts move both, in every direction."""
    rng = np.random.default_rng(np.random.SeedSequence(0))
    labels = np.arange(160) % 2
    items = rng.standard_normal((160, 6)) * np.where(labels == 1, 0.1, 1.0)[:, None]
    data = items[:, None] + rng.standard_normal((160, 12, 6))
    return replace(prepare(Arrays(data, labels)), replicates=200)


# -- testbeds that are broken on purpose -------------------------------------------------------------------------------


class Leaky(Linear):
    """A test item is about an entity of the training items."""

    @property
    def splits(self) -> Mapping[SplitName, Items]:  # type: ignore[override]
        true = super().splits
        groups = true["test"].groups.copy()
        groups[0] = true["train"].groups[0]
        return {**true, "test": replace(true["test"], groups=groups)}


class Wild(Linear):
    """Real contexts sway six times as much as those that the prior was fitted on."""

    def activations(self, split: SplitName, contexts: ContextSet = "prior") -> np.ndarray:
        found = super().activations(split, contexts)
        if contexts != "observed":
            return found
        mean = super().activations(split, "prior").mean(axis=1, keepdims=True)
        return np.asarray(mean + 6 * (found - mean), dtype=np.float32)


class Swapped(Linear):
    """Calls the probe that must break the one that must survive."""

    def known_probes(self) -> Mapping[str, FittedProbe]:
        known = super().known_probes()
        return {"oracle": known["paper"], "paper": known["oracle"]}


class ByPasses(Linear):
    """Its shift is told as a real model's is: a forward pass each."""

    shift_cost: ClassVar[Literal["exact", "model"]] = "model"


# -- the rest ----------------------------------------------------------------------------------------------------------


def by_arrays(n: int, contexts: int, gap: float = 3.0, dim: int = 6, largest: float = 1.0) -> Case:
    def case() -> Sequence[Flag]:
        rng = np.random.default_rng(np.random.SeedSequence(0))
        labels = np.arange(n) % 2
        items = rng.standard_normal((n, dim)) + gap * labels[:, None] * np.eye(dim)[0]
        data = items[:, None] + 0.3 * rng.standard_normal((n, contexts, dim))
        data[..., 1] *= largest
        return told(stress_activations("lda", data, labels, threats=[ITEM], attacks=(), controls=False))

    return case


def pointed(sign: float) -> Case:
    """A direction that points the right way or the wrong one."""

    def case() -> Sequence[Flag]:
        rng = np.random.default_rng(np.random.SeedSequence(0))
        labels = np.arange(400) % 2
        data = rng.standard_normal((400, 6)) + 1.5 * labels[:, None] * np.eye(6)[0]
        return told(stress_activations(sign * np.eye(6)[0], data, labels, attacks=(), controls=False))

    return case


@cache
def trainee() -> OrganismTrainee:
    organism = Superposition(
        n_models=1, n_features=12, width=5, n_train=96, n_calibration=48, n_test=64, n_contexts=2, training_steps=300,
        batch_size=96,
    )  # fmt: skip
    return OrganismTrainee(organism, epsilon=0.03, n_draws=5)


def trained(learning_rate: float) -> Case:
    attack = Finetune(learning_rate=learning_rate, batch_size=64)
    return lambda: (
        stress_training(
            trainee(), "lda", attack=attack, strengths=(1.0,), steps=6, checkpoints=1, draws=1, audit_points=1
        ).flags
    )


def weighed(at: float) -> Case:
    """Importance sampling of ``u1 >= 6`` from one centre."""
    state, centres = from_function(lambda u: 6.0 - u[:, 0], 2), np.array([[[at, 0.0]]])
    return lambda: load_method("importance")(n_particles=512)(state, seed=0, centres=centres)[0].flags


def split(name: str, starts: list[list[float]], n_particles: int) -> Case:
    """Splitting, told of failing points that its runs must reach."""
    state, method = from_function(KNOWN[name].function, KNOWN[name].dim), load_method("subset_simulation")
    return lambda: method(n_particles, n_runs=4)(state, seed=0, starts=np.array([starts]))[0].flags


def estimated(function: Callable[[np.ndarray], np.ndarray], dim: int, **options: Any) -> Case:
    return lambda: estimate_bits(function, dim, seed=0, **options).flags


def missed(name: str) -> Case:
    options = {"n_runs": 1, "n_particles": 512, "check_fraction": 1.0}
    return lambda: estimate_batch(from_function(KNOWN[name].function, KNOWN[name].dim), seed=0, **options)[0].flags


NEAR: dict[str, Any] = {"n_runs": 2, "n_particles": 512}
SOUND = run("logistic", attacks=["gradient", "natural_thoughts"])
WEAK = run("paper", attacks=["gradient", "natural_thoughts"])
ISLAND = run(Island(), islands, attacks=["natural_thoughts"])
MASKED = run(Masked(), attacks=["gradient", "black_box"])
LAZY = run("paper", attacks=[Planted("gradient"), "natural_thoughts"])

RAISED: dict[str, Case] = {
    "did_not_engage": LAZY,
    "bounds_violated": run(Trapdoor(), attacks=[Insider()]),
    "black_box_beats_white_box": MASKED,
    "weak_beats_strong": LAZY,
    "runs_disagree": split("RP110", [[4.0, 0.0], [0.0, 5.0]], 200),
    "low_effective_sample_size": weighed(12.0),
    "budget_exhausted": estimated(lambda u: 5.0 - u[:, 0], 6, max_evaluations=60),
    "fpr_unresolved": SOUND,
    "behaviour_broken": run("oracle", lambda: prepared(ByPasses), threat=Threat(kept=True)),
    "diverged": trained(1e30),
    "benign_broke_it": run("paper", attacks=["transfer"]),
    "brittle": ISLAND,
    "leak": run("logistic", lambda: prepared(Leaky)),
    "wide_interval": WEAK,
    "shared_contexts": by_arrays(600, 6),
    "no_contexts": by_arrays(600, 1),
    "massive_dimensions": by_arrays(300, 4, dim=20, largest=1000.0),
    "saturated": MASKED,
    "catches_nothing": run("rock"),
    "flipped": pointed(-1.0),
    "prediction_failed": run("mass_mean", lambda: prepared(Wild)),
    "control_failed": run("logistic", lambda: prepared(Swapped, 160), threat=Threat(kept=True), controls=True),
    "missed_mode": missed("RP110"),
    "origin_fails": estimated(lambda u: u[:, 0] - 1.0, 2, method="design_point"),
}
"""A flag -> a situation in which it must be raised."""

QUIET: dict[str, Case] = {
    "did_not_engage": WEAK,
    "bounds_violated": SOUND,
    "black_box_beats_white_box": run("mass_mean", attacks=["gradient", "black_box"]),
    "weak_beats_strong": WEAK,
    "runs_disagree": split("RP33", [[3.0, 3.0, 3.0]], 500),
    "low_effective_sample_size": weighed(6.0),
    "budget_exhausted": estimated(lambda u: 5.0 - u[:, 0], 6, **NEAR),
    "fpr_unresolved": run("logistic", lambda: prepared(n_items=480)),
    "behaviour_broken": run("paper", lambda: prepared(ByPasses), threat=Threat(kept=True)),
    "diverged": trained(1e-3),
    "benign_broke_it": WEAK,
    "brittle": WEAK,
    "leak": SOUND,
    "wide_interval": by_arrays(2000, 12, 6.0),
    "shared_contexts": by_arrays(600, 8),
    "no_contexts": by_arrays(600, 2),
    "massive_dimensions": by_arrays(300, 4, dim=20, largest=5.0),
    "saturated": SOUND,
    "catches_nothing": SOUND,
    "flipped": pointed(1.0),
    "prediction_failed": run("mass_mean"),
    "control_failed": run("logistic", lambda: prepared(n_items=160), threat=Threat(kept=True), controls=True),
    "missed_mode": missed("RP33"),
    "origin_fails": estimated(lambda u: u[:, 0] + 1.0, 2, method="design_point"),
}
"""The same flag -> a like situation in which it must not be."""


@pytest.mark.parametrize("name", sorted(CATALOGUE))
def test_it_is_raised_when_it_must_be(name: str) -> None:
    assert name in RAISED, f"no test raises {name!r}: add a situation in which it must be raised"
    (first, *_) = [f for f in RAISED[name]() if f.name == name] or [None]
    assert first is not None, f"{name!r} was not raised"
    assert first.detail or name == "catches_nothing", "it must say what was seen"


@pytest.mark.parametrize("name", sorted(QUIET))
def test_it_is_not_raised_where_it_need_not_be(name: str) -> None:
    assert [str(f) for f in QUIET[name]() if f.name == name] == []


def test_the_tables_know_the_catalogue_and_each_other() -> None:
    assert RAISED.keys() == QUIET.keys() == CATALOGUE.keys()


@pytest.mark.parametrize("name", ["oracle", "lda"])
@pytest.mark.parametrize("scope", ["item", "universal"])
def test_breaking_behaviour_is_told_where_the_shift_is_exact_too(scope: Any, name: str) -> None:
    flags = run(name, threat=Threat(scope=scope, kept=True))()
    assert "behaviour_broken" in [f.name for f in flags]
