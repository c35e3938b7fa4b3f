"""Calls on shards, and how their results are judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flashlayer import masks, testing
from flashlayer.distributed import ring_attention, ulysses_attention

LENGTH = 96
# Lengths that share nothing, a shard of nothing among them.
UNEVEN = {2: (59, 37), 3: (5, 0, 91), 4: (1, 62, 0, 33)}


def any_intervals(heads: int) -> masks.IntervalMask:
    """Two intervals a key, of each batch entry and head others; some empty, some overlap."""
    generator = torch.Generator().manual_seed(9)
    ends = torch.randint(0, LENGTH + 1, (2, heads, 4, LENGTH), generator=generator)
    return masks.IntervalMask(ends, LENGTH)


MASKS: dict[str, Callable[[int], masks.IntervalMask]] = {
    # Documents within shards and across them, and padding.
    "documents": lambda heads: masks.documents(
        cu_seqlens=torch.tensor([0, 7, 40, 41, 93]), seqlen=LENGTH
    ),
    "prefix": lambda heads: masks.prefix_lm(torch.tensor([30, 0]), seqlen=LENGTH),
    "global": lambda heads: masks.global_and_window(5, (10, 3), seqlen=LENGTH),
    "any": any_intervals,
}


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
    mask: str | None = None

    def call_options(self, device: torch.device | str = "cpu") -> dict[str, Any]:
        """The options, with the mask of the whole sequence."""
        if self.mask is None:
            return dict(self.options)
        return self.options | {"attn_mask": MASKS[self.mask](self.heads[0]).to(device)}

    def lengths(self, ranks: int) -> tuple[int, ...]:
        return UNEVEN[ranks] if self.uneven else (LENGTH // ranks,) * ranks

    def positions(self, rank: int, ranks: int) -> Tensor:
        """Which positions a rank holds, written out."""
        if self.placement == "contiguous":
            lengths = self.lengths(ranks)
            return torch.arange(sum(lengths[:rank]), sum(lengths[: rank + 1]))
        ranges = torch.arange(LENGTH).chunk(2 * ranks)
        return torch.cat((ranges[rank], ranges[2 * ranks - 1 - rank]))

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
    "documents": Case(
        {"causal": True}, mask="documents", uneven=True, dtype=torch.float64, heads=(4, 2)
    ),
    "documents zigzag": Case(
        {"causal": True},
        mask="documents",
        placement="zigzag",
        dtype=torch.float64,
        heads=(6, 2),
        dims=(16, 24),
    ),
    "documents both ways": Case(mask="documents", dtype=torch.float64),
    "documents both ways zigzag": Case(mask="documents", placement="zigzag", heads=(4, 1)),
    "documents window": Case(
        {"softcap": 2.0, **WINDOW}, mask="documents", placement="zigzag", sinks=True
    ),
    "prefix": Case(mask="prefix", uneven=True),
    "prefix zigzag": Case(mask="prefix", placement="zigzag", dtype=torch.float64, sinks=True),
    "global": Case(mask="global"),
    "global zigzag": Case(mask="global", placement="zigzag", dtype=torch.float64),
    "any": Case(mask="any", uneven=True, dtype=torch.float64, heads=(4, 2)),
    "any zigzag": Case({"causal": True}, mask="any", placement="zigzag", dtype=torch.float64),
    "any bf16": Case(mask="any", placement="zigzag", dtype=torch.bfloat16, heads=(4, 2)),
    "triton mask": Case(
        {"causal": True, "backend": "triton"}, mask="any", placement="zigzag", heads=(2, 1)
    ),
}
ULYSSES = [
    "full",
    "causal uneven",
    "causal zigzag",
    "window",
    "sinks causal zigzag",
    "softcap",
    "fp64",
    "documents",
    "documents zigzag",
    "any",
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
        found = {n: case for n, case in found.items() if case.options.get("backend") != "triton"}
    return found


def run_shard(case: Case, rank: int, device: torch.device) -> dict[str, Tensor]:
    """One case on this rank's shard, forward and backward."""
    ranks = dist.get_world_size()
    positions = case.positions(rank, ranks)
    whole = case.tensors()
    sinks = whole.pop("sinks").to(device)
    q, k, v, do, dlse = (x[:, :, positions].to(device) for x in whole.values())
    leaves = [x.requires_grad_() for x in (q, k, v)]
    options = case.call_options(device)
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


def check_case(case: Case, shards: list[dict[str, Tensor]]) -> None:
    ranks = len(shards)
    tensors = case.tensors()
    sinks = tensors.pop("sinks")
    if not case.sinks:
        sinks = None
    options = case.call_options()
    options.pop("backend", None)
    same_dtype = testing.run("standard", *tensors.values(), sinks=sinks, **options)
    wide = [x.double() for x in tensors.values()]
    wide_sinks = None if sinks is None else sinks.double()
    reference = testing.run("standard", *wide, sinks=wide_sinks, **options)
    # Terms of both signs, one a query, of which each rank sums its own: rounding depends on the
    # order, and the formula's happens to be lucky on some of these few sums.
    noise = testing.recomputation_noise(*wide, sinks=wide_sinks, **options)
    eps = torch.finfo(case.dtype).eps
    positions = [case.positions(rank, ranks) for rank in range(ranks)]
    for name, expected in reference.items():
        if name == "dsinks":
            actual = torch.stack([shard[name] for shard in shards]).sum(dim=0)
        else:
            actual = torch.full_like(same_dtype[name], torch.nan)
            for shard, position in zip(shards, positions, strict=True):
                actual[:, :, position] = shard[name]
        factor = testing.FACTORS.get(name, testing.GRADIENT_FACTOR)
        slack = noise[name] * eps if name == "dsinks" else 0.0
        testing.assert_accurate(name, actual, same_dtype[name], expected, factor, slack)
