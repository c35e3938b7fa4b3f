"""Statements to a program of basic blocks: registers, operands, predicates, control flow.

PTX ISA 5.4 (Variables), 6 (Instruction operands), 9.3 (Predicated execution), 9.5 (Divergence of
threads in control constructs), 9.7.12 (Control flow instructions).

Every instruction becomes a closure ``run(warp, mask)``. The rooms ``*_instructions`` register how,
by mnemonic, with :func:`executes`; what none of them knows is an :class:`UnknownInstruction`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.ptx import syntax
from tests.ptx.formats import (
    PARAM_BASE,
    SHARED_BASE,
    UNSIGNED,
    EmulatorError,
    Mask,
    f4,
    f8,
    i8,
    u4,
    u8,
    width_of,
)
from tests.ptx.syntax import Instruction, Scopes

Run = Callable[[Any, Mask], Any]
"""``run(warp, mask)`` executes one instruction for the threads of ``mask``."""

DECODERS: dict[str, Callable[[Decoder, Instruction], Run]] = {}
"""How an instruction is decoded, by its mnemonic."""

_SPECIAL = {  # 10, Special registers
    "%tid.x",
    "%tid.y",
    "%tid.z",
    "%ntid.x",
    "%ctaid.x",
    "%ctaid.y",
    "%ctaid.z",
    "%nctaid.x",
    "%nctaid.y",
    "%nctaid.z",
    "%laneid",
    "%warpid",
    "%cluster_ctarank",
    "%cluster_ctaid.x",
}


def executes(*mnemonics: str) -> Callable[..., Any]:
    """Register a function ``(decoder, instruction) -> run`` for these mnemonics."""

    def register(decode: Callable[[Decoder, Instruction], Run]) -> Any:
        for mnemonic in mnemonics:
            DECODERS[mnemonic] = decode
        return decode

    return register


@dataclass
class Block:
    """Instructions without a branch between them.

    Attributes:
        run: one closure for each step; an operand may add a step before its instruction.
        texts: the statement of each step.
        end: how the block ends: ``("next",)``, ``("branch", guard, target)``, ``("switch", ...)``,
            ``("exit", guard)``, ``("barrier", ...)`` or ``("wait", ...)``.
        end_text: the statement that ends it.
        rank: number in reverse postorder; threads at low ranks run first.
    """

    run: list[Run] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    end: tuple[Any, ...] = ("next",)
    end_text: str = ""
    rank: int = 0


@dataclass
class Program:
    """A kernel that :func:`tests.ptx.machine.launch` can run.

    Attributes:
        name: of the entry.
        parameters: (name, type); a type of ``"blob"`` is a tensor map of 128 bytes.
        blocks: the first is where it starts.
        registers: how many there are.
        constants: what registers hold at the start, immediates among them.
        granule: bytes of shared memory that are always touched together, for the race check.
        counts: how often each opcode stands in the text.
        threads: of one CTA.
        ptx: the text.
    """

    name: str
    parameters: list[tuple[str, str]]
    blocks: list[Block]
    registers: int
    constants: dict[int, Any]
    granule: int
    counts: Counter[str]
    threads: int
    ptx: str


class Decoder:
    """Collects blocks; offers the decoders of instructions their operands as register slots."""

    def __init__(self, parameters: list[tuple[str, str]], body: str) -> None:
        named = Counter(re.findall(r"%\w+", body))
        self.unread = {name for name, count in named.items() if count == 1}  # registers
        self.parameters = {name: i for i, (name, _) in enumerate(parameters)}
        self.registers = 0
        self.constants: dict[int, Any] = {}
        self.tables: dict[str, list[str]] = {}  # targets of brx.idx
        self.granule = 4
        self.counts: Counter[str] = Counter()
        self._widths: dict[tuple[int, str], int] = {}
        self._slots: dict[tuple[int, str], int] = {}
        self._interned: dict[tuple[str, str], int] = {}
        self._blocks = [Block()]
        self._labels: dict[tuple[int, str], int] = {}

    # Registers and operands.

    def declare(self, scopes: Scopes, statement: str) -> None:
        """``.reg .b32 %r<10>;``: note names and widths."""
        found = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", statement)
        if found is None:
            raise EmulatorError(f"can't parse {statement!r}")
        width = 0 if found[1] == "pred" else int(found[1][1:]) // 8
        for name in syntax.vector(found[2]):
            counted = re.fullmatch(r"(%\w+)<(\d+)>", name)
            names = [f"{counted[1]}{i}" for i in range(int(counted[2]))] if counted else [name]
            for each in names:
                self._widths[scopes[-1], each] = width

    def fresh(self) -> int:
        """The slot of a new register without a name."""
        self.registers += 1
        return self.registers - 1

    def lookup(self, ins: Instruction, name: str) -> tuple[int, int]:
        """Slot and width in bytes of a register; a predicate's width is 0."""
        for scope in reversed(ins.scopes):
            key = (scope, name)
            if key in self._widths:
                width = self._widths[key]
                if key not in self._slots:
                    # All ones until written: NaN as a float. Kernels may shuffle and drop it.
                    slot = self._slots[key] = self.fresh()
                    ones = np.full(1, -1, i8).astype(UNSIGNED[width]) if width else np.ones(1, bool)
                    self.constants[slot] = ones
                return self._slots[key], width
        raise EmulatorError(f"no register {name!r} in {ins.text!r}")

    def source(self, ins: Instruction, text: str, dtype: Any) -> int:
        """Slot of a value as wide as ``dtype``; a wider register is cut by a step before."""
        text = text.strip()
        if text.startswith("{") and "," not in text:
            text = text.strip("{} ")
        slot = self._immediate(text, dtype)
        if slot is not None:
            return slot
        width = width_of(dtype)
        if text == "global_smem":  # Triton's name of the dynamic shared memory
            return self._constant(SHARED_BASE, UNSIGNED[width])
        if text in self.parameters:
            return self._constant(PARAM_BASE + self.parameters[text], UNSIGNED[width])
        if text in _SPECIAL:
            special, slot = text[1:], self.fresh()
            self.emit(ins, lambda x, m: x.registers.__setitem__(slot, x.special(special)))
            return slot
        slot, has = self.lookup(ins, text)
        if has > width and dtype != np.bool_:
            cut, wide, narrow = self.fresh(), UNSIGNED[has], UNSIGNED[width]

            def take_low_bits(x: Any, m: Mask) -> None:
                x.registers[cut] = x.registers[slot].view(wide).astype(narrow)

            self.emit(ins, take_low_bits)
            return cut
        return slot

    def target(self, ins: Instruction, text: str) -> int | None:
        """Slot of a result, None for the sink ``_``."""
        return None if text.strip() == "_" else self.lookup(ins, text.strip())[0]

    def address(self, ins: Instruction, text: str, dtype: Any) -> tuple[int, int]:
        """Slot and constant offset of ``[%r1+16]`` or ``[name]`` (6.4.1)."""
        found = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]", text)
        if found is None:
            raise EmulatorError(f"address {text!r} of {ins.text!r}")
        return self.source(ins, found[1], dtype), int(found[2] or "0", 0)

    def parameter_index(self, ins: Instruction, text: str) -> int:
        """Which parameter ``[name]`` is."""
        name = text.strip("[] ")
        if name not in self.parameters:
            raise EmulatorError(f"no parameter {text!r} of {ins.text!r}")
        return self.parameters[name]

    def _constant(self, value: Any, dtype: Any) -> int:
        key = (repr(value), np.dtype(dtype).str)
        if key not in self._interned:
            slot = self._interned[key] = self.fresh()
            self.constants[slot] = np.array([value]).astype(dtype)
        return self._interned[key]

    def _immediate(self, text: str, dtype: Any) -> int | None:
        """Slot of a constant (4.5), None where the text is none."""
        dtype = np.dtype(dtype)
        if found := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", text):
            return self._constant(np.array([int(found[1], 16)], u4).view(f4)[0], f4)
        if found := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", text):
            return self._constant(np.array([int(found[1], 16)], u8).view(f8)[0], f8)
        if not re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
            return None
        value = int(text.rstrip("U"), 0)
        if dtype == np.bool_:
            return self._constant(value != 0, np.bool_)
        width = dtype.itemsize
        return self._constant(value & ((1 << 8 * width) - 1), UNSIGNED[width])

    # Steps.

    def emit(self, ins: Instruction, run: Run) -> None:
        """Append a step to the current block."""
        self._blocks[-1].run.append(run)
        self._blocks[-1].texts.append(ins.text)

    def apply(
        self, d: int | None, fn: Callable[..., Any], slots: list[int], kinds: list[Any]
    ) -> Run:
        """A step ``d = fn(*slots)``, each viewed as its kind; one and two operands are hot."""
        if d is None:
            return lambda x, m: None
        if len(slots) == 1:
            (a,), (a_kind,) = slots, kinds

            def run(x: Any, m: Mask) -> None:
                value = fn(x.registers[a].view(a_kind))
                if m is None:
                    x.registers[d] = value
                else:
                    x.put(d, value, m)
        elif len(slots) == 2:
            (a, b), (a_kind, b_kind) = slots, kinds

            def run(x: Any, m: Mask) -> None:
                registers = x.registers
                value = fn(registers[a].view(a_kind), registers[b].view(b_kind))
                if m is None:
                    registers[d] = value
                else:
                    x.put(d, value, m)
        else:

            def run(x: Any, m: Mask) -> None:
                registers = x.registers
                values = (registers[s].view(kind) for s, kind in zip(slots, kinds, strict=True))
                x.put(d, fn(*values), m)

        return run

    def add(self, ins: Instruction) -> None:
        """Decode one instruction into the current block, or end the block with it."""
        self.counts[ins.opcode] += 1
        guard = self._guard(ins)
        if self._ends_block(ins, guard):
            return
        decode = DECODERS.get(ins.parts[0])
        if decode is None:
            raise ins.unknown()
        run = decode(self, ins)
        if guard is None:
            self.emit(ins, run)
            return
        slot, negated = guard

        def guarded(x: Any, m: Mask) -> None:
            taken = ~x.registers[slot] if negated else x.registers[slot]
            m = x.full(taken if m is None else m & taken)
            if m is None or m.any():
                run(x, m)

        self.emit(ins, guarded)

    # Control flow.

    def label(self, scopes: Scopes, name: str) -> None:
        """Start a block with a name."""
        if self._blocks[-1].run or self._blocks[-1].end != ("next",):
            self._blocks.append(Block())
        self._labels[scopes[-1], name] = len(self._blocks) - 1

    def finish(self) -> list[Block]:
        """The blocks, with targets resolved and ranks given."""
        for block in self._blocks:
            if block.end[0] == "branch":
                block.end = (*block.end[:2], self._find(*block.end[2]))
            elif block.end[0] == "switch":
                scopes, table = block.end[3]
                targets = [self._find(scopes, label) for label in self.tables[table]]
                block.end = (*block.end[:3], targets)
        self._rank_blocks()
        return self._blocks

    def _guard(self, ins: Instruction) -> tuple[int, bool] | None:
        if ins.guard is None:
            return None
        return self.lookup(ins, ins.guard.lstrip("!"))[0], ins.guard.startswith("!")

    def _ends_block(self, ins: Instruction, guard: tuple[int, bool] | None) -> bool:
        """Branches and whatever makes a thread wait end a block."""
        base, parts = ins.parts[0], ins.parts[1:]
        end: tuple[Any, ...]
        if base == "bra" and set(parts) <= {"uni"}:
            end = ("branch", guard, (ins.scopes, ins.operands[0]))
        elif base == "brx" and set(parts) <= {"idx", "uni"}:
            index = self.source(ins, ins.operands[0], u4)
            end = ("switch", guard, index, (ins.scopes, ins.operands[1]))
        elif base in ("ret", "exit") and set(parts) <= {"uni"}:
            end = ("exit", guard)
        elif base in ("bar", "barrier") and "warp" not in parts:
            if not set(parts) <= {"sync", "arrive", "cta", "aligned"}:
                raise ins.unknown()
            name = self.source(ins, ins.operands[0], u4)
            count = self.source(ins, ins.operands[1], u4) if len(ins.operands) > 1 else None
            end = ("barrier", guard, name, count, "arrive" in parts)
        elif base == "mbarrier" and parts[0] in ("try_wait", "test_wait"):
            if parts[0] == "test_wait" or "parity" not in parts:
                raise ins.unknown()
            slot, offset = self.address(ins, ins.operands[1], u4)
            parity = self.source(ins, ins.operands[2], u4)
            end = ("wait", guard, slot, offset, parity, self.target(ins, ins.operands[0]))
        else:
            return False
        self._blocks[-1].end, self._blocks[-1].end_text = end, ins.text
        self._blocks.append(Block())
        return True

    def _find(self, scopes: Scopes, label: str) -> int:
        for scope in reversed(scopes):
            if (scope, label) in self._labels:
                return self._labels[scope, label]
        raise EmulatorError(f"no label {label!r}")

    def _rank_blocks(self) -> None:
        """Number in reverse postorder: threads that diverged meet again where their paths join."""
        done: list[int] = []
        seen, stack = {0}, [(0, self._successors(0))]
        while stack:
            block, after = stack[-1]
            if after:
                following = after.pop(0)
                if following not in seen:
                    seen.add(following)
                    stack.append((following, self._successors(following)))
            else:
                done.append(block)
                stack.pop()
        for rank, block in enumerate(reversed(done)):
            self._blocks[block].rank = rank

    def _successors(self, number: int) -> list[int]:
        kind, *rest = self._blocks[number].end
        after = [rest[1]] if kind == "branch" else list(rest[2]) if kind == "switch" else []
        falls_through = kind not in ("branch", "exit", "switch") or rest[0] is not None
        if number + 1 < len(self._blocks) and falls_through:
            after.append(number + 1)
        return after
