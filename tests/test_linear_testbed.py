"""The linear testbed: contract, planted structure, and exact bits against Monte Carlo and special cases."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from elk_stress.core import registry
from elk_stress.testbeds import protocol as contract
from elk_stress.testbeds.linear import Linear
from elk_stress.testbeds.linear_exact import joint_bits
from elk_stress.threats.priors import EllipticalPrior, Gaussian, Logistic, StudentT, natural, origins


class TestContract:
    def test_is_a_testbed_and_registered(self):
        testbed = registry.load("testbeds", "linear", dim=12)
        assert isinstance(testbed, contract.Testbed)
        testbed.prepare()
        assert testbed.describe()["dim"] == 12

    def test_splits_share_no_entity_and_are_balanced_pairs(self):
        splits = Linear(n_items=90).splits
        assert contract.check_splits(splits) == []
        assert sum(len(items) for items in splits.values()) == 90
        for items in splits.values():
            assert items.labels.mean() == 0.5
            assert (items.labels[items.pairs].sum(axis=1) == 1).all()
            assert (items.groups[items.pairs[:, 0]] == items.groups[items.pairs[:, 1]]).all()
            assert len(set(items.ids)) == len(items)

    def test_same_seed_same_activations_and_other_contexts_differ(self):
        a, b = Linear(seed=3), Linear(seed=3)
        np.testing.assert_array_equal(a.activations("test"), b.activations("test"))
        assert not np.array_equal(a.activations("test"), a.activations("test", "observed"))
        assert not np.array_equal(a.activations("test"), Linear(seed=4).activations("test"))
        assert a.activations("train").dtype == np.float32
        assert a.activations("train").shape == (240, 16, 32)
        assert a.activations("train", "bare").shape == (240, 1, 32)

    def test_contexts_are_shared_by_items_and_splits(self):
        # without item-by-context interaction every item moves alike, in every split
        testbed = Linear(interaction_share=0.0)
        train, test = testbed.activations("train"), testbed.activations("test")
        moves = train - train.mean(1, keepdims=True)
        np.testing.assert_allclose(moves, np.broadcast_to(moves[:1], moves.shape), atol=1e-5)
        np.testing.assert_allclose(test[0] - test[0].mean(0), moves[0], atol=1e-5)

    def test_refuses(self):
        with pytest.raises(ValueError, match="n_items >= 8"):
            Linear(n_items=4)
        with pytest.raises(ValueError, match="n_outputs"):
            Linear(dim=4, n_outputs=2)
        with pytest.raises(ValueError, match="share"):
            Linear(interaction_share=1.5)
        with pytest.raises(ValueError, match="'prior', 'observed' or 'bare'"):
            Linear().activations("test", "neutral")
        with pytest.raises(ValueError, match="moves of shape"):
            Linear().shift("test", np.arange(2), np.zeros((3, 1, 32)))


class TestBehaviour:
    def test_shift_is_the_divergence_of_unit_gaussians(self):
        testbed = Linear(n_outputs=3)
        moves = np.random.default_rng(0).standard_normal((2, 5, 32))
        shift = testbed.shift("test", np.array([0, 7]), moves)
        # KL between independent unit Gaussians is the sum over outputs of KL(N(0,1) || N(m,1)), integrated here
        y = np.linspace(-12, 12, 4001)
        for p, j in ((0, 0), (1, 4)):
            total = 0.0
            for mean in testbed.readout @ moves[p, j]:
                log_p, log_q = stats.norm.logpdf(y), stats.norm.logpdf(y, loc=mean)
                total += np.trapezoid(np.exp(log_p) * (log_p - log_q), y)
            assert shift[p, j] == pytest.approx(total, rel=1e-6)

    def test_factor_reproduces_the_shift(self):
        testbed = Linear()
        moves = np.random.default_rng(1).standard_normal((3, 4, 32))
        factor = testbed.shift_factor("train", np.arange(3))
        expected = 0.5 * np.sum(np.einsum("pkd,pnd->pnk", factor, moves) ** 2, axis=-1)
        np.testing.assert_allclose(testbed.shift("train", np.arange(3), moves), expected, rtol=1e-12)

    def test_behaviour_reads_the_truth_and_ignores_the_correlate(self):
        testbed = Linear(n_outputs=4)
        assert np.abs(testbed.readout @ testbed.incidental).max() < 1e-12
        assert np.abs(testbed.readout @ testbed.truth).max() == pytest.approx(testbed.gain)


class TestPlanted:
    def test_both_known_probes_look_fine(self):
        from sklearn.metrics import roc_auc_score

        testbed = Linear()
        labels, activations = testbed.splits["test"].labels, testbed.activations("test", "observed")[:, 0]
        for probe in testbed.known_probes().values():
            assert roc_auc_score(labels, probe.score(activations)) > 0.98

    def test_natural_prior_is_found_from_the_data(self):
        testbed = Linear(dim=16, n_contexts=400, n_items=80)
        found, true = natural(testbed.activations("train")), testbed.true_prior()
        assert np.linalg.norm(found.covariance - true.covariance) < 0.15 * np.linalg.norm(true.covariance)
        common = testbed.true_prior("universal").covariance
        found = natural(testbed.activations("train"), scope="universal").covariance
        assert np.linalg.norm(found - common) < 0.2 * np.linalg.norm(common)

    def test_sways_are_as_declared(self):
        testbed = Linear(truth_sway=0.4, incidental_sway=1.3)
        prior = testbed.true_prior()
        np.testing.assert_allclose(prior.standard_deviation(np.stack([testbed.truth, testbed.incidental])), [0.4, 1.3])

    def test_oracle_survives_and_paper_breaks_cheaply(self):
        testbed = Linear()
        prior = testbed.true_prior()
        shifts = testbed.shift("test", np.zeros(1, dtype=int), prior.sample(4000, 0)[None])[0]
        epsilon = 3 * float(np.median(shifts))
        negatives = testbed.splits["calibration"].labels == 0
        positives = testbed.splits["test"].labels == 1
        bits = {}
        for name, probe in testbed.known_probes().items():
            threshold = np.quantile(probe.score(testbed.activations("calibration"))[negatives], 0.95)
            margin = np.median(probe.score(origins(testbed.activations("test"))[positives])) - threshold
            weight = probe.parameters["weight"]
            bits[name] = [testbed.exact_bits(weight, margin, prior, e).value for e in (None, epsilon, epsilon / 30)]
        assert bits["paper"][0] < 10
        assert bits["paper"][1] < 12
        assert bits["oracle"][0] > 40
        assert bits["oracle"][1] == math.inf  # the margin exceeds what epsilon permits


class TestExactBits:
    """The reference by integration, against counting and against cases that are known otherwise."""

    @pytest.mark.parametrize("tail", [Gaussian(), Logistic(), StudentT(4)], ids=lambda tail: tail.name)
    @pytest.mark.parametrize("n_outputs", [1, 2, 3])
    def test_matches_counting(self, n_outputs, tail):
        rng = np.random.default_rng(30 + n_outputs)
        prior = EllipticalPrior(rng.standard_normal((6, 6)), tail)
        readout = rng.standard_normal((n_outputs, 6))
        moves = prior.sample(400_000, 31)
        shift = 0.5 * np.sum((moves @ readout.T) ** 2, axis=1)
        epsilon = float(np.quantile(shift, 0.7))
        if n_outputs == 3 and tail.extra:
            with pytest.raises(ValueError, match="at most 2 outputs"):
                joint_bits(np.ones(6), 1.0, prior, readout, epsilon)
            return
        oracle = rng.standard_normal(n_outputs) @ readout
        for weight in (rng.standard_normal(6), oracle, np.zeros(6)):
            deviation = float(prior.standard_deviation(weight))
            offset = 0.6 * deviation if deviation > 0 else -1.0
            p = np.mean((offset + moves @ weight <= 0) & (shift <= epsilon))
            bits = joint_bits(weight, offset, prior, readout, epsilon)
            # five standard errors
            assert p * 2**bits == pytest.approx(1.0, abs=5 * math.sqrt(2**bits / 400_000))

    @pytest.mark.parametrize("n_outputs", [1, 2, 3])
    def test_a_loose_epsilon_is_no_constraint(self, n_outputs):
        rng = np.random.default_rng(40)
        prior = EllipticalPrior(rng.standard_normal((6, 6)))
        readout, weight = rng.standard_normal((n_outputs, 6)), rng.standard_normal(6)
        for z in (-2.0, 0.0, 3.0, 12.0, 30.0):
            bits = joint_bits(weight, z * float(prior.standard_deviation(weight)), prior, readout, 1e6)
            assert bits == pytest.approx(float(Gaussian().bits(z)), rel=1e-8)

    @pytest.mark.parametrize(("margin", "epsilon"), [(1.0, 0.5), (4.0, 2.0), (12.0, 3.0)])
    def test_three_outputs_in_spherical_coordinates(self, margin, epsilon):
        # another scheme for the same integral: a spherical grid over the ball of unequal outputs, oblique to the score
        sizes, weight = np.array([1.0, 2.5, 0.4]), np.array([0.8, -1.1, 0.5, 0.7])
        readout = np.column_stack([np.diag(sizes), np.zeros(3)])
        bits = joint_bits(weight, margin, EllipticalPrior(np.eye(4)), readout, epsilon)
        x, w = np.polynomial.legendre.leggauss(64)
        radius = math.sqrt(2 * epsilon) * (1 + x) / 2
        radius_weight = math.sqrt(2 * epsilon) * w / 2 * radius**2
        angle = np.arange(96) * 2 * np.pi / 96
        sine = np.sqrt(1 - x**2)
        sphere = np.stack(
            [np.outer(sine, np.cos(angle)), np.outer(sine, np.sin(angle)), np.repeat(x[:, None], 96, axis=1)], axis=-1
        )
        y = radius[:, None, None, None] * sphere / sizes
        log_density = stats.norm.logpdf(y).sum(-1) - np.log(sizes).sum()
        log_fail = stats.norm.logcdf(-(margin + y @ weight[:3]) / weight[3])
        mass = np.exp(log_density + log_fail) * radius_weight[:, None, None] * w[:, None] * (2 * np.pi / 96)
        assert bits == pytest.approx(-math.log2(mass.sum()), abs=1e-7)

    def test_kept_is_the_chi_squared_of_white_outputs(self):
        # outputs that are themselves standard normal: P[kept] = P[chi2_k <= 2 epsilon]
        for k in (1, 2, 3):
            prior, readout = EllipticalPrior(np.eye(5)), np.eye(5)[:k]
            for epsilon in (1e-6, 0.1, 1.0, 8.0):
                bits = joint_bits(np.zeros(5), -1.0, prior, readout, epsilon)
                assert 2**-bits == pytest.approx(stats.chi2(k).cdf(2 * epsilon), rel=1e-7)

    def test_an_ignored_direction_multiplies(self):
        # score independent of the outputs: B_joint = B + B_kept
        prior, readout, weight = EllipticalPrior(np.eye(5)), np.eye(5)[:2], np.eye(5)[4]
        joint = joint_bits(weight, 5.0, prior, readout, 0.3)
        kept = joint_bits(0 * weight, -1.0, prior, readout, 0.3)
        assert joint - kept == pytest.approx(float(Gaussian().bits(5.0)), rel=1e-9)

    def test_oracle_in_one_output_is_an_interval(self):
        # X = Y: -delta <= Y <= -margin
        prior, readout = EllipticalPrior(np.diag([1.0, 2.0])), np.array([[1.0, 0.0]])
        epsilon = 4.5  # |Y| <= 3
        bits = joint_bits(np.array([1.0, 0.0]), 2.0, prior, readout, epsilon)
        assert 2**-bits == pytest.approx(stats.norm.cdf(-2) - stats.norm.cdf(-3), rel=1e-9)
        assert joint_bits(np.array([1.0, 0.0]), 3.01, prior, readout, epsilon) == math.inf

    def test_bits_grow_as_epsilon_shrinks(self):
        testbed = Linear()
        prior = testbed.true_prior()
        for weight in (testbed.truth + testbed.incidental, testbed.incidental):
            bits = [testbed.exact_bits(weight, 2.0, prior, e).value for e in (3.0, 1.0, 0.3, 0.1, 0.01)]
            assert all(a < b for a, b in itertools.pairwise(bits))
            assert bits[0] >= testbed.exact_bits(weight, 2.0, prior).value

    def test_refuses_a_negative_epsilon(self):
        with pytest.raises(ValueError, match="at least 0 nats"):
            joint_bits(np.ones(2), 1.0, EllipticalPrior(np.eye(2)), np.eye(2), -0.1)
