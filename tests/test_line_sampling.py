"""Line sampling: exact along the line, every root found, unbiased whatever the direction."""

from __future__ import annotations

import math

import numpy as np
import pytest
from known_answers import KNOWN
from scipy.special import log_ndtr, ndtr

from elk_stress.core.bits import Kind
from elk_stress.estimators.design_point import DesignPoint
from elk_stress.estimators.limit_state import LimitState, from_function
from elk_stress.estimators.line_sampling import LineSampling


@pytest.mark.parametrize("beta", [0.3, 4.0, 19.6])
def test_half_space_is_exact(beta):
    state = from_function(lambda u: beta - u[:, 0], 5)
    centre = np.array([[[beta, 0, 0, 0, 0]]])
    bits = LineSampling(n_particles=16)(state, seed=0, centres=centre)[0]
    exact = float(-log_ndtr(-beta) / math.log(2))
    assert bits.value == pytest.approx(exact, abs=1e-3)
    assert bits.contains(exact)
    assert bits.high - bits.low < 2e-3


def test_every_interval_on_a_line_counts():
    # fails in [-3, -2], [1, 1.5] and beyond 4: five roots
    def g(u):
        t = u[:, 0]
        return np.where(((t >= -3) & (t <= -2)) | ((t >= 1) & (t <= 1.5)) | (t >= 4), -1.0, 1.0)

    bits = LineSampling(n_particles=4, n_grid=65)(from_function(g, 2), seed=0, centres=np.array([[[4.0, 0.0]]]))[0]
    exact = (ndtr(-2) - ndtr(-3)) + (ndtr(1.5) - ndtr(1.0)) + ndtr(-4)
    assert bits.diagnostics["roots"] == 5
    assert bits.value == pytest.approx(-math.log2(exact), abs=1e-4)


def test_a_line_that_starts_failed():
    bits = LineSampling(n_particles=4)(
        from_function(lambda u: u[:, 0] - 1.0, 2), seed=0, centres=np.array([[[1.0, 0.0]]])
    )[0]
    assert bits.value == pytest.approx(-math.log2(ndtr(1.0)), abs=1e-4)


@pytest.mark.parametrize("name", ["RP31", "RP54", "RP89"])
def test_known_answers(name):
    case = KNOWN[name]
    state = from_function(case.function, case.dim)
    centres = DesignPoint()(state, seed=0).diagnostics["centres"]
    bits = LineSampling(n_particles=2000)(state, seed=1, centres=centres)[0]
    assert bits.status == "ok"
    assert abs(bits.value - case.bits) <= 1.53 * max(bits.high - bits.value, bits.value - bits.low)


def test_unbiased_off_the_direction():
    angle, beta, repeats = 0.3, 4.0, 1000
    state = LimitState(lambda p, u: beta - u[..., 0], dim=3, n_problems=repeats)
    centres = np.tile(beta * np.array([math.cos(angle), math.sin(angle), 0.0]), (repeats, 1, 1))
    batch = LineSampling(n_particles=64)(state, seed=2, centres=centres)
    ratio = np.exp2(-log_ndtr(-beta) / math.log(2) - batch.value)
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(repeats)
    assert ratio.std() > 0.05


def test_no_failing_line_is_censored():
    bits = LineSampling(n_particles=8)(
        from_function(lambda u: np.ones(len(u)), 2), seed=0, centres=np.full((1, 1, 2), np.nan)
    )[0]
    assert (bits.kind, bits.value, bits.high) == (Kind.CENSORED, 0.0, math.inf)
    assert "nothing is known" in bits.status


def test_budget_is_respected():
    state = from_function(lambda u: 3 - u[:, 0], 3)
    bits = LineSampling()(state, seed=0, centres=np.array([[[3.0, 0, 0]]]), max_evaluations=800)[0]
    assert bits.evaluations <= 800
    assert [f.name for f in bits.flags] == ["budget_exhausted"]
