r"""Contrastive representation clustering: the top principal component of pair differences (Burns et al. 2212.03827).

A pair is a statement x+ (affirmed) and its negation x- (rows 0 and 1 of ``pairs``): exactly one of the two is positive,
so along the direction of truth their difference takes one of two opposite values, and varies much.

Equations. As in ``ccs`` each half is centred on its own mean and both share one standard deviation s per feature,
``z+- = (x+- - mean+-) / s``; then

    v = the unit vector that maximizes  sum over pairs (v . (z+ - z-))^2,   subject to  v . (mean+ - mean-) / s = 0,

found as the first right singular vector. The constraint makes a single statement scorable without knowing its form: a v
orthogonal to the difference of the halves' means gives the same score under either half's normalization,
``score(x) = v . (x - (mean+ + mean-) / 2) / s``, a linear probe with ``w = v / s``. The price is one direction of d.

Sign. v and -v explain the same variance. One bit of label information settles it: the sign under which more training
pairs rank their positive statement higher (``sign_agreement`` in the notes; near 1/2 means that the principal component
is something other than the labels). Otherwise labels play no part, unless Platt scaling is asked for.

Platt scaling (``platt=True``): ``a score + b`` with a and b of least log-loss on the training statements' labels, with
Platt's smoothed targets ``(n1 + 1)/(n1 + 2)`` and ``1/(n0 + 2)``, so that separable classes give a finite a (Platt
1999, "Probabilistic outputs for support vector machines"). Scores are then log-odds. With a > 0 it changes no ranking;
an a < 0 (``platt_slope`` in the notes), possible where labels hardly follow the score, turns the pairs' choice of sign.

Shapes: activations ``(*batch, d)`` -> ``(*batch,)``. ``variance_share`` in the notes: the component's share of the
differences' variance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from elk_stress.probing.fit.pairs import checked_pairs, normalized_halves, oriented
from elk_stress.probing.probe import FittedProbe, Traits

__all__ = ["CRC"]


@dataclass(frozen=True)
class CRC:
    """Top principal component of contrast pairs' differences (Burns et al. 2212.03827).

    Attributes:
        platt: scale the score to log-odds by the training labels.
    """

    platt: bool = False

    name: ClassVar[str] = "crc"
    traits: ClassVar[Traits] = Traits(linear=True, needs_pairs=True, flips=True)

    def fit(
        self, activations: np.ndarray, labels: np.ndarray, *, pairs: np.ndarray | None = None, seed: int = 0
    ) -> FittedProbe:
        """Fit on the pairs among ``activations (n, d)``; deterministic, ``seed`` is not used.

        Raises:
            ValueError: no pairs, or pairs that are not two row indices each; differences that do not vary.
        """
        halves = normalized_halves(activations, checked_pairs(pairs, len(activations), self.name))
        differences = halves.affirmed - halves.negated
        _, size, axes = np.linalg.svd(differences, full_matrices=False)
        if not size[0] > 1e-9 * len(differences) ** 0.5:
            raise ValueError("crc: the differences of the pairs do not vary, so they have no principal component")
        notes = {"variance_share": float(size[0] ** 2 / np.sum(size**2)), "n_pairs": len(differences)}
        return oriented(self, axes[0], halves, labels, self.platt, notes)

    def score(self, xp: Any, parameters: Mapping[str, Any], activations: Any) -> Any:
        """``activations @ weight + bias``."""
        return xp.matmul(activations, parameters["weight"]) + parameters["bias"]
