"""Natural thoughts: independent draws from the prior itself, which nobody chose.

Threat model: no access at all. This is the model thinking about the same thing in another way, over and over.

Equation: ``u ~ N(0, I_k)``, whatever the prior (in u-space every prior is standard normal). Of n draws, c fail with
``c ~ Binomial(n, 2^-B)``: counting them bounds B from both sides (Clopper-Pearson), without any estimator. With c = 0
of n, ``B >= log2(n / 3)`` at 95%.

Shapes: ``moves (problems, draws, k)``, independent over problems and draws, in no order (``from_prior``). It asks
nothing: the engine's own scoring of the draws is what it costs.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from elk_stress.thoughts.attacks.protocol import Access, Need, Oracle, Proposal, Scope

__all__ = ["NaturalThoughts"]


@dataclass(frozen=True)
class NaturalThoughts:
    """Independent draws from the prior; how often they fail bounds B by counting.

    Attributes:
        draws: per problem; fewer where the budget or ``max_elements`` ends.
        max_elements: bound on the size of the array of moves (problems x draws x k), in numbers.
    """

    draws: int = 128
    max_elements: int = 1 << 26

    name: ClassVar[str] = "natural_thoughts"
    access: ClassVar[Access] = "none"
    scopes: ClassVar[tuple[Scope, ...]] = ("item", "universal")
    needs: ClassVar[tuple[Need, ...]] = ()
    priors: ClassVar[tuple[str, ...]] = ()

    def propose(self, oracle: Oracle, *, seed: int) -> Proposal:
        """Draw from the prior; the number of draws does not depend on what they do."""
        rng = np.random.default_rng(np.random.SeedSequence(seed))
        fits = self.max_elements // (oracle.n_problems * oracle.dim)
        draws = max(1, min(self.draws, oracle.budget, fits))
        return Proposal(rng.standard_normal((oracle.n_problems, draws, oracle.dim)), from_prior=True)


if __name__ == "__main__":
    from elk_stress.cli.script import run_attack

    sys.exit(run_attack(NaturalThoughts.name))
