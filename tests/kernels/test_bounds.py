"""The bounds of tiles of an interval mask, and padding, which becomes such a mask."""

import pytest
import torch

from flashlayer import flash_attention
from flashlayer.backends import triton as backend
from flashlayer.backends.triton import arguments
from flashlayer.masks.intervals import tile_bounds
from flashlayer.problem import build_problem
from flashlayer.testing import assert_attention_close
from tests.kernels.reference import DEVICE


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(("keys", "seqlen_k"), [(16, 50), (32, 64), (64, 1), (128, 300)])
def test_the_kernel_computes_what_the_formula_says(keys: int, seqlen_k: int, count: int) -> None:
    """Also of keys without queries, whole tiles of them, and a ragged last tile."""
    ends = torch.randint(0, 70, (2, 3, 2 * count, seqlen_k), dtype=torch.int32, device=DEVICE)
    ends[0, 0, :, : keys + 3] = 0
    bounds = arguments._bounds(ends, keys)
    assert torch.equal(bounds, tile_bounds(ends, keys))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(2, 1, 70), (1, 4, 70), (2, 1, 1), (1, 1, 1)], ids=str)
def test_padding_is_an_interval_mask(shape: tuple[int, ...], causal: bool) -> None:
    torch.manual_seed(1)
    q = torch.randn(2, 4, 33, 16, device=DEVICE)
    k, v = torch.randn(2, 2, 2, 70, 16, device=DEVICE).unbind(0)
    mask = torch.rand(shape, device=DEVICE).unsqueeze(2) < 0.6
    _, _, _, _, extras = backend.as_launched(
        "forward", build_problem(q, k, v, attn_mask=mask, causal=causal)
    )
    assert extras.attn_mask is None
    assert extras.intervals is not None
    assert_attention_close("triton", q, k, v, attn_mask=mask, causal=causal)


def test_hidden_keys_are_not_read() -> None:
    q = torch.randn(2, 2, 40, 16, device=DEVICE)
    k, v = torch.randn(2, 2, 2, 70, 16, device=DEVICE).unbind(0)
    visible = torch.arange(70, device=DEVICE) < torch.tensor([[[[20]]], [[[69]]]], device=DEVICE)
    hidden = ~visible.view(2, 1, 70, 1)
    clean = [x.masked_fill(hidden, 0) for x in (k, v)]
    poisoned = [x.masked_fill(hidden, torch.nan) for x in (k, v)]

    def results(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = flash_attention(*leaves, attn_mask=visible, backend="triton")
        return out.detach(), *torch.autograd.grad(out.square().sum(), leaves)

    for actual, expected in zip(results(*poisoned), results(*clean), strict=True):
        assert torch.equal(actual, expected)
