"""One code for numpy, torch and jax arrays.

Parameters cross into another namespace once, at the boundary (:func:`like`); activations never do: a score
that leaves its namespace has left the autodiff graph.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import numpy as np

__all__ = ["backend_of", "k_smallest", "like", "namespace", "to_numpy"]

Array = Any


def backend_of(array: Array) -> str:
    """``"numpy"``, ``"torch"`` or ``"jax"``: the library that ``array`` belongs to (tracers are jax)."""
    if "torch" in sys.modules and isinstance(array, sys.modules["torch"].Tensor):
        return "torch"
    if "jax" in sys.modules and isinstance(array, sys.modules["jax"].Array):
        return "jax"
    return "numpy"


def namespace(*arrays: Array) -> ModuleType:
    """The array-API namespace of ``arrays`` (array-api-compat's view of numpy, torch or jax.numpy)."""
    from array_api_compat import array_namespace

    return array_namespace(*arrays)


def like(parameter: np.ndarray, reference: Array) -> Array:
    """``parameter`` in the namespace, on the device and (if floating) in the dtype of ``reference``."""
    backend = backend_of(reference)
    floating = np.issubdtype(parameter.dtype, np.floating)
    if backend == "torch":
        torch = sys.modules["torch"]
        dtype = reference.dtype if floating and reference.dtype.is_floating_point else None
        return torch.as_tensor(np.array(parameter), device=reference.device, dtype=dtype)
    if backend == "jax":
        jnp = sys.modules["jax"].numpy
        return jnp.asarray(parameter, dtype=reference.dtype if floating else None)
    xp = namespace(reference)
    if xp.__name__.endswith("numpy"):
        return parameter.astype(reference.dtype, copy=False) if floating else parameter
    return xp.asarray(parameter, dtype=reference.dtype) if floating else xp.asarray(parameter)


def k_smallest(values: Array, k: int) -> Array:
    """Where the k smallest of ``values (*batch, n)`` are, ``(*batch, k)`` in no set order; for selecting, no slope.

    The array API has no partial sort; each library's own takes a fraction of the time of sorting or of k minima. Among
    values that are equal in float32 any may be chosen in jax, whose partial sort is slow for longer numbers.
    """
    backend = backend_of(values)
    if backend == "torch":
        return sys.modules["torch"].topk(values.detach(), k, dim=-1, largest=False, sorted=False).indices
    if backend == "jax":
        lax = sys.modules["jax"].lax
        return lax.top_k(-lax.stop_gradient(values).astype("float32"), k)[1]
    if isinstance(values, np.ndarray):
        return np.argpartition(values, k - 1, axis=-1)[..., :k]
    return namespace(values).argsort(values, axis=-1)[..., :k]


def to_numpy(array: Array) -> np.ndarray:
    """A numpy copy or view, detached and on the host. For results only, never inside a score."""
    if backend_of(array) == "torch":
        array = array.detach().cpu()
        # of floating types numpy has these alone
        known = str(array.dtype) in ("torch.float16", "torch.float32", "torch.float64")
        return np.asarray((array.float() if array.dtype.is_floating_point and not known else array).numpy())
    return np.asarray(array)
