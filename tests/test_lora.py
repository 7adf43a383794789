"""Training pressure on a language model: adapters, the prior around the weights they sit on, and the attack."""

from __future__ import annotations

import copy
import io
import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny_models

from elk_stress.attacks.lora import Lora
from elk_stress.models.language_model import LanguageModel
from elk_stress.probes.ccs import CCS
from elk_stress.probing.probe import FittedProbe, as_fitted
from elk_stress.testbeds import facts
from elk_stress.testbeds.protocol import Items
from elk_stress.testbeds.statements import Statements
from elk_stress.thoughts.conformal import auroc
from elk_stress.threats.priors import natural
from elk_stress.training.evasion import targets_from
from elk_stress.training.language_model_trainee import LoraTrainee
from elk_stress.training.loop import as_trainee
from elk_stress.training.measure import fit_cells
from elk_stress.training.prior_scale import calibrate
from elk_stress.training.protocols import Targets, Trainee, TrainingAttack
from elk_stress.training.trainee_texts import limited, true_statements

_SITE = "layers.2"
_SHORT = Lora(steps=6, learning_rate=3e-3, batch_size=4)


def _items(split: str, places: tuple[str, ...]) -> Items:
    texts, labels = [], []
    for place, animal, colour in itertools.product(places, ("cat", "dog"), ("red", "blue", "green")):
        for number in ("one", "two"):
            texts.append(f"the {animal} is {colour} and {number} in {place}.")
            labels.append(int(animal == "dog"))
    n = len(texts)
    return Items(
        ids=tuple(f"{split}{i}" for i in range(n)),
        labels=np.array(labels),
        groups=np.array([f"{split}{i}" for i in range(n)]),
        texts=tuple(texts),
    )


def _model() -> LanguageModel:
    return LanguageModel.from_modules(tiny_models.causal(), tiny_models.tokenizer(), fingerprint="tiny", causal=True)


def _trainee(model: LanguageModel | None = None, **options: Any) -> LoraTrainee:
    words = ("rain", "sun", "tea", "city")
    texts = [f"the {a} and the {b} of my {c}" for a, b, c in itertools.product(words, words, ("country", "city"))]
    return LoraTrainee(
        model or _model(),
        {"train": _items("train", ("paris", "osaka")), "test": _items("test", ("lima",))},
        _SITE,
        ordinary=texts[::2],
        behaviour=texts[1::2],
        **{"rank": 2, "scale": 0.05, **options},
    )


@pytest.fixture(scope="module")
def trainee() -> LoraTrainee:
    return _trainee()


def _moved(trainee: LoraTrainee, strengths: int = 2, size: float = 0.1) -> np.ndarray:
    rng = np.random.default_rng(7)
    shape = (strengths, *trainee.original.shape)
    return (trainee.original + size * rng.standard_normal(shape)).astype(np.float32)


def _probes(trainee: LoraTrainee, strengths: int, name: str = "logistic") -> tuple[FittedProbe, Targets]:
    cells = np.repeat(trainee.original[None], strengths, axis=0)
    activations = trainee.activations(cells, "train")
    labels = trainee.splits["train"].labels
    probe = as_fitted(name, activations[0, 0], labels)
    return probe, targets_from([[[probe] * trainee.n_models] * strengths], activations, labels)


def _dense(trainee: LoraTrainee, cell: np.ndarray, draw: int | None = None) -> Any:
    """A plain transformers model with the moved weights written out; no adapter and none of our code runs in it."""
    import torch

    model = tiny_models.causal()
    with torch.no_grad():
        for t, (matrix, sigma) in enumerate(zip(trainee.adapted.matrices, trainee.sigma, strict=True)):
            out, width = matrix.shape
            weight = model.get_submodule(matrix.name).weight
            weight += torch.from_numpy(cell[matrix.b].reshape(out, 2) @ cell[matrix.a].reshape(2, width))
            if draw is not None:
                weight += float(sigma) * torch.from_numpy(trainee._prior.noise(draw, t))
    return model


def test_is_a_trainee_and_an_attack(trainee: LoraTrainee) -> None:
    assert isinstance(trainee, Trainee)
    assert isinstance(Lora(), TrainingAttack)
    assert trainee.subject == Lora.subject


def test_original_changes_nothing(trainee: LoraTrainee) -> None:
    texts = trainee.splits["test"].texts or ()
    expected = _model().read(texts, [_SITE])[_SITE]
    found = trainee.activations(trainee.original[None], "test")
    assert found.shape == (1, 2, len(texts), 24)
    assert np.array_equal(found[0, 0], expected)
    assert (trainee.shift(trainee.original[None]) == 0).all()
    assert (trainee.length(trainee.original[None]) == 0).all()
    assert (trainee.along(trainee.original[None], 0) == 0).all()
    # seeds differ, although none of them has moved
    assert not np.array_equal(trainee.original[0], trainee.original[1])


def test_only_blocks_up_to_the_site_are_adapted(trainee: LoraTrainee) -> None:
    names = [matrix.name for matrix in trainee.adapted.matrices]
    assert len(names) == 6
    assert not any("layers.3" in name for name in names)
    # 24 x 24 queries and 12 x 24 values in three blocks, rank 2
    assert trainee.n_parameters == 3 * 2 * (24 + 24 + 24 + 12)


@pytest.mark.parametrize("draw", [None, 5])
def test_adapters_and_noise_equal_weights_written_out(trainee: LoraTrainee, draw: int | None) -> None:
    import torch

    cells = _moved(trainee)
    found = trainee.activations(cells, "test", draw)
    shifts = trainee.shift(cells, draw)
    original = tiny_models.causal()
    for cell in np.ndindex(2, 2):
        model = _dense(trainee, cells[cell], draw)
        total, count = 0.0, 0
        with torch.no_grad():
            for i, text in enumerate(trainee.splits["test"].texts or ()):
                ids = trainee.adapted.reader.tokenizer(text, return_tensors="pt")["input_ids"]
                hidden = model(ids, output_hidden_states=True).hidden_states[3][0, -1]
                np.testing.assert_allclose(found[cell][i], hidden.numpy(), atol=2e-4, rtol=1e-3)
            for row in trainee._behaviour_rows:
                ids = torch.tensor([row])
                log_p, log_q = (m(ids).logits[0].double().log_softmax(-1) for m in (original, model))
                total += float((log_p.exp() * (log_p - log_q)).sum())
                count += len(row)
        assert shifts[cell] == pytest.approx(total / count, rel=1e-3)
    assert (shifts > 0).all()


def test_length_and_component_equal_those_of_the_dense_move(trainee: LoraTrainee) -> None:
    cells = _moved(trainee)
    squares, inner = np.zeros((2, 2)), np.zeros((2, 2))
    for t, (matrix, sigma) in enumerate(zip(trainee.adapted.matrices, trainee.sigma, strict=True)):
        out, width = matrix.shape
        u = cells[..., matrix.b].reshape(2, 2, out, 2) @ cells[..., matrix.a].reshape(2, 2, 2, width) / sigma
        squares += (u.astype(float) ** 2).sum((-1, -2))
        inner += (u.astype(float) * trainee._prior.noise(3, t)).sum((-1, -2))
    np.testing.assert_allclose(trainee.length(cells), np.sqrt(squares), rtol=1e-5)
    np.testing.assert_allclose(trainee.along(cells, 3), inner / np.sqrt(squares), rtol=1e-4)


def test_scaling_stretches_the_move(trainee: LoraTrainee) -> None:
    cells = _moved(trainee)
    factor = np.array([[2.0, 0.5], [1.0, 0.0]])
    stretched = trainee.scaled(cells, factor)
    np.testing.assert_allclose(trainee.length(stretched), factor * trainee.length(cells), rtol=1e-5)
    # the direction stays
    np.testing.assert_allclose(trainee.along(stretched, 1)[0], trainee.along(cells, 1)[0], rtol=1e-5)
    assert trainee.shift(stretched)[1, 1] == 0


def test_noise_is_standard_normal_along_the_move(trainee: LoraTrainee) -> None:
    cells = _moved(trainee, strengths=1)
    draws = np.array([trainee.along(cells, draw)[0, 0] for draw in range(400)])
    # four standard errors: false alarm below 1e-4 each, and the seed is fixed
    assert abs(draws.mean()) < 4 / np.sqrt(400)
    assert abs(draws.std() - 1) < 4 / np.sqrt(800)
    # noise does not depend on the cell, and differs between draws and matrices
    assert not np.array_equal(trainee._prior.noise(0, 0), trainee._prior.noise(1, 0))
    assert not np.array_equal(trainee._prior.noise(0, 0), trainee._prior.noise(0, 2))


def test_noise_leaves_the_weights_as_they_were(trainee: LoraTrainee) -> None:
    cells = _moved(trainee)
    before = trainee.activations(cells, "test")
    noisy = trainee.activations(cells, "test", 0)
    assert not np.allclose(before, noisy)
    assert np.array_equal(before, trainee.activations(cells, "test"))
    with pytest.raises(RuntimeError, match="inside"), trainee._disturbed(1):
        raise RuntimeError("inside")
    assert np.array_equal(before, trainee.activations(cells, "test"))


def test_the_reference_is_never_disturbed(trainee: LoraTrainee) -> None:
    """Behaviour is compared with the undisturbed original, even if noise is the first thing that is asked for."""
    cells = _moved(trainee)
    assert np.array_equal(_trainee().shift(cells, 2), trainee.shift(cells, 2))
    assert (trainee.shift(trainee.original[None], 2) > 0).all()


def test_calibration_hits_its_target() -> None:
    trainee = _trainee(scale=None, epsilon=0.06, n_draws=9)
    calibration = trainee.calibration
    assert calibration["target"] == pytest.approx(0.02)
    # an independent count: other code (the noise of shift) on the calibration's own draws
    shifts = [trainee.shift(trainee.original[None], -1 - draw)[0, 0] for draw in range(9)]
    assert np.median(shifts) == pytest.approx(0.02, rel=0.03)
    assert calibration["scales"] == sorted(calibration["scales"])
    assert (np.diff(calibration["median_shift"]) > 0).all()
    assert np.shape(calibration["shifts"]) == (len(calibration["scales"]), 9)
    # fresh draws shift behaviour about as much
    fresh = [trainee.shift(trainee.original[None], draw)[0, 0] for draw in range(9)]
    assert 0.01 < np.median(fresh) < 0.04
    # a wider prior makes the same move shorter
    wide = _trainee(scale=calibration["scale"], scale_factor=2.0)
    cells = _moved(trainee)
    np.testing.assert_allclose(wide.length(cells), trainee.length(cells) / 2, rtol=1e-6)


def test_calibration_refuses_what_no_scale_reaches() -> None:
    with pytest.raises(ValueError, match="choose another epsilon"):
        calibrate(lambda scale: np.full(3, 0.5 * scale / (1 + scale)), target=0.9)
    found = calibrate(lambda scale: np.full(3, 5 * scale**2), target=0.01)
    assert found["scale"] == pytest.approx(np.sqrt(0.002), rel=0.02)


def test_gradient_reaches_only_the_adapters() -> None:
    trainee = _trainee()
    _, targets = _probes(trainee, 1)
    parameters = dict(trainee.adapted.reader.model.named_parameters())
    before = {name: p.detach().clone() for name, p in parameters.items() if not p.requires_grad}
    assert all("lora_" in name for name, p in parameters.items() if p.requires_grad)
    assert sum(p.numel() for p in parameters.values() if p.requires_grad) == trainee.n_parameters
    state = _SHORT.start(trainee, np.array([1.0]), 0)
    state, _ = _SHORT.advance(trainee, state, targets, 2)
    assert all(parameters[name].grad is None and bool((parameters[name] == p).all()) for name, p in before.items())
    assert not np.array_equal(state["weights"][0], trainee.original)


def test_the_model_it_was_made_from_is_left_alone() -> None:
    model = _model()
    # a second copy of a real model would be gigabytes
    copies = {p.data_ptr() for name, p in _trainee(model).adapted.reader.model.named_parameters() if "lora" not in name}
    assert copies == {p.data_ptr() for p in model.model.parameters()}
    texts = ["the cat is red in paris.", "the dog is not in lima"]
    weights = {name: p.clone() for name, p in model.model.named_parameters()}
    before = model.read(texts, model.sites)
    trainee = _trainee(model)
    _, targets = _probes(trainee, 1)
    _SHORT.advance(trainee, _SHORT.start(trainee, np.array([1.0]), 0), targets, 2)
    trainee.shift(_moved(trainee), 0)
    after = model.read(texts, model.sites)
    assert all(np.array_equal(before[site], after[site]) for site in model.sites)
    assert [name for name, _ in model.model.named_parameters()] == list(weights)
    assert all(bool((p == weights[name]).all()) for name, p in model.model.named_parameters())


def test_gradient_equals_finite_differences(trainee: LoraTrainee) -> None:
    """Of the evasion's forward pass, through the adapters."""
    cells = _moved(trainee, strengths=1)
    _, targets = _probes(trainee, 1)
    rows = trainee.adapted.reader.tokenize((trainee.splits["train"].texts or ())[4:12])
    positive = trainee.splits["train"].labels[4:12] == 1
    assert 0 < positive.sum() < 8
    from elk_stress.attacks.lora import _evasion_of

    evasion = _evasion_of(targets, (0, 0), "cpu")

    def value(flat: np.ndarray) -> Any:
        trainee.adapted.load(flat)
        return evasion(trainee.adapted.read_with_gradient(rows), positive)

    value(cells[0, 0]).backward()
    gradient = trainee.adapted.take_gradient()
    direction = (gradient / np.linalg.norm(gradient)).astype(np.float32)
    step = 1e-2
    found = (value(cells[0, 0] + step * direction) - value(cells[0, 0] - step * direction)).item() / (2 * step)
    assert found == pytest.approx(np.linalg.norm(gradient), rel=0.03)


def test_benign_control_moves_and_ignores_the_targets(trainee: LoraTrainee) -> None:
    _, targets = _probes(trainee, 2)
    broken = copy.deepcopy(targets)
    for array in broken.arrays:
        array["gap"][0] = np.nan
        array["parameters"]["weight"][0] = np.inf
    start = _SHORT.start(trainee, np.array([0.0, 2.0]), 0)
    state, log = _SHORT.advance(trainee, start, targets, 4)
    other, _ = _SHORT.advance(trainee, start, broken, 4)
    assert np.array_equal(state["weights"][0], other["weights"][0])
    assert (trainee.length(state["weights"]) > 0).all()
    assert (trainee.shift(state["weights"]) > 0).all()
    assert not np.array_equal(state["weights"][0], state["weights"][1])
    # the same texts in the same order for all strengths, others for the other seed
    assert np.array_equal(log["task"][0, 0], log["task"][0, 1])
    assert np.array_equal(log["evasion"][0, 0], log["evasion"][0, 1])
    assert not np.array_equal(log["task"][0, :, 0], log["task"][0, :, 1])


def test_the_task_is_next_token_cross_entropy(trainee: LoraTrainee) -> None:
    """A batch that holds every text, against transformers' own loss."""
    import torch

    _, targets = _probes(trainee, 1)
    attack = Lora(batch_size=1000)
    _, log = attack.advance(trainee, attack.start(trainee, np.array([0.0]), 0), targets, 1)
    model, total, count = tiny_models.causal(), 0.0, 0
    with torch.no_grad():
        for row in trainee.ordinary_rows:
            ids = torch.tensor([row])
            total += float(model(ids, labels=ids).loss) * (len(row) - 1)
            count += len(row) - 1
    np.testing.assert_allclose(log["task"][0, 0], total / count, rtol=1e-5)
    np.testing.assert_allclose(log["kl"][0, 0], 0, atol=1e-6)


def test_every_step_draws_anew(trainee: LoraTrainee) -> None:
    _, targets = _probes(trainee, 1)
    attack = Lora(learning_rate=0.0, batch_size=4)
    _, log = attack.advance(trainee, attack.start(trainee, np.array([1.0]), 0), targets, 6)
    for name in ("task", "evasion"):
        assert len(np.unique(log[name][:, 0, 0])) == 6


def test_ordinary_training_learns_the_ordinary_text(trainee: LoraTrainee) -> None:
    _, targets = _probes(trainee, 1)
    attack = Lora(learning_rate=1e-2, batch_size=8, keep=0.0)
    _, log = attack.advance(trainee, attack.start(trainee, np.array([0.0]), 0), targets, 30)
    assert (log["task"][-5:].mean(axis=0) < log["task"][:5].mean(axis=0) - 0.3).all()
    kept = Lora(learning_rate=1e-2, batch_size=8, keep=10.0)
    _, log_kept = kept.advance(trainee, kept.start(trainee, np.array([0.0]), 0), targets, 30)
    assert (log_kept["kl"][-5:].mean(axis=0) < log["kl"][-5:].mean(axis=0) / 2).all()


def test_pressure_breaks_the_probe_and_ordinary_training_does_not(trainee: LoraTrainee) -> None:
    probe, targets = _probes(trainee, 2)
    attack = Lora(learning_rate=1e-2, batch_size=8)
    state, log = attack.advance(trainee, attack.start(trainee, np.array([0.0, 3.0]), 0), targets, 40)
    assert set(log) == {"task", "evasion", "kl"}
    assert log["evasion"].shape == (40, 2, 2)
    late = log["evasion"][-5:].mean(axis=0)
    assert (late[1] < 0.2).all()
    assert (late[0] > 0.5).all()
    labels = trainee.splits["test"].labels
    scores = probe.score(trainee.activations(attack.weights(trainee, state), "test"))
    clean = auroc(probe.score(trainee.activations(trainee.original[None], "test"))[0, 0], labels)
    assert clean > 0.95
    assert auroc(scores[0, 0], labels) > 0.9
    assert max(auroc(scores[1, m], labels) for m in range(2)) < 0.7
    assert attack.spent(trainee, state) is None


def test_moving_all_items_alike_is_no_evasion(trainee: LoraTrainee) -> None:
    """Otherwise pressure finds a shift along the probe, and positives are told from negatives as well as before."""
    import torch

    from elk_stress.attacks.lora import _evasion_of

    probe, targets = _probes(trainee, 1)
    evasion = _evasion_of(targets, (0, 0), "cpu")
    activations = trainee.activations(trainee.original[None], "train")[0, 0]
    positive = trainee.splits["train"].labels == 1
    weight = np.asarray(probe.parameters["weight"], dtype=np.float32)
    along = weight / (weight @ weight) * float(targets.arrays[0]["gap"][0, 0])

    def value(moved: np.ndarray) -> float:
        return float(evasion(torch.from_numpy(moved.astype(np.float32)), positive).item())

    assert value(activations - 3 * along) == pytest.approx(value(activations), rel=1e-3)
    assert value(activations - np.outer(positive, along)) < 0.4 * value(activations)


def test_several_probes_count_by_their_mean(trainee: LoraTrainee) -> None:
    one, two = (_probes(trainee, 1, name)[1] for name in ("logistic", "mass_mean"))
    both = Targets((*one.recipes, *two.recipes), (*one.arrays, *two.arrays))
    start = _SHORT.start(trainee, np.array([1.0]), 0)
    first, second, mean = (_SHORT.advance(trainee, start, t, 1)[1]["evasion"] for t in (one, two, both))
    np.testing.assert_allclose(mean, (first + second) / 2, rtol=1e-5)


def test_resuming_continues_bit_for_bit() -> None:
    trainee = _trainee()
    _, targets = _probes(trainee, 2)
    start = _SHORT.start(trainee, np.array([0.0, 1.0]), 3)
    kept = copy.deepcopy(start)
    whole, log = _SHORT.advance(trainee, start, targets, 6)
    assert all(np.array_equal(start[name], kept[name]) for name in kept)
    part, log_a = _SHORT.advance(trainee, start, targets, 2)
    # to disk and back, into a model loaded anew
    file = io.BytesIO()
    np.savez(file, **part)
    file.seek(0)
    with np.load(file) as loaded:
        part = {name: loaded[name] for name in loaded.files}
    resumed, log_b = _SHORT.advance(_trainee(), part, targets, 4)
    assert set(resumed) == set(whole)
    assert all(np.array_equal(resumed[name], whole[name]) for name in whole)
    assert all(np.array_equal(np.concatenate([log_a[name], log_b[name]]), log[name]) for name in log)
    assert resumed["weights"].dtype == np.float32
    nothing, empty = _SHORT.advance(trainee, whole, targets, 0)
    assert np.array_equal(nothing["weights"], whole["weights"])
    assert empty["task"].shape == (0, 2, 2)


def test_a_diverged_run_is_nan_and_not_an_error(trainee: LoraTrainee) -> None:
    _, targets = _probes(trainee, 1)
    attack = Lora(learning_rate=1e30)
    state, log = attack.advance(trainee, attack.start(trainee, np.array([1.0]), 0), targets, 4)
    assert not np.isfinite(log["task"][-1]).all()
    assert not np.isfinite(state["weights"]).all()


def test_what_cannot_be_adapted_is_refused() -> None:
    splits = {"train": _items("train", ("paris",))}
    texts = {"ordinary": ["the sun"], "behaviour": ["the rain"]}
    with pytest.raises(ValueError, match="down_proj, gate_proj"):
        LoraTrainee(_model(), splits, _SITE, matrices=("c_attn",), **texts)
    with pytest.raises(ValueError, match=r"layers\.N"):
        LoraTrainee(_model(), splits, "embeddings", **texts)
    with pytest.raises(ValueError, match="both trained on and judged by"):
        LoraTrainee(_model(), splits, _SITE, ordinary=["the sun"], behaviour=["the sun"])
    with pytest.raises(ValueError, match="weights must have shape"):
        _trainee().shift(np.zeros((1, 3, 5), dtype=np.float32))
    encoder = LanguageModel.from_modules(
        tiny_models.bert(), tiny_models.tokenizer(True), fingerprint="bert", causal=False
    )
    with pytest.raises(TypeError, match="encoder"):
        LoraTrainee(encoder, splits, "layers.1", **texts)


def test_a_capped_head_is_understood() -> None:
    model = LanguageModel.from_modules(
        tiny_models.causal("gemma2"), tiny_models.tokenizer(), fingerprint="gemma", causal=True
    )
    trainee = _trainee(model)
    assert (trainee.shift(trainee.original[None]) == 0).all()
    assert (trainee.shift(_moved(trainee)) > 0).all()


def test_statements_become_a_trainee() -> None:
    testbed = Statements(site=_SITE, subject=_model())
    trainee = LoraTrainee.of(testbed, n_models=1, n_items=16, rank=1, scale=0.05)
    assert isinstance(trainee, Trainee)
    assert trainee.site == _SITE
    for split in ("train", "calibration", "test"):
        items = trainee.splits[split]
        assert len(items) == 16
        assert set(items.texts or ()) <= set(testbed.splits[split].texts or ())
    assert trainee.splits["train"].labels.sum() == 8
    assert trainee.splits["calibration"].labels.sum() == 4
    assert trainee.splits["train"].pairs is None
    assert np.isfinite(trainee.activations(trainee.original[None], "calibration")).all()
    described = trainee.describe()
    assert described["relation"] == "city_country"
    assert described["calibration"] == {"scale": 0.05}


class _Thoughts:
    """What a defence may ask of a testbed: 30 items under 5 contexts, and factors that behaviour reads."""

    def __init__(self, dim: int, site: str = _SITE) -> None:
        rng = np.random.default_rng(4)
        self.site, self.splits = site, {"train": replace(_items("train", ("paris", "osaka")), pairs=None)}
        n = len(self.splits["train"])
        self.thoughts = rng.standard_normal((n, 5, dim)).astype(np.float32)
        self.factors = rng.standard_normal((n, 3, dim)).astype(np.float32)

    def activations(self, split: str, contexts: str) -> np.ndarray:
        assert (split, contexts) == ("train", "fit")
        return self.thoughts

    def shift_factor(self, split: str, items: np.ndarray) -> np.ndarray:
        assert split == "train"
        return self.factors[items]


@pytest.mark.parametrize("name", ["lipschitz", "adversarially_trained", "causal"])
def test_a_defence_is_told_of_the_original_model(trainee: LoraTrainee, name: str) -> None:
    cells = trainee.activations(trainee.original[None], "train")
    testbed = _Thoughts(cells.shape[-1])
    told = _trainee(testbed=testbed)
    found = fit_cells(told, name, cells, 0)[0]
    labels = told.splits["train"].labels
    knows = {"prior": natural(testbed.thoughts), "behaviour": testbed.factors}
    expected = as_fitted(name, cells[0, 0], labels, seed=0, site=_SITE, **knows)  # type: ignore[arg-type]
    for key, value in expected.parameters.items():
        np.testing.assert_array_equal(found[0].parameters[key], value)


@pytest.mark.parametrize("site", [None, "layers.0"])
def test_a_defence_of_another_site_is_refused(trainee: LoraTrainee, site: str | None) -> None:
    cells = trainee.activations(trainee.original[None], "train")
    told = _trainee(testbed=None if site is None else _Thoughts(cells.shape[-1], site))
    assert site != _SITE
    with pytest.raises(ValueError, match=r"LoraTrainee\.of\(testbed\)"):
        fit_cells(told, "lipschitz", cells, 0)


def test_negations_stay_with_their_partners() -> None:
    train = Statements(site=_SITE, subject=_model()).splits["train"]
    items = limited(train, 8, negations=True)
    assert items.pairs is not None
    assert items.texts is not None
    assert len(items) == 16
    known = {(train.ids[a], train.ids[b]) for a, b in (train.pairs if train.pairs is not None else ())}
    assert {(items.ids[a], items.ids[b]) for a, b in items.pairs} <= known
    assert (items.labels[items.pairs[:, 0]] != items.labels[items.pairs[:, 1]]).all()


def test_ordinary_statements_are_of_other_relations() -> None:
    found = true_statements("city_country", 100, seed=0)
    assert len(set(found)) == 100
    own = facts.relation("city_country")
    said = {own.say(entity, value).text for entity, value in own.facts.items()}
    assert not said & set(found)
    assert said & set(true_statements(None, 100_000, seed=0))


@pytest.mark.parametrize(("probes", "wanted"), [(("lda", CCS()), True), (("ccs",), True), (("lda", "logistic"), False)])
def test_only_probes_that_need_pairs_get_negations(probes: tuple[Any, ...], wanted: bool) -> None:
    testbed = Statements(site=_SITE, subject=_model())
    trainee = as_trainee(testbed, Lora(), probes, epsilon=0.03, seed=0)
    assert (trainee.splits["train"].pairs is not None) == wanted
    assert trainee.splits["test"].pairs is None
