"""The public accuracy rule and gradient check pass what is right and catch planted errors."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flashlayer import FlashAttention, FlashMultiheadAttention, flash_attention
from flashlayer.testing import assert_accurate, assert_attention_close, compare, gradcheck, run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("standard", "tiled", "aten", "triton")
CPU_SECONDS = 10.0  # of a check; the interpreter's time on one core


def qkv(dtype: torch.dtype = torch.float32, *, seqlen: int = 33) -> list[Tensor]:
    return [torch.randn(1, 2, seqlen, 16, dtype=dtype) for _ in range(3)]


class Formula(torch.autograd.Function):
    """Attention written down naively, with an error that ``planted`` names."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, planted: str
    ) -> tuple[Tensor, Tensor]:
        scores = q @ k.mT * q.shape[-1] ** -0.5 + mask
        p, lse = scores.softmax(-1), scores.logsumexp(-1)
        ctx.save_for_backward(q, k, v, mask, p)
        ctx.planted = planted
        return p @ v, lse

    @staticmethod
    def backward(ctx: Any, do: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, p = ctx.saved_tensors
        planted, scale = ctx.planted, q.shape[-1] ** -0.5
        dp = do @ v.mT
        delta = (dp * p).sum(-1, keepdim=True) - (dlse.unsqueeze(-1) if planted != "dlse" else 0)
        ds = p * (dp - delta)
        dq = ds @ k * (scale if planted != "scale" else 1.0)
        dk, dv = ds.mT @ q * scale, p.mT @ do
        if planted == "element":
            dk[0, 1, 3, 2] += 1e-4
        if planted == "nan":
            dv[0, 1, 5] = torch.nan
        dmask = ds.sum_to_size(mask.shape) if planted != "mask" else ds[:, :1]
        return dq, dk, dv, dmask, None


def planted(error: str) -> Callable[..., tuple[Tensor, Tensor]]:
    def attention(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        mask = query.new_zeros(1, 1, 1, 1) if attn_mask is None else attn_mask
        return Formula.apply(query, key, value, mask, error)

    return attention


MASK = torch.linspace(-2, 2, 81).view(1, 1, 9, 9)

PLANTED = {
    "scale": r"the gradient of out with respect to query is wrong: \[0, 0, 0, 0\] is ",
    "dlse": r"the gradient of lse with respect to query is wrong: \[0, 0, 0, 0\] is 0, expected ",
    "mask": r"the gradient of out with respect to attn_mask is wrong: \[0, 0, 0, 0\] is ",
    "element": r"the gradient of out with respect to key is wrong: \[0, 1, 3, 2\] is ",
    "nan": r"the gradient of out with respect to value is wrong: \[0, 1, 5, 0\] is nan, expected ",
}


@pytest.mark.parametrize("second_order", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_passes_in_ten_seconds(backend: str, second_order: bool) -> None:
    start = time.process_time()
    tensors = torch.randn(3, 1, 2, 9, 8, device=DEVICE).unbind() if DEVICE == "cuda" else ()
    if backend == "triton" or DEVICE == "cpu":
        assert gradcheck(backend, *tensors, causal=True, second_order=second_order)
    assert time.process_time() - start < CPU_SECONDS


@pytest.mark.parametrize("backend", ["standard", "tiled", "triton"])
def test_gradcheck_of_every_differentiable_option(backend: str) -> None:
    start = time.process_time()
    options = {"attn_mask": MASK.to(DEVICE), "sinks": torch.randn(2, device=DEVICE)}
    tensors = torch.randn(3, 1, 2, 9, 8, device=DEVICE).unbind()
    options |= {"softcap": 5.0, "window_size": (4, 1), "dropout_p": 0.25}
    assert gradcheck(backend, *tensors, **options, second_order=backend != "triton")
    assert time.process_time() - start < CPU_SECONDS


def test_gradcheck_where_rows_see_no_key_and_of_packed_sequences() -> None:
    q, k, v = torch.randn(1, 4, 6, 5), torch.randn(1, 2, 3, 5), torch.randn(1, 2, 3, 7)
    assert gradcheck("tiled", q, k, v, causal=True, second_order=True)
    packed, edges = torch.randn(3, 14, 2, 8), torch.tensor([0, 5, 5, 12])
    slopes = torch.tensor([0.5, 0.25])
    assert gradcheck("tiled", *packed, cu_seqlens_q=edges, alibi_slopes=slopes)


@pytest.mark.parametrize(
    "module",
    [
        FlashAttention(16, 2, causal=True, rotary_base=1e4, qk_norm=True, sinks=True),
        FlashAttention(16, 2, dropout=0.3),
        FlashAttention(16, 2, num_kv_heads=1, backend="triton").to(DEVICE),
    ],
    ids=["options", "dropout", "triton"],
)
def test_gradcheck_of_a_module_and_its_parameters(module: FlashAttention) -> None:
    x = torch.randn(2, 5, 16, device=next(module.parameters()).device)
    assert gradcheck(module, x, second_order=x.is_cpu and module.backend != "triton")
    assert module.training
    assert all(weight.dtype == torch.float32 for weight in module.parameters())


def test_gradcheck_of_other_modules_and_functions() -> None:
    inputs = torch.randn(3, 2, 5, 16).unbind()
    assert gradcheck(FlashMultiheadAttention(16, 2, batch_first=True), *inputs)
    assert gradcheck(torch.nn.functional.scaled_dot_product_attention, is_causal=True)
    assert gradcheck(planted("nothing"), attn_mask=MASK)


@pytest.mark.parametrize("error", PLANTED)
def test_gradcheck_names_the_first_wrong_element(error: str) -> None:
    with pytest.raises(AssertionError, match=PLANTED[error]):
        gradcheck(planted(error), attn_mask=MASK)


def test_gradcheck_gives_the_value_that_was_expected() -> None:
    """A query's gradient without the scale is sqrt(8) times too large."""
    with pytest.raises(AssertionError, match="wrong") as error:
        gradcheck(planted("scale"))
    found, expected = (
        float(str(error.value).split(before)[1].split()[0].rstrip(","))
        for before in ("] is ", "expected ")
    )
    assert abs(found / expected - 8**0.5) < 1e-5


def test_gradcheck_of_a_wrong_second_derivative() -> None:
    class Constant(torch.autograd.Function):
        """x^2, whose gradient is 2x as a number and not as a function."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x**2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * 2 * ctx.saved_tensors[0].detach()

    def attention(x: Tensor) -> Tensor:
        return Constant.apply(x)

    assert gradcheck(attention, torch.randn(3))
    with pytest.raises(AssertionError, match="the gradient of dx with respect to x is wrong"):
        gradcheck(attention, torch.randn(3), second_order=True)


def test_gradcheck_wants_fp64_throughout() -> None:
    def narrow(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return flash_attention(query.float(), key.float(), value.float())

    with pytest.raises(AssertionError, match=r"out must be fp64 .*, got torch\.float32"):
        gradcheck(narrow)
    with pytest.raises(AssertionError, match="out has elements that are NaN or infinite"):
        gradcheck(lambda query, key, value: query / 0)
    with pytest.raises(TypeError, match="inputs must be given for a module, got none"):
        gradcheck(FlashAttention(16, 2))


def test_gradcheck_leaves_the_generator_and_the_inputs_alone() -> None:
    x = torch.randn(1, 2, 9, 8)
    before, values = torch.random.get_rng_state(), x.clone()
    gradcheck("tiled", x, x, x, dropout_p=0.5)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(x, values)
    assert not x.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_an_attention_is_judged_as_a_function_or_by_its_results(dtype: torch.dtype) -> None:
    q, k, v = qkv(dtype)
    options = {"causal": True, "sinks": torch.randn(2, dtype=dtype), "with_noise": True}

    def mine(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
        return flash_attention(query, key, value, backend="tiled", return_lse=True, **options)

    results = assert_attention_close(mine, q, k, v, **options)
    assert list(results) == ["out", "lse", "dq", "dk", "dv", "dsinks"]
    assert_attention_close("tiled", q, k, v, **options)
    assert_attention_close(flash_attention, q, k, v, **options)
    own = {name: option for name, option in options.items() if name != "with_noise"}
    out, lse = mine(q, k, v, **own)
    assert_attention_close(out, q, k, v, **options)
    assert_attention_close((out, lse), q, k, v, **options)
    assert_attention_close({"lse": lse}, q, k, v, **options)
    do, dlse = torch.randn_like(out), torch.randn_like(lse)
    results = run(mine, q, k, v, do, dlse, **own)
    assert_attention_close(results, q, k, v, grad_out=do, grad_lse=dlse, **options)
    with pytest.raises(AssertionError, match=r"dq\[0, 0, .* elements are off by more than"):
        assert_attention_close(results, q, k, v, grad_out=do, **own)  # without dlse


def test_a_function_may_return_out_alone() -> None:
    q, k, v = qkv(torch.bfloat16)
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def mine(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return sdpa(query, key, value, is_causal=causal)

    assert sorted(assert_attention_close(mine, q, k, v, causal=True)) == ["dk", "dq", "dv", "out"]
    detached = assert_attention_close(
        lambda *tensors, causal: mine(*tensors, causal).detach(),
        q,
        k,
        v,
        causal=True,
        gradients=False,
    )
    assert list(detached) == ["out"]


@pytest.mark.parametrize("error", ["scale", "dlse", "nan"])
def test_a_wrong_gradient_is_named(error: str) -> None:
    wrong = {"scale": "dq", "dlse": "dq", "nan": "dv"}[error]
    q, k, v = qkv()
    assert_attention_close(planted("nothing"), q, k, v)
    with pytest.raises(AssertionError, match=rf"{wrong}\[0, .* of 1056 elements are off by more"):
        assert_attention_close(planted(error), q, k, v)


def test_the_message_names_tensor_index_values_bound_and_count() -> None:
    reference = torch.arange(6.0, dtype=torch.float64).view(2, 3)
    actual = reference.float()
    assert_accurate("out", actual, actual, reference, 2)
    actual = actual.clone()
    actual[1, 0] += 0.5
    actual[1, 2] = torch.nan
    with pytest.raises(AssertionError) as error:
        assert_accurate("out", actual, reference.float(), reference, 2)
    assert str(error.value) == (
        "out[1, 0] is 3.5, expected 3; "
        "2 of 6 elements are off by more than 1.19e-07, at most by inf"
    )
    for wrong, message in (
        (reference, "out has dtype torch.float64, expected torch.float32"),
        (actual[0], r"out has shape torch.Size\(\[3\]\), expected torch.Size\(\[2, 3\]\)"),
    ):
        with pytest.raises(AssertionError, match=message):
            assert_accurate("out", wrong, reference.float(), reference, 2)


def test_minus_infinity_must_stand_in_the_same_places() -> None:
    reference = torch.tensor([0.0, -torch.inf], dtype=torch.float64)
    for wrong in ([0.0, 0.0], [-torch.inf, -torch.inf], [0.0, torch.inf]):
        found = compare(torch.tensor(wrong), reference.float(), reference, 2)
        assert found.ratio == torch.inf
    assert compare(reference.float(), reference.float(), reference, 2).ratio == 0


def test_wrong_arguments() -> None:
    q, k, v = qkv()
    with pytest.raises(ValueError, match=r"results must be among out, lse, dq, .* got 'o'"):
        assert_attention_close({"o": q}, q, k, v)
    with pytest.raises(ValueError, match="grad_out must be given with gradients to compare"):
        assert_attention_close({"dq": q}, q, k, v)
    with pytest.raises(AssertionError, match="out has no gradient; gradients=False compares"):
        assert_attention_close(lambda *tensors: tensors[0].detach(), q, k, v)
