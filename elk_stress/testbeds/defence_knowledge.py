"""What a defence may know of a testbed when it is fitted, and nothing of what it is judged by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from elk_stress.probing.probe import Traits
from elk_stress.testbeds.protocol import Testbed
from elk_stress.threats.priors import natural

__all__ = ["knowledge_of", "spread_rows"]

# each costs a few passes through a language model
_MOST_ITEMS = 64


def spread_rows(n: int) -> np.ndarray:
    """Up to 64 of n rows, evenly spread: those whose Fisher factors a defence is given."""
    return np.linspace(0, n - 1, min(n, _MOST_ITEMS)).astype(int)


def knowledge_of(testbed: Testbed, traits: Traits) -> Mapping[str, Any]:
    """Arguments for fitting, as far as a recipe's traits ask for them.

    ``prior``: natural thoughts of the training items under the contexts that probes are fitted on. ``behaviour``:
    ``(m, rank, d)`` Fisher factors of up to 64 of these items. Negated halves of contrast pairs are left out.

    Raises:
        LookupError: the testbed has no contexts for fitting, or cannot say what behaviour depends on.
    """
    items = testbed.splits["train"]
    rows = np.arange(len(items))
    if items.pairs is not None:
        rows = np.setdiff1d(rows, items.pairs[:, 1])
    known: dict[str, Any] = {}
    if traits.needs_prior:
        known["prior"] = natural(testbed.activations("train", "fit")[rows])
    if traits.needs_behaviour:
        known["behaviour"] = testbed.shift_factor("train", rows[spread_rows(len(rows))])
    return known
