"""How numbers, threats, verdicts and flags are written: one place, so that tables, figures and text agree.

A number is never written without its kind: a censored one reads ``>= 21.3``, a bound says that it is one, and a
distance (FORM) is a length in u, ``d 5.90``, never a number of bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from elk_stress.core.bits import Bits, Kind, best_of_n_half_chance, beta_of_bits
from elk_stress.core.flags import CATALOGUE, Flag
from elk_stress.thoughts.result import StressResult, ThreatResult
from elk_stress.threats.threat import Threat

__all__ = [
    "FLAG_CODES",
    "VERDICTS",
    "Row",
    "Variant",
    "bits_text",
    "codes",
    "columns",
    "count",
    "draws",
    "flags_in",
    "free_and_kept",
    "heading",
    "interval",
    "number",
    "plainest",
    "rows",
    "sentence",
]

FLAG_CODES: Mapping[str, str] = {
    "did_not_engage": "NE",
    "bounds_violated": "BV",
    "black_box_beats_white_box": "BW",
    "weak_beats_strong": "WS",
    "runs_disagree": "RD",
    "low_effective_sample_size": "ES",
    "budget_exhausted": "BX",
    "fpr_unresolved": "FP",
    "behaviour_broken": "BB",
    "benign_broke_it": "BN",
    "diverged": "DV",
    "brittle": "BR",
    "leak": "LK",
    "wide_interval": "WI",
    "massive_dimensions": "MD",
    "saturated": "ST",
    "catches_nothing": "CN",
    "flipped": "FL",
    "shared_contexts": "SC",
    "no_contexts": "NC",
    "prediction_failed": "PF",
    "control_failed": "CF",
    "missed_mode": "MM",
    "origin_fails": "OF",
}
"""Two letters for each flag of the catalogue; a legend always spells them out."""

VERDICTS: Mapping[str, str] = {
    "still works": "the attacked probe still tells true from false as it stands",
    "miscalibrated": "its scores need only a new scale and offset",
    "moved": "the same kind of probe works again when refitted on attacked items",
    "hidden": "only the strongest probe tried, refitted on attacked items, still finds it",
    "gone": "no probe tried finds it any more",
    "undecided": "the data are too few to tell",
    "no signal": "there was nothing to lose: the unattacked probe says no more than a constant",
}
"""What each verdict of the audit (DESIGN 3.3) says."""


@dataclass(frozen=True)
class Variant:
    """Behaviour free, or kept to a given epsilon (nats; ``None`` when every kept threat of the report has one)."""

    kept: bool
    epsilon: float | None = None

    def __str__(self) -> str:
        if not self.kept:
            return "free"
        return "kept" if self.epsilon is None else f"kept {self.epsilon:g}"


@dataclass(frozen=True)
class Row:
    """One line of the main table: a probe with behaviour free or kept, and its threats by column."""

    result: StressResult
    variant: Variant
    cells: Mapping[str, ThreatResult]
    first: bool
    second: bool
    last: bool


def columns(results: Iterable[StressResult]) -> list[Threat]:
    """The unconstrained threats, in order of appearance: a kept threat shares the column of its free one."""
    found: dict[str, Threat] = {}
    for result in results:
        for threat in result.threats.values():
            found.setdefault(threat.threat.free.name, threat.threat.free)
    return list(found.values())


def rows(results: Sequence[StressResult]) -> list[Row]:
    """One row per probe and variant, kept right below free."""
    several = _several_epsilons(results)
    found = []
    for result in results:
        variants: dict[Variant, dict[str, ThreatResult]] = {}
        for threat in result.threats.values():
            epsilon = threat.epsilon if several and threat.threat.kept else None
            variants.setdefault(Variant(threat.threat.kept, epsilon), {})[threat.threat.free.name] = threat
        ordered = sorted(variants, key=lambda v: (v.kept, v.epsilon or 0.0))
        found += [Row(result, v, variants[v], i == 0, i == 1, v is ordered[-1]) for i, v in enumerate(ordered)]
    return found


def free_and_kept(result: StressResult, free: Threat) -> tuple[ThreatResult | None, ThreatResult | None]:
    """A column's threat with behaviour free and (the first epsilon, if several) kept."""
    found = [t for t in result.threats.values() if t.threat.free.name == free.name]
    picked = [next((t for t in found if t.threat.kept is kept), None) for kept in (False, True)]
    return picked[0], picked[1]


def plainest(result: StressResult) -> tuple[ThreatResult | None, ThreatResult | None]:
    """Per item, natural, Gaussian: free and kept."""
    return free_and_kept(result, Threat())


def heading(threat: Threat) -> tuple[str, str, str]:
    """Three short words for a column: scope, prior, tail."""
    scope = "per item" if threat.scope == "item" else "universal"
    if threat.scope == "universal" and threat.metric == "auroc":
        scope = "universal (AUROC)"
    prior = "natural" if threat.prior == "natural" else f"isotropic {threat.c:g}"
    tail = {"gaussian": "Gaussian", "logistic": "logistic", "student_t": "Student t", "best": "best tail"}[threat.tail]
    return scope, prior, tail


def sentence(threat: Threat) -> str:
    """A threat in words."""
    scope = "each item gets its own move" if threat.scope == "item" else "one move for all items"
    prior = (
        "moves drawn as the model's own varying thoughts about the same thing"
        if threat.prior == "natural"
        else f"moves equally likely in every direction (c = {threat.c:g})"
    )
    tail = {
        "gaussian": "a Gaussian tail",
        "logistic": "an elliptical logistic tail",
        "student_t": "an elliptical Student-t tail",
        "best": "the heavy tail that fits best",
    }[threat.tail]
    kept = "behaviour must be kept" if threat.kept else "behaviour may change"
    return f"{scope}; {prior}, with {tail}; {kept}"


def bits_text(bits: Bits | None, *, compact: bool = False) -> str:
    """Bits with kind and 95% interval; ``compact`` rounds the interval outward to whole bits."""
    if bits is None:
        return "-"
    if bits.kind is Kind.CENSORED:
        # the median is beyond the search, yet a resample of the items may put it within
        low = f" {interval((bits.low, bits.high), whole=compact)}" if bits.low < bits.value else ""
        return f">= {bits.value:.1f}{low}"
    if bits.kind is Kind.DISTANCE:
        return f"d {float(beta_of_bits(bits.value)):.2f}"
    if bits.kind is Kind.LOWER_BOUND:
        return f">= {bits.value:.1f} (bound)"
    if bits.kind is Kind.UPPER_BOUND:
        return f"<= {bits.value:.1f} (bound)"
    if bits.low == bits.high or (math.isinf(bits.value) and math.isinf(bits.low)):
        return number(bits.value)
    return f"{number(bits.value)} {interval((bits.low, bits.high), whole=compact)}"


def interval(bounds: tuple[float, float], *, whole: bool = False, digits: int = 1) -> str:
    """``[low, high]``; ``whole`` rounds outward, so that the printed interval still holds the true one."""
    if whole:
        low, high = (f(b) if math.isfinite(b) else b for f, b in zip((math.floor, math.ceil), bounds, strict=True))
        return f"[{number(low, 0)},{number(high, 0)}]"
    return f"[{number(bounds[0], digits)}, {number(bounds[1], digits)}]"


def number(x: float | None, digits: int = 1) -> str:
    """A number with fixed digits; unknown is ``-``, infinity ``inf``."""
    if x is None or math.isnan(x):
        return "-"
    return f"{x:.{digits}f}" if math.isfinite(x) else ("inf" if x > 0 else "-inf")


def nats(x: float | None) -> str:
    """A behaviour shift in five characters: 0.004, 12.3."""
    return number(x, 3 if x is None or x < 9.9995 else 1)


def count(n: float) -> str:
    """A count in at most four characters or so: 812, 1.2k, 35k, 4.1M."""
    if math.isnan(n):
        return "-"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.1f}{letter}" if n < 10 * size else f"{n / size:.0f}{letter}"
    return f"{n:.0f}"


def draws(bits: float) -> str:
    """How many prior draws give best-of-N an even chance against B bits, in words."""
    if not math.isfinite(bits):
        return "no number of prior draws suffices"
    log_n = max(0.0, best_of_n_half_chance(bits))
    if log_n < 0.5:
        return "a single prior draw has an even chance"
    n = f"{2**log_n:,.0f}" if log_n < 14 else f"2^{log_n:.1f}"
    return f"the best of about {n} prior draws has an even chance"


def flags_in(row: Row) -> list[Flag]:
    """Every flag of a row: of its threats and their attacks, and on the first row also the probe's own."""
    found = list(row.result.flags) if row.first else []
    for threat in row.cells.values():
        found += threat.flags
        found += [f for attack in threat.attacks for f in attack.flags]
    return found


def codes(flags: Iterable[Flag]) -> list[str]:
    """Distinct flag codes, red ones first, in the catalogue's order."""
    raised = {f.name: f for f in flags}
    ordered = sorted(raised.values(), key=lambda f: (not f.red, list(CATALOGUE).index(f.name)))
    return [FLAG_CODES.get(f.name, f.name[:2].upper()) for f in ordered]


def _several_epsilons(results: Iterable[StressResult]) -> bool:
    for result in results:
        seen = [t.threat.free.name for t in result.threats.values() if t.threat.kept]
        if len(seen) != len(set(seen)):
            return True
    return False
