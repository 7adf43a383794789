r"""What a ledger is opened for: one probe, one threat, the bits of its catches, and how much of them may be lost.

Bits are relative to a prior, its tail and its scale, and at seven standard deviations a Gaussian says 40 bits where a
Student-t with 5 degrees of freedom says 13. So :meth:`Terms.of_result` takes for each item the *least* of its lower
ends over every tail under which the result has measured that threat item by item (``gaussian`` and ``best``, the tail
fitted to real moves): the budget holds under each of these.

**Lower ends.** The bits of an item are exact *given* the fitted prior and its origin: they say nothing of the few
contexts that both stand on. The interval of the headline does (entities, contexts, threshold, scale), so each item's
reliability index is deflated as far as the headline's, ``beta = -Phi^-1(2^-B)``:

``beta_i <- beta_i q``,  ``q = beta(low end of the half-life) / beta(half-life)``, never above 1,

exact where a scale that is not known moves all margins alike; and an item's own lower end holds where it is lower. Of a
half-life that is censored or infinite ``q`` is not known: then the deepest quantile of the survival curve that is not
censored stands in, with the low end that the curve's band gives it, and no item counts for more than the low end of the
half-life. Of a half-life whose low end is at most 1 bit (``beta <= 0``) no multiple says anything: no item counts for
more than that end. An item that no move breaks (``inf``) keeps its bits: no scale of the prior changes that, though
another threshold might.

What the budget would be elsewhere stands beside it and is for the reader, nothing is refused by it: under each tail
alone, under the other tails of the result, and at multiples of the prior's scale. For these an item of B bits counts as
one whose margin is the ``z = -Phi^-1(2^-B)`` standard deviations that cost as many under Gaussian tails: exact for a
linear probe, otherwise what its linearization says.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from elk_stress.core.tensor_files import parse_json
from elk_stress.ledger.budget import Account, beta_of, checked, deflated
from elk_stress.ledger.store import canonical, digest

if TYPE_CHECKING:
    from elk_stress.threats.tails import Tail

__all__ = ["Elsewhere", "Terms", "disagreement", "fingerprint"]

_USABLE = ("exact", "estimate", "censored", "lower_bound")


@dataclass(frozen=True)
class Elsewhere:
    """Budgets under another tail or scale: ``of`` is ``tail`` or ``scale``, ``name`` which, e.g. ``student_t(5)``."""

    of: str
    name: str
    selection: float
    kl: float
    mean_shift: float

    @classmethod
    def from_bits(cls, of: str, name: str, bits_low: np.ndarray, tolerated: float) -> Elsewhere:
        """Budgets of ``bits_low (n_items,)``."""
        budgets = (kind.remaining(bits_low, tolerated) for kind in Account)
        return cls(of, name, *(budget for budget in budgets if budget is not None))

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Elsewhere:
        """Read back."""
        numbers = (float(record[kind]) for kind in ("selection", "kl", "mean_shift"))
        return cls(record["of"], record["name"], *numbers)

    def budget(self, account: Account) -> float | None:
        """Of one account; ``None`` for queries."""
        return getattr(self, account.value, None)


@dataclass(frozen=True)
class Terms:
    """What a ledger was opened for; fixed for its life.

    Attributes:
        probe: its name, for the reader.
        fingerprint: tells this probe from any other; see :func:`fingerprint`.
        threat: what the bits are relative to.
        bits_low: ``(n_items,)`` lower ends of ``B_i`` over the caught items, ascending; ``inf`` where no move fails.
        tolerated: share of the catches that may be lost, in (0, 1).
        warn_at: share of a budget from which on charges warn.
        least_of: tails over which ``bits_low`` are the least; none if they were given.
        deflated_by: for each of these the factor of the reliability index; ``None`` where the result has no headline
            and the items' own lower ends are all there is.
        elsewhere: what the budgets would be under other tails and scales; empty if not known.
    """

    probe: str
    fingerprint: str
    threat: str
    bits_low: tuple[float, ...]
    tolerated: float = 0.1
    warn_at: float = 0.8
    least_of: tuple[str, ...] = ()
    elsewhere: tuple[Elsewhere, ...] = field(default=(), compare=False)
    deflated_by: tuple[float | None, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        told = (self.probe, self.fingerprint, self.threat, *self.least_of)
        if not all(isinstance(text, str) for text in told):
            raise TypeError(f"probe, fingerprint, threat and tails of a ledger's terms are texts, got {told!r}")
        bits = np.sort(checked(self.bits_low, self.tolerated)[0])
        if bits.ndim != 1:
            raise ValueError(f"bits_low is one number per caught item, shape (n_items,), got shape {bits.shape}")
        if not 0 < self.warn_at <= 1:
            raise ValueError(f"warn_at is a share of the budget, above 0 and at most 1, got {self.warn_at}")
        object.__setattr__(self, "bits_low", tuple(bits.tolist()))
        object.__setattr__(self, "tolerated", float(self.tolerated))
        object.__setattr__(self, "warn_at", float(self.warn_at))

    @classmethod
    def of_result(
        cls,
        result: Any,
        threat: str,
        *,
        probe: Any = None,
        tolerated: float = 0.1,
        warn_at: float = 0.8,
    ) -> Terms:
        """From what a stress test found: the least over the tails that were measured; see the module.

        Args:
            result: a ``StressResult``, a ``RunResult``, their JSON, or the path of a ``result.json``.
            threat: name of a per-item threat, e.g. ``item/natural/gaussian``.
            probe: which probe, where the result holds several: its name, or the fitted probe itself, whose parameters
                are then part of the fingerprint. Otherwise the fingerprint is that of the measurement.
            tolerated, warn_at: see :class:`Terms`.

        Raises:
            ValueError: no such probe or threat; a threat without per-item bits; a probe that catches nothing; numbers
                that are no lower ends (distances, upper bounds).
        """
        name = probe if probe is None or isinstance(probe, str) else str(probe.name)
        try:
            return cls._measured(_one_result(result, name), threat, name, probe, tolerated, warn_at)
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f"the result is not as elk-stress run writes it ({type(error).__name__}: {error}); give its result.json"
            ) from None

    @classmethod
    def _measured(
        cls, record: Mapping[str, Any], threat: str, name: str | None, probe: Any, tolerated: float, warn_at: float
    ) -> Terms:
        where = f"{record['probe']} on {record['testbed']} at {record['site']}"
        tails = _same_but_tail(record, threat)
        doubts = {tail: _doubt(record["threats"][other]) for tail, other in tails.items()}
        low = {tail: _lower_ends(record, other, where, doubts[tail]) for tail, other in tails.items()}
        own = low[_tail(threat)]
        if not own:
            raise ValueError(f"{where} catches nothing under {threat}: there are no catches to guard")
        # what another tail's threshold does not catch is lost there at 0 bits
        least = tuple(min(rows.get(item, 0.0) for rows in low.values()) for item in own)
        measured = [record[key] for key in ("probe", "testbed", "site", "seed")]
        measured.append(record["threats"][threat]["detection"]["threshold"])
        mark = f"result:{digest(canonical(measured))}"
        return cls(
            where,
            mark if probe is None or probe is name else fingerprint(probe),
            threat,
            least,
            tolerated,
            warn_at,
            tuple(tails),
            _elsewhere(record, tails, low, tolerated),
            tuple(None if doubt is None else doubt[0] for doubt in doubts.values()),
        )

    def to_record(self) -> str:
        """Canonical JSON."""
        return canonical(_finite(asdict(self)))

    @classmethod
    def of_record(cls, record: str) -> Terms:
        """Read back.

        Raises:
            ValueError, LookupError, TypeError, AttributeError: the record is none.
        """
        read = parse_json(record, "the record")
        return cls(
            **{
                **read,
                "bits_low": tuple(float(b) for b in read["bits_low"]),
                "least_of": tuple(read.get("least_of", ())),
                "deflated_by": tuple(read.get("deflated_by", ())),
                "elsewhere": tuple(Elsewhere.of_record(row) for row in read.get("elsewhere", ())),
            }
        )


def fingerprint(probe: Any) -> str:
    """``probe:`` and a hash of a fitted probe's name, recipe, site and parameters, bit for bit."""
    digest = hashlib.sha256(f"{probe.name}\0{probe.probe!r}\0{probe.site}".encode())
    for name in sorted(probe.parameters):
        value = np.ascontiguousarray(probe.parameters[name])
        digest.update(f"\0{name}\0{value.dtype.str}\0{value.shape}\0".encode())
        digest.update(value.tobytes())
    return f"probe:{digest.hexdigest()}"


def disagreement(path: Path, kept: Terms, given: Terms) -> str:
    """Why a ledger kept for some terms cannot be used for others."""
    told = []
    for name in (f.name for f in fields(Terms) if f.compare):
        old, new = getattr(kept, name), getattr(given, name)
        if old != new and name == "bits_low":
            was, now = (f"{len(bits)} items with median {np.median(bits):.6g}" for bits in (old, new))
            told.append(f"the bits of {was}, not of {now}")
        elif old != new:
            told.append(f"{name} {old!r}, not {new!r}")
    return (
        f"the ledger {path} was opened for {'; '.join(told)}. What was spent there stays spent: open it with its own "
        "terms, or give a new measurement a new file and charge to it what was spent before"
    )


def _one_result(result: Any, probe: str | None) -> Mapping[str, Any]:
    if isinstance(result, (str, Path)):
        try:
            result = parse_json(Path(result).read_bytes(), "it")
        except ValueError as error:
            raise ValueError(f"{result} is no JSON ({error}); expected a result.json of elk-stress run") from None
    record = result.to_json() if hasattr(result, "to_json") else result
    if not isinstance(record, Mapping) or not ("results" in record or "threats" in record):
        raise ValueError("expected a result of elk-stress run: one probe with its threats, or several under 'results'")
    rows = record.get("results", [record])
    names = [str(row.get("probe")) for row in rows]
    matches = [row for row in rows if probe is None or row.get("probe") == probe]
    if len(matches) != 1:
        what = "which probe?" if probe is None else f"{len(matches)} results of a probe {probe!r}"
        raise ValueError(f"{what} the result holds: {', '.join(names) or 'none'}; name one that is there once")
    found: Mapping[str, Any] = matches[0]
    return found


def _same_but_tail(record: Mapping[str, Any], threat: str) -> dict[str, str]:
    """Tail -> threat with bits per item, of all that differ from ``threat`` in their tail at most; its own first."""
    known = [name for name, row in record["threats"].items() if row.get("items") is not None]
    if threat not in known:
        why = "has no bits per item" if threat in record["threats"] else "was not measured"
        raise ValueError(f"threat {threat!r} {why}; threats with bits per item: {', '.join(known) or 'none'}")
    others = [name for name in known if name != threat and _but_tail(name) == _but_tail(threat)]
    return {_tail(name): name for name in [threat, *others]}


def _tail(threat: str) -> str:
    return threat.split("/")[2]


def _but_tail(threat: str) -> list[str]:
    parts = threat.split("/")
    return parts[:2] + parts[3:]


def _doubt(row: Mapping[str, Any]) -> tuple[float, float] | None:
    """Factor of the reliability index, and bits that no item that can be broken counts beyond; ``None``: not known."""
    headline = row.get("headline")
    if headline is None:
        return None
    value, low = float(headline["value"]), max(float(headline["low"]), 0.0)
    if headline["kind"] != "censored" and math.isfinite(value):
        return _factor(value, low), (low if low <= 1 else math.inf)
    return _factor(*_deepest(row.get("survival"))), low


def _factor(value: float, low: float) -> float:
    """``beta(low) / beta(value)`` within 0 and 1; 0 where the low end is no barrier."""
    if low <= 1:
        return 0.0
    return 1.0 if low >= value else float(beta_of(np.array(low)) / beta_of(np.array(value)))


def _deepest(curve: Mapping[str, Any] | None) -> tuple[float, float]:
    """Bits of the deepest quantile of a survival curve that is not censored, and their low end by the curve's band.

    ``(inf, inf)``, which deflates nothing, where no item was seen to fail: then the cap alone speaks.
    """
    if curve is None:
        return math.inf, math.inf
    x, value, band = (np.asarray(curve[name], dtype=float) for name in ("x", "value", "low"))
    seen = np.flatnonzero((value < 1) & (x < float(curve["censored_from"])))
    if not len(seen):
        return math.inf, math.inf
    share = value[seen[-1]]
    at = int(np.flatnonzero(value <= share)[0])
    # the grid point before the band has fallen as far: the low end lies behind it
    first = max(int(np.flatnonzero(band <= share)[0]) - 1, 0)
    return float(x[at]), float(x[first])


def _lower_ends(
    record: Mapping[str, Any], threat: str, where: str, doubt: tuple[float, float] | None
) -> dict[str, float]:
    """Item -> lower end of its bits, the doubt about all items together included."""
    items = record["threats"][threat]["items"]
    poor = sorted({str(row["kind"]) for row in items["bits"]} - set(_USABLE))
    if poor:
        raise ValueError(
            f"some items of {where} under {threat} have bits of kind {', '.join(poor)}, which have no lower end; "
            "measure them with method='auto'"
        )
    each = np.array([max(0.0, float(row["low"])) for row in items["bits"]])
    if doubt is not None:
        each = deflated(each, *doubt)
    low = dict(zip(items["ids"], each.tolist(), strict=True))
    if len(low) < len(items["bits"]):
        raise ValueError(f"two items of {where} under {threat} have the same name; name each once and measure again")
    return low


def _elsewhere(
    record: Mapping[str, Any], tails: Mapping[str, str], low: Mapping[str, Mapping[str, float]], tolerated: float
) -> tuple[Elsewhere, ...]:
    """Under each measured tail alone; and, from the Gaussian's bits, where the result has rows of other tails and
    scales (it has none where behaviour must be kept: that event does not scale)."""
    from elk_stress.threats.tails import Gaussian

    alone = {tail: np.array(list(rows.values())) for tail, rows in low.items() if rows}
    found = [Elsewhere.from_bits("tail", tail, bits, tolerated) for tail, bits in alone.items()]
    if "gaussian" in alone:
        row, z = record["threats"][tails["gaussian"]], Gaussian().quantile_of_bits(alone["gaussian"])
        for name in row.get("tails", {}):
            if name not in alone:
                found.append(Elsewhere.from_bits("tail", name, _tail_of(name).bits(z), tolerated))
        for name in row.get("scale", {}):
            found.append(Elsewhere.from_bits("scale", name, Gaussian().bits(z / float(name)), tolerated))
    return tuple(found)


def _tail_of(name: str) -> Tail:
    """From its name in a result."""
    from elk_stress.threats.tails import Gaussian, Logistic, StudentT

    if name.startswith("student_t("):
        return StudentT(float(name.removeprefix("student_t(").removesuffix(")")))
    return Logistic() if name == "logistic" else Gaussian()


def _finite(value: Any) -> Any:
    """With infinities as strings."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and math.isinf(value) else value
