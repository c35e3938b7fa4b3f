"""The counter-based dropout mask that every backend shares.

Whether a probability is dropped is a pure function of (seed, batch, head, query, key): the first
word of Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with
the seed as key and the four indices as counter. Tile sizes, pass and device don't change it.
"""

from __future__ import annotations

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
