"""True and false statements read by a real language model; the monitor must catch the false ones.

Items are statements from packaged facts (:mod:`elk_stress.testbeds.facts`) or a user's own (``data``). Every item is
read alone (``bare``) and after neutral contexts (:mod:`elk_stress.models.contexts`): A for the prior, B for
observation, disjoint. The activation is the one at the item's last token at one site.

Splits. No entity crosses. ``demo`` has 80 items (24 train, 32 calibration of which 24 negative, 24 test) and 8 + 8
contexts, ``full`` 400 items (120, 160 of which 120 negative, 120) and 32 + 32 contexts. Train and test are balanced and
free of surface cues. The train split holds the affirmed items first and then the negated form of each with its label
flipped, linked by ``pairs``. Probes that need contrast pairs get both; the engine fits all others on the first halves
of the pairs, the affirmed ones. Calibration and test are affirmed only.

Site. ``auto`` picks the site whose logistic probe has the best AUROC in cross-validation (folds of whole quads, bare
statements) over the affirmed train items and further statements about entities of the train side that are in no
other split; calibration and test are never looked at.

Behaviour. :meth:`Statements.shift` hosts every item in one context of A (the medoid: the context whose mean activation
is nearest to the mean over contexts), replaces its last token's activation by ``origin + move`` and measures nats per
token over the next token and 8 more (:mod:`elk_stress.models.patched`). The origin is the item's mean over A.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from elk_stress.core.extras import need
from elk_stress.core.settings import setting
from elk_stress.models import contexts as neutral
from elk_stress.probing.probe import FittedProbe
from elk_stress.testbeds import facts
from elk_stress.testbeds.protocol import ContextSet, Items, SplitName
from elk_stress.testbeds.user_data import load_jsonl

if TYPE_CHECKING:
    from elk_stress.models.language_model import LanguageModel
    from elk_stress.models.patched import MovedModel
    from elk_stress.models.prefixed import PrefixedModel

__all__ = ["Statements"]

# (items, contexts in all, layers considered by "auto": every n-th, score vectors of the Fisher form)
_SIZES = {"demo": (80, 16, 3, 32), "full": (400, 64, 1, 64)}
# shares of the contexts: for fitting probes and for the prior (together A), for observation (B)
_CONTEXT_SHARES = (3 / 16, 7 / 16, 6 / 16)
# further quads of the train side that help to choose the site
_SITE_QUADS = 40
_SITE_FOLDS = 5
# the first and last few blocks hold words, not facts: outside of these shares of the depth nothing is tried
_SITE_RANGE = (0.3, 0.9)


class Statements:
    """True and false statements and a real language model that reads them.

    Args:
        size: ``"demo"`` or ``"full"``.
        relation: which facts (:data:`elk_stress.testbeds.facts.RELATIONS`).
        positive: what the monitor must catch: ``"false"`` statements, or ``"true"`` ones. For ``data``, labels decide:
            where they are two names, this is the one that is caught.
        model: local folder or Hugging Face id; SmolLM2-135M-Instruct by default.
        site: ``"auto"``, ``"embeddings"`` or ``"layers.N"``.
        n_items, n_contexts: override the size's number of items, and of contexts (A and B together; at least 6).
        seed: which facts are drawn and how they are dealt.
        device, dtype: where and in what precision the model runs.
        data: a jsonl file of the user's own items; plain texts, since contexts precede them, not rendered templates.
        threads: torch's threads; all available cores by default.
        tokens: read the last so many tokens of each item instead of the last alone, for probes of tokens (attribute
            ``tokens``, activations flattened to ``tokens * width``). Moves of several tokens at once are not carried
            through the model, so behaviour is not constrained then.
        subject: a model already in memory, instead of ``model``.
        revision: of a model on the hub, a commit, branch or tag.
    """

    name = "statements"

    def __init__(
        self,
        size: Literal["demo", "full"] = "demo",
        relation: str = "city_country",
        positive: str | None = None,
        model: str | Path | None = None,
        site: str = "auto",
        n_items: int | None = None,
        n_contexts: int | None = None,
        seed: int = 0,
        device: str = "cpu",
        dtype: str = "float32",
        data: str | Path | None = None,
        threads: int | None = None,
        tokens: int | None = None,
        subject: LanguageModel | None = None,
        revision: str | None = None,
    ) -> None:
        need("lm", "the testbed statements")
        if size not in _SIZES:
            raise ValueError(f"size must be one of {', '.join(_SIZES)}, got {size!r}")
        if data is None and positive is None:
            positive = "false"
        if data is None and positive not in ("false", "true"):
            raise ValueError(f"positive must be 'false' or 'true', got {positive!r}")
        items, most, self._layer_step, self._rank = _SIZES[size]
        seed = setting("seed", seed)
        tokens, threads = (setting(n, v, optional=True) for n, v in (("tokens", tokens), ("threads", threads)))
        items = setting("n_items", items if n_items is None else n_items)
        total = setting("n_contexts", most if n_contexts is None else n_contexts)
        if total < 6:
            raise ValueError(f"n_contexts must be at least 6 (A: 1 for fitting, 3 for the prior; B: 2), got {total}")
        fitting, observing = max(1, round(_CONTEXT_SHARES[0] * total)), round(_CONTEXT_SHARES[2] * total)
        seen = neutral.contexts("prior", total - observing)
        self._contexts: dict[ContextSet, tuple[str, ...]] = {
            "fit": seen[:fitting],
            "prior": seen[fitting:],
            "observed": neutral.contexts("observed", observing),
        }
        self.tokens = tokens
        self._options = {"size": size, "relation": relation, "positive": positive, "seed": seed, "data": data}
        self._options |= {} if tokens is None else {"tokens": tokens}
        self._model_options: dict[str, Any] = {
            "device": device,
            "dtype": dtype,
            "threads": threads,
            "revision": revision,
        }
        self._model = model
        self._subject = subject
        self._wanted_site = site
        self._site = "" if site == "auto" else site
        self._site_scores: dict[str, float] = {}
        self._seeds = np.random.SeedSequence(seed).spawn(3)
        self._site_items: Items | None = None
        if data is not None:
            self._splits = load_jsonl(data, self._seeds[0], positive)
        else:
            self._splits, self._site_items = _generate(
                facts.relation(relation), items, 1 if positive == "true" else 0, self._seeds[0]
            )
        self._blocks: dict[ContextSet, np.ndarray] = {}
        self._moved: dict[SplitName, MovedModel] = {}
        self._prefixed: dict[SplitName, PrefixedModel] = {}
        self._factors: dict[tuple[SplitName, int], np.ndarray] = {}
        self._host = ""
        # generated statements hold no template
        self._admitted = data is None

    # -- what there is --------------------------------------------------------------------------------------------

    @property
    def site(self) -> str:
        """Where activations are read; with ``"auto"`` known after :meth:`prepare`."""
        if not self._site:
            self.prepare()
        return self._site

    @property
    def dim(self) -> int:
        """Width of the activations, of all tokens that are read."""
        return self._loaded().dim * (self.tokens or 1)

    @property
    def splits(self) -> Mapping[SplitName, Items]:
        """Train (affirmed items, then their negated partners), calibration and test."""
        return self._splits

    @property
    def shift_cost(self) -> Literal["exact", "model", "none"]:
        """Every shift is a forward pass; of several tokens, and of a model that cannot be moved, none is measured."""
        return "none" if self.tokens is not None or self.silent else "model"

    @cached_property
    def silent(self) -> str:
        """Why moves have no output here, tried on a few tokens; empty where they have one."""
        from elk_stress.models.patched import way_to_move

        return _refusal(way_to_move, self._loaded())

    @cached_property
    def no_prefix(self) -> str:
        """Why nothing can be read behind a free prefix, tried on a few tokens; empty where it can."""
        from elk_stress.models.prefixed import way_to_prefix

        return _refusal(way_to_prefix, self._loaded())

    def known_probes(self) -> Mapping[str, FittedProbe]:
        """None: of a real model nobody knows a probe that must survive."""
        return {}

    # -- the long work --------------------------------------------------------------------------------------------

    def prepare(self, progress: Any = None) -> None:
        """Load the model, choose the site, read every item under every context. Idempotent; interrupted work is cached.

        Args:
            progress: a ``rich.progress.Progress`` to which tasks are added, or ``None``.
        """
        if len(self._blocks) == 4:
            return
        load = _Task(progress, "Loading the language model", 1)
        subject = self._loaded()
        load.advance(1)
        if self._site:
            subject.depth(self._site)
        # what this model cannot do, or only slowly, is said before the long reading
        told = {**subject.limits(), **({"behaviour": self.silent} if self.silent else {})}
        if progress is not None:
            for what, line in told.items():
                progress.console.print(f"{what}: {line}", markup=False)
        if not self._site:
            self._choose_site(subject, progress)
        texts = self._texts()
        every = [context for listed in self._contexts.values() for context in listed]
        longest = every[int(np.argmax([len(row) for row in subject.tokenize(every)]))]
        # a text that is too long is refused now, not after an hour of reading
        subject.tokenize([neutral.after(longest, text) for text in texts])
        # only training items are read under the contexts that probes are fitted on
        wanted: dict[ContextSet, list[str]] = {
            "bare": texts,
            "fit": texts[self._rows("train")],
            "prior": texts,
            "observed": texts,
        }
        total = sum(len(self._contexts.get(which, ("",))) * len(listed) for which, listed in wanted.items())
        read = _Task(progress, f"Reading {self._site} under contexts", total)
        for which, listed in wanted.items():
            blocks = []
            for context in self._contexts.get(which, ("",)):
                preceded = [neutral.after(context, text) for text in listed]
                # one block per context: what was read before an interrupt is on disk
                found = subject.read(preceded, [self._site], tokens=self.tokens, advance=read.advance)
                blocks.append(found[self._site].reshape(len(listed), -1))
            made = np.stack(blocks, axis=1)
            # one array serves every caller
            made.flags.writeable = False
            self._blocks[which] = made

    def activations(self, split: SplitName, contexts: ContextSet = "prior") -> np.ndarray:
        """``(n_items, n_contexts, dim)`` float32 at the item's last token, preceded by each context of the set."""
        self.prepare()
        if contexts == "fit" and split != "train":
            raise LookupError(f"only training items are read under the contexts for fitting, not the {split} split")
        return self._blocks[contexts][self._rows(split)]

    # -- behaviour ------------------------------------------------------------------------------------------------

    def shift(self, split: SplitName, items: np.ndarray, moves: np.ndarray) -> np.ndarray:
        """Nats per token over the next token and 8 more: ``items (p,)``, ``moves (p, n, dim)`` -> ``(p, n)``."""
        return self._moved_model(split).shift(np.asarray(items), np.asarray(moves, dtype=np.float32))

    def shift_factor(self, split: SplitName, items: np.ndarray) -> np.ndarray:
        """``(p, rank, dim)``: F with ``shift(move) ~ 0.5 |F move|^2`` near the origin (sampled Fisher, kept)."""
        items = np.asarray(items)
        missing = [i for i in dict.fromkeys(items.tolist()) if (split, i) not in self._factors]
        if missing:
            row = self._rows(split).start
            seeds = [
                np.random.SeedSequence(entropy=self._seeds[2].entropy, spawn_key=(*self._seeds[2].spawn_key, row + i))
                for i in missing
            ]
            found = self._moved_model(split).fisher(np.array(missing), self._rank, seeds)
            self._factors.update({(split, i): factor for i, factor in zip(missing, found, strict=True)})
        return np.stack([self._factors[split, i] for i in items.tolist()])

    @property
    def host_context(self) -> str:
        """The context of A that precedes items whose behaviour is measured: the medoid over train items."""
        if not self._host:
            means = self.activations("train", "prior").mean(axis=0)
            distance = np.linalg.norm(means - means.mean(axis=0), axis=1)
            self._host = self._contexts["prior"][int(distance.argmin())]
        return self._host

    def prefixed(self, split: SplitName) -> PrefixedModel:
        """The model reading the split's items behind any prefix, which takes the place of the host context.

        Raises:
            ValueError: several tokens of an item are read, which a prefix moves otherwise.
            LookupError: the model cannot be read behind one.
        """
        if self.tokens is not None:
            raise ValueError("attacks by prefixes are judged at the last token; make Statements without tokens")
        if self.no_prefix:
            raise LookupError(self.no_prefix)
        if split not in self._prefixed:
            from elk_stress.models.prefixed import PrefixedModel

            texts = self._splits[split].texts or ()
            self._prefixed[split] = PrefixedModel(self._loaded(), self.site, texts, self.host_context)
        return self._prefixed[split]

    def _moved_model(self, split: SplitName) -> MovedModel:
        if split not in self._moved:
            from elk_stress.models.patched import MovedModel

            texts = [neutral.after(self.host_context, text) for text in self._splits[split].texts or ()]
            origins = self.activations(split, "prior").mean(axis=1)
            self._moved[split] = MovedModel(self._loaded(), self.site, texts, origins)
        return self._moved[split]

    # -- what is recorded -----------------------------------------------------------------------------------------

    def describe(self) -> Mapping[str, Any]:
        """Model, data, sizes, versions, how the site was chosen, what behaviour means."""
        automatic = "best grouped cross-validated AUROC of a logistic probe, train side only"
        return {
            "testbed": self.name,
            **{
                name: None if value is None else str(value)
                for name, value in self._options.items()
                # the user's own items are neither generated nor sized here
                if self._options["data"] is None or name not in ("size", "relation", "positive")
            },
            "n_items": {split: len(items) for split, items in self._splits.items()},
            "n_positive": {split: int(items.labels.sum()) for split, items in self._splits.items()},
            "n_contexts": {which: len(listed) for which, listed in self._contexts.items()},
            "site": self.site,
            "site_chosen": automatic if self._wanted_site == "auto" else "given",
            "site_scores": dict(self._site_scores),
            "host_context": self.host_context,
            "behaviour": (
                "KL in nats per token, mean over the next token and 8 greedy tokens from the origin"
                if self.shift_cost == "model"
                else f"none: {self.silent or 'several tokens are read'}"
            ),
            "subject": dict(self._loaded().facts),
            **({"facts": facts.sources()} if self._options["data"] is None else {}),
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "tokenizers")},
        }

    # -- private --------------------------------------------------------------------------------------------------

    def _loaded(self) -> LanguageModel:
        if not self._admitted:
            self._admit()
        if self._subject is None:
            from elk_stress.models.language_model import LanguageModel

            self._subject = LanguageModel(self._model, **self._model_options)
        return self._subject

    def _admit(self) -> None:
        """Refuse texts that no context may precede, by the tokenizer alone, before the model is loaded."""
        if self._subject is not None:
            tokenizer = self._subject.tokenizer
        else:
            from elk_stress.models.loading import load_tokenizer
            from elk_stress.models.sources import resolve
            from elk_stress.models.threads import configure_threads

            configure_threads(self._model_options["threads"])
            found = resolve(self._model, revision=self._model_options["revision"])
            tokenizer = load_tokenizer(found.model_id, found.path)
        from elk_stress.models.special_tokens import templates_in

        brought = [
            (int(name.split()[-1]), name, marker)
            for items in self._splits.values()
            for name, marker in zip(items.ids, templates_in(tokenizer, items.texts or ()), strict=True)
            if marker is not None
        ]
        if brought:
            _, name, marker = min(brought)
            more = f" and {len(brought) - 1} more" if len(brought) > 1 else ""
            raise ValueError(
                f"{self._options['data']}, {name}{more}: the text brings a template of its own ({marker!r}). "
                "Statements are read after neutral contexts, which would stand before the template, outside of every "
                "turn; give the statements without it (a later release takes messages)"
            )
        self._admitted = True

    def _texts(self) -> list[str]:
        return [text for items in self._splits.values() for text in items.texts or ()]

    def _rows(self, split: SplitName) -> slice:
        start = 0
        for name, items in self._splits.items():
            if name == split:
                return slice(start, start + len(items))
            start += len(items)
        raise ValueError(f"no split is called {split!r}; it is one of {', '.join(self._splits)}")

    def _choose_site(self, subject: LanguageModel, progress: Any) -> None:
        train = self._splits["train"]
        partners = train.pairs[:, 1] if train.pairs is not None else np.array([], dtype=np.int64)
        rows = np.setdiff1d(np.arange(len(train)), partners)
        sources = [_subset(train, rows), *([self._site_items] if self._site_items is not None else [])]
        texts = [text for items in sources for text in items.texts or ()]
        labels = np.concatenate([items.labels for items in sources])
        # generated items come in quads of four, each balanced by itself: folds keep them whole
        generated = self._options["data"] is None
        groups = np.arange(len(labels)) // 4 if generated else np.concatenate([items.groups for items in sources])
        depth = len(subject.blocks)
        first, last = (round(share * (depth - 1)) for share in _SITE_RANGE)
        sites = [f"layers.{i}" for i in range(first, last + 1, self._layer_step)]
        task = _Task(progress, f"Choosing among {len(sites)} sites", len(texts))
        read = subject.read(texts, sites, advance=task.advance)
        seed = int(self._seeds[1].generate_state(1)[0])
        self._site_scores = {site: _grouped_auroc(read[site], labels, groups, seed) for site in sites}
        self._site = max(sites, key=lambda site: self._site_scores[site])


def _refusal(attempt: Callable[[LanguageModel], object], subject: LanguageModel) -> str:
    try:
        attempt(subject)
    except TypeError as error:
        return str(error)
    return ""


class _Task:
    """A progress bar, if there is anything to show it on."""

    def __init__(self, progress: Any, description: str, total: int) -> None:
        self._progress = progress
        self._task = None if progress is None else progress.add_task(description, total=total)

    def advance(self, n: int) -> None:
        if self._progress is not None:
            self._progress.update(self._task, advance=n)


def _generate(
    relation: facts.Relation, n_items: int, positive_truth: int, seed: np.random.SeedSequence
) -> tuple[dict[SplitName, Items], Items | None]:
    """Splits of ``n_items`` affirmed items, and what is left of the quads for choosing the site."""
    if n_items < 40:
        raise ValueError(f"n_items must be at least 40 (12 train, 12 calibration negatives, 12 test), got {n_items}")
    balanced = round(0.3 * n_items / 4)
    negatives = 2 * round(0.15 * n_items)
    positives = max(2, n_items - 8 * balanced - negatives)
    # a quad has two negatives
    needed = 2 * balanced + negatives // 2
    quads = facts.draw(relation, needed + _SITE_QUADS, seed, at_least=needed)
    train = [statement for quad in quads[:balanced] for statement in quad]
    test = [statement for quad in quads[balanced : 2 * balanced] for statement in quad]
    pool = [statement for quad in quads[2 * balanced : needed] for statement in quad]
    by_label = {label: [s for s in pool if int(s.true == bool(positive_truth)) == label] for label in (0, 1)}
    calibration = by_label[0][:negatives] + by_label[1][:positives]
    splits: dict[SplitName, Items] = {
        "train": _with_negations(relation, train, positive_truth),
        "calibration": _as_items(calibration, positive_truth),
        "test": _as_items(test, positive_truth),
    }
    rest = [statement for quad in quads[needed:] for statement in quad]
    return splits, _as_items(rest, positive_truth) if rest else None


def _with_negations(relation: facts.Relation, affirmed: Sequence[facts.Statement], positive_truth: int) -> Items:
    """Affirmed items first, the negation of each after them, linked by ``pairs``."""
    negated = [relation.negate(statement) for statement in affirmed]
    both = _as_items([*affirmed, *negated], positive_truth)
    n = len(affirmed)
    pairs = np.stack([np.arange(n), np.arange(n) + n], axis=1)
    return dataclasses.replace(both, pairs=pairs)


def _as_items(listed: Sequence[facts.Statement], positive_truth: int) -> Items:
    return Items(
        ids=tuple(statement.id for statement in listed),
        labels=np.array([int(statement.true == bool(positive_truth)) for statement in listed], dtype=np.int64),
        groups=np.array([statement.entity for statement in listed]),
        texts=tuple(statement.text for statement in listed),
    )


def _subset(items: Items, rows: np.ndarray) -> Items:
    texts = items.texts or ()
    return Items(
        ids=tuple(items.ids[i] for i in rows),
        labels=items.labels[rows],
        groups=items.groups[rows],
        texts=tuple(texts[i] for i in rows),
    )


def _grouped_auroc(activations: np.ndarray, labels: np.ndarray, groups: np.ndarray, seed: int) -> float:
    """AUROC of a logistic probe on held-out folds of whole groups, averaged over folds."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import GroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    folds = GroupKFold(min(_SITE_FOLDS, len(np.unique(groups))), shuffle=True, random_state=seed)
    values, weights = [], []
    for fit, held in folds.split(activations, labels, groups):
        if len(set(labels[fit])) < 2 or len(set(labels[held])) < 2:
            continue
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
        probe.fit(activations[fit], labels[fit])
        values.append(roc_auc_score(labels[held], probe.decision_function(activations[held])))
        weights.append(len(held))
    return float(np.average(values, weights=weights)) if values else 0.5
