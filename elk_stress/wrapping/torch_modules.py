"""Torch modules as probes: ``Sequential``s of known layers converted, all others called as they are.

The module is copied, put into eval mode and frozen: neither the caller's later training nor an attack's gradients
reach over. Of its layers (:mod:`.torch_layers`) a sigmoid or softmax at the end is left off, since what it squashes is
the logit, which does not saturate in float32. The converted probe must score as the module does, or as what comes
before the layer that was left off.

Shapes: ``(n, d) -> (n,)``, ``(n, 1)`` or two logits ``(n, 2)``, of which the score is the second minus the first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from elk_stress.probe import FittedProbe
from elk_stress.wrapping.converted import Stack, agrees, named, one_score
from elk_stress.wrapping.layers import stacked
from elk_stress.wrapping.opaque import Opaque
from elk_stress.wrapping.probelab_probes import layers_of_probelab
from elk_stress.wrapping.torch_layers import IGNORED, LAST, flattened, layer_of

__all__ = ["from_torch", "is_torch_module"]


def is_torch_module(obj: Any) -> bool:
    return "torch" in sys.modules and isinstance(obj, sys.modules["torch"].nn.Module)


def from_torch(module: Any, name: str | None, dim: int | None, site: str) -> FittedProbe:
    import copy

    import torch

    kind = type(module).__name__
    if getattr(module, "initialized", True) is False:
        raise ValueError(f"{kind} is not fitted; call its fit first, then wrap it")
    # a copy: neither the caller's training nor ours reaches over
    frozen = copy.deepcopy(module).eval().requires_grad_(False)
    held = [t for t in [*frozen.parameters(), *frozen.buffers()] if t.is_floating_point() and t.numel()]
    dtype, device = (held[0].dtype, held[0].device) if held else (torch.float32, torch.device("cpu"))
    layers = _layers(frozen)
    width = dim or _width(frozen)
    if width is None:
        raise TypeError(f"{kind} does not tell how many features it reads; pass dim=")

    def outputs(x: Any) -> Any:
        return one_score(frozen(x), x.shape[0], kind)

    try:
        with torch.no_grad():
            outputs(torch.zeros((3, width), dtype=dtype, device=device))
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"{kind} does not score rows of {width} features, shape (n, {width}): {type(error).__name__}: {error}; "
            "pass dim=, or wrap a function that calls it as it wants to be called"
        ) from error
    opaque = Opaque(name or kind, outputs, "torch", True, str(dtype).removeprefix("torch."), str(device))
    notes, ending = {"from": kind, "score": "output"}, ""
    if layers is not None:
        layers, ending = _without_ending(layers)
    if layers is not None and not any(layer.startswith("end:") for layer, _ in layers):
        made = named(stacked(layers, dim=width, site=site), name or kind, {**notes, "score": f"output{ending}"})
        # with an ending left off it is what comes before the ending that must agree
        reference = opaque._values if not ending else _before(frozen, opaque)
        if agrees(made, reference, 1e-8 if dtype is torch.float64 else 1e-6):
            return made
    return FittedProbe(opaque, {}, site, {**notes, "as": "opaque, with a gradient by torch"}, width)


def _layers(module: Any) -> Stack | None:
    """Layers of a (nested) ``Sequential`` or a known probe of another library; ``None`` where one is unknown."""
    known = layers_of_probelab(module)
    if known is not None:
        return known
    found: Stack = []
    for part in flattened(module):
        layer = layer_of(part)
        if layer is None:
            return None
        found += layer
    return found


def _before(frozen: Any, opaque: Opaque) -> Callable[[np.ndarray], np.ndarray]:
    """The module without its last layer (a nested one's, if need be), scored."""
    import torch

    flat = flattened(frozen)
    while type(flat[-1]).__name__ in (*IGNORED, *LAST):
        ended = type(flat[-1]).__name__ in LAST
        flat = flat[:-1]
        if ended:
            break
    inner = torch.nn.Sequential(*flat)
    short = Opaque("inner", lambda x: one_score(inner(x), len(x), "inner"), "torch", True, opaque.dtype, opaque.device)
    return short._values


def _without_ending(layers: Stack) -> tuple[Stack, str]:
    """The layers up to a sigmoid or softmax at their end: what they squash is the logit."""
    if layers and layers[-1][0] in ("sigmoid", "end:Sigmoid", "end:LogSigmoid", "end:Softmax", "end:LogSoftmax"):
        return layers[:-1], " before the last squashing"
    return layers, ""


def _width(module: Any) -> int | None:
    """How many features the first layer that tells reads."""
    for part in module.modules():
        for name in ("in_features", "num_features"):
            if isinstance(getattr(part, name, None), int):
                return int(getattr(part, name))
        shape = getattr(part, "normalized_shape", None)
        if shape is not None:
            return int(shape[-1])
    for name in ("direction", "scaler_mean", "weight"):
        held = getattr(module, name, None)
        if held is not None and getattr(held, "ndim", 0) == 1:
            return int(held.shape[0])
    return None
