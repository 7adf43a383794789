"""The ledger of bits: budgets against brute force and closed forms, refusals, tampering, 16 writers, kill -9."""

from __future__ import annotations

import doctest
import hashlib
import json
import math
import os
import pickle
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fabricated
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtri
from scipy.stats import norm, t

from elk_stress import cli
from elk_stress.cli import ledger as ledger_cli
from elk_stress.core import bits as guarantees
from elk_stress.core.bits import Bits, BitsBatch, Kind
from elk_stress.core.printable import printable
from elk_stress.ledger import ledger
from elk_stress.ledger import store as ledger_store
from elk_stress.ledger.budget import (
    deflated,
    lost_to_kl,
    lost_to_mean_shift,
    lost_to_selection,
    remaining_kl,
    remaining_mean_shift,
    remaining_selection,
)
from elk_stress.ledger.ledger import (
    Account,
    BudgetExceeded,
    BudgetWarning,
    Ledger,
    LedgerDamaged,
    LedgerError,
    MixedCharge,
    Terms,
    fingerprint,
)
from elk_stress.probing.probe import direction
from elk_stress.threats.priors import StudentT

ITEM = "item/natural/gaussian"
# all B_i = 13 and 1/8 tolerated: exactly 10 bits of selection, 0.625 bits of KL, beta(13) - 1.15 of shift
TERMS = Terms("mine", "v1", ITEM, (13.0,) * 5, tolerated=0.125)
ROOMY = Terms("mine", "v1", ITEM, (500.0,) * 3, tolerated=0.5, warn_at=1.0)

items = st.lists(
    st.one_of(st.floats(1e-3, 200), st.sampled_from([0.0, 1.0, 13.0, math.inf])), min_size=1, max_size=12
).map(np.array)
shares = st.floats(0.001, 0.999)
Run = Callable[..., tuple[int, str, str]]
KINDS = {
    "selection": (remaining_selection, lost_to_selection, guarantees.selection_guarantee),
    "kl": (remaining_kl, lost_to_kl, guarantees.average_guarantee),
    "mean_shift": (remaining_mean_shift, lost_to_mean_shift, guarantees.mean_shift_guarantee),
}
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "probe.ledger"


@pytest.fixture
def book(path: Path) -> Iterator[Ledger]:
    with Ledger(path, TERMS) as opened:
        yield opened


# --- what remains ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [3.0, 13.0, 150.0])
@pytest.mark.parametrize("tolerated", [0.01, 0.125, 0.9])
def test_equal_items_have_closed_forms(bits: float, tolerated: float) -> None:
    same = np.full(7, bits)
    assert remaining_selection(same, tolerated) == pytest.approx(bits + math.log2(tolerated), abs=1e-12)
    assert remaining_kl(same, tolerated) == pytest.approx(tolerated * bits - 1, abs=1e-12)
    shift = guarantees.beta_of_bits(bits) + ndtri(tolerated)
    assert remaining_mean_shift(same, tolerated) == pytest.approx(shift, abs=1e-12)


@kinds
@given(bits=items, tolerated=shares)
def test_what_remains_is_the_largest_budget(kind: str, bits: np.ndarray, tolerated: float) -> None:
    remaining, lost, guarantee = KINDS[kind]
    most = float(remaining(bits, tolerated))
    if math.isinf(most):
        # losing every breakable item is tolerated; or those of 0 bits alone are too many
        sure = np.mean(np.isfinite(bits)) if most > 0 else np.mean(bits == 0)
        assert (sure <= tolerated) if most > 0 else (sure >= tolerated)
        return
    assert lost(bits, most) <= tolerated * (1 + 1e-9)
    assert lost(bits, most + 1e-5) > tolerated
    # the bound is the mean of the scalar guarantees, an independent route
    scalar = np.mean([guarantee(b, most) if math.isfinite(b) else 0.0 for b in bits])
    assert lost(bits, most) == pytest.approx(scalar, rel=1e-9)


@given(bits=items, tolerated=shares)
def test_selection_by_brute_force(bits: np.ndarray, tolerated: float) -> None:
    grid = np.arange(-12, 205, 0.5)
    shares = np.exp2(np.minimum(grid[:, None] - bits, 0.0))
    # summed without rounding: many items of 0 bits may use up the tolerance to the last bit
    fits = [k for k, row in zip(grid, shares, strict=True) if math.fsum([*row, -tolerated * len(bits)]) <= 0]
    most = remaining_selection(bits, tolerated)
    assert most >= max(fits) - 1e-9
    assert len(fits) == len(grid) or most < max(fits) + 0.5 + 1e-9


@kinds
@given(bits=items, pair=st.tuples(shares, shares), raised=st.floats(0, 50))
def test_monotone_in_tolerance_and_in_bits(
    kind: str, bits: np.ndarray, pair: tuple[float, float], raised: float
) -> None:
    remaining = KINDS[kind][0]
    low, high = sorted(pair)
    assert remaining(bits, low) <= remaining(bits, high) + 1e-9
    assert remaining(bits, low) <= remaining(bits + raised, low) + 1e-9
    assert remaining(bits, low) == pytest.approx(remaining(bits[::-1], low), abs=1e-9)


@given(bits=items, tolerated=shares, more=st.floats(0, 30))
def test_selection_shifts_with_the_bits_and_stays_below_the_hardest_item(
    bits: np.ndarray, tolerated: float, more: float
) -> None:
    most = remaining_selection(bits, tolerated)
    assert remaining_selection(bits + more, tolerated) == pytest.approx(most + more, abs=1e-9)
    assert most <= bits.max() + 1e-9
    assert most >= bits.min() + math.log2(tolerated) - 1e-9


@kinds
def test_batches_of_probes_and_tolerances(kind: str) -> None:
    remaining, lost, _ = KINDS[kind]
    bits = np.random.default_rng(np.random.SeedSequence(4)).uniform(0, 30, (4, 3, 6))
    tolerated = np.array([0.05, 0.3, 0.7])
    found = remaining(bits, tolerated)
    assert found.shape == (4, 3)
    spent = np.where(np.isfinite(found), found, 0.0)
    for i, j in np.ndindex(4, 3):
        assert found[i, j] == remaining(bits[i, j], tolerated[j])
        assert lost(bits, spent)[i, j] == lost(bits[i, j], spent[i, j])
    assert remaining(bits[0, 0], tolerated).shape == (3,)


def test_items_that_nothing_breaks() -> None:
    bits = np.array([5.0, *[math.inf] * 9])
    assert remaining_selection(bits, 0.1) == remaining_kl(bits, 0.1) == remaining_mean_shift(bits, 0.1) == math.inf
    # a hair less: the one breakable item may be lost with chance 0.9
    assert remaining_selection(bits, 0.09) == pytest.approx(5 + math.log2(0.9))
    assert remaining_mean_shift(bits, 0.09) == pytest.approx(guarantees.beta_of_bits(5) + ndtri(0.9))
    assert remaining_mean_shift(np.zeros(3), 0.5) == -math.inf
    assert remaining_kl(np.zeros(3), 0.5) == -math.inf
    assert remaining_kl(np.array([0.0, 4.0]), 0.5) == -1


@pytest.mark.parametrize(
    ("bits", "tolerated", "message"),
    [
        ([], 0.1, "catches nothing"),
        ([1.0, math.nan], 0.1, "1 of 2 are not"),
        ([-1.0], 0.1, "numbers from 0 on"),
        ([1.0], 0.0, "between 0 and 1, got 0.0"),
        ([1.0], 1.0, "between 0 and 1, got 1.0"),
        ([1.0], math.nan, "got nan"),
    ],
)
@kinds
def test_budgets_refuse(kind: str, bits: list[float], tolerated: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KINDS[kind][0](np.array(bits), tolerated)


@given(bits=st.lists(st.floats(2, 40), min_size=1, max_size=12).map(np.array), tolerated=shares)
def test_the_theorems_hold_for_a_half_space(bits: np.ndarray, tolerated: float) -> None:
    # best of N loses item i with chance 1 - (1 - 2^-B)^N, exactly, if losing is what it is chosen for
    most = remaining_selection(bits, tolerated)
    if most >= 0:
        draws = math.floor(2.0**most + 1e-6)
        assert np.mean(-np.expm1(draws * np.log1p(-np.exp2(-bits)))) <= tolerated * (1 + 1e-9)
    # a shift straight at the half-space attains its bound; its KL, r^2/2 nats, obeys the average one
    shift = max(float(remaining_mean_shift(bits, tolerated)), 0.0)
    attained = norm.sf([guarantees.beta_of_bits(b) - shift for b in bits])
    assert np.mean(attained) == pytest.approx(lost_to_mean_shift(bits, shift), rel=1e-9)
    assert np.mean(attained) <= lost_to_kl(bits, shift**2 / 2 / math.log(2)) * (1 + 1e-9)


def test_a_mean_shift_is_a_length_in_u_and_not_of_activations() -> None:
    """Under a heavy tail u has a coordinate for the scale: a shift of u keeps its bound, one of x need not."""
    tail, z = StudentT(3.0), np.random.default_rng(np.random.SeedSequence(7)).standard_normal(200_000)
    scale = np.asarray(tail.scale(z, np))
    margin, r = 0.6, 1.0
    promised = float(lost_to_mean_shift(tail.bits(np.array([margin])), r))
    assert norm.cdf(r - margin / scale).mean() < promised
    fixed = 1 - 2.0 ** -float(tail.bits(r - margin))
    assert fixed == pytest.approx(norm.cdf((r - margin) / scale).mean(), abs=0.003)
    assert fixed > promised + 0.18
    # and the account says which of them it counts
    assert Account.MEAN_SHIFT.unit.endswith("of u")
    assert Account.MEAN_SHIFT.guarantee.endswith("r in u")


# --- charges and refusals --------------------------------------------------------------------------------------------


def test_select_charges_and_returns_the_best(book: Ledger) -> None:
    assert book.budget("selection") == pytest.approx(10)
    assert book.select("abcdefgh", score=[3, 1, 2, 1, 9, 8, 7, 6], keep=2) == ["b", "d"]
    assert book.spent("selection") == 2
    assert book.select(["xx", "y"], score=len, prefer="highest") == ["xx"]
    rows = np.arange(12.0).reshape(4, 3)
    probe = direction(np.array([1.0, 0.0, 0.0]))
    np.testing.assert_array_equal(book.select(rows, score=probe, keep=3, prefer="highest"), rows[1:])
    assert book.select(list(rows), score=probe)[0] is not None
    assert book.remaining("selection") == pytest.approx(10 - 2 - 1 - math.log2(4 / 3) - 2)
    assert [c.detail for c in book.charges()] == ["kept 2 of 8", "kept 1 of 2", "kept 3 of 4", "kept 1 of 4"]
    assert [c.id for c in book.charges()] == [1, 2, 3, 4]


def test_selection_refuses_before_it_looks(book: Ledger) -> None:
    def look(_: object) -> float:
        raise AssertionError("a refused selection must not be scored")

    with pytest.raises(BudgetExceeded, match=r"10\.0014 bits asked for, but 10 of 10 remain") as refused:
        book.select(range(1025), score=look)
    assert "Nothing was charged. Choose among at most 1024 times as many candidates as are kept" in str(refused.value)
    assert (refused.value.account, refused.value.lineage) == (Account.SELECTION, "main")
    assert refused.value.remaining == pytest.approx(10)
    again = pickle.loads(pickle.dumps(refused.value))
    assert (str(again), again.asked) == (str(refused.value), refused.value.asked)
    with pytest.raises(ValueError, match="no lineage is called 'mian'"):
        book.select("ab", score=look, parents=["mian"])
    assert book.charges() == []
    # the whole budget can be spent, to the last bit
    with pytest.warns(BudgetWarning, match=r"10 of 10 bits are spent .*; 0 remain"):
        assert book.select(range(1024), score=float) == [0]
    with pytest.raises(BudgetExceeded, match="0 of 10 remain"):
        book.select("ab", score=[0, 1])
    # nothing may be scored any more, not even where nothing is left out
    with pytest.raises(BudgetExceeded, match="Nothing more is scored, not even to keep all"):
        book.select("ab", score=look, keep=2)
    assert len(book.charges()) == 1
    # elsewhere that is no choice, and says nothing
    assert book.select("abc", score=[1, 0, -1], keep=3, lineage="fresh") == ["a", "b", "c"]


@pytest.mark.parametrize("prefer", ["lowest", "highest"])
def test_the_order_of_the_kept_says_nothing(path: Path, prefer: Any) -> None:
    """Candidates under N(0, 1) that are lost beyond 7 bits: the first of 512 of 1024 is lost twice as often at most."""
    rng = np.random.default_rng(np.random.SeedSequence(2))
    edge = _beta(7.0) * (-1 if prefer == "lowest" else 1)
    lost = 0
    with Ledger(path, ROOMY) as book:
        for trial in range(200):
            drawn = rng.standard_normal(1024)
            kept = book.select(drawn, score=drawn, keep=512, prefer=prefer, lineage=str(trial))
            np.testing.assert_array_equal(kept, drawn[np.isin(drawn, kept)])
            lost += (kept[0] <= edge) if prefer == "lowest" else (kept[0] >= edge)
    # 2 * 2^-7 * 200 = 3.1 expected; 15 is one chance in a million, a sorted list has 200
    assert lost < 15


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"candidates": "", "score": []}, "keep is between 1 and the number of candidates, 0"),
        ({"keep": 4}, "between 1 and the number of candidates, 3; got 4"),
        ({"keep": 0}, "between 1 and the number of candidates, 3; got 0"),
        ({"keep": 1.5}, r"got 1\.5, which is no whole number"),
        ({"keep": 1.0}, r"got 1\.0, which is no whole number"),
        ({"keep": True}, "got True, which is no whole number"),
        ({"keep": "1"}, "got '1', which is no whole number"),
        ({"note": 3}, "a note is a text, got 3"),
        ({"note": "\ud800"}, "a note is a text"),
        ({"lineage": "a\x1b[31m"}, "one line of 1 to 100 visible characters"),
        ({"score": None}, "shape"),
        ({"prefer": "best"}, "'lowest' or 'highest'"),
        ({"score": [1, 2]}, r"shape \(3,\), got shape \(2,\)"),
        ({"score": [1, math.nan, 3]}, "1 of 3 scores are NaN"),
        ({"lineage": " "}, "a lineage has a name"),
        ({"parents": ["main"]}, "cannot be its own parent"),
        ({"parents": ["mian"]}, "no lineage is called 'mian'; there are: none yet"),
    ],
)
def test_select_refuses(book: Ledger, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        book.select(**{"candidates": "abc", "score": [1, 2, 3], **given})
    assert book.charges() == []


def test_a_score_that_was_shown_the_candidates_is_charged(book: Ledger) -> None:
    seen: list[str] = []

    def fails(candidate: str) -> float:
        seen.append(candidate)
        # it is on the books before the first look: whoever kills the process now has seen nothing for nothing
        with Ledger(book.path, readonly=True) as other:
            assert other.spent("selection") == 2
        if candidate == "c":
            raise ZeroDivisionError("by the score")
        return 1.0

    with pytest.raises(ZeroDivisionError, match="by the score") as failed:
        book.select("abcdefgh", score=fails, keep=2)
    assert seen == ["a", "b", "c"]
    assert failed.value.__notes__ == [
        "the candidates were shown to the score: charge 1, 2 bits of selection on lineage 'main', stays"
    ]
    for wrong in (lambda _: math.nan, lambda _: "x", lambda _: None):
        with pytest.raises((ValueError, TypeError)):
            book.select("ab", score=wrong)
    assert book.spent("selection") == 5
    # given scores were known before: nothing was seen for them
    with pytest.raises(ValueError, match="could not convert"):
        book.select("ab", score=["x", "y"])
    with pytest.raises(ValueError, match="the probe reads 3 features and the candidates have 2"):
        book.select(np.eye(2), score=direction(np.ones(3)))
    with pytest.raises(TypeError):
        book.select(3, score=float)  # type: ignore[arg-type]
    assert book.spent("selection") == 5
    # anything that can be gone through
    assert book.select({"b", "a"}, score={"a": 1.0, "b": 0.0}.__getitem__, keep=np.int64(1)) == ["b"]  # type: ignore[arg-type]
    book.verify()


@pytest.mark.parametrize(
    ("account", "given", "message"),
    [
        ("selections", {"amount": 1}, "there are: selection, kl, mean_shift, queries"),
        ("kl", {}, "either an amount to add or the total"),
        ("kl", {"amount": 1, "total": 2}, "either an amount to add or the total"),
        ("kl", {"amount": -1}, "from 0 on, got -1"),
        ("mean_shift", {"amount": math.inf}, "a finite number of standard deviations of u"),
        ("kl", {"amount": math.nan}, "finite number of bits"),
        ("queries", {"amount": 0.5}, "whole numbers"),
        ("kl", {"amount": 10**400}, "finite number of bits"),
        ("kl", {"amount": "much"}, "finite number of bits from 0 on, got 'much'"),
        ("kl", {"amount": 0.1, "note": b""}, "a note is a text"),
        ("kl", {"amount": 0.1, "parents": "x"}, "no lineage is called 'x'"),
    ],
)
def test_spend_refuses(book: Ledger, account: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        book.spend(account, **given)
    assert book.charges() == []


def test_accounts_are_separate_and_mixing_is_told(book: Ledger) -> None:
    book.spend("selection", 7)
    with pytest.warns(BudgetWarning, match=r"several kinds \(selection, kl\): .*none holds"):
        book.spend("kl", 0.1, mix=True)
    # nothing is left to lose: no more need to say so, and it is told each time
    with pytest.warns(BudgetWarning, match="several kinds"):
        book.spend("selection", 0.5)
    rows = {row.account: row for row in book.balances()}
    assert rows[Account.SELECTION].spent == 7.5
    assert rows[Account.KL].spent == 0.1
    assert all(row.mixed and row.lost is None for row in rows.values())
    # nothing is said to remain, but for queries, of which nothing ever is
    for kind in ("selection", "kl", "mean_shift"):
        assert math.isnan(book.remaining(kind))  # type: ignore[arg-type]
        assert math.isnan(rows[Account(kind)].remaining)  # type: ignore[arg-type]
    assert book.remaining("queries") is rows[Account.QUERIES].remaining is None
    # on a lineage of its own it is only what it is
    charge = book.spend("kl", 0.1, lineage="tuned", note="step 10")
    assert (charge.spent, charge.note) == (0.1, "step 10")
    tuned = {row.account: row for row in book.balances() if row.lineage == "tuned"}
    assert tuned[Account.KL].lost == pytest.approx(1.1 / 13)
    assert not tuned[Account.KL].mixed
    # what was not spent as selection is no selection guarantee
    assert tuned[Account.SELECTION].lost is None


@pytest.mark.parametrize("first", ["selection", "kl", "mean_shift"])
@pytest.mark.parametrize("second", ["selection", "kl", "mean_shift"])
def test_the_first_charge_of_a_second_kind_is_refused(book: Ledger, first: str, second: str) -> None:
    book.spend(first, 0.25)
    if first == second:
        book.spend(second, 0.1)
        return
    for asked in ({"amount": 0.1}, {"total": 0.1}):
        with pytest.raises(MixedCharge, match=rf"{second}: lineage 'main' .* another kind \({first}\)") as refused:
            book.spend(second, **asked)
        for way in ("Nothing was charged", "lineage=, --lineage", "mix=True (--mix)"):
            assert way in str(refused.value)
    again = pickle.loads(pickle.dumps(refused.value))
    assert (type(again), str(again), again.account) == (MixedCharge, str(refused.value), Account(second))
    # who stops at what is too much stops at this, too
    assert isinstance(refused.value, BudgetExceeded)
    assert len(book.charges()) == 1
    assert book.remaining(first) == pytest.approx((book.budget(first) or 0) - 0.25)
    # nothing is no charge, and elsewhere it is the first
    book.spend(second, 0)
    book.spend(second, 0.1, lineage="other")
    assert {row.mixed for row in book.balances()} == {False}


def test_a_selection_that_would_mix_is_refused_before_it_looks(book: Ledger) -> None:
    def look(_: object) -> float:
        raise AssertionError("a refused selection must not be scored")

    book.spend("kl", 0.1)
    with pytest.raises(MixedCharge, match=r"selection: .* another kind \(kl\)"):
        book.select("ab", score=look)
    with pytest.raises(MixedCharge, match=r"'new' of mine, by its parents, has charges of another kind \(kl\)"):
        book.select("ab", score=look, lineage="new", parents=["main"])
    assert len(book.charges()) == 1
    with pytest.warns(BudgetWarning, match="several kinds"):
        assert book.select("ab", score=[1, 0], mix=True) == ["b"]


def test_queries_for_the_record_void_nothing(book: Ledger) -> None:
    with pytest.warns(BudgetWarning, match="a record and carry no guarantee .* with mix=True"):
        book.spend("queries", 5)
    book.spend("selection", 4)
    book.spend("queries", total=50)
    rows = {row.account: row for row in book.balances()}
    assert (rows[Account.QUERIES].spent, rows[Account.QUERIES].n_charges) == (50, 2)
    assert rows[Account.SELECTION].lost == pytest.approx(2.0**-9)
    assert book.remaining("selection") == pytest.approx(6)
    assert not any(row.mixed for row in rows.values())
    # nor for whom it comes from; and they are still a record there
    book.spend("queries", 1, lineage="child", parents=["main"])
    book.spend("selection", 1, lineage="child")
    assert [c.detail for c in book.charges() if c.account == "queries"] == [
        "for the record",
        "for the record, up to 50",
        "for the record, taken over from main",
        "for the record",
    ]
    assert not any(row.mixed for row in book.balances())
    book.verify()


@pytest.mark.parametrize("amount", [0, 7])
def test_queries_that_designed_moves_void_all(book: Ledger, amount: int) -> None:
    book.spend("selection", 4)
    # what was recorded earlier may be said later to have shaped moves, without another query
    with pytest.warns(BudgetWarning, match="several kinds .selection, queries"):
        book.spend("queries", amount, mix=True)
    assert math.isnan(book.remaining("selection"))  # type: ignore[arg-type]
    assert all(row.mixed and row.lost is None for row in book.balances())
    # designed moves have no guarantee on a lineage of their own either, nor has what comes from them
    with pytest.warns(BudgetWarning, match="'attack' has queries that shaped its moves: .*none holds"):
        book.spend("queries", amount, lineage="attack", mix=True)
    with pytest.raises(MixedCharge, match="has queries whose answers shaped its moves"):
        book.spend("selection", 1, lineage="child", parents=["attack"])
    with pytest.warns(BudgetWarning, match="several kinds"):
        book.spend("selection", 1, lineage="child", parents=["attack"], mix=True)
    assert {row.lineage for row in book.balances() if row.mixed} == {"main", "attack", "child"}
    # the mark came along: the grandchild has it from the child alone
    with pytest.raises(MixedCharge, match="shaped its moves"):
        book.spend("selection", 1, lineage="grandchild", parents=["child"])


def test_queries_of_an_older_ledger_were_of_designed_moves(book: Ledger) -> None:
    with book._store.writing() as connection:
        ledger_store.append(connection, "queries", "main", 3.0)
    assert math.isnan(book.remaining("selection"))  # type: ignore[arg-type]
    assert all(row.mixed for row in book.balances())


def test_answers_used_only_to_choose_are_in_the_charge() -> None:
    """Why a record voids nothing: who knows the failure set and takes a failing draw if there is one is bounded."""
    p = 2.0**-9
    for n in (2, 16, 128):
        assert 1 - (1 - p) ** n <= lost_to_selection(np.array([9.0]), math.log2(n)) + 1e-12


def test_each_account_has_its_own_budget(book: Ledger) -> None:
    assert book.budget("kl") == pytest.approx(0.625)
    assert book.budget("mean_shift") == pytest.approx(guarantees.beta_of_bits(13) + ndtri(0.125))
    with pytest.raises(BudgetExceeded, match=r"kl: 0\.63 bits asked for, but 0\.625 of 0\.625 .* Stop here"):
        book.spend("kl", 0.63)
    book.spend("mean_shift", 2.0, lineage="steered")
    with pytest.raises(BudgetExceeded, match="2 standard deviations of u asked for"):
        book.spend("mean_shift", 2.0, lineage="steered")
    with pytest.warns(BudgetWarning, match=r"of 2\.518 standard deviations of u"):
        book.spend("mean_shift", total=2.3, lineage="steered")
    assert book.spent("mean_shift", "steered") == 2.3


def test_queries_carry_no_guarantee_and_it_says_so(book: Ledger) -> None:
    with pytest.warns(BudgetWarning, match="no guarantee"):
        book.spend("queries", 10**6)
    assert book.budget("queries") is book.remaining("queries") is None
    assert "none" in Account.QUERIES.guarantee
    assert book.balances()[3].lost is None


def test_totals_charge_the_difference(book: Ledger) -> None:
    assert book.spend("kl", total=0.25).amount == 0.25
    assert book.spend("kl", total=0.375).amount == 0.125
    # a smaller measurement gives nothing back
    assert book.spend("kl", total=0.125).amount == 0
    assert book.spent("kl") == 0.375
    with pytest.raises(BudgetExceeded, match=r"asked for, but 0\.25 of 0\.625"):
        book.spend("kl", total=0.75)


def test_lineages_take_over_what_their_parents_spent(book: Ledger) -> None:
    book.select(range(8), score=float, lineage="a")
    book.select(range(64), score=float, lineage="b")
    assert book.remaining("selection") == pytest.approx(10)
    # two products of 3 and 6 bits: choosing between them makes one of at most 6 + 1
    assert book.select("ab", score=[1, 0], lineage="c", parents=["a", "b"]) == ["b"]
    assert book.spent("selection", "c") == 7
    assert book.charges()[2].detail == "taken over from a, b"
    # refused as a whole: nothing is taken over
    with pytest.raises(BudgetExceeded, match="4 of 10 remain"):
        book.select(range(32), score=float, lineage="d", parents=["b"])
    with pytest.raises(BudgetExceeded, match="4 of 10 remain"):
        book.spend("selection", 5, lineage="d", parents=["b"])
    assert book.spent("selection", "d") == 0
    # what a parent was trained by comes along, and no guarantee is left
    book.spend("kl", 0.1, lineage="e")
    with pytest.raises(MixedCharge, match=r"'f' of mine, by its parents, has .* \(kl\)"):
        book.spend("selection", 1, lineage="f", parents=["e"])
    with pytest.raises(MixedCharge, match=r"would have charges of several kinds \(kl, selection\)"):
        book.spend("kl", 0, lineage="f", parents=["a", "e"])
    assert book.spent("kl", "f") == 0
    with pytest.warns(BudgetWarning, match="several kinds"):
        book.spend("selection", 1, lineage="f", parents=["e"], mix=True)
    assert book.spent("kl", "f") == 0.1
    assert book.verify()


def test_joined_lineages_are_within_their_bound() -> None:
    # the theorem behind parents: the better of two best-of-N products, for a half-space of B bits
    p, first, second = 2.0**-13, 8, 64
    lost = 1 - (1 - p) ** (first + second)
    assert lost <= 2 * max(first, second) * p
    assert lost > max(first, second) * p


@pytest.mark.filterwarnings("error")
def test_a_warning_that_is_an_error_leaves_the_books_right(book: Ledger) -> None:
    with pytest.raises(BudgetWarning, match="9 of 10 bits"):
        book.spend("selection", 9)
    assert book.spent("selection") == 9


def test_nothing_remains_of_a_brittle_probe(path: Path) -> None:
    with Ledger(path, Terms("weak", "v1", ITEM, (1.0, 2.0, 0.0))) as weak:
        with pytest.raises(BudgetExceeded, match=r"0 of 0 remain .* As much is lost though nobody optimizes"):
            weak.select("ab", score=[1, 2])
        with pytest.raises(BudgetExceeded, match=r"\(k\+1\)/B promises nothing"):
            weak.spend("kl", 0.1)
        with pytest.raises(BudgetExceeded, match="nobody optimizes"):
            weak.spend("mean_shift", 0.1)
        assert weak.balances()[0].lost == pytest.approx((0.5 + 0.25 + 1) / 3)


def test_an_unbreakable_probe_pays_for_everything(path: Path) -> None:
    with Ledger(path, Terms("oracle", "v1", ITEM, (math.inf,) * 3)) as oracle:
        for account in ("selection", "kl", "mean_shift"):
            oracle.spend(account, 1e6, lineage=account)
            assert oracle.remaining(account, account) == math.inf
        assert all(row.lost in (0.0, None) for row in oracle.balances())
        oracle.verify()
    assert Terms.of_record(oracle.terms.to_record()) == oracle.terms


def test_a_ledger_shows_what_it_is(book: Ledger, path: Path) -> None:
    shift = f"mean_shift {book.budget('mean_shift'):.4g} standard deviations of u"
    expected = f"Ledger({str(path)!r}, threat='{ITEM}', budget: selection 10 bits, kl 0.625 bits, {shift})"
    assert repr(book) == expected
    book.close()
    assert repr(book) == expected


def test_the_example_in_the_docstring() -> None:
    assert doctest.testmod(ledger).failed == 0


# --- terms ------------------------------------------------------------------------------------------------------------


def test_reopening_needs_the_same_terms(path: Path) -> None:
    Ledger(path, TERMS).close()
    with Ledger(path) as again:
        assert again.terms == TERMS
    # the order of items is nobody's business
    mixed = Terms("p", "v", ITEM, (3.0, 1.0, 2.0))
    assert mixed == Terms("p", "v", ITEM, (1.0, 2.0, 3.0))
    for change, told in (
        ({"fingerprint": "v2"}, "opened for fingerprint 'v1', not 'v2'"),
        ({"threat": "item/natural/best"}, "threat 'item/natural/gaussian', not"),
        ({"bits_low": (13.0,) * 4 + (12.0,)}, "the bits of 5 items with median 13, not of 5 items"),
        ({"tolerated": 0.2}, "tolerated 0.125, not 0.2"),
    ):
        with pytest.raises(ValueError, match=told) as refused:
            Ledger(path, Terms(**{**vars(TERMS), **change}))  # type: ignore[arg-type]
        assert "What was spent there stays spent" in str(refused.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"bits_low": ()}, "catches nothing"),
        ({"bits_low": ((1.0,), (2.0,))}, r"shape \(n_items,\)"),
        ({"warn_at": 0.0}, "warn_at is a share"),
        ({"tolerated": 2.0}, "tolerated loss is a share"),
    ],
)
def test_terms_refuse(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Terms(**{**vars(TERMS), **change})


def test_terms_of_a_result(tmp_path: Path) -> None:
    results = fabricated.six()
    result = next(r for r in results if 4 < r.threats[ITEM].headline.value < 40)
    terms = Terms.of_result(result, ITEM)
    # of each item the least over both tails under which it was measured
    threats = [result.threats[name] for name in (ITEM, "item/natural/best")]
    lows = [np.maximum(row.items.bits.low, 0.0) for row in threats]  # type: ignore[union-attr]
    assert (lows[0] != lows[1]).any()
    # each deflated by the interval of its own half-life, written out
    factors = [min(1.0, _beta(row.headline.low) / _beta(row.headline.value)) for row in threats]
    assert max(factors) < 1
    rows = [
        np.minimum(low, -norm.logsf(f * np.maximum([_beta(b) for b in low], 0.0)) / math.log(2))
        for low, f in zip(lows, factors, strict=True)
    ]
    np.testing.assert_allclose(terms.bits_low, np.sort(np.minimum(*rows)), rtol=1e-9)
    assert terms.deflated_by == pytest.approx(factors)
    assert terms.least_of == ("gaussian", "best")
    assert Terms.of_result(result, "item/natural/best").bits_low == terms.bits_low
    # another prior, and behaviour that must be kept, are other threats
    assert Terms.of_result(result, "item/isotropic0.3/gaussian").least_of == ("gaussian",)
    kept = Terms.of_result(result, ITEM + "/kept")
    assert kept.least_of == ("gaussian", "best")
    assert {row.name for row in kept.elsewhere if row.of == "tail"} == {"gaussian", "best"}
    assert terms.probe == f"{result.probe} on {result.testbed} at {result.site}"
    file = tmp_path / "result.json"
    file.write_text(json.dumps({"results": [r.to_json() for r in results]}))
    assert Terms.of_result(file, ITEM, probe=result.probe) == terms
    for more, told in (
        ({}, "which probe"),
        ({"probe": "nobody"}, "0 results of a probe 'nobody' the result holds: "),
        ({"probe": result.probe, "threat": "universal/natural/gaussian"}, "has no bits per item"),
        ({"probe": result.probe, "threat": "item"}, "was not measured; threats with bits per item: item/natural"),
    ):
        with pytest.raises(ValueError, match=told):
            Terms.of_result(file, **{"threat": ITEM, **more})  # type: ignore[arg-type]
    file.write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        Terms.of_result(file, ITEM)
    with pytest.raises(ValueError, match="expected a result"):
        Terms.of_result({"bits": 1}, ITEM)


def test_terms_of_a_result_need_lower_ends() -> None:
    def record(bits: BitsBatch) -> dict[str, Any]:
        ids = [f"item{i}" for i in range(len(bits))]
        row = {"items": {"ids": ids, "bits": [b.to_json() for b in bits]}, "detection": {"threshold": 0.0}}
        return {"probe": "p", "testbed": "t", "site": "s", "seed": 0, "threats": {ITEM: row}}

    def batch(kind: Kind) -> BitsBatch:
        one = Bits(9.0, 8.0, math.inf, kind, "x")
        return BitsBatch.build(np.array([one.value]), one.low, one.high, kind, "x")  # type: ignore[arg-type]

    assert Terms.of_result(record(batch(Kind.CENSORED)), ITEM).bits_low == (8.0,)
    with pytest.raises(ValueError, match="kind distance, which have no lower end"):
        Terms.of_result(record(batch(Kind.DISTANCE)), ITEM)
    with pytest.raises(ValueError, match="catches nothing under"):
        Terms.of_result(record(BitsBatch.build(np.empty(0), 0.0, 0.0, (), "x")), ITEM)  # type: ignore[arg-type]


def _beta(bits: float) -> float:
    return guarantees.beta_of_bits(bits)


def _with_headline(bits: list[float], headline: Bits, survival: dict[str, Any] | None = None) -> dict[str, Any]:
    record = _record({"gaussian": {f"item{i}": b for i, b in enumerate(bits)}})
    record["threats"][ITEM] |= {"headline": headline.to_json(), "survival": survival}
    return record


def test_item_bits_are_deflated_by_the_interval_of_the_half_life() -> None:
    """Exact bits given the fitted scale: if it may be half as large again, so may every margin's z."""
    z = np.array([0.5, 3.0, 4.0, 6.0])
    exact = -norm.logsf(z) / math.log(2)
    life, low = exact[1], float(-norm.logsf(2.0) / math.log(2))
    terms = Terms.of_result(_with_headline([*exact, math.inf], Bits(life, low, 40.0, Kind.ESTIMATE, "x")), ITEM)
    assert terms.bits_low == pytest.approx([*(-norm.logsf(z / 1.5) / math.log(2)), math.inf])
    assert terms.deflated_by == pytest.approx((2 / 3,))
    # budgets elsewhere stand on the same bits
    assert terms.elsewhere[0].selection == remaining_selection(np.array(terms.bits_low), 0.1)
    # an interval without width takes nothing away, to the last bit
    sure = Terms.of_result(_with_headline([*exact], Bits(life, life, life, Kind.EXACT, "x")), ITEM)
    assert sure.bits_low == tuple(exact)
    assert Terms.of_record(terms.to_record()).deflated_by == terms.deflated_by


def test_an_items_own_lower_end_holds_where_it_is_lower() -> None:
    record = _with_headline([9.0, 9.0, 9.0], Bits(9.0, 7.0, 12.0, Kind.ESTIMATE, "x"))
    record["threats"][ITEM]["items"]["bits"][0] |= {"low": 2.0, "kind": "estimate"}
    least = float(guarantees.bits_of_beta(_beta(2.0) * _beta(7.0) / _beta(9.0)))
    assert Terms.of_result(record, ITEM).bits_low == pytest.approx((least, 7.0, 7.0))


@pytest.mark.parametrize("value", [0.9, 9.0])
def test_a_half_life_that_may_be_nothing_leaves_nothing(value: float) -> None:
    bits = [0.2, 0.9, 9.0, 60.0, math.inf]
    found = Terms.of_result(_with_headline(bits, Bits(value, 0.5, 20.0, Kind.ESTIMATE, "x")), ITEM)
    assert found.bits_low == (0.2, 0.5, 0.5, 0.5, math.inf)
    assert found.deflated_by == (0.0,)


@pytest.mark.parametrize("infinite", [False, True])
def test_a_half_life_that_is_not_known_takes_its_doubt_from_the_curve(infinite: bool) -> None:
    """A tenth of the catches break below 100 bits, at about 40; the band says that it may be at 20."""
    top = Bits(math.inf, 90.0, math.inf, Kind.EXACT, "x") if infinite else Bits(100, 90, math.inf, Kind.CENSORED, "x")
    x = np.arange(0.0, 101.0, 10.0)
    curve = {
        "x": x.tolist(),
        "value": np.where(x < 40, 1.0, 0.9).tolist(),
        "low": np.where(x < 20, 1.0, np.where(x < 40, 0.88, 0.8)).tolist(),
        "censored_from": 100.0,
    }
    found = Terms.of_result(_with_headline([40.0, 100.0, math.inf], top, curve), ITEM)
    # read with the grid's step as part of the doubt
    factor = _beta(10.0) / _beta(40.0)
    assert found.deflated_by == pytest.approx((factor,))
    assert found.bits_low == pytest.approx(
        [float(guarantees.bits_of_beta(factor * _beta(b))) for b in (40.0, 100.0)] + [math.inf]
    )
    # where nothing was seen to fail there is nothing to go by but the low end itself
    curve["value"], curve["low"] = [1.0] * 11, [1.0] * 11
    for blind in (curve, None):
        capped = Terms.of_result(_with_headline([40.0, 100.0, math.inf], top, blind), ITEM)
        assert capped.bits_low == (40.0, 90.0, math.inf)


def test_a_result_without_a_half_life_says_so(command: Run, path: Path, measured: list[object]) -> None:
    assert Terms.of_result(measured[1], ITEM).deflated_by == (None,)  # type: ignore[arg-type]
    assert "on the items' own lower ends alone" in " ".join(command("show", path, *measured)[1].split())
    file = Path(str(measured[1]))
    record = json.loads(file.read_text())
    record["results"][0]["threats"][ITEM]["headline"] = Bits(13, 9, 14, Kind.ESTIMATE, "x").to_json()
    file.write_text(json.dumps(record))
    out = " ".join(command("show", path.with_name("other"), *measured)[1].split())
    assert re.search(r"by a factor of: 0\.7\d+ \(gaussian\)\.", out)


def test_deflated_refuses() -> None:
    with pytest.raises(ValueError, match=r"0 to 1, got 1\.5"):
        deflated(np.ones(2), 1.5)


@given(bits=items, factor=st.floats(0, 1), less=st.floats(0, 1))
def test_deflation_only_takes_and_keeps_the_order(bits: np.ndarray, factor: float, less: float) -> None:
    found = deflated(bits, factor)
    assert (found <= bits).all()
    ordered = found[np.argsort(bits)]
    assert (ordered[1:] >= ordered[:-1]).all()
    assert (deflated(bits, factor * less) <= found * (1 + 1e-9) + 1e-12).all()


def _record(tails: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Bits per item under each tail, as a result holds them, with the rows of a free threat."""

    def row(bits: dict[str, float]) -> dict[str, Any]:
        each = [Bits(b, b, b, Kind.EXACT, "x").to_json() for b in bits.values()]
        rows = {"tails": dict.fromkeys(("gaussian", "logistic", "student_t(5)"), 1.0), "scale": {"1": 1.0, "2": 1.0}}
        return {"items": {"ids": list(bits), "bits": each}, "detection": {"threshold": 0.0}, **rows}

    threats = {f"item/natural/{tail}": row(bits) for tail, bits in tails.items()}
    return {"probe": "p", "testbed": "t", "site": "s", "seed": 0, "threats": threats}


def test_items_are_matched_by_name_and_each_takes_its_least() -> None:
    record = _record({"gaussian": {"a": 20.0, "b": 1.0, "c": 30.0}, "best": {"b": 1.5, "a": 12.0}})
    # c is not caught where the tail is another: it is lost there already
    assert Terms.of_result(record, ITEM).bits_low == (0.0, 1.0, 12.0)
    assert Terms.of_result(record, "item/natural/best").bits_low == (1.0, 12.0)
    twice = _record({"gaussian": {"a": 20.0, "b": 1.0}})
    twice["threats"][ITEM]["items"]["ids"] = ["a", "a"]
    with pytest.raises(ValueError, match="two items of p on t at s under item/natural/gaussian have the same name"):
        Terms.of_result(twice, ITEM)


def test_budgets_elsewhere_are_those_of_the_same_margins() -> None:
    """Margins z of a linear probe: the bits under every tail and scale have closed forms."""
    z = np.array([2.0, 5.0, 7.0, 7.1])
    record = _record({"gaussian": dict(zip("abcd", -norm.logsf(z) / math.log(2), strict=True))})
    terms = Terms.of_result(record, ITEM, tolerated=0.4)
    found = {(row.of, row.name): row for row in terms.elsewhere}
    assert set(found) == {("tail", t) for t in ("gaussian", "logistic", "student_t(5)")} | {
        ("scale", c) for c in ("1", "2")
    }
    for key, bits in {
        ("tail", "gaussian"): -norm.logsf(z) / math.log(2),
        ("tail", "logistic"): np.log2(1 + np.exp(math.pi * z / math.sqrt(3))),
        ("tail", "student_t(5)"): -t.logsf(z * math.sqrt(5 / 3), 5) / math.log(2),
        ("scale", "2"): -norm.logsf(z / 2) / math.log(2),
    }.items():
        assert found[key].selection == pytest.approx(float(remaining_selection(bits, 0.4)), rel=1e-6)
        assert found[key].kl == pytest.approx(float(remaining_kl(bits, 0.4)), rel=1e-6)
        assert found[key].mean_shift == pytest.approx(float(remaining_mean_shift(bits, 0.4)), rel=1e-6)
    assert found["tail", "student_t(5)"].selection < found["tail", "logistic"].selection < found["scale", "1"].selection
    again = Terms.of_record(terms.to_record())
    assert (again, again.elsewhere) == (terms, terms.elsewhere)


def test_ends_of_the_scale_elsewhere() -> None:
    record = _record({"gaussian": {"a": 0.0, "b": math.inf}})
    terms = Terms.of_result(record, ITEM, tolerated=0.6)
    assert {row.selection for row in terms.elsewhere} == {math.inf}
    assert Terms.of_record(terms.to_record()).elsewhere == terms.elsewhere


def test_the_ledger_tells_what_the_worst_tail_would_leave(path: Path) -> None:
    record = _record({"gaussian": dict.fromkeys("abc", 30.0), "best": dict.fromkeys("abc", 20.0)})
    with Ledger(path, Terms.of_result(record, ITEM, tolerated=0.25)) as book:
        book.spend("selection", 3)
        rows = {row.account: row for row in book.balances()}
        assert rows[Account.SELECTION].remaining == pytest.approx(15.0)
        assert rows[Account.SELECTION].worst_tail == "student_t(5)"
        elsewhere = next(row for row in book.terms.elsewhere if row.name == "student_t(5)")
        assert rows[Account.SELECTION].remaining_worst == pytest.approx(elsewhere.selection - 3)
        assert rows[Account.QUERIES].worst_tail is None
        # few bits are more under a heavy tail: none leaves less than what remains
        few = Terms.of_result(_record({"gaussian": {"a": 1.2}, "best": {"a": 1.3}}), ITEM, tolerated=0.9)
        with Ledger(path.with_name("few"), few) as other:
            assert {row.worst_tail for row in other.balances()} == {None}
        # it refuses by the measured tails, and not by the worst
        assert elsewhere.selection - 3 < 12
        with pytest.warns(BudgetWarning, match="15 of 18"):
            book.spend("selection", 12)


def test_terms_of_an_older_ledger_are_read() -> None:
    old = json.loads(TERMS.to_record())
    del old["least_of"], old["elsewhere"]
    assert Terms.of_record(json.dumps(old)) == TERMS


def test_the_score_must_be_this_probes(path: Path) -> None:
    probe, other = direction(np.array([1.0, 2.0]), site="l1"), direction(np.array([1.0, 2.5]), site="l1")
    assert fingerprint(probe) == fingerprint(direction(np.array([1.0, 2.0]), site="l1"))
    marks = {fingerprint(p) for p in (probe, other, direction(np.array([1.0, 2.0]), site="l2"))}
    assert len(marks) == 3
    with Ledger(path, Terms(probe.name, fingerprint(probe), ITEM, (13.0,))) as book:
        with pytest.raises(ValueError, match="the score is another probe's"):
            book.select(np.eye(2), score=other)
        assert book.charges() == []
        np.testing.assert_array_equal(book.select(np.eye(2), score=probe), [[1.0, 0.0]])


# --- the file ---------------------------------------------------------------------------------------------------------


def raw(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, isolation_level=None)


def filled(path: Path) -> str:
    """A ledger of five charges; returns its last hash."""
    with Ledger(path, TERMS) as book:
        for _ in range(5):
            book.spend("selection", 1)
        return book.verify()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE charges SET amount = 0 WHERE id = 3",
        "DELETE FROM charges WHERE id = 5",
        "DELETE FROM terms",
        "UPDATE terms SET record = ''",
        "INSERT INTO terms VALUES (1, '', '')",
        "INSERT OR REPLACE INTO terms VALUES (1, '', '')",
        "INSERT INTO charges SELECT 7, account, lineage, 0, spent, '', '', time, hash, 'x' FROM charges WHERE id = 5",
        "INSERT INTO charges SELECT 6, account, lineage, 0, spent, '', '', time, 'y', 'x' FROM charges WHERE id = 5",
        "REPLACE INTO charges SELECT 5, account, lineage, 0, 0, '', '', time, previous, 'x' FROM charges WHERE id = 5",
    ],
)
def test_sql_cannot_change_the_past(path: Path, statement: str) -> None:
    head = filled(path)
    connection = raw(path)
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        connection.execute(statement)
    connection.close()
    with Ledger(path) as book:
        assert book.verify(head) == head


@pytest.mark.parametrize(
    ("statement", "told"),
    [
        ("UPDATE charges SET hash = '' WHERE id = 5", "charge 5 was altered"),
        ("UPDATE charges SET hash = x'00' WHERE id = 5", "charge 5 was altered"),
        ("UPDATE charges SET hash = '', note = x'00' WHERE id = 5", "charge 5 was altered"),
        ("UPDATE charges SET hash = '', amount = 9e999, spent = 9e999 WHERE id = 5", "charge 5 was altered"),
        ("UPDATE charges SET hash = '', spent = 9e999, amount = 1 WHERE id = 3", "charge 3 was altered"),
        ("UPDATE charges SET account = 'other' WHERE id = 2", "charge 2 was altered"),
        ("UPDATE charges SET previous = '' WHERE id = 1", "before number 1 is missing"),
        ("UPDATE charges SET id = 9 WHERE id = 5", "before number 9 is missing"),
        ("UPDATE charges SET id = -id WHERE id = 3", "before number -3 is missing"),
        (
            "UPDATE charges SET id = -id WHERE id IN (2, 3); UPDATE charges SET id = 5 + id WHERE id < 0",
            "before number 2 is missing",
        ),
        ("UPDATE terms SET hash = ''", "terms of the ledger .* were altered"),
        ("UPDATE terms SET record = x'00'", "terms of the ledger .* were altered"),
        ("UPDATE charges SET amount = 0.5 WHERE id = 3", "charge 3 was altered"),
        ("UPDATE charges SET note = 'x' WHERE id = 1", "charge 1 was altered"),
        ("UPDATE charges SET amount = 9e999, spent = 9e999 WHERE id = 4", "charge 4 was altered"),
        ("UPDATE charges SET note = x'00' WHERE id = 4", "charge 4 was altered"),
        ("UPDATE charges SET lineage = 'other' WHERE id = 2", "charge 2 was altered"),
        ("DELETE FROM charges WHERE id = 3", "before number 4 is missing"),
        ("DELETE FROM charges WHERE id = 1", "before number 2 is missing"),
        ("UPDATE terms SET record = replace(record, '0.125', '0.525')", "terms of the ledger .* were altered"),
        ("DELETE FROM terms", "terms"),
    ],
)
def test_verify_finds_tampering(path: Path, statement: str, told: str) -> None:
    filled(path)
    connection = raw(path)
    triggers = connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
    for name, _ in triggers:
        connection.execute(f"DROP TRIGGER {name}")
    for part in statement.split(";"):
        connection.execute(part)
    for _, sql in triggers:
        connection.execute(sql)
    connection.close()
    with pytest.raises(LedgerDamaged, match=told), Ledger(path) as book:
        book.verify()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"hash": ""}, "altered"),
        ({"hash": "0" * 64}, "altered"),
        ({"hash": None}, "NOT NULL"),
        ({"amount": -1.0}, "CHECK"),
        ({"amount": math.inf, "spent": math.inf, "hash": ""}, "altered"),
        ({"amount": "x", "spent": "y", "hash": ""}, "altered"),
        ({"account": "bits"}, "altered"),
        ({"account": "queries", "amount": 0.5, "spent": 0.5}, "altered"),
        ({"lineage": " "}, "altered"),
        ({"lineage": b"main", "hash": ""}, "altered"),
        ({"spent": 5.0, "amount": 0.0}, "altered"),
    ],
)
def test_a_forged_row_holds_for_nothing(path: Path, change: dict[str, Any], told: str) -> None:
    """In its place of the chain, past every trigger; where its hash is not forged as well, with the right one."""
    filled(path)
    with Ledger(path) as book:
        last = book.charges()[-1]
        row = {**vars(last), "id": 6, "previous": last.hash, "amount": 0.0, "spent": 5.0, **change}
        if "hash" not in change:
            row["hash"] = hashlib.sha256((last.hash + _canonical(row)).encode()).hexdigest()
        connection = raw(path)
        if told in ("NOT NULL", "CHECK"):
            with pytest.raises(sqlite3.IntegrityError, match=told):
                connection.execute(f"INSERT INTO charges VALUES ({','.join('?' * 10)})", tuple(row.values()))
            connection.close()
            return
        connection.execute(f"INSERT INTO charges VALUES ({','.join('?' * 10)})", tuple(row.values()))
        connection.close()
        if change == {"spent": 5.0, "amount": 0.0}:
            # the one that is right: whoever knows the format can write what this package would have
            book.verify()
            return
        acts: list[Callable[[], Any]] = [book.verify, book.charges, book.balances]
        acts += [lambda: book.spent("selection"), lambda: book.spend("selection", 0.5)]
        acts += [lambda: Ledger(path), lambda: book.select("ab", score=[1, 2])]
        for act in acts:
            with pytest.raises(LedgerDamaged, match=told):
                act()
        # nothing was written to it
        connection = raw(path)
        assert connection.execute("SELECT count(*) FROM charges").fetchone() == (6,)
        connection.close()


def _canonical(row: dict[str, Any]) -> str:
    names = ("id", "account", "lineage", "amount", "spent", "detail", "note", "time")
    return json.dumps([row[name] for name in names], separators=(",", ":"))


def test_opening_looks_at_both_ends_and_no_further(path: Path) -> None:
    """Rows in between are held against the chain before they count; the number of those looked at does not grow."""
    with Ledger(path, ROOMY) as book:
        for _ in range(60):
            book.spend("selection", 1)
    steps = []
    for _ in range(2):
        connection = raw(path)
        counted = [0]
        connection.set_progress_handler(lambda counted=counted: counted.__setitem__(0, counted[0] + 1), 1)
        ledger_store._checked_ends(path, connection)
        steps.append(counted[0])
        connection.close()
        with Ledger(path) as book:
            for _ in range(300):
                book.spend("selection", 0)
    assert steps[0] == steps[1] > 10


def test_a_page_that_forgot_its_last_row(path: Path) -> None:
    """The table ends earlier, in one number of its page; the index of the chain knows better."""
    filled(path)
    connection = raw(path)
    page = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'charges'").fetchone()[0]
    size = connection.execute("PRAGMA page_size").fetchone()[0]
    connection.close()
    content, at = bytearray(path.read_bytes()), (page - 1) * size
    # of a leaf: its type, and the number of its rows (https://sqlite.org/fileformat2.html#b_tree_pages)
    assert (content[at], content[at + 4]) == (0x0D, 5)
    with Ledger(path) as book:
        assert book.spent("selection") == 5
    for rows in (4, 0):
        content[at + 4] = rows
        path.write_bytes(content)
        with pytest.raises(LedgerDamaged, match="the last charges are missing; restore a copy"):
            Ledger(path)


def test_a_ledger_that_is_rewritten_while_it_is_open(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.ledger"
    filled(path)
    with Ledger(other, TERMS) as book:
        book.spend("selection", 2)
    with Ledger(path) as book:
        assert book.spent("selection") == 5
        source, target = raw(other), raw(path)
        source.backup(target)
        source.close()
        target.close()
        with pytest.raises(LedgerDamaged, match="rewritten while it was open"):
            book.spend("selection", 1)
        with pytest.raises(LedgerDamaged, match="rewritten while it was open"):
            book.remaining("selection")


def test_an_older_ledger_with_its_index_is_whole(path: Path) -> None:
    filled(path)
    connection = raw(path)
    connection.execute(ledger_store._LATEST[1])
    connection.close()
    with Ledger(path) as book:
        book.spend("selection", 1)
        book.verify()
        assert book.spent("selection") == 6


def test_sums_that_are_no_number_are_refused(path: Path) -> None:
    with Ledger(path, Terms("oracle", "v1", ITEM, (math.inf,) * 3)) as oracle:
        oracle.spend("selection", 1e308)
        with pytest.raises(ValueError, match="no finite number; nothing was charged"):
            oracle.spend("selection", 1e308)
        oracle.verify()
        assert oracle.spent("selection") == 1e308


def test_verify_misses_no_trigger_and_no_cut_end(path: Path) -> None:
    head = filled(path)
    connection = raw(path)
    sql = connection.execute("SELECT sql FROM sqlite_master WHERE name = 'charges_delete'").fetchone()[0]
    connection.execute("DROP TRIGGER charges_delete")
    with Ledger(path) as book:
        with pytest.raises(LedgerDamaged, match="triggers that keep it append-only"):
            book.verify()
        connection.execute("DELETE FROM charges WHERE id = 5")
        connection.execute(sql)
        # a shorter chain is whole; who remembers its end finds out
        earlier = book.verify()
        with pytest.raises(LedgerDamaged, match="not in the chain: charges were cut off"):
            book.verify(head)
        book.spend("selection", 2)
        assert book.verify(earlier) != head
    connection.close()


def test_verify_finds_an_overdraft_with_a_good_chain(path: Path) -> None:
    with Ledger(path, TERMS) as book:
        with book._store.writing() as connection:
            ledger_store.append(connection, "selection", "main", 11.0)
        with pytest.raises(LedgerDamaged, match="charge 1 overdraws selection"):
            book.verify()


def test_verify_adds_the_sums_up_itself(path: Path) -> None:
    filled(path)
    with Ledger(path) as book:
        last = book.charges()[-1]
        # a row with the right hash, and a sum that forgets what was spent before
        row = {**vars(last), "id": 6, "spent": 1.0, "previous": last.hash}
        row["hash"] = ledger_store._link(ledger_store.Charge(**row))
        connection = raw(path)
        connection.execute(f"INSERT INTO charges VALUES ({','.join('?' * len(row))})", tuple(row.values()))
        connection.close()
        with pytest.raises(LedgerDamaged, match="charge 6 was altered"):
            book.verify()


def test_damaged_and_foreign_files(path: Path, tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="there is no ledger at"):
        Ledger(path)
    with pytest.raises(LedgerError, match=r"no folder .* make it first"):
        Ledger(tmp_path / "nowhere" / "x.ledger", TERMS)
    path.write_bytes(b"not a database at all, but long enough to look at" * 50)
    with pytest.raises(LedgerDamaged, match="is no ledger, or its first page is damaged; restore a copy"):
        Ledger(path, TERMS)
    path.write_bytes(b"")
    with pytest.raises(LedgerError, match="a database but no ledger of bits"):
        Ledger(path, TERMS)
    path.unlink()
    filled(path)
    connection = raw(path)
    connection.execute("PRAGMA user_version = 2")
    connection.close()
    with pytest.raises(LedgerError, match="schema version 2, this elk_stress reads version 1"):
        Ledger(path)


def test_a_page_that_went_bad(path: Path) -> None:
    filled(path)
    content = bytearray(path.read_bytes())
    assert len(content) > 4 * 4096
    rng = np.random.default_rng(np.random.SeedSequence(1))
    for page in range(1, len(content) // 4096):
        broken = content.copy()
        broken[page * 4096 : (page + 1) * 4096] = rng.bytes(4096)
        path.write_bytes(broken)
        with pytest.raises(LedgerDamaged), Ledger(path) as book:
            book.verify()


def test_terms_that_are_none_are_damage(path: Path) -> None:
    """With the right hash, as whoever knows the format can write them."""
    good = json.loads(TERMS.to_record())
    for record in (
        "[" * 100_000,
        "{}",
        "[]",
        "3",
        "{",
        json.dumps({**good, "bits_low": "x"}),
        json.dumps({**good, "bits_low": []}),
        json.dumps({**good, "bits_low": [math.nan]}),
        json.dumps({**good, "tolerated": 3}),
        json.dumps({**good, "tolerated": None}),
        json.dumps({**good, "more": 1}),
        json.dumps({**good, "probe": 3}),
        json.dumps({**good, "threat": ["x"]}),
        json.dumps({**good, "least_of": 3}),
    ):
        path.unlink(missing_ok=True)
        ledger_store.Store.create(path, record)
        with pytest.raises(LedgerDamaged, match=r"the terms of the ledger .* are none .*restore a copy"):
            Ledger(path)


@pytest.mark.parametrize(
    "statement",
    [
        "DROP TABLE charges",
        "DROP TABLE terms",
        "ALTER TABLE charges RENAME COLUMN note TO remark",
        "ALTER TABLE charges ADD COLUMN more",
        "CREATE TRIGGER more AFTER INSERT ON charges BEGIN SELECT 1; END",
        "CREATE VIEW more AS SELECT 1",
    ],
)
def test_a_schema_that_is_another_is_damage(path: Path, statement: str) -> None:
    filled(path)
    connection = raw(path)
    connection.execute(statement)
    connection.close()
    with pytest.raises(LedgerDamaged, match="restore a copy"), Ledger(path) as book:
        book.verify()


def test_what_is_no_file_or_cannot_be_one(tmp_path: Path) -> None:
    for terms in (None, TERMS):
        with pytest.raises(LedgerError, match="is a folder and no ledger; name a file in it"):
            Ledger(tmp_path, terms)
        for name in ("x" * 300, "a\0b", "none/x"):
            with pytest.raises(LedgerError):
                Ledger(tmp_path / name, terms)
        (tmp_path / "dangling").unlink(missing_ok=True)
        (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
        with pytest.raises(LedgerError, match="there is no ledger"):
            Ledger(tmp_path / "dangling", terms)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dangling"]


def test_damaged_bytes_are_found_or_change_nothing(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Bytes changed, the file cut, leftovers beside it: the truth, or a LedgerError, and nothing else."""
    folder = tmp_path_factory.mktemp("damaged")
    path = folder / "good.ledger"
    with Ledger(path, TERMS) as book:
        for number in range(12):
            book.spend("selection", 0.25, lineage=f"line {number % 3}", note="n" * 40 * number)
        truth = (book.verify(), book.balances(), book.charges(), book.terms)
    whole = path.read_bytes()
    seen = {"damaged": 0, "true": 0}
    places = st.one_of(st.integers(0, len(whole) - 1), st.integers(0, 200), st.integers(4096, len(whole) - 1))

    @settings(max_examples=250, deadline=None)
    @given(
        flips=st.lists(st.tuples(places, st.integers(0, 255)), max_size=3),
        keep=st.one_of(st.none(), st.integers(0, len(whole) - 1)),
        beside=st.sampled_from(["", "-wal", "-shm", "-journal"]),
        junk=st.binary(max_size=60),
    )
    def damage(flips: list[tuple[int, int]], keep: int | None, beside: str, junk: bytes) -> None:
        content = bytearray(whole)
        for at, value in flips:
            content[at] = value
        for file in folder.glob("bad.ledger*"):
            file.unlink()
        bad = folder / "bad.ledger"
        bad.write_bytes(content[:keep])
        if beside:
            bad.with_name(bad.name + beside).write_bytes(junk)
        try:
            with Ledger(bad, timeout=0.2) as book:
                status = (book.balances(), book.charges(), book.terms, book.spent("selection", "line 1"))
                assert status == (*truth[1:], 1.0)
                assert book.spend("selection", 0.25, lineage="line 1").spent == 1.25
            with Ledger(bad, timeout=0.2) as book:
                book.verify(truth[0])
            seen["true"] += 1
        except LedgerError:
            seen["damaged"] += 1

    damage()
    assert min(seen.values()) > 20


@pytest.mark.parametrize("how", ["VACUUM INTO", "backup"])
def test_copies_as_the_documentation_makes_them(path: Path, tmp_path: Path, how: str) -> None:
    copy, bare = tmp_path / "copy.ledger", tmp_path / "bare.ledger"
    with Ledger(path, TERMS) as book:
        for _ in range(5):
            book.spend("selection", 1)
        head = book.verify()
        # while it is open the latest charges are not in the file yet
        bare.write_bytes(path.read_bytes())
        source = raw(path)
        if how == "backup":
            target = raw(copy)
            source.backup(target)
            target.close()
        else:
            source.execute("VACUUM INTO ?", (str(copy),))
        source.close()
        book.spend("selection", 1)
    with Ledger(copy, TERMS) as book:
        assert book.verify(head) == head
        assert book.spend("selection", 2).spent == 7
        book.verify(head)
        assert book._store._open is not None
        assert book._store._open.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    with Ledger(bare) as book, pytest.raises(LedgerDamaged, match="not in the chain"):
        book.verify(head)


def test_a_locked_ledger_says_so(path: Path) -> None:
    Ledger(path, TERMS).close()
    holder = raw(path)
    holder.execute("BEGIN IMMEDIATE")
    with Ledger(path, timeout=0.01) as book:
        with pytest.raises(LedgerError, match=r"locked by another process for longer than 0\.01 s; .*Nothing was"):
            book.spend("selection", 1)
        # readers do not wait for writers
        assert book.spent("selection") == 0
        holder.execute("ROLLBACK")
        book.spend("selection", 1)
    holder.close()


def test_reading_only(path: Path) -> None:
    head = filled(path)
    with Ledger(path, readonly=True) as book:
        assert book.verify() == head
        with pytest.raises(LedgerError, match="cannot be written; make the file and its folder writable"):
            book.spend("selection", 1)
    with pytest.raises(LedgerError, match="there is no ledger"):
        Ledger(path.with_name("none"), TERMS, readonly=True)


READ_ONLY = """
import os, sys
from elk_stress.ledger.ledger import Ledger, LedgerError, Terms
folder = sys.argv[1]
if os.geteuid() == 0:
    os.setuid(65534)  # root may write anywhere
def told(act):
    try:
        act()
    except LedgerError as error:
        print(error)
told(lambda: Ledger(folder + "/new.ledger", Terms("p", "v", "t", (13.0,))))
told(lambda: Ledger(folder + "/old.ledger").spend("selection", 1))
with Ledger(folder + "/old.ledger", readonly=True) as book:
    print(book.verify())
"""


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="folder permissions are POSIX ones")
def test_a_read_only_folder() -> None:
    # pytest's own folders are closed to others, hence one of our own
    with tempfile.TemporaryDirectory() as folder:
        head = filled(Path(folder) / "old.ledger")
        os.chmod(folder, 0o555)
        try:
            lines = subprocess.check_output([sys.executable, "-c", READ_ONLY, folder], text=True).splitlines()
        finally:
            os.chmod(folder, 0o755)
    assert "choose a folder on a local disk that you can write" in lines[0]
    assert "Nothing was charged" in lines[1]
    assert lines[2:] == [head]


def test_durability_settings(book: Ledger) -> None:
    book.spend("selection", 1)
    connection = book._store._open
    assert connection is not None
    names = ("journal_mode", "synchronous", "wal_autocheckpoint")
    assert [connection.execute(f"PRAGMA {name}").fetchone()[0] for name in names] == ["wal", 2, 0]


def test_the_wal_is_folded_in_while_the_ledger_stays_open(path: Path) -> None:
    wal = path.with_name(path.name + "-wal")
    with Ledger(path, ROOMY) as book:
        sizes = []
        for _ in range(300):
            book.spend("selection", 0)
            sizes.append(wal.stat().st_size)
        assert sizes[254] > 2 * 2**20
        assert sizes[255] == 0
        assert len(book.charges()) == 300
        book.verify()


def test_a_full_disk_charges_nothing(book: Ledger) -> None:
    book.spend("selection", 1)
    connection = book._store._open
    assert connection is not None
    # SQLite's own limit on pages fails as a full disk does
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(LedgerError, match=r"disk is full; make room\. Nothing was charged"):
        book.spend("selection", 1, note="x" * 50000)
    assert book.spent("selection") == 1
    book.verify()


def test_threads_share_one_ledger(path: Path) -> None:
    with Ledger(path, ROOMY) as book:
        threads = [threading.Thread(target=lambda: [book.spend("selection", 1) for _ in range(10)]) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert book.spent("selection") == 80
        book.verify()


# --- many processes ---------------------------------------------------------------------------------------------------

WRITER = """
import sys
from elk_stress.ledger.ledger import BudgetExceeded, Ledger, Terms
heavy = {"torch", "jax", "scipy", "sklearn"} & set(sys.modules)
assert not heavy, heavy
path, name, low, count = sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
print("ready", flush=True)
sys.stdin.readline()
ledger = Ledger(path, Terms("p", "v", "t", (low,), tolerated=0.5, warn_at=1.0), timeout=120.0)
for i in range(count):
    try:
        if i % 2:
            ledger.select(range(2), score=[0.0, 1.0], note=name)
            print(ledger.spent("selection"), flush=True)
        else:
            print(ledger.spend("selection", 1, note=name).id, flush=True)
    except BudgetExceeded:
        print("refused", flush=True)
"""


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", script, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def race(path: Path, low: float) -> list[list[str]]:
    """Sixteen processes that all begin, making the file included, when they are told; what each acknowledged."""
    writers = [start(WRITER, path, f"w{i}", low, 25) for i in range(16)]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    said = [writer.communicate(timeout=200)[0].splitlines() for writer in writers]
    assert [writer.returncode for writer in writers] == [0] * 16
    return said


def test_sixteen_processes_lose_nothing(path: Path) -> None:
    said = race(path, 1000.0)
    assert all(len(lines) == 25 and "refused" not in lines for lines in said)
    with Ledger(path) as book:
        charges = book.charges()
        assert [c.id for c in charges] == list(range(1, 401))
        assert book.spent("selection") == sum(c.amount for c in charges) == 400
        assert [sum(c.note == f"w{i}" for c in charges) for i in range(16)] == [25] * 16
        # the charges that were acknowledged by their number are theirs
        for i, lines in enumerate(said):
            assert all(charges[int(number) - 1].note == f"w{i}" for number in lines[::2])
        book.verify()
    assert list(path.parent.glob(".*.new")) == []


def test_sixteen_processes_never_overdraw(path: Path) -> None:
    # B = 101 and half may be lost: 100 bits, of which 400 are asked for
    said = race(path, 101.0)
    refused = sum(lines.count("refused") for lines in said)
    assert refused == 300
    with Ledger(path) as book:
        assert book.spent("selection") == len(book.charges()) == 100
        book.verify()


KILLED = """
import sys
from elk_stress.ledger.ledger import Ledger, Terms
ledger = Ledger(sys.argv[1], Terms("p", "v", "t", (1e6,), tolerated=0.5, warn_at=1.0), timeout=60.0)
while True:
    charge = ledger.spend("selection", 1, note=sys.argv[2])
    sys.stdout.write(f"{charge.id} {charge.hash}\\n")
    sys.stdout.flush()
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_kill_9_loses_nothing_acknowledged(path: Path) -> None:
    rng = np.random.default_rng(np.random.SeedSequence(9))
    acknowledged: dict[int, str] = {}
    for round_ in range(6):
        # two at once: the survivor of the first kill must not be kept out by what the dead one held
        writers = [start(KILLED, path, f"r{round_}w{i}") for i in range(2)]
        lines: list[str] = []
        for writer in writers:
            assert writer.stdout is not None
            lines += [writer.stdout.readline() for _ in range(rng.integers(1, 15))]
            # the phase of the next write in which the kill comes: some microseconds of work, seeded
            for _ in range(rng.integers(0, 3000)):
                hashlib.sha256(b"phase").digest()
            writer.kill()
        for writer in writers:
            assert writer.stdout is not None
            rest = writer.stdout.read().splitlines(keepends=True)
            assert writer.wait() == -signal.SIGKILL
            # a line cut in its middle was not acknowledged
            lines += [line for line in rest if line.endswith("\n")]
            writer.stdout.close()
            writer.stdin.close()  # type: ignore[union-attr]
        acknowledged |= {int(number): mark for number, mark in (line.split() for line in lines)}
        with Ledger(path) as book:
            book.verify()
            kept = {c.id: c.hash for c in book.charges()}
            assert acknowledged.items() <= kept.items()
            # at most what each of the killed had under way was committed without being acknowledged
            assert len(kept) - len(acknowledged) <= 2 * (round_ + 1)
            assert book.spent("selection") == len(kept)
    assert len(acknowledged) > 40


SUICIDE = """
import os, signal, sys
from elk_stress.ledger.ledger import Ledger, Terms
path, steps, stage = sys.argv[1], int(sys.argv[2]), sys.argv[3]
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
if stage == "make":
    import elk_stress.ledger.store as store
    if steps == 0:
        store.os.link = die
    else:
        connect = store.sqlite3.connect
        def traced(*given, **more):
            connection = connect(*given, **more)
            seen = []
            connection.set_trace_callback(lambda _: seen.append(0) or (die() if len(seen) == steps else None))
            return connection
        store.sqlite3.connect = traced
terms = Terms("p", "v", "t", (1e6,), tolerated=0.5, warn_at=1.0)
ledger = Ledger(path, terms)
for i in range(5):
    print(ledger.spend("selection", 1).id, flush=True)
connection = ledger._store._open
if stage == "virtual machine":
    left = [steps]
    def step():
        left[0] -= 1
        if left[0] < 0:
            die()
    connection.set_progress_handler(step, 1)
else:
    left = [steps]
    def statement(text):
        left[0] -= 1
        if left[0] < 0:
            die()
    connection.set_trace_callback(statement)
print(ledger.spend("selection", 1).id, flush=True)
print("alive", flush=True)
"""


def dies(path: Path, steps: int, stage: str) -> list[str]:
    child = start(SUICIDE, path, steps, stage)
    said = child.communicate(timeout=60)[0].splitlines()
    assert child.returncode in (0, -signal.SIGKILL)
    assert (child.returncode == 0) == (said[-1:] == ["alive"])
    return said


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
@pytest.mark.parametrize("stage", ["virtual machine", "statement"])
def test_kill_9_within_a_charge(path: Path, stage: str) -> None:
    # at each of the statements of a charge, and at seeded instructions of SQLite's virtual machine
    rng = np.random.default_rng(np.random.SeedSequence(3))
    steps = range(13) if stage == "statement" else np.sort(rng.integers(0, 150, 8))
    killed, before = 0, 0
    for at in steps:
        said = dies(path, int(at), stage)
        with Ledger(path) as book:
            book.verify()
            now = len(book.charges())
            acknowledged = [int(word) for word in said if word != "alive"]
            assert set(acknowledged) <= {c.id for c in book.charges()}
            # five and either all of the sixth or nothing of it
            assert now - before in (len(acknowledged), len(acknowledged) + 1)
            assert book.spent("selection") == now
            before = now
        killed += said[-1] != "alive"
    assert killed >= 6


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
@pytest.mark.parametrize("steps", [0, 1, 4, 9, 14])
def test_kill_9_while_the_file_is_made_leaves_none_half_made(path: Path, steps: int) -> None:
    assert dies(path, steps, "make") == []
    assert not path.exists()
    with Ledger(path, TERMS) as book:
        book.spend("selection", 1)
        book.verify()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_opens_its_own_connection(path: Path) -> None:
    script = """
import os, sys
from elk_stress.ledger.ledger import Ledger, Terms
ledger = Ledger(sys.argv[1], Terms("p", "v", "t", (1e6,), tolerated=0.5, warn_at=1.0))
ledger.spend("selection", 1)
children = []
for _ in range(4):
    child = os.fork()
    if child == 0:
        inherited = ledger._store._open
        for _ in range(5):
            ledger.spend("selection", 1)
        if ledger._store._open is inherited:
            os._exit(1)
        ledger.close()
        os._exit(0)
    children.append(child)
for _ in range(5):
    ledger.spend("selection", 1)
assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
ledger.verify()
print(ledger.spent("selection"))
"""
    assert subprocess.check_output([sys.executable, "-c", script, str(path)], text=True).strip() == "26.0"


def test_a_pickled_ledger_is_the_same_file(book: Ledger) -> None:
    with pickle.loads(pickle.dumps(book)) as other:
        other.spend("selection", 3)
    assert book.spent("selection") == 3


# --- the command line ---------------------------------------------------------------------------------------------


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: object) -> tuple[int, str, str]:
        parser = cli._Parser(prog="elk-stress")
        ledger_cli.add_ledger(parser.add_subparsers(dest="command", required=True))
        try:
            options = parser.parse_args(["ledger", *map(str, arguments)])
        except cli._BadInput as error:
            return 2, "", f"elk-stress: {error}\n"
        assert options.command == "ledger"
        code = ledger_cli.run_ledger(options)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture
def measured(tmp_path: Path) -> list[object]:
    file = tmp_path / "result.json"
    ids, bits = [f"item{i}" for i in range(5)], [Bits(13, 13, 14, Kind.ESTIMATE, "x").to_json()] * 5
    more = {"tails": {"gaussian": 13.0, "student_t(5)": 7.0}, "scale": {"2": 4.0}}
    row = {"items": {"ids": ids, "bits": bits}, "detection": {"threshold": 0.0}, **more}
    record = {"probe": "mine", "testbed": "t", "site": "s", "seed": 0, "threats": {ITEM: row}}
    file.write_text(json.dumps({"results": [record]}))
    return ["--result", file, "--probe", "mine", "--threat", ITEM, "--tolerated", 0.125]


def test_command_line(command: Run, path: Path, measured: list[object]) -> None:
    code, out, err = command("show", path, *measured)
    assert (code, err) == (0, "")
    said = " ".join(out.split())
    assert "Spent against mine on t at s under item/natural/gaussian: 5 caught items" in said
    assert "hold for the natural prior, under each measured tail: gaussian." in said
    selection = re.search(r"Selection budget under one tail alone: gaussian 10, student_t\(5\) ([\d.]+) bits", said)
    assert selection is not None
    assert f"10 {selection[1]} student_t(5)" in said
    assert "Selection budget at multiples of the scale, Gaussian tails: 2 " in said
    assert command("spend", path, "selection", "--of", 16, "--note", "a seed") == (
        0,
        "charge 1: 4 to selection on main; 4 spent, 6 remain\n",
        "",
    )
    code, out, err = command("spend", path, "selection", 4.5)
    assert (code, out) == (0, "charge 2: 4.5 to selection on main; 8.5 spent, 1.5 remain\n")
    assert err.startswith("elk-stress: selection: 8.5 of 10 bits are spent")
    assert err.count("\n") == 1
    code, out, err = command("spend", path, "selection", "--of", 3)
    assert (code, out) == (1, "")
    assert "1.58496 bits asked for, but 1.5 of 10 remain" in err
    code, out, err = command("spend", path, "kl", "--total", 0.25, "--lineage", "tuned", "--parents", "main", "--json")
    assert (code, out) == (1, "")
    assert "another kind (selection)" in err
    assert "--mix" in err
    code, out, err = command(
        *("spend", path, "kl", "--total", 0.25, "--lineage", "tuned", "--parents", "main", "--mix", "--json")
    )
    assert code == 0
    assert (json.loads(out)["spent"], json.loads(out)["remaining"]) == (0.25, None)
    assert "several kinds" in err
    code, out, err = command("spend", path, "queries", 3, "--lineage", "q")
    assert (code, out) == (0, "charge 5: 3 to queries on q; 3 spent, no guarantee\n")
    assert "carry no guarantee" in err
    code, out, err = command("show", path, "--json")
    rows = {(row["lineage"], row["account"]): row for row in json.loads(out)["balances"]}
    assert rows["main", "selection"]["spent"] == 8.5
    assert rows["main", "selection"]["worst_tail"] == "student_t(5)"
    assert rows["main", "selection"]["remaining_worst"] < rows["main", "selection"]["remaining"]
    assert rows["tuned", "selection"]["mixed"]
    assert rows["tuned", "selection"]["remaining"] is rows["tuned", "selection"]["remaining_worst"] is None
    code, out, err = command("show", path)
    assert "charges of several kinds" in " ".join(out.split())
    # spent, budget, remains, worst tail, lost: nothing remains of a mixed lineage
    assert re.search(r"^ *tuned +selection +1 +8\.5 bits +10 +- +- +- +none: mixed lineage", out, re.MULTILINE)
    assert re.search(r"^ *main +selection +2 +8\.5 bits +10 +1\.5 ", out, re.MULTILINE)
    assert command("spend", path, "kl", 0.01, "--lineage", "tuned")[1].endswith("; 0.26 spent, no guarantee\n")
    code, out, err = command("verify", path)
    assert (code, err) == (0, "")
    assert out.startswith("6 charges hold; last hash ")
    head = out.split()[-1]
    assert json.loads(command("verify", path, "--head", head, "--json")[1]) == {"charges": 6, "head": head}
    code, out, err = command("verify", path, "--head", "0" * 64)
    assert (code, out) == (1, "")
    assert "not in the chain" in err
    with Ledger(path) as book:
        assert book.charges()[0].note == "kept 1 of 16; a seed"


def test_show_says_by_what_charges_are_refused(command: Run, tmp_path: Path) -> None:
    def shown(name: str, record: dict[str, Any] | None, tolerated: float = 0.25, threat: str = ITEM) -> str:
        terms = TERMS if record is None else Terms.of_result(record, threat, tolerated=tolerated)
        Ledger(tmp_path / name, terms).close()
        return " ".join(command("show", tmp_path / name)[1].split())

    record = _record({"gaussian": dict.fromkeys("abc", 30.0), "best": dict.fromkeys("abc", 20.0)})
    # 30 bits are 5.99 sd; what the Student-t says at that margin, closed form
    bits = -math.log2(t.sf(-ndtri(2.0**-30) * math.sqrt(5 / 3), 5)) - 2
    said = "Charges are refused by the budget column only;"
    assert f"{said} under student_t(5) {bits:.4g} bits would be the limit." in shown("a", record)
    few = _record({"gaussian": {"a": 1.2}, "best": {"a": 1.0}})
    assert f"{said} no other tail of the result would leave less." in shown("b", few, 0.9)
    # where behaviour is kept, only the tails that were measured item by item are known
    kept = {**record, "threats": {f"{name}/kept": dict(row) for name, row in record["threats"].items()}}
    for row in kept["threats"].values():
        del row["tails"], row["scale"]
    assert f"{said} no other tail was measured." in shown("c", kept, threat=f"{ITEM}/kept")
    assert f"{said} no other tail was measured." in shown("d", None)


@pytest.mark.parametrize(
    "text", ["\x1b[31m\x9b2J\u202e\n| a", "[red]x[/red][link=http://evil.example]y[/link]", "<b>`"]
)
def test_names_and_notes_are_shown_as_text(command: Run, path: Path, measured: list[object], text: str) -> None:
    file = Path(str(measured[1]))
    record = json.loads(file.read_text())
    record["results"][0].update(probe=text, testbed=text, site=text)
    file.write_text(json.dumps(record))
    named = [*measured[:3], text, *measured[4:]]
    said = [command("show", path, *named)]
    lineage = printable(text)
    said += [command("spend", path, "selection", 4, "--note", text, "--lineage", lineage), command("show", path)]
    said += [
        command("spend", path, "selection", 40, "--lineage", lineage),
        command("spend", path, "kl", 1, "--parents", text),
    ]
    said += [command("show", path, "--json"), command("verify", path), command("show", path, *measured)]
    # a parent that is there has charges of another kind, one that is not is named as unknown
    assert [code for code, _, _ in said] == [0, 0, 0, 1, 1 if lineage == text else 2, 0, 0, 2]
    for _, out, err in said:
        assert all(line.isprintable() for line in (out + err).split("\n"))
    assert "".join(lineage.split()) in "".join(said[2][1].split())
    if lineage != text:
        code, _, err = command("spend", path, "selection", 1, "--lineage", text)
        assert (code, err.count("\n")) == (2, 1)
        assert "visible characters" in err


def test_help_says_what_mixing_and_queries_are(capsys: pytest.CaptureFixture[str]) -> None:
    parser = cli._Parser(prog="elk-stress")
    ledger_cli.add_ledger(parser.add_subparsers(dest="command", required=True))
    with pytest.raises(SystemExit):
        parser.parse_args(["ledger", "spend", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "the first charge of a second kind on a lineage is refused" in said
    assert "their answers shaped its moves (without it they are a record, which voids nothing)" in said


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["show", "FILE"], "there is no ledger at .*; give --result FILE.json"),
        (["verify", "FILE"], "there is no ledger at"),
        (["show", "FILE", "--probe", "x", "--warn-at", "0.5"], "--probe, --warn-at go with --result"),
        (["show", "FILE", "--result", "RESULT"], "--result needs --threat"),
        (["show", "FILE", "--result", "none.json", "--threat", ITEM], "No such file"),
        (["show", "FILE", "--result", "RESULT", "--threat", ITEM, "--tolerated", "2"], "between 0 and 1"),
        (["show", "FILE", "--result", "RESULT", "--threat", "x"], "threat 'x' was not measured"),
        (["spend", "FILE", "kl"], "what is to be charged"),
        (["spend", "FILE", "kl", "--of", "3"], "are the amount of a selection"),
        (["spend", "FILE", "selection", "1", "--of", "3"], "are the amount of a selection"),
        (["spend", "FILE", "selection", "--keep", "3"], "give both"),
        (["spend", "FILE", "selection", "--of", "3", "--keep", "4"], "--keep is between 1 and --of, 3"),
        (["spend", "FILE", "selection", "1", "--total", "3", *("--result", "RESULT", "--threat", ITEM)], "either"),
        (["spend", "FILE", "kl", "nan", "--result", "RESULT", "--threat", ITEM], "finite number from 0 on"),
    ],
)
def test_command_line_refuses_in_one_line(
    command: Run, path: Path, measured: list[object], arguments: list[str], told: str
) -> None:
    places = {"FILE": str(path), "RESULT": str(measured[1])}
    code, out, err = command(*[places.get(word, word) for word in arguments])
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert re.search(told, err), err
    assert not path.exists() or Ledger(path).charges() == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda r: r["results"][0].pop("threats"),
        lambda r: r["results"][0].update(threats=3),
        lambda r: r["results"][0]["threats"].update({ITEM: []}),
        lambda r: r["results"][0]["threats"][ITEM].pop("detection"),
        lambda r: r["results"][0]["threats"][ITEM]["items"].pop("ids"),
        lambda r: r["results"][0]["threats"][ITEM]["items"]["bits"][0].update(low="many"),
        lambda r: r["results"][0]["threats"][ITEM]["items"]["bits"].pop(),
        lambda r: r["results"].__setitem__(0, "x"),
        lambda r: r.update(results="x"),
        lambda r: r["results"][0].update(site={"a": "b"}, seed=[1]),
    ],
)
def test_results_that_are_not_as_written_are_one_line(
    command: Run, path: Path, measured: list[object], spoil: Callable[[Any], object]
) -> None:
    file = Path(str(measured[1]))
    record = json.loads(file.read_text())
    spoil(record)
    file.write_text(json.dumps(record))
    code, out, err = command("show", path, *measured)
    assert (code, out, err.count("\n")) == (2, "", 1) or code == 0
    assert "Traceback" not in err
    assert path.exists() == (code == 0)
