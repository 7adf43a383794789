"""Splitting: known answers, censoring, flags, reproducibility, and the theorem behind its kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from known_answers import KNOWN, half_space
from scipy import stats

from elk_stress.core.bits import Kind
from elk_stress.estimators.limit_state import LimitState, from_function
from elk_stress.estimators.splitting_kernels import KERNELS, Moved, Normals, Scratch
from elk_stress.estimators.subset_simulation import SubsetSimulation

# the multimodal trap is judged by its flag, below
SMOOTH = [name for name in KNOWN if name != "RP110"]


@pytest.mark.parametrize("name", SMOOTH)
def test_known_answers(name: str) -> None:
    case = KNOWN[name]
    bits = SubsetSimulation(n_particles=300, n_runs=6)(from_function(case.function, case.dim), seed=11)[0]
    half = stats.t.ppf(0.975, 5)
    error = (bits.high - bits.low) / (2 * half)
    # 6 runs: |t_5| < 5 but for 0.4%
    assert abs(bits.value - case.bits) < 5 * max(error, 0.02)
    assert bits.kind is Kind.ESTIMATE
    assert bits.flags == ()


@pytest.mark.parametrize("beta", [12.0, 19.9])
def test_a_half_space_in_512_dimensions_to_290_bits(beta: float) -> None:
    case = half_space(512, beta)
    batch = SubsetSimulation(100, kernel="elliptical_slice", n_runs=2, n_moves=8)(
        from_function(case.function, 512, dtype="float32"), seed=2
    )
    error = np.sqrt(batch.diagnostics["ideal_variance"].mean() / 2)
    assert abs(batch.value[0] - case.bits) < 3 * error
    assert batch.low[0] <= case.bits <= batch.high[0]


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_the_same_answer_from_jax_and_torch(backend: str) -> None:
    case = KNOWN["RP31"]
    state = from_function(getattr(case, backend)(), case.dim, backend=backend)
    bits = SubsetSimulation(200, n_runs=4)(state, seed=3)[0]
    assert bits.low <= case.bits <= bits.high


LEVEL = 3.0
STEPS = {"elliptical_slice": 1.5, "pcn": 0.5}


def moved_far(move: Callable[..., Moved], dim: int, n_moves: int, step: float) -> tuple[np.ndarray, np.ndarray]:
    """10,000 exact draws from the normal beyond u_0 > LEVEL, and where a kernel moves them."""
    rng = np.random.default_rng(0)
    rows, n = 20, 500
    u = rng.standard_normal((rows, n, dim))
    u[..., 0] = stats.norm.isf(rng.random((rows, n)) * stats.norm.sf(LEVEL))
    before = u.reshape(-1, dim).copy()
    moved = move(
        u,
        LEVEL - u[..., 0],
        np.zeros(rows),
        np.full(rows, step),
        n_moves,
        lambda rows, points: LEVEL - points[..., 0],
        Normals(np.random.SeedSequence(1), np.dtype(float)),
        Scratch(np.dtype(float)),
    )
    np.testing.assert_array_equal(moved.g, LEVEL - moved.u[..., 0])
    return before, moved.u.reshape(-1, dim)


def stationary_p(u: np.ndarray) -> float:
    """The least p-value of: the truncated normal along, the normal and the length across, independence of the two.

    The length across sees what single coordinates hide: a spread that is wrong by 1% in each of them.
    """
    length = (u[:, 1:] ** 2).sum(axis=1)
    return float(
        min(
            stats.kstest(u[:, 0], stats.truncnorm(LEVEL, np.inf).cdf).pvalue,
            stats.kstest(u[:, 1], stats.norm.cdf).pvalue,
            stats.kstest(length, stats.chi2(u.shape[1] - 1).cdf).pvalue,
            stats.spearmanr(u[:, 0], length).pvalue,
            stats.pearsonr(u[:, 1], u[:, 2]).pvalue,
        )
    )


# 32 and 64 coordinates: the slice kernel recycles its normal vectors, here for two rounds of 8 moves
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("n_moves", "dim", "overlap"), [(1, 8, 0.98), (16, 8, 0.8), (16, 32, 0.8), (16, 64, 0.8)])
def test_kernels_leave_the_restricted_prior_invariant(kernel: str, n_moves: int, dim: int, overlap: float) -> None:
    before, after = moved_far(KERNELS[kernel].move, dim, n_moves, STEPS[kernel])
    assert (after[:, 0] > LEVEL).all()
    # it moved, along and across
    for i in (0, 1):
        assert np.corrcoef(before[:, i], after[:, i])[0, 1] < overlap
    assert stationary_p(before) > 1e-4
    assert stationary_p(after) > 1e-4


def test_a_kernel_that_spreads_by_a_percent_is_seen() -> None:
    def spreading(*args: Any) -> Moved:
        moved = KERNELS["pcn"].move(*args)
        moved.u[..., 1:] *= 1.01
        return moved

    _, after = moved_far(spreading, 64, 1, 0.5)
    assert stationary_p(after) < 1e-4


@pytest.mark.parametrize("n_runs", [1, 6])
def test_clones_that_remember_their_parents_widen_the_interval(n_runs: int) -> None:
    case, repeats = half_space(8, 4.0), 300
    state = LimitState(lambda p, u: case.function(u.reshape(-1, 8)).reshape(u.shape[:2]), 8, repeats)
    batch = SubsetSimulation(100, kernel="elliptical_slice", n_runs=n_runs, n_moves=1)(state, seed=17)
    assert (batch.diagnostics["correlation"] > 0.4).mean() > 0.9
    # of 300 intervals 285 are due to cover and 7.5 to lie above: 264 or fewer, and 24 or more, have a chance of 1e-6
    assert ((batch.low <= case.bits) & (case.bits <= batch.high)).sum() > 264
    assert (batch.low > case.bits).sum() < 24


def test_one_kill_is_the_poisson_estimate() -> None:
    case = half_space(4, 2.5)
    bits = SubsetSimulation(100, 1, "elliptical_slice", n_runs=1)(from_function(case.function, 4), seed=4)[0]
    kills = round(bits.value * 100 * np.log(2))
    assert bits.value == pytest.approx(kills / (100 * np.log(2)))
    low, high = stats.chi2.ppf(0.025, 2 * kills) / 2, stats.chi2.ppf(0.975, 2 * kills + 2) / 2
    # the exact interval, never narrowed
    assert bits.low <= low / (100 * np.log(2)) + 1e-9
    assert bits.high >= high / (100 * np.log(2)) - 1e-9
    assert bits.low <= case.bits <= bits.high


def test_same_seed_same_result_whatever_the_threads() -> None:
    state = from_function(half_space(128, 4.0).function, 128)
    first, again, alone = (SubsetSimulation(600, n_runs=2, threads=t)(state, seed=5) for t in (2, 2, 1))
    other = SubsetSimulation(600, n_runs=2)(state, seed=6)
    for batch in (again, alone):
        np.testing.assert_array_equal(first.value, batch.value)
        np.testing.assert_array_equal(first.diagnostics["failures"], batch.diagnostics["failures"])
    assert first.value[0] != other.value[0]


def test_problems_of_a_batch_keep_their_own_answers() -> None:
    betas = np.array([0.5, 6.0, 2.0, 4.0])
    state = LimitState(lambda problems, u: betas[problems][:, None] - u[..., 0], 3, 4)
    batch = SubsetSimulation(500)(state, seed=7)
    truth = [half_space(3, b).bits for b in betas]
    # twice the half-width of a t interval with 7 degrees of freedom: 0.2% per problem
    assert (np.abs(batch.value - truth) < batch.high - batch.low).all()
    assert batch.evaluations[1] > batch.evaluations[3] > batch.evaluations[0]
    failures = batch.diagnostics["failures"]
    assert failures.shape == (4, 32, 3)
    assert (failures[..., 0] >= betas[:, None]).all()


def test_evaluations_are_counted_as_they_are_made() -> None:
    made = np.zeros(2, dtype=int)

    def function(problems: np.ndarray, u: np.ndarray) -> np.ndarray:
        np.add.at(made, problems, u.shape[1])
        return np.array([3.0, 1.0])[problems][:, None] - u[..., 0]

    batch = SubsetSimulation(50, n_runs=3)(LimitState(function, 2, 2), seed=8)
    np.testing.assert_array_equal(batch.evaluations, made)


def test_a_budget_is_kept_and_the_answer_censored_below_the_truth() -> None:
    case = half_space(8, 6.0)
    bits = SubsetSimulation(200, n_runs=2)(from_function(case.function, 8), seed=9, max_evaluations=20_000)[0]
    assert bits.evaluations <= 20_000
    assert bits.kind is Kind.CENSORED
    assert 1.0 < bits.value < case.bits
    assert bits.high == np.inf
    assert [f.name for f in bits.flags] == ["budget_exhausted"]
    assert "max_evaluations" in bits.status
    assert np.isnan(bits.diagnostics["failures"]).all()


def test_a_budget_below_one_population_says_nothing() -> None:
    bits = SubsetSimulation(200, n_runs=2)(from_function(half_space(2, 3).function, 2), seed=9, max_evaluations=100)[0]
    assert (bits.kind, bits.value, bits.evaluations) == (Kind.CENSORED, 0.0, 0)


def test_max_bits_censors_at_max_bits() -> None:
    case = half_space(8, 8.0)
    state = from_function(case.function, 8)
    bits = SubsetSimulation(200, n_runs=4, max_bits=20.0)(state, seed=10)[0]
    assert (bits.kind, bits.value, bits.high) == (Kind.CENSORED, 20.0, np.inf)
    assert str(bits) == ">= 20.0"
    assert "max_bits" in bits.status


def test_a_flat_limit_state_goes_extinct_with_what_it_knew() -> None:
    # 2 bits to a plateau at 1 that never fails
    edge = stats.norm.isf(0.25)
    state = from_function(lambda u: np.maximum(1.0, 1.0 + edge - u[:, 0]), 2)
    bits = SubsetSimulation(500, n_runs=4)(state, seed=12)[0]
    assert bits.kind is Kind.CENSORED
    assert 0.0 <= bits.value <= 2.0
    assert "tied" in bits.status


@pytest.mark.parametrize("kernel", KERNELS)
def test_ties_are_killed_and_counted(kernel: str) -> None:
    # g takes the values 2, 1, 0 with chances 1/2, 1/4, 1/4: exact although every level is a tie
    edges = stats.norm.isf([0.5, 0.25])
    state = LimitState(lambda p, u: 2.0 - (u[..., 0] > edges[0]) - (u[..., 0] > edges[1]), 2, 400)
    batch = SubsetSimulation(200, 20, kernel, n_runs=1)(state, seed=13)
    ratio = np.exp2(batch.diagnostics["run_log2_p"]) / 0.25
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / 20


def test_failure_at_once_costs_no_sweep() -> None:
    bits = SubsetSimulation(1000, n_runs=4)(from_function(lambda u: u[:, 0] - 1.0, 2), seed=14)[0]
    assert bits.low <= -np.log2(stats.norm.cdf(1.0)) <= bits.high
    assert bits.evaluations == 4000


def test_a_missed_mode_is_never_reported_with_confidence() -> None:
    case = KNOWN["RP110"]
    state = from_function(case.function, 2)
    for seed in range(6):
        plain = SubsetSimulation(200, n_runs=4)(state, seed=seed)[0]
        told = SubsetSimulation(200, n_runs=4)(state, seed=seed, starts=np.array([[[4.0, 0.0], [0.0, 5.0]]]))[0]
        assert told.value == plain.value
        # 200 particles find it in few runs; what the starts show is flagged, and the interval then holds the truth
        assert told.low <= case.bits <= told.high
        assert told.low >= case.bits - 3 or told.flags
        if plain.value > case.bits + 2:
            assert any(f.name == "runs_disagree" for f in told.flags)


def test_starts_in_a_region_that_was_found_raise_no_flag() -> None:
    case = half_space(16, 4.0)
    weight = np.cos(np.arange(1, 17) * 1.7) + 1.5
    start = 4.01 * weight / np.linalg.norm(weight)
    bits = SubsetSimulation(500, n_runs=4)(from_function(case.function, 16), seed=1, starts=start[None, None])[0]
    assert bits.flags == ()


def test_bad_configurations_are_refused() -> None:
    with pytest.raises(ValueError, match="known kernels: elliptical_slice, pcn"):
        SubsetSimulation(kernel="gibbs")
    with pytest.raises(ValueError, match="survivors"):
        SubsetSimulation(n_particles=10, n_kill=10)
    with pytest.raises(ValueError, match="starts must have shape"):
        SubsetSimulation(50, n_runs=1)(from_function(lambda u: 1 - u[:, 0], 2), seed=0, starts=np.zeros((1, 2)))
