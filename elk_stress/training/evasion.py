r"""The evasion loss: how much of the gap between positives and negatives a probe still shows.

With ``z = (score - mean score of the negatives in the batch) / gap``, gap the distance between the class means when the
probe was fitted, the loss over positives x is

``evasion = mean_x softplus(4 z) / 4``,

about 1 for an untouched probe, 0.17 when positives score like negatives, and with slope beyond that, since an
evader does not stop at chance. It saturates, so that strength decides what is paid for, not how far scores run away.
Negatives are taken as they are *now*: against where they were, the cheapest evasion moves all items alike, and the
probe would tell positives from negatives as well as before.
Several probes count by their mean. One definition for jax and torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from elk_stress.core.arrays import namespace
from elk_stress.probing.probe import FittedProbe, Probe, direction
from elk_stress.training.protocols import Targets

__all__ = ["SHARPNESS", "evasion_loss", "plain_recipe", "stacked", "targets_from"]

SHARPNESS = 4.0


def evasion_loss(recipes: Sequence[Probe], arrays: Sequence[Mapping[str, Any]], activations: Any, positive: Any) -> Any:
    """Scalar evasion of one cell.

    Args:
        recipes: the probes' recipes.
        arrays: one cell's ``parameters`` and ``gap`` per probe, in the namespace of ``activations``.
        activations: ``(n, dim)``.
        positive: ``(n,)`` weights: 1 for what the probe must catch, else 0; both must occur.
    """
    xp = namespace(activations)
    negative = 1 - positive
    total = 0.0
    for recipe, cell in zip(recipes, arrays, strict=True):
        score = recipe.score(xp, cell["parameters"], activations)
        centre = (score * negative).sum() / negative.sum()
        z = SHARPNESS * (score - centre) / cell["gap"]
        each = xp.logaddexp(xp.zeros_like(z), z) / SHARPNESS
        total = total + (each * positive).sum() / positive.sum()
    return total / len(recipes)


def targets_from(
    probes: Sequence[Sequence[Sequence[FittedProbe]]], activations: np.ndarray, labels: np.ndarray
) -> Targets:
    """Targets from fitted probes.

    Args:
        probes: ``probes[k][l][s]``: probe k for strength l, model s; the same recipe over all cells.
        activations: ``(strengths, models, n, dim)`` on which they were fitted.
        labels: ``(n,)``.
    """
    recipes, arrays = [], []
    for cells in probes:
        plain = [[plain_recipe(probe) for probe in row] for row in cells]
        recipe, parameters = plain[0][0]
        recipes.append(recipe)
        arrays.append(
            {
                "parameters": {
                    name: stacked(recipe.name, name, [own[name] for row in plain for _, own in row]).reshape(
                        len(plain), len(plain[0]), *np.shape(value)
                    )
                    for name, value in parameters.items()
                },
                "gap": np.array(
                    [
                        [_gap(probe, cell, labels) for probe, cell in zip(row, moved, strict=True)]
                        for row, moved in zip(cells, activations, strict=True)
                    ],
                    dtype=np.float32,
                ),
            }
        )
    return Targets(tuple(recipes), tuple(arrays))


def stacked(probe: str, name: str, values: Sequence[Any]) -> np.ndarray:
    """One parameter of several fits of a recipe, ``(fits, ...)``, for one compiled program; numbers with a fraction
    become float32, indices stay integers.

    Raises:
        ValueError: its shape differs between the fits, as where a recipe chooses how many members it has.
    """
    shapes = sorted({np.shape(value) for value in values})
    if len(shapes) > 1:
        raise ValueError(
            f"probe {probe!r} has parameters {name!r} of different shapes in different models "
            f"({', '.join(map(str, shapes))}) and cannot be pressed in all of them at once; fix the option that "
            "chooses their number, or press one model at a time (n_models=1)"
        )
    together = np.stack([np.asarray(value) for value in values])
    return together if np.issubdtype(together.dtype, np.integer) else together.astype(np.float32)


def plain_recipe(probe: FittedProbe) -> tuple[Probe, Mapping[str, np.ndarray]]:
    """Recipe and parameters; every linear probe becomes a bare direction, so that one compiled program serves all."""
    if probe.traits.linear:
        weight, bias = probe.parameters["weight"], probe.parameters["bias"]
        bare = direction(np.asarray(weight, np.float32), float(bias))
        return bare.probe, bare.parameters
    return probe.probe, probe.parameters


def _gap(probe: FittedProbe, activations: np.ndarray, labels: np.ndarray) -> float:
    """How far positives lie above negatives; never less than a tenth of the scores' spread."""
    scores = np.asarray(probe.score(activations), dtype=float)
    gap = scores[labels == 1].mean() - scores[labels == 0].mean()
    return float(max(gap, 0.1 * scores.std(), 1e-6))
