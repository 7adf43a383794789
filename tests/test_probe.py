"""Fitted probes: directions, saving and loading, and bad input that is refused with a way out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from elk_stress import registry
from elk_stress.probe import FittedProbe, as_fitted, check_activations, check_training_data, direction
from elk_stress.registry import UnknownName
from elk_stress.testing import planted_classes

FINITE = st.floats(-1e3, 1e3, width=32)


def test_direction_scores_by_its_formula() -> None:
    probe = direction(np.array([1.0, -2.0]), bias=0.5)
    np.testing.assert_array_equal(probe.score(np.array([[1.0, 1.0], [0.0, 3.0]])), [-0.5, -5.5])
    assert probe.dim == 2
    assert probe.traits.linear
    assert not probe.traits.learns
    assert probe.name == "direction"


@pytest.mark.parametrize("weight", [np.ones((2, 2)), np.array([1.0, np.nan]), np.array([np.inf]), np.float64(1.0)])
def test_direction_refuses_what_is_no_vector(weight: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"finite vector of shape \(d,\)"):
        direction(weight)


def test_width_mismatch_names_both_widths_and_the_site() -> None:
    with pytest.raises(ValueError, match=r"have 384 features .* fitted on 576 \(site layers\.18\); read them at that"):
        direction(np.ones(576), site="layers.18").score(np.zeros((3, 384)))


@settings(deadline=None, max_examples=30)
@given(arrays.arrays(np.float32, (5,), elements=FINITE), FINITE, arrays.arrays(np.float32, (3, 5), elements=FINITE))
def test_save_and_load_is_the_identity(
    tmp_path_factory: pytest.TempPathFactory, weight: np.ndarray, bias: float, activations: np.ndarray
) -> None:
    folder = tmp_path_factory.mktemp("probe")
    probe = direction(weight, bias, site="layers.3", notes={"found": "by hand"})
    loaded = FittedProbe.load(probe.save(folder))
    assert np.array_equal(loaded.score(activations), probe.score(activations))
    assert (loaded.site, loaded.notes, loaded.name) == ("layers.3", {"found": "by hand"}, "direction")
    for name, value in probe.parameters.items():
        assert loaded.parameters[name].dtype == value.dtype
        assert loaded.parameters[name].shape == value.shape
        assert np.array_equal(loaded.parameters[name], value)


def test_scores_do_not_depend_on_how_a_fit_laid_its_arrays_out() -> None:
    square = np.random.default_rng(np.random.SeedSequence(3)).standard_normal((6, 6))
    given = {"weight": square.T[:, [1, 4]], "offset": square[:, 2], "bias": np.asarray(0.5)}
    assert not given["weight"].flags.c_contiguous
    assert not given["offset"].flags.c_contiguous
    kept = FittedProbe(registry.load("probes", "attention_pool"), given).parameters
    for name, value in given.items():
        assert kept[name].flags.c_contiguous
        assert kept[name].shape == value.shape
        np.testing.assert_array_equal(kept[name], value)


def test_saving_keeps_the_recipe(tmp_path: Path) -> None:
    data = planted_classes()
    probe = as_fitted(registry.load("probes", "logistic", l2=0.3), data.activations, data.labels, site="here")
    loaded = FittedProbe.load(probe.save(tmp_path / "made" / "on" / "demand"))
    assert loaded.probe == registry.load("probes", "logistic", l2=0.3)
    assert loaded.site == "here"
    assert sorted(p.name for p in (tmp_path / "made" / "on" / "demand").iterdir()) == [
        "probe.json",
        "probe.safetensors",
    ]


def test_loading_what_is_not_there_or_not_installed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no probe\.json"):
        FittedProbe.load(tmp_path)
    folder = direction(np.ones(2), name="mine").save(tmp_path)
    assert FittedProbe.load(folder).name == "mine"
    record = json.loads((folder / "probe.json").read_text())
    (folder / "probe.json").write_text(json.dumps(record | {"name": "somebody_elses"}))
    with pytest.raises(UnknownName, match="somebody_elses"):
        FittedProbe.load(folder)


def test_fitted_probes_are_frozen() -> None:
    probe = direction(np.ones(2))
    with pytest.raises(AttributeError):
        probe.site = "elsewhere"  # type: ignore[misc]


def test_as_fitted_takes_each_kind() -> None:
    data = planted_classes()
    fitted = direction(np.ones(16))
    assert as_fitted(fitted) is fitted
    np.testing.assert_array_equal(as_fitted(np.arange(3.0), site="s").parameters["weight"], np.arange(3.0))
    assert as_fitted(np.arange(3.0), site="s").site == "s"
    by_name = as_fitted("mass_mean", data.activations, data.labels, site="s")
    by_recipe = as_fitted(registry.load("probes", "mass_mean"), data.activations, data.labels)
    np.testing.assert_array_equal(by_name.parameters["weight"], by_recipe.parameters["weight"])
    assert by_name.site == "s"


def test_as_fitted_refuses_the_rest() -> None:
    with pytest.raises(TypeError, match="pass training activations and labels"):
        as_fitted("logistic")
    with pytest.raises(TypeError, match="got int"):
        as_fitted(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="already fitted"):
        direction(np.ones(2)).probe.fit(np.zeros((2, 2)), np.array([0, 1]))


BAD = {
    "nan": (np.array([[1.0, np.nan], [0.0, 1.0]]), [0, 1], "NaN or inf in 1 of 2 rows"),
    "inf": (np.array([[1.0, np.inf], [-np.inf, 1.0]]), [0, 1], "NaN or inf in 2 of 2 rows"),
    "constant": (np.ones((2, 2)), [0, 1], "constant over all 2 rows"),
    "lengths": (np.eye(2), [0, 1, 1], r"got \(2, 2\) and \(3,\)"),
    "axes": (np.zeros((2, 2, 2)), [0, 1], r"expected activations \(n, d\)"),
    "labels": (np.eye(2), [-1, 1], "labels must be 0 or 1"),
    "one class": (np.eye(2), [1, 1], "one class only"),
}


@pytest.mark.parametrize(("activations", "labels", "message"), BAD.values(), ids=BAD)
def test_bad_training_data_is_refused(activations: np.ndarray, labels: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_training_data(activations, np.array(labels))


def test_one_row_alone_is_not_called_constant() -> None:
    check_activations(np.ones((1, 4)))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_torch_scores_keep_dtype_and_graph(dtype: str) -> None:
    import torch

    rows = torch.ones((2, 3), dtype=getattr(torch, dtype), requires_grad=True)
    scores = direction(np.array([1.0, 2.0, 3.0])).score(rows)
    assert scores.dtype == rows.dtype
    (slope,) = torch.autograd.grad(scores.sum(), rows)
    assert slope.tolist() == [[1.0, 2.0, 3.0]] * 2
