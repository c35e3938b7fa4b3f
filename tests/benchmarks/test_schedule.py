"""The model of the order in which programs start."""

from unittest import mock

import pytest

from benchmarks import codegen, schedule


def test_share_of_the_chip() -> None:
    assert schedule.share([3, 2, 1], holds=2) == 1.0
    assert schedule.share([1, 2, 3], holds=2) == 0.75  # 1 and 3 on one, 2 on the other
    assert schedule.share([2.0], holds=4) == 0.25


@pytest.mark.parametrize(
    ("together", "order"),
    [(1, [2, 1, 2, 1, 2, 1]), (2, [2, 1, 2, 2, 1, 1]), (3, [2, 2, 2, 1, 1, 1])],
)
def test_order(together: int, order: list[float]) -> None:
    """That of ``program_coordinates``: an incomplete group of heads comes first."""
    assert schedule.in_order([2, 1], 3, together) == order


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    tiles = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2, "blocks_per_sm": 2}
    compiled = [{"kernel": name} | tiles for name in ("forward_kernel", "delta_kernel")]
    with mock.patch.object(codegen, "run_cases", return_value=compiled):
        assert schedule.main(["--tokens", "4096"]) == 0
    *_, row, _ = capsys.readouterr().out.splitlines()
    # 512 programs of 32 blocks: head by head the last head's heaviest block starts late.
    assert row == "| forward_kernel | 128 | 4096 | 16 | 512 | 264 | 0.61 | 0.89 |"
