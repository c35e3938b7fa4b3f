"""``torch.fx.symbolic_trace``: our modules are leaves, as torch's own are."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.fx import Proxy, Tracer


class Leaf(nn.Module):
    """A module whose call ``torch.fx.symbolic_trace`` records as one node of the graph.

    By default a tracer treats only modules of ``torch.nn`` as leaves. Recording from ``forward``
    would be too late: hooks would be traced into the graph and run again in the leaf.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """:meth:`forward` with its hooks, or the node of the graph being traced."""
        tracer = next((x.tracer for x in (*args, *kwargs.values()) if isinstance(x, Proxy)), None)
        if not isinstance(tracer, Tracer):
            return super().__call__(*args, **kwargs)

        def record(*args: Any, **kwargs: Any) -> Any:
            path = tracer.path_of_module(self)
            return tracer.create_proxy("call_module", path, args, kwargs)

        return tracer.call_module(self, record, args, kwargs)


def check_tensor(name: str, x: object, owner: str) -> None:
    """Raise unless ``x`` is a tensor; a Proxy is one whose ``owner`` is no submodule in a trace."""
    if not isinstance(x, Tensor):
        proxy = f": trace a model that holds the {owner}" if isinstance(x, Proxy) else ""
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}{proxy}")
