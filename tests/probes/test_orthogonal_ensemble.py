"""Members read different things; what erasing means; what a combination costs an attacker."""

from __future__ import annotations

import numpy as np
import pytest

from elk_stress.core import registry
from elk_stress.probes.orthogonal_ensemble import _leace, _nullspace
from elk_stress.probing.fit.held_out import auroc
from elk_stress.probing.probe import FittedProbe, as_fitted
from elk_stress.testing import planted_classes
from elk_stress.thoughts.events import item_event
from elk_stress.threats.priors import EllipticalPrior


def redundant(n: int = 600, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Three correlates of the label, one in each of the first features, equally noisy; five features say nothing."""
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    labels = np.arange(n) % 2
    rows = rng.standard_normal((n, 8)) + np.outer(2 * labels - 1, [2.5, 2.0, 1.5, 0, 0, 0, 0, 0])
    return rows, labels


def fit(**options: object) -> FittedProbe:
    return as_fitted(registry.load("probes", "orthogonal_ensemble", **options), *redundant())


def test_members_are_orthogonal_in_standardized_features() -> None:
    fitted = fit(least=0.5, most=3)
    weights = fitted.parameters["weights"] * redundant()[0].std(axis=0)[:, None]
    unit = weights / np.linalg.norm(weights, axis=0)
    np.testing.assert_allclose(unit.T @ unit, np.eye(3), atol=1e-9)


def test_leace_leaves_rows_uncorrelated_with_the_score_and_nothing_to_read() -> None:
    rows, labels = redundant()
    rows = rows - rows.mean(axis=0)
    weight = as_fitted("logistic", rows, labels).parameters["weight"]
    left = rows @ _leace(rows, weight, rows @ weight)
    assert np.abs(left.T @ (rows @ weight)).max() < 1e-8 * len(rows)
    # it was there before, and the nullspace of the weight alone still shows it
    assert np.abs(rows.T @ (rows @ weight)).max() > len(rows)
    again = {
        name: auroc(np.asarray(as_fitted("logistic", x, labels).score(x)), labels)
        for name, x in {"leace": left, "nullspace": rows @ _nullspace(rows, weight, rows @ weight)}.items()
    }
    assert again["leace"] < 0.65 < 0.8 < again["nullspace"]


def test_erasing_the_label_itself_would_leave_a_constant() -> None:
    """Why members erase scores: the theorem of LEACE, on the label."""
    rows, labels = redundant()
    left = rows @ _leace(rows, rows[0], labels.astype(float))
    assert np.abs(as_fitted("logistic", left, labels).parameters["weight"]).max() < 1e-3


def test_members_are_added_while_they_rank_well() -> None:
    strict, lax = fit(least=0.99), fit(least=0.5)
    assert strict.notes["members"] == 1
    assert lax.notes["members"] > 1
    assert len(strict.notes["held_out_auroc"]) == 2
    assert strict.notes["held_out_auroc"][1] < 0.99
    assert fit(erase="leace").notes["members"] == 1


@pytest.mark.parametrize(("combine", "by"), [("max", np.max), ("min", np.min), ("mean", np.mean)])
def test_scores_are_in_units_of_the_negatives_and_combined(combine: str, by) -> None:  # type: ignore[no-untyped-def]
    rows, labels = redundant()
    fitted = fit(combine=combine, least=0.5)
    each = rows @ fitted.parameters["weights"] + fitted.parameters["biases"]
    members = fitted.notes["members"]
    np.testing.assert_allclose(each[labels == 0].mean(axis=0), 0.0, atol=1e-9)
    np.testing.assert_allclose(each[labels == 0, :members].std(axis=0), 1.0)
    # copies, which give every fit one shape, change nothing
    assert members < each.shape[1] == 4
    np.testing.assert_allclose(fitted.score(rows), by(each[:, :members], axis=1))


@pytest.mark.parametrize("combine", ["max", "min", "mean"])
def test_slope_is_bounded_and_reached(combine: str) -> None:
    fitted = fit(combine=combine, least=0.5)
    factor = np.random.default_rng(np.random.SeedSequence(1)).standard_normal((8, 5))
    bound = fitted.lipschitz(factor)
    assert bound is not None
    rng = np.random.default_rng(np.random.SeedSequence(2))
    rows = 2 * rng.standard_normal((4000, 8))
    found = []
    for weight in fitted.parameters["weights"].T:
        step = factor.T @ weight / np.linalg.norm(factor.T @ weight) * 1e-3
        found.append(np.abs(np.asarray(fitted.score(rows + factor @ step)) - np.asarray(fitted.score(rows))) / 1e-3)
    assert np.max(found) <= bound * (1 + 1e-6)
    assert np.max(found) > 0.8 * bound


def test_all_members_of_the_max_must_be_fooled() -> None:
    """Two independent members at distances 3 and 4 fail together at 5; either alone fails the min at 3."""
    weights, prior = np.eye(2), EllipticalPrior(np.eye(2))
    origin = np.array([[3.0, 4.0]])
    lengths = {}
    for combine in ("max", "min"):
        recipe = registry.load("probes", "orthogonal_ensemble", combine=combine)
        probe = FittedProbe(recipe, {"weights": weights, "biases": np.zeros(2)}, dim=2)
        state = item_event(probe, prior, origin, 0.0)
        angle = np.linspace(0, 2 * np.pi, 721)
        for r in np.linspace(2.5, 5.5, 301):
            u = r * np.stack([np.cos(angle), np.sin(angle)], axis=-1)[None]
            if (state.value(np.array([0]), u) <= 1e-3).any():
                lengths[combine] = r
                break
    assert lengths["min"] == pytest.approx(3.0, abs=0.02)
    assert lengths["max"] == pytest.approx(5.0, abs=0.02)


def test_planted_classes_have_one_direction_and_so_one_member() -> None:
    data = planted_classes()
    assert as_fitted("orthogonal_ensemble", data.activations, data.labels).notes["members"] == 1


@pytest.mark.parametrize("wrong", [{"combine": "sum"}, {"erase": "all"}, {"most": 0}], ids=str)
def test_refused_settings(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="orthogonal_ensemble combines by"):
        registry.load("probes", "orthogonal_ensemble", **wrong)
