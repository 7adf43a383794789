"""Texts of anybody on their way out: held against a Markdown parser, rich and matplotlib, which are not ours."""

from __future__ import annotations

import doctest
import io
import re
from html.parser import HTMLParser

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from elk_stress.core import printable as module
from elk_stress.core.printable import check_name, code, label, markdown, printable
from elk_stress.report.sections import table

HOSTILE = (
    "red \x1b[31m alarm",
    "\x1b]8;;http://evil.example\x1b\\click\x1b]8;;\x1b\\",
    "\x1b]0;title\x07\x9b2J\x08\x08",
    "over \u202e\u2066 turned",
    "two\nlines | of | a | table\r\n# heading",
    "[red]bold[/red][link=http://evil.example]x[/link]",
    "<script>alert(1)</script><img src=x onerror=y>",
    "[click](javascript:alert(1)) ![i](http://evil.example/x.png)",
    "`code` ``` **strong** _em_ ~~gone~~ <b>b</b> &lt;i&gt;",
    "http://evil.example www.evil.example me@evil.example",
    "[1]: http://evil.example",
    "- [ ] list",
    "1. list",
    "=====",
    "$\\frac{x$",
    "__dunder__",
    "\ud800 lone",
    "",
)
texts = st.one_of(
    st.sampled_from(HOSTILE), st.text(max_size=30), st.text("[](){}<>|`*_~#!\\:/=+-&$@. \n\x1b1ax", max_size=30)
)
everybody = given(texts)


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def rendered(text: str) -> _Tags:
    found = _Tags()
    found.feed(MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(text))
    found.close()
    return found


def same(shown: str, said: str) -> bool:
    return " ".join(shown.split()) == " ".join(said.split())


@settings(max_examples=150)
@everybody
def test_everything_printable_is_one_line_that_can_be_seen(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert printable(shown) == shown
    if text.isprintable():
        assert shown == text


@settings(max_examples=150)
@everybody
@example("a\\")
def test_running_text_grows_no_markup(text: str) -> None:
    found = rendered(f"- {markdown(text)} and on")
    assert set(found.tags) <= {"ul", "li", "p"}, found.tags
    assert same(found.text, f"{printable(text)} and on")
    assert not re.search(r"https?://|www\.", markdown(text), re.IGNORECASE), "GitHub makes an address of it"


@settings(max_examples=150)
@everybody
def test_names_between_backticks_and_cells_stay_what_they_are(text: str) -> None:
    found = rendered("\n".join(table(["a", "b"], [[code(text), markdown(text)], ["x", "y"]])))
    assert [t for t in found.tags if t not in ("table", "thead", "tbody", "tr", "th", "code")] == ["td"] * 4
    assert found.tags.count("code") == 1
    assert not set("`|<>") & set(code(text)[1:-1])
    assert not set("<>|") & set(markdown(text))


@pytest.mark.parametrize("text", HOSTILE)
def test_a_figure_shows_it_without_mathematics(text: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure()
    shown = figure.text(0, 0, label(text * 3))
    FigureCanvasAgg(figure).print_png(io.BytesIO())
    assert shown.get_text().isprintable()
    assert len(label(text * 3).replace("\\$", "$")) <= 41
    assert not label(text).startswith("_")


@pytest.mark.parametrize(
    "name", [*HOSTILE[:5], "\ud800", "", "  ", "x" * 101, 3, None, "a\tb", "zero\u200bwidth", "a\x7f"]
)
def test_names_that_are_none_are_refused(name: object) -> None:
    with pytest.raises(ValueError, match="a probe's name is one line of 1 to 100 visible characters, got") as caught:
        check_name(name, "a probe's name")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_good_names_pass() -> None:
    for name in ("logistic", "x" * 100, "Wahrheit (Schicht 3)", "真偽", "a/b [2] | c"):
        check_name(name, "a probe's name")


def test_the_example_in_the_docstring() -> None:
    assert doctest.testmod(module).failed == 0
