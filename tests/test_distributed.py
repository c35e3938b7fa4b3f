"""Attention over a sharded sequence against attention over the whole one."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flashlayer import FlashAttention, distributed, flash_attention
from flashlayer.distributed import (
    position_ids,
    ring_attention,
    shard_lengths,
    shard_sequence,
    ulysses_attention,
    unshard_sequence,
)
from tests import tolerance
from tests.processes import run_group
from tests.traffic import Counted

LENGTH = 96
# Lengths that share nothing, a shard of nothing among them.
UNEVEN = {2: (59, 37), 3: (5, 0, 91), 4: (1, 62, 0, 33)}


@dataclass(frozen=True)
class Case:
    """One call: by which function, on which shards, with which options."""

    options: dict[str, Any] = field(default_factory=dict)
    attend: str = "ring"
    placement: str = "contiguous"
    uneven: bool = False
    heads: tuple[int, int] = (4, 4)
    dims: tuple[int, int] = (16, 16)
    dtype: torch.dtype = torch.float32
    sinks: bool = False

    def lengths(self, ranks: int) -> tuple[int, ...]:
        return UNEVEN[ranks] if self.uneven else (LENGTH // ranks,) * ranks

    def positions(self, rank: int, ranks: int) -> Tensor:
        """Which positions a rank holds, written out."""
        if self.placement == "contiguous":
            lengths = self.lengths(ranks)
            return torch.arange(sum(lengths[:rank]), sum(lengths[: rank + 1]))
        parts = torch.arange(LENGTH).chunk(2 * ranks)
        return torch.cat((parts[rank], parts[2 * ranks - 1 - rank]))

    def tensors(self) -> dict[str, Tensor]:
        """The whole sequence's inputs and upstream gradients, the same in every process."""
        generator = torch.Generator().manual_seed(7)
        (heads, kv_heads), (dim, value_dim) = self.heads, self.dims
        shapes = {
            "q": (2, heads, LENGTH, dim),
            "k": (2, kv_heads, LENGTH, dim),
            "v": (2, kv_heads, LENGTH, value_dim),
            "do": (2, heads, LENGTH, value_dim),
            "dlse": (2, heads, LENGTH),
            "sinks": (heads,),
        }
        wide = {
            name: torch.randn(shape, generator=generator, dtype=torch.float64)
            for name, shape in shapes.items()
        }
        lse_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        tensors = {name: x.to(self.dtype) for name, x in wide.items()}
        tensors["dlse"] = wide["dlse"].to(lse_dtype)
        return tensors


WINDOW = {"window_size": (20, 9)}
NARROW = {"causal": True, "window_size": (11, None)}
CASES: dict[str, Case] = {
    "full": Case(),
    "full zigzag": Case(placement="zigzag"),
    "causal": Case({"causal": True}),
    "causal uneven": Case({"causal": True}, uneven=True),
    "causal zigzag": Case({"causal": True}, placement="zigzag"),
    "causal zigzag gqa": Case({"causal": True}, placement="zigzag", heads=(6, 2), dims=(16, 24)),
    "mqa": Case(heads=(4, 1)),
    "window": Case(WINDOW),
    "window uneven": Case(WINDOW, uneven=True),
    "window zigzag": Case(WINDOW, placement="zigzag"),
    "window narrow": Case(NARROW),
    "window narrow zigzag": Case(NARROW, placement="zigzag"),
    "window ahead": Case({"window_size": (0, 30)}, uneven=True),
    "sinks": Case(sinks=True, uneven=True),
    "sinks causal zigzag": Case({"causal": True}, placement="zigzag", sinks=True, heads=(4, 2)),
    "softcap": Case({"softcap": 2.0, "scale": 0.5, **WINDOW}, uneven=True),
    "tiled": Case({"causal": True, "backend": "tiled"}, placement="zigzag"),
    "fp64": Case({"causal": True}, uneven=True, dtype=torch.float64, heads=(4, 2)),
    "fp64 zigzag": Case(
        {"causal": True, "softcap": 3.0, "window_size": (40, None)},
        placement="zigzag",
        dtype=torch.float64,
        sinks=True,
        heads=(4, 1),
    ),
    "triton": Case(
        {"causal": True, "window_size": (30, None), "backend": "triton"},
        placement="zigzag",
        heads=(2, 1),
    ),
    "bf16": Case({"causal": True}, placement="zigzag", dtype=torch.bfloat16, heads=(4, 2)),
    "fp16": Case(dtype=torch.float16, uneven=True),
}
ULYSSES = [
    "full",
    "causal uneven",
    "causal zigzag",
    "window",
    "sinks causal zigzag",
    "softcap",
    "fp64",
]


def cases(ranks: int) -> dict[str, Case]:
    """Those above by the ring, and some by Ulysses with heads that the ranks divide."""
    by_heads = {
        f"ulysses {name}": Case(
            **{**vars(CASES[name]), "attend": "ulysses", "heads": (2 * ranks, ranks)}
        )
        for name in ULYSSES
    }
    found = CASES | by_heads
    if ranks > 2 or torch.cuda.device_count() == 1:
        # Seconds in the interpreter; and with one GPU the ranks are on the CPU without it.
        del found["triton"]
    return found


def run_shard(case: Case, rank: int, device: torch.device) -> dict[str, Tensor]:
    """One case on this rank's shard, forward and backward."""
    ranks = dist.get_world_size()
    positions = case.positions(rank, ranks)
    whole = case.tensors()
    sinks = whole.pop("sinks").to(device)
    q, k, v, do, dlse = (x[:, :, positions].to(device) for x in whole.values())
    leaves = [x.requires_grad_() for x in (q, k, v)]
    options = dict(case.options)
    if case.sinks:
        options["sinks"] = sinks.requires_grad_()
        leaves.append(sinks)
    if case.uneven and rank % 2 == 0:  # a rank may know the lengths, or may not
        options["lengths"] = None
    attend = {"ring": ring_attention, "ulysses": ulysses_attention}[case.attend]
    out, lse = attend(q, k, v, placement=case.placement, return_lse=True, **options)
    dlse = torch.where(lse.isfinite(), dlse, 0)
    grads = torch.autograd.grad((out, lse), leaves, (do, dlse))
    names = ["out", "lse", "dq", "dk", "dv", "dsinks"]
    return {name: x.detach().cpu() for name, x in zip(names, (out, lse, *grads), strict=False)}


class Watch(TorchDispatchMode):
    """The size of the largest tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.numel())
        return out


def measure_traffic(rank: int, device: torch.device) -> dict[str, list[int]]:
    """Bytes that this rank sent, forward and backward, by call."""
    ranks = dist.get_world_size()
    heads, kv_heads, length, dim = 2 * ranks, ranks, 2 * ranks * 4, 8
    measured = {}
    for name, attend, options in TRAFFIC:
        q, k, v = (
            torch.randn(1, h, length, dim, dtype=torch.bfloat16, device=device).requires_grad_()
            for h in (heads, kv_heads, kv_heads)
        )
        with Counted() as forward:
            out = attend(q, k, v, **options)
        with Counted() as backward:
            out.float().sum().backward()
        measured[name] = [forward.sent, backward.sent]
    return measured


TRAFFIC: list[tuple[str, Any, dict[str, Any]]] = [
    ("ring", ring_attention, {"causal": True, "placement": "zigzag"}),
    ("window", ring_attention, {"causal": True, "window_size": (5, None)}),
    ("own shard", ring_attention, {"window_size": (0, 0)}),
    ("ulysses", ulysses_attention, {"causal": True}),
]


def expected_traffic(ranks: int) -> dict[str, list[int]]:
    """The formulas of the two docstrings."""
    heads, kv_heads, length, dim = 2 * ranks, ranks, 2 * ranks * 4, 8
    message = kv_heads * length * 2 * dim
    by_hops = {
        hops: [2 * (hops - 1) * message, 2 * (hops - 1) * message + 4 * (hops > 1) * hops * message]
        for hops in (1, 2, ranks)
    }
    exchanged = 2 * (ranks - 1) * length * 2 * (heads + kv_heads) * dim // ranks
    return {
        "ring": by_hops[ranks],
        "window": by_hops[2],
        "own shard": by_hops[1],
        "ulysses": [exchanged, exchanged],
    }


def measure_memory(rank: int, device: torch.device) -> dict[str, int]:
    """The largest tensor of a call, and how many messages of keys are alive in any hop."""
    length, dim = 1021, 5
    q, k, v = (torch.randn(1, 1, length, dim, device=device) for _ in range(3))
    message = 2 * length * dim * 4  # bytes; a size that no other tensor here has
    alive = []
    original = distributed.Ring.problem

    def spy(*arguments: Any) -> Any:
        storages = {
            x.untyped_storage().data_ptr()
            for x in gc.get_objects()
            if type(x) is Tensor and x.untyped_storage().nbytes() == message
        }
        alive.append(len(storages))
        return original(*arguments)

    distributed.Ring.problem = spy
    ring_attention(q, k, v)
    distributed.Ring.problem = original
    q, k, v = (torch.randn(1, 1, 1024, 4, device=device).requires_grad_() for _ in range(3))
    with Watch() as watch:
        ring_attention(q, k, v, placement="zigzag", causal=True, backend="tiled").sum().backward()
    return {"largest": watch.largest, "alive": max(alive), "hops": len(alive)}


def run_layer(rank: int, device: torch.device, placement: str) -> dict[str, Tensor]:
    """A layer over shards: its output, and its parameters' gradients summed over the ranks."""
    case, ranks = Case(placement=placement, uneven=placement == "contiguous"), dist.get_world_size()
    layer, x = layer_and_input(dist.group.WORLD, placement)
    layer = layer.to(device)
    shard = x[:, case.positions(rank, ranks)].to(device)
    out = layer(shard)
    out.square().sum().backward()
    results = {"out": out.detach().cpu()}
    if ranks == 2:  # the graph breaks at the ring and goes on behind it
        assert torch.equal(torch.compile(layer, backend="eager")(shard), out)
    for name, parameter in layer.named_parameters():
        dist.all_reduce(parameter.grad)
        results[name] = parameter.grad.cpu()
    with pytest.raises(ValueError, match="attn_mask can't be combined with context_parallel_group"):
        layer(shard, attn_mask=torch.ones(1, dtype=torch.bool, device=device))
    with pytest.raises(ValueError, match="context_parallel_group can't be combined with dropout"):
        FlashAttention(8, 2, dropout=0.1, context_parallel_group=dist.group.WORLD)
    return results


def layer_and_input(group: Any, placement: str) -> tuple[FlashAttention, Tensor]:
    torch.manual_seed(3)
    layer = FlashAttention(
        24,
        6,
        num_kv_heads=2,
        causal=True,
        window_size=(50, None),
        rotary_base=100.0,
        qk_norm=True,
        sinks=True,
        context_parallel_group=group,
        context_parallel_placement=placement,
        dtype=torch.float64,
    )
    return layer, torch.randn(2, LENGTH, 24, dtype=torch.float64)


def check_helpers(rank: int, device: torch.device) -> None:
    """Shards there and back, positions, and calls that can't work; the group survives them."""
    ranks = dist.get_world_size()
    for placement, length in (("contiguous", 2 * ranks + 1), ("zigzag", 4 * ranks)):
        x = torch.arange(2 * length, device=device).view(2, length)
        shard = shard_sequence(x, placement=placement)
        assert torch.equal(unshard_sequence(shard, placement=placement), x)
        lengths = shard_lengths(shard)
        assert sum(lengths) == length
        ids = position_ids(shard.shape[1], placement=placement, lengths=lengths, device=device)
        assert torch.equal(x[0, ids], shard[0])
    q = torch.randn(1, ranks + 1, 8, 4, device=device)
    kv = torch.randn(1, 1 + (rank == 0) * ranks, 8, 4, device=device)
    with pytest.raises(ValueError, match="shards may differ in length only"):
        ring_attention(q, kv, kv)
    with pytest.raises(ValueError, match=f"heads that {ranks} ranks divide, query has {ranks + 1}"):
        ulysses_attention(q, q, q)
    with pytest.raises(ValueError, match="'standard' can't compute a part"):
        ring_attention(q, q, q, backend="standard")
    with pytest.raises(ValueError, match="'aten' can't compute this call: it has no softcap"):
        ring_attention(q, q, q, backend="aten", softcap=1.0)
    with pytest.raises(ValueError, match="needs shards of one even length"):
        ring_attention(q[:, :, :7], q[:, :, :7], q[:, :, :7], placement="zigzag")
    with pytest.raises(ValueError, match="placement must be 'contiguous' or 'zigzag', got 'up'"):
        ring_attention(q, q, q, placement="up")
    for lengths in ([8], torch.tensor([8])):
        with pytest.raises(ValueError, match=r"lengths must hold one number .*, got \(8,\)"):
            ring_attention(q, q, q, lengths=lengths)
    as_tensor = torch.tensor([8] * ranks)
    assert torch.equal(ring_attention(q, q, q, lengths=as_tensor), ring_attention(q, q, q))
    with pytest.raises(ValueError, match="shards of one sequence, got lengths 8 and 7"):
        ring_attention(q, q[:, :, :7], q[:, :, :7])
    with pytest.raises(ValueError, match=f"needs a sequence that {2 * ranks} divides"):
        shard_sequence(torch.zeros(1, 2 * ranks + 1), placement="zigzag")
    q.requires_grad_()
    out = ring_attention(q, q, q)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert ring_attention(q, q, q).dtype == torch.bfloat16
        (inside,) = torch.autograd.grad(out.sum(), q, retain_graph=True)
    assert torch.equal(inside, torch.autograd.grad(out.sum(), q)[0])
    # What has no second derivative says so.
    (grad,) = torch.autograd.grad(ring_attention(q, q, q).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="ring_attention has no second derivative"):
        grad.sum().backward()
    check_second_derivative_by_ulysses(rank, device)
    whole = dist.new_group([0])
    if rank > 0:
        with pytest.raises(ValueError, match="this process is not in group"):
            ring_attention(q, q, q, group=whole)
    else:  # a ring of one
        out = ring_attention(q, q, q, group=whole, causal=True)
        assert torch.isfinite(out).all()


def check_second_derivative_by_ulysses(rank: int, device: torch.device) -> None:
    ranks = dist.get_world_size()
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(1, ranks, 4 * ranks, 4, generator=generator, dtype=torch.float64)
    own = slice(4 * rank, 4 * rank + 4)
    results = []
    for q, attend in (
        (x, lambda q: flash_attention(q, q, q, causal=True)),
        (x[:, :, own], lambda q: ulysses_attention(q, q, q, causal=True)),
    ):
        q = q.to(device).requires_grad_()
        (grad,) = torch.autograd.grad(attend(q).square().sum(), q, create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), q)[0])
    torch.testing.assert_close(results[1], results[0][:, :, own])


def work(rank: int, device: torch.device) -> dict[str, Any]:
    """All that one group of processes is started for."""
    check_helpers(rank, device)
    return {
        "cases": {
            name: run_shard(case, rank, device)
            for name, case in cases(dist.get_world_size()).items()
        },
        "layer": {
            placement: run_layer(rank, device, placement) for placement in ("contiguous", "zigzag")
        },
        "traffic": measure_traffic(rank, device),
        "memory": measure_memory(rank, device),
    }


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_compute_what_one_process_does(ranks: int, tmp_path: Path) -> None:
    """Outputs, LSE and all gradients by the 2x rule; the layer; traffic; memory."""
    results = run_group(work, ranks, tmp_path)
    for name, case in cases(ranks).items():
        try:
            check_case(case, [result["cases"][name] for result in results])
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
    for placement in ("contiguous", "zigzag"):
        check_layer(placement, [result["layer"][placement] for result in results])
    for result in results:
        assert result["traffic"] == expected_traffic(ranks)
        memory = result["memory"]
        assert memory["hops"] == ranks
        assert memory["alive"] <= 2
        # No scores but a tile's, though the shards' own would be 4 times as many, all ranks' more.
        assert memory["largest"] <= 512 * 512


def check_case(case: Case, shards: list[dict[str, Tensor]]) -> None:
    ranks = len(shards)
    tensors = case.tensors()
    sinks = tensors.pop("sinks")
    if not case.sinks:
        sinks = None
    options = {name: option for name, option in case.options.items() if name != "backend"}
    same_dtype = tolerance.run(*tensors.values(), backend="standard", sinks=sinks, **options)
    wide = [x.double() for x in tensors.values()]
    wide_sinks = None if sinks is None else sinks.double()
    reference = tolerance.run(*wide, backend="standard", sinks=wide_sinks, **options)
    # Terms of both signs, one a query, of which each rank sums its own: rounding depends on the
    # order, and the formula's happens to be lucky on some of these few sums.
    noise = tolerance.recomputation_noise(*wide, sinks=wide_sinks, **options)
    eps = torch.finfo(case.dtype).eps
    positions = [case.positions(rank, ranks) for rank in range(ranks)]
    for name, expected in reference.items():
        if name == "dsinks":
            actual = torch.stack([shard[name] for shard in shards]).sum(dim=0)
        else:
            actual = torch.full_like(same_dtype[name], torch.nan)
            for shard, position in zip(shards, positions, strict=True):
                actual[:, :, position] = shard[name]
        factor = tolerance.FACTORS.get(name, tolerance.GRADIENT_FACTOR)
        slack = noise[name] * eps if name == "dsinks" else 0.0
        tolerance.assert_accurate(name, actual, same_dtype[name], expected, factor, slack)


def check_layer(placement: str, shards: list[dict[str, Tensor]]) -> None:
    case = Case(placement=placement, uneven=placement == "contiguous")
    layer, x = layer_and_input(None, placement)
    out = layer(x)
    out.square().sum().backward()
    for rank, shard in enumerate(shards):
        positions = case.positions(rank, len(shards))
        torch.testing.assert_close(shard["out"], out[:, positions].detach())
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(shard[name], parameter.grad, msg=name)


# The geometry needs no processes.


def visible_pairs(layout: distributed.Layout, rank: int, source: int, band: Any) -> Tensor:
    """How often each (query, key) of two shards is computed; no piece may hold nothing."""
    q_length, k_length = (sum(map(len, layout[index])) for index in (rank, source))
    count = torch.zeros(q_length, k_length, dtype=torch.int)
    for q_rows, k_rows, (left, right) in distributed._pieces(layout[rank], layout[source], *band):
        tile = count[q_rows, k_rows]
        distance = torch.arange(tile.shape[1]) - torch.arange(tile.shape[0])[:, None]
        seen = torch.ones_like(distance, dtype=torch.bool)
        for side, sign in ((left, -1), (right, 1)):
            if side is not None:
                assert side >= 0  # what the public door takes
                seen &= sign * distance <= side
        assert seen.any(dim=0).all()
        assert seen.any(dim=1).all()
        tile += seen
    return count


side = st.none() | st.integers(0, 30)


@settings(deadline=None, max_examples=100)
@given(
    shards=st.lists(st.integers(0, 9), min_size=1, max_size=5).map(tuple)
    | st.tuples(st.integers(1, 5), st.integers(0, 4)).map(lambda x: (2 * x[1],) * x[0]),
    zigzag=st.booleans(),
    band=st.tuples(side, side),
)
def test_pieces_hold_every_visible_pair_once(
    shards: tuple[int, ...], zigzag: bool, band: tuple[int | None, int | None]
) -> None:
    """Over all hops that are made, and none is made without need."""
    zigzag = zigzag and len(set(shards)) == 1 and shards[0] % 2 == 0
    layout = distributed._layout(shards, "zigzag" if zigzag else "contiguous")
    positions = [torch.tensor([i for part in parts for i in part]) for parts in layout]
    assert torch.cat(positions).sort().values.tolist() == list(range(sum(shards)))
    distances = distributed._distances(layout, *band)
    needed = {0}
    left, right = band
    for rank in range(len(shards)):
        for source in range(len(shards)):
            distance = positions[source] - positions[rank][:, None]
            seen = torch.ones_like(distance, dtype=torch.bool)
            if left is not None:
                seen &= distance >= -left
            if right is not None:
                seen &= distance <= right
            assert torch.equal(visible_pairs(layout, rank, source, band), seen.int())
            if seen.any():
                needed.add((rank - source) % len(shards))
    assert set(distances) == needed


def test_zigzag_balances_causal_work_and_windows_end_the_ring() -> None:
    ranks, length = 8, 64
    layouts = {
        name: distributed._layout((length,) * ranks, name) for name in ("contiguous", "zigzag")
    }
    work = {
        name: [
            sum(int(visible_pairs(layout, rank, other, (None, 0)).sum()) for other in range(ranks))
            for rank in range(ranks)
        ]
        for name, layout in layouts.items()
    }
    assert len(set(work["zigzag"])) == 1
    assert max(work["contiguous"]) > 14 * min(work["contiguous"])
    # Each hop of a zigzag ring but the first is one call, without a mask.
    for source in range(1, ranks):
        (piece,) = distributed._pieces(layouts["zigzag"][0], layouts["zigzag"][source], None, 0)
        assert piece.window_size == (None, None)
    assert distributed._distances(layouts["contiguous"], 100, 0) == (0, 1, 2)
    assert distributed._distances(layouts["contiguous"], 10, 10) == (0, 1, 7)
