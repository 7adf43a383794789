"""Pages of the site that are written from the registry and the docstrings, so that they cannot fall behind."""

import dataclasses
import inspect
import re
from pathlib import Path

import mkdocs_gen_files

import elk_stress
from elk_stress.core import registry
from elk_stress.core.flags import CATALOGUE
from elk_stress.testing.probes import checks_for_probe
from elk_stress.threats.threat import default_threats

ROOT = Path(__file__).parent.parent


def plain(docstring: str | None) -> str:
    """A docstring's roles and double backticks as Markdown."""
    text = re.sub(r":[a-z]+:`[~.]*([^`]*)`", r"`\1`", inspect.cleandoc(docstring or ""))
    return text.replace("``", "`")


def paragraph(docstring: str | None) -> str:
    """The first paragraph."""
    return " ".join(plain(docstring).split("\n\n")[0].split())


def settings(cls: type) -> str:
    """Hyperparameters with their defaults, as code."""
    fields = [field for field in dataclasses.fields(cls) if field.init]
    return ", ".join(
        f"`{field.name} = {field.default!r}`" for field in fields if field.default is not dataclasses.MISSING
    )


def card(name: str, thing: object, facts: dict[str, str]) -> str:
    module = inspect.getmodule(type(thing))
    lines = [f"## {name}", "", paragraph(type(thing).__doc__), "", paragraph(module.__doc__ if module else ""), ""]
    rows = {**facts, "settings": settings(type(thing)), "file": f"`{Path(inspect.getfile(type(thing))).name}`"}
    lines += ["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in rows.items() if value), ""]
    return "\n".join(lines)


def attacks() -> str:
    lines = [
        "# Threats and attacks",
        "",
        "A threat says what a number of bits is relative to: `scope/prior/tail`, and `/kept` where behaviour must be",
        "kept. By default:",
        "",
        *(f"- `{threat.name}`" for threat in default_threats()),
        "",
        "An attack proposes moves; the engine applies them, scores again, checks behaviour and decides. Each declares",
        "what it may ask of the probe (*access*).",
        "",
    ]
    for name in registry.names("attacks"):
        made = registry.load("attacks", name)
        facts = {
            "access": getattr(made, "access", ""),
            "scopes": ", ".join(getattr(made, "scopes", ())),
            "needs": ", ".join(getattr(made, "needs", ())),
        }
        lines.append(card(name, made, facts))
    lines += ["# Flags", "", "| flag | raised if | what to do |", "| --- | --- | --- |"]
    lines += [
        f"| `{name}`{' (red)' if e.red else ''} | {e.raised_if} | {e.what_to_do} |" for name, e in CATALOGUE.items()
    ]
    return "\n".join(lines)


def probes() -> str:
    lines = ["# Probes", "", "Every registered probe; higher scores are more strongly positive.", ""]
    for name in registry.names("probes"):
        made = registry.load("probes", name)
        traits = [field.name for field in dataclasses.fields(made.traits) if getattr(made.traits, field.name)]
        lines.append(card(name, made, {"traits": ", ".join(traits)}))
    return "\n".join(lines)


def testbeds() -> str:
    lines = ["# Testbeds", "", "A model, its data, and the known truth about what a probe should report.", ""]
    for name, what in registry.describe("testbeds").items():
        module = inspect.getmodule(type(registry.load("testbeds", name)))
        lines += [f"## {name}", "", plain(what), "", paragraph(module.__doc__ if module else ""), ""]
    return "\n".join(lines)


def suite() -> str:
    """What each check of the probe suite catches, from its docstring."""
    rows = {}
    for name in registry.names("probes"):
        for check, run in checks_for_probe(registry.load("probes", name)).items():
            function = getattr(run, "func", run)
            rows.setdefault(check, paragraph(function.__doc__))
    return "\n".join(["| check | what it demands |", "| --- | --- |", *(f"| `{k}` | {v} |" for k, v in rows.items())])


def write(path: str, text: str) -> None:
    with mkdocs_gen_files.open(path, "w") as file:
        file.write(text + "\n")


write("attacks.md", attacks())
write("probes.md", probes())
write("testbeds.md", testbeds())
write("api.md", "# API\n\n" + "\n\n".join(f"::: elk_stress.{name}" for name in elk_stress.__all__ if name[0] != "_"))
write("contributing.md", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
page = (ROOT / "docs" / "test-your-probe.md").read_text(encoding="utf-8")
write("test-your-probe.md", page.split("<!-- checks -->")[0] + suite())
for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
    write(f"notebooks/{notebook.name}", notebook.read_text(encoding="utf-8"))
