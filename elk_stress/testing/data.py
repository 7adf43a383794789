r"""Contrast pairs with a planted truth, and what a defence may know: a planted prior and planted behaviour.

A row of item i is ``x_i = topic_i +- form + (label_i - 1/2) separation truth + noise + 1/2`` with unit noise, along the
orthonormal directions of one fixed basis (the same for every seed, so that one draw can train and another test):

    truth = 0,  form = 1,  topics = 2, 3, 4,  incidental = 5,  a second thing that behaviour reads = 6.

* prior: natural thoughts move 1/2 along the truth, 3 along the incidental direction, and 1 along every other.
* behaviour: of 12 items two rows each: the truth and direction 6, both somewhat different in every item.
* tokens: T reads of each item, each with unit noise of its own and an offset of its own position; in half of the items
  a stretch of 3 or more tokens is there, and what stands elsewhere is garbage.

Shapes: activations ``(n, d)`` or ``(n, T, d)`` float64; the prior and behaviour of tokens are over ``T d`` coordinates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from elk_stress.probing.probe import FittedProbe, Probe, as_fitted

if TYPE_CHECKING:
    from elk_stress.threats.priors import EllipticalPrior

__all__ = ["PlantedClasses", "planted_classes"]

_GARBAGE = 1e6
_SHORTEST = 3  # tokens that an item has at least
_MODELLED = 12  # items whose behaviour is known


@dataclass(frozen=True, eq=False)
class PlantedClasses:
    """Contrast pairs with a planted truth: what ``check_probe`` fits on and scores.

    Attributes:
        activations: ``(n, d)`` float64: a topic shared by a pair, the form (affirmed, negated), the truth, and noise;
            of tokens ``(n, T, d)``.
        labels: ``(n,)``, 1 = positive.
        pairs: ``(n / 2, 2)`` row indices.
        mask: ``(n, T)`` bool, true = a token is there; ``None`` where an item is read once.
        turned: ``(d, d)`` by which everything planted was rotated.
    """

    activations: np.ndarray
    labels: np.ndarray
    pairs: np.ndarray
    mask: np.ndarray | None = None
    turned: np.ndarray | None = None

    @property
    def dim(self) -> int:
        """Width d of one read."""
        return int(self.activations.shape[-1])

    @property
    def prior(self) -> EllipticalPrior:
        """How differently the model could have thought: a Gaussian of known covariance (see the module)."""
        # loads scipy
        from elk_stress.threats.priors import EllipticalPrior

        basis = self._directions
        sizes = np.ones(self.dim)
        sizes[0], sizes[5 % self.dim] = 0.5, 3.0
        factor = basis.T * sizes
        return EllipticalPrior(np.kron(np.eye(self._reads), factor), name="planted")

    @property
    def behaviour(self) -> np.ndarray:
        """Fisher factors ``(12, 2, d)``, of tokens ``(12, 2, T d)``: a move shifts by about ``0.5 ||F move||^2``."""
        rng = np.random.default_rng(np.random.SeedSequence(3))
        basis = self._directions
        gains = 1.0 + 0.2 * rng.standard_normal((_MODELLED, 2, 1))
        rows = gains * basis[[0, 6 % self.dim]] + 0.05 * rng.standard_normal((_MODELLED, 2, self.dim)) @ basis
        return np.asarray(np.tile(rows, (1, 1, self._reads)) / np.sqrt(self._reads))

    def tokens(self, n_tokens: int = 6, *, seed: int = 0) -> PlantedClasses:
        """The same items read ``n_tokens`` times, each read noisy; see the module.

        Raises:
            ValueError: fewer than 3 tokens, or these are tokens already.
        """
        if n_tokens < _SHORTEST or self.activations.ndim != 2:
            raise ValueError(f"tokens are {_SHORTEST} or more reads of rows (n, d), got {n_tokens} of {self.dim}")
        n = len(self.labels)
        places = np.random.default_rng(np.random.SeedSequence(2)).standard_normal((n_tokens, self.dim)) / 2
        rng = np.random.default_rng(np.random.SeedSequence([seed, 5]))
        reads = self.activations[:, None] + places + rng.standard_normal((n, n_tokens, self.dim))
        length = np.where(rng.random(n) < 0.5, n_tokens, rng.integers(_SHORTEST, n_tokens + 1, n))
        start = np.floor(rng.random(n) * (n_tokens - length + 1))[:, None]
        position = np.arange(n_tokens)
        mask = (position >= start) & (position < start + length[:, None])
        return replace(self, activations=reads, mask=mask).spoilt(_GARBAGE)

    def spoilt(self, size: float) -> PlantedClasses:
        """Other garbage, of this size, where no token is."""
        assert self.mask is not None, "only tokens can be masked"
        rng = np.random.default_rng(np.random.SeedSequence(9))
        garbage = size * rng.standard_normal(self.activations.shape)
        return replace(self, activations=np.where(self.mask[..., None], self.activations, garbage))

    def rotated(self, rotation: np.ndarray) -> PlantedClasses:
        """Everything rotated: activations (every token), prior and behaviour."""
        turned = rotation if self.turned is None else rotation @ self.turned
        return replace(self, activations=self.activations @ rotation.T, turned=turned)

    def fit(self, probe: Probe, *, seed: int = 0, labels: np.ndarray | None = None, **changes: Any) -> FittedProbe:
        """``probe`` fitted on this, with all that it declares to need; ``changes`` replace arguments of as_fitted."""
        traits = probe.traits
        given: dict[str, Any] = {"pairs": self.pairs, "mask": self.mask}
        given |= {"prior": self.prior} if traits.needs_prior else {}
        given |= {"behaviour": self.behaviour} if traits.needs_behaviour else {}
        labels = self.labels if labels is None else labels
        return as_fitted(probe, self.activations, labels, seed=seed, **{**given, **changes})

    @property
    def _reads(self) -> int:
        return int(self.activations.shape[1]) if self.activations.ndim == 3 else 1

    @property
    def _directions(self) -> np.ndarray:
        """Rows: the planted directions, as rotated."""
        return _basis(self.dim) if self.turned is None else _basis(self.dim) @ self.turned.T


def planted_classes(n_pairs: int = 160, dim: int = 16, *, separation: float = 4.0, seed: int = 0) -> PlantedClasses:
    """Classes ``separation`` noise standard deviations apart along one direction, orthogonal to the form's."""
    basis = _basis(dim)
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    truth, form, topics = basis[0], basis[1], basis[2:5]
    positive = np.arange(n_pairs) % 2
    topic = rng.standard_normal((n_pairs, len(topics))) @ topics
    halves = [
        topic + sign * form + np.outer(separation * (label - 0.5), truth) + rng.standard_normal((n_pairs, dim)) + 0.5
        for sign, label in ((1.0, positive), (-1.0, 1 - positive))
    ]
    rows = np.arange(n_pairs)
    return PlantedClasses(
        np.concatenate(halves), np.concatenate([positive, 1 - positive]), np.stack([rows, rows + n_pairs], axis=1)
    )


@cache
def _basis(dim: int) -> np.ndarray:
    """Orthonormal rows; the geometry is the same for every seed, so that one draw can train and another test."""
    basis, _ = np.linalg.qr(np.random.default_rng(np.random.SeedSequence(1)).standard_normal((dim, dim)))
    basis.flags.writeable = False
    return np.asarray(basis)
