"""The race check: who wrote and read each piece of shared memory, and who may know of it.

PTX ISA 8 (Memory consistency model): two accesses to the same bytes, one of them a write, must be
ordered. Vector clocks decide that. Warp w has a clock ``clock[w]``; ``clock[w, v]`` is the last
step of warp v that w may know of. ``bar.sync`` merges the clocks of the warps that meet; an
mbarrier hands those of the threads that arrived to the threads that wait. An access is ordered
after a write of v at step t when ``clock[w, v] >= t``.

The unit is the *granule*, the least number of bytes that any instruction of the program touches.
Threads of one warp are not told apart: they run in step, and what orders them (``bar.warp.sync``)
is not checked. A write of the value that is there already (Triton lets several warps store the
same element) is not held against another warp's write.
"""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np

from tests.ptx.formats import Array, Mask, Race, i2, i4, i8

# The step of what is not complete: later than every clock.
IN_FLIGHT = np.iinfo(np.int32).max


class Shadow:
    """What is known of the shared memory of the CTAs that run at once.

    Args:
        ctas: how many there are.
        warps: of one CTA; writer number ``warps`` is TMA.
        nbytes: shared memory of one CTA.
        granule: bytes that are always touched together.
        on: False turns every check off.
        fences: False turns off that wgmma needs ``fence.proxy.async`` after other writes.
    """

    def __init__(
        self, ctas: int, warps: int, nbytes: int, granule: int, *, on: bool, fences: bool
    ) -> None:
        self.on, self.warps = on, warps
        self._fences, self._granule, self._per_cta = on and fences, granule, nbytes // granule
        n = ctas * self._per_cta if on else 0
        self._writer = np.full(n, -1, i2)
        self._written = np.full(n, IN_FLIGHT, i4)
        self._read = np.zeros((n, warps), i4)
        self._unfenced = np.zeros(n, np.bool_)
        steps = np.arange(warps + 1)
        self._clock = np.zeros((ctas, warps + 1, warps + 1), i4)
        self._clock[:, steps, steps] = 1

    # Clocks.

    def meet(self, cta: int, warps: list[int]) -> None:
        """``bar.sync``: these warps know what each of them knew."""
        self._clock[cta, warps] = self._clock[cta, warps].max(0)
        for w in warps:
            self._clock[cta, w, w] += 1

    def release(self, cta: int, warp: int) -> Array:
        """What a warp that arrives at an mbarrier hands over; its next accesses are later."""
        known = self._clock[cta, warp].copy()
        self._clock[cta, warp, warp] += 1
        return known

    def release_transfer(self, cta: int) -> Array:
        """The same of a tensor copy: its own writes, and nothing that its issuer knew."""
        known = np.zeros_like(self._clock[cta, -1])
        known[-1] = self._clock[cta, -1, -1]
        self._clock[cta, -1, -1] += 1
        return known

    def acquire(self, cta: int, warp: int, known: Array) -> None:
        """A warp learns what an mbarrier hands over."""
        self._clock[cta, warp] = np.maximum(self._clock[cta, warp], known)

    # Accesses, at byte offsets ``flat`` in the memory of all CTAs.

    def check_read(self, x: Any, flat: Array, nbytes: int, until: int | None = None) -> None:
        """A read by warp ``x``; ``until=IN_FLIGHT`` where it goes on after its instruction.

        Raises:
            Race: If the last write is not ordered before it, or there was none.
        """
        if not self.on:
            return
        cta, g = self._granules(flat, nbytes)
        writer, written = self._writer[g], self._written[g]
        bad = written > self._clock[cta, x.warp, writer]
        if bad.any():
            at = tuple(np.argwhere(bad)[0])
            if writer[at] < 0:
                what = "reads shared memory that nobody has written"
            elif written[at] == IN_FLIGHT:
                what = "reads what an asynchronous copy still writes"
            else:
                what = "reads what another warp wrote, without a barrier between"
            self._fail(g[at], x, what)
        self._read[g, x.warp] = self._clock[cta, x.warp, x.warp] if until is None else until

    def check_write(
        self,
        x: Any,
        flat: Array,
        nbytes: int,
        changes: Any = True,
        until: int | None = None,
        writer: int | None = None,
    ) -> None:
        """A write by warp ``x``, or on its behalf by ``writer``.

        Args:
            x: the warp.
            flat: where, per access.
            nbytes: of one access.
            changes: per access, whether it alters any byte.
            until: ``IN_FLIGHT`` where it goes on after its instruction.
            writer: TMA's number, for a tensor copy.

        Raises:
            Race: If another write, or a read, is not ordered before it.
        """
        if not self.on:
            return
        cta, g = self._granules(flat, nbytes)
        known = self._clock[cta, x.warp]
        before, written = self._writer[g], self._written[g]
        knows = np.take_along_axis(known, before[..., None].astype(i8), -1)[..., 0]
        bad = (written > knows) & (before >= 0)
        bad &= (written == IN_FLIGHT) | np.asarray(changes)[..., None]
        if bad.any():
            what = "writes over what another warp, or an asynchronous copy, wrote"
            self._fail(g[bad][0], x, f"{what}, without a barrier or wait between")
        bad = (self._read[g] > known[..., : self.warps]).any(-1)
        if bad.any():
            what = "writes over what another warp has read, or a wgmma still reads"
            self._fail(g[bad][0], x, f"{what}, without a barrier or wait between")
        self._writer[g] = x.warp if writer is None else writer
        self._written[g] = known[..., x.warp] if until is None else until
        self._unfenced[g] = writer is None

    def settle_write(self, x: Any, flat: Array, nbytes: int) -> None:
        """The end of a write by cp.async: warp ``x`` has waited for it."""
        if self.on:
            cta, g = self._granules(flat, nbytes)
            self._written[g] = self._clock[cta, x.warp, x.warp]

    def settle_transfer(self, cta: int, flat: Array, nbytes: int) -> None:
        """The end of a write by TMA."""
        if self.on:
            self._written[self._granules(flat, nbytes)[1]] = self._clock[cta, -1, -1]

    def settle_read(self, x: Any, flat: Array, nbytes: int) -> None:
        """The end of a read by wgmma."""
        if self.on:
            cta, g = self._granules(flat, nbytes)
            self._read[g, x.warp] = self._clock[cta, x.warp, x.warp]

    # Proxies (8.2.2): wgmma reads through the async proxy, st and cp.async write through another.

    def fence(self, x: Any, m: Mask) -> None:
        """``fence.proxy.async``: covers the writes that the warp knows of, not those in flight.

        The ISA wants the fence in the thread that wrote. Here any warp's will do that is ordered
        after the write, as Triton and CUTLASS use it on either side of the barrier.
        """
        if not self.on:
            return
        for cta in np.flatnonzero(x.whole_warps(m)):
            part = slice(cta * self._per_cta, (cta + 1) * self._per_cta)
            knows = self._clock[cta, x.warp, self._writer[part]]
            self._unfenced[part] &= self._written[part] > knows

    def check_fence(self, x: Any, flat: Array, nbytes: int, does: str) -> None:
        """A read by wgmma, or of an mbarrier by a tensor copy; the error says what the warp does.

        Raises:
            Race: If something was written there without a fence since.
        """
        if self._fences:
            _, g = self._granules(flat, nbytes)
            bad = self._unfenced[g]
            if bad.any():
                self._fail(g[bad][0], x, f"{does} without fence.proxy.async")

    def _granules(self, flat: Array, nbytes: int) -> tuple[Array, Array]:
        """(CTAs, granules) of accesses."""
        g = flat[..., None] // self._granule + np.arange(max(nbytes // self._granule, 1))
        return g // self._per_cta, g

    def _fail(self, g: Any, x: Any, what: str) -> NoReturn:
        cta, offset = x.machine.first + g // self._per_cta, g % self._per_cta * self._granule
        raise Race(
            f"CTA {cta}, warp {x.warp} {what} "
            f"(shared byte {offset}, last writer warp {self._writer[g]})"
        )
