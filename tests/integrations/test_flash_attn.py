"""The flash_attn interface against its documentation, written out in fp64."""

import inspect
import itertools
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import flashlayer
from flashlayer.integrations import flash_attn as door
from flashlayer.integrations.flash_attn import bert_padding
from flashlayer.integrations.flash_attn.layers.rotary import apply_rotary_emb
from tests.tolerance import assert_accurate, exponential_error

B, SQ, SK, H, HKV, D = 2, 5, 9, 4, 2, 16


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    key_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    kept: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, Sq, H, D), lse and probabilities; ``lengths`` are where each row's keys end."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    seqlen_q, seqlen_k = scores.shape[-2:]
    ends = torch.full((len(q),), seqlen_k) if lengths is None else lengths
    i = torch.arange(seqlen_q)[:, None] + (ends - seqlen_q).view(-1, 1, 1, 1)
    j = torch.arange(seqlen_k)
    if alibi_slopes is not None:
        slopes = alibi_slopes.double().reshape(-1, q.shape[2], 1, 1)
        scores = scores - slopes * (i - j).abs()
    hidden = j >= ends.view(-1, 1, 1, 1)
    left, right = window_size
    if causal:
        right = 0
    if left >= 0:
        hidden = hidden | (j < i - left)
    if right >= 0:
        hidden = hidden | (j > i + right)
    if key_mask is not None:
        hidden = hidden | ~key_mask[:, None, None]
    scores = scores.masked_fill(hidden, -torch.inf)
    lse = scores.logsumexp(-1)
    p = torch.exp(scores - lse.nan_to_num(neginf=0.0)[..., None])
    weights = p if kept is None else p * kept / (1 - dropout_p)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v), lse, p


def qkv(dtype: torch.dtype = torch.float64, heads: int = HKV, seqlen_k: int = SK) -> list[Tensor]:
    shapes = ((B, SQ, H, D), (B, seqlen_k, heads, D), (B, seqlen_k, heads, D))
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


OPTIONS = {
    "plain": {},
    "scale": {"softmax_scale": 0.5},
    "causal": {"causal": True},
    "window": {"window_size": (3, 1)},
    "left_window": {"window_size": (2, -1)},
    "causal_window": {"causal": True, "window_size": (2, 5)},
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi_slopes": torch.rand(H), "causal": True},
    "alibi_batch": {"alibi_slopes": torch.rand(B, H), "deterministic": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_dense(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    leaves = [x.requires_grad_() for x in qkv()]
    formula = {name: value for name, value in options.items() if name != "deterministic"}
    expected = reference(*leaves, **formula)[:2]
    out, lse, probabilities = door.flash_attn_func(*leaves, **options, return_attn_probs=True)
    assert out.is_contiguous()
    assert probabilities.shape == (0,)
    close((out, lse), expected)
    cotangents = [torch.randn_like(x) for x in expected]
    grads = [torch.autograd.grad(x, leaves, cotangents) for x in ((out, lse), expected)]
    close(*grads)
    close(door.flash_attn_func(*leaves, **options), out)
    q, k, v = (x.detach().requires_grad_() for x in leaves)
    close(door.flash_attn_kvpacked_func(q, torch.stack((k, v), 2), **options), out)
    if options.get("alibi_slopes") is None:
        qkv_packed = torch.randn(B, SQ, 3, H, D, dtype=torch.float64, requires_grad=True)
        packed = door.flash_attn_qkvpacked_func(qkv_packed, **options)
        whole = reference(*qkv_packed.unbind(2), **formula)[0]
        close(packed, whole)
        close(*(torch.autograd.grad(x.square().sum(), qkv_packed)[0] for x in (packed, whole)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_accuracy_in_lower_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    tensors = qkv(dtype)
    for options in ({"causal": True}, {"window_size": (3, 0)}):
        actual = door.flash_attn_func(*tensors, **options)
        layout = [x.transpose(1, 2) for x in tensors]
        window = {"causal": True} if "causal" in options else {"window_size": (3, 0)}
        same = flashlayer.flash_attention(*layout, **window, backend="standard").transpose(1, 2)
        exact = reference(*(x.double() for x in tensors), **options)[0]
        # The door takes ATen's kernel here.
        assert flashlayer.available_backends(*layout, **window)["aten"] is None
        wide = [x.double() for x in layout]
        cotangents = torch.zeros_like(wide[0]), torch.zeros_like(wide[0][..., 0])
        exponential = exponential_error(*wide, *cotangents, dtype=dtype, **window)
        assert_accurate("out", actual, same, exact, 2, exponential["out"])


def test_a_window_may_be_a_tensor_of_two() -> None:
    """flash_attn takes its integers out of it."""
    q, k, v = qkv()
    pair = torch.tensor([3, 1])
    expected = door.flash_attn_func(q, k, v, window_size=(3, 1))
    assert torch.equal(door.flash_attn_func(q, k, v, window_size=pair), expected)
    assert torch.equal(door.flash_attn_func(q, k, v, window_size=tuple(pair)), expected)


def test_rows_that_see_nothing() -> None:
    q, k, v = qkv(seqlen_k=2)  # 5 causal queries, 2 keys: the first three see none
    out, lse, _ = door.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert (out[:, :3] == 0).all()
    assert (lse[..., :3] == -torch.inf).all()
    close(out, reference(q, k, v, causal=True)[0])


def pack(x: Tensor, lengths: list[int]) -> Tensor:
    return torch.cat([row[:length] for row, length in zip(x, lengths, strict=True)])


def edges(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_varlen(options: dict[str, Any]) -> None:
    torch.manual_seed(2)
    leaves = [x.requires_grad_() for x in qkv()]
    q_lengths, k_lengths = [5, 3], [7, 9]
    q, k, v = (
        pack(x, lengths)
        for x, lengths in zip(leaves, (q_lengths, k_lengths, k_lengths), strict=True)
    )
    sizes = (edges(q_lengths), edges(k_lengths), SQ, torch.tensor(SK))
    out, lse, _ = door.flash_attn_varlen_func(q, k, v, *sizes, **options, return_attn_probs=True)
    options = {name: value for name, value in options.items() if name != "deterministic"}
    slopes = options.get("alibi_slopes")
    expected, expected_lse = [], []
    for n, (length_q, length_k) in enumerate(zip(q_lengths, k_lengths, strict=True)):
        row = options | (
            {"alibi_slopes": slopes[n]} if slopes is not None and slopes.ndim == 2 else {}
        )
        one = (leaves[0][n, None, :length_q], *(x[n, None, :length_k] for x in leaves[1:]))
        row_out, row_lse, _ = reference(*one, **row)
        expected.append(row_out[0])
        expected_lse.append(row_lse[0])
    close(out, torch.cat(expected))
    close(lse, torch.cat(expected_lse, dim=1))
    close(
        torch.autograd.grad(out.square().sum(), leaves),
        torch.autograd.grad(torch.cat(expected).square().sum(), leaves),
    )
    kv = torch.stack((k, v), dim=1)
    close(door.flash_attn_varlen_kvpacked_func(q, kv, *sizes, **options), out)


def test_varlen_qkvpacked() -> None:
    x, lengths = torch.randn(8, 3, H, D, dtype=torch.float64), [3, 5]
    out = door.flash_attn_varlen_qkvpacked_func(x, edges(lengths), 5, causal=True)
    whole = [reference(*part[None].unbind(2), causal=True)[0][0] for part in x.split(lengths)]
    close(out, torch.cat(whole))


def test_paged_varlen() -> None:
    torch.manual_seed(3)
    page, lengths = 4, [7, 9]
    q, k, v = qkv()
    pages, table = paged(torch.stack((k, v)), page)
    actual = door.flash_attn_varlen_func(
        pack(q, [5, 5]), *pages, edges([5, 5]), edges(lengths), 5, 9, causal=True, block_table=table
    )
    expected = reference(q, k, v, causal=True, lengths=torch.tensor(lengths))[0]
    close(actual, expected.flatten(0, 1))


def test_a_block_table_may_hold_anything_past_the_last_page() -> None:
    """Servers allocate it as wide as their longest sequence, and fill in what they use."""
    q, k, v = qkv()
    pages, table = paged(torch.stack((k, v)), page=4)  # 3 pages a row
    lengths = torch.tensor([7, 3], dtype=torch.int32)
    table[0, 2], table[1, 1:] = -7, 2**30
    expected = reference(q, k, v, causal=True, lengths=lengths)[0]
    out = door.flash_attn_with_kvcache(
        q, *pages, cache_seqlens=lengths, block_table=table, causal=True
    )
    close(out, expected)
    options = {"causal": True, "block_table": table}
    sizes = (edges([SQ, SQ]), edges([7, 3]), SQ, 7)
    close(
        door.flash_attn_varlen_func(q.flatten(0, 1), *pages, *sizes, **options), out.flatten(0, 1)
    )


def paged(caches: Tensor, page: int) -> tuple[Tensor, Tensor]:
    """Caches (2, B, S, H, D) cut into shuffled pages, unused ones NaN, and the block table."""
    per_row = -(-caches.shape[2] // page)
    padded = torch.nn.functional.pad(
        caches, (0, 0, 0, 0, 0, per_row * page - caches.shape[2]), value=torch.nan
    )
    table = torch.randperm(B * per_row + 2)[: B * per_row].view(B, per_row).int()
    pages = torch.full((2, B * per_row + 2, page, HKV, D), torch.nan, dtype=caches.dtype)
    pages[:, table] = padded.unflatten(2, (per_row, page))
    return pages, table


@pytest.mark.parametrize("packed", [False, True])
def test_dropout_and_its_mask(packed: bool) -> None:
    """S_dmask: the probabilities, negative where the output was made without them."""
    torch.manual_seed(4)
    q, k, v = qkv()
    call = {"dropout_p": 0.4, "causal": True}
    if packed:
        lengths = [4, 5], [7, 9]
        masks = [
            torch.arange(n) < torch.tensor(side)[:, None]
            for n, side in ((SQ, lengths[0]), (SK, lengths[1]))
        ]
        sizes = (*(edges(side) for side in lengths), SQ, SK)
        out, _, s_dmask = door.flash_attn_varlen_func(
            q[masks[0]], k[masks[1]], v[masks[1]], *sizes, **call, return_attn_probs=True
        )
        parts = []
        for n, (length_q, length_k) in enumerate(zip(*lengths, strict=True)):
            one = (q[n, None, :length_q], k[n, None, :length_k], v[n, None, :length_k])
            shown = s_dmask[n, None, :, :length_q, :length_k]
            expected, _, p = reference(*one, kept=shown >= 0, **call)
            close(shown.abs(), p)
            parts.append(expected[0])
        close(out, torch.cat(parts))
        return
    out, _, s_dmask = door.flash_attn_func(q, k, v, **call, return_attn_probs=True)
    expected, _, p = reference(q, k, v, kept=s_dmask >= 0, **call)
    close(s_dmask.abs(), p)
    close(out, expected)
    assert 0.2 < (s_dmask < 0)[p > 0].double().mean() < 0.6


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ["int", "tensor", "indexed", "leftpad", "paged"])
def test_kvcache_appends_rotates_and_attends(kind: str, causal: bool, interleaved: bool) -> None:
    torch.manual_seed(5)
    capacity, page = 16, 4
    q, k, v = qkv(seqlen_k=SQ)
    lengths = torch.tensor([4, 9], dtype=torch.int32)
    if kind == "int":
        lengths = torch.tensor([6, 6], dtype=torch.int32)
    rows = torch.tensor([2, 0], dtype=torch.int32) if kind == "indexed" else torch.arange(B)
    caches = torch.randn(2, 3 if kind == "indexed" else B, capacity, HKV, D, dtype=torch.float64)
    for n, length in zip(rows, lengths, strict=True):
        caches[:, n, length:] = torch.nan  # not filled yet
    angles = torch.randn(capacity, 4, dtype=torch.float64)  # rotates 8 of 16 features
    cos, sin = angles.cos(), angles.sin()
    leftpad = torch.tensor([2, 0], dtype=torch.int32) if kind == "leftpad" else None

    expected_caches = caches.clone()
    q_rotated, k_rotated = torch.empty_like(q), torch.empty_like(k)
    for n, t in itertools.product(range(B), range(SQ)):
        position = int(lengths[n]) + t
        k_rotated[n, t] = rotate(k[n, t], angles[position], interleaved)
        at = position if causal else int(lengths[n])
        q_rotated[n, t] = rotate(q[n, t], angles[at], interleaved)
        expected_caches[:, rows[n], position] = torch.stack((k_rotated[n, t], v[n, t]))
    key_mask = None if leftpad is None else torch.arange(capacity) >= leftpad[:, None]
    expected, expected_lse, _ = reference(
        q_rotated,
        *expected_caches[:, rows].nan_to_num(),
        causal=causal,
        lengths=lengths + SQ,
        key_mask=key_mask,
    )

    call: dict[str, Any] = {"cache_seqlens": 6 if kind == "int" else lengths, "causal": causal}
    storage = caches
    if kind == "paged":
        storage, call["block_table"] = paged(caches, page)
    if kind == "indexed":
        call["cache_batch_idx"] = rows
    if kind == "leftpad":
        call["cache_leftpad"] = leftpad
    out, lse = door.flash_attn_with_kvcache(
        q,
        *storage,
        k,
        v,
        rotary_cos=cos,
        rotary_sin=sin,
        rotary_interleaved=interleaved,
        return_softmax_lse=True,
        **call,
    )
    close((out, lse), (expected, expected_lse))
    if kind == "paged":
        storage = storage[:, call["block_table"]].flatten(2, 3)
    torch.testing.assert_close(storage, expected_caches, equal_nan=True, rtol=1e-10, atol=1e-10)


def rotate(x: Tensor, angle: Tensor, interleaved: bool) -> Tensor:
    """Pairs as complex numbers, turned by the angle."""
    turned, half = x.clone(), len(angle)
    real = slice(0, 2 * half, 2) if interleaved else slice(0, half)
    imaginary = slice(1, 2 * half, 2) if interleaved else slice(half, 2 * half)
    pair = torch.complex(x[:, real], x[:, imaginary]) * torch.exp(1j * angle)
    turned[:, real], turned[:, imaginary] = pair.real, pair.imag
    return turned


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_kvcache_reads(options: dict[str, Any]) -> None:
    """Without new keys, every option; without cache_seqlens, all of the cache."""
    options = {name: value for name, value in options.items() if name != "deterministic"}
    q, k, v = qkv()
    close(door.flash_attn_with_kvcache(q, k, v, **options), reference(q, k, v, **options)[0])
    lengths = torch.tensor([6, 9], dtype=torch.int32)
    actual = door.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, num_splits=3, **options)
    close(actual, reference(q, k, v, lengths=lengths, **options)[0])
    longer = torch.randn(2, B, 2 * SK, HKV, D, dtype=torch.float64)
    longer[:, :, :SK] = torch.stack((k, v))
    close(
        door.flash_attn_with_kvcache(q, *longer[:, :, :SK], **options),
        reference(q, k, v, **options)[0],
    )


def test_generation_step_by_step_is_the_whole_sequence() -> None:
    x = torch.randn(3, B, 10, H, D, dtype=torch.float64)
    caches, steps, filled = torch.empty(2, B, 12, H, D, dtype=torch.float64).fill_(torch.nan), [], 0
    for stop in (4, 5, 6, 10):
        q, k, v = x[:, :, filled:stop]
        steps.append(
            door.flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=filled, causal=True)
        )
        filled = stop
    close(torch.cat(steps, dim=1), door.flash_attn_func(*x, causal=True))


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("second", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_a_cache_of_one_mode_is_written_in_another(first: Any, second: Any) -> None:
    x = torch.randn(3, B, 10, H, D, dtype=torch.float64)
    with first():
        caches = torch.full((2, B, 12, H, D), torch.nan, dtype=torch.float64)
    steps = []
    for mode, filled, stop in ((first, 0, 4), (second, 4, 7), (first, 7, 10)):
        q, k, v = x[:, :, filled:stop]
        with mode():
            steps.append(
                door.flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=filled, causal=True)
            )
    close(torch.cat(steps, dim=1), door.flash_attn_func(*x, causal=True))


BAD_CACHE_CALLS = {
    "k_alone": ({"k": 1}, "k and v must be given together"),
    "no_seqlens": ({"k": 1, "v": 1}, "cache_seqlens must be given"),
    "rotary": ({"rotary_cos": 1, "rotary_sin": 1}, "rotary_cos needs k"),
    "full": (
        {"k": 1, "v": 1, "cache_seqlens": 8},
        "k_cache holds 9 positions, cache_seqlens and k need 10$",
    ),
    "both_tables": ({"block_table": 1, "cache_batch_idx": 1}, "can't be combined"),
}


@pytest.mark.parametrize(("given", "message"), BAD_CACHE_CALLS.values(), ids=BAD_CACHE_CALLS)
def test_kvcache_says_what_is_missing(given: dict[str, int], message: str) -> None:
    q, k, v = qkv()
    values = {"k": k[:, :2], "v": v[:, :2], "cache_seqlens": given.get("cache_seqlens")}
    tables = torch.zeros(B, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        door.flash_attn_with_kvcache(q, k, v, **{name: values.get(name, tables) for name in given})
    with pytest.raises(ValueError, match="batch size 2 without cache_batch_idx, got 1"):
        door.flash_attn_with_kvcache(q, k[:1], v[:1])
    for shape in ((), (1,)):
        with pytest.raises(ValueError, match=r"cache_seqlens must be an int or of shape \(2,\)"):
            door.flash_attn_with_kvcache(
                q, k, v, cache_seqlens=torch.ones(shape, dtype=torch.int32)
            )


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


def test_rotary_of_dense_and_packed() -> None:
    angles = torch.randn(20, D // 2, dtype=torch.float64)
    x = torch.randn(B, 6, H, D, dtype=torch.float64)
    offsets = torch.tensor([3, 8])
    for interleaved in (False, True):
        expected = torch.stack(
            [
                torch.stack(
                    [rotate(x[n, t], angles[offsets[n] + t], interleaved) for t in range(6)]
                )
                for n in range(B)
            ]
        )
        tables = (angles.cos(), angles.sin(), interleaved)
        close(apply_rotary_emb(x, *tables, seqlen_offsets=offsets), expected)
        packed = apply_rotary_emb(
            pack(x, [2, 6]), *tables, seqlen_offsets=offsets, cu_seqlens=edges([2, 6]), max_seqlen=6
        )
        close(packed, pack(expected, [2, 6]))
        written = x.clone()
        assert apply_rotary_emb(written, *tables, inplace=True, seqlen_offsets=offsets) is written
        close(written, expected)


def test_padding_there_and_back() -> None:
    x = torch.randn(3, 5, 2, 4, requires_grad=True, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 0, 1, 1], [0, 0, 0, 0, 0]])
    tokens, indices, cu_seqlens, longest, used = bert_padding.unpad_input(x, mask)
    assert torch.equal(tokens, x[mask.bool()])
    assert cu_seqlens.dtype == torch.int32
    assert (cu_seqlens.tolist(), longest, used.tolist()) == ([0, 3, 6, 6], 3, [3, 3, 0])
    padded = bert_padding.pad_input(tokens, indices, 3, 5)
    assert torch.equal(padded, x * mask[..., None, None])
    assert torch.equal(bert_padding.pad_input(tokens, indices.int(), 3, 5), padded)
    assert torch.equal(bert_padding.index_first_axis(x.flatten(0, 1), indices.int()), tokens)
    (grad,) = torch.autograd.grad(padded.square().sum(), x)
    close(grad, 2 * x.detach() * mask[..., None, None])
    unused = torch.tensor([[0, 0, 0, 1, 0]] * 3)
    _, _, cu_seqlens, longest, used = bert_padding.unpad_input(x, mask.bool(), unused.bool())
    assert (cu_seqlens.tolist(), longest, used.tolist()) == ([0, 4, 7, 8], 4, [3, 3, 0])
    in_length = torch.tensor([[2, 3, 0, 0, 0], [4, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    tokens, _, cu_seqlens, longest = bert_padding.unpad_input_for_concatenated_sequences(
        x, in_length
    )
    assert torch.equal(tokens, torch.cat((x[0], x[1, :4])))
    assert (cu_seqlens.tolist(), longest) == ([0, 2, 5, 9], 4)


SIGNATURES = {
    "flash_attn_func": "q k v",
    "flash_attn_kvpacked_func": "q kv",
    "flash_attn_qkvpacked_func": "qkv",
    "flash_attn_varlen_func": "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k",
    "flash_attn_varlen_kvpacked_func": "q kv cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k",
    "flash_attn_varlen_qkvpacked_func": "qkv cu_seqlens max_seqlen",
}
SHARED = (
    "dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic "
    "return_attn_probs"
)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name: str) -> None:
    """Order and names of flash_attn 2.8.3, flash_attn_interface.py."""
    parameters = inspect.signature(getattr(door, name)).parameters
    expected = f"{SIGNATURES[name]} {SHARED}".split()
    if name == "flash_attn_varlen_func":
        expected.append("block_table")
    assert list(parameters) == expected
    defaults = [p.default for p in parameters.values() if p.default is not p.empty]
    assert defaults[:8] == [0.0, None, False, (-1, -1), 0.0, None, False, False]


def test_kvcache_signature() -> None:
    names = (
        "q k_cache v_cache k v rotary_cos rotary_sin cache_seqlens cache_batch_idx cache_leftpad",
        "block_table softmax_scale causal window_size softcap rotary_interleaved alibi_slopes",
        "num_splits return_softmax_lse",
    )
    parameters = inspect.signature(door.flash_attn_with_kvcache).parameters
    assert list(parameters) == " ".join(names).split()
    assert parameters["rotary_interleaved"].default is True


@pytest.mark.parametrize(
    "how",
    [
        "import sys; sys.modules['flash_attn'] = flashlayer.integrations.flash_attn",
        "flashlayer.integrations.flash_attn.install()",
    ],
)
def test_existing_imports_run(how: str) -> None:
    program = f"""
import importlib.util, torch, flashlayer
{how}
import flash_attn
from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input
from flash_attn.flash_attn_interface import flash_attn_varlen_qkvpacked_func
from flash_attn.layers.rotary import apply_rotary_emb, apply_rotary_emb_func
import flash_attn.flash_attn_interface as interface
assert importlib.util.find_spec("flash_attn") is not None
assert tuple(map(int, flash_attn.__version__.split("."))) >= (2, 8)
q = torch.randn(1, 4, 2, 8, dtype=torch.bfloat16)
for attend in (flash_attn_func, interface.flash_attn_func):
    print(tuple(attend(q, q, q, causal=True).shape))
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines() == ["(1, 4, 2, 8)"] * 2


def test_a_model_written_for_it_runs() -> None:
    """transformers' own flash_attention_2 code: padded, packed and generating, against its SDPA."""
    pytest.importorskip("transformers")
    program = """
import functools, sys, torch, flashlayer
sys.modules["flash_attn"] = flashlayer.integrations.flash_attn
import transformers.modeling_flash_attention_utils as host
from transformers import MistralConfig, MistralForCausalLM
host.is_flash_attn_2_available = lambda **_: True  # it looks for a CUDA device
calls, varlen = [], flashlayer.integrations.flash_attn.flash_attn_varlen_func
@functools.wraps(varlen)  # its parameters are looked at
def counted(*args, **kwargs):
    calls.append(1)
    return varlen(*args, **kwargs)
flashlayer.integrations.flash_attn.flash_attn_varlen_func = counted
config = MistralConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, vocab_size=50,
                       num_attention_heads=4, num_key_value_heads=2, sliding_window=4,
                       initializer_range=0.3)
model = MistralForCausalLM(config).double().eval()
ids, mask = torch.randint(0, 50, (2, 9)), torch.ones(2, 9, dtype=torch.long)
mask[0, :3] = 0
positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5]])
results = []
for name in ("sdpa", "flash_attention_2"):
    model.config._attn_implementation = name
    model.zero_grad()
    out = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    out.loss.backward()
    packed = model(ids[:1], position_ids=positions, use_cache=False).logits.detach()
    written = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    results.append((out.logits.detach()[mask.bool()], packed, written, *grads))
torch.testing.assert_close(*results)
assert len(calls) >= 4, calls
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_compiles_without_a_break() -> None:
    torch._dynamo.reset()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return door.flash_attn_func(q, k, v, causal=True, window_size=(4, -1))

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    tensors = qkv(torch.float32)
    torch.testing.assert_close(compiled(*tensors), attend(*tensors))


def test_a_step_of_generation_compiles_without_a_break() -> None:
    torch._dynamo.reset()
    q, k, v = qkv(torch.float32)
    new = torch.randn(2, B, 2, HKV, D)
    filled = torch.tensor([3, 6], dtype=torch.int32)

    def step(k_cache: Tensor, v_cache: Tensor) -> Tensor:
        return door.flash_attn_with_kvcache(
            q, k_cache, v_cache, *new, cache_seqlens=filled, causal=True
        )

    caches, expected_caches = (k.clone(), v.clone()), (k.clone(), v.clone())
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*caches), step(*expected_caches))
    torch.testing.assert_close(caches, expected_caches, rtol=0, atol=0)
