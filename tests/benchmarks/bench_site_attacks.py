"""Site attacks on one linear and one MLP probe (384-64-1), against foolbox's min-norm attacks on the same items.

Rivals: foolbox 3.3.4 DDN (1811.09600) and FMN (2102.12827) with their default 100 steps, and C&W (1608.04644) with at
most 1,000 steps of 3e-3 a search and a first constant of 1, which did best of a few choices on the MLP (its
defaults, 10,000 of 1e-2 and 1e-3, take longer); all L2, in u-space, with a data range so wide that it never clips.
Ours: ``gradient`` (white box), ``black_box`` by scores and by labels, with the budget that an audit gives them. Prior:
isotropic, one standard deviation of the data's noise, so that ``u = x' - x``. All see the same score: torch for
foolbox, jax for ours.

A step is one evaluation of the score of one item, with or without its gradient; foolbox's are counted as they pass the
model, ours by the oracle. Times follow one warm-up call (compilation). Norms are of moves that the limit state confirms
in this run; an attack that fails on an item has none there, and medians are over the items that both broke. Prints
steps per second, items broken, median norms and ratios of this run; asserts nothing. About a minute on one core.

    python tests/benchmarks/bench_site_attacks.py [--items 100] [--budget 2000]
"""

from __future__ import annotations

import argparse
import warnings
from dataclasses import dataclass

import numpy as np
from bench_design_points import DIM, best_of, limit_state, trained_probe

from elk_stress.attacks.black_box import BlackBox
from elk_stress.attacks.gradient import Gradient
from elk_stress.estimators.limit_state import LimitState
from elk_stress.thoughts.attacks.protocol import Attack, Oracle

# foolbox's data range: 20 standard deviations never clip; C&W's steps are shares of it
_BOUND = 20.0

RIVALS = {
    "DDN": ("DDNAttack", {}),
    "FMN": ("L2FMNAttack", {}),
    "C&W": ("L2CarliniWagnerAttack", {"steps": 1000, "stepsize": 3e-3, "initial_const": 1.0}),
}


@dataclass(frozen=True)
class Row:
    """One attack: norms ``(items,)`` (NaN: not broken), seconds, and evaluations of one item's score."""

    name: str
    norms: np.ndarray
    seconds: float
    steps: float


def linear_probe(seed: int = 0):
    """Logistic regression, as a torch module, on the MLP's data; its threshold and items."""
    import torch

    torch.manual_seed(seed)
    rng = np.random.default_rng(np.random.SeedSequence([seed, 1]))

    def data(n):
        x = rng.standard_normal((n, DIM)).astype(np.float32)
        label = rng.integers(0, 2, n)
        x[:, :8] += 2.2 * (label[:, None] - 0.5) * np.sign(np.sin(np.arange(8) + 1.0)).astype(np.float32)
        return torch.as_tensor(x), torch.as_tensor(label, dtype=torch.float32)

    model = torch.nn.Linear(DIM, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=1e-2)
    x, y = data(8000)
    for _ in range(200):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(x)[:, 0], y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    test, label = data(2000)
    with torch.no_grad():
        score = model(test)[:, 0]
    threshold = float(torch.quantile(score[label == 0], 0.95))
    caught = test[(label == 1) & (score > threshold)]
    return model.eval().requires_grad_(False), threshold, caught.numpy()


def linear_state(model, threshold: float, items: np.ndarray) -> LimitState:
    """``g(u) = score(item + u) - threshold`` in jax."""
    import jax.numpy as jnp

    weight = jnp.asarray(model.weight.detach().numpy()[0])
    margin = items @ model.weight.detach().numpy()[0] + float(model.bias) - threshold

    def g(rows, u):
        return u @ weight + rows["margin"][:, None]

    data = {"margin": margin.astype(np.float32)}
    return LimitState(g, dim=DIM, n_problems=len(items), backend="jax", dtype="float32", data=data)


def ours(name: str, attack: Attack, state: LimitState, budget: int) -> tuple[Row, np.ndarray]:
    """The row, and the first proposals."""
    oracle = Oracle(state, attack.access, budget)

    def call():
        nonlocal oracle
        oracle = Oracle(state, attack.access, budget)
        return attack.propose(oracle, seed=0).moves[:, 0]

    moves, seconds = best_of(1, call)
    return Row(name, confirmed(state, moves), seconds, float((oracle.queries + oracle.gradients).sum())), moves


def rival(name: str, model, threshold: float, items: np.ndarray, state: LimitState) -> Row:
    """A foolbox attack on the two-class logits ``(0, score - threshold)``."""
    import foolbox
    import torch

    class TwoClasses(torch.nn.Module):
        seen = 0

        def forward(self, x):
            self.seen += len(x)
            score = model(x)[:, 0] - threshold
            return torch.stack([torch.zeros_like(score), score], dim=1)

    logits = TwoClasses().eval()
    wrapped = foolbox.PyTorchModel(logits, bounds=(-_BOUND, _BOUND), device="cpu")
    attack_class, options = RIVALS[name]
    attack = getattr(foolbox.attacks, attack_class)(**options)
    x, labels = torch.as_tensor(items), torch.ones(len(items), dtype=torch.long)

    def call():
        logits.seen = 0
        _, adversarial, _ = attack(wrapped, x, labels, epsilons=None)
        return (adversarial - x).double().numpy()

    moves, seconds = best_of(1, call)
    return Row(f"foolbox {name}", confirmed(state, moves), seconds, float(logits.seen))


def confirmed(state: LimitState, moves: np.ndarray) -> np.ndarray:
    """Lengths of the moves that fail; a rival's last float32 digit is allowed for."""
    fails = state.value(np.arange(len(moves)), moves[:, None] * (1 + 1e-5))[:, 0] <= 0
    return np.where(fails, np.linalg.norm(moves, axis=1), np.nan)


def report(title: str, rows: list[Row], n_ours: int) -> None:
    """A line for each attack, then the quality of ours over the best rival's."""
    print(f"\n{title}")
    print(f"{'attack':<20}{'steps/item':>12}{'seconds':>10}{'steps/s':>12}{'broken':>9}{'median norm':>13}")
    for row in rows:
        n = len(row.norms)
        broken = int(np.isfinite(row.norms).sum())
        print(
            f"{row.name:<20}{row.steps / n:>12.0f}{row.seconds:>10.3f}{row.steps / row.seconds:>12.0f}"
            f"{f'{broken}/{n}':>9}{np.nanmedian(row.norms) if broken else np.nan:>13.4f}"
        )
    rivals = [row for row in rows[n_ours:] if np.isfinite(row.norms).any()]
    best = min(rivals, key=lambda row: (-np.isfinite(row.norms).sum(), np.nanmedian(row.norms)))
    quickest = max(rivals, key=lambda row: row.steps / row.seconds)
    for row in rows[:n_ours]:
        both = np.isfinite(row.norms) & np.isfinite(best.norms)
        print(
            f"{row.name}: median norm {np.median(row.norms[both]) / np.median(best.norms[both]):.4f}x the best rival's "
            f"({best.name}), worst item {np.max(row.norms[both] / best.norms[both]):.3f}x; steps per second "
            f"{row.steps / row.seconds / (quickest.steps / quickest.seconds):.2f}x the quickest rival's "
            f"({quickest.name}); all items in {row.seconds / best.seconds:.2f}x its time"
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--items", type=int, default=100)
    parser.add_argument("--budget", type=int, default=2000)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    makers = {"linear": (linear_probe, linear_state), f"MLP {DIM}-64-1": (trained_probe, limit_state)}
    for title, (train, build) in makers.items():
        model, threshold, caught = train()
        items = caught[: arguments.items]
        state = build(model, threshold, items)
        attacks = {"gradient": Gradient(), "black_box score": BlackBox(), "black_box label": BlackBox("label")}
        rows = [ours(name, attack, state, arguments.budget)[0] for name, attack in attacks.items()]
        rows += [rival(name, model, threshold, items, state) for name in RIVALS]
        report(f"{title} probe, {len(items)} items, {DIM} dimensions", rows, len(attacks))
        if title == "linear":
            margin = state.value(np.arange(len(items)), np.zeros((len(items), 1, DIM)))[:, 0]
            print(f"exact median distance {np.median(margin) / float(model.weight.norm()):.4f}")


if __name__ == "__main__":
    main()
