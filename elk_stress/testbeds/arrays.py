"""Activation arrays as a testbed, for users with neither model nor texts at hand.

Without contexts nothing says how differently the model could have thought: moves are then isotropic at the activations'
own scale (:attr:`Arrays.prior`), and so are the default threats (:attr:`Arrays.threats`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from elk_stress.duplicates import conflicts, joined, names_items, row_keys
from elk_stress.priors import EllipticalPrior
from elk_stress.probe import FittedProbe
from elk_stress.testbed import ContextSet, Items, SplitName
from elk_stress.threat import Threat, default_threats

__all__ = ["Arrays"]


@dataclass(frozen=True, eq=False)
class Arrays:
    """Activations and labels alone: bits without a model, hence without a behaviour constraint.

    Args:
        data: ``(n, d)``, or ``(n, contexts, d)`` when the same items were read under several neutral contexts, or
            ``(n, contexts, tokens, d)`` for probes of tokens.
        labels: ``(n,)`` in {0, 1}, 1 = positive.
        groups: ``(n,)`` entities; split together. By default every item is its own. Items of equal activations are
            always one entity (:mod:`elk_stress.duplicates`).
        shares: shares of the entities for training, calibration and test.
        observed_contexts: how many of the last contexts are held back to observe best-of-n.
        seed: of the split.
    """

    data: np.ndarray
    labels: np.ndarray
    groups: np.ndarray | None = None
    shares: tuple[float, float, float] = (0.4, 0.3, 0.3)
    observed_contexts: int = 0
    seed: int = 0
    name: str = "arrays"
    site: str = "given"

    def __post_init__(self) -> None:
        if np.ndim(self.data) not in (2, 3, 4) or len(self.data) != len(self.labels):
            raise ValueError(
                "expected activations (n, d), (n, contexts, d) or (n, contexts, tokens, d) and labels (n,), "
                f"got {np.shape(self.data)} and {np.shape(self.labels)}"
            )
        if set(np.unique(self.labels).tolist()) - {0, 1}:
            raise ValueError(f"labels must be 0 or 1 (1 = positive), got {np.unique(self.labels).tolist()[:5]}")
        if len(np.unique(self.labels)) < 2:
            raise ValueError("labels hold one class only; a stress test needs positives and negatives")

    @property
    def dim(self) -> int:
        """d, of all tokens together."""
        return int(np.prod(self.data.shape[2:])) if np.ndim(self.data) > 2 else int(self.data.shape[-1])

    @property
    def tokens(self) -> int | None:
        """Tokens that each item is read at, or ``None``."""
        return int(self.data.shape[2]) if np.ndim(self.data) == 4 else None

    @cached_property
    def prior(self) -> EllipticalPrior | None:
        """Isotropic moves at the activations' own scale where there are no contexts to tell, else ``None``."""
        if np.ndim(self.data) > 2 and self.data.shape[1] - self.observed_contexts > 1:
            return None
        spread = float(np.sqrt(self.activations("train").astype(float).var(axis=0).mean()))
        return EllipticalPrior(spread * np.eye(self.dim), name="activations' own scale, isotropic")

    @property
    def threats(self) -> tuple[Threat, ...]:
        """Those that arrays can be put under when none are asked for."""
        return default_threats(kept=False) if self.prior is None else (Threat(prior="isotropic"),)

    @cached_property
    def _copies(self) -> np.ndarray:
        """``(n,)`` numbers that are equal where activations are.

        Raises:
            ValueError: equal activations with both labels, unless they are of a few numbers that items share rightly.
        """
        keys = row_keys(self.data)
        both = conflicts(keys, self.labels)
        if both and names_items(self.data, keys):
            told = "; ".join(f"items {low} (label 0) and {high} (label 1)" for low, high in both[:3])
            raise ValueError(
                f"{len(both)} rows come with both labels: {told}. Equal activations are one item, which has one label: "
                "correct it or drop the item; if these items do differ, read them at a token or layer that shows it"
            )
        return keys

    @cached_property
    def _entities(self) -> np.ndarray:
        """``(n,)`` the given groups, joined where rows are equal; an entity has the name of its first item."""
        groups = np.arange(len(self.labels)) if self.groups is None else np.asarray(self.groups)
        return np.asarray(groups[joined(groups, self._copies)])

    @cached_property
    def _rows(self) -> dict[SplitName, np.ndarray]:
        _, index = np.unique(self._entities, return_inverse=True)
        # entities are dealt per label of their first item, so that every split holds both classes
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, 0xA55]))
        n_groups = int(index.max()) + 1
        first = np.full(n_groups, len(index))
        np.minimum.at(first, index, np.arange(len(index)))
        split_of = np.empty(n_groups, dtype=int)
        edges = np.cumsum(self.shares)[:2] / sum(self.shares)
        for label in (0, 1):
            members = np.flatnonzero(self.labels[first] == label)
            order = rng.permutation(len(members))
            split_of[members[order]] = np.searchsorted(edges, (np.arange(len(members)) + 0.5) / len(members))
        names: tuple[SplitName, ...] = ("train", "calibration", "test")
        # copies stand together, as the rows of one item: probes that choose by held-out items read items off so
        order = np.argsort(self._copies, kind="stable")
        return {name: order[split_of[index[order]] == i] for i, name in enumerate(names)}

    @cached_property
    def splits(self) -> Mapping[SplitName, Items]:
        """Train, calibration and test items, dealt by entity."""
        labels = np.asarray(self.labels).astype(int)
        return {
            name: Items(tuple(str(i) for i in rows.tolist()), labels[rows], self._entities[rows])
            for name, rows in self._rows.items()
        }

    def prepare(self, progress: Any = None) -> None:
        """Nothing to do."""

    def activations(self, split: SplitName, contexts: ContextSet = "prior") -> np.ndarray:
        """Float32 copies of the split's rows; with 8 contexts or more a quarter of them is kept for fitting.

        Raises:
            LookupError: no contexts were held back (``observed``), too few to fit on others (``fit``), or items alone
                were not given (``bare``).
        """
        data = self.data[self._rows[split]]
        data = data[:, None, :] if data.ndim == 2 else data.reshape(*data.shape[:2], -1)
        seen = data.shape[1] - self.observed_contexts
        fitting = seen // 4 if seen >= 8 else 0
        ranges = {"fit": (0, fitting), "prior": (fitting, seen), "observed": (seen, data.shape[1]), "bare": (0, 0)}
        start, stop = ranges[contexts]
        if start == stop:
            raise LookupError(f"arrays of {data.shape[1]} contexts hold none for {contexts!r}")
        return np.asarray(data[:, start:stop], dtype=np.float32)

    @property
    def shift_cost(self) -> Literal["exact", "model", "none"]:
        """``none``: arrays have no output."""
        return "none"

    def shift(self, split: SplitName, items: np.ndarray, moves: np.ndarray) -> np.ndarray:
        """Not defined."""
        raise LookupError("activation arrays have no behaviour; give a testbed with a model to constrain it")

    def shift_factor(self, split: SplitName, items: np.ndarray) -> np.ndarray:
        """Not defined."""
        raise LookupError("activation arrays have no behaviour; give a testbed with a model to constrain it")

    def known_probes(self) -> Mapping[str, FittedProbe]:
        """None are known."""
        return {}

    def describe(self) -> Mapping[str, Any]:
        """Sizes."""
        return {
            "shape": list(self.data.shape),
            "shares": list(self.shares),
            "observed_contexts": self.observed_contexts,
        }
