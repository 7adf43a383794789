"""Best of n: choose, among real alternatives, the one that the probe likes least.

Threat model: the attacker cannot design a move. It has n real ways to say the same thing (neutral contexts B, which
the prior was not fitted on), sees g at each (``score`` access), and takes the lowest. This spends exactly ``log2 n``
bits of selection, and the guarantee ``2^-(B - log2 n)`` speaks of it, which makes it the prediction of B that can fail.

Equation: ``u* = argmin over the pool of g(u_j)``; with c of N real alternatives failing, the best of n drawn without
replacement holds with chance ``C(N-c, n) / C(N, n)``.

Shapes: ``oracle.pool (problems, N, k)`` -> ``moves (problems, 1, k)``, ``spent (problems,)`` bits.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from elk_stress.thoughts.attacks.protocol import Access, Need, Oracle, Proposal, Scope

__all__ = ["BestOfN"]


@dataclass(frozen=True)
class BestOfN:
    """Best of n real alternatives; spends exactly log2 n bits.

    Attributes:
        n: alternatives to choose among, drawn without replacement; ``None`` for the whole pool.
    """

    n: int | None = None

    name: ClassVar[str] = "best_of_n"
    access: ClassVar[Access] = "score"
    scopes: ClassVar[tuple[Scope, ...]] = ("item", "universal")
    needs: ClassVar[tuple[Need, ...]] = ("pool",)
    priors: ClassVar[tuple[str, ...]] = ()

    def propose(self, oracle: Oracle, *, seed: int) -> Proposal:
        """Score the alternatives of every problem and take the lowest.

        Raises:
            ValueError: the oracle has no pool, or fewer alternatives than ``n``.
        """
        if oracle.pool is None:
            raise ValueError(
                "best_of_n chooses among real alternatives and the oracle has no pool of them; "
                "give the testbed observed contexts, or use natural_thoughts, which draws from the prior"
            )
        size = oracle.pool.shape[1]
        if self.n is not None and not 1 <= self.n <= size:
            raise ValueError(
                f"best_of_n was asked to choose among n={self.n} but the pool holds {size}; use n <= {size}"
            )
        n = min(self.n or size, oracle.budget)
        rng = np.random.default_rng(np.random.SeedSequence(seed))
        # the same draw for all problems: alternative j is the same context for every item
        chosen = np.sort(rng.choice(size, n, replace=False))
        pool = oracle.pool[:, chosen]
        problems = np.arange(oracle.n_problems)
        best = oracle.score(problems, pool).argmin(axis=1)
        return Proposal(pool[problems, best][:, None], spent=np.full(len(problems), np.log2(n)))


if __name__ == "__main__":
    from elk_stress.cli.script import run_attack

    sys.exit(run_attack(BestOfN.name))
