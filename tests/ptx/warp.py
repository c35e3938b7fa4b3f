"""One warp of every CTA that runs: registers, and where its threads are.

PTX ISA 3.1 (SIMT), 9.5 (Divergence), 10 (Special registers). Threads at the same basic block form
a *fragment*; a branch on which they disagree splits one, and fragments at one block merge.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.ptx.asynchronous import Groups
from tests.ptx.formats import LANES, UNSIGNED, Array, EmulatorError, Mask, u4


@dataclass(eq=False)
class Fragment:
    """Threads of a warp at the start of a block.

    Attributes:
        block: its number.
        mask: ``(CTAs, 32)``.
        waits: None when ready; ``("barrier", name)`` or ``("mbarrier", address, parity)``.
        asked: the count of mbarrier instructions when it last looked.
    """

    block: int
    mask: Array
    waits: tuple[Any, ...] | None = None
    asked: int = -1


class Warp:
    """The warp with one number in each CTA of a :class:`tests.ptx.machine.Machine`."""

    def __init__(self, machine: Any, warp: int) -> None:
        self.machine, self.warp, self.ctas = machine, warp, machine.ctas
        self.shape = self.ctas, LANES
        self.registers: list[Any] = [None] * machine.program.registers
        for slot, value in machine.program.constants.items():
            self.registers[slot] = value
        self.fragments = [Fragment(0, np.ones(self.shape, np.bool_))]
        self.copies, self.products = Groups(), Groups()
        # Operands of matrix products by registers: (their arrays, the matrix).
        self.matrices: dict[tuple[Any, ...], tuple[list[Array], Array]] = {}
        self._everywhere = np.ones(self.ctas, np.bool_)
        self._rows_of: tuple[Mask, Array] = (None, self._everywhere)

    def special(self, name: str) -> Array:
        """A special register's value."""
        machine = self.machine
        if name == "tid.x":
            return (self.warp * LANES + np.arange(LANES, dtype=u4))[None, :].astype(u4)
        if name == "laneid":
            return np.arange(LANES, dtype=u4)[None, :]
        if name == "ctaid.x":
            return (machine.first + np.arange(self.ctas, dtype=u4))[:, None].astype(u4)
        numbers = {
            "warpid": self.warp,
            "ntid.x": machine.warps_per_cta * LANES,
            "nctaid.x": machine.grid,
            "nctaid.y": 1,
            "nctaid.z": 1,
        }
        return np.array([numbers.get(name, 0)], u4)  # the others count from 0 and are alone

    # Masks.

    def full(self, m: Array) -> Mask:
        """None where all threads take part, else a mask of the warp's shape."""
        if m.all():
            return None
        return m if m.shape == self.shape else m & np.ones(self.shape, np.bool_)

    def mask(self, m: Mask) -> Array:
        """The inverse of :meth:`full`."""
        return np.ones(self.shape, np.bool_) if m is None else m

    def whole_warps(self, m: Mask) -> Array:
        """``(CTAs,)``: which take part in an instruction that a warp executes as one.

        Raises:
            EmulatorError: If some of a warp's threads do not take part.
        """
        if m is None:
            return self._everywhere
        if m is not self._rows_of[0]:
            rows = m.any(1)
            if not m[rows].all():
                raise EmulatorError("only a part of the warp executes a .sync.aligned instruction")
            self._rows_of = m, rows
        return self._rows_of[1]

    # Registers.

    def wide(self, slot: int) -> Array:
        """A register as ``(CTAs, 32)``."""
        value = self.registers[slot]
        if value.shape == self.shape:
            return value
        whole = np.empty(self.shape, value.dtype)
        whole[...] = value
        return whole

    def lanes(self, slot: int, m: Mask) -> Array:
        """The active threads' values, flat."""
        value = self.wide(slot)
        return value.ravel() if m is None else value[m]

    def put(self, slot: int, value: Array, m: Mask) -> None:
        """Write a register of the active threads; ``value`` broadcasts to ``(CTAs, 32)``."""
        if m is None:
            self.registers[slot] = value
            return
        old = self.registers[slot]
        if value.dtype != np.bool_:
            bits = UNSIGNED[value.dtype.itemsize]
            value, old = value.view(bits), old.view(bits)
        self.registers[slot] = np.where(m, value, old)

    def scatter(self, slot: int, values: Array, m: Mask) -> None:
        """Write a register from the active threads' values, flat: the inverse of :meth:`lanes`."""
        if m is None:
            self.registers[slot] = values.reshape(self.shape)
            return
        bits = UNSIGNED[values.dtype.itemsize]
        out = np.empty(self.shape, bits)
        out[...] = self.registers[slot].view(bits)
        out[m] = values.view(bits)
        self.registers[slot] = out

    def put_rows(self, slot: int, values: Array, rows: Array) -> None:
        """Write a register of whole warps, ``values`` has one row for each that takes part."""
        if rows.all():
            self.registers[slot] = values
            return
        whole = np.zeros(self.shape, values.dtype)
        whole[rows] = values
        self.put(slot, whole, np.broadcast_to(rows[:, None], self.shape))

    # Execution.

    def issue(self, groups: Groups, operation: Any) -> None:
        """Start an asynchronous operation; without ``late`` it takes effect here."""
        operation.start()
        if not self.machine.late:
            operation.perform()
        groups.open.append(operation)

    def add(self, block: int, mask: Array) -> None:
        """Threads arrive at a block; they join those that are there."""
        for fragment in self.fragments:
            if fragment.block == block and fragment.waits is None:
                fragment.mask = fragment.mask | mask
                return
        self.fragments.append(Fragment(block, mask))
