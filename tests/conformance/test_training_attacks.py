"""Every attack that moves weights passes its public suite; and the suite catches what is wrong on purpose."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import tiny_models

from elk_stress.attacks.finetune import Finetune
from elk_stress.core import registry
from elk_stress.models.language_model import LanguageModel
from elk_stress.testbeds.compute_in_superposition import ComputeInSuperposition
from elk_stress.testbeds.protocol import Items
from elk_stress.testbeds.superposition import Superposition
from elk_stress.testing import check_training_attack, checks_for_training_attack
from elk_stress.thoughts.attacks.protocol import Attack
from elk_stress.training.language_model_trainee import LoraTrainee
from elk_stress.training.organism_trainee import OrganismTrainee
from elk_stress.training.protocols import Log, State, Subject, Targets, Trainee, TrainingAttack

ALL = {name: registry.load("attacks", name) for name in registry.names("attacks")}
MOVING_WEIGHTS = [name for name, attack in ALL.items() if attack.scopes == ("weights",)]
CHECKS = (
    "declarations",
    "starts_at_the_original",
    "benign_ignores_the_probe",
    "deterministic",
    "resumes",
    "pure",
    "engages",
    "log_shapes",
    "spent",
)
# small enough for a test, and as fast as it takes to engage; what is not here runs with its defaults
SMALL: dict[str, tuple[dict[str, Any], ...]] = {
    "finetune": ({"steps": 60, "learning_rate": 1e-2, "batch_size": 64},),
    "reinforce": ({"steps": 60, "learning_rate": 1e-2, "batch_size": 64, "n_pairs": 8},),
    "select_best": (
        {"steps": 64, "n_items": 128},
        {"steps": 16, "n_items": 128, "source": "finetunes", "finetune_steps": 10, "learning_rate": 1e-2},
    ),
    "chameleon": ({"steps": 40, "learning_rate": 3e-3, "batch_size": 64, "n_items": 2048, "keep": 1.0},),
    "lora": ({"steps": 24, "learning_rate": 1e-2, "batch_size": 4},),
}
# an organism for those that need more than the smallest has
ORGANISM = {"chameleon": "compute_in_superposition"}
CASES = {
    "-".join([name, *(v for v in options.values() if isinstance(v, str))]): (name, options)
    for name in MOVING_WEIGHTS
    for options in SMALL.get(name, ({},))
}


@functools.cache
def _organism(name: str) -> OrganismTrainee:
    items = {"n_train": 128, "n_calibration": 64, "n_test": 64, "n_contexts": 2, "n_models": 2, "batch_size": 128}
    if name == "superposition":
        return OrganismTrainee(Superposition(n_features=16, width=6, training_steps=600, **items), n_draws=9)
    return OrganismTrainee(ComputeInSuperposition(training_steps=1200, **items), n_draws=9)


@functools.cache
def _language_model() -> LoraTrainee:
    def items(split: str, places: tuple[str, ...]) -> Items:
        said = list(itertools.product(("cat", "dog"), ("red", "blue", "green"), ("one", "two"), places))
        names = tuple(f"{split}{i}" for i in range(len(said)))
        texts = tuple(f"the {animal} is {colour} and {number} in {place}." for animal, colour, number, place in said)
        return Items(names, np.array([int(row[0] == "dog") for row in said]), np.array(names), texts=texts)

    model = LanguageModel.from_modules(tiny_models.causal(), tiny_models.tokenizer(), fingerprint="tiny", causal=True)
    words = ("rain", "sun", "tea", "city")
    texts = [f"the {a} and the {b} of my country" for a, b in itertools.product(words, words)]
    splits = {"train": items("train", ("paris", "osaka")), "test": items("test", ("lima",))}
    return LoraTrainee(model, splits, "layers.2", ordinary=texts[::2], behaviour=texts[1::2], rank=2, scale=0.05)


def _trainee(attack: TrainingAttack) -> Trainee:
    if attack.subject == "language_model":
        return _language_model()
    return _organism(ORGANISM.get(attack.name, "superposition"))


@functools.cache
def _checks(case: str) -> dict[str, Callable[[], None]]:
    name, options = CASES[case]
    attack = registry.load("attacks", name, **options)
    return checks_for_training_attack(attack, _trainee(attack))


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("case", CASES)
def test_registered_attack(case: str, check: str) -> None:
    _checks(case)[check]()


@pytest.mark.parametrize("case", [case for case, (name, _) in CASES.items() if ALL[name].subject == "organism"])
def test_registered_attack_does_not_recompile(case: str) -> None:
    _checks(case)["does_not_recompile"]()


@pytest.mark.parametrize("case", CASES)
def test_no_check_is_left_out(case: str) -> None:
    compiled = ("does_not_recompile",) if ALL[CASES[case][0]].subject == "organism" else ()
    assert tuple(_checks(case)) == CHECKS + compiled


def test_no_attack_is_left_out() -> None:
    """Each is covered by exactly one suite: this one, or that of attacks on activations."""
    covered = {name for name, _ in CASES.values()}
    for name, attack in ALL.items():
        assert attack.name == name
        assert isinstance(attack, TrainingAttack) == (name in covered)
        assert isinstance(attack, Attack) != (name in covered)
    assert set(SMALL) <= covered
    assert {"finetune", "lora", "reinforce", "chameleon", "select_best"} <= covered


# -- attacks that are wrong on purpose ---------------------------------------------------------------------------------

_INNER = Finetune(**SMALL["finetune"][0])


@dataclass(frozen=True)
class Broken:
    """Fine-tuning with one fault planted."""

    fault: str
    steps: int = _INNER.steps

    name: ClassVar[str] = "broken"
    access: ClassVar[Literal["none", "score", "weights"]] = "weights"
    scopes: ClassVar[tuple[Literal["weights"], ...]] = ("weights",)
    subject: ClassVar[Subject] = "organism"

    def start(self, trainee: Any, strengths: np.ndarray, seed: int) -> State:
        if self.fault == "peeks at strength 0":
            strengths = np.maximum(strengths, np.float32(1e-3))
        state = _INNER.start(trainee, strengths, 0 if self.fault == "one seed for all" else seed)
        if self.fault == "starts elsewhere":
            state["weights"] += trainee.sigma * 1e-3
        if self.fault == "a state that no file can hold":
            state["trainee"] = np.array([trainee.name], dtype=object)
        return state

    def advance(self, trainee: Any, state: State, targets: Targets, steps: int) -> tuple[State, Log]:
        if self.fault == "forgets its moments":
            state = {**state, "first": np.zeros_like(state["first"])}
        if self.fault == "the same batches whenever resumed":
            state = {**state, "step": np.zeros((), dtype=np.int32)}
        if self.fault == "compiles anew":
            trainee = OrganismTrainee(trainee.organism)
            trainee.__dict__["calibration"] = _organism("superposition").calibration
        moved, log = _INNER.advance(trainee, dict(state), targets, steps)
        if self.fault == "never moves":
            moved = {**moved, "weights": state["weights"]}
        if self.fault == "writes into the state it was given":
            state["weights"][...] = moved["weights"]
        if self.fault == "writes into the targets":
            targets.arrays[0]["gap"][...] = 1.0
        if self.fault == "unseeded":
            moved = {**moved, "weights": moved["weights"] + np.random.default_rng().standard_normal(1, np.float32)}
        if self.fault == "cells first in the log":
            log = {name: np.moveaxis(rows, 0, -1) for name, rows in log.items()}
        if self.fault == "its own log only":
            log = {"evasion": log["evasion"]}
        return moved, log

    def weights(self, trainee: Any, state: State) -> np.ndarray:
        return _INNER.weights(trainee, state)

    def spent(self, trainee: Any, state: State) -> np.ndarray | None:
        if self.fault == "claims that benign training chose":
            return np.full(state["weights"].shape[:2], np.log2(max(int(state["step"]), 1)))
        return None


FAULTS = {
    "starts elsewhere": ("starts_at_the_original", "not at the original"),
    "peeks at strength 0": ("benign_ignores_the_probe", "it looked"),
    "unseeded": ("deterministic", "two runs from one seed"),
    "one seed for all": ("deterministic", "the seed changes nothing"),
    "forgets its moments": ("resumes", "2 . 2 and 4 steps differ in '(weights|first|second)'"),
    "the same batches whenever resumed": ("resumes", "2 . 2 and 4 steps differ in '(weights|first|second)'"),
    "a state that no file can hold": ("resumes", "no file can hold 'trainee'"),
    "writes into the state it was given": ("pure", "before and after it was advanced differ in 'weights'"),
    "writes into the targets": ("pure", "the targets before and after differ in 'gap'"),
    "never moves": ("engages", "never moved"),
    "cells first in the log": ("log_shapes", r"4 steps log '(task|evasion)' of \(2, 2, 4\)"),
    "its own log only": ("log_shapes", "lacks 'task'"),
    "claims that benign training chose": ("spent", "the benign control chose nothing"),
    "compiles anew": ("does_not_recompile", "compiled anew"),
}


@pytest.mark.parametrize(("fault", "check", "says"), [(f, *row) for f, row in FAULTS.items()], ids=FAULTS)
def test_suite_catches(fault: str, check: str, says: str) -> None:
    with pytest.raises((AssertionError, ValueError, TypeError, KeyError), match=says):
        checks_for_training_attack(Broken(fault), _organism("superposition"))[check]()


def test_suite_passes_the_same_attack_without_a_fault() -> None:
    trainee = _organism("superposition")
    checks = checks_for_training_attack(Broken("none"), trainee)
    assert check_training_attack(Broken("none"), trainee) == list(checks)


def test_failure_names_the_attack_and_the_check() -> None:
    with pytest.raises(AssertionError, match=r"attack 'broken' fails the check 'starts_at_the_original': before the"):
        check_training_attack(Broken("starts elsewhere"), _organism("superposition"))


def test_pressure_that_is_too_weak_does_not_pass_for_engaged() -> None:
    with pytest.raises(AssertionError, match="under strength 1e-06 evasion went from"):
        checks_for_training_attack(Broken("none"), _organism("superposition"), strength=1e-6)["engages"]()


def test_hyperparameters_that_can_change_are_refused() -> None:
    @dataclass
    class Thawed:
        """Would give other numbers when resumed."""

        steps: int = 1
        name: ClassVar[str] = "thawed"
        subject: ClassVar[Subject] = "organism"

    with pytest.raises(AssertionError, match="must be frozen"):
        checks_for_training_attack(Thawed(), _organism("superposition"))["declarations"]()  # type: ignore[arg-type]
