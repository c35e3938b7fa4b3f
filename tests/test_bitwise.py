"""What ``docs/graphs.md`` says is bitwise equal."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from flashlayer import flash_attention, flash_attention_varlen
from tests.test_accuracy import device_for

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# (batch, heads, kv heads, length, head_dim, causal)
SHAPES = [(2, 2, 1, 130, 16, True), (3, 2, 2, 70, 64, False), (2, 4, 1, 17, 16, True)]
PARTS = ("out", "dq", "dk", "dv")


def tensors(shape: tuple, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Query, key, value and the gradient of ``out``."""
    batch, heads, kv_heads, length, head_dim, _ = shape
    torch.manual_seed(length)
    sizes = [(batch, h, length, head_dim) for h in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(size).to(device, dtype) for size in sizes]


def results(attend: Callable[..., Tensor], *xs: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in xs[:3]]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, xs[3])]


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    for name, a, e in zip(PARTS, actual, expected, strict=False):
        assert torch.equal(a, e), name


def case(backend: str, dtype: torch.dtype) -> str:
    """The device, where there is one for this dtype."""
    device = device_for(backend)
    if backend == "triton" and device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter has no bf16")
    return device


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The alignment of a thread's scratch memory in ATen's kernel changes the bits of its sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# The interpreter takes seconds a call.
ROWS = [
    *(("triton", torch.float32, shape) for shape in SHAPES),
    *(("triton", dtype, SHAPES[2]) for dtype in FLOATS[1:]),
    *itertools.product(("aten", "tiled", "standard"), FLOATS, SHAPES),
]


@pytest.mark.parametrize(("backend", "dtype", "shape"), ROWS)
def test_rows_do_not_depend_on_the_batch(
    backend: str, dtype: torch.dtype, shape: tuple, one_thread: None
) -> None:
    """``tiled`` at sizes whose tiles are the same in both calls."""
    xs = tensors(shape, dtype, case(backend, dtype))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attention(q, k, v, causal=shape[-1], backend=backend)

    whole = results(attend, *xs)
    # The products of short bf16 gradients are chosen by the rows of the whole batch.
    parts = 1 if backend == "aten" and dtype == torch.bfloat16 else 4
    for entry in range(shape[0]):
        alone = results(attend, *(x[entry : entry + 1] for x in xs))
        assert_equal(alone[:parts], [x[entry : entry + 1] for x in whole])
    group = shape[1] // shape[2]
    for head in range(shape[2]):
        heads = slice(head * group, (head + 1) * group), slice(head, head + 1)
        alone = results(attend, *(xs[i][:, heads[i in (1, 2)]] for i in range(4)))
        mine = [x[:, heads[i > 1]] for i, x in enumerate(whole)]
        assert_equal(alone[:parts], mine)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("backend", ["triton", "aten", "tiled"])
def test_packed_is_a_call_for_each_sequence(backend: str, dtype: torch.dtype, causal: bool) -> None:
    device = case(backend, dtype)
    lengths = (70, 1, 40)
    apart = [tensors((1, 4, 2, length, 16, causal), dtype, device) for length in lengths]
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0)

    def packed(xs: list[Tensor]) -> Tensor:
        return torch.cat([x[0].transpose(0, 1) for x in xs])

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        options = {"causal": causal, "backend": backend}
        return flash_attention_varlen(q, k, v, cu_seqlens_q=cu_seqlens, **options)

    together = results(attend, *map(packed, zip(*apart, strict=True)))
    alone = [
        results(lambda *qkv: flash_attention(*qkv, causal=causal, backend=backend), *xs)
        for xs in apart
    ]
    assert_equal(together, list(map(packed, zip(*alone, strict=True))))


@pytest.mark.parametrize("dtype", FLOATS)
def test_chunked_prefill_is_the_whole(dtype: torch.dtype) -> None:
    """On Triton, also in pieces of one query where the keys are not split."""
    q, k, v, _ = tensors((1, 4, 2, 150, 16, True), dtype, case("triton", dtype))
    edges = (0, 37, 140, 149, 150)
    pieces = [
        flash_attention(q[:, :, i:j], k[:, :, :j], v[:, :, :j], causal=True, backend="triton")
        for i, j in itertools.pairwise(edges)
    ]
    whole = flash_attention(q, k, v, causal=True, backend="triton")
    assert torch.equal(torch.cat(pieces, dim=2), whole)
