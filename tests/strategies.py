"""What the property suite draws: whole problems, from the contract's option table."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

LENGTHS = (1, 2, 3, 17, 33, 63, 64, 65, 70)
HEAD_DIMS = (1, 3, 8, 16, 24, 40, 59, 64, 80, 96)
LAYOUTS = ("bhsd", "bshd", "strided_last", "expanded")
MAGNITUDES = (1.0, 1.0, 0.0, 10.0, 100.0)  # 100: logits of 1e4 and more at D = 40


class Drawn(NamedTuple):
    """A problem: what flash_attention (or flash_attention_varlen) gets."""

    query: Tensor
    key: Tensor
    value: Tensor
    options: dict[str, Any]


@st.composite
def problems(
    draw,
    *,
    dtypes: tuple[torch.dtype, ...],
    lengths: tuple[int, ...] = LENGTHS,
    head_dims: tuple[int, ...] = HEAD_DIMS,
    plain: bool = False,
) -> Drawn:
    """A dense problem with any combination of options; reproducible from the drawn seed.

    ``plain`` draws shapes, layouts, magnitudes, causal, windows, scale and masks only, Dv = D.
    """
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(dtypes))
    batch, kv_heads, group_size = pick(1, 2), pick(1, 2), pick(1, 1, 2, 3)
    heads = kv_heads * group_size
    seqlen_q, seqlen_k = draw(st.sampled_from(lengths)), draw(st.sampled_from(lengths))
    dim = draw(st.sampled_from(head_dims))
    value_dim = dim if plain else pick(dim, dim, draw(st.sampled_from(head_dims)))
    magnitude = draw(st.sampled_from(MAGNITUDES))
    if dtype == torch.float16:
        magnitude = min(magnitude, 30.0)  # the formula's own q k^T overflows beyond

    def tensor(layout: str, heads: int, seqlen: int, dim: int, factor: float) -> Tensor:
        shape = (batch, heads, seqlen, dim)
        x = factor * torch.randn(shape, generator=generator, dtype=torch.float64)
        x = x.to(dtype)
        if layout == "bshd":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "strided_last":
            return x.repeat_interleave(2, dim=-1)[..., ::2]
        if layout == "expanded":
            return x[:, :1].expand(shape)
        return x

    layouts = st.sampled_from(LAYOUTS)
    q = tensor(draw(layouts), heads, seqlen_q, dim, magnitude)
    k = tensor(draw(layouts), kv_heads, seqlen_k, dim, magnitude)
    v = tensor(draw(layouts), kv_heads, seqlen_k, value_dim, 1.0)
    options: dict[str, Any] = {"diagonal": pick("bottom_right", "top_left")}
    if draw(st.booleans()):
        options["causal"] = True
    if pick(False, False, True):
        options["scale"] = pick(1.0, -0.5, 0.0)
    if pick(False, False, True):
        edges = st.sampled_from((None, 0, 1, 7, 40))
        options["window_size"] = (draw(edges), draw(edges))
    if not plain and pick(False, False, True):
        options["softcap"] = pick(0.5, 30.0)
    if not plain and pick(False, False, True):
        shape = pick((heads,), (batch, heads))
        options["alibi_slopes"] = torch.rand(shape, generator=generator)
    if not plain and pick(False, False, True):
        options["sinks"] = torch.randn(heads, generator=generator).to(dtype)
    if not plain and pick(False, False, True):
        options["dropout_p"] = pick(0.1, 0.5, 1.0)
        options["dropout_seed"] = draw(st.integers(-(2**63), 2**63 - 1))
    mask = pick(None, None, "bool", "float", "padding")
    if mask is not None:
        shape = tuple(pick(1, size) for size in (batch, heads, seqlen_q, seqlen_k))[pick(0, 0, 2) :]
        if mask == "float":
            values = torch.randn(shape, generator=generator, dtype=torch.float64)
            values[torch.rand(shape, generator=generator) < 0.2] = -torch.inf
            options["attn_mask"] = values.to(dtype)
        elif mask == "bool":
            options["attn_mask"] = torch.rand(shape, generator=generator) < pick(0.2, 0.8)
        else:
            kept = torch.tensor([pick(0, 1, seqlen_k) for _ in range(batch)]).view(-1, 1, 1, 1)
            options["attn_mask"] = torch.arange(seqlen_k).view(1, 1, 1, -1) < kept
    return Drawn(q, k, v, options)


@st.composite
def packed_problems(draw, *, dtypes: tuple[torch.dtype, ...]) -> Drawn:
    """Packed sequences, some of them empty, with tokens past the last; any options but a mask."""
    dense = draw(problems(dtypes=dtypes, lengths=(1,)))
    q, k, v, options = dense
    options.pop("attn_mask", None)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    sequences = draw(st.integers(0, 4))
    edges = {}
    for side in "qk":
        lengths = draw(
            st.lists(st.sampled_from((0, 1, 5, 17, 66)), min_size=sequences, max_size=sequences)
        )
        edges[f"cu_seqlens_{side}"] = torch.tensor([0, *lengths]).cumsum(0)
    tail = draw(st.sampled_from((0, 0, 3)))
    tokens = [int(edges[f"cu_seqlens_{side}"][-1]) + tail for side in "qkk"]
    packed = (
        torch.randn(count, x.shape[1], x.shape[3], generator=generator, dtype=torch.float64)
        for count, x in zip(tokens, (q, k, v), strict=True)
    )
    if options.get("alibi_slopes") is not None and options["alibi_slopes"].ndim == 2:
        options["alibi_slopes"] = torch.rand(sequences, q.shape[1], generator=generator)
    return Drawn(*(x.to(q.dtype) for x in packed), options | edges)
