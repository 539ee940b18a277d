"""softmax and log_softmax of rows that no program can hold in its registers.

A row is read in column tiles, twice: the second read comes from the L2 cache. The formulas and the
launchers stand in softmax.py.
"""

import triton
import triton.language as tl

from .common import accumulator_dtype, divisible
from .lanes import accumulate_lanes, lane_width, merge_lanes
from .launch import launchable
from .row_tiles import load_tile, place_tile, store_tile
from .softmax_tiles import Mask, Scores, load_scores, normalize, store_gradient
from .structures import Rows


@launchable
@triton.jit(do_not_specialize=["rows", "queries"])
def softmax_forward_wide_kernel(
    x_ptr,
    mask_view: Mask,
    y_ptr,
    stride_xm,
    stride_kn,
    rows,
    cols,
    queries,
    scale,
    SOFTMAX: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One program a row (BLOCK_M = 1), in column tiles: maximum and sum first, then the output."""
    ACC: tl.constexpr = accumulator_dtype(x_ptr)
    BLOCK_M: tl.constexpr = BLOCKS.block_m
    BLOCK_N: tl.constexpr = BLOCKS.block_n
    LANE: tl.constexpr = lane_width(x_ptr)
    LANES: tl.constexpr = BLOCK_N // LANE
    MASKED: tl.constexpr = SOFTMAX.causal or mask_view is not None
    cols = divisible(cols, BLOCKS.divisor)
    x = Rows(x_ptr, divisible(stride_xm, BLOCKS.divisor))
    scores = Scores(x, mask_view, stride_kn, queries, cols, scale)
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, BLOCK_M)  # (1,)
    lane_max = tl.full((BLOCK_M, LANES), float("-inf"), ACC)
    lane_sum = tl.zeros((BLOCK_M, LANES), ACC)
    for first_col in range(0, cols, BLOCK_N):
        z = load_scores(scores, place_tile(row, first_col, rows, cols, BLOCK_N), SOFTMAX)
        z = tl.reshape(z, (BLOCK_M, LANES, LANE))
        lane_max, lane_sum = accumulate_lanes(z, lane_max, lane_sum)
    row_max, total = merge_lanes(lane_max, lane_sum)
    for first_col in range(0, cols, BLOCK_N):
        tile = place_tile(row, first_col, rows, cols, BLOCK_N)
        z = load_scores(scores, tile, SOFTMAX)
        store_tile(Rows(y_ptr, cols), tile, normalize(z, row_max, total, SOFTMAX.log, MASKED))


@launchable
@triton.jit(do_not_specialize=["rows"])
def softmax_backward_wide_kernel(
    dy_ptr,
    y_ptr,
    dx_ptr,
    stride_dym,
    stride_ym,
    rows,
    cols,
    scale,
    LOG: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One program a row (BLOCK_M = 1), in column tiles: the shared sum first, then the output."""
    BLOCK_M: tl.constexpr = BLOCKS.block_m
    BLOCK_N: tl.constexpr = BLOCKS.block_n
    cols = divisible(cols, BLOCKS.divisor)
    dy_rows = Rows(dy_ptr, divisible(stride_dym, BLOCKS.divisor))
    y_rows = Rows(y_ptr, divisible(stride_ym, BLOCKS.divisor))
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, BLOCK_M)  # (1,)
    terms = tl.zeros((BLOCK_M, BLOCK_N), accumulator_dtype(dy_ptr))
    for first_col in range(0, cols, BLOCK_N):
        tile = place_tile(row, first_col, rows, cols, BLOCK_N)
        dy = load_tile(dy_rows, tile)
        if LOG:
            # Its sum does not need y, which then is read once.
            terms += dy
        else:
            terms += dy * load_tile(y_rows, tile)
    shared = tl.sum(terms, 1)
    for first_col in range(0, cols, BLOCK_N):
        tile = place_tile(row, first_col, rows, cols, BLOCK_N)
        dy = load_tile(dy_rows, tile)
        y = load_tile(y_rows, tile)
        store_gradient(Rows(dx_ptr, cols), tile, y, dy, shared, scale, LOG)
