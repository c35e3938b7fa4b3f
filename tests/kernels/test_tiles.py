"""The tile table: every row can be looked up, and head dimensions are covered without waste."""

import functools
import itertools

import pytest
import torch

from flashlayer.backends.triton import tiling
from flashlayer.kernels import tiles
from flashlayer.kernels.tiles import TileConfig, candidates, delta_rows, head_tiles, tile_config
from flashlayer.spec import NO_EXTRAS, AttentionSpec

DTYPES = {"half": 512, "tf32": 256, "fp32": 256, "fp64": 256}  # and their widest head dimension


def is_power_of_two(number: int) -> bool:
    return number & (number - 1) == 0


def test_named_splits() -> None:
    assert head_tiles(96) == (64, 32)
    assert head_tiles(80) == (64, 16)
    assert head_tiles(40) == (32, 16)
    assert head_tiles(192) == (128, 64)
    assert head_tiles(320) == (256, 64)
    for whole in (16, 32, 64, 128, 256, 512):
        assert head_tiles(whole) == (whole,)


def test_no_cover_by_one_or_two_tiles_is_narrower() -> None:
    widths = [16, 32, 64, 128, 256, 512]
    covers = [(a,) for a in widths] + [(a, b) for a, b in itertools.product(widths, widths)]
    for head_dim in range(1, 513):
        tiles = head_tiles(head_dim)
        assert all(is_power_of_two(width) and width >= 16 for width in tiles)
        assert sum(tiles) == min(sum(cover) for cover in covers if sum(cover) >= head_dim)
        # The kernels take the first tile as full: only the last one may be masked.
        assert sum(tiles[:-1]) < head_dim


def check_row(config: TileConfig) -> None:
    assert is_power_of_two(config.BLOCK_M)
    assert is_power_of_two(config.BLOCK_N)
    assert config.num_warps in (4, 8)
    assert config.num_stages >= 1


@pytest.mark.parametrize("mask", ["none", "edges", "dense", "intervals"])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942", "interpreter"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", ["forward", "dkdv", "dq"])
def test_every_head_dimension_has_a_row(kernel: str, dtype: str, target: str, mask: str) -> None:
    for head_dim in range(1, DTYPES[dtype] + 1):
        config = tile_config(kernel, target, dtype, head_dim, mask)
        check_row(config)
        if target != "interpreter":
            assert config in candidates(kernel, dtype)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942", "interpreter"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tangents_have_rows_up_to_half_the_widest_head(dtype: str, target: str) -> None:
    for head_dim in range(1, DTYPES[dtype] // 2 + 1):
        check_row(tile_config("tangents", target, dtype, head_dim))


def test_delta_takes_whole_rows() -> None:
    for value_dim in range(1, 513):
        assert is_power_of_two(delta_rows(value_dim))
        assert delta_rows(value_dim) * value_dim <= 4096


def test_a_gpu_is_asked_once_for_its_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call takes three tiles or more. On the CPU the emulator plays one chip after another."""
    asked: list[torch.device] = []
    capability = (8, 0)

    def ask(device: torch.device) -> tuple[int, int]:
        asked.append(device)
        return capability

    monkeypatch.setattr(tiling, "interpreted", lambda: False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", ask)
    monkeypatch.setattr(tiling, "_capability", functools.cache(tiling._capability.__wrapped__))
    gpu, cpu = torch.device("cuda", 7), torch.device("cpu")
    assert [tiling.target(gpu) for _ in range(3)] == ["sm_80"] * 3
    assert asked == [gpu]
    assert tiling.target(cpu) == "sm_80"
    capability = (9, 0)
    assert tiling.target(cpu) == "sm_90"
    assert tiling.target(torch.device("cuda", 6)) == "sm_90"
    assert tiling.target(gpu) == "sm_80"


def test_a_row_is_looked_up_once_and_in_the_table_of_the_moment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q = torch.empty(1, 1, 1, 64, dtype=torch.float16)
    call = ("forward", q, q, AttentionSpec(1.0), NO_EXTRAS)
    before = tiling.table_tiles(*call)
    asked: list[str] = []
    other = TileConfig(16, 16, 4, 1)
    monkeypatch.setattr(tiles, "tile_config", lambda kernel, *_: asked.append(kernel) or other)
    assert [tiling.table_tiles(*call) for _ in range(3)] == [other] * 3
    assert asked == ["forward"]
    monkeypatch.undo()
    assert tiling.table_tiles(*call) is before
