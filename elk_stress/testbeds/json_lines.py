"""JSON lines as any program writes them: one object a line, its text kept byte for byte.

Lines end at a newline (or carriage return and newline) and nowhere else: every other separator that Unicode knows is
text. A byte-order mark is read over. Whatever is not as it should be is a ``ValueError`` with the file and the line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from elk_stress.core.inputs import as_labels

__all__ = ["read_items"]

_MARK = b"\xef\xbb\xbf"
# a UTF-32 mark begins with the UTF-16 one
_ENCODINGS = {
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_PACKED = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstandard", b"BZh": "bzip2"}
_EXPECTED = 'expected one object a line, like {"text": "...", "label": 0}'


def read_items(path: Path, positive: str | None = None) -> list[dict[str, Any]]:
    """Items of a file with the fields ``text``, ``label`` and optionally ``group`` and ``pair``.

    Args:
        path: the file.
        positive: which of two labels (names, or 0 and 1) is 1, what a monitor must catch; needed for names.

    Returns:
        For each line that is not blank: ``id`` (``"line 7"``), ``text`` as written, ``label`` 0 or 1, ``pair`` and
        ``group`` (text; its line where there is none).

    Raises:
        FileNotFoundError: no such file.
        ValueError: another format or encoding; a line that is not one JSON object, with its number; a field of
            another kind than it should be; labels that are names, unless there are two and one is ``positive``.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no data file at {path}; {_EXPECTED}")
    content = path.read_bytes()
    _check_format(path, content)
    rows = []
    for number, line in enumerate(content.split(b"\n"), 1):
        line = line.removeprefix(_MARK)
        if line.strip(b" \t\r"):
            rows.append(_item(number, _parse(path, number, line), path))
    _number_labels(path, rows, positive)
    return rows


def _check_format(path: Path, content: bytes) -> None:
    suffix = path.suffix.lower()
    if content.startswith(b"PAR1") or suffix in (".parquet", ".pq"):
        raise ValueError(
            f'{path} is a parquet file; {_EXPECTED}. Convert it:\n  python -c "import pandas; '
            f"pandas.read_parquet({str(path)!r}).to_json('data.jsonl', orient='records', lines=True)\""
        )
    if suffix in (".csv", ".tsv"):
        tabs = ", delimiter='\\t'" if suffix == ".tsv" else ""
        raise ValueError(
            f'{path} is a table; {_EXPECTED}. Convert it:\n  python -c "import csv, json; [print(json.dumps({{**row, '
            f"'label': int(row['label'])}})) for row in csv.DictReader(open({str(path)!r}, newline='', "
            f"encoding='utf-8-sig'){tabs})]\" > data.jsonl"
        )
    for start, encoding in _ENCODINGS.items():
        if content.startswith(start):
            raise ValueError(
                f"{path} is encoded in {encoding}; expected UTF-8. Convert it:\n  iconv -f {encoding} -t UTF-8 {path} "
                "> data.jsonl"
            )
    for start, kind in _PACKED.items():
        if content.startswith(start):
            raise ValueError(f"{path} is packed ({kind}); unpack it first: {_EXPECTED}")


def _parse(path: Path, number: int, line: bytes) -> Mapping[str, Any]:
    where = f"{path}, line {number}"
    try:
        # control characters inside of a string are text too, though strict JSON wants them escaped
        record = json.loads(line.decode(), strict=False, object_pairs_hook=_object, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: not UTF-8 (byte 0x{line[error.start]:02x} at byte {error.start + 1} of the line); save the file "
            "as UTF-8"
        ) from None
    except RecursionError:
        raise ValueError(f"{where}: JSON nested too deeply; {_EXPECTED}") from None
    except json.JSONDecodeError as error:
        why = "it holds NUL bytes: is it UTF-16?" if b"\0" in line else f"{error.msg} at column {error.colno}"
        if number == 1 and line.lstrip().startswith(b"["):
            why += "; an array over many lines becomes lines by: jq -c '.[]'"
        raise ValueError(f"{where}: not JSON ({why}); expected one object a line") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}; {_EXPECTED}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object like {_EXPECTED.split('like ')[1]}, got {type(record).__name__}")
    return record


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {_shown(twice)} is there twice")
    return made


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _item(number: int, record: Mapping[str, Any], path: Path) -> dict[str, Any]:
    where = f"{path}, line {number}"
    if absent := [name for name in ("text", "label") if record.get(name) is None]:
        rule = "0 or 1 (1 = what a monitor must catch)" if absent == ["label"] else "a string that is not empty"
        fields = ", ".join(_shown(name) for name in list(record)[:8]) or "none"
        raise ValueError(f"{where}: the field {absent[0]} must be {rule}, and is missing; its fields: {fields}")
    text = record["text"]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: the field text must be a string that is not empty, got {_shown(text)}")
    pair, group = (_name(where, name, record.get(name)) for name in ("pair", "group"))
    label = record["label"]
    if not isinstance(label, str) and label not in (0, 1):
        raise ValueError(
            f"{where}: the field label must be 0 or 1 (1 = what a monitor must catch), got {_shown(label)}"
        )
    for name, value in {"text": text, "label": label, "pair": pair, "group": group}.items():
        _check_unicode(where, name, value)
    if group is None:
        group = pair
    return {
        "id": f"line {number}",
        "text": text,
        "label": label if isinstance(label, str) else int(label),
        "pair": pair,
        # a prefix, so that a line's own group is nobody else's name
        "group": f"line {number}" if group is None else f"group {group}",
    }


def _name(where: str, field: str, value: Any) -> str | None:
    """A group or pair as text; the number 3 is the name ``"3"``, as is 3.0 of a table with gaps."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) == float("inf"):
        raise ValueError(f"{where}: the field {field} must be a string or a number, got {_shown(value)}")
    return str(int(value)) if value == int(value) else str(value)


def _check_unicode(where: str, field: str, value: Any) -> None:
    try:
        str(value).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: the field {field} holds half a surrogate pair at character {error.start}, which no tokenizer "
            "reads; repair how it was decoded"
        ) from None


def _number_labels(path: Path, rows: list[dict[str, Any]], positive: str | None) -> None:
    """Labels become 0 and 1: names of two classes, and whatever ``positive`` says of numbers."""
    named = [row for row in rows if isinstance(row["label"], str)]
    if not named:
        if positive is not None:
            labels = as_labels(np.array([row["label"] for row in rows]), len(rows), positive)
            for row, label in zip(rows, labels.tolist(), strict=True):
                row["label"] = label
        return
    names = sorted({row["label"] for row in named})
    first = (
        f"{path}, {named[0]['id']}: the field label must be 0 or 1 (1 = what a monitor must catch), got "
        f"{_shown(named[0]['label'])}"
    )
    if len(named) < len(rows) or len(names) != 2:
        other = "and numbers elsewhere" if len(named) < len(rows) else f"one of {len(names)} different names"
        raise ValueError(f"{first}, {other}; two names do, if positive is one of them")
    if positive not in names:
        raise ValueError(
            f"{first}; labels are {_shown(names[0])} and {_shown(names[1])}, so say which is 1 by positive "
            f"(--positive), which is {_shown(positive)}"
        )
    for row in rows:
        row["label"] = int(row["label"] == positive)


def _shown(value: Any) -> str:
    return ascii(value)[:80]
