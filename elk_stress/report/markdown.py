"""``report.md``: the run in words, then every figure that a reader needs to believe it or not.

Order: what was found and why to believe it; the tables; what bits guarantee; detection, controls, audit, attacks;
tails, and B against scale, shrinkage and epsilon; best-of-n predicted beside observed; paired comparisons; flags with
what to do; what was not run; configuration. Nothing here ranks probes except a paired comparison, and no distance is
printed as bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from elk_stress.core.printable import code, markdown, printable
from elk_stress.report import found, overview, sections
from elk_stress.thoughts.result import plain

if TYPE_CHECKING:
    from elk_stress.thoughts.run_result import RunResult

__all__ = ["report"]


def report(
    run: RunResult, figures: Sequence[str] = ("bits.png", "survival.png", "best_of_n.png", "incidental.png")
) -> str:
    """The whole report as Markdown; ``figures`` are the files beside it that were written."""
    results = run.results
    site = f" at {code(results[0].site)}" if results else ""
    lines = [f"# Bits of optimization that each probe survives: {code(run.testbed)}{site}", "", _status(run), ""]
    if results:
        bits = sections.figure(figures, "bits.png", "bits of every probe")
        survival = sections.figure(figures, "survival.png", "recall(b)")
        best_of_n = sections.figure(figures, "best_of_n.png", "best of n")
        incidental = sections.figure(figures, "incidental.png", "bits against the incidental fraction")
        parts = {
            "What was found": found.found(run),
            "Why believe it, or not": found.belief(run),
            "Probes and threats": sections.main_table(results) + bits + survival,
            "What is certified": overview.certificates(results),
            "What these bits guarantee": sections.guarantees(),
            "Detection when nobody attacks": sections.detection(results),
            "Controls": sections.controls(run.controls),
            "What was left after the break": sections.audit(results),
            "How much of each probe is incidental": sections.incidental(results) + incidental,
            "Attacks": sections.attacks(results),
            "Tails": sections.tails(results),
            "How bits depend on scale, shrinkage and epsilon": sections.sensitivity(results),
            "Best of n: predicted beside observed": sections.best_of_n(results) + best_of_n,
            "Paired comparisons": sections.comparisons(run.comparisons),
            "Flags": sections.flags(results),
        }
        for title, part in parts.items():
            lines += [f"## {title}", "", *part, ""]
    if run.not_applicable or run.failures:
        lines += ["## Not run", "", *_not_run(run), ""]
    lines += ["## Configuration", "", *_configuration(run), ""]
    return "\n".join(printable(line) for line in "\n".join(lines).split("\n"))


def _status(run: RunResult) -> str:
    n = len(run.results)
    what = f"{n} probe{'s' if n != 1 else ''} stressed in {run.seconds:.0f} s, seed {run.seed}."
    if run.status == "ok":
        return what
    return f"**This run is {run.status}**: {what} What is below is complete for the probes it names."


def _not_run(run: RunResult) -> list[str]:
    lines = [f"- {markdown(why)}: {', '.join(map(code, names))}" for why, names in run.not_applicable.items()]
    return lines + [f"- {code(name)} **failed**: {markdown(why)}" for name, why in run.failures.items()]


def _configuration(run: RunResult) -> list[str]:
    rows = [
        [f"{part}: {markdown(key)}", markdown(_words_of(value))]
        for part, record in _parts(run)
        for key, value in record.items()
    ]
    return sections.table(["setting", "value"], [["seed", str(run.seed)], *rows])


def _parts(run: RunResult) -> list[tuple[str, Mapping[str, Any]]]:
    # what the engine was given is the same for every probe of a run; the testbed has a part of its own
    engine = {k: v for r in run.results[:1] for k, v in r.config.items() if k not in ("testbed", "probe", "threats")}
    settings = {k: v for k, v in run.config.items() if k not in ("threats", "seed")}
    return [("run", settings), ("engine", engine), ("testbed", run.description), ("version", run.versions)]


def _words_of(value: Any) -> str:
    value = plain(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_words_of(v)}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(_words_of(v) for v in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
