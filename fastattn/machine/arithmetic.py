"""The numbers in registers, and the arithmetic that numpy does not have.

A register is an array of bits, unsigned integers as wide as the register, with an element for each
thread. What the bits mean is up to the instruction: `decode` makes numbers of them and `encode`
bits of numbers. 16-bit floats are computed in float32 and rounded.

Approximate instructions are computed exactly and rounded once; see `variation`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]


class Type(NamedTuple):
    """A type of PTX: what kind of number it is, its bytes, and how many numbers are in it."""

    name: str
    kind: str
    size: int
    lanes: int = 1

    @property
    def bits(self) -> np.dtype:
        """How a register holds it."""
        return np.dtype(bool) if self.kind == "?" else UNSIGNED[self.size]

    @property
    def view(self) -> np.dtype | None:
        """What its numbers are called in numpy, where numpy has them."""
        if self.kind == "i" or self.name in ("f32", "f64"):
            return np.dtype(f"{self.kind}{self.size}")
        return None


UNSIGNED = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}

TYPES = {
    "pred": Type("pred", "?", 1),
    **{f"{k}{8 * n}": Type(f"{k}{8 * n}", "u", n) for k in "bu" for n in (1, 2, 4, 8)},
    **{f"s{8 * n}": Type(f"s{8 * n}", "i", n) for n in (1, 2, 4, 8)},
    "f16": Type("f16", "f", 2),
    "bf16": Type("bf16", "f", 2),
    "f32": Type("f32", "f", 4),
    "tf32": Type("tf32", "f", 4),
    "f64": Type("f64", "f", 8),
    "f16x2": Type("f16x2", "f", 4, 2),
    "bf16x2": Type("bf16x2", "f", 4, 2),
    "f32x2": Type("f32x2", "f", 8, 2),
}

POISON = {np.dtype(bool): np.ones((1, 1), bool)}
"""What was never written: NaN as a float of any width, -1 as an integer."""
POISON |= {kind: np.full((1, 1), np.iinfo(kind).max, kind) for kind in UNSIGNED.values()}


def decode(bits: Array, kind: Type) -> Array:
    """The numbers in registers; two in a register become a leading dimension."""
    if kind.lanes == 2:
        single = TYPES[kind.name[:-2]]
        halves = bits, bits >> 8 * single.size
        return np.stack([decode(half.astype(single.bits), single) for half in halves])
    if kind.name == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    if kind.name == "f16":
        return bits.view(np.float16).astype(np.float32)
    if kind.name == "tf32":
        # A product looks at no more than the upper 19 bits.
        return (bits & 0xFFFFE000).view(np.float32)
    return bits if kind.view is None else bits.view(kind.view)


def encode(numbers: Array, kind: Type) -> Array:
    """The bits of numbers, rounded to the nearest where the type is narrower than they are."""
    if kind.lanes == 2:
        single = TYPES[kind.name[:-2]]
        low, high = (encode(half, single).astype(kind.bits) for half in numbers)
        return low | high << 8 * single.size
    if kind.name == "bf16":
        wide = np.ascontiguousarray(numbers, np.float32)
        bits = wide.view(np.uint32)
        bits = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        return np.where(np.isnan(wide), np.uint32(0x7FFF), bits).astype(np.uint16)
    if kind.name == "f16":
        return numbers.astype(np.float16).view(np.uint16)
    if kind.name == "tf32":
        # To nearest, ties away from zero.
        return (numbers.view(np.uint32) + 0x1000) & 0xFFFFE000
    if kind.kind == "f":
        return numbers.astype(f"f{kind.size}", copy=False).view(kind.bits)
    return numbers.view(kind.bits) if numbers.dtype != kind.bits else numbers


def resize(bits: Array, source: Type, bytes_wanted: int) -> Array:
    """Integers cut off, or extended by zeros or, where they are signed, by their sign."""
    if bits.dtype == bool or bits.itemsize == bytes_wanted:
        return bits
    numbers = bits.view(f"i{bits.itemsize}") if source.kind == "i" else bits
    return numbers.astype(f"{numbers.dtype.kind}{bytes_wanted}").view(UNSIGNED[bytes_wanted])


def flush(x: Array) -> Array:
    """Subnormal float32 numbers as zeros of the same sign (the modifier .ftz)."""
    return np.where(abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def fma(a: Array, b: Array, c: Array) -> Array:
    """a * b + c, rounded once."""
    if a.dtype == np.float64:
        return _fma_of_float64(a, b, c)
    product, addend = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + addend
    # The product is exact. The sum may have been rounded to the middle between two float32 numbers,
    # whence only the remainder tells the way.
    middle = (total.view(np.uint64) & 0x1FFFFFFF) == 0x10000000
    if middle.any():
        remainder = _remainder_of_sum(product, addend, total)
        towards = np.where(remainder > 0, np.inf, -np.inf)
        total = np.where(middle & (remainder != 0), np.nextafter(total, towards), total)
    return total.astype(np.float32)


def _remainder_of_sum(a: Array, b: Array, total: Array) -> Array:
    """What rounding took from the sum of two numbers, exactly (Knuth's TwoSum)."""
    part = total - a
    return (a - (total - part)) + (b - part)


def _fma_of_float64(a: Array, b: Array, c: Array) -> Array:
    """Nearly rounded once: product and sum carry their remainders (Dekker)."""

    def split(x: Array) -> tuple[Array, Array]:
        high = x * 134217729.0
        high = high - (high - x)
        return high, x - high

    product = a * b
    (a1, a0), (b1, b0) = split(a), split(b)
    remainder = ((a1 * b1 - product) + a1 * b0 + a0 * b1) + a0 * b0
    total = product + c
    remainder = remainder + _remainder_of_sum(product, c, total)
    return np.where(np.isfinite(remainder), total + remainder, total)


def divide(a: Array, b: Array) -> Array:
    """The quotient; of integers the part before the point."""
    if a.dtype.kind == "f":
        return a / b
    b = np.where(b == 0, b.dtype.type(1), b)
    if a.dtype.kind == "u":
        return a // b
    quotient = abs(a.astype(np.int64)) // abs(b.astype(np.int64))
    return np.where((a < 0) != (b < 0), -quotient, quotient).astype(a.dtype)


def vanish(quotient: Array, a: Array, b: Array) -> Array:
    """A quotient by way of 1 / b, which for a b beyond 2^126 is below all normal numbers, so 0."""
    is_zero = np.isfinite(b) & (abs(b) > 2.0**126)
    return np.where(is_zero, a * np.copysign(b.dtype.type(0), b), quotient)


def remainder(a: Array, b: Array) -> Array:
    """The remainder of `divide`, which has the sign of a."""
    return a - divide(a, b) * b


def minimum(a: Array, b: Array) -> Array:
    """The lesser of two; a number rather than NaN."""
    return np.fmin(a, b)


def maximum(a: Array, b: Array) -> Array:
    """The greater of two; a number rather than NaN."""
    return np.fmax(a, b)


def upper_product(a: Array, b: Array) -> Array:
    """The upper half of the bits of a product of integers."""
    if a.itemsize == 4:
        wide = f"{a.dtype.kind}8"
        return (a.astype(wide) * b.astype(wide) >> 32).astype(a.dtype)
    x, y = a.view(np.uint64), b.view(np.uint64)
    (x1, x0), (y1, y0) = ((v >> 32, v & 0xFFFFFFFF) for v in (x, y))
    middle = x1 * y0 + (x0 * y0 >> 32)
    high = x1 * y1 + (middle >> 32) + (x0 * y1 + (middle & 0xFFFFFFFF) >> 32)
    if a.dtype.kind == "i":
        zero = np.uint64(0)
        high = high - np.where(a < 0, y, zero) - np.where(b < 0, x, zero)
    return high.view(a.dtype)


def shift_left(a: Array, by: Array) -> Array:
    """a << by, which is 0 from the width on."""
    return np.left_shift(a, by.astype(a.dtype)) if by.dtype != a.dtype else a << by


def shift_right(a: Array, by: Array) -> Array:
    """a >> by, which fills up with zeros or the sign."""
    return np.right_shift(a, by.astype(a.dtype)) if by.dtype != a.dtype else a >> by


def shift_pair(low: Array, high: Array, by: Array, left: bool, wrap: bool) -> Array:
    """32 of the 64 bits (high, low) after a shift."""
    by = (by & 31 if wrap else np.minimum(by, np.uint32(32))).astype(np.uint64)
    both = high.astype(np.uint64) << 32 | low
    return ((both << by) >> 32 if left else both >> by).astype(np.uint32)


def extract_bits(a: Array, start: Array, length: Array) -> Array:
    """`length` bits of a from `start` on; of a signed integer with its sign."""
    width = 8 * a.itemsize
    start, length = ((x & 255).astype(np.uint64) for x in (start, length))
    wide = a.astype(f"{a.dtype.kind}8").view(np.uint64)
    mask = (np.uint64(1) << length) - 1
    found = (wide >> start) & mask
    if a.dtype.kind == "i":
        top = np.minimum(start + length - 1, np.uint64(width - 1))
        found = np.where((length > 0) & (wide >> top & 1 == 1), found | ~mask, found)
    return found.astype(UNSIGNED[a.itemsize]).view(a.dtype)


def insert_bits(a: Array, b: Array, start: Array, length: Array) -> Array:
    """b with its `length` bits from `start` on taken from a."""
    start, length = start.astype(np.uint64), length.astype(np.uint64)
    mask = (((np.uint64(1) << length) - 1) << start).astype(b.dtype)
    return (b & ~mask) | (a << start.astype(a.dtype) & mask)


def permute_bytes(a: Array, b: Array, selector: Array) -> Array:
    """Four bytes out of the eight of (b, a), each chosen by four bits of the selector."""
    both = b.astype(np.uint64) << 32 | a
    result = np.zeros((1, 1), np.uint32)
    for index in range(4):
        choice = selector >> 4 * index
        byte = (both >> ((choice & 7).astype(np.uint64) * 8)).astype(np.uint32) & 255
        sign = np.where(byte & 128, np.uint32(255), np.uint32(0))
        result = result | np.where(choice & 8, sign, byte) << 8 * index
    return result


def look_up_bits(a: Array, b: Array, c: Array, table: int) -> Array:
    """Each bit looked up in a table of eight by the bits of a, b and c."""
    result = np.zeros((1, 1), np.uint32)
    for index in range(8):
        if table >> index & 1:
            result = result | (
                (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
            )
    return result


def leading_zeros(a: Array) -> Array:
    """How many bits are zero above the highest one."""
    _, exponent = np.frexp((a >> 32).astype(np.float64) if a.itemsize == 8 else a.astype(float))
    if a.itemsize == 8:
        _, low = np.frexp((a & 0xFFFFFFFF).astype(np.float64))
        exponent = np.where(exponent > 0, exponent + 32, low)
    return (8 * a.itemsize - exponent).astype(np.uint32)


ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
"""Rounding of floats to integers by modifier."""


def to_integer(x: Array, rounding: str, kind: Type) -> Array:
    """Floats as integers, the nearest there are; NaN is 0."""
    target = np.dtype(f"{kind.kind}{kind.size}")
    limits = np.iinfo(target)
    x = ROUND[rounding](x.astype(np.float64))
    inside = (x >= float(limits.min)) & (x < float(limits.max))
    edge = np.where(x > 0, limits.max, np.where(np.isnan(x), 0, limits.min)).astype(target)
    return np.where(inside, np.where(inside, x, 0).astype(target), edge)


def population(a: Array) -> Array:
    """How many bits are one."""
    return np.bitwise_count(a).astype(np.uint32)


def _wide(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """A function of float32, right to the last bit but for ties, wherever an element stands.

    numpy's own float32 functions differ in the last bits between the body and the end of an array.
    """
    return lambda x: function(x.astype(np.float64)).astype(x.dtype)


exp2, log2, sine, cosine, tangent = map(_wide, (np.exp2, np.log2, np.sin, np.cos, np.tanh))
square_root = np.sqrt
reciprocal = _wide(lambda x: 1.0 / x)
reciprocal_root = _wide(lambda x: 1.0 / np.sqrt(x))
