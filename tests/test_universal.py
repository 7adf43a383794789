"""One move for all items: what a probe without a closed form is told of its curve, its intervals and its limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest

from elk_stress.core.bits import BitsBatch, Kind
from elk_stress.probing.probe import FittedProbe, Traits, direction
from elk_stress.testbeds.linear import Linear
from elk_stress.thoughts.baseline import baseline_of
from elk_stress.thoughts.engine import prepare
from elk_stress.thoughts.event_bits import event_bits
from elk_stress.thoughts.prepared import Prepared
from elk_stress.thoughts.result import ThreatResult
from elk_stress.thoughts.universal_items import judged_on
from elk_stress.thoughts.universal_scope import _descending, bits_of_levels, stress_universal, universal_event
from elk_stress.threats.threat import Threat

FREE = Threat(scope="universal")


@dataclass(frozen=True)
class Hidden:
    """A linear score, bent or not, that does not say it is one."""

    bent: str = "straight"
    smooth: bool = True
    name: str = "hidden"

    @property
    def traits(self) -> Traits:
        return Traits(differentiable=self.smooth)

    def fit(
        self, activations: np.ndarray, labels: np.ndarray, *, pairs: np.ndarray | None = None, seed: int = 0
    ) -> FittedProbe:
        raise NotImplementedError

    def score(self, xp: Any, parameters: Mapping[str, Any], activations: Any) -> Any:
        score = xp.matmul(activations, parameters["weight"]) + parameters["bias"]
        return 1 / (1 + xp.exp(-3 * score)) if self.bent == "sigmoid" else score


@cache
def prepared(seed: int = 1) -> Prepared:
    return prepare(Linear(seed=seed, dim=8), seed=seed)


def known(name: str, recipe: Hidden | None = None, seed: int = 1) -> FittedProbe:
    straight = prepared(seed).testbed.known_probes()[name]
    return straight if recipe is None else FittedProbe(recipe, straight.parameters)


def stressed(probe: FittedProbe, threat: Threat = FREE, seed: int = 1) -> ThreatResult:
    baseline = baseline_of(prepared(seed), probe, threat, 0.05)
    return stress_universal(prepared(seed), baseline, max_bits=100.0, n_particles=1000, seed=0)


def levels(*values: float, limits: tuple[int, ...] = ()) -> BitsBatch:
    value = np.array(values)
    kinds = [Kind.CENSORED if i in limits else Kind.ESTIMATE for i in range(len(value))]
    return BitsBatch.build(value, value, value, kinds, "x")


def test_bits_of_levels_never_rise_and_the_headline_stands() -> None:
    # the fourth level, 22 bits at a higher recall than the headline's, overlooked something
    np.testing.assert_array_equal(_descending(levels(30, 24, 15, 22, 4), 2), [30, 24, 15, 15, 4])
    # nothing below the headline is cheaper, and of two that contradict each other the cheaper is believed
    np.testing.assert_array_equal(_descending(levels(30, 40, 14, 15, 4), 3), [30, 30, 15, 15, 4])
    # a lower limit contradicts nobody
    np.testing.assert_array_equal(_descending(levels(20, 24, 15, limits=(0,)), 2), [24, 24, 15])


def test_more_levels_take_nothing_from_a_headline_without_a_gradient() -> None:
    baseline = baseline_of(prepared(0), known("oracle", Hidden(smooth=False), 0), FREE, 0.05)
    tau = judged_on(prepared(0), baseline).tau
    every = np.array([0.0, 0.2, tau, 0.6, 0.7])
    options: dict[str, Any] = {"max_bits": 100.0, "n_particles": 1000, "seed": 0}
    judged = judged_on(prepared(0), baseline)
    alone = event_bits(universal_event(judged, baseline, np.array([tau])), **options)
    among = bits_of_levels(universal_event(judged, baseline, every), 2, 100.0, 1000, 0)
    assert among[2] == alone[0]
    assert among[2].value > 30


def test_a_lower_limit_is_not_called_brittle() -> None:
    """3,000 positives and no gradient: a few hundred draws prove some bits, and no more."""
    bed = Linear(seed=0, dim=8, n_items=24_000, n_contexts=4)
    large = prepare(bed, seed=0)
    baseline = baseline_of(
        large, FittedProbe(Hidden(smooth=False), bed.known_probes()["oracle"].parameters), FREE, 0.05
    )
    row = stress_universal(large, baseline, max_bits=100.0, n_particles=200, seed=0)
    assert row.headline.kind is Kind.CENSORED
    assert "brittle" not in [flag.name for flag in row.flags]
    # what 256 draws without a failure prove: 1 - 0.025^(1/256)
    assert row.headline.value >= 6.0


def test_a_bent_score_has_nearly_the_interval_of_a_straight_one() -> None:
    straight, bent = stressed(known("paper")).headline, stressed(known("paper", Hidden("sigmoid"))).headline
    assert bent.value == pytest.approx(straight.value, abs=0.4)
    # by the deviation at each item's origin the upper end would be 54 bits
    assert bent.high < 2.5 * straight.high
    assert bent.low > straight.low / 2.5


@pytest.mark.parametrize("threat", [FREE, Threat(scope="universal", kept=True, epsilon=0.05)], ids=str)
def test_the_band_of_the_curve_holds_what_the_interval_says(threat: Threat) -> None:
    """Half of the advantage is lost within the interval of B, so the band holds it at both ends."""
    paper, oracle = (known(name).parameters["weight"] for name in ("paper", "oracle"))
    row = stressed(direction(0.9 * paper + 0.3 * oracle, 0.0, name="mixed"), threat)
    half = 0.5 * row.detection.recall
    for bits, side in ((1.03 * row.headline.low, "low"), (0.97 * row.headline.high, "high")):
        at = int(np.argmin(np.abs(np.asarray(row.curve.x) - bits)))
        low, high = float(row.curve.low[at]), float(row.curve.high[at])
        assert low <= half + 0.02 <= high + 0.04, (side, bits, low, half, high)
