"""Threats: what a number of bits is relative to; numbers under different threats are never ranked together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from elk_stress.core.settings import SETTINGS, listed, one_of, setting, shown, truth

__all__ = ["DEFAULT_EPSILON_FACTOR", "Threat", "as_threats", "check_measurable", "default_threats", "parse_threat"]

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
            one_of(f"a threat's {field}", getattr(self, field), allowed)
        object.__setattr__(self, "epsilon", setting("epsilon", self.epsilon, optional=True))
        object.__setattr__(self, "c", setting("c", self.c))
        truth("kept", self.kept)

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
        raise ValueError(
            f"a threat reads scope/prior/tail[/auroc][/kept], e.g. {Threat(kept=True).name}; got {shown(name)}"
        )
    scope, prior, tail = parts[:3]
    size = 0.3
    if prior.startswith("isotropic") and prior != "isotropic":
        try:
            prior, size = "isotropic", SETTINGS["c"].parse(prior.removeprefix("isotropic"))
        except ValueError:
            raise ValueError(
                f"the size of an isotropic prior is {SETTINGS['c'].what}, e.g. item/isotropic0.3/gaussian; "
                f"got {shown(name)}"
            ) from None
    return Threat(
        prior=prior,  # type: ignore[arg-type]
        scope=scope,  # type: ignore[arg-type]
        tail=tail,  # type: ignore[arg-type]
        kept="kept" in parts[3:],
        c=size,
        metric="auroc" if "auroc" in parts[3:] else "recall",
    )


def as_threats(threats: Sequence[Threat | str] | Threat | str | None, epsilon: float | None) -> tuple[Threat, ...]:
    """Threats from their names; the default ones for ``None``.

    Raises:
        TypeError: something that is neither a threat nor its name.
        ValueError: none, or one of them twice.
    """
    if threats is None:
        return default_threats(epsilon=epsilon)
    parsed = [parse_threat(t) if isinstance(t, str) else t for t in listed("threats", threats, (str, Threat))]
    given = tuple(replace(t, epsilon=epsilon) if t.kept and t.epsilon is None else t for t in parsed)
    names = [t.name for t in given]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"threats must be named once each and at least one is needed, got {names}")
    return given


def check_measurable(testbed: Any, threats: Sequence[Threat]) -> None:
    """Refuse threats of which none can be measured on a testbed.

    Raises:
        ValueError: all of them keep behaviour, and the testbed has no output.
    """
    if testbed.shift_cost == "none" and all(threat.kept for threat in threats):
        free = ", ".join(dict.fromkeys(threat.free.name for threat in threats))
        raise ValueError(
            f"{testbed.name} have no output whose behaviour could be kept, as {threats[0].name} asks; measure {free} "
            "instead, or stress a testbed with a model"
        )


_ALLOWED: dict[str, tuple[str, ...]] = {
    "prior": ("natural", "isotropic"),
    "scope": ("item", "universal"),
    "tail": ("gaussian", "logistic", "student_t", "best"),
    "metric": ("recall", "auroc"),
}
