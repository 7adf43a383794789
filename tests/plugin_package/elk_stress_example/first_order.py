"""One Newton step from the origin: the exact answer for a linear probe, a first guess for any other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from elk_stress.thoughts.attacks.protocol import Access, Need, Oracle, Proposal, Scope

__all__ = ["FirstOrder"]


@dataclass(frozen=True)
class FirstOrder:
    """One step along the gradient at the origin.

    Attributes:
        overshoot: how far beyond the linearized boundary, relative to the distance.
    """

    overshoot: float = 0.01

    name: ClassVar[str] = "first_order"
    access: ClassVar[Access] = "gradient"
    scopes: ClassVar[tuple[Scope, ...]] = ("item", "universal")
    needs: ClassVar[tuple[Need, ...]] = ()
    priors: ClassVar[tuple[str, ...]] = ()

    def propose(self, oracle: Oracle, *, seed: int) -> Proposal:
        """One gradient per problem."""
        origin = np.zeros((oracle.n_problems, 1, oracle.dim))
        g, slope = oracle.gradient(np.arange(oracle.n_problems), origin)
        square = (slope**2).sum(axis=-1)
        length = np.divide(g, square, out=np.zeros_like(g), where=square > 0)
        return Proposal(-slope * length[..., None] * (1 + self.overshoot))
