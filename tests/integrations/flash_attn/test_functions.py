"""Dense and packed attention against the documentation, written out in fp64."""

from typing import Any

import pytest
import torch
from torch import Tensor

import flashlayer
from flashlayer.integrations import flash_attn as door
from flashlayer.testing import assert_accurate, exponential_error
from tests.integrations.flash_attn.reference import (
    OPTIONS,
    SK,
    SQ,
    B,
    D,
    H,
    close,
    edges,
    pack,
    paged,
    qkv,
    reference,
)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_dense(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    leaves = [x.requires_grad_() for x in qkv()]
    formula = {name: value for name, value in options.items() if name != "deterministic"}
    expected = reference(*leaves, **formula)[:2]
    out, lse, probabilities = door.flash_attn_func(*leaves, **options, return_attn_probs=True)
    assert out.is_contiguous()
    assert probabilities.shape == (0,)
    close((out, lse), expected)
    cotangents = [torch.randn_like(x) for x in expected]
    grads = [torch.autograd.grad(x, leaves, cotangents) for x in ((out, lse), expected)]
    close(*grads)
    close(door.flash_attn_func(*leaves, **options), out)
    q, k, v = (x.detach().requires_grad_() for x in leaves)
    close(door.flash_attn_kvpacked_func(q, torch.stack((k, v), 2), **options), out)
    if options.get("alibi_slopes") is None:
        qkv_packed = torch.randn(B, SQ, 3, H, D, dtype=torch.float64, requires_grad=True)
        packed = door.flash_attn_qkvpacked_func(qkv_packed, **options)
        whole = reference(*qkv_packed.unbind(2), **formula)[0]
        close(packed, whole)
        close(*(torch.autograd.grad(x.square().sum(), qkv_packed)[0] for x in (packed, whole)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_accuracy_in_lower_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    tensors = qkv(dtype)
    for options in ({"causal": True}, {"window_size": (3, 0)}):
        actual = door.flash_attn_func(*tensors, **options)
        layout = [x.transpose(1, 2) for x in tensors]
        window = {"causal": True} if "causal" in options else {"window_size": (3, 0)}
        same = flashlayer.flash_attention(*layout, **window, backend="standard").transpose(1, 2)
        exact = reference(*(x.double() for x in tensors), **options)[0]
        # The door takes ATen's kernel here.
        assert flashlayer.available_backends(*layout, **window)["aten"] is None
        wide = [x.double() for x in layout]
        cotangents = torch.zeros_like(wide[0]), torch.zeros_like(wide[0][..., 0])
        exponential = exponential_error(*wide, *cotangents, dtype=dtype, **window)
        assert_accurate("out", actual, same, exact, 2, exponential["out"])


def test_a_window_may_be_a_tensor_of_two() -> None:
    """flash_attn takes its integers out of it."""
    q, k, v = qkv()
    pair = torch.tensor([3, 1])
    expected = door.flash_attn_func(q, k, v, window_size=(3, 1))
    assert torch.equal(door.flash_attn_func(q, k, v, window_size=pair), expected)
    assert torch.equal(door.flash_attn_func(q, k, v, window_size=tuple(pair)), expected)


def test_rows_that_see_nothing() -> None:
    q, k, v = qkv(seqlen_k=2)  # 5 causal queries, 2 keys: the first three see none
    out, lse, _ = door.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert (out[:, :3] == 0).all()
    assert (lse[..., :3] == -torch.inf).all()
    close(out, reference(q, k, v, causal=True)[0])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_varlen(options: dict[str, Any]) -> None:
    torch.manual_seed(2)
    leaves = [x.requires_grad_() for x in qkv()]
    q_lengths, k_lengths = [5, 3], [7, 9]
    q, k, v = (
        pack(x, lengths)
        for x, lengths in zip(leaves, (q_lengths, k_lengths, k_lengths), strict=True)
    )
    sizes = (edges(q_lengths), edges(k_lengths), SQ, torch.tensor(SK))
    out, lse, _ = door.flash_attn_varlen_func(q, k, v, *sizes, **options, return_attn_probs=True)
    options = {name: value for name, value in options.items() if name != "deterministic"}
    slopes = options.get("alibi_slopes")
    expected, expected_lse = [], []
    for n, (length_q, length_k) in enumerate(zip(q_lengths, k_lengths, strict=True)):
        row = options | (
            {"alibi_slopes": slopes[n]} if slopes is not None and slopes.ndim == 2 else {}
        )
        one = (leaves[0][n, None, :length_q], *(x[n, None, :length_k] for x in leaves[1:]))
        row_out, row_lse, _ = reference(*one, **row)
        expected.append(row_out[0])
        expected_lse.append(row_lse[0])
    close(out, torch.cat(expected))
    close(lse, torch.cat(expected_lse, dim=1))
    close(
        torch.autograd.grad(out.square().sum(), leaves),
        torch.autograd.grad(torch.cat(expected).square().sum(), leaves),
    )
    kv = torch.stack((k, v), dim=1)
    close(door.flash_attn_varlen_kvpacked_func(q, kv, *sizes, **options), out)


def test_varlen_qkvpacked() -> None:
    x, lengths = torch.randn(8, 3, H, D, dtype=torch.float64), [3, 5]
    out = door.flash_attn_varlen_qkvpacked_func(x, edges(lengths), 5, causal=True)
    whole = [reference(*part[None].unbind(2), causal=True)[0][0] for part in x.split(lengths)]
    close(out, torch.cat(whole))


def test_paged_varlen() -> None:
    torch.manual_seed(3)
    page, lengths = 4, [7, 9]
    q, k, v = qkv()
    pages, table = paged(torch.stack((k, v)), page)
    actual = door.flash_attn_varlen_func(
        pack(q, [5, 5]), *pages, edges([5, 5]), edges(lengths), 5, 9, causal=True, block_table=table
    )
    expected = reference(q, k, v, causal=True, lengths=torch.tensor(lengths))[0]
    close(actual, expected.flatten(0, 1))


def test_a_block_table_may_hold_anything_past_the_last_page() -> None:
    """Servers allocate it as wide as their longest sequence, and fill in what they use."""
    q, k, v = qkv()
    pages, table = paged(torch.stack((k, v)), page=4)  # 3 pages a row
    lengths = torch.tensor([7, 3], dtype=torch.int32)
    table[0, 2], table[1, 1:] = -7, 2**30
    expected = reference(q, k, v, causal=True, lengths=lengths)[0]
    out = door.flash_attn_with_kvcache(
        q, *pages, cache_seqlens=lengths, block_table=table, causal=True
    )
    close(out, expected)
    options = {"causal": True, "block_table": table}
    sizes = (edges([SQ, SQ]), edges([7, 3]), SQ, 7)
    close(
        door.flash_attn_varlen_func(q.flatten(0, 1), *pages, *sizes, **options), out.flatten(0, 1)
    )


@pytest.mark.parametrize("packed", [False, True])
def test_dropout_and_its_mask(packed: bool) -> None:
    """S_dmask: the probabilities, negative where the output was made without them."""
    torch.manual_seed(4)
    q, k, v = qkv()
    call = {"dropout_p": 0.4, "causal": True}
    if packed:
        lengths = [4, 5], [7, 9]
        masks = [
            torch.arange(n) < torch.tensor(side)[:, None]
            for n, side in ((SQ, lengths[0]), (SK, lengths[1]))
        ]
        sizes = (*(edges(side) for side in lengths), SQ, SK)
        out, _, s_dmask = door.flash_attn_varlen_func(
            q[masks[0]], k[masks[1]], v[masks[1]], *sizes, **call, return_attn_probs=True
        )
        parts = []
        for n, (length_q, length_k) in enumerate(zip(*lengths, strict=True)):
            one = (q[n, None, :length_q], k[n, None, :length_k], v[n, None, :length_k])
            shown = s_dmask[n, None, :, :length_q, :length_k]
            expected, _, p = reference(*one, kept=shown >= 0, **call)
            close(shown.abs(), p)
            parts.append(expected[0])
        close(out, torch.cat(parts))
        return
    out, _, s_dmask = door.flash_attn_func(q, k, v, **call, return_attn_probs=True)
    expected, _, p = reference(q, k, v, kept=s_dmask >= 0, **call)
    close(s_dmask.abs(), p)
    close(out, expected)
    assert 0.2 < (s_dmask < 0)[p > 0].double().mean() < 0.6


def test_compiles_without_a_break() -> None:
    torch._dynamo.reset()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return door.flash_attn_func(q, k, v, causal=True, window_size=(4, -1))

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    tensors = qkv(torch.float32)
    torch.testing.assert_close(compiled(*tensors), attend(*tensors))
