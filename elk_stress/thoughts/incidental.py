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

**Interval.** Two things are not known. Items differ: Student's error of the mean over entities. And L stands on a few
contexts, and on how far a covariance is shrunk toward the identity. All that the fraction needs of the covariance is
``M = [g; F] Sigma [g; F]'`` of each item, g the gradient. Each replicate draws its between-context part anew,
``Z' W^-1 Z``, with Z ``(C, 1 + rank)`` the context means of ``[g; F] x``, centred, and W a Wishart matrix, the same for
all items, on ``2 (C - 1 - rank)`` degrees of freedom (at least C, or it has no inverse): what is left of g's variance
once ``rank`` directions are taken out stands on ``C - 1 - rank``, and so does the draw. The interaction part stands on
so many more that it is taken as it is. All this without shrinkage, with the estimated one and with twice that: the
interval holds the 95% of each, since no resample can vouch for a choice that makes the prior rounder than it is, and
the fraction smaller.

Measured against the true prior (linear testbed, 80 pairs of a probe and a testbed each): the interval covers in 96% at
8 contexts and at 16, and misses only truths above it; over items alone it covers none. The value itself lies 0.15 to
0.2 from the truth there, too low: shrinkage. A prior that was given, or one of fewer than 3 contexts, leaves the items
alone. Where ``rank`` reaches ``C - 1`` the contexts say nothing of what lies outside of F, and the interval stands on
the shrinkage and the interaction: what it covers there was not measured.

On a real model F is sampled with finite rank (:meth:`elk_stress.testbeds.protocol.Testbed.shift_factor`): what it has
not seen counts as ignored, so the fraction is an upper limit there, and ``rank`` says how far to trust it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from elk_stress.core.settings import setting
from elk_stress.probing.probe import FittedProbe, Probe
from elk_stress.thoughts.baseline import score_gradients
from elk_stress.thoughts.prepared import Prepared, fit_probe, prepare
from elk_stress.thoughts.result import IncidentalFraction
from elk_stress.threats.priors import EllipticalPrior
from elk_stress.threats.tails import Gaussian
from elk_stress.threats.threat import Threat

__all__ = ["incidental_fraction", "silent_bits", "unseen"]

_RELATIVE_ZERO = 1e-6
# each costs a real model as many backward passes as its form has rows
_MOST_ITEMS = 24
# of the priors that the contexts allow, for each of these multiples of the estimated shrinkage
_REPLICATES, _SHRINKS = 200, (0.0, 1.0, 2.0)


def incidental_fraction(
    probe: FittedProbe | Probe | str | np.ndarray,
    testbed: Any,
    *,
    tolerance: float = 0.0,
    seed: int = 0,
) -> IncidentalFraction:
    """The share of a probe's gradient, in the metric of natural thoughts, to which behaviour is indifferent.

    Measured on 24 test positives, drawn at random by the prepared testbed's seed, or on all if there are no more. The
    interval is over their entities and over what the prior could have been, given the contexts: see the module. Over
    entities alone where the prior was given or fitted to fewer than 3 contexts. One entity alone says nothing of
    others: ``[0, 1]``.

    Args:
        probe: as in :func:`elk_stress.stress`; anything with a gradient, linear or not.
        testbed: a testbed with an output, or a prepared :class:`~elk_stress.thoughts.prepared.Prepared`.
        tolerance: directions along which one natural standard deviation shifts behaviour by at most so many nats count
            as ignored; 0 takes the null space itself.
        seed: of the prepared testbed, if one is prepared.

    Raises:
        TypeError: no testbed or no probe.
        ValueError: a tolerance or seed that is none; the probe has no gradient; the testbed has no output;
            use a testbed with one (``linear``, ``statements``).
    """
    tolerance, seed = setting("tolerance", tolerance), setting("seed", seed)
    prepared = testbed if isinstance(testbed, Prepared) else prepare(testbed, seed=seed)
    if prepared.behaviour is None:
        raise ValueError(
            f"{prepared.testbed.name} has no output that behaviour could be read from; use a testbed that has one"
        )
    fitted = fit_probe(prepared, probe)
    if not fitted.traits.differentiable:
        raise ValueError(
            f"probe {fitted.name!r} has no gradient, of which a share could be incidental; compare its bits with "
            "behaviour free and kept instead, or wrap a torch module or a jax function"
        )
    chosen = _sample(prepared.positives, prepared.seed)
    prior = prepared.prior(Threat())
    gradients = np.atleast_2d(score_gradients(fitted, prepared.test_origins[chosen]))
    gradients = np.broadcast_to(gradients, (len(chosen), gradients.shape[-1])).astype(float)
    slopes = gradients @ prior.factor
    factors = prepared.behaviour.factors(chosen).astype(float)
    ignored, rank = unseen(prior, factors, slopes, tolerance)
    size = np.linalg.norm(slopes, axis=1)
    share = np.divide(np.linalg.norm(ignored, axis=1), size, out=np.full(len(size), math.nan), where=size > 0)
    known = np.isfinite(share)
    groups = prepared.items.groups[chosen][known]
    mean, low, high = _mean_interval(share[known], groups)
    if known.any() and len(np.unique(groups)) > 1 and prepared.given_prior is None and prepared.train.shape[1] > 2:
        drawn = _shares_under_drawn_priors(prepared, prior, gradients[known], factors[known], rank, tolerance)
        low, high = _with_entities(drawn, mean, *_standard_error(share[known], groups), prepared.seed)
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


def _shares_under_drawn_priors(
    prepared: Prepared, prior: EllipticalPrior, gradients: np.ndarray, factors: np.ndarray, rank: int, tolerance: float
) -> np.ndarray:
    """``(3, replicates)``: mean share over items under priors that the contexts allow, for each amount of shrinkage."""
    residuals = np.asarray(prepared.train[prepared.plain_train], dtype=float)
    residuals = residuals - residuals.mean(axis=1, keepdims=True)
    n, c, d = residuals.shape
    means = residuals.mean(axis=0)
    residuals -= means
    own = residuals.reshape(-1, d).T @ residuals.reshape(-1, d) / (max(n - 1, 1) * (c - 1))
    rng = np.random.default_rng(np.random.SeedSequence([prepared.seed, 0x1FC]))
    # with fewer, W has no inverse; with nothing left over, the degrees of freedom of one direction alone
    freedom = max(2 * (c - 1 - rank), c) if rank < c - 1 else 2 * (c - 1)
    draws = rng.standard_normal((_REPLICATES, c, freedom))
    inverse = np.linalg.inv(draws @ draws.transpose(0, 2, 1))
    between, interaction = prior.notes["between"], prior.notes.get("interaction")
    found = np.zeros((len(_SHRINKS), _REPLICATES))
    for gradient, form in zip(gradients, factors, strict=True):
        rows = np.concatenate([gradient[None] / np.linalg.norm(gradient), form])
        seen = means @ rows.T
        drawn = np.einsum("ci,rcd,dj->rij", seen, inverse, seen, optimize=True)
        identity, private = rows @ rows.T, rows @ own @ rows.T
        for k, shrink in enumerate(_SHRINKS):
            moment = _shrunken(drawn, identity, between, shrink)
            if interaction is not None:
                moment = moment + (1 - 1 / n) * _shrunken(private, identity, interaction, shrink)
            found[k] += _share(moment, tolerance)
    return found / len(gradients)


def _share(moment: np.ndarray, tolerance: float) -> np.ndarray:
    """``||P s|| / ||s||`` from ``[s; A] [s; A]'``, ``(replicates, 1 + rank, 1 + rank)``: squares of :func:`unseen`."""
    values, vectors = np.linalg.eigh(moment[:, 1:, 1:])
    seen = values > _RELATIVE_ZERO**2 * np.maximum(values[:, -1:], 1e-300)
    seen &= 0.5 * values > tolerance
    along = np.einsum("rk,rkj->rj", moment[:, 0, 1:], vectors) ** 2 / np.where(seen, values, 1.0)
    return np.asarray(np.sqrt(np.clip(1 - np.where(seen, along, 0.0).sum(axis=1) / moment[:, 0, 0], 0.0, 1.0)))


def _shrunken(sample: np.ndarray, identity: np.ndarray, notes: Any, shrink: float) -> np.ndarray:
    intensity = min(shrink * notes["oas_intensity"], 1.0)
    return np.asarray((1 - intensity) * sample + intensity * notes["variance"] * identity)


def _with_entities(drawn: np.ndarray, mean: float, error: float, count: int, seed: int) -> tuple[float, float]:
    """95% of replicates ``(choices, replicates)`` with Student's error of the mean over entities added, of each choice;
    all of them together, and the value."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, 0x1FD]))
    ends = np.quantile(drawn + error * rng.standard_t(count - 1, drawn.shape[1]), [0.025, 0.975], axis=1)
    low, high = np.clip([ends[0].min(), ends[1].max()], 0.0, 1.0).tolist()
    return min(low, mean), max(high, mean)


def _standard_error(share: np.ndarray, groups: np.ndarray) -> tuple[float, int]:
    """Of the mean over items, and the number of entities, of which there are at least two.

    With ``e_g`` the sum of entity g's deviations from the mean m, the variance of m is ``G/(G-1) sum e_g^2 / n^2``:
    what a bootstrap over entities tends to, with its small-sample correction.
    """
    entity = np.unique(groups, return_inverse=True)[1].ravel()
    deviations = np.bincount(entity, weights=share - share.mean())
    count = len(deviations)
    return math.sqrt(count / (count - 1) * float(deviations @ deviations)) / len(share), count


def _mean_interval(share: np.ndarray, groups: np.ndarray) -> tuple[float, float, float]:
    """Mean over items and its 95% interval over entities, by Student's t."""
    from scipy.special import stdtrit

    if len(share) == 0:
        return math.nan, math.nan, math.nan
    mean = float(share.mean())
    if len(np.unique(groups)) == 1:
        return mean, 0.0, 1.0
    error, count = _standard_error(share, groups)
    half = float(stdtrit(count - 1, 0.975)) * error
    return mean, max(mean - half, 0.0), min(mean + half, 1.0)
