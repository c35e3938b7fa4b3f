"""flash_attn_with_kvcache against the documentation, written out in fp64."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from flashlayer.integrations import flash_attn as door
from tests.integrations.flash_attn.reference import (
    HKV,
    OPTIONS,
    SK,
    SQ,
    B,
    D,
    H,
    close,
    paged,
    qkv,
    reference,
    rotate,
)


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
