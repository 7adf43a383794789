r"""Contrast-consistent search: a probe from contrast pairs, without labels (Burns et al. 2212.03827).

A pair is a statement x+ (affirmed) and its negation x- (rows 0 and 1 of ``pairs``): exactly one of the two is positive.

Equations. Each half is normalized by its own mean, so that the form of a statement (affirmed or negated) cannot serve
as the answer; both share one standard deviation s per feature, ``z+- = (x+- - mean+-) / s``. With
``p(z) = sigmoid(v . z + b)``,

    consistency  (p(z+) - (1 - p(z-)))^2        the two answers of a pair add up to one
    confidence   min(p(z+), p(z-))^2            rules out p = 1/2 everywhere
    minimize over v, b:  mean over pairs of both + (l2 / 2) ||v||^2,   subject to  v . (mean+ - mean-) / s = 0.

The loss is not convex: several restarts (together, as one matrix) run by Adam; the one of lowest loss is kept. Labels
play no part in that choice.

A single statement does not tell which half it belongs to. The constraint settles it: a v orthogonal to the difference
of the halves' means gives the same score under either half's normalization, so ``score(x) = v . (x - mean+) / s + b =
v . (x - mean-) / s + b`` is the paper's classifier and a plain linear probe (``w = v / s``). The price is one direction
of d, the one along which the average statement differs from the average negation.

Sign. The loss cannot tell "true" from "false": (v, b) and (-v, -b) are equally consistent. One bit of label
information settles it: the sign under which more training pairs rank their positive statement higher. The notes carry
that share (``sign_agreement``; near 1/2 means that CCS found something other than the labels) and the loss.

Shapes: activations ``(*batch, d)`` -> log-odds ``(*batch,)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from elk_stress.probing.fit.pairs import agreement, checked_pairs, normalized_halves
from elk_stress.probing.probe import FittedProbe, Traits

__all__ = ["CCS"]


@dataclass(frozen=True)
class CCS:
    """Contrast-consistent search on pairs of a statement and its negation (Burns et al. 2212.03827).

    Attributes:
        restarts: random starts, optimized together.
        steps: Adam steps of each; the step size falls from ``learning_rate`` to zero along a cosine.
        learning_rate: first step size.
        l2: weight of ``||v||^2 / 2``.
        max_pairs: more pairs than this are thinned to a seeded random choice, which bounds time and memory.
    """

    restarts: int = 10
    steps: int = 400
    learning_rate: float = 0.02
    l2: float = 0.01
    max_pairs: int = 1024

    name: ClassVar[str] = "ccs"
    traits: ClassVar[Traits] = Traits(linear=True, needs_pairs=True)

    def fit(
        self, activations: np.ndarray, labels: np.ndarray, *, pairs: np.ndarray | None = None, seed: int = 0
    ) -> FittedProbe:
        """Fit on the pairs among ``activations (n, d)``; ``labels (n,)`` choose the sign and nothing else.

        Raises:
            ValueError: no pairs, or pairs that are not two row indices each.
        """
        index = checked_pairs(pairs, len(activations), self.name)
        rng = np.random.default_rng(np.random.SeedSequence(seed))
        if len(index) > self.max_pairs:
            index = index[np.sort(rng.choice(len(index), self.max_pairs, replace=False))]
        halves = normalized_halves(activations, index)
        rows, form = halves.rows, halves.form

        start = _without(rng.standard_normal((self.restarts, rows.shape[1])), form)
        start /= np.linalg.norm(start, axis=1, keepdims=True)
        directions, offsets, losses = _minimize(
            halves.affirmed, halves.negated, start, self.steps, self.learning_rate, self.l2
        )
        best = int(np.argmin(losses))
        # Adam rescales coordinates and so leaves the subspace; z has nothing along `form`, so the loss stays as it is
        weight = _without(directions[best : best + 1], form)[0] / halves.spread
        # both halves' centres give the same bias up to rounding; their mean treats them alike
        bias = offsets[best] - weight @ halves.middle

        agreed = agreement((rows[index[:, 0]] - rows[index[:, 1]]) @ weight, labels, index)
        sign = 1.0 if agreed >= 0.5 else -1.0
        notes = {
            "loss": float(losses[best]),
            "restart_losses": [float(x) for x in losses],
            "sign_agreement": max(agreed, 1 - agreed),
            "n_pairs": len(index),
        }
        return FittedProbe(self, {"weight": sign * weight, "bias": np.asarray(sign * bias)}, notes=notes)

    def score(self, xp: Any, parameters: Mapping[str, Any], activations: Any) -> Any:
        """``activations @ weight + bias``."""
        return xp.matmul(activations, parameters["weight"]) + parameters["bias"]


def _without(rows: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """``rows`` with their component along ``unit`` removed."""
    return np.asarray(rows - (rows @ unit)[:, None] * unit)


def _minimize(
    affirmed: np.ndarray, negated: np.ndarray, start: np.ndarray, steps: int, learning_rate: float, l2: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Adam on all restarts at once: v ``(restarts, d)``, b ``(restarts,)`` and the loss of each.

    Adam's steps are per coordinate, so no start influences another.
    """
    # float32 halves the time of the two products that dominate; the loss is flat to far more than its rounding
    z_plus, z_minus = affirmed.astype(np.float32), negated.astype(np.float32)
    point = np.concatenate([start, np.zeros((len(start), 1))], axis=1)
    mean, square = np.zeros_like(point), np.zeros_like(point)
    for step in range(1, steps + 1):
        _, gradient = _loss(z_plus, z_minus, point, l2)
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        rate = learning_rate * 0.5 * (1 + np.cos(np.pi * step / steps))
        point = point - rate * (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
    losses, _ = _loss(z_plus, z_minus, point, l2)
    return point[:, :-1], point[:, -1], losses


def _loss(z_plus: np.ndarray, z_minus: np.ndarray, point: np.ndarray, l2: float) -> tuple[np.ndarray, np.ndarray]:
    """CCS loss ``(restarts,)`` and its gradient ``(restarts, d + 1)``."""
    from scipy.special import expit

    v, b = point[:, :-1].astype(np.float32), point[:, -1]
    p, q = expit(z_plus @ v.T + b), expit(z_minus @ v.T + b)
    gap, least = p + q - 1, np.minimum(p, q)
    loss = (gap**2 + least**2).mean(axis=0) + 0.5 * l2 * (point[:, :-1] ** 2).sum(axis=1)
    p_leads = p < q
    slope_p = 2 * (gap + np.where(p_leads, least, 0.0)) * p * (1 - p) / len(p)
    slope_q = 2 * (gap + np.where(p_leads, 0.0, least)) * q * (1 - q) / len(q)
    by_v = slope_p.T.astype(np.float32) @ z_plus + slope_q.T.astype(np.float32) @ z_minus
    by_b = slope_p.sum(axis=0) + slope_q.sum(axis=0)
    return loss, np.concatenate([by_v + l2 * point[:, :-1], by_b[:, None]], axis=1)
