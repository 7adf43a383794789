"""What recipes share to fit themselves: folds, units, descent, masks, pairs and covariances, each by its promise."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from elk_stress.probing.fit.density import leading_axes, negatives_of, on_axes, shrunk, spectrum
from elk_stress.probing.fit.descent import Trials, adam_by_unit, checked_options, choose, cross_fit, dealer
from elk_stress.probing.fit.folds import balanced, cross_weights, rows_per_item, stretch_folds, stretches
from elk_stress.probing.fit.pairs import agreement, checked_pairs, normalized_halves, oriented
from elk_stress.probing.fit.pooling import lowest, standardized_tokens
from elk_stress.probing.fit.scaling import score_scale, standardization


def _rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed))


MODULES = ("folds", "scaling", "descent", "pooling", "pairs", "density")


def test_importing_loads_nothing_heavy() -> None:
    """Recipes are listed, and their options checked, without any of it."""
    code = "import sys\n" + "".join(f"import elk_stress.probing.fit.{name}\n" for name in MODULES)
    code += "print([n for n in ('jax', 'optax', 'torch', 'sklearn', 'scipy') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -- folds -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("contexts", [1, 4])
def test_rows_per_item_are_read_off_the_runs(contexts: int) -> None:
    items = np.array([0, 1, 1, 0, 0, 0, 1])
    assert rows_per_item(np.repeat(items, contexts)) == contexts
    # pairs of neighbouring items cannot be told from items twice as long
    assert rows_per_item(np.repeat(np.repeat(items, 2), contexts)) == 2 * contexts


@pytest.mark.parametrize(("rows", "count"), [(10, 3), (3, 10), (100, 10)])
def test_stretches_are_consecutive_and_of_nearly_equal_length(rows: int, count: int) -> None:
    found = stretches(rows, count)
    assert (np.diff(found) >= 0).all()
    sizes = np.bincount(found)
    assert len(sizes) == min(rows, count)
    assert sizes.max() - sizes.min() <= 1


def test_each_fold_has_two_stretches_of_a_class() -> None:
    labels = np.tile([0, 1], 60)
    fold = stretch_folds(labels, 3)
    for label in (0, 1):
        own = fold[labels == label]
        assert own.tolist() == np.repeat([0, 1, 2, 0, 1, 2], 10).tolist()


def test_there_are_no_more_folds_than_rows_of_the_rarer_class() -> None:
    labels = np.array([0] * 30 + [1, 1])
    fold = stretch_folds(labels, 5)
    assert set(fold[labels == 1]) == set(fold) == {0, 1}


def test_balanced_weights_give_each_class_half() -> None:
    labels = np.array([0, 0, 0, 1])
    chosen = np.array([[True, True], [True, False], [False, False], [True, False]])
    expected = [[0.25, 0.5], [0.25, 0.0], [0.0, 0.0], [0.5, 0.0]]
    np.testing.assert_array_equal(balanced(labels, chosen), expected)


def test_one_fold_learns_from_what_it_is_judged_on() -> None:
    learned, judged = cross_weights(np.array([0, 0, 0, 1]), 3)
    np.testing.assert_array_equal(learned[:, 0], judged[:, 0])
    assert learned.shape == (4, 2)
    assert not judged[:, 1].any()


# -- units -------------------------------------------------------------------------------------------------------------


def test_what_is_constant_but_for_rounding_has_infinite_spread() -> None:
    rows = _rng(0).standard_normal((50, 3)) * [2.0, 1.0, 1e-9] + [0.0, 5.0, 1e4]
    mean, spread = standardization(rows)
    np.testing.assert_allclose(mean, rows.mean(axis=0))
    np.testing.assert_allclose(spread[:2], rows[:, :2].std(axis=0))
    assert np.isinf(spread[2])
    # small is not constant
    assert np.isfinite(standardization(rows * 1e-6)[1][:2]).all()
    centre, width = score_scale(np.stack([rows[:, 0], np.full(50, 7.0)]))
    assert (centre[1], width[1]) == (7.0, np.inf)
    assert width[0] == rows[:, 0].std()


# -- descent -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [4, 5, 100])
def test_every_row_is_dealt_once_and_alike_in_all_arrays(batch: int) -> None:
    deal = dealer(11, batch, _rng(1))
    index = np.arange(1.0, 12.0)
    dealt, beside = deal(index), deal(np.stack([index, -index], axis=1))
    assert dealt.shape[1] <= batch
    assert dealt.dtype == np.float32
    assert sorted(dealt[dealt > 0]) == index.tolist()
    np.testing.assert_array_equal(beside, np.stack([dealt, -dealt], axis=-1))
    assert not np.array_equal(dealt[dealt > 0], index)


def _first(projections: Any, mask: Any, bias: Any, layout: None, softness: Any) -> Any:
    """The pool of a plain linear probe."""
    return projections + bias


def _linear_trials(labels: np.ndarray, dim: int, penalties: tuple[float, ...]) -> tuple[Trials, int]:
    learned, judged = cross_weights(labels, 3)
    fits, tried = learned.shape[1], len(penalties)
    shares = (np.tile(share, (1, tried)) for share in (learned, judged))
    return Trials(np.zeros((dim, tried * fits)), np.repeat(penalties, fits), *shares), fits


def _two_classes(seed: int, n: int = 300, dim: int = 5) -> tuple[np.ndarray, np.ndarray]:
    rng = _rng(seed)
    labels = (rng.random(n) < 0.3).astype(int)
    return (rng.standard_normal((n, dim)) + np.outer(labels, np.eye(dim)[0])).astype(np.float32), labels


def test_with_linear_scores_the_descent_ends_at_the_penalized_regression() -> None:
    """scikit-learn's logistic regression with balanced classes minimizes the same function."""
    from sklearn.linear_model import LogisticRegression

    rows, labels = _two_classes(2)
    trials, fits = _linear_trials(labels, 5, (0.1, 1.0))
    weight, bias, losses = cross_fit(_first, None, trials, rows, labels, steps=600, batch=1000, seed=0)
    learned, judged = trials.learned, trials.judged
    for member in range(2 * fits):
        own = learned[:, member] > 0
        # sum of 1/C-scaled losses: weights sum to 1, so C = 1 / penalty
        rival = LogisticRegression(C=1 / trials.penalties[member], tol=1e-10, max_iter=1000)
        rival.fit(rows[own], labels[own], sample_weight=learned[own, member])
        np.testing.assert_allclose(weight[:, member], rival.coef_[0], atol=2e-3)
        assert bias[member] == pytest.approx(rival.intercept_[0], abs=2e-3)
        margin = (1.0 - 2.0 * labels) * (rows @ weight[:, member] + bias[member])
        assert losses[member] == pytest.approx(judged[:, member] @ np.logaddexp(0.0, margin), abs=1e-5)


def test_the_seed_orders_batches_and_nothing_else() -> None:
    rows, labels = _two_classes(3)
    trials, _ = _linear_trials(labels, 5, (0.1,))

    def fitted(batch: int, seed: int) -> np.ndarray:
        return cross_fit(_first, None, trials, rows, labels, steps=20, batch=batch, seed=seed)[0]

    np.testing.assert_array_equal(fitted(64, 0), fitted(64, 0))
    assert np.abs(fitted(64, 0) - fitted(64, 1)).max() > 0.02
    # one batch: only rounding differs, which Adam makes much of where a slope is 0 but for it (the bias, at first)
    np.testing.assert_allclose(fitted(1000, 0), fitted(1000, 1), atol=2e-3)


def test_softness_falls_from_one_to_zero_at_half_time() -> None:
    """Pools that answer only while soft, or only once hard: each learns in its own half of the descent."""
    rows, labels = _two_classes(4)
    trials, _ = _linear_trials(labels, 5, (1e-9,))

    def soft(projections: Any, mask: Any, bias: Any, layout: None, softness: Any) -> Any:
        return softness * projections + 0.0 * bias

    def hard(projections: Any, mask: Any, bias: Any, layout: None, softness: Any) -> Any:
        return (softness == 0.0) * projections + 0.0 * bias

    weight, _, losses = cross_fit(soft, None, trials, rows, labels, steps=40, batch=1000, seed=0)
    assert np.abs(weight).max() > 0.1
    # judged on the score itself, softness 0: a constant
    np.testing.assert_allclose(losses[:3], np.log(2), rtol=1e-5)
    weight, _, losses = cross_fit(hard, None, trials, rows, labels, steps=40, batch=1000, seed=0)
    assert np.abs(weight).max() > 0.1
    assert (losses[:3] < 0.66).all()


def test_the_choice_is_the_least_mean_held_out_loss() -> None:
    # two configurations of two folds and a fit on all rows; the last fits' losses say nothing
    chosen, kept, loss = choose(np.array([0.5, 0.7, 0.0, 0.1, 0.9, 9.0]), 3)
    assert (chosen, kept) == (1, 5)
    assert loss == pytest.approx(0.5)


def test_weights_of_a_unit_share_one_step_size_and_units_do_not() -> None:
    method = adam_by_unit()
    at = {"weight": np.zeros((2, 2), dtype=np.float32), "bias": np.zeros(2, dtype=np.float32)}
    slopes = {"weight": np.array([[3.0, 300.0], [4.0, 400.0]], dtype=np.float32), "bias": np.ones(2, dtype=np.float32)}
    moves, _ = method.update(slopes, method.init(at))
    # the first step has the length of the root mean square slope, in both units alike
    expected = np.array([3.0, 4.0]) / np.sqrt(12.5)
    np.testing.assert_allclose(np.asarray(moves["weight"]), np.stack([expected, expected], axis=1), rtol=1e-5)
    np.testing.assert_allclose(np.asarray(moves["bias"]), 1.0, rtol=1e-5)


def test_bad_options_name_the_recipe() -> None:
    assert checked_options("mine", [1, 2], 3, 10, 8) == (1.0, 2.0)
    for bad in (([], 3, 10, 8), ([0.0], 3, 10, 8), ([1.0], 0, 10, 8), ([1.0], 3, 0, 8), ([1.0], 3, 10, 0)):
        with pytest.raises(ValueError, match="mine needs"):
            checked_options("mine", *bad)


# -- tokens ------------------------------------------------------------------------------------------------------------


def test_masked_tokens_are_zero_and_not_in_the_units() -> None:
    rows = _rng(5).standard_normal((20, 4, 3)) * 2.0 + 1.0
    mask = np.arange(4) < _rng(6).integers(1, 5, 20)[:, None]
    scaled, centre, spread = standardized_tokens(np.where(mask[..., None], rows, 1e6), mask)
    np.testing.assert_allclose(centre, rows[mask].mean(axis=0))
    np.testing.assert_allclose(spread, rows[mask].std(axis=0))
    np.testing.assert_allclose(scaled[mask], (rows[mask] - centre) / spread, rtol=1e-5, atol=1e-6)
    assert not scaled[~mask].any()
    assert scaled.dtype == np.float32


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_lowest_number_is_finite_and_below_all(dtype: type) -> None:
    found = lowest(np, np.array([1.0, -1e30], dtype=dtype))
    assert found.dtype == dtype
    assert np.isfinite(found).all()
    assert (found < -1e30).all()


# -- pairs -------------------------------------------------------------------------------------------------------------


def _halves_far_apart(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = _rng(seed)
    labels = np.concatenate([half := rng.integers(0, 2, 40), 1 - half])
    rows = rng.standard_normal((80, 6)) * [1.0, 2.0, 3.0, 1.0, 1.0, 0.0]
    rows[:, 0] += 6.0 * labels
    rows[40:, 1:3] += 5.0
    return rows, labels, np.stack([np.arange(40), np.arange(40) + 40], axis=1)


def test_halves_do_not_tell_which_they_are() -> None:
    rows, _, pairs = _halves_far_apart(7)
    halves = normalized_halves(rows, pairs)
    for half in (halves.affirmed, halves.negated):
        np.testing.assert_allclose(half.mean(axis=0), 0.0, atol=1e-12)
        np.testing.assert_allclose(half @ halves.form, 0.0, atol=1e-12)
    assert np.linalg.norm(halves.form) == pytest.approx(1.0)
    variances = (rows[:40, :5].var(axis=0) + rows[40:, :5].var(axis=0)) / 2
    np.testing.assert_allclose(halves.spread[:5] ** 2, variances)
    assert np.isinf(halves.spread[5])
    np.testing.assert_allclose(halves.middle, rows.mean(axis=0))


def test_a_direction_scores_a_statement_under_either_normalization_alike() -> None:
    rows, labels, pairs = _halves_far_apart(8)
    halves = normalized_halves(rows, pairs)
    axis = _rng(9).standard_normal(6)
    axis -= axis @ halves.form * halves.form
    axis *= np.sign(((halves.affirmed - halves.negated) @ axis) @ (labels[:40] - 0.5))
    fitted = oriented(_Linear(), axis, halves, labels, False, {})
    weight, bias = fitted.parameters["weight"], fitted.parameters["bias"]
    sign = np.sign(weight @ (axis / halves.spread))
    np.testing.assert_allclose(rows[:40] @ weight + bias, sign * halves.affirmed @ axis, atol=1e-9)
    np.testing.assert_allclose(rows[40:] @ weight + bias, sign * halves.negated @ axis, atol=1e-9)


def test_the_sign_is_that_of_the_labels() -> None:
    rows, labels, pairs = _halves_far_apart(10)
    halves = normalized_halves(rows, pairs)
    axis = np.eye(6)[0]
    for way in (axis, -axis):
        fitted = oriented(_Linear(), way, halves, labels, False, {"n": 1})
        assert fitted.parameters["weight"][0] > 0
        assert fitted.notes["sign_agreement"] > 0.9
        assert fitted.notes["n"] == 1


class _Linear:
    """A recipe as far as a fitted probe must know it."""

    name = "mine"


def test_ties_and_pairs_of_equal_labels_do_not_vote() -> None:
    labels, pairs = np.array([1, 0, 1, 1, 0, 1]), np.array([[0, 1], [2, 3], [5, 4], [4, 5]])
    assert agreement(np.array([2.0, -1.0, 0.0, 3.0]), labels, pairs) == 0.5
    assert agreement(np.array([2.0, -1.0, 0.0, -3.0]), labels, pairs) == 1.0
    assert agreement(np.zeros(4), labels, pairs) == 0.5


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        (None, "mine learns from contrast pairs"),
        (np.zeros((2, 3), dtype=int), "shape"),
        (np.zeros((2, 2)), "integer"),
        (np.array([[0, 9], [1, 2]]), "rows 0..8"),
        (np.array([[0, 1]]), "mine normalizes"),
    ],
)
def test_bad_pairs_are_refused(pairs: np.ndarray | None, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        checked_pairs(pairs, 9, "mine")


# -- negatives ---------------------------------------------------------------------------------------------------------


def test_negatives_are_the_rows_of_label_zero() -> None:
    rows = np.arange(8, dtype=np.float32).reshape(4, 2)
    found = negatives_of(rows, np.array([0, 1, 0, 1]), "mine")
    np.testing.assert_array_equal(found, rows[[0, 2]])
    assert found.dtype == float
    with pytest.raises(ValueError, match="mine learns from negatives"):
        negatives_of(rows, np.array([0, 1, 1, 1]), "mine")


def test_the_spectrum_is_sorted_and_above_rounding() -> None:
    basis, _ = np.linalg.qr(_rng(11).standard_normal((3, 3)))
    sizes, axes = spectrum(basis @ np.diag([1.0, 4.0, 0.0]) @ basis.T)
    np.testing.assert_allclose(sizes, [4.0, 1.0, 4e-12], rtol=1e-6)
    np.testing.assert_allclose(np.abs(axes[:, :2].T @ basis), [[0, 1, 0], [1, 0, 0]], atol=1e-9)


@pytest.mark.parametrize("shape", [(200, 6), (10, 30), (40, 1), (3, 2)])
def test_shrunk_correlations_are_those_of_scikit_learn(shape: tuple[int, int]) -> None:
    from sklearn.covariance import OAS
    from sklearn.preprocessing import StandardScaler

    rows = _rng(3).standard_normal(shape) @ _rng(4).standard_normal((shape[1], shape[1])) * 10.0 ** np.arange(shape[1])
    rival = OAS().fit(StandardScaler().fit_transform(rows))
    beside = np.concatenate([rows, np.full((len(rows), 2), 7.0)], axis=1)
    spread, correlation, share = shrunk(beside.mean(axis=0), np.cov(beside.T, bias=True), len(rows))
    assert share == pytest.approx(1.0 if shape[1] == 1 else rival.shrinkage_, rel=1e-9)
    np.testing.assert_allclose(correlation[:-2, :-2], rival.covariance_, atol=1e-9)
    # features that never varied stand alone, at the size of the others
    np.testing.assert_allclose(correlation[-2:], np.eye(len(correlation))[-2:] * share)
    np.testing.assert_allclose(spread, [*rows.std(axis=0), *[np.median(rows.std(axis=0))] * 2])


@pytest.mark.parametrize("rank", [2, 10])
def test_leading_axes_and_the_rest_have_unit_variance(rank: int) -> None:
    basis, _ = np.linalg.qr(_rng(13).standard_normal((5, 5)))
    rows = _rng(12).standard_normal((4000, 5)) * [3.0, 2.5, 2.0, 1.5, 1.0] @ basis + 3.0
    found = leading_axes(rows, rank)
    axes, scales = found.axes, found.scales
    kept = min(rank, 5)
    assert axes.shape == (5, kept)
    assert scales.shape == (kept + 1,)
    near, rest = on_axes(np, found._asdict(), rows)
    # of 4,000 rows nearly nothing is shrunk away
    np.testing.assert_allclose(np.cov(near.T), np.eye(kept), atol=0.05)
    assert rest.mean() == pytest.approx(5 - kept, abs=0.1)
    # the largest entry of an axis is positive, whatever the solver says
    assert (axes[np.abs(axes).argmax(axis=0), np.arange(kept)] > 0).all()


def test_axes_are_at_most_half_as_many_as_rows() -> None:
    assert leading_axes(_rng(14).standard_normal((6, 20)), 20).axes.shape == (20, 3)
