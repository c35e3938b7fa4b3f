"""The layer against the same layer written out by hand."""

from typing import Any

import pytest
import torch
from torch import nn

import flashlayer
from flashlayer import FlashAttention
from flashlayer.modules import KVCache, alibi_slopes, rotate

CONTEXT, EDGES = torch.zeros(2, 5, 16), torch.tensor([0, 10])
MASK = torch.ones(5, 5, dtype=torch.bool)


def by_hand(layer: FlashAttention, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """Projections, heads split one by one, softmax of the full matrix."""
    queries = layer.q_proj(x).split(layer.head_dim, dim=-1)
    keys = layer.k_proj(context).split(layer.head_dim, dim=-1)
    values = layer.v_proj(context).split(layer.head_dim, dim=-1)
    heads = []
    for h, q in enumerate(queries):
        kv_head = h // (layer.num_heads // layer.num_kv_heads)
        k, v = keys[kv_head], values[kv_head]
        if layer.q_norm is not None:
            q, k = layer.q_norm(q), layer.k_norm(k)
        if layer.rotary_base is not None:
            q, k = (rotate(y, layer.rotary_base, torch.arange(y.shape[1])) for y in (q, k))
        scores = q @ k.mT * (layer.scale or layer.head_dim**-0.5)
        if layer.causal:
            offset = k.shape[1] - q.shape[1]
            hidden = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).triu(offset + 1)
            scores = scores.masked_fill(hidden, -torch.inf)
        heads.append(scores.softmax(-1) @ v)
    return layer.out_proj(torch.cat(heads, dim=-1))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_kv_heads": 2, "causal": True},
        {"num_kv_heads": 1, "bias": False, "head_dim": 6},
        {"rotary_base": 10000.0, "causal": True},
        {"qk_norm": True, "rotary_base": 500.0, "num_kv_heads": 2},
        {"scale": 0.5, "backend": "tiled"},
        {"backend": "standard", "causal": True},
    ],
    ids=str,
)
def test_self_attention(options: dict) -> None:
    layer = FlashAttention(24, 4, dtype=torch.float64, **options)
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    torch.testing.assert_close(layer(x), by_hand(layer, x, x))


@pytest.mark.parametrize("options", [{}, {"causal": True, "num_kv_heads": 2}, {"qk_norm": True}])
def test_cross_attention(options: dict) -> None:
    layer = FlashAttention(24, 4, dtype=torch.float64, **options)
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    context = torch.randn(2, 9, 24, dtype=torch.float64)
    torch.testing.assert_close(layer(x, context), by_hand(layer, x, context))


def test_gradients_reach_every_parameter() -> None:
    layer = FlashAttention(24, 4, num_kv_heads=2, qk_norm=True, rotary_base=100.0)
    layer(torch.randn(2, 7, 24)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0 or name == "k_proj.bias", name


def test_rotation_depends_on_distance_only() -> None:
    q, k = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    q, k = (rotate(x.expand(1, 1, 20, 8), 100.0, torch.arange(20)) for x in (q, k))
    scores = q @ k.mT
    for distance in range(-19, 20):
        diagonal = scores[0, 0].diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    torch.testing.assert_close(scores[0, 0].diagonal(), (q[0, 0, 0] @ k[0, 0, 0]).expand(20))


def test_rotation_in_bf16_keeps_positions_apart() -> None:
    x, position = torch.ones(1, 1, 1024, 8, dtype=torch.bfloat16), torch.arange(1024)
    torch.testing.assert_close(
        rotate(x, 1e4, position).float(), rotate(x.float(), 1e4, position), rtol=1e-2, atol=1e-2
    )


def test_heads_are_views_of_the_projections() -> None:
    """The split into heads costs no copy, and the layer keeps only what the backward needs."""
    layer = FlashAttention(16, 2)
    seen = {}

    def spy(q, k, v, **_):
        seen.update(q=q, k=k)
        return q

    original = flashlayer.modules.flash_attention
    try:
        flashlayer.modules.flash_attention = spy
        layer(torch.randn(2, 5, 16))
    finally:
        flashlayer.modules.flash_attention = original
    assert seen["q"].shape == (2, 2, 5, 8)
    assert seen["q"].stride() == (80, 8, 16, 1)


def test_dtype_device_and_state_dict() -> None:
    layer = FlashAttention(16, 2, num_kv_heads=1, device="meta", dtype=torch.bfloat16)
    shapes = {name: tuple(p.shape) for name, p in layer.state_dict().items()}
    assert shapes == {
        "q_proj.weight": (16, 16),
        "q_proj.bias": (16,),
        "k_proj.weight": (8, 16),
        "k_proj.bias": (8,),
        "v_proj.weight": (8, 16),
        "v_proj.bias": (8,),
        "out_proj.weight": (16, 16),
        "out_proj.bias": (16,),
    }
    assert all(p.device.type == "meta" and p.dtype == torch.bfloat16 for p in layer.parameters())


def test_extra_repr() -> None:
    layer = FlashAttention(16, 4, num_kv_heads=2, causal=True, rotary_base=10000.0)
    assert layer.extra_repr() == (
        "16, 4, num_kv_heads=2, head_dim=4, causal=True, rotary_base=10000.0"
    )
    assert FlashAttention(16, 4).extra_repr() == "16, 4, head_dim=4"


def test_fits_into_sequential_and_autocast() -> None:
    model = nn.Sequential(nn.Linear(8, 16), FlashAttention(16, 2, causal=True), nn.Linear(16, 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(torch.randn(2, 5, 8)).dtype == torch.bfloat16


BAD_LAYERS = {
    "heads": ({"num_kv_heads": 3}, ValueError, "num_heads must be a multiple of num_kv_heads"),
    "embed": ({"embed_dim": 18}, ValueError, "embed_dim must be a multiple of num_heads"),
    "zero": ({"num_heads": 0}, ValueError, "num_heads must be at least 1, got 0"),
    "float": ({"head_dim": 4.0}, TypeError, "head_dim must be an int, got float"),
    "odd_rotary": ({"head_dim": 5, "rotary_base": 1e4}, ValueError, "needs an even head_dim"),
    "rotary": ({"rotary_base": -1.0}, ValueError, "rotary_base must be positive"),
    "dropout": ({"dropout": -0.1}, ValueError, "dropout must be a probability"),
    "dropout_type": (
        {"dropout": torch.tensor(2.0)},
        TypeError,
        "dropout must be a float, got Tensor",
    ),
    "rotary_type": ({"rotary_base": "1e4"}, TypeError, "rotary_base must be a float, got str"),
    "rotary_nan": ({"rotary_base": float("nan")}, ValueError, "rotary_base must be positive"),
}


@pytest.mark.parametrize("name", BAD_LAYERS)
def test_bad_layer(name: str) -> None:
    options, error, message = BAD_LAYERS[name]
    with pytest.raises(error, match=message):
        FlashAttention(**{"embed_dim": 16, "num_heads": 4, **options})


@pytest.mark.parametrize(
    ("inputs", "options", "error", "message"),
    [
        ((torch.zeros(5, 16),), {}, ValueError, r"x must be \(batch, sequence, embed_dim=16\)"),
        ((torch.zeros(2, 5, 8),), {}, ValueError, r"got \(2, 5, 8\)"),
        (([1.0],), {}, TypeError, "x must be a torch.Tensor, got list"),
        ((torch.zeros(2, 5, 16), torch.zeros(2, 16)), {}, ValueError, "context must be"),
        (
            (torch.zeros(2, 5, 16), torch.zeros(2, 5, 16)),
            {"rotary_base": 1e4},
            ValueError,
            "rotary_base",
        ),
    ],
)
def test_bad_inputs(inputs: tuple, options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        FlashAttention(16, 4, **options)(*inputs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_seqlen": 5}, "max_seqlen needs cu_seqlens"),
        ({"context": CONTEXT, "cache": KVCache()}, "context can't be combined with cache"),
        ({"cu_seqlens": EDGES, "cache": KVCache()}, "cache can't be combined with cu_seqlens"),
        ({"cu_seqlens": EDGES, "attn_mask": MASK}, "attn_mask can't be combined with cu_seqlens"),
    ],
)
def test_arguments_that_exclude_each_other(arguments: dict, message: str) -> None:
    x = torch.zeros(10, 16) if "cu_seqlens" in arguments else torch.zeros(2, 5, 16)
    with pytest.raises(ValueError, match=message):
        FlashAttention(16, 4)(x, **arguments)


def test_packed_sequences_are_what_each_gives_alone() -> None:
    layer = FlashAttention(16, 4, num_kv_heads=2, causal=True, rotary_base=100.0, alibi=True)
    x, edges = torch.randn(10, 16), torch.tensor([0, 3, 3, 10])
    packed = layer(x, cu_seqlens=edges, max_seqlen=7)
    for start, stop in ((0, 3), (3, 10)):
        torch.testing.assert_close(packed[start:stop], layer(x[None, start:stop])[0])


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


def test_options_reach_the_attention() -> None:
    """Each option of the layer changes its output, as it changes the function's."""
    x = torch.randn(2, 9, 16)
    plain = FlashAttention(16, 4)
    for options in ({"softcap": 0.1}, {"alibi": True}, {"sinks": True}, {"window_size": (2, 2)}):
        layer = FlashAttention(16, 4, **options)
        layer.load_state_dict(plain.state_dict(), strict=False)
        assert not torch.allclose(layer(x), plain(x)), options


def test_dropout_is_off_in_eval_and_reproducible() -> None:
    layer, x = FlashAttention(16, 4, dropout=0.5), torch.randn(2, 9, 16)
    outs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs.append(layer(x))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    plain = FlashAttention(16, 4)
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer.eval()(x), plain(x))


def test_alibi_slopes_are_the_papers() -> None:
    assert alibi_slopes(8).tolist() == [2.0**-n for n in range(1, 9)]
    expected = [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]
    torch.testing.assert_close(alibi_slopes(6), torch.tensor(expected))
    assert alibi_slopes(1).tolist() == [2.0**-8]
