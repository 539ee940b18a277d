"""Tiles of rows: what the kernels of rows are handed, and how they read, drop and write.

A kernel places a tile in the rows of its tensors, and its device functions take both as they are.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .common import accumulator_dtype, dropout_keep


class Blocks(NamedTuple):
    """How rows are cut into tiles. `divisor` divides their width and strides: see `divisible`."""

    block_m: int
    block_n: int
    divisor: int


class Tile(NamedTuple):
    """A tile's place: its rows (BLOCK_M,), its columns (BLOCK_N,), and which of them there are."""

    row: Any
    first_col: Any
    offs_n: Any
    mask_m: Any
    mask_n: Any


class Dropout(NamedTuple):
    """What `dropout_keep` compares with, and by what the elements that stay are multiplied."""

    threshold: Any
    scale: Any


@triton.jit
def place_tile(row, first_col, rows, cols, BLOCK_N: tl.constexpr):
    """The tile of these rows at BLOCK_N columns from first_col on."""
    offs_n = first_col + tl.arange(0, BLOCK_N)
    # No program has only a row past the end: that of a tile of one row is always there.
    mask_m = row < rows if row.shape[0] > 1 else tl.full((1,), True, tl.int1)
    return Tile(row, first_col, offs_n, mask_m, offs_n < cols)


@triton.jit
def load_tile(x, tile):
    """The elements (BLOCK_M, BLOCK_N) of rows, 0 outside of them, in the dtype to compute in."""
    # To the pointer first: what the columns of a row are added to is then one address.
    places = x.pointer + (tile.row * x.stride)[:, None] + tile.offs_n[None, :]
    mask = tile.mask_m[:, None] & tile.mask_n[None, :]
    return tl.load(places, mask, other=0.0).to(accumulator_dtype(x.pointer))


@triton.jit
def store_tile(x, tile, elements):
    """Round elements (BLOCK_M, BLOCK_N) to the dtype of the rows that they become part of."""
    # Added up first: a kernel that stores several contiguous tensors then does so once.
    offsets = (tile.row * x.stride)[:, None] + tile.offs_n[None, :]
    mask = tile.mask_m[:, None] & tile.mask_n[None, :]
    tl.store(x.pointer + offsets, elements.to(x.pointer.dtype.element_ty), mask)


@triton.jit
def choose_kept(tile, seed_ptr, dropout):
    """Which elements (BLOCK_M, BLOCK_N) of a tile dropout keeps."""
    BLOCK_M: tl.constexpr = tile.row.shape[0]
    BLOCK_N: tl.constexpr = tile.offs_n.shape[0]
    seed = tl.load(seed_ptr)
    return dropout_keep(seed, tile.row, tile.first_col, dropout.threshold, BLOCK_M, BLOCK_N)


@triton.jit
def drop(elements, tile, seed_ptr, dropout):
    """Dropout of a tile's elements."""
    return tl.where(choose_kept(tile, seed_ptr, dropout), elements * dropout.scale, 0.0)
