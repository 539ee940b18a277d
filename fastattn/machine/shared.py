"""Shared memory: the scratch of a CTA, through which its warps hand each other numbers.

Warps run at their own pace. What one writes another may read only after a barrier, and what one
reads another may overwrite only after a barrier; otherwise the result hangs on who comes first. So
each granule of memory remembers which warps wrote and read it since the last barrier.

Asynchronous instructions outlive the line they stand in. A granule also remembers whether a copy is
on its way to it, whether a product may still be reading it, and whether it was written by ordinary
instructions, which products see only after a fence between the two (a proxy fence).
"""

from __future__ import annotations

import copy

import numpy as np

from .arithmetic import UNSIGNED, Array
from .memory import Accesses, Report

_STATE = (
    "bytes", "epochs", "readers", "writers", "read_line", "write_line",
    "arriving", "multiplied", "unfenced",
)  # fmt: skip


class Shared:
    """The shared memory of all CTAs of a group, side by side."""

    def __init__(self, ctas: int, size: int, granule: int, report: Report) -> None:
        self.size, self.granule, self.report = size, granule, report
        self.stride = -(-size // 16) * 16 + 16
        # All bits set: NaN as a float of any width.
        self.bytes = np.full((ctas, self.stride), 0xFF, np.uint8)
        self.epoch = 1
        granules = (ctas, self.stride // granule)
        # A granule whose epoch is not the present one has not been touched since the last barrier.
        self.epochs = np.zeros(granules, np.int32)
        self.readers, self.writers = np.zeros(granules, np.uint32), np.zeros(granules, np.uint32)
        self.read_line, self.write_line = np.zeros(granules, "i4"), np.zeros(granules, "i4")
        self.arriving, self.multiplied = np.zeros(granules, np.uint8), np.zeros(granules, np.uint8)
        self.unfenced = np.zeros(granules, bool)

    def take(self, rows: Array) -> Shared:
        """A copy of the memory of some of the CTAs."""
        part = copy.copy(self)
        for name in _STATE:
            setattr(part, name, getattr(self, name)[rows])
        return part

    def barrier(self) -> None:
        """What was done before is ordered before all that comes."""
        self.epoch += 1

    def fence(self) -> None:
        """What was written becomes visible to asynchronous products."""
        self.unfenced[:] = False

    def view(self, size: int) -> Array:
        """All bytes in a row, as unsigned integers of a size."""
        return self.bytes.reshape(-1).view(UNSIGNED[size])

    def load(self, accesses: Accesses, size: int) -> Array:
        """What stands at the addresses: (accesses, numbers of `size` bytes)."""
        at, warps = self._granules(accesses)
        if self.arriving.reshape(-1)[at].any():
            self.report(accesses.instruction, "reads what an asynchronous copy has yet to deliver")
        self.track_reads(accesses, at, warps)
        return self.view(size)[self._index(accesses, size)]

    def store(self, accesses: Accesses, values: Array, *, delivery: bool = False) -> None:
        """Write (accesses, numbers) to the addresses, at once or as a copy's delivery."""
        at, warps = self._granules(accesses)
        if delivery:
            np.subtract.at(self.arriving.reshape(-1), at, 1)
        self.require_idle(accesses, at, "writes")
        view, index = self.view(values.itemsize), self._index(accesses, values.itemsize)
        granules = self.view(self.granule)
        before = granules[at]
        view[index] = values
        # Writing what is there already is no race: warps that hold the same numbers may do so.
        changed = before != granules[at]
        self._track_writes(accesses, at, warps, changed)
        self.unfenced.reshape(-1)[at] = True
        if (view[index] != values).any():
            what = "threads write different values to one address of shared memory at once"
            self.report(accesses.instruction, what)

    def expect(self, accesses: Accesses) -> None:
        """An asynchronous copy sets out for the addresses."""
        at, warps = self._granules(accesses)
        self.require_idle(accesses, at, "copies to")
        self._report_race(accesses, at, warps, self.writers, self.write_line, "copies to", "writes")
        self._report_race(accesses, at, warps, self.readers, self.read_line, "copies to", "reads")
        np.add.at(self.arriving.reshape(-1), at, 1)

    def require_idle(self, accesses: Accesses, at: Array, does: str) -> None:
        """Report what is done to granules that an asynchronous instruction is using."""
        if self.arriving.reshape(-1)[at].any():
            self.report(accesses.instruction, f"{does} where an asynchronous copy is to arrive")
        if self.multiplied.reshape(-1)[at].any():
            self.report(accesses.instruction, f"{does} what a running product may still read")

    def _index(self, accesses: Accesses, size: int) -> Array:
        first = (accesses.row * self.stride + accesses.address) // size
        return first[:, None] + np.arange(accesses.nbytes // size)

    def _granules(self, accesses: Accesses) -> tuple[Array, Array]:
        """The granules accessed, and the warps of each access."""
        accesses.require_alignment()
        last = int(accesses.address.max()) + accesses.nbytes
        if accesses.address.min() < 0 or last > self.size:
            first = int(accesses.address.min())
            raise accesses.error(f"access at {first} to {last} of {self.size} shared bytes")
        count = max(1, accesses.nbytes // self.granule)
        first = (accesses.row * self.stride + accesses.address) // self.granule
        at = first if count == 1 else (first[:, None] + np.arange(count)).reshape(-1)
        return at, accesses.warps if count == 1 else np.repeat(accesses.warps, count)

    def _report_race(
        self,
        accesses: Accesses,
        at: Array,
        warps: Array,
        others: Array,
        lines: Array,
        does: str,
        did: str,
        where: Array | bool = True,
    ) -> None:
        """Report granules that other warps have touched since the last barrier."""
        present = self.epochs.reshape(-1)[at] == self.epoch
        race = present & (others.reshape(-1)[at] & ~warps != 0) & where
        if race.any():
            line = lines.reshape(-1)[at][race][0]
            place = int(at[race][0]) * self.granule % self.stride
            what = f"{does} what another warp {did} in line {line} with no barrier between"
            self.report(accesses.instruction, f"{what}, at shared byte {place}")

    def track_reads(self, accesses: Accesses, at: Array, warps: Array) -> None:
        """Remember, and hold against the writes since the last barrier, what is read."""
        self._report_race(accesses, at, warps, self.writers, self.write_line, "reads", "writes")
        self._remember(accesses, at, warps, self.readers, self.read_line)

    def _track_writes(self, accesses: Accesses, at: Array, warps: Array, changed: Array) -> None:
        self._report_race(
            accesses, at, warps, self.writers, self.write_line, "overwrites", "writes", changed
        )
        self._report_race(
            accesses, at, warps, self.readers, self.read_line, "overwrites", "reads", changed
        )
        self._remember(accesses, at, warps, self.writers, self.write_line)

    def _remember(
        self, accesses: Accesses, at: Array, warps: Array, who: Array, lines: Array
    ) -> None:
        epochs = self.epochs.reshape(-1)
        stale = at[epochs[at] != self.epoch]
        if stale.size:
            self.readers.reshape(-1)[stale] = 0
            self.writers.reshape(-1)[stale] = 0
            epochs[stale] = self.epoch
        np.bitwise_or.at(who.reshape(-1), at, warps)
        lines.reshape(-1)[at] = accesses.instruction.line
