"""torch.fx.symbolic_trace of models that hold our modules, against the models themselves."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import flashlayer
from flashlayer import FlashAttention, FlashMultiheadAttention, swap_attention
from flashlayer.integrations import sdpa

E, H = 16, 4


class OwnBlock(nn.Module):
    """Our layer, with what fx traces around it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = FlashAttention(E, H, num_kv_heads=2, causal=True, rotary_base=100.0)
        self.second = FlashAttention(E, H, qk_norm=True)

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.first(x)
        return F.gelu(self.second(y, context=x.flip(1)))


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = FlashAttention(E, H, causal=True)

    def forward(self, x: Tensor) -> Tensor:
        edges = torch.tensor([0, 3, 7])
        return self.layer(x.flatten(0, 1)[:7], cu_seqlens=edges, max_seqlen=4)


class MultiheadBlock(nn.Module):
    """Both results of the module, its mask and an option."""

    def __init__(self, module: type[nn.MultiheadAttention]) -> None:
        super().__init__()
        self.attention = module(E, H, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x[..., 0] > 0.9
        out, weights = self.attention(x, x, x, key_padding_mask=hidden)
        each = self.attention(x, key=x, value=x, average_attn_weights=False)[1]
        return out + weights.sum() + each.mean()


def swapped_block() -> nn.Module:
    model = MultiheadBlock(nn.MultiheadAttention)
    assert swap_attention(model) == ["attention"]
    return model


def hooked_block() -> nn.Module:
    """Hooks must run once, not in the graph and in the leaf again."""
    model = swapped_block()
    model.attention.register_forward_pre_hook(lambda _, args: tuple(x * 2 for x in args))
    model.attention.register_forward_hook(lambda _, args, out: (out[0] + 1, out[1] * 3))
    return model


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(E, H, 32, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(E, E))
    swap_attention(model)
    return model


MODELS: dict[str, Any] = {
    "own": OwnBlock,
    "packed": Packed,
    "sequential": lambda: nn.Sequential(FlashAttention(E, H), nn.ReLU(), FlashAttention(E, H)),
    "multihead": lambda: MultiheadBlock(FlashMultiheadAttention),
    "swapped": swapped_block,
    "hooked": hooked_block,
    "encoder": encoder,
}


@pytest.mark.parametrize("inside_the_override", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_traced_model_computes_what_the_model_does(name: str, inside_the_override: bool) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    x = torch.randn(2, 5, E)
    expected = model(x)
    if inside_the_override:
        with sdpa.override():
            traced = fx.symbolic_trace(model)
    else:
        traced = fx.symbolic_trace(model)
    again = fx.symbolic_trace(traced)
    copies = [copy.deepcopy(traced)]
    if name != "hooked":  # lambdas are not pickled
        copies.append(pickle.loads(pickle.dumps(traced)))
    for graph in (traced, again, *copies):
        graph.graph.lint()
        torch.testing.assert_close(graph(x), expected)
    parameters = list(model.parameters())
    grads = [
        torch.autograd.grad(out.square().sum(), parameters, allow_unused=True)
        for out in (traced(x), expected)
    ]
    torch.testing.assert_close(*grads)


def test_the_modules_are_nodes_of_the_graph() -> None:
    graph = fx.symbolic_trace(OwnBlock()).graph
    called = [(node.op, node.target) for node in graph.nodes if node.op == "call_module"]
    assert called == [("call_module", "first"), ("call_module", "second")]
    model = swapped_block()
    expected = fx.symbolic_trace(MultiheadBlock(nn.MultiheadAttention)).graph
    assert str(fx.symbolic_trace(model).graph) == str(expected)


class OwnRules(fx.Tracer):
    """A tracer that takes everything for a leaf, and notes what it was asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        self.asked.append(module_qualified_name)
        return True


def test_a_tracer_with_rules_of_its_own_is_asked() -> None:
    tracer = OwnRules()
    model = OwnBlock()
    graph = fx.GraphModule(model, tracer.trace(model))
    assert tracer.asked == ["first", "second"]
    x = torch.randn(2, 5, E)
    torch.testing.assert_close(graph(x), model(x))


@pytest.mark.parametrize("module", [FlashAttention, FlashMultiheadAttention])
def test_a_leaf_is_not_a_whole_model(module: Any) -> None:
    """torch's module can't be traced alone either."""
    with pytest.raises(TypeError, match=r"got Proxy: trace a model that holds"):
        fx.symbolic_trace(module(E, H))
    with pytest.raises(fx.proxy.TraceError):
        fx.symbolic_trace(nn.MultiheadAttention(E, H))


class Tagged(nn.MultiheadAttention):
    """Has a __call__ of its own."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out, weights = super().__call__(*args, **kwargs)
        return 2 * out, weights


def test_a_call_of_a_subclass_stays_its_own() -> None:
    model = MultiheadBlock(Tagged)
    x = torch.randn(2, 5, E)
    expected = model(x)
    assert swap_attention(model) == ["attention"]
    torch.testing.assert_close(model(x), expected)


class Direct(nn.Module):
    """Calls SDPA."""

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (H, -1)).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, q, q, is_causal=True)
        return F.scaled_dot_product_attention(out, q, value=q, attn_mask=None, scale=0.5)


def test_sdpa_is_recorded_inside_the_override_and_routed_where_the_graph_runs() -> None:
    x, model = torch.randn(2, 5, E), Direct()
    expected = model(x)
    with sdpa.override() as tracing:
        traced = fx.symbolic_trace(model)
    assert tracing.report() == (0, {})
    for graph in (traced, pickle.loads(pickle.dumps(traced)), fx.symbolic_trace(traced)):
        torch.testing.assert_close(graph(x), expected)
        with sdpa.override() as running:
            torch.testing.assert_close(graph(x), expected)
        assert running.report() == (2, {})


class Functions(nn.Module):
    """The functions with their options."""

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (H, -1)).transpose(1, 2)
        out, lse = flashlayer.flash_attention(q, q, q, causal=True, return_lse=True)
        tokens = q[0].transpose(0, 1)
        edges = torch.tensor([0, 2, 5])
        packed = flashlayer.flash_attention_varlen(
            tokens, tokens, tokens, cu_seqlens_q=edges, max_seqlen_q=3
        )
        return out.sum() + lse.sum() + packed.sum()


def test_the_functions_are_nodes_of_the_graph() -> None:
    x, model = torch.randn(2, 5, E), Functions()
    traced = fx.symbolic_trace(model)
    targets = {node.target for node in traced.graph.nodes if node.op == "call_function"}
    assert {flashlayer.flash_attention, flashlayer.flash_attention_varlen} <= targets
    for graph in (traced, pickle.loads(pickle.dumps(traced)), fx.symbolic_trace(traced)):
        torch.testing.assert_close(graph(x), model(x))
