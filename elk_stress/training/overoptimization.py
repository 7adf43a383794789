r"""Which over-optimization form do proxy and gold follow, if any?

With ``d = sqrt(KL(q, prior))`` in sqrt nats and R the drop of a metric from its clean value, Gao et al. (2022) found

* best-of-n: ``R_bon(d) = d (alpha - beta d)``,
* reinforcement learning: ``R_RL(d) = d (alpha - beta log d)``.

Both are linear in (alpha, beta): least squares on all models' points. Forms are compared by leave-one-model-out
prediction error, so that a form is preferred only if it predicts models that it was not fitted to. The better one is
*named* if its cross-validated R^2 is at least 0.5 and it wins in all but a share of models that chance would give (sign
test over models, 5%); if both predict but neither wins, the answer is ``either``; if none predicts, ``neither``.

Reference: Gao, Schulman & Hilton 2022 (2210.10760).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

__all__ = ["FORMS", "Overoptimization", "fit_overoptimization"]

FORMS = ("best_of_n", "reinforcement")
_LEAST_R2 = 0.5


@dataclass(frozen=True)
class Overoptimization:
    """Fits of both forms to one drop.

    Attributes:
        drop: what was fitted, e.g. ``proxy`` or ``gold``.
        alpha, beta: form -> coefficient, on all models.
        r2: form -> cross-validated share of the variance explained (can be negative).
        wins: models that the best-of-n form predicts better, of ``n_models``.
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
    models = d.shape[1]
    alpha, beta, r2 = {}, {}, {}
    errors: dict[str, np.ndarray] = {}
    for form in FORMS:
        (alpha[form], beta[form]) = _fit(form, d, drop, np.arange(models))
        errors[form] = np.array(
            [
                _error(form, _fit(form, d, drop, np.delete(np.arange(models), m)), d[:, m], drop[:, m])
                for m in range(models)
            ]
        )
        used = _used(d, drop)
        total = float(((drop[used] - drop[used].mean()) ** 2).sum()) if used.any() else 0.0
        r2[form] = 1.0 - float(np.nansum(errors[form])) / total if total > 0 and models > 1 else float("nan")
    wins = int((errors["best_of_n"] < errors["reinforcement"]).sum())
    better = "neither"
    predicting = [form for form in FORMS if r2[form] >= _LEAST_R2]
    if predicting:
        certain = binomtest(wins, models).pvalue < 0.05
        best = max(FORMS, key=lambda form: r2[form])
        better = best if certain or len(predicting) == 1 else "either"
    return Overoptimization(name, alpha, beta, r2, wins, models, better)


def _features(form: str, d: np.ndarray) -> np.ndarray:
    second = d**2 if form == "best_of_n" else d * np.log(d)
    return np.stack([d, -second], axis=-1)


def _used(d: np.ndarray, drop: np.ndarray) -> np.ndarray:
    return np.asarray((d > 0) & np.isfinite(drop) & np.isfinite(d))


def _fit(form: str, d: np.ndarray, drop: np.ndarray, models: np.ndarray) -> tuple[float, float]:
    x, y = d[:, models], drop[:, models]
    used = _used(x, y)
    if used.sum() < 2:
        return float("nan"), float("nan")
    found = np.linalg.lstsq(_features(form, x[used]), y[used], rcond=None)[0]
    return float(found[0]), float(found[1])


def _error(form: str, coefficients: tuple[float, float], d: np.ndarray, drop: np.ndarray) -> float:
    used = _used(d, drop)
    if not used.any() or not np.isfinite(coefficients).all():
        return float("nan")
    return float(((_features(form, d[used]) @ np.array(coefficients) - drop[used]) ** 2).sum())
