r"""A probe fitted against the worst moves of its own training rows, in the metric of natural thoughts.

Idea (Madry et al. 2018, 1706.06083): replace every training row by the worst of those that a move of length at most r
in u can reach, positives pushed toward low scores and negatives toward high ones, and fit on these. The metric is the
prior's, ``move = L u``: directions that natural thoughts move freely are where an attacker has it cheap, so these are
what the probe unlearns. An attacker of activations who may go anywhere still wins (1802.00420, and for monitors of
activations 2412.09565); what can be bought is distance, in bits.

Base ``logistic`` is exact. For a linear score the worst move within r lowers the margin by ``r ||L^T w||``, so the
robust problem is

    minimize over w, b:  sum_i c_i log(1 + exp(r ||L^T w|| - y_i (w . x_i + b))) + (l2 / 2) ||v||^2,     v = sd * w,

convex, and solved to its minimum (as for support vector machines in Xu, Caramanis and Mannor 2009, 0803.3490; weights
c_i sum to 1, half in each class). At r = 0 it is :mod:`elk_stress.probes.logistic`; as r grows, w turns from the best
separation of rows toward the largest margin per ``||L^T w||``, which is what bits reward. Beyond the radius at which
no direction separates the worst cases the minimum is w = 0, a constant: such a radius is never chosen. (Folds may still
separate where all rows together do not; then the next smaller radius is taken until the score is no constant.)

Any other base is refitted: each round moves every row by ascent in u on the base's own gradient, r in length at most,
and adds the moved copy beside its row. Rows keep their label; the base chooses its own settings anew.

Choice of r, on training rows: for each radius the robust logistic regression is fitted on two thirds of the items and
judged on the rest by the bits that it keeps per positive at false-positive rate ``fpr``
(:mod:`elk_stress.probing.fit.held_out`), on 20,000 of many rows. Other bases use the radius that this linear problem
prefers. The prior was fitted on all training items, held-out ones too: what leaks is a covariance, the same for every
radius.

Shapes: activations ``(*batch, d)`` -> ``(*batch,)``. Units: radii in u, standard deviations of natural thoughts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from elk_stress.core import registry
from elk_stress.probing.fit.folds import stretches
from elk_stress.probing.fit.held_out import held_out, kept_bits
from elk_stress.probing.fit.scaling import standardization
from elk_stress.probing.probe import FittedProbe, Probe, Traits

if TYPE_CHECKING:
    from elk_stress.threats.priors import EllipticalPrior

__all__ = ["AdversariallyTrained"]

# steps of the ascent within the ball, each 2 r / steps long: enough to cross it
_STEPS = 8
# rows that the radius is chosen on, at most, in so many stretches of consecutive ones
_MOST_ROWS, _STRETCHES = 20_000, 200
# standard deviation of the log-odds under natural thoughts below which the probe is a constant; 1e-6 smooths the corner
_LEAST = 1e-4


@dataclass(frozen=True)
class AdversariallyTrained:
    """Fitted on training rows moved the worst way that natural thoughts allow within a radius.

    Attributes:
        base: ``logistic`` (exact and convex), or the registered name of a differentiable probe that is refitted.
        radius: r in standard deviations of natural thoughts; ``None``: chosen on training rows among ``radii``.
        radii: to choose from.
        rounds: refits of a base that is not ``logistic``.
        fpr: false-positive rate at which held-out bits are counted.
        folds: of the choice.
        l2: penalty of the robust logistic regression.
    """

    base: str = "logistic"
    radius: float | None = None
    radii: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0)
    rounds: int = 2
    fpr: float = 0.05
    folds: int = 3
    l2: float = 0.01

    name: ClassVar[str] = "adversarially_trained"

    def __post_init__(self) -> None:
        # JSON gives a list back
        object.__setattr__(self, "radii", tuple(float(radius) for radius in self.radii))
        tried = self.radii if self.radius is None else (self.radius,)
        if not tried or min(tried) < 0 or self.rounds < 1 or not self.l2 > 0 or not 0 < self.fpr < 1:
            raise ValueError(
                f"adversarially_trained needs radii of at least 0, a round, l2 above 0 and an fpr in (0, 1), got {self}"
            )

    @property
    def traits(self) -> Traits:
        """Those of the base, and the need of a prior."""
        return Traits(linear=self._base.traits.linear, needs_prior=True)

    def fit(
        self,
        activations: np.ndarray,
        labels: np.ndarray,
        *,
        pairs: np.ndarray | None = None,
        seed: int = 0,
        prior: EllipticalPrior | None = None,
    ) -> FittedProbe:
        """Fit on ``activations (n, d)``, ``labels (n,)`` against moves of ``prior``; ``seed`` is for the base.

        Notes: the ``radius`` and, where it was chosen, the ``held_out_bits`` of every radius tried, the radius
        ``preferred`` by these (larger than ``radius`` where that gave a constant) and whether it is the largest of
        ``radii`` (``edge_of_grid``: a larger one may be better).

        Raises:
            ValueError: no prior or one of another width; a base that needs more than activations and labels; no radius
                to choose from gives more than a constant.
        """
        rows, targets = np.asarray(activations, dtype=float), np.asarray(labels).astype(int)
        if prior is None or prior.width != rows.shape[1]:
            got = "none" if prior is None else f"one of width {prior.width}"
            raise ValueError(f"adversarially_trained needs the prior of moves of {rows.shape[1]} features, got {got}")
        base = self._base.traits
        if base.needs_pairs or base.needs_prior or base.needs_behaviour or base.tokens or not base.differentiable:
            raise ValueError(
                f"adversarially_trained: the base {self.base!r} must be differentiable and need activations and labels "
                "only; choose 'logistic', 'lda' or 'mlp'"
            )
        factor = np.asarray(prior.factor, dtype=float)
        notes: dict[str, Any] = {}
        radius = self.radius
        if radius is None:
            some = _some_stretches(len(rows))
            found = {r: self._held_out_bits(rows[some], targets[some], factor, r) for r in self.radii}
            notes["held_out_bits"] = {f"{r:g}": value for r, value in found.items()}
            preferred = max(found, key=lambda r: found[r])
            notes |= {"preferred": preferred, "edge_of_grid": preferred == max(self.radii)}
            radius = self._largest_that_learns(rows, targets, factor, preferred)
        notes["radius"] = radius
        if self.base == "logistic":
            weight, bias, converged = robust_logistic(rows, targets, factor, radius, self.l2)
            parameters = {"weight": weight, "bias": np.asarray(bias)}
            return FittedProbe(self, parameters, notes={**notes, "converged": converged})
        fitted = self._base.fit(rows, targets, seed=seed)
        copies = [rows]
        for _ in range(self.rounds if radius > 0 else 0):
            copies.append(worst_rows(fitted, rows, targets, factor, radius))
            # a row and its moved copies stand together, as the rows of one item must
            every = np.stack(copies, axis=1).reshape(-1, rows.shape[1])
            fitted = self._base.fit(every, np.repeat(targets, len(copies)), seed=seed)
        return replace(fitted, probe=self, notes={**fitted.notes, **notes})

    def score(self, xp: Any, parameters: Mapping[str, Any], activations: Any) -> Any:
        """The base's score."""
        return self._base.score(xp, parameters, activations)

    @property
    def _base(self) -> Probe:
        found: Probe = registry.load("probes", self.base)
        return found

    def _largest_that_learns(self, rows: np.ndarray, targets: np.ndarray, factor: np.ndarray, most: float) -> float:
        for radius in sorted((r for r in set(self.radii) if r <= most), reverse=True):
            weight, _, _ = robust_logistic(rows, targets, factor, radius, self.l2)
            # at 0 it is logistic regression, which may find nothing
            if radius == 0 or np.linalg.norm(factor.T @ weight) > _LEAST:
                return radius
        raise ValueError(
            f"adversarially_trained: at every radius of {self.radii} up to {most:g} the worst cases cannot be "
            "separated and the score is a constant; add smaller radii, such as 0"
        )

    def _held_out_bits(self, rows: np.ndarray, targets: np.ndarray, factor: np.ndarray, radius: float) -> float:
        found = []
        for learned, judged in held_out(targets, self.folds):
            weight, bias, _ = robust_logistic(rows[learned], targets[learned], factor, radius, self.l2)
            deviation = float(np.linalg.norm(factor.T @ weight))
            found.append(kept_bits(rows[judged] @ weight + bias, targets[judged], deviation, self.fpr))
        return float(np.mean(found))


def _some_stretches(rows: int) -> np.ndarray:
    """``(rows,)`` bool: all of few rows; of many every m-th stretch of consecutive ones, most items whole."""
    every = -(-rows // _MOST_ROWS)
    return stretches(rows, _STRETCHES) % every == 0 if every > 1 else np.ones(rows, dtype=bool)


def robust_logistic(
    rows: np.ndarray, targets: np.ndarray, factor: np.ndarray, radius: float, l2: float
) -> tuple[np.ndarray, float, bool]:
    """Weight ``(d,)``, bias and whether L-BFGS converged, of the convex problem above; see the module."""
    from scipy.optimize import minimize
    from scipy.special import expit

    mean, spread = standardization(rows)
    z, moves = (rows - mean) / spread, factor / spread[:, None]
    # in the coordinates of z: ||L^T w|| = sqrt(v' C v)
    covariance = moves @ moves.T
    sign = np.where(targets == 1, 1.0, -1.0)
    share = np.where(targets == 1, 0.5 / max(1, (targets == 1).sum()), 0.5 / max(1, (targets == 0).sum()))

    def objective(at: np.ndarray) -> tuple[float, np.ndarray]:
        v, b = at[:-1], at[-1]
        turned = covariance @ v
        # smooth at v = 0, where the norm has a corner
        length = np.sqrt(v @ turned + 1e-12)
        lost = radius * length - sign * (z @ v + b)
        pull = share * expit(lost)
        slope = pull.sum() * radius * turned / length - z.T @ (pull * sign) + l2 * v
        value = float(share @ np.logaddexp(0.0, lost) + 0.5 * l2 * v @ v)
        return value, np.append(slope, -(pull @ sign))

    found = minimize(
        objective,
        np.zeros(rows.shape[1] + 1),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 1000, "gtol": 1e-7, "ftol": 1e-13, "maxfun": 3000},
    )
    v = found.x[:-1]
    # smoothing leaves a sliver of a direction where the minimum is at 0
    v = v if radius == 0 or np.sqrt(v @ covariance @ v) > _LEAST else np.zeros_like(v)
    weight = v / spread
    return weight, float(found.x[-1] - weight @ mean), bool(found.success)


def worst_rows(
    fitted: FittedProbe, rows: np.ndarray, targets: np.ndarray, factor: np.ndarray, radius: float
) -> np.ndarray:
    """``rows (n, d)`` moved within ``radius`` in u so that positives score lower and negatives higher, by ascent."""
    import jax
    import jax.numpy as jnp

    moves = jnp.asarray(factor.T, dtype=jnp.float32)
    x = jnp.asarray(rows, dtype=jnp.float32)
    toward = jnp.asarray(1.0 - 2.0 * targets, dtype=jnp.float32)

    def gain(u: Any) -> Any:
        return (toward * fitted.score(x + u @ moves)).sum()

    @jax.jit
    def ascend() -> Any:
        def step(_: Any, u: Any) -> Any:
            slope = jax.grad(gain)(u)
            size = jnp.linalg.norm(slope, axis=-1, keepdims=True)
            u = u + 2 * radius / _STEPS * slope / jnp.maximum(size, 1e-20)
            length = jnp.linalg.norm(u, axis=-1, keepdims=True)
            return u * jnp.minimum(1.0, radius / jnp.maximum(length, 1e-20))

        return jax.lax.fori_loop(0, _STEPS, step, jnp.zeros((x.shape[0], moves.shape[0]), dtype=jnp.float32))

    return np.asarray(rows + np.asarray(ascend(), dtype=float) @ factor.T)
