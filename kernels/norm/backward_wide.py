"""The norms' backward kernels for rows too wide for the registers.

The formulas, and the launcher that chooses these kernels, are in backward.py.
"""

import triton
import triton.language as tl

from ..common import accumulator_dtype
from ..launch import launchable
from ..row_tiles import place_tile
from ..structures import Rows
from .backward_tiles import (
    Gradients,
    Saved,
    divide_layout,
    load_normalized,
    store_input_gradients,
    store_partials,
)


@triton.jit
def multiply_by_weight(dy, weight_ptr, tile, NORM: tl.constexpr):
    """A tile of g = dy * (weight + weight_offset)."""
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + tile.offs_n, tile.mask_n, other=0.0).to(dy.dtype)
        dy *= weight[None, :] + NORM.weight_offset
    return dy


@launchable
@triton.jit(do_not_specialize=["rows"])
def norm_backward_wide_kernel(
    dy_ptr,
    dhidden_ptr,
    hidden_ptr,
    weight_ptr,
    statistics_ptr,
    seed_ptr,
    dx_ptr,
    dresidual_ptr,
    rows,
    layout,
    dropout,
    NORM: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """dx and dresidual of one row (BLOCK_M = 1), in column tiles: two means, then the output."""
    ACC: tl.constexpr = accumulator_dtype(hidden_ptr)
    BLOCK_M: tl.constexpr = BLOCKS.block_m
    BLOCK_N: tl.constexpr = BLOCKS.block_n
    layout = divide_layout(layout, BLOCKS.divisor)
    cols = layout.cols
    saved = Saved(
        Rows(dy_ptr, layout.stride_dy), Rows(hidden_ptr, layout.stride_hidden), statistics_ptr
    )
    gradients = Gradients(
        Rows(dhidden_ptr, layout.stride_dhidden),
        Rows(dx_ptr, cols),
        Rows(dresidual_ptr, cols),
        seed_ptr,
        dropout,
    )
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, BLOCK_M)  # (1,)
    sum_g = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    sum_gn = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for first_col in range(0, cols, BLOCK_N):
        tile = place_tile(row, first_col, rows, cols, BLOCK_N)
        n, dy, _ = load_normalized(saved, tile, NORM)
        g = multiply_by_weight(dy, weight_ptr, tile, NORM)
        if NORM.centered:
            sum_g += g
        sum_gn = tl.fma(g, n, sum_gn)
    mean_g = tl.sum(sum_g, 1) / cols
    mean_gn = tl.sum(sum_gn, 1) / cols

    for first_col in range(0, cols, BLOCK_N):
        tile = place_tile(row, first_col, rows, cols, BLOCK_N)
        n, dy, rstd = load_normalized(saved, tile, NORM)
        g = multiply_by_weight(dy, weight_ptr, tile, NORM)
        dhidden = tl.fma(-n, mean_gn[:, None], g)
        if NORM.centered:
            dhidden -= mean_g[:, None]
        store_input_gradients(dhidden * rstd[:, None], gradients, tile)


@launchable
@triton.jit(do_not_specialize=["rows"])
def norm_backward_weight_kernel(
    dy_ptr,
    hidden_ptr,
    statistics_ptr,
    partials_ptr,
    rows,
    layout,
    NORM: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """dweight and dbias of wide rows: program (p, t) sums column tile t over every P-th row tile.

    Like the one-launch kernel it writes partial sums.
    """
    ACC: tl.constexpr = accumulator_dtype(hidden_ptr)
    BLOCK_M: tl.constexpr = BLOCKS.block_m
    BLOCK_N: tl.constexpr = BLOCKS.block_n
    layout = divide_layout(layout, BLOCKS.divisor)
    cols = layout.cols
    saved = Saved(
        Rows(dy_ptr, layout.stride_dy), Rows(hidden_ptr, layout.stride_hidden), statistics_ptr
    )
    program = tl.program_id(0)
    first_col = tl.program_id(1) * BLOCK_N
    dweight = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for block in range(program, tl.cdiv(rows, BLOCK_M), tl.num_programs(0)):
        row = (block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)  # (BLOCK_M,)
        n, dy, _ = load_normalized(saved, place_tile(row, first_col, rows, cols, BLOCK_N), NORM)
        dweight = tl.fma(dy, n, dweight)
        dbias += dy
    offs_n = first_col + tl.arange(0, BLOCK_N)
    store_partials(dweight, dbias, partials_ptr, program, offs_n, cols, SUMS)
