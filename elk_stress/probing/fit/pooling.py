r"""Tokens of an item: what a mask means, and a maximum over them that can be learned.

A masked token is not there: it touches neither a score nor its gradient nor a fit, whatever it holds. While fitting it
is a row of zeros (:func:`standardized_tokens`), and no pool reads it; in a score it is the :func:`lowest` number, which
is no maximum and nothing beside another in a softmax.

Learning from a maximum: with a maximum from the start, whichever token happens to lead would be the only one ever
taught. So the pool is annealed,

    tau log mean_t exp(s_t / tau),      tau = 3 softness,

which is nearly the mean for scores that are small beside tau, and tends to the maximum as the softness falls to 0: the
log-sum-exp of Pinheiro & Collobert 2015 (1411.6228). The mean inside the logarithm, not the sum, so that items with
many tokens do not score higher for it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from elk_stress.probing.fit.scaling import standardization

__all__ = ["annealed_max", "lowest", "standardized_tokens"]

# temperature of the pool at the start, in logits: nearly a mean while scores are small
_TEMPERATURE = 3.0
# in place of a token that is not there, while fitting in float32
_NOWHERE = -1e30


def lowest(xp: Any, values: Any) -> Any:
    """An array like ``values`` of the lowest finite number: no maximum, and nothing beside another in a softmax."""
    return xp.full_like(values, xp.finfo(values.dtype).min)


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
