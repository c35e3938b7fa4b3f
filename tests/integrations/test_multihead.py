"""FlashMultiheadAttention against torch.nn.MultiheadAttention."""

import copy
import inspect
import itertools
from typing import Any

import pytest
import torch
from torch import nn

from flashlayer import FlashMultiheadAttention
from flashlayer.testing import assert_accurate
from tests.integrations.multihead import (
    CONSTRUCTORS,
    E,
    H,
    L,
    N,
    assert_same,
    inputs,
    masks,
    pair,
    run,
)

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


@torch.no_grad()
def test_biases_may_be_of_another_dtype_than_the_weights() -> None:
    host, ours = pair(batch_first=True)
    for module in (host.eval(), ours.eval()):
        module.in_proj_bias = nn.Parameter(module.in_proj_bias.half())
    x = torch.randn(N, L, E, dtype=torch.float64)
    torch.testing.assert_close(ours(x, x, x), host(x, x, x))


def test_code_that_reads_the_module_finds_torchs_attributes() -> None:
    """What is passed on to F.multi_head_attention_forward, or asked by adapters."""
    for options in CONSTRUCTORS.values():
        host, ours = pair(**options)
        for name, value in vars(host).items():
            if not name.startswith("_") or name == "_qkv_same_embed_dim":
                assert vars(ours)[name] == value, name
