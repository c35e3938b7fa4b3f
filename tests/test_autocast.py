"""``torch.autocast`` casts the inputs and reaches no arithmetic: bitwise what cast inputs give."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from flashlayer import AuxRequest, flash_attention, flash_attention_varlen, masks
from flashlayer.backends import BACKENDS, split_keys
from flashlayer.distributed import ring_attention, ulysses_attention
from flashlayer.integrations.weights import attention_weights
from tests.test_accuracy import device_for

H, SQ, SK, D = 4, 19, 23, 16
DTYPE = torch.bfloat16
NONE: dict[str, Any] = {}
OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": dict,
    "causal": lambda: {"causal": True},
    "window": lambda: {"window_size": (5, 2)},
    "bool mask": lambda: {"attn_mask": torch.rand(2, 1, SQ, SK) > 0.3},
    "float mask": lambda: {"attn_mask": torch.randn(1, H, SQ, SK, requires_grad=True)},
    "interval mask": lambda: {"attn_mask": masks.documents(torch.arange(SQ) // 6)},
    "softcap": lambda: {"softcap": 2.0},
    "alibi": lambda: {"alibi_slopes": torch.rand(H)},
    "sinks": lambda: {"sinks": torch.randn(H, requires_grad=True)},
    "dropout": lambda: {"dropout_p": 0.3, "dropout_seed": 5},
}


def autocast(device: str = "cpu", *, enabled: bool = True) -> Any:
    return torch.autocast(device, dtype=DTYPE, enabled=enabled)


def draw(*, keys: int = SK, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Large enough scores that a rounding to bf16 shows in the log-sum-exp."""
    q, k, v = (
        torch.randn(2, h, s, D, device=device) * 2
        for h, s in ((H, SQ), (H // 2, keys), (H // 2, keys))
    )
    return q, k, v


def leaves(tensors: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(x.detach().to(dtype).requires_grad_() for x in tensors)


def assert_same(actual: Any, expected: Any) -> None:
    """Results in one dtype, gradients of fp32 inputs the fp32 of those of the cast inputs."""
    assert len(actual) == len(expected)
    for index, (x, y) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(x.double(), y.double()), (
            f"{index}: off by {(x.double() - y.double()).abs().max()}"
        )


def results_and_gradients(
    attend: Callable[..., Any],
    inputs: tuple[Tensor, ...],
    more: tuple[Tensor, ...] = (),
    *,
    forward: Any = None,
    backward: Any = None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Of all results and all inputs, each pass in a context of its own."""
    with forward or nullcontext():
        results = attend(*inputs)
    generator = torch.Generator(inputs[0].device).manual_seed(1)
    grads = [torch.randn(x.shape, generator=generator, device=x.device).to(x) for x in results]
    with backward or nullcontext():
        return results, torch.autograd.grad(results, (*inputs, *more), grads)


def check(
    attend: Callable[..., Any], tensors: tuple[Tensor, ...], more: tuple[Tensor, ...] = ()
) -> None:
    """Results and gradients under autocast; the backward pass outside of it, and inside."""
    device = tensors[0].device.type
    expected = results_and_gradients(attend, leaves(tensors, DTYPE), more)
    for inside in (False, True):
        actual = results_and_gradients(
            attend,
            leaves(tensors, torch.float32),
            more,
            forward=autocast(device),
            backward=autocast(device, enabled=inside),
        )
        for x, y in zip(actual[0], expected[0], strict=True):
            assert x.dtype == y.dtype
        assert_same(actual[0], expected[0])
        assert_same(actual[1], expected[1])


def on(device: str, options: dict[str, Any]) -> tuple[dict[str, Any], tuple[Tensor, ...]]:
    """The options there, and those with a gradient."""
    moved: dict[str, Any] = {}
    for name, x in options.items():
        moved[name] = x
        if isinstance(x, Tensor):
            moved[name] = x.detach().to(device).requires_grad_(x.requires_grad)
        elif hasattr(x, "to"):
            moved[name] = x.to(device)
    with_gradient = (x for x in moved.values() if isinstance(x, Tensor) and x.requires_grad)
    return moved, tuple(with_gradient)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_results_and_gradients_are_those_of_cast_inputs(backend: str, name: str) -> None:
    device = device_for(backend)
    options, more = on(device, OPTIONS[name]())
    if backend == "aten" and set(options) & {"softcap", "alibi_slopes", "sinks", "dropout_p"}:
        pytest.skip("refused by ATen's kernel")
    tensors = draw(keys=SQ if name == "interval mask" else SK, device=device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return flash_attention(q, k, v, return_lse=True, backend=backend, **options)

    check(attend, tensors, more)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences(backend: str) -> None:
    device = device_for(backend)
    edges = torch.tensor([0, 7, 7, SQ], device=device)
    tensors = tuple(x[0].transpose(0, 1) for x in draw(keys=SQ, device=device))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
        options: Any = {"cu_seqlens_q": edges, "causal": True, "return_lse": True}
        return flash_attention_varlen(q, k, v, backend=backend, **options)

    check(attend, tensors)


@pytest.mark.parametrize("backend", ["tiled", "standard"])
def test_numbers_from_inside_the_softmax(backend: str) -> None:
    request = AuxRequest(lse=True, entropy=True)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
        out, aux = flash_attention(q, k, v, causal=True, return_aux=request, backend=backend)
        return out, aux.lse, aux.entropy

    check(attend, draw())


def test_largest_scores() -> None:
    request = AuxRequest(max_scores=True, entropy=True)
    q, k, v = draw()
    for backend in ("triton", "tiled", "standard"):
        inputs = [x.to(device_for(backend)) for x in (q, k, v)]
        cast = [x.to(DTYPE) for x in inputs]
        _, expected = flash_attention(*cast, return_aux=request, backend=backend)
        with autocast(device_for(backend)):
            _, actual = flash_attention(*inputs, return_aux=request, backend=backend)
        assert_same(actual[1:], expected[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["triton", "aten", "tiled"])
def test_only_the_backward_pass_is_under_autocast(backend: str, dtype: torch.dtype) -> None:
    """The inputs were not cast, so neither is anything of their gradients."""
    device = device_for(backend)
    mask = torch.randn(1, 1, SQ, SK, dtype=dtype, device=device, requires_grad=True)
    inputs = leaves(draw(device=device), dtype)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return flash_attention(q, k, v, attn_mask=mask, return_lse=True, backend=backend)

    expected = results_and_gradients(attend, inputs, (mask,))
    actual = results_and_gradients(attend, inputs, (mask,), backward=autocast(device))
    assert_same(actual[1], expected[1])


def test_a_planned_call_is_the_same() -> None:
    """Inputs already in bf16 have a plan, which enters the backend without the checks."""
    q, k, v = (x.to(DTYPE) for x in draw())
    expected = flash_attention(q, k, v, softcap=2.0, return_lse=True)
    with autocast():
        for _ in range(2):
            assert_same(flash_attention(q, k, v, softcap=2.0, return_lse=True), expected)


@pytest.mark.parametrize("backend", ["aten", "tiled"])
@pytest.mark.parametrize("transform", ["double backward", "forward mode", "vmap", "grad of vmap"])
def test_transforms(transform: str, backend: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return flash_attention(q, k, v, causal=True, return_lse=True, backend=backend)

    def loss(*tensors: Tensor) -> Tensor:
        return sum((x.float().sin().sum() for x in attend(*tensors)), torch.zeros(()))

    def transformed(*tensors: Tensor) -> Any:
        if transform == "forward mode":
            seed = torch.Generator().manual_seed(2)
            directions = tuple(torch.randn(x.shape, generator=seed).to(x) for x in tensors)
            primals, tangents = torch.func.jvp(attend, tensors, directions)
            return *primals, *tangents
        if transform == "double backward":
            inputs = tuple(x.detach().requires_grad_() for x in tensors)
            grads = torch.autograd.grad(loss(*inputs), inputs, create_graph=True)
            penalty = sum((x.float().square().sum() for x in grads), torch.zeros(()))
            return torch.autograd.grad(penalty, inputs)
        batched = torch.func.vmap(lambda *x: attend(*(y[None] for y in x)))
        if transform == "vmap":
            return batched(*tensors)

        def sums(*x: Tensor) -> Tensor:
            return sum((y.float().sin().sum() for y in batched(*x)), torch.zeros(()))

        return torch.func.grad(sums, argnums=(0, 1, 2))(*tensors)

    tensors = draw()
    # Tangents and cotangents are drawn or rounded in the inputs' dtype: of bf16 numbers, the same.
    rounded = tuple(x.to(DTYPE).float() for x in tensors)
    if transform == "forward mode":
        rounded = tuple(x.to(DTYPE) for x in tensors)
    expected = transformed(*(x.to(DTYPE) for x in tensors))
    with autocast():
        actual = transformed(*rounded)
    assert_same(actual, expected)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("backend", ["aten", "tiled", "standard"])
def test_compiled_graphs(backend: str, compiler: str) -> None:
    torch.compiler.reset()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return flash_attention(q, k, v, causal=True, return_lse=True, backend=backend)

    def inside(q: Tensor, k: Tensor, v: Tensor) -> Any:
        with autocast():
            return attend(q, k, v)

    tensors = draw()
    expected = results_and_gradients(attend, leaves(tensors, DTYPE))
    for function, context in ((attend, autocast()), (inside, None)):
        compiled = torch.compile(function, fullgraph=True, backend=compiler)
        for backward in (autocast(enabled=False), autocast()):
            inputs = leaves(tensors, torch.float32)
            actual = results_and_gradients(compiled, inputs, forward=context, backward=backward)
            assert_same(actual[0], expected[0])
            assert_same(actual[1], expected[1])


@pytest.mark.parametrize("backend", ["aten", "tiled", "standard"])
def test_exported_programs(backend: str) -> None:
    class Attend(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
            with autocast():
                return flash_attention(q, k, v, return_lse=True, backend=backend)

    tensors = draw()
    cast = [x.to(DTYPE) for x in tensors]
    exported = torch.export.export(Attend(), tensors).module()
    assert_same(exported(*tensors), flash_attention(*cast, return_lse=True, backend=backend))


def test_split_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split_keys, "num_splits", lambda *_: 3)
    device = device_for("triton")
    q, k, v = draw(keys=97, device=device)
    cast = [x.to(DTYPE) for x in (q[:, :, :1], k, v)]
    expected = flash_attention(*cast, return_lse=True, backend="triton")
    with autocast(device):
        actual = flash_attention(q[:, :, :1], k, v, return_lse=True, backend="triton")
    assert_same(actual, expected)


@pytest.fixture
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize("attention", [ring_attention, ulysses_attention])
@pytest.mark.parametrize("backend", ["aten", "tiled"])
def test_across_ranks(attention: Any, backend: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return attention(q, k, v, causal=True, return_lse=True, backend=backend)

    check(attend, draw(keys=SQ))


@pytest.mark.parametrize("average", [False, True])
def test_attention_weights(average: bool) -> None:
    """Those of ``need_weights=True``: their products are of fp32, in both passes."""
    q, k, _ = draw()
    k = k.repeat_interleave(2, dim=1)
    lse = torch.logsumexp(q @ k.mT * D**-0.5, dim=-1)

    def attend(*inputs: Tensor) -> Any:
        return (attention_weights(*inputs, average=average),)

    def expected_and_actual(function: Any) -> Iterator[Any]:
        for enabled in (False, True):
            inputs = leaves((q, k, lse), torch.float32)
            context = autocast(enabled=enabled), autocast(enabled=enabled)
            yield results_and_gradients(function, inputs, forward=context[0], backward=context[1])

    torch.compiler.reset()
    for function in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        expected, actual = expected_and_actual(function)
        assert_same(actual[0], expected[0])
        assert_same(actual[1], expected[1])
