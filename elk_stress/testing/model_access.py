"""Checks of attacks that know what the model knows of itself, on a testbed whose truth is known.

The stage is a small :class:`~elk_stress.testbeds.linear.Linear`: ``paper`` must break, and under kept behaviour
``oracle`` must hold against whoever moves activations alone.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from elk_stress.testbeds.linear import Linear
from elk_stress.testing.shared import no_hidden_state
from elk_stress.thoughts.attacks.model_access import ModelAccess
from elk_stress.thoughts.attacks.protocol import Attack, Oracle, Proposal
from elk_stress.thoughts.attacks.runner import run_attack
from elk_stress.thoughts.attacks.target import AttackTarget, attack_target
from elk_stress.thoughts.baseline import baseline_of
from elk_stress.thoughts.prepared import Prepared, prepare
from elk_stress.thoughts.result import AttackResult
from elk_stress.threats.threat import Threat

__all__ = ["checks_for_model_access"]

_BUDGET = 400


def checks_for_model_access(attack: Attack, well_formed: Any, *, seed: int = 0) -> dict[str, Any]:
    """The checks of an attack with ``needs = ("model_access", ...)``, by name."""
    if "model" in attack.needs:
        # what it writes in is a language model's context, which no testbed of known truth has
        return {}

    def propose(target: AttackTarget, lie: bool = False) -> tuple[Proposal, Oracle, ModelAccess]:
        model_access = target.model_access(attack.access, _BUDGET)
        if lie:
            told = model_access.truth
            # of what it learns on, the truth; of everything else, the opposite
            model_access.truth = lambda split: told(split) if split == "train" else 1 - told(split)  # type: ignore[method-assign]
        oracle = Oracle(target.searched, attack.access, _BUDGET, target.pool, model_access)
        return attack.propose(oracle, seed=seed), oracle, model_access

    def proposals() -> None:
        for scope in attack.scopes:
            target = _field("paper", scope, False)
            well_formed(propose(target)[0], target.n_problems, target.failed.dim)

    def deterministic() -> None:
        with no_hidden_state(attack):
            first, second = (propose(_field("paper", attack.scopes[0], False))[0].moves for _ in range(2))
        assert np.array_equal(first, second), "two runs from one seed propose different moves"

    def access() -> None:
        for scope in attack.scopes:
            _, oracle, model_access = propose(_field("paper", scope, False))
            asked = int(oracle.queries.max()) + model_access.queries
            slopes = int(oracle.gradients.max()) + model_access.gradients
            if attack.access == "none":
                assert asked == slopes == 0, f"it declares no access and asked {asked + slopes} questions"
            if attack.access in ("label", "score"):
                assert asked > 0, f"it declares {attack.access} access and asked nothing; declare none"
                assert slopes == 0, "it declares no gradients and took some"
            if attack.access == "gradient":
                assert slopes > 0, "it declares gradients and took none; declare less"

    def says_where_it_writes_the_truth() -> None:
        honest, lied = (propose(_field("paper", attack.scopes[0], False), lie)[0].edit for lie in (False, True))
        if honest is None or lied is None or honest.uses_truth:
            return
        assert np.array_equal(honest.moved("test"), lied.moved("test")), (
            "its edit depends on the truth of items that it does not learn on, so it writes the truth into the "
            "activations and no audit can tell what was left; declare Edit(..., uses_truth=True)"
        )

    def breaks_what_must_break() -> None:
        for scope in attack.scopes:
            row = _run(attack, _field("paper", scope, False), seed)
            gone = row.auroc is not None and row.auroc <= 0.6
            assert row.success >= 0.5 or gone, (
                f"the planted incidental probe survived in {scope} scope: success {row.success:.0%}, AUROC {row.auroc}"
            )

    def keeps_to_what_it_may_move() -> None:
        for scope in attack.scopes:
            row = _run(attack, _field("oracle", scope, True), seed)
            assert row.success < 0.5, f"the oracle broke with behaviour kept in {scope} scope: {row.success:.0%}"

    checks = {
        "proposals": proposals,
        "deterministic": deterministic,
        "access": access,
        "says_where_it_writes_the_truth": says_where_it_writes_the_truth,
        "breaks_what_must_break": breaks_what_must_break,
    }
    if attack.access != "weights":
        checks["keeps_to_what_it_may_move"] = keeps_to_what_it_may_move
    return checks


def _run(attack: Attack, target: AttackTarget, seed: int) -> AttackResult:
    row = run_attack(attack, target, budget=_BUDGET, seed=seed)
    assert row.status == "ok", f"it should apply and says: {row.status}"
    return row


@cache
def _scene() -> Prepared:
    return replace(prepare(Linear(dim=8, n_items=160, n_contexts=8)), replicates=100)


@cache
def _field(probe: str, scope: Any, kept: bool) -> AttackTarget:
    prepared = _scene()
    threat = Threat(scope=scope, kept=kept, epsilon=0.02 if kept else None)
    baseline = baseline_of(prepared, prepared.testbed.known_probes()[probe], threat, 0.05)
    return attack_target(prepared, baseline, threat.epsilon)
