"""Tiny random models of transformers that are compared with their own eager attention."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode

from flashlayer.integrations.transformers import register

NAME = register()

BATCH, LENGTH, VOCABULARY = 2, 13, 96

PAD, BOS, EOS = 0, 1, 2

# The token that stands for a part of an image, and how many of them an image has.
IMAGE, IMAGE_TOKENS = VOCABULARY - 1, 4

# Real tokens a row: the second row is whole, so that a mask of one row for all would be wrong.
TOKENS = (9, LENGTH)

WINDOW = 5

# Weights are drawn twice: in one draw alone, eager may by luck round to almost nothing.
SEEDS = (0, 1)


@dataclass(frozen=True)
class Host:
    """One model of the matrix: its config's class, its own class, what it takes."""

    config: str
    model: str
    # or "encoder", "text-to-text", "speech", "vision", "image-text", "decoder of images"
    kind: str = "decoder"
    options: dict[str, Any] = field(default_factory=dict)


SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}

GROUPED = SMALL | {"num_key_value_heads": 2}

SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

EXPERTS = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}

LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    **EXPERTS,
}

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 12,
    "patch_size": 4,
}

SMALL_IMAGES = VISION | {"image_size": 8, "num_attention_heads": 2}

HOSTS = {
    "Llama": Host("LlamaConfig", "LlamaForCausalLM", options=GROUPED),
    "Mistral": Host("MistralConfig", "MistralForCausalLM", options=GROUPED | {"sliding_window": 5}),
    "Qwen2": Host(
        "Qwen2Config", "Qwen2ForCausalLM", options=GROUPED | SLIDING | {"use_sliding_window": True}
    ),
    "Qwen3": Host("Qwen3Config", "Qwen3ForCausalLM", options=GROUPED | {"head_dim": 12}),
    "Gemma 2": Host(
        "Gemma2Config",
        "Gemma2ForCausalLM",
        options=GROUPED | SLIDING | {"head_dim": 8, "attn_logit_softcapping": 2.0},
    ),
    "Gemma 3": Host(
        "Gemma3TextConfig", "Gemma3ForCausalLM", options=GROUPED | SLIDING | {"head_dim": 8}
    ),
    "Gemma 3 with images": Host(
        "Gemma3Config",
        "Gemma3ForConditionalGeneration",
        "decoder of images",
        {
            "text_config": GROUPED | SLIDING | {"head_dim": 8},
            "vision_config": SMALL_IMAGES,
            "mm_tokens_per_image": IMAGE_TOKENS,
            "image_token_id": IMAGE,
            "boi_token_index": BOS,
            "eoi_token_index": EOS,
        },
    ),
    "PaliGemma": Host(
        "PaliGemmaConfig",
        "PaliGemmaForConditionalGeneration",
        "decoder of images",
        {
            "text_config": GROUPED | {"model_type": "gemma", "head_dim": 8},
            "vision_config": SMALL_IMAGES | {"model_type": "siglip_vision_model"},
            "image_token_id": IMAGE,
            "projection_dim": 32,
        },
    ),
    "gpt-oss": Host(
        "GptOssConfig",
        "GptOssForCausalLM",
        options=GROUPED | SLIDING | EXPERTS | {"head_dim": 8, "num_local_experts": 4},
    ),
    "GPT-2": Host(
        "GPT2Config",
        "GPT2LMHeadModel",
        options={
            "vocab_size": VOCABULARY,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "pad_token_id": PAD,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
        },
    ),
    "GPT-NeoX": Host("GPTNeoXConfig", "GPTNeoXForCausalLM", options=SMALL),
    "Phi": Host("PhiConfig", "PhiForCausalLM", options=GROUPED),
    "DeepSeek-V3": Host("DeepseekV3Config", "DeepseekV3ForCausalLM", options=SMALL | LATENT),
    "DeepSeek-V3.2": Host(
        "DeepseekV32Config",
        "DeepseekV32ForCausalLM",
        options=SMALL | LATENT | {"index_topk": 4, "index_n_heads": 2, "index_head_dim": 16},
    ),
    "Llama 4": Host(
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        options=GROUPED
        | {
            "head_dim": 8,
            "attention_chunk_size": 5,
            "num_local_experts": 2,
            "intermediate_size_mlp": 48,
            "no_rope_layers": [1, 0],
        },
    ),
    "BERT": Host("BertConfig", "BertForMaskedLM", "encoder", SMALL | NO_DROPOUT),
    "RoBERTa": Host("RobertaConfig", "RobertaForMaskedLM", "encoder", SMALL | NO_DROPOUT),
    "ModernBERT": Host(
        "ModernBertConfig",
        "ModernBertForMaskedLM",
        "encoder",
        SMALL
        | {
            "layer_types": ["full_attention", "sliding_attention"],
            "local_attention": 6,
            "cls_token_id": BOS,
            "sep_token_id": EOS,
        },
    ),
    "T5": Host(
        "T5Config",
        "T5ForConditionalGeneration",
        "text-to-text",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "dropout_rate": 0.0,
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 10,
            "pad_token_id": PAD,
            "eos_token_id": EOS,
            "decoder_start_token_id": PAD,
        },
    ),
    "Whisper": Host(
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        "speech",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "num_mel_bins": 8,
            "max_source_positions": 10,
            "max_target_positions": 64,
            "dropout": 0.0,
            "pad_token_id": PAD,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "decoder_start_token_id": BOS,
        },
    ),
    "ViT": Host("ViTConfig", "ViTForImageClassification", "vision", VISION | {"num_labels": 5}),
    "CLIP": Host(
        "CLIPConfig",
        "CLIPModel",
        "image-text",
        {"text_config": SMALL | {"eos_token_id": EOS}, "vision_config": VISION},
    ),
}


def build(name: str, seed: int = SEEDS[0]) -> transformers.PreTrainedModel:
    """The model in fp32 with eager attention; weights large enough for attention to matter."""
    host = HOSTS[name]
    torch.manual_seed(seed)
    config = getattr(transformers, host.config)(**copy.deepcopy(host.options))
    # The grouped matmul of experts has no fp64.
    model = getattr(transformers, host.model)._from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


class Wide(TorchFunctionMode):
    """Computes in fp64 where a model asks for fp32 by name (softmax, norms, rotary angles)."""

    def __torch_function__(
        self, func: Callable, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.float:
            func = Tensor.double

        def widen(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        # A dtype is an argument by itself, so there is no need to search the others.
        named = {name: widen(value) for name, value in (kwargs or {}).items()}
        return func(*map(widen, args), **named)
