"""How element-wise kernels are cut: the rule of their tiles, and which one is a program's."""

import functools

import triton
import triton.language as tl

from .config import SHORT_ROWS_TILE, Target, TileConfig, choose_height, choose_warps, choose_width
from .row_tiles import place_tile


@functools.cache
def elementwise_config(cols: int, target: Target) -> TileConfig:
    """The configuration of an element-wise kernel on rows of `cols` elements."""
    block_n = min(choose_width(cols), SHORT_ROWS_TILE)
    block_m = choose_height(block_n)
    return TileConfig(block_m, block_n, choose_warps(block_m * block_n, target))


@triton.jit
def place_program(rows, cols, BLOCKS: tl.constexpr):
    """The tile of this program."""
    BLOCK_M: tl.constexpr = BLOCKS.block_m
    # One grid axis holds all tiles, for the others end at 65,535; int64, for a single row may have
    # more than 2^31 elements.
    program = tl.program_id(0).to(tl.int64)
    column_tiles = tl.cdiv(cols, BLOCKS.block_n)
    row = program // column_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    first_col = program % column_tiles * BLOCKS.block_n
    return place_tile(row, first_col, rows, cols, BLOCKS.block_n)
