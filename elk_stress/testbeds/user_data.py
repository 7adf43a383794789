"""A user's own statements: a jsonl file with ``text`` and ``label``, optionally ``group`` and ``pair``.

``label`` is 1 (or true) for what a monitor must catch, 0 (or false) otherwise. ``text`` is read as it is, byte for byte
(:mod:`elk_stress.testbeds.json_lines`): the newline that a chat template ends with is a token. Lines of one ``group``
(default: the line's ``pair``, else the line itself) never cross splits, nor do lines of one text, where
case, white space and the way in which a character is encoded make no difference. Two lines of one ``pair`` are a
contrast pair, the affirmed form first.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from elk_stress.testbeds.duplicates import conflicts, joined
from elk_stress.testbeds.json_lines import read_items
from elk_stress.testbeds.protocol import Items, SplitName

__all__ = ["load_jsonl"]

# shares of the groups: as in the generated data
_SHARES: dict[SplitName, float] = {"train": 0.3, "calibration": 0.4, "test": 0.3}
# below this a split of 30% holds too few of either class to fit or judge anything
_LEAST_PER_CLASS = 10


def load_jsonl(path: str | Path, seed: np.random.SeedSequence, positive: str | None = None) -> dict[SplitName, Items]:
    """Train, calibration and test items of a jsonl file; groups are dealt to splits at random, classes evenly.

    Args:
        path: the file.
        seed: of the deal.
        positive: which of two labels is 1; needed where they are names.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a malformed line (with its number), one class only, too few items or groups, one text with both
            labels.
    """
    path = Path(path)
    rows = read_items(path, positive)
    counts = [sum(row["label"] == label for row in rows) for label in (0, 1)]
    if min(counts) == 0:
        only = "no items" if not rows else f"only items with label {1 if counts[1] else 0}"
        raise ValueError(f"{path} holds {only}; both 0 and 1 (1 = what a monitor must catch) are needed")
    if min(counts) < _LEAST_PER_CLASS:
        raise ValueError(
            f"{path} holds {counts[0]} items with label 0 and {counts[1]} with label 1; at least {_LEAST_PER_CLASS} of "
            "each are needed to fit, calibrate and test, and 1/fpr negatives in the calibration split (40% of items)"
        )
    _join_equal_texts(path, rows)
    dealt = _deal(rows, np.random.default_rng(seed))
    splits = {split: _items([row for row in rows if dealt[row["group"]] == split]) for split in _SHARES}
    for split, items in splits.items():
        if len(set(items.labels.tolist())) < 2:
            raise ValueError(
                f"the {split} split of {path} holds one class only: its {len(dealt)} groups are too few or too "
                "uneven to deal to three splits; use more, smaller groups"
            )
    return splits


def _join_equal_texts(path: Path, rows: list[dict[str, Any]]) -> None:
    """Lines of one text get one group, that of the first of them, and all of their groups' lines with them."""
    both = conflicts([row["text"].strip() for row in rows], np.array([row["label"] for row in rows]))
    if both:
        told = "; ".join(
            f"{rows[low]['id']} (label 0) and {rows[high]['id']} (label 1), {rows[low]['text'][:60]!r}"
            for low, high in both[:3]
        )
        raise ValueError(
            f"{path} holds {len(both)} texts with both labels: {told}. A text has one label: correct it, drop the "
            "lines, or put into the text what makes the difference"
        )
    same = [" ".join(unicodedata.normalize("NFKC", row["text"]).casefold().split()) for row in rows]
    groups = [row["group"] for row in rows]
    for row, first in zip(rows, joined(groups, same), strict=True):
        row["group"] = groups[first]


def _deal(rows: list[dict[str, Any]], rng: np.random.Generator) -> dict[str, SplitName]:
    """Groups -> splits: largest groups first, each to the split that lacks most items of its labels."""
    sizes: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(2))
    pair_group: dict[str, str] = {}
    for row in rows:
        sizes[row["group"]][row["label"]] += 1
        if row["pair"] is not None and pair_group.setdefault(row["pair"], row["group"]) != row["group"]:
            raise ValueError(f"pair {row['pair']!r} ({row['id']}) spans two groups; give both lines the same group")
    total = sum(sizes.values(), np.zeros(2))
    lacking = {split: share * total for split, share in _SHARES.items()}
    names = [list(sizes)[i] for i in rng.permutation(len(sizes))]
    dealt: dict[str, SplitName] = {}
    for name in sorted(names, key=lambda name: -sizes[name].sum()):
        wanting = {split: float((lacking[split] / total * sizes[name]).sum()) for split in _SHARES}
        split = max(wanting, key=lambda split: wanting[split])
        dealt[name] = split
        lacking[split] = lacking[split] - sizes[name]
    return dealt


def _items(rows: list[dict[str, Any]]) -> Items:
    members: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        if row["pair"] is not None:
            members[row["pair"]].append(i)
    for pair, lines in members.items():
        if len(lines) != 2 or rows[lines[0]]["label"] == rows[lines[1]]["label"]:
            raise ValueError(
                f"pair {pair!r} must be two lines with opposite labels (the affirmed form first), "
                f"got {len(lines)}: {', '.join(rows[i]['id'] for i in lines)}"
            )
    return Items(
        ids=tuple(row["id"] for row in rows),
        labels=np.array([row["label"] for row in rows], dtype=np.int64),
        groups=np.array([row["group"] for row in rows]),
        pairs=np.array(list(members.values()), dtype=np.int64) if members else None,
        texts=tuple(row["text"] for row in rows),
    )
