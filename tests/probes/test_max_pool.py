"""The maximum over tokens: one telling token is found, masked tokens are not there, and every library agrees."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from token_checks import any_batch_shape, every_library_agrees, saved_and_loaded

from elk_stress.probes.max_pool import MaxPool
from elk_stress.probing.fit.pooling import annealed_max
from elk_stress.probing.probe import FittedProbe, as_fitted
from elk_stress.thoughts.conformal import auroc


def one_token(n: int, seed: int, tokens: int = 8, dim: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """One random token of a positive lies four standard deviations along a direction; all other tokens are noise."""
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    labels = rng.integers(0, 2, n)
    rows = rng.standard_normal((n, tokens, dim)) + 0.5
    rows[np.arange(n), rng.integers(0, tokens, n)] += 4.0 * labels[:, None] / np.sqrt(dim)
    return rows, labels


def prefixes(n: int, tokens: int, seed: int) -> np.ndarray:
    """Each item has its first 1 to ``tokens`` tokens."""
    lengths = np.random.default_rng(np.random.SeedSequence(seed)).integers(1, tokens + 1, n)
    return np.arange(tokens) < lengths[:, None]


@pytest.fixture(scope="module")
def fitted() -> FittedProbe:
    return as_fitted("max_pool", *one_token(400, 0))


def test_it_finds_the_one_telling_token(fitted: FittedProbe) -> None:
    (rows, labels), (fresh, truth) = one_token(400, 0), one_token(2000, 1)
    mean = as_fitted("logistic", rows.mean(axis=1), labels)
    known = auroc(fresh.sum(axis=2).max(axis=1), truth)
    ours = auroc(fitted.score(fresh), truth)
    assert ours > auroc(mean.score(fresh.mean(axis=1)), truth) + 0.1
    # nearly as well as with the planted direction given
    assert ours > known - 0.01


def test_the_score_is_the_largest_token(fitted: FittedProbe) -> None:
    rows, _ = one_token(5, 2)
    weight, offset, bias = (fitted.parameters[name] for name in ("weight", "offset", "bias"))
    expected = [max(float(token @ weight - offset) for token in item) + float(bias) for item in rows]
    np.testing.assert_allclose(fitted.score(rows), expected)


def test_masked_tokens_are_not_there(fitted: FittedProbe) -> None:
    rows, _ = one_token(6, 3)
    mask = prefixes(6, 8, 4)
    scores = fitted.score(rows, mask)
    for item, there, score in zip(rows, mask, scores, strict=True):
        np.testing.assert_allclose(fitted.score(item[there]), score)
    for junk in (1e6, np.nan):
        np.testing.assert_array_equal(fitted.score(np.where(mask[..., None], rows, junk), mask), scores)
    np.testing.assert_array_equal(fitted.score(rows, np.ones_like(mask)), fitted.score(rows))
    # nothing there: what one token at the training mean would score
    np.testing.assert_allclose(fitted.score(rows, np.zeros_like(mask)), fitted.parameters["bias"])


def test_masked_training_tokens_are_not_there() -> None:
    """Truth sits in the tokens that are there; the masked ones hold the opposite, ten times as strong."""
    rows, labels = one_token(400, 5)
    mask = prefixes(400, 8, 6)
    junk = np.where(mask[..., None], rows, rows - 40.0 * (labels[:, None, None] - 0.5))
    (clean, dirty) = (as_fitted("max_pool", x, labels, mask=mask) for x in (rows, junk))
    for name, value in clean.parameters.items():
        np.testing.assert_array_equal(dirty.parameters[name], value)


@pytest.mark.parametrize("masked", [False, True])
def test_every_library_agrees(fitted: FittedProbe, masked: bool) -> None:
    rows, _ = one_token(5, 7)
    mask = prefixes(5, 8, 8) if masked else None
    ours = every_library_agrees(fitted, rows, mask)
    # the slope of a maximum: the weight, at the largest token that is there
    best = np.where(True if mask is None else mask, rows @ fitted.parameters["weight"], -np.inf).argmax(axis=1)
    slope = np.zeros_like(rows)
    slope[np.arange(5), best] = fitted.parameters["weight"]
    np.testing.assert_allclose(ours, slope, atol=1e-12)


def test_junk_in_masked_tokens_leaves_no_trace_in_the_gradient(fitted: FittedProbe) -> None:
    import torch

    rows, _ = one_token(4, 9)
    mask = prefixes(4, 8, 10)
    tensor = torch.tensor(np.where(mask[..., None], rows, np.nan), requires_grad=True)
    (slope,) = torch.autograd.grad(fitted.score(tensor, torch.tensor(mask)).sum(), tensor)
    assert torch.isfinite(slope).all()
    assert not slope[torch.tensor(~mask)].any()


@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (0,)])
def test_batch_shapes(fitted: FittedProbe, batch: tuple[int, ...]) -> None:
    any_batch_shape(fitted, batch, 8, 16)


def test_scoring_makes_one_number_per_token(fitted: FittedProbe) -> None:
    """Large batches are scored thousands of times: no copy of the activations."""
    rows = np.zeros((500, 8, 16))
    tracemalloc.start()
    fitted.score(rows, np.ones((500, 8), dtype=bool))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < rows.nbytes / 2


@pytest.mark.parametrize("softness", [0.0, 1e-3])
def test_the_annealed_pool_ends_at_the_maximum(softness: float) -> None:
    rng = np.random.default_rng(np.random.SeedSequence(11))
    values = rng.standard_normal((7, 5, 3)).astype(np.float32)
    valid = np.arange(5) < np.array([0, 1, 2, 3, 4, 5, 5])[:, None]
    found = np.asarray(annealed_max(values, valid, softness))
    np.testing.assert_array_equal(found[0], 0.0)
    for row in range(1, 7):
        np.testing.assert_allclose(found[row], values[row, valid[row]].max(axis=0), atol=0.01)


def test_the_annealed_pool_starts_at_the_mean() -> None:
    values = np.random.default_rng(np.random.SeedSequence(12)).standard_normal((4, 5, 3)).astype(np.float32) * 0.01
    found = np.asarray(annealed_max(values, np.ones((4, 5), dtype=bool), 1.0))
    np.testing.assert_allclose(found, values.mean(axis=1), atol=1e-4)


def test_shuffled_labels_stay_at_chance() -> None:
    rng = np.random.default_rng(np.random.SeedSequence(13))
    (rows, labels), (fresh, truth) = one_token(400, 14), one_token(2000, 15)
    shuffled = as_fitted("max_pool", rows, rng.permutation(labels))
    assert abs(auroc(shuffled.score(fresh), truth) - 0.5) < 0.2
    assert shuffled.notes["held_out_loss"] > 0.65


def test_saved_and_loaded(fitted: FittedProbe, tmp_path: Path) -> None:
    saved_and_loaded(fitted, one_token(5, 16)[0], tmp_path)


def test_bad_options_and_masks_are_refused() -> None:
    with pytest.raises(ValueError, match="max_pool needs"):
        MaxPool(penalties=())
    rows, labels = one_token(40, 17)
    with pytest.raises(ValueError, match="one truth value per token"):
        as_fitted("max_pool", rows, labels, mask=np.ones((40, 7), dtype=bool))
    with pytest.raises(ValueError, match=r"mask must be .* with some token there"):
        as_fitted("max_pool", rows, labels, mask=np.zeros((40, 8), dtype=bool))
