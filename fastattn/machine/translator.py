"""Instructions made into Python functions, each of which executes one on a group of CTAs.

A handler for every opcode looks at an instruction once, finds registers, constants and types in its
text, and returns a step: a function of the group that reads registers, computes with all threads at
once, and writes registers. What a handler does not know is an error that names the line.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from .arithmetic import POISON, TYPES, Array, Type, decode, encode, resize
from .parser import Instruction, Kernel, PtxError, elements
from .variation import Variation, contract

if TYPE_CHECKING:
    from .group import Group

Step = Callable[["Group"], None]
Read = Callable[["Group"], Array]
Handler = Callable[["Translator", Instruction], Step | None]

AnyHandler = TypeVar("AnyHandler", bound=Handler)

HANDLERS: dict[str, tuple[Handler, frozenset[str]]] = {}
"""What translates instructions whose names begin so, and the modifiers that it understands."""

SYNCHRONISING = re.compile(
    r"mbarrier|bar\.sync|bar\.arrive|barrier|setmaxnreg|cp\.async|wgmma\.(commit|wait)_group|fence"
)
"""After instructions with such names a warp lets others go on."""

UNDERSTOOD = re.compile(r"[vx]\d|m\d+n\d+(k\d+)?")
"""Modifiers that say how many numbers there are, which handlers read by themselves."""

SPECIAL = ("tid", "ntid", "ctaid", "nctaid")
SPECIAL_REGISTERS = {f"%{name}.{axis}" for name in SPECIAL for axis in "xyz"} | {
    "%laneid",
    "%warpid",
}


def instruction(opcodes: str, modifiers: str = "") -> Callable[[AnyHandler], AnyHandler]:
    """Say what translates instructions whose names begin so, and which modifiers it understands."""

    def register(handler: AnyHandler) -> AnyHandler:
        for opcode in opcodes.split():
            HANDLERS[opcode] = handler, frozenset(modifiers.split())
        return handler

    return register


def type_of(i: Instruction) -> Type:
    """The one type that an instruction names, at its end."""
    if i.modifiers[-1] not in TYPES or sum(m in TYPES for m in i.modifiers) > 1:
        raise not_here(i)
    return TYPES[i.modifiers[-1]]


def not_here(i: Instruction, why: str = "this machine knows no such instruction") -> PtxError:
    """The error for what is not understood."""
    return PtxError(f"{i.place}: {why}: {i}")


class Translator:
    """A kernel as steps, block by block, each translated when control first comes there."""

    def __init__(self, kernel: Kernel, variation: Variation | None = None) -> None:
        if kernel.by_warp:
            kernel.cut_behind(SYNCHRONISING)
        self.kernel = kernel
        self.variation = variation
        self.parameters = dict(kernel.parameters)
        self.blocks = kernel.blocks
        if variation is not None:
            self.blocks = [contract(block, kernel, variation) for block in kernel.blocks]
        self.index = {name: index for index, name in enumerate(kernel.registers)}
        self.types = [TYPES[kind] for kind in kernel.registers.values()]
        self.poison = [POISON[kind.bits] for kind in self.types]
        self.granule = _granule(kernel)
        self._translated: dict[int, list[Step]] = {}
        self._blocks_of = self._find_blocks_of_registers()

    def steps(self, block: int) -> list[Step]:
        """The steps of a block; the last may say where control goes, else it goes on."""
        if block not in self._translated:
            self._translated[block] = self._translate(block)
        return self._translated[block]

    def lines_reached(self) -> set[int]:
        """The lines of all blocks that control has come to."""
        return {i.line for block in self._translated for i in self.blocks[block]}

    def _translate(self, block: int) -> list[Step]:
        steps: list[Step] = []
        dropped: list[list[int]] = []
        gone: set[str] = set()
        # A register that only this block knows is forgotten after it was last named, which keeps
        # memory small; should something read it all the same, it is poison.
        for i in reversed(self.blocks[block]):
            names = {name for name in self._names(i) if self._blocks_of[name] == {block}} - gone
            gone |= names
            dropped.append([self.index[name] for name in names])
        for i, forgotten in zip(self.blocks[block], reversed(dropped), strict=True):
            step = self._step(i)
            if step is not None:
                steps.append(step)
            if forgotten:
                steps.append(self._forget(forgotten))
        return steps

    def _step(self, i: Instruction) -> Step | None:
        parts = i.opcode, *i.modifiers
        # The longest name that has a handler: cp.async.bulk before cp.
        names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
        name = next((name for name in names if name in HANDLERS), "")
        handler, modifiers = HANDLERS.get(name, (None, frozenset()))
        unknown = [
            m
            for m in parts[1 + name.count(".") :]
            if not (m in TYPES or m in modifiers or UNDERSTOOD.fullmatch(m))
        ]
        if handler is None or unknown:
            raise not_here(i)
        return handler(self, i)

    def _forget(self, registers: list[int]) -> Step:
        poison = [(index, self.poison[index]) for index in registers]

        def step(g: Group) -> None:
            for index, value in poison:
                g.registers[index] = value

        return step

    def _names(self, i: Instruction) -> list[str]:
        names = [name for operand in i.operands for name in self.kernel.registers_in(operand)]
        return [*names, i.guard] if i.guard else names

    def _find_blocks_of_registers(self) -> dict[str, set[int]]:
        found: dict[str, set[int]] = {name: set() for name in self.index}
        for number, block in enumerate(self.blocks):
            for i in block:
                # Asynchronous products use their registers until they are waited for.
                known = {number, -1} if i.opcode == "wgmma" else {number}
                for name in self._names(i):
                    found[name] |= known
        return found

    # What handlers build steps from.

    def register(self, i: Instruction, name: str) -> int:
        """The index of a register."""
        if name not in self.index:
            raise not_here(i, f"{name} is no register")
        return self.index[name]

    def bits(self, i: Instruction, operand: str, kind: Type) -> Read:
        """What reads an operand as bits of a type's width."""
        if operand in self.index:
            index = self.index[operand]
            held = self.types[index]
            if (held.kind == "?") != (kind.kind == "?") or held.size < kind.size:
                raise not_here(i, f"{operand} holds no {kind.name}")
            if held.size == kind.size:
                return lambda g: g.registers[index]
            narrow = kind.bits
            return lambda g: g.registers[index].astype(narrow)
        if operand in SPECIAL_REGISTERS:
            wanted = kind.bits
            return lambda g: g.special[operand].astype(wanted, copy=False)
        if operand in self.parameters:
            return lambda g: g.launch.parameters[operand]
        value = self._constant(i, operand, kind)
        return lambda g: value

    def numbers(self, i: Instruction, operand: str, kind: Type) -> Read:
        """What reads an operand as numbers of a type."""
        if operand.startswith("-%"):
            positive = self.numbers(i, operand[1:], kind)
            return lambda g: -positive(g)
        read = self.bits(i, operand, kind)
        if kind.kind in "u?":
            return read
        if operand not in self.index and operand not in SPECIAL_REGISTERS:
            value = decode(self._constant(i, operand, kind), kind)
            return lambda g: value
        if (view := kind.view) is not None:
            return lambda g: read(g).view(view)
        return lambda g: decode(read(g), kind)

    def _constant(self, i: Instruction, operand: str, kind: Type) -> Array:
        if match := re.fullmatch(r"0[fFdD]([0-9A-Fa-f]{8}|[0-9A-Fa-f]{16})", operand):
            value, size = int(match[1], 16), len(match[1]) // 2
            if size != kind.size:
                raise not_here(i, f"{operand} is no {kind.name}")
        elif re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)U?", operand):
            value = int(operand.rstrip("U"), 0)
        elif operand == "global_smem":
            value = 0
        else:
            raise not_here(i, f"this machine does not know what {operand} is")
        if kind.kind == "?":
            return np.full((1, 1), bool(value))
        return np.full((1, 1), value & ((1 << 8 * kind.size) - 1), kind.bits)

    def address(self, i: Instruction, operand: str) -> Read:
        """What reads the address that ``[register + offset]`` stands for."""
        match = re.fullmatch(r"\[\s*([^\s+]+)\s*(?:\+\s*(-?\w+)\s*)?\]", operand)
        if match is None:
            raise not_here(i, f"this machine cannot read the address {operand}")
        offset = int(match[2] or "0", 0)
        held = self.types[self.index[match[1]]] if match[1] in self.index else TYPES["u64"]
        base = self.bits(i, match[1], held)
        if held.size == 8:
            return lambda g: base(g).view(np.int64) + offset
        # An address of 32 bits wraps around: a loop's may count up from a negative number.
        return lambda g: base(g).astype(np.int64) + offset & 0xFFFF_FFFF

    def active(self, i: Instruction) -> Callable[[Group], Array | None]:
        """What says which threads execute an instruction: None for all."""
        if i.guard is None:
            return lambda g: g.mask
        index, negated = self.register(i, i.guard), i.negated

        def active(g: Group) -> Array:
            guard: Array = ~g.registers[index] if negated else g.registers[index]
            return guard if g.mask is None else g.mask & guard

        return active

    def assign_bits(self, i: Instruction, operand: str, kind: Type, compute: Read) -> Step:
        """A step that sets a register to bits of a type, in the threads that execute it."""
        if operand == "_":
            return lambda g: None
        index = self.register(i, operand)
        held = self.types[index]
        if (held.kind == "?") != (kind.kind == "?") or held.size < kind.size:
            raise not_here(i, f"{operand} cannot hold a {kind.name}")
        value = compute
        if held.size > kind.size:
            value = lambda g: resize(compute(g), kind, held.size)  # noqa: E731
        if i.guard is not None:
            active = self.active(i)

            def guarded(g: Group) -> None:
                mask: Any = active(g)
                g.registers[index] = np.where(mask, value(g), g.registers[index])

            return guarded

        def step(g: Group) -> None:
            mask = g.mask
            if mask is None:
                g.registers[index] = value(g)
            else:
                g.registers[index] = np.where(mask, value(g), g.registers[index])

        return step

    def assign(self, i: Instruction, operand: str, kind: Type, compute: Read) -> Step:
        """A step that sets a register to numbers of a type, in the threads that execute it."""
        return self.assign_bits(i, operand, kind, lambda g: encode(compute(g), kind))

    def assign_vector(
        self,
        i: Instruction,
        operand: str,
        kind: Type,
        compute: Callable[[Group], tuple[Array, ...]],
    ) -> Step:
        """A step that sets registers to what one computation gives for all of them."""
        parts = elements(operand)
        box: list[Array] = [POISON[kind.bits]] * len(parts)
        steps = [
            self.assign_bits(i, part, kind, functools.partial(lambda n, g: box[n], number))
            for number, part in enumerate(parts)
        ]

        def step(g: Group) -> None:
            box[:] = compute(g)
            for assign in steps:
                assign(g)

        return step

    def require_whole_warps(self, i: Instruction) -> Callable[[Group], None]:
        """What raises an error unless the threads of every warp execute an instruction together."""
        active = self.active(i)

        def check(g: Group) -> None:
            mask = active(g)
            if mask is not None:
                warps = g.spread(mask).reshape(g.count, -1, 32)
                if (warps != warps[:, :, :1]).any():
                    raise not_here(i, "some threads of a warp do not come here with the others")

        return check


def _granule(kernel: Kernel) -> int:
    """The bytes of the smallest access to shared memory, up to 8: what is watched as one."""
    sizes = [8]
    for block in kernel.blocks:
        for i in block:
            if i.opcode in ("ld", "st") and any(m.startswith("shared") for m in i.modifiers):
                vector = next((int(m[1:]) for m in i.modifiers if m in ("v2", "v4")), 1)
                sizes.append(vector * type_of(i).size)
            elif i.name.startswith(("cp.async.ca", "cp.async.cg")):
                sizes.append(int(i.operands[2], 0))
    return min(sizes)
