"""Keys and values of earlier positions, for generation."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys and values of the positions a layer has already processed, for generation.

    One for each layer; starts empty. Under ``torch.no_grad()`` or ``torch.inference_mode()`` it
    appends in place to a buffer that doubles when it is full, so ``n`` tokens cost O(n) copying.
    With gradients enabled it concatenates, O(n) a call, and earlier positions keep their gradients:
    the outputs of several calls can be differentiated together, like those of one call. As in any
    graph, a backward pass frees what they share.

    Attributes:
        length: number of positions held.

    Example:
        >>> layer, cache = FlashAttention(64, 4, causal=True).eval(), KVCache()
        >>> with torch.inference_mode():
        ...     prompt = layer(torch.randn(1, 100, 64), cache=cache)
        ...     step = layer(torch.randn(1, 1, 64), cache=cache)
        >>> cache.length
        101
    """

    def __init__(self) -> None:
        self.length = 0
        self._buffers: list[Tensor] = []  # keys and values, (B, Hkv, capacity, D) each

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add positions ``(B, Hkv, S, D)``; returns all keys and values so far.

        Raises:
            TypeError: one is no tensor, or of another dtype than the other or what the cache holds.
            ValueError: they do not fit what the cache holds, or each other.
        """
        new = [key, value]
        self._check(key, value)
        stop = self.length + key.shape[2]
        if torch.is_grad_enabled():
            # Writing in place would change keys that an earlier call saved for its backward.
            held = [buffer[:, :, : self.length] for buffer in self._buffers]
            both = zip(held, new, strict=True)
            self._buffers = [torch.cat(pair, dim=2) for pair in both] if self.length else new
        else:
            if not self._buffers:
                self._buffers = [x.new_empty(*x.shape[:2], 0, x.shape[3]) for x in new]
            self._buffers = [self._with_room(buffer, stop) for buffer in self._buffers]
            for buffer, x in zip(self._buffers, new, strict=True):
                buffer[:, :, self.length : stop] = x
        self.length = stop
        keys, values = (buffer[:, :, :stop] for buffer in self._buffers)
        return keys, values

    def _check(self, key: Tensor, value: Tensor) -> None:
        for name, x in (("key", key), ("value", value)):
            if not isinstance(x, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
            if x.ndim != 4:
                raise ValueError(
                    f"{name} must have 4 dimensions (batch, kv_heads, positions, head_dim), "
                    f"got shape {tuple(x.shape)}"
                )
        if value.dtype != key.dtype:
            raise TypeError(f"key and value must have one dtype, got {key.dtype} and {value.dtype}")
        if value.device != key.device:
            raise ValueError(f"value must be on key's device {key.device}, got {value.device}")
        if value.shape[:3] != key.shape[:3]:
            raise ValueError(
                f"key and value must agree in (batch, kv_heads, positions), "
                f"got {tuple(key.shape)} and {tuple(value.shape)}"
            )
        for name, x, buffer in zip(("key", "value"), (key, value), self._buffers, strict=False):
            sizes, held = ((*y.shape[:2], y.shape[3]) for y in (x, buffer))
            if sizes != held:
                raise ValueError(
                    f"{name}: the cache holds (batch, kv_heads, head_dim) = {held}, got {sizes}"
                )
            if x.device != buffer.device:
                raise ValueError(f"{name} must be on {buffer.device} as the cache, got {x.device}")
            if x.dtype != buffer.dtype:
                raise TypeError(f"{name} must be {buffer.dtype} as the cache, got {x.dtype}")

    def _with_room(self, buffer: Tensor, needed: int) -> Tensor:
        """The buffer, or a copy if it is too short or can't be written to."""
        batch, kv_heads, capacity, dim = buffer.shape
        # An inference tensor can be written in inference mode only; Dynamo can't trace
        # is_inference(). A buffer that requires grad belongs to a graph.
        writable = (
            torch.compiler.is_compiling()
            or torch.is_inference_mode_enabled()
            or not buffer.is_inference()
        )
        if needed <= capacity and writable and not buffer.requires_grad:
            return buffer
        if needed > capacity:
            capacity = max(needed, 2 * capacity)
        copy = buffer.new_empty(batch, kv_heads, capacity, dim)
        copy[:, :, : self.length] = buffer[:, :, : self.length]
        return copy
