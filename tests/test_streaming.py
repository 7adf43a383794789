"""Streaming fits: the same probe as in memory however the rows come; files are removed; bad batches change nothing."""

from __future__ import annotations

import gc
import itertools
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elk_stress.core import registry
from elk_stress.probing.fit.moments import Moments
from elk_stress.probing.fit.streaming import Fitter, Rows, fit_streaming

NAMES = [name for name in registry.names("probes") if registry.load("probes", name).traits.streams]


def planted(n: int = 900, dim: int = 12, *, seed: int = 0, offset: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping classes of unequal size, correlated features of unequal scale, far from the origin."""
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    labels = (np.arange(n) % 3 == 0).astype(int)
    mix = rng.standard_normal((dim, dim)) * np.exp(rng.standard_normal(dim))
    return (rng.standard_normal((n, dim)) + 0.4 * labels[:, None]) @ mix + offset, labels


def cut(activations: np.ndarray, labels: np.ndarray, sizes: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    ends = np.minimum(np.cumsum([0, *sizes, len(labels)]), len(labels)).tolist()
    return [(activations[a:b], labels[a:b]) for a, b in itertools.pairwise(ends)]


def same(first: Any, second: Any, activations: np.ndarray, tolerance: float = 1e-9) -> None:
    there, here = first.score(activations), second.score(activations)
    assert np.abs(there - here).max() <= tolerance * np.abs(here).max()


def test_the_four_stream() -> None:
    assert {"mass_mean", "lda", "mahalanobis", "logistic"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=10, derandomize=True)
@given(sizes=st.lists(st.integers(0, 400), max_size=6), by_label=st.booleans())
def test_batches_of_any_size_and_order_give_the_probe_of_all_rows(name: str, sizes: list[int], by_label: bool) -> None:
    activations, labels = planted()
    if by_label:
        order = np.argsort(labels, kind="stable")
        activations, labels = activations[order], labels[order]
    whole = registry.load("probes", name).fit(activations, labels)
    streamed = fit_streaming(name, cut(activations, labels, sizes), site="here")
    same(streamed, whole, activations)
    assert streamed.site == "here"
    assert set(streamed.notes) == set(whole.notes)


@pytest.mark.parametrize("name", NAMES)
def test_one_row_at_a_time_and_a_large_offset(name: str) -> None:
    # sums of squares would lose (1e6)^2 * 1e-16 = 1e-4 of a unit variance here
    activations, labels = planted(200, 3, offset=1e6)
    whole = registry.load("probes", name).fit(activations - 1e6, labels)
    streamed = fit_streaming(name, cut(activations, labels, [1] * 200))
    there, here = streamed.score(activations), whole.score(activations - 1e6)
    assert np.abs(there - here).max() < 1e-6 * np.abs(here).max()


@pytest.mark.parametrize("name", NAMES)
def test_fewer_rows_than_features(name: str) -> None:
    activations, labels = planted(40, 60)
    same(
        fit_streaming(name, cut(activations, labels, [7, 7])),
        registry.load("probes", name).fit(activations, labels),
        activations,
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_fitter_goes_on_after_a_fit(name: str) -> None:
    activations, labels = planted()
    recipe = registry.load("probes", name)
    fitter = recipe.fitter()
    fitter.update(activations[:300], labels[:300])
    same(fitter.fit(), recipe.fit(activations[:300], labels[:300]), activations)
    fitter.update(activations[300:], labels[300:])
    same(fitter.fit(), recipe.fit(activations, labels), activations)
    fitter.close()


@pytest.mark.parametrize("name", NAMES)
def test_a_reused_buffer_is_not_remembered(name: str) -> None:
    activations, labels = planted()
    buffer, marks = np.empty((100, 12)), np.empty(100, dtype=int)

    def refilled() -> Any:
        for start in range(0, 900, 100):
            buffer[:], marks[:] = activations[start : start + 100], labels[start : start + 100]
            yield buffer, marks

    same(fit_streaming(name, refilled()), registry.load("probes", name).fit(activations, labels), activations)


@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("float16", "float64"), ("float32", "float16")])
def test_rows_come_back_as_they_went_in(dtypes: tuple[str, str], tmp_path: Path) -> None:
    activations, labels = planted(50, 5)
    rows = Rows(folder=tmp_path)
    parts = [(activations[:30].astype(dtypes[0]), labels[:30]), (activations[30:].astype(dtypes[1]), labels[30:])]
    for part in parts:
        rows.append(*part)
    read = list(rows.chunks())
    np.testing.assert_array_equal(np.concatenate([r for r, _ in read]), np.concatenate([p for p, _ in parts]))
    np.testing.assert_array_equal(np.concatenate([m for _, m in read]), labels)
    rows.close()


def test_a_read_only_memory_map_is_borrowed_and_any_other_copied(tmp_path: Path) -> None:
    activations, labels = planted(2000, 16)
    np.save(tmp_path / "a.npy", activations)
    held = np.load(tmp_path / "a.npy", mmap_mode="r")
    changing = np.load(tmp_path / "a.npy", mmap_mode="c")
    recipe = registry.load("probes", "logistic")
    whole = recipe.fit(activations, labels)
    for source, most in ((held, 10_000), (changing, 10**9)):
        fitter = recipe.fitter(tmp_path)
        before = _open_bytes(tmp_path)
        for start in range(0, 2000, 500):
            fitter.update(source[start : start + 500], labels[start : start + 500])
        assert _open_bytes(tmp_path) - before <= most
        if source is changing:
            assert _open_bytes(tmp_path) - before >= activations.nbytes
            changing[:] = 0
        same(fitter.fit(), whole, activations)
        fitter.close()


def _open_bytes(folder: Path) -> int:
    """Bytes of open files in a folder, the nameless ones too."""
    total = 0
    for link in Path("/proc/self/fd").iterdir():
        try:
            if str(folder) in os.readlink(link):
                total += link.stat().st_size
        except FileNotFoundError:
            continue
    return total


def test_files_go_whatever_happens(tmp_path: Path) -> None:
    activations, labels = planted()

    def source() -> Any:
        yield activations, labels
        raise OSError("the disk has gone")

    recipe = registry.load("probes", "logistic")

    class Here:
        name, traits = recipe.name, recipe.traits

        def fitter(self) -> Fitter:
            return recipe.fitter(tmp_path)

    with pytest.raises(OSError, match="the disk has gone"):
        fit_streaming(Here(), source())  # type: ignore[arg-type]
    # and when nobody says close
    fitter = recipe.fitter(tmp_path)
    fitter.update(activations, labels)
    assert _open_bytes(tmp_path) >= activations.nbytes
    del fitter
    gc.collect()
    assert _open_bytes(tmp_path) == 0
    assert list(tmp_path.iterdir()) == []


BAD = {
    "nan": (np.array([[np.nan, 1.0]]), [1], "NaN or inf in 1 of 1 rows"),
    "width": (np.ones((2, 3)), [0, 1], "has 3 features but earlier ones had 2"),
    "axes": (np.ones((2, 2, 2)), [0, 1], r"expected activations \(n, d\)"),
    "lengths": (np.ones((2, 2)), [0], r"expected activations \(n, d\) and labels \(n,\), got"),
    "labels": (np.ones((2, 2)), [0, 2], "labels must be 0 or 1"),
    "complex": (np.ones((2, 2)) + 1j, [0, 1], "imaginary part would be lost"),
    "masked": (np.ma.masked_equal(np.eye(2), 0), [0, 1], "2 masked entries"),
}


@pytest.mark.parametrize(("activations", "labels", "message"), BAD.values(), ids=BAD)
def test_a_bad_batch_is_refused_and_leaves_no_trace(activations: np.ndarray, labels: list[int], message: str) -> None:
    good, marks = planted(30, 2)
    for name in NAMES:
        fitter = registry.load("probes", name).fitter()
        fitter.update(good, marks)
        with pytest.raises(ValueError, match=message):
            fitter.update(activations, np.array(labels))
        same(fitter.fit(), registry.load("probes", name).fit(good, marks), good, 1e-12)
        fitter.close()


@pytest.mark.parametrize("name", NAMES)
def test_what_no_probe_can_be_fitted_on(name: str) -> None:
    with pytest.raises(ValueError, match="no rows came"):
        fit_streaming(name, [])
    with pytest.raises(ValueError, match=r"one class only \(\{1\}\)|needs at least 2 of them, got 0"):
        fit_streaming(name, [(np.eye(3), np.ones(3))])
    with pytest.raises(ValueError, match=r"constant over all 4 rows|do not differ"):
        fit_streaming(name, [(np.ones((2, 3)), np.array([0, 1]))] * 2)


def test_a_probe_that_does_not_stream_is_refused_with_those_that_do() -> None:
    with pytest.raises(TypeError, match=r"'ccs' cannot be fitted batch by batch; those that can: .*lda"):
        fit_streaming("ccs", [])


# -- the algebra -------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.integers(0, 20), st.integers(0, 20), st.integers(1, 4))
def test_merged_moments_are_those_of_all_rows(seed: int, left: int, right: int, dim: int) -> None:
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    a, b = rng.standard_normal((left, dim)) - 2, rng.standard_exponential((right, dim)) * 3 + 5
    both = np.concatenate([a, b])
    merged, whole = Moments.of(a, "scatter").merged(Moments.of(b, "scatter")), Moments.of(both, "scatter")
    assert merged.count == left + right
    for name in ("mean", "square"):
        np.testing.assert_allclose(getattr(merged, name), getattr(whole, name), rtol=1e-9, atol=1e-8)
    spread = Moments.of(a, "spread").merged(Moments.of(b, "spread"))
    np.testing.assert_allclose(spread.square, np.diag(merged.square), atol=1e-9)
    np.testing.assert_allclose(Moments.of(a, "mean").merged(Moments.of(b, "mean")).mean, merged.mean, atol=1e-12)


@pytest.mark.parametrize("shape", [(3000, 40), (60, 100)])
def test_logistic_is_the_minimum_that_scikit_learn_finds(shape: tuple[int, int]) -> None:
    from sklearn.linear_model import LogisticRegression

    activations, labels = planted(*shape)
    fitted = registry.load("probes", "logistic").fit(activations, labels)
    scaled = (activations - activations.mean(axis=0)) / activations.std(axis=0)
    rival = LogisticRegression(
        C=1 / (0.01 * len(labels)), class_weight="balanced", solver="newton-cholesky", tol=1e-12, max_iter=500
    ).fit(scaled, labels)
    np.testing.assert_allclose(fitted.score(activations), rival.decision_function(scaled), atol=1e-8)
    assert fitted.notes["converged"]


def test_logistic_on_more_rows_than_its_hessian_reads_ends_at_the_minimum() -> None:
    from scipy.optimize import approx_fprime

    activations, labels = planted(50_000, 3, seed=2)
    fitted = registry.load("probes", "logistic", l2=0.1).fit(activations, labels)
    assert fitted.notes["converged"]
    spread, mean = activations.std(axis=0), activations.mean(axis=0)
    z, signs = (activations - mean) / spread, 2.0 * labels - 1
    weights = np.where(labels == 1, 0.5 / labels.sum(), 0.5 / (1 - labels).sum())
    v = np.append(fitted.parameters["weight"] * spread, fitted.parameters["bias"] + fitted.parameters["weight"] @ mean)

    def loss(at: np.ndarray) -> float:
        return float(weights @ np.logaddexp(0, -signs * (z @ at[:-1] + at[-1])) + 0.05 * at[:-1] @ at[:-1])

    assert np.abs(approx_fprime(v, loss, 1e-6)).max() < 2e-6
    assert np.abs(approx_fprime(v * 1.01, loss, 1e-6)).max() > 1e-5


def test_logistic_steps_well_where_labels_alternate() -> None:
    # a Hessian of every other row would see one class alone, and take 26 passes
    rng, labels = np.random.default_rng(np.random.SeedSequence(3)), np.arange(50_000) % 2
    rows = rng.standard_normal((50_000, 3)) * np.where(labels == 1, 1.0, 4.0)[:, None] + 1.5 * labels[:, None]
    assert registry.load("probes", "logistic", max_iterations=12).fit(rows, labels).notes["converged"]


def test_logistic_says_when_it_did_not_converge() -> None:
    activations, labels = planted()
    assert not registry.load("probes", "logistic", max_iterations=1).fit(activations, labels).notes["converged"]


@pytest.mark.parametrize("name", NAMES)
def test_memory_does_not_grow_with_the_rows(name: str) -> None:
    """Numpy's own allocations, which tracemalloc sees; the statistics suite watches the process."""
    rng = np.random.default_rng(np.random.SeedSequence(1))
    block = rng.standard_normal((2000, 64)).astype(np.float32)
    labels = np.arange(2000) % 2
    block += labels[:, None] * np.float32(0.1)

    def peak(rows: int) -> int:
        tracemalloc.start()
        try:
            fit_streaming(name, ((block, labels) for _ in range(rows // 2000)))
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(4000)
    # 80,000 further rows are 20 MB
    assert peak(100_000) - peak(20_000) < 2**20


def test_streaming_loads_nothing_heavy() -> None:
    code = (
        "import sys, elk_stress.probing.fit.streaming\n"
        "assert not {'torch', 'jax', 'sklearn', 'scipy'} & set(sys.modules), 'heavy'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
