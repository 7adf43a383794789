"""What guides the search for bits of a weight change, and what is said where only a bound is known."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from elk_stress.core.bits import BitsBatch, Kind
from elk_stress.training.weight_bits import _headline, _smooth


def _scores(advantage: float, n: int = 400) -> tuple[np.ndarray, np.ndarray]:
    grid = norm.ppf((np.arange(n) + 0.5) / n)
    return advantage + grid, grid


@pytest.mark.parametrize("advantage", [0.0, 0.5, 1.0, 2.0, 4.0])
def test_guide_is_near_the_probit_of_auroc(advantage: float) -> None:
    high, low = _scores(advantage)
    assert float(_smooth(jnp.array(high), jnp.array(low))) == pytest.approx(advantage / math.sqrt(2), rel=0.2, abs=0.05)


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_guide_ignores_the_scale_of_scores(factor: float) -> None:
    high, low = _scores(1.5)
    plain = float(_smooth(jnp.array(high), jnp.array(low)))
    assert float(_smooth(jnp.array(factor * high), jnp.array(factor * low))) == pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("far", [30.0, 3000.0])
def test_items_thrown_far_out_do_not_blur_the_others(far: float) -> None:
    high, low = _scores(3.0)
    before = float(_smooth(jnp.array(high), jnp.array(low)))
    # the upper tail of the negatives and of the positives, which keeps all other pairs in order
    high[-12:] += far
    low[:12] -= far
    assert float(_smooth(jnp.array(high), jnp.array(low))) > 0.7 * before


def _batch(kinds: list[Kind], values: list[float]) -> BitsBatch:
    high = [math.inf if kind is Kind.CENSORED else value for kind, value in zip(kinds, values, strict=True)]
    low = [0.0 if kind is Kind.UPPER_BOUND else value for kind, value in zip(kinds, values, strict=True)]
    return BitsBatch.build(np.array(values), np.array(low), np.array(high), kinds, "made")


def test_a_median_over_bounds_is_a_bound() -> None:
    found = _headline(_batch([Kind.UPPER_BOUND] * 4 + [Kind.ESTIMATE] * 3, [5.0, 6.0, 7.0, 8.0, 1.0, 2.0, 3.0]))
    assert found.kind is Kind.UPPER_BOUND
    assert (found.value, found.low) == (5.0, 0.0)


def test_one_model_without_a_bound_does_not_hide_the_others() -> None:
    found = _headline(_batch([Kind.UPPER_BOUND] * 5, [math.inf, 6.0, 7.0, 8.0, 1.0]))
    assert found.kind is Kind.UPPER_BOUND
    assert (found.value, found.high) == (7.0, math.inf)


def test_a_median_over_estimates_is_an_estimate() -> None:
    found = _headline(_batch([Kind.ESTIMATE] * 7, [5.0, 6.0, 7.0, 8.0, 1.0, 2.0, 3.0]))
    assert found.kind is Kind.ESTIMATE
    assert (found.value, found.low, found.high) == (5.0, 1.0, 8.0)


def test_nothing_is_claimed_between_bounds_and_lower_limits() -> None:
    found = _headline(_batch([Kind.CENSORED] * 4 + [Kind.UPPER_BOUND] * 3, [6.0] * 4 + [100.0] * 3))
    assert found.kind is Kind.CENSORED
    assert (found.value, found.high) == (0.0, math.inf)
