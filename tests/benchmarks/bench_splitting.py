"""Splitting against OpenTURNS' subset sampling: a half-space in 512 dimensions, p = 1e-12.

    python tests/benchmarks/bench_splitting.py [--repeats 200] [--rival-repeats 10] [--particles 1000]

The figure of merit is CPU seconds (all threads; a busy machine distorts wall time) times squared relative error of p,
per run: smaller is better, and for unbiased estimates it does not depend on the number of particles or of averaged
runs. Relative errors are root mean squares about the true p over independent runs, in the same process; the rival's
over as many runs as asked for, or with ``--rival-error`` a relative error known from elsewhere (0.63 was seen over many
runs), so that few runs suffice to time it. Prints also how far our variance of B is from that of splitting with a
kernel that mixes perfectly. Asserts nothing. Needs the ``bench`` extra.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

import numpy as np

from elk_stress.estimators.limit_state import LimitState
from elk_stress.estimators.subset_simulation import SubsetSimulation

sys.path.insert(0, str(Path(__file__).parents[1]))
from known_answers import KnownAnswer, half_space

DIM, BETA = 512, 7.0344838


def relative_error(p: np.ndarray, truth: float) -> tuple[float, float]:
    """Root mean square relative error and its own standard error."""
    square = (p / truth - 1.0) ** 2
    rms = math.sqrt(square.mean())
    return rms, float(square.std() / math.sqrt(len(square)) / (2 * rms))


def ours(case: KnownAnswer, kernel: str, particles: int, moves: int, repeats: int) -> tuple[float, np.ndarray, float]:
    """Seconds a run, p of each run, and variance of B over the ideal one."""
    weight = (case.define(np, np.zeros((1, DIM))) - case.define(np, np.eye(DIM))).astype(np.float32)
    state = LimitState(lambda problems, u: np.float32(BETA) - u @ weight, DIM, repeats, dtype="float32")
    estimator = SubsetSimulation(particles, kernel=kernel, n_runs=1, n_moves=moves)
    begun = time.process_time()
    batch = estimator(state, seed=1)
    seconds = (time.process_time() - begun) / repeats
    return (
        seconds,
        np.exp2(batch.diagnostics["run_log2_p"][:, 0]),
        float(batch.value.var(ddof=1) / batch.diagnostics["ideal_variance"].mean()),
    )


def rival(case: KnownAnswer, repeats: int) -> tuple[float, np.ndarray]:
    """OpenTURNS' SubsetSampling with 1,000 draws a level on the same function, vectorized."""
    import openturns as ot

    function = ot.PythonFunction(DIM, 1, func_sample=lambda x: case.function(np.asarray(x))[:, None])
    seconds, p = [], []
    for seed in range(repeats):
        ot.RandomGenerator.SetSeed(seed)
        vector = ot.CompositeRandomVector(function, ot.RandomVector(ot.Normal(DIM)))
        sampling = ot.SubsetSampling(ot.ThresholdEvent(vector, ot.LessOrEqual(), 0.0))
        sampling.setMaximumOuterSampling(1000)
        sampling.setBlockSize(1)
        begun = time.process_time()
        sampling.run()
        seconds.append(time.process_time() - begun)
        p.append(sampling.getResult().getProbabilityEstimate())
    return float(np.mean(seconds)), np.array(p)


def main() -> None:
    """Run both and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--rival-repeats", type=int, default=10)
    parser.add_argument("--rival-error", type=float, default=None)
    parser.add_argument("--particles", type=int, default=1000)
    parser.add_argument("--moves", type=int, nargs="+", default=[4, 6, 8])
    arguments = parser.parse_args()
    case = half_space(DIM, BETA)
    print(f"half-space, dim {DIM}, p = {case.p:.4g} ({case.bits:.2f} bits)")
    merits = {}
    for kernel, moves in [("elliptical_slice", moves) for moves in arguments.moves]:
        seconds, p, excess = ours(case, kernel, arguments.particles, moves, arguments.repeats)
        error, wobble = relative_error(p, case.p)
        name = f"{kernel}, {moves} moves"
        merits[name] = seconds * error**2
        print(
            f"{name:26s} {seconds:7.3f} CPU s a run, relative error {error:.3f} +- {wobble:.3f} over {len(p)} runs, "
            f"mean p / true p {p.mean() / case.p:.3f}, variance of B {excess:.2f} x ideal, "
            f"seconds x error^2 {merits[name]:.5f}",
            flush=True,
        )
    if not arguments.rival_repeats:
        return
    seconds, p = rival(case, arguments.rival_repeats)
    error, wobble = relative_error(p, case.p)
    if arguments.rival_error is not None:
        print(f"(the rival's error over its {len(p)} runs is {error:.2f}; the given {arguments.rival_error} is used)")
        error, wobble = arguments.rival_error, 0.0
    merit = seconds * error**2
    print(
        f"{'OpenTURNS SubsetSampling':26s} {seconds:7.3f} CPU s a run, relative error {error:.3f} +- {wobble:.3f} over "
        f"{len(p)} runs, mean p / true p {p.mean() / case.p:.3f}, seconds x error^2 {merit:.5f}"
    )
    for name, own in merits.items():
        print(f"{name}: {merit / own:.0f} x better")


if __name__ == "__main__":
    main()
