"""flashlayer.tune in the interpreter, where only the timings mean nothing."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import flashlayer
from flashlayer import flash_attention, tuning
from flashlayer.backends import split_keys
from flashlayer.backends import triton as backend
from flashlayer.backends.triton import tiling
from flashlayer.kernels.tiles import TileConfig, candidates, tile_config

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
        config = replace(TileConfig(**tiles), heaviest_first=False)
        table = tile_config(kernel, "interpreter", "fp32", 8)
        assert config in [*candidates(kernel, "fp32"), table]
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


@pytest.mark.parametrize("keys", [30, 31])
def test_a_decoding_step_takes_what_was_tuned_for_its_parts(
    keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = TileConfig(16, 16, 4, 1)
    monkeypatch.setattr(tiling, "candidate_tiles", lambda *_: [only])
    monkeypatch.setattr(split_keys, "num_splits", lambda *_: 3)
    q, k, v = (torch.randn(2, 2, n, 8, device=DEVICE) for n in (1, keys, keys))
    assert flashlayer.tune(q, k, v, causal=True, backward=False) == {"forward": asdict(only)}
    used: list[TileConfig] = []
    original = tiling.tiles_of
    monkeypatch.setattr(tiling, "tiles_of", lambda *call: used.append(original(*call)) or used[-1])
    out = flash_attention(q, k, v, causal=True, backend="triton")
    assert used[0] == only
    exact = flash_attention(q, k, v, causal=True, backend="standard")
    torch.testing.assert_close(out, exact)


def test_masks_of_another_size_have_a_bucket_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles chosen for a mask of bytes may not fit the chip with one of fp32.

    A file that doesn't tell the size is not read for a dense mask, and as before for others.
    """
    only = TileConfig(16, 16, 4, 1)
    monkeypatch.setattr(tiling, "candidate_tiles", lambda *_: [only])
    call, path = draw(), tmp_path / "tiles.json"
    for options in ({}, {"attn_mask": torch.ones(12, 12, dtype=torch.bool, device=DEVICE)}):
        flashlayer.tune(*call, path=path, backward=False, **options)
    plain, masked = json.loads(path.read_text())
    assert "none" in plain.split()
    assert masked == plain.replace("none", "dense1")
    path.write_text(path.read_text().replace("dense1", "dense"))
    backend.TUNED.clear()
    measured: list[tuple[object, ...]] = []
    monkeypatch.setattr(tuning, "_fastest", lambda *call: measured.append(call) or only)
    flashlayer.tune(*call, path=path, backward=False)
    assert not measured
    for dtype in (torch.bool, torch.float16, torch.float32, torch.float64):
        mask = torch.ones(12, 12, device=DEVICE).to(dtype)
        flashlayer.tune(*call, path=path, backward=False, attn_mask=mask)
    sizes = [name.split()[-2] for name in json.loads(path.read_text())]
    # fp64 masks of other inputs are read in fp32.
    assert sizes == ["none", "dense", "dense1", "dense2", "dense4"]
    assert len(measured) == 3


@pytest.mark.parametrize("causal", [True, False])
def test_which_candidates_are_timed(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those far behind no further; at last, if causal, the order of the fastest one's programs."""
    near, fastest, slow = (TileConfig(16, n, 4, 1) for n in (16, 32, 64))
    ordered, table = replace(fastest, heaviest_first=True), TileConfig(64, 32, 4, 1)
    seconds = {near: 1.2, fastest: 1.0, slow: 1.3, ordered: 0.9, table: 2.0}
    timed: list[TileConfig] = []

    def time(run: object, device: object) -> tuple[float, None]:
        timed.extend(backend.TUNED.values())
        return seconds[timed[-1]], None

    monkeypatch.setattr(tuning, "ROUNDS", 2)
    monkeypatch.setattr(tuning, "_timed", time)
    monkeypatch.setattr(tiling, "candidate_tiles", lambda *_: [near, fastest, slow])
    chosen = flashlayer.tune(*draw(), causal=causal, backward=False)
    first = [near, fastest, slow, near, fastest]
    assert timed == first + [fastest, ordered, table, fastest, ordered] * causal
    assert chosen["forward"] == asdict(ordered if causal else fastest)


def test_a_call_that_triton_refuses() -> None:
    q = torch.randn(1, 1, 4, 600, device=DEVICE)
    with pytest.raises(ValueError, match=r"there is nothing to tune: .* head dimension of 512"):
        flashlayer.tune(q, q, q)
    # What changes only the results is taken; an option that there is not, is named.
    with pytest.raises(ValueError, match="there is nothing to tune"):
        flashlayer.tune(q, q, q, backend="triton", return_lse=True)
    with pytest.raises(TypeError, match=r"tune\(\) got an unknown option 'casual'"):
        flashlayer.tune(q, q, q, casual=True)
    with pytest.raises(TypeError, match=r"query must be a torch.Tensor, got NoneType"):
        flashlayer.tune(None, q, q)  # type: ignore[arg-type]


def _gradients(
    tensors: tuple[torch.Tensor, ...], do: torch.Tensor, dtype: torch.dtype, **options: object
) -> tuple[torch.Tensor, ...]:
    """As a kernel gives them that computes in ``dtype`` from the same numbers."""
    leaves = [x.to(dtype).requires_grad_() for x in tensors]
    out = flash_attention(*leaves, backend="tiled", **options)
    return tuple(x.to(do.dtype) for x in torch.autograd.grad(out, leaves, do.to(dtype)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("q", "k"), [(70, 90), (200, 130), (40, 1)])
def test_gradients_agree_if_they_differ_by_rounding_alone(
    dtype: torch.dtype, q: int, k: int
) -> None:
    tensors = (*(torch.randn(1, 2, n, 64).to(dtype) for n in (q, k, k)),)
    do = torch.randn(1, 2, q, 64).to(dtype)

    def agree(found: tuple[torch.Tensor, ...]) -> bool:
        return tuning._gradients_agree(do, *tensors, 64**-0.5, expected, found)

    expected = _gradients(tensors, do, torch.float32, causal=True)
    assert agree(_gradients(tensors, do, dtype, causal=True))
    if k == 1:
        return  # every query sees it, whatever the window
    assert not agree(_gradients(tensors, do, dtype, window_size=(None, 1)))
    assert not agree(_gradients(tensors, do.roll(1, 3), dtype, causal=True))
    for which in range(3):
        wrong = [x.clone() for x in expected]
        wrong[which][:, :, -1] = 0
        assert not agree((*wrong,)), which
        wrong[which][:, :, -1] = 1.05 * expected[which][:, :, -1]
        assert not agree((*wrong,)), which
        wrong[which][:, :, -1] = torch.nan
        assert not agree((*wrong,)), which


def test_a_gpu_that_is_not_the_current_one_is_timed_behind_a_head_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its launches queue up behind a sleep: else an idle GPU's wait for Python is timed."""
    current, happened = ["cuda:0"], []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            happened.append(("record", current[-1]))

        def synchronize(self) -> None:
            happened.append(("synchronize", current[-1]))

        def elapsed_time(self, stop: object) -> float:
            return 3.0

    @contextmanager
    def enter(device: torch.device) -> Iterator[None]:
        current.append(str(device))
        yield
        current.pop()

    def run() -> str:
        happened.append(("run", current[-1]))
        return "results"

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", enter)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda _: happened.append(("sleep", current[-1])))
    assert tuning._timed(run, torch.device("cuda", 1)) == (0.003, "results")
    assert happened == [
        (what, "cuda:1") for what in ("sleep", "record", "run", "record", "synchronize")
    ]
    assert current == ["cuda:0"]
