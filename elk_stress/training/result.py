"""What a training-pressure run found; plain frozen data that serialize themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from elk_stress.core.bits import Bits, BitsBatch, Kind
from elk_stress.core.flags import Flag, flag
from elk_stress.thoughts.result import Audit, Curve, plain
from elk_stress.training.measure import Measured
from elk_stress.training.overoptimization import Overoptimization

__all__ = ["AuditPoint", "Benign", "PressureResult", "WeightBits", "estimated", "median_bits", "over_models"]


@dataclass(frozen=True)
class Benign:
    """The control of equal size: the same steps, examples and learning rate, no probe in the loss.

    Attributes:
        auroc: ``(models,)`` of the attacked probe at its end, under q's noise.
        spent: ``(models,)`` bits; shift: ``(models,)`` nats.
        broke: share of models in which it cost the probe half of its advantage.
    """

    auroc: np.ndarray
    spent: np.ndarray
    shift: np.ndarray
    broke: float


@dataclass(frozen=True)
class AuditPoint:
    """The audit at one place of the pressure curve.

    Attributes:
        bits: spent at most.
        audits: one per model.
        verdict: the commonest verdict; verdicts: verdict -> models.
        gains: stage -> mean gain over the rock in nats (``clean`` and the stages of the audit).
    """

    bits: float
    audits: tuple[Audit, ...]
    verdict: str
    verdicts: Mapping[str, int]
    gains: Mapping[str, float]


@dataclass(frozen=True)
class WeightBits:
    """Bits of a weight change: B at half advantage with behaviour kept, a property of probe, testbed and threat.

    Attributes:
        headline: median over models with a 95% interval over models.
        models: per model.
        bounds: rigorous upper bounds per model, at the engine's own centre.
        scale: multiple of the prior's scale -> median over models.
    """

    headline: Bits
    models: BitsBatch
    bounds: np.ndarray
    scale: Mapping[str, float] = field(default_factory=dict)

    @property
    def estimates(self) -> np.ndarray:
        """``(models,)``; ``inf`` where B is censored: a lower limit cannot say how few bits would have done."""
        return estimated(self.models)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> WeightBits:
        """Back from :func:`elk_stress.thoughts.result.plain`; diagnostics are not kept."""
        rows = [_bits(row) for row in record["models"]]
        models = BitsBatch.build(
            np.array([row.value for row in rows]),
            np.array([row.low for row in rows]),
            np.array([row.high for row in rows]),
            [row.kind for row in rows],
            rows[0].method,
            evaluations=np.array([row.evaluations for row in rows]),
            gradients=np.array([row.gradients for row in rows]),
            status=[row.status for row in rows],
            flags=[row.flags for row in rows],
        )
        bounds = np.array([float(b) for b in record["bounds"]])
        return cls(_bits(record["headline"]), models, bounds, {k: float(v) for k, v in record["scale"].items()})


def estimated(found: BitsBatch) -> np.ndarray:
    """Values of the problems that were estimated, ``inf`` for the others."""
    return np.where([kind in (Kind.ESTIMATE, Kind.EXACT) for kind in found.kind], found.value, np.inf)


def _bits(record: Mapping[str, Any]) -> Bits:
    value, low, high = (float(record[side]) for side in ("value", "low", "high"))
    flags = tuple(flag(raised["name"], raised["detail"]) for raised in record["flags"])
    evaluations, gradients = int(record["evaluations"]), int(record["gradients"])
    kind = Kind(record["kind"])
    return Bits(value, low, high, kind, record["method"], evaluations, gradients, record["status"], flags)


@dataclass(frozen=True)
class PressureResult:
    """One probe under one training attack and one defender mode.

    Attributes:
        testbed, site, probe, attack, mode: what was run; ``against``: all probes that the attack trained against.
        strengths, steps: of the cells, and of the checkpoints.
        clean: ``(models,)`` AUROC of the probe before; tau: half advantage.
        measured: arrays ``(checkpoints, strengths, models)``.
        log: ``task`` and ``evasion``, means since the last checkpoint, ``(checkpoints, strengths, models)``.
        curves: panel name (the attacked probe first, then held-out probes, then ``refit``) -> AUROC at b bits, the
            attacker's best cell with behaviour kept, mean and 95% interval over models; ``curves_free``: behaviour not
            kept.
        spent: ``(models,)`` bits that the attack had spent when the probe had lost half of its advantage (behaviour
            kept); ``inf`` where it never did.
        reached: bits spent at most; beyond, the curve and ``spent`` are censored.
        headline: median of ``spent`` over models.
        bits: the threat's B, where measured. efficiency: ``(models,)`` best known B / spent.
        upper_bound: ``(models,)`` rigorous bound on B from where this attack broke through.
        benign: the control; ``None`` where the attack has none.
        audits: along the curve. moved_at, hidden_at, gone_at: bits at which the commonest verdict first is that.
        overoptimization: fits to the drop of the attacked probe (proxy), of the refit and of held-out probes (gold).
        rounds: refits that the defender lasted, ``(models,)``, in mode ``refit``.
        diverged: ``(strengths, models)``.
        extra: what the attack itself examined.
        verdict: ``broken``, ``held``, ``brittle``, ``behaviour broken``, ``did not engage``, ``diverged`` or
            ``no signal``.
    """

    testbed: str
    site: str
    probe: str
    attack: str
    mode: str
    against: tuple[str, ...]
    strengths: np.ndarray
    steps: np.ndarray
    clean: np.ndarray
    tau: np.ndarray
    epsilon: float
    measured: Measured
    log: Mapping[str, np.ndarray]
    curves: Mapping[str, Curve]
    curves_free: Mapping[str, Curve]
    spent: np.ndarray
    spent_free: np.ndarray
    reached: np.ndarray
    headline: Bits
    bits: WeightBits | None
    efficiency: np.ndarray
    upper_bound: np.ndarray
    benign: Benign | None
    audits: tuple[AuditPoint, ...]
    moved_at: float
    hidden_at: float
    gone_at: float
    overoptimization: tuple[Overoptimization, ...]
    rounds: np.ndarray | None
    diverged: np.ndarray
    extra: Mapping[str, Any]
    verdict: str
    flags: tuple[Flag, ...]
    config: Mapping[str, Any]
    versions: Mapping[str, str]
    seed: int
    seconds: float

    @property
    def threat(self) -> str:
        """What these bits are relative to: one weight change for all items, a Gaussian prior, behaviour kept."""
        return f"universal/weights/gaussian/kept within {self.epsilon:g} nats"

    @property
    def name(self) -> str:
        """``probe/attack/mode``."""
        return f"{self.probe}/{self.attack}/{self.mode}"

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary with everything in it."""
        record = plain(self)
        assert isinstance(record, dict)
        return record

    def __str__(self) -> str:
        lines = [
            f"{self.probe} on {self.testbed} at {self.site}, {self.attack} ({self.mode}): {self.verdict}",
            f"  threat: {self.threat}",
            f"  AUROC {self.clean.mean():.2f}; half of its advantage was lost after {self.headline} bits spent",
        ]
        if self.bits is not None:
            lines.append(f"  bits needed: {self.bits.headline}")
        if self.benign is not None:
            lines.append(f"  benign control: AUROC {np.nanmean(self.benign.auroc):.2f}")
        lines += [f"  after {a.bits:.0f} bits: {a.verdict}" for a in self.audits[-1:]]
        lines += [f"  flag: {f}" for f in self.flags]
        return "\n".join(lines)


def over_models(values: np.ndarray, axis: int = -1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean and its 95% Student-t interval over models; NaN models are left out, one model has no interval."""
    from scipy.special import stdtrit

    n = np.isfinite(values).sum(axis=axis)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.nansum(values, axis=axis) / n
        spread = np.sqrt(np.nansum((values - np.expand_dims(mean, axis)) ** 2, axis=axis) / (n - 1) / n)
        half = np.where(n > 1, stdtrit(np.maximum(n - 1, 1), 0.975) * spread, np.inf)
    return mean, mean - half, mean + half


def median_bits(values: np.ndarray, reached: np.ndarray, method: str) -> Bits:
    """Median over models with the distribution-free interval of order statistics; ``inf``: beyond ``reached``.

    The interval from the j-th smallest to the j-th largest of n values covers the median of their distribution with
    probability ``1 - 2 P[Binomial(n, 1/2) < j]``; j is the largest with at least 95%. Below 6 models none has: then the
    interval is all that is known, from the smallest to the largest widened to 0 and infinity.

    A model that is censored lies anywhere beyond what it reached, so its place among the others is unknown: the lower
    end is taken from the lower limits, the upper end with censored models at infinity, and the median is an estimate
    only where the two agree on it, else censored at the median of the lower limits.
    """
    from scipy.stats import binom

    n = len(values)
    least, most = np.sort(np.where(np.isfinite(values), values, reached)), np.sort(values)
    j = 0
    while j < n // 2 and 1 - 2 * binom.cdf(j, n, 0.5) >= 0.95:
        j += 1
    low, high = (float(least[j - 1]), float(most[n - j])) if j else (0.0, math.inf)
    middle = slice((n - 1) // 2, n // 2 + 1)
    value = float(least[middle].mean())
    if np.array_equal(least[middle], most[middle]):
        return Bits(value, min(low, value), max(high, value), Kind.ESTIMATE, method)
    return Bits(value, min(low, value), math.inf, Kind.CENSORED, method)
