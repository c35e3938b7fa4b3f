"""Decoding: keys that are split and merged give what the whole gives, through every door."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from flashlayer import FlashAttention, backends, flash_attention, flash_attention_varlen
from flashlayer.backends import split_keys
from flashlayer.integrations import flash_attn as door
from flashlayer.integrations import sdpa
from flashlayer.integrations.transformers import attention
from flashlayer.modules import KVCache
from flashlayer.spec import NO_EXTRAS, AttentionExtras, AttentionSpec
from flashlayer.testing import FACTORS, assert_accurate

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "sinks": {"sinks": torch.tensor([0.5, -torch.inf])},
    "softcap": {"softcap": 3.0, "scale": -0.5},
}


@pytest.fixture(params=[2, 7])
def splits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A fixed number of splits, as on a GPU; yields the numbers of the calls that were split."""
    calls: list[int] = []

    def fixed(q: Tensor, *_: Any) -> int:
        calls.append(request.param)
        return request.param

    monkeypatch.setattr(split_keys, "num_splits", fixed)
    monkeypatch.setattr(backends, "_by_speed", lambda problem: ("triton",))
    yield calls
    assert calls


def draw(batch: int = 2, seqlen_k: int = 100) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(batch, h, s, 8) for h, s in ((2, 1), (1, seqlen_k), (1, seqlen_k)))
    return q, k, v


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("seqlen_k", [7, 98])
def test_dense(splits: list[int], options: dict[str, Any], seqlen_k: int) -> None:
    check(flash_attention, *draw(seqlen_k=seqlen_k), **options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_packed(splits: list[int], options: dict[str, Any]) -> None:
    """Also sequences without a query, without keys, and shorter than the number of parts."""
    q, k, v = torch.randn(5, 2, 8), torch.randn(90, 1, 8), torch.randn(90, 1, 8)
    edges = {
        "cu_seqlens_q": torch.tensor([0, 1, 1, 2, 3, 4]),
        "cu_seqlens_k": torch.tensor([0, 40, 47, 49, 49, 83]),
    }
    check(flash_attention_varlen, q, k, v, **edges, **options)


def check(attend: Any, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> None:
    actual = attend(q, k, v, backend="triton", return_lse=True, **options)
    same = attend(q, k, v, backend="standard", return_lse=True, **options)
    wide = {
        n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for n, x in options.items()
    }
    tensors = (x.double() for x in (q, k, v))
    reference = attend(*tensors, backend="standard", return_lse=True, **wide)
    for name, *results in zip(("out", "lse"), actual, same, reference, strict=True):
        assert_accurate(name, results[0], results[1], results[2], FACTORS[name])


def test_gradients_are_those_of_the_whole(splits: list[int]) -> None:
    leaves = [x.double().requires_grad_() for x in draw(seqlen_k=30)]

    def gradients(backend: str) -> tuple[Tensor, ...]:
        out, lse = flash_attention(*leaves, causal=True, return_lse=True, backend=backend)
        return torch.autograd.grad(out.sin().sum() + lse.sin().sum(), leaves)

    for actual, expected in zip(gradients("triton"), gradients("standard"), strict=True):
        torch.testing.assert_close(actual, expected)


def test_keys_of_a_cache_are_not_copied() -> None:
    """A cache is a slice of a longer buffer: the parts are views of it."""
    buffer = torch.randn(2, 3, 128, 8)
    parts = split_keys._as_parts(buffer[:, :, :100], 3, 33)
    assert parts.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
    assert torch.equal(parts[1, 4], buffer[1, 1, 33:66])


def test_every_door_reaches_it(splits: list[int]) -> None:
    """The layer, transformers, SDPA and flash_attn's cache: one token on a longer cache."""
    torch.manual_seed(0)
    layer = FlashAttention(16, 2, causal=True).eval()
    x = torch.randn(2, 40, 16)
    with torch.inference_mode():
        cache = KVCache()
        layer.backend = "standard"
        layer(x[:, :-1], cache=cache)
        layer.backend = "triton"
        count = len(splits)
        step = layer(x[:, -1:], cache=cache)
        assert len(splits) > count
        layer.backend = "standard"
        torch.testing.assert_close(step, layer(x)[:, -1:])
        q, k, v = draw()
        expected = flash_attention(q, k, v, backend="standard")
        with sdpa.override():
            count = len(splits)
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        assert len(splits) > count
        torch.testing.assert_close(out, expected)
        count = len(splits)
        module: Any = SimpleNamespace(is_causal=True, training=False, config=None)
        out, _ = attention(module, q, k, v, None)
        assert len(splits) > count
        torch.testing.assert_close(out.transpose(1, 2), expected)
        count = len(splits)
        queries, *caches = (y.transpose(1, 2) for y in (q, k, v))
        lengths = torch.tensor([100, 61])
        out: Any = door.flash_attn_with_kvcache(
            queries, *caches, cache_seqlens=lengths, causal=True
        )
        assert len(splits) > count
        torch.testing.assert_close(out[:1].transpose(1, 2), expected[:1])
        short = flash_attention(q[1:], k[1:, :, :61], v[1:, :, :61], backend="standard")
        torch.testing.assert_close(out[1:].transpose(1, 2), short)


def test_a_kvcache_gets_as_many_splits_as_the_dense_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The flash_attn door packs a row as three sequences, of which one has a query."""
    numbers: list[int] = []
    original = split_keys.num_splits

    def on_a_gpu(q: Tensor, *call: Any) -> int:
        numbers.append(original(q.to("meta"), *call))
        return numbers[-1]

    monkeypatch.setattr(split_keys, "num_splits", on_a_gpu)
    monkeypatch.setattr(split_keys, "PROGRAMS_TO_FILL_A_GPU", 24)
    monkeypatch.setattr(split_keys, "MIN_SPLIT", 4)
    monkeypatch.setattr(backends, "_by_speed", lambda problem: ("triton",))
    q, k, v = draw()
    expected = flash_attention(q, k, v)
    out: Any = door.flash_attn_with_kvcache(*(x.transpose(1, 2) for x in (q, k, v)))
    torch.testing.assert_close(out.transpose(1, 2), expected)
    assert numbers == [12, 12]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, 32),
        ({"seqlen_k": 2047}, 7),
        ({"seqlen_q": 2}, 1),
        ({"spec": AttentionSpec(1.0, window_left=5)}, 1),
        ({"spec": AttentionSpec(1.0, window_right=5)}, 1),
        ({"extras": AttentionExtras(attn_mask=torch.ones(1, 1, 1, 1))}, 1),
        ({"extras": AttentionExtras(alibi_slopes=torch.ones(1, 4))}, 1),
        ({"extras": AttentionExtras(dropout_seed=torch.tensor(0))}, 1),
        ({"extras": AttentionExtras(sinks=torch.ones(8))}, 32),
        ({"packed": "bottom_right"}, 32),
        ({"packed": "top_left"}, 1),
        ({"strides": (80, 8, 16, 1)}, 1),
    ],
    ids=str,
)
def test_how_many(change: dict[str, Any], expected: int) -> None:
    """Two sequences of four kv heads on a GPU: 256 programs are 32 splits of at least 256 keys."""
    spec, extras = change.get("spec", AttentionSpec(1.0)), change.get("extras", NO_EXTRAS)
    length, rows = change.get("seqlen_k", 10_000), change.get("seqlen_q", 1)
    if "packed" in change:
        spec = AttentionSpec(1.0, None, 0, change["packed"], max_seqlen_q=1, max_seqlen_k=length)
        edges = torch.tensor([0, 1, 2]), torch.tensor([0, length, 2 * length])
        extras = AttentionExtras(cu_seqlens_q=edges[0], cu_seqlens_k=edges[1])
        rows, length = 2, 2 * length  # tokens
    batch = 1 if "packed" in change else 2
    q, k = (torch.empty(batch, h, s, 8, device="meta") for h, s in ((8, rows), (4, length)))
    if "strides" in change:  # (B, S, H, D) in a longer cache
        k = k.as_strided(k.shape, change["strides"])
    assert split_keys.num_splits(q, k, k, spec, extras) == expected
