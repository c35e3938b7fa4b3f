"""Ring attention: keys and values travel round the ranks, partial results merge by their LSE."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from flashlayer import backends, online_softmax
from flashlayer.auxiliary import AuxOutput, AuxRequest, as_output, as_request
from flashlayer.distributed.layout import (
    Layout,
    Placement,
    Rectangle,
    Route,
    agreed_layout,
    check_mask,
    check_shards,
    graph_break,
    meet,
    plan_route,
    rectangles,
)
from flashlayer.masks import IntervalMask
from flashlayer.online_softmax import SoftmaxState
from flashlayer.problem import build_problem
from flashlayer.spec import AttentionExtras, AttentionSpec, Problem, WindowSize, accumulation_dtype


@graph_break
def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    placement: Placement = "contiguous",
    lengths: Sequence[int] | None = None,
    attn_mask: IntervalMask | None = None,
    causal: bool = False,
    window_size: WindowSize = (None, None),
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    return_aux: AuxRequest | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, AuxOutput]:
    """Self-attention over the whole sequence, of which every rank of ``group`` holds a shard.

    Each rank attends from its own queries to one rank's keys at a time, while the next keys
    arrive. The partial outputs merge by their LSE (:mod:`flashlayer.online_softmax`). In the
    backward pass keys and values travel once more, followed by the sums of their gradients, which
    end at the keys' own rank. Hops that no rank needs, because of the window or the mask, are
    skipped: nothing is sent. With a mask a rank's keys also travel no farther than to the last rank
    that needs them, and pairs of ranges without a visible pair of positions are not computed.
    Memory per rank is that of its shard, of the keys of two hops and, in the backward pass, of
    their gradients: O(S / N); and of the mask's intervals, O(S).

    Traffic: with N ranks, S positions a rank and h hops (h = N without a window) each rank sends::

        forward    (h - 1) * B * Hkv * S * (D + Dv) elements of key's dtype
        backward   the same, and h times B * Hkv * S * (D + Dv) elements of the gradients' sums,
                   fp32 (fp64 for fp64); nothing if h = 1

    on average if the shards differ in length, and at most with a mask. Query heads don't travel:
    GQA divides the traffic by ``H / Hkv``.

    Every rank must make the same calls in the same order, forward and backward: if one rank's loss
    did not depend on its output, the others would wait forever. The gradient of ``sinks``, which is
    replicated, is that of the rank's own queries, as for any replicated parameter: sum it over the
    group.

    Args:
        query: ``(B, H, S, D)``, this rank's shard; fp16, bf16, fp32 or fp64.
        key: ``(B, Hkv, S, D)``, likewise; ``H`` must be a multiple of ``Hkv``.
        value: ``(B, Hkv, S, Dv)``, likewise.
        group: the process group, with a backend that can send point to point (gloo, NCCL); the
            default group if None.
        placement: which positions a shard holds, see :func:`shard_sequence`. ``"zigzag"`` balances
            causal attention.
        lengths: the shards' lengths ``S`` by rank. If None they are gathered and the other sizes
            compared: one small exchange, for which a GPU is synchronized. If given, one exchange in
            the first call of a group.
        attn_mask: an :class:`flashlayer.masks.IntervalMask` of the whole sequence, in its positions
            for every placement, the same on every rank. Documents of a packed sequence:
            ``masks.documents(cu_seqlens=...)``. Its intervals are read on the host once for each
            mask object and layout, for which a GPU is synchronized: give all layers one object.
        causal: as in :func:`flashlayer.flash_attention`, in positions of the whole sequence.
        window_size: likewise.
        scale: likewise.
        softcap: likewise.
        sinks: ``(H,)``, the same on every rank.
        return_lse: also return the log-sum-exp.
        return_aux: also return the :class:`flashlayer.AuxOutput` of the whole rows, as
            :func:`flashlayer.flash_attention`; ``entropy`` without a gradient here.
        backend: what computes a hop, as in :func:`flashlayer.flash_attention`; not ``"standard"``.

    Returns:
        ``out`` ``(B, H, S, Dv)``, the shard of the output; with ``return_lse`` also ``lse``
        ``(B, H, S)``. Both are differentiable, once. With ``return_aux``: ``(out, AuxOutput)``.

    Raises:
        TypeError: as :func:`flashlayer.flash_attention`; ``attn_mask`` is a tensor, of which each
            rank would have to hold S / N x S elements.
        ValueError: likewise; this process is not in ``group``; the shards don't fit each other, the
            placement or the mask.

    Sources: Liu, Zaharia & Abbeel, "Ring Attention with Blockwise Transformers" (arXiv 2310.01889),
    section 3; Brandon et al., "Striped Attention" (arXiv 2311.09431), for the imbalance of causal
    work and its cure by placement.

    Example:
        >>> q, k, v = (shard_sequence(x, dim=2, placement="zigzag") for x in (q, k, v))
        >>> out = ring_attention(q, k, v, causal=True, placement="zigzag")
    """
    options = {"causal": causal, "window_size": window_size, "scale": scale, "softcap": softcap}
    request = as_request(return_aux, return_lse)
    problem = check_shards(query, key, value, sinks=sinks, return_aux=request, **options)
    layout = agreed_layout(problem, group, placement, lengths)
    mask = check_mask(attn_mask, layout, problem)
    if lengths is not None:  # else the exchange of the lengths was such a call
        meet(group, query.device)
    left, right = window_size[0], 0 if causal else window_size[1]
    ring = Ring(
        group=group,
        rank=dist.get_rank(group),
        layout=layout,
        # The window as given: the problem's own drops edges that hide nothing within one shard.
        spec=replace(problem.spec, window_left=left, window_right=right),
        backend=backend,
        mask=mask,
        route=plan_route(mask, layout, left, right),
    )
    if backend != "auto":  # "auto" always finds a backend
        ring.check_backend(problem)
    out, lse, *more = RingAttention.apply(ring, problem.query, problem.key, problem.value, sinks)
    if return_aux is not None:
        return out, as_output(request, lse, more)
    return (out, lse) if return_lse else out


class Step(NamedTuple):
    """Keys and values of the rank ``hops`` back, and the rectangles visible to our queries."""

    hops: int
    next_hops: int | None  # of the next step
    key: Tensor
    value: Tensor
    rectangles: list[Rectangle]
    mask: IntervalMask | None  # of our queries and these keys


@dataclass(frozen=True)
class Ring:
    """One call on one rank: where the shards are, and what is computed between them."""

    group: dist.ProcessGroup | None
    rank: int  # in group
    layout: Layout
    spec: AttentionSpec  # the window in positions of the whole sequence
    backend: str  # what computes a rectangle
    mask: IntervalMask | None  # of the whole sequence
    route: Route

    def source(self, hops: int) -> int:
        """The rank whose keys are here after so many hops."""
        return (self.rank - hops) % len(self.layout)

    def length(self, rank: int) -> int:
        """Length of a rank's shard."""
        return sum(map(len, self.layout[rank]))

    def traveling(self, rank: int, hops: int) -> int:
        """How many of a rank's keys go so far: all or, if nobody needs them there, none."""
        return self.length(rank) if self.route.last[rank] >= hops else 0

    def rectangles(self, source: int) -> list[Rectangle]:
        """The rectangles of another rank's keys that are visible to this rank's queries."""
        window = self.spec.window_left, self.spec.window_right
        shards = self.layout[self.rank], self.layout[source]
        return rectangles(*shards, *window, self.route.visible)

    def mask_of(self, source: int) -> IntervalMask | None:
        """The mask of this rank's queries and another rank's keys."""
        if self.mask is None:
            return None
        queries, keys = (
            [slice(r.start, r.stop) for r in self.layout[rank]] for rank in (self.rank, source)
        )
        return self.mask.crop(queries, keys)

    def problem(
        self,
        rectangle: Rectangle,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: IntervalMask | None,
        *,
        forward: bool,
    ) -> Problem:
        """One rectangle of two shards as a call of its own, without the sinks.

        ``forward``: with the numbers that the forward pass is asked for.
        """
        max_scores, entropy = self.spec.max_scores and forward, self.spec.entropy and forward
        if mask is not None:
            mask = mask.crop(rectangle.q_rows, rectangle.k_rows)
        # The inputs are already cast, and the backward pass may run under another autocast state.
        with torch.autocast(q.device.type, enabled=False):
            return build_problem(
                q[:, :, rectangle.q_rows],
                k[:, :, rectangle.k_rows],
                v[:, :, rectangle.k_rows],
                attn_mask=mask,
                window_size=rectangle.window_size,
                diagonal="top_left",
                scale=self.spec.scale,
                softcap=self.spec.softcap,
                return_aux=AuxRequest(max_scores=max_scores, entropy=entropy),
            )

    def steps(self, k: Tensor, v: Tensor) -> Iterator[Step]:
        """One step after the other, this rank's own keys first.

        While the caller computes one, the keys of the next travel. Two buffers alternate, so at
        most the keys of two steps are in memory.
        """
        all_hops = self.route.hops
        longest = max(self.length(rank) for rank in range(len(self.layout)))
        here = arriving = k.new_empty(0)
        if len(all_hops) > 1:
            here, arriving = (_empty_message(longest, k, v, k.dtype) for _ in range(2))
            for mine, packed in zip((k, v), _unpack(here, k.shape[2], k, v), strict=True):
                packed.copy_(mine)
        for hops, next_hops in itertools.zip_longest(all_hops, all_hops[1:]):
            source, works = self.source(hops), []
            if next_hops is not None:
                sent, received = (
                    x[: _message_size(self.traveling(rank, next_hops), k, v)]
                    for x, rank in ((here, source), (arriving, self.source(next_hops)))
                )
                by = next_hops - hops
                works = self.post([(dist.isend, sent, by), (dist.irecv, received, -by)])
            keys = (k, v) if hops == 0 else _unpack(here, self.traveling(source, hops), k, v)
            found = self.rectangles(source)
            yield Step(hops, next_hops, *keys, found, self.mask_of(source) if found else None)
            _wait(works)
            here, arriving = arriving, here

    def check_backend(self, problem: Problem) -> None:
        """Refuse what the backend can't compute before anything is sent."""
        q, k, v = problem[:3]
        for hops in self.route.hops:
            source = self.source(hops)
            mask = self.mask_of(source)
            shape = *k.shape[:2], self.length(source)
            k_like, v_like = (x.new_empty(()).expand(*shape, x.shape[3]) for x in (k, v))
            for rectangle in self.rectangles(source):
                for forward in (True, False):
                    problem = self.problem(rectangle, q, k_like, v_like, mask, forward=forward)
                    select_backend(problem, self.backend)

    def post(self, operations: list[tuple[Any, Tensor, int]]) -> list[dist.Work]:
        """Start to send or receive tensors, each to or from the rank that many hops on."""
        ranks = len(self.layout)
        posted = [
            dist.P2POp(operation, x, group=self.group, group_peer=(self.rank + hops) % ranks)
            for operation, x, hops in operations
            if x.numel() > 0
        ]
        return dist.batch_isend_irecv(posted) if posted else []

    def pass_on(
        self, step: Step, sums: Tensor, empty: Callable[[int], Tensor]
    ) -> tuple[list[dist.Work], Tensor, Tensor]:
        """Post a step's sums of dK and dV: on with the keys, or home after their last step.

        ``empty(rank)`` makes a buffer for the sums of a rank's keys. The second result is filled
        with the sums that the next step adds to, the third with those of this rank's own keys after
        their last step; either has no elements if nothing arrives.
        """
        hops, next_hops, last = step.hops, step.next_hops, self.route.last
        source = self.source(hops)
        arriving = home = sums[:0]
        operations: list[tuple[Any, Tensor, int]] = []
        if next_hops is not None:
            if last[source] > hops:
                operations.append((dist.isend, sums, next_hops - hops))
            if last[self.source(next_hops)] > hops:
                arriving = empty(self.source(next_hops))
                operations.append((dist.irecv, arriving, hops - next_hops))
        if 0 < hops == last[source]:
            operations.append((dist.isend, sums, -hops))
        if 0 < hops == last[self.rank]:
            home = empty(self.rank)
            operations.append((dist.irecv, home, hops))
        return self.post(operations), arriving, home


class RingAttention(torch.autograd.Function):
    """``apply(ring, q, k, v, sinks) -> (o, lse[, max_scores][, entropy])``, once differentiable.

    Only this rank's q, k, v, o and lse are kept for the backward pass.
    """

    @staticmethod
    def forward(
        ring: Ring, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Attend to the keys of one step after the other, and merge."""
        state = online_softmax.init_state(
            q.shape[:3], v.shape[3], dtype=accumulation_dtype(q.dtype), device=q.device
        )
        if sinks is not None:  # one key whose value is 0
            state = online_softmax.state_of(state.o, state.m.copy_(sinks[:, None]))
        max_scores, entropy = torch.full_like(state.m, -torch.inf), torch.zeros_like(state.m)
        for step in ring.steps(k, v):
            for rectangle in step.rectangles:
                rows = rectangle.q_rows
                problem = ring.problem(rectangle, q, step.key, step.value, step.mask, forward=True)
                o, lse, *more = select_backend(problem, ring.backend).forward(*problem)
                before = SoftmaxState(*(x[:, :, rows] for x in state))
                after = online_softmax.merge(before, online_softmax.state_of(o, lse))
                if ring.spec.max_scores:
                    max_scores[:, :, rows] = torch.maximum(max_scores[:, :, rows], more[0])
                if ring.spec.entropy:
                    entropy[:, :, rows] = online_softmax.merge_entropies(
                        torch.stack((entropy[:, :, rows], more[-1]), dim=-1),
                        torch.stack((online_softmax.lse(before), lse), dim=-1),
                        online_softmax.lse(after),
                    )
                for old, new in zip(before, after, strict=True):
                    old.copy_(new)
        o, lse = online_softmax.finalize(state).to(q.dtype), online_softmax.lse(state)
        return o, lse, *ring.spec.asked(max_scores, entropy)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        """Keep what the derivatives need."""
        ctx.ring, *tensors = inputs
        ctx.save_for_backward(*tensors, *output[:2])
        ctx.set_materialize_grads(False)
        if ctx.ring.spec.max_scores:
            ctx.mark_non_differentiable(output[2])

    @staticmethod
    def backward(
        ctx: Any, do: Tensor | None, dlse: Tensor | None, *more: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """The same steps again."""
        if ctx.ring.spec.entropy and more[-1] is not None:
            raise NotImplementedError(
                "ring_attention computes no gradient of the entropy: detach it, or use "
                "ulysses_attention with backend='tiled'"
            )
        return None, *RingGradient.apply(ctx.ring, do, dlse, *ctx.saved_tensors)


class RingGradient(torch.autograd.Function):
    """``apply(ring, do, dlse, q, k, v, sinks, o, lse)``: dq, dk, dv, d_sinks; no derivative."""

    @staticmethod
    def forward(
        ring: Ring,
        do: Tensor | None,
        dlse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        o: Tensor,
        lse: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """One step after the other; the sums of dK and dV travel one step behind their keys."""
        do = torch.zeros_like(o) if do is None else do
        dtype = accumulation_dtype(q.dtype)
        dq = torch.zeros_like(q, dtype=dtype)

        def empty(rank: int) -> Tensor:
            return _empty_message(ring.length(rank), k, v, dtype)

        # Sums of dK and dV over the earlier steps on other ranks; of our own keys over all steps.
        arriving = home = k.new_empty(0, dtype=dtype)
        works: list[dist.Work] = []
        for step in ring.steps(k, v):
            length = step.key.shape[2]
            step_sums = _empty_message(length, k, v, dtype).zero_()
            dk, dv = _unpack(step_sums, length, k, v)
            for rectangle in step.rectangles:
                rows, keys = rectangle.q_rows, rectangle.k_rows
                problem = ring.problem(rectangle, q, step.key, step.value, step.mask, forward=False)
                # The probabilities are exp(score - lse) and delta is rowsum(o * do) - dlse: with o
                # and lse over *all* keys both are those of the whole softmax, so a rectangle needs
                # nothing of the others. The kernels read lse without strides; rows may be a slice.
                partials = select_backend(problem, ring.backend).backward(
                    do[:, :, rows],
                    None if dlse is None else dlse[:, :, rows],
                    *problem[:3],
                    o[:, :, rows],
                    lse[:, :, rows].contiguous(),
                    *problem[3:],
                )
                sums_here = dq[:, :, rows], dk[:, :, keys], dv[:, :, keys]
                for total, partial in zip(sums_here, partials[:3], strict=True):
                    total += partial
            _wait(works)
            sums = step_sums if step.hops == 0 or length == 0 else step_sums.add_(arriving)
            works, arriving, arriving_home = ring.pass_on(step, sums, empty)
            if step.hops == ring.route.last[ring.rank]:
                home = sums if step.hops == 0 else arriving_home
        _wait(works)
        dk, dv = _unpack(home, k.shape[2], k, v)
        d_sinks = None
        if sinks is not None:
            delta = (o.to(lse.dtype) * do).sum(dim=-1)
            delta = delta if dlse is None else delta - dlse
            d_sinks = AttentionExtras(sinks=sinks).sinks_gradient(lse, delta)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), d_sinks

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        """Nothing to keep."""

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> None:
        """Refuse; a second derivative would be silently wrong otherwise."""
        raise NotImplementedError("ring_attention has no second derivative; use ulysses_attention")


def select_backend(problem: Problem, backend: str) -> Any:
    """The backend for a rectangle: its backward must take ``o`` and ``lse`` over all keys."""
    chosen = backends.select(backend, problem)
    if chosen.backward is not None:
        return chosen
    if backend == "auto":
        return backends.BACKENDS["tiled"]
    raise ValueError(f"backend {backend!r} can't compute a part: it has no backward of its own")


def _wait(works: list[dist.Work]) -> None:
    for work in works:
        work.wait()


def _message_size(length: int, k: Tensor, v: Tensor) -> int:
    """Elements of the keys and values of ``length`` positions, which travel as one message."""
    return k.shape[0] * k.shape[1] * length * (k.shape[3] + v.shape[3])


def _empty_message(length: int, k: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    return k.new_empty(_message_size(length, k, v), dtype=dtype)


def _unpack(message: Tensor, length: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Views of the message's keys and values; the buffer may be longer."""
    batch, kv_heads, _, dim = k.shape
    stop, edge = _message_size(length, k, v), batch * kv_heads * length * dim
    keys, values = message[:edge], message[edge:stop]
    return keys.view(batch, kv_heads, length, dim), values.view(batch, kv_heads, length, v.shape[3])
