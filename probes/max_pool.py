r"""The largest linear score over the tokens of an item: one telling token is enough.

Equations: ``s_t = w . x_t - o`` for every token that is there, with ``o = w . mean`` (mean over training tokens), and

    score(x) = max_t s_t + b,

a logit at equal class frequencies. An item without any token scores b, as one token at the mean would.

Fit, as in learning from bags whose positive instances are unknown: the class-balanced log-loss of an item's pooled
score plus ``(l2 / 2) ||sd * w||^2``, where the pool is annealed over the first half of the descent from the mean to the
maximum, ``tau log mean_t exp(s_t / tau)``: with a maximum from the start, whichever token happens to lead would be the
only one ever taught. The second half descends on the score itself. l2 is the one of the least held-out loss on folds of
items; that fit on all rows which descended beside the folds' is kept (:mod:`elk_stress.probing.fit.descent`).

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

from elk_stress.probing.fit.descent import Trials, checked_options, choose, cross_fit
from elk_stress.probing.fit.folds import cross_weights
from elk_stress.probing.fit.pooling import annealed_max, lowest, standardized_tokens
from elk_stress.probing.probe import FittedProbe, Traits

__all__ = ["MaxPool"]


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
        object.__setattr__(
            self, "penalties", checked_options("max_pool", self.penalties, self.folds, self.steps, self.batch)
        )

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


def _peaks(projections: Any, mask: Any, bias: Any, layout: None, softness: Any) -> Any:
    """Logits ``(b, members)`` of projections ``(b, tokens, members)``."""
    return annealed_max(projections, mask, softness) + bias
