"""What the backward kernels of the norms do with one tile: reading n and dy, storing the results.

The names are those of norm_backward.py.
"""

import triton
import triton.language as tl

from ..common import accumulator_dtype, dropout_keep
from .forward import rstd_place


@triton.jit
def normalized_and_gradient(
    dy_ptr,
    hidden_ptr,
    statistics_ptr,
    stride_dym,
    stride_hm,
    row,
    offs_n,
    rows,
    cols,
    CENTERED: tl.constexpr,
):
    """Tiles of n and of dy, and the rows' rstd."""
    ACC: tl.constexpr = accumulator_dtype(hidden_ptr)
    mask_m = row < rows
    mask = mask_m[:, None] & (offs_n < cols)[None, :]
    dy = tl.load(dy_ptr + (row * stride_dym)[:, None] + offs_n[None, :], mask, other=0.0).to(ACC)
    hidden_offsets = (row * stride_hm)[:, None] + offs_n[None, :]
    hidden = tl.load(hidden_ptr + hidden_offsets, mask, other=0.0).to(ACC)
    rstd = tl.load(statistics_ptr + rstd_place(row, CENTERED), mask_m, other=0.0)
    if CENTERED:
        hidden -= tl.load(statistics_ptr + 2 * row, mask_m, other=0.0)[:, None]
    return hidden * rstd[:, None], dy, rstd


@triton.jit
def store_input_gradients(
    dhidden,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add the gradient that h's own users send, and store dresidual and dx = dropout(dh)."""
    offs_n = first_col + tl.arange(0, BLOCK_N)
    mask = (row < rows)[:, None] & (offs_n < cols)[None, :]
    offsets = (row * cols)[:, None] + offs_n[None, :]
    if dhidden_ptr is not None:
        dhidden_offsets = (row * stride_dhm)[:, None] + offs_n[None, :]
        dhidden += tl.load(dhidden_ptr + dhidden_offsets, mask, other=0.0).to(dhidden.dtype)
    if dresidual_ptr is not None:
        tl.store(dresidual_ptr + offsets, dhidden.to(dresidual_ptr.dtype.element_ty), mask)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
        keep = dropout_keep(seed, row, first_col, dropout_threshold, BLOCK_M, BLOCK_N)
        dhidden = tl.where(keep, dhidden * dropout_scale, 0.0)
    tl.store(dx_ptr + offsets, dhidden.to(dx_ptr.dtype.element_ty), mask)


@triton.jit
def store_partials(
    dweight,
    dbias,
    partials_ptr,
    program,
    offs_n,
    cols,
    SUM_WEIGHT: tl.constexpr,
    SUM_BIAS: tl.constexpr,
):
    """Sum the tiles over their rows and store that as a program's partial rows.

    partials are (programs, sums, cols): of the two sums those that are wanted, dweight's first.
    """
    sums: tl.constexpr = SUM_WEIGHT + SUM_BIAS
    partial = program.to(tl.int64) * sums * cols + offs_n
    if SUM_WEIGHT:
        tl.store(partials_ptr + partial, tl.sum(dweight, 0), offs_n < cols)
    if SUM_BIAS:
        tl.store(partials_ptr + partial + SUM_WEIGHT * cols, tl.sum(dbias, 0), offs_n < cols)
