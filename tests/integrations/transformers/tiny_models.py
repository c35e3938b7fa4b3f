"""A tiny random model of any class of transformers, its config shrunk by the names of options."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import transformers
from transformers.models.auto import modeling_auto

PAD = 0

LARGEST = 30_000_000  # parameters

VOCABULARY = 120

# Names of config options and their tiny values: the first pattern that matches.
SIZES: list[tuple[str, int]] = [
    (r"vocab_size(_or_config_json_file)?$|^n_vocab$", VOCABULARY),
    (r"^(num_experts_per_tok|num_experts_per_token|moe_k|top_k|num_selected_experts|moe_topk)$", 2),
    (r"^(num_experts|n_routed_experts|num_local_experts|moe_num_experts|num_moe_experts)$", 4),
    (r"^(n_group|topk_group|num_expert_group|n_shared_experts|moe_num_shared_experts)$", 1),
    (r"^(qk_rope_head_dim|qk_nope_head_dim)$", 8),
    (r"^(head_dim|global_head_dim|v_head_dim|d_kv|kv_channels|attention_head_size)$", 16),
    (r"^(attention_head_dim|swa_head_dim|qk_head_dim|linear_(key|value)_head_dim)$", 16),
    (r"(kv|q)_lora_rank$", 16),
    (r"linear_num_(key|value)_heads$", 2),
    (r"(heads?|heads_k|heads_kv|num_kv|multi_query_group_num)$", 2),
    (r"(^|_)(num_)?(hidden_)?(layers?|blocks|depth|n_layers?|stages)$", 2),
    (r"^(n_layer|n_layers|num_decoder_layers|num_encoder_layers|num_mel_layers|layers)$", 2),
    (r"(intermediate|ffn|ff|inner|mlp|feedforward|feed_forward).*(size|dim|channels)?$", 48),
    (r"^(d_ff|n_inner)$", 48),
    (r"^(hidden_size|d_model|n_embd|embed_dim|embedding_size|dim|emb_dim|hidden_dim)$", 32),
    (r"(hidden_size|hidden_dim|embed_dim|d_model|projection_dim|projector_dim)$", 32),
    (r"^(image_size|input_size|img_size)$", 32),
    (r"^(spatial_|temporal_)?(patch_size)$", 8),
    (r"^(attention_window|sliding_window|local_attention|window_size)$", 4),
    (r"^(attention_chunk_size)$", 6),
]

LIMITS = {"max_position_embeddings": 128, "max_source_positions": 128, "n_positions": 128}

LAYERS = re.compile(r"layers?$|depth|blocks$|stages$")

SMALLER = re.compile(r"layer|depth|vocab_size|experts")

# Options that no rule finds.
OWN_OPTIONS: dict[str, dict[str, Any]] = {
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]]},
    "CodeGenConfig": {"n_head": 4, "rotary_dim": 8},
    "PatchTSTConfig": {"context_length": 32, "num_input_channels": 2},
}

# Options that are None and computed from others, which fails for some tiny sizes.
FILLED = {
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "decoder_start_token_id": PAD,
    "prediction_length": 4,
}


class Variant(NamedTuple):
    """How a config is shrunk.

    Attributes:
        only: which options; None for all that have a rule.
        layers: so many, because some models have their first attention in the fourth.
        width: hidden size; sections of rotary embeddings may want heads of 128.
        filled: whether options that are None get a value, too.
    """

    only: re.Pattern[str] | None = None
    layers: int = 2
    width: int = 32
    filled: bool = False


VARIANTS = (
    Variant(),
    Variant(layers=4),
    Variant(width=256),
    Variant(layers=4, width=256),
    Variant(layers=8),
    Variant(filled=True),
    Variant(layers=4, filled=True),
    Variant(width=256, filled=True),
    Variant(SMALLER),
    Variant(LAYERS),
)


def model_classes() -> list[str]:
    """Names of all classes that transformers' auto classes know."""
    found = set()
    for mapping, entries in vars(modeling_auto).items():
        if mapping.endswith("_MAPPING_NAMES") and not mapping.startswith("CONFIG_"):
            for names in entries.values():
                found |= {names} if isinstance(names, str) else set(names)
    return sorted(found)


def _shrunk(name: str, value: Any, variant: Variant) -> Any:
    """A tiny value for a config's option; the value itself where no size is meant."""
    if variant.only is not None and not variant.only.search(name):
        return value
    if isinstance(value, list | tuple) and value and all(type(item) is int for item in value):
        if name.endswith(("kernel", "kernel_sizes", "kernel_size", "stride", "strides")):
            return value
        return type(value)(_shrunk(name.removesuffix("s"), item, variant) for item in value)
    if type(value) is not int or value < 2:
        return value
    if name in LIMITS:
        return min(value, LIMITS[name])
    for pattern, size in SIZES:
        if re.search(pattern, name):
            if size == 32 and "size" not in (name.removeprefix("image_"), name):
                size = variant.width if "image" not in name and "img" not in name else size
            if size == 16 and variant.width > 32:
                size = variant.width // 2
            if size == 2 and LAYERS.search(name):
                size = variant.layers
            return min(size, value)
    return value


def tiny_options(config_class: type, variant: Variant, depth: int = 0) -> dict[str, Any]:
    """Options of a tiny config of this class, those of the configs inside as dicts."""
    default = vars(config_class())
    options: dict[str, Any] = {}
    parts = getattr(config_class, "sub_configs", {})
    for name, parameter in inspect.signature(config_class.__init__).parameters.items():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) or name == "self":
            continue
        value = default.get(name, parameter.default)
        if name in parts or isinstance(value, transformers.PreTrainedConfig):
            if isinstance(value, transformers.PreTrainedConfig) and depth < 3:
                inner = tiny_options(type(value), variant, depth + 1)
                options[name] = inner | {"model_type": value.model_type}
            continue
        if re.search(r"(token|image|video|audio)_?(token)?_(id|index)$", name):
            if type(value) is int and value >= VOCABULARY:
                options[name] = VOCABULARY - 1 - len(options) % 16
            elif name == "pad_token_id" and value is None:
                options[name] = PAD
            continue
        if variant.filled and parameter.default is None and name in FILLED:
            options[name] = variant.width // 2 if name == "head_dim" else FILLED[name]
            continue
        small = _shrunk(name, parameter.default, variant)
        if small != parameter.default:
            options[name] = small
    return options | OWN_OPTIONS.get(config_class.__name__, {})


def build(name: str, implementation: str, options: dict) -> transformers.PreTrainedModel:
    """The model with random weights, large enough for the mask to matter."""
    model_class = getattr(transformers, name)
    config = model_class.config_class(**copy.deepcopy(options))
    torch.manual_seed(0)
    model = model_class._from_config(config, attn_implementation=implementation)
    if hasattr(model, "set_default_language"):  # X-MOD
        model.set_default_language("en_XX")
    return model.eval()


def candidates(name: str) -> Iterator[dict]:
    """Options to try, the smallest model first."""
    config_class = getattr(transformers, name).config_class
    for variant in VARIANTS:
        try:
            options = tiny_options(config_class, variant)
            with torch.device("meta"):
                model = build(name, "eager", options)
        except Exception as error:  # any way in which a config can't be shrunk
            yield {"error": error}
            continue
        count = sum(parameter.numel() for parameter in model.parameters())
        if count > LARGEST:
            yield {"error": f"{count} parameters"}
            continue
        yield options


def tiny(name: str, implementation: str) -> transformers.PreTrainedModel:
    options = next(options for options in candidates(name) if "error" not in options)
    return build(name, implementation, options)
