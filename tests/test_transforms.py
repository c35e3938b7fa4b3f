"""What PyTorch does to functions: second derivatives, forward mode, vmap, compile, autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from flashlayer import flash_attention
from flashlayer import flash_attention_varlen as varlen
from flashlayer.backends import tiled
from flashlayer.spec import AttentionExtras, AttentionSpec
from tests.test_accuracy import device_for

BACKENDS = ("triton", "aten", "tiled")
# Derivatives past the first leave the backend for the tiled algorithm, and take hundreds of calls:
# one test of them runs the kernels in the interpreter, the gradient penalty below.
FAST = ("aten", "tiled")
PLAIN = {"causal": True}
ALL = {
    "window_size": (2, 1),
    "softcap": 2.0,
    "dropout_p": 0.2,
    "dropout_seed": 3,
    "alibi_slopes": torch.tensor([0.5, 0.25]),
}


def small(backend: str, *, requires_grad: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    device = device_for(backend)
    q, k, v = (
        torch.randn(1, h, 4, 3, dtype=torch.float64, device=device, requires_grad=requires_grad)
        for h in (2, 1, 1)
    )
    return q, k, v


def attention(backend: str, **options: Any) -> Callable[..., Any]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return flash_attention(q, k, v, return_lse=True, backend=backend, **options)

    return attend


@pytest.mark.parametrize("backend", FAST)
def test_second_derivative(backend: str) -> None:
    assert gradgradcheck(attention(backend, **PLAIN), small(backend))


@pytest.mark.parametrize("backend", FAST)
def test_forward_mode(backend: str) -> None:
    attend = attention(backend, **PLAIN)
    assert gradcheck(attend, small(backend), check_forward_ad=True, check_backward_ad=False)


@pytest.mark.parametrize("check", [gradgradcheck, gradcheck])
def test_all_options_at_once(check: Callable[..., bool]) -> None:
    q, k, v = small("tiled")
    mask = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor) -> Any:
        return flash_attention(
            q, k, v, attn_mask=mask, sinks=sinks, return_lse=True, backend="tiled", **ALL
        )

    forward_mode = {"check_forward_ad": True} if check is gradcheck else {}
    assert check(attend, (q, k, v, mask, sinks), **forward_mode)


def test_second_derivative_of_packed_sequences() -> None:
    edges = torch.tensor([0, 2, 2, 5])
    leaves = [
        torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)
    ]  # one token past the last sequence
    attend = lambda *x: varlen(*x, cu_seqlens_q=edges, causal=True, backend="tiled")  # noqa: E731
    assert gradcheck(attend, leaves, check_forward_ad=True)
    assert gradgradcheck(attend, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_penalty_is_that_of_the_formula(backend: str) -> None:
    """What WGAN-GP does; an attention without a second derivative is silently wrong here."""
    leaves = small(backend)
    penalties = {}
    for name in (backend, "standard"):
        out, lse = attention(name, **PLAIN)(*leaves)
        grads = torch.autograd.grad(out.square().sum() + lse.sum(), leaves, create_graph=True)
        penalty = out.sum() + sum(grad.square().sum() for grad in grads)
        penalties[name] = torch.autograd.grad(penalty, leaves)
    torch.testing.assert_close(penalties[backend], penalties["standard"])


# Every switch of gradcheck at once.
ALL_SWITCHES = {
    "check_batched_grad": True,
    "check_batched_forward_grad": True,
    "check_forward_ad": True,
    "check_undefined_grad": True,
}
BATCHED: dict[str, dict[str, Any]] = {
    "causal": PLAIN,
    "window": {"window_size": (2, 1)},
    "padding": {"attn_mask": torch.tensor([True, True, False, True])},
    "all": ALL,
}


@pytest.mark.parametrize("backend", [*FAST, "standard"])
@pytest.mark.parametrize("option", BATCHED)
def test_gradcheck_with_every_switch_on(option: str, backend: str) -> None:
    if backend == "aten" and option == "all":
        pytest.skip("ATen has no softcap")
    attend = attention(backend, **BATCHED[option])
    for fast_mode in (False, True):
        assert gradcheck(attend, small(backend), fast_mode=fast_mode, **ALL_SWITCHES)
    second = {"check_batched_grad": True, "check_fwd_over_rev": True, "fast_mode": True}
    assert gradgradcheck(attend, small(backend), **second)


def test_gradcheck_of_the_kernels_with_every_switch_on() -> None:
    device = device_for("triton")
    leaves = [
        torch.randn(1, 1, 2, 2, dtype=torch.float64, device=device, requires_grad=True)
        for _ in range(3)
    ]
    assert gradcheck(attention("triton", **PLAIN), leaves, fast_mode=True, **ALL_SWITCHES)


@pytest.mark.parametrize("backend", FAST)
def test_gradcheck_of_packed_sequences_with_every_switch_on(backend: str) -> None:
    edges = torch.tensor([0, 2, 2, 5])
    leaves = [torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    attend = lambda *x: varlen(*x, cu_seqlens_q=edges, causal=True, backend=backend)  # noqa: E731
    assert gradcheck(attend, leaves, **ALL_SWITCHES)


@pytest.mark.parametrize("backend", BACKENDS)
def test_batched_gradients_are_those_of_a_loop(backend: str) -> None:
    """is_grads_batched, and the jacobian and hessian of torch.autograd.functional vectorized."""
    q, k, v = small(backend)
    out, lse = attention(backend, **PLAIN)(q, k, v)
    cotangents = torch.randn(3, *out.shape, dtype=out.dtype, device=out.device)
    batched = torch.autograd.grad(out, (q, v), cotangents, True, is_grads_batched=True)
    rows = [torch.autograd.grad(out, (q, v), one, True) for one in cotangents]
    for grads, expected in zip(batched, zip(*rows, strict=True), strict=True):
        torch.testing.assert_close(grads, torch.stack(expected))
    both = torch.autograd.grad(
        (out, lse), q, (cotangents, cotangents[..., 0]), is_grads_batched=True
    )[0]
    assert both.shape == (3, *q.shape)
    if backend == "triton":
        return  # hundreds of launches in the interpreter
    loss = lambda q: attention(backend, **PLAIN)(q, k, v)[0].sin().sum()  # noqa: E731
    functional = torch.autograd.functional
    expected = functional.hessian(
        lambda q: attention("standard", **PLAIN)(q, k, v)[0].sin().sum(), q
    )
    for outer in ("reverse-mode", "forward-mode"):
        hessian = functional.hessian(loss, q, vectorize=True, outer_jacobian_strategy=outer)
        torch.testing.assert_close(hessian, expected)


@pytest.mark.parametrize("backend", FAST)
def test_functional_transforms(backend: str) -> None:
    q, k, v = small(backend, requires_grad=False)
    tangents = tuple(torch.randn_like(x) for x in (q, k, v))
    ours, standard = attention(backend, **PLAIN), attention("standard", **PLAIN)
    loss = lambda attend: lambda q: attend(q, k, v)[0].square().sum()  # noqa: E731
    for transform in (
        lambda attend: torch.func.jvp(attend, (q, k, v), tangents)[1],
        lambda attend: torch.func.vjp(attend, q, k, v)[1]((torch.ones_like(q), q[..., 0])),
        lambda attend: torch.func.hessian(loss(attend))(q),
        lambda attend: torch.func.jacfwd(loss(attend))(q),
        lambda attend: torch.func.jacrev(loss(attend))(q),
    ):
        torch.testing.assert_close(transform(ours), transform(standard))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_vmap_over_any_one_input(backend: str, which: int) -> None:
    inputs = list(small(backend, requires_grad=False))
    attend = attention(backend, **PLAIN)
    batch = torch.randn(3, *inputs[which].shape, dtype=torch.float64, device=inputs[0].device)
    in_dims = tuple(0 if index == which else None for index in range(3))
    rows = [[*inputs[:which], x, *inputs[which + 1 :]] for x in batch]
    expected = [torch.stack(parts) for parts in zip(*(attend(*x) for x in rows), strict=True)]
    inputs[which] = batch
    for actual, reference in zip(torch.vmap(attend, in_dims)(*inputs), expected, strict=True):
        torch.testing.assert_close(actual, reference)
    # Per-sample gradients.
    loss = lambda q, k, v: attend(q, k, v)[0].square().sum()  # noqa: E731
    grads = torch.vmap(torch.func.grad(loss, argnums=which), in_dims)(*inputs)
    torch.testing.assert_close(
        grads, torch.stack([torch.func.grad(loss, argnums=which)(*x) for x in rows])
    )


HVP: dict[str, dict[str, Any]] = {
    "causal": PLAIN,
    "mask": {"attn_mask": torch.randn(4, 4, dtype=torch.float64)},
    "sinks": {"sinks": torch.randn(2, dtype=torch.float64), "causal": True},
    "all": {"attn_mask": torch.randn(4, 4, dtype=torch.float64), **ALL},
}


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize("option", HVP)
def test_hvp_is_that_of_the_formula(option: str, backend: str, create_graph: bool) -> None:
    """The double-backward trick: a derivative of the second derivative by its direction."""
    if backend == "aten" and option in ("sinks", "all"):
        pytest.skip("ATen has no sinks and no softcap")
    device = device_for(backend)
    options = {
        name: x.to(device) if isinstance(x, Tensor) else x for name, x in HVP[option].items()
    }
    # GQA; the mask and the sinks have derivatives too.
    leaves = {name: options.pop(name) for name in ("attn_mask", "sinks") if name in options}
    inputs = (*small(backend, requires_grad=False), *leaves.values())
    direction = tuple(torch.randn_like(x) for x in inputs)

    def loss(name: str) -> Callable[..., Tensor]:
        def of(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
            given = dict(zip(leaves, rest, strict=True))
            out, lse = attention(name, **options, **given)(q, k, v)
            return out.square().sum() + (lse.sin() * out[..., 0].cos()).sum()

        return of

    hvp = torch.autograd.functional.hvp
    actual = hvp(loss(backend), inputs, direction, create_graph=create_graph)[1]
    torch.testing.assert_close(actual, hvp(loss("standard"), inputs, direction)[1])


@pytest.mark.parametrize("backend", FAST)
def test_hvp_by_the_query_alone(backend: str) -> None:
    """Key and value have no direction; and what hvp returns is linear in the direction."""
    q, k, v = small(backend, requires_grad=False)
    direction = torch.randn_like(q)

    def second(name: str) -> Callable[[Tensor], Tensor]:
        gradient = torch.func.grad(lambda q: attention(name)(q, k, v)[0].square().sum())
        return lambda u: torch.func.grad(lambda q: (gradient(q) * u).sum())(q)

    loss = lambda q: flash_attention(q, k, v, backend=backend).square().sum()  # noqa: E731
    expected = second("standard")(direction)
    torch.testing.assert_close(torch.autograd.functional.hvp(loss, q, direction)[1], expected)
    transposed = torch.func.vjp(second(backend), torch.zeros_like(q))[1]
    torch.testing.assert_close(transposed(direction)[0], expected)
    mapped = torch.vmap(transposed)(torch.stack((direction, 2 * direction)))[0]
    torch.testing.assert_close(mapped, torch.stack((expected, 2 * expected)))


def test_third_derivative_raises() -> None:
    q, k, v = small("tiled")
    out = flash_attention(q, k, v)
    (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="no third derivative"):
        torch.autograd.grad(second.sum(), q)


def test_third_derivative_by_any_input_but_the_direction_raises() -> None:
    q, k, v = small("tiled")
    do = torch.randn_like(q).requires_grad_()
    direction = torch.randn_like(q).requires_grad_()

    def second() -> Tensor:
        out = flash_attention(q, k, v, backend="tiled")
        (first,) = torch.autograd.grad(out, q, do, create_graph=True)
        return torch.autograd.grad(first, q, direction, create_graph=True)[0].sum()

    assert torch.autograd.grad(second(), direction)[0].isfinite().all()
    for inputs in (q, k, v, do, (direction, k)):
        with pytest.raises(NotImplementedError, match="no third derivative"):
            torch.autograd.grad(second(), inputs)
    with pytest.raises(NotImplementedError, match="no third derivative"):
        second().backward()
    loss = lambda q: flash_attention(q, k, v, backend="tiled").square().sum()  # noqa: E731
    hvp = torch.autograd.functional.hvp(loss, q, direction, create_graph=True)[1]
    with pytest.raises(NotImplementedError, match="no third derivative"):
        torch.autograd.grad(hvp.sum(), q)


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return result


def test_derivatives_of_any_order_need_linear_memory() -> None:
    """Nothing of size Sq x Sk, in the second derivative and in forward mode as well."""
    seqlen = 4096
    q, k, v = (torch.randn(1, 1, seqlen, 8, requires_grad=True) for _ in range(3))
    spec, extras = AttentionSpec(0.3, None, 0), AttentionExtras()
    with LargestTensor() as largest, torch.no_grad():  # inside of the op that a mode sees
        o, lse = tiled.forward(q, k, v, spec, extras)
        tiled.backward(o, None, q, k, v, o, lse, spec, extras)
    assert 256 * 256 <= largest.numel <= 512 * 512
    with LargestTensor() as largest:
        out = flash_attention(q, k, v, causal=True, backend="tiled")
        (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
        torch.autograd.grad(dq.square().sum(), (q, k, v))
        primals = tuple(x.detach() for x in (q, k, v))
        torch.func.jvp(attention("tiled", causal=True), primals, primals)
    assert largest.numel <= 512 * 512  # one tile


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", [*BACKENDS, "standard"])
def test_compiles_without_a_break(backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        attention(backend, **PLAIN), fullgraph=True, backend="aot_eager", dynamic=dynamic
    )
    device = device_for(backend)
    for seqlen in (17, 33):
        inputs = [torch.randn(2, 2, seqlen, 16, device=device) for _ in range(3)]
        results = []
        for attend in (compiled, attention(backend, **PLAIN)):
            leaves = [x.clone().requires_grad_() for x in inputs]
            out, lse = attend(*leaves)
            grads = torch.autograd.grad(out.square().sum() + lse.sum(), leaves)
            results.append((out, lse, *grads))
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)
            assert actual.stride() == expected.stride()


def test_compiles_with_options() -> None:
    torch._dynamo.reset()
    options = {"softcap": 2.0, "alibi_slopes": torch.rand(2), "dropout_p": 0.3, "dropout_seed": 1}

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor) -> Tensor:
        return flash_attention(q, k, v, attn_mask=mask, sinks=sinks, **options)

    q, k, v = (torch.randn(1, 2, 20, 8) for _ in range(3))
    inputs = (q, k, v, torch.randn(20, 20), torch.randn(2))
    results = []
    for function in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = function(*leaves)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["triton", "tiled"])
def test_packed_sequences_compile_without_a_break(backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()

    def attend(q: Tensor, k: Tensor, v: Tensor, edges: Tensor, sinks: Tensor) -> Any:
        return varlen(
            q,
            k,
            v,
            cu_seqlens_q=edges,
            max_seqlen_q=30,
            causal=True,
            sinks=sinks,
            return_lse=True,
            backend=backend,
        )

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    device = device_for(backend)
    for tokens in (30, 40):
        inputs = [torch.randn(tokens, 2, 16, device=device) for _ in range(3)]
        edges = torch.tensor([0, 10, 10, 25], device=device)
        results = []
        for function in (compiled, attend):
            leaves = [x.clone().requires_grad_() for x in (*inputs, torch.ones(2, device=device))]
            out, lse = function(*leaves[:3], edges, leaves[3])
            loss = out.square().sum() + lse[:, :25].sum()
            results.append((out, lse, *torch.autograd.grad(loss, leaves)))
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_where_nothing_has_a_gradient(backend: str, mode: Callable) -> None:
    """Dynamo inlined the autograd.Function with one argument too many."""
    torch.compiler.reset()  # each mode and backend counts as a recompilation of the same code
    inputs = [x.detach() for x in small(backend)]
    compiled = torch.compile(attention(backend), fullgraph=True, backend="aot_eager")
    with mode():
        results = zip(compiled(*inputs), attention(backend)(*inputs), strict=True)
    for actual, expected in results:
        torch.testing.assert_close(actual, expected)


def test_autocast_is_sdpas() -> None:
    """fp32 inputs run in the autocast dtype, fp64 ones stay, gradients come back in fp32."""
    q, k, v = (torch.randn(1, 2, 9, 8, requires_grad=True) for _ in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = flash_attention(q, k, v)
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, flash_attention(*(x.bfloat16() for x in (q, k, v))))
        assert flash_attention(*(x.double() for x in (q, k, v))).dtype == torch.float64
    out.float().sum().backward()
    assert q.grad is not None
    assert q.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_subset_of_inputs_may_need_a_gradient(backend: str) -> None:
    full = small(backend)
    expected = torch.autograd.grad(attention(backend)(*full)[0].square().sum(), full)
    for subset in range(1, 8):
        leaves = [
            x.detach().requires_grad_(bool(subset >> index & 1)) for index, x in enumerate(full)
        ]
        attention(backend)(*leaves)[0].square().sum().backward()
        for leaf, grad in zip(leaves, expected, strict=True):
            if leaf.requires_grad:
                torch.testing.assert_close(leaf.grad, grad)
            else:
                assert leaf.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_retained_graph_and_checkpointing_give_the_same_gradients(backend: str) -> None:
    leaves = small(backend)
    out, _ = attention(backend)(*leaves)
    first = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(out.sum(), leaves)
    out, _ = checkpoint(attention(backend), *leaves, use_reentrant=False)
    third = torch.autograd.grad(out.sum(), leaves)
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("backend", [*BACKENDS, "standard"])
def test_inference_mode(backend: str) -> None:
    inputs = small(backend)
    expected, _ = attention(backend)(*inputs)
    with torch.inference_mode():
        out, lse = attention(backend)(*inputs)
    assert out.is_inference()
    assert lse.is_inference()
    torch.testing.assert_close(out, expected.detach())


@pytest.mark.parametrize("backend", ["triton", "tiled"])
def test_gradient_of_a_mask_under_functional_transforms(backend: str) -> None:
    """functorch unwraps the mask before the backward sees it: requires_grad said no, so zeros."""
    q, k, v = small(backend, requires_grad=False)
    mask = torch.randn(1, 1, q.shape[2], k.shape[2], dtype=q.dtype, device=q.device)

    def gradient(backend: str) -> Tensor:
        return torch.func.grad(
            lambda m: flash_attention(q, k, v, attn_mask=m, backend=backend).sin().sum()
        )(mask)

    torch.testing.assert_close(gradient(backend), gradient("standard"))


def test_forward_mode_in_a_compiled_graph_is_not_silently_zero() -> None:
    q, k, v = small("tiled", requires_grad=False)
    tangent = torch.randn_like(q)

    def push(q: Tensor) -> Tensor:
        return torch.func.jvp(lambda z: flash_attention(z, k, v, causal=True), (q,), (tangent,))[1]

    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(push, backend="aot_eager")(q), push(q))

    edges = torch.tensor([0, q.shape[2]])

    def push_packed(q: Tensor) -> Tensor:
        def attend(z: Tensor) -> Tensor:
            rows = (x[0].transpose(0, 1) for x in (z, k, v))
            return varlen(*rows, cu_seqlens_q=edges, max_seqlen_q=q.shape[2])

        return torch.func.jvp(attend, (q,), (tangent,))[1]

    # Raised while tracing, which is a graph break: the eager call is right.
    torch.testing.assert_close(torch.compile(push_packed, backend="aot_eager")(q), push_packed(q))
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"packed sequences have no torch\.func transform"):
        torch.compile(push_packed, backend="aot_eager", fullgraph=True)(q)


def test_one_tensor_in_several_places_compiles() -> None:
    """Self-attention on one tensor, and int32 boundaries that serve queries and keys."""
    torch._dynamo.reset()
    x = torch.randn(1, 2, 9, 4, dtype=torch.float64, requires_grad=True)
    attend = attention("auto", **PLAIN)
    compiled = torch.compile(lambda x: attend(x, x, x), fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(x), attend(x, x, x), strict=True):
        torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(f(x)[0].sum(), x)[0] for f in (compiled, lambda x: attend(x, x, x)))
    )
    rows = torch.randn(9, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    edges = torch.tensor([0, 4, 9], dtype=torch.int32)

    def packed(rows: Tensor) -> Tensor:
        return varlen(*rows.unbind(1), cu_seqlens_q=edges, max_seqlen_q=5, causal=True)

    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        *(torch.autograd.grad(f(rows).sin().sum(), rows)[0] for f in (compiled, packed))
    )


def test_vmap_over_nothing() -> None:
    empty = torch.randn(0, 1, 2, 3, 4)
    out = torch.vmap(lambda x: flash_attention(x, x, x, backend="tiled"))(empty)
    assert out.shape == empty.shape


def test_meta_tensors_have_shapes() -> None:
    q = torch.empty(2, 4, 9, 8, device="meta")
    out, lse = flash_attention(q, q[:, :2], q[:, :2], window_size=(3, 0), return_lse=True)
    assert out.device.type == "meta"
    assert (out.shape, lse.shape) == (q.shape, q.shape[:3])
