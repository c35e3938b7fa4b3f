"""The layer against the same layer written out by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flashlayer import FlashAttention, KVCache, masks
from flashlayer.modules import attention, rotate

CONTEXT, EDGES = torch.zeros(2, 5, 16), torch.tensor([0, 10])
MASK = torch.ones(5, 5, dtype=torch.bool)
MODEL_MASK = masks.chunks(3, seqlen=6)


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


def test_heads_are_views_of_the_projections(monkeypatch: pytest.MonkeyPatch) -> None:
    """The split into heads costs no copy, and the layer keeps only what the backward needs."""
    queries = []

    def spy(q: torch.Tensor, *_: torch.Tensor, **__: object) -> torch.Tensor:
        queries.append(q)
        return q

    monkeypatch.setattr(attention, "flash_attention", spy)
    FlashAttention(16, 2)(torch.randn(2, 5, 16))
    (q,) = queries
    assert q.shape == (2, 2, 5, 8)
    assert q.stride() == (80, 8, 16, 1)


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
        (
            {"cu_seqlens": EDGES, "attn_mask": masks.chunks(5, seqlen=10)},
            "attn_mask can't be combined with cu_seqlens",
        ),
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


@pytest.mark.parametrize("crossed", [False, True])
def test_an_interval_mask_is_its_dense_form(crossed: bool) -> None:
    """In every gradient; under autocast, checkpointing and a compiler; it is no state."""
    layer = FlashAttention(16, 4, num_kv_heads=2, alibi=True, sinks=True)
    keys = set(layer.state_dict())
    x = torch.randn(2, 5, 16, requires_grad=True)
    options = {"context": torch.randn(2, 7, 16)} if crossed else {}
    ends = torch.randint(0, 6, (2, 4, 2, 7 if crossed else 5)).sort(dim=2).values
    mask = masks.IntervalMask(ends, 5)

    def results(call: Callable[..., Tensor], mask: Any) -> list[Tensor]:
        out = call(x, **options, attn_mask=mask)
        leaves = [x, *layer.parameters()]
        return [out, *torch.autograd.grad(out.float().sin().sum(), leaves)]

    def checkpointed(x: Tensor, **options: Any) -> Tensor:
        return checkpoint(layer, x, use_reentrant=False, **options)

    expected = results(layer, mask.materialize())
    torch.testing.assert_close(results(layer, mask), expected)
    torch.testing.assert_close(results(checkpointed, mask), expected)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(results(compiled, mask), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = results(layer, mask)
        torch.testing.assert_close(low, results(layer, mask.materialize()), atol=0.02, rtol=0.02)
    assert low[0].dtype == torch.bfloat16
    assert set(layer.state_dict()) == keys


def test_a_traced_model_takes_an_interval_mask() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = FlashAttention(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x, attn_mask=MODEL_MASK)

    model, x = Model(), torch.randn(2, 6, 16)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))


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
