"""One probe under test: its planted data, and its fits, each made once and shared by all checks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from elk_stress.core.arrays import to_numpy
from elk_stress.probing.probe import FittedProbe, Probe
from elk_stress.testing.data import PlantedClasses, planted_classes
from elk_stress.testing.shared import no_hidden_state, read_only

__all__ = ["Case", "close", "score", "spread", "take"]

_SEPARATION = 8.0  # so that a density sees positives in 16 dimensions, and a projection on few of them keeps enough


@dataclass(frozen=True, eq=False)
class Case:
    """A probe, the seed of its fits, and what it is fitted on and judged by."""

    probe: Probe
    seed: int

    @cached_property
    def data(self) -> PlantedClasses:
        """What it is fitted on."""
        return self._planted(self.seed + 2)

    @cached_property
    def held_out(self) -> PlantedClasses:
        """What it is judged by: other items."""
        return self._planted(self.seed + 3)

    def _planted(self, seed: int) -> PlantedClasses:
        planted = planted_classes(separation=_SEPARATION, seed=seed)
        return planted.tokens(seed=seed) if self.probe.traits.tokens else planted

    @cached_property
    def fitted(self) -> FittedProbe:
        """Fitted on ``data``, watching for hidden state."""
        with no_hidden_state(self.probe):
            return self.data.fit(self.probe, seed=self.seed)

    @cached_property
    def swapped(self) -> FittedProbe:
        """Fitted on ``data`` with the labels swapped."""
        return self.data.fit(self.probe, seed=self.seed, labels=1 - self.data.labels)

    @cached_property
    def again(self) -> FittedProbe:
        """Fitted on read-only copies of ``data`` with the same seed, after another fit, watching for hidden state."""
        assert self.fitted is not self.swapped
        data = self.data
        frozen = replace(
            data,
            activations=read_only(data.activations),
            labels=read_only(data.labels),
            pairs=read_only(data.pairs),
            mask=None if data.mask is None else read_only(data.mask),
        )
        with no_hidden_state(self.probe):
            try:
                return frozen.fit(self.probe, seed=self.seed)
            except ValueError as error:
                if "read-only" not in str(error):
                    raise
                raise AssertionError(f"it writes into its input ({error}); work on a copy") from error

    def some(self, count: int, seed: int = 0) -> PlantedClasses:
        """A few held-out items (their pairs mean nothing)."""
        rng = np.random.default_rng(np.random.SeedSequence([seed, 13]))
        return take(self.held_out, rng.choice(len(self.held_out.labels), count, replace=False))


def take(data: PlantedClasses, rows: np.ndarray) -> PlantedClasses:
    """Some rows of the data; pairs are dropped."""
    mask = None if data.mask is None else data.mask[rows]
    none = np.zeros((0, 2), dtype=int)
    return replace(data, activations=data.activations[rows], labels=data.labels[rows], pairs=none, mask=mask)


def score(fitted: FittedProbe, activations: Any, mask: Any = None) -> Any:
    """Scores; the mask goes along where there is one."""
    return fitted.score(activations) if mask is None else fitted.score(activations, mask)


def spread(fitted: FittedProbe, data: PlantedClasses) -> float:
    """What scores are compared to: their largest size on ``data``, at least 1e-6."""
    return max(float(np.abs(score(fitted, data.activations, data.mask)).max()), 1e-6)


def close(found: Any, expected: Any, size: float, tolerance: float, promise: str) -> None:
    """Scores are equal within ``tolerance * size``."""
    gap = np.abs(to_numpy(found) - np.asarray(expected)).max(initial=0.0)
    assert gap <= tolerance * size, f"{promise} (by {gap:.1e}, where scores are as large as {size:.1e})"
