r"""A small network that cannot be steeper than it says: certified bits.

Equations. Whiten by the prior of natural thoughts, ``W = L^+`` with ``||W L||_2 = 1``, so that a step of length 1 in
``z = W (x - mean)`` is one standard deviation of a natural thought. Then

    h_0 = A_0 z + a_0,     h_k = A_k sort2(h_{k-1}) + a_k,     score = v . sort2(h_K) + b,

where sort2 sorts pairs of coordinates (GroupSort with groups of two, Anil, Lucas and Grosse 2019, 1811.05381): it only
permutes, so it is 1-Lipschitz and keeps the gradient's length. Every ``||A_k||_2 <= 1`` and ``||v|| = 1`` while fitting
by the rescaling of almost-orthogonal layers (Prach and Lampert 2022, 2208.03160):
``A = diag(1 / sqrt(sum_j |P P^T|_ij)) P`` has spectral norm at most 1 for any P. Hence the score rises by at most 1 per
standard deviation: scores are distances in units of u.

Bound (:meth:`Lipschitz.lipschitz`), for *any* factor M, since the judge's prior is another than the one it was fitted
with: ``|score(x + M u) - score(x + M v)| <= ||A_0 W M||_2 ||A_1||_2 ... ||v|| ||u - v||``, from the spectral norms of
the stored float64 parameters. It uses A_0 W as one matrix: the judge's moves in directions that the first layer does
not read cost nothing, where ``||A_0|| ||W M||`` would charge the worst of them. The isoperimetric inequality turns it
into bits that hold against every attack (:mod:`elk_stress.thoughts.certificate`).

Fit: class-balanced hinge loss ``max(0, m - y score)``, Adam with a step that falls along a cosine, from a network that
is the linear score ``z . delta / ||delta||`` of the whitened class means (all units read it). Capacity is limited by
the norms alone; the margin m is chosen on training rows: the one whose fit on two thirds of the items keeps the most
bits per positive on the rest (:mod:`elk_stress.probing.fit.held_out`), counted by the bound L = 1.

Shapes: activations ``(*batch, d)`` -> ``(*batch,)``. Units: standard deviations of natural thoughts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from elk_stress.probing.fit.held_out import held_out, kept_bits
from elk_stress.probing.fit.scaling import standardization
from elk_stress.probing.probe import FittedProbe, Traits

if TYPE_CHECKING:
    from elk_stress.threats.priors import EllipticalPrior

__all__ = ["Lipschitz"]

# singular values of the factor, in units of the features' deviations, below this share of the largest are left unread:
# whitening would amplify rounding
_SMALLEST = 1e-3


@dataclass(frozen=True)
class Lipschitz:
    """A 1-Lipschitz network on whitened activations, whose bits are certified.

    Attributes:
        width: units of a layer, even.
        depth: square layers after the first.
        margins: hinge margins to choose from, in units of the distance between the whitened class means.
        steps: of Adam.
        learning_rate: first step size.
        fpr: false-positive rate at which held-out bits are counted.
        folds: of the choice.
        batch: rows per step.
    """

    width: int = 8
    depth: int = 1
    margins: tuple[float, ...] = (0.25, 0.5, 1.0)
    steps: int = 200
    learning_rate: float = 0.02
    fpr: float = 0.05
    folds: int = 3
    batch: int = 1024

    name: ClassVar[str] = "lipschitz"
    traits: ClassVar[Traits] = Traits(needs_prior=True)

    def __post_init__(self) -> None:
        # JSON gives a list back
        object.__setattr__(self, "margins", tuple(float(margin) for margin in self.margins))
        whole = self.width >= 2 and self.width % 2 == 0 and self.depth >= 0 and self.steps >= 1 and self.batch >= 1
        if not whole or not self.margins or min(self.margins) <= 0 or not self.learning_rate > 0:
            raise ValueError(
                "lipschitz needs an even width of at least 2, a depth of at least 0, steps and a batch of at least 1, "
                f"a learning_rate and margins above 0; got {self}"
            )

    def fit(
        self,
        activations: np.ndarray,
        labels: np.ndarray,
        *,
        pairs: np.ndarray | None = None,
        seed: int = 0,
        prior: EllipticalPrior | None = None,
    ) -> FittedProbe:
        """Fit on ``activations (n, d)``, ``labels (n,)`` and whiten by ``prior``; ``seed`` draws weights and batches.

        Notes: the ``margin`` (units of u), ``held_out_bits`` of each that was tried, and the ``gap`` between the means.

        Raises:
            ValueError: no prior, or one of another width.
        """
        rows, targets = np.asarray(activations, dtype=float), np.asarray(labels).astype(int)
        if prior is None or prior.width != rows.shape[1]:
            got = "none" if prior is None else f"one of width {prior.width}"
            raise ValueError(f"lipschitz needs the prior of moves of {rows.shape[1]} features, got {got}")
        factor = np.asarray(prior.factor, dtype=float)
        # in units of each feature's own deviation: one a thousand times as large hides no other
        _, spread = standardization(rows)
        left, size, _ = np.linalg.svd(factor / spread[:, None], full_matrices=False)
        keep = size > _SMALLEST * size[0]
        whiten = (left[:, keep] / size[keep] / spread[:, None]).T
        mean = rows.mean(axis=0)
        z = (rows - mean) @ whiten.T
        gap = float(np.linalg.norm(z[targets == 1].mean(axis=0) - z[targets == 0].mean(axis=0))) or 1.0
        notes: dict[str, Any] = {"gap": gap}
        margin = self.margins[0]
        if len(self.margins) > 1:
            found = {m: self._held_out_bits(z, targets, m * gap, seed) for m in self.margins}
            notes["held_out_bits"] = {f"{m:g}": value for m, value in found.items()}
            margin = max(found, key=lambda m: found[m])
        layers = self._descend(z, targets, margin * gap, seed)
        parameters = {**layers, "weight": whiten.T @ layers["weight"], "centre": mean}
        return FittedProbe(self, parameters, notes={**notes, "margin": margin * gap})

    def score(self, xp: Any, parameters: Mapping[str, Any], activations: Any) -> Any:
        """The network on ``(activations - centre) @ weight``, the whitening folded into its first layer."""
        return _network(xp, parameters, activations - parameters["centre"])

    def lipschitz(self, parameters: Mapping[str, np.ndarray], factor: np.ndarray) -> float:
        """The product of spectral norms, the first that of ``weight^T factor``; a bound for any ``factor (d, k)``."""
        bound = np.linalg.norm(np.asarray(parameters["weight"], dtype=float).T @ factor, 2)
        for layer in np.asarray(parameters["square"], dtype=float):
            bound *= np.linalg.norm(layer, 2)
        return float(bound * np.linalg.norm(np.asarray(parameters["readout"], dtype=float)))

    def _held_out_bits(self, z: np.ndarray, targets: np.ndarray, margin: float, seed: int) -> float:
        found = []
        for learned, judged in held_out(targets, self.folds):
            layers = self._descend(z[learned], targets[learned], margin, seed)
            found.append(kept_bits(_network(np, layers, z[judged]), targets[judged], 1.0, self.fpr))
        return float(np.mean(found))

    def _descend(self, z: np.ndarray, targets: np.ndarray, margin: float, seed: int) -> dict[str, np.ndarray]:
        """Layers with the constraints applied, float64."""
        rng = np.random.default_rng(np.random.SeedSequence(seed))
        positive = targets == 1
        delta = z[positive].mean(axis=0) - z[~positive].mean(axis=0)
        delta = delta / (np.linalg.norm(delta) or 1.0)
        middle = 0.5 * float((z[positive].mean(axis=0) + z[~positive].mean(axis=0)) @ delta)
        h, width = np.sqrt(self.width), self.width
        free = {
            "weight": (delta[:, None] + 0.1 / np.sqrt(len(delta)) * _normal(rng, len(delta), width)) / h,
            "bias": np.full(width, -middle / h),
            "square": np.eye(width) + 0.1 / width * _normal(rng, self.depth, width, width),
            "shift": np.zeros((self.depth, width)),
            "readout": np.ones(width) / h,
            "offset": np.zeros(()),
        }
        batches = -(-len(z) // self.batch)
        size = -(-len(z) // batches)
        # rows that come twice fill the last batch
        order = np.resize(rng.permutation(len(z)), batches * size)
        share = np.where(positive, 0.5 / max(1, positive.sum()), 0.5 / max(1, (~positive).sum())) * len(z)
        fitted = _program(self.steps, self.learning_rate)(
            {name: np.asarray(value, dtype=np.float32) for name, value in free.items()},
            z[order].reshape(batches, size, -1).astype(np.float32),
            np.where(positive, 1.0, -1.0)[order].reshape(batches, size).astype(np.float32),
            share[order].reshape(batches, size).astype(np.float32),
            np.float32(margin),
        )
        return _constrained(np, {name: np.asarray(value, dtype=float) for name, value in fitted.items()})


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape)


def _constrained(xp: Any, free: Mapping[str, Any]) -> dict[str, Any]:
    """Free parameters with every layer rescaled to spectral norm at most 1, and the readout to length 1."""

    def almost_orthogonal(layer: Any) -> Any:
        """``(..., inputs, units)`` with each unit's weights divided by the root of its row of ``|P P^T|``, summed."""
        gram = xp.abs(xp.swapaxes(layer, -1, -2) @ layer).sum(-1)
        return layer / xp.sqrt(gram + 1e-12)[..., None, :]

    return {
        **free,
        "weight": almost_orthogonal(free["weight"]),
        "square": almost_orthogonal(free["square"]),
        "readout": free["readout"] / xp.sqrt((free["readout"] ** 2).sum() + 1e-12),
    }


def _network(xp: Any, parameters: Mapping[str, Any], inputs: Any) -> Any:
    """``(*batch, inputs) -> (*batch,)``; see the module."""
    at = xp.matmul(inputs, parameters["weight"]) + parameters["bias"]
    for k in range(parameters["square"].shape[0]):
        at = xp.matmul(_sort2(xp, at), parameters["square"][k, ...]) + parameters["shift"][k, ...]
    return xp.matmul(_sort2(xp, at), parameters["readout"]) + parameters["offset"]


def _sort2(xp: Any, at: Any) -> Any:
    """Pairs sorted: unit i with unit i + half; the larger ones first."""
    half = at.shape[-1] // 2
    first, second = at[..., :half], at[..., half:]
    return xp.concat([xp.maximum(first, second), xp.minimum(first, second)], axis=-1)


@cache
def _program(steps: int, learning_rate: float) -> Any:
    """The compiled descent: ``(free, rows (batches, b, k), signs, weights, margin) -> free``; float32."""
    import jax
    import jax.numpy as jnp
    import optax

    method = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

    def loss(free: Any, rows: Any, signs: Any, weights: Any, margin: Any) -> Any:
        scores = _network(jnp, _constrained(jnp, free), rows)
        return (weights * jax.nn.relu(margin - signs * scores)).mean()

    def descend(free: Any, rows: Any, signs: Any, weights: Any, margin: Any) -> Any:
        def step(carry: Any, count: Any) -> Any:
            at, state = carry
            batch = count % rows.shape[0]
            slopes = jax.grad(loss)(at, rows[batch], signs[batch], weights[batch], margin)
            moves, state = method.update(slopes, state, at)
            return (optax.apply_updates(at, moves), state), None

        (at, _), _ = jax.lax.scan(step, (free, method.init(free)), jnp.arange(steps, dtype=jnp.int32))
        return at

    return jax.jit(descend)
