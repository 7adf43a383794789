"""Design points and importance sampling for 1,000 items on an MLP probe 384-64-1, against foolbox's min-norm attacks.

Rivals: foolbox 3.3.4 DDN (1811.09600) and FMN (2102.12827), L2, their default steps (100), on the same trained probe,
in u-space (unit covariance), on the same machine. Their two-class logits are (0, score - threshold); their data range
is so wide that it never clips. Ours: ``DesignPoint`` from the origin alone, at most 12 steps, then ``Importance`` at
what it found; and ``estimate_batch`` with its checks by splitting. Times follow one warm-up call (compilation). Prints
seconds, median norms and ratios of this run; asserts nothing.

    python tests/benchmarks/bench_design_points.py [--items 1000] [--particles 64]
"""

from __future__ import annotations

import argparse
import time
import warnings

import numpy as np

from elk_stress.estimators import estimate_batch
from elk_stress.estimators.design_point import DesignPoint
from elk_stress.estimators.importance import Importance
from elk_stress.estimators.limit_state import LimitState

DIM, HIDDEN = 384, 64


def trained_probe(seed: int = 0):
    """A torch MLP 384-64-1 on two Gaussian classes whose truth is a nonlinear function of a few directions."""
    import torch

    torch.manual_seed(seed)
    rng = np.random.default_rng(np.random.SeedSequence(seed))

    def data(n):
        x = rng.standard_normal((n, DIM)).astype(np.float32)
        label = rng.integers(0, 2, n)
        x[:, :8] += 2.2 * (label[:, None] - 0.5) * np.sign(np.sin(np.arange(8) + 1.0)).astype(np.float32)
        x[:, 8:16] *= 1 + 0.5 * label[:, None]
        return torch.as_tensor(x), torch.as_tensor(label, dtype=torch.float32)

    model = torch.nn.Sequential(torch.nn.Linear(DIM, HIDDEN), torch.nn.ReLU(), torch.nn.Linear(HIDDEN, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    x, y = data(8000)
    for _ in range(150):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(x)[:, 0], y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    test, label = data(6000)
    with torch.no_grad():
        score = model(test)[:, 0]
    threshold = float(torch.quantile(score[label == 0], 0.95))
    caught = test[(label == 1) & (score > threshold)]
    return model.eval().requires_grad_(False), threshold, caught.numpy()


def limit_state(model, threshold: float, items: np.ndarray) -> LimitState:
    """``g(u) = score(item + u) - threshold`` in jax."""
    import jax
    import jax.numpy as jnp

    w1, b1, w2, b2 = (jnp.asarray(p.detach().numpy()) for p in model.parameters())

    def g(rows, u):
        # (x + u) W = x W + u W: the items' part once, not once per point
        hidden = jax.nn.relu(u @ w1.T + (rows["x"] @ w1.T + b1)[:, None, :])
        return (hidden @ w2.T)[..., 0] + b2[0] - threshold

    return LimitState(
        g, dim=DIM, n_problems=len(items), backend="jax", dtype="float32", data={"x": items.astype(np.float32)}
    )


def best_of(repeats: int, call):
    """The last result and the shortest of several times, after one warm-up call."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - start)
    return result, min(times)


def rival(attack_class: str, model, threshold: float, items: np.ndarray) -> tuple[np.ndarray, float]:
    """Norms (NaN where the attack failed) and seconds of a foolbox attack."""
    import foolbox
    import torch

    class TwoClasses(torch.nn.Module):
        def forward(self, x):
            score = model(x)[:, 0] - threshold
            return torch.stack([torch.zeros_like(score), score], dim=1)

    wrapped = foolbox.PyTorchModel(TwoClasses().eval(), bounds=(-1e3, 1e3), device="cpu")
    attack = getattr(foolbox.attacks, attack_class)()
    x, labels = torch.as_tensor(items), torch.ones(len(items), dtype=torch.long)

    def call():
        _, adversarial, success = attack(wrapped, x, labels, epsilons=None)
        return torch.where(success, (adversarial - x).norm(dim=1), torch.nan).numpy()

    return best_of(1, call)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--particles", type=int, default=64)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    model, threshold, caught = trained_probe()
    items = caught[: arguments.items]
    state = limit_state(model, threshold, items)
    found, ours = best_of(3, lambda: DesignPoint(n_starts=1, quick=4, max_iterations=12)(state, seed=0))
    norms = np.abs(found.diagnostics["beta"])
    bits, sampling = best_of(
        3, lambda: Importance(n_particles=arguments.particles)(state, seed=0, centres=found.diagnostics["centres"])
    )
    print(f"{len(items)} items, MLP probe {DIM}-{HIDDEN}-1")
    print(f"design points: {ours:.3f} s, median norm {np.median(norms):.4f}, {np.isnan(norms).sum()} without one")
    print(
        f"importance sampling, {arguments.particles} draws: {sampling:.3f} s, median bits {np.median(bits.value):.2f}, "
        f"median interval width {np.median(bits.high - bits.low):.2f} bits, median effective draws "
        f"{np.median(bits.diagnostics['effective']):.0f}"
    )
    whole, seconds = best_of(1, lambda: estimate_batch(state, seed=0))
    print(
        f"estimate_batch: {seconds:.2f} s, median bits {np.median(whole.value):.2f}, median interval width "
        f"{np.median(whole.high - whole.low):.2f}, {int(whole.diagnostics['checked'].sum())} checked by splitting, "
        f"{sum(any(f.red for f in flags) for flags in whole.flags)} with a red flag"
    )
    for name in ("DDNAttack", "L2FMNAttack"):
        theirs, seconds = rival(name, model, threshold, items)
        paired = np.isfinite(norms) & np.isfinite(theirs)
        print(
            f"{name}: {seconds:.3f} s, median norm {np.nanmedian(theirs):.4f}, failed on {np.isnan(theirs).sum()}; "
            f"time ratio {seconds / ours:.1f}x design points alone, {seconds / (ours + sampling):.1f}x with intervals; "
            f"norm ratio ours/theirs median {np.median(norms[paired] / theirs[paired]):.4f}, "
            f"of medians {np.median(norms) / np.nanmedian(theirs):.4f}"
        )


if __name__ == "__main__":
    main()
