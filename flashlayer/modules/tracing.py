"""``torch.fx.symbolic_trace``: our modules are leaves, as torch's own are."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import Proxy, Tracer


def leaf_call(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any | None:
    """Record the call of ``module`` as one node of the graph being traced; None if none is.

    By default a tracer treats only modules of ``torch.nn`` as leaves. Recording from ``forward``
    would be too late: hooks would be traced into the graph and run again in the leaf.
    """
    tracer = next((x.tracer for x in (*args, *kwargs.values()) if isinstance(x, Proxy)), None)
    if not isinstance(tracer, Tracer):
        return None

    def record(*args: Any, **kwargs: Any) -> Any:
        path = tracer.path_of_module(module)
        return tracer.create_proxy("call_module", path, args, kwargs)

    return tracer.call_module(module, record, args, kwargs)
