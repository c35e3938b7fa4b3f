"""The interface of ``flash_attn`` 2.8, computed by flashlayer, on any device and in any dtype.

Names, signatures, layouts ``(B, S, H, D)`` and return values are those of the package, so code that
was written for it runs unchanged after either of::

    sys.modules["flash_attn"] = flashlayer.integrations.flash_attn
    flashlayer.integrations.flash_attn.install()

which come before its imports. Both serve ``flash_attn.flash_attn_interface``,
``flash_attn.bert_padding`` and ``flash_attn.layers.rotary`` as well; no other submodule is there.

What differs: ``softmax_lse`` is differentiable, and -inf where a query sees no key (flash_attn says
+inf); the third value of ``return_attn_probs`` holds exact probabilities; head dimensions, dtypes
and page sizes that its kernels refuse are computed; ``deterministic`` and ``num_splits`` make no
difference, as the backward pass is always deterministic.
"""

import importlib
import sys

from flashlayer.integrations.flash_attn.flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

__version__ = "2.8.3"  # of the interface
__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "install",
]


def install() -> None:
    """Make ``import flash_attn``, and its submodules that are served, mean this package.

    What was imported from an installed flash_attn before stays what it was.
    """
    own_name = "flashlayer.integrations.flash_attn"
    sys.modules["flash_attn"] = importlib.import_module(own_name)
    for submodule in ("flash_attn_interface", "bert_padding", "layers", "layers.rotary"):
        module = importlib.import_module(f"{own_name}.{submodule}")
        sys.modules[f"flash_attn.{submodule}"] = module
