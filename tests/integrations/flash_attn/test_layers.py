"""flash_attn.layers.rotary and flash_attn.bert_padding."""

import torch

from flashlayer.integrations.flash_attn import bert_padding
from flashlayer.integrations.flash_attn.layers.rotary import apply_rotary_emb
from tests.integrations.flash_attn.reference import B, D, H, close, edges, pack, rotate


def test_rotary_of_dense_and_packed() -> None:
    angles = torch.randn(20, D // 2, dtype=torch.float64)
    x = torch.randn(B, 6, H, D, dtype=torch.float64)
    offsets = torch.tensor([3, 8])
    for interleaved in (False, True):
        expected = torch.stack(
            [
                torch.stack(
                    [rotate(x[n, t], angles[offsets[n] + t], interleaved) for t in range(6)]
                )
                for n in range(B)
            ]
        )
        tables = (angles.cos(), angles.sin(), interleaved)
        close(apply_rotary_emb(x, *tables, seqlen_offsets=offsets), expected)
        packed = apply_rotary_emb(
            pack(x, [2, 6]), *tables, seqlen_offsets=offsets, cu_seqlens=edges([2, 6]), max_seqlen=6
        )
        close(packed, pack(expected, [2, 6]))
        written = x.clone()
        assert apply_rotary_emb(written, *tables, inplace=True, seqlen_offsets=offsets) is written
        close(written, expected)


def test_padding_there_and_back() -> None:
    x = torch.randn(3, 5, 2, 4, requires_grad=True, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 0, 1, 1], [0, 0, 0, 0, 0]])
    tokens, indices, cu_seqlens, longest, used = bert_padding.unpad_input(x, mask)
    assert torch.equal(tokens, x[mask.bool()])
    assert cu_seqlens.dtype == torch.int32
    assert (cu_seqlens.tolist(), longest, used.tolist()) == ([0, 3, 6, 6], 3, [3, 3, 0])
    padded = bert_padding.pad_input(tokens, indices, 3, 5)
    assert torch.equal(padded, x * mask[..., None, None])
    assert torch.equal(bert_padding.pad_input(tokens, indices.int(), 3, 5), padded)
    assert torch.equal(bert_padding.index_first_axis(x.flatten(0, 1), indices.int()), tokens)
    (grad,) = torch.autograd.grad(padded.square().sum(), x)
    close(grad, 2 * x.detach() * mask[..., None, None])
    unused = torch.tensor([[0, 0, 0, 1, 0]] * 3)
    _, _, cu_seqlens, longest, used = bert_padding.unpad_input(x, mask.bool(), unused.bool())
    assert (cu_seqlens.tolist(), longest, used.tolist()) == ([0, 4, 7, 8], 4, [3, 3, 0])
    in_length = torch.tensor([[2, 3, 0, 0, 0], [4, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    tokens, _, cu_seqlens, longest = bert_padding.unpad_input_for_concatenated_sequences(
        x, in_length
    )
    assert torch.equal(tokens, torch.cat((x[0], x[1, :4])))
    assert (cu_seqlens.tolist(), longest) == ([0, 2, 5, 9], 4)
