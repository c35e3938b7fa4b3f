"""The language patched once a launch: the same numbers, and nothing left behind."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from flashlayer import flash_attention

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off")

PATCHED = (tl, tl.core, tl.math, tl.tensor, tl.dtype, tl.core.tensor_descriptor_base)

OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "top_left": {"causal": True, "diagonal": "top_left"},
    "window": {"window_size": (9, 3)},
    "softcap": {"softcap": 2.0},
    "scale": {"scale": -0.3},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25])},
    "sinks": {"sinks": torch.tensor([0.3, -1.0], requires_grad=True)},
    "both_sides_of_the_diagonal": {"window_size": (0, None), "softcap": 1.5},
    "dropout": {"dropout_p": 0.2, "dropout_seed": 5},
    "bool_mask": {"attn_mask": torch.arange(70) % 3 > 0},
    "float_mask": {"attn_mask": torch.linspace(-1, 1, 70).repeat(33, 1).requires_grad_()},
}


@triton.jit
def twice(x):
    return x * 2


@triton.jit
def sum_kernel(x_ptr, FAILS: tl.constexpr):
    """Two modules see the language here: this one, and Triton's own of ``tl.sum``."""
    x = tl.load(x_ptr + tl.arange(0, 16))
    tl.store(x_ptr, tl.sum(twice(twice(x))))
    tl.static_assert(not FAILS)


def language() -> list[tuple[str, Any]]:
    return [member for owner in PATCHED for member in inspect.getmembers(owner)]


def results(options: dict) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 2, s, 24, generator=generator) for s in (33, 70, 70))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    leaves += [x for x in options.values() if isinstance(x, Tensor) and x.requires_grad]
    out, lse = flash_attention(q, k, v, return_lse=True, backend="triton", **options)
    return [out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), leaves)]


@pytest.mark.parametrize("name", OPTIONS)
def test_results_are_those_of_a_language_patched_at_every_call(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = results(OPTIONS[name])
    monkeypatch.setattr(interpreter, "_patch_lang", interpreter._patch_lang.__wrapped__)
    always = results(OPTIONS[name])
    assert all(torch.equal(a, b) for a, b in zip(once, always, strict=True))


@pytest.mark.parametrize("fails", [False, True])
def test_the_language_is_restored_after_a_launch(fails: bool) -> None:
    before = language()
    x = torch.ones(16)
    if fails:
        with pytest.raises(interpreter.InterpreterError):
            sum_kernel[(1,)](x, FAILS=True)
    else:
        sum_kernel[(2,)](x, FAILS=False)
        assert x[0] == 4 * (4 * 16 + 15)  # the second program adds up what the first has written
    assert language() == before


def test_a_module_is_patched_once_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    patch_builtin = interpreter._patch_builtin
    monkeypatch.setattr(
        interpreter,
        "_patch_builtin",
        lambda owner, *rest: calls.append(owner) or patch_builtin(owner, *rest),
    )
    sum_kernel[(1,)](torch.ones(16), FAILS=False)
    one_program = len(calls)
    calls.clear()
    sum_kernel[(3,)](torch.ones(16), FAILS=False)
    assert 0 < one_program == len(calls)
