"""Global and shared memory: PTX ISA 5.1 (State spaces).

Global memory is the tensors' own. An access to a byte that belongs to no element of the launch's
tensors, or that is not aligned (9.7.9.8), is an error with its thread and address.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.ptx.formats import (
    LANES,
    SHARED_BASE,
    UNSIGNED,
    Array,
    EmulatorError,
    Mask,
    i8,
    u1,
    u2,
    width_of,
)
from tests.ptx.shadow import IN_FLIGHT, Shadow


@dataclass
class _Region:
    """The bytes of one storage, and which of them belong to an element of a tensor."""

    base: int
    data: Array
    valid: Array

    @property
    def end(self) -> int:
        return self.base + len(self.data)


class Memory:
    """The global memory that one launch may touch."""

    def __init__(self) -> None:
        self._regions: list[_Region] = []  # by address

    def add(self, base: int, nbytes: int, valid: Array | bool = True) -> None:
        """Let the launch touch bytes.

        Args:
            base: address of the first one.
            nbytes: how many there are.
            valid: bool for each byte; the others lie between the elements of a tensor.

        Raises:
            EmulatorError: If they overlap with another region and are not the same.
        """
        for region in self._regions:
            if (region.base, len(region.data)) == (base, nbytes):
                region.valid |= valid
                return
            if base < region.end and region.base < base + nbytes:
                raise EmulatorError("two tensors of a launch overlap without sharing a storage")
        data = np.frombuffer((ctypes.c_uint8 * nbytes).from_address(base), u1)
        usable = np.zeros(nbytes, np.bool_)
        usable |= valid
        self._regions.append(_Region(base, data, usable))
        self._regions.sort(key=lambda region: region.base)

    def load(self, x: Any, m: Mask, address: Array, dtype: Any, count: int) -> list[Array]:
        """``count`` elements from each address on, flat; ``x`` is None for a tensor copy."""
        out = [np.empty(address.shape, dtype) for _ in range(count)]
        for which, view, index in self._pieces(x, m, address, dtype, count):
            for k in range(count):
                out[k][which] = view[index + k]
        return out

    def store(self, x: Any, m: Mask, address: Array, values: list[Array]) -> None:
        """The inverse of :meth:`load`."""
        for which, view, index in self._pieces(x, m, address, values[0].dtype, len(values)):
            for k, value in enumerate(values):
                view[index + k] = value[which]

    def _pieces(
        self, x: Any, m: Mask, address: Array, dtype: Any, count: int
    ) -> Iterator[tuple[Any, Array, Array]]:
        """(which accesses, a region's elements, index of the first one) for each region touched."""
        size = width_of(dtype)
        misaligned = address % (size * count) != 0
        if misaligned.any():
            self._fail(x, m, address, misaligned, "is not aligned")
        bases = np.array([region.base for region in self._regions], i8)
        number = np.searchsorted(bases, address, "right") - 1
        only = number[0] if (number == number[0]).all() else None
        for n in np.unique(number) if only is None else (only,):
            which = slice(None) if only is not None else number == n
            if n < 0:
                self._fail(x, m, address, number == n, "is in no tensor of the launch")
            region, mine = self._regions[n], address[which]
            if (mine + size * count > region.end).any():
                beyond = (number == n) & (address + size * count > region.end)
                self._fail(x, m, address, beyond, "is in no tensor of the launch")
            skew = -region.base % size
            usable = slice(skew, skew + (len(region.data) - skew) // size * size)
            index = (mine - region.base - skew) // size
            valid = region.valid[usable].view(UNSIGNED[size])
            whole = int.from_bytes(b"\1" * size, "little")
            for k in range(count):
                hole = valid[index + k] != whole
                if hole.any():
                    self._fail(x, m, mine, hole, "is between the elements of a tensor")
            yield which, region.data[usable].view(dtype), index

    @staticmethod
    def _fail(x: Any, m: Mask, address: Array, bad: Array, why: str) -> None:
        n = int(np.argmax(bad))
        where = ""
        if x is not None and len(address) == (x.ctas * LANES if m is None else m.sum()):
            cta, lane = np.argwhere(x.mask(m))[n]
            where = f"CTA {x.machine.first + cta}, thread {x.warp * LANES + lane}: "
        raise EmulatorError(f"{where}address {address[n]:#x} {why}")


class Shared:
    """The shared memory of the CTAs that run at once; every access passes through the shadow."""

    def __init__(self, ctas: int, size: int, shadow: Shadow) -> None:
        self.size, self.shadow = size, shadow
        self._data = np.full(ctas * size, 0xFF, u1)  # NaN in every format
        self._lines = self._data.reshape(-1, 16)
        self._bases = np.arange(ctas, dtype=i8)[:, None] * size
        self._thread_bases = np.repeat(self._bases, LANES, 1)

    # Threads.

    def load(
        self,
        x: Any,
        m: Mask,
        address: Array,
        dtype: Any,
        count: int,
        unread: Sequence[int] = (),
    ) -> list[Array]:
        """``count`` consecutive elements from each active thread's address.

        Those that are ``unread`` go to registers that no instruction reads and are no access: LLVM
        widens loads over the padding of structs, which nobody writes.
        """
        size = width_of(dtype)
        flat = self._flat(m, address, size * count)
        if not unread:
            self.shadow.check_read(x, flat, size * count)
        for k in set(range(count)) - set(unread) if unread else ():
            self.shadow.check_read(x, flat + k * size, size)
        view, index = self._data.view(dtype), flat // size
        return [view[index + k] for k in range(count)]

    def store(self, x: Any, m: Mask, address: Array, values: list[Array]) -> None:
        """The inverse of :meth:`load`."""
        dtype = values[0].dtype
        nbytes = dtype.itemsize * len(values)
        flat = self._flat(m, address, nbytes)
        view, index = self._data.view(dtype), flat // dtype.itemsize
        changes = np.zeros(flat.shape, np.bool_)
        if self.shadow.on:
            for k, value in enumerate(values):
                changes |= view[index + k] != value
        self.shadow.check_write(x, flat, nbytes, changes)
        for k, value in enumerate(values):
            view[index + k] = value

    # Rows of 16 bytes: ldmatrix and stmatrix; ``rows`` are the CTAs that take part.

    def load_rows(self, x: Any, rows: Array, address: Array) -> Array:
        """``(CTAs, n, 8)`` elements of 16 bits from ``(CTAs, n)`` addresses."""
        flat = self._rows_flat(rows, address)
        self.shadow.check_read(x, flat, 16)
        return self._lines[flat // 16].view(u2)

    def store_rows(self, x: Any, rows: Array, address: Array, values: Array) -> None:
        """The inverse of :meth:`load_rows`."""
        flat = self._rows_flat(rows, address)
        new = np.ascontiguousarray(values).view(u1)
        self.shadow.check_write(x, flat, 16, (self._lines[flat // 16] != new).any(-1))
        self._lines[flat // 16] = new

    # cp.async.

    def begin_copy(self, x: Any, m: Array, address: Array, nbytes: int) -> None:
        """Bytes that must not be touched until the copy is complete."""
        self.shadow.check_write(x, self._flat(m, address, nbytes), nbytes, until=IN_FLIGHT)

    def finish_copy(self, x: Any, m: Array, address: Array, values: list[Array]) -> None:
        """Write what was copied."""
        dtype = values[0].dtype
        index = self._flat(m, address, dtype.itemsize * len(values)) // dtype.itemsize
        for k, value in enumerate(values):
            self._data.view(dtype)[index + k] = value

    def end_copy(self, x: Any, m: Array, address: Array, nbytes: int) -> None:
        """From now on the warp knows of the copy."""
        self.shadow.settle_write(x, self._flat(m, address, nbytes), nbytes)

    # wgmma's operands.

    def begin_read(self, x: Any, rows: Array, address: Array) -> None:
        """Chunks that must not be written until the product is complete."""
        flat = self._rows_flat(rows, address)
        self.shadow.check_read(x, flat, 16, until=IN_FLIGHT)
        self.shadow.check_fence(x, flat, 16, "multiplies what was written")

    def read_chunks(self, rows: Array, address: Array) -> Array:
        """``(CTAs, n, 16)`` bytes."""
        return self._lines[self._rows_flat(rows, address) // 16]

    def end_read(self, x: Any, rows: Array, address: Array) -> None:
        """The product has read its chunks."""
        self.shadow.settle_read(x, self._rows_flat(rows, address), 16)

    # TMA.

    def init_mbarrier(self, x: Any, cta: int, address: int) -> None:
        """A write by the warp, which tensor copies must not find missing (8.2.2)."""
        self.shadow.check_write(x, self._bases[cta] + address - SHARED_BASE, 8)

    def check_mbarrier(self, x: Any, cta: int, address: int) -> None:
        """A tensor copy finds it initialised."""
        flat = self._bases[cta] + address - SHARED_BASE
        self.shadow.check_fence(x, flat, 8, "completes an mbarrier that was initialised")

    def begin_transfer(self, x: Any, cta: int, chunks: Array) -> None:
        """Chunks that must not be touched until the mbarrier's phase is complete."""
        flat = chunks - SHARED_BASE + self._bases[cta]
        if chunks.min() < SHARED_BASE or chunks.max() + 16 > SHARED_BASE + self.size:
            raise EmulatorError("a tensor copy writes outside of the CTA's shared memory")
        self.shadow.check_write(x, flat, 16, until=IN_FLIGHT, writer=self.shadow.warps)

    def end_transfer(self, cta: int, chunks: Array, values: Array) -> None:
        """Write the box, chunk by chunk."""
        flat = chunks - SHARED_BASE + self._bases[cta]
        self._lines[flat // 16] = values.reshape(-1).view(u1).reshape(-1, 16)
        self.shadow.settle_transfer(cta, flat, 16)

    # Byte offsets in the memory of all CTAs.

    def _flat(self, m: Mask, address: Array, nbytes: int) -> Array:
        """Of accesses by threads; ``address`` holds the active threads' in C order."""
        offset = self._checked(address, nbytes)
        return offset + (self._thread_bases.ravel() if m is None else self._thread_bases[m])

    def _rows_flat(self, rows: Array, address: Array) -> Array:
        return self._checked(address, 16) + self._bases[rows]

    def _checked(self, address: Array, nbytes: int) -> Array:
        offset = address - SHARED_BASE
        bad = (offset < 0) | (offset + nbytes > self.size) | (offset % nbytes != 0)
        if bad.any():
            raise EmulatorError(
                f"shared address {address[bad][0]:#x} is outside of the CTA's {self.size} bytes, "
                f"or not aligned to {nbytes}"
            )
        return offset
