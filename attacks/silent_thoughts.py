r"""Silent thoughts: the model thinks differently only where its output does not look.

Threat model: white box. With ``shift(u) ~ 0.5 ||A u||^2`` the directions to which behaviour is indifferent are A's null
space; P projects on it. The shortest silent break of a linear probe, ``g(u) = m - s.u`` with ``s = L^T w``, is

``u = m P s / ||P s||^2``,  of length ``m / ||P s||``:  bits ``-log2 Phi(-m / ||P s||)`` as epsilon -> 0,

infinite for an oracle, which has ``P s = 0``. Where some shift is allowed (epsilon > 0) a little noise is worth a
shorter way: further candidates minimize ``||u||^2 + lambda ||A u||^2``, ``u ~ (I + lambda A^T A)^-1 s``, the quietest
first. A probe that is not linear is linearized anew at every step, and each candidate is pulled back along its ray onto
the boundary. Behaviour is verified by the engine.

Shapes: A ``(problems, rank, k)``, u ``(problems, k)``. Universal scope: the A of all attacked items stacked.

Reference: min-norm search as Hasofer & Lind 1974; the local form of KL by the Fisher matrix, Amari 1998.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from elk_stress.estimators.limit_state import BudgetExhausted
from elk_stress.thoughts.attacks.protocol import Access, Need, Oracle, Proposal, Scope

__all__ = ["SilentThoughts"]

# relative size of a singular value below which behaviour does not look
_NULL = 1e-6
# items whose sensitivities are stacked in universal scope
_MOST_ITEMS = 12


@dataclass(frozen=True)
class SilentThoughts:
    """Moves only where the output does not look: shortest breaks within the null space of behaviour's local form.

    Attributes:
        weights: lambda, in units of ``1 / (mean squared singular value of A)``, tried where epsilon allows some shift,
            after the null space itself.
        steps: linearizations per candidate.
        bisections: halvings of the way back to the boundary.
    """

    weights: tuple[float, ...] = (1e4, 1e2, 1e0)
    steps: int = 8
    bisections: int = 12

    name: ClassVar[str] = "silent_thoughts"
    access: ClassVar[Access] = "gradient"
    scopes: ClassVar[tuple[Scope, ...]] = ("item", "universal")
    needs: ClassVar[tuple[Need, ...]] = ("model_access", "output")
    priors: ClassVar[tuple[str, ...]] = ()

    def propose(self, oracle: Oracle, *, seed: int) -> Proposal:
        """One candidate per lambda, the most silent first; where none fails, the points of lowest g.

        Nothing is random. It stays where it is if no direction is silent at all.
        """
        problems = np.arange(oracle.n_problems)
        left, singular = _sensitivity(oracle)
        weights = (np.inf, *(() if oracle.model_access.epsilon is None else self.weights))
        moves = np.zeros((oracle.n_problems, len(weights), oracle.dim))
        fails = np.zeros(moves.shape[:2], dtype=bool)
        for column, weight in enumerate(weights):
            try:
                moves[:, column], fails[:, column] = self._search(oracle, problems, left, singular, weight)
            except BudgetExhausted:
                break
        first = fails.argmax(axis=1)
        centre = moves[problems, first]
        # candidates that found nothing come last
        order = np.argsort(~fails, axis=1, kind="stable")
        return Proposal(np.take_along_axis(moves, order[..., None], axis=1), centre=centre, stays=not moves.any())

    def _search(
        self, oracle: Oracle, problems: np.ndarray, basis: np.ndarray, singular: np.ndarray, weight: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """``(problems, k)`` shortest failing points under one lambda, else those of lowest g, and which they are."""
        u = np.zeros((len(problems), oracle.dim))
        found = np.zeros(len(problems), dtype=bool)
        best, lowest, record = np.zeros_like(u), np.zeros_like(u), np.full(len(u), np.inf)
        for _ in range(self.steps):
            g, slope = (part[:, 0] for part in oracle.gradient(problems, u[:, None]))
            better = (g <= 0) & (~found | (np.linalg.norm(u, axis=1) < np.linalg.norm(best, axis=1)))
            best[better], found = u[better], found | (g <= 0)
            lowest[g < record], record = u[g < record], np.minimum(g, record)
            quiet = _filtered(slope, basis, singular, weight)
            steepness = (slope * quiet).sum(axis=1)
            usable = steepness > 1e-9 * (slope * slope).sum(axis=1)
            # aim a hair beyond the boundary of the linearization g + slope.(v - u) = 0
            reach = ((slope * u).sum(axis=1) - g) - 1e-3 * np.abs(g)
            target = np.where(usable, reach / np.where(usable, steepness, 1.0), 0.0)[:, None] * quiet
            if np.allclose(target, u, rtol=1e-4, atol=1e-9):
                break
            u = np.where(usable[:, None], target, u)
        inside, outside = np.zeros(len(u)), np.ones(len(u))
        for _ in range(self.bisections if found.any() else 0):
            middle = 0.5 * (inside + outside)
            fails = oracle.score(problems, (middle[:, None] * best)[:, None])[:, 0] <= 0
            inside, outside = np.where(fails, inside, middle), np.where(fails, middle, outside)
        return np.where(found[:, None], outside[:, None] * best, lowest), found


def _sensitivity(oracle: Oracle) -> tuple[np.ndarray, np.ndarray]:
    """Right singular vectors ``(problems, rank, k)`` and singular values of A."""
    model_access = oracle.model_access
    if model_access.threat.scope == "item":
        a = model_access.sensitivity("test", model_access.items)
    else:
        # one move for all is searched on training items: some of their positives, evenly spread
        positives = model_access.training[model_access.truth("train")[model_access.training] == 1]
        a = model_access.sensitivity("train", positives[:: -(-len(positives) // _MOST_ITEMS)])
    assert a is not None, "the engine runs this attack only where there is an output"
    if model_access.threat.scope == "universal":
        a = a.reshape(1, -1, a.shape[-1]) / np.sqrt(len(a))
    if a.shape[-1] < oracle.dim:
        # the scale coordinate of a heavy tail stretches a move, and is silent only with it
        a = np.concatenate([a, np.zeros((*a.shape[:-1], oracle.dim - a.shape[-1]))], axis=-1)
    _, singular, basis = np.linalg.svd(a, full_matrices=False)
    return basis, singular


def _filtered(slope: np.ndarray, basis: np.ndarray, singular: np.ndarray, weight: float) -> np.ndarray:
    """``(I + lambda A^T A)^-1 s`` row by row; the projection on A's null space for an infinite lambda."""
    size = np.maximum(singular[:, :1], 1e-300)
    if np.isinf(weight):
        share = (singular > _NULL * size).astype(float)
    else:
        scaled = weight * singular**2 / np.maximum((singular**2).mean(axis=1, keepdims=True), 1e-300)
        share = scaled / (1.0 + scaled)
    along = np.einsum("prk,pk->pr", basis, slope)
    return np.asarray(slope - np.einsum("pr,prk->pk", share * along, basis))


if __name__ == "__main__":
    from elk_stress.cli.script import run_attack

    sys.exit(run_attack(SilentThoughts.name))
