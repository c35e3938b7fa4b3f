"""flashlayer in other libraries' code; each of them is optional."""

import importlib
from types import ModuleType

_DOORS = ("flash_attn", "multihead", "sdpa", "swap", "transformers")


def __getattr__(name: str) -> ModuleType:
    # Load on use, so `import flashlayer` alone makes `flashlayer.integrations.sdpa` work.
    if name in _DOORS:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
