r"""Logistic regression on the directions that the model's output depends on, and on nothing else.

Idea: a correlate that the model never uses can be rewritten for nothing; what its output depends on cannot be moved
without changing what it says. So the probe reads only the latter. This does not forbid cheap breaks: it makes breaks
that *keep behaviour* expensive (the threats "kept").

Equations: with Fisher factors ``F_i (rank, d)`` of training items (a move shifts the output by ``0.5 ||F_i move||^2``
nats), the mean Fisher ``A = mean_i F_i^T F_i = V diag(lambda) V^T``. The probe is a logistic regression
(:mod:`elk_stress.probes.logistic`) on ``V_q^T x``, V_q the q leading eigenvectors: ``weight = V_q w``. q is the
smallest of 1, 2, 4, ... up to A's numerical rank whose held-out AUROC (folds by item) is within ``tolerance`` of the
best.

What is not promised: turning a probe toward what behaviour depends on raises the bits of "fails and keeps behaviour"
only at a fixed ratio of margin to spread under the prior; a probe that reads truth through few, noisy directions can
lose more margin than it gains. And a mean over training items is what behaviour depends on *on average*: what an item
depends on may lie elsewhere. Fisher information as the local metric of a model's output: Amari 1998 (Neural Computation
10); directions by their effect on the output rather than by correlation: Geiger et al. 2021 (2106.02997), Elazar et al.
2021 (2006.00995).

Shapes: activations ``(*batch, d)`` -> log-odds ``(*batch,)``; behaviour ``(m, rank, d)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from elk_stress.probes.logistic import Logistic
from elk_stress.probing.fit.held_out import fewest_columns
from elk_stress.probing.probe import FittedProbe, Traits

__all__ = ["Causal"]


@dataclass(frozen=True)
class Causal:
    """Logistic regression restricted to the leading directions of the model's mean Fisher information.

    Attributes:
        directions: how many; ``None``: chosen on training rows.
        tolerance: held-out AUROC that fewer directions may cost.
        folds: of the choice.
        l2: penalty of the logistic regression.
    """

    directions: int | None = None
    tolerance: float = 0.01
    folds: int = 3
    l2: float = 0.01

    name: ClassVar[str] = "causal"
    traits: ClassVar[Traits] = Traits(linear=True, needs_behaviour=True)

    def __post_init__(self) -> None:
        if self.directions is not None and self.directions < 1:
            raise ValueError(f"causal reads at least one direction, got {self.directions}")

    def fit(
        self,
        activations: np.ndarray,
        labels: np.ndarray,
        *,
        pairs: np.ndarray | None = None,
        seed: int = 0,
        behaviour: np.ndarray | None = None,
    ) -> FittedProbe:
        """Fit on ``activations (n, d)``, ``labels (n,)`` and Fisher factors ``behaviour (m, rank, d)``; no randomness.

        Notes: ``directions`` read, ``fisher_share`` (share of A's trace in them) and, where the number was chosen, the
        ``held_out_auroc`` of every number tried.

        Raises:
            ValueError: no factors, or of another width, or that are all zero (the output does not depend on the site).
        """
        if behaviour is None:
            raise ValueError("causal needs behaviour, Fisher factors (m, rank, d) of the model's output at the site")
        rows, targets = np.asarray(activations, dtype=float), np.asarray(labels).astype(int)
        factors = np.asarray(behaviour, dtype=float)
        if factors.ndim != 3 or factors.shape[-1] != rows.shape[1]:
            raise ValueError(
                f"causal: expected Fisher factors (m, rank, {rows.shape[1]}) of the site that is read, got shape "
                f"{factors.shape}"
            )
        _, size, right = np.linalg.svd(factors.reshape(-1, rows.shape[1]), full_matrices=False)
        known = int((size > 1e-10 * size.max(initial=0.0)).sum())
        if not known:
            raise ValueError("causal: behaviour depends on nothing at this site (all Fisher factors are zero)")
        basis = right[:known].T
        seen = rows @ basis
        notes: dict[str, Any] = {}
        if self.directions is None:
            tried = sorted({min(known, 1 << k) for k in range(known.bit_length() + 1)})
            chosen, notes["held_out_auroc"] = fewest_columns(
                self._base.fit, seen, targets, tried, tolerance=self.tolerance, folds=self.folds
            )
        else:
            chosen = min(self.directions, known)
        inner = self._base.fit(seen[:, :chosen], targets)
        weight = basis[:, :chosen] @ inner.parameters["weight"]
        share = float((size[:chosen] ** 2).sum() / (size**2).sum())
        notes |= {"directions": chosen, "fisher_share": share, **inner.notes}
        return FittedProbe(self, {"weight": weight, "bias": np.asarray(inner.parameters["bias"])}, notes=notes)

    def score(self, xp: Any, parameters: Mapping[str, Any], activations: Any) -> Any:
        """``activations @ weight + bias``."""
        return xp.matmul(activations, parameters["weight"]) + parameters["bias"]

    @property
    def _base(self) -> Logistic:
        return Logistic(l2=self.l2)
