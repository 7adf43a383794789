"""What single torch layers are as layers of a probe (:mod:`.layers`), in eval mode.

======================================  ====================================================================
torch                                   here
======================================  ====================================================================
``Linear``                              ``affine``; torch's weight is ``(out, in)``, ours ``(in, out)``
``BatchNorm1d`` with running statistics ``scale``: ``w / sqrt(var + eps)`` and ``b - mean w / sqrt(var + eps)``
``LayerNorm`` of one axis               ``layer_norm:eps``
activations                             their names
``Dropout``, ``Identity``, ``Flatten``  nothing
sigmoid, softmax                        ``end:...``, known only at the end, where it is left off
======================================  ====================================================================

Only these very classes, without hooks: a subclass may compute something else.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from elk_stress.core.arrays import to_numpy
from elk_stress.probing.wrapping.converted import Stack

__all__ = ["IGNORED", "LAST", "flattened", "layer_of", "numbers_of"]

_ACTIVATIONS = {"ReLU": "relu", "Tanh": "tanh", "Sigmoid": "sigmoid", "SiLU": "silu"}
IGNORED = ("Identity", "Dropout", "Dropout1d", "AlphaDropout", "FeatureAlphaDropout", "Flatten")
LAST = ("Sigmoid", "LogSigmoid", "Softmax", "LogSoftmax")


def flattened(module: Any) -> list[Any]:
    import torch

    if type(module) is torch.nn.Sequential:
        return [part for child in module for part in flattened(child)]
    return [module]


def layer_of(part: Any) -> Stack | None:
    # exactly these classes: a subclass may compute something else
    if not type(part).__module__.startswith("torch.nn.") or part._forward_hooks or part._forward_pre_hooks:
        return None
    kind = type(part).__name__
    if kind in IGNORED:
        return []
    if kind in _ACTIVATIONS:
        return [(_ACTIVATIONS[kind], ())]
    if kind in LAST:
        return [(f"end:{kind}", ())]
    if kind == "GELU":
        return [("gelu" if part.approximate == "none" else "gelu_tanh", ())]
    if kind == "LeakyReLU":
        return [(f"leaky_relu:{part.negative_slope!r}", ())]
    if kind == "Linear":
        weight = numbers_of(part.weight)
        bias = np.zeros(len(weight)) if part.bias is None else numbers_of(part.bias)
        return [("affine", (weight.T, bias))]
    if kind == "LayerNorm" and len(part.normalized_shape) == 1:
        d = part.normalized_shape[0]
        weight = np.ones(d) if part.weight is None else numbers_of(part.weight)
        bias = np.zeros(d) if part.bias is None else numbers_of(part.bias)
        return [(f"layer_norm:{part.eps!r}", (weight, bias))]
    if kind == "BatchNorm1d" and part.running_var is not None:
        scale = 1 / np.sqrt(numbers_of(part.running_var) + part.eps)
        shift = -numbers_of(part.running_mean) * scale
        if part.weight is not None:
            weight = numbers_of(part.weight)
            scale, shift = scale * weight, shift * weight + numbers_of(part.bias)
        return [("scale", (scale, shift))]
    return None


def numbers_of(tensor: Any) -> np.ndarray:
    return np.asarray(to_numpy(tensor.detach().cpu().double()), dtype=float)
