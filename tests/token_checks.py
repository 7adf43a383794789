"""What holds of every probe that reads several tokens (or reads) of an item."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np

from elk_stress.probing.probe import FittedProbe


def every_library_agrees(
    fitted: FittedProbe,
    rows: np.ndarray,
    mask: np.ndarray | None,
    *,
    relative: float = 0.0,
    slope_rtol: float = 1e-5,
    slope_atol: float = 1e-5,
    slope_relative: float = 0.0,
) -> np.ndarray:
    """Scores of ``rows (n, tokens, d)`` in numpy, torch, array-api-strict and jax, and both gradients.

    Torch's gradient is held against a finite difference along a random direction, jax's against torch's, and no masked
    token may have any. Errors of single precision: of scores 1e-4 plus ``relative`` of the largest, of slopes
    ``slope_atol`` plus ``slope_relative`` of the largest. Returns torch's gradient.
    """
    import jax
    import jax.numpy as jnp
    import torch

    strict = importlib.import_module("array_api_strict")
    expected = fitted.score(rows, mask)
    tensor = torch.tensor(rows, requires_grad=True)
    scores = fitted.score(tensor, None if mask is None else torch.tensor(mask))
    np.testing.assert_allclose(scores.detach().numpy(), expected, atol=1e-12)
    found = fitted.score(strict.asarray(rows), None if mask is None else strict.asarray(mask))
    np.testing.assert_allclose(np.asarray(found), expected, atol=1e-12)
    there = None if mask is None else jnp.asarray(mask)
    score, traced = jax.jit(lambda x: fitted.score(x, there)), jnp.asarray(rows, dtype=jnp.float32)
    np.testing.assert_allclose(np.asarray(score(traced)), expected, atol=1e-4 + relative * np.abs(expected).max())

    (ours,) = (slope.numpy() for slope in torch.autograd.grad(scores.sum(), tensor))
    way = np.random.default_rng(np.random.SeedSequence(9)).standard_normal(rows.shape)
    slope = (fitted.score(rows + 1e-6 * way, mask) - fitted.score(rows - 1e-6 * way, mask)) / 2e-6
    np.testing.assert_allclose((ours * way).sum(axis=(1, 2)), slope, rtol=slope_rtol, atol=1e-6)
    other = np.asarray(jax.grad(lambda x: score(x).sum())(traced))
    np.testing.assert_allclose(other, ours, atol=slope_atol + slope_relative * np.abs(ours).max())
    if mask is not None:
        assert not ours[~mask].any()
    return np.asarray(ours)


def any_batch_shape(fitted: FittedProbe, batch: tuple[int, ...], tokens: int, dim: int) -> None:
    """Scores have the shape of the batch, with a mask and without."""
    rows = np.zeros((*batch, tokens, dim))
    assert np.shape(fitted.score(rows)) == batch
    assert np.shape(fitted.score(rows, np.ones((*batch, tokens), dtype=bool))) == batch


def saved_and_loaded(fitted: FittedProbe, rows: np.ndarray, folder: Path) -> None:
    """The same recipe and the same scores."""
    loaded = FittedProbe.load(fitted.save(folder))
    assert loaded.probe == fitted.probe
    np.testing.assert_array_equal(loaded.score(rows), fitted.score(rows))
