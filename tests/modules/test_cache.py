"""Generation with a cache against the whole sequence at once."""

from typing import Any

import pytest
import torch

from flashlayer import FlashAttention, KVCache


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_kv_heads": 2, "rotary_base": 100.0, "qk_norm": True},
        {"window_size": (3, 0)},
        {"alibi": True, "softcap": 5.0},
        {"sinks": True},
    ],
    ids=str,
)
def test_generation_with_a_cache_is_the_whole_sequence(options: dict) -> None:
    layer = FlashAttention(16, 4, causal=True, **options).eval()
    if options.get("sinks"):
        layer.sinks.data.normal_()
    x, cache = torch.randn(2, 12, 16), KVCache()
    with torch.inference_mode():
        whole = layer(x)
        steps = [layer(x[:, start:stop], cache=cache) for start, stop in ((0, 5), (5, 6), (6, 12))]
    assert cache.length == 12
    torch.testing.assert_close(torch.cat(steps, dim=1), whole)


def test_cache_keeps_what_it_had_when_it_grows() -> None:
    cache = KVCache()
    keys = torch.randn(2, 3, 20, 4)
    for step in range(20):
        k, v = cache.append(keys[:, :, step : step + 1], 2 * keys[:, :, step : step + 1])
        assert torch.equal(k, keys[:, :, : step + 1])
        assert torch.equal(v, 2 * keys[:, :, : step + 1])
    with pytest.raises(
        ValueError, match=r"key: the cache holds \(batch, kv_heads, head_dim\) = \(2, 3, 4\)"
    ):
        cache.append(keys[:1], keys[:1])


def freeze_nothing(layer: FlashAttention) -> None:
    pass


def freeze_all(layer: FlashAttention) -> None:
    layer.requires_grad_(False)


def freeze_keys_and_values(layer: FlashAttention) -> None:
    layer.k_proj.requires_grad_(False)
    layer.v_proj.requires_grad_(False)


@pytest.mark.parametrize("freeze", [freeze_nothing, freeze_all, freeze_keys_and_values])
@pytest.mark.parametrize("x_has_gradient", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_kv_heads": 2, "rotary_base": 100.0, "qk_norm": True},
        {"alibi": True, "sinks": True},
    ],
    ids=str,
)
def test_training_through_a_cache_is_training_on_the_whole_sequence(
    options: dict, x_has_gradient: bool, freeze: Any
) -> None:
    layer = FlashAttention(16, 4, causal=True, dtype=torch.float64, **options)
    freeze(layer)
    x = torch.randn(2, 9, 16, dtype=torch.float64, requires_grad=x_has_gradient)
    leaves = [leaf for leaf in (x, *layer.parameters()) if leaf.requires_grad]
    cache = KVCache()
    in_steps = torch.cat([layer(part, cache=cache) for part in x.split([5, 1, 3], dim=1)], dim=1)
    whole = layer(x)
    torch.testing.assert_close(in_steps, whole)
    if leaves:
        grads = [torch.autograd.grad(y.square().sum(), leaves) for y in (in_steps, whole)]
        torch.testing.assert_close(*grads)


def test_a_prompt_without_a_gradient_is_a_constant_of_the_steps_after_it() -> None:
    layer = FlashAttention(16, 4, causal=True, dtype=torch.float64)
    x, cache = torch.randn(2, 9, 16, dtype=torch.float64), KVCache()
    with torch.no_grad():
        layer(x[:, :4], cache=cache)
        layer(x[:, 4:5], cache=cache)
    steps = [layer(part, cache=cache) for part in x[:, 5:].split(1, dim=1)]
    with torch.no_grad():  # in place again, and not into what the graph has saved
        last = layer(x[:, :1], cache=cache)
        assert not last.requires_grad
    grads = torch.autograd.grad(torch.cat(steps, 1).square().sum(), list(layer.parameters()))

    q, k, v = (
        p(x).unflatten(-1, (4, 4)).transpose(1, 2)
        for p in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    k, v = (torch.cat((y[:, :, :5].detach(), y[:, :, 5:]), 2) for y in (k, v))
    scores = (q @ k.mT / 2).masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
    by_formula = layer.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))[:, 5:]
    torch.testing.assert_close(torch.cat(steps, dim=1), by_formula)
    expected = torch.autograd.grad(by_formula.square().sum(), list(layer.parameters()))
    torch.testing.assert_close(grads, expected)


MODES = {"inference": torch.inference_mode, "no_grad": torch.no_grad, "grad": torch.enable_grad}


@pytest.mark.parametrize("first", MODES)
@pytest.mark.parametrize("second", MODES)
@pytest.mark.parametrize("third", MODES)
def test_a_cache_goes_from_one_mode_to_another(first: str, second: str, third: str) -> None:
    layer = FlashAttention(16, 4, causal=True, rotary_base=100.0, dtype=torch.float64)
    x, cache = torch.randn(2, 12, 16, dtype=torch.float64), KVCache()
    outs, start = [], 0
    for mode, stops in ((first, (4, 5)), (second, (6, 7)), (third, (8, 9)), (first, (12,))):
        for stop in stops:
            with MODES[mode]():
                outs.append(layer(x[:, start:stop], cache=cache))
            assert outs[-1].requires_grad == (mode == "grad")
            start = stop
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(outs, dim=1), layer(x))


def test_appending_without_a_gradient_stays_in_place() -> None:
    cache, key = KVCache(), torch.randn(1, 2, 1, 4)
    with torch.no_grad():
        storages = {cache.append(key, key)[0].untyped_storage().data_ptr() for _ in range(64)}
    assert len(storages) <= 7  # 1, 2, 4 ... 64 positions


# Dynamo's own, for keys in the cache that belong to a graph.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("mode", MODES)
def test_a_step_with_a_cache_compiles_without_a_break(mode: str) -> None:
    torch._dynamo.reset()
    layer = FlashAttention(16, 4, causal=True)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    x, cache = torch.randn(2, 6, 16), KVCache()
    with MODES[mode]():
        outs = [compiled(part, cache=cache) for part in x.split([4, 1, 1], dim=1)]
        torch.testing.assert_close(torch.cat(outs, dim=1), layer(x))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("key", "value", "error", "message"),
    [
        ((2, 3, 1, 1), (2, 3, 1, 4), ValueError, r"key: .* = \(2, 3, 4\), got \(2, 3, 1\)"),
        ((2, 3, 1, 4), (2, 3, 1, 1), ValueError, r"value: .* = \(2, 3, 4\), got \(2, 3, 1\)"),
        ((2, 3, 2, 4), (2, 3, 1, 4), ValueError, "key and value must agree"),
        ((2, 3, 2, 4), (2, 1, 2, 4), ValueError, "key and value must agree"),
        ((1, 3, 2, 4), (1, 3, 2, 4), ValueError, r"= \(2, 3, 4\), got \(1, 3, 4\)"),
        ("half", "half", TypeError, "key must be torch.float32 as the cache, got torch.float16"),
    ],
)
def test_a_cache_broadcasts_and_rounds_nothing(
    mode: str, key: Any, value: Any, error: type, message: str
) -> None:
    cache, held = KVCache(), torch.randn(2, 3, 4, 4)
    new = [held.half() if x == "half" else torch.randn(x) for x in (key, value)]
    with MODES[mode]():
        cache.append(held, held)
        with pytest.raises(error, match=message):
            cache.append(*new)
    assert cache.length == 4


@pytest.mark.parametrize(
    ("key", "value", "error", "message"),
    [
        (None, None, TypeError, "key must be a torch.Tensor, got NoneType"),
        ((2, 3, 4), (2, 3, 4), ValueError, r"key must have 4 dimensions .* got shape \(2, 3, 4\)"),
        ((2, 3, 1, 4), "half", TypeError, "key and value must have one dtype"),
        ((2, 3, 1, 4), "meta", ValueError, "value must be on key's device cpu, got meta"),
    ],
)
def test_the_first_tensors_are_checked(key: Any, value: Any, error: type, message: str) -> None:
    drawn = {
        None: lambda: None,
        "half": lambda: torch.zeros(2, 3, 1, 4, dtype=torch.half),
        "meta": lambda: torch.zeros(2, 3, 1, 4, device="meta"),
    }
    new = [drawn[x]() if x in drawn else torch.randn(x) for x in (key, value)]
    cache = KVCache()
    with pytest.raises(error, match=message):
        cache.append(*new)
    assert cache.length == 0
