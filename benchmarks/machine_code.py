"""Reads NVIDIA machine code as ``nvdisasm`` prints it: instructions, loops, the hot loop.

The hot loop is the one that runs over the tiles that need no mask. It is found in the control
flow: every edge back to an instruction that dominates its source closes a natural loop; of the
loops that multiply matrices and hold no smaller one that does, the hot one has the fewest other
instructions for each product, for its masked twins compare and select besides. Where nothing runs
on the tensor cores (exact fp32) FFMA counts as the product.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from typing import NamedTuple

MMA = re.compile(r"[HIQDO]G?MMA$|UTC[A-Z]*MMA$")
KINDS = {"wgmma": r"[HIQ]GMMA$", "tcgen05": r"UTC[A-Z]*MMA$", "mma": r"[HIQDO]MMA$"}
FMA = re.compile(r"(FFMA|FMUL|FADD|FFMA2|FMUL2|FADD2|HFMA2|HMUL2|HADD2|IMAD|DFMA|DMUL|DADD)$")
# Shuffles and constants go through the memory pipe as well.
MEMORY = re.compile(
    r"(LD|LDG|LDS|LDL|LDSM|LDGSTS|LDC|LDCU|ULDC|LDTM|ST|STG|STS|STL|STSM|STTM|STAS|ATOM|ATOMS|ATOMG"
    r"|RED|REDG|REDUX|SHFL|MOVM|UTMA[A-Z]+|UBLK[A-Z]+|UTCCP|UTCATOMSWS)$"
)
# What takes an issue slot and no lane: control flow, barriers, and the uniform datapath (U...).
CONTROL = re.compile(
    r"(BRA|BRX|BRXU|JMP|JMX|CALL|RET|EXIT|KILL|BPT|BSSY|BSYNC|BREAK|BMOV|BAR|B2R|NOP|YIELD|NANOSLEEP"
    r"|WARPSYNC|WARPGROUP|WARPGROUPSET|DEPBAR|LDGDEPBAR|SYNCS|FENCE|MEMBAR|ERRBAR|CCTL|ARRIVES|ELECT"
    r"|ACQBULK|PREEXIT|CGAERRBAR|ENDCOLLECTIVE|U[A-Z0-9]+|R2UR)$"
)
CLASSES = ("mma", "mufu", "fma", "alu", "memory", "control")
# What the instructions of a loop do, finer than the pipes of CLASSES; the rest is integer, that is
# addresses and counters. An instruction on two packed numbers (FFMA2) counts once.
WORK = {
    "exp2": r"MUFU$",
    "fma": r"(FFMA2?|HFMA2|DFMA)$",
    "mul": r"(FMUL2?|HMUL2|DMUL)$",
    "add": r"(FADD2?|HADD2|DADD)$",
    "max": r"[FD]MNMX3?$",
    "convert": r"(F2FP?|F2I|I2FP?|I2F|F2IP|PRMT)$",
    "select": r"(F?SEL|[FID]SETP|PLOP3|[PR]2[RP]|DSETP)$",
    "shuffle": r"(SHFL|MOVM|REDUX)$",
    "integer": r"",
    "matrix": MMA.pattern,
    "memory": MEMORY.pattern,
    "control": CONTROL.pattern,
}

_LINE = re.compile(
    r"^\s*/\*(?P<address>[0-9a-f]+)\*/\s+(?P<predicate>@!?U?P\w+\s+)?(?P<opcode>[A-Z]\w*)"
    r"(?P<suffix>[.\w]*)(?P<operands>[^;]*);"
)
_LABEL = re.compile(r"^([.$\w]+):\s*$")
_TARGET = re.compile(r"`\((?P<label>[^)]+)\)")


class Instruction(NamedTuple):
    """``opcode`` is what stands before the first dot, ``suffix`` the rest; ``target`` a label."""

    opcode: str
    suffix: str
    conditional: bool
    target: str | None


class Code(NamedTuple):
    """A function's instructions, and the index that each label stands before."""

    instructions: list[Instruction]
    labels: dict[str, int]


def parse(text: str) -> Code:
    """Read what ``nvdisasm`` prints of a cubin with one kernel; ValueError if it is not that."""
    sections = re.split(r"^\t\.section\t(\.text\.\S+?),.*$", text, flags=re.MULTILINE)
    if len(sections) != 3:
        raise ValueError(f"expected one kernel in the disassembly, got {len(sections) // 2}")
    instructions, labels = [], {}
    for line in sections[2].splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif match := _LINE.match(line):
            target = _TARGET.search(match["operands"])
            # A branch is conditional by its predicate, or by an operand that precedes the target.
            before = match["operands"][: target.start()] if target else ""
            instructions.append(
                Instruction(
                    match["opcode"],
                    match["suffix"],
                    conditional=match["predicate"] is not None or before.strip() != "",
                    target=target["label"] if target else None,
                )
            )
        elif line.startswith("        /*"):
            raise ValueError(f"not understood: {line.strip()}")
    return Code(instructions, labels)


def classify(instruction: Instruction) -> str:
    """One of :data:`CLASSES`; whatever isn't one of the others is ALU."""
    opcode = instruction.opcode
    if MMA.match(opcode):
        return "mma"
    if opcode == "MUFU":
        return "mufu"
    if FMA.match(opcode):
        return "fma"
    if MEMORY.match(opcode):
        return "memory"
    return "control" if CONTROL.match(opcode) else "alu"


def count_classes(instructions: list[Instruction]) -> dict[str, int]:
    """Instructions of each class."""
    counts = Counter(map(classify, instructions))
    return {name: counts[name] for name in CLASSES}


def count_work(instructions: list[Instruction]) -> dict[str, int]:
    """Instructions of each kind of :data:`WORK`."""
    kinds = [(name, re.compile(pattern)) for name, pattern in WORK.items() if pattern]
    counts = Counter(
        next((name for name, pattern in kinds if pattern.match(x.opcode)), "integer")
        for x in instructions
    )
    return {name: counts[name] for name in WORK}


def tensor_core_kinds(instructions: list[Instruction]) -> dict[str, int]:
    """Matrix instructions of each kind that occurs: wgmma, tcgen05, mma."""
    counts = {
        kind: sum(1 for x in instructions if re.match(pattern, x.opcode))
        for kind, pattern in KINDS.items()
    }
    return {kind: count for kind, count in counts.items() if count}


def size(code: Code) -> int:
    """Instructions, without the padding after the last one."""
    return sum(1 for x in code.instructions if x.opcode != "NOP")


def successors(code: Code, index: int) -> list[int]:
    """Where control can go from the instruction at ``index``."""
    instruction = code.instructions[index]
    following = [index + 1] if index + 1 < len(code.instructions) else []
    if instruction.opcode in ("EXIT", "RET", "KILL", "BRX", "JMX"):
        return following if instruction.conditional else []
    if instruction.target not in code.labels:
        return following
    jump = code.labels[instruction.target]
    if instruction.opcode == "CALL" and not instruction.target.startswith(".L"):
        return following  # a function comes back
    if instruction.opcode not in ("BRA", "JMP", "CALL"):
        return following  # BSSY and the like name the place where threads will meet
    jumps = [jump] if jump < len(code.instructions) else []
    return following + jumps if instruction.conditional else jumps


def natural_loops(code: Code) -> list[set[int]]:
    """The natural loops, as the indices of their instructions; loops of one header are one.

    Dominators as in Cooper, Harvey & Kennedy, "A Simple, Fast Dominance Algorithm" (2001).
    """
    total = len(code.instructions)
    after = [successors(code, index) for index in range(total)]
    before: list[list[int]] = [[] for _ in range(total)]
    for index, targets in enumerate(after):
        for target in targets:
            before[target].append(index)

    order, seen, stack = [], {0}, [(0, iter(after[0]))]
    while stack:  # depth first, postorder
        node, targets = stack[-1]
        target = next((x for x in targets if x not in seen), None)
        if target is None:
            order.append(node)
            stack.pop()
        else:
            seen.add(target)
            stack.append((target, iter(after[target])))
    rank = {node: position for position, node in enumerate(order)}

    dominator = {0: 0}
    changed = True
    while changed:
        changed = False
        for node in reversed(order[:-1]):
            known = [x for x in before[node] if x in dominator]
            common = known[0]
            for other in known[1:]:
                while common != other:
                    if rank[common] < rank[other]:
                        common = dominator[common]
                    else:
                        other = dominator[other]
            if dominator.get(node) != common:
                dominator[node] = common
                changed = True

    def dominates(node: int, other: int) -> bool:
        while rank[other] < rank[node]:
            other = dominator[other]
        return other == node

    loops: dict[int, set[int]] = {}
    for node in order:
        for header in after[node]:
            if dominates(header, node):
                body = loops.setdefault(header, {header})
                pending = [node]
                while pending:
                    member = pending.pop()
                    if member not in body:
                        body.add(member)
                        pending += [x for x in before[member] if x in rank]
    return list(loops.values())


def hot_loop(code: Code) -> list[Instruction] | None:
    """The loop over whole tiles, as the module says; None where no loop multiplies anything."""
    loops = natural_loops(code)
    for is_product in (lambda x: classify(x) == "mma", lambda x: x.opcode in ("FFMA", "FFMA2")):
        products = [sum(is_product(code.instructions[i]) for i in loop) for loop in loops]
        candidates = [
            (loop, count)
            for loop, count in zip(loops, products, strict=True)
            if count
            and not any(other < loop and n for other, n in zip(loops, products, strict=True))
        ]
        if candidates:
            loop, _ = min(candidates, key=lambda pair: len(pair[0]) / pair[1])
            return [code.instructions[index] for index in sorted(loop)]
    return None


class Fp32Work(NamedTuple):
    """What the fp32 lanes do of a loop's work, in one warp."""

    products: int  # instructions that are FFMA or FFMA2, which does two
    multiply_adds: int  # for each lane
    packed: int  # instructions that do two of anything


def fp32_work(instructions: list[Instruction]) -> Fp32Work:
    """FFMA and its packed kind."""
    counts = Counter(x.opcode for x in instructions)
    return Fp32Work(
        products=counts["FFMA"] + counts["FFMA2"],
        multiply_adds=counts["FFMA"] + 2 * counts["FFMA2"],
        packed=counts["FFMA2"] + counts["FMUL2"] + counts["FADD2"],
    )


def multiply_adds(
    instructions: list[Instruction], num_warps: int, per_tcgen05: float
) -> dict[str, float]:
    """Multiply-adds of one trip of a block, by element type (half, tf32, fp64).

    The shape is in the name: ``HGMMA.64x128x16`` for a group of four warps, ``HMMA.16816`` for one
    warp. A tcgen05 instruction has it in a register and runs once a block: ``per_tcgen05`` each.
    """
    amounts: defaultdict[str, float] = defaultdict(float)
    for opcode, suffix, _, _ in instructions:
        kind = "fp64" if opcode == "DMMA" else "tf32" if ".TF32" in suffix else "half"
        if shape := re.match(r"\.(\d+)x(\d+)x(\d+)", suffix):
            m, n, k = map(int, shape.groups())
            amounts[kind] += m * n * k * num_warps // (4 if "GMMA" in opcode else 1)
        elif re.match(KINDS["tcgen05"], opcode):
            amounts[kind] += per_tcgen05
        elif MMA.match(opcode):
            shape = re.match(r"\.(16|8)(8)(32|16|8|4)\b", suffix)
            if shape is None:
                raise ValueError(f"no shape in {opcode}{suffix}")
            m, n, k = map(int, shape.groups())
            amounts[kind] += m * n * k * num_warps
    return dict(amounts)


def tcgen05_multiply_adds(ttgir: str) -> float:
    """Multiply-adds of one tcgen05 instruction: the mean over the loops of Triton's GPU dialect.

    An instruction multiplies 128 rows (or the 64 there are) by 32 bytes of the inner dimension.
    """
    total = instructions = 0
    open_loops: list[str] = []
    for line in ttgir.splitlines():
        indent = line[: len(line) - len(line.lstrip())]
        if open_loops and line.startswith(f"{open_loops[-1]}}}"):
            open_loops.pop()
        if "scf.for" in line or "scf.while" in line:
            open_loops.append(indent)
        elif open_loops and "tc_gen5_mma" in line:
            (m, k, element), (_, n, _) = re.findall(r"memdesc<(\d+)x(\d+)x([a-z]+\d+)", line)[:2]
            m, k, n = int(m), int(k), int(n)
            total += m * n * k
            instructions += -(-m // 128) * -(-k * int(element.strip("befilot")) // 256)
    return total / instructions if instructions else 0.0
