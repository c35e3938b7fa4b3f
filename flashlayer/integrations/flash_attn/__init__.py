"""The interface of ``flash_attn`` 2.8, computed by flashlayer, on any device and in any dtype.

Names, signatures, layouts ``(B, S, H, D)`` and return values are those of the package, so code
written for it runs unchanged after either of these, placed before its imports::

    sys.modules["flash_attn"] = flashlayer.integrations.flash_attn
    flashlayer.integrations.flash_attn.install()

Both also provide ``flash_attn.flash_attn_interface``, ``flash_attn.bert_padding`` and
``flash_attn.layers.rotary``; no other submodule exists.

Differences: ``softmax_lse`` is differentiable, and -inf for a query without a visible key
(flash_attn has +inf); the third value of ``return_attn_probs`` holds exact probabilities; head
dimensions, dtypes and page sizes that its kernels refuse are computed; ``deterministic`` and
``num_splits`` are ignored, as the backward pass is always deterministic.
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
    """Make ``import flash_attn``, and the submodules that exist here, import this package.

    Names that were imported from an installed flash_attn before are not replaced.
    """
    sys.modules["flash_attn"] = sys.modules[__name__]
    for submodule in ("flash_attn_interface", "bert_padding", "layers", "layers.rotary"):
        module = importlib.import_module(f"{__name__}.{submodule}")
        sys.modules[f"flash_attn.{submodule}"] = module
