"""Instructions that compute: each thread for itself, from its own registers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from . import arithmetic
from .arithmetic import ROUND, TYPES, UNSIGNED, Array, Type, flush
from .parser import Instruction, elements
from .translator import Read, Step, Translator, instruction, not_here, type_of

if TYPE_CHECKING:
    from .group import Group

Function = Callable[..., Array]

FUNCTIONS: dict[str, tuple[Function, int, str]] = {
    "add": (np.add, 2, "rn ftz"),
    "sub": (np.subtract, 2, "rn ftz"),
    "and": (np.bitwise_and, 2, ""),
    "or": (np.bitwise_or, 2, ""),
    "xor": (np.bitwise_xor, 2, ""),
    "not": (np.invert, 1, ""),
    "neg": (np.negative, 1, "ftz"),
    "abs": (np.abs, 1, "ftz"),
    "rem": (arithmetic.remainder, 2, ""),
    "ex2": (arithmetic.exp2, 1, "approx ftz"),
    "lg2": (arithmetic.log2, 1, "approx ftz"),
    "sin": (arithmetic.sine, 1, "approx ftz"),
    "cos": (arithmetic.cosine, 1, "approx ftz"),
    "tanh": (arithmetic.tangent, 1, "approx"),
    "rcp": (arithmetic.reciprocal, 1, "approx rn ftz"),
    "sqrt": (arithmetic.square_root, 1, "approx rn ftz"),
    "rsqrt": (arithmetic.reciprocal_root, 1, "approx ftz"),
    "fma": (arithmetic.fma, 3, "rn ftz"),
}
"""Functions of numbers of the type that the instruction names: of how many, and modifiers."""


def _register_functions() -> None:
    for opcode, (function, count, modifiers) in FUNCTIONS.items():

        def handler(
            t: Translator, i: Instruction, function: Function = function, count: int = count
        ) -> Step:
            return elementwise(t, i, vary(t, i, function), count)

        instruction(opcode, modifiers)(handler)


def vary(t: Translator, i: Instruction, function: Function) -> Function:
    """A function as another GPU may compute it, where the instruction approximates it."""
    if t.variation is not None and {"approx", "full"} & set(i.modifiers):
        return t.variation.perturb(function, i.opcode, type_of(i))
    return function


def elementwise(t: Translator, i: Instruction, function: Function, count: int) -> Step:
    """Set the first operand to a function of the others, of which there must be `count`."""
    if len(i.operands) != 1 + count:
        raise not_here(i)
    kind, others = _types(i)
    *first, last = i.operands[1:]
    reads = [t.numbers(i, operand, others) for operand in first] + [t.numbers(i, last, kind)]
    if "ftz" in i.modifiers:
        inner = function
        function = lambda *x: flush(inner(*map(flush, x)))  # noqa: E731
    compute: Read
    if count == 1:
        (a,) = reads
        compute = lambda g: function(a(g))  # noqa: E731
    elif count == 2:
        a, b = reads
        compute = lambda g: function(a(g), b(g))  # noqa: E731
    else:
        a, b, c = reads
        compute = lambda g: function(a(g), b(g), c(g))  # noqa: E731
    return t.assign(i, i.operands[0], kind, compute)


def _types(i: Instruction) -> tuple[Type, Type]:
    """The type of the result and the last operand, and that of the operands before it.

    They differ where 16-bit floats are added to float32: `fma.rn.f32.bf16`.
    """
    types = [TYPES[m] for m in i.modifiers if m in TYPES]
    if len(types) == 2 and i.opcode in ("add", "sub", "fma") and types[0] is TYPES["f32"]:
        return types[0], types[1]
    return type_of(i), type_of(i)


_register_functions()


@instruction("div", "approx full rn ftz")
def division(t: Translator, i: Instruction) -> Step:
    """The quotient; .approx by way of 1 / b, which of a large b is nothing."""
    quotient = vary(t, i, arithmetic.divide)
    if "approx" not in i.modifiers:
        return elementwise(t, i, quotient, 2)
    return elementwise(t, i, lambda a, b: arithmetic.vanish(quotient(a, b), a, b), 2)


@instruction("min max", "ftz NaN relu")
def extremum(t: Translator, i: Instruction) -> Step:
    """The least or greatest of two or three numbers; with .relu not below zero."""
    kind = type_of(i)
    names = ("minimum", "maximum") if "NaN" in i.modifiers else ("fmin", "fmax")
    function = getattr(np, names[i.opcode == "max"])
    if "relu" in i.modifiers:
        if kind.kind != "i":
            raise not_here(i)
        inner = function
        function = lambda a, b: np.maximum(inner(a, b), a.dtype.type(0))  # noqa: E731
    if len(i.operands) == 4:
        pair = function
        return elementwise(t, i, lambda a, b, c: pair(pair(a, b), c), 3)
    return elementwise(t, i, function, 2)


@instruction("mul mad", "lo hi wide rn ftz")
def multiply(t: Translator, i: Instruction) -> Step:
    """The product of floats, or the lower or upper half, or all, of a product of integers."""
    kind = type_of(i)
    if kind.kind == "f":
        product = i.opcode == "mul"
        return elementwise(t, i, np.multiply if product else arithmetic.fma, 2 if product else 3)
    a, b = (t.numbers(i, operand, kind) for operand in i.operands[1:3])
    result = kind
    whole: Read = lambda g: a(g) * b(g)  # noqa: E731
    if "wide" in i.modifiers:
        result = TYPES[f"{kind.name[0]}{16 * kind.size}"]
        wide = f"{kind.kind}{2 * kind.size}"
        whole = lambda g: a(g).astype(wide) * b(g).astype(wide)  # noqa: E731
    elif "hi" in i.modifiers:
        whole = lambda g: arithmetic.upper_product(a(g), b(g))  # noqa: E731
    if i.opcode == "mul":
        return t.assign(i, i.operands[0], result, whole)
    addend = t.numbers(i, i.operands[3], result)
    return t.assign(i, i.operands[0], result, lambda g: whole(g) + addend(g))


@instruction("shl shr")
def shift(t: Translator, i: Instruction) -> Step:
    """Bits moved up or down; beyond the width nothing is left of them but the sign."""
    kind = type_of(i)
    a, by = t.numbers(i, i.operands[1], kind), t.bits(i, i.operands[2], TYPES["u32"])
    function = arithmetic.shift_left if i.opcode == "shl" else arithmetic.shift_right
    return t.assign(i, i.operands[0], kind, lambda g: function(a(g), by(g)))


@instruction("shf", "l r wrap clamp")
def shift_pair(t: Translator, i: Instruction) -> Step:
    """Half of a shifted pair of registers."""
    a, b, c = (t.bits(i, operand, TYPES["u32"]) for operand in i.operands[1:])
    left, wrap = "l" in i.modifiers, "wrap" in i.modifiers
    return t.assign(
        i,
        i.operands[0],
        TYPES["u32"],
        lambda g: arithmetic.shift_pair(a(g), b(g), c(g), left, wrap),
    )


@instruction("bfe bfi")
def bit_field(t: Translator, i: Instruction) -> Step:
    """Some bits of a register extracted, or inserted into another."""
    kind = type_of(i)
    numbers = [t.numbers(i, operand, kind) for operand in i.operands[1:-2]]
    places = [t.bits(i, operand, TYPES["u32"]) for operand in i.operands[-2:]]
    function = arithmetic.extract_bits if i.opcode == "bfe" else arithmetic.insert_bits
    reads = [*numbers, *places]
    return t.assign(i, i.operands[0], kind, lambda g: function(*(read(g) for read in reads)))


@instruction("prmt lop3")
def bit_table(t: Translator, i: Instruction) -> Step:
    """Bytes, or bits, chosen by a table that is the last operand."""
    words = TYPES["u32"]
    a, b, c = (t.bits(i, operand, words) for operand in i.operands[1:4])
    if i.opcode == "prmt":
        if len(i.modifiers) != 1:
            raise not_here(i)
        return t.assign(
            i, i.operands[0], words, lambda g: arithmetic.permute_bytes(a(g), b(g), c(g))
        )
    table = int(i.operands[4], 0)
    return t.assign(
        i, i.operands[0], words, lambda g: arithmetic.look_up_bits(a(g), b(g), c(g), table)
    )


@instruction("popc clz")
def count_bits(t: Translator, i: Instruction) -> Step:
    """How many bits are one, or are zero above the highest."""
    a = t.bits(i, i.operands[1], type_of(i))
    function = arithmetic.population if i.opcode == "popc" else arithmetic.leading_zeros
    return t.assign(i, i.operands[0], TYPES["u32"], lambda g: function(a(g)))


@instruction("selp")
def select(t: Translator, i: Instruction) -> Step:
    """One of two registers by a predicate."""
    kind = type_of(i)
    a, b = (t.bits(i, operand, kind) for operand in i.operands[1:3])
    p = t.bits(i, i.operands[3], TYPES["pred"])
    return t.assign_bits(i, i.operands[0], kind, lambda g: np.where(p(g), a(g), b(g)))


@instruction("mov")
def move(t: Translator, i: Instruction) -> Step:
    """A register copied, put together of narrower ones, or taken apart."""
    kind = type_of(i)
    to, source = i.operands
    if source.startswith("{"):
        parts = elements(source)
        part = TYPES[f"u{8 * kind.size // len(parts)}"]
        reads = [(t.bits(i, p, part), 8 * part.size * n) for n, p in enumerate(parts)]

        def join(g: Group) -> Array:
            whole = np.zeros((1, 1), kind.bits)
            for read, place in reads:
                whole = whole | read(g).astype(kind.bits) << place
            return whole

        return t.assign_bits(i, to, kind, join)
    read = t.bits(i, source, kind)
    if not to.startswith("{"):
        return t.assign_bits(i, to, kind, read)
    count = len(elements(to))
    part = TYPES[f"u{8 * kind.size // count}"]

    def take_apart(g: Group) -> tuple[Array, ...]:
        whole = read(g)
        return tuple((whole >> 8 * part.size * n).astype(part.bits) for n in range(count))

    return t.assign_vector(i, to, part, take_apart)


@instruction("cvta", "to global shared param")
def convert_address(t: Translator, i: Instruction) -> Step:
    """An address of global memory is the same in the generic space, which is all that is used."""
    if "shared" in i.modifiers:
        raise not_here(i)
    return move(t, i)


COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
COMBINATIONS = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _neither_is_nan(a: Array, b: Array) -> Array:
    return ~(np.isnan(a) | np.isnan(b))


def comparison(name: str, floating: bool) -> Function:
    """A comparison by its modifier. With a u in the end it is true of NaN as well."""
    if name in ("num", "nan"):
        return (
            _neither_is_nan if name == "num" else lambda a, b: np.logical_not(_neither_is_nan(a, b))
        )
    if name in COMPARISONS:
        if name == "ne" and floating:
            return lambda a, b: (a != b) & _neither_is_nan(a, b)
        return COMPARISONS[name]
    ordered = COMPARISONS[name[:-1]]
    return lambda a, b: ordered(a, b) | ~_neither_is_nan(a, b)


@instruction(
    "setp",
    "eq ne lt le gt ge lo ls hi hs equ neu ltu leu gtu geu num nan and or xor ftz",
)
def set_predicate(t: Translator, i: Instruction) -> Step:
    """A comparison, combined with another predicate where there is one."""
    kind = type_of(i)
    name, *others = i.modifiers[:-1]
    compare = comparison(name, kind.kind == "f")
    combine = next((COMBINATIONS[m] for m in others if m in COMBINATIONS), None)
    a, b = (t.numbers(i, operand, kind) for operand in i.operands[1:3])
    if "ftz" in others:
        a, b = (lambda g, x=x: flush(x(g)) for x in (a, b))
    result = i.operands[0].split("|")
    predicate = TYPES["pred"]
    if kind.lanes == 2:
        return t.assign_vector(i, ",".join(result), predicate, lambda g: tuple(compare(a(g), b(g))))
    if len(result) > 1:
        raise not_here(i)
    if combine is None:
        return t.assign_bits(i, result[0], predicate, lambda g: compare(a(g), b(g)))
    c = t.bits(i, i.operands[3], predicate)
    return t.assign_bits(i, result[0], predicate, lambda g: combine(compare(a(g), b(g)), c(g)))


@instruction("cvt", "rn rna rni rzi rmi rpi ftz sat")
def convert(t: Translator, i: Instruction) -> Step:
    """A number as one of another type, rounded where it must be."""
    types = [TYPES[m] for m in i.modifiers if m in TYPES]
    to, source = types[0], types[-1]
    rounding = next((m for m in i.modifiers if m in ROUND), None)
    narrower = to.kind == "f" and (source.kind != "f" or to.size * 8 // to.lanes < 8 * source.size)
    if to.name == "tf32":
        narrower = "rna" not in i.modifiers
    if narrower and to.kind == "f" and "rn" not in i.modifiers:
        raise not_here(i, "this machine does not round so")
    reads = [t.numbers(i, operand, source) for operand in i.operands[1:]]
    if "ftz" in i.modifiers:
        reads = [lambda g, x=x: flush(x(g)) for x in reads]
    if to.lanes == 2:
        upper, lower = reads
        return t.assign(i, i.operands[0], to, lambda g: _both(lower(g), upper(g)))
    (read,) = reads
    function = _conversion(to, source, rounding)
    if "sat" in i.modifiers:
        if to.kind != "f" or source.kind != "f":
            raise not_here(i)
        return t.assign(i, i.operands[0], to, lambda g: np.clip(function(read(g)), 0.0, 1.0))
    return t.assign(i, i.operands[0], to, lambda g: function(read(g)))


def _both(lower: Array, upper: Array) -> Array:
    lower, upper = np.broadcast_arrays(lower, upper)
    return np.stack([lower, upper])


def _conversion(to: Type, source: Type, rounding: str | None) -> Function:
    if to.kind != "f" and source.kind == "f":
        assert rounding is not None
        return lambda x: arithmetic.to_integer(x, rounding, to)
    if to.kind == "f" and source.kind == "f":
        wide = np.float64 if to.size == 8 else np.float32
        return (lambda x: ROUND[rounding](x)) if rounding else (lambda x: x.astype(wide))
    if to.kind == "f":
        return lambda x: x.astype(np.float64 if to.size == 8 else np.float32)
    target = np.dtype(f"i{to.size}") if to.kind == "i" else UNSIGNED[to.size]
    return lambda x: x.astype(target)
