"""Under FakeTensorMode, where no tensor has values: shapes, dtypes and strides of a real call."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode

from flashlayer import (
    FlashAttention,
    FlashMultiheadAttention,
    KVCache,
    dropout_keep_mask,
    flash_attention,
    swap_attention,
)
from flashlayer.integrations import flash_attn as door
from flashlayer.integrations import sdpa
from flashlayer.integrations.flash_attn.layers.rotary import apply_rotary_emb

E, H, HKV, D = 16, 4, 2, 8


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def edges(*positions: int) -> Tensor:
    return torch.tensor(positions, dtype=torch.int32)


def visible(*shape: int) -> Tensor:
    return torch.arange(shape[-1]).expand(shape) < shape[-1] - 1


def layer(x: tuple[int, ...], call: dict[str, Any] | None = None, **options: Any) -> Tensor:
    return FlashAttention(E, H, num_kv_heads=HKV, **options)(leaf(*x), **(call or {}))


def layer_with_cache() -> Tensor:
    module, cache = FlashAttention(E, H, causal=True, rotary_base=100.0), KVCache()
    with torch.no_grad():
        module(leaf(2, 5, E), cache=cache)
        module(leaf(2, 1, E), cache=cache)
    return module(leaf(2, 1, E), cache=cache)


def multihead(call: dict[str, Any] | None = None, **options: Any) -> tuple[Tensor, ...]:
    x = leaf(2, 5, E)
    results = FlashMultiheadAttention(E, H, batch_first=True, **options)(x, x, x, **(call or {}))
    return tuple(result for result in results if result is not None)


def swapped_encoder_layer() -> Tensor:
    model = nn.Sequential(nn.TransformerEncoderLayer(E, H, 32, batch_first=True))
    swap_attention(model)
    hidden = ~visible(2, 5)
    with torch.no_grad():
        return model[0].eval()(leaf(2, 5, E), src_key_padding_mask=hidden)


def routed(**options: Any) -> Tensor:
    x = leaf(2, H, 5, D)
    with sdpa.override() as routing:
        out = F.scaled_dot_product_attention(x, x, x, **options)
    assert routing.report() == (1, {})
    return out


def dense(**options: Any) -> Any:
    return door.flash_attn_func(leaf(2, 5, H, D), leaf(2, 5, H, D), leaf(2, 5, H, D), **options)


def packed(**options: Any) -> Any:
    bounds = edges(0, 3, 10)
    tensors = leaf(10, H, D), leaf(10, HKV, D), leaf(10, HKV, D)
    longest = options.pop("longest", lambda lengths: 7)(bounds.diff())
    return door.flash_attn_varlen_func(*tensors, bounds, bounds, longest, longest, **options)


def packed_pages() -> Tensor:
    pages, table = torch.randn(5, 4, HKV, D), edges(0, 1, 2, 3).view(2, 2)
    return door.flash_attn_varlen_func(
        leaf(10, H, D), pages, pages, edges(0, 3, 10), edges(0, 4, 10), 7, 6, block_table=table
    )


def cached(**options: Any) -> Any:
    """Built here: what a call is given belongs to the mode it runs in."""
    cache = torch.randn(5, 4, HKV, D) if "block_table" in options else torch.randn(2, 9, HKV, D)
    if options.pop("new", True):
        options |= {"k": torch.randn(2, 3, HKV, D), "v": torch.randn(2, 3, HKV, D)}
    options = {name: x() if callable(x) else x for name, x in options.items()}
    q = torch.randn(2, 3, H, D)
    return door.flash_attn_with_kvcache(q, cache, cache.clone(), causal=True, **options)


FILLED = {"cache_seqlens": lambda: edges(3, 5)}
CASES: dict[str, Callable[[], Any]] = {
    "layer": lambda: layer((2, 5, E), causal=True, rotary_base=100.0),
    "layer_options": lambda: layer((2, 5, E), dropout=0.1, sinks=True, alibi=True, qk_norm=True),
    "layer_mask": lambda: layer((2, 5, E), {"attn_mask": visible(2, 1, 1, 5)}),
    "layer_packed": lambda: layer(
        (10, E), {"cu_seqlens": edges(0, 3, 10)}, causal=True, rotary_base=100.0
    ),
    "layer_packed_bounded": lambda: layer(
        (10, E), {"cu_seqlens": edges(0, 3, 10), "max_seqlen": 7}, causal=True
    ),
    "layer_cache": layer_with_cache,
    "multihead": multihead,
    "multihead_padding": lambda: multihead({"key_padding_mask": ~visible(2, 5)}),
    "multihead_padding_without_weights": lambda: multihead(
        {"key_padding_mask": ~visible(2, 5), "need_weights": False}
    ),
    "multihead_both_masks": lambda: multihead(
        {"key_padding_mask": torch.zeros(2, 5), "attn_mask": ~visible(5, 5)}
    ),
    "multihead_dropout": lambda: multihead(dropout=0.3),
    "swapped": swapped_encoder_layer,
    "routed_causal": lambda: routed(is_causal=True),
    "routed_padding": lambda: routed(attn_mask=visible(2, 1, 1, 5)),
    "routed_mask": lambda: routed(attn_mask=torch.zeros(5, 5)),
    "routed_dropout": lambda: routed(dropout_p=0.3),
    "dense": lambda: dense(causal=True, window_size=(2, 0)),
    "dense_lse": lambda: dense(return_attn_probs=True),
    "dense_dropout": lambda: dense(dropout_p=0.3, return_attn_probs=True),
    "varlen": lambda: packed(causal=True),
    "varlen_window": lambda: packed(window_size=(2, 1), softcap=2.0),
    "varlen_longest_as_a_tensor": lambda: packed(longest=torch.max),
    "varlen_dropout": lambda: packed(dropout_p=0.3, return_attn_probs=True),
    "varlen_pages": packed_pages,
    "kvcache": lambda: cached(new=False),
    "kvcache_int": lambda: cached(cache_seqlens=3, return_softmax_lse=True),
    "kvcache_lengths": lambda: cached(**FILLED),
    "kvcache_rotary": lambda: cached(
        **FILLED, rotary_cos=lambda: torch.ones(9, 4), rotary_sin=lambda: torch.ones(9, 4)
    ),
    "kvcache_leftpad": lambda: cached(**FILLED, cache_leftpad=lambda: edges(1, 0)),
    "kvcache_rows": lambda: cached(**FILLED, cache_batch_idx=lambda: edges(1, 0)),
    "kvcache_pages": lambda: cached(**FILLED, block_table=lambda: edges(0, 1, 2, 3).view(2, 2)),
    "rotary_packed": lambda: apply_rotary_emb(
        leaf(10, H, D), *torch.ones(2, 9, 4), cu_seqlens=edges(0, 3, 10), seqlen_offsets=edges(1, 0)
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_fake_call_looks_like_the_real_one(name: str) -> None:
    call = CASES[name]
    real = call()
    with FakeTensorMode():
        fake = call()
        results = [x if isinstance(x, tuple) else (x,) for x in (real, fake)]
        loss = sum(x.double().sum() for x in results[1])
        if loss.requires_grad:
            loss.backward()
    assert len(results[0]) == len(results[1])
    for expected, actual in zip(*results, strict=True):
        assert isinstance(actual, FakeTensor)
        looks = [
            (x.shape, x.dtype, x.device, x.stride(), x.requires_grad) for x in (actual, expected)
        ]
        assert looks[0] == looks[1]


def test_weights_with_dropout_compile_without_a_break() -> None:
    """The seed of the output and its weights is a tensor that nobody reads."""
    torch._dynamo.reset()
    module = FlashMultiheadAttention(E, H, dropout=0.4, batch_first=True, dtype=torch.float64)
    x = torch.eye(E, dtype=torch.float64).expand(2, -1, -1)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    results = []
    for call in (compiled, module):
        out, weights = call(x, x, x, average_attn_weights=False)
        assert 0.2 < (weights == 0).double().mean() < 0.6
        value = F.linear(x, *(p.chunk(3)[2] for p in (module.in_proj_weight, module.in_proj_bias)))
        heads = value.unflatten(-1, (H, -1)).transpose(1, 2)
        by_weights = module.out_proj((weights @ heads).transpose(1, 2).flatten(2))
        torch.testing.assert_close(out, by_weights)
        results.append(weights)
    assert not torch.equal(*results)


@pytest.mark.parametrize("backend", ["tiled", "standard"])
def test_a_seed_may_be_a_tensor(backend: str) -> None:
    q = k = v = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    options = {"dropout_p": 0.4, "backend": backend}
    expected = flash_attention(q, k, v, dropout_seed=17, **options)
    seed = torch.tensor(17)
    assert torch.equal(flash_attention(q, k, v, dropout_seed=seed, **options), expected)
    masks = [dropout_keep_mask(2, 3, 9, 9, 0.4, x, "cpu") for x in (17, seed)]
    assert torch.equal(*masks)
    for wrong in (seed.int(), seed[None], seed.double()):
        with pytest.raises(TypeError, match=r"dropout_seed must be an int, a \(\) int64 tensor"):
            flash_attention(q, k, v, dropout_seed=wrong, **options)
