"""Patterns read from mask functions, against the masks that transformers makes of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils as utils

from flashlayer.integrations.transformers import WindowMask, make_mask, register
from flashlayer.integrations.transformers.masks import DenseMask

register()

BATCH = 3

# Blocks of the three rows: text between images, a prefix, and none.
BLOCKS = [[-1, 0, 0, -1, 1, 1, 1, -1, -1], [0, 0, 0, 0, -1, -1, -1, -1, -1], [-1] * 9]


def blocks(total: int) -> Tensor:
    """Ids as models hand them on: padded with -1 to the keys."""
    return torch.tensor([row + [-1] * (total - 9) for row in BLOCKS])


def compositions(total: int, left_padding: Tensor) -> dict[str, Callable[..., Any]]:
    causal, images = utils.causal_mask_function, utils.blockwise_overlay(blocks(total))
    return {
        "chunks": utils.chunked_causal_mask_function(4, left_padding),
        "chunks both ways": utils.chunked_overlay(4, left_padding),
        "images": utils.or_masks(causal, images),
        "images in a window": utils.and_masks(
            utils.or_masks(causal, images), utils.sliding_window_overlay(3)
        ),
        "a window or images": utils.or_masks(utils.sliding_window_causal_mask_function(3), images),
        "images in chunks": utils.or_masks(
            utils.chunked_causal_mask_function(4, left_padding), images
        ),
        "images alone": images,
        "all or images": utils.or_masks(utils.bidirectional_mask_function, images),
        "images and a two-sided window": utils.and_masks(
            images, utils.sliding_window_bidirectional_mask_function(1)
        ),
    }


# q_length, kv_length, q_offset, kv_offset: no cache; a prefill in pieces; a static cache with room
# left, at its start and later, its position a number or a tensor; a sliding cache that has lost its
# first keys.
STANDS = [
    (9, 9, 0, 0),
    (3, 9, 6, 0),
    (9, 12, 0, 0),
    (3, 12, 5, 0),
    (3, 12, torch.tensor(5), 0),
    (3, 6, 8, 5),
    (1, 9, 8, 0),
]


@pytest.mark.parametrize("stand", STANDS, ids=str)
@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("kind", compositions(9, torch.zeros(BATCH)))
def test_intervals_are_the_hosts_mask(kind: str, padding: str | None, stand: tuple) -> None:
    q_length, kv_length, q_offset, kv_offset = stand
    mask_2d, left = None, torch.zeros(BATCH, dtype=torch.int64)
    if padding is not None:
        mask_2d = torch.ones(BATCH, int(q_offset) + q_length, dtype=torch.bool)
        mask_2d[0, :2] = mask_2d[1, :1] = False
        left = torch.tensor([2, 1, 0]) if padding == "left" else left
        mask_2d = mask_2d.flip(1) if padding == "right" else mask_2d
    function = compositions(kv_length + kv_offset, left)[kind]
    arguments = {
        "batch_size": BATCH,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": function,
        "attention_mask": mask_2d,
    }
    expected = utils.sdpa_mask(**arguments, allow_is_causal_skip=False)
    for use_vmap in (False, True):
        mask = make_mask(**arguments, use_vmap=use_vmap)
        assert torch.equal(mask.dense(), expected)
        if q_length > 1:
            assert isinstance(mask, WindowMask)
            assert (mask.intervals is not None) == (kind != "all or images")


@pytest.mark.parametrize("kind", ["causal", "window", "chunks", "images"])
def test_packed_sequences_that_transformers_numbers_are_intervals_in_a_graph(kind: str) -> None:
    """And boundaries outside, where they may be read; positions need not start at 0."""
    rows = [[4, 5], [1, 2, 6], [9]]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
    positions[2] += 3
    sequences = utils.find_packed_sequence_indices(positions)
    images = blocks(13)

    def make(positions: Tensor, sequences: Tensor, maker: Callable[..., Any]) -> Any:
        inner = {
            "causal": lambda: utils.causal_mask_function,
            "window": lambda: utils.sliding_window_causal_mask_function(3),
            "chunks": lambda: utils.chunked_causal_mask_function(4, positions.new_zeros(3)),
            "images": lambda: utils.or_masks(
                utils.causal_mask_function, utils.blockwise_overlay(images)
            ),
        }[kind]()
        function = utils.and_masks(
            utils.packed_sequence_mask_function(sequences),
            utils.remap_positions_for_packed_sequence(inner, positions),
        )
        return maker(3, 9, 9, mask_function=function)

    host = functools.partial(utils.sdpa_mask, allow_is_causal_skip=False)
    expected = make(positions, sequences, host)
    mask = make(positions, sequences, make_mask)
    assert isinstance(mask, WindowMask)
    assert torch.equal(mask.dense(), expected)
    assert (mask.intervals is None) == (kind in ("causal", "window"))
    torch.compiler.reset()
    compiled = torch.compile(make, backend="aot_eager", fullgraph=True)
    mask = compiled(positions, sequences, make_mask)
    assert torch.equal(mask.dense(), expected)
    if kind != "images":  # whether a block is in one place is for the values to say
        assert mask.intervals is not None
        assert mask.pattern is None


@pytest.mark.parametrize("stand", STANDS[:-1], ids=str)
@pytest.mark.parametrize("kind", ["causal", "window", "chunks"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_graph_makes_no_dense_mask_of_windows_and_chunks(
    kind: str, padded: bool, stand: tuple
) -> None:
    q_length, kv_length, q_offset, kv_offset = stand
    mask_2d = torch.ones(BATCH, int(q_offset) + q_length, dtype=torch.bool)
    mask_2d[0, :2] = False
    left = (~mask_2d).sum(1) if padded else torch.zeros(BATCH, dtype=torch.int64)

    def make(maker: Callable[..., Any], left: Tensor, mask_2d: Tensor, q_offset: Any) -> Any:
        function = {
            "causal": lambda: utils.causal_mask_function,
            "window": lambda: utils.sliding_window_causal_mask_function(3),
            "chunks": lambda: utils.chunked_causal_mask_function(4, left),
        }[kind]()
        mask_2d = mask_2d if padded else None
        options = {"mask_function": function, "attention_mask": mask_2d}
        return maker(BATCH, q_length, kv_length, q_offset, kv_offset, **options)

    host = functools.partial(utils.sdpa_mask, allow_is_causal_skip=False)
    expected = make(host, left, mask_2d, q_offset)
    torch.compiler.reset()
    compiled = torch.compile(make, backend="aot_eager", fullgraph=True)
    mask = compiled(make_mask, left, mask_2d, q_offset)
    assert isinstance(mask, WindowMask)
    assert mask.pattern is None
    in_intervals = kind == "chunks" or isinstance(q_offset, Tensor)
    assert (mask.intervals is not None) == in_intervals
    assert torch.equal(mask.dense(), expected)


class Reads(TorchDispatchMode):
    """Counts how often a tensor's value comes to Python."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        packet = func.overloadpacket
        self.count += packet in (torch.ops.aten._local_scalar_dense, torch.ops.aten.is_nonzero)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("q_offset", [3, torch.tensor(3)], ids=["number", "tensor"])
@pytest.mark.parametrize("padded", [False, True])
def test_intervals_are_not_read_but_for_one_bool_of_blocks(padded: bool, q_offset: Any) -> None:
    left = torch.tensor([2, 0, 0])
    padding = torch.arange(9) >= left[:, None] if padded else None
    functions = compositions(12, left)
    for kind, reads in (("chunks", 0), ("images", 1), ("images in a window", 1)):
        arguments = {"mask_function": functions[kind], "attention_mask": padding}
        with Reads() as found:
            mask = make_mask(BATCH, 6, 12, q_offset, 0, **arguments)
        assert isinstance(mask, WindowMask)
        assert mask.intervals is not None
        assert found.count == reads
    # One query has a row of its own, dense, and nothing is read for it.
    arguments = {"mask_function": functions["images"], "attention_mask": padding}
    with Reads() as found:
        assert type(make_mask(BATCH, 1, 12, 8, 0, **arguments)) is DenseMask
    assert found.count == 0


def test_a_block_in_several_places_is_dense_unless_only_what_is_causal_anyway_is_missing() -> None:
    apart = torch.tensor([[0, 0, -1, 0, -1, -1]])
    hidden = torch.tensor([[1, 1, 1, 0, 1, 1]]).bool()
    causal = utils.or_masks(utils.causal_mask_function, utils.blockwise_overlay(apart))
    windowed = utils.or_masks(
        utils.sliding_window_causal_mask_function(2), utils.blockwise_overlay(apart)
    )
    for function, padding, kind in (
        (causal, None, DenseMask),
        (causal, hidden, WindowMask),
        (windowed, None, DenseMask),
        (windowed, hidden, DenseMask),
    ):
        arguments = {"mask_function": function, "attention_mask": padding}
        mask = make_mask(1, 6, 6, **arguments)
        assert type(mask) is kind
        expected = utils.sdpa_mask(1, 6, 6, **arguments, allow_is_causal_skip=False)
        assert torch.equal(mask.dense(), expected)


def test_sequences_of_the_users_own_numbers_are_intervals_if_each_is_in_one_place() -> None:
    for ids, kind in (([5, 5, -1, -1, 2, 2], WindowMask), ([5, 5, -1, 5, 2, 2], DenseMask)):
        function = utils.and_masks(
            utils.bidirectional_mask_function,
            utils.packed_sequence_mask_function(torch.tensor([ids])),
        )
        mask = make_mask(1, 6, 6, mask_function=function, use_vmap=True)
        assert type(mask) is kind
        expected = utils.sdpa_mask(1, 6, 6, mask_function=function, allow_is_causal_skip=False)
        assert torch.equal(mask.dense(), expected)


def test_a_graph_makes_the_masks_of_others_as_before() -> None:
    """Models with another attention are traced with the same functions."""

    def make(x: Tensor) -> Tensor:
        function = utils.or_masks(
            utils.chunked_causal_mask_function(chunk_size=3, left_padding=x),
            lambda batch, head, query, key: key == 0,
        )
        options = {"mask_function": function, "use_vmap": True, "allow_is_causal_skip": False}
        return utils.sdpa_mask(2, 7, 7, **options)

    torch.compiler.reset()
    x = torch.tensor([0, 2])
    compiled = torch.compile(make, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), make(x))
