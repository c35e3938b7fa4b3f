"""Wrong in ways that look right. `f__why` takes the place of `f`."""

import torch


def softmax_backward__without_the_mean(p, dp):
    return p * dp


def softmax_backward__plain_mean(p, dp):
    return p * (dp - dp.mean(dim=-1, keepdim=True))


def softmax_backward__sum_over_columns(p, dp):
    return p * (dp - (p * dp).sum(dim=0, keepdim=True))


def softcap_backward__tanh_of_what_was_capped(scores, ds, softcap):
    return ds * (1 - torch.tanh(scores / softcap) ** 2)


def softcap_backward__softcap_forgotten(scores, ds, softcap):
    return ds * (1 - scores**2)


def softcap_backward__softcap_as_a_factor(scores, ds, softcap):
    return ds * softcap * (1 - (scores / softcap) ** 2)


def _backward(q, k, v, out, lse, do, dlse, scale):
    p = torch.exp(scale * q @ k.mT - lse[:, None])
    delta = (out * do).sum(dim=-1) - dlse
    return p, p * (do @ v.mT - delta[:, None])


def attention_backward__dk_without_scale(q, k, v, out, lse, do, dlse, scale):
    p, ds = _backward(q, k, v, out, lse, do, dlse, scale)
    return scale * ds @ k, ds.mT @ q, p.mT @ do


def attention_backward__scale_twice(q, k, v, out, lse, do, dlse, scale):
    p, ds = _backward(q, k, v, out, lse, do, dlse, scale)
    return scale * ds @ (scale * k), scale * ds.mT @ q, p.mT @ do


def attention_backward__scale_on_dv(q, k, v, out, lse, do, dlse, scale):
    p, ds = _backward(q, k, v, out, lse, do, dlse, scale)
    return scale * ds @ k, scale * ds.mT @ q, scale * p.mT @ do


def attention_backward__delta_without_dlse(q, k, v, out, lse, do, dlse, scale):
    p, ds = _backward(q, k, v, out, lse, do, torch.zeros_like(dlse), scale)
    return scale * ds @ k, scale * ds.mT @ q, p.mT @ do


def attention_backward__dv_of_dp(q, k, v, out, lse, do, dlse, scale):
    _, ds = _backward(q, k, v, out, lse, do, dlse, scale)
    return scale * ds @ k, scale * ds.mT @ q, (do @ v.mT).mT @ do


def key_block_gradients__diagonal_not_masked(start, stop, q, k, v, lse, delta, do, scale, block_m):
    dk, dv = torch.zeros_like(k[start:stop]), torch.zeros_like(v[start:stop])
    for rows in torch.arange(start, len(q)).split(block_m):
        p = torch.exp(scale * q[rows] @ k[start:stop].mT - lse[rows, None])
        dv += p.mT @ do[rows]
        dk += (p * (do[rows] @ v[start:stop].mT - delta[rows, None])).mT @ q[rows]
    return scale * dk, dv


def key_block_gradients__starts_after_the_diagonal(
    start, stop, q, k, v, lse, delta, do, scale, block_m
):
    dk, dv = torch.zeros_like(k[start:stop]), torch.zeros_like(v[start:stop])
    for rows in torch.arange(stop, len(q)).split(block_m):
        p = torch.exp(scale * q[rows] @ k[start:stop].mT - lse[rows, None])
        dv += p.mT @ do[rows]
        dk += (p * (do[rows] @ v[start:stop].mT - delta[rows, None])).mT @ q[rows]
    return scale * dk, dv


def _by_blocks(first, start, stop, q, k, v, lse, delta, do, scale, block_m):
    dk, dv = torch.zeros_like(k[start:stop]), torch.zeros_like(v[start:stop])
    for rows in torch.arange(first, len(q)).split(block_m):
        scores = scale * q[rows] @ k[start:stop].mT
        scores = torch.where(torch.arange(start, stop) <= rows[:, None], scores, -torch.inf)
        p = torch.exp(scores - lse[rows, None])
        dv += p.mT @ do[rows]
        dk += (p * (do[rows] @ v[start:stop].mT - delta[rows, None])).mT @ q[rows]
    return scale * dk, dv


def key_block_gradients__visits_queries_that_see_nothing(
    start, stop, q, k, v, lse, delta, do, scale, block_m
):
    return _by_blocks(0, start, stop, q, k, v, lse, delta, do, scale, block_m)


def key_block_gradients__all_queries_at_once(start, stop, q, k, v, lse, delta, do, scale, block_m):
    return _by_blocks(start, start, stop, q, k, v, lse, delta, do, scale, len(q))


def key_block_gradients__without_scale(start, stop, q, k, v, lse, delta, do, scale, block_m):
    dk, dv = _by_blocks(start, start, stop, q, k, v, lse, delta, do, scale, block_m)
    return dk / scale, dv


def key_block_gradients__last_tile_only(start, stop, q, k, v, lse, delta, do, scale, block_m):
    first = start + (len(q) - 1 - start) // block_m * block_m
    return _by_blocks(first, start, stop, q, k, v, lse, delta, do, scale, block_m)
