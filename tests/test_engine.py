"""The whole stress test on the linear testbed, where the truth is known: numbers, controls, flags, refusals."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

import elk_stress
from elk_stress.core import registry
from elk_stress.core.bits import Kind
from elk_stress.probing.probe import FittedProbe, Traits, direction
from elk_stress.testbeds.linear import Linear
from elk_stress.testbeds.repeated_reads import RepeatedReads
from elk_stress.thoughts.baseline import baseline_of
from elk_stress.thoughts.comparison import holm
from elk_stress.thoughts.engine import Prepared, compare, compare_all, prepare, stress, stress_activations
from elk_stress.thoughts.events import universal_recall_event
from elk_stress.thoughts.memory import Memory
from elk_stress.thoughts.prepared import fit_probe
from elk_stress.thoughts.result import StressResult
from elk_stress.thoughts.survival import half_life
from elk_stress.thoughts.universal_scope import bits_of_levels
from elk_stress.threats.threat import Threat, default_threats, parse_threat

FREE = tuple(t for t in default_threats() if not t.kept)


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    return prepare(Linear(dim=12, n_items=200, n_contexts=10))


@dataclass(frozen=True)
class Bent:
    """A monotone function of a linear score: the same events at the same bits, without the closed form."""

    name: ClassVar[str] = "bent"
    traits: ClassVar[Traits] = Traits()

    def fit(self, activations: Any, labels: Any, *, pairs: Any = None, seed: int = 0) -> FittedProbe:
        raise NotImplementedError

    def score(self, xp: Any, parameters: Any, activations: Any) -> Any:
        along = xp.matmul(activations, parameters["weight"]) + parameters["bias"]
        return along + 10.0 * xp.tanh(along / 20.0)


def test_one_threat_by_its_name_and_what_is_no_probe(prepared: Prepared) -> None:
    result = stress(prepared, "mass_mean", threats="item/natural/gaussian", attacks=(), controls=False)
    assert list(result.threats) == ["item/natural/gaussian"]
    with pytest.raises(TypeError, match=r"got LogisticRegression; elk_stress\.wrap makes a probe"):
        stress(prepared, LogisticRegression(), attacks=())  # type: ignore[arg-type]
    assert {"stress", "wrap", "Ledger"} <= set(dir(elk_stress))


def test_bits_of_levels_without_a_closed_form_are_those_with_it(prepared: Prepared) -> None:
    straight = prepared.testbed.known_probes()["oracle"]
    bent = FittedProbe(Bent(), straight.parameters)
    prior, positives = prepared.prior(Threat(scope="universal")), prepared.test_origins[prepared.positives]
    scores = np.asarray(straight.score(positives))
    threshold = float(scores.min() - 8 * scores.std())
    levels = np.array([0.1, 0.25, 0.4, 0.55, 0.7])
    found, exact = (
        bits_of_levels(universal_recall_event(probe, prior, positives, at, levels), 2, 100.0, 200, 0)
        for probe, at in ((bent, threshold + 10.0 * np.tanh(threshold / 20.0)), (straight, threshold))
    )
    np.testing.assert_allclose(found.value, exact.value, atol=0.3, rtol=0.02)
    assert (np.asarray(found.kind) == Kind.ESTIMATE).all()
    # the headline's level is checked by splitting, the others of the curve are not
    assert found.diagnostics["checked"].tolist() == [False, False, True, False, False]


@pytest.fixture(scope="module")
def results(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> dict[str, StressResult]:
    known = prepared.testbed.known_probes()
    # the known probes are controls too: each is measured once
    memory = Memory(tmp_path_factory.mktemp("engine"))
    return {
        "oracle": stress(prepared, known["oracle"], attacks=(), max_bits=60.0, memory=memory),
        "paper": stress(prepared, known["paper"], max_bits=60.0, memory=memory),
        "mass_mean": stress(prepared, "mass_mean", threats=FREE, attacks=(), controls=False),
    }


def test_per_item_bits_are_the_closed_form(prepared: Prepared) -> None:
    probe = fit_probe(prepared, "lda")
    for threat in FREE:
        if threat.scope == "universal":
            continue
        baseline = baseline_of(prepared, probe, threat, 0.05)
        row = stress(prepared, probe, threats=[threat], attacks=(), controls=False).threats[threat.name]
        weight = np.asarray(probe.parameters["weight"], dtype=float)
        prior = prepared.prior(threat)
        expected = prior.tail.bits(baseline.margin[baseline.caught] / prior.standard_deviation(weight))
        assert row.items is not None
        np.testing.assert_allclose(row.items.bits.value, expected, rtol=1e-6)
        assert row.headline.value == pytest.approx(half_life(np.minimum(expected, 100.0)))
        assert row.headline.low <= row.headline.value <= row.headline.high


def test_joint_bits_hold_the_exact_ones(prepared: Prepared, results: dict[str, StressResult]) -> None:
    row = results["paper"].threats["item/natural/gaussian/kept"]
    probe = prepared.testbed.known_probes()["paper"]
    weight = np.asarray(probe.parameters["weight"], dtype=float)
    prior = prepared.prior(row.threat)
    assert row.items is not None
    assert row.epsilon is not None
    exact = np.array([prepared.testbed.exact_bits(weight, m, prior, row.epsilon).value for m in row.items.margin])  # type: ignore[attr-defined]
    held = (row.items.bits.low <= exact) & (exact <= row.items.bits.high)
    # 95% intervals: of n items at most 5% plus four standard deviations may miss
    assert (~held).mean() <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / len(exact))
    assert abs(np.median(row.items.bits.value - exact)) < 0.1


def test_oracle_outlives_paper_when_behaviour_is_kept(results: dict[str, StressResult]) -> None:
    oracle = results["oracle"].threats["item/natural/gaussian/kept"].headline
    paper = results["paper"].threats["item/natural/gaussian/kept"].headline
    assert oracle.kind is Kind.CENSORED or math.isinf(oracle.value)
    assert paper.kind is Kind.ESTIMATE
    assert paper.high < oracle.value
    assert not any(f.name == "control_failed" for f in results["paper"].flags)


def test_universal_b_at_half_advantage_is_the_closed_form(prepared: Prepared, results: dict[str, StressResult]) -> None:
    row = results["mass_mean"].threats["universal/natural/gaussian"]
    probe = fit_probe(prepared, "mass_mean")
    baseline = baseline_of(prepared, probe, row.threat, 0.05)
    margins = np.sort(baseline.margin)[::-1]
    tau = baseline.detection.recall / 2
    deciding = margins[int(np.floor(tau * len(margins) + 1e-9))]
    deviation = float(
        prepared.prior(row.threat).standard_deviation(np.asarray(probe.parameters["weight"], dtype=float))
    )
    assert row.headline.value == pytest.approx(
        float(prepared.prior(row.threat).tail.bits(deciding / deviation)), rel=1e-6
    )
    assert (np.diff(row.curve.value) <= 0).all()
    assert row.curve.value[0] <= baseline.detection.recall


def test_two_tails_and_scales_are_in_every_free_result(results: dict[str, StressResult]) -> None:
    rows = results["mass_mean"].threats
    gaussian, heavy = rows["item/natural/gaussian"], rows["item/natural/best"]
    assert heavy.headline.value <= gaussian.headline.value + 0.5
    scale = [gaussian.scale[c] for c in ("0.5", "0.71", "1", "1.41", "2")]
    assert (np.diff(scale) <= 0).all()
    assert gaussian.scale["1"] == pytest.approx(gaussian.headline.value)
    assert gaussian.shrink["1"] == pytest.approx(gaussian.headline.value)
    assert set(gaussian.shrink) == {"0.5", "1", "2"}
    for row in rows.values():
        assert len(row.tails) == 3
        if row.threat.tail == "gaussian":
            assert row.tails["gaussian"] == pytest.approx(row.headline.value)


def test_attacks_agree_with_the_bits(results: dict[str, StressResult]) -> None:
    row = results["paper"].threats["item/natural/gaussian"]
    ran = {a.attack: a for a in row.attacks}
    assert ran["gradient"].success == 1.0
    assert row.items is not None
    assert ran["gradient"].length == pytest.approx(float(np.median(row.items.distance)), rel=0.02)
    assert ran["gradient"].upper_bound is not None
    assert row.headline.value <= ran["gradient"].upper_bound.value
    assert ran["gradient"].gradients > 0
    assert ran["best_of_n"].spent == pytest.approx(math.log2(10), abs=1e-9)
    assert ran["gradient"].benign_success is not None
    assert not row.flags or all(f.name not in ("bounds_violated", "weak_beats_strong") for f in row.flags)


def test_a_natural_prior_predicts_the_observed_best_of_n(results: dict[str, StressResult]) -> None:
    # the contexts of this testbed are Gaussian, so the Gaussian prediction must hold
    for curves in results["paper"].best_of_n:
        gaussian, observed = curves.predicted["gaussian"], curves.observed
        assert (gaussian.low <= observed.high).all()
        assert (observed.low <= gaussian.high).all()
    assert results["paper"].best_of_n[0].observed.value[-1] > results["paper"].best_of_n[0].observed.value[0] > 0


def test_a_wrong_prior_is_caught_by_the_observation(prepared: Prepared) -> None:
    from dataclasses import replace

    # contexts A told to sway three times as much as they do: the prediction must now miss
    calm = replace(
        prepared,
        train=prepared.train.mean(axis=1, keepdims=True)
        + (prepared.train - prepared.train.mean(axis=1, keepdims=True)) * 3,
        _priors={},
        _controls={},
    )
    result = stress(calm, prepared.testbed.known_probes()["paper"], threats=FREE[:2], attacks=(), controls=False)
    assert "prediction_failed" in [f.name for f in result.flags]


def test_audit_tells_moved_information_from_gone(prepared: Prepared, results: dict[str, StressResult]) -> None:
    # paper: its direction is pushed, but the truth direction is untouched, so a refit finds it again
    verdict = results["paper"].audit
    assert verdict is not None
    assert verdict.verdict in ("moved", "hidden")
    stages = {s.stage: s for s in verdict.stages}
    assert stages["raw"].gain < verdict.clean.gain / 2
    assert stages["strongest"].gain > verdict.clean.gain / 2


def test_audit_calls_it_gone_when_the_only_direction_is_overwritten() -> None:
    rng = np.random.default_rng(0)
    n, contexts, d = 600, 6, 4
    labels = rng.integers(0, 2, n)
    data = rng.standard_normal((n, 1, d)) + 0.6 * rng.standard_normal((n, contexts, d))
    data[:, :, 0] = 0.3 * data[:, :, 0] + 2.0 * labels[:, None] - 1
    result = stress_activations("lda", data, labels, attacks=(), threats=[Threat()])
    assert result.audit is not None
    assert result.audit.clean.gain > 0.4
    assert result.audit.verdict in ("gone", "undecided")
    assert {s.stage: s for s in result.audit.stages}["strongest"].gain < result.audit.clean.gain / 2


def test_the_rock_catches_nothing_and_has_no_bits(prepared: Prepared) -> None:
    result = stress(prepared, "rock", threats=FREE, controls=False)
    for row in result.threats.values():
        assert row.headline.value == 0
        assert "catches_nothing" in [f.name for f in row.flags]
    assert result.detection.recall == 0
    assert result.audit is not None
    assert result.audit.verdict == "no signal"


def test_same_seed_same_result_bit_for_bit() -> None:
    options: dict = {"threats": [Threat(), Threat(kept=True)], "attacks": ("gradient",), "controls": False}
    options |= {"n_particles": 200, "max_bits": 30.0}
    prepared_testbeds = [prepare(Linear(dim=8, n_items=160, n_contexts=8)) for _ in range(2)]
    a, b = (stress(prepared, prepared.testbed.known_probes()["paper"], **options) for prepared in prepared_testbeds)
    kinds = set(a.threats["item/natural/gaussian/kept"].items.bits.kind)  # type: ignore[union-attr]
    assert Kind.ESTIMATE in kinds, "nothing was searched: all would be equal without a seed"
    left, right = a.to_json(), b.to_json()
    left.pop("seconds"), right.pop("seconds")
    assert json.dumps(left, sort_keys=True) == json.dumps(right, sort_keys=True)


def test_results_serialize_completely(results: dict[str, StressResult]) -> None:
    record = json.loads(json.dumps(results["paper"].to_json(), allow_nan=False))
    items = record["threats"]["item/natural/gaussian"]["items"]
    assert (
        len(items["bits"]) == len(items["ids"]) == record["threats"]["item/natural/gaussian"]["detection"]["n_caught"]
    )
    assert {"versions", "seed", "config", "status"} <= set(record)
    assert "half-life" in str(results["paper"])


def test_compare_is_paired_and_corrected(results: dict[str, StressResult]) -> None:
    rows = compare(results["oracle"], results["paper"])
    kept = {row.threat: row for row in rows}["item/natural/gaussian/kept"]
    assert kept.better == "oracle"
    assert kept.kept_interval[0] > 0
    same = compare_all({"a": results["paper"], "b": results["paper"]})
    assert all(row.better is None and row.p == 1.0 for row in same)


def test_results_that_are_not_paired_are_not_compared(results: dict[str, StressResult]) -> None:
    other = stress(Linear(dim=16, n_items=240, n_contexts=8, seed=1), "lda", threats=FREE, attacks=(), seed=1)
    with pytest.raises(ValueError, match="seed differs"):
        compare(results["paper"], other)


def test_holm_is_the_step_down_procedure() -> None:
    # Holm 1979: sorted p times n, n-1, ..., made monotone
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


class _Bowl:
    """A probe that is not linear."""

    name = "bowl"
    traits = Traits()

    def fit(self, activations, labels, *, pairs=None, seed=0):  # type: ignore[no-untyped-def]
        fitted = registry.load("probes", "mass_mean").fit(activations, labels)
        return FittedProbe(self, {k: v.astype(np.float32) for k, v in fitted.parameters.items()})

    def score(self, xp, parameters, activations):  # type: ignore[no-untyped-def]
        linear = xp.matmul(activations, parameters["weight"]) + parameters["bias"]
        return linear - 0.02 * xp.sum(activations * activations, axis=-1)


@pytest.mark.statistics
@pytest.mark.parametrize("threat", [Threat(scope="universal"), Threat(kept=True), Threat(tail="logistic")])
def test_a_probe_that_is_not_linear_faces_every_kind_of_threat(prepared: Prepared, threat: Threat) -> None:
    bowl = fit_probe(prepared, _Bowl())
    result = stress(prepared, bowl, threats=[threat], attacks=("gradient", "natural_thoughts"), controls=False)
    (row,) = result.threats.values()
    assert math.isfinite(row.headline.low)
    assert 0 < row.headline.low <= row.headline.value
    gradient = {a.attack: a for a in row.attacks}.get("gradient")
    assert gradient is None or gradient.success > 0.9


def test_a_probe_that_is_not_linear_goes_all_the_way() -> None:
    # gaps as narrow as natural thoughts are wide: all items cost few bits, the weakest as few as can be counted
    close = Linear(dim=8, n_items=200, n_contexts=10, truth_gap=3.0, incidental_gap=2.0, truth_sway=0.8)
    prepared = prepare(close)
    bowl = fit_probe(prepared, _Bowl())
    result = stress(prepared, bowl, threats=[Threat()], attacks=("gradient",), controls=False, max_bits=30.0)
    free = result.threats["item/natural/gaussian"]
    assert free.headline.low > 0
    assert free.items is not None
    # checked against counting where counting can: the weakest items
    baseline = baseline_of(prepared, bowl, Threat(), 0.05)
    weak = np.argsort(free.items.bits.value)[:5]
    assert free.items.bits.value[weak].max() < 9
    origins = prepared.test_origins[prepared.positives[baseline.caught[weak]]]
    moves = prepared.prior(Threat()).sample(60_000, 5).astype(np.float32)
    for i, origin in zip(weak, origins, strict=True):
        p = float((np.asarray(bowl.score(origin + moves)) <= baseline.detection.threshold).mean())
        counted = -math.log2(p)
        error = 1.96 * math.sqrt((1 - p) / (p * len(moves))) / math.log(2)
        bits = free.items.bits[int(i)]
        assert bits.low - error - 0.1 <= counted <= bits.high + error + 0.1


def test_arrays_alone_are_enough_to_start() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 400)
    activations = rng.standard_normal((400, 8)) + 2.5 * labels[:, None] * np.eye(8)[0]
    result = stress_activations(np.eye(8)[0], activations, labels)
    (row,) = result.threats.values()
    assert row.threat.prior == "isotropic"
    assert row.headline.value > 0
    assert "kept" not in " ".join(result.threats)
    learned = stress_activations("logistic", activations, labels, attacks=("gradient",))
    assert learned.detection.auroc > 0.9


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x, y: (np.where(np.arange(x.size).reshape(x.shape) == 5, np.nan, x), y), "NaN or inf in 1 of"),
        (lambda x, y: (np.ones_like(x), y), "constant over all"),
        (lambda x, y: (x, np.ones_like(y)), "one class only"),
        (lambda x, y: (x, y * 2), "labels must be 0 or 1"),
        (lambda x, y: (x[:50], y), "expected activations"),
        (lambda x, y: (x[:60], y[:60]), "calibration negatives"),
    ],
)
def test_bad_arrays_are_refused_with_the_way_out(spoil, message: str) -> None:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(0)
    x, y = spoil(rng.standard_normal((200, 4)), rng.integers(0, 2, 200))
    with pytest.raises(ValueError, match=message):
        stress_activations("mass_mean", x, y)


def test_a_probe_of_another_width_is_refused_with_both_widths(prepared: Prepared) -> None:
    with pytest.raises(ValueError, match=r"fitted on 5 features .* gives 12"):
        stress(prepared, direction(np.ones(5)))


def test_threat_names_are_unique_and_read_back() -> None:
    threats = (*default_threats(), Threat(scope="universal", metric="auroc"), Threat(prior="isotropic", c=1.0))
    assert len({t.name for t in threats}) == len(threats)
    for threat in threats:
        assert parse_threat(threat.name) == threat
    with pytest.raises(ValueError, match="a threat reads"):
        parse_threat("natural")


def test_the_package_offers_functions_not_modules() -> None:
    # a submodule of the same name would replace the function once imported
    for name in ("stress", "stress_activations", "compare", "estimate_bits"):
        assert callable(getattr(elk_stress, name))


def test_chosen_pairs_are_compared_and_no_others() -> None:
    prepared = prepare(Linear(n_items=200, n_contexts=6), replicates=200)
    threats = ["item/natural/gaussian"]
    found = {p: stress(prepared, p, threats=threats, attacks=[], controls=False) for p in ("paper", "lda", "logistic")}
    rows = compare_all(found, [("lda", "logistic")])
    assert [(row.a, row.b) for row in rows] == [("lda", "logistic")]
    # one row is corrected for nothing: the table of all pairs is
    assert rows[0].holm == rows[0].p
    assert len(compare_all(found)) == 3


def test_a_linear_probe_is_its_own_certificate() -> None:
    prepared = prepare(Linear(n_items=200, n_contexts=6), replicates=200)
    result = stress(
        prepared, "oracle", threats=["item/natural/gaussian", "item/natural/best"], attacks=[], controls=False
    )
    gaussian, heavy = result.threats.values()
    assert gaussian.certified is not None
    assert gaussian.certified.value == pytest.approx(gaussian.headline.value, rel=1e-6)
    assert heavy.certified is None, "the map of a heavy-tailed prior is not Lipschitz"
    assert "certified:" in str(result)


def test_a_difference_that_every_replicate_shows_survives_a_long_table() -> None:
    """The bootstrap's count ends at 2 / (n + 1): 120 rows of it would be corrected to nothing."""
    prepared = prepare(Linear(n_items=200, n_contexts=6), replicates=200)
    threats = ["item/natural/gaussian"]
    found = {p: stress(prepared, p, threats=threats, attacks=[], controls=False) for p in ("paper", "logistic")}
    (row,) = compare_all(found)
    assert row.better == "logistic"
    assert row.p < 1e-3 < 2 / 201
    with pytest.raises(ValueError, match=r"'lda'.*paper, logistic"):
        compare_all(found, [("lda", "paper")])


def test_several_reads_of_an_item() -> None:
    base = Linear(n_items=240, n_contexts=8)
    names = ["item/natural/gaussian", "universal/natural/gaussian"]
    options = {"threats": names, "attacks": [], "controls": False, "max_bits": 1000.0}
    single = stress(base, "logistic", **options)
    rows = {
        (reads, moved): stress(RepeatedReads(base, reads, moved), "context_average", **options)
        for reads, moved in ((1, "apart"), (4, "apart"), (4, "together"))
    }
    half_lives = {key: result.threats[names[0]].headline for key, result in rows.items()}
    one, apart, together = half_lives.values()
    # the deviation of the mean of four independent thoughts is half of one's: at a given margin four times the bits
    assert 3.5 < apart.value / one.value < 6
    assert together.value == pytest.approx(one.value, rel=0.02)
    # what is not known of the covariance of one read is not known of four either
    plain = single.threats[names[0]].headline
    for found in half_lives.values():
        assert found.high / found.low > 0.6 * plain.high / plain.low
    assert "per-item moves" in rows[4, "apart"].skipped[names[1]]


def test_shift_of_several_reads_is_the_mean_of_theirs() -> None:
    base = Linear(n_items=80, n_contexts=4)
    bundle = RepeatedReads(base, 3)
    items = np.arange(5)
    moves = np.random.default_rng(np.random.SeedSequence(0)).standard_normal((5, 2, 3 * base.dim))
    each = [base.shift("test", items, part) for part in np.split(moves, 3, axis=-1)]
    np.testing.assert_allclose(bundle.shift("test", items, moves), np.mean(each, axis=0))
    factor = bundle.shift_factor("test", items)
    np.testing.assert_allclose(
        0.5 * (np.einsum("prd,pnd->pnr", factor, moves) ** 2).sum(-1), bundle.shift("test", items, moves)
    )
    rows = bundle.activations("test")
    np.testing.assert_allclose(
        rows.mean(axis=1).reshape(len(rows), 3, -1),
        base.activations("test").mean(axis=1)[:, None].repeat(3, 1),
        atol=1e-5,
    )
    with pytest.raises(ValueError, match="reads >= 1"):
        RepeatedReads(base, 0)
    with pytest.raises(ValueError, match="several reads already"):
        RepeatedReads(bundle, 2)
