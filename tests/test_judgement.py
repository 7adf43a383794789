"""The engine judges; an attack's word counts for nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

import numpy as np
import pytest
from stub_attacks import Stub

from elk_stress.core import registry
from elk_stress.testbeds.linear import Linear
from elk_stress.thoughts.attacks.proposal import Edit
from elk_stress.thoughts.attacks.protocol import Oracle, Proposal
from elk_stress.thoughts.attacks.runner import run_attack
from elk_stress.thoughts.attacks.target import AttackTarget, attack_target
from elk_stress.thoughts.baseline import baseline_of
from elk_stress.thoughts.prepared import prepare
from elk_stress.threats.threat import Threat


@cache
def _field(probe: str, scope: Any = "item", epsilon: float | None = None) -> AttackTarget:
    testbed = Linear(dim=8, n_items=160, n_contexts=8)
    prepared = replace(prepare(testbed), replicates=100)
    threat = Threat(scope=scope, kept=epsilon is not None, epsilon=epsilon)
    return attack_target(prepared, baseline_of(prepared, testbed.known_probes()[probe], threat, 0.05), epsilon)


@dataclass(frozen=True)
class _Liar(Stub):
    """Proposes moves that its edit does not make, and says that nothing shifted."""

    name: ClassVar[str] = "liar"

    def propose(self, oracle: Oracle, *, seed: int) -> Proposal:
        model_access = oracle.model_access
        edit = Edit(model_access.activations, shift=lambda items: np.zeros(len(items)), epsilon=1e-9)
        return Proposal(np.full((oracle.n_problems, 1, oracle.dim), 50.0), edit=edit)


@dataclass(frozen=True)
class _Far(Stub):
    """Goes far along the planted direction, which behaviour does not look at."""

    name: ClassVar[str] = "far"
    needs: ClassVar[Any] = ()

    def propose(self, oracle: Oracle, *, seed: int) -> Proposal:
        baseline = _field("paper").baseline
        u = baseline.prior.inverse(-12 * baseline.probe.parameters["weight"].astype(float))
        return Proposal(np.tile(u, (oracle.n_problems, 1, 1)))


def test_moves_must_be_what_the_edit_does() -> None:
    with pytest.raises(ValueError, match=r"not what its edit does .* oracle\.model_access\.propose"):
        run_attack(_Liar(), _field("oracle", "item", 0.1), budget=100, seed=0)


def test_no_audit_where_the_edit_writes_the_truth() -> None:
    row = run_attack(registry.load("attacks", "policy", steps=10), _field("paper"), budget=100, seed=0)
    assert row.audit is None
    assert row.auroc is not None
    assert run_attack(registry.load("attacks", "erase"), _field("paper"), budget=100, seed=0).audit is not None


def test_what_was_not_judged_broken_leaves_nothing_to_audit() -> None:
    strict = _field("oracle", "universal", 1e-6)
    row = run_attack(registry.load("attacks", "steer"), strict, budget=100, seed=0)
    assert (row.status, row.success, row.auroc, row.audit) == ("ok", 0.0, None, None)
    free = run_attack(registry.load("attacks", "steer"), _field("oracle", "universal"), budget=100, seed=0)
    assert free.success == 1.0
    assert free.audit is not None


def test_the_control_must_keep_behaviour_too() -> None:
    attack = _Far()
    free = run_attack(attack, _field("paper"), budget=2000, seed=0)
    kept = run_attack(attack, _field("paper", "item", 0.02), budget=2000, seed=0)
    assert free.benign_success is not None
    assert kept.benign_success is not None
    assert kept.benign_success < 0.5 * free.benign_success
    assert kept.benign_success <= 0.05


def test_kept_without_a_measured_epsilon_is_not_judged() -> None:
    target = replace(_field("paper", "item", 0.02), epsilon=None)
    row = run_attack(registry.load("attacks", "gradient"), target, budget=100, seed=0)
    assert row.status == "does not apply: what counts as kept was not measured"
