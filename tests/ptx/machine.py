"""Runs a grid: CTAs side by side, warps in random order, barriers.

PTX ISA 2.2 (Thread hierarchy), 9.7.12 (Control flow), 9.7.13.1 (``bar``), 9.7.13.15 (mbarrier).

Several CTAs run at once, in one array. At the end of every basic block another warp is drawn at
random; within a warp the fragment at the block of least rank runs first, so that threads which
diverged meet again. ``late=True`` lets asynchronous operations take effect as late as the waits
allow, ``late=False`` when issued: a program without a race gives the same bits both ways.
"""

from __future__ import annotations

import struct
from typing import Any, NoReturn

import numpy as np

from tests.ptx.asynchronous import MBarriers, TensorMap, Transfer
from tests.ptx.decode import Block, Program
from tests.ptx.formats import LANES, PARAM_BASE, UNSIGNED, Array, EmulatorError, Race, i8, u1, u4
from tests.ptx.memory import Memory, Shared
from tests.ptx.shadow import Shadow
from tests.ptx.warp import Fragment, Warp

_PACKED = {  # struct's codes of parameter types
    "u64": "Q",
    "s64": "q",
    "b64": "Q",
    "u32": "I",
    "s32": "i",
    "b32": "I",
    "u16": "H",
    "s16": "h",
    "b16": "H",
    "u8": "B",
    "s8": "b",
    "b8": "B",
    "f64": "d",
    "f32": "f",
}


def launch(
    program: Program,
    grid: int,
    arguments: list[Any],
    memory: Memory,
    *,
    num_warps: int,
    shared: int,
    seed: int = 0,
    late: bool = True,
    races: bool = True,
    fences: bool = True,
    barrier_fences: bool = False,
    at_once: int = 16,
) -> int:
    """Run every CTA of a grid.

    Args:
        program: what :func:`tests.ptx.decode.parse` made.
        grid: number of CTAs.
        arguments: an int or float for each parameter, a :class:`TensorMap` for a ``blob``.
        memory: the global memory it may touch.
        num_warps: warps of a CTA.
        shared: bytes of dynamic shared memory.
        seed: of the order in which warps run.
        late: whether asynchronous operations take effect at their waits, or when issued.
        races: whether unordered accesses to shared memory are errors.
        fences: whether a missing ``fence.proxy.async`` is one.
        barrier_fences: also between the initialisation of an mbarrier and the tensor copies that
            complete it. Kernels that Triton pipelines have none there.
        at_once: how many CTAs run side by side.

    Returns:
        The number of instructions that warps executed.

    Raises:
        EmulatorError: With the instruction, for whatever the program does wrong.
        Race: The same, for accesses that nothing orders.
    """
    if len(arguments) != len(program.parameters):
        expected = len(program.parameters)
        raise EmulatorError(f"{len(arguments)} arguments for {expected} parameters")
    values = [
        _as_bits(kind, value)
        for (_, kind), value in zip(program.parameters, arguments, strict=True)
    ]
    rng = np.random.default_rng(seed)
    executed = 0
    for first in range(0, grid, at_once):
        machine = Machine(
            program,
            values,
            memory,
            grid=grid,
            first=first,
            ctas=min(at_once, grid - first),
            warps=num_warps,
            shared=shared,
            rng=rng,
            late=late,
            races=races,
            fences=fences,
            barrier_fences=barrier_fences,
        )
        machine.run()
        executed += machine.executed
    return executed


def _as_bits(kind: str, value: Any) -> Any:
    """A parameter as an array of one unsigned element."""
    if kind == "blob" or isinstance(value, TensorMap):
        return value
    code = _PACKED[kind]
    if code in "QIHB":
        value &= (1 << 8 * struct.calcsize(code)) - 1
    raw = np.frombuffer(struct.pack(f"<{code}", value), u1)
    return raw.view(UNSIGNED[len(raw)])


class Machine:
    """Some CTAs of a launch, ``first`` and the ``ctas - 1`` after it."""

    def __init__(
        self,
        program: Program,
        arguments: list[Any],
        memory: Memory,
        *,
        grid: int,
        first: int,
        ctas: int,
        warps: int,
        shared: int,
        rng: np.random.Generator,
        late: bool,
        races: bool,
        fences: bool,
        barrier_fences: bool,
    ) -> None:
        self.program, self.arguments, self.memory = program, arguments, memory
        self.grid, self.first, self.ctas, self.warps_per_cta = grid, first, ctas, warps
        self.late, self.barrier_fences = late, barrier_fences
        nbytes = -(-max(shared, 16) // 16) * 16
        self.shadow = Shadow(ctas, warps, nbytes, program.granule, on=races, fences=fences)
        self.shared = Shared(ctas, nbytes, self.shadow)
        self.mbarriers = MBarriers(self.shadow, first)
        self.transfers: list[Transfer] = []  # tensor copies that are under way
        self.executed = 0
        self._rng = rng
        self._arrived: dict[int, Array] = {}  # at each bar: threads, (CTAs, warps, 32)
        self._warps = [Warp(self, w) for w in range(warps)]

    def tensor_map(self, address: int) -> TensorMap:
        """The map that a tensor copy names by the address of a parameter."""
        index = address - PARAM_BASE
        found = self.arguments[index] if 0 <= index < len(self.arguments) else None
        if not isinstance(found, TensorMap):
            raise EmulatorError(f"there is no tensor map at {address:#x}")
        return found

    def run(self) -> None:
        """Until every thread has exited."""
        while True:
            ready = [w for w in self._warps if any(self._can_run(w, f) for f in w.fragments)]
            if ready:
                warp = ready[int(self._rng.integers(len(ready)))]
                fragment = min(
                    (f for f in warp.fragments if f.waits is None),
                    key=lambda f: self.program.blocks[f.block].rank,
                )
                warp.fragments.remove(fragment)
                self._step(warp, fragment)
            elif self.transfers:
                # One for each CTA, so that the CTAs stay together.
                order = self._rng.permutation(len(self.transfers))
                for transfer in {self.transfers[i].cta: self.transfers[i] for i in order}.values():
                    self.transfers.remove(transfer)
                    transfer.complete()
            elif any(w.fragments for w in self._warps):
                self._deadlock()
            else:
                return

    def _step(self, warp: Warp, fragment: Fragment) -> None:
        """One basic block of some threads."""
        block, mask = self.program.blocks[fragment.block], fragment.mask
        m = warp.full(mask)
        step = 0
        try:
            with np.errstate(all="ignore"):
                for step, run in enumerate(block.run):  # noqa: B007  named in the error
                    run(warp, m)
            step = len(block.run)
            self.executed += step * int(mask[:, 0].sum() or 1)
            self._finish(warp, fragment.block, block, mask)
        except Exception as error:
            kind = Race if isinstance(error, Race) else EmulatorError
            text = [*block.texts, block.end_text][step]
            where = f"warp {warp.warp}, block {fragment.block}"
            raise kind(f"{self.program.name}: {error}\n    at {text}\n    {where}") from error

    def _finish(self, warp: Warp, number: int, block: Block, mask: Array) -> None:
        """Where the threads go from the end of a block."""
        kind, *rest = block.end
        taken = mask
        if rest and rest[0] is not None:
            slot, negated = rest[0]
            taken = mask & (~warp.registers[slot] if negated else warp.registers[slot])
            if kind == "barrier" and (taken != mask).any() and taken.any():
                raise EmulatorError("a barrier under a predicate on which threads differ")
        other = mask & ~taken
        if other.any():
            warp.add(number + 1, other)
        if not taken.any() or kind == "exit":
            return
        if kind == "next":
            warp.add(number + 1, taken)
        elif kind == "branch":
            warp.add(rest[1], taken)
        elif kind == "switch":
            index = np.broadcast_to(warp.registers[rest[1]].view(u4), warp.shape)
            if (taken & (index >= len(rest[2]))).any():
                raise EmulatorError("brx.idx past the end of its table")
            for i, target in enumerate(rest[2]):
                mine = taken & (index == i)
                if mine.any():
                    warp.add(target, mine)
        elif kind == "wait":
            _, slot, offset, parity, done = rest
            address = (warp.wide(slot).view(u4).astype(i8) + offset)[:, 0]
            if done is not None:
                warp.put(done, np.ones(1, np.bool_), warp.full(taken))
            waits = ("mbarrier", address, warp.wide(parity).view(u4)[:, 0])
            warp.fragments.append(Fragment(number + 1, taken, waits))
        elif kind == "barrier":
            _, name, count, arrive_only = rest
            bar = int(warp.registers[name].ravel()[0])
            need = self.warps_per_cta * LANES
            if count is not None:
                need = int(warp.registers[count].ravel()[0])
            self._arrive(warp, number, taken, bar, need, arrive_only=arrive_only)

    # bar.sync and bar.arrive.

    def _arrive(
        self, warp: Warp, number: int, mask: Array, name: int, need: int, *, arrive_only: bool
    ) -> None:
        shape = (self.ctas, self.warps_per_cta, LANES)
        here = self._arrived.setdefault(name, np.zeros(shape, np.bool_))
        if (here[:, warp.warp] & mask).any():
            raise EmulatorError(f"a thread arrives at barrier {name} twice")
        here[:, warp.warp] |= mask
        if arrive_only:
            warp.add(number + 1, mask)
        else:
            warp.fragments.append(Fragment(number + 1, mask, ("barrier", name)))
        done = here.sum((1, 2)) >= need
        if not done.any():
            return
        for cta in np.flatnonzero(done):
            self.shadow.meet(int(cta), np.flatnonzero(here[cta].any(1)).tolist())
        here[done] = False
        for other in self._warps:
            for fragment in [f for f in other.fragments if f.waits == ("barrier", name)]:
                self._release(other, fragment, done)

    @staticmethod
    def _release(warp: Warp, fragment: Fragment, done: Array) -> None:
        """Let the threads of the CTAs ``done`` go on."""
        go, stay = fragment.mask & done[:, None], fragment.mask & ~done[:, None]
        warp.fragments.remove(fragment)
        if stay.any():
            warp.fragments.append(Fragment(fragment.block, stay, fragment.waits))
        if go.any():
            warp.add(fragment.block, go)

    # mbarrier.try_wait.

    def _can_run(self, warp: Warp, fragment: Fragment) -> bool:
        if fragment.waits is None:
            return True
        changes = self.mbarriers.changes
        if fragment.waits[0] == "mbarrier" and fragment.asked != changes:
            fragment.asked = changes
            self._poll(warp, fragment)
        return fragment.waits is None

    def _poll(self, warp: Warp, fragment: Fragment) -> None:
        """Let those threads go on whose phase is complete."""
        assert fragment.waits is not None
        _, address, parity = fragment.waits
        free = np.zeros(self.ctas, np.bool_)
        for cta in np.flatnonzero(warp.whole_warps(fragment.mask)):
            where = int(cta), warp.warp, int(address[cta]), int(parity[cta])
            free[cta] = self.mbarriers.passed(*where)
        if free.any():
            stay = fragment.mask & ~free[:, None]
            if stay.any():
                warp.fragments.append(Fragment(fragment.block, stay, fragment.waits))
            fragment.mask, fragment.waits = fragment.mask & free[:, None], None

    def _deadlock(self) -> NoReturn:
        where = [
            f"warp {w.warp}: {f.waits[0]} before block {f.block}"
            for w in self._warps
            for f in w.fragments
            if f.waits is not None
        ]
        raise EmulatorError(f"{self.program.name}: deadlock: " + "; ".join(where[:8]))
