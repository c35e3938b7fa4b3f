"""Wrong calls of FlashMultiheadAttention, and nested tensors."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flashlayer import FlashMultiheadAttention
from flashlayer.masks import chunks
from tests.integrations.multihead import E, H, L, N

X = torch.zeros(L, N, E)

# torch's constructor of nested tensors calls itself a prototype.
with_nested_tensors = pytest.mark.filterwarnings(
    "ignore:The PyTorch API of nested tensors:UserWarning"
)

HIDDEN = torch.zeros(N, N, dtype=torch.bool)


def nested(m: nn.Module, *others: Tensor, **options: Any) -> Any:
    x = torch.nested.nested_tensor([X[0], X[1]])
    with torch.set_grad_enabled(not options and not others):
        return m(x, *(others or (x, x)), **options)


# name: (a call that torch rejects too, this library's error, its message)
BAD_CALLS = {
    "dimensions": (lambda m: m(X, X[0], X[0]), ValueError, "but found 2-D and 2-D tensors"),
    "features": (lambda m: m(X, X[..., :4], X), ValueError, r"key must have 16 features.*4\)"),
    "query_features": (lambda m: m(X[..., :4], X, X), ValueError, "query must have 16 features"),
    "lengths": (lambda m: m(X, X, X[:2]), ValueError, "key and value must agree"),
    "batch": (lambda m: m(X, X[:, :1], X[:, :1]), ValueError, "one batch size"),
    "no_tensor": (lambda m: m(X, X, None), TypeError, "value must be a torch.Tensor"),
    "padding": (
        lambda m: m(X, X, X, key_padding_mask=torch.zeros(L, N)),
        ValueError,
        r"key_padding_mask must be \(3, 6\), got \(6, 3\)",
    ),
    "padding_dimensions": (
        lambda m: m(X, X, X, key_padding_mask=torch.zeros(L)),
        ValueError,
        "expected `key_padding_mask` to be `None` or 2-D but found 1-D",
    ),
    "attn_mask": (
        lambda m: m(X, X, X, attn_mask=torch.zeros(N, L, L)),
        ValueError,
        r"attn_mask must be \(6, 6\) or \(12, 6, 6\), got \(3, 6, 6\)",
    ),
    "attn_mask_dimensions": (
        lambda m: m(X, X, X, attn_mask=torch.zeros(L)),
        ValueError,
        "expected `attn_mask` to be `None`, 2-D or 3-D but found 1-D",
    ),
    "mask_dtype": (
        lambda m: m(X, X, X, attn_mask=torch.zeros(L, L, dtype=torch.uint8)),
        TypeError,
        "attn_mask must be bool or floating, got torch.uint8",
    ),
    "interval_mask": (
        lambda m: m(X, X, X, attn_mask=chunks(2, seqlen=L)),
        TypeError,
        "attn_mask must be a tensor, .* whose True hides: got an IntervalMask",
    ),
    "interval_padding": (
        lambda m: m(X, X, X, key_padding_mask=chunks(2, seqlen=L)),
        TypeError,
        "key_padding_mask must be a tensor, .* whose True hides: got an IntervalMask",
    ),
    "nested_gradient": (
        nested,
        ValueError,
        "does not support NestedTensor.*grad is enabled and .* biases requires_grad; pass",
    ),
    "nested_mask": (
        lambda m: nested(m, attn_mask=HIDDEN),
        ValueError,
        "does not support NestedTensor.* attn_mask or key_padding_mask is given",
    ),
    "nested_padding": (
        lambda m: nested(m, key_padding_mask=HIDDEN[:2]),
        ValueError,
        "does not support NestedTensor.* attn_mask or key_padding_mask is given",
    ),
    "nested_cross": (
        lambda m: nested(m, X, X),
        ValueError,
        "does not support NestedTensor.* not the same tensor",
    ),
}


def error_of(call: Any) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - any, to be looked at
        call()
    return caught.value


@with_nested_tensors
@pytest.mark.parametrize(("call", "error", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_a_wrong_call_raises_what_torch_raises_and_names_the_argument(
    call: Any, error: Any, message: str
) -> None:
    batch_first = "NestedTensor" in message
    host, ours = (
        cls(E, H, batch_first=batch_first).eval()
        for cls in (nn.MultiheadAttention, FlashMultiheadAttention)
    )
    raised = error_of(lambda: call(ours))
    assert isinstance(raised, error)
    assert re.search(message, str(raised))
    expected = type(error_of(lambda: call(host)))
    if expected is not AttributeError:  # of None, by accident
        assert isinstance(raised, expected)


@with_nested_tensors
def test_a_jagged_tensor_is_rejected() -> None:
    x = torch.nested.nested_tensor([X[0], X[1]], layout=torch.jagged)
    with torch.no_grad(), pytest.raises(ValueError, match="it has the jagged layout"):
        FlashMultiheadAttention(E, H, batch_first=True)(x, x, x)


@with_nested_tensors
@torch.no_grad()
def test_nested_tensors_of_empty_sequences() -> None:
    ours = FlashMultiheadAttention(E, H, batch_first=True).eval()
    x = torch.nested.nested_tensor([torch.empty(0, E)] * 2)
    out, weights = ours(x, x, x, average_attn_weights=False)
    assert [len(sequence) for sequence in out.unbind()] == [0, 0]
    assert weights.shape == (2, H, 0, 0)
    with pytest.raises(ValueError, match="it has 1 dimensions and not 3"):
        ours(*[torch.nested.nested_tensor([])] * 3)


@pytest.mark.parametrize("options", [{}, {"kdim": 10}], ids=str)
def test_projections_of_some_heads_only_are_refused(options: dict[str, Any]) -> None:
    """Weights that were cut to a rank's heads."""
    ours = FlashMultiheadAttention(E, H, bias=False, **options)
    if options:
        ours.k_proj_weight = nn.Parameter(ours.k_proj_weight[: E // 2])
    else:
        ours.in_proj_weight = nn.Parameter(ours.in_proj_weight[: 3 * E // 2])
    x = torch.randn(L, N, E)
    key = torch.randn(L, N, ours.kdim)
    for error in (ValueError, RuntimeError):
        with pytest.raises(error, match=r"must make embed_dim=16 features, got 8"):
            ours(x, key if options else x, x)
