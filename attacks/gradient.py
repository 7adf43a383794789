r"""Gradient: the shortest move, in the prior's metric, that makes the probe fail.

Threat model: white box. The attacker sees g and its gradient (through the whole model, if g runs one) and designs a
move. In u-space the prior's metric is Euclidean, so the shortest failing u is the most likely one: the design point of
structural reliability, and the min-norm adversarial example.

Equations: minimize ||u|| subject to g(u) <= 0. Each step linearizes g where it stands, keeps the last few
linearizations ("cuts"), and moves to the shortest point that satisfies all of them:

    t = argmin ||x||  such that  g_j + grad_j . (x - u_j) <= -margin  for the last cuts j,      u <- u + a (t - u).

With one cut this is the Hasofer-Lind-Rackwitz-Fiessler step; several cuts also hold the corner where "failed" and
"behaviour kept" meet, at which a single one would jump to and fro. The step a halves whenever the direction turns back.
Several starts (the origin, and random directions of growing length) look for other modes. The segment from the origin
to the best points is then bisected, so that they lie on the boundary.

Where g is curved or kinked that search stops early: planes taken far apart contradict each other. What is left of the
budget is spent on a walk along the boundary from each of those points. With n the unit gradient at the boundary point
x, the tangent plane is nearest to the origin at ``(n.x) n``; a shortest x on a smooth boundary is at that very point.
Each round goes a share a of the way there, and the same share of the way to the shortest point within the last few
planes (at a corner the tangent plane alone leads nowhere); the deeper of the two failing rays is followed to the
boundary by a bracketed secant. In vain: halve a, and see next what g is like at the point that was tried, so that the
planes come to describe g near x. So no point that the walk proposes is longer than what the search had found.

Shapes: ``moves (problems, keep, k)``, shortest failing one first; ``centre (problems, k)`` is the first of them:
importance sampling and the evidence bound want a centre *on* the boundary. Where nothing failed, the point of lowest g.
Guarantee: none (a local search); the engine decides whether the moves fail.

References: Rackwitz & Fiessler 1978 (Computers & Structures 9); min-norm attacks: DDN 1811.09600, FMN 2102.12827;
walks along the boundary: 1712.04248, with gradients 1907.01003.
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from elk_stress.estimators.limit_state import BudgetExhausted
from elk_stress.thoughts.attacks.protocol import Access, Need, Oracle, Proposal, Scope

__all__ = ["Gradient"]

# numbers in one block of cuts (128 MB): problems are searched in blocks of this size
_BLOCK_ELEMENTS = 1 << 24
# every so many steps without a shorter failing point old cuts are forgotten (they may be wrong where g is not convex),
# and after so many a problem is left alone
_FORGET, _PATIENCE = 5, 15
# the walk holds few planes (they must describe g near one point), asks two rays a round, takes a ray to the boundary by
# so many secants, and calls a round in vain that shortens the move by less than this share; a tangent plane that
# promises less than half of that ends it
_PLANES, _RAYS, _SECANTS, _GAIN = 8, 2, 6, 1e-4


@dataclass(frozen=True)
class Gradient:
    """Multi-start search for the shortest failing move in the prior's metric.

    Attributes:
        starts: the origin and ``starts - 1`` random points, of lengths from 1 to sqrt(k) (that of a prior draw).
        steps: gradients per start; fewer of both where the budget ends.
        keep: how many of the starts' results are polished and proposed.
        bisections: halvings of each segment: relative error of the length ``2^-bisections``.
        cuts: linearizations held at once.
        walk: rounds in vain after which a walk along the boundary ends; 0: no walk.
    """

    starts: int = 5
    steps: int = 60
    keep: int = 3
    bisections: int = 16
    cuts: int = 16
    walk: int = 8

    name: ClassVar[str] = "gradient"
    access: ClassVar[Access] = "gradient"
    scopes: ClassVar[tuple[Scope, ...]] = ("item", "universal")
    needs: ClassVar[tuple[Need, ...]] = ()
    priors: ClassVar[tuple[str, ...]] = ()

    def propose(self, oracle: Oracle, *, seed: int) -> Proposal:
        """Search from all starts of all problems at once, bisect towards the origin, walk along the boundary."""
        u = _starts(oracle.n_problems, self.starts, oracle.dim, seed)
        moves = np.repeat(u[:, :1], self.keep, axis=1)
        size = max(1, _BLOCK_ELEMENTS // (self.starts * self.cuts * oracle.dim))
        for first in range(0, len(u), size):
            block = np.arange(first, min(first + size, len(u)))
            # where not even one gradient fits, the unmoved point stays: the engine finds it wanting
            with contextlib.suppress(BudgetExhausted):
                moves[block] = self._search(oracle, block, u[block])
        return Proposal(moves, centre=moves[:, 0].copy())

    def _search(self, oracle: Oracle, problems: np.ndarray, u: np.ndarray) -> np.ndarray:
        """The ``keep`` shortest failing points of these problems from starts ``u (problems, starts, k)``."""
        try:
            g, slope = oracle.gradient(problems, u)
        except BudgetExhausted:
            u = u[:, :1].copy()
            g, slope = oracle.gradient(problems, u)
        # a limit state without gradients of its own pays for finite differences: what one costs is seen, not assumed
        spent = int((oracle.queries + oracle.gradients)[problems].max())
        price = spent // u.shape[1]
        affordable = (oracle.budget - spent - min(self.keep * self.bisections, oracle.budget // 3)) // price
        n_starts = max(1, min(u.shape[1], affordable // min(self.steps, 10)))
        steps = max(0, min(self.steps, affordable // n_starts))
        u, g, slope = u[:, :n_starts].copy(), g[:, :n_starts], slope[:, :n_starts]

        # aim a little beyond the boundary: a step that lands at g = +1e-17 has not failed
        margin = 1e-2 * np.abs(g[:, :1])
        reach = np.sqrt(oracle.dim) + 5.0
        cuts = _Cuts.empty(len(u), n_starts, self.cuts, oracle.dim)
        best, norm = u.copy(), np.full(u.shape[:2], np.inf)
        lowest = np.full(u.shape[:2], np.inf)
        rate, last = np.ones(u.shape[:2]), np.zeros_like(u)
        record, since = np.full(len(u), np.inf), np.zeros(len(u), dtype=int)
        active = np.arange(len(u))
        for step in range(steps + 1):
            if step > 0:
                g, slope = oracle.gradient(problems[active], u[active])
            length = np.linalg.norm(u[active], axis=-1)
            better = np.where(g <= 0, length < norm[active], np.isinf(norm[active]) & (g < lowest[active]))
            best[active] = np.where(better[..., None], u[active], best[active])
            norm[active] = np.where(better & (g <= 0), length, norm[active])
            lowest[active] = np.minimum(lowest[active], g)

            aim = np.maximum(0.5**step, 1e-3) * margin[active]
            target = cuts.add(active, u[active], g, slope, aim, (since[active] + 1) % _FORGET == 0)
            move = target - u[active]
            size = np.linalg.norm(move, axis=-1, keepdims=True)
            move *= np.minimum(1.0, reach / np.maximum(size, 1e-300))
            back = (move * last[active]).sum(axis=-1) < 0
            rate[active] = np.where(back, rate[active] / 2, np.minimum(1.0, rate[active] * 1.5))
            u[active] += rate[active][..., None] * move
            last[active] = move
            moving = (size[..., 0] > 1e-4 * (1 + length)).any(axis=1)
            shorter = norm[active].min(axis=1)
            progress = ~np.isfinite(shorter) | (shorter < 0.9999 * record[active])
            since[active] = np.where(progress, 0, since[active] + 1)
            record[active] = np.where(progress, shorter, record[active])
            active = active[moving & (since[active] < _PATIENCE)]
            if len(active) == 0:
                break
        points, norm = self._polish(oracle, problems, best, norm)
        points, norm = _walk(oracle, problems, points, norm, price, self.walk)
        return np.take_along_axis(points, np.argsort(norm, axis=1, kind="stable")[..., None], axis=1)

    def _polish(
        self, oracle: Oracle, problems: np.ndarray, best: np.ndarray, norm: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The ``keep`` shortest results, pulled back along their rays onto the boundary, and their lengths (infinite:
        does not fail); shortest first."""
        order = np.argsort(norm, axis=1, kind="stable")[:, np.minimum(np.arange(self.keep), best.shape[1] - 1)]
        points = np.take_along_axis(best, order[..., None], axis=1)
        norm = np.take_along_axis(norm, order, axis=1)
        found = np.flatnonzero(np.isfinite(norm).any(axis=1))
        inside, outside = np.zeros((len(found), self.keep)), np.ones((len(found), self.keep))
        for _ in range(self.bisections):
            spent = int((oracle.queries + oracle.gradients)[problems].max())
            if len(found) == 0 or spent + self.keep > oracle.budget:
                break
            middle = (inside + outside) / 2
            fails = oracle.score(problems[found], points[found] * middle[..., None]) <= 0
            inside, outside = np.where(fails, inside, middle), np.where(fails, middle, outside)
        scale = np.ones_like(norm)
        scale[found] = outside
        points, norm = points * scale[..., None], norm * scale
        order = np.argsort(norm, axis=1, kind="stable")
        return np.take_along_axis(points, order[..., None], axis=1), np.take_along_axis(norm, order, axis=1)


def _walk(
    oracle: Oracle, problems: np.ndarray, points: np.ndarray, norm: np.ndarray, price: int, patience: int
) -> tuple[np.ndarray, np.ndarray]:
    """Follow the boundary from ``points (problems, keep, k)`` of length ``norm`` (infinite: none) to shorter ones.

    ``price`` is what a gradient costs. Every point walks on its own: one row each, those of a problem side by side.
    """
    n_problems, keep, dim = points.shape
    owner = np.repeat(np.arange(n_problems), keep)
    x, length = points.reshape(-1, dim).copy(), norm.ravel().copy()
    planes = _Cuts.empty(len(x), 1, _PLANES, dim)
    # where the next plane is taken (x itself, unless the last round was in vain), and the nearest point of x's own
    at, nearest = x.copy(), x.copy()
    share, vain = np.ones(len(x)), np.zeros(len(x), dtype=int)
    # what fails unmoved is done
    active = np.isfinite(length) & np.repeat(norm.min(axis=1) > 0, keep) & (patience > 0)
    while True:
        rows = _affordable(oracle, problems[owner], np.flatnonzero(active), price + _RAYS + _SECANTS)
        if len(rows) == 0:
            return x.reshape(points.shape), length.reshape(norm.shape)
        g, slope = oracle.gradient(problems[owner[rows]], at[rows][:, None])
        forget = vain[rows] == patience // 2
        target = planes.add(rows, at[rows][:, None], g, slope, np.zeros_like(g), forget)[:, 0]
        g, slope = g[:, 0], slope[:, 0]

        steep = np.linalg.norm(slope, axis=1)
        here, flat = vain[rows] == 0, steep < 1e-30
        steep = np.where(flat, 1.0, steep)
        normal = slope / steep[:, None]
        offset = np.minimum((normal * at[rows]).sum(axis=1) - g / steep, 0.0)
        nearest[rows] = np.where(here[:, None], offset[:, None] * normal, nearest[rows])
        arrived = here & (flat | (-offset >= (1 - 0.5 * _GAIN) * length[rows]))
        active[rows[arrived]] = False
        rows, target, slope = rows[~arrived], target[~arrived], slope[~arrived]
        if len(rows) == 0:
            continue

        # tried at one radius, a little shorter than x's: what fails there is a gain
        towards = np.stack([target, nearest[rows]], axis=1) - x[rows][:, None]
        ray = x[rows][:, None] + share[rows][:, None, None] * towards
        ray /= np.maximum(np.linalg.norm(ray, axis=-1, keepdims=True), 1e-300)
        tried = ray * ((1 - _GAIN) * length[rows])[:, None, None]
        # as rows of one point each: jax compiles for every shape
        asked = np.repeat(problems[owner[rows]], _RAYS)
        values = oracle.score(asked, tried.reshape(-1, 1, dim)).reshape(-1, _RAYS)
        deeper = np.arange(len(rows)), values.argmin(axis=1)
        gained = values[deeper] <= 0
        won = rows[gained]
        x[won] = _onto_boundary(
            oracle, problems[owner[won]], tried[deeper][gained], values[deeper][gained], slope[gained]
        )
        length[won] = np.linalg.norm(x[won], axis=1)
        at[rows] = np.where(gained[:, None], x[rows], tried[:, 0])
        share[rows] = np.where(gained, np.minimum(1.0, 2 * share[rows]), share[rows] / 2)
        vain[rows] = np.where(gained, 0, vain[rows] + 1)
        active[rows] = vain[rows] < patience


def _affordable(oracle: Oracle, owner: np.ndarray, rows: np.ndarray, cost: int) -> np.ndarray:
    """Those of ``rows`` (sorted by ``owner (all rows)``) for which their problem can pay, the first of each first."""
    mine = owner[rows]
    left = oracle.budget - (oracle.queries + oracle.gradients)[mine]
    before = np.arange(len(rows)) - np.searchsorted(mine, mine)
    return np.asarray(rows[left >= (before + 1) * cost])


def _onto_boundary(
    oracle: Oracle, problems: np.ndarray, points: np.ndarray, g: np.ndarray, slope: np.ndarray
) -> np.ndarray:
    """Failing ``points (n, k)`` drawn back along their rays: the shortest of a few secants' that still fails.

    Illinois secants (an end that stays a second time counts half); the first guess is the plane of ``slope``.
    """
    low, high, at_low, at_high = np.zeros(len(points)), np.ones(len(points)), np.full(len(points), np.nan), g.copy()
    failed_last = np.zeros(len(points), dtype=bool)
    with np.errstate(invalid="ignore", divide="ignore"):
        guess = high - at_high / (slope * points).sum(axis=1)
        for step in range(_SECANTS if len(points) else 0):
            guess = np.where((guess > low) & (guess < high), guess, (low + high) / 2)
            value = oracle.score(problems, (points * guess[:, None])[:, None])[:, 0]
            fails = value <= 0
            again = (fails == failed_last) & (step > 0)
            low, high = np.where(fails, low, guess), np.where(fails, guess, high)
            at_low = np.where(fails, np.where(again, at_low / 2, at_low), value)
            at_high = np.where(fails, value, np.where(again, at_high / 2, at_high))
            failed_last = fails
            # no safe point known yet: a bracket that doubles
            guess = np.where(
                np.isnan(at_low), high - 2 * (1 - high) - _GAIN, (high * at_low - low * at_high) / (at_low - at_high)
            )
    return np.asarray(points * high[:, None])


@dataclass
class _Cuts:
    """Linearizations held by each start, as unit half-spaces ``normal . x <= offset``, and their multipliers."""

    normal: np.ndarray
    offset: np.ndarray
    weight: np.ndarray
    age: np.ndarray

    @classmethod
    def empty(cls, problems: int, starts: int, cuts: int, dim: int) -> _Cuts:
        shape = (problems, starts, cuts)
        # slots start as half-spaces that hold everywhere, the first ones oldest
        age = np.broadcast_to(-np.arange(cuts), shape).copy()
        return cls(np.zeros((*shape, dim)), np.full(shape, np.inf), np.zeros(shape), age)

    def add(
        self,
        problems: np.ndarray,
        u: np.ndarray,
        g: np.ndarray,
        slope: np.ndarray,
        margin: np.ndarray,
        forget: np.ndarray,
    ) -> np.ndarray:
        """Take in the linearization at ``u (p, starts, k)`` and return the shortest point within all cuts."""
        steepness = np.linalg.norm(slope, axis=-1)
        flat = steepness < 1e-30
        safe = np.where(flat, 1.0, steepness)
        normal = np.where(flat[..., None], 0.0, slope / safe[..., None])
        offset = np.where(flat, np.inf, (normal * u).sum(axis=-1) - (g + margin) / safe)

        # a new cut takes the place of the oldest one that does not hold the current target
        age, weight = self.age[problems] + 1, self.weight[problems]
        slot = np.argmax(age - (weight > 1e-9) * (age.max() + self.age.shape[-1] + 1), axis=-1)
        row, column = problems[:, None], np.arange(u.shape[1])[None]
        self.normal[row, column, slot], self.offset[row, column, slot] = normal, offset
        np.put_along_axis(age, slot[..., None], 0, axis=-1)
        np.put_along_axis(weight, slot[..., None], 0.0, axis=-1)
        expired = (age > 0) & forget[:, None, None]
        self.offset[problems] = np.where(expired, np.inf, self.offset[problems])
        weight = np.where(expired, 0.0, weight)
        target, weight, consistent = _shortest(self.normal[problems], self.offset[problems], weight)
        # cuts of a function that is not convex can contradict each other: then only the newest counts
        alone = np.where(flat, 0.0, np.minimum(offset, 0.0))[..., None] * normal
        target = np.where(consistent[..., None], target, alone)
        self.age[problems], self.weight[problems] = age, np.where(consistent[..., None], weight, 0.0)
        return np.where(flat[..., None], u, target)


def _shortest(
    normal: np.ndarray, offset: np.ndarray, weight: np.ndarray, sweeps: int = 20
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``argmin ||x||`` with ``normal_j . x <= offset_j`` by Hildreth's dual coordinate ascent from ``weight``; the new
    multipliers; and whether every half-space was reached."""
    gram = normal @ np.swapaxes(normal, -1, -2)
    known = np.isfinite(offset)
    bound = np.where(known, offset, 0.0)
    used = np.flatnonzero(known.any(axis=(0, 1)))
    for _ in range(sweeps):
        for j in used:
            pull = (gram[..., j, :] * weight).sum(axis=-1) - weight[..., j]
            weight[..., j] = np.where(known[..., j], np.maximum(0.0, -bound[..., j] - pull), 0.0)
    point = -(weight[..., None, :] @ normal)[..., 0, :]
    excess = np.where(known, (normal @ point[..., None])[..., 0] - bound, 0.0).max(axis=-1)
    return point, weight, np.asarray(excess <= 0.1 * (1 + np.abs(bound).max(axis=-1)))


def _starts(problems: int, starts: int, dim: int, seed: int) -> np.ndarray:
    """``(problems, starts, k)``: the origin, then random directions at lengths from 1 to max(4, sqrt(k))."""
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    u = rng.standard_normal((problems, starts, dim))
    u /= np.linalg.norm(u, axis=-1, keepdims=True)
    lengths = np.geomspace(1.0, max(4.0, np.sqrt(dim)), max(starts - 1, 1))
    return np.asarray(u * np.concatenate([[0.0], lengths])[:starts, None])


if __name__ == "__main__":
    from elk_stress.cli.script import run_attack

    sys.exit(run_attack(Gradient.name))
