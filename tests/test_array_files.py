"""Array files of anybody: headers that lie are refused before anything is allocated, and what is good is read."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from elk_stress.core.tensor_files import parse_json, tensors_of
from elk_stress.testbeds.array_loading import read_array

NUMBERS = np.arange(12.0, dtype=np.float32).reshape(3, 4)


def tensor_file(path: Path, header: Any, body: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


def entry(shape: Any = (2,), offsets: Any = (0, 8), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "told"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": 1, "a": 2}', "a key is there twice"),
        (b'{"a": \xff}', "no UTF-8"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"[]", "no table of tensors"),
        ({"a": entry(), "__metadata__": {"x": 1}}, "metadata are no texts"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "lacks its type, shape or place"),
        ({"a": [1, 2]}, "lacks its type, shape or place"),
        ({"a": entry(shape=[-2])}, "no list of whole numbers from 0 on"),
        ({"a": entry(shape=[True, 2])}, "no list of whole numbers from 0 on"),
        ({"a": entry(shape=[2.0])}, "no list of whole numbers from 0 on"),
        ({"a": entry(shape="ab")}, "no list of whole numbers from 0 on"),
        ({"a": entry(shape=[2**70])}, "no list of whole numbers from 0 on"),
        ({"a": entry(offsets=[0])}, r"\[0\] for the bytes of shape \[2\]"),
        ({"a": entry(offsets=[8, 0])}, "for the bytes of shape"),
        ({"a": entry(shape=[3])}, r"\[0, 8\] for the bytes of shape \[3\]"),
        ({"a": entry(shape=[2**61, 2**62])}, "for the bytes of shape"),
        ({"a": entry(shape=[0, 2**62, 2], offsets=[0, 0])}, "more than memory has addresses"),
        ({"a": entry(shape=[1] * 40 + [2])}, "for the bytes of shape"),
        ({"a": entry(dtype="F31")}, "unknown type 'F31'"),
        ({"a": entry(dtype=["F32"])}, "unknown type"),
        ({"a": entry(shape=[10**9], offsets=[0, 4 * 10**9])}, "would end at byte 4000000"),
        ({"a": entry(), "b": entry()}, "overlap, or leave gaps"),
        ({"a": entry(offsets=[0, 4], shape=[1])}, "end at byte .* and the file at"),
        ({"a": entry(offsets=[4, 8], shape=[1])}, "overlap, or leave gaps"),
    ],
)
def test_headers_that_lie_are_refused(header: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"not a safetensors file that numpy can read.*{told}"):
        read_array(tensor_file(tmp_path / "a.safetensors", header, b"\0" * 8), "a")


@pytest.mark.parametrize("content", [b"", b"\0" * 7, struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 3) + b"{}"])
def test_a_header_longer_than_its_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"its header would be \d+ bytes long and the file is \d+"):
        read_array(tmp_path / "a.safetensors", "a")


def test_what_safetensors_writes_is_read(tmp_path: Path) -> None:
    given = {"activations": NUMBERS, "empty": np.empty((0, 5)), "none": np.empty(0, np.int8), "one": np.array(7)}
    save_file(given, str(tmp_path / "a.safetensors"), metadata={"by": "somebody"})
    for name, value in given.items():
        read = read_array(tmp_path / "a.safetensors", name)
        assert (read.dtype, read.shape) == (value.dtype, value.shape)
        np.testing.assert_array_equal(read, value)
    assert tensors_of(tmp_path / "a.safetensors")[1] == {"by": "somebody"}
    with pytest.raises(ValueError, match="as BF16, which numpy does not have; save it as float32"):
        read_array(tensor_file(tmp_path / "b.safetensors", {"a": entry([2], [0, 4], "BF16")}, b"\0" * 4), "a")


def npy(path: Path, header: str | bytes, body: bytes = b"\0" * 48, version: bytes = b"\x01\x00") -> Path:
    text = header if isinstance(header, bytes) else header.encode()
    path.write_bytes(b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text + body)
    return path


def described(shape: str = "(12,)", descr: str = "'<f4'") -> str:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n"


@pytest.mark.parametrize(
    "header",
    [
        described("(13,)"),
        described("(-1, 4)"),
        described("(-3, -4)"),
        described("(10**9,)"),
        described("(1000000000000, 1000000000000)"),
        described("(0, 9223372036854775807, 9)"),
        described("(" * 200 + ")" * 200),
        described("12"),
        described("(2.0,)"),
        described(descr="'|O'"),
        described(descr="[('a', '<f4')]"),
        described("(1000000000000,)", "'<U0'"),
        described(descr="'|V4'"),
        described(descr="'<M8[s]'"),
        described(descr="'no'"),
        "{'descr': '<f4'}\n",
        "__import__('os')\n",
        "{" * 50 + "\n",
        "'''\n",
        b"\xff\xfe\n",
        "",
    ],
)
def test_npy_headers_that_lie_are_refused(header: str | bytes, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no \.npy file of numbers .*; write one with numpy\.save"):
        read_array(npy(tmp_path / "y.npy", header), "labels")


def test_other_beginnings_are_no_npy(tmp_path: Path) -> None:
    for content in (b"", b"\x93NUMPY", b"PK\x03\x04" + b"\0" * 50, b"\x80\x04K\x01."):
        (tmp_path / "y.npy").write_bytes(content)
        with pytest.raises(ValueError, match=r"is no \.npy file"):
            read_array(tmp_path / "y.npy", "labels")
    with pytest.raises(ValueError, match=r"is no \.npy file"):
        read_array(npy(tmp_path / "y.npy", described(), version=b"\x09\x00"), "labels")
    np.savez(tmp_path / "z.npz", a=NUMBERS)
    (tmp_path / "z.npz").rename(tmp_path / "z.npy")
    with pytest.raises(ValueError, match=r"is no \.npy file"):
        read_array(tmp_path / "z.npy", "labels")
    with pytest.raises(FileNotFoundError):
        read_array(tmp_path, "labels")


@pytest.mark.parametrize(
    "value", [NUMBERS, np.asfortranarray(NUMBERS), np.empty((0, 3)), np.array(3), np.array(["a", "bc"]), NUMBERS > 3]
)
def test_what_numpy_writes_is_read(value: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "y.npy", value)
    read = read_array(tmp_path / "y.npy", "labels")
    assert (read.dtype, read.shape) == (value.dtype, value.shape)
    np.testing.assert_array_equal(read, value)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(["npy", "safetensors"]),
    flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=4),
    keep=st.floats(0, 1),
    cut=st.booleans(),
)
def test_damage_is_refused_or_leaves_numbers(
    kind: str, flips: list[tuple[int, int]], keep: float, cut: bool, tmp_path: Path
) -> None:
    path = tmp_path / f"a.{kind}"
    if kind == "npy":
        np.save(path, NUMBERS)
    else:
        path.write_bytes(save({"activations": NUMBERS, "other": np.ones(3)}))
    content = bytearray(path.read_bytes())
    for at, value in flips:
        content[at % len(content)] = value
    path.write_bytes(content[: int(keep * len(content))] if cut else content)
    try:
        read = read_array(path, "activations")
    except ValueError:
        return
    assert read.nbytes <= len(content)
    assert read.dtype.kind in "biufcSU"
    np.array(read)


def test_strict_json_reads_what_is_good() -> None:
    assert parse_json(b'{"a": [1, 2.5, null, "x\\u00e9"], "b": {"a": true}}', "it") == {
        "a": [1, 2.5, None, "xé"],
        "b": {"a": True},
    }
    for bad, told in (("1e999", "too large"), ("-Infinity", "no number"), ("", "Expecting"), ("{'a': 1}", "quotes")):
        with pytest.raises(ValueError, match=f"it is not JSON .*{told}"):
            parse_json(bad, "it")
