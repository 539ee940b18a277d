"""What PTX leaves open, and how another GPU might therefore compute.

Sections are those of NVIDIA's PTX ISA 9.1. Without a variation approximate instructions are
computed exactly and rounded once, and nothing is fused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .arithmetic import Array, Type, decode, encode
from .parser import Instruction, Kernel

Bound = Callable[[Array, Array], Array]
"""How far a result may be from the exact one, by the exact one and the first operand."""


def _ulps(count: int) -> Bound:
    """Some units in the last place of a float32."""
    return lambda exact, _: count * np.spacing(abs(exact).astype(np.float32)).astype(np.float64)


def _relative(error: float) -> Bound:
    return lambda exact, _: error * abs(exact)


def _absolute(error: float) -> Bound:
    return lambda exact, _: np.full(exact.shape, error)


def _of_logarithm(exact: Array, x: Array) -> Array:
    return 2.0**-22 * np.where((x > 0.5) & (x < 2.0), 1.0, abs(exact))


def _of_angle(exact: Array, x: Array) -> Array:
    return np.where(abs(x) <= 2.0 * math.pi, 2.0**-20.5, 2.0**-14.7)


ERRORS: dict[tuple[str, str], Bound] = {
    ("div", "f32"): _ulps(2),
    ("rcp", "f32"): _ulps(1),
    ("sqrt", "f32"): _relative(2.0**-23),
    ("rsqrt", "f32"): _relative(2.0**-22.9),
    ("sin", "f32"): _of_angle,
    ("cos", "f32"): _of_angle,
    ("lg2", "f32"): _of_logarithm,
    ("ex2", "f32"): _ulps(2),
    ("tanh", "f32"): _relative(2.0**-11),
    ("tanh", "f16"): _absolute(2.0**-10.987),
    ("tanh", "bf16"): _absolute(2.0**-8),
    ("ex2", "f16"): _relative(2.0**-9.9),
    ("ex2", "bf16"): _relative(2.0**-7),
}
"""The errors of approximate instructions, .approx and, of div, .full, by the type they compute in.

In the order of sections 9.7.3.8 (div), 9.7.3.13 (rcp), 9.7.3.15 (sqrt), 9.7.3.16 (rsqrt), 9.7.3.18
(sin), 9.7.3.19 (cos), 9.7.3.20 (lg2), 9.7.3.21 (ex2), 9.7.3.22 (tanh), 9.7.4.9 (tanh of halves) and
9.7.4.10 (ex2 of halves). Of ex2 the section counts from the result rounded to nearest, which allows
half a unit more than is used here. For angles beyond 100 pi it promises nothing. Where an operand
is 0 or infinite, the tables of those sections give the result, which is exact.
"""


@dataclass(frozen=True)
class Variation:
    """A way in which another GPU might compute than this machine, both within what PTX says.

    Approximate instructions are off by up to their documented error, by an amount that depends on
    their operands alone, as on a GPU. A multiplication followed by an addition is made one fused
    operation or not by the toss of a coin for each addition, as section 9.7.3.3 leaves to NVIDIA's
    assembler; of a sum of two products either may be the one that is not rounded.
    """

    seed: int

    def perturb(
        self, function: Callable[..., Array], opcode: str, kind: Type
    ) -> Callable[..., Array]:
        """`function` as an approximate instruction may compute it.

        Raises:
            KeyError: the error of that instruction is not documented above.
        """
        bound = ERRORS[opcode, kind.name.removesuffix("x2")]

        def perturbed(*operands: Array) -> Array:
            exact = function(*(operand.astype(np.float64) for operand in operands))
            allowed = bound(exact, operands[0])
            nearest = _round(exact, kind)
            found = _round(exact + allowed * self._noise(operands), kind)
            special = ~np.isfinite(exact)
            for operand in operands:
                special = special | (operand == 0) | np.isinf(operand)
            # What was within the bound may have been rounded out of it.
            return np.where(special | ~(abs(found - exact) <= allowed), nearest, found)

        return perturbed

    def _noise(self, operands: tuple[Array, ...]) -> Array:
        """Numbers from -1 to 1 that hang on the operands alone."""
        noise = np.zeros((1, 1), np.uint32)
        for operand in operands:
            bits = np.ascontiguousarray(operand, np.float32).view(np.uint32)
            noise = (noise ^ bits ^ self.seed) * np.uint32(0x9E3779B1)
            noise = noise ^ noise >> 15
        return noise.astype(np.float64) / 2.0**31 - 1.0

    def choose(self, kernel: str, line: int) -> int:
        """0, 1, 2 or 3, for the addition at a line of a kernel."""
        return _hash(f"{self.seed} {kernel} {line}") & 3


def _round(numbers: Array, kind: Type) -> Array:
    """Numbers as a type holds them, in float32."""
    rounded = numbers.astype(np.float32)
    return rounded if kind.name == "f32" else decode(encode(rounded, kind), kind)


def _hash(text: str) -> int:
    """A number by which texts are told apart, the same in every process."""
    value = 2166136261
    for byte in text.encode():
        value = (value ^ byte) * 16777619 & 0xFFFFFFFF
    return value >> 7


FUSED = {
    prefix + kind
    for prefix in ("", "ftz.")
    for kind in ("f32", "f32x2", "f16", "f16x2", "bf16", "bf16x2")
}
"""The modifiers, none of rounding among them, of products and sums that may be fused."""


def contract(block: list[Instruction], kernel: Kernel, variation: Variation) -> list[Instruction]:
    """A block with some products fused into the addition that follows them."""
    products: dict[str, Instruction] = {}
    result = []
    for i in block:
        name = ".".join(i.modifiers)
        if name in FUSED and i.opcode in ("add", "sub"):
            fused = [f for place in (1, 2) if (f := _fuse(i, place, products)) is not None]
            choice = variation.choose(kernel.name, i.line)
            if fused and choice > 1:
                i = fused[choice % len(fused)]
        # A product may be fused as long as it and its factors are what they were.
        written = kernel.registers_in(i.operands[0]) if i.operands else []
        products = {
            d: product
            for d, product in products.items()
            if not any(register in product.operands for register in written)
        }
        is_product = name in FUSED and i.opcode == "mul" and i.guard is None
        if is_product and i.operands[0] not in i.operands[1:]:
            products[i.operands[0]] = i
        result.append(i)
    return result


def _fuse(i: Instruction, place: int, products: dict[str, Instruction]) -> Instruction | None:
    """An addition whose operand at a place (1 or 2) is a product, as one operation."""
    product = products.get(i.operands[place])
    if product is None or product.modifiers != i.modifiers:
        return None
    (_, a, b), other = product.operands, i.operands[3 - place]
    if i.opcode == "sub" and place == 1:
        other = _negate(other)
    elif i.opcode == "sub":
        a, b = (_negate(a), b) if a.startswith("%") else (a, _negate(b))
    if a is None or b is None or other is None:
        return None
    operands = (i.operands[0], a, b, other)
    return i._replace(opcode="fma", modifiers=("rn", *i.modifiers), operands=operands)


def _negate(operand: str) -> str | None:
    return "-" + operand if operand.startswith("%") else None
