r"""Items of a causal model behind a prefix: real tokens, or free embeddings that belong to no token.

Somebody who may write what precedes a statement chooses a prefix of ``T`` tokens (or of ``k`` embedding vectors: a soft
prompt). It *replaces* the neutral context, the host, that precedes the statement when nobody attacks:

.. math:: \text{begin}, p_1 \dots p_T, x_1 \dots x_L \quad\text{instead of}\quad \text{begin}, h_1 \dots h_H, x_1 \dots

``begin`` is whatever the tokenizer puts before every text (a beginning-of-sequence token, or nothing) and ``x`` are the
tokens that the item has after the host. The prefix is a sequence of tokens; its text need not split into the same ones.

All passes go one way: the prefix runs once, its keys and values are shared by all items behind it, and a pass that only
reads ends after the block of the site. So ``m`` prefixes on ``n`` items cost ``m (T + n L)`` tokens instead of
``m n (T + L)``. Gradients flow through the shared keys and values. Where an architecture keeps more than these, or
other things, (:func:`way_to_prefix` tries it) the prefix runs again before every item. Items are padded on the right,
and the model counts positions as it always does.

Behaviour, in nats per token as in :mod:`elk_stress.models.patched`, but by whole forward passes, since a prefix changes
all that comes after it: with ``c`` the 8 tokens of the host run's greedy continuation and ``T = 9``,

.. math:: \mathrm{shift} = \frac1T \sum_{t=1}^{T} KL(p_t(\cdot \mid h, x, c_{<t}) \,\|\, p_t(\cdot \mid p, x, c_{<t}))

Gradient of a loss in the one-hot row of position ``t`` at token ``v``: :math:`E_v \cdot \partial loss / \partial e_t`
with ``E`` the embedding table, which ranks single-token substitutions to first order (greedy coordinate gradient, Zou
et al. 2023, 2307.15043).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from elk_stress.models.contexts import after
from elk_stress.models.language_model import LanguageModel, batches, key_value_pairs
from elk_stress.models.patched import CONTINUATION

__all__ = ["PrefixedModel", "way_to_prefix"]

# tokens of the prefixes that run together
_BATCH_TOKENS = 768
# rows whose logits are kept at once: rows * 9 * vocabulary * 4 bytes, 28 MB with SmolLM2's vocabulary
_ROWS = 16


@dataclass(frozen=True)
class _Past:
    """What precedes items: ``embeds (m, T, e)`` of begin and prefixes, and their keys and values where shared."""

    embeds: Any
    pairs: list[tuple[Any, Any]] | None


class PrefixedModel:
    """Items of one causal model, read at one site at their last token, behind a prefix instead of the host context.

    Args:
        subject: a causal model.
        site: where activations are read.
        texts: the bare items.
        host: the neutral context that precedes them when nobody attacks.
        way: ``cached`` or ``whole`` passes; by default what :func:`way_to_prefix` finds.

    Attributes:
        host_tokens: ``(H,)`` the host as a prefix.

    Raises:
        TypeError: an encoder, or a model that does not read embeddings as it reads tokens.
        ValueError: no such site, an empty host, or a host that shares a token with what follows it.
    """

    def __init__(
        self,
        subject: LanguageModel,
        site: str,
        texts: Sequence[str],
        host: str,
        *,
        way: Literal["cached", "whole"] | None = None,
    ) -> None:
        way = way or way_to_prefix(subject)
        if not host.strip():
            raise ValueError("a prefix replaces the neutral context before the items, but the host is empty; give one")
        self._start(subject, site, way)
        self.host = host
        self._texts = tuple(texts)
        # the host of one item is tokenized alone, to find what the tokenizer puts before every text
        alone, own = subject.tokenize([host])[0], _ordinary(subject, host)
        begin = next((i for i in range(len(alone)) if alone[i : i + len(own)] == own), 0)
        self._begin = alone[:begin]
        before = [*self._begin, *own]
        rows = subject.tokenize([after(host, text) for text in texts])
        for text, row in zip(texts, rows, strict=True):
            if row[: len(before)] != before or len(row) == len(before):
                raise ValueError(_shares_a_token(host, text))
        self.host_tokens = np.array(own, dtype=np.int64)
        self._tails = [row[len(before) :] for row in rows]
        self._references: dict[int, tuple[list[int], Any]] = {}

    def _start(self, subject: LanguageModel, site: str, way: str) -> None:
        self.subject = subject
        self.site = site
        self.depth = subject.depth(site)
        self._whole = way == "whole"
        self._embed = subject.model.get_input_embeddings()

    # -- tokens and their embeddings ----------------------------------------------------------------------------------

    @cached_property
    def vocabulary(self) -> np.ndarray:
        """``(V,)`` ids that a prefix may consist of: ordinary tokens (no special ones) of printable text."""
        tokenizer = self.subject.tokenizer
        special = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
        ids = [i for i in range(min(len(tokenizer), self._table.shape[0])) if i not in special]
        words = tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
        # bytes that are no whole character decode to the replacement character
        kept = [i for i, word in zip(ids, words, strict=True) if _printable(word)]
        return np.array(kept, dtype=np.int64)

    @cached_property
    def embedding_mean(self) -> np.ndarray:
        """``(e,)`` float32: mean of the allowed tokens' embeddings."""
        return np.asarray(self.embeddings(self.vocabulary).mean(axis=0, dtype=np.float64), dtype=np.float32)

    @cached_property
    def embedding_std(self) -> np.ndarray:
        """``(e,)`` float32: standard deviation of each coordinate over the allowed tokens' embeddings."""
        return np.asarray(self.embeddings(self.vocabulary).std(axis=0, dtype=np.float64), dtype=np.float32)

    def embeddings(self, tokens: np.ndarray) -> np.ndarray:
        """``(*tokens.shape, e)`` float32: what the model puts in for ``tokens``."""
        return np.asarray(self._table[self._ids(tokens)].float().cpu().numpy())

    def tokens(self, context: str) -> np.ndarray:
        """``(T,)`` a real context as a prefix."""
        return np.array(_ordinary(self.subject, context), dtype=np.int64)

    def text(self, prefix: np.ndarray) -> str:
        """A prefix as text, for people to read."""
        return str(self.subject.tokenizer.decode(np.asarray(prefix).tolist()))

    # -- reading ------------------------------------------------------------------------------------------------------

    def read_tokens(self, prefixes: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Activations ``(m, n, dim)`` float32 of ``items (n,)`` behind each of ``prefixes (m, T)``; no gradients."""
        return self.read_embeddings(self._table[self._ids(prefixes)], items)

    def read_embeddings(self, prefixes: Any, items: np.ndarray) -> np.ndarray:
        """The same behind free embeddings ``prefixes (m, k, e)``, an array or a tensor."""
        import torch

        prefixes, chosen = torch.as_tensor(prefixes).detach().to(self._table), np.asarray(items).tolist()
        out = np.empty((len(prefixes), len(chosen), self.subject.dim), dtype=np.float32)
        together = max(1, _BATCH_TOKENS // (len(self._begin) + prefixes.shape[1]))
        with torch.no_grad():
            for start in range(0, len(prefixes), together):
                past = self._past(prefixes[start : start + together], self.depth)
                pairs = [(j, i) for j in range(len(past.embeds)) for i in range(len(chosen))]
                for batch in batches([len(self._tails[chosen[i]]) for _, i in pairs]):
                    which, rows = [pairs[b][0] for b in batch], [pairs[b][1] for b in batch]
                    found = self._read(past, which, [self._tails[chosen[i]] for i in rows])
                    out[[start + j for j in which], rows] = found.cpu().numpy()
        return out

    def read_soft(self, prefix: Any, items: np.ndarray) -> Any:
        """Activations ``(n, dim)``, a float32 tensor differentiable in the embeddings ``prefix (k, e)``.

        One batch: memory grows with ``len(items)``.
        """
        chosen = np.asarray(items).tolist()
        past = self._past(prefix[None].to(self._table), self.depth)
        return self._read(past, [0] * len(chosen), [self._tails[i] for i in chosen])

    def token_gradient(
        self, prefix: np.ndarray, items: np.ndarray, loss: Callable[[Any], Any]
    ) -> tuple[float, np.ndarray]:
        """A loss of the activations and its gradient in the one-hot rows of a prefix of real tokens.

        Args:
            prefix: ``(T,)`` tokens.
            items: ``(n,)``.
            loss: activations ``(n, dim)``, a tensor, -> a scalar tensor.

        Returns:
            The loss, and ``(T, V)`` float32 with a column for each token of :attr:`vocabulary`: what putting that token
            in adds to the loss, to first order and up to a constant per position.
        """
        import torch

        embeds = self._table[self._ids(prefix)].detach().clone().requires_grad_(True)
        with torch.enable_grad():
            value = loss(self.read_soft(embeds, items))
            (gradient,) = torch.autograd.grad(value, embeds)
        with torch.no_grad():
            every = gradient @ self._table.T
        return float(value.detach()), every[:, self._ids(self.vocabulary)].float().cpu().numpy()

    # -- behaviour ----------------------------------------------------------------------------------------------------

    def shift_tokens(self, prefix: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Shift in nats per token ``(n,)`` float64 when the tokens ``prefix (T,)`` replace the host."""
        return self._shift(self._table[self._ids(prefix)], items)

    def shift_soft(self, prefix: Any, items: np.ndarray) -> np.ndarray:
        """Shift in nats per token ``(n,)`` float64 when the embeddings ``prefix (k, e)`` replace the host."""
        import torch

        return self._shift(torch.as_tensor(prefix).detach().to(self._table), items)

    def shift_texts(self, contexts: Sequence[str], items: np.ndarray) -> np.ndarray:
        """Shift in nats per token ``(contexts, n)`` when real contexts replace the host: an unoptimized change.

        Raises:
            ValueError: a context shares a token with the item after it.
        """
        for context in contexts:
            for i in np.asarray(items).tolist():
                row = self.subject.tokenize([after(context, self._texts[i])])[0]
                if row != [*self._begin, *self.tokens(context).tolist(), *self._tails[i]]:
                    raise ValueError(_shares_a_token(context, self._texts[i]))
        return np.stack([self.shift_tokens(self.tokens(context), items) for context in contexts])

    def divergence(self, prefix: Any, items: np.ndarray) -> Any:
        """Shift in nats per token ``(n,)``, a tensor differentiable in the embeddings ``prefix (k, e)``; one batch."""
        chosen = np.asarray(items).tolist()
        self._prepare(chosen)
        return self._kl(self._past(prefix[None].to(self._table), len(self.subject.blocks) - 1), chosen)

    def _shift(self, embeds: Any, items: np.ndarray) -> np.ndarray:
        import torch

        chosen = np.asarray(items).tolist()
        self._prepare(chosen)
        out = np.empty(len(chosen))
        with torch.no_grad():
            past = self._past(embeds[None], len(self.subject.blocks) - 1)
            for batch in batches([len(self._tails[i]) for i in chosen], _ROWS):
                # rounding may leave a KL of zero slightly negative
                out[batch] = self._kl(past, [chosen[b] for b in batch]).double().clamp(min=0).cpu().numpy()
        return out

    def _kl(self, past: Any, items: Sequence[int]) -> Any:
        import torch

        log_p = torch.stack([self._references[i][1] for i in items])
        return (log_p.exp() * (log_p - self._log_p(past, items))).sum(-1).mean(-1)

    def _prepare(self, items: Sequence[int]) -> None:
        """Greedy continuation and log-probabilities of the host run, where not there yet (they are kept)."""
        import torch

        missing = [i for i in dict.fromkeys(items) if i not in self._references]
        if not missing:
            return
        with torch.no_grad():
            past = self._past(self._table[self._ids(self.host_tokens)][None], len(self.subject.blocks) - 1)
            for batch in batches([len(self._tails[i]) for i in missing], _ROWS, alike=True):
                rows = [missing[b] for b in batch]
                continued = self._continue([self._tails[i] for i in rows], past)
                for i, continuation in zip(rows, continued, strict=True):
                    self._references[i] = (continuation, None)
                # by the same path as other prefixes' outputs, so that rounding is the same
                for i, log_p in zip(rows, self._log_p(past, rows), strict=True):
                    self._references[i] = (self._references[i][0], log_p.clone())

    def _continue(self, tails: Sequence[Sequence[int]], past: _Past) -> list[list[int]]:
        """The 8 most probable tokens after each item, one after another. The items have one length."""
        import torch

        ids, mask = self.subject.pad(tails)
        cache = None if self._whole else self._cache(past, [0] * len(tails))
        everything, found = ids, []
        for _ in range(CONTINUATION):
            embeds = self._table[ids]
            if cache is None:
                embeds = torch.cat([past.embeds.expand(len(tails), -1, -1), self._table[everything]], dim=1)
            held = mask.new_ones(len(tails), past.embeds.shape[1] + everything.shape[1])
            last = torch.full((len(tails), 1), embeds.shape[1] - 1, device=ids.device)
            with self.subject.logits_at(last):
                logits = self._run(self.subject.model, embeds, held, cache).logits
            ids = logits.argmax(-1)
            found.append(ids)
            everything = torch.cat([everything, ids], dim=1)
        return [row.tolist() for row in torch.cat(found, dim=1)]

    def _log_p(self, past: _Past, items: Sequence[int]) -> Any:
        """Log-probabilities ``(n, 9, vocabulary)`` float32 of the next token after each item and its continuation."""
        import torch

        rows = [[*self._tails[i], *self._references[i][0]] for i in items]
        ids, mask = self.subject.pad(rows)
        last = self._first_of_tail(past) + mask.sum(1, keepdim=True) - 1
        with self.subject.logits_at(last + torch.arange(-CONTINUATION, 1, device=ids.device)):
            logits = self._pass(self.subject.model, past, [0] * len(rows), ids, mask).logits
        return logits.float().log_softmax(dim=-1)

    def _run_alone(self, past: _Past, tail: Sequence[int]) -> Any:
        """Logits ``(1, vocabulary)`` after one item behind the first prefix."""
        import torch

        ids, mask = self.subject.pad([tail])
        with self.subject.logits_at(torch.tensor([[self._first_of_tail(past) + len(tail) - 1]], device=ids.device)):
            return self._pass(self.subject.model, past, [0], ids, mask).logits[0].float()

    # -- the model ----------------------------------------------------------------------------------------------------

    @cached_property
    def _table(self) -> Any:
        """``(words, e)``: what enters the model for each token; a view of the weights where these are taken as is."""
        import torch

        weight = self._embed.weight.detach()
        if type(self._embed) is torch.nn.Embedding:
            return weight
        with torch.no_grad():
            # some models scale what they look up
            return self._embed(torch.arange(len(weight), device=weight.device))

    def _ids(self, tokens: Any) -> Any:
        import torch

        return torch.as_tensor(np.ascontiguousarray(tokens, dtype=np.int64), device=self._table.device)

    def _past(self, prefixes: Any, deepest: int) -> _Past:
        """``begin`` and ``prefixes (m, T, e)``, with their keys and values in the blocks up to ``deepest``."""
        import torch
        from transformers import DynamicCache

        begin = self._table[self._ids(self._begin)].expand(len(prefixes), -1, -1)
        embeds = torch.cat([begin, prefixes], dim=1)
        if self._whole:
            return _Past(embeds, None)
        if deepest < 0:
            # nothing attends before the first block: only the length matters
            empty = embeds.new_zeros(len(embeds), 1, embeds.shape[1], 1)
            return _Past(embeds, [(empty, empty)])
        cache = DynamicCache()
        mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        with self._stopping(deepest, []), suppress(_Reached):
            self._run(self.subject.trunk, embeds, mask, cache)
        return _Past(embeds, key_value_pairs(cache)[: deepest + 1])

    def _read(self, past: _Past, which: Sequence[int], tails: Sequence[Sequence[int]]) -> Any:
        """States ``(rows, dim)`` float32 at the site, at the last token of ``tails`` behind the prefixes ``which``."""
        import torch

        ids, mask = self.subject.pad(tails)
        found: list[Any] = []
        with self._stopping(self.depth, found), suppress(_Reached):
            self._pass(self.subject.trunk, past, which, ids, mask)
        last = self._first_of_tail(past) + mask.sum(1) - 1
        return found[0][torch.arange(len(tails), device=ids.device), last].float()

    def _first_of_tail(self, past: _Past) -> int:
        """Where an item's tokens begin in the output of a pass."""
        return past.embeds.shape[1] if self._whole else 0

    def _pass(self, module: Any, past: _Past, which: Sequence[int], ids: Any, mask: Any) -> Any:
        """Padded tokens behind the prefixes ``which`` through ``module``."""
        import torch

        mask = torch.cat([mask.new_ones(len(mask), past.embeds.shape[1]), mask], dim=1)
        embeds = self._table[ids]
        if self._whole:
            return self._run(module, torch.cat([past.embeds[self._ids(which)], embeds], dim=1), mask, None)
        return self._run(module, embeds, mask, self._cache(past, which))

    def _cache(self, past: _Past, which: Sequence[int]) -> Any:
        rows = self._ids(which)
        pairs = {i: (k[rows], v[rows]) for i, (k, v) in enumerate(past.pairs or ())}
        return self.subject.make_cache(pairs, len(which))

    def _run(self, module: Any, embeds: Any, mask: Any, cache: Any) -> Any:
        return module(inputs_embeds=embeds, **self.subject.options(mask, cache))

    @contextmanager
    def _stopping(self, depth: int, found: list[Any]) -> Iterator[None]:
        """End passes at a site, given by its depth; the states there go to ``found``."""
        blocks = self.subject.blocks

        def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(args[0] if args else kwargs["hidden_states"])
            raise _Reached

        def after(module: Any, args: Any, output: Any) -> None:
            found.append(output[0] if isinstance(output, tuple) else output)
            raise _Reached

        if depth < 0:
            handle = blocks[0].register_forward_pre_hook(before, with_kwargs=True)
        else:
            handle = blocks[depth].register_forward_hook(after)
        try:
            yield
        finally:
            handle.remove()


class _Reached(Exception):
    """Ends a forward pass at the site."""


def _ordinary(subject: LanguageModel, text: str) -> list[int]:
    """Token ids without special tokens."""
    return list(subject.tokenizer(text, add_special_tokens=False)["input_ids"])


def _printable(word: str) -> bool:
    return bool(word.strip()) and word.isprintable() and "\ufffd" not in word


def _shares_a_token(context: str, text: str) -> str:
    return (
        f"the context {context!r} and the item {text!r} do not split at the space between them (a token spans both); "
        "use a context that ends in a full stop"
    )


def way_to_prefix(subject: LanguageModel) -> Literal["cached", "whole"]:
    """How items go behind prefixes of this model, tried once on a few tokens (kept in ``subject.ways``).

    Raises:
        TypeError: it has no next-token distribution, or does not read embeddings as it reads tokens.
    """
    import torch

    if subject.silent:
        raise TypeError(f"a prefix reaches an item's last token in causal models only: {subject.silent}")
    if "prefix" in subject.ways:
        return subject.ways["prefix"]
    row = subject.sample(8)
    prefix, tail, site = row[:4], row[4:], subject.sites[-1]

    def outputs(way: str) -> tuple[Any, Any]:
        tried = PrefixedModel.__new__(PrefixedModel)
        tried._start(subject, site, way)
        tried._begin = []
        past = tried._past(tried._table[tried._ids(prefix)][None], len(subject.blocks) - 1)
        # beside a shorter one, as in use
        states = tried._read(past, [0, 0], [tail, tail[:2]])
        return states, tried._run_alone(past, tail)

    try:
        with torch.no_grad():
            whole = outputs("whole")
            ids, mask = subject.pad([row])
            state = subject.run_to(subject.depth(site), [site], ids, mask, None)[site][0, [7, 5]].float()
            logits = subject.model(ids, **subject.options(mask, None)).logits[0, -1:].float()
    except Exception as error:
        raise _unprefixable(subject, f"a pass on embeddings fails ({error})") from error
    if not all(map(subject.agrees, whole, (state, logits))):
        raise _unprefixable(subject, "it does not read embeddings as it reads tokens")
    found: Literal["cached", "whole"] = "whole"
    if subject.shared:
        # whatever an architecture raises here: the quick way is not its way
        with suppress(Exception), torch.no_grad():
            if all(map(subject.agrees, outputs("cached"), whole)):
                found = "cached"
    subject.ways["prefix"] = found
    return found


def _unprefixable(subject: LanguageModel, cause: str) -> TypeError:
    return TypeError(f"{subject.name} cannot be read behind a prefix: {cause}; leave out attacks that write a prefix")
