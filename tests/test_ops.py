"""Calls that something looks at: compilers, tracers, fake tensors, counters, subclasses."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity
from torch.utils.flop_counter import FlopCounterMode

from flashlayer import (
    FlashAttention,
    FlashMultiheadAttention,
    flash_attention,
    flash_attention_varlen,
)
from flashlayer.backends import BACKENDS, ops
from flashlayer.integrations import sdpa, weights
from flashlayer.spec import AttentionExtras, AttentionSpec
from tests.test_accuracy import device_for

NAMES = ("triton", "aten", "tiled")
LAYOUTS = ("bhsd", "bshd", "expanded", "one_head_one_row")
UTILITIES = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
CAUSAL = AttentionSpec(0.25, None, 0)


def inputs(layout: str, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    heads, kv_heads, rows, keys = (1, 1, 1, 7) if layout == "one_head_one_row" else (2, 1, 5, 7)
    q, k, v = (
        torch.randn(2, h, n, 16, device=device)
        for h, n in ((heads, rows), (kv_heads, keys), (kv_heads, keys))
    )
    if layout == "bshd":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    if layout == "expanded":
        q, k = q[:, :1].expand_as(q), k[:1].expand_as(k)
    return q, k, v


def extras_of(option: str, device: str) -> tuple[AttentionSpec, AttentionExtras]:
    """What the schema carries besides q, k and v of :func:`inputs`."""
    if option == "packed":  # max_seqlen stays unread, as in a graph
        edges = torch.tensor([0, 3, 5], dtype=torch.int32, device=device)
        return CAUSAL, AttentionExtras(cu_seqlens_q=edges, cu_seqlens_k=edges.clone())
    if option == "padding":
        shown = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1] * 7], dtype=torch.bool, device=device)
        return AttentionSpec(0.25), AttentionExtras(attn_mask=shown[:, None, None])
    if option == "bias":
        mask = torch.randn(1, 2, 5, 7, device=device).transpose(2, 3).contiguous().transpose(2, 3)
        sinks = torch.randn(2, device=device)
        spec = AttentionSpec(0.25, softcap=2.0, mask_gradient=True)
        return spec, AttentionExtras(attn_mask=mask, sinks=sinks)
    if option == "auxiliary":
        return AttentionSpec(0.25, max_scores=True, entropy=True), AttentionExtras()
    windows = {"plain": (None, None), "causal": (None, 0), "window": (2, 1), "idle": (99, 99)}
    return AttentionSpec(0.25, *windows[option]), AttentionExtras()


CASES = [
    *((name, "causal", layout) for name in NAMES for layout in LAYOUTS),
    *((name, option, "bhsd") for name in NAMES for option in ("window", "padding", "idle")),
    *((name, "packed", "packed") for name in NAMES),
    *((name, option, "bhsd") for name in ("triton", "tiled") for option in ("bias", "auxiliary")),
]


@pytest.mark.parametrize(("name", "option", "layout"), CASES)
def test_the_ops_are_what_they_say(name: str, option: str, layout: str) -> None:
    """``opcheck``: schema, fake shapes, dtypes and strides, and the compiled graph.

    What a graph sees is made by the backend from the layouts, and from the options' tensors by code
    that all backends share. So each layout is compiled with each backend, each option with one.
    Whether lse has a gradient is the schema's alone: both once a backend.
    """
    checks = UTILITIES if option == "causal" or name == "tiled" else UTILITIES[:2]
    device = device_for(name)
    q, k, v = inputs(layout, device)
    if option == "packed":
        q, k, v = (x[:1, :, :5] for x in (q, k, v))
    spec, extras = extras_of(option, device)
    flat = (name, *ops.flatten(spec, extras))
    torch.library.opcheck(ops.forward_op, (q, k, v, *flat), test_utils=checks)
    results = ops.forward_op(q, k, v, *flat)
    o, lse, *_ = results
    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes = ops.forward_op(q, k, v, *flat)
    for real, fake in zip(results, fakes, strict=True):
        assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)
    gradients = [torch.randn_like(lse)]
    for dlse in [None, *gradients] if (option, layout) == ("causal", "bhsd") else gradients:
        dentropy = torch.randn_like(lse) if spec.entropy and name == "tiled" else None
        arguments = (torch.randn_like(o), dlse, q, k, v, o, lse, dentropy, *flat)
        torch.library.opcheck(ops.backward_op, arguments, test_utils=checks)


@pytest.mark.parametrize("name", NAMES)
def test_an_op_gives_what_the_backend_gives(name: str) -> None:
    device = device_for(name)
    q, k, v = inputs("bhsd", device)
    backend: Any = BACKENDS[name]
    extras = AttentionExtras()
    o, lse = backend.forward(q, k, v, CAUSAL, extras)
    grads = backend.backward(o, lse, q, k, v, o, lse, CAUSAL, extras)
    flat = (name, *ops.flatten(CAUSAL, extras))
    actual_o, actual_lse, *more = ops.forward_op(q, k, v, *flat)
    assert torch.equal(actual_o, o)
    assert torch.equal(actual_lse, lse)
    assert [x.numel() for x in more] == [0, 0]
    results = ops.backward_op(o, lse, q, k, v, o, lse, None, *flat)
    for actual, expected in zip(results[:3], grads[:3], strict=True):
        assert torch.equal(actual, expected)
    assert [x.numel() for x in results[3:]] == [0, 0]
    assert grads[3:] == (None, None)


def allocated(function: Callable[..., Any], *arguments: Any) -> int:
    """Bytes of all allocations on the CPU in a call."""
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = function(*arguments)
    del kept
    assert profile.profiler is not None
    events = profile.profiler.kineto_results.events()
    return sum(max(event.nbytes(), 0) for event in events if event.name() == "[memory]")


@pytest.mark.parametrize("option", ["causal", "bias", "auxiliary"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")  # of torch 2.11
def test_an_op_allocates_what_the_backend_does(name: str, option: str) -> None:
    """The strides that a graph was promised are known without a second set of results."""
    if (name == "aten" and option != "causal") or device_for(name) != "cpu":
        pytest.skip("refused, or not on the CPU")
    q, k, v = inputs("bhsd")
    spec, extras = extras_of(option, "cpu")
    backend: Any = BACKENDS[name]
    flat = (name, *ops.flatten(spec, extras))
    o, lse, *_ = backend.forward(q, k, v, spec, extras)
    plain = allocated(backend.forward, q, k, v, spec, extras)
    assert allocated(ops.forward_op, q, k, v, *flat) < plain + lse.nbytes
    tensors = (torch.randn_like(o), torch.randn_like(lse), q, k, v, o, lse)
    plain = allocated(backend.backward, *tensors, spec, extras)
    assert allocated(ops.backward_op, *tensors, None, *flat) < plain + lse.nbytes


def test_schema_and_spec_hold_the_same() -> None:
    mask, edges = torch.ones(1, 1, 1, 4), torch.tensor([0, 4])
    spec = AttentionSpec(0.5, 3, 4, "top_left", 2.0, 0.1, 5, 6, True, True, True)
    extras = AttentionExtras(mask, mask, mask, mask, edges, edges)
    assert ops.unflatten(*ops.flatten(spec, extras)) == (spec, extras)


def counted(function: Callable[..., Any], calls: list[tuple[Any, ...]]) -> int:
    """Compilations that all calls take together with dynamic shapes; results as uncompiled."""
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(function, dynamic=True, fullgraph=True, backend=counter)
    for seed, call in enumerate(calls):
        results = []
        for attend in (compiled, function):
            torch.manual_seed(seed)
            leaves = [
                x.detach().requires_grad_()
                if isinstance(x, Tensor) and x.is_floating_point()
                else x
                for x in call
            ]
            out = attend(*leaves)
            wanted = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
            grads = torch.autograd.grad(out.sin().sum(), wanted, allow_unused=True)
            results.append((out.detach(), *grads))
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)
    return counter.frame_count


SLOPES = torch.tensor([0.5, 0.25])
# Options whose tensors depend on no length.
FIXED: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "top_left": {"causal": True, "diagonal": "top_left"},
    "window": {"window_size": (5, 2)},
    "window_that_hides_nothing_at_first": {"window_size": (45, 0)},
    "softcap": {"softcap": 20.0},
    "alibi": {"alibi_slopes": SLOPES, "causal": True},
    "dropout": {"dropout_p": 0.2},
    "seed": {"dropout_p": 0.2, "dropout_seed": 3},
}
LENGTHS = range(40, 52)


def dense(length: int, batch: int = 2, heads: int = 2, keys: int | None = None) -> list[Tensor]:
    keys = length if keys is None else keys
    sizes = ((heads, length), (1, keys), (1, keys))
    return [torch.randn(batch, h, n, 8) for h, n in sizes]


@pytest.mark.parametrize("backend", ["auto", "tiled", "standard"])
@pytest.mark.parametrize("option", FIXED)
def test_all_lengths_are_one_compilation(option: str, backend: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return flash_attention(q, k, v, backend=backend, **FIXED[option])

    assert counted(attend, [tuple(dense(n)) for n in LENGTHS]) == 1


@pytest.mark.parametrize("option", ["window", "softcap", "dropout"])
def test_all_lengths_of_the_kernels_are_one_compilation(option: str) -> None:
    device = device_for("triton")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return flash_attention(q, k, v, backend="triton", **FIXED[option])

    calls = [tuple(x.to(device) for x in dense(n, batch=1)) for n in (7, 9, 12)]
    assert counted(attend, calls) == 1


TENSORS: dict[str, Callable[[int], dict[str, Tensor]]] = {
    "bias": lambda n: {"attn_mask": torch.randn(1, 1, n, n)},
    "bool_mask": lambda n: {"attn_mask": torch.rand(2, 1, n, n) > 0.3},
    "padding": lambda n: {"attn_mask": torch.rand(2, 1, 1, n) > 0.3},
    "sinks": lambda n: {"sinks": torch.randn(2)},
}


@pytest.mark.parametrize("backend", ["auto", "tiled", "standard"])
@pytest.mark.parametrize("option", TENSORS)
def test_all_lengths_with_a_tensor_are_one_compilation(option: str, backend: str) -> None:
    (name,) = TENSORS[option](1)

    def attend(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Any:
        return flash_attention(q, k, v, backend=backend, **{name: x})

    assert counted(attend, [(*dense(n), TENSORS[option](n)[name]) for n in LENGTHS]) == 1


@pytest.mark.parametrize("backend", ["auto", "tiled", "standard"])
@pytest.mark.parametrize("max_seqlen", [None, 60])
def test_all_packings_are_one_compilation(max_seqlen: int | None, backend: str) -> None:
    """Without ``max_seqlen``, which would have to be read from the boundaries, as well."""

    def attend(q: Tensor, k: Tensor, v: Tensor, edges: Tensor) -> Any:
        options: dict[str, Any] = {"cu_seqlens_q": edges, "max_seqlen_q": max_seqlen}
        return flash_attention_varlen(q, k, v, causal=True, backend=backend, **options)

    calls = [(*torch.randn(3, n, 2, 8), torch.tensor([0, n // 2, n])) for n in LENGTHS]
    assert counted(attend, calls) == 1


@pytest.mark.parametrize("what", ["batch", "heads", "keys", "window", "scale"])
def test_other_sizes_and_numbers_are_one_compilation(what: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, number: Any) -> Any:
        name = {"window": "window_size", "scale": "scale"}.get(what)
        if name is None:
            return flash_attention(q, k, v, causal=True, softcap=2.0)
        options: dict[str, Any] = {name: (number, 0) if what == "window" else number}
        return flash_attention(q, k, v, softcap=2.0, **options)

    calls = [
        (
            *dense(
                n,
                batch=n - 37 if what == "batch" else 2,
                heads=n - 37 if what == "heads" else 2,
                keys=n + 7 if what == "keys" else None,
            ),
            {"window": n // 3, "scale": 0.2}.get(what, 0),
        )
        for n in LENGTHS
    ]
    assert counted(attend, calls) == 1


def test_every_length_of_a_layer_and_of_an_override_is_one_compilation() -> None:
    layer = FlashAttention(16, 2, num_kv_heads=1, causal=True, rotary_base=1e4, alibi=True)
    assert counted(layer, [(torch.randn(2, n, 16),) for n in LENGTHS]) == 1
    calls = [(torch.randn(n, 16), torch.tensor([0, 9, n])) for n in LENGTHS]
    assert counted(lambda x, edges: layer(x, cu_seqlens=edges), calls) == 1

    def routed(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        with sdpa.override():
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    for leading in ((2, 2), (2, 3, 2)):
        calls = [(*torch.randn(3, *leading, n, 8), torch.randn(n, n)) for n in LENGTHS]
        assert counted(routed, calls) == 1


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("mask", ["none", "causal", "bias", "padding"])
def test_every_length_of_attention_weights_is_one_compilation(mask: str, average: bool) -> None:
    """They are computed in blocks, whose number depends on the length; gradients included."""
    layer = FlashMultiheadAttention(16, 2, batch_first=True)

    def attend(x: Tensor, extra: Tensor) -> Tensor:
        options: dict[str, Any] = {"average_attn_weights": average}
        if mask == "causal":
            options["is_causal"] = True
        if mask == "bias":
            options["attn_mask"] = extra
        if mask == "padding":
            options["key_padding_mask"] = extra[:, 0] > 1
        out, weights = layer(x, x, x, **options)
        return out.sum() + weights.square()

    def extra(length: int) -> Tensor:
        return torch.randn(2, 2, length) if mask == "padding" else torch.randn(length, length)

    calls = [(torch.randn(2, n, 16), extra(n)) for n in (40, 41, 45)]
    with mock.patch.object(weights, "WEIGHTS_AT_ONCE", 2 * 2 * 45 * 20):
        assert counted(attend, calls) == 1


# Of torch 2.15's opcheck itself.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("seed", [None, 3])
def test_the_op_of_attention_weights_is_what_it_says(seed: int | None) -> None:
    q, k = torch.randn(2, 2, 2, 5, 4)
    k = k[:, :, :3]
    lse, mask = torch.randn(2, 2, 5), torch.randn(1, 1, 5, 3)
    for average in (False, True):
        drawn = (None, 0.0) if seed is None else (torch.tensor(seed), 0.3)
        leaves = [x.clone().requires_grad_() for x in (q, k, lse, mask)]
        call = (*leaves, drawn[0], average, True, drawn[1])
        checks = ("test_schema", "test_autograd_registration", *UTILITIES[1:])
        torch.library.opcheck(weights._weights_op, call, test_utils=checks)


class Attend(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, q, k, v):  # a graph module with annotations made of strings isn't pickled
        return flash_attention(q, k, v, **self.options)


@pytest.mark.parametrize("backend", ["auto", "tiled", "standard"])
@pytest.mark.parametrize("option", ["causal", "window", "softcap", "alibi"])
@pytest.mark.parametrize("strict", [False, True])
def test_an_export_holds_for_every_batch_and_length(
    strict: bool, option: str, backend: str
) -> None:
    """Down to a batch of 1 and two tokens, fewer than a window is wide."""
    module = Attend(backend=backend, **FIXED[option])
    sizes = {0: torch.export.Dim("batch", min=1, max=64), 2: torch.export.Dim("length", min=2)}
    shapes = (sizes, sizes, sizes)
    program = torch.export.export(module, tuple(dense(9)), dynamic_shapes=shapes, strict=strict)
    for length, batch in ((2, 2), (3, 1), (9, 2), (300, 3)):
        x = dense(length, batch=batch)
        torch.testing.assert_close(program.module()(*x), module(*x))


@pytest.mark.parametrize("backend", ["auto", "aten", "tiled", "standard", "triton"])
def test_fake_tensors_need_no_values(backend: str) -> None:
    """Padding, packed sequences and their gradients under FakeTensorMode, as SDPA runs there."""
    device_for(backend)
    with FakeTensorMode():
        q, k, v = (x.requires_grad_() for x in dense(9))
        mask = torch.rand(2, 1, 1, 9) > 0.3
        causal = backend != "aten"  # whose refusal is up to the values of the mask
        out = flash_attention(q, k, v, attn_mask=mask, causal=causal, backend=backend)
        assert out.shape == q.shape
        assert torch.autograd.grad(out.sum(), k)[0].shape == k.shape
        rows, edges = torch.randn(9, 2, 8, requires_grad=True), torch.tensor([0, 4, 9])
        packed, lse = flash_attention_varlen(
            rows, rows, rows, cu_seqlens_q=edges, return_lse=True, backend=backend
        )
        (grad,) = torch.autograd.grad(packed.sum() + lse.sum(), rows)
        assert (packed.shape, lse.shape, grad.shape) == (rows.shape, (2, 9), rows.shape)
        layer = FlashAttention(16, 2, causal=True, rotary_base=1e4, backend=backend)
        assert layer(torch.randn(9, 16), cu_seqlens=edges).shape == (9, 16)
    with FakeTensorMode():
        q = torch.randn(1, 2, 9, 8, requires_grad=True)
    out = flash_attention(q, q, q, softcap=2.0, backend="tiled")  # the mode is off, q is still fake
    assert torch.autograd.grad(out.sum(), q)[0].shape == q.shape


def test_meta_tensors_need_no_values() -> None:
    rows = torch.empty(9, 2, 8, device="meta")
    edges = torch.tensor([0, 4, 9], device="meta")
    assert flash_attention_varlen(rows, rows, rows, cu_seqlens_q=edges).shape == rows.shape


def test_symbolic_traces_hold_a_call_as_one_node() -> None:
    """``torch.fx.symbolic_trace``; the graph module can be copied and pickled."""
    module = Attend(causal=True, return_lse=True)
    graph = torch.fx.symbolic_trace(module)
    assert [node.target for node in graph.graph.nodes if node.op == "call_function"] == [
        flash_attention
    ]
    x = dense(9)
    for copied in (graph, copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
        for actual, expected in zip(copied(*x), module(*x), strict=True):
            assert torch.equal(actual, expected)

    def packed(rows: Tensor, edges: Tensor) -> Tensor:
        return flash_attention_varlen(rows, rows, rows, cu_seqlens_q=edges, causal=True) + 1

    rows, edges = torch.randn(9, 2, 8), torch.tensor([0, 4, 9])
    assert torch.equal(torch.fx.symbolic_trace(packed)(rows, edges), packed(rows, edges))

    def of_keys(k: Tensor) -> Tensor:
        return flash_attention(x[0], k, x[2], attn_mask=k[..., 0][:, :, None])

    assert torch.equal(torch.fx.symbolic_trace(of_keys)(x[1]), of_keys(x[1]))


@pytest.mark.parametrize("backend", ["aten", "tiled"])
def test_a_flop_counter_counts_the_products(backend: str) -> None:
    """Also the first counter that is made; as many as of the formula and its recomputed scores."""
    q, k, v = (torch.randn(2, 4, n, 8, requires_grad=True) for n in (9, 11, 11))
    ops._register_flop_formulas.cache_clear()
    registry = torch.utils.flop_counter.flop_registry
    for op in (torch.ops.flashlayer.forward, torch.ops.flashlayer.backward):
        registry.pop(op, None)
    product = 2 * 2 * 4 * 9 * 11 * 8
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            flash_attention(q, k, v, backend=backend).sum().backward()
        assert counter.get_total_flops() == (2 + 5) * product
