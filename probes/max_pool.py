r"""The largest linear score over the tokens of an item: one telling token is enough.

Equations: ``s_t = w . x_t - o`` for every token that is there, with ``o = w . mean`` (mean over training tokens), and

    score(x) = max_t s_t + b,

a logit at equal class frequencies. An item without any token scores b, as one token at the mean would.

Fit, as in learning from bags whose positive instances are unknown: the class-balanced log-loss of an item's pooled
score plus ``(l2 / 2) ||sd * w||^2``, where the pool is annealed over the first half of the descent from the mean to the
maximum, ``tau log mean_t exp(s_t / tau)``: with a maximum from the start, whichever token happens to lead would be the
only one ever taught. The second half descends on the score itself. l2 is the one of the least held-out loss on folds of
items; that fit on all rows which descended beside the folds' is kept (:mod:`elk_stress.probes.quadratic`).

Masked tokens touch neither the score nor its gradient, whatever they hold.

Shapes: activations ``(*batch, tokens, d)``, mask ``(*batch, tokens)`` or ``None`` -> ``(*batch,)``; any number of
tokens. Float32 while fitting. References: maximum over tokens as a monitor, beside other aggregations: McKenzie et al.
2025 (2506.10805), Kramar et al. 2026 (2601.11516); the annealed pool is the log-sum-exp of Pinheiro & Collobert 2015
(1411.6228).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from elk_stress.probe import FittedProbe, Traits
from elk_stress.probes.quadratic import Trials, choose, cross_fit, cross_weights, standardization

__all__ = ["MaxPool"]

# temperature of the pool at the start, in logits: nearly a mean while scores are small
_TEMPERATURE = 3.0
# in place of a token that is not there, while fitting in float32
_NOWHERE = -1e30


@dataclass(frozen=True)
class MaxPool:
    """The largest linear score over an item's tokens.

    Attributes:
        penalties: l2 to choose from.
        folds: of items, for the choice; fewer where a class has fewer rows.
        steps: of Adam; the step size falls to zero along a cosine.
        batch: items per step; with no more items than this every step sees all of them.
    """

    penalties: tuple[float, ...] = (0.003, 0.03, 0.3)
    folds: int = 3
    steps: int = 200
    batch: int = 512

    name: ClassVar[str] = "max_pool"
    traits: ClassVar[Traits] = Traits(tokens=True)

    def __post_init__(self) -> None:
        # JSON gives a list back
        object.__setattr__(self, "penalties", checked("max_pool", self.penalties, self.folds, self.steps, self.batch))

    def fit(
        self,
        activations: np.ndarray,
        labels: np.ndarray,
        *,
        pairs: np.ndarray | None = None,
        mask: np.ndarray | None = None,
        seed: int = 0,
    ) -> FittedProbe:
        """Fit on ``activations (n, tokens, d)``, ``labels (n,)``; ``seed`` draws the order of items.

        Notes: the ``penalty`` that was chosen and the ``held_out_loss`` in nats, class-balanced.
        """
        rows, centre, spread = standardized_tokens(activations, mask)
        targets = np.asarray(labels).astype(int)
        learned, judged = cross_weights(targets, self.folds)
        fits, tried = learned.shape[1], len(self.penalties)
        trials = Trials(
            np.zeros((rows.shape[-1], tried * fits)),
            np.repeat(self.penalties, fits),
            np.tile(learned, (1, tried)),
            np.tile(judged, (1, tried)),
        )
        weight, bias, losses = cross_fit(
            _peaks, None, trials, rows, targets, mask=mask, steps=self.steps, batch=self.batch, seed=seed
        )
        chosen, kept, loss = choose(losses, fits)
        folded = weight[:, kept] / spread
        parameters = {"weight": folded, "offset": np.asarray(folded @ centre), "bias": np.asarray(bias[kept])}
        return FittedProbe(self, parameters, notes={"penalty": self.penalties[chosen], "held_out_loss": loss})

    def score(self, xp: Any, parameters: Mapping[str, Any], activations: Any, mask: Any = None) -> Any:
        """``max over tokens of (activations @ weight - offset), + bias``."""
        tokens = xp.matmul(activations, parameters["weight"]) - parameters["offset"]
        if mask is None:
            return xp.max(tokens, axis=-1) + parameters["bias"]
        peak = xp.max(xp.where(mask, tokens, lowest(xp, tokens)), axis=-1)
        return xp.where(xp.any(mask, axis=-1), peak, xp.zeros_like(peak)) + parameters["bias"]


def lowest(xp: Any, values: Any) -> Any:
    """An array like ``values`` of the lowest finite number: no maximum, and nothing beside another in a softmax."""
    return xp.full_like(values, xp.finfo(values.dtype).min)


def checked(name: str, penalties: Any, folds: int, steps: int, batch: int) -> tuple[float, ...]:
    """Penalties as floats, after all options of a descent were checked."""
    found = tuple(float(penalty) for penalty in penalties)
    if not found or not min(found) > 0 or min(folds, steps, batch) < 1:
        raise ValueError(
            f"{name} needs at least one penalty, each above 0, and folds, steps and batch of at least 1; got penalties "
            f"{found}, folds {folds}, steps {steps}, batch {batch}"
        )
    return found


def standardized_tokens(activations: np.ndarray, mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Float32 rows ``(n, tokens, d)`` with masked tokens at zero, and the mean and spread of the tokens that are there.

    Raises:
        ValueError: a mask of another shape, or one that leaves no token.
    """
    rows = np.asarray(activations)
    if mask is not None and (np.shape(mask) != rows.shape[:2] or not np.any(mask)):
        raise ValueError(
            f"mask must be {rows.shape[:2]} (items, tokens) with some token there, got {np.shape(mask)} with "
            f"{int(np.sum(mask))} there"
        )
    there = rows.reshape(-1, rows.shape[-1]) if mask is None else rows[np.asarray(mask, dtype=bool)]
    centre, spread = standardization(there.astype(float))
    scaled = ((rows - centre) / spread).astype(np.float32)
    return (scaled if mask is None else scaled * np.asarray(mask, dtype=np.float32)[..., None]), centre, spread


def annealed_max(values: Any, valid: Any, softness: Any) -> Any:
    """Along the axis before the last: between the mean (softness 1, small values) and the maximum (0); none valid: 0.

    ``values (b, positions, members)``, ``valid (b, positions)``.
    """
    import jax
    import jax.numpy as jnp

    there = valid[..., None]
    masked = jnp.where(there, values, _NOWHERE)
    peak = masked.max(axis=1)
    temperature = jnp.maximum(softness * _TEMPERATURE, 1e-3)
    excess = jnp.where(there, (values - jax.lax.stop_gradient(peak)[:, None]) / temperature, -jnp.inf)
    count = jnp.maximum(valid.sum(axis=1), 1).astype(values.dtype)[:, None]
    some = valid.any(axis=1)[:, None]
    # an item without tokens would be log(0): any finite stand-in, for nothing of it is kept
    total = jnp.where(some, jnp.exp(excess).sum(axis=1), 1.0)
    soft = jax.lax.stop_gradient(peak) + temperature * jnp.log(total / count)
    return jnp.where(some, jnp.where(softness > 0, soft, peak), 0.0)


def _peaks(projections: Any, mask: Any, bias: Any, layout: None, softness: Any) -> Any:
    """Logits ``(b, members)`` of projections ``(b, tokens, members)``."""
    return annealed_max(projections, mask, softness) + bias
