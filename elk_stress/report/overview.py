"""One page for many probes: every headline with its interval, what is certified below it, what attacks show above it.

``bits.png`` has a panel per threat and a line per probe. A filled circle is the headline with behaviour free, an open
one with behaviour kept; the bar is its 95% interval. An upright tick is the certified half-life, which no attack can
undercut, given the prior; a cross the least upper bound that an attack proved (universal threats; per item the bound of
the item in the middle is not the half-life's, and is not drawn). A headline beyond the search, or infinite, stands at
the right edge as a triangle. The axis is linear up to 1 bit and logarithmic beyond.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from elk_stress.core.bits import Bits, Kind
from elk_stress.core.printable import code, label
from elk_stress.report import words
from elk_stress.report.plots import blank, title_and_legend
from elk_stress.report.sections import table
from elk_stress.thoughts.result import StressResult, ThreatResult

__all__ = ["bits", "certificates"]

_FREE, _KEPT, _SURE = "#0072B2", "#D55E00", "#009E73"


def bits(results: Sequence[StressResult]) -> Figure:
    """Headlines of all probes under all threats."""
    threats = words.columns(results)
    figure = blank(2.1 + 2.5 * max(2, len(threats)), 1.5 + 0.27 * max(4, len(results)))
    axes = figure.subplots(1, len(threats), sharey=True, squeeze=False)[0]
    for axis, free in zip(axes, threats, strict=True):
        pairs = [words.free_and_kept(result, free) for result in results]
        shown = [t for pair in pairs for t in pair if t is not None]
        most = max([x for t in shown for x in _finite(t)], default=2.0)
        # intervals that reach far beyond every headline end at the edge
        top = 1.15 * max([most, *(min(t.headline.high, 3 * most) for t in shown if math.isfinite(t.headline.high))])
        for line, pair in enumerate(pairs):
            both = all(t is not None for t in pair)
            for threat, colour, off in zip(pair, (_FREE, _KEPT), (-0.13, 0.13), strict=True):
                if threat is not None:
                    _headline(axis, threat.headline, line + off * both, colour, threat.threat.kept, top)
            _limits(axis, [t for t in pair if t is not None], line)
        axis.set_xscale("symlog", linthresh=1.0, linscale=0.4)
        axis.set_xlim(-0.05, max(top, 2.0))
        ticks = [t for t in (0, 1, 3, 10, 30, 100, 300) if t < top]
        axis.set_xticks(ticks, [str(t) for t in ticks])
        axis.axvline(1, color="0.75", lw=0.8, zorder=0)
        scope, prior, tail = words.heading(free)
        axis.set_title(f"{scope}, {prior}\n{tail}", fontsize=9.5)
        axis.set_xlabel("bits", fontsize=9)
    axes[0].set_yticks(
        range(len(results)), [f"{label(r.probe)} ({r.detection.auroc:.2f})" for r in results], fontsize=8.5
    )
    axes[0].invert_yaxis()
    title_and_legend(
        figure,
        f"Bits of optimization that each probe survives (clean AUROC): {label(results[0].testbed)} at "
        f"{label(results[0].site)}",
        _legend(results),
    )
    for axis in axes:
        axis.grid(axis="x", color="0.92", lw=0.8)
    return figure


def certificates(results: Sequence[StressResult]) -> list[str]:
    """The table of certified bits; a sentence where no probe has any."""
    names = [name for name in _names(results) if any(_certified(r, name) is not None for r in results)]
    if not names:
        return ["No probe here says how steep it is, or no threat has Gaussian tails per item."]
    body = []
    for result in results:
        cells = [_certified(result, name) for name in names]
        if any(cell is not None for cell in cells):
            body.append([code(result.probe), *("-" if c is None else f">= {words.number(c.value)}" for c in cells)])
    return [
        "Half-life that no attack can undercut, known or not, from how steep the score is (isoperimetric inequality; "
        "all caught items together at 95%), *given* threshold, origins and the estimated prior: it says nothing of how "
        "well these are known, which the interval of the headline does. A linear probe's is its closed form.",
        "",
        *table(["probe", *(code(name) for name in names)], body),
    ]


def _names(results: Sequence[StressResult]) -> list[str]:
    return list(dict.fromkeys(name for result in results for name in result.threats))


def _certified(result: StressResult, name: str) -> Bits | None:
    return result.threats[name].certified if name in result.threats else None


def _finite(threat: ThreatResult) -> list[float]:
    return [x for x in (threat.headline.value, threat.headline.low) if math.isfinite(x)]


def _headline(axis: Any, found: Bits, y: float, colour: str, kept: bool, top: float) -> None:
    face = "white" if kept else colour
    beyond = found.kind is Kind.CENSORED or not math.isfinite(found.value)
    right = min(found.high, top) if math.isfinite(found.high) else top
    axis.plot([min(found.low, top), right], [y, y], color=colour, lw=1.2, solid_capstyle="butt")
    at = min(found.value, 0.93 * top) if math.isfinite(found.value) else 0.93 * top
    axis.plot(at, y, marker=">" if beyond else "o", color=colour, mfc=face, ms=5, ls="none")


def _limits(axis: Any, threats: Sequence[ThreatResult], y: float) -> None:
    sure = [t.certified.value for t in threats if t.certified is not None and math.isfinite(t.certified.value)]
    if sure:
        axis.plot(max(sure), y, marker="|", color=_SURE, ms=10, mew=2, ls="none")
    for threat in threats:
        proved = [a.upper_bound.value for a in threat.attacks if a.upper_bound is not None]
        if threat.threat.scope == "universal" and proved:
            axis.plot(min(proved), y, marker="x", color=_KEPT if threat.threat.kept else _FREE, ms=5, ls="none")


def _legend(results: Sequence[StressResult]) -> list[Any]:
    every = [t for r in results for t in r.threats.values()]
    found: list[Any] = [Line2D([], [], color=_FREE, marker="o", ms=5, label="behaviour free, 95% interval")]
    if any(t.threat.kept for t in every):
        found.append(Line2D([], [], color=_KEPT, marker="o", mfc="white", ms=5, label="behaviour kept"))
    if any(not math.isfinite(t.headline.value) or t.headline.kind is Kind.CENSORED for t in every):
        found.append(Line2D([], [], color="0.3", marker=">", ls="none", ms=5, label="beyond the search"))
    if any(t.certified is not None for t in every):
        found.append(Line2D([], [], color=_SURE, marker="|", mew=2, ls="none", ms=10, label="certified"))
    if any(a.upper_bound is not None for t in every if t.threat.scope == "universal" for a in t.attacks):
        found.append(Line2D([], [], color="0.3", marker="x", ls="none", ms=5, label="least bound of an attack"))
    return found
