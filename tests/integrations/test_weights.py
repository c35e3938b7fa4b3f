"""The attention weights of FlashMultiheadAttention, computed from the LSE by blocks."""

from typing import Any

import pytest
import torch
from torch import Tensor

from flashlayer import FlashMultiheadAttention
from flashlayer.integrations import weights as weights_room
from tests.integrations.multihead import E, H, L, N, S, assert_same, inputs, masks, pair, run


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("mask", ["none", "both", "float_both"])
def test_weights_block_by_block(average: bool, mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one query, recomputed in the backward pass, give what one block gives."""
    torch.manual_seed(3)
    host, ours = pair()
    tensors = inputs(host)
    call = masks(mask, True, H, L, torch.float64) | {"average_attn_weights": average}
    monkeypatch.setattr(weights_room, "WEIGHTS_AT_ONCE", 2 * N * H * S)
    assert_same(run(ours, tensors, **call), run(host, tensors, **call))
    with torch.no_grad():
        torch.testing.assert_close(ours(*tensors, **call)[1], host(*tensors, **call)[1])


def test_weights_of_a_long_sequence_hold_no_score_matrix() -> None:
    """Nothing of size (H, L, L) is made where the weights are averaged."""
    from torch.utils._python_dispatch import TorchDispatchMode

    length, biggest = 2048, 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            nonlocal biggest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                biggest = max(biggest, result.untyped_storage().nbytes() // result.itemsize)
            return result

    module = FlashMultiheadAttention(16, 8, batch_first=True)
    x = torch.randn(1, length, 16, requires_grad=True)
    with Sizes():
        _, weights = module(x, x, x)
        weights.square().sum().backward()
    assert weights.shape == (1, length, length)
    assert biggest == max(length * length, weights_room.WEIGHTS_AT_ONCE) < 8 * length * length


def test_dropout_follows_train_and_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    host, ours = pair(dropout=0.5, batch_first=True)
    x = torch.randn(N, 64, E, dtype=torch.float64)
    torch.manual_seed(4)
    out, weights = ours(x, x, x, average_attn_weights=False)
    torch.manual_seed(4)
    again, _ = ours(x, x, x, average_attn_weights=False)
    assert torch.equal(out, again)
    with monkeypatch.context() as patch:  # blocks of two queries drop the same weights
        patch.setattr(weights_room, "WEIGHTS_AT_ONCE", 2 * N * H * 64)
        torch.manual_seed(4)
        torch.testing.assert_close(ours(x, x, x, average_attn_weights=False)[1], weights)
    # The weights are those the output was made with: half of them 0, the rest doubled.
    assert 0.45 < (weights == 0).double().mean() < 0.55
    v = torch.nn.functional.linear(
        x, *(p.chunk(3)[2] for p in (ours.in_proj_weight, ours.in_proj_bias))
    )
    heads = weights @ v.unflatten(-1, (H, -1)).transpose(1, 2)
    torch.testing.assert_close(ours.out_proj(heads.transpose(1, 2).flatten(2)), out)
    kept = weights != 0
    host.eval()
    undropped = host(x, x, x, average_attn_weights=False)[1]
    torch.testing.assert_close(weights[kept], 2 * undropped[kept])
    assert not torch.equal(ours(x, x, x, need_weights=False)[0], out)
    ours.eval()
    for need_weights in (True, False):
        call = {"need_weights": need_weights}
        assert_same(run(ours, [x] * 3, **call), run(host, [x] * 3, **call))
