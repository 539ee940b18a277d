"""Instructions that move numbers: between threads, and to and from memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .arithmetic import TYPES, UNSIGNED, Array
from .group import Copy
from .memory import Accesses
from .parser import Instruction, elements
from .translator import Step, Translator, instruction, not_here, type_of

if TYPE_CHECKING:
    from .group import Group

HINTS = (
    "weak relaxed volatile gpu cta nc L1::evict_last L1::evict_first L1::no_allocate "
    "L1::evict_normal L1::evict_unchanged"
)
"""Modifiers that say nothing of what is computed."""


# Numbers between the threads of a warp.


@instruction("shfl", "sync bfly idx up down")
def shuffle(t: Translator, i: Instruction) -> Step:
    """Each thread gets the register of another thread of its warp."""
    mode = i.modifiers[1]
    words = TYPES["u32"]
    a, by, limits = (t.bits(i, operand, words) for operand in i.operands[1:4])
    check = t.require_whole_warps(i)

    def exchange(g: Group) -> tuple[Array, Array]:
        lane = np.arange(g.threads) % 32
        b, c = by(g).astype(np.int64) & 31, limits(g).astype(np.int64)
        segment, clamp = c >> 8 & 31, c & 31
        least = lane & segment
        most = least | clamp & ~segment
        source = {
            "bfly": lane ^ b,
            "idx": least | b & ~segment,
            "down": lane + b,
            "up": lane - b,
        }[mode]
        inside = source >= most if mode == "up" else source <= most
        source = np.where(inside, source, lane) + np.arange(g.threads) // 32 * 32
        values = a(g)
        if source.shape[0] == 1 and values.shape[1] > 1:
            return values[:, source[0]], inside
        return np.take_along_axis(g.spread(values), g.spread(source), 1), inside

    destination, *predicate = i.operands[0].split("|")
    assign = t.assign_bits(i, destination, words, lambda g: exchange(g)[0])
    others = [t.assign_bits(i, p, TYPES["pred"], lambda g: exchange(g)[1]) for p in predicate]

    def step(g: Group) -> None:
        check(g)
        for other in others:
            other(g)
        assign(g)

    return step


REDUCTIONS = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


@instruction("vote redux", "sync ballot any all add min max and or xor")
def reduce_warp(t: Translator, i: Instruction) -> Step:
    """A reduction over the threads of each warp."""
    mode, kind = i.modifiers[1], type_of(i)
    predicate = i.opcode == "vote"
    source = TYPES["pred"] if predicate else kind
    read = t.numbers(i, i.operands[1], source)
    check = t.require_whole_warps(i)

    def reduce(g: Group) -> Array:
        check(g)
        values = g.spread(read(g)).reshape(g.count, -1, 32)
        if mode == "ballot":
            bits = values.astype(np.uint32) << np.arange(32, dtype=np.uint32)
            result = bits.sum(2, dtype=np.uint32)
        elif predicate:
            result = values.any(2) if mode == "any" else values.all(2)
        else:
            result = REDUCTIONS[mode].reduce(values, axis=2).astype(values.dtype)
        return np.repeat(result, 32, axis=1)

    return t.assign(i, i.operands[0], kind, reduce)


# Memory.


def space_of(i: Instruction) -> str:
    """Which memory an instruction accesses."""
    for modifier in i.modifiers:
        if modifier in ("global", "param") or modifier.startswith("shared"):
            return modifier.partition("::")[0]
    raise not_here(i, "an address of no particular memory")


@instruction("ld", f"param global shared shared::cta {HINTS}")
def load(t: Translator, i: Instruction) -> Step:
    """Registers are set to what stands in memory."""
    kind, space = type_of(i), space_of(i)
    if space == "param":
        return _load_parameter(t, i)
    count = len(elements(i.operands[0]))
    address, active = t.address(i, i.operands[1]), t.active(i)
    bits = UNSIGNED[kind.size]

    def read(g: Group) -> tuple[Array, ...]:
        chosen = g.chosen(active(g))
        result = np.empty((count, g.count * g.threads), bits)
        if chosen is None or chosen.size:
            memory = g.shared if space == "shared" else g.launch.memory
            accesses = g.accesses(i, kind.size * count, address(g), chosen)
            values = memory.load(accesses, kind.size).T
            if chosen is None:
                result = values
            else:
                result[:, chosen] = values
        return tuple(part.reshape(g.count, g.threads) for part in result)

    return t.assign_vector(i, i.operands[0], kind, read)


def _load_parameter(t: Translator, i: Instruction) -> Step:
    kind = type_of(i)
    name = i.operands[1].strip("[] ")
    if name not in dict(t.kernel.parameters):
        raise not_here(i, f"there is no parameter {name}")

    def read(g: Group) -> Array:
        value = g.launch.parameters[name]
        if value.itemsize < kind.size:
            raise not_here(i, f"the parameter has {value.itemsize} bytes")
        return value.astype(kind.bits)

    return t.assign_bits(i, i.operands[0], kind, read)


@instruction("st", f"global shared shared::cta {HINTS}")
def store(t: Translator, i: Instruction) -> Step:
    """Memory is set to what registers hold."""
    kind, space = type_of(i), space_of(i)
    reads = [t.bits(i, part, kind) for part in elements(i.operands[1])]
    address, active = t.address(i, i.operands[0]), t.active(i)
    if space == "param":
        raise not_here(i)

    def step(g: Group) -> None:
        chosen = g.chosen(active(g))
        if chosen is not None and not chosen.size:
            return
        values = np.stack([g.spread(read(g)).reshape(-1) for read in reads], 1)
        memory = g.shared if space == "shared" else g.launch.memory
        accesses = g.accesses(i, kind.size * len(reads), address(g), chosen)
        memory.store(accesses, values if chosen is None else values[chosen])

    return step


@instruction(
    "cp", "async ca cg shared shared::cta global commit_group wait_group wait_all L2::128B"
)
def copy_asynchronously(t: Translator, i: Instruction) -> Step:
    """Bytes go from global to shared memory meanwhile, and have arrived when waited for."""
    if "commit_group" in i.modifiers:
        return commit
    if "wait_group" in i.modifiers:
        pending = int(i.operands[0])
        return lambda g: wait(g, pending)
    if "wait_all" in i.modifiers:
        return lambda g: (commit(g), wait(g, 0))[1]
    size = int(i.operands[2], 0)
    to, source = (t.address(i, operand) for operand in i.operands[:2])
    given = t.bits(i, i.operands[3] if len(i.operands) > 3 else str(size), TYPES["u32"])
    active = t.active(i)

    def step(g: Group) -> None:
        mask = active(g)
        mask = np.ones((1, 1), bool) if mask is None else mask
        chosen = g.chosen(mask)
        if chosen is not None and not chosen.size:
            return
        # Where no bytes are given, zeros are written.
        amount = given(g)
        if ((amount != 0) & (amount != size)).any():
            raise not_here(i, "a part of a copy")
        values = np.zeros((g.count * g.threads, size), np.uint8)
        copied = g.chosen(mask & (amount != 0))
        if copied is None or copied.size:
            accesses = g.accesses(i, size, source(g), copied)
            values[slice(None) if copied is None else copied] = g.launch.memory.load(
                accesses, 4
            ).view(np.uint8)
        address = to(g)
        g.shared.expect(g.accesses(i, size, address, chosen))
        g.copies.current.append(
            Copy(i, g.spread(mask), g.spread(address), values.reshape(g.count, g.threads, size))
        )

    return step


def commit(g: Group) -> None:
    """The copies started since the last time become a group to wait for."""
    g.copies.groups.append(g.copies.current)
    g.copies.current = []


def wait(g: Group, pending: int) -> None:
    """Let all groups of copies but the last few arrive."""
    while len(g.copies.groups) > pending:
        for one in g.copies.groups.pop(0):
            chosen = g.chosen(one.active)
            values = one.values.reshape(-1, one.values.shape[2])
            accesses = g.accesses(one.instruction, values.shape[1], one.address, chosen)
            values = values if chosen is None else values[chosen]
            g.shared.deliver(accesses, np.ascontiguousarray(values).view(np.uint32))


@instruction("ldmatrix", "sync aligned m8n8 trans shared shared::cta")
def load_matrices(t: Translator, i: Instruction) -> Step:
    """A warp loads matrices of 8 by 8 halves, whose rows its threads know the addresses of."""
    count, transposed = _matrices(i, 0)
    address, check = t.address(i, i.operands[1]), t.require_whole_warps(i)
    active = t.active(i)

    def read(g: Group) -> tuple[Array, ...]:
        check(g)
        accesses = _rows_of_matrices(g, i, count, address(g), active(g))
        rows = g.shared.load(accesses, 2)
        tiles = np.full((g.count * g.threads // 32, count, 8, 8), 0xFFFF, np.uint16)
        chosen = _warps(g, active(g))
        tiles[chosen] = rows.reshape(-1, count, 8, 8)
        if transposed:
            tiles = np.ascontiguousarray(tiles.swapaxes(2, 3))
        words = tiles.view(np.uint32).reshape(g.count, -1, count, 32)
        return tuple(words[:, :, n].reshape(g.count, g.threads) for n in range(count))

    return t.assign_vector(i, i.operands[0], TYPES["u32"], read)


@instruction("stmatrix", "sync aligned m8n8 trans shared shared::cta")
def store_matrices(t: Translator, i: Instruction) -> Step:
    """The reverse: a warp stores matrices of 8 by 8 halves row by row."""
    count, transposed = _matrices(i, 1)
    reads = [t.bits(i, part, TYPES["u32"]) for part in elements(i.operands[1])]
    address, check = t.address(i, i.operands[0]), t.require_whole_warps(i)
    active = t.active(i)

    def step(g: Group) -> None:
        check(g)
        words = np.stack([g.spread(read(g)).reshape(-1, 32) for read in reads], 1)
        tiles = words.view(np.uint16).reshape(-1, count, 8, 8)[_warps(g, active(g))]
        if transposed:
            tiles = tiles.swapaxes(2, 3)
        accesses = _rows_of_matrices(g, i, count, address(g), active(g))
        g.shared.store(accesses, np.ascontiguousarray(tiles).reshape(-1, 8))

    return step


def _matrices(i: Instruction, operand: int) -> tuple[int, bool]:
    if i.modifiers[-1] != "b16" or "m8n8" not in i.modifiers:
        raise not_here(i)
    return len(elements(i.operands[operand])), "trans" in i.modifiers


def _warps(g: Group, active: Array | None) -> Array | slice:
    """The warps that take part, in one row."""
    return slice(None) if active is None else g.spread(active).reshape(-1, 32)[:, 0]


def _rows_of_matrices(
    g: Group, i: Instruction, count: int, address: Array, active: Array | None
) -> Accesses:
    """The accesses of 16 bytes by the first 8 threads for each matrix."""
    first = np.arange(g.threads) % 32 < 8 * count
    first = first[None] if active is None else active & first
    return g.accesses(i, 16, address, np.flatnonzero(g.spread(first)))
