"""Operations that go on after their instruction: cp.async, wgmma, TMA, and the barriers they meet.

PTX ISA 9.7.9.25 (asynchronous copies and their completion), 9.7.15 (wgmma groups), 5.5 (tensors)
and 9.7.9.27 (tensor copies), 9.7.13.15 (mbarrier).

Each operation is *started* when issued, which marks the shared memory that it uses; *performed*
at once (early) or at the end (late); and *completed* by the wait for its group, which settles the
marks. TMA has no groups: late, it is performed when nothing else can run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from tests.ptx.formats import UNSIGNED, Array, EmulatorError, Mask, f4, u8, width_of
from tests.ptx.matrices import (
    chunk_addresses,
    fragment_maps,
    operand,
    spread,
    swizzled,
    tile_of_chunks,
    unspread,
)


class Operation(Protocol):
    """What a :class:`Groups` holds."""

    mask: Array

    def part(self, mask: Array) -> Operation:
        """The same operation of fewer threads."""
        ...

    def start(self) -> None:
        """Mark what is read or written from now on."""

    def perform(self) -> None:
        """Read and write."""

    def complete(self) -> None:
        """Perform if that has not happened, and settle the marks."""


class Groups:
    """The groups of one warp's operations of one kind. Each thread commits and waits for itself."""

    def __init__(self) -> None:
        self.open: list[Operation] = []  # not committed
        self._groups: list[
            tuple[Array, list[Operation]]
        ] = []  # oldest first: (threads, operations)

    def commit(self, m: Mask) -> None:
        """``commit_group``: what these threads have issued becomes their next group."""
        everyone = np.asarray(True) if m is None else m
        mine = (op.part(op.mask & everyone) for op in self.open)
        others = (op.part(op.mask & ~everyone) for op in self.open)
        self._groups.append((everyone, [op for op in mine if op.mask.any()]))
        self.open = [op for op in others if op.mask.any()]

    def wait(self, left: int, m: Mask) -> None:
        """``wait_group left``: complete all but each thread's last ``left`` groups."""
        everyone = np.asarray(True) if m is None else m
        later: Array = np.zeros(1, int)
        kept, done = [], []
        for threads, operations in reversed(self._groups):
            ready = threads & everyone & (later >= left)
            later = later + threads
            done.append((ready, operations))
            still = threads & ~ready
            if np.any(still):
                rest = (op.part(op.mask & ~ready) for op in operations)
                kept.append((still, [op for op in rest if op.mask.any()]))
        self._groups = kept[::-1]
        for ready, operations in reversed(done):
            for op in operations:
                part = op.part(op.mask & ready)
                if part.mask.any():
                    part.complete()


@dataclass
class Copy:
    """``cp.async``: per thread, ``size`` bytes of global memory to shared memory.

    Attributes:
        x: the warp.
        mask: ``(CTAs, 32)``, the threads that copy.
        to: shared addresses.
        of: global addresses.
        size: bytes written, 4, 8 or 16.
        length: bytes read, per thread; the rest is written as zeros.
        performed: whether memory was read and written.
    """

    x: Any
    mask: Array
    to: Array
    of: Array
    size: int
    length: Array
    performed: bool = False

    def part(self, mask: Array) -> Copy:
        return Copy(self.x, mask, self.to, self.of, self.size, self.length, self.performed)

    def start(self) -> None:
        self.x.machine.shared.begin_copy(self.x, self.mask, self.to[self.mask], self.size)

    def perform(self) -> None:
        m, word = self.mask, min(self.size, 4)
        dtype, count = UNSIGNED[word], self.size // word
        reads = m & (self.length > 0)
        values = np.zeros((count, *m.shape), dtype)
        if reads.any():
            loaded = self.x.machine.memory.load(self.x, reads, self.of[reads], dtype, count)
            for k in range(count):
                values[k][reads] = np.where(self.length[reads] > k * word, loaded[k], 0)
        self.x.machine.shared.finish_copy(self.x, m, self.to[m], [v[m] for v in values])
        self.performed = True

    def complete(self) -> None:
        if not self.performed:
            self.perform()
        self.x.machine.shared.end_copy(self.x, self.mask, self.to[self.mask], self.size)


@dataclass(frozen=True)
class ProductOperands:
    """``wgmma.mma_async``: register slots and immediates.

    Attributes:
        d: the accumulator's registers.
        a: registers, or the slot of a matrix descriptor.
        b: slot of a matrix descriptor.
        keeps: slot of ``scale-d``: whether D is added.
        columns: n.
        depth: k.
        kind: of A and B.
        signs: ``imm-scale-a`` and ``imm-scale-b``, 1 or -1.
        a_transposed: whether A lies with its rows contiguous.
        b_transposed: whether B lies with its columns' elements of one k contiguous.
    """

    d: list[int]
    a: int | list[int]
    b: int
    keeps: int
    columns: int
    depth: int
    kind: str
    signs: tuple[int, int]
    a_transposed: bool
    b_transposed: bool


class Product:
    """One warp's 16 of the 64 rows of a ``wgmma.mma_async``."""

    def __init__(
        self, x: Any, mask: Array, what: ProductOperands, chunks: Any = (), performed: bool = False
    ) -> None:
        self.x, self.mask, self.what, self.chunks = x, mask, what, chunks
        self.performed = performed

    def part(self, mask: Array) -> Product:
        if mask is self.mask or (mask == self.mask).all():
            return self
        some, mine = self.x.whole_warps(mask), self.x.whole_warps(self.mask)
        chunks = tuple(c if c is None else c[some[mine]] for c in self.chunks)
        return Product(self.x, mask, self.what, chunks, self.performed)

    def start(self) -> None:
        x, what, rows = self.x, self.what, self.x.whole_warps(self.mask)
        size = 16 * 2 // what.depth  # bytes of an element: k is 32 bytes
        first = 16 * (x.warp % 4)
        a = None
        if isinstance(what.a, int):
            of_a = x.wide(what.a).view(u8)[rows, 0]
            a = chunk_addresses(of_a, first, 16, what.depth, size, transposed=what.a_transposed)
        of_b = x.wide(what.b).view(u8)[rows, 0]
        b = chunk_addresses(of_b, 0, what.columns, what.depth, size, transposed=what.b_transposed)
        self.chunks = (a, b)
        for addresses in self.chunks:
            if addresses is not None:
                x.machine.shared.begin_read(x, rows, addresses)

    def perform(self) -> None:
        x, what, rows = self.x, self.what, self.x.whole_warps(self.mask)
        memory, (a, b) = x.machine.shared, self.chunks
        if isinstance(what.a, list):
            left = operand(x, what.a, what.kind, fragment_maps(16, what.depth, what.kind).a)[rows]
        else:
            data = memory.read_chunks(rows, a)
            left = tile_of_chunks(data, what.kind, 16, what.depth, transposed=what.a_transposed)
        data = memory.read_chunks(rows, b)
        right = tile_of_chunks(
            data, what.kind, what.columns, what.depth, transposed=what.b_transposed
        )
        product = (left * f4(what.signs[0])) @ (right * f4(what.signs[1])).swapaxes(1, 2)
        keep = x.wide(what.keeps)[rows, 0]
        if keep.any():
            before = unspread(x, what.d, what.columns)[rows]
            product = product + np.where(keep[:, None, None], before, f4(0))
        whole = np.zeros((x.ctas, 16, what.columns), f4)
        whole[rows] = product
        spread(x, x.full(self.mask), what.d, whole, 16)
        self.performed = True

    def complete(self) -> None:
        if not self.performed:
            self.perform()
        rows = self.x.whole_warps(self.mask)
        for addresses in self.chunks:
            if addresses is not None:
                self.x.machine.shared.end_read(self.x, rows, addresses)


@dataclass
class TensorMap:
    """A tensor map of ``cuTensorMapEncodeTiled``; dimensions from the innermost on.

    Attributes:
        address: of element (0, 0, ...).
        dtype: unsigned, of an element's size.
        shape: elements.
        strides: bytes.
        box: elements that one copy takes.
        swizzle: 0 none; 1, 2, 3: 32, 64, 128 bytes.

    Raises:
        EmulatorError: Where ``cuTensorMapEncodeTiled`` would refuse.
    """

    address: int
    dtype: Any
    shape: list[int]
    strides: list[int]
    box: list[int]
    swizzle: int

    def __post_init__(self) -> None:
        size = width_of(self.dtype)
        row, width = self.box[0] * size, {0: 0, 1: 32, 2: 64, 3: 128}[self.swizzle]
        if not 1 <= len(self.shape) <= 5 or not all(0 < n <= 1 << 32 for n in self.shape):
            raise EmulatorError(f"a tensor map of shape {list(self.shape)}")
        if self.address % 16 or any(s % 16 or not 0 <= s < 1 << 40 for s in self.strides[1:]):
            raise EmulatorError("a tensor map whose address or strides are not multiples of 16")
        if self.strides[0] != size:
            raise EmulatorError("a tensor map whose innermost dimension is not contiguous")
        if not all(0 < n <= 256 for n in self.box) or row % 16:
            raise EmulatorError(f"a tensor map with a box of {list(self.box)}")
        if width and row > width:
            raise EmulatorError(f"a box with rows of {row} bytes, swizzled in {width}")


@dataclass
class Transfer:
    """One tensor copy of one CTA, to shared memory; elements outside of the tensor are zeros.

    Attributes:
        machine: that runs it.
        cta: whose shared memory is written.
        source: the tensor map.
        to: shared address.
        corner: coordinates of the box's first element, innermost first.
        mbarrier: address of the barrier whose transaction count falls by the box's bytes.
    """

    machine: Any
    cta: int
    source: TensorMap
    to: int
    corner: list[int]
    mbarrier: int

    def __post_init__(self) -> None:
        if len(self.corner) != len(self.source.box):
            raise EmulatorError(f"{len(self.corner)} coordinates for a box of {self.source.box}")
        if self.to % (128 if self.source.swizzle else 16):
            raise EmulatorError(f"a tensor copy to shared address {self.to:#x}, not aligned")
        self.bytes = int(np.prod(self.source.box)) * width_of(self.source.dtype)
        addresses = self.to + np.arange(0, self.bytes, 16)
        self.chunks = swizzled(addresses, 16 << self.source.swizzle)

    def start(self, x: Any) -> None:
        if self.machine.barrier_fences:
            self.machine.shared.check_mbarrier(x, self.cta, self.mbarrier)
        self.machine.shared.begin_transfer(x, self.cta, self.chunks)
        if self.machine.late:
            self.machine.transfers.append(self)
        else:
            self.complete()

    def complete(self) -> None:
        source = self.source
        ranges = [np.arange(n) + c for n, c in zip(source.box, self.corner, strict=True)]
        indices = np.meshgrid(*ranges[::-1], indexing="ij")[::-1]
        address: Array = np.full(indices[0].shape, source.address, np.int64)
        inside = np.ones(indices[0].shape, np.bool_)
        for index, stride, length in zip(indices, source.strides, source.shape, strict=True):
            address += index * stride
            inside &= (index >= 0) & (index < length)
        values = np.zeros(inside.shape, source.dtype)
        if inside.any():
            memory = self.machine.memory
            values[inside] = memory.load(None, None, address[inside], source.dtype, 1)[0]
        self.machine.shared.end_transfer(self.cta, self.chunks, values)
        self.machine.mbarriers.complete_transaction(self.cta, self.mbarrier, self.bytes)


@dataclass
class MBarrier:
    """One mbarrier object: a phase ends when no arrival and no byte is pending.

    Attributes:
        count: arrivals of a phase.
        pending: arrivals that this phase still lacks.
        bytes: transaction count, what copies have yet to write.
        phase: how many phases are complete.
        clock: what those that arrived in this phase know, see :mod:`tests.ptx.shadow`.
        released: what a thread that waits for the last complete phase learns.
    """

    count: int
    pending: int
    bytes: int = 0
    phase: int = 0
    clock: Any = 0
    released: Any = 0


class MBarriers:
    """The mbarriers of the CTAs that run at once."""

    def __init__(self, shadow: Any, first: int) -> None:
        self._shadow, self._first = shadow, first
        self._objects: dict[tuple[int, int], MBarrier] = {}  # (CTA, address)
        self.changes = 0  # counts instructions, so that waiting threads look again only after one

    def execute(self, what: str, x: Any, cta: int, address: int, count: int) -> None:
        """One thread's ``init``, ``inval``, ``arrive``, ``expect_tx`` or ``arrive.expect_tx``.

        Raises:
            EmulatorError: Without an object there, or with more arrivals than it counts.
        """
        self.changes += 1
        if what == "init":
            if count < 1:
                raise EmulatorError(f"CTA {self._first + cta}: mbarrier.init with a count of 0")
            self._objects[cta, address] = MBarrier(count, count)
            return
        barrier = self._at(cta, address)
        if what == "inval":
            del self._objects[cta, address]
            return
        if "expect_tx" in what:
            barrier.bytes += count
        if "arrive" in what:
            barrier.pending -= 1 if "expect_tx" in what else count
            barrier.clock = np.maximum(barrier.clock, self._shadow.release(cta, x.warp))
        if barrier.pending < 0:
            raise EmulatorError(
                f"CTA {self._first + cta}: more arrivals than the mbarrier {address:#x} counts"
            )
        self._finish_phase(barrier)

    def complete_transaction(self, cta: int, address: int, nbytes: int) -> None:
        """A tensor copy has written its bytes; those who wait learn of them and nothing else."""
        self.changes += 1
        barrier = self._at(cta, address)
        barrier.bytes -= nbytes
        barrier.clock = np.maximum(barrier.clock, self._shadow.release_transfer(cta))
        self._finish_phase(barrier)

    def passed(self, cta: int, warp: int, address: int, parity: int) -> bool:
        """Whether a wait for ``parity`` goes on; if so, the warp learns what the barrier knows."""
        barrier = self._at(cta, address)
        if (barrier.phase & 1) == parity:
            return False
        self._shadow.acquire(cta, warp, barrier.released)
        return True

    def _at(self, cta: int, address: int) -> MBarrier:
        barrier = self._objects.get((cta, address))
        if barrier is None:
            raise EmulatorError(
                f"CTA {self._first + cta}: no mbarrier was initialised at {address:#x}"
            )
        return barrier

    @staticmethod
    def _finish_phase(barrier: MBarrier) -> None:
        if barrier.pending == 0 and barrier.bytes == 0:
            barrier.phase += 1
            barrier.pending, barrier.released = barrier.count, barrier.clock
