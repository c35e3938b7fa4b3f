"""The Triton kernels behind two custom ops, which a compiled graph holds whole.

Triton is imported on the first call, so that ``import flashlayer`` needs torch alone.
"""

import warnings
from contextlib import AbstractContextManager
from importlib.util import find_spec

import torch
from torch import Tensor

from flashlayer.spec import AttentionExtras, AttentionSpec, Problem

name = "triton"

MAX_HEAD_DIM = 256


def refuses(problem: Problem) -> str | None:
    """A reason for everything but head dimensions up to 256 on a GPU or in the interpreter."""
    q, _, v, _, extras = problem
    widest = max(q.shape[-1], v.shape[-1])
    if widest > MAX_HEAD_DIM:
        return f"its kernels go up to a head dimension of {MAX_HEAD_DIM}, got {widest}"
    if any(extra is not None for extra in extras):
        return "its kernels know no mask, ALiBi slopes or sinks"
    if q.device.type not in ("cpu", "cuda"):
        return f"it runs on CUDA and ROCm, the tensors are on {q.device}"
    if find_spec("triton") is None:
        return "Triton is not installed"
    if _interpreted() != _triton_is_interpreted():
        return "TRITON_INTERPRET changed after Triton was imported: set it before Python starts"
    if _interpreted():
        return None
    if q.device.type == "cpu":
        return (
            "on the CPU its kernels run in Triton's interpreter only: "
            "set the environment variable TRITON_INTERPRET=1 before Python starts"
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
    return _forward(q, k, v, *_flat(spec, q, k))


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
    dq, dk, dv = _backward(do, dlse, q, k, v, o, lse, *_flat(spec, q, k))
    return dq, dk, dv, None, None


def _flat(spec: AttentionSpec, q: Tensor, k: Tensor) -> tuple[float, int, int | None, int | None]:
    """The spec as an operator's schema can carry it."""
    return spec.scale, spec.offset(q.shape[2], k.shape[2]), spec.window_left, spec.window_right


@torch.library.custom_op("flashlayer::triton_forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    offset: int,
    window_left: int | None,
    window_right: int | None,
) -> tuple[Tensor, Tensor]:
    band = (offset, window_left, window_right)
    o, lse = _forward_fake(q, k, v, scale, *band)
    if _is_empty(q, k):
        return o.zero_(), lse.fill_(-torch.inf)
    if _needs_fp32(q):
        wide_o, wide_lse = _forward(q.float(), k.float(), v.float(), scale, *band)
        return o.copy_(wide_o), wide_lse
    with _launching(q):
        launch_forward(q, k, v, o, lse, scale, *band)
    return o, lse


@_forward.register_fake
def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    offset: int,
    window_left: int | None,
    window_right: int | None,
) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return _empty_like(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=lse_dtype)


@torch.library.custom_op("flashlayer::triton_backward", mutates_args=())
def _backward(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
    offset: int,
    window_left: int | None,
    window_right: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    band = (offset, window_left, window_right)
    dq, dk, dv = _backward_fake(do, dlse, q, k, v, o, lse, scale, *band)
    if _is_empty(q, k):
        return dq.zero_(), dk.zero_(), dv.zero_()
    if _needs_fp32(q):
        wide = (x.float() for x in (q, k, v, o))
        wide_dq, wide_dk, wide_dv = _backward(do.float(), dlse, *wide, lse, scale, *band)
        return dq.copy_(wide_dq), dk.copy_(wide_dk), dv.copy_(wide_dv)
    with _launching(q):
        launch_backward(do, dlse, q, k, v, o, lse, dq, dk, dv, scale, *band)
    return dq, dk, dv


@_backward.register_fake
def _backward_fake(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
    offset: int,
    window_left: int | None,
    window_right: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_like(q, q.shape[3]), _empty_like(k, k.shape[3]), _empty_like(v, v.shape[3])


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
    offset: int,
    window_left: int | None,
    window_right: int | None,
) -> None:
    """Fill ``o`` and ``lse``; nothing may be empty."""
    from flashlayer.kernels.forward import forward_kernel
    from flashlayer.kernels.tiles import padded

    batch, heads, seqlen_q, head_dim = q.shape
    value_dim = v.shape[3]
    tiles = _tiles("forward", q, v)
    forward_kernel[(_num_blocks(seqlen_q, tiles["BLOCK_M"]) * heads * batch,)](
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        o_ptr=o,
        lse_ptr=lse,
        q_strides=q.stride(),
        k_strides=k.stride(),
        v_strides=v.stride(),
        o_strides=o.stride(),
        heads=heads,
        group=heads // k.shape[1],
        seqlen_q=seqlen_q,
        seqlen_k=k.shape[2],
        scale=max(abs(scale), 1e-30),  # with sign 0 any positive factor will do
        offset=offset,
        window_left=window_left,
        window_right=window_right,
        SCALE_SIGN=(scale > 0) - (scale < 0),
        HEAD_DIM=head_dim,
        VALUE_DIM=value_dim,
        BLOCK_D=padded(head_dim),
        BLOCK_DV=padded(value_dim),
        INPUT_PRECISION=_input_precision(q),
        **tiles,
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
    scale: float,
    offset: int,
    window_left: int | None,
    window_right: int | None,
) -> None:
    """Fill ``dq``, ``dk`` and ``dv``; nothing may be empty."""
    from flashlayer.kernels.backward import delta_kernel, dkdv_kernel, dq_kernel
    from flashlayer.kernels.tiles import padded

    batch, heads, seqlen_q, head_dim = q.shape
    kv_heads, seqlen_k, value_dim = v.shape[1:]
    delta = torch.empty_like(lse)  # (B, H, Sq)
    tiles = _tiles("delta", q, v)
    delta_kernel[(_num_blocks(seqlen_q, tiles["BLOCK_M"]) * heads * batch,)](
        o_ptr=o,
        do_ptr=do,
        dlse_ptr=None if dlse is None else dlse.contiguous(),
        delta_ptr=delta,
        o_strides=o.stride(),
        do_strides=do.stride(),
        heads=heads,
        seqlen_q=seqlen_q,
        VALUE_DIM=value_dim,
        BLOCK_DV=padded(value_dim),
        **tiles,
    )
    tiles = _tiles("dkdv", q, v)
    dkdv_kernel[(_num_blocks(seqlen_k, tiles["BLOCK_N"]) * kv_heads * batch,)](
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        do_ptr=do,
        lse_ptr=lse,
        delta_ptr=delta,
        dk_ptr=dk,
        dv_ptr=dv,
        q_strides=q.stride(),
        k_strides=k.stride(),
        v_strides=v.stride(),
        do_strides=do.stride(),
        dk_strides=dk.stride(),
        dv_strides=dv.stride(),
        kv_heads=kv_heads,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        scale=scale,
        offset=offset,
        window_left=window_left,
        window_right=window_right,
        GROUP=heads // kv_heads,
        HEAD_DIM=head_dim,
        VALUE_DIM=value_dim,
        BLOCK_D=padded(head_dim),
        BLOCK_DV=padded(value_dim),
        INPUT_PRECISION=_input_precision(q),
        **tiles,
    )
    tiles = _tiles("dq", q, v)
    dq_kernel[(_num_blocks(seqlen_q, tiles["BLOCK_M"]) * heads * batch,)](
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        do_ptr=do,
        lse_ptr=lse,
        delta_ptr=delta,
        dq_ptr=dq,
        q_strides=q.stride(),
        k_strides=k.stride(),
        v_strides=v.stride(),
        do_strides=do.stride(),
        dq_strides=dq.stride(),
        heads=heads,
        group=heads // kv_heads,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        scale=scale,
        offset=offset,
        window_left=window_left,
        window_right=window_right,
        HEAD_DIM=head_dim,
        VALUE_DIM=value_dim,
        BLOCK_D=padded(head_dim),
        BLOCK_DV=padded(value_dim),
        INPUT_PRECISION=_input_precision(q),
        **tiles,
    )


def _empty_like(x: Tensor, head_dim: int) -> Tensor:
    """An empty ``(B, H, S, head_dim)`` in the memory order of ``x``: BSHD where x is, else BHSD."""
    batch, heads, seqlen, _ = x.shape
    if x.stride(1) < x.stride(2):
        return x.new_empty(batch, seqlen, heads, head_dim).transpose(1, 2)
    return x.new_empty(batch, heads, seqlen, head_dim)


def _is_empty(q: Tensor, k: Tensor) -> bool:
    return q.numel() == 0 or k.numel() == 0


def _num_blocks(length: int, block: int) -> int:
    return -(-length // block)


def _interpreted() -> bool:
    """Whether the kernels were imported under ``TRITON_INTERPRET=1``."""
    import triton

    from flashlayer.kernels.forward import forward_kernel

    return not isinstance(forward_kernel, triton.JITFunction)


def _triton_is_interpreted() -> bool:
    """The same for Triton's own library of jitted functions, which the kernels call."""
    import triton

    return not isinstance(triton.language.cdiv, triton.JITFunction)


def _needs_fp32(q: Tensor) -> bool:
    """The interpreter multiplies bf16 wrongly: there the kernels run in fp32, rounded after it."""
    return q.dtype == torch.bfloat16 and _interpreted()


def _launching(q: Tensor) -> AbstractContextManager:
    """The tensors' own device; or, in the interpreter, NumPy as quiet as a GPU is about inf."""
    if _interpreted():
        return warnings.catch_warnings(action="ignore")
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


def _tiles(kernel: str, q: Tensor, v: Tensor) -> dict[str, int]:
    from flashlayer.kernels.tiles import padded, tile_config

    precision = "half"
    if q.dtype == torch.float64:
        precision = "fp64"
    elif q.dtype == torch.float32:
        precision = "tf32" if _input_precision(q) == "tf32" else "fp32"
    widest = padded(max(q.shape[3], v.shape[3]))
    return tile_config(kernel, _target(q.device), precision, widest)
