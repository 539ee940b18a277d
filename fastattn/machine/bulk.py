"""Bulk copies (TMA): a box of a tensor goes to or from shared memory while warps go on.

A load writes its box when it likes, and tells an mbarrier of the bytes; a store reads its box when
it likes until it is waited for. Here a load arrives in two parts, and a store reads as late as it
may, or both at once, as the schedule wants it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from .arithmetic import TYPES, UNSIGNED, Array
from .cta import Load
from .mbarrier import find
from .memory import Accesses
from .parser import Instruction, elements
from .tensormap import NBYTES, TensorMap
from .translator import Read, Step, Translator, instruction, not_here
from .warp import BulkStore, Warp, once

ALIGNMENT = 128
"""Of the shared memory that a box lies in, in bytes."""


@instruction(
    "cp.async.bulk.tensor",
    "1d 2d 3d 4d 5d tile shared::cta global mbarrier::complete_tx::bytes bulk_group",
)
def copy_box(t: Translator, i: Instruction) -> Step:
    """A box of a tensor is copied, at coordinates whose innermost comes first."""
    if "bulk_group" in i.modifiers:
        return _store(t, i)
    address, place, mbarrier = i.operands
    reads = t.address(i, address), t.address(i, mbarrier), *_place(t, i, place)

    def act(warp: Warp, threads: int, first: int, mbarrier: int, *place: int) -> None:
        form = _map_of(warp, i, threads, first, place[0])
        find(warp, i, mbarrier)
        cta, agent = warp.cta, warp.cta.agents.load_to(first)
        granules = cta.granules(first, form.nbytes)
        cta.forget_mbarriers(i, granules)
        if hidden := cta.history.unfenced(granules, warp.clock):
            note = f"overwrites by a bulk load what {hidden} with no fence.proxy.async since"
            warp.launch.note(i, note)
        time = cta.loads_begun[agent] = cta.loads_begun.get(agent, 0) + 1
        cta.history.write(i, granules, warp.clock, agent, time, ordinary=False)
        values = _read_tensor(warp, i, form, place[1:])
        at = (form.places(first)[:, None] + np.arange(form.size)).reshape(-1)
        late = cta.chooser.arrives_late()
        cta.bytes.reshape(-1)[at] = 0xFF if late else values
        cut = 16 * cta.chooser.cut(form.nbytes // 16)
        parts = [
            (at[part], values[part] if late else None)
            for part in (slice(0, cut), slice(cut, None))
            if len(at[part])
        ]
        cta.loads.append(Load(i, mbarrier, parts, agent, time))

    return once(t, i, act, *reads)


def _store(t: Translator, i: Instruction) -> Step:
    place, address = i.operands
    reads = t.address(i, address), *_place(t, i, place)

    def act(warp: Warp, threads: int, first: int, *place: int) -> None:
        form = _map_of(warp, i, threads, first, place[0])
        cta, agent = warp.cta, warp.cta.agents.stores_of(warp.index)
        warp.stores.begun += 1
        cta.history.read(
            i, cta.granules(first, form.nbytes), warp.clock, agent, warp.stores.begun,
            asynchronous=True,
        )  # fmt: skip
        at = (form.places(first)[:, None] + np.arange(form.size)).reshape(-1)
        early = None if cta.chooser.arrives_late() else cta.bytes.reshape(-1)[at]

        def end() -> None:
            values = cta.bytes.reshape(-1)[at] if early is None else early
            _write_tensor(warp, i, form, place[1:], values)
            warp.clock.tick(agent)

        warp.stores.current.append(BulkStore(i, end))

    return once(t, i, act, *reads)


@instruction("cp.async.bulk.commit_group")
def commit(t: Translator, i: Instruction) -> Step:
    """The stores started since the last time become a group to wait for."""
    return once(t, i, lambda warp, threads: warp.stores.commit())


@instruction("cp.async.bulk.wait_group", "read")
def wait(t: Translator, i: Instruction) -> Step:
    """All groups of stores but the last few have read what they store."""
    pending = int(i.operands[0])
    return once(t, i, lambda warp, threads: warp.stores.wait(pending))


def _place(t: Translator, i: Instruction, operand: str) -> list[Read]:
    """What reads the address of the tensor map, and the coordinates."""
    match = re.fullmatch(r"\[\s*([^\s,]+)\s*,\s*(\{.*\})\s*\]", operand)
    if match is None:
        raise not_here(i)
    coordinates = (t.numbers(i, part, TYPES["s32"]) for part in elements(match[2]))
    return [t.bits(i, match[1], TYPES["u64"]), *coordinates]


def _map_of(warp: Warp, i: Instruction, threads: int, first: int, address: int) -> TensorMap:
    """The tensor map at an address, for a box at `first` in shared memory."""
    if threads > 1:
        warp.report(i, f"copy: {threads} threads issue the same copy")
    form = warp.launch.maps.get(address)
    if form is None:
        raise not_here(i, f"there is no tensor map at {address:#x}")
    if first % ALIGNMENT or not 0 <= first <= warp.cta.size - form.nbytes:
        where = f"{form.nbytes} bytes at {first} of {warp.cta.size} of shared memory"
        raise not_here(i, f"a box cannot lie in {where}")
    return form


def _accesses(
    warp: Warp, i: Instruction, form: TensorMap, coordinates: Sequence[int]
) -> tuple[Accesses, Array]:
    """Those elements of a box that the tensor has, and which these are."""
    address, inside = form.addresses(coordinates[::-1])
    address = address[inside]
    alike = np.ones(len(address), np.int64)
    warps = np.full(len(address), 1 << warp.index, np.uint32)
    return Accesses(i, form.size, address, 0 * alike, (warp.cta.number + 1) * alike, warps), inside


def _read_tensor(warp: Warp, i: Instruction, form: TensorMap, coordinates: Sequence[int]) -> Array:
    """The bytes of a box, zero where the tensor has none."""
    accesses, inside = _accesses(warp, i, form, coordinates)
    values = np.zeros((len(inside), 1), UNSIGNED[form.size])
    if inside.any():
        values[inside] = warp.launch.memory.load(accesses, form.size)
    return values.view(np.uint8).reshape(-1)


def _write_tensor(
    warp: Warp, i: Instruction, form: TensorMap, coordinates: Sequence[int], values: Array
) -> None:
    """Set the tensor to the bytes of a box, as far as it has them."""
    accesses, inside = _accesses(warp, i, form, coordinates)
    if inside.any():
        numbers = values.view(UNSIGNED[form.size]).reshape(-1, 1)
        warp.launch.memory.store(accesses, numbers[inside])


# Tensor maps that a kernel writes.

FIELDS = (
    "global_address rank box_dim global_dim global_stride element_stride elemtype "
    "interleave_layout swizzle_mode fill_mode"
)


@instruction("tensormap.replace", f"tile shared::cta b1024 {FIELDS}")
def replace_field(t: Translator, i: Instruction) -> Step:
    """A field of a tensor map in shared memory is written."""
    name, kind = i.modifiers[2], TYPES[i.modifiers[-1]]
    address, *index, value = i.operands

    def act(warp: Warp, threads: int, address: int, value: int) -> None:
        fields = warp.cta.fields.setdefault(address, {})
        fields.setdefault(name, {})[int(index[0], 0) if index else 0] = value

    return once(t, i, act, t.address(i, address), t.bits(i, value, kind))


@instruction(
    "tensormap.cp_fenceproxy",
    "global shared::cta tensormap::generic release gpu sync aligned",
)
def publish_map(t: Translator, i: Instruction) -> Step:
    """A tensor map is copied to global memory, whence bulk copies may take it."""
    to, source = (t.address(i, operand) for operand in i.operands[:2])

    def act(warp: Warp, threads: int, to: int, source: int) -> None:
        pieces = np.arange(to, to + NBYTES, 16)
        alike = np.ones(len(pieces), np.int64)
        warps = np.full(len(pieces), 1 << warp.index, np.uint32)
        accesses = Accesses(i, 16, pieces, 0 * alike, (warp.cta.number + 1) * alike, warps)
        warp.launch.memory.store(accesses, np.zeros((len(pieces), 2), np.uint64))
        warp.launch.maps[to] = TensorMap.of_fields(warp.cta.fields.pop(source))

    return once(t, i, act, to, source)


@instruction("fence.proxy.tensormap::generic", "acquire gpu")
def acquire_map(t: Translator, i: Instruction) -> None:
    """What is read of a tensor map is what was published."""


@instruction("prefetch.tensormap")
def prefetch_map(t: Translator, i: Instruction) -> None:
    """A hint."""
