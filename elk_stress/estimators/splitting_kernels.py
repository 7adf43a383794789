r"""Moves that leave the prior restricted to ``{g < level}`` invariant: what splitting refreshes its clones with.

Both kernels are exact for any g (black box, no gradient): the prior is rotated into itself and a point that leaves the
level set is refused. Their proposals differ in kind, so that runs that agree are evidence and runs that do not, a flag.

``pcn``: ``u' = sqrt(1-t^2) u + t nu`` with a fresh normal ``nu``, accepted if ``g(u') < level``. One draw of a normal
vector and one evaluation a move.

``elliptical_slice``: rotate ``(u, nu)`` in their plane by an angle drawn uniformly from a bracket that shrinks towards
0 until ``g(u cos a + nu sin a) < level`` (Murray, Adams & MacKay 2010, 1001.0175). The pair ``(u, nu)`` is jointly
standard normal and stays so after the rotation, and under any orthogonal map of the rotated ``nu`` drawn independently
of it. So one normal vector serves several moves, each after a random signed cyclic shift of its coordinates: a move
then costs a few evaluations and no normal draws, which pays when g is cheaper than ``dim`` random numbers.

Shapes: u ``(rows, n, dim)``, g ``(rows, n)``, level and step ``(rows,)``. Steps are tuned between sweeps only, on what
earlier sweeps did, so that within a sweep the kernel is fixed and invariance holds exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

import numpy as np

__all__ = ["KERNELS", "EllipticalSlice", "Kernel", "Normals", "Pcn", "Scratch"]

Evaluate = Callable[[np.ndarray, np.ndarray], np.ndarray]

# below this many coordinates a fresh vector costs less than recycling one, and a signed shift mixes it poorly
_RECYCLE_FROM_DIM = 32
# fills smaller than this are not worth handing to a thread
_THREAD_FROM = 1 << 16


class Moved(NamedTuple):
    """What a kernel returns: new points (a view of scratch memory), their g, and the share of first tries accepted."""

    u: np.ndarray
    g: np.ndarray
    accepted: np.ndarray


class Kernel(Protocol):
    """A family of moves with one step per row."""

    @property
    def cost(self) -> int:
        """The most evaluations that one move of one point can take."""
        ...

    @property
    def target(self) -> float:
        """The share of accepted first tries that the step is tuned to."""
        ...

    @property
    def largest(self) -> float:
        """The largest step."""
        ...

    def move(
        self,
        u: np.ndarray,
        g: np.ndarray,
        level: np.ndarray,
        step: np.ndarray,
        n_moves: int,
        evaluate: Evaluate,
        normals: Normals,
        scratch: Scratch,
    ) -> Moved:
        """Move every point ``n_moves`` times; ``u`` and ``g`` are overwritten."""
        ...


class Normals:
    """Standard normal vectors from two generators that fill the two halves of every request.

    The halves are fixed, so the result is the same bit for bit whether one thread fills both or two threads one each.
    """

    def __init__(self, seed: np.random.SeedSequence, dtype: np.dtype, pool: ThreadPoolExecutor | None = None) -> None:
        first, second, third = seed.spawn(3)
        self._streams = [np.random.Generator(np.random.SFC64(s)) for s in (first, second)]
        self.uniform = np.random.Generator(np.random.SFC64(third))
        self._dtype = np.dtype(dtype)
        self._pool = pool

    def fill(self, out: np.ndarray) -> np.ndarray:
        """Fill a C-contiguous array."""
        flat = out.reshape(-1)
        half = flat.size // 2
        parts = list(zip(self._streams, (flat[:half], flat[half:]), strict=True))
        if self._pool is not None and flat.size >= _THREAD_FROM:
            for job in [self._pool.submit(self._fill, stream, part) for stream, part in parts]:
                job.result()
        else:
            for stream, part in parts:
                self._fill(stream, part)
        return out

    def _fill(self, stream: np.random.Generator, out: np.ndarray) -> None:
        stream.standard_normal(out=out, dtype=self._dtype.type)


class Scratch:
    """Named work arrays that are allocated once and grow: fresh pages cost more than the arithmetic done on them."""

    def __init__(self, dtype: np.dtype) -> None:
        self._dtype = dtype
        self._held: dict[str, np.ndarray] = {}

    def get(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """An uninitialized C-contiguous array of ``shape``, valid until the same name is asked for again."""
        size = math.prod(shape)
        if name not in self._held or self._held[name].size < size:
            self._held[name] = np.empty(size, self._dtype)
        return self._held[name][:size].reshape(shape)


class Pcn:
    """Preconditioned Crank-Nicolson moves."""

    cost = 1
    # near the best for the exponential tail above a level, and flat about it: 0.35 and 0.5 did equally well
    target = 0.4
    largest = 1.0

    def move(
        self,
        u: np.ndarray,
        g: np.ndarray,
        level: np.ndarray,
        step: np.ndarray,
        n_moves: int,
        evaluate: Evaluate,
        normals: Normals,
        scratch: Scratch,
    ) -> Moved:
        rows = np.arange(u.shape[0])
        keep = np.sqrt(1.0 - step**2)[:, None, None].astype(u.dtype)
        push = step[:, None, None].astype(u.dtype)
        accepted = np.zeros(u.shape[0])
        proposal, part = scratch.get("proposal", u.shape), scratch.get("part", u.shape)
        for _ in range(n_moves):
            normals.fill(proposal)
            np.multiply(proposal, push, out=proposal)
            np.add(proposal, np.multiply(u, keep, out=part), out=proposal)
            value = evaluate(rows, proposal)
            good = value < level[:, None]
            np.copyto(u, proposal, where=good[..., None])
            np.copyto(g, value, where=good)
            accepted += good.mean(axis=1)
        return Moved(u, g, accepted / n_moves)


class EllipticalSlice:
    """Slice moves on the ellipse through a point and a normal vector, from a bracket whose width is the step."""

    # a point that finds nothing after this many angles stays: symmetric, so still invariant
    cost = 6
    target = 0.4
    largest = 2.0 * math.pi
    # moves per fresh normal vector
    reuse = 8

    def move(
        self,
        u: np.ndarray,
        g: np.ndarray,
        level: np.ndarray,
        step: np.ndarray,
        n_moves: int,
        evaluate: Evaluate,
        normals: Normals,
        scratch: Scratch,
    ) -> Moved:
        dim = u.shape[-1]
        reuse = self.reuse if dim >= _RECYCLE_FROM_DIM else 1
        nu, other, part = (scratch.get(name, u.shape) for name in ("nu", "other", "part"))
        accepted = np.zeros(u.shape[0])
        for i in range(n_moves):
            if i % reuse == 0:
                normals.fill(nu)
            angle, first = self._angle(u, nu, g, level, step, evaluate, normals.uniform, scratch)
            accepted += first
            sine, cosine = (f(angle)[..., None].astype(u.dtype) for f in (np.sin, np.cos))
            if (i + 1) % reuse and i + 1 < n_moves:
                np.multiply(nu, cosine, out=other)
                np.subtract(other, np.multiply(u, sine, out=part), out=other)
            np.multiply(u, cosine, out=u)
            np.add(u, np.multiply(nu, sine, out=part), out=u)
            if (i + 1) % reuse and i + 1 < n_moves:
                shift = int(normals.uniform.integers(dim))
                signs = (2 * normals.uniform.integers(0, 2, dim) - 1).astype(u.dtype)
                np.multiply(other[..., shift:], signs[: dim - shift], out=nu[..., : dim - shift])
                np.multiply(other[..., :shift], signs[dim - shift :], out=nu[..., dim - shift :])
        return Moved(u, g, accepted / n_moves)

    def _angle(
        self,
        u: np.ndarray,
        nu: np.ndarray,
        g: np.ndarray,
        level: np.ndarray,
        step: np.ndarray,
        evaluate: Evaluate,
        uniform: np.random.Generator,
        scratch: Scratch,
    ) -> tuple[np.ndarray, np.ndarray]:
        """An angle per point that stays inside its level (0 where none was found); ``g`` is updated to it."""
        shape = g.shape
        low = -step[:, None] * uniform.random(shape)
        high = low + step[:, None]
        chosen = np.zeros(shape)
        first = np.zeros(shape[0])
        rows, columns = np.arange(shape[0]), None
        pending = np.ones(shape, dtype=bool)
        for i in range(self.cost):
            # the unfinished points, packed to the left: (rows with any, most in a row); spare columns are ignored.
            # No fewer than an eighth of the points, so that few shapes are ever compiled by jax
            if i:
                count = pending.sum(axis=1)
                rows = np.flatnonzero(count)
                if not rows.size:
                    break
                columns = np.argsort(~pending[rows], axis=1, kind="stable")[:, : max(count.max(), shape[1] // 8)]
            at: tuple = (slice(None),) if columns is None else (rows[:, None], columns)
            tried = low[at] + (high[at] - low[at]) * uniform.random(low[at].shape)
            value = evaluate(rows, _on_ellipse(u, nu, rows, columns, tried, scratch))
            open_ = pending[at]
            good = open_ & (value < level[rows, None])
            if not i:
                first = good.mean(axis=1)
            chosen[at] = np.where(good, tried, chosen[at])
            g[at] = np.where(good, value, g[at])
            low[at] = np.where(open_ & (tried < 0), tried, low[at])
            high[at] = np.where(open_ & (tried >= 0), tried, high[at])
            pending[at] = open_ & ~good
        return chosen, first


KERNELS: dict[str, Kernel] = {"elliptical_slice": EllipticalSlice(), "pcn": Pcn()}


def _on_ellipse(
    u: np.ndarray, nu: np.ndarray, rows: np.ndarray, columns: np.ndarray | None, angle: np.ndarray, scratch: Scratch
) -> np.ndarray:
    """``u cos(angle) + nu sin(angle)`` at the chosen points."""
    dim = u.shape[-1]
    sine, cosine = (f(angle)[..., None].astype(u.dtype) for f in (np.sin, np.cos))
    out = scratch.get("proposal", (*angle.shape, dim))
    part = scratch.get("part", (*angle.shape, dim))
    if columns is None:
        np.multiply(nu, sine, out=part)
        np.multiply(u, cosine, out=out)
    else:
        flat = rows[:, None] * u.shape[1] + columns
        np.take(u.reshape(-1, dim), flat, axis=0, out=out, mode="clip")
        np.take(nu.reshape(-1, dim), flat, axis=0, out=part, mode="clip")
        np.multiply(part, sine, out=part)
        np.multiply(out, cosine, out=out)
    np.add(out, part, out=out)
    return out
