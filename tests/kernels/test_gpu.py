"""The compiled kernels at the sizes people train with."""

import pytest
import torch

from flashlayer import flash_attention
from flashlayer.spec import AttentionSpec
from tests.kernels.reference import assert_accurate, draw, run_kernels

pytestmark = pytest.mark.gpu

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SPECS = {
    "full": AttentionSpec(0.125),
    "causal": AttentionSpec(0.125, None, 0),
    "window": AttentionSpec(0.125, 511, 0),
    "band": AttentionSpec(0.125, 100, 300, "top_left"),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("seqlen", [2048, 4097])
@pytest.mark.parametrize("spec", SPECS)
def test_real_sizes(spec: str, seqlen: int, head_dim: int, dtype: torch.dtype) -> None:
    heads = 16 if seqlen == 2048 else 4  # the fp64 reference holds Sq x Sk for every head
    assert_accurate(draw(2, heads, seqlen_q=seqlen, head_dim=head_dim, dtype=dtype), SPECS[spec])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("head_dim", "value_dim"),
    [(16, 16), (32, 32), (40, 59), (80, 80), (96, 128), (192, 192), (256, 256)],
)
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_head_dims_and_groups(
    kv_heads: int, head_dim: int, value_dim: int, dtype: torch.dtype
) -> None:
    x = draw(2, 4, kv_heads, 513, 1030, head_dim, value_dim, dtype)
    assert_accurate(x, SPECS["causal"])
    assert_accurate(x, SPECS["band"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [320, 512])
def test_widest_heads(head_dim: int, dtype: torch.dtype) -> None:
    x = draw(2, 4, 2, 257, 300, head_dim, dtype=dtype)
    assert_accurate(x, SPECS["causal"])
    with pytest.raises(ValueError, match="no room on a chip"):
        flash_attention(*(t.float() for t in x[:3]), backend="triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [16, 32, 64, 96, 128, 256])
def test_runs_are_bitwise_equal(head_dim: int, dtype: torch.dtype) -> None:
    """Also a guard against miscompiled wgmma, whose results change from run to run."""
    x = draw(2, 16, 4, seqlen_q=1025, head_dim=head_dim, dtype=dtype)
    for spec in SPECS.values():
        first = run_kernels(x, spec)
        for _ in range(5):
            for name, result in run_kernels(x, spec).items():
                assert torch.equal(result, first[name]), name


def test_memory_check() -> None:
    """Every kernel once at odd sizes; ``benchmarks gpu`` runs it under compute-sanitizer."""
    q, k, v = (
        torch.randn(2, 2, n, 96, device="cuda", dtype=torch.bfloat16) for n in (70, 133, 133)
    )
    mask = torch.randn(1, 2, 70, 133, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    out = flash_attention(q.requires_grad_(), k, v, attn_mask=mask, causal=True, backend="triton")
    out.sum().backward()
    torch.cuda.synchronize()
    assert out.isfinite().all()
    assert mask.grad.isfinite().all()


def test_more_blocks_than_other_grid_axes_hold() -> None:
    x = draw(batch=70_000, heads=1, seqlen_q=2, head_dim=16, dtype=torch.float16)
    assert_accurate(x, SPECS["causal"])


def test_elements_beyond_int32() -> None:
    """Keys and queries 2^24 elements apart, 130 of them: the last lies past 2^31."""
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    x = draw(heads=1, seqlen_q=130, head_dim=64, dtype=torch.float16)
    expected = run_kernels(x, SPECS["causal"])
    storage = torch.empty(129 * 2**24 + 64, dtype=torch.float16, device="cuda")
    for name in ("q", "k", "v", "do"):
        far = storage.as_strided(x.q.shape, (0, 0, 2**24, 1))
        far.copy_(getattr(x, name))
        for result_name, result in run_kernels(x._replace(**{name: far}), SPECS["causal"]).items():
            assert torch.equal(result, expected[result_name]), result_name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_not_the_current_device() -> None:
    x = draw(seqlen_q=100)
    elsewhere = type(x)(*(t.to("cuda:1") for t in x))
    expected = run_kernels(x, SPECS["causal"])
    for name, result in run_kernels(elsewhere, SPECS["causal"]).items():
        assert result.device.index == 1
        assert torch.equal(result.cpu(), expected[name].cpu()), name


def test_tf32_only_when_allowed() -> None:
    """With TF32 the error is the one of 10-bit mantissas; without it, that of fp32."""
    x = draw(heads=4, seqlen_q=512, head_dim=64)
    exact = run_kernels(x.to(torch.float64), SPECS["full"])["o"]
    assert torch.backends.cuda.matmul.fp32_precision != "tf32"
    ieee = (run_kernels(x, SPECS["full"])["o"] - exact).abs().max()
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        tf32 = (run_kernels(x, SPECS["full"])["o"] - exact).abs().max()
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert ieee < 1e-5 < tf32 < 1e-2
