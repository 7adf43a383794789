"""What a language model trainee reads: few enough items, and ordinary text that is not about them."""

from __future__ import annotations

import dataclasses

import numpy as np

from elk_stress.testbeds import facts
from elk_stress.testbeds.protocol import Items

__all__ = ["limited", "true_statements"]

_TEXTS = 0x7E47


def limited(items: Items, n_items: int | None, negations: bool) -> Items:
    """The first ``n_items``: affirmed items in order, both labels in their proportion; partners after them if kept."""
    partners = np.array([], dtype=np.int64) if items.pairs is None else items.pairs[:, 1]
    rows = np.setdiff1d(np.arange(len(items)), partners)
    if n_items is not None and len(rows) > n_items:
        shares = {label: rows[items.labels[rows] == label] for label in (0, 1)}
        positives = max(1, round(n_items * len(shares[1]) / len(rows)))
        rows = np.sort(np.concatenate([shares[1][:positives], shares[0][: n_items - positives]]))
    pairs = None
    if negations and items.pairs is not None:
        partner = dict(items.pairs.tolist())
        pairs = np.stack([np.arange(len(rows)), np.arange(len(rows)) + len(rows)], axis=1)
        rows = np.concatenate([rows, [partner[row] for row in rows.tolist()]])
    texts = items.texts or ()
    return dataclasses.replace(
        items,
        ids=tuple(items.ids[i] for i in rows),
        labels=items.labels[rows],
        groups=items.groups[rows],
        pairs=pairs,
        texts=tuple(texts[i] for i in rows),
    )


def true_statements(excluded: str | None, n: int, seed: int) -> list[str]:
    """``n`` (or all) true affirmed statements of the relations other than ``excluded``, which the probe is about."""
    texts = [
        source.say(entity, value).text
        for name in facts.RELATIONS
        if name != excluded
        for source in (facts.relation(name),)
        for entity, value in source.facts.items()
    ]
    rng = np.random.default_rng(np.random.SeedSequence([seed, _TEXTS]))
    return [texts[i] for i in np.sort(rng.choice(len(texts), min(n, len(texts)), replace=False))]
