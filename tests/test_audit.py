"""The audit where it is known what is left: a truth in a variance is hidden from linear probes, and not gone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar

import numpy as np
import pytest

from elk_stress.core import registry
from elk_stress.probing.probe import FittedProbe, Traits
from elk_stress.testbeds.arrays import Arrays
from elk_stress.testbeds.protocol import SplitName
from elk_stress.thoughts import audit as module
from elk_stress.thoughts.attacks.proposal import Edit
from elk_stress.thoughts.attacks.runner import run_attack
from elk_stress.thoughts.attacks.target import attack_target
from elk_stress.thoughts.audit import CANDIDATES, audit, audit_edit
from elk_stress.thoughts.baseline import baseline_of
from elk_stress.thoughts.prepared import Prepared, fit_probe, prepare
from elk_stress.thoughts.result import AttackResult, Audit
from elk_stress.threats.threat import Threat

LINEAR = tuple(name for name in CANDIDATES if name != "mlp")


@cache
def prepared(truth: str) -> Prepared:
    """The truth in a class mean, which linear probes read, and for ``radius`` and ``signs`` in two other features too.

    ``radius``: positives lie far out in them; ``signs``: positives have the same sign in both. Neither leaves a
    difference of the class means there.
    """
    rng = np.random.default_rng(np.random.SeedSequence(0))
    n, contexts, dim = 1200, 4, 8
    labels = rng.integers(0, 2, n)
    items = rng.standard_normal((n, dim))
    items[:, 0] += 2.5 * labels
    if truth == "radius":
        items[:, 1:3] *= np.where(labels == 1, 3.0, 0.5)[:, None]
    if truth == "signs":
        items[:, 1:3] = 2.0 * np.sign(items[:, 1:3]) + 0.3 * items[:, 1:3]
        items[:, 2] = np.where(labels == 1, 1.0, -1.0) * np.sign(items[:, 1]) * np.abs(items[:, 2])
    data = items[:, None, :] + 0.3 * rng.standard_normal((n, contexts, dim))
    return replace(prepare(Arrays(data, labels)), replicates=200)


def erased(truth: str, probe: str = "logistic") -> AttackResult:
    here = prepared(truth)
    target = attack_target(here, baseline_of(here, fit_probe(here, probe), Threat(), 0.05), None)
    return run_attack(registry.load("attacks", "erase"), target, budget=100, seed=0)


def gains(result: Audit) -> dict[str, float]:
    return {"clean": result.clean.gain} | {stage.stage: stage.gain for stage in result.stages}


@pytest.mark.parametrize("truth", ["radius", "signs"])
def test_what_erasing_leaves_in_a_variance_is_hidden_and_not_gone(truth: str) -> None:
    row = erased(truth)
    assert row.auroc is not None
    assert row.auroc < 0.6
    assert row.audit is not None
    assert (row.audit.verdict, row.audit.strongest) == ("hidden", "mlp")
    found = gains(row.audit)
    # to linear probes nothing is left
    assert found["clean"] > 0.3
    assert max(found["recalibrated"], found["refitted"]) < 0.05
    assert found["strongest"] > found["clean"] / 2


def test_without_a_reader_that_is_not_linear_it_would_be_called_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CANDIDATES", LINEAR)
    row = erased("radius")
    assert row.audit is not None
    assert row.audit.verdict == "gone"
    assert row.audit.strongest in LINEAR


def test_what_is_in_the_class_means_alone_is_gone_once_erased() -> None:
    row = erased("means")
    assert row.audit is not None
    assert row.audit.verdict == "gone"
    assert gains(row.audit)["strongest"] < 0.05


def test_moving_every_item_along_the_probe_hides_the_truth_from_linear_probes() -> None:
    here = prepared("radius")
    result = audit(here, fit_probe(here, "logistic"))
    assert (result.verdict, result.strongest) == ("hidden", "mlp")
    assert audit(prepared("means"), fit_probe(prepared("means"), "logistic")).verdict in ("gone", "undecided")


def test_a_probe_that_reads_the_variance_finds_it_again_itself() -> None:
    row = erased("radius", "mlp")
    assert row.audit is not None
    assert row.audit.verdict in ("still works", "miscalibrated", "moved")
    assert row.audit.strongest == "mlp"


def test_an_edit_is_asked_once_for_each_split_and_nothing_is_fitted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    here = prepared("means")
    asked: list[SplitName] = []
    fitted: list[str] = []
    fit = module.fit_probe

    def moved(split: SplitName) -> np.ndarray:
        asked.append(split)
        return np.asarray(here.testbed.activations(split).mean(axis=1))

    def counted(where: Prepared, probe):  # type: ignore[no-untyped-def]
        fitted.append(probe if isinstance(probe, str) else probe.name)
        return fit(where, probe)

    probe = fit_probe(here, "logistic")
    monkeypatch.setattr(module, "fit_probe", counted)
    result = audit_edit(here, probe, Edit(moved), "item/natural/gaussian")
    assert Counter(asked) == {"train": 1, "calibration": 1, "test": 1}
    assert sorted(fitted) == sorted(CANDIDATES)
    # nothing was moved
    assert result.verdict == "still works"
    assert result.stages[0].gain == pytest.approx(result.clean.gain)


@dataclass(frozen=True)
class Fussy:
    """Refuses rows whose classes have the same mean, as an attack may leave them."""

    name: ClassVar[str] = "fussy"
    traits: ClassVar[Traits] = Traits(linear=True)

    def fit(self, activations, labels, *, pairs=None, seed=0):  # type: ignore[no-untyped-def]
        gap = activations[labels == 1].mean(axis=0) - activations[labels == 0].mean(axis=0)
        if np.abs(gap).max() < 1e-3:
            raise ValueError("nothing to learn from")
        return FittedProbe(self, {"weight": gap, "bias": np.asarray(-1.25 * gap[0])})

    def score(self, xp, parameters, activations):  # type: ignore[no-untyped-def]
        return xp.matmul(activations, parameters["weight"]) + parameters["bias"]


def test_a_recipe_that_refuses_what_an_attack_left_is_passed_over() -> None:
    here = prepared("means")
    target = attack_target(here, baseline_of(here, fit_probe(here, Fussy()), Threat(), 0.05), None)
    row = run_attack(registry.load("attacks", "erase"), target, budget=100, seed=0)
    assert row.audit is not None
    assert row.audit.verdict == "gone"
    assert row.audit.clean.gain > 0.3


def test_same_seed_same_audit() -> None:
    here = prepared("radius")
    probe = fit_probe(here, "lda")
    assert audit(here, probe, seed=3) == audit(here, probe, seed=3)
