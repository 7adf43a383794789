r"""Bits of a weight change: how likely is it that noise on the weights alone costs the probe half of its advantage?

Event, one problem per model: with ``theta = theta_0 + sigma u`` the AUROC on the fixed test items is at most tau,
halfway between the clean one and 1/2, *and* the mean behaviour shift is at most epsilon. The AUROC counts pairs and is
a step function; what guides searches and levels is the probit of its smooth version ``mean Phi((s_p - s_n) / h)``, h a
tenth of the current spread of the scores (so that shrinking all scores gains nothing). Where that saturates, near a
perfect probe, the probit of Gaussian scores, ``d' / sqrt 2``, takes over. The sign is always the real AUROC's.

``B`` per model comes from importance sampling at a centre on the boundary; where other weights blur that boundary, the
weights of the draws degenerate and annealed importance sampling takes over. An evidence bound at the same centre is
rigorous whatever happens; in models too large to anneal it is what stands for B, and is called a bound.

Shapes: problems are models; u ``(models, n, n_parameters)``. Guarantee: as of the estimator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from scipy.special import ndtri

from elk_stress.core.bits import Bits, BitsBatch, Kind
from elk_stress.core.flags import flag
from elk_stress.estimators.annealed import Annealed
from elk_stress.estimators.evidence_bound import EvidenceBound
from elk_stress.estimators.importance import Importance
from elk_stress.estimators.limit_state import LimitState
from elk_stress.probing.probe import FittedProbe, Probe
from elk_stress.training.evasion import plain_recipe, stacked
from elk_stress.training.measure import clean_auroc, half_advantage
from elk_stress.training.organism_trainee import OrganismTrainee
from elk_stress.training.result import WeightBits, estimated, median_bits
from elk_stress.training.weight_search import WeightSearch

__all__ = ["WeightsEvent", "measure_weight_bits", "weight_bits"]

_BANDWIDTH = 0.1
# spreads beyond which scores are squashed
_SQUASH = 3.0
# draws of one model evaluated together: bounds the (draws, positives, negatives) comparisons in memory
_TOGETHER = 16
# effective failing draws below which importance sampling is not believed
_LEAST_EFFECTIVE = 30.0
_MOST_ANNEALED = 4_000
_MOST_SCALED = 10_000
# where the pilot looks for the boundary along a centre's ray, and with how many draws
_FACTORS = (0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.35, 1.5)
_PILOT_DRAWS = 32


@dataclass(frozen=True)
class WeightsEvent:
    """AUROC at most ``tau`` (and behaviour kept), one problem per model.

    Attributes:
        trainee: the models and the prior.
        probes: one per model, all of one recipe.
        tau: ``(models,)``.
        kept: whether the mean shift must be at most epsilon.
    """

    trainee: OrganismTrainee
    probes: Sequence[FittedProbe]
    tau: np.ndarray
    kept: bool = True

    @cached_property
    def data(self) -> dict[str, np.ndarray]:
        """What differs between models, one row each."""
        parameters = [plain_recipe(p)[1] for p in self.probes]
        clean = ndtri(np.clip(clean_auroc(self.trainee, self.probes), 0.0, 0.9999))
        return {
            "theta": self.trainee.original,
            "sigma": self.trainee.sigma,
            "reference": self.trainee.reference,
            "tau": np.asarray(self.tau, dtype=np.float32),
            "goal": ndtri(self.tau).astype(np.float32),
            "unit": np.maximum(clean - ndtri(self.tau), 1e-2).astype(np.float32),
            **{f"probe_{n}": stacked(self.probes[0].name, n, [p[n] for p in parameters]) for n in parameters[0]},
        }

    @cached_property
    def parts(self) -> Any:
        """``(row, u) -> (margin, shift / epsilon)`` of one model at one point, in jax; margin <= 0 exactly when the
        real AUROC is at most tau. The same function for all probes of one recipe, which are data: compiled once."""
        recipe, _ = plain_recipe(self.probes[0])
        return self.trainee.remembered(("parts", recipe), lambda: self._parts(recipe))

    def _parts(self, recipe: Probe) -> Any:
        import jax.numpy as jnp

        organism, unravel, epsilon = self.trainee.organism, self.trainee.unravel, self.trainee.epsilon
        labels = self.trainee.splits["test"].labels
        positives, negatives = np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)
        items, behaviour = dict(organism.probe_inputs("test")), dict(self.trainee.behaviour_inputs())

        def parts(row: Any, u: Any) -> tuple[Any, Any]:
            weights = unravel(row["theta"] + row["sigma"] * u)
            activations = organism.encode(weights, items)[0]
            own = {n.removeprefix("probe_"): a for n, a in row.items() if n.startswith("probe_")}
            scores = recipe.score(jnp, own, activations)
            high, low = jnp.sort(scores[positives]), jnp.sort(scores[negatives])
            below = jnp.searchsorted(low, high, side="left") + jnp.searchsorted(low, high, side="right")
            real = below.mean() / (2 * low.shape[0])
            margin = (_smooth(high, low) - row["goal"]) / row["unit"]
            fails = jnp.where(real <= row["tau"], jnp.minimum(margin, -1e-6), jnp.maximum(margin, 1e-6))
            shift = organism.divergence(row["reference"], organism.outputs(weights, behaviour)).mean()
            return fails, jnp.nan_to_num(shift / epsilon, nan=1e6, posinf=1e6)

        return parts

    @cached_property
    def limit_state(self) -> LimitState:
        """The event as estimators take it."""
        import jax
        import jax.numpy as jnp

        # made here and not while tracing: it draws its inputs
        parts = self.parts
        recipe, _ = plain_recipe(self.probes[0])

        def value(row: Any, u: Any) -> Any:
            fails, shift = parts(row, u)
            return jnp.maximum(fails, shift - 1.0) if self.kept else fails

        def function(rows: Any, u: Any) -> Any:
            def model(pair: Any) -> Any:
                row, points = pair
                return jax.lax.map(lambda point: value(row, point), points, batch_size=_TOGETHER)

            return jax.lax.map(model, (rows, u))

        return LimitState(
            function=function,
            _compiled=self.trainee.remembered(("limit state", recipe, self.kept), dict),
            dim=self.trainee.n_parameters,
            n_problems=self.trainee.n_models,
            backend="jax",
            dtype="float32",
            data=self.data,
        )


def weight_bits(
    trainee: OrganismTrainee,
    probes: Sequence[FittedProbe],
    *,
    kept: bool = True,
    models: Sequence[int] | None = None,
    search: WeightSearch | None = None,
    n_particles: int = 2048,
    seed: int = 0,
) -> tuple[BitsBatch, np.ndarray, np.ndarray]:
    """B at half advantage per model, at the centres that :class:`~elk_stress.training.weight_search.WeightSearch`
    finds.

    Importance sampling first; where its effective sample is too small to carry an estimate, annealed importance
    sampling from the same centre. An estimate above the rigorous bound is flagged. Models of more than 4,000 weights
    have the bound alone: importance sampling is starved there, and annealing takes tens of minutes each.

    Args:
        trainee, probes: one fitted probe per model.
        kept: whether behaviour must be kept.
        models: which; all by default.
        search: how centres are found.
        n_particles: importance draws per model.
        seed: of searches and draws.

    Returns:
        Bits, rigorous upper bounds ``(models,)`` and the centres ``(models, n_parameters)``.
    """
    chosen = np.arange(trainee.n_models) if models is None else np.asarray(models)
    tau = half_advantage(clean_auroc(trainee, probes))
    event = WeightsEvent(trainee, probes, tau, kept=kept)
    state = event.limit_state.select(chosen)
    rows = {name: row[chosen] for name, row in event.data.items()}
    centres = (search or WeightSearch())(event.parts, rows, trainee.n_parameters, seed)[0]
    centres = _onto_boundary(state, centres, seed)
    aimed = centres[:, None]
    bound = EvidenceBound(n_particles=1024)(state, seed=seed + 2, centres=aimed)
    if trainee.n_parameters > _MOST_ANNEALED:
        return bound, bound.value, centres
    found = Importance(n_particles=n_particles)(state, seed=seed + 1, centres=aimed)
    poor = np.flatnonzero((found.diagnostics["effective"] < _LEAST_EFFECTIVE) & np.isfinite(bound.value))
    if len(poor):
        again = Annealed(n_runs=4, n_particles=48)(state.select(poor), seed=seed + 3, centres=aimed[poor])
        found = _replaced(found, again, poor)
    above = [
        (flag("bounds_violated", f"{found[m]} above the bound {bound.value[m]:.1f}"),)
        if found.kind[m] is Kind.ESTIMATE and found.low[m] > bound.value[m]
        else ()
        for m in range(len(found))
    ]
    return found.with_flags(above), bound.value, centres


def measure_weight_bits(
    trainee: OrganismTrainee,
    probes: Sequence[FittedProbe],
    *,
    kept: bool = True,
    scales: Sequence[float] = (0.5, 2.0),
    scale_models: int = 2,
    seed: int = 0,
) -> WeightBits:
    """B with its interval over models, its rigorous bounds, and B against the prior's scale.

    Args:
        trainee, probes, kept, seed: as in :func:`weight_bits`.
        scales: multiples of the calibrated scale at which B is measured too, on the first ``scale_models`` models; not
            in models of more than 10,000 weights.
    """
    found, bounds, _ = weight_bits(trainee, probes, kept=kept, seed=seed)
    # a search takes minutes in a model of this size, and the curve's shape is known from the smaller ones
    scales = () if trainee.n_parameters > _MOST_SCALED else scales
    first = range(min(scale_models, trainee.n_models))
    curve = {1.0: float(np.median(_best(found, bounds)[list(first)]))}
    for factor in scales:
        other = replace(trainee, scale_factor=factor * trainee.scale_factor)
        # calibrated once: the scale is a multiple of the same one
        other.__dict__["calibration"] = trainee.calibration
        scaled, above, _ = weight_bits(other, probes, kept=kept, models=first, seed=seed)
        curve[factor] = float(np.median(_best(scaled, above)))
    flags = tuple(dict.fromkeys(f for row in found.flags for f in row))
    ordered = {f"{factor:g}": curve[factor] for factor in sorted(curve)}
    return WeightBits(replace(_headline(found), flags=flags), found, bounds, ordered)


def _headline(found: BitsBatch) -> Bits:
    """Median over models; a bound, from 0 on, where that of any model is one."""
    bounded = np.array([kind is Kind.UPPER_BOUND for kind in found.kind])
    values = np.where(bounded, found.value, estimated(found))
    headline = median_bits(values, np.where(np.isfinite(values), np.inf, found.value), found.method)
    if not bounded.any():
        return headline
    # the median of upper limits is an upper limit of the median, whatever the others are
    middle = float(np.sort(values)[(len(values) - 1) // 2 : len(values) // 2 + 1].mean())
    if math.isinf(middle):
        return Bits(0.0, 0.0, math.inf, Kind.CENSORED, found.method)
    return Bits(middle, 0.0, max(headline.high, middle), Kind.UPPER_BOUND, found.method)


def _best(found: BitsBatch, bounds: np.ndarray) -> np.ndarray:
    """The estimate, or the bound where there is none."""
    values = estimated(found)
    return np.where(np.isfinite(values), values, bounds)


def _onto_boundary(state: LimitState, centres: np.ndarray, seed: int) -> np.ndarray:
    """Each centre scaled to the shortest length at which two fifths of the draws fail; as it was where none does."""
    models = np.arange(state.n_problems)
    rng = np.random.default_rng(np.random.SeedSequence([seed, 0xB0]))
    noise = rng.standard_normal((1, _PILOT_DRAWS, state.dim))
    scale = np.ones(state.n_problems)
    open_ = np.ones(state.n_problems, dtype=bool)
    for factor in _FACTORS:
        if not open_.any():
            break
        rows = models[open_]
        share = (state.value(rows, factor * centres[rows][:, None] + noise) <= 0).mean(axis=1)
        reached = rows[share >= 0.4]
        scale[reached], open_[reached] = factor, False
    return np.asarray(centres * scale[:, None])


def _replaced(found: BitsBatch, again: BitsBatch, where: np.ndarray) -> BitsBatch:
    """``found`` with the problems ``where`` taken from ``again``, at the price of both."""
    value, low, high, evaluations = (np.array(getattr(found, n)) for n in ("value", "low", "high", "evaluations"))
    kind, status, flags = list(found.kind), list(found.status), list(found.flags)
    for row, m in zip(again, where, strict=True):
        value[m], low[m], high[m] = row.value, row.low, row.high
        kind[m], status[m], flags[m] = row.kind, row.status, row.flags
        evaluations[m] += row.evaluations
    return BitsBatch.build(
        value, low, high, kind, "importance, annealed where starved", evaluations=evaluations, status=status,
        flags=flags, diagnostics={"effective": found.diagnostics["effective"]},
    )  # fmt: skip


def _smooth(high: Any, low: Any) -> Any:
    """Probit of a smooth AUROC of sorted positives' and negatives' scores; informative at any distance.

    Scores are first squashed beyond a few spreads of their middle halves: otherwise a search would throw a few items
    far out, widen the kernel with them, and leave the order of all others as it was. Pairs of every few quantiles stand
    for all pairs: this guides, and does not decide.
    """
    import jax.numpy as jnp
    from jax.scipy.special import ndtr, ndtri

    centre, spread = _robust(high, low)
    high, low = (_SQUASH * jnp.tanh((part - centre) / (_SQUASH * spread)) for part in (high, low))
    within = jnp.sqrt(0.5 * (high.var() + low.var()))
    gap = high.mean() - low.mean()
    width = _BANDWIDTH * jnp.sqrt(within**2 + 0.25 * gap**2)
    some = [part[part.shape[0] % step // 2 :: step] for part in (high, low) for step in [max(1, part.shape[0] // 64)]]
    pairs = ndtr((some[0][:, None] - some[1][None, :]) / jnp.maximum(width, 1e-12)).mean()
    gaussian = gap / (jnp.sqrt(2.0) * jnp.maximum(within, 1e-12))
    share = jnp.clip((0.98 - pairs) / 0.08, 0.0, 1.0)
    return share * ndtri(jnp.clip(pairs, 1e-4, 0.99)) + (1.0 - share) * gaussian


def _robust(high: Any, low: Any) -> tuple[Any, Any]:
    """Centre and spread of sorted scores of both classes, by quartiles, which a few items cannot move."""
    import jax.numpy as jnp

    def quartiles(part: Any) -> Any:
        n = part.shape[0] - 1
        return [part[round(q * n)] for q in (0.25, 0.5, 0.75)]

    (a, b, c), (x, y, z) = quartiles(high), quartiles(low)
    # half of a middle half is 0.674 standard deviations of a Gaussian
    within = 0.25 * ((c - a) + (z - x)) / 0.674
    return 0.5 * (b + y), jnp.maximum(jnp.sqrt(within**2 + 0.25 * (b - y) ** 2), 1e-12)
