"""The two custom ops: what PyTorch asks of an operator, and a compiled graph without a break."""

from dataclasses import replace

import pytest
import torch

from flashlayer.backends import triton as backend
from flashlayer.spec import AttentionExtras, AttentionSpec, flatten
from tests.kernels.reference import DEVICE, draw, run_kernels

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


@pytest.mark.parametrize("packed", [False, True])
def test_descriptors_and_pointers_load_the_same(
    packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bitwise, and a NaN past the last token of a packed batch reaches nothing."""
    if DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("descriptors need compute capability 9.0")
    q, k, v, do = torch.randn(4, 2, 2, 150, 32, device=DEVICE, dtype=torch.float16).unbind(0)
    spec, extras = AttentionSpec(0.3, 70, 0), AttentionExtras()
    if packed:
        q, k, v, do = (x[:1].clone() for x in (q, k, v, do))
        for x in (q, k, v, do):
            x[:, :, 140:] = torch.nan
        edges = torch.tensor([0, 65, 65, 140], device=DEVICE, dtype=torch.int32)
        spec = replace(spec, max_seqlen_q=75, max_seqlen_k=75)
        extras = AttentionExtras(cu_seqlens_q=edges, cu_seqlens_k=edges)
    described = []
    original, tiles = backend._descriptor, backend._tiles

    def count(*arguments: object) -> object:
        described.append(original(*arguments) is not None)
        return original(*arguments)

    def run() -> list[torch.Tensor]:
        o, lse = backend.forward(q, k, v, spec, extras)
        return [o, lse, *backend.backward(do, None, q, k, v, o, lse, spec, extras)[:3]]

    monkeypatch.setattr(backend, "_descriptor", count)
    monkeypatch.setattr(backend, "_tiles", lambda *call: replace(tiles(*call), descriptors=True))
    results = run()
    assert described == [True] * (4 if packed else 6)
    monkeypatch.setattr(backend, "_tiles", tiles)
    for result, expected in zip(results, run(), strict=True):
        assert torch.equal(result, expected)
        assert not result.isnan().any()
