"""The front door: what README and docs print is what the code prints, and no link leads nowhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from elk_stress.testbeds.linear import Linear

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# written when the site is built (docs/generate.py)
GENERATED = {"attacks.md", "probes.md", "testbeds.md", "api.md", "contributing.md", "notebooks"}
NUMBER = re.compile(r"\d+(?:\.\d+)?")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def test_the_front_page_is_one_page() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_link_leads_nowhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target or target.startswith("#"):
            continue
        path = target.split("#")[0]
        generated = page.parent == ROOT / "docs" and path.split("/")[0] in GENERATED
        assert generated or (page.parent / path).exists(), f"{page.name} links to {target}"


def test_every_page_is_in_the_site() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [page.name for page in PAGES if page.parent == ROOT / "docs"] + sorted(GENERATED - {"notebooks"})
    assert [page for page in pages if f": {page}\n" not in nav] == []


@pytest.mark.parametrize("page", ["README.md", "docs/jax.md"])
def test_what_a_page_prints_is_what_its_code_prints(page: str, tmp_path: Path) -> None:
    testbed = Linear(n_items=600, n_contexts=12)
    splits = ("train", "calibration", "test")
    np.save(tmp_path / "activations.npy", np.concatenate([testbed.activations(name, "prior") for name in splits]))
    np.save(tmp_path / "labels.npy", np.concatenate([testbed.splits[name].labels for name in splits]))
    code = "\n".join(blocks(ROOT / page, "python"))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (printed,) = blocks(ROOT / page, "text")
    found, shown = done.stdout.strip(), printed.strip()
    assert NUMBER.sub("#", found) == NUMBER.sub("#", shown)
    # another processor rounds otherwise
    pairs = zip(NUMBER.findall(found), NUMBER.findall(shown), strict=True)
    assert all(float(a) == pytest.approx(float(b), rel=0.02, abs=0.1) for a, b in pairs)
