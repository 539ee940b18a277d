"""A tile of a product: where it lies, what it needs of the operands, and its sum over K."""

import functools
from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..common import accumulator_dtype, dot
from ..launch import MOST_BOUND

# From here on an offset within a tile takes 64 bits.
FAR = 2**31


class Cut(NamedTuple):
    """How a product is cut into tiles (block_m, block_n) and, along K, into steps of block_k."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    """Rows of tiles that are handed out together."""
    precision: str
    """How float32 multiplies: "ieee" or "tf32"."""
    tail: bool
    """Whether the last step may be shorter than the others."""
    far_apart: bool
    """Whether an offset within a tile takes 64 bits."""
    split: bool = False
    """Whether several programs share a tile, each with its part of K."""
    persistent: bool = False
    """Whether a program takes one tile after another."""


# Made once: to make a named tuple takes longer than to find it.
make_cut = functools.lru_cache(MOST_BOUND)(Cut)


class Tile(NamedTuple):
    """A tile of the result: its corner, and how many rows and columns there are from it on."""

    first_m: Any
    first_n: Any
    left_m: Any
    left_n: Any


class Panel(NamedTuple):
    """The part of an operand that a tile needs: its first block along K, and the step to others."""

    pointer: Any
    offsets: Any
    mask: Any
    stride_k: Any


@triton.jit
def locate_tile(tile_m, tile_n, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The tile in a row and a column of tiles of an (m, n) matrix."""
    first_m = tile_m.to(tl.int64) * BLOCK_M
    first_n = tile_n.to(tl.int64) * BLOCK_N
    return Tile(first_m, first_n, m - first_m, n - first_n)


@triton.jit
def choose_tile(index, m, n, CUT: tl.constexpr):
    """Tile number `index` of an (m, n) matrix: down group_m tiles, then to the next column."""
    tiles_m = tl.cdiv(m, CUT.block_m)
    group_size = CUT.group_m * tl.cdiv(n, CUT.block_n)
    group = index // group_size * CUT.group_m
    height = tl.minimum(tiles_m - group, CUT.group_m)
    tile_m = group + index % group_size % height
    tile_n = index % group_size // height
    return locate_tile(tile_m, tile_n, m, n, CUT.block_m, CUT.block_n)


@triton.jit
def number_elements(BLOCK: tl.constexpr, FAR_APART: tl.constexpr):
    """0, 1, ..., BLOCK - 1, in 64 bits where products with a stride need them."""
    offs = tl.arange(0, BLOCK)
    return offs.to(tl.int64) if FAR_APART else offs


@triton.jit
def slice_rows(pointer, stride_m, stride_k, tile, CUT: tl.constexpr):
    """The rows that a tile needs of a, (M, K), at `pointer`: blocks (BLOCK_M, BLOCK_K)."""
    offs_m = number_elements(CUT.block_m, CUT.far_apart)
    offs_k = number_elements(CUT.block_k, CUT.far_apart)
    offsets = (offs_m * stride_m)[:, None] + (offs_k * stride_k)[None, :]
    mask = (offs_m < tile.left_m)[:, None]
    return Panel(pointer + tile.first_m * stride_m, offsets, mask, stride_k)


@triton.jit
def slice_columns(pointer, stride_k, stride_n, tile, CUT: tl.constexpr):
    """The columns that a tile needs of b, (K, N), at `pointer`: blocks (BLOCK_K, BLOCK_N)."""
    offs_k = number_elements(CUT.block_k, CUT.far_apart)
    offs_n = number_elements(CUT.block_n, CUT.far_apart)
    offsets = (offs_k * stride_k)[:, None] + (offs_n * stride_n)[None, :]
    mask = (offs_n < tile.left_n)[None, :]
    return Panel(pointer + tile.first_n * stride_n, offsets, mask, stride_k)


@triton.jit
def sum_products(a, b, second_b, k, CUT: tl.constexpr):
    """The sum over k of a's products with b; with second_b as well, the sums of both.

    Each sum is (BLOCK_M, BLOCK_N), and each block of a is loaded once for both.
    """
    BLOCK_M: tl.constexpr = CUT.block_m
    BLOCK_N: tl.constexpr = CUT.block_n
    BLOCK_K: tl.constexpr = CUT.block_k
    # By a name of its own, for Triton 3.6 passes no string on that comes from a tuple.
    PRECISION: tl.constexpr = CUT.precision
    ACC: tl.constexpr = accumulator_dtype(a.pointer)
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    steps = k // BLOCK_K
    step = tl.full([], BLOCK_K, tl.int64)
    a_step = step * a.stride_k
    b_step = step * b.stride_k
    a_ptr = a.pointer
    b_ptr = b.pointer
    # Not what the loop leaves behind: Triton 3.6 fails on pointers out of a pipelined loop for AMD.
    a_tail_ptr = a_ptr + steps * a_step
    b_tail_ptr = b_ptr + steps * b_step
    if second_b is not None:
        second_acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        second_step = step * second_b.stride_k
        second_ptr = second_b.pointer
        second_tail_ptr = second_ptr + steps * second_step
    for _ in range(steps):
        a_block = tl.load(a_ptr + a.offsets, a.mask, other=0.0)
        b_block = tl.load(b_ptr + b.offsets, b.mask, other=0.0)
        if second_b is not None:
            second_block = tl.load(second_ptr + second_b.offsets, second_b.mask, other=0.0)
        acc = dot(a_block, b_block, acc, PRECISION)
        if second_b is not None:
            second_acc = dot(a_block, second_block, second_acc, PRECISION)
            second_ptr += second_step
        a_ptr += a_step
        b_ptr += b_step
    if CUT.tail:
        # Apart from the loop, which then needs no mask along k.
        left = k % BLOCK_K
        if left > 0:
            mask_k = tl.arange(0, BLOCK_K) < left
            a_block = tl.load(a_tail_ptr + a.offsets, a.mask & mask_k[None, :], other=0.0)
            b_block = tl.load(b_tail_ptr + b.offsets, b.mask & mask_k[:, None], other=0.0)
            acc = dot(a_block, b_block, acc, PRECISION)
            if second_b is not None:
                b_mask = second_b.mask & mask_k[:, None]
                b_block = tl.load(second_tail_ptr + second_b.offsets, b_mask, other=0.0)
                second_acc = dot(a_block, b_block, second_acc, PRECISION)
    if second_b is None:
        return acc
    else:
        return acc, second_acc


@triton.jit
def place_elements(
    stride, tile, FAR_APART: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Where a tile is in a matrix whose rows are `stride` apart: its corner, offsets, and mask."""
    # Not what the panels have: that would stay in registers until after the products.
    offs_m = number_elements(BLOCK_M, FAR_APART)[:, None]
    offs_n = number_elements(BLOCK_N, FAR_APART)[None, :]
    mask = (offs_m < tile.left_m) & (offs_n < tile.left_n)
    return tile.first_m * stride + tile.first_n, offs_m * stride + offs_n, mask


@triton.jit
def load_tile(
    pointer,
    stride,
    tile,
    FAR_APART: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A tile of the matrix at `pointer`, zero outside of it."""
    corner, offsets, mask = place_elements(stride, tile, FAR_APART, BLOCK_M, BLOCK_N)
    return tl.load(pointer + corner + offsets, mask, other=0.0)


@triton.jit
def store_tile(pointer, stride, tile, elements, FAR_APART: tl.constexpr):
    """Round a tile's elements to the dtype of the matrix at `pointer`, and store them there."""
    BLOCK_M: tl.constexpr = elements.shape[0]
    BLOCK_N: tl.constexpr = elements.shape[1]
    corner, offsets, mask = place_elements(stride, tile, FAR_APART, BLOCK_M, BLOCK_N)
    tl.store(pointer + corner + offsets, elements.to(pointer.dtype.element_ty), mask)


@triton.jit
def load_bias(pointer, tile, BLOCK_N: tl.constexpr):
    """What the bias at `pointer` adds to each row of a tile, (1, BLOCK_N)."""
    offs_n = tl.arange(0, BLOCK_N)[None, :]
    return tl.load(pointer + tile.first_n + offs_n, offs_n < tile.left_n, other=0.0)
