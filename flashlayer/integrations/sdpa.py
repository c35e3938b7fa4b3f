"""Code that calls ``torch.nn.functional.scaled_dot_product_attention``, routed to flashlayer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Proxy
from torch.nn.attention.bias import CausalBias, CausalVariant
from torch.overrides import TorchFunctionMode

from flashlayer import backends
from flashlayer.functional import flash_attention
from flashlayer.problem import SUPPORTED_DTYPES

HOST = F.scaled_dot_product_attention


def _without_dispatch(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of the function without its ``__torch_function__`` dispatch."""
    assert isinstance(function, FunctionType)
    names = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    scope = function.__globals__ | dict.fromkeys(names, lambda *_: False)
    copy = FunctionType(function.__code__, scope, argdefs=function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


# A mode is disabled while it handles a call, so it would miss what these call: SDPA in the first,
# and activation checkpoints, which rerun the forward pass, in the others.
COMPOSITE = {
    function: _without_dispatch(function)
    for function in (
        F.multi_head_attention_forward,
        Tensor.backward,
        torch.autograd.backward,
        torch.autograd.grad,
    )
}


class Report(NamedTuple):
    """How many calls an :class:`override` routed.

    ``routed`` went to flashlayer, ``left`` were left to torch, by reason.
    """

    routed: int
    left: dict[str, int]

    def __str__(self) -> str:
        """One line for what was routed, one for each reason."""
        lines = [f"{self.routed} routed to flashlayer"]
        lines += [f"{count} left to torch: {reason}" for reason, count in self.left.items()]
        return "\n".join(lines)


class override(TorchFunctionMode):
    """Routes every ``F.scaled_dot_product_attention`` inside the ``with`` block to flashlayer.

    The semantics are SDPA's: top-left ``is_causal``, bool masks with True = attend and float masks
    that are added, the causal biases of ``torch.nn.attention.bias``, ``enable_gqa``, any number of
    leading dimensions, broadcast as torch broadcasts them, zeros for a query without a visible key,
    and dropout whenever ``dropout_p > 0`` (drawn from torch's generator, but not torch's mask). A
    call without an equivalent in flashlayer is left to torch and counted with its reason, so what
    torch rejects torch still rejects.

    This is a :class:`torch.overrides.TorchFunctionMode`; no name is patched. Callers that did
    ``from torch.nn.functional import scaled_dot_product_attention`` are routed too. Blocks nest,
    the innermost takes the calls; leaving one by an exception undoes it. A block affects only the
    thread that entered it. Calls below Python, such as
    ``torch.ops.aten.scaled_dot_product_attention`` or a scripted module, are not routed;
    ``torch.nn.attention.sdpa_kernel`` chooses among torch's kernels and does not affect routed
    calls.

    Inside the block ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` don't take their
    fused fast path; with ``need_weights=False`` they are routed, with weights they don't use SDPA.
    Under ``torch.compile`` the block may be around the compiled function or inside it; Dynamo
    guards on it, so outside of the block the same function runs torch's. Only nn.MultiheadAttention
    is left to torch there (:func:`flashlayer.swap_attention` replaces it).
    ``torch.fx.symbolic_trace`` records SDPA, which is routed if the graph runs in a block.
    Activation checkpoints rerun the forward in the backward pass, so ``backward()`` belongs inside
    the block as well. Every torch call in the block costs a few microseconds more.

    Args:
        backend: as in :func:`flashlayer.flash_attention`.

    Example:
        >>> q = k = v = torch.randn(2, 8, 128, 64)
        >>> with override() as routing:
        ...     out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        >>> print(routing.report())
        1 routed to flashlayer
    """

    def __init__(self, backend: str = "auto") -> None:
        backends.check_name(backend)
        super().__init__()
        self.backend = backend
        self._routed = 0
        self._left: Counter[str] = Counter()

    def report(self) -> Report:
        """The calls so far, also after leaving the block."""
        return Report(self._routed, dict(self._left))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Route calls of SDPA, pass all others on."""
        kwargs = kwargs or {}
        if any(issubclass(kind, Proxy) for kind in types):
            # Record SDPA itself: the graph is routed if it runs in a block.
            return func(*args, **kwargs)
        plain = all(kind in (Tensor, torch.nn.Parameter) for kind in types)
        if func is HOST:
            known = all(kind in (Tensor, torch.nn.Parameter, CausalBias) for kind in types)
            return self._attend(known, *args, **kwargs)
        if plain and func in COMPOSITE:
            if not torch.compiler.is_compiling():
                with self:
                    return COMPOSITE[func](*args, **kwargs)
            if func is F.multi_head_attention_forward:
                self._left["nn.MultiheadAttention in a compiled graph; see swap_attention"] += 1
        return func(*args, **kwargs)

    def _attend(
        self,
        known: bool,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        tensors = [query, key, value] if attn_mask is None else [query, key, value, attn_mask]
        bias = attn_mask if isinstance(attn_mask, CausalBias) else None
        mask = None if bias is not None else attn_mask
        if any(x.is_nested for x in tensors):
            reason = "nested tensors"
        elif not known or any(isinstance(x, CausalBias) for x in (query, key, value)):
            reason = "a tensor subclass with semantics of its own"
        elif bias is not None and is_causal:
            reason = "attn_mask together with is_causal"
        else:
            options = (dropout_p, is_causal, scale, enable_gqa)
            reason = _reason_to_leave(query, key, value, mask, *options)
            if reason is None and bias is not None:
                lengths = query.shape[-2], key.shape[-2]
                if (bias.seq_len_q, bias.seq_len_kv) != lengths:
                    reason = "a causal bias for other lengths"
        if reason is not None:
            self._left[reason] += 1
            arguments = (query, key, value, attn_mask, dropout_p, is_causal)
            return HOST(*arguments, scale=scale, enable_gqa=enable_gqa)
        self._routed += 1
        leading = _leading(query, key, value, enable_gqa)
        assert leading is not None
        lower_right = bias is not None and bias.variant == CausalVariant.LOWER_RIGHT
        # torch accepts any number type, flash_attention rejects bool.
        if isinstance(scale, bool):
            scale = float(scale)
        if not isinstance(dropout_p, (int, float)) or isinstance(dropout_p, bool):
            dropout_p = float(dropout_p)
        out = flash_attention(
            *(_four(x, leading, enable_gqa) for x in (query, key, value)),
            attn_mask=None if mask is None else _four_mask(mask, leading),
            causal=is_causal or bias is not None,
            diagonal="bottom_right" if lower_right else "top_left",
            scale=scale,
            dropout_p=dropout_p,
            backend=self.backend,
        )
        assert isinstance(out, Tensor)
        return out.view(*leading, *out.shape[2:]) if len(leading) != 2 else out


def _reason_to_leave(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> str | None:
    """Why the call is left to torch; None if it is routed."""
    tensors = [query, key, value] if attn_mask is None else [query, key, value, attn_mask]
    if any(x.layout != torch.strided for x in tensors):
        return "a layout other than strided"
    if query.device.type == "meta" or any(x.device != query.device for x in tensors):
        return "the meta device, or tensors on more than one device"
    autocast = torch.is_autocast_enabled(query.device.type)
    if query.dtype not in SUPPORTED_DTYPES:
        return f"query of {query.dtype}"
    if not autocast and not query.dtype == key.dtype == value.dtype:
        return "query, key and value of more than one dtype"
    if attn_mask is not None:
        # Some torch builds accept both, others reject them.
        if is_causal:
            return "attn_mask together with is_causal"
        known = (torch.bool, torch.float32, *(SUPPORTED_DTYPES if autocast else (query.dtype,)))
        if attn_mask.dtype not in known:
            return f"attn_mask of {attn_mask.dtype} with query of {query.dtype}"
    if not 0 <= dropout_p <= 1:
        return "dropout_p that is no probability"
    if scale is not None and not (isinstance(scale, (int, float)) and math.isfinite(scale)):
        return "scale that is not a finite number"
    # Shapes, most of which torch rejects.
    if min(query.ndim, key.ndim, value.ndim) < (3 if enable_gqa else 2):
        return "too few dimensions"
    if query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2]:
        return "shapes that do not fit together"
    if query.shape[-1] == 0 or value.shape[-1] == 0:
        return "a head dimension of 0"
    if enable_gqa:
        if not query.shape[:-3] == key.shape[:-3] == value.shape[:-3]:
            return "batch dimensions to be broadcast with enable_gqa"
        if key.shape[-3] != value.shape[-3]:
            return "key and value with different numbers of heads"
        if key.shape[-3] == 0 or query.shape[-3] % key.shape[-3]:
            return "shapes that do not fit together"
    leading = _leading(query, key, value, enable_gqa)
    if leading is None:
        return "shapes that do not fit together"
    if leading and leading[-1] == 0:
        return "0 heads"
    if attn_mask is not None:
        if attn_mask.ndim < 2:
            return "attn_mask with fewer than 2 dimensions"
        if not _expands(attn_mask.shape, (*leading, query.shape[-2], key.shape[-2])):
            return "attn_mask that does not fit"
    return None


def _leading(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[int, ...] | None:
    """All dimensions of the output but the last two; None if they can't be broadcast."""
    if enable_gqa:
        return tuple(query.shape[:-2])
    shapes = [x.shape[:-2] for x in (query, key, value)]
    ndim = max(len(shape) for shape in shapes)
    leading = []
    for dim in range(-ndim, 0):
        sizes = [shape[dim] for shape in shapes if -dim <= len(shape)]
        size = next((size for size in sizes if size != 1), 1)
        if any(other not in (1, size) for other in sizes):
            return None
        leading.append(size)
    return tuple(leading)


def _expands(shape: tuple[int, ...], full: tuple[int, ...]) -> bool:
    sizes = zip(reversed(shape), reversed(full), strict=False)
    return len(shape) <= len(full) and all(size in (1, whole) for size, whole in sizes)


def _four(x: Tensor, leading: tuple[int, ...], enable_gqa: bool) -> Tensor:
    """``(..., S, D)`` as ``(B, H, S, D)``: expand without a copy, then flatten."""
    if not enable_gqa:
        x = x.expand(*leading, *x.shape[-2:])
    if x.ndim < 4:
        return x[(None,) * (4 - x.ndim)]
    return x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])


def _four_mask(mask: Tensor, leading: tuple[int, ...]) -> Tensor:
    """The mask with at most four dimensions.

    Copied only if it varies along some batch dimensions and is broadcast along others.
    """
    if len(leading) <= 2:
        return mask
    mask = mask[(None,) * (len(leading) + 2 - mask.ndim)]
    batch = mask.shape[:-3]
    if all(size == 1 for size in batch):
        return mask.reshape(mask.shape[-3:])
    mask = mask.expand(*leading[:-1], *mask.shape[-3:])
    return mask.reshape(math.prod(leading[:-1]), *mask.shape[-3:])
