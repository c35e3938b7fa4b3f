"""The order in which programs start changes nothing but when they start."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from flashlayer.backends import triton as backend
from flashlayer.backends.triton import tiling
from flashlayer.kernels.primitives import program_coordinates
from flashlayer.spec import AttentionExtras, AttentionSpec
from tests.kernels.reference import DEVICE


@triton.jit
def _coordinates_kernel(out_ptr, num_blocks, heads, heads_together):
    block, head, batch = program_coordinates(num_blocks, heads, heads_together)
    at = out_ptr + 3 * tl.program_id(0)
    tl.store(at, block)
    tl.store(at + 1, head)
    tl.store(at + 2, batch)


@pytest.mark.parametrize("heads_together", [None, 1, 2, 5, 6, 7, 100])
def test_coordinates(heads_together: int | None) -> None:
    """Block by block over as many heads of all entries as told, the first group's being fewer."""
    batch, heads, blocks = 2, 3, 4
    found = torch.full((batch * heads * blocks, 3), -1, device=DEVICE)
    _coordinates_kernel[(len(found),)](found, blocks, heads, heads_together)
    every, together = range(batch * heads), heads_together or 1
    over = len(every) % together
    groups = [every[max(i, 0) : i + together] for i in range(over - together, 6, together)]
    expected = [
        [block, head % heads, head // heads]
        for group in groups
        for block in range(blocks)
        for head in group
    ]
    assert found.tolist() == expected


@pytest.mark.parametrize("packed", [False, True])
def test_heaviest_first_gives_the_same_bits(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    q, do = torch.randn(2, 2, 6, 150, 16, device=DEVICE).unbind(0)
    k, v = torch.randn(2, 2, 3, 150, 16, device=DEVICE).unbind(0)
    spec, extras = AttentionSpec(0.3, None, 0), AttentionExtras()
    if packed:
        q, k, v, do = (x[:1] for x in (q, k, v, do))
        edges = torch.tensor([0, 65, 65, 140], device=DEVICE, dtype=torch.int32)
        spec = replace(spec, max_seqlen_q=75, max_seqlen_k=75)
        extras = AttentionExtras(cu_seqlens_q=edges, cu_seqlens_k=edges)
    together = []
    tiles_of, heads_together = tiling.tiles_of, tiling.heads_together

    def record(*call: Any) -> int | None:
        together.append(heads_together(*call))
        return together[-1]

    def run(heaviest_first: bool) -> list[torch.Tensor]:
        together.clear()
        monkeypatch.setattr(
            tiling, "tiles_of", lambda *c: replace(tiles_of(*c), heaviest_first=heaviest_first)
        )
        monkeypatch.setattr(tiling, "heads_together", record)
        monkeypatch.setattr(tiling, "_l2_bytes", lambda _: 4 * 150 * 32 * 4)  # of two kv heads
        o, lse = backend.forward(q, k, v, spec, extras)
        return [o, lse, *backend.backward(do, None, q, k, v, o, lse, spec, extras)[:3]]

    expected = run(heaviest_first=False)
    assert together == [None] * 3
    results = run(heaviest_first=True)
    # k and v are shared by two heads; dK/dV reads both of q and do.
    assert together == ([8, 2, 8] if packed else [4, 1, 4])
    for result, each in zip(results, expected, strict=True):
        assert not each.isnan().any()
        assert torch.equal(result, each)


def test_only_causal_calls_have_an_order() -> None:
    x = torch.empty(1, 2, 8, 16)
    tiles = replace(
        tiling.table_tiles("forward", x, x, AttentionSpec(1.0), AttentionExtras()),
        heaviest_first=True,
    )
    assert tiling.heads_together(tiles, AttentionSpec(1.0, None, 0), 2, None, x, x) == 128
    assert tiling.heads_together(tiles, AttentionSpec(1.0, 3, None), 2, None, x, x) is None
    empty = x[:, :, :0]
    assert tiling.heads_together(tiles, AttentionSpec(1.0, None, 0), 2, None, empty, empty)
