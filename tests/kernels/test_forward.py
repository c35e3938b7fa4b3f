"""The forward kernel through the backend's own entry point."""

import pytest
import torch

from flashlayer.backends import triton as backend
from flashlayer.spec import AttentionExtras, AttentionSpec, Problem
from tests.kernels.reference import DEVICE, draw, run_kernels, run_naively


def forward(q, k, v, spec):
    return backend.forward(q, k, v, spec, AttentionExtras())


def test_lse_is_a_natural_logarithm_of_the_scaled_scores() -> None:
    x = draw(seqlen_q=5, seqlen_k=70, dtype=torch.float64)
    _, lse = forward(x.q, x.k, x.v, AttentionSpec(0.7))
    expected = (x.q @ x.k.mT * 0.7).logsumexp(-1)
    torch.testing.assert_close(lse, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_and_layout(dtype: torch.dtype) -> None:
    x = draw(batch=2, seqlen_q=3, dtype=dtype)
    o, lse = forward(x.q, x.k, x.v, AttentionSpec(0.25))
    assert o.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert o.is_contiguous()
    assert lse.is_contiguous()
    bshd = x.q.transpose(1, 2).contiguous().transpose(1, 2)
    o_bshd, lse_bshd = forward(bshd, x.k, x.v, AttentionSpec(0.25))
    assert o_bshd.transpose(1, 2).is_contiguous()
    assert torch.equal(o_bshd, o)
    assert torch.equal(lse_bshd, lse)


@pytest.mark.parametrize("left", [None, 0, 40])
def test_rows_that_see_no_key(left: int | None) -> None:
    """The first 60 of 100 queries have no key: bottom-right causal over 40 keys."""
    x = draw(seqlen_q=100, seqlen_k=40)
    o, lse = forward(x.q, x.k, x.v, AttentionSpec(0.25, left, 0))
    assert (o[:, :, :60] == 0).all()
    assert (lse[:, :, :60] == -torch.inf).all()
    assert o.isfinite().all()
    assert lse[:, :, 60:].isfinite().all()


def test_a_first_tile_hidden_from_some_rows() -> None:
    """A window whose left edge crosses a tile: rows reach their first key late."""
    x = draw(seqlen_q=129, dtype=torch.float64)
    spec = AttentionSpec(0.25, 3, 0)
    expected = run_naively(x, spec)
    actual = run_kernels(x, spec)
    for name, result in actual.items():
        torch.testing.assert_close(result, expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("magnitude", [0.0, 1e-300, 1e-40, 2.0])
def test_any_scale(magnitude: float, sign: int) -> None:
    x = draw(seqlen_q=40, dtype=torch.float64)
    spec = AttentionSpec(sign * magnitude, None, 0)
    expected = run_naively(x, spec)
    for name, result in run_kernels(x, spec).items():
        torch.testing.assert_close(result, expected[name], rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_scores_beyond_the_range_of_exp(dtype: torch.dtype) -> None:
    x = draw(seqlen_q=70, dtype=dtype)
    q = x.q * 1e4
    o, lse = forward(q, x.k, x.v, AttentionSpec(1.0))
    expected = run_naively(x._replace(q=q).to(torch.float64), AttentionSpec(1.0))
    assert o.isfinite().all()
    torch.testing.assert_close(lse.double(), expected["lse"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)])
def test_empty(shape: tuple[int, int, int, int]) -> None:
    batch, heads, seqlen_q, seqlen_k = shape
    q = torch.randn(batch, heads, seqlen_q, 8, device=DEVICE)
    k = torch.randn(batch, heads, seqlen_k, 8, device=DEVICE)
    v = torch.randn(batch, heads, seqlen_k, 5, device=DEVICE)
    spec = AttentionSpec(1.0, None, 0)
    o, lse = forward(q, k, v, spec)
    assert o.shape == (batch, heads, seqlen_q, 5)
    assert (o == 0).all()
    assert (lse == -torch.inf).all()
    grads = backend.backward(o, lse, q, k, v, o, lse, spec, AttentionExtras())
    for grad, x in zip(grads, (q, k, v), strict=False):
        assert torch.equal(grad, torch.zeros_like(x))


def test_refusals_give_the_reason() -> None:
    spec, extras = AttentionSpec(1.0), AttentionExtras()
    small = torch.zeros(1, 1, 1, 8, device=DEVICE)
    wide = torch.zeros(1, 1, 1, 513, device=DEVICE)
    assert backend.refuses(Problem(small, small, small, spec, extras)) is None
    assert "513" in backend.refuses(Problem(wide, wide, small, spec, extras))
    assert "513" in backend.refuses(Problem(small, small, wide, spec, extras))
    meta = small.to("meta")
    assert "meta" in backend.refuses(Problem(meta, meta, meta, spec, extras))
