"""Paired comparisons under training pressure: exact p-values, honest corrections, censoring that misleads nobody."""

from __future__ import annotations

import math
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from elk_stress.core.bits import BitsBatch, Kind
from elk_stress.training.comparison import _sign_flips, compare_pressure, per_point


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed))


def result(probe="a", spent=(100.0,) * 8, *, clean=0.9, reached=1000.0, needed=None, kind=Kind.ESTIMATE, **other):
    """What a comparison reads of a run."""
    spent = np.asarray(spent, dtype=float)
    n = len(spent)
    bits = None
    if needed is not None:
        value = np.asarray(needed, dtype=float)
        high = np.where([k is Kind.CENSORED for k in np.broadcast_to(kind, n)], np.inf, value)
        bits = SimpleNamespace(models=BitsBatch.build(value, value, high, list(np.broadcast_to(kind, n)), "importance"))
    return SimpleNamespace(
        **{
            "probe": probe, "spent": spent, "reached": np.broadcast_to(reached, n), "clean": np.broadcast_to(clean, n),
            "bits": bits, "attack": "finetune", "mode": "frozen", "testbed": "vault", "seed": 0, "epsilon": 0.03,
            **other,
        }
    )  # fmt: skip


@pytest.mark.parametrize("n", [2, 5, 8, 11, 14])
def test_p_value_is_the_exact_one(n):
    difference = rng(n).standard_normal(n) + 0.4
    p = _sign_flips(difference)
    signs = np.array(list(product([1, -1], repeat=n)))
    brute = (np.abs(signs @ difference) >= abs(difference.sum()) - 1e-9).mean()
    assert p == pytest.approx(brute, abs=1e-12)
    # a paired permutation test of two columns flips exactly these signs
    exact = stats.permutation_test(
        (difference, np.zeros(n)), lambda a, b: (a - b).mean(), permutation_type="samples", n_resamples=np.inf
    )
    assert p == pytest.approx(exact.pvalue, abs=1e-12)


def test_sampled_p_value_beyond_fourteen_models():
    difference = rng(3).standard_normal(16) + 0.5
    exact = stats.permutation_test(
        (difference, np.zeros(16)), lambda a, b: (a - b).mean(), permutation_type="samples", n_resamples=np.inf
    ).pvalue
    p = _sign_flips(difference)
    assert abs(p - exact) < 5 * math.sqrt(exact / 2**14) + 2**-14
    # never 0: the observed pattern is one of the patterns
    assert _sign_flips(np.full(16, 1.0)) > 0


def test_zero_differences_decide_nothing():
    assert _sign_flips(np.zeros(8)) == 1.0
    assert _sign_flips(np.ones(8)) == 2 / 256


@pytest.mark.parametrize("n", [6, 8, 16])
def test_wrong_in_five_percent_and_not_more(n):
    """Type-I error of one pair under heavy tails; binomial(1000, 0.05) exceeds 83 with chance 1e-5."""
    draws = rng(n, 1)
    spent = np.exp(draws.standard_normal((2, 1000, n)) * 1.5)
    wrong = sum(
        compare_pressure([result("a", a), result("b", b)])[0].better is not None for a, b in zip(*spent, strict=True)
    )
    assert wrong <= 83
    # and it is no test that never speaks, where so many models can speak at all
    assert wrong >= 15


def test_wrong_anywhere_in_a_table_of_four_probes():
    """Holm over six pairs: a false claim anywhere in at most 5% of tables."""
    draws = rng(9)
    wrong = 0
    for _ in range(300):
        runs = [result(name, np.exp(draws.standard_normal(16))) for name in "abcd"]
        wrong += any(row.better for row in compare_pressure(runs))
    assert 1 <= wrong <= 31  # binomial(300, 0.05) exceeds 31 with chance 1e-4


def test_holm_is_over_each_table():
    spent = {name: 100.0 + i * 10 + rng(i).random(8) for i, name in enumerate("abcd")}
    rows = compare_pressure([result(name, s, needed=s) for name, s in spent.items()])
    for quantity in ("needed", "spent"):
        table = [row for row in rows if row.quantity == quantity]
        assert len(table) == 6
        p = np.array([row.p for row in table])
        order = np.argsort(p, kind="stable")
        expected = np.minimum(np.maximum.accumulate(p[order] * (6 - np.arange(6))), 1)
        assert np.array([row.holm for row in table])[order] == pytest.approx(expected)
        # all eight models agree on every pair: p is 2/256, and six pairs are just decided
        assert [row.better for row in table] == [row.b for row in table]


def test_pairs_chosen_beforehand_are_all_that_is_corrected_for():
    runs = [result(name, 100.0 + 10 * i + rng(i).random(8)) for i, name in enumerate("abcdef")]
    every = {(row.a, row.b): row for row in compare_pressure(runs)}
    rows = compare_pressure(runs, [("b", "a"), ("c", "f")])
    assert [(row.a, row.b) for row in rows] == [("b", "a"), ("c", "f")]
    assert rows[0].difference == pytest.approx(-every["a", "b"].difference)
    # fifteen pairs cannot be decided by eight models, two can
    assert [row.holm for row in rows] == [4 / 256, 4 / 256]
    assert [row.better for row in rows] == ["b", "f"]


def test_says_when_so_few_models_cannot_decide():
    five = [result(name, 100.0 + 10 * i + rng(i).random(5)) for i, name in enumerate("ab")]
    (row,) = compare_pressure(five)
    assert row.p == 2 / 32
    assert row.better is None
    assert not row.decidable
    assert "5 models cannot decide" in str(row)
    eight = [result(name, 100.0 + 10 * i + rng(i).random(8)) for i, name in enumerate("abcdef")]
    assert not any(row.decidable for row in compare_pressure(eight))
    assert all(row.decidable for row in compare_pressure(eight[:4]))


def test_needed_is_compared_once_whatever_the_attacks():
    runs = [
        result(name, 100.0 + i + rng(i).random(8), needed=50.0 + i + rng(i).random(8), attack=attack)
        for attack in ("finetune", "reinforce")
        for i, name in enumerate("ab")
    ]
    rows = compare_pressure(runs)
    assert [row.quantity for row in rows].count("needed") == 1
    assert [row.quantity for row in rows].count("spent") == 2
    assert all(row.holm == row.p for row in rows)


def test_per_point_of_advantage():
    run = result(spent=[100.0, math.inf, 30.0], clean=np.array([0.9, 0.75, 0.505]), reached=200.0, needed=[40.0] * 3)
    # 40, 25 and half a point above chance; a probe without advantage is not ranked
    assert per_point(run, "spent")[:2] == pytest.approx([2.5, 8.0])
    assert per_point(run, "needed")[:2] == pytest.approx([1.0, 1.6])
    assert np.isnan(per_point(run, "spent")[2])
    assert np.isnan(per_point(result(), "needed")).all()


def test_a_run_that_ended_early_makes_no_probe_look_weak():
    """a was never broken, but its runs ended at 50 bits; b broke at 200: nobody knows which survives more."""
    (row,) = compare_pressure([result("a", [math.inf] * 8, reached=50.0), result("b", 200.0 + rng(0).random(8))])
    assert row.better is None
    assert row.difference == 0.0
    assert (row.certain, row.n_models) == (0, 8)
    # no 0.00 [0.00, 0.00] where nothing is known
    assert str(row) == "bits spent per point: a - b: unknown, limits alone cannot be ranked"
    half = [math.inf] * 4 + [300.0 + i for i in range(4)]
    (partly,) = compare_pressure([result("a", half, reached=50.0), result("b", 200.0 + rng(0).random(8))])
    assert "(known in 4 of 8 models, else 0)" in str(partly)


def test_a_limit_above_the_other_value_is_evidence():
    (row,) = compare_pressure([result("a", [math.inf] * 8, reached=500.0), result("b", 200.0 + rng(0).random(8))])
    assert row.better == "a"
    assert row.certain == 8
    # per point: at least (500 - 201) / 40
    assert 7.4 < row.difference < 7.6


def test_both_censored_compares_no_budgets():
    (row,) = compare_pressure(
        [result("a", [math.inf] * 8, reached=500.0), result("b", [math.inf] * 8, reached=50.0 + rng(1).random(8))]
    )
    assert (row.better, row.difference, row.certain) == (None, 0.0, 0)


def test_censored_bits_are_no_estimates():
    """A sampler that saw nothing knows "at least 8 bits"; that is no reason to rank the probe below one of 30."""
    blind = result("a", needed=[8.0] * 8, kind=Kind.CENSORED)
    rows = compare_pressure([blind, result("b", needed=30.0 + rng(1).random(8))])
    (needed,) = [row for row in rows if row.quantity == "needed"]
    assert needed.better is None
    assert needed.certain == 0


def test_unpaired_runs_are_refused():
    for other in ({"testbed": "quirky"}, {"seed": 1}, {"epsilon": 0.1}):
        with pytest.raises(ValueError, match=f"their {next(iter(other))} differs"):
            compare_pressure([result("a"), result("b", **other)])
    with pytest.raises(ValueError, match="8 and 7 models"):
        compare_pressure([result("a"), result("b", [100.0] * 7)])
    # different attacks or modes are no pair, and no error
    assert compare_pressure([result("a"), result("b", attack="reinforce"), result("c", mode="refit")]) == ()
