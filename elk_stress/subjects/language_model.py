"""Any Hugging Face causal or encoder model as a subject: its activations, read at named sites.

Sites: ``embeddings`` (what enters the first block) and ``layers.N`` (the residual stream after block N, N from 0; the
final norm is not applied). The activation of a text is the one at its last real token, found by the attention mask, so
padding on either side gives the same.

What makes reading fast, in order of gain:

- only the asked-for sites are kept, and the forward pass stops after the last of them;
- the tokens that all texts of a call share at the beginning (a neutral context) run once, and their keys and values
  are expanded over the batch;
- texts are sorted by length, so that little padding is computed;
- what was read is cached on disk by content (:mod:`elk_stress.subjects.activation_cache`).

Guarantee: equal to a plain forward pass with ``output_hidden_states`` up to rounding (1e-4 relative, tested).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np

from elk_stress.extras import need
from elk_stress.subjects.activation_cache import ActivationCache
from elk_stress.subjects.fast_linear import use_onednn
from elk_stress.subjects.loading import load_config, load_model, load_tokenizer
from elk_stress.subjects.models import cache_folder, resolve
from elk_stress.subjects.special_tokens import surrounding
from elk_stress.subjects.threads import configure_threads

__all__ = ["LanguageModel"]

# tokens of a batch: enough to keep matrix products efficient, little enough to bound memory and padding
_BATCH_TOKENS = 768
# a shorter common prefix is not worth a pass of its own
_LEAST_PREFIX = 3


class LanguageModel:
    """A causal or encoder model whose activations can be read, and moved (:mod:`elk_stress.subjects.moved`).

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
        causal: whether it is a causal model (only those can be moved).
        facts: where the model came from, for ``result.json``.
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
        architecture = (getattr(config, "architectures", None) or [""])[0]
        causal = architecture.endswith(("ForCausalLM", "LMHeadModel"))
        factory = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
        with _quiet(transformers):
            # `torch_dtype` was renamed to `dtype`; `.to` means the same in every version
            model = load_model(resolved.model_id, resolved.path, factory).to(_dtype(torch, dtype))
            tokenizer = load_tokenizer(resolved.model_id, resolved.path)
        self._adopt(model, tokenizer, resolved.fingerprint, dtype, device, causal, cache)
        self.facts: Mapping[str, Any] = {
            # first, so that what a folder says of itself replaces nothing
            **resolved.notes,
            "model": resolved.model_id,
            "source": resolved.source,
            "fingerprint": resolved.fingerprint,
            "dtype": dtype,
            "device": device,
            **self._special(),
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
        self.facts = {**self.facts, **self._special()}
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
        self.onednn = use_onednn(self.model)
        self.tokenizer = tokenizer
        self._surrounding = surrounding(tokenizer)
        self._most_tokens = _most_tokens(model)
        self.causal = causal
        self.device = device
        self.dtype = dtype
        self.blocks = _blocks(model)
        self.dim = int(getattr(_text_config(model), "hidden_size", 0)) or model.get_input_embeddings().weight.shape[1]
        self.sites = ("embeddings", *(f"layers.{i}" for i in range(len(self.blocks))))
        self._accepts = set(inspect.signature(self.model.base_model.forward).parameters)
        self._identity = (fingerprint, dtype, device.split(":")[0], "onednn" if self.onednn else "torch")
        self._cache = ActivationCache(cache_folder() / "activations") if cache is True else cache

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
        padding_side: Literal["left", "right"] = "right",
    ) -> dict[str, np.ndarray]:
        """Activations ``(n_texts, dim)`` float32 at the last real token of each text, per site; cached as one block.

        With ``tokens`` = T: ``(n_texts, T, dim)``, at the last T real tokens in their order.

        Args:
            texts: plain texts; what they have in common at the beginning runs once.
            sites: what to read.
            advance: called with the number of texts finished, for progress bars.
            share_prefix: run the common prefix once (causal models only).
            tokens: how many tokens to read, from the last one back; by default the last alone.
            padding_side: where shorter texts of a batch are padded; the result is the same.

        Raises:
            ValueError: no such site, or a text of fewer tokens than are to be read.
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
        prefix = min(_common_prefix(rows), len(rows[shortest]) - (tokens or 1)) if share_prefix and self.causal else 0
        prefix = prefix if prefix >= _LEAST_PREFIX and len(rows) > 1 else 0
        past = self._keys_and_values(rows[0][:prefix], deepest) if prefix else None
        # where nothing can be kept, the beginning is read with every text
        tails = rows if past is None else [row[prefix:] for row in rows]
        for batch in _batches([len(tail) for tail in tails]):
            captured = self._read_batch([tails[i] for i in batch], wanted, deepest, past, padding_side, tokens)
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
        padding_side: str,
        tokens: int | None,
    ) -> dict[str, np.ndarray]:
        import torch

        ids, mask = self.pad(rows, padding_side)
        # argmax of a running count: the last position whose mask is 1, whatever the padding side
        last = mask.cumsum(1).argmax(1)
        position = mask.cumsum(1).sub(1).clamp(min=0)
        cache = None
        if past is not None:
            shared = past[0][0].shape[2]
            mask = torch.cat([mask.new_ones(len(rows), shared), mask], dim=1)
            position = position + shared
            cache = self.make_cache({i: (k, v) for i, (k, v) in enumerate(past)}, len(rows))
        captured = self.run_to(deepest, sites, ids, mask, position, cache)
        index = torch.arange(len(rows), device=ids.device)
        if tokens is not None:
            index, last = index[:, None], last[:, None] + torch.arange(1 - tokens, 1, device=ids.device)
        return {site: hidden[index, last].float().cpu().numpy() for site, hidden in captured.items()}

    def run_to(
        self, deepest: int, sites: Sequence[str], ids: Any, mask: Any, position: Any, cache: Any
    ) -> dict[str, Any]:
        """Hidden states ``(batch, tokens, dim)`` at ``sites``; the pass ends after block ``deepest``."""
        import torch

        captured: dict[str, Any] = {}
        with torch.no_grad(), self._listening(sites, captured, stop_after=deepest), suppress(_Finished):
            self.base(ids, mask, position, cache)
        return captured

    def base(self, ids: Any, mask: Any, position: Any, cache: Any) -> Any:
        """The model without its head: last hidden states. Arguments that the architecture lacks are left out."""
        options: dict[str, Any] = {"attention_mask": mask, "return_dict": True}
        if "position_ids" in self._accepts:
            options["position_ids"] = position
        if cache is not None:
            options.update(self.keeping(cache))
        elif "use_cache" in self._accepts:
            options["use_cache"] = False
        return self.model.base_model(ids, **options)

    def keeping(self, cache: Any) -> dict[str, Any]:
        """Arguments that hand a cache to the model, by the name that its signature has (``past_key_values`` of old)."""
        return {"cache" if "cache" in self._accepts else "past_key_values": cache, "use_cache": True}

    def pad(self, rows: Sequence[Sequence[int]], side: str) -> tuple[Any, Any]:
        """Token ids and attention mask ``(batch, tokens)`` on the model's device."""
        import torch

        width = max(len(row) for row in rows)
        ids = torch.full((len(rows), width), self._filler(), dtype=torch.long)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for i, row in enumerate(rows):
            where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
            ids[i, where] = torch.as_tensor(row, dtype=torch.long)
            mask[i, where] = 1
        return ids.to(self.device), mask.to(self.device)

    def make_cache(self, pairs: Mapping[int, tuple[Any, Any]], batch: int) -> Any:
        """A transformers cache from keys and values ``(1 or batch, heads, tokens, width)`` of some blocks."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for block, (keys, values) in sorted(pairs.items()):
            cache.update(keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1), block)
        return cache

    def _filler(self) -> int:
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        return 0

    def _keys_and_values(self, prefix: Sequence[int], deepest: int) -> list[tuple[Any, Any]] | None:
        """Keys and values of the blocks up to ``deepest``, or ``None`` where the architecture keeps none."""
        if deepest < 0:
            return None
        import torch
        from transformers import DynamicCache

        ids, mask = self.pad([prefix], "right")
        cache = DynamicCache()
        try:
            self.run_to(deepest, [], ids, mask, torch.arange(len(prefix), device=ids.device)[None], cache)
        except TypeError:
            return None
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


def _blocks(model: Any) -> Any:
    import torch

    count = getattr(_text_config(model), "num_hidden_layers", None)
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count]
    if not lists:
        raise TypeError(
            f"{type(model).__name__} holds no list of {count} blocks, so its sites cannot be named; "
            "expected a transformer whose blocks are one torch.nn.ModuleList"
        )
    return min(lists, key=lambda pair: pair[0].count("."))[1]


def _text_config(model: Any) -> Any:
    return model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config


def _most_tokens(model: Any) -> int | None:
    """Tokens that the model takes: positions that are counted from after a padding index are fewer by that much."""
    limit = getattr(_text_config(model), "max_position_embeddings", None)
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


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices in batches of at most ``_BATCH_TOKENS`` padded tokens, longest first (memory peaks at once)."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch and (len(batch) + 1) * lengths[batch[0]] > _BATCH_TOKENS:
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
