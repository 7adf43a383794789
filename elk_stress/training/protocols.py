r"""What training pressure is made of: a trainee, targets, and an attack that moves the weights.

The engine owns the loop, the defender and every judgement. It holds the *cells* of one run, strengths x models, as flat
weights ``(strengths, models, n_parameters)``; asks the attack to advance all of them by some steps; lets the defender
refit; and measures. An attack never sees the test items and never says how well it did.

A weight change is a move in standard normal coordinates: the prior is ``N(theta_0, diag(sigma^2))``, so
``u = (theta - theta_0) / sigma`` has length r, and the attacker's distribution ``q = N(theta, diag(sigma^2))`` has
``KL(q, prior) = r^2 / 2`` nats, that is ``spent = r^2 / (2 ln 2)`` bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np

from elk_stress.probing.probe import Probe, Traits
from elk_stress.testbeds.protocol import Items, SplitName

__all__ = ["Log", "State", "Subject", "Targets", "Trainee", "TrainingAttack"]

State = Any
"""What an attack needs to go on: a (nested) dictionary of numpy arrays, so that it can be written and read back."""
Log = Mapping[str, np.ndarray]
"""``(steps, strengths, models)`` per quantity; ``task`` and ``evasion`` are always there."""
Subject = Literal["organism", "language_model"]


@dataclass(frozen=True)
class Targets:
    """The probes that an attack trains against, fitted for every cell.

    Attributes:
        recipes: one per probe; their ``score`` is a pure function.
        arrays: one dictionary per probe with ``parameters`` (name -> ``(strengths, models, ...)``) and ``gap``
            ``(strengths, models)``: how far positives scored above negatives when it was fitted.
    """

    recipes: tuple[Probe, ...]
    arrays: tuple[Mapping[str, Any], ...]


@runtime_checkable
class Trainee(Protocol):
    """Models whose weights can be moved, and what happens then.

    Weights are flat numpy arrays ``(strengths, models, n_parameters)`` float32; ``noise`` is the number of a fixed draw
    of the prior's noise (the same for all cells), or ``None`` for none.
    """

    @property
    def name(self) -> str:
        """The testbed's name."""
        ...

    @property
    def subject(self) -> Subject:
        """What kind of model it is: decides which attacks apply."""
        ...

    @property
    def site(self) -> str:
        """Where activations are read."""
        ...

    @property
    def n_models(self) -> int:
        """Independently trained models (or seeds)."""
        ...

    @property
    def original(self) -> np.ndarray:
        """``(models, n_parameters)``: the weights before any pressure."""
        ...

    def knowledge(self, model: int, traits: Traits) -> Mapping[str, Any]:
        """What a recipe with these traits is fitted with beside activations (``prior``, ``behaviour``), of the
        original model: :func:`~elk_stress.testbeds.defence_knowledge.knowledge_of`."""
        ...

    @property
    def splits(self) -> Mapping[SplitName, Items]:
        """Probe items; labels and groups are the same for all models."""
        ...

    @property
    def epsilon(self) -> float:
        """Behaviour is kept when the mean shift is at most this (nats)."""
        ...

    def activations(self, weights: np.ndarray, split: SplitName, noise: int | None = None) -> np.ndarray:
        """``(strengths, models, n_items, dim)`` float32."""
        ...

    def shift(self, weights: np.ndarray, noise: int | None = None) -> np.ndarray:
        """``(strengths, models)``: mean KL(original output, moved output) in nats over held-out behaviour inputs."""
        ...

    def length(self, weights: np.ndarray) -> np.ndarray:
        """``(strengths, models)``: r, the length of the move in the prior's standard normal coordinates."""
        ...

    def along(self, weights: np.ndarray, noise: int) -> np.ndarray:
        """``(strengths, models)``: the noise draw's component along the move, ``z . u / r`` (standard normal)."""
        ...

    def scaled(self, weights: np.ndarray, factor: np.ndarray) -> np.ndarray:
        """Weights whose move is ``factor (strengths, models)`` times as long, in the same direction."""
        ...

    def describe(self) -> Mapping[str, Any]:
        """Model, data, sizes, the prior's scale and its calibration curve."""
        ...


@runtime_checkable
class TrainingAttack(Protocol):
    """Moves weights against targets. A frozen dataclass of hyperparameters with these declarations.

    Strength 0 is the benign control: it must run the same steps without looking at the targets.
    """

    name: ClassVar[str]
    access: ClassVar[Literal["none", "score", "weights"]]
    """``weights``: gradients through model and probe; ``score``: the probe's score is only a reward."""
    scopes: ClassVar[tuple[Literal["weights"], ...]]
    subject: ClassVar[Subject]

    @property
    def steps(self) -> int:
        """Default number of steps of a run."""
        ...

    def start(self, trainee: Any, strengths: np.ndarray, seed: int) -> State:
        """The state before the first step: nested dictionaries of numpy arrays, cells first where per cell."""
        ...

    def advance(self, trainee: Any, state: State, targets: Targets, steps: int) -> tuple[State, Log]:
        """Run ``steps`` more steps of every cell. Pure: a state gives the same continuation whenever it is resumed, and
        ``advance(a + b) == advance(b) after advance(a)``."""
        ...

    def weights(self, trainee: Any, state: State) -> np.ndarray:
        """``(strengths, models, n_parameters)`` float32."""
        ...

    def spent(self, trainee: Any, state: State) -> np.ndarray | None:
        """``(strengths, models)`` bits spent where exactly known (selection: log2 n); ``None``: ``r^2/(2 ln 2)``."""
        ...
