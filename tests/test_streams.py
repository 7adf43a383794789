"""Random streams: every purpose has a tag of its own, so that no two draws of a run come from one stream."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
# "entropy, tag, what is counted": the entropies that are no tag
_ENTROPY_ONLY = 1


def sequences(tree: ast.Module) -> Iterator[tuple[int, list[int | bytes], int]]:
    """Line, tags and number of words of each ``SeedSequence([...])``; names of module constants are looked up."""
    constants = {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        called = isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "SeedSequence"
        if not called or not node.args or not isinstance(node.args[0], ast.List):
            continue
        words = node.args[0].elts
        tags: list[int | bytes] = []
        for word in words:
            inner = word.value if isinstance(word, ast.Starred) else word
            value = constants.get(inner.id) if isinstance(inner, ast.Name) else getattr(inner, "value", None)
            if isinstance(inner, (ast.Name, ast.Constant)) and isinstance(value, (int, bytes)):
                tags.append(value)
            elif isinstance(word, ast.Starred):
                # words of a text, such as a purpose's name
                tags.append(ast.unparse(word).encode())
        yield node.lineno, tags, len(words)


def found(root: Path) -> dict[int | bytes, list[str]]:
    places = defaultdict(list)
    for folder in ("elk_stress", "attacks", "probes"):
        for path in sorted((root / folder).rglob("*.py")):
            if path.is_symlink() or path.parent.is_symlink():
                continue
            for line, tags, words in sequences(ast.parse(path.read_text(encoding="utf-8"))):
                where = f"{path.relative_to(root)}:{line}"
                assert tags or words == _ENTROPY_ONLY, f"{where} draws from a stream without a tag of its own"
                for tag in tags:
                    places[tag].append(where)
    return places


def test_every_tag_is_used_once() -> None:
    places = found(ROOT)
    assert len(places) > 30
    assert not {hex(tag) if isinstance(tag, int) else tag: at for tag, at in places.items() if len(at) > 1}


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("a = S.SeedSequence([seed, 0xB0B])\nb = S.SeedSequence([seed, 0xB0B])", None),
        ("_N = 0xB0B\na = S.SeedSequence([seed, _N])\nb = SeedSequence([self.seed, 0xB0B, i])", None),
        ("a = SeedSequence([seed, model, step])", "without a tag"),
    ],
)
def test_a_shared_or_missing_tag_is_seen(tmp_path: Path, source: str, complaint: str | None) -> None:
    (tmp_path / "probes").mkdir()
    (tmp_path / "probes" / "bad.py").write_text(source)
    if complaint is None:
        assert {tag: len(at) for tag, at in found(tmp_path).items()} == {0xB0B: 2}
    else:
        with pytest.raises(AssertionError, match=complaint):
            found(tmp_path)


def test_a_trailing_zero_is_no_tag() -> None:
    """Numpy fills entropy up with zeros: counters from zero, without a tag, are the stream of the seed alone."""
    first, second = (np.random.SeedSequence(words).generate_state(4) for words in ([7], [7, 0, 0]))
    np.testing.assert_array_equal(first, second)
