"""CTAs that run a kernel in lockstep, all threads of all of them at once.

A register is an array with a row for each CTA and a column for each thread, or with one row or
column for all where they agree. Where the threads of a CTA part ways, those in the earliest block
go first, the others wait, and they go on together as soon as they meet; where whole CTAs part ways,
the group is parted.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import numpy as np

from .arithmetic import Array
from .memory import Accesses, Memory, Report, ignore
from .parser import Instruction, PtxError
from .schedule import DEFAULT_SCHEDULE, Schedule
from .shared import Shared, SharedMemory
from .tensormap import TensorMap
from .translator import Translator
from .warpgroup import Product, Products

ENDED = -1


@dataclass(frozen=True)
class Launch:
    """What the CTAs of a launch have in common.

    Attributes:
        program: The kernel.
        parameters: The bits of each parameter by name.
        memory: The tensors that were passed.
        grid: How many CTAs there are along each axis.
        shared_bytes: How much shared memory each has.
        report: What is told of faults.
        note: What is told of what the compiler does and PTX does not promise to work.
        maps: The tensor maps by their addresses.
        schedule: In which order warps run, where they are run one by one.
    """

    program: Translator
    parameters: dict[str, Array]
    memory: Memory
    grid: tuple[int, int, int]
    shared_bytes: int
    report: Report
    note: Report = ignore
    maps: dict[int, TensorMap] = field(default_factory=dict)
    schedule: Schedule = DEFAULT_SCHEDULE


@dataclass(eq=False)
class Copy:
    """Asynchronous copies that one instruction started, an element for each thread of each CTA."""

    instruction: Instruction
    active: Array
    address: Array
    values: Array

    def take(self, rows: Array) -> Copy:
        """The copies of some of the CTAs."""
        parts = (part[rows] for part in (self.active, self.address, self.values))
        return Copy(self.instruction, *parts)


@dataclass
class Copies:
    """Asynchronous copies under way: those in groups, oldest first, and those not in one yet."""

    groups: list[list[Copy]] = field(default_factory=list)
    current: list[Copy] = field(default_factory=list)

    def take(self, rows: Array) -> Copies:
        """The copies of some of the CTAs."""
        groups = [[one.take(rows) for one in group] for group in (*self.groups, self.current)]
        return Copies(groups[:-1], groups[-1])


class Group:
    """Some of a launch's CTAs.

    Attributes:
        members: The threads of each CTA that are in the group: all of them, or one warp.
        mask: Which threads are running, or None for all.
        registers: The bits of each register; see above.
        special: The registers that tell a thread who it is.
        target: Where control goes after the block, for all or for each thread.
    """

    def __init__(
        self,
        launch: Launch,
        ctas: Array,
        members: range | None = None,
        shared: SharedMemory | None = None,
    ) -> None:
        self.launch, self.ctas = launch, ctas
        self.program = launch.program
        self.members = members or range(self.program.kernel.threads)
        self.threads = len(self.members)
        self.shared: SharedMemory = shared or Shared(
            len(ctas), launch.shared_bytes, self.program.granule, launch.report
        )
        self.registers = list(self.program.poison)
        self.copies = Copies()
        self.products = Products()
        self.mask: Array | None = None
        self.target: int | Array = 0
        self._places: Array | None = None
        self._name_threads()

    def _name_threads(self) -> None:
        """Say who is who."""
        self.count = len(self.ctas)
        threads = np.array(self.members, np.uint32)[None]
        ctas = self.ctas.astype(np.uint32)[:, None]
        width, height, _ = self.launch.grid
        self.special = {
            "%tid.x": threads,
            "%laneid": threads % 32,
            "%warpid": threads // 32,
            "%ctaid.x": ctas % width,
            "%ctaid.y": ctas // width % height,
            "%ctaid.z": ctas // (width * height),
            **{f"%nctaid.{axis}": _one(n) for axis, n in zip("xyz", self.launch.grid, strict=True)},
            "%ntid.x": _one(self.program.kernel.threads),
            **{name: _one(1) for name in ("%ntid.y", "%ntid.z")},
            **{name: _one(0) for name in ("%tid.y", "%tid.z")},
        }
        self._row = np.repeat(np.arange(self.count), self.threads)
        self._cta = np.repeat(self.ctas.astype(np.int32) + 1, self.threads)
        self._warps = np.tile(np.uint32(1) << threads[0] // 32, self.count)

    def take(self, rows: Array) -> Group:
        """Some of the CTAs as a group of their own; this one must not be used any more."""
        part = copy.copy(self)
        part.ctas = self.ctas[rows]
        assert isinstance(self.shared, Shared)
        part.shared = self.shared.take(rows)
        part.registers = [r[rows] if r.shape[0] > 1 else r for r in self.registers]
        part.copies = self.copies.take(rows)
        part.products = self.products.take(rows, self.registers, part.registers)
        part._name_threads()
        return part

    # Control.

    def run(self) -> list[Group]:
        """Run to the end, or to where CTAs part ways, and return the groups that are left."""
        place: int | Array = self.target
        while isinstance(place, int) or (place != place[:, :1]).any():
            if isinstance(place, int) and place == ENDED:
                return []
            place = self.advance(place)
        return self._part(place[:, 0])

    def advance(self, place: int | Array) -> int | Array:
        """Run the block that threads are in, or the earliest, and return where they are then."""
        if not isinstance(place, int):
            return self._run_some(place)
        self.target = place + 1
        for step in self.program.steps(place):
            step(self)
        return self.target

    def _part(self, places: Array) -> list[Group]:
        """Groups of the CTAs that go on at one place."""
        groups = []
        for place in np.unique(places):
            rows = np.flatnonzero(places == place)
            group = self if len(rows) == self.count else self.take(rows)
            group.target = int(place)
            groups.append(group)
        return groups

    def _run_some(self, places: Array) -> Array:
        """Run the threads that are in the earliest block, and return where all threads are then."""
        first = int(places[places != ENDED].min())
        mask = places == first
        self.mask, self.target = mask, first + 1
        for step in self.program.steps(first):
            step(self)
        self.mask = None
        return np.where(mask, self.target, places)

    def branch(self, taken: Array, target: int) -> None:
        """Send the threads for which `taken` holds to a block, the others on to the next."""
        if self.mask is None and taken.all():
            self.target = target
        elif taken.any():
            self.target = np.where(self.spread(taken), target, self.target)

    def barrier(self, i: Instruction, active: Array | None) -> None:
        """All threads of a CTA wait for each other."""
        if active is not None:
            together = self.spread(active)
            if (together != together[:, :1]).any():
                raise PtxError(f"{i.place}: a barrier that not all threads come to: {i}")
        assert isinstance(self.shared, Shared)
        self.shared.barrier()

    def announce(self, product: Product) -> None:
        """A product begins, here for whole warpgroups."""

    def barrier_of_some(self, i: Instruction, active: Array | None, operands: list[int]) -> None:
        """Barriers other than that of all threads need warps that are run one by one."""
        raise PtxError(f"{i.place}: this machine knows no such barrier here: {i}")

    # Threads and their accesses.

    def spread(self, values: Array) -> Array:
        """An array with a row for each CTA and a column for each thread."""
        return np.broadcast_to(values, (self.count, self.threads))

    def chosen(self, active: Array | None) -> Array | None:
        """The numbers of the threads that take part, in one row; None for all of them."""
        if active is None or active.all():
            return None
        return np.flatnonzero(self.spread(active))

    def accesses(
        self, i: Instruction, nbytes: int, address: Array, chosen: Array | None
    ) -> Accesses:
        """What threads access at their addresses."""
        parts = (self.spread(address).reshape(-1), self._row, self._cta, self._warps)
        if chosen is not None:
            parts = tuple(part[chosen] for part in parts)
        return Accesses(i, nbytes, *parts)


def _one(value: int) -> Array:
    return np.full((1, 1), value, np.uint32)


def run(launch: Launch, lanes: int = 4096) -> None:
    """Run all CTAs of a launch, about `lanes` threads at a time."""
    total = launch.grid[0] * launch.grid[1] * launch.grid[2]
    threads = launch.program.kernel.threads
    step = max(1, min(lanes // threads, 2**26 // max(1, launch.shared_bytes)))
    with np.errstate(all="ignore"):
        for first in range(0, total, step):
            groups = [Group(launch, np.arange(first, min(first + step, total)))]
            while groups:
                groups += groups.pop().run()
