"""torch's module and ours with the same weights, and calls of both."""

from typing import Any

import torch
from torch import Tensor, nn

from flashlayer import FlashMultiheadAttention

E, H, N, L, S = 16, 4, 3, 6, 9

CONSTRUCTORS = {
    "plain": {},
    "no_bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "both_extras": {"add_bias_kv": True, "add_zero_attn": True},
    "kdim_vdim": {"kdim": 10, "vdim": 12},
    "kdim_no_bias": {"kdim": 10, "bias": False, "add_bias_kv": True},
    "batch_first": {"batch_first": True},
    "one_head": {"num_heads": 1},
}


def pair(
    dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[nn.MultiheadAttention, FlashMultiheadAttention]:
    """torch's module and ours, with the same random weights."""
    options = {"embed_dim": E, "num_heads": H, "dtype": dtype} | options
    host, ours = nn.MultiheadAttention(**options), FlashMultiheadAttention(**options)
    for parameter in host.parameters():  # torch starts the biases at 0
        nn.init.normal_(parameter, std=0.3)
    ours.load_state_dict(host.state_dict(), strict=True)
    return host, ours


def inputs(
    module: nn.MultiheadAttention,
    *,
    batched: bool = True,
    same: bool = False,
    length: int = L,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    def draw(length: int, features: int) -> Tensor:
        shape = (length, N, features)
        if module.batch_first:
            shape = (N, length, features)
        return torch.randn(shape if batched else (length, features), dtype=dtype)

    if same:
        return [draw(length, E)] * 3
    return [draw(length, E), draw(S, module.kdim), draw(S, module.vdim)]


def run(module: nn.Module, tensors: list[Tensor], **options: Any) -> dict[str, Tensor]:
    """Output, weights, and the gradient of a function of both, by inputs, masks and parameters."""
    leaves = {id(x): x.clone().requires_grad_() for x in tensors}
    masks = {
        name: option.clone().requires_grad_()
        for name, option in options.items()
        if isinstance(option, Tensor) and option.is_floating_point()
    }
    out, weights = module(*(leaves[id(x)] for x in tensors), **options | masks)
    results = {"out": out.detach()}
    loss = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum()
    if weights is not None:
        results["weights"] = weights.detach()
        cotangent = torch.linspace(-1, 1, weights.numel(), dtype=out.dtype)
        loss = loss + (weights * cotangent.view_as(weights)).sum()
    wanted = {f"input{i}": x for i, x in enumerate(leaves.values())}
    wanted |= masks | dict(module.named_parameters())
    grads = torch.autograd.grad(loss, list(wanted.values()))
    return results | {f"d {name}": grad for name, grad in zip(wanted, grads, strict=True)}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, reference in expected.items():
        torch.testing.assert_close(
            actual[name], reference, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
        )


def masks(kind: str, batched: bool, heads: int, length: int, dtype: torch.dtype) -> dict[str, Any]:
    """Masks that leave every query a key to see, in torch's convention: True hides."""
    keys = S if length == L else length
    attn, padding = torch.rand(length, keys) < 0.4, torch.rand(N, keys) < 0.4
    attn[:, 0] = padding[:, 0] = False
    per_head = torch.rand(N * heads if batched else heads, length, keys) < 0.4
    per_head[..., 0] = False
    padding = padding if batched else padding[0]

    def floating(mask: Tensor) -> Tensor:
        return torch.randn(mask.shape, dtype=dtype).masked_fill(mask, -torch.inf)

    return {
        "none": {},
        "attn": {"attn_mask": attn},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": attn, "key_padding_mask": padding},
        "per_head": {"attn_mask": per_head, "key_padding_mask": padding},
        "float_attn": {"attn_mask": floating(attn)},
        "float_both": {"attn_mask": floating(per_head), "key_padding_mask": floating(padding)},
    }[kind]
