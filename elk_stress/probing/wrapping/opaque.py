r"""A probe that is somebody else's function: called as it is, from numpy, torch or jax.

``score(x) = f(x)`` with f a numpy, torch or jax function of rows ``(n, d) -> (n,)``. In its own library it is called
natively. From another one it is called across a bridge that carries gradients, where f has any, by hand:

=============  =========================  ================================  ==================================
f is           from numpy                 from torch                        from jax (also jitted, vmapped)
=============  =========================  ================================  ==================================
numpy          itself                     on a detached copy; no gradient   ``pure_callback``; no gradient
torch          under ``no_grad``          itself                            ``pure_callback`` and custom VJP
jax            itself                     ``autograd.Function``             itself
=============  =========================  ================================  ==================================

Outside of ``jit`` and ``vmap`` jax values are scored without any callback, and so does the engine: on a machine of one
core a callback that is handed a large array can wait for the very thread that runs it (jax 0.10). jax is never entered
from within one. Bridges are differentiable once, in reverse mode (no forward mode, no second derivatives). What such a
probe cannot do is be saved: it is code, and to store code is to run it on loading.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

from elk_stress.core.arrays import backend_of, to_numpy
from elk_stress.probing.probe import FittedProbe, Traits
from elk_stress.probing.rowwise import FLOAT32

__all__ = ["Opaque", "resolution", "runs_in_jax"]

Array = Any


@dataclass(frozen=True, eq=False)
class Opaque:
    """Somebody's function as a recipe; made by :func:`elk_stress.wrap`.

    Attributes:
        name: for reports.
        function: ``(n, d) -> (n,)`` in the arrays of ``library``; pure.
        library: what it is written in.
        differentiable: whether it has a gradient (in torch or jax) that is that of its scores.
        dtype: what a torch function reads, ``"float32"`` or the like; activations are cast to it and scores back.
        device: where a torch function lives.
    """

    name: str
    function: Callable[[Any], Any] = field(repr=False)
    library: Literal["numpy", "torch", "jax"]
    differentiable: bool
    dtype: str = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.differentiable and self.library == "numpy":
            raise ValueError("a numpy function has no gradient here; write it in torch or jax, or declare none")

    @property
    def traits(self) -> Traits:
        """Nothing to learn; a gradient where the function has one."""
        return Traits(learns=False, differentiable=self.differentiable)

    def fit(
        self, activations: np.ndarray, labels: np.ndarray, *, pairs: np.ndarray | None = None, seed: int = 0
    ) -> FittedProbe:
        """Refuses: the object came fitted.

        Raises:
            TypeError: always.
        """
        raise TypeError(f"{self.name!r} is already fitted; pass the wrapped probe itself")

    def score(self, xp: Any, parameters: Mapping[str, Array], activations: Array) -> Array:
        flat = xp.reshape(activations, (-1, activations.shape[-1]))
        return xp.reshape(self._rows(xp, flat), activations.shape[:-1])

    @property
    def unsaveable(self) -> str:
        """Why no file can hold it, and the way out."""
        return (
            f"it calls somebody's {self.library} code, which cannot be stored as numbers, and to load code is to run "
            "it; keep the object with its own library and wrap it again, or wrap one that converts (linear "
            "scikit-learn models and MLPs, torch.nn.Sequential)"
        )

    def __reduce__(self) -> Any:
        raise TypeError(f"the probe {self.name!r} cannot be pickled: {self.unsaveable}")

    def _rows(self, xp: Any, x: Array) -> Array:
        """Scores ``(n,)`` of rows ``(n, d)`` of any library, in that library."""
        came = backend_of(x)
        if came == "jax":
            native = self.library == "jax" and self.differentiable
            return self.function(x).astype(x.dtype) if native else self._from_jax(x)
        if came == "torch":
            if self.library == "torch" and self.differentiable:
                return self._torch(x).to(device=x.device, dtype=x.dtype)
            return self._from_torch(x)
        rows = x if isinstance(x, np.ndarray) else np.asarray(x)
        scores = self.values(rows).astype(rows.dtype, copy=False)
        return scores if isinstance(x, np.ndarray) else xp.asarray(scores)

    def _torch(self, x: Any) -> Any:
        import torch

        # a copy, for a function that works in place (a ReLU) must not change the caller's rows
        return self.function(x.to(device=self.device, dtype=getattr(torch, self.dtype), copy=True))

    def values(self, x: np.ndarray) -> np.ndarray:
        """Numpy rows to numpy scores, whatever the function is written in; never called inside jax for a jax one."""
        if len(x) == 0:
            return np.zeros(0)
        if self.library == "torch":
            import torch

            with torch.no_grad():
                return to_numpy(self._torch(torch.as_tensor(np.array(x))).double())
        if self.library == "jax":
            import jax.numpy as jnp

            return np.asarray(self._jitted["value"](jnp.asarray(x)))
        scores = self.function(np.array(x))
        if np.iscomplexobj(scores) or np.ma.is_masked(scores):
            kind = "complex" if np.iscomplexobj(scores) else "masked"
            raise ValueError(
                f"the probe {self.name!r} gives {kind} scores, of which a part would be lost; return one real number "
                "per row"
            )
        return np.asarray(scores)

    def values_and_slopes(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scores ``(n,)`` and gradients ``(n, d)`` of numpy rows, whatever ``differentiable`` says.

        Raises:
            Exception: the library's own, where its graph is cut.
        """
        return self.values(x), self._slopes(x, np.ones(len(x)))

    def _slopes(self, x: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """``weights_i grad f(x_i)`` of numpy rows."""
        if self.library == "torch":
            import torch

            with torch.enable_grad():
                rows = torch.as_tensor(np.array(x)).requires_grad_(True)
                scores = self._torch(rows)
                by = torch.as_tensor(np.array(weights), device=scores.device, dtype=scores.dtype)
                (slope,) = torch.autograd.grad(scores, rows, grad_outputs=by)
            return to_numpy(slope)
        import jax.numpy as jnp

        return np.asarray(self._jitted["slope"](jnp.asarray(x), jnp.asarray(weights)))

    @cached_property
    def _jitted(self) -> dict[str, Any]:
        import jax

        def slope(x: Any, weights: Any) -> Any:
            scores, pull = jax.vjp(self.function, x)
            return pull(weights.astype(scores.dtype))[0]

        return {"value": jax.jit(self.function), "slope": jax.jit(slope)}

    # -- bridges --------------------------------------------------------------------------------------------------

    def _from_torch(self, x: Any) -> Any:
        import torch

        if not self.differentiable:
            return torch.as_tensor(self.values(to_numpy(x)), device=x.device, dtype=x.dtype)
        return _torch_bridge().apply(x, self)

    def _from_jax(self, x: Any) -> Any:
        return self._jax_bridge(x)

    def _native(self, function: Callable[..., np.ndarray], *arrays: Any) -> Any:
        """Outside of jit nothing is called back: jax waits while its values, not yet traced, are scored."""
        import jax.numpy as jnp

        return jnp.asarray(function(*(np.asarray(a) for a in arrays)), dtype=arrays[0].dtype)

    @cached_property
    def _jax_bridge(self) -> Callable[[Any], Any]:
        """The function for jax; one per probe, so that jitted code that calls it is compiled once."""
        import jax

        def rows(function: Callable[..., np.ndarray], width: int, *arrays: Any) -> np.ndarray:
            """Flatten whatever axes vmap put in front, of which some are of size 1."""
            given = [np.asarray(a) for a in arrays]
            lead = np.broadcast_shapes(*(a.shape[: a.ndim - own] for a, own in zip(given, (2, 1), strict=False)))
            whole = [
                np.broadcast_to(a, (*lead, *a.shape[a.ndim - own :])) for a, own in zip(given, (2, 1), strict=False)
            ]
            n = whole[0].shape[-2]
            flat = [w.reshape(-1, *w.shape[len(lead) + 1 :]) for w in whole]
            shape = (*lead, n, width) if width else (*lead, n)
            return np.asarray(function(*flat)).astype(given[0].dtype).reshape(shape)

        def value(x: Any) -> Any:
            if not isinstance(x, jax.core.Tracer):
                return self._native(lambda a: self.values(a.reshape(-1, a.shape[-1])).reshape(a.shape[:-1]), x)
            shape = jax.ShapeDtypeStruct(x.shape[:-1], x.dtype)  # type: ignore[no-untyped-call]
            return jax.pure_callback(lambda a: rows(self.values, 0, a), shape, x, vmap_method="expand_dims")

        if not self.differentiable:
            bridge = jax.custom_vjp((lambda x: self.function(x).astype(x.dtype)) if self.library == "jax" else value)
            bridge.defvjp(self._refuse_gradient, self._refuse_gradient)
            return bridge

        def forward(x: Any) -> Any:
            return value(x), x

        def backward(x: Any, weights: Any) -> Any:
            if not isinstance(x, jax.core.Tracer) and not isinstance(weights, jax.core.Tracer):
                return (self._native(self._slopes, x, weights),)
            shape = jax.ShapeDtypeStruct(x.shape, x.dtype)  # type: ignore[no-untyped-call]
            return (
                jax.pure_callback(
                    lambda a, w: rows(self._slopes, a.shape[-1], a, w), shape, x, weights, vmap_method="expand_dims"
                ),
            )

        bridge = jax.custom_vjp(value)
        bridge.defvjp(forward, backward)
        return bridge

    def _refuse_gradient(self, *_: Any) -> Any:
        raise TypeError(
            f"the probe {self.name!r} has no gradient (it is {self.library} code); use what asks for scores alone, or "
            "wrap a torch module or a jax function that has one"
        )


def runs_in_jax(probe: FittedProbe) -> bool:
    """Whether a probe scores by jax operations alone, so that jax may compile what calls it."""
    recipe = _innermost(probe)
    return not isinstance(recipe, Opaque) or recipe.library == "jax"


def resolution(probe: FittedProbe) -> float:
    """Relative error of one rounding in a probe's arithmetic: that of float32, but for modules in half precision.

    Those round what they store and add up in float32, which is why a part of their own error counts.
    """
    recipe = _innermost(probe)
    if not isinstance(recipe, Opaque) or recipe.library != "torch":
        return FLOAT32
    import torch

    return max(FLOAT32, float(torch.finfo(getattr(torch, recipe.dtype)).eps) / 32)


def _innermost(probe: FittedProbe) -> Any:
    recipe: Any = probe.probe
    # a recipe around another one (several reads laid flat) holds it as ``recipe``
    while not isinstance(recipe, Opaque) and hasattr(recipe, "recipe"):
        recipe = recipe.recipe
    return recipe


def _torch_bridge() -> Any:
    """The ``autograd.Function`` that calls a jax function; made on first use, since torch is not imported before."""
    global _BRIDGE
    if _BRIDGE is None:
        import torch

        class Bridge(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Any, probe: Opaque) -> Any:
                ctx.save_for_backward(x)
                ctx.probe = probe
                return torch.as_tensor(np.array(probe.values(to_numpy(x))), device=x.device, dtype=x.dtype)

            @staticmethod
            @torch.autograd.function.once_differentiable
            def backward(ctx: Any, weights: Any) -> Any:
                (x,) = ctx.saved_tensors
                slope = ctx.probe._slopes(to_numpy(x), to_numpy(weights))
                return torch.as_tensor(np.array(slope), device=x.device, dtype=x.dtype), None

        _BRIDGE = Bridge
    return _BRIDGE


_BRIDGE: Any = None
