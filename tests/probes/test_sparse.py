"""The k-sparse probe: its dictionary finds planted features, and the labels choose the right one of them."""

from __future__ import annotations

import numpy as np
import pytest

from elk_stress.probes.sparse import Sparse, _ranked
from elk_stress.probing.probe import FittedProbe, as_fitted
from elk_stress.thoughts.conformal import auroc

N_PLANTED = 24


def features(n: int, seed: int, dim: int = 24) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows that are sums of three of 24 orthogonal features and the label: whether the first is on. Also the basis."""
    basis, _ = np.linalg.qr(np.random.default_rng(np.random.SeedSequence(99)).standard_normal((dim, dim)))
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    on = rng.random((n, N_PLANTED)) < 3 / N_PLANTED
    on[:, 0] = rng.random(n) < 0.4
    strength = on * rng.uniform(2.0, 4.0, (n, N_PLANTED))
    rows = strength @ basis[:N_PLANTED] + 0.1 * rng.standard_normal((n, dim))
    return rows, on[:, 0].astype(int), basis


@pytest.fixture(scope="module")
def fitted() -> FittedProbe:
    rows, labels, _ = features(1500, 0)
    return as_fitted(Sparse(features=48, active=4), rows, labels)


def test_it_finds_the_planted_feature(fitted: FittedProbe) -> None:
    rows, labels, basis = features(2000, 1)
    assert auroc(fitted.score(rows), labels) > 0.97
    assert fitted.notes["explained"] > 0.7
    assert fitted.notes["on"] < 8
    # the feature that the labels rank first points along the planted one
    spread = features(1500, 0)[0].std(axis=0)
    column = fitted.parameters["weight"][:, 0] * spread
    planted = basis[0] / spread
    assert abs(column @ planted) / (np.linalg.norm(column) * np.linalg.norm(planted)) > 0.7


def test_it_reads_k_features_and_no_more(fitted: FittedProbe) -> None:
    rows, labels, _ = features(400, 2)
    for size in (1, 3):
        small = as_fitted(Sparse(features=48, active=4, sizes=(size,)), rows, labels)
        assert small.notes["k"] == small.parameters["weight"].shape[1] == len(small.parameters["readout"]) == size
    assert np.any(fitted.parameters["weight"], axis=0).sum() == fitted.notes["k"] in Sparse().sizes
    # the rest, which gives every fit one shape, is read by nothing
    assert not fitted.parameters["readout"][fitted.notes["k"] :].any()


def test_the_dictionary_sees_no_labels() -> None:
    rows, labels, _ = features(400, 3)
    recipe = Sparse(features=48, active=4, sizes=(48,))
    one, other = (as_fitted(recipe, rows, y) for y in (labels, labels[::-1].copy()))
    order = [np.argsort(f.parameters["threshold"]) for f in (one, other)]
    for name in ("weight", "threshold"):
        first, second = (f.parameters[name][..., o] for f, o in zip((one, other), order, strict=True))
        np.testing.assert_allclose(first, second)
    assert not np.allclose(one.parameters["readout"][order[0]], other.parameters["readout"][order[1]])


def test_features_are_ranked_by_their_difference_of_means() -> None:
    rng = np.random.default_rng(np.random.SeedSequence(4))
    labels = rng.integers(0, 2, 500)
    read = rng.random((500, 4))
    read[:, 2] += labels
    read[:, 1] = 5.0
    read[:, 3] = 100.0 * (read[:, 3] + 0.3 * labels)
    assert _ranked(read, labels).tolist() == [2, 3, 0, 1]


def test_the_score_is_continuous_where_a_feature_sets_in(fitted: FittedProbe) -> None:
    """Along a line through the data the score never jumps: halving the steps halves the largest one."""
    rows, _, _ = features(2, 5)
    largest = []
    for steps in (2000, 4000):
        share = np.linspace(0.0, 1.0, steps + 1)[:, None]
        largest.append(np.abs(np.diff(fitted.score((1 - share) * rows[0] + share * rows[1]))).max())
    assert largest[0] > 0
    assert largest[1] / largest[0] == pytest.approx(0.5, abs=0.05)


def test_shuffled_labels_stay_at_chance() -> None:
    rows, labels, _ = features(600, 6)
    fresh, truth, _ = features(2000, 7)
    shuffled = np.random.default_rng(np.random.SeedSequence(8)).permutation(labels)
    probe = as_fitted(Sparse(features=48, active=4), rows, shuffled)
    assert abs(auroc(probe.score(fresh), truth) - 0.5) < 0.2
    assert probe.notes["held_out_loss"] > 0.66


def test_saved_recipe_comes_back(fitted: FittedProbe, tmp_path) -> None:  # type: ignore[no-untyped-def]
    loaded = FittedProbe.load(fitted.save(tmp_path))
    assert loaded.probe == fitted.probe


def test_fewer_rows_than_features() -> None:
    rows, labels, _ = features(12, 9)
    labels[:2] = 0, 1
    assert np.isfinite(as_fitted("sparse", rows, labels).score(rows)).all()


@pytest.mark.parametrize("bad", [{"sizes": ()}, {"sizes": (0,)}, {"features": 8, "active": 8}, {"steps": 0}])
def test_bad_options_are_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match="sparse needs"):
        Sparse(**bad)
