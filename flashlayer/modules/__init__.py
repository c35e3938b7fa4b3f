"""The layer, its cache for generation, and position embeddings."""

from flashlayer.modules.attention import FlashAttention
from flashlayer.modules.cache import KVCache
from flashlayer.modules.positions import alibi_slopes, rotate

__all__ = ["FlashAttention", "KVCache", "alibi_slopes", "rotate"]
