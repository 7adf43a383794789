r"""Logistic regression on standardized features with an L2 penalty; the classes weigh the same.

Equations: features standardized to ``z = (x - mean) / sd`` over the training rows, then

    minimize over v, b:  sum_i c_i log(1 + exp(-y_i (v . z_i + b))) + (l2 / 2) ||v||^2,   y in {-1, +1},

with weights c_i that sum to 1, half in each class. The standardization is folded into the parameters:
``w = v / sd``, ``bias = b - w . mean``, so that a saved probe carries its scaler.

The penalty is on the *mean* loss: repeating every row (the same items under more contexts) leaves the probe as it is,
where scikit-learn's ``C`` would weaken the penalty. ``l2 = 0.01`` equals ``C = 1`` at 100 rows.

Several penalties may be given: the one of the least log-loss on held-out items (classes weighing the same) is taken,
and the probe fitted with it on all rows. Rows of one item stay in one fold.

Solved by Newton's method: a pass over the rows gives loss and gradient, and the Hessian of some rows, enough to step
well (all of them up to 20,000). There is one minimum, so that every way to it ends at the same probe. Fewer
rows than features: the weights lie in the span of the rows, and are looked for there.

Shapes: activations ``(*batch, d)`` -> log-odds ``(*batch,)`` in nats at equal class frequencies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from elk_stress.probing.fit.held_out import item_folds
from elk_stress.probing.fit.moments import Moments
from elk_stress.probing.fit.scaling import deviations
from elk_stress.probing.fit.streaming import Fitter, Keep, Rows
from elk_stress.probing.probe import FittedProbe, Traits

__all__ = ["Logistic"]

# a Hessian is made of all rows up to so many, of so many per feature beyond
_ALL_ROWS = 20_000
_HESSIAN_ROWS = 20
# Newton's decrement at the end: the root mean square change of scores that one more step would make, about
_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Logistic:
    """L2-penalized logistic regression on standardized features.

    Attributes:
        l2: weight of ``||v||^2 / 2`` against the mean log-loss, above 0; or several to choose from on the training
            rows: ``Logistic(l2=(1e-4, 1e-3, 1e-2, 1e-1, 1.0))``. The choice and its held-out loss in nats (a constant's
            is ln 2) are written in the notes.
        max_iterations: of Newton's method; whether it converged is written in the notes.
        folds: of items, where there is a penalty to choose.
    """

    l2: float | tuple[float, ...] = 0.01
    max_iterations: int = 2000
    folds: int = 5

    name: ClassVar[str] = "logistic"
    traits: ClassVar[Traits] = Traits(linear=True, flips=True, streams=True)

    def __post_init__(self) -> None:
        # JSON gives a list back
        if isinstance(self.l2, Sequence):
            object.__setattr__(self, "l2", tuple(float(penalty) for penalty in self.l2))

    def fit(
        self, activations: np.ndarray, labels: np.ndarray, *, pairs: np.ndarray | None = None, seed: int = 0
    ) -> FittedProbe:
        """Fit on ``activations (n, d)``, ``labels (n,)``; the problem is convex, ``seed`` is not used.

        Raises:
            ValueError: an ``l2`` is not positive (separable classes would send the weights to infinity).
        """
        fitter = self._gather("memory")
        fitter.update(activations, labels)
        return fitter.fit(seed=seed)

    def fitter(self, folder: str | Path | None = None) -> Fitter:
        """The same, batch by batch (:mod:`elk_stress.probing.fit.streaming`); rows are spooled to a file in
        ``folder``."""
        return self._gather("file", folder)

    def _gather(self, keep: Keep, folder: str | Path | None = None) -> Fitter:
        return Fitter(self._finish, "spread", keep=keep, folder=folder)

    def _finish(self, moments: tuple[Moments, Moments], rows: Rows | None, seed: int) -> FittedProbe:
        assert rows is not None
        penalties = self.l2 if isinstance(self.l2, tuple) else (self.l2,)
        if not penalties or not min(penalties) > 0:
            raise ValueError(f"logistic: l2 must be above 0, got {self.l2}; for almost no penalty use 1e-6")
        if len(penalties) > 1:
            losses = self._held_out_losses(penalties, rows)
            least = int(losses.argmin())
            chosen = replace(self, l2=penalties[least])._finish(moments, rows, seed)
            told = {**chosen.notes, "l2": penalties[least], "held_out_loss": float(losses[least])}
            return replace(chosen, probe=self, notes=told)
        l2 = penalties[0]
        every = moments[0].merged(moments[1])
        assert every.square is not None
        mean, spread = every.mean, deviations(every.mean, np.sqrt(every.square / every.count))
        weights = 0.5 / moments[0].count, 0.5 / moments[1].count
        if rows.count < len(mean):
            # the penalty keeps v in the span of the rows: as many unknowns as rows
            parts = list(rows.chunks())
            basis, inside = np.linalg.qr(np.concatenate([(part - mean) / spread for part, _ in parts]).T)
            few = Rows("memory")
            few.append(inside.T, np.concatenate([labels for _, labels in parts]))
            problem = _Problem(few, np.zeros(rows.count), np.ones(rows.count), weights, l2)
            solution, converged = _newton(problem, self.max_iterations)
            normal = basis @ solution[:-1]
        else:
            problem = _Problem(rows, mean, spread, weights, l2)
            solution, converged = _newton(problem, self.max_iterations)
            normal = solution[:-1]
        weight = normal / spread
        parameters = {"weight": weight, "bias": np.asarray(solution[-1] - weight @ mean)}
        return FittedProbe(self, parameters, notes={"converged": converged})

    def _held_out_losses(self, penalties: tuple[float, ...], rows: Rows) -> np.ndarray:
        """``(penalties,)`` mean over folds of the class-balanced log-loss on held-out items."""
        labels = np.concatenate([own for _, own in rows.chunks()])
        fold = item_folds(labels, self.folds)
        losses = np.zeros((int(fold.max()) + 1, len(penalties)))
        for k in range(len(losses)):
            # with too few items for two folds all rows serve as both
            out = fold == k
            probes: list[FittedProbe] = []
            fitter = Fitter(partial(self._finish_all, penalties, probes), "spread", keep=rows.keep, folder=rows.folder)
            for chunk, own, held in _beside(rows, out):
                kept = slice(None) if out.all() else ~held
                fitter.update(chunk[kept], own[kept])
            fitter.fit()
            share = 0.5 / np.bincount(labels[out], minlength=2)
            for chunk, own, held in _beside(rows, out):
                sign = np.where(own[held] == 1, -1.0, 1.0)
                for i, probe in enumerate(probes):
                    losses[k, i] += share[own[held]] @ np.logaddexp(0.0, sign * np.asarray(probe.score(chunk[held])))
            fitter.close()
        return np.asarray(losses.mean(axis=0))

    def _finish_all(
        self,
        penalties: tuple[float, ...],
        probes: list[FittedProbe],
        moments: tuple[Moments, Moments],
        rows: Rows | None,
        seed: int,
    ) -> FittedProbe:
        """A probe per penalty into ``probes``, from rows that were gathered once."""
        probes += [replace(self, l2=penalty)._finish(moments, rows, seed) for penalty in penalties]
        return probes[-1]

    def score(self, xp: Any, parameters: Mapping[str, Any], activations: Any) -> Any:
        """``activations @ weight + bias``."""
        return xp.matmul(activations, parameters["weight"]) + parameters["bias"]


def _beside(rows: Rows, chosen: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Chunks of rows, their labels, and which of them are ``chosen (n,)``."""
    start = 0
    for chunk, labels in rows.chunks():
        yield chunk, labels, chosen[start : start + len(chunk)]
        start += len(chunk)


@dataclass(frozen=True)
class _Problem:
    """The penalized loss of ``(v, b)``, read from the rows in passes.

    Attributes:
        weights: of a negative and of a positive row.
    """

    rows: Rows
    mean: np.ndarray
    spread: np.ndarray
    weights: tuple[float, float]
    l2: float

    def at(self, point: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        """Loss, gradient ``(d + 1,)`` and Hessian ``(d + 1, d + 1)``, from one pass over the rows."""
        dim = len(self.mean)
        penalty = np.append(np.full(dim, self.l2), 0.0)
        loss = 0.5 * float(penalty @ point**2)
        slope, offset, curve, seen = np.zeros(dim), 0.0, np.zeros((dim + 1, dim + 1)), 0.0
        share = max(_HESSIAN_ROWS * dim, _ALL_ROWS) / self.rows.count
        # drawn, the same in every pass: rows at even distances may all be of one class
        draw = np.random.default_rng(np.random.SeedSequence(0))
        for chunk, labels in self.rows.chunks():
            # the scale goes into the weights: a row is touched as seldom as can be
            rows = np.subtract(chunk, self.mean, dtype=float)
            sign = np.where(labels == 1, 1.0, -1.0)
            weight = np.where(labels == 1, self.weights[1], self.weights[0])
            margin = sign * (rows @ (point[:-1] / self.spread) + point[-1])
            loss += float(weight @ np.logaddexp(0.0, -margin))
            # the chance given to the wrong class
            miss = 0.5 * (1.0 - np.tanh(0.5 * margin))
            pull = weight * sign * miss
            slope -= pull @ rows
            offset -= float(pull.sum())
            some: Any = slice(None) if share >= 1 else draw.random(len(rows)) < share
            seen += float(weight[some].sum())
            root = np.sqrt(weight * miss * (1.0 - miss))[some, None]
            scaled = np.concatenate([rows[some] / self.spread * root, root], axis=1)
            curve += scaled.T @ scaled
        curve /= seen
        curve[np.diag_indices(dim + 1)] += penalty
        return loss, np.append(slope / self.spread, offset) + penalty * point, curve


def _newton(problem: _Problem, most: int) -> tuple[np.ndarray, bool]:
    """The minimum, and whether it was reached within ``most`` passes."""
    from scipy.linalg import cho_factor, cho_solve

    point = np.zeros(len(problem.mean) + 1)
    loss, slope, curve = problem.at(point)
    size = 1.0
    step = np.zeros_like(point)
    decrement = np.inf
    for _ in range(most):
        if size == 1.0:
            step = -cho_solve(cho_factor(curve), slope)
            decrement = float(-step @ slope)
            if decrement <= _TOLERANCE**2:
                return point + step, True
        there = point + size * step
        new = problem.at(there)
        # Armijo's condition; where its difference would drown in rounding, Newton's full step is taken on trust
        if new[0] <= loss - 1e-4 * size * decrement or decrement < 1e-12:
            point, (loss, slope, curve), size = there, new, 1.0
        else:
            size /= 2
    return point, False
