"""What the models of :mod:`hosts` are run on: training, packed sequences, generation."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, StaticCache, masking_utils

from flashlayer.integrations.transformers import WindowMask
from flashlayer.testing import FACTORS, GRADIENT_FACTOR, assert_accurate
from tests.integrations.transformers.hosts import (
    BATCH,
    EOS,
    HOSTS,
    IMAGE,
    IMAGE_TOKENS,
    LENGTH,
    NAME,
    PAD,
    SEEDS,
    TOKENS,
    VOCABULARY,
    Wide,
    build,
)

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
    "decoder of images": TRAINING[:3] + GENERATION[:3],
}

Inputs = dict[str, Any]


@contextmanager
def dense_masks() -> Iterator[list[tuple[int, ...]]]:
    """The shapes of all masks with more than one query that are made in full meanwhile."""
    shapes: list[tuple[int, ...]] = []
    by_host, by_window = masking_utils.sdpa_mask, WindowMask.dense

    def counted(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            mask = make(*args, **kwargs)
            if mask.shape[2] > 1:
                shapes.append(tuple(mask.shape))
            return mask

        return made

    masking_utils.sdpa_mask, WindowMask.dense = counted(by_host), counted(by_window)
    try:
        yield shapes
    finally:
        masking_utils.sdpa_mask, WindowMask.dense = by_host, by_window


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
        wide = copy.deepcopy(model).double()  # outside of Wide, which intercepts all that it does
        with Wide():
            reference = run(wide, kind)
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


def draw_tokens(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY, shape, generator=generator)


def _images(model: transformers.PreTrainedModel) -> Tensor:
    size = getattr(model.config, "vision_config", model.config).image_size
    pixels = torch.randn(BATCH, 3, size, size, generator=torch.Generator().manual_seed(2))
    return pixels.to(model.dtype)


def _with_images(
    model: transformers.PreTrainedModel, ids: Tensor, padding: Tensor | None
) -> Inputs:
    """The tokens with an image behind each row's first, and the types of all.

    Gemma 3 has type 1 for tokens of images, PaliGemma for those behind the prompt, which here has
    two tokens more than the image. Padding has type 0.
    """
    real = torch.ones_like(ids) if padding is None else padding
    place = real.cumsum(1) * real  # 1, 2, 3, ...; 0 for padding
    is_image = (place > 1) & (place <= 1 + IMAGE_TOKENS)
    ids = ids.masked_fill(ids == IMAGE, IMAGE - 1).masked_fill(is_image, IMAGE)
    behind = place > 1 + IMAGE_TOKENS + 2
    types = behind if model.config.model_type == "paligemma" else is_image
    return {"input_ids": ids, "token_type_ids": types.long(), "pixel_values": _images(model)}


def _sound(model: transformers.PreTrainedModel) -> Tensor:
    features = torch.randn(BATCH, 8, 20, generator=torch.Generator().manual_seed(2))
    return features.to(model.dtype)


def padding_mask(side: str) -> Tensor:
    """2-D mask (B, S), 1 = token."""
    tokens = torch.arange(LENGTH) < torch.tensor(TOKENS)[:, None]
    return (tokens.flip(1) if side == "left padding" else tokens).long()


def model_inputs(model: transformers.PreTrainedModel, kind: str, padding: Tensor | None) -> Inputs:
    """Arguments of the forward with a loss, padding hidden from it."""
    ids = draw_tokens(BATCH, LENGTH)
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
    if kind in ("decoder", "encoder", "decoder of images"):
        inputs = {"input_ids": ids, "labels": labels}
        if kind == "decoder of images":
            inputs |= _with_images(model, ids, padding)
        return inputs if padding is None else inputs | {"attention_mask": padding}
    target = draw_tokens(BATCH, 7)
    inputs = {"decoder_input_ids": target, "labels": target}
    if kind == "speech":
        inputs["input_features"] = _sound(model)
    else:
        inputs["input_ids"] = ids
        if padding is not None:
            inputs["attention_mask"] = padding
    if padding is not None:
        visible = torch.ones(BATCH, 7, dtype=torch.long)
        visible[0, :3] = 0
        inputs["decoder_attention_mask"] = visible if padding[0, 0] == 0 else visible.flip(1)
        inputs["labels"] = target.masked_fill(inputs["decoder_attention_mask"] == 0, -100)
    return inputs


def train_step(model: transformers.PreTrainedModel, inputs: Inputs) -> dict[str, Tensor]:
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
        padding = None if situation == "no padding" else padding_mask(situation)
        return train_step(model, model_inputs(model, kind, padding))

    return run


def _run_packed(situation: str) -> Callable[[transformers.PreTrainedModel, str], Any]:
    """Five sequences in two rows; eager has each in a row of its own, padded on the right.

    flashlayer gets them as restarting positions, in ``cu_seq_lens`` as boundaries too.
    """
    lengths = ((5, 8), (3, 9, 1))
    flat = torch.tensor([n for row in lengths for n in row])

    def run(model: transformers.PreTrainedModel, kind: str) -> dict[str, Tensor]:
        inputs = model_inputs(model, kind, None) | {"use_cache": False}
        positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
        # The last token of a sequence does not predict the first of the next.
        inputs["labels"] = inputs["labels"].masked_fill(positions == 0, -100)
        if model.config._attn_implementation == "eager":
            real = torch.arange(int(flat.max())) < flat[:, None]
            for name, fill in (("input_ids", PAD), ("labels", -100)):
                apart = torch.full(real.shape, fill)
                apart[real] = inputs[name].flatten()
                inputs[name] = apart
            return train_step(model, inputs | {"attention_mask": real.long()})
        inputs["position_ids"] = positions
        if situation == "cu_seq_lens":
            cu_seq_lens = torch.nn.functional.pad(flat.cumsum(0), (1, 0)).int()
            inputs |= {"cu_seq_lens_q": cu_seq_lens, "cu_seq_lens_k": cu_seq_lens}
            inputs |= {"max_length_q": 9, "max_length_k": 9}
        return train_step(model, inputs)

    return run


def _run_generation(**options: Any) -> Callable[[transformers.PreTrainedModel, str], Any]:
    def run(model: transformers.PreTrainedModel, kind: str) -> dict[str, Tensor]:
        if kind == "speech":
            inputs = {"input_features": _sound(model)}
        else:
            padding = padding_mask("left padding" if "decoder" in kind else "right padding")
            inputs = {"input_ids": draw_tokens(BATCH, LENGTH), "attention_mask": padding}
            if kind == "decoder of images":
                inputs |= _with_images(model, inputs["input_ids"], padding)
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
        padding = padding_mask("left padding")
        ids = draw_tokens(BATCH, LENGTH)
        fixed = {}
    else:
        padding = torch.ones(BATCH, LENGTH, dtype=torch.long)
        ids = draw_tokens(BATCH, LENGTH)
        encoder = model.get_encoder()
        if kind == "speech":
            fixed = {"encoder_outputs": encoder(_sound(model))}
        else:
            mask = padding_mask("right padding")
            fixed = {"encoder_outputs": encoder(ids, attention_mask=mask), "attention_mask": mask}
    for cache_name in ("dynamic", "static"):
        cache = new_cache(cache_name, model, kind)
        for start, stop in ((0, 5), (5, 12), (12, 13)):
            if kind == "decoder":
                chunk = {"input_ids": ids[:, start:stop], "attention_mask": padding[:, :stop]}
                positions = (padding.cumsum(1) - 1).clamp(min=0)[:, start:stop]
                chunk["position_ids"] = positions
            else:
                chunk = {"decoder_input_ids": ids[:, start:stop]}
            logits = model(**fixed, **chunk, **as_argument(cache, model), use_cache=True).logits
            results[f"{cache_name} {start}:{stop}"] = logits[padding[:, start:stop] == 1]
    return results


def as_argument(cache: Any, model: transformers.PreTrainedModel) -> dict[str, Any]:
    """Under the name that the model gives it: ``past_key_values`` before transformers 5.24."""
    accepted = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in accepted else "past_key_values": cache}


def new_cache(name: str, model: transformers.PreTrainedModel, kind: str) -> Any:
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
