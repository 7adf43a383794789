"""A secret subspace: confined to r random directions, of no use against whoever has the gradient."""

from __future__ import annotations

import numpy as np
import pytest

from elk_stress.core import registry
from elk_stress.probing.probe import as_fitted
from elk_stress.testing import planted_classes


def test_weight_lies_in_the_subspace_that_the_secret_draws() -> None:
    data = planted_classes()
    fits = [
        as_fitted(registry.load("probes", "secret_subspace", secret=s, rank=3, l2=l2), data.activations, data.labels)
        for s, l2 in ((0, 0.01), (0, 0.1), (0, 1.0), (0, 10.0), (1, 0.01))
    ]
    scaled = np.stack([fit.parameters["weight"] for fit in fits]) * data.activations.std(axis=0)
    scaled /= np.linalg.norm(scaled, axis=1, keepdims=True)
    # four penalties, one secret: never more than three directions; another secret: another direction
    assert np.linalg.svd(scaled[:4], compute_uv=False)[3] < 1e-9
    outside = scaled[4] - scaled[:3].T @ np.linalg.lstsq(scaled[:3].T, scaled[4])[0]
    assert np.linalg.norm(outside) > 0.3


def test_at_full_rank_it_is_logistic_regression_on_rotated_features() -> None:
    """The penalty sees rotated features at another scale: the same direction, to within their scaling."""
    data = planted_classes(n_pairs=600)
    full = as_fitted(registry.load("probes", "secret_subspace", rank=16, l2=1e-5), data.activations, data.labels)
    plain = as_fitted(registry.load("probes", "logistic", l2=1e-5), data.activations, data.labels)
    a, b = full.parameters["weight"], plain.parameters["weight"]
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.999


def test_rank_is_chosen_by_held_out_rows() -> None:
    data = planted_classes(separation=3.0)
    fitted = as_fitted(registry.load("probes", "secret_subspace"), data.activations, data.labels)
    tried = {int(r): value for r, value in fitted.notes["held_out_auroc"].items()}
    assert set(tried) == {2, 4, 8}
    assert tried[fitted.notes["rank"]] >= max(tried.values()) - 0.01


def test_secrecy_ends_with_one_gradient() -> None:
    import jax

    data = planted_classes()
    fitted = as_fitted("secret_subspace", data.activations, data.labels)
    weight = jax.grad(lambda x: fitted.score(x))(jax.numpy.zeros(16))
    np.testing.assert_allclose(np.asarray(weight), fitted.parameters["weight"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"secret": -1}, {"shares": (0.0,)}, {"shares": ()}], ids=str)
def test_refused_settings(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="secret_subspace"):
        registry.load("probes", "secret_subspace", **wrong)


def test_rank_above_the_width_is_refused() -> None:
    data = planted_classes()
    with pytest.raises(ValueError, match="exceeds the 16 features"):
        as_fitted(registry.load("probes", "secret_subspace", rank=17), data.activations, data.labels)
