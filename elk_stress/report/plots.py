r"""Figures: what each probe still catches after b bits, best-of-n as predicted and observed, and the incidental share.

``survival.png``: one panel per threat (columns) with behaviour free or kept (rows), never two threats in one panel;
recall(b) over all positives, since conditioning on the caught rewards a probe that catches little. Bands are pointwise
95% intervals; dotted lines are the best and worst case over items whose search failed early; a line that ends in an
open triangle is censored there (``max_bits``): nothing is known beyond.

``best_of_n.png``: share of caught items that the best of n real contexts breaks, against log2 n. Lines are the
prior's predictions, one per tail; points with bars are the observation on test items under other contexts. A panel
with fewer contexts than a grid value stops there.

``incidental.png``: each probe's half-life against its incidental fraction, behaviour free (filled) or kept (open).

Every probe has its own colour, line style and marker, so that the figures read in grey. Matplotlib is used through
its object interface with the Agg canvas: no global state, no display.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from elk_stress.core.printable import label
from elk_stress.report import words
from elk_stress.thoughts.result import BestOfNCurves, Curve, StressResult, ThreatResult
from elk_stress.threats.threat import Threat

__all__ = ["COLOURS", "LINES", "best_of_n", "blank", "incidental", "save", "survival", "title_and_legend"]

# Okabe-Ito, ordered so that neighbours differ in lightness
COLOURS = ("#0072B2", "#E69F00", "#000000", "#CC79A7", "#009E73", "#D55E00", "#56B4E9", "#8C8C00")
LINES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)), (0, (9, 2)), (0, (3, 3)))
_MARKERS = "osD^vPX*"
_TAILS: Mapping[str, Any] = {
    "gaussian": "-",
    "logistic": (0, (5, 1.6)),
    "student_t": (0, (1.2, 1.2)),
    "power_law": (0, (6, 1.5, 1.2, 1.5)),
}


def survival(results: Sequence[StressResult]) -> Figure:
    """recall(b) of every probe, a panel per threat; universal threats show their metric at b bits."""
    threats = words.columns(results)
    kept = [False, True] if any(t.threat.kept for r in results for t in r.threats.values()) else [False]
    figure = blank(3.1 * max(2, len(threats)) + 0.6, 2.75 * len(kept) + 1.25)
    axes = figure.subplots(len(kept), len(threats), sharey=True, squeeze=False)
    for i, is_kept in enumerate(kept):
        for j, free in enumerate(threats):
            axis = axes[i][j]
            shown = [_pick(result, free, is_kept) for result in results]
            _survival_panel(axis, shown)
            if i == 0:
                axis.set_title(_title(free), fontsize=9.5)
            if i == len(kept) - 1:
                axis.set_xlabel("bits of optimization b")
        said = "behaviour kept" if is_kept else "behaviour free"
        axes[i][0].set_ylabel(f"{said}\nrecall(b)" if len(kept) > 1 else "recall(b)")
        axes[i][0].yaxis.set_major_formatter(PercentFormatter(1.0))
    fpr = results[0].detection.fpr
    title_and_legend(
        figure,
        f"What each probe still catches after b bits: {label(results[0].testbed)} at {label(results[0].site)}, "
        f"{fpr:.0%} false positives",
        [_handle(r.probe, k) for k, r in enumerate(results)] + _explained(results),
    )
    return figure


def best_of_n(results: Sequence[StressResult]) -> Figure | None:
    """Predicted (lines, per tail) and observed (points) best-of-n; ``None`` if no result has any."""
    having = [(k, result) for k, result in enumerate(results) if result.best_of_n]
    if not having:
        return None
    kept = sorted({curves.kept for _, result in having for curves in result.best_of_n})
    curves = [c for _, r in having for b in r.best_of_n for c in (b.observed, *b.predicted.values())]
    # one scale for all panels; small shares are worth seeing
    top = min(1.0, max(0.1, 1.1 * max(float(c.high.max()) for c in curves)))
    figure = blank(2.5 * max(2, len(having)) + 1.2, 2.5 * len(kept) + 1.35)
    axes = figure.subplots(len(kept), len(having), sharey=True, sharex=True, squeeze=False)
    for i, is_kept in enumerate(kept):
        for j, (k, result) in enumerate(having):
            axis = axes[i][j]
            found = next((curves for curves in result.best_of_n if curves.kept is is_kept), None)
            if found is None:
                axis.text(0.5, 0.5, "not observed", ha="center", va="center", transform=axis.transAxes, color="0.4")
            else:
                _best_of_n_panel(axis, found, COLOURS[k % len(COLOURS)])
            if i == 0:
                axis.set_title(label(result.probe), fontsize=10)
            if i == len(kept) - 1:
                axis.set_xlabel("bits spent, log2 n")
        said = "behaviour kept" if is_kept else "behaviour free"
        axes[i][0].set_ylabel(f"{said}\ncatches broken")
        axes[i][0].yaxis.set_major_formatter(PercentFormatter(1.0))
        axes[i][0].set_ylim(-0.03 * top, 1.03 * top)
    tails = list(dict.fromkeys(tail for _, r in having for curves in r.best_of_n for tail in curves.predicted))
    handles: list[Any] = [
        Line2D([], [], color="0.3", ls=_tail_line(tail), label=f"predicted, {_predicted(tail)}") for tail in tails
    ]
    handles.append(Patch(color="0.8", label="95% interval of the prediction"))
    handles.append(Line2D([], [], color="black", marker="o", mfc="white", ls="none", label="observed, 95% interval"))
    n = max(curves.n_contexts for _, r in having for curves in r.best_of_n)
    title_and_legend(figure, f"Best of n of {n} real contexts, predicted and observed", handles)
    return figure


def incidental(results: Sequence[StressResult]) -> Figure | None:
    """Half-life against the incidental fraction, one point per probe and behaviour; ``None`` if nothing is known.

    A half-life that is infinite stands above all others, and says so.
    """
    having = [
        (k, result, *words.plainest(result))
        for k, result in enumerate(results)
        if result.incidental is not None and not math.isnan(result.incidental.value)
    ]
    if not having:
        return None
    figure = blank(5.4, 4.4)
    axis = figure.subplots()
    known = [t.headline for _, _, *pair in having for t in pair if t is not None]
    ceiling = 1.1 * max([x for b in known for x in (b.value, b.high) if math.isfinite(x)], default=1.0)
    for k, result, *pair in having:
        share = result.incidental
        assert share is not None
        for threat, filled in zip(pair, (True, False), strict=True):
            if threat is None:
                continue
            bits = threat.headline
            colour = COLOURS[k % len(COLOURS)]
            if math.isinf(bits.value):
                marker = _MARKERS[k % len(_MARKERS)]
                axis.plot(share.value, ceiling, marker, color=colour, mfc=colour if filled else "white", ms=6)
                axis.annotate("infinite", (share.value, ceiling), (8, -3), textcoords="offset points", fontsize=8)
                continue
            high = bits.high if math.isfinite(bits.high) else bits.value
            axis.errorbar(
                share.value, bits.value, yerr=[[bits.value - bits.low], [high - bits.value]],
                xerr=[[share.value - share.low], [share.high - share.value]], fmt=_MARKERS[k % len(_MARKERS)],
                color=colour, mfc=colour if filled else "white", lw=0.9, ms=6,
            )  # fmt: skip
    axis.set_xlim(-0.03, 1.03)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("incidental fraction: the share that behaviour does not look at")
    axis.set_ylabel("half-life, bits")
    handles: list[Any] = [_handle(result.probe, k) for k, result, *_ in having]
    handles.append(Line2D([], [], color="0.3", marker="o", ls="none", label="behaviour free"))
    handles.append(Line2D([], [], color="0.3", marker="o", mfc="white", ls="none", label="behaviour kept"))
    title_and_legend(
        figure, f"Bits and what they rest on: {label(results[0].testbed)} at {label(results[0].site)}", handles
    )
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a PNG without dates or versions inside, so that the same figure is the same file."""
    FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        # a name in letters that the font lacks, shown as boxes
        warnings.filterwarnings("ignore", "Glyph")
        figure.savefig(path, dpi=150, metadata={"Software": None})


def _survival_panel(axis: Any, shown: Sequence[ThreatResult | None]) -> None:
    right = 0.0
    for k, threat in enumerate(shown):
        if threat is None or len(threat.curve.x) == 0:
            continue
        curve, colour = threat.curve, COLOURS[k % len(COLOURS)]
        known = _known(curve)
        x = curve.x[known]
        axis.fill_between(x, curve.low[known], curve.high[known], color=colour, alpha=0.16, lw=0)
        axis.plot(x, curve.value[known], color=colour, ls=LINES[k % len(LINES)], lw=1.7)
        for bound in (curve.worst[known], curve.best[known]):
            if not np.allclose(bound, curve.value[known], atol=1e-9):
                axis.plot(x, bound, color=colour, ls=":", lw=0.8)
        _mark(axis, x, curve.value[known], k, len(shown))
        if _ends_alive(curve):
            axis.plot(
                x[-1:], curve.value[known][-1:], marker=">", ms=7, mfc="white", mec=colour, ls="none", clip_on=False
            )
        right = max(right, _extent(curve))
    if not any(t is not None and len(t.curve.x) for t in shown):
        axis.text(0.5, 0.5, "not run", ha="center", va="center", transform=axis.transAxes, color="0.4")
    axis.set_xlim(0, right * 1.03 if right > 0 else 1)
    axis.set_ylim(-0.02, 1.02)
    axis.axvline(1, color="0.75", lw=0.8, zorder=0)


def _best_of_n_panel(axis: Any, curves: BestOfNCurves, colour: str) -> None:
    for tail, curve in curves.predicted.items():
        x = np.log2(curve.x)
        axis.fill_between(x, curve.low, curve.high, color=colour, alpha=0.14, lw=0)
        axis.plot(x, curve.value, color=colour, ls=_tail_line(tail), lw=1.6)
    seen = curves.observed
    at = _spaced(seen.x)
    x = np.log2(seen.x[at])
    bars = np.stack([np.maximum(seen.value - seen.low, 0), np.maximum(seen.high - seen.value, 0)])[:, at]
    axis.errorbar(
        x, seen.value[at], yerr=bars, fmt="o", ms=4.5, mfc="white", color="black", ecolor="0.35", lw=1, capsize=2
    )
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _spaced(n: np.ndarray) -> np.ndarray:
    """Indices of about two points for each doubling of n, and the last one."""
    wanted = {round(2 ** (j / 2)) for j in range(2 * int(np.log2(n.max())) + 1)} | {int(n.max())}
    return np.flatnonzero(np.isin(n, list(wanted)))


def _known(curve: Curve) -> np.ndarray:
    return curve.x <= curve.censored_from


def _extent(curve: Curve) -> float:
    """Where a curve has fallen to 1% of its start: bits beyond show nothing; a surviving curve keeps its whole grid."""
    known = _known(curve)
    if not known.any():
        return 0.0
    value = curve.high[known]
    above = np.flatnonzero(value > max(0.01, 0.02 * float(curve.value[0])) + float(value.min()))
    last = min(int(above[-1]) + 1, len(value) - 1) if len(above) else 0
    alive = curve.value[known][-1] > 0.05 * max(float(curve.value[0]), 1e-9)
    return float(curve.x[known][-1] if alive else curve.x[known][last])


def _mark(axis: Any, x: np.ndarray, y: np.ndarray, k: int, n: int) -> None:
    # markers at places that differ from probe to probe, so that coinciding lines stay apart
    if len(x) > 1:
        step = max(1, len(x) // 9)
        at = np.arange((k * step) // max(1, n), len(x), step)
        axis.plot(x[at], y[at], ls="none", marker=_MARKERS[k % len(_MARKERS)], ms=4.5, color=COLOURS[k % len(COLOURS)])


def _explained(results: Sequence[StressResult]) -> list[Any]:
    """Legend entries for what the figure shows besides the lines: only what is there."""
    curves = [t.curve for result in results for t in result.threats.values() if len(t.curve.x)]
    found: list[Any] = [Patch(color="0.8", label="95% interval")]
    if any(not np.allclose(bound, c.value, atol=1e-9) for c in curves for bound in (c.worst, c.best)):
        found.append(Line2D([], [], color="0.4", lw=0.8, ls=":", label="best and worst case"))
    if any(_ends_alive(c) for c in curves):
        found.append(Line2D([], [], color="0.4", ls="none", marker=">", mfc="white", ms=7, label="unknown beyond"))
    return [*found, Line2D([], [], color="0.75", lw=0.8, label="1 bit: brittle below")]


def _ends_alive(curve: Curve) -> bool:
    value = curve.value[_known(curve)]
    return math.isfinite(curve.censored_from) and len(value) > 0 and bool(value[-1] > 0.005)


def _pick(result: StressResult, free: Threat, kept: bool) -> ThreatResult | None:
    return words.free_and_kept(result, free)[int(kept)]


def _title(threat: Threat) -> str:
    scope, prior, tail = words.heading(threat)
    return f"{scope}, {prior}\n{tail}"


def _predicted(tail: str) -> str:
    return "power law of items' chances" if tail == "power_law" else f"{tail.replace('_', ' ')} tail"


def _tail_line(tail: str) -> Any:
    return _TAILS.get(tail, (0, (6, 1.5, 1.2, 1.5)))


def _handle(name: str, k: int) -> Line2D:
    return Line2D(
        [], [], color=COLOURS[k % len(COLOURS)], ls=LINES[k % len(LINES)], marker=_MARKERS[k % len(_MARKERS)],
        ms=4.5, lw=1.7, label=label(name),
    )  # fmt: skip


def blank(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def title_and_legend(figure: Figure, title: str, handles: Sequence[Any]) -> None:
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    columns = max(2, min(len(handles), int(figure.get_figwidth() / 2.2)))
    figure.legend(
        handles=list(handles),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=9,
        handlelength=3.2,
    )
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="0.92", lw=0.8)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=8.5)
