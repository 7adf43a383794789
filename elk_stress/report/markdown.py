"""``report.md``: the run in words, then every figure that a reader needs to believe it or not.

Order: what was found and why to believe it; the tables; what bits guarantee; detection, controls, audit, attacks;
tails, and B against scale, shrinkage and epsilon; best-of-n predicted beside observed; paired comparisons; flags with
what to do; what was not run; configuration. Nothing here ranks probes except a paired comparison, and no distance is
printed as bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from elk_stress.bits import GUARANTEES, Bits, Kind
from elk_stress.flags import CATALOGUE, Flag
from elk_stress.report import words
from elk_stress.result import AttackResult, StressResult, ThreatResult, plain

if TYPE_CHECKING:
    from elk_stress.comparison import Comparison
    from elk_stress.run import RunResult

__all__ = ["report"]


def report(run: RunResult, figures: Sequence[str] = ("survival.png", "best_of_n.png")) -> str:
    """The whole report as Markdown; ``figures`` are the files beside it that were written."""
    results = run.results
    site = f" at `{results[0].site}`" if results else ""
    lines = [f"# Bits of optimization that each probe survives: `{run.testbed}`{site}", "", _status(run), ""]
    if results:
        parts: list[tuple[str, Callable[[], list[str]]]] = [
            ("What was found", lambda: _found(run)),
            ("Why believe it, or not", lambda: _belief(run)),
            ("Probes and threats", lambda: _main_table(results) + _figure(figures, "survival.png", "recall(b)")),
            ("What these bits guarantee", _guarantees),
            ("Detection when nobody attacks", lambda: _detection(results)),
            ("Controls", lambda: _controls(run.controls)),
            ("What was left after the break", lambda: _audit(results)),
            ("Attacks", lambda: _attacks(results)),
            ("Tails", lambda: _tails(results)),
            ("How bits depend on scale, shrinkage and epsilon", lambda: _sensitivity(results)),
            (
                "Best of n: predicted beside observed",
                lambda: _best_of_n(results) + _figure(figures, "best_of_n.png", "best of n"),
            ),
            ("Paired comparisons", lambda: _comparisons(run)),
            ("Flags", lambda: _flags(results)),
        ]
        for title, part in parts:
            lines += [f"## {title}", "", *part(), ""]
    if run.skipped or run.failures:
        lines += ["## Not run", "", *_not_run(run), ""]
    lines += ["## Configuration", "", *_configuration(run), ""]
    return "\n".join(lines)


def _status(run: RunResult) -> str:
    n = len(run.results)
    what = f"{n} probe{'s' if n != 1 else ''} stressed in {run.seconds:.0f} s, seed {run.seed}."
    if run.status == "ok":
        return what
    return f"**This run is {run.status}**: {what} What is below is complete for the probes it names."


def _found(run: RunResult) -> list[str]:
    first = next(iter(run.results[0].threats.values()))
    lines = [
        f"Threat `{first.threat.name}`: {words.sentence(first.threat)}. Probes stand in the order of the run, which is "
        "no ranking.",
        "",
    ]
    for result in run.results:
        lines.append(f"- {_sentence(result)}")
    compared = [row for row in run.comparisons if row.threat == first.threat.name]
    decided = [row for row in compared if row.better is not None]
    lines += ["", f"Compared in pairs, under `{first.threat.name}` ({_COMPARED}):", ""]
    if decided:
        lines += [f"- {_difference(row)}." for row in decided]
        if len(decided) < len(compared):
            lines.append(f"- the other {len(compared) - len(decided)} pairs do not differ beyond chance.")
    elif compared:
        lines.append("- no two probes differ beyond chance.")
    else:
        lines.append("- nothing was compared, so no probe is said to survive more than another.")
    return lines


def _sentence(result: StressResult) -> str:
    seen, (name, threat) = result.detection, next(iter(result.threats.items()))
    head = (
        f"`{result.probe}`: clean AUROC {seen.auroc:.2f}, catches {seen.recall:.0%} of positives "
        f"({seen.n_caught} of {seen.n_positives}) at {seen.fpr:.0%} false positives"
    )
    if seen.n_caught == 0:
        return f"{head}: it has no bits to lose."
    bits = threat.headline
    lost = "half of its catches are lost" if threat.threat.scope == "item" else "half of its advantage is lost"
    if threat.status != "ok" and bits.value <= 0:
        return f"{head}; not measured under `{name}`: {threat.status}."
    if bits.kind is Kind.CENSORED:
        text = f"more than half still stand at **{bits.value:.1f} bits**, where the search ended"
    elif bits.kind is Kind.DISTANCE:
        text = f"only a distance is known: {words.bits_text(bits)} in u (no number of bits)"
    elif math.isinf(bits.value):
        text = f"{lost} at no number of bits"
    else:
        text = f"{lost} at **{words.bits_text(bits)} bits**, about what {words.draws(bits.value)} from the prior does"
        if bits.value < 1:
            text += "; that is brittle: ordinary variation breaks it and no attack is needed"
    kept = words.free_and_kept(result, threat.threat.free)[1]
    if kept is not None and kept is not threat:
        text += f". With behaviour kept: {words.bits_text(kept.headline)}"
        if kept.epsilon is not None:
            text += f" (shift at most {kept.epsilon:.2g} nats)"
    if result.audit is not None:
        verdict = result.audit.verdict
        text += f". After the break: *{verdict}*, {words.VERDICTS.get(verdict, 'see the audit')}"
    return f"{head}; {text}."


def _difference(row: Comparison) -> str:
    """A decided comparison in words, the better probe first."""
    turned = row.better == row.b
    sign, worse = (-1, row.a) if turned else (1, row.b)
    kept = words.interval(_turn(row.kept_interval, turned))
    return (
        f"`{row.better}` keeps {sign * row.kept:.1f} {kept} more bits per positive than `{worse}` (adjusted p "
        f"{_p(row.holm)}); its headline is {sign * row.headline:+.1f} "
        f"{words.interval(_turn(row.headline_interval, turned))} bits away"
    )


def _turn(bounds: tuple[float, float], turned: bool) -> tuple[float, float]:
    return (-bounds[1], -bounds[0]) if turned else bounds


def _belief(run: RunResult) -> list[str]:
    raised = [(where, f) for result in run.results for where, f in result.all_flags]
    red = [f for _, f in raised if f.red]
    bounds = [a for r in run.results for t in r.threats.values() for a in t.attacks if a.upper_bound is not None]
    broken = sum(f.name == "bounds_violated" for _, f in raised)
    inside, total = _coverage(run.results)
    lines = []
    if run.controls:
        lines.append(f"- Controls: {'; '.join(_control_words(name, row) for name, row in run.controls.items())}.")
    if bounds:
        verb = "none contradicts" if not broken else f"**{broken} contradict**"
        lines.append(f"- {len(bounds)} rigorous upper bounds come from attacks; {verb} the estimate beside it.")
    if total:
        lines.append(
            f"- The prior predicts what real contexts do: the observed best-of-n interval meets the predicted one (any "
            f"tail) at {inside} of {total} points. The contexts and items that are observed were not used to predict."
        )
    lines.append(
        "- Intervals are 95%, over entities, contexts and calibration negatives together; thresholds hold under the "
        "prior and not only at the bare item."
    )
    names = ", ".join(f"`{n}`" for n in dict.fromkeys(f.name for f in red))
    lines.append(f"- Red flags raised: {len(red)} ({names}); see below." if red else "- No red flag was raised.")
    return lines


def _control_words(name: str, row: Mapping[str, Bits] | str) -> str:
    if isinstance(row, str):
        return f"`{name}`: {row}"
    return f"`{name}` {next((words.bits_text(b) for b in row.values()), '-')}"


def _coverage(results: Sequence[StressResult]) -> tuple[int, int]:
    inside = total = 0
    for curves in (c for r in results for c in r.best_of_n):
        seen = curves.observed
        for i in range(len(seen.x)):
            meets = [
                p.low[i] <= seen.high[i] and seen.low[i] <= p.high[i]
                for p in curves.predicted.values()
                if len(p.x) == len(seen.x) and p.x[i] == seen.x[i]
            ]
            if meets:
                inside, total = inside + any(meets), total + 1
    return inside, total


def _main_table(results: Sequence[StressResult]) -> list[str]:
    threats = words.columns(results)
    head = ["probe", "clean AUROC", "recall", "audit", "behaviour"]
    head += [" ".join(words.heading(t)) for t in threats] + ["flags"]
    body = []
    for row in words.rows(results):
        seen, audit = row.result.detection, row.result.audit
        own = (
            [f"`{row.result.probe}`", f"{seen.auroc:.2f}", f"{seen.recall:.2f}", audit.verdict if audit else "-"]
            if row.first
            else [""] * 4
        )
        bits = [words.bits_text(row.cells[t.name].headline) if t.name in row.cells else "" for t in threats]
        body.append([*own, str(row.variant), *bits, " ".join(words.codes(words.flags_in(row)))])
    return [
        *_table(head, body),
        "",
        "Per item: half-life, the bits at which half of the catches are lost. Universal: B at half advantage, between "
        "the clean metric and that of a constant. `>=` is censored (at least); `d` is a distance in u, not bits. "
        "Columns answer different questions: never rank across them.",
    ]


def _figure(figures: Sequence[str], name: str, alt: str) -> list[str]:
    return ["", f"![{alt}]({name})"] if name in figures else []


def _guarantees() -> list[str]:
    return [
        "For an attacker who moves from the prior to q, with a = q(failure) and B the bits of that event (of one item, "
        "or of the universal move; a half-life is the median over items):",
        "",
        *_table(["budget", "guarantee", "strength"], [[budget, f"`{g}`", s] for budget, g, s in GUARANTEES]),
        "",
        "An attacker who knows where to go needs no luck: a deterministic one has infinite divergence and can jump "
        "straight to the nearest failure. So read bits beside the queries and gradients of the best attack.",
    ]


def _detection(results: Sequence[StressResult]) -> list[str]:
    body = []
    for result in results:
        d = result.detection
        body.append([
            f"`{result.probe}`",
            f"{d.auroc:.3f} {words.interval(d.auroc_interval, digits=3)}",
            f"{d.recall:.2f} {words.interval(d.recall_interval, digits=2)}",
            f"{d.fpr:.3f}",
            f"{d.fpr_measured:.3f} {words.interval(d.fpr_interval, digits=3)}",
            f"{d.threshold:.4g}",
            f"{d.n_caught}/{d.n_positives}",
            str(d.n_negatives),
        ])  # fmt: skip
    return _table(
        ["probe", "AUROC", "recall", "fpr set", "fpr measured", "threshold", "caught", "calibration negatives"], body
    )


def _controls(controls: Mapping[str, Mapping[str, Bits] | str]) -> list[str]:
    if not controls:
        return ["None apply to this testbed."]
    threats = list(dict.fromkeys(t for row in controls.values() if not isinstance(row, str) for t in row))
    body = [
        [f"`{name}`", *([row] + [""] * (len(threats) - 1) if isinstance(row, str) else _bits_of(row, threats))]
        for name, row in controls.items()
    ]
    return [
        *_table(["control", *(f"`{t}`" for t in threats)], body),
        "",
        "`rock` is a constant, `random_direction` knows nothing; `oracle` reads what behaviour depends on and must "
        "survive, `paper` is a planted incidental probe and must break cheaply (where the testbed knows them).",
    ]


def _bits_of(row: Mapping[str, Bits], threats: Sequence[str]) -> list[str]:
    return [words.bits_text(row.get(t)) for t in threats]


def _audit(results: Sequence[StressResult]) -> list[str]:
    body, notes = [], dict[str, None]()
    for result in results:
        audit = result.audit
        if audit is None:
            body.append([f"`{result.probe}`", "not run", "", "", ""])
            continue
        notes[f"*{audit.verdict}*: {words.VERDICTS.get(audit.verdict, '')}."] = None
        clean = f"{audit.clean.gain:+.3f}"
        for i, s in enumerate(audit.stages):
            stage = f"{s.stage} ({audit.strongest})" if s.stage == "strongest" else s.stage
            cells = [stage, f"{s.log_loss:.3f}", f"{s.gain:+.3f} {words.interval((s.low, s.high), digits=3)}"]
            body.append(
                [f"`{result.probe}` (clean {clean})" if i == 0 else "", *cells, audit.verdict if i == 0 else ""]
            )
    return [
        "Log-loss in nats per item on attacked test items, and its gain over a constant. The verdict is the first "
        "stage that keeps at least half of the clean gain (lower end of the interval).",
        "",
        *_table(["probe", "stage", "log-loss", "gain over the rock", "verdict"], body),
        "",
        *(f"- {note}" for note in notes),
    ]


def _attacks(results: Sequence[StressResult]) -> list[str]:
    lines = [
        "An attack only proposes; the engine re-scores and decides. Bits belong to the threat; an attack bounds them "
        "at most. Medians per problem. Benign: the share that random moves of the same length break.",
    ]
    head = [
        "threat",
        "attack",
        "success",
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
            lines += ["", f"### `{result.probe}`", "", *_table(head, body)]
    return lines


def _attack_row(threat: ThreatResult, a: AttackResult) -> list[str]:
    name = [f"`{threat.threat.name}`", a.attack]
    if a.status != "ok":
        return [*name, f"not run: {a.status}", *[""] * 8]
    share = f"{a.success:.0%} [{a.success_interval[0]:.0%}, {a.success_interval[1]:.0%}]"
    if threat.threat.scope == "universal":
        share = "broke it" if a.success >= 0.5 else "held"
    return [
        *name, share, words.number(a.shift, 2), "-" if a.benign_success is None else f"{a.benign_success:.0%}",
        words.number(a.length, 2), words.count(a.queries),
        words.count(a.gradients), words.number(a.spent), words.number(a.upper_bound.value) if a.upper_bound else "-",
        " ".join(words.codes(a.flags)),
    ]  # fmt: skip


def _tails(results: Sequence[StressResult]) -> list[str]:
    lines = ["Fitted by likelihood, per group of directions; the winner is what `best` means in a threat's name.", ""]
    # the same testbed gives every probe the same tails except along the probe's own direction
    seen: dict[str, list[str]] = {}
    for result in results:
        for group, fit in result.tails.items():
            seen.setdefault(f"{group}: {_words_of(fit)}", []).append(result.probe)
    body = []
    for text, probes in seen.items():
        group, fit = text.split(": ", 1)
        body.append(["all" if len(probes) == len(results) else ", ".join(f"`{p}`" for p in probes), group, fit])
    return lines + (_table(["probes", "directions", "fit"], body) if body else ["No tail was fitted."])


def _words_of(value: Any) -> str:
    value = plain(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_words_of(v)}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(_words_of(v) for v in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _sensitivity(results: Sequence[StressResult]) -> list[str]:
    body: list[list[str]] = []
    for result in results:
        for name, t in result.threats.items():
            cells = [_series(t.scale), _series(t.shrink), _series(t.epsilons)]
            extra = f"{words.number(t.bare_threshold)} (uncalibrated)" if t.bare_threshold is not None else "-"
            kept = "-" if t.b_kept is None else words.bits_text(t.b_kept)
            given = "-" if t.b_given_kept is None else words.bits_text(t.b_given_kept)
            if any(cell != "-" for cell in (*cells, extra, kept, given)):
                body.append([f"`{result.probe}`", f"`{name}`", *cells, kept, given, extra])
    head = [
        "probe",
        "threat",
        "x prior's scale",
        "x shrinkage",
        "x epsilon",
        "B_kept",
        "B_given_kept",
        "bare threshold",
    ]
    lines = [
        "The headline at multiples (left of each colon) of the prior's scale, of its shrinkage and of the behaviour "
        "epsilon. B_joint, the headline where behaviour is kept, is B_kept plus B_given_kept for each item.",
        "",
    ]
    return lines + (_table(head, body) if body else ["Not computed in this run."])


def _series(values: Mapping[str, float]) -> str:
    return "; ".join(f"{k}: {words.number(float(v))}" for k, v in values.items()) or "-"


def _best_of_n(results: Sequence[StressResult]) -> list[str]:
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
                body.append(
                    [f"`{result.probe}`", "kept" if curves.kept else "free", f"{n:.0f}", "; ".join(predicted), seen]
                )
    if not body:
        return ["Not observed: it takes a testbed with real contexts."]
    lines = [
        "Share of caught items that the best of n contexts breaks. The prediction uses training items and contexts A, "
        "the observation test items and contexts B, at the same epsilon.",
        "",
    ]
    return lines + _table(["probe", "behaviour", "n", "predicted", "observed"], body)


_COMPARED = (
    "same items, contexts and negatives; bits kept per positive, the area under recall(b), so that catching little is "
    "not rewarded; Holm-adjusted over the table"
)


def _comparisons(run: RunResult) -> list[str]:
    if not run.comparisons:
        return ["None: fewer than two probes share a threat."]
    body = [
        [
            f"`{row.a}`",
            f"`{row.b}`",
            f"`{row.threat}`",
            f"{row.headline:+.1f} {words.interval(row.headline_interval)}",
            f"{row.kept:+.1f} {words.interval(row.kept_interval)}",
            _p(row.p),
            _p(row.holm),
            f"`{row.better}`" if row.better else "undecided",
        ]
        for row in run.comparisons
    ]
    return [
        f"First minus second ({_COMPARED}). This is the only place where one probe is said to survive more than "
        "another. Censored headlines count as the largest number of bits searched.",
        "",
        *_table(["first", "second", "threat", "headline", "bits kept", "p", "adjusted p", "survives more"], body),
    ]


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _flags(results: Sequence[StressResult]) -> list[str]:
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
            *(f"- {where}{f': {f.detail}' if f.detail else ''}" for where, f in raised[name]),
            "",
        ]
    return lines[:-1]


def _not_run(run: RunResult) -> list[str]:
    lines = [f"- `{name}` does not apply: {reason}" for name, reason in run.skipped.items()]
    return lines + [f"- `{name}` **failed**: {reason}" for name, reason in run.failures.items()]


def _configuration(run: RunResult) -> list[str]:
    rows = [[f"{part}: {key}", _words_of(value)] for part, record in _parts(run) for key, value in record.items()]
    return _table(["setting", "value"], [["seed", str(run.seed)], *rows])


def _parts(run: RunResult) -> list[tuple[str, Mapping[str, Any]]]:
    return [("run", run.config), ("testbed", run.description), ("version", run.versions)]


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(str(c).replace("|", "\\|").replace("\n", " ") for c in cells) + " |"

    return [line(head), line(["---"] * len(head)), *(line(row) for row in body)]
