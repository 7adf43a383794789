"""Attacks that know their own mind: erase, steer, silent_thoughts, transfer, policy, recode; on known ground."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import tiny_models as tiny
from scipy.stats import spearmanr

from elk_stress.attacks.erase import Erase
from elk_stress.attacks.gradient import Gradient
from elk_stress.attacks.policy import Policy
from elk_stress.attacks.recode import Recode
from elk_stress.attacks.silent_thoughts import SilentThoughts
from elk_stress.attacks.steer import Steer
from elk_stress.attacks.transfer import Transfer
from elk_stress.core.bits import bits_of_beta
from elk_stress.models.language_model import LanguageModel
from elk_stress.models.patched import CONTINUATION
from elk_stress.models.prefixed import PrefixedModel
from elk_stress.models.recoded import can_recode, recoded, undone_shift
from elk_stress.probing.probe import FittedProbe, Traits
from elk_stress.testbeds.linear import Linear
from elk_stress.testbeds.protocol import SplitName
from elk_stress.testbeds.statements import Statements
from elk_stress.testing import checks_for_attack
from elk_stress.thoughts.attacks.model_access import ModelAccess
from elk_stress.thoughts.attacks.proposal import Edit
from elk_stress.thoughts.attacks.protocol import Attack, Oracle, Proposal
from elk_stress.thoughts.attacks.runner import run_attack
from elk_stress.thoughts.attacks.surrogate_agreement import agreement
from elk_stress.thoughts.attacks.target import AttackTarget, attack_target
from elk_stress.thoughts.baseline import baseline_of
from elk_stress.thoughts.conformal import auroc
from elk_stress.thoughts.prepared import Prepared, fit_probe, prepare
from elk_stress.thoughts.result import AttackResult
from elk_stress.threats.threat import Threat

ATTACKS: dict[str, Attack] = {
    "transfer": Transfer(),
    "policy": Policy(),
    "policy by score": Policy(feedback="score"),
    "recode": Recode(),
    "erase": Erase(),
    "steer": Steer(),
    "steer by means": Steer(feedback="none"),
    "silent_thoughts": SilentThoughts(),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_conformance(name: str) -> None:
    for check in checks_for_attack(ATTACKS[name]).values():
        check()


# -- the stage --------------------------------------------------------------------------------------------------------


@cache
def prepared() -> Prepared:
    return replace(prepare(Linear(dim=16, n_items=320, n_contexts=8)), replicates=100)


@cache
def probe(name: str) -> FittedProbe:
    known = prepared().testbed.known_probes()
    return known[name] if name in known else fit_probe(prepared(), name)


@cache
def target(name: str, threat: Threat = Threat()) -> AttackTarget:  # noqa: B008 - frozen
    return attack_target(prepared(), baseline_of(prepared(), probe(name), threat, 0.05), threat.epsilon)


def ask(attack: Attack, here: AttackTarget, *, seed: int = 0) -> tuple[Proposal, ModelAccess]:
    model_access = here.model_access(attack.access, 2000)
    return attack.propose(Oracle(here.searched, attack.access, 400, here.pool, model_access), seed=seed), model_access


def run(attack: Attack, here: AttackTarget, *, seed: int = 0) -> AttackResult:
    row = run_attack(attack, here, budget=2000, seed=seed)
    assert row.status == "ok"
    return row


def silenced(here: AttackTarget, edit: Edit, split: SplitName) -> float:
    """Share of the split's caught positives that the probe no longer catches."""
    bed, threshold = here.prepared.testbed, here.baseline.detection.threshold
    x = np.asarray(bed.activations(split).mean(axis=1), dtype=np.float32)
    caught = (bed.splits[split].labels == 1) & (np.asarray(here.baseline.probe.score(x)) > threshold)
    return float((np.asarray(here.baseline.probe.score(edit.moved(split)))[caught] <= threshold).mean())


KEPT = Threat(kept=True, epsilon=0.05)


# -- erase ------------------------------------------------------------------------------------------------------------


def test_after_erasing_nothing_linear_is_left() -> None:
    proposal, model_access = ask(Erase(shrinkage=False), target("oracle"))
    assert proposal.edit is not None
    rows = model_access.training
    truth = model_access.truth("train")[rows] - 0.5
    before, after = (
        x[rows] - x[rows].mean(axis=0) for x in (model_access.activations("train"), proposal.edit.moved("train"))
    )
    scale = np.abs(truth @ before).max()
    assert scale > 10  # it was there before
    assert np.abs(truth @ after).max() < 1e-3 * scale
    # the least change: it moves along one direction only
    change = after - before
    assert np.linalg.svd(change, compute_uv=False)[1] < 1e-3 * np.linalg.norm(change)


def test_erasing_silences_all_linear_probes_at_the_price_of_behaviour() -> None:
    for name in ("oracle", "logistic"):
        row = run(Erase(), target(name))
        assert row.auroc is not None
        assert row.auroc < 0.65
        assert row.audit is not None
        assert row.audit.verdict in ("gone", "undecided")
        assert run(Erase(), target(name, KEPT)).success == 0


# -- steer ------------------------------------------------------------------------------------------------------------


def test_steering_a_linear_probe_takes_the_closed_form_length() -> None:
    here = target("logistic", Threat(scope="universal"))
    proposal, model_access = ask(Steer(), here)
    weight = np.asarray(here.baseline.probe.parameters["weight"], dtype=float)
    along = weight @ here.baseline.prior.factor
    rows = model_access.training
    x = model_access.activations("train")[rows[model_access.truth("train")[rows] == 1]]
    margins = np.asarray(here.baseline.probe.score(x), dtype=float) - here.baseline.detection.threshold
    caught = np.sort(margins[margins > 0])
    # half of the catches are lost once the lower half of the margins is used up
    expected = caught[(len(caught) - 1) // 2] / np.linalg.norm(along)
    first = proposal.moves[0, 0]
    assert np.linalg.norm(first) == pytest.approx(expected, rel=2e-3)
    assert -(first @ along) / np.linalg.norm(first) / np.linalg.norm(along) == pytest.approx(1, abs=1e-6)


def test_steering_by_the_class_means_asks_nothing_and_goes_along_them() -> None:
    here = target("paper", Threat(scope="universal"))
    proposal, model_access = ask(Steer(feedback="none"), here)
    assert model_access.queries == model_access.gradients == 0
    x, y = model_access.activations("train")[model_access.training], model_access.truth("train")[model_access.training]
    means = x[y == 0].mean(axis=0) - x[y == 1].mean(axis=0)
    edits = model_access.to_edit(proposal.moves[0])
    np.testing.assert_allclose(edits / np.array([0.25, 0.5, 1, 2])[:, None], np.tile(means, (4, 1)), atol=1e-4)
    assert run(Steer(feedback="none"), here).success == 1


# -- silent thoughts --------------------------------------------------------------------------------------------------


def test_silent_thoughts_take_the_closed_form_length() -> None:
    here = target("logistic")
    proposal, _ = ask(SilentThoughts(), here)
    weight = np.asarray(here.baseline.probe.parameters["weight"], dtype=float)
    along = weight @ here.baseline.prior.factor
    sensitivity = prepared().testbed.readout @ here.baseline.prior.factor  # type: ignore[attr-defined]
    null = along - np.linalg.pinv(sensitivity) @ (sensitivity @ along)
    margins = here.baseline.margin[here.baseline.caught]
    lengths = np.linalg.norm(proposal.moves[:, 0], axis=-1)
    np.testing.assert_allclose(lengths, margins / np.linalg.norm(null), rtol=2e-3)
    assert np.abs(proposal.moves[:, 0] @ sensitivity.T).max() < 1e-6
    # as epsilon -> 0 the bits of the shortest silent break are those of the exact joint event
    bed = prepared().testbed
    exact = bed.exact_bits(weight, float(margins[0]), here.baseline.prior, 1e-6).value  # type: ignore[attr-defined]
    kept = bed.exact_bits(np.zeros(16), -1.0, here.baseline.prior, 1e-6).value  # type: ignore[attr-defined]
    assert exact - kept == pytest.approx(float(bits_of_beta(lengths[0])), abs=0.2)


def test_nothing_silent_breaks_the_oracle_and_everything_silent_breaks_paper() -> None:
    oracle, paper = run(SilentThoughts(), target("oracle", KEPT)), run(SilentThoughts(), target("paper", KEPT))
    assert oracle.success == 0
    assert paper.success == 1
    assert paper.shift is not None
    assert paper.shift < 1e-9


# -- transfer ---------------------------------------------------------------------------------------------------------


def test_a_surrogate_that_is_the_probe_is_as_good_as_its_gradient() -> None:
    near = (1.0, 1.05)
    for name in ("logistic", "lda", "mass_mean"):
        white, same = run(Gradient(), target(name)), run(Transfer(surrogates=(name,), overshoot=near), target(name))
        assert white.success == 1
        assert same.success >= 0.95
        assert white.length is not None
        assert same.length == pytest.approx(white.length, rel=0.06)
    unrelated = Transfer(surrogates=("random_direction", "rock"), overshoot=near)
    assert run(unrelated, target("logistic")).success <= 0.1


def test_transfer_asks_the_probe_nothing() -> None:
    for scope in ("item", "universal"):
        here = target("logistic", Threat(scope=scope))
        proposal, model_access = ask(Transfer(), here)
        assert model_access.queries == model_access.gradients == 0
        assert proposal.moves.shape == (here.n_problems, 15, 16)
        # what it proposes does not depend on which probe is attacked
        for other in ("paper", "oracle"):
            there = target(other, Threat(scope=scope))
            if np.array_equal(there.items, here.items):
                np.testing.assert_array_equal(ask(Transfer(), there)[0].moves, proposal.moves)


def test_transfer_in_universal_scope_halves_the_recall_of_a_like_probe() -> None:
    here = target("lda", Threat(scope="universal"))
    assert run(Transfer(surrogates=("lda",), overshoot=(1.2,)), here).success == 1
    # with the monitor's own probe and threshold, the move that brings half of the training positives below it
    proposal, model_access = ask(Transfer(surrogates=("lda",), overshoot=(1.0,)), here)
    weight = np.asarray(here.baseline.probe.parameters["weight"], dtype=float)
    x = model_access.activations("train")[model_access.training][
        model_access.truth("train")[model_access.training] == 1
    ]
    margins = np.sort(np.asarray(here.baseline.probe.score(x), dtype=float) - here.baseline.detection.threshold)
    expected = margins[len(margins) // 2 - 1 : len(margins) // 2 + 1] / np.linalg.norm(
        weight @ here.baseline.prior.factor
    )
    assert 0.999 * expected[0] <= np.linalg.norm(proposal.moves[0, 0]) <= 1.001 * expected[1]
    assert run(Transfer(surrogates=("rock",)), here).success == 0


def test_transfer_needs_surrogates_and_lengths() -> None:
    for options in ({"surrogates": ()}, {"overshoot": ()}, {"overshoot": (1.0, 0.0)}):
        with pytest.raises(ValueError, match="at least one surrogate and positive overshoots"):
            Transfer(**options)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Bent:
    """A monotone function of a mass-mean score: not linear, but with the same shortest ways out."""

    name: ClassVar[str] = "bent"
    traits: ClassVar[Traits] = Traits()

    def fit(
        self, activations: np.ndarray, labels: np.ndarray, *, pairs: np.ndarray | None = None, seed: int = 0
    ) -> FittedProbe:
        means = [activations[labels == label].mean(axis=0) for label in (0, 1)]
        weight = means[1] - means[0]
        return FittedProbe(self, {"weight": weight, "bias": np.asarray(-0.5 * (means[0] + means[1]) @ weight)})

    def score(self, xp: Any, parameters: Any, activations: Any) -> Any:
        along = xp.matmul(activations, parameters["weight"]) + parameters["bias"]
        return along + 10.0 * xp.tanh(along / 20.0)


def test_a_surrogate_that_is_not_linear_is_broken_at_its_design_points() -> None:
    here = target("logistic")
    straight, _ = ask(Transfer(surrogates=("mass_mean",), overshoot=(1.0,)), here)
    bent, _ = ask(Transfer(surrogates=(Bent(),), overshoot=(1.0,)), here)
    lengths = np.linalg.norm(straight.moves[:, 0], axis=-1), np.linalg.norm(bent.moves[:, 0], axis=-1)
    # the thresholds differ a little: pooling over shared contexts is no monotone rule
    np.testing.assert_allclose(lengths[1], lengths[0], rtol=0.1)
    cosines = (straight.moves[:, 0] * bent.moves[:, 0]).sum(-1) / (lengths[0] * lengths[1])
    assert cosines.min() > 0.999


def test_what_agrees_most_breaks_most() -> None:
    def through(name: str) -> Attack:
        return Transfer(surrogates=(name,), overshoot=(1.0, 1.05))

    names = ("logistic", "mass_mean", "random_direction", "rock")
    rows = agreement(prepared(), probe("logistic"), surrogates=names, attack=through)
    assert [row.surrogate for row in rows] == list(names)
    same, other, unrelated, rock = rows
    scores = [np.asarray(probe(name).score(prepared().test_origins), dtype=float) for name in ("logistic", "mass_mean")]
    halves = [spearmanr(*(row[prepared().items.labels == label] for row in scores)).statistic for label in (0, 1)]
    assert other.within == pytest.approx(np.mean(halves))
    assert same.correlation == pytest.approx(1)
    assert same.within == pytest.approx(1)
    assert 0.5 < other.within < other.correlation < 1
    assert abs(unrelated.within) < 0.5
    assert np.isnan(rock.correlation)
    assert same.success >= 0.95 > other.success >= unrelated.success == rock.success == 0
    assert same.upper_bound is not None
    assert other.upper_bound is not None
    assert same.upper_bound.value < other.upper_bound.value
    paper = agreement(prepared(), probe("paper"), surrogates=("mass_mean",), threat=KEPT, attack=through)
    assert paper[0].status == "ok"


# -- policy -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feedback", ["gradient", "score"])
def test_a_learned_policy_breaks_items_that_it_never_saw(feedback: Any) -> None:
    here = target("paper")
    attack = Policy(feedback=feedback, reach=(4.0,))
    proposal, model_access = ask(attack, here)
    assert proposal.edit is not None
    train, test = (silenced(here, proposal.edit, split) for split in ("train", "test"))
    assert train >= 0.95
    assert test >= 0.9
    row = run(attack, here)
    assert row.success == pytest.approx(test, abs=0.05)
    # a random edit of the same length is no such thing
    assert row.benign_success is not None
    assert row.benign_success < 0.2
    assert row.length is not None
    assert row.length < 4
    positives = int(model_access.truth("train")[model_access.training].sum())
    tries = 1 if feedback == "gradient" else 2
    # once to see which are caught, then every step, then to see which of the caught are broken
    assert model_access.queries == model_access.training.size + attack.steps * tries * positives + caught_in_training(
        here
    )
    assert model_access.gradients == (attack.steps * positives if feedback == "gradient" else 0)


def test_the_policy_sees_the_truth() -> None:
    proposal, model_access = ask(Policy(reach=(4.0,)), target("paper"))
    assert proposal.edit is not None
    told = model_access.to_u(proposal.edit.moved("test") - model_access.activations("test"))
    labels = model_access.truth("test")
    model_access.truth = lambda split: 1 - labels  # type: ignore[method-assign]
    again = proposal.edit.moved.__wrapped__  # type: ignore[attr-defined]
    lied = model_access.to_u(again("test") - model_access.activations("test"))
    assert np.linalg.norm(lied - told, axis=1).mean() > 0.05 * np.linalg.norm(told, axis=1).mean()


class Uneven(Linear):
    """Only for positives does behaviour depend on the incidental direction, and on nothing else."""

    def shift_factor(self, split: SplitName, items: np.ndarray) -> np.ndarray:
        return np.asarray(self.splits[split].labels[items][:, None, None] * self.incidental)


def test_an_item_that_behaviour_depends_on_more_than_on_average_is_kept_too() -> None:
    bed, epsilon = Uneven(dim=16, n_items=320, n_contexts=8), 1.0
    threat = Threat(kept=True, epsilon=epsilon)
    stage = replace(prepare(bed), replicates=100)
    here = attack_target(stage, baseline_of(stage, probe("paper"), threat, 0.05), epsilon)
    shifts = []
    for weight in (0.0, 1.0):
        attack = Policy(reach=(16.0,), behaviour=weight)
        model_access = here.model_access("gradient", 2000)
        moves = attack.propose(Oracle(here.searched, "gradient", 400, None, model_access), seed=0).moves[:, 0]
        looks = model_access.sensitivity("test", here.items)
        assert looks is not None
        shifts.append(0.5 * (np.einsum("prk,pk->pr", looks, moves) ** 2).sum(axis=1))
    assert np.median(shifts[0]) > epsilon
    assert (shifts[1] <= epsilon).mean() >= 0.9
    assert np.median(shifts[1]) > 0.3 * epsilon


def caught_in_training(here: AttackTarget) -> int:
    bed = here.prepared.testbed
    x = np.asarray(bed.activations("train").mean(axis=1), dtype=np.float32)[here.prepared.plain_train]
    positive = bed.splits["train"].labels[here.prepared.plain_train] == 1
    return int((np.asarray(here.baseline.probe.score(x))[positive] > here.baseline.detection.threshold).sum())


def test_gradients_teach_faster_than_scores_and_both_better_than_nothing() -> None:
    here = target("logistic")
    few = {"reach": (12.0,), "steps": 10}
    shares = {}
    for feedback in ("gradient", "score"):
        proposal, _ = ask(Policy(feedback=feedback, **few), here)  # type: ignore[arg-type]
        assert proposal.edit is not None
        shares[feedback] = silenced(here, proposal.edit, "test")
    untrained, _ = ask(Policy(reach=(12.0,), steps=1), here)
    assert untrained.edit is not None
    assert shares["gradient"] > shares["score"] > silenced(here, untrained.edit, "test") == 0


def test_the_policy_takes_the_shortest_reach_that_breaks_half_of_training() -> None:
    here = target("paper")
    proposal, model_access = ask(Policy(reach=(16.0, 0.5, 4.0)), here)
    lengths = np.linalg.norm(proposal.moves[:, 0], axis=-1)
    assert 2 < lengths.max() < 4
    # the truth decides: negatives, with which there is nothing to win, are moved less
    assert proposal.edit is not None
    edits = model_access.to_u(proposal.edit.moved("test") - model_access.activations("test"))
    negatives = model_access.truth("test") == 0
    assert np.linalg.norm(edits[negatives], axis=1).mean() < 0.9 * np.linalg.norm(edits[~negatives], axis=1).mean()
    # more is wanted, so a longer one is taken
    longer, _ = ask(Policy(reach=(2.6, 5.0), share=0.95), target("paper"))
    assert np.linalg.norm(longer.moves[:, 0], axis=-1).max() > 4
    half, _ = ask(Policy(reach=(2.6, 5.0)), target("paper"))
    assert np.linalg.norm(half.moves[:, 0], axis=-1).max() < 2.6
    # none breaks half: the one that breaks most
    proposal, _ = ask(Policy(reach=(0.5, 1.0), steps=20), target("oracle"))
    assert np.linalg.norm(proposal.moves[:, 0], axis=-1).max() < 1


def test_the_policy_keeps_behaviour_where_it_must() -> None:
    longest = Policy(reach=(8.0, 16.0, 24.0))
    free, kept = run(longest, target("logistic")), run(longest, target("logistic", KEPT))
    assert free.shift is not None
    assert kept.shift is not None
    assert free.shift > 1 > KEPT.epsilon > kept.shift  # type: ignore[operator]
    assert kept.success >= 0.75
    # of what behaviour reads, nothing can be hidden
    assert run(longest, target("oracle", KEPT)).success == 0
    for options in ({"steps": 0}, {"reach": ()}, {"reach": (1.0, -1.0)}):
        with pytest.raises(ValueError, match="at least one step and one positive reach"):
            Policy(**options)  # type: ignore[arg-type]
    # of a probe that catches nothing there is nothing to learn
    silent = replace(target("paper").baseline, detection=replace(target("paper").baseline.detection, threshold=1e6))
    proposal, model_access = ask(Policy(), replace(target("paper"), baseline=silent))
    assert not proposal.moves.any()
    assert model_access.gradients == 0


# -- recode -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["paper", "oracle", "logistic", "lda", "mass_mean"])
def test_a_recoded_latent_is_read_by_chance_and_found_again_by_a_refit(name: str) -> None:
    for threat in (Threat(), KEPT):
        row = run(Recode(), target(name, threat))
        assert row.success >= 0.9
        assert row.auroc is not None
        # 40 positives and 40 negatives: standard error 0.065
        assert abs(row.auroc - 0.5) < 0.2
        assert row.audit is not None
        assert row.audit.verdict in ("moved", "hidden")
        assert row.shift is not None
        # computed, not assumed: float32 activations leave their rounding behind
        assert 0 < row.shift < 1e-9


def test_the_code_is_an_orthogonal_map_and_undoing_it_wrongly_shows() -> None:
    from elk_stress.attacks import recode

    proposal, model_access = ask(Recode(), target("logistic"))
    assert proposal.edit is not None
    x, coded = (np.asarray(a, dtype=float) for a in (model_access.activations("test"), proposal.edit.moved("test")))
    assert np.abs(coded - x).max() > 1

    def distances(a: np.ndarray) -> np.ndarray:
        return np.asarray(np.linalg.norm(a[:, None] - a[None], axis=-1))

    np.testing.assert_allclose(distances(coded), distances(x), atol=1e-4)
    shift = recode._in_the_testbed(model_access, lambda split: proposal.edit.moved(split), np.eye(16), x.mean(axis=0))  # type: ignore[union-attr]
    assert np.median(shift(np.arange(10))) > 0.1


@pytest.mark.parametrize("weight", [0.0, 1.0, 1e3, np.inf])
def test_the_new_direction_carries_nothing_of_the_truth(weight: float) -> None:
    from elk_stress.attacks import recode

    rng = np.random.default_rng(np.random.SeedSequence(6))
    leading, delta = np.linalg.qr(rng.standard_normal((9, 2)))[0], rng.standard_normal(9)
    variation = np.diag(np.linspace(3.0, 0.1, 9))
    new = recode._elsewhere(leading, delta, variation, weight)
    np.testing.assert_allclose(new.T @ new, np.eye(2), atol=1e-12)
    assert np.abs(delta @ new).max() < 1e-9
    # the more other variation counts, the less of it is read
    nearest = recode._elsewhere(leading, delta, variation, 0.0)
    assert np.trace(new.T @ variation @ new) <= np.trace(nearest.T @ variation @ nearest) + 1e-12
    # what carries nothing of the truth stays, as long as nothing else counts
    free = leading - np.outer(delta, delta @ leading) / (delta @ delta)
    basis = np.linalg.qr(free)[0]
    if weight == 0:
        np.testing.assert_allclose(recode._elsewhere(basis, delta, variation, weight), basis, atol=1e-9)


def test_only_fresh_items_show_what_an_estimated_direction_leaves() -> None:
    from elk_stress.attacks import recode

    _, model_access = ask(Recode(), target("mass_mean"))
    rows = model_access.training
    x, y = np.asarray(model_access.activations("train")[rows], dtype=float), model_access.truth("train")[rows]
    weight = np.asarray(probe("mass_mean").parameters["weight"], dtype=float)
    leading = weight[:, None] / np.linalg.norm(weight)
    rotation, centre = recode._code(leading, x, y, model_access.prior.covariance, 0.0)
    same = abs(auroc(model_access.score(centre + (x - centre) @ rotation.T), y) - 0.5)
    _, fresh = recode._held_out(model_access, leading, x, y, 0.0)
    assert same < 0.05 < 0.1 < fresh


@pytest.mark.parametrize("count", [1, 3])
def test_the_least_rotation_takes_one_basis_to_another(count: int) -> None:
    from elk_stress.attacks import recode

    rng = np.random.default_rng(np.random.SeedSequence(5))
    before, after = (np.linalg.qr(rng.standard_normal((9, count)))[0] for _ in range(2))
    # beyond a right angle a reflection is nearer
    after = after * np.sign(np.einsum("dr,dr->r", before, after))
    turned = recode._turned(before, after)
    np.testing.assert_allclose(turned @ turned.T, np.eye(9), atol=1e-12)
    np.testing.assert_allclose(turned @ before, after, atol=1e-12)
    np.testing.assert_allclose(recode._turned(before, before), np.eye(9), atol=1e-12)
    # what is orthogonal to both stays where it is
    outside = np.linalg.svd(np.concatenate([before, after], axis=1), full_matrices=True)[0][:, 2 * count :]
    np.testing.assert_allclose(turned @ outside, outside, atol=1e-12)
    if count == 1:
        # a rotation in one plane: its trace gives the angle
        assert np.trace(turned) == pytest.approx(7 + 2 * float(before[:, 0] @ after[:, 0]))


@dataclass(frozen=True)
class Either:
    """Alarm where either of two directions is high: two gradients, and no linear probe."""

    name: ClassVar[str] = "either"
    traits: ClassVar[Traits] = Traits(learns=False)

    def fit(
        self, activations: np.ndarray, labels: np.ndarray, *, pairs: np.ndarray | None = None, seed: int = 0
    ) -> FittedProbe:
        raise TypeError("given, not fitted")

    def score(self, xp: Any, parameters: Any, activations: Any) -> Any:
        first, second = (xp.matmul(activations, parameters[name]) for name in ("first", "second"))
        largest = xp.maximum(first, second)
        return largest + xp.log(xp.exp(first - largest) + xp.exp(second - largest))


def test_a_probe_with_two_gradients_is_recoded_too() -> None:
    bed = prepared().testbed
    assert isinstance(bed, Linear)
    both = FittedProbe(Either(), {"first": bed.truth, "second": bed.incidental})
    here = attack_target(prepared(), baseline_of(prepared(), both, Threat(), 0.05), None)
    row = run(Recode(), here)
    assert row.auroc is not None
    assert auroc(np.asarray(both.score(prepared().test_origins), dtype=float), prepared().items.labels) > 0.95
    assert abs(row.auroc - 0.5) < 0.2
    assert row.success >= 0.9
    # turning one direction away leaves the other
    one, _ = ask(Recode(directions=1, weights=(0.0,)), here)
    assert one.edit is not None
    scores = np.asarray(both.score(one.edit.moved("test").astype(np.float32)), dtype=float)
    assert auroc(scores, prepared().items.labels) > row.auroc + 0.1


# -- recode in a language model ---------------------------------------------------------------------------------------

TEXTS = ["the city of paris is in france", "my cat and dog", "we see rain and sun in japan ."]


def tiny_model(kind: str) -> LanguageModel:
    return LanguageModel.from_modules(tiny.causal(kind), tiny.tokenizer(), fingerprint=kind, causal=True)


def random_code(dim: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(np.random.SeedSequence(7))
    return np.linalg.qr(rng.standard_normal((dim, dim)))[0], rng.standard_normal(dim)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_a_code_that_is_undone_changes_nothing_and_one_that_is_not_changes_much(kind: str) -> None:
    subject = tiny_model(kind)
    rotation, centre = random_code(subject.dim)
    for site in ("layers.0", "layers.2"):
        done = undone_shift(subject, site, rotation, centre, TEXTS)
        assert done.shape == (3,)
        # a sampled rounding error, no constant
        assert done.max() < 1e-6
        assert undone_shift(subject, site, rotation, centre, TEXTS, undo=False).min() > 1e-2
        assert undone_shift(subject, site, np.eye(subject.dim), centre, TEXTS, undo=False).max() < 1e-6


def test_the_shift_is_the_divergence_of_plain_forward_passes() -> None:
    import torch

    subject = tiny_model("llama")
    rotation, centre = random_code(subject.dim)
    found = undone_shift(subject, "layers.1", rotation, centre, TEXTS[:1], undo=False)

    def code(module: Any, args: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        q, c = torch.as_tensor(rotation, dtype=torch.float32), torch.as_tensor(centre, dtype=torch.float32)
        coded = c + (first - c) @ q.T
        return (coded, *output[1:]) if isinstance(output, tuple) else coded

    ids = torch.tensor(subject.tokenize(TEXTS[:1]))
    with torch.no_grad():
        grown = subject.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=CONTINUATION, do_sample=False, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
        plain = torch.log_softmax(subject.model(grown).logits[0, -CONTINUATION - 1 :], -1)
        handle = subject.blocks[1].register_forward_hook(code)
        other = torch.log_softmax(subject.model(grown).logits[0, -CONTINUATION - 1 :], -1)
        handle.remove()
    expected = float((plain.exp() * (plain - other)).sum(-1).mean())
    assert found[0] == pytest.approx(expected, rel=1e-3)
    # shorter texts beside longer ones read the same
    together = undone_shift(subject, "layers.1", rotation, centre, TEXTS, undo=False)
    alone = [undone_shift(subject, "layers.1", rotation, centre, [text], undo=False)[0] for text in TEXTS]
    np.testing.assert_allclose(together, alone, rtol=1e-3)


def test_whoever_reads_the_site_reads_the_code() -> None:
    subject = tiny_model("llama")
    rotation, centre = random_code(subject.dim)
    plain = subject.read(TEXTS, ["layers.1", "layers.3"])
    with recoded(subject, "layers.1", rotation, centre):
        coded = subject.read(TEXTS, ["layers.1", "layers.3"])
    np.testing.assert_allclose(coded["layers.1"], centre + (plain["layers.1"] - centre) @ rotation.T, atol=1e-4)
    np.testing.assert_allclose(coded["layers.3"], plain["layers.3"], atol=1e-4)
    # and the model is as before
    np.testing.assert_array_equal(subject.read(TEXTS, ["layers.1"])["layers.1"], plain["layers.1"])


def test_codes_that_cannot_be_undone_are_refused() -> None:
    subject = tiny_model("llama")
    rotation, centre = random_code(subject.dim)
    for site in ("embeddings", "layers.3"):
        assert not can_recode(subject, site)
        with pytest.raises(ValueError, match=r"layers.0 to layers.2"):
            undone_shift(subject, site, rotation, centre, TEXTS)
    with pytest.raises(ValueError, match="only an orthogonal rotation"):
        undone_shift(subject, "layers.1", 1.1 * rotation, centre, TEXTS)
    with pytest.raises(ValueError, match="expected a rotation"):
        undone_shift(subject, "layers.1", rotation[:5], centre, TEXTS)


class _Prefixed(Statements):
    """Statements whose model can be reached."""

    def prefixed(self, split: SplitName) -> PrefixedModel:
        return PrefixedModel(self._loaded(), self.site, self.splits[split].texts or (), self.host_context)


@pytest.mark.parametrize("made", [Statements, _Prefixed])
def test_recode_in_a_language_model_is_judged_by_forward_passes(
    made: Callable[..., Statements], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["cat", "dog", "tea", "rain", "sun", "city"]
    them = [{"text": f"the {words[i % 6]} {i} is in {'paris' if i % 2 else 'lima'}", "label": i % 2} for i in range(90)]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, them)) + "\n")
    bed = made(data=path, n_contexts=8, subject=tiny_model("llama"), site="layers.1")
    stage = replace(prepare(bed), replicates=100)
    threat = Threat(kept=True, epsilon=1e-6)
    here = attack_target(stage, baseline_of(stage, fit_probe(stage, "logistic"), threat, 0.1), 1e-6)
    judged: list[int] = []
    import elk_stress.models.recoded as module

    passes = module.undone_shift

    def counted(*args: Any, **kwargs: Any) -> np.ndarray:
        judged.append(len(args[4]))
        return passes(*args, **kwargs)

    monkeypatch.setattr(module, "undone_shift", counted)
    row = run(Recode(), here)
    assert row.success >= 0.5
    assert row.shift is not None
    assert 0 <= row.shift < 1e-6
    # the code itself is built into the model where that can be reached; else what decoding leaves is put at the site
    assert bool(judged) == hasattr(bed, "prefixed")
