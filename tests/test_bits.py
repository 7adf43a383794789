"""Bits: printing, the arithmetic that is refused, and guarantees against exact attackers."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, norm

from elk_stress.core.bits import (
    GUARANTEES,
    Bits,
    BitsBatch,
    Kind,
    average_guarantee,
    best_of_n_half_chance,
    beta_of_bits,
    bits_of_beta,
    bits_of_log_probability,
    mean_shift_guarantee,
    renyi_guarantee,
    selection_guarantee,
)
from elk_stress.core.flags import flag


def bits(
    value: float = 20.0,
    low: float | None = None,
    high: float | None = None,
    kind: Kind = Kind.ESTIMATE,
    method: str = "m",
) -> Bits:
    return Bits(value, value if low is None else low, value if high is None else high, kind, method)


# -- what it prints ----------------------------------------------------------------------------------------------------

PRINTED = {
    "estimate": (bits(20.0, 19.04, 21.36), "20.0 [19.0, 21.4]"),
    "open interval": (bits(20.0, 19.0, math.inf), "20.0 [19.0, inf]"),
    "exact": (bits(20.0, kind=Kind.EXACT), "20.0"),
    "exact infinite": (bits(math.inf, kind=Kind.EXACT), "inf"),
    "censored": (bits(21.3, high=math.inf, kind=Kind.CENSORED), ">= 21.3"),
    "lower bound": (bits(21.3, kind=Kind.LOWER_BOUND), ">= 21.3 (bound)"),
    "upper bound": (bits(21.3, kind=Kind.UPPER_BOUND), "<= 21.3 (bound)"),
    "distance": (bits(float(bits_of_beta(3.0)), kind=Kind.DISTANCE), "distance 3.00 (FORM 9.5)"),
}


@pytest.mark.parametrize(("number", "text"), PRINTED.values(), ids=PRINTED)
def test_prints(number: Bits, text: str) -> None:
    assert str(number) == text


def test_a_distance_is_never_printed_as_bare_bits() -> None:
    assert str(bits(9.5, kind=Kind.DISTANCE)).startswith("distance")


def test_json_holds_everything_and_no_bare_infinity() -> None:
    number = Bits(3.0, 2.0, math.inf, Kind.ESTIMATE, "m", 10, 2, "ok", (flag("brittle", "why"),))
    record = json.loads(json.dumps(number.to_json(), allow_nan=False))
    assert record["high"] == "inf"
    assert record["value"] == 3.0
    assert record["kind"] == "estimate"
    assert (record["evaluations"], record["gradients"]) == (10, 2)
    assert record["flags"] == [{"name": "brittle", "detail": "why"}]


# -- what it refuses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Kind.DISTANCE, Kind.CENSORED, Kind.UPPER_BOUND, Kind.LOWER_BOUND])
def test_arithmetic_is_refused_for(kind: Kind) -> None:
    for combine in (lambda a, b: a + b, lambda a, b: a - b):
        with pytest.raises(TypeError, match=f"kind {kind.value} means nothing"):
            combine(bits(), bits(kind=kind))
        with pytest.raises(TypeError, match=f"kind {kind.value} means nothing"):
            combine(bits(kind=kind), bits())


def test_bits_are_not_ordered() -> None:
    for compare in (
        lambda a, b: a < b,
        lambda a, b: a > b,
        lambda a, b: a <= b,
        lambda a, b: a >= b,
    ):
        with pytest.raises(TypeError, match=r"elk_stress\.compare"):
            compare(bits(), bits())
    with pytest.raises(TypeError, match="not ordered"):
        sorted([bits(2.0), bits(1.0)])


def test_conditioning_on_what_never_happens_is_refused() -> None:
    with pytest.raises(TypeError, match="never happens"):
        bits() - bits(math.inf, kind=Kind.EXACT)


@pytest.mark.parametrize("values", [(math.nan, 0, 1), (1, math.nan, 1), (1, 0, math.nan)])
def test_nan_is_refused(values: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="NaN"):
        Bits(*values, Kind.ESTIMATE, "m")


@pytest.mark.parametrize("values", [(5.0, 6.0, 7.0), (5.0, 3.0, 4.0)])
def test_a_value_outside_its_interval_is_refused(values: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="outside their interval"):
        Bits(*values, Kind.ESTIMATE, "m")


# -- the arithmetic that is left ---------------------------------------------------------------------------------------


def test_difference_is_the_conditional_number_of_bits() -> None:
    joint, kept = bits(12.0, 11.0, 14.0), bits(2.0, 1.5, 2.25)
    given_kept = joint - kept
    assert given_kept.value == 10.0
    # a difference is low when the joint is low and the condition high
    assert given_kept.low == pytest.approx(10 - math.hypot(1.0, 0.25))
    assert given_kept.high == pytest.approx(10 + math.hypot(2.0, 0.5))
    assert given_kept.kind is Kind.ESTIMATE


def test_exact_numbers_stay_exact_and_infinity_survives() -> None:
    assert (bits(3.0, kind=Kind.EXACT) + bits(4.0, kind=Kind.EXACT)).kind is Kind.EXACT
    endless = bits(math.inf, kind=Kind.EXACT) - bits(1.0, 0.9, 1.1)
    assert endless.value == math.inf
    assert str(endless) == "inf"


def test_arithmetic_keeps_the_costs_the_flags_and_the_status() -> None:
    a = Bits(5.0, 4.0, 6.0, Kind.ESTIMATE, "a", 10, 1, "ok", (flag("brittle"),))
    b = Bits(1.0, 1.0, 1.0, Kind.ESTIMATE, "b", 5, 2, "stopped early", ())
    total = a + b
    assert (total.evaluations, total.gradients, total.method) == (15, 3, "a + b")
    assert [f.name for f in total.flags] == ["brittle"]
    assert "stopped early" in total.status


@given(st.floats(0, 500), st.floats(0, 5), st.floats(0, 5), st.floats(0, 50), st.floats(0, 5), st.floats(0, 5))
def test_adding_what_was_subtracted_gives_the_value_back(
    value: float, down: float, up: float, other: float, other_down: float, other_up: float
) -> None:
    a, b = bits(value, value - down, value + up), bits(other, other - other_down, other + other_up)
    back = (a - b) + b
    assert back.value == pytest.approx(a.value, abs=1e-9)
    assert back.low <= a.low + 1e-9
    assert back.high >= a.high - 1e-9


# -- batches -----------------------------------------------------------------------------------------------------------


def test_batch_indexes_iterates_and_clips() -> None:
    batch = BitsBatch.build(
        np.array([1.0, 2.0, 3.0]), np.array([0.5, 2.5, 2.0]), 2.75, Kind.ESTIMATE, "m", evaluations=np.array([1, 2, 3])
    )
    assert len(batch) == 3
    assert [b.value for b in batch] == [1.0, 2.0, 3.0]
    # an interval that missed its value is widened to hold it, never the value moved
    assert (batch[1].low, batch[2].high) == (2.0, 3.0)
    assert [b.evaluations for b in batch[1:]] == [2, 3]
    assert batch[-1].value == 3.0
    flagged = batch.with_flags([(), (flag("brittle"),), ()])
    assert [len(b.flags) for b in flagged] == [0, 1, 0]
    assert [len(b.flags) for b in batch] == [0, 0, 0]
    with pytest.raises(IndexError):
        batch[3]


# -- coordinates -------------------------------------------------------------------------------------------------------


@given(st.floats(-5, 60))
def test_beta_and_bits_are_inverse(beta: float) -> None:
    number = float(bits_of_beta(beta))
    if number > 1e-12:
        assert beta_of_bits(number) == pytest.approx(beta, abs=1e-6)


@pytest.mark.parametrize("beta", [-2.0, 0.0, 1.0, 3.0, 8.0, 20.0, 37.0])
def test_bits_of_a_half_space(beta: float) -> None:
    assert bits_of_beta(beta) == pytest.approx(-norm.logsf(beta) / math.log(2))


def test_edges_of_the_scale() -> None:
    assert bits_of_beta(0.0) == 1.0
    assert bits_of_log_probability(0.0) == 0.0
    assert beta_of_bits(math.inf) == math.inf
    assert beta_of_bits(0.0) == -math.inf
    assert beta_of_bits(2000.0) == pytest.approx(52.5, abs=0.5)
    assert bits(math.inf, kind=Kind.EXACT).probability == 0.0
    assert bits(3.0).probability == 0.125


# -- guarantees, against attackers whose success is known --------------------------------------------------------------


@pytest.mark.parametrize("p", [0.3, 0.01, 1e-4])
@pytest.mark.parametrize("n", [1, 2, 16, 1000])
def test_selection_holds_for_best_of_n(p: float, n: int) -> None:
    """Best of n prior draws fails the probe with chance 1 - (1-p)^n, and spends log2 n bits."""
    success = -math.expm1(n * math.log1p(-p))
    assert success <= selection_guarantee(-math.log2(p), math.log2(n)) + 1e-12


def test_selection_is_attained_by_conditioning() -> None:
    """The prior restricted to an event of k bits that holds the failure: the bound is an equality."""
    assert selection_guarantee(10.0, 7.0) == 2.0**-3
    assert selection_guarantee(10.0, 12.0) == 1.0


@pytest.mark.parametrize("alpha", [1.1, 2.0, 5.0, 50.0])
@pytest.mark.parametrize(("p", "q"), [(0.01, 0.2), (0.001, 0.9), (0.3, 0.31), (1e-6, 0.5)])
def test_renyi_holds_for_two_point_attackers(p: float, q: float, alpha: float) -> None:
    """An attacker that only reweighs failure against its complement, where every divergence is a sum of two terms."""
    divergence = math.log2(q**alpha * p ** (1 - alpha) + (1 - q) ** alpha * (1 - p) ** (1 - alpha)) / (alpha - 1)
    assert q <= renyi_guarantee(-math.log2(p), divergence, alpha) * (1 + 1e-12)


@pytest.mark.parametrize(("p", "q"), [(0.01, 0.2), (0.001, 0.9), (0.3, 0.31), (1e-6, 0.5), (0.5, 0.99)])
def test_average_holds_for_two_point_attackers(p: float, q: float) -> None:
    kl = q * math.log2(q / p) + (1 - q) * math.log2((1 - q) / (1 - p))
    assert q <= average_guarantee(-math.log2(p), kl) + 1e-12


@pytest.mark.parametrize("r", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("beta", [0.5, 2.0, 5.0])
def test_mean_shift_is_attained_by_a_half_space_and_holds_for_others(r: float, beta: float) -> None:
    assert mean_shift_guarantee(float(bits_of_beta(beta)), r) == pytest.approx(norm.cdf(r - beta))
    # a slab |u1| >= c of the same probability, shifted by r towards one side
    c = -norm.ppf(norm.sf(beta) / 2)
    shifted = norm.sf(c - r) + norm.cdf(-c - r)
    assert shifted <= mean_shift_guarantee(float(bits_of_beta(beta)), r) + 1e-12


def test_renyi_needs_an_order_above_one() -> None:
    with pytest.raises(ValueError, match="average_guarantee"):
        renyi_guarantee(10.0, 1.0, 1.0)


@pytest.mark.parametrize("number", [1.0, 4.0, 10.0, 30.0])
def test_best_of_n_half_chance(number: float) -> None:
    n = 2.0 ** best_of_n_half_chance(number)
    assert (1 - 2.0**-number) ** n == pytest.approx(0.5, rel=1e-6)
    if number >= 10:
        assert best_of_n_half_chance(number) == pytest.approx(number - 0.5288, abs=1e-3)


def test_best_of_n_half_chance_by_counting() -> None:
    """200,000 attackers draw n times each; how many have a failing draw? False alarm of the bounds: 1e-6."""
    draws = round(2.0 ** best_of_n_half_chance(6.0))
    rng = np.random.default_rng(np.random.SeedSequence(0))
    successes = int((rng.binomial(draws, 2.0**-6, 200_000) > 0).sum())
    chance = 1 - (1 - 2.0**-6) ** draws
    assert binom.ppf(5e-7, 200_000, chance) <= successes <= binom.ppf(1 - 5e-7, 200_000, chance)
    assert abs(chance - 0.5) < 0.01


def test_best_of_n_half_chance_beyond_double_precision() -> None:
    assert best_of_n_half_chance(5000.0) == pytest.approx(5000 - 0.5288, abs=1e-3)
    assert best_of_n_half_chance(0.0) == 0.0


GUARANTEED = {
    "selection": lambda b, k: selection_guarantee(b, k),
    "renyi": lambda b, k: renyi_guarantee(b, k, 2.0),
    "average": lambda b, k: average_guarantee(b, k),
    "mean shift": lambda b, k: mean_shift_guarantee(b, k),
}


@pytest.mark.parametrize("name", GUARANTEED)
@settings(max_examples=60)
@given(st.floats(0.01, 300), st.floats(0, 100), st.floats(0, 100), st.floats(0, 30))
def test_more_bits_never_guarantee_less(name: str, number: float, more: float, budget: float, extra: float) -> None:
    bound = GUARANTEED[name]
    assert 0.0 <= bound(number, budget) <= 1.0
    assert bound(number + more, budget) <= bound(number, budget) + 1e-12
    assert bound(number, budget + extra) >= bound(number, budget) - 1e-12


@given(st.floats(1.5, 200), st.floats(0.0, 200), st.floats(1.01, 50))
def test_higher_order_guarantees_more(number: float, divergence: float, alpha: float) -> None:
    """At equal divergence the order only helps, up to selection, its limit."""
    strong = selection_guarantee(number, divergence)
    assert strong <= renyi_guarantee(number, divergence, alpha) * (1 + 1e-9)
    assert renyi_guarantee(number, divergence, 2 * alpha) <= renyi_guarantee(number, divergence, alpha) * (1 + 1e-9)


def test_the_table_names_all_four() -> None:
    assert len(GUARANTEES) == 4
    assert [row[2] for row in GUARANTEES] == ["strong", "between", "weak", "any geometry"]
