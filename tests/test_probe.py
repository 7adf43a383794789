"""Fitted probes: directions, saving and loading, and bad input that is refused with a way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import elk_stress
from elk_stress.core import registry
from elk_stress.core.registry import UnknownName
from elk_stress.probing.probe import FittedProbe, as_fitted, check_activations, check_training_data, direction
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


WEIGHTS = {
    "integers": (np.array([1, -2, 3]), np.float64),
    "booleans": (np.array([True, False, True]), np.float64),
    "a list": ([1.0, -2.0, 3], np.float64),
    "objects": (np.array([1, -2, 3.5], dtype=object), np.float64),
    "half": (np.array([1, -2, 3.5], dtype=np.float16), np.float32),
    "single": (np.array([1, -2, 3.5], dtype=np.float32), np.float32),
    "long": (np.array([1, -2, 3.5], dtype=np.longdouble), np.float64),
    "nothing masked": (np.ma.array([1.0, -2.0, 3.5]), np.float64),
}


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("bias", [-2.6, 1e5, np.float32(0.25), np.array([7]), 3])
def test_numbers_of_any_kind_make_a_direction_and_its_bias_keeps_its_digits(kind: str, bias: float) -> None:
    weight, dtype = WEIGHTS[kind]
    for probe in (direction(weight, bias), elk_stress.wrap((weight, bias))):
        assert probe.parameters["weight"].dtype == dtype
        assert type(probe.parameters["weight"]) is np.ndarray
        assert float(probe.parameters["bias"]) == float(np.ravel(bias)[0])
        rows = np.array([[1.0, 2.0, 0.5], [0.0, 0.0, 0.0]])
        expected = rows @ np.asarray(weight, dtype=float) + float(np.ravel(bias)[0])
        assert probe.score(rows).dtype == np.float64
        np.testing.assert_allclose(probe.score(rows), expected, rtol=1e-15)


def test_tensors_of_any_kind_make_a_direction() -> None:
    import jax.numpy as jnp
    import torch

    for weight in (
        torch.tensor([1.0, -2.0, 3.5], requires_grad=True),
        torch.tensor([1.0, -2.0, 3.5], dtype=torch.bfloat16, requires_grad=True),
        torch.tensor([1.0, -2.0, 3.5], dtype=torch.float16),
        jnp.asarray([1.0, -2.0, 3.5], dtype=jnp.bfloat16),
    ):
        probe = elk_stress.wrap((weight, torch.tensor(0.1)))
        assert probe.parameters["weight"].dtype == np.float32
        np.testing.assert_array_equal(probe.parameters["weight"], [1.0, -2.0, 3.5])
    np.testing.assert_array_equal(direction(torch.tensor([1, -2])).parameters["weight"], [1.0, -2.0])


@pytest.mark.parametrize(
    ("weight", "bias", "error", "words"),
    [
        (np.array([1 + 1j, 2]), 0.0, ValueError, "weight of a direction must be real, got complex128"),
        (np.ones(2), 1j, ValueError, "bias of a direction must be real"),
        (np.ma.array([1.0, 2.0], mask=[0, 1]), 0.0, ValueError, "masked values"),
        (np.array(["a", "b"]), 0.0, TypeError, "must be numbers"),
        (np.array([1.0, 1e39]), 0.0, ValueError, "beyond single precision"),
        ([], 0.0, ValueError, r"got shape \(0,\)"),
        (np.ones(2), np.nan, ValueError, "one finite number"),
        (np.ones(2), np.inf, ValueError, "one finite number"),
        (np.ones(2), 1e39, ValueError, "one finite number"),
        (np.ones(2), [1.0, 2.0], ValueError, "one finite number"),
        (np.ones(2), "one", TypeError, "bias of a direction must be numbers"),
    ],
)
def test_what_is_no_direction_is_refused_in_words(weight: Any, bias: Any, error: Any, words: str) -> None:
    for make in (direction, lambda w, b: elk_stress.wrap((w, b))):
        with pytest.raises(error, match=words):
            make(weight, bias)


def test_integer_and_half_precision_activations_are_scored_in_more_than_they_hold() -> None:
    import jax.numpy as jnp
    import torch

    probe = direction(np.array([0.5, -0.25, 2.0]), -1e5)
    whole = np.array([[1, 2, 3], [0, 0, 1]])
    np.testing.assert_array_equal(probe.score(whole), whole.astype(float) @ [0.5, -0.25, 2.0] - 1e5)
    np.testing.assert_array_equal(probe.score(whole > 1), [-1e5 + 1.75, -1e5])
    np.testing.assert_allclose(probe.score(torch.tensor(whole)).numpy(), probe.score(whole), rtol=1e-6)
    np.testing.assert_allclose(np.asarray(probe.score(jnp.asarray(whole))), probe.score(whole), rtol=1e-6)
    # the bias alone is beyond half precision, and the score is not
    large = np.array([[0.0, 0.0, 50016.0]])
    for rows in (large.astype(np.float16), torch.tensor(large, dtype=torch.float16), jnp.asarray(large, jnp.float16)):
        score = probe.score(rows)
        assert score.dtype == rows.dtype
        assert float(score[0]) == 2 * 50016.0 - 1e5


@pytest.mark.parametrize(
    ("rows", "error", "words"),
    [
        (np.ones((2, 3), dtype=complex), ValueError, "real numbers, got complex128"),
        (np.ma.array(np.ones((2, 3)), mask=np.eye(2, 3)), ValueError, "masked values"),
        ([[1.0, 2.0, 3.0]], TypeError, "got list"),
        (np.float64(3.0), ValueError, "no axis of features"),
    ],
)
def test_what_are_no_activations_is_refused_by_score(rows: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        direction(np.ones(3)).score(rows)
