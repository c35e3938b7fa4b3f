"""To read the kernels where they are, and to watch them run.

A notebook never holds a copy of the library's source. It shows what stands in the installed file,
so a kernel that changes makes the committed page stale, and the test says so.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from IPython.display import Markdown
from torch import Tensor


class Reader:
    """Goes through the source of a kernel in pieces; each begins where the one before ended."""

    def __init__(self, kernel: Any) -> None:
        # What triton.jit returns keeps the Python function it was made of.
        self.lines = inspect.getsource(kernel.fn).splitlines()
        self.position = 0

    def until(self, *marks: str) -> Markdown:
        """The next piece, up to and with the line that has the mark in it.

        With several marks: the first one, from there on the second, and so on.
        """
        stop = self.position
        for mark in marks:
            stop = self._find(mark, stop)
        return self._show(stop + 1)

    def skip_to(self, mark: str) -> None:
        """Leave out what stands before the line that has the mark in it."""
        self.position = self._find(mark, self.position)

    def rest(self) -> Markdown:
        """All that is left."""
        return self._show(len(self.lines))

    def _find(self, mark: str, start: int) -> int:
        for number in range(start, len(self.lines)):
            if mark in self.lines[number]:
                return number
        raise LookupError(f"no line has {mark!r} in it, from here on:\n{self._code(start, None)}")

    def _show(self, stop: int) -> Markdown:
        piece = self._code(self.position, stop)
        self.position = stop
        return Markdown(f"```python\n{piece}\n```")

    def _code(self, start: int, stop: int | None) -> str:
        return textwrap.dedent("\n".join(self.lines[start:stop])).strip("\n")


def source(kernel: Any) -> Markdown:
    """The whole source of a kernel or of one of its helpers."""
    return Reader(kernel).rest()


@contextmanager
def watching(
    module: ModuleType, name: str, watcher: Callable[[tuple, Any], None]
) -> Iterator[None]:
    """While it lasts, ``watcher(arguments, result)`` is told of every call of a kernel's helper.

    Under the interpreter a kernel is a Python function, which finds its helpers by their names.
    """
    original = getattr(module, name)

    def watched(*arguments: Any) -> Any:
        result = original(*arguments)
        watcher(arguments, result)
        return result

    setattr(module, name, watched)
    try:
        yield
    finally:
        setattr(module, name, original)


def array(tensor: Any) -> Tensor:
    """The numbers in a tensor of the interpreter."""
    return torch.from_numpy(tensor.handle.data.copy())


def row_count(rows: Any, valid: Any) -> int:
    """How many rows of a tile exist, of those that ``load_tiles`` or ``store_tiles`` is given."""
    return array(rows).numel() if valid is None else int(array(valid).sum())
