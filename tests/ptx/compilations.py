"""How often Triton compiles each kernel while lengths and head counts change; prints JSON.

Triton's own binder and cache key decide, as at a launch; nothing is compiled or run. A process of
its own, without ``TRITON_INTERPRET``: ``python -m tests.ptx.compilations``.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
import triton
from triton.runtime import driver
from triton.runtime.jit import compute_cache_key

from flashlayer import flash_attention
from flashlayer.backends.triton import launch, tiling
from flashlayer.kernels.tiles import specialized_candidates
from tests.ptx.driver import emulated

# On sm_90; sm_80 refuses and takes the table.
SPECIALIZED = {name: specialized_candidates(name, 64)[0] for name in ("forward", "dkdv", "dq")}
LENGTHS = range(2, 302)  # a single query is causal in name only: another option set

Options = Callable[[int], dict[str, Any]]
SWEEPS: dict[str, tuple[Iterable[int], Options]] = {
    "plain": (LENGTHS, lambda n: {}),
    "causal": (LENGTHS, lambda n: {"causal": True}),
    "window": (range(9, 309), lambda n: {"window_size": (7, 0)}),
    "softcap and sinks": (LENGTHS, lambda n: {"softcap": 20.0, "sinks": torch.randn(4)}),
    "alibi": (LENGTHS, lambda n: {"alibi_slopes": torch.rand(4), "causal": True}),
    "padding": (LENGTHS, lambda n: {"attn_mask": torch.ones(1, 1, 1, n, dtype=torch.bool)}),
    "dropout": (range(1, 100), lambda n: {"dropout_p": n / 100, "dropout_seed": 1}),
    "heads": (range(5, 60), lambda n: {"causal": True, "heads": n, "length": 40}),
    "float mask": (LENGTHS, lambda n: {"attn_mask": torch.randn(n, n, requires_grad=True)}),
    "specialized": (range(2, 102), lambda n: {"causal": True, "specialized": True}),
    "float mask of each head": (LENGTHS, lambda n: {"attn_mask": torch.randn(1, 4, n, n)}),
}


def compilations(arch: int, lengths: Iterable[int], options: Options) -> dict[str, int]:
    """Number of cache keys of each kernel, by its name."""
    keys: dict[str, set[str]] = defaultdict(set)

    def run(self: triton.JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        caches = self.device_caches[driver.active.get_current_device()]
        _, kernel_key_cache, _, _, binder = caches
        _, specialization, launch_options = binder(*args, **kwargs)
        keys[self.__name__].add(compute_cache_key(kernel_key_cache, specialization, launch_options))

    with (
        emulated(arch),
        mock.patch.object(triton.JITFunction, "run", run),
        mock.patch.object(launch, "launching", return_value=nullcontext()),
    ):
        for n in lengths:
            call = options(n)
            heads, length = call.pop("heads", 4), call.pop("length", n)
            specialized = call.pop("specialized", False)
            kv_heads = 2 if heads == 4 else heads
            q, k = (
                torch.randn(1, h, length, 64, dtype=torch.float16, requires_grad=True)
                for h in (heads, kv_heads)
            )
            chosen = mock.patch.object(tiling, "tiles_of", lambda name, *_: SPECIALIZED[name])
            with chosen if specialized else nullcontext():
                out = flash_attention(q, k, k, backend="triton", **call)
                out.backward(torch.zeros_like(out))
    return {name: len(found) for name, found in keys.items()}


if __name__ == "__main__":
    counts = {
        f"sm_{arch} {name}": compilations(arch, *sweep)
        for arch in (80, 90)
        for name, sweep in SWEEPS.items()
    }
    print(json.dumps(counts))
