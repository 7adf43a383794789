r"""A k-sparse probe: a few features of a dictionary that was learned on the activations, without labels.

Equations: with ``z = (x - mean) / sd`` over the training rows, a sparse autoencoder of F features

    p = E^T z + e,      f_j = p_j if p_j > theta else 0,      z ~ D f + c,

is fitted to all training rows by Adam on the squared error; the threshold theta is moved along so that on average a
given number of features is on (what BatchTopK, 2412.06410, gets by ranking a batch), and D keeps unit columns. The
labels then choose k features, those whose mean differs most between the classes in units of their spread, and

    score(x) = sum_{j chosen} r_j max(p_j - theta, 0) + b

is a logistic regression on these (:mod:`elk_stress.probes.logistic`). What the probe reads is zero exactly where the
feature is off, but starts continuously from there: a jump would have no gradient. The encoder is one matrix product:
nothing is solved at scoring time, and only the k chosen columns of E are kept.

k is the one of the least class-balanced held-out loss on folds of items, features chosen anew in each. The dictionary
is learned once, on all training rows: it sees no labels.

Shapes: activations ``(*batch, d)`` -> log-odds ``(*batch,)`` at equal class frequencies. Float32 while the dictionary
is learned. References: k-sparse probing by mean difference: Gurnee et al. 2023 (2305.01610); on dictionaries, and why
one should not expect them to beat logistic regression: Kantamneni et al. 2025 (2502.16681).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import numpy as np

from elk_stress.probes.logistic import Logistic
from elk_stress.probing.fit.folds import cross_weights
from elk_stress.probing.fit.scaling import standardization
from elk_stress.probing.probe import FittedProbe, Traits

__all__ = ["Sparse"]

# how fast the threshold follows the number of features that are on, in units of z per step
_FOLLOW = 0.2
# length of a column's first step, whose own length is 1: features must turn from rows to what rows are made of
_STEP = 0.15


@dataclass(frozen=True)
class Sparse:
    """Logistic regression on k features of a dictionary learned on the activations, k chosen on training rows.

    Attributes:
        features: F, size of the dictionary; at most one for every two rows.
        active: how many features are on in a row, on average; at most a quarter.
        sizes: k to choose from.
        folds: of items, for the choice of k; fewer where a class has fewer rows.
        steps: of Adam, for the dictionary; the step size falls to zero along a cosine.
        batch: rows per step.
    """

    features: int = 256
    active: int = 16
    sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    folds: int = 3
    steps: int = 400
    batch: int = 256

    name: ClassVar[str] = "sparse"
    traits: ClassVar[Traits] = Traits()

    def __post_init__(self) -> None:
        # JSON gives a list back
        object.__setattr__(self, "sizes", tuple(sorted(int(size) for size in self.sizes)))
        if not self.sizes or min(*self.sizes, self.folds, self.steps, self.batch, self.active) < 1:
            raise ValueError(f"sparse needs sizes, active, folds, steps and batch of at least 1; got {self}")
        if self.features <= self.active:
            raise ValueError(f"sparse needs more features than are active at once; got {self}")

    def fit(
        self, activations: np.ndarray, labels: np.ndarray, *, pairs: np.ndarray | None = None, seed: int = 0
    ) -> FittedProbe:
        """Fit on ``activations (n, d)``, ``labels (n,)``; ``seed`` draws the first dictionary and the order of rows.

        Notes: ``k`` that was chosen and its ``held_out_loss`` in nats, class-balanced; of the dictionary, the share of
        the activations' variance that it ``explained`` and the mean number of features ``on`` in a row.
        """
        rows, targets = np.asarray(activations, dtype=float), np.asarray(labels).astype(int)
        centre, spread = standardization(rows)
        rows = (rows - centre) / spread
        encoder, threshold, explained = self._dictionary(rows, seed)
        read = np.maximum(rows @ encoder - threshold, 0.0)

        learned, judged = cross_weights(targets, self.folds)
        sizes = tuple(dict.fromkeys(min(size, encoder.shape[1]) for size in self.sizes))
        losses = np.zeros((learned.shape[1] - 1, len(sizes)))
        for fold in range(len(losses)):
            of_fold = learned[:, fold] > 0
            ranked = _ranked(read[of_fold], targets[of_fold])
            for place, size in enumerate(sizes):
                fitted = Logistic().fit(read[of_fold][:, ranked[:size]], targets[of_fold])
                margin = (1.0 - 2.0 * targets) * fitted.score(read[:, ranked[:size]])
                losses[fold, place] = judged[:, fold] @ np.logaddexp(0.0, margin)
        by_size = losses.mean(axis=0)
        size = sizes[int(by_size.argmin())]
        chosen = _ranked(read, targets)[:size]
        fitted = Logistic().fit(read[:, chosen], targets)
        # one shape whatever k was chosen: features that nothing reads
        unread = max(sizes) - size
        parameters = {
            "weight": np.pad(encoder[:, chosen] / spread[:, None], ((0, 0), (0, unread))),
            "centre": centre,
            "threshold": np.pad(threshold[chosen], (0, unread)),
            "readout": np.pad(fitted.parameters["weight"], (0, unread)),
            "bias": fitted.parameters["bias"],
        }
        notes = {
            "k": size,
            "held_out_loss": float(by_size.min()),
            "explained": explained,
            "on": float((read > 0).sum(axis=1).mean()),
        }
        return FittedProbe(self, parameters, notes=notes)

    def _dictionary(self, rows: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, float]:
        """Encoder ``(d, F)``, thresholds ``(F,)`` on ``rows @ encoder``, and the share of variance explained."""
        rng = np.random.default_rng(np.random.SeedSequence(seed))
        # a feature per row would learn the rows by heart, and nothing that another row shares
        features = max(min(self.features, len(rows) // 2), 1)
        active = max(min(self.active, features // 4), 1)
        # features begin at rows, so that each is on for some
        first = rows[rng.permutation(len(rows))[:features]].T
        first = first / np.maximum(np.linalg.norm(first, axis=0), 1e-12)
        batches = rng.integers(0, len(rows), (self.steps, min(self.batch, len(rows))), dtype=np.int32)
        start = np.quantile(rows[batches[0]] @ first, 1.0 - active / features)
        found = _program(self.steps)(
            rows.astype(np.float32), batches, first.astype(np.float32), np.float32(start), np.float32(active)
        )
        encoder, shift, threshold, error = (np.asarray(part, dtype=float) for part in found)
        return encoder, threshold - shift, float(1.0 - error / (rows**2).mean())

    def score(self, xp: Any, parameters: Mapping[str, Any], activations: Any) -> Any:
        """``max((activations - centre) @ weight - threshold, 0) @ readout + bias``."""
        inner = xp.matmul(activations - parameters["centre"], parameters["weight"]) - parameters["threshold"]
        read = xp.where(inner > 0, inner, xp.zeros_like(inner))
        return xp.matmul(read, parameters["readout"]) + parameters["bias"]


def _ranked(read: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Features by the difference of their class means in units of their spread, largest first."""
    gap = np.abs(read[targets == 1].mean(axis=0) - read[targets == 0].mean(axis=0))
    spread = read.std(axis=0)
    return np.argsort(-np.where(spread > 0, gap / np.where(spread > 0, spread, 1.0), 0.0), kind="stable")


@cache
def _program(steps: int) -> Any:
    """The compiled fit of the dictionary; compiled once for each shape of its arguments, all float32 but the batches.

    Returns: encoder ``(d, F)``, its shift ``(F,)``, the threshold ``()`` and the mean squared error ``()``.
    """
    import jax
    import jax.numpy as jnp
    import optax

    def rebuilt(at: Any, rows: Any, threshold: Any) -> tuple[Any, Any]:
        inner = rows @ at["encoder"] + at["shift"]
        on = inner > threshold
        return jnp.where(on, inner, 0.0) @ at["decoder"].T + at["mean"], on

    def error(at: Any, rows: Any, threshold: Any) -> tuple[Any, Any]:
        found, on = rebuilt(at, rows, threshold)
        return ((rows - found) ** 2).mean(), on.sum(axis=1).mean(dtype=rows.dtype)

    def descend(rows: Any, batches: Any, first: Any, threshold: Any, active: Any) -> Any:
        at = {
            "encoder": first,
            "decoder": first,
            "shift": jnp.zeros_like(first[0]),
            "mean": jnp.zeros_like(first[:, 0]),
        }
        method = optax.adam(optax.cosine_decay_schedule(_STEP / np.sqrt(first.shape[0]), steps))

        def step(carry: Any, batch: Any) -> Any:
            at, state, threshold = carry
            slopes, on = jax.grad(error, has_aux=True)(at, rows[batch], threshold)
            moves, state = method.update(slopes, state, at)
            at = optax.apply_updates(at, moves)
            size = jnp.maximum(jnp.linalg.norm(at["decoder"], axis=0), 1e-6)
            at = {**at, "decoder": at["decoder"] / size}
            # below zero a feature would be on where it takes away what it stands for
            threshold = jnp.maximum(threshold + _FOLLOW * jnp.clip(on / active - 1.0, -1.0, 1.0), 0.0)
            return (at, state, threshold), None

        (at, _, threshold), _ = jax.lax.scan(step, (at, method.init(at), threshold), batches)

        # in the batches' size: F numbers per row at once for a million rows would not fit
        def squared(row: Any) -> Any:
            return ((row - rebuilt(at, row, threshold)[0]) ** 2).mean()

        last = rows[batches[-32:].reshape(-1)]
        return at["encoder"], at["shift"], threshold, squared(last)

    return jax.jit(descend)
