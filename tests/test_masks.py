"""Interval masks: what the builders mean, what is made of a mask, every backend with one."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from flashlayer import flash_attention, flash_attention_varlen, masks
from flashlayer.backends import tiled
from flashlayer.masks import IntervalMask
from flashlayer.spec import AttentionExtras, AttentionSpec
from flashlayer.testing import assert_attention_close, gradcheck
from tests.strategies import random_tree
from tests.test_accuracy import device_for

S = 37
QUERY, KEY = torch.arange(S)[:, None], torch.arange(S)
DOCUMENTS = torch.tensor([0] * 5 + [7] * 10 + [2] * 7 + [-1] * 15)  # the last are padding
BLOCKS = torch.tensor([0] * 5 + [1] * 10 + [2] * 7 + [0] * 15)
BACKENDS = ("triton", "aten", "tiled", "standard")


def ancestors(parents: Tensor) -> Tensor:
    """The definition of a tree's mask, token by token."""
    mask = torch.eye(S, dtype=torch.bool)
    for token in range(S):
        parent = int(parents[token])
        while parent >= 0:
            mask[token, parent] = True
            parent = int(parents[parent])
    return mask


TREE = random_tree(S, torch.Generator().manual_seed(0))
SAME_DOCUMENT = (DOCUMENTS[:, None] == DOCUMENTS) & (DOCUMENTS >= 0)
PREFIXES = torch.tensor([0, 4, S])
BUILT: dict[str, tuple[Callable[[], IntervalMask], Tensor]] = {
    "documents": (lambda: masks.documents(DOCUMENTS), SAME_DOCUMENT),
    "documents_of_a_batch": (
        lambda: masks.documents(torch.stack((DOCUMENTS, BLOCKS.clamp(max=0)))),
        torch.stack((SAME_DOCUMENT, torch.ones(S, S, dtype=torch.bool)))[:, None],
    ),
    "documents_by_boundaries": (
        lambda: masks.documents(cu_seqlens=torch.tensor([0, 5, 5, 15, 22]), seqlen=S),
        SAME_DOCUMENT,
    ),
    "prefix_lm": (
        lambda: masks.prefix_lm(PREFIXES, seqlen=S),
        ((KEY <= QUERY) | (PREFIXES[:, None, None] > KEY))[:, None],
    ),
    "blocks_bidirectional": (
        lambda: masks.blocks_bidirectional(BLOCKS),
        (KEY <= QUERY) | ((BLOCKS[:, None] == BLOCKS) & (BLOCKS != 0)),
    ),
    "chunks": (lambda: masks.chunks(8, seqlen=S), QUERY // 8 == KEY // 8),
    "tree": (lambda: masks.tree(TREE), ancestors(TREE)),
    "global_and_window": (
        lambda: masks.global_and_window(3, 5, seqlen=S),
        (KEY <= QUERY) & ((KEY < 3) | (QUERY - KEY <= 5)),
    ),
    "global_and_window_both_ways": (
        lambda: masks.global_and_window(3, (5, 2), seqlen=S),
        (KEY < 3) | (QUERY < 3) | ((QUERY - KEY <= 5) & (KEY - QUERY <= 2)),
    ),
}


def random_mask(
    batch: int, heads: int, seqlen_q: int, seqlen_k: int, count: int, seed: int
) -> tuple[IntervalMask, Tensor]:
    """Random intervals, some empty, overlapping or out of order; and their definition."""
    generator = torch.Generator().manual_seed(seed)
    ends = torch.randint(0, seqlen_q + 1, (batch, heads, 2 * count, seqlen_k), generator=generator)
    i = torch.arange(seqlen_q)[:, None]
    dense = torch.zeros(batch, heads, seqlen_q, seqlen_k, dtype=torch.bool)
    for n in range(count):
        dense |= (ends[:, :, 2 * n, None] <= i) & (i < ends[:, :, 2 * n + 1, None])
    return IntervalMask(ends, seqlen_q), dense


@pytest.mark.parametrize("name", BUILT)
def test_a_builder_means_its_formula(name: str) -> None:
    build, expected = BUILT[name]
    mask = build()
    dense = mask.materialize()
    assert dense.dtype == torch.bool
    assert dense.ndim == 4
    assert torch.equal(dense, expected.expand_as(dense))
    assert mask.intervals.dtype == torch.int32
    assert name.split("_of_")[0].split("_by_")[0].split("_both")[0].split("_")[0] in repr(mask)


def test_any_tree_in_depth_first_order() -> None:
    generator = torch.Generator().manual_seed(1)
    trees = torch.stack([random_tree(S, generator) for _ in range(20)])
    dense = masks.tree(trees).materialize()[:, 0]
    assert torch.equal(dense, torch.stack([ancestors(parents) for parents in trees]))


@pytest.mark.parametrize("seed", range(10))
def test_intervals_are_what_they_say(seed: int) -> None:
    mask, dense = random_mask(2, 3, S, 29, 2, seed)
    assert torch.equal(mask.materialize(), dense)
    assert torch.equal(masks.from_dense(dense).materialize(), dense)
    queries, keys = slice(5, 30), slice(2, 20)
    assert torch.equal(mask.crop(queries, keys).materialize(), dense[:, :, queries, keys])
    cropped = mask.crop([slice(2, 9), slice(9, 9), slice(30, S)], [slice(4), slice(20, None)])
    rows, columns = [*range(2, 9), *range(30, S)], [*range(4), *range(20, 29)]
    assert torch.equal(cropped.materialize(), dense[:, :, rows][..., columns])
    assert torch.equal(mask.narrow_heads(1, 2).materialize(), dense[:, 1:])
    one, one_dense = random_mask(1, 1, S, 29, 1, seed + 100)
    hidden = IntervalMask(one.intervals, S, hidden=True)
    assert torch.equal(hidden.materialize(), ~one_dense)
    other, other_dense = random_mask(2, 1, S, 29, 1, seed + 200)
    both = one & other
    assert torch.equal(both.materialize(), (one_dense & other_dense))
    # A key that no query may attend to has no first interval either.
    starts, stops = mask.intervals[:, :, ::2], mask.intervals[:, :, 1::2]
    assert ((starts[:, :, 1] > stops[:, :, 0]) | (stops[:, :, 1] == 0)).all()


def test_a_flex_attention_block_mask() -> None:
    def allowed(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return ((i >= j) & (i - j < 100)) | ((j < 7) & (i > 200 + 10 * b))

    block_mask = create_block_mask(allowed, 2, 1, 300, 280, device="cpu")
    b, i, j = torch.arange(2)[:, None, None, None], torch.arange(300)[:, None], torch.arange(280)
    dense = masks.from_block_mask(block_mask).materialize()
    assert torch.equal(dense, allowed(b, torch.tensor(0), i, j))


def test_masks_combine_to_what_both_allow() -> None:
    both = masks.documents(DOCUMENTS) & masks.global_and_window(3, 5, seqlen=S)
    assert torch.equal(both.materialize()[0, 0], SAME_DOCUMENT & BUILT["global_and_window"][1])
    assert repr(both).startswith("IntervalMask(documents & 3 global and a window of 5: 37 queries")


def test_a_mask_moves_and_stays_as_it_is() -> None:
    mask = masks.chunks(8, seqlen=S, device="cpu")
    moved = mask.to("meta")
    assert moved.device.type == "meta"
    assert "device='meta'" in repr(moved)
    assert moved.intervals.shape == mask.intervals.shape
    with pytest.raises(AttributeError):
        mask.seqlen_q = 3  # type: ignore[misc]
    remade = dataclasses.replace(mask, intervals=mask.intervals[..., :8])
    assert torch.equal(remade.materialize(), mask.materialize()[..., :8])
    assert "chunks of 8" in repr(remade)


def test_memory_is_linear_in_the_length() -> None:
    seqlen = 2**15  # whose dense mask has 1 GiB
    for mask in (
        masks.documents(torch.arange(seqlen) // 1000),
        masks.global_and_window(64, (512, 512), seqlen=seqlen),
    ):
        assert mask.intervals.untyped_storage().nbytes() <= 16 * seqlen


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: IntervalMask(torch.zeros(2, 5), 5), "intervals must be an int32 or int64 tensor"),
        (lambda: IntervalMask(torch.zeros(3, 5).int(), 5), "intervals must be (2 or 4, keys)"),
        (lambda: IntervalMask(torch.full((2, 5), 6), 5), "intervals must be from 0 to seqlen_q=5"),
        (lambda: IntervalMask(torch.full((2, 5), -1), 5), "intervals must be from 0 to seqlen_q=5"),
        (lambda: masks.from_dense(torch.ones(3, 3)), "mask must be a bool tensor"),
        (
            lambda: masks.from_dense(torch.arange(6)[:, None].expand(6, 4) % 2 == 0),
            "at most 2 intervals of queries for each key, key 0 of batch entry 0, head 0 needs 3",
        ),
        (lambda: masks.documents(torch.tensor([0, 1, 0])), "a document must be one stretch"),
        (lambda: masks.documents(torch.zeros(3)), "ids must be an int32 or int64 tensor"),
        (lambda: masks.documents(), "documents needs either ids or cu_seqlens"),
        (
            lambda: masks.documents(cu_seqlens=torch.tensor([0, 5, 3])),
            "cu_seqlens must start at 0, not fall",
        ),
        (lambda: masks.prefix_lm(torch.tensor([9]), seqlen=5), "prefix_lengths must be from 0 to"),
        (
            lambda: masks.blocks_bidirectional(torch.tensor([1, 0, 1])),
            "a block must be one stretch",
        ),
        (lambda: masks.chunks(0, seqlen=5), "size must be at least 1, got 0"),
        (lambda: masks.tree(torch.tensor([-1, 0, 0, 1])), "parents must be in depth-first order"),
        (lambda: masks.tree(torch.tensor([-1, 2, 0])), "parents must be -1 or the position of an"),
        (lambda: masks.global_and_window(-1, 2, seqlen=5), "n_global and window must be at least"),
        (lambda: masks.from_block_mask(torch.ones(2)), "block_mask must be a BlockMask"),
        (
            lambda: masks.chunks(2, seqlen=5) & masks.chunks(2, seqlen=6),
            "masks that are combined must have the same (queries, keys), got (5, 5) and (6, 6)",
        ),
        (
            lambda: masks.chunks(2, seqlen=5).crop(slice(0, 9), slice(0, 2)),
            "queries must be a slice",
        ),
        (
            lambda: masks.chunks(2, seqlen=5).crop(slice(5), [slice(2, 4), slice(0, 1)]),
            "keys must be a slice within 0 to 5, or several that ascend, got [slice(2, 4",
        ),
        (
            lambda: masks.chunks(2, seqlen=5).crop([], slice(5)),
            "queries must be at least one slice",
        ),
    ],
)
def test_a_wrong_mask_is_refused_in_a_sentence(make: Callable[[], object], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        make()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (masks.chunks(4, seqlen=9), "an IntervalMask of 8 queries and 8 keys, got one of 9 and 9"),
        (
            masks.documents(torch.zeros(3, 8).int()),
            "batch=2 or 1 and heads=4 or 1, got one of batch=3",
        ),
        (masks.chunks(4, seqlen=8, device="meta"), "attn_mask must be on query's device cpu"),
    ],
)
def test_a_mask_for_another_call_is_refused(mask: IntervalMask, message: str) -> None:
    q = torch.randn(2, 4, 8, 16)
    with pytest.raises(ValueError, match=re.escape(message)):
        flash_attention(q, q, q, attn_mask=mask)


OPTIONS = {
    "alone": {},
    "causal": {"causal": True},
    "window": {"window_size": (14, 6)},
    "dropout": {"softcap": 3.0, "dropout_p": 0.3, "dropout_seed": 5},
    "sinks": {"sinks": torch.tensor([0.5, -1.0]), "alibi_slopes": torch.tensor([0.3, 0.1])},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("of_each", ["one_for_all", "batch", "heads"])
def test_every_option_with_a_mask(backend: str, options: str, of_each: str) -> None:
    device = device_for(backend)
    batch, heads, count = {"one_for_all": (1, 1, 1), "batch": (2, 1, 2), "heads": (1, 2, 2)}[
        of_each
    ]
    mask, _ = random_mask(batch, heads, 70, 83, count, 3)
    q = torch.randn(2, 2, 70, 16, device=device)
    k, v = torch.randn(2, 2, 1, 83, 16, device=device).unbind(0)
    moved = {n: x.to(device) if isinstance(x, Tensor) else x for n, x in OPTIONS[options].items()}
    call = partial(
        assert_attention_close, backend, q, k, v, attn_mask=mask.to(device), with_noise=True
    )
    if backend == "aten" and options in ("dropout", "sinks"):
        with pytest.raises(ValueError, match="backend 'aten' can't compute this call: it has no"):
            call(**moved)
        return
    call(**moved)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", BUILT)
def test_a_mask_equals_its_dense_form(backend: str, name: str) -> None:
    device = device_for(backend)
    mask = BUILT[name][0]().to(device)
    q, k, v = torch.randn(3, 3 if name == "prefix_lm" else 2, 2, S, 16, device=device).unbind(0)
    out, lse = flash_attention(q, k, v, attn_mask=mask, backend=backend, return_lse=True)
    dense = mask.materialize()
    expected, expected_lse = flash_attention(
        q.double(), k.double(), v.double(), attn_mask=dense, backend="standard", return_lse=True
    )
    torch.testing.assert_close(out, expected.float(), atol=2e-6, rtol=0)
    torch.testing.assert_close(lse, expected_lse.float(), atol=4e-6, rtol=0)


@pytest.mark.parametrize("backend", ["triton", "aten", "tiled"])
def test_hidden_keys_may_hold_anything(backend: str) -> None:
    device = device_for(backend)
    mask, dense = random_mask(2, 1, 150, 140, 1, 8)
    options = {"causal": True}
    visible = dense & (torch.arange(140) <= torch.arange(150)[:, None] + 140 - 150)
    hidden = ~visible.any(dim=2).expand(2, 2, -1).to(device)[..., None]
    assert hidden.any()
    assert not hidden.all()
    q, k, v = (torch.randn(2, 2, s, 16, device=device) for s in (150, 140, 140))
    results = []
    for filler in (0.0, torch.nan, torch.inf):
        leaves = [q, *(x.masked_fill(hidden, filler) for x in (k, v))]
        leaves = [x.requires_grad_() for x in map(torch.clone, leaves)]
        out = flash_attention(*leaves, attn_mask=mask.to(device), backend=backend, **options)
        grads = torch.autograd.grad(out.sin().sum(), leaves)
        results.append((out.detach(), *grads))
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))
    assert all((x[hidden.expand_as(x)] == 0).all() for x in results[0][2:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_documents_are_what_packing_computes(backend: str) -> None:
    device = device_for(backend)
    lengths = [3, 70, 1, 65, 20]
    edges = torch.tensor([0, *lengths]).cumsum(0).to(device)
    total = int(edges[-1])
    q, k, v = (torch.randn(1, h, total, 16, device=device) for h in (4, 2, 2))
    mask = masks.documents(cu_seqlens=edges)
    out = flash_attention(q, k, v, attn_mask=mask, causal=True, backend=backend)
    packed = flash_attention_varlen(
        *(x[0].transpose(0, 1) for x in (q, k, v)), cu_seqlens_q=edges, causal=True, backend=backend
    )
    torch.testing.assert_close(out[0].transpose(0, 1), packed, atol=1e-6, rtol=0)
    for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        alone = (x[:, :, start:stop] for x in (q, k, v))
        expected = flash_attention(*alone, causal=True, backend=backend)
        torch.testing.assert_close(out[:, :, start:stop], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("backend", ["triton", "aten", "tiled"])
def test_a_document_leaves_every_bit_of_another_as_it_was(backend: str) -> None:
    device = device_for(backend)
    mask = masks.documents(torch.tensor([0] * 71 + [1] * 59)).to(device)
    q, k, v, do = torch.randn(4, 1, 2, 130, 16, device=device).unbind(0)

    def second(factor: float) -> list[Tensor]:
        first = torch.ones(130, 1, device=device)
        first[:71] = factor
        leaves = [(x * first).requires_grad_() for x in (q, k, v)]
        out = flash_attention(*leaves, attn_mask=mask, causal=True, backend=backend)
        grads = torch.autograd.grad(out, leaves, do * first)
        return [x[:, :, 71:] for x in (out, *grads)]

    for x, y in zip(second(1.0), second(-3.0), strict=True):
        assert torch.equal(x, y)


def test_tiles_without_a_visible_pair_are_skipped() -> None:
    """Counted by their products: two for each tile that is computed."""
    mask = masks.documents(torch.arange(4096) // 512)
    q = torch.randn(1, 1, 4096, 8)
    products = []

    class Counter(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.bmm.default:
                products.append(args[0].shape)
            return func(*args, **(kwargs or {}))

    spec, extras = AttentionSpec(1.0), AttentionExtras(intervals=mask.intervals)
    with Counter():
        tiled.forward(q, q, q, spec, extras)
    assert len(products) == 2 * 8  # two for each of the 8 tiles on the diagonal, of 64


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_all_orders(backend: str) -> None:
    q, k, v = torch.randn(3, 1, 2, 9, 4, dtype=torch.float64).unbind(0)
    mask, _ = random_mask(1, 2, 9, 9, 1, 4)
    second_order = backend != "standard"
    gradcheck(backend, q, k, v, attn_mask=mask, second_order=second_order)


def test_transforms_with_a_mask() -> None:
    q, k, v, t = torch.randn(4, 3, 1, 2, S, 8, dtype=torch.float64).unbind(0)
    mask, dense = masks.chunks(8, seqlen=S), BUILT["chunks"][1]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attention(q, k, v, attn_mask=mask, backend="tiled")

    def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attention(q, k, v, attn_mask=dense, backend="standard")

    for transform in (
        lambda f: torch.func.vmap(f)(q, k, v),
        lambda f: torch.func.jvp(f, (q[0], k[0], v[0]), (t[0], t[1], t[2]))[1],
        lambda f: torch.func.vmap(torch.func.grad(lambda *x: f(*x).sin().sum()))(q, k, v),
    ):
        torch.testing.assert_close(transform(attend), transform(expected))


def test_a_compiled_graph_takes_a_mask_and_makes_one() -> None:
    def attend(q: Tensor, ids: Tensor, mask: IntervalMask) -> Tensor:
        made = masks.documents(ids)
        options = {"causal": True, "backend": "tiled"}
        return flash_attention(q, q, q, attn_mask=made, **options) + flash_attention(
            q, q, q, attn_mask=mask, **options
        )

    torch.compiler.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
    for seqlen in (20, 33):
        q = torch.randn(2, 2, seqlen, 8, requires_grad=True)
        arguments = (q, torch.arange(seqlen) // 7, masks.chunks(8, seqlen=seqlen))
        out, expected = compiled(*arguments), attend(*arguments)
        torch.testing.assert_close(out, expected)
        (grad,) = torch.autograd.grad(out.sin().sum(), q)
        torch.testing.assert_close(grad, torch.autograd.grad(expected.sin().sum(), q)[0])
    with pytest.raises(RuntimeError, match="a document must be one stretch"):
        compiled(q, torch.arange(33) % 3, masks.chunks(8, seqlen=33))
