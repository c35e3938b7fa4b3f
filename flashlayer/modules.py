"""The layer: projections and one functional call."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from flashlayer.functional import WindowSize, flash_attention


class FlashAttention(nn.Module):
    r"""Multi-head attention over ``(B, S, E)`` by way of :func:`flash_attention`.

        q = x W_q        k, v = (context or x) W_k, (context or x) W_v        y =
        concat_h(attention_h(q, k, v)) W_o

    Args:
        embed_dim: ``E``, size of the input and output features.
        num_heads: ``H``, query heads.
        num_kv_heads: ``Hkv``, key and value heads; ``H`` must be a multiple of it. ``H`` if None; 1
            is MQA.
        head_dim: ``D``; ``embed_dim // num_heads`` if None, which must then divide evenly.
        causal: each position sees itself and those before it (bottom-right aligned with a longer
            context).
        window_size: ``(left, right)`` sliding window, as in :func:`flash_attention`.
        softcap: not built yet.
        alibi: not built yet.
        sinks: not built yet.
        qk_norm: RMS-normalise every query and key head over ``D`` with a learned gain, before the
            rotation (Dehghani et al., arXiv 2302.05442, section 2; RMSNorm as in Qwen3).
        rotary_base: rotate queries and keys by their position (RoPE, Su et al., arXiv 2104.09864,
            section 3.4.2; first and second half of the head paired, as in GPT-NeoX and Llama) with
            this base, commonly 10000. None is off.
        dropout: not built yet.
        bias: whether the four projections have a bias.
        scale: factor on the scores; ``D ** -0.5`` if None.
        backend: as in :func:`flash_attention`.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: the sizes do not fit together.
        NotImplementedError: an option that is not built yet.

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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _refuse_unbuilt(softcap=softcap is not None, alibi=alibi, sinks=sinks, dropout=dropout != 0)
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
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
            head_dim = embed_dim // num_heads
        if rotary_base is not None:
            if rotary_base <= 0:
                raise ValueError(f"rotary_base must be positive, got {rotary_base}")
            if head_dim % 2:
                raise ValueError(f"rotary_base needs an even head_dim, got {head_dim}")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.causal = causal
        self.window_size = window_size
        self.rotary_base = rotary_base
        self.scale = scale
        self.backend = backend
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(embed_dim, num_heads * head_dim, bias=bias, **factory)
        self.k_proj = nn.Linear(embed_dim, num_kv_heads * head_dim, bias=bias, **factory)
        self.v_proj = nn.Linear(embed_dim, num_kv_heads * head_dim, bias=bias, **factory)
        self.out_proj = nn.Linear(num_heads * head_dim, embed_dim, bias=bias, **factory)
        self.q_norm = nn.RMSNorm(head_dim, **factory) if qk_norm else None
        self.k_norm = nn.RMSNorm(head_dim, **factory) if qk_norm else None

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        attn_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cache: Any = None,
    ) -> Tensor:
        """Attend from ``x`` to itself, or to ``context`` where one is given.

        Args:
            x: ``(B, S, E)``.
            context: ``(B, Sc, E)``, where keys and values come from (cross-attention); ``x`` if
                None.
            attn_mask: not built yet.
            cu_seqlens: not built yet.
            max_seqlen: not built yet.
            cache: not built yet.

        Returns:
            ``(B, S, E)``.

        Raises:
            ValueError: a shape does not fit, or ``context`` meets ``rotary_base``: positions in two
                different sequences have no common origin.
        """
        _refuse_unbuilt(
            attn_mask=attn_mask is not None,
            cu_seqlens=cu_seqlens is not None,
            max_seqlen=max_seqlen is not None,
            cache=cache is not None,
        )
        for name, tensor in (("x", x), ("context", x if context is None else context)):
            if tensor.ndim != 3 or tensor.shape[-1] != self.embed_dim:
                raise ValueError(
                    f"{name} must be (batch, sequence, embed_dim={self.embed_dim}), "
                    f"got {tuple(tensor.shape)}"
                )
        if context is not None and self.rotary_base is not None:
            raise ValueError(
                "context can't be combined with rotary_base: x and context share no positions"
            )
        source = x if context is None else context
        q = rearrange(self.q_proj(x), "b s (h d) -> b h s d", h=self.num_heads)
        k = rearrange(self.k_proj(source), "b s (h d) -> b h s d", h=self.num_kv_heads)
        v = rearrange(self.v_proj(source), "b s (h d) -> b h s d", h=self.num_kv_heads)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary_base is not None:
            q, k = rotate(q, self.rotary_base), rotate(k, self.rotary_base)
        out = flash_attention(
            q,
            k,
            v,
            causal=self.causal,
            window_size=self.window_size,
            scale=self.scale,
            backend=self.backend,
        )
        return self.out_proj(rearrange(out, "b h s d -> b s (h d)"))

    def extra_repr(self) -> str:
        """The options that the projections do not show; those at their default are left out."""
        parts = [f"{self.embed_dim}, {self.num_heads}"]
        if self.num_kv_heads != self.num_heads:
            parts.append(f"num_kv_heads={self.num_kv_heads}")
        parts.append(f"head_dim={self.head_dim}")
        if self.causal:
            parts.append("causal=True")
        if tuple(self.window_size) != (None, None):
            parts.append(f"window_size={tuple(self.window_size)}")
        if self.rotary_base is not None:
            parts.append(f"rotary_base={self.rotary_base}")
        if self.scale is not None:
            parts.append(f"scale={self.scale}")
        if self.backend != "auto":
            parts.append(f"backend={self.backend!r}")
        return ", ".join(parts)


def rotate(x: Tensor, base: float) -> Tensor:
    """Rotary position embedding of ``(B, H, S, D)``, positions 0 to S - 1; same shape and dtype.

    Angles and rotation are computed in fp32 (fp64 for fp64) whatever the dtype of ``x``: in bf16,
    positions past 256 are no longer distinct.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    position = torch.arange(x.shape[-2], device=x.device, dtype=dtype)
    frequency = base ** -(
        torch.arange(0, x.shape[-1], 2, device=x.device, dtype=dtype) / x.shape[-1]
    )
    angle = position[:, None] * frequency  # [S, D/2]
    first, second = x.to(dtype).chunk(2, dim=-1)
    return torch.cat(
        (
            first * angle.cos() - second * angle.sin(),
            first * angle.sin() + second * angle.cos(),
        ),
        dim=-1,
    ).to(x.dtype)


def _refuse_unbuilt(**asked_for: bool) -> None:
    for name, is_asked_for in asked_for.items():
        if is_asked_for:
            raise NotImplementedError(f"{name} is not built yet")
