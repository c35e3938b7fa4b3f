"""Addresses past 2^31 elements, by strides over memory that is reserved and never filled."""

import mmap

import pytest
import torch

from flashlayer.spec import AttentionSpec
from tests.kernels.reference import DEVICE, draw, run_kernels

# A stride that fits 32 bits and indices that do, whose product doesn't: 2 * STRIDE > 2^31. Cut to
# 32 bits it points as far before the tensor: START elements lie there, so that it reads zeros.
START = 2**31
STRIDE = 2**30 + 16
SIZE = 3


@pytest.fixture
def reserved() -> torch.Tensor:
    """A flat fp16 tensor of 2^32 elements and some; only the pages that are touched exist."""
    size = 2 * (START + SIZE * STRIDE)
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        pytest.skip(f"this machine does not reserve {size >> 30} GiB of address space")
    return torch.frombuffer(memory, dtype=torch.float16)


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU has no memory to reserve: see test_gpu.py")
@pytest.mark.parametrize("far_dim", ["batch", "heads", "seqlen_q", "head_dim"])
@pytest.mark.parametrize("name", ["q", "k", "v", "do"])
def test_a_stride_beyond_int32(name: str, far_dim: str, reserved: torch.Tensor) -> None:
    sizes = {"batch": 1, "heads": 1, "seqlen_q": 1, "head_dim": 1, far_dim: SIZE}
    x = draw(**sizes, dtype=torch.float16)
    strides = [STRIDE if size == SIZE else 1 for size in sizes.values()]
    far = reserved.as_strided(x.q.shape, strides, START)
    far.copy_(getattr(x, name))
    spec = AttentionSpec(0.5, None, 0)
    expected = run_kernels(x, spec)
    for result_name, result in run_kernels(x._replace(**{name: far}), spec).items():
        assert torch.equal(result, expected[result_name]), result_name
