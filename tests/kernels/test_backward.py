"""Forward and backward kernels against the naive formula, by the rule of the design."""

import pytest
import torch
from torch import Tensor

from flashlayer import flash_attention
from flashlayer.backends.triton import arguments, tiling
from flashlayer.kernels.tiles import TileConfig
from flashlayer.spec import AttentionSpec
from tests.kernels.reference import assert_accurate, draw, run_kernels, run_naively

HALF_AND_FULL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CAUSAL = AttentionSpec(0.25, None, 0)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, result in actual.items():
        assert torch.equal(result, expected[name]), name


@pytest.mark.parametrize("dtype", HALF_AND_FULL, ids=str)
@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k", "spec"),
    [
        (129, 127, AttentionSpec(0.25)),
        (129, 129, CAUSAL),
        (17, 111, CAUSAL),
        (111, 17, CAUSAL),
        (63, 127, AttentionSpec(0.25, None, 0, "top_left")),
        (127, 63, AttentionSpec(0.25, None, 0, "top_left")),
        (129, 129, AttentionSpec(0.25, 33, 0)),
        (100, 129, AttentionSpec(0.25, 5, 40)),
        (70, 70, AttentionSpec(0.25, 1, 0)),
        (129, 100, AttentionSpec(0.25, 10, None, "top_left")),
        (1, 1, AttentionSpec(1.0)),
    ],
)
def test_geometry(seqlen_q: int, seqlen_k: int, spec: AttentionSpec, dtype: torch.dtype) -> None:
    assert_accurate(draw(seqlen_q=seqlen_q, seqlen_k=seqlen_k, dtype=dtype), spec)


@pytest.mark.parametrize(
    ("head_dim", "value_dim"),
    [
        *((1, 1), (40, 40), (59, 59), (96, 96), (111, 111), (144, 144), (192, 192), (256, 256)),
        *((64, 17), (17, 64), (80, 1), (96, 40), (300, 512)),
    ],
)
def test_head_dims(head_dim: int, value_dim: int) -> None:
    x = draw(seqlen_q=33, seqlen_k=65, head_dim=head_dim, value_dim=value_dim)
    assert_accurate(x, AttentionSpec(head_dim**-0.5, None, 0))


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
def test_grouped_heads(kv_heads: int) -> None:
    assert_accurate(draw(heads=6, kv_heads=kv_heads, seqlen_q=17, seqlen_k=70), AttentionSpec(0.3))
    assert_accurate(draw(heads=6, kv_heads=kv_heads, seqlen_q=70), AttentionSpec(0.3, 9, 0))


def test_without_dlse() -> None:
    x = draw(seqlen_q=65)
    assert_accurate(x._replace(dlse=None), CAUSAL)
    zero = x._replace(dlse=torch.zeros_like(x.dlse))
    assert_same(run_kernels(x._replace(dlse=None), CAUSAL), run_kernels(zero, CAUSAL))


def test_dlse_alone() -> None:
    x = draw(seqlen_q=65)
    assert_accurate(x._replace(do=torch.zeros_like(x.do)), CAUSAL)


STRIDINGS = {
    "bshd": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "last_stride_2": lambda t: t.repeat_interleave(2, dim=-1)[..., ::2],
    "head_dim_outermost": lambda t: t.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
    "padded_rows": lambda t: torch.cat((t, t), dim=-1)[..., : t.shape[-1]],
    "offset_start": lambda t: torch.cat((t[:, :, :1], t), dim=2)[:, :, 1:],
}


@pytest.mark.parametrize("striding", STRIDINGS)
def test_strides(striding: str) -> None:
    """Each tensor in turn: none borrows another's strides. Bitwise: only the addresses differ."""
    x = draw(heads=4, kv_heads=2, seqlen_q=5, seqlen_k=7, head_dim=24, value_dim=20)
    expected = run_kernels(x, CAUSAL)
    for name in ("q", "k", "v", "do", "dlse"):
        tensor = getattr(x, name)
        if name == "dlse":  # (B, H, Sq): one dimension fewer
            strided = STRIDINGS[striding](tensor.unsqueeze(-1)).squeeze(-1)
        else:
            strided = STRIDINGS[striding](tensor)
            assert strided.stride() != tensor.stride() or strided.storage_offset()
        assert torch.equal(strided, tensor)
        assert_same(run_kernels(x._replace(**{name: strided}), CAUSAL), expected)


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_expanded(dim: int) -> None:
    x = draw(batch=2, heads=2, seqlen_q=5, head_dim=16)
    for name in ("q", "k", "v", "do"):
        tensor = getattr(x, name)
        expanded = tensor.narrow(dim, 0, 1).expand_as(tensor)
        assert expanded.stride(dim) == 0
        dense = x._replace(**{name: expanded.contiguous()})
        assert_same(run_kernels(x._replace(**{name: expanded}), CAUSAL), run_kernels(dense, CAUSAL))


def test_gradients_follow_their_inputs_memory_order() -> None:
    x = draw(batch=2, seqlen_q=17)
    x = x._replace(q=STRIDINGS["bshd"](x.q), v=STRIDINGS["bshd"](x.v))
    result = run_kernels(x, CAUSAL)
    for name, is_bshd in {"o": True, "dq": True, "dk": False, "dv": True}.items():
        tensor = result[name]
        assert (tensor.transpose(1, 2) if is_bshd else tensor).is_contiguous(), name


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k", "spec"),
    [
        (70, 129, AttentionSpec(0.25, None, 0, "top_left")),  # keys after the last query's
        (17, 200, AttentionSpec(0.25, 5, 0)),  # keys before the first query's window
        (17, 200, AttentionSpec(0.25, 100, 3, "top_left")),
    ],
)
def test_what_nobody_sees_reaches_nothing(
    seqlen_q: int, seqlen_k: int, spec: AttentionSpec, poison: float
) -> None:
    x = draw(seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    seen = spec.visible(0, seqlen_q, 0, seqlen_k, seqlen_q, seqlen_k, x.q.device).any(0)
    assert not seen.all()
    expected = run_kernels(x, spec)
    k, v = (torch.where(seen[:, None], y, poison) for y in (x.k, x.v))
    actual = run_kernels(x._replace(k=k, v=v), spec)
    assert_same(actual, expected)
    assert (actual["dk"][:, :, ~seen] == 0).all()
    assert (actual["dv"][:, :, ~seen] == 0).all()


def test_rows_without_keys_have_zero_gradients() -> None:
    x = draw(seqlen_q=100, seqlen_k=40)
    dq = run_kernels(x, CAUSAL)["dq"]
    assert (dq[:, :, :60] == 0).all()
    assert (dq[:, :, 60:] != 0).any()
    assert_accurate(x, CAUSAL)


def test_nobody_sees_anything() -> None:
    """Top-left, a window that starts 50 keys to the right of a problem 20 keys wide."""
    x = draw(seqlen_q=40, seqlen_k=20)
    spec = AttentionSpec(0.25, -50, 60, "top_left")
    result = run_kernels(x, spec)
    assert (result.pop("lse") == -torch.inf).all()
    for name, tensor in result.items():
        assert (tensor == 0).all(), name


@pytest.mark.parametrize("magnitude", [0.0, 25.0, 2500.0])
@pytest.mark.parametrize("spec", [CAUSAL, AttentionSpec(0.25, 33, 0), AttentionSpec(-0.25)])
def test_large_scores_in_half_precision(spec: AttentionSpec, magnitude: float) -> None:
    """Of around 1e2 and 1e4: exponents of 2 round otherwise than those of e."""
    x = draw(seqlen_q=129, heads=4, kv_heads=2, dtype=torch.float16)
    assert_accurate(x._replace(q=x.q * magnitude), spec)


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_one_key_in_half_precision(scale: float) -> None:
    """p = exp(s - lse) = 1 from an LSE that was rounded as a natural logarithm."""
    x = draw(seqlen_q=65, seqlen_k=1, dtype=torch.float16)._replace(dlse=None)
    result = run_kernels(x, AttentionSpec(scale))
    assert torch.equal(result["o"], x.v.expand_as(result["o"]))
    # Twice a rounding to fp32 of scores up to 25 * scale, in base 2, and then one to fp16.
    bound = 2 * 25 * 1.5 * scale * 2**-24 + 2**-11
    error = (result["dv"].double() - x.do.double().sum(2, keepdim=True)).abs().max()
    assert error <= bound * x.do.double().abs().sum(2).max()


def test_two_runs_are_bitwise_equal() -> None:
    x = draw(batch=2, heads=4, kv_heads=2, seqlen_q=129, dtype=torch.float16)
    assert_same(run_kernels(x, CAUSAL), run_kernels(x, CAUSAL))


def test_tiles_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every shape of tile takes another path through the ranges."""
    x = draw(heads=2, kv_heads=1, seqlen_q=100, seqlen_k=90, dtype=torch.float64)
    specs = (AttentionSpec(0.25), CAUSAL, AttentionSpec(0.25, 20, 7))
    expected = [run_naively(x, spec) for spec in specs]
    for block_m, block_n in ((16, 16), (16, 64), (64, 16), (128, 128)):
        tiles = TileConfig(block_m, block_n, num_warps=4, num_stages=1)
        monkeypatch.setattr(tiling, "tiles_of", lambda *_, t=tiles: t)
        for spec, wanted in zip(specs, expected, strict=True):
            for name, result in run_kernels(x, spec).items():
                torch.testing.assert_close(result, wanted[name], rtol=1e-12, atol=1e-12, msg=name)


def test_scores_that_overflow_to_minus_infinity() -> None:
    """Such a row has seen keys, but no probability is left: like a row without keys, not NaN."""
    x = draw(seqlen_q=40)
    q, k = x.q.clone(), torch.full_like(x.k, 1e30)
    q[:, :, 7] = -1e30
    result = run_kernels(x._replace(q=q, k=k), AttentionSpec(1.0))
    assert (result["lse"][:, :, 7] == -torch.inf).all()
    for name in ("o", "dq"):
        assert (result[name][:, :, 7] == 0).all(), name
    assert result["dk"].isfinite().all()
    assert result["dv"].isfinite().all()


@pytest.mark.parametrize("dtype", HALF_AND_FULL, ids=str)
def test_an_fp64_mask_of_other_inputs_is_read_in_fp32(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice as wide, its tiles have no room on compute capability 8.6, 8.9 and 12."""
    x = draw(seqlen_q=70, seqlen_k=90, dtype=dtype)
    mask = torch.randn(1, 1, 70, 90, dtype=torch.float64, device=x.q.device)
    read: list[torch.dtype] = []
    original = arguments._mask
    monkeypatch.setattr(arguments, "_mask", lambda m: read.append(m.dtype) or original(m))
    found = {}
    for name, given in {"fp64": mask, "fp32": mask.float()}.items():
        leaves = [y.detach().requires_grad_() for y in (x.q, x.k, x.v, given)]
        out = flash_attention(*leaves[:3], attn_mask=leaves[3], backend="triton")
        out.backward(x.do)
        found[name] = [out.detach(), *(leaf.grad for leaf in leaves)]
    assert found["fp64"][-1].dtype == torch.float64
    if dtype == torch.float64:
        assert set(read) == {torch.float64, torch.float32}
        return
    assert set(read) == {torch.float32}
    for actual, expected in zip(found["fp64"], found["fp32"], strict=True):
        assert torch.equal(actual, expected.to(actual.dtype))
