"""True and false statements from facts of geography and chemistry that come with the package (``facts.json``).

The file names its sources and their licences. ``elk_stress/testbeds/collect_facts.py`` writes it and says what is left
out of it, and why: a false statement never names a country in which the city has any namesake.

A :class:`Relation` maps entities to values ("Osaka" -> "Japan"). A statement says a value of an entity, affirmed or
negated; it is true or false. False values are *swapped in*: another entity's value of the same relation, so nothing
but the combination says whether a statement is true.

Balance. :func:`draw` returns statements in *quads* over four entities: two true statements and two false ones. Where
values are shared (many cities per country), the quad is built on two values v and w, each said once truly and once
falsely::

    e1 (of v) is in v    true        e2 (of v) is in w    false
    f1 (of w) is in w    true        f2 (of w) is in v    false

Where values are unique (symbols, capitals), no value is said twice. Either way every entity occurs once and every
value word occurs equally often with both labels, so no surface cue predicts the label (tested with a bag of words).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import numpy as np

__all__ = ["RELATIONS", "Relation", "Statement", "available", "draw", "relation", "sources", "statements"]

# how each relation is said, affirmed and negated
RELATIONS = {
    "city_country": ("the city of {entity} is in {value}.", "the city of {entity} is not in {value}."),
    "country_capital": ("the capital of {entity} is {value}.", "the capital of {entity} is not {value}."),
    "country_continent": ("the country {entity} is in {value}.", "the country {entity} is not in {value}."),
    "country_currency": ("the currency of {entity} is {value}.", "the currency of {entity} is not {value}."),
    "element_symbol": (
        "the chemical symbol for {entity} is {value}.",
        "the chemical symbol for {entity} is not {value}.",
    ),
    "element_number": ("the atomic number of {entity} is {value}.", "the atomic number of {entity} is not {value}."),
    "element_group": (
        "in the periodic table {entity} is in {value}.",
        "in the periodic table {entity} is not in {value}.",
    ),
}


@dataclass(frozen=True)
class Statement:
    """One statement.

    Attributes:
        text: what the model reads.
        entity: whom it is about; the group that never crosses splits.
        value: what it says of the entity.
        true: whether it is true *as it stands* (negation included).
        negated: whether it is the negated form.
    """

    text: str
    entity: str
    value: str
    true: bool
    negated: bool

    @property
    def id(self) -> str:
        """Unique name."""
        return f"{self.entity} | {'not ' if self.negated else ''}{self.value}"


@dataclass(frozen=True)
class Relation:
    """Entities, their true values, and how to say them.

    Attributes:
        name: e.g. ``city_country``.
        affirmed, negated: templates with ``{entity}`` and ``{value}``.
        facts: entity -> value, best known entities first.
        forbidden: entity -> values that must not be said falsely of it (a namesake makes them true).
    """

    name: str
    affirmed: str
    negated: str
    facts: Mapping[str, str]
    forbidden: Mapping[str, frozenset[str]]

    @property
    def unique(self) -> bool:
        """Whether no two entities share a value."""
        return len(set(self.facts.values())) == len(self.facts)

    def say(self, entity: str, value: str, *, negated: bool = False) -> Statement:
        """The statement that ``entity`` has (or has not) ``value``."""
        text = (self.negated if negated else self.affirmed).format(entity=entity, value=value)
        true = (self.facts[entity] == value) != negated
        return Statement(text[0].upper() + text[1:], entity, value, true, negated)

    def negate(self, statement: Statement) -> Statement:
        """The contrast partner: the same claim with the opposite polarity, hence the opposite truth."""
        return self.say(statement.entity, statement.value, negated=not statement.negated)

    def may_say(self, entity: str, value: str) -> bool:
        """Whether ``value`` is false of ``entity`` beyond doubt."""
        return value != self.facts[entity] and value not in self.forbidden.get(entity, frozenset())


def relation(name: str) -> Relation:
    """A relation by name.

    Raises:
        ValueError: no such relation; lists the known ones.
    """
    if name not in RELATIONS:
        raise ValueError(f"no relation is called {name!r}; known: {', '.join(RELATIONS)}")
    known = _file()["relations"][name]
    forbidden = {entity: frozenset(values) for entity, values in known["forbidden"].items()}
    return Relation(name, *RELATIONS[name], known["facts"], forbidden)


def draw(
    source: Relation, n: int, seed: int | np.random.SeedSequence, *, at_least: int | None = None
) -> list[list[Statement]]:
    """``n`` quads of affirmed statements over ``4 n`` distinct entities (or as many as there are, if ``at_least``).

    Each quad is ``[true, true, false, false]`` and is free of surface cues by itself. The best known entities that
    suffice are taken and matched at random; quads come in random order.

    Raises:
        ValueError: the relation has too few entities; says how many quads it has.
    """
    rng = np.random.default_rng(seed)
    quads = _unique_quads(source, n, rng) if source.unique else _shared_quads(source, n, rng)
    needed = n if at_least is None else at_least
    if len(quads) < needed:
        raise ValueError(
            f"{4 * needed} statements about distinct entities were asked for but {source.name} has {4 * len(quads)}; "
            "ask for fewer items or take another relation"
        )
    return [quads[i] for i in rng.permutation(len(quads))]


def statements(source: Relation, seed: int | np.random.SeedSequence = 0) -> list[Statement]:
    """Every entity in four forms: true and false, each affirmed and negated (grouped by entity).

    The values of the false forms are a permutation of the true ones, so that each value is said equally often truly
    and falsely.
    """
    rng = np.random.default_rng(seed)
    entities = list(source.facts)
    swapped = _derange(source, entities, rng)
    found = []
    for entity, value in zip(entities, swapped, strict=True):
        for said in (source.facts[entity], value):
            affirmed = source.say(entity, said)
            found += [affirmed, source.negate(affirmed)]
    return found


def available() -> dict[str, int]:
    """Number of statements per relation."""
    return {name: 4 * len(relation(name).facts) for name in RELATIONS}


def sources() -> dict[str, str]:
    """Where the facts come from: each source with its version, by name."""
    return {source["name"]: source["version"] for source in _file()["sources"]}


@cache
def _file() -> Any:
    return json.loads(resources.files("elk_stress.testbeds").joinpath("facts.json").read_text("utf-8"))


# -- balanced draws ---------------------------------------------------------------------------------------------------


def _unique_quads(source: Relation, n: int, rng: np.random.Generator) -> list[list[Statement]]:
    entities = np.array(list(source.facts), dtype=object)[: 4 * n]
    rng.shuffle(entities)
    quads = []
    for a, b, c, d in entities[: len(entities) // 4 * 4].reshape(-1, 4):
        if source.may_say(c, source.facts[d]) and source.may_say(d, source.facts[c]):
            said = [(a, source.facts[a]), (b, source.facts[b]), (c, source.facts[d]), (d, source.facts[c])]
            quads.append([source.say(entity, value) for entity, value in said])
    return quads


def _shared_quads(source: Relation, n: int, rng: np.random.Generator) -> list[list[Statement]]:
    """Pairs of entities of one value, best known first; then pairs of different values matched at random."""
    waiting: dict[str, str] = {}
    pairs: list[tuple[str, str, str]] = []
    for entity, value in source.facts.items():
        if value in waiting:
            pairs.append((value, *_shuffled((waiting.pop(value), entity), rng)))
        else:
            waiting[value] = entity
    # a few pairs may be left without a partner: then a few more are taken
    more = 0
    while True:
        chosen = pairs[: 2 * n + more]
        quads = _match(source, [chosen[i] for i in rng.permutation(len(chosen))])
        if len(quads) >= n or len(chosen) == len(pairs):
            return quads[:n]
        more += 2 * (n - len(quads))


def _match(source: Relation, left: list[tuple[str, str, str]]) -> list[list[Statement]]:
    quads = []
    while len(left) > 1:
        # the commonest value first, else its pairs are what is left over at the end
        counts = Counter(value for value, _, _ in left)
        v, e1, e2 = left.pop(max(range(len(left)), key=lambda i: (counts[left[i][0]], -i)))
        partner = next(
            (i for i, (w, _, f2) in enumerate(left) if source.may_say(e2, w) and source.may_say(f2, v)), None
        )
        if partner is not None:
            w, f1, f2 = left.pop(partner)
            quads.append([source.say(e1, v), source.say(f1, w), source.say(e2, w), source.say(f2, v)])
    return quads


def _shuffled(pair: tuple[str, str], rng: np.random.Generator) -> tuple[str, str]:
    return pair if rng.random() < 0.5 else (pair[1], pair[0])


def _derange(source: Relation, entities: Sequence[str], rng: np.random.Generator) -> list[str]:
    """A permutation of the true values in which no entity gets a value that may be true of it."""
    values = [source.facts[entity] for entity in rng.permutation(np.array(entities, dtype=object))]
    for _ in range(200):
        wrong = [i for i, entity in enumerate(entities) if not source.may_say(entity, values[i])]
        if not wrong:
            return values
        for i in wrong:
            j = int(rng.integers(len(entities)))
            values[i], values[j] = values[j], values[i]
    raise ValueError(f"no swap of values makes every statement of {source.name} false; one value is too common")
