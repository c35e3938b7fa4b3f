"""Forward mode through every backend: dtypes of tangents, and rows and options at the edges."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from flashlayer import AuxRequest, flash_attention, flash_attention_varlen
from flashlayer.testing import accuracy
from tests.tangents import check
from tests.test_accuracy import device_for

BACKENDS = ("triton", "aten", "tiled", "standard", "auto")
HALF = (torch.bfloat16, torch.float16)

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "mask": {"attn_mask": torch.randn(5, 5)},
    "dropout": {"dropout_p": 0.2, "dropout_seed": 3},
    "aux": {"return_aux": AuxRequest(lse=True, max_scores=True, entropy=True)},
    "packed": {"cu_seqlens_q": torch.tensor([0, 2, 2, 4])},
}


def on_device(backend: str, case: str) -> dict[str, Any]:
    device = device_for(backend)
    options = CASES[case].items()
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options}


def self_attention(backend: str, case: str) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """All results of a call whose query, key and value are one tensor."""
    options = on_device(backend, case)

    def attend(x: Tensor) -> tuple[Tensor, ...]:
        if "cu_seqlens_q" in options:
            x = x[0].transpose(0, 1)
            return (flash_attention_varlen(x, x, x, backend=backend, **options),)
        result = flash_attention(x, x, x, backend=backend, **options)
        return (result,) if isinstance(result, Tensor) else (result[0], *result[1])

    return attend


def skip_refused(backend: str, case: str) -> None:
    if backend == "aten" and case in ("dropout", "aux"):
        pytest.skip("ATen's kernel has none")


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_tangents_have_the_dtype_of_what_they_are_tangents_of(
    backend: str, case: str, dtype: torch.dtype
) -> None:
    skip_refused(backend, case)
    attend = self_attention(backend, case)
    x = torch.randn(1, 2, 5, 8, device=device_for(backend)).to(dtype)

    def loss(x: Tensor) -> Tensor:
        return attend(x)[0].float().square().sum()

    def pushed(f: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        return lambda x: torch.func.jvp(f, (x,), (x,))

    pairs = list(zip(*pushed(attend)(x), strict=True))
    pairs.append(pushed(torch.func.grad(loss))(x))
    with forward_ad.dual_level():
        pairs += [forward_ad.unpack_dual(y) for y in attend(forward_ad.make_dual(x, x))]
    if backend != "triton" or case == "plain":  # a call for every element
        pairs += zip(attend(x), torch.func.jacfwd(attend)(x), strict=True)
    if case in ("plain", "mask"):
        second = pushed(pushed(lambda x: attend(x)[0]))(x)
        pairs += zip(*second, strict=True)
    for primal, tangent in pairs:
        if tangent is not None:  # as of max_scores
            assert tangent.dtype == primal.dtype
    primal, tangent = pairs[0]
    assert (primal.mT @ tangent).isfinite().all()  # raised


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", ["plain", "mask", "dropout"])
def test_tangents_have_the_dtype_inside_a_compiled_graph(case: str, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    attend = self_attention("tiled", case)

    def push(x: Tensor) -> Any:
        return torch.func.jvp(lambda x: attend(x)[0], (x,), (x,))

    x = torch.randn(1, 2, 5, 8).to(dtype)
    primal, tangent = torch.compile(push, backend="aot_eager")(x)
    assert tangent.dtype == primal.dtype == dtype
    torch.testing.assert_close(tangent, push(x)[1])


@pytest.mark.parametrize("case", ["plain", "causal", "mask", "dropout"])
@pytest.mark.parametrize("backend", ["triton", "aten", "tiled"])
def test_tangents_in_bf16_are_as_accurate_as_the_formulas(backend: str, case: str) -> None:
    skip_refused(backend, case)
    device = device_for(backend)
    primals, tangents = (
        [torch.randn(1, h, 5, 8, device=device).bfloat16() for h in (2, 1, 1)] for _ in range(2)
    )
    check(primals, tangents, backend, **on_device(backend, case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["triton", "aten", "tiled"])
def test_a_mask_alone_may_have_a_tangent_and_a_wider_dtype(
    backend: str, dtype: torch.dtype
) -> None:
    device = device_for(backend)
    q = torch.randn(1, 2, 5, 8, device=device).to(dtype)
    mask, tangent = torch.randn(2, 5, 5, dtype=torch.float64, device=device)

    def push(backend: str, x: Tensor) -> dict[str, Any]:
        def attend(mask: Tensor) -> Tensor:
            return flash_attention(x, x, x, attn_mask=mask, backend=backend)

        gradient = torch.func.grad(lambda mask: attend(mask).double().square().sum())
        return {
            name: torch.func.jvp(f, (mask,), (tangent,))
            for name, f in (("out", attend), ("dattn_mask", gradient))
        }

    actual, same_dtype = push(backend, q), push("standard", q)
    reference = push("standard", q.double())
    for name, (primal, found) in actual.items():
        assert found.dtype == primal.dtype
        # The rounding allowed is that of q's dtype, in which the mask is added.
        tangents = found.to(dtype), same_dtype[name][1].to(dtype), reference[name][1]
        accuracy.assert_accurate(name, *tangents, accuracy.GRADIENT_FACTOR)


SINKS = {"no sinks": None, "sinks": torch.tensor([-torch.inf, 0.5])}
NO_KEYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True, "diagonal": "top_left"},
    "window": {"window_size": (1, 1), "softcap": 2.0},
    "bool mask": {"attn_mask": torch.ones(2, 0, dtype=torch.bool)},
    "float mask": {"attn_mask": torch.randn(1, 1)},  # of one column, broadcast to none
    "dropout": {"dropout_p": 0.5, "dropout_seed": 1},
    "packed": {"cu_seqlens_q": torch.tensor([0, 1, 2]), "cu_seqlens_k": torch.tensor([0, 0, 0])},
    "packed, none": {"cu_seqlens_q": torch.tensor([0]), "cu_seqlens_k": torch.tensor([0])},
}


def assert_derivatives_are_finite(
    attend: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...]
) -> None:
    """Forward and reverse mode; where lse is -inf it is a constant."""
    tangents = tuple(torch.randn_like(x) for x in inputs)
    primals, pushed = torch.func.jvp(attend, inputs, tangents)
    assert all(x is None or x.isfinite().all() for x in pushed)
    lse = primals[1]
    without_key = lse == -torch.inf
    assert (pushed[1][without_key] == 0).all()
    assert not lse.isnan().any()
    leaves = [x.detach().requires_grad_() for x in inputs]
    results = attend(*leaves)
    grads = torch.autograd.grad(
        [x for x in results if x.requires_grad],
        leaves,
        [torch.randn_like(x) for x in results if x.requires_grad],
        allow_unused=True,
    )
    assert all(x is None or x.isfinite().all() for x in grads)

    def loss(*inputs: Tensor) -> Tensor:
        out, lse = attend(*inputs)[:2]
        return out.sum() + lse.masked_fill(without_key, 0).sum()

    # The same slope by both modes; and a second derivative.
    slope = torch.func.jvp(loss, inputs, tangents)[1]
    gradient = torch.func.grad(loss, argnums=tuple(range(len(inputs))))
    first, second = torch.func.jvp(gradient, inputs, tangents)
    pairs = zip(first, tangents, strict=True)
    torch.testing.assert_close(slope, torch.stack([(x * y).sum() for x, y in pairs]).sum())
    assert all(x.isfinite().all() for x in (*first, *second))


@pytest.mark.parametrize("with_sinks", SINKS)
@pytest.mark.parametrize("option", NO_KEYS)
@pytest.mark.parametrize("backend", ["triton", "tiled", "standard"])
def test_derivatives_of_a_call_without_keys_are_finite(
    backend: str, option: str, with_sinks: str
) -> None:
    device = device_for(backend)
    options = {
        name: x.to(device) if isinstance(x, Tensor) else x for name, x in NO_KEYS[option].items()
    }
    packed, sinks = "cu_seqlens_q" in options, SINKS[with_sinks]
    function: Any = flash_attention_varlen if packed else flash_attention
    shapes = ((2, 2, 8), (0, 2, 8)) if packed else ((1, 2, 2, 8), (1, 2, 0, 8))
    q, k = (torch.randn(shape, dtype=torch.float64, device=device) for shape in shapes)
    inputs = (q, k, k) if sinks is None else (q, k, k, sinks.double().to(device))
    if backend != "triton" and not packed:
        options["return_aux"] = AuxRequest(lse=True, max_scores=True)
    else:
        options["return_lse"] = True

    def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Any:
        out, more = function(q, k, v, sinks=sinks, backend=backend, **options)
        return (out, more) if isinstance(more, Tensor) else (out, *more[:2])

    assert_derivatives_are_finite(attend, inputs)


@pytest.mark.parametrize("backend", ["triton", "tiled", "standard"])
def test_a_sink_of_minus_infinity_has_no_derivative_in_rows_without_a_key(backend: str) -> None:
    device = device_for(backend)
    q, k = (
        torch.randn(1, 2, n, 8, dtype=torch.float64, device=device) for n in (3, 1)
    )  # one of three queries sees the key
    sinks = torch.tensor([-torch.inf, 0.5], dtype=torch.float64, device=device)

    def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Any:
        return flash_attention(q, k, v, sinks=sinks, causal=True, return_lse=True, backend=backend)

    assert (attend(q, k, k, sinks)[1] == -torch.inf).sum() == 2
    assert_derivatives_are_finite(attend, (q, k, k, sinks))


def test_a_single_query_without_keys_in_bf16() -> None:
    """``auto`` leaves it to the formula on a CPU."""
    q, k = torch.randn(1, 2, 1, 8).bfloat16(), torch.randn(1, 2, 0, 8).bfloat16()
    attend = lambda q, k: flash_attention(q, k, k, return_lse=True)  # noqa: E731
    (out, lse), tangents = torch.func.jvp(attend, (q, k), (q, k))
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    assert all((x == 0).all() for x in tangents)
