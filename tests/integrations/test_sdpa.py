"""sdpa.override against torch's scaled_dot_product_attention."""

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.functional import scaled_dot_product_attention as imported_by_name
from torch.utils.checkpoint import checkpoint

import flashlayer
from flashlayer.integrations.sdpa import override
from flashlayer.testing import FACTORS, GRADIENT_FACTOR, assert_accurate, exponential_error

SDPA = F.scaled_dot_product_attention


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype)


def bool_mask(*shape: int) -> Tensor:
    mask = torch.rand(shape) < 0.6
    mask[..., 0] = True
    return mask


# name: (query, key, value, options); L = 5 queries, S = 7 keys
CASES: dict[str, Any] = {
    "plain": lambda: (draw(2, 3, 5, 8), draw(2, 3, 7, 8), draw(2, 3, 7, 8), {}),
    "value_dim": lambda: (draw(2, 3, 5, 8), draw(2, 3, 7, 8), draw(2, 3, 7, 4), {}),
    "scale": lambda: (*draw(3, 2, 3, 5, 8).unbind(), {"scale": 0.3}),
    "scale_int": lambda: (*draw(3, 2, 3, 5, 8).unbind(), {"scale": 1}),
    "causal": lambda: (*draw(3, 2, 3, 5, 8).unbind(), {"is_causal": True}),
    "causal_wide": lambda: (
        draw(2, 3, 5, 8), draw(2, 3, 7, 8), draw(2, 3, 7, 8), {"is_causal": True}
    ),
    "causal_tall": lambda: (
        draw(2, 3, 7, 8), draw(2, 3, 5, 8), draw(2, 3, 5, 8), {"is_causal": True}
    ),
    "gqa": lambda: (
        draw(2, 6, 5, 8), draw(2, 2, 7, 8), draw(2, 2, 7, 8), {"enable_gqa": True}
    ),
    "gqa_3d": lambda: (draw(6, 5, 8), draw(2, 7, 8), draw(2, 7, 8), {"enable_gqa": True}),
    "gqa_5d": lambda: (
        draw(2, 3, 4, 5, 8), draw(2, 3, 2, 7, 8), draw(2, 3, 2, 7, 8), {"enable_gqa": True}
    ),
    "2d": lambda: (draw(5, 8), draw(7, 8), draw(7, 8), {"attn_mask": bool_mask(5, 7)}),
    "3d": lambda: (draw(3, 5, 8), draw(3, 7, 8), draw(3, 7, 8), {"attn_mask": bool_mask(3, 5, 7)}),
    "3d_causal": lambda: (*draw(3, 3, 5, 8).unbind(), {"is_causal": True}),
    "5d": lambda: (
        draw(2, 3, 2, 5, 8), draw(2, 3, 2, 7, 8), draw(2, 3, 2, 7, 8),
        {"attn_mask": bool_mask(2, 3, 2, 5, 7)},
    ),
    "5d_mask_of_heads": lambda: (
        *draw(3, 2, 3, 2, 5, 8).unbind(), {"attn_mask": draw(2, 5, 5)}
    ),
    "5d_mask_partly_broadcast": lambda: (
        *draw(3, 2, 3, 2, 5, 8).unbind(), {"attn_mask": draw(2, 1, 2, 5, 5)}
    ),
    "6d_causal": lambda: (*draw(3, 2, 1, 2, 2, 5, 8).unbind(), {"is_causal": True}),
    "one_kv_head_broadcast": lambda: (draw(2, 3, 5, 8), draw(2, 1, 7, 8), draw(2, 1, 7, 8), {}),
    "batch_broadcast": lambda: (draw(1, 3, 5, 8), draw(4, 3, 7, 8), draw(4, 3, 7, 8), {}),
    "fewer_dimensions": lambda: (draw(2, 3, 5, 8), draw(3, 7, 8), draw(7, 8), {}),
    "bool_mask": lambda: (
        draw(2, 3, 5, 8), draw(2, 3, 7, 8), draw(2, 3, 7, 8), {"attn_mask": bool_mask(2, 1, 1, 7)}
    ),
    "float_mask": lambda: (
        draw(2, 3, 5, 8), draw(2, 3, 7, 8), draw(2, 3, 7, 8), {"attn_mask": draw(3, 5, 7)}
    ),
    "rows_hidden": lambda: (
        *draw(3, 2, 3, 5, 8).unbind(),
        {"attn_mask": torch.tensor([1, 0, 1, 0, 1]).bool()[:, None].expand(5, 5)},
    ),
    "rows_at_minus_infinity": lambda: (
        *draw(3, 2, 3, 5, 8).unbind(),
        {"attn_mask": torch.zeros(5, 5).double().index_fill(0, torch.tensor([1]), -torch.inf)},
    ),
    "no_keys": lambda: (draw(2, 3, 5, 8), draw(2, 3, 0, 8), draw(2, 3, 0, 8), {}),
    "no_queries": lambda: (draw(2, 3, 0, 8), draw(2, 3, 7, 8), draw(2, 3, 7, 8), {}),
    "no_batch": lambda: (*draw(3, 0, 3, 5, 8).unbind(), {}),
    "no_batch_5d": lambda: (*draw(3, 2, 0, 3, 5, 8).unbind(), {}),
    "transposed": lambda: (*draw(3, 2, 5, 3, 8).transpose(2, 3).unbind(), {}),
}  # fmt: skip


def results(call: Any, tensors: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
    """Output and the gradients of query, key, value and a float mask."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    mask = options.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        leaves.append(mask.detach().clone().requires_grad_())
        options = options | {"attn_mask": leaves[-1]}
    out = call(*leaves[:3], **options)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_routed_calls_give_torchs_results(make: Any) -> None:
    torch.manual_seed(0)
    *tensors, options = make()
    expected = results(SDPA, tensors, options)
    with override() as routing:
        actual = results(F.scaled_dot_product_attention, tensors, options)
    assert routing.report() == (1, {})
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    with override(backend="tiled"), torch.no_grad():
        torch.testing.assert_close(SDPA(*tensors, **options), expected[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
def test_accuracy_in_lower_precision(dtype: torch.dtype, masked: bool) -> None:
    torch.manual_seed(1)
    options = {"attn_mask": bool_mask(40, 40)} if masked else {"is_causal": True}
    tensors = [draw(2, 3, 40, 16, dtype=dtype) for _ in range(3)]
    # The formula in this dtype, not torch's fused kernel: it keeps its probabilities in fp32.
    layout = {"causal": True} if "is_causal" in options else options
    same = results(
        lambda *x, **_: flashlayer.flash_attention(*x, **layout, backend="standard"), tensors, {}
    )
    exact = results(SDPA, [x.double() for x in tensors], options)
    with override() as routing:
        actual = results(SDPA, tensors, options)
    assert routing.report().routed == 1
    exponential = {}
    if flashlayer.available_backends(*tensors, **layout)["aten"] is None:
        wide = [x.double() for x in tensors]
        do, dlse = 2 * exact[0], torch.zeros_like(exact[0][..., 0])  # of the sum of squares
        exponential = exponential_error(*wide, do, dlse, dtype=dtype, **layout)
    for name, a, b, c in zip(("out", "dq", "dk", "dv"), actual, same, exact, strict=True):
        factor = FACTORS.get(name, GRADIENT_FACTOR)
        assert_accurate(name, a, b, c, factor, exponential.get(name, 0.0))


@pytest.mark.parametrize("lengths", [(5, 5), (3, 7), (7, 3)], ids=str)
@pytest.mark.parametrize("bias", [causal_lower_right, causal_upper_left])
@pytest.mark.filterwarnings("ignore:Lower right causal bias:UserWarning")
def test_causal_biases_are_routed(bias: Any, lengths: tuple[int, int]) -> None:
    torch.manual_seed(2)
    tensors = [draw(2, 4, lengths[0], 8), *draw(2, 2, 2, lengths[1], 8)]
    options = {"attn_mask": bias(*lengths), "enable_gqa": True}

    def outputs(call: Any) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in tensors]
        out = call(*leaves, **options)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]

    expected = outputs(SDPA)
    with override() as routing:
        torch.testing.assert_close(outputs(SDPA), expected)
    assert routing.report() == (1, {})


@pytest.mark.parametrize(
    "option",
    [{"dropout_p": False}, {"dropout_p": torch.tensor(0.0)}, {"scale": True}, {"scale": 2}],
    ids=str,
)
def test_numbers_of_any_kind(option: dict[str, Any]) -> None:
    tensors = plain()
    with override() as routing:
        actual = SDPA(*tensors, **option)
    assert routing.report().routed == 1
    torch.testing.assert_close(actual, SDPA(*tensors, **option))


def test_a_float_mask_may_be_fp32_under_half_precision() -> None:
    tensors = draw(3, 2, 3, 5, 8, dtype=torch.bfloat16).unbind()
    mask = draw(5, 5, dtype=torch.float32)
    with override() as routing:
        out = SDPA(*tensors, attn_mask=mask)
    assert routing.report().routed == 1
    torch.testing.assert_close(out, SDPA(*tensors, attn_mask=mask), rtol=2e-2, atol=2e-2)


def plain(**kwargs: Any) -> list[Tensor]:
    return list(torch.randn(3, 2, 3, 5, 8, **kwargs).unbind())


class Subclass(Tensor):
    """A tensor with a mind of its own, as far as anybody knows."""


# name: (arguments, options, reason). Torch computes some of these and rejects the others.
LEFT: dict[str, Any] = {
    "mask_and_causal": (
        plain(), {"attn_mask": bool_mask(5, 5), "is_causal": True}, "together with is_causal"
    ),
    "nested": (
        [torch.nested.nested_tensor([torch.randn(3, 4, 8)], layout=torch.jagged)] * 3, {}, "nested"
    ),
    "sparse_mask": (
        plain(),
        {"attn_mask": torch.sparse_coo_tensor(size=(5, 5), check_invariants=True)},
        "a layout",
    ),
    "subclass": ([plain()[0].as_subclass(Subclass), *plain()[1:]], {}, "a tensor subclass"),
    "meta": (plain(device="meta"), {}, "the meta device"),
    "int": ([x.int() for x in plain()], {}, "query of torch.int32"),
    "complex": ([x + 0j for x in plain()], {}, "query of torch.complex64"),
    "dtypes": ([plain()[0], *(x.half() for x in plain()[1:])], {}, "more than one dtype"),
    "mask_dtype": (plain(), {"attn_mask": torch.zeros(5, 5).double()}, "attn_mask of torch.float6"),
    "mask_int": (plain(), {"attn_mask": torch.zeros(5, 5).int()}, "attn_mask of torch.int32"),
    "mask_shape": (plain(), {"attn_mask": torch.zeros(4, 5)}, "does not fit"),
    "mask_1d": (plain(), {"attn_mask": torch.zeros(5)}, "fewer than 2"),
    "mask_5d": (plain(), {"attn_mask": torch.zeros(1, 1, 1, 5, 5)}, "does not fit"),
    "heads_without_gqa": (
        [torch.randn(2, 4, 5, 8), *torch.randn(2, 2, 2, 5, 8)], {}, "do not fit together"
    ),
    "gqa_not_a_multiple": (
        [plain()[0], *torch.randn(2, 2, 2, 5, 8)], {"enable_gqa": True}, "do not fit together"
    ),
    "gqa_value_heads": (
        [torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 1, 5, 8)],
        {"enable_gqa": True},
        "different numbers of heads",
    ),
    "head_dim": ([plain()[0], *(x[..., :4] for x in plain()[1:])], {}, "do not fit together"),
    "head_dim_0": ([x[..., :0] for x in plain()], {}, "head dimension of 0"),
    "no_heads": ([x[:, :0] for x in plain()], {}, "0 heads"),
    "dropout": (plain(), {"dropout_p": 1.5}, "no probability"),
    "bias_of_other_lengths": (plain(), {"attn_mask": causal_upper_left(3, 5)}, "other lengths"),
    "bias_and_causal": (
        plain(), {"attn_mask": causal_upper_left(5, 5), "is_causal": True}, "together with"
    ),
    "scale_nan": (plain(), {"scale": float("nan")}, "not a finite number"),
}  # fmt: skip
if torch.__version__ < (2, 12):  # whose own SDPA of no heads ends the process
    del LEFT["no_heads"]


def outcome(call: Any) -> Any:
    try:
        return call()
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        return type(error), str(error).split("\n")[0]


# torch's constructor of nested tensors calls itself a prototype.
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize(("tensors", "options", "reason"), LEFT.values(), ids=LEFT)
def test_calls_left_to_torch(tensors: list[Any], options: dict[str, Any], reason: str) -> None:
    expected = outcome(lambda: SDPA(*tensors, **options))
    with override() as routing:
        actual = outcome(lambda: SDPA(*tensors, **options))
    routed, left = routing.report()
    assert routed == 0
    assert list(left.values()) == [1]
    assert reason in next(iter(left))
    if isinstance(expected, tuple):
        assert actual == expected
    elif not expected.is_nested and expected.device.type != "meta":
        torch.testing.assert_close(actual, expected, equal_nan=True)


def test_report_counts_by_reason() -> None:
    q, k, v = plain()
    with override() as routing:
        for _ in range(3):
            SDPA(q, k, v)
        SDPA(*(x.to("meta") for x in (q, k, v)))
        assert routing.report().routed == 3
    SDPA(q, k, v)  # outside
    report = routing.report()
    reason = "the meta device, or tensors on more than one device"
    assert report.left == {reason: 1}
    assert str(report) == f"3 routed to flashlayer\n1 left to torch: {reason}"
    assert override().report() == (0, {})


def test_callers_that_imported_the_name() -> None:
    with flashlayer.integrations.sdpa.override() as routing:
        imported_by_name(*plain())
        F.scaled_dot_product_attention(*plain())
        torch.nn.functional.scaled_dot_product_attention(*plain())
    assert routing.report().routed == 3
    assert F.scaled_dot_product_attention is SDPA is imported_by_name


def test_nesting_and_exceptions() -> None:
    q, k, v = plain()
    with override() as outer:
        with override(backend="tiled") as inner:
            SDPA(q, k, v)
        SDPA(q, k, v)
        broken = override()
        with pytest.raises(RuntimeError, match="must match the size"), broken:
            SDPA(q, k[:, :2], v)  # torch's own error, left to torch
        SDPA(q, k, v)
        with pytest.raises(ValueError, match="backend must be one of"), override(backend="none"):
            SDPA(q, k, v)
    SDPA(q, k, v)
    routed = [routing.report().routed for routing in (outer, inner, broken)]
    assert routed == [2, 1, 0]
    # The inner block leaves it to torch inside the outer block, which leaves it as well.
    assert len(broken.report().left) == len(outer.report().left) == 1
    with inner:  # may be entered again
        SDPA(q, k, v)
    assert inner.report().routed == 2


def test_other_threads_are_not_affected() -> None:
    inside, done = threading.Event(), threading.Event()
    counts = {}

    def work() -> None:
        with override() as routing:
            inside.set()
            done.wait(60)
            SDPA(*plain())
        counts["thread"] = routing.report().routed

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait(60)
    with override() as routing:
        SDPA(*plain())
        done.set()
        thread.join()
    assert (routing.report().routed, counts["thread"]) == (1, 1)


def test_dropout() -> None:
    q, k = torch.zeros(2, 1, 4, 64, 8)
    v = torch.eye(64).expand(1, 4, 64, 64)
    with override() as routing:
        torch.manual_seed(0)
        out = SDPA(q, k, v, dropout_p=0.25)
        torch.manual_seed(0)
        assert torch.equal(SDPA(q, k, v, dropout_p=0.25), out)
        assert (SDPA(q, k, v, dropout_p=1.0) == 0).all()
    assert routing.report().routed == 3
    assert 0.22 < (out == 0).float().mean() < 0.28
    torch.testing.assert_close(out[out != 0], torch.full_like(out[out != 0], 1 / 64 / 0.75))


def test_multihead_attention_inside() -> None:
    """Its fused fast path is off, and the SDPA it calls is routed."""
    torch.manual_seed(2)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    hidden = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    for context in (torch.enable_grad, torch.inference_mode):
        with context():
            expected = layer(x, src_key_padding_mask=hidden)
            with override() as routing:
                actual = layer(x, src_key_padding_mask=hidden)
                attended = layer.self_attn(x, x, x, need_weights=False)[0]
                layer.self_attn(x, x, x)  # with weights: no SDPA in there
            assert routing.report() == (2, {})
            torch.testing.assert_close(actual, expected)
            torch.testing.assert_close(attended, layer.self_attn(x, x, x)[0])


@pytest.mark.parametrize("how", ["grad", "backward", "loss.backward"])
def test_activation_checkpoints_recompute_inside_the_block(how: str) -> None:
    leaves = [x.requires_grad_() for x in plain()]
    with override() as routing:
        torch.manual_seed(3)
        loss = checkpoint(SDPA, *leaves, None, 0.5, use_reentrant=False).square().sum()
        if how == "grad":
            grads = torch.autograd.grad(loss, leaves)
        else:
            (torch.autograd.backward if how == "backward" else Tensor.backward)(loss)
            grads = tuple(x.grad for x in leaves)
        assert routing.report() == (2, {})
        torch.manual_seed(3)
        again = SDPA(*leaves, dropout_p=0.5)
    torch.testing.assert_close(grads, torch.autograd.grad(again.square().sum(), leaves))


def test_autocast() -> None:
    q, k, v = plain()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = SDPA(q, k.bfloat16(), v)
        with override() as routing:
            actual = SDPA(q, k.bfloat16(), v)
    assert routing.report().routed == 1
    assert actual.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected)


def test_vmap_and_jvp() -> None:
    q, k, v = draw(3, 4, 2, 3, 5, 8).unbind()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    expected = attend(q, k, v)
    with override() as routing:
        torch.testing.assert_close(torch.vmap(attend)(q, k, v), expected)
        out, tangent = torch.func.jvp(attend, (q, k, v), (q, k, v))
    torch.testing.assert_close(out, expected)
    assert tangent.isfinite().all()
    assert routing.report().routed == 2


@pytest.mark.parametrize("grad", [True, False])
def test_compiled_functions_know_the_block(grad: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *x: F.scaled_dot_product_attention(*x, is_causal=True) * 2,
        fullgraph=True,
        backend="aot_eager",
    )
    tensors = [x.requires_grad_(grad) for x in plain()]
    expected = SDPA(*tensors, is_causal=True) * 2
    with override(backend="tiled") as routing:
        torch.testing.assert_close(compiled(*tensors), expected)
        torch.testing.assert_close(compiled(*tensors), expected)
    routed = routing.report().routed
    assert routed == 2
    torch.testing.assert_close(compiled(*tensors), expected)
    assert routing.report().routed == routed

    @torch.compile(fullgraph=True, backend="aot_eager")
    def inside(*x: Tensor) -> Tensor:
        with override(backend="tiled"):
            return F.scaled_dot_product_attention(*x, is_causal=True) * 2

    torch.testing.assert_close(inside(*tensors), expected)


def test_multihead_attention_in_a_compiled_graph_is_left() -> None:
    torch._dynamo.reset()
    module = nn.MultiheadAttention(16, 4, batch_first=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 5, 16)
    expected = module(x, x, x, need_weights=False)[0]
    with override() as routing:
        torch.testing.assert_close(compiled(x, x, x, need_weights=False)[0], expected)
    routed, left = routing.report()
    assert routed == 0
    assert "swap_attention" in next(iter(left))
