"""Bytes that a process sends to others."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor


class Counted:
    """``sent``: bytes that this rank sends within the block, by patching torch.distributed."""

    def __enter__(self) -> Counted:
        """Patch the functions that ``flashlayer.distributed`` sends with."""
        self.sent = 0
        self.originals = {
            name: getattr(dist, name) for name in ("batch_isend_irecv", "all_to_all_single")
        }

        def point_to_point(operations: list) -> list:
            sends = [op.tensor for op in operations if op.op is dist.isend]
            self.sent += sum(x.numel() * x.element_size() for x in sends)
            return self.originals["batch_isend_irecv"](operations)

        def all_to_all(received: Tensor, sent: Tensor, *sizes: Any, **options: Any) -> Any:
            own = sizes[1][dist.get_rank()]
            self.sent += (sent.numel() - own) * sent.element_size()
            return self.originals["all_to_all_single"](received, sent, *sizes, **options)

        self._patch(batch_isend_irecv=point_to_point, all_to_all_single=all_to_all)
        return self

    def __exit__(self, *_: object) -> None:
        """Put the originals back."""
        self._patch(**self.originals)

    @staticmethod
    def _patch(**functions: Any) -> None:
        for name, function in functions.items():
            setattr(dist, name, function)
