"""Special tokens: what a tokenizer puts around every text, and what a text brings by itself.

All is decided on token ids, the way the model will read them, not on strings. Only markers that no token stands for
(a chat template written for another model) are looked for in the text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Surrounding", "surrounding", "templates_in"]

# how chat templates mark turns where the tokenizer has no token for it
_MARKER = re.compile(r"<\|[\w-]+\|>|<\uff5c[^<>\uff5c]+\uff5c>|\[/?INST\]|<</?SYS>>|</?(?:start|end)_of_turn>")


@dataclass(frozen=True)
class Surrounding:
    """What a tokenizer puts before and after every text.

    Attributes:
        before, after: token ids, often none.
        names: the same as text, for people to read.
        unknown: the id that stands for any unknown word, which says nothing of what a text brings.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    names: tuple[str, str]
    unknown: int | None

    def once(self, row: Sequence[int], text: str) -> list[int]:
        """``row`` without the tokens that the tokenizer put around a text that brings them itself."""
        row, (before, after) = list(row), (list(self.before), list(self.after))
        n = len(before)
        if n and row[:n] == row[n : 2 * n] == before and (self.unknown not in before or text.startswith(self.names[0])):
            row = row[n:]
        n = len(after)
        if n and row[-n:] == row[-2 * n : -n] == after and (self.unknown not in after or text.endswith(self.names[1])):
            row = row[:-n]
        return row

    def describe(self) -> str | None:
        """For ``result.json``: what surrounds a text, or ``None`` where nothing does."""
        parts = [
            f"{name} {where} every text" for name, where in zip(self.names, ("before", "after"), strict=True) if name
        ]
        return f"{', '.join(parts)}; not twice where a text brings its own" if parts else None


def surrounding(tokenizer: Any) -> Surrounding:
    """Found by tokenizing one letter with and without special tokens."""
    alone, own = (list(tokenizer("a", add_special_tokens=add)["input_ids"]) for add in (True, False))
    at = next((i for i in range(len(alone) - len(own) + 1) if alone[i : i + len(own)] == own), None)
    before, after = ([], []) if at is None else (alone[:at], alone[at + len(own) :])
    names = tuple("".join(map(str, tokenizer.convert_ids_to_tokens(ids))) for ids in (before, after))
    return Surrounding(tuple(before), tuple(after), (names[0], names[1]), tokenizer.unk_token_id)


def templates_in(tokenizer: Any, texts: Sequence[str]) -> list[str | None]:
    """For each text the token or marker by which it brings its own structure (turns, a beginning, an end), if any.

    That is a special token anywhere, any other added token at the start, or a marker of turns. Words that stand for
    something within a sentence (unknown, masked, runs of spaces) are none.
    """
    if not texts:
        return []
    within = {tokenizer.unk_token_id, tokenizer.mask_token_id}
    added = {int(i): token for i, token in tokenizer.added_tokens_decoder.items() if i not in within}
    # special by role, though the vocabulary itself may hold them
    special = {i for i in tokenizer.all_special_ids if i not in within} | {i for i, t in added.items() if t.special}
    leading = special | {i for i, token in added.items() if str(token.content).strip()}
    found: list[str | None] = []
    for text, row in zip(texts, tokenizer(list(texts), add_special_tokens=False)["input_ids"], strict=True):
        token = next((i for at, i in enumerate(row) if i in (special if at else leading)), None)
        marker = _MARKER.search(text)
        found.append(
            str(tokenizer.convert_ids_to_tokens(token)) if token is not None else marker.group() if marker else None
        )
    return found
