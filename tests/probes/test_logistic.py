"""Choosing logistic regression's penalty on the training rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from elk_stress import FittedProbe
from elk_stress.core import registry
from elk_stress.probing.fit.held_out import held_out
from elk_stress.probing.probe import as_fitted

_PENALTIES = (1e-4, 1e-2, 1.0)


def _items(strength: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """60 items of 4 rows each that hardly differ, in 40 dimensions; the first one tells the classes apart."""
    rng = np.random.default_rng(seed)
    truth = np.arange(60) % 2
    origins = rng.standard_normal((60, 40))
    origins[:, 0] += strength * truth
    return np.repeat(origins, 4, axis=0) + 0.01 * rng.standard_normal((240, 40)), np.repeat(truth, 4)


def _loss(probe: FittedProbe, rows: np.ndarray, labels: np.ndarray) -> float:
    margin = np.where(labels == 1, 1.0, -1.0) * np.asarray(probe.score(rows))
    each = np.logaddexp(0.0, -margin)
    return float(0.5 * each[labels == 0].mean() + 0.5 * each[labels == 1].mean())


@pytest.mark.parametrize("strength", [1.0, 6.0])
def test_the_penalty_of_the_least_held_out_loss_is_taken(strength: float) -> None:
    rows, labels = _items(strength)
    losses = [
        np.mean(
            [
                _loss(as_fitted(registry.load("probes", "logistic", l2=l2), rows[a], labels[a]), rows[b], labels[b])
                for a, b in held_out(labels, 5)
            ]
        )
        for l2 in _PENALTIES
    ]
    best = int(np.argmin(losses))
    chosen = registry.load("probes", "logistic", l2=_PENALTIES).fit(rows, labels)
    plain = registry.load("probes", "logistic", l2=_PENALTIES[best]).fit(rows, labels)
    assert chosen.notes["l2"] == _PENALTIES[best]
    assert chosen.notes["held_out_loss"] == pytest.approx(losses[best], rel=1e-9)
    np.testing.assert_array_equal(chosen.parameters["weight"], plain.parameters["weight"])


def test_copies_of_an_item_do_not_vouch_for_it() -> None:
    rows, labels = _items(0.0)
    notes = registry.load("probes", "logistic", l2=_PENALTIES).fit(rows, labels).notes
    # nothing can be learned; rows dealt one by one would know each other and ask for hardly any penalty
    assert notes["l2"] == 1.0
    assert notes["held_out_loss"] > np.log(2) - 0.05


def test_batches_choose_as_arrays_do(tmp_path: Path) -> None:
    rows, labels = _items(2.0)
    recipe = registry.load("probes", "logistic", l2=_PENALTIES)
    fitter = recipe.fitter(tmp_path)
    for start in range(0, len(rows), 50):
        fitter.update(rows[start : start + 50], labels[start : start + 50])
    streamed, whole = fitter.fit(), recipe.fit(rows, labels)
    assert streamed.notes == {**whole.notes, "held_out_loss": pytest.approx(whole.notes["held_out_loss"], rel=1e-9)}
    np.testing.assert_allclose(streamed.parameters["weight"], whole.parameters["weight"], rtol=1e-9, atol=1e-12)


def test_several_penalties_are_saved_with_the_probe(tmp_path: Path) -> None:
    rows, labels = _items(2.0)
    probe = registry.load("probes", "logistic", l2=_PENALTIES).fit(rows, labels)
    probe.save(tmp_path / "probe.safetensors")
    loaded = FittedProbe.load(tmp_path / "probe.safetensors")
    assert loaded.probe == probe.probe
    assert loaded.notes["l2"] == probe.notes["l2"]


@pytest.mark.parametrize("l2", [0.0, (), (0.1, -1.0)])
def test_penalties_must_be_positive(l2: float | tuple[float, ...]) -> None:
    rows, labels = _items(2.0)
    with pytest.raises(ValueError, match=r"l2 must be above 0.*1e-6"):
        registry.load("probes", "logistic", l2=l2).fit(rows, labels)
