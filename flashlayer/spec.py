"""What one attention call computes: its options, and the geometry that follows from them.

``causal`` and ``window_size`` are one thing, a window: key ``j`` is visible to query ``i`` when

    i + offset - window_left  <=  j  <=  i + offset + window_right        (``None`` is unbounded)

so causal attention is the window ``(None, 0)``. Which tiles a tiled algorithm may skip follows from
these numbers by interval arithmetic, see :meth:`AttentionSpec.key_bounds`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    NamedTuple,
    ParamSpec,
    Protocol,
    Required,
    TypedDict,
    TypeVar,
)

import torch
from torch import Tensor

if TYPE_CHECKING:
    from flashlayer.masks import IntervalMask

Diagonal = Literal["bottom_right", "top_left"]
WindowSize = tuple[int | None, int | None]

_is_any_autocast_enabled = torch._C._is_any_autocast_enabled
P = ParamSpec("P")
Result = TypeVar("Result")

# Not subclasses, which may redefine any operation.
_PLAIN = frozenset((Tensor, torch.nn.Parameter))


def is_observed(x: Tensor) -> bool:
    """Whether something besides the backend must see this call, or ``x`` has no values to read.

    True under a compiler or tracer, under a dispatch mode (``FakeTensorMode``, ``make_fx``, a flop
    counter), for a tensor subclass and for meta tensors. Such a call enters its backend through the
    custom ops of :mod:`flashlayer.backends.ops`, and Python may neither read values nor choose
    between paths by sizes: a graph would be specialised to the choice.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or type(x) not in _PLAIN
        or torch._C._is_tracing()
        or x.is_meta
    )


def is_sharded(x: Tensor) -> bool:
    """Whether ``x`` is a DTensor; by name, as those who have none need not load its module."""
    return type(x).__name__ == "DTensor" and type(x).__module__.startswith("torch.distributed.")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What scores, sums and the LSE of inputs in ``dtype`` are computed in: fp32, or fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def has_autocast(device_type: str) -> bool:
    """Whether torch has autocast for this device type.

    Stands in for ``torch.amp.is_autocast_available``, which torch 2.11 can't compile.
    """
    return device_type != "meta"


def without_autocast(function: Callable[P, Result]) -> Callable[P, Result]:
    """A function whose first argument is a tensor, or begins with one, computed without autocast.

    A call casts its inputs once, when it is checked. Autocast would go on to cast the operands of
    every product, so scores and gradients that are widened to fp32 would be rounded again. Each
    function of a backend has this itself: a compiled graph, a ring or a transform may enter it from
    anywhere, and a backward pass under another autocast state than its forward pass.
    """

    @functools.wraps(function)
    def plain(*args: P.args, **kwargs: P.kwargs) -> Result:
        if not _is_any_autocast_enabled():  # 0.3 us, this wrapper included
            return function(*args, **kwargs)
        first: Any = args[0]
        device_type = (first[0] if isinstance(first, tuple) else first).device.type
        if not has_autocast(device_type):
            return function(*args, **kwargs)
        with torch.autocast(device_type, enabled=False):
            return function(*args, **kwargs)

    return plain


class Options(TypedDict, total=False):
    """Keyword options of ``flash_attention`` and ``flash_attention_varlen``, for type checkers."""

    causal: bool
    window_size: WindowSize
    diagonal: Diagonal
    scale: float | None
    softcap: float | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    dropout_p: float
    dropout_seed: int | Tensor | None
    backend: str


class DenseOptions(Options, total=False):
    """Those of ``flash_attention`` only."""

    attn_mask: Tensor | IntervalMask | None


class PackedOptions(Options, total=False):
    """Those of ``flash_attention_varlen`` only."""

    cu_seqlens_q: Required[Tensor]
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int | None
    max_seqlen_k: int | None


class KeyBounds(NamedTuple):
    """Keys visible to a block of consecutive queries, as two nested half-open intervals.

    Keys visible to *some* query of the block lie in ``[any_start, any_stop)``; no others are
    loaded. Keys in ``[all_start, all_stop)`` are visible to *all* of them: those tiles need no mask
    arithmetic. An interval is empty when its stop is not greater than its start.
    """

    any_start: int
    all_start: int
    all_stop: int
    any_stop: int


@dataclass(frozen=True)
class AttentionSpec:
    """The options of one call, resolved (no ``None`` that means "default") and hashable.

    Attributes:
        scale: factor on the scores ``q k^T``; any finite float, negative and zero included.
        window_left: keys visible to the left of a query's own position; None is unbounded.
        window_right: keys visible to the right of it; None is unbounded, 0 is causal.
        softcap: scores become ``softcap * tanh(score / softcap)``; None is off.
        dropout_p: probability that an attention weight is dropped; 0 is off.
        max_seqlen_q: longest query sequence of a packed batch; None for a dense one, and for an
            observed call, which can't read ``cu_seqlens`` (:func:`longest_sequence`).
        max_seqlen_k: likewise, of the keys.
        mask_gradient: compute the gradient of an additive mask even if its ``requires_grad`` is
            False, as it is inside a transform of ``torch.func``.
        diagonal: alignment when ``Sq != Sk``: ``"bottom_right"`` aligns the last query with the
            last key (flash_attn), ``"top_left"`` the first with the first (SDPA).
        max_scores: return the largest score of every row as well.
        entropy: return the entropy of every row as well.
    """

    scale: float
    window_left: int | None = None
    window_right: int | None = None
    diagonal: Diagonal = "bottom_right"
    softcap: float | None = None
    dropout_p: float = 0.0
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None
    mask_gradient: bool = False
    max_scores: bool = False
    entropy: bool = False

    def asked(self, max_scores: Any, entropy: Any) -> tuple[Any, ...]:
        """Those of two results that are asked for, in a backend's order."""
        pairs = ((self.max_scores, max_scores), (self.entropy, entropy))
        return tuple(result for asked, result in pairs if asked)

    def without_idle_edges(self, seqlen_q: int, seqlen_k: int) -> AttentionSpec:
        """The same attention without window edges that hide no key of this problem.

        A causal one-token decoding step hides nothing, nor does a window wider than the sequence:
        without the edge more backends cover the call and no kernel computes a mask. Equal lengths
        make both diagonals the same; the result says ``"top_left"``. This compares sizes, so an
        observed call (:func:`is_observed`) does it inside the custom op.
        """
        if self.window_left is None and self.window_right is None:
            return self
        if seqlen_q == 0 or seqlen_k == 0:
            return replace(self, window_left=None, window_right=None)
        # The last query's window starts rightmost, the first one's ends leftmost.
        offset = self.offset(seqlen_q, seqlen_k)
        left, right = self.window_left, self.window_right
        if left is not None and seqlen_q - 1 + offset - left <= 0:
            left = None
        if right is not None and offset + right + 1 >= seqlen_k:
            right = None
        diagonal: Diagonal = "top_left" if seqlen_q == seqlen_k else self.diagonal
        return replace(self, window_left=left, window_right=right, diagonal=diagonal)

    def offset(self, seqlen_q: int, seqlen_k: int) -> int:
        """Key position of query 0: ``Sk - Sq`` for ``bottom_right``, 0 for ``top_left``."""
        return seqlen_k - seqlen_q if self.diagonal == "bottom_right" else 0

    def key_bounds(self, q_start: int, q_stop: int, seqlen_q: int, seqlen_k: int) -> KeyBounds:
        """Keys visible to the queries ``[q_start, q_stop)``; needs ``q_start < q_stop``.

        Windows move right with the query, so their union runs from the first query's start to the
        last one's end, and their intersection from the last one's start to the first one's end.
        """
        offset = self.offset(seqlen_q, seqlen_k)
        first, last = q_start + offset, q_stop - 1 + offset
        any_start, all_start, all_stop, any_stop = 0, 0, seqlen_k, seqlen_k
        if self.window_left is not None:
            any_start = min(max(first - self.window_left, 0), seqlen_k)
            all_start = min(max(last - self.window_left, 0), seqlen_k)
        if self.window_right is not None:
            all_stop = min(max(first + self.window_right + 1, 0), seqlen_k)
            any_stop = min(max(last + self.window_right + 1, 0), seqlen_k)
        return KeyBounds(any_start, all_start, all_stop, any_stop)

    def visible(
        self,
        q_start: int,
        q_stop: int,
        k_start: int,
        k_stop: int,
        seqlen_q: int,
        seqlen_k: int,
        device: torch.device,
    ) -> Tensor:
        """Bool mask ``(q_stop - q_start, k_stop - k_start)`` of one tile, True = visible."""
        i = torch.arange(q_start, q_stop, device=device)[:, None]
        j = torch.arange(k_start, k_stop, device=device)
        distance = i + self.offset(seqlen_q, seqlen_k) - j
        mask = torch.ones_like(distance, dtype=torch.bool)
        if self.window_left is not None:
            mask &= distance <= self.window_left
        if self.window_right is not None:
            mask &= distance >= -self.window_right
        return mask


class AttentionExtras(NamedTuple):
    """The tensors of the options; all None for plain attention."""

    attn_mask: Tensor | None = None  # bool or float, 4-D, every dimension full or 1
    alibi_slopes: Tensor | None = None  # (B or 1, H) fp32; packed: B is the number of sequences
    sinks: Tensor | None = None  # (H,)
    dropout_seed: Tensor | None = None  # () int64; there whenever spec.dropout_p > 0
    cu_seqlens_q: Tensor | None = None  # (sequences + 1,) int32; packed, B = 1 and S = T
    cu_seqlens_k: Tensor | None = None
    intervals: Tensor | None = None  # (B or 1, H or 1, 2 or 4, Sk) int32: an IntervalMask's

    def wants_mask_gradient(self, spec: AttentionSpec) -> bool:
        """Whether the backward pass is to compute ``d_mask``."""
        mask = self.attn_mask
        return mask is not None and (spec.mask_gradient or mask.requires_grad)

    def sinks_gradient(self, lse: Tensor, delta: Tensor) -> Tensor | None:
        """``d_sinks`` (H,) from ``lse`` and ``delta`` (B, H, Sq), None where there are no sinks.

        A sink is one more key of probability ``exp(sink - lse)`` whose value is 0, so its dP is 0
        and its dS is ``-exp(sink - lse) * delta``.
        """
        if self.sinks is None:
            return None
        probability = torch.exp(self.sinks.to(lse.dtype)[:, None] - lse)
        # lse = -inf where a row has no key and a sink of -inf, and past the last packed sequence,
        # where delta may be NaN.
        weighted = torch.where(lse == -torch.inf, 0, probability * delta)
        return -weighted.sum(dim=(0, 2)).to(self.sinks.dtype)


NO_EXTRAS = AttentionExtras()


def as_extras(tensors: Sequence[Any]) -> AttentionExtras:
    """The extras among an ``autograd.Function``'s arguments, which has none where all are off."""
    return AttentionExtras(*tensors) if tensors else NO_EXTRAS


def in_input_order(grads: tuple[Any, ...], extras: Sequence[Any]) -> tuple[Any, ...]:
    """(dq, dk, dv, d_mask, d_sinks) as one gradient for each of q, k, v and the extras."""
    dq, dk, dv, d_mask, d_sinks = grads
    if not extras:
        return dq, dk, dv
    return dq, dk, dv, *AttentionExtras(attn_mask=d_mask, sinks=d_sinks)


def longest_sequence(cu_seqlens: Tensor) -> int:
    """Length of the longest packed sequence; reading it waits for the device."""
    return int(cu_seqlens.diff().max()) if len(cu_seqlens) > 1 else 0


def no_entropy_gradient(backend: str) -> str:
    """Why a gradient is refused."""
    return (
        f"backend {backend!r} computes no gradient of the entropy: detach it, or ask for "
        "backend='tiled' or 'standard'"
    )


class Problem(NamedTuple):
    """One checked call."""

    query: Tensor  # (B, H, Sq, D); packed sequences (1, H, Tq, D)
    key: Tensor  # (B, Hkv, Sk, D)
    value: Tensor  # (B, Hkv, Sk, Dv)
    spec: AttentionSpec
    extras: AttentionExtras


# Gradients, tangents and saved tensors: a Tensor, or None where an option is off.
Tensors = tuple[Any, ...]


class Backend(Protocol):
    """One way to compute attention: a module of :mod:`flashlayer.backends` with these names.

    What computes is :func:`without_autocast`.
    """

    name: str
    entropy_gradient: bool  # whether backward takes `dentropy`

    def refuses(self, problem: Problem) -> str | None:
        """None when this backend can compute ``problem``, else the reason in a clause."""
        ...

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, extras: AttentionExtras
    ) -> tuple[Tensor, ...]:
        """``o`` (B, H, Sq, Dv) in q's dtype; ``lse`` (B, H, Sq), fp32 or fp64, any strides.

        And what the spec asks for of ``max_scores`` and ``entropy`` (:meth:`AttentionSpec.asked`),
        ``(B, H, Sq)``, contiguous, in lse's dtype, as :class:`flashlayer.AuxOutput` defines them.
        """
        ...

    def has_tangents(self, problem: Problem) -> bool:
        """Whether ``forward_tangents`` covers a problem; else tangents go through ``tiled``."""
        ...

    def empty_results(self, q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """``o`` and ``lse`` uninitialised, with the strides that ``forward`` usually returns."""
        ...

    def empty_gradients(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``dq, dk, dv`` uninitialised, with the strides that ``backward`` usually returns."""
        ...

    def backward(
        self,
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
        """``dq, dk, dv, d_mask, d_sinks``; the last two None where there is no such input.

        With ``entropy_gradient`` it takes a keyword ``dentropy`` (B, H, Sq) as well; ``dlse`` has
        ``-dentropy * entropy`` in it then. ``backward`` itself is None where ``forward`` is left to
        PyTorch's autograd.
        """
        ...


# Not a tuple, which torch.func would flatten; not frozen, which would double its cost.
class TangentBackend(Backend, Protocol):
    """A backend of which ``has_tangents`` is ever true."""

    def forward_tangents(
        self,
        primals: tuple[Tensor, Tensor, Tensor],
        tangents: Tensors,
        spec: AttentionSpec,
        extras: AttentionExtras,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``o``, ``lse`` and their tangents in the direction of those of q, k and v.

        A tangent that is None is zero; the extras are constants. The tangent of an ``lse`` of -inf
        is 0.
        """
        ...


@dataclass(slots=True)
class Call:
    """What the Functions need besides tensors."""

    backend: Backend
    tiled: Backend  # differentiable PyTorch code, for tangents
    spec: AttentionSpec
