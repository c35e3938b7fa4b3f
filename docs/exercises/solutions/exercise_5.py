"""Solutions of exercise_5.py."""

import math

import torch
from torch import Tensor

LOG2E = math.log2(math.e)


def flash_bytes(
    seqlen_q: int, seqlen_k: int, head_dim: int, query_heads: int, kv_heads: int, block_m: int
) -> int:
    """Every program of every *query* head reads all its keys, whoever else reads them."""
    blocks = math.ceil(seqlen_q / block_m)
    q_and_o = 2 * seqlen_q * head_dim
    k_and_v = 2 * seqlen_k * head_dim * blocks
    return query_heads * (2 * (q_and_o + k_and_v) + 4 * seqlen_q)


def key_tiles(q_start: int, q_stop: int, seqlen: int, block_n: int) -> list[tuple[int, int, bool]]:
    """The last query sees most keys, the first one says which tiles need no mask."""
    any_stop = min(q_stop, seqlen)  # some query sees the keys before it
    all_stop = q_start + 1  # every query sees the keys before it
    tiles = []
    for k_start in range(0, any_stop, block_n):
        k_stop = min(k_start + block_n, any_stop)
        tiles.append((k_start, k_stop, k_stop > all_stop))
    return tiles


def update(
    m_i: Tensor, l_i: Tensor, acc: Tensor, x: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Line for line the kernel's."""
    m_new = torch.maximum(m_i, x.amax(dim=-1) * scale)
    shift = torch.where(m_new == -torch.inf, 0, m_new)
    rescale = torch.exp2((m_i - shift) * LOG2E)
    p = torch.exp2((x * scale - shift[:, None]) * LOG2E)
    return m_new, l_i * rescale + p.sum(dim=-1), acc * rescale[:, None] + p @ v


def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, block_m: int, block_n: int
) -> tuple[Tensor, Tensor]:
    """Blocks of queries outside, tiles of keys inside."""
    length = len(q)
    out, lse = torch.empty_like(v), q.new_empty(length)
    for q_start in range(0, length, block_m):
        rows = slice(q_start, min(q_start + block_m, length))
        count = rows.stop - q_start
        m_i, l_i = q.new_full((count,), -torch.inf), q.new_zeros(count)
        acc = q.new_zeros(count, v.shape[-1])
        for k_start, k_stop, masked in key_tiles(q_start, rows.stop, length, block_n):
            x = q[rows] @ k[k_start:k_stop].mT
            if masked:
                i = torch.arange(q_start, rows.stop)[:, None]
                j = torch.arange(k_start, k_stop)[None, :]
                x = torch.where(j <= i, x, -torch.inf)
            m_i, l_i, acc = update(m_i, l_i, acc, x, v[k_start:k_stop], scale)
        out[rows] = acc / l_i[:, None]
        lse[rows] = m_i + torch.log(l_i)
    return out, lse
