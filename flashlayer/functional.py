"""The public door: validate once, build the spec, choose a backend, call it."""

from __future__ import annotations

import itertools
import math
import operator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from flashlayer import backends, philox
from flashlayer.autograd import attend
from flashlayer.spec import (
    NO_EXTRAS,
    AttentionExtras,
    AttentionSpec,
    Diagonal,
    Problem,
    is_observed,
    longest_sequence,
)

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
    dropout_seed: int | Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Exact softmax attention that never stores the ``Sq x Sk`` matrix.

    For every batch entry and query head ``h``, with kv head ``h // (H // Hkv)``, over the keys j
    that query i sees::

        score[i, j] = softcap(scale * q[i] . k[j]) - slope * |i + offset - j| + mask[i, j]
        lse[i]      = log(sum_j exp(score[i, j]) + exp(sink))
        out[i]      = sum_j dropout(exp(score[i, j] - lse[i])) v[j]

    The probabilities are built block by block with the online softmax (Milakov & Gimelshein, arXiv
    1805.02867) and recomputed from ``lse`` in the backward pass (Dao, "FlashAttention-2", arXiv
    2307.08691, section 3.1), so memory is O(Sq + Sk). A query that sees no key gives ``out = 0``,
    ``lse = -inf`` (the sink where there is one) and zero gradients.

    Args:
        query: ``(B, H, Sq, D)``; fp16, bf16, fp32 or fp64, any strides. ``Sq`` may be 0.
        key: ``(B, Hkv, Sk, D)``, same dtype and device. ``H`` must be a multiple of ``Hkv`` (GQA;
            ``Hkv = 1`` is MQA).
        value: ``(B, Hkv, Sk, Dv)``; ``Dv`` may differ from ``D``.
        attn_mask: bool (True = attend) or floating (added to the scores, differentiable),
            broadcastable to ``(B, H, Sq, Sk)`` and never expanded: a ``(B, 1, 1, Sk)`` padding mask
            costs O(Sk). An entry of -inf hides its key like False.
        causal: query ``i`` sees key ``j`` only when ``j <= i + offset``.
        window_size: ``(left, right)``: query ``i`` sees keys from ``i + offset - left`` to
            ``i + offset + right`` inclusive. None is unbounded; its own position is not counted;
            ``causal`` caps ``right`` at 0.
        diagonal: ``offset`` is ``Sk - Sq`` for ``"bottom_right"`` (flash_attn's), 0 for
            ``"top_left"`` (SDPA's).
        scale: factor on the scores; ``D ** -0.5`` if None.
        softcap: scores become ``softcap * tanh(score / softcap)`` (Gemma 2, arXiv 2408.00118,
            section 2); None is off.
        alibi_slopes: ``(H,)`` or ``(B, H)``, floating; used in fp32 and without a gradient (ALiBi,
            Press et al., arXiv 2108.12409).
        sinks: ``(H,)``, floating, differentiable: a logit per head that joins the denominator only
            (attention sinks, Xiao et al., arXiv 2309.17453, in the learned form of gpt-oss).
        dropout_p: probability, 0 to 1, that an attention weight is zeroed; the rest are divided by
            ``1 - dropout_p``. Which ones depends on the seed and the position only
            (:func:`dropout_keep_mask`): the same in both passes and in every backend.
        dropout_seed: the seed, an int or a ``()`` int64 tensor, which is not read on the host; if
            None it is drawn from torch's generator of the device, so that ``torch.manual_seed``
            reproduces it and every call draws another.
        return_lse: also return the log-sum-exp of the scores.
        backend: ``"auto"``, or one of ``"triton"``, ``"aten"``, ``"tiled"``, ``"standard"``, see
            :func:`available_backends`. ``"auto"`` takes Triton on a GPU; on the CPU ATen's flash
            kernel where it covers the call and is the faster one, else the tiled algorithm in
            PyTorch.

    Returns:
        ``out`` ``(B, H, Sq, Dv)`` in the dtype of ``query``; with ``return_lse`` also ``lse``
        ``(B, H, Sq)``: natural logarithm, contiguous, fp32 (fp64 for fp64 inputs), differentiable.

    Raises:
        TypeError: an argument is of the wrong type, or the dtypes differ.
        ValueError: a shape, device or option does not fit, or the asked-for backend can't compute
            this call.

    Under ``torch.autocast`` fp32 inputs are computed in the autocast dtype, as SDPA does.

    Example:
        >>> q = torch.randn(2, 8, 1024, 64, requires_grad=True)
        >>> k, v = torch.randn(2, 2, 2, 1024, 64).unbind(0)  # 2 kv heads for 8 query heads
        >>> out, lse = flash_attention(q, k, v, causal=True, return_lse=True)
        >>> out.shape, lse.shape
        (torch.Size([2, 8, 1024, 64]), torch.Size([2, 8, 1024]))
    """
    signature = None
    if (
        window_size == (None, None)
        and attn_mask is alibi_slopes is sinks is dropout_seed is None
        and type(dropout_p) is float
        and dropout_p == 0.0
    ):
        signature = _signature(query, key, value, causal, diagonal, scale, softcap, backend)
    if signature is not None:  # a graph being compiled looks at no plan, and depends on none
        plan = _PLANS.get(signature)
        if plan is not None:
            problem = Problem(query, key, value, plan.spec, NO_EXTRAS)
            return _compute(plan.backend, problem, return_lse)
    options: dict[str, Any] = {
        "attn_mask": attn_mask,
        "causal": causal,
        "window_size": window_size,
        "diagonal": diagonal,
        "scale": scale,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "sinks": sinks,
        "dropout_p": dropout_p,
        "dropout_seed": dropout_seed,
    }
    if stand_ins := _stand_ins(query, key, value, **options):
        options |= {"return_lse": return_lse, "backend": backend}
        return handle_torch_function(flash_attention, stand_ins, query, key, value, **options)
    problem = build_problem(query, key, value, **options)
    chosen = backends.select(backend, problem)
    # A plan says nothing of casts, which autocast makes of some tensors.
    uncast = problem.query is query and problem.key is key and problem.value is value
    if signature is not None and uncast:
        if len(_PLANS) >= PLANS_MAX:
            _PLANS.clear()
        tracked = signature[-1]
        _PLANS[signature] = Plan(problem.spec, chosen if tracked else _unobserved(chosen))
    return _compute(chosen, problem, return_lse)


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
    dropout_seed: int | Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over sequences packed one after the other, without padding.

    Sequence ``n`` is the tokens ``cu_seqlens[n]`` to ``cu_seqlens[n + 1]``; its queries see its own
    keys only, with positions counted from its own start. It may be empty on either side. Tokens
    past ``cu_seqlens[-1]`` give zeros (``lse`` -inf) and receive zero gradients.

    Args:
        query: ``(Tq, H, D)``.
        key: ``(Tk, Hkv, D)``.
        value: ``(Tk, Hkv, Dv)``.
        cu_seqlens_q: ``(N + 1,)``, int32 or int64, on query's device: 0 and the running sum of the
            query lengths.
        cu_seqlens_k: the same of the key lengths; ``cu_seqlens_q`` if None.
        max_seqlen_q: the longest query sequence, or more. Read from ``cu_seqlens_q`` if None, which
            waits for the GPU.
        max_seqlen_k: the longest key sequence, or more.
        causal: as in :func:`flash_attention`, within each sequence.
        window_size: likewise.
        diagonal: likewise; ``offset`` is that of each sequence.
        scale: as in :func:`flash_attention`.
        softcap: likewise.
        alibi_slopes: ``(H,)`` or ``(N, H)``.
        sinks: ``(H,)``.
        dropout_p: as in :func:`flash_attention`; the batch index of the mask is the sequence's.
        dropout_seed: likewise.
        return_lse: also return the log-sum-exp.
        backend: as in :func:`flash_attention`.

    Returns:
        ``out`` ``(Tq, H, Dv)``; with ``return_lse`` also ``lse`` ``(H, Tq)``.

    Raises:
        TypeError: as :func:`flash_attention`.
        ValueError: likewise.

    Example:
        >>> qkv = torch.randn(3, 30, 4, 16)
        >>> cu_seqlens = torch.tensor([0, 10, 10, 30])  # 10 tokens, none, 20
        >>> flash_attention_varlen(*qkv, cu_seqlens_q=cu_seqlens, causal=True).shape
        torch.Size([30, 4, 16])
    """
    tensors = {"query": query, "key": key, "value": value}
    options: dict[str, Any] = {
        "causal": causal,
        "window_size": window_size,
        "diagonal": diagonal,
        "scale": scale,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "sinks": sinks,
        "dropout_p": dropout_p,
        "dropout_seed": dropout_seed,
    }
    packing = Packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if stand_ins := _stand_ins(query, key, value, **packing._asdict(), **options):
        options |= {**packing._asdict(), "return_lse": return_lse, "backend": backend}
        return handle_torch_function(
            flash_attention_varlen, stand_ins, query, key, value, **options
        )
    for name, tensor in tensors.items():
        _check_tensor(name, tensor)
        if tensor.ndim != 3:
            raise ValueError(
                f"{name} must have 3 dimensions (tokens, heads, head_dim), "
                f"got shape {tuple(tensor.shape)}"
            )
    if cu_seqlens_k is None:
        packing = packing._replace(
            cu_seqlens_k=cu_seqlens_q,
            max_seqlen_k=max_seqlen_q if max_seqlen_k is None else max_seqlen_k,
        )
        if key.shape[0] != query.shape[0]:
            raise ValueError(
                f"cu_seqlens_k must be given when query and key differ in length, "
                f"got {query.shape[0]} and {key.shape[0]} tokens"
            )
    problem = build_problem(
        *(tensor.transpose(0, 1).unsqueeze(0) for tensor in tensors.values()),
        packing=packing,
        **options,
    )
    result = _compute(backends.select(backend, problem), problem, return_lse)
    if not return_lse:
        return result.squeeze(0).transpose(0, 1)
    out, lse = result
    return out.squeeze(0).transpose(0, 1), lse.squeeze(0)


def dropout_keep_mask(
    batch: int,
    heads: int,
    seqlen_q: int,
    seqlen_k: int,
    dropout_p: float,
    seed: int | Tensor,
    device: torch.device | str,
    *,
    first_query: int = 0,
) -> Tensor:
    """The mask that dropout draws: bool ``(B, H, Sq, Sk)``, True = kept.

    Args:
        batch: ``B``; for packed sequences their number.
        heads: ``H``, query heads.
        seqlen_q: ``Sq``.
        seqlen_k: ``Sk``.
        dropout_p: probability that an element is False, 0 to 1.
        seed: what :func:`flash_attention` got as ``dropout_seed``.
        device: where the mask is made; it makes no difference to its values.
        first_query: position of the first of the ``Sq`` queries, for a mask made block by block.

    Raises:
        TypeError: ``seed`` or ``dropout_p`` is of the wrong type.
        ValueError: ``dropout_p`` is not a probability.
    """
    _check_dropout(dropout_p, seed)
    index = [torch.arange(size, device=device) for size in (batch, heads, seqlen_q, seqlen_k)]
    b, h, i, j = index
    b, h, i = b.view(-1, 1, 1, 1), h.view(-1, 1, 1), first_query + i.view(-1, 1)
    seed = torch.as_tensor(seed, device=device)
    return philox.keep_mask(seed, b, h, i, j, dropout_p)


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
    for option in options:
        if option not in (flash_attention.__kwdefaults__ or {}):
            raise TypeError(f"available_backends() got an unknown option {option!r}")
    options.pop("return_lse", None)
    options.pop("backend", None)
    if options.get("dropout_seed") is None:
        options["dropout_seed"] = 0  # a question draws no random number
    problem = build_problem(query, key, value, **options)
    return {name: backend.refuses(problem) for name, backend in backends.BACKENDS.items()}


def check_backend(name: str) -> None:
    """Raise as a call with this ``backend`` would if there is none of that name.

    Raises:
        TypeError: ``name`` is not a string.
        ValueError: there is no such backend.
    """
    backends.check_name(name)


class Packing(NamedTuple):
    """Where packed sequences begin and end."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int | None
    max_seqlen_k: int | None


class Plan(NamedTuple):
    """What a call came to: its resolved options and the backend chosen for it."""

    spec: AttentionSpec
    backend: Any


# Plans of calls whose options bring no tensors along, by their signature: such a call is checked
# when it is new, and a short one takes half the time when it is not. Generation makes a signature a
# token, so their number is bounded.
PLANS_MAX = 4096
_PLANS: dict[Any, Plan] = {}


def _signature(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    diagonal: Diagonal,
    scale: float | None,
    softcap: float | None,
    backend: str,
) -> tuple | None:
    """All that the checks of a call and the choice of its backend depend on; None if that is more.

    ``True == 1.0`` would hit the entry of a float and skip the type error, so numbers must be
    exactly float.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or not (
            type(query) is type(key) is type(value) is Tensor
            and query.layout is key.layout is value.layout is torch.strided
            and (scale is None or type(scale) is float)
            and (softcap is None or type(softcap) is float)
            and type(backend) is type(diagonal) is str
        )
    ):
        return None
    try:
        shapes = (query.shape, key.shape, value.shape)
    except RuntimeError:  # a nested tensor of the strided layout; the checks name it
        return None
    on_cpu = query.is_cpu and key.is_cpu and value.is_cpu
    devices: Any = on_cpu or (query.device, key.device, value.device)
    device_type = "cpu" if on_cpu else devices[0].type
    if device_type == "meta":
        return None
    autocast = torch._C._is_any_autocast_enabled() and (
        torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type)
    )
    tracked = torch.is_grad_enabled() and (
        query.requires_grad or key.requires_grad or value.requires_grad
    )
    return (
        *shapes,
        query.dtype,
        key.dtype,
        value.dtype,
        devices,
        bool(causal),
        diagonal,
        scale,
        softcap,
        backend,
        autocast,
        tracked,
    )


def _unobserved(backend: Any) -> Any:
    """The module behind the ops: no call with a plan is observed, though its backward may be."""
    return getattr(backend, "module", backend)


def _compute(backend: Any, problem: Problem, return_lse: bool) -> Any:
    if backend.backward is None:
        out, lse = backend.forward(*problem, return_lse)
    else:
        out, lse = attend(backend, backends.tiled, problem)
    # Make lse contiguous only if asked for.
    return (out, lse.contiguous()) if return_lse else out


def attend_part(problem: Problem, backend: str) -> tuple[Tensor, Tensor]:
    """``o`` and ``lse`` over one part of the keys, outside of autograd; merge parts by their LSE.

    Args:
        problem: the part's queries and keys, from :func:`build_problem`.
        backend: as in :func:`flash_attention`.
    """
    chosen = _with_backward(problem, backend)
    return chosen.forward(*problem)


def part_gradients(
    problem: Problem, backend: str, do: Tensor, dlse: Tensor | None, o: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``dq, dk, dv`` that one part of the keys contributes; the whole gradient is their sum.

    The probabilities are ``exp(score - lse)`` and ``delta`` is ``rowsum(o * do) - dlse``: with the
    output and the LSE over *all* keys they are those of the whole softmax, so a part needs nothing
    of the others.

    Args:
        problem: as :func:`attend_part`'s.
        backend: likewise.
        do: gradient of the output.
        dlse: gradient of the LSE, or None.
        o: output over all keys.
        lse: LSE over all keys.
    """
    q, k, v, spec, extras = problem
    chosen = _with_backward(problem, backend)
    # The kernels read lse without strides, and a part's rows may be a slice.
    lse = lse.contiguous()
    dq, dk, dv, _, _ = chosen.backward(do, dlse, q, k, v, o, lse, spec, extras)
    return dq, dk, dv


def check_part(problem: Problem, backend: str) -> None:
    """Raise what :func:`attend_part` would raise, from shapes alone.

    Raises:
        ValueError: the backend refuses, or has no backward of its own.
    """
    _with_backward(problem, backend)


def _with_backward(problem: Problem, backend: str) -> Any:
    """A backend whose backward takes ``o`` and ``lse``; PyTorch's autograd knows one call only."""
    chosen = backends.select(backend, problem)
    if chosen.backward is not None:
        return chosen
    if backend == "auto":
        return backends.BACKENDS["tiled"]
    raise ValueError(f"backend {backend!r} can't compute a part: it has no backward of its own")


def build_problem(
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
    dropout_seed: int | Tensor | None = None,
    packing: Packing | None = None,
) -> Problem:
    """Check every argument and resolve it; the only place that does.

    Packed tensors come as ``(1, H, T, D)``, so that a backend sees one layout.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _check_tensor(name, tensor)
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
    window_left, window_right = _check_window(window_size)
    if causal:
        window_right = 0
    factor = query.shape[-1] ** -0.5 if scale is None else _check_number("scale", scale)
    if softcap is not None and _check_number("softcap", softcap) <= 0:
        raise ValueError(f"softcap must be positive, or None for off, got {softcap}")
    _check_dropout(dropout_p, dropout_seed)
    if packing is not None:
        packing = _resolve_packing(packing, query, key)
        # A side as wide as all tokens together hides nothing, and would overflow an int32.
        tokens = query.shape[2] + key.shape[2]
        window_left = None if window_left is None or window_left >= tokens else window_left
        window_right = None if window_right is None or window_right >= tokens else window_right
    mask = _resolve_mask(attn_mask, query, key)
    spec = AttentionSpec(
        scale=factor,
        window_left=window_left,
        window_right=window_right,
        diagonal=diagonal,
        softcap=softcap,
        dropout_p=float(dropout_p),
        mask_gradient=mask is not None
        and mask.is_floating_point()
        and torch._C._are_functorch_transforms_active(),
    )
    extras = AttentionExtras(
        attn_mask=mask,
        alibi_slopes=_resolve_slopes(alibi_slopes, query, packing),
        sinks=_check_sinks(sinks, query),
        dropout_seed=_resolve_seed(dropout_p, dropout_seed, query),
    )
    if packing is None:
        if not is_observed(query):
            spec = spec.without_idle_edges(query.shape[2], key.shape[2])
    else:
        spec = replace(spec, max_seqlen_q=packing.max_seqlen_q, max_seqlen_k=packing.max_seqlen_k)
        extras = extras._replace(
            cu_seqlens_q=packing.cu_seqlens_q, cu_seqlens_k=packing.cu_seqlens_k
        )
    return Problem(query, key, value, spec, extras)


def has_autocast(device_type: str) -> bool:
    """Whether torch can say if autocast is on for such a device.

    ``torch.amp.is_autocast_available`` says so too, but torch 2.11 can't compile it.
    """
    return device_type != "meta"


def _autocast(tensor: Tensor) -> Tensor:
    """What autocast does to matmul's arguments: every floating dtype but fp64 becomes its own."""
    if tensor.is_floating_point() and tensor.dtype != torch.float64:
        return tensor.to(torch.get_autocast_dtype(tensor.device.type))
    return tensor


def _stand_ins(*arguments: Any, **options: Any) -> tuple[Any, ...]:
    """Arguments that are no tensors but take part in torch functions, as a tracer's proxies do.

    ``torch.fx.symbolic_trace`` records a call of such an argument as one node.
    """
    return tuple(
        x
        for x in (*arguments, *options.values())
        if not isinstance(x, Tensor) and hasattr(type(x), "__torch_function__")
    )


def _check_tensor(name: str, tensor: Any) -> None:
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


def _check_window(window_size: WindowSize) -> WindowSize:
    if window_size == (None, None):
        return None, None
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


def _check_device(name: str, tensor: Tensor, query: Tensor) -> None:
    if tensor.device != query.device:
        raise ValueError(f"{name} must be on query's device {query.device}, got {tensor.device}")


def _check_number(name: str, number: float) -> float:
    if not isinstance(number, (int, float)) or isinstance(number, bool):
        raise TypeError(f"{name} must be a float or None, got {type(number).__name__}")
    if not abs(number) < math.inf:  # Dynamo has no math.isfinite of a symbolic float
        raise ValueError(f"{name} must be finite, got {number}")
    return float(number)


def _check_dropout(dropout_p: float, dropout_seed: int | Tensor | None) -> None:
    if not isinstance(dropout_p, (int, float)) or isinstance(dropout_p, bool):
        raise TypeError(f"dropout_p must be a float, got {type(dropout_p).__name__}")
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p must be a probability from 0 to 1, got {dropout_p}")
    if dropout_seed is None:
        return
    if isinstance(dropout_seed, Tensor):
        if dropout_seed.dtype != torch.int64 or dropout_seed.ndim != 0:
            raise TypeError(
                f"dropout_seed must be an int, a () int64 tensor or None, "
                f"got {tuple(dropout_seed.shape)} {dropout_seed.dtype}"
            )
        return
    if not isinstance(dropout_seed, int) or isinstance(dropout_seed, bool):
        raise TypeError(f"dropout_seed must be an int or None, got {type(dropout_seed).__name__}")
    if not -(2**63) <= dropout_seed < 2**63:
        raise ValueError(f"dropout_seed must fit into 64 bits, got {dropout_seed}")


def _resolve_seed(
    dropout_p: float, dropout_seed: int | Tensor | None, query: Tensor
) -> Tensor | None:
    if dropout_p == 0:
        return None
    if isinstance(dropout_seed, Tensor):
        return dropout_seed.to(query.device)
    if dropout_seed is not None:
        return torch.full((), dropout_seed, dtype=torch.int64, device=query.device)
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=query.device)


def _resolve_mask(attn_mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """The mask with four dimensions, each full or 1."""
    if attn_mask is None:
        return None
    full = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    _check_tensor("attn_mask", attn_mask)
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
    # A mask that was expanded before it came is taken back to what it occupies.
    for dim in range(4):
        if attn_mask.stride(dim) == 0 and attn_mask.shape[dim] > 1:
            attn_mask = attn_mask.narrow(dim, 0, 1)
    return attn_mask


def _resolve_slopes(
    alibi_slopes: Tensor | None, query: Tensor, packing: Packing | None
) -> Tensor | None:
    """The slopes in fp32, ``(B or 1, H)``."""
    if alibi_slopes is None:
        return None
    _check_tensor("alibi_slopes", alibi_slopes)
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
        return None  # nothing they could act on
    return alibi_slopes.float().reshape(-1, heads)


def _check_sinks(sinks: Tensor | None, query: Tensor) -> Tensor | None:
    if sinks is None:
        return None
    _check_tensor("sinks", sinks)
    if sinks.dtype not in SUPPORTED_DTYPES:
        raise TypeError(f"sinks must be floating, got {sinks.dtype}")
    _check_device("sinks", sinks, query)
    if sinks.shape != (query.shape[1],):
        raise ValueError(f"sinks must be (heads={query.shape[1]},), got {tuple(sinks.shape)}")
    return sinks


def _resolve_packing(packing: Packing, query: Tensor, key: Tensor) -> Packing:
    """int32 boundaries, and the longest sequences where the caller did not say."""
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
    _check_tensor(name, cu_seqlens)
    if cu_seqlens.ndim != 1 or len(cu_seqlens) == 0:
        raise ValueError(f"{name} must be (sequences + 1,), got {tuple(cu_seqlens.shape)}")
    _check_device(name, cu_seqlens, query)


def _resolve_longest(side: str, longest: Any, cu_seqlens: Tensor, tensor: Tensor) -> Any:
    """``max_seqlen``, read from the boundaries if None; both checked where reading costs nothing.

    On a GPU the values stay unread where the caller gives ``max_seqlen``: that would wait for it.
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
