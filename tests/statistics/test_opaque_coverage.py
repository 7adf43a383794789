"""Intervals of a probe without a gradient, over half-spaces of 5 to 25 bits: few and many, narrow and wide."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

from elk_stress import wrap
from elk_stress.core.bits import bits_of_beta
from elk_stress.thoughts.event_bits import event_bits
from elk_stress.thoughts.events import item_event
from elk_stress.threats.priors import EllipticalPrior

pytestmark = pytest.mark.statistics

ALARM = 1e-6


@pytest.mark.parametrize(("n", "dim", "seeds"), [(8, 24, 25), (60, 24, 5), (60, 128, 2)])
def test_intervals_of_half_spaces(n: int, dim: int, seeds: int) -> None:
    """At least 85% of the 95% intervals hold the exact value: fewer hits than the bar would be seen once in a million.

    Splitting's intervals rest on two runs where there are many problems, and items of one event share the probe.
    """
    distance, hits = np.linspace(1.9, 5.4, n), np.zeros((seeds, n), dtype=bool)
    bias = np.zeros((seeds, n))
    for seed in range(seeds):
        rng = np.random.default_rng(np.random.SeedSequence([22, seed]))
        weight = rng.standard_normal(dim)
        prior = EllipticalPrior(rng.standard_normal((dim, dim)) / np.sqrt(dim), name="test")
        spread = float(prior.standard_deviation(weight))
        origins = np.outer(distance * spread, weight / (weight @ weight))
        probe = wrap(lambda v, w=weight: np.asarray(v) @ w, dim=dim)
        found = event_bits(item_event(probe, prior, origins, 0.0), max_bits=100, n_particles=1000, seed=seed)
        truth = bits_of_beta(distance)
        hits[seed] = (found.low <= truth) & (truth <= found.high)
        bias[seed] = found.value - truth
    assert hits.sum() >= binom.ppf(ALARM, hits.size, 0.85)
    deep = distance > 4.2
    assert hits[:, deep].sum() >= binom.ppf(ALARM, deep.sum() * seeds, 0.85)
    assert abs(np.mean(bias[:, deep])) < 0.4
