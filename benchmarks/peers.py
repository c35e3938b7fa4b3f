"""Who is measured: flashlayer, and what a user would pick instead of it.

A peer is made for a case and its inputs: it gets ready what it needs (a mask, a padded batch) once,
untimed, and is then a function of no arguments.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cases import Case, Inputs
from flashlayer import flash_attention, flash_attention_varlen
from flashlayer.masks import IntervalMask

# (q, k, v) -> out, all of them dense (B, H, S, D), or all packed (T, H, D).
Attend = Callable[[Tensor, Tensor, Tensor], Any]

OURS, DEFAULT, STANDARD = "flashlayer", "sdpa", "standard"
# SDPA once more, as a peer of its own: what tells it from SDPA is the scatter of the measurement.
AGAIN = "sdpa-again"
PINNED = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}
FORCED = ("aten", "tiled", "triton")  # flashlayer's backends by name, for the rule of "auto"
OF_FLASHLAYER = (OURS, *FORCED)
QUADRATIC = ("sdpa-math", STANDARD)  # they store the scores
# Matrices of scores that these hold at once, forward and backward: scores, probabilities, their
# gradients, the mask.
SCORES_HELD = 5
MATH_LENGTH_ON_CPU = 1024  # beyond it takes the time of standard attention, which is measured
# Each shape is compiled, which takes a quarter of a minute.
FLEX_LENGTHS, FLEX_HEAD_DIMS = (2048, 8192), (64, 128)


class Refused(Exception):
    """A peer can't do this case; the message says why."""


class Runner:
    """One peer at one case, ready to run.

    Attributes:
        leaves: what it is differentiated by.
    """

    def __init__(self, attend: Attend, leaves: tuple[Tensor, ...], do: Tensor) -> None:
        self.attend = attend
        self.leaves = leaves
        self.do = do

    def forward(self) -> Tensor:
        """The output."""
        return self.attend(*self.leaves)

    def backward(self, out: Tensor) -> tuple[Tensor, ...]:
        """The gradients of q, k and v."""
        return torch.autograd.grad(out, self.leaves, self.do)


def names(device: torch.device, suite: str) -> list[str]:
    """Peers that may be there; :func:`prepare` still refuses single cases."""
    if device.type != "cuda":
        # The CPU has FLASH, which is what the default takes, and MATH.
        return [OURS, DEFAULT, AGAIN, "sdpa-math", STANDARD]
    peers = [OURS, DEFAULT, AGAIN, *PINNED, STANDARD]
    if suite == "full":
        peers.append("flex")
    if importlib.util.find_spec("flash_attn") is not None:
        peers.append("flash_attn")
    return peers


def prepare(peer: str, case: Case, inputs: Inputs, memory_limit: int) -> Runner:
    """The peer at the case.

    Raises:
        Refused: it can't, or would need more than ``memory_limit`` bytes.
    """
    needed = SCORES_HELD * case.score_bytes
    if peer in QUADRATIC and needed > memory_limit:
        raise Refused(f"its scores need about {needed / 2**30:.1f} GiB")
    q, k, v, do = inputs[:4]
    if peer == "sdpa-math" and q.device.type == "cpu" and case.keys > MATH_LENGTH_ON_CPU:
        raise Refused(f"measured up to {MATH_LENGTH_ON_CPU:,} keys on the CPU")
    if peer in OF_FLASHLAYER and case.packed:
        q, k, v, do = (pack(x, case) for x in (q, k, v, do))
    leaves = tuple(x.detach().requires_grad_(case.backward) for x in (q, k, v))
    return Runner(_attend(peer, case, inputs), leaves, do)


def pack(x: Tensor, case: Case) -> Tensor:
    """``(B, H, S, D)`` to ``(T, H, D)``, without the padding; contiguous."""
    assert case.lengths is not None
    return torch.cat([x[n, :, :length].transpose(0, 1) for n, length in _rows(case)])


def _rows(case: Case) -> list[tuple[int, int]]:
    return list(enumerate(case.lengths or ()))


def _attend(peer: str, case: Case, inputs: Inputs) -> Attend:
    if peer in (*OF_FLASHLAYER, STANDARD):
        return _flashlayer("auto" if peer == OURS else peer, case, inputs)
    if peer == "flex":
        return _flex(case)
    if peer == "flash_attn":
        return _flash_attn(case)
    return _sdpa(PINNED.get(peer), case, inputs)


def _flashlayer(backend: str, case: Case, inputs: Inputs) -> Attend:
    options: dict[str, Any] = {"causal": case.causal, "backend": backend}
    if case.window is not None:
        options["window_size"] = (case.window, 0)
    if case.packed and backend != STANDARD:
        lengths = torch.tensor((0, *(case.lengths or ())), device=inputs.q.device)
        cu_seqlens = lengths.cumsum(0).to(torch.int32)
        options |= {"cu_seqlens_q": cu_seqlens, "max_seqlen_q": case.seqlen}
        return lambda q, k, v: flash_attention_varlen(q, k, v, **options)
    if inputs.shown is not None and not case.packed:
        options["attn_mask"] = inputs.shown[:, None, None]
    if inputs.mask is not None:
        options["attn_mask"] = inputs.mask
    return lambda q, k, v: flash_attention(q, k, v, **options)


def _sdpa(backend: SDPBackend | None, case: Case, inputs: Inputs) -> Attend:
    """Padded sequences are causal from the left: no mask, the padding is computed for nothing."""
    options: dict[str, Any] = {"enable_gqa": case.kv_heads is not None}
    device = inputs.q.device
    if case.window is not None:
        distance = torch.arange(case.seqlen, device=device)
        distance = distance[:, None] - distance
        options["attn_mask"] = (distance >= 0) & (distance <= case.window)
    elif inputs.shown is not None and not case.packed:
        options["attn_mask"] = inputs.shown[:, None, None]
    elif isinstance(inputs.mask, IntervalMask):
        dense = inputs.mask.materialize()
        options["attn_mask"] = dense.tril_() if case.causal else dense
    elif inputs.mask is not None:
        options["attn_mask"] = inputs.mask
    elif case.seqlen > 1:
        options["is_causal"] = case.causal

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with nullcontext() if backend is None else sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, **options)

    return attend


def _flex(case: Case) -> Attend:
    usual = case.seqlen in FLEX_LENGTHS and case.head_dim in FLEX_HEAD_DIMS and case.causal
    if case.lengths is not None or case.mask is not None or not usual:
        raise Refused("it is compiled for a few shapes only, which takes its time")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def visible(_batch: Tensor, _head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = i >= j
        return seen if case.window is None else seen & (i - j <= case.window)

    mask = create_block_mask(visible, None, None, case.seqlen, case.keys, device="cuda")
    torch.compiler.reset()  # it gives up compiling after eight shapes
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=case.kv_heads is not None)


def _flash_attn(case: Case) -> Attend:
    """It takes ``(B, S, H, D)``: a view of what the others get."""
    if case.lengths is not None or case.mask is not None:
        raise Refused("not measured with a mask or on sequences of unlike lengths")
    flash_attn_func = importlib.import_module("flash_attn").flash_attn_func
    window = (-1, -1) if case.window is None else (case.window, 0)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return flash_attn_func(q, k, v, causal=case.causal, window_size=window).transpose(1, 2)

    return attend
