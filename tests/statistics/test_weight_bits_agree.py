"""Bits of a weight change on an organism of 216 weights: every way to measure them gives the same number.

Two events under the weight prior, behaviour kept in both. The *mild* one, about 7 bits, can be counted, and best of N
prior draws can be run for real. The *rare* one, half of the advantage at about 36 bits, is beyond counting.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest

from elk_stress.attacks.select_best import SelectBest
from elk_stress.core.bits import BitsBatch, Kind
from elk_stress.estimators.annealed import Annealed
from elk_stress.estimators.evidence_bound import EvidenceBound
from elk_stress.estimators.importance import Importance
from elk_stress.estimators.monte_carlo import MonteCarlo
from elk_stress.estimators.subset_simulation import SubsetSimulation
from elk_stress.probing.probe import FittedProbe
from elk_stress.testbeds.superposition import Superposition
from elk_stress.training.evasion import targets_from
from elk_stress.training.gradient_loop import evade_positives
from elk_stress.training.loop import defence_of
from elk_stress.training.measure import auroc_of, clean_auroc, half_advantage, scores_of
from elk_stress.training.organism_trainee import OrganismTrainee
from elk_stress.training.weight_bits import WeightsEvent, measure_weight_bits
from elk_stress.training.weight_search import WeightSearch

pytestmark = pytest.mark.statistics

COUNTED, REPEATS, LOG2_N = 40_000, 256, 6
RARE_MODEL = 1


@dataclass(frozen=True)
class Case:
    """An event with what every estimator says of it; ``problems`` are the models looked at."""

    trainee: OrganismTrainee
    probes: list[FittedProbe]
    event: WeightsEvent
    centres: np.ndarray
    found: dict[str, BitsBatch]
    bound: np.ndarray

    def broken(self, weights: np.ndarray) -> np.ndarray:
        """``(n, models)``: AUROC at most tau and behaviour kept, by the functions that runs use, not the event's."""
        scores = scores_of(self.probes, self.trainee.activations(weights, "test"))
        low = auroc_of(scores, self.trainee.splits["test"].labels) <= self.event.tau
        return np.asarray(low & (self.trainee.shift(weights) <= self.trainee.epsilon))


@pytest.fixture(scope="module")
def organism() -> Superposition:
    return Superposition(
        n_features=24, width=8, n_models=2, training_steps=600, n_train=256, n_calibration=128, n_test=128
    )


def build(organism: Superposition, scale: float, tau: np.ndarray | None, problems: list[int], **sizes: int) -> Case:
    trainee = OrganismTrainee(organism, scale_factor=scale)
    probes = list(defence_of(trainee, "paper", (), (), 0).panel["paper"])
    goal = half_advantage(clean_auroc(trainee, probes)) if tau is None else tau
    event = WeightsEvent(trainee, probes, goal)
    search, _ = WeightSearch()(event.parts, dict(event.data), trainee.n_parameters, 0)
    state, centres = event.limit_state.select(np.array(problems)), search[problems][:, None]
    found = {
        "importance": Importance(n_particles=sizes["importance"])(state, seed=2, centres=centres),
        "annealed": Annealed(n_particles=sizes["annealed"])(state, seed=3, centres=centres),
        "splitting": SubsetSimulation(n_particles=128, n_runs=6, n_moves=5)(state, seed=5),
        "counting": MonteCarlo(n_samples=sizes["counting"])(state, seed=1),
    }
    bound = EvidenceBound()(state, seed=4, centres=centres).value
    return Case(trainee, probes, event, centres, found, bound)


@pytest.fixture(scope="module")
def mild(organism) -> Case:
    """tau at the 0.8% quantile of what prior draws leave: 7 bits; behaviour binds too, a tenth of draws break it."""
    trainee = OrganismTrainee(organism, scale_factor=1.5)
    probes = defence_of(trainee, "paper", (), (), 0).panel["paper"]
    rng = np.random.default_rng(np.random.SeedSequence(0))
    draws = trainee.original + trainee.sigma * rng.standard_normal((2000, 1, trainee.n_parameters), dtype=np.float32)
    scores = scores_of(probes, trainee.activations(draws, "test"))
    tau = np.quantile(auroc_of(scores, trainee.splits["test"].labels), 0.008, axis=0)
    assert 0.02 < 1 - (trainee.shift(draws) <= trainee.epsilon).mean() < 0.5
    return build(organism, 1.5, tau, [0, 1], importance=32_768, annealed=64, counting=COUNTED)


@pytest.fixture(scope="module")
def rare(organism) -> Case:
    return build(organism, 1.2, None, [RARE_MODEL], importance=16_384, annealed=128, counting=2000)


def half(batch: BitsBatch) -> np.ndarray:
    return np.asarray(0.5 * (batch.high - batch.low))


def agree(found: dict[str, BitsBatch], names: list[str]) -> None:
    """Every two differ by at most four standard errors (an interval is two to either side), and say something."""
    for i, first in enumerate(names):
        for second in names[:i]:
            a, b = found[first], found[second]
            apart = np.abs(a.value - b.value)
            assert (apart <= 2 * np.hypot(half(a), half(b))).all(), f"{first} {a.value} and {second} {b.value}"


def test_mild_event_by_every_method(mild):
    assert ((mild.found["counting"].value > 6) & (mild.found["counting"].value < 9)).all()
    agree(mild.found, ["counting", "annealed", "splitting"])
    assert all((half(mild.found[name]) < 1).all() for name in ("counting", "annealed", "splitting"))
    assert (mild.bound > mild.found["counting"].high).all()
    assert (mild.bound < mild.found["counting"].value + 12).all()


def test_importance_is_right_or_says_that_it_is_starved(mild):
    """Where other weights blur the boundary a few draws carry the estimate: flagged, and taken over by annealing."""
    counted, weighed = mild.found["counting"], mild.found["importance"]
    starved = weighed.diagnostics["effective"] < 30
    flagged = np.array([any(f.name == "low_effective_sample_size" for f in row) for row in weighed.flags])
    assert (flagged == starved).all()
    apart = np.abs(weighed.value - counted.value)
    assert (apart <= 2 * np.hypot(half(weighed), half(counted))).all()


def test_rare_event_by_every_method_but_counting(rare):
    agree(rare.found, ["importance", "annealed", "splitting"])
    value = rare.found["annealed"].value[0]
    assert 25 < value < 45
    assert all(half(rare.found[name])[0] < 1.5 for name in ("importance", "annealed", "splitting"))
    assert rare.found["importance"].diagnostics["effective"][0] >= 30
    assert value < rare.bound[0] < value + 8
    # 2000 draws see nothing, and say so
    assert rare.found["counting"].kind[0] is Kind.CENSORED
    assert rare.found["counting"].value[0] < 11


def run_selection(case: Case, strength: float, steps: list[int]) -> tuple[list[np.ndarray], np.ndarray]:
    """What the real attack keeps after each part of its run, in ``REPEATS`` independent repetitions, and bits spent."""
    trainee, labels = case.trainee, case.trainee.splits["train"].labels
    clean = trainee.activations(trainee.original[None], "train")
    shown = np.broadcast_to(clean, (REPEATS, *clean.shape[1:]))
    targets = targets_from([[case.probes] * REPEATS], shown, labels)
    attack = SelectBest()
    state = attack.start(trainee, np.full(REPEATS, strength), 7)
    kept = []
    for part in steps:
        state, _ = attack.advance(trainee, state, targets, part)
        kept.append(attack.weights(trainee, state))
    return kept, attack.spent(trainee, state)


@pytest.fixture(scope="module")
def selection(mild) -> dict[str, np.ndarray]:
    """``candidates (N, repeats, models)``: which of the candidates break; ``chosen (log2 N + 1, repeats, models)``."""
    # the benign cell keeps the latest candidate without looking: one step at a time it shows them all
    every, _ = run_selection(mild, 0.0, [1] * 2**LOG2_N)
    doubling = [1, *(2**k for k in range(LOG2_N))]
    best, spent = run_selection(mild, 1.0, doubling)
    assert (spent == LOG2_N).all()
    return {
        "candidates": np.stack([mild.broken(w) for w in every]),
        "chosen": np.stack([mild.broken(w) for w in best]),
        "weights": np.stack(every),
        "best": np.stack(best),
    }


def test_one_of_n_breaks_as_often_as_the_bits_say(mild, selection):
    """``1 - (1 - 2^-B)^N``, B counted with another generator."""
    p = 2.0 ** -mild.found["counting"].value
    any_broke = np.maximum.accumulate(selection["candidates"], axis=0)
    for k in range(LOG2_N + 1):
        n = 2**k
        predicted = 1 - (1 - p) ** n
        # relative error of p from counting, carried over
        carried = n * (1 - p) ** (n - 1) * np.sqrt(p / COUNTED)
        error = np.hypot(np.sqrt(predicted * (1 - predicted) / REPEATS), carried)
        assert (np.abs(any_broke[n - 1].mean(axis=0) - predicted) < 4 * error + 1 / REPEATS).all(), f"N = {n}"
    assert (any_broke[-1].mean(axis=0) > 0.2).all()


def test_the_one_that_is_kept_breaks_as_often_as_its_rank_says(mild, selection):
    """The attack cannot see the event and picks by its own evasion loss: it breaks the probe as often as that ranking
    predicts from other prior draws, and never more often than the bits allow."""
    any_broke = np.maximum.accumulate(selection["candidates"], axis=0)
    chosen = selection["chosen"]
    rank = predicted_by_rank(mild, 2**LOG2_N)
    for k in range(LOG2_N + 1):
        # whoever kept a breaking candidate had one
        assert not (chosen[k] & ~any_broke[2**k - 1]).any()
    share = chosen[-1].mean(axis=0)
    draws_error = np.sqrt(rank * (1 - rank) * 2**LOG2_N / COUNTED)
    error = np.hypot(np.sqrt(rank * (1 - rank) / REPEATS), draws_error)
    assert (np.abs(share - rank) < 4 * error).all(), f"{share} of the chosen broke, their ranks predict {rank}"
    # choosing is worth something: far more than no choice, and 2^-(B - k) is not exceeded
    p = 2.0 ** -mild.found["counting"].value
    assert (share > 5 * p).all()
    assert (share <= 2**LOG2_N * p + 4 * error).all()


def predicted_by_rank(case: Case, n: int) -> np.ndarray:
    """``(models,)`` chance that the best of n by evasion breaks, from ``COUNTED`` other draws."""
    import jax

    trainee = case.trainee
    rng = np.random.default_rng(np.random.SeedSequence(11))
    labels = trainee.splits["train"].labels
    clean = trainee.activations(trainee.original[None], "train")
    targets = targets_from([[case.probes]], clean, labels)
    out = []
    for m in range(trainee.n_models):
        arrays = jax.tree.map(lambda leaf, m=m: leaf[0, m], [dict(a) for a in targets.arrays])
        loss = evade_positives(trainee.organism, trainee.unravel, targets.recipes, arrays, jax.random.key(7), 512)
        evade = jax.jit(jax.vmap(loss))
        evasion, broke = [], []
        for _ in range(COUNTED // 4000):
            z = rng.standard_normal((4000, 1, trainee.n_parameters), dtype=np.float32)
            draws = trainee.original + trainee.sigma * z
            evasion.append(np.asarray(evade(draws[:, m])))
            broke.append(case.broken(draws)[:, m])
        order = np.argsort(np.concatenate(evasion))
        # the i-th best of the draws is the best of n with chance (1 - i/M)^n - (1 - (i+1)/M)^n
        left = (1 - np.arange(COUNTED + 1) / COUNTED) ** n
        out.append(float(-np.diff(left) @ np.concatenate(broke)[order]))
    return np.array(out)


def test_paper_needs_fewer_bits_than_oracle(organism):
    """What reads a feature that behaviour hardly needs must break first, and by far."""
    trainee = OrganismTrainee(organism, scale_factor=1.2)
    found = {
        name: measure_weight_bits(trainee, defence_of(trainee, name, (), (), 0).panel[name], scales=())
        for name in ("paper", "oracle")
    }
    for m in range(organism.n_models):
        paper, oracle = (found[name].models[m] for name in ("paper", "oracle"))
        assert paper.kind is Kind.ESTIMATE
        assert paper.high + 20 < oracle.low
        assert paper.value <= found["paper"].bounds[m]


def test_what_no_move_can_do_is_no_number(rare):
    """AUROC below 0.001 with behaviour kept: every answer is a limit, none an estimate."""
    event = replace(rare.event, tau=np.full(2, 1e-3))
    state = event.limit_state
    centres = np.repeat(rare.centres, 2, axis=0)
    for found in (
        MonteCarlo(n_samples=500)(state, seed=0),
        Importance(n_particles=512)(state, seed=0, centres=centres),
        Annealed(n_particles=16)(state, seed=0, centres=centres),
        SubsetSimulation(n_particles=32, n_runs=2, n_moves=2, max_bits=20)(state, seed=0),
    ):
        assert all(kind is Kind.CENSORED for kind in found.kind), found.method
        assert (found.high == math.inf).all()
    assert (EvidenceBound(n_particles=256)(state, seed=0, centres=centres).value == math.inf).all()
