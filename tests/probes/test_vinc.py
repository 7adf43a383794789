"""VINC: each matrix against its definition, its special cases, and what the invariance term is for."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
from sklearn.metrics import roc_auc_score

from elk_stress.probes.vinc import VINC, _contexts_of
from elk_stress.probing.fit.pairs import normalized_halves
from elk_stress.probing.probe import as_fitted
from elk_stress.testing import planted_classes


def _in_contexts(
    n_items: int, contexts: int, dim: int, *, sway: float, truth: float, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Items x contexts with truth along axis 0 and, along axis 1, opposite answers that differ with the context."""
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    rows = rng.standard_normal((n_items, 2, contexts, dim)) * 0.3 + rng.standard_normal((n_items, 1, 1, dim)) / 2
    label = rng.integers(0, 2, n_items)
    sign = 2.0 * np.stack([label, 1 - label], axis=1) - 1
    rows[..., 0] += truth * sign[:, :, None]
    side = rng.standard_normal((n_items, contexts))
    rows[..., 1] += sway * side[:, None] * np.array([1.0, -1.0])[:, None]
    labels = np.repeat(np.stack([label, 1 - label], axis=1).ravel(), contexts)
    base = np.stack([2 * np.arange(n_items), 2 * np.arange(n_items) + 1], axis=1) * contexts
    pairs = np.concatenate([base + c for c in range(contexts)])
    return rows.reshape(-1, dim), labels, pairs


def test_matrix_is_its_definition() -> None:
    rows, labels, pairs = _in_contexts(12, 5, 6, sway=1.0, truth=1.0, seed=0)
    halves = normalized_halves(rows, pairs)
    plus, minus = (z.reshape(5, 12, 6) for z in (halves.affirmed, halves.negated))
    between = np.cov(plus.mean(0).T, bias=True) + np.cov(minus.mean(0).T, bias=True)
    within = sum(np.cov(z[:, i].T, bias=True) for z in (plus, minus) for i in range(12)) / 12
    cross = np.cov(plus.mean(0).T, minus.mean(0).T, bias=True)[:6, 6:]
    recipe = VINC(variance=0.7, invariance=0.4, negation=1.3)
    matrix = recipe._matrix(halves, 5)
    np.testing.assert_allclose(matrix, 0.7 * between - 0.4 * within - 1.3 * (cross + cross.T), atol=1e-12)
    # and the direction solves the eigenproblem away from the difference of the halves' means
    fitted = as_fitted(recipe, rows, labels, pairs=pairs)
    v = fitted.parameters["weight"] * halves.spread
    form = (rows[pairs[:, 0]].mean(0) - rows[pairs[:, 1]].mean(0)) / halves.spread
    basis = scipy.linalg.null_space(form[None])
    best = scipy.linalg.eigh(basis.T @ matrix @ basis, eigvals_only=True)[-1]
    assert v @ matrix @ v / (v @ v) == pytest.approx(best)
    assert abs(v @ form) < 1e-9


def test_with_variance_and_negation_alone_it_is_crc() -> None:
    data = planted_classes(separation=2.0)
    ours = as_fitted(VINC(invariance=0.0), data.activations, data.labels, pairs=data.pairs)
    crc = as_fitted("crc", data.activations, data.labels, pairs=data.pairs)
    np.testing.assert_allclose(ours.parameters["weight"], crc.parameters["weight"], atol=1e-9)
    assert ours.notes["contexts"] == 1
    # with single pairs there is nothing to be invariant under
    same = as_fitted(VINC(invariance=5.0), data.activations, data.labels, pairs=data.pairs)
    np.testing.assert_array_equal(ours.parameters["weight"], same.parameters["weight"])


def test_invariance_turns_away_from_what_contexts_move() -> None:
    """A direction with opposite answers that depend on the context: clustering follows it, invariance does not."""
    train = _in_contexts(100, 3, 10, sway=3.0, truth=1.0, seed=1)
    test = _in_contexts(100, 3, 10, sway=3.0, truth=1.0, seed=2)
    aurocs = {
        name: roc_auc_score(test[1], as_fitted(probe, *train[:2], pairs=train[2]).score(test[0]))
        for name, probe in {"crc": "crc", "vinc": VINC(), "without": VINC(invariance=0.0)}.items()
    }
    assert aurocs["vinc"] > 0.68
    assert aurocs["crc"] < 0.55
    # centroids alone leave a third of the variance that contexts cause
    assert aurocs["without"] < 0.55


def test_negation_turns_away_from_what_both_halves_share() -> None:
    """A loud topic that a statement and its negation share has much variance; variance alone follows it."""
    data = planted_classes(separation=3.0)
    rng = np.random.default_rng(np.random.SeedSequence(3))
    topic = np.outer(rng.standard_normal(len(data.pairs)) * 6, np.eye(16)[7] + np.eye(16)[2] + np.eye(16)[11])
    rows = data.activations.copy()
    rows[data.pairs[:, 0]] += topic
    rows[data.pairs[:, 1]] += topic
    with_it = as_fitted(VINC(), rows, data.labels, pairs=data.pairs)
    without = as_fitted(VINC(negation=0.0), rows, data.labels, pairs=data.pairs)
    assert roc_auc_score(data.labels, with_it.score(rows)) > 0.9
    assert roc_auc_score(data.labels, without.score(rows)) < 0.7


def test_contexts_are_read_off_the_pairs_as_the_engine_lists_them() -> None:
    base = np.array([[0, 1], [3, 2], [4, 5]])
    listed = np.concatenate([base * 4 + c for c in range(4)])
    assert _contexts_of(listed) == 4
    assert _contexts_of(base) == 1
    assert _contexts_of(listed[:-1]) == 1
    assert _contexts_of(planted_classes().pairs) == 1
    # the same pairs in another order say nothing; told how many, the fit is the same
    rows, labels, pairs = _in_contexts(20, 4, 6, sway=1.0, truth=1.0, seed=4)
    order = np.random.default_rng(np.random.SeedSequence(0)).permutation(len(pairs))
    assert _contexts_of(pairs[order]) == 1
    told = as_fitted(VINC(contexts=4), rows, labels, pairs=pairs[order])
    read = as_fitted(VINC(), rows, labels, pairs=pairs)
    assert read.notes["contexts"] == told.notes["contexts"] == 4
    np.testing.assert_allclose(told.parameters["weight"], read.parameters["weight"], atol=1e-9)


@pytest.mark.parametrize("platt", [False, True])
def test_swapped_labels_negate_the_score(platt: bool) -> None:
    data = planted_classes(separation=2.0)
    upright, swapped = (
        as_fitted(VINC(platt=platt), data.activations, labels, pairs=data.pairs)
        for labels in (data.labels, 1 - data.labels)
    )
    np.testing.assert_allclose(upright.score(data.activations), -swapped.score(data.activations), atol=1e-9)


def test_still_directions_do_not_win_by_their_zero_eigenvalue() -> None:
    """All that varies has a negative eigenvalue when invariance weighs enough; a constant feature must not be taken."""
    rows, labels, pairs = _in_contexts(20, 4, 6, sway=1.0, truth=1.0, seed=5)
    rows = np.concatenate([rows, np.full((len(rows), 1), 3.0)], axis=1)
    fitted = as_fitted(VINC(invariance=1e4), rows, labels, pairs=pairs)
    assert fitted.notes["eigenvalue"] < 0
    assert fitted.parameters["weight"][-1] == 0.0
    assert fitted.score(rows).std() > 0.1


@pytest.mark.parametrize("wrong", [{"variance": -1.0}, {"variance": 0.0, "negation": 0.0}, {"contexts": 0}])
def test_refused_hyperparameters(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="vinc"):
        VINC(**wrong)  # type: ignore[arg-type]


def test_refusals_name_the_probe() -> None:
    data = planted_classes()
    with pytest.raises(ValueError, match="vinc learns from contrast pairs"):
        as_fitted("vinc", data.activations, data.labels)
