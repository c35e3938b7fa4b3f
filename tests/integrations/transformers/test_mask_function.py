"""The mask function against transformers' own masks, on real, meta and fake tensors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch._subclasses import FakeTensorMode
from transformers import masking_utils

from flashlayer.integrations.transformers import WindowMask, make_mask
from flashlayer.integrations.transformers.masks import DenseMask
from tests.integrations.transformers.hosts import BATCH, HOSTS, LENGTH, NAME
from tests.integrations.transformers.situations import (
    as_argument,
    model_inputs,
    new_cache,
    padding_mask,
)


def mask_function(kind: str, window: int, sequences: Tensor, positions: Tensor) -> Any:
    function = {
        "causal": masking_utils.causal_mask_function,
        "window": masking_utils.sliding_window_causal_mask_function(window),
        "bidirectional": masking_utils.bidirectional_mask_function,
        "bidirectional window": masking_utils.sliding_window_bidirectional_mask_function(window),
        "chunked": masking_utils.chunked_causal_mask_function(window, torch.zeros(3, dtype=int)),
    }
    if kind in function:
        return function[kind]
    inner = function[kind.removeprefix("packed ")]
    return masking_utils.and_masks(
        masking_utils.packed_sequence_mask_function(sequences),
        masking_utils.remap_positions_for_packed_sequence(inner, positions),
    )


# q_length, kv_length, q_offset, kv_offset: no cache; a prefill in chunks; one token; a static cache
# with room left, at its start and later; a sliding cache that has lost its first keys.
STANDS = [
    (7, 7, 0, 0),
    (3, 9, 6, 0),
    (1, 9, 8, 0),
    (7, 12, 0, 0),
    (3, 12, 5, 0),
    (3, 6, 8, 5),
    (3, 12, torch.tensor(5), 0),
]


@pytest.mark.parametrize("stand", STANDS, ids=str)
@pytest.mark.parametrize("padding", [None, "left", "right", "all real"])
@pytest.mark.parametrize("kind", ["causal", "window", "bidirectional"])
def test_a_window_mask_is_the_hosts_mask(kind: str, padding: str | None, stand: tuple) -> None:
    q_length, kv_length, q_offset, kv_offset = stand
    mask_2d = None
    if padding is not None:
        mask_2d = torch.ones(3, int(q_offset) + q_length, dtype=torch.bool)
        if padding != "all real":
            mask_2d[0, :2] = False
            mask_2d[1, :1] = False
        mask_2d = mask_2d.flip(1) if padding == "right" else mask_2d
    arguments = {
        "batch_size": 3,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function(kind, 4, torch.empty(0), torch.empty(0)),
        "attention_mask": mask_2d,
    }
    mask = make_mask(**arguments)
    assert isinstance(mask, WindowMask)
    expected = masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False)
    assert mask.shape == expected.shape
    assert torch.equal(mask.dense(), expected)
    kept = padding in ("left", "right") and (padding == "left" or kind == "bidirectional")
    if stand == STANDS[0]:
        assert (mask.padding is not None) == (padding in ("left", "right"))
    elif not kept and padding is None and kind != "bidirectional":
        assert mask.padding is None


@pytest.mark.parametrize(
    "kind", ["packed causal", "packed window", "chunked", "bidirectional window"]
)
def test_sequences_chunks_and_two_sided_windows_are_window_masks_too(kind: str) -> None:
    rows = [[4, 5], [1, 2, 6], [9]]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
    sequences = masking_utils.find_packed_sequence_indices(positions)
    function = mask_function(kind, 3, sequences, positions)
    arguments = {"batch_size": 3, "q_length": 9, "kv_length": 9, "mask_function": function}
    mask = make_mask(**arguments)
    assert isinstance(mask, WindowMask)
    expected = masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False)
    assert torch.equal(mask.dense(), expected)


def test_a_pattern_of_the_users_own_is_dense() -> None:
    def every_other(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query + key) % 2 == 0

    for function in (
        every_other,
        masking_utils.and_masks(masking_utils.causal_mask_function, every_other),
        masking_utils.or_masks(masking_utils.causal_mask_function, every_other),
    ):
        arguments = {"batch_size": 2, "q_length": 5, "kv_length": 5, "mask_function": function}
        mask = make_mask(**arguments)
        assert type(mask) is DenseMask
        expected = masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False)
        assert torch.equal(mask.dense(), expected)


@pytest.mark.parametrize("given", ["no attention_mask", "padding"])
@pytest.mark.parametrize("kind", ["causal", "window", "bidirectional", "chunked"])
def test_masks_of_meta_tensors_read_no_values(kind: str, given: str) -> None:
    padding = None if given == "no attention_mask" else torch.ones(3, 9).bool().to("meta")
    function = mask_function(kind, 4, torch.empty(0), torch.empty(0))
    if kind == "chunked":
        shift = torch.zeros(3, dtype=torch.int64, device="meta")
        function = masking_utils.chunked_causal_mask_function(4, shift)
    arguments = {"mask_function": function, "attention_mask": padding, "device": "meta"}
    for offset in (0, torch.zeros((), dtype=torch.int64, device="meta")):
        mask = make_mask(3, 9, 9, offset, **arguments)
        if isinstance(mask, WindowMask):
            mask = mask.separated(torch.arange(9, device="meta")[None], kind != "bidirectional")
        assert (mask.device.type, mask.dtype, mask.shape) == ("meta", torch.bool, (3, 1, 9, 9))


def fake_outputs(host: str, implementation: str, situation: str) -> dict[str, torch.Size]:
    """Shapes of what a model built and called inside FakeTensorMode returns, gradients included."""
    kind = HOSTS[host].kind
    with FakeTensorMode():
        config = getattr(transformers, HOSTS[host].config)(**copy.deepcopy(HOSTS[host].options))
        make = getattr(transformers, HOSTS[host].model)._from_config
        model = make(config, attn_implementation=implementation, experts_implementation="eager")
        if situation.startswith("packed"):
            positions = torch.cat([torch.arange(5), torch.arange(LENGTH - 5)])[None]
            inputs = {"input_ids": torch.ones(BATCH, LENGTH).long(), "position_ids": positions}
            output = model(**inputs, use_cache=situation.endswith("cache"))
            output.logits.sum().backward()
        elif situation.endswith("cache"):
            cache = new_cache(situation.split()[0], model, kind)
            padding = padding_mask("left padding")
            for start, stop in ((0, 5), (5, 12), (12, 13)):
                ids = torch.ones(BATCH, stop - start).long()
                with torch.no_grad():
                    output = model(
                        ids, attention_mask=padding[:, :stop], **as_argument(cache, model)
                    )
        else:
            padding = None if situation == "no padding" else padding_mask(situation)
            output = model(**model_inputs(model, kind, padding))
            output.loss.backward()
        shapes = {key: x.shape for key, x in output.items() if isinstance(x, Tensor)}
        named = model.named_parameters()
        return shapes | {name: p.grad.shape for name, p in named if p.grad is not None}


FAKE_SITUATIONS = {
    "decoder": [
        *("no padding", "left padding", "right padding", "packed", "packed with a cache"),
        *("dynamic cache", "static cache"),
    ],
    "encoder": ["no padding", "left padding", "right padding"],
    "text-to-text": ["no padding"],
}


@pytest.mark.parametrize(
    ("host", "situation"),
    [
        (host, situation)
        for host in ("Llama", "Mistral", "Gemma 3", "GPT-2", "BERT", "T5")
        for situation in FAKE_SITUATIONS[HOSTS[host].kind]
    ],
)
def test_fake_tensors_go_through_a_model_as_with_eager(host: str, situation: str) -> None:
    """Nothing reads their values, which don't exist."""
    assert fake_outputs(host, NAME, situation) == fake_outputs(host, "eager", situation)


@pytest.mark.parametrize("kind", ["causal", "window", "bidirectional", "chunked"])
@pytest.mark.parametrize("padded", [False, True])
def test_masks_of_fake_tensors_read_no_values(kind: str, padded: bool) -> None:
    with FakeTensorMode():
        positions = torch.arange(9).expand(3, 9)
        functions = [mask_function(kind, 4, positions, positions)]
        if not padded:
            functions.append(mask_function(f"packed {kind}", 4, positions, positions))
        padding = torch.ones(3, 9).bool() if padded else None
        for function in functions:
            for offset in (0, torch.zeros((), dtype=torch.int64)):
                arguments = {"mask_function": function, "attention_mask": padding}
                mask = make_mask(3, 9, 9, offset, **arguments)
                if isinstance(mask, WindowMask):
                    mask = mask.separated(positions, kind != "bidirectional")
                assert (mask.dtype, mask.shape) == (torch.bool, (3, 1, 9, 9))
