r"""Token prefix: real tokens before the statement, the same for all, found by search.

Threat model: the attacker chooses what T tokens precede every statement, instead of a neutral context, and learns on
training positives: ``loss(p) = mean_i softplus(score_i - threshold)``, plus ``behaviour`` x the nats beyond epsilon
where behaviour is constrained. From a random prefix, in each step n candidates are tried and the best is kept, if it is
better. The own prior is uniform over prefixes of T tokens; each search spends at most, of ``T log2 V`` bits in all:

gradient     greedy coordinate gradient (Zou et al. 2023, 2307.15043): a candidate replaces the token at one random
             position by a random one of the ``top`` that the gradient ranks best there. Designed: ``T log2 V``.
substitute   the same with any token, from scores alone: replacing one token at random leaves the prior as it was, so
             what is selected among n candidates and the present one spends ``log2(n + 1)`` a step.
independent  fresh prefixes from the prior, as many in all: best of N, ``log2 N`` bits. What a search must beat.

Judged on held-out test items; applies to language models only. Shapes: prefixes ``(n, T)``, gradient ``(T, V)``.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from elk_stress.thoughts.attacks.model_access import ModelAccess
from elk_stress.thoughts.attacks.prefixes import evasion_loss, evasion_slope, natural_epsilon, prefix_edit, sentences
from elk_stress.thoughts.attacks.protocol import Access, Need, Oracle, Proposal, Scope

__all__ = ["TokenPrefix", "TokenPrefixRandom", "TokenPrefixSearch"]

# candidates of a step whose behaviour is checked, where it is constrained: each costs whole forward passes
_CHECKED = 4


@dataclass(frozen=True)
class TokenPrefix:
    """One prefix of real tokens before every statement: greedy coordinate gradient, or a search by scores alone.

    Attributes:
        search: ``"gradient"``, ``"substitute"`` or ``"independent"``.
        length: T, tokens of the prefix.
        steps, candidates: candidates are tried together in each step.
        sentences: training positives that it is learned on, at most.
        top: tokens per position that the gradient leaves to choose among.
        behaviour: weight of the nats beyond epsilon.
    """

    search: Literal["gradient", "substitute", "independent"] = "gradient"
    length: int = 8
    steps: int = 20
    candidates: int = 32
    sentences: int = 8
    top: int = 64
    behaviour: float = 1.0

    name: ClassVar[str] = "token_prefix"
    scopes: ClassVar[tuple[Scope, ...]] = ("item",)
    needs: ClassVar[tuple[Need, ...]] = ("model_access", "model")
    # what it does to the site is scored under natural thoughts
    priors: ClassVar[tuple[str, ...]] = ("natural",)

    def __post_init__(self) -> None:
        if self.search not in ("gradient", "substitute", "independent"):
            raise ValueError(f"search is {self.search!r}; expected 'gradient', 'substitute' or 'independent'")

    @property
    def access(self) -> Access:
        """Gradients where the search takes them, else scores."""
        return "gradient" if self.search == "gradient" else "score"

    def propose(self, oracle: Oracle, *, seed: int) -> Proposal:
        """Search on training positives; same seed, same start, sentences and candidates.

        Raises:
            LookupError: the testbed is no language model.
        """
        model_access = oracle.model_access
        rng = np.random.default_rng(np.random.SeedSequence(seed))
        items, epsilon = sentences(model_access, self.sentences, rng), natural_epsilon(model_access)
        hunt = _Hunt(self, model_access, model_access.model("train"), items, epsilon, rng)
        return self._as_proposal(model_access, hunt.best(), hunt.epsilon, self.spent(len(hunt.model.vocabulary)))

    def control(self, oracle: Oracle, proposal: Proposal, *, seed: int) -> Proposal:
        """The benign control: a random prefix of the same length; asks the probe nothing and spends nothing."""
        model_access = oracle.model_access
        rng = np.random.default_rng(np.random.SeedSequence([seed, 0xC0]))
        return self._as_proposal(
            model_access,
            rng.choice(model_access.model("train").vocabulary, self.length),
            natural_epsilon(model_access),
            0.0,
        )

    def spent(self, vocabulary: int) -> float:
        """Bits that the search spends at most, with ``vocabulary`` tokens to choose among."""
        designed = self.length * math.log2(vocabulary)
        if self.search == "gradient":
            return designed
        if self.search == "substitute":
            return min(designed, self.steps * math.log2(self.candidates + 1))
        return min(designed, math.log2(self.steps * self.candidates + 1))

    def _as_proposal(
        self, model_access: ModelAccess, prefix: np.ndarray, epsilon: float | None, spent: float
    ) -> Proposal:
        def read(behind: Any, items: np.ndarray) -> np.ndarray:
            return np.asarray(behind.read_tokens(prefix[None], items)[0])

        def shift(behind: Any, items: np.ndarray) -> np.ndarray:
            return np.asarray(behind.shift_tokens(prefix, items))

        return model_access.propose(prefix_edit(model_access, read, shift, epsilon), spent=spent)


@dataclass
class _Hunt:
    """One search: what is learned on, and what counts as kept."""

    recipe: TokenPrefix
    model_access: ModelAccess
    model: Any
    items: np.ndarray
    epsilon: float | None
    rng: np.random.Generator

    def best(self) -> np.ndarray:
        """``(T,)``: the best prefix found."""
        recipe, words = self.recipe, self.model.vocabulary
        prefix = self.rng.choice(words, recipe.length)
        _, lowest = self._least(prefix[None])
        ranked: np.ndarray | None = None
        for _ in range(recipe.steps):
            if recipe.search == "independent":
                tried = self.rng.choice(words, (recipe.candidates, recipe.length))
            elif recipe.search == "substitute":
                tried = self._substitutes(prefix, np.broadcast_to(words, (recipe.length, len(words))))
            else:
                ranked = self._ranked(prefix) if ranked is None else ranked
                tried = self._substitutes(prefix, ranked)
            found, value = self._least(tried)
            if value < lowest:
                prefix, lowest, ranked = found, value, None
        return np.asarray(prefix)

    def _substitutes(self, prefix: np.ndarray, choice: np.ndarray) -> np.ndarray:
        """``(n, T)``: the prefix with one token replaced by one of ``choice (T, options)`` at its position."""
        n = self.recipe.candidates
        tried = np.repeat(prefix[None], n, axis=0)
        position = self.rng.integers(len(prefix), size=n)
        tried[np.arange(n), position] = choice[position, self.rng.integers(choice.shape[1], size=n)]
        return tried

    def _ranked(self, prefix: np.ndarray) -> np.ndarray:
        """``(T, top)`` tokens that lower the loss most at each position, to first order."""

        def loss(activations: Any) -> Any:
            return (activations * evasion_slope(self.model_access, activations)).sum()

        _, slope = self.model.token_gradient(prefix, self.items, loss)
        order = np.argsort(slope, axis=1, kind="stable")[:, : self.recipe.top]
        return np.asarray(self.model.vocabulary[order])

    def _least(self, prefixes: np.ndarray) -> tuple[np.ndarray, float]:
        """The best of ``prefixes (n, T)`` and its loss."""
        activations = self.model.read_tokens(prefixes, self.items)
        scores = self.model_access.score(activations.reshape(-1, activations.shape[-1])).reshape(len(prefixes), -1)
        losses = evasion_loss(scores, self.model_access.threshold)
        order = np.argsort(losses, kind="stable")
        if self.epsilon is not None:
            order = order[:_CHECKED]
            for i in order:
                excess = np.maximum(self.model.shift_tokens(prefixes[i], self.items) - self.epsilon, 0.0)
                losses[i] += self.recipe.behaviour * excess.mean()
        chosen = order[losses[order].argmin()]
        return prefixes[chosen], float(losses[chosen])


@dataclass(frozen=True)
class TokenPrefixSearch(TokenPrefix):
    """The same by scores alone: random substitutions of one token, the best kept."""

    search: Literal["gradient", "substitute", "independent"] = "substitute"

    name: ClassVar[str] = "token_prefix_search"


@dataclass(frozen=True)
class TokenPrefixRandom(TokenPrefix):
    """The best of as many random prefixes: what a search must beat."""

    search: Literal["gradient", "substitute", "independent"] = "independent"

    name: ClassVar[str] = "token_prefix_random"


if __name__ == "__main__":
    from elk_stress.cli.script import run_attack

    sys.exit(run_attack(TokenPrefix.name))
