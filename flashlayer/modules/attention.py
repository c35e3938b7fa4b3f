"""The layer: projections and one functional call."""

from __future__ import annotations

from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor, nn

from flashlayer import backends, distributed
from flashlayer.functional import flash_attention, flash_attention_varlen
from flashlayer.masks import IntervalMask
from flashlayer.modules.cache import KVCache
from flashlayer.modules.heads import Heads, local_features, local_heads
from flashlayer.modules.positions import alibi_slopes, rotate, token_positions
from flashlayer.modules.tracing import Leaf, check_tensor
from flashlayer.spec import WindowSize

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Arguments of forward, what each can't be combined with, and why.
EXCLUSIONS = (
    ("context", "rotary_base", "they share no positions"),
    ("context", "cu_seqlens", "it has no boundaries of its own"),
    ("context", "cache", "the cache holds the keys of x"),
    ("cache", "cu_seqlens", "it holds whole batches"),
    ("attn_mask", "cu_seqlens", "a mask has no packed form"),
    ("context", "context_parallel_group", "the ring has no such option"),
    ("dense attn_mask", "context_parallel_group", "a rank needs its rows of all keys"),
    ("cu_seqlens", "context_parallel_group", "it takes masks.documents(cu_seqlens=...)"),
    ("cache", "context_parallel_group", "the ring has no such option"),
)


class FlashAttention(Leaf):
    r"""Multi-head attention over ``(B, S, E)`` through :func:`flash_attention`.

    ::

        q, k, v = x W_q, (context or x) W_k, (context or x) W_v
        y = concat_h(attention_h(q, k, v)) W_o

    Args:
        embed_dim: ``E``, size of the input and output features.
        num_heads: ``H``, query heads.
        num_kv_heads: ``Hkv``, key and value heads; ``H`` must be a multiple of it. ``H`` if None; 1
            is MQA.
        head_dim: ``D``; ``embed_dim // num_heads`` if None, which must then divide evenly.
        causal: each position attends to itself and those before it (bottom-right aligned with a
            longer context).
        window_size: ``(left, right)`` sliding window, as in :func:`flash_attention`.
        softcap: cap on the scores, as in :func:`flash_attention`.
        alibi: add ALiBi with the paper's slopes, see :func:`alibi_slopes`.
        sinks: learn one attention sink per head, ``self.sinks`` (H,), zero at first.
        qk_norm: RMS-normalise every query and key head over ``D`` with a learned gain, before the
            rotation (Dehghani et al., arXiv 2302.05442, section 2; RMSNorm as in Qwen3).
        rotary_base: rotate queries and keys by their position (RoPE, Su et al., arXiv 2104.09864,
            section 3.4.2; first and second half of the head paired, as in GPT-NeoX and Llama) with
            this base, commonly 10000. None is off.
        dropout: probability that an attention weight is dropped; off in ``eval()``.
        bias: whether the four projections have a bias.
        scale: factor on the scores; ``D ** -0.5`` if None.
        backend: as in :func:`flash_attention`.
        context_parallel_group: a process group over which the sequence is sharded: ``x`` is this
            rank's shard, positions are those of the whole sequence, and attention is
            :func:`flashlayer.distributed.ring_attention`. None is off.
        context_parallel_placement: which positions a shard holds, ``"contiguous"`` or ``"zigzag"``,
            see :func:`flashlayer.distributed.shard_sequence`. Contiguous shards may differ in
            length, so each call gathers the lengths; zigzag shards must have one length.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Tensor parallelism: ``parallelize_module`` with ``ColwiseParallel`` for ``q_proj``, ``k_proj``
    and ``v_proj`` and ``RowwiseParallel`` for ``out_proj`` gives every rank some of the heads, with
    their slopes, sinks and rows of a mask; outputs and gradients equal those of one process. If the
    ranks don't divide the kv heads, shard only ``q_proj`` and ``out_proj``. Dropout draws from each
    rank's own generator.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: the sizes do not fit together.

    Example:
        >>> layer = FlashAttention(512, 8, num_kv_heads=2, causal=True, rotary_base=10000.0)
        >>> layer(torch.randn(4, 1024, 512)).shape
        torch.Size([4, 1024, 512])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        causal: bool = False,
        window_size: WindowSize = (None, None),
        softcap: float | None = None,
        alibi: bool = False,
        sinks: bool = False,
        qk_norm: bool = False,
        rotary_base: float | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        scale: float | None = None,
        backend: str = "auto",
        context_parallel_group: ProcessGroup | None = None,
        context_parallel_placement: distributed.Placement = "contiguous",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        head_dim = _check_sizes(embed_dim, num_heads, num_kv_heads, head_dim)
        for name, number in (("rotary_base", rotary_base), ("dropout", dropout)):
            if number is not None and (not isinstance(number, Real) or isinstance(number, bool)):
                raise TypeError(f"{name} must be a float, got {type(number).__name__}")
        if rotary_base is not None:
            if not rotary_base > 0:
                raise ValueError(f"rotary_base must be positive, got {rotary_base}")
            if head_dim % 2:
                raise ValueError(f"rotary_base needs an even head_dim, got {head_dim}")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout must be a probability from 0 to 1, got {dropout}")
        backends.check_name(backend)
        if context_parallel_group is not None:
            for name, option in (("alibi", alibi), ("dropout", dropout)):
                if option:
                    raise ValueError(f"context_parallel_group can't be combined with {name}")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.causal = causal
        self.window_size = window_size
        self.softcap = softcap
        self.alibi = alibi
        self.dropout = dropout
        self.rotary_base = rotary_base
        self.scale = scale
        self.backend = backend
        self.context_parallel_group = context_parallel_group
        self.context_parallel_placement: distributed.Placement = context_parallel_placement
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(embed_dim, num_heads * head_dim, bias=bias, **factory)
        self.k_proj = nn.Linear(embed_dim, num_kv_heads * head_dim, bias=bias, **factory)
        self.v_proj = nn.Linear(embed_dim, num_kv_heads * head_dim, bias=bias, **factory)
        self.out_proj = nn.Linear(num_heads * head_dim, embed_dim, bias=bias, **factory)
        self.sinks = nn.Parameter(torch.zeros(num_heads, **factory)) if sinks else None
        self.q_norm = nn.RMSNorm(head_dim, **factory) if qk_norm else None
        self.k_norm = nn.RMSNorm(head_dim, **factory) if qk_norm else None

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        attn_mask: Tensor | IntervalMask | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Attend from ``x`` to itself, or to ``context`` where one is given.

        Args:
            x: ``(B, S, E)``; with ``cu_seqlens`` packed, ``(T, E)``.
            context: ``(B, Sc, E)``, the source of keys and values (cross-attention); ``x`` if None.
            attn_mask: bool or float, broadcastable to ``(B, H, S, Sk)``, or an
                :class:`flashlayer.masks.IntervalMask`, as in :func:`flash_attention`. With a
                ``context_parallel_group`` only the latter, of the whole sequence and the same on
                every rank.
            cu_seqlens: ``(N + 1,)``, boundaries of the packed sequences, as in
                :func:`flash_attention_varlen`.
            max_seqlen: the longest packed sequence, or more.
            cache: keys and values of the positions before ``x``; those of ``x`` are appended to it.

        Returns:
            As ``x``.

        Raises:
            ValueError: a shape does not fit, or two arguments exclude each other.
        """
        optional = {"context": context, "attn_mask": attn_mask, "cu_seqlens": cu_seqlens}
        optional["dense attn_mask"] = attn_mask if isinstance(attn_mask, Tensor) else None
        self._check_inputs(x, max_seqlen, optional | {"cache": cache})
        source = x if context is None else context
        q, k, v = local_features(self.q_proj(x), self.k_proj(source), self.v_proj(source))
        heads = self._heads(q, k, v)
        # Under tensor parallelism there are fewer heads than num_heads, each of head_dim.
        q, k, v = (rearrange(y, "... s (h d) -> ... h s d", d=self.head_dim) for y in (q, k, v))
        if heads is not None:
            k, v = heads.keys(k), heads.keys(v)
        if self.q_norm is not None and self.k_norm is not None:
            if heads is None:
                q, k = self.q_norm(q), self.k_norm(k)
            else:
                q, k = heads.normalize(self.q_norm, q), heads.normalize(self.k_norm, k)
        sharding = self._sharding(q)
        if self.rotary_base is not None:
            if sharding is None:
                position = token_positions(q, cu_seqlens, 0 if cache is None else cache.length)
            else:
                position = distributed.position_ids(q.shape[-2], device=q.device, **sharding)
            q, k = (rotate(y, self.rotary_base, position) for y in (q, k))
        if cache is not None:
            k, v = cache.append(k, v)
        options = self._options(heads, q.device)
        if attn_mask is not None and heads is not None:
            attn_mask = heads.mask(attn_mask)
        if sharding is not None:
            mask: Any = attn_mask  # no Tensor: see EXCLUSIONS
            out: Any = distributed.ring_attention(q, k, v, attn_mask=mask, **sharding, **options)
            return self.out_proj(rearrange(out, "b h s d -> b s (h d)"))
        if cu_seqlens is not None:
            q, k, v = (rearrange(y, "h t d -> t h d") for y in (q, k, v))
            out = flash_attention_varlen(
                q, k, v, cu_seqlens_q=cu_seqlens, max_seqlen_q=max_seqlen, **options
            )
            return self.out_proj(rearrange(out, "t h d -> t (h d)"))
        out = flash_attention(q, k, v, attn_mask=attn_mask, **options)
        return self.out_proj(rearrange(out, "b h s d -> b s (h d)"))

    def _heads(self, q: Tensor, k: Tensor, v: Tensor) -> Heads | None:
        """The heads of this process; None if it has all of the layer's."""
        widths = q.shape[-1], k.shape[-1], v.shape[-1]
        kv_width = self.num_kv_heads * self.head_dim
        weight = getattr(self.q_proj, "weight", None)
        all_here = widths == (self.num_heads * self.head_dim, kv_width, kv_width)
        if all_here and type(weight) is nn.Parameter:
            return None
        return local_heads(widths, weight, self.head_dim, self.num_heads, self.num_kv_heads)

    def _options(self, heads: Heads | None, device: torch.device) -> dict[str, Any]:
        """Options of the attention function; the ring has no ALiBi and no dropout."""
        sinks = self.sinks
        options: dict[str, Any] = {
            "causal": self.causal,
            "window_size": self.window_size,
            "scale": self.scale,
            "softcap": self.softcap,
            "sinks": sinks if heads is None or sinks is None else heads.sinks(sinks),
            "backend": self.backend,
        }
        if self.context_parallel_group is not None:
            return options
        slopes = None
        if self.alibi:
            slopes = alibi_slopes(self.num_heads if heads is None else heads.total, device)
            slopes = slopes if heads is None else heads.local(slopes, 0, "alibi")
        dropout_p = self.dropout if self.training else 0.0
        return options | {"alibi_slopes": slopes, "dropout_p": dropout_p}

    def _sharding(self, q: Tensor) -> dict[str, Any] | None:
        """Where the sequence's shards are, as arguments; None without context parallelism."""
        group, placement = self.context_parallel_group, self.context_parallel_placement
        if group is None:
            return None
        lengths = [q.shape[-2]] * group.size()
        if placement == "contiguous":
            lengths = distributed.shard_lengths(q, group=group, dim=2)
        return {"group": group, "placement": placement, "lengths": lengths}

    def _check_inputs(self, x: Tensor, max_seqlen: int | None, optional: dict[str, Any]) -> None:
        cache, packed = optional["cache"], optional["cu_seqlens"] is not None
        layout, ndim = ("(tokens", 2) if packed else ("(batch, sequence", 3)
        context = x if optional["context"] is None else optional["context"]
        for name, tensor in (("x", x), ("context", context)):
            check_tensor(name, tensor, "layer")
            if tensor.ndim != ndim or tensor.shape[-1] != self.embed_dim:
                expected = f"{layout}, embed_dim={self.embed_dim})"
                raise ValueError(f"{name} must be {expected}, got {tuple(tensor.shape)}")
        if cache is not None and not isinstance(cache, KVCache):
            raise TypeError(f"cache must be a KVCache or None, got {type(cache).__name__}")
        if max_seqlen is not None and not packed:
            raise ValueError("max_seqlen needs cu_seqlens: it is about packed sequences")
        for name, other_name, reason in EXCLUSIONS:
            other = optional[other_name] if other_name in optional else getattr(self, other_name)
            if optional[name] is not None and other is not None:
                raise ValueError(f"{name} can't be combined with {other_name}: {reason}")

    def extra_repr(self) -> str:
        """The options that the projections do not show; those at their default are left out."""
        defaults = {
            "num_kv_heads": self.num_heads,
            "head_dim": None,
            "causal": False,
            "window_size": (None, None),
            "rotary_base": None,
            "softcap": None,
            "alibi": False,
            "sinks": False,
            "dropout": 0.0,
            "scale": None,
            "backend": "auto",
        }
        values = vars(self) | {
            "window_size": tuple(self.window_size),
            "sinks": self.sinks is not None,
        }
        parts = [str(self.embed_dim), str(self.num_heads)]
        for name, default in defaults.items():
            if values[name] != default:
                parts.append(f"{name}={values[name]!r}")
        if self.context_parallel_group is not None:
            parts.append(f"context_parallel={self.context_parallel_placement!r}")
        return ", ".join(parts)


def _check_sizes(embed_dim: int, num_heads: int, num_kv_heads: int, head_dim: int | None) -> int:
    """Raise unless the sizes fit together; returns ``head_dim``."""
    for name, size in (
        ("embed_dim", embed_dim),
        ("num_heads", num_heads),
        ("num_kv_heads", num_kv_heads),
        ("head_dim", 1 if head_dim is None else head_dim),
    ):
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"{name} must be an int, got {type(size).__name__}")
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    if num_heads % num_kv_heads:
        raise ValueError(
            f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {num_kv_heads}"
        )
    if head_dim is None:
        if embed_dim % num_heads:
            raise ValueError(
                f"embed_dim must be a multiple of num_heads unless head_dim is given, "
                f"got {embed_dim} and {num_heads}"
            )
        return embed_dim // num_heads
    return head_dim
