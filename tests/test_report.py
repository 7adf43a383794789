"""Tables, figures and text on fabricated results: what they say, what they must never say, and that they fit."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import fabricated
import numpy as np
import pytest
from rich.console import Console
from test_printable import HOSTILE, rendered

from elk_stress.core.bits import Bits, Kind
from elk_stress.core.flags import CATALOGUE, flag
from elk_stress.core.printable import printable
from elk_stress.report import plots, tables, words
from elk_stress.report.markdown import report
from elk_stress.runs.folder import UnusableFolder, check_folder, write_folder
from elk_stress.thoughts.comparison import Comparison
from elk_stress.thoughts.result import Curve, IncidentalFraction, StressResult
from elk_stress.thoughts.run_result import RunResult
from elk_stress.threats.threat import Threat


def printed(results: list[StressResult], width: int) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    tables.show(console, results, skipped={"it needs pairs": ["ccs"]})
    return console.export_text()


def a_run(**changes: object) -> RunResult:
    first = "item/natural/gaussian"
    comparisons = (
        Comparison("logistic", "lda", first, 6.3, (3.1, 9.5), 7.2, (4.4, 9.9), 0.0004, 0.0008, "logistic"),
        Comparison("mass_mean", "lda", first, -8.1, (-20.0, 3.0), -6.0, (-14.0, 2.0), 0.3, 0.6, None),
    )
    made = RunResult(
        "statements", tuple(fabricated.six()), comparisons, fabricated.six()[0].controls, {"extra": "needs pairs"},
        {"broken": "ValueError: x"}, (), {"model": "tiny"}, {"fpr": 0.05}, {"python": "3.11"}, 7, 12.0, "ok",
    )  # fmt: skip
    return replace(made, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("width", [100, 110, 120, 140])
def test_tables_fit_and_cut_nothing(width: int) -> None:
    text = printed(fabricated.six(), width)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    assert "…" not in text
    for name in ("random_direction", "miscalibrated", "no signal", "best tail", "isotropic 0.3", "gradient", ">= 40.0"):
        assert name in text, name


def test_every_bits_of_the_result_is_in_the_table() -> None:
    results = fabricated.six()
    text = printed(results, 160)
    for result in results:
        for threat in result.threats.values():
            assert words.bits_text(threat.headline) in text


def test_kept_stands_below_free_in_the_same_column() -> None:
    result = fabricated.result("lda", 12.3)
    lines = printed([result], 160).splitlines()
    free = next(line for line in lines if line.strip().startswith("lda"))
    kept = lines[lines.index(free) + 1]
    assert "free" in free
    assert "kept" in kept
    assert free.index("12.3 [") == kept.index("13.8 [")
    assert "moved" in kept


def test_two_epsilons_are_two_rows() -> None:
    result = fabricated.result("lda", 12.3, kept=False)
    low, high = (Threat(kept=True, epsilon=e) for e in (0.5, 2.0))
    threats = {t.name + str(t.epsilon): fabricated.threat_result(t, 9.0, 0.8, 0.9) for t in (low, high)}
    text = printed([replace(result, threats={**result.threats, **threats})], 160)
    assert "kept 0.5" in text
    assert "kept 2" in text


def test_legend_names_raised_flags_only_and_says_what_to_do() -> None:
    text = " ".join(printed(fabricated.six(), 200).split())
    assert CATALOGUE["brittle"].raised_if in text
    assert CATALOGUE["brittle"].what_to_do in text
    assert CATALOGUE["leak"].raised_if not in text
    assert "No flag was raised" in printed([fabricated.result("lda", 12.0)], 120)


def test_every_flag_has_a_code_of_its_own() -> None:
    assert set(words.FLAG_CODES) == set(CATALOGUE)
    assert len(set(words.FLAG_CODES.values())) == len(CATALOGUE)


def test_red_flags_come_first() -> None:
    assert words.codes([flag("origin_fails"), flag("brittle"), flag("brittle")]) == ["BR", "OF"]


def test_bits_never_lose_their_kind() -> None:
    distance = Bits(20.0, 20.0, 20.0, Kind.DISTANCE, "form")
    assert words.bits_text(distance).startswith("d ")
    assert "20.0" not in words.bits_text(distance)
    assert float(words.bits_text(distance)[2:]) == pytest.approx(4.76, abs=0.01)  # -Phi^-1(2^-20)
    assert words.bits_text(Bits(5, 5, math.inf, Kind.CENSORED, "x")) == ">= 5.0"
    assert words.bits_text(Bits(5, 3, math.inf, Kind.CENSORED, "x")) == ">= 5.0 [3.0, inf]"
    assert words.bits_text(Bits(5, 0, 5, Kind.UPPER_BOUND, "x")) == "<= 5.0 (bound)"
    assert words.bits_text(Bits(5, 4, math.inf, Kind.ESTIMATE, "x")) == "5.0 [4.0, inf]"
    assert words.bits_text(Bits(math.inf, math.inf, math.inf, Kind.EXACT, "x")) == "inf"


def test_compact_intervals_hold_the_true_ones() -> None:
    assert words.bits_text(Bits(12.6, 12.4, 12.9, Kind.ESTIMATE, "x"), compact=True) == "12.6 [12,13]"
    assert words.bits_text(Bits(12.6, 12.4, math.inf, Kind.ESTIMATE, "x"), compact=True) == "12.6 [12,inf]"


def test_draws_are_those_with_an_even_chance() -> None:
    # (1 - 2^-B)^N = 1/2 exactly at B = 1: N = 1; at B = 10: 709.4
    assert words.draws(1.0) == "a single prior draw has an even chance"
    assert words.draws(10.0) == "the best of about 709 prior draws has an even chance"
    assert words.draws(40.0) == "the best of about 2^39.5 prior draws has an even chance"


@pytest.mark.parametrize(("n", "text"), [(0, "0"), (812, "812"), (1234, "1.2k"), (35_000, "35k"), (4.1e6, "4.1M")])
def test_counts(n: float, text: str) -> None:
    assert words.count(n) == text


def test_report_says_what_was_found_and_ranks_only_by_comparison() -> None:
    text = report(a_run())
    found = text.split("## Why believe it")[0]
    assert "`lda`: clean AUROC 0.97" in found
    assert "half of its catches are lost at **12.3 [10.8, 13.8] bits**" in found
    assert "more than half still stand at **40.0 bits**" in found
    assert "brittle" in found
    assert "`logistic` keeps 7.2 [4.4, 9.9] more bits per positive than `lda` (adjusted p < 0.001)" in found
    assert "- 1 other pair does not differ" in found
    assert found.count("more bits per positive") == 1, "a difference that is not significant must not rank"


def test_report_turns_a_negative_difference_round() -> None:
    negative = Comparison(
        "lda", "logistic", "item/natural/gaussian", -6.3, (-9.5, -3.1), -7.2, (-9.9, -4.4), 0.001, 0.002, "logistic"
    )
    text = report(a_run(comparisons=(negative,)))
    assert "`logistic` keeps 7.2 [4.4, 9.9] more bits per positive than `lda`" in text
    assert "its headline is +6.3 [3.1, 9.5] bits away" in text


def compared(a: str, b: str, better: str | None) -> Comparison:
    sign = -1.0 if better == b else 1.0
    bounds = (2.0, 4.0) if better == a else (-4.0, -2.0) if better == b else (-1.0, 3.0)
    p = 0.6 if better is None else 0.001
    return Comparison(a, b, "item/natural/gaussian", 3 * sign, bounds, 3 * sign, bounds, p, p, better)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            [("lda", "logistic", "logistic"), ("lda", "ccs", None), ("logistic", "ccs", "logistic")],
            "**With behaviour free, `logistic` survives more bits than every other probe.**",
        ),
        (  # logistic is behind nobody, but it is not shown to beat ccs
            [("logistic", "lda", "logistic"), ("lda", "ccs", "lda"), ("logistic", "ccs", None)],
            "no probe is shown to survive more bits than `logistic`; the others each survive fewer than some other",
        ),
        (  # ccs is behind nobody, but it beats nobody either: it may not be said to
            [("lda", "logistic", "logistic"), ("lda", "ccs", None), ("logistic", "ccs", None)],
            "no probe is shown to survive more bits than `logistic` and `ccs`; `lda` is behind.**",
        ),
        (
            [("lda", "logistic", "logistic"), ("lda", "ccs", "ccs"), ("lda", "mlp", "mlp")],
            "no probe is shown to survive more bits than `logistic`, `ccs` and `mlp`; `lda` is behind.**",
        ),
    ],
)
def test_the_first_sentence_says_no_more_than_the_comparisons(rows: list[tuple[str, str, str]], said: str) -> None:
    assert said in report(a_run(comparisons=tuple(compared(*row) for row in rows)))


def test_no_first_sentence_when_nothing_is_decided() -> None:
    text = report(a_run(comparisons=(compared("lda", "ccs", None),)))
    assert "**With behaviour" not in text
    assert "no two probes differ beyond chance" in text


_NO_DIFFERENCE, _NOTHING = "- no two probes differ", "- nothing was compared"
_FIRST, _OTHER = "item/natural/gaussian", "universal/natural/gaussian"


@pytest.mark.parametrize("elsewhere", [None, False, True], ids=["nowhere else", "undecided elsewhere", "decided there"])
@pytest.mark.parametrize(
    ("here", "said"),
    [
        ((), {_NOTHING}),
        ((False,), {_NO_DIFFERENCE}),
        ((False, False), {_NO_DIFFERENCE}),
        ((True,), {"- `lda` keeps"}),
        ((True, False), {"- `lda` keeps", "- 1 other pair does not"}),
        ((True, False, False), {"- `lda` keeps", "- 2 other pairs do not"}),
    ],
    ids=lambda part: f"{part}" if isinstance(part, tuple) else "",
)
def test_what_was_compared_is_said_once(here: tuple[bool, ...], said: set[str], elsewhere: bool | None) -> None:
    pairs = [("lda", "ccs"), ("lda", "logistic"), ("ccs", "logistic")]
    rows = [
        replace(compared(*pair, "lda" if won else None), threat=_FIRST) for won, pair in zip(here, pairs, strict=False)
    ]
    if elsewhere is not None:
        rows.append(replace(compared("lda", "ccs", "lda" if elsewhere else None), threat=_OTHER))
    text = report(a_run(comparisons=tuple(rows)))
    section = text.split("Compared in pairs, under")[1].split("## ")[0]
    ways = {_NO_DIFFERENCE, _NOTHING, "- `lda` keeps", "- 1 other pair does not", "- 2 other pairs do not"}
    assert {way for way in ways if way in section} == said
    assert ("- Under other threats 1 pair differs" in section) == bool(elsewhere)


def test_report_without_comparisons_ranks_nothing() -> None:
    text = report(a_run(comparisons=()))
    assert "more bits per positive than" not in text
    assert "nothing was compared" in text


def test_report_has_every_part() -> None:
    text = report(a_run())
    for part in ("What these bits guarantee", "Detection", "Controls", "What was left", "Attacks", "Tails", "scale,",
                 "predicted beside observed", "Paired comparisons", "Flags", "Not run", "Configuration"):  # fmt: skip
        assert f"{part}" in text, part
    assert "`a <= 2^-(B-k)`" in text
    assert "catches nothing at the threshold" in text
    assert "0.9: 14.8" in text  # B at 0.9 of the prior's scale, lda
    assert "![best of n](best_of_n.png)" in text
    assert "`broken` **failed**: ValueError: x" in text
    assert CATALOGUE["brittle"].what_to_do in text


def test_half_an_item_is_no_contradiction() -> None:
    result = fabricated.result("lda", 12.0, kept=False)  # 36 caught: half an item is 1.4%
    n, none = result.best_of_n[0].observed.x, np.zeros(6)

    def agreement(share: float) -> str:
        observed = Curve(n, none, none, none, none, none)
        told = Curve(n, none + share, none + share, none + share, none, none)
        curves = replace(result.best_of_n[0], observed=observed, predicted={"gaussian": told})
        return report(a_run(results=(replace(result, best_of_n=(curves,)),)))

    assert "at 6 of 6 points" in agreement(0.01)
    assert "at 0 of 6 points" in agreement(0.02)


def test_sensitivity_says_where_the_search_ended() -> None:
    result = fabricated.result("lda", 12.0, kept=False)
    name, threat = next(iter(result.threats.items()))
    ends = replace(
        threat, scale={"0.5": fabricated.MAX_BITS, "1": 12.0}, shrink={"1": math.nan}, bare_threshold=math.nan
    )
    text = report(a_run(results=(replace(result, threats={name: ends}),)))
    assert "| 0.5: >= 40.0; 1: 12.0 | - | - | - | - | - |" in text


def test_tails_common_to_all_probes_are_said_once() -> None:
    text = report(a_run()).split("## Tails")[1].split("\n## ")[0]
    assert text.count("| random |") == 1
    assert "| all | random | gaussian | 88.00 | 3.10 |" in text
    assert text.count("| probe |") == 5, "lda and ccs have names of the same length and so the same fit here"
    assert "| `lda`, `ccs` | probe | logistic | 8.00 |" in text


def test_what_does_not_apply_is_listed_once() -> None:
    text = report(a_run()).split("## Not run")[1]
    assert "- needs pairs: `extra`" in text
    assert text.count("- example of a reason: `universal/natural/gaussian (ccs)`") == 1


def test_a_reason_shared_by_all_names_no_probe() -> None:
    results = tuple(
        replace(fabricated.result(name, 9.0, kept=False), skipped={"a": "does not apply: no output", "b": "no output"})
        for name in ("lda", "ccs")
    )
    assert a_run(results=results, skipped={}).not_applicable == {"no output": ["a", "b"]}


def test_attacks_that_were_not_run_take_no_line() -> None:
    result = fabricated.result("lda", 12.0)
    not_run = {
        name: replace(t, attacks=tuple(replace(a, status="it catches nothing") for a in t.attacks))
        for name, t in result.threats.items()
    }
    one = next(iter(result.threats))
    assert tables.attack_table(replace(result, threats=not_run)) is None
    text = printed([replace(result, threats={**not_run, one: result.threats[one]})], 120)
    assert text.count("natural_thoughts") == 1
    assert "kept" not in text.split("Attacks on lda")[1].split("flags")[0], "a column without any number"


def test_a_probe_with_one_row_shows_its_verdict_too() -> None:
    assert "miscalibrated" in printed([fabricated.result("lda", 12.0, kept=False, verdict="miscalibrated")], 120)


def test_tables_in_the_report_are_well_formed() -> None:
    widths: list[int] = []
    for line in [*report(a_run()).splitlines(), ""]:
        if line.startswith("|"):
            widths.append(line.replace("\\|", "").count("|"))
        elif widths:
            assert len(set(widths)) == 1
            assert len(widths) > 2, "a table with no row"
            widths = []


def test_report_prints_no_distance_as_bits() -> None:
    result = fabricated.result("lda", 12.0)
    name, first = next(iter(result.threats.items()))
    form = Bits(23.4, 23.4, 23.4, Kind.DISTANCE, "design_point")
    changed = replace(result, threats={**result.threats, name: replace(first, headline=form)}, controls={})
    text = report(a_run(results=(changed,), comparisons=()))
    assert "23.4" not in text
    assert "only a distance is known: d 5.2" in text


def test_coverage_of_best_of_n_counts_what_is_outside() -> None:
    result = fabricated.result("lda", 12.0, kept=False)
    curves = result.best_of_n[0]
    off = replace(curves.observed, value=np.ones(6), low=np.full(6, 0.9), high=np.ones(6))
    agree = report(a_run(results=(replace(result, best_of_n=(curves,)),)))
    differ = report(a_run(results=(replace(result, best_of_n=(replace(curves, observed=off),)),)))
    assert "at 6 of 6 points" in agree
    assert "at 0 of 6 points" in differ


def test_result_json_is_complete_and_strict(tmp_path: Path) -> None:
    run = a_run()
    files = write_folder(run, tmp_path)
    assert sorted(f.name for f in files) == ["best_of_n.png", "bits.png", "report.md", "result.json", "survival.png"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f.name for f in files), "no temporary file may stay"

    def refuse(name: str) -> float:
        raise AssertionError(f"{name} is not JSON")

    record = json.loads((tmp_path / "result.json").read_text(), parse_constant=refuse)
    for key in ("versions", "seed", "config", "status", "results", "comparisons", "controls", "skipped", "failures"):
        assert key in record
    threat = record["results"][3]["threats"]["item/natural/gaussian"]
    assert len(threat["items"]["bits"]) == len(threat["items"]["ids"]) == 34
    assert threat["items"]["bits"][0]["value"] == pytest.approx(12.3 * 0.5)
    assert record["results"][5]["threats"]["item/natural/gaussian"]["headline"]["high"] == "inf"


def test_figures_are_the_same_bytes_twice(tmp_path: Path) -> None:
    for name in "ab":
        plots.save(plots.survival(fabricated.six()), tmp_path / f"{name}.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_survival_draws_the_curve_and_marks_censoring() -> None:
    result = fabricated.result("ccs", 60.0, kept=False)
    axis = plots.survival([result]).axes[0]
    curve = next(iter(result.threats.values())).curve
    line = axis.lines[0]
    np.testing.assert_allclose(line.get_ydata(), curve.value)
    triangles = [m for m in axis.lines if m.get_marker() == ">"]
    assert [float(m.get_xdata()[0]) for m in triangles] == [fabricated.MAX_BITS]


def test_nothing_is_drawn_beyond_the_censoring_point() -> None:
    result = fabricated.result("ccs", 60.0, kept=False)
    name, threat = next(iter(result.threats.items()))
    cut = replace(threat, curve=replace(threat.curve, censored_from=20.0))
    axis = plots.survival([replace(result, threats={name: cut})]).axes[0]
    assert max(float(np.max(line.get_xdata())) for line in axis.lines) <= 20.0


def test_probes_differ_without_colour() -> None:
    axis = plots.survival(fabricated.six()).axes[0]
    styles = [str(line.get_linestyle()) + str(line._dash_pattern) for line in axis.lines if line.get_linewidth() == 1.7]
    markers = {line.get_marker() for line in axis.lines if line.get_marker() not in ("None", ">")}
    assert len(set(styles)) == 6
    assert len(markers) == 6


def test_best_of_n_draws_prediction_and_observation_on_log2_n() -> None:
    result = fabricated.result("lda", 6.0)
    figure = plots.best_of_n([result])
    assert figure is not None
    axis = figure.axes[0]
    curves = result.best_of_n[0]
    np.testing.assert_allclose(axis.lines[0].get_xdata(), np.log2(curves.observed.x))
    np.testing.assert_allclose(axis.lines[0].get_ydata(), curves.predicted["gaussian"].value)
    observed = axis.containers[0].lines[0]
    np.testing.assert_allclose(observed.get_xdata(), np.log2(curves.observed.x))
    np.testing.assert_allclose(observed.get_ydata(), curves.observed.value)
    assert plots.best_of_n([replace(result, best_of_n=())]) is None


def test_an_infinite_half_life_stands_above_all_others_and_says_so() -> None:
    share = IncidentalFraction(0.0, 0.0, 0.1, np.zeros(3), 2, 8, 0.0)
    oracle = fabricated.result("oracle", 20.0)
    name = "item/natural/gaussian/kept"
    endless = replace(oracle.threats[name], headline=Bits(math.inf, 90.0, math.inf, Kind.EXACT, "closed_form"))
    oracle = replace(oracle, incidental=share, threats={**oracle.threats, name: endless})
    figure = plots.incidental([oracle, replace(fabricated.result("paper", 5.0), incidental=share)])
    assert figure is not None
    (text,) = [t for t in figure.axes[0].texts if t.get_text() == "infinite"]
    highest = max(line.get_ydata().max() for line in figure.axes[0].lines if len(line.get_ydata()))
    assert text.xy[1] == highest > 20.0
    assert plots.incidental([fabricated.result("lda", 6.0)]) is None


def test_plots_touch_no_global_state() -> None:
    import sys

    plots.survival([fabricated.result("lda", 6.0)])
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or pyplot.get_fignums() == []


def test_a_stale_figure_goes_when_this_run_has_none(tmp_path: Path) -> None:
    (tmp_path / "best_of_n.png").write_bytes(b"old")
    write_folder(a_run(results=(fabricated.result("ccs", 60.0),), comparisons=()), tmp_path)
    assert not (tmp_path / "best_of_n.png").exists()
    assert "best_of_n.png" not in (tmp_path / "report.md").read_text()


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UnusableFolder, match="a file is in the way"):
        check_folder(tmp_path / "file")
    with pytest.raises(UnusableFolder, match="a file is in the way"):
        check_folder(tmp_path / "file" / "below")


def test_a_read_only_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # root may write anywhere, so the refusal of the system is simulated
    def refuse(self: Path, data: bytes) -> int:
        raise PermissionError(30, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(UnusableFolder, match=r"cannot be written: Read-only file system; choose another folder"):
        check_folder(tmp_path)


def test_a_full_disk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnusableFolder, match=r"MiB free and a run needs"):
        check_folder(tmp_path, needed=2**62)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_previous_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(a_run(), tmp_path)
    before = (tmp_path / "result.json").read_bytes()

    def full(self: Path, text: str) -> int:
        self.write_bytes(text[:10].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_folder(a_run(seed=8), tmp_path)
    assert (tmp_path / "result.json").read_bytes() == before
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_overview_shows_every_probe_and_what_is_certified(tmp_path: Path) -> None:
    from elk_stress.report import overview

    sure = Bits(3.5, 3.5, float("inf"), Kind.LOWER_BOUND, "certificate")
    plain, other = fabricated.result("lda", 12.0), fabricated.result("lipschitz", 20.0)
    name = "item/natural/gaussian"
    other = replace(other, threats={**other.threats, name: replace(other.threats[name], certified=sure)})
    assert overview.certificates([plain]) == [
        "No probe here says how steep it is, or no threat has Gaussian tails per item."
    ]
    lines = overview.certificates([plain, other])
    assert any("`lipschitz` | >= 3.5" in line for line in lines)
    assert not any("`lda`" in line for line in lines)
    figure = overview.bits([plain, other])
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert [label.split(" ")[0] for label in labels] == ["lda", "lipschitz"]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "certified" in legend
    assert "certified" not in [t.get_text() for t in overview.bits([plain]).legends[0].get_texts()]
    plots.save(figure, tmp_path / "bits.png")
    assert (tmp_path / "bits.png").stat().st_size > 20_000


# -- texts of anybody --------------------------------------------------------------------------------------------------


def a_run_of(text: str) -> RunResult:
    """A run in which whatever somebody else may name is called ``text``."""
    called = {"probe": text, "testbed": text, "site": text}
    results = []
    for k, result in enumerate(fabricated.six()[:3]):
        threats = {
            name: replace(
                t,
                flags=(*t.flags, flag("brittle", f"{text} of {text}")),
                attacks=tuple(replace(a, attack=text, access=text) for a in t.attacks),
            )
            for name, t in result.threats.items()
        }
        audit = None if result.audit is None else replace(result.audit, strongest=text)
        # several of one name, as two files may have
        results.append(
            replace(result, **called if k else {**called, "probe": f"{text} 2"}, threats=threats, audit=audit)
        )
    first = "item/natural/gaussian"
    pair = Comparison(text, f"{text} 2", first, 6.3, (3.1, 9.5), 7.2, (4.4, 9.9), 0.0004, 0.0008, text)
    controls = {text: f"does not apply: {text}", "rock": results[0].controls["rock"]}
    return RunResult(
        text, tuple(results), (pair,), controls, {text: f"needs {text}"}, {f"{text}": f"ValueError: {text}"}, (),
        {text: text, "more": {"a": [text]}}, {"command": {"probe": [text]}}, {text: text}, 7, 12.0, "ok",
    )  # fmt: skip


@pytest.mark.parametrize("text", [t for t in HOSTILE if t])
def test_a_report_has_the_same_structure_whatever_its_parts_are_called(text: str) -> None:
    """Held against a Markdown parser: the tags of a run of that name are those of a harmless one."""
    written = report(a_run_of(text))
    assert rendered(written).tags == rendered(report(a_run_of("name"))).tags
    assert all(line.isprintable() for line in written.split("\n"))
    assert "<script" not in written


@pytest.mark.parametrize("width", [100, 160])
@pytest.mark.parametrize("text", [t for t in HOSTILE if t])
def test_a_terminal_shows_names_and_obeys_none(text: str, width: int) -> None:
    file = io.StringIO()
    console = Console(width=width, file=file, force_terminal=True, color_system="truecolor")
    run = a_run_of(text)
    tables.show(console, run.results, skipped=run.not_applicable)
    shown = file.getvalue()
    # what rich itself writes are styles
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert all(line.isprintable() for line in plain.split("\n"))
    seen = "".join(plain.split())
    assert "".join(printable(text).split())[:15] in seen


@pytest.mark.parametrize("text", [HOSTILE[0], HOSTILE[4], HOSTILE[14], HOSTILE[15], "真偽" * 30])
def test_figures_are_drawn_whatever_their_parts_are_called(text: str, tmp_path: Path) -> None:
    files = write_folder(a_run_of(text), tmp_path)
    assert sorted(path.name for path in files) == sorted(path.name for path in tmp_path.iterdir())
    assert {path.parent for path in files} == {tmp_path}
    assert json.loads((tmp_path / "result.json").read_text())["testbed"] == text
