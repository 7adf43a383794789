"""What a stress test returns: frozen records that serialize completely.

One :class:`StressResult` per probe, holding one :class:`ThreatResult` per threat; each of those has one headline B, a
curve, the bits of every item and one :class:`AttackResult` per attack.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from elk_stress.core.bits import Bits, BitsBatch
from elk_stress.core.flags import Flag
from elk_stress.thoughts.attacks.proposal import SpentAs
from elk_stress.threats.threat import Threat

if TYPE_CHECKING:
    from elk_stress.thoughts.power_law import LeftTail

__all__ = [
    "AttackResult",
    "Audit",
    "AuditStage",
    "BestOfNCurves",
    "Curve",
    "Detection",
    "IncidentalFraction",
    "ItemBits",
    "StressResult",
    "ThreatResult",
    "plain",
]


@dataclass(frozen=True)
class Detection:
    """What the probe does when nobody attacks.

    Attributes:
        threshold: ``caught`` = score > threshold.
        fpr: the nominal false-positive rate.
        fpr_measured, fpr_interval: on test negatives under the prior, with a 95% interval.
        recall, recall_interval: caught share of the test positives at their origins.
        auroc, auroc_interval: on the test items at their origins.
        n_positives, n_caught, n_negatives: test positives, those caught, calibration negatives.
    """

    threshold: float
    fpr: float
    fpr_measured: float
    fpr_interval: tuple[float, float]
    recall: float
    recall_interval: tuple[float, float]
    auroc: float
    auroc_interval: tuple[float, float]
    n_positives: int
    n_caught: int
    n_negatives: int


@dataclass(frozen=True)
class Curve:
    """A quantity against bits (or against n for best-of-n): values, a 95% band, and best and worst case if censored.

    Attributes:
        x: grid; bits, or n.
        value: the estimate.
        low, high: pointwise 95% band (bootstrap over entities, contexts and calibration negatives).
        worst, best: bounds when interval-censored items count as lost at once, or never; equal ``value`` if none are.
        censored_from: grid value from which on nothing is known (``max_bits``), or ``inf``.
    """

    x: np.ndarray
    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    worst: np.ndarray
    best: np.ndarray
    censored_from: float = math.inf


@dataclass(frozen=True)
class ItemBits:
    """Bits of every caught positive test item under one threat.

    Attributes:
        ids: item names.
        bits: ``B_i``, the joint event if behaviour is kept.
        kept: ``(n,)`` bits of keeping behaviour at all, where constrained.
        margin: ``(n,)`` score minus threshold at the origin.
        distance: ``(n,)`` length in u of the nearest known break.
    """

    ids: tuple[str, ...]
    bits: BitsBatch
    kept: np.ndarray | None
    margin: np.ndarray
    distance: np.ndarray


@dataclass(frozen=True)
class IncidentalFraction:
    """Mean over items of ``||P s|| / ||s||``, with a 95% interval of that mean over entities and fitted priors.

    Attributes:
        value: in [0, 1]; NaN for a probe without a gradient (a constant).
        low, high: over entities and over the priors that the contexts allow, shrunk or not; over entities alone, and
            then equal to the value where these do not differ, where the prior was given or had fewer than 3 contexts.
        items: ``(n,)`` per sampled test positive.
        rank: of the behaviour form, of ``dim`` directions in which the model can think differently.
        tolerance: nats per natural standard deviation below which a direction counts as ignored.
    """

    value: float
    low: float
    high: float
    items: np.ndarray
    rank: int
    dim: int
    tolerance: float

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}] (behaviour reads {self.rank} of {self.dim})"


@dataclass(frozen=True)
class AttackResult:
    """One attack on one probe under one threat; the engine, not the attack, decided what succeeded.

    Attributes:
        success, success_interval: share of caught items that any of the candidates broke (item scope), or 1/0
            (universal).
        first, candidates: what the first candidate alone broke, and how many there were: with many, success is that of
            a selection which sees the probe's labels.
        shift: median behaviour shift of the successful moves in nats, or ``None`` if not measured.
        epsilon: nats that counted as kept, where behaviour was constrained: the threat's, or an edit's own.
        length: median length in u of the successful moves.
        queries, gradients: activations scored, and differentiated, per attacked item; training items that were asked
            about and candidates that are put to the probe count.
        spent: bits spent in the attack's own prior, where exactly known.
        spent_as: their kind: ``selection`` among draws of the prior, or ``kl`` on average; never compared across kinds.
        upper_bound: rigorous upper bound on the threat's B, or ``None``.
        benign_success: share of the items that random moves broke too, as many as there were candidates and as long,
            or ``None`` (draws from the prior are themselves the control).
        access: what the attack declared.
        judged: where behaviour was judged: ``site``, the move at the site; ``model``, the model as it really runs after
            an edit that is more than that (a prefix, recoded weights).
        auroc: of the probe on test items, positive or not, after an edit of all items or one move for all, or ``None``:
            an attack may leave every score above the threshold and yet none that tells.
        audit: what such an attack left behind, or ``None``.
        status: ``ok`` or the reason why it was not run.
    """

    attack: str
    threat: str
    success: float
    success_interval: tuple[float, float]
    shift: float | None
    length: float | None
    queries: float
    gradients: float
    spent: float | None
    upper_bound: Bits | None
    benign_success: float | None = None
    access: str = "none"
    judged: Literal["site", "model"] = "site"
    first: float = math.nan
    candidates: int = 0
    epsilon: float | None = None
    spent_as: SpentAs = "selection"
    auroc: float | None = None
    audit: Audit | None = None
    status: str = "ok"
    flags: tuple[Flag, ...] = ()


@dataclass(frozen=True)
class BestOfNCurves:
    """Share of caught items that the best of n real contexts breaks: predicted by each tail, and observed.

    The prediction comes from the prior (training items, contexts A); the observation from ``n_items`` caught test items
    under ``n_contexts`` contexts B. ``p_values``: by tail, the share of curves simulated from the prediction that lie
    at least as far out as the observed one. ``left_tail``: of per-item chances under contexts A, whose power law is the
    prediction called ``power_law``.
    """

    kept: bool
    predicted: Mapping[str, Curve]
    observed: Curve
    n_contexts: int
    n_items: int
    p_values: Mapping[str, float] = field(default_factory=dict)
    left_tail: LeftTail | None = None


@dataclass(frozen=True)
class AuditStage:
    """One stage: log-loss (nats per item) on attacked test items, and its gain over the rock with a 95% interval."""

    stage: str
    log_loss: float
    gain: float
    low: float
    high: float


@dataclass(frozen=True)
class Audit:
    """What was left after the break.

    Attributes:
        verdict: ``still works``, ``miscalibrated``, ``moved``, ``hidden`` or ``gone``; ``undecided`` when the
            data cannot tell, ``no signal`` when there was nothing to lose.
        clean: the gain on unattacked test items.
        stages: raw, recalibrated, refitted, strongest.
        strongest: the name of the strongest probe tried.
    """

    verdict: str
    clean: AuditStage
    stages: tuple[AuditStage, ...]
    strongest: str
    threat: str


@dataclass(frozen=True)
class ThreatResult:
    """One probe under one threat.

    Attributes:
        headline: half-life (item scope) or B at half advantage (universal), with a 95% interval over entities,
            contexts and calibration negatives.
        curve: recall(b) over all positives (item), or the metric at b bits (universal).
        survival: S(b) among the caught (item scope).
        conditional: universal scope: the interval given this test set.
        b_kept, b_given_kept: median over items, where behaviour is constrained.
        epsilon: nats.
        scale: headline value at multiples of the prior's scale.
        tails: headline value under other tails of the same covariance.
        shrink: headline value at half and double shrinkage (natural prior).
        epsilons: headline value at multiples of epsilon.
        bare_threshold: headline value with the (uncalibrated) threshold set at bare items, or ``None``.
        replicates: bootstrap replicates of (headline, recall-bits area), for paired comparison.
        certified: item scope, Gaussian tail: the half-life of lower bounds that no attack can undercut, where the probe
            knows how steep it is: all items' bounds hold together at 95% confidence, given threshold, origins and the
            estimated prior (whose uncertainty is in the headline's interval alone).
        attacks: one row per attack.
    """

    threat: Threat
    quantity: str
    headline: Bits
    detection: Detection
    curve: Curve
    survival: Curve | None = None
    conditional: tuple[float, float] | None = None
    items: ItemBits | None = None
    b_kept: Bits | None = None
    b_given_kept: Bits | None = None
    epsilon: float | None = None
    scale: Mapping[str, float] = field(default_factory=dict)
    tails: Mapping[str, float] = field(default_factory=dict)
    shrink: Mapping[str, float] = field(default_factory=dict)
    epsilons: Mapping[str, float] = field(default_factory=dict)
    bare_threshold: float | None = None
    replicates: np.ndarray | None = None
    certified: Bits | None = None
    attacks: tuple[AttackResult, ...] = ()
    flags: tuple[Flag, ...] = ()
    status: str = "ok"

    @property
    def breakers(self) -> tuple[AttackResult, ...]:
        """The cheapest attack of each access level that broke at least half of the catches, least access first."""
        order = ("none", "label", "score", "gradient", "weights")
        broke = sorted(
            (a for a in self.attacks if a.status == "ok" and a.success >= 0.5), key=lambda a: a.queries + a.gradients
        )
        cheapest = {a.access: a for a in reversed(broke)}
        return tuple(cheapest[access] for access in order if access in cheapest)

    def broken_by(self) -> str:
        """One line: what broke the probe with which access, and the least upper bound; empty where nothing ran."""
        ran = [a for a in self.attacks if a.status == "ok"]
        if not ran:
            return ""
        bounds = [a.upper_bound.value for a in ran if a.upper_bound is not None]
        least = f"; least bound {min(bounds):.1f} bits" if bounds else ""
        by = ", ".join(f"{a.attack} ({a.access})" for a in self.breakers)
        return f"broken by {by}{least}" if by else f"none of {len(ran)} attacks broke half of it{least}"


@dataclass(frozen=True)
class StressResult:
    """Everything about one probe on one testbed. ``result.threats[name].headline`` is the number.

    Attributes:
        controls: control name -> threat name -> headline, or a sentence why it does not apply.
        skipped: threat or attack name -> reason.
        tails: the fitted tails (winner per direction group).
        incidental: share of the probe's gradient to which behaviour is indifferent, or ``None`` without an output.
    """

    probe: str
    testbed: str
    site: str
    threats: Mapping[str, ThreatResult]
    best_of_n: tuple[BestOfNCurves, ...]
    audit: Audit | None
    tails: Mapping[str, Any]
    controls: Mapping[str, Mapping[str, Bits] | str]
    skipped: Mapping[str, str]
    flags: tuple[Flag, ...]
    config: Mapping[str, Any]
    versions: Mapping[str, str]
    seed: int
    seconds: float
    status: str = "ok"
    incidental: IncidentalFraction | None = None

    @property
    def detection(self) -> Detection:
        """Detection under the first threat."""
        return next(iter(self.threats.values())).detection

    @property
    def all_flags(self) -> tuple[tuple[str, Flag], ...]:
        """Every flag with where it was raised: the probe, a threat, or an attack under a threat."""
        found = [(self.probe, f) for f in self.flags]
        for name, threat in self.threats.items():
            found += [(f"{self.probe} under {name}", f) for f in threat.flags]
            found += [(f"{row.attack} on {self.probe} under {name}", f) for row in threat.attacks for f in row.flags]
        return tuple(found)

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary with everything in it; infinite numbers are the strings ``"inf"`` and ``"-inf"``."""
        record = plain(self)
        assert isinstance(record, dict)
        return record

    def __str__(self) -> str:
        lines = [
            f"{self.probe} on {self.testbed} at {self.site}: AUROC {self.detection.auroc:.2f}, "
            f"recall {self.detection.recall:.2f} at {self.detection.fpr:.0%} false positives"
        ]
        for name, row in self.threats.items():
            lines.append(f"  {name}: {row.quantity} {row.headline}")
            lines += [f"    {row.broken_by()}"] if row.broken_by() else []
            lines += (
                [f"    certified: {row.certified.value:.1f} bits against any attack, given the prior"]
                if row.certified
                else []
            )
        if self.audit is not None:
            lines.append(f"  after the break: {self.audit.verdict}")
        lines += [f"  flag: {where}: {f}" for where, f in self.all_flags]
        return "\n".join(lines)


def plain(value: Any) -> Any:
    """JSON-able form of results: dataclasses become dictionaries, arrays lists, infinities strings, NaN ``None``."""
    if isinstance(value, Bits):
        return value.to_json()
    if isinstance(value, BitsBatch):
        return [bits.to_json() for bits in value]
    if isinstance(value, Threat):
        return value.to_json()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, (str, bool, type(None))):
        return value
    if isinstance(value, Sequence):
        return [plain(v) for v in value]
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        number = float(value)
        return None if math.isnan(number) else number if math.isfinite(number) else ("inf" if number > 0 else "-inf")
    return str(value)
