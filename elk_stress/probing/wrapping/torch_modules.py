"""Torch modules as probes: ``Sequential``s of known layers converted, all others called as they are.

The module is copied, put into eval mode and frozen: neither the caller's later training nor an attack's gradients
reach over. Of its layers (:mod:`.torch_layers`) a sigmoid or softmax at the end is left off, since what it squashes is
the logit, which does not saturate in float32. The converted probe must score as the module does, or as what comes
before the layer that was left off.

An opaque module must score each row alone, twice the same (:mod:`elk_stress.probing.rowwise`), and has a gradient only
if that is the slope of its scores (:mod:`.gradients`).

Shapes: ``(n, d) -> (n,)``, ``(n, 1)`` or two logits ``(n, 2)``, of which the score is the second minus the first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from elk_stress.probing.probe import FittedProbe
from elk_stress.probing.rowwise import quiet
from elk_stress.probing.wrapping.converted import Stack, agrees, check_opaque, named, one_score, trial_rows
from elk_stress.probing.wrapping.gradients import missing_gradient
from elk_stress.probing.wrapping.layers import stacked
from elk_stress.probing.wrapping.opaque import Opaque, resolution
from elk_stress.probing.wrapping.probelab_probes import layers_of_probelab
from elk_stress.probing.wrapping.torch_layers import IGNORED, LAST, flattened, layer_of

__all__ = ["checked_torch", "from_torch", "is_torch_module"]


def is_torch_module(obj: Any) -> bool:
    return "torch" in sys.modules and isinstance(obj, sys.modules["torch"].nn.Module)


def from_torch(module: Any, name: str | None, dim: int | None, site: str) -> FittedProbe:
    import torch

    kind = type(module).__name__
    if getattr(module, "initialized", True) is False:
        raise ValueError(f"{kind} is not fitted; call its fit first, then wrap it")
    frozen = _frozen(module, kind)
    held = [t for t in [*frozen.parameters(), *frozen.buffers()] if t.is_floating_point() and t.numel()]
    dtype, device = (held[0].dtype, held[0].device) if held else (torch.float32, torch.device("cpu"))
    layers = _layers(frozen)
    width = dim or _width(frozen)
    if width is None:
        raise TypeError(f"{kind} does not tell how many features it reads; pass dim=")

    def outputs(x: Any) -> Any:
        return one_score(frozen(x), x.shape[0], kind)

    opaque = Opaque(name or kind, outputs, "torch", True, str(dtype).removeprefix("torch."), str(device))
    try:
        with quiet():
            opaque.values(next(trial_rows(width)))
    except Exception as error:  # whatever somebody's module raises at rows that it was not written for
        raise ValueError(
            f"{kind} does not score real rows of {width} features, {dtype} of shape (n, {width}): "
            f"{type(error).__name__}: {str(error)[:300]}; pass dim=, or wrap a function that calls it as it wants to "
            "be called and picks the one score"
        ) from error
    notes, ending = {"from": kind, "score": "output"}, ""
    if layers is not None:
        layers, ending = _without_ending(layers)
    if layers is not None and not any(layer.startswith("end:") for layer, _ in layers):
        made = named(stacked(layers, dim=width, site=site), name or kind, {**notes, "score": f"output{ending}"})
        # with an ending left off it is what comes before the ending that must agree
        reference = opaque.values if not ending else _before(frozen, opaque)
        if agrees(made, reference, 1e-8 if dtype is torch.float64 else 1e-6):
            return made
    return checked_torch(opaque, notes, width, site, _in_double(frozen, kind))


def checked_torch(opaque: Opaque, notes: dict[str, Any], dim: int, site: str, double: Opaque | None) -> FittedProbe:
    """The opaque probe of somebody's torch code: refused where it is random, without a gradient where that is none.

    Args:
        double: the same in double precision, where there is such a thing: the gradient is held against that first.

    Raises:
        ValueError: random, or scores that depend on the batch.
    """
    import torch

    fitted = FittedProbe(opaque, {}, site, {**notes, "as": "opaque, with a gradient by torch"}, dim)
    check_opaque(opaque.values, dim, opaque.name, resolution(fitted))
    eps = torch.finfo(getattr(torch, opaque.dtype)).eps
    attempts = [(o.values, o.values_and_slopes, step, e) for o, step, e in (
        (double, 1e-5, 2.0**-52), (opaque, 1e-5 if eps < 1e-10 else 1e-2, eps)
    ) if o is not None]  # fmt: skip
    why = missing_gradient(dim, opaque.values_and_slopes, attempts)
    if why is None:
        return fitted
    blind = replace(opaque, differentiable=False)
    return FittedProbe(blind, {}, site, {**notes, "as": "opaque, without a gradient", "gradient": why}, dim)


def _frozen(module: Any, kind: str) -> Any:
    """A copy in eval mode without gradients: neither the caller's training nor ours reaches over."""
    import copy

    import torch

    held = [*module.parameters(), *module.buffers()]
    if any(torch.nn.parameter.is_lazy(t) for t in held):
        raise ValueError(f"{kind} has lazy layers that saw no rows yet; call it on a batch first, then wrap it")
    if any(t.device.type == "meta" for t in held):
        raise ValueError(f"{kind} is on the meta device, where parameters have no values; load its weights first")
    try:
        return copy.deepcopy(module).eval().requires_grad_(False)
    except Exception as error:  # a lock, an open file, a tensor in the middle of a graph
        raise ValueError(
            f"{kind} cannot be copied ({type(error).__name__}: {str(error)[:200]}), and a probe must not follow later "
            "training; wrap a function that calls it"
        ) from error


def _in_double(frozen: Any, kind: str) -> Opaque | None:
    import copy

    try:
        double = copy.deepcopy(frozen).double()
    except Exception:  # an 8-bit layer, say
        return None
    return Opaque(kind, lambda x: one_score(double(x), x.shape[0], kind), "torch", True, "float64", _device(double))


def _device(module: Any) -> str:
    return next((str(t.device) for t in [*module.parameters(), *module.buffers()]), "cpu")


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
    return short.values


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
