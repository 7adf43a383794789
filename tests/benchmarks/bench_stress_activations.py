"""Time and peak memory of ``stress_activations`` at 1,000, 10,000 and 100,000 items of 576 features.

Prints seconds, peak memory above the arrays themselves, and both per item relative to the smallest size: linear in the
items means ratios near or below 1. Each size runs in a process of its own, so that one peak does not hide another.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time

import numpy as np

SIZES = (1_000, 10_000, 100_000)
FEATURES = 576


def one(n: int) -> None:
    from elk_stress import stress_activations

    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, n)
    activations = rng.standard_normal((n, FEATURES), dtype=np.float32)
    activations[:, 0] += 3 * labels
    weight = np.zeros(FEATURES)
    weight[0] = 1.0
    stress_activations(weight, activations[:500], labels[:500], controls=False, attacks=())  # imports and warm-up
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    result = stress_activations(weight, activations, labels, controls=False, attacks=())
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (row,) = result.threats.values()
    print(n, seconds, (after - before) / 1024, activations.nbytes / 2**20, row.headline.value)


def main() -> None:
    print(f"{'items':>8} {'seconds':>8} {'MiB above':>10} {'arrays MiB':>10} {'half-life':>9} {'s/item, relative':>17}")
    base = None
    for n in SIZES:
        out = subprocess.run([sys.executable, __file__, str(n)], check=True, capture_output=True, text=True).stdout
        _, seconds, above, arrays, life = (float(x) for x in out.split())
        base = base or seconds / n
        print(f"{n:>8} {seconds:>8.2f} {above:>10.0f} {arrays:>10.0f} {life:>9.1f} {seconds / n / base:>17.2f}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        one(int(sys.argv[1]))
    else:
        main()
