"""Doors into code that others wrote; each host is optional."""

import importlib
from types import ModuleType

_DOORS = ("flash_attn", "sdpa", "swap", "transformers")


def __getattr__(name: str) -> ModuleType:
    # A door is loaded when it is asked for, so that none has to be imported by name beforehand.
    if name in _DOORS:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
