"""What is left of a kernel's source when its options are taken out."""

import ast
import textwrap
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from benchmarks.strip import strip_source  # noqa: E402


def jit(function: Any) -> Any:
    """Compiled kernels' type, also where ``triton.jit`` makes interpreted ones."""
    return triton.JITFunction(function, do_not_specialize=None)


@jit
def scaled(x, factor, cap, bias=None, shift=None):
    """A docstring that names the cap."""
    if cap is not None:
        x = x / cap
    if factor is not None and bias is not None:
        x += bias
    if shift is None:
        shift = 1
    return x * factor + shift


@jit
def kernel(x_ptr, factor, cap_ptr, bias_ptr, threshold, CAPPED):
    bias = None
    cap = cap_ptr if CAPPED else None
    if bias_ptr is not None:
        bias = bias_ptr + threshold
    MODIFIED = CAPPED or bias_ptr is not None
    if not MODIFIED:
        x_ptr += scaled(x_ptr, factor, cap, bias=bias)
    else:
        x_ptr += 1
    for _ in range(3):
        if bias is None and x_ptr:
            x_ptr += scaled(x_ptr, factor, factor)


@jit
def reassigns(x_ptr, bias):
    bias = x_ptr if bias is None else bias
    return bias + 1


def same_source(text: str, expected: str) -> bool:
    return ast.dump(ast.parse(text)) == ast.dump(ast.parse(textwrap.dedent(expected)))


def test_options_that_are_off_leave_no_trace() -> None:
    arguments = {"x_ptr": 1, "factor": 2, "cap_ptr": 3, "threshold": 4}
    source = strip_source(kernel, arguments | {"bias_ptr": None, "CAPPED": False})
    assert source.name == "kernel"
    expected = """
        @jit
        def scaled(x, factor, shift):
            if shift is None:
                shift = 1
            return x * factor + shift

        @jit
        def scaled_2(x, factor, cap, shift):
            if cap is not None:
                x = x / cap
            if shift is None:
                shift = 1
            return x * factor + shift

        @jit
        def kernel(x_ptr, factor):
            x_ptr += scaled(x=x_ptr, factor=factor, shift=None)
            for _ in range(3):
                if x_ptr:
                    x_ptr += scaled_2(x=x_ptr, factor=factor, cap=factor, shift=None)
    """
    assert same_source(source.text, expected), source.text


def test_an_option_that_is_on_stays() -> None:
    arguments = {"x_ptr": 1, "factor": 2, "cap_ptr": 3, "threshold": 4, "bias_ptr": 5}
    source = strip_source(kernel, arguments | {"CAPPED": False})
    assert "bias_ptr + threshold" in source.text
    assert "cap_ptr" not in source.text
    assert "x_ptr += 1" in source.text


def test_an_option_that_stays_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"reassigns still knows.*bias"):
        strip_source(reassigns, {"x_ptr": 1, "bias": None})
