"""The share of a probe that behaviour does not look at, and the bits that follow from it as epsilon goes to 0."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import elk_stress
from elk_stress.probing.probe import direction
from elk_stress.testbeds.arrays import Arrays
from elk_stress.testbeds.linear import Linear
from elk_stress.thoughts import incidental
from elk_stress.thoughts.incidental import incidental_fraction, silent_bits
from elk_stress.thoughts.prepared import Prepared, fit_probe, prepare
from elk_stress.thoughts.result import IncidentalFraction
from elk_stress.threats.priors import StudentT


@cache
def _scene() -> Prepared:
    return prepare(Linear())


def _mixed(testbed: Linear, share: float) -> np.ndarray:
    """A direction between the truth (0) and the incidental correlate (1), in the metric of natural thoughts."""
    factor = testbed.true_prior().factor
    truth, incidental = (d / np.linalg.norm(d @ factor) for d in (testbed.truth, testbed.incidental))
    return np.asarray(math.sqrt(1 - share**2) * truth + share * incidental)


def test_controls_lie_at_the_ends() -> None:
    known = _scene().testbed.known_probes()
    assert float(incidental_fraction(known["oracle"], _scene())) < 1e-6
    assert float(incidental_fraction(known["paper"], _scene())) > 0.9
    assert elk_stress.incidental_fraction is incidental_fraction


@pytest.mark.parametrize("name", ["logistic", "lda", "mass_mean"])
def test_a_fitted_probe_lies_between(name: str) -> None:
    found = incidental_fraction(name, _scene())
    assert 0.2 < found.value < 0.95
    assert found.rank == 2
    # a linear probe and a linear readout: all items agree, and only the prior is not known
    assert np.ptp(found.items) < 1e-6
    assert found.low < found.value - 0.05 < found.value + 0.05 < found.high


def test_a_given_prior_or_too_few_contexts_leave_the_items_alone() -> None:
    testbed = Linear()
    for prepared in (prepare(testbed, prior=testbed.true_prior()), prepare(Linear(n_contexts=2))):
        found = incidental_fraction("lda", prepared)
        assert (found.low, found.high) == (pytest.approx(found.value), pytest.approx(found.value))


@pytest.mark.parametrize("contexts", [8, 16])
def test_the_interval_covers_the_true_priors_fraction(contexts: int) -> None:
    """The prior that the data were drawn from, and not the one that was fitted to 8 contexts of it."""
    hits = 0
    for seed in range(20):
        testbed = Linear(dim=12, n_items=240, n_contexts=contexts, seed=seed)
        prepared = prepare(testbed, replicates=100, seed=seed)
        for name in ("logistic", "mass_mean"):
            probe = fit_probe(prepared, name)
            found = incidental_fraction(probe, prepared)
            true = testbed.true_prior()
            s = (np.asarray(probe.parameters["weight"], dtype=float) @ true.factor)[None]
            truth = np.linalg.norm(incidental.unseen(true, testbed.readout[None], s, 0.0)[0]) / np.linalg.norm(s)
            hits += found.low <= truth <= found.high
    # below 34 of 40 is one chance in a hundred at 95%; without the contexts there are none
    assert hits >= 34


def test_drawn_priors_are_around_the_fitted_one() -> None:
    """Many contexts and no shrinkage to speak of: nothing is left to draw."""
    testbed = Linear(dim=6, n_items=240, n_contexts=200)
    found = incidental_fraction("mass_mean", prepare(testbed))
    assert found.high - found.low < 0.12
    assert found.low < found.value < found.high


def test_shares_of_moments_are_those_of_the_projection() -> None:
    rng = np.random.default_rng(np.random.SeedSequence(6))
    prior = replace(_scene().prior(elk_stress.Threat()), factor=rng.standard_normal((8, 8)))
    gradient, form = rng.standard_normal((1, 8)), rng.standard_normal((1, 3, 8))
    rows = np.concatenate([gradient, form[0]]) @ prior.factor
    for tolerance in (0.0, 0.5 * float(np.linalg.svd(rows[1:])[1][1]) ** 2 * 1.001):
        ignored, rank = incidental.unseen(prior, form, gradient @ prior.factor, tolerance)
        expected = np.linalg.norm(ignored) / np.linalg.norm(rows[0])
        assert incidental._share((rows @ rows.T)[None], tolerance)[0] == pytest.approx(expected, rel=1e-9)
        assert rank == (3 if tolerance == 0 else 1)


def test_fraction_is_the_projection_written_out() -> None:
    testbed = Linear()
    factor = _scene().prior(elk_stress.Threat()).factor
    weight = np.random.default_rng(3).standard_normal(testbed.dim)
    seen = testbed.readout @ factor
    projector = np.eye(factor.shape[1]) - np.linalg.pinv(seen) @ seen
    s = factor.T @ weight
    expected = np.linalg.norm(projector @ s) / np.linalg.norm(s)
    assert float(incidental_fraction(weight, _scene())) == pytest.approx(expected, rel=1e-6)


@given(scale=st.floats(1e-3, 1e3))
@settings(max_examples=10, deadline=None)
def test_neither_the_scores_nor_the_priors_scale_matters(scale: float) -> None:
    weight = _mixed(Linear(), 0.5)
    base = float(incidental_fraction(weight, _scene()))
    assert float(incidental_fraction(scale * weight, _scene())) == pytest.approx(base, rel=1e-5)


def test_a_constant_has_no_fraction() -> None:
    assert math.isnan(incidental_fraction("rock", _scene()).value)


def test_tolerance_lets_faint_directions_count_as_ignored() -> None:
    oracle = _scene().testbed.known_probes()["oracle"]
    strict, loose = (incidental_fraction(oracle, _scene(), tolerance=t).value for t in (0.0, 1e6))
    assert strict < 1e-6
    assert loose == pytest.approx(1.0)


@pytest.mark.parametrize("share", [0.2, 0.4, 0.7, 1.0])
def test_bits_given_kept_tend_to_the_closed_form(share: float) -> None:
    testbed = Linear()
    prior, weight = testbed.true_prior(), _mixed(testbed, share)
    margin = 3.0 * float(np.linalg.norm(weight @ prior.factor))
    limit = silent_bits(np.array([margin]), weight[None], prior, testbed.readout[None])[0]
    nothing = np.zeros(testbed.dim)
    gaps = []
    for epsilon in (1e-1, 1e-3, 1e-7):
        joint = testbed.exact_bits(weight, margin, prior, epsilon).value
        given_kept = joint - testbed.exact_bits(nothing, 0.0, prior, epsilon).value
        gaps.append(abs(given_kept - limit))
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 1e-3 * limit


def test_an_oracle_needs_infinitely_many_bits() -> None:
    testbed = Linear()
    found = silent_bits(np.array([1.0]), testbed.truth[None], testbed.true_prior(), testbed.readout[None])
    assert np.isposinf(found).all()


def test_half_the_fraction_is_twice_the_margin() -> None:
    testbed = Linear()
    prior, weight = testbed.true_prior(), _mixed(Linear(), 0.5)
    factors = testbed.readout[None]
    share = float(incidental_fraction(direction(weight), prepare(testbed, prior=prior)))
    margin = 2.0 * float(np.linalg.norm(weight @ prior.factor))
    found = silent_bits(np.array([margin]), weight[None], prior, factors)[0]
    assert found == pytest.approx(float(testbed.exact_bits(weight, margin / share, prior).value), rel=1e-6)


def test_items_are_a_seeded_sample_of_all_positives(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = fit_probe(_scene(), "mlp")
    found, again, other = (
        incidental_fraction(probe, prepared) for prepared in (_scene(), replace(_scene()), replace(_scene(), seed=1))
    )
    monkeypatch.setattr(incidental, "_MOST_ITEMS", 10_000)
    whole = incidental_fraction(probe, _scene())
    assert len(whole.items) == len(_scene().positives) > 48
    assert len(found.items) == 24
    np.testing.assert_array_equal(found.items, again.items)
    assert not np.array_equal(found.items, other.items)
    # items differ under a probe that is not linear: where a share stands says which item it is
    assert len(np.unique(whole.items)) == len(whole.items)
    at = np.array([np.argmin(abs(whole.items - share)) for share in found.items])
    assert len(np.unique(at)) == 24
    assert at.max() > len(whole.items) / 2 > at.min()
    assert (whole.low, whole.high) != (found.low, found.high)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=12), st.integers(2, 5))
@settings(deadline=None)
def test_copies_within_an_entity_say_nothing_new(shares: list[float], copies: int) -> None:
    x = np.array(shares)
    once = incidental._mean_interval(x, np.arange(len(x)))
    many = incidental._mean_interval(np.repeat(x, copies), np.repeat(np.arange(len(x)), copies))
    assert many == pytest.approx(once, abs=1e-9)
    # each its own entity: Student's interval
    if np.ptp(x) > 1e-6:
        low, high = stats.t.interval(0.95, len(x) - 1, x.mean(), stats.sem(x))
        assert once == pytest.approx((x.mean(), max(low, 0.0), min(high, 1.0)), abs=1e-9)


def test_one_entity_says_nothing_of_others() -> None:
    assert incidental._mean_interval(np.array([0.25, 0.75]), np.array(["a", "a"])) == (0.5, 0.0, 1.0)


def test_the_interval_covers_over_entities() -> None:
    """24 items of 8 entities that lie alike: by items the interval would cover 74%."""
    rng = np.random.default_rng(np.random.SeedSequence(5))
    groups, hits = np.repeat(np.arange(8), 3), 0
    for _ in range(1000):
        share = np.clip(np.repeat(rng.uniform(0.2, 0.8, 8), 3) + rng.uniform(-0.05, 0.05, 24), 0, 1)
        _, low, high = incidental._mean_interval(share, groups)
        hits += low <= 0.5 <= high
    # below 917 of 1000 is one chance in a million at 95%
    assert hits >= 917


def test_refusals() -> None:
    rng = np.random.default_rng(0)
    silent = Arrays(rng.standard_normal((60, 4, 3)), np.arange(60) % 2, None, shares=(0.4, 0.3, 0.3), seed=0)
    with pytest.raises(ValueError, match="no output"):
        incidental_fraction("mass_mean", silent)
    with pytest.raises(ValueError, match="at least 0"):
        incidental_fraction("mass_mean", _scene(), tolerance=-1.0)
    testbed = Linear()
    with pytest.raises(ValueError, match="Gaussian tails only"):
        silent_bits(
            np.ones(1), testbed.truth[None], testbed.true_prior().with_tail(StudentT(5.0)), testbed.readout[None]
        )


def test_it_says_how_far_to_trust_it() -> None:
    found = incidental_fraction("lda", _scene())
    assert isinstance(found, IncidentalFraction)
    assert "reads 2 of 32" in str(found)
