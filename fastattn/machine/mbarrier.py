"""mbarriers: barriers in shared memory that count arrivals, and bytes that are to come.

A phase of an mbarrier is complete when so many have arrived as its count says and all bytes have
come that it was told to expect; the next one begins at once. Who waits names the parity of the
phase, so that he waits for good if he is a phase ahead, and not at all if he is one behind.
"""

from __future__ import annotations

from typing import cast

from .arithmetic import TYPES, Array
from .clocks import Agents, Clock
from .parser import Instruction, elements
from .translator import Step, Translator, instruction, not_here
from .warp import Wait, Warp, once

NBYTES = 8


class Mbarrier:
    """An mbarrier.

    Attributes:
        count: How many arrivals complete a phase.
        missing: How many are missing of the present one.
        bytes: How many bytes are missing; copies may be ahead of who expects them.
        phase: How many phases are complete.
        used: Whether anybody has arrived or waited.
    """

    def __init__(self, address: int, count: int, agents: Agents) -> None:
        self.address, self.count, self.missing = address, count, count
        self.bytes = self.phase = 0
        self.used = False
        self._agents = agents
        # What those know who have arrived in the present phase, and had in the one before.
        self._gathered, self.released = Clock(agents), Clock(agents)

    def arrive(self, count: int, clock: Clock) -> bool:
        """Count arrivals; False if there are more than there should be."""
        self._gathered.join(clock)
        self.missing -= count
        fits = self.missing >= 0
        self.missing = max(0, self.missing)
        self._complete()
        return fits

    def deliver(self, nbytes: int, agent: int, time: int) -> None:
        """Count bytes that have come, of a copy at one of its times."""
        self._gathered.seen[agent] = max(self._gathered.seen[agent], time)
        self.bytes -= nbytes
        self._complete()

    def _complete(self) -> None:
        if self.missing == 0 and self.bytes == 0:
            self.phase += 1
            self.missing = self.count
            self.released, self._gathered = self._gathered, Clock(self._agents)

    def has_completed(self, parity: int) -> bool:
        """Whether the phase of a parity is complete, so far as a parity can tell."""
        return self.phase % 2 != parity % 2

    def describe(self) -> str:
        """What is missing."""
        return (
            f"phase {self.phase} of the mbarrier at {self.address}, which lacks {self.missing} of "
            f"{self.count} arrivals and {self.bytes} bytes"
        )


@instruction("mbarrier.init", "shared shared::cta")
def initialise(t: Translator, i: Instruction) -> Step:
    """An mbarrier is made, for a number of arrivals."""

    def act(warp: Warp, threads: int, address: int, count: int) -> None:
        if threads > 1:
            warp.report(i, "mbarrier: several threads initialise it")
        if address % NBYTES or not 0 <= address <= warp.cta.size - NBYTES:
            raise not_here(i, f"there can be no mbarrier at {address}")
        granules = warp.cta.granules(address, NBYTES)
        warp.cta.forget_mbarriers(i, granules)
        now = int(warp.clock.seen[warp.index])
        warp.cta.history.write(i, granules, warp.clock, warp.index, now, ordinary=True)
        warp.cta.history.barriers[granules] = True
        warp.cta.mbarriers[address] = Mbarrier(address, count, warp.cta.agents)

    return once(t, i, act, t.address(i, i.operands[0]), t.bits(i, i.operands[1], TYPES["u32"]))


@instruction("mbarrier.inval", "shared shared::cta")
def invalidate(t: Translator, i: Instruction) -> Step:
    """An mbarrier is no more, and its memory free."""

    def act(warp: Warp, threads: int, address: int) -> None:
        find(warp, i, address)
        if any(load.mbarrier == address for load in warp.cta.loads):
            warp.report(i, "mbarrier: invalidated while a bulk load is on its way to it")
        granules = warp.cta.granules(address, NBYTES)
        now = int(warp.clock.seen[warp.index])
        warp.cta.history.write(i, granules, warp.clock, warp.index, now, ordinary=True)
        warp.cta.history.barriers[granules] = False
        del warp.cta.mbarriers[address]

    return once(t, i, act, t.address(i, i.operands[0]))


@instruction("mbarrier.arrive mbarrier.expect_tx", "expect_tx shared shared::cta release cta")
def arrive(t: Translator, i: Instruction) -> Step:
    """Threads arrive at an mbarrier, or tell it of bytes to come, or both."""
    arrives, expects = i.modifiers[0] == "arrive", "expect_tx" in i.modifiers
    operands = list(i.operands)
    if arrives and operands.pop(0) != "_":
        raise not_here(i, "the state of an arrival")
    amount = t.bits(i, operands[1] if len(operands) > 1 else "1", TYPES["u32"])

    def act(warp: Warp, threads: int, address: int, amount: int) -> None:
        mbarrier = find(warp, i, address)
        if expects:
            mbarrier.bytes += threads * amount
        if arrives:
            count = threads * (1 if expects else amount)
            if not mbarrier.arrive(count, warp.clock):
                what = f"more arrivals than the count of {mbarrier.count} in one phase"
                warp.report(i, f"mbarrier: {what}")
            warp.clock.tick(warp.index)

    return once(t, i, act, t.address(i, operands[0]), amount)


@instruction("mbarrier.try_wait.parity", "shared shared::cta acquire cta")
def wait(t: Translator, i: Instruction) -> Step:
    """Threads wait for the phase of a parity to complete.

    The instruction gives up after a time that PTX does not tell, and is repeated until the
    predicate that it sets is true; here it waits as long as it must.
    """
    predicate, *_ = elements(i.operands[0])
    succeed = t.assign_bits(i, predicate, TYPES["pred"], t.bits(i, "1", TYPES["pred"]))

    def act(warp: Warp, threads: int, address: int, parity: int) -> None:
        mbarrier = find(warp, i, address)
        succeed(warp)
        warp.wait(
            Wait(
                i,
                lambda: mbarrier.has_completed(parity),
                mbarrier.describe,
                lambda: warp.clock.join(mbarrier.released),
            )
        )

    places = t.address(i, i.operands[1]), t.bits(i, i.operands[2], TYPES["u32"])
    return once(t, i, act, *places)


def find(warp: Warp, i: Instruction, address: int) -> Mbarrier:
    """The mbarrier at an address, which a warp uses."""
    mbarrier = warp.cta.mbarriers.get(address)
    if mbarrier is None:
        raise not_here(i, f"mbarrier: there is none at {address} at this time")
    mbarrier.used = True
    now = int(warp.clock.seen[warp.index])
    warp.cta.history.read(i, warp.cta.granules(address, NBYTES), warp.clock, warp.index, now)
    return mbarrier


@instruction("fence.mbarrier_init", "release cluster")
def order_initialisation(t: Translator, i: Instruction) -> None:
    """mbarriers become known to bulk copies, which here must find them."""


@instruction("setmaxnreg", "inc dec sync aligned")
def move_registers(t: Translator, i: Instruction) -> Step:
    """A warp gives registers to the pool of its CTA, or waits until it can take some from it."""
    wanted, sign = int(i.operands[0]), 1 if "inc" in i.modifiers else -1

    def step(warp: Warp) -> None:
        if warp.held is None:
            raise not_here(i, "how many registers the kernel begins with is not told")
        if (wanted - warp.held) * sign < 0:
            raise not_here(i, f"registers: from {warp.held} of them to {wanted}")
        needed = warp.threads * (wanted - warp.held)

        def take() -> None:
            warp.held = wanted
            warp.cta.pool -= needed

        def describe() -> str:
            return f"{needed} registers, of which the pool has {warp.cta.pool}"

        if needed <= 0:
            take()
        else:
            warp.wait(Wait(i, lambda: warp.cta.pool >= needed, describe, take))

    return cast(Step, step)


@instruction("elect.sync")
def elect(t: Translator, i: Instruction) -> Step:
    """One thread of the warp is chosen."""
    number, predicate = i.operands[0].split("|")
    check = t.require_whole_warps(i)

    def leader(warp: Warp) -> Array:
        return warp.spread(warp.special["%laneid"] * 0 + warp.leader)

    def is_leader(warp: Warp) -> Array:
        return warp.special["%laneid"] == warp.leader

    words, flags = TYPES["u32"], TYPES["pred"]
    assign = t.assign_bits(i, number, words, cast("type", leader))
    choose = t.assign_bits(i, predicate, flags, cast("type", is_leader))

    def step(warp: Warp) -> None:
        check(warp)
        assign(warp)
        choose(warp)

    return cast(Step, step)
