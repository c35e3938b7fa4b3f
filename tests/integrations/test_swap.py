"""swap_attention: models of torch's own modules before and after."""

import copy
import functools
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import flashlayer
from flashlayer import FlashMultiheadAttention, swap_attention
from flashlayer.integrations import multihead

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
    events: list[str] = []
    module = model["a"].eval()
    module.register_forward_pre_hook(lambda *_: events.append("before"))
    module.register_forward_hook(lambda *_: events.append("after"))
    module.register_full_backward_hook(lambda *_: events.append("backward"))
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
    assert events == ["before", "after", "backward"]


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
    """The encoder is not among the modules then, and keeps nesting padded batches in inference."""
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


class OneLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(E, H, batch_first=True, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class DoubledInput:
    """A hook as accelerate's: what is called before and after forward."""

    no_grad = False

    def pre_forward(self, module: nn.Module, *args: Tensor, **kwargs: Any) -> Any:
        return tuple(2 * x for x in args), kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return -output[0], output[1]


def add_hook(module: nn.Module, hook: Any) -> None:
    """What accelerate's add_hook_to_module leaves on a module: three attributes of the instance."""
    if not hasattr(module, "_old_forward"):
        module._old_forward = module.forward
    module._hf_hook = hook

    def hooked(module: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = module._hf_hook.pre_forward(module, *args, **kwargs)
        return module._hf_hook.post_forward(module, module._old_forward(*args, **kwargs))

    wrapped = functools.partial(hooked, module)
    module.forward = functools.update_wrapper(wrapped, module._old_forward)


def remove_hook(module: nn.Module) -> None:
    """What its remove_hook_from_module leaves: a method of the class, on the instance."""
    module.forward = module._old_forward
    del module._old_forward, module._hf_hook


@pytest.fixture
def attentions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every call that a swapped module makes."""
    calls, original = [], multihead.flash_attention

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(multihead, "flash_attention", counted)
    return calls


@pytest.mark.parametrize("copied", [False, True])
def test_a_module_with_accelerates_hook_is_swapped_under_it(
    copied: bool, attentions: list[int]
) -> None:
    model, x = OneLayer(), torch.randn(3, 7, E, dtype=torch.float64)
    plain = model(x)
    for module in (model.attention, model.attention.out_proj):
        add_hook(module, DoubledInput())
    model.attention.out_proj._hf_hook.post_forward = lambda module, output: output / 2
    expected = -(model.attention._old_forward(2 * x, 2 * x, 2 * x)[0])
    if copied:
        model = copy.deepcopy(model)
    assert swap_attention(model) == ["attention"]
    assert attentions == []
    for once_more in (model, copy.deepcopy(model)):
        torch.testing.assert_close(once_more(x), expected)
    assert attentions == [1, 1]
    for module in (model.attention, model.attention.out_proj):
        remove_hook(module)
    torch.testing.assert_close(model(x), plain)
    assert attentions == [1, 1, 1]


def test_a_hook_that_was_removed_leaves_a_method_that_is_swapped(attentions: list[int]) -> None:
    model, x = OneLayer(), torch.randn(3, 7, E, dtype=torch.float64)
    expected = model(x)
    add_hook(model.attention, DoubledInput())
    remove_hook(model.attention)
    assert "forward" in vars(model.attention)
    assert swap_attention(model) == ["attention"]
    torch.testing.assert_close(model(x), expected)
    assert attentions == [1]


def patch_by_closure(module: Any) -> None:
    original = module.forward
    module.forward = lambda *args, **kwargs: original(*args, **kwargs)


def patch_by_partial(module: Any) -> None:
    module.forward = functools.partial(module.forward, need_weights=True)


def patch_by_method(module: Any) -> None:
    module.forward = functools.partial(nn.MultiheadAttention.forward, module)


def patch_with_the_method_of_another(module: Any) -> None:
    module.forward = nn.MultiheadAttention(E, H, batch_first=True, dtype=torch.float64).forward


def patch_the_call(module: Any) -> None:
    original = module.forward
    module._call_impl = lambda *args, **kwargs: original(*args, **kwargs)


def patch_by_compiling(module: Any) -> None:
    module.forward = torch.compile(module.forward, backend="eager")


def patch_then_hook(module: Any) -> None:
    patch_by_closure(module)
    add_hook(module, DoubledInput())


@pytest.mark.parametrize(
    ("patch", "reason"),
    [
        (patch_by_closure, "its forward was replaced on the instance"),
        (patch_by_partial, "its forward was replaced on the instance"),
        (patch_by_method, "its forward was replaced on the instance"),
        (patch_with_the_method_of_another, "its forward was replaced on the instance"),
        (patch_by_compiling, "its forward was replaced on the instance"),
        (patch_the_call, "its call was replaced on the instance"),
        (patch_then_hook, "accelerate's hook is around another forward than torch's"),
    ],
)
def test_a_forward_of_the_instance_is_left_alone_and_named(
    patch: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.ModuleList([OneLayer(), OneLayer()])
    patch(model[1].attention)
    x = torch.randn(3, 7, E, dtype=torch.float64)
    expected = model[1](x)
    assert swap_attention(model) == ["0.attention"]
    (message,) = [text for text in caplog.messages if text.startswith("not swapped")]
    assert message.startswith(f"not swapped: 1.attention ({reason}")
    assert type(model[1].attention) is nn.MultiheadAttention
    assert torch.equal(model[1](x), expected)
    assert reason in swap_names_or_error(nn.ModuleList([model[1]]))


def test_a_patched_class_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    original = nn.MultiheadAttention.forward
    monkeypatch.setattr(nn.MultiheadAttention, "forward", lambda *a, **k: original(*a, **k))
    assert "has a forward of its own" in swap_names_or_error(OneLayer())


def compile_module(model: OneLayer) -> Any:
    model.attention.compile(backend="eager")
    return model


def compile_model_in_place(model: OneLayer) -> Any:
    model.compile(backend="eager")
    return model


def compile_model(model: OneLayer) -> Any:
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("prepare", [compile_module, compile_model_in_place, compile_model])
def test_what_was_compiled_before_computes_the_swapped_module(
    prepare: Any, attentions: list[int]
) -> None:
    torch._dynamo.reset()
    model, x = OneLayer(), torch.randn(3, 7, E, dtype=torch.float64)
    compiled = prepare(model)
    expected = compiled(x)
    assert swap_attention(model) == ["attention"]
    torch.testing.assert_close(compiled(x), expected)
    assert attentions == [1]


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "prepare",
    [
        lambda m: nn.utils.weight_norm(m, "in_proj_weight"),
        lambda m: nn.utils.spectral_norm(m, "in_proj_weight"),
        lambda m: prune.random_unstructured(m, "in_proj_weight", 0.4),
        lambda m: nn.utils.parametrizations.weight_norm(m.out_proj, "weight"),
    ],
    ids=["weight_norm", "spectral_norm", "prune", "out_proj"],
)
def test_weights_that_hooks_compute(prepare: Any, attentions: list[int]) -> None:
    model, x = OneLayer(), torch.randn(3, 7, E, dtype=torch.float64)
    prepare(model.attention)
    model.eval()
    expected = model(x)
    parameters = list(model.parameters())
    grads = torch.autograd.grad(expected.square().sum(), parameters)
    assert swap_attention(model) == ["attention"]
    out = model(x)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), parameters), grads)
    assert attentions == [1]


def test_wrong_arguments_leave_the_model_as_it_was() -> None:
    model = encoder()
    with pytest.raises(ValueError, match=r"backend must be one of .* got 'bogus'"):
        flashlayer.swap_attention(model, backend="bogus")
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got int"):
        flashlayer.swap_attention(3)
