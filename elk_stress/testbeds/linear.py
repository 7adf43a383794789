r"""A model organism with known answers: Gaussian activations, a linear behaviour readout, and a planted correlate.

Item i in context c reads ``x_ic = mu_i + b_c + e_ic`` with known covariances ``Sigma_b`` and ``Sigma_e``, and
``mu_i = +-(truth_gap t + incidental_gap a)/2 + form and entity effects``. The model outputs a Gaussian with mean
``R x`` and unit covariance, so moving its activations shifts behaviour by exactly ``KL = 0.5 ||R move||^2`` nats.

* t, the *truth*: behaviour reads it (the first row of R), and natural thoughts hardly move it.
* a, an *incidental* correlate of the truth: it separates the classes nearly as well, behaviour ignores it
  (``R a = 0``), and natural thoughts move it freely.

So ``oracle`` (reads t) cannot be broken without breaking behaviour: its ``B_given_kept`` is infinite once epsilon is
small; ``paper`` (reads a) looks fine and breaks cheaply. A probe fitted on data lies between. The bits of every linear
probe are known: :meth:`Linear.exact_bits`, in closed form without the behaviour constraint and by integration with it.

Shapes: activations ``(n_items, n_contexts, dim)`` float32; R ``(n_outputs, dim)``. Units: activations; nats for shift.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np

from elk_stress.core.bits import Bits, Kind
from elk_stress.probing.probe import FittedProbe, direction
from elk_stress.testbeds.linear_exact import joint_bits
from elk_stress.testbeds.protocol import ContextSet, Items, SplitName
from elk_stress.threats.priors import EllipticalPrior, Gaussian, Tail

__all__ = ["Linear"]

# half of the entities train; the rest is shared by calibration and test
_SPLITS: tuple[tuple[SplitName, float], ...] = (("train", 0.5), ("calibration", 0.75), ("test", 1.0))
_CONTEXT_SETS: tuple[ContextSet, ...] = ("fit", "prior", "observed")


@dataclass(frozen=True)
class Linear:
    """Gaussian activations, linear behaviour, a truth direction and a planted incidental correlate.

    Attributes:
        dim: width of the activations.
        n_items: items over all splits; an entity has two, of opposite label (a contrast pair).
        n_contexts: neutral contexts in each set: for fitting, for the prior (together A), observed (B).
        seed: all randomness.
        n_outputs: rank of the behaviour readout; up to 3 have exact joint bits.
        truth_gap, incidental_gap: distance between the class means along t and a.
        truth_sway, incidental_sway: standard deviation of a natural thought along t and a; elsewhere about 1.
        interaction_share: share of a natural thought's variance that is particular to the item.
        gain: how strongly behaviour reads t (the other outputs: half of it).
    """

    dim: int = 32
    n_items: int = 480
    n_contexts: int = 16
    seed: int = 0
    n_outputs: int = 2
    truth_gap: float = 6.0
    incidental_gap: float = 4.0
    truth_sway: float = 0.4
    incidental_sway: float = 1.0
    interaction_share: float = 0.5
    gain: float = 1.0

    name: ClassVar[str] = "linear"
    site: ClassVar[str] = "activations"
    shift_cost: ClassVar[Literal["exact", "model"]] = "exact"

    def __post_init__(self) -> None:
        if self.n_items < 8 or self.n_contexts < 2:
            raise ValueError(
                f"three splits of contrast pairs need n_items >= 8 and n_contexts >= 2, got {self.n_items} and "
                f"{self.n_contexts}"
            )
        if not 1 <= self.n_outputs <= self.dim - 3:
            raise ValueError(
                f"the readout needs 1 <= n_outputs <= dim - 3 (truth, incidental and form directions come first), got "
                f"n_outputs={self.n_outputs} with dim={self.dim}"
            )
        if not 0.0 <= self.interaction_share <= 1.0:
            raise ValueError(f"interaction_share is a share in [0, 1], got {self.interaction_share}")

    @cached_property
    def splits(self) -> Mapping[SplitName, Items]:
        """Train (half of the entities), calibration and test (a quarter each)."""
        n_entities = self.n_items // 2
        affirmed_is_positive = self._rng("labels").integers(0, 2, n_entities)
        out: dict[SplitName, Items] = {}
        start = 0
        for split, until in _SPLITS:
            stop = round(until * n_entities)
            entities = np.arange(start, stop)
            rows = 2 * np.arange(stop - start)
            first = affirmed_is_positive[entities]
            out[split] = Items(
                ids=tuple(f"entity-{e}-{form}" for e in entities for form in ("affirmed", "negated")),
                labels=np.stack([first, 1 - first], axis=1).ravel(),
                groups=np.repeat(entities, 2),
                pairs=np.stack([rows, rows + 1], axis=1),
            )
            start = stop
        return out

    def prepare(self, progress: Any = None) -> None:
        """Nothing long to do."""

    def activations(self, split: SplitName, contexts: ContextSet = "prior") -> np.ndarray:
        """Items under one set of contexts, or ``bare``: their means, as one context."""
        means = self._means(split)
        if contexts == "bare":
            return means[:, None].astype(np.float32)
        if contexts not in _CONTEXT_SETS:
            raise ValueError(f"contexts are 'fit', 'prior', 'observed' or 'bare', got {contexts!r}")
        between = self._rng("between", contexts).standard_normal((self.n_contexts, self.dim)) @ self._between_factor.T
        noise = self._rng("interaction", contexts, split).standard_normal((len(means), self.n_contexts, self.dim))
        return np.asarray(means[:, None] + between + noise @ self._interaction_factor.T, dtype=np.float32)

    def shift(self, split: SplitName, items: np.ndarray, moves: np.ndarray) -> np.ndarray:
        """``0.5 ||R move||^2`` nats, exactly, for ``moves (p, n, dim)``; the same for every item."""
        if moves.ndim != 3 or moves.shape[0] != len(items) or moves.shape[-1] != self.dim:
            raise ValueError(f"expected moves of shape ({len(items)}, n, {self.dim}), got {moves.shape}")
        return np.asarray(0.5 * np.sum(np.square(moves.astype(np.float64) @ self.readout.T), axis=-1))

    def shift_factor(self, split: SplitName, items: np.ndarray) -> np.ndarray:
        """R for every item: ``(p, n_outputs, dim)``."""
        return np.broadcast_to(self.readout, (len(items), *self.readout.shape))

    def known_probes(self) -> Mapping[str, FittedProbe]:
        """``oracle`` reads t, ``paper`` reads a; each is 0 halfway between the classes."""
        return {
            "oracle": direction(
                self.truth, name="oracle", site=self.site, notes={"reads": "what behaviour depends on"}
            ),
            "paper": direction(
                self.incidental, name="paper", site=self.site, notes={"reads": "an incidental correlate"}
            ),
        }

    def describe(self) -> Mapping[str, Any]:
        """Settings and sizes."""
        sizes = {split: len(items) for split, items in self.splits.items()}
        return {"testbed": self.name, "site": self.site, "splits": sizes, **asdict(self)}

    def true_prior(self, scope: Literal["item", "universal"] = "item", tail: Tail | None = None) -> EllipticalPrior:
        """The natural prior that the data were drawn from, known instead of estimated."""
        parts = [self._between_factor] if scope == "universal" else [self._between_factor, self._interaction_factor]
        factor = np.linalg.cholesky(sum((p @ p.T for p in parts), np.zeros((self.dim, self.dim))))
        return EllipticalPrior(factor, tail or Gaussian(), "natural", {"scope": scope, "known": True})

    def exact_bits(
        self, weight: np.ndarray, offset: float, prior: EllipticalPrior, epsilon: float | None = None
    ) -> Bits:
        """Exact bits of a linear probe that fails when ``offset + weight . move <= 0``.

        Args:
            weight: the probe's direction, ``(dim,)``.
            offset: its score minus threshold at the origin.
            prior: moves.
            epsilon: allowed behaviour shift in nats; ``None`` for no constraint (then a closed form).
        """
        if epsilon is not None:
            value = joint_bits(weight, offset, prior, self.readout, epsilon)
            return Bits(value, value, value, Kind.EXACT, "integration")
        deviation = float(prior.standard_deviation(weight))
        if deviation > 0:
            value = float(prior.tail.bits(offset / deviation))
        else:
            value = math.inf if offset > 0 else 0.0
        return Bits(value, value, value, Kind.EXACT, "closed_form")

    @property
    def truth(self) -> np.ndarray:
        """t, unit length."""
        return self._basis[:, 0]

    @property
    def incidental(self) -> np.ndarray:
        """a, unit length, orthogonal to everything that behaviour reads."""
        return self._basis[:, 1]

    @cached_property
    def readout(self) -> np.ndarray:
        """R, ``(n_outputs, dim)``: the truth at full gain, then other directions at half of it."""
        rows = [self.gain * self.truth]
        rows += [0.5 * self.gain * self._basis[:, 3 + k] for k in range(self.n_outputs - 1)]
        return np.stack(rows)

    @cached_property
    def _basis(self) -> np.ndarray:
        """Orthonormal columns: truth, incidental, form (affirmed or negated), then the rest."""
        basis, _ = np.linalg.qr(self._rng("basis").standard_normal((self.dim, self.dim)))
        return np.asarray(basis)

    @cached_property
    def _between_factor(self) -> np.ndarray:
        return self._sway("between", 1.0 - self.interaction_share)

    @cached_property
    def _interaction_factor(self) -> np.ndarray:
        return self._sway("interaction", self.interaction_share)

    def _sway(self, part: str, share: float) -> np.ndarray:
        """A factor whose standard deviation is ``sway sqrt(share)`` along t and a, and about ``sqrt(share)`` elsewhere.

        The spectrum decays and its directions are random, so natural thoughts couple t, a and what behaviour reads.
        """
        rotation, _ = np.linalg.qr(self._rng("spectrum", part).standard_normal((self.dim, self.dim)))
        factor = rotation / np.sqrt(1.0 + np.arange(self.dim))
        factor *= math.sqrt(self.dim / float(np.sum(factor**2)))
        in_basis = self._basis.T @ factor
        for row, sway in ((0, self.truth_sway), (1, self.incidental_sway)):
            in_basis[row] *= sway / np.linalg.norm(in_basis[row])
        return np.asarray(math.sqrt(share) * self._basis @ in_basis)

    def _means(self, split: SplitName) -> np.ndarray:
        """``mu_i``: class, form (affirmed or negated) and entity effects (a third of a unit in every direction)."""
        items = self.splits[split]
        signs = 2.0 * items.labels - 1.0
        class_effect = (self.truth_gap * self.truth + self.incidental_gap * self.incidental) / 2.0
        form = np.where(np.arange(len(items)) % 2 == 0, 1.0, -1.0)
        entities = self._rng("entities").standard_normal((self.n_items // 2, self.dim)) / 3.0
        return np.asarray(signs[:, None] * class_effect + form[:, None] * self._basis[:, 2] + entities[items.groups])

    def _rng(self, *purpose: str) -> np.random.Generator:
        """An independent stream per purpose: drawing one thing never changes another."""
        return np.random.default_rng(np.random.SeedSequence([self.seed, *b"/".join(p.encode() for p in purpose)]))
