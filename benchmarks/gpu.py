"""Everything that needs a GPU, in the minutes that there are: the stages in order of worth.

    python -m benchmarks gpu --minutes 13
    python -m benchmarks gpu --rehearse
    python -m benchmarks gpu --wheels wheels

Each stage has a box of time, a process of its own and a JSON in ``--out``, written after each
measurement, so that a run that is cut off loses one measurement, and a crash the one that did it.
Each ends with one line. ``gpu.md`` holds the lines and tables so far.

Without a network, ``--wheels FOLDER`` on another machine first downloads what the training proof
needs beyond torch and the usual packages; put the folder into the checkout as ``wheels``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Iterable
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_stages import ROOT, STAGES
from benchmarks.stages import (
    GRACE_SECONDS,
    Context,
    Stage,
    end_group,
    failures,
    good,
    line,
    run_stage,
    save,
)

# Seconds that a stage waits for its kernels at most; what is missing then it compiles itself.
COMPILE_WAIT = 30.0
# What a machine with torch and the packages around it (pyarrow, pandas, lightning) may still lack.
WHEELS = (
    "datasets",
    "dill",
    "multiprocess",
    "jsonargparse",
    "docstring-parser",
    "typeshed-client",
)


def main(argv: list[str]) -> int:
    """Run the stages; 1 if one of them failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks gpu", description=str(__doc__).partition("\n")[0]
    )
    usual = sum(stage.seconds for stage in STAGES) / 60
    parser.add_argument(
        "--minutes", type=float, default=usual, help=f"for all stages together ({usual:.0f})"
    )
    parser.add_argument(
        "--stages", nargs="+", choices=[stage.name for stage in STAGES], help="only these"
    )
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<device>")
    parser.add_argument(
        "--jobs",
        type=int,
        default=max(1, (os.cpu_count() or 2) - 2),
        help="processes that compile; 0: each stage compiles for itself",
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="every stage on the CPU, at toy size"
    )
    parser.add_argument(
        "--wheels", type=Path, metavar="FOLDER", help="only download packages into this folder"
    )
    args = parser.parse_args(argv)
    if args.wheels is not None:
        return download(args.wheels)
    if not args.rehearse and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --rehearse goes through all stages on the CPU")
    if args.rehearse:
        # Before the processes of the stages start: their kernels run in Triton's interpreter.
        os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        out, device = args.out or Path("runs/gpu-rehearsal"), "cpu"
    else:
        out, device = args.out or ROOT / "benchmarks/results" / slug(), "cuda"
    out.mkdir(parents=True, exist_ok=True)
    # End the stage's process, which leads a session of its own, before this one.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    multiprocessing.get_context("forkserver").set_forkserver_preload(["benchmarks.gpu_stages"])
    stages = [stage for stage in STAGES if args.stages is None or stage.name in args.stages]
    with tempfile.TemporaryDirectory() as packages:
        unpack(ROOT / "wheels", packages)
        compiler = None
        if device == "cuda" and args.jobs:
            compiler = Compiler(target(), args.jobs, out / "compile.json")
        try:
            return run(stages, Context(device, out), 60 * args.minutes, compiler)
        finally:
            if compiler is not None:
                print(compiler.line(), flush=True)
                compiler.end()


def run(
    stages: Iterable[Stage], context: Context, seconds: float, compiler: Compiler | None = None
) -> int:
    """Run stages in ``seconds``; 1 if something failed.

    A stage gets its usual seconds, all of them stretched alike where there is more time than that,
    or what is left. One that would get less than its least is not begun.
    """
    stages = list(stages)
    deadline = time.monotonic() + seconds
    stretch = max(1.0, seconds / sum(stage.seconds for stage in stages))
    lines, pages, failed, device = [], [], [], context.device
    for stage in stages:
        if compiler is not None:
            compiler.wait(stage.name, min(COMPILE_WAIT, deadline - time.monotonic()))
        left = deadline - time.monotonic() - GRACE_SECONDS
        if left < stage.least:
            lines.append(
                f"{stage.name}: skipped, {max(0.0, left):.0f} s are left and it takes "
                f"{stage.least:.0f}"
            )
        else:
            record = run_stage(stage, context, min(left, stage.seconds * stretch))
            failed += [f"{stage.name}: {failure}" for failure in failures(record)]
            try:
                pages += stage.page(good(record)) if stage.page else []
                lines.append(line(stage, record))
            except Exception as error:  # the stages behind it are worth more than its line
                lines.append(f"{stage.name}: no line, {type(error).__name__}: {error}")
                failed += [lines[-1], traceback.format_exc()]
            device = record.get("environment", {}).get("device", device)
        print(lines[-1], flush=True)
        said = [*lines, *([] if compiler is None else [compiler.line()])]
        text = "\n".join([f"# What ran on {device}", "", *(f"- {x}" for x in said), "", *pages])
        (context.out / "gpu.md").write_text(text, encoding="utf-8")
    print(f"{len(failed)} failures; {context.out / 'gpu.md'}", *failed, sep="\n  ", flush=True)
    return int(bool(failed))


class Compiler:
    """The processes that compile while the first stages run."""

    def __init__(self, target: str, jobs: int, out: Path, *more: str) -> None:
        """Start them; ``more`` are options of :mod:`benchmarks.gpu_compile`."""
        self.out = out.resolve()
        save(self.out, {"groups": {}})
        options = ["--target", target, "--jobs", str(jobs), "--out", str(self.out), *more]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks", "gpu_compile", *options],
            cwd=ROOT,
            start_new_session=True,
        )

    @property
    def groups(self) -> dict[str, dict[str, Any]]:
        """How far each group is."""
        return json.loads(self.out.read_text(encoding="utf-8"))["groups"]

    def wait(self, group: str, seconds: float) -> None:
        """Until the kernels of a stage are compiled; at most ``seconds``."""
        limit = time.monotonic() + seconds
        while time.monotonic() < limit and self.process.poll() is None:
            groups = self.groups
            if groups and (group not in groups or groups[group]["done"] == groups[group]["calls"]):
                return
            time.sleep(0.2)

    def line(self) -> str:
        """What was compiled so far, and how long it took."""
        parts = [
            f"{name} {x['done']} of {x['calls']} calls after {x.get('after_seconds', 0):.0f} s, "
            f"{len(x['failed'])} kernels failed"
            for name, x in self.groups.items()
        ]
        status = self.process.poll()
        ended = f"; it ended with status {status}" if status else ""
        return f"compile: {', '.join(parts) or 'nothing'}{ended}"

    def end(self) -> None:
        """Stop, whatever is left."""
        end_group(self.process.pid)
        self.process.wait()
        self.out.with_suffix(".unfinished").unlink(missing_ok=True)


def slug() -> str:
    """The device's name as a folder's."""
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def target() -> str:
    """The compile target of the device."""
    return "sm_{}{}".format(*torch.cuda.get_device_capability())


def unpack(wheels: Path, folder: str) -> None:
    """Pure Python wheels of what is not installed, for this process and its children."""
    # A wheel's name has "_" for "-" and ends at its first "-".
    installed = {re.sub(r"[-.]+", "_", x.name).lower() for x in distributions() if x.name}
    missing = [
        wheel
        for wheel in wheels.glob("*-none-any.whl")
        if wheel.name.partition("-")[0].lower() not in installed
    ]
    for wheel in missing:
        zipfile.ZipFile(wheel).extractall(folder)
    if missing:
        sys.path.append(folder)
        paths = (os.environ.get("PYTHONPATH"), folder)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))


def download(folder: Path, python: str = "3.12") -> int:
    """Fetch :data:`WHEELS`, for Linux on x86-64; they are pure Python and need each other alone."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    options = ["--only-binary=:all:", "--python-version", python, "--platform", "any"]
    constraints = ["-c", str(ROOT / "constraints.txt"), "--dest", str(folder)]
    status = subprocess.run([*command, *options, *constraints, *WHEELS]).returncode
    size = sum(path.stat().st_size for path in folder.glob("*.whl"))
    print(f"{folder}: {size / 2**20:.1f} MiB")
    return status
