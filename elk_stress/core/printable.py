r"""Texts that somebody else chose (names, notes, items, messages), made fit to be shown.

What a probe file, a data set or an object of another library calls itself is a text of its author's. Shown as it is, it
can move the cursor, rename the terminal, turn a line around (bidirectional overrides) or become markup. So every text
passes one of these on its way out:

================  =======================================================================================
where             what
================  =======================================================================================
a terminal        :func:`printable`: what cannot be seen is spelled, ``\x1b`` for an escape; one line
Markdown, HTML    :func:`code` between backticks, :func:`markdown` in running text and cells
a figure          :func:`label`: also no mathematics between dollar signs, and short
================  =======================================================================================

Names are also checked where they come in (:func:`check_name`): one line of at most 100 characters, all to be seen.
"""

from __future__ import annotations

import re

__all__ = ["check_name", "code", "label", "markdown", "printable"]

_LONGEST_NAME = 100
_LONGEST_LABEL = 40
# of CommonMark and GitHub's dialect, what is more than a letter wherever it stands; an underscore within a word is not
_MARKUP = re.compile(r"[\\`*~$]|(?<![^\W_])_|_(?![^\W_])|\](?=[(\[:])|@|(?<=[A-Za-z]):(?=//)|(?<=www)\.", re.IGNORECASE)
# and what is so at the beginning of a line
_OPENING = re.compile(r"^(?:[\[#+=-]|\d+[.)](?=\s|$))")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;"}


def printable(text: object) -> str:
    r"""One line in which everything can be seen: white space becomes a space, other invisible characters are spelled.

    Example:
        >>> print(printable("red \x1b[31m\n\u202eeman"))
        red \x1b[31m \u202eeman
    """
    line = re.sub(r"[\t\n\v\f\r\x1c-\x1f\x85\u2028\u2029]+", " ", str(text))
    return line if line.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def code(text: object) -> str:
    """Between backticks, where Markdown reads nothing: backticks, bars and angles themselves are spelled."""
    return "`" + re.sub(r"[`|<>]", lambda c: f"\\x{ord(c[0]):02x}", printable(text).strip() or " ") + "`"


def markdown(text: object) -> str:
    """Running text that stays text: no emphasis, link, image, HTML, table or address grows out of it."""
    line = re.sub(r"[&<>|]", lambda c: _ENTITIES[c[0]], printable(text).strip())
    return _OPENING.sub(lambda c: c[0][:-1] + "\\" + c[0][-1], _MARKUP.sub(lambda c: "\\" + c[0], line))


def label(text: object) -> str:
    """For a figure: short, without mathematics, and shown though it begins with an underscore."""
    line = printable(text)
    line = line if len(line) <= _LONGEST_LABEL else line[: _LONGEST_LABEL - 3] + "..."
    return (" " if line.startswith("_") else "") + line.replace("$", r"\$")


def check_name(name: object, what: str) -> None:
    """Refuse what is no name.

    Args:
        name: what somebody calls it.
        what: of which thing, for the message.

    Raises:
        ValueError: no text, empty, longer than 100 characters, or with some that cannot be seen.
    """
    if isinstance(name, str) and 0 < len(name) <= _LONGEST_NAME and name.isprintable() and name.strip():
        return
    shown = f"{len(name)} characters" if isinstance(name, str) and len(name) > _LONGEST_NAME else repr(name)[:200]
    raise ValueError(
        f"{what} is one line of 1 to {_LONGEST_NAME} visible characters, got {shown}; give it another name"
    )
