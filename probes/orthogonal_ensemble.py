r"""Several linear probes, each fitted after what the previous ones read was erased: an attacker must fool all of them.

Fit: member k is a logistic regression (:mod:`elk_stress.probes.logistic`) on rows from which the reads of members
1..k-1 are erased; members are added while the held-out AUROC (folds by item) of the next is at least ``least``. What is
erased is a member's *score*, a direction, and never the label: LEACE (Belrose et al. 2023, 2306.03819) of the label
leaves rows from which no linear probe learns anything, by its theorem. Two ways to erase a score ``w . x``:

* ``nullspace`` (Ravfogel et al. 2020, 2004.07667): the component along w, in standardized features, so that the
  members' standardized weights are orthogonal. What correlates with w remains, so there is more to read.
* ``leace``: with the covariance C of the rows, ``x - C w (w . (x - mean)) / (w^T C w)``, from ``concept-erasure``: what
  remains is uncorrelated with the score, with the least change. Had the member been the optimal one,
  ``w ~ C^-1 (difference of means)``, this would remove the whole difference of means, and the second member would have
  nothing to read: on Gaussian classes such an ensemble is one member, and ``members`` in the notes says so.

Combination of standardized scores ``s_k`` (0 and 1 are mean and standard deviation of the training *negatives*, so that
at a high threshold every member raises about as many false alarms):

    max: caught if any member says so. All must be fooled at once.                 min: caught only if all say so.
    mean: one linear probe again.

``max`` is the default by this reason; its price is that false alarms of every member add up. It is no magic: failing
all of K members is a move to the corner of K half-spaces, at ``sqrt(sum beta_k^2)`` where their scores are independent
under the prior, which is also the distance that the *best* linear combination reaches.

Shapes: activations ``(*batch, d)`` -> ``(*batch,)``; parameter ``weights (d, most)``, filled up with copies where there
are fewer members. The slope of the max, min or mean is bounded by that of its members, so its bits can be certified.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from elk_stress.probes.logistic import Logistic
from elk_stress.probing.fit.held_out import auroc, held_out
from elk_stress.probing.fit.scaling import standardization
from elk_stress.probing.probe import FittedProbe, Traits

__all__ = ["OrthogonalEnsemble"]

_COMBINATIONS = ("max", "mean", "min")
_ERASERS = ("nullspace", "leace")


@dataclass(frozen=True)
class OrthogonalEnsemble:
    """Linear probes of successively erased activations, combined so that an attacker must fool them all.

    Attributes:
        combine: ``max``, ``mean`` or ``min`` of the standardized scores.
        erase: ``nullspace`` or ``leace``: how a member's score is taken out of the rows of the next.
        least: held-out AUROC that a further member must reach.
        most: members at most.
        folds: of that judgement.
        l2: penalty of the logistic regressions.
    """

    combine: str = "max"
    erase: str = "nullspace"
    least: float = 0.85
    most: int = 4
    folds: int = 3
    l2: float = 0.01

    name: ClassVar[str] = "orthogonal_ensemble"
    traits: ClassVar[Traits] = Traits()

    def __post_init__(self) -> None:
        if self.combine not in _COMBINATIONS or self.erase not in _ERASERS or self.most < 1:
            raise ValueError(
                f"orthogonal_ensemble combines by one of {_COMBINATIONS}, erases by one of {_ERASERS} and has at least "
                f"one member; got {self}"
            )

    def fit(
        self, activations: np.ndarray, labels: np.ndarray, *, pairs: np.ndarray | None = None, seed: int = 0
    ) -> FittedProbe:
        """Fit on ``activations (n, d)``, ``labels (n,)``; no randomness.

        Notes: ``members``, and ``held_out_auroc`` of each that was tried (the last may have been left out).
        """
        rows, targets = np.asarray(activations, dtype=float), np.asarray(labels).astype(int)
        splits = list(held_out(targets, self.folds))
        # every fold erases by itself: an eraser fitted on held-out rows would know them
        chains = [self._chain(rows[learned], targets[learned]) for learned, _ in splits]
        whole = self._chain(rows, targets)
        weights, biases, values = [], [], []
        for k in range(self.most):
            found = []
            for (_, judged), chain in zip(splits, chains, strict=True):
                weight, bias = chain()
                found.append(auroc(rows[judged] @ weight + bias, targets[judged]))
            values.append(float(np.mean(found)))
            if k and values[-1] < self.least:
                break
            weight, bias = whole()
            scores = rows[targets == 0] @ weight
            spread = float(scores.std()) or 1.0
            weights.append(weight / spread)
            biases.append(-scores.mean() / spread)
        notes = {"members": len(weights), "held_out_auroc": values}
        # one shape whatever was found: a copy of the last changes no maximum or minimum, the mean itself no mean
        copied = (np.mean(weights, axis=0), np.mean(biases)) if self.combine == "mean" else (weights[-1], biases[-1])
        while len(weights) < self.most:
            weights.append(copied[0])
            biases.append(copied[1])
        parameters = {"weights": np.stack(weights, axis=1), "biases": np.array(biases)}
        return FittedProbe(self, parameters, notes=notes, dim=rows.shape[1])

    def score(self, xp: Any, parameters: Mapping[str, Any], activations: Any) -> Any:
        """The combination of ``activations @ weights + biases``."""
        scores = xp.matmul(activations, parameters["weights"]) + parameters["biases"]
        if self.combine == "mean":
            return xp.mean(scores, axis=-1)
        # one member at a time: reductions share a gradient among ties differently in each library
        pick = xp.maximum if self.combine == "max" else xp.minimum
        out = scores[..., 0]
        for k in range(1, scores.shape[-1]):
            out = pick(out, scores[..., k])
        return out

    def lipschitz(self, parameters: Mapping[str, np.ndarray], factor: np.ndarray) -> float:
        """The steepest member's ``||factor^T w||``; of the mean, its own."""
        weights = np.asarray(parameters["weights"], dtype=float)
        if self.combine == "mean":
            weights = weights.mean(axis=1, keepdims=True)
        return float(np.linalg.norm(factor.T @ weights, axis=0).max())

    def _chain(self, rows: np.ndarray, targets: np.ndarray) -> Callable[[], tuple[np.ndarray, float]]:
        """Each call fits the next member and gives its weight and bias in the coordinates of ``rows``."""
        mean, spread = standardization(rows)
        z = (rows - mean) / spread
        # what is left of z is (z @ remaining)
        remaining = np.eye(rows.shape[1])
        base, erase = Logistic(l2=self.l2), _leace if self.erase == "leace" else _nullspace

        def member() -> tuple[np.ndarray, float]:
            nonlocal remaining
            left = z @ remaining
            fitted = base.fit(left, targets)
            inner = fitted.parameters["weight"]
            direction = remaining @ inner
            remaining = remaining @ erase(left, direction, z @ direction)
            weight = direction / spread
            return weight, float(fitted.parameters["bias"] - weight @ mean)

        return member


def _nullspace(left: np.ndarray, direction: np.ndarray, score: np.ndarray) -> np.ndarray:
    """``(d, d)``, to multiply rows with: without their component along ``direction``."""
    length = np.linalg.norm(direction)
    unit = direction / length if length > 0 else direction
    return np.asarray(np.eye(len(unit)) - np.outer(unit, unit))


def _leace(left: np.ndarray, direction: np.ndarray, score: np.ndarray) -> np.ndarray:
    """``(d, d)``, to multiply rows with: uncorrelated with ``score``, at the least change."""
    import torch

    with warnings.catch_warnings():
        # torch says of its own torch.jit, which the library uses, that it is old
        warnings.simplefilter("ignore", DeprecationWarning)
        from concept_erasure import LeaceEraser

    if not score.std() > 0:
        return np.eye(len(direction))
    # of unit spread: the tolerance of the eraser is absolute. No shrinkage: uncorrelated on these very rows
    read = torch.as_tensor((score - score.mean()) / score.std())
    eraser = LeaceEraser.fit(torch.as_tensor(left), read, shrinkage=False, constrain_cov_trace=False)
    return np.asarray(eraser.P.numpy().T)
