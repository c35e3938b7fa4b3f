"""The two custom ops: what PyTorch asks of an operator, and a compiled graph without a break."""

import pytest
import torch

from flashlayer.backends import triton as backend
from flashlayer.spec import AttentionExtras, AttentionSpec, flatten
from tests.kernels.reference import draw, run_kernels

CAUSAL = AttentionSpec(0.25, None, 0)
UTILITIES = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


def layouts() -> dict:
    x = draw(batch=2, heads=2, kv_heads=1, seqlen_q=5, seqlen_k=7, value_dim=8)
    bshd = type(x)(*(t.transpose(1, 2).contiguous().transpose(1, 2) for t in x[:4]), x.dlse)
    expanded = x._replace(q=x.q[:, :1].expand_as(x.q), k=x.k[:1].expand_as(x.k))
    single = draw(batch=2, heads=1, seqlen_q=1)
    return {"bhsd": x, "bshd": bshd, "expanded": expanded, "one_head_one_row": single}


@pytest.mark.parametrize("layout", ["bhsd", "bshd", "expanded", "one_head_one_row"])
def test_opcheck(layout: str) -> None:
    x = layouts()[layout]
    flat = flatten(CAUSAL, AttentionExtras())
    o, lse = backend._forward(x.q, x.k, x.v, *flat)
    torch.library.opcheck(backend._forward, (x.q, x.k, x.v, *flat), test_utils=UTILITIES)
    for dlse in (None, x.dlse):
        arguments = (x.do, dlse, x.q, x.k, x.v, o, lse, False, *flat)
        torch.library.opcheck(backend._backward, arguments, test_utils=UTILITIES)


@pytest.mark.parametrize("layout", ["bhsd", "bshd", "expanded", "one_head_one_row"])
def test_fake_strides_are_the_real_ones(layout: str) -> None:
    x = layouts()[layout]
    flat = flatten(CAUSAL, AttentionExtras())
    real = backend._forward(x.q, x.k, x.v, *flat)
    fake = backend._forward_fake(x.q, x.k, x.v, *flat)
    arguments = (x.do, x.dlse, x.q, x.k, x.v, *real, False, *flat)
    real += backend._backward(*arguments)
    fake += backend._backward_fake(*arguments)
    for ours, theirs in zip(real, fake, strict=True):
        assert (ours.shape, ours.stride(), ours.dtype) == (
            theirs.shape,
            theirs.stride(),
            theirs.dtype,
        )


def test_compiles_without_a_graph_break() -> None:
    x = draw(seqlen_q=9)

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def compiled(x):
        return run_kernels(x, CAUSAL)

    for length in (9, 12):
        y = type(x)(*(t[:, :, :length] for t in draw(seqlen_q=12)))
        expected = run_kernels(y, CAUSAL)
        for name, result in compiled(y).items():
            assert torch.equal(result, expected[name]), name
            assert result.stride() == expected[name].stride(), name
