"""Asynchronous products of four warps (wgmma), whose matrices lie in shared memory.

A product starts where its instruction stands and ends when it is waited for. Until then its
accumulators hold nothing, and what it reads must stay as it is. Here the accumulators are poison
meanwhile, and the operands are read when the product is waited for, as late as they may be.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from .arithmetic import TYPES, Array, Type, decode
from .parser import Instruction, elements
from .products import gather_left, gather_result, multiply, shape_of, spread_result
from .shared import Span
from .translator import Step, Translator, instruction, not_here

if TYPE_CHECKING:
    from .group import Group

WARPGROUP = 128


@dataclass(frozen=True)
class Tile:
    """A matrix in shared memory, as descriptors tell of it.

    Attributes:
        descriptors: 64 bits for each CTA and warpgroup.
        rows: Its rows, along M or N.
        depth: Its columns, along K.
        kind: The type of its numbers.
        transposed: Whether numbers are next to each other along the rows rather than the depth.
    """

    descriptors: Array
    rows: int
    depth: int
    kind: Type
    transposed: bool

    def offsets(self, descriptor: int) -> Array:
        """The shared address of each number."""
        return _offsets(descriptor, self.rows, self.depth, self.kind.size, self.transposed)

    def span(self, g: Group, i: Instruction) -> Span:
        """The granules of all CTAs and warpgroups, each read for four warps."""
        granule, per_cta = g.shared.granule, g.shared.stride // g.shared.granule
        form = self.rows, self.depth, self.kind.size, self.transposed
        parts, warps = [], []
        for row, descriptors in enumerate(self.descriptors):
            for number, descriptor in enumerate(descriptors):
                parts.append(row * per_cta + _granules(int(descriptor), *form, granule))
                warps.append(np.full(len(parts[-1]), 0xF << 4 * number, np.uint32))
        return Span(i, np.concatenate(parts), np.concatenate(warps), np.uint32(0))

    def read(self, g: Group, i: Instruction) -> Array:
        """The matrices (CTAs and warpgroups, rows, depth)."""
        size = self.kind.size
        view = g.shared.view(size)
        found = []
        for row, descriptors in enumerate(self.descriptors):
            for descriptor in descriptors:
                at = self.offsets(int(descriptor))
                if at.min() < 0 or at.max() + size > g.shared.size:
                    span = f"{at.min()} to {at.max() + size}"
                    raise not_here(i, f"a product reads shared bytes {span} of {g.shared.size}")
                found.append(view[(row * g.shared.stride + at) // size])
        return decode(np.stack(found), self.kind)


@functools.lru_cache(4096)
def _offsets(descriptor: int, rows: int, depth: int, size: int, transposed: bool) -> Array:
    """The addresses (rows, depth) of a matrix of core matrices of 8 rows of 16 bytes.

    The core matrices are `lead` and `stride` apart, in one direction and the other, or stand in
    rows of 2, 4 or 8 whose pieces of 16 bytes are swizzled: exchanged by the number of their row,
    so that a column of them lies in different banks.
    """
    start, lead, stride = (((descriptor >> shift) & 0x3FFF) << 4 for shift in (0, 16, 32))
    pieces = {0: 1, 1: 8, 2: 4, 3: 2}[descriptor >> 62]
    row, column = np.arange(rows)[:, None], np.arange(depth)[None]
    if not transposed:
        piece = column * size // 16 * (16 if pieces > 1 else lead)
        at = row % 8 * 16 * pieces + row // 8 * stride + piece + column * size % 16
    else:
        piece = row * size // 16
        inner = row * size % 16 + column % 8 * 16 * pieces
        if pieces == 1:
            at = inner + piece * stride + column // 8 * lead
        else:
            at = inner + piece % pieces * 16 + piece // pieces * lead + column // 8 * stride
    at = start + at
    return at ^ (at >> 7 & pieces - 1) << 4


@functools.lru_cache(4096)
def _granules(
    descriptor: int, rows: int, depth: int, size: int, transposed: bool, granule: int
) -> Array:
    """The granules that a matrix lies in, each once."""
    return np.unique(_offsets(descriptor, rows, depth, size, transposed) // granule)


@dataclass(eq=False)
class Product:
    """A product under way.

    Attributes:
        instruction: The instruction.
        accumulators: The registers that it adds to.
        start: What they held, or None where the product before adds to them too.
        keep: Whether what they held counts, for each thread.
        left: The left matrix: in shared memory, or as registers and what they held.
        right: The right matrix.
        done: Whether it has been computed, which it is when it is waited for, or before.
    """

    instruction: Instruction
    accumulators: tuple[int, ...]
    start: list[Array] | None
    keep: Array
    left: Tile | list[tuple[int, Array]]
    right: Tile
    done: bool = False

    @property
    def tiles(self) -> list[Tile]:
        """What it reads of shared memory."""
        return [self.left, self.right] if isinstance(self.left, Tile) else [self.right]

    def take(self, rows: Array, renewed: dict[int, Array]) -> Product:
        """The product of some of the CTAs, whose registers are other arrays now."""

        def cut(part: Array) -> Array:
            return part[rows] if part.shape[0] > 1 else part

        left, right = self.left, replace(self.right, descriptors=self.right.descriptors[rows])
        if isinstance(left, Tile):
            left = replace(left, descriptors=left.descriptors[rows])
        else:
            left = [(index, renewed.get(id(held), cut(held))) for index, held in left]
        start = None if self.start is None else [cut(part) for part in self.start]
        return replace(self, start=start, keep=self.keep[rows], left=left, right=right)


@dataclass
class Products:
    """The products of a group that are under way.

    Attributes:
        groups: Those to be waited for together, oldest first.
        current: Those not in a group yet.
        results: What products have added up to so far, by their accumulators.
        poison: What the accumulators are while a product adds to them.
        fenced: Whether `wgmma.fence` has ordered the registers since the last group.
        ordered: What all registers held at the last fence.
    """

    groups: list[list[Product]] = field(default_factory=list)
    current: list[Product] = field(default_factory=list)
    results: dict[tuple[int, ...], Array] = field(default_factory=dict)
    poison: dict[tuple[int, ...], list[Array]] = field(default_factory=dict)
    fenced: bool = False
    ordered: list[Array] = field(default_factory=list)

    def take(self, rows: Array, before: list[Array], after: list[Array]) -> Products:
        """The products of some of the CTAs; their registers before and after they were cut."""
        renewed = {id(old): new for old, new in zip(before, after, strict=True)}
        groups = [[p.take(rows, renewed) for p in group] for group in (*self.groups, self.current)]
        results = {key: result[rows] for key, result in self.results.items()}
        ordered = [renewed.get(id(held), held) for held in self.ordered]
        return Products(groups[:-1], groups[-1], results, dict(self.poison), self.fenced, ordered)

    def running(self) -> Iterable[Product]:
        """All of them."""
        return (product for group in (*self.groups, self.current) for product in group)


@instruction("wgmma", "mma_async sync aligned fence commit_group wait_group")
def warpgroup_instruction(t: Translator, i: Instruction) -> Step:
    """Start a product, or order, group or wait for products."""
    match i.modifiers[0]:
        case "fence":
            return _fence
        case "commit_group":
            return _commit
        case "wait_group":
            pending = int(i.operands[0])
            return lambda g: _wait(g, i, pending)
        case _:
            return _start(t, i)


def _start(t: Translator, i: Instruction) -> Step:
    m, n, k = shape_of(i)
    result, left, right = i.modifiers[-3:]
    if (m, result) != (64, "f32") or left != right or (left, k) not in _SHAPES:
        raise not_here(i)
    kind = TYPES[left]
    accumulators = tuple(t.register(i, name) for name in elements(i.operands[0]))
    in_registers = i.operands[1].startswith("{")
    names = elements(i.operands[1])
    lefts = [t.bits(i, name, TYPES["b32" if in_registers else "b64"]) for name in names]
    held = [t.register(i, name) for name in names] if in_registers else []
    descriptor = t.bits(i, i.operands[2], TYPES["b64"])
    keep = t.bits(i, i.operands[3], TYPES["pred"])
    negate_left, negate_right, *transposed = map(int, i.operands[4:])
    if (negate_left, negate_right) != (1, 1):
        raise not_here(i)
    transposed = [0] * (2 - len(transposed)) + transposed

    def step(g: Group) -> None:
        if g.mask is not None or i.guard is not None:
            raise not_here(i, "a product that not all threads come to")
        right = Tile(_descriptors(g, i, descriptor(g)), n, k, kind, bool(transposed[1]))
        if in_registers:
            left = [(index, read(g)) for index, read in zip(held, lefts, strict=True)]
        else:
            left = Tile(_descriptors(g, i, lefts[0](g)), m, k, kind, bool(transposed[0]))
        start = _claim_accumulators(g, i, accumulators)
        product = Product(i, accumulators, start, g.spread(keep(g)), left, right)
        g.announce(product)
        _require_fence(g, product)
        g.products.current.append(product)
        for tile in product.tiles:
            g.shared.begin_product(tile.span(g, i))

    return step


_SHAPES = {("bf16", 16), ("f16", 16), ("tf32", 8)}


def _descriptors(g: Group, i: Instruction, values: Array) -> Array:
    """A descriptor for each CTA and warpgroup (the threads of one must agree)."""
    whole = g.spread(values).reshape(g.count, -1, min(WARPGROUP, g.threads))
    if (whole != whole[:, :, :1]).any():
        raise not_here(i, "the threads of a warpgroup give different descriptors")
    if (whole >> 49 & 7).any():
        raise not_here(i, "a matrix that begins within a swizzled row")
    return whole[:, :, 0]


def _claim_accumulators(
    g: Group, i: Instruction, accumulators: tuple[int, ...]
) -> list[Array] | None:
    """Poison the accumulators, and return what they held unless a product is adding to them."""
    poison = g.products.poison
    if accumulators in poison:
        return None
    if any(set(accumulators) & set(others) for others in poison):
        raise not_here(i, "a product adds to some of the registers of a running one")
    start = [g.registers[index] for index in accumulators]
    poison[accumulators] = [g.program.poison[index].copy() for index in accumulators]
    for index, value in zip(accumulators, poison[accumulators], strict=True):
        g.registers[index] = value
    return start


def _fence(g: Group) -> None:
    g.products.fenced, g.products.ordered = True, list(g.registers)


def _require_fence(g: Group, product: Product) -> None:
    """Report registers of a product that no `wgmma.fence` has ordered."""
    i, products = product.instruction, g.products
    held = product.left if isinstance(product.left, list) else []
    if not products.fenced:
        if product.start is not None or held:
            what = "a product uses registers with no wgmma.fence since the products before it"
            g.launch.report(i, f"registers: {what}")
        return
    if product.start is not None and product.keep.any():
        start = zip(product.accumulators, product.start, strict=True)
        late = [value for index, value in start if products.ordered[index] is not value]
        ordered = set(map(id, products.ordered))
        if any(id(value) not in ordered for value in late):
            g.launch.report(i, "registers: an accumulator was written with no wgmma.fence since")
        elif late:
            g.launch.note(i, "an accumulator is a copy that was made after wgmma.fence")
    if any(products.ordered[index] is not value for index, value in held):
        g.launch.note(i, "a product reads registers that were written after wgmma.fence")


def _commit(g: Group) -> None:
    products = g.products
    products.groups.append(products.current)
    products.current, products.fenced = [], False


def _wait(g: Group, i: Instruction, pending: int) -> None:
    """Complete all groups of products but the last few, and give up their accumulators."""
    products = g.products
    while len(products.groups) > pending:
        for product in products.groups.pop(0):
            carry_out(g, product)
            for tile in product.tiles:
                g.shared.end_product(tile.span(g, product.instruction))
            held = product.left if isinstance(product.left, list) else []
            if any(g.registers[index] is not value for index, value in held):
                what = "registers: a register was written while a product was reading it"
                g.launch.report(product.instruction, what)
    busy = {product.accumulators for product in products.running()}
    for accumulators in [key for key in products.poison if key not in busy]:
        poison = products.poison.pop(accumulators)
        result = products.results.pop(accumulators)
        for number, index in enumerate(accumulators):
            if g.registers[index] is not poison[number]:
                what = "registers: an accumulator was written while a product was adding to it"
                g.launch.report(i, what)
            g.registers[index] = result[:, number]
            if products.ordered:
                products.ordered[index] = g.registers[index]


def carry_out(g: Group, product: Product) -> None:
    """Compute a product, if it has not been yet; a warp has 16 rows of its warpgroup's 64."""
    if product.done:
        return
    product.done = True
    i = product.instruction
    rows = min(64, g.threads // 2)
    if isinstance(product.left, Tile):
        first = g.members.start // 2 % 64
        left = product.left.read(g, i)[:, first : first + rows]
    else:
        registers = [g.spread(held) for _, held in product.left]
        left = gather_left(registers, product.right.kind)
        left = left.reshape(-1, rows, left.shape[2])
    if product.start is None:
        before = product_so_far = g.products.results[product.accumulators].swapaxes(0, 1)
    else:
        before = product_so_far = np.stack([g.spread(part) for part in product.start])
    before = np.where(product.keep, product_so_far.view(np.float32), np.float32(0))
    accumulator = gather_result(list(before))
    accumulator = accumulator.reshape(-1, rows, accumulator.shape[2])
    result = multiply(left, product.right.read(g, i).swapaxes(1, 2), accumulator)
    registers = spread_result(result.reshape(-1, 16, result.shape[2]))
    stacked = np.stack([r.view(np.uint32).reshape(g.count, g.threads) for r in registers], 1)
    g.products.results[product.accumulators] = stacked
