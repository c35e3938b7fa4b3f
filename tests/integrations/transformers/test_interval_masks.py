"""Interval masks in whole models: which calls get them, compiled too, and that nothing leaks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from flashlayer.integrations.transformers import attention_function
from flashlayer.masks import IntervalMask
from tests.integrations.transformers.hosts import BATCH, HOSTS, LENGTH, NAME, build
from tests.integrations.transformers.situations import (
    SITUATION_RUNS,
    as_argument,
    dense_masks,
    draw_tokens,
    model_inputs,
    new_cache,
    padding_mask,
    train_step,
)

# Dynamo looks at the gradient of what goes into a layer.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

# Lengths of the sequences that a row of LENGTH tokens consists of.
DOCUMENTS = (5, 8)

# Llama 4 does not hand position_ids to its attention, so only without a cache, where transformers
# looks at them itself, is it told of sequences.
PACKED = [
    ("Llama", True),
    ("Llama", False),
    ("Mistral", True),
    ("Mistral", False),
    ("Llama 4", False),
]


@contextmanager
def masks_of_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int, int]]]:
    """Kind, queries and numbers of the masks of calls with more than one query; no dense one."""
    found: list[tuple[str, int, int]] = []
    plain = attention_function.flash_attention

    def attend(query: Tensor, *rest: Any, attn_mask: Any = None, **options: Any) -> Any:
        if query.shape[2] > 1 and attn_mask is not None:
            intervals = isinstance(attn_mask, IntervalMask)
            numbers = attn_mask.intervals.numel() if intervals else attn_mask.numel()
            found.append(("intervals" if intervals else "tensor", query.shape[2], numbers))
        return plain(query, *rest, attn_mask=attn_mask, **options)

    monkeypatch.setattr(attention_function, "flash_attention", attend)
    with dense_masks() as dense:
        yield found
    assert dense == []


def flash(host: str) -> transformers.PreTrainedModel:
    model = build(host)
    model.set_attn_implementation(NAME)
    return model


@pytest.mark.parametrize(
    ("host", "situation", "layers"),
    [
        ("Llama 4", "no padding", 1),  # the other layer sees the whole past
        ("Llama 4", "left padding", 1),
        ("Llama 4", "packed", 1),
        ("Llama 4", "greedy", 1),
        ("Gemma 3 with images", "no padding", 2),
        ("Gemma 3 with images", "left padding", 2),
        ("Gemma 3 with images", "static cache", 2),
        ("PaliGemma", "right padding", 2),
        ("PaliGemma", "beam search", 2),
    ],
)
def test_the_calls_get_intervals(
    monkeypatch: pytest.MonkeyPatch, host: str, situation: str, layers: int
) -> None:
    with masks_of_calls(monkeypatch) as found:
        SITUATION_RUNS[situation](flash(host), HOSTS[host].kind)
    intervals = [numbers for kind, _, numbers in found if kind == "intervals"]
    assert len(intervals) == layers
    # A start and a stop for each key of each row, at most.
    assert max(numbers for _, _, numbers in found) <= 2 * 3 * BATCH * (LENGTH + 9)


@pytest.mark.parametrize(
    ("host", "situation"),
    [
        ("Mistral", "left padding"),
        ("Gemma 3", "left padding"),
        ("Llama 4", "no padding"),
        ("Llama 4", "left padding"),
    ],
)
def test_a_compiled_model_makes_no_dense_mask(
    monkeypatch: pytest.MonkeyPatch, host: str, situation: str
) -> None:
    """Gradients included."""
    torch.compiler.reset()
    model = flash(host)
    padding = None if situation == "no padding" else padding_mask(situation)
    inputs = model_inputs(model, "decoder", padding)
    expected = train_step(model, inputs)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with masks_of_calls(monkeypatch) as found:
        actual = train_step(compiled, inputs)
    assert ("intervals" in {kind for kind, _, _ in found}) == (host == "Llama 4")
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name.replace("d ", "d _orig_mod.")], tensor)


@pytest.mark.parametrize(("host", "use_cache"), PACKED)
def test_packed_sequences_are_intervals_in_a_compiled_model(
    monkeypatch: pytest.MonkeyPatch, host: str, use_cache: bool
) -> None:
    """Without a cache transformers numbers the sequences, with one the attention function does."""
    torch.compiler.reset()
    model, eager = flash(host), build(host)
    ids = draw_tokens(BATCH, LENGTH)
    positions = torch.cat([torch.arange(length) for length in DOCUMENTS])[None]
    apart = torch.cat([eager(part).logits for part in ids.split(DOCUMENTS, dim=1)], dim=1)
    inputs = {"input_ids": ids, "position_ids": positions, "use_cache": use_cache}
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with masks_of_calls(monkeypatch) as found:
        actual = compiled(**inputs).logits
    assert [kind for kind, *_ in found] == ["intervals"] * 2
    assert max(numbers for *_, numbers in found) <= 2 * BATCH * LENGTH
    torch.testing.assert_close(actual, model(**inputs).logits)
    torch.testing.assert_close(actual, apart)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("host", "use_cache"), PACKED)
def test_what_a_sequence_says_does_not_reach_the_next(
    host: str, use_cache: bool, compiled: bool
) -> None:
    """Every bit of the other logits and of their gradients stays."""
    torch.compiler.reset()
    model: Any = flash(host)
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    positions = torch.cat([torch.arange(length) for length in DOCUMENTS])[None]
    embeddings = model.get_input_embeddings()
    first, results = DOCUMENTS[0], []
    for ids in (draw_tokens(BATCH, LENGTH), draw_tokens(BATCH, LENGTH)):
        if results:
            ids[:, :first] = (ids[:, :first] + 7) % 90
        hidden = embeddings(ids).detach().requires_grad_()
        inputs = {"inputs_embeds": hidden, "position_ids": positions, "use_cache": use_cache}
        logits = run(**inputs).logits
        logits[:, first:].square().sum().backward()
        results.append((logits, hidden.grad))
    (before, d_before), (after, d_after) = results
    assert not torch.equal(before[:, :first], after[:, :first])
    assert torch.equal(before[:, first:], after[:, first:])
    assert torch.equal(d_before[:, first:], d_after[:, first:])
    assert d_before[:, :first].count_nonzero() == 0


@torch.no_grad()
@pytest.mark.parametrize("cache_name", ["dynamic", "static"])
@pytest.mark.parametrize(
    "host", ["Llama", pytest.param("Mistral", marks=pytest.mark.slow), "Llama 4"]
)
def test_a_compiled_prefill_in_pieces_makes_no_dense_mask(
    monkeypatch: pytest.MonkeyPatch, host: str, cache_name: str
) -> None:
    """In a static cache the position of the queries is a tensor, which a graph can't read."""
    torch.compiler.reset()
    eager, model = build(host), flash(host)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    ids, padding = draw_tokens(BATCH, LENGTH), padding_mask("left padding")
    chunks = [
        {
            "input_ids": ids[:, start:stop],
            "attention_mask": padding[:, :stop],
            "position_ids": (padding.cumsum(1) - 1).clamp(min=0)[:, start:stop],
        }
        for start, stop in ((0, 5), (5, 12), (12, 13))
    ]
    cache = new_cache(cache_name, model, "decoder")
    expected = torch.cat([eager(**x, **as_argument(cache, eager)).logits for x in chunks], dim=1)
    cache = new_cache(cache_name, model, "decoder")
    with masks_of_calls(monkeypatch) as found:
        actual = torch.cat(
            [compiled(**x, **as_argument(cache, eager)).logits for x in chunks], dim=1
        )
    real = padding == 1
    torch.testing.assert_close(actual[real], expected[real], rtol=1e-4, atol=1e-4)
    if host == "Llama 4" or (host, cache_name) == ("Llama", "static"):
        assert "intervals" in {kind for kind, *_ in found}
