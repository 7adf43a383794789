"""Any Hugging Face causal or encoder model as a subject: its activations, read at named sites.

Sites: ``embeddings`` (what enters the first block) and ``layers.N`` (the residual stream after block N, N from 0; the
final norm is not applied). The activation of a text is the one at its last real token.

Nobody but the model counts positions: families offset them, reset them or have none. Shorter texts of a batch are
padded on the right, behind which no position changes; where even that changes something (a convolution or a Fourier
transform over all tokens), only texts of one length share a batch.

What an architecture can do is not known by its name but tried, on a few tokens, as soon as the model is there
(:meth:`LanguageModel.examine`): whether blocks hand on one stream that hooks can see, whether padding changes nothing,
whether keys and values of a common beginning can be shared, and whether later tokens leave earlier ones alone. What
cannot be read right is refused then; what cannot be shared is read by plain forward passes.

What makes reading fast, in order of gain:

- only the asked-for sites are kept, and the forward pass stops after the last of them;
- the tokens that all texts of a call share at the beginning (a neutral context) run once, and their keys and values
  are expanded over the batch;
- texts are sorted by length, so that little padding is computed;
- what was read is cached on disk by content (:mod:`elk_stress.models.activation_cache`).

Guarantee: equal to a plain forward pass with ``output_hidden_states`` up to rounding (1e-4 relative, tested).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np

from elk_stress.core.extras import need
from elk_stress.models.activation_cache import ActivationCache
from elk_stress.models.fast_linear import use_onednn
from elk_stress.models.loading import ModelUnavailable, load_config, load_model, load_tokenizer
from elk_stress.models.sources import cache_folder, resolve
from elk_stress.models.special_tokens import surrounding
from elk_stress.models.threads import configure_threads

__all__ = ["LanguageModel", "Unreadable"]

# tokens of a batch: enough to keep matrix products efficient, little enough to bound memory and padding
_BATCH_TOKENS = 768
# a shorter common prefix is not worth a pass of its own
_LEAST_PREFIX = 3


class LanguageModel:
    """A causal or encoder model whose activations can be read, and moved (:mod:`elk_stress.models.patched`).

    Args:
        model_id: local folder or Hugging Face id; by default SmolLM2-135M-Instruct.
        revision: a commit, branch or tag of the hub.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``; activations are returned in float32 whatever it is.
        device: torch device.
        threads: torch's threads; by default all available cores.
        cache: ``True`` for the user cache, ``None`` for none.

    Attributes:
        dim: width of the residual stream.
        sites: names of all sites, in order.
        causal: whether no token sees later ones (only such models can be moved).
        silent: why there is no next-token distribution whose shift could be measured; empty where there is one.
        padded: whether shorter texts of a batch may be padded.
        shared: whether keys and values of a common beginning are computed once.
        ways: how moves and prefixes go through the model, found when first needed (``cached`` or ``whole`` passes).
        facts: where the model came from, for ``result.json``.

    Raises:
        Unreadable: an architecture that cannot be read right; names it, the cause and the way out.
        ModelUnavailable: the folder is not loaded (:mod:`elk_stress.models.loading`).
    """

    def __init__(
        self,
        model_id: str | Path | None = None,
        *,
        revision: str | None = None,
        dtype: str = "float32",
        device: str = "cpu",
        threads: int | None = None,
        cache: ActivationCache | Literal[True] | None = True,
    ) -> None:
        need("lm", "a language model")
        configure_threads(threads)
        # what is not loaded is refused before anything heavy is imported
        resolved = resolve(model_id, revision=revision)
        import torch
        import transformers

        configure_threads(threads)
        config = load_config(resolved.model_id, resolved.path)
        causal = is_decoder(config)
        with _quiet(transformers):
            # `torch_dtype` was renamed to `dtype`; `.to` means the same in every version
            model = load_model(resolved.model_id, resolved.path, _factory(config, causal))
            tokenizer = load_tokenizer(resolved.model_id, resolved.path)
        if config.is_encoder_decoder:
            model = model.get_encoder()
        self._adopt(model.to(_dtype(torch, dtype)), tokenizer, resolved.fingerprint, dtype, device, causal, cache)
        self.facts: Mapping[str, Any] = {
            # first, so that what a folder says of itself replaces nothing
            **resolved.notes,
            "model": resolved.model_id,
            "source": resolved.source,
            "fingerprint": resolved.fingerprint,
            "dtype": dtype,
            "device": device,
            **self._special(),
            **self.limits(),
        }

    @classmethod
    def from_modules(
        cls,
        model: Any,
        tokenizer: Any,
        *,
        fingerprint: str,
        causal: bool,
        dtype: str = "float32",
        device: str = "cpu",
        cache: ActivationCache | None = None,
    ) -> LanguageModel:
        """Wrap a model already in memory; ``fingerprint`` must change whenever its weights do."""
        import torch

        self = cls.__new__(cls)
        self._adopt(model.to(_dtype(torch, dtype)), tokenizer, fingerprint, dtype, device, causal, cache)
        self.facts = {"model": type(model).__name__, "source": "memory", "fingerprint": fingerprint, "dtype": dtype}
        self.facts = {**self.facts, **self._special(), **self.limits()}
        return self

    def _adopt(
        self,
        model: Any,
        tokenizer: Any,
        fingerprint: str,
        dtype: str,
        device: str,
        causal: bool,
        cache: ActivationCache | Literal[True] | None,
    ) -> None:
        self.model = model.to(device).eval().requires_grad_(False)
        self.name = type(model).__name__
        self.onednn = use_onednn(self.model)
        self.tokenizer = tokenizer
        self._surrounding = surrounding(tokenizer)
        self.causal = causal
        self.device = device
        self.dtype = dtype
        self.trunk = _trunk(model)
        self.blocks = _blocks(self.trunk, self.name)
        self.dim = int(getattr(text_config(model), "hidden_size", 0)) or model.get_input_embeddings().weight.shape[1]
        self.sites = ("embeddings", *(f"layers.{i}" for i in range(len(self.blocks))))
        self._accepts = set(inspect.signature(self.trunk.forward).parameters)
        self._most_tokens = _most_tokens(self.trunk)
        self.examine()
        self.silent = self._why_silent()
        self.ways: dict[str, Literal["cached", "whole"]] = {}
        self._identity = (fingerprint, dtype, device.split(":")[0], "onednn" if self.onednn else "torch")
        self._cache = ActivationCache(cache_folder() / "activations") if cache is True else cache

    # -- what the architecture can do ---------------------------------------------------------------------------------

    def examine(self) -> None:
        """Find out by trying, on a few tokens, how this architecture is read right (see the head of this file).

        Raises:
            Unreadable: it cannot be.
        """
        row = self.sample(min(12, self._most_tokens or 12))
        short = row[: len(row) // 2 + 1]
        every = len(self.blocks) - 1
        self.padded, self.shared = True, False
        try:
            long, alone = self._check_stream(row), self._states([short])[0]
            self._check_trunk(short, alone[-1])
        except (TypeError, ValueError):
            raise
        except Exception as error:
            raise unreadable(self.name, f"its forward pass on text alone fails ({error})") from error
        cut = len(short)
        # some encoders fill up to whole windows, so states may be longer than the text
        long, alone = long[:, : len(row)], alone[:, :cut]
        self.causal = self.causal and self.agrees(long[:, :cut], alone)
        self.padded = self.agrees(self._states([row, short])[1][:, :cut], alone)
        if not self.causal:
            return
        shared = cut - 2
        # whatever an architecture raises here: keys and values are not what (or all that) it keeps
        with suppress(Exception):
            past = self._keys_and_values(row[:shared], every)
            if past is not None:
                found = self._states([row[shared:], short[shared:]], past)
                both = (found[0], long[:, shared:]), (found[1][:, :2], alone[:, shared:])
                self.shared = all(self.agrees(*pair) for pair in both)

    def sample(self, count: int) -> list[int]:
        """``count`` ordinary token ids, spread over the vocabulary."""
        config, table = text_config(self.model), self.model.get_input_embeddings()
        size = min(len(self.tokenizer), table.weight.shape[0])
        avoided = {*self.tokenizer.all_special_ids, *self.tokenizer.get_added_vocab().values()}
        for told in (config, self.model.config):
            named = {key: value for key, value in told.to_dict().items() if key.endswith(("token_id", "token_index"))}
            avoided |= {value for value in named.values() if isinstance(value, int)}
        spread = [size * i // (8 * count) for i in range(8 * count)]
        ids = [i for i in dict.fromkeys(spread) if i not in avoided] or [0]
        return [ids[len(ids) * i // count] for i in range(count)]

    def agrees(self, found: Any, expected: Any) -> bool:
        """Whether two tensors ``(..., width)`` are equal up to this precision's rounding, row by row."""
        if found.shape != expected.shape:
            return False
        found, expected = found.float(), expected.float()
        error = (found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-9)
        # rounding grows with depth; a wrong position, mask or cache changes tenths
        return bool((error <= {"float32": 1e-3, "float16": 2e-2}.get(self.dtype, 1e-1)).all())

    def _states(self, rows: list[list[int]], past: Any = None) -> list[Any]:
        """Per row, states of all its tokens ``(blocks, tokens, dim)`` (with padding) in one batch."""
        import torch

        ids, mask, cache = self._batch(rows, past)
        captured = self.run_to(len(self.blocks) - 1, self.sites[1:], ids, mask, cache)
        stacked = torch.stack([captured[site] for site in self.sites[1:]], dim=1)
        return list(stacked)

    def _check_trunk(self, row: list[int], alone: Any) -> None:
        """The language part alone must give the states ``alone (tokens, dim)`` that it has in the whole model.

        Asked of decoders: the whole model of an encoder does more than to encode.
        """
        import torch

        if not self.causal or self.trunk is self.model:
            return
        captured: dict[str, Any] = {}
        last = self.sites[-1]
        with torch.no_grad(), self._listening([last], captured, stop_after=self.depth(last)), suppress(_Finished):
            self.model(self.pad([row])[0])
        if not self.agrees(captured[last][0], alone):
            raise unreadable(self.name, "its language part gives other states alone than in the whole model")

    def _check_stream(self, row: list[int]) -> Any:
        """Every block must take what the one before it gives, ``(batch, tokens, dim)``: then hooks see the stream.

        Returns the row's states ``(blocks, tokens, dim)``.
        """
        import torch

        enters: dict[int, Any] = {}
        leaves: dict[int, Any] = {}

        def before(depth: int) -> Callable[..., None]:
            def hook(module: Any, args: Any, kwargs: Any) -> None:
                enters[depth] = args[0] if args else kwargs.get("hidden_states")

            return hook

        def after(depth: int) -> Callable[..., None]:
            def hook(module: Any, args: Any, output: Any) -> None:
                leaves[depth] = output[0] if isinstance(output, tuple) else output

            return hook

        handles = []
        for depth, block in enumerate(self.blocks):
            handles.append(block.register_forward_pre_hook(before(depth), with_kwargs=True))
            handles.append(block.register_forward_hook(after(depth)))
        ids, mask = self.pad([row])
        try:
            with torch.no_grad():
                self.base(ids, mask, None)
        finally:
            for handle in handles:
                handle.remove()
        for depth in range(len(self.blocks)):
            state = leaves.get(depth)
            if not isinstance(state, torch.Tensor):
                raise unreadable(self.name, f"block {depth} does not take part in its forward pass on text alone")
            if state.ndim != 3 or len(state) != 1 or state.shape[1] < len(row) or state.shape[2] != self.dim:
                raise unreadable(
                    self.name,
                    f"the state after block {depth} has shape {tuple(state.shape)}, not (texts, tokens, {self.dim})",
                )
            following = enters.get(depth + 1, state)
            if not (isinstance(following, torch.Tensor) and torch.equal(state, following)):
                raise unreadable(self.name, f"block {depth + 1} does not take what block {depth} gives")
        return torch.stack([leaves[depth][0] for depth in range(len(self.blocks))])

    def _why_silent(self) -> str:
        if not self.causal:
            return f"{self.name} is an encoder: it predicts no next token"
        return "" if self.model.get_output_embeddings() is not None else f"{self.name} has no output head"

    def limits(self) -> dict[str, str]:
        """What is slower or absent here, for people to read."""
        found = {}
        if self.silent:
            found["behaviour"] = self.silent
        if self.causal and not self.shared:
            found["reading"] = "texts are read whole: keys and values of a common beginning cannot be shared (slower)"
        if "whole" in self.ways.values():
            found["moves"] = "moves and prefixes go by whole forward passes (slower)"
        if not self.padded:
            found["padding"] = "only texts of one length share a batch: padding would change what is read (slower)"
        return found

    # -- reading --------------------------------------------------------------------------------------------------

    def depth(self, site: str) -> int:
        """Index of the block after which ``site`` is read; -1 for ``embeddings``.

        Raises:
            ValueError: no such site; lists the known ones.
        """
        if site not in self.sites:
            raise ValueError(
                f"no site is called {site!r}; this model has embeddings and layers.0 to layers.{len(self.blocks) - 1}"
            )
        return self.sites.index(site) - 1

    def read(
        self,
        texts: Sequence[str],
        sites: Sequence[str],
        *,
        advance: Callable[[int], None] | None = None,
        tokens: int | None = None,
        share_prefix: bool = True,
    ) -> dict[str, np.ndarray]:
        """Activations ``(n_texts, dim)`` float32 at the last real token of each text, per site; cached as one block.

        With ``tokens`` = T: ``(n_texts, T, dim)``, at the last T real tokens in their order.

        Args:
            texts: plain texts; what they have in common at the beginning runs once.
            sites: what to read.
            advance: called with the number of texts finished, for progress bars.
            share_prefix: run the common prefix once (causal models only).
            tokens: how many tokens to read, from the last one back; by default the last alone.

        Raises:
            ValueError: no such site, or a text of fewer tokens than are to be read or of more than the model takes.
        """
        deepest = max(self.depth(site) for site in sites)
        shape = (len(texts), self.dim) if tokens is None else (len(texts), tokens, self.dim)
        keys = dict.fromkeys(sites, "")
        found: dict[str, np.ndarray] = {}
        if self._cache is not None:
            which = "" if tokens is None else f" last {tokens} tokens"
            keys = {site: self._cache.key(self._identity, site + which, texts) for site in sites}
            loaded = {site: self._cache.load(key) for site, key in keys.items()}
            found = {s: block for s, block in loaded.items() if block is not None and block.shape == shape}
        wanted = [site for site in sites if site not in found]
        if not wanted:
            if advance is not None:
                advance(len(texts))
            return found
        deepest = max(self.depth(site) for site in wanted)
        out = {site: np.empty(shape, dtype=np.float32) for site in wanted}
        rows = self.tokenize(texts)
        shortest = min(range(len(rows)), key=lambda i: len(rows[i]))
        if len(rows[shortest]) < (tokens or 1):
            raise ValueError(
                f"the text {texts[shortest]!r} has {len(rows[shortest])} tokens, but {tokens} are to be read; "
                "read fewer tokens, or longer texts"
            )
        # what is read must be in every text's own part
        prefix = min(_common_prefix(rows), len(rows[shortest]) - (tokens or 1)) if share_prefix and self.shared else 0
        prefix = prefix if prefix >= _LEAST_PREFIX and len(rows) > 1 else 0
        past = self._keys_and_values(rows[0][:prefix], deepest) if prefix else None
        # nothing is kept before the first block
        tails = rows if past is None else [row[prefix:] for row in rows]
        for batch in batches([len(tail) for tail in tails], alike=not self.padded):
            captured = self._read_batch([tails[i] for i in batch], wanted, deepest, past, tokens)
            for site in wanted:
                out[site][batch] = captured[site]
            if advance is not None:
                advance(len(batch))
        if self._cache is not None:
            for site in wanted:
                self._cache.save(keys[site], out[site])
        return {**found, **out}

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text as it is, with the special tokens that the model expects.

        A text that brings those itself (a rendered chat template begins with its own ``<s>``) gets them once.

        Raises:
            TypeError: a text that is no string.
            ValueError: a text without tokens, with more than the model takes, or that is no valid Unicode.
        """
        texts = list(texts)
        for text in texts:
            _check_text(text)
        if not texts:
            return []
        rows = self.tokenizer(texts, padding=False, truncation=False)["input_ids"]
        rows = [self._surrounding.once(row, text) for row, text in zip(rows, texts, strict=True)]
        for text, row in zip(texts, rows, strict=True):
            if not row:
                raise ValueError(f"the text {text!r} has no tokens; every item needs a text")
            if self._most_tokens is not None and len(row) > self._most_tokens:
                raise ValueError(
                    f"the text that begins with {text[:60]!r} has {len(row)} tokens but the model takes "
                    f"{self._most_tokens}; shorten it"
                )
        return rows

    def _special(self) -> dict[str, str]:
        told = self._surrounding.describe()
        return {} if told is None else {"special_tokens": told}

    def _read_batch(
        self,
        rows: list[list[int]],
        sites: Sequence[str],
        deepest: int,
        past: Any,
        tokens: int | None,
    ) -> dict[str, np.ndarray]:
        import torch

        ids, mask, cache = self._batch(rows, past)
        try:
            captured = self.run_to(deepest, sites, ids, mask, cache)
        except IndexError as error:
            raise ValueError(
                f"{self.name} fails on a text of {mask.shape[1]} tokens ({error}); it may take fewer: shorten the texts"
            ) from error
        index = torch.arange(len(rows), device=ids.device)
        last = torch.as_tensor([len(row) - 1 for row in rows], device=ids.device)
        if tokens is not None:
            index, last = index[:, None], last[:, None] + torch.arange(1 - tokens, 1, device=ids.device)
        return {site: hidden[index, last].float().cpu().numpy() for site, hidden in captured.items()}

    def _batch(self, rows: Sequence[Sequence[int]], past: Any) -> tuple[Any, Any, Any]:
        """Ids, mask and cache of rows behind the keys and values ``past``, if any."""
        import torch

        ids, mask = self.pad(rows)
        if past is None:
            return ids, mask, None
        mask = torch.cat([mask.new_ones(len(rows), past[0][0].shape[2]), mask], dim=1)
        return ids, mask, self.make_cache({i: (k, v) for i, (k, v) in enumerate(past)}, len(rows))

    def run_to(self, deepest: int, sites: Sequence[str], ids: Any, mask: Any, cache: Any) -> dict[str, Any]:
        """Hidden states ``(batch, tokens, dim)`` at ``sites``; the pass ends after block ``deepest``."""
        import torch

        captured: dict[str, Any] = {}
        with torch.no_grad(), self._listening(sites, captured, stop_after=deepest), suppress(_Finished):
            self.base(ids, mask, cache)
        return captured

    def base(self, ids: Any, mask: Any, cache: Any) -> Any:
        """The language model without its head: last hidden states. Positions are counted by the model itself.

        Arguments that the architecture lacks are left out.
        """
        return self.trunk(ids, **self.options(mask, cache))

    def options(self, mask: Any, cache: Any) -> dict[str, Any]:
        """Keyword arguments of a pass: those of these that the architecture has."""
        options: dict[str, Any] = {"attention_mask": mask, "return_dict": True, "use_cache": False}
        options = {name: value for name, value in options.items() if name in {*self._accepts, "return_dict"}}
        return options if cache is None else {**options, **self.keeping(cache)}

    def keeping(self, cache: Any) -> dict[str, Any]:
        """Arguments that hand a cache to the model, by the name that its signature has (``past_key_values`` of old)."""
        return {"cache" if "cache" in self._accepts else "past_key_values": cache, "use_cache": True}

    def pad(self, rows: Sequence[Sequence[int]]) -> tuple[Any, Any]:
        """Token ids and attention mask ``(batch, tokens)`` on the model's device, padded on the right."""
        import torch

        width = max(len(row) for row in rows)
        ids = torch.full((len(rows), width), self._filler(), dtype=torch.long)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.as_tensor(row, dtype=torch.long)
            mask[i, : len(row)] = 1
        return ids.to(self.device), mask.to(self.device)

    def make_cache(self, pairs: Mapping[int, tuple[Any, Any]], batch: int) -> Any:
        """A transformers cache from keys and values ``(1 or batch, heads, tokens, width)`` of some blocks."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for block, (keys, values) in sorted(pairs.items()):
            cache.update(keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1), block)
        return cache

    @contextmanager
    def logits_at(self, positions: Any) -> Iterator[None]:
        """The head sees ``positions (batch, count)`` only, for its logits are what costs memory."""

        def select(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (args[0].gather(1, positions[..., None].expand(-1, -1, args[0].shape[-1])),)

        handle = self.model.get_output_embeddings().register_forward_pre_hook(select)
        try:
            yield
        finally:
            handle.remove()

    def _filler(self) -> int:
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        return 0

    def _keys_and_values(self, prefix: Sequence[int], deepest: int) -> list[tuple[Any, Any]] | None:
        """Keys and values of the blocks up to ``deepest``; nothing is kept before the first."""
        if deepest < 0:
            return None
        from transformers import DynamicCache

        ids, mask = self.pad([prefix])
        cache = DynamicCache()
        self.run_to(deepest, [], ids, mask, cache)
        return key_value_pairs(cache)[: deepest + 1] or None

    @contextmanager
    def _listening(self, sites: Sequence[str], captured: dict[str, Any], stop_after: int) -> Iterator[None]:
        """Hooks that store hidden states at ``sites`` and end the pass after block ``stop_after``."""
        wanted = {self.depth(site): site for site in sites}
        handles = []

        def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            captured["embeddings"] = args[0] if args else kwargs["hidden_states"]
            if stop_after < 0:
                raise _Finished

        def after(depth: int) -> Callable[..., None]:
            def hook(module: Any, args: Any, output: Any) -> None:
                if depth in wanted:
                    captured[wanted[depth]] = output[0] if isinstance(output, tuple) else output
                if depth == stop_after:
                    raise _Finished

            return hook

        if -1 in wanted or stop_after < 0:
            handles.append(self.blocks[0].register_forward_pre_hook(before, with_kwargs=True))
        for depth in {*wanted, stop_after} - {-1}:
            handles.append(self.blocks[depth].register_forward_hook(after(depth)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Finished(Exception):
    """Ends a forward pass once everything asked for has been read."""


def key_value_pairs(cache: Any) -> list[tuple[Any, Any]]:
    """Keys and values per block of a transformers cache (its layout differs between transformers 4 and 5)."""
    if hasattr(cache, "layers"):
        return [(layer.keys, layer.values) for layer in cache.layers if getattr(layer, "keys", None) is not None]
    return list(zip(cache.key_cache, cache.value_cache, strict=True))


class Unreadable(ModelUnavailable, TypeError):
    """An architecture that cannot be read right; the message names it, the cause and the way out."""


def unreadable(name: str, cause: str) -> Unreadable:
    """The refusal of an architecture, with the way out."""
    return Unreadable(
        f"{name} cannot be read right: {cause}; read its activations elsewhere and give them as arrays (--activations)"
    )


def is_decoder(config: Any) -> bool:
    """Whether a checkpoint's text configuration is that of a causal language model.

    A family that can be either (BERT and its like) is what its ``is_decoder`` says; of a model with an encoder and a
    decoder the encoder is read.
    """
    import transformers

    text = _text_part(config)
    if config.is_encoder_decoder or text.is_encoder_decoder:
        return False
    if type(text) in transformers.AutoModelForMaskedLM._model_mapping:
        return bool(getattr(text, "is_decoder", False))
    return any(type(each) in factory._model_mapping for factory in _decoders() for each in (config, text))


def _decoders() -> list[Any]:
    """Factories of models that write text; those that also look at pictures came under several names."""
    import transformers

    names = (
        "AutoModelForCausalLM",
        "AutoModelForImageTextToText",
        "AutoModelForMultimodalLM",
        "AutoModelForVision2Seq",
    )
    return [getattr(transformers, name) for name in names if hasattr(transformers, name)]


def _factory(config: Any, causal: bool) -> Any:
    """What loads a checkpoint with the head that writes text, if it is causal, or without one."""
    import transformers

    if not causal:
        text_encoders = transformers.AutoModelForTextEncoding
        return text_encoders if type(config) in text_encoders._model_mapping else transformers.AutoModel
    factories = _decoders()
    mapped = transformers.AutoModel._model_mapping
    headless = getattr(mapped[type(config)], "__name__", "") if type(config) in mapped else ""
    if headless in (config.architectures or ()):
        # saved without a head
        return transformers.AutoModel
    if _text_part(config) is not config:
        # of a multimodal checkpoint the whole: its weights carry other names than its language part alone
        factories = [*factories[1:], factories[0]]
    return next((factory for factory in factories if type(config) in factory._model_mapping), transformers.AutoModel)


def _trunk(model: Any) -> Any:
    """The module that turns token ids into last hidden states: the language part of a multimodal model."""
    return model.base_model if text_config(model) is model.config else model.get_decoder()


def _blocks(trunk: Any, name: str) -> Any:
    import torch

    count = getattr(text_config(trunk), "num_hidden_layers", None)
    lists = [(path, m) for path, m in trunk.named_modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count]
    if not lists:
        raise unreadable(name, f"it holds no list of {count} blocks, so its sites cannot be named")
    return min(lists, key=lambda pair: pair[0].count("."))[1]


def _text_part(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def text_config(model: Any) -> Any:
    return _text_part(model.config)


def _most_tokens(model: Any) -> int | None:
    """Tokens that the model takes: positions that are counted from after a padding index are fewer by that much."""
    limit = getattr(text_config(model), "max_position_embeddings", None)
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            limit = module.num_embeddings - padding - 1
    return limit if isinstance(limit, int) and limit > 0 else None


def _check_text(text: Any) -> None:
    if not isinstance(text, str):
        raise TypeError(f"expected texts as str, got {type(text).__name__}; decode bytes, and pass a list of str")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text that begins with {text[:60]!r} holds half a surrogate pair at character {error.start}, which "
            "no tokenizer reads; repair how it was decoded"
        ) from None


def _common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """Length of the tokens that all rows share, leaving every row at least one token of its own."""
    # what the first and the last in dictionary order share, all in between share too
    ordered = sorted(list(row) for row in rows)
    first, last = ordered[0], ordered[-1]
    limit = min(len(row) for row in rows) - 1
    shared = 0
    while shared < limit and first[shared] == last[shared]:
        shared += 1
    return shared


def batches(lengths: Sequence[int], most: int | None = None, *, alike: bool = False) -> Iterator[list[int]]:
    """Indices in batches of at most ``_BATCH_TOKENS`` padded tokens and ``most`` rows, longest first.

    Memory peaks at once. With ``alike`` no batch mixes lengths, so that nothing is padded.
    """
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        full = batch and ((len(batch) + 1) * lengths[batch[0]] > _BATCH_TOKENS or len(batch) == most)
        if full or (batch and alike and lengths[i] != lengths[batch[0]]):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _dtype(torch: Any, name: str) -> Any:
    known = ("float32", "bfloat16", "float16")
    if name not in known:
        raise ValueError(f"dtype must be one of {', '.join(known)}, got {name!r}")
    return getattr(torch, name)


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No progress bars of transformers' own inside ours."""
    log = transformers.utils.logging
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.enable_progress_bar()
