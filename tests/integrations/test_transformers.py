"""flashlayer in transformers: held against the models' own eager attention."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

import flashlayer.integrations.transformers as door
from flashlayer import dropout_keep_mask
from flashlayer.integrations.transformers import BandMask, attention, make_mask, register
from flashlayer.integrations.transformers.masks import DenseMask, GuardedMask, readable
from tests.integrations import hosts, sweep
from tests.integrations.compatibility import read_table
from tests.integrations.hosts import BATCH, HOSTS, LENGTH, NAME, SITUATIONS, Wide, build
from tests.tolerance import GRADIENT_FACTOR, assert_accurate
from train.measure import PeakMemory, in_fresh_process

ROOT = Path(__file__).parents[2]
MIB = 2**20


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("host", HOSTS)
def test_as_close_to_fp64_as_eager(host: str, situation: str) -> None:
    """And the committed table says so, or quotes the refusal."""
    assert hosts.outcome(host, situation) == read_table()[host, situation]


def test_the_table_has_every_model_and_situation() -> None:
    assert set(read_table()) == {(host, situation) for host in HOSTS for situation in SITUATIONS}


@pytest.mark.parametrize(
    ("host", "parameter"), [("gpt-oss", "sinks"), ("T5", "relative_attention_bias")]
)
def test_learnable_parts_of_the_scores_learn(host: str, parameter: str) -> None:
    """Their gradients are among those that are compared, and are not zero."""
    model = build(host)
    model.set_attn_implementation(NAME)
    results = hosts.SITUATION_RUNS["left padding"](model, HOSTS[host].kind)
    found = [grad for name, grad in results.items() if parameter in name]
    assert len(found) == 2
    assert all(grad.abs().max() > 1e-4 for grad in found)


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
    return masking_utils.packed_sequence_compatibility_function(
        function[kind.removeprefix("packed ")], positions, sequences
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
def test_a_band_mask_is_the_hosts_mask(kind: str, padding: str | None, stand: tuple) -> None:
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
    assert isinstance(mask, BandMask)
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
def test_sequences_chunks_and_two_sided_windows_are_bands_too(kind: str) -> None:
    rows = [[4, 5], [1, 2, 6], [9]]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
    sequences = masking_utils.find_packed_sequence_indices(positions)
    function = mask_function(kind, 3, sequences, positions)
    arguments = {"batch_size": 3, "q_length": 9, "kv_length": 9, "mask_function": function}
    mask = make_mask(**arguments)
    assert isinstance(mask, BandMask)
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


def padded_mask() -> BandMask:
    mask = make_mask(2, 5, 5, attention_mask=hosts._padding("left padding")[:, -5:].bool())
    assert isinstance(mask, BandMask)
    return mask


@pytest.mark.parametrize("kind", [BandMask, DenseMask])
def test_a_mask_is_a_bool_tensor_that_can_be_moved_and_combined(kind: type) -> None:
    mask: Any = padded_mask()
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


@pytest.mark.parametrize("derived", ["mask", "slice", "copy", "moved", "intersection", "view"])
@pytest.mark.parametrize("reading", READINGS)
def test_a_mask_and_whatever_is_made_of_it_raises_when_it_is_read_as_eagers(
    reading: str, derived: str
) -> None:
    """By name, and whatever a model does with the mask."""
    config = transformers.XGLMConfig()
    mask = make_mask(2, 4, 4, attention_mask=torch.tensor([[0, 1, 1, 1]] * 2).bool(), config=config)
    made = {
        "mask": lambda: mask,
        "slice": lambda: mask[:, 0, 0, :][:, None, None].expand(2, 1, 4, 4),
        "copy": lambda: mask.clone(),
        "moved": lambda: mask[:, :, :4].to("cpu").contiguous(),
        "intersection": lambda: mask & torch.ones(4, 4, dtype=torch.bool),
        "view": lambda: mask.view(2, 16).view(2, 1, 4, 4),
    }
    with pytest.raises(ValueError, match=r"^xglm: .*attention is its own.*use attn_implementation"):
        READINGS[reading](made[derived](), torch.randn(2, 1, 4, 4))


class Module(nn.Module):
    """As much of an attention module as the attention function looks at."""

    is_causal = True


def small(queries: int = 4, keys: int = 4, heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(2, heads, queries, 8),
        torch.randn(2, heads, keys, 8),
        torch.randn(2, heads, keys, 8),
    )


@pytest.mark.parametrize(
    ("what", "options", "shape"),
    [
        ("output_attentions", {"output_attentions": True}, (4, 4)),
        ("cache", {"cache": object()}, (4, 4)),
        ("block_table", {"block_table": torch.zeros(1)}, (4, 4)),
        ("indices", {"indices": torch.zeros(1)}, (4, 4)),
        ("block_indices", {"block_indices": torch.zeros(1)}, (4, 4)),
        ("sinks", {"sinks": torch.zeros(1)}, (4, 4)),
        ("sliding_window", {"sliding_window": 2}, (4, 4)),
        ("attention_mask=None", {}, (3, 4)),
        ("attention_mask", {"attention_mask": torch.ones(2, 4)}, (4, 4)),
        (
            "cu_seq_lens_q",
            {
                "attention_mask": torch.ones(2, 1, 4, 4, dtype=torch.bool),
                "cu_seq_lens_q": torch.tensor([0, 8]),
            },
            (4, 4),
        ),
        (
            "cu_seq_lens_q",
            {"position_bias": torch.ones(1, 2, 4, 4), "cu_seq_lens_q": torch.tensor([0, 8])},
            (4, 4),
        ),
        ("softcap", {"softcap": -1.0}, (4, 4)),
        ("attention_mask", {"attention_mask": make_mask(2, 4, 4)}, (3, 4)),
    ],
)
def test_a_refusal_names_the_model_and_the_option(
    what: str, options: dict[str, Any], shape: tuple[int, int]
) -> None:
    options = {"attention_mask": None} | options
    with pytest.raises(ValueError, match=rf"^model \(Module\): .*{what}"):
        attention(Module(), *small(*shape), **options)


@pytest.mark.parametrize("host", ["Llama", "GPT-2", "Whisper"])
def test_output_attentions_of_the_config_are_refused_by_name(host: str) -> None:
    model = build(host)
    model.config.output_attentions = True
    model.set_attn_implementation(NAME)
    with pytest.raises(ValueError, match=rf"^{model.config.model_type} .*output_attentions"):
        model(**hosts._inputs(model, HOSTS[host].kind, None))


def tiny(name: str, implementation: str) -> transformers.PreTrainedModel:
    options = next(options for options in sweep._candidates(name) if "error" not in options)
    return sweep.build(name, implementation, options)


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
    ids = hosts._tokens(2, 8)
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


TABLES = {
    "GPTNeoForCausalLM": "gpt_neo",
    "GPTJForCausalLM": "gptj",
    "FalconForCausalLM": "falcon",
    "GitModel": "git",
    "Data2VecVisionModel": "data2vec-vision",
    "SamVisionModel": "sam_vision_model",
}


@pytest.mark.parametrize("name", TABLES)
def test_a_model_that_chooses_from_a_table_of_classes_says_so(name: str) -> None:
    """Not a bare KeyError, by _from_config, in the config, and in a fresh process."""
    sentence = (
        rf"^{TABLES[name]}: the model's attention is its own.*_ATTENTION_CLASSES, which has eager"
    )
    with pytest.raises(ValueError, match=sentence):
        tiny(name, NAME)
    model = tiny(name, "eager")
    config = copy.deepcopy(model.config)
    config._attn_implementation = NAME
    with pytest.raises(ValueError, match=sentence):
        type(model)(config)
    if not model._can_set_attn_implementation():
        model.set_attn_implementation(NAME)  # transformers logs that it changes nothing
        assert model.config._attn_implementation == "eager"
    tiny(name, "eager")


def test_the_check_of_tables_looks_at_no_other_name() -> None:
    model = tiny("LlamaForCausalLM", "eager")
    assert model.get_correct_attn_implementation("sdpa") == "sdpa"
    assert model.get_correct_attn_implementation(None) == "sdpa"
    with pytest.raises(ValueError, match='"no such name"` is not supported'):
        model.get_correct_attn_implementation("no such name")
    with pytest.raises(KeyError):
        transformers.models.gptj.modeling_gptj.GPTJ_ATTENTION_CLASSES["no such name"]


def test_a_part_with_an_attention_of_its_own_can_be_eager_beside_flashlayer() -> None:
    """SAM's vision encoder chooses from a table; a users' own subclass of Llama does not matter."""
    options = next(o for o in sweep._candidates("SamModel") if "error" not in o)
    config = transformers.SamConfig(**options)
    parts = {"": NAME, "vision_config": "eager", "mask_decoder_config": NAME}
    model = transformers.SamModel._from_config(config, attn_implementation=parts)
    assert model.config.vision_config._attn_implementation == "eager"

    class Own(transformers.LlamaForCausalLM):
        pass

    llama = build("Llama")
    own = Own._from_config(copy.deepcopy(llama.config), attn_implementation=NAME).eval()
    own.load_state_dict(llama.state_dict())
    ids = hosts._tokens(2, 6)
    torch.testing.assert_close(own(ids).logits, llama(ids).logits)


def test_none_for_a_mask_is_refused_where_eager_and_sdpa_read_is_causal_differently() -> None:
    """BridgeTower's cross-modal layers say is_causal and mean no mask, and can't have SDPA."""
    from transformers.models.bridgetower.modeling_bridgetower import BridgeTowerSelfAttention
    from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

    def module(kind: type) -> nn.Module:
        made = kind.__new__(kind)
        nn.Module.__init__(made)
        made.is_causal = True
        return made

    q, k, v = small()
    with pytest.raises(ValueError, match="attention_mask=None: SDPA takes it for causal"):
        attention(module(BridgeTowerSelfAttention), q, k, v, None)
    causal = attention(Module(), q, k, v, make_mask(2, 4, 4))[0]
    torch.testing.assert_close(attention(module(GPT2Attention), q, k, v, None)[0], causal)


def test_a_mask_of_one_query_counts_for_all() -> None:
    q, k, v = small(4, 6)
    padding = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]]).bool()
    both = masking_utils.bidirectional_mask_function
    row = make_mask(2, 1, 6, mask_function=both, attention_mask=padding)
    dense = padding[:, None, None, :].expand(2, 1, 4, 6)
    expected = nn.functional.scaled_dot_product_attention(q, k, v, dense).transpose(1, 2)
    torch.testing.assert_close(attention(Module(), q, k, v, row)[0], expected)


def test_no_mask_is_what_is_causal_says() -> None:
    q, k, v = small()
    causal = attention(Module(), q, k, v, make_mask(2, 4, 4))[0]
    full = attention(Module(), q, k, v, torch.ones(2, 1, 4, 4, dtype=torch.bool))[0]
    assert (causal - full).abs().max() > 0.1
    torch.testing.assert_close(attention(Module(), q, k, v, None)[0], causal)
    torch.testing.assert_close(attention(Module(), q, k, v, None, is_causal=False)[0], full)
    last = attention(Module(), q[:, :, -1:], k, v, None)[0]
    torch.testing.assert_close(last, causal[:, -1:])
    with pytest.raises(ValueError, match="is_causal"):
        attention(nn.Module(), q, k, v, None)


def test_vision_packs_by_cu_seq_lens_without_a_mask() -> None:
    """As the vision towers of Qwen2-VL do: not causal, one row, several images."""
    q, k, v = (x[:1] for x in small(9, 9))
    edges = torch.tensor([0, 4, 9], dtype=torch.int32)
    options = {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "is_causal": False}
    # They hand on a tensor for the longest, too.
    longest = {"max_length_q": edges.diff().max(), "max_length_k": edges.diff().max()}
    out = attention(Module(), q, k, v, None, **options, **longest)[0]
    for start, stop in ((0, 4), (4, 9)):
        alone = (x[:, :, start:stop] for x in (q, k, v))
        expected = attention(Module(), *alone, None, is_causal=False)[0]
        torch.testing.assert_close(out[:, start:stop], expected)


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
        "input_ids": hosts._tokens(2, 6),
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
    assert isinstance(mask, BandMask)
    plain = torch.arange(6)
    separated = mask.separated(torch.stack([torch.tensor(positions), plain][:rows]), True)
    number = torch.tensor([sequences, [0] * 6][:rows])
    same = number[:, None, :, None] == number[:, None, None, :]
    dense = separated.dense() if isinstance(separated, BandMask) else separated
    assert torch.equal(dense, same & torch.ones(6, 6, dtype=torch.bool).tril())


def test_an_attention_mask_rules_packing_out_as_in_eager() -> None:
    model = build("Llama")
    inputs = {
        "input_ids": hosts._tokens(2, 7),
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
    ids = hosts._tokens(rows, 12)
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
        if isinstance(mask, BandMask):
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
            cache = hosts._cache(situation.split()[0], model, kind)
            padding = hosts._padding("left padding")
            for start, stop in ((0, 5), (5, 12), (12, 13)):
                ids = torch.ones(BATCH, stop - start).long()
                with torch.no_grad():
                    output = model(ids, attention_mask=padding[:, :stop], past_key_values=cache)
        else:
            padding = None if situation == "no padding" else hosts._padding(situation)
            output = model(**hosts._inputs(model, kind, padding))
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
                if isinstance(mask, BandMask):
                    mask = mask.separated(positions, kind != "bidirectional")
                assert (mask.dtype, mask.shape) == (torch.bool, (3, 1, 9, 9))


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


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_of_the_users_own(dtype: torch.dtype) -> None:
    """Prefix-LM: the first 4 tokens see each other."""
    model = build("Llama")
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    mask[:4, :4] = True
    mask = mask.expand(BATCH, 1, -1, -1)
    ids = hosts._tokens(BATCH, LENGTH)
    additive = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    expected = model(ids, attention_mask=additive).logits
    model.set_attn_implementation(NAME)
    given = mask if dtype == torch.bool else additive
    torch.testing.assert_close(model(ids, attention_mask=given).logits, expected)


def test_dropout_in_training_is_the_hosts_on_the_same_positions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """GPT-2, eager's dropout replaced by the mask that flashlayer draws from the same seeds."""
    eager = build("GPT-2").train()
    for block in eager.transformer.h:
        block.attn.attn_dropout.p = 0.3
    flash = copy.deepcopy(eager)
    flash.set_attn_implementation(NAME)
    plain, by_eager, by_flash = door.flash_attention, [], []

    def dropout(weights: Tensor, p: float, training: bool, inplace: bool = False) -> Tensor:
        if p == 0 or not training:
            return weights
        by_eager.append(p)
        kept = dropout_keep_mask(*weights.shape, p, len(by_eager), weights.device)
        return weights * kept / (1 - p)

    def attend(*args: Any, **options: Any) -> Any:
        by_flash.append(options["dropout_p"])
        return plain(*args, **options, dropout_seed=len(by_flash))

    monkeypatch.setattr(nn.functional, "dropout", dropout)
    monkeypatch.setattr(door, "flash_attention", attend)
    inputs = hosts._inputs(flash, "decoder", hosts._padding("right padding"))
    expected, actual = hosts._train(eager, inputs), hosts._train(flash, inputs)
    assert by_eager == by_flash == [0.3, 0.3]
    for name, tensor in actual.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)
    hosts._train(flash.eval(), inputs)
    assert by_flash[2:] == [0.0, 0.0]


def test_autocast_is_as_accurate_as_eager_under_autocast() -> None:
    model = build("Llama")
    inputs = hosts._inputs(model, "decoder", hosts._padding("left padding"))
    with Wide():
        reference = hosts._train(copy.deepcopy(model).double(), inputs)
    results = {}
    for name in ("eager", NAME):
        model.set_attn_implementation(name)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results[name] = hosts._train(model, inputs)
    assert results[NAME]["logits"].dtype == torch.bfloat16
    for name, expected in reference.items():
        if name != "loss":
            eager = results["eager"][name]
            assert_accurate(name, results[NAME][name], eager, expected, GRADIENT_FACTOR)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(use_reentrant: bool) -> None:
    model = build("Mistral").train()
    model.set_attn_implementation(NAME)
    inputs = hosts._inputs(model, "decoder", hosts._padding("left padding")) | {"use_cache": False}
    expected = hosts._train(model, inputs)
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    # As adapters do: with reentrant checkpointing and frozen embeddings nothing would learn.
    model.enable_input_require_grads()
    actual = hosts._train(model, inputs)
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        torch.testing.assert_close(tensor, expected[name])


@pytest.mark.parametrize(
    "parts",
    [
        {"": NAME},
        {"text_config": NAME, "vision_config": "eager"},
        {"text_config": "eager", "vision_config": NAME},
    ],
    ids=str,
)
def test_parts_of_a_model_have_an_attention_each_and_can_go_back(parts: dict[str, str]) -> None:
    model = build("CLIP")
    inputs = hosts._inputs(model, "image-text", hosts._padding("right padding"))
    expected = model(**inputs)
    model.set_attn_implementation(parts)
    for part in ("text_config", "vision_config"):
        assert getattr(model.config, part)._attn_implementation == parts.get(part, "eager")
    for changed in (model, copy.deepcopy(model)):
        actual = changed(**inputs)
        torch.testing.assert_close(actual.logits_per_text, expected.logits_per_text)
    model.set_attn_implementation("eager")
    assert torch.equal(model(**inputs).logits_per_text, expected.logits_per_text)


# Dynamo looks at the gradient of what goes into a layer.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiles_whole_with_padding_and_by_layers() -> None:
    torch.compiler.reset()
    model = build("Llama")
    model.set_attn_implementation(NAME)
    inputs = hosts._inputs(model, "decoder", hosts._padding("left padding"))
    expected = hosts._train(model, inputs)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with hosts.dense_masks() as dense:
        whole = hosts._train(compiled, inputs)
    assert dense == []
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    layers = hosts._train(model, inputs)
    for name, tensor in expected.items():
        torch.testing.assert_close(layers[name], tensor)
        torch.testing.assert_close(whole[name.replace("d ", "d _orig_mod.")], tensor)


def test_registering_twice_changes_nothing() -> None:
    assert register() == NAME
    assert AttentionInterface()[NAME] is attention
    assert AttentionMaskInterface()[NAME] is make_mask


def test_without_transformers_it_says_what_to_install() -> None:
    program = (
        "import sys; sys.modules['transformers'] = None\n"
        "import flashlayer.integrations.transformers as door\n"
        "try: door.register()\n"
        "except ImportError as error: print(error)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert "pip install 'transformers" in result.stdout


def extra_memory(name: str, length: int, padded: bool) -> int:
    """Bytes that a Llama's forward and backward need beyond the model; in a fresh process."""
    from transformers import LlamaConfig, LlamaModel

    register()
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=length,
    )
    model = LlamaModel._from_config(config, attn_implementation=name)

    def step(tokens: int) -> None:
        mask = torch.ones(1, tokens, dtype=torch.long)
        mask[:, : tokens // 8 if padded else 0] = 0
        ids = torch.zeros(1, tokens, dtype=torch.long)
        model(ids, attention_mask=mask, use_cache=False).last_hidden_state.sum().backward()

    step(16)
    memory = PeakMemory(torch.device("cpu"))
    step(length)
    return memory.extra()


def extra_memory_of_both(length: int) -> tuple[int, int]:
    """flashlayer's first: what it needs can't hide in what eager has freed."""
    return extra_memory(NAME, length, padded=True), extra_memory("eager", length, padded=True)


def test_memory_has_no_score_matrix() -> None:
    """4 heads at 2,048 tokens: 64 MiB a matrix of scores."""
    scores = 4 * 2048**2 * 4
    flash, eager = in_fresh_process(extra_memory_of_both, 2048)
    assert eager > 2 * scores
    assert flash < scores


@pytest.mark.slow
@pytest.mark.parametrize("padded", [False, True])
def test_memory_at_8k_tokens_is_linear(padded: bool) -> None:
    """4 heads at 8,192 tokens: 1 GiB a matrix of scores."""
    scores = 4 * 8192**2 * 4
    at_4k, at_8k = (in_fresh_process(extra_memory, NAME, n, padded) for n in (4096, 8192))
    eager = in_fresh_process(extra_memory, "eager", 8192, padded)
    print(
        f"{padded=}: eager {eager / MIB:.0f}, flashlayer {at_8k / MIB:.0f} MiB, "
        f"at 4k {at_4k / MIB:.0f} MiB"
    )
    assert eager > 2 * scores
    assert at_8k < scores / 8
    assert at_8k < 2.5 * at_4k
