"""One suite for every backend: the contract, compared with standard attention in fp64."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from flashlayer import available_backends, flash_attention
from flashlayer.testing import assert_attention_close

BACKENDS = ("triton", "aten", "tiled")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Case:
    """One problem. Odd sizes, so that tiles are ragged; several heads only where they matter."""

    name: str
    heads: int = 1
    kv_heads: int = 1
    seqlen_q: int = 63
    seqlen_k: int = 63
    head_dim: int = 40
    value_dim: int | None = None
    batch: int = 1
    magnitude: float = 1.0
    options: dict = field(default_factory=dict)


CASES = (
    Case("full", heads=2, kv_heads=2, seqlen_q=127, seqlen_k=129),
    Case("batch", batch=2, heads=2, kv_heads=2, seqlen_q=17, seqlen_k=65),
    Case(
        "causal",
        heads=2,
        kv_heads=2,
        seqlen_q=129,
        seqlen_k=129,
        head_dim=64,
        options={"causal": True},
    ),
    Case("bottom_right_more_keys", seqlen_q=17, seqlen_k=127, options={"causal": True}),
    Case("bottom_right_rows_without_keys", seqlen_q=127, seqlen_k=63, options={"causal": True}),
    Case("top_left_hidden_keys", seqlen_k=129, options={"causal": True, "diagonal": "top_left"}),
    Case(
        "top_left_more_queries",
        seqlen_q=129,
        seqlen_k=17,
        options={"causal": True, "diagonal": "top_left"},
    ),
    Case("gqa", heads=4, kv_heads=2, seqlen_q=65, options={"causal": True}),
    Case("mqa", heads=3, batch=2, seqlen_q=17, seqlen_k=70, head_dim=59),
    Case("value_dim_smaller", head_dim=80, value_dim=24, options={"causal": True}),
    Case("value_dim_larger", head_dim=24, value_dim=111, heads=4, kv_heads=2),
    Case("head_dim_1", head_dim=1),
    Case("head_dim_96", head_dim=96, options={"causal": True}),
    Case("head_dim_111", heads=2, kv_heads=2, head_dim=111),
    Case("head_dim_256", head_dim=256, seqlen_q=33, seqlen_k=65, options={"causal": True}),
    Case("head_dim_512", head_dim=512, seqlen_q=17, seqlen_k=33, options={"causal": True}),
    # Two heads here: the bound is the formula's largest error, and of few elements that may be 0.
    Case("one_query", heads=2, kv_heads=2, seqlen_q=1, seqlen_k=129, options={"causal": True}),
    Case("window", seqlen_q=129, seqlen_k=129, options={"window_size": (16, 0)}),
    Case("window_both_sides", seqlen_k=127, options={"window_size": (5, 9)}),
    Case(
        "window_rows_and_keys_without_a_pair",
        seqlen_q=129,
        seqlen_k=65,
        options={"window_size": (7, 3), "diagonal": "top_left"},
    ),
    Case("anticausal", seqlen_q=70, options={"window_size": (0, None)}),
    Case("causal_caps_window", options={"window_size": (9, 9), "causal": True}),
    Case("scale", options={"scale": 0.3, "causal": True}),
    Case("scale_negative", heads=2, kv_heads=2, options={"scale": -0.2, "causal": True}),
    Case("scale_zero", options={"scale": 0.0}),
    Case("large_logits", magnitude=12.0, options={"causal": True}),
)


def device_for(backend: str) -> str:
    """Triton compiles for a GPU where there is one, and is interpreted elsewhere."""
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def draw(case: Case, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).mul(case.magnitude).to(device, dtype)

    value_dim = case.value_dim or case.head_dim
    return (
        randn(case.batch, case.heads, case.seqlen_q, case.head_dim),
        randn(case.batch, case.kv_heads, case.seqlen_k, case.head_dim),
        randn(case.batch, case.kv_heads, case.seqlen_k, value_dim),
    )


def refused(backend: str, q: Tensor, k: Tensor, v: Tensor, **options) -> bool:
    """Whether the backend refuses; the call must then raise the same reason."""
    reason = available_backends(q, k, v, **options)[backend]
    if reason is None:
        return False
    with pytest.raises(ValueError, match="can't compute this call") as raised:
        flash_attention(q, k, v, backend=backend, **options)
    assert reason in str(raised.value)
    return True


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_standard(backend: str, case: Case, dtype: torch.dtype) -> None:
    q, k, v = draw(case, dtype, device_for(backend))
    if refused(backend, q, k, v, **case.options):
        return
    assert_attention_close(backend, q, k, v, **case.options)


@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k", "options"),
    [(65, 1, {}), (1, 1, {}), (65, 65, {"window_size": (0, 0)})],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_visible_key(backend: str, seqlen_q: int, seqlen_k: int, options: dict) -> None:
    """out = v and dq = dk = 0, without a rounding error of the formula to compare with."""
    device = device_for(backend)
    q, do = (torch.randn(1, 2, seqlen_q, 40, device=device) for _ in range(2))
    k, v = (torch.randn(1, 2, seqlen_k, 40, device=device) for _ in range(2))
    if refused(backend, q, k, v, **options):
        return
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = flash_attention(*leaves, backend=backend, **options)
    dq, dk, dv = torch.autograd.grad(out, leaves, do)
    torch.testing.assert_close(out, v.expand_as(out), rtol=1e-6, atol=1e-6)
    expected_dv = do if seqlen_q == seqlen_k else do.sum(dim=2, keepdim=True)
    torch.testing.assert_close(dv, expected_dv, rtol=1e-5, atol=1e-5)
    # dS = do . v - do . out: equal numbers, each rounded over 40 products.
    noise = 40 * torch.finfo(q.dtype).eps * do.norm(dim=-1).max() * v.norm(dim=-1).max() * 40**-0.5
    assert dq.abs().max() <= noise * k.abs().max()
    assert dk.abs().max() <= noise * q.abs().max() * seqlen_q


def _fused_qkv(heads: int, seqlen: int, dim: int, device: str) -> tuple[Tensor, ...]:
    qkv = torch.randn(2, seqlen, 3, heads, dim, device=device)
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


LAYOUTS = {
    "fused_qkv": _fused_qkv,
    "bshd": lambda h, s, d, device: tuple(
        torch.randn(2, s, h, d, device=device).transpose(1, 2) for _ in range(3)
    ),
    "each_its_own": lambda h, s, d, device: (
        torch.randn(2, s, h, d, device=device).transpose(1, 2),
        torch.randn(2, h, s, d, device=device),
        torch.randn(s, 2, h, d, device=device).permute(1, 2, 0, 3),
    ),
    "last_stride_2": lambda h, s, d, device: tuple(
        torch.randn(2, h, s, 2 * d, device=device)[..., ::2] for _ in range(3)
    ),
    "last_stride_is_sequence": lambda h, s, d, device: tuple(
        torch.randn(2, h, d, s, device=device).mT for _ in range(3)
    ),
    "expanded_batch": lambda h, s, d, device: tuple(
        torch.randn(1, h, s, d, device=device).expand(2, h, s, d) for _ in range(3)
    ),
    "expanded_heads_and_keys": lambda h, s, d, device: (
        torch.randn(2, h, s, d, device=device),
        torch.randn(2, 1, s, d, device=device).expand(2, h, s, d),
        torch.randn(2, h, 1, d, device=device).expand(2, h, s, d),
    ),
    "expanded_head_dim": lambda h, s, d, device: tuple(
        torch.randn(2, h, s, 1, device=device).expand(2, h, s, d) for _ in range(3)
    ),
    "offset_slice": lambda h, s, d, device: tuple(
        torch.randn(3, h + 1, s + 3, d + 5, device=device)[1:, 1:, 2:-1, 3:-2] for _ in range(3)
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_are_honoured(backend: str, layout: str) -> None:
    q, k, v = LAYOUTS[layout](2, 65, 24, device_for(backend))
    assert_attention_close(backend, q, k, v, causal=True)


@pytest.mark.parametrize("option", ["alibi_slopes", "sinks"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_of_options_are_honoured(backend: str, option: str) -> None:
    """Every second of twice as many numbers."""
    device = device_for(backend)
    q, k, v = (torch.randn(1, 4, 33, 16, device=device) for _ in range(3))
    options = {option: torch.rand(8, device=device)[::2]}
    if not refused(backend, q, k, v, **options):
        assert_attention_close(backend, q, k, v, causal=True, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_out_in_any_layout(backend: str) -> None:
    """The gradient of a sum has stride 0, that of a transpose another layout than out."""
    q, k, v = (torch.randn(2, 2, 33, 16, device=device_for(backend)) for _ in range(3))
    weight = torch.randn(2, 33, 32, device=q.device)
    for loss in (
        lambda out: out.sum(),
        lambda out: (out.transpose(1, 2).flatten(2) * weight).sum(),
        lambda out: out[:, :, ::2, ::3].pow(2).sum(),
    ):
        grads = {}
        for name in (backend, "standard"):
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            grads[name] = torch.autograd.grad(
                loss(flash_attention(*leaves, causal=True, backend=name)), leaves
            )
        for ours, expected in zip(grads[backend], grads["standard"], strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("empty", ["batch", "queries", "keys", "both"])
@pytest.mark.parametrize("backend", [*BACKENDS, "standard"])
def test_empty(backend: str, empty: str) -> None:
    batch = 0 if empty == "batch" else 2
    seqlen_q = 0 if empty in ("queries", "both") else 5
    seqlen_k = 0 if empty in ("keys", "both") else 7
    device = device_for(backend)
    q = torch.randn(batch, 4, seqlen_q, 8, device=device, requires_grad=True)
    k = torch.randn(batch, 2, seqlen_k, 8, device=device, requires_grad=True)
    v = torch.randn(batch, 2, seqlen_k, 8, device=device, requires_grad=True)
    for options in ({}, {"causal": True}, {"causal": True, "diagonal": "top_left"}):
        if refused(backend, q, k, v, **options):
            continue
        out, lse = flash_attention(q, k, v, return_lse=True, backend=backend, **options)
        assert out.shape == q.shape
        assert lse.shape == q.shape[:3]
        grads = torch.autograd.grad(out.sum(), (q, k, v))
        for grad, leaf in zip(grads, (q, k, v), strict=True):
            assert grad.shape == leaf.shape
            if empty != "batch":
                assert grad.count_nonzero() == 0
        if empty == "keys":
            assert out.count_nonzero() == 0
            assert (lse == -torch.inf).all()


@pytest.mark.parametrize("backend", [*BACKENDS, "standard"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_hidden_keys_may_hold_anything(backend: str, poison: float) -> None:
    device = device_for(backend)
    options = {"causal": True, "diagonal": "top_left"}
    q = torch.randn(1, 2, 33, 16, device=device)
    k, v = (torch.randn(1, 2, 97, 16, device=device) for _ in range(2))
    if refused(backend, q, k, v, **options):
        return
    clean = _out_lse_grads(q, k, v, backend, **options)
    k[:, :, 33:], v[:, :, 33:] = poison, poison
    for expected, poisoned in zip(clean, _out_lse_grads(q, k, v, backend, **options), strict=True):
        assert torch.equal(expected, poisoned)


def _out_lse_grads(q, k, v, backend, **options) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = flash_attention(*leaves, return_lse=True, backend=backend, **options)
    grads = torch.autograd.grad(out.square().sum() + lse.sum(), leaves)
    return (out.detach(), lse.detach(), *grads)


@pytest.mark.parametrize("backend", [*BACKENDS, "standard"])
def test_rows_without_keys(backend: str) -> None:
    """o = 0, lse = -inf, and gradients that are finite and zero there."""
    device = device_for(backend)
    q, k, v = (torch.randn(1, 2, s, 16, device=device, requires_grad=True) for s in (70, 30, 30))
    if refused(backend, q, k, v, causal=True):
        return
    out, lse = flash_attention(q, k, v, causal=True, return_lse=True, backend=backend)
    dq, dk, dv = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert out[:, :, :40].count_nonzero() == 0
    assert (lse[:, :, :40] == -torch.inf).all()
    assert lse[:, :, 40:].isfinite().all()
    assert dq[:, :, :40].count_nonzero() == 0
    assert all(x.isfinite().all() for x in (out, dq, dk, dv))


@pytest.mark.parametrize("backend", BACKENDS)
def test_lse_alone_has_a_gradient(backend: str) -> None:
    """flash_attn returns silent zeros here."""
    device = device_for(backend)
    q, k, v = (torch.randn(1, 2, 33, 16, device=device, requires_grad=True) for _ in range(3))
    grads = {}
    for name in (backend, "standard"):
        _, lse = flash_attention(q, k, v, causal=True, return_lse=True, backend=name)
        grads[name] = torch.autograd.grad(lse.square().sum(), (q, k, v), allow_unused=True)
    for ours, expected in zip(grads[backend][:2], grads["standard"][:2], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert grads[backend][2].count_nonzero() == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "seqlen_q", "seqlen_k", "dim", "value_dim", "options"),
    [
        (2, 2, 5, 5, 3, 3, {}),
        (4, 2, 6, 6, 4, 4, {"causal": True}),
        (2, 1, 3, 7, 3, 3, {"causal": True}),
        (2, 1, 4, 7, 2, 2, {"causal": True, "diagonal": "top_left"}),
        (2, 2, 5, 6, 2, 4, {"window_size": (2, 1), "scale": -0.7}),
    ],
)
def test_gradcheck(
    backend: str,
    heads: int,
    kv_heads: int,
    seqlen_q: int,
    seqlen_k: int,
    dim: int,
    value_dim: int,
    options: dict,
) -> None:
    """Finite differences in fp64, for q, k, v, through out and through lse."""
    device = device_for(backend)
    q = torch.randn(1, heads, seqlen_q, dim, dtype=torch.float64, device=device)
    k = torch.randn(1, kv_heads, seqlen_k, dim, dtype=torch.float64, device=device)
    v = torch.randn(1, kv_heads, seqlen_k, value_dim, dtype=torch.float64, device=device)
    if refused(backend, q, k, v, **options):
        return
    leaves = tuple(x.requires_grad_() for x in (q, k, v))

    def attend(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return flash_attention(*tensors, return_lse=True, backend=backend, **options)

    # The interpreter is slow: check one random direction there, every element elsewhere.
    assert torch.autograd.gradcheck(attend, leaves, fast_mode=backend == "triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_is_bitwise_reproducible(backend: str) -> None:
    device = device_for(backend)
    q, k, v = (torch.randn(1, h, 100, 32, device=device) for h in (2, 1, 1))
    first = _out_lse_grads(q, k, v, backend, causal=True)
    second = _out_lse_grads(q, k, v, backend, causal=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
