"""Replaces a model's ``nn.MultiheadAttention`` modules by flash attention, in place."""

from __future__ import annotations

import functools
import logging
from types import MethodType
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from flashlayer import backends
from flashlayer.integrations.multihead import FlashMultiheadAttention

logger = logging.getLogger(__name__)

# A module whose forward is another function computes something else and is not swapped.
HOST_FORWARD = nn.MultiheadAttention.forward


def swap_attention(model: nn.Module, *, backend: str = "auto") -> list[str]:
    """Make every ``nn.MultiheadAttention`` in ``model`` a :class:`FlashMultiheadAttention`.

    Each module changes its class and stays the same object, with its parameters (an optimizer built
    before still trains them), buffers, train or eval mode, dtype, device and hooks; shared modules
    stay shared. State dicts stay compatible.

    ``nn.TransformerEncoder`` and ``nn.TransformerEncoderLayer`` have a fused path for inference
    that does not call their attention module. It is disabled for swapped modules, and with it the
    nested tensors that the encoder makes from a ``src_key_padding_mask``: padding positions are
    computed as in training, where the nested path would fill in zeros.

    A subclass of ``nn.MultiheadAttention`` that inherits ``forward`` is swapped and remains an
    instance of its class. Skipped, with the reason in a logged warning, are classes and instances
    with a ``forward`` of their own, because what it computes is unknown, and modules under
    ``torch.nn.utils.parametrize``, which replaces their class. The hooks of Hugging Face accelerate
    put a ``forward`` on each module that calls the original one: the original is swapped and the
    hooks stay.

    Args:
        model: any module; changed in place.
        backend: as in :func:`flashlayer.flash_attention`.

    Returns:
        The names of the swapped modules, as ``model.named_modules()`` gives them.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: there was nothing to swap, ``model`` is itself an ``nn.MultiheadAttention``, or
            there is no such backend.

    Example:
        >>> layer = nn.TransformerEncoderLayer(64, 4, batch_first=True)
        >>> swap_attention(nn.TransformerEncoder(layer, num_layers=2))
        ['layers.0.self_attn', 'layers.1.self_attn']
    """
    backends.check_name(backend)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, nn.MultiheadAttention):
        raise ValueError(
            "model is itself an nn.MultiheadAttention, not a model that holds one: build "
            "flashlayer.FlashMultiheadAttention with the same arguments and load its state_dict"
        )
    swapped, skipped = [], []
    for name, module in model.named_modules():
        if not isinstance(module, nn.MultiheadAttention):
            continue
        if isinstance(module, FlashMultiheadAttention):
            continue
        reason = _why_not(module)
        if reason is not None:
            skipped.append(f"{name} ({reason})")
            continue
        module.__class__ = _flash_class(type(module))
        assert isinstance(module, FlashMultiheadAttention)
        module._become_flash(backend)
        _rebind_forward(module)
        swapped.append(name)
    if not swapped:
        found = f"; left alone: {', '.join(skipped)}" if skipped else ""
        raise ValueError(f"no nn.MultiheadAttention to swap in {type(model).__name__}{found}")
    if skipped:
        logger.warning("not swapped: %s", ", ".join(skipped))
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(
            isinstance(inner, FlashMultiheadAttention) for inner in module.modules()
        ):
            module.use_nested_tensor = False
    return swapped


def _why_not(module: nn.MultiheadAttention) -> str | None:
    """Why changing the class of ``module`` would not work; None if it would."""
    if parametrize.is_parametrized(module):
        return "parametrized: remove that first"
    if type(module).forward is not HOST_FORWARD:
        return f"{type(module).__name__} has a forward of its own"
    if "_call_impl" in vars(module):
        return "its call was replaced on the instance: swap before that, or undo it first"
    own = vars(module).get("forward")
    if own is None or _is_original(own, module):
        return None
    if "_hf_hook" not in vars(module):
        return "its forward was replaced on the instance: swap before that, or undo it first"
    if not _is_original(vars(module).get("_old_forward"), module):
        return "accelerate's hook is around another forward than torch's: remove the hook first"
    return None


def _is_original(function: Any, module: nn.Module) -> bool:
    """Whether ``function`` is the class's ``forward`` bound to ``module``."""
    bound = isinstance(function, MethodType) and function.__self__ is module
    return bound and function.__func__ is HOST_FORWARD


def _rebind_forward(module: FlashMultiheadAttention) -> None:
    """Rebind methods of the former class that accelerate stores on the instance."""
    for name in ("forward", "_old_forward"):
        if _is_original(vars(module).get(name), module):
            setattr(module, name, MethodType(type(module).forward, module))


@functools.cache
def _flash_class(cls: type[nn.MultiheadAttention]) -> type[FlashMultiheadAttention]:
    """``FlashMultiheadAttention``; for a subclass of the host, a class that inherits from both."""
    if cls is nn.MultiheadAttention:
        return FlashMultiheadAttention
    return type(f"Flash{cls.__name__}", (FlashMultiheadAttention, cls), {"__reduce__": _reduce})


def _reduce(module: nn.Module) -> tuple[Any, ...]:
    # Pickle looks classes up by name, and this one is made at run time: pickle its base instead.
    return _new, (type(module).__bases__[1],), module.__dict__


def _new(cls: type[nn.MultiheadAttention]) -> FlashMultiheadAttention:
    flash_class = _flash_class(cls)
    return flash_class.__new__(flash_class)
