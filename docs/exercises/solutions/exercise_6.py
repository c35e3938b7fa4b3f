"""Solutions of exercise_6.py."""

import torch
from torch import Tensor


def softmax_backward(p: Tensor, dp: Tensor) -> Tensor:
    """Each dp against the mean of its row."""
    return p * (dp - (p * dp).sum(dim=-1, keepdim=True))


def softcap_backward(scores: Tensor, ds: Tensor, softcap: float) -> Tensor:
    """The derivative of tanh is one minus its square, and tanh is at hand."""
    return ds * (1 - (scores / softcap) ** 2)


def attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    do: Tensor,
    dlse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The six lines of the notebook."""
    p = torch.exp(scale * q @ k.mT - lse[:, None])
    dp = do @ v.mT
    delta = (out * do).sum(dim=-1) - dlse
    ds = p * (dp - delta[:, None])
    return scale * ds @ k, scale * ds.mT @ q, p.mT @ do


def key_block_gradients(
    start: int,
    stop: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    do: Tensor,
    scale: float,
    block_m: int,
) -> tuple[Tensor, Tensor]:
    """The first query that sees a key of the block is the one at its start."""
    dk, dv = torch.zeros_like(k[start:stop]), torch.zeros_like(v[start:stop])
    for q_start in range(start, len(q), block_m):
        rows = slice(q_start, min(q_start + block_m, len(q)))
        i = torch.arange(q_start, rows.stop)[:, None]
        j = torch.arange(start, stop)[None, :]
        scores = torch.where(j <= i, scale * q[rows] @ k[start:stop].mT, -torch.inf)
        p = torch.exp(scores - lse[rows, None])
        ds = p * (do[rows] @ v[start:stop].mT - delta[rows, None])
        dv += p.mT @ do[rows]
        dk += ds.mT @ q[rows]
    return scale * dk, dv
