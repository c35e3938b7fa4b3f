"""flashlayer: one exact FlashAttention layer for PyTorch, the same on every device."""

import importlib
from typing import TYPE_CHECKING, Any

from flashlayer import masks
from flashlayer.auxiliary import AuxOutput, AuxRequest
from flashlayer.functional import (
    available_backends,
    dropout_keep_mask,
    flash_attention,
    flash_attention_varlen,
)

if TYPE_CHECKING:
    from flashlayer import distributed, integrations, testing
    from flashlayer.integrations.multihead import FlashMultiheadAttention
    from flashlayer.integrations.swap import swap_attention
    from flashlayer.modules import FlashAttention, KVCache
    from flashlayer.tuning import tune

__version__ = "0.1.0"
__all__ = [
    "AuxOutput",
    "AuxRequest",
    "FlashAttention",
    "FlashMultiheadAttention",
    "KVCache",
    "available_backends",
    "distributed",
    "dropout_keep_mask",
    "flash_attention",
    "flash_attention_varlen",
    "integrations",
    "masks",
    "swap_attention",
    "testing",
    "tune",
]

# What is loaded when it is asked for: the functions need torch alone, so that is all an import
# loads.
_ON_USE = {
    "FlashAttention": "flashlayer.modules",
    "FlashMultiheadAttention": "flashlayer.integrations.multihead",
    "KVCache": "flashlayer.modules",
    "swap_attention": "flashlayer.integrations.swap",
    "tune": "flashlayer.tuning",
}


def __getattr__(name: str) -> Any:
    if name in _ON_USE:
        return getattr(importlib.import_module(_ON_USE[name]), name)
    if name in ("distributed", "integrations", "testing"):
        return importlib.import_module(f"flashlayer.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
