"""Functions ``(n, d) -> (n,)`` as probes; which library they are written in is found out by trying.

In this order, on three rows:

1. jax traces it (shapes alone, nothing is computed) to floating scores: opaque with gradient.
2. numpy rows give a numpy array: opaque without gradient.
3. torch, where it is loaded, gives a tensor, of rows in the first dtype that it takes: opaque with gradient.

It is then refused where it is random or looks at other rows (:mod:`elk_stress.probing.rowwise`), and what is no
gradient of its scores (:mod:`.gradients`) is not used.

A function of plain operators (``v @ w``) is thus jax's, and has a gradient; one that asks for ``numpy.asarray`` of its
input cannot be traced, and is numpy's. Calling it on rows is all that is done with it: it must be pure, and take any
number of rows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from elk_stress.probing.probe import FittedProbe
from elk_stress.probing.wrapping.converted import check_opaque, one_score
from elk_stress.probing.wrapping.gradients import missing_gradient
from elk_stress.probing.wrapping.opaque import Opaque
from elk_stress.probing.wrapping.torch_modules import checked_torch

__all__ = ["from_function"]


def from_function(function: Callable[[Any], Any], name: str | None, dim: int | None, site: str) -> FittedProbe:
    called = name or str(getattr(function, "__name__", type(function).__name__))
    if called == "<lambda>":
        called = "function"
    if dim is None:
        raise TypeError(f"a function does not tell how many features it reads; pass wrap({called}, dim=...)")
    x = np.random.default_rng(np.random.SeedSequence([0x3A9])).standard_normal((3, dim))

    def score(rows: Any) -> Any:
        return one_score(function(rows), rows.shape[0], called)

    failed: dict[str, Exception] = {}
    for library, attempt in (("jax", _trace_jax), ("numpy", _call_numpy), ("torch", _call_torch)):
        try:
            dtype = attempt(score, x)
        except ImportError:
            continue
        except Exception as error:  # whatever somebody's function raises at arrays that it was not written for
            failed[library] = error
            continue
        notes = {"from": f"{library} function", "score": "output"}
        recipe = Opaque(called, score, library, library != "numpy", dtype)  # type: ignore[arg-type]
        if library == "torch":
            return checked_torch(recipe, notes, dim, site, None)
        return (_from_jax if library == "jax" else _from_numpy)(recipe, notes, dim, site)
    told = "; ".join(f"{library}: {type(error).__name__}: {str(error)[:200]}" for library, error in failed.items())
    raise ValueError(
        f"{called} does not map rows (3, {dim}) to scores (3,) in any library ({told}); pass a function of the whole "
        "batch, and its width as dim="
    )


def _from_jax(recipe: Opaque, notes: dict[str, Any], dim: int, site: str) -> FittedProbe:
    import jax.numpy as jnp

    # not compiled: what is drawn or counted while jax traces a function would look like a constant
    check_opaque(lambda x: recipe.function(jnp.asarray(x)), dim, recipe.name)
    eps = float(np.finfo(jnp.zeros(0, dtype=float).dtype).eps)
    attempt = (recipe.values, recipe.values_and_slopes, 1e-5 if eps < 1e-10 else 1e-2, eps)
    why = missing_gradient(dim, recipe.values_and_slopes, [attempt])
    if why is None:
        return FittedProbe(recipe, {}, site, {**notes, "as": "opaque, with a gradient by jax"}, dim)
    blind = replace(recipe, differentiable=False)
    return FittedProbe(blind, {}, site, {**notes, "as": "opaque, without a gradient", "gradient": why}, dim)


def _from_numpy(recipe: Opaque, notes: dict[str, Any], dim: int, site: str) -> FittedProbe:
    check_opaque(recipe.values, dim, recipe.name)
    return FittedProbe(recipe, {}, site, {**notes, "as": "opaque, without a gradient"}, dim)


def _trace_jax(score: Callable[[Any], Any], x: np.ndarray) -> str:
    import jax

    rows = jax.ShapeDtypeStruct(x.shape, np.float32)  # type: ignore[no-untyped-call]
    out = jax.eval_shape(score, rows)
    if not np.issubdtype(out.dtype, np.floating):
        raise TypeError(f"scores are {out.dtype}, which has no gradient")
    return "float32"


def _call_numpy(score: Callable[[Any], Any], x: np.ndarray) -> str:
    with np.errstate(all="ignore"):
        out = score(np.array(x))
    if not isinstance(out, np.ndarray):
        raise TypeError(f"scores are {type(out).__name__}")
    if not np.issubdtype(out.dtype, np.number) and out.dtype != bool:
        raise TypeError(f"scores are {out.dtype}")
    return "float64"


def _call_torch(score: Callable[[Any], Any], x: np.ndarray) -> str:
    if "torch" not in sys.modules:
        raise ImportError("torch")
    import torch

    failed = None
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        try:
            out = score(torch.as_tensor(x, dtype=dtype))
        except RuntimeError as error:  # weights of another dtype
            failed = failed or error
            continue
        if not isinstance(out, torch.Tensor):
            raise TypeError(f"scores are {type(out).__name__}")
        return str(dtype).removeprefix("torch.")
    assert failed is not None
    raise failed
