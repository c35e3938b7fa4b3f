"""The tangent kernel, entered by ``torch.func.jvp`` and by dual numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck
from torch.utils.flop_counter import FlopCounterMode

from flashlayer import flash_attention
from flashlayer.backends import triton as backend
from tests.kernels.reference import DEVICE
from tests.tangents import check, push


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The tangents that the kernel was launched with."""
    launched = []
    launch = backend.launch_tangents

    def record(primals: Any, tangents: Any, *rest: Any) -> None:
        launched.append(tangents)
        launch(primals, tangents, *rest)

    monkeypatch.setattr(backend, "launch_tangents", record)
    return launched


def draw(
    seqlen_q: int = 63,
    seqlen_k: int = 63,
    head_dim: int = 16,
    value_dim: int | None = None,
    heads: tuple[int, int] = (2, 1),
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
) -> tuple[list[Tensor], list[Tensor]]:
    """Random q, k, v, and their tangents."""
    shapes = (
        (batch, heads[0], seqlen_q, head_dim),
        (batch, heads[1], seqlen_k, head_dim),
        (batch, heads[1], seqlen_k, value_dim or head_dim),
    )
    primals, tangents = (
        [torch.randn(shape, dtype=dtype, device=DEVICE) for shape in shapes] for _ in range(2)
    )
    return primals, tangents


GEOMETRY = {
    "plain": ({"seqlen_q": 129, "seqlen_k": 127}, {}),
    "causal": ({"seqlen_q": 129, "seqlen_k": 129, "head_dim": 40}, {"causal": True}),
    "more keys": ({"seqlen_q": 17, "seqlen_k": 127, "head_dim": 59}, {"causal": True}),
    "rows without keys": ({"seqlen_q": 127, "seqlen_k": 63}, {"causal": True}),
    "window": ({"seqlen_q": 129, "seqlen_k": 129}, {"window_size": (16, 5)}),
    "left": ({"heads": (6, 2), "seqlen_q": 70}, {"window_size": (5, None)}),
    "Dv": ({"head_dim": 80, "value_dim": 24, "batch": 2}, {"diagonal": "top_left"}),
    "one query": ({"seqlen_q": 1, "heads": (6, 3), "batch": 3}, {"causal": True}),
    "softcap": ({"seqlen_k": 70}, {"causal": True, "softcap": 1.5}),
    "negative": ({"seqlen_k": 33}, {"scale": -0.4}),
    "zero": ({"seqlen_k": 33}, {"scale": 0.0}),
    "ALiBi": ({"heads": (4, 2)}, {"alibi_slopes": torch.rand(4), "causal": True}),
    "sinks": ({"heads": (2, 2), "seqlen_k": 17}, {"sinks": torch.randn(2), "causal": True}),
}


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, dtype) for case in GEOMETRY for dtype in (torch.float16, torch.float32)),
        *(
            (case, dtype)
            for case in ("causal", "window")
            for dtype in (torch.bfloat16, torch.float64)
        ),
    ],
    ids=str,
)
def test_tangents_are_those_of_the_formula(
    case: str, dtype: torch.dtype, launches: list[Any]
) -> None:
    sizes, options = GEOMETRY[case]
    options = {n: x.to(DEVICE) if isinstance(x, Tensor) else x for n, x in options.items()}
    if "sinks" in options:
        options["sinks"] = options["sinks"].to(dtype)
    check(*draw(**sizes, dtype=dtype), **options)
    assert len(launches) == 1


@pytest.mark.parametrize("subset", range(1, 7))
def test_absent_tangents_are_zeros(subset: int, launches: list[Any]) -> None:
    primals, tangents = draw(seqlen_q=33, seqlen_k=70, dtype=torch.float64)
    given = [x if subset >> index & 1 else None for index, x in enumerate(tangents)]
    actual = check(primals, given, causal=True)
    assert [x is None for x in launches[0]] == [x is None for x in given]
    zeros = [torch.zeros_like(x) if y is None else y for x, y in zip(tangents, given, strict=True)]
    for result, whole in zip(
        actual.values(), push("triton", primals, zeros, causal=True).values(), strict=True
    ):
        torch.testing.assert_close(result, whole, rtol=1e-12, atol=1e-12)


def test_rows_that_see_no_key_have_no_tangent() -> None:
    primals, tangents = draw(seqlen_q=100, seqlen_k=40)
    for name in ("triton", "tiled"):
        results = push(name, primals, tangents, causal=True)
        assert (results["lse"][:, :, :60] == -torch.inf).all()
        for tangent in ("out_tangent", "lse_tangent"):
            assert (results[tangent][:, :, :60] == 0).all()
            assert results[tangent].isfinite().all()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_hidden_keys_and_their_tangents_may_hold_anything(poison: float) -> None:
    primals, tangents = draw(seqlen_q=33, seqlen_k=129)
    options: dict[str, Any] = {"causal": True, "diagonal": "top_left"}
    clean = push("triton", primals, tangents, **options)
    for tensors in (primals, tangents):
        for x in tensors[1:]:
            x[:, :, 33:] = poison
    for result, expected in zip(
        push("triton", primals, tangents, **options).values(), clean.values(), strict=True
    ):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_large_scores(dtype: torch.dtype) -> None:
    """One key has nearly all the weight: o' is small beside ``lse' * o``, the mean of s' large."""
    primals, tangents = draw(seqlen_q=70, seqlen_k=129, dtype=dtype)
    magnitude = 2e3 if dtype == torch.float16 else 1e4  # the formula's own scores overflow
    results = check([primals[0] * magnitude, *primals[1:]], tangents, scale=1.0)
    assert results["lse"].abs().max() > 1e4
    tangents = [x * y for x, y in zip(tangents, (1e2, 1e2, 1), strict=True)]
    results = check([primals[0] * 8, *primals[1:]], tangents, scale=1.0)
    assert results["lse_tangent"].abs().max() > 1e3


EDGES = {"cu_seqlens_q": [0, 17, 17, 80, 90], "cu_seqlens_k": [0, 40, 60, 60, 129]}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_packed_sequences(dtype: torch.dtype, launches: list[Any]) -> None:
    """Sequences without queries, without keys, and tokens past the last one."""
    primals, tangents = draw(seqlen_q=95, seqlen_k=131, heads=(4, 2), dtype=dtype)
    primals, tangents = ([x[0].transpose(0, 1) for x in y] for y in (primals, tangents))
    edges = {name: torch.tensor(x, device=DEVICE) for name, x in EDGES.items()}
    results = check(primals, tangents, causal=True, **edges)
    for name in ("out", "out_tangent"):
        assert (results[name][90:] == 0).all()
    assert len(launches) == 1
    nothing = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    results = push("triton", primals, tangents, cu_seqlens_q=nothing, cu_seqlens_k=nothing)
    assert (results["out_tangent"] == 0).all()


STRIDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "bshd": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "last_stride_2": lambda t: t.repeat_interleave(2, dim=-1)[..., ::2],
    "expanded": lambda t: t[:, :1].expand(t.shape),
}


@pytest.mark.parametrize("layout", STRIDINGS)
def test_tangents_have_strides_of_their_own(layout: str) -> None:
    primals, tangents = draw(heads=(2, 2), seqlen_q=33, seqlen_k=40)
    strided = [STRIDINGS[layout](x) for x in tangents]
    expected = push("triton", primals, [x.contiguous() for x in strided], causal=True)
    for name, result in push("triton", primals, strided, causal=True).items():
        assert torch.equal(result, expected[name]), name


def test_tangents_that_are_known_to_be_zero() -> None:
    """PyTorch's own formulas make zero tensors without memory."""
    (q, k, v), (q_tangent, _, _) = draw(seqlen_q=9, seqlen_k=9)
    zeros = torch._efficientzerotensor(k.shape, dtype=k.dtype, device=DEVICE)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, q_tangent), forward_ad.make_dual(k, zeros), v
        out = forward_ad.unpack_dual(flash_attention(*dual, backend="triton"))
    expected = push("triton", [q, k, v], [q_tangent, None, None])["out_tangent"]
    assert out.tangent is not None
    assert torch.equal(out.tangent, expected)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)])
def test_empty(shape: tuple[int, int, int, int]) -> None:
    batch, heads, seqlen_q, seqlen_k = shape
    primals, tangents = draw(seqlen_q, seqlen_k, 8, 5, (heads, heads), batch)
    results = push("triton", primals, tangents, causal=True)
    assert results["out_tangent"].shape == (batch, heads, seqlen_q, 5)
    for name in ("out", "out_tangent", "lse_tangent"):
        assert (results[name] == 0).all()


OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "window": {"window_size": (1, 1), "softcap": 2.0},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_gradcheck(option: str, launches: list[Any]) -> None:
    leaves = [
        torch.randn(1, heads, 3, 2, dtype=torch.float64, device=DEVICE, requires_grad=True)
        for heads in (2, 1, 1)
    ]

    def attend(*tensors: Tensor) -> Any:
        return flash_attention(*tensors, return_lse=True, backend="triton", **OPTIONS[option])

    assert gradcheck(attend, leaves, check_forward_ad=True, check_backward_ad=False, fast_mode=True)
    assert launches


def test_results_and_tangents_are_differentiable(launches: list[Any]) -> None:
    """Reverse mode over forward mode, with the tangents' gradients too."""
    primals, tangents = draw(seqlen_q=5, seqlen_k=7, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (*primals, *tangents)]
    gradients = {}
    for name in ("triton", "tiled"):
        results = push(name, leaves[:3], leaves[3:], causal=True)
        loss = sum(x.masked_fill(x.isinf(), 0).sin().sum() for x in results.values())
        gradients[name] = torch.autograd.grad(loss, leaves)
    for actual, expected in zip(*gradients.values(), strict=True):
        torch.testing.assert_close(actual, expected)
    assert launches


def test_transforms_over_tangents(launches: list[Any]) -> None:
    (q, k, v), (tangent, *_) = draw(2, 3, head_dim=2, heads=(1, 1), dtype=torch.float64)

    def attend(name: str) -> Callable[[Tensor], Tensor]:
        return lambda q: flash_attention(q, k, v, causal=True, backend=name)

    def directional(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda q: torch.func.jvp(f, (q,), (tangent,))[1]

    for transform in (
        lambda f: torch.func.jacfwd(f)(q),
        lambda f: torch.vmap(directional(f))(torch.stack((q, q + 1))),
        lambda f: torch.func.grad(lambda q: directional(f)(q).sin().sum())(q),
        lambda f: directional(torch.func.grad(lambda q: f(q).sin().sum()))(q),
        lambda f: directional(directional(f))(q),
    ):
        launches.clear()
        torch.testing.assert_close(transform(attend("triton")), transform(attend("standard")))
        assert launches


def test_a_call_that_a_mode_sees_goes_through_tiled(launches: list[Any]) -> None:
    primals, tangents = draw(9, 9, dtype=torch.float64)
    expected = push("triton", primals, tangents, causal=True)
    launches.clear()
    with FlopCounterMode(display=False):
        results = push("triton", primals, tangents, causal=True)
    for name, result in results.items():
        torch.testing.assert_close(result, expected[name])
    assert not launches


def test_other_options_go_through_tiled(launches: list[Any]) -> None:
    primals, tangents = draw(seqlen_q=9, seqlen_k=9, dtype=torch.float64)
    for options in (
        {"attn_mask": torch.rand(9, 9, device=DEVICE) < 0.7},
        {"dropout_p": 0.3, "dropout_seed": 1},
    ):
        check(primals, tangents, **options)
    sinks, sinks_tangent = torch.randn(2, 2, dtype=torch.float64, device=DEVICE)

    def push_sinks(name: str) -> Any:
        attend = lambda sinks: flash_attention(*primals, sinks=sinks, backend=name)  # noqa: E731
        return torch.func.jvp(attend, (sinks,), (sinks_tangent,))

    torch.testing.assert_close(push_sinks("triton"), push_sinks("standard"))
    assert not launches
