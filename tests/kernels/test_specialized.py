"""Which calls the warp-specialised kernels take. How they run is in ``tests/ptx``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flashlayer.backends.triton import specialized, tiling
from flashlayer.problem import build_problem

KERNELS = ("forward", "dkdv", "dq")
Tensors = tuple[Tensor, Tensor, Tensor]


def tensors(
    dtype: torch.dtype = torch.bfloat16, q: int = 40, k: int = 50, dim: int = 64, dv: int = 64
) -> Tensors:
    return (
        torch.randn(2, 4, q, dim, dtype=dtype),
        torch.randn(2, 2, k, dim, dtype=dtype),
        torch.randn(2, 2, k, dv, dtype=dtype),
    )


def reason(tensors: Tensors, **options: Any) -> str | None:
    return specialized.refuses(*build_problem(*tensors, **options))


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "target", lambda device: "sm_90")


def transposed(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize(
    ("call", "options"),
    [
        (tensors(), {}),
        (tensors(torch.float16, dim=128, dv=128), {"causal": True}),
        (tensors(q=300, k=20), {"causal": True}),
        (tensors(), {"window_size": (None, 3), "diagonal": "top_left"}),
        ((*map(transposed, tensors()),), {"scale": 0.3}),
    ],
)
def test_calls_that_it_takes(hopper: None, call: Tensors, options: dict[str, Any]) -> None:
    assert reason(call, **options) is None
    problem = build_problem(*call, **options)
    turns = {
        kernel: {tiles.takes_turns for tiles in specialized.candidate_tiles(kernel, problem)}
        for kernel in KERNELS
    }
    assert turns == {"forward": {False, True}, "dkdv": {False}, "dq": {False}}


MISALIGNED = torch.zeros(2 * 4 * 40 * 64 + 1, dtype=torch.bfloat16)[1:].view(2, 4, 40, 64)


@pytest.mark.parametrize(
    ("call", "options", "expected"),
    [
        (tensors(torch.float32), {}, "float16 and bfloat16, got torch.float32"),
        (tensors(dim=96, dv=96), {}, "head dimensions (64, 128), got 96 and 96"),
        (tensors(dv=128), {}, "head dimensions (64, 128), got 64 and 128"),
        (tensors(), {"window_size": (3, 0)}, "no option but causal"),
        (tensors(), {"softcap": 2.0}, "no option but causal"),
        (tensors(), {"alibi_slopes": torch.rand(4)}, "no option but causal"),
        (tensors(), {"sinks": torch.rand(4)}, "no option but causal"),
        (tensors(), {"dropout_p": 0.1, "dropout_seed": 1}, "no option but causal"),
        (tensors(), {"attn_mask": torch.ones(40, 50, dtype=torch.bool)}, "no option but causal"),
        (tensors(), {"scale": -1.0}, "positive scales, got -1.0"),
        (tensors(), {"scale": 0.0}, "positive scales, got 0.0"),
        ((MISALIGNED, *tensors()[1:]), {}, "multiples of 16 bytes"),
        (
            (tensors()[0].mT.contiguous().mT, *tensors()[1:]),
            {},
            "contiguous rows",
        ),
        ((tensors()[0], *(x[:1, :1].expand(2, 2, 50, 64) for x in tensors()[1:])), {}, "TMA needs"),
        (tensors(k=0), {}, "TMA needs"),
    ],
)
def test_calls_that_it_leaves_to_the_plain_kernel(
    hopper: None, call: Tensors, options: dict[str, Any], expected: str
) -> None:
    found = reason(call, **options)
    assert found is not None
    assert expected in found
    problem = build_problem(*call, **options)
    assert all(specialized.candidate_tiles(kernel, problem) == [] for kernel in KERNELS)


def test_gradients_that_they_leave_to_the_plain_kernels(hopper: None) -> None:
    problem = build_problem(*tensors())
    do = torch.randn_like(problem.query)
    assert specialized.refuses_backward(do, *problem) is None
    expanded = do.new_ones(1).expand(do.shape)  # the gradient of a sum
    assert "TMA needs a gradient" in str(specialized.refuses_backward(expanded, *problem))
    many = torch.empty(1, device="meta").bfloat16().expand(2, 2**15, 2**15, 64)
    call = specialized.refuses_backward(many, many, many, many, *problem[3:])
    assert "32-bit" in str(call)


def test_no_other_chip_and_no_triton_that_it_does_not_know(
    hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiling, "triton_version", lambda: (3, 10))
    assert "knows Gluon as of Triton 3.6 to 3.9" in str(reason(tensors()))
    monkeypatch.undo()
    assert "compute capability 9.0" in str(reason(tensors()))
