"""PyTorch's own flash kernel for the CPU (``aten::_scaled_dot_product_flash_attention_for_cpu``).

The fastest path on a CPU. It is wrapped rather than trusted: where it would crash (no keys), be
silently wrong (a strided last dimension, a NaN in keys beyond the causal triangle) or has no
gradient (its LSE) it is put right here; what it can't do is refused.

The kernel knows full and top-left causal attention. Packed sequences, padding masks, windows and
the bottom-right diagonal are several such problems, each a *part*: some queries, and the keys they
see. Parts of the same queries merge by their LSE. What no part names costs nothing.

The two entry points are custom ops, so a compiled graph holds them whole; outside of one the same
functions are called as they are, since an op made in Python costs more than the kernel does on a
short sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flashlayer import online_softmax
from flashlayer.spec import AttentionExtras, AttentionSpec, Diagonal, Problem

name = "aten"

# Python's own binding of the operator takes 2 us less than the one in torch.ops.
_FLASH: Any = vars(torch)["_scaled_dot_product_flash_attention_for_cpu"]

# A window that is as wide as this is cut into causal triangles, of its width: narrower ones are too
# small for the kernel.
TRIANGLE_MIN = 32
# As many queries of triangles are one call: enough to fill the cores, and their copies are small.
TRIANGLE_ROWS = 4096

# What is no triangle is cut into blocks of a quarter as many queries as the window is wide, within
# these limits, with a mask: wider blocks meet more keys that they hide, narrower ones are more
# calls (benchmarks/NOTES.md).
WINDOW_BLOCK_MIN, WINDOW_BLOCK_MAX = 128, 512

# With so few queries in a group of heads the kernel's time is that of reading keys and values, and
# it reads them once for every head; the group as the rows of one head reads them once. In fp32 that
# pays for its reshaping from so many numbers in the keys on; a bf16 product of few rows is slow at
# any length (benchmarks/NOTES.md).
FOLDED_ROWS_MAX = 64
FOLDED_FP32_MIN = 2**18


class Part(NamedTuple):
    """Some queries and the keys they see: all of them, the causal triangle, or the band's."""

    batch: slice
    q_rows: slice
    k_rows: slice | Tensor  # a slice is a view, a tensor of indices gathers
    causal: bool = False
    band: Tensor | None = None  # (M, N): 0 where seen, else -inf
    blocks: int = 1  # the rows are this many blocks, each of which sees its own keys only
    is_flipped: bool = False  # last query and key first: the triangle over the diagonal is causal
    merges: bool = False  # an earlier part had these queries

    def queries(self, x: Tensor) -> Tensor:
        """The rows of ``(B, H, Sq, ...)`` as the kernel gets them: ``(B * blocks, H, M, ...)``."""
        return self._arranged(x[self.batch, :, self.q_rows])

    def keys(self, x: Tensor) -> Tensor:
        """The same of keys or values."""
        return self._arranged(x[self.batch][:, :, self.k_rows])

    def _arranged(self, x: Tensor) -> Tensor:
        if self.blocks > 1:
            x = x.unflatten(2, (self.blocks, -1)).movedim(2, 1).flatten(0, 1)
        return x.flip(2) if self.is_flipped else x

    def restored(self, x: Tensor) -> Tensor:
        """What came of rows, in the order in which they are in the sequence."""
        x = x.flip(2) if self.is_flipped else x
        if self.blocks > 1:
            x = x.unflatten(0, (-1, self.blocks)).movedim(1, 2).flatten(2, 3)
        return x


def refuses(problem: Problem) -> str | None:
    """A reason for all but full, causal and banded attention on the CPU with Dv = D."""
    q, _, v, spec, extras = problem
    if q.device.type != "cpu":
        return f"ATen's flash kernel is wrapped for the CPU only, the tensors are on {q.device}"
    if v.shape[-1] != q.shape[-1]:
        return f"it needs value's head dimension to be query's, got {v.shape[-1]} and {q.shape[-1]}"
    for option in ("alibi_slopes", "sinks", "dropout_seed"):
        if getattr(extras, option) is not None:
            return f"it has no {option}"
    if spec.softcap is not None:
        return "it has no softcap"
    has_band = spec.window_left is not None or spec.window_right is not None
    if has_band and spec.scale <= 0:
        return f"with causal or a window it needs a positive scale, got {spec.scale}"
    if extras.attn_mask is not None:
        return _refuses_mask(problem, has_band)
    return None


def _refuses_mask(problem: Problem, has_band: bool) -> str | None:
    q, k, _, spec, extras = problem
    mask: Any = extras.attn_mask
    if mask.dtype != torch.bool or mask.shape[1] != 1 or mask.shape[2] != 1:
        return "it has no attn_mask but a bool one of shape (B or 1, 1, 1, Sk)"
    if not has_band:
        return None
    if spec.window_left is not None or spec.window_right != 0:
        return "it has no attn_mask together with a window"
    if q.shape[2] != k.shape[2] and spec.diagonal != "top_left":
        return "it has no attn_mask together with a bottom-right diagonal of unlike lengths"
    # Causal positions survive the removal of hidden keys only at the ends. That is for the values
    # of the mask to say, which a traced one has not.
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if traced or type(mask) is not Tensor:
        return "it has no attn_mask together with causal in a traced call"
    edges = mask[:, 0, 0].long().diff(dim=-1).ne_(0).sum(dim=-1)
    starts_hidden = ~mask[:, 0, 0, 0]
    if bool((edges > starts_hidden + 1).any()):
        return "it has no attn_mask together with causal but one that pads at the ends"
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, extras: AttentionExtras
) -> tuple[Tensor, Tensor]:
    """See :class:`flashlayer.spec.Backend`."""
    arguments = (q, k, v, *_flatten(q, k, spec, extras))
    if torch.compiler.is_compiling():
        return _forward_op(*arguments)
    return _forward(*arguments)


def backward(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    spec: AttentionSpec,
    extras: AttentionExtras,
) -> tuple[Tensor, Tensor, Tensor, None, None]:
    """See :class:`flashlayer.spec.Backend`."""
    arguments = (do, dlse, q, k, v, o, lse, *_flatten(q, k, spec, extras))
    if torch.compiler.is_compiling():
        return *_backward_op(*arguments), None, None
    return *_backward(*arguments), None, None


def _flatten(q: Tensor, k: Tensor, spec: AttentionSpec, extras: AttentionExtras) -> tuple:
    # Of like lengths both diagonals are one; they are where both cu_seqlens are one tensor.
    cu_seqlens = (extras.cu_seqlens_q, extras.cu_seqlens_k)
    alike = q.shape[2] == k.shape[2] if cu_seqlens[0] is None else cu_seqlens[0] is cu_seqlens[1]
    diagonal = "top_left" if alike else spec.diagonal
    band = (spec.window_left, spec.window_right, diagonal)
    return spec.scale, *band, extras.attn_mask, *cu_seqlens


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window_left: int | None,
    window_right: int | None,
    diagonal: Diagonal,
    attn_mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> tuple[Tensor, Tensor]:
    whole = attn_mask is None and cu_seqlens_q is None and not _is_empty(q, k)
    if whole and _is_one_part(window_left, window_right, diagonal):
        o, lse = _kernel(q, k, v, scale, window_right == 0)
        return o, lse
    o, lse = _results(q)
    o.zero_()
    lse.fill_(-torch.inf)
    shared = not _is_one_part(window_left, window_right, diagonal)
    band = AttentionSpec(scale, window_left, window_right, diagonal=diagonal)
    for part in _parts(q, k, band, attn_mask, cu_seqlens_q, cu_seqlens_k):
        q_part, k_part = part.queries(q), part.keys(k)
        results = _kernel(q_part, k_part, part.keys(v), scale, part.causal, part.band)
        if shared:
            _unsee(q_part, k_part, results[1], scale, part)
        o_part, lse_part = (part.restored(x) for x in results)
        rows = part.batch, slice(None), part.q_rows
        if part.merges:
            before = online_softmax.state_of(o[rows], lse[rows])
            state = online_softmax.merge(before, online_softmax.state_of(o_part, lse_part))
            o_part, lse_part = online_softmax.finalize(state), online_softmax.lse(state)
        o[rows], lse[rows] = o_part, lse_part
    return o, lse


def _backward(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
    window_left: int | None,
    window_right: int | None,
    diagonal: Diagonal,
    attn_mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    whole = attn_mask is None and cu_seqlens_q is None and not _is_empty(q, k)
    if whole and _is_one_part(window_left, window_right, diagonal):
        grads = _kernel_backward(do, dlse, q, k, v, o, lse, scale, window_right == 0)
        return _settled(grads[0]), _settled(grads[1]), _settled(grads[2])
    # Where parts share rows, their gradients are summed in fp32 at the least.
    shared = not _is_one_part(window_left, window_right, diagonal)
    dtype = torch.promote_types(k.dtype, torch.float32) if shared else k.dtype
    dq, dk, dv = (_empty(x, dtype).zero_() for x in (q, k, v))
    # A row whose scores are all -inf: exp(-inf - -inf) is NaN, exp(-inf - inf) is 0.
    lse = torch.where(lse == -torch.inf, torch.inf, lse)
    band = AttentionSpec(scale, window_left, window_right, diagonal=diagonal)
    for part in _parts(q, k, band, attn_mask, cu_seqlens_q, cu_seqlens_k):
        grads = _kernel_backward(
            part.queries(do),
            None if dlse is None else part.queries(dlse),
            part.queries(q),
            part.keys(k),
            part.keys(v),
            part.queries(o),
            part.queries(lse),
            scale,
            part.causal,
            part.band,
        )
        for whole, rows, grad in zip(
            (dq, dk, dv), (part.q_rows, part.k_rows, part.k_rows), grads, strict=True
        ):
            whole[part.batch][:, :, rows] += part.restored(grad)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _is_one_part(window_left: int | None, window_right: int | None, diagonal: Diagonal) -> bool:
    """Whether a stretch of queries and keys is a problem that the kernel knows as it stands."""
    is_causal = window_left is None and window_right == 0
    return (is_causal and diagonal == "top_left") or window_left is window_right is None


def _parts(
    q: Tensor,
    k: Tensor,
    band: AttentionSpec,
    attn_mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> Iterator[Part]:
    """The parts of a problem, none of them empty; together they hold every pair that is seen."""
    if _is_empty(q, k):  # without keys the kernel divides by zero, which ends the process
        return
    causal = band.window_left is None and band.window_right == 0
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        stretches = _sequences(cu_seqlens_q.tolist(), cu_seqlens_k.tolist())
    elif attn_mask is not None:
        stretches = _unmasked(attn_mask.expand(-1, -1, -1, k.shape[2]), q.shape[2], causal)
    else:
        stretches = iter((Part(slice(None), slice(0, q.shape[2]), slice(0, k.shape[2])),))
    has_window = not causal and (band.window_left, band.window_right) != (None, None)
    for stretch in stretches:
        if has_window:
            yield from _window(stretch, band)
        elif causal:
            yield from _causal(stretch, band)
        else:
            yield stretch


def _sequences(q_edges: list[int], k_edges: list[int]) -> Iterator[Part]:
    for index in range(len(q_edges) - 1):
        q_rows = slice(q_edges[index], q_edges[index + 1])
        k_rows = slice(k_edges[index], k_edges[index + 1])
        if q_rows.start < q_rows.stop and k_rows.start < k_rows.stop:
            yield Part(slice(None), q_rows, k_rows)


def _unmasked(mask: Tensor, seqlen_q: int, causal: bool) -> Iterator[Part]:
    """For each batch entry of the mask the keys that it shows."""
    for index, shown in enumerate(mask[:, 0, 0]):
        batch = slice(index, index + 1) if len(mask) > 1 else slice(None)
        keys = shown.nonzero().flatten()
        if len(keys) == 0 or seqlen_q == 0:
            continue
        start, stop = int(keys[0]), int(keys[-1]) + 1
        k_rows = slice(start, stop) if stop - start == len(keys) else keys
        # Causal is top-left: the queries before the first key that is shown see none.
        q_rows = slice(start if causal else 0, seqlen_q)
        if q_rows.start < seqlen_q:
            yield Part(batch, q_rows, k_rows)


def _causal(stretch: Part, band: AttentionSpec) -> Iterator[Part]:
    """The triangle; under a bottom-right diagonal next to the keys that all its queries see."""
    if isinstance(stretch.k_rows, Tensor) or band.diagonal == "top_left":
        yield stretch._replace(causal=True)
        return
    (q_start, q_stop), (k_start, k_stop) = (
        (rows.start, rows.stop) for rows in (stretch.q_rows, stretch.k_rows)
    )
    offset = band.offset(q_stop - q_start, k_stop - k_start)
    if offset > 0:
        yield stretch._replace(k_rows=slice(k_start, k_start + offset))
    yield stretch._replace(
        q_rows=slice(q_start + max(-offset, 0), q_stop),  # those before them see no key
        k_rows=slice(k_start + max(offset, 0), k_stop),
        causal=True,
        merges=offset > 0,
    )


def _window(stretch: Part, band: AttentionSpec) -> Iterator[Part]:
    r"""A stretch with a window as triangles, and in its corners as blocks with a mask.

    Where keys are as many as queries, ``n = left + right`` queries from ``start`` on see two
    triangles of ``n`` keys each, that which begins at ``start - left`` on and over its diagonal,
    that which begins at ``start + right`` on and under it, and together no key twice:

        \ \      query i, key j:  start - left + i <= j < start + right    (over)
         \ \                      start + right <= j <= start + right + i   (under)

    So no score is computed that a mask would hide but those that the kernel's own tiles hold.
    """
    left, right = band.window_left, band.window_right
    (q_start, length), (k_start, keys) = _extents(stretch)
    offset = band.offset(length, keys)
    # The queries that see a key.
    first = 0 if right is None else max(0, -offset - right)
    end = length if left is None else min(length, keys - offset + left)
    size = (left or 0) + (right or 0)
    if left is None or right is None or size < TRIANGLE_MIN or 2 * size > length or length != keys:
        yield from _masked(stretch, band, first, end)
        return
    count = (length - size) // size
    stop = left + count * size
    if right == 0:  # no query of the first ones has a window that hides a key
        q_rows, k_rows = (slice(start, start + left) for start in (q_start, k_start))
        yield stretch._replace(q_rows=q_rows, k_rows=k_rows, causal=True)
    else:
        yield from _masked(stretch, band, 0, left)
    at_once = max(1, TRIANGLE_ROWS // size)
    for index in range(0, count, at_once):
        blocks = min(at_once, count - index)
        q_first = q_start + left + index * size
        for k_first, is_over in ((k_start, True), (k_start + size, False)):
            k_first += index * size
            yield stretch._replace(
                q_rows=slice(q_first, q_first + blocks * size),
                k_rows=slice(k_first, k_first + blocks * size),
                causal=True,
                blocks=blocks,
                is_flipped=is_over,
                merges=not is_over,
            )
    yield from _masked(stretch, band, stop, length)


def _masked(stretch: Part, band: AttentionSpec, first: int, end: int) -> Iterator[Part]:
    """Queries that see a key cut into blocks, each with the keys its windows reach."""
    (q_start, length), (k_start, keys) = _extents(stretch)
    reach = sum(min(side, keys) for side in (band.window_left, band.window_right) if side)
    size = WINDOW_BLOCK_MIN
    while size < min(reach // 4, WINDOW_BLOCK_MAX):
        size *= 2
    seen: dict[tuple[int, int, int], Tensor] = {}  # all but the outermost blocks share their mask
    for start in range(first, end, size):
        stop = min(start + size, end)
        bounds = band.key_bounds(start, stop, length, keys)
        key_start, key_stop = bounds.any_start, bounds.any_stop
        part = stretch._replace(
            q_rows=slice(q_start + start, q_start + stop),
            k_rows=slice(k_start + key_start, k_start + key_stop),
        )
        if bounds.all_start <= key_start and bounds.all_stop >= key_stop:  # as of a single query
            yield part
            continue
        shape = (stop - start, key_start - start, key_stop - start)
        if shape not in seen:
            rows = start, stop, key_start, key_stop
            visible = band.visible(*rows, length, keys, torch.device("cpu"))
            zeros = torch.zeros(visible.shape, device=visible.device)  # whatever the default is
            seen[shape] = zeros.masked_fill_(~visible, -torch.inf)
        yield part._replace(band=seen[shape])


def _extents(stretch: Part) -> tuple[tuple[int, int], tuple[int, int]]:
    """Where its queries and its keys start, and how many they are."""
    assert isinstance(stretch.k_rows, slice)  # windows and masks don't come together
    q_rows, k_rows = stretch.q_rows, stretch.k_rows
    return (q_rows.start, q_rows.stop - q_rows.start), (k_rows.start, k_rows.stop - k_rows.start)


def _kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    band: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The kernel, with at least one query and one key."""
    if causal:
        k, v = _seen(k, q), _seen(v, q)
    heads, kv_heads = q.shape[1], k.shape[1]
    if heads != kv_heads and not causal and band is None and _folds(q, k):
        o, lse = _kernel(q.reshape(*k.shape[:2], -1, q.shape[3]), k, v, scale, causal)
        # Of one kv head a reshape is a view, which forward mode takes for no output.
        reshape = torch.reshape if kv_heads > 1 else torch.ops.aten._unsafe_view.default
        return reshape(o, q.shape), reshape(lse, q.shape[:3])
    return _FLASH(
        _unit_stride(q),
        _unit_stride(k),
        _unit_stride(v),
        is_causal=causal,
        attn_mask=band if band is None else band.to(q.dtype),
        scale=scale,
    )


def _unsee(q: Tensor, k: Tensor, lse: Tensor, scale: float, part: Part) -> None:
    """Set ``lse`` to -inf for rows whose scores are all -inf, as a product that overflows is.

    The kernel gives such a row o = 0 and lse = 0, which merged would weigh as much as a key of
    score 0. Few other rows have that lse, and those are told by their scores.
    """
    # A tracer has no values; it gets what the kernel says.
    if type(lse) is not Tensor or torch._C._len_torch_dispatch_stack() > 0:
        return
    group_size = q.shape[1] // k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)  # the kernel sums in fp32 at the least
    for batch, head, row in (lse == 0).nonzero().tolist():
        keys = k[batch, head // group_size, : row + 1 if part.causal else None].to(wide)
        scores = keys @ q[batch, head, row].to(wide) * scale
        if (scores if part.band is None else scores + part.band[row]).amax() == -torch.inf:
            lse[batch, head, row] = -torch.inf


def _folds(q: Tensor, k: Tensor) -> bool:
    """Whether a group of heads is better computed as the rows of one."""
    few_rows = q.shape[1] // k.shape[1] * q.shape[2] <= FOLDED_ROWS_MAX
    return few_rows and (q.dtype == torch.bfloat16 or k.numel() >= FOLDED_FP32_MIN)


def _kernel_backward(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    band: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel's backward, with at least one query and one key."""
    if dlse is not None and do.dtype == torch.float16:  # which dlse may not fit in
        q, k, v, o = (x.float() for x in (q, k, v, o))
        grads = _kernel_backward(do.float(), dlse, q, k, v, o, lse, scale, causal, band)
        return grads[0].half(), grads[1].half(), grads[2].half()
    seqlen_k, head_dim = k.shape[2], q.shape[3]
    if causal:
        k, v = _seen(k, q), _seen(v, q)
    if dlse is not None:
        # The kernel computes dS = P * (dO V^T - rowsum(O * dO)) and knows no dlse, which adds P *
        # dlse. One more column does it: with 1 in every value and dlse in dO it adds dlse to dO
        # V^T; with 0 in O, nothing to the rowsum. The column is 0 in q and k, and its gradients are
        # dropped.
        q, k, o = F.pad(q, (0, 1)), F.pad(k, (0, 1)), F.pad(o, (0, 1))
        v = F.pad(v, (0, 1), value=1.0)
        do = torch.cat((do, dlse.unsqueeze(-1).to(do.dtype)), dim=-1)
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        _unit_stride(do),
        _unit_stride(q),
        _unit_stride(k),
        _unit_stride(v),
        _unit_stride(o),
        lse,
        0.0,
        causal,
        attn_mask=band if band is None else band.to(q.dtype),
        scale=scale,
    )
    if dlse is not None:
        dq, dk, dv = dq[..., :head_dim], dk[..., :head_dim], dv[..., :head_dim]
    unseen = seqlen_k - k.shape[2]
    if unseen:
        dk, dv = F.pad(dk, (0, 0, 0, unseen)), F.pad(dv, (0, 0, 0, unseen))
    return dq, dk, dv


def _is_empty(q: Tensor, k: Tensor) -> bool:
    return q.numel() == 0 or k.numel() == 0


def _seen(x: Tensor, q: Tensor) -> Tensor:
    """The keys or values that some query of a causal problem sees.

    The kernel multiplies the others by a probability of 0, and 0 * NaN is NaN.
    """
    return x if x.shape[2] <= q.shape[2] else x[:, :, : q.shape[2]]


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(x: Tensor) -> tuple[int, int, int, int]:
    """The kernel's gradients have the heads of a token together: ``(B, S, H, D)`` transposed."""
    _, heads, seqlen, head_dim = x.shape
    return seqlen * heads * head_dim, head_dim, heads * head_dim, 1


def _empty(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Of x's shape, laid out as the kernel lays out gradients; not a view of anything."""
    return x.new_empty_strided(x.shape, _strides(x), dtype=dtype or x.dtype)


def _settled(x: Tensor) -> Tensor:
    """``x`` in the layout of :func:`_empty`, which it has but for the odd case."""
    return x if x.stride() == _strides(x) else _empty(x).copy_(x)


def _results(q: Tensor) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    _, heads, seqlen, _ = q.shape
    strides = (seqlen * heads, 1, heads)
    return torch.empty_like(q), q.new_empty_strided(q.shape[:3], strides, dtype=lse_dtype)


@torch.library.custom_op("flashlayer::aten_forward", mutates_args=())
def _forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window_left: int | None,
    window_right: int | None,
    diagonal: str,
    attn_mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> tuple[Tensor, Tensor]:
    tensors = (attn_mask, cu_seqlens_q, cu_seqlens_k)
    band: tuple[Any, Any, Any] = (window_left, window_right, diagonal)
    o, lse = _forward(q, k, v, scale, *band, *tensors)
    expected = _results(q)  # the kernel's own layout but where q had to be copied or folded for it
    o, lse = (
        actual if actual.stride() == fake.stride() else fake.copy_(actual)
        for actual, fake in zip((o, lse), expected, strict=True)
    )
    return o, lse


@_forward_op.register_fake
def _(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return _results(q)


@torch.library.custom_op("flashlayer::aten_backward", mutates_args=())
def _backward_op(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
    window_left: int | None,
    window_right: int | None,
    diagonal: str,
    attn_mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (attn_mask, cu_seqlens_q, cu_seqlens_k)
    band: tuple[Any, Any, Any] = (window_left, window_right, diagonal)
    return _backward(do, dlse, q, k, v, o, lse, scale, *band, *tensors)


@_backward_op.register_fake
def _(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(q), _empty(k), _empty(v)
