"""A model of ``nn.MultiheadAttention`` layers, turned to flash attention where it stands."""

from __future__ import annotations

import functools
import logging
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from flashlayer.functional import check_backend
from flashlayer.multihead import FlashMultiheadAttention

logger = logging.getLogger(__name__)


def swap_attention(model: nn.Module, *, backend: str = "auto") -> list[str]:
    """Make every ``nn.MultiheadAttention`` in ``model`` a :class:`FlashMultiheadAttention`.

    Each module changes its class and stays the same object: parameters (an optimizer built before
    still trains them), buffers, train or eval, dtype, device, hooks, and every other reference to
    it, so that a shared module is shared still. State dicts stay compatible.

    ``nn.TransformerEncoder`` and ``nn.TransformerEncoderLayer`` have a fused path for inference
    that does not call their attention module. It is switched off for the modules that were swapped,
    and with it the nested tensors that the encoder makes of a ``src_key_padding_mask``: positions
    that are padding come out as the layers compute them, in inference as in training, where the
    nested path would fill in zeros.

    A subclass of ``nn.MultiheadAttention`` that inherits ``forward`` is swapped and remains an
    instance of its class. One with a ``forward`` of its own is left alone, for what it computes is
    not known; so is one under ``torch.nn.utils.parametrize``, whose class is not its own. A
    warning in this module's log names them.

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
    check_backend(backend)
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
        if parametrize.is_parametrized(module):
            skipped.append(f"{name} (parametrized: remove that first)")
        elif type(module).forward is nn.MultiheadAttention.forward:
            module.__class__ = _flash_class(type(module))
            assert isinstance(module, FlashMultiheadAttention)
            module._become_flash(backend)
            swapped.append(name)
        else:
            skipped.append(f"{name} ({type(module).__name__} has a forward of its own)")
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


@functools.cache
def _flash_class(cls: type[nn.MultiheadAttention]) -> type[FlashMultiheadAttention]:
    """``FlashMultiheadAttention``; for a subclass a class that is both."""
    if cls is nn.MultiheadAttention:
        return FlashMultiheadAttention
    return type(f"Flash{cls.__name__}", (FlashMultiheadAttention, cls), {"__reduce__": _reduce})


def _reduce(module: nn.Module) -> tuple[Any, ...]:
    # The class is made here and found under no name: it is pickled as the one it was made of.
    return _new, (type(module).__bases__[1],), module.__dict__


def _new(cls: type[nn.MultiheadAttention]) -> FlashMultiheadAttention:
    flash_class = _flash_class(cls)
    return flash_class.__new__(flash_class)
