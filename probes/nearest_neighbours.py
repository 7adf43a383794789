r"""Distance to the nearest negatives after whitening: a detector that never saw a positive (Sun et al. 2204.06507).

It assumes no shape of the negatives' distribution: several clusters, curved or hollow ones are all the same to it.

Equations. With ``z = (x - m) / D`` in the negatives' own units, their shrunk correlations (as in ``mahalanobis``) have
eigenvalues l_j and axes V. The r leading ones make coordinates ``y = V_r^T z / sqrt(l)``; what is left, ``rest = z -
V_r V_r^T z``, is measured in units of the mean remaining eigenvalue s^2. Prototypes p are training negatives, projected
onto the r axes, so that

    D_p(x)^2 = ||y - y_p||^2 + ||rest||^2 / s^2,      score(x) = mean over the k nearest p of sqrt(1 + D_p(x)^2).

With r = d this is the distance in whitened space. The remainder keeps moves out of the leading axes visible: a detector
that read r axes only could be left behind through the others. Sun et al. normalize each activation to unit length
instead and take the k-th distance; whitening is used here because activations' scales differ by orders of magnitude
between directions, and the mean over k neighbours has a slope toward all of them.

k is fixed at 5: there are no positives to choose it by, and the ranking hardly depends on it (on planted classes the
AUROCs of k = 1, 5 and 20 lie less than 0.02 apart). Prototypes are capped, drawn by seed: Sun et al. find a share of 1%
enough.

``sqrt(1 + D^2)`` is smooth where a prototype is hit exactly. Each term is 1-Lipschitz in whitened coordinates, hence so
is the mean of the k smallest: ``lipschitz`` is exact for that, and gives certified bits. Where the nearest set changes
the slope jumps, so it is differentiable almost everywhere.

Computation: neighbours are *selected* by ``||p||^2 - 2 y.p``, a ``(*batch, prototypes)`` array that no gradient goes
through, and *measured* as the norm of the difference: one matrix product, no cancellation, and a gradient that costs
``(*batch, k, r)`` memory.

Shapes: activations ``(*batch, d)`` -> ``(*batch,)``, in standard deviations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from elk_stress.core.arrays import k_smallest
from elk_stress.probing.fit.density import axes_factor, leading_axes, negatives_of, on_axes
from elk_stress.probing.probe import FittedProbe, Traits

__all__ = ["NearestNeighbours"]


@dataclass(frozen=True)
class NearestNeighbours:
    """Mean distance to the k nearest training negatives after whitening; learns from negatives alone.

    Attributes:
        k: neighbours; fewer where there are fewer prototypes.
        prototypes: training negatives kept, at most.
        rank: leading axes whitened one by one, at most; the rest share one scale.
    """

    k: int = 5
    prototypes: int = 1000
    rank: int = 64

    name: ClassVar[str] = "nearest_neighbours"
    traits: ClassVar[Traits] = Traits(negatives_only=True)

    def __post_init__(self) -> None:
        if min(self.k, self.prototypes, self.rank) < 1 or self.k > self.prototypes:
            raise ValueError(f"nearest_neighbours needs 1 <= k <= prototypes and a rank of at least 1, got {self}")

    def fit(
        self, activations: np.ndarray, labels: np.ndarray, *, pairs: np.ndarray | None = None, seed: int = 0
    ) -> FittedProbe:
        """Fit on the negatives among ``activations (n, d)``; ``seed`` draws the prototypes.

        Raises:
            ValueError: fewer than two different negatives.
        """
        rows = negatives_of(activations, labels, self.name)
        place = leading_axes(rows, self.rank)._asdict()
        if len(rows) > self.prototypes:
            rng = np.random.default_rng(np.random.SeedSequence(seed))
            rows = rows[np.sort(rng.choice(len(rows), self.prototypes, replace=False))]
        prototypes, _ = on_axes(np, place, rows)
        parameters = {**place, "prototypes": prototypes}
        return FittedProbe(self, parameters, notes={"n_prototypes": len(prototypes)}, dim=rows.shape[1])

    def score(self, xp: Any, parameters: Mapping[str, Any], activations: Any) -> Any:
        """Mean over the nearest prototypes of ``sqrt(1 + squared distance)``."""
        known = parameters["prototypes"]
        near, rest = on_axes(xp, parameters, activations)
        order = xp.sum(known * known, axis=-1) - 2.0 * xp.matmul(near, xp.matrix_transpose(known))
        nearest = k_smallest(order, min(self.k, known.shape[0]))
        chosen = xp.reshape(xp.take(known, xp.reshape(nearest, (-1,)), axis=0), (*nearest.shape, near.shape[-1]))
        gap = near[..., None, :] - chosen
        return xp.mean(xp.sqrt(1.0 + xp.sum(gap * gap, axis=-1) + rest[..., None]), axis=-1)

    def lipschitz(self, parameters: Mapping[str, np.ndarray], factor: np.ndarray) -> float:
        """The spectral norm of the whitened factor: the score is 1-Lipschitz in whitened coordinates."""
        return float(np.linalg.norm(axes_factor(parameters, factor), 2))
