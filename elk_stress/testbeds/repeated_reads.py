r"""Every item read in several neutral contexts at once: what a monitor sees that runs the model more than once.

Read j of an item in bundle b is the base testbed's activation under context ``b + j`` of the same set (round about), so
every read has the same mean over bundles. Activations are flat, ``dim = reads d``, and ``tokens`` = reads: probes of
tokens get all reads, probes of one activation the last one (:mod:`elk_stress.probing.multi_read`).

How the reads move is not estimated but said, by a prior whose blocks are the base's natural thoughts ``Sigma = L L^T``:

==========  ============================  ======================================================================
``moved``   factor                        what it means
==========  ============================  ======================================================================
apart       ``diag(L, ..., L)``           nobody optimizes: contexts are drawn independently of each other
together    ``(L; ...; L)``               a model that thinks the same about the item in whatever context it is
==========  ============================  ======================================================================

The score of a linear probe averaged over k reads moves by ``w . mean_j move_j``, whose deviation is ``||L^T w|| /
sqrt(k)`` apart and ``||L^T w||`` together. So, at a given margin, the bits of a free break grow like k against an
attacker whose thoughts are independent in every context, and not at all against one who thinks the same in all of them.

Behaviour. :meth:`RepeatedReads.shift` is the mean over reads of the base's shift, each read moved by its own part.

Shapes: activations ``(n_items, contexts, reads d)``. Units: activations; nats for shift.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal

import numpy as np

from elk_stress.probing.multi_read import flatten
from elk_stress.probing.probe import FittedProbe
from elk_stress.testbeds.protocol import ContextSet, Items, SplitName, Testbed
from elk_stress.threats.priors import EllipticalPrior, natural

__all__ = ["RepeatedReads"]


class RepeatedReads:
    """A testbed whose items are read in several neutral contexts at once.

    Args:
        base: the testbed that is read more often.
        reads: how many contexts the monitor reads an item in.
        moved: whether thoughts move ``"apart"`` in every context, or ``"together"``.

    Raises:
        ValueError: fewer than one read, or a base whose items are several reads already.
    """

    def __init__(self, base: Testbed, reads: int, moved: Literal["apart", "together"] = "apart") -> None:
        if reads < 1 or moved not in ("apart", "together"):
            raise ValueError(f"expected reads >= 1 and moved 'apart' or 'together', got {reads} and {moved!r}")
        if getattr(base, "tokens", None) is not None:
            raise ValueError(f"items of {base.name!r} hold several reads already; bundle a testbed of single ones")
        self.base, self.tokens, self.moved = base, reads, moved

    @property
    def name(self) -> str:
        """Of the base, with the number of reads."""
        return f"{self.base.name} x {self.tokens} {self.moved}"

    @property
    def site(self) -> str:
        """Of the base."""
        return self.base.site

    @property
    def dim(self) -> int:
        """Width of all reads together."""
        return self.tokens * self.base.dim

    @property
    def splits(self) -> Mapping[SplitName, Items]:
        """Of the base."""
        return self.base.splits

    def prepare(self, progress: Any = None) -> None:
        """Prepare the base."""
        self.base.prepare(progress)

    def activations(self, split: SplitName, contexts: ContextSet = "prior") -> np.ndarray:
        """``(n_items, n_contexts, reads d)``; a set with fewer contexts than reads gives some of them twice."""
        rows = self.base.activations(split, contexts)
        n = rows.shape[1]
        return np.concatenate([np.take(rows, (np.arange(n) + j) % n, axis=1) for j in range(self.tokens)], axis=-1)

    @cached_property
    def prior(self) -> EllipticalPrior:
        """The base's per-item natural thoughts, in every read: apart or together."""
        return self._laid_out(self._one)

    @cached_property
    def known_prior(self) -> EllipticalPrior:
        """The same from the contexts that probes are fitted on: what a defence may know."""
        return self._laid_out(natural(self._plain("fit")))

    def as_one_read(self, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, EllipticalPrior]:
        """What the spread of a linear score ``weight (reads d)`` rests on: activations ``(items, contexts, d)`` of one
        read, the sum of the weights of all reads, ``(d,)``, and the prior of one read.

        The variance of that score is the one along the sum, but for a factor that only the number of reads decides.
        """
        return self._plain("prior").astype(float), weight.reshape(self.tokens, -1).sum(axis=0), self._one

    @cached_property
    def _one(self) -> EllipticalPrior:
        return natural(self._plain("prior"))

    def _plain(self, contexts: ContextSet) -> np.ndarray:
        items = self.base.splits["train"]
        plain = np.arange(len(items)) if items.pairs is None else np.setdiff1d(np.arange(len(items)), items.pairs[:, 1])
        return self.base.activations("train", contexts)[plain]

    def _laid_out(self, one: EllipticalPrior) -> EllipticalPrior:
        tile = np.eye(self.tokens) if self.moved == "apart" else np.ones((self.tokens, 1))
        return EllipticalPrior(np.kron(tile, one.factor), one.tail, f"natural, {self.moved}", dict(one.notes))

    @property
    def shift_cost(self) -> Literal["exact", "model", "none"]:
        """Of the base."""
        return self.base.shift_cost

    def shift(self, split: SplitName, items: np.ndarray, moves: np.ndarray) -> np.ndarray:
        """Mean over reads of the base's shift: ``moves (p, n, reads d)`` -> ``(p, n)`` nats."""
        parts = moves.reshape(*moves.shape[:2], self.tokens, self.base.dim)
        each = [self.base.shift(split, items, parts[:, :, j]) for j in range(self.tokens)]
        return np.asarray(np.mean(each, axis=0))

    def shift_factor(self, split: SplitName, items: np.ndarray) -> np.ndarray:
        """Block diagonal: the base's factor in every read, over ``sqrt(reads)``."""
        one = self.base.shift_factor(split, items) / np.sqrt(self.tokens)
        p, rank, d = one.shape
        blocks = np.einsum("ij,prd->pirjd", np.eye(self.tokens), one)
        return np.asarray(blocks.reshape(p, self.tokens * rank, self.tokens * d))

    def known_probes(self) -> Mapping[str, FittedProbe]:
        """Those of the base, reading the last context."""
        return {name: flatten(probe, self.tokens) for name, probe in self.base.known_probes().items()}

    def describe(self) -> Mapping[str, Any]:
        """What the base says, and how it is read."""
        return {**self.base.describe(), "reads": self.tokens, "moved": self.moved}
