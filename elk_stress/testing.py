"""Public conformance suites: run them on your own probe, attack or testbed.

    from elk_stress.testing import check_probe
    check_probe(MyProbe())                                       # raises AssertionError naming the failed check

    @pytest.mark.parametrize("check", checks_for_probe(MyProbe()).items(), ids=lambda item: item[0])
    def test_mine(check):                                        # or one test per check
        check[1]()

Each suite is a dictionary of named checks, chosen by what the object declares (a probe that learns must separate
planted classes, one that does not must not; an attack that reads gradients must find a half-space at three standard
deviations at about that distance). Each has controls: something planted that must be found, and something that must
not. An attack that moves weights has a suite of its own, which also takes a trainee:
``check_training_attack(MyAttack(), trainee)`` (:mod:`elk_stress.training.conformance`).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
import json
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from elk_stress.arrays import to_numpy
from elk_stress.attack import Access, Attack, Oracle, Proposal
from elk_stress.limit_state import LimitState
from elk_stress.probe import FittedProbe, Probe, as_fitted
from elk_stress.testbed import ContextSet, Testbed, check_splits
from elk_stress.training.conformance import check_training_attack as check_training_attack
from elk_stress.training.conformance import checks_for_training_attack as checks_for_training_attack

__all__ = [
    "PlantedClasses",
    "check_attack",
    "check_probe",
    "check_testbed",
    "check_training_attack",
    "checks_for_attack",
    "checks_for_probe",
    "checks_for_testbed",
    "checks_for_training_attack",
    "planted_classes",
]

Checks = dict[str, Callable[[], None]]

_ACCESS: tuple[Access, ...] = ("none", "label", "score", "gradient", "weights")


# -- probes ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlantedClasses:
    """Contrast pairs with a planted truth: what ``check_probe`` fits on and scores.

    Attributes:
        activations: ``(n, d)`` float64: a topic shared by a pair, the form (affirmed, negated), the truth, and noise.
        labels: ``(n,)``, 1 = positive.
        pairs: ``(n / 2, 2)`` row indices.
    """

    activations: np.ndarray
    labels: np.ndarray
    pairs: np.ndarray


def planted_classes(n_pairs: int = 160, dim: int = 16, *, separation: float = 4.0, seed: int = 0) -> PlantedClasses:
    """Classes ``separation`` noise standard deviations apart along one direction, orthogonal to the form's."""
    # the geometry is the same for every seed, so that one draw can train and another test
    basis, _ = np.linalg.qr(np.random.default_rng(np.random.SeedSequence(1)).standard_normal((dim, dim)))
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    truth, form, topics = basis[0], basis[1], basis[2:5]
    positive = np.arange(n_pairs) % 2
    topic = rng.standard_normal((n_pairs, len(topics))) @ topics
    halves = [
        topic + sign * form + np.outer(separation * (label - 0.5), truth) + rng.standard_normal((n_pairs, dim)) + 0.5
        for sign, label in ((1.0, positive), (-1.0, 1 - positive))
    ]
    rows = np.arange(n_pairs)
    return PlantedClasses(
        np.concatenate(halves), np.concatenate([positive, 1 - positive]), np.stack([rows, rows + n_pairs], axis=1)
    )


def check_probe(probe: Probe, *, seed: int = 0) -> list[str]:
    """Run every check that applies to ``probe`` and return their names.

    Raises:
        AssertionError: the first check that fails, by name.
    """
    return run_checks(f"probe {probe.name!r}", checks_for_probe(probe, seed=seed))


def checks_for_probe(probe: Probe, *, seed: int = 0) -> Checks:
    """The checks that apply to ``probe``, by name."""
    if probe.traits.tokens:
        return {"covered": lambda: _fail("no suite covers probes with the tokens trait yet")}
    data = planted_classes(seed=seed + 2)
    held_out = planted_classes(seed=seed + 3)

    def fit(on: PlantedClasses = data, labels: np.ndarray | None = None, seed: int = seed) -> FittedProbe:
        return as_fitted(probe, on.activations, on.labels if labels is None else labels, pairs=on.pairs, seed=seed)

    @functools.cache
    def reference() -> FittedProbe:
        return fit()

    def declarations() -> None:
        assert dataclasses.is_dataclass(probe), "a probe is a frozen dataclass of hyperparameters"
        assert type(probe).__dataclass_params__.frozen, "the dataclass must be frozen"
        assert probe.name, "it needs a name"
        assert (type(probe).__doc__ or "").strip(), "it needs a docstring: its first line is its description"

    def shapes() -> None:
        fitted = reference()
        dim = data.activations.shape[-1]
        for batch in ((), (1,), (7,), (2, 3), (0,)):
            size = int(np.prod(batch, dtype=int))
            scores = fitted.score(np.resize(data.activations, (size, dim)).reshape(*batch, dim))
            assert np.shape(scores) == batch, f"activations (*{batch}, d) gave scores of shape {np.shape(scores)}"
            assert np.isfinite(scores).all(), "a score is not finite"

    def rows_are_independent() -> None:
        fitted = reference()
        scores = fitted.score(data.activations)
        # not bit for bit: matrix products block differently for other shapes
        size = np.abs(scores).max() + 1.0
        alone = np.array([fitted.score(row) for row in data.activations[:5]])
        assert np.abs(alone - scores[:5]).max() < 1e-9 * size, "a row scores differently beside other rows"
        backwards = fitted.score(data.activations[::-1])[::-1]
        assert np.abs(backwards - scores).max() < 1e-9 * size, "scores depend on the order of the rows"

    def array_libraries() -> None:
        _same_in_every_library(reference(), data.activations[:6])

    def gradients() -> None:
        _gradients_agree(reference(), data.activations[:4])

    def save_and_load() -> None:
        fitted = reference()
        with tempfile.TemporaryDirectory() as folder:
            loaded = FittedProbe.load(fitted.save(folder))
        for name, value in fitted.parameters.items():
            read = loaded.parameters[name]
            same = read.dtype == value.dtype and read.shape == value.shape
            assert same, f"{name!r} was {value.dtype} {value.shape} and came back as {read.dtype} {read.shape}"
        before, after = fitted.score(data.activations), loaded.score(data.activations)
        assert np.array_equal(before, after), "a saved and loaded probe scores differently"
        single = data.activations.astype(np.float32)
        assert np.array_equal(fitted.score(single), loaded.score(single)), "it scores differently in float32"
        assert loaded.probe == fitted.probe, f"the recipe changed from {fitted.probe} to {loaded.probe}"

    def deterministic() -> None:
        state = repr(np.random.get_state())  # noqa: NPY002
        first, second = reference(), fit()
        for name in first.parameters:
            same = np.array_equal(first.parameters[name], second.parameters[name])
            assert same, f"two fits from one seed differ in {name!r}"
        assert repr(np.random.get_state()) == state, "it used numpy's global random state"  # noqa: NPY002

    def inputs_are_left_alone() -> None:
        frozen = PlantedClasses(*(_read_only(a) for a in (data.activations, data.labels, data.pairs)))
        fitted = fit(frozen)
        for name, value in fitted.parameters.items():
            assert isinstance(value, np.ndarray), f"parameter {name!r} is {type(value).__name__}, not a numpy array"
        before = {name: value.copy() for name, value in fitted.parameters.items()}
        fitted.score(frozen.activations)
        for name, value in fitted.parameters.items():
            assert np.array_equal(before[name], value), f"scoring changed parameter {name!r}"

    def learns() -> None:
        value = _auroc(reference().score(held_out.activations), held_out.labels)
        assert value >= 0.9, f"held-out AUROC {value:.3f} on classes four standard deviations apart; expected >= 0.9"
        value = _auroc(fit(labels=1 - data.labels).score(held_out.activations), held_out.labels)
        assert value <= 0.1, f"with flipped labels the AUROC is {value:.3f}; higher must mean more strongly positive"

    def does_not_learn() -> None:
        upright, flipped = reference(), fit(labels=1 - data.labels)
        same = np.array_equal(upright.score(held_out.activations), flipped.score(held_out.activations))
        assert same, "it declares learns=False but its scores depend on the labels"
        # 64 seeds in 16 dimensions: the mean AUROC of random directions has standard deviation about 0.03
        values = [_auroc(fit(seed=s).score(held_out.activations), held_out.labels) for s in range(64)]
        mean = float(np.mean(values))
        assert abs(mean - 0.5) < 0.15, f"it declares learns=False but its AUROC averages {mean:.3f} over seeds"

    def linear() -> None:
        _is_affine(reference(), data.activations.shape[-1])

    def rotation_equivariant() -> None:
        rotation = _rotation(data.activations.shape[-1], seed)
        turned = fit(PlantedClasses(data.activations @ rotation.T, data.labels, data.pairs))
        there, here = turned.score(held_out.activations @ rotation.T), reference().score(held_out.activations)
        gap = np.abs(there - here).max() / np.abs(here).max()
        assert gap < 1e-6, f"rotating activations before fitting changed scores by {gap:.1e} of their size"

    def bad_data_is_refused() -> None:
        spoilt = data.activations.copy()
        spoilt[3, 2] = np.nan
        _refuses(lambda: as_fitted(probe, spoilt, data.labels, pairs=data.pairs), "NaN")
        _refuses(lambda: as_fitted(probe, data.activations, np.ones_like(data.labels), pairs=data.pairs), "one class")
        _refuses(lambda: as_fitted(probe, np.ones_like(spoilt), data.labels, pairs=data.pairs), "constant")

    def width_mismatch_is_refused() -> None:
        dim = data.activations.shape[-1]
        fitted = reference()
        if fitted.dim is None:
            return
        message = _refuses(lambda: fitted.score(np.zeros((2, dim + 1))), "features")
        assert str(dim) in message, f"the message must name the width it was fitted on ({dim}), it says: {message}"
        assert str(dim + 1) in message, f"the message must name the width that came ({dim + 1}), it says: {message}"

    def pairs_are_required() -> None:
        _refuses(lambda: as_fitted(probe, data.activations, data.labels), "pairs")

    traits = probe.traits
    checks: Checks = {
        "declarations": declarations,
        "shapes": shapes,
        "rows_are_independent": rows_are_independent,
        "array_libraries": array_libraries,
        "save_and_load": save_and_load,
        "deterministic": deterministic,
        "inputs_are_left_alone": inputs_are_left_alone,
        "bad_data_is_refused": bad_data_is_refused,
        "width_mismatch_is_refused": width_mismatch_is_refused,
        ("learns" if traits.learns else "does_not_learn"): learns if traits.learns else does_not_learn,
    }
    if traits.differentiable:
        checks["gradients"] = gradients
    if traits.linear:
        checks["linear"] = linear
    if traits.rotation_equivariant:
        checks["rotation_equivariant"] = rotation_equivariant
    if traits.needs_pairs:
        checks["pairs_are_required"] = pairs_are_required
    return checks


def _same_in_every_library(fitted: FittedProbe, activations: np.ndarray) -> None:
    import jax.numpy as jnp
    import torch

    expected = fitted.score(activations)
    size = np.abs(expected).max() + np.abs(activations).max() + 1.0
    single = activations.astype(np.float32)
    copies: dict[str, tuple[Any, float]] = {
        "read-only numpy": (_read_only(activations), 1e-12),
        "float32 numpy": (single, 1e-4),
        "torch": (torch.tensor(activations), 1e-9),
        "float32 torch": (torch.tensor(single), 1e-4),
        "jax": (jnp.asarray(single), 1e-4),
    }
    # the strict reference comes with the test extra; without it the other libraries are checked all the same
    with suppress(ModuleNotFoundError):
        copies["array-api-strict"] = (importlib.import_module("array_api_strict").asarray(activations), 1e-9)
    for library, (copy, tolerance) in copies.items():
        scores = fitted.score(copy)
        assert type(scores).__module__.split(".")[0] == type(copy).__module__.split(".")[0], (
            f"{library}: activations are {type(copy)} but scores {type(scores)}; a score must not leave its library"
        )
        assert scores.dtype == copy.dtype, f"{library}: activations are {copy.dtype} but scores {scores.dtype}"
        gap = np.abs(to_numpy(scores) - expected).max()
        assert gap <= tolerance * size, f"{library}: scores differ from numpy's by {gap:.1e}"


def _gradients_agree(fitted: FittedProbe, activations: np.ndarray) -> None:
    import jax
    import jax.numpy as jnp
    import torch

    step = 1e-5
    expected = np.empty_like(activations)
    for axis in range(activations.shape[1]):
        shift = np.eye(activations.shape[1])[axis] * step
        expected[:, axis] = (fitted.score(activations + shift) - fitted.score(activations - shift)) / (2 * step)
    size = np.abs(expected).max() + 1e-3
    tensor = torch.tensor(activations, requires_grad=True)
    scores = fitted.score(tensor)
    assert scores.requires_grad, "torch: scores carry no gradient; the score left the autodiff graph"
    (slope,) = torch.autograd.grad(scores.sum(), tensor)
    gap = np.abs(slope.numpy() - expected).max()
    assert gap <= 1e-5 * size, f"torch: gradients differ from finite differences by {gap:.1e} (size {size:.1e})"
    traced = jax.jit(jax.grad(lambda x: fitted.score(x).sum()))(jnp.asarray(activations, dtype=jnp.float32))
    gap = np.abs(np.asarray(traced) - expected).max()
    assert gap <= 1e-4 * size, f"jax: gradients differ from finite differences by {gap:.1e} (size {size:.1e})"


def _is_affine(fitted: FittedProbe, dim: int) -> None:
    from hypothesis import given, settings
    from hypothesis import strategies as st

    weight, bias = fitted.parameters["weight"], fitted.parameters["bias"]
    assert weight.shape == (dim,), f"a linear probe has weight of shape ({dim},), got {weight.shape}"
    assert bias.shape == (), f"a linear probe has bias of shape (), got {bias.shape}"

    @settings(max_examples=30, deadline=None, database=None, derandomize=True)
    @given(st.integers(0, 2**32 - 1), st.floats(-3.0, 3.0))
    def holds(seed: int, share: float) -> None:
        rng = np.random.default_rng(np.random.SeedSequence(seed))
        x, y = rng.standard_normal((2, 5, dim))
        size = 1e-9 * (1.0 + np.abs(weight).sum() * 10 + abs(float(bias)) * 10)
        mixed = fitted.score(share * x + (1 - share) * y)
        gap = np.abs(mixed - (share * fitted.score(x) + (1 - share) * fitted.score(y))).max()
        assert gap <= size, f"it declares linear=True but score is not affine (off by {gap:.1e})"
        rotation = _rotation(dim, seed)
        turned = dataclasses.replace(fitted, parameters={**fitted.parameters, "weight": rotation @ weight})
        gap = np.abs(turned.score(x @ rotation.T) - fitted.score(x)).max()
        assert gap <= size, f"rotating activations and weight together changed scores by {gap:.1e}"

    holds()


# -- attacks -----------------------------------------------------------------------------------------------------------


def check_attack(attack: Attack, *, seed: int = 0) -> list[str]:
    """Run every check that applies to ``attack`` and return their names.

    Raises:
        AssertionError: the first check that fails, by name.
    """
    return run_checks(f"attack {attack.name!r}", checks_for_attack(attack, seed=seed))


def checks_for_attack(attack: Attack, *, seed: int = 0) -> Checks:
    """The checks that apply to ``attack``, by name."""
    dim = 6
    problems = {"item": 3, "universal": 1}

    def oracle(
        distance: float, n_problems: int, budget: int = 600, *, constant: bool = False, pool_size: int = 32
    ) -> _RecordingOracle:
        pool = None
        if "pool" in attack.needs:
            # alternatives of ordinary length, of which one (the last) fails the half-space of its problem
            rng = np.random.default_rng(np.random.SeedSequence(11))
            pool = rng.standard_normal((n_problems, pool_size, dim))
            weight = _directions(n_problems, dim)
            along = (pool * weight[:, None]).sum(axis=-1, keepdims=True)
            pool -= np.maximum(along - distance + 0.5, 0.0) * weight[:, None]
            pool[:, -1] = weight * (distance + 0.1)
            pool = _read_only(pool)
        return _RecordingOracle(_half_spaces(distance, n_problems, dim, constant), attack.access, budget, pool)

    def propose(asked: Oracle, with_seed: int = seed) -> Proposal:
        return attack.propose(asked, seed=with_seed)

    def declarations() -> None:
        assert dataclasses.is_dataclass(attack), "an attack is a frozen dataclass of hyperparameters"
        assert type(attack).__dataclass_params__.frozen, "the dataclass must be frozen"
        assert attack.access in _ACCESS, f"access {attack.access!r} is none of {', '.join(_ACCESS)}"
        assert attack.scopes, "it must work in at least one scope"
        assert set(attack.scopes) <= set(problems), f"scopes {attack.scopes} are none of item, universal"
        assert (type(attack).__doc__ or "").strip(), "it needs a docstring: its first line is its description"

    def proposals() -> None:
        for scope in attack.scopes:
            _well_formed(propose(oracle(3.0, problems[scope])), problems[scope], dim)

    def budget() -> None:
        for limit in (7, 40, 600):
            asked = oracle(3.0, problems[attack.scopes[0]], limit)
            _well_formed(propose(asked), asked.n_problems, dim)
            spent = int((asked.queries + asked.gradients).max())
            assert spent <= limit, f"it spent {spent} of a budget of {limit}"

    def access() -> None:
        asked = oracle(3.0, problems[attack.scopes[0]])
        propose(asked)
        most = max(asked.asked, key=_ACCESS.index, default="none")
        assert most == attack.access or attack.access == "weights", (
            f"it declares {attack.access!r} access and used {most!r}; declare what it uses, no less and no more"
        )

    def deterministic() -> None:
        state = repr(np.random.get_state())  # noqa: NPY002
        first, second = (propose(oracle(3.0, problems[attack.scopes[0]])) for _ in range(2))
        assert np.array_equal(first.moves, second.moves), "two runs from one seed propose different moves"
        assert repr(np.random.get_state()) == state, "it used numpy's global random state"  # noqa: NPY002

    def breaks_what_must_break() -> None:
        """Every attack within reach of an easy half-space; each problem has a direction of its own."""
        for scope in attack.scopes:
            asked = oracle(0.5, problems[scope])
            failed = asked.true_value(propose(asked).moves) <= 0
            assert failed.any(axis=1).all(), (
                f"a half-space at half a standard deviation held in {int((~failed.any(axis=1)).sum())} of "
                f"{len(failed)} problems ({scope} scope); does each problem get a move of its own?"
            )

    def finds_the_nearest_failure() -> None:
        asked = oracle(3.0, problems[attack.scopes[0]])
        proposal = propose(asked)
        best = proposal.moves[:, 0]
        assert (asked.true_value(best[:, None]) <= 0).all(), "the half-space at 3 sigma held against its first proposal"
        length = np.linalg.norm(best, axis=-1)
        assert length.max() <= 3.0 * 1.05, f"the half-space lies at 3 but the move has length {length.max():.3f}"

    def does_not_break_what_holds() -> None:
        asked = oracle(1.0, problems[attack.scopes[0]], constant=True)
        proposal = propose(asked)
        _well_formed(proposal, asked.n_problems, dim)
        assert (asked.true_value(proposal.moves) > 0).all(), "g = 1 everywhere and yet a move failed"

    def draws_from_the_prior() -> None:
        asked = oracle(1.0, problems[attack.scopes[0]])
        runs = [propose(oracle(1.0, problems[attack.scopes[0]]), with_seed=s) for s in range(40)]
        if not all(run.from_prior for run in runs):
            assert not any(run.from_prior for run in runs), "whether moves are draws from the prior must not vary"
            return
        moves = np.concatenate([run.moves for run in runs], axis=1)
        # false alarm of each: five standard deviations
        share, n = float((asked.true_value(moves) <= 0).mean()), moves.shape[0] * moves.shape[1]
        expected = 0.15865525393145707
        assert abs(share - expected) < 5 * np.sqrt(expected * (1 - expected) / n), (
            f"{share:.3f} of {n} draws lie beyond one standard deviation; the prior says {expected:.3f}"
        )
        square = float((moves**2).mean())
        assert abs(square - 1) < 5 * np.sqrt(2 / moves.size), f"draws have variance {square:.3f}, not 1"

    def chooses_from_the_pool() -> None:
        asked = oracle(3.0, problems[attack.scopes[0]])
        proposal = propose(asked)
        assert asked.pool is not None
        for row in range(asked.n_problems):
            own = (asked.pool[row][None] == proposal.moves[row][:, None]).all(axis=-1).any(axis=1)
            assert own.all(), "it proposed a move that is not in its problem's pool"
        assert proposal.spent is not None, "an attack that chooses among n alternatives reports spent = log2 n"
        most = np.log2(asked.pool.shape[1])
        assert (proposal.spent <= most + 1e-12).all(), f"it reports {proposal.spent.max()} bits but log2 n = {most}"
        _refuses(lambda: propose(_RecordingOracle(_half_spaces(3.0, 1, dim, False), attack.access, 600)), "pool")

    if "mind" in attack.needs:
        from elk_stress.mind_conformance import checks_for_mind

        return {"declarations": declarations, **checks_for_mind(attack, _well_formed, seed=seed)}
    checks: Checks = {
        "declarations": declarations,
        "proposals": proposals,
        "budget": budget,
        "access": access,
        "deterministic": deterministic,
        "breaks_what_must_break": breaks_what_must_break,
        "does_not_break_what_holds": does_not_break_what_holds,
    }
    if attack.access in ("gradient", "weights"):
        checks["finds_the_nearest_failure"] = finds_the_nearest_failure
    if "pool" in attack.needs:
        checks["chooses_from_the_pool"] = chooses_from_the_pool
    else:
        checks["draws_from_the_prior"] = draws_from_the_prior
    return checks


class _RecordingOracle(Oracle):
    """An oracle that remembers which questions were asked; the suite looks past it at the true value."""

    def __init__(self, limit_state: LimitState, access: Access, budget: int, pool: np.ndarray | None = None) -> None:
        super().__init__(limit_state, access, budget, pool)
        self.asked: set[Access] = set()
        self._truth = limit_state

    def _need(self, access: Access) -> None:
        super()._need(access)
        self.asked.add(access)

    def true_value(self, moves: np.ndarray) -> np.ndarray:
        """g at ``(problems, n, dim)``, uncounted."""
        return self._truth.value(np.arange(self.n_problems), moves)


def _directions(n_problems: int, dim: int) -> np.ndarray:
    draws = np.random.default_rng(np.random.SeedSequence(5)).standard_normal((n_problems, dim))
    return np.asarray(draws / np.linalg.norm(draws, axis=1, keepdims=True))


def _half_spaces(distance: float, n_problems: int, dim: int, constant: bool) -> LimitState:
    """``g = distance - w_i . u`` with a direction for each problem, or ``g = 1`` everywhere."""
    weight = _directions(n_problems, dim) * (0.0 if constant else 1.0)
    offset = 1.0 if constant else distance
    return LimitState(
        function=lambda p, u: offset - np.einsum("pnk,pk->pn", u, weight[p]),
        dim=dim,
        n_problems=n_problems,
        gradient=lambda p, u: np.broadcast_to(-weight[p][:, None], u.shape),
    )


def _well_formed(proposal: Proposal, n_problems: int, dim: int) -> None:
    moves = proposal.moves
    good = moves.ndim == 3 and moves.shape[0] == n_problems and moves.shape[1] >= 1 and moves.shape[2] == dim
    assert good, f"moves have shape {moves.shape}; expected (problems={n_problems}, candidates >= 1, dim={dim})"
    assert np.isfinite(moves).all(), "a proposed move is not finite"
    if proposal.centre is not None:
        shape = proposal.centre.shape
        assert shape == (n_problems, dim), f"centre has shape {shape}; expected ({n_problems}, {dim})"
        assert np.isfinite(proposal.centre).all(), "the centre is not finite"
    if proposal.spent is not None:
        assert proposal.spent.shape == (n_problems,), f"spent has shape {proposal.spent.shape}, not ({n_problems},)"
        assert (proposal.spent >= 0).all(), "it spent a negative number of bits"


# -- testbeds ----------------------------------------------------------------------------------------------------------


def check_testbed(testbed: Testbed, *, n_items: int = 6, seed: int = 0) -> list[str]:
    """Run every check on ``testbed`` (prepared first) and return their names; ``n_items`` are moved for each.

    Raises:
        AssertionError: the first check that fails, by name.
    """
    return run_checks(f"testbed {testbed.name!r}", checks_for_testbed(testbed, n_items=n_items, seed=seed))


def checks_for_testbed(testbed: Testbed, *, n_items: int = 6, seed: int = 0) -> Checks:
    """The checks of a testbed, by name. Each prepares it first, which is cheap after the first time."""
    names = ("train", "calibration", "test")

    def moves(rows: np.ndarray, count: int) -> np.ndarray:
        """Natural moves ``(items, count, dim)``: from an item's mean to itself under one context."""
        prior = testbed.activations("test", "prior")[rows].astype(float)
        rng = np.random.default_rng(np.random.SeedSequence(seed))
        chosen = rng.choice(prior.shape[1], count, replace=count > prior.shape[1])
        return np.asarray((prior - prior.mean(axis=1, keepdims=True))[:, chosen])

    def some_items() -> np.ndarray:
        size = len(testbed.splits["test"])
        rng = np.random.default_rng(np.random.SeedSequence(seed))
        return np.sort(rng.choice(size, min(n_items, size), replace=False))

    def declarations() -> None:
        testbed.prepare()
        assert isinstance(testbed, Testbed), "it lacks a part of the Testbed protocol"
        assert set(testbed.splits) == set(names), f"splits are {sorted(testbed.splits)}, not {', '.join(names)}"
        assert testbed.site, "it must say where activations are read"
        assert testbed.shift_cost in ("exact", "model"), f"shift_cost is {testbed.shift_cost!r}"
        json.dumps(testbed.describe())

    def grouping() -> None:
        testbed.prepare()
        leaked = check_splits(testbed.splits)
        assert not leaked, f"{len(leaked)} entities occur in more than one split, e.g. {leaked[:3]}"
        seen = [name for items in testbed.splits.values() for name in items.ids]
        assert len(seen) == len(set(seen)), "item ids are not unique"

    def items() -> None:
        testbed.prepare()
        for name, part in testbed.splits.items():
            assert part.labels.shape == part.groups.shape == (len(part),), f"{name}: labels or groups do not fit"
            assert set(np.unique(part.labels).tolist()) == {0, 1}, f"{name}: labels must hold both 0 and 1"
            assert part.texts is None or len(part.texts) == len(part), f"{name}: one text per item"
            if part.pairs is not None:
                one, other = part.pairs[:, 0], part.pairs[:, 1]
                assert part.pairs.min() >= 0, f"{name}: pairs point before the first item"
                assert part.pairs.max() < len(part), f"{name}: pairs point past the last item"
                assert (part.labels[one] + part.labels[other] == 1).all(), f"{name}: a pair must have one positive"
                assert (part.groups[one] == part.groups[other]).all(), f"{name}: a pair crosses entities"

    def activations() -> None:
        testbed.prepare()
        for name, part in testbed.splits.items():
            kinds: tuple[ContextSet, ...] = ("prior", "observed", "bare")
            contexts = {kind: testbed.activations(name, kind) for kind in kinds}
            for kind, array in contexts.items():
                good = array.ndim == 3 and len(array) == len(part) and array.shape[2] == testbed.dim
                assert good, f"{name}/{kind}: shape {array.shape}, expected ({len(part)}, contexts, {testbed.dim})"
                assert array.dtype == np.float32, f"{name}/{kind}: {array.dtype}, expected float32"
                assert np.isfinite(array).all(), f"{name}/{kind}: NaN or inf"
                assert np.ptp(array, axis=0).max() > 0, f"{name}/{kind}: the same for every item"
            assert contexts["prior"].shape[1] >= 2, f"{name}: a prior needs at least two contexts"
            assert contexts["bare"].shape[1] == 1, f"{name}: the bare item is one context"
            again = testbed.activations(name, "prior")
            assert np.array_equal(contexts["prior"], again), f"{name}: reading twice gives other activations"

    def truth_is_there() -> None:
        testbed.prepare()
        train, test = testbed.activations("train", "prior"), testbed.activations("test", "prior")
        labels = np.repeat(testbed.splits["train"].labels, train.shape[1])
        fitted = as_fitted("logistic", train.reshape(-1, testbed.dim), labels)
        value = _auroc(fitted.score(test).mean(axis=1), testbed.splits["test"].labels)
        assert value >= 0.65, f"held-out AUROC of logistic regression is {value:.3f}: there is nothing to probe for"

    def shift_at_zero() -> None:
        testbed.prepare()
        rows = some_items()
        shift = testbed.shift("test", rows, np.zeros((len(rows), 2, testbed.dim)))
        assert shift.shape == (len(rows), 2), f"shift has shape {shift.shape}, expected ({len(rows)}, 2)"
        assert np.abs(shift).max() < 1e-4, f"the unmoved item shifts by {np.abs(shift).max():.1e} nats, not 0"

    def shift_grows() -> None:
        testbed.prepare()
        rows = some_items()
        natural = moves(rows, 2)
        medians = [float(np.median(testbed.shift("test", rows, scale * natural))) for scale in (0.25, 0.5, 1.0, 2.0)]
        assert np.isfinite(medians).all(), "a shift is not finite"
        assert all(a < b for a, b in itertools.pairwise(medians)), (
            f"the median shift of moves 0.25, 0.5, 1 and 2 times a natural one is {medians}; it must grow"
        )
        again = float(np.median(testbed.shift("test", rows, 2.0 * natural)))
        assert again == medians[-1], "shift is not deterministic"

    def factor_agrees() -> None:
        testbed.prepare()
        rows = some_items()
        factor = np.asarray(testbed.shift_factor("test", rows), dtype=float)
        good = factor.ndim == 3 and factor.shape[0] == len(rows) and factor.shape[2] == testbed.dim
        assert good, f"shift_factor has shape {factor.shape}, expected ({len(rows)}, rank, {testbed.dim})"
        natural = moves(rows, 2)
        predicted = 0.5 * (np.einsum("prd,pnd->pnr", factor, natural) ** 2).sum(axis=-1)
        assert (predicted > 0).all(), "the factor says that a natural move does not shift behaviour at all"
        # scaled to a predicted hundredth of a nat: small enough for the quadratic form, above float32's rounding
        small = natural * np.sqrt(0.01 / predicted)[..., None]
        ratio = testbed.shift("test", rows, small) / 0.01
        middle = float(np.median(ratio))
        assert 0.6 < middle < 1.6, f"the true shift of small moves is {middle:.2f} times the factor's; expected about 1"

    def known_probes() -> None:
        testbed.prepare()
        bare = testbed.activations("test", "bare")[:, 0]
        for name, probe in testbed.known_probes().items():
            assert isinstance(probe, FittedProbe), f"known probe {name!r} is {type(probe).__name__}, not a FittedProbe"
            assert np.isfinite(probe.score(bare)).all(), f"known probe {name!r} does not score the testbed"

    return {
        "declarations": declarations,
        "grouping": grouping,
        "items": items,
        "activations": activations,
        "truth_is_there": truth_is_there,
        "shift_at_zero": shift_at_zero,
        "shift_grows": shift_grows,
        "factor_agrees": factor_agrees,
        "known_probes": known_probes,
    }


# -- shared ------------------------------------------------------------------------------------------------------------


def run_checks(what: str, checks: Checks) -> list[str]:
    """Run all checks and return their names; the first that fails is named, with ``what`` it was that failed it."""
    for name, check in checks.items():
        try:
            check()
        except Exception as error:
            reason = str(error) if isinstance(error, AssertionError) else f"it raised {type(error).__name__}: {error}"
            raise AssertionError(f"{what} fails the check {name!r}: {reason}") from error
    return list(checks)


def _fail(reason: str) -> None:
    raise AssertionError(reason)


def _refuses(action: Callable[[], Any], word: str) -> str:
    """The message of the ValueError that ``action`` must raise; it must contain ``word``."""
    try:
        action()
    except ValueError as refusal:
        message = str(refusal)
    else:
        raise AssertionError(f"bad input was accepted; expected a ValueError that speaks of {word!r}")
    assert word in message, f"the error should speak of {word!r} but says: {message}"
    return message


def _read_only(array: np.ndarray) -> np.ndarray:
    copy = array.copy()
    copy.flags.writeable = False
    return copy


def _rotation(dim: int, seed: int) -> np.ndarray:
    draws = np.random.default_rng(np.random.SeedSequence([seed, 7])).standard_normal((dim, dim))
    return np.asarray(np.linalg.qr(draws)[0])


def _auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Chance that a positive scores above a negative; ties count half."""
    from scipy.stats import rankdata

    positive = np.asarray(labels) == 1
    n_high, n_low = int(positive.sum()), int((~positive).sum())
    ranks = rankdata(np.asarray(scores))[positive].sum()
    return float((ranks - n_high * (n_high + 1) / 2) / (n_high * n_low))
