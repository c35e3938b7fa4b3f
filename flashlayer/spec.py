"""What one attention call computes: its options, and the geometry that follows from them.

``causal`` and ``window_size`` are one thing here, a *band* around the diagonal: query ``i`` sees
key ``j`` when

    i + offset - window_left  <=  j  <=  i + offset + window_right        (``None`` is unbounded)

so causal attention is the band ``(None, 0)``. Everything a tiled algorithm needs to skip work
follows from these four numbers by interval arithmetic, see :meth:`AttentionSpec.key_bounds`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

Diagonal = Literal["bottom_right", "top_left"]

# Tensors that are nothing but their values.
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


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What scores, sums and the LSE of inputs in ``dtype`` are computed in: fp32, or fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class KeyBounds(NamedTuple):
    """Which keys a block of consecutive queries sees, as two nested half-open intervals.

    Every key that *some* query of the block sees lies in ``[any_start, any_stop)``: nothing else is
    ever loaded. Every key in ``[all_start, all_stop)`` is seen by *all* of them: those tiles need
    no mask arithmetic. An interval is empty when its stop is not greater than its start.
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
        mask_gradient: whether someone may ask for the gradient of an additive mask although its
            ``requires_grad`` does not say so, as inside a transform of ``torch.func``.
        diagonal: where the band is anchored when ``Sq != Sk``: ``"bottom_right"`` aligns the last
            query with the last key (flash_attn), ``"top_left"`` the first with the first (SDPA).
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

    def without_idle_edges(self, seqlen_q: int, seqlen_k: int) -> AttentionSpec:
        """The same attention with the band's edges dropped where they hide no key of this problem.

        A one-token decoding step is causal in name only, and a window wider than the sequence is
        none: seen so, more backends cover them and no kernel computes a mask for them. Of like
        lengths both diagonals are one, the top-left. All this compares sizes, so an observed call
        (:func:`is_observed`) does it inside the custom op.
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
        """The keys that the queries ``[q_start, q_stop)`` see; needs ``q_start < q_stop``.

        The first query's window starts and ends leftmost, the last one's rightmost, so the union of
        the windows runs from the first's start to the last's end and their intersection from the
        last's start to the first's end.
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
        """Bool mask ``(q_stop - q_start, k_stop - k_start)`` of one tile, True = sees."""
        diagonal = torch.arange(q_start, q_stop, device=device)[:, None] + self.offset(
            seqlen_q, seqlen_k
        )
        distance = (
            torch.arange(k_start, k_stop, device=device) - diagonal
        )  # key position minus the query's own
        mask = torch.ones_like(distance, dtype=torch.bool)
        if self.window_left is not None:
            mask &= distance >= -self.window_left
        if self.window_right is not None:
            mask &= distance <= self.window_right
        return mask


class AttentionExtras(NamedTuple):
    """The tensors an option may bring along; all None for plain attention."""

    attn_mask: Tensor | None = None  # bool or float, 4-D, every dimension full or 1
    alibi_slopes: Tensor | None = None  # (B or 1, H) fp32; packed: B is the number of sequences
    sinks: Tensor | None = None  # (H,)
    dropout_seed: Tensor | None = None  # () int64; there whenever spec.dropout_p > 0
    cu_seqlens_q: Tensor | None = None  # (sequences + 1,) int32; packed, B = 1 and S = T
    cu_seqlens_k: Tensor | None = None

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
        # lse = -inf: no key and a sink of -inf, no probability at all; or a token past the last
        # packed sequence, whose delta may be NaN.
        weighted = torch.where(lse == -torch.inf, 0, probability * delta)
        return -weighted.sum(dim=(0, 2)).to(self.sinks.dtype)


NO_EXTRAS = AttentionExtras()


def longest_sequence(cu_seqlens: Tensor) -> int:
    """Length of the longest packed sequence; to read it waits for the device."""
    return int(cu_seqlens.diff().max()) if len(cu_seqlens) > 1 else 0


class Problem(NamedTuple):
    """One validated call, as a backend sees it when asked whether it can compute it."""

    query: Tensor  # (B, H, Sq, D); packed sequences (1, H, Tq, D)
    key: Tensor  # (B, Hkv, Sk, D)
    value: Tensor  # (B, Hkv, Sk, Dv)
    spec: AttentionSpec
    extras: AttentionExtras


class Backend(Protocol):
    """One way to compute attention: a module of :mod:`flashlayer.backends` with these names."""

    name: str

    def refuses(self, problem: Problem) -> str | None:
        """None when this backend can compute ``problem``, else the reason in a clause."""
        ...

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, extras: AttentionExtras
    ) -> tuple[Tensor, Tensor]:
        """``o`` (B, H, Sq, Dv) in q's dtype; ``lse`` (B, H, Sq), fp32 or fp64, any strides."""
        ...

    def empty_results(self, q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """``o`` and ``lse`` uninitialised, in the strides that ``forward`` mostly gives them."""
        ...

    def empty_gradients(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``dq, dk, dv`` uninitialised, in the strides that ``backward`` mostly gives them."""
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

        ``backward`` itself is None where ``forward`` is left to PyTorch's autograd.
        """
        ...
