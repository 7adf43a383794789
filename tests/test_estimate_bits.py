"""The public entry and the automatic method: known answers, honesty, agreement of backends, no recompilation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from known_answers import KNOWN, half_space
from scipy.special import log_ndtr

import elk_stress
from elk_stress.core.bits import Kind
from elk_stress.estimators import METHODS, estimate_batch, estimate_bits
from elk_stress.estimators.arbitration import Estimate, Evidence, decide
from elk_stress.estimators.limit_state import LimitState, Linear

LIGHT = {"n_runs": 4}


@pytest.mark.parametrize("name", [n for n in sorted(KNOWN) if n != "half_space_d512_b40"])
def test_known_answers_lie_in_their_intervals(name):
    """Right within the interval, or flagged with an interval that holds the truth. Seeds fixed; 1.5: see below."""
    case = KNOWN[name]
    bits = estimate_bits(case.function, case.dim, seed=1, **LIGHT)
    # a 95% interval stretched by 1.53 is three standard errors: 0.3% false alarms a case
    below, above = 1.53 * (bits.value - bits.low), 1.53 * (bits.high - bits.value)
    assert bits.value - below <= case.bits <= bits.value + above
    # right for the right reason: an interval that says something
    assert bits.high - bits.low < 1.5
    assert bits.kind is Kind.ESTIMATE


def test_the_failure_set_that_is_near_no_design_point():
    bits = estimate_bits(KNOWN["RP63"].function, 100, seed=2, **LIGHT)
    assert bits.diagnostics["source"] == "subset_simulation"
    assert bits.diagnostics["blind"] > 0.5


def test_a_missed_mode_is_settled_by_the_bound():
    bits = estimate_bits(KNOWN["RP110"].function, 2, seed=3, n_runs=1, n_particles=512)
    assert abs(bits.value - KNOWN["RP110"].bits) < 0.6
    assert bits.diagnostics["source"] == "importance"


def test_half_space_of_290_bits_in_512_dimensions():
    case = half_space(512, 19.84)
    bits = estimate_bits(case.function, 512, seed=0, n_runs=2, n_particles=256)
    assert case.bits > 289
    assert abs(bits.value - case.bits) <= 1.53 * max(bits.high - bits.value, bits.value - bits.low)


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_backends_agree(backend):
    case = KNOWN["tanh_mlp"]
    bits = estimate_bits(getattr(case, backend)(), case.dim, seed=0, n_runs=2, n_particles=1024)
    assert bits.low - 0.3 <= case.bits <= bits.high + 0.3
    assert bits.high - bits.low < 2.5


def test_jax_function_is_not_traced_again():
    import jax.numpy as jnp

    traced = []

    def g(u):
        traced.append(u.shape)
        return 4.0 - u[:, 0] + 0.05 * jnp.sum(u**2, axis=-1)

    first = estimate_bits(g, 3, seed=0, backend="jax", n_runs=2, n_particles=512)
    after_first = len(traced)
    second = estimate_bits(g, 3, seed=0, backend="jax", n_runs=2, n_particles=512)
    assert after_first > 0
    # the shape check when the function is wrapped is a plain call, and the wrapped function is remembered
    assert len(traced) == after_first
    assert first == second


def test_same_seed_same_result():
    case = KNOWN["RP28"]
    a, b, c = (estimate_bits(case.function, 2, seed=s, **LIGHT) for s in (4, 4, 5))
    assert a == b
    assert a != c


def test_budget_holds_and_is_honest():
    for budget in (60, 2000, 20_000):
        bits = estimate_bits(lambda u: 5.0 - u[:, 0], 6, max_evaluations=budget, seed=0)
        assert bits.evaluations + bits.gradients <= budget
        assert bits.low - 0.3 <= -log_ndtr(-5.0) / math.log(2) <= bits.high + 0.3


def test_no_failure_is_censored_and_says_so():
    bits = estimate_bits(lambda u: np.ones(len(u)), 3, seed=0)
    assert bits.kind is Kind.CENSORED
    assert bits.high == math.inf
    assert bits.value < 15
    assert bits.status != "ok"


def test_beyond_max_bits_is_censored_there():
    bits = estimate_bits(lambda u: 9.0 - u[:, 0], 2, max_bits=20, seed=0, **LIGHT)
    assert (bits.kind, bits.value, bits.high) == (Kind.CENSORED, 20.0, math.inf)


def test_linear_limit_states_are_exact():
    state = LimitState(lambda p, u: 3.0 - u[..., 0], dim=2, linear=Linear(np.array([[-1.0, 0.0]]), np.array([3.0])))
    bits = estimate_bits(state)
    assert bits.kind is Kind.EXACT
    assert bits.value == pytest.approx(-log_ndtr(-3.0) / math.log(2))
    kept = estimate_batch(state, keep_failures=16).diagnostics["failures"]
    assert (kept[0, :, 0] >= 3.0).all()


def test_a_batch_says_what_singles_say():
    offsets = np.array([1.0, 3.0, 4.5, 6.0])
    state = LimitState(lambda p, u: offsets[p][:, None] - u[..., 0] + 0.1 * u[..., 1] ** 2, dim=3, n_problems=4)
    together = estimate_batch(state, seed=0, **LIGHT)
    for i in range(4):
        alone = estimate_bits(state.select(np.array([i])), seed=1, **LIGHT)
        assert abs(alone.value - together[i].value) < 4 * (alone.high - alone.low) / 2
    assert (np.diff(together.value) > 0).all()


def test_kept_failures_fail():
    case = KNOWN["RP63"]
    for function, dim in ((case.function, case.dim), (KNOWN["RP28"].function, 2)):
        state = elk_stress.estimators._state(function, dim, "numpy")
        kept = estimate_batch(state, seed=0, keep_failures=24, **LIGHT).diagnostics["failures"]
        assert kept.shape == (1, 24, dim)
        # splitting keeps its particles in single precision
        assert (function(kept[0]) <= 1e-4 * np.abs(function(np.zeros((2, dim)))[0])).all()


def test_many_problems_are_checked_in_part():
    offsets = np.linspace(3.5, 5.0, 40)
    state = LimitState(lambda p, u: offsets[p][:, None] - u[..., 0], dim=4, n_problems=40)
    batch = estimate_batch(state, seed=0)
    exact = -log_ndtr(-offsets) / math.log(2)
    assert 16 <= batch.diagnostics["checked"].sum() < 40
    assert ((batch.low <= exact) & (exact <= batch.high)).sum() >= 34  # binomial(40, 0.95): 1 in 400 below
    unchecked = estimate_batch(state, seed=0, check_fraction=0.0)
    assert unchecked.diagnostics["checked"].sum() == (unchecked.diagnostics["effective"] < 20).sum()


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("auto", "closed_form", "isoperimetric_bound")])
def test_every_method_runs_by_name(method):
    bits = estimate_bits(lambda u: 2.0 - u[:, 0], 3, method=method, seed=0)
    exact = -log_ndtr(-2.0) / math.log(2)
    assert bits.low - 0.3 <= exact <= bits.high + 0.3
    assert bits.evaluations > 0


def test_lipschitz_gives_the_lower_bound():
    bits = estimate_bits(lambda u: 4.0 - u[:, 0], 3, lipschitz=1.0, seed=0, **LIGHT)
    assert 2 < bits.diagnostics["lower_bound"] <= -log_ndtr(-4.0) / math.log(2)


def test_unknown_names_list_the_known():
    with pytest.raises(ValueError, match=r"no method is called 'magic'; known methods: auto, closed_form"):
        estimate_bits(lambda u: u[:, 0], 2, method="magic")
    with pytest.raises(ValueError, match="dim is missing"):
        estimate_bits(lambda u: u[:, 0])
    with pytest.raises(TypeError, match="importance has no option n_lines"):
        estimate_batch(LimitState(lambda p, u: u[..., 0], dim=2), method="importance", n_lines=3)


COUNTED = Estimate(math.inf, 14.0, math.inf)


def test_verdict_missed_mode():
    told = decide(
        Evidence(COUNTED, False, Estimate(15, 14.8, 15.2), True, 0.0, Estimate(21.6, 21, 22), upper=17.0), 400, False
    )
    assert (told.value, [f.name for f in told.flags]) == (15, ["missed_mode"])


def test_verdict_disagreement_is_a_union():
    told = decide(Evidence(COUNTED, False, Estimate(25, 24.8, 25.2), True, 0.0, Estimate(21, 20, 22)), 400, False)
    assert (told.low, told.high) == (20, 25.2)
    assert [f.name for f in told.flags] == ["runs_disagree"]
    assert 21 < told.value < 25
    assert "raise n_particles" in told.status


def test_verdict_blind_importance_sampling_yields_to_splitting():
    told = decide(Evidence(COUNTED, False, Estimate(25, 24.8, 25.2), False, 0.9, Estimate(21, 20, 22)), 400, False)
    assert (told.value, told.source) == (21, "subset_simulation")
    doubted = Evidence(COUNTED, False, Estimate(25, 24.8, 25.2), False, 0.9, Estimate(21, 20, 22), split_doubts=True)
    assert decide(doubted, 400, False).source == "union"


def test_verdict_bounds_and_counting_are_held_against_the_answer():
    low = decide(Evidence(COUNTED, False, Estimate(12, 11.8, 12.2), True), 400, False)
    assert [f.name for f in low.flags] == ["runs_disagree"]
    assert low.high == math.inf
    high = decide(Evidence(COUNTED, False, Estimate(30, 29, 31), True, upper=20.0), 400, False)
    assert [f.name for f in high.flags] == ["bounds_violated"]
    assert high.low == 20.0


def test_verdict_starved_and_unchecked_claims_little():
    told = decide(Evidence(COUNTED, False, Estimate(90, 85, 95), False), 400, False)
    assert told.low == 14.0
    assert [f.name for f in told.flags] == ["low_effective_sample_size"]


def test_a_mode_that_only_splitting_found_is_fed_back():
    """From the origin alone the search sees u1 = 4.5; a fifth of the probability lies at u1 = -4.8."""
    state = LimitState(lambda p, u: np.minimum(4.5 - u[..., 0], 4.8 + u[..., 0]), dim=3)
    bits = estimate_batch(state, seed=0, n_starts=1, n_particles=8192)[0]
    exact = -math.log2(np.exp(log_ndtr(-4.5)) + np.exp(log_ndtr(-4.8)))
    assert (bits.diagnostics["centres"][:, 0] < -4).any()
    assert abs(bits.diagnostics["importance"] - exact) < 0.12
