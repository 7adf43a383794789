r"""Low-rank adapters in a language model: one place where weights are moved, read through, and disturbed.

Every adapted matrix W becomes ``W + B A`` with ``A (rank, in)`` and ``B (out, rank)`` trainable and W frozen (scaling
1). Adapted are matrices of the blocks up to a site; later blocks cannot move what is read there. One set of adapters
serves all cells of a run: :meth:`AdaptedModel.load` copies a cell's flat weights into them, matrix after matrix, A
before B.

The adapted model shares every frozen tensor with the model that it was made from and never writes to them: noise on W
is a new tensor, put in its place for the duration of a ``with`` block.

Guarantee: with ``B = 0`` it computes what the original computes, bit for bit. Always in evaluation mode: no dropout.

Reference: Hu et al. 2021 (2106.09685); the adapters themselves are peft's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from elk_stress.models.language_model import LanguageModel, text_config

__all__ = ["AdaptedModel", "Matrix", "divergence"]

_ADAPTER = "default"
# tokens of a batch whose logits are all kept: 512 x 49152 float32 are 100 MB
_BATCH_TOKENS = 512


@dataclass(frozen=True)
class Matrix:
    """One adapted matrix.

    Attributes:
        name: path in the model.
        layer: peft's layer around it.
        rms: root mean square of W.
        a, b: slices of A and B in a model's flat weights.
    """

    name: str
    layer: Any
    rms: float
    a: slice
    b: slice

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        out, width = self.layer.get_base_layer().weight.shape
        return int(out), int(width)


class AdaptedModel:
    """A causal language model with adapters up to a site.

    Args:
        model: stays as it is; its frozen tensors are shared.
        site: where activations are read.
        matrices: names of the linear layers to adapt, in every block up to the site.
        rank: of the adapters.

    Attributes:
        matrices: what was adapted, in the order of the flat weights.
        n_parameters: length of a model's flat weights.
        factors: the trainable torch parameters: A, B, A, B, ...
    """

    def __init__(self, model: LanguageModel, site: str, matrices: Sequence[str], rank: int) -> None:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        if model.silent:
            raise TypeError(f"adapters are trained on a causal language model: {model.silent}")
        self.site, self.depth, self.rank = site, model.depth(site), rank
        if self.depth < 0:
            raise ValueError("no block comes before the site 'embeddings', so nothing could be adapted; use layers.N")
        self.reader = _shared_copy(model)
        blocks = self.reader.blocks[: self.depth + 1]
        _check_linear(blocks, matrices)
        # by their whole names: a vision tower's layers may have the same last ones
        wanted = {id(m) for block in blocks for n, m in block.named_modules() if n.rsplit(".", 1)[-1] in matrices}
        names = [name for name, module in self.reader.model.named_modules() if id(module) in wanted]
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=names)
        inject_adapter_in_model(config, self.reader.model, adapter_name=_ADAPTER)
        self.reader.model.eval()
        found, start = [], 0
        layers: list[tuple[str, Any]] = [
            (n, m) for n, m in self.reader.model.named_modules() if isinstance(m, LoraLayer)
        ]
        for name, module in layers:
            a, b = (side[_ADAPTER].weight.numel() for side in (module.lora_A, module.lora_B))
            rms = float(module.get_base_layer().weight.float().square().mean().sqrt())
            found.append(Matrix(name, module, rms, slice(start, start + a), slice(start + a, start + a + b)))
            start += a + b
        self.matrices = tuple(found)
        self.n_parameters = start
        self.factors = [
            side[_ADAPTER].weight for matrix in found for side in (matrix.layer.lora_A, matrix.layer.lora_B)
        ]
        self._check_head()

    # -- weights ------------------------------------------------------------------------------------------------------

    def initial(self, seed: int) -> np.ndarray:
        """``(n_parameters,)``: peft's initialization (A random, B zero), so the model is unchanged."""
        import torch

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for matrix in self.matrices:
                matrix.layer.reset_lora_parameters(_ADAPTER, True)
        return self.flat()

    def load(self, flat: np.ndarray) -> None:
        """Put one cell's flat weights into the adapters."""
        import torch

        start = 0
        with torch.no_grad():
            for factor in self.factors:
                piece = np.array(flat[start : start + factor.numel()], dtype=np.float32)
                factor.copy_(torch.from_numpy(piece).reshape(factor.shape))
                start += factor.numel()

    def flat(self) -> np.ndarray:
        """What the adapters hold now, ``(n_parameters,)`` float32."""
        return _join(factor.detach() for factor in self.factors)

    def take_gradient(self) -> np.ndarray:
        """The gradient that was accumulated in the adapters, ``(n_parameters,)``; it is cleared."""
        gradient = _join(factor.grad for factor in self.factors)
        for factor in self.factors:
            factor.grad = None
        return gradient

    @contextmanager
    def disturbed(self, sigma: Sequence[float], normal: Callable[[int], np.ndarray]) -> Iterator[None]:
        """W + sigma_t Z_t instead of W within the block; ``normal(t)`` is Z_t, made only when it is needed."""
        import torch

        bases = [matrix.layer.get_base_layer() for matrix in self.matrices]
        originals = [base.weight for base in bases]
        try:
            for t, (base, weight) in enumerate(zip(bases, originals, strict=True)):
                noise = torch.from_numpy(normal(t)).mul_(sigma[t]).to(weight.device)
                moved = (weight.detach().float() + noise).to(weight.dtype)
                base.weight = torch.nn.Parameter(moved, requires_grad=False)
            yield
        finally:
            for base, weight in zip(bases, originals, strict=True):
                base.weight = weight

    # -- forward passes -----------------------------------------------------------------------------------------------

    def read(self, texts: Sequence[str]) -> np.ndarray:
        """``(n_texts, dim)`` float32 at the site at the last token of each text, without gradients."""
        return self.reader.read(texts, [self.site])[self.site]

    def read_with_gradient(self, rows: Sequence[Sequence[int]]) -> Any:
        """The same of token ids, ``(n, dim)`` float32, differentiable in the adapters; ends at the site."""
        import torch

        ids, mask = self.reader.pad(rows)
        captured: list[Any] = []

        def stop(module: Any, args: Any, output: Any) -> None:
            captured.append(output[0] if isinstance(output, tuple) else output)
            raise _Reached

        handle = self.reader.blocks[self.depth].register_forward_hook(stop)
        try:
            with suppress(_Reached):
                self.reader.base(ids, mask, None)
        finally:
            handle.remove()
        return captured[0][torch.arange(len(rows), device=ids.device), mask.sum(1) - 1].float()

    def last_hidden(self, rows: Sequence[Sequence[int]]) -> Any:
        """What enters the head, ``(tokens of all rows together, dim)``: rows one after another, no padding."""
        ids, mask = self.reader.pad(rows)
        return self.reader.base(ids, mask, None).last_hidden_state[mask.bool()]

    def log_p(self, hidden: Any) -> Any:
        """Next-token log-probabilities ``(tokens, vocabulary)`` float32."""
        return self._logits(hidden).float().log_softmax(dim=-1)

    def batches(self, rows: Sequence[Sequence[int]]) -> list[list[int]]:
        """Indices of rows of similar length, few enough that all their logits fit."""
        batches: list[list[int]] = [[]]
        for i in sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i)):
            if batches[-1] and (len(batches[-1]) + 1) * len(rows[batches[-1][0]]) > _BATCH_TOKENS:
                batches.append([])
            batches[-1].append(i)
        return batches

    # -- private ------------------------------------------------------------------------------------------------------

    def _logits(self, hidden: Any) -> Any:
        logits = self.reader.model.get_output_embeddings()(hidden)
        cap = getattr(text_config(self.reader.model), "final_logit_softcapping", None)
        return logits if cap is None else cap * (logits / cap).tanh()

    def _check_head(self) -> None:
        """The head must be what this class takes it for; some architectures scale their logits."""
        import torch

        ids = torch.arange(3, device=self.reader.device)[None]
        with torch.no_grad():
            expected = self.reader.model(ids).logits[0]
            found = self._logits(self.last_hidden(ids.tolist()))
        scale = float(expected.abs().max())
        if not torch.allclose(found.float(), expected.float(), atol=1e-3 * scale, rtol=1e-3):
            raise TypeError(
                f"the logits of {type(self.reader.model).__name__} are not its output embeddings of the last hidden "
                "state (capped at most), so behaviour cannot be computed; use a model with a plain head"
            )


def divergence(log_p: Any, log_q: Any) -> Any:
    """KL(p, q) in nats, ``(tokens,)``, of log-probabilities ``(tokens, vocabulary)``."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


class _Reached(Exception):
    """Ends a forward pass at the site."""


def _shared_copy(model: LanguageModel) -> LanguageModel:
    """Modules of its own, tensors shared; linear layers routed through oneDNN again where that works."""
    import itertools

    import torch

    tensors = itertools.chain(model.model.parameters(), model.model.buffers())
    modules = copy.deepcopy(model.model, {id(tensor): tensor for tensor in tensors})
    for module in modules.modules():
        if type(module) is torch.nn.Linear:
            # a replaced forward pass belongs to the original's layer
            vars(module).pop("forward", None)
    return LanguageModel.from_modules(
        modules,
        model.tokenizer,
        fingerprint=str(model.facts.get("fingerprint", "")),
        causal=True,
        dtype=model.dtype,
        device=model.device,
    )


def _check_linear(blocks: Any, matrices: Sequence[str]) -> None:
    import torch

    layers = [
        (name.rsplit(".", 1)[-1], module)
        for block in blocks
        for name, module in block.named_modules()
        if not list(module.children()) and getattr(module, "weight", None) is not None
    ]
    linear = {name for name, module in layers if isinstance(module, torch.nn.Linear)}
    if not matrices or not set(matrices) <= linear:
        raise ValueError(
            f"no linear layer of the blocks is called {', '.join(sorted(set(matrices) - linear)) or '(none given)'}; "
            f"they have {', '.join(sorted(linear)) or 'none'}: pass some of these as matrices"
        )


def _join(tensors: Iterator[Any]) -> np.ndarray:
    return np.concatenate([tensor.float().cpu().numpy().ravel() for tensor in tensors])
