"""The tile table: every row can be looked up, and head dimensions are covered without waste."""

import itertools

import pytest

from flashlayer.kernels.tiles import TileConfig, candidates, delta_rows, head_tiles, tile_config

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
