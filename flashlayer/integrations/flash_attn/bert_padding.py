"""``flash_attn.bert_padding``: from padded batches to packed sequences and back."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """The rows ``indices`` ``(T,)`` of ``input`` ``(rows, ...)``."""
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """``(first_axis_dim, ...)``, zero but for ``values`` ``(T, ...)`` in the rows ``indices``."""
    out = values.new_zeros(first_axis_dim, *values.shape[1:])
    return out.index_copy(0, indices.long(), values)  # models come with int32 too


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The tokens that a padding mask keeps, one sequence after the other.

    ``hidden_states`` is ``(B, S, ...)``, ``attention_mask`` ``(B, S)``, bool or int, 1 = a token;
    ``unused_mask`` ``(B, S)`` marks tokens that are allocated but not used.

    Returns:
        The tokens ``(T, ...)``, their ``indices`` ``(T,)`` in the flattened batch, ``cu_seqlens``
        ``(B + 1,)`` int32, the longest sequence, and the used tokens of each ``(B,)`` int32.
    """
    every = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = every.sum(dim=-1, dtype=torch.int32)
    used = attention_mask.sum(dim=-1, dtype=torch.int32)
    return (*_select(hidden_states, every, lengths), used)


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """:func:`unpad_input` where each row of the batch holds several sequences.

    ``attention_mask_in_length`` ``(B, S)`` int has the lengths of a row's sequences, then zeros.
    ``cu_seqlens`` has every sequence of every row; the last result is missing.
    """
    row_length = attention_mask_in_length.sum(dim=-1, keepdim=True)
    token = torch.arange(attention_mask_in_length.shape[1], device=row_length.device)
    flat = attention_mask_in_length.flatten()
    return _select(hidden_states, token < row_length, flat[flat != 0].to(torch.int32))


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """``(T, ...)`` back to ``(batch, seqlen, ...)``, zero where there was padding."""
    padded = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return padded.unflatten(0, (batch, seqlen))


def _select(
    hidden_states: Tensor, mask: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    indices = mask.flatten().nonzero().flatten()
    cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    flat = hidden_states.reshape(math.prod(hidden_states.shape[:2]), *hidden_states.shape[2:])
    longest = int(lengths.max()) if len(lengths) else 0
    return index_first_axis(flat, indices), indices, cu_seqlens, longest
