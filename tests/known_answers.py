"""Rare events whose probability is known: what every estimator is judged against.

Each case is ``g(u)`` with ``u ~ N(0, I_dim)`` and failure when ``g <= 0``. One definition on the operations that
numpy, jax.numpy and torch share serves all three. ``KNOWN[name].function`` takes numpy ``(n, dim)`` and returns
``(n,)``; ``KNOWN[name].jax()`` and ``.torch()`` give the same function for the other two.

Half-spaces are exact for any dimension. The RP problems are the black-box reliability challenge's, with its published
reference values. The tanh network's value was established by counting (see :data:`MLP_P`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["HALF_SPACES", "KNOWN", "MLP_P", "RP", "KnownAnswer", "half_space"]

Array = Any


@dataclass(frozen=True)
class KnownAnswer:
    """A limit state with a known answer.

    Attributes:
        name: key in :data:`KNOWN`.
        define: ``(xp, u) -> g``: xp is numpy, jax.numpy or torch.
        dim: coordinates.
        p: true probability of failure.
        relative_error: one standard error of ``p`` itself, relative; 0 where exact or published to its last digit.
        log_p: natural logarithm of p, exact where p would underflow.
    """

    name: str
    define: Callable[[Any, Array], Array]
    dim: int
    p: float
    relative_error: float = 0.0
    log_p: float | None = None

    @property
    def bits(self) -> float:
        """``-log2 p``."""
        return -(math.log(self.p) if self.log_p is None else self.log_p) / math.log(2.0)

    @property
    def function(self) -> Callable[[np.ndarray], np.ndarray]:
        """The numpy function."""
        return functools.partial(self.define, np)

    def jax(self) -> Callable[[Array], Array]:
        """The jax function."""
        import jax.numpy as jnp

        return functools.partial(self.define, jnp)

    def torch(self) -> Callable[[Array], Array]:
        """The torch function."""
        import torch

        return functools.partial(self.define, torch)


def half_space(dim: int, beta: float) -> KnownAnswer:
    """``g = beta - w.u`` with a fixed unit w that leans on every coordinate: ``p = Phi(-beta)``."""
    from scipy.special import log_ndtr

    weight = np.cos(np.arange(1, dim + 1) * 1.7) + 1.5
    weight /= np.linalg.norm(weight)

    def define(xp: Any, u: Array) -> Array:
        return beta - u @ _constant(weight, u)

    log_p = float(log_ndtr(-beta))
    return KnownAnswer(f"half_space_d{dim}_b{-log_p / math.log(2.0):.0f}", define, dim, math.exp(log_p), 0.0, log_p)


def _rp28(xp: Any, u: Array) -> Array:
    return (78064.4 + 11709.7 * u[:, 0]) * (0.0104 + 0.00156 * u[:, 1]) - 146.14


def _rp31(xp: Any, u: Array) -> Array:
    return 2.0 - u[:, 1] + 256.0 * u[:, 0] ** 4


def _rp33(xp: Any, u: Array) -> Array:
    return xp.minimum(-u.sum(-1) + 3.0 * math.sqrt(3.0), 3.0 - u[:, 2])


def _rp54(xp: Any, u: Array) -> Array:
    return -_log_ndtr(-u).sum(-1) - 8.951


def _rp63(xp: Any, u: Array) -> Array:
    return 0.1 * (u[:, 1:] ** 2).sum(-1) - u[:, 0] - 4.5


def _rp89(xp: Any, u: Array) -> Array:
    return xp.minimum(-(u[:, 0] ** 2) - u[:, 1] + 8.0, -u[:, 0] / 5.0 - u[:, 1] + 6.0)


def _rp110(xp: Any, u: Array) -> Array:
    h1 = xp.where(u[:, 0] <= 3.5, 0.85 - 0.1 * u[:, 0], 4.0 - u[:, 0])
    h2 = xp.where(u[:, 1] <= 2.0, 2.3 - u[:, 1], 0.5 - 0.1 * u[:, 1])
    return xp.minimum(h1, h2)


MLP_DIM, MLP_HIDDEN, MLP_OFFSET = 32, 24, 7.0
# weights from a formula, not from a generator whose stream could change between versions
_I, _J = np.arange(1.0, MLP_DIM + 1)[:, None], np.arange(1.0, MLP_HIDDEN + 1)[None, :]
_MLP_FIRST = np.cos(1.3 * _I * _J + 0.4 * _I**2) * math.sqrt(2.0 / MLP_DIM)
_MLP_BIAS = 0.3 * np.sin(2.1 * np.arange(1, MLP_HIDDEN + 1))
_MLP_SECOND = np.cos(0.9 * np.arange(1, MLP_HIDDEN + 1) ** 2) + 0.2


def _mlp(xp: Any, u: Array) -> Array:
    hidden = xp.tanh(u @ _constant(_MLP_FIRST, u) + _constant(_MLP_BIAS, u))
    return MLP_OFFSET - hidden @ _constant(_MLP_SECOND, u)


# importance sampling from a Gaussian fitted to the failure region by cross-entropy, mixed with a tenth of the prior:
# 8e6 draws, relative standard error 0.2%; counting 4e8 draws of the prior found 1060 failures, 2.65e-6 +- 3%
MLP_P, MLP_RELATIVE_ERROR = 2.6930e-6, 0.0020


def _constant(value: np.ndarray, like: Array) -> Array:
    if isinstance(like, np.ndarray):
        return value.astype(like.dtype, copy=False)
    module = type(like).__module__
    if module.startswith("torch"):
        import torch

        return torch.as_tensor(value, dtype=like.dtype, device=like.device)
    import jax.numpy as jnp

    return jnp.asarray(value, dtype=like.dtype)


def _log_ndtr(u: Array) -> Array:
    if isinstance(u, np.ndarray):
        from scipy.special import log_ndtr

        return log_ndtr(u)
    if type(u).__module__.startswith("torch"):
        import torch

        return torch.special.log_ndtr(u)
    from jax.scipy.special import log_ndtr

    return log_ndtr(u)


HALF_SPACES = {
    case.name: case for case in (half_space(2, 2.0), half_space(16, 4.0), half_space(64, 6.0), half_space(512, 7.0345))
}
RP = {
    case.name: case
    for case in (
        KnownAnswer("RP28", _rp28, 2, 1.453e-7),
        KnownAnswer("RP31", _rp31, 2, 3.226681e-3),
        KnownAnswer("RP33", _rp33, 3, 2.575598e-3),
        KnownAnswer("RP54", _rp54, 20, 9.906031e-4),
        KnownAnswer("RP63", _rp63, 100, 3.769436e-4),
        KnownAnswer("RP89", _rp89, 2, 5.471281e-3),
        KnownAnswer("RP110", _rp110, 2, 3.195788e-5),
    )
}
KNOWN: dict[str, KnownAnswer] = {
    **HALF_SPACES,
    "tanh_mlp": KnownAnswer("tanh_mlp", _mlp, MLP_DIM, MLP_P, MLP_RELATIVE_ERROR),
    **RP,
}
