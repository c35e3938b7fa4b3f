"""NaN in what a query sees reaches its results and gradients; what nobody sees reaches nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flashlayer import FlashAttention, flash_attention, flash_attention_varlen
from flashlayer.spec import AttentionSpec
from tests.test_accuracy import device_for

BACKENDS = ("triton", "aten", "tiled", "standard")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Fewer keys than a vector register of the CPU holds, as many, more; decoding; unlike lengths.
SIZES = ((1, 1), (5, 5), (1, 7), (3, 15), (1, 16), (17, 17), (5, 40), (64, 64), (200, 200))
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"causal": True},
    {"causal": True, "diagonal": "top_left"},
    {"window_size": (4, 0)},
    {"window_size": (40, 0)},
    {"padding": True},
)


def is_nan(x: Tensor) -> Tensor:
    return x.detach().isnan().any(dim=-1)


def assert_reaches_what_sees_it(
    q: Tensor, k: Tensor, v: Tensor, backend: str, **options: Any
) -> None:
    """Which rows of the results hold a NaN, worked out from who sees whom."""
    seqlen_q, seqlen_k, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    right = 0 if options.get("causal") else options.get("window_size", (None, None))[1]
    spec = AttentionSpec(
        1.0,
        options.get("window_size", (None, None))[0],
        right,
        diagonal=options.get("diagonal", "bottom_right"),
    )
    sees = spec.visible(0, seqlen_q, 0, seqlen_k, seqlen_q, seqlen_k, q.device)
    sees = sees.expand(q.shape[0], q.shape[1], -1, -1)  # [B, H, Sq, Sk]
    if options.pop("padding", False):
        shown = torch.arange(seqlen_k, device=q.device) < max(1, seqlen_k - 1)
        options["attn_mask"] = shown[None, None, None]
        sees = sees & shown
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = flash_attention(*leaves, return_lse=True, backend=backend, **options)
    dq, dk, dv = torch.autograd.grad(out.sum(), leaves)
    bad_k, bad_v = (is_nan(x).repeat_interleave(group, dim=1).unsqueeze(-2) for x in (k, v))
    bad_scores = (sees & (is_nan(q).unsqueeze(-1) | bad_k)).any(dim=-1)  # [B, H, Sq]
    bad_rows = bad_scores | (sees & bad_v).any(dim=-1)

    def of_keys(rows: Tensor) -> Tensor:
        return (sees & rows.unsqueeze(-1)).any(dim=-2).unflatten(1, (-1, group)).any(dim=2)

    for name, actual, expected in (
        ("out", is_nan(out), bad_rows),
        ("lse", lse.isnan(), bad_scores),
        ("dq", is_nan(dq), bad_rows),
        ("dk", is_nan(dk), of_keys(bad_rows)),
        ("dv", is_nan(dv), of_keys(bad_scores)),
    ):
        lost = expected & ~actual
        assert not lost.any(), f"{name}{lost.nonzero()[0].tolist()} is not NaN, {options}"
    if not bad_rows.any():
        assert not any(is_nan(x).any() for x in (out, dq, dk, dv))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_a_visible_input_reaches_output_and_gradients(
    backend: str, dtype: torch.dtype
) -> None:
    device = device_for(backend)
    interpreted = backend == "triton" and device == "cpu"
    for seqlen_q, seqlen_k in ((5, 7),) if interpreted else SIZES:
        for options in OPTIONS[1:4:2] if interpreted else OPTIONS:
            for which in range(3):
                for row in {2} if interpreted else {0, 2, seqlen_k - 1}:
                    x = [
                        torch.randn(1, h, n, 8, device=device).to(dtype)
                        for h, n in ((2, seqlen_q), (1, seqlen_k), (1, seqlen_k))
                    ]
                    x[which][:, 0, min(row, x[which].shape[2] - 1), 3] = torch.nan
                    assert_reaches_what_sees_it(*x, backend, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["aten", "tiled"])
@pytest.mark.parametrize("keys", [5, 16, 64, 200])
def test_an_infinite_score_gives_nan(keys: int, backend: str, dtype: torch.dtype) -> None:
    """exp(inf - inf): in the rows of a positive score and no other."""
    q, k, v = (torch.randn(1, 1, keys, 8).to(dtype) for _ in range(3))
    k[..., 2, 3] = torch.inf
    q.requires_grad_()
    out = flash_attention(q, k, v, backend=backend)
    (dq,) = torch.autograd.grad(out.sum(), q)
    infinite = q.detach()[..., 3] > 0
    assert torch.equal(is_nan(out), infinite)
    assert (is_nan(dq) & infinite).equal(infinite)


@pytest.mark.parametrize("backend", ["aten", "tiled"])
def test_nan_in_a_packed_sequence_reaches_its_own_tokens_alone(backend: str) -> None:
    edges = torch.tensor([0, 3, 8, 40])
    qkv = torch.randn(3, 40, 2, 8)
    for index in range(3):
        for row, rows in ((1, slice(0, 3)), (5, slice(3, 8)), (20, slice(8, 40))):
            x = qkv.clone()
            x[index, row] = torch.nan
            bad = is_nan(flash_attention_varlen(*x, cu_seqlens_q=edges, backend=backend))
            expected = torch.zeros(40, dtype=torch.bool)
            expected[rows if index > 0 else row] = True
            assert torch.equal(bad.any(dim=-1), expected)


@pytest.mark.parametrize("tokens", [1, 5, 15, 20])
def test_a_layer_with_a_nan_weight_gives_nan(tokens: int) -> None:
    layer = FlashAttention(16, 2, causal=True)
    with torch.no_grad():
        layer.k_proj.weight[0, 0] = torch.nan
    assert layer(torch.randn(1, tokens, 16)).isnan().all()


@pytest.mark.parametrize("value", [0.0, -1e38])
def test_scores_that_only_look_lost_are_right(value: float) -> None:
    """A score of 0 has an lse of 0 as well; scores that overflow weigh nothing."""
    q = torch.full((2, 3, 4, 8), value)
    k, v = torch.full((2, 3, 1, 8), -value), torch.randn(2, 3, 1, 8)
    out, lse = flash_attention(q, k, v, return_lse=True, backend="aten")
    if value == 0:
        assert torch.equal(out, v.expand_as(out))
        assert torch.equal(lse, torch.zeros(2, 3, 4))
    else:
        expected, expected_lse = flash_attention(q, k, v, return_lse=True, backend="tiled")
        assert torch.equal(out, expected)
        assert torch.equal(lse, expected_lse)
        assert torch.equal(lse, torch.full((2, 3, 4), -torch.inf))
