"""What all probes of one testbed share: activations, origins, priors, fitted tails, resamples and true shifts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from elk_stress.core.flags import Flag, flag
from elk_stress.core.inputs import check_activations
from elk_stress.core.settings import setting, shown
from elk_stress.probing.multi_read import Flat, flatten, read, tokens_of
from elk_stress.probing.origin import moved
from elk_stress.probing.probe import FittedProbe, Probe, as_fitted, check_recipe
from elk_stress.probing.rowwise import check_rows
from elk_stress.probing.wrapping.opaque import resolution
from elk_stress.testbeds.defence_knowledge import spread_rows
from elk_stress.testbeds.duplicates import near_copies
from elk_stress.testbeds.protocol import PLANTED, Items, SplitName, Testbed, check_splits
from elk_stress.thoughts.behaviour import Behaviour
from elk_stress.thoughts.survival import Resamples
from elk_stress.threats.priors import (
    EllipticalPrior,
    Gaussian,
    Logistic,
    StudentT,
    Tail,
    TailFit,
    fit_tails,
    isotropic,
    natural,
)
from elk_stress.threats.threat import DEFAULT_EPSILON_FACTOR, Threat

__all__ = ["Prepared", "fit_probe", "prepare"]

# replicates x items of the bootstrap: bounds its memory and its time on large data
_BOOTSTRAP_CELLS = 4_000_000
# share of the variance in a few dimensions that makes these massive
_MASSIVE = 0.9
# share of the scores' spread that rounding may take: bits of more than that would be bits of the rounding
_COARSEST = 0.1


@dataclass
class Prepared:
    """A prepared testbed.

    Attributes:
        testbed: the testbed, prepared.
        seed: of every draw that the probes share.
        fit: ``(n_train, contexts, d)`` training items under the contexts that probes are fitted on.
        train, calibration, test: ``(n, contexts, d)`` under the prior's contexts, which no probe was fitted on.
        bare_calibration: calibration items alone, or ``None``.
        observed: test items under contexts B, or ``None`` if there are none.
        given_prior: a prior that the caller chose instead of natural thoughts, or ``None``.
        thoughts: the prior that defences may know; by default (:attr:`known_thoughts`) fitted on ``fit``.
        train_items: the items of ``train``, where they are not all of the testbed's.
    """

    testbed: Testbed
    seed: int
    fit: np.ndarray
    train: np.ndarray
    calibration: np.ndarray
    test: np.ndarray
    bare_calibration: np.ndarray | None
    observed: np.ndarray | None
    given_prior: EllipticalPrior | None = None
    thoughts: EllipticalPrior | None = None
    train_items: Items | None = None
    n_verify: int = 64
    replicates: int = 1000
    epsilon_factor: float = DEFAULT_EPSILON_FACTOR
    _priors: dict[tuple[Any, ...], EllipticalPrior] = field(default_factory=dict, repr=False)
    _controls: dict[Any, Any] = field(default_factory=dict, repr=False)
    _origins: dict[SplitName, np.ndarray] = field(default_factory=dict, init=False, repr=False)

    @property
    def items(self) -> Items:
        """Test items."""
        return self.testbed.splits["test"]

    @property
    def training(self) -> Items:
        """The items of ``train``."""
        return self.testbed.splits["train"] if self.train_items is None else self.train_items

    @property
    def test_origins(self) -> np.ndarray:
        """``(n, d)`` float32 means over contexts A."""
        return self.origins("test")

    @cached_property
    def trial_rows(self) -> np.ndarray:
        """``(64, d)`` float32: up to 32 test activations, and what is four times as far from their mean."""
        rows = self.test.reshape(-1, self.test.shape[-1])
        rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), 32)).astype(int)].astype(np.float32)
        centre = rows.mean(axis=0)
        return np.concatenate([rows, centre + 4 * (rows - centre)])

    @cached_property
    def positives(self) -> np.ndarray:
        """Indices of the test positives."""
        return np.flatnonzero(self.items.labels == 1)

    @cached_property
    def negatives(self) -> np.ndarray:
        """Calibration negatives under contexts A, ``(n, contexts, d)``."""
        return np.asarray(self.calibration[self.testbed.splits["calibration"].labels == 0])

    @cached_property
    def plain_train(self) -> np.ndarray:
        """Indices of the train items that are not the negated half of a contrast pair."""
        pairs = self.training.pairs
        every = np.arange(len(self.train))
        return every if pairs is None else np.setdiff1d(every, pairs[:, 1])

    def origins(self, split: SplitName) -> np.ndarray:
        """``(n, d)`` float32 means over contexts A of all items of a split, negated halves of pairs included."""
        if split not in self._origins:
            thoughts = {"train": self.train, "calibration": self.calibration, "test": self.test}[split]
            self._origins[split] = np.asarray(thoughts.mean(axis=1), dtype=np.float32)
        return self._origins[split]

    @cached_property
    def behaviour(self) -> Behaviour | None:
        """True shifts of test items, or ``None`` where the testbed has no output (arrays alone)."""
        return None if self.testbed.shift_cost == "none" else Behaviour(self.testbed, self.n_verify, self.seed)

    @cached_property
    def train_behaviour(self) -> Behaviour | None:
        """The same of training items."""
        return None if self.behaviour is None else replace(self.behaviour, split="train", _natural={}, _factors={})

    @property
    def has_stand_in(self) -> bool:
        """Whether the prior only stands for natural thoughts, because there is one context an item."""
        own = getattr(self.testbed, "prior", None)
        return self.train.shape[1] == 1 and own is not None and self.given_prior is own

    @cached_property
    def known_thoughts(self) -> EllipticalPrior:
        """Natural thoughts as a defence may know them when it is fitted: from the contexts that probes are fitted on.

        Never the prior that it is then judged by: a probe that whitens by that covariance ignores the judge's very
        contexts, and its bits would be fictitious. With one context for fitting, or a given prior, the same serves both
        (the first is flagged ``shared_contexts``).
        """
        if self.thoughts is not None:
            return self.thoughts
        known: EllipticalPrior | None = getattr(self.testbed, "known_prior", None)
        if known is not None:
            return known
        separate = self.given_prior is None and self.fit.shape[1] > 1
        return natural(self.fit[self.plain_train]) if separate else self.prior(Threat())

    @cached_property
    def known_behaviour(self) -> np.ndarray:
        """``(m, rank, d)`` Fisher factors of up to 64 training items: what a defence may know of the output."""
        assert self.train_behaviour is not None
        return self.train_behaviour.factors(self.plain_train[spread_rows(len(self.plain_train))])

    @cached_property
    def epsilon(self) -> float:
        """Default epsilon in nats: ``epsilon_factor`` x the median shift of natural thoughts on test positives."""
        assert self.behaviour is not None
        threat = Threat()
        shifts = self.behaviour.prior_shifts(self.prior(threat), self.positives, (*self.key(threat), 1.0))
        return self.epsilon_factor * float(np.median(shifts))

    @cached_property
    def resamples(self) -> Resamples:
        """The bootstrap that every probe and threat shares."""
        calibration = self.testbed.splits["calibration"]
        largest = max(len(self.items), len(self.negatives) * self.negatives.shape[1])
        return Resamples.draw(
            self.items.groups,
            self.items.labels,
            calibration.groups[calibration.labels == 0],
            self.test.shape[1],
            replicates=int(np.clip(_BOOTSTRAP_CELLS // largest, 100, self.replicates)),
            seed=self.seed,
        )

    def key(self, threat: Threat) -> tuple[str, str]:
        """Name of the threat's prior and of its tail."""
        name = f"{threat.scope}/{threat.prior}" if threat.prior == "natural" else f"isotropic{threat.c:g}"
        return name, threat.tail

    def prior(self, threat: Threat, *, shrink: float = 1.0, scale: float = 1.0) -> EllipticalPrior:
        """The threat's prior, with its tail; made once."""
        key = (*self.key(threat), shrink)
        if key not in self._priors:
            if threat.tail != "gaussian":
                made = self.prior(_gaussian(threat), shrink=shrink).with_tail(self.tail(threat.tail))
            elif threat.prior == "isotropic":
                made = isotropic(self.prior(Threat()), threat.c)
            elif self.given_prior is not None:
                # the threat's name says the tail; the prior's own is the best-fitting one
                made = self.given_prior.with_tail(Gaussian())
            else:
                made = natural(self.train[self.plain_train], scope=threat.scope, shrink=shrink)
            self._priors[key] = made
        prior = self._priors[key]
        return prior if scale == 1.0 else prior.scaled(scale)

    def tail(self, name: str) -> Tail:
        """A tail by its name in a threat; ``best`` is the best-fitting elliptical heavy tail."""
        if name == "logistic":
            return Logistic()
        if name == "best" and self.given_prior is not None and self.given_prior.tail.extra:
            return self.given_prior.tail
        if name == "best":
            return self.tail_fit.best_elliptical if self.tail_fit is not None else Logistic()
        if name == "student_t":
            fitted = self.tail_fit.best_elliptical if self.tail_fit is not None else None
            return fitted if isinstance(fitted, StudentT) else StudentT(5.0)
        return Gaussian()

    @cached_property
    def tail_fit(self) -> TailFit | None:
        """Tails fitted along random, principal and class-mean directions; ``None`` with too few contexts."""
        if self.train.shape[1] < 3:
            return None
        means, labels = self.train[self.plain_train].mean(axis=1), self.training.labels[self.plain_train]
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, 0x7A11]))
        return self.fit_tails_along(
            {
                "random": rng.standard_normal((16, means.shape[-1])),
                "principal": self.prior(Threat()).factor.T[:8],
                "class means": (means[labels == 1].mean(axis=0) - means[labels == 0].mean(axis=0))[None, :],
            }
        )

    def fit_tails_along(self, directions: dict[str, np.ndarray]) -> TailFit:
        """Tails fitted along groups of directions ``(k, d)``, on training items under the prior's contexts."""
        return fit_tails(self.train[self.plain_train], self.prior(Threat()), directions)

    @cached_property
    def flags(self) -> tuple[Flag, ...]:
        """Flags of the data themselves."""
        leaked = check_splits(self.testbed.splits)
        found = [flag("leak", f"{len(leaked)} entities cross splits, e.g. {leaked[0]}")] if leaked else []
        for split in ("calibration", "test"):
            copies = near_copies(self.origins("train"), self.origins(split))
            if copies:
                found.append(flag("leak", f"at least {copies} {split} items are nearly the same as a training item"))
        few, share = _largest(self.origins("train"))
        if share >= _MASSIVE:
            found.append(
                flag("massive_dimensions", f"{few} of {self.train.shape[-1]} hold {share:.1%} of the variance")
            )
        if self.fit is self.train and self.train.shape[1] > 1:
            found.append(flag("shared_contexts", f"{self.train.shape[1]} contexts"))
        return tuple(found)


def _largest(rows: np.ndarray) -> tuple[int, float]:
    """How many dimensions are a few of ``rows (n, d)``, and the share of the variance that the largest few hold."""
    dim = rows.shape[1]
    few = max(1, dim // 100)
    variance = np.sort(rows.var(axis=0, dtype=float))
    # of fewer than ten dimensions one is not a few of many
    return few, float(variance[-few:].sum() / max(variance.sum(), np.finfo(float).tiny)) if dim >= 10 else 0.0


def prepare(
    testbed: Testbed,
    *,
    seed: int = 0,
    prior: EllipticalPrior | None = None,
    n_verify: int = 64,
    replicates: int = 1000,
    progress: Any = None,
) -> Prepared:
    """Do a testbed's long work once and check its activations.

    Raises:
        TypeError: no testbed, or a prior that is none.
        ValueError: settings that are none; activations with NaN or inf, or constant ones; a split with one class only;
            a prior of another width.
    """
    if not all(callable(getattr(testbed, name, None)) for name in ("prepare", "activations", "shift")):
        raise TypeError(
            f"expected a testbed, e.g. elk_stress.core.registry.load('testbeds', 'linear'), got {shown(testbed)}; "
            "arrays are stressed by elk_stress.stress_activations"
        )
    seed, n_verify, replicates = setting("seed", seed), setting("n_verify", n_verify), setting("replicates", replicates)
    if prior is not None and not isinstance(prior, EllipticalPrior):
        raise TypeError(
            f"a prior is an elk_stress.threats.priors.EllipticalPrior, made of a factor (d, rank); got {shown(prior)}"
        )
    testbed.prepare(progress)
    if prior is not None and prior.width != testbed.dim:
        raise ValueError(
            f"the prior {prior.name!r} moves {prior.width} features but {testbed.name} gives {testbed.dim} at "
            f"{testbed.site}; give a factor of shape ({testbed.dim}, rank)"
        )
    splits = testbed.splits
    for split in ("test",):
        if len(np.unique(splits[split].labels)) < 2:
            raise ValueError(f"the {split} split holds one class only; it needs positives and negatives")
    found: dict[SplitName, np.ndarray] = {name: testbed.activations(name) for name in ("train", "calibration", "test")}
    for name, activations in found.items():
        if len(activations):
            check_activations(activations, f"{name} activations")
    try:
        fit = testbed.activations("train", "fit")
    except LookupError:
        fit = found["train"]
    if prior is None:
        # a testbed may know how its items move instead of having it estimated
        prior = getattr(testbed, "prior", None)
    try:
        observed: np.ndarray | None = testbed.activations("test", "observed")
        bare: np.ndarray | None = testbed.activations("calibration", "bare")
    except LookupError:
        observed = bare = None
    return Prepared(
        testbed,
        seed,
        fit,
        found["train"],
        found["calibration"],
        found["test"],
        bare,
        observed if observed is not None and observed.shape[1] > 0 else None,
        given_prior=prior,
        n_verify=n_verify,
        replicates=replicates,
    )


def fit_probe(prepared: Prepared, probe: FittedProbe | Probe | str | np.ndarray) -> FittedProbe:
    """Fit a probe on training items as the prior moves them: every item under every context for fitting, a row each.

    The prior is fitted on other contexts: a probe learns to ignore the very contexts that it saw, so what it would seem
    to survive on these says nothing about new ones.

    Contrast pairs come along for probes that need them; other probes see affirmed statements only.

    Raises:
        ValueError: a fitted probe of another width; scores that are random or depend on the batch
            (:mod:`elk_stress.probing.rowwise`).
    """
    from elk_stress.core import registry

    if isinstance(probe, str) and probe in PLANTED and probe in prepared.testbed.known_probes():
        probe = prepared.testbed.known_probes()[probe]
    recipe = registry.load("probes", probe) if isinstance(probe, str) else probe
    tokens = tokens_of(prepared.testbed)
    if isinstance(recipe, (FittedProbe, np.ndarray)):
        fitted = as_fitted(recipe, site=prepared.testbed.site)
        if tokens is not None and fitted.dim == prepared.testbed.dim // tokens:
            fitted = flatten(fitted, tokens)
        if fitted.dim is not None and fitted.dim != prepared.testbed.dim:
            raise ValueError(
                f"probe {fitted.name!r} was fitted on {fitted.dim} features (site {fitted.site or 'unknown'}) but "
                f"{prepared.testbed.name} gives {prepared.testbed.dim} at {prepared.testbed.site}; refit it there"
            )
        # a testbed may give its activations relative to an origin
        origin = getattr(prepared.testbed, "origin", None)
        check_scores(fitted, prepared.trial_rows if origin is None else prepared.trial_rows + origin)
        return fitted if origin is None else moved(fitted, origin)
    check_recipe(recipe)
    train = prepared.training
    contexts = prepared.fit.shape[1]
    if recipe.traits.needs_pairs and train.pairs is not None:
        rows = np.arange(len(prepared.fit))
        pairs = np.concatenate([train.pairs * contexts + c for c in range(contexts)])
    else:
        rows, pairs = prepared.plain_train, None
    activations = prepared.fit[rows].reshape(-1, prepared.fit.shape[-1])
    labels = np.repeat(train.labels[rows], contexts)
    if tokens is not None:
        # recipes that are laid out over all reads already fit themselves on what they read
        activations = activations if isinstance(recipe, Flat) else read(activations, tokens, recipe)
    prior, behaviour = None, None
    if recipe.traits.needs_prior:
        prior = prepared.known_thoughts
    if recipe.traits.needs_behaviour and prepared.train_behaviour is not None:
        behaviour = prepared.known_behaviour
    if tokens is not None and not recipe.traits.tokens and not isinstance(recipe, Flat):
        # a probe of one read knows how that one moves
        last = prepared.testbed.dim // tokens
        prior = prior and replace(prior, factor=prior.factor[-last:])
        behaviour = None if behaviour is None else behaviour[..., -last:]
    fitted = as_fitted(
        recipe,
        activations,
        labels,
        pairs=pairs,
        prior=prior,
        behaviour=behaviour,
        seed=prepared.seed,
        site=prepared.testbed.site,
    )
    fitted = fitted if tokens is None or isinstance(recipe, Flat) else flatten(fitted, tokens)
    check_scores(fitted, prepared.trial_rows)
    return fitted


def check_scores(fitted: FittedProbe, rows: np.ndarray) -> None:
    """Refuse scores that are random or depend on the batch (:mod:`elk_stress.probing.rowwise`), tried on ``rows (n,
    d)``."""
    check_rows(lambda x: fitted.score(x), rows, fitted.name, resolution=resolution(fitted), coarsest=_COARSEST)


def _gaussian(threat: Threat) -> Threat:
    return replace(threat, tail="gaussian")
