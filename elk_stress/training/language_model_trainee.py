r"""A language model as a trainee: its weights move through low-rank adapters.

Prior: Gaussian noise on the whole adapted matrices, ``W_t + sigma_t Z_t`` with ``sigma_t = s rms(W_t)`` (by default
queries and values of every block up to the site, as in the original LoRA experiments), and s the largest for which
the median over draws of the mean behaviour shift is ``epsilon / 3``. *It covers the adapted matrices only*: bits are
relative to that.

A move is ``delta W_t = B_t A_t``; in standard normal coordinates ``u_t = delta W_t / sigma_t``, so

``r^2 = sum_t ||B_t A_t||^2 / sigma_t^2``  and  ``spent = r^2 / (2 ln 2)`` bits.

Noise has full rank, is drawn per (seed, draw, matrix) when needed and never stored. All models start at the same
point (B = 0): they differ in the initialization of A and, by the attack, in the order of the data.

Behaviour: KL(original, moved) of the next-token distribution in nats, mean over all tokens of fixed neutral texts
that no attack trains on. Activations: at the testbed's site at the last token of the bare statements, for fitting,
attack and test.

Shapes: weights flat ``(strengths, models, n_parameters)`` float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from elk_stress.models import contexts as neutral
from elk_stress.models.adapters import AdaptedModel, divergence
from elk_stress.probing.probe import Traits
from elk_stress.testbeds.defence_knowledge import knowledge_of
from elk_stress.testbeds.protocol import Items, SplitName, Testbed
from elk_stress.training.low_rank_prior import LowRankPrior
from elk_stress.training.organism_trainee import DEFAULT_EPSILON
from elk_stress.training.prior_scale import calibrate
from elk_stress.training.protocols import Subject
from elk_stress.training.trainee_texts import limited, true_statements

if TYPE_CHECKING:
    from elk_stress.models.language_model import LanguageModel
    from elk_stress.testbeds.statements import Statements

__all__ = ["LoraTrainee"]

_BEHAVIOUR_TEXTS = 32
_ORDINARY_CONTEXTS, _ORDINARY_STATEMENTS = 90, 166
# keeps these draws apart from those of other purposes
_INITIAL = 0x1A17


class LoraTrainee:
    """A causal language model whose adapters may be trained.

    Args:
        model: the language model; left as it is.
        splits: probe items with texts.
        site: where activations are read, ``layers.N``.
        ordinary: texts that an attack may train on.
        behaviour: other texts, on which the shift is judged.
        name: of the testbed.
        n_models: seeds of the adapters.
        epsilon: nats per token.
        seed: of adapters and noise.
        rank: of the adapters.
        matrices: linear layers to adapt in every block up to the site.
        n_draws: draws of the prior that calibrate its scale.
        scale: s, if it is known already; else it is calibrated when first needed.
        scale_factor: multiplies s (for bits against the prior's scale).
        testbed: what a defence that needs natural thoughts or behaviour is told of; it must read the same site.
        facts: what else :meth:`describe` should say.
    """

    subject: Subject = "language_model"

    def __init__(
        self,
        model: LanguageModel,
        splits: Mapping[SplitName, Items],
        site: str,
        *,
        ordinary: Sequence[str],
        behaviour: Sequence[str],
        name: str = "language_model",
        n_models: int = 2,
        epsilon: float = DEFAULT_EPSILON,
        seed: int = 0,
        rank: int = 8,
        matrices: Sequence[str] = ("q_proj", "v_proj"),
        n_draws: int = 9,
        scale: float | None = None,
        scale_factor: float = 1.0,
        testbed: Testbed | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        if not epsilon > 0:
            raise ValueError(f"epsilon is a positive number of nats, got {epsilon}")
        if n_models < 1 or n_draws < 1 or rank < 1:
            raise ValueError(f"n_models, n_draws and rank are at least 1, got {n_models}, {n_draws} and {rank}")
        if shared := set(ordinary) & set(behaviour):
            raise ValueError(
                f"{len(shared)} texts are both trained on and judged by, e.g. {min(shared)!r}; behaviour needs others"
            )
        if missing := [split for split, items in splits.items() if items.texts is None]:
            raise ValueError(f"the items of {', '.join(missing)} have no texts; a language model reads texts")
        self.name, self.site, self.n_models, self.epsilon = name, site, n_models, epsilon
        self.splits, self.seed, self.n_draws, self.scale_factor = splits, seed, n_draws, scale_factor
        self.adapted = AdaptedModel(model, site, matrices, rank)
        self._prior = LowRankPrior(self.adapted.matrices, rank, seed)
        self.ordinary = tuple(ordinary)
        self.ordinary_rows = self.adapted.reader.tokenize(self.ordinary)
        self._behaviour_rows = self.adapted.reader.tokenize(behaviour)
        self._given_scale = scale
        self._testbed = testbed
        self._known: dict[Traits, Mapping[str, Any]] = {}
        self._facts = dict(facts or {})

    @classmethod
    def of(
        cls,
        testbed: Statements,
        *,
        n_models: int = 2,
        epsilon: float = DEFAULT_EPSILON,
        seed: int = 0,
        n_items: int | None = 120,
        negations: bool = False,
        **options: Any,
    ) -> LoraTrainee:
        """The model and the items of a :class:`~elk_stress.testbeds.statements.Statements` testbed.

        Args:
            testbed: its site is chosen if need be; contexts are not read.
            n_models, epsilon, seed, options: see the class.
            n_items: at most so many items per split (whole quads, both labels), so that one reading takes seconds.
            negations: keep the negated partners of training items, which only probes with contrast pairs need.

        Attacks train on neutral contexts A and true statements of other relations; behaviour is judged on contexts B.
        """
        model = testbed._loaded()
        if model.silent:
            raise TypeError(f"weights are trained and judged by what the model says next: {model.silent}")
        if not testbed._site:
            # not testbed.site: that would read every item under every context, and only bare items are needed
            testbed._choose_site(model, None)
        splits = {
            split: limited(items, n_items, negations and split == "train") for split, items in testbed.splits.items()
        }
        own = None if testbed._options["data"] is not None else str(testbed._options["relation"])
        ordinary = (*neutral.contexts("prior", _ORDINARY_CONTEXTS), *true_statements(own, _ORDINARY_STATEMENTS, seed))
        told = {key: value for key, value in testbed._options.items() if value is not None}
        return cls(
            model,
            splits,
            testbed._site,
            ordinary=ordinary,
            behaviour=neutral.contexts("observed", _BEHAVIOUR_TEXTS),
            name=testbed.name,
            n_models=n_models,
            epsilon=epsilon,
            seed=seed,
            testbed=testbed,
            facts={"testbed": testbed.name, **{key: str(value) for key, value in told.items()}},
            **options,
        )

    # -- weights and the prior ----------------------------------------------------------------------------------------

    @property
    def n_parameters(self) -> int:
        """Flat weights of one model."""
        return self.adapted.n_parameters

    @cached_property
    def original(self) -> np.ndarray:
        """``(models, n_parameters)``: fresh adapters, which change nothing."""
        states = [np.random.SeedSequence([self.seed, _INITIAL, m]) for m in range(self.n_models)]
        return np.stack([self.adapted.initial(int(state.generate_state(1)[0])) for state in states])

    @cached_property
    def calibration(self) -> Mapping[str, Any]:
        """``scale`` (s), and unless it was given: ``scales``, ``median_shift``, ``shifts`` per draw, ``target``."""
        if self._given_scale is not None:
            return {"scale": self._given_scale}
        return calibrate(self._shifts_of_draws, self.epsilon / 3)

    @property
    def sigma(self) -> np.ndarray:
        """``(matrices,)``: the prior's standard deviation of every adapted matrix."""
        return self._prior.unit * float(self.calibration["scale"]) * self.scale_factor

    def length(self, weights: np.ndarray) -> np.ndarray:
        """``(strengths, models)``: r."""
        return self._prior.length(self._checked(weights), self.sigma)

    def along(self, weights: np.ndarray, noise: int) -> np.ndarray:
        """``(strengths, models)``: ``z . u / r``; 0 for a move of length 0, which has no direction."""
        return self._prior.along(self._checked(weights), self.sigma, noise)

    def scaled(self, weights: np.ndarray, factor: np.ndarray) -> np.ndarray:
        """Weights whose ``B A`` is ``factor (strengths, models)`` times as long: B carries the factor."""
        return self._prior.scaled(self._checked(weights), factor)

    def knowledge(self, model: int, traits: Traits) -> Mapping[str, Any]:
        """What a defence may know of the language model, which is the same for all seeds.

        Raises:
            ValueError: the trainee was made without a testbed, or from one that reads another site.
        """
        if self._testbed is None or self._testbed.site != self.site:
            raise ValueError(
                "this probe is fitted with natural thoughts or with what behaviour depends on; make the trainee with "
                "LoraTrainee.of(testbed), or give a testbed of the same site"
            )
        if traits not in self._known:
            self._known[traits] = knowledge_of(self._testbed, traits)
        return self._known[traits]

    # -- what happens when weights move -------------------------------------------------------------------------------

    def activations(self, weights: np.ndarray, split: SplitName, noise: int | None = None) -> np.ndarray:
        """``(strengths, models, n_items, dim)`` float32 at the last token of the bare items."""
        texts = self.splits[split].texts or ()
        with self._disturbed(noise):
            return self._per_cell(weights, lambda: self.adapted.read(texts))

    def shift(self, weights: np.ndarray, noise: int | None = None) -> np.ndarray:
        """``(strengths, models)``: mean KL to the original in nats per token over the behaviour texts."""
        reference = self._behaviour_reference
        # the reference comes first: it is of the original, undisturbed
        with self._disturbed(noise):
            return self._per_cell(weights, lambda: self._shift(reference))

    @cached_property
    def ordinary_reference(self) -> list[Any]:
        """The original's last hidden states ``(tokens, dim)`` of every ordinary text."""
        reference: list[Any] = [None] * len(self.ordinary)
        # fixed batches: what a text's neighbours are must not depend on when a run was resumed
        for batch, hidden in self._original_hidden(self.ordinary_rows):
            sizes = [len(self.ordinary_rows[i]) for i in batch]
            for i, piece in zip(batch, hidden.split(sizes), strict=True):
                reference[i] = piece.clone()
        return reference

    def describe(self) -> Mapping[str, Any]:
        """Model, data, sizes, the prior's scale and its calibration curve."""
        reader = self.adapted.reader
        return {
            **self._facts,
            "n_items": {split: len(items) for split, items in self.splits.items()},
            "n_positive": {split: int(items.labels.sum()) for split, items in self.splits.items()},
            "site": self.site,
            "activations": "last token of the bare item",
            "behaviour": "KL in nats per token, mean over all tokens of neutral texts that no attack trains on",
            "n_behaviour_texts": len(self._behaviour_rows),
            "n_behaviour_tokens": sum(map(len, self._behaviour_rows)),
            "n_ordinary_texts": len(self.ordinary),
            "epsilon": self.epsilon,
            "prior": "Gaussian around the weights, per-matrix scale; it covers the adapted matrices only",
            "adapted": sorted({m.name.rsplit(".", 1)[-1] for m in self.adapted.matrices}),
            "n_matrices": len(self.adapted.matrices),
            "n_prior_weights": sum(math.prod(m.shape) for m in self.adapted.matrices),
            "rank": self.adapted.rank,
            "n_parameters": self.n_parameters,
            "n_models": self.n_models,
            "seed": self.seed,
            "scale_factor": self.scale_factor,
            "calibration": dict(self.calibration),
            "bits_per_unit_of_length_squared": 1 / (2 * math.log(2)),
            "subject": {"dtype": reader.dtype, "device": reader.device, "onednn": reader.onednn},
        }

    # -- private ------------------------------------------------------------------------------------------------------

    def _checked(self, weights: np.ndarray) -> np.ndarray:
        if weights.ndim != 3 or weights.shape[1:] != (self.n_models, self.n_parameters):
            raise ValueError(
                f"weights must have shape (strengths, {self.n_models} models, {self.n_parameters}), got {weights.shape}"
            )
        return np.asarray(weights, dtype=np.float32)

    def _disturbed(self, noise: int | None) -> Any:
        return nullcontext() if noise is None else self._noisy(noise, self.sigma)

    @contextmanager
    def _noisy(self, draw: int, sigma: np.ndarray) -> Iterator[None]:
        with self.adapted.disturbed(sigma.tolist(), lambda t: self._prior.noise(draw, t)):
            yield

    def _per_cell(self, weights: np.ndarray, measure: Callable[[], Any]) -> np.ndarray:
        """``measure`` of every cell; all cells that have not moved are one and the same."""
        cells = self._checked(weights)
        unmoved = None
        rows = []
        for cell in cells.reshape(-1, self.n_parameters):
            still = not any(cell[matrix.b].any() for matrix in self.adapted.matrices)
            if still and unmoved is not None:
                rows.append(unmoved)
                continue
            self.adapted.load(cell)
            rows.append(measure())
            unmoved = rows[-1] if still else unmoved
        return np.stack(rows).reshape(*cells.shape[:2], *np.shape(rows[0]))

    def _shift(self, reference: list[tuple[list[int], Any]]) -> float:
        import torch

        total, count = 0.0, 0
        with torch.no_grad():
            for batch, log_p in reference:
                log_q = self.adapted.log_p(self.adapted.last_hidden([self._behaviour_rows[i] for i in batch]))
                each = divergence(log_p, log_q)
                total, count = total + float(each.double().sum()), count + len(each)
        return total / count

    @cached_property
    def _behaviour_reference(self) -> list[tuple[list[int], Any]]:
        """Per batch, log-probabilities ``(tokens, vocabulary)``: read often, so the head runs once."""
        return [(batch, self.adapted.log_p(hidden)) for batch, hidden in self._original_hidden(self._behaviour_rows)]

    def _original_hidden(self, rows: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], Any]]:
        """Batches of rows and the original's last hidden states of each."""
        import torch

        kept = self.adapted.flat()
        self.adapted.load(self.original[0])
        try:
            with torch.no_grad():
                for batch in self.adapted.batches(rows):
                    yield batch, self.adapted.last_hidden([rows[i] for i in batch])
        finally:
            self.adapted.load(kept)

    def _shifts_of_draws(self, scale: float) -> np.ndarray:
        """``(n_draws,)`` shifts of the original under noise of one scale."""
        reference = self._behaviour_reference
        self.adapted.load(self.original[0])
        shifts = []
        for draw in range(self.n_draws):
            with self._noisy(-1 - draw, scale * self._prior.unit):
                shifts.append(self._shift(reference))
        return np.array(shifts)
