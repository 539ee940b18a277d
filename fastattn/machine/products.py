"""Products of small matrices by tensor cores, whose parts lie spread over the threads of a warp.

Products of 16-bit numbers are exact in float32, and so are nearly all sums of them in float64: here
an element of a product is the exact sum, rounded once when it is added to the accumulator. A GPU
adds fewer bits, in an order that NVIDIA does not tell.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from .arithmetic import TYPES, UNSIGNED, Array, Type, decode
from .parser import Instruction, elements
from .translator import Step, Translator, instruction, not_here

if TYPE_CHECKING:
    from .group import Group


def shape_of(i: Instruction) -> tuple[int, int, int]:
    """The rows, columns and depth of a product."""
    for modifier in i.modifiers:
        if match := re.fullmatch(r"m(\d+)n(\d+)k(\d+)", modifier):
            m, n, k = map(int, match.groups())
            return m, n, k
    raise not_here(i)


def multiply(a: Array, b: Array, accumulator: Array) -> Array:
    """accumulator + a @ b, for stacks of float32 matrices."""
    exact = np.matmul(a.astype(np.float64), b.astype(np.float64))
    return (accumulator + exact).astype(np.float32)


def gather_left(registers: list[Array], kind: Type) -> Array:
    """The left matrices (warps, 16, k) of 32 threads' registers (warps, 32).

    A thread in row g and column t of the warp, seen as 8 rows of 4 threads, holds two neighbouring
    halves, or one float32, of row g at place t; then of row g + 8; then both again for the other
    half of the depth.
    """
    return _gather(registers, kind, halves_of_depth=2)


def gather_right(registers: list[Array], kind: Type) -> Array:
    """The right matrices (warps, k, 8); a thread's row is the column here."""
    return _gather(registers, kind, halves_of_depth=len(registers)).swapaxes(1, 2)


def _gather(registers: list[Array], kind: Type, halves_of_depth: int) -> Array:
    words = np.stack([register.reshape(-1, 8, 4) for register in registers], 1)
    numbers = decode(words.view(UNSIGNED[kind.size]), kind)
    warps, _, _, _ = words.shape
    # (warps, half of the depth, half of the rows, row, place, number in a register)
    numbers = numbers.reshape(warps, halves_of_depth, -1, 8, 4, 4 // kind.size)
    numbers = numbers.transpose(0, 2, 3, 1, 4, 5)
    return numbers.reshape(warps, 8 * numbers.shape[1], -1)


def spread_result(result: Array) -> list[Array]:
    """The registers (warps, 32) that hold matrices (warps, 16, n): four for each 8 columns.

    The thread in row g and column t holds rows g and g + 8, columns 2 t and 2 t + 1.
    """
    warps, _, columns = result.shape
    parts = result.reshape(warps, 2, 8, columns // 8, 4, 2).transpose(3, 1, 5, 0, 2, 4)
    return list(parts.reshape(-1, warps, 32))


def gather_result(registers: list[Array]) -> Array:
    """The reverse of `spread_result`."""
    parts = np.stack([register.reshape(-1, 32) for register in registers])
    _, warps, _ = parts.shape
    parts = parts.reshape(-1, 2, 2, warps, 8, 4).transpose(3, 1, 4, 0, 5, 2)
    return parts.reshape(warps, 16, -1)


SHAPES = {("f16", 16), ("bf16", 16), ("tf32", 8), ("f16", 8), ("bf16", 8)}


@instruction("mma", "sync aligned row col")
def multiply_in_warp(t: Translator, i: Instruction) -> Step:
    """A warp's product: (16, k) times (k, 8), added to an accumulator."""
    m, n, k = shape_of(i)
    result, left, right, accumulator = i.modifiers[-4:]
    if (m, n, result, accumulator) != (16, 8, "f32", "f32") or left != right:
        raise not_here(i)
    if (left, k) not in SHAPES or i.modifiers[-6:-4] != ("row", "col"):
        raise not_here(i)
    kind = TYPES[left]
    reads = [
        [t.bits(i, part, TYPES["b32"]) for part in elements(operand)] for operand in i.operands[1:]
    ]
    check = t.require_whole_warps(i)

    def compute(g: Group) -> tuple[Array, ...]:
        check(g)
        a, b, c = ([g.spread(read(g)) for read in operand] for operand in reads)
        c = gather_result([part.view(np.float32) for part in c])
        product = multiply(gather_left(a, kind), gather_right(b, kind), c)
        return tuple(
            register.view(np.uint32).reshape(g.count, g.threads)
            for register in spread_result(product)
        )

    return t.assign_vector(i, i.operands[0], TYPES["b32"], compute)
