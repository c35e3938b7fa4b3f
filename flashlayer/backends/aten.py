"""PyTorch's own flash kernel for the CPU (``aten::_scaled_dot_product_flash_attention_for_cpu``).

The fastest path on a CPU. It is wrapped rather than trusted: where it would crash (no keys), be
silently wrong (a strided last dimension, a NaN in keys beyond the causal triangle) or has no
gradient (its LSE) it is put right here; what it can't do is refused. The two entry points are
custom ops, so a compiled graph holds them whole.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from flashlayer.spec import AttentionExtras, AttentionSpec, Problem

name = "aten"


def refuses(problem: Problem) -> str | None:
    """A reason for all but full and top-left causal attention on the CPU with Dv = D."""
    q, k, v, spec, extras = problem
    if q.device.type != "cpu":
        return f"ATen's flash kernel is wrapped for the CPU only, the tensors are on {q.device}"
    if v.shape[-1] != q.shape[-1]:
        return f"it needs value's head dimension to be query's, got {v.shape[-1]} and {q.shape[-1]}"
    for option, tensor in extras._asdict().items():
        if tensor is not None:
            return f"it has no {option}"
    if spec.softcap is not None:
        return "it has no softcap"
    if spec.window_left is not None or spec.window_right not in (None, 0):
        return "it has no sliding window"
    if spec.window_right == 0 and spec.offset(q.shape[2], k.shape[2]) != 0:
        return (
            f"its causal diagonal is top-left, this one is bottom-right with {q.shape[2]} queries "
            f"and {k.shape[2]} keys"
        )
    if spec.window_right == 0 and spec.scale <= 0:
        return f"with causal it needs a positive scale, got {spec.scale}"
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, extras: AttentionExtras
) -> tuple[Tensor, Tensor]:
    """See :class:`flashlayer.spec.Backend`."""
    return _forward(q, k, v, spec.scale, spec.window_right == 0)


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
    dq, dk, dv = _backward(do, dlse, q, k, v, o, lse, spec.scale, spec.window_right == 0)
    return dq, dk, dv, None, None


@torch.library.custom_op("flashlayer::aten_forward", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    if _is_empty(q, k):  # Sk = 0 divides by zero in the kernel and ends the process
        o, lse = _forward_fake(q, k, v, scale, causal)
        return o.zero_(), lse.fill_(-torch.inf)
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        _unit_stride(q),
        _unit_stride(_seen(k, q, causal)),
        _unit_stride(_seen(v, q, causal)),
        is_causal=causal,
        scale=scale,
    )
    expected, _ = _forward_fake(q, k, v, scale, causal)
    return o if o.stride() == expected.stride() else expected.copy_(o), lse.contiguous()


@_forward.register_fake
def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=lse_dtype)


@torch.library.custom_op("flashlayer::aten_backward", mutates_args=())
def _backward(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if _is_empty(q, k):
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    seqlen_k, head_dim = k.shape[2], q.shape[3]
    k, v = _seen(k, q, causal), _seen(v, q, causal)
    if dlse is not None:
        # The kernel computes dS = P * (dO V^T - rowsum(O * dO)) and knows no dlse, which adds P *
        # dlse. One more column does it: with 1 in every value and dlse in dO it adds dlse to dO
        # V^T; with 0 in O, nothing to the rowsum. The column is 0 in q and k, and its gradients are
        # dropped.
        q, k, o = F.pad(q, (0, 1)), F.pad(k, (0, 1)), F.pad(o, (0, 1))
        v = F.pad(v, (0, 1), value=1.0)
        do = torch.cat((do, dlse.unsqueeze(-1).to(do.dtype)), dim=-1)
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(_unit_stride(x) for x in (do, q, k, v, o)), lse, 0.0, causal, scale=scale
    )
    unseen = seqlen_k - k.shape[2]
    return (
        dq[..., :head_dim].contiguous(),
        F.pad(dk[..., :head_dim], (0, 0, 0, unseen)).contiguous(),
        F.pad(dv[..., :head_dim], (0, 0, 0, unseen)).contiguous(),
    )


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
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _is_empty(q: Tensor, k: Tensor) -> bool:
    return q.numel() == 0 or k.numel() == 0


def _seen(x: Tensor, q: Tensor, causal: bool) -> Tensor:
    """The keys or values that some query sees.

    The kernel multiplies the others by a probability of 0, and 0 * NaN is NaN.
    """
    return x[:, :, : q.shape[2]] if causal else x


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
