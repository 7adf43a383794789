"""The testbed protocol: a model, its data, and the known truth about what a probe should report.

A testbed answers three questions. What would the activations be if the model had thought about the same thing
differently (``activations``: items x neutral contexts)? What does the model do when its activations are moved
(``shift``)? And what is true (``Items.labels``)?
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from elk_stress.probing.probe import FittedProbe

__all__ = ["PLANTED", "ContextSet", "Items", "SplitName", "Testbed", "check_splits"]

SplitName = Literal["train", "calibration", "test"]
ContextSet = Literal["fit", "prior", "observed", "bare"]
PLANTED = ("oracle", "paper")
"""Probes that a testbed of known truth knows beside the registered ones (:meth:`Testbed.known_probes`)."""


@dataclass(frozen=True)
class Items:
    """Items of one split.

    Attributes:
        ids: unique names.
        labels: ``(n,)`` in {0, 1}; 1 = positive, what a monitor must catch.
        groups: ``(n,)`` entity of each item; no entity may occur in two splits.
        pairs: ``(n_pairs, 2)`` row indices of contrast pairs within this split, or ``None``.
        texts: the texts, where there are any.
    """

    ids: tuple[str, ...]
    labels: np.ndarray
    groups: np.ndarray
    pairs: np.ndarray | None = None
    texts: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.ids)


@runtime_checkable
class Testbed(Protocol):
    """What the engine asks of a model organism or of a real model with data.

    ``name``, ``site`` (where activations are read), ``dim`` (their width), ``splits`` (train, calibration, test).
    """

    @property
    def name(self) -> str:
        """Registered name."""
        ...

    @property
    def site(self) -> str:
        """Where activations are read, e.g. ``layers.18``."""
        ...

    @property
    def dim(self) -> int:
        """Width of the activations at the site."""
        ...

    @property
    def splits(self) -> Mapping[SplitName, Items]:
        """Train, calibration and test items."""
        ...

    def prepare(self, progress: Any = None) -> None:
        """Do the long work (fetch, extract, choose the site), with progress; later calls are cheap. Idempotent."""
        ...

    def activations(self, split: SplitName, contexts: ContextSet = "prior") -> np.ndarray:
        """``(n_items, n_contexts, dim)`` float32 under one set of neutral contexts.

        No context is in two sets: ``fit`` (part of A, training items only: what probes are fitted on), ``prior`` (the
        rest of A: origins, priors and thresholds; a fitted probe has learned to ignore the very contexts that it saw,
        so these must be others), ``observed`` (B: what the prior's prediction is held against), ``bare`` (the items
        alone, one context).

        Raises:
            LookupError: the testbed has no such set.
        """
        ...

    @property
    def shift_cost(self) -> Literal["exact", "model", "none"]:
        """``exact``: the shift is its quadratic form, cheap and closed; ``model``: each is a forward pass; ``none``:
        there is no output, so behaviour cannot be constrained."""
        ...

    def shift(self, split: SplitName, items: np.ndarray, moves: np.ndarray) -> np.ndarray:
        """True behaviour shift in nats when item ``items[i]``'s activations become origin + ``moves[i, j]``.

        ``items (p,)`` indices into the split, ``moves (p, n, dim)`` -> ``(p, n)``. The origin is the item's mean over
        the prior contexts; the reference output is the one at the origin.
        """
        ...

    def shift_factor(self, split: SplitName, items: np.ndarray) -> np.ndarray:
        """``(p, rank, dim)``: F with ``shift(move) ~ 0.5 ||F move||^2`` near the origin (Fisher)."""
        ...

    def known_probes(self) -> Mapping[str, FittedProbe]:
        """Controls that this testbed knows: ``oracle`` (must survive), ``paper`` (must break). Empty if unknown."""
        ...

    def describe(self) -> Mapping[str, Any]:
        """What goes into ``result.json``: model, data, sizes, versions, how the site was chosen."""
        ...


def check_splits(splits: Mapping[SplitName, Items]) -> list[str]:
    """Entities that occur in more than one split (empty when grouped rightly)."""
    seen: dict[Any, str] = {}
    leaked = []
    for split, items in splits.items():
        for group in np.unique(items.groups).tolist():
            if seen.setdefault(group, split) != split:
                leaked.append(str(group))
    return leaked
