"""ATen's kernel behind its wrapper: windows, packed sequences and padding cut into pieces."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flashlayer import flash_attention, flash_attention_varlen
from flashlayer.backends import aten
from flashlayer.backends.aten import kernel, pieces, short
from flashlayer.backends.aten.pieces import split
from flashlayer.spec import NO_EXTRAS, AttentionExtras, AttentionSpec
from flashlayer.testing import assert_attention_close

DTYPES = [torch.float32, torch.bfloat16]


def qkv(batch: int, heads: int, kv_heads: int, seqlen: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(batch, h, seqlen, 16, dtype=dtype) for h in (heads, kv_heads, kv_heads)]


def padding(keys: int, *visible: tuple[int, int]) -> Tensor:
    """A mask (B, 1, 1, Sk); in each batch entry the keys from start to stop are visible."""
    key = torch.arange(keys)
    return torch.stack([(key >= start) & (key < stop) for start, stop in visible])[:, None, None]


WINDOWS: dict[str, dict[str, Any]] = {
    "causal": {"window_size": (50, 0)},
    "wider_than_a_block": {"window_size": (300, None), "causal": True},
    "both_sides": {"window_size": (9, 200)},
    "right_alone": {"window_size": (None, 40)},
    "left_alone": {"window_size": (40, None)},
    "diagonal_alone": {"window_size": (0, 0)},
    # Several triangles, and a shorter masked block at the end.
    "triangles": {"window_size": (64, 0)},
    "triangles_ahead": {"window_size": (0, 33)},
    "triangles_both_sides": {"window_size": (20, 29)},
    "one_pair_of_triangles": {"window_size": (101, 40)},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", WINDOWS)
def test_window(name: str, dtype: torch.dtype) -> None:
    """Several blocks of queries, the last one shorter."""
    q, k, v = qkv(2, 2, 1, 2 * pieces.MASKED_BLOCK_MIN + 37, dtype)
    assert_attention_close("aten", q, k, v, with_noise=True, **WINDOWS[name])


SIDES = st.none() | st.integers(0, 150)


@settings(deadline=None)
@given(st.integers(1, 400), st.integers(-120, 120), SIDES, SIDES, st.booleans())
def test_the_pieces_of_a_window_hold_every_pair_once(
    queries: int, more: int, left: int | None, right: int | None, is_top_left: bool
) -> None:
    """Rows, causal triangle and mask of each piece, added up, against the window itself."""
    keys = max(1, queries + more)
    q, k = torch.zeros(1, 1, queries, 1), torch.zeros(1, 1, keys, 1)
    spec = AttentionSpec(1.0, left, right, "top_left" if is_top_left else "bottom_right")
    i, j = (torch.arange(length).view(1, 1, -1, 1) for length in (queries, keys))
    count = torch.zeros(queries, keys)
    for piece in split(q, k, spec, NO_EXTRAS):
        for rows, columns in zip(piece.queries(i), piece.keys(j), strict=True):
            visible = torch.ones(rows.shape[1], columns.shape[1])
            visible = visible.tril() if piece.causal else visible
            visible = visible if piece.mask is None else visible * (piece.mask[0, 0] == 0)
            assert visible.any(dim=-1).all() or piece.mask is None, "a row without a key"
            count[rows.flatten()[:, None], columns.flatten()] += visible
    assert torch.equal(count > 0, spec.visible(0, queries, 0, keys, queries, keys, q.device))
    assert count.max() <= 1


def test_a_wide_window_needs_no_mask() -> None:
    q = torch.zeros(1, 1, 1024, 1)
    found = list(split(q, q, AttentionSpec(1.0, 128, 0, diagonal="top_left"), NO_EXTRAS))
    assert [(piece.blocks, piece.mask) for piece in found] == [(1, None), (7, None), (7, None)]


def test_triangles_come_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the size of the copies is bounded at any length."""
    monkeypatch.setattr(pieces, "TRIANGLE_ROWS", 100)
    q, k, v = qkv(2, 4, 2, 400, torch.float32)
    found = split(q, k, AttentionSpec(1.0, 40, 0, diagonal="top_left"), NO_EXTRAS)
    assert [piece.blocks for piece in found] == [1, 2, 2, 2, 2, 2, 2, 2, 2, 1, 1]
    assert_attention_close("aten", q, k, v, with_noise=True, window_size=(40, 0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (20, 3)}], ids=str)
def test_packed(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Sequences of several lengths, an empty one, and tokens past the last one."""
    edges = torch.tensor([0, 1, 1, 150, 340], dtype=torch.int32)
    q, k, v = (torch.randn(345, h, 16, dtype=dtype) for h in (4, 2, 2))
    results = assert_attention_close(
        "aten", q, k, v, with_noise=True, cu_seqlens_q=edges, **options
    )
    for name in ("out", "dq", "dk", "dv"):
        assert results[name][340:].count_nonzero() == 0, name


UNLIKE: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "window": {"window_size": (50, 3)},
    "window_causal": {"window_size": (20, None), "causal": True},
    "one_side": {"window_size": (None, 2)},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("diagonal", ["bottom_right", "top_left"])
@pytest.mark.parametrize("lengths", [(70, 200), (200, 70), (1, 90), (90, 1)], ids=str)
@pytest.mark.parametrize("name", UNLIKE)
def test_unlike_lengths(
    name: str, lengths: tuple[int, int], diagonal: str, dtype: torch.dtype
) -> None:
    """Dense, and as one of three packed sequences."""
    seqlen_q, seqlen_k = lengths
    options = {"diagonal": diagonal, "with_noise": True, **UNLIKE[name]}
    sizes = ((4, seqlen_q), (2, seqlen_k), (2, seqlen_k))
    q, k, v = (torch.randn(2, heads, seqlen, 16, dtype=dtype) for heads, seqlen in sizes)
    assert_attention_close("aten", q, k, v, **options)
    q, k, v = (torch.randn(9 + s, h, 16, dtype=dtype) for h, s in sizes)
    edges = {
        f"cu_seqlens_{side}": torch.tensor([0, 5, 5 + length, 9 + length], dtype=torch.int32)
        for side, length in (("q", seqlen_q), ("k", seqlen_k))
    }
    assert_attention_close("aten", q, k, v, **edges, **options)


@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k", "options", "overflowing"),
    [
        (4, 12, {"causal": True}, slice(0, 8)),
        (90, 90, {"window_size": (33, 0)}, slice(0, 33)),
        (90, 90, {"window_size": (33, 0)}, slice(30, 70)),  # every visible key of some queries
    ],
    ids=["causal", "window", "whole_rows"],
)
def test_a_piece_whose_scores_are_all_minus_infinity_has_no_weight(
    seqlen_q: int, seqlen_k: int, options: dict[str, Any], overflowing: slice
) -> None:
    """The kernel returns o = 0, lse = 0 for such a row; merged, that would be a key of score 0."""
    q = -(torch.rand(1, 2, seqlen_q, 8) + 0.5) * 1e20
    k, v = torch.rand(1, 1, seqlen_k, 8) + 0.5, torch.randn(1, 1, seqlen_k, 8)
    k *= 1e-20
    k[:, :, overflowing] *= 1e40
    results = []
    for backend in ("aten", "tiled"):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = flash_attention(*leaves, return_lse=True, backend=backend, **options)
        dv = torch.autograd.grad(out.sum(), leaves)[2]
        results.append((out, lse, dv))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


MASKS = {
    "right": padding(70, (0, 70), (0, 31)),
    "left": padding(70, (0, 70), (31, 70)),
    "both_ends": padding(70, (3, 69), (64, 66)),
    "one_hides_all": padding(70, (0, 70), (0, 0)),
    "of_all_entries": padding(70, (5, 60)),
    "one_key": padding(70, (69, 70), (0, 1)),
}


@pytest.mark.parametrize("is_sliced", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_padding(
    name: str, causal: bool, dtype: torch.dtype, is_sliced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden keys are NaN, so reading one shows."""
    for limit in ("SLICED_MIN", "SLICED_MIN_CAUSAL"):
        monkeypatch.setattr(pieces, limit, 0 if is_sliced else 2**62)
    q, k, v = qkv(2, 4, 2, 70, dtype)
    mask = MASKS[name]
    for x in (k, v):
        x.masked_fill_(~mask.mT, torch.nan)
    options = {"attn_mask": mask, "causal": causal}
    results = assert_attention_close("aten", q, k, v, with_noise=True, **options)
    assert all(not x.isnan().any() for x in results.values())


@pytest.mark.parametrize("causal", [False, True])
def test_padding_with_holes_is_gathered_but_not_under_causal(causal: bool, sliced: None) -> None:
    """Without its hidden keys, a key behind them would move to another place on the diagonal."""
    q, k, v = qkv(2, 2, 2, 70, torch.float32)
    mask = torch.rand(2, 1, 1, 70) < 0.5
    k.masked_fill_(~mask.mT, torch.nan)
    options = {"attn_mask": mask, "causal": causal}
    spec = AttentionSpec(1.0, None, 0 if causal else None, diagonal="top_left")
    found = list(split(q, k, spec, AttentionExtras(attn_mask=mask)))
    assert [piece.mask is None for piece in found] == ([False] if causal else [True, True])
    assert_attention_close("aten", q, k, v, with_noise=True, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seqlen_q", [1, 3, kernel.FOLDED_ROWS_MAX])
def test_a_group_of_heads_is_folded_into_rows(
    seqlen_q: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below and above the number of keys from which folding pays in fp32, set low here."""
    monkeypatch.setattr(kernel, "FOLDED_FP32_MIN", 64 * 256)
    for keys in (90, 256):
        sizes = ((6, seqlen_q), (2, keys), (2, keys))
        q, k, v = (torch.randn(2, heads, seqlen, 16, dtype=dtype) for heads, seqlen in sizes)
        few_rows = 3 * seqlen_q <= kernel.FOLDED_ROWS_MAX
        assert kernel.folds(q, k) == (few_rows and (dtype == torch.bfloat16 or keys > 90))
        assert_attention_close("aten", q, k, v, with_noise=True)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_folded_results_pass_through_forward_mode_and_a_compiled_graph(
    kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "FOLDED_FP32_MIN", 0)
    q, k, v = (torch.randn(1, h, s, 16) for h, s in ((4, 2), (kv_heads, 30), (kv_heads, 30)))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return flash_attention(q, k, v, return_lse=True, backend="aten")

    expected = attend(q, k, v)
    out, tangents = torch.func.jvp(attend, (q, k, v), (q, k, v))
    torch.testing.assert_close(out, expected)
    assert all(x.isfinite().all() for x in tangents)
    torch._dynamo.reset()
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)(q, k, v)
    torch.testing.assert_close(compiled, expected)


def test_auto_computes_one_row_of_bf16_by_the_formula() -> None:
    q, k, v = (torch.randn(1, 4, s, 16, dtype=torch.bfloat16) for s in (1, 30, 30))
    by_formula, by_auto = (
        flash_attention(q, k, v, causal=True, backend=backend) for backend in ("standard", "auto")
    )
    assert torch.equal(torch.as_tensor(by_auto), torch.as_tensor(by_formula))


def test_auto_takes_the_kernel_for_windows_padding_and_packed(
    monkeypatch: pytest.MonkeyPatch, sliced: None
) -> None:
    calls = []
    call = aten.flash_forward
    monkeypatch.setattr(aten, "flash_forward", lambda *args: (calls.append(args), call(*args))[1])
    q, k, v = qkv(2, 2, 2, 40, torch.float32)
    flash_attention(q, k, v, causal=True, window_size=(9, 0))
    assert [tuple(args[1].shape) for args in calls] == [(2, 2, 40, 16)]
    calls.clear()
    flash_attention(q, k, v, attn_mask=padding(40, (0, 40), (0, 7)))
    assert [args[1].shape[2] for args in calls] == [40, 7]
    calls.clear()
    packed = (x[0].transpose(0, 1) for x in (q, k, v))
    flash_attention_varlen(*packed, cu_seqlens_q=torch.tensor([0, 30, 40]), causal=True)
    assert [args[1].shape[2] for args in calls] == [30, 10]


def test_the_default_device_is_ignored() -> None:
    """A window's mask made on it would have no values on meta."""
    q = torch.randn(1, 1, 200, 8)
    expected = flash_attention(q, q, q, window_size=(2, 0), backend="aten")
    with torch.device("meta"):
        out = flash_attention(q, q, q, window_size=(2, 0), backend="aten")
    assert torch.equal(out, expected)


def test_a_gradient_of_lse_past_the_range_of_fp16() -> None:
    q = torch.randn(1, 1, 9, 8, dtype=torch.float16, requires_grad=True)
    _, lse = flash_attention(q, q, q, return_lse=True, backend="aten", scale=1e-3)
    (gradient,) = torch.autograd.grad(lse.sum() * 70000, q)
    assert gradient.isfinite().all()


@pytest.fixture
def sliced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padded batches are sliced however small they are."""
    monkeypatch.setattr(pieces, "SLICED_MIN", 0)
    monkeypatch.setattr(pieces, "SLICED_MIN_CAUSAL", 0)


@pytest.fixture
def shortest(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Short bf16 problems of any number of rows take the products; records each call's dO."""
    monkeypatch.setattr(short, "_limits", lambda: ((192, 0),))
    monkeypatch.setattr(short, "_has_amx", lambda: False)
    taken = []
    backward = short.short_backward
    monkeypatch.setattr(
        kernel, "short_backward", lambda do, *rest: (taken.append(do), backward(do, *rest))[1]
    )
    return taken


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(1, 1), (17, 17), (127, 129), (129, 40)])
@pytest.mark.parametrize("options", [{}, {"causal": True, "diagonal": "top_left"}], ids=str)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("at_once", [1, 2**13, 2**20])
def test_short_gradients(
    seqlen_q: int,
    seqlen_k: int,
    options: dict[str, Any],
    kv_heads: int,
    at_once: int,
    shortest: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(short, "SCORES_AT_ONCE", at_once)
    sizes = ((4, seqlen_q), (kv_heads, seqlen_k), (kv_heads, seqlen_k))
    q, k, v = (torch.randn(2, h, s, 40, dtype=torch.bfloat16) for h, s in sizes)
    if options:  # keys hidden from every query may hold anything
        k[:, :, seqlen_q:], v[:, :, seqlen_q:] = torch.nan, torch.inf
    assert_attention_close("aten", q, k, v, **options)
    assert shortest


def gradients(q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = flash_attention(*leaves, causal=True, backend="aten")
    return list(torch.autograd.grad(out, leaves, do))


def test_short_gradients_of_large_scores_are_as_accurate_as_the_kernels(
    shortest: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores rounded to bf16 would have four times the kernel's error here."""
    q, k, v, do = (torch.randn(2, 4, 128, 64, dtype=torch.bfloat16) for _ in range(4))
    expected = gradients(*(x.double() for x in (6 * q, k, v, do)))
    by_products = gradients(6 * q, k, v, do)
    assert len(shortest) == 1
    monkeypatch.setattr(short, "_limits", lambda: ())
    by_kernel = gradients(6 * q, k, v, do)
    assert len(shortest) == 1
    for short_grad, kernel_grad, exact in zip(by_products, by_kernel, expected, strict=True):
        assert (short_grad - exact).abs().max() <= 1.5 * (kernel_grad - exact).abs().max()


def test_which_short_gradients_are_products(shortest: list[Tensor], sliced: None) -> None:
    """Those of pieces that share no rows; the pieces of a window do."""
    q = torch.randn(1, 2, 150, 16, dtype=torch.bfloat16, requires_grad=True)
    flash_attention(q, q, q, window_size=(40, 0)).sum().backward()
    assert not shortest
    mask = padding(150, (3, 140))
    flash_attention(q, q, q, attn_mask=mask).sum().backward()
    assert [tuple(x.shape) for x in shortest] == [(1, 2, 150, 16)]
    shortest.clear()
    packed = q.squeeze(0).transpose(0, 1)
    edges = torch.tensor([0, 30, 150])
    flash_attention_varlen(packed, packed, packed, cu_seqlens_q=edges).sum().backward()
    assert [tuple(x.shape) for x in shortest] == [(1, 2, 30, 16), (1, 2, 120, 16)]


def test_products_hold_few_scores_at_once(
    shortest: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is that of the inputs and a constant, however many heads there are."""
    monkeypatch.setattr(short, "SCORES_AT_ONCE", 2**15)
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(
            self, op: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal largest
            out = op(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    q, k, v, do = (torch.randn(8, 8, 128, 16, dtype=torch.bfloat16) for _ in range(4))
    assert short.is_short(q, k)
    with Largest():
        short.short_backward(do, None, q, k, v, 0.25, True)
    assert 0 < largest <= max(q.numel(), 3 * 2**15) < 8 * 8 * 128 * 128 / 4


@pytest.fixture
def widened(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The rule of a CPU with AMX; records the dtype of each call of the kernel's backward pass."""
    monkeypatch.setattr(short, "_has_amx", lambda: True)
    monkeypatch.setattr(short, "_limits", lambda: short.LIMITS_AMX)
    taken = []
    backward = kernel._FLASH_BACKWARD
    monkeypatch.setattr(
        kernel,
        "_FLASH_BACKWARD",
        lambda do, *x, **y: (taken.append(do.dtype), backward(do, *x, **y))[1],
    )
    return taken


@pytest.mark.parametrize("seqlen", [1, 9, 40])
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"window_size": (3, 2)},
        {"attn_mask": "padding"},
        {"attn_mask": "dense", "causal": True},
    ],
    ids=str,
)
def test_gradients_of_few_bf16_scores_by_the_kernel_in_fp32(
    seqlen: int, kv_heads: int, options: dict[str, Any], widened: list[torch.dtype]
) -> None:
    q, k, v = qkv(2, 4, kv_heads, seqlen, torch.bfloat16)
    mask = options.get("attn_mask")
    if mask == "padding":  # the second entry has no key
        options = options | {"attn_mask": padding(seqlen, (0, seqlen), (0, 0))}
    elif mask == "dense":
        options = options | {"attn_mask": torch.rand(2, 4, seqlen, seqlen) < 0.5}
    assert_attention_close("aten", q, k, v, **options)
    assert torch.float32 in widened
    assert torch.bfloat16 not in widened


def test_which_bf16_gradients_are_widened(
    widened: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By shapes, dtype and instruction set alone."""
    few, many, long = (torch.empty(1, 8, s, 64, dtype=torch.bfloat16) for s in (90, 128, 1024))
    assert short.widens(few, few, has_mask=False)
    assert not short.widens(many, many, has_mask=False)
    assert short.is_short(many, many)
    assert short.widens(many, many, has_mask=True)
    assert not short.widens(long, long, has_mask=True)
    assert not short.is_short(long, long)
    assert not short.is_short(many.float(), many.float())
    assert not short.widens(few.float(), few.float(), has_mask=False)
    monkeypatch.undo()
    monkeypatch.setattr(short, "_has_amx", lambda: False)
    assert not short.widens(few, few, has_mask=False)
