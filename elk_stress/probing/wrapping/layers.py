r"""A feed-forward network as a probe: layers named in the recipe, their weights as numpy parameters.

The score is ``h_K`` of ``h_0 = x``, ``h_k = layer_k(h_{k-1})``, with a last layer of one output. What others trained
(a scikit-learn network, a ``torch.nn.Sequential``) becomes this (:mod:`elk_stress.probing.wrapping`): one definition,
differentiable in torch and in jax, that saves to plain arrays.

===================  ========================================  =================================
layer                equation                                  parameters of layer ``k``
===================  ========================================  =================================
``affine``           ``x @ weight + bias``                     ``weight_k (in, out)``, ``bias_k (out,)``
``scale``            ``x * weight + bias``                     ``weight_k (d,)``, ``bias_k (d,)``
``layer_norm:eps``   ``(x - mean) / sqrt(var + eps)`` scaled   ``weight_k (d,)``, ``bias_k (d,)``
``soft_vote``        logit of ``mean_j sigmoid(x_j)``          none; one output
``relu``, ``tanh``, ``sigmoid``, ``silu``, ``gelu``, ``gelu_tanh``, ``leaky_relu:slope``, no parameters
===================  ========================================  =================================

Shapes: ``(*batch, d) -> (*batch,)``. ``gelu`` is ``x Phi(x)`` with the error function of numpy's, torch's or jax's own
library. The array API has none: in any other namespace Phi is a polynomial with an error below 7.5e-8 (Abramowitz &
Stegun 1964, 26.2.17). References: GELU 1606.08415; layer normalization 1607.06450.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from elk_stress.core.arrays import backend_of
from elk_stress.probing.probe import FittedProbe, Traits

__all__ = ["ACTIVATIONS", "Layers", "stacked"]

Array = Any

# activations without a number, and those with one
ACTIVATIONS = ("relu", "tanh", "sigmoid", "silu", "gelu", "gelu_tanh", "leaky_relu")
_WITH_PARAMETERS = ("affine", "scale", "layer_norm")
_VOTE = "soft_vote"
_NUMBERED = ("layer_norm", "leaky_relu")


@dataclass(frozen=True)
class Layers:
    """The recipe: what the layers are. Made by :func:`elk_stress.wrap` or :func:`stacked`; there is nothing to fit.

    Attributes:
        layers: names in order, with a number after a colon where the layer has one (``leaky_relu:0.01``).

    Raises:
        ValueError: an unknown layer, or one without its number.
    """

    layers: tuple[str, ...] = ()
    name: ClassVar[str] = "layers"
    traits: ClassVar[Traits] = Traits(learns=False)

    def __post_init__(self) -> None:
        # from a file they come as a list
        object.__setattr__(self, "layers", tuple(self.layers))
        for layer in self.layers:
            kind, _, number = layer.partition(":")
            if kind not in (*ACTIVATIONS, *_WITH_PARAMETERS, _VOTE) or (kind in _NUMBERED) != bool(number):
                raise ValueError(
                    f"unknown layer {layer!r}; known: {', '.join((*_WITH_PARAMETERS, *ACTIVATIONS, _VOTE))}, of which "
                    f"{' and '.join(_NUMBERED)} take a number, as in 'leaky_relu:0.01'"
                )
            if number:
                float(number)

    def fit(
        self, activations: np.ndarray, labels: np.ndarray, *, pairs: np.ndarray | None = None, seed: int = 0
    ) -> FittedProbe:
        """Refuses: the layers came fitted.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            "layers are already fitted; pass the wrapped probe itself, or a recipe such as 'mlp' to fit one"
        )

    def score(self, xp: Any, parameters: Mapping[str, Array], activations: Array) -> Array:
        h = activations
        for k, layer in enumerate(self.layers):
            kind, _, number = layer.partition(":")
            if kind == "affine":
                h = xp.matmul(h, parameters[f"weight_{k}"]) + parameters[f"bias_{k}"]
            elif kind == "scale":
                h = h * parameters[f"weight_{k}"] + parameters[f"bias_{k}"]
            elif kind == "layer_norm":
                h = h - xp.mean(h, axis=-1, keepdims=True)
                h = h / xp.sqrt(xp.mean(h * h, axis=-1, keepdims=True) + float(number))
                h = h * parameters[f"weight_{k}"] + parameters[f"bias_{k}"]
            elif kind == _VOTE:
                h = _log_mean_sigmoid(xp, h) - _log_mean_sigmoid(xp, -h)
            else:
                h = _activation(xp, kind, number, h)
        return h[..., 0]


def stacked(
    layers: Sequence[tuple[str, Sequence[np.ndarray]]],
    *,
    dim: int,
    site: str = "",
    notes: Mapping[str, Any] | None = None,
) -> FittedProbe:
    """A fitted probe from ``(name, arrays)`` per layer; two outputs become their difference, second minus first.

    Arrays are ``(weight, bias)`` for ``affine``, ``scale`` and ``layer_norm``, none for activations. Neighbouring
    ``affine`` and ``scale`` layers are multiplied out (in float64): a network without activations is a linear probe.

    Raises:
        ValueError: widths that do not fit, or another number of outputs than one or two.
    """
    merged: list[tuple[str, tuple[np.ndarray, ...]]] = []
    width = dim
    for name, given in layers:
        arrays = tuple(np.asarray(a, dtype=float) for a in given)
        if name == "affine":
            if arrays[0].shape[0] != width:
                raise ValueError(f"a layer reads {arrays[0].shape[0]} features but the one before gives {width}")
            width = arrays[0].shape[1]
            if merged and merged[-1][0] in ("affine", "scale"):
                before, (weight, bias) = merged.pop()
                first = np.diag(weight) if before == "scale" else weight
                arrays = (first @ arrays[0], bias @ arrays[0] + arrays[1])
        elif name == "scale" and merged and merged[-1][0] in ("affine", "scale"):
            name, (weight, bias) = merged.pop()
            arrays = (weight * arrays[0], bias * arrays[0] + arrays[1])
        elif name == _VOTE:
            width = 1
        merged.append((name, arrays))
    if width == 2 and merged and merged[-1][0] == "affine":
        weight, bias = merged.pop()[1]
        merged.append(("affine", (weight[:, 1:] - weight[:, :1], bias[1:] - bias[:1])))
    elif width == 2:
        merged.append(("affine", (np.array([[-1.0], [1.0]]), np.zeros(1))))
    elif width != 1:
        raise ValueError(
            f"a probe has one output, or two of which the second minus the first is the score; this has {width}: "
            "put a layer with one output on top"
        )
    if [name for name, _ in merged] == ["affine"]:
        from elk_stress.probing.probe import direction

        weight, bias = merged[0][1]
        return direction(weight[:, 0], float(bias[0]), site=site, notes=notes)
    parameters = {
        f"{part}_{k}": np.ascontiguousarray(array)
        for k, (_, arrays) in enumerate(merged)
        for part, array in zip(("weight", "bias"), arrays, strict=False)
    }
    return FittedProbe(Layers(tuple(name for name, _ in merged)), parameters, site, notes or {}, dim)


def _activation(xp: Any, kind: str, number: str, x: Array) -> Array:
    if kind == "relu":
        return xp.where(x > 0, x, 0.0 * x)
    if kind == "leaky_relu":
        return xp.where(x > 0, x, float(number) * x)
    if kind == "tanh":
        return xp.tanh(x)
    # by tanh, which does not overflow
    if kind == "sigmoid":
        return 0.5 * (1 + xp.tanh(0.5 * x))
    if kind == "silu":
        return 0.5 * x * (1 + xp.tanh(0.5 * x))
    if kind == "gelu_tanh":
        return 0.5 * x * (1 + xp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))
    return x * _normal_cdf(xp, x)


def _log_mean_sigmoid(xp: Any, x: Array) -> Array:
    """``log mean_j sigmoid(x_j)`` over the last axis, which stays; probabilities themselves would run out of digits."""
    logs = xp.where(x < 0, x, 0.0 * x) - xp.log1p(xp.exp(-xp.abs(x)))
    largest = xp.max(logs, axis=-1, keepdims=True)
    return largest + xp.log(xp.mean(xp.exp(logs - largest), axis=-1, keepdims=True))


def _normal_cdf(xp: Any, x: Array) -> Array:
    backend = backend_of(x)
    if backend == "torch":
        import torch

        return torch.special.ndtr(x)
    if backend == "jax":
        from jax.scipy.special import ndtr

        return ndtr(x)
    if isinstance(x, (np.ndarray, np.generic)):
        from scipy.special import ndtr as exact

        return exact(x)
    size = xp.abs(x)
    t = 1 / (1 + 0.2316419 * size)
    series = ((((1.330274429 * t - 1.821255978) * t + 1.781477937) * t - 0.356563782) * t + 0.319381530) * t
    upper = series * xp.exp(-0.5 * size * size) / math.sqrt(2 * math.pi)
    return xp.where(x > 0, 1 - upper, upper)
