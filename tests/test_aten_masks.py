"""Dense masks in ATen's kernel: every form, with every option it has, hidden NaN, gradients."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashlayer import available_backends, backends, flash_attention
from flashlayer.backends import aten
from flashlayer.backends.aten import mask as masks
from flashlayer.backends.aten import mask_gradient, pieces
from flashlayer.problem import SUPPORTED_DTYPES, build_problem
from flashlayer.spec import AttentionExtras, AttentionSpec
from flashlayer.testing import assert_attention_close, gradcheck

OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "top_left": {"causal": True, "diagonal": "top_left"},
    "window": {"window_size": (20, 3)},
    "one_side": {"window_size": (None, 5)},
    "window_causal": {"window_size": (40, 0), "diagonal": "top_left"},
}
# Whether batch, heads, queries and keys are full; else broadcast.
FORMS = list(itertools.product((False, True), repeat=4))
LENGTHS = [(70, 90), (90, 70), (1, 33), (17, 1), (129, 129)]


def qkv(seqlen_q: int, seqlen_k: int, dtype: torch.dtype) -> list[Tensor]:
    sizes = ((4, seqlen_q), (2, seqlen_k), (2, seqlen_k))
    return [torch.randn(2, heads, seqlen, 24, dtype=dtype) for heads, seqlen in sizes]


def hide(x: Tensor, visible: Tensor, value: float) -> Tensor:
    """Keys or values ``x`` with ``value`` where the mask hides them from every query."""
    seen = visible.any(dim=2).expand(2, 4, x.shape[2]).unflatten(1, (2, 2)).any(dim=2)
    return torch.where(seen.unsqueeze(-1), x, value)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 32 queries, so that small problems are cut."""
    monkeypatch.setattr(pieces, "NUMBERS_AT_ONCE", 1)
    monkeypatch.setattr(pieces, "BLOCK_MIN", 32)
    monkeypatch.setattr(pieces, "MASKED_BLOCK_MIN", 32)
    monkeypatch.setattr(pieces, "TRIMMED_MIN", 1)
    monkeypatch.setattr(masks, "BLOCK_MIN", 32)
    monkeypatch.setattr(mask_gradient, "BLOCK_MIN", 32)
    monkeypatch.setattr(mask_gradient, "SCORES_AT_ONCE", 1)


def check_every_form(
    kind: str, name: str, dtype: torch.dtype, lengths: tuple[int, int], forms: list[Any]
) -> None:
    seqlen_q, seqlen_k = lengths
    for full in forms:
        q, k, v = qkv(seqlen_q, seqlen_k, dtype)
        sizes = zip(full, (2, 4, seqlen_q, seqlen_k), strict=True)
        visible = torch.rand([size if is_full else 1 for is_full, size in sizes]) < 0.7
        if full[3]:  # keys in the middle and at the end that nobody sees, and rows without keys
            visible[..., seqlen_k // 3 : seqlen_k // 3 + 2] = False
            visible[..., seqlen_k - 5 :] = False
        if full[2]:
            visible[..., : seqlen_q // 4, :] = False
        k, v = hide(k, visible, torch.nan), hide(v, visible, torch.inf)
        mask = visible
        if kind == "float":
            mask = torch.randn(visible.shape).masked_fill(~visible, -torch.inf).to(dtype)
        results = assert_attention_close(
            "aten", q, k, v, with_noise=True, attn_mask=mask, **OPTIONS[name]
        )
        assert all(not x.isnan().any() for x in results.values()), full


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_form_of_mask(name: str, lengths: tuple[int, int], kind: str) -> None:
    """Hidden keys are NaN and hidden values inf; some rows see no key."""
    check_every_form(kind, name, torch.float32, lengths, FORMS)


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_form_of_mask_in_blocks(name: str, kind: str, small_blocks: None) -> None:
    check_every_form(kind, name, torch.float32, (129, 129), FORMS)
    check_every_form(kind, name, torch.float64, (70, 90), FORMS[7::8])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("name", OPTIONS)
def test_masks_in_every_dtype(name: str, kind: str, dtype: torch.dtype) -> None:
    for lengths in LENGTHS:
        check_every_form(kind, name, dtype, lengths, FORMS[1::6])


@pytest.mark.parametrize("mask_dtype", SUPPORTED_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", SUPPORTED_DTYPES, ids=str)
def test_a_float_mask_of_any_dtype(dtype: torch.dtype, mask_dtype: torch.dtype) -> None:
    q, k, v = qkv(40, 50, dtype)
    mask = torch.randn(1, 4, 40, 50).to(mask_dtype)
    mask[torch.rand(mask.shape) < 0.2] = -torch.inf
    for layout in (mask, mask.mT.contiguous().mT, mask.permute(0, 2, 3, 1).contiguous()):
        fitting = layout if layout.shape == mask.shape else layout.permute(0, 3, 1, 2)
        results = assert_attention_close("aten", q, k, v, with_noise=True, attn_mask=fitting)
        assert results["dattn_mask"].dtype == mask_dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_least_finite_number_is_a_score(dtype: torch.dtype) -> None:
    """Alone in a row it gives every key the same weight; beside others none."""
    q, k, v = qkv(9, 40, dtype)
    mask = torch.zeros(1, 1, 9, 40)
    mask[..., 3, :] = torch.finfo(torch.float32).min
    mask[..., 4, ::2] = torch.finfo(torch.float32).min
    out = torch.as_tensor(flash_attention(q, k, v, attn_mask=mask, backend="aten"))
    even = v.float().mean(dim=2).repeat_interleave(2, dim=1)
    torch.testing.assert_close(out[:, :, 3].float(), even, atol=2e-2, rtol=2e-2)
    hidden = torch.zeros(9, 40, dtype=torch.bool)
    hidden[4, ::2] = True
    same = flash_attention(q, k, v, attn_mask=~hidden, backend="aten")
    torch.testing.assert_close(out[:, :, 4], torch.as_tensor(same)[:, :, 4])


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_rows_without_keys(kind: str) -> None:
    q, k, v = (x.requires_grad_() for x in qkv(20, 30, torch.float32))
    visible = torch.ones(20, 30, dtype=torch.bool)
    visible[5:9] = False
    mask = visible if kind == "bool" else torch.zeros(20, 30).masked_fill(~visible, -torch.inf)
    o, lse = flash_attention(q, k, v, attn_mask=mask, return_lse=True, backend="aten")
    assert o[:, :, 5:9].count_nonzero() == 0
    assert (lse == -torch.inf).sum() == lse[:, :, 5:9].numel()
    grads = torch.autograd.grad((o.sum(), lse.sum()), (q, k, v), (o.new_ones(()),) * 2)
    assert grads[0][:, :, 5:9].count_nonzero() == 0
    assert all(x.isfinite().all() for x in grads)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_mask_that_hides_all(options: dict[str, Any]) -> None:
    q, k, v = qkv(20, 30, torch.float32)
    for mask in (torch.zeros(1, 1, dtype=torch.bool), torch.full((20, 30), -torch.inf)):
        assert_attention_close("aten", q, k, v, with_noise=True, attn_mask=mask, **options)


def test_a_score_of_0_with_an_lse_of_0_is_a_row_with_a_key() -> None:
    """The kernel's lse of a row without keys."""
    q = torch.zeros(1, 1, 3, 20)
    v = torch.randn(1, 1, 20, 20)
    visible = torch.zeros(3, 20, dtype=torch.bool)
    visible[1, 4] = True
    o, lse = flash_attention(q, q.new_ones(1, 1, 20, 20), v, attn_mask=visible, return_lse=True)
    assert lse.flatten().tolist() == [-torch.inf, 0, -torch.inf]
    torch.testing.assert_close(o[0, 0, 1], v[0, 0, 4])


def test_hidden_scores_that_overflow_reach_nothing() -> None:
    """inf - inf is NaN, though all inputs are finite."""
    q, k, v = (x.requires_grad_() for x in qkv(20, 30, torch.float32))
    with torch.no_grad():
        k[:, :, 7] = 3e38
    visible = torch.ones(20, 30, dtype=torch.bool)
    visible[:, 7] = False
    results = []
    for backend in ("aten", "tiled"):
        out = flash_attention(q, k, v, attn_mask=visible, backend=backend)
        assert isinstance(out, Tensor)
        results.append((out, *torch.autograd.grad(out.sum(), (q, k, v))))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck_of_a_mask(causal: bool, small_blocks: None) -> None:
    q, k, v = qkv(5, 6, torch.float64)
    for shape in ((1, 1, 5, 6), (2, 4, 5, 1), (1, 4, 1, 6)):
        mask = torch.randn(shape, dtype=torch.float64)
        gradcheck("aten", q[..., :3], k[..., :3], v[..., :3], attn_mask=mask, causal=causal)


SIDES = st.none() | st.integers(0, 60)


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(1, 200), SIDES, SIDES, st.booleans(), st.integers(0, 2**31))
def test_the_blocks_of_a_mask_hold_every_visible_pair_once(
    queries: int, keys: int, left: int | None, right: int | None, is_top_left: bool, seed: int
) -> None:
    """Banded masks, whose blocks leave keys out; what the kernel adds is 0 where visible."""
    spec = AttentionSpec(1.0, left, right, "top_left" if is_top_left else "bottom_right")
    width = torch.randint(1, 60, (), generator=torch.Generator().manual_seed(seed))
    i, j = torch.arange(queries)[:, None], torch.arange(keys)
    mask = ((i - j).abs() <= width)[None, None]
    q, k = torch.zeros(1, 1, queries, 1), torch.zeros(1, 1, keys, 1)
    extras = AttentionExtras(attn_mask=mask)
    count = torch.zeros(queries, keys)
    for block in masks.blocks(q, k, spec, extras, 32, 1):
        added = masks.added(block, spec, extras, torch.float32)
        assert set(added.unique().tolist()) <= {0, -torch.inf}
        count[block.q_rows, block.k_rows] += added[0, 0] == 0
    visible = spec.visible(0, queries, 0, keys, queries, keys, q.device) & mask[0, 0]
    assert torch.equal(count, visible.float())


@pytest.mark.parametrize("dtype", SUPPORTED_DTYPES, ids=str)
def test_a_bool_mask_in_numbers(dtype: torch.dtype) -> None:
    visible = torch.rand(3, 1, 5, 7) < 0.5
    expected = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, -torch.inf)
    assert torch.equal(masks.additive(visible, dtype), expected)
    unusual = torch.full((4,), 2, dtype=torch.uint8).view(torch.bool)  # True is any byte but 0
    assert torch.equal(masks.additive(unusual, dtype), torch.zeros(4, dtype=dtype))


def test_a_float_mask_is_passed_without_a_copy_and_a_bool_one_converted_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q, k, v = qkv(40, 50, torch.float32)
    seen = []
    call = aten.flash_forward
    monkeypatch.setattr(
        aten, "flash_forward", lambda *args: (seen.append(args[-1]), call(*args))[1]
    )
    mask = torch.randn(2, 1, 40, 50)
    flash_attention(q, k, v, attn_mask=mask)
    assert [piece.mask.data_ptr() for piece in seen] == [mask.data_ptr()]
    converted = []
    additive = masks.additive
    monkeypatch.setattr(
        masks, "additive", lambda x, dtype: (converted.append(x.numel()), additive(x, dtype))[1]
    )
    visible = torch.rand(1, 1, 40, 50) < 0.5
    flash_attention(q, k, v, attn_mask=visible)
    assert converted == [visible.numel()]


def test_blocks_leave_out_keys_that_a_mask_hides_from_them(small_blocks: None) -> None:
    q = torch.zeros(1, 1, 128, 8)
    for mask in (
        torch.ones(1, 1, 128, 128, dtype=torch.bool).tril(),
        torch.full((1, 1, 128, 128), -torch.inf).triu(1),
    ):
        found = pieces.split(q, q, AttentionSpec(1.0), AttentionExtras(attn_mask=mask))
        assert [piece.k_rows.stop for piece in found] == [32, 64, 96, 128]


def test_auto_takes_the_kernel_for_a_dense_mask() -> None:
    q, k, v = qkv(40, 50, torch.float32)
    one_row = torch.randn(1, 2, 1, 24, dtype=torch.bfloat16)
    for tensors, mask in (
        ((q, k, v), torch.rand(40, 50) < 0.5),
        ((q, k, v), torch.rand(2, 4, 40, 50)),
        ((one_row, one_row, one_row), torch.ones(1, 1, 1, 1, dtype=torch.bool)),
    ):
        for options in OPTIONS.values():
            problem = build_problem(*tensors, attn_mask=mask, **options)
            assert backends.select("auto", problem).name == "aten"
    assert available_backends(q, k, v, attn_mask=torch.rand(40, 50), sinks=torch.rand(4))["aten"]
