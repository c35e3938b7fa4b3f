"""Masks that can be moved and combined, and raise when they are used as another kind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import masking_utils

from flashlayer.integrations.transformers import WindowMask, make_mask
from flashlayer.integrations.transformers.masks import DenseMask, GuardedMask
from tests.integrations.transformers.hosts import NAME
from tests.integrations.transformers.situations import draw_tokens, padding_mask
from tests.integrations.transformers.tiny_models import tiny


def padded_mask() -> WindowMask:
    mask = make_mask(2, 5, 5, attention_mask=padding_mask("left padding")[:, -5:].bool())
    assert isinstance(mask, WindowMask)
    return mask


def interval_mask() -> WindowMask:
    function = masking_utils.chunked_causal_mask_function(3, torch.tensor([0, 1]))
    mask = make_mask(2, 5, 5, mask_function=function)
    assert isinstance(mask, WindowMask)
    assert mask.intervals is not None
    return mask


@pytest.mark.parametrize("made", [padded_mask, interval_mask])
@pytest.mark.parametrize("kind", [WindowMask, DenseMask])
def test_a_mask_is_a_bool_tensor_that_can_be_moved_and_combined(
    kind: type, made: Callable[[], WindowMask]
) -> None:
    mask: Any = made()
    dense = mask.dense()
    if kind is DenseMask:
        mask = DenseMask(dense, "model")
    assert (mask.dtype, mask.ndim, mask.shape) == (torch.bool, 4, (2, 1, 5, 5))
    assert mask.contiguous() is mask or kind is DenseMask
    other = torch.ones(5, 5, dtype=torch.bool).tril(1)
    rows = torch.tensor([4, 0])
    for result, expected in (
        (mask[:, :, :, :3], dense[:, :, :, :3]),
        (mask[:, 0, 0], dense[:, 0, 0]),
        (mask[:, None, ..., -1:], dense[:, None, ..., -1:]),
        (mask[1], dense[1]),
        (mask[:, :, rows], dense[:, :, rows]),
        (mask.index_select(-1, rows), dense.index_select(-1, rows)),
        (mask.expand(2, 4, 5, 5), dense.expand(2, 4, 5, 5)),
        (mask.repeat(1, 2, 1, 1), dense.repeat(1, 2, 1, 1)),
        (mask.squeeze(1), dense.squeeze(1)),
        (mask.transpose(2, 3), dense.transpose(2, 3)),
        (mask.flatten(1), dense.flatten(1)),
        (mask.reshape(2, 25), dense.reshape(2, 25)),
        (mask.clone(), dense),
        (mask.detach(), dense),
        (copy.deepcopy(mask), dense),
        (mask & other, dense & other),
        (other | mask, other | dense),
        (~mask, ~dense),
        (torch.cat([mask, mask], -1), torch.cat([dense, dense], -1)),
        (
            torch.cat([mask, other.expand(2, 1, 5, 5)], -1),
            torch.cat([dense, other.expand_as(dense)], -1),
        ),
        (mask.split(2, -1)[1], dense.split(2, -1)[1]),
        (next(iter(mask)), dense[0]),
    ):
        assert isinstance(result, GuardedMask)
        assert torch.equal(result.clone().dense(), expected)
    moved = mask.to("meta")
    assert isinstance(moved, kind)
    assert moved.device.type == "meta"
    if isinstance(mask, WindowMask):
        for same in (moved, mask.clone(), copy.deepcopy(mask)):
            assert same.__tensor_flatten__() == mask.__tensor_flatten__()


def test_what_only_a_bool_mask_can_be_used_for_is_allowed() -> None:
    """Of eager's mask these raise: it is not bool."""
    mask = padded_mask()
    dense = mask.dense()
    scores = torch.randn(2, 3, 5, 5)
    assert torch.equal(torch.where(mask, 0.0, -1.0), torch.where(dense, 0.0, -1.0))
    expected = scores.masked_fill(~dense, -1.0)
    assert torch.equal(scores.masked_fill(~mask, -1.0), expected)
    assert torch.equal(scores.clone().masked_fill_(~mask, -1.0), expected)
    without_key = (~mask).all(-1)
    assert isinstance(without_key, GuardedMask)
    assert torch.equal(without_key.dense(), (~dense).all(-1))


READINGS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "added": lambda mask, scores: scores + mask,
    "added in place": lambda mask, scores: scores.add_(mask),
    "added the other way": lambda mask, scores: mask + scores,
    "subtracted from 1": lambda mask, scores: (1.0 - mask) * -1e9,
    "multiplied": lambda mask, scores: mask * -1e9,
    "divided": lambda mask, scores: mask / 2,
    "negated": lambda mask, scores: -mask,
    "added with baddbmm": lambda mask, scores: torch.baddbmm(mask, scores, scores),
    "multiplied as a matrix": lambda mask, scores: mask @ scores,
    "cast with float": lambda mask, scores: mask.float(),
    "cast with half": lambda mask, scores: mask.half(),
    "cast with int": lambda mask, scores: mask.int(),
    "cast with bool": lambda mask, scores: mask.bool(),
    "cast to a dtype": lambda mask, scores: mask.to(scores.dtype),
    "cast to a tensor's": lambda mask, scores: mask.to(scores),
    "cast with type": lambda mask, scores: mask.type(scores.dtype),
    "cast with type_as": lambda mask, scores: mask.type_as(scores),
    "cast to bool": lambda mask, scores: mask.to(torch.bool),
    "cast to bool by name": lambda mask, scores: mask.to(dtype=torch.bool),
    "compared to 0": lambda mask, scores: mask == 0,
    "compared not to 0": lambda mask, scores: mask != 0,
    "compared below 0": lambda mask, scores: mask < 0,
    "compared above": lambda mask, scores: mask > -1,
    "logically not": lambda mask, scores: mask.logical_not(),
    "logically and": lambda mask, scores: torch.logical_and(mask, scores),
    "xor": lambda mask, scores: mask ^ True,
    "filled by": lambda mask, scores: scores.masked_fill(mask, -1e9),
    "filled in place by": lambda mask, scores: scores.masked_fill_(mask, -1e9),
    "filled": lambda mask, scores: mask.masked_fill(scores > 0, False),
    "where inverted": lambda mask, scores: torch.where(~mask, scores, -1e9),
    "where it is chosen": lambda mask, scores: torch.where(scores > 0, mask, False),
    "summed": lambda mask, scores: mask.sum(-1),
    "counted": lambda mask, scores: mask.count_nonzero(),
    "cumulated": lambda mask, scores: mask.cumsum(-1),
    "averaged": lambda mask, scores: mask.mean(-1, dtype=torch.float32),
    "all": lambda mask, scores: mask.all(),
    "any": lambda mask, scores: mask.any(-1),
    "largest": lambda mask, scores: mask.max(),
    "argmax": lambda mask, scores: mask.argmax(-1),
    "sorted": lambda mask, scores: mask.sort(-1),
    "nonzero": lambda mask, scores: mask.nonzero(),
    "selects": lambda mask, scores: scores[mask],
    "assigned by": lambda mask, scores: scores.__setitem__(mask, 0.0),
    "assigned to": lambda mask, scores: mask.__setitem__(0, True),
    "assigned from": lambda mask, scores: scores.__setitem__(slice(None), mask),
    "copied from": lambda mask, scores: scores.copy_(mask),
    "padded": lambda mask, scores: nn.functional.pad(mask, (0, 1)),
    "cut to a triangle": lambda mask, scores: mask.tril(),
    "joined with scores": lambda mask, scores: torch.cat([mask, scores], -1),
    "stacked with scores": lambda mask, scores: torch.stack([mask, scores]),
    "combined with numbers": lambda mask, scores: mask & (scores > 0).int(),
    "read": lambda mask, scores: mask.flatten()[0].item(),
    "listed": lambda mask, scores: mask.tolist(),
    "made an array": lambda mask, scores: mask.numpy(),
    "taken for true": lambda mask, scores: bool(mask.flatten()[0]),
    "summed by einsum": lambda mask, scores: torch.einsum("bhqk,bhkd->bhqd", mask, scores),
    "given to softmax": lambda mask, scores: torch.softmax(mask, -1, dtype=torch.float32),
}


@pytest.mark.parametrize(
    "derived", ["mask", "slice", "copy", "moved", "intersection", "view", "intervals"]
)
@pytest.mark.parametrize("reading", READINGS)
def test_a_mask_and_whatever_is_made_of_it_raises_when_it_is_read_as_eagers(
    reading: str, derived: str
) -> None:
    """By name, and whatever a model does with the mask."""
    config = transformers.XGLMConfig()
    mask = make_mask(2, 4, 4, attention_mask=torch.tensor([[0, 1, 1, 1]] * 2).bool(), config=config)
    chunks = masking_utils.chunked_causal_mask_function(2, torch.tensor([0, 1]))
    made = {
        "mask": lambda: mask,
        "slice": lambda: mask[:, 0, 0, :][:, None, None].expand(2, 1, 4, 4),
        "copy": lambda: mask.clone(),
        "moved": lambda: mask[:, :, :4].to("cpu").contiguous(),
        "intersection": lambda: mask & torch.ones(4, 4, dtype=torch.bool),
        "view": lambda: mask.view(2, 16).view(2, 1, 4, 4),
        "intervals": lambda: make_mask(2, 4, 4, mask_function=chunks, config=config),
    }
    with pytest.raises(ValueError, match=r"^xglm: .*attention is its own.*use attn_implementation"):
        READINGS[reading](made[derived](), torch.randn(2, 1, 4, 4))


OWN_ATTENTION = {
    "adds the mask": "XGLMForCausalLM",
    "fills the scores by it": "MptForCausalLM",
    "slices it and compares": "LongformerModel",
    "casts it": "CanineModel",
    "adds it to alibi": "BloomForCausalLM",
    "adds it in blocks": "LEDForConditionalGeneration",
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("reading", OWN_ATTENTION)
def test_a_model_with_an_attention_of_its_own_is_refused_rather_than_wrong(
    reading: str, compiled: bool
) -> None:
    """Built with our name it gets our bool mask, and would take it for eager's numbers."""
    torch.compiler.reset()
    name = OWN_ATTENTION[reading]
    ids = draw_tokens(2, 8)
    padding = torch.tensor([[1] * 8, [1] * 6 + [0] * 2])
    eager, model = tiny(name, "eager"), tiny(name, NAME)
    for given in (None, torch.ones_like(ids), padding):
        assert next(iter(eager(ids, attention_mask=given).values())).isfinite().all()
        if compiled:
            model = torch.compile(tiny(name, NAME), backend="eager")
        # Dynamo quotes the error in its own.
        with pytest.raises(Exception if compiled else ValueError) as refusal:
            model(ids, attention_mask=given)
        assert f"{eager.config.model_type}: the model's attention is its own" in str(refusal.value)
