"""Arrays, labels, groups and settings from outside: the same answer whoever brings them, or words that help."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import elk_stress
from elk_stress import cli
from elk_stress.core.inputs import as_activations, as_groups, as_labels, as_numbers, check_activations
from elk_stress.core.settings import SETTINGS, option, setting, settings
from elk_stress.probing.origin import moved
from elk_stress.probing.probe import FittedProbe
from elk_stress.runs.stress import run
from elk_stress.testbeds.arrays import Arrays
from elk_stress.thoughts.engine import stress_activations
from elk_stress.thoughts.prepared import fit_probe, prepare
from elk_stress.threats.priors import EllipticalPrior
from elk_stress.threats.threat import Threat, parse_threat

ITEM = "item/natural/gaussian"
D = 8


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed))


X = np.round(rng(1).standard_normal((200, D)), 1).astype(np.float16).astype(np.float64)
LABELS = np.arange(200) % 2
X[:, 0] += 3.0 * LABELS
X = X.astype(np.float16).astype(np.float64)
WEIGHT = np.eye(D)[0]


def quick(probe: Any = WEIGHT, activations: Any = X, labels: Any = LABELS, **options: Any) -> elk_stress.StressResult:
    return stress_activations(probe, activations, labels, **{"attacks": (), "controls": False, **options})


def headline(result: elk_stress.StressResult) -> float:
    (row,) = result.threats.values()
    return row.headline.value


def mapped(array: np.ndarray, folder: Path) -> np.ndarray:
    np.save(folder / "x.npy", array)
    return np.load(folder / "x.npy", mmap_mode="r")


def read_only(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array


ARRAYS: dict[str, Callable[[np.ndarray], Any]] = {
    "lists": lambda x: x.tolist(),
    "float16": lambda x: x.astype(np.float16),
    "big-endian": lambda x: x.astype(">f8"),
    "read-only": read_only,
    "every second column": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "fortran order": np.asfortranarray,
    "objects": lambda x: x.astype(object),
    "matrix without masked entries": np.ma.masked_invalid,
    "torch": torch.tensor,
    "torch with a gradient": lambda x: torch.tensor(x, requires_grad=True),
    "jax": jnp.asarray,
}


@pytest.fixture(scope="module")
def bits() -> float:
    return headline(quick())


@pytest.mark.parametrize("kind", ARRAYS)
def test_every_library_s_array_gives_the_same_bits(kind: str, bits: float) -> None:
    assert headline(quick(activations=ARRAYS[kind](X))) == pytest.approx(bits, rel=1e-6)


def test_types_that_numpy_does_not_have_are_read_as_float32() -> None:
    exact = np.round(X * 4) / 4
    for array in (torch.tensor(exact).bfloat16(), jnp.asarray(exact, dtype=jnp.bfloat16)):
        np.testing.assert_array_equal(as_activations(array), exact.astype(np.float32))


def test_frames_and_series_of_pandas_are_arrays(bits: float) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(X)
    assert headline(quick(activations=frame, labels=pandas.Series(LABELS == 1))) == pytest.approx(bits, rel=1e-6)


def test_a_memory_map_is_never_copied_whole(tmp_path: Path) -> None:
    testbed = Arrays(mapped(X, tmp_path), LABELS)
    assert isinstance(testbed.data.base, np.memmap)


LABELLED: dict[str, tuple[Any, dict[str, Any]]] = {
    "truth values": (LABELS == 1, {}),
    "floats": (LABELS.astype(float), {}),
    "one column": (LABELS[:, None], {}),
    "torch": (torch.tensor(LABELS), {}),
    "names": (np.where(LABELS, "lie", "truth"), {"positive": "lie"}),
    "-1 and 1": (2 * LABELS - 1, {"positive": 1}),
    "-1 and 1, said on a command line": (2 * LABELS - 1, {"positive": "1"}),
    "0 positive": (1 - LABELS, {"positive": 0}),
    "false positive": (LABELS == 0, {"positive": "false"}),
    "bytes": (np.where(LABELS, b"lie", b"truth"), {"positive": "lie"}),
}


@pytest.mark.parametrize("kind", LABELLED)
def test_labels_of_two_values_say_which_is_positive(kind: str) -> None:
    given, options = LABELLED[kind]
    np.testing.assert_array_equal(as_labels(given, 200, **options), LABELS)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({"activations": None}, r"are an array, e\.g\. of numpy.* got None"),
    "text": ({"activations": X.astype(str)}, "activations are text; expected an array of numbers"),
    "objects": ({"activations": np.where(X > 9, X, "a").astype(object)}, r"Python objects \(str\); expected numbers"),
    "missing": ({"activations": np.where(X > 3, None, X)}, r"missing in \d+ of 1600 places"),
    "ragged": ({"activations": [[1.0], [1.0, 2.0]]}, "every row has the same length"),
    "complex": ({"activations": X + 0j}, "imaginary part would be lost"),
    "masked": ({"activations": np.ma.masked_less(X, 0)}, r"masked array with \d+ masked entries.*filled"),
    "one axis": ({"activations": X[:, 0]}, r"expected activations \(n, d\).*got shape \(200,\)"),
    "no rows": ({"activations": X[:0], "labels": LABELS[:0]}, r"empty: shape \(0, 8\)"),
    "no features": ({"activations": X[:, :0]}, r"empty: shape \(200, 0\)"),
    "NaN": ({"activations": np.where(X[7, 3] == X, np.nan, X)}, r"NaN or inf in \d+ of 200 rows"),
    "beyond float32": ({"activations": X * 1e39}, "float32 ends"),
    "too small for float32": ({"activations": X * 1e-30}, "takes for 0; multiply all"),
    "constant": ({"activations": np.ones((200, D))}, "constant over all 200 rows"),
    "dates": ({"activations": X.astype("datetime64[s]")}, "of type datetime64"),
    "four items": ({"activations": X[:4], "labels": LABELS[:4]}, "4 items are too few .* 20 calibration negatives"),
    "labels of another length": ({"labels": LABELS[:199]}, r"200 rows of activations and labels of shape \(199,\)"),
    "labels in a row": ({"labels": LABELS[None]}, r"labels of shape \(1, 200\)"),
    "NaN labels": ({"labels": np.where(LABELS, 1, np.nan)}, "labels hold NaN or inf in 100 of 200 places; drop"),
    "one class": ({"labels": np.ones(200)}, r"one class only \(1\.0\)"),
    "three classes": ({"labels": np.arange(200) % 3}, r"got 0, 1, 2; pass labels == the positive one"),
    "-1 and 1": ({"labels": 2 * LABELS - 1}, r"got -1, 1; pass positive=1 \(--positive 1\) or labels == 1"),
    "names": ({"labels": np.where(LABELS, "lie", "truth")}, r"'lie', 'truth'\); say which is positive: positive="),
    "no such label": ({"labels": LABELS == 1, "positive": "lie"}, "no label is 'lie'.*there are: False, True"),
    "masked labels": ({"labels": np.ma.masked_equal(LABELS, 1)}, "masked array with 100 masked"),
    "groups of another length": ({"groups": np.arange(50)}, r"200 rows of activations and groups of shape \(50,\)"),
    "NaN groups": ({"groups": np.where(LABELS, np.nan, 1.0)}, "100 of 200 places; give each .* a group of its own"),
    "missing groups": ({"groups": np.where(LABELS, None, "a")}, "groups are missing in 100 of 200"),
    "mixed groups": ({"groups": [1] * 100 + ["1"] * 100}, r"Python objects \(int, str\)"),
    "one group": ({"groups": np.zeros(200)}, "too few to deal out: 1 groups hold positives and 1 negatives"),
    "contexts held back": ({"observed_contexts": 1}, "observed_contexts=1 of 1 contexts leaves none"),
    "a prior of another width": (
        {"prior": EllipticalPrior(np.eye(5))},
        r"moves 5 features but arrays gives 8 at given",
    ),
    "a matrix as prior": ({"prior": np.eye(D)}, "EllipticalPrior, made of a factor"),
    "behaviour alone": ({"threats": f"{ITEM}/kept"}, f"arrays have no output .* measure {ITEM} instead"),
    "no threats": ({"threats": []}, "at least one is needed"),
    "a threat twice": ({"threats": [ITEM, Threat()]}, "once each"),
    "no threat": ({"threats": [3]}, "each a name or a Threat, got 3"),
    "an attack twice": ({"attacks": ["gradient", "gradient"]}, "attacks must be named once each"),
    "no attack": ({"attacks": [None]}, "attacks are each a name or"),
    "half an attack": (
        {"attacks": [SimpleNamespace(name="half", scopes=("item",))]},
        "'half' is no attack: it has no propose",
    ),
    "a class": ({"probe": FittedProbe}, "got the class FittedProbe"),
    "a probe of another width": ({"probe": np.ones(3)}, "fitted on 3 features"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_bad_input_is_refused_with_what_came_and_the_way_out(kind: str) -> None:
    given, message = REFUSED[kind]
    with pytest.raises((ValueError, TypeError), match=message):
        quick(**given)


def test_items_of_a_named_group_stay_together() -> None:
    names = np.repeat([f"entity {i}" for i in range(50)], 4)
    testbed = Arrays(X, LABELS, names)
    groups = [set(items.groups.tolist()) for items in testbed.splits.values()]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 50
    np.testing.assert_array_equal(as_groups(names.astype(object), 200), names)
    np.testing.assert_array_equal(as_groups(names[:, None], 200), names)


def test_a_mixed_list_of_threats_is_measured_as_far_as_it_goes() -> None:
    result = quick(threats=[ITEM, f"{ITEM}/kept"])
    assert list(result.threats) == [ITEM]
    assert "no output" in result.skipped[f"{ITEM}/kept"]


# -- settings ---------------------------------------------------------------------------------------------------------

HOSTILE = (
    None,
    True,
    "1",
    "",
    b"1",
    [],
    {},
    object(),
    1j,
    math.nan,
    math.inf,
    -math.inf,
    -1,
    10**400,
    np.nan,
    np.ones(2),
)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_is_a_number_of_its_domain_and_nothing_else(name: str) -> None:
    for value in HOSTILE:
        with pytest.raises(ValueError, match=rf"^{name} is {SETTINGS[name].what[:20]}.*, got "):
            setting(name, value)
    assert setting(name, None, optional=True) is None
    domain = SETTINGS[name]
    if domain.whole:
        for good in (domain.least, np.int64(domain.least), np.uint8(1), torch.tensor(1), jnp.asarray(1), domain.most):
            assert type(setting(name, good)) is int
            assert setting(name, good) == int(good)
        for bad in (domain.most + 1, 1.0, 1.5, np.float64(1)):
            with pytest.raises(ValueError, match=f"^{name} is a whole number"):
                setting(name, bad)
    else:
        half = [0.5, np.float32(0.5), np.array(0.5), Fraction(1, 2), torch.tensor(0.5)]
        assert [setting(name, value) for value in half] == [0.5] * 5
    # the command line says the same in the same words
    parse = option(name)
    assert parse("0.5" if not domain.whole else "1") in (0.5, 1)
    for text in ("", "x", "nan", "-1", "inf", "\u00b2", "1" * 5000):
        with pytest.raises(Exception, match=f"^expected {domain.what[:20]}") as refused:
            parse(text)
        assert len(str(refused.value)) < 200


@pytest.mark.parametrize(
    "given", [{"out": 3}, {"out": None}, {"probes": []}, {"probes": [3]}, {"fresh": "no"}], ids=str
)
def test_a_run_refuses_before_any_work_and_leaves_no_folder(given: dict[str, Any], tmp_path: Path) -> None:
    options: dict[str, Any] = {"probes": ["lda"], "out": tmp_path / "out", "attacks": (), **given}
    with pytest.raises((ValueError, TypeError), match=f"^{next(iter(given))} "):
        run(Arrays(X, LABELS), **options)
    assert list(tmp_path.iterdir()) == []


def test_several_numbers_are_checked_each() -> None:
    assert settings("shares", np.array([1, 2, 3]), n=3) == (1.0, 2.0, 3.0)
    for bad in ((1, 2), (1, 2, 0), "123", 5, (1, 2, math.nan), None):
        with pytest.raises(ValueError, match=r"^shares "):
            settings("shares", bad, n=3)


@pytest.mark.parametrize(
    "given",
    [
        {"seed": True}, {"seed": -1}, {"seed": 1.5}, {"seed": 2**64}, {"max_bits": math.nan}, {"max_bits": 0},
        {"fpr": 0}, {"fpr": 1}, {"fpr": "0.1"}, {"n_particles": 0}, {"n_particles": 10**12}, {"budget": 0},
        {"behaviour_epsilon": -1.0}, {"observed_contexts": -1}, {"observed_contexts": 0.5}, {"controls": 1},
        {"controls": np.ones(2)},
    ],
    ids=str,
)  # fmt: skip
def test_the_stress_test_refuses_a_setting_before_any_work(given: dict[str, Any]) -> None:
    (name,) = given
    with pytest.raises((ValueError, TypeError), match=f"^{name} is .* got "):
        quick(**given)


def test_numbers_of_numpy_are_settings(bits: float) -> None:
    given = {"seed": np.int64(0), "fpr": np.float32(0.05), "max_bits": np.array(100), "n_particles": np.int32(1000)}
    assert headline(quick(**given)) == pytest.approx(bits)


@pytest.mark.parametrize("name", ["item/isotropicx/gaussian", "item/isotropic-1/gaussian", "item/isotropicnan/best"])
def test_the_size_in_a_threat_s_name_is_a_setting_too(name: str) -> None:
    with pytest.raises(ValueError, match=r"size of an isotropic prior is a positive"):
        parse_threat(name)


@pytest.mark.parametrize("field", ["c", "epsilon"])
@pytest.mark.parametrize("value", [math.nan, math.inf, 0, -1, "1", True])
def test_a_threat_s_numbers_are_positive_and_finite(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field} is a positive number"):
        Threat(**{field: value})


def test_more_draws_than_memory_holds_are_refused_with_the_limit() -> None:
    with pytest.raises(ValueError, match=r"n_particles is at most 536,870 where the function reads 1000 coordinates"):
        elk_stress.estimate_bits(lambda u: 3 - u[:, 0], 1000, n_particles=10**8)


# -- an offset changes no score, so no bits ---------------------------------------------------------------------------


def under_contexts(offset: float) -> tuple[np.ndarray, np.ndarray]:
    draws = rng(2)
    x = draws.standard_normal((300, 1, D)) * 0.5 + 3.0 * (np.arange(300) % 2)[:, None, None] * np.eye(D)[0]
    x = x + 0.3 * draws.standard_normal((1, 12, D)) + 0.4 * draws.standard_normal((300, 12, D))
    return x + offset * np.arange(1, D + 1), np.arange(300) % 2


def bits_at(offset: float, probe: Any) -> float:
    return headline(quick(probe, *under_contexts(offset), threats=[ITEM], n_particles=64, max_bits=30))


@pytest.mark.parametrize("offset", [30.0, 1e6])
def test_an_offset_of_all_activations_changes_no_bits_of_a_direction(offset: float) -> None:
    weight = WEIGHT + 0.1 * rng(3).standard_normal(D)
    expected = bits_at(0.0, elk_stress.direction(weight))
    shifted = elk_stress.direction(weight, -offset * float(weight @ np.arange(1, D + 1)))
    assert bits_at(offset, shifted) == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("probe", ["lda", "mass_mean"])
def test_an_offset_changes_no_bits_of_a_probe_that_is_fitted_there(probe: str) -> None:
    assert bits_at(1e6, probe) == pytest.approx(bits_at(0.0, probe), rel=2e-6)


def test_a_given_probe_scores_the_original_activations() -> None:
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    x, labels = under_contexts(1e6)
    machine = make_pipeline(StandardScaler(), SVC(gamma=0.1)).fit(x.reshape(-1, D), np.repeat(labels, 12))
    testbed = Arrays(x, labels)
    assert testbed.origin is not None
    np.testing.assert_allclose(testbed.origin, 1e6 * np.arange(1, D + 1), atol=5)
    prepared = prepare(testbed)
    scores = np.asarray(fit_probe(prepared, elk_stress.wrap(machine, dim=D)).score(prepared.test), dtype=float)
    expected = machine.decision_function(x[[int(i) for i in prepared.items.ids], 3:].reshape(-1, D))
    np.testing.assert_allclose(scores.ravel(), expected, atol=1e-5)


def test_a_network_s_first_layer_takes_the_offset_in() -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(D, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1)).double()
    origin = 1e6 * np.arange(1, D + 1)
    with torch.no_grad():
        network[0].bias -= network[0].weight @ torch.tensor(origin)
    x = rng(4).standard_normal((50, D))
    expected = network(torch.tensor(x + origin)).detach().numpy()[:, 0]
    probe = moved(elk_stress.wrap(network, dim=D), origin)
    for rows in (x.astype(np.float32), torch.tensor(x).float(), jnp.asarray(x, dtype=jnp.float32)):
        np.testing.assert_allclose(np.asarray(probe.score(rows)), expected, atol=1e-5)


def test_activations_near_0_are_taken_as_they_are() -> None:
    testbed = Arrays(*under_contexts(0.0))
    assert testbed.origin is None
    rows = [int(i) for i in testbed.splits["test"].ids]
    np.testing.assert_array_equal(testbed.activations("test")[:, 0], testbed.data[rows, 3].astype(np.float32))


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", X)
    np.save("y.npy", LABELS)
    return tmp_path


def run_files(*more: str) -> int:
    command = "run --activations x.npy --labels y.npy --probes mass_mean --attacks none --no-progress --out out"
    return cli.main([*command.split(), *more])


@pytest.mark.parametrize(
    ("what", "array", "more", "message"),
    [
        ("x", np.where(X > 5, np.inf, X), [], "NaN or inf in"),
        ("x", X * 1e39, [], "float32 ends"),
        ("x", X + 0j, [], "imaginary part would be lost"),
        ("x", X[:, :0], [], "are empty: shape (200, 0)"),
        ("y", LABELS[:50], [], "labels of shape (50,)"),
        ("y", np.where(LABELS, np.nan, 0), [], "labels hold NaN"),
        ("y", np.where(LABELS, "lie", "truth"), [], "say which is positive: positive=... (--positive"),
        ("y", np.where(LABELS, "lie", "truth"), ["--positive", "fib"], "no label is 'fib'"),
        ("g", np.arange(20), ["--groups", "g.npy"], "groups of shape (20,)"),
        ("g", np.full(200, np.nan), ["--groups", "g.npy"], "groups hold NaN"),
        ("x", X, ["--threats", f"{ITEM}/kept"], "arrays have no output"),
    ],
)
def test_files_get_the_same_check_and_the_same_words(
    what: str, array: np.ndarray, more: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(f"{what}.npy", array)
    assert run_files(*more) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_labels_of_text_by_file(folder: Path) -> None:
    np.save("y.npy", np.where(LABELS, "lie", "truth"))
    np.save("g.npy", np.array([f"group {i}" for i in range(200)]))
    assert run_files("--positive", "lie", "--groups", "g.npy") == 0


def test_a_wrong_sign_is_named_in_place_of_the_probe() -> None:
    names = [f.name for _, f in quick(-WEIGHT).all_flags]
    assert "flipped" in names
    assert "catches_nothing" not in names
    assert "flipped" not in [f.name for _, f in quick(WEIGHT).all_flags]


def test_the_check_reads_in_chunks_and_finds_the_last_row(tmp_path: Path) -> None:
    wide = np.zeros((3000, 1000), dtype=np.float32)
    wide[::7] = 1
    check_activations(mapped(wide, tmp_path))
    wide[-1, -1] = np.inf
    with pytest.raises(ValueError, match="NaN or inf in 1 of 3000 rows"):
        check_activations(mapped(wide, tmp_path))


@pytest.mark.parametrize("n", [12, 17, 40])
def test_a_wrong_sign_shows_on_few_items(n: int) -> None:
    from elk_stress.thoughts.baseline import _flipped

    rng = np.random.default_rng(n)
    labels = np.repeat([0, 1], n)
    scores = 4.0 * labels + 0.5 * rng.standard_normal(2 * n)
    assert [f.name for f in _flipped(-scores, labels)] == ["flipped"]
    assert not _flipped(scores, labels)
    # a score without information says nothing of its sign
    assert not any(_flipped(rng.standard_normal(2 * n), labels) for _ in range(200))


def test_a_list_of_masked_rows_keeps_its_mask() -> None:
    rows = [np.ma.array([1.0, 2.0], mask=[i == 3, False]) for i in range(9)]
    with pytest.raises(ValueError, match="1 masked entries"):
        as_numbers(rows, "activations")
    assert as_numbers([row.data for row in rows], "activations").shape == (9, 2)


def test_a_missing_group_among_names_is_told_its_way_out() -> None:
    with pytest.raises(ValueError, match="missing in 1 of 3 places; give each of them a group"):
        as_groups(np.array(["a", np.nan, "b"], dtype=object), 3)
