r"""Priors: which moves happen when nobody optimizes against the probe, in coordinates where ``u ~ N(0, I)``.

A move is ``s(z) L v``: L ``(d, r)`` a factor of the covariance ``L L^T``, ``v`` the first r coordinates of u, and z one
extra coordinate for the scale when the tail is heavy (:mod:`elk_stress.threats.tails`).

**Natural thoughts**: how differently could the model have thought about the same thing? With ``x_ic`` the activations
of item i in neutral context c, ``x_ic = mu_i + b_c + e_ic``, the origin of an item is its mean over contexts and

* ``S_b``: sample covariance of the context means, as many samples as contexts; ``E S_b = Sigma_b + Sigma_e/n``,
* ``S_e``: pooled item-by-context interaction on ``(n-1)(C-1)`` degrees of freedom; ``E S_e = Sigma_e``,
* one item's move: ``shrunk(S_b) + (1 - 1/n) shrunk(S_e)``; all items' common move (universal): ``shrunk(S_b)``.

Each part is shrunk separately toward a multiple of the identity, so the factor has full rank with fewer samples than
dimensions. The intensity is that of the oracle approximating shrinkage estimator (OAS; Chen, Wiesel, Eldar and Hero
2010, 0907.4698), which reads the data only through S and its degrees of freedom and so fits pooled residuals, whose
rows are not independent samples.

Guarantee: without shrinkage the item covariance is unbiased for ``Sigma_b + Sigma_e`` (tested by simulation).
Units: activations throughout; u has none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from scipy import special

from elk_stress.core.arrays import like, namespace, to_numpy
from elk_stress.threats.tail_fit import TailFit as TailFit
from elk_stress.threats.tail_fit import fit_tails as fit_tails
from elk_stress.threats.tails import Gaussian as Gaussian
from elk_stress.threats.tails import Logistic as Logistic
from elk_stress.threats.tails import StudentT as StudentT
from elk_stress.threats.tails import Tail as Tail
from elk_stress.threats.tails import scale_table

__all__ = [
    "ChoicePrior",
    "EllipticalPrior",
    "Gaussian",
    "Logistic",
    "StudentT",
    "Tail",
    "TailFit",
    "fit_tails",
    "isotropic",
    "natural",
    "origins",
]

Array = Any


@dataclass(frozen=True, eq=False)
class EllipticalPrior:
    """Moves ``s(z) L v`` with covariance ``L L^T`` and a tail that every projection shares.

    Attributes:
        factor: L, ``(d, r)``.
        tail: Gaussian, logistic or Student-t.
        name: what the prior is called in a threat.
        notes: how it was made (sample counts, shrinkage intensities, effective ranks).
    """

    factor: np.ndarray
    tail: Tail = field(default_factory=Gaussian)
    name: str = "elliptical"
    notes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = np.shape(self.factor)
        if len(shape) != 2 or 0 in shape or not np.isfinite(self.factor).all():
            raise ValueError(f"a prior's factor is a finite matrix of shape (d, rank), got shape {shape}")

    @property
    def dim(self) -> int:
        """Standard normal coordinates of a move: the rank, and one for the scale of a heavy tail."""
        return int(self.factor.shape[1]) + self.tail.extra

    @property
    def width(self) -> int:
        """d: width of the activations that are moved."""
        return int(self.factor.shape[0])

    def move(self, u: Array) -> Array:
        """Moves ``(..., d)`` of points ``(..., dim)``, in u's namespace, dtype and device; differentiable."""
        if u.shape[-1] != self.dim:
            raise ValueError(
                f"the prior {self.name!r} ({self.tail.name}) has {self.dim} coordinates, points came with {u.shape[-1]}"
            )
        xp = namespace(u)
        transposed = like(self._transposed, u)
        if not self.tail.extra:
            return xp.matmul(u, transposed)
        scale = self.tail.scale(u[..., -1], xp)
        return xp.matmul(u[..., :-1] * scale[..., None], transposed)

    def inverse(self, moves: np.ndarray) -> np.ndarray:
        """The shortest u ``(..., dim)`` whose move is the part of ``moves (..., d)`` inside the factor's span.

        Gaussian: ``L^+ move``. Heavy tails: ``||L^+ move||^2 / s(z)^2 + z^2`` minimized over the scale coordinate; the
        move is exact at whichever z is chosen, its length within 1e-6 of the shortest.
        """
        flat = np.asarray(moves, dtype=float) @ self._pseudoinverse.T
        if not self.tail.extra:
            return np.asarray(flat)
        z = _shortest_scale(self.tail, np.sum(flat * flat, axis=-1))
        scale = self.tail.scale(z, namespace(z))
        return np.concatenate([flat / scale[..., None], z[..., None]], axis=-1)

    def scaled(self, c: float) -> EllipticalPrior:
        """The prior of moves c times as large."""
        if not (math.isfinite(c) and c > 0):
            raise ValueError(f"a prior is scaled by a positive number, got {c}")
        return replace(self, factor=self.factor * c, notes={**self.notes, "scaled": self.notes.get("scaled", 1.0) * c})

    def with_tail(self, tail: Tail) -> EllipticalPrior:
        """The same covariance under another tail."""
        return replace(self, tail=tail)

    def restrict(self, basis: np.ndarray) -> EllipticalPrior:
        """Moves confined to the span of ``basis (d, q)``: a factor of ``P L L^T P``, of rank at most q."""
        basis = np.asarray(basis, dtype=float)
        if basis.ndim != 2 or basis.shape[0] != self.width:
            raise ValueError(
                f"a subspace is given by columns of shape ({self.width}, q), got shape {basis.shape}; transpose rows"
            )
        left, size, _ = np.linalg.svd(basis, full_matrices=False)
        q = left[:, size > size.max(initial=0.0) * 1e-10]
        left, size, _ = np.linalg.svd(q.T @ self.factor, full_matrices=False)
        keep = size > size.max(initial=0.0) * 1e-10
        if not keep.any():
            raise ValueError("the prior has no moves inside the given subspace")
        return replace(
            self,
            factor=q @ (left * size)[:, keep],
            name=f"{self.name}, restricted",
            notes={**self.notes, "q": q.shape[1]},
        )

    def sample(self, n: int, seed: int | np.random.SeedSequence) -> np.ndarray:
        """``(n, d)`` independent moves.

        An integer seed is salted: a direction drawn elsewhere from the same integer would otherwise equal a move.
        """
        sequence = seed if isinstance(seed, np.random.SeedSequence) else np.random.SeedSequence([*b"prior", seed])
        rng = np.random.default_rng(sequence)
        return np.asarray(self.move(rng.standard_normal((n, self.dim))))

    def standard_deviation(self, weight: np.ndarray) -> np.ndarray:
        """``||L^T w||``: standard deviation of the projection on each ``weight (..., d)``."""
        return np.asarray(np.linalg.norm(np.asarray(weight, dtype=float) @ self.factor, axis=-1))

    @cached_property
    def covariance(self) -> np.ndarray:
        """``L L^T``, ``(d, d)``; the same under every tail."""
        return np.asarray(self.factor @ self.factor.T)

    @cached_property
    def lipschitz(self) -> float | None:
        """Spectral norm of the factor; ``None`` for heavy tails, whose map is not Lipschitz."""
        return None if self.tail.extra else float(np.linalg.norm(self.factor, ord=2))

    @cached_property
    def _transposed(self) -> np.ndarray:
        return np.ascontiguousarray(self.factor.T)

    @cached_property
    def _pseudoinverse(self) -> np.ndarray:
        return np.linalg.pinv(np.asarray(self.factor, dtype=float))


@dataclass(frozen=True)
class ChoicePrior:
    """A uniform choice among N real alternatives (contexts, seeds), by the inverse CDF of one coordinate."""

    n_options: int
    name: str = "choice"
    dim: int = 1

    def __post_init__(self) -> None:
        if self.n_options < 1:
            raise ValueError(f"a choice needs at least one alternative, got n_options={self.n_options}")

    def index(self, u: Array) -> np.ndarray:
        """Which alternative each point ``(..., 1)`` chooses: ``floor(N Phi(u))``, exact in both tails."""
        z = np.asarray(to_numpy(u), dtype=float)[..., 0]
        n = self.n_options
        from_below, from_above = np.floor(n * special.ndtr(z)), n - 1 - np.floor(n * special.ndtr(-z))
        return np.asarray(np.clip(np.where(z < 0, from_below, from_above), 0, n - 1), dtype=np.int64)

    def bits(self, n_failing: np.ndarray | int) -> np.ndarray:
        """Exactly ``log2(N/c)`` when c of the N alternatives fail; infinite for none."""
        c = np.asarray(n_failing, dtype=float)
        if ((c < 0) | (c > self.n_options)).any():
            raise ValueError(f"between 0 and {self.n_options} alternatives can fail, got {n_failing}")
        with np.errstate(divide="ignore"):
            return np.asarray(math.log2(self.n_options) - np.log2(c))


def origins(activations: np.ndarray) -> np.ndarray:
    """Each item's mean over its contexts: ``(n_items, n_contexts, d) -> (n_items, d)``, summed in float64."""
    return np.asarray(np.mean(activations, axis=1, dtype=np.float64))


def natural(
    activations: np.ndarray,
    *,
    scope: Literal["item", "universal"] = "item",
    shrink: float = 1.0,
    tail: Tail = Gaussian(),  # noqa: B008 - frozen
) -> EllipticalPrior:
    """Natural thoughts: the covariance of an item's activations over neutral contexts.

    Args:
        activations: ``(n_items, n_contexts, d)`` of training items under contexts A.
        scope: ``"item"``, one item's own move; ``"universal"``, the part that all items share.
        shrink: multiplies the shrinkage intensities (clipped to 1): report bits at 0.5 and 2 too; 0 turns it off.
        tail: the tail of every projection.

    Raises:
        ValueError: fewer than two contexts, NaN or inf, or activations that do not vary over contexts.
    """
    activations = np.asarray(activations)
    if activations.ndim != 3 or activations.shape[1] < 2:
        raise ValueError(
            f"expected activations (n_items, n_contexts >= 2, d), got shape {activations.shape}; "
            "a covariance over contexts needs at least two of them"
        )
    if not np.isfinite(activations).all():
        bad = int((~np.isfinite(activations).all(axis=2)).sum())
        raise ValueError(f"activations hold NaN or inf in {bad} (item, context) rows; drop them or read in float32")
    if scope not in ("item", "universal"):
        raise ValueError(f"scope is 'item' or 'universal', got {scope!r}")
    n, n_contexts, d = activations.shape
    residuals = activations.astype(np.float64) - origins(activations)[:, None]
    context_means = residuals.mean(axis=0)
    covariance, notes = _shrunk(context_means.T @ context_means, n_contexts - 1, shrink)
    record: dict[str, Any] = {
        "n_items": n,
        "n_contexts": n_contexts,
        "scope": scope,
        "shrink": shrink,
        "between": notes,
    }
    if scope == "item" and n > 1:
        interaction = (residuals - context_means).reshape(-1, d)
        part, record["interaction"] = _shrunk(interaction.T @ interaction, (n - 1) * (n_contexts - 1), shrink)
        covariance += (1.0 - 1.0 / n) * part
    total = float(np.trace(covariance))
    # a constant leaves the rounding of its own mean behind
    if not total > d * (4.0 * np.finfo(np.float64).eps * float(np.abs(activations).max(initial=0.0))) ** 2:
        raise ValueError(
            "activations do not vary over contexts, so there is no natural move; check the contexts and site"
        )
    record["scale"] = math.sqrt(total / d)
    record["effective_rank"] = total**2 / float(np.sum(covariance * covariance))
    return EllipticalPrior(_factor(covariance), tail, "natural", record)


def isotropic(
    reference: EllipticalPrior | np.ndarray,
    c: float = 0.3,
    tail: Tail = Gaussian(),  # noqa: B008 - frozen
) -> EllipticalPrior:
    """Equal moves in all directions, ``sigma = c sqrt(tr Sigma / d)`` of a reference prior or covariance ``(d, d)``."""
    if isinstance(reference, EllipticalPrior):
        d, trace = reference.width, float(np.sum(np.square(reference.factor)))
    else:
        d, trace = len(reference), float(np.trace(reference))
    sigma = c * math.sqrt(trace / d)
    if not (math.isfinite(sigma) and sigma > 0):
        raise ValueError(f"an isotropic prior needs c > 0 and a reference that varies, got c={c} and trace {trace}")
    return EllipticalPrior(sigma * np.eye(d), tail, "isotropic", {"c": c, "sigma": sigma})


def _shrunk(scatter: np.ndarray, df: int, shrink: float) -> tuple[np.ndarray, dict[str, float]]:
    """``scatter / df`` shrunk toward its mean variance times the identity, in place; and what was done."""
    if shrink < 0:
        raise ValueError(f"shrink multiplies the shrinkage intensity and cannot be negative, got {shrink}")
    d = len(scatter)
    scatter /= df
    mean = float(np.trace(scatter)) / d
    square = float(np.sum(scatter * scatter)) / d**2
    # OAS: (tr S^2 + tr^2 S) / ((df + 1) (tr S^2 - tr^2 S / d)), each trace term over d^2; 1 for a multiple of identity
    excess = (df + 1.0) * (square - mean**2 / d)
    oas = 1.0 if excess <= 0 else min(1.0, (square + mean**2) / excess)
    intensity = min(1.0, shrink * oas)
    effective_rank = mean**2 / square if square > 0 else 0.0
    scatter *= 1.0 - intensity
    scatter[np.diag_indices(d)] += intensity * mean
    return scatter, {
        "df": df,
        "oas_intensity": oas,
        "intensity": intensity,
        "effective_rank": effective_rank,
        "variance": mean,
    }


def _factor(covariance: np.ndarray) -> np.ndarray:
    """``V sqrt(lambda)``, largest first, without the null space: coordinates of u are principal components."""
    values, vectors = np.linalg.eigh(covariance)
    keep = values > values[-1] * len(values) * np.finfo(float).eps
    order = np.flatnonzero(keep)[::-1]
    return np.asarray(vectors[:, order] * np.sqrt(values[order]))


def _shortest_scale(tail: Tail, squared: np.ndarray) -> np.ndarray:
    """argmin over z of ``squared / s(z)^2 + z^2``.

    The minimum has z >= 0 (s increases), and setting the derivative to zero gives ``squared = z s^2 / (log s)'``, which
    increases from 0 at z = 0: read backwards from the table, in log(1 + .) since it spans hundreds of decades.
    """
    knots, log_s, slope = scale_table(tail)
    upper = knots >= 0
    with np.errstate(divide="ignore"):
        stationary = np.logaddexp(0.0, np.log(knots[upper]) + 2.0 * log_s[upper] - np.log(slope[upper]))
    return np.asarray(np.interp(np.log1p(squared), stationary, knots[upper]))
