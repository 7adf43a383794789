"""elk_stress: how many bits of optimization does a probe survive?

``import elk_stress`` is light: everything is imported on first use, and neither torch nor jax before it is needed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elk_stress.bits import Bits as Bits
    from elk_stress.bits import Kind as Kind
    from elk_stress.engine import StressResult as StressResult
    from elk_stress.engine import Threat as Threat
    from elk_stress.engine import compare as compare
    from elk_stress.engine import stress as stress
    from elk_stress.engine import stress_activations as stress_activations
    from elk_stress.estimators import estimate_bits as estimate_bits
    from elk_stress.flags import Flag as Flag
    from elk_stress.incidental import incidental_fraction as incidental_fraction
    from elk_stress.ledger import BudgetExceeded as BudgetExceeded
    from elk_stress.ledger import Ledger as Ledger
    from elk_stress.probe import FittedProbe as FittedProbe
    from elk_stress.probe import direction as direction
    from elk_stress.training.comparison import compare_pressure as compare_pressure
    from elk_stress.training.pressure import stress_training as stress_training
    from elk_stress.training.results import PressureResult as PressureResult
    from elk_stress.wrapping import wrap as wrap

__version__ = "0.1.0"

_HOME = {
    "Bits": "elk_stress.bits",
    "Kind": "elk_stress.bits",
    "Flag": "elk_stress.flags",
    "FittedProbe": "elk_stress.probe",
    "direction": "elk_stress.probe",
    "estimate_bits": "elk_stress.estimators",
    "incidental_fraction": "elk_stress.incidental",
    "BudgetExceeded": "elk_stress.ledger",
    "Ledger": "elk_stress.ledger",
    "StressResult": "elk_stress.engine",
    "Threat": "elk_stress.engine",
    "compare": "elk_stress.engine",
    "stress": "elk_stress.engine",
    "stress_activations": "elk_stress.engine",
    "PressureResult": "elk_stress.training.results",
    "compare_pressure": "elk_stress.training.comparison",
    "stress_training": "elk_stress.training.pressure",
    "wrap": "elk_stress.wrapping",
}

__all__ = [*sorted(_HOME), "__version__"]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'elk_stress' has no attribute {name!r}; it has: {', '.join(__all__)}")
