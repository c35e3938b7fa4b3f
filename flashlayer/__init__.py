"""flashlayer: one exact FlashAttention layer for PyTorch, the same on every device."""

from typing import TYPE_CHECKING, Any

from flashlayer.functional import (
    available_backends,
    dropout_keep_mask,
    flash_attention,
    flash_attention_varlen,
)

if TYPE_CHECKING:
    from flashlayer.modules import FlashAttention

__version__ = "0.1.0"
__all__ = [
    "FlashAttention",
    "available_backends",
    "dropout_keep_mask",
    "flash_attention",
    "flash_attention_varlen",
]


def __getattr__(name: str) -> Any:
    # The modules need einops; the functions need torch alone, so that is all an import loads.
    if name == "FlashAttention":
        from flashlayer.modules import FlashAttention

        return FlashAttention
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
