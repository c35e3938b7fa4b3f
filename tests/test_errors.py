"""The mistakes a newcomer makes: each gives one sentence that names the argument."""

import pytest
import torch

import flashlayer
from flashlayer import available_backends, flash_attention


def qkv(*, heads: int = 4, kv_heads: int = 2, **kwargs) -> list[torch.Tensor]:
    return [torch.randn(2, h, 5, 8, **kwargs) for h in (heads, kv_heads, kv_heads)]


BAD_CALLS = {
    "not_a_tensor": (
        lambda q, k, v: flash_attention(q.tolist(), k, v),
        TypeError,
        "query must be a torch.Tensor, got list",
    ),
    "three_dimensions": (
        lambda q, k, v: flash_attention(q, k[0], v),
        ValueError,
        r"key must have 4 dimensions .* got shape \(2, 5, 8\)",
    ),
    "batch": (
        lambda q, k, v: flash_attention(q, k[:1], v[:1]),
        ValueError,
        r"key must be \(batch=2, .* got \(1, 2, 5, 8\)",
    ),
    "head_dim": (
        lambda q, k, v: flash_attention(q, k[..., :4], v),
        ValueError,
        r"head_dim=8\).* got \(2, 2, 5, 4\)",
    ),
    "value_length": (
        lambda q, k, v: flash_attention(q, k, v[:, :, :3]),
        ValueError,
        r"value must be .*sequence=5.* got \(2, 2, 3, 8\)",
    ),
    "value_heads": (
        lambda q, k, v: flash_attention(q, k, v[:, :1]),
        ValueError,
        r"value must be .*kv_heads=2.* got \(2, 1, 5, 8\)",
    ),
    "heads_no_multiple": (
        lambda q, k, v: flash_attention(q[:, :3], k, v),
        ValueError,
        "multiple of key's and value's, got 3 and 2",
    ),
    "mixed_dtypes": (
        lambda q, k, v: flash_attention(q, k.half(), v),
        TypeError,
        "one dtype, got torch.float32, torch.float16 and torch.float32",
    ),
    "integers": (
        lambda q, k, v: flash_attention(q.int(), k.int(), v.int()),
        TypeError,
        "query must be one of .*torch.bfloat16.* got torch.int32",
    ),
    "devices": (
        lambda q, k, v: flash_attention(q, k.to("meta"), v),
        ValueError,
        "key must be on query's device cpu, got meta",
    ),
    "head_dim_0": (
        lambda q, k, v: flash_attention(q[..., :0], k[..., :0], v),
        ValueError,
        "head dimension of query and key must be at least 1",
    ),
    "unknown_backend": (
        lambda q, k, v: flash_attention(q, k, v, backend="flash"),
        ValueError,
        "backend must be one of 'auto', 'triton', 'aten', 'tiled', 'standard', got 'flash'",
    ),
    "backend_type": (
        lambda q, k, v: flash_attention(q, k, v, backend=None),
        TypeError,
        "backend must be a string, got NoneType",
    ),
    "backend_refuses": (
        lambda q, k, v: flash_attention(q, k, v, window_size=(1, 0), backend="aten"),
        ValueError,
        "backend 'aten' can't compute this call: it has no sliding window",
    ),
    "diagonal": (
        lambda q, k, v: flash_attention(q, k, v, diagonal="main"),
        ValueError,
        "diagonal must be 'bottom_right' or 'top_left', got 'main'",
    ),
    "window_is_no_pair": (
        lambda q, k, v: flash_attention(q, k, v, window_size=128),
        TypeError,
        r"window_size must be a pair \(left, right\), got 128",
    ),
    "window_negative": (
        lambda q, k, v: flash_attention(q, k, v, window_size=(-1, 0)),
        ValueError,
        "window_size's left must be at least 0, or None for unbounded, got -1",
    ),
    "window_float": (
        lambda q, k, v: flash_attention(q, k, v, window_size=(None, 1.5)),
        TypeError,
        "window_size's right must be an int or None, got float",
    ),
    "scale_nan": (
        lambda q, k, v: flash_attention(q, k, v, scale=float("nan")),
        ValueError,
        "scale must be finite, got nan",
    ),
    "scale_type": (
        lambda q, k, v: flash_attention(q, k, v, scale="0.5"),
        TypeError,
        "scale must be a float or None, got str",
    ),
    "positional_option": (
        lambda q, k, v: flash_attention(q, k, v, True),
        TypeError,
        "positional arguments",
    ),
    "unknown_option": (
        lambda q, k, v: available_backends(q, k, v, is_causal=True),
        TypeError,
        "is_causal",
    ),
}


@pytest.mark.parametrize("call", BAD_CALLS)
def test_bad_call(call: str) -> None:
    function, error, message = BAD_CALLS[call]
    with pytest.raises(error, match=message):
        function(*qkv())


UNBUILT = {
    "attn_mask": torch.ones(5, 5, dtype=torch.bool),
    "softcap": 30.0,
    "alibi_slopes": torch.ones(4),
    "sinks": torch.zeros(4),
    "dropout_p": 0.1,
    "dropout_seed": 1,
}


@pytest.mark.parametrize("option", UNBUILT)
def test_unbuilt_option_is_named(option: str) -> None:
    with pytest.raises(NotImplementedError, match=f"{option} is not built yet"):
        flash_attention(*qkv(), **{option: UNBUILT[option]})


def test_unbuilt_functions() -> None:
    q, k, v = (torch.randn(5, 2, 8) for _ in range(3))
    with pytest.raises(NotImplementedError, match="cu_seqlens_q"):
        flashlayer.flash_attention_varlen(q, k, v, cu_seqlens_q=torch.tensor([0, 5]))
    with pytest.raises(NotImplementedError, match="dropout_p"):
        flashlayer.dropout_keep_mask(1, 1, 1, 1, 0.5, 0, "cpu")


def test_available_backends_names_every_reason() -> None:
    reasons = available_backends(*qkv(), window_size=(1, 0), return_lse=True, backend="tiled")
    assert list(reasons) == ["triton", "aten", "tiled", "standard"]
    assert reasons["aten"] == "it has no sliding window"
    assert reasons["tiled"] is None
    assert reasons["standard"] is None


def test_mixed_dtypes_under_autocast() -> None:
    """Autocast makes one dtype of fp32 and bf16 inputs, as it does for SDPA."""
    q, k, v = qkv()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = flash_attention(q, k.bfloat16(), v)
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("backend", ["aten", "triton"])
def test_second_derivative_raises(backend: str) -> None:
    """Where there is none it raises; a gradient penalty without it would be silently wrong."""
    q, k, v = (x.requires_grad_() for x in qkv())
    out = flash_attention(q, k, v, backend=backend)
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        (out.sum() + dq.square().sum()).backward()


def test_second_derivative_of_tiled() -> None:
    leaves = [x.requires_grad_() for x in qkv(dtype=torch.float64)]

    def attend(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return flash_attention(*tensors, causal=True, return_lse=True, backend="tiled")

    assert torch.autograd.gradgradcheck(attend, leaves)
