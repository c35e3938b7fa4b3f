"""A layer whose heads are sharded over processes against the same layer in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from flashlayer import FlashAttention, KVCache, masks
from tests.processes import run_group

EMBED = 24
SHARDED = ("q_proj", "k_proj", "v_proj")
EDGES = torch.tensor([0, 3, 3, 10])

LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gqa": {"num_heads": 8, "num_kv_heads": 4, "head_dim": 6, "causal": True},
    "rope_norm": {"rotary_base": 100.0, "qk_norm": True, "num_kv_heads": 2},
    "alibi": {"alibi": True, "causal": True, "num_heads": 6},
    "sinks": {"sinks": True, "num_kv_heads": 2, "window_size": (3, 0)},
    "everything": {
        "alibi": True,
        "sinks": True,
        "qk_norm": True,
        "rotary_base": 50.0,
        "softcap": 3.0,
        "bias": False,
        "num_kv_heads": 2,
    },
    "standard": {"backend": "standard", "sinks": True},
    # Keys and values whole on every rank, as there are fewer of their heads than ranks.
    "mqa": {"num_kv_heads": 1, "causal": True, "qk_norm": True},
    "whole_keys": {"num_heads": 8, "num_kv_heads": 4, "sinks": True},
    "keys_of_one_group": {"num_heads": 8, "num_kv_heads": 2},
    "keys_across_groups": {"num_heads": 6, "num_kv_heads": 3, "head_dim": 4, "alibi": True},
}
WHOLE_KEYS = ("mqa", "whole_keys", "keys_of_one_group", "keys_across_groups")


def build(name: str) -> FlashAttention:
    torch.manual_seed(4)
    layer = FlashAttention(EMBED, **{"num_heads": 4, "dtype": torch.float64, **LAYERS[name]})
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.4)
    return layer


def intervals(heads: int) -> masks.IntervalMask:
    ends = torch.randint(0, 9, (2, heads, 2, 8), generator=torch.Generator().manual_seed(6))
    return masks.IntervalMask(ends.sort(dim=2).values, 8)


def calls(layer: FlashAttention) -> dict[str, dict[str, Any]]:
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    found: dict[str, dict[str, Any]] = {
        "dense": {"x": draw(2, 7, EMBED)},
        "packed": {"x": draw(10, EMBED), "cu_seqlens": EDGES},
        "mask": {"x": draw(2, 5, EMBED), "attn_mask": draw(1, layer.num_heads, 5, 5)},
        "mask_of_all_heads": {"x": draw(2, 5, EMBED), "attn_mask": draw(5, 5)},
        "intervals": {"x": draw(2, 8, EMBED), "attn_mask": intervals(layer.num_heads)},
        "intervals_of_all_heads": {"x": draw(2, 8, EMBED), "attn_mask": intervals(1)},
        "cache": {"x": draw(2, 7, EMBED), "cache": None},
    }
    if layer.rotary_base is None:
        found["context"] = {"x": draw(2, 5, EMBED), "context": draw(2, 9, EMBED)}
    return found


def run(layer: FlashAttention, call: dict[str, Any]) -> dict[str, Tensor]:
    """Output, and the gradients of all inputs and parameters."""
    layer.zero_grad()
    leaves = {
        name: x.clone().requires_grad_()
        for name, x in call.items()
        if isinstance(x, Tensor) and x.is_floating_point()
    }
    if "cache" in call:
        cache = KVCache()
        with torch.no_grad():
            parts = [layer(leaves["x"][:, part], cache=cache) for part in (slice(5), slice(5, 7))]
        return {"out": torch.cat(parts, dim=1).clone()}
    out = layer(**call | leaves)
    out.square().sum().backward()
    results = {"out": out.detach()} | {f"d{name}": leaf.grad for name, leaf in leaves.items()}
    for name, parameter in layer.named_parameters():
        grad = parameter.grad
        results[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    # A copy waits for a gradient that is still being summed.
    return {name: value.clone() for name, value in results.items()}


def parallelize(layer: FlashAttention, mesh: DeviceMesh, *names: str) -> FlashAttention:
    styles = {name: ColwiseParallel() for name in names}
    return parallelize_module(layer, mesh, styles | {"out_proj": RowwiseParallel()})


def work(rank: int, device: torch.device) -> dict[str, Any]:
    ranks = dist.get_world_size()
    mesh = init_device_mesh(device.type, (ranks,), mesh_dim_names=("tp",))
    if ranks == 4:
        check_ring_of_shards_of_heads(rank, device)
    results = {}
    for name in LAYERS:
        if build(name).num_heads % ranks:
            continue
        layer = build(name)
        whole = name in WHOLE_KEYS or layer.num_kv_heads % ranks
        sharded = ("q_proj",) if whole else SHARDED
        inputs = calls(layer)
        layer = parallelize(layer, mesh, *sharded)
        results[name] = {call: run(layer, inputs[call]) for call in inputs}
    if ranks == 2:
        check_other_ways(rank, mesh)
        check_other_layouts(rank, mesh)
    return results


def check_ring_of_shards_of_heads(rank: int, device: torch.device) -> None:
    """Two shards of the sequence on each of two shards of the heads, by four ranks."""
    mesh = init_device_mesh(device.type, (2, 2), mesh_dim_names=("cp", "tp"))
    options = {"causal": True, "rotary_base": 100.0, "sinks": True, "num_kv_heads": 2}
    torch.manual_seed(4)
    layer = FlashAttention(EMBED, 4, dtype=torch.float64, **options)
    nn.init.normal_(layer.sinks)
    ring = FlashAttention(
        EMBED, 4, dtype=torch.float64, **options, context_parallel_group=mesh["cp"].get_group()
    )
    ring.load_state_dict(layer.state_dict())
    x = torch.randn(2, 8, EMBED, dtype=torch.float64)
    shard = mesh["cp"].get_local_rank()
    parallelize(ring, mesh["tp"], *SHARDED)
    for mask in (None, intervals(4), intervals(1)):
        expected = run(layer, {"x": x, "attn_mask": mask})
        actual = run(ring, {"x": x.chunk(2, dim=1)[shard], "attn_mask": mask})
        for name in ("out", "dx"):
            whole = expected[name].chunk(2, dim=1)
            torch.testing.assert_close(actual[name], whole[shard], msg=name)
        for name, _ in layer.named_parameters():
            dist.all_reduce(actual[name], group=mesh["cp"].get_group())
            torch.testing.assert_close(actual[name], expected[name], msg=name)


def check_other_ways(rank: int, mesh: DeviceMesh) -> None:
    """Projections, sinks, norms, masks and sequences sharded otherwise: the same result."""
    ranks = mesh.size()
    x = calls(build("plain"))["dense"]["x"]
    # Sinks that are a DTensor, sharded or not; norms under SequenceParallel over the heads.
    for placement in (Shard(0), Replicate()):
        layer = build("everything")
        expected = run(layer, {"x": x})
        layer.sinks = nn.Parameter(distribute_tensor(layer.sinks.data, mesh, [placement]))
        parallelize(layer, mesh, *SHARDED)
        norms = dict.fromkeys(("q_norm", "k_norm"), SequenceParallel(sequence_dim=1))
        for style in norms.values():
            style.use_local_output = True
        actual = run(parallelize_module(layer, mesh, norms), {"x": x})
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, msg=f"{placement} {name}")
    # Code that divides the counts by the ranks itself.
    layer = build("alibi")
    expected = run(layer, {"x": x})["out"]
    parallelize(layer, mesh, *SHARDED)
    layer.num_heads //= ranks
    layer.num_kv_heads //= ranks
    torch.testing.assert_close(run(layer, {"x": x})["out"], expected)
    # The sequence is sharded outside of the projections, which gather it.
    layer = build("rope_norm")
    expected = run(layer, {"x": x[:, :4]})
    styles: dict[str, Any] = {name: ColwiseParallel(input_layouts=Shard(1)) for name in SHARDED}
    styles["out_proj"] = RowwiseParallel(output_layouts=Shard(1))
    parallelize_module(layer, mesh, styles)
    out = layer(x[:, :4].chunk(ranks, dim=1)[rank])
    torch.testing.assert_close(out, expected["out"].chunk(ranks, dim=1)[rank])
    # Projections that return DTensors.
    layer = build("everything")
    expected = run(layer, {"x": x})
    styles = {name: ColwiseParallel(use_local_output=False) for name in SHARDED}
    actual = run(
        parallelize_module(layer, mesh, styles | {"out_proj": RowwiseParallel()}), {"x": x}
    )
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, msg=name)
    # Keys whose projection is sharded and its output gathered.
    layer = build("mqa")
    expected = run(layer, {"x": x})
    gathered = {name: ColwiseParallel(output_layouts=Replicate()) for name in SHARDED[1:]}
    parallelize_module(layer, mesh, gathered)
    actual = run(parallelize(layer, mesh, "q_proj"), {"x": x})
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, msg=name)
    # Intervals of this rank's heads.
    layer, call = build("plain"), calls(build("plain"))["intervals"]
    expected = run(layer, call)
    own_mask = call["attn_mask"].narrow_heads(2 * rank, 2)
    actual = run(parallelize(layer, mesh, *SHARDED), call | {"attn_mask": own_mask})
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, msg=name)
    # A mask of this rank's heads, whose gradient is its own.
    layer, call = build("plain"), calls(build("plain"))["mask"]
    expected = run(layer, call)
    heads = slice(2 * rank, 2 * rank + 2)
    own_mask = call["attn_mask"][:, heads]
    actual = run(parallelize(layer, mesh, *SHARDED), call | {"attn_mask": own_mask})
    expected["dattn_mask"] = expected["dattn_mask"][:, heads]
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, msg=name)


def check_other_layouts(rank: int, mesh: DeviceMesh) -> None:
    """The same on a mesh of two dimensions and compiled; heads that don't divide are refused."""
    ranks = mesh.size()
    x = calls(build("plain"))["dense"]["x"]
    # A mesh of two dimensions, of which one shards the heads.
    for plan in (("q_proj",), SHARDED):
        wide = init_device_mesh(mesh.device_type, (1, ranks), mesh_dim_names=("dp", "tp"))
        layer = build("rope_norm" if plan == SHARDED else "mqa")
        expected = run(layer, {"x": x})
        actual = run(parallelize(layer, wide["tp"], *plan), {"x": x})
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, msg=name)
    layer = parallelize(build("everything"), mesh, *SHARDED)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    # Heads that the ranks do not divide.
    layer = FlashAttention(EMBED, 3, head_dim=8, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"q_proj must make 1 to 3 whole heads .* got 12"):
        parallelize(layer, mesh, *SHARDED)(x)
    layer = FlashAttention(EMBED, 4, num_kv_heads=1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"k_proj must make 1 to 1 whole heads of head_dim=6"):
        parallelize(layer, mesh, *SHARDED)(x)
    with pytest.raises(ValueError, match=r"q_proj makes 4 of 4 heads and k_proj"):
        parallelize(build("plain"), mesh, "k_proj", "v_proj")(x)


@pytest.mark.parametrize("ranks", [2, 4])
def test_sharded_heads_compute_what_one_process_does(ranks: int, tmp_path: Path) -> None:
    """Outputs and every gradient, of dense, packed, masked, cached and crossed attention."""
    by_rank = run_group(work, ranks, tmp_path)
    assert len(by_rank[0]) >= 9
    for name in by_rank[0]:
        layer = build(name)
        for call, arguments in calls(layer).items():
            expected = run(layer, arguments)
            for results in by_rank:
                actual = results[name][call]
                assert actual.keys() == expected.keys()
                for key, value in expected.items():
                    torch.testing.assert_close(actual[key], value, msg=f"{name} {call} {key}")


def narrow(layer: FlashAttention, first: int, count: int, kv: tuple[int, int]) -> FlashAttention:
    """Plain weights of some heads, cut out by hand."""
    for name, start, length in (("q_proj", first, count), ("k_proj", *kv), ("v_proj", *kv)):
        rows = slice(start * layer.head_dim, (start + length) * layer.head_dim)
        whole = getattr(layer, name)
        part = nn.Linear(EMBED, length * layer.head_dim, dtype=torch.float64)
        part.weight.data, part.bias.data = whole.weight.data[rows], whole.bias.data[rows]
        setattr(layer, name, part)
    rows = slice(first * layer.head_dim, (first + count) * layer.head_dim)
    layer.out_proj.weight.data = layer.out_proj.weight.data[:, rows]
    return layer


def test_plain_weights_cut_by_hand_sum_to_the_whole_layer() -> None:
    layer = FlashAttention(EMBED, 4, num_kv_heads=2, causal=True, dtype=torch.float64)
    x = torch.randn(2, 7, EMBED, dtype=torch.float64)
    expected = layer(x)
    state = layer.state_dict()
    parts = []
    for rank in range(2):
        part = FlashAttention(EMBED, 4, num_kv_heads=2, causal=True, dtype=torch.float64)
        part.load_state_dict(state)
        parts.append(narrow(part, 2 * rank, 2, (rank, 1))(x))
    torch.testing.assert_close(sum(parts) - layer.out_proj.bias, expected)


@pytest.mark.parametrize(
    ("options", "kv", "message"),
    [
        ({"alibi": True}, (0, 2), "alibi is about 4 heads and q_proj makes 2 of them"),
        ({"sinks": True}, (0, 2), "sinks is about 4 heads and q_proj makes 2 of them"),
        ({}, (0, 4), "q_proj makes 2 of 4 heads and k_proj 4 of 4: shard both"),
        ({}, (0, 1), "q_proj makes 2 of 4 heads and k_proj 1 of 4: shard both"),
    ],
)
def test_which_heads_are_here_is_not_guessed(
    options: dict[str, Any], kv: tuple[int, int], message: str
) -> None:
    layer = narrow(FlashAttention(EMBED, 4, dtype=torch.float64, **options), 0, 2, kv)
    with pytest.raises(ValueError, match=message):
        layer(torch.randn(2, 7, EMBED, dtype=torch.float64))


def test_intervals_of_heads_need_to_know_which_are_here() -> None:
    layer = narrow(FlashAttention(EMBED, 4, dtype=torch.float64), 0, 2, (0, 2))
    x = torch.randn(2, 8, EMBED, dtype=torch.float64)
    with pytest.raises(ValueError, match="attn_mask is about 4 heads and q_proj makes 2 of them"):
        layer(x, attn_mask=intervals(4))
    with pytest.raises(ValueError, match="heads=2 or 1, got one of batch=2 and heads=3"):
        layer(x, attn_mask=intervals(3))
    dense = intervals(2).materialize()
    torch.testing.assert_close(layer(x, attn_mask=intervals(2)), layer(x, attn_mask=dense))


@pytest.mark.parametrize("width", [9, 0, 30])
def test_a_projection_that_makes_no_whole_heads_is_refused(width: int) -> None:
    layer = FlashAttention(EMBED, 4)
    layer.q_proj = nn.Linear(EMBED, 1)
    layer.q_proj.forward = lambda x: x.new_zeros(*x.shape[:-1], width)
    with pytest.raises(ValueError, match=rf"q_proj must make 1 to 4 whole heads .* got {width}"):
        layer(torch.randn(2, 7, EMBED))
