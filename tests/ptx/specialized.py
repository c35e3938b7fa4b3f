"""Faults planted into the warp-specialised kernel, whose waits Triton does not write."""

from __future__ import annotations

from functools import partial

from tests.ptx.faults import DEADLOCK, RACE, VALUES, Fault

GQA = "bf16 specialized causal GQA"  # three tiles of keys: the third reuses the first one's buffer
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
