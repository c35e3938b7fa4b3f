"""swap_attention: models of torch's own modules before and after."""

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flashlayer
from flashlayer import FlashMultiheadAttention, swap_attention

E, H = 16, 4


def encoder(**options: Any) -> nn.TransformerEncoder:
    options = {"batch_first": True, "dropout": 0.0, "dtype": torch.float64} | options
    layer = nn.TransformerEncoderLayer(E, H, 32, **options)
    norm = nn.LayerNorm(E, dtype=options["dtype"])
    nested = layer.self_attn.batch_first and not layer.norm_first
    return nn.TransformerEncoder(layer, 2, norm=norm, enable_nested_tensor=nested)


def swapped(model: nn.Module, **options: Any) -> nn.Module:
    model = copy.deepcopy(model)
    assert swap_attention(model, **options)
    return model


def padding(batch: int, length: int, *lengths: int) -> Tensor:
    return torch.arange(length).expand(batch, -1) >= torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("options", [{}, {"batch_first": False}, {"norm_first": True}], ids=str)
def test_encoder(options: dict[str, Any], train: bool) -> None:
    torch.manual_seed(0)
    host = encoder(**options).train(train)
    ours = swapped(host)
    assert all(layer.self_attn.training is train for layer in ours.layers)
    x = torch.randn(3, 7, E, dtype=torch.float64)
    hidden = padding(3, 7, 7, 4, 5)
    if options.get("batch_first") is False:
        x = x.transpose(0, 1)
    causal = torch.ones(7, 7, dtype=torch.bool).triu(1)
    for call in (
        {},
        {"src_key_padding_mask": hidden},
        {"mask": causal},
        {"mask": causal, "is_causal": True, "src_key_padding_mask": hidden},
    ):
        results = []
        for model in (ours, host):
            out = model(x, **call)
            keep = ~hidden if model.layers[0].self_attn.batch_first else ~hidden.T
            loss = out[keep].square().sum()
            results.append((out[keep], *torch.autograd.grad(loss, list(model.parameters()))))
        torch.testing.assert_close(*results)


# torch's nested tensors, which this is compared to, call themselves a prototype.
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_encoder_fast_path_does_not_skip_the_module(mode: Any) -> None:
    torch.manual_seed(1)
    host = encoder(dtype=torch.float32).eval()
    x, hidden = torch.randn(3, 7, E), padding(3, 7, 7, 4, 5)
    ours = swapped(host)
    calls = []
    for layer in ours.layers:
        original = layer.self_attn.forward
        layer.self_attn.forward = lambda *args, f=original, **kw: calls.append(1) or f(*args, **kw)
    with mode():
        torch.testing.assert_close(ours(x), host(x))
        assert len(calls) == 2
        torch.testing.assert_close(
            ours(x, src_key_padding_mask=hidden)[~hidden],
            host(x, src_key_padding_mask=hidden)[~hidden],
        )
        assert len(calls) == 4
        # An encoder built from a swapped layer nests padded batches, as torch's does.
        rebuilt, expected = (nn.TransformerEncoder(x.layers[0], 2).eval() for x in (ours, host))
        torch.testing.assert_close(
            rebuilt(x, src_key_padding_mask=hidden), expected(x, src_key_padding_mask=hidden)
        )


def test_whole_transformer() -> None:
    torch.manual_seed(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about its own nested path
        host = nn.Transformer(E, H, 1, 1, 32, dropout=0.0, dtype=torch.float64)
    ours = swapped(host)
    assert swap_names(host) == [
        "encoder.layers.0.self_attn",
        "decoder.layers.0.self_attn",
        "decoder.layers.0.multihead_attn",
    ]
    source, target = torch.randn(9, 2, E).double(), torch.randn(6, 2, E).double()
    call = {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(6, dtype=torch.float64),
        "memory_key_padding_mask": padding(2, 9, 9, 5),
        "tgt_is_causal": True,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = [model(source, target, **call) for model in (ours, host)]
    torch.testing.assert_close(*results)


def swap_names(model: nn.Module) -> list[str]:
    return swap_attention(copy.deepcopy(model))


def test_what_is_kept() -> None:
    model = nn.ModuleDict({"a": nn.MultiheadAttention(E, H, dropout=0.3, dtype=torch.bfloat16)})
    model["a"].bias_marker = "mine"
    model["a"].in_proj_bias.requires_grad_(False)
    seen: list[str] = []
    module = model["a"].eval()
    module.register_forward_pre_hook(lambda *_: seen.append("before"))
    module.register_forward_hook(lambda *_: seen.append("after"))
    module.register_full_backward_hook(lambda *_: seen.append("backward"))
    module.register_buffer("extra", torch.ones(2))
    parameters = dict(model.named_parameters())
    assert swap_attention(model, backend="tiled") == ["a"]
    assert model["a"] is module
    assert isinstance(module, FlashMultiheadAttention)
    assert (module.backend, module.training, module.dropout) == ("tiled", False, 0.3)
    assert module.bias_marker == "mine"
    assert {name: id(p) for name, p in model.named_parameters()} == {
        name: id(p) for name, p in parameters.items()
    }
    assert not module.in_proj_bias.requires_grad
    assert "a.extra" in model.state_dict()
    x = torch.randn(3, 2, E, dtype=torch.bfloat16, requires_grad=True)
    module(x, x, x)[0].sum().backward()
    assert seen == ["before", "after", "backward"]


def test_an_optimizer_from_before_trains_it_alike() -> None:
    torch.manual_seed(3)
    host = encoder()
    ours = copy.deepcopy(host)
    x = torch.randn(3, 7, E, dtype=torch.float64)
    results = []
    for model, swap in ((ours, True), (host, False)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(4):
            if step == 1 and swap:
                swap_attention(model)
            loss = model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        results.append((loss.detach(), *(p.detach() for p in model.parameters())))
    torch.testing.assert_close(*results)
    host.load_state_dict(ours.state_dict(), strict=True)


def test_shared_modules_stay_shared() -> None:
    shared = nn.MultiheadAttention(E, H)
    model = nn.Module()
    model.first, model.second, model.listed = shared, shared, [shared]
    assert swap_attention(model) == ["first"]
    assert model.first is model.second is model.listed[0]


class Tagged(nn.MultiheadAttention):
    """Inherits forward."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tag = "mine"


class Different(nn.MultiheadAttention):
    """Computes something else."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Any:
        return query, None


def test_subclasses(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(Tagged(E, H), Different(E, H))
    x = torch.randn(5, 2, E)
    expected = model[0](x, x, x)
    assert swap_attention(model) == ["0"]
    assert caplog.messages == ["not swapped: 1 (Different has a forward of its own)"]
    assert type(model[1]) is Different
    for module in (model[0], copy.deepcopy(model)[0], pickle.loads(pickle.dumps(model))[0]):
        assert isinstance(module, Tagged)
        assert isinstance(module, FlashMultiheadAttention)
        assert module.tag == "mine"
        torch.testing.assert_close(module(x, x, x), expected)


def test_swapped_models_are_copied_and_pickled() -> None:
    host = encoder(dtype=torch.float32).eval()
    ours = swapped(host)
    x = torch.randn(3, 7, E)
    for model in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert swap_names_or_error(model).startswith("no nn.MultiheadAttention to swap")
        with torch.inference_mode():
            torch.testing.assert_close(model(x), host(x))


def swap_names_or_error(model: nn.Module) -> str:
    with pytest.raises(ValueError, match="to swap") as caught:
        swap_attention(model)
    return str(caught.value)


def test_nothing_to_swap() -> None:
    assert swap_names_or_error(nn.Linear(2, 2)) == "no nn.MultiheadAttention to swap in Linear"
    message = swap_names_or_error(nn.Sequential(Different(E, H)))
    assert message.endswith("left alone: 0 (Different has a forward of its own)")
    with pytest.raises(ValueError, match=r"build flashlayer\.FlashMultiheadAttention"):
        swap_attention(nn.MultiheadAttention(E, H))
    assert flashlayer.swap_attention is swap_attention


def test_compiles_without_a_break() -> None:
    torch._dynamo.reset()
    model = swapped(encoder(dtype=torch.float32))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 7, E)
    torch.testing.assert_close(compiled(x), model(x))
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_layers_swapped_below_an_encoder_take_its_nested_tensors() -> None:
    """The encoder is not seen then, and goes on nesting padded batches in inference."""
    host = encoder().eval()
    model = copy.deepcopy(host)
    for layer in model.layers:
        flashlayer.swap_attention(layer)
    x, hidden = torch.randn(2, 7, E, dtype=torch.float64), padding(2, 7, 4, 7)
    with torch.inference_mode():
        torch.testing.assert_close(
            model(x, src_key_padding_mask=hidden), host(x, src_key_padding_mask=hidden)
        )


def test_a_parametrized_module_is_left_alone() -> None:
    model = nn.ModuleList([nn.MultiheadAttention(8, 2)])
    nn.utils.parametrizations.weight_norm(model[0], "in_proj_weight")
    with pytest.raises(ValueError, match="parametrized: remove that first"):
        flashlayer.swap_attention(model)


def test_wrong_arguments_leave_the_model_as_it_was() -> None:
    model = encoder()
    with pytest.raises(ValueError, match=r"backend must be one of .* got 'bogus'"):
        flashlayer.swap_attention(model, backend="bogus")
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got int"):
        flashlayer.swap_attention(3)
