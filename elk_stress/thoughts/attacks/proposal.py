"""What an attack may ask, and what it returns: candidate moves, or one edit of how the model thinks of all items."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from elk_stress.testbeds.protocol import SplitName

__all__ = ["Access", "Edit", "Proposal", "SpentAs", "allows"]

Access = Literal["none", "label", "score", "gradient", "weights"]
# D_inf: choosing among draws of the prior; KL: an average over the prior, e.g. a mean shift (never summed, DESIGN 2.2)
SpentAs = Literal["selection", "kl"]

_ORDER: tuple[Access, ...] = ("none", "label", "score", "gradient", "weights")


def allows(declared: Access, asked: Access) -> bool:
    """Whether an attack that declares one access may ask for another."""
    return _ORDER.index(declared) >= _ORDER.index(asked)


@dataclass(frozen=True)
class Edit:
    """How the model thinks about any item from now on.

    Attributes:
        moved: split -> ``(n, dim)`` activations of all its items, edited; made once. It may use an item's truth, which
            the model knows, and nothing of the probe beyond what it has learned.
        shift: ``(p,)`` test items -> ``(p,)`` nats, where the model really runs otherwise (a prefix, recoded weights);
            ``None``: the edit happens at the site alone, and is judged there.
        uses_truth: whether ``moved`` depends on an item's truth: then the edit writes it into the activations, and no
            refit can tell what was left from what was put in, so there is no audit.
        epsilon: nats that count as kept under ``shift``, where that is no move at the site; ``None``: the threat's.
    """

    moved: Callable[[SplitName], np.ndarray]
    shift: Callable[[np.ndarray], np.ndarray] | None = None
    epsilon: float | None = None
    uses_truth: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "moved", cache(self.moved))


@dataclass(frozen=True)
class Proposal:
    """What an attack returns: candidate moves, best first, and how it drew them; or one edit for all items.

    Attributes:
        moves: ``(problems, candidates, dim)`` points in u-space.
        centre: ``(problems, dim)``: if the attack is a Gaussian ``N(centre, I)`` around a point, that point: the engine
            turns it into a rigorous evidence bound. ``None`` if it is no such thing. An edit's own moves are centres.
        from_prior: the candidates are independent draws from the prior: as many fresh ones are counted to bound B.
        stays: it proposes to stay, for it has shown that no move of its kind exists: this is no failure to engage.
        random: the candidates are random moves, which need no control: they are one (so are draws from the prior).
        spent: bits spent per problem where exactly known, in the attack's own prior (best-of-n: log2 n).
        spent_as: what kind of bits these are: they guarantee different things, and are not compared across kinds.
        edit: how the model thinks about every item from now on, of which the moves are what happens to these problems;
            the engine applies it again, to items of all splits
            (:meth:`elk_stress.thoughts.attacks.model_access.ModelAccess.propose` makes one).
    """

    moves: np.ndarray
    centre: np.ndarray | None = None
    from_prior: bool = False
    random: bool = False
    stays: bool = False
    spent: np.ndarray | None = None
    spent_as: SpentAs = "selection"
    edit: Edit | None = None
