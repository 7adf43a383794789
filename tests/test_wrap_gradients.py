"""A gradient is used only where it is the slope of the scores: cut, flat and wrong ones are found out by ``wrap``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import elk_stress
from elk_stress import wrap

torch = pytest.importorskip("torch")

DIM = 8
WEIGHT = np.array([2.0] + [0.3] * 7)
W = torch.tensor(WEIGHT)


class Rule(torch.nn.Module):
    def __init__(self, rule: Callable[[Any], Any]) -> None:
        super().__init__()
        self.rule = rule

    def forward(self, x: Any) -> Any:
        return self.rule(x)


def _w(x: Any) -> Any:
    return x @ W.to(x.dtype)


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, by: Any) -> Any:
        return by


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return torch.sin(x)

    @staticmethod
    def backward(ctx: Any, by: Any) -> Any:
        return 2 * by


CUT: dict[str, Callable[[Any], Any]] = {
    "no_grad": torch.no_grad()(_w),
    "inference_mode": torch.inference_mode()(_w),
    "detach": lambda x: _w(x.detach()),
    "numpy": lambda x: torch.as_tensor(x.numpy() @ WEIGHT.astype(x.numpy().dtype)),
    "numpy, detached": lambda x: torch.as_tensor(x.detach().numpy() @ WEIGHT),
    "a step": lambda x: (_w(x) > 0).float(),
    "argmax": lambda x: x.argmax(-1).float(),
}
FLAT: dict[str, Callable[[Any], Any]] = {
    "rounded": lambda x: torch.round(10 * _w(x)) / 10,
    "sign": lambda x: torch.sign(_w(x)),
}
WRONG: dict[str, Callable[[Any], Any]] = {
    "straight through a step": lambda x: StraightThrough.apply(_w(x)),
    "straight through a rounding": lambda x: _w(x) + (torch.round(_w(x)) - _w(x)).detach(),
    "backward of its own": lambda x: Doubled.apply(_w(x)),
    "a detached part": lambda x: _w(x) + (x**2).sum(-1).detach(),
}
RIGHT: dict[str, Callable[[Any], Any]] = {
    "linear": _w,
    "computed in single precision": lambda x: x.float() @ W.float(),
    "kinks": lambda x: torch.relu(x).sum(-1) - torch.relu(-3 * x[:, 0]),
    "largest": lambda x: x.max(-1).values,
    "over a norm": lambda x: _w(x / x.norm(dim=-1, keepdim=True)),
    "of positive rows": lambda x: torch.log(x).sum(-1),
    "saturated": lambda x: torch.sigmoid(1e4 * _w(x)),
    "fast waves": lambda x: torch.sin(100 * _w(x)),
    "large offset": lambda x: _w(x) + 1e3,
    "constant": lambda x: 0 * x.sum(-1) + 1,
    "partly a step": lambda x: _w(x) + (x[:, 0] > 0),
}


@pytest.mark.parametrize(
    ("name", "words"),
    [(n, "no way back") for n in CUT]
    + [(n, "zero or NaN everywhere") for n in FLAT]
    + [(n, "not that of") for n in WRONG],
)
def test_a_module_without_a_gradient_of_its_scores_becomes_opaque_without_one(name: str, words: str) -> None:
    import jax
    import jax.numpy as jnp

    rule = {**CUT, **FLAT, **WRONG}[name]
    probe = wrap(Rule(rule), dim=DIM)
    assert not probe.traits.differentiable
    assert probe.notes["as"] == "opaque, without a gradient"
    assert words in probe.notes["gradient"]
    rows = np.random.default_rng(0).standard_normal((5, DIM)).astype(np.float32)
    expected = Rule(rule)(torch.tensor(rows)).detach().numpy()
    np.testing.assert_allclose(probe.score(rows), expected, rtol=1e-6)
    # rows that ask for gradients are scored all the same
    scored = probe.score(torch.tensor(rows, requires_grad=True))
    assert not scored.requires_grad
    np.testing.assert_allclose(scored.numpy(), expected, rtol=1e-6)
    with pytest.raises(TypeError, match="no gradient"):
        jax.grad(lambda v: probe.score(v).sum())(jnp.asarray(rows))


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("name", RIGHT)
def test_modules_whose_gradient_is_right_keep_it(name: str, dtype: str) -> None:
    module = Rule(RIGHT[name])
    module.register_buffer("of", torch.zeros(1, dtype=getattr(torch, dtype)))
    probe = wrap(module, dim=DIM)
    assert probe.traits.differentiable
    assert "gradient" not in probe.notes


def test_functions_of_torch_and_jax_are_held_to_the_same() -> None:
    import jax
    import jax.numpy as jnp

    single = WEIGHT.astype(np.float32)

    @jax.custom_vjp
    def crooked(x: Any) -> Any:
        return jnp.sin(x)

    crooked.defvjp(lambda x: (jnp.sin(x), x), lambda x, by: (2 * by,))
    without = {
        "torch, cut": torch.no_grad()(lambda v: torch.sigmoid(v @ W.float())),
        "torch, flat": lambda v: torch.round(v @ W.float()),
        "jax, flat": lambda v: jnp.round(v @ single),
        "jax, cut": lambda v: jax.lax.stop_gradient(jnp.tanh(v @ single)),
        "jax, wrong": lambda v: crooked(v @ single),
    }
    for name, function in without.items():
        probe = wrap(function, dim=DIM)
        assert not probe.traits.differentiable, name
        assert "gradient" in probe.notes, name
        rows = np.random.default_rng(0).standard_normal((5, DIM)).astype(np.float32)
        given = jnp.asarray(rows) if name.startswith("jax") else torch.tensor(rows)
        np.testing.assert_allclose(np.asarray(probe.score(given)), np.asarray(function(given)), rtol=1e-5)
        with pytest.raises(TypeError, match="no gradient"):
            jax.grad(lambda v, probe=probe: probe.score(v).sum())(jnp.asarray(rows))
    for function in (
        lambda v: torch.sigmoid(v @ W.float()),
        lambda v: torch.sigmoid(v @ W),  # float64 weights
        lambda v: torch.sigmoid(v @ W.bfloat16()),
        lambda v: jnp.tanh(v @ single),
        lambda v: jax.nn.relu(v).sum(axis=-1),
    ):
        assert wrap(function, dim=DIM).traits.differentiable


def test_a_gradientless_module_is_stressed_by_its_scores_alone() -> None:
    rng = np.random.default_rng(np.random.SeedSequence([17, 2]))
    labels = np.arange(120) % 2
    rows = rng.standard_normal((120, DIM)).astype(np.float32)
    rows[:, 0] += 3 * labels
    result = elk_stress.stress_activations(
        wrap(Rule(CUT["no_grad"]), dim=DIM), rows, labels, attacks=["gradient"], controls=False,
        n_particles=100, threats=["item/isotropic0.3/gaussian"], budget=50,
    )  # fmt: skip
    (row,) = result.threats.values()
    assert 0 < row.headline.value < 30
    assert row.attacks[0].status == "does not apply: the probe has no gradient"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.nn.Linear(DIM, 1, device="meta"), "meta device"),
        (lambda: torch.nn.LazyLinear(1), "lazy layers"),
        (lambda: Rule(lambda x: (_w(x), x)), "gives tuple"),
        (lambda: Rule(lambda x: {"logits": _w(x)}), "gives dict"),
        (lambda: Rule(lambda x: _w(x).sum()), r"gives \(\)"),
        (lambda: Rule(lambda x: _w(x)[:, None, None]), r"gives \(32, 1, 1\)"),
        (lambda: torch.nn.Embedding(DIM, 1), "real rows of 8 features"),
    ],
)
def test_modules_that_are_no_probes_are_refused_in_words(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        wrap(make(), dim=DIM)


@pytest.mark.parametrize(
    ("function", "what"),
    [(lambda x: np.asarray(x)[:, 0] + 1j, "complex"), (lambda x: np.ma.masked_less(np.asarray(x)[:, 0], 0), "masked")],
)
def test_scores_that_would_lose_a_part_are_refused(function: Any, what: str) -> None:
    with pytest.raises(ValueError, match=f"{what} scores"):
        wrap(function, dim=4)
