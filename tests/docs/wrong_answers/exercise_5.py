"""Wrong in ways that look right. `f__why` takes the place of `f`."""

import math

import torch

LOG2E = math.log2(math.e)


def flash_bytes__keys_read_once(seqlen_q, seqlen_k, head_dim, query_heads, kv_heads, block_m):
    return query_heads * (2 * 2 * head_dim * (seqlen_q + seqlen_k) + 4 * seqlen_q)


def flash_bytes__blocks_rounded_down(seqlen_q, seqlen_k, head_dim, query_heads, kv_heads, block_m):
    blocks = max(seqlen_q // block_m, 1)
    return query_heads * (2 * 2 * head_dim * (seqlen_q + seqlen_k * blocks) + 4 * seqlen_q)


def flash_bytes__kv_heads_shared(seqlen_q, seqlen_k, head_dim, query_heads, kv_heads, block_m):
    blocks = math.ceil(seqlen_q / block_m)
    own = query_heads * (2 * 2 * head_dim * seqlen_q + 4 * seqlen_q)
    return own + kv_heads * 2 * 2 * head_dim * seqlen_k * blocks


def flash_bytes__lse_forgotten(seqlen_q, seqlen_k, head_dim, query_heads, kv_heads, block_m):
    blocks = math.ceil(seqlen_q / block_m)
    return query_heads * 2 * 2 * head_dim * (seqlen_q + seqlen_k * blocks)


def key_tiles__all_of_them(q_start, q_stop, seqlen, block_n):
    starts = range(0, seqlen, block_n)
    return [(s, min(s + block_n, seqlen), s + block_n > q_start + 1) for s in starts]


def key_tiles__first_query_decides(q_start, q_stop, seqlen, block_n):
    starts = range(0, q_start + 1, block_n)
    return [(s, min(s + block_n, q_start + 1), False) for s in starts]


def key_tiles__past_the_end(q_start, q_stop, seqlen, block_n):
    starts = range(0, q_stop, block_n)
    return [(s, min(s + block_n, q_stop), min(s + block_n, q_stop) > q_start + 1) for s in starts]


def key_tiles__masks_too_much(q_start, q_stop, seqlen, block_n):
    stop = min(q_stop, seqlen)
    starts = range(0, stop, block_n)
    return [(s, min(s + block_n, stop), min(s + block_n, stop) > q_start) for s in starts]


def key_tiles__masks_the_last_tile_only(q_start, q_stop, seqlen, block_n):
    stop = min(q_stop, seqlen)
    starts = range(0, stop, block_n)
    return [(s, min(s + block_n, stop), s + block_n >= stop > q_start + 1) for s in starts]


def update__acc_not_rescaled(m_i, l_i, acc, x, v, scale):
    m_new = torch.maximum(m_i, x.amax(dim=-1) * scale)
    shift = torch.where(m_new == -torch.inf, 0, m_new)
    rescale = torch.exp2((m_i - shift) * LOG2E)
    p = torch.exp2((x * scale - shift[:, None]) * LOG2E)
    return m_new, l_i * rescale + p.sum(dim=-1), acc + p @ v


def update__not_in_base_2(m_i, l_i, acc, x, v, scale):
    m_new = torch.maximum(m_i, x.amax(dim=-1) * scale)
    shift = torch.where(m_new == -torch.inf, 0, m_new)
    rescale = torch.exp2(m_i - shift)
    p = torch.exp2(x * scale - shift[:, None])
    return m_new, l_i * rescale + p.sum(dim=-1), acc * rescale[:, None] + p @ v


def update__maximum_not_scaled(m_i, l_i, acc, x, v, scale):
    m_new = torch.maximum(m_i, x.amax(dim=-1))
    shift = torch.where(m_new == -torch.inf, 0, m_new)
    rescale = torch.exp2((m_i - shift) * LOG2E)
    p = torch.exp2((x * scale - shift[:, None]) * LOG2E)
    return m_new, l_i * rescale + p.sum(dim=-1), acc * rescale[:, None] + p @ v


def update__nothing_yet_is_nan(m_i, l_i, acc, x, v, scale):
    m_new = torch.maximum(m_i, x.amax(dim=-1) * scale)
    rescale = torch.nan_to_num(torch.exp2((m_i - m_new) * LOG2E))
    p = torch.exp2((x * scale - m_new[:, None]) * LOG2E)
    return m_new, l_i * rescale + p.sum(dim=-1), acc * rescale[:, None] + p @ v


def update__divided_in_the_loop(m_i, l_i, acc, x, v, scale):
    m_new = torch.maximum(m_i, x.amax(dim=-1) * scale)
    shift = torch.where(m_new == -torch.inf, 0, m_new)
    rescale = torch.exp2((m_i - shift) * LOG2E)
    p = torch.exp2((x * scale - shift[:, None]) * LOG2E)
    total = l_i * rescale + p.sum(dim=-1)
    safe = torch.where(total == 0, 1, total)[:, None]
    return m_new, total, (acc * rescale[:, None] + p @ v) / safe


def flash_forward__the_whole_matrix(q, k, v, scale, block_m, block_n):
    hidden = torch.ones(len(q), len(k)).triu(1).bool()
    scores = (scale * q @ k.mT).masked_fill(hidden, -math.inf)
    return torch.softmax(scores, -1) @ v, torch.logsumexp(scores, -1)


def flash_forward__whole_rows(q, k, v, scale, block_m, block_n):
    out, lse = torch.empty_like(v), q.new_empty(len(q))
    for rows in torch.arange(len(q)).split(block_m):
        scores = scale * q[rows] @ k.mT
        scores = torch.where(torch.arange(len(k)) <= rows[:, None], scores, -torch.inf)
        out[rows], lse[rows] = torch.softmax(scores, -1) @ v, torch.logsumexp(scores, -1)
    return out, lse


def flash_forward__not_causal(q, k, v, scale, block_m, block_n):
    out, lse = torch.empty_like(v), q.new_empty(len(q))
    for rows in torch.arange(len(q)).split(1):
        scores = scale * q[rows] @ k.mT
        out[rows], lse[rows] = torch.softmax(scores, -1) @ v, torch.logsumexp(scores, -1)
    return out, lse


def flash_forward__lse_in_base_2(q, k, v, scale, block_m, block_n):
    out, lse = torch.empty_like(v), q.new_empty(len(q))
    for i in range(len(q)):
        scores = scale * q[i] @ k[: i + 1].mT
        out[i], lse[i] = torch.softmax(scores, -1) @ v[: i + 1], torch.logsumexp(scores, -1) * LOG2E
    return out, lse
