"""What a user installs: light to import, each file once, no second copy of a class, dependencies in one direction."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "jax", "scipy", "sklearn", "transformers", "matplotlib", "optax", "hypothesis")
SCRIPTS = sorted(path for path in (ROOT / "attacks").glob("*.py") if path.name != "__init__.py")
PLUGINS = sorted(path for folder in ("probes", "attacks") for path in (ROOT / folder).glob("*.py"))


def _run(*command: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True)


def _sources() -> list[Path]:
    """Every Python file and notebook of the project, each once (the symlinked folders are not walked twice)."""
    found = []
    for folder, names, files in os.walk(ROOT):
        names[:] = [n for n in names if not n.startswith(".") and n not in ("build", "dist", "__pycache__", "runs")]
        found += [Path(folder) / file for file in files if file.endswith((".py", ".ipynb"))]
    return found


# -- what is installed with it -----------------------------------------------------------------------------------------


def test_the_lock_fits_every_python_and_every_bound() -> None:
    """``constraints.txt`` names a version of each direct dependency (but torch) that fits pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    locked = [Requirement(line) for line in lines if line and not line.lstrip().startswith("#")]
    direct = [Requirement(text) for text in sum(project["optional-dependencies"].values(), project["dependencies"])]
    direct = [asked for asked in direct if asked.name not in (project["name"], "torch")]
    assert len(direct) > 25
    for python in ("3.11", "3.12", "3.13"):
        assert f"Programming Language :: Python :: {python}" in project["classifiers"]
        here = {"python_version": python, "python_full_version": f"{python}.1"}
        versions = {r.name: str(r.specifier) for r in locked if r.marker is None or r.marker.evaluate(here)}
        for asked in direct:
            assert asked.specifier.contains(versions[asked.name].removeprefix("==")), (python, str(asked))
    # builds without a GPU differ by index, so torch and what it brings stay free
    assert not [r.name for r in locked if r.name.split("-")[0] in ("torch", "nvidia", "cuda", "triton")]


# -- importing ---------------------------------------------------------------------------------------------------------

MEASURE = f"""
import json, sys, time
start = time.perf_counter()
import elk_stress
elapsed = time.perf_counter() - start
print(json.dumps([elapsed, [name for name in {HEAVY!r} if name in sys.modules]]))
"""


def test_import_is_light() -> None:
    """The fastest of several, so that a busy machine does not decide."""
    measured = [json.loads(_run(sys.executable, "-c", MEASURE).stdout) for _ in range(5)]
    assert all(heavy == [] for _, heavy in measured)
    assert min(elapsed for elapsed, _ in measured) < 0.3


MODULES = (
    "core.registry",
    "core.bits",
    "probing.probe",
    "thoughts.attacks.protocol",
    "testbeds.protocol",
    "estimators.limit_state",
    "testing",
    "cli",
)


@pytest.mark.parametrize("module", MODULES)
def test_contract_modules_load_nothing_heavy(module: str) -> None:
    code = f"import sys, elk_stress.{module}; print([n for n in {HEAVY!r} if n in sys.modules])"
    assert _run(sys.executable, "-c", code).stdout.strip() == "[]"


def test_every_public_name_resolves() -> None:
    code = "import elk_stress; print([n for n in elk_stress.__all__ if getattr(elk_stress, n) is None])"
    done = _run(sys.executable, "-c", code)
    assert done.stdout.strip() == "[]", done.stderr[-2000:]


def test_nobody_imports_the_folders_by_their_bare_names() -> None:
    """``import probes`` would make a second class beside ``elk_stress.probes``'s."""
    guilty = []
    for path in _sources():
        if path.suffix == ".ipynb":
            cells = json.loads(path.read_text())["cells"]
            code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
            code = "\n".join(line for line in code.splitlines() if not line.lstrip().startswith(("%", "!")))
        else:
            code = path.read_text()
        guilty += [f"{path.relative_to(ROOT)}:{line}" for line in _bare_imports(code)]
    assert guilty == []
    assert len(_sources()) > 40


def _bare_imports(code: str) -> list[int]:
    lines = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules = [node.module or ""]
        else:
            continue
        if any(module.split(".")[0] in ("probes", "attacks") for module in modules):
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize(
    ("code", "lines"),
    [
        ("import probes", [1]),
        ("import os, attacks.gradient as g", [1]),
        ("def f():\n    from probes.lda import LDA", [2]),
        ("from elk_stress.probes import lda\nfrom elk_stress import attacks", []),
        ("from . import probes", []),
    ],
)
def test_bare_imports_are_seen(code: str, lines: list[int]) -> None:
    assert _bare_imports(code) == lines


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PLUGINS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_file_shadows_the_standard_library(path: Path) -> None:
    """Run as a script, a file's folder comes first on the path."""
    assert path.stem not in sys.stdlib_module_names


@pytest.mark.parametrize("path", PLUGINS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_file_is_registered(path: Path) -> None:
    """One method, one file: a file that no entry point names would be tested by nothing."""
    import tomllib

    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    modules = {value.split(":")[0] for group in points.values() for value in group.values()}
    assert path.stem == "__init__" or f"elk_stress.{path.parent.name}.{path.stem}" in modules


@pytest.mark.parametrize("name", ["probes", "attacks"])
def test_committed_as_symlinks(name: str) -> None:
    link = ROOT / "elk_stress" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
    if (ROOT / ".git").exists():
        assert _run("git", "ls-files", "-s", f"elk_stress/{name}").stdout.startswith("120000 ")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_attacks_run_as_scripts(script: Path) -> None:
    done = _run(sys.executable, str(script), "--help", cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "--testbed" in done.stdout


# -- built -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is packaged, symlinks kept, so that building and planting leave the project alone."""
    copy = tmp_path_factory.mktemp("tree")
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("elk_stress", "probes", "attacks"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=unwanted)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def built(tree: Path) -> Path:
    """The wheel and the sdist; the wheel is made from the sdist, so it shows what both hold."""
    done = _run(sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", cwd=tree)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return tree / "dist"


def _expected() -> set[str]:
    engine = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "elk_stress").rglob("*.py")
        # links to the folders beside it
        if path.relative_to(ROOT).parts[1] not in ("probes", "attacks")
    }
    plugins = {f"elk_stress/{path.relative_to(ROOT)}" for path in PLUGINS}
    return engine | plugins | {"elk_stress/py.typed"}


def test_tracked_files_have_plain_names() -> None:
    """A test that writes where it stands could leave what no other system can check out."""
    listed = _run("git", "ls-files", "-z").stdout.split("\0")
    assert [name for name in listed if not re.fullmatch(r"[A-Za-z0-9_./-]*", name)] == []


def test_wheel_holds_every_file_once(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert [name for name, count in Counter(names).items() if count > 1] == []
    assert {name for name in names if name.endswith((".py", "py.typed"))} == _expected()


def test_sdist_holds_every_file_once(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = [name.split("/", 1)[1] for name in archive.getnames() if "/" in name]
    assert [name for name, count in Counter(names).items() if count > 1] == []
    for path in PLUGINS:
        relative = str(path.relative_to(ROOT))
        assert relative in names
        assert f"elk_stress/{relative}" not in names
    assert "elk_stress/py.typed" in names


def test_no_data_file_is_left_out_of_the_wheel(built: Path) -> None:
    """Anything beside the Python files that the engine keeps in its folders must be declared as package data."""
    (wheel,) = built.glob("*.whl")
    data = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "elk_stress").rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert data <= set(zipfile.ZipFile(wheel).namelist())


# -- dependency direction ----------------------------------------------------------------------------------------------


def _lint_imports(tree: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("lint-imports")
    return _run(str(program), "--no-cache", cwd=tree, PYTHONPATH=str(tree))


def test_the_engine_imports_no_probe_and_no_attack(tree: Path) -> None:
    done = _lint_imports(tree)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "the engine imports no probe and no attack KEPT" in done.stdout
    assert "a room imports rooms below it, never above KEPT" in done.stdout


@pytest.mark.parametrize(
    ("where", "planted", "found"),
    [
        # into the symlinked folders too
        ("thoughts/survival.py", "from elk_stress.probes.lda import LDA", "thoughts.survival -> elk_stress."),
        ("thoughts/survival.py", "import elk_stress.attacks.gradient", "thoughts.survival -> elk_stress."),
        ("core/files.py", "import elk_stress.threats.tails", "core.files -> elk_stress.threats.tails"),
    ],
)
def test_a_planted_violation_is_caught(tree: Path, where: str, planted: str, found: str) -> None:
    """Control of the test above."""
    victim = tree / "elk_stress" / where
    clean = victim.read_text()
    try:
        victim.write_text(f"{clean}\n\ndef late() -> None:\n    {planted}\n")
        done = _lint_imports(tree)
    finally:
        victim.write_text(clean)
    assert done.returncode == 1
    assert f"elk_stress.{found}" in done.stdout
