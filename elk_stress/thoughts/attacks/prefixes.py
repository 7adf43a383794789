r"""What attacks that write a prefix share: what they learn on, how good a prefix is, and the edit that it makes.

Learned on training positives, judged on held-out test items. A prefix p is as bad for the attacker as

.. math:: loss(p) = \frac1n \sum_i \log(1 + e^{s_i(p) - \theta}) + \frac wn \sum_i \max(0, shift_i(p) - \epsilon)

with ``s_i`` the score of training positive i behind p and ``theta`` the monitor's threshold; the second term is there
where behaviour is constrained only (nats per token; item by item, for so it is judged).

Epsilon. A prefix replaces the whole context, so what counts as kept is what an ordinary change of context does:
``factor`` x the median shift when neutral contexts of set A replace the host, over the attacked items.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.special import expit

from elk_stress.models.contexts import contexts
from elk_stress.testbeds.protocol import SplitName
from elk_stress.thoughts.attacks.model_access import ModelAccess
from elk_stress.thoughts.attacks.proposal import Edit
from elk_stress.threats.threat import DEFAULT_EPSILON_FACTOR

__all__ = ["evasion_loss", "evasion_slope", "natural_epsilon", "prefix_edit", "sentences"]

# ordinary changes of context, and attacked items, over which the median shift is taken: a forward pass each
_CONTEXTS = 8
_ITEMS = 12


def sentences(model_access: ModelAccess, most: int, rng: np.random.Generator) -> np.ndarray:
    """At most ``most`` training positives, drawn without replacement: what a prefix is learned on.

    Raises:
        ValueError: there are none.
    """
    rows = model_access.training
    positives = rows[model_access.truth("train")[rows] == 1]
    if not len(positives) or most < 1:
        raise ValueError(f"a prefix is learned on training positives: {len(positives)} there, {most} asked for")
    return np.asarray(np.sort(rng.choice(positives, min(most, len(positives)), replace=False)))


def evasion_loss(scores: np.ndarray, threshold: float) -> np.ndarray:
    """``mean softplus(score - threshold)`` over the last axis."""
    return np.asarray(np.logaddexp(0.0, np.asarray(scores, dtype=float) - threshold).mean(axis=-1))


def evasion_slope(model_access: ModelAccess, activations: Any) -> Any:
    """Gradient of the evasion loss in a tensor of ``activations (n, dim)``, like it; asks the probe n gradients."""
    import torch

    scores, slopes = model_access.gradient(activations.detach().cpu().numpy())
    weight = expit(scores - model_access.threshold) / len(scores)
    return torch.as_tensor(slopes * weight[:, None]).to(activations)


def natural_epsilon(model_access: ModelAccess) -> float | None:
    """Nats per token that an ordinary change of context costs at most; ``None`` where behaviour is free.

    An epsilon that the threat states (``Threat(kept=True, epsilon=...)``) holds for prefixes too.
    """
    if model_access.epsilon is None or model_access.threat.epsilon is not None:
        return model_access.epsilon
    model = model_access.model("test")
    ordinary = [context for context in contexts("prior", _CONTEXTS + 1) if context != model.host][:_CONTEXTS]
    return DEFAULT_EPSILON_FACTOR * float(np.median(model.shift_texts(ordinary, model_access.items[:_ITEMS])))


def prefix_edit(
    model_access: ModelAccess,
    read: Callable[[Any, np.ndarray], np.ndarray],
    shift: Callable[[Any, np.ndarray], np.ndarray],
    epsilon: float | None,
) -> Edit:
    """The edit that one prefix makes of all items.

    Args:
        model_access: whose language model it is.
        read: ``(model of a split, items) -> (n, dim)`` activations behind the prefix.
        shift: ``(model of a split, items) -> (n,)`` nats per token.
        epsilon: what counts as kept.
    """

    def moved(split: SplitName) -> np.ndarray:
        return read(model_access.model(split), np.arange(len(model_access.truth(split))))

    return Edit(moved, shift=lambda items: shift(model_access.model("test"), items), epsilon=epsilon)
