"""Tiny random models of transformers, and the situations they are held against eager in."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from transformers import DynamicCache, EncoderDecoderCache, StaticCache, masking_utils

from flashlayer.integrations.transformers import BandMask, register
from tests.tolerance import FACTORS, GRADIENT_FACTOR, assert_accurate

NAME = register()

BATCH, LENGTH, VOCABULARY = 2, 13, 96
PAD, BOS, EOS = 0, 1, 2
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
    kind: str = "decoder"  # or "encoder", "text-to-text", "speech", "vision", "image-text"
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

TRAINING = ("no padding", "left padding", "right padding", "packed", "cu_seq_lens")
GENERATION = ("greedy", "beam search", "static cache", "chunked prefill")
SITUATIONS = TRAINING + GENERATION

APPLICABLE = {
    "decoder": SITUATIONS,
    "encoder": TRAINING[:3],
    "text-to-text": TRAINING[:3] + GENERATION,
    "speech": TRAINING[:3] + GENERATION,
    "vision": TRAINING[:1],
    "image-text": TRAINING[:3],
}

Inputs = dict[str, Any]


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

        return func(*tree_map(widen, args), **tree_map(widen, kwargs or {}))


@contextmanager
def dense_masks() -> Iterator[list[tuple[int, ...]]]:
    """The shapes of all masks with more than one query that are made in full meanwhile."""
    shapes: list[tuple[int, ...]] = []
    by_host, by_band = masking_utils.sdpa_mask, BandMask.dense

    def counted(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            mask = make(*args, **kwargs)
            if mask.shape[2] > 1:
                shapes.append(tuple(mask.shape))
            return mask

        return made

    masking_utils.sdpa_mask, BandMask.dense = counted(by_host), counted(by_band)
    try:
        yield shapes
    finally:
        masking_utils.sdpa_mask, BandMask.dense = by_host, by_band


def outcome(name: str, situation: str) -> str:
    """``passes``, the exact refusal, or a dash where the model has no such thing.

    Raises:
        AssertionError: results differ from eager's.
    """
    kind = HOSTS[name].kind
    if situation not in APPLICABLE[kind]:
        return "-"
    run = SITUATION_RUNS[situation]
    draws = []
    dense: list[tuple[int, ...]] = []
    for seed in SEEDS:
        model = build(name, seed)
        expected = run(model, kind)
        with Wide():
            reference = run(copy.deepcopy(model).double(), kind)
        model.set_attn_implementation(NAME)
        try:
            with dense_masks() as made:
                actual = run(model, kind)
        except ValueError as refusal:
            return f"refused: {refusal}"
        assert actual.keys() == expected.keys() == reference.keys()
        draws.append((actual, expected, reference))
        dense += made
    actual, expected, reference = (
        {result: torch.stack([draw[result] for draw in by_seed]) for result in by_seed[0]}
        for by_seed in zip(*draws, strict=True)
    )
    noise = _rounding(reference)
    for result, tensor in actual.items():
        if tensor.dtype == torch.int64:
            assert torch.equal(tensor, expected[result]), (result, tensor, expected[result])
            continue
        factor = GRADIENT_FACTOR if result.startswith("d ") else FACTORS["out"]
        triple = tensor, expected[result], reference[result]
        assert_accurate(result, *triple, factor, noise[result])
    return "passes, dense mask" if dense else "passes"


def _rounding(reference: dict[str, Tensor]) -> dict[str, float]:
    """What rounding makes of a result at the least, where eager may happen to make less.

    Two roundings of the result. A few numbers may come out right by luck, and a bias of the keys
    shifts all scores of a row alike, so its gradient is 0: what is left of either is the rounding
    of the terms of a sum, in a gradient as large as the other gradients.
    """
    eps = torch.finfo(torch.float32).eps
    sizes = {name: tensor.abs().max().item() for name, tensor in reference.items()}
    largest = max((size for name, size in sizes.items() if name.startswith("d ")), default=0.0)
    noise = {}
    for name, tensor in reference.items():
        gradient = name.startswith("d ")
        few = tensor.numel() <= 8 * len(SEEDS)
        lucky = few or (gradient and sizes[name] < 1e-12 * largest)
        terms = largest if gradient else 2 * sizes[name]
        noise[name] = 2 * eps * (terms if lucky else sizes[name])
    return noise


def _tokens(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY, shape, generator=generator)


def _images(model: transformers.PreTrainedModel) -> Tensor:
    pixels = torch.randn(BATCH, 3, 12, 12, generator=torch.Generator().manual_seed(2))
    return pixels.to(model.dtype)


def _sound(model: transformers.PreTrainedModel) -> Tensor:
    features = torch.randn(BATCH, 8, 20, generator=torch.Generator().manual_seed(2))
    return features.to(model.dtype)


def _padding(side: str) -> Tensor:
    """2-D mask (B, S), 1 = token."""
    tokens = torch.arange(LENGTH) < torch.tensor(TOKENS)[:, None]
    return (tokens.flip(1) if side == "left padding" else tokens).long()


def _inputs(model: transformers.PreTrainedModel, kind: str, padding: Tensor | None) -> Inputs:
    """Arguments of the forward with a loss, padding hidden from it."""
    ids = _tokens(BATCH, LENGTH)
    if kind == "vision":
        return {"pixel_values": _images(model), "labels": torch.arange(BATCH)}
    if kind == "image-text":
        ids[:, -1] = EOS
        if padding is not None:
            ids[0, padding[0].nonzero()[-1]] = EOS
        inputs = {"input_ids": ids, "pixel_values": _images(model), "return_loss": True}
        return inputs if padding is None else inputs | {"attention_mask": padding}
    labels = ids.clone()
    if padding is not None:
        # The prediction of a row's first token comes from the padding to its left.
        first = padding.cumsum(1) == 1
        labels = ids.masked_fill((padding == 0) | first, -100)
    if kind in ("decoder", "encoder"):
        inputs = {"input_ids": ids, "labels": labels}
        return inputs if padding is None else inputs | {"attention_mask": padding}
    target = _tokens(BATCH, 7)
    inputs = {"decoder_input_ids": target, "labels": target}
    if kind == "speech":
        inputs["input_features"] = _sound(model)
    else:
        inputs["input_ids"] = ids
        if padding is not None:
            inputs["attention_mask"] = padding
    if padding is not None:
        seen = torch.ones(BATCH, 7, dtype=torch.long)
        seen[0, :3] = 0
        inputs["decoder_attention_mask"] = seen if padding[0, 0] == 0 else seen.flip(1)
        inputs["labels"] = target.masked_fill(inputs["decoder_attention_mask"] == 0, -100)
    return inputs


def _train(model: transformers.PreTrainedModel, inputs: Inputs) -> dict[str, Tensor]:
    """Logits where there is a label, loss, and the gradient of every parameter that has one."""
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    if "logits" in output:
        logits = output.logits
        labels = inputs["labels"]
        if logits.ndim == 3:
            logits = logits[labels != -100]
        results = {"logits": logits}
    else:
        results = {"logits": output.logits_per_text, "text": output.text_embeds}
    results["loss"] = output.loss
    named = model.named_parameters()
    results |= {f"d {name}": p.grad for name, p in named if p.grad is not None}
    return {name: tensor.detach().clone() for name, tensor in results.items()}


def _run_training(situation: str) -> Callable[[transformers.PreTrainedModel, str], Any]:
    def run(model: transformers.PreTrainedModel, kind: str) -> dict[str, Tensor]:
        padding = None if situation == "no padding" else _padding(situation)
        return _train(model, _inputs(model, kind, padding))

    return run


def _run_packed(situation: str) -> Callable[[transformers.PreTrainedModel, str], Any]:
    """Five sequences in two rows; eager has each in a row of its own, padded on the right.

    flashlayer is told of them by restarting positions, in ``cu_seq_lens`` by the boundaries too.
    """
    lengths = ((5, 8), (3, 9, 1))
    flat = torch.tensor([n for row in lengths for n in row])

    def run(model: transformers.PreTrainedModel, kind: str) -> dict[str, Tensor]:
        inputs = _inputs(model, kind, None) | {"use_cache": False}
        positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
        # The last token of a sequence does not predict the first of the next.
        inputs["labels"] = inputs["labels"].masked_fill(positions == 0, -100)
        if model.config._attn_implementation == "eager":
            real = torch.arange(int(flat.max())) < flat[:, None]
            for name, fill in (("input_ids", PAD), ("labels", -100)):
                apart = torch.full(real.shape, fill)
                apart[real] = inputs[name].flatten()
                inputs[name] = apart
            return _train(model, inputs | {"attention_mask": real.long()})
        inputs["position_ids"] = positions
        if situation == "cu_seq_lens":
            cu_seq_lens = torch.nn.functional.pad(flat.cumsum(0), (1, 0)).int()
            inputs |= {"cu_seq_lens_q": cu_seq_lens, "cu_seq_lens_k": cu_seq_lens}
            inputs |= {"max_length_q": 9, "max_length_k": 9}
        return _train(model, inputs)

    return run


def _run_generation(**options: Any) -> Callable[[transformers.PreTrainedModel, str], Any]:
    def run(model: transformers.PreTrainedModel, kind: str) -> dict[str, Tensor]:
        if kind == "speech":
            inputs = {"input_features": _sound(model)}
        else:
            padding = _padding("left padding" if kind == "decoder" else "right padding")
            inputs = {"input_ids": _tokens(BATCH, LENGTH), "attention_mask": padding}
        # Whisper's own generate is about languages and timestamps.
        generated = transformers.GenerationMixin.generate(
            model,
            **inputs,
            max_new_tokens=9,
            min_new_tokens=9,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            **options,
        )
        return {"tokens": generated.sequences, "logits": torch.stack(generated.logits)}

    return run


@torch.no_grad()
def _run_chunked_prefill(model: transformers.PreTrainedModel, kind: str) -> dict[str, Tensor]:
    """The prompt in chunks of 5, 7 and 1, into a growing and into a static cache."""
    results = {}
    if kind == "decoder":
        padding = _padding("left padding")
        ids = _tokens(BATCH, LENGTH)
        fixed = {}
    else:
        padding = torch.ones(BATCH, LENGTH, dtype=torch.long)
        ids = _tokens(BATCH, LENGTH)
        encoder = model.get_encoder()
        if kind == "speech":
            fixed = {"encoder_outputs": encoder(_sound(model))}
        else:
            seen = _padding("right padding")
            fixed = {"encoder_outputs": encoder(ids, attention_mask=seen), "attention_mask": seen}
    for cache_name in ("dynamic", "static"):
        cache = _cache(cache_name, model, kind)
        for start, stop in ((0, 5), (5, 12), (12, 13)):
            if kind == "decoder":
                chunk = {"input_ids": ids[:, start:stop], "attention_mask": padding[:, :stop]}
                positions = (padding.cumsum(1) - 1).clamp(min=0)[:, start:stop]
                chunk["position_ids"] = positions
            else:
                chunk = {"decoder_input_ids": ids[:, start:stop]}
            logits = model(**fixed, **chunk, past_key_values=cache, use_cache=True).logits
            results[f"{cache_name} {start}:{stop}"] = logits[padding[:, start:stop] == 1]
    return results


def _cache(name: str, model: transformers.PreTrainedModel, kind: str) -> Any:
    config = model.config.get_text_config(decoder=True)

    def make() -> Any:
        if name == "dynamic":
            return DynamicCache(config=config)
        return StaticCache(config=config, max_cache_len=LENGTH + 4)

    return make() if kind == "decoder" else EncoderDecoderCache(make(), DynamicCache())


SITUATION_RUNS: dict[str, Callable[[transformers.PreTrainedModel, str], Any]] = {
    "no padding": _run_training("no padding"),
    "left padding": _run_training("left padding"),
    "right padding": _run_training("right padding"),
    "packed": _run_packed("packed"),
    "cu_seq_lens": _run_packed("cu_seq_lens"),
    "greedy": _run_generation(),
    "beam search": _run_generation(num_beams=3),
    "static cache": _run_generation(cache_implementation="static"),
    "chunked prefill": _run_chunked_prefill,
}
