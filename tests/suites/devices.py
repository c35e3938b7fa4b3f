"""A suite written for a GPU, run where there is none."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class CudaIsCpu(TorchFunctionMode):
    """Every call of torch that names the device "cuda" gets the CPU."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        kwargs = {name: _on_cpu(value) for name, value in (kwargs or {}).items()}
        return func(*map(_on_cpu, args), **kwargs)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type == "cuda" else value
    return "cpu" if isinstance(value, str) and value.split(":")[0] == "cuda" else value


def pretend_gpu(capability: tuple[int, int] = (9, 0)) -> None:
    """Answer what a suite asks of its GPU while it is imported, if there is none to ask."""
    if not torch.cuda.is_available():
        torch.cuda.get_device_capability = lambda device=None: capability
        properties = SimpleNamespace(total_memory=80 * 2**30)
        torch.cuda.get_device_properties = lambda device=None: properties
