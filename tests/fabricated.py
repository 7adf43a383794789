"""Fabricated results: curves from a lognormal spread of per-item bits; tables and figures are tested on them."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.stats import norm

from elk_stress.core.bits import Bits, BitsBatch, Kind
from elk_stress.core.flags import flag
from elk_stress.thoughts.result import (
    AttackResult,
    Audit,
    AuditStage,
    BestOfNCurves,
    Curve,
    Detection,
    ItemBits,
    StressResult,
    ThreatResult,
)
from elk_stress.threats.threat import Threat, default_threats

MAX_BITS = 40.0


def estimate(value: float, half: float = 1.5) -> Bits:
    return Bits(value, max(0.0, value - half), value + half, Kind.ESTIMATE, "auto", 5000, 120)


def censored(value: float) -> Bits:
    return Bits(value, value, float("inf"), Kind.CENSORED, "auto")


def detection(recall: float, auroc: float) -> Detection:
    caught = round(40 * recall)
    return Detection(
        1.2, 0.05, 0.04, (0.01, 0.11), recall, (max(0, recall - 0.1), min(1, recall + 0.08)), auroc,
        (auroc - 0.04, min(1, auroc + 0.03)), 40, caught, 80,
    )  # fmt: skip


def curve(half_life: float, start: float, *, universal: bool = False, worst: bool = False) -> Curve:
    """start * P[lognormal item bits > b]: half is lost at ``half_life``."""
    b = np.linspace(0, MAX_BITS, 81)
    value = start * norm.sf(np.log(np.maximum(b, 1e-9) / half_life) / 0.6)
    if universal:
        value = 0.5 * start + 0.5 * start * norm.sf((b - half_life) / 3)
    low, high = np.clip(value - 0.08, 0, 1), np.clip(value + 0.07, 0, 1)
    spread = 0.05 * (b > 10) if worst else 0.0 * b
    return Curve(b, value, low, high, np.clip(value - spread, 0, 1), np.clip(value + spread, 0, 1), MAX_BITS)


def attack(name: str, threat: Threat, success: float, bound: float | None, *flags: str) -> AttackResult:
    upper = None if bound is None else Bits(bound, 0.0, bound, Kind.UPPER_BOUND, "evidence_bound")
    gradient = name == "gradient"
    return AttackResult(
        name, threat.name, success, (max(0, success - 0.1), min(1, success + 0.1)), 0.31 if success else None,
        2.2 if success else None, 640 if gradient else 64, 320 if gradient else 0,
        4.0 if name == "best_of_n" else None, upper, flags=tuple(flag(f, "seen here") for f in flags),
    )  # fmt: skip


def threat_result(threat: Threat, half_life: float, recall: float, auroc: float) -> ThreatResult:
    half = max(0.2, half_life + (1.5 if threat.kept else 0) - (1 if threat.tail == "best" else 0))
    headline = estimate(half) if half < MAX_BITS else censored(MAX_BITS)
    universal = threat.scope == "universal"
    flags = (flag("brittle", f"B = {half:.2f}"),) if half < 1 else ()
    n = round(40 * recall)
    spread = np.linspace(0.5, 1.5, n)
    items = None
    if not universal:
        batch = BitsBatch.build(half * spread, half * spread - 0.2, half * spread + 0.2, Kind.ESTIMATE, "auto")
        items = ItemBits(tuple(f"item{i}" for i in range(n)), batch, spread if threat.kept else None, spread, spread)
    return ThreatResult(
        threat,
        "B at half advantage" if universal else "half-life",
        headline,
        detection(recall, auroc),
        curve(max(half, 0.3), recall, universal=universal, worst=threat.kept),
        survival=None if universal else curve(max(half, 0.3), 1.0),
        conditional=(half - 0.7, half + 0.7) if universal else None,
        items=items,
        b_kept=estimate(0.2, 0.1) if threat.kept else None,
        b_given_kept=estimate(half - 0.2) if threat.kept else None,
        epsilon=(threat.epsilon or 0.9) if threat.kept else None,
        scale={"0.5": half * 3.1, "0.9": half * 1.2, "1": half, "1.1": half * 0.84, "2": half * 0.3},
        shrink={"0.5": half * 0.9, "2": half * 1.1} if threat.prior == "natural" else {},
        epsilons={"1": half + 4, "3": half, "10": half - 0.4} if threat.kept else {},
        bare_threshold=half - 2,
        replicates=np.full((20, 2), half),
        attacks=(
            attack("isotropic_noise", threat, 0.05, 9.3),
            attack("natural_thoughts", threat, 0.1, 6.2),
            attack("gradient", threat, 1.0, half + 4.1, *(["did_not_engage"] if half < 1 else [])),
        )
        + (() if universal else (attack("best_of_n", threat, 0.4, None),)),
        flags=flags,
    )


def best_of_n(half_life: float, kept: bool) -> BestOfNCurves:
    n = np.array([1.0, 2, 4, 8, 16, 32])

    def at(half: float, band: float, stop: float = 32) -> Curve:
        value = norm.cdf(np.log((np.log2(n) + 0.5) / half) / 0.6)
        low, high = np.clip(value - band, 0, 1), np.clip(value + band, 0, 1)
        return Curve(n, value, low, high, value, value)

    predicted = {"gaussian": at(half_life, 0.05), "logistic": at(half_life * 0.85, 0.05)}
    return BestOfNCurves(kept, predicted, at(half_life * 0.9, 0.12), 32, 24)


def tails(probe: str) -> dict[str, Any]:
    def group(winner: str, nu: float) -> dict[str, Any]:
        return {"winner": winner, "nu": nu, "clustered_z": 3.1, "skewness": 0.2, "scale_ratio": None}

    own = group("logistic", 5.0 + len(probe))
    return {"groups": {"random": group("gaussian", 88.0), "probe": own}, "best_elliptical": "logistic"}


def stage(name: str, gain: float) -> AuditStage:
    return AuditStage(name, 0.69 - gain, gain, gain - 0.1, gain + 0.1)


def result(
    name: str, half_life: float, *, recall: float = 0.9, auroc: float = 0.96, verdict: str = "moved", kept: bool = True
) -> StressResult:
    threats = {t.name: threat_result(t, half_life, recall, auroc) for t in default_threats(kept=kept)}
    first = next(iter(threats))
    return StressResult(
        name,
        "statements",
        "layers.18",
        threats,
        (best_of_n(half_life, False), best_of_n(half_life + 1.5, True)) if half_life < MAX_BITS else (),
        Audit(
            verdict,
            stage("clean", 0.5),
            (stage("raw", -0.8), stage("recalibrated", 0.02), stage("refitted", 0.4), stage("strongest", 0.45)),
            "logistic",
            first,
        ),
        tails(name),
        {
            "rock": {first: estimate(0.0, 0.0)},
            "random_direction": "catches nothing at the threshold",
            "oracle": {first: censored(MAX_BITS)},
            "paper": {first: estimate(1.7)},
        },
        {"universal/natural/gaussian": "example of a reason"} if name == "ccs" else {},
        (),
        {"fpr": 0.05, "max_bits": MAX_BITS},
        {"numpy": "2.0"},
        7,
        12.5,
    )


def six() -> list[StressResult]:
    """Six probes, from one that breaks at once to one that survives all that was tried."""
    return [
        result("rock", 0.4, recall=0.05, auroc=0.5, verdict="no signal"),
        result("random_direction", 0.6, recall=0.1, auroc=0.55, verdict="no signal"),
        result("mass_mean", 4.2, recall=0.7, auroc=0.88, verdict="miscalibrated"),
        result("lda", 12.3, recall=0.85, auroc=0.97),
        result("logistic", 18.6, recall=0.93, auroc=0.98),
        result("ccs", 60.0, recall=0.6, auroc=0.84, verdict="still works"),
    ]
