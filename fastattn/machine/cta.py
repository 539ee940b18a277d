"""A CTA whose warps go their own ways, with all that they share and all that is under way.

What can happen next is a warp's next block, a warp's next product, or the arrival of a part of a
bulk load. One of these is chosen at a time, until nothing is left; if something is left that cannot
happen, the CTA is in a deadlock, and who waits for what is told.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from .arithmetic import Array
from .clocks import Agents, Clock, History
from .group import Launch
from .mbarrier import NBYTES, Mbarrier
from .parser import Instruction, PtxError
from .schedule import Chooser, Event
from .warp import LANES, Warp

MOST_STEPS = 2_000_000
"""After so many events a CTA is taken to run forever."""


class NamedBarrier:
    """One of the sixteen barriers of a CTA, at which a number of threads wait for each other.

    Attributes:
        turn: How often it has opened.
        opened: What all knew who were there, by turn.
    """

    def __init__(self, number: int, agents: Agents) -> None:
        self.number, self.turn = number, 0
        self.opened: dict[int, Clock] = {}
        self._agents = agents
        self._warps: list[int] = []
        self._threads = 0
        self._gathered = Clock(agents)

    def arrive(self, warp: Warp, i: Instruction, threads: int) -> int:
        """Count a warp, and return the turn that it waits for the end of."""
        if self._warps and threads != self._threads:
            what = f"{threads} threads, where others come with {self._threads}"
            warp.report(i, f"barrier: barrier {self.number} for {what}")
        if warp.index in self._warps:
            warp.report(i, f"barrier: warp {warp.index} comes to barrier {self.number} twice")
        self._warps.append(warp.index)
        self._threads = threads
        self._gathered.join(warp.clock)
        warp.clock.tick(warp.index)
        turn = self.turn
        if LANES * len(self._warps) >= threads:
            self.opened[turn] = self._gathered
            self.turn, self._warps, self._gathered = turn + 1, [], Clock(self._agents)
        return turn

    def describe(self) -> str:
        """Who is there."""
        warps = sorted(self._warps)
        return f"{self._threads} threads at barrier {self.number}, where warps {warps} are"


@dataclass(eq=False)
class Load:
    """A bulk load under way.

    Attributes:
        instruction: The instruction.
        mbarrier: The address of the mbarrier that counts its bytes.
        parts: What has yet to arrive: which bytes, and what they will be; None if they are so.
        agent: Who writes them, see `Agents`.
        time: At which of its times.
    """

    instruction: Instruction
    mbarrier: int
    parts: list[tuple[Array, Array | None]]
    agent: int
    time: int


class CTA:
    """A CTA.

    Attributes:
        number: Which of the grid it is.
        bytes: Its shared memory.
        history: Who touched it.
        mbarriers: Those that are in it, by address.
        pool: How many registers no warp has.
        loads: The bulk loads under way.
        loads_begun: How many there have been, by destination.
        products: The line and descriptors of each warpgroup's products, by their order.
        fields: The tensor maps that are being written, by address, field and index.
    """

    def __init__(self, launch: Launch, number: int) -> None:
        program = launch.program
        warps = program.kernel.threads // LANES
        self.launch, self.number = launch, number
        self.size, self.granule = launch.shared_bytes, program.granule
        self.stride = -(-self.size // 16) * 16 + 16
        # All bits set: NaN as a float of any width.
        self.bytes = np.full((1, self.stride), 0xFF, np.uint8)
        self.agents = Agents(warps)
        granules = self.stride // self.granule
        self.history = History(granules, self.granule, self.agents, launch.report)
        self.chooser = Chooser(launch.schedule, number)
        self.mbarriers: dict[int, Mbarrier] = {}
        self.pool = 0
        self.loads: list[Load] = []
        self.loads_begun: dict[int, int] = {}
        self.products: dict[tuple[int, int], tuple[int, list[int]]] = {}
        self.fields: dict[int, dict[str, dict[int, int]]] = {}
        self._barriers: dict[int, NamedBarrier] = {}
        self.warps = [Warp(self, index) for index in range(warps)]

    def granules(self, first: int, nbytes: int) -> Array:
        """The granules of some bytes."""
        return np.arange(first // self.granule, -(-(first + nbytes) // self.granule))

    def barrier_number(self, number: int) -> NamedBarrier:
        """One of the named barriers."""
        return self._barriers.setdefault(number, NamedBarrier(number, self.agents))

    def forget_mbarriers(self, i: Instruction, granules: Array) -> None:
        """Something else is written where mbarriers may be, of which only unused ones may go."""
        if not self.history.barriers[granules].any():
            return
        for address, mbarrier in list(self.mbarriers.items()):
            own = self.granules(address, NBYTES)
            if np.isin(own, granules).any():
                if mbarrier.used:
                    self.launch.report(i, f"mbarrier: overwrites the one at {address}, in use")
                self.history.barriers[own] = False
                del self.mbarriers[address]

    # What happens next.

    def run(self) -> None:
        """Run to the end."""
        for _ in range(MOST_STEPS):
            events = self._events()
            if not events:
                break
            self._happen(self.chooser.choose(events))
        else:
            raise PtxError(f"after {MOST_STEPS} steps the CTA has not ended")
        if not all(warp.ended for warp in self.warps):
            raise PtxError(self._describe_deadlock())
        self._require_an_end()

    def _events(self) -> list[Event]:
        warps = [Event("warp", warp.index) for warp in self.warps if warp.ready]
        products = [Event("product", warp.index) for warp in self.warps if warp.next_product]
        return [*warps, *products, *(Event("copy", n) for n in range(len(self.loads)))]

    def _happen(self, event: Event) -> None:
        match event.kind:
            case "warp":
                self.warps[event.number].step()
            case "product":
                self.warps[event.number].multiply()
            case _:
                self._land(self.loads[event.number])

    def _land(self, load: Load) -> None:
        """A part of a bulk load arrives, one of those that are on their way."""
        part = self.chooser.draw(load.parts)
        load.parts = [other for other in load.parts if other is not part]
        places, values = part
        if values is not None:
            self.bytes.reshape(-1)[places] = values
        if not load.parts:
            self.loads.remove(load)
        mbarrier = self.mbarriers.get(load.mbarrier)
        if mbarrier is None:
            what = f"mbarrier: a bulk load arrives at {load.mbarrier}, where there is none"
            self.launch.report(load.instruction, what)
        else:
            mbarrier.deliver(len(places), load.agent, load.time)

    def _describe_deadlock(self) -> str:
        waiting: dict[str, list[int]] = defaultdict(list)
        for warp in self.warps:
            if warp.waiting is not None:
                i = warp.waiting.instruction
                waiting[f"at {i.place} for {warp.waiting.describe()}: {i}"].append(warp.index)
        who = [f"warps {warps} wait {why}" for why, warps in waiting.items()]
        return "\n    ".join([f"deadlock: CTA {self.number} cannot go on", *who])

    def _require_an_end(self) -> None:
        """Report what is left under way."""
        for warp in self.warps:
            first = warp.index // 4 * 4
            for other in self.warps[first : first + 4]:
                if warp.latest and warp.begun > other.begun:
                    what = f"product: warp {other.index} of the warpgroup has not come here"
                    warp.report(warp.latest.instruction, what)
            for product in warp.products.running():
                warp.report(product.instruction, "end: a product that is never waited for")
                break
            warp.stores.commit()
            for store in itertools.chain(*warp.stores.groups):
                warp.report(store.instruction, "end: a bulk store that is never waited for")
            warp.stores.wait(0)


def run(launch: Launch) -> None:
    """Run all CTAs of a launch, one after the other."""
    width, height, depth = launch.grid
    with np.errstate(all="ignore"):
        for number in range(width * height * depth):
            CTA(launch, number).run()
