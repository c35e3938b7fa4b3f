"""What is measured: one :class:`Case` a cell, and the suites made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashlayer import masks
from flashlayer.masks import IntervalMask

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}

# Most sequences of a batch are short and one is long, as in a batch of documents or of chats.
SKEWED = (1.0, 0.4, 0.25, 0.2, 0.12, 0.1, 0.06, 0.05)


def _documents(seqlen: int) -> IntervalMask:
    shares = torch.tensor((0.0, *SKEWED), dtype=torch.float64).cumsum(0)
    return masks.documents(cu_seqlens=(shares / shares[-1] * seqlen).round().long(), seqlen=seqlen)


# Interval masks of one interval a key, by length.
INTERVALS: dict[str | None, Callable[[int], IntervalMask]] = {
    "documents": _documents,
    "prefix-LM": lambda seqlen: masks.prefix_lm(seqlen // 2, seqlen=seqlen),
    "chunks of 512": lambda seqlen: masks.chunks(512, seqlen=seqlen),
    "64 global, window 512": lambda seqlen: masks.global_and_window(64, 512, seqlen=seqlen),
}


@dataclass(frozen=True)
class Case:
    """One problem in one dtype.

    Attributes:
        group: what the case is about; one table of the report each.
        dtype: a name in :data:`DTYPES`.
        batch: B; for packed sequences their number.
        heads: H, query heads.
        kv_heads: Hkv; None is H.
        seqlen: Sq; for packed or padded sequences the longest.
        seqlen_k: Sk; None is Sq.
        head_dim: D.
        causal: the causal triangle.
        window: keys to the left that a query sees besides its own; None is no window. Causal.
        lengths: of each batch entry; None is all of full length.
        packed: whether the lengths are packed without padding for us (peers get them padded), or
            given as a mask of keys to all.
        mask: "bool" or "float", a dense mask (1, 1, Sq, Sk) that hides a tenth of the pairs at
            random, so that no block can be skipped; or an interval mask of :data:`INTERVALS`, which
            peers get as a dense one; None is no such mask.
        backward: whether the backward pass is measured too.
    """

    group: str
    dtype: str
    batch: int
    heads: int
    seqlen: int
    head_dim: int
    kv_heads: int | None = None
    seqlen_k: int | None = None
    causal: bool = True
    window: int | None = None
    lengths: tuple[int, ...] | None = None
    packed: bool = False
    mask: str | None = None
    backward: bool = True

    @property
    def keys(self) -> int:
        """Sk."""
        return self.seqlen_k or self.seqlen

    @property
    def name(self) -> str:
        """The case in a few words, without the dtype."""
        words = [f"S={self.seqlen:,}"] if self.seqlen > 1 else []
        words += [f"keys={self.keys:,}"] if self.seqlen_k is not None else []
        words.append(f"D={self.head_dim}")
        if self.kv_heads is not None:
            words.append(f"heads {self.heads}:{self.kv_heads}")
        if self.window is not None:
            words.append(f"window {self.window}")
        elif self.seqlen > 1:
            words.append("causal" if self.causal else "full")
        if self.mask is not None:
            words.append(self.mask if self.mask in INTERVALS else f"{self.mask} mask")
        if self.seqlen > 1 and not self.backward:
            words.append("no gradients")
        return " ".join(words)

    @property
    def pairs(self) -> float:
        """Pairs of query and key that are counted as work; causal hides half of a square."""
        if self.mask in INTERVALS:
            starts, stops = INTERVALS[self.mask](self.seqlen).intervals[0, 0]
            if self.causal:
                starts = torch.maximum(starts, torch.arange(self.seqlen))
            return self.batch * float((stops - starts).clamp(min=0).sum())
        if self.window is not None:
            return self.batch * self.seqlen * min(self.window + 1, self.keys)
        if self.lengths is not None:
            rows = self.lengths if self.packed else (self.seqlen,) * self.batch
            sizes = list(zip(rows, self.lengths, strict=True))
        else:
            sizes = [(self.seqlen, self.keys)] * self.batch
        hides = self.causal and self.seqlen > 1
        return sum(q * k - (q * q / 2 if hides else 0) for q, k in sizes)

    @property
    def forward_flops(self) -> float:
        """Two matrix products; the backward pass counts 2.5 times as many."""
        return 4 * self.pairs * self.heads * self.head_dim

    @property
    def score_bytes(self) -> int:
        """What one matrix of all scores occupies, padding included."""
        itemsize = DTYPES[self.dtype].itemsize
        return itemsize * self.batch * self.heads * self.seqlen * self.keys


class Inputs(NamedTuple):
    """The tensors of a case; q, k, v are dense (padded), whatever the case."""

    q: Tensor  # (B, H, Sq, D)
    k: Tensor  # (B, Hkv, Sk, D)
    v: Tensor  # (B, Hkv, Sk, D)
    do: Tensor  # (B, H, Sq, D), 0 at padded queries
    shown: Tensor | None  # bool (B, Sk): False at padding; None where there is none
    mask: Tensor | IntervalMask | None  # (1, 1, Sq, Sk), bool or in q's dtype


def draw(case: Case, device: torch.device) -> Inputs:
    """Normal inputs, the same on every device for one case."""
    generator = torch.Generator().manual_seed(case.seqlen + case.keys + case.head_dim)

    def normal(heads: int, seqlen: int) -> Tensor:
        shape = (case.batch, heads, seqlen, case.head_dim)
        return torch.randn(shape, generator=generator).to(device, DTYPES[case.dtype])

    kv_heads = case.kv_heads or case.heads
    q, do = normal(case.heads, case.seqlen), normal(case.heads, case.seqlen)
    k, v = normal(kv_heads, case.keys), normal(kv_heads, case.keys)
    shown = None
    if case.lengths is not None:
        lengths = torch.tensor(case.lengths, device=device)
        shown = torch.arange(case.keys, device=device) < lengths[:, None]
        if case.packed:
            do = do * shown[:, None, :, None]
    mask = None
    if case.mask in INTERVALS:
        mask = INTERVALS[case.mask](case.seqlen).to(device)
    elif case.mask is not None:
        mask = (torch.rand((1, 1, case.seqlen, case.keys), generator=generator) < 0.9).to(device)
        if case.mask == "float":
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
    return Inputs(q, k, v, do, shown, mask)


def quick() -> Iterator[Case]:
    """For two CPU cores: 4,096 tokens of 512 channels, and one cell of everything else."""
    plain = Case("length", "fp32", batch=1, heads=8, seqlen=512, head_dim=64)
    for seqlen in (512, 1024, 2048, 4096):
        yield replace(plain, seqlen=seqlen, batch=4096 // seqlen)
    for seqlen in (512, 2048):
        yield replace(plain, seqlen=seqlen, batch=4096 // seqlen, causal=False)
    yield replace(plain, seqlen=2048, heads=4, head_dim=128)
    yield from _short(plain)
    yield replace(plain, group="host overhead", seqlen=128, heads=1)
    yield replace(plain, group="window", seqlen=8192, heads=2, window=256)
    yield from _skewed(plain, longest=2048, heads=2)
    yield from _masked(replace(plain, heads=4), (512, 1024, 2048, 4096))
    yield from _intervals(replace(plain, heads=4))
    for keys in (1024, 16384, 131072):
        yield _decode(plain, keys, heads=8, kv_heads=2)
    yield _decode(plain, 16384, heads=8, kv_heads=None)
    yield replace(plain, group="GQA", seqlen=1024, batch=2, kv_heads=2)
    yield replace(plain, group="head dim 96", seqlen=1024, heads=4, head_dim=96)


def backends() -> Iterator[Case]:
    """What the choice between flashlayer's CPU backends rests on (``--peers aten tiled``)."""
    plain = Case("length", "fp32", batch=1, heads=4, seqlen=128, head_dim=64)
    for seqlen in (128, 1024):
        yield replace(plain, seqlen=seqlen, batch=1024 // seqlen)
        yield replace(plain, seqlen=seqlen, batch=1024 // seqlen, backward=False)
    yield replace(plain, group="window", seqlen=2048, heads=2, window=64)
    yield replace(plain, group="chunk", seqlen=64, seqlen_k=2048, heads=8, kv_heads=2)
    for kv_heads in (2, None):
        yield _decode(plain, 16384, heads=8, kv_heads=kv_heads)


def full() -> Iterator[Case]:
    """For a GPU: 16k tokens of 2,048 channels at every length and head dim."""
    plain = Case("length", "bf16", batch=1, heads=32, seqlen=512, head_dim=64)
    for head_dim in (64, 128, 256):
        for causal in (True, False):
            for seqlen in (512, 1024, 2048, 4096, 8192, 16384):
                yield replace(
                    plain,
                    batch=16384 // seqlen,
                    seqlen=seqlen,
                    heads=2048 // head_dim,
                    head_dim=head_dim,
                    causal=causal,
                )
    yield replace(plain, group="host overhead", seqlen=128, heads=1)
    yield replace(plain, group="window", batch=2, seqlen=8192, window=256)
    yield from _skewed(plain, longest=8192, heads=8)
    for keys in (1024, 8192, 32768, 131072):
        yield _decode(replace(plain, head_dim=128), keys, heads=32, kv_heads=8)
    yield replace(plain, group="GQA", batch=4, seqlen=4096, heads=16, kv_heads=4, head_dim=128)
    yield from _masked(replace(plain, batch=2, heads=16), (4096,))
    masked = replace(plain, group="interval mask", batch=2, heads=16, seqlen=8192)
    for mask, causal in (
        ("documents", True),
        ("chunks of 512", True),
        ("prefix-LM", False),  # the last two hold their own causality
        ("64 global, window 512", False),
    ):
        yield replace(masked, mask=mask, causal=causal)
    yield replace(plain, group="head dim 96", batch=4, seqlen=4096, heads=21, head_dim=96)


def smoke() -> Iterator[Case]:
    """Every kind of case at a size that takes no time: does it run?"""
    plain = Case("length", "fp32", batch=1, heads=2, seqlen=32, head_dim=16)
    yield plain
    yield replace(plain, seqlen=64)
    yield replace(plain, causal=False)
    yield replace(plain, group="GQA", kv_heads=1)
    yield replace(plain, group="window", window=4)
    yield from _skewed(plain, longest=40, heads=2)
    yield from _masked(plain, (40,))
    yield replace(plain, group="interval mask", seqlen=40, mask="documents")
    yield _decode(plain, 64, heads=2, kv_heads=1)


def _skewed(plain: Case, longest: int, heads: int) -> Iterator[Case]:
    lengths = tuple(max(1, round(share * longest)) for share in SKEWED)
    sizes: dict[str, Any] = {"batch": len(lengths), "heads": heads, "seqlen": longest}
    yield replace(plain, group="varlen", lengths=lengths, packed=True, **sizes)
    yield replace(plain, group="padding mask", lengths=lengths, causal=False, **sizes)


def _short(plain: Case) -> Iterator[Case]:
    for batch in (1, 32):
        for seqlen in (16, 32, 64, 128, 256):
            yield replace(plain, group="short", seqlen=seqlen, batch=batch, causal=False)


def _masked(plain: Case, lengths: tuple[int, ...]) -> Iterator[Case]:
    for seqlen in lengths:
        for mask in ("bool", "float"):
            yield replace(plain, group="dense mask", seqlen=seqlen, causal=False, mask=mask)


def _intervals(plain: Case) -> Iterator[Case]:
    """Documents as long as the packed sequences; the rest where a dense mask still has room."""
    packed = sum(next(_skewed(plain, longest=2048, heads=2)).lengths or ())
    yield replace(plain, group="interval mask", heads=2, seqlen=packed, mask="documents")
    for seqlen in (2048, 4096):
        yield replace(plain, group="interval mask", seqlen=seqlen, causal=False, mask="prefix-LM")
    yield replace(plain, group="interval mask", seqlen=8192, heads=2, mask="chunks of 512")
    mask = "64 global, window 512"
    yield replace(plain, group="interval mask", seqlen=4096, causal=False, mask=mask)


def _decode(plain: Case, keys: int, heads: int, kv_heads: int | None) -> Case:
    return replace(
        plain,
        group="decode",
        seqlen=1,
        seqlen_k=keys,
        heads=heads,
        kv_heads=kv_heads,
        backward=False,
    )


class Suite(NamedTuple):
    """Cases, and the dtypes each of them is measured in."""

    cases: Callable[[], Iterator[Case]]
    dtypes: tuple[str, ...]

    def in_dtypes(self, dtypes: Sequence[str] | None = None) -> list[Case]:
        """Every case in every dtype; the suite's own if None."""
        return [replace(x, dtype=dtype) for x in self.cases() for dtype in dtypes or self.dtypes]


SUITES = {
    "quick": Suite(quick, ("fp32", "bf16")),
    "full": Suite(full, ("bf16",)),
    "backends": Suite(backends, ("fp32", "bf16", "fp16", "fp64")),
    "smoke": Suite(smoke, ("fp32",)),
}
