"""elk_stress: how many bits of optimization does a probe survive?

``import elk_stress`` is light: everything is imported on first use, and neither torch nor jax before it is needed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elk_stress.core.bits import Bits as Bits
    from elk_stress.core.bits import Kind as Kind
    from elk_stress.core.flags import Flag as Flag
    from elk_stress.estimators import estimate_bits as estimate_bits
    from elk_stress.ledger.ledger import BudgetExceeded as BudgetExceeded
    from elk_stress.ledger.ledger import Ledger as Ledger
    from elk_stress.probing.probe import FittedProbe as FittedProbe
    from elk_stress.probing.probe import direction as direction
    from elk_stress.probing.wrapping import wrap as wrap
    from elk_stress.thoughts.engine import StressResult as StressResult
    from elk_stress.thoughts.engine import Threat as Threat
    from elk_stress.thoughts.engine import compare as compare
    from elk_stress.thoughts.engine import stress as stress
    from elk_stress.thoughts.engine import stress_activations as stress_activations
    from elk_stress.thoughts.incidental import incidental_fraction as incidental_fraction
    from elk_stress.training.comparison import compare_pressure as compare_pressure
    from elk_stress.training.loop import stress_training as stress_training
    from elk_stress.training.result import PressureResult as PressureResult

__version__ = "0.1.0"

_HOME = {
    "Bits": "elk_stress.core.bits",
    "Kind": "elk_stress.core.bits",
    "Flag": "elk_stress.core.flags",
    "FittedProbe": "elk_stress.probing.probe",
    "direction": "elk_stress.probing.probe",
    "estimate_bits": "elk_stress.estimators",
    "incidental_fraction": "elk_stress.thoughts.incidental",
    "BudgetExceeded": "elk_stress.ledger.ledger",
    "Ledger": "elk_stress.ledger.ledger",
    "StressResult": "elk_stress.thoughts.engine",
    "Threat": "elk_stress.thoughts.engine",
    "compare": "elk_stress.thoughts.engine",
    "stress": "elk_stress.thoughts.engine",
    "stress_activations": "elk_stress.thoughts.engine",
    "PressureResult": "elk_stress.training.result",
    "compare_pressure": "elk_stress.training.comparison",
    "stress_training": "elk_stress.training.loop",
    "wrap": "elk_stress.probing.wrapping",
}

__all__ = [*sorted(_HOME), "__version__"]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'elk_stress' has no attribute {name!r}; it has: {', '.join(__all__)}")
