"""ATen's kernel under each CPU capability it is compiled for: its exponential, and the suites."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flashlayer import flash_attention
from flashlayer.backends import aten
from flashlayer.backends.aten import kernel
from flashlayer.testing import assert_attention_close, aten_exponential
from flashlayer.testing.bounds import EXPONENTIALS, UNIT

ROOT = Path(__file__).parents[1]
CAPABILITY = torch.backends.cpu.get_cpu_capability()

# CPU features that each capability needs.
NEEDS = {"DEFAULT": (), "AVX2": ("avx2", "fma3"), "AVX512": ("avx512_f", "avx512_bw", "avx512_vl")}

# The suites that test the aten backend, and a selection of those tests. Folding heads is left out:
# it only reshapes tensors, and takes half of the time.
SUITES = (
    "tests/test_capabilities.py",
    "tests/test_accuracy.py",
    "tests/test_aten.py",
    "tests/test_aten_masks.py",
    "tests/test_nan.py",
    "tests/test_property.py",
    "tests/integrations/flash_attn",
    "tests/integrations/test_sdpa.py",
)
SELECTION = (
    "(aten or capabilities or accuracy_in_lower_precision or autocast)"
    " and not triton and not tiled and not folded and not other_capability"
)
SELECTED_MIN = 350  # fewer selected tests would mean that SELECTION no longer matches their names


@pytest.mark.parametrize("capability", EXPONENTIALS)
def test_the_suites_hold_under_any_other_capability(capability: str) -> None:
    """ATen reads ATEN_CPU_CAPABILITY once a process, so each capability needs its own."""
    if capability == CAPABILITY:
        pytest.skip(f"{capability} is what this process runs under")
    if CAPABILITY not in EXPONENTIALS:
        pytest.skip(f"this build of torch is compiled for {CAPABILITY}")
    has = torch.cpu.get_capabilities()
    lacking = [name for name in NEEDS[capability] if not has.get(name, False)]
    if lacking:
        pytest.skip(f"{capability} needs {', '.join(lacking)}, which this CPU lacks")
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env |= {"ATEN_CPU_CAPABILITY": capability.lower(), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    result = subprocess.run(
        [*command, *SUITES, "-k", SELECTION],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None, result.stdout[-2000:]
    assert int(passed[1]) >= SELECTED_MIN


def test_the_capability_is_the_one_asked_for() -> None:
    assert os.environ.get("ATEN_CPU_CAPABILITY", CAPABILITY).upper() == CAPABILITY


def forward(x: Tensor) -> tuple[Tensor, Tensor]:
    """For each x: exp(0) and exp(x) over their sum, and lse; the other keys have no weight."""
    k = torch.full((len(x), 1, 32, 2), -1e4)
    k[:, 0, :2] = 0
    k[:, 0, 1, 0] = x
    v = torch.zeros_like(k)
    v[:, 0, 0, 0] = v[:, 0, 1, 1] = 1
    q = torch.ones(len(x), 1, 1, 2)
    out, lse = kernel._FLASH(q, k, v, scale=1.0)
    return out[:, 0, 0], lse[:, 0, 0]


def error(actual: Tensor, x: Tensor) -> Tensor:
    expected = x.double().exp()
    return ((actual.double() - expected) / expected).abs()


def test_the_exponential_of_the_forward_pass_is_as_far_off_as_the_bound_says() -> None:
    """Measured where the sum rounds to 1, so that the output is exp(x) itself."""
    exp = aten_exponential(torch.float32)
    x = -18 - 62 * torch.rand(200_000)
    out, _ = forward(x)
    assert (out[:, 0] == 1).all()
    share = error(out[:, 1], x) / (exp.forward + exp.forward_slope * x.abs())
    assert 0.9 < share.max() <= 1
    # Nearer to 0 as a ratio of two rounded numbers.
    x = -18 * torch.rand(200_000)
    out, lse = forward(x)
    ratio = out[:, 1].double() / out[:, 0].double()
    assert (error(ratio, x) <= exp.forward + exp.forward_slope * x.abs() + 2.01 * UNIT).all()
    exact = torch.log1p(x.double().exp())
    assert ((lse - exact).abs() <= exp.forward + (2 + exact) * UNIT).all()


def test_the_exponential_of_the_backward_pass_is_as_far_off_as_the_bound_says() -> None:
    """One query, dO = 1 and lse = 0: then dV is exp(score)."""
    k = -87 * torch.rand(1, 1, 200_000, 1)
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    _, _, dv = backward(one, one, k, torch.zeros_like(k), zero, zero[..., 0], 0.0, False, scale=1.0)
    share = error(dv, k) / aten_exponential(torch.float32).backward
    assert 0.6 < share.max() <= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_exponential_of_half_precision_is_as_far_off_as_the_bound_says(
    dtype: torch.dtype,
) -> None:
    """Measured through lse, in fp32, as the sum of one exp(0) and 31 exp(x)."""
    x = (-3 * torch.rand(200_000)).to(dtype)
    k = x.view(-1, 1, 1, 1).repeat(1, 1, 32, 1)
    k[:, :, 0] = 0
    _, lse = kernel._FLASH(torch.ones_like(k[:, :, :1]), k, torch.zeros_like(k), scale=1.0)
    exact = torch.log(1 + 31 * x.double().exp())
    exp = aten_exponential(dtype)
    found = (lse.flatten() - exact).abs()
    # A sum of 32 numbers in vectors of 8 or more has up to 6 roundings, lse two more.
    assert (found <= exp.forward + exp.forward_slope * x.abs() + (6 + 2 * exact) * UNIT).all()
    if exp.forward > 100 * UNIT:
        assert found.max() > 0.8 * exp.forward


@pytest.mark.parametrize("what", ["out", "lse", "gradients"])
def test_the_bound_of_aten_catches_a_small_error(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of 1e-5, a few ten times that of the exponential."""
    flash_forward, flash_backward = aten.flash_forward, aten.flash_backward

    def forward_off(*args: Any) -> tuple[Tensor, Tensor]:
        out, lse = flash_forward(*args)
        return out * (1 + 1e-5 * (what == "out")), lse + 1e-5 * (what == "lse")

    def backward_off(*args: Any) -> tuple[Tensor, ...]:
        return tuple(x * (1 + 1e-5 * (what == "gradients")) for x in flash_backward(*args))

    q, k, v = (torch.randn(1, 2, 63, 40) for _ in range(3))
    assert_attention_close("aten", q, k, v, causal=True)
    monkeypatch.setattr(aten, "flash_forward", forward_off)
    monkeypatch.setattr(aten, "flash_backward", backward_off)
    with pytest.raises(AssertionError, match="elements are off by more than"):
        assert_attention_close("aten", q, k, v, causal=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("heads", "seqlen_q", "seqlen_k", "options"),
    [
        (2, 63, 64, {}),
        (2, 64, 63, {}),
        (2, 64, 64, {}),
        (2, 64, 64, {"causal": True}),
        (4, 65, 600, {}),
        (8, 16, 64, {}),  # folded: 64 rows for each kv head
        (2, 200, 200, {"window_size": (70, 9)}),
        (2, 130, 150, {"causal": True}),
        (2, 800, 100, {}),
    ],
)
def test_half_precision_needs_no_packing_for_units_that_the_capability_lacks(
    dtype: torch.dtype, heads: int, seqlen_q: int, seqlen_k: int, options: dict[str, Any]
) -> None:
    """On a CPU with AMX the kernel raises "pack_vnni2 is only supported when ..." below AVX-512."""
    q = torch.randn(1, heads, seqlen_q, 64, dtype=dtype)
    k, v = (torch.randn(1, 2, seqlen_k, 64, dtype=dtype) for _ in range(2))
    assert_attention_close("aten", q, k, v, with_noise=True, **options)
    out, lse = flash_attention(q, k, v, backend="aten", return_lse=True, **options)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
