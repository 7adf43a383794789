r"""What the thinking model knows of itself, and the edits by which it thinks differently from now on.

An attack that games a probe is the model's own doing: it knows its activations, which of its items are positive, how
differently it could think (the prior) and what its output depends on. What it knows of the *probe* is limited by the
access that the attack declares: scores and gradients at activations of its choice are counted like an oracle's.

An :class:`Edit` is a rule for every item of every split. The engine applies it, scores it, judges behaviour, and takes
``u_i = L^+ (x'_i - x_i)``: whatever the attack was, it is a move under the threat's own prior, so that all attacks
bound the same B.

Shapes: activations ``(n, dim)``, an item's being its mean over neutral contexts (its origin); u ``(..., prior.dim)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from elk_stress.attack import Access, Proposal, allows
from elk_stress.priors import EllipticalPrior
from elk_stress.probe import FittedProbe
from elk_stress.testbed import SplitName, Testbed

__all__ = ["Edit", "Mind"]


@dataclass(frozen=True)
class Edit:
    """How the model thinks about any item from now on.

    Attributes:
        moved: split -> ``(n, dim)`` activations of all its items, edited. It may use an item's truth, which the model
            knows, and nothing of the probe beyond what it has learned.
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


@dataclass
class Mind:
    """What an attack with ``needs = ("mind",)`` finds in ``oracle.mind``.

    Attributes:
        testbed: model and items.
        prior: of the threat.
        items: ``(problems,)`` test items that are attacked (in universal scope: all caught positives).
        epsilon: nats within which behaviour must stay, or ``None``.
        seed: of the testbed's draws.
        queries, gradients: rows that were scored, and differentiated.
    """

    testbed: Testbed
    prior: EllipticalPrior
    items: np.ndarray
    epsilon: float | None
    _probe: FittedProbe
    _threshold: float
    _access: Access
    queries: int = 0
    gradients: int = 0
    _origins: dict[SplitName, np.ndarray] = field(default_factory=dict, repr=False)
    _compiled: dict[str, Any] = field(default_factory=dict, repr=False)

    # -- of itself ------------------------------------------------------------------------------------------------

    def activations(self, split: SplitName) -> np.ndarray:
        """``(n, dim)`` float32: every item of the split, as the model thinks of it on average."""
        if split not in self._origins:
            self._origins[split] = np.asarray(self.testbed.activations(split).mean(axis=1), dtype=np.float32)
        return self._origins[split]

    def truth(self, split: SplitName) -> np.ndarray:
        """``(n,)`` in {0, 1}: the latent that the probe is about; 1 = positive."""
        return np.asarray(self.testbed.splits[split].labels)

    @property
    def training(self) -> np.ndarray:
        """Training items to learn on: all but the negated halves of contrast pairs."""
        items = self.testbed.splits["train"]
        every = np.arange(len(items))
        return every if items.pairs is None else np.setdiff1d(every, items.pairs[:, 1])

    @property
    def origins(self) -> np.ndarray:
        """``(problems, dim)`` of the attacked items."""
        return np.asarray(self.activations("test")[self.items])

    def sensitivity(self, split: SplitName, items: np.ndarray) -> np.ndarray | None:
        """``(p, rank, k)``: A with ``shift(u) ~ 0.5 ||A u||^2`` near u = 0; ``None`` where there is no output."""
        if self.testbed.shift_cost == "none":
            return None
        factor = np.asarray(self.testbed.shift_factor(split, np.asarray(items)), dtype=float)
        return np.asarray(factor @ np.asarray(self.prior.factor, dtype=float))

    def to_u(self, edits: np.ndarray) -> np.ndarray:
        """``(..., dim)`` edits of activations -> points in u-space."""
        return np.asarray(self.prior.inverse(edits))

    def to_edit(self, u: np.ndarray) -> np.ndarray:
        """Points in u-space -> ``(..., dim)`` edits of activations."""
        return np.asarray(self.prior.move(np.asarray(u, dtype=float)))

    def propose(self, edit: Edit, *, spent: float | None = None) -> Proposal:
        """An edit as a proposal: one deterministic move per problem, ``u_i = L^+ (x'_i - x_i)``.

        ``spent``: bits in the attack's own prior, where it has one.
        """
        u = self.to_u(edit.moved("test")[self.items] - self.origins)
        bits = None if spent is None else np.full(len(u), float(spent))
        return Proposal(u[:, None], centre=u, spent=bits, edit=edit)

    # -- of the probe, counted ------------------------------------------------------------------------------------

    @property
    def threshold(self) -> float:
        """The score above which the monitor is alarmed; needs ``score`` access."""
        self._need("score")
        return self._threshold

    def score(self, activations: np.ndarray) -> np.ndarray:
        """``(n,)`` scores of ``(n, dim)`` activations: needs ``score`` access; n queries."""
        self._need("score")
        self.queries += len(activations)
        return np.asarray(self._probe.score(np.asarray(activations, dtype=np.float32)), dtype=float)

    def gradient(self, activations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scores ``(n,)`` and their gradients ``(n, dim)``: needs ``gradient`` access; n queries and n gradients."""
        self._need("gradient")
        from elk_stress.situation import score_gradients

        scores = self.score(activations)
        self.gradients += len(activations)
        slope = score_gradients(self._probe, np.asarray(activations, dtype=np.float32), self._compiled)
        return scores, np.broadcast_to(np.asarray(slope, dtype=float), activations.shape)

    def _need(self, access: Access) -> None:
        if not allows(self._access, access):
            raise PermissionError(
                f"an attack that declares {self._access!r} access asked for {access!r}; declare the access it needs"
            )

    def model(self, split: SplitName) -> Any:
        """The language model reading this split behind any prefix (:mod:`elk_stress.subjects.prefixed`).

        Raises:
            LookupError: the testbed is not a language model.
        """
        read = getattr(self.testbed, "prefixed", None)
        if read is None:
            raise LookupError(f"{self.testbed.name} is no language model; prefixes need one (testbed statements)")
        return read(split)
