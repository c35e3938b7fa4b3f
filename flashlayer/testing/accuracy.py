"""The accuracy rule: results beside those of the formula in fp64 and in their own dtype."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashlayer.functional import flash_attention, flash_attention_varlen
from flashlayer.testing.bounds import exponential_error, recomputation_noise

FACTORS = {"out": 2, "lse": 2}
GRADIENT_FACTOR = 3
GRADIENTS = ("dq", "dk", "dv", "dattn_mask", "dsinks")

Results = dict[str, Tensor]
Attention = str | Callable[..., Any]
"""The name of a backend, or a function of ``(query, key, value, **options)``."""


def assert_attention_close(
    actual: Attention | Tensor | tuple[Tensor, Tensor] | Mapping[str, Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grad_out: Tensor | None = None,
    grad_lse: Tensor | None = None,
    gradients: bool = True,
    with_noise: bool = False,
    **options: Any,
) -> Results:
    """Compare outputs and gradients with standard attention in fp64, by the module's rule.

    Args:
        actual: what is judged. A function ``attention(query, key, value, **options)`` that returns
            ``out`` or ``(out, lse)``: it is run forward and backward. Or the name of a backend of
            :func:`flashlayer.flash_attention`. Or results: ``out``, ``(out, lse)``, or a mapping to
            tensors from some of ``"out"``, ``"lse"``, ``"dq"``, ``"dk"``, ``"dv"``,
            ``"dattn_mask"``, ``"dsinks"``.
        query: ``(B, H, Sq, D)``, or ``(Tq, H, D)`` with the option ``cu_seqlens_q``.
        key: ``(B, Hkv, Sk, D)`` or ``(Tk, Hkv, D)``.
        value: ``(B, Hkv, Sk, Dv)`` or ``(Tk, Hkv, Dv)``.
        grad_out: the gradient of ``out``. Required for a mapping with gradients, else drawn from
            torch's generator if None.
        grad_lse: the gradient of ``lse``. Zero for a mapping if None, else drawn.
        gradients: False compares only the outputs of a function.
        with_noise: add :func:`recomputation_noise` to the bounds, for problems where the formula's
            own error may be zero by luck, such as rows that see one key.
        **options: those of :func:`flashlayer.flash_attention`, or of ``flash_attention_varlen``
            where ``cu_seqlens_q`` is among them. A function in ``actual`` gets them too.

    Returns:
        The results that were compared, by name.

    Raises:
        AssertionError: a result is off by more than its bound. The message names the tensor, the
            first such index, its value, the expected one, the bound, and how many elements are off.
        ValueError: a mapping has an unknown name, or gradients without ``grad_out``.

    ATen's CPU kernel has an exponential that is less accurate than ``torch.exp``. For the backends
    ``"aten"`` and ``"auto"`` :func:`exponential_error` is added to the bounds on the CPU.

    Example:
        >>> def my_attention(query, key, value, causal):
        ...     scores = query @ key.mT / query.shape[-1] ** 0.5
        ...     hidden = torch.ones_like(scores, dtype=torch.bool).triu(1) if causal else False
        ...     return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value
        >>> q, k, v = torch.randn(3, 1, 4, 65, 32, dtype=torch.bfloat16)
        >>> sorted(assert_attention_close(my_attention, q, k, v, causal=True))
        ['dk', 'dq', 'dv', 'out']
    """
    do, dlse = _draw_gradients(query, value)
    do = do if grad_out is None else grad_out
    if isinstance(actual, str) or callable(actual):
        dlse = dlse if grad_lse is None else grad_lse
        results = run(actual, query, key, value, do, dlse, gradients=gradients, **options)
    else:
        results = _as_results(actual)
        gradients = any(name in GRADIENTS for name in results)
        if gradients and grad_out is None:
            raise ValueError("grad_out must be given with gradients to compare, got None")
        dlse = torch.zeros_like(dlse) if grad_lse is None else grad_lse
    if "lse" not in results and grad_lse is None:
        dlse = torch.zeros_like(dlse)
    backend = options.pop("backend", "auto") if _is_ours(actual) else actual
    options = {n: x for n, x in options.items() if n not in ("backend", "return_lse")}
    tensors = (query, key, value, do, dlse)
    wide = [x.double() for x in tensors]
    wide_options = {
        name: option.double() if _is_float(option) and name != "alibi_slopes" else option
        for name, option in options.items()
    }
    same_dtype = run("standard", *tensors, gradients=gradients, **options)
    reference = run("standard", *wide, gradients=gradients, **wide_options)
    noise = recomputation_noise(*wide, **wide_options) if with_noise else {}
    exponential = {}
    if backend in ("aten", "auto") and query.is_cpu and query.dtype != torch.float64:
        exponential = exponential_error(*wide, dtype=query.dtype, **wide_options)
    for name, result in results.items():
        slack = noise.get(name, 0.0) * torch.finfo(query.dtype).eps + exponential.get(name, 0.0)
        factor = FACTORS.get(name, GRADIENT_FACTOR)
        assert_accurate(name, result, same_dtype[name], reference[name], factor, slack)
    return results


def run(
    attention: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    dlse: Tensor,
    *,
    gradients: bool = True,
    **options: Any,
) -> Results:
    """Forward, and backward through out and lse, to every input that has a gradient.

    ``attention`` and ``options`` as in :func:`assert_attention_close`. The results have its names:
    ``"lse"`` if ``attention`` returns it, the gradients unless ``gradients`` is False.

    Raises:
        AssertionError: an output has no gradient.
    """
    leaves = {"q": q, "k": k, "v": v}
    leaves |= {n: options[n] for n in ("attn_mask", "sinks") if _is_float(options.get(n))}
    leaves = {name: leaf.detach().requires_grad_(gradients) for name, leaf in leaves.items()}
    options |= {name: leaf for name, leaf in leaves.items() if name in options}
    if isinstance(attention, str):
        options["backend"] = attention
        attention = flash_attention_varlen if "cu_seqlens_q" in options else flash_attention
    if _is_ours(attention):
        options["return_lse"] = True
    outputs = _as_results(attention(leaves["q"], leaves["k"], leaves["v"], **options))
    results = {name: output.detach() for name, output in outputs.items()}
    if not gradients:
        return results
    for name, output in outputs.items():
        if not output.requires_grad:
            raise AssertionError(f"{name} has no gradient; gradients=False compares outputs only")
    cotangents = [do]
    if "lse" in outputs:
        # A row without keys has lse = -inf, a constant: it has no gradient to pass on.
        cotangents.append(torch.where(outputs["lse"].isfinite(), dlse, 0))
    grads = torch.autograd.grad(tuple(outputs.values()), tuple(leaves.values()), cotangents)
    return results | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


class Comparison(NamedTuple):
    """A result beside the fp64 reference.

    Attributes:
        error: ``|actual - reference|`` of each element; infinite for NaN.
        bound: the largest error that the rule allows.
    """

    error: Tensor
    bound: float

    @property
    def ratio(self) -> float:
        """The largest error over the bound: at most 1 for a result within it."""
        largest = self.error.max().item() if self.error.numel() else 0.0
        if not largest:
            return 0.0
        return largest / self.bound if self.bound else math.inf


def compare(
    actual: Tensor, same_dtype: Tensor, reference: Tensor, factor: float, noise: float = 0.0
) -> Comparison:
    """One result's errors and their bound: ``factor`` times that of ``same_dtype``, and ``noise``.

    ``same_dtype`` and ``reference`` are what standard attention gives in its dtype and in fp64.
    """
    # The lse of a row without keys is -inf on both sides; any other infinity is an error.
    infinite = reference == -torch.inf
    misplaced = infinite != (actual == -torch.inf)
    dtype = actual.dtype
    actual, same_dtype, reference = (
        torch.where(infinite, 0.0, x.double()) for x in (actual, same_dtype, reference)
    )
    error = (actual - reference).abs().nan_to_num(torch.inf).masked_fill(misplaced, torch.inf)
    if error.numel() == 0:
        return Comparison(error, noise)
    if dtype == torch.float64:  # no wider reference: rounding of lse (up to ~500) in exp
        return Comparison(error, 1e-12 * max(1.0, reference.abs().max().item()) + noise)
    rounded = reference.to(dtype)
    floor = 2 * ((rounded + 0.3 - 0.3) - rounded).abs().max().item()
    return Comparison(error, factor * (same_dtype - reference).abs().max().item() + floor + noise)


def assert_accurate(
    name: str,
    actual: Tensor,
    same_dtype: Tensor,
    reference: Tensor,
    factor: float,
    noise: float = 0.0,
) -> None:
    """:func:`compare` for a result called ``name``; nothing may exceed the bound.

    Raises:
        AssertionError: as :func:`assert_attention_close`, also for another dtype or shape than that
            of ``same_dtype``.
    """
    for attribute in ("dtype", "shape"):
        found, expected = getattr(actual, attribute), getattr(same_dtype, attribute)
        if found != expected:
            raise AssertionError(f"{name} has {attribute} {found}, expected {expected}")
    error, bound = compare(actual, same_dtype, reference, factor, noise)
    bad = ~(error <= bound)  # also if the bound is NaN
    if bad.any():
        index = tuple(bad.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}{list(index)} is {actual[index].item():.8g}, expected "
            f"{reference[index].item():.8g}; {int(bad.sum())} of {bad.numel()} elements are off by "
            f"more than {bound:.3g}, at most by {error.max().item():.3g}"
        )


def _draw_gradients(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Random gradients of out and lse."""
    shape = (*query.shape[:-1], value.shape[-1])
    do = torch.randn(shape, dtype=query.dtype, device=query.device)
    rows = query.shape[:-1] if query.ndim == 4 else (query.shape[1], query.shape[0])
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return do, torch.randn(rows, dtype=lse_dtype, device=query.device)


def _is_ours(attention: object) -> bool:
    return attention is flash_attention or attention is flash_attention_varlen


def _as_results(actual: Any) -> Results:
    if not isinstance(actual, Mapping):
        outputs = actual if isinstance(actual, tuple) else (actual,)
        return dict(zip(FACTORS, outputs, strict=False))
    for name in actual:
        if name not in (*FACTORS, *GRADIENTS):
            known = ", ".join((*FACTORS, *GRADIENTS))
            raise ValueError(f"the names of results must be among {known}, got {name!r}")
    return dict(actual)


def _is_float(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()
