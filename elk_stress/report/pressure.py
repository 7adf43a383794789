"""Training pressure in tables, words and one figure.

One row per probe and defender mode: what it was worth, what breaking it needs (B) and what the attack spent, the benign
control beside it, what was left. The figure shows AUROC against bits, the attacked probe beside refitted and held-out
ones, one panel per probe; the benign control is a cross. No ranking except the paired comparisons below.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from elk_stress.core.bits import Bits, Kind
from elk_stress.core.flags import CATALOGUE
from elk_stress.core.printable import code, label, markdown, printable
from elk_stress.report.sections import table
from elk_stress.training.comparison import per_point
from elk_stress.training.result import PressureResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console

    from elk_stress.training.run_result import TrainingRun

__all__ = ["COLUMNS", "figure", "report", "row", "show"]

COLUMNS = (
    "probe",
    "mode",
    "clean AUROC",
    "B, bits needed",
    "bits spent",
    "efficiency",
    "B per point",
    "benign AUROC",
    "refit AUROC",
    "verdict",
    "left",
)


def row(result: PressureResult) -> list[str]:
    """One line of the main table, as text; the columns are :data:`COLUMNS`."""
    benign = "-" if result.benign is None else _number(float(np.nanmean(result.benign.auroc)))
    return [
        result.probe,
        result.mode,
        _number(float(result.clean.mean())),
        "-" if result.bits is None else _bits(result.bits.headline),
        _bits(result.headline),
        _number(_median(result.efficiency)),
        _per_point(result),
        benign,
        _number(float(result.curves["refit"].value[-1])),
        result.verdict,
        result.audits[-1].verdict if result.audits else "-",
    ]


def show(console: Console, run: TrainingRun) -> None:
    """Print the main table, comparisons and flags."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    if run.results:
        first = run.results[0]
        title = f"Training pressure: {run.testbed} at {first.site}, {first.attack}; threat {first.threat}"
        made = Table(
            title=Text(printable(title)),
            title_justify="left",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            pad_edge=False,
        )
        for head in COLUMNS:
            made.add_column(head.replace(" ", "\n", 1), no_wrap=True)
        for result in run.results:
            made.add_row(*(Text(printable(cell)) for cell in row(result)))
        console.print(made)
        console.print(_LEGEND, style="dim")
        for comparison in run.comparisons:
            console.print(Text(f"  {printable(comparison)}"))
        for result in run.results:
            for flag in result.flags:
                kind = "red flag" if flag.red else "note"
                console.print(Text(f"  {kind}: {printable(f'{result.name}: {flag}; {flag.entry.what_to_do}')}"))


_LEGEND = (
    "Bits needed: B at half advantage under the weight prior, a property of the probe; bits spent: what the attack had "
    "spent when the probe had lost half of its advantage; medians over models with 95% intervals; >=: at least. "
    "Efficiency: best known B / bits spent. B per point: of clean AUROC above chance. Benign: the same steps without "
    "the probe. Refit: the probe fitted anew on the attacked model, at the end of the pressure curve. "
    "Left: what the audit "
    "found there."
)


def report(run: TrainingRun) -> str:
    """The whole report as Markdown."""
    site = f" at {code(run.results[0].site)}" if run.results else ""
    lines = [f"# Training pressure: {code(run.testbed)}{site}", "", _status(run), ""]
    if run.results:
        parts = {
            "Probes under pressure": [
                *table(COLUMNS, [[markdown(row(r)[0]), *row(r)[1:]] for r in run.results]),
                "",
                _LEGEND,
            ],
            "Pressure curves": ["![AUROC against bits spent](pressure.png)", "", *_curves(run.results)],
            "What was left along the curve": _audits(run.results),
            "Benign control": _benign(run.results),
            "Over-optimization": _forms(run.results),
            "B against the prior's scale": _scales(run.results),
            "Paired comparisons": [f"- {markdown(c)}" for c in run.comparisons]
            or ["Fewer than two probes: nothing to compare."],
            "What the attack itself examined": _extra(run.results),
            "Flags": _flags(run.results),
        }
        for title, part in parts.items():
            if part:
                lines += [f"## {title}", "", *part, ""]
    if run.failures:
        lines += [
            "## Not run",
            "",
            *(f"- {code(name)} **failed**: {markdown(why)}" for name, why in run.failures.items()),
            "",
        ]
    lines += ["## Configuration", "", *_configuration(run), ""]
    return "\n".join(printable(line) for line in "\n".join(lines).split("\n"))


def figure(results: Sequence[PressureResult]) -> Figure:
    """AUROC against bits spent: a panel per row."""
    from elk_stress.report.plots import COLOURS, LINES, blank

    columns = min(4, len(results))
    rows = math.ceil(len(results) / columns)
    made = blank(3.1 * max(2, columns) + 0.4, 2.7 * rows + 0.9)
    axes = made.subplots(rows, columns, sharey=True, squeeze=False)
    for axis in axes.flat[len(results) :]:
        axis.set_visible(False)
    names = list(dict.fromkeys(name for r in results for name in _shown(r)))
    for axis, result in zip(axes.flat, results, strict=False):
        for name, curve in _shown(result).items():
            k = names.index(name)
            x = np.maximum(curve.x, _least(curve.x))
            axis.plot(x, curve.value, color=COLOURS[k % len(COLOURS)], ls=LINES[k % len(LINES)], label=name)
            axis.fill_between(x, curve.low, curve.high, color=COLOURS[k % len(COLOURS)], alpha=0.15, lw=0)
        if result.benign is not None:
            axis.plot(
                np.nanmean(result.benign.spent), np.nanmean(result.benign.auroc), "kx", ms=7, label="benign control"
            )
        if result.bits is not None and result.bits.headline.kind is Kind.ESTIMATE:
            axis.axvline(result.bits.headline.value, color="0.5", lw=0.8, ls=":")
        axis.axhline(float(result.tau.mean()), color="0.8", lw=0.8)
        axis.set_xscale("log")
        axis.set_ylim(-0.02, 1.02)
        axis.set_title(f"{label(result.probe)} ({result.mode})", fontsize=9.5)
        axis.set_xlabel("bits spent")
    for line in axes:
        line[0].set_ylabel("AUROC")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    made.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)), fontsize=8, frameon=False)
    made.suptitle(
        f"{label(results[0].testbed)}: {label(results[0].attack)}; behaviour kept; dotted: bits needed; "
        "grey: half advantage",
        fontsize=9.5,
    )
    return made


def _shown(result: PressureResult) -> dict[str, Any]:
    """Curves of a panel: the attacked probe, the refitted one, and the held-out ones' mean."""
    held = [c for name, c in result.curves.items() if name not in (*result.against, "refit")]
    found = {"attacked probe": result.curves[result.probe], "refitted": result.curves["refit"]}
    if held:
        from dataclasses import replace

        mean = {side: np.mean([getattr(c, side) for c in held], axis=0) for side in ("value", "low", "high")}
        found["held-out probes"] = replace(held[0], **mean)
    return found


def _least(x: np.ndarray) -> float:
    positive = x[x > 0]
    return float(positive.min()) * 0.7 if positive.size else 1.0


def _status(run: TrainingRun) -> str:
    what = f"{len(run.results)} rows in {run.seconds:.0f} s, seed {run.seed}."
    if run.results:
        what += f" Threat: {code(run.results[0].threat)}."
    return what if run.status == "ok" else f"**This run is {run.status}**: {what}"


def _curves(results: Sequence[PressureResult]) -> list[str]:
    lines: list[str] = []
    for result in results:
        names = list(result.curves)
        curve = result.curves[result.probe]
        chosen = np.unique(np.linspace(0, len(curve.x) - 1, 9).round().astype(int))
        body = []
        for name in names:
            each = result.curves[name]
            at = np.interp(curve.x[chosen], each.x, each.value)
            low, high = (np.interp(curve.x[chosen], each.x, side) for side in (each.low, each.high))
            body.append(
                [markdown(name), *(f"{v:.2f} [{a:.2f}, {b:.2f}]" for v, a, b in zip(at, low, high, strict=True))]
            )
        head = [f"{code(result.name)}: bits", *(f"{b:.0f}" for b in curve.x[chosen])]
        lines += [*table(head, body), ""]
    return lines


def _audits(results: Sequence[PressureResult]) -> list[str]:
    body = []
    for result in results:
        for point in result.audits:
            gains = ", ".join(f"{stage} {gain:.2f}" for stage, gain in point.gains.items())
            verdicts = ", ".join(f"{name} {n}" for name, n in point.verdicts.items())
            body.append([markdown(result.name), f"{point.bits:.0f}", point.verdict, verdicts, gains])
    return table(["row", "bits", "verdict", "models", "gain over a constant, nats"], body)


def _benign(results: Sequence[PressureResult]) -> list[str]:
    body = [
        [
            markdown(r.name),
            _number(float(r.clean.mean())),
            _number(float(np.nanmean(r.benign.auroc))),
            f"{np.nanmean(r.benign.spent):.0f}",
            _number(float(np.nanmean(r.benign.shift)), 4),
            f"{r.benign.broke:.0%}",
        ]
        for r in results
        if r.benign is not None
    ]
    return table(["row", "clean AUROC", "AUROC after", "bits", "shift, nats", "models broken"], body) if body else []


def _forms(results: Sequence[PressureResult]) -> list[str]:
    body = [
        [
            markdown(r.name),
            markdown(form.drop),
            f"{form.r2['best_of_n']:.2f}",
            f"{form.r2['reinforcement']:.2f}",
            f"{form.wins} of {form.n_models}",
            form.better,
        ]
        for r in results
        for form in r.overoptimization
    ]
    head = [
        "row",
        "drop of",
        "R2 of d(a - b d)",
        "R2 of d(a - b log d)",
        "models won by the first",
        "better",
    ]
    return [*table(head, body), "", "R2 is cross-validated over models: each model is predicted from the others."]


def _scales(results: Sequence[PressureResult]) -> list[str]:
    seen: dict[str, PressureResult] = {}
    for result in results:
        if result.bits is not None and result.bits.scale:
            seen.setdefault(result.probe, result)
    if not seen:
        return []
    curves = {name: r.bits.scale for name, r in seen.items() if r.bits is not None}
    scales = list(next(iter(curves.values())))
    body = [[markdown(name), *(_number(curve[s], 0) for s in scales)] for name, curve in curves.items()]
    return table(["probe", *(f"{s} x scale" for s in scales)], body)


def _extra(results: Sequence[PressureResult]) -> list[str]:
    lines: list[str] = []
    for result in results:
        rows = result.extra.get("rows") if isinstance(result.extra, dict) else None
        if rows:
            head = list(rows[0])
            lines += [
                code(result.name),
                "",
                *table(head, [[markdown(_cell(r[h])) for h in head] for r in rows]),
                "",
            ]
    return lines


def _cell(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _flags(results: Sequence[PressureResult]) -> list[str]:
    body = [
        [markdown(r.name), f.name, markdown(f.detail), CATALOGUE[f.name].what_to_do] for r in results for f in r.flags
    ]
    return table(["row", "flag", "seen", "what to do"], body) if body else ["No flag was raised."]


def _configuration(run: TrainingRun) -> list[str]:
    settings = {**run.config, **{k: v for k, v in run.description.items() if k != "calibration"}}
    return table(["setting", "value"], [[markdown(k), markdown(str(v)[:200])] for k, v in settings.items()])


def _per_point(result: PressureResult) -> str:
    """Bits needed per point of clean AUROC; a bound on B has no such figure of its own."""
    bounded = result.bits is not None and result.bits.headline.kind is Kind.UPPER_BOUND
    return "-" if bounded else _number(_median(per_point(result, "needed")))


def _bits(bits: Bits) -> str:
    if bits.kind is Kind.CENSORED:
        return f">= {bits.value:.0f}"
    if bits.kind is Kind.UPPER_BOUND:
        return f"<= {bits.value:.0f}"
    high = "inf" if math.isinf(bits.high) else f"{bits.high:.0f}"
    return f"{bits.value:.0f} [{max(bits.low, 0.0):.0f}, {high}]"


def _number(value: float, digits: int = 2) -> str:
    return "-" if not math.isfinite(value) else f"{value:.{digits}f}"


def _median(values: np.ndarray) -> float:
    finite = np.asarray(values)[np.isfinite(values)]
    return float(np.median(finite)) if finite.size else math.nan
