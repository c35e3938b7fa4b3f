"""flash_attn's tests of its functions, against :mod:`flashlayer.integrations.flash_attn`."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from flashlayer.integrations import flash_attn
from flashlayer.integrations.flash_attn import flash_attn_interface
from tests.suites.devices import pretend_gpu
from tests.suites.source import Source
from tests.suites.suite import Suite

LONGEST = 256  # keys or queries of a case on a CPU
REPETITIONS = 2  # on a CPU, of what the suite does 50 or 250 times to see whether it stays the same


def replace() -> None:
    """Install flashlayer under flash_attn's name."""
    pretend_gpu()
    flash_attn.install()
    # Asked for by the suite, and used only in what ``adapt`` replaces.
    flash_attn_interface._get_block_size_n = None  # type: ignore[attr-defined]


def adapt(module: ModuleType) -> None:
    """Our probabilities come with their right scale; a CPU repeats less often."""
    module.normalize_flash_attn_S = _probabilities  # type: ignore[attr-defined]
    if not torch.cuda.is_available():
        module.range = _short_range  # type: ignore[attr-defined]


def _short_range(count: int) -> range:
    return range(count if count < 50 else REPETITIONS)


def _probabilities(probabilities: Tensor, *_: Any, **__: Any) -> Tensor:
    return probabilities


def too_large(parameters: dict[str, Any]) -> bool:
    """Long sequences."""
    lengths = (parameters.get(name, 0) for name in ("seqlen", "seqlen_q", "seqlen_k"))
    return max(lengths) > LONGEST


SUITE = Suite(
    source=Source(
        url="https://files.pythonhosted.org/packages/6c/b1/"
        "b77625e3d11260d2bd6a4fc249a4be9a3da97ff848e2222e810c4f0e0211/flash_attn-2.8.3.post2.tar.gz",
        sha256="d0f9f0b08a986cdeadbffcf5ec8b3a8f514366c68ad1853d3ab061bc83cc340b",
        folder="flash_attn-2.8.3.post2",
    ),
    files=("tests/test_flash_attn.py",),
    replace=replace,
    too_large=too_large,
    adapt=adapt,
)
