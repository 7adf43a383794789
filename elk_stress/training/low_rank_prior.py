r"""The Gaussian prior on whole matrices, seen from moves of low rank.

``W_t + sigma_t Z_t`` with Z_t standard normal of full rank; a move ``delta W_t = B_t A_t`` is
``u_t = delta W_t / sigma_t`` in standard normal coordinates. Its length and the noise's component along it need
neither ``delta W`` nor stored noise:

``r^2 = sum_t tr(A_t A_t^T B_t^T B_t) / sigma_t^2``,  ``z . u = sum_t <B_t^T Z_t, A_t> / sigma_t``.

Shapes: cells ``(strengths, models, n_parameters)``, sigma ``(matrices,)``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from elk_stress.models.adapters import Matrix

__all__ = ["LowRankPrior"]

# keeps these draws apart from those of other purposes
_NOISE = 0x0154


@dataclass(frozen=True)
class LowRankPrior:
    """Lengths and projections of adapters under noise on the matrices they sit on.

    Attributes:
        matrices: the adapted matrices.
        rank: of the adapters.
        seed: of the noise.
    """

    matrices: Sequence[Matrix]
    rank: int
    seed: int

    @property
    def unit(self) -> np.ndarray:
        """``(matrices,)``: rms of every matrix, the sigma of scale 1."""
        return np.array([matrix.rms for matrix in self.matrices])

    def noise(self, draw: int, matrix: int) -> np.ndarray:
        """Z_t ``(out, in)``; the same for all cells. Negative draws belong to the calibration."""
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, _NOISE, draw & 0xFFFFFFFF, matrix]))
        return rng.standard_normal(self.matrices[matrix].shape, dtype=np.float32)

    def length(self, cells: np.ndarray, sigma: np.ndarray) -> np.ndarray:
        """``(strengths, models)``: r."""
        squares = np.zeros(cells.shape[:2])
        for (a, b), each in zip(self._factors(cells), sigma, strict=True):
            left, right = a @ np.swapaxes(a, -1, -2), np.swapaxes(b, -1, -2) @ b
            squares += (left * right).sum(axis=(-1, -2)) / each**2
        return np.asarray(np.sqrt(np.maximum(squares, 0.0)))

    def along(self, cells: np.ndarray, sigma: np.ndarray, draw: int) -> np.ndarray:
        """``(strengths, models)``: ``z . u / r``; 0 for a move of length 0, which has no direction."""
        inner = np.zeros(cells.shape[:2])
        for t, ((a, b), each) in enumerate(zip(self._factors(cells), sigma, strict=True)):
            # single precision is ample for a projection of noise; one product of all cells, contiguous, is what is fast
            rows = np.ascontiguousarray(np.swapaxes(b, -1, -2), dtype=np.float32).reshape(-1, b.shape[-2])
            turned = (rows @ self.noise(draw, t)).reshape(a.shape)
            inner += (turned * a).sum(axis=(-1, -2)) / each
        length = self.length(cells, sigma)
        return np.asarray(np.divide(inner, length, out=np.zeros_like(inner), where=length > 0))

    def scaled(self, cells: np.ndarray, factor: np.ndarray) -> np.ndarray:
        """Cells whose ``B A`` is ``factor (strengths, models)`` times as long: B carries the factor."""
        out = np.array(cells)
        for matrix in self.matrices:
            out[..., matrix.b] *= np.asarray(factor, dtype=np.float32)[..., None]
        return out

    def _factors(self, cells: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """A ``(strengths, models, rank, in)`` and B ``(strengths, models, out, rank)`` of every matrix, float64."""
        for matrix in self.matrices:
            out, width = matrix.shape
            a = cells[..., matrix.a].reshape(*cells.shape[:2], self.rank, width)
            yield a.astype(float), cells[..., matrix.b].reshape(*cells.shape[:2], out, self.rank).astype(float)
