"""What every fitted score must hold to: shapes, libraries, transforms, gradients, slopes. Tolerances stand here.

=====================  =================================================================================================
float64                1e-9 of the largest score (products of matrices block differently for other shapes)
float32                1e-4 of the largest score or activation
gradients              each point agrees within 1e-5 (torch, float64) or 1e-3 (jax, float32) of its own largest slope;
                       a score may have kinks (max, top-k, nearest): at least 90% of the points must agree
ties                   in each class 90% of the held-out rows have float32 scores of their own
slopes                 no pair of points is steeper than the probe's own bound, to a relative 1e-6
=====================  =================================================================================================
"""

from __future__ import annotations

import dataclasses
import importlib
from contextlib import suppress
from typing import Any

import numpy as np

from elk_stress.testing.case import Case, close, score, spread
from elk_stress.testing.shared import read_only, rotation, settings

__all__ = [
    "array_libraries",
    "gradients",
    "linear",
    "lipschitz",
    "rows_are_independent",
    "shapes",
    "transforms",
    "unsaturated",
]

_AGREE = 0.9
_DISTINCT = 0.9
_CORNER = 0.05


def shapes(case: Case) -> None:
    """Any batch shape, float32 and float64, small and large activations: scores of that shape and dtype, finite."""
    from hypothesis import example, given
    from hypothesis import strategies as st

    fitted, data = case.fitted, case.held_out

    @settings(20)
    @given(
        batch=st.lists(st.integers(0, 4), max_size=3).map(tuple),
        dtype=st.sampled_from(["float32", "float64"]),
        power=st.integers(-3, 2),
        seed=st.integers(0, 2**16),
    )
    @example(batch=(), dtype="float64", power=0, seed=0)
    @example(batch=(0,), dtype="float64", power=0, seed=0)
    @example(batch=(1,), dtype="float64", power=0, seed=0)
    @example(batch=(2, 3), dtype="float64", power=0, seed=0)
    def holds(batch: tuple[int, ...], dtype: str, power: int, seed: int) -> None:
        rng = np.random.default_rng(np.random.SeedSequence(seed))
        rows = rng.integers(0, len(data.labels), batch)
        activations = (data.activations[rows] * 10.0**power).astype(dtype)
        scores = score(fitted, activations, None if data.mask is None else data.mask[rows])
        kind = "(*batch, tokens, d)" if data.mask is not None else "(*batch, d)"
        assert np.shape(scores) == batch, f"activations {kind} with batch {batch} gave scores of {np.shape(scores)}"
        assert scores.dtype == dtype, f"activations are {dtype} but scores {scores.dtype}"
        assert np.isfinite(scores).all(), f"a score is not finite ({dtype}, activations times 1e{power})"

    holds()


def unsaturated(case: Case) -> None:
    """A score is logit-like: no probability, and in float32 no plateau on which held-out rows tie.

    A plateau has no gradient to climb, ranks nothing, and makes a threshold an accident of rounding. Refused are a
    class of held-out rows of which fewer than 90% of the float32 scores are distinct, and scores that all lie in [0, 1]
    and come within 0.05 of both ends, as a probability does on classes that are far apart. A maximum, a rank among
    neighbours or a score rounded finely has few ties and passes.
    """
    data = case.held_out
    scores = np.asarray(score(case.fitted, data.activations.astype(np.float32), data.mask))
    for label in (0, 1):
        own = scores[data.labels == label]
        share = len(np.unique(own)) / len(own)
        assert share >= _DISTINCT, (
            f"only {share:.0%} of the float32 scores of held-out rows of class {label} are distinct, expected "
            f"{_DISTINCT:.0%}: the score is saturated; return what stands before the squashing"
        )
    low, high = float(scores.min()), float(scores.max())
    inside = 0.0 <= low < _CORNER and 1 - _CORNER < high <= 1.0
    assert not inside, f"all scores lie in [{low:.3g}, {high:.3g}], as a probability does; return its logit"


def rows_are_independent(case: Case) -> None:
    """A row scores the same alone, beside others, and in any order."""
    from hypothesis import given
    from hypothesis import strategies as st

    fitted, data = case.fitted, case.held_out
    size = spread(fitted, data)
    full = score(fitted, data.activations, data.mask)

    @settings(12)
    @given(seed=st.integers(0, 2**16), count=st.integers(1, 60))
    def holds(seed: int, count: int) -> None:
        rng = np.random.default_rng(np.random.SeedSequence(seed))
        rows = rng.permutation(len(full))[:count]
        mask = None if data.mask is None else data.mask[rows]
        found = score(fitted, data.activations[rows], mask)
        close(found, full[rows], size, 1e-9, "a row scores differently beside other rows, or in another order")
        alone = score(fitted, data.activations[rows[0]], None if mask is None else mask[0])
        close(alone, full[rows[0]], size, 1e-9, "a row scores differently alone than beside other rows")

    holds()


def array_libraries(case: Case) -> None:
    """numpy, read-only numpy, the strict reference, torch and jax: equal scores of the same kind and dtype.

    A probe that is not differentiable is only required to score numpy.
    """
    fitted, data = case.fitted, case.some(12)
    activations, mask = data.activations, data.mask
    expected = score(fitted, activations, mask)
    size = spread(fitted, data) + float(np.abs(_there(activations, mask)).max()) + 1.0
    single = activations.astype(np.float32)
    copies: dict[str, tuple[Any, Any, float]] = {
        "read-only numpy": (read_only(activations), mask if mask is None else read_only(mask), 1e-12),
        "float32 numpy": (single, mask, 1e-4),
    }
    if case.probe.traits.differentiable:
        import jax.numpy as jnp
        import torch

        flags, jflags = (None, None) if mask is None else (torch.tensor(mask), jnp.asarray(mask))
        copies["torch"] = torch.tensor(activations), flags, 1e-9
        copies["float32 torch"] = torch.tensor(single), flags, 1e-4
        copies["jax"] = jnp.asarray(single), jflags, 1e-4
        # the strict reference comes with the test extra; without it the other libraries are checked all the same
        with suppress(ModuleNotFoundError):
            strict = importlib.import_module("array_api_strict")
            copies["array-api-strict"] = (
                strict.asarray(activations),
                mask if mask is None else strict.asarray(mask),
                1e-9,
            )
    for library, (copied, flags, tolerance) in copies.items():
        scores = score(fitted, copied, flags)
        assert type(scores).__module__.split(".")[0] == type(copied).__module__.split(".")[0], (
            f"{library}: activations are {type(copied)} but scores {type(scores)}; a score must not leave its library"
        )
        assert scores.dtype == copied.dtype, f"{library}: activations are {copied.dtype} but scores {scores.dtype}"
        close(scores, expected, size, tolerance, f"{library}: scores differ from numpy's")


def transforms(case: Case) -> None:
    """``jax.jit``, ``jax.vmap``, ``torch.func.vmap`` and gradients under vmap: what batched searches run."""
    import jax
    import jax.numpy as jnp
    import torch

    fitted, data = case.fitted, case.some(8)
    activations, mask = data.activations, data.mask
    expected = score(fitted, activations, mask)
    size = spread(fitted, data) + float(np.abs(_there(activations, mask)).max()) + 1.0
    single = jnp.asarray(activations, dtype=jnp.float32)
    given = (single,) if mask is None else (single, jnp.asarray(mask))

    def one(*read: Any) -> Any:
        return score(fitted, *read)

    close(jax.jit(one)(*given), expected, size, 1e-4, "scores differ under jax.jit")
    values, slopes = jax.jit(jax.vmap(jax.value_and_grad(one)))(*given)
    close(values, expected, size, 1e-4, "scores differ under jax.vmap")
    tensors = tuple(torch.tensor(each) for each in ((activations,) if mask is None else (activations, mask)))
    close(torch.func.vmap(one)(*tensors), expected, size, 1e-9, "scores differ under torch.func.vmap")
    steep = torch.func.vmap(torch.func.grad(one))(*tensors)
    assert tuple(steep.shape) == tuple(slopes.shape) == activations.shape, (
        f"gradients of activations {activations.shape} have shapes {tuple(steep.shape)} (torch), {slopes.shape} (jax)"
    )


def gradients(case: Case) -> None:
    """Gradients of torch, jax and finite differences agree almost everywhere; nothing flows into absent tokens."""
    import jax
    import jax.numpy as jnp
    import torch

    fitted, data = case.fitted, case.some(40)
    rng = np.random.default_rng(np.random.SeedSequence([case.seed, 17]))
    points = data.activations + rng.standard_normal(data.activations.shape)
    mask = data.mask
    if mask is not None:
        points = np.where(mask[..., None], points, 0.0)
    tensor = torch.tensor(points, requires_grad=True)
    scores = score(fitted, tensor, None if mask is None else torch.tensor(mask))
    if not scores.requires_grad:
        assert _flat(case, points, mask), "torch: scores carry no gradient; the score left the autodiff graph"
        return
    slope = torch.autograd.grad(scores.sum(), tensor)[0].numpy()
    assert np.isfinite(slope).all(), "torch: a gradient is not finite"
    if mask is not None:
        assert (slope[~mask] == 0).all(), "torch: a token that is not there has a gradient"
    numeric = _finite_differences(case, points, mask)
    axes = tuple(range(1, points.ndim))
    size = np.abs(numeric).max(axis=axes)
    size = size + 1e-3 * size.max() + 1e-9
    _mostly(np.abs(slope - numeric).max(axis=axes) <= 1e-5 * size, "torch: gradients differ from finite differences")
    flags = () if mask is None else (jnp.asarray(mask),)
    traced = jax.jit(jax.grad(lambda x, *m: score(fitted, x, *m).sum()))(jnp.asarray(points, dtype=jnp.float32), *flags)
    assert np.isfinite(np.asarray(traced)).all(), "jax: a gradient is not finite"
    _mostly(np.abs(np.asarray(traced) - slope).max(axis=axes) <= 1e-3 * size, "jax: gradients differ from torch's")


def linear(case: Case) -> None:
    """``activations @ weight + bias`` (of tokens: the mean of that over those which are there), turned together."""
    from hypothesis import given
    from hypothesis import strategies as st

    fitted, data = case.fitted, case.held_out
    dim = data.dim
    weight, bias = fitted.parameters["weight"], fitted.parameters["bias"]
    assert weight.shape == (dim,), f"a linear probe has weight of shape ({dim},), got {weight.shape}"
    assert bias.shape == (), f"a linear probe has bias of shape (), got {bias.shape}"
    size = 1.0 + np.abs(weight).sum() * 10 + abs(float(bias)) * 10

    @settings(20)
    @given(st.integers(0, 2**32 - 1))
    def holds(seed: int) -> None:
        rng = np.random.default_rng(np.random.SeedSequence(seed))
        rows = rng.integers(0, len(data.labels), 5)
        x = rng.standard_normal(data.activations[rows].shape)
        mask = None if data.mask is None else data.mask[rows]
        each = x @ weight + bias
        expected = each if mask is None else (each * mask).sum(axis=-1) / mask.sum(axis=-1)
        found = score(fitted, x, mask)
        close(found, expected, size, 1e-9, "it declares linear=True but its score is not activations @ weight + bias")
        turn = rotation(dim, seed)
        turned = dataclasses.replace(fitted, parameters={**fitted.parameters, "weight": turn @ weight})
        close(score(turned, x @ turn.T, mask), found, size, 1e-9, "rotating activations and weight changed scores")

    holds()


def lipschitz(case: Case) -> None:
    """Where the probe bounds its slope, no pair of points drawn is steeper, nor any gradient; the bound is finite."""
    from hypothesis import given
    from hypothesis import strategies as st

    fitted, data = case.fitted, case.held_out
    if case.probe.traits.tokens:
        # factors move all reads together; the engine asks for no bound there
        return

    @settings(10)
    @given(seed=st.integers(0, 2**16), rank=st.integers(1, data.dim), reach=st.sampled_from([1e-3, 0.1, 1.0, 30.0]))
    def holds(seed: int, rank: int, reach: float) -> None:
        rng = np.random.default_rng(np.random.SeedSequence(seed))
        factor = rng.standard_normal((data.dim, rank)) * np.exp(rng.standard_normal(rank))
        bound = fitted.lipschitz(factor)
        if bound is None:
            return
        assert np.isfinite(bound), f"the bound on its slope is {bound}; a probe that knows none returns None"
        rows = data.activations[rng.integers(0, len(data.labels), 32)]
        u = rng.standard_normal((32, rank)) * reach
        # half of the pairs go along the steepest way there is at the first point
        step = rng.standard_normal((32, rank)) * reach
        step[:16] = reach * _uphill(case, rows[:16] + u[:16] @ factor.T) @ factor
        length = np.linalg.norm(step, axis=-1)
        first, second = (score(fitted, rows + at @ factor.T) for at in (u, u + step))
        noise = 1e-12 * (np.abs(first) + np.abs(second) + np.abs(rows).max())
        steep = (np.abs(second - first) - noise)[length > 0] / length[length > 0]
        assert steep.max(initial=0.0) <= bound * (1 + 1e-6), (
            f"between two points the score has slope {steep.max():.6g} in u, above the {bound:.6g} that lipschitz says"
        )

    holds()


def _there(activations: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    return activations if mask is None else activations[mask]


def _mostly(agree: np.ndarray, promise: str) -> None:
    share = float(agree.mean())
    assert share >= _AGREE, (
        f"{promise} at {1 - share:.0%} of {len(agree)} points; at most {1 - _AGREE:.0%} may be kinks"
    )


def _finite_differences(case: Case, points: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """Central differences ``(n, ..., d)`` in float64; the step is 1e-5."""
    step = 1e-5
    width = int(np.prod(points.shape[1:]))
    shift = (np.eye(width) * step).reshape(width, 1, *points.shape[1:])
    masks = None if mask is None else np.broadcast_to(mask, (width, *mask.shape))
    up, down = (np.asarray(score(case.fitted, points + sign * shift, masks)) for sign in (1.0, -1.0))
    return np.asarray(((up - down) / (2 * step)).T.reshape(points.shape))


def _flat(case: Case, points: np.ndarray, mask: np.ndarray | None) -> bool:
    return bool((_finite_differences(case, points, mask) == 0).all())


def _uphill(case: Case, points: np.ndarray) -> np.ndarray:
    """Unit gradients ``(n, d)``; random where there are none."""
    found = _finite_differences(case, points, None) if not case.probe.traits.differentiable else None
    if found is None:
        import torch

        tensor = torch.tensor(points, requires_grad=True)
        scores = case.fitted.score(tensor)
        found = torch.autograd.grad(scores.sum(), tensor)[0].numpy() if scores.requires_grad else np.ones_like(points)
    return np.asarray(found / np.maximum(np.linalg.norm(found, axis=-1, keepdims=True), 1e-12))
