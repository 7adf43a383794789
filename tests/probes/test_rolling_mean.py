"""The largest rolling mean: a passage is found where neither a token nor the whole text tells; padding is nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from token_checks import any_batch_shape, every_library_agrees, saved_and_loaded

from elk_stress.probes.rolling_mean import RollingMean, _highest
from elk_stress.probing.probe import FittedProbe, as_fitted
from elk_stress.thoughts.conformal import auroc


def passage(n: int, seed: int, tokens: int = 24, dim: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Four consecutive tokens of a positive lie 1.5 standard deviations along a direction; all else is noise."""
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    labels = rng.integers(0, 2, n)
    rows = rng.standard_normal((n, tokens, dim)) + 0.5
    start = rng.integers(0, tokens - 3, n)
    for place in range(4):
        rows[np.arange(n), start + place] += 1.5 * labels[:, None] / np.sqrt(dim)
    return rows, labels


@pytest.fixture(scope="module")
def fitted() -> FittedProbe:
    return as_fitted("rolling_mean", *passage(800, 0))


def by_hand(fitted: FittedProbe, item: np.ndarray, window: int | None = None) -> float:
    """The score of one item ``(tokens, d)``, all of whose tokens are there, as the docstring says it."""
    parameters = fitted.parameters
    tokens = item @ parameters["weight"] - parameters["offset"]
    window = min(window or len(parameters["kernel"]), len(tokens))
    means = [tokens[start : start + window].mean() for start in range(len(tokens) - window + 1)]
    return float(max(means) + parameters["bias"])


def test_it_finds_the_passage_and_its_length(fitted: FittedProbe) -> None:
    (rows, labels), (fresh, truth) = passage(800, 0), passage(2000, 1)
    assert fitted.notes["window"] == 4
    mean = auroc(as_fitted("logistic", rows.mean(axis=1), labels).score(fresh.mean(axis=1)), truth)
    largest = auroc(as_fitted("max_pool", rows, labels).score(fresh), truth)
    ours = auroc(fitted.score(fresh), truth)
    assert ours > max(mean, largest) + 0.05
    planted = fresh.sum(axis=2)
    known = auroc(np.stack([planted[:, s : s + 4].mean(axis=1) for s in range(21)]).max(axis=0), truth)
    assert ours > known - 0.03


def test_one_telling_token_is_a_window_of_one() -> None:
    rng = np.random.default_rng(np.random.SeedSequence(2))
    labels = rng.integers(0, 2, 400)
    rows = rng.standard_normal((400, 8, 6))
    rows[np.arange(400), rng.integers(0, 8, 400), 0] += 5.0 * labels
    assert as_fitted("rolling_mean", rows, labels).notes["window"] == 1


def test_the_score_is_the_largest_mean(fitted: FittedProbe) -> None:
    rows, _ = passage(5, 3)
    np.testing.assert_allclose(fitted.score(rows), [by_hand(fitted, item) for item in rows])
    # items shorter than the window: the mean of what is there
    for tokens in (1, 2, 3, 4, 5):
        np.testing.assert_allclose(fitted.score(rows[:, :tokens]), [by_hand(fitted, item) for item in rows[:, :tokens]])


@pytest.mark.parametrize("end", ["left", "right", "both"])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 9])
def test_padding_changes_nothing(fitted: FittedProbe, end: str, length: int) -> None:
    rows, _ = passage(6, 4)
    start = {"left": 24 - length, "right": 0, "both": 7}[end]
    mask = np.zeros((6, 24), dtype=bool)
    mask[:, start : start + length] = True
    expected = fitted.score(rows[:, start : start + length])
    for junk in (0.0, 1e6, np.nan):
        padded = np.where(mask[..., None], rows, junk)
        np.testing.assert_allclose(fitted.score(padded, mask), expected, rtol=1e-9)


def test_windows_with_gaps_count_only_where_no_window_is_full(fitted: FittedProbe) -> None:
    rows, _ = passage(1, 5)
    mask = np.ones((1, 24), dtype=bool)
    mask[0, 10] = False
    full = max(by_hand(fitted, rows[0, :10]), by_hand(fitted, rows[0, 11:]))
    np.testing.assert_allclose(fitted.score(rows, mask), [full])
    nothing = np.zeros((1, 24), dtype=bool)
    np.testing.assert_allclose(fitted.score(rows, nothing), fitted.parameters["bias"])


def test_the_fit_descends_on_the_score(fitted: FittedProbe) -> None:
    """At softness 0 the pool that is trained is the score, masks included."""
    rng = np.random.default_rng(np.random.SeedSequence(6))
    rows, _ = passage(6, 7, dim=16)
    mask = rng.random((6, 24)) < 0.7
    mask[0] = False
    probe, parameters = RollingMean(), dict(fitted.parameters)
    tokens = rows @ parameters["weight"] - parameters["offset"]
    windows = (1, 3, 24)
    found = _highest(
        np.repeat(tokens[..., None], 3, axis=2).astype(np.float32), mask, np.zeros(3, np.float32), windows, 0.0
    )
    for column, window in enumerate(windows):
        parameters |= {"kernel": np.full(window, 1 / window), "bias": np.zeros(())}
        expected = probe.score(np, parameters, rows, mask)
        np.testing.assert_allclose(np.asarray(found)[:, column], expected, atol=1e-4)


def test_masked_training_tokens_are_not_there() -> None:
    rows, labels = passage(200, 8)
    mask = np.arange(24) < np.random.default_rng(np.random.SeedSequence(9)).integers(1, 25, 200)[:, None]
    junk = np.where(mask[..., None], rows, rows - 40.0 * (labels[:, None, None] - 0.5))
    recipe = RollingMean(windows=(1, 4), penalties=(0.03,), steps=50)
    (clean, dirty) = (as_fitted(recipe, x, labels, mask=mask) for x in (rows, junk))
    for name, value in clean.parameters.items():
        np.testing.assert_array_equal(dirty.parameters[name], value)


@pytest.mark.parametrize("masked", [False, True])
def test_every_library_agrees(fitted: FittedProbe, masked: bool) -> None:
    rows, _ = passage(4, 10)
    mask = np.arange(24) < np.array([24, 10, 3, 1])[:, None] if masked else None
    every_library_agrees(fitted, rows, mask, slope_rtol=1e-7)


@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (0,)])
def test_batch_shapes(fitted: FittedProbe, batch: tuple[int, ...]) -> None:
    any_batch_shape(fitted, batch, 24, 16)


def test_saved_and_loaded(fitted: FittedProbe, tmp_path: Path) -> None:
    saved_and_loaded(fitted, passage(5, 12)[0], tmp_path)


def test_bad_options_are_refused() -> None:
    for bad in ({"windows": ()}, {"windows": (0,)}, {"penalties": (0.0,)}):
        with pytest.raises(ValueError, match="rolling_mean needs"):
            RollingMean(**bad)  # type: ignore[arg-type]
