"""What happened before what: vector clocks, and who touched shared memory at which of his times.

Whether two accesses are ordered must not hang on who happened to come first in one run. So every
agent (a warp, or something that it has set going) counts its own time, and knows of each other up
to which of that one's times it is bound to come later. Barriers hand such knowledge on. An access
that its follower does not know of is a race, in whatever order the two were run.

What threads write by ordinary instructions, products and bulk copies see only after a fence between
the two ways to memory (a proxy fence). So a clock has a second part: up to where a fence has
covered what the agent knows of.
"""

from __future__ import annotations

import numpy as np

from .arithmetic import Array
from .memory import Report
from .parser import Instruction, PtxError

LOADS = 128
"""How many places in shared memory bulk copies may have as their destinations."""

NOBODY = -1


class Agents:
    """Those who touch the shared memory of a CTA, by number.

    A warp's products end in order, and so do its bulk stores and its copies (cp.async). Bulk loads
    do not, so that each destination is an agent.
    """

    def __init__(self, warps: int) -> None:
        self.warps = warps
        self.readers = 3 * warps
        self.count = 4 * warps + LOADS
        self._loads: dict[int, int] = {}

    def products_of(self, warp: int) -> int:
        """The agent of a warp's products."""
        return self.warps + warp

    def stores_of(self, warp: int) -> int:
        """The agent of a warp's bulk stores."""
        return 2 * self.warps + warp

    def copies_of(self, warp: int) -> int:
        """The agent of a warp's copies."""
        return 3 * self.warps + warp

    def load_to(self, address: int) -> int:
        """The agent of bulk loads to an address."""
        number = self._loads.setdefault(address, len(self._loads))
        if number >= LOADS:
            raise PtxError(f"this machine knows no more than {LOADS} places of bulk loads")
        return 4 * self.warps + number

    def name(self, agent: int) -> str:
        """What an agent is called in a report."""
        kind, warp = divmod(agent, self.warps)
        whose = ("warp", "a product of warp", "a bulk store of warp", "a copy of warp")
        return f"{whose[kind]} {warp}" if kind < 4 else "a bulk load"


class Clock:
    """What somebody knows.

    Attributes:
        seen: For each agent, up to which of its times it is bound to have happened before.
        fenced: For each agent, up to which of its times a proxy fence has covered it.
    """

    def __init__(self, agents: Agents) -> None:
        self.seen = np.zeros(agents.count, np.int32)
        self.fenced = np.zeros(agents.count, np.int32)

    def join(self, other: Clock) -> None:
        """Know what another knows, too."""
        np.maximum(self.seen, other.seen, out=self.seen)
        np.maximum(self.fenced, other.fenced, out=self.fenced)

    def fence(self) -> None:
        """Cover all that is known."""
        np.maximum(self.fenced, self.seen, out=self.fenced)

    def tick(self, agent: int) -> int:
        """Begin an agent's next time."""
        self.seen[agent] += 1
        return int(self.seen[agent])


class History:
    """Who wrote each granule of a CTA's shared memory last, and who has read it since.

    Attributes:
        writer: The agent that wrote it, and when, and in which line.
        ordinary: Whether it was written by ordinary instructions rather than asynchronous ones.
        reads: For each agent when it has read it last, and in which line.
        barriers: Whether it is part of an mbarrier.
    """

    def __init__(self, granules: int, granule: int, agents: Agents, report: Report) -> None:
        self.granule, self.agents, self.report = granule, agents, report
        self.writer = np.full(granules, NOBODY, np.int16)
        self.write_time, self.write_line = np.zeros(granules, "i4"), np.zeros(granules, "i4")
        self.ordinary, self.barriers = np.zeros(granules, bool), np.zeros(granules, bool)
        self.read_time = np.zeros((granules, agents.readers), np.int32)
        self.read_line = np.zeros((granules, agents.readers), np.int32)
        self._places: dict[int, str] = {}

    def read(
        self,
        i: Instruction,
        granules: Array,
        clock: Clock,
        reader: int,
        time: int,
        *,
        asynchronous: bool = False,
    ) -> None:
        """Hold a read by an agent at one of its times against what was written; remember it."""
        writer = self.writer[granules]
        wrote, when = writer != NOBODY, self.write_time[granules]
        self._hold(i, granules, wrote & (clock.seen[writer] < when), "reads")
        if asynchronous:
            hidden = wrote & self.ordinary[granules] & (clock.fenced[writer] < when)
            if hidden.any():
                what = self._last_write(granules[hidden][0])
                self.report(i, f"proxy: reads what {what} with no fence.proxy.async since")
        self.read_time[granules, reader] = time
        self.read_line[granules, reader] = i.line
        self._places[i.line] = i.place

    def write(
        self,
        i: Instruction,
        granules: Array,
        clock: Clock,
        writer: int,
        time: int,
        *,
        ordinary: bool,
        changed: Array | bool = True,
    ) -> None:
        """Hold a write, which changed some granules, against all that was done; remember it."""
        before = self.writer[granules]
        late = (before != NOBODY) & (clock.seen[before] < self.write_time[granules])
        self._hold(i, granules, late & changed, "overwrites")
        late = self.read_time[granules] > clock.seen[: self.agents.readers]
        if late.any():
            number, reader = np.argwhere(late)[0]
            at = granules[number]
            line = self._places[int(self.read_line[at, reader])]
            who = f"{self.agents.name(int(reader))} reads in {line}"
            where = f"at shared byte {at * self.granule}"
            self.report(i, f"race: overwrites what {who}, with no order between, {where}")
        # Whoever comes after this write comes after what this write came after.
        self.read_time[granules] = 0
        self.writer[granules], self.write_time[granules] = writer, time
        self.write_line[granules], self.ordinary[granules] = i.line, ordinary
        self._places[i.line] = i.place

    def unfenced(self, granules: Array, clock: Clock) -> str | None:
        """Who wrote some of the granules by ordinary instructions that no proxy fence covers."""
        writer = self.writer[granules]
        hidden = self.ordinary[granules] & (clock.fenced[writer] < self.write_time[granules])
        return self._last_write(granules[hidden][0]) if hidden.any() else None

    def _hold(self, i: Instruction, granules: Array, late: Array, does: str) -> None:
        if late.any():
            at = granules[late][0]
            where = f"at shared byte {at * self.granule}"
            what = f"{does} what {self._last_write(at)}, with no order between, {where}"
            self.report(i, f"race: {what}")

    def _last_write(self, at: int) -> str:
        line = self._places[int(self.write_line[at])]
        return f"{self.agents.name(int(self.writer[at]))} writes in {line}"
