"""The public door: validate once, build the spec, choose a backend, call it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from flashlayer import backends
from flashlayer.autograd import FlashAttentionFunction
from flashlayer.spec import AttentionExtras, AttentionSpec, Diagonal, Problem

WindowSize = tuple[int | None, int | None]

SUPPORTED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    causal: bool = False,
    window_size: WindowSize = (None, None),
    diagonal: Diagonal = "bottom_right",
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Exact softmax attention that never stores the ``Sq x Sk`` matrix.

    For every batch entry and query head ``h``, with kv head ``h // (H // Hkv)``:

        out[i] = sum_j softmax_j(scale * q[i] . k[j]) v[j]         over the keys j that query i sees
        lse[i] = log sum_j exp(scale * q[i] . k[j])

    The probabilities are built block by block with the online softmax (Milakov & Gimelshein, arXiv
    1805.02867) and recomputed from ``lse`` in the backward pass (Dao, "FlashAttention-2", arXiv
    2307.08691, section 3.1), so memory is O(Sq + Sk). A query that sees no key gives ``out = 0``,
    ``lse = -inf`` and zero gradients.

    Args:
        query: ``(B, H, Sq, D)``; fp16, bf16, fp32 or fp64, any strides. ``Sq`` may be 0.
        key: ``(B, Hkv, Sk, D)``, same dtype and device. ``H`` must be a multiple of ``Hkv`` (GQA;
            ``Hkv = 1`` is MQA).
        value: ``(B, Hkv, Sk, Dv)``; ``Dv`` may differ from ``D``.
        attn_mask: not built yet.
        causal: query ``i`` sees key ``j`` only when ``j <= i + offset``.
        window_size: ``(left, right)``: query ``i`` sees keys from ``i + offset - left`` to ``i +
            offset + right`` inclusive. None is unbounded; its own position is not counted;
            ``causal`` caps ``right`` at 0.
        diagonal: ``offset`` is ``Sk - Sq`` for ``"bottom_right"`` (flash_attn's), 0 for
            ``"top_left"`` (SDPA's).
        scale: factor on the scores; ``D ** -0.5`` if None.
        softcap: not built yet.
        alibi_slopes: not built yet.
        sinks: not built yet.
        dropout_p: not built yet; must be 0.
        dropout_seed: not built yet.
        return_lse: also return the log-sum-exp of the scores.
        backend: ``"auto"``, or one of ``"triton"``, ``"aten"``, ``"tiled"``, ``"standard"``, see
            :func:`available_backends`. ``"auto"`` takes Triton on a GPU; on the CPU ATen's flash
            kernel where it covers the call and is the faster one, else the tiled algorithm in
            PyTorch.

    Returns:
        ``out`` ``(B, H, Sq, Dv)`` in the dtype of ``query``; with ``return_lse`` also ``lse`` ``(B,
        H, Sq)``: natural logarithm, contiguous, fp32 (fp64 for fp64 inputs), differentiable.

    Raises:
        TypeError: an argument is of the wrong type, or the dtypes differ.
        ValueError: a shape, device or option does not fit, or the asked-for backend can't compute
            this call.
        NotImplementedError: an option that is not built yet.

    Under ``torch.autocast`` fp32 inputs are computed in the autocast dtype, as SDPA does.

    Example:
        >>> q = torch.randn(2, 8, 1024, 64, requires_grad=True)
        >>> k, v = torch.randn(2, 2, 2, 1024, 64).unbind(0)   # 2 kv heads for 8 query heads
        >>> out, lse = flash_attention(q, k, v, causal=True, return_lse=True)
        >>> out.shape, lse.shape
        (torch.Size([2, 8, 1024, 64]), torch.Size([2, 8, 1024]))
    """
    problem = _build_problem(
        query,
        key,
        value,
        attn_mask=attn_mask,
        causal=causal,
        window_size=window_size,
        diagonal=diagonal,
        scale=scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
    )
    chosen = backends.select(backend, problem)
    q, k, v, spec, extras = problem
    if chosen.backward is None:
        out, lse = chosen.forward(q, k, v, spec, extras, return_lse)
    else:
        out, lse = FlashAttentionFunction.apply(chosen, spec, q, k, v, *extras)
    return (out, lse) if return_lse else out


def flash_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    window_size: WindowSize = (None, None),
    diagonal: Diagonal = "bottom_right",
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over packed sequences ``(T, H, D)``; not built yet.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(
        "flash_attention_varlen: cu_seqlens_q (packed sequences) is not built yet"
    )


def dropout_keep_mask(
    batch: int,
    heads: int,
    seqlen_q: int,
    seqlen_k: int,
    dropout_p: float,
    seed: int,
    device: torch.device | str,
) -> Tensor:
    """The mask ``(B, H, Sq, Sk)`` that dropout draws, True = kept; not built yet.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError("dropout_keep_mask: dropout_p is not built yet")


def available_backends(
    query: Tensor, key: Tensor, value: Tensor, **options: Any
) -> dict[str, str | None]:
    """Which backends can compute this call: ``{name: None, or the reason it refuses}``.

    Args:
        query: ``(B, H, Sq, D)``.
        key: ``(B, Hkv, Sk, D)``.
        value: ``(B, Hkv, Sk, Dv)``.
        **options: those of :func:`flash_attention`; ``return_lse`` and ``backend`` make no
            difference.

    Raises:
        TypeError: as :func:`flash_attention`, and for an option it doesn't have.
        ValueError: as :func:`flash_attention`.

    Example:
        >>> q = k = v = torch.randn(1, 4, 16, 64)
        >>> available_backends(q, k, v, causal=True)["tiled"] is None
        True
    """
    options.pop("return_lse", None)
    options.pop("backend", None)
    problem = _build_problem(query, key, value, **options)
    return {name: backend.refuses(problem) for name, backend in backends.BACKENDS.items()}


def _build_problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    causal: bool = False,
    window_size: WindowSize = (None, None),
    diagonal: Diagonal = "bottom_right",
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
) -> Problem:
    """Check every argument and resolve it; the only place that does."""
    _check_built(attn_mask, softcap, alibi_slopes, sinks, dropout_p, dropout_seed)
    tensors = {"query": query, "key": key, "value": value}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.ndim != 4:
            raise ValueError(
                f"{name} must have 4 dimensions (batch, heads, sequence, head_dim), "
                f"got shape {tuple(tensor.shape)}"
            )
        if tensor.device != query.device:
            raise ValueError(
                f"{name} must be on query's device {query.device}, got {tensor.device}"
            )
    query, key, value = (_autocast(tensor) for tensor in (query, key, value))
    _check_dtypes(query, key, value)
    _check_shapes(query, key, value)
    if diagonal not in ("bottom_right", "top_left"):
        raise ValueError(f"diagonal must be 'bottom_right' or 'top_left', got {diagonal!r}")
    window_left, window_right = _check_window(window_size)
    if causal:
        window_right = 0
    if scale is None:
        scale = query.shape[-1] ** -0.5
    elif not isinstance(scale, (int, float)) or isinstance(scale, bool):
        raise TypeError(f"scale must be a float or None, got {type(scale).__name__}")
    elif not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    spec = AttentionSpec(float(scale), window_left, window_right, diagonal)
    spec = spec.without_idle_edges(query.shape[2], key.shape[2])
    return Problem(query, key, value, spec, AttentionExtras())


def _check_built(
    attn_mask: Tensor | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    dropout_p: float,
    dropout_seed: int | None,
) -> None:
    options = {
        "attn_mask": attn_mask,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "sinks": sinks,
        "dropout_p": dropout_p or None,
        "dropout_seed": dropout_seed,
    }
    for name, option in options.items():
        if option is not None:
            raise NotImplementedError(f"{name} is not built yet")


def _autocast(tensor: Tensor) -> Tensor:
    """What autocast does to matmul's arguments: every floating dtype but fp64 becomes its own."""
    device_type = tensor.device.type
    if (
        torch.amp.is_autocast_available(device_type)
        and torch.is_autocast_enabled(device_type)
        and tensor.is_floating_point()
        and tensor.dtype != torch.float64
    ):
        return tensor.to(torch.get_autocast_dtype(device_type))
    return tensor


def _check_dtypes(query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.dtype not in SUPPORTED_DTYPES:
        supported = ", ".join(str(dtype) for dtype in SUPPORTED_DTYPES)
        raise TypeError(f"query must be one of {supported}, got {query.dtype}")
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(
            f"query, key and value must have one dtype, "
            f"got {query.dtype}, {key.dtype} and {value.dtype}"
        )


def _check_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    batch, heads, _, head_dim = query.shape
    kv_heads, seqlen_k = key.shape[1], key.shape[2]
    if key.shape[0] != batch or key.shape[3] != head_dim:
        raise ValueError(
            f"key must be (batch={batch}, kv_heads, sequence, head_dim={head_dim}) to fit query "
            f"{tuple(query.shape)}, got {tuple(key.shape)}"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"value must be (batch={batch}, kv_heads={kv_heads}, sequence={seqlen_k}, head_dim_v) "
            f"to fit key {tuple(key.shape)}, got {tuple(value.shape)}"
        )
    if heads == 0 or kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"query's heads must be a positive multiple of key's and value's, "
            f"got {heads} and {kv_heads}"
        )
    for name, dim in (("query and key", head_dim), ("value", value.shape[3])):
        if dim == 0:
            raise ValueError(f"the head dimension of {name} must be at least 1, got 0")


def _check_window(window_size: WindowSize) -> WindowSize:
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise TypeError(f"window_size must be a pair (left, right), got {window_size!r}")
    for side, size in zip(("left", "right"), window_size, strict=True):
        if size is None:
            continue
        if not isinstance(size, (int, torch.SymInt)) or isinstance(size, bool):
            raise TypeError(
                f"window_size's {side} must be an int or None, got {type(size).__name__}"
            )
        if size < 0:
            raise ValueError(
                f"window_size's {side} must be at least 0, or None for unbounded, got {size}"
            )
    left, right = window_size
    return left, right
