"""Per-item chances of evasion and the power law of best-of-n."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats
from scipy.special import gammaln

from elk_stress.thoughts.power_law import LeftTail, fit_left_tail


def _counts(a: float, b: float, n_items: int, n_draws: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.binomial(n_draws, rng.beta(a, b, n_items))


def _made(a: float, b: float) -> LeftTail:
    return LeftTail(a, b, np.array([[a, b]]), np.array([[a, b]]), 10, 10, 10)


def _entities(a: float, b: float, n: int, n_draws: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Counts and entities of ``n`` entities of three items each, which share their chance."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, 3]))
    return rng.binomial(n_draws, np.repeat(rng.beta(a, b, n), 3)), np.repeat(np.arange(n), 3)


@pytest.mark.parametrize(("a", "b"), [(0.3, 2.0), (0.8, 0.8), (2.0, 10.0)])
def test_it_finds_the_distribution(a: float, b: float) -> None:
    found = fit_left_tail(_counts(a, b, 20_000, 20), 20, replicates=20)
    assert found is not None
    assert found.a == pytest.approx(a, rel=0.08)
    assert found.b == pytest.approx(b, rel=0.12)


def test_it_is_at_the_maximum_of_scipys_likelihood() -> None:
    counts = _counts(0.5, 3.0, 300, 12)
    found = fit_left_tail(counts, 12, replicates=2)
    assert found is not None

    def likelihood(a: float, b: float) -> float:
        return float(stats.betabinom.logpmf(counts, 12, a, b).sum())

    best = likelihood(found.a, found.b)
    for factor in (0.9, 1.1):
        assert likelihood(found.a * factor, found.b) < best
        assert likelihood(found.a, found.b * factor) < best


def test_the_curve_is_the_average_over_chances() -> None:
    made = _made(0.6, 2.0)
    chances = np.random.default_rng(1).beta(0.6, 2.0, 400_000)
    n = np.array([1, 4, 32])
    assert made.broken(n) == pytest.approx([1 - ((1 - chances) ** k).mean() for k in n], rel=5e-3)


def test_survivors_follow_a_power_law() -> None:
    made = _made(0.4, 1.5)
    n = np.array([1e4, 1e6])
    held = 1 - made.broken(n)
    assert held == pytest.approx(np.exp(gammaln(1.9) - gammaln(1.5)) * n**-0.4, rel=1e-3)


def test_the_exponents_interval_covers() -> None:
    hits = 0
    for seed in range(40):
        found = fit_left_tail(_counts(0.5, 2.0, 150, 16, seed), 16, replicates=100, seed=seed)
        assert found is not None
        low, high = found.interval
        hits += low <= 0.5 <= high
    # at 95% fewer than 33 of 40 has a chance of 0.3%
    assert hits >= 33


def test_entities_are_resampled_and_not_their_items() -> None:
    """Three copies of each item say nothing new: the interval is that of the items."""
    counts = _counts(0.5, 2.0, 60, 8)
    once = fit_left_tail(counts, 8, seed=4)
    thrice = fit_left_tail(np.repeat(counts, 3), 8, groups=np.repeat(np.arange(60), 3), seed=4)
    apart = fit_left_tail(np.repeat(counts, 3), 8, seed=4)
    assert once is not None
    assert thrice is not None
    assert apart is not None
    assert (thrice.n_items, thrice.n_entities, apart.n_entities) == (180, 60, 180)
    assert thrice.interval == pytest.approx(once.interval, rel=1e-3)
    n = np.array([1, 8, 64])
    for got, wanted, less in zip(thrice.band(n), once.band(n), apart.band(n), strict=True):
        assert got == pytest.approx(wanted, rel=1e-3)
        assert (abs(got - thrice.broken(n)) > 1.2 * abs(less - thrice.broken(n))).all()


def test_names_of_entities_do_not_matter() -> None:
    counts, groups = _entities(0.5, 2.0, 20, 8, 0)
    named = np.array([f"entity {g}" for g in groups])
    one, other = (fit_left_tail(counts, 8, groups=g, replicates=30) for g in (groups, named))
    assert one is not None
    assert other is not None
    assert other.n_entities == one.n_entities == 20
    assert other.likely == pytest.approx(one.likely)


def test_resamples_without_an_evasion_are_kept() -> None:
    """One of 20 entities was evaded: more than a third of all resamples have none."""
    counts = np.zeros(60)
    counts[:3] = 2
    found = fit_left_tail(counts, 8, groups=np.repeat(np.arange(20), 3), replicates=400)
    assert found is not None
    assert len(found.replicates) == 400
    none = (found.replicates == [0.0, 1.0]).all(axis=1)
    # (1 - 1/20)^20 = 36%; five standard deviations
    assert abs(none.mean() - 0.95**20) < 5 * math.sqrt(0.36 * 0.64 / 400)
    low, high = found.band(np.array([1, 100]))
    np.testing.assert_array_equal(low, 0.0)
    assert (high > found.broken(np.array([1, 100]))).all()
    # nothing is known of the exponent
    assert found.interval == (0.0, math.inf)


def test_resamples_where_everything_was_evaded_are_kept() -> None:
    counts = np.full(60, 8)
    counts[:3] = 6
    found = fit_left_tail(counts, 8, groups=np.repeat(np.arange(20), 3), replicates=100)
    assert found is not None
    assert (found.replicates == [1.0, 0.0]).all(axis=1).any()
    assert found.band(np.array([1]))[1] == 1.0
    assert found.interval == (0.0, math.inf)


def test_a_few_evasions_do_not_make_a_steep_tail_certain() -> None:
    """Single evasions resample to single evasions: the bootstrap alone is sure that all items are alike."""
    counts = np.zeros(120)
    counts[:24:3] = 1
    found = fit_left_tail(counts, 8, groups=np.repeat(np.arange(40), 3))
    assert found is not None
    assert np.quantile(found.replicates[:, 0], 0.05) > 10
    low, high = found.interval
    assert low < 0.5
    assert high == math.inf


def test_intervals_cover_with_entities() -> None:
    """Items that share their chance in threes; by items the interval of the share that one draw breaks covers 70%."""
    n = np.array([1, 8, 64])
    truth = _made(0.5, 2.0).broken(n)
    hits = np.zeros(4)
    for seed in range(60):
        counts, groups = _entities(0.5, 2.0, 40, 8, seed)
        found = fit_left_tail(counts, 8, groups=groups, replicates=60, seed=seed)
        assert found is not None
        low, high = found.band(n)
        hits += [*((low <= truth) & (truth <= high)), found.interval[0] <= 0.5 <= found.interval[1]]
    # at 95% fewer than 51 of 60 has a chance of 0.1%
    assert hits.min() >= 51


@pytest.mark.parametrize("count", [0, 8])
def test_no_tail_where_nothing_or_everything_fails(count: int) -> None:
    assert fit_left_tail(np.full(30, count), 8) is None


def test_a_probes_tail_binds_the_items_of_an_entity() -> None:
    """Two positives an entity, and each may be counted on both halves of the contexts."""
    from elk_stress.thoughts import best_of_n as prediction

    rng = np.random.default_rng(np.random.SeedSequence(8))
    scores = rng.normal(1.0, 1.0, (60, 12))
    prepared = SimpleNamespace(
        test=scores, positives=np.arange(0, 60, 2), items=SimpleNamespace(groups=np.repeat(np.arange(15), 4)), seed=0
    )
    place = SimpleNamespace(
        probe=SimpleNamespace(score=lambda x: x), detection=SimpleNamespace(threshold=0.5, fpr=0.05), threat=None
    )
    found = prediction._left_tail(prepared, place)  # type: ignore[arg-type]
    assert found is not None
    halves = scores[::2, :6].mean(axis=1) > 0.5, scores[::2, 6:].mean(axis=1) > 0.5
    # an item that both halves catch is one item
    assert found.n_items == int((halves[0] | halves[1]).sum()) <= 30 < sum(int(caught.sum()) for caught in halves)
    assert found.n_draws == 6
    assert found.n_entities == len(np.unique(np.repeat(np.arange(15), 2)[halves[0] | halves[1]])) <= 15


def test_contexts_that_sway_all_items_alike_widen_the_band() -> None:
    """The same margins, and the same spread in a context; either all items share it or each has its own."""
    from elk_stress.thoughts import best_of_n as prediction

    rng = np.random.default_rng(np.random.SeedSequence(9))
    margin, n = rng.normal(1.5, 0.5, (80, 1)), np.array([1, 8])
    width = []
    for shape in ((80, 8), (1, 8)):
        prepared = SimpleNamespace(
            test=margin + rng.standard_normal(shape) * np.ones((80, 8)),
            positives=np.arange(80),
            items=SimpleNamespace(groups=np.arange(80)),
            seed=0,
        )
        place = SimpleNamespace(
            probe=SimpleNamespace(score=lambda x: x), detection=SimpleNamespace(threshold=0.0), threat=None
        )
        found = prediction._left_tail(prepared, place)  # type: ignore[arg-type]
        assert found is not None
        low, high = found.band(n)
        width.append(high - low)
    assert width[1][0] > 4 * width[0][0]
    assert width[1][1] > 1.5 * width[0][1]


def test_tallies_that_were_drawn_elsewhere_take_the_place_of_resamples() -> None:
    counts = _counts(0.5, 2.0, 60, 8)
    tallies = np.array([np.bincount(counts, minlength=9), np.bincount(counts // 2, minlength=5).tolist() + [0] * 4])
    found = fit_left_tail(counts, 8, tallies=tallies)
    assert found is not None
    assert found.replicates[0] == pytest.approx([found.a, found.b], rel=1e-3)
    # half the counts of as many draws: about half the chance
    assert found.replicates[1, 0] / found.replicates[1].sum() == pytest.approx(
        np.mean(counts // 2) / 8, rel=0.05
    )  # fmt: skip


def test_refusals() -> None:
    with pytest.raises(ValueError, match="one count of 0 to 8"):
        fit_left_tail(np.array([9.0]), 8)
    with pytest.raises(ValueError, match="entity of each of 2 items, got 3"):
        fit_left_tail(np.array([1.0, 2.0]), 8, groups=np.arange(3))
