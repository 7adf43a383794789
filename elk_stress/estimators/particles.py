"""What splitting's failing particles say about where the failure set is.

They are draws from the prior given failure (up to correlation), shape ``(problems, k, dim)`` with NaN rows absent.
"""

from __future__ import annotations

import numpy as np

from elk_stress.estimators.design_point import distinct

__all__ = ["draw_from", "far_apart", "with_means"]


def far_apart(particles: np.ndarray, k: int) -> np.ndarray:
    """``(p, k, dim)`` particles far apart: the one nearest the origin, then always the farthest from those chosen."""
    p, m, dim = particles.shape
    present = ~np.isnan(particles[..., 0])
    filled = np.where(present[..., None], particles, 0.0)
    radius = np.where(present, np.linalg.norm(filled, axis=-1), np.inf)
    rows, chosen = np.arange(p), np.argmin(radius, axis=1)
    out = np.full((p, k, dim), np.nan)
    gap = np.where(present, np.inf, -1.0)
    for j in range(min(k, m)):
        out[:, j] = particles[rows, chosen]
        gap = np.minimum(gap, np.linalg.norm(filled - filled[rows, chosen][:, None, :], axis=-1))
        gap = np.where(present, gap, -1.0)
        chosen = np.argmax(gap, axis=1)
    return out


def with_means(centres: np.ndarray, particles: np.ndarray, separation: float) -> np.ndarray:
    """Centres and the mean of the failing particles nearest to each: where the mass is, if the boundary is curved.

    A mean of k particles is off by ``sqrt(dim/k)``, which costs importance sampling ``exp(dim/k)`` in variance: only
    means of ``4 dim`` particles or more are used.
    """
    m, dim = centres.shape[1:]
    if particles.shape[1] < 4 * dim:
        return centres
    present = ~np.isnan(particles[..., 0])
    filled = np.where(present[..., None], particles, 0.0)
    gap = np.stack([np.linalg.norm(filled - centres[:, j, None, :], axis=-1) for j in range(m)], axis=-1)
    owner = np.argmin(np.where(np.isnan(gap), np.inf, gap), axis=-1)
    member = (owner[..., None] == np.arange(m)) & present[..., None]
    count = member.sum(axis=1)
    means = np.einsum("pkm,pkd->pmd", member.astype(float), filled) / np.maximum(count, 1)[..., None]
    means[count < 4 * dim] = np.nan
    return distinct(np.concatenate([centres, means], axis=1), separation, m)[0]


def draw_from(particles: np.ndarray, keep: int, rng: np.random.Generator) -> np.ndarray:
    """``(p, keep, dim)`` particles in random order, repeated only where fewer are present; NaN where none is."""
    p, m, _ = particles.shape
    present = ~np.isnan(particles[..., 0])
    order = np.argsort(np.where(present, rng.random((p, m)), 2.0), axis=1)
    wanted = np.arange(keep)[None, :] % np.maximum(present.sum(axis=1), 1)[:, None]
    return np.take_along_axis(particles, np.take_along_axis(order, wanted, axis=1)[..., None], axis=1)
