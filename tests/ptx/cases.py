"""The problems that compiled kernels are run on: the option table of the contract.

A case draws its tensors from a generator seeded by its name. ``QUICK`` are the few of ``make
test``, chosen so that together they cross every feature; ``TABLE`` are all of them.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flashlayer import masks

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
INF = torch.inf


@dataclass(frozen=True)
class Case:
    """One call, forward and backward.

    Attributes:
        name: what the results call it.
        build: draws ``(q, k, v, options)``.
        targets: compute capabilities that it is for.
        tf32: whether torch allows TF32.
        descriptors: whether whole tiles are loaded by TMA where the tensors allow it.
        splits: number of parts of the keys in the decoding step, 0 for a plain call.
        specialized: the forward pass by the warp-specialised kernel, with so many stages, and
            whether its consumers take turns.
        gradients: whether there is a backward pass.
        specialized_backward: dK/dV and dQ by the warp-specialised kernels, with so many stages,
            or as many as they may have; 0: by the plain ones.
        heaviest_first: whether programs start in the order of their work.
        auxiliary: whether the largest score and the entropy are asked for and judged, not the rest.
        tangents: forward mode instead of both passes, with tangents of q, k and v.
    """

    name: str
    build: Callable[[], tuple[Tensor, Tensor, Tensor, dict[str, Any]]]
    targets: tuple[int, ...] = (80, 90)
    tf32: bool = False
    descriptors: bool = False
    splits: int = 0
    specialized: tuple[int, bool] | None = None
    gradients: bool = True
    specialized_backward: int = 0
    heaviest_first: bool = False
    auxiliary: bool = False
    tangents: bool = False

    def draw(self) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        """The tensors, the same every time."""
        torch.manual_seed(zlib.crc32(self.name.encode()))
        return self.build()


def dense(
    dtype: torch.dtype = BF16,
    *,
    batch: int = 1,
    heads: int = 2,
    kv_heads: int = 1,
    q: int = 70,
    k: int = 65,
    dim: int = 64,
    value_dim: int | None = None,
    magnitude: float = 1.0,
    layout: str = "bhsd",
    options: Callable[[int, int, int, int], dict[str, Any]] | None = None,
    **plain: Any,
) -> Callable[[], tuple[Tensor, Tensor, Tensor, dict[str, Any]]]:
    """A dense problem. ``options(batch, heads, q, k)`` draws those that hold tensors."""

    def build() -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        def tensor(heads: int, length: int, dim: int) -> Tensor:
            return lay_out(torch.randn(batch, heads, length, dim, dtype=dtype), layout)

        tensors = (
            tensor(heads, q, dim) * magnitude,
            tensor(kv_heads, k, dim),
            tensor(kv_heads, k, value_dim or dim),
        )
        drawn = options(batch, heads, q, k) if options is not None else {}
        drawn = {n: _of_dtype(n, x, dtype) for n, x in drawn.items()}
        return *tensors, plain | drawn

    return build


def _of_dtype(name: str, option: Any, dtype: torch.dtype) -> Any:
    """Float masks and sinks in the dtype of q; slopes are fp32."""
    if isinstance(option, Tensor) and option.is_floating_point() and name != "alibi_slopes":
        return option.to(dtype)
    return option


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout; what lies between them is NaN."""
    if layout == "bhsd":
        return x
    if layout == "bshd":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "expanded":
        return x[:, :1].expand(x.shape)
    whole = x.new_full((*x.shape[:2], 2 * x.shape[2], x.shape[3] + 8), torch.nan)
    if layout == "strided_last":
        whole = x.new_full((*x.shape[:3], 2 * x.shape[3]), torch.nan)
        strided = whole[..., ::2]
    else:  # "in NaN": every other row of a wider tensor, 16-byte aligned
        strided = whole[:, :, ::2, : x.shape[3]]
    return strided.copy_(x)


def packed(
    dtype: torch.dtype = BF16,
    *,
    lengths: Sequence[int] = (37, 0, 53),
    lengths_k: Sequence[int] | None = None,
    heads: int = 2,
    kv_heads: int = 1,
    dim: int = 64,
    past: int = 0,
    options: Callable[[int, int, int, int], dict[str, Any]] | None = None,
    **plain: Any,
) -> Callable[[], tuple[Tensor, Tensor, Tensor, dict[str, Any]]]:
    """Packed sequences, with ``past`` tokens after the last one."""

    def build() -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        both = lengths, lengths_k or lengths
        offsets = [
            torch.tensor([0, *x], dtype=torch.int32).cumsum(0, dtype=torch.int32) for x in both
        ]
        tokens_q, tokens_k = (int(x[-1]) + past for x in offsets)
        tensors = (
            torch.randn(tokens_q, heads, dim, dtype=dtype),
            torch.randn(tokens_k, kv_heads, dim, dtype=dtype),
            torch.randn(tokens_k, kv_heads, dim, dtype=dtype),
        )
        drawn = options(len(lengths), heads, tokens_q, tokens_k) if options is not None else {}
        drawn = {n: _of_dtype(n, x, dtype) for n, x in drawn.items()}
        arguments = {
            "cu_seqlens_q": offsets[0],
            "cu_seqlens_k": offsets[1],
            "max_seqlen_q": max(both[0]),
            "max_seqlen_k": max(both[1]),
        }
        return *tensors, arguments | plain | drawn

    return build


def hiding(
    dtype: torch.dtype, dim: int, *, batch: int = 2, q: int = 70, k: int = 90, rows: bool = False
) -> Callable:
    """Padding, with ``rows`` for every query; keys and values that it hides are NaN and inf."""

    def build() -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        tensors = dense(dtype, batch=batch, q=q, k=k, dim=dim, layout="in NaN")()
        query, key, value, options = tensors
        visible = torch.arange(k) < torch.tensor([k - 51, k - 7]).view(batch, 1, 1, 1)
        hidden = ~visible.view(batch, 1, k, 1)
        key = torch.where(hidden, torch.nan, key)
        value = torch.where(hidden, torch.tensor(INF, dtype=dtype), value)
        if rows:
            visible = visible.expand(-1, -1, q, -1).contiguous()
        return query, key, value, options | {"attn_mask": visible}

    return build


def causal_hiding(dtype: torch.dtype, dim: int) -> Callable:
    """A top-left causal problem of fewer queries than keys: NaN in the keys after the last one."""

    def build() -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        query, key, value, options = dense(
            dtype, q=40, k=150, dim=dim, causal=True, diagonal="top_left"
        )()
        key[:, :, 40:], value[:, :, 40:] = torch.nan, torch.nan
        return query, key, value, options

    return build


# Options that hold tensors, drawn for (batch, heads, q, k).


def float_mask(*keep: int) -> Callable[..., dict[str, Any]]:
    """An additive mask with the dimensions ``keep`` whole, the others 1."""

    def draw(*sizes: int) -> dict[str, Any]:
        shape = [size if dim in keep else 1 for dim, size in enumerate(sizes)]
        mask = torch.randn(shape)
        return {"attn_mask": mask.masked_fill(torch.rand(shape) < 0.2, -INF)}

    return draw


def bool_mask(*keep: int) -> Callable[..., dict[str, Any]]:
    """The same, True where a query may attend."""

    def draw(*sizes: int) -> dict[str, Any]:
        return {"attn_mask": torch.rand([s if d in keep else 1 for d, s in enumerate(sizes)]) < 0.6}

    return draw


def intervals(batch: int, heads: int, count: int = 2) -> Callable[..., dict[str, Any]]:
    """A mask of up to ``count`` random intervals of queries for each key."""

    def draw(_batch: int, _heads: int, q: int, k: int) -> dict[str, Any]:
        ends = torch.randint(0, q + 1, (batch, heads, 2 * count, k))
        return {"attn_mask": masks.IntervalMask(ends, q)}

    return draw


def documents(*lengths: int) -> Callable[..., dict[str, Any]]:
    """Documents of these lengths."""
    edges = torch.tensor([0, *lengths]).cumsum(0)
    return lambda *_: {"attn_mask": masks.documents(cu_seqlens=edges)}


def hiding_by_intervals(dtype: torch.dtype) -> Callable:
    """Random intervals within a window; the keys and values of no query are NaN."""

    def build() -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        query, key, value, options = dense(
            dtype, q=150, k=200, options=intervals(1, 1, 1), causal=True, diagonal="top_left"
        )()
        visible = options["attn_mask"].materialize() & torch.ones(150, 200).tril().bool()
        hidden = ~visible.any(dim=2).unsqueeze(-1)
        key, value = (x.masked_fill(hidden, torch.nan) for x in (key, value))
        return query, key, value, options

    return build


def lowest_mask(dtype: torch.dtype) -> Callable[..., dict[str, Any]]:
    """``finfo.min`` instead of -inf."""

    def draw(_batch: int, _heads: int, q: int, k: int) -> dict[str, Any]:
        hidden = torch.rand(q, k) < 0.3
        return {"attn_mask": torch.randn(q, k).masked_fill(hidden, torch.finfo(dtype).min)}

    return draw


def slopes(batch: int, heads: int, q: int, k: int) -> dict[str, Any]:
    return {"alibi_slopes": torch.rand(heads)}


def slopes_of_batch(batch: int, heads: int, q: int, k: int) -> dict[str, Any]:
    return {"alibi_slopes": torch.rand(batch, heads)}


def sinks(batch: int, heads: int, q: int, k: int) -> dict[str, Any]:
    return {"sinks": torch.randn(heads)}


def everything(batch: int, heads: int, q: int, k: int) -> dict[str, Any]:
    return {
        **float_mask(1, 3)(batch, heads, q, k),
        **slopes_of_batch(batch, heads, q, k),
        **sinks(batch, heads, q, k),
        "causal": True,
        "window_size": (50, 0),
        "softcap": 5.0,
        "dropout_p": 0.2,
        "dropout_seed": -5,
        "scale": 0.4,
    }


def all_but_the_mask(batch: int, heads: int, q: int, k: int) -> dict[str, Any]:
    options = everything(batch, heads, q, k)
    del options["attn_mask"]
    return options


TF32 = {"tf32": True}
AUXILIARY: dict[str, Any] = {"auxiliary": True, "gradients": False}
TMA = {"descriptors": True, "targets": (90,)}

QUICK = [
    Case("bf16 causal GQA", dense(q=70, k=333, causal=True)),
    Case("fp16 D96 everything", dense(FP16, q=50, k=70, dim=96, value_dim=80, options=everything)),
    Case("bf16 D128 window", dense(q=90, k=140, dim=128, window_size=(30, 10))),
    Case("bf16 packed, one empty", packed(causal=True, past=5)),
    Case("fp16 hidden NaN", hiding(FP16, 40)),
    Case("bf16 causal hidden NaN", causal_hiding(BF16, 32)),
    Case("fp64 causal", dense(FP64, q=33, k=40, dim=24, causal=True, softcap=2.0)),
    Case("tf32 causal", dense(FP32, q=40, k=70, causal=True), **TF32),
    Case("fp32 sinks", dense(FP32, q=20, k=40, dim=24, causal=True, options=sinks)),
    Case("fp16 max and entropy", dense(FP16, q=70, k=333, causal=True), **AUXILIARY),
    Case("bf16 split-key decoding", dense(heads=4, q=1, k=200, options=sinks), splits=3),
    Case("bf16 TMA causal", dense(q=140, k=400, causal=True, layout="bshd"), **TMA),
    Case("bf16 intervals of heads", dense(q=150, k=333, options=intervals(1, 2), causal=True)),
    Case("bf16 tangents causal", dense(q=70, k=160, causal=True, softcap=2.0), tangents=True),
]

_DECODING = [
    Case(
        "fp16 split-key decoding",
        dense(FP16, batch=2, heads=6, kv_heads=2, q=1, k=300, dim=80),
        splits=4,
    ),
    Case(
        "fp32 split-key decoding of a part a key", dense(FP32, heads=3, q=1, k=7, dim=24), splits=7
    ),
    Case(
        "bf16 split-key max and entropy",
        dense(heads=4, q=1, k=200, options=sinks),
        **AUXILIARY,
        splits=3,
    ),
    Case(
        "bf16 packed split-key decoding",
        packed(
            lengths=(1, 0, 1, 1),
            lengths_k=(40, 7, 2, 90),
            heads=4,
            past=2,
            options=sinks,
            causal=True,
        ),
        splits=3,
    ),
]

_GEOMETRY = [
    Case("bf16 full", dense()),
    Case("bf16 causal", dense(causal=True)),
    Case("bf16 causal top left", dense(q=65, k=90, causal=True, diagonal="top_left")),
    Case("bf16 causal more queries", dense(q=150, k=70, causal=True)),
    Case("bf16 causal three tiles", dense(q=200, k=200, causal=True)),
    Case("bf16 window left", dense(q=150, k=150, window_size=(20, None))),
    Case("bf16 window right", dense(q=150, k=150, window_size=(None, 20), diagonal="top_left")),
    Case("bf16 window causal", dense(q=150, k=150, window_size=(33, 0), causal=True)),
    Case("bf16 window rows without keys", dense(q=150, k=40, window_size=(3, 2))),
    Case("bf16 full three tiles", dense(q=129, k=260)),
    Case("bf16 one query", dense(heads=4, q=1, k=129)),
    Case("bf16 one key", dense(q=63, k=1)),
    Case("bf16 17 by 127", dense(q=17, k=127, causal=True)),
    Case("bf16 batch of 3", dense(batch=3, heads=3, kv_heads=3, q=40, k=33)),
    Case("bf16 MQA of 5", dense(heads=5, q=40, k=63, causal=True)),
    Case("bf16 GQA of 3", dense(batch=2, heads=6, kv_heads=2, q=33, k=63)),
    Case("bf16 scale negative", dense(scale=-0.5)),
    Case("bf16 scale zero", dense(scale=0.0, causal=True)),
    Case("bf16 bshd", dense(layout="bshd", causal=True)),
    Case("bf16 expanded", dense(heads=2, kv_heads=2, layout="expanded")),
    Case("bf16 strided last", dense(layout="strided_last", causal=True)),
    Case("bf16 rows in NaN", dense(layout="in NaN", causal=True)),
]
_OPTIONS = [
    Case("bf16 bool mask", dense(batch=2, options=bool_mask(0, 1, 2, 3))),
    Case("fp16 hidden NaN of every query", hiding(FP16, 40, rows=True)),
    Case(
        "bf16 bool mask of keys, causal",
        dense(batch=2, q=150, k=150, options=bool_mask(0, 3), causal=True),
    ),
    Case("bf16 bool mask of rows", dense(options=bool_mask(2))),
    Case("bf16 bool mask and window", dense(options=bool_mask(2, 3), window_size=(9, 4))),
    Case("bf16 float mask", dense(batch=2, options=float_mask(0, 1, 2, 3))),
    Case("bf16 float mask over batch", dense(batch=2, options=float_mask(1, 2, 3), causal=True)),
    Case("bf16 float mask over heads", dense(batch=2, options=float_mask(0, 2, 3))),
    Case("bf16 float mask of keys", dense(batch=2, options=float_mask(3))),
    Case(
        "bf16 float mask with a stride",
        dense(options=lambda b, h, q, k: {"attn_mask": torch.randn(q, 2 * k)[:, ::2]}),
    ),
    Case("bf16 float mask of rows", dense(options=float_mask(1, 2))),
    Case(
        "bf16 float mask hides all",
        dense(options=lambda b, h, q, k: {"attn_mask": torch.full((q, k), -INF)}),
    ),
    Case("bf16 hidden NaN", hiding(BF16, 64)),
    Case("bf16 intervals of batch", dense(batch=2, q=150, k=90, options=intervals(2, 1, 1))),
    Case("bf16 intervals hidden NaN", hiding_by_intervals(BF16)),
    Case("bf16 documents", dense(q=400, k=400, options=documents(70, 1, 200, 129), causal=True)),
    Case("bf16 D128 documents", dense(q=300, k=300, dim=128, options=documents(40, 260))),
    Case(
        "bf16 intervals and the rest",
        dense(
            options=lambda *sizes: all_but_the_mask(*sizes) | intervals(1, 2)(*sizes),
        ),
    ),
    Case("fp32 intervals", dense(FP32, q=70, k=90, dim=16, options=intervals(1, 1))),
    Case("tf32 intervals", dense(FP32, q=70, k=90, options=intervals(1, 1)), **TF32),
    Case("bf16 softcap", dense(softcap=2.0, causal=True)),
    Case("bf16 ALiBi", dense(options=slopes, causal=True)),
    Case("bf16 ALiBi of batch", dense(batch=2, options=slopes_of_batch)),
    Case("bf16 sinks", dense(options=sinks, causal=True)),
    Case(
        "bf16 sink of minus infinity",
        dense(options=lambda b, h, q, k: {"sinks": torch.tensor([-INF, 3.0])}),
    ),
    Case(
        "bf16 sink of the lowest number",
        dense(
            q=90,
            k=40,
            causal=True,
            options=lambda *_: {"sinks": torch.tensor([torch.finfo(BF16).min, 0.0])},
        ),
    ),
    Case("bf16 mask of the lowest number", dense(options=lowest_mask(BF16))),
    Case("fp16 mask of the lowest number", dense(FP16, options=lowest_mask(FP16), causal=True)),
    Case("bf16 logits of 100", dense(magnitude=30.0, causal=True)),
    Case("fp16 logits of 100", dense(FP16, magnitude=30.0, options=bool_mask(2, 3))),
    Case("bf16 logits of 10,000", dense(q=90, k=140, magnitude=3000.0, options=sinks)),
    Case("fp16 logits of 10,000", dense(FP16, q=90, k=140, dim=16, magnitude=3e3, causal=True)),
    Case("bf16 dropout", dense(dropout_p=0.3, dropout_seed=17, causal=True)),
    Case("bf16 dropout of most", dense(dropout_p=0.7, dropout_seed=2**40 + 3)),
    Case("bf16 dropout of all", dense(dropout_p=1.0, dropout_seed=17)),
    Case("bf16 D128 everything", dense(q=50, k=70, dim=128, options=everything)),
    Case("fp32 everything", dense(FP32, q=20, k=40, dim=16, options=everything)),
    Case("fp64 everything", dense(FP64, q=20, k=40, dim=16, options=everything)),
    Case("tf32 everything", dense(FP32, q=33, k=70, dim=32, options=everything), **TF32),
]
_AUXILIARY = [
    Case("bf16 D128 max and entropy", dense(q=90, k=140, dim=128, options=sinks), **AUXILIARY),
    Case("bf16 max and entropy of all", dense(options=everything), **AUXILIARY),
    Case("bf16 max and entropy packed", packed(lengths=(70, 1, 33), causal=True), **AUXILIARY),
    Case("bf16 max and entropy of 10,000", dense(magnitude=3000.0, options=sinks), **AUXILIARY),
    Case("bf16 max and entropy hidden NaN", hiding(BF16, 64), **AUXILIARY),
    Case(
        "bf16 max and entropy without keys",
        dense(q=150, k=40, window_size=(3, 2)),
        **AUXILIARY,
    ),
    Case("fp32 max and entropy", dense(FP32, q=20, k=40, dim=16, softcap=2.0), **AUXILIARY),
    Case("fp64 max and entropy", dense(FP64, q=33, k=40, dim=24, causal=True), **AUXILIARY),
    Case("tf32 max and entropy", dense(FP32, q=40, k=70), **AUXILIARY, **TF32),
    Case("bf16 TMA max and entropy", dense(q=140, k=400, causal=True), **AUXILIARY, **TMA),
]
_PACKED = [
    Case("bf16 packed", packed(lengths=(70, 1, 33))),
    Case("bf16 packed lengths differ", packed(lengths=(20, 40), lengths_k=(70, 17), causal=True)),
    Case("bf16 packed window", packed(lengths=(90, 33), window_size=(20, 0))),
    Case("bf16 packed no keys", packed(lengths=(20, 30), lengths_k=(0, 40))),
    Case("bf16 packed top left", packed(lengths_k=(60, 5, 70), causal=True, diagonal="top_left")),
    Case("fp16 packed all options", packed(FP16, dim=40, options=all_but_the_mask)),
    Case("fp32 packed", packed(FP32, lengths=(17, 0, 20), dim=16, causal=True)),
    Case("tf32 packed", packed(FP32, lengths=(37, 20), dim=64, causal=True), **TF32),
]
_HEAD_DIMS = [
    Case("fp16 D16", dense(FP16, dim=16, causal=True)),
    Case("bf16 D32 Dv 59", dense(dim=32, value_dim=59, causal=True)),
    Case("fp16 D64", dense(FP16, causal=True)),
    Case("bf16 D80", dense(dim=80, causal=True)),
    Case("bf16 D96", dense(dim=96, causal=True)),
    Case("bf16 D111", dense(dim=111, causal=True)),
    Case("bf16 D128", dense(q=80, k=140, dim=128, causal=True)),
    Case("bf16 D192 Dv 128", dense(q=40, k=70, dim=192, value_dim=128, causal=True)),
    Case("bf16 D256", dense(q=40, k=70, dim=256, causal=True)),
    Case("bf16 D512", dense(heads=1, q=17, k=40, dim=512, causal=True)),
    Case("bf16 D1", dense(dim=1, causal=True)),
    Case("fp32 D59", dense(FP32, heads=1, q=20, k=40, dim=59, causal=True)),
    Case("fp32 D128", dense(FP32, heads=1, q=17, k=33, dim=128)),
    Case("tf32 D96", dense(FP32, q=33, k=40, dim=96, causal=True), **TF32),
    Case("tf32 D128", dense(FP32, q=33, k=40, dim=128, causal=True), **TF32),
    Case("fp64 D64", dense(FP64, q=33, k=40, causal=True)),
    Case("fp64 D96", dense(FP64, heads=1, q=20, k=33, dim=96)),
]
_TMA = [
    Case("bf16 TMA full", dense(q=129, k=260), **TMA),
    Case("bf16 TMA window", dense(q=150, k=150, window_size=(20, 7)), **TMA),
    Case("bf16 TMA GQA", dense(batch=2, heads=4, kv_heads=2, q=70, k=90, causal=True), **TMA),
    Case("fp16 TMA D128", dense(FP16, q=80, k=140, dim=128, causal=True), **TMA),
    Case("bf16 TMA D256", dense(heads=1, q=40, k=70, dim=256, causal=True), **TMA),
    Case("bf16 TMA all options", dense(options=all_but_the_mask), **TMA),
    Case("bf16 TMA hidden NaN", causal_hiding(BF16, 64), **TMA),
    Case("bf16 TMA packed", packed(causal=True), **TMA),
    Case("bf16 TMA documents", dense(q=400, k=400, options=documents(300, 100)), **TMA),
]

_ORDERED = [
    replace(case, name=f"{case.name}, heaviest first", heaviest_first=True)
    for case in (
        Case("bf16 causal heads", dense(batch=2, heads=6, kv_heads=3, q=150, k=140, causal=True)),
        Case("bf16 causal packed", packed(causal=True)),
        Case("bf16 TMA causal heads", dense(batch=2, heads=3, q=200, causal=True), **TMA),
    )
]

_TANGENTS = [
    replace(case, name=f"{case.name}, tangents", tangents=True)
    for case in (
        Case("bf16 full three tiles", dense(q=129, k=260)),
        Case("bf16 window", dense(q=150, k=150, window_size=(20, 7), layout="bshd")),
        Case("bf16 rows without keys", dense(q=150, k=70, causal=True, layout="in NaN")),
        Case("bf16 hidden NaN", causal_hiding(BF16, 64)),
        Case("bf16 ALiBi and sinks", dense(options=lambda *x: slopes(*x) | sinks(*x), causal=True)),
        Case("bf16 packed, one empty", packed(causal=True, past=5)),
        Case("fp16 logits of 10,000", dense(FP16, q=90, k=140, dim=16, magnitude=1e3)),
        Case("bf16 D40 Dv 59", dense(dim=40, value_dim=59, causal=True)),
        Case("fp16 D96", dense(FP16, dim=96, causal=True)),
        Case("bf16 D128", dense(q=80, k=140, dim=128, causal=True)),
        Case("bf16 D192", dense(heads=1, q=40, k=70, dim=192, causal=True)),
        Case("bf16 D256", dense(heads=1, q=40, k=70, dim=256, causal=True)),
        Case("fp32 D24", dense(FP32, q=33, k=40, dim=24, causal=True)),
        Case("fp32 D128", dense(FP32, heads=1, q=17, k=33, dim=128)),
        Case("tf32", dense(FP32, q=40, k=70, causal=True), **TF32),
        Case("tf32 D128", dense(FP32, heads=1, q=33, k=40, dim=128), **TF32),
        Case("fp64 D24", dense(FP64, q=33, k=40, dim=24, causal=True, softcap=2.0)),
    )
]


def _specialized(name: str, stages: int = 2, *, turns: bool = False, **problem: Any) -> Case:
    """A forward pass of the warp-specialised kernel."""
    dtype = FP16 if name.startswith("fp16") else BF16
    return Case(name, dense(dtype, **problem), (90,), specialized=(stages, turns), gradients=False)


def _any_lengths(count: int) -> list[Case]:
    """Problems of up to 300 queries and keys that cross every variant of the kernel."""
    draw = random.Random(0)
    found = []
    for number in range(count):
        # Every combination comes up twice; lengths and GQA are drawn.
        dtype, dim = ("bf16", "fp16")[number % 2], (64, 128)[number // 2 % 2]
        causal, turns = number // 4 % 2 == 1, number // 8 % 2 == 1
        q, k, group = draw.randint(1, 300), draw.randint(1, 300), draw.choice((1, 2, 3))
        name = f"{dtype} specialized D{dim} {q} by {k}{' causal' * causal}{' in turns' * turns}"
        problem = {"q": q, "k": k, "dim": dim, "heads": group, "causal": causal}
        found.append(_specialized(name, 2, turns=turns, **problem))
    return found


# The warp-specialised kernel: the first are those of ``make test``.
SPECIALIZED_QUICK = [
    _specialized("bf16 specialized causal GQA", q=140, k=333, causal=True),
    _specialized("bf16 specialized in turns", 3, turns=True, q=150, k=300, layout="bshd"),
    _specialized("fp16 specialized D128 causal", dim=128, q=200, k=70, causal=True, turns=True),
    _specialized("fp16 specialized D128", dim=128, q=65, k=520, heads=1),
    Case(
        "bf16 specialized hidden NaN",
        causal_hiding(BF16, 64),
        (90,),
        specialized=(2, False),
        gradients=False,
    ),
]
_SPECIALIZED = [
    replace(SPECIALIZED_QUICK[0], name="bf16 specialized backward", gradients=True),
    _specialized("bf16 specialized batch of 2", batch=2, heads=6, kv_heads=2, q=130, k=129),
    _specialized("bf16 specialized right side", q=129, k=300, window_size=(None, 33)),
    _specialized("bf16 specialized rows without keys", q=300, k=140, window_size=(None, 3)),
    _specialized("fp16 specialized rows in NaN", q=100, k=190, layout="in NaN", causal=True),
    _specialized("bf16 specialized one query", 3, q=1, k=300),
    _specialized("bf16 specialized one key", q=300, k=1, causal=True, diagonal="top_left"),
    replace(SPECIALIZED_QUICK[0], name="bf16 specialized heaviest first", heaviest_first=True),
    _specialized("bf16 specialized whole tiles", 3, turns=True, q=256, k=256, causal=True),
    *_any_lengths(32),
]


def _backward(name: str, stages: int = 2, **problem: Any) -> Case:
    """A backward pass of the warp-specialised kernels."""
    dtype = FP16 if name.startswith("fp16") else BF16
    return Case(name, dense(dtype, **problem), (90,), specialized_backward=stages)


def _any_gradients(count: int) -> list[Case]:
    """Problems of up to 200 queries and keys that cross every variant of the backward kernels."""
    draw = random.Random(1)
    found = []
    for number in range(count):
        dtype, dim = ("bf16", "fp16")[number % 2], (64, 128)[number // 2 % 2]
        causal, stages = number // 4 % 2 == 1, 2 + number // 8 % 2
        q, k, group = draw.randint(1, 200), draw.randint(1, 200), draw.choice((1, 2, 3))
        name = f"{dtype} specialized gradients D{dim} {q} by {k}{' causal' * causal} s{stages}"
        problem = {"q": q, "k": k, "dim": dim, "heads": group, "causal": causal}
        found.append(_backward(name, stages, **problem))
    return found


def low_head() -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """Two heads, of which the second has logits of -400: exp of minus its LSE overflows.

    Where the first head's last tile of queries reads the LSE of the second one it must be hidden.
    """
    query, key, value, options = dense(q=70, k=65)()
    key = key.abs()
    query[:, 1] = -40 - query[:, 1].abs()
    return query, key, value, options


# Its backward kernels: the first are those of ``make test``.
BACKWARD_QUICK = [
    _backward("bf16 specialized gradients GQA", q=70, k=135, causal=True),
    _backward("fp16 specialized gradients D128 causal", dim=128, q=90, k=70, causal=True, heads=1),
    Case("bf16 specialized gradients low head", low_head, (90,), specialized_backward=3),
    Case(
        "bf16 specialized gradients hidden NaN",
        causal_hiding(BF16, 64),
        (90,),
        specialized_backward=2,
    ),
]
_BACKWARD = [
    _backward("fp16 specialized gradients D128", 3, dim=128, q=65, k=130, heads=1),
    replace(BACKWARD_QUICK[0], name="bf16 specialized all three", specialized=(2, False)),
    replace(BACKWARD_QUICK[0], name="bf16 specialized gradients in order", heaviest_first=True),
    _backward("bf16 specialized gradients batch", batch=2, heads=6, kv_heads=2, q=130, k=129),
    _backward("bf16 specialized gradients right side", q=129, k=200, window_size=(None, 33)),
    _backward("bf16 specialized gradients no keys", q=300, k=140, window_size=(None, 3)),
    _backward("fp16 specialized gradients rows in NaN", q=100, k=190, layout="in NaN", causal=True),
    _backward("bf16 specialized gradients bshd", 3, q=100, k=190, layout="bshd"),
    _backward("bf16 specialized gradients one query", 3, q=1, k=300),
    _backward("bf16 specialized gradients one key", q=300, k=1, causal=True, diagonal="top_left"),
    _backward("bf16 specialized gradients whole tiles", 3, q=256, k=256, causal=True),
    _backward("bf16 specialized gradients logits of 100", q=90, k=140, magnitude=30.0, causal=True),
    *_any_gradients(32),
]

TABLE = [
    *QUICK,
    *_DECODING,
    *_GEOMETRY,
    *_OPTIONS,
    *_AUXILIARY,
    *_PACKED,
    *_HEAD_DIMS,
    *_TMA,
    *_ORDERED,
    *_TANGENTS,
    *SPECIALIZED_QUICK,
    *_SPECIALIZED,
    *BACKWARD_QUICK,
    *_BACKWARD,
]
BY_NAME = {case.name: case for case in TABLE}


def names(arch: int, cases: Sequence[Case]) -> list[str]:
    """The cases for a target."""
    return [case.name for case in cases if arch in case.targets]
