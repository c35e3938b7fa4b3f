"""The Triton kernels: which calls they cover, and how they are launched.

Triton is imported on the first call, so that ``import flashlayer`` needs torch alone.
"""

import functools
import warnings
from contextlib import AbstractContextManager
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from flashlayer import philox
from flashlayer.backends import split_keys
from flashlayer.spec import AttentionExtras, AttentionSpec, Problem, longest_sequence

name = "triton"

INSTALLED = find_spec("triton") is not None  # looked up once: torch 2.11 can't compile the question

MAX_HEAD_DIM = 512
MAX_WIDE_HEAD_DIM = 256  # fp32 and fp64, whose tiles take two and four times the room


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


def forward(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, extras: AttentionExtras
) -> tuple[Tensor, Tensor]:
    """See :class:`flashlayer.spec.Backend`."""
    spec = _with_lengths(spec, extras)
    splits = split_keys.num_splits(q, k, v, spec, extras)
    if splits > 1:
        return split_keys.split_forward(_forward, q, k, v, spec, extras, splits)
    return _forward(q, k, v, spec, extras)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, extras: AttentionExtras
) -> tuple[Tensor, Tensor]:
    o, lse = empty_results(q, v)
    if _needs_fp32(q):
        wide_o, lse = _forward(q.float(), k.float(), v.float(), spec, _in_fp32(extras))
        return o.copy_(wide_o), lse
    if extras.cu_seqlens_q is not None:  # no program writes the tokens past the last sequence
        o.zero_()
        lse.fill_(-torch.inf)
    if o.numel() > 0:
        with _launching(q):
            launch_forward(q, k, v, o, lse, spec, extras)
    return o, lse


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
        with _launching(q):
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


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    spec: AttentionSpec,
    extras: AttentionExtras,
) -> None:
    """Fill ``o``, which is not empty, and ``lse``."""
    from flashlayer.kernels.forward import forward_kernel

    tiles = _tiles("forward", q, v, spec, extras)
    num_blocks = _num_blocks(spec.max_seqlen_q, q.shape[2], tiles.BLOCK_M)
    grid = num_blocks * q.shape[1] * _sequences(q, extras)
    if grid == 0:
        return
    launch: Any = forward_kernel[(grid,)]  # Triton types its launcher as the kernel it is not
    launch(
        **_inputs(q, k, v, spec, extras),
        **_options(q, extras, spec),
        **_packing(extras),
        **_pipeline("forward", tiles, tiles.BLOCK_N, extras, k_descriptor=k, v_descriptor=v),
        o_ptr=o,
        lse_ptr=lse,
        o_strides=o.stride(),
        heads=q.shape[1],
        group=q.shape[1] // k.shape[1],
        num_blocks=num_blocks,
        scale=max(abs(spec.scale), 1e-30),  # with sign 0 any positive factor will do
        SCALE_SIGN=(spec.scale > 0) - (spec.scale < 0),
        **_mask(extras),
        sinks_ptr=extras.sinks,
    )


def launch_backward(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    delta: Tensor,
    d_mask: Tensor | None,
    spec: AttentionSpec,
    extras: AttentionExtras,
) -> None:
    """Fill ``dq``, ``dk``, ``dv``, ``delta`` (B, H, Sq), not empty, and ``d_mask`` where wanted."""
    from flashlayer.kernels.backward import delta_kernel, dkdv_kernel, dmask_kernel, dq_kernel
    from flashlayer.kernels.tiles import delta_rows, head_tiles

    batch, heads, seqlen_q, _ = q.shape
    kv_heads, seqlen_k, value_dim = v.shape[1:]
    sequences = _sequences(q, extras)
    rows = delta_rows(value_dim)
    launch: Any = delta_kernel[(_num_blocks(None, seqlen_q, rows) * heads * batch,)]
    launch(
        o_ptr=o,
        do_ptr=do,
        dlse_ptr=None if dlse is None else dlse.contiguous(),
        delta_ptr=delta,
        o_strides=o.stride(),
        do_strides=do.stride(),
        heads=heads,
        seqlen_q=seqlen_q,
        VALUE_DIM=value_dim,
        BLOCK_DV=head_tiles(value_dim),
        BLOCK_M=rows,
    )
    if seqlen_k == 0 or sequences == 0:
        return
    shared = {
        **_inputs(q, k, v, spec, extras),
        **_options(q, extras, spec),
        "do_ptr": do,
        "lse_ptr": lse,
        "delta_ptr": delta,
        "do_strides": do.stride(),
        "scale": spec.scale,
        **_mask(extras),
    }
    tiles = _tiles("dkdv", q, v, spec, extras)
    dense = extras.cu_seqlens_q is None  # else the next sequence follows a ragged tile of queries
    num_blocks = _num_blocks(spec.max_seqlen_k, seqlen_k, tiles.BLOCK_N)
    if num_blocks > 0:
        launch = dkdv_kernel[(num_blocks * kv_heads * sequences,)]
        launch(
            **shared,
            **_packing(extras),
            **_pipeline(
                "dkdv", tiles, tiles.BLOCK_M, extras, dense, q_descriptor=q, do_descriptor=do
            ),
            dk_ptr=dk,
            dv_ptr=dv,
            dk_strides=dk.stride(),
            dv_strides=dv.stride(),
            kv_heads=kv_heads,
            num_blocks=num_blocks,
            GROUP=heads // kv_heads,
            ROW_COPIES=_row_copies(tiles),
        )
    tiles = _tiles("dq", q, v, spec, extras)
    num_blocks = _num_blocks(spec.max_seqlen_q, seqlen_q, tiles.BLOCK_M)
    if num_blocks > 0:
        launch = dq_kernel[(num_blocks * heads * sequences,)]
        launch(
            **shared,
            **_packing(extras),
            **_pipeline("dq", tiles, tiles.BLOCK_N, extras, k_descriptor=k, v_descriptor=v),
            dq_ptr=dq,
            dq_strides=dq.stride(),
            heads=heads,
            group=heads // kv_heads,
            num_blocks=num_blocks,
        )
    if d_mask is not None:
        mask_batch, mask_heads, mask_q, mask_k = d_mask.shape
        q_blocks = _num_blocks(None, mask_q, tiles.BLOCK_M)
        k_blocks = _num_blocks(None, mask_k, tiles.BLOCK_N)
        launch = dmask_kernel[(q_blocks * k_blocks * mask_heads * mask_batch,)]
        launch(
            **shared,
            dmask_ptr=d_mask,
            batches=batch,
            heads=heads,
            group=heads // kv_heads,
            mask_heads=mask_heads,
            q_blocks=q_blocks,
            k_blocks=k_blocks,
            OVER_BATCH=mask_batch == 1,
            OVER_HEADS=mask_heads == 1,
            OVER_QUERIES=mask_q == 1,
            OVER_KEYS=mask_k == 1,
            **tiles.launch_options() | ({"num_stages": 1} if _lacks_fences("dq", q) else {}),
        )


def _inputs(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, extras: AttentionExtras
) -> dict[str, Any]:
    """What every kernel takes of q, k, v and the geometry."""
    from flashlayer.kernels.tiles import head_tiles

    offset: int | None = spec.offset(q.shape[2], k.shape[2])
    if extras.cu_seqlens_q is not None:  # None: the bottom right of each sequence
        offset = None if spec.diagonal == "bottom_right" else 0
    return {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "q_strides": q.stride(),
        "k_strides": k.stride(),
        "v_strides": v.stride(),
        "seqlen_q": q.shape[2],
        "seqlen_k": k.shape[2],
        "offset": offset,
        "window_left": spec.window_left,
        "window_right": spec.window_right,
        "HEAD_DIM": q.shape[3],
        "VALUE_DIM": v.shape[3],
        "BLOCK_D": head_tiles(q.shape[3]),
        "BLOCK_DV": head_tiles(v.shape[3]),
        "INPUT_PRECISION": _input_precision(q),
    }


def _pipeline(
    kernel: str,
    tiles: Any,
    rows: int,
    extras: AttentionExtras,
    allowed: bool = True,
    **tensors: Tensor,
) -> dict[str, Any]:
    """The descriptors of the streamed tensors, by name, and how many of their tiles are in flight.

    Where the compiler leaves out proxy fences, tiles are streamed through descriptors (TMA, which
    needs none), or one at a time through registers.
    """
    unfenced = _lacks_fences(kernel, next(iter(tensors.values())))
    if unfenced:
        tiles = replace(tiles, descriptors=True)
    described = {
        name: _descriptor(x, tiles, rows, extras) if allowed else None
        for name, x in tensors.items()
    }
    options = tiles.launch_options()
    if unfenced and None in described.values():
        described = dict.fromkeys(described)
        options["num_stages"] = 1
    return {**described, **options, "EDGE_STAGES": 1 if unfenced else None}


def _lacks_fences(kernel: str, x: Tensor) -> bool:
    """Whether Triton may leave out the ``fence.proxy.async`` between cp.async and wgmma.

    wgmma then reads shared memory through the asynchronous proxy that cp.async has written through
    the generic one (PTX ISA, "Async proxy"), which is a race. So it is on sm_90 before Triton 3.7,
    and for the second product of dQ in TF32 before 3.9: seen by executing the PTX (``tests/ptx``).
    """
    if _target(x.device) != "sm_90":
        return False
    import triton

    version = _version(triton.__version__)
    tf32_dq = kernel == "dq" and _input_precision(x) == "tf32"
    return version < (3, 7) or (version < (3, 9) and tf32_dq)


def _row_copies(tiles: Any) -> int:
    """See ``load_rows`` of the backward kernels: more than 1 with Triton before 3.7 only."""
    import triton

    if _interpreted() or _version(triton.__version__) >= (3, 7):
        return 1
    return max(1, 32 * tiles.num_warps // tiles.BLOCK_M)


@functools.cache
def _version(text: str) -> tuple[int, int]:
    major, minor, *_ = text.split(".")
    return int(major), int(minor)


def _descriptor(x: Tensor, tiles: Any, rows: int, extras: AttentionExtras) -> Any:
    """A tensor descriptor that loads ``rows`` whole rows of a head (TMA), None where there is none.

    Where the tiles ask for it: from sm_90 on, in half precision, for a head dimension of one column
    tile whose rows are aligned to 16 bytes. Under a mask what is hidden may hold NaN, which a
    descriptor would load.
    """
    if not tiles.descriptors:
        return None
    from triton.tools.tensor_descriptor import TensorDescriptor

    from flashlayer.kernels.tiles import head_tiles

    widths = head_tiles(x.shape[3])
    if (
        _target(x.device) not in ("sm_90", "sm_100", "interpreter")
        or x.element_size() > 2
        or len(widths) != 1
        or widths[0] > 256  # the widest box that TMA copies
        or extras.attn_mask is not None
        or x.numel() == 0
        or x.stride(3) != 1
        or x.data_ptr() % 16 != 0
        or any(stride <= 0 or stride * x.element_size() % 16 != 0 for stride in x.stride()[:3])
    ):
        return None
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, widths[0]])


def _options(q: Tensor, extras: AttentionExtras, spec: AttentionSpec) -> dict[str, Any]:
    """Softcap, ALiBi and dropout; None where off, which compiles their code away."""
    slopes = extras.alibi_slopes
    drops = extras.dropout_seed is not None
    return {
        "softcap": spec.softcap or 1.0,
        "SOFTCAP": spec.softcap is not None,
        "slopes_ptr": slopes,
        "slopes_stride": None if slopes is None else _own_stride(slopes, 0),
        "seed_ptr": extras.dropout_seed,
        "threshold": philox.threshold(spec.dropout_p) if drops else 0,
        "keep_scale": 1 / ((1 - spec.dropout_p) or 1.0),
    }


def _packing(extras: AttentionExtras) -> dict[str, Tensor | None]:
    return {
        "cu_seqlens_q_ptr": extras.cu_seqlens_q,
        "cu_seqlens_k_ptr": extras.cu_seqlens_k,
    }


def _mask(extras: AttentionExtras) -> dict[str, Any]:
    """The mask as the kernels read it: bytes for bools, stride 0 where it has one entry for all.

    Its strides change with the lengths, so that they are no constants of the kernel but for what
    vectorizes a load: whether rows follow each other in units of 16 elements, and the last one.
    """
    mask = extras.attn_mask
    names = ("mask_batch", "mask_head", "mask_row", "mask_column")
    if mask is None:
        return {"mask_ptr": None, **dict.fromkeys(names), "MASK_UNIT": 1, "MASK_STEP": None}
    *strides, column = (_own_stride(mask, dim) for dim in range(4))
    unit = 16 if all(stride % 16 == 0 for stride in strides) else 1
    return {
        "mask_ptr": mask.view(torch.uint8) if mask.dtype == torch.bool else mask,
        **dict(zip(names, (*(stride // unit for stride in strides), column), strict=True)),
        "MASK_UNIT": unit,
        "MASK_STEP": column if column in (0, 1) else None,
    }


def _own_stride(x: Tensor, dim: int) -> int:
    return 0 if x.shape[dim] == 1 else x.stride(dim)


def empty_results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """See :class:`flashlayer.spec.Backend`."""
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return _empty_like(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=lse_dtype)


def empty_gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See :class:`flashlayer.spec.Backend`."""
    return _empty_like(q, q.shape[3]), _empty_like(k, k.shape[3]), _empty_like(v, v.shape[3])


def _empty_like(x: Tensor, head_dim: int) -> Tensor:
    """An empty ``(B, H, S, head_dim)`` in the memory order of ``x``: BSHD where x is, else BHSD."""
    batch, heads, seqlen, _ = x.shape
    if x.stride(1) < x.stride(2):
        return x.new_empty(batch, seqlen, heads, head_dim).transpose(1, 2)
    return x.new_empty(batch, heads, seqlen, head_dim)


def _num_blocks(longest: int | None, length: int, block: int) -> int:
    """Blocks of the longest packed sequence, or of a dense one."""
    return -(-(length if longest is None else longest) // block)


def _sequences(q: Tensor, extras: AttentionExtras) -> int:
    return q.shape[0] if extras.cu_seqlens_q is None else len(extras.cu_seqlens_q) - 1


def _interpreted() -> bool:
    """Whether the kernels were imported under ``TRITON_INTERPRET=1``."""
    from flashlayer.kernels.primitives import INTERPRETED

    return INTERPRETED


def _needs_fp32(q: Tensor) -> bool:
    """The interpreter multiplies bf16 wrongly: there the kernels run in fp32, rounded after it."""
    return q.dtype == torch.bfloat16 and _interpreted()


def _in_fp32(extras: AttentionExtras) -> AttentionExtras:
    wide = (x.float() if x is not None and x.dtype == torch.bfloat16 else x for x in extras)
    return AttentionExtras(*wide)


def _launching(q: Tensor) -> AbstractContextManager:
    """The tensors' own device; or, in the interpreter, NumPy as quiet about inf as a GPU is."""
    if _interpreted():
        return warnings.catch_warnings(action="ignore", category=RuntimeWarning)
    return torch.cuda.device_of(q)


def _target(device: torch.device) -> str:
    """The column of the tile table."""
    from flashlayer.kernels.tiles import nearest_target

    if _interpreted():
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx942"
    return nearest_target(torch.cuda.get_device_capability(device))


def _input_precision(q: Tensor) -> str:
    """How fp32 matrices are multiplied: IEEE, unless torch has been told that TF32 will do."""
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32" and torch.version.hip is None
    return "tf32" if allowed and q.dtype == torch.float32 else "ieee"


def _precision(q: Tensor) -> str:
    """The part of the tile table."""
    if q.dtype == torch.float64:
        return "fp64"
    if q.dtype == torch.float32:
        return "tf32" if _input_precision(q) == "tf32" else "fp32"
    return "half"


def _tiles(kernel: str, q: Tensor, v: Tensor, spec: AttentionSpec, extras: AttentionExtras) -> Any:
    """The :class:`flashlayer.kernels.tiles.TileConfig` of a launch."""
    from flashlayer.kernels.tiles import tile_config

    if TUNED:
        tuned = TUNED.get(bucket(kernel, q, v, spec, extras))
        if tuned is not None:
            return tuned
    widest = max(q.shape[3], v.shape[3])
    return tile_config(
        kernel, _target(q.device), _precision(q), widest, masked=extras.attn_mask is not None
    )


# What flashlayer.tune has measured in this process: the tiles of a bucket of calls.
TUNED: dict[tuple, Any] = {}


def bucket(
    kernel: str, q: Tensor, v: Tensor, spec: AttentionSpec, extras: AttentionExtras
) -> tuple:
    """Calls that share their tuned tiles: alike but for lengths under the same power of two."""
    is_cuda = q.device.type == "cuda"
    return (
        kernel,
        torch.cuda.get_device_name(q.device) if is_cuda else "interpreter",
        _precision(q),
        q.shape[3],
        v.shape[3],
        (q.shape[2] - 1).bit_length(),
        (v.shape[2] - 1).bit_length(),
        spec.window_left is not None,
        spec.window_right is not None,
        extras.attn_mask is not None,
        extras.cu_seqlens_q is not None,
    )


def candidate_tiles(kernel: str, q: Tensor) -> list[Any]:
    """Tiles that may suit a problem, for :func:`flashlayer.tune` to measure."""
    from flashlayer.kernels.tiles import candidates

    described = _target(q.device) in ("sm_90", "sm_100")
    every = candidates(kernel, _precision(q))
    return [tiles for tiles in every if described or not tiles.descriptors]
