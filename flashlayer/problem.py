"""Every argument of a call, checked and resolved once: arguments -> :class:`Problem`."""

from __future__ import annotations

import itertools
import numbers
import operator
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashlayer.auxiliary import AuxRequest, as_request
from flashlayer.masks import IntervalMask
from flashlayer.philox import check_dropout
from flashlayer.spec import (
    NO_EXTRAS,
    AttentionExtras,
    AttentionSpec,
    Diagonal,
    Problem,
    WindowSize,
    has_autocast,
    is_observed,
    longest_sequence,
)

SUPPORTED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Packing(NamedTuple):
    """Where packed sequences begin and end; see :func:`flashlayer.flash_attention_varlen`."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int | None
    max_seqlen_k: int | None


def build_problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | IntervalMask | None = None,
    causal: bool = False,
    window_size: WindowSize = (None, None),
    diagonal: Diagonal = "bottom_right",
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    return_aux: AuxRequest | None = None,
    packing: Packing | None = None,
) -> Problem:
    """The arguments of :func:`flashlayer.flash_attention` as a backend gets them.

    With ``packing`` the tensors come as ``(1, H, T, D)``, so that backends read one layout: see
    :func:`build_packed_problem`.

    Raises:
        TypeError: an argument is of the wrong type, or the dtypes differ.
        ValueError: a shape, device or option does not fit.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, tensor)
        if tensor.ndim != 4:
            raise ValueError(
                f"{name} must have 4 dimensions (batch, heads, sequence, head_dim), "
                f"got shape {tuple(tensor.shape)}"
            )
        _check_device(name, tensor, query)
    if has_autocast(query.device.type) and torch.is_autocast_enabled(query.device.type):
        query, key, value = (_autocast(tensor) for tensor in (query, key, value))
    _check_dtypes(query, key, value)
    _check_shapes(query, key, value)
    if diagonal not in ("bottom_right", "top_left"):
        raise ValueError(f"diagonal must be 'bottom_right' or 'top_left', got {diagonal!r}")
    left, right = _check_window(window_size)
    if not _is_flag(causal):
        raise TypeError(f"causal must be a bool, got {type(causal).__name__}")
    right = 0 if causal else right
    factor = query.shape[-1] ** -0.5 if scale is None else _check_number("scale", scale)
    if softcap is not None and _check_number("softcap", softcap) <= 0:
        raise ValueError(f"softcap must be positive, or None for off, got {softcap}")
    check_dropout(dropout_p, dropout_seed)
    if packing is not None:
        packing = _resolve_packing(packing, query, key)
        # A side as wide as all tokens together hides nothing, and would overflow an int32.
        tokens = query.shape[2] + key.shape[2]
        left, right = (None if x is None or x >= tokens else x for x in (left, right))
    mask = intervals = None
    if isinstance(attn_mask, IntervalMask):
        check_intervals(attn_mask, query, query.shape[2], key.shape[2])
        intervals = attn_mask.intervals
    else:
        mask = _resolve_mask(attn_mask, query, key)
    extras = AttentionExtras(
        attn_mask=mask,
        alibi_slopes=_resolve_slopes(alibi_slopes, query, packing),
        sinks=_check_sinks(sinks, query),
        dropout_seed=_resolve_seed(dropout_p, dropout_seed, query),
        cu_seqlens_q=None if packing is None else packing.cu_seqlens_q,
        cu_seqlens_k=None if packing is None else packing.cu_seqlens_k,
        intervals=intervals,
    )
    if all(x is None for x in extras):
        extras = NO_EXTRAS  # by which attend knows that there are none
    transformed = torch._C._are_functorch_transforms_active()
    request = as_request(return_aux)
    spec = AttentionSpec(
        scale=factor,
        window_left=left,
        window_right=right,
        diagonal=diagonal,
        softcap=softcap,
        dropout_p=float(dropout_p),
        max_seqlen_q=None if packing is None else packing.max_seqlen_q,
        max_seqlen_k=None if packing is None else packing.max_seqlen_k,
        mask_gradient=mask is not None and mask.is_floating_point() and transformed,
        max_scores=request.max_scores,
        entropy=request.entropy,
    )
    if packing is None and not is_observed(query):
        spec = spec.without_idle_edges(query.shape[2], key.shape[2])
    return Problem(query, key, value, spec, extras)


def problem_of_options(
    asker: str, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
) -> Problem:
    """The problem of a call that is asked about and not made, with ``flash_attention``'s options.

    Those that change what is returned or who computes it make no difference, and torch's generator
    is left as it is.

    Raises:
        TypeError: an option that :func:`flashlayer.flash_attention` doesn't have; ``asker`` is the
            function that the error names. And as :func:`build_problem`.
        ValueError: as :func:`build_problem`.
    """
    known = {**(build_problem.__kwdefaults__ or {}), "return_lse": False, "backend": "auto"}
    del known["packing"]
    for option in options:
        if option not in known:
            raise TypeError(f"{asker}() got an unknown option {option!r}")
    resolved = {n: x for n, x in options.items() if n not in ("return_lse", "backend")}
    if resolved.get("dropout_seed") is None:
        resolved["dropout_seed"] = 0
    return build_problem(query, key, value, **resolved)


def build_packed_problem(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, **options: Any
) -> Problem:
    """The arguments of :func:`flashlayer.flash_attention_varlen` as a backend gets them.

    Raises:
        TypeError: as :func:`build_problem`.
        ValueError: likewise.
    """
    tensors = {"query": query, "key": key, "value": value}
    for name, tensor in tensors.items():
        check_tensor(name, tensor)
        if tensor.ndim != 3:
            raise ValueError(
                f"{name} must have 3 dimensions (tokens, heads, head_dim), "
                f"got shape {tuple(tensor.shape)}"
            )
    if packing.cu_seqlens_k is None:
        longest = packing.max_seqlen_q if packing.max_seqlen_k is None else packing.max_seqlen_k
        packing = packing._replace(cu_seqlens_k=packing.cu_seqlens_q, max_seqlen_k=longest)
        if key.shape[0] != query.shape[0]:
            raise ValueError(
                f"cu_seqlens_k must be given when query and key differ in length, "
                f"got {query.shape[0]} and {key.shape[0]} tokens"
            )
    views = (tensor.transpose(0, 1).unsqueeze(0) for tensor in tensors.values())
    return build_problem(*views, packing=packing, **options)


def _autocast(tensor: Tensor) -> Tensor:
    """Cast as autocast casts matmul's arguments: any floating dtype but fp64 to its own dtype."""
    if tensor.is_floating_point() and tensor.dtype != torch.float64:
        return tensor.to(torch.get_autocast_dtype(tensor.device.type))
    return tensor


def stand_ins(*arguments: Any, **options: Any) -> tuple[Any, ...]:
    """Arguments other than tensors with a ``__torch_function__``, such as ``torch.fx`` proxies.

    ``torch.fx.symbolic_trace`` records a call with one of them as a single node.
    """
    if torch.compiler.is_compiling():  # Dynamo of torch 2.11 can't trace the question
        return ()
    return tuple(
        x
        for x in (*arguments, *options.values())
        if not isinstance(x, Tensor) and hasattr(type(x), "__torch_function__")
    )


def check_tensor(name: str, tensor: Any) -> None:
    """Raise unless ``tensor`` is a tensor with strides."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.layout == torch.jagged:
        raise TypeError(
            f"{name} must be a dense tensor, got a nested tensor of the jagged layout: pass its "
            "values() to flash_attention_varlen, with offsets() as cu_seqlens_q"
        )
    if tensor.is_nested:
        raise TypeError(
            f"{name} must be a dense tensor, got a nested tensor: pack its sequences and call "
            "flash_attention_varlen, or pad it (torch.nested.to_padded_tensor) and pass attn_mask"
        )
    if tensor.layout != torch.strided:
        raise TypeError(
            f"{name} must be a dense tensor, got one of layout {tensor.layout}: call to_dense()"
        )


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


def _is_flag(causal: Any) -> bool:
    """Whether it is a bool, an int or None, of NumPy's too, or a tensor of one of them."""
    return causal.numel() == 1 if isinstance(causal, Tensor) else hasattr(causal, "__bool__")


def _check_window(window_size: WindowSize) -> WindowSize:
    if window_size == (None, None):
        return None, None
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise TypeError(f"window_size must be a pair (left, right), got {window_size!r}")
    for side, size in zip(("left", "right"), window_size, strict=True):
        if size is None:
            continue
        if not isinstance(size, (int, torch.SymInt, numbers.Integral)) or isinstance(size, bool):
            raise TypeError(
                f"window_size's {side} must be an int or None, got {type(size).__name__}"
            )
        if size < 0:
            raise ValueError(
                f"window_size's {side} must be at least 0, or None for unbounded, got {size}"
            )
    # NumPy's integers as Python's, which kernels and graphs take.
    known = (int, torch.SymInt, type(None))
    left, right = (x if isinstance(x, known) else int(x) for x in window_size)
    return left, right


def _check_device(name: str, tensor: Tensor, query: Tensor) -> None:
    if tensor.device != query.device:
        raise ValueError(f"{name} must be on query's device {query.device}, got {tensor.device}")


def _check_number(name: str, number: float) -> float:
    if not isinstance(number, (int, float, numbers.Real)) or isinstance(number, bool):
        raise TypeError(f"{name} must be a float or None, got {type(number).__name__}")
    if not isinstance(number, int):
        number = float(number)
    # Dynamo can't trace math.isfinite of a symbolic float; an int may be too large for one.
    if not abs(number) <= sys.float_info.max:
        raise ValueError(f"{name} must be finite, got {number}")
    return float(number)


def _resolve_seed(
    dropout_p: float, dropout_seed: int | Tensor | None, query: Tensor
) -> Tensor | None:
    if dropout_p == 0:
        return None
    if isinstance(dropout_seed, Tensor):
        return dropout_seed.to(query.device)
    if dropout_seed is not None:
        return torch.full((), int(dropout_seed), dtype=torch.int64, device=query.device)
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=query.device)


def _resolve_mask(attn_mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """The mask as 4-D, every dimension full or 1."""
    if attn_mask is None:
        return None
    full = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    check_tensor("attn_mask", attn_mask)
    if attn_mask.dtype != torch.bool and attn_mask.dtype not in SUPPORTED_DTYPES:
        raise TypeError(f"attn_mask must be bool or floating, got {attn_mask.dtype}")
    _check_device("attn_mask", attn_mask, query)
    fits = attn_mask.ndim <= 4 and all(
        size in (1, whole)
        for size, whole in zip(reversed(attn_mask.shape), reversed(full), strict=False)
    )
    if not fits:
        raise ValueError(
            f"attn_mask must be broadcastable to (batch, heads, queries, keys) = {full}, "
            f"got {tuple(attn_mask.shape)}"
        )
    attn_mask = attn_mask[(None,) * (4 - attn_mask.ndim)]
    # Undo the caller's expand(): one row of a stride-0 dimension is all there is in memory.
    for dim in range(4):
        if attn_mask.stride(dim) == 0 and attn_mask.shape[dim] > 1:
            attn_mask = attn_mask.narrow(dim, 0, 1)
    return attn_mask


def check_intervals(mask: IntervalMask, query: Tensor, seqlen_q: int, seqlen_k: int) -> None:
    """Raise unless the mask is one of these lengths, and of query's device, batch and heads."""
    _check_device("attn_mask", mask.intervals, query)
    batch, heads = query.shape[0], query.shape[1]
    of_batch, of_heads, _, _ = mask.intervals.shape
    lengths = (mask.seqlen_q, mask.seqlen_k)
    if lengths != (seqlen_q, seqlen_k):
        raise ValueError(
            f"attn_mask must be an IntervalMask of {seqlen_q} queries and {seqlen_k} keys, "
            f"got one of {lengths[0]} and {lengths[1]}"
        )
    if of_batch not in (1, batch) or of_heads not in (1, heads):
        raise ValueError(
            f"attn_mask must be an IntervalMask of batch={batch} or 1 and heads={heads} or 1, "
            f"got one of batch={of_batch} and heads={of_heads}"
        )


def _resolve_slopes(
    alibi_slopes: Tensor | None, query: Tensor, packing: Packing | None
) -> Tensor | None:
    """The slopes in fp32, ``(B or 1, H)``."""
    if alibi_slopes is None:
        return None
    check_tensor("alibi_slopes", alibi_slopes)
    if alibi_slopes.dtype not in SUPPORTED_DTYPES:
        raise TypeError(f"alibi_slopes must be floating, got {alibi_slopes.dtype}")
    _check_device("alibi_slopes", alibi_slopes, query)
    batch = query.shape[0] if packing is None else len(packing.cu_seqlens_q) - 1
    heads = query.shape[1]
    if alibi_slopes.shape not in ((heads,), (batch, heads)):
        raise ValueError(
            f"alibi_slopes must be (heads={heads},) or (batch={batch}, heads={heads}), "
            f"got {tuple(alibi_slopes.shape)}"
        )
    if alibi_slopes.requires_grad:
        raise ValueError("alibi_slopes has no gradient: detach it, or pass a float attn_mask")
    if batch == 0:
        return None  # no sequence to apply them to
    return alibi_slopes.float().reshape(-1, heads)


def _check_sinks(sinks: Tensor | None, query: Tensor) -> Tensor | None:
    if sinks is None:
        return None
    check_tensor("sinks", sinks)
    if sinks.dtype not in SUPPORTED_DTYPES:
        raise TypeError(f"sinks must be floating, got {sinks.dtype}")
    _check_device("sinks", sinks, query)
    if sinks.shape != (query.shape[1],):
        raise ValueError(f"sinks must be (heads={query.shape[1]},), got {tuple(sinks.shape)}")
    return sinks


def _resolve_packing(packing: Packing, query: Tensor, key: Tensor) -> Packing:
    """Boundaries in int32, and the longest sequence lengths if they were not given."""
    resolved = {}
    for side, tensor in (("q", query), ("k", key)):
        name = f"cu_seqlens_{side}"
        cu_seqlens = getattr(packing, name)
        longest = getattr(packing, f"max_seqlen_{side}")
        twice = side == "k" and cu_seqlens is packing.cu_seqlens_q
        if twice and longest is None:
            longest = resolved["max_seqlen_q"]
        if twice and not torch.compiler.is_compiling():
            # Keep `cu_seqlens_k is cu_seqlens_q`: aten reads equal lengths from it. Dynamo rejects
            # aliased inputs.
            resolved[name] = resolved["cu_seqlens_q"]
        else:
            _check_cu_seqlens(name, cu_seqlens, query)
            resolved[name] = cu_seqlens.to(torch.int32).contiguous()
        resolved[f"max_seqlen_{side}"] = _resolve_longest(side, longest, cu_seqlens, tensor)
    sizes = len(resolved["cu_seqlens_q"]), len(resolved["cu_seqlens_k"])
    if sizes[0] != sizes[1]:
        raise ValueError(f"cu_seqlens_q and cu_seqlens_k must be of one length, got {sizes}")
    return Packing(**resolved)


def _check_cu_seqlens(name: str, cu_seqlens: Any, query: Tensor) -> None:
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        kind = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"{name} must be an int32 or int64 tensor, got {kind}")
    check_tensor(name, cu_seqlens)
    if cu_seqlens.ndim != 1 or len(cu_seqlens) == 0:
        raise ValueError(f"{name} must be (sequences + 1,), got {tuple(cu_seqlens.shape)}")
    _check_device(name, cu_seqlens, query)


def _resolve_longest(side: str, longest: Any, cu_seqlens: Tensor, tensor: Tensor) -> Any:
    """``max_seqlen``, read from the boundaries if None.

    On the CPU the boundaries are checked too. On a GPU they are read only if ``max_seqlen`` is
    None: reading them waits for the device.
    """
    if longest is not None and not isinstance(longest, (int, torch.SymInt)):
        try:
            longest = operator.index(longest)
        except TypeError:
            kind = type(longest).__name__
            raise TypeError(f"max_seqlen_{side} must be an int or None, got {kind}") from None
    if longest is not None and longest < 0:
        raise ValueError(f"max_seqlen_{side} must be at least 0, got {longest}")
    if is_observed(cu_seqlens):
        return longest  # read inside the op if None
    if cu_seqlens.device.type == "cpu" and not torch._C._are_functorch_transforms_active():
        edges = cu_seqlens.tolist()
        lengths = [stop - start for start, stop in itertools.pairwise(edges)]
        if edges[0] != 0 or any(length < 0 for length in lengths) or edges[-1] > tensor.shape[2]:
            shown = edges if len(edges) < 20 else f"{edges[:8]} ... {edges[-8:]}"
            raise ValueError(
                f"cu_seqlens_{side} must start at 0, not fall, and end at {tensor.shape[2]} tokens "
                f"or before, got {shown}"
            )
        if longest is not None and lengths and longest < max(lengths):
            raise ValueError(
                f"max_seqlen_{side} must be at least the longest sequence's {max(lengths)}, "
                f"got {longest}"
            )
        return max(lengths, default=0) if longest is None else longest
    return longest_sequence(cu_seqlens) if longest is None else longest
