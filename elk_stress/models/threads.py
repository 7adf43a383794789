"""Thread counts and OpenMP's wait policy: two busy cores must not stall torch for minutes.

OpenMP threads that have finished their share of a matrix product spin until the slowest arrives. On a busy machine the
slowest has lost its core to somebody else's spinning thread, and products that take a millisecond take a scheduler's
time slice. Passive waiting gives the core back instead. The runtime reads its environment once, when torch (or
anything else linked to it) is loaded, so :func:`configure_threads` belongs at the start of a program; the number of
threads can still be changed later.
"""

from __future__ import annotations

import os
import sys

__all__ = ["available_cores", "configure_threads"]

# GNU's runtime reads the first, Intel's and LLVM's the first and the second (milliseconds of spinning)
_WAIT = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "1"}


def available_cores() -> int:
    """Cores that this process may use, which in a container or under ``taskset`` are fewer than the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def configure_threads(threads: int | None = None) -> int:
    """Set passive waiting (if torch is not loaded yet) and the number of torch's threads; returns that number.

    Args:
        threads: by default ``OMP_NUM_THREADS`` if set, else the cores available. Variables that the user has set win.
    """
    if threads is None:
        given = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
        threads = int(given) if given.isdigit() and int(given) > 0 else available_cores()
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}; leave it out to use all available cores")
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
        return threads
    for name, value in _WAIT.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    # forked tokenizers otherwise print a warning into the progress bars
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return threads
