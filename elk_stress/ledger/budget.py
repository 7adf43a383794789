r"""What may be spent against a probe, and how much of what it catches is then lost: pure functions of its bits.

With ``B_i`` the bits of caught item i, ``t`` the tolerated loss of catches and ``mean_i`` over items:

==============  ================================  ==================================  =====================
account         spent                             lost, at most                       what remains
==============  ================================  ==================================  =====================
``selection``   k bits, log2(N/kept) a time       ``mean_i min(1, 2^(k-B_i))``        largest k: lost <= t
``kl``          k bits, E_q log2 dq/dprior        ``mean_i min(1, (k+1)/B_i)``        largest k: lost <= t
``mean_shift``  r, standard deviations in u       ``mean_i Phi(r - beta_i)``          largest r: lost <= t
``queries``     answers that were given           anything, by moves designed on them no guarantee
==============  ================================  ==================================  =====================

**What r is.** ``u ~ N(0, I)`` are the coordinates in which the prior is standard normal, and r is how far the mean of
*u* was moved, in its standard deviations. Under Gaussian tails that is also a fixed shift ``delta`` of the activations,
``r = ||L^+ delta||``. Under a heavy tail it is not: u there has a coordinate for the scale, a shift of u moves the
activations by more where the scale is larger, and a fixed shift by r of *their* standard deviations can lose more than
is promised (Student-t with 3 degrees of freedom, margin 0.6, shift 1: lost with chance 73%, where 54% is promised, and
66% with the fewer of both tails' bits). Where the tail was found to be heavy, a steering vector has no budget here.

``beta = -Phi^-1(2^-B)``. Bits are ``(*batch, n_items)`` from 0 on, ``inf`` for items that no move breaks. Guarantees:
:mod:`elk_stress.core.bits`, which has them for one item.
"""

from __future__ import annotations

import enum
import math
from typing import Any

import numpy as np

__all__ = [
    "Account",
    "beta_of",
    "checked",
    "deflated",
    "lost_to_kl",
    "lost_to_mean_shift",
    "lost_to_selection",
    "remaining_kl",
    "remaining_mean_shift",
    "remaining_selection",
]


class Account(enum.StrEnum):
    """What was spent; each kind has its own unit, guarantee and budget."""

    SELECTION = "selection"
    KL = "kl"
    MEAN_SHIFT = "mean_shift"
    QUERIES = "queries"

    @property
    def unit(self) -> str:
        """Of amounts."""
        return {"mean_shift": "standard deviations of u", "queries": "queries"}.get(self.value, "bits")

    @property
    def guarantee(self) -> str:
        """What the charges promise about the chance a that an item is lost."""
        return {
            "selection": "a <= 2^-(B-k)",
            "kl": "a <= (k+1)/B",
            "mean_shift": "a <= Phi(r - beta), r in u",
            "queries": "none: a record, and a designed move can be worth any number of bits",
        }[self.value]

    def remaining(self, bits_low: np.ndarray, tolerated: float) -> float | None:
        """What may be spent in all; ``None`` for queries."""
        found = {"selection": remaining_selection, "kl": remaining_kl, "mean_shift": remaining_mean_shift}
        return float(found[self.value](bits_low, tolerated)) if self.value in found else None

    def lost(self, bits_low: np.ndarray, spent: float) -> float | None:
        """Bound on the expected share of catches lost; ``None`` for queries."""
        found = {"selection": lost_to_selection, "kl": lost_to_kl, "mean_shift": lost_to_mean_shift}
        return float(found[self.value](bits_low, spent)) if self.value in found else None


def lost_to_selection(bits_low: np.ndarray, spent: Any) -> Any:
    """``mean_i min(1, 2^(k-B_i))``: items on the last axis of ``(*batch, n_items)``, ``spent`` ``(*batch,)`` bits."""
    bits = np.asarray(bits_low, dtype=float)
    return np.exp2(np.minimum(np.asarray(spent, dtype=float)[..., None] - bits, 0.0)).mean(axis=-1)


def lost_to_kl(bits_low: np.ndarray, spent: Any) -> Any:
    """``mean_i min(1, (k+1)/B_i)``; shapes as in :func:`lost_to_selection`."""
    bits = np.asarray(bits_low, dtype=float)
    ahead = np.asarray(spent, dtype=float)[..., None] + 1.0
    # where ahead >= bits the share is 1, without dividing by bits, which may be 0
    return np.where(ahead >= bits, 1.0, ahead / np.where(ahead >= bits, 1.0, bits)).mean(axis=-1)


def lost_to_mean_shift(bits_low: np.ndarray, spent: Any) -> Any:
    """``mean_i Phi(r - beta_i)``; shapes as in :func:`lost_to_selection`, ``spent`` r in standard
    deviations of u."""
    from scipy.special import ndtr

    return ndtr(np.asarray(spent, dtype=float)[..., None] - beta_of(np.asarray(bits_low, dtype=float))).mean(axis=-1)


def remaining_selection(bits_low: np.ndarray, tolerated: Any) -> Any:
    r"""Largest k in bits with ``mean_i min(1, 2^(k-B_i)) <= tolerated``.

    For j saturated items (those of the j smallest B_i) the mean is ``j/n + 2^k S_j/n``, ``S_j = sum_{i>j} 2^-B_i``; the
    true mean is the smallest of these over j. Hence ``k = max_j log2((tolerated - j/n) / (S_j/n))``: exact, no search.
    All ``B_i = B``: ``k = B + log2 tolerated``.

    Args:
        bits_low: ``(*batch, n_items)`` bits from 0 on; ``inf`` for items that no move breaks.
        tolerated: share in (0, 1), ``(*batch,)``.

    Returns:
        ``(*batch,)``; ``inf`` where losing every breakable item would be tolerated, negative where more is lost though
        nobody optimizes.

    Raises:
        ValueError: no items, NaN or negative bits, or a tolerance outside (0, 1).
    """
    bits, share = checked(bits_low, tolerated)
    slack = share[..., None] - np.arange(bits.shape[-1] + 1) / bits.shape[-1]
    tail = np.logaddexp2.accumulate(-np.sort(bits, axis=-1)[..., ::-1], axis=-1)[..., ::-1]
    tail = np.concatenate([tail, np.full((*tail.shape[:-1], 1), -np.inf)], axis=-1) - math.log2(bits.shape[-1])
    tail, slack = np.broadcast_arrays(tail, slack)
    room = np.log2(slack, out=np.full(slack.shape, -np.inf), where=slack > 0)
    # nothing left to lose: no k is too large
    room = np.where((slack >= 0) & np.isneginf(tail), np.inf, room - np.where(np.isneginf(tail), 0.0, tail))
    return room.max(axis=-1)[()]


def remaining_kl(bits_low: np.ndarray, tolerated: Any) -> Any:
    """Largest k in bits with ``mean_i min(1, (k+1)/B_i) <= tolerated``; otherwise as :func:`remaining_selection`.

    ``-inf`` where items of 0 bits alone are more than is tolerated. Any other negative number means that the guarantee
    promises nothing at this tolerance (it needs B above ``1/tolerated``), not that anything is lost.
    """
    bits, share = checked(bits_low, tolerated)
    n = bits.shape[-1]
    slack = share[..., None] - np.arange(n + 1) / n
    ordered = np.sort(bits, axis=-1)[..., ::-1]
    # bits so few that their inverses would overflow count as 0: lost already
    inverse = np.divide(1.0, ordered, out=np.full(ordered.shape, np.inf), where=ordered > 1e-300)
    tail = np.cumsum(inverse, axis=-1)[..., ::-1] / n
    tail = np.concatenate([tail, np.zeros((*tail.shape[:-1], 1))], axis=-1)
    tail, slack = np.broadcast_arrays(tail, slack)
    possible = (slack >= 0) & np.isfinite(tail)
    ahead = np.divide(slack, tail, out=np.full(slack.shape, -np.inf), where=possible & (tail > 0))
    return (np.where(possible & (tail == 0), np.inf, ahead).max(axis=-1) - 1.0)[()]


def remaining_mean_shift(bits_low: np.ndarray, tolerated: Any) -> Any:
    """Largest r with ``mean_i Phi(r - beta_i) <= tolerated``; as :func:`remaining_selection`, by bisection.

    All ``B_i = B``: ``r = beta + Phi^-1(tolerated)``. ``-inf`` where items of 0 bits alone are more than is tolerated.
    """
    from scipy.special import ndtr, ndtri

    bits, share = checked(bits_low, tolerated)
    beta = beta_of(bits)
    shape = np.broadcast_shapes(beta.shape[:-1], share.shape)
    beta = np.broadcast_to(beta, (*shape, bits.shape[-1]))
    # the breakable items must pay for themselves with what the already lost ones leave of the tolerance
    finite, lost = np.isfinite(beta), np.isneginf(beta).mean(axis=-1)
    movable = finite.mean(axis=-1)
    target = np.divide(share - lost, movable, out=np.full(shape, np.nan), where=movable > 0)
    inside = (target > 0) & (target < 1)
    edge = ndtri(np.where(inside, target, 0.5))
    low = np.where(inside, np.where(finite, beta, np.inf).min(axis=-1) + edge, 0.0)
    high = np.where(inside, np.where(finite, beta, -np.inf).max(axis=-1) + edge, 0.0)
    # to the last bit of a double
    for _ in range(70):
        middle = 0.5 * (low + high)
        fits = ndtr(middle[..., None] - beta).mean(axis=-1) <= share
        low, high = np.where(fits, middle, low), np.where(fits, high, middle)
    return np.where(inside, low, np.where(share >= lost + movable, np.inf, -np.inf))[()]


def checked(bits_low: Any, tolerated: Any) -> tuple[np.ndarray, np.ndarray]:
    """Bits and tolerance as arrays of floats; refuses what no budget can be worked out from."""
    bits, share = np.asarray(bits_low, dtype=float), np.asarray(tolerated, dtype=float)
    if bits.ndim < 1 or bits.shape[-1] == 0:
        raise ValueError("no items: a probe that catches nothing has no catches to guard")
    bad = int((~(bits >= 0)).sum())
    if bad:
        raise ValueError(
            f"bits are numbers from 0 on (inf: no move breaks it), and {bad} of {bits.size} are not; leave out the "
            "items that the probe does not catch"
        )
    if not ((share > 0) & (share < 1)).all():
        raise ValueError(f"the tolerated loss is a share of the catches between 0 and 1, got {tolerated}")
    return bits, share


def deflated(bits: np.ndarray, factor: float, cap: float = math.inf) -> np.ndarray:
    """Bits whose reliability index is ``factor`` times as long, and at most ``cap``; ``inf`` bits stay.

    Never more bits than before: an item of less than 1 bit, whose index is negative, keeps them.

    Args:
        bits: any shape, from 0 on.
        factor: from 0 to 1; 0 leaves 1 bit, an even chance.
        cap: bits that no item which can be broken counts beyond.

    Raises:
        ValueError: a factor outside 0 to 1.
    """
    from elk_stress.core.bits import bits_of_beta

    if not 0 <= factor <= 1:
        raise ValueError(f"bits are deflated by a factor of 0 to 1, got {factor}")
    b = np.asarray(bits, dtype=float)
    finite = np.isfinite(b)
    index = beta_of(np.where(finite, b, 1.0))
    short = b if factor == 1 else bits_of_beta(factor * np.maximum(index, 0.0))
    return np.where(finite, np.minimum(np.minimum(b, short), cap), b)


def beta_of(bits: np.ndarray) -> np.ndarray:
    """``-Phi^-1(2^-B)`` of each: the reliability index; ``-inf`` for 0 bits, ``inf`` for infinitely many."""
    from scipy.special import ndtri_exp

    # 0 bits: lost already (-inf); inf bits: never (inf)
    return np.asarray(-ndtri_exp(-bits * math.log(2.0)))
