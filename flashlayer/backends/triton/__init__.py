"""The Triton backend: which calls the kernels cover, and the tensors that they fill.

Triton is imported on the first call, so that ``import flashlayer`` needs torch alone.
"""

from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from flashlayer.backends import split_keys
from flashlayer.backends.triton import specialized, tiling
from flashlayer.backends.triton.launch import (
    launch_backward,
    launch_forward,
    launch_merge,
    launch_tangents,
)
from flashlayer.backends.triton.tiling import TUNED, bucket, interpreted, table_tiles
from flashlayer.spec import (
    AttentionExtras,
    AttentionSpec,
    Problem,
    Tensors,
    accumulation_dtype,
    longest_sequence,
    without_autocast,
)

__all__ = [
    "TUNED",
    "as_launched",
    "backward",
    "bucket",
    "candidate_tiles",
    "empty_gradients",
    "empty_results",
    "entropy_gradient",
    "forward",
    "forward_tangents",
    "has_tangents",
    "name",
    "refuses",
    "table_tiles",
    "whole_forward",
]

name = "triton"
entropy_gradient = False

INSTALLED = find_spec("triton") is not None  # looked up once: torch 2.11 can't compile the question

MAX_HEAD_DIM = 512
MAX_WIDE_HEAD_DIM = 256  # fp32 and fp64, whose tiles take two and four times the room


def candidate_tiles(kernel: str, problem: Problem) -> list[Any]:
    """Tiles that may suit a problem, for :func:`flashlayer.tune` to measure."""
    found = tiling.candidate_tiles(kernel, problem.query)
    return [*found, *specialized.candidate_tiles(kernel, problem)]


def refuses(problem: Problem) -> str | None:
    """A reason for all that is not on a GPU or in the interpreter, or has no room on the chip."""
    q, _, v, _, _ = problem
    widest = max(q.shape[-1], v.shape[-1])
    if widest > MAX_HEAD_DIM:
        return f"its kernels go up to a head dimension of {MAX_HEAD_DIM}, got {widest}"
    if q.device.type not in ("cpu", "cuda"):
        return f"it runs on CUDA and ROCm, the tensors are on {q.device}"
    if not INSTALLED:
        return "Triton is not installed"
    from flashlayer.kernels.primitives import INTERPRETED, TRITON_INTERPRETED

    if INTERPRETED != TRITON_INTERPRETED:
        return "TRITON_INTERPRET changed after Triton was imported: set it before Python starts"
    if INTERPRETED:
        return None
    if q.device.type == "cpu":
        return (
            "on the CPU its kernels run in Triton's interpreter only: "
            "set the environment variable TRITON_INTERPRET=1 before Python starts"
        )
    if q.dtype in (torch.float32, torch.float64) and widest > MAX_WIDE_HEAD_DIM:
        return (
            f"tiles of {q.dtype} have no room on a chip past a head dimension of "
            f"{MAX_WIDE_HEAD_DIM}, got {widest}"
        )
    if torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(q.device)
        if major < 8:
            return f"it needs compute capability 8.0, {q.device} has {major}.{minor}"
        small = major == 12 or (major, minor) in ((8, 6), (8, 9))  # 99 KiB of shared memory
        if small and q.dtype == torch.float64 and widest > 128:
            return "fp64 tiles of head dimensions over 128 don't fit this chip's shared memory"
    return None


@without_autocast
def forward(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, extras: AttentionExtras
) -> tuple[Tensor, ...]:
    """See :class:`flashlayer.spec.Backend`."""
    spec, extras = _with_lengths(spec, extras), _as_taken(q, k, extras)
    splits = split_keys.num_splits(q, k, v, spec, extras)
    if splits > 1:
        parts = split_keys.split_forward(whole_forward, q, k, v, spec, extras, splits)
        return _merged(parts, q, v, spec, extras)
    return whole_forward(q, k, v, spec, extras)


def as_launched(kernel: str, problem: Problem) -> Problem:
    """What :func:`whole_forward`, or the backward pass, makes of a problem in its launches."""
    q, k, v, spec, extras = problem
    spec, extras = _with_lengths(spec, extras), _as_taken(q, k, extras)
    if kernel == "forward":
        splits = split_keys.num_splits(q, k, v, spec, extras)
        if splits > 1:
            return split_keys.parts_of(q, k, v, spec, extras, splits)
    return Problem(q, k, v, spec, extras)


def whole_forward(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, extras: AttentionExtras
) -> tuple[Tensor, ...]:
    """:func:`forward` in one launch: the keys are not split."""
    o, lse = empty_results(q, v)
    if _needs_fp32(q):
        wide_o, *rest = whole_forward(q.float(), k.float(), v.float(), spec, _in_fp32(extras))
        return o.copy_(wide_o), *rest
    max_scores = torch.empty_like(lse) if spec.max_scores else None
    entropy = torch.empty_like(lse) if spec.entropy else None
    if extras.cu_seqlens_q is not None:  # no program writes the tokens past the last sequence
        for result, value in ((o, 0), (lse, -torch.inf), (max_scores, -torch.inf), (entropy, 0)):
            if result is not None:
                result.fill_(value)
    if o.numel() > 0:
        launch_forward(q, k, v, o, lse, max_scores, entropy, spec, extras)
    return o, lse, *spec.asked(max_scores, entropy)


def _merged(
    parts: tuple[Tensor, ...], q: Tensor, v: Tensor, spec: AttentionSpec, extras: AttentionExtras
) -> tuple[Tensor, ...]:
    """The results from those of :func:`split_keys.split_forward`, and the sinks."""
    o, lse = empty_results(q, v)
    max_scores = torch.empty_like(lse) if spec.max_scores else None
    entropy = torch.empty_like(lse) if spec.entropy else None
    results = o, lse, *spec.asked(max_scores, entropy)
    if _needs_fp32(q):
        wide_o = o.float()
        launch_merge((parts[0].float(), *parts[1:]), (wide_o, *results[1:]), spec, _in_fp32(extras))
        o.copy_(wide_o)
    else:
        launch_merge(parts, results, spec, extras)
    return results


def has_tangents(problem: Problem) -> bool:
    """Outputs and LSE, no masks, no dropout, and room for two accumulators: half the widest D."""
    q, _, v, spec, extras = problem
    if not (extras.attn_mask is extras.intervals is extras.dropout_seed is None):
        return False
    if spec.max_scores or spec.entropy:
        return False
    widest = MAX_HEAD_DIM if q.element_size() == 2 else MAX_WIDE_HEAD_DIM
    return max(q.shape[-1], v.shape[-1]) <= widest // 2


@without_autocast
def forward_tangents(
    primals: tuple[Tensor, Tensor, Tensor],
    tangents: Tensors,
    spec: AttentionSpec,
    extras: AttentionExtras,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :class:`flashlayer.spec.Backend`."""
    q, k, v = primals
    results = *empty_results(q, v), *empty_results(q, v)
    if _needs_fp32(q):
        wide_tangents = tuple(None if x is None else x.float() for x in tangents)
        wide = (q.float(), k.float(), v.float()), wide_tangents, spec, _in_fp32(extras)
        o, lse, o_tangent, lse_tangent = forward_tangents(*wide)
        return results[0].copy_(o), lse, results[2].copy_(o_tangent), lse_tangent
    if extras.cu_seqlens_q is not None:  # no program writes the tokens past the last sequence
        for x, value in zip(results, (0, -torch.inf, 0, 0), strict=True):
            x.fill_(value)
    if results[0].numel() > 0:
        launch_tangents(primals, tangents, results, _with_lengths(spec, extras), extras)
    return results


@without_autocast
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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """See :class:`flashlayer.spec.Backend`."""
    wants_d_mask = extras.wants_mask_gradient(spec)
    taken = _as_taken(q, k, extras)
    if taken is not extras:
        taken_spec = replace(spec, mask_gradient=wants_d_mask)
        dq, dk, dv, d_mask, d_sinks = backward(do, dlse, q, k, v, o, lse, taken_spec, taken)
        return dq, dk, dv, None if d_mask is None else d_mask.double(), d_sinks
    dq, dk, dv = empty_gradients(q, k, v)
    d_mask = None
    if wants_d_mask and extras.attn_mask is not None:
        d_mask = extras.attn_mask.new_empty(extras.attn_mask.shape)
    if _needs_fp32(q):
        wide_do, wide_q, wide_k, wide_v, wide_o = (x.float() for x in (do, q, k, v, o))
        tensors = (wide_do, dlse, wide_q, wide_k, wide_v, wide_o, lse)
        wide_spec = replace(spec, mask_gradient=wants_d_mask)
        *wide, wide_d_mask, d_sinks = backward(*tensors, wide_spec, _in_fp32(extras))
        for narrow, gradient in zip((dq, dk, dv), wide, strict=True):
            narrow.copy_(gradient)
        if d_mask is not None and wide_d_mask is not None:
            d_mask.copy_(wide_d_mask)
        if d_sinks is not None and extras.sinks is not None:
            d_sinks = d_sinks.to(extras.sinks.dtype)
        return dq, dk, dv, d_mask, d_sinks
    if extras.cu_seqlens_q is not None or q.numel() == 0 or k.numel() == 0:
        # Tokens past the last sequence, and problems without a pair of a query and a key.
        for gradient in (dq, dk, dv, d_mask):
            if gradient is not None:
                gradient.zero_()
    delta = torch.empty_like(lse)
    if lse.numel() > 0:
        tensors = (do, dlse, q, k, v, o, lse, dq, dk, dv, delta, d_mask)
        launch_backward(*tensors, _with_lengths(spec, extras), extras)
    return dq, dk, dv, d_mask, extras.sinks_gradient(lse, delta)


def _with_lengths(spec: AttentionSpec, extras: AttentionExtras) -> AttentionSpec:
    """The spec with the longest packed sequences, which an observed call can't read."""
    if extras.cu_seqlens_q is not None and spec.max_seqlen_q is None:
        spec = replace(spec, max_seqlen_q=longest_sequence(extras.cu_seqlens_q))
    if extras.cu_seqlens_k is not None and spec.max_seqlen_k is None:
        spec = replace(spec, max_seqlen_k=longest_sequence(extras.cu_seqlens_k))
    return spec


def empty_results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """See :class:`flashlayer.spec.Backend`."""
    lse = q.new_empty(q.shape[:3], dtype=accumulation_dtype(q.dtype))
    return _empty_like(q, v.shape[3]), lse


def empty_gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See :class:`flashlayer.spec.Backend`."""
    return _empty_like(q, q.shape[3]), _empty_like(k, k.shape[3]), _empty_like(v, v.shape[3])


def _empty_like(x: Tensor, head_dim: int) -> Tensor:
    """An empty ``(B, H, S, head_dim)`` in the memory order of ``x``: BSHD where x is, else BHSD."""
    batch, heads, seqlen, _ = x.shape
    if x.stride(1) < x.stride(2):
        return x.new_empty(batch, seqlen, heads, head_dim).transpose(1, 2)
    return x.new_empty(batch, heads, seqlen, head_dim)


def _needs_fp32(q: Tensor) -> bool:
    """The interpreter multiplies bf16 wrongly: there the kernels run in fp32, rounded after it."""
    return q.dtype == torch.bfloat16 and interpreted()


def _as_taken(q: Tensor, k: Tensor, extras: AttentionExtras) -> AttentionExtras:
    """The mask as the kernels take it."""
    mask = extras.attn_mask
    if mask is None:
        return extras
    if mask.dtype == torch.float64 and q.dtype != torch.float64:
        # Rounded to fp32 now and not in the kernels: its tiles don't fit the shared memory of
        # compute capability 8.6, 8.9 and 12.
        return extras._replace(attn_mask=mask.float())
    if mask.dtype == torch.bool and mask.shape[2] == 1 and q.shape[2] > 1:
        # The same keys for all queries, as padding: intervals of all queries or of none. Tiles that
        # are hidden are skipped, and no kernel loads the mask for every query.
        stops = mask[:, :, 0].expand(-1, -1, k.shape[2]).int() * q.shape[2]
        intervals = torch.stack((torch.zeros_like(stops), stops), dim=2)
        return extras._replace(attn_mask=None, intervals=intervals)
    return extras


def _in_fp32(extras: AttentionExtras) -> AttentionExtras:
    wide = (x.float() if x is not None and x.dtype == torch.bfloat16 else x for x in extras)
    return AttentionExtras(*wide)
