r"""Which tail do natural moves have? Fitted by likelihood, for random, principal and the probe's own directions.

Bits depend on tails: at 7 standard deviations a Gaussian says 40 bits and a Student-t with 5 degrees of freedom 13. So
the tail is measured. For each direction w the residuals ``y_ic = w . (x_ic - origin_i)`` are divided by their own
pooled standard deviation; then one shape per group of directions is fitted: Gaussian, logistic, Student-t with nu free
in [2.1, 100].

With C contexts an item's origin is estimated from the same C values, which pulls residuals toward the Gaussian: for
independent draws ``eta_c`` of standard deviation sigma, ``y_c = (1 - 1/C) eta_c - (1/C) sum of the C-1 others``. The
density fitted is the one of that sum, with the others replaced by a Gaussian of their variance ``sigma^2 (C-1)/C^2``
(Gauss-Hermite quadrature); skewness and kurtosis are divided by the exact factors of the same sum.

Limits: values of one item or one context are dependent, so this is a composite likelihood: it names the best shape, and
its AIC differences overstate the evidence. ``clustered_z`` does not: it compares winner and runner-up by context.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from scipy import optimize

from elk_stress.threats.tails import Gaussian, Logistic, StudentT, Tail

__all__ = ["GroupFit", "TailFit", "fit_tails"]

_NU_RANGE = (2.1, 100.0)
# residual rows (items x contexts) used per direction: enough to tell the shapes apart, and a fraction of a second
_MAX_ROWS = 4096
_MAX_DIRECTIONS = 64
_GRID = np.linspace(0.0, 1.0, 2048) ** 2  # denser near 0, where the data are


class Deviations(Protocol):
    """A prior, as far as fits of tails look at it."""

    def standard_deviation(self, weight: np.ndarray) -> np.ndarray:
        """Of the projection on each ``weight (..., d)``."""


@dataclass(frozen=True)
class GroupFit:
    """The tail of one group of directions.

    Attributes:
        winner: the tail with the lowest AIC.
        nu: fitted degrees of freedom of the Student-t, whether or not it won.
        log_likelihood, aic: by family (``gaussian``, ``logistic``, ``student_t``), composite over all values.
        clustered_z: winner against runner-up: mean difference in log-likelihood per context over its standard error;
            below about 2 the contexts do not settle it.
        skewness: mean absolute skewness over directions, corrected for the estimated origin.
        excess_kurtosis: mean over directions, corrected likewise.
        bimodality: mean of ``(skewness^2 + 1)/kurtosis``; above 5/9 (a uniform's) suggests two modes.
        scale_ratio: root-mean-square ratio of the observed standard deviation to the prior's.
        n_directions, n_rows: sizes used.
    """

    winner: Tail
    nu: float
    log_likelihood: Mapping[str, float]
    aic: Mapping[str, float]
    clustered_z: float
    skewness: float
    excess_kurtosis: float
    bimodality: float
    scale_ratio: float
    n_directions: int
    n_rows: int


@dataclass(frozen=True)
class TailFit:
    """Fits by group of directions, and the heavy tail that fits best over all groups with equal weight."""

    groups: Mapping[str, GroupFit]
    best_elliptical: Tail

    @property
    def winners(self) -> dict[str, str]:
        """Group -> name of the winning tail."""
        return {name: fit.winner.name for name, fit in self.groups.items()}

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary for ``result.json``; an undefined number becomes ``None``."""
        groups: dict[str, Any] = {}
        for name, fit in self.groups.items():
            record = {key: value for key, value in vars(fit).items() if key != "winner"}
            record = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
            record["log_likelihood"], record["aic"] = dict(fit.log_likelihood), dict(fit.aic)
            groups[name] = {"winner": fit.winner.name, **record}
        return {"groups": groups, "best_elliptical": self.best_elliptical.name}


def fit_tails(activations: np.ndarray, prior: Deviations | None, directions: Mapping[str, np.ndarray]) -> TailFit:
    """Fit the tail of context residuals along each group of directions.

    Args:
        activations: ``(n_items, n_contexts, d)``; at least three contexts.
        prior: gives the standard deviations that ``scale_ratio`` compares with.
        directions: name -> ``(m, d)`` or ``(d,)``, e.g. ``{"random": ..., "principal": ..., "probe": ...}``.

    Raises:
        ValueError: too few contexts, a wrong width, or a group in which nothing varies.
    """
    if activations.ndim != 3 or activations.shape[1] < 3:
        raise ValueError(
            f"expected activations (n_items, n_contexts >= 3, d), got shape {activations.shape}; "
            "the shape of a tail cannot be read from two contexts"
        )
    if not directions:
        raise ValueError("no directions to fit tails along; pass e.g. {'probe': weight}")
    n, n_contexts, d = activations.shape
    rows = activations[:: max(1, math.ceil(n * n_contexts / _MAX_ROWS))]
    values, ratios = {}, {}
    for name, group in directions.items():
        group = np.atleast_2d(np.asarray(group, dtype=float))[:_MAX_DIRECTIONS]
        if group.shape[1] != d:
            raise ValueError(f"directions {name!r} have width {group.shape[1]}, activations {d}")
        values[name], ratios[name] = _standardized(rows, group, prior, name)
    fits = {name: _fit_group(y, ratios[name], n_contexts) for name, y in values.items()}
    return TailFit(fits, _best_heavy(list(values.values()), n_contexts))


def _standardized(
    activations: np.ndarray, group: np.ndarray, prior: Deviations | None, name: str
) -> tuple[np.ndarray, float]:
    """Residuals ``(n, C, m)`` with population variance 1, and their scale against the prior's."""
    n, n_contexts, _ = activations.shape
    y = activations.astype(np.float64) @ group.T
    size = np.abs(y).max(axis=(0, 1))
    y -= y.mean(axis=1, keepdims=True)
    deviation = np.sqrt(np.sum(y * y, axis=(0, 1)) / (n * (n_contexts - 1)))
    varies = deviation > 1e-9 * size
    if not varies.any():
        raise ValueError(f"activations do not vary over contexts along any direction of the group {name!r}")
    ratio = math.nan
    if prior is not None:
        ratio = float(np.sqrt(np.mean((deviation / prior.standard_deviation(group))[varies] ** 2)))
    return y[..., varies] / deviation[varies], ratio


def _fit_group(y: np.ndarray, ratio: float, n_contexts: int) -> GroupFit:
    weights = np.ones(y.size)
    flat = np.abs(y).ravel()
    found: dict[str, tuple[Tail, float]] = {
        "gaussian": _fit_scale(Gaussian(), flat, weights, n_contexts),
        "logistic": _fit_scale(Logistic(), flat, weights, n_contexts),
        "student_t": _fit_student(flat, weights, n_contexts),
    }
    pointwise = {
        name: _log_density(tail, log_scale, np.abs(y), n_contexts) for name, (tail, log_scale) in found.items()
    }
    log_likelihood = {name: float(p.sum()) for name, p in pointwise.items()}
    aic = {name: 2.0 * (2 if name == "student_t" else 1) - 2.0 * ll for name, ll in log_likelihood.items()}
    first, second, _ = sorted(aic, key=aic.__getitem__)
    by_context = (pointwise[first] - pointwise[second]).sum(axis=(0, 2))
    error = by_context.std(ddof=1) * math.sqrt(n_contexts)
    skewness, excess = _moments(y, n_contexts)
    student = found["student_t"][0]
    assert isinstance(student, StudentT)
    return GroupFit(
        winner=found[first][0],
        nu=student.nu,
        log_likelihood=log_likelihood,
        aic=aic,
        clustered_z=float(by_context.sum() / error) if error > 0 else 0.0,
        skewness=float(np.mean(np.abs(skewness))),
        excess_kurtosis=float(np.mean(excess)),
        # kurtosis >= skewness^2 + 1 for every distribution; the corrected sample moments may cross it
        bimodality=float(np.mean(np.minimum(1.0, (skewness**2 + 1.0) / np.maximum(excess + 3.0, 1.0)))),
        scale_ratio=ratio,
        n_directions=y.shape[2],
        n_rows=y.shape[0] * y.shape[1],
    )


def _best_heavy(values: list[np.ndarray], n_contexts: int) -> Tail:
    """Logistic or Student-t, by the mean log-likelihood per value, groups weighted equally."""
    flat = np.concatenate([np.abs(y).ravel() for y in values])
    weights = np.concatenate([np.full(y.size, 1.0 / y.size) for y in values])
    candidates = (_fit_scale(Logistic(), flat, weights, n_contexts), _fit_student(flat, weights, n_contexts))
    return max(candidates, key=lambda c: float(weights @ _log_density(c[0], c[1], flat, n_contexts)))[0]


def _fit_scale(tail: Tail, y: np.ndarray, weights: np.ndarray, n_contexts: int) -> tuple[Tail, float]:
    """Maximum-likelihood log scale near 0 (values come standardized)."""
    result = optimize.minimize_scalar(
        lambda log_scale: -float(weights @ _log_density(tail, log_scale, y, n_contexts)),
        bounds=(-1.0, 1.0),
        method="bounded",
        options={"xatol": 1e-4},
    )
    return tail, float(result.x)


def _fit_student(y: np.ndarray, weights: np.ndarray, n_contexts: int) -> tuple[Tail, float]:
    """Maximum likelihood over 1/nu (nearly quadratic there) and the log scale."""
    low, high = 1.0 / _NU_RANGE[1], 1.0 / _NU_RANGE[0]

    def loss(parameters: np.ndarray) -> float:
        return -float(weights @ _log_density(StudentT(1.0 / parameters[0]), parameters[1], y, n_contexts))

    simplex = np.array([[0.05, 0.0], [0.25, 0.0], [0.15, 0.1]])
    result = optimize.minimize(
        loss,
        simplex[0],
        method="Nelder-Mead",
        bounds=[(low, high), (-1.0, 1.0)],
        options={"initial_simplex": simplex, "xatol": 1e-4, "fatol": 1e-6 * float(weights.sum()), "maxfev": 200},
    )
    # two decimals are more than the data tell, and equal fits share one scale table
    return StudentT(round(1.0 / float(result.x[0]), 2)), float(result.x[1])


def _log_density(tail: Tail, log_scale: float, size: np.ndarray, n_contexts: int) -> np.ndarray:
    """Log density of a residual from the mean of C draws, at ``|y|``; tabulated on a grid and interpolated."""
    nodes, node_weights = np.polynomial.hermite_e.hermegauss(9)
    own, others = 1.0 - 1.0 / n_contexts, math.sqrt(n_contexts - 1.0) / n_contexts
    scale = math.exp(log_scale)
    grid = _GRID * max(1.0, float(size.max(initial=0.0)))
    inside = (grid[:, None] / scale - others * nodes) / own
    density = np.exp(tail.log_density(inside)) @ (node_weights / node_weights.sum())
    # a Gaussian underflows beyond 38 standard deviations; the floor keeps its likelihood finite and hopeless
    log_density = np.log(np.maximum(density, 1e-300)) - math.log(own) - log_scale
    return np.asarray(np.interp(size, grid, log_density))


def _moments(y: np.ndarray, n_contexts: int) -> tuple[np.ndarray, np.ndarray]:
    """Skewness and excess kurtosis of the draws behind residuals ``(n, C, m)`` of unit population variance."""
    c = float(n_contexts)
    own, other = (c - 1.0) / c, 1.0 / c
    third = own**3 - (c - 1.0) * other**3
    fourth = own**4 + (c - 1.0) * other**4
    skewness = np.mean(y**3, axis=(0, 1)) / third
    excess = (np.mean(y**4, axis=(0, 1)) - 3.0 * own**2) / fourth
    return skewness, excess
