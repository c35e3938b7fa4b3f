"""Processes of one run: what they return, raise and leave behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from train import RunError, UsageError
from train.running.ranks import in_ranks


def summed(number: int) -> tuple[int, int, int]:
    """Printed by every rank, and summed over them."""
    dist.init_process_group("gloo")
    total = torch.tensor(number + dist.get_rank())
    dist.all_reduce(total)
    print(f"rank {dist.get_rank()}", flush=True)
    return int(total), dist.get_rank(), torch.get_num_threads()


def failing(kind: str) -> None:
    """Rank 1 ends early; rank 0 waits for it, and notices or not."""
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        if kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise {"mistake": UsageError("a mistake"), "bug": TypeError("a bug")}[kind]
    dist.barrier()


def killed_late() -> None:
    """Rank 1 loses the connection and ends before rank 0 is killed."""
    if os.environ["RANK"] == "1":
        raise RuntimeError("gloo/transport/tcp/pair.cc: Connection closed by peer")
    time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGKILL)


def waiting(folder: Path) -> None:
    """Say who is there, and wait for the end."""
    folder.joinpath(os.environ["RANK"]).write_text(str(os.getpid()))
    time.sleep(1000)


def test_ranks_meet_and_rank_0_returns(capfd: pytest.CaptureFixture[str]) -> None:
    total, rank, threads = in_ranks(3, summed, 5)
    assert (total, rank) == (5 + 6 + 7, 0)
    assert threads == max(1, torch.get_num_threads() // 3)
    assert capfd.readouterr() == ("rank 0\n", "")
    assert "RANK" not in os.environ


def test_one_rank_is_this_process() -> None:
    assert in_ranks(1, os.getpid) == os.getpid()


def test_a_failure_is_the_first_ranks(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="a mistake"):
        in_ranks(2, failing, "mistake")
    with pytest.raises(TypeError, match="a bug") as caught:
        in_ranks(2, failing, "bug")
    (note,) = caught.value.__notes__
    assert note.startswith("On rank 1:")
    assert "in failing" in note
    with pytest.raises(RunError, match="rank 1 of 2 was ended by SIGKILL"):
        in_ranks(2, failing, "killed")
    assert capfd.readouterr() == ("", "")


def test_a_kill_is_the_cause_of_a_lost_connection() -> None:
    with pytest.raises(RunError, match=r"^rank 0 of 2 was ended by SIGKILL"):
        in_ranks(2, killed_late)


def gone(folder: Path, seconds: float) -> bool:
    """Whether the processes that ``waiting`` noted end in time."""
    pids = [int(path.read_text()) for path in folder.iterdir()]
    deadline = time.monotonic() + seconds
    while any(psutil.pid_exists(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def wait_for(folder: Path, ranks: int) -> None:
    deadline = time.monotonic() + 60
    while len(list(folder.iterdir())) < ranks:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ctrl_c_ends_every_rank(tmp_path: Path) -> None:
    def press() -> None:
        wait_for(tmp_path, 2)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        in_ranks(2, waiting, tmp_path)
    thread.join()
    assert gone(tmp_path, 5)


def test_no_rank_outlives_a_killed_parent(tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    program = (
        "from pathlib import Path; from tests.train.running.test_ranks import waiting; "
        f"from train.running.ranks import in_ranks; in_ranks(2, waiting, Path({str(tmp_path)!r}))"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=root)
    wait_for(tmp_path, 2)
    parent.kill()
    parent.wait()
    assert gone(tmp_path, 5)
