"""Sharded tensors (DTensor) against the same call in one process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from flashlayer import AuxRequest, FlashAttention, flash_attention, flash_attention_varlen, masks
from tests.processes import run_group

BATCH, HEADS, LENGTH, DIM = 4, 4, 33, 16
FP64 = torch.float64


def options() -> dict[str, dict[str, Any]]:
    """Options of a call; tensors that require gradients are judged by them."""
    torch.manual_seed(3)
    visible = torch.rand(BATCH, 1, LENGTH, LENGTH) > 0.3
    return {
        "plain": {},
        "window": {"window_size": (5, 2)},
        "softcap": {"softcap": 2.0, "causal": True},
        "mask": {"attn_mask": visible},
        "mask of all": {"attn_mask": visible[:1, :, :1]},
        "bias of heads": {"attn_mask": torch.randn(1, HEADS, LENGTH, LENGTH, dtype=FP64)},
        "bias of entries": {"attn_mask": torch.randn(BATCH, 1, 1, LENGTH, dtype=FP64)},
        "intervals": {"attn_mask": masks.documents(cu_seqlens=torch.tensor([0, 10, LENGTH]))},
        "sinks": {"sinks": torch.randn(HEADS, dtype=FP64)},
        "slopes": {"alibi_slopes": torch.rand(BATCH, HEADS), "causal": True},
        "dropout": {"dropout_p": 0.3, "dropout_seed": 5},
        "tiled": {"backend": "tiled", "causal": True},
    }


def tensors(kv_heads: int = 2) -> list[Tensor]:
    """Query, key, value and the gradients of ``out`` and ``lse``."""
    torch.manual_seed(0)
    q, do = torch.randn(2, BATCH, HEADS, LENGTH, DIM, dtype=FP64)
    k, v = torch.randn(2, BATCH, kv_heads, LENGTH, DIM, dtype=FP64)
    return [q, k, v, do, torch.randn(BATCH, HEADS, LENGTH, dtype=FP64)]


def results(place: Callable[[Tensor], Tensor], kv: Any, chosen: dict, kv_heads: int = 2) -> list:
    """``out``, ``lse`` and all gradients of one call; ``place`` and ``kv`` make the shards."""
    q, k, v, do, dlse = tensors(kv_heads)
    chosen = dict(chosen)
    leaves = [x.requires_grad_() for x in (place(q), kv(k), kv(v))]
    for name, x in chosen.items():
        if isinstance(x, Tensor) and x.dtype == FP64:
            chosen[name] = x.clone().requires_grad_()
            leaves.append(chosen[name])
    out = flash_attention(*leaves[:3], return_lse=True, **chosen)
    return [*out, *torch.autograd.grad(out, leaves, (place(do), place(dlse)))]


def run(rank: int, device: torch.device) -> None:
    mesh = init_device_mesh("cpu", (2,))
    both = init_device_mesh("cpu", (1, 2))

    def sharded(*placements: Placement, on: Any = mesh) -> Callable[[Tensor], Tensor]:
        return functools.partial(_distribute, on, placements)

    for placement in (Shard(0), Shard(1), Replicate()):
        place = sharded(placement)
        for name, chosen in options().items():
            expected = results(torch.clone, torch.clone, chosen)
            actual = results(place, place, chosen)
            out = actual[0]
            gathered = name == "dropout"
            assert out.placements == ((Replicate() if gathered else placement),), name
            _assert_equal(actual, expected, f"{name}, {placement}")
    # One key head for all query heads stays whole, and its gradient is a sum.
    actual = results(sharded(Shard(1)), sharded(Replicate()), {}, kv_heads=1)
    assert actual[3].placements == actual[4].placements == (Partial(),)
    _assert_equal(actual, results(torch.clone, torch.clone, {}, kv_heads=1), "one key head")
    place = sharded(Shard(0), Shard(1), on=both)
    expected = results(torch.clone, torch.clone, {"causal": True})
    _assert_equal(results(place, place, {"causal": True}), expected, "two dimensions")
    _check_packed(sharded)
    _check_numbers(sharded)
    _check_module(mesh)
    _check_errors(sharded)
    with torch.no_grad():
        compiled = torch.compile(flash_attention, backend="eager", fullgraph=True)
        shards = [sharded(Shard(1))(x) for x in tensors(HEADS)[:3]]
        assert torch.equal(compiled(*shards).to_local(), flash_attention(*shards).to_local())
    row = [sharded(Shard(1))(x.bfloat16()[:, :, :1]) for x in tensors(HEADS)[:3]]
    assert flash_attention(*row).placements == (Shard(1),)


def _distribute(mesh: Any, placements: tuple[Placement, ...], x: Tensor) -> Tensor:
    return distribute_tensor(x, mesh, placements)


def _assert_equal(actual: list, expected: list, name: str) -> None:
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert isinstance(a, DTensor) == (index < 5), name  # a plain tensor has a plain gradient
        whole = a.full_tensor() if isinstance(a, DTensor) else a
        torch.testing.assert_close(whole, e, rtol=0, atol=1e-14, msg=lambda m: f"{name}: {m}")


def _check_packed(sharded: Any) -> None:
    packed = [x[0].transpose(0, 1).contiguous() for x in tensors(HEADS)[:3]]
    chosen = {"cu_seqlens_q": torch.tensor([0, 10, 10, 30]), "causal": True}
    out = flash_attention_varlen(*map(sharded(Shard(1)), packed), **chosen)
    assert out.placements == (Shard(1),)
    assert torch.equal(out.full_tensor(), flash_attention_varlen(*packed, **chosen))
    with pytest.raises(ValueError, match="got a shard of the sequence"):
        flash_attention_varlen(*map(sharded(Shard(0)), packed), **chosen)


def _check_numbers(sharded: Any) -> None:
    """The largest score and the entropy, and the latter's gradient."""
    q, k, v, _, dentropy = tensors()
    for placement in (Shard(0), Shard(1)):
        found = []
        for place in (torch.clone, sharded(placement)):
            leaf = place(q).requires_grad_()
            request = AuxRequest(lse=True, max_scores=True, entropy=True)
            _, aux = flash_attention(leaf, place(k), place(v), causal=True, return_aux=request)
            (grad,) = torch.autograd.grad(aux.entropy, leaf, place(dentropy))
            found.append([*aux, grad])
        for whole, shards in zip(*found, strict=True):
            assert shards.placements == (placement,)
            torch.testing.assert_close(shards.full_tensor(), whole, rtol=0, atol=1e-14)


def _check_module(mesh: Any) -> None:
    """Tensor parallelism of the layer, projections and all."""
    torch.manual_seed(1)
    layer, x = FlashAttention(64, HEADS, causal=True), torch.randn(2, 10, 64)
    expected = layer(x)
    columns = ColwiseParallel(use_local_output=False)
    plan = dict.fromkeys(("q_proj", "k_proj", "v_proj"), columns)
    parallelize_module(layer, mesh, plan | {"out_proj": RowwiseParallel(use_local_output=False)})
    distribute_module(layer, mesh)
    actual = layer(distribute_tensor(x, mesh, [Replicate()])).full_tensor()
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def _check_errors(sharded: Any) -> None:
    q, k, v, _, _ = tensors(HEADS)
    with pytest.raises(
        ValueError,
        match=r"query must be sharded over the batch or the heads, got a shard of the sequence: "
        r"flashlayer\.distributed\.ring_attention computes one",
    ):
        flash_attention(*map(sharded(Shard(2)), (q, k, v)))
    with pytest.raises(ValueError, match="got a shard of the head dimension"):
        flash_attention(*map(sharded(Shard(3)), (q, k, v)))
    with pytest.raises(TypeError, match="query is a DTensor, so key must be one, got Tensor"):
        flash_attention(sharded(Shard(0))(q), k, v)
    for kv in (Shard(1), Replicate()):
        odd = [sharded(kv)(torch.randn(1, 3, 5, DIM)) for _ in range(2)]
        with pytest.raises(ValueError, match="sharded over 2 ranks, which must divide key's 3"):
            flash_attention(sharded(Shard(1))(torch.randn(1, 6, 5, DIM)), *odd)
    with pytest.raises(ValueError, match="'standard' can't compute this call: its operations mix"):
        flash_attention(*map(sharded(Shard(0)), (q, k, v)), backend="standard")


def test_a_shard_of_batch_or_heads_computes_what_one_process_does(tmp_path: Path) -> None:
    run_group(run, 2, tmp_path)
