"""Exercises of notebook 5, From the formula to the kernel.

Replace each ``raise NotImplementedError``, then: python -m pytest docs/exercises/test_exercise_5.py
"""

from torch import Tensor


def flash_bytes(
    seqlen_q: int, seqlen_k: int, head_dim: int, query_heads: int, kv_heads: int, block_m: int
) -> int:
    """Bytes that the forward pass reads and writes, when every tile comes from HBM.

    As counted in the notebook, with two differences: there may be more keys than queries, and
    several query heads may share one kv head (no tile is shared between programs). Elements of q,
    k, v and o have 2 bytes, those of the log-sum-exp 4.
    """
    raise NotImplementedError


def key_tiles(q_start: int, q_stop: int, seqlen: int, block_n: int) -> list[tuple[int, int, bool]]:
    """The tiles of keys that causal attention visits for the queries ``[q_start, q_stop)``.

    Query i sees the keys 0 to i. ``q_stop`` may be larger than ``seqlen`` for the last block.

    Returns:
        ``(k_start, k_stop, masked)`` from left to right: as few tiles as can be, each starting at a
        multiple of ``block_n`` and ``block_n`` long unless the keys that are seen end before.
        ``masked`` is True only where some query of the block doesn't see some key of the tile.
    """
    raise NotImplementedError


def update(
    m_i: Tensor, l_i: Tensor, acc: Tensor, x: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel's ``online_softmax_update``, with ``torch.exp2`` and without ``torch.exp``.

    Args:
        m_i: ``(M,)`` running maximum of the scaled scores; -inf for a row that saw no key yet.
        l_i: ``(M,)`` running denominator.
        acc: ``(M, D)`` running output, not divided.
        x: ``(M, N)`` scores of the tile, not scaled yet; -inf where a key is hidden.
        v: ``(N, D)`` values of the tile.
        scale: positive.

    Returns:
        The new ``m_i``, ``l_i`` and ``acc``.
    """
    raise NotImplementedError


def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, block_m: int, block_n: int
) -> tuple[Tensor, Tensor]:
    """Causal attention tile by tile: output ``(S, D)`` and log-sum-exp ``(S,)``.

    q, k and v are ``(S, D)``; S need not be a multiple of a block. No tensor on the way may be
    larger than q or a tile of scores, whichever is larger.
    """
    raise NotImplementedError
