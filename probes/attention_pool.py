r"""A learned query attends to tokens, and a linear readout of the attended mean scores the item.

Equations: with q, w in R^d and the tokens t that are there,

    a_t = exp(q . x_t) / sum_u exp(q . x_u),      score(x) = sum_t a_t (w . x_t - o) + b,      o = w . mean,

a logit at equal class frequencies (mean over the training tokens). Where q = 0 this is a linear probe of the mean; a
long q picks one token. Unlike a maximum of the readout, *where* to look and *what* to read there are two directions. An
item without tokens scores b.

Fit: the class-balanced mean log-loss plus ``(l2 / 2) (||sd * q||^2 + ||sd * w||^2)`` in standardized coordinates, by
Adam from w = 0 and a random unit q (at q = w = 0 the loss has no slope in q). l2 is the one of the least held-out loss
on folds of items; that fit on all rows which descended beside the folds' is kept
(:mod:`elk_stress.probing.fit.descent`).

Masked tokens touch neither the score nor its gradient, whatever they hold.

Shapes: activations ``(*batch, tokens, d)``, mask ``(*batch, tokens)`` or ``None`` -> ``(*batch,)``; any number of
tokens. Float32 while fitting. References: Kantamneni et al. 2025 (2502.16681); McKenzie et al. 2025 (2506.10805), who
find it, and the softmax of token scores, best among aggregations for high-stakes interactions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from elk_stress.probing.fit.descent import Trials, checked_options, choose, cross_fit
from elk_stress.probing.fit.folds import cross_weights
from elk_stress.probing.fit.pooling import lowest, standardized_tokens
from elk_stress.probing.probe import FittedProbe, Traits

__all__ = ["AttentionPool"]


@dataclass(frozen=True)
class AttentionPool:
    """One learned query attends to an item's tokens; a linear readout of what it finds.

    Attributes:
        penalties: l2 to choose from.
        folds: of items, for the choice; fewer where a class has fewer rows.
        steps: of Adam; the step size falls to zero along a cosine.
        batch: items per step; with no more items than this every step sees all of them.
    """

    penalties: tuple[float, ...] = (0.001, 0.01, 0.1)
    folds: int = 3
    steps: int = 300
    batch: int = 512

    name: ClassVar[str] = "attention_pool"
    traits: ClassVar[Traits] = Traits(tokens=True)

    def __post_init__(self) -> None:
        # JSON gives a list back
        checks = checked_options("attention_pool", self.penalties, self.folds, self.steps, self.batch)
        object.__setattr__(self, "penalties", checks)

    def fit(
        self,
        activations: np.ndarray,
        labels: np.ndarray,
        *,
        pairs: np.ndarray | None = None,
        mask: np.ndarray | None = None,
        seed: int = 0,
    ) -> FittedProbe:
        """Fit on ``activations (n, tokens, d)``, ``labels (n,)``; ``seed`` draws the first query and the items' order.

        Notes: the ``penalty`` that was chosen and the ``held_out_loss`` in nats, class-balanced.
        """
        rows, centre, spread = standardized_tokens(activations, mask)
        targets = np.asarray(labels).astype(int)
        learned, judged = cross_weights(targets, self.folds)
        fits, tried = learned.shape[1], len(self.penalties)
        rng = np.random.default_rng(np.random.SeedSequence([seed, 1]))
        first = rng.standard_normal((rows.shape[-1], 1))
        queries = np.tile(first / np.linalg.norm(first), (1, tried * fits))
        trials = Trials(
            np.concatenate([queries, np.zeros_like(queries)], axis=1),
            np.tile(np.repeat(self.penalties, fits), 2),
            np.tile(learned, (1, tried)),
            np.tile(judged, (1, tried)),
        )
        weight, bias, losses = cross_fit(
            _attended, None, trials, rows, targets, mask=mask, steps=self.steps, batch=self.batch, seed=seed
        )
        chosen, kept, loss = choose(losses, fits)
        # query and readout side by side: one pass over the activations
        both = weight[:, [kept, tried * fits + kept]] / spread[:, None]
        parameters = {"weight": both, "offset": centre @ both, "bias": np.asarray(bias[kept])}
        return FittedProbe(self, parameters, notes={"penalty": self.penalties[chosen], "held_out_loss": loss})

    def score(self, xp: Any, parameters: Mapping[str, Any], activations: Any, mask: Any = None) -> Any:
        """``sum over tokens of softmax(query) * readout, + bias``, both from ``activations @ weight - offset``."""
        both = xp.matmul(activations, parameters["weight"]) - parameters["offset"]
        query, readout = both[..., 0], both[..., 1]
        if mask is not None:
            query = xp.where(mask, query, lowest(xp, query))
            readout = xp.where(mask, readout, xp.zeros_like(readout))
        size = xp.exp(query - xp.max(query, axis=-1, keepdims=True))
        return xp.sum(size * readout, axis=-1) / xp.sum(size, axis=-1) + parameters["bias"]


def _attended(projections: Any, mask: Any, bias: Any, layout: None, softness: Any) -> Any:
    """Logits ``(b, members)`` of projections ``(b, tokens, 2 members)``: all queries, then all readouts."""
    import jax
    import jax.numpy as jnp

    query, readout = jnp.split(projections, 2, axis=-1)
    there = mask[..., None]
    share = jax.nn.softmax(jnp.where(there, query, -1e30), axis=1)
    return (share * jnp.where(there, readout, 0.0)).sum(axis=1) + bias
