"""The attack protocol: an attack only proposes moves; the engine applies, re-scores, checks behaviour and decides.

An attack sees an :class:`Oracle`: the questions it may ask, each counted and limited by the budget, according to the
access that it declares. Whatever it returns is only a proposal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import numpy as np

from elk_stress.limit_state import LimitState, Meter

if TYPE_CHECKING:
    from elk_stress.mind import Edit, Mind

__all__ = ["Access", "Attack", "Need", "Oracle", "Proposal", "Scope", "SpentAs", "allows"]

Scope = Literal["item", "universal"]
Access = Literal["none", "label", "score", "gradient", "weights"]
Need = Literal["pool", "mind", "output", "model"]
# D_inf: choosing among draws of the prior; KL: an average over the prior, e.g. a mean shift (never summed, DESIGN 2.2)
SpentAs = Literal["selection", "kl"]

_ORDER: tuple[Access, ...] = ("none", "label", "score", "gradient", "weights")


def allows(declared: Access, asked: Access) -> bool:
    """Whether an attack that declares one access may ask for another."""
    return _ORDER.index(declared) >= _ORDER.index(asked)


class Oracle:
    """What an attack may ask about a batch of problems; counts and limits every question.

    Args:
        limit_state: ``g <= 0`` = failed (and kept, if the threat constrains behaviour).
        access: the attack's declared access; asking for more raises ``PermissionError``.
        budget: questions per problem.
        pool: ``(problems, n, dim)`` real alternatives in u-space (contexts B), for attacks that choose among them.
        mind: what the model knows of itself, for attacks that are its own doing.
    """

    def __init__(
        self,
        limit_state: LimitState,
        access: Access,
        budget: int,
        pool: np.ndarray | None = None,
        mind: Mind | None = None,
    ) -> None:
        self._meter = Meter(limit_state, budget)
        self.access = access
        self.dim = limit_state.dim
        self.n_problems = limit_state.n_problems
        self.budget = budget
        self.pool = pool
        self._mind = mind

    @property
    def mind(self) -> Mind:
        """What the model knows of itself.

        Raises:
            LookupError: the attack did not declare ``needs = ("mind",)``.
        """
        if self._mind is None:
            raise LookupError('this oracle has no mind; an attack that asks for it declares needs = ("mind",)')
        return self._mind

    @property
    def queries(self) -> np.ndarray:
        """Values asked so far, per problem."""
        return self._meter.evaluations

    @property
    def gradients(self) -> np.ndarray:
        """Gradients asked so far, per problem."""
        return self._meter.gradients

    def score(self, problems: np.ndarray, u: np.ndarray) -> np.ndarray:
        """g at ``(p, n, dim)``: needs ``score`` access."""
        self._need("score")
        return self._meter.value(problems, u)

    def label(self, problems: np.ndarray, u: np.ndarray) -> np.ndarray:
        """Whether each point fails: needs ``label`` access."""
        self._need("label")
        return self._meter.value(problems, u) <= 0

    def gradient(self, problems: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """g and its gradient: needs ``gradient`` access."""
        self._need("gradient")
        return self._meter.value_and_gradient(problems, u)

    def _need(self, access: Access) -> None:
        if not allows(self.access, access):
            raise PermissionError(
                f"an attack that declares {self.access!r} access asked for {access!r}; declare the access it needs"
            )


@dataclass(frozen=True)
class Proposal:
    """What an attack returns: candidate moves, best first, and how it drew them; or one edit for all items.

    Attributes:
        moves: ``(problems, candidates, dim)`` points in u-space.
        centre: ``(problems, dim)``: if the attack is a Gaussian ``N(centre, I)`` around a point, that point: the engine
            turns it into a rigorous evidence bound. ``None`` if it is no such thing. An edit's own moves are centres.
        from_prior: the candidates are independent draws from the prior: as many fresh ones are counted to bound B.
        random: the candidates are random moves, which need no control: they are one.
        spent: bits spent per problem where exactly known, in the attack's own prior (best-of-n: log2 n).
        spent_as: what kind of bits these are: they guarantee different things, and are not compared across kinds.
        edit: how the model thinks about every item from now on, of which the moves are what happens to these problems;
            the engine applies it again, to items of all splits (:meth:`elk_stress.mind.Mind.propose` makes one).
    """

    moves: np.ndarray
    centre: np.ndarray | None = None
    from_prior: bool = False
    random: bool = False
    spent: np.ndarray | None = None
    spent_as: SpentAs = "selection"
    edit: Edit | None = None


@runtime_checkable
class Attack(Protocol):
    """A frozen dataclass of hyperparameters with these declarations (class variables).

    Attributes:
        name: registered name.
        access: the most that it asks of the oracle.
        scopes: the scopes it works in.
        needs: what it cannot do without: ``pool``, real alternatives to choose among; ``mind``, what the model knows of
            itself; ``output``, behaviour that can be kept; ``model``, a language model that reads prefixes.
        priors: names of the priors it makes sense under; empty for all.

    An attack whose moves no random direction resembles also has ``control(oracle, proposal, *, seed) -> Proposal``: the
    benign control of equal size (a random prefix for a learned one), which asks the probe nothing.
    """

    @property
    def name(self) -> str: ...
    @property
    def access(self) -> Access: ...
    @property
    def scopes(self) -> tuple[Scope, ...]: ...
    @property
    def needs(self) -> tuple[Need, ...]: ...
    @property
    def priors(self) -> tuple[str, ...]: ...

    def propose(self, oracle: Oracle, *, seed: int) -> Proposal:
        """Search within the oracle's budget and propose moves for every problem."""
        ...
