"""A score is a function of its row alone: random and batch-dependent ones are refused, rounding is not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest

import elk_stress
from elk_stress import wrap
from elk_stress.probing.probe import FittedProbe, Traits
from elk_stress.probing.rowwise import check_rows

DIM = 8
WEIGHT = np.array([2.0] + [0.3] * 7)
_RNG = np.random.default_rng(np.random.SeedSequence([17, 1]))
LABELS = _RNG.integers(0, 2, 200)
ROWS = (_RNG.standard_normal((200, DIM)) + np.outer(LABELS, np.r_[3.0, np.zeros(7)])).astype(np.float32)

NOISE = np.random.default_rng(0)
COUNT = [0]
RUNNING = [0.0]


def _counted(x: np.ndarray) -> np.ndarray:
    COUNT[0] += 1
    return x @ WEIGHT + 0.01 * COUNT[0]


def _running(x: np.ndarray) -> np.ndarray:
    RUNNING[0] = 0.9 * RUNNING[0] + 0.1 * float(x.mean())
    return x @ WEIGHT - RUNNING[0]


def _once_in_four(x: np.ndarray) -> np.ndarray:
    COUNT[0] += 1
    return x @ WEIGHT + (COUNT[0] % 4 == 0)


RANDOM: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "noise": lambda x: x @ WEIGHT + 0.5 * NOISE.standard_normal(len(x)),
    "little noise": lambda x: x @ WEIGHT + 1e-3 * NOISE.standard_normal(len(x)),
    "little noise beside a large offset": lambda x: x @ WEIGHT + 1e3 + 1e-2 * NOISE.standard_normal(len(x)),
    "one draw a call": lambda x: x @ WEIGHT + NOISE.standard_normal(),
    "dropout": lambda x: (x * (NOISE.random(x.shape) > 0.1)) @ WEIGHT,
    "dropout far away": lambda x: np.where(np.abs(x).max(axis=1) > 15, x @ WEIGHT * NOISE.random(len(x)), x @ WEIGHT),
    "NaN at times": lambda x: np.where(NOISE.random(len(x)) < 0.2, np.nan, x @ WEIGHT),
    "a counter": _counted,
    "every fourth call": _once_in_four,
    "statistics that run on": _running,
}
BATCH: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "centred": lambda x: (x - x.mean(axis=0)) @ WEIGHT,
    "normalized": lambda x: (x @ WEIGHT) / (x @ WEIGHT).std(),
    "ranked": lambda x: np.argsort(np.argsort(x @ WEIGHT)).astype(float),
    "over the largest": lambda x: (x @ WEIGHT) / np.abs(x).max(),
    "the row before": lambda x: np.roll(x, 1, axis=0) @ WEIGHT,
    "the place in the batch": lambda x: x @ WEIGHT + 0.01 * np.arange(len(x)),
    "the size of the batch": lambda x: x @ WEIGHT + 0.01 * len(x),
    "the same noise at every call": lambda x: x @ WEIGHT + np.random.default_rng(3).standard_normal(len(x)),
    "no row alone": lambda x: (x - np.linalg.inv(np.atleast_2d(np.cov(x.T)))[0]) @ WEIGHT,
}
GOOD: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "linear": lambda x: x @ WEIGHT,
    "constant": lambda x: np.full(len(x), 3.0),
    "in single precision": lambda x: (x.astype(np.float32) @ WEIGHT.astype(np.float32)).astype(float),
    "beside a large offset": lambda x: x.astype(np.float32) @ WEIGHT.astype(np.float32) + np.float32(1e4),
    "logarithm": lambda x: np.log(x).sum(axis=1),
    "a step": lambda x: (x @ WEIGHT > 0).astype(float),
    "rounded": lambda x: np.round(100 * (x @ WEIGHT)) / 100,
}


def _plain(rule: Callable[[np.ndarray], np.ndarray]) -> Callable[[Any], np.ndarray]:
    """numpy's alone, so that neither jax nor torch takes it."""
    return lambda x: rule(np.asarray(x))


@pytest.mark.parametrize("name", RANDOM)
def test_random_scores_are_refused_by_wrap(name: str) -> None:
    COUNT[0] = 0
    with pytest.raises(ValueError, match=r"'mine' is random: the same rows.* scored twice differ .* eval mode"):
        wrap(_plain(RANDOM[name]), dim=DIM, name="mine")


@pytest.mark.parametrize("name", BATCH)
def test_scores_that_depend_on_the_batch_are_refused_by_wrap(name: str) -> None:
    with pytest.raises(ValueError, match=r"'mine' scores .*(by the other rows of its batch|in a batch alone)"):
        wrap(_plain(BATCH[name]), dim=DIM, name="mine")


@pytest.mark.parametrize("name", GOOD)
def test_scores_of_a_row_alone_pass(name: str) -> None:
    probe = wrap(_plain(GOOD[name]), dim=DIM)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(probe.score(ROWS.astype(float)), GOOD[name](ROWS.astype(float)))


@dataclass(frozen=True)
class Ruled:
    """A recipe of a third party, whose score is the rule of its name, whatever its traits say."""

    rule: str = "linear"
    name: ClassVar[str] = "ruled"
    traits: ClassVar[Traits] = Traits(linear=True)

    def fit(self, activations: np.ndarray, labels: np.ndarray, *, pairs: Any = None, seed: int = 0) -> FittedProbe:
        return FittedProbe(self, {"weight": WEIGHT, "bias": np.asarray(-1.0)})

    def score(self, xp: Any, parameters: Mapping[str, Any], activations: Any) -> Any:
        x = activations.reshape(-1, activations.shape[-1])
        return {**RANDOM, **BATCH, **GOOD}[self.rule](x).reshape(activations.shape[:-1])


@pytest.mark.parametrize("fitted", [True, False], ids=["fitted", "recipe"])
@pytest.mark.parametrize(
    ("rule", "words"),
    [("noise", "is random"), ("dropout far away", "is random"), ("centred", "other rows"), ("linear", "")],
)
def test_the_stress_test_finds_it_in_probes_that_never_met_wrap(rule: str, words: str, fitted: bool) -> None:
    probe = Ruled(rule).fit(ROWS, LABELS) if fitted else Ruled(rule)
    # far enough that what happens only far away happens
    rows = ROWS * (5 if rule == "dropout far away" else 1)

    def stressed() -> Any:
        return elk_stress.stress_activations(
            probe, rows, LABELS, attacks=(), controls=False, n_particles=50, threats=["item/isotropic0.3/gaussian"]
        )

    if words:
        with pytest.raises(ValueError, match=words):
            stressed()
    else:
        assert stressed().detection.auroc > 0.9


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("width", [16, 600])
def test_rounding_that_differs_between_shapes_of_batch_is_no_dependence(dtype: str, width: int) -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Linear(width, width), torch.nn.Linear(width, 1)

        def forward(self, x: Any) -> Any:
            return self.second(torch.relu(self.first(x)))

    module = Net().to(getattr(torch, dtype))
    assert wrap(module).traits.differentiable
    rows = np.random.default_rng(1).standard_normal((64, width)).astype(np.float32)
    rows[:, :2] += 300  # a massive dimension, as language models have them
    scored = check_rows(wrap(module).score, rows, "net", resolution=2.0**-8 / 32 if "16" in dtype else 2.0**-23)
    assert np.isfinite(scored).all()


def test_what_modules_and_functions_of_torch_and_jax_do_at_random_or_over_the_batch_is_refused() -> None:
    torch = pytest.importorskip("torch")
    import jax
    import jax.numpy as jnp

    weight, single = torch.tensor(WEIGHT, dtype=torch.float32), WEIGHT.astype(np.float32)
    norm, dropout = torch.nn.BatchNorm1d(DIM), torch.nn.Dropout(0.2)
    for made in (norm, dropout):
        with pytest.raises(ValueError, match=r"eval mode|training mode"):
            wrap(lambda x, made=made: made(x) @ weight, dim=DIM)
        made.eval()
        assert wrap(lambda x, made=made: made(x) @ weight, dim=DIM).traits.differentiable
    unkept = torch.nn.BatchNorm1d(DIM, track_running_stats=False)
    with pytest.raises(ValueError, match="batch"):
        wrap(torch.nn.Sequential(unkept, torch.nn.Linear(DIM, 1)))
    # jax draws once while it compiles, and would repeat it
    with pytest.raises(ValueError, match="is random"):
        wrap(lambda v: v @ single + NOISE.standard_normal(len(v)).astype(np.float32), dim=DIM)
    with pytest.raises(ValueError, match="other rows"):
        wrap(lambda v: v @ single + jax.random.normal(jax.random.key(0), (len(v),)), dim=DIM)
    with pytest.raises(ValueError, match="other rows"):
        wrap(lambda v: jnp.tanh(v - v.mean(axis=0)) @ single, dim=DIM)


def test_an_estimator_with_a_random_or_batch_dependent_step_is_refused() -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer

    for step, words in (
        (lambda x: x + 0.01 * NOISE.standard_normal(x.shape), "is random"),
        (lambda x: x - x.mean(axis=0), "other rows"),
    ):
        fitted = make_pipeline(FunctionTransformer(step), LogisticRegression()).fit(ROWS, LABELS)
        with pytest.raises(ValueError, match=words):
            wrap(fitted)


def test_what_works_in_place_leaves_the_callers_rows_alone() -> None:
    torch = pytest.importorskip("torch")

    class InPlace(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return torch.relu_(x).sum(-1)

    def doubled(x: Any) -> Any:
        x = np.asarray(x)
        x *= 2
        return x @ WEIGHT

    rows = ROWS.astype(float)
    for probe in (wrap(InPlace(), dim=DIM), wrap(doubled, dim=DIM)):
        probe.score(rows)
        probe.score(torch.as_tensor(ROWS))
    np.testing.assert_array_equal(rows, ROWS)


def test_a_score_that_is_no_number_on_moved_activations_names_the_probe_and_the_move() -> None:
    from elk_stress.thoughts.events import item_event
    from elk_stress.threats.priors import EllipticalPrior

    probe = wrap(_plain(lambda x: np.log(x).sum(axis=1)), dim=2, name="mine")
    state = item_event(probe, EllipticalPrior(np.eye(2), name="test"), np.full((1, 2), 2.0), 0.0)
    assert np.isfinite(state.value(np.arange(1), np.array([[[0.0, 0.0], [1.0, 0.0]]]))).all()
    with (
        np.errstate(invalid="ignore"),
        pytest.raises(ValueError, match=r"'mine' scores NaN or inf on 2 of 3 moved .* move is 4 in .* score: 1\)"),
    ):
        state.value(np.arange(1), np.array([[[-4.0, 0.0], [1.0, 0.0], [-5.0, 0.0]]]))


@pytest.mark.parametrize(("offset", "words"), [(0.0, "unmoved activations"), (6.0, "moved by draws of the prior")])
def test_a_probe_without_a_score_of_real_or_moved_activations_is_refused(offset: float, words: str) -> None:
    probe = wrap(_plain(lambda x: np.log(x[:, 0])), dim=DIM, name="mine")
    # far from where the logarithm ends, but not for moves of five times the spread
    rows = np.concatenate([ROWS, ROWS + 0.1, ROWS - 0.1]) * (1.0 if offset == 0 else 0.3) + offset
    with np.errstate(invalid="ignore"), pytest.raises(ValueError, match=rf"'mine' scores NaN or inf on .*{words}"):
        elk_stress.stress_activations(
            probe, rows, np.tile(LABELS, 3), attacks=(), controls=False, n_particles=50,
            threats=["item/isotropic5/gaussian"], groups=np.tile(np.arange(len(ROWS)), 3),
        )  # fmt: skip


def test_a_score_made_of_its_rounding_is_told_from_one_that_looks_at_other_rows() -> None:
    weight = np.r_[2.0, np.full(299, 0.05)]

    def summed(offset: float) -> Callable[[np.ndarray], np.ndarray]:
        def score(x: np.ndarray) -> np.ndarray:
            # rows alone are added up from the other end, as libraries take another routine for them
            terms = (x * weight).astype(np.float32)[:, :: 1 if len(x) > 1 else -1]
            return np.cumsum(terms, axis=1, dtype=np.float32)[:, -1] - np.float32(offset * weight.sum())

        return score

    rows = np.random.default_rng(2).standard_normal((64, 300))
    for offset in (0.0, 1e3, 1e6):
        check_rows(summed(offset), rows + offset, "mine")
    check_rows(summed(1e3), rows + 1e3, "mine", coarsest=0.1)
    with pytest.raises(ValueError, match=r"'mine' scores by rounding errors: .* double precision"):
        check_rows(summed(1e6), rows + 1e6, "mine", coarsest=0.1)


def test_a_module_in_single_precision_is_not_refused_for_activations_far_from_zero() -> None:
    torch = pytest.importorskip("torch")
    from elk_stress.testbeds.arrays import Arrays
    from elk_stress.thoughts.prepared import fit_probe, prepare

    weight = torch.tensor(np.r_[2.0, np.full(299, 0.05)], dtype=torch.float32)
    for offset in (0.0, 1e3, 1e5):

        class Own(torch.nn.Module):
            def __init__(self, offset: float) -> None:
                super().__init__()
                self.linear = torch.nn.Linear(300, 1)
                bias = -weight.double() @ torch.full((300,), offset, dtype=torch.float64) - 3
                self.linear.weight.data, self.linear.bias.data = weight[None], bias[None].float()

            def forward(self, x: Any) -> Any:
                return self.linear(x)[:, 0]

        rows = np.random.default_rng(2).standard_normal((200, 300)) + offset
        rows[:, 0] += 3 * LABELS
        fit_probe(prepare(Arrays(rows, LABELS)), wrap(Own(offset), dim=300))
