"""Damage to stored activations: whatever a disk does to a file, what comes back is what was stored, or nothing."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import tiny_models as tiny

from elk_stress.models import activation_cache
from elk_stress.models.activation_cache import ActivationCache, DamagedCache
from elk_stress.models.language_model import LanguageModel

TEXTS = ["the red cat is in paris .", "the blue dog is in peru ?", "tea and rain"]
BLOCK = np.random.default_rng(0).standard_normal((40, 24)).astype(np.float32)


@pytest.fixture
def stored(tmp_path: Path) -> tuple[ActivationCache, Path]:
    cache = ActivationCache(tmp_path / "blocks")
    assert cache.save("key", BLOCK)
    (file,) = cache.folder.iterdir()
    return cache, file


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.mark.filterwarnings("ignore::elk_stress.models.activation_cache.DamagedCache")
def test_no_flipped_bit_gives_other_numbers(stored: tuple[ActivationCache, Path]) -> None:
    cache, file = stored
    content = file.read_bytes()
    assert np.array_equal(cache.load("key"), BLOCK)  # type: ignore[arg-type]
    rng = np.random.default_rng(1)
    header, end = 8 * 128, 8 * len(content)
    # the header, the digest, and numbers between
    chosen = {*range(0, header, 3), *range(end - 256, end), *rng.integers(header, end, 300).tolist()}
    assert len(chosen) > 800
    for bit in chosen:
        file.write_bytes(flipped(content, bit))
        assert cache.load("key") is None, f"bit {bit}"
    file.write_bytes(content)
    assert np.array_equal(cache.load("key"), BLOCK)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore::elk_stress.models.activation_cache.DamagedCache")
@pytest.mark.parametrize("change", ["cut", "more", "empty", "zeros", "swapped", "no digest", "folder"])
def test_other_damage_counts_as_absent_too(stored: tuple[ActivationCache, Path], change: str) -> None:
    cache, file = stored
    content = file.read_bytes()
    plain = io.BytesIO()
    np.save(plain, BLOCK)
    # a block of another key is no block of this one
    cache.save("other", BLOCK + 1)
    damaged = {
        "cut": content[: len(content) // 2],
        "more": content + b"\0",
        "empty": b"",
        "zeros": bytes(len(content)),
        "swapped": (cache.folder / "other.npy").read_bytes(),
        "no digest": plain.getvalue(),
    }
    if change == "folder":
        file.unlink()
        file.mkdir()
    else:
        file.write_bytes(damaged[change])
    assert cache.load("key") is None
    if change != "folder":
        assert cache.save("key", BLOCK)
        assert np.array_equal(cache.load("key"), BLOCK)  # type: ignore[arg-type]


def test_damage_is_said_once_and_absence_never(stored: tuple[ActivationCache, Path]) -> None:
    cache, file = stored
    assert cache.load("absent") is None
    file.write_bytes(flipped(file.read_bytes(), 5000))
    with pytest.warns(DamagedCache, match=rf"{file}.*read anew.*may be deleted") as told:
        assert [cache.load("key"), cache.load("key")] == [None, None]
    assert len(told) == 1


def test_warnings_as_errors_do_not_fail_a_run(stored: tuple[ActivationCache, Path]) -> None:
    cache, file = stored
    file.write_bytes(b"")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.load("key") is None


def test_damaged_block_is_read_from_the_model_and_rewritten(tmp_path: Path) -> None:
    def subject() -> LanguageModel:
        return LanguageModel.from_modules(
            tiny.causal(), tiny.tokenizer(), fingerprint="x", causal=True, cache=ActivationCache(tmp_path)
        )

    expected = subject().read(TEXTS, ["layers.1"])["layers.1"]
    (file,) = tmp_path.glob("*.npy")
    content = file.read_bytes()
    file.write_bytes(flipped(content, 8 * 200))
    with pytest.warns(DamagedCache):
        found = subject().read(TEXTS, ["layers.1"])["layers.1"]
    assert np.array_equal(found, expected)
    assert file.read_bytes() == content


def test_blocks_are_arrays_that_numpy_reads(stored: tuple[ActivationCache, Path]) -> None:
    assert np.array_equal(np.load(stored[1]), BLOCK)


def test_what_a_killed_process_left_goes_and_what_is_being_written_stays(stored: tuple[ActivationCache, Path]) -> None:
    cache, file = stored
    old, new = cache.folder / ".partial-old", cache.folder / ".partial-new"
    for path in (old, new):
        path.write_bytes(b"x")
    before = file.stat().st_mtime - activation_cache._ABANDONED - 60
    os.utime(old, (before, before))
    cache.save("another", BLOCK)
    assert (old.exists(), new.exists()) == (False, True)


def test_key_takes_any_text() -> None:
    cache = ActivationCache(Path("unused"))
    keys = {cache.key(["x"], "layers.0", [text]) for text in ("a", "a ", "a\n", "\ud800", "\\ud800", "a\u2028")}
    assert len(keys) == 6
