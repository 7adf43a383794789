"""Pressure curves per minute: 16 models x 8 strengths as one vmapped program, against the same loop in plain torch.

Both train the superposition organism by Adam on task + strength x evasion through a frozen probe, on equal batch sizes.
The rival is what one would write first: a loop over models and strengths, autograd, ``torch.optim.Adam``; drawing its
data costs it nothing here (batches are drawn beforehand and reused), so the ratio is, if anything, unkind to us.
One cell is checked to end at the same weights on the same batches. Ratios from one run; no time is asserted.

    python tests/benchmarks/bench_pressure_curves.py --models 16 --strengths 8 --steps 100
"""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np

from elk_stress.attacks.finetune import Finetune
from elk_stress.models.threads import configure_threads


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=16)
    parser.add_argument("--strengths", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    configure_threads()
    from elk_stress.testbeds.superposition import Superposition
    from elk_stress.training.evasion import targets_from
    from elk_stress.training.measure import fit_cells
    from elk_stress.training.organism_trainee import OrganismTrainee

    trainee = OrganismTrainee(Superposition(n_models=options.models))
    strengths = np.concatenate([[0.0], np.geomspace(0.01, 10.0, options.strengths - 1)]).astype(np.float32)
    clean = trainee.activations(trainee.original[None], "train")
    labels = trainee.splits["train"].labels
    probes = fit_cells(trainee, "logistic", clean, 0)[0]
    cells = np.broadcast_to(clean, (len(strengths), *clean.shape[1:]))
    targets = targets_from([[probes] * len(strengths)], cells, labels)
    attack = Finetune(steps=options.steps)
    _ = trainee.sigma
    state = attack.start(trainee, strengths, 0)

    started = time.perf_counter()
    attack.advance(trainee, state, targets, options.steps)
    first = time.perf_counter() - started
    started = time.perf_counter()
    ended, _ = attack.advance(trainee, state, targets, options.steps)
    ours = time.perf_counter() - started

    batches = [_batches(trainee, attack, model, options.steps) for model in range(2)]
    gap, seconds = 0.0, 0.0
    for model in range(options.models):
        for k, strength in enumerate(strengths):
            data = batches[min(model, 1)]
            started = time.perf_counter()
            weights = _torch(trainee, attack, targets, model, k, float(strength), data)
            seconds += time.perf_counter() - started
            if model < 2:
                gap = max(gap, float(np.abs(weights - ended["weights"][k, model]).max()))
    curves = options.models * options.strengths
    print(f"{options.models} models x {options.strengths} strengths, {options.steps} steps each, {curves} cells")
    print(f"one program : {ours:.2f} s ({first:.2f} s with compilation), {60 * curves / ours:.0f} cells a minute")
    print(f"plain torch : {seconds:.2f} s, {60 * curves / seconds:.0f} cells a minute")
    print(f"ratio       : {seconds / ours:.1f} x ({seconds / first:.1f} x with compilation)")
    print(f"largest difference of a weight on the same batches, 2 models: {gap:.1e}")
    return 0


def _batches(trainee: object, attack: Finetune, model: int, steps: int) -> list[tuple[np.ndarray, ...]]:
    """The very batches that the program draws for this model."""
    import jax

    organism = trainee.organism  # type: ignore[attr-defined]

    def draw(i: int) -> tuple[object, object, object]:
        base = jax.random.fold_in(jax.random.key(np.uint32(0)), model)
        task, items, _ = jax.random.split(jax.random.fold_in(base, i), 3)
        labelled = organism.examples(items, attack.batch_size, "calibration")
        return organism.batch(task, attack.batch_size)["x"], labelled["x"], labelled["label"]

    return [tuple(np.asarray(part) for part in row) for row in map(jax.jit(draw), range(steps))]


def _torch(
    trainee: object, attack: Finetune, targets: object, model: int, k: int, strength: float, data: list
) -> np.ndarray:
    import torch

    organism = trainee.organism  # type: ignore[attr-defined]
    own = organism.one_model(model)
    weight = torch.tensor(own["weight"], requires_grad=True)
    bias = torch.tensor(own["bias"], requires_grad=True)
    scales = torch.tensor(organism.feature_scales)
    cell = targets.arrays[0]  # type: ignore[attr-defined]
    direction = torch.tensor(cell["parameters"]["weight"][k, model])
    offset, gap = float(cell["parameters"]["bias"][k, model]), float(cell["gap"][k, model])
    optimizer = torch.optim.Adam([bias, weight], lr=attack.learning_rate)
    for x, items, label in data:
        x, items, label = (torch.tensor(part) for part in (x, items, label))
        outputs = torch.relu(x @ weight @ weight.T + bias)
        loss = ((scales * (outputs - x)) ** 2).sum(dim=-1).mean()
        if strength > 0:
            score = items @ weight @ direction + offset
            z = 4 * (score - score[label == 0].mean()) / gap
            loss = loss + strength * (torch.nn.functional.softplus(z[label == 1]) / 4).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return np.concatenate([bias.detach().numpy().ravel(), weight.detach().numpy().ravel()])


if __name__ == "__main__":
    sys.exit(main())
