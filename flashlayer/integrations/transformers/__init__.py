"""Hugging Face transformers: an attention function and a mask function of our own.

transformers looks up two functions by the name of the attention implementation. The *mask function*
gets what defines a model's mask (causal, a window, padding, packed sequences, the positions of the
queries in the cache) and returns the mask; the *attention function* gets it with query, key and
value. Ours returns a :class:`WindowMask`: to other code a bool tensor ``(B, 1, Sq, Sk)``, to
our attention function a window, a padding row, packed boundaries or the intervals of an
:class:`flashlayer.masks.IntervalMask`, so nothing of size ``Sq x Sk`` is made. Any other pattern
becomes a :class:`DenseMask` with the values that SDPA would get. Both raise if a model interprets
them as something else. The mask function never returns None, so a None that reaches the attention
function comes from the model itself.
"""

from __future__ import annotations

from flashlayer.integrations.transformers.attention_function import attention
from flashlayer.integrations.transformers.mask_function import make_mask
from flashlayer.integrations.transformers.masks import DenseMask, WindowMask
from flashlayer.integrations.transformers.patterns import describe_in_graphs
from flashlayer.integrations.transformers.tables import refuse_tables

__all__ = ["NAME", "DenseMask", "WindowMask", "attention", "make_mask", "register"]

# The capitals matter: transformers treats every name that contains "flash" as flash_attn's.
NAME = "FlashLayer"


def register() -> str:
    """Register flashlayer's attention and mask functions with transformers; returns their name.

    Pass the name as ``attn_implementation`` to ``from_config`` or ``from_pretrained``, or to
    ``model.set_attn_implementation``. Registering twice changes nothing. Models that choose their
    attention from a table of classes (GPT-Neo, GPT-J, Falcon) raise when they are built with this
    name, by a check added to ``PreTrainedModel.get_correct_attn_implementation``.

    Raises:
        ImportError: transformers is not installed.

    Example:
        >>> from transformers import AutoModelForCausalLM
        >>> model = AutoModelForCausalLM.from_config(config, attn_implementation=register())
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ImportError(
            "flashlayer.integrations.transformers needs transformers: "
            "pip install 'flashlayer[hf]' or pip install 'transformers>=5.23'"
        ) from error
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, make_mask)
    refuse_tables(NAME)
    describe_in_graphs()
    return NAME
