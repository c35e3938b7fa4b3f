"""Faults planted into the warp-specialised kernels, whose waits Triton does not write."""

from __future__ import annotations

from functools import partial

from tests.ptx.faults import DEADLOCK, RACE, VALUES, Fault

GQA = "bf16 specialized causal GQA"  # three tiles of keys: the third reuses the first one's buffer
GRADIENTS = "bf16 specialized gradients GQA"  # two tiles of queries of two heads, three of keys
LOW_HEAD = "bf16 specialized gradients low head"
_fault = partial(Fault, kernel="hopper_forward_kernel", case=GQA)

_WAIT = r"mbarrier\.try_wait\S+ complete, [^;]*;\s*@!complete[^;]*;"
_COPY = r"cp\.async\.bulk\.tensor\S+ "
_WGMMA = r"wgmma\.mma_async\S+ "
_MORE = "more arrivals than the mbarrier"  # of the next use, in the phase of this one

SPECIALIZED_FAULTS = [
    # The consumers. In the text of each stand the waits for q, for the first k, for the second k,
    # and those of the loop for v and for the next k.
    _fault("wait for the queries", find=_WAIT, seeds=8, slow=True),
    _fault("wait for the first keys", find=_WAIT, nth=1),
    _fault("wait for the next keys", find=_WAIT, nth=2, seeds=8, slow=True),
    _fault("wait for the values", find=_WAIT, nth=3, seeds=8, slow=True),
    _fault(
        "phase of the first keys",
        find=r"(mbarrier\.try_wait\S+ complete, \[%r\d+\]), %r\d+;",
        replace=r"\1, 1;",
        nth=1,
    ),
    _fault(
        "wait for the scores",
        find=r"wgmma\.wait_group\.sync\.aligned 1;",
        nth=None,
        shows=f"{VALUES}|{RACE}",
        slow=True,
    ),
    _fault(
        "wait for the values' product",
        find=r"wgmma\.wait_group\.sync\.aligned 0;",
        after=r"wgmma\.wait_group\.sync\.aligned 1;",
    ),
    _fault(
        "barrier before the first keys are freed",
        find=r"bar\.sync \d, 128;",
        after=r"wgmma\.wait_group\.sync\.aligned 0;",
    ),
    _fault(
        "scores not cleared",
        find=rf"({_WGMMA}\{{[^}}]*\}}, %rd\d+, %rd\d+,) 0,",
        replace=r"\1 1,",
        nth=None,
        shows=VALUES,
    ),
    _fault(
        "accumulator cleared",
        find=rf"({_WGMMA}\{{[^}}]*\}}, \{{[^}}]*\}}, %rd\d+,) %p\d+,",
        replace=r"\1 0,",
        nth=None,
        shows=VALUES,
        slow=True,
    ),
    _fault(
        "mask comparison off by one",
        find=r"setp\.lt(\.s32 %p\d+, %r\d+, (?P<limit>%r\d+);)",
        replace=r"setp.le\1",
        nth=None,
        shows=VALUES,
    ),
    # The producer: copies of two tiles of q, then the loop's waits and copies of k and v.
    _fault("buffer of keys reused early", find=_WAIT, after=_COPY, shows=f"{RACE}|{_MORE}"),
    _fault(
        "buffer of values reused early",
        find=_WAIT,
        after=_COPY,
        nth=1,
        shows=f"{RACE}|{_MORE}",
        slow=True,
    ),
    _fault(
        "coordinate of the keys",
        find=rf"({_COPY}\[%r\d+\], \[%rd\d+, \{{%r\d+), %r\d+,",
        replace=r"\1, 64,",
        nth=2,
        shows=VALUES,
    ),
    _fault(
        "bytes of a transaction",
        find=r"(arrive\.expect_tx\S+ _, \[%r\d+\]), 16384;",
        replace=r"\1, 8192;",
        shows=f"{DEADLOCK}|{RACE}",
    ),
    # The barriers.
    _fault(
        "arrivals that free the keys",
        find=r"(mbarrier\.init\S+ \[%r\d+\]), 2;",
        replace=r"\1, 1;",
        shows=f"{RACE}|{_MORE}",
    ),
    _fault("fence of the barriers", find=r"fence\.proxy\.async\S*;", shows="without fence"),
]

_dkdv = partial(Fault, kernel="hopper_dkdv_kernel", case=GRADIENTS, slow=True)
_dq = partial(Fault, kernel="hopper_dq_kernel", case=GRADIENTS, slow=True)
_PHASE = r"(mbarrier\.try_wait\S+ complete, \[%r\d+\]), %r\d+;"
_NOT_CLEARED = {
    "find": rf"({_WGMMA}\{{[^}}]*\}}, %rd\d+, %rd\d+,) 0,",
    "replace": r"\1 1,",
    "nth": None,
    "shows": VALUES,
}
_CLEARED = {
    "find": rf"({_WGMMA}\{{[^}}]*\}}, \{{[^}}]*\}}, %rd\d+,) %p\d+,",
    "replace": r"\1 0,",
    "shows": VALUES,
}
_ROW = rf"({_COPY}\[%r\d+\], \[%rd\d+, \{{%r\d+), %r\d+,"
_HEAD = rf"({_COPY}\[%r\d+\], \[%rd\d+, \{{%r\d+, %r\d+), %r\d+,"
_GROUP = r"wgmma\.wait_group\.sync\.aligned {};"
_BARRIER = r"bar\.sync \d, 128;"
_ARRIVALS = {"find": r"(mbarrier\.init\S+ \[%r\d+\]), 2;", "replace": r"\1, 1;"}

# In the text stand what consumer 1 waits for: its keys, queries, gradients; then the producer.
DKDV_FAULTS = [
    _dkdv("dK/dV: wait for the held keys", find=_WAIT, nth=1),
    _dkdv("dK/dV: wait for the queries", find=_WAIT, nth=2, seeds=8),
    _dkdv("dK/dV: wait for the gradients", find=_WAIT, nth=3, seeds=8),
    _dkdv(
        "dK/dV: phase of the queries",
        find=_PHASE,
        replace=r"\1, 0;",
        nth=2,
        shows=f"{RACE}|{DEADLOCK}",
    ),
    _dkdv(
        "dK/dV: wait for the scores",
        find=_GROUP.format(2),
        nth=None,
        shows=f"{VALUES}|{RACE}",
    ),
    _dkdv(
        "dK/dV: wait for dp",
        find=_GROUP.format(1),
        nth=None,
        shows=f"{VALUES}|{RACE}",
    ),
    _dkdv("dK/dV: wait for dv", find=_GROUP.format(0)),
    _dkdv("dK/dV: barrier before the queries are freed", find=_BARRIER, after=_GROUP.format(1)),
    _dkdv("dK/dV: barrier before the gradients are freed", find=_BARRIER, after=_GROUP.format(0)),
    _dkdv("dK/dV: scores not cleared", **_NOT_CLEARED),
    _dkdv("dK/dV: dv cleared", **_CLEARED),
    _dkdv("dK/dV: dk cleared", nth=4, **_CLEARED),
    _dkdv(
        "dK/dV: mask comparison off by one",
        find=r"setp\.le(\.s32 %p\d+, (?P<limit>%r\d+), %r\d+;)",
        replace=r"setp.lt\1",
        nth=None,
        shows=VALUES,
    ),
    _dkdv(
        "dK/dV: rows of the next head visible",
        find=r"setp\.lt(\.s32 %p\d+, %r\d+, (?P<limit>%r\d+);)",
        replace=r"setp.ne\1",
        nth=None,
        case=LOW_HEAD,
        shows=VALUES,
    ),
    _dkdv(
        "dK/dV: gradients reused early",
        find=_WAIT,
        after=_COPY,
        shows=f"{RACE}|{_MORE}",
        slow=False,
    ),
    _dkdv("dK/dV: queries reused early", find=_WAIT, after=_COPY, nth=1, shows=f"{RACE}|{_MORE}"),
    _dkdv("dK/dV: row of the queries", find=_ROW, replace=r"\1, 8,", nth=5, shows=VALUES),
    _dkdv("dK/dV: head of the queries", find=_HEAD, replace=r"\1, 0,", nth=5, shows=VALUES),
    _dkdv(
        "dK/dV: row of the shift",
        find=rf"({_COPY}\[%r\d+\], \[%rd\d+, \{{)%r\d+\}}",
        replace=r"\g<1>8}",
        nth=1,
        shows=VALUES,
    ),
    _dkdv(
        "dK/dV: bytes without the shift",
        find=r"(arrive\.expect_tx\S+ _, \[%r\d+\]), 8448;",
        replace=r"\1, 8192;",
        nth=1,
        shows=f"{DEADLOCK}|{RACE}",
    ),
    _dkdv("dK/dV: arrivals that free the queries", shows=f"{RACE}|{_MORE}", **_ARRIVALS),
    _dkdv("dK/dV: fence of the barriers", find=r"fence\.proxy\.async\S*;", shows="without fence"),
]

# Consumer 0 waits for its queries, the first values, the keys, the next values.
DQ_FAULTS = [
    _dq("dQ: wait for the held queries", find=_WAIT),
    _dq("dQ: wait for the first values", find=_WAIT, nth=1, seeds=8),
    _dq("dQ: wait for the keys", find=_WAIT, nth=2, seeds=8),
    _dq("dQ: wait for the next values", find=_WAIT, nth=3, seeds=8, slow=False),
    _dq(
        "dQ: phase of the keys",
        find=_PHASE,
        replace=r"\1, 0;",
        nth=2,
        shows=f"{RACE}|{DEADLOCK}",
    ),
    _dq("dQ: wait for the scores", find=_GROUP.format(2), nth=None, shows=f"{VALUES}|{RACE}"),
    _dq("dQ: wait for dp", find=_GROUP.format(0), after=_GROUP.format(2), shows=f"{VALUES}|{RACE}"),
    _dq("dQ: barrier before the keys are freed", find=_BARRIER, after=_GROUP.format(0)),
    _dq("dQ: scores not cleared", **_NOT_CLEARED),
    _dq("dQ: dq cleared", **_CLEARED),
    _dq(
        "dQ: mask comparison off by one",
        find=r"setp\.le(\.s32 %p\d+, %r\d+, (?P<limit>%r\d+);)",
        replace=r"setp.lt\1",
        nth=None,
        shows=VALUES,
    ),
    _dq("dQ: values reused early", find=_WAIT, after=_COPY, shows=f"{RACE}|{_MORE}"),
    _dq("dQ: keys reused early", find=_WAIT, after=_COPY, nth=1, shows=f"{RACE}|{_MORE}"),
    _dq("dQ: row of the keys", find=_ROW, replace=r"\1, 8,", nth=5, shows=VALUES),
    _dq(
        "dQ: bytes of the keys",
        find=r"(arrive\.expect_tx\S+ _, \[%r\d+\]), 8192;",
        replace=r"\1, 4096;",
        nth=1,
        shows=f"{DEADLOCK}|{RACE}",
    ),
    _dq("dQ: arrivals that free the keys", shows=f"{RACE}|{_MORE}", **_ARRIVALS),
    _dq("dQ: fence of the barriers", find=r"fence\.proxy\.async\S*;", shows="without fence"),
]

BACKWARD_FAULTS = [*DKDV_FAULTS, *DQ_FAULTS]
