r"""What a causal model does when the activation of one token is moved: behaviour shifts and their local form.

An item is a text whose last token's activation at a site is replaced by ``origin + move``. The model then goes on: the
next token, and a fixed continuation of 8 tokens, which is its own greedy continuation at the origin. Behaviour is the
``T = 9`` next-token distributions along it, and, in nats per token,

.. math:: \mathrm{shift}(m) = \frac1T \sum_{t=1}^{T} KL(p_t(\cdot \mid 0) \,\|\, p_t(\cdot \mid m))

teacher-forced on that continuation. What can be kept is kept: tokens before the last one do not depend on the move, so
their keys and values are cached; the continuation tokens' states *at* the site do not either (they attend to the moved
token only in later blocks). So a move costs ``T`` tokens through the later blocks and the head, nothing else.

That takes an architecture whose memory is keys and values, each block's own. Whether it is one is tried on a few
tokens (:func:`way_to_move`): where the quick way does not give what whole forward passes give (state-space models,
hybrids), or fails, moves go by whole forward passes over ``L + T`` tokens. Batches never mix lengths: nothing is
padded, and the model counts positions as it always does.

Where the head is linear (logits ``W h``), with ``d = W (h(m) - h(0))`` a change of the logits,

.. math:: KL = \log \sum_v p_v e^{d_v} - \sum_v p_v d_v
             = \log(1 + \sum_v p_v (e^{d_v} - 1)) - (h(m) - h(0)) \cdot W^\top p

which needs no normalized logits, loses no digits for small moves, and is summed over blocks of the vocabulary that fit
the processor's cache. Other heads (capped or scaled logits) go the plain way.

The local form is Fisher's: :math:`shift(m) = \frac12 m^\top \bar F m + O(|m|^3)` with
:math:`\bar F = \frac1T\sum_t J_t^\top (\mathrm{diag}\,p_t - p_t p_t^\top) J_t` and :math:`J_t` the logits' Jacobian.
:meth:`MovedModel.fisher` samples it: with ``y_t ~ p_t`` independent and :math:`g = \sum_t \nabla \log p_t(y_t)`,
:math:`E[g g^\top] = T \bar F`, since scores have mean zero and are independent between positions. One forward and one
backward pass give one row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from elk_stress.models.fast_linear import product
from elk_stress.models.language_model import LanguageModel, batches, key_value_pairs, unreadable

__all__ = ["CONTINUATION", "MovedModel", "way_to_move"]

# tokens of the fixed continuation; behaviour is read at one position more
CONTINUATION = 8
# rows of a batch: logits, where needed whole, take rows * 9 * vocabulary * 4 bytes: 57 MB with SmolLM2's vocabulary
_ROWS = 32
# words of the vocabulary at a time: 32 * 9 * 2048 * 4 bytes = 2.4 MB, which stays in a core's cache
_WORDS = 2048
# items whose keys and values are computed together
_ITEMS = 16


@dataclass(frozen=True, eq=False)
class _Host:
    """One item, ready to be moved.

    ``row``: its tokens before the last one. ``ids (T,)``: the last token and the continuation. By the quick way also
    ``past``: keys and values ``(heads, tokens, width)`` of ``row``, for the blocks after the site, and
    ``states (T - 1, d)``: the continuation's states at the site.
    ``log_p (T, V)``: log-probabilities at the origin. With a linear head: ``final (T, d)``: last hidden states at the
    origin, and ``mean (T, d)``: the expected row of the head under ``p``.
    """

    row: list[int]
    ids: Any
    origin: Any
    past: list[tuple[Any, Any]] | None = None
    states: Any = None
    log_p: Any = None
    final: Any = None
    mean: Any = None


class MovedModel:
    """Items of one causal model, moved at one site at their last token.

    Args:
        subject: a causal model.
        site: where the activation is replaced.
        texts: the items.
        origins: ``(n, dim)``: what each item's activation is replaced by at move zero.
        way: ``cached`` or ``whole`` passes; by default what :func:`way_to_move` finds.

    Raises:
        TypeError: a model without next-token distributions, or one that cannot be moved right.
    """

    def __init__(
        self,
        subject: LanguageModel,
        site: str,
        texts: Sequence[str],
        origins: np.ndarray,
        *,
        way: Literal["cached", "whole"] | None = None,
    ) -> None:
        if origins.shape != (len(texts), subject.dim):
            raise ValueError(f"expected origins of shape ({len(texts)}, {subject.dim}), got {origins.shape}")
        self._start(subject, site, subject.tokenize(texts), origins, way or way_to_move(subject))

    def _start(self, subject: LanguageModel, site: str, rows: list[list[int]], origins: np.ndarray, way: str) -> None:
        self.subject = subject
        self.depth = subject.depth(site)
        self._hosts_of = self._hosts_by_whole_passes if way == "whole" else self._hosts_by_cache
        self._steps = CONTINUATION
        self._rows = rows
        self._origins = np.asarray(origins, dtype=np.float32)
        self._hosts: dict[int, _Host] = {}
        self._weight: Any = None
        self._linear = False

    def prepare(self, items: Sequence[int], advance: Callable[[int], None] | None = None) -> None:
        """Keys, values, continuation and reference of ``items``, where not there yet (they are kept)."""
        missing = [i for i in dict.fromkeys(map(int, items)) if i not in self._hosts]
        for batch in batches([len(self._rows[i]) for i in missing], _ITEMS, alike=True):
            self._prepare([missing[b] for b in batch])
            if advance is not None:
                advance(len(batch))

    def shift(self, items: np.ndarray, moves: np.ndarray, advance: Callable[[int], None] | None = None) -> np.ndarray:
        """Shift in nats per token, ``items (p,)`` and ``moves (p, n, dim)`` -> ``(p, n)`` float64."""
        import torch

        self.prepare(items.tolist())
        p, n, _ = moves.shape
        flat = [(int(item), moves[i, j]) for i, item in enumerate(items) for j in range(n)]
        out = np.empty(len(flat))
        # rows of one item are neighbours
        order = sorted(range(len(flat)), key=lambda i: (flat[i][0], i))
        for batch in batches([len(self._rows[flat[i][0]]) for i in order], _ROWS, alike=True):
            chosen = [order[b] for b in batch]
            hosts = [self._hosts[flat[i][0]] for i in chosen]
            delta = torch.as_tensor(
                np.stack([flat[i][1] for i in chosen]), dtype=torch.float32, device=self.subject.device
            )
            with torch.no_grad():
                kl = self._divergence(hosts, delta)
            # rounding may leave a KL of zero slightly negative
            out[chosen] = kl.double().mean(-1).clamp(min=0).cpu().numpy()
            if advance is not None:
                advance(len(chosen))
        return out.reshape(p, n)

    def fisher(self, items: np.ndarray, rank: int, seeds: Sequence[np.random.SeedSequence]) -> np.ndarray:
        """``(p, rank, dim)`` float32: F with ``shift(move) ~ 0.5 |F move|^2`` near the origin, by sampled scores."""
        import torch

        self.prepare(items.tolist())
        out = np.empty((len(items), rank, self.subject.dim), dtype=np.float32)
        for i, item in enumerate(items.tolist()):
            host = self._hosts[item]
            rng = np.random.default_rng(seeds[i])
            # inverse CDF, in float64: the tail of a 49,152-word vocabulary is lost in float32
            cdf = host.log_p.double().exp().cumsum(-1)
            uniform = torch.as_tensor(rng.random((rank, len(host.ids))), device=cdf.device) * cdf[:, -1]
            sampled = torch.searchsorted(cdf, uniform.T.contiguous()).clamp(max=cdf.shape[1] - 1).T
            for start in range(0, rank, _ROWS):
                chosen = sampled[start : start + _ROWS]
                move = torch.zeros(len(chosen), self.subject.dim, device=cdf.device, requires_grad=True)
                with torch.enable_grad():
                    score = self._score([host] * len(chosen), move, chosen)
                    (rows,) = torch.autograd.grad(score, move)
                out[i, start : start + len(chosen)] = rows.cpu().numpy()
        out /= np.sqrt(rank * (CONTINUATION + 1))
        return out

    # -- the model ------------------------------------------------------------------------------------------------

    def _prepare(self, batch: Sequence[int]) -> None:
        """Run what comes before the last tokens once, then the origin and its greedy continuation token by token.

        The items have one length.
        """
        import torch

        rows = [self._rows[i] for i in batch]
        if len(rows[0]) < 2:
            raise ValueError("a moved item needs at least two tokens; put a context before it")
        with torch.no_grad():
            origins = torch.as_tensor(self._origins[list(batch)], device=self.subject.device)
            hosts = self._hosts_of(rows, origins)
            # by the same path as moved outputs, so that rounding is the same
            final, log_p, mean = self._reference(hosts)
        for b, (i, host) in enumerate(zip(batch, hosts, strict=True)):
            self._hosts[i] = replace(host, log_p=log_p[b].clone(), final=final[b].clone(), mean=mean[b].clone())

    def _hosts_by_cache(self, rows: Sequence[list[int]], origins: Any) -> list[_Host]:
        import torch
        from transformers import DynamicCache

        subject = self.subject
        ids, mask = subject.pad([row[:-1] for row in rows])
        cache = DynamicCache()
        subject.base(ids, mask, cache)
        before = [(k.clone(), v.clone()) for k, v in key_value_pairs(cache)[self.depth + 1 :]]
        tokens, states = [torch.as_tensor([[row[-1]] for row in rows], device=subject.device)], []
        for step in range(self._steps + 1):
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            hidden, logits = self._step(tokens[-1], mask, cache, origins[:, None] if step == 0 else None)
            if step > 0:
                states.append(hidden)
            if step < self._steps:
                tokens.append(logits[:, -1:].argmax(-1))
        all_ids, all_states = torch.cat(tokens, dim=1), torch.cat(states, dim=1)
        return [
            _Host(row[:-1], all_ids[b], origins[b], [(k[b], v[b]) for k, v in before], all_states[b])
            for b, row in enumerate(rows)
        ]

    def _hosts_by_whole_passes(self, rows: Sequence[list[int]], origins: Any) -> list[_Host]:
        import torch

        ids, _ = self.subject.pad(rows)
        for _ in range(self._steps):
            _, logits = self._pass(ids, len(rows[0]) - 1, origins, count=1, head=True)
            ids = torch.cat([ids, logits.argmax(-1)], dim=1)
        return [_Host(row[:-1], ids[b, len(row) - 1 :], origins[b]) for b, row in enumerate(rows)]

    def _reference(self, hosts: Sequence[_Host]) -> tuple[Any, Any, Any]:
        """Last hidden states, log-probabilities and expected head rows at the origin."""
        import torch

        final, logits = self._run(hosts, torch.zeros_like(torch.stack([host.origin for host in hosts])), head=True)
        if self._weight is None:
            head = self.subject.model.get_output_embeddings()
            plain = isinstance(head, torch.nn.Linear) and head.bias is None
            scale = float(logits.abs().max())
            self._linear = plain and bool(torch.allclose(head(final), logits, atol=1e-3 * scale, rtol=1e-3))
            self._weight = head.weight
        log_p = torch.log_softmax(logits.float(), dim=-1)
        return final, log_p, log_p.exp().to(self._weight.dtype) @ self._weight if self._linear else final

    def _divergence(self, hosts: Sequence[_Host], moves: Any) -> Any:
        """KL ``(rows, T)`` from the reference to the output under each move."""
        import torch

        if not self._linear:
            _, logits = self._run(hosts, moves, head=True)
            log_q = torch.log_softmax(logits.float(), dim=-1)
            log_p = torch.stack([host.log_p for host in hosts])
            return log_q.neg_().add_(log_p).mul_(log_p.exp_()).sum(-1)
        final, _ = self._run(hosts, moves, head=False)
        change = (final - torch.stack([host.final for host in hosts])).float()
        total = change.new_zeros(change.shape[:2])
        groups = [(host, [i for i, other in enumerate(hosts) if other is host]) for host in dict.fromkeys(hosts)]
        for start in range(0, self._weight.shape[0], _WORDS):
            words = slice(start, start + _WORDS)
            grown = product(change.to(self._weight.dtype), self._weight[words], self.subject.onednn).float().expm1_()
            for host, rows in groups:
                # rows of one host are neighbours
                total[rows[0] : rows[-1] + 1] += grown[rows[0] : rows[-1] + 1].mul_(host.log_p[:, words].exp()).sum(-1)
        linear = (change * torch.stack([host.mean for host in hosts]).float()).sum(-1)
        return total.log1p() - linear

    def _score(self, hosts: Sequence[_Host], moves: Any, words: Any) -> Any:
        """Sum over rows and positions of the log-probability of ``words (rows, T)`` (up to a constant)."""
        import torch

        if not self._linear:
            _, logits = self._run(hosts, moves, head=True)
            return torch.log_softmax(logits.float(), dim=-1).gather(2, words[..., None]).sum()
        final, _ = self._run(hosts, moves, head=False)
        # at the origin the gradient of log p(y) in h is W_y - E[W]: no need to run the head
        slope = self._weight[words] - torch.stack([host.mean for host in hosts])
        return (final * slope).sum()

    def _step(self, token: Any, mask: Any, cache: Any, replacement: Any) -> tuple[Any, Any]:
        """One token through the whole model: its state at the site (replaced, if asked) and the logits."""
        seen: list[Any] = []
        subject = self.subject

        def at_site(hidden: Any) -> Any:
            seen.append(hidden if replacement is None else replacement.to(hidden.dtype))
            return seen[-1]

        with self._rewriting(at_site):
            logits = subject.model(token, **subject.options(mask, cache)).logits
        return seen[0], logits

    def _run(self, hosts: Sequence[_Host], moves: Any, head: bool) -> tuple[Any, Any]:
        """Last hidden states ``(rows, T, d)``, and logits if asked, of one move per host; differentiable in moves.

        The hosts have one length.
        """
        import torch

        origins = torch.stack([host.origin for host in hosts])
        ids = torch.stack([host.ids for host in hosts])
        past = [host.past for host in hosts if host.past is not None]
        if not past:
            before = torch.as_tensor([host.row for host in hosts], device=ids.device)
            return self._pass(torch.cat([before, ids], dim=1), before.shape[1], origins + moves, ids.shape[1], head)
        width = len(hosts[0].row)
        pairs = {}
        for index in range(len(past[0])):
            keys, values = (torch.stack([each[index][kv] for each in past]) for kv in (0, 1))
            pairs[self.depth + 1 + index] = (keys, values)
        if self.depth >= 0:
            # blocks before the site are skipped; the first one's cache only says how long the past is
            empty = moves.new_zeros(len(hosts), 1, width, 1)
            pairs[0] = (empty, empty)
        cache = self.subject.make_cache(pairs, len(hosts))
        mask = torch.ones(len(hosts), width + ids.shape[1], dtype=torch.long, device=ids.device)
        states = torch.stack([host.states for host in hosts])
        hidden = torch.cat([(origins + moves)[:, None].to(states.dtype), states], dim=1)
        with self._skipping(), self._rewriting(lambda _: hidden):
            return self._outputs(ids, mask, cache, head)

    def _pass(self, ids: Any, at: int, states: Any, count: int, head: bool) -> tuple[Any, Any]:
        """The same of the last ``count`` tokens by a whole pass in which position ``at`` has ``states (rows, d)``."""
        import torch

        def swapped(hidden: Any) -> Any:
            return torch.cat([hidden[:, :at], states[:, None].to(hidden.dtype), hidden[:, at + 1 :]], dim=1)

        last = torch.arange(ids.shape[1] - count, ids.shape[1], device=ids.device).expand(len(ids), -1)
        with self._rewriting(swapped), self.subject.logits_at(last):
            final, logits = self._outputs(ids, torch.ones_like(ids), None, head)
        return final[:, -count:], logits

    def _outputs(self, ids: Any, mask: Any, cache: Any, head: bool) -> tuple[Any, Any]:
        subject = self.subject
        if not head:
            return subject.base(ids, mask, cache).last_hidden_state, None
        # what enters the head is the last hidden state; hidden_states would keep those of every block
        last: list[Any] = []
        handle = subject.model.get_output_embeddings().register_forward_pre_hook(lambda m, args: last.append(args[0]))
        try:
            logits = subject.model(ids, **subject.options(mask, cache)).logits
        finally:
            handle.remove()
        return last[0], logits

    @contextmanager
    def _rewriting(self, rewrite: Callable[[Any], Any]) -> Iterator[None]:
        """Pass the states at the site through ``rewrite``."""
        blocks = self.subject.blocks

        def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (rewrite(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": rewrite(kwargs["hidden_states"])}

        def after(module: Any, args: Any, output: Any) -> Any:
            return (rewrite(output[0]), *output[1:]) if isinstance(output, tuple) else rewrite(output)

        if self.depth < 0:
            handle = blocks[0].register_forward_pre_hook(before, with_kwargs=True)
        else:
            handle = blocks[self.depth].register_forward_hook(after)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def _skipping(self) -> Iterator[None]:
        """Make the blocks up to the site pass their input on. Restored on exit, whatever happens."""
        skipped = self.subject.blocks[: self.depth + 1]
        as_tuple = self._blocks_return_tuples()

        def identity(hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
            if not as_tuple:
                return hidden_states
            # transformers 4: the cache comes back as the second output
            return (hidden_states, kwargs.get("past_key_values", kwargs.get("past_key_value")), None)

        for block in skipped:
            block.forward = identity
        try:
            yield
        finally:
            for block in skipped:
                del block.forward

    def _blocks_return_tuples(self) -> bool:
        """Blocks return a tensor in transformers 5 and a tuple in transformers 4: look once."""
        if not hasattr(self, "_tuples"):
            kinds: list[bool] = []
            handle = self.subject.blocks[0].register_forward_hook(
                lambda m, a, out: kinds.append(isinstance(out, tuple))
            )
            ids, mask = self.subject.pad([self._rows[0][:1]])
            try:
                self.subject.base(ids, mask, None)
            finally:
                handle.remove()
            self._tuples = kinds[0]
        return self._tuples


def way_to_move(subject: LanguageModel) -> Literal["cached", "whole"]:
    """How moves go through this model, tried once on a few tokens (kept in ``subject.ways``).

    Raises:
        TypeError: it has no next-token distribution, or does not go on from a replaced state as from its own.
    """
    import torch

    if subject.silent:
        raise TypeError(f"behaviour after a move is defined for causal models only: {subject.silent}")
    if "move" in subject.ways:
        return subject.ways["move"]
    row = subject.sample(6)
    depth = len(subject.blocks) // 2
    site = subject.sites[depth + 1]
    with torch.no_grad():
        ids, mask = subject.pad([row])
        own = subject.run_to(depth, [site], ids, mask, None)[site][:, -1].float()
    # half as long as the state: large enough to tell a right output from one that ignores the move
    generator = torch.Generator().manual_seed(0)
    moves = torch.randn(own.shape, generator=generator).to(own)
    moves = torch.cat([0 * moves, 0.5 * moves * own.norm() / moves.norm()])

    def outputs(way: str) -> tuple[_Host, Any]:
        tried = MovedModel.__new__(MovedModel)
        tried._start(subject, site, [row], own.cpu().numpy(), way)
        # one token of continuation shows what eight would
        tried._steps = 1
        with torch.no_grad():
            (host,) = tried._hosts_of([row], own)
            return host, tried._run([host] * 2, moves, head=True)[1]

    def same(found: Any, expected: Any) -> bool:
        return subject.agrees(found - found.mean(-1, keepdim=True), expected - expected.mean(-1, keepdim=True))

    try:
        host, whole = outputs("whole")
        with torch.no_grad():
            ids = torch.as_tensor([[*host.row, *host.ids.tolist()]], device=subject.device)
            plain = subject.model(ids, **subject.options(torch.ones_like(ids), None)).logits[:, -len(host.ids) :]
    except Exception as error:
        raise _immovable(subject, f"a pass with one state replaced fails ({error})") from error
    if not same(whole[:1], plain):
        raise _immovable(subject, "with a state replaced by itself it says something else")
    if same(whole[1:], plain):
        raise _immovable(subject, "what it says does not depend on the state that is replaced")
    found: Literal["cached", "whole"] = "whole"
    if subject.shared:
        # whatever an architecture raises here: the quick way is not its way
        with suppress(Exception):
            quick_host, quick = outputs("cached")
            if torch.equal(quick_host.ids, host.ids) and same(quick, whole):
                found = "cached"
    subject.ways["move"] = found
    return found


def _immovable(subject: LanguageModel, cause: str) -> TypeError:
    return TypeError(str(unreadable(subject.name, cause)).replace("cannot be read right", "cannot be moved", 1))
