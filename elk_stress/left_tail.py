r"""Per-item chances of evasion, their left tail, and the power law of best-of-n that follows from it.

How likely is one ordinary thought to evade the probe on item i? ``p_i`` differs between items, and what decides about
the best of many is how many items have a *small* one. With ``p ~ Beta(a, b)`` (density ``~ p^(a-1)`` at 0) the share
of items that still holds after n draws is

``E[(1-p)^n] = B(a, b+n) / B(a, b)  ~  Gamma(a+b)/Gamma(b) n^-a``:

a power law whose exponent is the tail's index. a and b are fitted by maximum likelihood to counts, ``c_i`` of C draws
(beta-binomial), so that items that never failed count as what they are, and not as chance 0.

Intervals: bootstrap over items. Guarantee: none beyond the family; draws of one item are taken as independent of those
of others, and contexts that sway all items alike make the true curve less certain than the band says.

Reference: Schaeffer et al. 2025 (2502.17578).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.special import betaln

__all__ = ["LeftTail", "fit_left_tail"]

# a or b beyond these are all items alike, or chances of 0 and 1 alone: the fit has run to an end of the family
_LEAST, _MOST = 1e-3, 1e4


@dataclass(frozen=True)
class LeftTail:
    """A fitted distribution of per-item chances.

    Attributes:
        a, b: of the Beta distribution; a is the exponent of the power law.
        replicates: ``(replicates, 2)`` bootstrapped a and b.
        n_items, n_draws: what it was fitted to.
    """

    a: float
    b: float
    replicates: np.ndarray
    n_items: int
    n_draws: int

    @property
    def interval(self) -> tuple[float, float]:
        """95% of the exponent."""
        low, high = np.quantile(self.replicates[:, 0], [0.025, 0.975])
        return min(float(low), self.a), max(float(high), self.a)

    def broken(self, n: np.ndarray) -> np.ndarray:
        """Share of items that the best of ``n`` draws breaks, ``1 - E[(1-p)^n]``."""
        return np.asarray(_broken(np.array([[self.a, self.b]]), n)[0])

    def band(self, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pointwise 95% interval of :meth:`broken`."""
        low, high = np.quantile(_broken(self.replicates, n), [0.025, 0.975], axis=0)
        return np.asarray(low), np.asarray(high)


def fit_left_tail(counts: np.ndarray, n_draws: int, *, replicates: int = 200, seed: int = 0) -> LeftTail | None:
    """Maximum likelihood from ``counts (n_items,)`` of ``n_draws`` draws each; ``None`` where nothing ever failed or
    everything always did: then there is no tail to see.

    Raises:
        ValueError: counts outside 0 to ``n_draws``, or no draws.
    """
    counts = np.asarray(counts, dtype=float)
    if n_draws < 1 or counts.ndim != 1 or not ((counts >= 0) & (counts <= n_draws)).all():
        raise ValueError(f"expected one count of 0 to {n_draws} draws per item, got {counts[:5]} of {n_draws} draws")
    if not len(counts) or not 0 < counts.sum() < n_draws * len(counts):
        return None
    # the likelihood depends on how often each count occurs, and nothing else
    weights = np.bincount(counts.astype(int), minlength=n_draws + 1).astype(float)
    rng = np.random.default_rng(np.random.SeedSequence([seed, 0x1EF7]))
    best = _fit(weights, n_draws, None)
    draws = rng.multinomial(len(counts), weights / weights.sum(), size=replicates)
    usable = [row for row in draws if 0 < row @ np.arange(n_draws + 1) < n_draws * len(counts)]
    many = np.array([_fit(row, n_draws, best) for row in usable] or [best])
    return LeftTail(float(best[0]), float(best[1]), many, len(counts), n_draws)


def _fit(weights: np.ndarray, n_draws: int, start: np.ndarray | None) -> np.ndarray:
    """``(a, b)`` of highest likelihood; the binomial coefficients are the same for all."""
    c = np.arange(n_draws + 1)
    mean = float(weights @ c / weights.sum() / n_draws)
    first = np.array([mean, 1 - mean]) if start is None else start

    def loss(logs: np.ndarray) -> float:
        a, b = np.exp(logs)
        return -float(weights @ (betaln(a + c, b + n_draws - c) - betaln(a, b)))

    found = minimize(
        loss, np.log(first), method="L-BFGS-B", bounds=[(math.log(_LEAST), math.log(_MOST))] * 2
    )  # fmt: skip
    return np.asarray(np.exp(found.x))


def _broken(pairs: np.ndarray, n: np.ndarray) -> np.ndarray:
    a, b = pairs[:, :1], pairs[:, 1:]
    return np.asarray(-np.expm1(betaln(a, b + np.asarray(n)[None]) - betaln(a, b)))
