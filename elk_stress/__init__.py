"""elk_stress: how many bits of optimization does a probe survive?

``import elk_stress`` is light: everything is imported on first use, and neither torch nor jax before it is needed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elk_stress.bits import Bits as Bits
    from elk_stress.bits import Kind as Kind
    from elk_stress.estimators import estimate_bits as estimate_bits
    from elk_stress.flags import Flag as Flag
    from elk_stress.probe import FittedProbe as FittedProbe
    from elk_stress.probe import direction as direction
    from elk_stress.stress import StressResult as StressResult
    from elk_stress.stress import Threat as Threat
    from elk_stress.stress import compare as compare
    from elk_stress.stress import stress as stress
    from elk_stress.stress import stress_activations as stress_activations

__version__ = "0.1.0"

_HOME = {
    "Bits": "elk_stress.bits",
    "Kind": "elk_stress.bits",
    "Flag": "elk_stress.flags",
    "FittedProbe": "elk_stress.probe",
    "direction": "elk_stress.probe",
    "estimate_bits": "elk_stress.estimators",
    "StressResult": "elk_stress.stress",
    "Threat": "elk_stress.stress",
    "compare": "elk_stress.stress",
    "stress": "elk_stress.stress",
    "stress_activations": "elk_stress.stress",
}

__all__ = [*sorted(_HOME), "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'elk_stress' has no attribute {name!r}; it has: {', '.join(__all__)}")
