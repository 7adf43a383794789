"""Neutral contexts: short ordinary sentences that may precede a statement without bearing on its truth.

"How differently could the model have thought about the same thing?" is answered by reading each item after many of
these. They are generated from the templates and words below: everyday topics, several forms (statement, question,
remark, list, dialogue), 5 to 30 words, and nothing about truth, places, countries, money or chemistry. The split into
A (the prior) and B (observation) is random but fixed: contexts come in rounds of one per template, templates in random
order within a round, and go to A and B in turn. So A and B are exchangeable, and a few contexts are already varied.
"""

from __future__ import annotations

from itertools import product
from typing import Literal

import numpy as np

__all__ = ["after", "contexts", "every_context"]

# how the fixed order below is shuffled; not a user's seed: contexts are part of the testbed
_ORDER = 20240607

_TEMPLATES: tuple[tuple[str, tuple[tuple[str, ...], ...]], ...] = (
    (
        "{0} in the morning, so we {1} until lunch.",
        (
            ("It rained", "The wind was strong", "Fog hung over the garden", "The sun came out"),
            ("stayed inside and read", "mended the old fence", "played cards"),
        ),
    ),
    (
        "She put the {0} on the {1} and went to look for her glasses.",
        (("letters", "blue bowl", "scissors", "folded towels"), ("kitchen table", "window sill", "lowest shelf")),
    ),
    (
        "Stir the {0} slowly, add a little {1}, and let it rest for {2} minutes.",
        (("soup", "batter", "lentils"), ("salt", "lemon juice"), ("five", "twenty")),
    ),
    (
        "My {0} {1} every evening after supper.",
        (("brother", "neighbour", "aunt", "grandfather"), ("waters the tomatoes", "plays the cello", "walks two dogs")),
    ),
    (
        "Have you ever tried to {0} while {1}?",
        (
            ("fold a large map", "peel an orange", "tie a shoelace", "write a note"),
            ("riding a bus", "holding a sleeping cat", "talking on the phone"),
        ),
    ),
    (
        "The {0} team {1}, and everybody went home {2}.",
        (("chess", "swimming", "rowing"), ("won by a narrow margin", "lost the final"), ("tired", "singing")),
    ),
    (
        '"{0}," said the {1}, and closed the door.',
        (
            (
                "I will be back before dark",
                "The tickets are in the drawer",
                "Somebody should feed the fish",
                "Not today",
            ),
            ("gardener", "old tailor", "younger sister"),
        ),
    ),
    (
        "Things to buy: {0}, {1}, and a new {2}.",
        (("apples", "bread", "candles"), ("string", "two lemons"), ("broom", "notebook")),
    ),
    (
        "The {0} on the {1} has not worked since {2}.",
        (("light", "bell", "handle"), ("bicycle", "back door"), ("last winter", "the party")),
    ),
    (
        "I dreamed of a {0} that could {1}. When I woke up, the {2} was ringing.",
        (("teapot", "fox", "staircase"), ("sing", "count to nine"), ("alarm", "telephone")),
    ),
    (
        "Well, {0}, but {1}.",
        (
            ("the music was far too loud", "the film was shorter than I had hoped", "nobody had brought a spoon"),
            ("the children enjoyed it", "we stayed until the end", "the cake made up for it"),
        ),
    ),
    (
        "At the library, {0} was looking for a book about {1}, preferably one with {2}.",
        (("a tall man", "a student", "our teacher"), ("knitting", "owls"), ("pictures", "large print")),
    ),
    (
        "Please {0} before you leave the {1}.",
        (
            ("switch off the heater", "wash your cup", "water the fern", "shut the window"),
            ("office", "studio", "cabin"),
        ),
    ),
    (
        "The {0} chased the {1} around the {2} twice and then fell asleep in the shade.",
        (("puppy", "kitten", "goat"), ("leaf", "ball"), ("barn", "oak tree")),
    ),
    (
        "{0} is best learned {1}.",
        (("Juggling", "Drawing hands", "Playing the flute", "Skating"), ("with patience", "from a friend", "early")),
    ),
    (
        "We {0} for {1} hours, ate {2} by the lake, and talked about nothing in particular.",
        (("walked", "cycled", "waited"), ("two", "three"), ("sandwiches", "cold noodles")),
    ),
)


def contexts(which: Literal["prior", "observed"], n: int | None = None) -> tuple[str, ...]:
    """The first ``n`` contexts of A (``prior``) or of B (``observed``); all of them by default.

    Raises:
        ValueError: more than there are.
    """
    half = every_context()[0 if which == "prior" else 1 :: 2]
    if n is not None and not 0 < n <= len(half):
        raise ValueError(f"between 1 and {len(half)} contexts are available for each of A and B, got {n}")
    return half[:n]


def after(context: str, text: str) -> str:
    """``text``, its bytes unchanged, after ``context``; alone if that is empty.

    A space is put between them, unless the text begins with white space of its own, which then serves as one.
    """
    return f"{context}{'' if not context or text[:1].isspace() else ' '}{text}"


def every_context() -> tuple[str, ...]:
    """All contexts in their fixed order: rounds of one per template; A is the even ones, B the odd ones."""
    rng = np.random.default_rng(_ORDER)
    lists = []
    for template, words in _TEMPLATES:
        filled = [template.format(*choice) for choice in product(*words)]
        lists.append([filled[i] for i in rng.permutation(len(filled))])
    rounds = range(max(map(len, lists)))
    return tuple(lists[t][i] for i in rounds for t in rng.permutation(len(lists)) if i < len(lists[t]))
