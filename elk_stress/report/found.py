"""The run in words: what was found, and why to believe it or not. Nothing ranks probes but a paired comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from elk_stress.core.bits import Bits, Kind
from elk_stress.core.printable import code, markdown
from elk_stress.report import words
from elk_stress.report.sections import COMPARED, probability
from elk_stress.thoughts.comparison import Comparison
from elk_stress.thoughts.result import StressResult

if TYPE_CHECKING:
    from elk_stress.thoughts.run_result import RunResult

__all__ = ["belief", "found"]


def found(run: RunResult) -> list[str]:
    first = next(iter(run.results[0].threats.values()))
    lines = [
        *_leaders(run),
        f"Threat {code(first.threat.name)}: {words.sentence(first.threat)}. Probes stand in the order of the run, "
        "which is no ranking.",
        "",
    ]
    for result in run.results:
        lines.append(f"- {_sentence(result)}")
    compared = [row for row in run.comparisons if row.threat == first.threat.name]
    decided = [row for row in compared if row.better is not None]
    lines += ["", f"Compared in pairs, under {code(first.threat.name)} ({COMPARED}):", ""]
    if decided:
        lines += [f"- {_difference(row)}." for row in decided]
        if rest := len(compared) - len(decided):
            lines.append(f"- {rest} other pair{'s do' if rest > 1 else ' does'} not differ beyond chance.")
    elif compared:
        lines.append("- no two probes differ beyond chance.")
    else:
        lines.append("- nothing was compared, so no probe is said to survive more than another.")
    elsewhere = sum(row.better is not None for row in run.comparisons if row.threat != first.threat.name)
    if elsewhere:
        lines.append(f"- Under other threats {elsewhere} pair{'s differ' if elsewhere > 1 else ' differs'}: see below.")
    return lines


def _leaders(run: RunResult) -> list[str]:
    """Per threat of the first column: the probes that no paired comparison puts behind another one."""
    first = next(iter(run.results[0].threats.values())).threat.free
    lines = []
    for threat in words.free_and_kept(run.results[0], first):
        rows = [row for row in run.comparisons if threat is not None and row.threat == threat.threat.name]
        if threat is None or not any(row.better for row in rows):
            continue
        beaten = {row.b if row.better == row.a else row.a for row in rows if row.better}
        standing = [name for name in dict.fromkeys(n for row in rows for n in (row.a, row.b)) if name not in beaten]
        said = f"With behaviour {'kept' if threat.threat.kept else 'free'}"
        quoted = [code(name) for name in standing]
        names = " and ".join([*filter(None, [", ".join(quoted[:-1])]), quoted[-1]])
        wins = {name: sum(row.better == name for row in rows) for name in standing}
        if len(standing) == 1 and wins[standing[0]] == len(beaten):
            lines += [f"**{said}, {names} survives more bits than every other probe.**", ""]
        else:
            one = f"{code(min(beaten))} is behind"
            others = "the others each survive fewer than some other probe" if len(beaten) > 1 else one
            lines += [f"**{said}, no probe is shown to survive more bits than {names}; {others}.**", ""]
    return lines


def _sentence(result: StressResult) -> str:
    seen, (name, threat) = result.detection, next(iter(result.threats.items()))
    head = (
        f"{code(result.probe)}: clean AUROC {seen.auroc:.2f}, catches {seen.recall:.0%} of positives "
        f"({seen.n_caught} of {seen.n_positives}) at {seen.fpr:.0%} false positives"
    )
    if seen.n_caught == 0:
        return f"{head}: it has no bits to lose."
    bits = threat.headline
    lost = "half of its catches are lost" if threat.threat.scope == "item" else "half of its advantage is lost"
    if threat.status != "ok" and bits.value <= 0:
        return f"{head}; not measured under {code(name)}: {markdown(threat.status)}."
    if bits.kind is Kind.CENSORED:
        text = f"more than half still stand at **{bits.value:.1f} bits**, where the search ended"
    elif bits.kind is Kind.DISTANCE:
        text = f"only a distance is known: {words.bits_text(bits)} in u (no number of bits)"
    elif math.isinf(bits.value):
        text = f"{lost} at no number of bits"
    else:
        text = f"{lost} at **{words.bits_text(bits)} bits** ({words.draws(bits.value)})"
        if bits.value < 1:
            text += "; that is brittle: ordinary variation breaks it and no attack is needed"
    kept = words.free_and_kept(result, threat.threat.free)[1]
    if kept is not None and kept is not threat:
        text += f". With behaviour kept: {words.bits_text(kept.headline)}"
        if kept.epsilon is not None:
            text += f" (shift at most {kept.epsilon:.2g} nats)"
    tried = [
        (t, t.broken_by()) for t in ((threat,) if kept is threat else (threat, kept)) if t is not None and t.broken_by()
    ]
    if tried:
        named = [f"{'kept' if t.threat.kept else 'free'}: {markdown(by)}" for t, by in tried]
        text += f". Attacks, least access first, {'; '.join(named)}"
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
        f"{code(row.better)} keeps {sign * row.kept:.1f} {kept} more bits per positive than {code(worse)} (adjusted p "
        f"{probability(row.holm)}); its headline is {sign * row.headline:+.1f} "
        f"{words.interval(_turn(row.headline_interval, turned))} bits away"
    )


def _turn(bounds: tuple[float, float], turned: bool) -> tuple[float, float]:
    return (-bounds[1], -bounds[0]) if turned else bounds


def belief(run: RunResult) -> list[str]:
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
            f"- The prior's prediction of best-of-n, made from other items and contexts, could fail: its interval (of "
            f"any tail) meets the observed one, to half an item, at {inside} of {total} points.{_check(run.results)}"
        )
    lines.append(
        "- Intervals are 95%, over entities, contexts and calibration negatives together; thresholds hold under the "
        "prior and not only at the bare item."
    )
    names = ", ".join(code(n) for n in dict.fromkeys(f.name for f in red))
    lines.append(f"- Red flags raised: {len(red)} ({names}); see below." if red else "- No red flag was raised.")
    return lines


def _control_words(name: str, row: Mapping[str, Bits] | str) -> str:
    if isinstance(row, str):
        return f"{code(name)}: {markdown(row)}"
    return f"{code(name)} {next((words.bits_text(b) for b in row.values()), '-')}"


def _check(results: Sequence[StressResult]) -> str:
    p = [max(c.p_values.values()) for r in results for c in r.best_of_n if c.p_values]
    if not p:
        return ""
    return f" Checked curve by curve against simulated ones, p is {min(p):.2f} at the least ({len(p)} curves)."


def _coverage(results: Sequence[StressResult]) -> tuple[int, int]:
    inside = total = 0
    for result, curves in ((r, c) for r in results for c in r.best_of_n):
        # a share of items is known to half an item at best: 0 of 60 does not contradict a predicted 0.1%
        half = 0.5 / max(1, result.detection.n_caught)
        seen = curves.observed
        for i in range(len(seen.x)):
            meets = [
                p.low[i] <= seen.high[i] + half and seen.low[i] - half <= p.high[i]
                for name, p in curves.predicted.items()
                # fitted to these very items: no prediction from others
                if name != "power_law" and len(p.x) == len(seen.x) and p.x[i] == seen.x[i]
            ]
            if meets:
                inside, total = inside + any(meets), total + 1
    return inside, total
