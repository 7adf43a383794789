r"""Logistic regression in a private random subspace: a defence by secrecy, and what secrecy cannot do.

Equations: with ``z = (x - mean) / sd`` over the training rows and Q ``(d, r)`` a random orthonormal frame drawn from a
secret, ``score(x) = w . (Q^T z) + b``, w and b from :mod:`elk_stress.probes.logistic` on the rows ``Q^T z``. Its weight
is confined to r random directions, so it is not the direction that an attacker without the secret would fit.

Threat model. By Kerckhoffs's principle a defence must hold when all but the key is known, and here the key is soon
known: whoever has the gradient has ``Q w`` in one query, whoever has scores has it in d + 1. Bits are a property of the
probe and the threat, not of what an attacker knows (a best-of-n that only sees the outcome needs no key), so secrecy
cannot raise them: a random subspace gives up signal and tends to *lower* them. If it helps at all it is against attacks
that are made on another probe and transferred; measure it there (``transfer``) and nowhere else. Key-based random
projections as a defence against such gray-box attackers: Taran, Rezaeifar, Holotyak and Voloshynovskiy 2020 (EURASIP
J. Inf. Security 10); why obscured gradients are no robustness: Athalye, Carlini and Wagner 2018 (1802.00420).

The rank is the least of a few shares of d whose held-out AUROC (folds by item) is within ``tolerance`` of the best.
A saved probe holds the secret and the weight: keep its folder private, or the point is lost.

Shapes: activations ``(*batch, d)`` -> log-odds ``(*batch,)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from elk_stress.probes.logistic import Logistic
from elk_stress.probing.fit.held_out import fewest_columns
from elk_stress.probing.fit.scaling import standardization
from elk_stress.probing.probe import FittedProbe, Traits

__all__ = ["SecretSubspace"]


@dataclass(frozen=True)
class SecretSubspace:
    """Logistic regression in a random subspace that only the monitor knows.

    Attributes:
        secret: the key: with the seed of ``fit`` it determines the subspace.
        rank: dimensions of the subspace; ``None``: chosen on training rows among ``shares`` of d.
        shares: shares of d to choose from.
        tolerance: held-out AUROC that a smaller subspace may cost.
        folds: of the choice.
        l2: penalty of the logistic regression.
    """

    secret: int = 0
    rank: int | None = None
    shares: tuple[float, ...] = (0.125, 0.25, 0.5)
    tolerance: float = 0.01
    folds: int = 3
    l2: float = 0.01

    name: ClassVar[str] = "secret_subspace"
    traits: ClassVar[Traits] = Traits(linear=True)

    def __post_init__(self) -> None:
        # JSON gives a list back
        object.__setattr__(self, "shares", tuple(float(share) for share in self.shares))
        if self.secret < 0 or (self.rank is not None and self.rank < 1):
            raise ValueError(f"secret_subspace needs a secret of at least 0 and a rank of at least 1, got {self}")
        if not self.shares or not all(0 < share <= 1 for share in self.shares):
            raise ValueError(f"secret_subspace: shares of the width lie in (0, 1], got {self.shares}")

    def fit(
        self, activations: np.ndarray, labels: np.ndarray, *, pairs: np.ndarray | None = None, seed: int = 0
    ) -> FittedProbe:
        """Fit on ``activations (n, d)``, ``labels (n,)``; ``seed`` and ``secret`` draw the subspace.

        Notes: the ``rank`` and, where it was chosen, the ``held_out_auroc`` of every rank tried.

        Raises:
            ValueError: a rank above d.
        """
        rows, targets = np.asarray(activations, dtype=float), np.asarray(labels).astype(int)
        dim = rows.shape[1]
        if self.rank is not None and self.rank > dim:
            raise ValueError(f"secret_subspace: rank {self.rank} exceeds the {dim} features; choose a smaller one")
        mean, spread = standardization(rows)
        rng = np.random.default_rng(np.random.SeedSequence([*b"secret", self.secret, seed]))
        frame, _ = np.linalg.qr(rng.standard_normal((dim, dim)))
        seen = (rows - mean) / spread @ frame
        notes: dict[str, Any] = {}
        if self.rank is None:
            # the first columns of one frame: a smaller subspace lies within a larger one
            tried = sorted({max(1, round(share * dim)) for share in self.shares})
            rank, notes["held_out_auroc"] = fewest_columns(
                self._base.fit, seen, targets, tried, tolerance=self.tolerance, folds=self.folds
            )
        else:
            rank = self.rank
        inner = self._base.fit(seen[:, :rank], targets)
        weight = frame[:, :rank] @ inner.parameters["weight"] / spread
        parameters = {"weight": weight, "bias": np.asarray(inner.parameters["bias"] - weight @ mean)}
        return FittedProbe(self, parameters, notes={**notes, "rank": rank, **inner.notes})

    def score(self, xp: Any, parameters: Mapping[str, Any], activations: Any) -> Any:
        """``activations @ weight + bias``."""
        return xp.matmul(activations, parameters["weight"]) + parameters["bias"]

    @property
    def _base(self) -> Logistic:
        return Logistic(l2=self.l2)
