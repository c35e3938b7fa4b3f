"""Packed sequences given by restarting position_ids."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from flashlayer.integrations.transformers import WindowMask, make_mask
from flashlayer.integrations.transformers.packing import readable
from tests.integrations.transformers.hosts import NAME, build
from tests.integrations.transformers.situations import draw_tokens

GAPS_AND_REPEATS = ([0, 1, 2, 4, 5, 6], [0, 2, 4, 6, 8, 10], [0, 0, 1, 1, 2, 2], [0] * 6)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("given", ["no attention_mask", "ones"])
@pytest.mark.parametrize("positions", GAPS_AND_REPEATS, ids=str)
def test_gaps_and_repeats_of_position_ids_mean_what_eager_takes_them_for(
    positions: list[int], given: str, use_cache: bool
) -> None:
    """Nothing; but without a cache and a mask transformers takes them for packing itself."""
    model = build("Llama")
    inputs = {
        "input_ids": draw_tokens(2, 6),
        "attention_mask": None if given == "no attention_mask" else torch.ones(2, 6).long(),
        "position_ids": torch.tensor([positions]),
        "use_cache": use_cache,
    }
    expected = model(**inputs).logits
    model.set_attn_implementation(NAME)
    torch.testing.assert_close(model(**inputs).logits, expected)


@pytest.mark.parametrize(
    ("positions", "sequences"),
    [
        ([0, 1, 2, 0, 1, 2], [0, 0, 0, 1, 1, 1]),
        ([0, 0, 1, 2, 0, 0], [0, 1, 1, 1, 2, 3]),
        ([4, 5, 9, 2, 3, 4], [0, 0, 0, 1, 1, 1]),
        ([0, 1, 3, 0, 2, 2], [0, 0, 0, 1, 1, 1]),
    ],
    ids=str,
)
@pytest.mark.parametrize("rows", [1, 2])
def test_only_restarting_positions_begin_a_sequence(
    positions: list[int], sequences: list[int], rows: int
) -> None:
    """In any number of rows, each of its own."""
    mask = make_mask(rows, 6, 6)
    assert isinstance(mask, WindowMask)
    plain = torch.arange(6)
    separated = mask.separated(torch.stack([torch.tensor(positions), plain][:rows]), True)
    number = torch.tensor([sequences, [0] * 6][:rows])
    same = number[:, None, :, None] == number[:, None, None, :]
    dense = separated.dense() if isinstance(separated, WindowMask) else separated
    assert torch.equal(dense, same & torch.ones(6, 6, dtype=torch.bool).tril())


def test_an_attention_mask_rules_packing_out_as_in_eager() -> None:
    torch.compiler.reset()
    model = build("Llama")
    inputs = {
        "input_ids": draw_tokens(2, 7),
        "attention_mask": torch.ones(2, 7, dtype=torch.long),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]]),
    }
    expected = model(**inputs).logits
    model.set_attn_implementation(NAME)
    torch.testing.assert_close(model(**inputs).logits, expected)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs).logits, expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(("host", "rows"), [("Llama", 1), ("Qwen2", 2)])
def test_packed_positions_count_under_compile_too(host: str, rows: int) -> None:
    """The default call: no attention_mask, and a cache, so transformers makes nothing of them."""
    torch.compiler.reset()
    model = build(host)
    model.set_attn_implementation(NAME)
    ids = draw_tokens(rows, 12)
    lengths = (5, 7)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    apart = [model(part).logits for part in ids.split(lengths, dim=1)]
    expected = torch.cat(apart, dim=1)
    torch.testing.assert_close(model(ids, position_ids=positions).logits, expected)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, position_ids=positions).logits, expected)
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(model(ids, position_ids=positions).logits, expected)


@pytest.mark.parametrize("name", ["meta", "fake", "functional", "batched", "traced"])
def test_values_are_read_of_plain_tensors_alone(name: str) -> None:
    found = []

    def look(tensor: Tensor) -> Tensor:
        found.append(readable(tensor))
        return tensor.clone()

    plain = torch.ones(2, 3)
    look(plain)
    if name == "meta":
        look(plain.to("meta"))
    elif name == "fake":
        look(FakeTensorMode().from_tensor(plain))
    elif name == "functional":
        torch.func.functionalize(look)(plain)
    elif name == "batched":
        torch.vmap(look)(plain)
    else:
        make_fx(look, tracing_mode="real")(plain)
    assert found == [True, False]
