r"""A causal model that stores its thoughts at one site in another code, and reads them back right after.

At the site (the residual stream after block N) every token's activation h is replaced by its code, and what enters
block N+1 is decoded again:

.. math:: h' = c + Q (h - c), \qquad h = c + Q^\top (h' - c), \qquad Q^\top Q = I.

Whoever reads the site sees h'; the rest of the model sees h. In exact arithmetic the output is the same for every Q and
c. :func:`undone_shift` checks that on real forward passes of the model with both maps built in: its rounding is what is
measured. The maps act before the next block's norm, whose gains no rotation passes through.

Both maps are computed in float64 and rounded once to the model's own precision, as the residual stream is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from elk_stress.models.language_model import LanguageModel, batches
from elk_stress.models.patched import CONTINUATION

__all__ = ["can_recode", "recoded", "undone_shift"]

# items of a batch: logits of all their tokens are held twice (8 x 40 tokens x 49,152 words x 4 bytes = 63 MB)
_ROWS = 8


def can_recode(subject: LanguageModel, site: str) -> bool:
    """Whether the model writes the site and reads it in different blocks, so that a code fits between them."""
    return subject.causal and 0 <= subject.depth(site) < len(subject.blocks) - 1


@contextmanager
def recoded(
    subject: LanguageModel, site: str, rotation: np.ndarray, centre: np.ndarray, *, undo: bool = True
) -> Iterator[None]:
    """While open, the model stores every token at ``site`` as ``centre + rotation (h - centre)``.

    Args:
        subject: a causal model; :meth:`LanguageModel.read` inside reads the code (past the cache on disk, if any).
        site: ``layers.N``, not the last one.
        rotation: Q, ``(dim, dim)`` orthogonal.
        centre: c, ``(dim,)``.
        undo: decode before the next block; ``False`` leaves the model with what it cannot read (a control).

    Raises:
        ValueError: a site with no block behind or before it, or a rotation that is not orthogonal.
    """
    import torch

    if not can_recode(subject, site):
        raise ValueError(
            f"a code at {site} would have to be written and read by blocks of a causal model; use one of "
            f"layers.0 to layers.{len(subject.blocks) - 2}"
        )
    rotation, centre = np.asarray(rotation, dtype=float), np.asarray(centre, dtype=float)
    if rotation.shape != (subject.dim, subject.dim) or centre.shape != (subject.dim,):
        raise ValueError(
            f"expected a rotation ({subject.dim}, {subject.dim}) and a centre ({subject.dim},), got {rotation.shape} "
            f"and {centre.shape}"
        )
    error = float(np.abs(rotation @ rotation.T - np.eye(subject.dim)).max())
    if not error < 1e-6:
        raise ValueError(f"only an orthogonal rotation is undone by its transpose; Q Q^T differs from I by {error:.2g}")
    q = torch.as_tensor(rotation, device=subject.device)
    c = torch.as_tensor(centre, device=subject.device)

    def mapped(hidden: Any, matrix: Any) -> Any:
        return (c + (hidden.double() - c) @ matrix).to(hidden.dtype)

    def encode(module: Any, args: Any, output: Any) -> Any:
        return (mapped(output[0], q.T), *output[1:]) if isinstance(output, tuple) else mapped(output, q.T)

    def decode(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (mapped(args[0], q), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": mapped(kwargs["hidden_states"], q)}

    depth = subject.depth(site)
    handles = [subject.blocks[depth].register_forward_hook(encode)]
    if undo:
        handles.append(subject.blocks[depth + 1].register_forward_pre_hook(decode, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def undone_shift(
    subject: LanguageModel,
    site: str,
    rotation: np.ndarray,
    centre: np.ndarray,
    texts: Sequence[str],
    *,
    undo: bool = True,
    advance: Callable[[int], None] | None = None,
) -> np.ndarray:
    """``(n,)`` nats per token between the model and the model that recodes the site, by whole forward passes.

    KL over the next token and 8 more of the plain model's greedy continuation, as everywhere
    (:mod:`elk_stress.models.patched`).

    Args:
        subject, site, rotation, centre, undo: see :func:`recoded`.
        texts: what the model reads.
        advance: called with the number of texts finished, for progress bars.
    """
    import torch

    rows = subject.tokenize(texts)
    out = np.empty(len(rows))
    # texts of one length share a batch: nothing is padded, and the model counts positions as it always does
    for chosen in batches([len(row) for row in rows], _ROWS, alike=True):
        with torch.no_grad():
            ids, _ = subject.pad([rows[i] for i in chosen])
            for _ in range(CONTINUATION):
                ids = torch.cat([ids, _logits(subject, ids)[:, -1:].argmax(-1)], dim=1)
            plain = _log_probabilities(subject, ids)
            with recoded(subject, site, rotation, centre, undo=undo):
                coded = _log_probabilities(subject, ids)
            nats = (plain.exp() * (plain - coded)).sum(-1).mean(-1)
        # rounding may leave a KL of zero slightly negative
        out[chosen] = nats.clamp(min=0).cpu().numpy()
        if advance is not None:
            advance(len(chosen))
    return out


def _log_probabilities(subject: LanguageModel, ids: Any) -> Any:
    """``(batch, 9, V)`` float64: what follows the text and each token of its continuation."""
    import torch

    return torch.log_softmax(_logits(subject, ids)[:, -CONTINUATION - 1 :].double(), dim=-1)


def _logits(subject: LanguageModel, ids: Any) -> Any:
    """``(batch, tokens, V)`` of texts of one length."""
    import torch

    return subject.model(ids, **subject.options(torch.ones_like(ids), None)).logits
