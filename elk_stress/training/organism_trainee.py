r"""Organisms as trainees, and the prior over their weights.

Prior: ``theta ~ N(theta_0, diag(sigma^2))`` with ``sigma_t = s rms(theta_0,t)`` for every tensor t, and s the largest
for which the median over draws of the mean behaviour shift is ``epsilon / 3``: changes of the weights that nobody
aimed, as large as behaviour just fails to notice. The calibration curve (median shift against s) is kept.

Behaviour inputs are fresh examples of what the model was trained on; probe items come from the organism's splits.

Shapes: weights flat ``(strengths, models, n_parameters)`` float32. Units: nats for shift.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from elk_stress.probing.probe import Traits
from elk_stress.testbeds.defence_knowledge import knowledge_of
from elk_stress.testbeds.organism import Inputs, Organism
from elk_stress.testbeds.protocol import Items, SplitName
from elk_stress.training.protocols import Subject

__all__ = ["DEFAULT_EPSILON", "Calibration", "OrganismTrainee", "calibrate"]

DEFAULT_EPSILON = 0.03
"""Behaviour is kept when the mean KL to the original output is at most this (nats)."""

_LEAST, _MOST, _GRID = 1e-4, 3.0, 19
_BEHAVIOUR_INPUTS = 512


@dataclass(frozen=True)
class Calibration:
    """How the prior's scale was found.

    Attributes:
        scale: ``(models,)`` s.
        scales: ``(grid,)`` scales tried for all models.
        shifts: ``(grid, models)`` median shift in nats over ``n_draws`` draws.
        target: epsilon / 3.
    """

    scale: np.ndarray
    scales: np.ndarray
    shifts: np.ndarray
    target: float
    n_draws: int

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "scale": self.scale.tolist(),
            "scales": self.scales.tolist(),
            "median_shift": self.shifts.tolist(),
            "target": self.target,
            "n_draws": self.n_draws,
        }


def calibrate(
    median_shift: Callable[[np.ndarray], np.ndarray], n_models: int, epsilon: float, n_draws: int
) -> Calibration:
    """The largest scale whose median shift is ``epsilon / 3``, per model, on one fixed set of draws.

    Args:
        median_shift: scales ``(models,)`` -> median shifts ``(models,)``; the same draws for every scale.
        n_models: models.
        epsilon: nats.
        n_draws: recorded.

    Raises:
        ValueError: even the smallest scale shifts behaviour too much, or the largest not enough.
    """
    target = epsilon / 3
    scales = np.geomspace(_LEAST, _MOST, _GRID)
    shifts = np.stack([median_shift(np.full(n_models, s)) for s in scales])
    with np.errstate(invalid="ignore"):
        below = shifts <= target
    if not below[0].all() or below[-1].any():
        raise ValueError(
            f"no scale between {_LEAST:g} and {_MOST:g} of the weights' own size shifts behaviour by {target:g} nats "
            f"(it shifts by {shifts[0].max():.2g} to {np.nanmin(shifts[-1]):.2g}); choose another epsilon"
        )
    # the largest crossing: behind it every scale of the grid shifts too much
    first = _GRID - 1 - np.argmax(below[::-1], axis=0)
    low, high = scales[first], scales[first + 1]
    for _ in range(14):
        middle = np.sqrt(low * high)
        fine = median_shift(middle) <= target
        low, high = np.where(fine, middle, low), np.where(fine, high, middle)
    return Calibration(low, scales, shifts, target, n_draws)


@dataclass(frozen=True)
class OrganismTrainee:
    """An organism whose weights may be moved.

    Attributes:
        organism: prepared on first use.
        epsilon: nats.
        n_draws: draws of the prior that calibrate its scale.
        scale_factor: multiplies the calibrated scale (for bits against the prior's scale).
        seed: of noise and behaviour inputs.
    """

    organism: Organism
    epsilon: float = DEFAULT_EPSILON
    n_draws: int = 33
    scale_factor: float = 1.0
    seed: int = 0
    _compiled: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    subject: Subject = "organism"

    def __post_init__(self) -> None:
        if not self.epsilon > 0:
            raise ValueError(f"epsilon is a positive number of nats, got {self.epsilon}")
        self.organism.prepare()

    @property
    def name(self) -> str:
        """The organism's name."""
        return self.organism.name

    @property
    def site(self) -> str:
        """Where activations are read."""
        return self.organism.site

    @property
    def n_models(self) -> int:
        """Models trained from different seeds."""
        return self.organism.n_models

    @property
    def n_parameters(self) -> int:
        """Weights of one model."""
        return int(self.original.shape[1])

    @property
    def splits(self) -> Mapping[SplitName, Items]:
        """The organism's probe items."""
        return self.organism.splits

    @cached_property
    def original(self) -> np.ndarray:
        """``(models, n_parameters)``."""
        import jax
        from jax.flatten_util import ravel_pytree

        return np.asarray(jax.vmap(lambda tree: ravel_pytree(tree)[0])(self.organism.weights), dtype=np.float32)

    @cached_property
    def unravel(self) -> Callable[[Any], Any]:
        """Flat weights of one model -> its pytree."""
        from jax.flatten_util import ravel_pytree

        unravel: Callable[[Any], Any] = ravel_pytree(self.organism.one_model(0))[1]
        return unravel

    @cached_property
    def unit_sigma(self) -> np.ndarray:
        """``(models, n_parameters)``: root mean square of the tensor that each weight belongs to."""
        import jax
        from jax.flatten_util import ravel_pytree

        def one(tree: Any) -> Any:
            sizes = jax.tree.map(lambda leaf: jax.numpy.sqrt((leaf**2).mean()), tree)
            # a tensor that is all zeros has no size of its own: the smallest of the others
            least = jax.numpy.stack([jax.numpy.where(s > 0, s, jax.numpy.inf) for s in jax.tree.leaves(sizes)]).min()
            return ravel_pytree(
                jax.tree.map(lambda leaf, s: jax.numpy.full_like(leaf, jax.numpy.where(s > 0, s, least)), tree, sizes)
            )[0]

        return np.asarray(jax.vmap(one)(self.organism.weights), dtype=np.float32)

    @cached_property
    def calibration(self) -> Calibration:
        """The prior's scale per model and how it was found."""
        draws = np.stack([self.noise(-1 - draw) for draw in range(self.n_draws)])[:, None]

        def median_shift(scales: np.ndarray) -> np.ndarray:
            sigma = self.unit_sigma * scales[:, None].astype(np.float32)
            shifts = [
                self._shift(np.asarray(self.original + sigma * part, dtype=np.float32))
                for part in np.array_split(draws, max(1, self.n_draws // 8))
            ]
            return np.asarray(np.median(np.concatenate(shifts), axis=0))

        return calibrate(median_shift, self.n_models, self.epsilon, self.n_draws)

    @cached_property
    def sigma(self) -> np.ndarray:
        """``(models, n_parameters)``: the prior's standard deviations."""
        scale = self.scale_factor * self.calibration.scale
        return np.asarray(self.unit_sigma * scale[:, None], dtype=np.float32)

    def remembered(self, what: Any, make: Callable[[], Any]) -> Any:
        """Something compiled for this organism, made on first use; shared by trainees that differ in scale alone."""
        if what not in self._compiled:
            self._compiled[what] = make()
        return self._compiled[what]

    def noise(self, draw: int) -> np.ndarray:
        """``(n_parameters,)`` standard normal; the same for all cells. Negative draws belong to the calibration."""
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, 0x0153, draw & 0xFFFFFFFF]))
        return rng.standard_normal(self.n_parameters, dtype=np.float32)

    def behaviour_inputs(self) -> Inputs:
        """Fresh examples on which behaviour is judged."""
        import jax

        made = jax.jit(lambda key: dict(self.organism.batch(key, _BEHAVIOUR_INPUTS)))
        drawn = made(self.organism.key("behaviour", str(self.seed)))
        return {name: np.asarray(value) for name, value in drawn.items()}

    @cached_property
    def reference(self) -> np.ndarray:
        """``(models, n, ...)``: the original outputs on the behaviour inputs."""
        import jax

        outputs = jax.jit(jax.vmap(self.organism.outputs, in_axes=(0, None)))
        return np.asarray(outputs(self.organism.weights, self._behaviour))

    def activations(self, weights: np.ndarray, split: SplitName, noise: int | None = None) -> np.ndarray:
        """``(strengths, models, n_items, dim)`` float32."""
        return self._read(self._noisy(weights, noise), self.organism.probe_inputs(split))

    def read(self, weights: np.ndarray, inputs: Inputs) -> np.ndarray:
        """Activations of any inputs, ``(strengths, models, n, dim)``."""
        return self._read(np.asarray(weights, np.float32), inputs)

    def knowledge(self, model: int, traits: Traits) -> Mapping[str, Any]:
        """What a defence may know of one original model: natural thoughts, and what its output depends on."""
        return knowledge_of(self.organism.of_model(model), traits)

    def shift(self, weights: np.ndarray, noise: int | None = None) -> np.ndarray:
        """``(strengths, models)``: mean KL to the original output in nats."""
        return self._shift(self._noisy(weights, noise))

    def length(self, weights: np.ndarray) -> np.ndarray:
        """``(strengths, models)``: r."""
        return np.asarray(np.sqrt((self.u(weights) ** 2).sum(axis=-1)))

    def along(self, weights: np.ndarray, noise: int) -> np.ndarray:
        """``(strengths, models)``: ``z . u / r``."""
        u = self.u(weights)
        return np.asarray((u @ self.noise(noise).astype(float)) / np.maximum(np.linalg.norm(u, axis=-1), 1e-300))

    def scaled(self, weights: np.ndarray, factor: np.ndarray) -> np.ndarray:
        """``theta_0 + factor (theta - theta_0)``."""
        return np.asarray(self.original + factor[..., None] * (weights - self.original), dtype=np.float32)

    def u(self, weights: np.ndarray) -> np.ndarray:
        """``(strengths, models, n_parameters)`` float64: the move in standard normal coordinates."""
        return np.asarray((np.asarray(weights, dtype=float) - self.original) / self.sigma)

    def describe(self) -> Mapping[str, Any]:
        """The organism's description and the prior's calibration."""
        return {
            **self.organism.describe(),
            "epsilon": self.epsilon,
            "prior": "Gaussian around the trained weights, per-tensor scale",
            "scale_factor": self.scale_factor,
            "calibration": self.calibration.to_json(),
            "bits_per_unit_of_length_squared": 1 / (2 * math.log(2)),
        }

    # -- private -----------------------------------------------------------------------------------------------------

    def _noisy(self, weights: np.ndarray, noise: int | None) -> np.ndarray:
        if weights.ndim != 3 or weights.shape[1:] != self.original.shape:
            raise ValueError(
                f"weights must have shape (strengths, {self.n_models} models, {self.n_parameters}), got {weights.shape}"
            )
        if noise is None:
            return np.asarray(weights, dtype=np.float32)
        return np.asarray(weights + self.sigma * self.noise(noise), dtype=np.float32)

    def _read(self, weights: np.ndarray, inputs: Inputs) -> np.ndarray:
        import jax

        def make() -> Any:
            def one(flat: Any, inputs: Any) -> Any:
                return self.organism.encode(self.unravel(flat), inputs)[0]

            return jax.jit(jax.vmap(jax.vmap(one, in_axes=(0, None)), in_axes=(0, None)))

        return np.asarray(self.remembered("read", make)(weights, dict(inputs)), dtype=np.float32)

    def _shift(self, weights: np.ndarray) -> np.ndarray:
        import jax

        def make() -> Any:
            organism = self.organism

            def one(flat: Any, reference: Any, inputs: Any) -> Any:
                return organism.divergence(reference, organism.outputs(self.unravel(flat), inputs)).mean()

            return jax.jit(jax.vmap(jax.vmap(one, in_axes=(0, 0, None)), in_axes=(0, None, None)))

        return np.asarray(self.remembered("shift", make)(weights, self.reference, self._behaviour), dtype=float)

    @cached_property
    def _behaviour(self) -> dict[str, Any]:
        return dict(self.behaviour_inputs())
