"""Everything of one run of training pressure: several probes, one testbed, one attack."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from elk_stress.thoughts.result import plain
from elk_stress.training.comparison import PressureComparison
from elk_stress.training.result import PressureResult

__all__ = ["TrainingRun"]


@dataclass(frozen=True)
class TrainingRun:
    """Everything of one run; serializes completely.

    Attributes:
        results: one per finished row.
        comparisons: paired over models, Holm-adjusted.
        failures: row -> what went wrong.
        description: what the trainee says of itself.
        status: ``partial`` while rows remain, ``interrupted`` after Ctrl-C, else ``ok``.
    """

    testbed: str
    results: tuple[PressureResult, ...] = ()
    comparisons: tuple[PressureComparison, ...] = ()
    failures: Mapping[str, str] = field(default_factory=dict)
    description: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    seconds: float = 0.0
    status: Literal["ok", "partial", "interrupted"] = "partial"

    @property
    def red(self) -> bool:
        """Whether any red flag was raised or any row failed."""
        return bool(self.failures) or any(f.red for r in self.results for f in r.flags)

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary with everything in it."""
        record = plain(self)
        assert isinstance(record, dict)
        return record
