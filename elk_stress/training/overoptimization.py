r"""Which over-optimization form do proxy and gold follow, if any?

With ``d = sqrt(KL(q, prior))`` in sqrt nats and R the drop of a metric from its clean value, Gao et al. (2022) found

* best-of-n: ``R_bon(d) = d (alpha - beta d)``,
* reinforcement learning: ``R_RL(d) = d (alpha - beta log d)``.

Both are linear in (alpha, beta): least squares on all models' points. Forms are compared by leave-one-model-out
prediction error, so that a form is preferred only if it predicts models that it was not fitted to. A form *predicts* if
its cross-validated R^2 is at least 0.5. It is *named* if it predicts, beats the other in more models than chance would
give (sign test over models, 5%; impossible below 6 models), and a free curve (:data:`FREE`, which contains both forms)
does not beat it likewise: of two wrong forms one always fits better. Where a form predicts and the free curve does not
beat it, but there is no winner, the answer is ``either``; all else is ``neither``.

Reference: Gao, Schulman & Hilton 2022 (2210.10760).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

__all__ = ["FORMS", "FREE", "Overoptimization", "fit_overoptimization"]

FORMS = ("best_of_n", "reinforcement")
FREE = "free"
"""``d``, ``d^2``, ``d^3``, ``d^4`` and ``d log d``: what a form has to keep up with on models it was not fitted to."""
_LEAST_R2 = 0.5
_LEVEL = 0.05


@dataclass(frozen=True)
class Overoptimization:
    """Fits of both forms to one drop.

    Attributes:
        drop: what was fitted, e.g. ``proxy`` or ``gold``.
        alpha, beta: form -> coefficient, on all models.
        r2: form, and :data:`FREE`, -> cross-validated share of the variance explained (can be negative).
        wins: models that the best-of-n form predicts better, of the ``n_models`` where both predict anything.
        better: ``best_of_n``, ``reinforcement``, ``either`` or ``neither``.
    """

    drop: str
    alpha: dict[str, float]
    beta: dict[str, float]
    r2: dict[str, float]
    wins: int
    n_models: int
    better: str


def fit_overoptimization(name: str, d: np.ndarray, drop: np.ndarray) -> Overoptimization:
    """Fit both forms.

    Args:
        name: what ``drop`` is.
        d: ``(points, models)``, sqrt nats; points at 0 are left out.
        drop: ``(points, models)``; NaN where not measured.
    """
    models = np.arange(d.shape[1])
    alpha, beta, r2 = {}, {}, {}
    errors: dict[str, np.ndarray] = {}
    used = _used(d, drop)
    total = float(((drop[used] - drop[used].mean()) ** 2).sum()) if used.any() else 0.0
    for form in (*FORMS, FREE):
        if form != FREE:
            alpha[form], beta[form] = (float(x) for x in _fit(form, d, drop, models))
        errors[form] = np.array(
            [_error(form, _fit(form, d, drop, np.delete(models, m)), d[:, m], drop[:, m]) for m in models]
        )
        known = np.isfinite(errors[form]).any() and total > 0
        r2[form] = 1.0 - float(np.nansum(errors[form])) / total if known else float("nan")
    first, second = FORMS
    wins, n_models = _wins(errors[first], errors[second])
    winner = first if 2 * wins > n_models else second
    decided = _certain(wins, n_models) and r2[winner] >= _LEAST_R2
    candidates = [winner] if decided else [form for form in FORMS if r2[form] >= _LEAST_R2]
    # a form that a free curve beats is not what the models follow
    standing = [form for form in candidates if not _beaten(errors[form], errors[FREE])]
    better = "neither" if not standing else winner if decided else "either"
    return Overoptimization(name, alpha, beta, r2, wins, n_models, better)


def _wins(a: np.ndarray, b: np.ndarray) -> tuple[int, int]:
    """Models that a predicts better than b, of those that both predict and that are no tie."""
    both = np.isfinite(a) & np.isfinite(b) & (a != b)
    return int((a < b)[both].sum()), int(both.sum())


def _certain(wins: int, of: int) -> bool:
    return of > 0 and bool(binomtest(wins, of).pvalue < _LEVEL)


def _beaten(errors: np.ndarray, free: np.ndarray) -> bool:
    wins, of = _wins(free, errors)
    return 2 * wins > of and _certain(wins, of)


def _features(form: str, d: np.ndarray) -> np.ndarray:
    if form == FREE:
        return np.stack([d, -d * np.log(d), d**2, d**3, d**4], axis=-1)
    second = d**2 if form == "best_of_n" else d * np.log(d)
    return np.stack([d, -second], axis=-1)


def _used(d: np.ndarray, drop: np.ndarray) -> np.ndarray:
    return np.asarray((d > 0) & np.isfinite(drop) & np.isfinite(d))


def _fit(form: str, d: np.ndarray, drop: np.ndarray, models: np.ndarray) -> np.ndarray:
    x, y = d[:, models], drop[:, models]
    used = _used(x, y)
    features = _features(form, x[used])
    if len(features) < features.shape[1]:
        return np.full(features.shape[1], np.nan)
    # columns of one size: powers of d differ by orders of magnitude, and least squares drops what it takes for rounding
    size = np.maximum(np.abs(features).max(axis=0), 1e-300)
    return np.asarray(np.linalg.lstsq(features / size, y[used], rcond=None)[0] / size)


def _error(form: str, coefficients: np.ndarray, d: np.ndarray, drop: np.ndarray) -> float:
    used = _used(d, drop)
    if not used.any() or not np.isfinite(coefficients).all():
        return float("nan")
    return float(((_features(form, d[used]) @ coefficients - drop[used]) ** 2).sum())
