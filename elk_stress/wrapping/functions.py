"""Functions ``(n, d) -> (n,)`` as probes; which library they are written in is found out by trying.

In this order, on three rows:

1. jax traces it (shapes alone, nothing is computed) to floating scores: opaque with gradient.
2. numpy rows give a numpy array: opaque without gradient.
3. torch, where it is loaded, gives scores that its autograd carries back to the rows: opaque with gradient.

A function of plain operators (``v @ w``) is thus jax's, and has a gradient; one that asks for ``numpy.asarray`` of its
input cannot be traced, and is numpy's. Calling it on rows is all that is done with it: it must be pure, and take any
number of rows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from elk_stress.probe import FittedProbe
from elk_stress.wrapping.converted import one_score
from elk_stress.wrapping.opaque import Opaque

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
            attempt(score, x)
        except ImportError:
            continue
        except Exception as error:  # whatever somebody's function raises at arrays that it was not written for
            failed[library] = error
            continue
        gradient = library != "numpy"
        notes = {"from": f"{library} function", "score": "output"}
        how = f"opaque, with a gradient by {library}" if gradient else "opaque, without a gradient"
        recipe = Opaque(called, score, library, gradient, "float32")  # type: ignore[arg-type]
        return FittedProbe(recipe, {}, site, {**notes, "as": how}, dim)
    told = "; ".join(f"{library}: {type(error).__name__}: {str(error)[:200]}" for library, error in failed.items())
    raise ValueError(
        f"{called} does not map rows (3, {dim}) to scores (3,) in any library ({told}); pass a function of the whole "
        "batch, and its width as dim="
    )


def _trace_jax(score: Callable[[Any], Any], x: np.ndarray) -> None:
    import jax

    rows = jax.ShapeDtypeStruct(x.shape, np.float32)  # type: ignore[no-untyped-call]
    out = jax.eval_shape(score, rows)
    if not np.issubdtype(out.dtype, np.floating):
        raise TypeError(f"scores are {out.dtype}, which has no gradient")


def _call_numpy(score: Callable[[Any], Any], x: np.ndarray) -> None:
    out = score(x)
    if not isinstance(out, np.ndarray):
        raise TypeError(f"scores are {type(out).__name__}")


def _call_torch(score: Callable[[Any], Any], x: np.ndarray) -> None:
    if "torch" not in sys.modules:
        raise ImportError("torch")
    import torch

    rows = torch.as_tensor(x, dtype=torch.float32).requires_grad_(True)
    torch.autograd.grad(score(rows).sum(), rows)
