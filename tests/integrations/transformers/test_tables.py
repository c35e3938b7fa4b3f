"""Models that choose their attention from a table of classes."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from tests.integrations.transformers.hosts import NAME, build
from tests.integrations.transformers.situations import draw_tokens
from tests.integrations.transformers.tiny_models import candidates, tiny

TABLES = {
    "GPTNeoForCausalLM": "gpt_neo",
    "GPTJForCausalLM": "gptj",
    "FalconForCausalLM": "falcon",
    "GitModel": "git",
    "Data2VecVisionModel": "data2vec-vision",
    "SamVisionModel": "sam_vision_model",
}
if not hasattr(transformers.models.gptj.modeling_gptj, "GPTJ_ATTENTION_CLASSES"):
    del TABLES["GPTJForCausalLM"]  # since transformers 5.24


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
        transformers.models.gpt_neo.modeling_gpt_neo.GPT_NEO_ATTENTION_CLASSES["no such name"]


def test_a_part_with_an_attention_of_its_own_can_be_eager_beside_flashlayer() -> None:
    """SAM's vision encoder chooses from a table; a users' own subclass of Llama does not matter."""
    options = next(o for o in candidates("SamModel") if "error" not in o)
    config = transformers.SamConfig(**options)
    parts = {"": NAME, "vision_config": "eager", "mask_decoder_config": NAME}
    model = transformers.SamModel._from_config(config, attn_implementation=parts)
    assert model.config.vision_config._attn_implementation == "eager"

    class Own(transformers.LlamaForCausalLM):
        pass

    llama = build("Llama")
    own = Own._from_config(copy.deepcopy(llama.config), attn_implementation=NAME).eval()
    own.load_state_dict(llama.state_dict())
    ids = draw_tokens(2, 6)
    torch.testing.assert_close(own(ids).logits, llama(ids).logits)
