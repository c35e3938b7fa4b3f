"""The warp-specialised kernels for Hopper, forward, dK/dV and dQ: which calls they take; launches.

They have run on an emulator and were never timed, so no table names them: :func:`flashlayer.tune`
offers them, and takes each where it is right and faster.
"""

import math
from typing import Any

import torch
from torch import Tensor

from flashlayer.backends.triton import tiling
from flashlayer.backends.triton.arguments import strided
from flashlayer.spec import AttentionExtras, AttentionSpec, Problem

HEAD_DIMS = (64, 128)
# Those whose names of Gluon's functions are in flashlayer.kernels.gluon_api.
TRITON_VERSIONS = ((3, 6), (3, 7), (3, 8), (3, 9))


def refuses(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, extras: AttentionExtras
) -> str | None:
    """Why the plain kernel must compute this call; None if this one can."""
    import triton

    if tiling.target(q.device) != "sm_90":
        return "it is for compute capability 9.0"
    if tiling.triton_version() not in TRITON_VERSIONS:
        return f"it knows Gluon as of Triton 3.6 to 3.9, this is Triton {triton.__version__}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, got {q.dtype}"
    if q.shape[3] not in HEAD_DIMS or v.shape[3] != q.shape[3]:
        return f"it takes head dimensions {HEAD_DIMS}, got {q.shape[3]} and {v.shape[3]}"
    if any(option is not None for option in (*extras, spec.softcap, spec.window_left)):
        return "it knows no option but causal and the right side of the window"
    if spec.max_scores or spec.entropy:
        return "it returns no max_scores and no entropy"
    if not spec.scale > 0:
        return f"it takes positive scales, got {spec.scale}"
    if not all(tiling.has_tma_strides(x) for x in (q, k, v)):
        return "TMA needs keys, contiguous rows, addresses and strides in multiples of 16 bytes"
    return None


def refuses_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, extras: AttentionExtras
) -> str | None:
    """The same of the backward kernels."""
    if q.shape[0] * q.shape[1] * q.shape[2] >= 1 << 31:
        return "its coordinates of the rows of all heads are 32-bit"
    if not tiling.has_tma_strides(do):
        return "TMA needs a gradient of contiguous rows, address and strides multiples of 16 bytes"
    return refuses(q, k, v, spec, extras)


def candidate_tiles(kernel: str, problem: Problem) -> list[Any]:
    """The variants of a kernel that may suit a problem; none where it refuses."""
    from flashlayer.kernels.tiles import specialized_candidates

    if refuses(*problem) is not None:
        return []
    return specialized_candidates(kernel, problem.query.shape[3])


def launch(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, spec: AttentionSpec, tiles: Any
) -> None:
    """Fill ``o`` and ``lse`` of a call that :func:`refuses` does not refuse."""
    from flashlayer.kernels.hopper import CONSUMER_WARPS, Config, hopper_forward_kernel

    batch, heads, seqlen_q, head_dim = q.shape
    num_blocks = -(-seqlen_q // tiles.BLOCK_M)
    keys = _visible_keys(q, k, spec)
    causal = spec.window_right is not None
    rows = tiles.BLOCK_M // 2  # two consumers
    kernel: Any = hopper_forward_kernel[(num_blocks * heads * batch,)]
    kernel(
        q=_descriptor(q, rows),
        k=_descriptor(k[:, :, :keys], tiles.BLOCK_N),
        v=_descriptor(v[:, :, :keys], tiles.BLOCK_N),
        o=strided(o),
        lse_ptr=lse,
        heads=heads,
        group=heads // k.shape[1],
        seqlen_q=seqlen_q,
        k_length=keys,
        num_blocks=num_blocks,
        heads_together=tiling.heads_together(tiles, spec, heads, None, k, v),
        offset=min(spec.offset(seqlen_q, k.shape[2]) + (spec.window_right or 0), keys),
        scale_log2=spec.scale * math.log2(math.e),
        CONFIG=Config(tiles.BLOCK_N, head_dim, tiles.num_stages, causal, tiles.takes_turns),
        num_warps=CONSUMER_WARPS,
    )


def launch_dkdv(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dk: Tensor,
    dv: Tensor,
    statistics: Any,
    spec: AttentionSpec,
    tiles: Any,
) -> None:
    """Fill ``dk`` and ``dv`` of a call that :func:`refuses_backward` does not refuse."""
    from flashlayer.kernels.hopper import CONSUMER_WARPS
    from flashlayer.kernels.hopper_backward import hopper_dkdv_kernel

    kv_heads, seqlen_k = k.shape[1:3]
    num_blocks = -(-seqlen_k // tiles.BLOCK_N)
    keys = _visible_keys(q, k, spec)
    rows = tiles.BLOCK_N // 2  # two consumers
    kernel: Any = hopper_dkdv_kernel[(num_blocks * kv_heads * k.shape[0],)]
    kernel(
        q=_descriptor(q, tiles.BLOCK_M),
        k=_descriptor(k[:, :, :keys], rows),
        v=_descriptor(v[:, :, :keys], rows),
        do=_descriptor(do, tiles.BLOCK_M),
        shift=_number_descriptor(statistics.shift_ptr, tiles.BLOCK_M),
        delta=_number_descriptor(statistics.delta_ptr, tiles.BLOCK_M),
        dk=strided(dk),
        dv=strided(dv),
        kv_heads=kv_heads,
        group=q.shape[1] // kv_heads,
        seqlen_q=q.shape[2],
        seqlen_k=seqlen_k,
        num_blocks=num_blocks,
        heads_together=tiling.heads_together(tiles, spec, kv_heads, None, q, do),
        num_warps=CONSUMER_WARPS,
        **_gradient_arguments(q, k, keys, spec, tiles, tiles.BLOCK_M),
    )


def launch_dq(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor,
    statistics: Any,
    spec: AttentionSpec,
    tiles: Any,
) -> None:
    """Fill ``dq`` of a call that :func:`refuses_backward` does not refuse."""
    from flashlayer.kernels.hopper import CONSUMER_WARPS
    from flashlayer.kernels.hopper_backward import hopper_dq_kernel

    batch, heads, seqlen_q, _ = q.shape
    num_blocks = -(-seqlen_q // tiles.BLOCK_M)
    keys = _visible_keys(q, k, spec)
    rows = tiles.BLOCK_M // 2  # two consumers
    kernel: Any = hopper_dq_kernel[(num_blocks * heads * batch,)]
    kernel(
        q=_descriptor(q, rows),
        k=_descriptor(k[:, :, :keys], tiles.BLOCK_N),
        v=_descriptor(v[:, :, :keys], tiles.BLOCK_N),
        do=_descriptor(do, rows),
        dq=strided(dq),
        statistics=statistics,
        heads=heads,
        group=heads // k.shape[1],
        seqlen_q=seqlen_q,
        k_length=keys,
        num_blocks=num_blocks,
        heads_together=tiling.heads_together(tiles, spec, heads, None, k, v),
        num_warps=CONSUMER_WARPS,
        **_gradient_arguments(q, k, keys, spec, tiles, tiles.BLOCK_N),
    )


def _gradient_arguments(
    q: Tensor, k: Tensor, keys: int, spec: AttentionSpec, tiles: Any, streamed: int
) -> dict[str, Any]:
    """What both backward kernels take of the geometry and the scale."""
    from flashlayer.kernels.hopper import Config

    causal = spec.window_right is not None
    return {
        "offset": min(spec.offset(q.shape[2], k.shape[2]) + (spec.window_right or 0), keys),
        "scale_log2": spec.scale * math.log2(math.e),
        "scale": spec.scale,
        "CONFIG": Config(streamed, q.shape[3], tiles.num_stages, causal, tiles.takes_turns),
    }


def _visible_keys(q: Tensor, k: Tensor, spec: AttentionSpec) -> int:
    """Keys up to the last that any query sees; TMA reads zeros for what lies behind, be it NaN."""
    seqlen_q, seqlen_k = q.shape[2], k.shape[2]
    if spec.window_right is None:
        return seqlen_k
    return min(seqlen_k, seqlen_q + spec.offset(seqlen_q, seqlen_k) + spec.window_right)


def _descriptor(x: Tensor, rows: int) -> Any:
    """A tensor map that loads ``rows`` whole rows of a head, zeros past the last one."""
    from flashlayer.kernels.gluon_api import TensorDescriptor, gl

    box = [1, 1, rows, x.shape[3]]
    dtype = gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16
    layout: Any = gl.NVMMASharedLayout.get_default_for(box, dtype)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), box, layout)


def _number_descriptor(x: Tensor, count: int) -> Any:
    """A tensor map that loads ``count`` numbers of a contiguous fp32 tensor from any one on."""
    from flashlayer.kernels.gluon_api import TensorDescriptor, gl

    layout: Any = gl.NVMMASharedLayout.get_default_for([count], gl.float32)
    return TensorDescriptor(x.view(-1), [x.numel()], [1], [count], layout)
