import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import attention, measure, peers, report
from benchmarks.__main__ import COMMANDS
from benchmarks.__main__ import main as dispatch
from benchmarks.cases import SUITES, Case, draw

CPU = torch.device("cpu")
PLAIN = Case("length", "fp32", batch=2, heads=2, seqlen=40, head_dim=16)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("attention")
    arguments = ["--device", "cpu", "--suite", "smoke", "--rounds", "1", "--out", str(folder)]
    assert dispatch(["attention", *arguments]) == 0
    return folder


def test_every_case_of_the_suite_is_measured_against_every_peer(results: Path) -> None:
    written = json.loads((results / "attention.json").read_text())
    assert len(written["cells"]) == len(SUITES["smoke"].in_dtypes())
    for cell in written["cells"]:
        assert set(cell["peers"]) == set(peers.names(CPU, "smoke"))
        for result in cell["peers"].values():
            assert result["forward"] > 0
            assert ("backward" in result["ratio"]) is cell["case"]["backward"]
            assert result["error_over_bound"] < 1
        assert cell["peers"][peers.OURS]["ratio"]["forward"] == 1
        assert cell["matmul_flops"] > 1e8
    assert written["machine"]["torch"] == torch.__version__


def test_the_page_and_the_plots_are_there(results: Path) -> None:
    page = (results / "attention.md").read_text()
    for title in ("Length", "GQA", "Window", "Varlen", "Padding mask", "Decode", "Memory"):
        assert f"## {title}\n" in page
    assert "`sdpa-again` is SDPA once more" in page
    for name in ("speed", "matmul_share", "memory"):
        assert (results / f"{name}.png").stat().st_size > 10_000


def test_what_no_time_is_left_for_is_named(tmp_path: Path) -> None:
    arguments = ["--suite", "smoke", "--groups", "GQA", "--minutes", "0", "--out", str(tmp_path)]
    assert attention.main(arguments) == 0
    assert "- GQA: S=32 D=16 heads 2:1 causal fp32" in (tmp_path / "attention.md").read_text()


@pytest.mark.parametrize(
    ("case", "pairs"),
    [
        (replace(PLAIN, causal=False), 2 * 40 * 40),
        (PLAIN, 2 * 40 * 40 / 2),
        (replace(PLAIN, window=3), 2 * 40 * 4),
        (replace(PLAIN, seqlen=1, seqlen_k=40), 2 * 40),
        (replace(PLAIN, seqlen=10, seqlen_k=40), 2 * (10 * 30 + 10 * 10 / 2)),
        (replace(PLAIN, lengths=(40, 10), packed=True), (40**2 + 10**2) / 2),
        (replace(PLAIN, lengths=(40, 10), causal=False), 40 * (40 + 10)),
    ],
    ids=["full", "causal", "window", "decode", "chunk", "packed", "padded"],
)
def test_work_is_counted_as_what_is_seen(case: Case, pairs: float) -> None:
    assert case.pairs == pairs
    assert case.forward_flops == 4 * pairs * 2 * 16


@pytest.mark.parametrize("suite", SUITES)
def test_suites_have_no_case_twice(suite: str) -> None:
    cases = SUITES[suite].in_dtypes()
    assert len(set(cases)) == len(cases)
    assert len({(case.group, case.dtype, case.batch, case.name) for case in cases}) == len(cases)


@pytest.mark.parametrize(
    "case",
    [
        PLAIN,
        replace(PLAIN, window=3),
        replace(PLAIN, lengths=(40, 10), packed=True),
        replace(PLAIN, lengths=(40, 10), causal=False),
        replace(PLAIN, causal=False, mask="bool"),
        replace(PLAIN, causal=False, mask="float"),
        replace(PLAIN, mask="documents"),
    ],
    ids=["plain", "window", "packed", "padded", "bool_mask", "float_mask", "documents"],
)
def test_a_wrong_result_is_seen(case: Case) -> None:
    """Off by a hundredth in one gradient of one visible key."""
    inputs = draw(case, CPU)
    judge = measure.Judge(case, inputs)
    runner = peers.prepare(peers.OURS, case, inputs, memory_limit=2**30)
    out = runner.forward()
    tensors = (out.detach(), *runner.backward(out))
    assert judge.error(peers.OURS, *tensors) < 1
    if case.packed:
        tensors[2][42] += 0.01  # the second sequence starts at 40
    else:
        tensors[2][judge.entry, 0, 2] += 0.01
    assert judge.error(peers.OURS, *tensors) > 1


def test_a_peer_that_would_fill_the_memory_is_refused_with_the_size() -> None:
    case = replace(PLAIN, seqlen=2**16)
    with pytest.raises(peers.Refused, match=r"its scores need about 320\.0 GiB"):
        peers.prepare(peers.STANDARD, case, draw(PLAIN, CPU), memory_limit=2**34)


def test_a_line_is_fitted() -> None:
    fit = measure.fit_line([100, 200, 400], [1100, 2100, 4100])
    assert fit["bytes_per_token"] == pytest.approx(10)
    assert fit["base_bytes"] == pytest.approx(100)
    assert fit["worst_residual"] == pytest.approx(0, abs=1e-9)
    assert 0.9 < fit["exponent"] < 1


def test_the_scatter_is_what_tells_a_peer_from_itself() -> None:
    def cell(sdpa: float, again: float) -> dict[str, Any]:
        peers_ = {peers.DEFAULT: {"ratio": {"both": sdpa}}, peers.AGAIN: {"ratio": {"both": again}}}
        return {"peers": peers_}

    line = str(report.scatter_line([cell(1.0, 1.0), cell(0.5, 0.51), cell(2.0, 1.8)]))
    assert "by 2.0% in the median of 3 numbers, by more than 3% in 1 of them and by 10%" in line
    assert report.scatter_line([{"peers": {peers.DEFAULT: {"ratio": {"both": 1.0}}}}]) is None


def test_an_unknown_command_is_answered_with_the_known_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert dispatch(["speed"]) == 2
    message = capsys.readouterr().err
    assert all(name in message for name in COMMANDS)
