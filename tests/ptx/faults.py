"""Faults planted into the compiled text, each of which a case must notice.

A fault changes one statement of one kernel, found by its form and by what stands before it: Triton
numbers registers anew for every change of a kernel. Where a statement is gone, planting it fails.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.ptx.cases import BY_NAME
from tests.ptx.judge import judge

GQA, HIDDEN, TMA = "bf16 causal GQA", "bf16 causal hidden NaN", "bf16 TMA causal"
FORWARD, DKDV, DQ, DELTA = "forward_kernel", "dkdv_kernel", "dq_kernel", "delta_kernel"
TANGENT, TANGENTS = "tangent_kernel", "bf16 tangents causal"

# How a fault shows. RACE: the race check stops it. ACCESS: it touches memory that is not its own,
# or shared memory out of bounds. VALUES: the accuracy rule fails. DEADLOCK: nothing can go on.
RACE = (
    r"without (a barrier|fence|waiting)|asynchronous copy|nobody has written|still reads|has read"
)
ACCESS = r"no tensor of the launch|between the elements|outside of|not aligned"
VALUES = "elements are off by"
DEADLOCK = r"deadlock"
NOTHING = ""


@dataclass(frozen=True)
class Fault:
    """One change.

    Attributes:
        name: what is broken.
        kernel: whose text.
        find: the statement, a regular expression; runs of blanks in the text are one space. With a
            group ``limit``, only statements that share theirs with at least seven others.
        replace: what stands there instead.
        after: only what follows the first match of this is looked at.
        nth: which of the matches; None: all.
        case: the problem that is run.
        shows: how it is noticed, an expression for the message; ``NOTHING`` where it must not be.
        why: the reason, where it shows nothing.
        slow: not in ``make test``.
        seeds: how many orders of the warps and of tensor copies are tried until it shows.
    """

    name: str
    kernel: str
    find: str
    replace: str = ""
    after: str = ""
    nth: int | None = 0
    case: str = GQA
    shows: str = RACE
    why: str = ""
    slow: bool = False
    seeds: int = 1

    def edit(self, planted: list[str]) -> Callable[[str], str]:
        """The change, which adds to ``planted`` what it found."""

        def change(ptx: str) -> str:
            if f".entry {self.kernel}(" not in ptx:
                return ptx
            text = re.sub(r"[ \t]+", " ", ptx)
            start = re.search(self.after, text)
            if start is None:
                raise ValueError(f"{self.name}: {self.after!r} is not in {self.kernel}")
            found = list(re.compile(self.find).finditer(text, start.end()))
            if "limit" in re.compile(self.find).groupindex:
                shared = Counter(match["limit"] for match in found)
                found = [match for match in found if shared[match["limit"]] >= 8]
            chosen = found if self.nth is None else found[self.nth :][:1]
            if not chosen:
                raise ValueError(f"{self.name}: {self.find!r} is not in {self.kernel}")
            for match in reversed(chosen):
                planted.append(match[0])
                text = text[: match.start()] + match.expand(self.replace) + text[match.end() :]
            return text

        return change


def plant(fault: Fault, arch: int) -> dict[str, Any]:
    """Run a fault's case with it; how it was noticed, if it was."""
    planted: list[str] = []
    runs = tuple((True, seed) for seed in range(fault.seeds))
    verdict = judge(BY_NAME[fault.case], arch, runs, edit=fault.edit(planted))
    return {
        "case": fault.name,
        "noticed": not verdict.passed,
        "message": verdict.message,
        "planted": planted,
        "seconds": verdict.seconds,
    }


# The pipelined loop begins with a wait for all copies but those of later tiles.
_LOOP = r"cp\.async\.wait_group [1-9];"
_WAIT = r"cp\.async\.wait_group \d;"
_MBARRIER_LOOP = r"mbarrier\.try_wait"
_WGMMA = r"wgmma\.mma_async\S+ "

_EVERYWHERE = [
    Fault("barrier after the wait", FORWARD, r"bar\.sync 0;", after=_LOOP),
    Fault("barrier before the next copy", FORWARD, r"bar\.sync 0;", after=_LOOP, nth=1),
    Fault(
        "wait for one copy too few",
        FORWARD,
        r"cp\.async\.wait_group 2;",
        "cp.async.wait_group 3;",
    ),
    Fault("no wait in dK/dV", DKDV, r"cp\.async\.wait_group 0;"),
    Fault("group not committed", FORWARD, r"cp\.async\.commit_group;", after=_LOOP),
    Fault("barrier of dQ", DQ, r"bar\.sync 0;", after=_WAIT, slow=True),
    Fault("barrier of dQ before the next copy", DQ, r"bar\.sync 0;", after=_WAIT, nth=1, slow=True),
    Fault("barrier of dK/dV", DKDV, r"bar\.sync 0;", after=_WAIT),
    Fault(
        "barrier of dK/dV before the next copy",
        DKDV,
        r"bar\.sync 0;",
        after=_WAIT,
        nth=1,
        slow=True,
    ),
    Fault(  # each thread compares all its columns with one limit a row
        "mask comparison off by one",
        FORWARD,
        r"setp\.lt(\.s32 %p\d+, %r\d+, (?P<limit>%r\d+);)",
        r"setp.le\1",
        nth=None,
        case=HIDDEN,
        shows=VALUES,
    ),
    Fault(
        "one of the mask's comparisons",
        DQ,
        r"setp\.lt(\.s32 %p\d+, %r\d+, (?P<limit>%r\d+);)",
        r"setp.gt\1",
        case=HIDDEN,
        shows=VALUES,
        slow=True,
    ),
    Fault(
        "predicate of a store",
        FORWARD,
        r"@%p\d+ (st\.global\.v4)",
        r"\1",
        nth=-1,
        shows=ACCESS,
    ),
    Fault(
        "predicate of a load",
        FORWARD,
        r"@(%p\d+ ld\.global\.v4)",
        r"@!\1",
        shows=f"{VALUES}|{ACCESS}",
    ),
    Fault(
        "lane of a row's shuffles",
        FORWARD,
        r"(shfl\.sync\.bfly\.b32 %r\d+, %r\d+), 2,",
        r"\1, 4,",
        nth=None,
        shows=VALUES,
    ),
    Fault(
        "length of a copy past the last key",
        FORWARD,
        r"(selp\.b32 %r\d+), 16, 0,",
        r"\1, 16, 16,",
        nth=None,
        shows=ACCESS,
    ),
    Fault(
        "sign of delta in dQ",
        DQ,
        r"sub\.f32",
        "add.f32",
        after=r"(?s)@%p\d+ bra.*?(mma_async|mma\.sync)",
        nth=None,
        shows=VALUES,
    ),
    Fault("barrier of the tangents", TANGENT, r"bar\.sync 0;", after=_WAIT, case=TANGENTS),
    Fault(
        "sign in the tangents' mean",
        TANGENT,
        r"sub\.f32",
        "add.f32",
        after=r"(?s)@%p\d+ bra.*?(mma_async|mma\.sync)",
        nth=None,
        case=TANGENTS,
        shows=VALUES,
    ),
    Fault(
        "lane of delta's sum", DELTA, r"(shfl\.sync\.bfly\.b32 \S+ \S+) 1,", r"\1 2,", shows=VALUES
    ),
    Fault(
        "barrier before the first copies",
        FORWARD,
        r"bar\.sync 0;",
        after=r"cp\.async\.commit_group;",
        shows=NOTHING,
        why="it orders the first tile's copy before the second's, which goes to another buffer",
    ),
]

_SM_80 = [
    Fault(
        "transposition of V",
        FORWARD,
        r"(ldmatrix\.sync\.aligned\.m8n8\.x4)\.trans",
        r"\1",
        after=_LOOP,
        shows=VALUES,
    ),
    Fault(
        "swizzle of K",
        FORWARD,
        r"(xor\.b32 %r\d+, %r\d+), 64;",
        r"\1, 32;",
        shows=f"{VALUES}|{RACE}",
    ),
    Fault(
        "accumulator cleared",
        FORWARD,
        r"(mma\.sync\S+ \{ (%r\d+),)",
        r"mov.b32 \2, 0;\n\1",
        after=r"ldmatrix\S*\.trans",
        shows=VALUES,
    ),
    Fault(
        "operands of mma exchanged",
        FORWARD,
        r"(mma\.sync\S+ \{[^}]*\}, \{[^}]*\}, \{) (%r\d+), (%r\d+) \}",
        r"\1 \3, \2 }",
        after=_LOOP,
        shows=VALUES,
    ),
    Fault(
        "buffer of the next tile",
        FORWARD,
        r"(setp\.gt\.s32 %p\d+, %r\d+), 1;",
        r"\1, 2;",
        after=r"\$L__BB0_2:",
        shows=f"{RACE}|{ACCESS}",
    ),
    Fault("transposition in dK/dV", DKDV, r"(x4)\.trans", r"\1", shows=VALUES, slow=True),
    Fault("transposition in dQ", DQ, r"(x4)\.trans", r"\1", shows=VALUES, slow=True),
]

_SM_90 = [
    Fault(
        "wait for the scores",
        FORWARD,
        r"wgmma\.wait_group\.sync\.aligned 0;",
        "wgmma.wait_group.sync.aligned 1;",
        shows=VALUES,
    ),
    Fault(
        "product not committed",
        FORWARD,
        r"wgmma\.commit_group\.sync\.aligned;",
        shows=f"{VALUES}|{RACE}",
    ),
    Fault(
        "fence in the loop", FORWARD, r"fence\.proxy\.async\S*;", after=_LOOP, shows="without fence"
    ),
    Fault(
        "fence of dK/dV",
        DKDV,
        r"fence\.proxy\.async\S*;",
        after=_WAIT,
        shows="without fence",
    ),
    Fault(
        "fence of dQ", DQ, r"fence\.proxy\.async\S*;", after=_LOOP, shows="without fence", slow=True
    ),
    Fault(
        "transposition of V",
        FORWARD,
        rf"({_WGMMA}\{{[^}}]*\}}, \{{[^}}]*\}}, %rd\d+, \S+, 1, 1,) 1;",
        r"\1 0;",
        shows=f"{VALUES}|{RACE}",
    ),
    Fault(
        "swizzle of the descriptor",
        FORWARD,
        r"or\.b64 (%rd\d+, %rd\d+), 4611686293305294848;",  # mode 1, 128 bytes
        r"or.b64 \1, -9223371761976868864;",  # mode 2, 64 bytes
        shows=f"{VALUES}|{RACE}",
    ),
    Fault(
        "accumulator not cleared",
        FORWARD,
        rf"({_WGMMA}\{{[^}}]*\}}, %rd\d+, %rd\d+,) 0,",
        r"\1 1,",
        shows=VALUES,
    ),
    Fault(
        "accumulator cleared",
        FORWARD,
        rf"({_WGMMA}\{{[^}}]*\}}, \{{[^}}]*\}}, %rd\d+,) %p\d+,",
        r"\1 0,",
        shows=VALUES,
    ),
    Fault(
        "fragments of P exchanged",
        FORWARD,
        rf"({_WGMMA}\{{[^}}]*\}}), \{{(%r\d+),(%r\d+),",
        r"\1, {\3,\2,",
        shows=VALUES,
    ),
    Fault(
        "wait of dK/dV's second product",
        DKDV,
        r"wgmma\.wait_group\.sync\.aligned 0;",
        "wgmma.wait_group.sync.aligned 1;",
        nth=1,
        shows=VALUES,
        slow=True,
    ),
    Fault(
        "last wait of dK/dV",
        DKDV,
        r"wgmma\.wait_group\.sync\.aligned 0;",
        nth=-1,
        shows=f"{VALUES}|{RACE}",
        slow=True,
    ),
    Fault(
        "phase of an mbarrier",
        FORWARD,
        r"(mbarrier\.try_wait\S+ complete, \[%r\d+\]), %r\d+;",
        r"\1, 1;",
        case=TMA,
    ),
    Fault(
        "wait for an mbarrier",
        FORWARD,
        r"mbarrier\.try_wait\S+ complete, [^;]*;\s*@!complete[^;]*;",
        case=TMA,
    ),
    Fault(
        "coordinate of a tile",
        FORWARD,
        r"(cp\.async\.bulk\.tensor\S+ \[%r\d+\], \[%rd\d+, \{%r\d+), %r\d+,",
        r"\1, 64,",
        after=_MBARRIER_LOOP,
        case=TMA,
        shows=VALUES,
    ),
    Fault(
        "head of a tile",
        FORWARD,
        r"(cp\.async\.bulk\.tensor\S+ \[%r\d+\], \[%rd\d+, \{%r\d+, %r\d+), %r\d+,",
        r"\1, 1,",
        after=_MBARRIER_LOOP,
        case=TMA,
        shows=VALUES,
        slow=True,
    ),
    Fault(
        "bytes of a transaction",
        FORWARD,
        r"(arrive\.expect_tx\S+ _, \[%r\d+\]), 8192;",
        r"\1, 4096;",
        case=TMA,
        shows=DEADLOCK,
    ),
    Fault(
        "arrivals of an mbarrier",
        FORWARD,
        r"(mbarrier\.init\S+ \[%r\d+\]), 1;",
        r"\1, 2;",
        case=TMA,
        shows=DEADLOCK,
        slow=True,
    ),
    Fault(
        "barriers before tensor copies",
        FORWARD,
        r"bar\.sync 0;(?=[\s\S]*mbarrier\.inval)",
        after=_MBARRIER_LOOP,
        nth=None,
        case=TMA,
    ),
    Fault(
        "first barrier before a tensor copy",
        FORWARD,
        r"bar\.sync 0;",
        after=r"(?s)mbarrier\.try_wait.*?wgmma\.commit_group.*?wgmma\.commit_group",
        case=TMA,
        shows=NOTHING,
        why="K's buffer was read by a product that every warp waited for before the barrier above",
        slow=True,
    ),
    Fault(
        "phase of an mbarrier in dK/dV",
        DKDV,
        r"(mbarrier\.try_wait\S+ complete, \[%r\d+\]), %r\d+;",
        r"\1, 1;",
        case=TMA,
        slow=True,
    ),
    Fault(
        "wgmma.fence",
        FORWARD,
        r"wgmma\.fence\.sync\.aligned;",
        nth=None,
        shows=NOTHING,
        why="it orders a warp's registers against its products; the emulator's registers are "
        "ordered by the program, so it can't tell whether a fence was needed",
    ),
    Fault(
        "mbarriers not invalidated",
        FORWARD,
        r"@%p\d+ mbarrier\.inval[^;]*;",
        nth=None,
        case=TMA,
        shows=NOTHING,
        why="their memory is not used again before the kernel ends",
        slow=True,
    ),
]

FAULTS = {80: [*_EVERYWHERE, *_SM_80], 90: [*_EVERYWHERE, *_SM_90]}
