"""``wrap``: what is converted scores as the object does, the rest is called as it is, and what cannot be is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.decomposition import PCA, TruncatedSVD
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis, QuadraticDiscriminantAnalysis
from sklearn.ensemble import IsolationForest, RandomForestClassifier
from sklearn.feature_selection import SelectKBest
from sklearn.linear_model import LinearRegression, LogisticRegression, RidgeClassifier, SGDClassifier
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MaxAbsScaler, MinMaxScaler, PolynomialFeatures, RobustScaler, StandardScaler
from sklearn.svm import SVC, LinearSVC

import elk_stress
from elk_stress import wrap
from elk_stress.thoughts.event_bits import event_bits
from elk_stress.thoughts.events import item_event
from elk_stress.threats.priors import EllipticalPrior

DIM = 12
_RNG = np.random.default_rng(np.random.SeedSequence([5, 0x3A9]))
X = 3 * _RNG.standard_normal((300, DIM)) + 5
Y = (X[:, 0] - X[:, 3] + 0.5 * _RNG.standard_normal(300) > 0).astype(int)
Z = 4 * _RNG.standard_normal((50, DIM)) + 3

LINEAR = {
    "logistic": LogisticRegression(),
    "whitened": make_pipeline(StandardScaler(), PCA(6, whiten=True), LogisticRegression()),
    "svd": make_pipeline(MinMaxScaler(), TruncatedSVD(5, random_state=0), LinearSVC()),
    "robust": make_pipeline(RobustScaler(), "passthrough", RidgeClassifier()),
    "selected": make_pipeline(MaxAbsScaler(), SelectKBest(k=4), SGDClassifier(random_state=0)),
    "nested": make_pipeline(make_pipeline(StandardScaler(), PCA(8)), LogisticRegression()),
    "lda": LinearDiscriminantAnalysis(),
    "search": GridSearchCV(make_pipeline(StandardScaler(), LogisticRegression()), {"logisticregression__C": [0.1, 1]}),
    "linear kernel": SVC(kernel="linear"),
    "regression": LinearRegression(),
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_estimators_become_one_exact_direction(name: str) -> None:
    fitted = LINEAR[name].fit(X, Y)
    probe = wrap(fitted, site="layers.3")
    expected = fitted.decision_function(Z) if hasattr(fitted, "decision_function") else fitted.predict(Z)
    assert probe.traits.linear
    assert probe.dim == DIM
    assert probe.site == "layers.3"
    np.testing.assert_allclose(probe.score(Z), expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("activation", ["relu", "tanh", "logistic", "identity"])
def test_networks_of_scikit_learn_become_layers_with_the_logit_as_score(activation: str) -> None:
    fitted = make_pipeline(
        StandardScaler(), MLPClassifier((8, 4), activation=activation, solver="lbfgs", alpha=10.0, max_iter=5000)
    ).fit(X, Y)
    probe = wrap(fitted)
    p = fitted.predict_proba(Z)[:, 1]
    np.testing.assert_allclose(probe.score(Z), np.log(p) - np.log1p(-p), atol=1e-8)
    assert probe.traits.linear == (activation == "identity")
    assert probe.traits.differentiable
    regression = MLPRegressor(
        hidden_layer_sizes=(5,), activation=activation, solver="lbfgs", alpha=10.0, max_iter=5000
    ).fit(X, Y)
    np.testing.assert_allclose(wrap(regression).score(Z), regression.predict(Z), atol=1e-10)


def test_what_is_not_affine_stays_opaque_and_exact() -> None:
    for fitted in (
        SVC(),
        QuadraticDiscriminantAnalysis(),
        make_pipeline(MinMaxScaler(clip=True), LogisticRegression()),
        make_pipeline(PolynomialFeatures(2), StandardScaler(), LogisticRegression(max_iter=5000)),
    ):
        probe = wrap(fitted.fit(X, Y))
        assert not probe.traits.differentiable
        np.testing.assert_array_equal(probe.score(Z), fitted.decision_function(Z))
    forest = RandomForestClassifier(20, random_state=0).fit(X, Y)
    p = np.clip(forest.predict_proba(Z)[:, 1], 1e-6, 1 - 1e-6)
    np.testing.assert_allclose(wrap(forest).score(Z), np.log(p / (1 - p)), rtol=1e-12)


def test_detectors_of_the_normal_are_negated() -> None:
    far = np.full((1, DIM), 60.0)
    for detector in (IsolationForest(random_state=0), GaussianMixture(2, random_state=0)):
        probe = wrap(detector.fit(X))
        assert probe.score(far)[0] > np.asarray(probe.score(X)).max() - 1e-12


def _modules() -> dict[str, Any]:
    torch = pytest.importorskip("torch")
    nn = torch.nn
    return {
        "relu": nn.Sequential(nn.Linear(DIM, 8), nn.ReLU(), nn.Linear(8, 1)),
        "nested": nn.Sequential(
            nn.LayerNorm(DIM), nn.Linear(DIM, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Dropout(0.5),
            nn.Sequential(nn.Linear(8, 4), nn.SiLU(), nn.Identity()), nn.Linear(4, 1), nn.Flatten(0),
        ),
        "two logits": nn.Sequential(
            nn.Linear(DIM, 8), nn.LeakyReLU(0.1), nn.Linear(8, 6), nn.GELU(approximate="tanh"), nn.Linear(6, 4),
            nn.Sigmoid(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2),
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["relu", "nested", "two logits"])
def test_sequential_modules_become_layers_with_the_same_scores_and_gradients(name: str) -> None:
    torch = pytest.importorskip("torch")
    import jax
    import jax.numpy as jnp

    torch.manual_seed(0)
    module = _modules()[name].double()
    with torch.no_grad():
        module(3 * torch.randn(64, DIM, dtype=torch.float64) + 1)  # batch statistics other than 0 and 1
    probe = wrap(module)
    module.eval()
    assert probe.name == "layers"
    x = torch.tensor(Z, requires_grad=True)
    out = module(x)
    expected = out[:, 1] - out[:, 0] if name == "two logits" else out.reshape(-1)
    (slope,) = torch.autograd.grad(expected.sum(), x)
    np.testing.assert_allclose(probe.score(Z), expected.detach().numpy(), atol=1e-10)
    (own,) = torch.autograd.grad(probe.score(x).sum(), x)
    np.testing.assert_allclose(own.numpy(), slope.numpy(), atol=1e-10)
    traced = jax.jit(jax.grad(lambda v: probe.score(v).sum()))(jnp.asarray(Z))
    np.testing.assert_allclose(np.asarray(traced), slope.numpy(), atol=1e-4)


def test_other_modules_are_frozen_copies_that_carry_gradients_everywhere() -> None:
    torch = pytest.importorskip("torch")
    import jax
    import jax.numpy as jnp

    torch.manual_seed(0)

    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(DIM, 5)

        def forward(self, x: Any) -> Any:
            return torch.sin(self.inner(x)).sum(-1, keepdim=True)

    module = Odd().double()
    probe = wrap(module)
    x = torch.tensor(Z, requires_grad=True)
    expected = module(x)[:, 0]
    (slope,) = torch.autograd.grad(expected.sum(), x)
    np.testing.assert_allclose(probe.score(Z), expected.detach().numpy(), atol=1e-12)
    np.testing.assert_allclose(probe.score(Z.reshape(5, 10, DIM)).ravel(), expected.detach().numpy(), atol=1e-12)
    rows = jnp.asarray(Z)
    for gradient in (
        jax.grad(lambda v: probe.score(v).sum()),
        jax.jit(jax.grad(lambda v: probe.score(v).sum())),
        jax.vmap(jax.grad(probe.score)),
    ):
        np.testing.assert_allclose(np.asarray(gradient(rows)), slope.numpy(), atol=1e-4)
    with torch.no_grad():
        module.inner.weight.zero_()
    np.testing.assert_allclose(probe.score(Z), expected.detach().numpy(), atol=1e-12)


def test_functions_are_told_apart_by_what_they_accept() -> None:
    torch = pytest.importorskip("torch")
    import jax.numpy as jnp

    weight = np.linspace(-1, 1, DIM)
    traced = wrap(lambda v: jnp.tanh(v @ weight.astype(np.float32)), dim=DIM)
    assert traced.traits.differentiable
    x = torch.tensor(Z, requires_grad=True)
    (slope,) = torch.autograd.grad(traced.score(x).sum(), x)
    expected = (1 - np.tanh(Z @ weight) ** 2)[:, None] * weight
    np.testing.assert_allclose(slope.numpy(), expected, atol=1e-5)
    plain = wrap(lambda v: np.sort(np.asarray(v))[:, -1], dim=DIM)
    assert not plain.traits.differentiable
    np.testing.assert_array_equal(plain.score(Z), Z.max(axis=1))
    np.testing.assert_array_equal(plain.score(torch.tensor(Z)).numpy(), Z.max(axis=1))


def test_directions_come_bare_or_with_a_bias() -> None:
    weight = np.linspace(-1, 1, DIM)
    np.testing.assert_allclose(wrap((weight, 2.0)).score(Z), Z @ weight + 2.0)
    np.testing.assert_allclose(wrap(weight[None]).score(Z), Z @ weight)
    probe = wrap(weight, name="mine")
    assert probe.name == "mine"
    assert wrap(probe) is probe


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: wrap(LogisticRegression()), ValueError, "call its fit"),
        (lambda: wrap(LogisticRegression), TypeError, "pass a fitted object"),
        (lambda: wrap(LogisticRegression().fit(X, np.arange(300) % 3)), ValueError, "3 classes"),
        (lambda: wrap(LogisticRegression().fit(X, Y), dim=7), ValueError, "leave dim out"),
        (lambda: wrap(lambda v: v[:, 0]), TypeError, "dim="),
        (lambda: wrap(lambda v: v, dim=DIM), ValueError, r"\(3,\)"),
        (lambda: wrap("nonsense"), TypeError, "expected a fitted scikit-learn"),
        (lambda: wrap(np.ones((3, 4))), ValueError, "one direction"),
    ],
)
def test_what_cannot_be_wrapped_is_refused_with_the_way_out(make: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_an_opaque_probe_refuses_gradients_and_files(tmp_path: Any) -> None:
    import pickle

    import jax
    import jax.numpy as jnp

    probe = wrap(RandomForestClassifier(5, random_state=0).fit(X, Y))
    with pytest.raises(TypeError, match="no gradient"):
        jax.grad(lambda v: probe.score(v).sum())(jnp.asarray(Z))
    with pytest.raises(TypeError, match="wrap it again"):
        pickle.dumps(probe.probe)
    with pytest.raises(ValueError, match="wrap it again"):
        probe.save(tmp_path)


def test_converted_probes_are_saved_and_score_identically(tmp_path: Any) -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    for name, module in _modules().items():
        probe = wrap(module)
        loaded = elk_stress.FittedProbe.load(probe.save(tmp_path / name))
        assert loaded.probe == probe.probe
        np.testing.assert_array_equal(loaded.score(Z), probe.score(Z))


def test_bits_of_an_opaque_copy_of_a_linear_probe_agree_with_the_closed_form() -> None:
    """8 events of 2.7 to 14 bits: all 95% intervals, widened by half, hold the exact value."""
    rng = np.random.default_rng(np.random.SeedSequence([5, 1]))
    weight = rng.standard_normal(16)
    prior = EllipticalPrior(np.diag(np.exp(0.3 * rng.standard_normal(16))), name="test")
    spread = float(prior.standard_deviation(weight))
    origins = np.linspace(1.0, 3.85, 8)[:, None] * spread * weight / (weight @ weight)
    exact = event_bits(item_event(wrap(weight), prior, origins, 0.0), max_bits=100, n_particles=500, seed=0)
    state = item_event(wrap(_numpy_only(weight), dim=16), prior, origins, 0.0)
    assert not state.has_gradient
    found = event_bits(state, max_bits=100, n_particles=500, seed=0)
    slack = 0.25 * (found.high - found.low)
    assert (found.low - slack <= exact.value).all()
    assert (exact.value <= found.high + slack).all()
    assert np.abs(found.value - exact.value).max() < 0.5
    assert not found.gradients.any()
    with pytest.raises(TypeError, match="no gradient"):
        state.value_and_gradient(np.arange(8), np.zeros((8, 1, 16)))


def _numpy_only(weight: np.ndarray) -> Any:
    return lambda v: np.asarray(v) @ weight


def test_a_forest_is_stressed_end_to_end() -> None:
    rng = np.random.default_rng(np.random.SeedSequence([5, 2]))
    n, contexts, d = 120, 6, 6
    labels = np.arange(n) % 2
    activations = rng.standard_normal((n, 1, d)) + 0.4 * rng.standard_normal((contexts, d))
    activations = activations + 0.3 * rng.standard_normal((n, contexts, d))
    activations[..., 0] += 3 * labels[:, None]
    fitted = RandomForestClassifier(10, random_state=0, min_samples_leaf=5)
    fitted.fit(activations[:, 0], labels)
    result = elk_stress.stress_activations(
        wrap(fitted),
        activations.astype(np.float32),
        labels,
        threats=["item/natural/gaussian"],
        attacks=["gradient", "black_box", "natural_thoughts"],
        budget=50,
        n_particles=100,
        controls=False,
        seed=0,
    )
    (row,) = result.threats.values()
    assert row.detection.auroc > 0.9
    assert 0 < row.headline.value < 30
    ran = {attack.attack: attack.status for attack in row.attacks}
    assert ran["gradient"] == "does not apply: the probe has no gradient"
    assert ran["black_box"] == ran["natural_thoughts"] == "ok"
    assert result.audit is not None


def test_a_jax_function_is_stressed_end_to_end() -> None:
    """Its gradient is used, and what the attack breaks is what the bits say can be broken."""
    import jax.numpy as jnp

    rng = np.random.default_rng(np.random.SeedSequence([5, 6]))
    n, contexts, d = 120, 6, 6
    labels = np.arange(n) % 2
    activations = rng.standard_normal((n, 1, d)) + 0.4 * rng.standard_normal((contexts, d))
    activations = activations + 0.3 * rng.standard_normal((n, contexts, d))
    activations[..., 0] += 3 * labels[:, None]
    probe = wrap(lambda v: jnp.tanh(0.3 * v[:, 0]) + 0.05 * jnp.sin(v[:, 1]), dim=d, name="bent")
    result = elk_stress.stress_activations(
        probe,
        activations.astype(np.float32),
        labels,
        threats=["item/natural/gaussian"],
        attacks=["gradient"],
        budget=50,
        n_particles=100,
        controls=False,
        seed=0,
    )
    (row,) = result.threats.values()
    assert (result.probe, row.detection.auroc > 0.9, row.status) == ("bent", True, "ok")
    assert 0 < row.headline.value < 30
    (attack,) = row.attacks
    assert (attack.attack, attack.status) == ("gradient", "ok")
    assert attack.gradients > 0
    assert attack.success > 0.9


@pytest.mark.parametrize("kind", ["Logistic", "MassMean", "MLP", "Bilinear"])
def test_probes_of_probelab_score_as_they_do_there(kind: str) -> None:
    probelab = pytest.importorskip("probelab")
    torch = pytest.importorskip("torch")
    rows = probelab.Activations(torch.tensor(X, dtype=torch.float32), dims="bh")
    fitted = getattr(probelab.probes, kind)(seed=0).fit(rows, torch.tensor(Y))
    probe = wrap(fitted)
    with torch.no_grad():
        expected = fitted(torch.tensor(Z, dtype=torch.float32)).numpy()
    np.testing.assert_allclose(probe.score(Z), expected, atol=1e-4, rtol=1e-5)
    assert probe.traits.linear == (kind in ("Logistic", "MassMean"))


def test_probelab_objects_that_were_not_fitted_are_refused() -> None:
    probelab = pytest.importorskip("probelab")
    with pytest.raises(ValueError, match="not fitted"):
        wrap(probelab.probes.Logistic())


def test_a_torch_module_of_ones_own_has_the_bits_of_its_converted_twin() -> None:
    """The same network, opaque and as layers: gradients agree, and so do bits, within both intervals."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(1)
    stack = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Tanh(), torch.nn.Linear(6, 1))

    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = stack

        def forward(self, x: Any) -> Any:
            return self.inner(x)

    opaque, layers = wrap(Own(), dim=8), wrap(stack)
    assert (opaque.probe.name, layers.probe.name) == ("Own", "layers")
    prior = EllipticalPrior(0.5 * np.eye(8), name="test")
    origins = np.random.default_rng(np.random.SeedSequence([5, 3])).standard_normal((4, 8))
    threshold = np.asarray(layers.score(origins)) - 0.35
    events = [item_event(probe, prior, origins, threshold) for probe in (opaque, layers)]
    u = np.random.default_rng(np.random.SeedSequence([5, 4])).standard_normal((4, 3, 8))
    (g, slope), (expected, expected_slope) = (e.value_and_gradient(np.arange(4), u) for e in events)
    np.testing.assert_allclose(g, expected, atol=1e-5)
    np.testing.assert_allclose(slope, expected_slope, atol=1e-5)
    found, twin = (event_bits(e, max_bits=60, n_particles=300, seed=0) for e in events)
    assert (found.low <= twin.high + 0.1).all()
    assert (twin.low <= found.high + 0.1).all()


def test_without_a_slope_no_corner_is_known() -> None:
    from elk_stress.thoughts.events import nearest_kept

    prior = EllipticalPrior(np.eye(4), name="test")
    corner = nearest_kept(prior, np.zeros((2, 4)), np.ones(2), np.ones((2, 1, 4)), 0.1)
    assert np.isnan(corner).all()
