"""Everything of one run of several probes on one testbed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from elk_stress.core.bits import Bits
from elk_stress.thoughts.comparison import Comparison
from elk_stress.thoughts.result import StressResult, plain

__all__ = ["RunResult"]


@dataclass(frozen=True)
class RunResult:
    """Everything of one run; serializes completely.

    Attributes:
        results: one per finished probe, in the order asked for.
        comparisons: paired comparisons, Holm-adjusted (empty with fewer than two results).
        controls: control -> threat -> bits, or why it does not apply.
        skipped: probe -> why it does not apply here.
        failures: probe -> what went wrong.
        refused: those of the failures that are bad input (a ``ValueError`` with its way out) and no defect.
        description: what the testbed says of itself (model, data, sizes, how the site was chosen).
        config, versions, seed, seconds: how to get the same again.
        status: ``partial`` while probes remain, ``interrupted`` after Ctrl-C.
    """

    testbed: str
    results: tuple[StressResult, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    controls: Mapping[str, Mapping[str, Bits] | str] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)
    refused: tuple[str, ...] = ()
    description: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0
    seconds: float = 0.0
    status: Literal["ok", "partial", "interrupted"] = "partial"

    @property
    def red(self) -> bool:
        """Whether any red flag was raised or any probe failed."""
        return bool(self.failures) or any(f.red for r in self.results for _, f in r.all_flags)

    @property
    def not_applicable(self) -> dict[str, list[str]]:
        """Reason -> the probes, threats and attacks that it kept from being run; whose, unless it is everybody's."""
        whose: dict[tuple[str, str], list[str]] = {(name, why): [] for name, why in self.skipped.items()}
        for result in self.results:
            for name, why in result.skipped.items():
                whose.setdefault((name, why.removeprefix("does not apply: ")), []).append(result.probe)
        found: dict[str, list[str]] = {}
        for (name, why), probes in whose.items():
            everybody = len(probes) in (0, len(self.results))
            found.setdefault(why, []).append(name if everybody else f"{name} ({', '.join(probes)})")
        return found

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary with everything in it."""
        record = plain(self)
        assert isinstance(record, dict)
        return record
