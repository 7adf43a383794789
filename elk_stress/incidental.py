r"""How much of a probe is incidental: the share of its gradient that lies where behaviour does not look.

With ``s = L^T grad score`` (what a natural thought does to the score, L the prior's factor) and ``A = F L`` (what it
does to the output, ``shift(u) ~ 0.5 ||A u||^2``), P the projector on the null space of A:

``incidental fraction = ||P s|| / ||s||``  in [0, 1].

0 is an oracle: whatever lowers its score changes what the model does. 1 is a probe that the model can fool for free.
It is the ELK statement in one number, because the bits of a linear probe with margin m, given that behaviour is kept,
tend to

``B_given_kept -> -log2 Phi(-m / ||P s||)``  as epsilon -> 0:

infinite for an oracle, and for a probe of incidental fraction f those of an unconstrained probe whose margin is ``1/f``
standard deviations longer. Gaussian tails; the prior's own metric, so the fraction does not change with its scale.

On a real model F is sampled with finite rank (:meth:`elk_stress.testbed.Testbed.shift_factor`): what it has not seen
counts as ignored, so the fraction is an upper limit there, and ``rank`` says how far to trust it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from elk_stress.priors import EllipticalPrior
from elk_stress.probe import FittedProbe, Probe
from elk_stress.result import IncidentalFraction
from elk_stress.scene import Scene, fit_probe, prepare_scene
from elk_stress.situation import score_gradients
from elk_stress.tails import Gaussian
from elk_stress.threat import Threat

__all__ = ["incidental_fraction", "silent_bits", "unseen"]

_RELATIVE_ZERO = 1e-6
# each costs a real model as many backward passes as its form has rows
_MOST_ITEMS = 24


def incidental_fraction(
    probe: FittedProbe | Probe | str | np.ndarray,
    testbed: Any,
    *,
    tolerance: float = 0.0,
    seed: int = 0,
) -> IncidentalFraction:
    """The share of a probe's gradient, in the metric of natural thoughts, to which behaviour is indifferent.

    Measured on 24 test positives, drawn at random by the scene's seed, or on all if there are no more. The interval is
    Student's over their entities, with as many degrees of freedom as there are entities less one: items of one entity
    say nearly the same. One entity alone says nothing of others: ``[0, 1]``.

    Args:
        probe: as in :func:`elk_stress.stress`; anything with a gradient, linear or not.
        testbed: a testbed with an output, or a prepared :class:`~elk_stress.scene.Scene`.
        tolerance: directions along which one natural standard deviation shifts behaviour by at most so many nats count
            as ignored; 0 takes the null space itself.
        seed: of the scene, if one is prepared.

    Raises:
        ValueError: the testbed has no output; use a testbed with one (``linear``, ``statements``).
    """
    if tolerance < 0:
        raise ValueError(f"tolerance is a number of nats of at least 0, got {tolerance}")
    scene = testbed if isinstance(testbed, Scene) else prepare_scene(testbed, seed=seed)
    if scene.behaviour is None:
        raise ValueError(
            f"{scene.testbed.name} has no output that behaviour could be read from; use a testbed that has one"
        )
    fitted = fit_probe(scene, probe)
    chosen = _sample(scene.positives, scene.seed)
    prior = scene.prior(Threat())
    slopes = np.atleast_2d(score_gradients(fitted, scene.test_origins[chosen]))
    slopes = np.broadcast_to(slopes, (len(chosen), slopes.shape[-1])) @ prior.factor
    ignored, rank = unseen(prior, scene.behaviour.factors(chosen), slopes, tolerance)
    size = np.linalg.norm(slopes, axis=1)
    share = np.divide(np.linalg.norm(ignored, axis=1), size, out=np.full(len(size), math.nan), where=size > 0)
    known = np.isfinite(share)
    mean, low, high = _mean_interval(share[known], scene.items.groups[chosen][known])
    return IncidentalFraction(mean, low, high, share, rank, prior.factor.shape[1], tolerance)


def silent_bits(margin: np.ndarray, slopes: np.ndarray, prior: EllipticalPrior, factors: np.ndarray) -> np.ndarray:
    """``(n,)``: ``-log2 Phi(-m / ||P s||)``, what ``B_given_kept`` of a linear probe tends to as epsilon -> 0.

    Args:
        margin: ``(n,)`` score minus threshold at the origins, positive.
        slopes: ``(n, d)`` gradients of the score in activations.
        prior: a Gaussian one.
        factors: ``(n, rank, d)`` behaviour forms F.

    Raises:
        ValueError: the prior's tail is heavy: keeping behaviour then also says how large the move was.
    """
    if not isinstance(prior.tail, Gaussian):
        raise ValueError(f"the limit is known for Gaussian tails only, the prior's is {prior.tail.name}")
    s = np.asarray(slopes, dtype=float) @ prior.factor
    reach = np.linalg.norm(unseen(prior, factors, s, 0.0)[0], axis=1)
    # a direction of rounding error is no direction
    reach = np.where(reach > _RELATIVE_ZERO * np.linalg.norm(s, axis=1), reach, 0.0)
    with np.errstate(divide="ignore"):
        return np.asarray(prior.tail.bits(np.where(reach > 0, margin / np.where(reach > 0, reach, 1.0), math.inf)))


def unseen(prior: EllipticalPrior, factors: np.ndarray, slopes: np.ndarray, tolerance: float) -> tuple[np.ndarray, int]:
    """``P s (n, k)`` of each row of ``slopes (n, k)``, and the largest rank of what behaviour does see."""
    a = np.asarray(factors, dtype=float) @ np.asarray(prior.factor, dtype=float)
    _, singular, basis = np.linalg.svd(a, full_matrices=False)
    seen = singular > _RELATIVE_ZERO * singular.max(axis=1, keepdims=True, initial=1e-300)
    seen &= 0.5 * singular**2 > tolerance
    along = np.where(seen, np.einsum("prk,pk->pr", basis, slopes), 0.0)
    return slopes - np.einsum("pr,prk->pk", along, basis), int(seen.sum(axis=1).max(initial=0))


def _sample(items: np.ndarray, seed: int) -> np.ndarray:
    """At most ``_MOST_ITEMS`` of them. Single items, not whole entities: then as many entities as can be have a say."""
    if len(items) <= _MOST_ITEMS:
        return items
    rng = np.random.default_rng(np.random.SeedSequence([seed, 0x17C1]))
    return np.sort(rng.choice(items, _MOST_ITEMS, replace=False))


def _mean_interval(share: np.ndarray, groups: np.ndarray) -> tuple[float, float, float]:
    """Mean over items and its 95% interval over entities.

    With ``e_g`` the sum of entity g's deviations from the mean m, the variance of m is ``G/(G-1) sum e_g^2 / n^2``:
    what a bootstrap over entities tends to, with its small-sample correction.
    """
    from scipy.special import stdtrit

    n = len(share)
    if n == 0:
        return math.nan, math.nan, math.nan
    mean = float(share.mean())
    entity = np.unique(groups, return_inverse=True)[1].ravel()
    deviations = np.bincount(entity, weights=share - mean)
    count = len(deviations)
    if count == 1:
        return mean, 0.0, 1.0
    half = float(stdtrit(count - 1, 0.975)) * math.sqrt(count / (count - 1) * float(deviations @ deviations)) / n
    return mean, max(mean - half, 0.0), min(mean + half, 1.0)
