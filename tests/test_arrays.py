"""One code for numpy, torch and jax: what each library does by itself."""

from __future__ import annotations

from typing import Any

import array_api_strict
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from elk_stress.core.arrays import k_smallest

_MAKE: dict[str, Any] = {
    "numpy": np.asarray,
    "strict": array_api_strict.asarray,
    "torch": torch.as_tensor,
    "jax": jnp.asarray,
}


@pytest.mark.parametrize("library", _MAKE)
@pytest.mark.parametrize("k", [1, 5, 40])
def test_k_smallest_are_those_that_sorting_finds(library: str, k: int) -> None:
    values = np.random.default_rng(np.random.SeedSequence(0)).standard_normal((3, 7, 40)).astype(np.float32)
    found = np.asarray(k_smallest(_MAKE[library](values), k))
    assert found.shape == (3, 7, k)
    np.testing.assert_array_equal(np.sort(found), np.sort(np.argsort(values)[..., :k]))


@pytest.mark.parametrize("library", _MAKE)
def test_k_smallest_of_ties_are_different_ones(library: str) -> None:
    found = np.asarray(k_smallest(_MAKE[library](np.array([1.0, 0.0, 0.0, 0.0], dtype=np.float32)), 2))
    assert len(set(found.tolist())) == 2
    assert 0 not in found
