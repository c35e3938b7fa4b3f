"""What the kernels take from Gluon (``triton.experimental.gluon``), whose names change.

Every such name is imported here and nowhere else, so that a new Triton is looked up in one file.
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

__all__ = [
    "TensorDescriptor",
    "fence_async_shared",
    "gl",
    "gluon",
    "mbarrier",
    "tma_load",
    "warpgroup_mma",
    "warpgroup_mma_wait",
]

VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
# Renamed in 3.8; the old name has been an error since 3.9.
tma_load = tma.async_copy_global_to_shared if VERSION < (3, 8) else tma.async_load
