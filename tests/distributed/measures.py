"""What calls on shards send and allocate."""

from __future__ import annotations

import gc
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.traffic import Counted
from flashlayer import masks
from flashlayer.distributed import ring, ring_attention, ulysses_attention


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


def skips(ranks: int) -> dict[str, tuple[list[int], dict[str, Any]]]:
    """Documents, by quarters of a shard, that leave hops or ranges without a visible pair."""
    quarters = range(4 * ranks)
    own = [quarter // 4 for quarter in quarters]
    return {
        "one a shard": (own, {"causal": True}),
        # The first shard and half of the second are one document.
        "over two shards": ([0] * 6 + own[6:], {"causal": True}),
        "one a range": ([quarter // 2 for quarter in quarters], {"placement": "zigzag"}),
    }


def measure_skips(rank: int, device: torch.device) -> dict[str, list[int]]:
    """By call the rectangles computed and the bytes sent, forward and then backward."""
    original, computed, measured = ring.Ring.problem, [], {}

    def spy(*arguments: Any, **options: Any) -> Any:
        computed.append(1)
        return original(*arguments, **options)

    ring.Ring.problem = spy
    for name, (ids, options) in skips(dist.get_world_size()).items():
        mask = masks.documents(torch.tensor(ids, device=device).repeat_interleave(2))
        q, k, v = (torch.randn(1, 1, 8, 4, device=device).requires_grad_() for _ in range(3))
        computed.clear()
        with Counted() as forward:
            out = ring_attention(q, k, v, attn_mask=mask, **options)
        measured[name] = [len(computed), forward.sent]
        computed.clear()
        with Counted() as backward:
            out.sum().backward()
        measured[name] += [len(computed), backward.sent]
    ring.Ring.problem = original
    return measured


def expected_skips(ranks: int) -> list[dict[str, list[int]]]:
    """By rank. A shard's keys and values are one message, the sums of their gradients another."""
    message = 8 * 2 * 4 * 4
    # Rank 0 sends its keys to rank 1 and, in the backward pass, its sums too, which come back.
    over_two = {0: [1, message, 1, 2 * message], 1: [2, 0, 2, message]}
    return [
        {
            "one a shard": [1, 0, 1, 0],
            "over two shards": over_two.get(rank, [1, 0, 1, 0]),
            "one a range": [2, 0, 2, 0],
        }
        for rank in range(ranks)
    ]


def measure_memory(rank: int, device: torch.device) -> dict[str, int]:
    """The largest tensor of a call, and how many messages of keys are alive in any step."""
    length, dim = 1021, 5
    q, k, v = (torch.randn(1, 1, length, dim, device=device) for _ in range(3))
    message = 2 * length * dim * 4  # bytes; a size that no other tensor here has
    alive = []
    original = ring.Ring.problem

    def spy(*arguments: Any, **options: Any) -> Any:
        storages = {
            x.untyped_storage().data_ptr()
            for x in gc.get_objects()
            if type(x) is Tensor and x.untyped_storage().nbytes() == message
        }
        alive.append(len(storages))
        return original(*arguments, **options)

    ring.Ring.problem = spy
    ring_attention(q, k, v)
    ring.Ring.problem = original
    q, k, v = (torch.randn(1, 1, 1024, 4, device=device).requires_grad_() for _ in range(3))
    with Watch() as watch:
        ring_attention(q, k, v, placement="zigzag", causal=True, backend="tiled").sum().backward()
    return {"largest": watch.largest, "alive": max(alive), "steps": len(alive)}
