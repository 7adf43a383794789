"""The attack protocol: an attack only proposes moves; the engine applies, re-scores, checks behaviour and decides.

An attack sees an :class:`Oracle`: the questions it may ask, each counted and limited by the budget, according to the
access that it declares. Whatever it returns is only a proposal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import numpy as np

from elk_stress.estimators.limit_state import LimitState, Meter
from elk_stress.thoughts.attacks.proposal import Access, Proposal, SpentAs, allows

if TYPE_CHECKING:
    from elk_stress.thoughts.attacks.model_access import ModelAccess

__all__ = ["Access", "Attack", "AttackOfAnyKind", "Need", "Oracle", "Proposal", "Scope", "SpentAs", "allows"]

Scope = Literal["item", "universal"]
Need = Literal["pool", "model_access", "output", "model"]


class Oracle:
    """What an attack may ask about a batch of problems; counts and limits every question.

    Args:
        limit_state: ``g <= 0`` = failed (and kept, if the threat constrains behaviour).
        access: the attack's declared access; asking for more raises ``PermissionError``.
        budget: questions per problem.
        pool: ``(problems, n, dim)`` real alternatives in u-space (contexts B), for attacks that choose among them.
        model_access: what the model knows of itself, for attacks that are its own doing.
    """

    def __init__(
        self,
        limit_state: LimitState,
        access: Access,
        budget: int,
        pool: np.ndarray | None = None,
        model_access: ModelAccess | None = None,
    ) -> None:
        self._meter = Meter(limit_state, budget)
        self.access = access
        self.dim = limit_state.dim
        self.n_problems = limit_state.n_problems
        self.budget = budget
        self.pool = pool
        self._model_access = model_access

    @property
    def model_access(self) -> ModelAccess:
        """What the model knows of itself.

        Raises:
            LookupError: the attack did not declare ``needs = ("model_access",)``.
        """
        if self._model_access is None:
            raise LookupError(
                'this oracle gives no access to the model; an attack that asks declares needs = ("model_access",)'
            )
        return self._model_access

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


@runtime_checkable
class AttackOfAnyKind(Protocol):
    """What attacks on activations and on weights have in common."""

    @property
    def name(self) -> str: ...
    @property
    def scopes(self) -> tuple[str, ...]: ...


@runtime_checkable
class Attack(Protocol):
    """A frozen dataclass of hyperparameters with these declarations (class variables).

    Attributes:
        name: registered name.
        access: the most that it asks of the oracle.
        scopes: the scopes it works in.
        needs: what it cannot do without: ``pool``, real alternatives to choose among; ``model_access``, what the
            model knows of itself; ``output``, behaviour that can be kept; ``model``, a language model that reads
            prefixes.
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
