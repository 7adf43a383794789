"""probelab's probes: torch modules, of which three are known by their parts and the others kept opaque.

============  ===========================================================
probelab      equation
============  ===========================================================
``Logistic``  ``linear((x - scaler_mean) / scaler_std)``
``MassMean``  ``(x - global_mean) @ direction + bias``
``MLP``       ``fc2(activation(fc1(x)))``
============  ===========================================================

Known by the module that their class lives in; probelab itself is not imported, and an attribute that a later version
renames is an error there. What is read here is compared with the probe's own scores like any other conversion.
Source: https://github.com/serteal/probelab (0.1.0).
"""

from __future__ import annotations

from typing import Any

from elk_stress.probing.wrapping.converted import Stack
from elk_stress.probing.wrapping.torch_layers import layer_of, numbers_of

__all__ = ["layers_of_probelab"]


def layers_of_probelab(module: Any) -> Stack | None:
    """probelab's ``Logistic``, ``MassMean`` and ``MLP`` by their parts; its others are kept opaque."""
    if not type(module).__module__.startswith("probelab."):
        return None
    kind = type(module).__name__
    if kind == "Logistic":
        std = numbers_of(module.scaler_std)
        linear = layer_of(module.linear)
        return None if linear is None else [("scale", (1 / std, -numbers_of(module.scaler_mean) / std)), *linear]
    if kind == "MassMean":
        weight = numbers_of(module.direction)
        bias = numbers_of(module.bias).reshape(1) - numbers_of(module.global_mean) @ weight
        return [("affine", (weight[:, None], bias))]
    if kind == "MLP":
        parts = [layer_of(p) for p in (module.fc1, module.activation_layer, module.fc2)]
        return [layer for part in parts if part is not None for layer in part]
    return None
