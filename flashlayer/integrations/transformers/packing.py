"""Packed sequences: from restarting positions to ``cu_seqlens``."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._C._functorch import is_batchedtensor

# Dispatch modes under which a tensor has no values, or values that must not become constants.
_TRACING_MODES = (
    torch._C._TorchDispatchModeKey.FAKE,
    torch._C._TorchDispatchModeKey.PROXY,
    torch._C._TorchDispatchModeKey.FUNCTIONAL,
)


def readable(tensor: Tensor) -> bool:
    """Whether Python may read the values.

    False under torch.compile, make_fx and torch.jit.trace, for meta, fake and functional tensors
    and inside torch.vmap.
    """
    if torch.compiler.is_compiling():
        return False
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta:
        return False
    if torch._is_functional_tensor(tensor):  # pyright: ignore[reportPrivateImportUsage]
        return False
    if torch._C._get_tracing_state() is not None or is_batchedtensor(tensor):
        return False
    return all(torch._C._get_dispatch_mode(mode) is None for mode in _TRACING_MODES)


def restarts(position_ids: Tensor) -> Tensor:
    """Index of each token's sequence ``(B, S)``, where restarting positions begin a sequence.

    A position lower than the one before begins a sequence. So does a repeated 0 (a sequence of one
    token), unless other positions of the row repeat too or all are 0. Gaps begin none.
    """
    step = position_ids.diff(dim=-1)
    zero = position_ids[:, 1:] == 0
    repeat = step == 0
    repeats_mean_nothing = (repeat & ~zero).any(-1, keepdim=True) | zero.all(-1, keepdim=True)
    begins = (step < 0) | (repeat & zero & ~repeats_mean_nothing)
    return nn.functional.pad(begins.cumsum(-1), (1, 0))


def same_sequence(sequences: Tensor) -> Tensor:
    """Bool ``(B, 1, S, S)``: whether two tokens belong to the same sequence."""
    return (sequences[:, :, None] == sequences[:, None, :])[:, None]


def boundaries(sequences: Tensor) -> tuple[Tensor, int]:
    """``cu_seqlens`` of sequences given by their indices ``(B, S)``, and the longest length.

    Each row begins a new sequence.
    """
    begins = torch.ones_like(sequences, dtype=torch.bool)
    begins[:, 1:] = sequences.diff(dim=-1) != 0
    begins = begins.flatten().nonzero().flatten()
    cu_seqlens = nn.functional.pad(begins, (0, 1), value=sequences.numel())
    return cu_seqlens.to(torch.int32), int(cu_seqlens.diff().max())
