"""flashlayer as a kernel of the Hugging Face hub: flash_attn's functions, the layer, the rest.

``python -m hub.build`` makes this file the package's ``__init__``. transformers loads
``flash_attn_func`` and ``flash_attn_varlen_func`` for ``attn_implementation="org/repo"``.
``register`` makes ``"FlashLayer"`` an implementation, with masks of its own, that covers more
models.
"""

from flashlayer import distributed, integrations, masks, testing
from flashlayer.functional import (
    AuxOutput,
    AuxRequest,
    available_backends,
    dropout_keep_mask,
    flash_attention,
    flash_attention_varlen,
)
from flashlayer.integrations.flash_attn import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)
from flashlayer.integrations.multihead import FlashMultiheadAttention
from flashlayer.integrations.swap import swap_attention
from flashlayer.integrations.transformers import register
from flashlayer.modules import FlashAttention, KVCache
from flashlayer.tuning import tune

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
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "integrations",
    "masks",
    "register",
    "swap_attention",
    "testing",
    "tune",
]
