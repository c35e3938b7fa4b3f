"""What only a model's Python module tells: tables of classes, and whether it can have SDPA.

GPT-Neo, GPT-J, Falcon and others look their attention up with
``GPT_NEO_ATTENTION_CLASSES[config._attn_implementation]``. transformers checks the name of an
implementation when a model is built and does not look at these tables, so a name that it knows and
a table does not ends in a bare KeyError. Such a table gets an entry that raises a sentence.
"""

from __future__ import annotations

import functools
import sys
from typing import Any, NoReturn

import torch
from torch import nn

_searched: set[str] = set()


def refuse_tables(name: str) -> None:
    """Have each model that is built with the implementation ``name`` complete its tables first.

    transformers asks ``PreTrainedModel.get_correct_attn_implementation`` about the name before a
    model makes its layers. Other names are none of our business.
    """
    from transformers import PreTrainedModel

    original = PreTrainedModel.get_correct_attn_implementation
    if getattr(original, "completes_tables", False):
        return

    @functools.wraps(original)
    def checked(
        model: Any, requested_attention: str | None, *arguments: Any, **options: Any
    ) -> str:
        if requested_attention == name:
            _complete_tables(type(model), name)
        return original(model, requested_attention, *arguments, **options)

    checked.completes_tables = True  # pyright: ignore[reportAttributeAccessIssue]
    setattr(PreTrainedModel, original.__name__, checked)


def _complete_tables(model_class: type, name: str) -> None:
    """Give ``name`` an entry in every table of the model's modules and of transformers' models."""
    modules = {cls.__module__ for cls in model_class.__mro__}
    modules |= {module for module in sys.modules if module.startswith("transformers.models.")}
    for module in modules - _searched:
        _searched.add(module)
        for title, table in list(vars(sys.modules.get(module, sys)).items()):
            if _is_table(table) and name not in table:
                table[name] = functools.partial(_refuse, title, tuple(table))


@torch.compiler.assume_constant_result
def knows_is_causal(module: str) -> bool:
    """Whether ``is_causal`` of an attention from this Python module means something.

    Eager attention takes no notice of it, so it may be wrong in models that can't have SDPA.
    """
    from transformers import PreTrainedModel

    models = [
        value
        for value in vars(sys.modules.get(module, sys)).values()
        if isinstance(value, type) and issubclass(value, PreTrainedModel)
    ]
    models = [model for model in models if model.__module__ == module]
    return not models or any(model._supports_sdpa for model in models)


def _is_table(value: Any) -> bool:
    """Whether this is a dict from names of implementations to classes of attention."""
    return (
        isinstance(value, dict)
        and "eager" in value
        and all(
            isinstance(entry, type) and issubclass(entry, nn.Module) for entry in value.values()
        )
    )


def _refuse(title: str, known: tuple[str, ...], *arguments: Any, **_: Any) -> NoReturn:
    """Stand in for a class of attention, and raise when the model makes it."""
    owner = getattr(arguments[0] if arguments else None, "model_type", None) or "model"
    raise ValueError(
        f"{owner}: the model's attention is its own, not flashlayer's (it chooses from {title}, "
        f"which has {', '.join(known)}): use attn_implementation='eager'"
    )
