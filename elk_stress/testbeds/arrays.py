"""Activation arrays as a testbed, for users with neither model nor texts at hand.

Without contexts nothing says how differently the model could have thought: moves are then isotropic at the activations'
own scale (:attr:`Arrays.prior`), and so are the default threats (:attr:`Arrays.threats`).

Everything after is computed in float32, which has 24 bits a number. Where a feature lies far from 0 for its spread
these would go to the offset: :attr:`Arrays.origin` is taken off in the precision that came, before the cast, and probes
that were given score ``x + origin`` (:func:`elk_stress.probing.origin.moved`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from elk_stress.core.inputs import as_activations, as_groups, as_labels
from elk_stress.core.settings import setting, settings
from elk_stress.probing.probe import FittedProbe
from elk_stress.testbeds.duplicates import conflicts, joined, names_items, recur, row_keys
from elk_stress.testbeds.protocol import ContextSet, Items, SplitName
from elk_stress.threats.priors import EllipticalPrior
from elk_stress.threats.threat import Threat, default_threats

__all__ = ["Arrays", "shares_for"]

# spreads from 0 beyond which a feature is centred: less costs float32 three of its 24 bits, and nobody notices
_FAR = 8.0
# rows centred together: 8 MB in float64
_CHUNK = 1 << 20


def shares_for(probes: Iterable[Any]) -> tuple[float, float, float]:
    """Shares of training, calibration and test: where every probe comes fitted, training only says how items move."""
    fitted = all(isinstance(probe, (FittedProbe, np.ndarray)) for probe in probes)
    return (0.1, 0.45, 0.45) if fitted else (0.4, 0.3, 0.3)


@dataclass(frozen=True, eq=False)
class Arrays:
    """Activations and labels alone: bits without a model, hence without a behaviour constraint.

    Args:
        data: ``(n, d)``, or ``(n, contexts, d)`` when the same items were read under several neutral contexts, or
            ``(n, contexts, tokens, d)`` for probes of tokens. Any library's array; a memory map stays mapped.
        labels: ``(n,)`` in {0, 1}, 1 = positive, or truth values, or with ``positive`` any two values.
        groups: ``(n,)`` entities, numbers or names; split together. By default every item is its own. Items of equal
            activations are always one entity (:mod:`elk_stress.testbeds.duplicates`).
        shares: shares of the entities for training, calibration and test.
        observed_contexts: how many of the last contexts are held back to observe best-of-n.
        seed: of the split.
        positive: which label is positive, where they are not 0 and 1.

    Raises:
        TypeError, ValueError: what is no array of numbers, labels or groups, or does not fit the rest
            (:mod:`elk_stress.core.inputs`); too few items for three splits of both classes.
    """

    data: np.ndarray
    labels: np.ndarray
    groups: np.ndarray | None = None
    shares: tuple[float, float, float] = (0.4, 0.3, 0.3)
    observed_contexts: int = 0
    seed: int = 0
    name: str = "arrays"
    site: str = "given"
    positive: Any = None

    def __post_init__(self) -> None:
        data = as_activations(self.data)
        labels = as_labels(self.labels, len(data), self.positive)
        groups = np.arange(len(data)) if self.groups is None else as_groups(self.groups, len(data))
        contexts = 1 if data.ndim == 2 else data.shape[1]
        held_back = setting("observed_contexts", self.observed_contexts)
        if held_back >= contexts:
            raise ValueError(
                f"observed_contexts={held_back} of {contexts} contexts leaves none for the prior; hold back fewer, or "
                "give activations (n, contexts, d) read under more"
            )
        clean = {"data": data, "labels": labels, "groups": groups, "observed_contexts": held_back}
        clean |= {"shares": settings("shares", self.shares, n=3), "seed": setting("seed", self.seed)}
        for name, value in clean.items():
            object.__setattr__(self, name, value)
        self._check_splits()

    def _check_splits(self) -> None:
        """Training says how items move, calibration negatives set the threshold, and the test needs both classes."""
        needed = {"train": (), "calibration": (0,), "test": (0, 1)}
        for name, rows in self._rows.items():
            if len(rows) and set(needed[name]) <= set(self.labels[rows].tolist()):
                continue
            counts = [len(np.unique(self._entities[self.labels == label])) for label in (1, 0)]
            raise ValueError(
                f"{len(self.labels)} items are too few to deal out: {counts[0]} groups hold positives and {counts[1]} "
                f"negatives, and the {name} split needs {'both' if name == 'test' else 'negatives'}. A threshold at a "
                "false-positive rate of 0.05 needs 20 calibration negatives: give about 70 items of each class, "
                "of many groups"
            )

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
        """``(n,)`` numbers that are equal where activations are, unless these recur by nature.

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
        return np.arange(len(keys)) if recur(self.data, keys) else keys

    @cached_property
    def _entities(self) -> np.ndarray:
        """``(n,)`` the given groups, joined where rows are equal; an entity has the name of its first item."""
        groups = np.asarray(self.groups)
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
        return {
            name: Items(tuple(str(i) for i in rows.tolist()), self.labels[rows], self._entities[rows])
            for name, rows in self._rows.items()
        }

    def prepare(self, progress: Any = None) -> None:
        """Nothing to do."""

    def activations(self, split: SplitName, contexts: ContextSet = "prior") -> np.ndarray:
        """Float32 copies of the split's rows, less the origin if there is one.

        With 8 contexts or more a quarter of them is kept for fitting.

        Raises:
            LookupError: no contexts were held back (``observed``), too few to fit on others (``fit``), or items alone
                were not given (``bare``).
        """
        seen = self.n_contexts - self.observed_contexts
        fitting = seen // 4 if seen >= 8 else 0
        ranges = {"fit": (0, fitting), "prior": (fitting, seen), "observed": (seen, self.n_contexts), "bare": (0, 0)}
        start, stop = ranges[contexts]
        if start == stop:
            raise LookupError(f"arrays of {self.n_contexts} contexts hold none for {contexts!r}")
        out = np.empty((len(self._rows[split]), stop - start, self.dim), dtype=np.float32)
        for part, rows in self._read(split, start, stop):
            out[part] = rows if self.origin is None else rows - self.origin
        return out

    @property
    def n_contexts(self) -> int:
        """Contexts that each item was read under."""
        return 1 if self.data.ndim == 2 else int(self.data.shape[1])

    @cached_property
    def origin(self) -> np.ndarray | None:
        """``(d,)`` float64: the means of training rows in the features that lie far from 0 for their spread, 0 in the
        others; ``None`` where no feature does."""
        n = len(self._rows["train"]) * self.n_contexts
        mean, square = np.zeros(self.dim), np.zeros(self.dim)
        for _, rows in self._read("train", 0, self.n_contexts):
            mean += rows.sum(axis=(0, 1), dtype=float) / n
        for _, rows in self._read("train", 0, self.n_contexts):
            square += ((rows - mean) ** 2).sum(axis=(0, 1)) / n
        far = np.abs(mean) > _FAR * np.sqrt(square)
        return np.where(far, mean, 0.0) if far.any() else None

    def _read(self, split: SplitName, start: int, stop: int) -> Iterator[tuple[slice, np.ndarray]]:
        """Rows ``(m, contexts, d)`` of a split as they came, in chunks, each with its place in the split."""
        chosen = self._rows[split]
        step = max(1, _CHUNK // (self.dim * (stop - start)))
        for first in range(0, len(chosen), step):
            part = slice(first, min(first + step, len(chosen)))
            rows = self.data[chosen[part]][:, None] if self.data.ndim == 2 else self.data[chosen[part], start:stop]
            yield part, rows.reshape(len(rows), stop - start, -1)

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
