r"""Black box: search for the shortest failing move from answers alone, scores or only labels, each one counted.

Threat model: the attacker sees no gradient. After each try it is told g (``feedback="score"``) or only whether the move
failed (``feedback="label"``), and chooses the next try. In u-space the shortest failing u is the most likely one.

Search: first *reach* a failing point, then *walk* along the boundary towards the origin. A point is kept as direction
``t`` (a unit vector) and radius ``r(t)``, where the ray leaves the safe side (bisection). Each round asks about small
steps along orthonormal directions v_j, which go through a random basis of R^k again and again.

score   Antithetic differences correct a running estimate m of the gradient: ``m += sum_j (d_j - m.v_j) v_j`` with
        ``d_j = (g(u + s v_j) - g(u - s v_j)) / 2s``; after k directions it is exact where g is linear. The plane
        ``g + m.(x - u) <= 0`` joins the last few (if each round covers the whole basis, else it stands alone), and x*
        is the shortest point within them. Reach: steps of several sizes towards x*. Walk: turns of t towards x*. Where
        neither helps, the planes were wrong about x*, so the next one is taken there: this finds the corner where
        "failed" and "behaviour kept" meet.
label   Reach: random directions, both ways, at doubling radii. Walk: with v_j made orthogonal to t, labels as signs
        l_j say where r falls: t turns towards ``sum_j (l_j - mean l) v_j``. Being orthogonal to t, each round removes
        a share of about (2/pi) n/k of the squared sine between t and the normal (n labels), however small that is.

Of the turns that still fail at the same radius take the deepest (score) or half of the largest (label: on a plane the
best turn is half of the largest that still fails), and bisect its ray. No gain: halve the step s. When nothing gets
shorter, and budget is left, start again elsewhere.

Shapes: ``moves (problems, keep, k)``, shortest failing first; ``centre (problems, k)`` the first of them. Where nothing
failed the point of lowest score stands in (for labels: the unmoved origin, also as centre). Per item and universal,
under every prior. Guarantee: none (a local search); the engine decides whether the moves fail.

References: antithetic evolution strategies 1703.03864; boundary attack 1712.04248; HopSkipJump 1904.02144; Sign-OPT
1909.10773 (labels as signs of the change of the radius).
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from elk_stress.thoughts.attacks.protocol import Access, Need, Oracle, Proposal, Scope

__all__ = ["BlackBox", "BlackBoxLabel"]

# numbers in one batch of questions (64 MB): problems are searched in blocks of this size
_BLOCK_ELEMENTS = 1 << 23
# shares of the way to the shortest point (a hair beyond it, so that it fails, comes first), and turns as shares of the
# angle to it (score) or of 80 degrees (label)
_SIZES = np.array([1.02, 4.0, 2.0, 1.2, 0.5, 0.25, 0.06, 0.015])
_TURNS = 0.5 ** np.arange(8)
_WIDEST = math.radians(80)
# directions tried at each radius when only labels are known (half of them the opposite of the other half)
_LADDER = 16
# linearizations of g held at once
_PLANES = 12
# a shorter point must be shorter by this share, or the round was in vain; after so many of those a problem is left
_GAIN, _PATIENCE = 1e-3, 6


@dataclass(frozen=True)
class BlackBox:
    """Score-only or label-only search for the shortest failing move; every answer is counted.

    Attributes:
        feedback: ``"score"`` (antithetic differences of g) or ``"label"`` (failed or not).
        rounds: rounds that the budget is divided into; each asks about as many directions as then fit, at most k.
        bisections: halvings of each ray: relative error of the length ``2^-bisections``.
        step: size of the small steps, as a share of the length of the move; halved where it finds no gain.
        starts: searches one after another, as long as the budget lasts: by scores from the origin, then from random
            points farther and farther out; by labels from other random directions.
        keep: how many of the shortest failing points are proposed.
    """

    feedback: Literal["score", "label"] = "score"
    rounds: int = 24
    bisections: int = 12
    step: float = 0.1
    starts: int = 5
    keep: int = 3

    name: ClassVar[str] = "black_box"
    scopes: ClassVar[tuple[Scope, ...]] = ("item", "universal")
    needs: ClassVar[tuple[Need, ...]] = ()
    priors: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.feedback not in ("score", "label"):
            raise ValueError(f"feedback is {self.feedback!r}; expected 'score' or 'label'")

    @property
    def access(self) -> Access:
        """Follows ``feedback``."""
        return self.feedback

    def propose(self, oracle: Oracle, *, seed: int) -> Proposal:
        """Search all problems at once until the budget ends or nothing gets shorter."""
        width = self._width(oracle)
        size = max(1, _BLOCK_ELEMENTS // (max(2 * width, _LADDER) * oracle.dim))
        moves = np.zeros((oracle.n_problems, self.keep, oracle.dim))
        centre = np.zeros((oracle.n_problems, oracle.dim))
        for first in range(0, oracle.n_problems, size):
            problems = np.arange(first, min(first + size, oracle.n_problems))
            # a tag of its own: not the directions that a testbed of the same seed drew
            rng = np.random.default_rng(np.random.SeedSequence([seed, 0xB1AC, first]))
            search = _Search(self, oracle, problems, width, rng)
            for start in range(self.starts):
                search.begin(start)
                if self.feedback == "score":
                    search.descend()
                else:
                    search.scatter()
                search.walk()
            moves[problems], centre[problems] = search.proposals(), search.best[:, 0]
        return Proposal(moves, centre=centre)

    def _width(self, oracle: Oracle) -> int:
        """Directions per round: what fits into ``rounds`` rounds; a whole basis if that fits into half as many."""
        overhead, sides = len(_TURNS) + self.bisections + 1, 2 if self.feedback == "score" else 1
        if sides * oracle.dim + overhead <= 2 * oracle.budget // self.rounds:
            return oracle.dim
        share = (max(oracle.budget // self.rounds, 2 * overhead) - overhead) // sides
        return max(1, min(share, oracle.dim, oracle.budget // 8))


@dataclass
class _Search:
    """State of a block of problems. ``best (p, keep, k)`` holds boundary points, shortest first, of length ``norm``
    (infinite: none), ``lowest (p, k)`` the point of least score ``record``; ``here (p, k)`` is the present start's
    shortest boundary point, of length ``radius``, and ``slope (p, k)`` its running gradient."""

    recipe: BlackBox
    oracle: Oracle
    problems: np.ndarray
    width: int
    rng: np.random.Generator

    def __post_init__(self) -> None:
        p, keep, dim = len(self.problems), self.recipe.keep, self.oracle.dim
        self.best, self.norm = np.zeros((p, keep, dim)), np.full((p, keep), np.inf)
        self.lowest, self.record = np.zeros((p, dim)), np.full(p, np.inf)
        self.directions = _bases(self.rng, dim, self.width)

    def begin(self, start: int) -> None:
        """Set off from the origin, or from random points."""
        p, dim = self.lowest.shape
        away = _unit(self.rng.standard_normal((p, dim))) * min(2.0**start, math.sqrt(dim) + 5.0)
        self.at = away if start else np.zeros((p, dim))
        self.here, self.radius, self.slope = np.zeros((p, dim)), np.full(p, np.inf), np.zeros((p, dim))
        # planes of a gradient that is still being pieced together contradict each other: then only the newest counts
        self.planes = _Planes.empty(p, _PLANES if self.width == dim else 1, dim)

    # -- reach ---------------------------------------------------------------------------------------------------------

    def descend(self) -> None:
        """By scores: steps towards the shortest point within the planes; random restarts where they stall."""
        dim, start = self.oracle.dim, self.recipe.step
        reach = math.sqrt(dim) + 5.0
        every = self._affordable(np.arange(len(self.problems)), 1)
        u, g, scale = self.at, np.full(len(self.problems), np.inf), np.full(len(self.problems), start)
        g[every] = self._ask(every, u[every][:, None])[:, 0]
        self._found(np.flatnonzero(g <= 0), u[g <= 0])
        stalled, restarts = np.zeros(len(g), dtype=int), np.zeros(len(g), dtype=int)
        while True:
            rows = self._affordable(np.flatnonzero(np.isinf(self.radius)), 2 * self.width + len(_SIZES))
            if len(rows) == 0:
                return
            flat, beside, values = self._differences(rows, u[rows], scale[rows])
            step = self.planes.add(rows, u[rows], g[rows], self.slope[rows]) - u[rows]
            step *= np.minimum(1.0, reach / np.maximum(np.linalg.norm(step, axis=1, keepdims=True), 1e-30))
            ahead = u[rows][:, None] + _SIZES[:, None] * step[:, None]
            at_ahead = self._ask(rows, ahead)
            tried, values = np.concatenate([beside, ahead], axis=1), np.concatenate([values, at_ahead], axis=1)
            # the shortest that fails (ranked below all that hold), else the lowest
            rank = np.where(values <= 0, -1 / np.maximum(np.linalg.norm(tried, axis=-1), 1e-12), values)
            chosen = np.arange(len(rows)), rank.argmin(axis=1)
            point, value = tried[chosen], values[chosen]
            self._found(rows[value <= 0], point[value <= 0])
            lower = value < self.record[rows]
            self.record[rows] = np.where(lower, value, self.record[rows])
            self.lowest[rows] = np.where(lower[:, None], point, self.lowest[rows])

            fell = value < g[rows] - 1e-3 * np.abs(g[rows])
            if self.width == dim:
                # nothing lower: the planes were wrong about the shortest point, so see what g is like there
                astray = ~fell & ~flat
                point, value = np.where(astray[:, None], ahead[:, 0], point), np.where(astray, at_ahead[:, 0], value)
            else:
                astray = np.zeros_like(fell)
            u[rows] = np.where((fell | astray)[:, None], point, u[rows])
            g[rows] = np.where(fell | astray, value, g[rows])
            scale[rows] = np.clip(scale[rows] * np.where(flat, 2.0, np.where(fell, 1.0, 0.5)), 0.1 * start, reach)
            stalled[rows] = np.where(fell, 0, stalled[rows] + 1)
            again = self._affordable(rows[(stalled[rows] >= _PATIENCE) & np.isinf(self.radius[rows])], 1)
            if len(again):
                # a local minimum or a plain: another start, farther out each time
                away = _unit(self.rng.standard_normal((len(again), dim)))
                u[again] = away * np.minimum(2.0 ** restarts[again], reach)[:, None]
                g[again] = self._ask(again, u[again][:, None])[:, 0]
                self._found(again[g[again] <= 0], u[again[g[again] <= 0]])
                self.slope[again], scale[again] = 0.0, start
                self.planes.forget(again)
                restarts[again], stalled[again] = restarts[again] + 1, 0

    def scatter(self) -> None:
        """By labels: random directions, both ways, at doubling radii up to several times the length of a prior draw;
        then again with new directions."""
        rungs = 2 + math.ceil(math.log2(4 * math.sqrt(self.oracle.dim)))
        tries = max(2, min(_LADDER, self.oracle.budget // rungs)) // 2 * 2
        for rung in itertools.count():
            rows = self._affordable(np.flatnonzero(np.isinf(self.radius)), tries)
            if len(rows) == 0:
                return
            away = _unit(self.rng.standard_normal((len(rows), tries // 2, self.oracle.dim)))
            u = np.concatenate([away, -away], axis=1) * 2.0 ** (rung % rungs)
            fails = self._ask(rows, u) <= 0
            hit = fails.any(axis=1)
            self._found(rows[hit], u[hit, fails[hit].argmax(axis=1)])

    # -- walk ----------------------------------------------------------------------------------------------------------

    def walk(self) -> None:
        """Turn the ray of the shortest failing point towards the boundary's normal, round by round."""
        by_score = self.recipe.feedback == "score"
        step, vain = np.full(len(self.radius), self.recipe.step), np.zeros(len(self.radius), dtype=int)
        bend, at = np.zeros(len(self.radius)), self.here.copy()
        cost = self.width * (2 if by_score else 1) + len(_TURNS) + self.recipe.bisections + 1
        while True:
            going = np.isfinite(self.radius) & (self.radius > 0) & (vain < _PATIENCE)
            rows = self._affordable(np.flatnonzero(going), cost)
            if len(rows) == 0:
                return
            point, radius = self.here[rows], self.radius[rows]
            ray = point / radius[:, None]
            if by_score:
                self._differences(rows, at[rows], step[rows] * radius)
                g = self._ask(rows, at[rows][:, None])[:, 0]
                towards = _unit(self.planes.add(rows, at[rows], g, self.slope[rows]))
                along = (towards * ray).sum(axis=1)
                across = _unit(towards - along[:, None] * ray)
                widest = np.minimum(np.arccos(np.clip(along, -1.0, 1.0)), _WIDEST)
            else:
                # a boundary that curves away makes all labels agree: ask nearer or farther, by about what it curves
                lifted = point * (1 + bend[rows] * step[rows] ** 2)[:, None]
                across, share = self._falling(rows, lifted, ray, step[rows] * radius)
                bend[rows] += np.where(share == 0, 0.5, np.where(share == 1, -0.5, 0.0))
                widest = np.full(len(rows), _WIDEST)
            angle = (widest[:, None] * _TURNS)[..., None]
            turned = np.cos(angle) * ray[:, None] + np.sin(angle) * across[:, None]
            turned *= (radius * (1 - _GAIN))[:, None, None]
            values = self._ask(rows, turned)
            every = np.arange(len(rows))
            if by_score:
                pick = values.argmin(axis=1)
            else:
                # on a plane the best turn is half of the one that comes back to the same radius
                pick = np.minimum((values <= 0).argmax(axis=1) + 1, len(_TURNS) - 1)
                pick -= values[every, pick] > 0
            gained = values[every, pick] <= 0
            self._found(rows[gained], turned[gained, pick[gained]])
            step[rows] *= np.where(gained, 1.0, 0.5)
            # in vain: see, every other time, what g is like where the planes said the shortest point was
            stay = gained | (vain[rows] % 2 == 1)
            at[rows] = np.where(stay[:, None], self.here[rows], turned[:, 0])
            vain[rows] = np.where(gained, 0, vain[rows] + 1)
            # old planes may be wrong where g is not convex
            self.planes.forget(rows[vain[rows] == _PATIENCE // 2])

    def proposals(self) -> np.ndarray:
        """The best of each problem; free places repeat the first."""
        first = np.where(np.isfinite(self.norm[:, :1]), self.best[:, 0], self.lowest)
        return np.where(np.isfinite(self.norm)[..., None], self.best, first[:, None])

    # -- questions -----------------------------------------------------------------------------------------------------

    def _ask(self, rows: np.ndarray, u: np.ndarray) -> np.ndarray:
        """g, or -1 for failed and +1 for not where only labels are known."""
        if self.recipe.feedback == "score":
            return self.oracle.score(self.problems[rows], u)
        return np.where(self.oracle.label(self.problems[rows], u), -1.0, 1.0)

    def _left(self, rows: np.ndarray) -> np.ndarray:
        spent = self.oracle.queries + self.oracle.gradients
        return np.asarray(self.oracle.budget - spent[self.problems[rows]])

    def _affordable(self, rows: np.ndarray, cost: int) -> np.ndarray:
        return np.asarray(rows[self._left(rows) >= cost])

    def _differences(
        self, rows: np.ndarray, u: np.ndarray, scale: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Correct the running gradient by antithetic differences; whether g was flat, the points asked, their g."""
        basis = next(self.directions)
        offset = scale[:, None, None] * basis
        beside = np.concatenate([u[:, None] + offset, u[:, None] - offset], axis=1)
        values = self._ask(rows, beside)
        up, down = np.split(values, 2, axis=1)
        change = (up - down) / (2 * scale[:, None])
        self.slope[rows] += (change - self.slope[rows] @ basis.T) @ basis
        return np.asarray((up == down).all(axis=1)), beside, values

    def _falling(
        self, rows: np.ndarray, point: np.ndarray, ray: np.ndarray, scale: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Unit vector across the ray towards which labels say that failure lies nearer (0 where all labels agree), and
        the share of labels that say failed."""
        basis = next(self.directions)
        across = basis - (ray @ basis.T)[..., None] * ray[:, None]
        sign = -self._ask(rows, point[:, None] + scale[:, None, None] * across)
        mean = sign.mean(axis=1)
        return _unit(((sign - mean[:, None])[..., None] * across).sum(axis=1)), (1 + mean) / 2

    def _found(self, rows: np.ndarray, points: np.ndarray) -> None:
        """Pull failing ``points`` back along their rays onto the boundary and keep them among the best."""
        inside, outside = np.zeros(len(rows)), np.ones(len(rows))
        for _ in range(self.recipe.bisections):
            some = np.flatnonzero(self._left(rows) >= 1)
            if len(some) == 0:
                break
            middle = (inside + outside)[some] / 2
            fails = self._ask(rows[some], (points[some] * middle[:, None])[:, None])[:, 0] <= 0
            inside[some] = np.where(fails, inside[some], middle)
            outside[some] = np.where(fails, middle, outside[some])
        points = points * outside[:, None]
        self.here[rows], self.radius[rows] = points, np.linalg.norm(points, axis=1)
        known = np.concatenate([self.best[rows], points[:, None]], axis=1)
        norm = np.concatenate([self.norm[rows], self.radius[rows][:, None]], axis=1)
        order = np.argsort(norm, axis=1, kind="stable")[:, : self.recipe.keep]
        self.best[rows] = np.take_along_axis(known, order[..., None], axis=1)
        self.norm[rows] = np.take_along_axis(norm, order, axis=1)


@dataclass
class _Planes:
    """The last linearizations of each problem, as half-spaces ``normal . x <= offset`` in which g would be <= 0."""

    normal: np.ndarray
    offset: np.ndarray
    count: int = 0

    @classmethod
    def empty(cls, problems: int, planes: int, dim: int) -> _Planes:
        return cls(np.zeros((problems, planes, dim)), np.full((problems, planes), np.inf))

    def forget(self, rows: np.ndarray) -> None:
        self.offset[rows] = np.inf

    def add(self, rows: np.ndarray, u: np.ndarray, g: np.ndarray, slope: np.ndarray) -> np.ndarray:
        """Take in the linearization at ``u (p, k)``; the shortest point within all half-spaces, or within the newest
        alone if they have no point in common; ``u`` itself where g is flat."""
        steepness = np.linalg.norm(slope, axis=1)
        flat = steepness < 1e-30
        normal = slope / np.where(flat, 1.0, steepness)[:, None]
        offset = np.where(flat, np.inf, (normal * u).sum(axis=1) - g / np.where(flat, 1.0, steepness))
        slot = self.count % self.offset.shape[1]
        self.count += 1
        self.normal[rows, slot], self.offset[rows, slot] = normal, offset
        newest = np.where(flat, 0.0, offset)[:, None] * normal
        normals, offsets = self.normal[rows], self.offset[rows]
        known = np.isfinite(offsets)
        bound = np.where(known, offsets, 0.0)
        gram = normals @ np.swapaxes(normals, 1, 2)
        weight = np.zeros_like(bound)
        # Hildreth's dual coordinate ascent
        for _ in range(50):
            for j in np.flatnonzero(known.any(axis=0)):
                pull = (gram[:, j] * weight).sum(axis=1) - weight[:, j]
                weight[:, j] = np.where(known[:, j], np.maximum(0.0, -bound[:, j] - pull), 0.0)
        target = -(weight[:, None, :] @ normals)[:, 0]
        excess = np.where(known, (normals @ target[..., None])[..., 0] - bound, 0.0).max(axis=1)
        agree = (excess <= 0.1 * (1 + np.abs(bound).max(axis=1))) & weight.any(axis=1)
        return np.where(flat[:, None], u, np.where(agree[:, None], target, newest))


def _bases(rng: np.random.Generator, dim: int, width: int) -> Iterator[np.ndarray]:
    """Batches ``(width, k)`` of orthonormal directions that go through one random basis after another."""
    while True:
        basis = np.linalg.qr(rng.standard_normal((dim, max(width, min(dim, 1024)))))[0].T
        for first in range(0, len(basis) - width + 1, width):
            yield basis[first : first + width]


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Rows of length 1; rows of zeros stay zeros."""
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-300))


@dataclass(frozen=True)
class BlackBoxLabel(BlackBox):
    """The same told only whether each move failed: a walk along the boundary."""

    feedback: Literal["score", "label"] = "label"

    name: ClassVar[str] = "black_box_label"


if __name__ == "__main__":
    from elk_stress.cli.script import run_attack

    sys.exit(run_attack(BlackBox.name))
