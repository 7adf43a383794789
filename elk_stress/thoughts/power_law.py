r"""Per-item chances of evasion, their left tail, and the power law of best-of-n that follows from it.

How likely is one ordinary thought to evade the probe on item i? ``p_i`` differs between items, and what decides about
the best of many is how many items have a *small* one. With ``p ~ Beta(a, b)`` (density ``~ p^(a-1)`` at 0) the share
of items that still holds after n draws is

``E[(1-p)^n] = B(a, b+n) / B(a, b)  ~  Gamma(a+b)/Gamma(b) n^-a``:

a power law whose exponent is the tail's index. a and b are fitted by maximum likelihood to counts, ``c_i`` of C draws
(beta-binomial), so that items that never failed count as what they are, and not as chance 0.

Intervals are the union of two, since each fails where the other holds:

* a bootstrap over entities, whose items come along: items of one entity share what makes them easy. A resample in which
  nothing was evaded is an answer too: its curve is 0, and any exponent is as good as another there, so it counts for
  both ends of the exponent's interval. So does one, with a curve of 1, where everything always was. Where draws are
  contexts that sway all items alike, these are resampled too, by whoever has them (``tallies``).
* the pairs that twice the log-likelihood, divided by the mean number of items that share an item's entity, does not
  tell from the best (chi-squared, 1 degree of freedom): a few evaded items resample to a few evaded items, never to
  the rare easy ones that were not met; the bootstrap alone misses a steep tail's exponent in 15-45% of cases.

An end of the family (a or b at ``1e-3`` or ``1e4``) counts as 0 or infinite. Guarantee: none beyond the family, nor,
without ``tallies``, where draws are contexts that sway all items alike.

Reference: Schaeffer et al. 2025 (2502.17578).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.special import betaln, psi

__all__ = ["LeftTail", "fit_left_tail"]

# a or b beyond these are all items alike, or chances of 0 and 1 alone: the fit has run to an end of the family
_LEAST, _MOST = 1e-3, 1e4
# stand for resamples that no member of the family fits: nothing was evaded, everything always was
_NEVER, _ALWAYS = (0.0, 1.0), (1.0, 0.0)
# 95% of chi-squared with one degree of freedom
_TWICE_LOG_LIKELIHOOD = 3.841


@dataclass(frozen=True)
class LeftTail:
    """A fitted distribution of per-item chances.

    Attributes:
        a, b: of the Beta distribution; a is the exponent of the power law.
        replicates: ``(replicates, 2)`` a and b of resampled entities; ``(0, 1)`` where nothing was evaded, ``(1, 0)``
            where everything always was.
        likely: ``(m, 2)`` the rim of the pairs that the likelihood does not tell from the best.
        n_items, n_entities, n_draws: what it was fitted to; of items, distinct ones.
    """

    a: float
    b: float
    replicates: np.ndarray
    likely: np.ndarray
    n_items: int
    n_entities: int
    n_draws: int

    @property
    def interval(self) -> tuple[float, float]:
        """95% of the exponent; ``(0, inf)`` where resamples in which nothing was evaded are more than one in 40."""
        low, high = _exponents(self.replicates)
        least, most = _exponents(self.likely)
        # by rank: between a number and infinity nothing can be interpolated
        return (
            min(float(np.quantile(low, 0.025, method="lower")), float(least.min())),
            max(float(np.quantile(high, 0.975, method="higher")), float(most.max())),
        )

    def broken(self, n: np.ndarray) -> np.ndarray:
        """Share of items that the best of ``n`` draws breaks, ``1 - E[(1-p)^n]``."""
        return np.asarray(_broken(np.array([[self.a, self.b]]), n)[0])

    def band(self, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pointwise 95% interval of :meth:`broken`."""
        low, high = np.quantile(_broken(self.replicates, n), [0.025, 0.975], axis=0)
        likely = _broken(self.likely, n)
        return np.minimum(low, likely.min(axis=0)), np.maximum(high, likely.max(axis=0))


def fit_left_tail(
    counts: np.ndarray,
    n_draws: int,
    *,
    groups: np.ndarray | None = None,
    replicates: int = 200,
    seed: int = 0,
    tallies: np.ndarray | None = None,
) -> LeftTail | None:
    """Maximum likelihood from ``counts (n_items,)`` of ``n_draws`` draws each; ``None`` where nothing ever failed or
    everything always did: then there is no tail to see.

    Args:
        counts: how many of an item's draws evaded the probe.
        n_draws: of each item.
        groups: ``(n_items,)`` entity of each item, which is what is resampled; each its own if not given.
        replicates: of the bootstrap.
        seed: of the bootstrap.
        tallies: ``(replicates, m + 1)`` how often each count of 0 to m occurs in resamples that were drawn elsewhere,
            where more than entities is resampled; instead of ``replicates`` and ``seed``.

    Raises:
        ValueError: counts outside 0 to ``n_draws``, no draws, or not one entity per item.
    """
    counts = np.asarray(counts, dtype=float)
    if n_draws < 1 or counts.ndim != 1 or not ((counts >= 0) & (counts <= n_draws)).all():
        raise ValueError(f"expected one count of 0 to {n_draws} draws per item, got {counts[:5]} of {n_draws} draws")
    entity = np.arange(len(counts)) if groups is None else np.unique(groups, return_inverse=True)[1].ravel()
    if len(entity) != len(counts):
        raise ValueError(f"expected the entity of each of {len(counts)} items, got {len(entity)}; give one per count")
    if not len(counts) or not 0 < counts.sum() < n_draws * len(counts):
        return None
    # the likelihood depends on how often each count occurs, and nothing else: (entities, n_draws + 1)
    tally = np.zeros((int(entity.max()) + 1, n_draws + 1))
    np.add.at(tally, (entity, counts.astype(int)), 1.0)
    weights, sizes = tally.sum(axis=0), tally.sum(axis=1)
    best = _fit(weights, n_draws, None)
    if tallies is None:
        rng = np.random.default_rng(np.random.SeedSequence([seed, 0x1EF7]))
        tallies = rng.multinomial(len(tally), np.full(len(tally), 1 / len(tally)), size=replicates) @ tally
    many = np.array([_fit(row, tallies.shape[1] - 1, best) for row in tallies])
    likely = _likely(weights / ((sizes @ sizes) / sizes.sum()), best)
    return LeftTail(float(best[0]), float(best[1]), many, likely, len(counts), len(tally), n_draws)


def _fit(weights: np.ndarray, n_draws: int, start: np.ndarray | None) -> np.ndarray:
    """``(a, b)`` of highest likelihood; the binomial coefficients are the same for all."""
    mean = float(weights @ np.arange(n_draws + 1) / weights.sum() / n_draws)
    if mean == 0 or weights[:-1].sum() == 0:
        return np.array(_NEVER if mean == 0 else _ALWAYS)
    first = np.array([mean, 1 - mean]) if start is None else start
    c = np.arange(n_draws + 1)

    def loss(logs: np.ndarray) -> tuple[float, np.ndarray]:
        a, b = np.exp(logs)
        both = psi(a + b) - psi(a + b + n_draws)
        slope_a = weights @ (psi(a + c) - psi(a) + both)
        slope_b = weights @ (psi(b + n_draws - c) - psi(b) + both)
        return -float(_log_likelihood(weights, np.exp(logs)[None])[0]), -np.array([a * slope_a, b * slope_b])

    # with its gradient: where the likelihood is nearly flat, differences would be rounding errors
    found = minimize(
        loss, np.log(first), jac=True, method="L-BFGS-B", bounds=[(math.log(_LEAST), math.log(_MOST))] * 2
    )  # fmt: skip
    return np.asarray(np.exp(found.x))


def _likely(weights: np.ndarray, best: np.ndarray) -> np.ndarray:
    """Of each a on a grid, finer near the best, the smallest and the largest b that the data allow: at a given a the
    curve falls with b, so that no pair between them is extreme."""
    whole, near = np.geomspace(_LEAST, _MOST, 48), np.geomspace(0.5, 2.0, 41)
    a = np.concatenate([whole, np.clip(best[0] * near, _LEAST, _MOST)])
    ratio = np.concatenate([whole, best[1] / best[0] * near])
    pairs = np.stack(np.broadcast_arrays(a[:, None], np.clip(a[:, None] * ratio, _LEAST, _MOST)), axis=-1)
    found = _log_likelihood(weights, pairs.reshape(-1, 2)).reshape(pairs.shape[:2])
    top = max(float(_log_likelihood(weights, best[None])[0]), float(found.max()))
    allowed = 2 * (top - found) <= _TWICE_LOG_LIKELIHOOD
    rows = np.flatnonzero(allowed.any(axis=1))
    least = np.where(allowed, pairs[..., 1], math.inf).min(axis=1)[rows]
    most = np.where(allowed, pairs[..., 1], -math.inf).max(axis=1)[rows]
    rim = [np.stack([a[rows], b], axis=1) for b in (least, most)]
    return np.concatenate([best[None], *rim])


def _log_likelihood(weights: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """``(m,)`` of ``pairs (m, 2)``, up to a constant, from how often each count occurs."""
    c = np.arange(len(weights))
    a, b = pairs[:, :1], pairs[:, 1:]
    return np.asarray((betaln(a + c, b + c[::-1]) - betaln(a, b)) @ weights)


def _exponents(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least and the largest exponent that each pair stands for: at an end of the family it is open."""
    a, b = pairs[:, 0], pairs[:, 1]
    nothing = (a == 0) | (b == 0)
    least = np.where(nothing | (a <= _LEAST * (1 + 1e-6)), 0.0, a)
    return least, np.where(nothing | (np.maximum(a, b) >= _MOST * (1 - 1e-6)), math.inf, a)


def _broken(pairs: np.ndarray, n: np.ndarray) -> np.ndarray:
    a, b = (np.where(x > 0, x, 1.0) for x in (pairs[:, :1], pairs[:, 1:]))
    inside = -np.expm1(betaln(a, b + np.asarray(n)[None]) - betaln(a, b))
    return np.where(pairs[:, :1] == 0, 0.0, np.where(pairs[:, 1:] == 0, 1.0, inside))
