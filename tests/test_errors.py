"""The mistakes a newcomer makes: each gives one sentence that names the argument."""

import numpy as np
import pytest
import torch

from flashlayer import (
    FlashAttention,
    FlashMultiheadAttention,
    available_backends,
    flash_attention,
    flash_attention_varlen,
    integrations,
)


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
        lambda q, k, v: flash_attention(q, k, v, softcap=1.0, backend="aten"),
        ValueError,
        "backend 'aten' can't compute this call: it has no softcap",
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
    "causal_word": (
        lambda q, k, v: flash_attention(q, k, v, causal="False"),
        TypeError,
        "causal must be a bool, got str",
    ),
    "causal_list": (
        lambda q, k, v: flash_attention(q, k, v, causal=[False]),
        TypeError,
        "causal must be a bool, got list",
    ),
    "causal_of_heads": (
        lambda q, k, v: flash_attention(q, k, v, causal=torch.tensor([True, False])),
        TypeError,
        "causal must be a bool, got Tensor",
    ),
    "scale_overflows": (
        lambda q, k, v: flash_attention(q, k, v, scale=10**400),
        ValueError,
        "scale must be finite, got 1000",
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


OPTION_ERRORS = {
    "mask_shape": (
        {"attn_mask": torch.ones(5, 4) > 0},
        ValueError,
        r"\(2, 4, 5, 5\), got \(5, 4\)",
    ),
    "mask_dims": ({"attn_mask": torch.ones(1, 1, 1, 1, 5)}, ValueError, "must be broadcastable"),
    "mask_int": (
        {"attn_mask": torch.ones(5, 5).int()},
        TypeError,
        "bool or floating, got torch.int",
    ),
    "mask_type": ({"attn_mask": [[True]]}, TypeError, "attn_mask must be a torch.Tensor, got list"),
    "softcap_0": ({"softcap": 0.0}, ValueError, "softcap must be positive, or None for off, got 0"),
    "softcap_type": ({"softcap": True}, TypeError, "softcap must be a float or None, got bool"),
    "slopes": ({"alibi_slopes": torch.ones(3)}, ValueError, r"\(heads=4,\) or .* got \(3,\)"),
    "slopes_grad": (
        {"alibi_slopes": torch.ones(4, requires_grad=True)},
        ValueError,
        "alibi_slopes has no gradient",
    ),
    "sinks": ({"sinks": torch.ones(2, 4)}, ValueError, r"sinks must be \(heads=4,\), got \(2, 4\)"),
    "sinks_type": ({"sinks": 1.0}, TypeError, "sinks must be a torch.Tensor, got float"),
    "dropout": ({"dropout_p": 1.5}, ValueError, "a probability from 0 to 1, got 1.5"),
    "dropout_type": ({"dropout_p": "0.1"}, TypeError, "dropout_p must be a float, got str"),
    "seed": ({"dropout_p": 0.1, "dropout_seed": 0.5}, TypeError, "an int or None, got float"),
    "seed_size": ({"dropout_p": 0.1, "dropout_seed": 2**63}, ValueError, "must fit into 64 bits"),
}


@pytest.mark.parametrize("name", OPTION_ERRORS)
def test_bad_option(name: str) -> None:
    options, error, message = OPTION_ERRORS[name]
    with pytest.raises(error, match=message):
        flash_attention(*qkv(), **options)


PACKED_ERRORS = {
    "dense": (torch.randn(1, 9, 2, 8), {}, ValueError, r"query must have 3 dimensions \(tokens"),
    "edges_type": (torch.randn(9, 2, 8), {"cu_seqlens_q": [0, 9]}, TypeError, "tensor, got list"),
    "edges_float": (
        torch.randn(9, 2, 8),
        {"cu_seqlens_q": torch.tensor([0.0, 9.0])},
        TypeError,
        "must be an int32 or int64 tensor, got torch.float32",
    ),
    "edges_shape": (
        torch.randn(9, 2, 8),
        {"cu_seqlens_q": torch.tensor([[0, 9]])},
        ValueError,
        r"must be \(sequences \+ 1,\), got \(1, 2\)",
    ),
    "edges_differ": (
        torch.randn(9, 2, 8),
        {"cu_seqlens_k": torch.tensor([0, 4, 9])},
        ValueError,
        r"must be of one length, got \(2, 3\)",
    ),
}


@pytest.mark.parametrize("name", PACKED_ERRORS)
def test_bad_packing(name: str) -> None:
    query, options, error, message = PACKED_ERRORS[name]
    k = v = torch.randn(9, 2, 8)
    with pytest.raises(error, match=message):
        flash_attention_varlen(query, k, v, **{"cu_seqlens_q": torch.tensor([0, 9]), **options})


def test_packed_keys_need_their_own_edges() -> None:
    q, k = torch.randn(9, 2, 8), torch.randn(7, 2, 8)
    with pytest.raises(ValueError, match=r"cu_seqlens_k must be given .* got 9 and 7 tokens"):
        flash_attention_varlen(q, k, k, cu_seqlens_q=torch.tensor([0, 9]))


def test_available_backends_names_every_reason() -> None:
    reasons = available_backends(*qkv(), softcap=1.0, return_lse=True, backend="tiled")
    assert list(reasons) == ["triton", "aten", "tiled", "standard"]
    assert reasons["aten"] == "it has no softcap"
    assert reasons["tiled"] is None
    assert reasons["standard"] is None


def test_mixed_dtypes_under_autocast() -> None:
    """Autocast makes one dtype of fp32 and bf16 inputs, as it does for SDPA."""
    q, k, v = qkv()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = flash_attention(q, k.bfloat16(), v)
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("edges", [[2, 4, 9], [0, 6, 4, 9], [0, 4, 30], [0, -3, 9]])
def test_boundaries_that_are_none(edges: list[int]) -> None:
    """Backends took them each in its own way, and a GPU would read past the tensors."""
    rows = torch.randn(3, 9, 2, 4).unbind(0)
    with pytest.raises(ValueError, match="cu_seqlens_q must start at 0, not fall, and end at 9"):
        flash_attention_varlen(*rows, cu_seqlens_q=torch.tensor(edges))


@pytest.mark.parametrize(
    ("longest", "error", "message"),
    [
        (2, ValueError, "max_seqlen_q must be at least the longest sequence's 5, got 2"),
        (-1, ValueError, "max_seqlen_q must be at least 0, got -1"),
        (5.5, TypeError, "max_seqlen_q must be an int or None, got float"),
        ("5", TypeError, "max_seqlen_q must be an int or None, got str"),
    ],
)
def test_longest_sequence_that_is_none(longest: object, error: type, message: str) -> None:
    rows = torch.randn(3, 9, 2, 4).unbind(0)
    with pytest.raises(error, match=message):
        flash_attention_varlen(*rows, cu_seqlens_q=torch.tensor([0, 4, 9]), max_seqlen_q=longest)


def test_longest_sequence_may_be_a_tensor() -> None:
    rows = torch.randn(3, 9, 2, 4).unbind(0)
    edges = torch.tensor([0, 4, 9])
    out = flash_attention_varlen(*rows, cu_seqlens_q=edges, max_seqlen_q=torch.tensor(5))
    torch.testing.assert_close(out, flash_attention_varlen(*rows, cu_seqlens_q=edges))


def test_asking_for_backends_draws_no_random_number() -> None:
    q = torch.randn(1, 1, 4, 8)
    before = torch.get_rng_state()
    available_backends(q, q, q, dropout_p=0.1)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(TypeError, match="unknown option 'packing'"):
        available_backends(q, q, q, packing=None)


def test_a_layer_refuses_an_unknown_backend_when_it_is_built() -> None:
    for build in (
        lambda: FlashAttention(8, 2, backend="bogus"),
        lambda: FlashMultiheadAttention(8, 2, backend="bogus"),
        lambda: integrations.sdpa.override("bogus"),
    ):
        with pytest.raises(ValueError, match=r"backend must be one of .* got 'bogus'"):
            build()


ODD_LAYOUTS = {
    "jagged": (
        lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged),
        r"a nested tensor of the jagged layout: pass its values\(\) to flash_attention_varlen",
    ),
    "nested": (
        lambda x: torch.nested.nested_tensor(list(x)),
        "a nested tensor: pack its sequences and call flash_attention_varlen",
    ),
    "sparse": (lambda x: x.to_sparse(), r"one of layout torch.sparse_coo: call to_dense\(\)"),
    "mkldnn": (lambda x: x.to_mkldnn(), r"one of layout torch._mkldnn: call to_dense\(\)"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", ["query", "key", "value", "attn_mask", "sinks", "alibi_slopes"])
@pytest.mark.parametrize("layout", ODD_LAYOUTS)
def test_a_layout_without_strides_is_refused_by_name(layout: str, name: str) -> None:
    """Also after a dense call of the same sizes, whose checks are not made again."""
    convert, message = ODD_LAYOUTS[layout]
    q = torch.randn(2, 4, 5, 8)
    call = {"query": q, "key": q, "value": q}
    flash_attention(**call)
    if name in call:
        call[name] = convert(q)
    else:
        call[name] = convert(torch.randn(4, 5) if layout != "nested" else torch.randn(4, 5, 2))
    for question in (flash_attention, available_backends):
        with pytest.raises(TypeError, match=f"{name} must be a dense tensor, got {message}"):
            question(**call)
    if name in ("query", "key", "value"):
        rows = dict.fromkeys(("query", "key", "value"), torch.randn(9, 2, 8))
        rows[name] = convert(torch.randn(9, 2, 8))
        with pytest.raises(TypeError, match=message):
            flash_attention_varlen(**rows, cu_seqlens_q=torch.tensor([0, 9]))


def test_wrong_boundaries_are_told_in_numbers() -> None:
    rows = torch.randn(300, 2, 8)
    edges = torch.arange(0, 400, 10)
    with pytest.raises(ValueError, match=r"end at 300 tokens or before, got \[0, 10, .* 390\]$"):
        flash_attention_varlen(rows, rows, rows, cu_seqlens_q=edges)


def test_numbers_of_numpy_are_numbers() -> None:
    q = torch.randn(1, 2, 9, 8)
    plain = {"window_size": (2, 0), "scale": 0.5, "dropout_p": 0.5, "dropout_seed": 4}
    of_numpy = {
        "window_size": (np.int64(2), np.int32(0)),
        "scale": np.float32(0.5),
        "dropout_p": np.float32(0.5),
        "dropout_seed": np.int64(4),
        "causal": np.bool_(False),
    }
    expected = flash_attention(q, q, q, **plain)
    assert torch.equal(flash_attention(q, q, q, **of_numpy), expected)
