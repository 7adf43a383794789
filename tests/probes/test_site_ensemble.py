"""The ensemble over sites: a member per read, each standardized; masked reads are not there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from token_checks import any_batch_shape, every_library_agrees, saved_and_loaded

from elk_stress.probes.site_ensemble import SiteEnsemble
from elk_stress.probing.probe import FittedProbe, as_fitted
from elk_stress.thoughts.conformal import auroc


def sites(n: int, seed: int, reads: int = 4, dim: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Every read tells the label along a direction of its own, at a scale of its own."""
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    labels = rng.integers(0, 2, n)
    rows = rng.standard_normal((n, reads, dim))
    for read in range(reads):
        rows[:, read, read] += 1.0 * (2 * labels - 1) * (-1) ** read
    return rows * 10.0 ** np.arange(reads)[:, None] + 3.0, labels


@pytest.fixture(scope="module", params=["logistic", "mlp"])
def fitted(request) -> FittedProbe:  # type: ignore[no-untyped-def]
    return as_fitted(SiteEnsemble(request.param), *sites(300, 0))


def test_it_reads_every_site_in_its_own_way(fitted: FittedProbe) -> None:
    (rows, labels), (fresh, truth) = sites(300, 0), sites(2000, 1)
    single = [auroc(as_fitted("logistic", rows[:, t], labels).score(fresh[:, t]), truth) for t in range(rows.shape[1])]
    assert auroc(fitted.score(fresh), truth) > max(single) + 0.02
    mean = as_fitted("logistic", rows.mean(axis=1), labels)
    assert auroc(fitted.score(fresh), truth) > auroc(mean.score(fresh.mean(axis=1)), truth) + 0.05


def test_members_count_alike(fitted: FittedProbe) -> None:
    """Alone (all others masked), every site's score has mean 0 and standard deviation 1 over the training rows."""
    rows, labels = sites(300, 0)
    each = []
    for site in range(4):
        alone = np.broadcast_to(np.arange(4) == site, (300, 4))
        each.append(fitted.score(rows, alone))
        np.testing.assert_allclose([each[-1].mean(), each[-1].std()], [0.0, 1.0], atol=1e-9)
        member = as_fitted(fitted.probe._recipe, rows[:, site], labels)  # type: ignore[attr-defined]
        assert np.corrcoef(member.score(rows[:, site]), each[-1])[0, 1] > 1 - 1e-9
    np.testing.assert_allclose(np.mean(each, axis=0), fitted.score(rows))


def test_masked_reads_are_not_there(fitted: FittedProbe) -> None:
    rows, _ = sites(6, 2)
    mask = np.random.default_rng(np.random.SeedSequence(3)).random((6, 4)) < 0.6
    mask[0] = False
    scores = fitted.score(rows, mask)
    assert scores[0] == 0.0
    for junk in (1e6, np.nan):
        np.testing.assert_array_equal(fitted.score(np.where(mask[..., None], rows, junk), mask), scores)
    np.testing.assert_allclose(fitted.score(rows, np.ones_like(mask)), fitted.score(rows))


def test_masked_training_reads_are_not_there() -> None:
    rows, labels = sites(200, 4)
    mask = np.random.default_rng(np.random.SeedSequence(5)).random((200, 4)) < 0.7
    junk = np.where(mask[..., None], rows, rows - 400.0 * (labels[:, None, None] - 0.5))
    (clean, dirty) = (as_fitted("site_ensemble", x, labels, mask=mask) for x in (rows, junk))
    for name, value in clean.parameters.items():
        np.testing.assert_array_equal(dirty.parameters[name], value)


@pytest.mark.parametrize("masked", [False, True])
def test_every_library_agrees(fitted: FittedProbe, masked: bool) -> None:
    rows, _ = sites(5, 6)
    mask = np.arange(4) < np.array([4, 3, 2, 1, 4])[:, None] if masked else None
    every_library_agrees(fitted, rows, mask, slope_atol=1e-4)


@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (0,)])
def test_batch_shapes(fitted: FittedProbe, batch: tuple[int, ...]) -> None:
    any_batch_shape(fitted, batch, 4, 10)


def test_saved_and_loaded(fitted: FittedProbe, tmp_path: Path) -> None:
    saved_and_loaded(fitted, sites(5, 8)[0], tmp_path)


def test_what_does_not_fit_is_refused(fitted: FittedProbe) -> None:
    with pytest.raises(ValueError, match="4 reads per item, got 3"):
        fitted.score(np.zeros((2, 3, 10)))
    with pytest.raises(ValueError, match="one activation per item"):
        SiteEnsemble("max_pool")
    rows, labels = sites(40, 9)
    mask = np.ones((40, 4), dtype=bool)
    mask[labels == 1, 2] = False
    with pytest.raises(ValueError, match="read 2 is there"):
        as_fitted("site_ensemble", rows, labels, mask=mask)
