"""Models with flashlayer's attention against their own eager attention."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from flashlayer import dropout_keep_mask
from flashlayer.integrations.transformers import (
    attention,
    attention_function,
    make_mask,
    register,
)
from flashlayer.testing import GRADIENT_FACTOR, assert_accurate
from tests.integrations.transformers.compatibility import read_table
from tests.integrations.transformers.hosts import BATCH, HOSTS, LENGTH, NAME, Wide, build
from tests.integrations.transformers.situations import (
    SITUATION_RUNS,
    SITUATIONS,
    dense_masks,
    draw_tokens,
    model_inputs,
    outcome,
    padding_mask,
    train_step,
)
from train.measure import PeakMemory, in_fresh_process

ROOT = Path(__file__).parents[3]

MIB = 2**20


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("host", HOSTS)
def test_as_close_to_fp64_as_eager(host: str, situation: str) -> None:
    """And the committed table says so, or quotes the refusal."""
    assert outcome(host, situation) == read_table()[host, situation]


def test_the_table_has_every_model_and_situation() -> None:
    assert set(read_table()) == {(host, situation) for host in HOSTS for situation in SITUATIONS}


@pytest.mark.parametrize(
    ("host", "parameter"), [("gpt-oss", "sinks"), ("T5", "relative_attention_bias")]
)
def test_learnable_parts_of_the_scores_learn(host: str, parameter: str) -> None:
    """Their gradients are among those that are compared, and are not zero."""
    model = build(host)
    model.set_attn_implementation(NAME)
    results = SITUATION_RUNS["left padding"](model, HOSTS[host].kind)
    found = [grad for name, grad in results.items() if parameter in name]
    assert len(found) == 2
    assert all(grad.abs().max() > 1e-4 for grad in found)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_of_the_users_own(dtype: torch.dtype) -> None:
    """Prefix-LM: the first 4 tokens see each other."""
    model = build("Llama")
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    mask[:4, :4] = True
    mask = mask.expand(BATCH, 1, -1, -1)
    ids = draw_tokens(BATCH, LENGTH)
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
    plain, by_eager, by_flash = attention_function.flash_attention, [], []

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
    monkeypatch.setattr(attention_function, "flash_attention", attend)
    inputs = model_inputs(flash, "decoder", padding_mask("right padding"))
    expected, actual = train_step(eager, inputs), train_step(flash, inputs)
    assert by_eager == by_flash == [0.3, 0.3]
    for name, tensor in actual.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)
    train_step(flash.eval(), inputs)
    assert by_flash[2:] == [0.0, 0.0]


def test_autocast_is_as_accurate_as_eager_under_autocast() -> None:
    model = build("Llama")
    inputs = model_inputs(model, "decoder", padding_mask("left padding"))
    wide = copy.deepcopy(model).double()
    with Wide():
        reference = train_step(wide, inputs)
    results = {}
    for name in ("eager", NAME):
        model.set_attn_implementation(name)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results[name] = train_step(model, inputs)
    assert results[NAME]["logits"].dtype == torch.bfloat16
    for name, expected in reference.items():
        if name != "loss":
            eager = results["eager"][name]
            assert_accurate(name, results[NAME][name], eager, expected, GRADIENT_FACTOR)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(use_reentrant: bool) -> None:
    model = build("Mistral").train()
    model.set_attn_implementation(NAME)
    inputs = model_inputs(model, "decoder", padding_mask("left padding")) | {"use_cache": False}
    expected = train_step(model, inputs)
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    # As adapters do: with reentrant checkpointing and frozen embeddings nothing would learn.
    model.enable_input_require_grads()
    actual = train_step(model, inputs)
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
    inputs = model_inputs(model, "image-text", padding_mask("right padding"))
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
    inputs = model_inputs(model, "decoder", padding_mask("left padding"))
    expected = train_step(model, inputs)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with dense_masks() as dense:
        whole = train_step(compiled, inputs)
    assert dense == []
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    layers = train_step(model, inputs)
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
