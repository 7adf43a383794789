"""The gradient attack's walk along the boundary, where the search from several starts stops early."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from known_answers import KNOWN

from elk_stress.attacks.gradient import Gradient
from elk_stress.estimators.limit_state import LimitState, from_function
from elk_stress.testbeds.linear import Linear
from elk_stress.thoughts.attacks.protocol import Oracle
from elk_stress.thoughts.attacks.target import attack_target
from elk_stress.thoughts.baseline import Baseline, baseline_of
from elk_stress.thoughts.events import linear_weight, nearest_kept, nearest_of_linear
from elk_stress.thoughts.prepared import Prepared, fit_probe, prepare
from elk_stress.threats.threat import Threat


def search(
    limit_state: LimitState, budget: int = 2000, seed: int = 0, **options: Any
) -> tuple[np.ndarray, np.ndarray, Oracle]:
    """The proposals, the length of each problem's first one (NaN: it does not fail), and the oracle."""
    oracle = Oracle(limit_state, "gradient", budget)
    moves = Gradient(**options).propose(oracle, seed=seed).moves
    fails = limit_state.value(np.arange(limit_state.n_problems), moves[:, :1])[:, 0] <= 0
    return moves, np.where(fails, np.linalg.norm(moves[:, 0], axis=-1), np.nan), oracle


def heavy_half_spaces(n_problems: int = 12, dim: int = 9, rate: float = 0.5) -> tuple[LimitState, np.ndarray]:
    """Half-spaces at 5 to 9 whose last coordinate z scales the others by ``exp(rate z)``, and the exact distances: the
    least of ``t^2 + z^2`` on the curve ``t exp(rate z) = offset``."""
    rng = np.random.default_rng(np.random.SeedSequence([31, dim]))
    weight = rng.standard_normal((n_problems, dim - 1))
    weight /= np.linalg.norm(weight, axis=1, keepdims=True)
    offset = np.linspace(5.0, 9.0, n_problems)

    def function(p: Any, u: Any) -> Any:
        return offset[p][:, None] - np.exp(rate * u[..., -1]) * np.einsum("pnk,pk->pn", u[..., :-1], weight[p])

    def gradient(p: Any, u: Any) -> Any:
        scale = np.exp(rate * u[..., -1:])
        along = np.einsum("pnk,pk->pn", u[..., :-1], weight[p])[..., None]
        return np.concatenate([-scale * weight[p][:, None], -rate * scale * along], axis=-1)

    z = np.linspace(0.0, 9.0, 900_001)
    truth = [np.sqrt((b**2 * np.exp(-2 * rate * z) + z**2).min()) for b in offset]
    return LimitState(function, dim, n_problems, gradient=gradient), np.array(truth)


def test_walk_follows_a_curved_boundary_where_the_search_stopped() -> None:
    limit_state, truth = heavy_half_spaces()
    stopped, walked = (search(limit_state, walk=walk)[1] / truth for walk in (0, 8))
    # control: without the walk most are left far from the shortest point
    assert np.median(stopped) > 1.05
    assert walked.min() > 1 - 1e-6
    assert walked.max() < 1.001


@pytest.mark.parametrize("name", ["RP28", "RP89"])
def test_walk_ends_at_the_grids_shortest_failing_point(name: str) -> None:
    """A curved valley in badly scaled coordinates, and a parabola (nearest at (sqrt 7.5, 0.5), by elimination)."""
    limit_state = from_function(KNOWN[name].function, 2)
    _, (stopped,), _ = search(limit_state, walk=0)
    _, (walked,), _ = search(limit_state)
    angle = np.linspace(0, 2 * np.pi, 72_001)
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    assert (KNOWN[name].function(walked * (1 - 3e-4) * circle) > 0).all()
    assert stopped > walked * 1.0015


def test_walk_never_lengthens_and_keeps_failing() -> None:
    limit_state, _ = heavy_half_spaces()
    before, after = (search(limit_state, walk=walk)[0] for walk in (0, 8))
    problems = np.arange(len(after))
    assert (limit_state.value(problems, after) <= 0).all()
    lengths = np.linalg.norm(after, axis=-1)
    assert (lengths <= np.linalg.norm(before, axis=-1)).all()
    assert (np.diff(lengths, axis=1) >= 0).all()


@pytest.mark.parametrize("budget", [0, 1, 2, 5, 17, 40, 80, *range(90, 210, 10), 300, 700])
def test_never_asks_more_than_the_budget_nor_loses_what_was_found(budget: int) -> None:
    """Also where each gradient is paid for by finite differences. A walk that overdrew would lose the whole search."""
    analytic, _ = heavy_half_spaces()
    plain = LimitState(analytic.function, analytic.dim, analytic.n_problems)
    for limit_state in (analytic, plain):
        moves, walked, oracle = search(limit_state, budget)
        stopped = search(limit_state, budget, walk=0)[1]
        assert (oracle.queries + oracle.gradients).max() <= budget
        assert moves.shape == (12, 3, 9)
        assert np.isfinite(moves).all()
        found = np.isfinite(stopped)
        assert (walked[found] <= stopped[found]).all()


def test_walk_gets_what_is_left_and_stops_where_nothing_improves() -> None:
    limit_state, truth = heavy_half_spaces()
    few, plenty, more = (search(limit_state, budget) for budget in (150, 2000, 20_000))
    assert np.median(few[1] / truth) > np.median(plenty[1] / truth)
    np.testing.assert_array_equal(plenty[0], more[0])
    assert (more[2].queries + more[2].gradients).max() < 1500


def test_flat_half_spaces_cost_the_walk_next_to_nothing() -> None:
    """Already at the shortest point: one gradient tells so."""
    flat = LimitState(lambda p, u: 3.0 - u[..., 0], 6, 4, gradient=lambda p, u: -np.eye(6)[0] + 0 * u)
    without, with_walk = (search(flat, walk=walk)[2] for walk in (0, 8))
    np.testing.assert_array_equal(with_walk.queries, without.queries)
    assert (with_walk.gradients - without.gradients).max() <= 3


def test_deterministic_by_seed() -> None:
    limit_state, _ = heavy_half_spaces()
    one, two, other = (search(limit_state, seed=seed)[0] for seed in (3, 3, 4))
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, other)


UNMOVED = {
    "fails everywhere": lambda u: -1.0 + 0 * u[..., 0],
    "fails at the origin": lambda u: u[..., 0] - 1.0,
    "never fails": lambda u: 1.0 + 0 * u[..., 0],
    "fails far out": lambda u: np.where((u**2).sum(axis=-1) < 1.5, 1.0, -1.0),
}


@pytest.mark.parametrize("name", UNMOVED)
def test_what_fails_unmoved_or_has_no_slope_costs_the_walk_nothing(name: str) -> None:
    def state() -> LimitState:
        return from_function(
            UNMOVED[name], 3, gradient=lambda u: 0 * u + (name == "fails at the origin") * np.eye(3)[0]
        )

    stopped, walked = (search(state(), walk=walk) for walk in (0, 8))
    np.testing.assert_array_equal(walked[0], stopped[0])
    assert (walked[0][0, 0] == 0).all() == (name != "fails far out")
    np.testing.assert_array_equal(walked[2].queries, stopped[2].queries)
    assert (walked[2].gradients - stopped[2].gradients).max() <= 3


# -- the linear testbed, against what is known of it -------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    return prepare(Linear(), seed=0)


def baseline(prepared: Prepared, threat: Threat) -> Baseline:
    return baseline_of(prepared, fit_probe(prepared, "logistic"), threat, 0.05)


@pytest.mark.parametrize("prior", ["natural", "isotropic"])
@pytest.mark.parametrize("tail", ["student_t", "logistic"])
def test_heavy_tails_at_the_closed_form_distance(prepared: Prepared, tail: Any, prior: Any) -> None:
    target = attack_target(prepared, baseline(prepared, Threat(tail=tail, prior=prior)), None)
    truth = np.linalg.norm(nearest_of_linear(target.failed), axis=1)
    stopped, walked = (search(target.searched, walk=walk)[1] / truth for walk in (0, 8))
    assert np.median(stopped) > 1.05
    assert walked.min() > 1 - 1e-4
    assert walked.max() < 1.002


def test_heavy_tail_and_kept_behaviour_meet_in_the_corner(prepared: Prepared) -> None:
    """Against one multiplier per point of a grid over the scale; items nearer than the slack of single precision are
    left out."""
    where = baseline(prepared, Threat(tail="student_t", kept=True))
    target = attack_target(prepared, where, prepared.epsilon)
    assert prepared.behaviour is not None
    margin = where.margin[where.caught]
    weight = linear_weight(where.probe)
    assert weight is not None
    nearest = nearest_kept(where.prior, weight, margin, prepared.behaviour.factors(target.items), prepared.epsilon)
    truth = np.linalg.norm(nearest[:, 0], axis=1)
    chosen = np.flatnonzero(margin > np.median(margin))[:8]
    stopped, walked = (search(target.searched.select(chosen), walk=walk)[1] / truth[chosen] for walk in (0, 8))
    assert np.median(stopped) > 1.05
    assert walked.max() < 1.02
