"""How element-wise kernels are cut: the rule of their tiles, and which one is a program's."""

import functools

import triton
import triton.language as tl

from .common import divisible
from .config import SHORT_ROWS_TILE, Target, TileConfig, choose_height, choose_warps, choose_width
from .structures import restore_stride


@functools.cache
def elementwise_config(cols: int, target: Target) -> TileConfig:
    """The configuration of an element-wise kernel on rows of `cols` elements."""
    block_n = min(choose_width(cols), SHORT_ROWS_TILE)
    block_m = choose_height(block_n)
    return TileConfig(block_m, block_n, choose_warps(block_m * block_n, target))


@triton.jit
def place_program(cols, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The rows (BLOCK_M,) of this program's tile, and the first of its BLOCK_N columns."""
    # One grid axis holds all tiles, for the others end at 65,535; int64, for a single row may have
    # more than 2^31 elements.
    program = tl.program_id(0).to(tl.int64)
    column_tiles = tl.cdiv(cols, BLOCK_N)
    row = program // column_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    return row, program % column_tiles * BLOCK_N


@triton.jit
def load_rows(view, row, offs_n, mask, DIVISOR: tl.constexpr):
    """Some columns of some rows of a view, zero where masked; DIVISOR divides its stride."""
    stride = divisible(restore_stride(view.stride), DIVISOR)
    return tl.load(view.pointer + (row * stride)[:, None] + offs_n[None, :], mask, other=0.0)
