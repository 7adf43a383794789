r"""VINC: variance, invariance and negative covariance of contrast pairs, as one eigenproblem (Belrose, Mallen et al.).

An answer that is a matter of truth should vary over statements, be the same in every context of one statement, and be
opposite for a statement and its negation. For a linear score all three are quadratic forms.

Equations. Halves z+- normalized as in ``crc`` (each on its own mean, one spread s per feature, without the direction
that tells the halves apart). The pairs of one item under its k contexts are a *cluster* i with centroids zbar_i+-; then

    V = Cov(zbar+) + Cov(zbar-)                        variance over clusters
    I = mean over i of Cov_i(z+) + Cov_i(z-)           what contexts do within a cluster (invariance wants little)
    N = Cov(zbar+, zbar-) + Cov(zbar-, zbar+)          covariance of a statement with its negation (wanted negative)
    v = the eigenvector of the largest eigenvalue of   variance V - invariance I - negation N

and ``score(x) = v . (x - (mean+ + mean-) / 2) / s``. The largest eigenvalue counts, not the largest in size: the matrix
has negative ones. Directions along which nothing varies are left out, for their eigenvalue 0 may be the largest.
With weights (1, 0, 1) and every pair its own cluster this is ``crc``, by ``Var(a - b) = Var a + Var b - 2 Cov(a, b)``.

The source erases which half and which paraphrase a row is with LEACE; here the direction of the halves' means is left
out as in ``ccs``, and contexts are *not* erased, so that the invariance term sees all of what they do, their common
shift included. The weights are fixed at 1 each: the objective reads no labels, so there is nothing to choose them by;
the source found small effects all over, variance the most useful term and invariance slightly so.

Clusters. Paraphrases are contexts of one item here. Rows come as (item x context) but pairs do not say how many
contexts there are. It is read off the list of pairs where that goes context by context, as the engine lists them: k
blocks of the same n >= 2 pairs, each shifted by one row. Otherwise, or if told ``contexts=1``, every pair is its own
cluster and there is no invariance term; ``contexts=k`` says that k consecutive rows are one item. Notes: ``contexts``.

Sign and Platt scaling by training labels, exactly as in ``crc``; labels play no other part.

Shapes: activations ``(*batch, d)`` -> ``(*batch,)``.

References: Belrose, Mallen et al., "VINC-S: Closed-form Optionally-supervised Knowledge Elicitation with Paraphrase
Invariance", EleutherAI blog 2024 (https://blog.eleuther.ai/vincs/), its equations 4 to 8 without the supervised term;
compared on quirky models in Mallen et al. 2312.01037. Pairs and ``crc``: Burns et al. 2212.03827.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from elk_stress.probing.fit.pairs import Halves, checked_pairs, normalized_halves, oriented
from elk_stress.probing.probe import FittedProbe, Traits

__all__ = ["VINC"]


@dataclass(frozen=True)
class VINC:
    """Variance - invariance - negative covariance of contrast pairs, top eigenvector (EleutherAI's VINC).

    Attributes:
        variance: weight of the variance over clusters.
        invariance: weight against variation within a cluster.
        negation: weight against covariance of a statement with its negation.
        contexts: consecutive rows that are one item; ``None`` reads it off the list of pairs.
        platt: scale the score to log-odds by the training labels.
    """

    variance: float = 1.0
    invariance: float = 1.0
    negation: float = 1.0
    contexts: int | None = None
    platt: bool = False

    name: ClassVar[str] = "vinc"
    traits: ClassVar[Traits] = Traits(linear=True, needs_pairs=True, flips=True)

    def __post_init__(self) -> None:
        weights = (self.variance, self.invariance, self.negation)
        if min(weights) < 0 or max(self.variance, self.negation) == 0:
            raise ValueError(
                f"vinc needs weights of at least 0, and variance or negation above 0 (or it asks for nothing but "
                f"stillness); got {weights}"
            )
        if self.contexts is not None and self.contexts < 1:
            raise ValueError(f"vinc: contexts is a number of rows per item, at least 1, got {self.contexts}")

    def fit(
        self, activations: np.ndarray, labels: np.ndarray, *, pairs: np.ndarray | None = None, seed: int = 0
    ) -> FittedProbe:
        """Fit on the pairs among ``activations (n, d)``; deterministic, ``seed`` is not used.

        Raises:
            ValueError: no pairs, or pairs that are not two row indices each; pairs in which nothing varies.
        """
        halves = normalized_halves(activations, checked_pairs(pairs, len(activations), self.name))
        contexts = _contexts_of(halves.pairs) if self.contexts is None else self.contexts
        varies = _span(halves)
        matrix = varies.T @ self._matrix(halves, contexts) @ varies
        sizes, axes = np.linalg.eigh(matrix)
        notes = {"eigenvalue": float(sizes[-1]), "contexts": contexts, "n_pairs": len(halves.pairs)}
        return oriented(self, varies @ axes[:, -1], halves, labels, self.platt, notes)

    def score(self, xp: Any, parameters: Mapping[str, Any], activations: Any) -> Any:
        """``activations @ weight + bias``."""
        return xp.matmul(activations, parameters["weight"]) + parameters["bias"]

    def _matrix(self, halves: Halves, contexts: int) -> np.ndarray:
        """``variance V - invariance I - negation N``, ``(d, d)`` symmetric."""
        _, cluster = np.unique(halves.pairs // contexts, axis=0, return_inverse=True)
        cluster = cluster.ravel()
        size = np.bincount(cluster).astype(float)
        centroids = []
        within = np.zeros((halves.affirmed.shape[1],) * 2)
        for half in (halves.affirmed, halves.negated):
            total = np.zeros((len(size), half.shape[1]))
            np.add.at(total, cluster, half)
            centroid = total / size[:, None]
            inner = (half - centroid[cluster]) / np.sqrt(size[cluster, None] * len(size))
            within += inner.T @ inner
            centroids.append(centroid - centroid.mean(axis=0))
        plus, minus = centroids
        cross = plus.T @ minus / len(size)
        between = (plus.T @ plus + minus.T @ minus) / len(size)
        return np.asarray(self.variance * between - self.invariance * within - self.negation * (cross + cross.T))


def _contexts_of(index: np.ndarray) -> int:
    """k if the pairs are k blocks of the same pairs, each shifted by one row; else 1."""
    following = np.flatnonzero((index == index[0] + 1).all(axis=1))
    n = int(following[0]) if len(following) else 0
    if n < 2 or len(index) % n:
        return 1
    blocks = index.reshape(-1, n, 2)
    k = len(blocks)
    starts = np.sort(blocks[0].ravel())
    # rows of different items must not overlap, or the shift is something else than a context
    same = np.array_equal(blocks, blocks[0] + np.arange(k)[:, None, None])
    return k if same and np.diff(starts).min() >= k and not (starts % k).any() else 1


def _span(halves: Halves) -> np.ndarray:
    """Orthonormal columns ``(d, rank)`` of the directions along which either half varies."""
    total = halves.affirmed.T @ halves.affirmed + halves.negated.T @ halves.negated
    sizes, axes = np.linalg.eigh(total)
    varies = sizes > 1e-10 * max(float(sizes[-1]), 1e-12)
    if not varies.any():
        raise ValueError("vinc: nothing varies among the pairs; the site reads the same for every statement")
    return np.asarray(axes[:, varies])
