"""Users' files as other programs write them: what was written comes back byte for byte, or the line is named."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elk_stress.testbeds.json_lines import read_items
from elk_stress.testbeds.statements import Statements
from elk_stress.testbeds.user_data import load_jsonl

TEXTS = [
    "one\u2028two",
    "a\x0bb\x0cc\x1cd\x1de\x1ef\x85g\u2029h",
    "<|im_start|>assistant\n",
    " leading and trailing \t ",
    "\r\na\r",
    "\ufeffmark inside",
    "nul \x00",
    "e\u0301 is not \u00e9",
    "\U0001f600",
    'quotes " and \\',
]


def line(text: object = "a", label: object = 1, **more: object) -> str:
    return json.dumps({"text": text, "label": label, **more}, ensure_ascii=False)


def read(tmp_path: Path, *lines: str | bytes, positive: str | None = None) -> list[dict[str, object]]:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n".join(part if isinstance(part, bytes) else part.encode() for part in lines))
    return read_items(path, positive)


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n", "\n \t\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_texts_come_back_byte_for_byte(tmp_path: Path, ascii_only: bool, end: str, encoding: str) -> None:
    path = tmp_path / "data.jsonl"
    written = [json.dumps({"text": text, "label": i % 2}, ensure_ascii=ascii_only) for i, text in enumerate(TEXTS)]
    path.write_bytes(end.join(written).encode(encoding))
    found = read_items(path)
    assert [row["text"] for row in found] == TEXTS
    assert [row["label"] for row in found] == [i % 2 for i in range(len(TEXTS))]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])).filter(str.strip), max_size=5), st.booleans())
def test_any_text_comes_back(tmp_path_factory: pytest.TempPathFactory, texts: list[str], ascii_only: bool) -> None:
    path = tmp_path_factory.mktemp("any") / "data.jsonl"
    path.write_text(
        "".join(json.dumps({"text": t, "label": 0}, ensure_ascii=ascii_only) + "\n" for t in texts), "utf-8"
    )
    assert [row["text"] for row in read_items(path)] == texts


@given(st.binary(max_size=80) | st.text(st.sampled_from('{}[]":,ntextlabel01 \\\n')).map(str.encode))
def test_any_bytes_are_items_or_one_clear_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("bytes") / "data.jsonl"
    path.write_bytes(content)
    rows, told = [], str(path)
    try:
        rows = read_items(path)
    except ValueError as error:
        told = str(error)
    assert told.startswith(str(path))
    assert all(isinstance(row["text"], str) and row["label"] in (0, 1) for row in rows)


def test_raw_control_characters_in_a_string_are_text(tmp_path: Path) -> None:
    assert read(tmp_path, b'{"text": "a\x0b\r\tb\x00", "label": 0}')[0]["text"] == "a\x0b\r\tb\x00"


def test_files_put_one_after_the_other_keep_their_marks_out_of_the_text(tmp_path: Path) -> None:
    found = read(tmp_path, b"\xef\xbb\xbf" + line("a").encode(), b"\xef\xbb\xbf" + line("b").encode())
    assert [row["text"] for row in found] == ["a", "b"]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b'{"text": "caf\xe9", "label": 0}', r"line 2: not UTF-8 \(byte 0xe9 at byte 14 of the line\)"),
        (line().encode("utf-16-le"), r"line 2: not JSON \(it holds NUL bytes: is it UTF-16\?\)"),
        ("[" * 100_000, r"line 2: JSON nested too deeply"),
        ('{"text": "a", "label": 0, "x": ' + "[" * 100_000, r"line 2: JSON nested too deeply"),
        ('{"text": "a", "text": "b", "label": 0}', r"line 2: the field 'text' is there twice"),
        ('{"text": "a", "label": NaN}', r"line 2: NaN is no JSON"),
        ('{"text": "a", "label": -Infinity}', r"line 2: -Infinity is no JSON"),
        ('{"text": "a", "label": 1e400}', r"line 2: the field label must be 0 or 1.*got inf"),
        ('{"text": "a", "label": 1' + "0" * 5000 + "}", r"line 2: Exceeds the limit"),
        ('{"text": "a", "label": 1' + "0" * 4000 + "}", r"line 2: the field label must be 0 or 1.{60}"),
        ('{"text": "a", "label": 0.5}', r"line 2: the field label must be 0 or 1.*got 0\.5"),
        ('{"text": "a", "label": [1]}', r"line 2: the field label must be 0 or 1.*got \[1\]"),
        ('{"text": "a", "label": null}', r"line 2: the field label must be 0 or 1.*missing"),
        ('{"statement": "a", "label": 1}', r"line 2: the field text .*missing; its fields: 'statement', 'label'"),
        ('{"text": ["a"], "label": 1}', r"line 2: the field text must be a string"),
        ('{"text": " \\u2028\\n", "label": 1}', r"line 2: the field text must be a string that is not empty"),
        ('{"text": "a \\ud800", "label": 1}', r"line 2: the field text holds half a surrogate pair at character 2"),
        ('{"text": "a", "label": 1, "group": "\\udfff"}', r"line 2: the field group holds half a surrogate"),
        ('{"text": "a", "label": 1, "group": {}}', r"line 2: the field group must be a string or a number"),
        ('{"text": "a", "label": 1, "group": 1e999}', r"line 2: the field group must be a string or a number"),
        ('{"text": "a", "label": 1, "pair": true}', r"line 2: the field pair must be a string or a number"),
        ("{}", r"line 2: the field text .*its fields: none"),
        ("3", r"line 2: expected an object like .*got int"),
        (line() + line(), r"line 2: not JSON \(Extra data"),
        ("\u2028", r"line 2: not JSON"),
    ],
)
def test_bad_line_is_named(tmp_path: Path, bad: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path, line(), bad, line())
    assert str(error.value).startswith(str(tmp_path / "data.jsonl"))
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-be", "utf-16-le"])
def test_other_encodings_are_named(tmp_path: Path, encoding: str) -> None:
    with pytest.raises(ValueError, match="UTF-32; expected UTF-8" if encoding == "utf-32" else "UTF-16"):
        read(tmp_path, line().encode(encoding))


def test_array_over_many_lines_says_how_it_becomes_lines(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"line 1: not JSON .*jq -c '\.\[\]'"):
        read(tmp_path, "[", line() + ",", line(), "]")


# -- labels and names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("negative", "positive"), [("0", "1"), ("false", "true"), ("0.0", "1.0"), ("-0.0", "1e0")])
def test_numbers_and_truth_values_are_labels(tmp_path: Path, negative: str, positive: str) -> None:
    found = read(tmp_path, *(f'{{"text": "a", "label": {label}}}' for label in (negative, positive, negative)))
    assert [row["label"] for row in found] == [0, 1, 0]
    assert {type(row["label"]) for row in found} == {int}


def test_names_are_labels_where_one_is_said_to_be_positive(tmp_path: Path) -> None:
    lines = [line(label=name) for name in ("lie", "honest", "lie")]
    assert [row["label"] for row in read(tmp_path, *lines, positive="lie")] == [1, 0, 1]
    assert [row["label"] for row in read(tmp_path, *lines, positive="honest")] == [0, 1, 0]
    with pytest.raises(ValueError, match=r"line 1: the field label must be 0 or 1.*'honest' and 'lie', so say which"):
        read(tmp_path, *lines)
    with pytest.raises(ValueError, match=r"which is 'Lie'"):
        read(tmp_path, *lines, positive="Lie")
    with pytest.raises(ValueError, match="one of 3 different names"):
        read(tmp_path, *lines, line(label="other"), positive="lie")
    with pytest.raises(ValueError, match="one of 1 different names"):
        read(tmp_path, lines[0], positive="lie")
    with pytest.raises(ValueError, match=r"line 2: the field label.*'lie', and numbers elsewhere"):
        read(tmp_path, line(label=1), line(label="lie"), line(label="honest"), positive="lie")


def test_groups_of_a_table_with_gaps_are_the_same_groups(tmp_path: Path) -> None:
    found = read(tmp_path, *(line(group=group, pair=pair) for group, pair in [(3, 1), (3.0, 1), ("3", 2), (None, 2.0)]))
    assert [row["group"] for row in found] == ["group 3", "group 3", "group 3", "group 2"]
    assert [row["pair"] for row in found] == ["1", "1", "2", "2"]
    assert read(tmp_path, line(group=None))[0]["group"] == "line 1"


# -- other formats ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_table_is_refused_and_the_line_that_converts_it_works(tmp_path: Path, delimiter: str) -> None:
    path = tmp_path / ("data.csv" if delimiter == "," else "data.tsv")
    rows = [[f"{i} {text}", i % 2] for i, text in enumerate(t for t in TEXTS if "\x00" not in t)]
    with path.open("w", newline="", encoding="utf-8-sig") as stream:
        csv.writer(stream, delimiter=delimiter).writerows([["text", "label"], *rows])
    with pytest.raises(ValueError, match="is a table") as error:
        read_items(path)
    (code,) = re.findall(r'python -c "(.*)" > data\.jsonl', str(error.value))
    # as a user runs it: the line leaves its file to the end of the program
    out = subprocess.run([sys.executable, "-X", "utf8", "-c", code], capture_output=True, check=True).stdout.decode()
    assert [[row["text"], row["label"]] for row in read(tmp_path, out)] == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", b"", "is a parquet file.*read_parquet.*to_json"),
        ("a.jsonl", b"PAR1\x15\x04", "is a parquet file.*read_parquet.*to_json"),
        ("a.jsonl.gz", b"\x1f\x8b\x08\x00", r"is packed \(gzip\)"),
        ("a.jsonl", b"PK\x03\x04", r"is packed \(zip\)"),
    ],
)
def test_other_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        read_items(tmp_path / name)


def test_splits_hold_the_texts_as_written(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    texts = [f" {i} turn\n\u2028<end>\n" for i in range(60)]
    path.write_text("\n".join(line(text, i % 2 == 0) for i, text in enumerate(texts)), encoding="utf-8")
    splits = load_jsonl(path, np.random.SeedSequence(0))
    assert sorted(t for items in splits.values() for t in items.texts or ()) == sorted(texts)
    labels = {t: n for items in splits.values() for t, n in zip(items.texts or (), items.labels.tolist(), strict=True)}
    assert all(labels[text] == (i % 2 == 0) for i, text in enumerate(texts))


def test_positive_says_which_number_is_caught(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps({"text": f"item {i}", "label": i % 2}) + "\n" for i in range(4)))
    assert [row["label"] for row in read_items(path)] == [0, 1, 0, 1]
    assert [row["label"] for row in read_items(path, "1")] == [0, 1, 0, 1]
    assert [row["label"] for row in read_items(path, "0")] == [1, 0, 1, 0]
    with pytest.raises(ValueError, match="no label is 'banana'"):
        read_items(path, "banana")


def test_truth_as_text_is_not_guessed(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"item {i}", "label": ("true", "false")[i % 2]}) + "\n" for i in range(60))
    )
    with pytest.raises(ValueError, match="say which is 1 by positive"):
        Statements(data=path)
    labels = np.concatenate([items.labels for items in Statements(data=path, positive="true").splits.values()])
    assert labels.sum() == 30
