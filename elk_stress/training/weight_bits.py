r"""Bits of a weight change: how likely is it that noise on the weights alone costs the probe half of its advantage?

Event, one problem per model: with ``theta = theta_0 + sigma u`` the AUROC on the fixed test items is at most tau,
halfway between the clean one and 1/2, *and* the mean behaviour shift is at most epsilon. The AUROC counts pairs and is a step
function; what guides searches and levels is its smooth version ``mean Phi((s_p - s_n) / h)``, h a tenth of the current
spread of the scores (so that shrinking all scores gains nothing). The sign is always that of the real one.

``B`` per model comes from importance sampling at design points on the boundary
(:class:`~elk_stress.estimators.auto.Auto`), checked by splitting where the weights are few.

Shapes: problems are models; u ``(models, n, n_parameters)``. Guarantee: as of the estimator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.special import ndtri

from elk_stress.bits import BitsBatch
from elk_stress.detection import auroc
from elk_stress.limit_state import LimitState
from elk_stress.probe import FittedProbe
from elk_stress.training.evasion import plain_recipe
from elk_stress.training.weights import OrganismTrainee

__all__ = ["clean_auroc", "half_advantage", "weight_bits", "weights_event"]

_BANDWIDTH = 0.1
# draws of one model evaluated together: bounds the (draws, positives, negatives) comparisons in memory
_TOGETHER = 16
# beyond so many weights splitting is too slow to check with
_SPLITTING_WEIGHTS = 400


def clean_auroc(trainee: OrganismTrainee, probes: Sequence[FittedProbe]) -> np.ndarray:
    """``(models,)`` AUROC of each model's probe on the test items, nothing moved."""
    activations = trainee.activations(trainee.original[None], "test")[0]
    labels = trainee.splits["test"].labels
    return np.array([auroc(p.score(a), labels) for p, a in zip(probes, activations, strict=True)])


def half_advantage(clean: np.ndarray) -> np.ndarray:
    """tau: halfway between the clean AUROC and a constant's."""
    return 0.5 * (np.asarray(clean) + 0.5)


def weights_event(
    trainee: OrganismTrainee,
    probes: Sequence[FittedProbe],
    tau: np.ndarray,
    *,
    kept: bool = True,
    parts_only: bool = False,
) -> Any:
    """The limit state: AUROC at most ``tau`` (and behaviour kept), one problem per model.

    Args:
        trainee: the models and the prior.
        probes: one per model, all of one recipe.
        tau: ``(models,)``.
        kept: whether the mean shift must be at most epsilon.
    """
    import jax
    import jax.numpy as jnp

    organism, unravel = trainee.organism, trainee.unravel
    recipe, _ = plain_recipe(probes[0])
    parameters = [plain_recipe(p)[1] for p in probes]
    labels = trainee.splits["test"].labels
    positives, negatives = np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)
    items, behaviour = dict(organism.probe_inputs("test")), dict(trainee.behaviour_inputs())
    clean = clean_auroc(trainee, probes)
    epsilon = trainee.epsilon
    data = {
        "theta": trainee.original,
        "sigma": trainee.sigma,
        "tau": np.asarray(tau, dtype=np.float32),
        "goal": ndtri(tau).astype(np.float32),
        "unit": np.maximum(ndtri(np.clip(clean, 0.0, 0.9999)) - ndtri(tau), 1e-2).astype(np.float32),
        **{f"probe_{n}": np.stack([np.asarray(p[n], np.float32) for p in parameters]) for n in parameters[0]},
    }

    def parts(row: Any, u: Any) -> tuple[Any, Any]:
        weights = unravel(row["theta"] + row["sigma"] * u)
        activations = organism.encode(weights, items)[0]
        own = {n.removeprefix("probe_"): a for n, a in row.items() if n.startswith("probe_")}
        scores = recipe.score(jnp, own, activations)
        difference = scores[positives][:, None] - scores[negatives][None, :]
        real = ((difference > 0) + 0.5 * (difference == 0)).mean()
        margin = (_smooth(difference, scores[positives], scores[negatives]) - row["goal"]) / row["unit"]
        fails = jnp.where(real <= row["tau"], jnp.minimum(margin, -1e-6), jnp.maximum(margin, 1e-6))
        reference = organism.outputs(unravel(row["theta"]), behaviour)
        shift = organism.divergence(reference, organism.outputs(weights, behaviour)).mean()
        return fails, jnp.nan_to_num(shift / epsilon, nan=1e6, posinf=1e6)

    def value(row: Any, u: Any) -> Any:
        fails, shift = parts(row, u)
        return jnp.maximum(fails, shift - 1.0) if kept else fails

    if parts_only:
        return parts

    def function(rows: Any, u: Any) -> Any:
        def model(pair: Any) -> Any:
            row, points = pair
            return jax.lax.map(lambda point: value(row, point), points, batch_size=_TOGETHER)

        return jax.lax.map(model, (rows, u))

    return LimitState(
        function=function,
        dim=trainee.n_parameters,
        n_problems=trainee.n_models,
        backend="jax",
        dtype="float32",
        data=data,
    )


def weight_bits(
    trainee: OrganismTrainee,
    probes: Sequence[FittedProbe],
    *,
    kept: bool = True,
    starts: np.ndarray | None = None,
    n_particles: int = 1024,
    max_bits: float = 1000.0,
    seed: int = 0,
) -> BitsBatch:
    """B at half advantage per model.

    Args:
        trainee, probes: one fitted probe per model.
        kept: whether behaviour must be kept.
        starts: ``(models, m, n_parameters)`` moves worth starting a search from, e.g. where attacks ended.
        n_particles: importance draws per model.
        max_bits: censored beyond.
        seed: of searches and draws.
    """
    from elk_stress.estimators import estimate_batch

    tau = half_advantage(clean_auroc(trainee, probes))
    state = weights_event(trainee, probes, tau, kept=kept)
    if starts is not None:
        state = replace(state, starts=starts)
    few = trainee.n_parameters <= _SPLITTING_WEIGHTS
    return estimate_batch(
        state,
        method="auto",
        n_particles=n_particles,
        max_bits=max_bits,
        check_fraction=None if few else 0.0,
        n_starts=2,
        seed=seed,
    )


def _smooth(difference: Any, positive: Any, negative: Any) -> Any:
    """Probit of a smooth AUROC of ``(positives, negatives)`` score differences; informative at any distance."""
    import jax.numpy as jnp
    from jax.scipy.special import ndtr, ndtri

    within = jnp.sqrt(0.5 * (positive.var() + negative.var()))
    spread = jnp.maximum(jnp.sqrt(within**2 + 0.25 * (positive.mean() - negative.mean()) ** 2), 1e-12)
    pairs = ndtr(difference / (_BANDWIDTH * spread)).mean()
    gaussian = (positive.mean() - negative.mean()) / (jnp.sqrt(2.0) * jnp.maximum(within, 1e-12))
    share = jnp.clip((0.98 - pairs) / 0.08, 0.0, 1.0)
    return share * ndtri(jnp.clip(pairs, 1e-4, 0.99)) + (1.0 - share) * gaussian
