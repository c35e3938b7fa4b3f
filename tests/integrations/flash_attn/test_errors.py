"""Wrong calls raise flash_attn's kind of error and this library's, and name the argument."""

from typing import Any

import pytest
import torch
from torch import Tensor

from flashlayer.integrations import flash_attn as door
from tests.integrations.flash_attn.reference import HKV, SK, SQ, B, D, H, edges, qkv


def kv_call(**options: Any) -> Any:
    """A call of flash_attn_with_kvcache that is right but for ``options``."""
    q, k, v = qkv()
    call = {"q": q, "k_cache": k, "v_cache": v} | options
    return lambda: door.flash_attn_with_kvcache(**call)


def paged_call(table: list[list[int]] | Tensor, lengths: list[int], new: int = 0) -> Any:
    """By a block table over 5 pages of 4 positions."""
    table = table if isinstance(table, Tensor) else torch.tensor(table, dtype=torch.int32)
    added = dict.fromkeys("kv", torch.zeros(B, new, HKV, D).double()) if new else {}
    return kv_call(
        k_cache=torch.zeros(5, 4, HKV, D).double(),
        v_cache=torch.zeros(5, 4, HKV, D).double(),
        cache_seqlens=torch.tensor(lengths, dtype=torch.int32),
        block_table=table,
        **added,
    )


def paged_varlen_call(table: list[list[int]], lengths: list[int]) -> Any:
    pages = torch.zeros(5, 4, HKV, D).double()
    q = torch.zeros(2, H, D).double()
    table = torch.tensor(table, dtype=torch.int32)
    return lambda: door.flash_attn_varlen_func(
        q, pages, pages, edges([1, 1]), edges(lengths), 1, max(lengths), block_table=table
    )


def dense_call(q: Any = (B, SQ, H, D), k: Any = (B, SK, HKV, D), v: Any = None, **options: Any):
    tensors = [
        torch.zeros(x).double() if isinstance(x, tuple) else x
        for x in (q, k, k if v is None else v)
    ]
    return lambda: door.flash_attn_func(*tensors, **options)


ONE_TABLE = [[0, 1], [2, 3]]

HALF, DOUBLES = torch.zeros(B, SQ, H, D).half(), torch.zeros(B, 1, HKV, D).double()

WRONG_CALLS: dict[str, Any] = {
    "table_too_small": (
        paged_call(ONE_TABLE, [8, 9]),
        r"block_table holds 2 pages of 4 = 8 positions a sequence, cache_seqlens and k need 9$",
    ),
    "table_too_small_for_new": (
        paged_call(ONE_TABLE, [8, 7], new=1),
        r"block_table holds 2 pages of 4 = 8 positions .* need 9$",
    ),
    "table_too_small_varlen": (
        paged_varlen_call(ONE_TABLE, [3, 9]),
        r"block_table holds 2 pages of 4 = 8 positions a sequence, cu_seqlens_k need 9$",
    ),
    "table_negative": (paged_call([[0, -1], [2, 3]], [5, 5]), "block_table must name .*, got -1$"),
    "table_outside": (paged_call([[0, 1], [2, 5]], [5, 5]), "pages 0 to 4 of .*, got 5$"),
    "table_outside_varlen": (paged_varlen_call([[7, 1], [2, 5]], [1, 1]), "0 to 4 of .*, got 7$"),
    "table_rows": (paged_call([[0, 1]], [5, 5]), r"block_table must be \(sequences=2, .*\(1, 2\)"),
    "table_float": (paged_call(torch.zeros(2, 2), [5, 5]), "block_table must be an int32 or int64"),
    "seqlens_negative": (kv_call(cache_seqlens=-1), "cache_seqlens must be at least 0, got -1$"),
    "seqlens_too_long": (
        kv_call(cache_seqlens=torch.tensor([3, 10])),
        "k_cache holds 9 positions, cache_seqlens and k need 10$",
    ),
    "leftpad": (
        kv_call(cache_seqlens=torch.tensor([3, 6]), cache_leftpad=torch.tensor([3, 7])),
        "cache_leftpad must be from 0 to the 6 positions of row 1, got 7$",
    ),
    "leftpad_shape": (kv_call(cache_leftpad=torch.tensor(1)), r"of shape \(2,\), got \(\)"),
    "batch_idx": (
        kv_call(cache_batch_idx=torch.tensor([0, -1])),
        "cache_batch_idx must name rows 0 to 1 of the cache, got -1$",
    ),
    "new_heads": (
        kv_call(k=DOUBLES[:, :, :1], v=DOUBLES, cache_seqlens=3),
        r"k must be \(2, 1, 2, 16\) to fit the cache, got \(2, 1, 1, 16\)",
    ),
    "new_length": (
        kv_call(k=DOUBLES.repeat(1, 2, 1, 1), v=DOUBLES, cache_seqlens=3),
        r"v must be \(2, 2, 2, 16\) to fit the cache, got \(2, 1, 2, 16\)",
    ),
    "new_dtype": (
        kv_call(k=DOUBLES.float(), v=DOUBLES.float(), cache_seqlens=3),
        "k must be torch.float64 as k_cache, got torch.float32",
    ),
    "rotary_short": (
        kv_call(
            k=DOUBLES,
            v=DOUBLES,
            cache_seqlens=3,
            rotary_cos=torch.ones(3, 8),
            rotary_sin=torch.ones(3, 8),
        ),
        "rotary_cos holds 3 positions, cache_seqlens and the new tokens need 4$",
    ),
    "rotary_wide": (
        kv_call(
            k=DOUBLES,
            v=DOUBLES,
            cache_seqlens=3,
            rotary_cos=torch.ones(9, 9),
            rotary_sin=torch.ones(9, 9),
        ),
        "rotary_cos must rotate at most head_dim=16 features, got 18",
    ),
    "v_cache": (kv_call(v_cache=torch.zeros(B, 8, HKV, D)), "v_cache must be k_cache's shape"),
    "cache_heads": (
        kv_call(q=torch.zeros(B, SQ, 3, D).double()),
        "q's heads must be a positive multiple of k_cache's, got 3 and 2",
    ),
    "cache_dim": (kv_call(q=torch.zeros(B, SQ, H, 8).double()), "k_cache must have q's head_dim 8"),
    "q_ndim": (dense_call(q=(SQ, H, D)), r"q must be \(batch, sequence, heads, head_dim\), got"),
    "q_type": (dense_call(q=[1.0]), "q must be a torch.Tensor, got list"),
    "k_dim": (
        dense_call(k=(B, SK, HKV, 8)),
        r"with q's batch and head_dim, got q \(2, 5, 4, 16\) and k \(2, 9, 2, 8\)",
    ),
    "v_heads": (
        dense_call(v=(B, SK, 1, D)),
        r"v must be k's shape .* k \(2, 9, 2, 16\) and v \(2, 9, 1, 16\)",
    ),
    "heads": (dense_call(k=(B, SK, 3, D)), "q's heads must be a positive multiple .* 4 and 3"),
    "dtypes": (dense_call(q=HALF), "must have one dtype"),
    "dropout": (dense_call(dropout_p=1.5), "dropout_p must be a probability from 0 to 1, got 1.5"),
    "window": (dense_call(window_size=(1, 2, 3)), r"window_size must be \(left, right\), got 3"),
    "slopes": (dense_call(alibi_slopes=torch.ones(3)), "alibi_slopes must be"),
    "scale": (dense_call(softmax_scale="a"), "scale must be a float or None, got str"),
    "kv": (
        lambda: door.flash_attn_kvpacked_func(HALF, HALF.unsqueeze(2)),
        r"kv must be \(batch, sequence, 2, heads, head_dim\), got \(2, 5, 1, 4, 16\)",
    ),
    "qkv": (
        lambda: door.flash_attn_qkvpacked_func(HALF),
        r"qkv must be \(batch, sequence, 3, heads, head_dim\), got \(2, 5, 4, 16\)",
    ),
    "kv_varlen": (
        lambda: door.flash_attn_varlen_kvpacked_func(HALF[0], HALF, edges([5]), edges([2]), 5, 2),
        r"kv must be \(tokens, 2, heads, head_dim\), got \(2, 5, 4, 16\)",
    ),
    "qkv_varlen": (
        lambda: door.flash_attn_varlen_qkvpacked_func(HALF, edges([2]), 2),
        r"qkv must be \(tokens, 3, heads, head_dim\), got \(2, 5, 4, 16\)",
    ),
    "edges_end": (
        lambda: door.flash_attn_varlen_func(
            HALF[0], HALF[0], HALF[0], edges([6]), edges([5]), 6, 5
        ),
        "cu_seqlens_q must start at 0, not fall, and end at 5 tokens or before, got",
    ),
    "many_edges_end": (
        lambda: door.flash_attn_varlen_func(
            HALF[0], HALF[0], HALF[0], edges([1] * 30), edges([1] * 30), 1, 1
        ),
        "cu_seqlens_q must start at 0, not fall, and end at 5 tokens or before, got",
    ),
    "edges_dtype": (
        lambda: door.flash_attn_varlen_func(
            HALF[0], HALF[0], HALF[0], edges([5]).float(), edges([5]), 5, 5
        ),
        "cu_seqlens_q must be an int32 or int64 tensor, got torch.float32",
    ),
    "longest": (
        lambda: door.flash_attn_varlen_func(
            HALF[0], HALF[0], HALF[0], edges([5]), edges([5]), 3, 5
        ),
        "max_seqlen_q must be at least the longest sequence's 5, got 3",
    ),
}


@pytest.mark.parametrize(("call", "message"), WRONG_CALLS.values(), ids=WRONG_CALLS)
def test_a_wrong_call_raises_flash_attns_kind_of_error_and_prints_numbers(
    call: Any, message: str
) -> None:
    """flash_attn's checks raise RuntimeError; this library's ValueError or TypeError."""
    with pytest.raises(RuntimeError, match=message) as caught:
        call()
    assert isinstance(caught.value, (ValueError, TypeError))
    assert "tensor(" not in str(caught.value)
