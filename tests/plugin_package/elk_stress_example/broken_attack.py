"""One Newton step with promises broken on purpose: what the public suite must catch in an installed package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from elk_stress.thoughts.attacks.protocol import Access, Need, Oracle, Proposal, Scope

__all__ = ["BrokenFirstOrder"]


@dataclass(frozen=True)
class BrokenFirstOrder:
    """One step along the gradient at the origin, with a promise broken.

    Attributes:
        breaks: the promise: ``shape``, ``budget``, ``access``, ``seed``, ``every problem``, ``nearest``, ``prior``.
    """

    breaks: str = "shape"

    name: ClassVar[str] = "broken_first_order"
    access: ClassVar[Access] = "gradient"
    scopes: ClassVar[tuple[Scope, ...]] = ("item", "universal")
    needs: ClassVar[tuple[Need, ...]] = ()
    priors: ClassVar[tuple[str, ...]] = ()

    def propose(self, oracle: Oracle, *, seed: int) -> Proposal:
        """One gradient per problem."""
        rows, origin = np.arange(oracle.n_problems), np.zeros((oracle.n_problems, 1, oracle.dim))
        if self.breaks == "access":
            oracle.score(rows, origin)
            return Proposal(origin)
        for _ in range(oracle.budget if self.breaks == "budget" else 0):
            oracle.gradient(rows, origin)
        g, slope = oracle.gradient(rows, origin)
        square = (slope**2).sum(axis=-1)
        length = np.divide(g, square, out=np.zeros_like(g), where=square > 0)
        moves = -slope * length[..., None] * (1.5 if self.breaks == "nearest" else 1.01)
        if self.breaks == "seed":
            moves = moves * (1 + 1e-6 * np.random.standard_normal())  # noqa: NPY002
        if self.breaks == "every problem":
            moves = np.broadcast_to(moves[:1], moves.shape)
        return Proposal(moves[:, 0] if self.breaks == "shape" else moves, from_prior=self.breaks == "prior")
