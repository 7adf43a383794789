r"""Bits of optimization, and what they guarantee.

``B = -log2 P[g(u) <= 0]`` with ``u ~ N(0, I)``: the probability, under a prior in which nobody optimizes, of a move
that makes the probe fail while behaviour is kept. This is Yudkowsky's optimization power (2008) of all ways to break
the probe together. It is a property of (probe, testbed, threat), never of an attack; an attack only bounds it.

Guarantees, for an attacker who moves from the prior to q, with ``a = q(failure)``:

============================================  =========================================
budget                                        guarantee
============================================  =========================================
selection, ``D_inf(q, prior) <= k`` bits      ``a <= 2^-(B-k)``
Renyi order alpha > 1, in bits                ``a <= (2^-B 2^D_alpha)^((alpha-1)/alpha)``
average, ``KL(q, prior) <= k`` bits           ``a <= (k+1)/B``, far weaker
mean shift of length r in u-space             ``a <= Phi(r - beta)``, ``beta = -Phi^-1(2^-B)``
============================================  =========================================
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from elk_stress.core.flags import Flag

__all__ = [
    "GUARANTEES",
    "Bits",
    "BitsBatch",
    "Kind",
    "average_guarantee",
    "best_of_n_half_chance",
    "beta_of_bits",
    "bits_of_beta",
    "bits_of_log_probability",
    "mean_shift_guarantee",
    "renyi_guarantee",
    "selection_guarantee",
]

LN2 = math.log(2.0)


class Kind(enum.StrEnum):
    """What a number of bits is.

    ``exact`` a closed form; ``estimate`` a point estimate with an interval; ``upper_bound`` and ``lower_bound``
    rigorous at the stated confidence; ``distance`` FORM's ``-log2 Phi(-||u*||)``, which is a bound only if the failure
    set or its complement is convex; ``censored`` at least this many (nothing failed within the budget).
    """

    EXACT = "exact"
    ESTIMATE = "estimate"
    UPPER_BOUND = "upper_bound"
    LOWER_BOUND = "lower_bound"
    DISTANCE = "distance"
    CENSORED = "censored"


_ADDITIVE = (Kind.EXACT, Kind.ESTIMATE)


@dataclass(frozen=True)
class Bits:
    """A number of bits with its interval, its kind and the work it cost.

    Attributes:
        value: bits; for ``censored`` and bounds, the bound itself. ``inf`` is a legitimate exact value.
        low, high: 95% interval in bits. A censored number has ``high = inf``.
        kind: what the number is; see :class:`Kind`.
        method: the estimator's name.
        evaluations, gradients: limit-state evaluations and gradients spent.
        status: ``"ok"``, or what went wrong together with the remedy.
        flags: raised flags.
        diagnostics: method-specific figures (effective sample size, acceptance rate, ...).

    Arithmetic: only where it means something. ``a - b`` of two exact or estimated numbers is a conditional number of
    bits (``B_joint - B_kept``); adding bits of independent steps likewise. Distances, bounds and censored numbers
    refuse.
    """

    value: float
    low: float
    high: float
    kind: Kind
    method: str
    evaluations: int = 0
    gradients: int = 0
    status: str = "ok"
    flags: tuple[Flag, ...] = ()
    diagnostics: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if math.isnan(self.value) or math.isnan(self.low) or math.isnan(self.high):
            raise ValueError(
                f"bits must be numbers, got value={self.value}, low={self.low}, high={self.high} from {self.method}; "
                "the limit state probably returned NaN"
            )
        if self.low > self.value + 1e-9 or self.high < self.value - 1e-9:
            raise ValueError(f"bits {self.value} lie outside their interval [{self.low}, {self.high}] ({self.method})")

    @property
    def probability(self) -> float:
        """``2^-B``; underflows to 0 beyond about 1074 bits."""
        return 0.0 if math.isinf(self.value) else 2.0**-self.value

    def contains(self, bits: float) -> bool:
        """Whether ``bits`` lies in the closed interval."""
        return self.low <= bits <= self.high

    def __str__(self) -> str:
        if self.kind is Kind.CENSORED:
            return f">= {self.value:.1f}"
        if self.kind is Kind.LOWER_BOUND:
            return f">= {self.value:.1f} (bound)"
        if self.kind is Kind.UPPER_BOUND:
            return f"<= {self.value:.1f} (bound)"
        if self.kind is Kind.DISTANCE:
            return f"distance {beta_of_bits(self.value):.2f} (FORM {self.value:.1f})"
        if math.isinf(self.value):
            return "inf"
        if self.kind is Kind.EXACT and self.low == self.high:
            return f"{self.value:.1f}"
        return f"{self.value:.1f} [{_edge(self.low)}, {_edge(self.high)}]"

    def __add__(self, other: Bits) -> Bits:
        return _combine(self, other, +1)

    def __sub__(self, other: Bits) -> Bits:
        return _combine(self, other, -1)

    def __lt__(self, other: object) -> bool:
        raise TypeError(
            "bits are not ordered by themselves: numbers under different threats must never be ranked; "
            "use elk_stress.compare for a paired comparison"
        )

    __gt__ = __le__ = __ge__ = __lt__

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary; infinite numbers become the string ``"inf"``."""
        return {
            "value": _json_number(self.value),
            "low": _json_number(self.low),
            "high": _json_number(self.high),
            "kind": self.kind.value,
            "method": self.method,
            "evaluations": int(self.evaluations),
            "gradients": int(self.gradients),
            "status": self.status,
            "flags": [{"name": f.name, "detail": f.detail} for f in self.flags],
        }


@dataclass(frozen=True)
class BitsBatch(Sequence[Bits]):
    """Bits of many problems, as arrays of shape ``(problems,)``; indexing gives one :class:`Bits`.

    ``diagnostics`` holds arrays whose first axis is the problem.
    """

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    kind: tuple[Kind, ...]
    method: str
    evaluations: np.ndarray
    gradients: np.ndarray
    status: tuple[str, ...]
    flags: tuple[tuple[Flag, ...], ...]
    diagnostics: Mapping[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        value: np.ndarray,
        low: np.ndarray,
        high: np.ndarray,
        kind: Kind | Sequence[Kind],
        method: str,
        *,
        evaluations: np.ndarray | int = 0,
        gradients: np.ndarray | int = 0,
        status: Sequence[str] | str = "ok",
        flags: Sequence[tuple[Flag, ...]] = (),
        diagnostics: Mapping[str, np.ndarray] | None = None,
    ) -> BitsBatch:
        """Broadcast scalars to one entry per problem and clip intervals so that they hold their value."""
        value = np.atleast_1d(np.asarray(value, dtype=float))
        n = value.shape[0]
        low = np.minimum(np.broadcast_to(np.asarray(low, dtype=float), (n,)), value)
        high = np.maximum(np.broadcast_to(np.asarray(high, dtype=float), (n,)), value)
        return cls(
            value=value,
            low=low,
            high=high,
            kind=(kind,) * n if isinstance(kind, Kind) else tuple(kind),
            method=method,
            evaluations=np.broadcast_to(np.asarray(evaluations, dtype=np.int64), (n,)),
            gradients=np.broadcast_to(np.asarray(gradients, dtype=np.int64), (n,)),
            status=(status,) * n if isinstance(status, str) else tuple(status),
            flags=tuple(flags) if len(flags) else ((),) * n,
            diagnostics=diagnostics or {},
        )

    def __len__(self) -> int:
        return int(self.value.shape[0])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = int(index)
        return Bits(
            value=float(self.value[i]),
            low=float(self.low[i]),
            high=float(self.high[i]),
            kind=self.kind[i],
            method=self.method,
            evaluations=int(self.evaluations[i]),
            gradients=int(self.gradients[i]),
            status=self.status[i],
            flags=self.flags[i],
            diagnostics={name: array[i] for name, array in self.diagnostics.items()},
        )

    def __iter__(self) -> Iterator[Bits]:
        return (self[i] for i in range(len(self)))

    def with_flags(self, extra: Sequence[tuple[Flag, ...]]) -> BitsBatch:
        """A copy with ``extra[i]`` appended to the flags of problem i."""
        return replace(self, flags=tuple(old + new for old, new in zip(self.flags, extra, strict=True)))


def _combine(a: Bits, b: Bits, sign: int) -> Bits:
    for operand in (a, b):
        if operand.kind not in _ADDITIVE:
            raise TypeError(
                f"arithmetic on a number of kind {operand.kind.value} means nothing "
                f"({operand} from {operand.method}); only exact and estimated bits add or subtract"
            )
    if math.isinf(b.value) and sign < 0:
        raise TypeError("cannot condition on an event of infinite bits (it never happens)")
    value = a.value + sign * b.value
    # independent errors: half-widths add in quadrature, on each side separately
    down = math.hypot(
        a.value - a.low if a.value < math.inf else 0.0, (b.value - b.low) if sign > 0 else b.high - b.value
    )
    up = math.hypot(
        a.high - a.value if a.value < math.inf else 0.0, (b.high - b.value) if sign > 0 else b.value - b.low
    )
    exact = a.kind is Kind.EXACT and b.kind is Kind.EXACT
    return Bits(
        value,
        value - down,
        value + up,
        Kind.EXACT if exact else Kind.ESTIMATE,
        f"{a.method} {'+' if sign > 0 else '-'} {b.method}",
        a.evaluations + b.evaluations,
        a.gradients + b.gradients,
        "ok" if a.status == b.status == "ok" else f"{a.status}; {b.status}",
        a.flags + b.flags,
    )


def bits_of_log_probability(log_p: np.ndarray | float) -> np.ndarray:
    """``-log2 p`` from the natural logarithm of p."""
    return np.asarray(-np.asarray(log_p, dtype=float) / LN2)


def bits_of_beta(beta: np.ndarray | float) -> np.ndarray:
    """``-log2 Phi(-beta)``, accurate far into the tail: bits of a half-space at distance ``beta``."""
    from scipy.special import log_ndtr

    return bits_of_log_probability(log_ndtr(-np.asarray(beta, dtype=float)))


def beta_of_bits(bits: float) -> float:
    """``beta = -Phi^-1(2^-B)``: the distance of a half-space with ``bits`` bits (any size; negative below 1 bit)."""
    from scipy.special import ndtri_exp

    if math.isinf(bits):
        return math.inf
    return -math.inf if bits <= 0 else float(-ndtri_exp(-bits * LN2))


def selection_guarantee(bits: float, budget: float) -> float:
    """Chance of failure at most ``2^-(B-k)`` after selection that spends ``budget`` bits (best-of-N: log2 N)."""
    return float(min(1.0, 2.0 ** -(bits - budget)))


def renyi_guarantee(bits: float, divergence: float, alpha: float) -> float:
    """Chance of failure at most ``(2^-B 2^D_alpha)^((alpha-1)/alpha)``, ``divergence`` in bits, ``alpha > 1``."""
    if not alpha > 1:
        raise ValueError(
            f"a Renyi order above 1 is needed, got alpha={alpha}; use average_guarantee for KL (alpha = 1)"
        )
    return float(min(1.0, 2.0 ** ((divergence - bits) * (alpha - 1) / alpha)))


def average_guarantee(bits: float, kl: float) -> float:
    """Chance of failure at most ``(k+1)/B`` when only an average, ``KL(q, prior) = kl`` bits, is bounded."""
    return 1.0 if bits <= 0 else float(min(1.0, (kl + 1.0) / bits))


def mean_shift_guarantee(bits: float, length: float) -> float:
    """Chance of failure at most ``Phi(r - beta)`` after a shift of the prior's mean by ``length`` in u-space."""
    from scipy.special import ndtr

    return float(ndtr(length - beta_of_bits(bits)))


def best_of_n_half_chance(bits: float) -> float:
    """``log2 N`` at which the best of N prior draws fails with chance 1/2: about ``B - 0.53``; exact for any B."""
    p = 2.0**-bits
    if p == 0.0:
        return bits + math.log2(LN2)
    if p >= 1.0:
        return 0.0
    return math.log2(math.log(0.5) / math.log1p(-p))


GUARANTEES: tuple[tuple[str, str, str], ...] = (
    ("selection among prior draws: D_inf(q, prior) <= k bits (best-of-N spends log2 N)", "a <= 2^-(B-k)", "strong"),
    ("Renyi divergence of order alpha > 1, in bits", "a <= (2^-B 2^D_alpha)^((alpha-1)/alpha)", "between"),
    ("average: KL(q, prior) <= k bits (reinforcement learning, drift)", "a <= (k+1)/B", "weak"),
    ("mean shift of length r in u-space", "a <= Phi(r - beta), beta = -Phi^-1(2^-B)", "any geometry"),
)


def _edge(bits: float) -> str:
    return "inf" if math.isinf(bits) else f"{bits:.1f}"


def _json_number(x: float) -> float | str:
    return "inf" if x == math.inf else "-inf" if x == -math.inf else float(x)
