r"""Erase: the model forgets the latent linearly, with the least change that can do so (LEACE).

Threat model: the model knows its own latent z and nothing of the probe. Among all affine maps after which no linear
function of the activations correlates with z, it takes the one that changes them least,

``x' = x - W^+ P W (x - mean)``,  ``W = Cov(x)^{-1/2}``,  P the projector on ``W Cov(x, z)``,

fitted on training items. For linear probes that ends the question: fitted on the edited training items, every one of
them is at chance there. What non-linear probes still see, the audit says.

Shapes: ``x (n, dim)``, z the label; the edit is the same affine map for every item. Guarantee: on the training items
exact (linear guardedness); on others up to what a class mean over n items is uncertain.

Reference: Belrose et al. 2023 (2306.03819); the map is the authors' own library, ``concept-erasure``.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from elk_stress.testbeds.protocol import SplitName
from elk_stress.thoughts.attacks.proposal import Edit
from elk_stress.thoughts.attacks.protocol import Access, Need, Oracle, Proposal, Scope

__all__ = ["Erase"]


@dataclass(frozen=True)
class Erase:
    """LEACE: removes all that a linear probe could read of the latent, with the least change; asks the probe nothing.

    Attributes:
        shrinkage: of the activations' covariance toward a multiple of the identity; needed with fewer items than
            dimensions.
    """

    shrinkage: bool = True

    name: ClassVar[str] = "erase"
    access: ClassVar[Access] = "none"
    scopes: ClassVar[tuple[Scope, ...]] = ("item",)
    needs: ClassVar[tuple[Need, ...]] = ("model_access",)
    priors: ClassVar[tuple[str, ...]] = ()

    def propose(self, oracle: Oracle, *, seed: int) -> Proposal:
        """Fit the eraser on training items and apply it to everything; nothing is random."""
        import torch

        with warnings.catch_warnings():
            # torch says of its own torch.jit, which the library uses, that it is old
            warnings.simplefilter("ignore", DeprecationWarning)
            from concept_erasure import LeaceEraser

        model_access = oracle.model_access
        rows = model_access.training
        eraser = LeaceEraser.fit(
            torch.as_tensor(model_access.activations("train")[rows], dtype=torch.float64),
            torch.as_tensor(model_access.truth("train")[rows], dtype=torch.float64),
            shrinkage=self.shrinkage,
        )

        def moved(split: SplitName) -> np.ndarray:
            return np.asarray(eraser(torch.as_tensor(model_access.activations(split), dtype=torch.float64)).numpy())

        return model_access.propose(Edit(moved))


if __name__ == "__main__":
    from elk_stress.cli.script import run_attack

    sys.exit(run_attack(Erase.name))
