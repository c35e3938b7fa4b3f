"""Lengths and head counts that change compile nothing anew, through Triton's real JIT path."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from tests.ptx.processes import ROOT, environment


def test_a_kernel_is_compiled_once_for_each_set_of_options(tmp_path) -> None:
    """Over 300 lengths; but for a float mask, whose rows are aligned for vector loads or not."""
    process = subprocess.run(
        [sys.executable, "-m", "tests.ptx.compilations"],
        cwd=ROOT,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    for sweep, kernels in json.loads(process.stdout).items():
        expected = 2 if "float mask" in sweep else 1
        room = "hopper_" if sweep == "sm_90 specialized" else ""
        named = {f"{room}{name}_kernel" for name in ("forward", "dkdv", "dq")}
        assert named | {"delta_kernel"} <= kernels.keys()
        for kernel, count in kernels.items():
            assert count == (1 if kernel == "delta_kernel" else expected), (sweep, kernel)
