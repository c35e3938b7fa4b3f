"""Shows the source of the kernels in notebooks, and records calls while they run.

A notebook holds no copy of the library's source. It shows the installed file, so a change of a
kernel makes the committed page stale, which a test detects.
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
    """Shows the source of a kernel in consecutive pieces."""

    def __init__(self, kernel: Any) -> None:
        # ``fn`` of a triton.jit function is the Python function.
        self.lines = inspect.getsource(kernel.fn).splitlines()
        self.position = 0

    def until(self, *marks: str) -> Markdown:
        """The next piece, up to and including the line that contains the mark.

        Several marks are searched one after the other, each from where the last was found.
        """
        stop = self.position
        for mark in marks:
            stop = self._find(mark, stop)
        return self._show(stop + 1)

    def skip_to(self, mark: str) -> None:
        """Skip the lines before the one that contains the mark."""
        self.position = self._find(mark, self.position)

    def rest(self) -> Markdown:
        """The remaining lines."""
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
    """Call ``watcher(arguments, result)`` after every call of a kernel's helper in this context.

    In the interpreter a kernel is a Python function that looks its helpers up by name.
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
    """The values of a tensor of Triton's interpreter."""
    return torch.from_numpy(tensor.handle.data.copy())


def row_count(rows: Any, valid: Any) -> int:
    """Number of valid rows among those that ``load_tiles`` or ``store_tiles`` gets."""
    return array(rows).numel() if valid is None else int(array(valid).sum())
