"""``return_aux``: the log-sum-exp, the largest score and the entropy of every row."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn.attention import flex_attention

from flashlayer import AuxOutput, AuxRequest, available_backends, flash_attention
from flashlayer import flash_attention_varlen as varlen
from flashlayer.backends import split_keys
from flashlayer.spec import NO_EXTRAS, AttentionExtras, AttentionSpec
from flashlayer.testing import FACTORS, assert_accurate
from tests.test_accuracy import device_for
from tests.test_options import (
    BACKENDS,
    EVERYTHING,
    HKV,
    OF_ONE_BATCH,
    OPTIONS,
    PACKED_OPTIONS,
    SK,
    SQ,
    B,
    D,
    H,
    qkv,
    to,
)


def check(attend: Any, backend: str, *tensors: Tensor, **options: Any) -> AuxOutput:
    """Every number by the accuracy rule; what the output is doesn't depend on it."""
    wide = to(tensors[0].device.type, torch.float64, options)
    found, same, reference = (
        attend(*inputs, return_aux=EVERYTHING, backend=name, **of)
        for name, inputs, of in (
            (backend, tensors, options),
            ("standard", tensors, options),
            ("standard", [x.double() for x in tensors], wide),
        )
    )
    assert torch.equal(found[0], attend(*tensors, backend=backend, **options))
    for name, *results in zip(AuxRequest._fields, found[1], same[1], reference[1], strict=True):
        assert results[0].is_contiguous(), name
        assert results[0].dtype == same[1].lse.dtype, name
        assert_accurate(name, *results, FACTORS["lse"])
    return found[1]


@pytest.mark.parametrize("name", ["plain", *OPTIONS])
@pytest.mark.parametrize("backend", BACKENDS)
def test_dense(backend: str, name: str) -> None:
    """In fp16, whose scores are exponents of 2 in the kernel; sums of many options in fp32."""
    dtype = torch.float32 if name in ("everything", "sinks", "alibi") else torch.float16
    device = device_for(backend)
    q, k, v = qkv(device, dtype, 1 if name in OF_ONE_BATCH else B)
    check(flash_attention, backend, q, k, v, **to(device, dtype, OPTIONS.get(name, {})))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_other_dtypes(backend: str, dtype: torch.dtype) -> None:
    check(flash_attention, backend, *qkv(device_for(backend), dtype, 1), causal=True, scale=-2.0)


@pytest.mark.parametrize("name", PACKED_OPTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed(backend: str, name: str) -> None:
    device = device_for(backend)
    q = torch.randn(84, H, D, device=device)
    k, v = (torch.randn(81, HKV, D, device=device) for _ in range(2))
    options = to(device, q.dtype, PACKED_OPTIONS[name]) | {
        "cu_seqlens_q": torch.tensor([0, 3, 3, 70, 75, 80], device=device),
        "cu_seqlens_k": torch.tensor([0, 5, 9, 75, 75, 78], device=device),
    }
    aux = check(varlen, backend, q, k, v, **options)
    assert all(x.shape == (H, 84) for x in aux)
    assert (aux.max_scores[:, 80:] == -torch.inf).all()
    assert (aux.entropy[:, 80:] == 0).all()


@pytest.mark.parametrize("backend", [*BACKENDS, "standard"])
@pytest.mark.parametrize("keys", [0, 5])
def test_rows_that_see_no_key(backend: str, keys: int) -> None:
    """No largest score, and no entropy, be all the mass on a sink or none anywhere."""
    device = device_for(backend)
    q, k = torch.randn(1, 2, 3, 8, device=device), torch.randn(1, 2, keys, 8, device=device)
    for sinks in (None, torch.tensor([2.0, -torch.inf], device=device)):
        options = {"window_size": (None, -0), "diagonal": "top_left", "sinks": sinks}
        mask = torch.zeros(1, keys, dtype=torch.bool, device=device)
        _, aux = flash_attention(
            q, k, k, attn_mask=mask, return_aux=EVERYTHING, backend=backend, **options
        )
        lse = [-math.inf, -math.inf] if sinks is None else sinks.tolist()
        assert aux.lse[0].tolist() == [[x] * 3 for x in lse]
        assert (aux.max_scores == -torch.inf).all()
        assert (aux.entropy == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores(backend: str) -> None:
    """The entropy doesn't cancel: lse and the mean score agree in the first seven digits here."""
    device = device_for(backend)
    q, k, v = qkv(device, torch.float16, 1)
    q[..., 0], k[..., 0] = 200.0, 200.0  # adds 10,000 to every score
    _, aux = flash_attention(q, k, v, return_aux=EVERYTHING, backend=backend)
    wide = [x.double() for x in (q, k, v)]
    _, expected = flash_attention(*wide, return_aux=EVERYTHING, backend="standard")
    assert (expected.max_scores > 9_000).all()
    torch.testing.assert_close(aux.entropy.double(), expected.entropy, atol=2e-3, rtol=0)
    _, one_hot = flash_attention(100 * q, k, v, return_aux=EVERYTHING, backend=backend)
    assert one_hot.entropy.isfinite().all()
    assert (one_hot.entropy >= 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_keys_may_hold_nan(backend: str) -> None:
    device = device_for(backend)
    q, k, v = qkv(device, batch=1)
    found = []
    for poison in (0.0, torch.nan):
        k[:, :, 40:], v[:, :, 40:] = poison, poison
        mask = torch.arange(SK, device=device) < 40
        found.append(
            flash_attention(q, k, v, attn_mask=mask, return_aux=EVERYTHING, backend=backend)[1]
        )
    for clean, poisoned in zip(*found, strict=True):
        assert torch.equal(clean, poisoned)


@pytest.mark.parametrize("asked", [*itertools.product((False, True), repeat=3)])
def test_only_what_is_asked_for(asked: tuple[bool, bool, bool]) -> None:
    """Also in FlexAttention's own words, and through the custom op."""
    q, k, v = (x.requires_grad_() for x in qkv(batch=1))
    request, whole = AuxRequest(*asked), flash_attention(q, k, v, return_aux=EVERYTHING)[1]
    compiled = torch.compile(flash_attention, backend="aot_eager", fullgraph=True)
    doors: list[Callable] = [flash_attention, compiled] if asked[1] else [flash_attention]
    for attend in doors:
        _, aux = attend(q, k, v, return_aux=request)
        assert isinstance(aux, AuxOutput)
        for there, number, expected in zip(asked, aux, whole, strict=True):
            assert (number is not None) == there
            assert number is None or torch.allclose(number, expected, atol=1e-5)
    if not asked[2]:
        theirs = flex_attention.AuxRequest(*asked[:2])
        _, same = flash_attention(q, k, v, return_aux=theirs)
        assert [x is not None for x in same] == list(asked)


@pytest.mark.parametrize("backend", ["tiled", "standard"])
def test_gradients(backend: str) -> None:
    """Of the entropy with every option, in reverse and forward mode; of the largest score none."""
    q, k, v = (
        torch.randn(1, h, n, 3, dtype=torch.float64, requires_grad=True)
        for h, n in ((4, 5), (2, 6), (2, 6))
    )
    sinks = torch.tensor([0.3, -1.0, -torch.inf, 2.0], dtype=torch.float64)
    mask = torch.randn(5, 6, dtype=torch.float64).requires_grad_()
    options = {"causal": True, "softcap": 1.5, "dropout_p": 0.3, "dropout_seed": 1}

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, finite: Tensor) -> tuple:
        given = torch.where(sinks == -torch.inf, sinks, finite)
        _, aux = flash_attention(
            q, k, v, attn_mask=mask, sinks=given, return_aux=EVERYTHING, backend=backend, **options
        )
        assert not aux.max_scores.requires_grad
        return aux.entropy, aux.entropy.square() + aux.lse

    inputs = (q, k, v, mask, torch.zeros(4, dtype=torch.float64, requires_grad=True) + sinks.exp())
    leaves = (*inputs[:4], inputs[4].detach().requires_grad_())
    assert torch.autograd.gradcheck(attend, leaves)
    if backend == "tiled":
        assert torch.autograd.gradcheck(
            attend, leaves, fast_mode=True, check_forward_ad=True, check_backward_ad=False
        )


def test_rows_without_keys_have_no_gradient_of_the_entropy() -> None:
    for backend in ("tiled", "standard"):
        q, k, v = (x.requires_grad_() for x in qkv(batch=1))
        window = {"window_size": (2, 1), "diagonal": "top_left"}
        _, aux = flash_attention(q, k, v, return_aux=EVERYTHING, backend=backend, **window)
        grads = torch.autograd.grad(aux.entropy.sum(), (q, k))
        assert all(x.isfinite().all() for x in grads)
        assert grads[0][:, :, SK + 2 :].count_nonzero() == 0


@pytest.mark.filterwarnings("ignore:Error detected in")  # AOTAutograd's, as it raises ours
def test_a_gradient_that_no_kernel_has_is_refused() -> None:
    device = device_for("triton")
    q, k, v = (x.requires_grad_() for x in qkv(device, batch=1))
    out, aux = flash_attention(q, k, v, return_aux=EVERYTHING, backend="triton")
    (out.sum() + aux.lse.sum()).backward(retain_graph=True)  # not asked for
    with pytest.raises(NotImplementedError, match="'triton' computes no gradient of the entropy"):
        aux.entropy.sum().backward()
    loss = torch.compile(
        lambda q, weight: sum(
            w * x.sum()
            for w, x in zip(
                weight,
                flash_attention(q, k, v, return_aux=EVERYTHING, backend="triton")[1],
                strict=True,
            )
            if w
        ),
        backend="aot_eager",
        fullgraph=True,
    )
    (grad,) = torch.autograd.grad(loss(q, (1, 1, 0)), q)
    (expected,) = torch.autograd.grad(
        flash_attention(q, k, v, return_lse=True, backend="triton")[1].sum(), q
    )
    torch.testing.assert_close(grad, expected)
    with pytest.raises(BackendCompilerFailed, match="no gradient of the entropy: detach it"):
        loss(q, (0, 0, 1)).backward()


def test_second_derivatives_of_the_entropy_are_refused() -> None:
    q, k, v = (x.double().requires_grad_() for x in qkv(batch=1))
    out, aux = flash_attention(q, k, v, return_aux=EVERYTHING, backend="tiled")
    torch.autograd.grad(out.sum(), q, create_graph=True)  # of the rest they are there
    with pytest.raises(NotImplementedError, match="use backend='standard'"):
        torch.autograd.grad(aux.entropy.sum(), q, create_graph=True)


def test_each_example_of_a_batch() -> None:
    q, k, v = qkv(batch=3)
    _, each = torch.func.vmap(
        lambda *x: flash_attention(*x, return_aux=EVERYTHING, backend="tiled")
    )(*(x.unsqueeze(1) for x in (q, k, v)))
    _, whole = flash_attention(q, k, v, return_aux=EVERYTHING, backend="tiled")
    for one, expected in zip(each, whole, strict=True):
        torch.testing.assert_close(one.squeeze(1), expected)


@pytest.mark.parametrize("packed", [False, True])
def test_split_keys(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    device, calls = device_for("triton"), []
    monkeypatch.setattr(split_keys, "num_splits", lambda *_: calls.append(3) or 3)
    options: dict[str, Any] = {"sinks": torch.tensor([0.5, -torch.inf], device=device)}
    if packed:
        q, k, v = (torch.randn(n, h, 8, device=device) for n, h in ((5, 2), (90, 1), (90, 1)))
        options |= {
            "cu_seqlens_q": torch.tensor([0, 1, 1, 2, 3, 4], device=device),
            "cu_seqlens_k": torch.tensor([0, 40, 47, 49, 49, 83], device=device),
        }
        check(varlen, "triton", q, k, v, **options)
    else:
        q, k, v = (torch.randn(2, h, n, 8, device=device) for h, n in ((2, 1), (1, 98), (1, 98)))
        check(flash_attention, "triton", q, k, v, **options)
    assert calls


def test_aten_leaves_them_to_tiled() -> None:
    q, k, v = qkv()
    assert available_backends(q, k, v, return_aux=AuxRequest(lse=True))["aten"] is None
    for request in (AuxRequest(max_scores=True), AuxRequest(entropy=True)):
        refused = available_backends(q, k, v, return_aux=request)
        assert refused["aten"] == "its kernel returns no max_scores and no entropy"
        assert refused["tiled"] is None
        with pytest.raises(ValueError, match="backend 'aten' can't compute this call"):
            flash_attention(q, k, v, return_aux=request, backend="aten")
        auto = flash_attention(q, k, v, return_aux=request)
        tiled = flash_attention(q, k, v, return_aux=request, backend="tiled")
        assert torch.equal(auto[0], tiled[0])


@pytest.mark.parametrize("wrong", [True, (True,), {"lse": True}, "lse", AuxRequest(lse=1)])  # pyright: ignore[reportArgumentType]
def test_what_is_no_request(wrong: Any) -> None:
    q, k, v = qkv()
    with pytest.raises(TypeError, match="return_aux"):
        flash_attention(q, k, v, return_aux=wrong)
    packed = (x[0].transpose(0, 1) for x in qkv())
    with pytest.raises(TypeError, match="return_aux"):
        varlen(
            *packed,
            cu_seqlens_q=torch.tensor([0, SQ]),
            cu_seqlens_k=torch.tensor([0, SK]),
            return_aux=wrong,
        )


def test_both_forms_at_once() -> None:
    with pytest.raises(ValueError, match=r"use return_aux=AuxRequest\(lse=True\)"):
        flash_attention(*qkv(), return_aux=EVERYTHING, return_lse=True)


def test_a_call_without_them_has_the_results_of_before() -> None:
    """No kernel, op or Function gives more than two results that nobody asked for."""
    from flashlayer.backends import BACKENDS as MODULES

    q, k, v = qkv(device_for("triton"))
    for name in ("triton", "tiled"):
        backend: Any = MODULES[name]
        assert len(backend.forward(q, k, v, AttentionSpec(0.25), NO_EXTRAS)) == 2
        spec = AttentionSpec(0.25, entropy=True)
        assert len(backend.forward(q, k, v, spec, AttentionExtras())) == 3
