"""Streaming fits of many rows: anonymous memory does not grow with their number.

    python tests/statistics/test_streaming_memory.py FOLDER [--rows 1000000] [--dim 576] [--probes lda,logistic]

Run as a script it prints, per probe, the peak of anonymous resident memory (``RssAnon``) while the first tenth of the
rows is fitted, and while all of them are; a thread looks every 5 ms. One process per probe: what an earlier one left to
the allocator would hide growth.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

PROBES = ("mass_mean", "lda", "mahalanobis", "logistic")
MIB = 2**20


def anonymous() -> int:
    """Bytes of anonymous resident memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("no RssAnon in /proc/self/status")


class Peak:
    """The largest anonymous memory while the block runs."""

    def __enter__(self) -> Peak:
        self.value, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.is_set():
            self.value = max(self.value, anonymous())
            self._done.wait(0.005)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def write_rows(path: Path, rows: int, dim: int) -> None:
    """Two classes, float32, in a plain file; the label of row i is i % 2."""
    rng = np.random.default_rng(np.random.SeedSequence(5))
    apart = rng.standard_normal(dim) / np.sqrt(dim)
    scales = np.exp(rng.standard_normal(dim) / 2).astype(np.float32)
    with path.open("wb") as file:
        for start in range(0, rows, 10_000):
            labels = np.arange(start, min(start + 10_000, rows)) % 2
            noise = rng.standard_normal((len(labels), dim), dtype=np.float32)
            ((noise + 2.0 * np.outer(labels, apart).astype(np.float32)) * scales + 1).tofile(file)


def batches(path: Path, rows: int, dim: int, *, mapped: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of 5,000 rows, as views of the mapped file or as copies."""
    for start in range(0, rows, 5_000):
        # mapped anew each time: pages that were read are not kept by a mapping
        view = np.memmap(path, np.float32, "r", start * dim * 4, (min(5_000, rows - start), dim))
        yield (view if mapped else np.array(view)), np.arange(start, start + len(view)) % 2


def measure(name: str, path: Path, rows: int, dim: int, *, mapped: bool) -> dict[str, float]:
    """Peaks in MiB and seconds, of a tenth of the rows and of all."""
    from elk_stress.probing.fit.streaming import fit_streaming

    found: dict[str, float] = {}
    fit: Callable[[int], object] = lambda n: fit_streaming(name, batches(path, n, dim, mapped=mapped))  # noqa: E731
    # libraries are loaded and their buffers made before anything is compared
    fit(min(rows // 10, 2 * dim + 200))
    for label, n in (("tenth", rows // 10), ("all", rows)):
        begun = time.perf_counter()
        with Peak() as peak:
            fit(n)
        found[label], found[f"seconds_{label}"] = peak.value / MIB, time.perf_counter() - begun
    return found


def in_a_process(name: str, path: Path, rows: int, dim: int, *, mapped: bool) -> dict[str, float]:
    """``measure`` in a fresh interpreter."""
    command = [sys.executable, __file__, str(path), "--rows", str(rows), "--dim", str(dim), "--one", name]
    done = subprocess.run([*command, *(["--mapped"] if mapped else [])], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def able(name: str) -> bool:
    from elk_stress.core import registry

    return name in registry.names("probes") and registry.load("probes", name).traits.streams


@pytest.mark.statistics
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is known on Linux only")
@pytest.mark.parametrize("name", PROBES)
def test_anonymous_memory_is_flat_from_a_hundred_thousand_rows_on(name: str, tmp_path: Path) -> None:
    path = tmp_path / "rows"
    # 512 MB of rows; the pages of a spooled copy are the file's
    write_rows(path, 1_000_000, 128)
    found = in_a_process(name, path, 1_000_000, 128, mapped=False)
    assert found["all"] - found["tenth"] < 8, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=576)
    parser.add_argument("--probes", default=",".join(PROBES))
    parser.add_argument("--mapped", action="store_true", help="hand over views of the mapped file, not copies")
    parser.add_argument("--one", help="measure this probe in this process and print JSON")
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.one, given.path, given.rows, given.dim, mapped=given.mapped)))
        return
    path = given.path / "rows.f32"
    write_rows(path, given.rows, given.dim)
    try:
        for name in filter(able, given.probes.split(",")):
            found = in_a_process(name, path, given.rows, given.dim, mapped=given.mapped)
            print(
                f"{name:12s} {given.rows // 10:>9,} rows: {found['tenth']:7.1f} MiB, {found['seconds_tenth']:6.1f} s; "
                f"{given.rows:>9,} rows: {found['all']:7.1f} MiB, {found['seconds_all']:6.1f} s",
                flush=True,
            )
    finally:
        path.unlink()


if __name__ == "__main__":
    main()
