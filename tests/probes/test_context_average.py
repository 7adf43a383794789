"""The average over reads: what it is, what a mask does, and how bits grow with the number of reads."""

from __future__ import annotations

import numpy as np
import pytest

from elk_stress.core import registry
from elk_stress.probing.probe import FittedProbe, as_fitted
from elk_stress.testing import planted_classes


def reads(tokens: int, *, seed: int = 0, noise: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """``(n, T, d)`` reads of planted items, and their labels."""
    data = planted_classes(separation=2.0, seed=seed)
    rng = np.random.default_rng(np.random.SeedSequence([seed, tokens]))
    extra = noise * rng.standard_normal((len(data.labels), tokens, data.activations.shape[1]))
    return data.activations[:, None] + extra, data.labels


@pytest.mark.parametrize("base", ["logistic", "mlp"])
def test_score_is_the_mean_of_the_bases_scores(base: str) -> None:
    x, labels = reads(3)
    fitted = as_fitted(registry.load("probes", "context_average", base=base), x, labels)
    alone = as_fitted(base, x.reshape(-1, x.shape[-1]), np.repeat(labels, 3))
    np.testing.assert_allclose(fitted.score(x), np.asarray(alone.score(x)).mean(axis=1), rtol=1e-9)
    assert fitted.traits.linear == (base == "logistic")


def test_a_linear_base_declares_the_mean_of_reads() -> None:
    x, labels = reads(4)
    fitted = as_fitted("context_average", x, labels)
    expected = x.mean(axis=1) @ fitted.parameters["weight"] + fitted.parameters["bias"]
    np.testing.assert_allclose(fitted.score(x), expected)


def test_masked_reads_count_neither_in_fitting_nor_in_scoring() -> None:
    x, labels = reads(3)
    mask = np.random.default_rng(np.random.SeedSequence(5)).random(x.shape[:2]) < 0.6
    mask[:, 0] = True
    absurd = np.where(mask[..., None], x, 1e6)
    fitted = as_fitted("context_average", absurd, labels, mask=mask)
    clean = as_fitted("logistic", x[mask], np.repeat(labels, mask.sum(axis=1)))
    np.testing.assert_array_equal(fitted.parameters["weight"], clean.parameters["weight"])
    scores = np.asarray(clean.score(x))
    expected = np.array([row[there].mean() for row, there in zip(scores, mask, strict=True)])
    np.testing.assert_allclose(fitted.score(absurd, mask), expected)
    assert fitted.notes["reads"] == mask.sum()


def test_no_read_scores_zero_with_a_finite_gradient() -> None:
    import torch

    x, labels = reads(2)
    fitted = as_fitted("context_average", x, labels)
    point = torch.tensor(x[:3], requires_grad=True)
    mask = torch.tensor([[False, False], [True, False], [True, True]])
    scores = fitted.score(point, mask)
    scores.sum().backward()
    assert scores[0].item() == 0.0
    assert torch.isfinite(point.grad).all()
    assert (point.grad[0] == 0).all()


def test_independent_reads_multiply_the_squared_distance() -> None:
    """beta_T = sqrt(T) beta_1 where every read moves by itself; no more than beta_1 where all move as one."""
    x, labels = reads(1)
    one = as_fitted("context_average", x, labels).parameters["weight"]
    for tokens in (2, 8):
        weight = np.tile(one, tokens) / tokens
        apart, together = np.eye(16 * tokens), np.tile(np.eye(16), (tokens, 1))
        assert np.linalg.norm(apart.T @ weight) == pytest.approx(np.linalg.norm(one) / np.sqrt(tokens))
        assert np.linalg.norm(together.T @ weight) == pytest.approx(np.linalg.norm(one))


def test_more_reads_rank_better() -> None:
    from elk_stress.probing.fit.held_out import auroc

    values = []
    for tokens in (1, 16):
        x, labels = reads(tokens, noise=3.0)
        new, truth = reads(tokens, seed=1, noise=3.0)
        values.append(auroc(np.asarray(as_fitted("context_average", x, labels).score(new)), truth))
    assert values[1] > values[0] + 0.1


def test_save_and_load(tmp_path) -> None:  # type: ignore[no-untyped-def]
    x, labels = reads(2)
    fitted = as_fitted(registry.load("probes", "context_average", base="lda"), x, labels)
    np.testing.assert_array_equal(FittedProbe.load(fitted.save(tmp_path)).score(x), fitted.score(x))


@pytest.mark.parametrize("base", ["ccs", "causal", "context_average"])
def test_refused_bases(base: str) -> None:
    x, labels = reads(2)
    recipe = registry.load("probes", "context_average")
    if base == "context_average":
        base = "recursive"
    with pytest.raises((ValueError, KeyError)):
        type(recipe)(base=base).fit(x, labels)


def test_one_class_left_is_refused() -> None:
    x, labels = reads(2)
    with pytest.raises(ValueError, match="one class only"):
        as_fitted("context_average", x, labels, mask=np.repeat(labels[:, None] == 1, 2, axis=1))
