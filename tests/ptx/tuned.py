"""Runs :func:`flashlayer.tune` on the emulator, and a fresh process that reads what it wrote.

    TRITON_CACHE_DIR=folder python -m tests.ptx.tuned write tiles.json
    TRITON_CACHE_DIR=folder python -m tests.ptx.tuned read tiles.json

Each prints one JSON object. An emulator has no speed: how long a kernel takes is made up.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import flashlayer
from flashlayer import flash_attention, tuning
from flashlayer.backends import triton as backend
from flashlayer.backends.triton import tiling
from flashlayer.kernels import tiles
from tests.ptx.driver import Device, emulated
from tests.ptx.specialized import BACKWARD_FAULTS, SPECIALIZED_FAULTS

HOPPER = "hopper_forward_kernel"
PLAIN = tiles.TileConfig(64, 64, 4, 2)
SPECIALIZED, *_ = tiles.specialized_candidates("forward", 64)
(OFF_BY_ONE,) = (f for f in SPECIALIZED_FAULTS if f.name == "mask comparison off by one")
(WRONG_DQ,) = (f for f in BACKWARD_FAULTS if f.name == "dQ: row of the keys")


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    q = torch.randn(1, 1, 70, 64, dtype=torch.bfloat16)
    return q, *torch.randn(2, 1, 1, 90, 64, dtype=torch.bfloat16)


def short() -> tuple[torch.Tensor, ...]:
    """A tile of it."""
    return tuple(x[:, :, :30] for x in problem())


def tune(
    path: Path | None, hopper_seconds: float, drift: float = 0.0, **options: Any
) -> dict[str, Any]:
    """What ``tune`` chooses where the plain kernel takes a second.

    ``drift`` is added to the lse of later rounds; ``options`` are those of the device.
    """
    run_once = tuning._timed

    def timed(run: Any, device: torch.device) -> tuple[float, Any]:
        before = len(emulator.launches)
        _, (o, lse) = run_once(run, device)
        (launch,) = emulator.launches[before:]
        return hopper_seconds if launch.kernel == HOPPER else 1.0, (o, lse + drift)

    backend.TUNED.clear()
    with (
        emulated(90, **options) as emulator,
        mock.patch.object(tiling, "candidate_tiles", return_value=[PLAIN]),
        mock.patch.object(tiles, "specialized_candidates", return_value=[SPECIALIZED]),
        mock.patch.object(tuning, "ROUNDS", 1),
        mock.patch.object(tuning, "_timed", timed),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always", RuntimeWarning)
        chosen = flashlayer.tune(*problem(), causal=True, backward=False, path=path)
    return {
        "chosen": chosen["forward"],
        "launched": sorted({launch.kernel for launch in emulator.launches}),
        "warnings": [str(w.message) for w in caught if w.category is RuntimeWarning],
    }


def tune_gradients(path: Path) -> dict[str, Any]:
    """What it chooses of a right dK/dV and a wrong dQ, both faster than the plain kernels."""
    run_once = tuning._timed

    def timed(run: Any, device: torch.device) -> tuple[float, Any]:
        before = len(emulator.launches)
        _, found = run_once(run, device)
        ran = [launch.kernel.startswith("hopper") for launch in emulator.launches[before:]]
        return 1.0 - 0.1 * sum(ran), found

    def table(kernel: str, q: torch.Tensor) -> list[Any]:
        return [tiles.tile_config(kernel, "sm_90", "half", q.shape[3])]

    def specialized(kernel: str, head_dim: int) -> list[Any]:
        return [] if kernel == "forward" else offered(kernel, head_dim)[-1:]

    backend.TUNED.clear()
    offered = tiles.specialized_candidates
    with (
        emulated(90, edit=WRONG_DQ.edit([])) as emulator,
        mock.patch.object(tiling, "candidate_tiles", table),
        mock.patch.object(tiles, "specialized_candidates", specialized),
        mock.patch.object(tuning, "ROUNDS", 1),
        mock.patch.object(tuning, "_timed", timed),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always", RuntimeWarning)
        chosen = flashlayer.tune(*short(), path=path)
    return {
        "chosen": {kernel: config["specialized"] for kernel, config in chosen.items()},
        "launched": sorted({launch.kernel for launch in emulator.launches}),
        "warnings": [str(w.message) for w in caught if w.category is RuntimeWarning],
    }


def launched(device: Device, call: Any) -> list[str]:
    before = len(device.launches)
    call()
    return [launch.kernel for launch in device.launches[before:]]


def read(path: Path) -> dict[str, Any]:
    """Which kernel calls take once the file is read."""
    q, k, v = problem()
    options: dict[str, Any] = {"causal": True, "backend": "triton"}
    compiled = torch.compile(
        lambda q, k, v: flash_attention(q, k, v, **options), backend="aot_eager", fullgraph=True
    )
    calls = {
        "alike": lambda: flash_attention(q, k, v, **options),
        "compiled": lambda: compiled(q, k, v),
        "fp16": lambda: flash_attention(q.half(), k.half(), v.half(), **options),
        "softcap": lambda: flash_attention(q, k, v, softcap=3.0, **options),
        "strided": lambda: flash_attention(q.mT.contiguous().mT, k, v, **options),
        "longer": lambda: flash_attention(q.repeat(1, 1, 2, 1), k, v, **options),
    }

    def gradients(expanded: bool) -> None:
        first, *others = short()
        out = flash_attention(first.requires_grad_(), *others, backend="triton")
        out.backward(out.new_ones(1).expand(out.shape) if expanded else torch.ones_like(out))

    calls |= {
        "gradients": lambda: gradients(expanded=False),
        "gradients of a sum": lambda: gradients(expanded=True),
    }
    with emulated(90) as device, mock.patch.object(tuning, "_fastest", side_effect=AssertionError):
        flashlayer.tune(q, k, v, causal=True, backward=False, path=path)
        flashlayer.tune(*short(), path=path)
        return {name: launched(device, call) for name, call in calls.items()}


def main() -> None:
    command, path = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    if command == "read":
        print(json.dumps(read(path)))
        return
    results = {
        "slower": tune(None, 2.0),
        "wrong": tune(None, 0.5, edit=OFF_BY_ONE.edit([])),
        "unstable": tune(None, 0.5, drift=2**-20),
        "faster": tune(path, 0.5),
    }
    print(json.dumps({"forward": results, "gradients": tune_gradients(path)}))


if __name__ == "__main__":
    main()
