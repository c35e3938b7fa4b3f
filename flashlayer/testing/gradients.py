"""The gradient check: derivatives along one random direction, beside finite differences.

``torch.autograd.gradcheck`` calls the function twice for every element of every input, and
``gradgradcheck`` each time runs the backward pass too: for query, key and value of ``(1, 2, 9, 8)``
that is 864 calls and 1,188 calls with a backward pass, each a good part of a second in Triton's
interpreter. Here all inputs are moved at once in a random direction ``u``, and ``J u``,
from 4 calls, is compared with the gradients times ``u``. A wrong element of a gradient changes that
number with probability 1. Only if they differ, the first wrong element is located by bisection.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flashlayer.functional import flash_attention, flash_attention_varlen

Tensors = dict[str, Tensor]
Function = Callable[[Tensors], Tensors]

STEP = 1e-4
# Fourth-order central difference: error O(STEP^4) of truncation, O(1e-16 / STEP) of rounding.
WEIGHTS = {-2: 1 / 12, -1: -2 / 3, 1: 2 / 3, 2: -1 / 12}


def gradcheck(
    attention: str | nn.Module | Callable[..., Any],
    *inputs: Tensor,
    second_order: bool = False,
    tolerance: float = 1e-7,
    seed: int = 0,
    **options: Any,
) -> bool:
    """Compare the gradients of an attention with finite differences, in fp64; True if they agree.

    Every output's gradient is checked, that of lse too where it is returned, with respect to all
    inputs, floating options (``attn_mask``, ``sinks``) and parameters of a module. ``alibi_slopes``
    have no gradient. A call of the Triton kernels takes about 0.1 s in the interpreter, the whole
    check about 1 s, 5 s with ``second_order``.

    Args:
        attention: the name of a backend of :func:`flashlayer.flash_attention`, a function of
            ``(*inputs, **options)`` that returns one or several tensors, or a module. A module is
            copied.
        *inputs: what ``attention`` is called with; of floating tensors an fp64 copy. By default
            query, key and value of shape ``(1, 2, 9, 8)`` on torch's default device. A module has
            no default.
        second_order: also check the gradients of the gradients, also with respect to those that
            the backward pass gets.
        tolerance: the difference allowed, relative to the derivative where that exceeds 1.
        seed: of the inputs, the directions, and the generator in every call, so that dropout is the
            same in all of them.
        **options: passed to ``attention``. With a backend's name, those of ``flash_attention``, or
            ``flash_attention_varlen`` if ``cu_seqlens_q`` is among them.

    Raises:
        AssertionError: a gradient is wrong, or an output is NaN or not fp64. The message names the
            output, the input, the first wrong element, its derivative and the expected one.
        TypeError: a module without inputs.

    Example:
        >>> gradcheck("tiled", causal=True, sinks=torch.randn(2), second_order=True)
        True
        >>> gradcheck(torch.nn.functional.scaled_dot_product_attention, is_causal=True)
        True
    """
    # A generator that the checked function can't touch, and not with ``seed`` itself: inputs drawn
    # after ``torch.manual_seed(0)`` would be equal to what it draws.
    generator = torch.Generator().manual_seed(seed + 1_000_003)
    if not inputs:
        if isinstance(attention, nn.Module):
            raise TypeError("inputs must be given for a module, got none")
        inputs = tuple(_draw_like(torch.empty(3, 1, 2, 9, 8, dtype=torch.float64), generator))
    with torch.random.fork_rng(sorted({x.device.index for x in inputs if x.is_cuda})):
        function, leaves = _as_function(attention, inputs, options, seed)
        outputs = _check(function, leaves, generator, tolerance)
        if second_order:
            leaves |= {f"grad_{name}": _draw_like(x, generator) for name, x in outputs.items()}
            _check(_gradients_of(function), leaves, generator, tolerance)
    return True


def _draw_like(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(x.shape, dtype=x.dtype, generator=generator, device="cpu").to(x.device)


def _as_function(
    attention: Any, inputs: tuple[Tensor, ...], options: dict[str, Any], seed: int
) -> tuple[Function, Tensors]:
    """``attention`` as a function of its differentiable tensors by name, and these tensors."""
    if isinstance(attention, str):
        options = options | {"backend": attention, "return_lse": True}
        attention = flash_attention_varlen if "cu_seqlens_q" in options else flash_attention
    module = copy.deepcopy(attention).double() if isinstance(attention, nn.Module) else None
    positional = _argument_names(attention if module is None else module.forward, len(inputs))
    arguments = dict(zip(positional, inputs, strict=True)) | options
    parameters: Tensors = {}
    if module is not None:
        parameters = {n: x.detach() for n, x in module.named_parameters() if x.requires_grad}
    leaves = {
        name: x.detach().to(torch.float64, copy=True)
        for name, x in arguments.items()
        if isinstance(x, Tensor) and x.is_floating_point() and name != "alibi_slopes"
    }

    def function(tensors: Tensors) -> Tensors:
        torch.manual_seed(seed)
        keywords = arguments | {name: tensors[name] for name in leaves}
        args = tuple(keywords.pop(name) for name in positional)
        if module is None:
            return _named(attention(*args, **keywords))
        moved = {name: tensors[name] for name in parameters}
        return _named(torch.func.functional_call(module, moved, args, keywords))

    return function, leaves | parameters


def _argument_names(function: Callable[..., Any], count: int) -> list[str]:
    """Names of the first positional arguments, as the function calls them where it tells."""
    names = ["query", "key", "value"]
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # a builtin
        parameters = ()
    if found := [x.name for x in parameters if x.kind is x.POSITIONAL_OR_KEYWORD]:
        names = found
    return (names + [f"input {index}" for index in range(len(names), count)])[:count]


def _named(result: Any) -> Tensors:
    outputs = result if isinstance(result, tuple) else (result,)
    names = ("out", "lse", *(f"output {index}" for index in range(2, len(outputs))))
    return {
        name: x
        for name, x in zip(names, outputs, strict=False)
        if isinstance(x, Tensor) and x.is_floating_point()
    }


def _gradients_of(function: Function) -> Function:
    """The backward pass as a function of the inputs and of ``grad_<output>``."""

    def gradients(tensors: Tensors) -> Tensors:
        create_graph = torch.is_grad_enabled()
        leaves = {name: x for name, x in tensors.items() if not name.startswith("grad_")}
        if not create_graph:
            leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
        with torch.enable_grad():
            outputs = function(leaves)
            cotangents = {name: tensors[f"grad_{name}"] for name in outputs}
            grads = _backward(outputs, cotangents, leaves, create_graph=create_graph)
        return {f"d{name}": grad for name, grad in grads.items()}

    return gradients


def _backward(outputs: Tensors, cotangents: Tensors, leaves: Tensors, **options: Any) -> Tensors:
    """Gradients of ``leaves``; zero where an output does not depend on one."""
    tracked = [name for name, x in outputs.items() if x.requires_grad]
    if not tracked:
        return {name: torch.zeros_like(x) for name, x in leaves.items()}
    # A row that sees no key has lse = -inf, a constant.
    finite = [torch.where(outputs[name].isfinite(), cotangents[name], 0) for name in tracked]
    tensors = [outputs[name] for name in tracked], list(leaves.values()), finite
    grads = torch.autograd.grad(*tensors, materialize_grads=True, **options)
    return dict(zip(leaves, grads, strict=True))


def _check(
    function: Function, leaves: Tensors, generator: torch.Generator, tolerance: float
) -> Tensors:
    """Check the gradients of every output of ``function``; returns the outputs."""
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    outputs = function(leaves)
    for name, x in outputs.items():
        if x.dtype != torch.float64:
            raise AssertionError(f"{name} must be fp64 for fp64 inputs, got {x.dtype}")
        if x.isnan().any() or (x == torch.inf).any():
            raise AssertionError(f"{name} has elements that are NaN or infinite")
    cotangents = {name: _draw_like(x, generator) for name, x in outputs.items()}
    direction = {name: _draw_like(x, generator) for name, x in leaves.items()}
    moved = _Differences(function, leaves, cotangents)
    expected = moved.along(direction)
    for output, x in outputs.items():
        grads = _backward({output: x}, cotangents, leaves, retain_graph=True)
        grads = {name: grad.detach() for name, grad in grads.items()}
        found = sum((grads[name] * direction[name]).sum().item() for name in leaves)
        if not _close(found, expected[output], tolerance):
            moved.locate(output, grads, direction, tolerance)
    return {name: x.detach() for name, x in outputs.items()}


def _close(found: float, expected: float, tolerance: float) -> bool:
    return abs(found - expected) <= tolerance * max(1.0, abs(expected))


class _Differences:
    """Derivatives of ``<cotangent, output>`` by finite differences."""

    def __init__(self, function: Function, leaves: Tensors, cotangents: Tensors) -> None:
        self.function, self.cotangents = function, cotangents
        self.leaves = {name: x.detach() for name, x in leaves.items()}

    @torch.no_grad()
    def along(self, direction: Tensors) -> dict[str, float]:
        """The derivative of each output in a direction; other inputs stay as they are."""
        derivatives = dict.fromkeys(self.cotangents, 0.0)
        for steps, weight in WEIGHTS.items():
            moved = {name: steps * STEP * x for name, x in direction.items()}
            moved = {name: x + moved.get(name, 0) for name, x in self.leaves.items()}
            for name, output in self.function(moved).items():
                output = torch.where(output == -torch.inf, 0, output)
                total = (self.cotangents[name] * output).sum().item()
                derivatives[name] += weight / STEP * total
        return derivatives

    def locate(self, output: str, grads: Tensors, direction: Tensors, tolerance: float) -> None:
        """Raise an error that names the first wrong element of the gradients of ``output``."""

        def found_and_expected(name: str, u: Tensor, start: int, stop: int) -> tuple[float, float]:
            """Derivatives where elements ``start`` to ``stop`` of an input move by ``u``."""
            part = torch.zeros_like(u).flatten()
            part[start:stop] = u.flatten()[start:stop]
            found = (grads[name].flatten() * part)[start:stop].sum().item()
            return found, self.along({name: part.view(u.shape)})[output]

        for name, u in direction.items():
            start, stop = 0, u.numel()
            if _close(*found_and_expected(name, u, start, stop), tolerance):
                continue
            while stop - start > 1:
                middle = (start + stop) // 2
                if _close(*found_and_expected(name, u, start, middle), tolerance):
                    start = middle
                else:
                    stop = middle
            found, expected = found_and_expected(name, torch.ones_like(u), start, stop)
            index = [int(i) for i in torch.unravel_index(torch.tensor(start), u.shape)]
            raise AssertionError(
                f"the gradient of {output} with respect to {name} is wrong: {index} is "
                f"{found:.8g}, expected {expected:.8g} by finite differences"
            )
        raise AssertionError(f"the gradients of {output} differ from finite differences")
