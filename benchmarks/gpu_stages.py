"""The stages of ``python -m benchmarks gpu``, in order of worth."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure, peers, report, training
from benchmarks.cases import DTYPES, SUITES, Case, draw
from benchmarks.gpu_problems import PROBLEMS, check
from benchmarks.peers import OURS
from benchmarks.report import MIB
from benchmarks.stages import Context, Item, Result, Stage
from flashlayer import tune

ROOT = Path(__file__).parent.parent
ROUNDS = 5


def kernel_items(context: Context) -> Iterator[Item]:
    """Every kernel in both half precisions; a rehearsal's would run in fp32 for bf16."""
    for name, make in PROBLEMS.items():
        for dtype in ("fp16",) if context.rehearsal else ("bf16", "fp16"):
            yield f"{name}, {dtype}", partial(check, make, DTYPES[dtype], context)


def _kernel_line(results: dict[str, Result]) -> str:
    return f"{len(results)} problems within the accuracy rule, repeated runs bitwise equal"


def _kernel_page(results: dict[str, Result]) -> list[str]:
    rows = [
        report.row([name, ", ".join(x["within_rule"]), str(x["bitwise_equal_runs"])])
        for name, x in results.items()
    ]
    header = report.row(["runs on this chip", "within the accuracy rule", "bitwise equal runs"])
    return ["## Kernels", "", header, report.row(["---"] * 3), *rows, ""]


def measured(case: Case, names: list[str], context: Context, rounds: int = ROUNDS) -> Result:
    """One cell; ``error`` if a result of ours is off by more than the rule allows."""
    device = torch.device(context.device)
    limit = 2**30
    if device.type == "cuda":
        limit = torch.cuda.get_device_properties(device).total_memory // 3
    cell = measure.measure(case, names, rounds, limit, device)
    share = cell["peers"][OURS]["error_over_bound"]
    wrong = {"error": f"an error of {share:.2f} times its bound"} if share > 1 else {}
    return cell | wrong


def speed_cases(rehearsal: bool) -> list[Case]:
    """Causal and full at D 128 and 64, from 2,048 tokens on."""
    if rehearsal:
        return [replace(SUITES["smoke"].in_dtypes(["bf16"])[0], seqlen=48)]
    cases = [
        case
        for case in SUITES["full"].in_dtypes()
        if case.group == "length" and case.seqlen >= 2048 and case.head_dim in (64, 128)
    ]
    return sorted(cases, key=lambda case: (not case.causal, -case.head_dim))


def speed_items(context: Context) -> Iterator[Item]:
    """Against SDPA pinned to its two fast kernels."""
    names = [OURS, "sdpa-flash", "sdpa-cudnn"]
    for case in speed_cases(context.rehearsal):
        yield f"{case.name} {case.dtype}", partial(measured, case, names, context)


def _speed_line(results: dict[str, Result]) -> str:
    cells = _as_cells(results)
    parts = [f"{len(cells)} cells"]
    for phase in ("forward", "backward"):
        for name in ("sdpa-flash", "sdpa-cudnn"):
            ratios = [
                c["peers"][name]["ratio"][phase] for c in cells if "ratio" in c["peers"][name]
            ]
            if ratios:
                spread = f"({min(ratios):.2f} to {max(ratios):.2f})"
                parts.append(f"{name} x{statistics.median(ratios):.2f} {spread} {phase}")
        shares = [report.share_of_matmul(cell, OURS, phase) or 0.0 for cell in cells]
        parts.append(f"up to {max(shares):.0%} of matmul {phase}")
    return ", ".join(parts)


def _as_cells(results: dict[str, Result]) -> list[dict[str, Any]]:
    """Cells as :mod:`benchmarks.report` takes them, of what JSON made of them."""
    cells = []
    for result in results.values():
        fields = dict(result["case"])
        if fields["lengths"] is not None:
            fields["lengths"] = tuple(fields["lengths"])
        cells.append(result | {"case": Case(**fields)})
    return cells


def _cell_page(results: dict[str, Result]) -> list[str]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for cell in _as_cells(results):
        groups.setdefault(cell["case"].group, []).append(cell)
    lines = [
        "Milliseconds are flashlayer's; other numbers are a peer's time over flashlayer's.",
        "",
    ]
    for group, cells in groups.items():
        lines += report.group_table(group, cells)
    return lines


# A forward pass that takes some 0.7 ms on an H200: far more than a launch, and all candidates of a
# cell are timed in ten seconds.
TUNING_FLOPS = 3e11


def tiling_cases(rehearsal: bool) -> list[Case]:
    """The cells of the speed stage, each as small as the candidates' times allow."""
    if rehearsal:
        return [Case("length", "fp64", 1, heads=1, seqlen=20, head_dim=16, backward=False)]
    cases = []
    for case in speed_cases(rehearsal):
        while case.forward_flops > TUNING_FLOPS and case.batch > 1:
            case = replace(case, batch=case.batch // 2)
        while case.forward_flops > TUNING_FLOPS and case.heads > 4:
            case = replace(case, heads=case.heads // 2)
        cases.append(case)
    order = (8192, 2048, 16384, 4096)
    return sorted(cases, key=lambda case: (order.index(case.seqlen), not case.causal))


def tiling_items(context: Context) -> Iterator[Item]:
    """The fastest tiles of each cell, by ``flashlayer.tune``."""
    for case in tiling_cases(context.rehearsal):
        yield case.name, partial(_tiles, case, context)


def _tiles(case: Case, context: Context) -> Result:
    """The speed before and after, each against the same peer, and what was chosen."""
    q, k, v, *_ = draw(case, torch.device(context.device))
    peer = "sdpa-flash"
    before = measured(case, [OURS, peer], context)
    path = context.out / "tuned.json"
    if not context.rehearsal:  # forward alone first: should the time end here, it is in the file
        tune(q, k, v, causal=case.causal, backward=False, path=path)
    chosen = tune(q, k, v, causal=case.causal, backward=case.backward, path=path)
    after = measured(case, [OURS, peer], context)
    gains = {
        phase: after["peers"][peer]["ratio"][phase] / before["peers"][peer]["ratio"][phase]
        for phase in before["peers"][peer].get("ratio", {})
    }
    wrong = {"error": after["error"]} if "error" in after else {}
    cells = {"before": before, "after": after}
    return {"case": case, "chosen": chosen, "gain": gains} | cells | wrong


def winners(results: dict[str, Result]) -> dict[str, dict[int, Counter[str]]]:
    """How many cells chose which tiles, by kernel and head dimension, as rows of the table."""
    found: dict[str, dict[int, Counter[str]]] = {}
    for result in results.values():
        for kernel, tiles in result["chosen"].items():
            main = tuple(tiles[n] for n in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"))
            others = [n for n, x in tiles.items() if x is True]
            row = " ".join([str(main), *others])
            by_dim = found.setdefault(kernel, {})
            by_dim.setdefault(result["case"]["head_dim"], Counter())[row] += 1
    return found


def _tiling_line(results: dict[str, Result]) -> str:
    gains = [x["gain"]["both"] for x in results.values() if "both" in x["gain"]]
    parts = [f"{len(results)} cells"]
    if gains:
        parts.append(f"tuned x{statistics.median(gains):.2f} (up to {max(gains):.2f})")
    for kernel, by_dim in winners(results).items():
        rows = (f"{dim}: {rows.most_common(1)[0][0]}" for dim, rows in sorted(by_dim.items()))
        parts.append(f'"{kernel}": {{{", ".join(rows)}}}')
    return ", ".join(parts)


def _tiling_page(results: dict[str, Result]) -> list[str]:
    lines = ["## Rows for kernels/tiles.py", "", report.row(["kernel", "D", "tiles", "cells"])]
    lines.append(report.row(["---"] * 4))
    for kernel, by_dim in winners(results).items():
        for dim, rows in sorted(by_dim.items()):
            lines += [report.row([kernel, str(dim), r, str(n)]) for r, n in rows.most_common()]
    lines += ["", "Speed after `flashlayer.tune` over that with the table:", ""]
    for name, result in results.items():
        gains = (f"{phase} {gain:.2f}" for phase, gain in result["gain"].items())
        lines.append(f"- {name}: {', '.join(gains) or 'no peer to compare with'}")
    return [*lines, ""]


# Of the training proof at GPT-2 small's size.
PARITY = {
    "name": "parity_gpu_short",
    "trainer.max_steps": "60",
    "trainer.val_check_interval": "20",
    "trainer.limit_val_batches": "2",
    "model.warmup_steps": "20",
    "data.max_bytes": "6000000",
    "parity.arms": "{standard: standard, flash: flash, control: control}",
    "parity.rule.min_fall": "0.2",
    "parity.speed_rounds": "5",
    "parity.layer.lengths": "[2048]",
}
PARITY_NEEDS = ("lightning", "datasets", "jsonargparse", "tokenizers", "matplotlib", "psutil")


def parity_items(context: Context) -> Iterator[Item]:
    """GPT-2 small, 60 steps, with flash and with standard attention."""
    yield "GPT-2 small", partial(_parity, context)


def _parity(context: Context) -> Result:
    missing = [name for name in PARITY_NEEDS if find_spec(name) is None]
    if missing:
        return {"skipped": f"lacks {', '.join(missing)} (--wheels brings datasets, jsonargparse)"}
    options = [text for name, value in PARITY.items() for text in (f"--{name}", value)]
    command = [sys.executable, "-m", "train", "parity", "--config", "configs/parity_gpu.yaml"]
    # In a rehearsal the configuration is only read: the run itself takes minutes on a CPU.
    options += ["--print_config"] if context.rehearsal else []
    process = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
    print(process.stdout, process.stderr, sep="\n", flush=True)
    if process.returncode not in ((0,) if context.rehearsal else (0, 1)):
        raise RuntimeError(f"status {process.returncode}: {process.stderr.strip()[-300:]}")
    if context.rehearsal:
        return {"read": process.stdout}
    return parity_result(ROOT / "runs" / PARITY["name"], context.out)


def parity_result(folder: Path, out: Path) -> Result:
    """What a run of the proof found; its curves and its report are copied to ``out``."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    for name in ("metrics.csv", "report.md", "loss_gap.png"):
        shutil.copy(folder / name, out / f"parity_{name}")
    kept = ("verdict", "rule", "flash_gap", "control_gap", "speed", "arms")
    wrong = {} if summary["verdict"] == "pass" else {"error": "the verdict is fail"}
    return {name: summary[name] for name in kept} | wrong


def _parity_line(results: dict[str, Result]) -> str:
    (found,) = results.values()
    if "read" in found:
        return "the configuration is valid"
    gaps = [found[name]["max"] for name in ("flash_gap", "control_gap")]
    return (
        f"{found['verdict']}: largest loss gap {gaps[0]:.1e}, of the control {gaps[1]:.1e}; steps "
        f"{found['speed']['flash_over_standard']:.2f} times as fast as with standard attention"
    )


def option_items(context: Context) -> Iterator[Item]:
    """Everything but plain attention by length, against all peers that can."""
    device = torch.device(context.device)
    suite = "smoke" if context.rehearsal else "full"
    names = [n for n in peers.names(device, suite) if n not in (peers.AGAIN, *peers.QUADRATIC)]
    for case in option_cases(context.rehearsal):
        yield f"{case.group}: {case.name} {case.dtype}", partial(measured, case, names, context)


def option_cases(rehearsal: bool) -> list[Case]:
    """The cells of the suite's other groups; windows last, whose peer FlexAttention is compiled."""
    cases = SUITES["smoke" if rehearsal else "full"].in_dtypes(["bf16"])
    return sorted(
        (c for c in cases if c.group != "length"), key=lambda case: case.group == "window"
    )


def _option_line(results: dict[str, Result]) -> str:
    best: dict[str, list[float]] = {}
    for cell in _as_cells(results):
        last = "both" if cell["case"].backward else "forward"
        ratios = [x["ratio"][last] for n, x in cell["peers"].items() if n != OURS and "ratio" in x]
        if ratios:
            best.setdefault(cell["case"].group, []).append(min(ratios))
    parts = (f"{group} x{statistics.median(ratios):.2f}" for group, ratios in best.items())
    return f"{len(results)} cells; the best peer's time over ours: {', '.join(parts)}"


MEMORY_LENGTHS = {
    OURS: (4096, 16384, 65536, 262144, 524288),
    "sdpa-flash": (16384, 262144),
    peers.STANDARD: (4096, 16384),
}
MEMORY_CASE = Case("memory", "bf16", batch=1, heads=4, seqlen=4096, head_dim=128)
TRAINING_CONTEXTS = (8192, 65536, 1024)


def memory_items(context: Context) -> Iterator[Item]:
    """One layer's memory by length, then a training step of GPT-2 small by context."""
    device = torch.device(context.device)
    lengths = {OURS: (64,)} if context.rehearsal else MEMORY_LENGTHS
    for peer, its_lengths in lengths.items():
        for length in its_lengths:
            yield f"{peer} {length:,}", partial(_memory, peer, length, device)
    for tokens in () if context.rehearsal else TRAINING_CONTEXTS:
        yield f"training at {tokens:,}", partial(step_at, training.SETUPS["cuda"], tokens, device)


def _memory(peer: str, length: int, device: torch.device) -> Result:
    (row,) = measure.memory_by_length(MEMORY_CASE, {peer: [length]}, device)
    return row


def step_at(setup: training.Setup, tokens: int, device: torch.device) -> Result:
    """A training step; ``error`` if the arms' losses disagree."""
    cell = training.measure_context(setup, tokens, device)
    wrong = {"error": f"losses differ by {cell['loss_gap']:.2g}"}
    return cell | (wrong if cell["loss_gap"] > cell["loss_bound"] else {})


def _memory_line(results: dict[str, Result]) -> str:
    rows = [x for x in results.values() if x.get("peer") == OURS]
    parts = [f"{len(results)} cells"]
    if rows:
        longest = max(rows, key=lambda row: row["length"])
        parts.append(f"{longest['extra_bytes'] / MIB:,.0f} MiB at {longest['length']:,} tokens")
    if len(rows) > 2:
        columns = ([row[n] for row in rows] for n in ("length", "extra_bytes"))
        parts.append(report.fit_line(measure.fit_line(*columns)))
    cells = [training.cell_line(x) for x in results.values() if "arms" in x]
    return "; ".join([*parts, *cells])


def test_items(context: Context) -> Iterator[Item]:
    """The tests marked ``gpu``, a file an item."""
    files = sorted(
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tests").rglob("test_*.py")
        if "mark.gpu" in path.read_text(encoding="utf-8")
    )
    for name in files[:1] if context.rehearsal else files:
        yield name, partial(_tests, name, context)


class _Outcomes:
    """A pytest plugin that counts, and ends the session at the deadline."""

    def __init__(self, context: Context) -> None:
        self.context, self.counts, self.failed = context, Counter(), []

    def pytest_sessionstart(self, session: Any) -> None:
        self.session = session

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
        if report.failed:
            self.failed.append(report.nodeid)
        if self.context.seconds_left <= 0:
            # pytest-xdist's session is another object.
            session = self.session.config.pluginmanager.get_plugin("dsession") or self.session
            session.shouldstop = "the end of the stage's time"


def _tests(name: str, context: Context) -> Result:
    """The tests of a file, side by side: most of their time is the compiler's."""
    import pytest

    outcomes = _Outcomes(context)
    arguments = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
    if find_spec("xdist") is not None and not context.rehearsal:
        arguments += ["-n", str(max(1, min(8, (os.cpu_count() or 1) // 2)))]
    status = pytest.main([*arguments, str(ROOT / name)], plugins=[outcomes])
    stopped = context.seconds_left <= 0
    fine = (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
    wrong = {}
    if outcomes.failed or (status not in fine and not stopped):
        wrong = {"error": f"{status!r}, failed: {', '.join(outcomes.failed[:5])}"}
    return {"outcomes": dict(outcomes.counts), "stopped": stopped} | wrong


def _test_line(results: dict[str, Result]) -> str:
    total: Counter[str] = Counter()
    for result in results.values():
        total.update(result["outcomes"])
    return ", ".join(f"{count} {outcome}" for outcome, count in total.items()) or "no test"


def sanitizer_items(context: Context) -> Iterator[Item]:
    """Every kernel once under CUDA's memory checker."""
    yield "memcheck", partial(_sanitize, context)


def _sanitize(context: Context) -> Result:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"skipped": "compute-sanitizer is not on the PATH"}
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/kernels/test_gpu.py"]
    command = [tool, "--tool", "memcheck", "--error-exitcode", "1", *tests, "-k", "memory_check"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(process.stdout, process.stderr, sep="\n", flush=True)
    if process.returncode:
        raise RuntimeError(f"status {process.returncode}: {process.stdout.strip()[-500:]}")
    return {"last_line": process.stdout.strip().splitlines()[-1]}


def _sanitizer_line(results: dict[str, Result]) -> str:
    return next(iter(results.values()))["last_line"]


STAGES = (
    Stage("kernels", 60, 20, kernel_items, _kernel_line, _kernel_page),
    Stage("speed", 90, 20, speed_items, _speed_line, _cell_page),
    Stage("tiles", 90, 40, tiling_items, _tiling_line, _tiling_page),
    Stage("parity", 170, 100, parity_items, _parity_line),
    Stage("options", 90, 20, option_items, _option_line, _cell_page),
    Stage("memory", 100, 30, memory_items, _memory_line),
    Stage("tests", 120, 30, test_items, _test_line),
    Stage("sanitizer", 80, 40, sanitizer_items, _sanitizer_line),
)
