r"""The Gaussian mixture that importance sampling and the evidence bound draw from.

``q = defensive N(0, I) + sum_j a_j N(c_j, I)`` over a problem's centres c_j, with

``log q(u)/prior(u) = logsumexp(log defensive, log a_j + c_j.u - ||c_j||^2 / 2)``,

a difference of logarithms only: nothing underflows at hundreds of bits. The number of draws from each component is
fixed beforehand (proportional, largest remainders) and the shares are the realized ones, so that weights stay exactly
unbiased (the balance heuristic of Veach & Guibas 1995) and the components add no counting noise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.special import log_ndtr, logsumexp

from elk_stress.estimators.limit_state import LimitState, Meter

__all__ = ["Mixture", "affordable", "blocks", "check_centres"]

# problems x draws x dim per block: bounds the points in memory (float64: 64 MB)
_BLOCK_ELEMENTS = 1 << 23


@dataclass(frozen=True)
class Mixture:
    """Components and how many of ``n`` draws each one gets, per problem.

    Attributes:
        centres: ``(problems, 1 + m, dim)``, the prior's zero first; absent centres are zero with no draws.
        counts: ``(problems, 1 + m)`` draws of each component.
    """

    centres: np.ndarray
    counts: np.ndarray

    @classmethod
    def at(cls, centres: np.ndarray, n: int, defensive: float) -> Mixture:
        """Share ``n`` draws: ``defensive`` to the prior, the rest half evenly and half by FORM's ``Phi(-||c_j||)``.

        A problem without any centre draws from the prior alone.
        """
        p, m, dim = centres.shape
        present = ~np.isnan(centres[..., 0]) if dim else np.zeros((p, m), bool)
        filled = np.where(present[..., None], centres, 0.0)
        log_form = np.where(present, log_ndtr(-np.linalg.norm(filled, axis=-1)), -np.inf)
        top = log_form.max(axis=1, keepdims=True, initial=-np.inf)
        form = np.where(present, np.exp(log_form - np.where(np.isfinite(top), top, 0.0)), 0.0)
        form /= np.maximum(form.sum(axis=1, keepdims=True), 1e-300)
        even = present / np.maximum(present.sum(axis=1, keepdims=True), 1)
        share = np.concatenate([np.full((p, 1), defensive), (1 - defensive) * 0.5 * (form + even)], axis=1)
        share[~present.any(axis=1), 0] = 1.0
        return cls(np.concatenate([np.zeros((p, 1, dim)), filled], axis=1), _apportion(share, n))

    def draw(self, problems: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """``(p, n, dim)`` draws and ``(p, n)`` log density ratios ``log q/prior`` in nats."""
        counts = self.counts[problems]
        n = int(counts[0].sum())
        # component of draw i: how many cumulative counts lie at or below i
        component = (np.arange(n)[None, :, None] >= np.cumsum(counts, axis=1)[:, None, :]).sum(axis=-1)
        return self._at(problems, counts / n, component, rng)

    def draw_independent(self, problems: np.ndarray, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Like :meth:`draw`, but each draw picks its own component: independent and identically distributed."""
        counts = self.counts[problems]
        share = counts / counts.sum(axis=1, keepdims=True)
        pick = rng.random((problems.shape[0], n))
        component = (pick[:, :, None] >= np.cumsum(share, axis=1)[:, None, :-1]).sum(axis=-1)
        return self._at(problems, share, component, rng)

    def _at(
        self, problems: np.ndarray, share: np.ndarray, component: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        centres = self.centres[problems]
        u = rng.standard_normal((*component.shape, centres.shape[-1]))
        u += np.take_along_axis(centres, component[..., None], axis=1)
        return u, self.log_ratio(problems, u, share)

    def log_ratio(self, problems: np.ndarray, u: np.ndarray, share: np.ndarray | None = None) -> np.ndarray:
        """``log q/prior`` in nats at ``(p, n, dim)`` points -> ``(p, n)``; the realized shares by default."""
        centres = self.centres[problems]
        if share is None:
            share = self.counts[problems] / self.counts[problems].sum(axis=1, keepdims=True)
        with np.errstate(divide="ignore"):
            log_share = np.log(share)
        terms = u @ centres.transpose(0, 2, 1)
        terms += (log_share - 0.5 * np.einsum("pmd,pmd->pm", centres, centres))[:, None, :]
        return np.asarray(logsumexp(terms, axis=-1))


def blocks(n_problems: int, n: int, dim: int) -> Iterator[np.ndarray]:
    """Consecutive problem indices, as many at a time as memory allows."""
    step = max(1, _BLOCK_ELEMENTS // max(1, n * dim))
    for first in range(0, n_problems, step):
        yield np.arange(first, min(n_problems, first + step))


def check_centres(limit_state: LimitState, centres: np.ndarray) -> None:
    """Refuse centres that are not ``(problems, m, dim)``."""
    if centres.ndim != 3 or centres.shape[0] != limit_state.n_problems or centres.shape[2] != limit_state.dim:
        raise ValueError(
            f"centres must have shape ({limit_state.n_problems} problems, m, {limit_state.dim}), got "
            f"{centres.shape}; DesignPoint()(limit_state, seed=0).diagnostics['centres'] has it"
        )


def affordable(n: int, meter: Meter) -> int:
    """``n`` draws, or as many as the budget still allows (at least 0)."""
    return int(max(0, min(n, meter.remaining())))


def _apportion(share: np.ndarray, n: int) -> np.ndarray:
    """Whole numbers that sum to ``n``, nearest to ``share * n`` (largest remainders)."""
    exact = share * n
    counts = np.floor(exact).astype(np.int64)
    order = np.argsort(-(exact - counts), axis=1, kind="stable")
    missing = n - counts.sum(axis=1)
    extra = np.arange(share.shape[1])[None, :] < missing[:, None]
    np.put_along_axis(counts, order, np.take_along_axis(counts, order, axis=1) + extra, axis=1)
    return np.asarray(counts)
