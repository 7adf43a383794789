"""Equal items are one entity: no split of pure noise may know another, and nothing happens to items that differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elk_stress.testbeds.arrays import Arrays
from elk_stress.testbeds.duplicates import conflicts, joined, names_items, near_copies, recur, row_keys
from elk_stress.testbeds.protocol import SplitName
from elk_stress.testbeds.user_data import load_jsonl
from elk_stress.thoughts.prepared import prepare

SPLITS: tuple[SplitName, ...] = ("train", "calibration", "test")


def noise(n: int, *shape: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    return rng.standard_normal((n, *shape)), rng.permutation(n) % 2


def in_more_than_one(beds: Arrays, rows: np.ndarray) -> int:
    """How many different rows stand in more than one split, by ``np.unique`` on the rows themselves."""
    _, same = np.unique(rows.reshape(len(rows), -1), axis=0, return_inverse=True)
    where = [set(same.ravel()[[int(i) for i in beds.splits[split].ids]].tolist()) for split in SPLITS]
    return len((where[0] & where[1]) | (where[0] & where[2]) | (where[1] & where[2]))


@pytest.mark.parametrize("shape", [(16,), (3,), (4, 6), (3, 2, 5)], ids=str)
@pytest.mark.parametrize("given", [False, True], ids=["no groups", "groups"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int8"])
def test_copies_never_cross_splits(shape: tuple[int, ...], given: bool, dtype: str) -> None:
    rows, labels = noise(100, *shape)
    rows = (rows * 40).astype(dtype)
    _, kept = np.unique(rows.reshape(100, -1), axis=0, return_index=True)
    order = np.random.default_rng(np.random.SeedSequence(1)).permutation(4 * len(kept))
    copies, truth = np.repeat(rows[kept], 4, axis=0)[order], np.repeat(labels[kept], 4)[order]
    # the user's groups link some items with others than their copies (all of them would make one entity of everything)
    groups = (
        np.where(np.arange(len(order)) < 30, np.arange(len(order)) // 2, 1000 + np.arange(len(order)))
        if given
        else None
    )
    beds = Arrays(copies, truth, groups)
    assert in_more_than_one(beds, copies) == 0
    if groups is not None:
        where = [set(groups[[int(i) for i in beds.splits[split].ids]].tolist()) for split in SPLITS]
        assert sum(map(len, where)) == len(set().union(*where))


@pytest.mark.parametrize("groups", [None, np.arange(60) // 3, np.array([f"g{i % 20}" for i in range(60)])])
def test_items_that_differ_are_dealt_as_before(groups: np.ndarray | None) -> None:
    rows, labels = noise(60, 5)
    found = Arrays(rows, labels, groups).splits
    given = np.arange(60) if groups is None else groups
    for split in SPLITS:
        np.testing.assert_array_equal(found[split].groups, given[[int(i) for i in found[split].ids]])


def test_minus_zero_is_zero_and_the_last_bit_is_a_difference() -> None:
    rows = np.array([[0.0, 1.0], [-0.0, 1.0], [np.nextafter(0.0, 1.0), 1.0], [0.0, np.nextafter(1.0, 2.0)]])
    keys = row_keys(rows).tolist()
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


def test_rows_are_equal_only_over_all_contexts() -> None:
    rows, _ = noise(10, 3, 4)
    rows[5] = rows[2]
    rows[7, :2] = rows[2, :2]
    keys = row_keys(rows)
    assert keys[5] == keys[2]
    assert keys[7] != keys[2]


def test_keys_do_not_depend_on_the_memory_order_or_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.repeat(noise(30, 7)[0], 2, axis=0)
    whole = row_keys(rows)
    np.testing.assert_array_equal(whole, np.arange(60) // 2)
    monkeypatch.setattr("elk_stress.testbeds.duplicates._CHUNK", 100)
    np.testing.assert_array_equal(row_keys(np.asfortranarray(rows)), whole)
    assert len(row_keys(rows[:0])) == 0


def test_joined_takes_chains_of_groups_and_copies_together() -> None:
    # 0 - 1 by group, 1 - 2 equal, 2 - 3 by group; 4 alone
    found = joined(np.array(["a", "a", "b", "b", "c"]), np.array([0, 1, 1, 2, 3]))
    assert found.tolist() == [0, 0, 0, 0, 4]


# ---------------------------------------------------------------------------------------- both labels


@pytest.mark.parametrize("shape", [(3,), (16,), (500,), (4, 6)], ids=str)
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_equal_rows_with_both_labels_are_an_error_that_names_them(shape: tuple[int, ...], dtype: str) -> None:
    rows, labels = noise(80, *shape)
    rows, labels[31], labels[7] = rows.astype(dtype), 0, 1
    rows[31] = rows[7]
    with pytest.raises(ValueError, match=r"items 31 \(label 0\) and 7 \(label 1\).*correct it or drop"):
        _ = Arrays(rows, labels).splits
    labels[31] = 1
    assert sum(len(items) for items in Arrays(rows, labels).splits.values()) == 80


def _one_hot(rng: np.random.Generator) -> np.ndarray:
    return np.eye(40)[rng.integers(0, 40, 400)]


DISCRETE: dict[str, Any] = {
    "3 flags": lambda rng: rng.integers(0, 2, (400, 3)),
    "20 flags": lambda rng: rng.integers(0, 2, (400, 1)) * np.ones((1, 20)),
    "one number of six": lambda rng: rng.integers(0, 6, (400, 1)),
    "two ratings of 0 to 100": lambda rng: rng.integers(0, 101, (400, 2)).astype(float),
    "three counts": lambda rng: rng.poisson(1.0, (400, 3)).astype(np.float32),
    "standardized counts": lambda rng: (rng.poisson(1.0, (400, 3)) - 0.97) / 1.03,
    "one-hot of 40": _one_hot,
    "projected flags": lambda rng: rng.integers(0, 2, (400, 3)) @ rng.standard_normal((3, 3)),
    "words of short texts": lambda rng: rng.random((400, 200)) < 0.005,
}


@pytest.mark.parametrize("name", DISCRETE)
def test_discrete_features_may_carry_either_label(name: str) -> None:
    rng = np.random.default_rng(np.random.SeedSequence(3))
    rows, labels = DISCRETE[name](rng), rng.integers(0, 2, 400)
    if name == "two ratings of 0 to 100":
        rows[1], labels[:2] = rows[0], (0, 1)
    keys = row_keys(rows)
    assert conflicts(keys, labels), "without collisions nothing is tested"
    assert not names_items(rows, keys)
    beds = Arrays(rows, labels)
    different = len(np.unique(rows, axis=0))
    assert recur(rows, keys) == (different < 40)
    # few kinds of item stand in every split, as items of their own; many are dealt kind by kind
    assert in_more_than_one(beds, rows) == (different if recur(rows, keys) else 0)
    assert "leak" not in {f.name for f in prepare(beds).flags}


def test_many_copies_of_items_that_have_a_name_are_joined() -> None:
    rows, labels = noise(30, 16)
    copies = np.repeat(rows, 25, axis=0)
    assert not recur(copies, row_keys(copies))
    assert in_more_than_one(Arrays(copies, np.repeat(labels, 25)), copies) == 0


# ---------------------------------------------------------------------------------------- texts


def written(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "data.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def split_of(path: Path, seed: int) -> dict[str, str]:
    splits = load_jsonl(path, np.random.SeedSequence(seed))
    return {text: split for split, items in splits.items() for text in items.ids if items.texts}


VARIANTS = {
    "equal": "the box 0 is red",
    "white space around": "  the box 0 is red\t",
    "white space inside": "the  box 0\u00a0is red",
    "case": "The Box 0 IS red",
    "encoding": "the box \uff10 is red",
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_texts_share_a_split(tmp_path: Path, variant: str) -> None:
    rows = [{"text": f"the box {i} is red", "label": i % 2} for i in range(60)]
    path = written(tmp_path, [*rows, {"text": VARIANTS[variant], "label": 0}])
    for seed in range(12):
        where = split_of(path, seed)
        assert where["line 61"] == where["line 1"]
    # a text that does differ is dealt by itself
    other = written(tmp_path, [*rows, {"text": "the box 0 is redder", "label": 0}])
    apart = [where["line 61"] != where["line 1"] for where in (split_of(other, seed) for seed in range(12))]
    assert any(apart)


def test_equal_texts_join_the_groups_and_pairs_that_hold_them(tmp_path: Path) -> None:
    rows = [
        {"text": f"{i} is {word}", "label": k, "pair": i} for i in range(40) for k, word in enumerate(("so", "not"))
    ]
    # line 81 copies line 1 (pair 0) and stands in a group with line 82
    rows += [{"text": "0 is so", "label": 0, "group": "x"}, {"text": "beside it", "label": 1, "group": "x"}]
    path = written(tmp_path, rows)
    for seed in range(12):
        where = split_of(path, seed)
        assert len({where[f"line {number}"] for number in (1, 2, 81, 82)}) == 1
    test = load_jsonl(path, np.random.SeedSequence(0))["test"]
    assert test.pairs is not None
    assert (test.labels[test.pairs] == [0, 1]).all()


@pytest.mark.parametrize("text", ["the box 0 is red", " the box 0 is red\n"])
def test_a_text_with_both_labels_is_an_error_that_names_the_lines(tmp_path: Path, text: str) -> None:
    rows = [{"text": f"the box {i} is red", "label": i % 2} for i in range(60)]
    path = written(tmp_path, [*rows, {"text": text, "label": 1}])
    with pytest.raises(
        ValueError, match=r"both labels: line 1 \(label 0\) and line 61 \(label 1\), 'the box 0 is red'"
    ):
        load_jsonl(path, np.random.SeedSequence(0))


def test_case_may_be_what_the_label_is_about(tmp_path: Path) -> None:
    rows = [{"text": text, "label": k} for i in range(40) for k, text in enumerate((f"word {i}", f"WORD {i}"))]
    where = split_of(written(tmp_path, rows), 0)
    assert all(where[f"line {2 * i + 1}"] == where[f"line {2 * i + 2}"] for i in range(40))


# ---------------------------------------------------------------------------------------- nearly the same


def _templated(rng: np.random.Generator) -> np.ndarray:
    """Statements of 8 templates about 60 subjects each: template, word and a small attribute."""
    template, word = rng.standard_normal((8, 1, 64)), rng.standard_normal((1, 120, 64))
    both = template + 0.3 * word + 0.05 * rng.standard_normal((8, 120, 64))
    return both.reshape(-1, 64)[rng.permutation(960)]


def _curve(rng: np.random.Generator) -> np.ndarray:
    angle = rng.uniform(0, 6, 900)
    return np.stack([np.cos(angle * k) for k in range(1, 21)], axis=1)


CLEAN: dict[str, Any] = {
    "gaussian 1": lambda rng: rng.standard_normal((900, 1)),
    "gaussian 2": lambda rng: rng.standard_normal((900, 2)),
    "gaussian 16": lambda rng: rng.standard_normal((900, 16)),
    "gaussian 500": lambda rng: rng.standard_normal((900, 500)),
    "heavy tails": lambda rng: rng.standard_t(1.5, (900, 3)),
    "clusters": lambda rng: 50 * rng.standard_normal((30, 4))[rng.integers(0, 30, 900)] + rng.standard_normal((900, 4)),
    "a curve": _curve,
    "categories and a number": lambda rng: np.c_[np.eye(40)[rng.integers(0, 40, 900)], rng.standard_normal(900)],
    "a grid": lambda rng: np.unique(rng.integers(0, 60, (900, 2)), axis=0)[rng.permutation(780)].astype(float),
    "templates": _templated,
    "a massive dimension": lambda rng: rng.standard_normal((900, 30)) * np.where(np.arange(30) == 3, 1e4, 1.0),
}


@pytest.mark.parametrize("name", CLEAN)
def test_different_items_are_no_copies(name: str) -> None:
    """24 draws of each; a false alarm has a chance of 3e-6 in each of them."""
    for seed in range(24):
        rows = CLEAN[name](np.random.default_rng(np.random.SeedSequence([seed, 7])))
        half = len(rows) // 2
        assert near_copies(rows[:half], rows[half:]) == 0


@pytest.mark.parametrize("jitter", [0.0, 1e-6, 1e-3])
@pytest.mark.parametrize("name", CLEAN)
def test_nearly_equal_items_are_found(name: str, jitter: float) -> None:
    rng = np.random.default_rng(np.random.SeedSequence(3))
    rows = CLEAN[name](rng)
    half = len(rows) // 2
    copies = rows[:half][rng.permutation(half)[:60]]
    # in one dimension, or within a cluster, a thousandth is what chance does
    jitter = jitter if rows.shape[1] > 2 and name != "clusters" else jitter / 1e3
    new = np.concatenate([rows[half:], copies + jitter * rows.std(axis=0) * rng.standard_normal(copies.shape)])
    assert near_copies(rows[:half], new) >= 10


def test_copies_of_the_same_features_are_found_on_a_float32_scale() -> None:
    rows = np.random.default_rng(np.random.SeedSequence(4)).standard_normal((400, 8)).astype(np.float32) + 1e3
    assert near_copies(rows, rows[:40]) == 40
    assert near_copies(rows[:15], rows[:15]) == 0, "too few to know what is near"


def flagged(rows: np.ndarray, labels: np.ndarray) -> dict[str, str]:
    return {f.name: f.detail for f in prepare(Arrays(rows, labels)).flags}


def test_leak_is_raised_for_nearly_equal_rows_across_splits_and_not_for_equal_ones() -> None:
    rows, labels = noise(200, 16)
    again, truth = np.repeat(rows, 4, axis=0), np.repeat(labels, 4)
    assert "leak" not in flagged(again, truth)
    jittered = again + 1e-4 * np.random.default_rng(np.random.SeedSequence(1)).standard_normal(again.shape)
    assert "nearly the same as a training item" in flagged(jittered, truth)["leak"]
    # the way out: one group
    groups = np.repeat(np.arange(200), 4)
    assert "leak" not in {f.name for f in prepare(Arrays(jittered, truth, groups)).flags}


@pytest.mark.parametrize("dim", [1, 2, 4, 9, 10, 100, 300])
def test_massive_dimensions_are_said(dim: int) -> None:
    rows, labels = noise(300, dim)
    uneven = rows * np.exp(0.7 * np.random.default_rng(np.random.SeedSequence(2)).standard_normal(dim))
    assert "massive_dimensions" not in flagged(uneven, labels)
    few = max(1, dim // 100)
    rows[:, -few:] *= 1000.0
    found = flagged(rows, labels)
    assert ("massive_dimensions" in found) == (dim >= 10)
    if dim >= 10:
        assert found["massive_dimensions"].startswith(f"{few} of {dim} hold 100.0%")
    # twice as many are not a few
    rows[:, -2 * few :] = noise(300, 2 * few, seed=5)[0] * 1000 if dim > 2 else 0.0
    if dim > 2:
        assert "massive_dimensions" not in flagged(rows, labels)
