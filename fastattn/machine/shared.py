"""Shared memory: the scratch of a CTA, through which its warps hand each other numbers.

Warps run at their own pace. What one writes another may read only after a barrier, and what one
reads another may overwrite only after a barrier; otherwise the result hangs on who comes first. So
each granule of memory knows which warps wrote and read it since the last barrier.

Asynchronous instructions outlive the line they stand in. A granule also knows whether a copy is on
its way to it, whether a product may still be reading it, and whether it was written by ordinary
instructions, which products see only after a fence between the two (a proxy fence).
"""

from __future__ import annotations

import abc
import copy
from typing import NamedTuple

import numpy as np

from .arithmetic import UNSIGNED, Array
from .memory import Accesses, Report, gather, scatter
from .parser import Instruction

_STATE = (
    "bytes", "epochs", "readers", "writers", "read_line", "write_line",
    "arriving", "multiplied", "unfenced",
)  # fmt: skip


class Span(NamedTuple):
    """Granules that an instruction touches.

    Attributes:
        instruction: The instruction.
        granules: Which.
        warps: A bit for each warp that it touches them for.
        alone: Those of the bits that stand alone. What is done for several warps at once is in
            conflict with what any one of them did, for the others.
    """

    instruction: Instruction
    granules: Array
    warps: Array
    alone: Array | np.uint32


class SharedMemory(abc.ABC):
    """The bytes of shared memory of some CTAs, side by side.

    Who may touch them when is told by those who inherit `read` and `write`.
    """

    def __init__(self, ctas: int, size: int, granule: int, report: Report) -> None:
        self.size, self.granule, self.report = size, granule, report
        self.stride = -(-size // 16) * 16 + 16
        # All bits set: NaN as a float of any width.
        self.bytes = np.full((ctas, self.stride), 0xFF, np.uint8)

    def view(self, size: int) -> Array:
        """All bytes in a row, as unsigned integers of a size."""
        return self.bytes.reshape(-1).view(UNSIGNED[size])

    def load(self, accesses: Accesses, size: int) -> Array:
        """What stands at the addresses: (accesses, numbers of `size` bytes)."""
        self._require_bounds(accesses)
        self.read(accesses)
        return gather(self.bytes.reshape(-1), self._bytes(accesses), accesses.nbytes, size)

    def store(self, accesses: Accesses, values: Array) -> None:
        """Write (accesses, numbers) to the addresses."""
        span = self._span(accesses)
        every_byte, at = self.bytes.reshape(-1), self._bytes(accesses)
        before = self.view(self.granule)[span.granules]
        scatter(every_byte, at, values)
        # Writing what is there already is no race: warps that hold the same numbers may do so.
        self.write(span, before != self.view(self.granule)[span.granules])
        if (gather(every_byte, at, accesses.nbytes, values.itemsize) != values).any():
            what = "race: threads write different values to one address of shared memory at once"
            self.report(span.instruction, what)

    @abc.abstractmethod
    def read(self, what: Accesses | Span) -> None:
        """Hold a read against what was done before, and remember it."""

    @abc.abstractmethod
    def write(self, span: Span, changed: Array) -> None:
        """Hold a write, which changed some of the granules, against what was done before."""

    @abc.abstractmethod
    def fence(self) -> None:
        """What was written becomes visible to what reads asynchronously."""

    @abc.abstractmethod
    def expect(self, accesses: Accesses) -> None:
        """An asynchronous copy sets out for the addresses."""

    @abc.abstractmethod
    def deliver(self, accesses: Accesses, values: Array) -> None:
        """An asynchronous copy has arrived at the addresses."""

    @abc.abstractmethod
    def begin_product(self, span: Span) -> None:
        """A product begins to read."""

    @abc.abstractmethod
    def end_product(self, span: Span) -> None:
        """A product has read what it reads."""

    def _bytes(self, accesses: Accesses) -> Array:
        """Where accesses begin among all bytes."""
        return accesses.row * self.stride + accesses.address

    def _require_bounds(self, accesses: Accesses) -> None:
        accesses.require_alignment()
        first, last = int(accesses.address.min()), int(accesses.address.max()) + accesses.nbytes
        if first < 0 or last > self.size:
            raise accesses.error(f"access at {first} to {last} of {self.size} shared bytes")

    def _span(self, what: Accesses | Span) -> Span:
        """The granules accessed."""
        if isinstance(what, Span):
            return what
        self._require_bounds(what)
        count = max(1, what.nbytes // self.granule)
        at = self._bytes(what) // self.granule
        if count == 1:
            return Span(what.instruction, at, what.warps, what.warps)
        at = (at[:, None] + np.arange(count)).reshape(-1)
        warps = np.repeat(what.warps, count)
        return Span(what.instruction, at, warps, warps)


class Shared(SharedMemory):
    """The shared memory of CTAs in lockstep, where all warps meet at every barrier."""

    def __init__(self, ctas: int, size: int, granule: int, report: Report) -> None:
        super().__init__(ctas, size, granule, report)
        granules = (ctas, self.stride // granule)
        # Barriers part epochs. A granule whose epoch is not the present one has nothing to tell.
        self.epoch = 1
        self.epochs = np.zeros(granules, np.int32)
        self.readers, self.writers = np.zeros(granules, np.uint32), np.zeros(granules, np.uint32)
        self.read_line, self.write_line = np.zeros(granules, "i4"), np.zeros(granules, "i4")
        self.arriving, self.multiplied = np.zeros(granules, np.uint8), np.zeros(granules, np.uint8)
        self.unfenced = np.zeros(granules, bool)
        # Reads of this epoch that `readers` has yet to learn of: mostly no write ever asks.
        self._reads: list[Accesses | Span] = []
        self._last_write = 0
        self._copies = 0

    def take(self, rows: Array) -> Shared:
        """A copy of the memory of some of the CTAs."""
        self._remember_reads()
        part = copy.copy(self)
        part._reads = []
        for name in _STATE:
            setattr(part, name, getattr(self, name)[rows])
        return part

    def barrier(self) -> None:
        """What was done before is ordered before all that comes."""
        self.epoch += 1
        self._reads.clear()

    def fence(self) -> None:
        """What was written becomes visible to asynchronous products."""
        self.unfenced[:] = False

    # What instructions do.

    def deliver(self, accesses: Accesses, values: Array) -> None:
        """An asynchronous copy arrives at the addresses."""
        self._copies -= 1
        if len(accesses.address):
            np.subtract.at(self.arriving.reshape(-1), self._span(accesses).granules, 1)
            self.store(accesses, values)

    def expect(self, accesses: Accesses) -> None:
        """An asynchronous copy sets out for the addresses."""
        span = self._span(accesses)
        self._require_idle(span, "copies to")
        self._remember_reads()
        self._hold_against(span, self.writers, self.write_line, "copies to", "writes")
        self._hold_against(span, self.readers, self.read_line, "copies to", "reads")
        np.add.at(self.arriving.reshape(-1), span.granules, 1)
        self._copies += 1

    def begin_product(self, span: Span) -> None:
        """A product begins to read."""
        unfenced = self.unfenced.reshape(-1)[span.granules]
        if unfenced.any():
            line = self.write_line.reshape(-1)[span.granules][unfenced][0]
            what = f"proxy: multiplies what line {line} wrote with no fence.proxy.async since"
            self.report(span.instruction, what)
        self.read(span)
        np.add.at(self.multiplied.reshape(-1), span.granules, 1)

    def end_product(self, span: Span) -> None:
        """A product has read what it reads."""
        self.read(span)
        np.subtract.at(self.multiplied.reshape(-1), span.granules, 1)

    # Who touched what.

    def read(self, what: Accesses | Span) -> None:
        """Hold a read against copies under way and writes since the last barrier; remember it."""
        if self._copies or self._last_write == self.epoch:
            what = span = self._span(what)
            if self._is(self.arriving, span):
                fault = "race: reads what an asynchronous copy has yet to deliver"
                self.report(span.instruction, fault)
            self._hold_against(span, self.writers, self.write_line, "reads", "writes")
        self._reads.append(what)

    def write(self, span: Span, changed: Array) -> None:
        """Hold a write against what is under way and was done since the last barrier."""
        self._require_idle(span, "writes")
        self._remember_reads()
        self._hold_against(span, self.writers, self.write_line, "overwrites", "writes", changed)
        self._hold_against(span, self.readers, self.read_line, "overwrites", "reads", changed)
        self._remember(span, self.writers, self.write_line)
        self.unfenced.reshape(-1)[span.granules] = True
        self._last_write = self.epoch

    def _require_idle(self, span: Span, does: str) -> None:
        """Report what is done to granules that an asynchronous instruction is using."""
        if self._is(self.arriving, span):
            self.report(span.instruction, f"race: {does} where an asynchronous copy is to arrive")
        if self._is(self.multiplied, span):
            self.report(span.instruction, f"race: {does} what a running product may still read")

    def _is(self, marks: Array, span: Span) -> bool:
        return bool(marks.reshape(-1)[span.granules].any())

    def _hold_against(
        self,
        span: Span,
        others: Array,
        lines: Array,
        does: str,
        did: str,
        where: Array | bool = True,
    ) -> None:
        """Report granules that other warps have touched since the last barrier."""
        at = span.granules
        present = self.epochs.reshape(-1)[at] == self.epoch
        race = present & (others.reshape(-1)[at] & ~span.alone != 0) & where
        if race.any():
            line = lines.reshape(-1)[at][race][0]
            place = int(at[race][0]) * self.granule % self.stride
            what = f"race: {does} what another warp {did} in line {line} with no barrier between"
            self.report(span.instruction, f"{what}, at shared byte {place}")

    def _remember_reads(self) -> None:
        for what in self._reads:
            self._remember(self._span(what), self.readers, self.read_line)
        self._reads.clear()

    def _remember(self, span: Span, who: Array, lines: Array) -> None:
        epochs, at = self.epochs.reshape(-1), span.granules
        stale = at[epochs[at] != self.epoch]
        if stale.size:
            self.readers.reshape(-1)[stale] = 0
            self.writers.reshape(-1)[stale] = 0
            epochs[stale] = self.epoch
        np.bitwise_or.at(who.reshape(-1), at, span.warps)
        lines.reshape(-1)[at] = span.instruction.line
