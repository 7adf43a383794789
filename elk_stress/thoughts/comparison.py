"""Comparing probes: paired over items, contexts and negatives, with Holm's correction over a table. No ranking without.

Every probe of a run shares the bootstrap's resamples, so a replicate of the difference is the difference of
replicates. Two quantities: the headline, and the *bits kept* per positive (area under recall(b), which does not reward
a probe for catching little).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy.stats import norm

from elk_stress.core.settings import pairs_of, shown
from elk_stress.thoughts.result import StressResult

__all__ = ["Comparison", "compare", "compare_all"]

# a normal tail of some thousand replicates is not to be believed beyond
_LEAST_P = 1e-6


@dataclass(frozen=True)
class Comparison:
    """``a - b`` under one threat.

    Attributes:
        headline, headline_interval: difference of headlines in bits (censored ones count as ``max_bits``).
        kept, kept_interval: difference of bits kept per positive (universal scope: the same as the headline).
        p: two-sided bootstrap p-value of the difference of bits kept, where no replicate has the other sign that of a
            normal with the replicates' median and their deviation toward 0; ``holm``: corrected over the table.
        better: ``a``'s or ``b``'s name if Holm's p < 0.05, else ``None``.
    """

    a: str
    b: str
    threat: str
    headline: float
    headline_interval: tuple[float, float]
    kept: float
    kept_interval: tuple[float, float]
    p: float
    holm: float
    better: str | None

    def __str__(self) -> str:
        verdict = f"{self.better} keeps more" if self.better else "undecided"
        return (
            f"{self.threat}: {self.a} - {self.b}: headline {self.headline:+.1f} "
            f"[{self.headline_interval[0]:+.1f}, {self.headline_interval[1]:+.1f}] bits, bits kept per positive "
            f"{self.kept:+.1f} [{self.kept_interval[0]:+.1f}, {self.kept_interval[1]:+.1f}], "
            f"Holm p {self.holm:.3g}: {verdict}"
        )


def compare(a: StressResult, b: StressResult) -> tuple[Comparison, ...]:
    """Compare two probes under every threat that both faced, with Holm's correction over these threats.

    Raises:
        TypeError: something that is no result.
        ValueError: results of different testbeds, sites, seeds or false-positive rates, whose items are not paired.
    """
    for result in (a, b):
        if not isinstance(result, StressResult):
            raise TypeError(f"compare takes two results of elk_stress.stress, got {shown(result)}")
    same = a.probe == b.probe
    return compare_all({f"{a.probe} (a)" if same else a.probe: a, f"{b.probe} (b)" if same else b.probe: b})


def compare_all(
    results: Mapping[str, StressResult], pairs: Sequence[tuple[str, str]] | None = None
) -> tuple[Comparison, ...]:
    """All pairs of probes under all common threats; Holm's correction over all rows together.

    Args:
        results: by name.
        pairs: the pairs to compare instead of all, chosen before the results were seen: correction for a table of all
            pairs of many probes costs most of what the data can tell.

    Raises:
        ValueError: a pair names a probe that has no result; results whose items are not paired.
    """
    chosen = list(combinations(results, 2)) if pairs is None else pairs_of(pairs, results)
    rows = [row for a, b in chosen for row in _pair(a, b, results[a], results[b])]
    corrected = holm([row.p for row in rows])
    return tuple(
        Comparison(
            **{
                **vars(row),
                "holm": p,
                "better": None if p >= 0.05 else (row.a if row.kept > 0 else row.b),
            }
        )
        for row, p in zip(rows, corrected, strict=True)
    )


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down corrected p-values (1979), in the order given."""
    order = np.argsort(p, kind="stable")
    n = len(p)
    raised = np.maximum.accumulate([(n - i) * p[k] for i, k in enumerate(order)]) if n else np.empty(0)
    out = np.empty(n)
    out[order] = np.minimum(raised, 1.0)
    return [float(x) for x in out]


def _pair(name_a: str, name_b: str, a: StressResult, b: StressResult) -> list[Comparison]:
    for what, left, right in (
        ("testbed", a.testbed, b.testbed),
        ("site", a.site, b.site),
        ("seed", a.seed, b.seed),
        ("false-positive rate", a.config.get("fpr"), b.config.get("fpr")),
        ("max_bits", a.config.get("max_bits"), b.config.get("max_bits")),
        ("test items", a.config.get("test_items"), b.config.get("test_items")),
    ):
        if left != right:
            raise ValueError(
                f"cannot compare {name_a} and {name_b}: their {what} differs ({left} and {right}); "
                "stress both on the same testbed with the same seed and options"
            )
    rows = []
    for threat in a.threats:
        if threat not in b.threats:
            continue
        left, right = a.threats[threat].replicates, b.threats[threat].replicates
        if left is None or right is None or left.shape != right.shape:
            continue
        if not np.isfinite(left[:, 1]).all() or not np.isfinite(right[:, 1]).all():
            continue  # no bootstrap, no comparison
        difference = np.nan_to_num(left, nan=0.0) - np.nan_to_num(right, nan=0.0)
        n = len(difference)
        kept = difference[:, 1]
        # add-one p-value of a bootstrap: a probe compared with its equal gives 1
        below, above = int((kept <= 0).sum()), int((kept >= 0).sum())
        p = min(1.0, 2 * (min(below, above) + 1) / (n + 1))
        middle = float(np.median(kept))
        # toward 0, for replicates are skewed away from it
        side = abs(middle - float(np.quantile(kept, 0.025 if middle > 0 else 0.975))) / 1.96
        if min(below, above) == 0 and side > 0:
            # the count ends at 2 / (n + 1), which Holm's factor for a long table would always undo: beyond that the
            # normal tail goes on, at most at what the count says, and no farther than anybody should believe a tail
            p = min(p, max(_LEAST_P, 2 * float(norm.sf(abs(middle) / side))))
        (h_low, k_low), (h_high, k_high) = np.quantile(difference, [0.025, 0.975], axis=0)
        shown = [min(r.threats[threat].headline.value, r.config.get("max_bits", math.inf)) for r in (a, b)]
        ends = shown[0] - shown[1], float(np.median(kept))
        h_low, h_high = min(h_low, ends[0]), max(h_high, ends[0])
        rows.append(
            Comparison(
                name_a,
                name_b,
                threat,
                ends[0],
                (float(h_low), float(h_high)),
                ends[1],
                (float(k_low), float(k_high)),
                p,
                p,
                None,
            )
        )
    return rows
