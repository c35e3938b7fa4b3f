import json
from pathlib import Path

from benchmarks.__main__ import main as dispatch
from benchmarks.context import Problem, measure_hops, predictions
from benchmarks.processes import run_group
from benchmarks.scaling import Layer


def test_memory_and_traffic_of_a_small_ring(tmp_path: Path) -> None:
    sizes = ["--ranks", "2", "4", "--calls", "ring", "--length", "4096", "--rounds", "0"]
    assert dispatch(["context", *sizes, "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "context.json").read_text())
    two, four = results["calls"]
    # 4 kv heads of 64, fp32: the messages of N - 1 hops, and as many and N of their sums.
    message = 4 * 1024 * 2 * 64 * 4
    assert two["sent_bytes"] == two["formula_bytes"] == [2 * message, 6 * message]
    assert four["sent_bytes"] == four["formula_bytes"] == [3 * message, 7 * message]
    # Half, and what the libraries take whatever the length.
    assert 0.4 * two["extra_bytes"] < four["extra_bytes"] < 0.7 * two["extra_bytes"]
    assert "| ring | 4 |" in (tmp_path / "context.md").read_text()
    assert (tmp_path / "context_memory.png").stat().st_size > 10_000


def test_the_parts_of_a_ring_are_timed(tmp_path: Path) -> None:
    problem = Problem(Layer(4, 2, 16, itemsize=4), length=256, window=64, rounds=1)
    for parts in run_group(measure_hops, 2, tmp_path, problem):
        for phase in predictions(parts, 2):
            assert 0 < phase["compute"] <= phase["overlapped"] <= phase["one_by_one"]
            assert phase["measured"] > 0


def test_predictions_are_made_of_the_parts() -> None:
    parts = {"own": [4, 10], "other": [3, 8], "messages": [1, 2], "ring": [11, 30]}
    forward, backward = predictions(parts, 3)
    assert forward == {
        "compute": 10, "transfer": 2, "overlapped": 10, "one_by_one": 12, "measured": 11
    }  # fmt: skip
    assert backward == {
        "compute": 26, "transfer": 8, "overlapped": 28, "one_by_one": 34, "measured": 30
    }  # fmt: skip
