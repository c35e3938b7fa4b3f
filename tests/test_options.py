"""The option table of the contract, a row at a time; the oracle against plain Python."""

from __future__ import annotations

import itertools
import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from flashlayer import (
    AuxOutput,
    AuxRequest,
    available_backends,
    dropout_keep_mask,
    flash_attention,
)
from flashlayer import flash_attention_varlen as varlen
from flashlayer.testing import assert_attention_close
from tests.test_accuracy import device_for

torch.manual_seed(0)  # the options below are drawn as the module is read, before any fixture

B, H, HKV, SQ, SK, D = 2, 2, 1, 70, 65, 16
BACKENDS = ("triton", "tiled")
EVERYTHING = AuxRequest(lse=True, max_scores=True, entropy=True)


def qkv(
    device: str = "cpu", dtype: torch.dtype = torch.float32, batch: int = B
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(batch, H, SQ, D, dtype=dtype, device=device),
        torch.randn(batch, HKV, SK, D, dtype=dtype, device=device),
        torch.randn(batch, HKV, SK, D, dtype=dtype, device=device),
    )


def float_mask(*shape: int) -> Tensor:
    return torch.randn(shape).masked_fill(torch.rand(shape) < 0.2, -torch.inf)


def bool_mask(*shape: int) -> Tensor:
    return torch.rand(shape) < 0.6


def one_by_one(q: Tensor, k: Tensor, v: Tensor, **o: Any) -> tuple[list, AuxOutput]:
    """The definition, in scalars: what DESIGN's table says and nothing else."""
    batch, heads, seqlen_q, dim = q.shape
    seqlen_k, group_size = k.shape[2], heads // k.shape[1]
    offset = 0 if o.get("diagonal") == "top_left" else seqlen_k - seqlen_q
    left, right = o.get("window_size", (None, None))
    right = 0 if o.get("causal") else right
    mask, slopes, sinks = o.get("attn_mask"), o.get("alibi_slopes"), o.get("sinks")
    if mask is not None:
        mask = mask.expand(batch, heads, seqlen_q, seqlen_k)
    kept = dropout_keep_mask(
        batch, heads, seqlen_q, seqlen_k, o.get("dropout_p", 0.0), o.get("dropout_seed", 0), "cpu"
    )
    outs, lses, largest, entropies = [], [], [], []
    for b in range(batch):
        for h in range(heads):
            for i in range(seqlen_q):
                scores = {}
                for j in range(seqlen_k):
                    if left is not None and j < i + offset - left:
                        continue
                    if right is not None and j > i + offset + right:
                        continue
                    score = o.get("scale", dim**-0.5) * float(q[b, h, i] @ k[b, h // group_size, j])
                    if o.get("softcap"):
                        score = o["softcap"] * math.tanh(score / o["softcap"])
                    if slopes is not None:
                        slope = slopes[h] if slopes.ndim == 1 else slopes[b, h]
                        score -= float(slope) * abs(i + offset - j)
                    if mask is not None and mask.dtype == torch.bool:
                        if not mask[b, h, i, j]:
                            continue
                    elif mask is not None:
                        score += float(mask[b, h, i, j])
                    scores[j] = score
                total = sum(math.exp(score) for score in scores.values())
                terms = list(scores.values())
                if sinks is not None:
                    total += math.exp(float(sinks[h]))
                    terms.append(float(sinks[h]))
                out = torch.zeros(v.shape[-1], dtype=q.dtype)
                for j, score in scores.items():
                    weight = math.exp(score) / total if total else 0.0
                    if o.get("dropout_p"):
                        weight *= float(kept[b, h, i, j]) / (1 - o["dropout_p"])
                    out += weight * v[b, h // group_size, j]
                outs.append(out)
                lses.append(math.log(total) if total else -math.inf)
                largest.append(max(scores.values(), default=-math.inf))
                p = [math.exp(term) / total for term in terms if term > -math.inf]
                entropies.append(-sum(x * math.log(x) for x in p))
    numbers = (torch.tensor(x, dtype=q.dtype) for x in (lses, largest, entropies))
    return outs, AuxOutput(*(x.view(q.shape[:3]) for x in numbers))


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"window_size": (1, 2), "diagonal": "top_left"},
        {"attn_mask": bool_mask(1, 4, 1, 7)},
        {"attn_mask": float_mask(2, 1, 5, 7).double(), "causal": True},
        {"softcap": 0.7, "scale": 2.0},
        {"alibi_slopes": torch.rand(4)},
        {"alibi_slopes": torch.rand(2, 4), "diagonal": "top_left", "causal": True},
        {"sinks": torch.randn(4).double(), "attn_mask": bool_mask(2, 1, 5, 7)},
        {"dropout_p": 0.4, "dropout_seed": 3, "sinks": torch.randn(4).double()},
        {"softcap": 1.0, "alibi_slopes": torch.rand(4), "attn_mask": float_mask(7).double()},
    ],
    ids=lambda options: "-".join(options),
)
def test_the_oracle_is_the_definition(options: dict) -> None:
    q, k, v = (torch.randn(2, h, s, 3, dtype=torch.float64) for h, s in ((4, 5), (2, 7), (2, 7)))
    out, aux = flash_attention(q, k, v, return_aux=EVERYTHING, backend="standard", **options)
    outs, expected = one_by_one(q, k, v, **options)
    torch.testing.assert_close(out.flatten(0, 2), torch.stack(outs))
    for number, definition in zip(aux, expected, strict=True):
        torch.testing.assert_close(number, definition)


OPTIONS = {
    "bool_mask": {"attn_mask": bool_mask(B, H, SQ, SK)},
    "padding_mask": {"attn_mask": torch.arange(SK) < torch.tensor([3, SK]).view(B, 1, 1, 1)},
    "mask_of_rows": {"attn_mask": bool_mask(B, 1, SQ, 1)},
    "mask_per_head": {"attn_mask": float_mask(H, 1, SK), "causal": True},
    "float_mask": {"attn_mask": float_mask(B, H, SQ, SK)},
    "float_mask_over_batch": {"attn_mask": float_mask(1, H, SQ, SK), "causal": True},
    "float_mask_of_keys": {"attn_mask": float_mask(SK)},
    "float_mask_hides_all": {"attn_mask": torch.full((SQ, SK), -torch.inf)},
    "mask_and_window": {"attn_mask": bool_mask(1, 1, SQ, SK), "window_size": (9, 4)},
    "softcap": {"softcap": 2.0, "causal": True},
    "alibi": {"alibi_slopes": torch.rand(H), "causal": True},
    "alibi_of_batch": {"alibi_slopes": torch.rand(B, H)},
    "sinks": {"sinks": torch.randn(H), "causal": True},
    "sink_of_minus_infinity": {"sinks": torch.tensor([-torch.inf, 3.0])},
    "dropout": {"dropout_p": 0.3, "dropout_seed": 17, "causal": True},
    "dropout_of_all": {"dropout_p": 1.0, "dropout_seed": 17},
    "everything": {
        "attn_mask": float_mask(B, 1, SQ, SK),
        "causal": True,
        "window_size": (50, 0),
        "softcap": 5.0,
        "alibi_slopes": torch.rand(B, H),
        "sinks": torch.randn(H),
        "dropout_p": 0.2,
        "dropout_seed": -5,
        "scale": 0.4,
    },
}

# Of one batch: nothing here differs between batches, and other options are broadcast over them and
# have gradients that are summed over them.
OF_ONE_BATCH = {
    *("mask_per_head", "float_mask_hides_all", "mask_and_window", "softcap"),
    *("sink_of_minus_infinity", "dropout_of_all"),
}


def refused(backend: str, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> bool:
    return available_backends(q, k, v, **options)[backend] is not None


def to(device: str, dtype: torch.dtype, options: dict) -> dict:
    """Options on a device; those that have a gradient in the dtype of the inputs."""
    moved = {}
    for name, option in options.items():
        if isinstance(option, Tensor):
            option = option.to(device)
            if option.is_floating_point() and name != "alibi_slopes":
                option = option.to(dtype)
        moved[name] = option
    return moved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_option(backend: str, name: str, dtype: torch.dtype) -> None:
    device = device_for(backend)
    q, k, v = qkv(device, dtype, 1 if name in OF_ONE_BATCH else B)
    options = to(device, dtype, OPTIONS[name])
    if not refused(backend, q, k, v, **options):
        assert_attention_close(backend, q, k, v, with_noise=True, **options)


@pytest.mark.parametrize("name", [name for name in OPTIONS if "mask" not in name])
def test_aten_refuses_with_a_reason(name: str) -> None:
    with pytest.raises(ValueError, match="backend 'aten' can't compute this call: it"):
        flash_attention(*qkv(), backend="aten", **OPTIONS[name])
    assert flash_attention(*qkv(), **OPTIONS[name]).shape == (B, H, SQ, D)  # auto falls through


@pytest.mark.parametrize("backend", BACKENDS)
def test_float_mask_and_sinks_pass_gradcheck(backend: str) -> None:
    device = device_for(backend)
    q, k, v = (
        torch.randn(1, h, s, 3, dtype=torch.float64, device=device, requires_grad=True)
        for h, s in ((4, 5), (2, 6), (2, 6))
    )
    sinks = torch.randn(4, dtype=torch.float64, device=device, requires_grad=True)
    fixed = {"softcap": 1.5, "dropout_p": 0.3, "dropout_seed": 1, "causal": True}
    if refused(backend, q, k, v, sinks=sinks, **fixed):
        return
    # The interpreter takes seconds a mask.
    for shape in ((1, 4, 5, 6), (6,), (1, 5, 1), ())[: 2 if backend == "triton" else 4]:
        mask = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)

        def attend(q, k, v, mask, sinks):
            return flash_attention(
                q, k, v, attn_mask=mask, sinks=sinks, return_lse=True, backend=backend, **fixed
            )

        inputs = (q, k, v, mask, sinks)
        assert torch.autograd.gradcheck(attend, inputs, fast_mode=backend == "triton")


@pytest.mark.parametrize("backend", [*BACKENDS, "standard"])
@pytest.mark.parametrize("as_float", [False, True])
def test_hidden_keys_may_hold_nan(backend: str, as_float: bool) -> None:
    """Padding is where NaN lives; a mask that hides it from everyone keeps it out."""
    device = device_for(backend)
    q, k, v = qkv(device)
    mask = (torch.arange(SK, device=device) < 40).expand(B, 1, 1, SK)
    if as_float:
        mask = torch.zeros(SK, device=device).masked_fill(~mask[0, 0, 0], -torch.inf)
    if refused(backend, q, k, v, attn_mask=mask):
        return
    results = []
    for poison in (0.0, torch.nan, torch.inf):
        k[:, :, 40:], v[:, :, 40:] = poison, poison
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = flash_attention(*leaves, attn_mask=mask, return_lse=True, backend=backend)
        grads = torch.autograd.grad(out.square().sum() + lse.sum(), leaves)
        results.append((out.detach(), lse.detach(), *grads))
    for clean, *poisoned in zip(*results, strict=True):
        assert all(torch.equal(clean, x) for x in poisoned)


def test_an_expanded_mask_is_taken_back_to_its_size() -> None:
    """Its gradient has the mask's own few elements, summed over what it was expanded to."""
    q, k, v = qkv()
    bias = torch.randn(SK, requires_grad=True)
    grads = []
    for mask in (bias, bias.expand(B, H, SQ, SK)):
        out = flash_attention(q, k, v, attn_mask=mask, backend="tiled")
        grads.append(torch.autograd.grad(out.square().sum(), bias)[0])
    torch.testing.assert_close(grads[0], grads[1])


PACKED_OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window_top_left": {"window_size": (4, 2), "diagonal": "top_left"},
    "all": {
        "causal": True,
        "softcap": 3.0,
        "alibi_slopes": torch.rand(5, H),
        "sinks": torch.randn(H),
        "dropout_p": 0.2,
        "dropout_seed": 9,
    },
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PACKED_OPTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed(backend: str, name: str, dtype: torch.dtype) -> None:
    """Sequences of unlike lengths, empty ones on either side, and tokens past the last."""
    device = device_for(backend)
    q_edges = torch.tensor([0, 3, 3, 70, 75, 80], device=device)
    k_edges = torch.tensor([0, 5, 9, 75, 75, 78], device=device)
    q = torch.randn(84, H, D, dtype=dtype, device=device)
    k, v = (torch.randn(81, HKV, D, dtype=dtype, device=device) for _ in range(2))
    options = to(device, dtype, PACKED_OPTIONS[name])
    options |= {"cu_seqlens_q": q_edges, "cu_seqlens_k": k_edges}
    try:
        varlen(q, k, v, backend=backend, **options)
    except ValueError as error:
        assert "can't compute this call" in str(error)  # noqa: PT017
        return
    results = assert_attention_close(backend, q, k, v, with_noise=True, **options)
    for tensor, last in (("out", 80), ("dq", 80), ("dk", 78), ("dv", 78)):
        assert results[tensor][last:].count_nonzero() == 0, tensor
    assert (results["lse"][:, 80:] == -torch.inf).all()


@pytest.mark.parametrize("backend", ["tiled", "standard"])
def test_packed_is_each_sequence_alone(backend: str) -> None:
    edges = [0, 3, 3, 20]
    q, k, v = (torch.randn(20, h, D) for h in (H, HKV, HKV))
    packed, packed_lse = varlen(
        q, k, v, cu_seqlens_q=torch.tensor(edges), causal=True, return_lse=True, backend=backend
    )
    for start, stop in itertools.pairwise(edges):
        alone = (x[None, start:stop].transpose(1, 2) for x in (q, k, v))
        out, lse = flash_attention(*alone, causal=True, return_lse=True, backend=backend)
        torch.testing.assert_close(packed[start:stop], out[0].transpose(0, 1))
        torch.testing.assert_close(packed_lse[:, start:stop], lse[0])


def test_packed_nothing() -> None:
    """No sequences at all, or no tokens."""
    for tokens, edges in ((4, [0]), (0, [0]), (0, [0, 0])):
        q = torch.randn(tokens, H, D, requires_grad=True)
        for backend in ("tiled", "standard", "auto"):
            out = varlen(q, q, q, cu_seqlens_q=torch.tensor(edges), backend=backend)
            assert out.shape == (tokens, H, D)
            assert out.count_nonzero() == 0
            out.sum().backward()


def test_philox_known_answers() -> None:
    """The first words of the vectors published with the generator (Random123, kat_vectors)."""
    from flashlayer import philox

    ones = 0xFFFFFFFF
    vectors = [
        ((0, 0, 0, 0), (0, 0), 0x6627E8D5),
        ((ones, ones, ones, ones), (ones, ones), 0x408F276D),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            0xD16CFE09,
        ),
    ]
    for counter, (low, high), expected in vectors:
        seed = low | (high << 32)
        seed = seed - 2**64 if seed >= 2**63 else seed
        words = philox.random_word(torch.tensor(seed), *(torch.tensor(c) for c in counter))
        assert words.item() == expected


def test_dropout_keep_mask() -> None:
    mask = dropout_keep_mask(2, 3, 50, 60, 0.25, 1234, "cpu")
    assert mask.shape == (2, 3, 50, 60)
    assert mask.dtype == torch.bool
    # 18000 draws: six standard deviations.
    assert abs(mask.float().mean().item() - 0.75) < 6 * math.sqrt(0.25 * 0.75 / mask.numel())
    assert torch.equal(mask, dropout_keep_mask(2, 3, 50, 60, 0.25, 1234, "cpu"))
    assert not torch.equal(mask, dropout_keep_mask(2, 3, 50, 60, 0.25, 1235, "cpu"))
    # An element depends on its own position only.
    assert torch.equal(mask[:1, :2, :7, :9], dropout_keep_mask(1, 2, 7, 9, 0.25, 1234, "cpu"))
    rest = dropout_keep_mask(2, 3, 43, 60, 0.25, 1234, "cpu", first_query=7)
    assert torch.equal(mask[:, :, 7:], rest)
    assert dropout_keep_mask(1, 1, 9, 9, 0.0, 0, "cpu").all()
    assert not dropout_keep_mask(1, 1, 9, 9, 1.0, 0, "cpu").any()


def test_dropout_0_is_bitwise_plain_attention() -> None:
    q, k, v = qkv()
    for backend in ("tiled", "standard"):
        plain = flash_attention(q, k, v, backend=backend)
        assert torch.equal(
            plain, flash_attention(q, k, v, dropout_p=0.0, dropout_seed=3, backend=backend)
        )


def test_dropout_is_reproduced_by_manual_seed() -> None:
    q, k, v = qkv()
    torch.manual_seed(5)
    first, second = (flash_attention(q, k, v, dropout_p=0.5) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(first, flash_attention(q, k, v, dropout_p=0.5))


def test_the_mean_over_many_seeds_is_attention_without_dropout() -> None:
    q, k, v = (torch.randn(1, 2, 9, 8, dtype=torch.float64) for _ in range(3))
    runs = torch.stack(
        [
            flash_attention(q, k, v, dropout_p=0.3, dropout_seed=seed, backend="tiled")
            for seed in range(2000)
        ]
    )
    expected = flash_attention(q, k, v)
    deviation = (runs.mean(dim=0) - expected) / (runs.std(dim=0) / math.sqrt(len(runs)))
    assert deviation.abs().max() < 5  # 144 means, in standard errors


def test_dropout_survives_activation_checkpointing() -> None:
    from torch.utils.checkpoint import checkpoint

    q, k, v = (x.requires_grad_() for x in qkv())

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attention(q, k, v, dropout_p=0.3)

    grads = []
    for wrap in (attend, lambda *x: checkpoint(attend, *x, use_reentrant=False)):
        torch.manual_seed(3)
        grads.append(torch.autograd.grad(wrap(q, k, v).square().sum(), (q, k, v)))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("backend", ["triton", "tiled", "standard"])
def test_packed_tails_that_hold_nan_reach_no_gradient(backend: str) -> None:
    """In q they reached dk of the formula, in do the sinks' gradient of the kernels."""
    q, k, v, do = torch.randn(4, 12, 2, 8).unbind(0)
    for x in (q, k, v, do):
        x[9:] = torch.nan
    leaves = [x.requires_grad_() for x in (q, k, v, torch.randn(2))]
    out = varlen(
        *leaves[:3], sinks=leaves[3], cu_seqlens_q=torch.tensor([0, 4, 9]), backend=backend
    )
    for gradient in torch.autograd.grad(out, leaves, do):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("backend", ["triton", "tiled", "aten"])
@pytest.mark.parametrize("window", [(2**31 - 1, 0), (None, 2**31 - 1), (sys.maxsize, None)])
def test_packed_windows_wider_than_an_int32_holds(
    window: tuple[int | None, int | None], backend: str
) -> None:
    rows = torch.randn(3, 9, 2, 8).unbind(0)
    options = {"cu_seqlens_q": torch.tensor([0, 4, 9]), "window_size": window}
    out = varlen(*rows, **options, backend=backend)
    expected = varlen(*rows, **options, backend="standard")
    torch.testing.assert_close(out, expected)
