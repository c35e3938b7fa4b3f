"""Which tiles a launch takes, and how they are loaded, by the chip, dtype and head dimension."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flashlayer.spec import AttentionExtras, AttentionSpec


def interpreted() -> bool:
    """Whether the kernels were imported under ``TRITON_INTERPRET=1``."""
    from flashlayer.kernels.primitives import INTERPRETED

    return INTERPRETED


def target(device: torch.device) -> str:
    """The column of the tile table."""
    from flashlayer.kernels.tiles import nearest_target

    if interpreted():
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx942"
    # The emulator's and the compile ledger's tensors are on the CPU: of one chip after another.
    look_up = _capability if device.type == "cuda" else torch.cuda.get_device_capability
    return nearest_target(look_up(device))


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def input_precision(q: Tensor) -> str:
    """How fp32 matrices are multiplied: IEEE, unless torch has been told that TF32 will do."""
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32" and torch.version.hip is None
    return "tf32" if allowed and q.dtype == torch.float32 else "ieee"


def precision(q: Tensor) -> str:
    """The part of the tile table."""
    if q.dtype == torch.float64:
        return "fp64"
    if q.dtype == torch.float32:
        return "tf32" if input_precision(q) == "tf32" else "fp32"
    return "half"


def tiles_of(
    kernel: str, q: Tensor, v: Tensor, spec: AttentionSpec, extras: AttentionExtras
) -> Any:
    """The :class:`flashlayer.kernels.tiles.TileConfig` of a launch, tuned or of the table."""
    tuned = TUNED.get(bucket(kernel, q, v, spec, extras)) if TUNED else None
    return table_tiles(kernel, q, v, spec, extras) if tuned is None else tuned


def table_tiles(
    kernel: str, q: Tensor, v: Tensor, spec: AttentionSpec, extras: AttentionExtras
) -> Any:
    """The row of the tile table."""
    from flashlayer.kernels.tiles import tile_config

    widest = max(q.shape[3], v.shape[3])
    kind = _mask_kind(extras)
    if kernel == "forward" and spec.entropy and kind == "none":
        kind = "intervals"  # the entropy's sums take as many registers
    bounded = spec.window_left is not None or spec.window_right is not None
    if kernel == "dkdv" and bounded and kind == "none":
        kind = "edges"
    return _row(tile_config, kernel, target(q.device), precision(q), widest, kind)


@functools.cache
def _row(look_up: Callable[..., Any], *arguments: Any) -> Any:
    """A row by its function, too: others stand in for ``tile_config`` in tests and the stepper."""
    return look_up(*arguments)


def _mask_kind(extras: AttentionExtras) -> str:
    if extras.intervals is not None:
        return "intervals"
    return "none" if extras.attn_mask is None else "dense"


# What flashlayer.tune has measured in this process: the tiles of a bucket of calls.
TUNED: dict[tuple, Any] = {}


def bucket(
    kernel: str, q: Tensor, v: Tensor, spec: AttentionSpec, extras: AttentionExtras
) -> tuple:
    """Calls that share their tuned tiles: alike but for lengths under the same power of two.

    Tiles of a dense mask are in shared memory: of another size those of the bucket may not fit.
    """
    is_cuda = q.device.type == "cuda"
    mask = extras.attn_mask
    return (
        kernel,
        torch.cuda.get_device_name(q.device) if is_cuda else "interpreter",
        precision(q),
        q.shape[3],
        v.shape[3],
        (q.shape[2] - 1).bit_length(),
        (v.shape[2] - 1).bit_length(),
        spec.window_left is not None,
        spec.window_right is not None,
        _mask_kind(extras) if mask is None else f"dense{mask.element_size()}",
        extras.cu_seqlens_q is not None,
    )


def candidate_tiles(kernel: str, q: Tensor) -> list[Any]:
    """Tiles of the plain kernels that may suit a problem."""
    from flashlayer.kernels.tiles import candidates

    described = target(q.device) in ("sm_90", "sm_100")
    every = candidates(kernel, precision(q))
    return [tiles for tiles in every if described or not tiles.descriptors]


def pipeline(
    kernel: str,
    tiles: Any,
    rows: int,
    extras: AttentionExtras,
    streams: dict[str, Tensor],
    allowed: bool = True,
) -> tuple[dict[str, Any], int | None]:
    """Launch options with the descriptors of ``streams`` by name, and ``EDGE_STAGES``.

    Where the compiler omits proxy fences, tiles are streamed through descriptors (TMA, which needs
    none), or one at a time through registers.
    """
    unfenced = lacks_fences(kernel, next(iter(streams.values())))
    if unfenced:
        tiles = replace(tiles, descriptors=True)
    described = {
        name: descriptor(x, tiles, rows, extras) if allowed else None for name, x in streams.items()
    }
    options = tiles.launch_options()
    if unfenced and None in described.values():
        described = dict.fromkeys(described)
        options["num_stages"] = 1
    return described | options, 1 if unfenced else None


def lacks_fences(kernel: str, x: Tensor) -> bool:
    """Whether Triton may omit the ``fence.proxy.async`` between cp.async and wgmma.

    wgmma then reads shared memory through the asynchronous proxy that cp.async has written through
    the generic one (PTX ISA, "Async proxy"), which is a race. Triton before 3.7 does so on sm_90,
    and before 3.9 for the second product of dQ in TF32: found by executing the PTX (``tests/ptx``).
    """
    if target(x.device) != "sm_90":
        return False
    version = triton_version()
    tf32_dq = kernel == "dq" and input_precision(x) == "tf32"
    return version < (3, 7) or (version < (3, 9) and tf32_dq)


def row_sums(q: Tensor) -> int:
    """See ``by_thread`` of the forward kernel. On sm_100 a row is one thread's."""
    in_four = precision(q) == "half" and target(q.device) in ("sm_80", "sm_90", "interpreter")
    return 4 if in_four else 1


def from_tile(q: Tensor, v: Tensor, spec: AttentionSpec, extras: AttentionExtras) -> bool:
    """Whether whole tiles in a loop have a pointer of their own.

    The rows' offsets from it take registers for the whole loop, and save instructions in it: where
    the compile ledger has room for them. In fp32, past a head dimension of 128, with left edges and
    with what else holds registers a block less fits an SM, or the kernel spills.
    """
    holds = (extras.attn_mask, extras.intervals, extras.alibi_slopes, extras.dropout_seed)
    plain = spec.window_left is None and all(x is None for x in holds)
    return plain and precision(q) == "half" and max(q.shape[3], v.shape[3]) <= 128


def row_copies(tiles: Any) -> int:
    """See ``load_rows`` of the backward kernels: more than 1 with Triton before 3.7 only."""
    if interpreted() or triton_version() >= (3, 7):
        return 1
    return max(1, 32 * tiles.num_warps // tiles.BLOCK_M)


def heads_together(
    tiles: Any, spec: AttentionSpec, heads: int, longest: int | None, *streamed: Tensor
) -> int | None:
    """How many heads' programs start in the order of their work; None: head by head.

    As many as half of the L2 cache has room for: programs that read the same tiles at different
    times find them there.

    Args:
        tiles: the launch's.
        spec: without a right side of the window all programs have the same work.
        heads: heads of the programs; those of ``streamed`` are fewer or more.
        longest: rows of the longest packed sequence.
        streamed: what programs read tile by tile.
    """
    if not tiles.heaviest_first or spec.window_right is None:
        return None
    x = streamed[0]
    rows = x.shape[2] if longest is None else longest
    row_bytes = sum(x.shape[3] * x.element_size() for x in streamed)
    every = max(x.shape[1] * rows * row_bytes, 1)
    return max(_l2_bytes(x.device) // 2 * heads // every, 1)


def _l2_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    return 1 << 18  # so small that tests have more heads than it holds


@functools.cache
def triton_version() -> tuple[int, int]:
    """The major and minor version of Triton."""
    import triton

    major, minor, *_ = triton.__version__.split(".")
    return int(major), int(minor)


def descriptor(x: Tensor, tiles: Any, rows: int, extras: AttentionExtras) -> Any:
    """A tensor descriptor that loads ``rows`` whole rows of a head (TMA); None where it can't.

    It needs ``tiles.descriptors``, sm_90 or later, half precision, and a head dimension of one
    column tile whose rows are aligned to 16 bytes. Keys that a mask hides may hold NaN, which a
    descriptor would load: none with a mask.
    """
    if not tiles.descriptors:
        return None
    from triton.tools.tensor_descriptor import TensorDescriptor

    from flashlayer.kernels.tiles import head_tiles

    widths: Any = head_tiles(x.shape[3])  # typed as what it is in a kernel
    if (
        target(x.device) not in ("sm_90", "sm_100", "interpreter")
        or x.element_size() > 2
        or len(widths) != 1
        or widths[0] > 256  # the widest box that TMA copies
        or extras.attn_mask is not None
        or not has_tma_strides(x)
    ):
        return None
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, widths[0]])


def has_tma_strides(x: Tensor) -> bool:
    """Whether TMA can read a tensor that is not empty: whole rows, aligned to 16 bytes."""
    return (
        x.numel() > 0
        and x.stride(3) == 1
        and x.data_ptr() % 16 == 0
        and all(stride > 0 and stride * x.element_size() % 16 == 0 for stride in x.stride()[:3])
    )
