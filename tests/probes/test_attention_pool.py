"""Attention over tokens: where to look and what to read there may be two directions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from token_checks import any_batch_shape, every_library_agrees, saved_and_loaded

from elk_stress.probes.attention_pool import AttentionPool
from elk_stress.probing.probe import FittedProbe, as_fitted
from elk_stress.thoughts.conformal import auroc


def marked(n: int, seed: int, tokens: int = 8, dim: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Feature 0 says the label in one random token, which feature 1 marks; elsewhere feature 0 lies."""
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    labels, each = rng.integers(0, 2, n), np.arange(n)
    rows = rng.standard_normal((n, tokens, dim))
    rows[..., 0] += 2.0 * rng.choice([-1, 1], (n, tokens))
    place = rng.integers(0, tokens, n)
    rows[each, place, 1] += 5.0
    rows[each, place, 0] = rng.standard_normal(n) + 2.0 * (2 * labels - 1)
    return rows + 0.5, labels


@pytest.fixture(scope="module")
def fitted() -> FittedProbe:
    return as_fitted("attention_pool", *marked(800, 0))


def test_it_looks_where_the_mark_is(fitted: FittedProbe) -> None:
    (rows, labels), (fresh, truth) = marked(800, 0), marked(2000, 1)
    mean = auroc(as_fitted("logistic", rows.mean(axis=1), labels).score(fresh.mean(axis=1)), truth)
    largest = auroc(as_fitted("max_pool", rows, labels).score(fresh), truth)
    ours = auroc(fitted.score(fresh), truth)
    assert ours > 0.97
    assert ours > largest + 0.02
    assert ours > mean + 0.2
    # the query reads the mark, the readout the truth
    query, readout = (fitted.parameters["weight"] * rows.std(axis=(0, 1))[:, None]).T
    assert np.abs(query).argmax() == 1
    assert np.abs(readout).argmax() == 0


def test_it_finds_one_telling_token() -> None:
    def draw(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(np.random.SeedSequence(seed))
        labels = rng.integers(0, 2, n)
        rows = rng.standard_normal((n, 8, 16)) + 0.5
        rows[np.arange(n), rng.integers(0, 8, n)] += 1.0 * labels[:, None]
        return rows, labels

    (rows, labels), (fresh, truth) = draw(400, 2), draw(2000, 3)
    ours = auroc(as_fitted("attention_pool", rows, labels).score(fresh), truth)
    mean = auroc(as_fitted("logistic", rows.mean(axis=1), labels).score(fresh.mean(axis=1)), truth)
    assert ours > mean + 0.1


def test_the_score_is_the_attended_readout(fitted: FittedProbe) -> None:
    rows, _ = marked(5, 4)
    weight, offset, bias = (fitted.parameters[name] for name in ("weight", "offset", "bias"))
    for item, score in zip(rows, fitted.score(rows), strict=True):
        share = np.exp(item @ weight[:, 0])
        share /= share.sum()
        np.testing.assert_allclose(share @ (item @ weight[:, 1] - offset[1]) + bias, score)


def test_masked_tokens_are_not_there(fitted: FittedProbe) -> None:
    rows, _ = marked(6, 5)
    mask = np.arange(8) < np.array([1, 2, 3, 5, 7, 8])[:, None]
    scores = fitted.score(rows, mask)
    for item, there, score in zip(rows, mask, scores, strict=True):
        np.testing.assert_allclose(fitted.score(item[there]), score)
    for junk in (1e6, np.nan):
        np.testing.assert_array_equal(fitted.score(np.where(mask[..., None], rows, junk), mask), scores)
    np.testing.assert_allclose(fitted.score(rows, np.zeros_like(mask)), fitted.parameters["bias"])


def test_masked_training_tokens_are_not_there() -> None:
    rows, labels = marked(200, 6)
    mask = np.arange(8) < np.random.default_rng(np.random.SeedSequence(7)).integers(1, 9, 200)[:, None]
    junk = np.where(mask[..., None], rows, rows - 40.0 * (labels[:, None, None] - 0.5))
    recipe = AttentionPool(penalties=(0.01,), steps=50)
    (clean, dirty) = (as_fitted(recipe, x, labels, mask=mask) for x in (rows, junk))
    for name, value in clean.parameters.items():
        np.testing.assert_array_equal(dirty.parameters[name], value)


@pytest.mark.parametrize("masked", [False, True])
def test_every_library_agrees(fitted: FittedProbe, masked: bool) -> None:
    rows, _ = marked(4, 8)
    mask = np.arange(8) < np.array([8, 5, 2, 1])[:, None] if masked else None
    every_library_agrees(fitted, rows, mask, relative=1e-4, slope_atol=0.0, slope_relative=1e-3)


@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (0,)])
def test_batch_shapes(fitted: FittedProbe, batch: tuple[int, ...]) -> None:
    any_batch_shape(fitted, batch, 8, 16)


def test_the_order_of_tokens_does_not_matter(fitted: FittedProbe) -> None:
    rows, _ = marked(5, 10)
    np.testing.assert_allclose(fitted.score(rows[:, ::-1]), fitted.score(rows))


def test_saved_and_loaded(fitted: FittedProbe, tmp_path: Path) -> None:
    saved_and_loaded(fitted, marked(5, 11)[0], tmp_path)


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="attention_pool needs"):
        AttentionPool(penalties=(-1.0,))
