"""Generation: keys and values of the positions before, and attention of the newest to all."""

from __future__ import annotations

import functools
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from flashlayer import online_softmax
from flashlayer.functional import flash_attention


class KVCache:
    """Keys and values of the positions a layer has already seen, for generation.

    One for each layer; starts empty. Under ``torch.no_grad()`` or ``torch.inference_mode()`` it
    appends in place to a buffer that doubles when it is full, so that ``n`` tokens cost O(n)
    copying. With gradients enabled it concatenates, O(n) a call, and the positions before keep
    their gradients: outputs of several calls are differentiated together, as those of one call. A
    backward pass frees what they share, as of any graph.

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
            TypeError: they are of another dtype than what the cache holds.
            ValueError: they do not fit what the cache holds, or each other.
        """
        new = [key, value]
        self._check(key, value)
        stop = self.length + key.shape[2]
        if torch.is_grad_enabled():
            # No in-place write: the backward pass of an earlier call needs its keys unchanged.
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
        """The buffer, or a copy of it where it is too short or can't be written to."""
        batch, kv_heads, capacity, dim = buffer.shape
        # Only inference mode may write to a tensor that was made in it, and Dynamo can't ask; a
        # buffer with a gradient belongs to a graph.
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


# A step of one token has B * Hkv programs' worth of work, too few to fill a GPU: its keys are split
# until there are this many, none shorter than MIN_SPLIT keys.
PROGRAMS_TO_FILL_A_GPU = 256
MIN_SPLIT = 256


def attend_to_cache(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    """:func:`flash_attention` of the newest queries to all keys; one token is split over the keys.

    Args:
        q: ``(B, H, S, D)``.
        k: ``(B, Hkv, Sk, D)``.
        v: ``(B, Hkv, Sk, Dv)``.
        **options: those of :func:`flash_attention`.
    """
    batch, _, seqlen_q, _ = q.shape
    splits = 1
    if q.device.type != "cpu" and seqlen_q == 1:
        wanted = PROGRAMS_TO_FILL_A_GPU // (batch * k.shape[1])
        splits = max(1, min(wanted, k.shape[2] // MIN_SPLIT))
    # ALiBi and a window count positions from the end of the keys, which a split no longer knows.
    whole = options.get("alibi_slopes") is not None or options["window_size"][0] is not None
    if splits == 1 or whole or options["dropout_p"] > 0:
        return flash_attention(q, k, v, **options)
    return split_attention(q, k, v, splits, **options)


def split_attention(q: Tensor, k: Tensor, v: Tensor, splits: int, **options: Any) -> Tensor:
    """One query against ``splits`` parts of the keys, side by side, merged by their LSE.

    Args:
        q: ``(B, H, 1, D)``, a query that sees every key.
        k: ``(B, Hkv, Sk, D)``.
        v: ``(B, Hkv, Sk, Dv)``.
        splits: number of parts of equal length; the keys that are left over make one more.
        **options: ``scale``, ``softcap``, ``sinks`` and ``backend`` of :func:`flash_attention`.
    """
    kept: dict[str, Any] = {name: options.get(name) for name in ("scale", "softcap")}
    kept["backend"] = options.get("backend", "auto")
    group_size, kv_heads = q.shape[1] // k.shape[1], k.shape[1]
    length = k.shape[2] // splits
    # The parts become kv heads of their own; each keeps its group of query heads.
    q_parts = rearrange(q, "b (h g) s d -> b h g s d", g=group_size)
    q_parts = q_parts.unsqueeze(2).expand(-1, -1, splits, -1, -1, -1).flatten(1, 3)
    k_parts, v_parts = (
        rearrange(x[:, :, : splits * length], "b h (n s) d -> b (h n) s d", n=splits)
        for x in (k, v)
    )
    out, lse = flash_attention(q_parts, k_parts, v_parts, return_lse=True, **kept)
    unfold = {"h": kv_heads, "n": splits, "g": group_size}
    out = rearrange(out, "b (h n g) s d -> n b (h g) s d", **unfold)
    lse = rearrange(lse, "b (h n g) s -> n b (h g) s", **unfold)
    states = [online_softmax.state_of(out[part], lse[part]) for part in range(splits)]
    if splits * length < k.shape[2]:
        rest = (x[:, :, splits * length :] for x in (k, v))
        rest_out, rest_lse = flash_attention(q, *rest, return_lse=True, **kept)
        states.append(online_softmax.state_of(rest_out, rest_lse))
    if options.get("sinks") is not None:
        sink = options["sinks"].to(lse.dtype).view(-1, 1).expand_as(lse[0])
        states.append(online_softmax.state_of(torch.zeros_like(out[0]), sink))
    return online_softmax.finalize(functools.reduce(online_softmax.merge, states)).to(q.dtype)
