"""Threats: what a number of bits is relative to; numbers under different threats are never ranked together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

__all__ = ["DEFAULT_EPSILON_FACTOR", "Threat", "default_threats", "parse_threat"]

DEFAULT_EPSILON_FACTOR = 3.0
"""Default behaviour epsilon = this times the median shift under the prior: a natural move is nearly always kept."""


@dataclass(frozen=True)
class Threat:
    """Which moves happen when nobody optimizes, who they act on, and what must be kept.

    Attributes:
        prior: ``natural`` (how differently the model could have thought about the same thing) or ``isotropic``.
        scope: ``item``: each item gets its own move; ``universal``: one move for all.
        tail: ``gaussian``, ``logistic``, ``student_t`` or ``best``, the best-fitting elliptical heavy tail.
        kept: whether behaviour must be kept (shift at most epsilon).
        epsilon: nats; ``None`` is 3 x the median shift under the prior.
        c: size of the isotropic prior, ``sigma = c sqrt(tr Sigma / d)``.
        metric: what a universal move must halve: ``recall`` at the threshold or ``auroc``.
    """

    prior: Literal["natural", "isotropic"] = "natural"
    scope: Literal["item", "universal"] = "item"
    tail: Literal["gaussian", "logistic", "student_t", "best"] = "gaussian"
    kept: bool = False
    epsilon: float | None = None
    c: float = 0.3
    metric: Literal["recall", "auroc"] = "recall"

    def __post_init__(self) -> None:
        for field, allowed in _ALLOWED.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"a threat's {field} is one of {', '.join(allowed)}; got {getattr(self, field)!r}")
        if self.epsilon is not None and not self.epsilon > 0:
            raise ValueError(f"epsilon is a positive number of nats, got {self.epsilon}")
        if not self.c > 0:
            raise ValueError(f"the isotropic size c is positive, got {self.c}")

    @property
    def name(self) -> str:
        """``scope/prior/tail[/kept]``, unique among threats that differ in more than epsilon."""
        prior = self.prior if self.prior == "natural" else f"isotropic{self.c:g}"
        parts = [self.scope, prior, self.tail]
        if self.scope == "universal" and self.metric != "recall":
            parts.append(self.metric)
        return "/".join(parts + (["kept"] if self.kept else []))

    @property
    def free(self) -> Threat:
        """The same threat without the behaviour constraint."""
        return replace(self, kept=False, epsilon=None)

    def to_json(self) -> dict[str, Any]:
        """All fields and the name."""
        return {"name": self.name, **vars(self)}


def default_threats(*, kept: bool = True, epsilon: float | None = None) -> tuple[Threat, ...]:
    """Per item under natural thoughts (Gaussian, best-fitting tail), universal, per item isotropic; free and kept."""
    free = (
        Threat(),
        Threat(tail="best"),
        Threat(scope="universal"),
        Threat(prior="isotropic"),
    )
    return free + tuple(replace(threat, kept=True, epsilon=epsilon) for threat in free) if kept else free


def parse_threat(name: str) -> Threat:
    """A threat from its name, e.g. ``item/natural/gaussian/kept`` or ``universal/natural/best``.

    Raises:
        ValueError: not of the form ``scope/prior/tail[/auroc][/kept]``.
    """
    parts = name.split("/")
    if len(parts) < 3 or any(part not in ("kept", "auroc", "recall") for part in parts[3:]):
        raise ValueError(f"a threat reads scope/prior/tail[/auroc][/kept], e.g. {Threat(kept=True).name}; got {name!r}")
    scope, prior, tail = parts[:3]
    size = 0.3
    if prior.startswith("isotropic") and prior != "isotropic":
        prior, size = "isotropic", float(prior.removeprefix("isotropic"))
    return Threat(
        prior=prior,  # type: ignore[arg-type]
        scope=scope,  # type: ignore[arg-type]
        tail=tail,  # type: ignore[arg-type]
        kept="kept" in parts[3:],
        c=size,
        metric="auroc" if "auroc" in parts[3:] else "recall",
    )


_ALLOWED: dict[str, tuple[str, ...]] = {
    "prior": ("natural", "isotropic"),
    "scope": ("item", "universal"),
    "tail": ("gaussian", "logistic", "student_t", "best"),
    "metric": ("recall", "auroc"),
}
