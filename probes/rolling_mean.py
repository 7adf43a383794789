r"""The largest mean of a linear score over a window of consecutive tokens: evidence that lasts, wherever it stands.

Equations: with ``s_t = w . x_t - o``, ``o = w . mean`` (mean over training tokens), and windows of W tokens in a row,

    score(x) = max_t (s_t + ... + s_{t+W-1}) / W + b,

a logit at equal class frequencies. W = 1 is the maximum over tokens, W = the number of tokens their mean. Between the
two, one odd token no longer raises an alarm, and a short passage is no longer drowned by a long text.

Masked tokens: a window's mean is that of the tokens that are there, and only the windows with the most of them count.
So windows that reach into padding are ignored, padding at either end changes nothing, and an item shorter than W scores
the mean of what it has, as it does where there is no room for W tokens at all. An item without tokens scores b.

Fit: W and l2 are those of the least held-out loss on folds of items; every W descends as ``max_pool`` does, its pool
annealed from the mean over windows to the maximum (:mod:`elk_stress.probing.fit.pooling`).

Shapes: activations ``(*batch, tokens, d)``, mask ``(*batch, tokens)`` or ``None`` -> ``(*batch,)``; any number of
tokens. Float32 while fitting. References: means over a sliding window of token scores as a monitor of a text that is
being written: Cunningham et al. 2026 (Constitutional Classifiers++, 2601.04603); the maximum of rolling means, there of
attention: Kramar et al. 2026 (2601.11516).
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

__all__ = ["RollingMean"]


@dataclass(frozen=True)
class RollingMean:
    """The largest mean of a linear score over a window of tokens, the window chosen on training rows.

    Attributes:
        windows: W to choose from; those longer than the items are cut to their length.
        penalties: l2 to choose from.
        folds: of items, for the choice; fewer where a class has fewer rows.
        steps: of Adam; the step size falls to zero along a cosine.
        batch: items per step; with no more items than this every step sees all of them.
    """

    windows: tuple[int, ...] = (1, 2, 4, 8, 16)
    penalties: tuple[float, ...] = (0.003, 0.03)
    folds: int = 3
    steps: int = 200
    batch: int = 256

    name: ClassVar[str] = "rolling_mean"
    traits: ClassVar[Traits] = Traits(tokens=True)

    def __post_init__(self) -> None:
        # JSON gives lists back
        object.__setattr__(self, "windows", tuple(int(window) for window in self.windows))
        checks = checked_options("rolling_mean", self.penalties, self.folds, self.steps, self.batch)
        object.__setattr__(self, "penalties", checks)
        if not self.windows or min(self.windows) < 1:
            raise ValueError(f"rolling_mean needs windows of at least 1 token, got {self.windows}")

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

        Notes: the ``window`` and ``penalty`` that were chosen and the ``held_out_loss`` in nats, class-balanced.
        """
        rows, centre, spread = standardized_tokens(activations, mask)
        targets = np.asarray(labels).astype(int)
        windows = tuple(dict.fromkeys(min(window, rows.shape[1]) for window in self.windows))
        learned, judged = cross_weights(targets, self.folds)
        fits, tried = learned.shape[1], len(windows) * len(self.penalties)
        trials = Trials(
            np.zeros((rows.shape[-1], tried * fits)),
            np.tile(np.repeat(self.penalties, fits), len(windows)),
            np.tile(learned, (1, tried)),
            np.tile(judged, (1, tried)),
        )
        weight, bias, losses = cross_fit(
            _highest, windows, trials, rows, targets, mask=mask, steps=self.steps, batch=self.batch, seed=seed
        )
        chosen, kept, loss = choose(losses, fits)
        place, penalty = divmod(chosen, len(self.penalties))
        window, folded = windows[place], weight[:, kept] / spread
        parameters = {
            "weight": folded,
            "offset": np.asarray(folded @ centre),
            # its length is the window: shapes are known to a compiler, values are not
            "kernel": np.full(window, 1.0 / window),
            "bias": np.asarray(bias[kept]),
        }
        notes = {"window": window, "penalty": self.penalties[penalty], "held_out_loss": loss}
        return FittedProbe(self, parameters, notes=notes)

    def score(self, xp: Any, parameters: Mapping[str, Any], activations: Any, mask: Any = None) -> Any:
        """``max over windows of the mean of (activations @ weight - offset), + bias``."""
        tokens = xp.matmul(activations, parameters["weight"]) - parameters["offset"]
        window = min(parameters["kernel"].shape[0], tokens.shape[-1])
        if mask is None:
            return xp.max(_sums(tokens, window) / window, axis=-1) + parameters["bias"]
        zeros, ones = xp.zeros_like(tokens), xp.ones_like(tokens)
        counts = _sums(xp.where(mask, ones, zeros), window)
        most = xp.max(counts, axis=-1, keepdims=True)
        # whole numbers below 2^24: sums of ones are exact in float32
        sums = _sums(xp.where(mask, tokens, zeros), window)
        means = sums / xp.where(counts > 0, counts, xp.ones_like(counts))
        peak = xp.max(xp.where(counts == most, means, lowest(xp, means)), axis=-1)
        return peak + parameters["bias"]


def _sums(tokens: Any, window: int) -> Any:
    """Sums over windows of consecutive positions of the last axis: ``(*batch, T)`` -> ``(*batch, T - window + 1)``."""
    places = tokens.shape[-1] - window + 1
    total = tokens[..., :places]
    for shift in range(1, window):
        total = total + tokens[..., shift : shift + places]
    return total


def _highest(projections: Any, mask: Any, bias: Any, windows: tuple[int, ...], softness: Any) -> Any:
    """Logits ``(b, members)`` of projections ``(b, tokens, members)``, members in as many equal groups as windows."""
    import jax.numpy as jnp

    def running(values: Any) -> Any:
        total = jnp.cumsum(values, axis=1)
        return jnp.concatenate([jnp.zeros_like(total[:, :1]), total], axis=1)

    # differences of running sums: a sum of slices, as the score has it, takes a compiler seconds for long windows
    sums, counts = running(jnp.where(mask[..., None], projections, 0.0)), running(mask.astype(projections.dtype))
    pooled = []
    for window, group in zip(windows, jnp.split(sums, len(windows), axis=-1), strict=True):
        there = counts[:, window:] - counts[:, :-window]
        means = (group[:, window:] - group[:, :-window]) / jnp.maximum(there, 1.0)[..., None]
        most = there.max(axis=1, keepdims=True)
        pooled.append(annealed_max(means, (there == most) & (there > 0.0), softness))
    return jnp.concatenate(pooled, axis=-1) + bias
