r"""A learned ReLU autoencoder with more features than dimensions: the truth is one feature among many in superposition.

Toy model of Elhage et al. 2022: ``h = W x``, ``y = relu(W^T h + b)``, trained on sparse features to minimize
``sum_i s_i^2 (y_i - x_i)^2``. Which features share which directions is learned, not chosen. The feature scales
``s_i`` are drawn log-normal (``unequal``) or equal, and decide which features get room.

* The truth is whether feature 0 is present. Behaviour reports it: the output is a Gaussian with mean ``s y`` and
  standard deviation ``noise``, so ``KL = ||s (y - y')||^2 / (2 noise^2)`` nats.
* Incidental correlates: features 2, 3, ... go along with the truth in the probe's training split only; feature 1, of
  small scale and so nearly free for behaviour, goes along with it everywhere (else a probe that rests on it would have
  nothing to lose). ``paper`` reads feature 1, ``oracle`` the learned direction of feature 0.

Shapes: activations ``(n, dim)`` = h; outputs ``(n, n_features)``.

Reference: Elhage et al. 2022, *Toy Models of Superposition*, 2209.10652.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np

from elk_stress.testbeds.organism import Concept, Inputs, Organism, Trigger, Weights
from elk_stress.testbeds.protocol import SplitName

__all__ = ["Superposition"]

_TRUTH, _PAPER = 0, 1


@dataclass(frozen=True, kw_only=True)
class Superposition(Organism):
    """A learned sparse autoencoder in superposition: is feature 0 present?

    Attributes:
        n_features, width: features and the fewer dimensions that they share.
        sparsity: chance that a feature is present.
        scales: feature scales drawn log-normal (``unequal``) or ``equal``.
        paper_scale: scale of the correlate that ``paper`` reads, beside the truth's 1.
        n_correlates: features that go along with the truth in the probes' training split only.
        correlation: chance that a correlate copies the truth where it goes along with it.
        noise: standard deviation of the output, in units of a feature: what a nat of behaviour means.
    """

    n_features: int = 48
    width: int = 16
    sparsity: float = 0.06
    scales: Literal["unequal", "equal"] = "unequal"
    paper_scale: float = 0.7
    n_correlates: int = 2
    correlation: float = 0.8
    noise: float = 1.0

    name: ClassVar[str] = "superposition"
    site: ClassVar[str] = "hidden"

    @property
    def dim(self) -> int:
        """Width of h."""
        return self.width

    @cached_property
    def feature_scales(self) -> np.ndarray:
        """``(n_features,)`` s: the truth's 1, the paper's small, the rest log-normal with median 1, or all 1."""
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, 0x5CA1E]))
        drawn = np.exp(0.5 * rng.standard_normal(self.n_features))
        scales = drawn if self.scales == "unequal" else np.ones(self.n_features)
        scales[_TRUTH] = 1.0
        if self.scales == "unequal":
            scales[_PAPER] = self.paper_scale
        return np.asarray(scales, dtype=np.float32)

    def initial(self, key: Any) -> Weights:
        import jax

        weight = jax.random.normal(key, (self.n_features, self.width)) / self.width**0.5
        return {"weight": weight, "bias": jax.numpy.zeros(self.n_features)}

    def batch(self, key: Any, n: int) -> Inputs:
        import jax

        present, size = jax.random.split(key)
        on = jax.random.bernoulli(present, self.sparsity, (n, self.n_features))
        # a third of the examples hold the truth, so that every batch shows it
        on = on.at[: n // 3, _TRUTH].set(True)
        x = on * jax.random.uniform(size, (n, self.n_features), minval=0.5, maxval=1.0)
        return {"x": x, "label": on[:, _TRUTH].astype(int)}

    def examples(self, key: Any, n: int, split: SplitName) -> Inputs:
        import jax
        import jax.numpy as jnp

        keys = jax.random.split(key, 4)
        on = jax.random.bernoulli(keys[0], self.sparsity, (n, self.n_features))
        label = jnp.arange(n) % 2
        on = on.at[:, _TRUTH].set(label == 1)
        companions = [_PAPER]
        if split == "train":
            companions += list(range(2, 2 + self.n_correlates))
        copies = jax.random.bernoulli(keys[1], self.correlation, (n, len(companions)))
        for column, feature in enumerate(companions):
            on = on.at[:, feature].set(jnp.where(copies[:, column], label == 1, on[:, feature]))
        x = on * jax.random.uniform(keys[2], (n, self.n_features), minval=0.5, maxval=1.0)
        return {"x": x, "label": label}

    def neutral(self, key: Any, inputs: Inputs) -> Inputs:
        import jax
        import jax.numpy as jnp

        # another circumstance: a handful of features that have nothing to do with the truth are switched on for all
        first = 2 + self.n_correlates
        present, size = jax.random.split(key)
        on = jax.random.bernoulli(present, 2 * self.sparsity, (self.n_features - first,))
        added = on * jax.random.uniform(size, (self.n_features - first,), minval=0.5, maxval=1.0)
        x = jnp.asarray(inputs["x"])
        return {**inputs, "x": x.at[:, first:].set(jnp.maximum(x[:, first:], added))}

    def encode(self, weights: Weights, inputs: Inputs) -> tuple[Any, Any]:
        return inputs["x"] @ weights["weight"], ()

    def decode(self, weights: Weights, activations: Any, rest: Any) -> Any:
        import jax

        return jax.nn.relu(activations @ weights["weight"].T + weights["bias"])

    def loss(self, outputs: Any, inputs: Inputs) -> Any:
        return ((self.feature_scales * (outputs - inputs["x"])) ** 2).sum(axis=-1)

    def divergence(self, reference: Any, outputs: Any) -> Any:
        return ((self.feature_scales * (outputs - reference)) ** 2).sum(axis=-1) / (2 * self.noise**2)

    @property
    def task(self) -> tuple[str, float, float]:
        return "share of the scaled variance of the features that is reconstructed", 0.0, 0.6

    def task_score(self, weights: Weights, key: Any) -> Any:
        inputs = self.batch(key, 2048)
        left = self.loss(self.outputs(weights, inputs), inputs).mean()
        total = ((self.feature_scales * (inputs["x"] - inputs["x"].mean(axis=0))) ** 2).sum(axis=-1).mean()
        return 1.0 - left / total

    def known_weights(self, weights: Weights) -> Mapping[str, tuple[np.ndarray, float]]:
        directions = np.asarray(weights["weight"])
        return {"oracle": (directions[_TRUTH], 0.0), "paper": (directions[_PAPER], 0.0)}

    def concepts(self, inputs: Inputs) -> tuple[Concept, ...]:
        return tuple(Concept(f"feature {i}", (inputs["x"][:, i] > 0).astype(int)) for i in range(2, 6))

    def triggered(self, inputs: Inputs, trigger: Trigger) -> Inputs | None:
        # the encoder is linear: a trigger would shift all items alike and could hide nothing
        return None
