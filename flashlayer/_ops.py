"""The namespace of the custom ops: the name under which this package is loaded.

A namespace holds an op of a name once, so a copy of the package that is loaded under another name
beside this one (docs/hub.md) must register its ops in its own.
"""

import torch

_NAMESPACE = __name__.partition(".")[0]

ops = getattr(torch.ops, _NAMESPACE)


def add_op_namespace_prefix(op_name: str) -> str:
    """``op_name`` as :func:`torch.library.custom_op` takes it."""
    return f"{_NAMESPACE}::{op_name}"
