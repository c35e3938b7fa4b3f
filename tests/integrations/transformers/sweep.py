"""Every model class of transformers, as far as a tiny one can be built from its config.

``python -m tests.integrations.transformers.sweep [PART/PARTS]`` compares each with its own eager
attention and writes the outcomes to ``sweep_outcomes.json``; ``python -m
tests.integrations.transformers.compatibility`` counts them in docs/compatibility.md. The outcomes
are

- ``equal``: the same result as eager, and flashlayer's attention was called;
- ``own attention``: the same result as eager, without a call of flashlayer's attention;
- ``refused``: an error that explains why, at the first forward at the latest;
- ``not built``: no tiny model can be built or run with eager attention, so nothing is compared;
- ``different`` and ``error``: faults.
"""

from __future__ import annotations

import inspect
import json
import logging
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from flashlayer.integrations.transformers import NAME, attention, register
from flashlayer.integrations.transformers.masks import GuardedMask
from tests.integrations.transformers.tiny_models import PAD, build, candidates, model_classes

OUTCOMES = Path(__file__).with_name("sweep_outcomes.json")

BATCH, LENGTH, TARGET = 2, 12, 6

# Single precision, two layers; an inverted or missing mask is off by 1e-2 and more.
TOLERANCE = 2e-4

Inputs = dict[str, Any]


def draw_tokens(*shape: int) -> Tensor:
    return torch.randint(3, 90, shape, generator=torch.Generator().manual_seed(1))


def _images(model: transformers.PreTrainedModel) -> Tensor:
    config = model.config
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", 32)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    channels = getattr(vision, "num_channels", 3)
    channels = channels if isinstance(channels, int) else 3
    generator = torch.Generator().manual_seed(2)
    return torch.randn(BATCH, channels, height, width, generator=generator)


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def _patches(model: transformers.PreTrainedModel, name: str) -> Inputs:
    """Two images of different sizes, cut to patches one after the other."""
    config = model.config
    sides = getattr(config, "patch_size", 8) ** 2 * getattr(config, "temporal_patch_size", 1)
    channels = getattr(config, "in_channels", None) or getattr(config, "num_channels", 3)
    grid = torch.tensor([[1, 4, 4], [1, 4, 8]])
    return {name: _noise(16 + 32, channels * sides), "grid_thw": grid}


def _features(model: transformers.PreTrainedModel) -> Iterator[Tensor]:
    config = model.config
    for option in ("num_mel_bins", "feature_size", "input_feat_per_channel", "n_mels", "input_dim"):
        width = getattr(config, option, None)
        if isinstance(width, int):
            yield _noise(BATCH, 24, width)
            frames = 2 * getattr(config, "max_source_positions", 12)
            yield _noise(BATCH, width, frames)


def input_sets(model: transformers.PreTrainedModel) -> Iterator[Inputs]:
    """Inputs to try, those that hide nothing; padding is added by :func:`padded`."""
    parameters = inspect.signature(model.forward).parameters
    target: Inputs = {}
    if "decoder_input_ids" in parameters:
        target["decoder_input_ids"] = draw_tokens(BATCH, TARGET)
    extra: Inputs = {}
    if "bbox" in parameters:
        extra["bbox"] = torch.tensor([1, 2, 30, 40]).expand(BATCH, LENGTH, 4)
    if "input_ids" in parameters:
        ids = {"input_ids": draw_tokens(BATCH, LENGTH)} | extra
        yield ids | target
        if target:
            ends = torch.full((BATCH, 1), getattr(model.config, "eos_token_id", None) or 1)
            yield {"input_ids": torch.cat([ids["input_ids"], ends], 1)}
        if "pixel_values" in parameters:
            yield ids | target | {"pixel_values": _images(model)}
        if "visual_feats" in parameters:
            yield ids | {"visual_feats": _noise(BATCH, 5, 32), "visual_pos": _noise(BATCH, 5, 4)}
        for features in _features(model):
            yield ids | {"input_features": features}
        yield {"input_ids": draw_tokens(BATCH, 2, LENGTH)}  # multiple choice
        # Sequence lengths that are multiples of a block.
        yield {"input_ids": draw_tokens(BATCH, 64)} | target
    if "pixel_values" in parameters:
        yield {"pixel_values": _images(model)} | target
        yield {"pixel_values": _images(model), "decoder_input_ids": draw_tokens(BATCH, TARGET)}
        frames = getattr(model.config, "num_frames", 2)
        if isinstance(frames, int):
            images = _images(model)[:, None].expand(-1, frames, -1, -1, -1)
            yield {"pixel_values": images.contiguous()}
    if "grid_thw" in parameters:
        yield _patches(model, next(iter(parameters)))
    for features in _features(model):
        yield {"input_features": features} | target
    for name in ("input_values", "inputs_embeds", "hidden_states", "features"):
        if name in parameters:
            yield {name: _noise(BATCH, 4000)} | target
            yield {name: _noise(BATCH, 1, 4000)} | target
            yield {name: _noise(BATCH, LENGTH, 32)} | target
    if "past_values" in parameters:
        channels = getattr(model.config, "num_input_channels", 1)
        yield {"past_values": _noise(BATCH, getattr(model.config, "context_length", 32), channels)}
        yield {"past_values": _noise(BATCH, 32), "past_observed_mask": torch.ones(BATCH, 32)}
        yield {"past_values": _noise(BATCH, 512, 1)}


def _row_mask(length: int, side: str, hidden: int) -> Tensor:
    mask = torch.ones(BATCH, length, dtype=torch.long)
    mask[1, -hidden:] = 0
    return mask if side == "right" else mask.flip(1)


def padded(model: transformers.PreTrainedModel, inputs: Inputs, side: str) -> Inputs | None:
    """The inputs with padding in the second row; None where the model knows no padding."""
    parameters = inspect.signature(model.forward).parameters
    masks: Inputs = {}
    if "attention_mask" in parameters:
        for name in ("input_ids", "input_values", "input_features"):
            if name in inputs and "attention_mask" not in masks:
                shape = inputs[name].shape
                length = shape[1] if name == "input_features" else shape[-1]
                mask = _row_mask(length, side, length // 3)
                if name == "input_ids":
                    mask = (
                        mask.expand(shape)
                        if len(shape) == 2
                        else mask[:, None].expand(shape).contiguous()
                    )
                    # Some models look for the last token that is none of padding.
                    masks[name] = inputs[name].masked_fill(mask == 0, PAD)
                masks["attention_mask"] = mask
    if "decoder_input_ids" in inputs and "decoder_attention_mask" in parameters:
        masks["decoder_attention_mask"] = _row_mask(TARGET, side, 2)
    if "pixel_mask" in parameters and "pixel_values" in inputs:
        images = inputs["pixel_values"]
        pixel_mask = torch.ones(BATCH, *images.shape[-2:], dtype=torch.long)
        pixel_mask[1, images.shape[-2] // 2 :] = 0
        masks["pixel_mask"] = pixel_mask
    return inputs | masks if masks else None


def _results(output: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """The floating tensors of a model's output but for caches and attention weights."""
    if isinstance(output, Tensor):
        if output.is_floating_point() and output.numel():
            yield path, output.detach()
    elif isinstance(output, dict):
        for key, value in output.items():
            if key not in ("past_key_values", "loss") and not key.endswith("attentions"):
                yield from _results(value, f"{path}.{key}")
    elif isinstance(output, list | tuple):
        for index, value in enumerate(output):
            yield from _results(value, f"{path}[{index}]")


def run(model: transformers.PreTrainedModel, inputs: Inputs) -> dict[str, Tensor]:
    """The results of a forward; what is random in it is the same in each run."""
    torch.manual_seed(3)
    with torch.no_grad():
        return dict(_results(model(**inputs)))


def _off(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> str:
    """Which result is off, and by how much of the largest value; empty if none."""
    if actual.keys() != expected.keys():
        return f"results {sorted(actual)} instead of {sorted(expected)}"
    for name, reference in expected.items():
        result = actual[name]
        if result.shape != reference.shape:
            return f"{name} has shape {tuple(result.shape)}, not {tuple(reference.shape)}"
        finite = reference.isfinite()
        if not torch.equal(finite, result.isfinite()):
            return f"{name} is not finite where eager is"
        if not finite.any():
            continue
        reference, result = reference[finite], result[finite]
        error = (result - reference).abs().max().item()
        size = max(reference.abs().max().item(), 1e-3)
        if error > TOLERANCE * size:
            return f"{name} off by {error / size:.1e}"
    return ""


@contextmanager
def counted() -> Iterator[list[int]]:
    """How often flashlayer's attention is called meanwhile.

    Of a row without a visible key eager makes the average of all values, and flashlayer zeros, on
    purpose. Here it is the average, so that every row can be compared.
    """
    calls = [0]

    def counting(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        out, weights = attention(*args, **options)
        given = inspect.signature(attention).bind(*args, **options).arguments
        query, value, mask = given["query"], given["value"], given["attention_mask"]
        if isinstance(mask, GuardedMask) and given.get("s_aux") is None:
            hidden = ~mask.dense().any(-1).expand(out.shape[0], 1, -1)[:, 0, :, None, None]
            groups = query.shape[1] // value.shape[1]
            average = value.mean(2).repeat_interleave(groups, 1)[:, None]
            out = torch.where(hidden, average, out)
        return out, weights

    transformers.AttentionInterface.register(NAME, counting)
    try:
        yield calls
    finally:
        transformers.AttentionInterface.register(NAME, attention)


def _enlarge(model: transformers.PreTrainedModel) -> None:
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)


def _reference(name: str) -> tuple[Any, dict, list[tuple[str, Inputs, dict[str, Tensor]]]] | str:
    """A model with eager attention that runs, and its results with and without padding."""
    reasons = []
    for options in candidates(name):
        if "error" in options:
            reasons.append(str(options["error"]))
            continue
        try:
            model = build(name, "eager", options)
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {error}")
            continue
        _enlarge(model)
        for inputs in input_sets(model):
            try:
                expected = run(model, inputs)
            except Exception as error:
                reasons.append(f"{type(error).__name__}: {error}")
                continue
            if not expected or not any(t.isfinite().all() for t in expected.values()):
                reasons.append("no finite result")
                continue
            runs = [("", inputs, expected)]
            for side in ("right", "left"):
                with_padding = padded(model, inputs, side)
                if with_padding is None:
                    continue
                try:
                    runs.append((side, with_padding, run(model, with_padding)))
                except Exception as error:
                    reasons.append(f"{side} padding: {type(error).__name__}: {error}")
            return model, options, runs
    lines = (reason.strip().splitlines()[0][:120] for reason in reasons if reason.strip())
    return " | ".join(dict.fromkeys(lines)) or "the error has no message"


def outcome(name: str) -> str:
    """What becomes of a class of transformers, with a reason where it is not equal."""
    try:
        config_class = getattr(transformers, name).config_class
    except (AttributeError, ImportError) as error:
        return f"not built: {str(error).strip().splitlines()[0]}"
    if config_class is None:
        return "not built: no config class"
    found = _reference(name)
    if isinstance(found, str):
        return f"not built: {found}"
    eager, options, runs = found
    problems: list[str] = []
    with counted() as calls:
        try:
            model = build(name, NAME, options)
        except Exception as error:
            return _refusal(error)
        model.load_state_dict(eager.state_dict())
        for side, inputs, expected in runs:
            where = f"{side} padding: " if side else ""
            try:
                actual = run(model, inputs)
            except Exception as error:
                problems.append(_refusal(error))
                continue
            off = _off(actual, expected)
            if off and _off(run(eager, inputs), expected):
                continue  # eager differs from itself
            if off:
                problems.append(f"different: {where}{off}")
    for kind in ("error", "different", "refused"):
        for problem in problems:
            if problem.startswith(kind):
                return problem
    sides = ", ".join(["no padding", *(f"{side} padding" for side, *_ in runs if side)])
    return f"{'equal' if calls[0] else 'own attention'}: {sides}"


def _refusal(error: Exception) -> str:
    message = str(error).splitlines()[0][:300] if str(error) else ""
    if isinstance(error, ValueError | TypeError) and "flashlayer" in message:
        return f"refused: {message}"
    return f"error: {type(error).__name__}: {message}"


def sweep(names: list[str], report: Callable[[str, str], None]) -> dict[str, str]:
    """The outcomes of these classes, each reported as it is found."""
    register()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            found[name] = outcome(name)
            report(name, found[name])
    return found


def read_outcomes() -> dict[str, str]:
    """The committed outcomes by class."""
    return json.loads(OUTCOMES.read_text())


def main(arguments: list[str]) -> None:
    """Sweep all classes, one part of them, or those named; merge into the committed outcomes."""
    names = model_classes()
    if arguments and re.fullmatch(r"\d+/\d+", arguments[0]):
        part, parts = map(int, arguments[0].split("/"))
        names = names[len(names) * (part - 1) // parts : len(names) * part // parts]
    elif arguments:
        names = arguments
    found = sweep(names, lambda name, result: print(f"{name}: {result}", flush=True))
    known = read_outcomes() if OUTCOMES.exists() else {}
    OUTCOMES.write_text(json.dumps(known | found, indent=1, sort_keys=True) + "\n")
    print(Counter(result.split(":")[0] for result in found.values()))


if __name__ == "__main__":
    main(sys.argv[1:])
