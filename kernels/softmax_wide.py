"""softmax and log_softmax of rows that no program can hold in its registers.

A row is read in column tiles, twice: the second read comes from the L2 cache. The formulas and the
launchers stand in softmax.py.
"""

import triton
import triton.language as tl

from .common import accumulator_dtype, divisible
from .lanes import accumulate_lanes, merge_lanes
from .launch import launchable
from .softmax_tiles import load_scores, load_tile, normalized, store_gradient


@launchable
@triton.jit(do_not_specialize=["stride_kb", "stride_kh", "stride_km", "rows", "heads", "queries"])
def softmax_forward_wide_kernel(
    # tensors
    x_ptr,
    mask_ptr,
    y_ptr,
    # strides and sizes
    stride_xm,
    stride_kb,
    stride_kh,
    stride_km,
    stride_kn,
    rows,
    cols,
    heads,
    queries,
    # scalars
    scale,
    # flags
    CAUSAL: tl.constexpr,
    LOG: tl.constexpr,
    # blocks
    DIVISOR: tl.constexpr,
    MASK_DIVISOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LANE: tl.constexpr,
):
    """One program a row (BLOCK_M = 1), in column tiles: maximum and sum first, then the output."""
    stride_xm = divisible(stride_xm, DIVISOR)
    stride_kb = divisible(stride_kb, MASK_DIVISOR)
    stride_kh = divisible(stride_kh, MASK_DIVISOR)
    stride_km = divisible(stride_km, MASK_DIVISOR)
    cols = divisible(cols, DIVISOR)
    ACC: tl.constexpr = accumulator_dtype(x_ptr)
    LANES: tl.constexpr = BLOCK_N // LANE
    MASKED: tl.constexpr = CAUSAL or mask_ptr is not None
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, BLOCK_M)  # (1,)
    lane_max = tl.full((BLOCK_M, LANES), float("-inf"), ACC)
    lane_sum = tl.zeros((BLOCK_M, LANES), ACC)
    for first_col in range(0, cols, BLOCK_N):
        z = load_scores(
            x_ptr,
            mask_ptr,
            stride_xm,
            stride_kb,
            stride_kh,
            stride_km,
            stride_kn,
            row,
            first_col + tl.arange(0, BLOCK_N),
            rows,
            cols,
            heads,
            queries,
            scale,
            CAUSAL,
        )
        z = tl.reshape(z, (BLOCK_M, LANES, LANE))
        lane_max, lane_sum = accumulate_lanes(z, lane_max, lane_sum)
    row_max, total = merge_lanes(lane_max, lane_sum)
    for first_col in range(0, cols, BLOCK_N):
        offs_n = first_col + tl.arange(0, BLOCK_N)
        z = load_scores(
            x_ptr,
            mask_ptr,
            stride_xm,
            stride_kb,
            stride_kh,
            stride_km,
            stride_kn,
            row,
            offs_n,
            rows,
            cols,
            heads,
            queries,
            scale,
            CAUSAL,
        )
        y = normalized(z, row_max, total, LOG, MASKED)
        y_offsets = (row * cols)[:, None] + offs_n[None, :]
        tl.store(y_ptr + y_offsets, y.to(y_ptr.dtype.element_ty), (offs_n < cols)[None, :])


@launchable
@triton.jit(do_not_specialize=["rows"])
def softmax_backward_wide_kernel(
    # tensors
    dy_ptr,
    y_ptr,
    dx_ptr,
    # strides and sizes
    stride_dym,
    stride_ym,
    rows,
    cols,
    # scalars
    scale,
    # flags
    LOG: tl.constexpr,
    # blocks
    DIVISOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program a row (BLOCK_M = 1), in column tiles: the shared sum first, then the output."""
    stride_dym = divisible(stride_dym, DIVISOR)
    stride_ym = divisible(stride_ym, DIVISOR)
    cols = divisible(cols, DIVISOR)
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, BLOCK_M)  # (1,)
    terms = tl.zeros((BLOCK_M, BLOCK_N), accumulator_dtype(dy_ptr))
    for first_col in range(0, cols, BLOCK_N):
        offs_n = first_col + tl.arange(0, BLOCK_N)
        dy = load_tile(dy_ptr, stride_dym, row, offs_n, rows, cols)
        if LOG:
            # Its sum does not need y, which then is read once.
            terms += dy
        else:
            terms += dy * load_tile(y_ptr, stride_ym, row, offs_n, rows, cols)
    shared = tl.sum(terms, 1)
    for first_col in range(0, cols, BLOCK_N):
        offs_n = first_col + tl.arange(0, BLOCK_N)
        dy = load_tile(dy_ptr, stride_dym, row, offs_n, rows, cols)
        y = load_tile(y_ptr, stride_ym, row, offs_n, rows, cols)
        store_gradient(dx_ptr, y, dy, shared, row, offs_n, rows, cols, scale, LOG)
