"""Coverage of the left tail's 95% intervals: beta-binomial items in entities of three that share their chance.

Repeats in which nothing was evaded have no tail and no interval; they are left out. At 95% fewer than 360 of 400 would
be one chance in 40,000. Intervals may be too wide for steep tails, which is the honest side.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import betaln

from elk_stress.left_tail import fit_left_tail

pytestmark = pytest.mark.statistics

REPEATS, FEWEST, N = 400, 360, np.array([1, 4, 8, 32, 128])


@pytest.mark.parametrize(
    ("a", "b", "entities", "n_draws"),
    [
        (0.5, 2.0, 40, 8),
        (0.5, 2.0, 100, 16),
        (2.0, 10.0, 40, 8),
        (0.3, 5.0, 40, 8),
        # five and two entities of which anything was ever evaded
        (0.3, 20.0, 40, 8),
        (0.3, 40.0, 30, 8),
        # items alike
        (50.0, 500.0, 40, 8),
    ],
)
def test_intervals_cover(a: float, b: float, entities: int, n_draws: int) -> None:
    truth = -np.expm1(betaln(a, b + N) - betaln(a, b))
    hits, seen = np.zeros(len(N) + 1), 0
    for seed in range(REPEATS):
        rng = np.random.default_rng(np.random.SeedSequence([seed, 0xC0FE]))
        counts = rng.binomial(n_draws, np.repeat(rng.beta(a, b, entities), 3))
        found = fit_left_tail(
            counts, n_draws, groups=np.repeat(np.arange(entities), 3), replicates=100, seed=seed
        )  # fmt: skip
        if found is None:
            continue
        seen += 1
        (low, high), (least, most) = found.band(N), found.interval
        hits += [*((low <= truth) & (truth <= high)), least <= a <= most]
    assert hits.min() >= FEWEST / REPEATS * seen, f"exponent last: {hits} of {seen}"
