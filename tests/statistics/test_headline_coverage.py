"""What the printed figures are worth on a testbed whose prior, item means and thresholds are known exactly.

Every seed is a new testbed (16 dimensions, 8 contexts, 320 items) with new directions, contexts and items. The truth is
that of the population: its own threshold at 5%, its own item means, the prior that the data were drawn from. Bars: with
the coverage that the method was measured to have (stated beside each test), fewer hits would be seen once in a million
runs. Where that coverage is below 95% the docstring says why.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr
from scipy.stats import binom

from elk_stress.probing.probe import FittedProbe, direction
from elk_stress.testbeds.linear import Linear
from elk_stress.thoughts.baseline import Baseline, baseline_of
from elk_stress.thoughts.best_of_n import best_of_n_curves, prediction_flags
from elk_stress.thoughts.engine import compare, stress
from elk_stress.thoughts.item_scope import stress_items
from elk_stress.thoughts.prepared import Prepared, fit_probe, prepare
from elk_stress.thoughts.result import ThreatResult
from elk_stress.thoughts.universal_scope import stress_universal
from elk_stress.threats.threat import Threat

pytestmark = pytest.mark.statistics

SEEDS, ALARM, FPR, MAX_BITS = 60, 1e-6, 0.05, 100.0
# what the method attains, a little below what was measured (see the tests)
COVERAGE = {
    ("paper", "item"): 0.95,
    ("paper", "universal"): 0.9,
    ("oracle", "item"): 0.95,
    ("oracle", "universal"): 0.97,
    ("logistic", "item"): 0.78,
    ("logistic", "universal"): 0.93,
}
PAIRS = {"truth and incidental": 100, "two mixtures": 50}
RATE_COVERAGE = 0.78
TYPE_ONE = {
    ("truth and incidental", "item"): 0.16,
    ("truth and incidental", "universal"): 0.17,
    ("two mixtures", "item"): 0.05,
    ("two mixtures", "universal"): 0.06,
}
THREATS = {scope: Threat(scope=scope) for scope in ("item", "universal")}
_RNG = np.random.default_rng(1)
FORM = np.where(_RNG.random(50_000) < 0.5, 1.0, -1.0)
ENTITY, MOVE = _RNG.standard_normal((2, 50_000))


def population(testbed: Linear, weight: np.ndarray, scope: str) -> tuple[float, float]:
    """Headline, and bits kept per positive, of a linear probe on infinitely many items and contexts."""
    effect = (testbed.truth_gap * testbed.truth + testbed.incidental_gap * testbed.incidental) @ weight / 2
    around = weight @ testbed._basis[:, 2] * FORM + np.linalg.norm(weight) / 3 * ENTITY
    own = testbed.true_prior("item").standard_deviation(weight)
    margin = effect + around - np.quantile(-effect + around + own * MOVE, 1 - FPR)
    spread = testbed.true_prior(scope).standard_deviation(weight)  # type: ignore[arg-type]
    caught = margin[margin > 0]
    if scope == "item":
        bits = -log_ndtr(-caught / spread) / np.log(2)
        return float(np.median(bits)), float(np.minimum(bits, MAX_BITS).sum() / len(margin))
    bits = float(-log_ndtr(-np.quantile(margin, 1 - 0.5 * len(caught) / len(margin)) / spread) / np.log(2))
    return bits, min(bits, MAX_BITS)


def false_positive_rate(testbed: Linear, weight: np.ndarray, threshold: float) -> float:
    """Of a new negative in a new context, at a threshold on ``weight @ x``."""
    effect = (testbed.truth_gap * testbed.truth + testbed.incidental_gap * testbed.incidental) @ weight / 2
    spread = np.hypot(testbed.true_prior("item").standard_deviation(weight), np.linalg.norm(weight) / 3)
    forms = weight @ testbed._basis[:, 2] * np.array([1.0, -1.0])
    return float(1 - ndtr((threshold + effect - forms) / spread).mean())


def measure(prepared: Prepared, probe: FittedProbe, scope: str) -> tuple[Baseline, ThreatResult]:
    baseline = baseline_of(prepared, probe, THREATS[scope], FPR)
    by = stress_items if scope == "item" else stress_universal
    return baseline, by(prepared, baseline, max_bits=MAX_BITS, n_particles=100, seed=prepared.seed)


def scene_of(seed: int, **options: float) -> tuple[Linear, Prepared]:
    testbed = Linear(seed=seed, dim=16, n_items=320, n_contexts=8, **options)  # type: ignore[arg-type]
    return testbed, prepare(testbed, seed=seed, replicates=400)


def at_least(coverage: float, n: int) -> int:
    """Fewest hits of n that this coverage allows, but once in a million."""
    return int(binom.ppf(ALARM, n, coverage))


def at_most(rate: float, n: int, alarm: float = ALARM) -> int:
    """Most hits of n that this rate allows, but once in ``1 / alarm``."""
    return int(binom.isf(alarm, n, rate))


@pytest.fixture(scope="module")
def measured() -> dict[tuple[str, str], np.ndarray]:
    """Per probe and scope a row a seed: truth, low, high; false-positive rate in truth, its printed low and high."""
    out: dict[tuple[str, str], list[tuple[float, ...]]] = {}
    for seed in range(SEEDS):
        testbed, prepared = scene_of(1000 + seed)
        for name, probe in (
            ("paper", testbed.known_probes()["paper"]),
            ("oracle", testbed.known_probes()["oracle"]),
            ("logistic", fit_probe(prepared, "logistic")),
        ):
            weight, bias = np.asarray(probe.parameters["weight"], dtype=float), float(probe.parameters["bias"])
            for scope in THREATS:
                _, row = measure(prepared, probe, scope)
                rate = false_positive_rate(testbed, weight, row.detection.threshold - bias)
                ends = row.headline.low, row.headline.high
                out.setdefault((name, scope), []).append(
                    (population(testbed, weight, scope)[0], *ends, rate, *row.detection.fpr_interval)
                )
    return {key: np.array(rows) for key, rows in out.items()}


def covers(truth: np.ndarray, low: np.ndarray, high: np.ndarray) -> int:
    return int(((low <= truth) & (truth <= high)).sum())


@pytest.mark.parametrize(("probe", "scope"), [(p, s) for p in ("paper", "oracle", "logistic") for s in THREATS])
def test_interval_of_the_headline(measured, probe, scope):
    """The 95% interval covers the population's headline in 95% and 92% (paper; item, universal), 98% and 100% (oracle),
    80% and 95% (logistic) of 60 testbeds.

    Two causes, both toward too few bits, so that misses are intervals that end too low. The prior is shrunk toward
    equal variance, which inflates it along directions that natural thoughts hardly move (1.7 times along the oracle);
    replicates draw none, the estimated or twice that intensity, and the truth lies at that range's end. And with 40
    calibration negatives the pooled threshold gives 1/41 of the 5% away. Universal intervals of the oracle and of the
    logistic probe are mostly open above. On contexts that the probe was fitted on, logistic covered 3%.
    """
    truth, low, high = measured[probe, scope].T[:3]
    assert covers(truth, low, high) >= at_least(COVERAGE[probe, scope], SEEDS)


@pytest.mark.parametrize("probe", ["paper", "oracle", "logistic"])
def test_false_positive_rate_in_new_contexts(measured, probe):
    """At most the nominal 5% on average (measured 3.1% to 3.2%: a rank rule over 40 negatives is conservative).

    The printed interval covered the testbed's true rate in 80% to 85% of 120 testbeds, with the truth above it in all
    misses: a bootstrap of eight contexts cannot resample the bad context that it has not seen.
    """
    true, low, high = measured[probe, "item"].T[3:]
    assert true.mean() <= FPR
    assert covers(true, low, high) >= at_least(RATE_COVERAGE, SEEDS)


def equally_strong(pair: str, seed: int, scope: str) -> tuple[Prepared, np.ndarray, np.ndarray] | None:
    """Two directions that keep as many bits per positive in the population; ``None`` where there are none."""
    testbed, prepared = scene_of(5000 + seed)
    if pair == "truth and incidental":
        goal = population(testbed, testbed.incidental, scope)[1]

        def gap(g: float) -> float:
            return population(replace(testbed, truth_gap=g), testbed.truth, scope)[1] - goal

        testbed, prepared = scene_of(5000 + seed, truth_gap=brentq(gap, 0.8, 6.0, xtol=1e-2))
        return prepared, testbed.truth, testbed.incidental
    known = testbed._basis[:, :3]
    sideways = np.random.default_rng(seed).standard_normal((2, testbed.dim))
    sideways -= sideways @ known @ known.T
    first, second = sideways / np.linalg.norm(sideways, axis=1)[:, None]
    one = testbed.incidental + 0.8 * first
    goal = population(testbed, one, scope)[1]

    def excess(t: float) -> float:
        return population(testbed, testbed.incidental + t * second, scope)[1] - goal

    grid = np.linspace(0.05, 3.0, 8)
    ends = np.array([excess(t) for t in grid])
    crossing = np.flatnonzero(ends[:-1] * ends[1:] < 0)
    if not len(crossing):
        return None
    at = brentq(excess, grid[crossing[0]], grid[crossing[0] + 1], xtol=1e-3)
    return prepared, one, testbed.incidental + at * second


@pytest.mark.parametrize("scope", list(THREATS))
@pytest.mark.parametrize("pair", ["truth and incidental", "two mixtures"])
def test_two_equally_strong_probes_are_rarely_told_apart(pair, scope):
    """At a nominal 5%, 4% of 50 pairs of mixtures are told apart, and 14% and 15% (item, universal) of 100 pairs of
    truth and incidental.

    Shrinkage biases the truth's bits down and not the incidental's, which no resampling shows. It was 73% before
    replicates drew shrinkage and a Wishart matrix. False alarm of the bar: 1e-4.
    """
    told, n = 0, 0
    template = None
    seeds = PAIRS[pair]
    for seed in range(seeds):
        found = equally_strong(pair, seed, scope)
        if found is None:
            continue
        prepared, *weights = found
        if template is None:
            template = stress(prepared, direction(weights[0]), threats=[THREATS[scope]], attacks=(), controls=False)
        results = [
            replace(template, probe=name, threats={scope: measure(prepared, direction(weight), scope)[1]})
            for name, weight in zip(("one", "other"), weights, strict=True)
        ]
        (row,) = compare(*results)
        n += 1
        told += row.p < 0.05
    assert n >= 0.9 * seeds
    assert told <= at_most(TYPE_ONE[pair, scope], n, 1e-4)


def test_predicted_best_of_n():
    """Unbiased within five standard errors (6e-7), its band covers the truth at one context, and rarely a false flag.

    With most of a move shared by all items, 93% of 59 bands covered and none was flagged (1% and 97% of 198 where half
    of it is shared).
    """
    flagged, missed, rows = 0, 0, []
    for seed in range(SEEDS):
        testbed, prepared = scene_of(2000 + seed, incidental_sway=1.5, interaction_share=0.1)
        probe = testbed.known_probes()["paper"]
        baseline, row = measure(prepared, probe, "item")
        if row.items is None or not len(baseline.caught):
            continue
        curves = best_of_n_curves(prepared, {"gaussian": baseline}, {"gaussian": row.items.bits}, None)
        assert curves is not None
        means = testbed._means("test")[prepared.positives[baseline.caught]] @ testbed.incidental
        spread = testbed.true_prior().standard_deviation(testbed.incidental)
        breaks = ndtr((row.detection.threshold - means) / spread)
        predicted = curves.predicted["gaussian"]
        truth = (1 - (1 - breaks[:, None]) ** predicted.x).mean(axis=0)
        missed += not predicted.low[0] <= truth[0] <= predicted.high[0]
        flagged += bool(prediction_flags(curves))
        rows.append(predicted.value - truth)
    errors = np.array(rows)
    standard = errors.std(axis=0, ddof=1) / np.sqrt(len(rows))
    assert flagged <= at_most(0.02, len(rows))
    assert len(rows) - missed >= at_least(0.92, len(rows))
    assert (np.abs(errors.mean(axis=0)) <= 5 * standard).all()
