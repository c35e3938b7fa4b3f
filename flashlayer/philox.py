"""The counter-based dropout mask that every backend shares.

Whether a probability is dropped is a pure function of (seed, batch, head, query, key): the first
word of Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with
the seed as key and the four indices as counter. Tile sizes, pass and device don't change it.
"""

from __future__ import annotations

import numbers

import torch
from torch import Tensor

ROUNDS = 10
# Multipliers and key increments of Philox4x32, section 4 of the paper.
MULTIPLIER_A, MULTIPLIER_B = 0xD2511F53, 0xCD9E8D57
WEYL_A, WEYL_B = 0x9E3779B9, 0xBB67AE85

_WORD = 0xFFFFFFFF


def random_word(seed: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """One uniform 32-bit word for each element of the broadcast indices.

    Args:
        seed: ``()``, int64; its low and high words are Philox's key.
        batch: first word of the counter, int64, broadcastable with the others.
        head: second word.
        query: third word.
        key: fourth word.

    Returns:
        int64 in ``[0, 2**32)``.
    """
    # Words are held in int64. The product of two may overflow its sign; the 64 bits stay correct.
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    c0, c1, c2, c3 = batch, head, query, key
    for _ in range(ROUNDS):
        product_a, product_b = c0 * MULTIPLIER_A, c2 * MULTIPLIER_B
        c0, c1, c2, c3 = (
            _high(product_b) ^ c1 ^ k0,
            product_b & _WORD,
            _high(product_a) ^ c3 ^ k1,
            product_a & _WORD,
        )
        k0, k1 = (k0 + WEYL_A) & _WORD, (k1 + WEYL_B) & _WORD
    return c0


def threshold(dropout_p: float) -> int:
    """Words below it are dropped: ``dropout_p`` in units of ``2**-32``."""
    return round(dropout_p * 2**32)


def keep_mask(
    seed: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor, dropout_p: float
) -> Tensor:
    """Bool, True = kept, for each element of the broadcast indices; see :func:`random_word`."""
    return random_word(seed, batch, head, query, key) >= threshold(dropout_p)


def _high(product: Tensor) -> Tensor:
    return (product >> 32) & _WORD


def dropout_keep_mask(
    batch: int,
    heads: int,
    seqlen_q: int,
    seqlen_k: int,
    dropout_p: float,
    seed: int | Tensor,
    device: torch.device | str,
    *,
    first_query: int = 0,
) -> Tensor:
    """The mask that dropout draws: bool ``(B, H, Sq, Sk)``, True = kept.

    Args:
        batch: ``B``; for packed sequences their number.
        heads: ``H``, query heads.
        seqlen_q: ``Sq``.
        seqlen_k: ``Sk``.
        dropout_p: probability that an element is False, 0 to 1.
        seed: what :func:`flashlayer.flash_attention` got as ``dropout_seed``.
        device: where the mask is made; it makes no difference to its values.
        first_query: position of the first of the ``Sq`` queries, for a mask made block by block.

    Raises:
        TypeError: ``seed`` or ``dropout_p`` is of the wrong type.
        ValueError: ``dropout_p`` is not a probability.
    """
    check_dropout(dropout_p, seed)
    b, h, i, j = (torch.arange(n, device=device) for n in (batch, heads, seqlen_q, seqlen_k))
    b, h, i = b.view(-1, 1, 1, 1), h.view(-1, 1, 1), first_query + i.view(-1, 1)
    seed = torch.as_tensor(seed, device=device)
    return keep_mask(seed, b, h, i, j, dropout_p)


def check_dropout(dropout_p: float, dropout_seed: int | Tensor | None) -> None:
    """Raise unless these are a probability, and a seed of 64 bits or None."""
    if not isinstance(dropout_p, (int, float, numbers.Real)) or isinstance(dropout_p, bool):
        raise TypeError(f"dropout_p must be a float, got {type(dropout_p).__name__}")
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p must be a probability from 0 to 1, got {dropout_p}")
    if dropout_seed is None:
        return
    if isinstance(dropout_seed, Tensor):
        if dropout_seed.dtype != torch.int64 or dropout_seed.ndim != 0:
            raise TypeError(
                f"dropout_seed must be an int, a () int64 tensor or None, "
                f"got {tuple(dropout_seed.shape)} {dropout_seed.dtype}"
            )
        return
    if not isinstance(dropout_seed, (int, numbers.Integral)) or isinstance(dropout_seed, bool):
        raise TypeError(f"dropout_seed must be an int or None, got {type(dropout_seed).__name__}")
    if not -(2**63) <= dropout_seed < 2**63:
        raise ValueError(f"dropout_seed must fit into 64 bits, got {dropout_seed}")
