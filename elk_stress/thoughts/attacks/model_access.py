r"""What the thinking model knows of itself, and the edits by which it thinks differently from now on.

An attack that games a probe is the model's own doing: it knows its activations, which of its items are positive, how
differently it could think (the prior) and what its output depends on. What it knows of the *probe* is limited by the
access that the attack declares: scores and gradients at activations of its choice are counted like an oracle's, and
limited by the same budget, once per training item.

An :class:`~elk_stress.thoughts.attacks.proposal.Edit` is a rule for every item of every split. The engine applies it,
scores it, judges behaviour, and takes ``u_i = L^+ (x'_i - x_i)``: whatever the attack was, it is a move under the
threat's own prior, so that all attacks bound the same B.

Shapes: activations ``(n, dim)``, an item's being its mean over neutral contexts (its origin); u ``(..., prior.dim)``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from elk_stress.estimators.limit_state import BudgetExhausted
from elk_stress.probing.probe import FittedProbe, Probe
from elk_stress.testbeds.protocol import SplitName, Testbed
from elk_stress.thoughts.attacks.proposal import Access, Edit, Proposal, SpentAs, allows
from elk_stress.thoughts.baseline import score_gradients
from elk_stress.thoughts.prepared import Prepared, fit_probe
from elk_stress.threats.priors import EllipticalPrior
from elk_stress.threats.threat import Threat

__all__ = ["ModelAccess"]


@dataclass
class ModelAccess:
    """What an attack with ``needs = ("model_access",)`` finds in ``oracle.model_access``.

    Attributes:
        prepared: model, items and what they are like.
        threat, prior: what the attack is up to, and how differently the model could think.
        items: ``(problems,)`` test items that are attacked (in universal scope: all caught positives).
        epsilon: nats within which behaviour must stay, or ``None``.
        budget: questions per training item.
        queries, gradients: rows that were scored, and differentiated.
    """

    prepared: Prepared
    threat: Threat
    prior: EllipticalPrior
    items: np.ndarray
    epsilon: float | None
    _probe: FittedProbe
    _threshold: float
    _access: Access
    budget: int
    queries: int = 0
    gradients: int = 0
    _compiled: dict[str, Any] = field(default_factory=dict, repr=False)

    # -- of itself ------------------------------------------------------------------------------------------------

    @property
    def testbed(self) -> Testbed:
        """Model and items."""
        return self.prepared.testbed

    def activations(self, split: SplitName) -> np.ndarray:
        """``(n, dim)`` float32: every item of the split, as the model thinks of it on average."""
        return self.prepared.origins(split)

    def truth(self, split: SplitName) -> np.ndarray:
        """``(n,)`` in {0, 1}: the latent that the probe is about; 1 = positive."""
        return np.asarray(self.testbed.splits[split].labels)

    @property
    def training(self) -> np.ndarray:
        """Training items to learn on: all but the negated halves of contrast pairs."""
        return self.prepared.plain_train

    @property
    def origins(self) -> np.ndarray:
        """``(problems, dim)`` of the attacked items."""
        return np.asarray(self.activations("test")[self.items])

    def sensitivity(self, split: SplitName, items: np.ndarray) -> np.ndarray | None:
        """``(p, rank, k)``: A with ``shift(u) ~ 0.5 ||A u||^2`` near u = 0; ``None`` where there is no output."""
        factors = self.looks(split, items)
        return None if factors is None else np.asarray(factors @ np.asarray(self.prior.factor, dtype=float))

    def looks(self, split: SplitName, items: np.ndarray) -> np.ndarray | None:
        """``(p, rank, dim)``: F with ``shift(edit) ~ 0.5 ||F edit||^2`` for small edits, or ``None``: no output."""
        behaviour = self.prepared.train_behaviour if split == "train" else self.prepared.behaviour
        return None if behaviour is None else behaviour.factors(np.asarray(items)).astype(float)

    def fit(self, probe: str | Probe) -> FittedProbe:
        """A probe that the model fits on its own training thoughts, as a monitor would; asks the monitor's nothing."""
        return fit_probe(self.prepared, probe)

    def to_u(self, edits: np.ndarray) -> np.ndarray:
        """``(..., dim)`` edits of activations -> points in u-space."""
        return np.asarray(self.prior.inverse(edits))

    def to_edit(self, u: np.ndarray) -> np.ndarray:
        """Points in u-space -> ``(..., dim)`` edits of activations."""
        return np.asarray(self.prior.move(np.asarray(u, dtype=float)))

    def propose(self, edit: Edit, *, spent: float | None = None, spent_as: SpentAs = "selection") -> Proposal:
        """An edit as a proposal: one deterministic move per problem, ``u_i = L^+ (x'_i - x_i)``.

        ``spent``: bits in the attack's own prior, where it has one; ``spent_as``: of which kind.
        """
        if self.threat.scope != "item":
            raise ValueError(
                "an edit moves every item by itself; an attack that proposes one declares scopes = ('item',)"
            )
        u = self.to_u(self.after(edit) - self.origins)
        bits = None if spent is None else np.full(len(u), float(spent))
        return Proposal(u[:, None], centre=u, spent=bits, spent_as=spent_as, edit=edit)

    def after(self, edit: Edit) -> np.ndarray:
        """``(problems, dim)``: the attacked items as the edit leaves them.

        Raises:
            ValueError: it does not give all items of the split that it is asked for.
        """
        moved, expected = np.asarray(edit.moved("test"), dtype=float), self.activations("test").shape
        if moved.shape != expected:
            raise ValueError(
                f"the edit's moved('test') has shape {moved.shape}; expected {expected}, all items of the split that "
                "it is asked for"
            )
        return np.asarray(moved[self.items])

    # -- of the probe, counted ------------------------------------------------------------------------------------

    @property
    def threshold(self) -> float:
        """The score above which the monitor is alarmed; needs ``score`` access."""
        self._need("score")
        return self._threshold

    @property
    def left(self) -> int:
        """Questions that may still be asked: ``budget`` for every training item, less what was asked."""
        return self.budget * len(self.training) - self.queries - self.gradients

    def score(self, activations: np.ndarray) -> np.ndarray:
        """``(n,)`` scores of ``(n, dim)`` activations: needs ``score`` access; n queries.

        Raises:
            BudgetExhausted: fewer than n questions are left.
        """
        self._need("score")
        self._afford(len(activations))
        self.queries += len(activations)
        return np.asarray(self._probe.score(np.asarray(activations, dtype=np.float32)), dtype=float)

    def gradient(self, activations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scores ``(n,)`` and their gradients ``(n, dim)``: needs ``gradient`` access; n queries and n gradients."""
        self._need("gradient")
        self._afford(2 * len(activations))
        scores = self.score(activations)
        self.gradients += len(activations)
        slope = score_gradients(self._probe, np.asarray(activations, dtype=np.float32), self._compiled)
        return scores, np.broadcast_to(np.asarray(slope, dtype=float), activations.shape)

    def _afford(self, rows: int) -> None:
        if rows > self.left:
            raise BudgetExhausted(
                f"{rows} questions asked with {self.left} left of {self.budget} per training item; raise the budget"
            )

    def _need(self, access: Access) -> None:
        if not allows(self._access, access):
            raise PermissionError(
                f"an attack that declares {self._access!r} access asked for {access!r}; declare the access it needs"
            )

    def model(self, split: SplitName) -> Any:
        """The language model reading this split behind any prefix (:mod:`elk_stress.models.prefixed`).

        Raises:
            LookupError: the testbed is not a language model.
        """
        read = getattr(self.testbed, "prefixed", None)
        if read is None:
            raise LookupError(f"{self.testbed.name} is no language model; prefixes need one (testbed statements)")
        return read(split)
