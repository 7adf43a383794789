"""The two tables of a run: probes x threats, and the attacks on each probe. Readable at 100 columns.

A kept threat (behaviour must be kept) stands right below its free one, in the same column. Flags are two letters; a
legend below each table says when each was raised and what to do. The order of probes is the order of the run, and no
ranking: that takes a paired comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from elk_stress.core.bits import Kind
from elk_stress.core.flags import CATALOGUE, Flag
from elk_stress.core.printable import printable
from elk_stress.report import words
from elk_stress.thoughts.result import AttackResult, StressResult, ThreatResult

__all__ = ["attack_table", "flag_legend", "probe_table", "show"]

_WIDE = 126
"""Columns from which on intervals are printed with a decimal."""


def show(
    console: Console,
    results: Sequence[StressResult],
    *,
    skipped: Mapping[str, Sequence[str]] | None = None,
    attacks: bool = True,
) -> None:
    """Print the main table, its legends, the attacks on each probe, and what was not run and why (reason -> names)."""
    if results:
        console.print(probe_table(results, width=console.width))
        for result in results:
            table = attack_table(result)
            if table is not None:
                console.print(table)
        console.print(flag_legend(f for result in results for _, f in result.all_flags))
    for reason, names in (skipped or {}).items():
        console.print(Text(printable(f"not run, since {reason}: {', '.join(names)}")))


def probe_table(results: Sequence[StressResult], *, width: int = 120) -> RenderableType:
    """Probes x threats: bits with a 95% interval, detection when nobody attacks, verdict of the audit, flags."""
    threats = words.columns(results)
    first = results[0]
    compact = width < _WIDE
    said = f"Bits of optimization that each probe survives: {first.testbed} at {first.site}"
    title = Text(printable(said), style="bold")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0 if compact else 1, 0, 0), pad_edge=False)
    table.add_column("probe\n audit", no_wrap=True)
    table.add_column("clean\nAUROC", justify="right", no_wrap=True)
    table.add_column("recall\nat fpr", justify="right", no_wrap=True)
    table.add_column("beha-\nviour", no_wrap=True)
    for threat in threats:
        table.add_column("\n".join(words.heading(threat)), no_wrap=True)
    table.add_column("flags", min_width=5, max_width=8)
    for row in words.rows(results):
        table.add_row(
            _name(row),
            words.number(row.result.detection.auroc, 2) if row.first else "",
            words.number(row.result.detection.recall, 2) if row.first else "",
            str(row.variant),
            *(_cell(row.cells.get(threat.name), compact=compact) for threat in threats),
            " ".join(words.codes(words.flags_in(row))),
            end_section=row.last,
        )
    return Group(title, table, _legend(results))


def attack_table(result: StressResult) -> RenderableType | None:
    """Every attack on one probe: what it achieved and cost, behaviour free and kept, below each threat's headline.

    ``None`` if no attack was run; those that do not apply are listed elsewhere, with the reason.
    """
    tried = [t for t in result.threats.values() if any(row.status == "ok" for row in t.attacks)]
    if not tried:
        return None
    labels = [label for label in ("free", "kept") if any(t.threat.kept == (label == "kept") for t in tried)]
    parts: list[RenderableType] = [
        Text(""),
        Text(printable(f"Attacks on {result.probe}"), style="bold"),
        _attack_header(labels),
    ]
    for free in words.columns([replace(result, threats={t.threat.name: t for t in tried})]):
        pair = dict(zip(("free", "kept"), words.free_and_kept(result, free), strict=True))
        chosen = [pair[label] for label in labels]
        named = " · ".join(f"{label} {words.bits_text(t.headline)}" for label, t in pair.items() if t)
        quantity = next(t.quantity for t in chosen if t)
        parts.append(Text(f" {', '.join(words.heading(free))}. {quantity}: {named}", style="italic"))
        table = _attack_columns(labels, header=False)
        for name in dict.fromkeys(row.attack for t in chosen if t for row in t.attacks if row.status == "ok"):
            table.add_row(Text(f"  {printable(name)}"), *_attack_cells([_find(t, name) for t in chosen], free.scope))
        parts.append(table)
    return Group(*parts)


def flag_legend(flags: Iterable[Flag]) -> RenderableType:
    """Raised flags only: code, name, raised if, what to do."""
    raised = {f.name: f for f in flags}
    if not raised:
        return Text("No flag was raised.")
    table = Table(title="Flags", box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0), pad_edge=False)
    for head in ("", "flag", "raised if", "what to do"):
        table.add_column(head)
    for code in words.codes(raised.values()):
        name = next(n for n in raised if words.codes([raised[n]]) == [code])
        entry = CATALOGUE[name]
        style = "red" if entry.red else ""
        table.add_row(Text(code, style=style), Text(name, style=style), entry.raised_if, entry.what_to_do)
    return table


def _name(row: words.Row) -> Text:
    audit = row.result.audit
    verdict = Text(printable(f"  {audit.verdict}") if audit is not None else "", style="italic")
    if not row.first:
        return verdict if row.second else Text("")
    name = Text(printable(row.result.probe), style="bold")
    # a probe with one row only has its verdict below its name in the same cell
    return Text("\n").join([name, verdict]) if row.last else name


def _cell(threat: ThreatResult | None, *, compact: bool) -> Text:
    if threat is None:
        return Text("")
    if threat.status != "ok" and threat.headline.kind is Kind.CENSORED and threat.headline.value <= 0:
        return Text("n/a", style="dim")
    style = "red" if any(f.red for f in threat.flags) else ""
    return Text(words.bits_text(threat.headline, compact=compact), style=style)


def _legend(results: Sequence[StressResult]) -> Text:
    detection = results[0].detection
    audit = " The line below a probe's name says what the audit found after the break." if _audited(results) else ""
    return Text(
        "Per item: half-life, the bits at which half of the catches are lost; universal: B at half advantage; with a "
        f"95% interval. Recall at {detection.fpr:.0%} false positives under the first threat; each prior has its own "
        f"threshold. Free: behaviour may change; kept: it may not. "
        f'">=": at least; "d": a distance, not bits.{audit} Columns answer different questions and are never ranked; '
        "neither are rows without a paired comparison.",
        style="dim",
    )


def _audited(results: Sequence[StressResult]) -> bool:
    return any(result.audit is not None for result in results)


def _find(threat: ThreatResult | None, attack: str) -> AttackResult | None:
    return None if threat is None else next((row for row in threat.attacks if row.attack == attack), None)


_MEASURES = ("success", "shift, nats", "queries", "gradients", "bound on B")


def _attack_columns(labels: Sequence[str], *, header: bool) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, show_header=header)
    table.add_column("  attack", width=20, no_wrap=True)
    table.add_column("access", width=8, no_wrap=True)
    for measure in _MEASURES:
        for label in labels:
            table.add_column(label, justify="right", width=_width(measure, labels), no_wrap=True)
    table.add_column("flags", width=8)
    return table


def _attack_header(labels: Sequence[str]) -> RenderableType:
    above = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, show_header=False)
    above.add_column(width=20)
    above.add_column(width=8)
    for measure in _MEASURES:
        above.add_column(justify="right", width=len(labels) * (_width(measure, labels) + 1) - 1, no_wrap=True)
    above.add_row("", "", *_MEASURES)
    return Group(above, _attack_columns(labels, header=True))


def _width(measure: str, labels: Sequence[str]) -> int:
    # two numbers share one heading; one number has it alone
    return (6 if measure == _MEASURES[-1] else 5) if len(labels) > 1 else len(measure)


def _attack_cells(pair: Sequence[AttackResult | None], scope: str) -> list[str | Text]:
    ran = [row if row is not None and row.status == "ok" else None for row in pair]

    def success(row: AttackResult) -> str:
        if scope == "universal":
            return "broke" if row.success >= 0.5 else "held"
        return f"{row.success:.0%}"

    measures: tuple[Callable[[AttackResult], str], ...] = (
        success,
        lambda row: words.nats(row.shift),
        lambda row: words.count(row.queries),
        lambda row: words.count(row.gradients),
        lambda row: "-" if row.upper_bound is None else words.number(row.upper_bound.value),
    )
    cells = ["-" if row is None else measure(row) for measure in measures for row in ran]
    return [
        Text(printable(next(row.access for row in ran if row is not None))),
        *cells,
        " ".join(words.codes(f for row in pair if row is not None for f in row.flags)),
    ]
