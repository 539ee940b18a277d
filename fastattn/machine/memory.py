"""Global memory: the tensors that a launch was given, and who touches which byte of them.

An address is good if it lies in an element of a tensor that was passed. The bytes between the
elements of a strided tensor are as forbidden as those behind its end: they may belong to another.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from .arithmetic import UNSIGNED, Array
from .parser import Instruction, PtxError

Report = Callable[[Instruction, str], None]
"""What is told of a fault that does not keep the program from going on."""


def ignore(i: Instruction, what: str) -> None:
    """Tell nobody."""


SEVERAL = -1


class Accesses(NamedTuple):
    """What the threads of one instruction access: an element each thread that takes part.

    Attributes:
        instruction: The instruction.
        nbytes: How many bytes each of them accesses, from `address` on.
        address: Where.
        row: Which CTA of the group it is in.
        cta: Which CTA of the grid that is, from 1.
        warps: A bit for each warp that the access counts for.
    """

    instruction: Instruction
    nbytes: int
    address: Array
    row: Array
    cta: Array
    warps: Array

    def require_alignment(self) -> None:
        """Raise an error unless every address is a multiple of the size."""
        if (self.address % self.nbytes).any():
            raise self.error(f"misaligned access of {self.nbytes} bytes")

    def error(self, what: str) -> PtxError:
        """An error of this instruction."""
        return PtxError(f"{self.instruction.place}: {what}: {self.instruction}")


_WIDE = {**UNSIGNED, 16: np.dtype("c16")}
"""What is as wide as an access, to move it in one piece."""


def gather(every_byte: Array, at: Array, nbytes: int, size: int) -> Array:
    """(accesses, numbers of `size` bytes): the `nbytes` bytes from each of some places on."""
    end = len(every_byte) // nbytes * nbytes
    wide = every_byte[:end].view(_WIDE[nbytes])[at // nbytes]
    return wide[:, None].view(UNSIGNED[size])


def scatter(every_byte: Array, at: Array, values: Array) -> None:
    """The reverse of `gather`."""
    nbytes = values.itemsize * values.shape[1]
    end = len(every_byte) // nbytes * nbytes
    wide = np.ascontiguousarray(values).view(_WIDE[nbytes])
    every_byte[:end].view(_WIDE[nbytes])[at // nbytes] = wide[:, 0]


class Storage:
    """The bytes that one or several of the tensors passed have in common.

    Attributes:
        base: The address of the first byte.
        bytes: All of them.
        valid: Which of them belong to an element, or None if all do.
        granule: The size of the smallest elements, which are watched one by one.
    """

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        storage = tensors[0].untyped_storage()
        self.base = storage.data_ptr()
        self.bytes: Array = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
        self.granule = min(tensor.element_size() for tensor in tensors)
        if self.base % 16:
            raise PtxError("this machine takes no tensor whose memory begins at an odd address")
        self.valid = _find_valid(tensors, len(self.bytes))
        # The last CTA to write and to read each granule, and the lines that did.
        granules = -(-len(self.bytes) // self.granule)
        self.writer, self.reader = np.zeros(granules, np.int32), np.zeros(granules, np.int32)
        self.write_line, self.read_line = np.zeros(granules, "i4"), np.zeros(granules, "i4")


def _find_valid(tensors: list[torch.Tensor], nbytes: int) -> Array | None:
    """Which bytes of a storage belong to an element of one of the tensors; None for all."""
    if any(tensor.is_contiguous() and tensor.nbytes == nbytes for tensor in tensors):
        return None
    valid = np.zeros(nbytes, bool)
    for tensor in tensors:
        size = tensor.element_size()
        marks = torch.zeros(nbytes // size, dtype=torch.bool)
        marks.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
        valid[: len(marks) * size] |= np.repeat(marks.numpy(), size)
    return None if valid.all() else valid


class Memory:
    """All storages of a launch."""

    def __init__(self, tensors: Iterable[torch.Tensor], report: Report) -> None:
        by_storage: dict[int, list[torch.Tensor]] = defaultdict(list)
        for tensor in tensors:
            if tensor.numel():
                by_storage[tensor.untyped_storage().data_ptr()].append(tensor)
        self.storages = [Storage(group) for _, group in sorted(by_storage.items())]
        self.bases = np.array([storage.base for storage in self.storages], np.int64)
        self.report = report

    def load(self, accesses: Accesses, size: int) -> Array:
        """What stands at the addresses: (accesses, numbers of `size` bytes)."""
        result = np.empty((len(accesses.address), accesses.nbytes // size), UNSIGNED[size])
        for storage, part, offset in self._parts(accesses):
            result[part] = gather(storage.bytes, offset, accesses.nbytes, size)
            self._track_reads(storage, accesses, part, offset)
        return result

    def store(self, accesses: Accesses, values: Array) -> None:
        """Write (accesses, numbers) to the addresses."""
        nbytes, size = accesses.nbytes, values.itemsize
        for storage, part, offset in self._parts(accesses):
            mine = values[part]
            # That several CTAs write one value to one place is no fault.
            changed = (gather(storage.bytes, offset, nbytes, size) != mine).any(1)
            self._track_writes(storage, accesses, part, offset, changed)
            scatter(storage.bytes, offset, mine)
            if (gather(storage.bytes, offset, nbytes, size) != mine).any():
                what = "race: threads write different values to one global address at once"
                self.report(accesses.instruction, what)

    def _parts(self, accesses: Accesses) -> Iterator[tuple[Storage, Array | slice, Array]]:
        """The storages that accesses fall into, which they are, and where in the storage."""
        accesses.require_alignment()
        address, nbytes = accesses.address, accesses.nbytes
        which = np.searchsorted(self.bases, address, "right") - 1
        for number in np.unique(which):
            chosen = which == number
            part = slice(None) if chosen.all() else chosen
            storage = self.storages[number]
            offset = address[part] - storage.base
            past = int(offset.max()) + nbytes - len(storage.bytes)
            if number < 0:
                raise accesses.error("access outside of all tensors that were passed")
            if past > 0:
                what = f"access {past} bytes behind the end of a storage of {len(storage.bytes)}"
                raise accesses.error(what)
            if storage.valid is not None:
                inside = storage.valid[offset[:, None] + np.arange(nbytes)].all(1)
                if not inside.all():
                    where = f"byte {offset[~inside][0]} of a storage of {len(storage.bytes)}"
                    raise accesses.error(f"access between the elements of a tensor, at {where}")
            yield storage, part, offset

    def _granules(
        self, storage: Storage, accesses: Accesses, part: Array | slice, offset: Array
    ) -> tuple[Array, Array]:
        """The granules accessed, and the CTA of each access."""
        count = -(-accesses.nbytes // storage.granule)
        at = (offset[:, None] // storage.granule + np.arange(count)).reshape(-1)
        return at, np.repeat(accesses.cta[part], count)

    def _track_reads(
        self, storage: Storage, accesses: Accesses, part: Array | slice, offset: Array
    ) -> None:
        at, cta = self._granules(storage, accesses, part, offset)
        writer = storage.writer[at]
        race = (writer != 0) & (writer != cta)
        if race.any():
            line = storage.write_line[at][race][0]
            self.report(accesses.instruction, f"race: reads what another CTA writes in line {line}")
        reader = storage.reader[at]
        storage.reader[at] = np.where((reader == 0) | (reader == cta), cta, SEVERAL)
        # Of several readers in this very instruction the last one is left.
        storage.reader[at[storage.reader[at] != cta]] = SEVERAL
        storage.read_line[at] = accesses.instruction.line

    def _track_writes(
        self,
        storage: Storage,
        accesses: Accesses,
        part: Array | slice,
        offset: Array,
        changed: Array,
    ) -> None:
        at, cta = self._granules(storage, accesses, part, offset)
        changed = np.repeat(changed, len(at) // len(offset))
        for what, others, lines in (
            ("writes", storage.writer, storage.write_line),
            ("reads", storage.reader, storage.read_line),
        ):
            race = changed & (others[at] != 0) & (others[at] != cta)
            if race.any():
                line = lines[at][race][0]
                did = f"another CTA {what} in line {line}"
                self.report(accesses.instruction, f"race: writes what {did}")
        storage.writer[at] = cta
        storage.write_line[at] = accesses.instruction.line
