"""What every rank checks by itself: shards there and back, errors, second derivatives; a layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from flashlayer import FlashAttention, flash_attention
from flashlayer.distributed import (
    position_ids,
    ring_attention,
    shard_lengths,
    shard_sequence,
    ulysses_attention,
    unshard_sequence,
)
from tests.distributed.cases import LENGTH, Case


def check_layouts_and_errors(rank: int, device: torch.device) -> None:
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
