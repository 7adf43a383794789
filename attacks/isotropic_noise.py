"""Isotropic noise: random moves of equal length, the benign control of every attack that chooses its direction.

Threat model: an attacker who is told after each try whether it worked (``label`` access) and tries uniformly random
directions of the prior's u-space, first short, then longer.

Equations: ``u = r v``, v uniform on the unit sphere of R^k, r in ``radii``. Against a half-space at distance beta the
chance of a try is ``P[v_1 >= beta / r]``, about ``Phi(-beta sqrt(k) / r)``: a random move must be about sqrt(k) times
as long as the best one. A probe that such a move breaks at the length of the best attack is *brittle*, not attacked.

Shapes: ``moves (problems, radii, k)``, one for each radius: one that failed at this radius if any did, else any. Those
that failed come first, each part by radius. Works under every prior, per item and universal.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from elk_stress.thoughts.attacks.protocol import Access, Need, Oracle, Proposal, Scope

__all__ = ["IsotropicNoise"]


@dataclass(frozen=True)
class IsotropicNoise:
    """Random directions at growing radii: the control, a random move of equal length.

    Attributes:
        radii: lengths in u-space, tried in this order (a prior draw has length about sqrt(k)).
        draws: directions per radius and problem; fewer where the budget ends.
    """

    radii: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
    draws: int = 16

    name: ClassVar[str] = "isotropic_noise"
    access: ClassVar[Access] = "label"
    scopes: ClassVar[tuple[Scope, ...]] = ("item", "universal")
    needs: ClassVar[tuple[Need, ...]] = ()
    priors: ClassVar[tuple[str, ...]] = ()

    def propose(self, oracle: Oracle, *, seed: int) -> Proposal:
        """Try ``draws`` directions at each radius, for all problems at once."""
        rng = np.random.default_rng(np.random.SeedSequence(seed))
        problems = np.arange(oracle.n_problems)
        draws = min(self.draws, oracle.budget // len(self.radii))
        moves = np.empty((len(problems), len(self.radii), oracle.dim))
        failed = np.zeros((len(problems), len(self.radii)), dtype=bool)
        for column, radius in enumerate(self.radii):
            u = rng.standard_normal((len(problems), max(draws, 1), oracle.dim))
            u *= radius / np.linalg.norm(u, axis=-1, keepdims=True)
            # a budget below one try per radius leaves the directions untested
            fails = oracle.label(problems, u) if draws else np.zeros(u.shape[:2], dtype=bool)
            moves[:, column] = u[problems, fails.argmax(axis=1)]
            failed[:, column] = fails.any(axis=1)
        order = np.argsort(~failed, axis=1, kind="stable")
        return Proposal(np.take_along_axis(moves, order[..., None], axis=1), random=True)


if __name__ == "__main__":
    from elk_stress.cli.script import run_attack

    sys.exit(run_attack(IsotropicNoise.name))
