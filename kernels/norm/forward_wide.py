"""The norms' forward kernel for rows too wide for the registers.

The formulas, and the launcher that chooses this kernel, are in forward.py.
"""

import triton
import triton.language as tl

from ..common import accumulator_dtype, divisible
from ..launch import launchable
from ..row_tiles import load_tile, place_tile, store_tile
from ..structures import Rows
from .forward_tiles import (
    Addends,
    correct_variance,
    hidden_dtype,
    load_hidden,
    locate_rstd,
    scale_and_shift,
)


@launchable
@triton.jit(do_not_specialize=["rows"])
def norm_forward_wide_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    seed_ptr,
    y_ptr,
    hidden_ptr,
    statistics_ptr,
    rows,
    eps,
    layout,
    dropout,
    NORM: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One program a row (BLOCK_M = 1), in column tiles: statistics first, then the output."""
    ACC: tl.constexpr = accumulator_dtype(x_ptr)
    BLOCK_M: tl.constexpr = BLOCKS.block_m
    BLOCK_N: tl.constexpr = BLOCKS.block_n
    cols = divisible(layout.cols, BLOCKS.divisor)
    x = Rows(x_ptr, divisible(layout.stride_x, BLOCKS.divisor))
    residual = Rows(residual_ptr, divisible(layout.stride_residual, BLOCKS.divisor))
    kept = Rows(hidden_ptr, cols)
    addends = Addends(x, residual, kept, seed_ptr, dropout)
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, BLOCK_M)  # (1,)
    # Welford's mean and sum of squares of each lane's own elements, merged after the loop: sums
    # over the whole row would lose the digits that they cancel.
    lane_mean = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    lane_squares = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for first_col in range(0, cols, BLOCK_N):
        tile = place_tile(row, first_col, rows, cols, BLOCK_N)
        hidden = load_hidden(addends, tile)
        if NORM.centered:
            delta = tl.where(tile.mask_n[None, :], hidden - lane_mean, 0.0)
            lane_mean += delta / (first_col // BLOCK_N + 1)
            lane_squares = tl.fma(delta, hidden - lane_mean, lane_squares)
        else:
            lane_squares = tl.fma(hidden, hidden, lane_squares)
    estimate = tl.zeros((BLOCK_M,), ACC)
    correction = tl.zeros((BLOCK_M,), ACC)
    variance = tl.sum(lane_squares, 1) / cols
    if NORM.centered:
        lane_count = ((cols - tl.arange(0, BLOCK_N) + BLOCK_N - 1) // BLOCK_N)[None, :]
        estimate = tl.sum(lane_mean, 1) / BLOCK_N
        lane_mean -= estimate[:, None]
        correction = tl.sum(lane_mean * lane_count, 1) / cols
        variance += tl.sum(lane_mean * lane_mean * lane_count, 1) / cols
        variance = correct_variance(variance, correction)
        tl.store(statistics_ptr + 2 * row, estimate + correction)
    rstd = tl.rsqrt(variance + eps)
    tl.store(statistics_ptr + locate_rstd(row, NORM), rstd)

    # The second pass may read an element of h that another thread of this program has written.
    tl.debug_barrier()
    for first_col in range(0, cols, BLOCK_N):
        tile = place_tile(row, first_col, rows, cols, BLOCK_N)
        hidden = load_tile(x if hidden_ptr is None else kept, tile)
        y = scale_and_shift(
            (hidden - estimate[:, None] - correction[:, None]) * rstd[:, None],
            weight_ptr,
            bias_ptr,
            tile,
            hidden_dtype(x_ptr, hidden_ptr),
            NORM,
        )
        store_tile(Rows(y_ptr, cols), tile, y)
