"""The backward kernels of norms for rows too wide for the registers.

The formulas, and the launcher that chooses these kernels, are in norm_backward.py.
"""

import triton
import triton.language as tl

from ..common import accumulator_dtype, divisible
from ..launch import launchable
from .backward_tiles import normalized_and_gradient, store_input_gradients, store_partials


@launchable
@triton.jit(do_not_specialize=["rows"])
def norm_backward_wide_kernel(
    # tensors
    dy_ptr,
    dhidden_ptr,
    hidden_ptr,
    weight_ptr,
    statistics_ptr,
    seed_ptr,
    dx_ptr,
    dresidual_ptr,
    # strides and sizes
    stride_dym,
    stride_dhm,
    stride_hm,
    rows,
    cols,
    # scalars
    dropout_threshold,
    dropout_scale,
    # flags
    CENTERED: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    # blocks
    DIVISOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dx and dresidual of one row (BLOCK_M = 1), in column tiles: two means, then the output."""
    stride_dym = divisible(stride_dym, DIVISOR)
    stride_dhm = divisible(stride_dhm, DIVISOR)
    stride_hm = divisible(stride_hm, DIVISOR)
    cols = divisible(cols, DIVISOR)
    ACC: tl.constexpr = accumulator_dtype(hidden_ptr)
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, BLOCK_M)  # (1,)
    sum_g = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    sum_gn = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for first_col in range(0, cols, BLOCK_N):
        offs_n = first_col + tl.arange(0, BLOCK_N)
        normalized, dy, _ = normalized_and_gradient(
            dy_ptr,
            hidden_ptr,
            statistics_ptr,
            stride_dym,
            stride_hm,
            row,
            offs_n,
            rows,
            cols,
            CENTERED,
        )
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + offs_n, offs_n < cols, other=0.0).to(ACC)
            dy *= weight[None, :] + WEIGHT_OFFSET
        if CENTERED:
            sum_g += dy
        sum_gn += dy * normalized
    mean_g = tl.sum(sum_g, 1) / cols
    mean_gn = tl.sum(sum_gn, 1) / cols

    for first_col in range(0, cols, BLOCK_N):
        offs_n = first_col + tl.arange(0, BLOCK_N)
        normalized, dy, rstd = normalized_and_gradient(
            dy_ptr,
            hidden_ptr,
            statistics_ptr,
            stride_dym,
            stride_hm,
            row,
            offs_n,
            rows,
            cols,
            CENTERED,
        )
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + offs_n, offs_n < cols, other=0.0).to(ACC)
            dy *= weight[None, :] + WEIGHT_OFFSET
        dhidden = dy - normalized * mean_gn[:, None]
        if CENTERED:
            dhidden -= mean_g[:, None]
        store_input_gradients(
            dhidden * rstd[:, None],
            seed_ptr,
            dhidden_ptr,
            dx_ptr,
            dresidual_ptr,
            stride_dhm,
            row,
            first_col,
            rows,
            cols,
            dropout_threshold,
            dropout_scale,
            BLOCK_M,
            BLOCK_N,
        )


@launchable
@triton.jit(do_not_specialize=["rows"])
def norm_backward_weight_kernel(
    # tensors
    dy_ptr,
    hidden_ptr,
    statistics_ptr,
    partials_ptr,
    # strides and sizes
    stride_dym,
    stride_hm,
    rows,
    cols,
    # flags
    CENTERED: tl.constexpr,
    SUM_WEIGHT: tl.constexpr,
    SUM_BIAS: tl.constexpr,
    # blocks
    DIVISOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dweight and dbias of wide rows: program (p, t) sums column tile t over every P-th row tile.

    Like the one-launch kernel it writes partial sums.
    """
    stride_dym = divisible(stride_dym, DIVISOR)
    stride_hm = divisible(stride_hm, DIVISOR)
    cols = divisible(cols, DIVISOR)
    ACC: tl.constexpr = accumulator_dtype(hidden_ptr)
    program = tl.program_id(0)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    dweight = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for tile in range(program, tl.cdiv(rows, BLOCK_M), tl.num_programs(0)):
        row = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)  # (BLOCK_M,)
        normalized, dy, _ = normalized_and_gradient(
            dy_ptr,
            hidden_ptr,
            statistics_ptr,
            stride_dym,
            stride_hm,
            row,
            offs_n,
            rows,
            cols,
            CENTERED,
        )
        dweight += dy * normalized
        dbias += dy
    store_partials(dweight, dbias, partials_ptr, program, offs_n, cols, SUM_WEIGHT, SUM_BIAS)
