"""The parts of ``report.md`` that are tables: each function returns the lines of one part."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from elk_stress.core.bits import GUARANTEES, Bits
from elk_stress.core.flags import CATALOGUE, Flag
from elk_stress.core.printable import code, markdown
from elk_stress.report import words
from elk_stress.thoughts.comparison import Comparison
from elk_stress.thoughts.result import AttackResult, StressResult, ThreatResult

__all__ = [
    "COMPARED",
    "attacks",
    "audit",
    "best_of_n",
    "comparisons",
    "controls",
    "detection",
    "figure",
    "flags",
    "guarantees",
    "incidental",
    "main_table",
    "probability",
    "sensitivity",
    "table",
    "tails",
]

COMPARED = (
    "same items, contexts and negatives; bits kept per positive, the area under recall(b), so that catching little is "
    "not rewarded; Holm-adjusted over the table"
)


def main_table(results: Sequence[StressResult]) -> list[str]:
    threats = words.columns(results)
    head = ["probe", "clean AUROC", "recall", "audit", "behaviour"]
    head += [" ".join(words.heading(t)) for t in threats] + ["flags"]
    body = []
    for row in words.rows(results):
        seen, audit = row.result.detection, row.result.audit
        own = (
            [code(row.result.probe), f"{seen.auroc:.2f}", f"{seen.recall:.2f}", audit.verdict if audit else "-"]
            if row.first
            else [""] * 4
        )
        bits = [words.bits_text(row.cells[t.name].headline) if t.name in row.cells else "" for t in threats]
        body.append([*own, str(row.variant), *bits, " ".join(words.codes(words.flags_in(row)))])
    return [
        *table(head, body),
        "",
        "Per item: half-life, the bits at which half of the catches are lost. Universal: B at half advantage, between "
        "the clean metric and that of a constant. `>=` is censored (at least); `d` is a distance in u, not bits. "
        "Columns answer different questions: never rank across them.",
    ]


def figure(figures: Sequence[str], name: str, alt: str) -> list[str]:
    return ["", f"![{alt}]({name})"] if name in figures else []


def guarantees() -> list[str]:
    return [
        "For an attacker who moves from the prior to q, with a = q(failure) and B the bits of that event (of one item, "
        "or of the universal move; a half-life is the median over items):",
        "",
        *table(["budget", "guarantee", "strength"], [[budget, f"`{g}`", s] for budget, g, s in GUARANTEES]),
        "",
        "An attacker who knows where to go needs no luck: a deterministic one has infinite divergence and can jump "
        "straight to the nearest failure. So read bits beside the queries and gradients of the best attack.",
    ]


def detection(results: Sequence[StressResult]) -> list[str]:
    body = []
    for result in results:
        d = result.detection
        body.append([
            code(result.probe),
            f"{d.auroc:.3f} {words.interval(d.auroc_interval, digits=3)}",
            f"{d.recall:.2f} {words.interval(d.recall_interval, digits=2)}",
            f"{d.fpr:.3f}",
            f"{d.fpr_measured:.3f} {words.interval(d.fpr_interval, digits=3)}",
            f"{d.threshold:.4g}",
            f"{d.n_caught}/{d.n_positives}",
            str(d.n_negatives),
        ])  # fmt: skip
    return table(
        ["probe", "AUROC", "recall", "fpr set", "fpr measured", "threshold", "caught", "calibration negatives"], body
    )


def controls(measured: Mapping[str, Mapping[str, Bits] | str]) -> list[str]:
    if not measured:
        return ["None apply to this testbed."]
    threats = list(dict.fromkeys(t for row in measured.values() if not isinstance(row, str) for t in row))
    body = [
        [
            code(name),
            *([markdown(row)] + [""] * (len(threats) - 1) if isinstance(row, str) else _bits_of(row, threats)),
        ]
        for name, row in measured.items()
    ]
    return [
        *table(["control", *(code(t) for t in threats)], body),
        "",
        "`rock` is a constant, `random_direction` knows nothing; `oracle` reads what behaviour depends on and must "
        "survive, `paper` is a planted incidental probe and must break cheaply (where the testbed knows them).",
    ]


def _bits_of(row: Mapping[str, Bits], threats: Sequence[str]) -> list[str]:
    return [words.bits_text(row.get(t)) for t in threats]


def audit(results: Sequence[StressResult]) -> list[str]:
    body, notes = [], dict[str, None]()
    for result in results:
        audit = result.audit
        if audit is None:
            body.append([code(result.probe), "not run", "", "", ""])
            continue
        notes[f"*{audit.verdict}*: {words.VERDICTS.get(audit.verdict, '')}."] = None
        clean = f"{audit.clean.gain:+.3f}"
        for i, s in enumerate(audit.stages):
            stage = f"{s.stage} ({markdown(audit.strongest)})" if s.stage == "strongest" else s.stage
            cells = [stage, f"{s.log_loss:.3f}", f"{s.gain:+.3f} {words.interval((s.low, s.high), digits=3)}"]
            body.append(
                [f"{code(result.probe)} (clean {clean})" if i == 0 else "", *cells, audit.verdict if i == 0 else ""]
            )
    return [
        "Log-loss in nats per item on attacked test items, and its gain over a constant. The verdict is the first "
        "stage that keeps at least half of the clean gain (lower end of the interval).",
        "",
        *table(["probe", "stage", "log-loss", "gain over the rock", "verdict"], body),
        "",
        *(f"- {note}" for note in notes),
    ]


def incidental(results: Sequence[StressResult]) -> list[str]:
    """Share of each probe that behaviour does not look at, beside its bits when behaviour must be kept."""
    body = []
    for result in results:
        if result.incidental is None or math.isnan(result.incidental.value):
            continue
        share, free, kept = result.incidental, *words.plainest(result)
        given = "-" if kept is None or kept.b_given_kept is None else words.bits_text(kept.b_given_kept)
        body.append(
            [
                code(result.probe),
                f"{share.value:.2f} [{share.low:.2f}, {share.high:.2f}]",
                f"{share.rank} of {share.dim}",
                "-" if free is None else words.bits_text(free.headline),
                "-" if kept is None else words.bits_text(kept.headline),
                given,
            ]
        )
    if not body:
        return ["No probe has a gradient and an output beside it."]
    head = ["probe", "incidental fraction", "behaviour reads", "half-life, free", "half-life, kept", "given kept"]
    return [
        "The share of a probe's gradient, in the metric of natural thoughts, that lies where behaviour does not look: "
        "0 for an oracle, 1 for a probe that the model can fool without changing what it does. A behaviour form that "
        "is sampled on a real model has finite rank, and what it has not seen counts as ignored.",
        "",
        *table(head, body),
    ]


def attacks(results: Sequence[StressResult]) -> list[str]:
    lines = [
        "An attack only proposes; the engine re-scores and decides. Bits belong to the threat; an attack bounds them "
        "at most. Success: by any of its candidates; first: by the one that it thinks best, before the probe's verdict "
        "on any. Benign: the share that as many random moves of the same length break. Queries and gradients: "
        "activations scored per attacked item. AUROC after and left: the probe's, and the audit's verdict, once an "
        "attack has changed how the model thinks about all items; one shift of them all leaves a linear probe's AUROC. "
        "Shift with a star: of the whole model as it then runs, not of a move at the site; after the stroke, what "
        "counts as kept. A probe can be broken at its threshold and still tell the classes apart (left: still works). "
        "No bound: too few of the draws around the attack's moves fail and keep. Bits spent: of a selection among "
        "draws of the attack's own prior, or on average (KL).",
    ]
    head = [
        "threat",
        "attack",
        "access",
        "success",
        "first, of",
        "AUROC after",
        "left",
        "shift (nats)",
        "benign",
        "length in u",
        "queries",
        "gradients",
        "bits spent",
    ]
    head += ["upper bound on B", "flags"]
    for result in results:
        body = [_attack_row(t, a) for t in result.threats.values() for a in t.attacks]
        if body:
            lines += ["", f"### {code(result.probe)}", "", *table(head, body)]
    return lines


def _attack_row(threat: ThreatResult, a: AttackResult) -> list[str]:
    name = [code(threat.threat.name), markdown(a.attack), markdown(a.access)]
    if a.status != "ok":
        return [*name, f"not run: {markdown(a.status)}", *[""] * 11]
    share = f"{a.success:.0%} [{a.success_interval[0]:.0%}, {a.success_interval[1]:.0%}]"
    if threat.threat.scope == "universal":
        share = "broke it" if a.success >= 0.5 else "held"
    star = "*" if a.judged == "model" and a.shift is not None else ""
    kept = "" if a.epsilon is None else f" / {words.number(a.epsilon, 4)}"
    kind = " (KL)" if a.spent is not None and a.spent_as == "kl" else ""
    return [
        *name,
        share,
        "-" if math.isnan(a.first) else f"{a.first:.0%}, {a.candidates}",
        words.number(a.auroc, 2),
        # what behaviour does not allow has left everything as it was
        "-" if a.audit is None or (a.epsilon is not None and a.success == 0) else a.audit.verdict,
        f"{words.number(a.shift, 4)}{star}{kept}",
        "-" if a.benign_success is None else f"{a.benign_success:.0%}",
        words.number(a.length, 2),
        words.count(a.queries),
        words.count(a.gradients),
        f"{words.number(a.spent)}{kind}",
        words.number(a.upper_bound.value) if a.upper_bound else "-",
        " ".join(words.codes(a.flags)),
    ]


def tails(results: Sequence[StressResult]) -> list[str]:
    """Fitted tails by direction group; the same for every probe but along its own direction."""
    seen: dict[tuple[str, ...], list[str]] = {}
    best = dict.fromkeys(markdown(r.tails["best_elliptical"]) for r in results if "best_elliptical" in r.tails)
    for result in results:
        groups = result.tails.get("groups", {})
        for group, fit in groups.items():
            figures = (markdown(fit.get("winner", "-")), *(_figure_of(fit.get(key)) for key in _TAIL_FIGURES))
            seen.setdefault((markdown(group), *figures), []).append(result.probe)
    if not seen:
        notes = dict.fromkeys(markdown(r.tails["note"]) for r in results if "note" in r.tails)
        return [f"No tail was fitted{': ' + '; '.join(notes) if notes else ''}."]
    everyone = len(results)
    body = [
        ["all" if len(probes) == everyone else ", ".join(code(p) for p in probes), *row] for row, probes in seen.items()
    ]
    return [
        "Fitted by likelihood along groups of directions. `best` in a threat's name is the heavy tail that fits best "
        f"over all groups: {', '.join(best) or 'none'}. Below about 2, `clustered z` says that the contexts do not "
        "settle which tail wins.",
        "",
        *table(["probes", "directions", "winner", *(key.replace("_", " ") for key in _TAIL_FIGURES)], body),
    ]


_TAIL_FIGURES = ("nu", "clustered_z", "skewness", "excess_kurtosis", "bimodality", "scale_ratio")


def _figure_of(value: Any) -> str:
    return words.number(value, 2) if isinstance(value, (int, float)) else "-"


def sensitivity(results: Sequence[StressResult]) -> list[str]:
    body: list[list[str]] = []
    for result in results:
        for name, t in result.threats.items():
            most = float(result.config.get("max_bits", math.inf))
            cells = [_series(values, most) for values in (t.scale, t.tails, t.shrink, t.epsilons)]
            bare = t.bare_threshold
            extra = "-" if bare is None or math.isnan(bare) else f"{_capped(bare, most)} (uncalibrated)"
            kept = "-" if t.b_kept is None else words.bits_text(t.b_kept)
            given = "-" if t.b_given_kept is None else words.bits_text(t.b_given_kept)
            if any(cell != "-" for cell in (*cells, extra, kept, given)):
                body.append([code(result.probe), code(name), *cells, kept, given, extra])
    head = [
        "probe",
        "threat",
        "x prior's scale",
        "other tails",
        "x shrinkage",
        "x epsilon",
        "B_kept",
        "B_given_kept",
        "bare threshold",
    ]
    lines = [
        "The headline at multiples (left of each colon) of the prior's scale, under other tails of the same "
        "covariance, and at multiples of its shrinkage and of the behaviour epsilon. B_joint, the headline where "
        "behaviour is kept, is B_kept plus B_given_kept for each item.",
        "",
    ]
    return lines + (table(head, body) if body else ["Not computed in this run."])


def _series(values: Mapping[str, float], most: float) -> str:
    if all(math.isnan(v) for v in values.values()):
        return "-"
    return "; ".join(f"{k}: {_capped(float(v), most)}" for k, v in values.items())


def _capped(bits: float, most: float) -> str:
    # the engine stops at max_bits: there and beyond the number says at least
    return f">= {most:.1f}" if most <= bits < math.inf else words.number(bits)


def best_of_n(results: Sequence[StressResult]) -> list[str]:
    body = []
    for result in results:
        for curves in result.best_of_n:
            at = [i for i in range(len(curves.observed.x)) if math.log2(curves.observed.x[i]).is_integer()]
            for i in (at[:: max(1, (len(at) - 1) // 2)] or at)[-3:]:
                n = curves.observed.x[i]
                predicted = [
                    f"{tail} {p.value[i]:.0%} [{p.low[i]:.0%}, {p.high[i]:.0%}]"
                    for tail, p in curves.predicted.items()
                    if i < len(p.x) and p.x[i] == n
                ]
                o = curves.observed
                seen = f"{o.value[i]:.0%} [{o.low[i]:.0%}, {o.high[i]:.0%}]"
                p = f"{max(curves.p_values.values()):.2f}" if curves.p_values else "-"
                kind = "kept" if curves.kept else "free"
                body.append([code(result.probe), kind, f"{n:.0f}", "; ".join(predicted), seen, p])
    if not body:
        return ["Not observed: it takes a testbed with real contexts."]
    lines = [
        "Share of caught items that the best of n contexts breaks. The prediction uses training items and contexts A, "
        "the observation test items and contexts B, at the same epsilon. p: the share of whole curves simulated from "
        "the prediction (of the better tail) that lie at least as far out as the observed one.",
        "",
    ]
    tails = [
        f"{code(result.probe)} {curves.left_tail.a:.2f} [{curves.left_tail.interval[0]:.2f}, "
        f"{curves.left_tail.interval[1]:.2f}]"
        for result in results
        for curves in result.best_of_n
        if curves.left_tail is not None
    ]
    exponents = ["", f"Exponents of the power law in n, from per-item chances: {', '.join(tails)}."] if tails else []
    return lines + table(["probe", "behaviour", "n", "predicted", "observed", "p"], body) + exponents


def comparisons(rows: Sequence[Comparison]) -> list[str]:
    if not rows:
        return ["None: fewer than two probes share a threat."]
    body = [
        [
            code(row.a),
            code(row.b),
            code(row.threat),
            f"{row.headline:+.1f} {words.interval(row.headline_interval)}",
            f"{row.kept:+.1f} {words.interval(row.kept_interval)}",
            probability(row.p),
            probability(row.holm),
            code(row.better) if row.better else "undecided",
        ]
        for row in rows
    ]
    return [
        f"First minus second ({COMPARED}). This is the only place where one probe is said to survive more than "
        "another. Censored headlines count as the largest number of bits searched.",
        "",
        *table(["first", "second", "threat", "headline", "bits kept", "p", "adjusted p", "survives more"], body),
    ]


def flags(results: Sequence[StressResult]) -> list[str]:
    raised: dict[str, list[tuple[str, Flag]]] = {}
    for where, f in (pair for result in results for pair in result.all_flags):
        raised.setdefault(f.name, []).append((where, f))
    if not raised:
        return ["None was raised."]
    lines = []
    for name in sorted(raised, key=lambda n: (not CATALOGUE[n].red, list(CATALOGUE).index(n))):
        entry = CATALOGUE[name]
        colour = "red" if entry.red else "note"
        lines += [
            f"**{name}** ({words.FLAG_CODES.get(name, '')}, {colour}). Raised if {entry.raised_if}. "
            f"What to do: {entry.what_to_do}.",
            "",
            *(f"- {markdown(where)}{f': {markdown(f.detail)}' if f.detail else ''}" for where, f in raised[name]),
            "",
        ]
    return lines[:-1]


def probability(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(str(c).replace("|", "\\|").replace("\n", " ") for c in cells) + " |"

    return [line(head), line(["---"] * len(head)), *(line(row) for row in body)]
