r"""A density with fitted elliptical tails on the negatives; the score is -log p: a detector that never saw a positive.

Activations have heavier tails than a Gaussian; a few far rows then swell its covariance. Here the negatives are a scale
mixture, ``x = m + s L v`` with ``v ~ N(0, I_d)``, ``L L^T = C`` and the random scale s of
:mod:`elk_stress.threats.tails`: with s = 2K sqrt(3)/pi every projection is exactly logistic (Andrews & Mallows 1974),
with ``sqrt((nu-2)/chi2_nu)`` a Student-t. Both have ``E s^2 = 1``, so C is the covariance.

Equations, with ``q = (x - m)^T C^-1 (x - m)`` and the scale's distribution on a fine grid of s_j with weights p_j,

    score(x) = -log p(x) + const = -log sum_j p_j exp(-d log s_j - q / (2 s_j^2))

    w(q) = E[1/s^2 | q],   m = sum w_i x_i / sum w_i,   C = sum w_i (x_i - m)(x_i - m)^T / n,

the last line being the fixed point of maximum likelihood (EM; Lange, Little & Taylor 1989, "Robust statistical modeling
using the t distribution"): rows far out weigh little. C's correlations are shrunk at each step with the
oracle-approximating share of ``mahalanobis``, or it would not exist for n <= d (as in Ollila & Tyler 1405.2528).

The tail is chosen on distances of negatives *held out* of m and C (stretches of consecutive rows, so that all but a few
items stand on one side), up to a common factor, since in d dimensions the rows that a scatter was fitted to are
nearer to it than new ones: degrees of freedom nu by maximum likelihood, then logistic or Student-t, whichever is
likelier. Notes: ``tail``, ``nu``, and the gain in ``held_out_nats`` per row over a Gaussian of the same scatter.

What it is not. An elliptical density is a decreasing function of q. So with the *same* m and C it ranks exactly as
``mahalanobis`` does, catches the same items and is broken by the same moves, whatever its tails; tails change the units
of the score (nats). The one thing that makes it another detector is the robust scatter. Where the negatives are nearly
Gaussian the two agree.

Shapes: activations ``(*batch, d)`` -> ``(*batch,)`` in nats, up to a constant. The slope is finite everywhere and zero
at m.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from elk_stress.probing.fit.density import negatives_of, shrunk, spectrum
from elk_stress.probing.fit.folds import stretches
from elk_stress.probing.fit.moments import Moments
from elk_stress.probing.probe import FittedProbe, Traits
from elk_stress.threats.tails import Logistic, StudentT, Tail, scale_table

__all__ = ["LogisticTails"]

_NU_RANGE = (2.1, 200.0)
# the grid of scales covers all but 1e-12 of their probability, and on to these logarithms: attackers move rows far out,
# and beyond its grid a mixture has Gaussian tails
_BULK_Z, _EDGE_Z, _LOG_SCALES = 7.0, 37.0, (-math.log(10.0), math.log(30.0))
# the logarithm of no weight at all, with a float32 and a gradient
_NOTHING = -1e30
_STRETCHES = 10
# held-out distances from which the tail is chosen: enough to know nu to a few per cent
_MOST_DISTANCES = 10_000


@dataclass(frozen=True)
class LogisticTails:
    """Elliptical density with logistic or Student-t tails and a robust scatter; learns from negatives alone.

    Attributes:
        tail: ``fitted`` chooses by likelihood; or ``logistic``, ``student_t`` (with fitted degrees of freedom).
        iterations: of maximum likelihood for mean and scatter; a dozen bring them within sampling error.
    """

    tail: Literal["fitted", "logistic", "student_t"] = "fitted"
    iterations: int = 12

    name: ClassVar[str] = "logistic_tails"
    traits: ClassVar[Traits] = Traits(negatives_only=True)

    def __post_init__(self) -> None:
        if self.tail not in ("fitted", "logistic", "student_t") or self.iterations < 1:
            raise ValueError(
                f"logistic_tails: tail is 'fitted', 'logistic' or 'student_t' and iterations at least 1, got {self}"
            )

    def fit(
        self, activations: np.ndarray, labels: np.ndarray, *, pairs: np.ndarray | None = None, seed: int = 0
    ) -> FittedProbe:
        """Fit on the negatives among ``activations (n, d)``; deterministic, ``seed`` is not used.

        Raises:
            ValueError: fewer than two different negatives.
        """
        rows = negatives_of(activations, labels, self.name)
        dim = rows.shape[1]
        tail, gain = self._chosen(_held_out_distances(rows), dim)
        centre, whitener, share = _robust(rows, tail, self.iterations)
        log_scales, log_shares = _grid(tail, dim)
        # one shape whatever tail was found: scales that nothing has. The longest grid is one of the extremes'
        unused = max(len(_grid(StudentT(nu), dim)[0]) for nu in _NU_RANGE) - len(log_scales)
        parameters = {
            "centre": centre,
            "whitener": whitener,
            "precisions": np.pad(np.exp(-2.0 * log_scales), (0, unused), mode="edge"),
            "log_weights": np.pad(log_shares - dim * log_scales, (0, unused), constant_values=_NOTHING),
        }
        notes = {
            "tail": tail.name,
            "nu": tail.nu if isinstance(tail, StudentT) else None,
            "held_out_nats": gain,
            "shrinkage": share,
            "n_negatives": len(rows),
        }
        return FittedProbe(self, parameters, notes=notes, dim=dim)

    def score(self, xp: Any, parameters: Mapping[str, Any], activations: Any) -> Any:
        """-log density up to a constant, in nats."""
        white = xp.matmul(activations - parameters["centre"], parameters["whitener"])
        squared = xp.sum(white * white, axis=-1)
        exponents = parameters["log_weights"] - 0.5 * squared[..., None] * parameters["precisions"]
        largest = xp.max(exponents, axis=-1)
        return -largest - xp.log(xp.sum(xp.exp(exponents - largest[..., None]), axis=-1))

    def _chosen(self, squared: np.ndarray, dim: int) -> tuple[Tail, float]:
        """The likeliest allowed tail of held-out squared distances, and its gain over a Gaussian in nats per row."""
        squared = squared[np.linspace(0, len(squared) - 1, min(len(squared), _MOST_DISTANCES)).astype(int)]
        # a new row lies farther out than those that were fitted: let a common factor absorb that
        squared = squared * (dim / squared.mean())
        found: list[tuple[float, Tail]] = []
        if self.tail != "logistic":
            found.append(_likeliest_student(squared, dim))
        if self.tail != "student_t":
            found.append(_likeliest_factor(lambda q: _log_density(Logistic(), q, dim), squared, dim, Logistic()))
        best, tail = max(found, key=lambda pair: pair[0])
        gaussian = _likeliest_factor(lambda q: -0.5 * q, squared, dim, tail)[0]
        return tail, best - gaussian


def _likeliest_factor(log_density: Any, squared: np.ndarray, dim: int, tail: Tail) -> tuple[float, Tail]:
    """The greatest mean log density over a common factor on all distances."""
    from scipy.optimize import minimize_scalar

    def loss(log_factor: float) -> float:
        return 0.5 * dim * log_factor - float(np.mean(log_density(squared * math.exp(-log_factor))))

    result = minimize_scalar(loss, bounds=(-1.5, 1.5), method="bounded", options={"xatol": 1e-4})
    return -float(result.fun), tail


def _likeliest_student(squared: np.ndarray, dim: int) -> tuple[float, Tail]:
    """Degrees of freedom by maximum likelihood, over 1/nu, together with the common factor."""
    from scipy.optimize import minimize_scalar

    def of(inverse: float) -> float:
        return _likeliest_factor(lambda q: _log_student(1.0 / inverse, q, dim), squared, dim, Logistic())[0]

    low, high = 1.0 / _NU_RANGE[1], 1.0 / _NU_RANGE[0]
    result = minimize_scalar(lambda inverse: -of(inverse), bounds=(low, high), method="bounded")
    # two decimals are more than the data tell
    tail = StudentT(round(1.0 / float(result.x), 2))
    return of(1.0 / tail.nu), tail


def _log_student(nu: float, squared: np.ndarray, dim: int) -> np.ndarray:
    """Log density of a d-dimensional t of unit covariance at ``q = ||x||^2``, without ``-d/2 log(2 pi)``."""
    from scipy.special import gammaln

    constant = gammaln((nu + dim) / 2) - gammaln(nu / 2) - dim / 2 * math.log((nu - 2) / 2)
    return np.asarray(constant - (nu + dim) / 2 * np.log1p(squared / (nu - 2)))


def _grid(tail: Tail, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Log scales ``(m,)``, evenly spaced, and their log probabilities, which sum to 1.

    Given a row, log s is known to about ``1 / sqrt(2 d)``; three points to that width make the sum over the grid as
    good as the integral.
    """
    knots, log_scale, _ = scale_table(tail)
    least, low, high, most = (float(np.interp(z, knots, log_scale)) for z in (-_EDGE_Z, -_BULK_Z, _BULK_Z, _EDGE_Z))
    spacing = min(1.0 / (3.0 * math.sqrt(2.0 * dim)), (high - low) / 48)
    low = min(low, max(least, _LOG_SCALES[0]))
    high = max(high, min(most, _LOG_SCALES[1]))
    points = np.linspace(low, high, math.ceil((high - low) / spacing) + 1)
    z = np.interp(points, log_scale, knots)
    log_shares = -0.5 * z**2 - np.log(np.interp(z, knots, np.gradient(log_scale, knots)))
    return points, log_shares - np.logaddexp.reduce(log_shares)


def _exponents(tail: Tail, squared: np.ndarray, dim: int) -> tuple[np.ndarray, np.ndarray]:
    log_scales, log_shares = _grid(tail, dim)
    precisions = np.exp(-2.0 * log_scales)
    return log_shares - dim * log_scales - 0.5 * squared[:, None] * precisions, precisions


def _log_density(tail: Tail, squared: np.ndarray, dim: int) -> np.ndarray:
    """Log density of the scale mixture at ``q = ||x||^2``, without ``-d/2 log(2 pi)``."""
    return np.asarray(np.logaddexp.reduce(_exponents(tail, squared, dim)[0], axis=1))


def _weights(tail: Tail, squared: np.ndarray, dim: int) -> np.ndarray:
    """``E[1/s^2 | q]``; for Student-t ``(nu + d) / (nu - 2 + q)``."""
    if isinstance(tail, StudentT):
        return np.asarray((tail.nu + dim) / (tail.nu - 2 + squared))
    exponents, precisions = _exponents(tail, squared, dim)
    chances = np.exp(exponents - exponents.max(axis=1, keepdims=True))
    return np.asarray(chances @ precisions / chances.sum(axis=1))


def _robust(rows: np.ndarray, tail: Tail, iterations: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Mean ``(d,)``, an inverse root of the scatter ``(d, d)`` and the share of the identity in its correlations."""
    moments = Moments.of(rows, "scatter")
    for step in range(iterations + 1):
        whitener, share = _whitener(moments)
        if step == iterations:
            break
        white = (rows - moments.mean) @ whitener
        weights = _weights(tail, np.einsum("ij,ij->i", white, white), rows.shape[1])
        mean = weights @ rows / weights.sum()
        spread = (rows - mean) * np.sqrt(weights)[:, None]
        moments = Moments(len(rows), mean, spread.T @ spread)
    return moments.mean, whitener, share


def _whitener(moments: Moments) -> tuple[np.ndarray, float]:
    """``(d, d)`` W with ``W W^T = C^-1``, and the share of the identity in the correlations."""
    spread, correlation, share = shrunk(moments.mean, moments.covariance, moments.count)
    sizes, axes = spectrum(correlation)
    return (axes / np.sqrt(sizes)) @ axes.T / spread[:, None], share


def _held_out_distances(rows: np.ndarray) -> np.ndarray:
    """Squared distances ``(n,)`` of each stretch's rows from a Gaussian fitted to the stretches of the other half."""
    stretch = stretches(len(rows), _STRETCHES)
    out = np.zeros(len(rows))
    for half in (0, 1):
        own = stretch % 2 == half
        if len(np.unique(rows[~own], axis=0)) < 2:
            own = np.ones(len(rows), dtype=bool)
        fitted_to = rows if own.all() else rows[~own]
        moments = Moments.of(fitted_to, "scatter")
        white = (rows[own] - moments.mean) @ _whitener(moments)[0]
        out[own] = np.einsum("ij,ij->i", white, white)
    return out
