"""What attacks see and what they are judged by: searched on training items, judged on test items, within a budget."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

import numpy as np
import pytest
from stub_attacks import Stub

from elk_stress.core import registry
from elk_stress.estimators.limit_state import BudgetExhausted
from elk_stress.probing.probe import direction
from elk_stress.testbeds.linear import Linear
from elk_stress.testing import check_attack
from elk_stress.thoughts.attacks.proposal import Edit
from elk_stress.thoughts.attacks.protocol import Oracle, Proposal
from elk_stress.thoughts.attacks.runner import run_attack
from elk_stress.thoughts.attacks.target import AttackTarget, attack_target
from elk_stress.thoughts.baseline import baseline_of
from elk_stress.thoughts.conformal import auroc
from elk_stress.thoughts.events import nearest_of_linear
from elk_stress.thoughts.prepared import Prepared, fit_probe, prepare
from elk_stress.thoughts.universal_items import judged_on, searched_on
from elk_stress.threats.priors import EllipticalPrior, Gaussian, StudentT
from elk_stress.threats.threat import Threat


@cache
def _scene() -> Prepared:
    return replace(prepare(Linear(dim=8, n_items=240, n_contexts=8)), replicates=100)


@cache
def _field(threat: Threat, probe: str = "logistic") -> AttackTarget:
    known = _scene().testbed.known_probes()
    fitted = known[probe] if probe in known else fit_probe(_scene(), probe)
    return attack_target(_scene(), baseline_of(_scene(), fitted, threat, 0.05), threat.epsilon)


@pytest.mark.parametrize("probe", ["logistic", "mlp"])
def test_one_move_for_all_is_searched_on_training_items_and_judged_on_test_items(probe: str) -> None:
    target = _field(Threat(scope="universal"), probe)
    baseline, prepared = target.baseline, target.prepared
    rng = np.random.default_rng(0)
    u = rng.standard_normal((1, 200, target.failed.dim)) * np.linspace(0.2, 12, 200)[None, :, None]
    moves = np.asarray(baseline.prior.move(u))[0]
    train, threshold = searched_on(prepared, baseline), baseline.detection.threshold
    assert not np.array_equal(train.origins[: len(prepared.items)], prepared.test_origins)
    for event, origins, labels, tau in (
        (
            target.searched,
            prepared.origins("train")[prepared.plain_train],
            prepared.training.labels[prepared.plain_train],
            train.tau,
        ),
        (target.failed, prepared.test_origins, prepared.items.labels, baseline.detection.recall / 2),
    ):
        positives = origins[labels == 1].astype(float)
        recall = np.array([(baseline.probe.score(positives + move) > threshold).mean() for move in moves])
        failed = event.value(np.arange(1), u)[0] <= 0
        assert 0 < failed.sum() < len(failed)
        # single precision decides the closest calls
        assert (failed == (recall <= tau)).mean() >= 0.99


def test_it_is_searched_two_standard_errors_beyond_half_the_advantage() -> None:
    threat = Threat(scope="universal")
    target = _field(threat)
    train = searched_on(target.prepared, target.baseline)
    n, m = len(train.margin), len(target.prepared.positives)
    half = 0.5 * (train.margin > 0).mean()
    assert train.tau == pytest.approx(half * (1 - 2 * np.sqrt(1 / n + 1 / m)))
    assert judged_on(target.prepared, target.baseline).tau == target.baseline.detection.recall / 2
    area = searched_on(target.prepared, replace(target.baseline, threat=replace(threat, metric="auroc")))
    clean = auroc(np.asarray(target.baseline.probe.score(area.origins), dtype=float), area.labels)
    assert area.tau == pytest.approx(0.5 + 0.5 * (clean - 0.5) * (1 - 2 * np.sqrt(1 / n + 1 / m)))


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("name", ["gradient", "black_box", "steer"])
def test_what_was_searched_on_training_items_breaks_test_items(name: str, kept: bool) -> None:
    target = _field(Threat(scope="universal", kept=kept, epsilon=0.5 if kept else None), "paper")
    row = run_attack(registry.load("attacks", name), target, budget=2000, seed=0)
    assert row.success == 1
    assert row.auroc is not None
    assert row.epsilon == target.epsilon
    linear = target.failed.linear
    assert linear is not None
    # lengths are tried a tenth apart
    nearest = float(linear.offset[0] / np.linalg.norm(linear.weight))
    assert row.length is not None
    assert nearest * (1 - 1e-4) <= row.length <= 1.25 * nearest


def test_real_contexts_are_put_to_the_probe_as_they_are() -> None:
    """A longer context is none: only designed moves are tried in several lengths."""
    target = _field(Threat(scope="universal"), "paper")
    assert target.pool is not None
    row = run_attack(registry.load("attacks", "best_of_n"), target, budget=2000, seed=0)
    # a question about one move for all scores every training positive, the verdict every test positive
    n, m = len(searched_on(target.prepared, target.baseline).margin), len(target.prepared.positives)
    assert row.queries == pytest.approx((n * target.pool.shape[1] + m) / len(target.items))
    assert row.candidates == 1
    assert row.spent == pytest.approx(np.log2(target.pool.shape[1]))
    assert row.spent_as == "selection"


# -- within a budget --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Asks(Stub):
    """Asks about all training items, again and again, and proposes to stay."""

    times: int = 1

    name: ClassVar[str] = "asks"
    access: ClassVar[Any] = "gradient"

    def propose(self, oracle: Oracle, *, seed: int) -> Proposal:
        model_access = oracle.model_access
        for _ in range(self.times):
            model_access.gradient(model_access.activations("train")[model_access.training])
        return model_access.propose(Edit(model_access.activations))


def test_a_mind_asks_within_its_budget() -> None:
    target = _field(Threat())
    ok = run_attack(_Asks(5), target, budget=10, seed=0)
    n = len(target.prepared.plain_train)
    # scored per attacked item, and once more by the verdict
    assert (ok.status, ok.gradients) == ("ok", 5 * n / len(target.items))
    assert ok.queries == pytest.approx(ok.gradients + 1)
    refused = run_attack(_Asks(6), target, budget=10, seed=0)
    assert refused.status.startswith("proposed nothing within its budget: ")
    assert "raise the budget" in refused.status
    assert np.isnan(refused.success)


def test_a_refused_question_is_not_counted() -> None:
    model_access = _field(Threat()).model_access("score", 1)
    rows = np.zeros((model_access.left + 1, 8), dtype=np.float32)
    with pytest.raises(BudgetExhausted, match="raise the budget"):
        model_access.score(rows)
    assert model_access.queries == 0
    model_access.score(rows[1:])
    assert model_access.left == 0


# -- edits -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Away(Stub):
    """Subtracts twice what the planted probe reads from every thought."""

    name: ClassVar[str] = "away"

    def propose(self, oracle: Oracle, *, seed: int) -> Proposal:
        model_access = oracle.model_access
        weight = model_access.testbed.known_probes()["paper"].parameters["weight"]
        reads = np.outer(weight, weight) / (weight @ weight)
        return model_access.propose(
            Edit(lambda split: np.asarray(model_access.activations(split) @ (np.eye(8) - 2 * reads)))
        )


def test_an_edit_outside_of_the_prior_is_judged_as_it_is_and_bounds_nothing() -> None:
    """A prior of rank 2 cannot write this: its nearest move leaves the score alone, the edit itself does not."""
    testbed = Linear(dim=8, n_items=240, n_contexts=8)
    probe = testbed.known_probes()["paper"]
    across = np.linalg.svd(probe.parameters["weight"][None])[2][1:3].T
    prepared = replace(prepare(testbed, prior=EllipticalPrior(across)), replicates=100)
    target = attack_target(prepared, baseline_of(prepared, probe, Threat(), 0.05), None)
    row = run_attack(_Away(), target, budget=10, seed=0)
    assert row.success > 0.5
    assert row.upper_bound is None
    inside = run_attack(_Away(), _field(Threat(), "paper"), budget=10, seed=0)
    assert inside.success > 0.5
    assert inside.upper_bound is not None


def test_an_edit_is_made_once() -> None:
    calls = []

    def moved(split: Any) -> np.ndarray:
        calls.append(split)
        return np.zeros((2, 2))

    edit = Edit(moved)
    for split in ("test", "train", "test"):
        edit.moved(split)  # type: ignore[arg-type]
    assert calls == ["test", "train"]


# -- transfer under kept behaviour -------------------------------------------------------------------------------------


@pytest.mark.parametrize("surrogate", ["logistic", "mlp"])
def test_transfer_keeps_the_behaviour_that_it_must_keep(surrogate: str) -> None:
    attack = registry.load("attacks", "transfer", surrogates=(surrogate,), overshoot=(1.0,))
    shifts = {}
    for kept in (False, True):
        target = _field(Threat(kept=kept, epsilon=0.05 if kept else None))
        model_access = target.model_access("none", 100)
        moves = attack.propose(Oracle(target.searched, "none", 100, None, model_access), seed=0).moves
        shifts[kept] = target.shift(np.arange(target.n_problems), np.asarray(target.baseline.prior.move(moves)))[:, 0]
        assert (np.linalg.norm(moves[:, 0], axis=1) > 0).mean() > 0.8
    assert np.median(shifts[False]) > 0.05
    assert (shifts[True] <= 0.05 * 1.001).all()


# -- what a row says ---------------------------------------------------------------------------------------------------


def test_the_first_candidate_is_told_from_the_best_of_many() -> None:
    row = run_attack(registry.load("attacks", "natural_thoughts"), _field(Threat(), "paper"), budget=2000, seed=0)
    assert row.candidates > 50
    assert row.first < row.success
    one = run_attack(registry.load("attacks", "erase"), _field(Threat(), "paper"), budget=2000, seed=0)
    assert one.candidates == 1
    assert one.first == one.success


def test_random_moves_are_their_own_control_and_others_get_one_with_as_many_tries() -> None:
    target = _field(Threat(), "paper")
    for name in ("isotropic_noise", "natural_thoughts"):
        assert run_attack(registry.load("attacks", name), target, budget=2000, seed=0).benign_success is None
    few, many = (
        run_attack(registry.load("attacks", "transfer", overshoot=lengths), target, budget=2000, seed=0).benign_success
        for lengths in [(4.0,), (4.0,) * 5]
    )
    assert few is not None
    assert many is not None
    assert many > few


def test_an_edit_that_lowers_the_score_engages_in_whatever_units_the_probe_scores() -> None:
    base = _scene().testbed.known_probes()["paper"]
    for scale in (0.01, 1.0, 100.0):
        weight = base.parameters["weight"] * scale
        baseline = baseline_of(_scene(), direction(weight, float(base.parameters["bias"]) * scale), Threat(), 0.05)
        target = attack_target(_scene(), baseline, None)
        lowered, raised = (run_attack(_Along(sign), target, budget=10, seed=0) for sign in (-0.1, 0.1))
        assert [f.name for f in lowered.flags] == []
        assert [f.name for f in raised.flags] == ["did_not_engage"]


@dataclass(frozen=True)
class _Along(Stub):
    """Moves every thought a little along what the planted probe reads."""

    sign: float

    name: ClassVar[str] = "along"
    access: ClassVar[Any] = "score"

    def propose(self, oracle: Oracle, *, seed: int) -> Proposal:
        model_access = oracle.model_access
        weight = model_access.testbed.known_probes()["paper"].parameters["weight"]
        return model_access.propose(
            Edit(lambda split: np.asarray(model_access.activations(split) + self.sign * weight))
        )


def test_a_bound_takes_draws_of_its_own() -> None:
    """An attack that calls a shifted cloud the prior proves nothing by saying so."""
    target = _field(Threat())
    row = run_attack(_Cheat(), target, budget=100, seed=0)
    assert row.success == 1
    assert row.upper_bound is None


@dataclass(frozen=True)
class _Cheat(Stub):
    """Failing points that are said to be draws from the prior."""

    name: ClassVar[str] = "cheat"
    needs: ClassVar[Any] = ()

    def propose(self, oracle: Oracle, *, seed: int) -> Proposal:
        nearest = 1.01 * nearest_of_linear(_field(Threat()).failed)
        return Proposal(np.repeat(nearest[:, None], 50, axis=1), from_prior=True)


def test_a_given_heavy_tailed_prior_is_gaussian_where_the_threat_says_so() -> None:
    testbed = Linear(dim=8, n_items=240, n_contexts=8)
    heavy = testbed.true_prior(tail=StudentT(3.0))
    prepared = prepare(testbed, prior=heavy)
    assert isinstance(prepared.prior(Threat()).tail, Gaussian)
    assert prepared.prior(Threat(tail="best")).tail == heavy.tail
    np.testing.assert_allclose(prepared.prior(Threat()).covariance, heavy.covariance)


def test_nothing_silent_is_no_failure_to_engage() -> None:
    """The oracle leaves no silent direction: that is shown, and no red flag; what it tries under an epsilon engages."""
    for kept in (False, True):
        target = _field(Threat(kept=kept, epsilon=0.2 if kept else None), "oracle")
        row = run_attack(registry.load("attacks", "silent_thoughts"), target, budget=2000, seed=0)
        assert row.success == 0
        assert row.flags == ()


def test_what_nothing_moves_is_no_failure_to_engage() -> None:
    target = _field(Threat(scope="universal", metric="auroc"), "logistic")
    row = run_attack(registry.load("attacks", "gradient"), target, budget=200, seed=0)
    assert row.success == 0
    assert row.flags == ()


def test_few_catches_are_searched_farther_and_none_not_at_all() -> None:
    """Half of a low recall is known badly; where next to nothing is caught in training, nothing can be searched."""
    target = _field(Threat(scope="universal"), "paper")
    baseline = target.baseline
    scores = np.sort(np.asarray(baseline.probe.score(searched_on(_scene(), baseline).positives), dtype=float))
    shares = {}
    for caught in (len(scores), 6, 4, 0):
        threshold = float(scores[-caught - 1]) if caught < len(scores) else float(scores[0]) - 1
        strict = replace(
            baseline, detection=replace(baseline.detection, threshold=threshold if caught else scores[-1] + 1)
        )
        train = searched_on(_scene(), strict)
        shares[caught] = train.tau / (0.5 * max((train.margin > 0).mean(), 1e-9))
        if caught < 5:
            here = replace(attack_target(_scene(), strict, None), items=target.items)
            row = run_attack(registry.load("attacks", "gradient"), here, budget=100, seed=0)
            assert "of which the probe catches too few" in row.status
            assert run_attack(registry.load("attacks", "steer_means"), here, budget=100, seed=0).status == "ok"
    assert shares[len(scores)] > 2 * shares[6] > 0


@pytest.mark.parametrize("name", ["gradient", "steer_means", "transfer"])
def test_a_free_move_that_broke_it_says_what_it_shifted(name: str) -> None:
    row = run_attack(registry.load("attacks", name), _field(Threat(scope="universal"), "paper"), budget=2000, seed=0)
    assert row.success == 1
    assert row.shift is not None


def test_an_edit_gives_all_items_of_the_split_that_it_is_asked_for() -> None:
    for shape in ((3, 8), (60, 7)):
        model_access = _field(Threat()).model_access("none", 10)
        with pytest.raises(ValueError, match=r"expected \(60, 8\), all items of the split"):
            model_access.propose(Edit(lambda split, shape=shape: np.zeros(shape)))  # type: ignore[misc]
    with pytest.raises(ValueError, match=r"scopes = \('item',\)"):
        _field(Threat(scope="universal")).model_access("none", 10).propose(Edit(lambda split: np.zeros((60, 8))))


def test_planted_probes_are_found_by_name() -> None:
    known = _scene().testbed.known_probes()["paper"]
    np.testing.assert_array_equal(fit_probe(_scene(), "paper").parameters["weight"], known.parameters["weight"])


def test_what_broke_it_is_told_with_the_least_access_first() -> None:
    from elk_stress.thoughts.engine import stress

    names = ["gradient", "transfer", "silent_thoughts", "erase"]
    result = stress(_scene(), "paper", threats=[Threat()], attacks=names, controls=False, n_particles=200)
    (row,) = result.threats.values()
    assert [a.access for a in row.breakers] == ["none", "gradient"]
    cheapest = min((a for a in row.attacks if a.access == "gradient"), key=lambda a: a.queries + a.gradients)
    assert row.breakers[1] is cheapest
    assert f"broken by {row.breakers[0].attack} (none), {cheapest.attack} (gradient); least bound" in str(result)
    assert replace(row, attacks=()).broken_by() == ""
    held = tuple(replace(a, success=0.4, upper_bound=None) for a in row.attacks)
    assert replace(row, attacks=held).broken_by() == "none of 4 attacks broke half of it"


@dataclass(frozen=True)
class _Secret(Stub):
    """Writes the truth into the activations; says so, or does not."""

    says_so: bool

    name: ClassVar[str] = "secret"

    def propose(self, oracle: Oracle, *, seed: int) -> Proposal:
        model_access = oracle.model_access
        weight = model_access.testbed.known_probes()["paper"].parameters["weight"]

        def moved(split: Any) -> np.ndarray:
            return np.asarray(model_access.activations(split) - 8 * model_access.truth(split)[:, None] * weight)

        return model_access.propose(Edit(moved, uses_truth=self.says_so))


def test_an_edit_that_writes_the_truth_must_say_so() -> None:
    check_attack(_Secret(True))
    with pytest.raises(AssertionError, match="uses_truth=True"):
        check_attack(_Secret(False))
