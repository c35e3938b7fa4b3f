"""Tells right from wrong in exercise_6.py."""

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_softmax_backward(answers: ModuleType) -> None:
    scores, dp = (2 * normal(4, 9)).requires_grad_(), normal(4, 9, seed=1)
    p = torch.softmax(scores, -1)
    (expected,) = torch.autograd.grad(p, scores, dp)
    torch.testing.assert_close(answers.softmax_backward(p.detach(), dp), expected)


def test_softcap_backward(answers: ModuleType) -> None:
    for softcap in (0.7, 1.0, 30.0):
        x, ds = (2 * normal(5, 6)).requires_grad_(), normal(5, 6, seed=1)
        scores = softcap * torch.tanh(x / softcap)
        (expected,) = torch.autograd.grad(scores, x, ds)
        result = answers.softcap_backward(scores.detach(), ds, softcap)
        torch.testing.assert_close(result, expected)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    scores = scale * q @ k.mT
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
    return torch.softmax(scores, -1) @ v, torch.logsumexp(scores, -1)


def test_attention_backward(answers: ModuleType) -> None:
    q, k, v, do = normal(5, 4), normal(7, 4, seed=1), normal(7, 4, seed=2), normal(5, 4, seed=3)
    for scale in (0.5, 1.7):
        for dlse in (torch.zeros(5, dtype=torch.float64), normal(5, seed=4)):
            inputs = [x.clone().requires_grad_() for x in (q, k, v)]
            out, lse = attention(*inputs, scale, causal=False)
            expected = torch.autograd.grad((out, lse), inputs, (do, dlse))
            result = answers.attention_backward(
                q, k, v, out.detach(), lse.detach(), do, dlse, scale
            )
            for name, gradient, right in zip(("dq", "dk", "dv"), result, expected, strict=True):
                torch.testing.assert_close(
                    gradient, right, msg=lambda text, name=name: f"{name}: {text}"
                )


class Sizes(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run it and look at what came out."""
        result = op(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
        return result


def test_key_block_gradients(answers: ModuleType) -> None:
    length, scale = 40, 0.6
    q, k, v, do = (normal(length, 3, seed=seed) for seed in range(4))
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = attention(*inputs, scale, causal=True)
    dlse = normal(length, seed=4)
    _, dk, dv = torch.autograd.grad((out, lse), inputs, (do, dlse))
    lse, delta = lse.detach(), (out.detach() * do).sum(-1) - dlse
    for start, stop, block_m in ((0, 8, 8), (16, 24, 4), (8, 24, 16), (32, 40, 16), (24, 40, 7)):
        with Sizes() as sizes:
            result = answers.key_block_gradients(
                start, stop, q, k, v, lse, delta, do, scale, block_m
            )
        for name, gradient, right in zip(("dk", "dv"), result, (dk, dv), strict=True):
            torch.testing.assert_close(
                gradient, right[start:stop], msg=lambda text, name=name: f"{name}: {text}"
            )
        allowed = max(q.numel(), block_m * (stop - start))
        assert sizes.largest <= allowed, f"a tensor of {sizes.largest} numbers was made"


def test_key_block_gradients_leave_out_what_nobody_sees(answers: ModuleType) -> None:
    length = 24
    q, k, v, do = (normal(length, 3, seed=seed) for seed in range(4))
    out, lse = attention(q, k, v, 0.6, causal=True)
    delta = (out * do).sum(-1)
    expected = answers.key_block_gradients(16, 24, q, k, v, lse, delta, do, 0.6, 8)
    q[:16] = math.nan  # queries that see no key of this block
    result = answers.key_block_gradients(16, 24, q, k, v, lse, delta, do, 0.6, 8)
    torch.testing.assert_close(result, expected)
