"""A call like an earlier one is not checked again; whatever makes it another call is seen."""

import warnings
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from flashlayer import flash_attention, functional, plans
from flashlayer.problem import build_problem
from flashlayer.spec import NO_EXTRAS


@pytest.fixture(autouse=True)
def no_plans(monkeypatch: pytest.MonkeyPatch) -> dict[Any, Any]:
    empty: dict[Any, Any] = {}
    monkeypatch.setattr(plans, "PLANS", empty)
    return empty


def test_the_second_call_is_not_checked(
    no_plans: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    q = torch.randn(1, 2, 9, 8)
    first = flash_attention(q, q, q, causal=True)
    assert len(no_plans) == 1
    monkeypatch.setattr(functional, "build_problem", pytest.fail)
    assert torch.equal(
        torch.as_tensor(flash_attention(q, q, q, causal=True)), torch.as_tensor(first)
    )


def test_a_masked_call_has_a_plan_for_masks_of_one_form(no_plans: dict[Any, Any]) -> None:
    """A mask to be reshaped, or expanded by its caller, is checked at every call."""
    q = torch.randn(2, 2, 9, 8)
    for shape in ((2, 1, 1, 9), (1, 1, 9, 9), (2, 2, 9, 9)):
        for mask in (torch.rand(shape) < 0.5, torch.randn(shape), torch.randn(shape)):
            for _ in range(2):
                out = torch.as_tensor(flash_attention(q, q, q, attn_mask=mask))
                exact = flash_attention(q, q, q, attn_mask=mask, backend="standard")
                torch.testing.assert_close(out, torch.as_tensor(exact))
    assert len({key for key in no_plans if "auto" in key}) == 6
    no_plans.clear()
    for mask in (torch.randn(9, 9), torch.randn(1, 1, 9, 9).expand(2, -1, -1, -1)):
        flash_attention(q, q, q, attn_mask=mask)
    assert not no_plans


@pytest.mark.parametrize(
    "change",
    [
        {"causal": False},
        {"scale": 0.5},
        {"softcap": 2.0},
        {"diagonal": "top_left"},
        {"backend": "tiled"},
        {"window_size": (2, None)},
        {"window_size": (None, 2)},
        {"attn_mask": torch.rand(9, 12)},
        {"sinks": torch.rand(2)},
        {"alibi_slopes": torch.rand(2)},
    ],
    ids=str,
)
def test_another_option_is_another_call(change: dict[str, Any]) -> None:
    q, k, v = (torch.randn(1, 2, seqlen, 8) for seqlen in (9, 12, 12))
    call: dict[str, Any] = {"causal": True}
    for _ in range(2):
        flash_attention(q, k, v, **call)
        out = torch.as_tensor(flash_attention(q, k, v, **call | change))
        options = call | change | {"backend": "standard"}
        torch.testing.assert_close(out, torch.as_tensor(flash_attention(q, k, v, **options)))


@pytest.mark.parametrize(
    "change",
    [
        {"scale": True},
        {"softcap": True},
        {"dropout_p": False},
        {"window_size": (True, None)},
        {"window_size": (1.0, None)},
        {"window_size": (1,)},
        {"diagonal": "left"},
        {"backend": "fastest"},
        {"backend": ["auto"]},
        {"key": torch.randn(1, 2, 9, 7)},
        {"key": torch.randn(1, 2, 9, 8, dtype=torch.float64)},
        {"value": torch.randn(1, 2, 8, 8)},
        {"value": torch.randn(1, 2, 9, 8, device="meta")},
        {"key": [1.0]},
    ],
    ids=str,
)
def test_a_mistake_is_told_after_a_call_that_equals_it(change: dict[str, Any]) -> None:
    """True equals 1.0, so the calls before it have the same signature but for the type."""
    q = torch.randn(1, 2, 9, 8)
    call: dict[str, Any] = {"query": q, "key": q, "value": q}
    flash_attention(**call)
    for option in ("scale", "softcap"):
        flash_attention(**call, **{option: 1.0})
    flash_attention(**call, window_size=(1, None))
    for _ in range(2):
        with pytest.raises((TypeError, ValueError)):
            flash_attention(**call | change)


def test_autocast_is_seen() -> None:
    q = torch.randn(1, 2, 9, 8)
    dtypes = []
    for _ in range(2):
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                dtypes.append(torch.as_tensor(flash_attention(q, q, q)).dtype)
                half = q.bfloat16()
                dtypes.append(torch.as_tensor(flash_attention(half, half, half)).dtype)
    assert dtypes == 2 * [torch.float32, torch.bfloat16, torch.bfloat16, torch.bfloat16]


def test_a_key_that_autocast_casts_is_cast_every_time() -> None:
    q = torch.randn(1, 2, 9, 8, dtype=torch.bfloat16)
    k = torch.randn(1, 2, 9, 8)
    with torch.autocast("cpu", torch.bfloat16):
        expected = torch.as_tensor(flash_attention(q, k.bfloat16(), q))
        for _ in range(2):
            assert torch.equal(torch.as_tensor(flash_attention(q, k, q)), expected)


def test_what_is_tracked_is_seen() -> None:
    """auto takes another backend for gradients in fp16."""
    q = torch.randn(1, 1, 9, 8, dtype=torch.float16)
    tracked = q.clone().requires_grad_()
    for _ in range(2):
        assert not torch.as_tensor(flash_attention(q, q, q)).requires_grad
        (gradient,) = torch.autograd.grad(
            torch.as_tensor(flash_attention(tracked, q, q)).sum(), tracked
        )
        assert gradient.isfinite().all()
    backends = {plan.backend.name for plan in plans.PLANS.values()}
    assert backends == {"aten", "tiled"}


def test_transforms_work_on_a_planned_call() -> None:
    q = torch.randn(3, 1, 2, 9, 8)

    def attend(x: Tensor) -> Tensor:
        return torch.as_tensor(flash_attention(x, x, x, causal=True))

    expected = torch.stack([attend(x) for x in q])
    torch.testing.assert_close(torch.vmap(attend)(q), expected)
    out, tangent = torch.func.jvp(attend, (q[0],), (q[0],))
    torch.testing.assert_close(out, expected[0])
    assert tangent.count_nonzero() > 0


def test_a_compiled_graph_does_not_depend_on_them() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()

    def attend(x: Tensor) -> Any:
        return flash_attention(x, x, x, causal=True)

    compiled = torch.compile(attend, backend=counter, fullgraph=True)
    q = torch.randn(1, 2, 9, 8)
    for seqlen in range(1, 4):
        compiled(q)
        attend(torch.randn(1, 2, seqlen, 8))
    assert counter.frame_count == 1
    assert len(plans.PLANS) == 3


@pytest.mark.parametrize("backend", ["aten", "triton"])
def test_a_trace_of_torch_jit_makes_none(backend: str, no_plans: dict[Any, Any]) -> None:
    def attend(x: Tensor) -> Any:
        return flash_attention(x, x, x, backend=backend)

    q, other = torch.randn(2, 1, 2, 9, 8)
    with warnings.catch_warnings(action="ignore"):
        traced = torch.jit.trace(attend, (q,), check_trace=False)
    assert not no_plans
    torch.testing.assert_close(traced(other), attend(other))


def test_their_number_is_bounded(no_plans: dict[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "PLANS_MAX", 3)
    q = torch.randn(1, 1, 1, 8)
    for keys in range(1, 10):
        k = torch.randn(1, 1, keys, 8)
        flash_attention(q, k, k)
        assert len(no_plans) <= 3


@pytest.mark.parametrize("window_size", [(3, None), (None, 2), (3, 2), (None, None)], ids=str)
def test_a_window_of_exact_ints_has_a_plan(
    window_size: Any, no_plans: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    q = torch.randn(1, 2, 9, 8)
    first = torch.as_tensor(flash_attention(q, q, q, window_size=window_size))
    exact = flash_attention(q, q, q, window_size=window_size, backend="standard")
    torch.testing.assert_close(first, torch.as_tensor(exact))
    assert len(no_plans) == 2
    monkeypatch.setattr(functional, "build_problem", pytest.fail)
    assert torch.equal(torch.as_tensor(flash_attention(q, q, q, window_size=window_size)), first)


@pytest.mark.parametrize("window_size", [[3, None], torch.Size((3, 2))], ids=str)
def test_a_window_in_another_form_is_checked_every_time(
    window_size: Any, no_plans: dict[Any, Any]
) -> None:
    q = torch.randn(1, 2, 9, 8)
    out = torch.as_tensor(flash_attention(q, q, q, window_size=window_size))
    assert not no_plans
    expected = flash_attention(q, q, q, window_size=tuple(window_size))
    assert torch.equal(out, torch.as_tensor(expected))


def test_a_call_without_a_plan_gives_autograd_no_unused_extras() -> None:
    q = torch.randn(1, 2, 9, 8)
    assert build_problem(q, q, q, causal=True).extras is NO_EXTRAS
    assert build_problem(q, q, q, sinks=torch.zeros(2)).extras is not NO_EXTRAS
