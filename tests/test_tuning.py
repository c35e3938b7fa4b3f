"""flashlayer.tune in the interpreter, where only the timings mean nothing."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import flashlayer
from flashlayer import flash_attention, tuning
from flashlayer.backends import triton as backend
from flashlayer.backends.triton import tiling
from flashlayer.kernels.tiles import TileConfig, candidates

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def untuned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tuning, "ROUNDS", 1)
    yield
    backend.TUNED.clear()


def draw(seqlen: int = 12) -> list[torch.Tensor]:
    return [torch.randn(1, 1, seqlen, 8, device=DEVICE, requires_grad=True) for _ in range(3)]


def test_what_is_chosen_is_used_for_the_bucket_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = draw()
    expected = flash_attention(q, k, v, causal=True, backend="triton")
    chosen = flashlayer.tune(q, k, v, causal=True)
    assert chosen.keys() == {"forward", "dkdv", "dq"}
    for kernel, tiles in chosen.items():
        assert TileConfig(**tiles) in candidates(kernel, "fp32")
    tuned = dict(backend.TUNED)
    used = []
    original = tiling.tiles_of
    monkeypatch.setattr(tiling, "tiles_of", lambda *call: used.append(original(*call)) or used[-1])
    out = flash_attention(q, k, v, causal=True, backend="triton")
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert used == [TileConfig(**chosen[kernel]) for kernel in ("forward", "dkdv", "dq")]
    for other, options in ((draw(40), {"causal": True}), (draw(), {})):
        used.clear()
        flash_attention(*other, **options, backend="triton")
        backend.TUNED.clear()
        flash_attention(*other, **options, backend="triton")
        assert used[0] == used[1]
        backend.TUNED.update(tuned)


def test_results_are_kept_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tiles.json"
    chosen = flashlayer.tune(*draw(), path=path, backward=False)
    assert list(json.loads(path.read_text()).values()) == [chosen["forward"]]
    backend.TUNED.clear()
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "_fastest", lambda *_: pytest.fail("measured what the file holds"))
        assert flashlayer.tune(*draw(11), path=path, backward=False) == chosen
    assert len(backend.TUNED) == 1
    flashlayer.tune(*draw(40), path=path, backward=False)
    assert len(json.loads(path.read_text())) == 2


def test_a_call_that_triton_refuses() -> None:
    q = torch.randn(1, 1, 4, 600, device=DEVICE)
    with pytest.raises(ValueError, match=r"there is nothing to tune: .* head dimension of 512"):
        flashlayer.tune(q, q, q)
