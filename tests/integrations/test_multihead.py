"""FlashMultiheadAttention against torch.nn.MultiheadAttention."""

import copy
import inspect
import itertools
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flashlayer import FlashMultiheadAttention
from flashlayer import weights as weights_room
from tests.tolerance import assert_accurate

E, H, N, L, S = 16, 4, 3, 6, 9

CONSTRUCTORS = {
    "plain": {},
    "no_bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "both_extras": {"add_bias_kv": True, "add_zero_attn": True},
    "kdim_vdim": {"kdim": 10, "vdim": 12},
    "kdim_no_bias": {"kdim": 10, "bias": False, "add_bias_kv": True},
    "batch_first": {"batch_first": True},
    "one_head": {"num_heads": 1},
}


def pair(
    dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[nn.MultiheadAttention, FlashMultiheadAttention]:
    """torch's module and ours, with the same random weights."""
    options = {"embed_dim": E, "num_heads": H, "dtype": dtype} | options
    host, ours = nn.MultiheadAttention(**options), FlashMultiheadAttention(**options)
    for parameter in host.parameters():  # torch starts the biases at 0
        nn.init.normal_(parameter, std=0.3)
    ours.load_state_dict(host.state_dict(), strict=True)
    return host, ours


def inputs(
    module: nn.MultiheadAttention,
    *,
    batched: bool = True,
    same: bool = False,
    length: int = L,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    def draw(length: int, features: int) -> Tensor:
        shape = (length, N, features)
        if module.batch_first:
            shape = (N, length, features)
        return torch.randn(shape if batched else (length, features), dtype=dtype)

    if same:
        return [draw(length, E)] * 3
    return [draw(length, E), draw(S, module.kdim), draw(S, module.vdim)]


def run(module: nn.Module, tensors: list[Tensor], **options: Any) -> dict[str, Tensor]:
    """Output, weights, and the gradient of a function of both, by inputs, masks and parameters."""
    leaves = {id(x): x.clone().requires_grad_() for x in tensors}
    masks = {
        name: option.clone().requires_grad_()
        for name, option in options.items()
        if isinstance(option, Tensor) and option.is_floating_point()
    }
    out, weights = module(*(leaves[id(x)] for x in tensors), **options | masks)
    results = {"out": out.detach()}
    loss = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum()
    if weights is not None:
        results["weights"] = weights.detach()
        cotangent = torch.linspace(-1, 1, weights.numel(), dtype=out.dtype)
        loss = loss + (weights * cotangent.view_as(weights)).sum()
    wanted = {f"input{i}": x for i, x in enumerate(leaves.values())}
    wanted |= masks | dict(module.named_parameters())
    grads = torch.autograd.grad(loss, list(wanted.values()))
    return results | {f"d {name}": grad for name, grad in zip(wanted, grads, strict=True)}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, reference in expected.items():
        torch.testing.assert_close(
            actual[name], reference, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
        )


def masks(kind: str, batched: bool, heads: int, length: int, dtype: torch.dtype) -> dict[str, Any]:
    """Masks that leave every query a key to see, in torch's convention: True hides."""
    keys = S if length == L else length
    attn, padding = torch.rand(length, keys) < 0.4, torch.rand(N, keys) < 0.4
    attn[:, 0] = padding[:, 0] = False
    per_head = torch.rand(N * heads if batched else heads, length, keys) < 0.4
    per_head[..., 0] = False
    padding = padding if batched else padding[0]

    def floating(mask: Tensor) -> Tensor:
        return torch.randn(mask.shape, dtype=dtype).masked_fill(mask, -torch.inf)

    return {
        "none": {},
        "attn": {"attn_mask": attn},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": attn, "key_padding_mask": padding},
        "per_head": {"attn_mask": per_head, "key_padding_mask": padding},
        "float_attn": {"attn_mask": floating(attn)},
        "float_both": {"attn_mask": floating(per_head), "key_padding_mask": floating(padding)},
    }[kind]


MASKS = ("none", "attn", "padding", "both", "per_head", "float_attn", "float_both")


def test_signatures_are_torchs() -> None:
    for name in ("__init__", "forward"):
        host = inspect.signature(getattr(nn.MultiheadAttention, name)).parameters
        ours = inspect.signature(getattr(FlashMultiheadAttention, name)).parameters
        added = [p for p in ours if p not in host]
        assert added == (["backend"] if name == "__init__" else [])
        for key, parameter in host.items():
            assert (ours[key].kind, ours[key].default) == (parameter.kind, parameter.default), key


@pytest.mark.parametrize(
    ("name", "mask"),
    [("plain", mask) for mask in MASKS]
    + [(name, mask) for name in CONSTRUCTORS if name != "plain" for mask in ("none", "both")]
    + [("both_extras", "float_both")],
)
def test_results_and_gradients(name: str, mask: str) -> None:
    torch.manual_seed(0)
    options = CONSTRUCTORS[name]
    host, ours = pair(**options)
    for batched, need_weights in itertools.product((True, False), repeat=2):
        tensors = inputs(host, batched=batched)
        call = masks(mask, batched, host.num_heads, L, torch.float64)
        for average in (True, False) if need_weights else (True,):
            call |= {"need_weights": need_weights, "average_attn_weights": average}
            assert_same(run(ours, tensors, **call), run(host, tensors, **call))


def test_masks_of_two_dtypes_meet() -> None:
    """What torch has deprecated: here a bool mask is its -inf mask."""
    host, ours = pair()
    tensors = inputs(host)
    as_bool = masks("both", True, H, L, torch.float64)
    as_float = {
        name: torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask, -torch.inf)
        for name, mask in as_bool.items()
    }
    expected = host(*tensors, **as_bool)
    for name in as_bool:
        torch.testing.assert_close(ours(*tensors, **as_bool | {name: as_float[name]}), expected)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True, "add_zero_attn": True}], ids=str)
def test_causal_hint(options: dict[str, Any], need_weights: bool) -> None:
    torch.manual_seed(1)
    host, ours = pair(batch_first=True, **options)
    tensors = inputs(host, same=True)
    causal = torch.ones(L, L, dtype=torch.bool).triu(1)
    padding = torch.zeros(N, L, dtype=torch.bool)
    padding[1, 3:] = True
    for key_padding_mask in (None, padding):
        call = {
            "attn_mask": causal,
            "is_causal": True,
            "need_weights": need_weights,
            "key_padding_mask": key_padding_mask,
        }
        assert_same(run(ours, tensors, **call), run(host, tensors, **call))


@pytest.mark.parametrize("need_weights", [True, False])
def test_causal_hint_needs_no_mask(need_weights: bool) -> None:
    host, ours = pair(batch_first=True)
    tensors = inputs(host, same=True)
    expected = run(
        host,
        tensors,
        attn_mask=nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64).detach(),
        need_weights=need_weights,
    )
    expected.pop("d attn_mask")
    assert_same(run(ours, tensors, is_causal=True, need_weights=need_weights), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("need_weights", [True, False])
def test_accuracy_in_lower_precision(dtype: torch.dtype, need_weights: bool) -> None:
    torch.manual_seed(2)
    reference, _ = pair(batch_first=True)
    host, ours = (copy.deepcopy(module).to(dtype) for module in pair(batch_first=True))
    for module in (host, ours):
        module.load_state_dict(reference.state_dict())
    reference.load_state_dict(host.state_dict())  # the rounded weights
    x = torch.randn(N, 40, E, dtype=dtype)
    results = [
        run(module, [x.to(wanted)] * 3, need_weights=need_weights)
        for module, wanted in ((ours, dtype), (host, dtype), (reference, torch.float64))
    ]
    for name, expected in results[2].items():
        factor = 3 if name.startswith("d ") else 2
        assert_accurate(name, results[0][name], results[1][name], expected, factor)


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("mask", ["none", "both", "float_both"])
def test_weights_block_by_block(average: bool, mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one query, recomputed in the backward pass, give what one block gives."""
    torch.manual_seed(3)
    host, ours = pair()
    tensors = inputs(host)
    call = masks(mask, True, H, L, torch.float64) | {"average_attn_weights": average}
    monkeypatch.setattr(weights_room, "WEIGHTS_AT_ONCE", 2 * N * H * S)
    assert_same(run(ours, tensors, **call), run(host, tensors, **call))
    with torch.no_grad():
        torch.testing.assert_close(ours(*tensors, **call)[1], host(*tensors, **call)[1])


def test_weights_of_a_long_sequence_hold_no_score_matrix() -> None:
    """Nothing of size (H, L, L) is made where the weights are averaged."""
    from torch.utils._python_dispatch import TorchDispatchMode

    length, biggest = 2048, 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            nonlocal biggest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                biggest = max(biggest, result.untyped_storage().nbytes() // result.itemsize)
            return result

    module = FlashMultiheadAttention(16, 8, batch_first=True)
    x = torch.randn(1, length, 16, requires_grad=True)
    with Sizes():
        _, weights = module(x, x, x)
        weights.square().sum().backward()
    assert weights.shape == (1, length, length)
    assert biggest == max(length * length, weights_room.WEIGHTS_AT_ONCE) < 8 * length * length


def test_a_query_that_sees_nothing() -> None:
    """0, weights of 0 and finite gradients; torch gives NaN with weights, 0 without."""
    host, ours = pair(batch_first=True)
    x = torch.randn(N, L, E, dtype=torch.float64)
    padding = torch.zeros(N, L, dtype=torch.bool)
    padding[1] = True
    for need_weights in (True, False):
        call = {"key_padding_mask": padding, "need_weights": need_weights}
        actual, expected = run(ours, [x] * 3, **call), run(host, [x] * 3, **call)
        assert all(result.isfinite().all() for result in actual.values())
        torch.testing.assert_close(actual["out"][1], ours.out_proj.bias.detach().expand(L, E))
        if need_weights:
            assert (actual["weights"][1] == 0).all()
            assert expected["out"][1].isnan().all()
        else:
            assert_same(actual, expected)


def test_dropout_follows_train_and_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    host, ours = pair(dropout=0.5, batch_first=True)
    x = torch.randn(N, 64, E, dtype=torch.float64)
    torch.manual_seed(4)
    out, weights = ours(x, x, x, average_attn_weights=False)
    torch.manual_seed(4)
    again, _ = ours(x, x, x, average_attn_weights=False)
    assert torch.equal(out, again)
    with monkeypatch.context() as patch:  # blocks of two queries drop the same weights
        patch.setattr(weights_room, "WEIGHTS_AT_ONCE", 2 * N * H * 64)
        torch.manual_seed(4)
        torch.testing.assert_close(ours(x, x, x, average_attn_weights=False)[1], weights)
    # The weights are those the output was made with: half of them 0, the rest doubled.
    assert 0.45 < (weights == 0).double().mean() < 0.55
    v = torch.nn.functional.linear(
        x, *(p.chunk(3)[2] for p in (ours.in_proj_weight, ours.in_proj_bias))
    )
    heads = weights @ v.unflatten(-1, (H, -1)).transpose(1, 2)
    torch.testing.assert_close(ours.out_proj(heads.transpose(1, 2).flatten(2)), out)
    kept = weights != 0
    host.eval()
    undropped = host(x, x, x, average_attn_weights=False)[1]
    torch.testing.assert_close(weights[kept], 2 * undropped[kept])
    assert not torch.equal(ours(x, x, x, need_weights=False)[0], out)
    ours.eval()
    for need_weights in (True, False):
        call = {"need_weights": need_weights}
        assert_same(run(ours, [x] * 3, **call), run(host, [x] * 3, **call))


def test_inference_matches_torchs_fast_path() -> None:
    host, ours = pair(batch_first=True, dtype=torch.float32)
    host.eval(), ours.eval()
    x = torch.randn(N, L, E)
    padding = torch.zeros(N, L, dtype=torch.bool)
    padding[0, 4:] = True
    with torch.inference_mode():
        for call in ({}, {"need_weights": False}, {"key_padding_mask": padding}):
            actual, expected = ours(x, x, x, **call), host(x, x, x, **call)
            torch.testing.assert_close(actual, expected)


def test_state_dict_goes_both_ways_and_starts_alike() -> None:
    for options in CONSTRUCTORS.values():
        options = {"embed_dim": E, "num_heads": H} | options
        torch.manual_seed(5)
        host = nn.MultiheadAttention(**options)
        torch.manual_seed(5)
        ours = FlashMultiheadAttention(**options)
        assert list(host.state_dict()) == list(ours.state_dict())
        for name, value in host.state_dict().items():
            assert torch.equal(value, ours.state_dict()[name]), name
        torch.manual_seed(6)
        host._reset_parameters()
        torch.manual_seed(6)
        ours._reset_parameters()
        host.load_state_dict(ours.state_dict(), strict=True)
        ours.load_state_dict(host.state_dict(), strict=True)
        assert isinstance(ours, nn.MultiheadAttention)
        for module in (copy.deepcopy(ours), copy.copy(ours), ours):
            assert module.backend == "auto"


def test_strided_and_empty_inputs() -> None:
    host, ours = pair()
    wide = torch.randn(L, N, 2 * E, dtype=torch.float64)
    assert_same(run(ours, [wide[..., ::2]] * 3), run(host, [wide[..., ::2]] * 3))
    for need_weights in (True, False):
        out, weights = ours(wide[:0, :, :E], *[wide[..., :E]] * 2, need_weights=need_weights)
        assert out.shape == (0, N, E)
        assert weights is None or weights.shape == (N, 0, L)
        out, weights = ours(wide[..., :E], *[wide[:0, :, :E]] * 2, need_weights=need_weights)
        torch.testing.assert_close(out, ours.out_proj.bias.expand(L, N, E))


def test_autocast() -> None:
    host, ours = pair(dtype=torch.float32, batch_first=True)
    x = torch.randn(N, L, E)
    reference = copy.deepcopy(host).double()(*[x.double()] * 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, expected = ours(x, x, x), host(x, x, x)
    for name, a, b, c in zip(("out", "weights"), actual, expected, reference, strict=True):
        assert_accurate(name, a, b, c, 2)


@pytest.mark.parametrize("need_weights", [True, False])
def test_compiles_without_a_break(need_weights: bool) -> None:
    torch._dynamo.reset()
    _, ours = pair(dtype=torch.float32, batch_first=True)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x = torch.randn(N, L, E)
    padding = torch.zeros(N, L, dtype=torch.bool)
    padding[0, 4:] = True
    call = {"key_padding_mask": padding, "need_weights": need_weights}
    actual, expected = (run(module, [x] * 3, **call) for module in (compiled, ours))
    for name, result in expected.items():
        torch.testing.assert_close(
            actual[name.replace("d ", "d _orig_mod.") if "proj" in name else name], result
        )
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, x, x, **call)[0], ours(x, x, x, **call)[0])


X = torch.zeros(L, N, E)
# torch's constructor of nested tensors calls itself a prototype.
with_nested_tensors = pytest.mark.filterwarnings(
    "ignore:The PyTorch API of nested tensors:UserWarning"
)
HIDDEN = torch.zeros(N, N, dtype=torch.bool)


def nested(m: nn.Module, *others: Tensor, **options: Any) -> Any:
    x = torch.nested.nested_tensor([X[0], X[1]])
    with torch.set_grad_enabled(not options and not others):
        return m(x, *(others or (x, x)), **options)


# name: (a call that torch rejects too, this library's error, its message)
BAD_CALLS = {
    "dimensions": (lambda m: m(X, X[0], X[0]), ValueError, "but found 2-D and 2-D tensors"),
    "features": (lambda m: m(X, X[..., :4], X), ValueError, r"key must have 16 features.*4\)"),
    "query_features": (lambda m: m(X[..., :4], X, X), ValueError, "query must have 16 features"),
    "lengths": (lambda m: m(X, X, X[:2]), ValueError, "key and value must agree"),
    "batch": (lambda m: m(X, X[:, :1], X[:, :1]), ValueError, "one batch size"),
    "no_tensor": (lambda m: m(X, X, None), TypeError, "value must be a torch.Tensor"),
    "padding": (
        lambda m: m(X, X, X, key_padding_mask=torch.zeros(L, N)),
        ValueError,
        r"key_padding_mask must be \(3, 6\), got \(6, 3\)",
    ),
    "padding_dimensions": (
        lambda m: m(X, X, X, key_padding_mask=torch.zeros(L)),
        ValueError,
        "expected `key_padding_mask` to be `None` or 2-D but found 1-D",
    ),
    "attn_mask": (
        lambda m: m(X, X, X, attn_mask=torch.zeros(N, L, L)),
        ValueError,
        r"attn_mask must be \(6, 6\) or \(12, 6, 6\), got \(3, 6, 6\)",
    ),
    "attn_mask_dimensions": (
        lambda m: m(X, X, X, attn_mask=torch.zeros(L)),
        ValueError,
        "expected `attn_mask` to be `None`, 2-D or 3-D but found 1-D",
    ),
    "mask_dtype": (
        lambda m: m(X, X, X, attn_mask=torch.zeros(L, L, dtype=torch.uint8)),
        TypeError,
        "attn_mask must be bool or floating, got torch.uint8",
    ),
    "nested_gradient": (
        nested,
        ValueError,
        "does not support NestedTensor.*grad is enabled and .* biases requires_grad; pass",
    ),
    "nested_mask": (
        lambda m: nested(m, attn_mask=HIDDEN),
        ValueError,
        "does not support NestedTensor.* attn_mask or key_padding_mask is given",
    ),
    "nested_padding": (
        lambda m: nested(m, key_padding_mask=HIDDEN[:2]),
        ValueError,
        "does not support NestedTensor.* attn_mask or key_padding_mask is given",
    ),
    "nested_cross": (
        lambda m: nested(m, X, X),
        ValueError,
        "does not support NestedTensor.* not the same tensor",
    ),
}


def error_of(call: Any) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - any, to be looked at
        call()
    return caught.value


@with_nested_tensors
@pytest.mark.parametrize(("call", "error", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_a_wrong_call_raises_what_torch_raises_and_names_the_argument(
    call: Any, error: Any, message: str
) -> None:
    batch_first = "NestedTensor" in message
    host, ours = (
        cls(E, H, batch_first=batch_first).eval()
        for cls in (nn.MultiheadAttention, FlashMultiheadAttention)
    )
    raised = error_of(lambda: call(ours))
    assert isinstance(raised, error)
    assert re.search(message, str(raised))
    expected = type(error_of(lambda: call(host)))
    if expected is not AttributeError:  # of None, by accident
        assert isinstance(raised, expected)


@with_nested_tensors
def test_a_jagged_tensor_is_rejected() -> None:
    x = torch.nested.nested_tensor([X[0], X[1]], layout=torch.jagged)
    with torch.no_grad(), pytest.raises(ValueError, match="it has the jagged layout"):
        FlashMultiheadAttention(E, H, batch_first=True)(x, x, x)


@with_nested_tensors
@torch.no_grad()
def test_nested_tensors_of_empty_sequences() -> None:
    ours = FlashMultiheadAttention(E, H, batch_first=True).eval()
    x = torch.nested.nested_tensor([torch.empty(0, E)] * 2)
    out, weights = ours(x, x, x, average_attn_weights=False)
    assert [len(sequence) for sequence in out.unbind()] == [0, 0]
    assert weights.shape == (2, H, 0, 0)
    with pytest.raises(ValueError, match="it has 1 dimensions and not 3"):
        ours(*[torch.nested.nested_tensor([])] * 3)


@torch.no_grad()
def test_biases_may_be_of_another_dtype_than_the_weights() -> None:
    host, ours = pair(batch_first=True)
    for module in (host.eval(), ours.eval()):
        module.in_proj_bias = nn.Parameter(module.in_proj_bias.half())
    x = torch.randn(N, L, E, dtype=torch.float64)
    torch.testing.assert_close(ours(x, x, x), host(x, x, x))


@pytest.mark.parametrize("options", [{}, {"kdim": 10}], ids=str)
def test_projections_of_some_heads_only_are_refused(options: dict[str, Any]) -> None:
    """Weights that were cut to a rank's heads."""
    ours = FlashMultiheadAttention(E, H, bias=False, **options)
    if options:
        ours.k_proj_weight = nn.Parameter(ours.k_proj_weight[: E // 2])
    else:
        ours.in_proj_weight = nn.Parameter(ours.in_proj_weight[: 3 * E // 2])
    x = torch.randn(L, N, E)
    key = torch.randn(L, N, ours.kdim)
    for error in (ValueError, RuntimeError):
        with pytest.raises(error, match=r"must make embed_dim=16 features, got 8"):
            ours(x, key if options else x, x)


def test_code_that_reads_the_module_finds_torchs_attributes() -> None:
    """What is passed on to F.multi_head_attention_forward, or asked by adapters."""
    for options in CONSTRUCTORS.values():
        host, ours = pair(**options)
        for name, value in vars(host).items():
            if not name.startswith("_") or name == "_qkv_same_embed_dim":
                assert vars(ours)[name] == value, name
