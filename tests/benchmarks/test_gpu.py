"""``python -m benchmarks gpu`` on a machine without a GPU: all stages, and what they compile."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_stages, training
from benchmarks.gpu_stages import STAGES
from benchmarks.stages import Context
from tests.ptx.processes import INSTALLED, ROOT, environment, installed

COMMITTED = ROOT / "benchmarks/results/cpu-2-cores"


def test_every_stage_is_rehearsed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "gpu", "--rehearse", "--out", str(tmp_path)]
    process = subprocess.run(
        command, cwd=ROOT, env=environment(tmp_path / "cache"), capture_output=True, text=True
    )
    assert process.returncode == 0, process.stdout + process.stderr
    lines = process.stdout.splitlines()
    assert [text.partition(":")[0] for text in lines[:-1]] == [stage.name for stage in STAGES]
    assert lines[0].startswith("kernels: 6 problems within the accuracy rule, repeated runs")
    records = {s.name: json.loads((tmp_path / f"{s.name}.json").read_text()) for s in STAGES}
    for name, record in records.items():
        assert record["items"], name
        assert record["environment"]["torch"] == torch.__version__
        assert record["left"] == []
    (configuration,) = records["parity"]["items"].values()
    for setting in ("max_steps: 60", "min_fall: 0.2", "n_embd: 768", "precision: bf16-mixed"):
        assert setting in configuration["read"]
    assert "dattn_mask" in records["kernels"]["items"]["every option D96, fp16"]["within_rule"]
    (speed,) = records["speed"]["items"].values()
    assert speed["peers"]["sdpa-flash"]["ratio"]["backward"] > 0
    (tiles,) = records["tiles"]["items"].values()
    assert tiles["chosen"].keys() == {"forward"}
    assert "forward" in tiles["gain"]
    assert len(records["options"]["items"]) == 8
    (found,) = records["tests"]["items"].values()
    assert found["outcomes"].keys() == {"skipped"}
    text = (tmp_path / "gpu.md").read_text()
    for title in ("## Kernels", "## Length", "## Rows for kernels/tiles.py", "## Interval mask"):
        assert title in text


def test_items_of_a_gpu_run_have_names_of_their_own(tmp_path: Path) -> None:
    counts = {}
    for stage in STAGES:
        names = [name for name, _ in stage.items(Context("cuda", tmp_path))]
        assert len(set(names)) == len(names), stage.name
        counts[stage.name] = len(names)
    assert counts == {
        "kernels": 12,
        "speed": 16,
        "tiles": 16,
        "parity": 1,
        "options": 16,
        "memory": 12,
        "tests": 2,
        "sanitizer": 1,
    }


SLEEPERS = """
import time, pytest

pytestmark = getattr(pytest.mark, "gpu")  # so that this file is not taken for one of them

@pytest.mark.parametrize("index", range(40))
def test_sleep(index):
    time.sleep(0.25)
    assert index != 0
"""


@pytest.mark.parametrize("rehearsed", [True, False], ids=["alone", "side_by_side"])
def test_tests_are_counted_until_the_time_is_over(tmp_path: Path, rehearsed: bool) -> None:
    (tmp_path / "test_sleepers.py").write_text(SLEEPERS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    program = f"""
import time
from benchmarks import gpu_stages, stages
gpu_stages.ROOT = gpu_stages.Path({str(tmp_path)!r})
device = {"cpu" if rehearsed else "cuda"!r}
context = stages.Context(device, gpu_stages.ROOT, time.monotonic() + 3)
print(gpu_stages.json.dumps(gpu_stages._tests("test_sleepers.py", context)))
"""
    process = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environment(tmp_path / "cache"),
        capture_output=True,
        text=True,
    )
    found = json.loads(process.stdout.splitlines()[-1])
    assert found["stopped"]
    assert found["outcomes"].get("passed", 0) < 39
    assert found["outcomes"]["failed"] == 1
    assert found["error"].endswith("failed: test_sleepers.py::test_sleep[0]")


def tuned(head_dim: int, warps: int, **more: Any) -> dict[str, Any]:
    tiles = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": warps, "num_stages": 2} | more
    gain = {"forward": 1.1, "backward": 1.2, "both": 1.15 + warps / 100}
    return {"case": {"head_dim": head_dim}, "chosen": {"forward": tiles, "dq": tiles}, "gain": gain}


def test_the_tiles_that_most_cells_choose_are_printed_as_rows() -> None:
    results = {
        "a": tuned(128, 8, descriptors=True),
        "b": tuned(128, 4, descriptors=False),
        "c": tuned(128, 8, descriptors=True),
        "d": tuned(64, 4, descriptors=False),
    }
    stage = next(stage for stage in STAGES if stage.name == "tiles")
    rows = "{64: (128, 64, 4, 2), 128: (128, 64, 8, 2) descriptors}"
    assert stage.line(results) == (
        f'4 cells, tuned x1.21 (up to 1.23), "forward": {rows}, "dq": {rows}'
    )
    assert stage.page is not None
    page = "\n".join(stage.page(results))
    assert "| dq | 128 | (128, 64, 8, 2) descriptors | 2 |" in page
    assert "- b: forward 1.10, backward 1.20, both 1.19" in page


def test_tuning_cells_take_a_millisecond_and_fill_the_chip() -> None:
    cases = gpu_stages.tiling_cases(rehearsal=False)
    assert len(cases) == len(gpu_stages.speed_cases(rehearsal=False)) == 16
    for case in cases:
        assert case.forward_flops <= 2 * gpu_stages.TUNING_FLOPS
        assert case.batch * case.heads * case.seqlen // 128 >= 512
    assert (cases[0].seqlen, cases[0].causal) == (8192, True)


def test_a_finished_proof_is_read(tmp_path: Path) -> None:
    found = gpu_stages.parity_result(COMMITTED / "parity", tmp_path)
    assert found["verdict"] == "pass"
    assert "error" not in found
    stage = next(stage for stage in STAGES if stage.name == "parity")
    assert stage.line({"GPT-2 small": found}).startswith("pass: largest loss gap 2.4e-06, of the")
    assert (tmp_path / "parity_metrics.csv").stat().st_size > 1000
    folder = tmp_path / "failed"
    folder.mkdir()
    for path in (COMMITTED / "parity").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"verdict": "fail"}))
    assert gpu_stages.parity_result(folder, tmp_path)["error"] == "the verdict is fail"


def test_memory_grows_with_the_length_and_a_step_has_its_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = next(stage for stage in STAGES if stage.name == "memory")
    rows = {
        f"{n}": {"peer": "flashlayer", "length": n, "extra_bytes": 2**20 + 100 * n}
        for n in (1000, 2000, 4000)
    }
    monkeypatch.setattr(training, "in_fresh_process", lambda function, *args: function(*args))
    setup = training.Setup(training.GPTConfig(n_layer=1), (32,), 32, 2**30, rounds=1)
    step = gpu_stages.step_at(setup, 32, torch.device("cpu"))
    assert "error" not in step
    text = stage.line(rows | {"training at 32": step})
    assert text.startswith("4 cells; 1 MiB at 4,000 tokens; extra memory = 1.0 MiB + 100 bytes a ")
    assert "; context 32, batch 1: flash " in text
    monkeypatch.setattr(training, "ARMS", ("flash", "sdpa"))
    monkeypatch.setitem(training.SETUPS, "cpu", setup)
    one_step, losses = training.one_step, iter((1.0, 2.0))
    monkeypatch.setattr(
        training, "one_step", lambda *args: one_step(*args) | {"loss": next(losses)}
    )
    assert gpu_stages.step_at(setup, 32, torch.device("cpu"))["error"] == "losses differ by 1"


def test_without_a_gpu_it_says_how_to_rehearse(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "there is no CUDA device; --rehearse goes" in capsys.readouterr().err


def test_carried_wheels_bring_what_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("carried", "typing_extensions"):
        with zipfile.ZipFile(tmp_path / f"{name}-99.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}.py", "answer = 42\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONPATH", "")
    folder = tmp_path / "unpacked"
    gpu.unpack(tmp_path, str(folder))
    assert [path.name for path in folder.iterdir()] == ["carried.py"]
    program = "import carried; print(carried.answer)"
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert child.stdout == "42\n"
    assert sys.path[-1] == str(folder)


def ahead(folder: Path, triton: str, *options: str) -> dict[str, Any]:
    process = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.ahead", *options],
        cwd=ROOT,
        env=environment(folder, triton),
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    *lines, found = process.stdout.splitlines()
    found = json.loads(found)
    for name, group in found["groups"].items():
        assert group["done"] == group["calls"] > 0
        assert group["failed"] == []
        assert f"{name} {group['calls']} of {group['calls']} calls after " in lines[-1]
    return found


def test_a_call_finds_its_kernels_compiled(tmp_path: Path) -> None:
    found = ahead(tmp_path / "cache", INSTALLED, "--groups", "speed", "--first", "1")
    assert found["groups"]["speed"]["calls"] == 1
    assert found["compiled"] == 4  # forward, delta, dK/dV, dQ
    assert found["anew"] == {"S=2,048 D=128 causal": 0}


@pytest.mark.slow
@pytest.mark.parametrize("triton", ["3.6.0", "3.7.1"])
def test_every_kernel_of_the_stages_is_compiled_ahead(triton: str, tmp_path: Path) -> None:
    which = INSTALLED if triton == version("triton") else triton
    if which != INSTALLED:
        try:
            installed(triton)
        except OSError as error:
            pytest.skip(f"Triton {triton} can't be installed: {error}")
    found = ahead(tmp_path / "cache", which, "--groups", "kernels", "speed", "options")
    assert found["triton"] == triton
    assert len(found["anew"]) == 12 + 16 + 16
    assert not any(found["anew"].values()), found["anew"]
    # The candidates of the causal cells, D 128 and 64, the warp-specialised kernel last of each.
    found = ahead(tmp_path / "cache", which, "--groups", "tiles", "--first", "134")
    assert found["groups"]["tiles"]["calls"] == 134
