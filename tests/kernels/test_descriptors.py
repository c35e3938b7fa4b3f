"""Tensor descriptors and pointers load the same."""

from dataclasses import replace

import pytest
import torch

from flashlayer.backends import triton as backend
from flashlayer.backends.triton import tiling
from flashlayer.spec import AttentionExtras, AttentionSpec
from tests.kernels.reference import DEVICE


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
    original, tiles_of = tiling.descriptor, tiling.tiles_of

    def count(*arguments: object) -> object:
        described.append(original(*arguments) is not None)
        return original(*arguments)

    def run() -> list[torch.Tensor]:
        o, lse = backend.forward(q, k, v, spec, extras)
        return [o, lse, *backend.backward(do, None, q, k, v, o, lse, spec, extras)[:3]]

    monkeypatch.setattr(tiling, "descriptor", count)
    monkeypatch.setattr(
        tiling, "tiles_of", lambda *call: replace(tiles_of(*call), descriptors=True)
    )
    results = run()
    assert described == [True] * (4 if packed else 6)
    monkeypatch.setattr(tiling, "tiles_of", tiles_of)
    for result, expected in zip(results, run(), strict=True):
        assert torch.equal(result, expected)
        assert not result.isnan().any()
