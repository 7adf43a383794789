"""Every attack on activations passes the public suite; and the suite catches attacks that are wrong on purpose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
from known_answers import KNOWN

from elk_stress.core import registry
from elk_stress.estimators.limit_state import LimitState, both, from_function
from elk_stress.testing import check_attack, checks_for_attack
from elk_stress.thoughts.attacks.protocol import Access, Attack, Need, Oracle, Proposal, Scope

# those that move weights have a suite of their own, test_training_attacks, which also sees that none is left out
NAMES = [name for name in registry.names("attacks") if registry.load("attacks", name).scopes != ("weights",)]
CASES = [(name, check) for name in NAMES for check in checks_for_attack(registry.load("attacks", name))]


@pytest.mark.parametrize(("name", "check"), CASES, ids=lambda value: str(value))
def test_registered_attack(name: str, check: str) -> None:
    checks_for_attack(registry.load("attacks", name))[check]()


@pytest.mark.parametrize("name", NAMES)
def test_registered_under_its_own_name(name: str) -> None:
    attack = registry.load("attacks", name)
    assert isinstance(attack, Attack)
    assert attack.name == name


@dataclass(frozen=True)
class Broken:
    """A ray search with one fault planted."""

    fault: str
    name: ClassVar[str] = "broken"
    access: ClassVar[Access] = "gradient"
    scopes: ClassVar[tuple[Scope, ...]] = ("item", "universal")
    needs: ClassVar[tuple[Need, ...]] = ()
    priors: ClassVar[tuple[str, ...]] = ()

    def propose(self, oracle: Oracle, *, seed: int) -> Proposal:
        problems = np.arange(oracle.n_problems)
        if self.fault == "overspends":
            for _ in range(oracle.budget + 1):
                oracle.gradient(problems, np.zeros((oracle.n_problems, 1, oracle.dim)))
        origin = np.zeros((oracle.n_problems, 1, oracle.dim))
        if self.fault == "claims gradients it does not use":
            oracle.score(problems, origin)
            return Proposal(origin)
        g, slope = oracle.gradient(problems, origin)
        steep = np.maximum((slope**2).sum(axis=-1), 1e-30)[..., None]
        moves = np.where(steep > 1e-20, -slope * (g[..., None] * 1.001) / steep, 0.0)
        if self.fault == "one move for all":
            moves = np.broadcast_to(moves[:1], moves.shape)
        if self.fault == "too long":
            moves = moves * 3
        if self.fault == "flat":
            moves = moves[:, 0]
        if self.fault == "draws from numpy's global state":
            np.random.seed(seed % 2**32)  # noqa: NPY002
        if self.fault == "remembers the last problem":
            last = getattr(type(self), "last", 0.0)
            type(self).last = float(g.sum())  # type: ignore[attr-defined]
            moves = moves * (1 + 1e-6 * last)
        if self.fault == "knows three problems of six dimensions" and oracle.dim != 6:
            moves = np.concatenate([moves, moves], axis=-1)
        if self.fault == "unseeded":
            moves = moves + np.random.default_rng().standard_normal(moves.shape) * 1e-9
        if self.fault == "fails what cannot fail" and (g == 1).all():
            moves = np.full_like(moves, np.inf)
        if self.fault == "not a number":
            moves = moves * np.nan
        if self.fault == "the same draws for every seed":
            rng = np.random.default_rng(np.random.SeedSequence(0))
            return Proposal(rng.standard_normal((oracle.n_problems, 10, oracle.dim)), from_prior=True)
        if self.fault == "sells a search as prior draws":
            return Proposal(moves, from_prior=True)
        return Proposal(moves)


@dataclass(frozen=True)
class Needy(Broken):
    """Wants something that no oracle has."""

    needs: ClassVar[tuple[Need, ...]] = ("luck",)  # type: ignore[assignment]


@dataclass(frozen=True)
class Controlled(Broken):
    """Has a benign control of its own."""

    def control(self, oracle: Oracle, proposal: Proposal, *, seed: int) -> Proposal:
        if self.fault == "asks the probe":
            oracle.gradient(np.arange(oracle.n_problems), proposal.moves)
        return Proposal(-proposal.moves)


@dataclass(frozen=True)
class Picks(Broken):
    """Takes the lowest of the pool."""

    access: ClassVar[Access] = "score"
    needs: ClassVar[tuple[Need, ...]] = ("pool",)

    def propose(self, oracle: Oracle, *, seed: int) -> Proposal:
        if oracle.pool is None:
            raise ValueError("it chooses among a pool and got none")
        pool = oracle.pool[:, : oracle.budget]
        best = oracle.score(np.arange(oracle.n_problems), pool).argmin(axis=1)
        moves = pool[np.arange(oracle.n_problems), best][:, None]
        spent = np.full(oracle.n_problems, np.log2(pool.shape[1]))
        made_up = self.fault == "makes one up"
        return Proposal(moves * (1.01 if made_up else 1.0), spent=None if "spent" in self.fault else spent)


FAULTS = {
    "needs what nobody has": ("declarations", "needs"),
    "overspends": ("budget", "budget"),
    "claims gradients it does not use": ("access", "declare what it uses"),
    "one move for all": ("breaks_what_must_break", "does each problem get a move of its own"),
    "fails what cannot fail": ("does_not_break_what_holds", "not finite"),
    "too long": ("finds_the_nearest_failure", "the move has length"),
    "flat": ("proposals", "moves have shape"),
    "knows three problems of six dimensions": ("proposals", "moves have shape"),
    "not a number": ("proposals", "not finite"),
    "unseeded": ("deterministic", "two runs from one seed"),
    "remembers the last problem": ("deterministic", "two runs from one seed"),
    "draws from numpy's global state": ("deterministic", "numpy's global random state"),
    "sells a search as prior draws": ("draws_from_the_prior", "prior"),
    "the same draws for every seed": ("draws_from_the_prior", "the same for every seed"),
}


@pytest.mark.parametrize(("fault", "check", "says"), [(f, *row) for f, row in FAULTS.items()], ids=FAULTS)
def test_suite_catches(fault: str, check: str, says: str) -> None:
    kind = Needy if fault == "needs what nobody has" else Broken
    with pytest.raises((AssertionError, RuntimeError), match=says):
        checks_for_attack(kind(fault))[check]()


def test_every_check_has_been_seen_to_fail() -> None:
    below = {"chooses_from_the_pool", "control"}
    everything = checks_for_attack(Controlled("none")).keys() | checks_for_attack(Picks("none")).keys()
    assert {check for check, _ in FAULTS.values()} | below == everything


@pytest.mark.parametrize("fault", ["asks the probe", "none"])
def test_benign_control_asks_nothing(fault: str) -> None:
    check = checks_for_attack(Controlled(fault))["control"]
    if fault == "none":
        check()
        return
    with pytest.raises(AssertionError, match="its benign control asked the probe"):
        check()


@pytest.mark.parametrize(
    ("fault", "says"),
    [("none", ""), ("makes one up", "not in its problem's pool"), ("does not say what it spent", "reports spent")],
)
def test_choice_among_a_pool(fault: str, says: str) -> None:
    check = checks_for_attack(Picks(fault))["chooses_from_the_pool"]
    if fault == "none":
        check()
        return
    with pytest.raises(AssertionError, match=says):
        check()


def test_suite_passes_the_same_attack_without_a_fault() -> None:
    check_attack(Broken("none"))


def test_failure_names_the_attack_and_the_check() -> None:
    with pytest.raises(AssertionError, match=r"attack 'broken' fails the check 'proposals'"):
        check_attack(Broken("not a number"))


def test_undeclared_access_is_refused() -> None:
    @dataclass(frozen=True)
    class Modest(Broken):
        """Declares scores and asks for gradients."""

        access: ClassVar[Access] = "score"

    with pytest.raises(AssertionError, match=r"PermissionError.*declare the access it needs"):
        check_attack(Modest("none"))


# -- what only these four promise --------------------------------------------------------------------------------------


def _run(name: str, limit_state: LimitState, budget: int = 2000, seed: int = 0, **options: object) -> Proposal:
    attack = registry.load("attacks", name, **options)
    return attack.propose(Oracle(limit_state, attack.access, budget), seed=seed)


# nearest failure: RP31 at u = (0, 2), RP33 at (0, 0, 3), RP89 on its parabola, u1^2 = 7.5, RP110 at u1 = 4
NEAREST = {"RP31": 2.0, "RP33": 3.0, "RP89": 7.75**0.5, "RP110": 4.0}


@pytest.mark.parametrize(("name", "distance"), NEAREST.items(), ids=NEAREST)
def test_gradient_finds_the_design_point(name: str, distance: float) -> None:
    case = KNOWN[name]
    limit_state = from_function(case.function, case.dim)
    proposal = _run("gradient", limit_state)
    best = proposal.moves[:, 0]
    assert limit_state.value(np.zeros(1, dtype=int), best[:, None]) <= 0
    assert np.linalg.norm(best) == pytest.approx(distance, rel=1e-3)
    np.testing.assert_array_equal(proposal.centre, best)


def test_gradient_rp28_within_one_percent_of_the_grid() -> None:
    """RP28 is a curved valley in badly scaled coordinates; the truth is read off a polar grid."""
    case = KNOWN["RP28"]
    angle = np.linspace(0, 2 * np.pi, 7201)
    radius = np.linspace(5.0, 6.0, 1001)
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    fails = [bool((case.function(r * circle) <= 0).any()) for r in radius]
    truth = radius[fails.index(True)]
    best = _run("gradient", from_function(case.function, 2)).moves[0, 0]
    assert truth - 2e-3 < np.linalg.norm(best) < truth * 1.01


def _constrained(epsilon: float, rank: int = 16, dim: int = 64, n_problems: int = 20) -> tuple[LimitState, np.ndarray]:
    """Half-spaces at 3 with the quadratic shift kept below epsilon, and the exact distances (one multiplier each)."""
    from scipy.optimize import brentq

    rng = np.random.default_rng(np.random.SeedSequence(2))
    weight = rng.standard_normal((n_problems, dim))
    weight /= np.linalg.norm(weight, axis=1, keepdims=True)
    factor = rng.standard_normal((rank, dim)) / 8
    failed = LimitState(
        lambda p, u: 3 - np.einsum("pnk,pk->pn", u, weight[p]),
        dim,
        n_problems,
        gradient=lambda p, u: -np.broadcast_to(weight[p][:, None], u.shape),
    )
    kept = LimitState(
        lambda p, u: 0.5 * ((u @ factor.T) ** 2).sum(axis=-1) / epsilon - 1,
        dim,
        n_problems,
        gradient=lambda p, u: u @ factor.T @ factor / epsilon,
    )

    def shortest(w: np.ndarray) -> float:
        def at(multiplier: float) -> np.ndarray:
            x = np.linalg.solve(np.eye(dim) + multiplier * factor.T @ factor, w)
            return x * 3 / (w @ x)

        def excess(multiplier: float) -> float:
            return float(0.5 * ((factor @ at(multiplier)) ** 2).sum() - epsilon)

        return float(np.linalg.norm(at(0.0 if excess(0.0) <= 0 else brentq(excess, 0.0, 1e9))))

    return both(failed, kept), np.array([shortest(w) for w in weight])


@pytest.mark.parametrize("epsilon", [100.0, 0.5, 0.1])
def test_gradient_finds_the_corner_of_failed_and_kept(epsilon: float) -> None:
    limit_state, truth = _constrained(epsilon)
    best = _run("gradient", limit_state).moves[:, 0]
    assert (limit_state.value(np.arange(len(best)), best[:, None]) <= 0).all()
    ratio = np.linalg.norm(best, axis=-1) / truth
    assert ratio.min() > 1 - 1e-9
    assert ratio.max() < 1.005


def test_corner_is_really_farther_than_the_half_space() -> None:
    """Control of the test above: the constraint binds at 0.1 and not at 100."""
    np.testing.assert_allclose(_constrained(100.0)[1], 3.0)
    assert _constrained(0.1)[1].min() > 3.02


def test_gradient_matches_in_jax_and_torch() -> None:
    case = KNOWN["RP33"]
    in_jax = from_function(case.jax(), case.dim, backend="jax")
    in_torch = from_function(case.torch(), case.dim, backend="torch")
    for limit_state in (in_jax, in_torch):
        assert np.linalg.norm(_run("gradient", limit_state).moves[0, 0]) == pytest.approx(3.0, rel=1e-3)


def test_gradient_without_room_for_one_gradient_proposes_the_unmoved_point() -> None:
    limit_state = from_function(KNOWN["RP54"].function, 20)
    proposal = _run("gradient", limit_state, budget=10)
    np.testing.assert_array_equal(proposal.moves, 0.0)


def test_natural_thoughts_bounds_memory_and_keeps_problems_apart() -> None:
    limit_state = LimitState(lambda p, u: u[..., 0], 50, 40)
    moves = _run("natural_thoughts", limit_state, max_elements=20_000).moves
    assert moves.shape == (40, 10, 50)
    assert len(np.unique(moves[:, 0, 0])) == 40


def test_isotropic_noise_has_the_lengths_it_names() -> None:
    limit_state = LimitState(lambda p, u: 1.0 - u[..., 0] * 0, 30, 2)
    proposal = _run("isotropic_noise", limit_state, radii=(0.5, 2.0))
    np.testing.assert_allclose(np.linalg.norm(proposal.moves, axis=-1), [[0.5, 2.0]] * 2)


def test_best_of_n_takes_the_lowest_and_says_what_it_spent() -> None:
    rng = np.random.default_rng(np.random.SeedSequence(0))
    pool = rng.standard_normal((5, 64, 3))
    limit_state = LimitState(lambda p, u: u[..., 0], 3, 5)
    attack = registry.load("attacks", "best_of_n")
    proposal = attack.propose(Oracle(limit_state, attack.access, 1000, pool), seed=0)
    np.testing.assert_array_equal(proposal.moves[:, 0, 0], pool[..., 0].min(axis=1))
    np.testing.assert_array_equal(proposal.spent, 6.0)
    few = registry.load("attacks", "best_of_n", n=4).propose(Oracle(limit_state, "score", 1000, pool), seed=0)
    np.testing.assert_array_equal(few.spent, 2.0)
    with pytest.raises(ValueError, match="the pool holds 64"):
        registry.load("attacks", "best_of_n", n=65).propose(Oracle(limit_state, "score", 1000, pool), seed=0)
