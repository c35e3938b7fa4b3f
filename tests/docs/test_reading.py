"""The helpers that show the kernels' source in notebooks."""

import inspect
import math
from types import SimpleNamespace

import pytest
import torch
from IPython.display import Markdown

from docs.chapter.reading import Reader, array, row_count, source, watching


def kernel(x):
    """Stands in for a kernel."""
    total = 0
    for i in range(x):
        total += i
        total -= 1
    return total


JITTED = SimpleNamespace(fn=kernel)


def code(piece: Markdown) -> str:
    assert piece.data.startswith("```python\n")
    assert piece.data.endswith("\n```")
    return piece.data.removeprefix("```python\n").removesuffix("\n```")


def test_pieces_are_consecutive_and_complete() -> None:
    reader = Reader(JITTED)
    assert code(reader.until('"""Stands')) == 'def kernel(x):\n    """Stands in for a kernel."""'
    assert code(reader.until("for i", "total -=")).startswith("total = 0\nfor i in range(x):\n")
    assert code(reader.rest()) == "return total"
    assert code(source(JITTED)) == inspect.getsource(kernel).rstrip()


def test_skipping() -> None:
    reader = Reader(JITTED)
    reader.skip_to("total +=")
    assert code(reader.until("total -=")) == "total += i\ntotal -= 1"


def test_a_missing_mark_is_an_error() -> None:
    reader = Reader(JITTED)
    reader.until("for i")
    with pytest.raises(LookupError, match="no line has 'total = 0' in it"):
        reader.until("total = 0")


def test_watching_ends_also_after_an_error() -> None:
    calls = []

    def roots() -> None:
        with watching(math, "sqrt", lambda arguments, result: calls.append((arguments, result))):
            math.sqrt(9.0)
            math.sqrt(-1.0)

    with pytest.raises(ValueError, match=r"domain|nonnegative"):
        roots()
    assert calls == [((9.0,), 3.0)]
    assert math.sqrt(4.0) == 2
    assert len(calls) == 1


def test_numbers_of_the_interpreter() -> None:
    def tensor(values: list) -> SimpleNamespace:
        return SimpleNamespace(handle=SimpleNamespace(data=torch.tensor(values).numpy()))

    assert array(tensor([1.0, 2.0])).tolist() == [1, 2]
    assert row_count(tensor([4, 5, 6]), None) == 3
    assert row_count(tensor([4, 5, 6]), tensor([True, False, True])) == 2
