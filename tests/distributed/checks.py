"""What every rank checks by itself: shards there and back, errors, second derivatives; a layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from flashlayer import AuxOutput, AuxRequest, FlashAttention, flash_attention, masks
from flashlayer.distributed import (
    position_ids,
    ring_attention,
    shard_lengths,
    shard_sequence,
    ulysses_attention,
    unshard_sequence,
)
from tests.distributed.cases import LENGTH, MASKS, Case


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
    check_wrong_masks(ranks, device)
    check_all_ranks_join_a_group(ranks, device)
    q.requires_grad_()
    out = ring_attention(q, q, q)
    expected = ring_attention(*[q.bfloat16()] * 3, return_lse=True)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        results = zip(ring_attention(q, q, q, return_lse=True), expected, strict=True)
        assert all(torch.equal(x, y) for x, y in results)
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


def check_wrong_masks(ranks: int, device: torch.device) -> None:
    """Refused before anything but the lengths is sent."""
    q, total = torch.randn(2, ranks, 8, 4, device=device), 8 * ranks
    whole = masks.chunks(4, seqlen=total, device=device)
    wrong = [
        (masks.chunks(4, seqlen=8), f"{total} queries and {total} keys, got one of 8 and 8"),
        (masks.documents(torch.zeros(3, total).int()), "batch=2 or 1 .* got one of batch=3"),
        (
            masks.IntervalMask(torch.zeros(1, ranks + 1, 2, total).int(), total),
            f"heads={ranks} or 1, got one of batch=1 and heads={ranks + 1}",
        ),
    ]
    for attend in (ring_attention, ulysses_attention):
        for mask, message in wrong:
            with pytest.raises(ValueError, match=message):
                attend(q, q, q, attn_mask=mask.to(device))
        with pytest.raises(ValueError, match="attn_mask must be on query's device"):
            attend(q, q, q, attn_mask=whole.to("meta"))
        with pytest.raises(TypeError, match="must be an IntervalMask of the whole sequence, got T"):
            attend(q, q, q, attn_mask=whole.materialize())


def check_all_ranks_join_a_group(ranks: int, device: torch.device) -> None:
    """In its first call, though the mask lets nobody send anything."""
    group, original, calls = dist.new_group(list(range(ranks))), dist.all_reduce, []
    q = torch.randn(1, 1, 8, 4, device=device)
    mask = masks.chunks(8, seqlen=8 * ranks, device=device)

    def spy(*arguments: Any, **options: Any) -> Any:
        calls.append(options["group"])
        return original(*arguments, **options)

    dist.all_reduce = spy
    for _ in range(2):
        ring_attention(q, q, q, attn_mask=mask, lengths=[8] * ranks, group=group)
    dist.all_reduce = original
    assert calls == [group]


def check_documents_leave_each_other_alone(rank: int, device: torch.device) -> None:
    """Another document 1: every bit of document 2's outputs and gradients is as it was."""
    ranks = dist.get_world_size()
    edges = torch.tensor([0, 41, LENGTH], device=device)
    generator = torch.Generator().manual_seed(2)
    whole = torch.randn(4, 2, 2 * ranks, LENGTH, 8, generator=generator).to(device)
    mask = masks.documents(cu_seqlens=edges)
    calls = [
        (attend, placement, causal, "auto")
        for attend in (ring_attention, ulysses_attention)
        for placement in ("contiguous", "zigzag")
        for causal in (False, True)
    ]
    if ranks == 2:
        calls.append((ring_attention, "zigzag", True, "triton"))
    for attend, placement, causal, backend in calls:
        position = Case(placement=placement, uneven=placement == "contiguous").positions(
            rank, ranks
        )
        options = {"placement": placement, "causal": causal, "backend": backend}
        results: list[list[Tensor]] = []
        for factor in (1.0, 1.0, -3.0):
            first = torch.ones(LENGTH, 1, device=device)
            first[:41] = factor
            few = slice(1 if backend == "triton" else None)  # seconds in the interpreter
            q, k, v, do = (x[few, few, position] for x in whole * first)
            leaves = [x.requires_grad_() for x in (q, k, v)]
            out, lse = attend(*leaves, attn_mask=mask, return_lse=True, **options)
            results.append([out, lse, *torch.autograd.grad(out, leaves, do)])
        same, second = results[0], position >= 41
        for again, other, x in zip(results[1], results[2], same, strict=True):
            assert torch.equal(again, x)
            assert torch.equal(other[:, :, second], x[:, :, second])
        assert second.all() or not torch.equal(results[2][0], same[0])


def check_numbers_from_inside_the_softmax(rank: int, device: torch.device) -> None:
    """The largest score and the entropy of whole rows, some without keys, some with a sink."""
    ranks, request = dist.get_world_size(), AuxRequest(True, True, True)
    generator = torch.Generator().manual_seed(6)
    whole = torch.randn(3, 1, 2 * ranks, LENGTH, 8, generator=generator).double().to(device)
    whole[:, :, :, 3] *= 30
    sinks = torch.linspace(-3, 3, 2 * ranks, dtype=torch.float64, device=device)
    edges = torch.tensor([0, 41, LENGTH - 4], device=device)
    mask = masks.documents(cu_seqlens=edges, seqlen=LENGTH)
    for options in (
        {"window_size": (30, 2)},
        {"attn_mask": mask},
        {"sinks": sinks, "causal": True},
    ):
        expected = flash_attention(*whole, return_aux=request, backend="standard", **options)
        for attend in (ring_attention, ulysses_attention):
            case = Case(placement="zigzag")
            position = case.positions(rank, ranks)
            q, k, v = (x[:, :, position].requires_grad_() for x in whole)
            out, aux = attend(q, k, v, placement="zigzag", return_aux=request, **options)
            torch.testing.assert_close(out, expected[0][:, :, position])
            for number, of_all in zip(aux, expected[1], strict=True):
                torch.testing.assert_close(number, of_all[:, :, position])
                assert number.is_contiguous()
            assert not aux.max_scores.requires_grad
            torch.autograd.grad(aux.lse[aux.lse.isfinite()].sum(), q, retain_graph=True)
            if attend is ring_attention:
                with pytest.raises(NotImplementedError, match="no gradient of the entropy"):
                    torch.autograd.grad(aux.entropy.sum(), q)
    only = ulysses_attention(q, k, v, placement="zigzag", return_aux=AuxRequest(entropy=True))[1]
    assert only.lse is only.max_scores is None
    assert ring_attention(q, k, v, return_aux=AuxRequest())[1] == AuxOutput()


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


def run_layer(
    rank: int, device: torch.device, placement: str, name: str | None
) -> dict[str, Tensor]:
    """A layer over shards: its output, and its parameters' gradients summed over the ranks."""
    case, ranks = Case(placement=placement, uneven=placement == "contiguous"), dist.get_world_size()
    layer, x = layer_and_input(dist.group.WORLD, placement)
    layer = layer.to(device)
    shard = x[:, case.positions(rank, ranks)].to(device)
    mask = None if name is None else MASKS[name](6).to(device)
    out = layer(shard, attn_mask=mask)
    out.square().sum().backward()
    results = {"out": out.detach().cpu()}
    if ranks == 2 and name != "any":  # the graph breaks at the ring and goes on behind it
        assert torch.equal(torch.compile(layer, backend="eager")(shard, attn_mask=mask), out)
    for path, parameter in layer.named_parameters():
        dist.all_reduce(parameter.grad)
        results[path] = parameter.grad.cpu()
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


def check_layer(placement: str, name: str | None, shards: list[dict[str, Tensor]]) -> None:
    case = Case(placement=placement, uneven=placement == "contiguous")
    layer, x = layer_and_input(None, placement)
    out = layer(x, attn_mask=None if name is None else MASKS[name](6))
    out.square().sum().backward()
    for rank, shard in enumerate(shards):
        positions = case.positions(rank, len(shards))
        torch.testing.assert_close(shard["out"], out[:, positions].detach())
        for path, parameter in layer.named_parameters():
            torch.testing.assert_close(shard[path], parameter.grad, msg=path)
