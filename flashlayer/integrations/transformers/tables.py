"""Facts found in a model's Python module: tables of attention classes, and support of SDPA.

GPT-Neo, GPT-J, Falcon and others look their attention up with
``GPT_NEO_ATTENTION_CLASSES[config._attn_implementation]``. transformers validates the name when a
model is built but ignores these tables, so our name would end in a bare KeyError. Such a table gets
an entry that raises an explanation.
"""

from __future__ import annotations

import functools
import sys
from typing import Any, NoReturn

import torch
from torch import nn

_searched: set[str] = set()


def refuse_tables(name: str) -> None:
    """Complete the tables of each model that is built with the implementation ``name``.

    transformers calls ``PreTrainedModel.get_correct_attn_implementation`` with the name before a
    model makes its layers. Other names are passed on unchanged.
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
    """Add ``name`` to every table in the model's modules and in transformers' models."""
    modules = {cls.__module__ for cls in model_class.__mro__}
    modules |= {module for module in sys.modules if module.startswith("transformers.models.")}
    for module in modules - _searched:
        _searched.add(module)
        for title, table in list(vars(sys.modules.get(module, sys)).items()):
            if _is_table(table) and name not in table:
                table[name] = functools.partial(_refuse, title, tuple(table))


@torch.compiler.assume_constant_result
def knows_is_causal(module: str) -> bool:
    """Whether ``is_causal`` of an attention from this Python module can be trusted.

    Eager attention ignores it, so it may be wrong in models that don't support SDPA.
    """
    from transformers import PreTrainedModel

    classes = [x for x in vars(sys.modules.get(module, sys)).values() if isinstance(x, type)]
    classes = [cls for cls in classes if cls.__module__ == module]
    models: list[Any] = [cls for cls in classes if issubclass(cls, PreTrainedModel)]
    return not models or any(model._supports_sdpa for model in models)


def _is_table(value: Any) -> bool:
    """Whether this is a dict from implementation names to attention classes."""
    if not isinstance(value, dict) or "eager" not in value:
        return False
    return all(isinstance(entry, type) and issubclass(entry, nn.Module) for entry in value.values())


def _refuse(title: str, known: tuple[str, ...], *arguments: Any, **_: Any) -> NoReturn:
    """Raise when the model instantiates this entry as its attention class."""
    owner = getattr(arguments[0] if arguments else None, "model_type", None) or "model"
    raise ValueError(
        f"{owner}: the model's attention is its own, not flashlayer's (it chooses from {title}, "
        f"which has {', '.join(known)}): use attn_implementation='eager'"
    )
