"""Training pressure: what the engine says of a run, recomputed from the weights that it was about."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from elk_stress.attacks.finetune import Finetune
from elk_stress.attacks.gradient import Gradient
from elk_stress.attacks.lora import Lora
from elk_stress.core import registry
from elk_stress.core.bits import Kind
from elk_stress.core.flags import Flag
from elk_stress.probes.lda import LDA
from elk_stress.probing.probe import FittedProbe, as_fitted
from elk_stress.probing.wrapping import direction
from elk_stress.testbeds.linear import Linear
from elk_stress.testbeds.superposition import Superposition
from elk_stress.training.checkpoint import Checkpoints
from elk_stress.training.loop import stress_training
from elk_stress.training.organism_trainee import OrganismTrainee, calibrate
from elk_stress.training.protocols import Trainee
from elk_stress.training.result import PressureResult

_STRENGTHS = (0.3, 3.0)
_ATTACK = Finetune(learning_rate=1e-2, batch_size=64)
_OPTIONS: dict[str, Any] = {
    "attack": _ATTACK,
    "strengths": _STRENGTHS,
    "steps": 16,
    "checkpoints": 4,
    "held_out": ("mass_mean",),
    "draws": 2,
    "audit_points": 2,
}
_MODES: dict[str, dict[str, Any]] = {
    "frozen": {},
    "refit": {"mode": "refit"},
    "ensemble": {"mode": "ensemble", "against": ("logistic",)},
}

# organisms have one activation per item and no contrast pairs
_PRESSED = [
    name
    for name in registry.names("probes")
    if not (registry.load("probes", name).traits.needs_pairs or registry.load("probes", name).traits.tokens)
]


@functools.cache
def _trainee() -> OrganismTrainee:
    organism = Superposition(
        n_models=2,
        n_features=16,
        width=6,
        n_train=128,
        n_calibration=64,
        n_test=96,
        n_contexts=2,
        training_steps=600,
        batch_size=128,
    )
    return OrganismTrainee(organism, epsilon=0.03, n_draws=9)


@functools.cache
def _result(mode: str) -> PressureResult:
    return stress_training(_trainee(), "lda", **{**_OPTIONS, **_MODES[mode]})


@functools.cache
def _cells() -> np.ndarray:
    """``(checkpoints, strengths, models, n_parameters)`` of the frozen run, from the attack alone."""
    result, trainee, attack = _result("frozen"), _trainee(), _ATTACK
    from elk_stress.training.evasion import targets_from

    activations = trainee.activations(np.repeat(trainee.original[None], len(result.strengths), axis=0), "train")
    probes = [_own("lda") for _ in result.strengths]
    targets = targets_from([probes], activations, trainee.splits["train"].labels)
    state = attack.start(trainee, result.strengths, 0)
    cells = [attack.weights(trainee, state)]
    for steps in np.diff(result.steps):
        state, _ = attack.advance(trainee, state, targets, int(steps))
        cells.append(attack.weights(trainee, state))
    return np.stack(cells)


@functools.cache
def _own(name: str) -> tuple[FittedProbe, ...]:
    trainee = _trainee()
    activations = trainee.activations(trainee.original[None], "train")[0]
    return tuple(as_fitted(name, rows, trainee.splits["train"].labels, seed=0) for rows in activations)


def _names(result: PressureResult) -> list[str]:
    return [flag.name for flag in result.flags]


def test_parameters_of_different_shapes_are_refused_by_name() -> None:
    from elk_stress.training.evasion import targets_from

    trainee = _trainee()
    activations = trainee.activations(trainee.original[None], "train")
    labels, dim = trainee.splits["train"].labels, activations.shape[-1]
    recipe = registry.load("probes", "orthogonal_ensemble")
    fits = [
        FittedProbe(recipe, {"weights": np.ones((dim, 1 + model % 2)), "biases": np.zeros(1 + model % 2)})
        for model in range(trainee.n_models)
    ]
    with pytest.raises(ValueError, match=r"'orthogonal_ensemble' has parameters 'weights' of different .*n_models=1"):
        targets_from([[fits]], activations, labels)


@pytest.mark.parametrize("name", _PRESSED)
def test_every_probe_of_labels_can_be_pressed_in_several_models(name: str) -> None:
    import jax
    import jax.numpy as jnp

    from elk_stress.training.evasion import evasion_loss, targets_from
    from elk_stress.training.measure import fit_cells

    trainee = _trainee()
    activations = trainee.activations(trainee.original[None], "train")
    labels = trainee.splits["train"].labels
    fits = fit_cells(trainee, name, activations, 0)
    targets = targets_from([fits], activations, labels)
    cells = jax.tree.map(lambda value: jnp.asarray(value[0]), targets.arrays[0])
    rows = jnp.asarray(activations[0], dtype=jnp.float32)

    def loss(cell: Any, rows: Any) -> Any:
        return evasion_loss(targets.recipes, [cell], rows, jnp.asarray(labels, dtype=rows.dtype))

    value, gradient = jax.jit(jax.vmap(jax.value_and_grad(loss, argnums=1)))(cells, rows)
    assert value.shape == (trainee.n_models,)
    assert np.isfinite(value).all()
    assert np.isfinite(gradient).all()
    # what is pressed in a model is what was fitted there
    pressed = jax.vmap(lambda cell, rows: targets.recipes[0].score(jnp, cell["parameters"], rows))(cells, rows)
    own = np.stack([probe.score(model) for probe, model in zip(fits[0], activations[0], strict=True)])
    np.testing.assert_allclose(pressed, own, rtol=1e-3, atol=1e-3 * np.abs(own).max())


def test_probes_of_contrast_pairs_are_told_that_an_organism_has_none() -> None:
    from elk_stress.training.measure import fit_cells

    trainee = _trainee()
    activations = trainee.activations(trainee.original[None], "train")
    with pytest.raises(ValueError, match=r"'ccs' learns from contrast pairs .* has none; press it on --testbed statem"):
        fit_cells(trainee, "ccs", activations, 0)


# -- modes, control, verdicts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", _MODES)
def test_every_mode_runs(mode: str) -> None:
    result = _result(mode)
    assert result.mode == mode
    assert result.strengths.tolist() == pytest.approx([0.0, *_STRENGTHS])
    assert result.steps[0] == 0
    assert result.steps[-1] == 16
    cells = (len(result.steps), 3, 2)
    for name in ("length", "spent", "shift", "shift_bare", "chosen_by", "failed"):
        values = getattr(result.measured, name)
        assert values.shape == cells
        assert np.isfinite(values).all()
    assert result.against == (("lda", "logistic") if mode == "ensemble" else ("lda",))
    assert list(result.measured.auroc) == [*result.against, "mass_mean"]
    assert list(result.curves) == [*result.against, "mass_mean", "refit"]
    assert result.log["evasion"].shape == cells
    assert not result.diverged.any()
    assert result.verdict in ("broken", "held", "behaviour broken")
    assert "did_not_engage" not in _names(result)
    assert (result.rounds is not None) == (mode == "refit")
    assert result.config["mode"] == mode


def test_pressure_lowers_the_attacked_probe() -> None:
    result = _result("frozen")
    auroc = result.measured.auroc["lda"][-1].mean(axis=-1)
    assert auroc[1:].max() < auroc[0] - 0.05
    # more pressure evades more, and none does not evade
    evasion = result.log["evasion"][-1].mean(axis=-1)
    assert evasion[2] < evasion[1] < evasion[0]


def test_modes_differ_in_what_the_attack_trains_against() -> None:
    ends = {mode: _result(mode).measured.auroc["lda"][-1] for mode in _MODES}
    # without pressure the defender makes no difference
    for mode in _MODES:
        assert np.array_equal(ends[mode][0], ends["frozen"][0])
        if mode != "frozen":
            assert not np.array_equal(ends[mode][1:], ends["frozen"][1:])
    # who also trains against logistic lowers logistic more than who does not
    logistic = _own("logistic")
    trainee = _trainee()
    test = trainee.activations(_cells()[-1], "test")
    frozen = np.mean([_auroc(logistic[m].score(test[2, m])) for m in range(2)])
    assert _result("ensemble").measured.auroc["logistic"][-1, 2].mean() < frozen


def test_benign_control_is_there_and_unbroken() -> None:
    result = _result("frozen")
    assert result.strengths[0] == 0, "added where it was not asked for"
    benign = result.benign
    assert benign is not None
    assert benign.broke == 0
    assert (benign.auroc > result.tau).all()
    # it moved as well: it is a control of the training, not of nothing
    assert (benign.spent > 0).all()
    assert (benign.shift > 0).all()
    assert np.array_equal(benign.auroc, result.measured.auroc["lda"][-1, 0])
    assert "benign_broke_it" not in _names(result)


def test_a_control_that_breaks_the_probe_makes_it_brittle() -> None:
    """Planted: a control that is pressed as hard as all cells."""

    class Careless(Finetune):
        """Presses its control too: what breaks then is no evidence against the probe."""

        def start(self, trainee: Any, strengths: np.ndarray, seed: int) -> Any:
            return super().start(trainee, np.full_like(strengths, 10.0), seed)

    attack = Careless(learning_rate=3e-2, batch_size=64)
    result = stress_training(_trainee(), "lda", **{**_OPTIONS, "attack": attack, "steps": 40, "checkpoints": 1})
    assert result.benign is not None
    assert result.benign.broke == 1.0
    assert result.verdict == "brittle"
    assert "benign_broke_it" in _names(result)


# nothing finite is left to take a mean of
@pytest.mark.filterwarnings("ignore:Mean of empty slice")
def test_diverged_cells_are_reported_and_never_count_as_broken() -> None:
    attack = Finetune(learning_rate=1e30, batch_size=64)
    result = stress_training(_trainee(), "lda", **{**_OPTIONS, "attack": attack, "steps": 8, "checkpoints": 1})
    assert result.verdict == "diverged"
    assert result.diverged.shape == (3, 2)
    assert result.diverged.all()
    (flag,) = [f for f in result.flags if f.name == "diverged"]
    assert flag.red
    assert "6 of 6 cells, strengths 0, 0.3, 3" in str(flag)
    assert np.isinf(result.spent).all()
    assert np.isinf(result.spent_free).all()
    assert not result.measured.failed.any()
    assert result.headline.kind is Kind.CENSORED
    # not dropped: its cells are in the arrays, as what they are
    assert np.isnan(result.measured.auroc["lda"][-1]).all()
    json.dumps(result.to_json(), allow_nan=False)


def test_what_explodes_and_stays_finite_is_not_broken_either() -> None:
    attack = Finetune(learning_rate=1e6, batch_size=64)
    result = stress_training(_trainee(), "lda", **{**_OPTIONS, "attack": attack, "steps": 8, "checkpoints": 1})
    assert np.isfinite(result.measured.auroc["lda"]).all()
    assert np.isinf(result.spent).all()
    assert not result.measured.failed.any()
    assert result.verdict not in ("broken", "held")


def test_what_diverges_in_part_is_told_by_strength() -> None:
    class Unstable(Finetune):
        """Its strongest cells end as NaN."""

        def advance(self, trainee: Any, state: Any, targets: Any, steps: int) -> Any:
            moved, log = super().advance(trainee, state, targets, steps)
            weights = moved["weights"].copy()
            weights[-1, 0] = np.nan
            return {**moved, "weights": weights}, log

    attack = Unstable(learning_rate=1e-2, batch_size=64)
    result = stress_training(_trainee(), "lda", **{**_OPTIONS, "attack": attack})
    assert result.diverged.tolist() == [[False, False], [False, False], [True, False]]
    (flag,) = [f for f in result.flags if f.name == "diverged"]
    assert "1 of 6 cells, strengths 3" in str(flag)
    assert result.verdict != "diverged"
    # model 0 is judged by what is left of it, model 1 as in the run without
    whole = _result("frozen")
    assert np.array_equal(result.measured.auroc["lda"][:, :2], whole.measured.auroc["lda"][:, :2])
    assert result.spent[1] == whole.spent[1]
    assert result.reached[0] == whole.measured.spent[1:, 1, 0][whole.measured.shift[1:, 1, 0] <= whole.epsilon].max()


def test_an_attack_that_cannot_engage_says_so() -> None:
    attack = Finetune(learning_rate=1e-9, batch_size=64)
    result = stress_training(_trainee(), "lda", **{**_OPTIONS, "attack": attack, "steps": 8, "checkpoints": 1})
    assert result.verdict == "did not engage"
    (flag,) = [f for f in result.flags if f.name == "did_not_engage"]
    assert flag.red
    assert np.isinf(result.spent).all()


def test_what_catches_nothing_has_nothing_to_lose() -> None:
    result = stress_training(_trainee(), "rock", **{**_OPTIONS, "steps": 8, "checkpoints": 1})
    assert result.clean == pytest.approx(0.5)
    assert result.verdict == "no signal"
    assert "catches_nothing" in _names(result)


def test_a_probe_with_its_sign_flipped_is_told_from_one_without_a_signal() -> None:
    backwards = {m: direction(-own.parameters["weight"]) for m, own in enumerate(_own("lda"))}
    result = stress_training(_trainee(), backwards, **{**_OPTIONS, "steps": 8, "checkpoints": 1})
    assert result.verdict == "no signal"
    assert "flipped" in _names(result)
    assert "catches_nothing" not in _names(result)


class _Centred(LDA):
    name = "centred"

    def score(self, xp: Any, parameters: Mapping[str, Any], activations: Any) -> Any:
        scores = super().score(xp, parameters, activations)
        return scores - scores.mean()


def test_a_score_that_depends_on_the_batch_is_refused_before_anything_is_trained() -> None:
    with pytest.raises(ValueError, match="by the other rows of its batch"):
        stress_training(_trainee(), _Centred(), **_OPTIONS)


# -- recomputed from the weights ---------------------------------------------------------------------------------------


def _auroc(scores: Any) -> float:
    return float(roc_auc_score(_trainee().splits["test"].labels, scores))


@functools.cache
def _sigma() -> np.ndarray:
    """The prior's standard deviations by their definition: scale x root mean square, tensor by tensor."""
    organism, scale = _trainee().organism, _trainee().calibration.scale
    rows = []
    for model in range(2):
        weights = organism.one_model(model)
        assert sorted(weights) == ["bias", "weight"]
        parts = [np.full(weights[n].size, np.sqrt((weights[n].astype(float) ** 2).mean())) for n in sorted(weights)]
        rows.append(scale[model] * np.concatenate(parts))
    return np.stack(rows)


def _forward(flat: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Activations and outputs in plain numpy."""
    bias, weight = flat[:16], flat[16:].reshape(16, 6)
    hidden = x @ weight
    return hidden, np.maximum(hidden @ weight.T + bias, 0.0)


@functools.cache
def _behaviour_x() -> np.ndarray:
    return np.asarray(_trainee().behaviour_inputs()["x"], dtype=float)


def _shift(flat: np.ndarray, original: np.ndarray) -> float:
    """Mean KL of unit Gaussians with scaled means, in plain numpy."""
    x = _behaviour_x()
    scales = _trainee().organism.feature_scales  # type: ignore[attr-defined]
    gap = scales * (_forward(flat.astype(float), x)[1] - _forward(original.astype(float), x)[1])
    return float((gap**2).sum(axis=1).mean() / 2)


def test_spent_is_the_length_of_the_move() -> None:
    result = _result("frozen")
    u = (_cells().astype(float) - _trainee().original) / _sigma()
    r = np.linalg.norm(u, axis=-1)
    np.testing.assert_allclose(result.measured.length, r, rtol=1e-5)
    np.testing.assert_allclose(result.measured.spent, r**2 / (2 * math.log(2)), rtol=1e-5)
    assert (result.measured.spent[0] == 0).all()
    assert (result.measured.spent[-1] > 1).all()


def test_auroc_and_shift_are_means_under_qs_noise() -> None:
    """Every measured number of the last checkpoint from numpy and scikit-learn; only the draws are the trainee's."""
    result, trainee = _result("frozen"), _trainee()
    x = np.asarray(trainee.organism.probe_inputs("test")["x"], dtype=float)
    for k, m in np.ndindex(3, 2):
        cell = _cells()[-1, k, m].astype(float)
        noisy = [cell + _sigma()[m] * trainee.noise(draw) for draw in range(2)]
        scores = [_own("lda")[m].score(_forward(flat, x)[0]) for flat in noisy]
        assert result.measured.auroc["lda"][-1, k, m] == pytest.approx(np.mean([_auroc(s) for s in scores]), abs=2e-3)
        shifts = [_shift(flat, trainee.original[m]) for flat in noisy]
        assert result.measured.shift[-1, k, m] == pytest.approx(np.mean(shifts), rel=1e-3)
        assert result.measured.shift_bare[-1, k, m] == pytest.approx(_shift(cell, trainee.original[m]), rel=1e-3)
        lost = [
            _auroc(s) <= result.tau[m] and shift <= trainee.epsilon for s, shift in zip(scores, shifts, strict=True)
        ]
        assert result.measured.failed[-1, k, m] == pytest.approx(np.mean(lost))


def test_clean_and_half_advantage() -> None:
    result, trainee = _result("frozen"), _trainee()
    test = trainee.activations(trainee.original[None], "test")[0]
    clean = [_auroc(_own("lda")[m].score(test[m])) for m in range(2)]
    np.testing.assert_allclose(result.clean, clean)
    np.testing.assert_allclose(result.tau, (np.array(clean) + 0.5) / 2)


@pytest.mark.parametrize("free", [False, True], ids=["kept", "free"])
@pytest.mark.parametrize("mode", _MODES)
def test_the_curve_is_the_attackers_choice_by_brute_force(mode: str, free: bool) -> None:
    result = _result(mode)
    measured, epsilon = result.measured, result.epsilon
    curves = result.curves_free if free else result.curves
    for name in measured.auroc:
        curve = curves[name]
        assert curve.x[0] == 0
        assert (np.diff(curve.x) > 0).all()
        for b, value in zip(curve.x, curve.value, strict=True):
            chosen = []
            for m in range(2):
                # (AUROC on calibration items, AUROC on test items) of every cell that may be taken
                may = [(measured.chosen_by[0, 0, m], measured.auroc[name][0, 0, m])]
                for t, k in np.ndindex(measured.spent.shape[:2]):
                    within = 0 < measured.spent[t, k, m] <= b
                    if within and result.strengths[k] > 0 and (free or measured.shift[t, k, m] <= epsilon):
                        may.append((measured.chosen_by[t, k, m], measured.auroc[name][t, k, m]))
                chosen.append(min(may, key=lambda pair: pair[0])[1])
            assert value == pytest.approx(np.mean(chosen))
    own = curves["lda"]
    assert own.value[0] == pytest.approx(measured.auroc["lda"][0, 0].mean()), "starts under q's noise, nothing moved"
    assert own.value[0] == pytest.approx(result.clean.mean(), abs=0.1)
    assert own.value[-1] < own.value[0]


def test_some_cell_is_really_kept_out_by_behaviour() -> None:
    """Control of the test above: epsilon binds, so a path that ignored it would be another."""
    shift = _result("frozen").measured.shift[1:, 1:]
    assert (shift > _result("frozen").epsilon).any()
    assert (shift <= _result("frozen").epsilon).any()


@pytest.mark.parametrize("mode", _MODES)
def test_bits_spent_until_half_of_the_advantage_was_gone(mode: str) -> None:
    result = _result(mode)
    measured = result.measured
    auroc = measured.auroc["lda"]
    for m in range(2):
        kept, free = [], []
        for t, k in np.ndindex(measured.spent.shape[:2]):
            if result.strengths[k] > 0 and auroc[t, k, m] <= result.tau[m]:
                bits = measured.spent[t, k, m]
                if auroc[t - 1, k, m] > result.tau[m] and bits > measured.spent[t - 1, k, m]:
                    # it crossed between two checkpoints: linear in the length of the move
                    before, after = auroc[t - 1 : t + 1, k, m]
                    lengths = np.sqrt(measured.spent[t - 1 : t + 1, k, m])
                    bits = np.interp(result.tau[m], [after, before], lengths[::-1]) ** 2
                free.append(bits)
                kept += free[-1:] if measured.shift[t, k, m] <= result.epsilon else []
        assert result.spent[m] == pytest.approx(min(kept, default=math.inf))
        assert result.spent_free[m] == pytest.approx(min(free, default=math.inf))
        may = (measured.shift[:, 1:, m] <= result.epsilon) & (measured.spent[:, 1:, m] > 0)
        assert result.reached[m] == measured.spent[:, 1:, m][may].max(initial=0.0)


def test_what_was_not_broken_is_censored_at_what_was_reached() -> None:
    # a weak and short pressure that engages (the evasion falls) but does not break
    result = stress_training(_trainee(), "lda", **{**_OPTIONS, "strengths": (3.0,), "steps": 6, "checkpoints": 1})
    assert np.isinf(result.spent).all()
    assert (result.reached > 0).all()
    assert result.headline.kind is Kind.CENSORED
    assert result.headline.value == pytest.approx(np.median(result.reached))
    assert result.headline.high == math.inf
    assert result.verdict in ("held", "did not engage")
    assert np.isinf(result.upper_bound).all(), "there is no place where it broke through"
    assert np.isnan(result.efficiency).all()


def test_the_bound_holds_where_the_attack_broke_through() -> None:
    """The distribution that broke the probe spent r^2/(2 ln 2); a rigorous bound is finite only where it succeeded."""
    broken = [r for r in map(_result, _MODES) if np.isfinite(r.spent).any()]
    assert broken, "some mode must break some model, or this says nothing"
    for result in broken:
        finite = np.isfinite(result.upper_bound)
        assert not finite[~np.isfinite(result.spent)].any()
        assert (result.upper_bound[finite] > 0).all()
        # moved by r the prior's draws fail with log2 dq/dp near r^2/(2 ln 2) + a few standard deviations r/ln 2
        r = np.sqrt(result.spent[finite] * 2 * math.log(2))
        assert (result.upper_bound[finite] <= result.spent[finite] + 4 * r / math.log(2) + 12).all()
        ratio = result.upper_bound[finite] / result.spent[finite]
        np.testing.assert_allclose(result.efficiency[finite], ratio)


def test_audits_lie_on_the_curve() -> None:
    result = _result("frozen")
    assert result.audits[0].bits == 0
    assert [a.bits for a in result.audits] == sorted(a.bits for a in result.audits)
    assert result.audits[-1].bits == result.curves["lda"].x[-1]
    for point in result.audits:
        assert len(point.audits) == 2
        assert sum(point.verdicts.values()) == 2
        assert point.verdict in point.verdicts
        assert np.isfinite(list(point.gains.values())).all()
    first, last = result.audits[0], result.audits[-1]
    # nothing moved (the audit reads bare weights), so raw is what clean is
    assert first.gains["raw"] == pytest.approx(first.gains["clean"], abs=1e-6)
    assert last.gains["raw"] < first.gains["raw"]
    refit = result.curves["refit"]
    assert refit.x.tolist() == [a.bits for a in result.audits]
    assert refit.value[0] == pytest.approx(result.clean.mean(), abs=1e-6), (
        "a refit to what has not moved is the same probe"
    )
    for when, verdict in ((result.moved_at, "moved"), (result.hidden_at, "hidden"), (result.gone_at, "gone")):
        assert when == next((a.bits for a in result.audits if a.verdict == verdict), math.inf)


def test_a_defender_that_refits_counts_its_rounds() -> None:
    rounds = _result("refit").rounds
    assert rounds is not None
    assert rounds.shape == (2,)
    assert ((rounds >= 0) & (rounds <= len(_result("refit").steps) - 1)).all()


def test_results_serialize_completely_and_repeat() -> None:
    record = json.loads(json.dumps(_result("frozen").to_json(), allow_nan=False))
    assert set(record) >= {f.name for f in dataclasses.fields(PressureResult)}
    np.testing.assert_allclose(record["measured"]["spent"], _result("frozen").measured.spent)
    assert record["verdict"] == _result("frozen").verdict
    assert record["headline"]["kind"] == _result("frozen").headline.kind.value
    again = stress_training(_trainee(), "lda", **_OPTIONS).to_json()
    assert {**again, "seconds": 0} == {**_result("frozen").to_json(), "seconds": 0}


# -- bad input says the way out ----------------------------------------------------------------------------------------

_BAD: dict[str, tuple[Mapping[str, Any], str]] = {
    "mode": ({"mode": "soft"}, "no defender mode is called 'soft'; known modes: frozen, refit, ensemble"),
    "ensemble of nobody": ({"mode": "ensemble"}, r"takes further probes to train against \(against=\)"),
    "against without ensemble": ({"against": ("lda",)}, r"takes further probes to train against \(against=\)"),
    "negative strength": ({"strengths": (-1.0,)}, r"strengths is a number of at least 0, got -1\.0"),
    "only the control": ({"strengths": (0.0,)}, "non-negative and at least one is positive"),
    "no strength": ({"strengths": ()}, "non-negative and at least one is positive"),
    "not a number": ({"strengths": (math.nan,)}, "strengths is a number of at least 0, got nan"),
    "no steps": ({"steps": 0}, "steps is a whole number from 1 on, got 0"),
    "no checkpoints": ({"checkpoints": 0}, "checkpoints is a whole number from 1 to 1,000,000, got 0"),
    "moves activations": ({"attack": Gradient()}, "moves activations, not weights; use elk_stress.stress"),
    "by name": ({"attack": "gradient"}, "attack 'gradient' moves activations, not weights"),
    "another subject": (
        {"attack": Lora()},
        "trains language models and 'superposition' is no language model; use finetune",
    ),
}


@pytest.mark.parametrize(("options", "says"), _BAD.values(), ids=_BAD)
def test_bad_input_is_refused(options: Mapping[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        stress_training(_trainee(), "lda", **{**_OPTIONS, **options})


def test_other_refusals() -> None:
    with pytest.raises(ValueError, match=r"'linear' has no weights to train; use an organism \(superposition"):
        stress_training(Linear(), "lda", **_OPTIONS)
    with pytest.raises(ValueError, match="'oracle' cannot be refitted; use mode 'frozen'"):
        stress_training(_trainee(), "oracle", **{**_OPTIONS, "mode": "refit"})
    with pytest.raises(ValueError, match="epsilon is a positive number of nats, got 0"):
        OrganismTrainee(_trainee().organism, epsilon=0.0)
    with pytest.raises(ValueError, match=r"weights must have shape \(strengths, 2 models, 112\), got \(2, 112\)"):
        _trainee().activations(_trainee().original, "test")


def test_what_an_organism_knows_can_be_attacked() -> None:
    result = stress_training(_trainee(), "oracle", **{**_OPTIONS, "steps": 8, "checkpoints": 1})
    assert result.probe == "oracle"
    assert result.curves["oracle"].value[0] > 0.8


# -- the trainee -------------------------------------------------------------------------------------------------------


def test_calibration_is_the_largest_scale_that_keeps_behaviour() -> None:
    trainee = _trainee()
    found = trainee.calibration
    assert isinstance(trainee, Trainee)
    assert found.target == pytest.approx(trainee.epsilon / 3)
    unit = _sigma() / found.scale[:, None]
    np.testing.assert_allclose(trainee.sigma, _sigma(), rtol=1e-5)

    def median(scale: np.ndarray) -> np.ndarray:
        """Of the shift over the calibration's draws, in plain numpy."""
        rows = []
        for draw in range(trainee.n_draws):
            moved = trainee.original + scale[:, None] * unit * trainee.noise(-1 - draw)
            rows.append([_shift(flat, base) for flat, base in zip(moved, trainee.original, strict=True)])
        return np.median(rows, axis=0)

    assert (median(found.scale) <= found.target * 1.001).all()
    assert (median(found.scale) >= found.target * 0.98).all()
    assert (median(1.05 * found.scale) > found.target).all()
    # noise of measurements is none of the calibration's
    assert not np.array_equal(trainee.noise(0), trainee.noise(-1))
    assert (np.diff(found.shifts, axis=0)[found.shifts[1:] < 1.0] > 0).all()


def test_calibration_refuses_what_no_scale_reaches() -> None:
    with pytest.raises(ValueError, match="choose another epsilon"):
        calibrate(lambda scale: 0.1 * scale**0, 2, 0.03, 9)
    with pytest.raises(ValueError, match="choose another epsilon"):
        calibrate(lambda scale: 1e-9 * scale, 2, 0.03, 9)
    # of several crossings the largest: behind it every scale shifts too much
    dip = calibrate(lambda s: np.where((s > 0.01) & (s < 0.1), 1.0, s), 1, 0.9, 9)
    assert dip.scale == pytest.approx(0.3, rel=1e-3)


def test_moves_have_one_geometry() -> None:
    trainee = _trainee()
    rng = np.random.default_rng(np.random.SeedSequence(5))
    u = rng.standard_normal((3, 2, trainee.n_parameters))
    weights = (trainee.original + _sigma() * u).astype(np.float32)
    np.testing.assert_allclose(trainee.u(weights), u, atol=1e-4)
    np.testing.assert_allclose(trainee.length(weights), np.linalg.norm(u, axis=-1), rtol=1e-5)
    z = trainee.noise(3).astype(float)
    np.testing.assert_allclose(trainee.along(weights, 3), u @ z / np.linalg.norm(u, axis=-1), rtol=1e-4)
    assert np.array_equal(trainee.along(trainee.original[None], 3), np.zeros((1, 2)))
    factor = rng.uniform(0.5, 2.0, (3, 2))
    scaled = trainee.scaled(weights, factor)
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(trainee.length(scaled), factor * trainee.length(weights), rtol=1e-5)
    np.testing.assert_allclose(trainee.along(scaled, 3), trainee.along(weights, 3), atol=1e-3)
    # noise is one draw of the prior, added to the weights
    noisy = (weights + trainee.sigma * trainee.noise(3)).astype(np.float32)
    np.testing.assert_allclose(trainee.activations(weights, "test", 3), trainee.activations(noisy, "test"), atol=1e-5)
    np.testing.assert_allclose(trainee.shift(weights, 3), trainee.shift(noisy), rtol=1e-4)
    assert (trainee.shift(trainee.original[None]) == 0).all()


def test_a_wider_prior_makes_the_same_move_shorter() -> None:
    trainee = _trainee()
    wide = dataclasses.replace(trainee, scale_factor=2.0, _compiled={})
    wide.__dict__["calibration"] = trainee.calibration
    cells = _cells()[-1]
    np.testing.assert_allclose(wide.length(cells), trainee.length(cells) / 2, rtol=1e-6)


def test_checkpoints_are_no_part_of_the_numbers(tmp_path: Any) -> None:
    kept = stress_training(_trainee(), "lda", **_OPTIONS, out=tmp_path)
    assert {**kept.to_json(), "seconds": 0} == {**_result("frozen").to_json(), "seconds": 0}
    checkpoints, state = Checkpoints(tmp_path, json.loads((tmp_path / "settings.json").read_text())).resume()
    assert np.array_equal(np.stack([c["weights"] for c in checkpoints]), _cells())
    assert state is not None
    assert int(state["step"]) == 16
    # the same folder under another strength is another run
    with pytest.raises(ValueError, match=r"strengths differ .*choose another folder"):
        stress_training(_trainee(), "lda", **{**_OPTIONS, "strengths": (5.0,)}, out=tmp_path)


def test_flags_are_explained() -> None:
    for mode in _MODES:
        assert all(isinstance(flag, Flag) for flag in _result(mode).flags)
