"""What the softmax kernels do with one tile: reading z, y and dy, computing y, storing dx.

The names are those of softmax.py.
"""

import triton
import triton.language as tl

from .common import accumulator_dtype

# Columns that are read together or not at all.
GROUP = tl.constexpr(16)


@triton.jit
def load_scores(
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
    CAUSAL: tl.constexpr,
):
    """A tile (BLOCK_M, BLOCK_N) of z. Rows past the end are finite, unless they are masked."""
    ACC: tl.constexpr = accumulator_dtype(x_ptr)
    kept = (offs_n < cols)[None, :]
    read = (row < rows)[:, None] & kept
    query = row % queries
    if CAUSAL:
        last_col = (query + (cols - queries))[:, None]
        kept = kept & (offs_n[None, :] <= last_col)
        # Whole groups, so that one instruction can read the columns of a group.
        read = read & ((offs_n // GROUP * GROUP)[None, :] <= last_col)
    if mask_ptr is not None:
        matrix = row // queries
        mask_rows = matrix // heads * stride_kb + matrix % heads * stride_kh + query * stride_km
        mask_offsets = mask_rows[:, None] + (offs_n * stride_kn)[None, :]
        kept = kept & (tl.load(mask_ptr + mask_offsets, read, other=0) != 0)
    x = tl.load(x_ptr + (row * stride_xm)[:, None] + offs_n[None, :], read, other=0.0)
    return tl.where(kept, x.to(ACC) * scale, float("-inf"))


@triton.jit
def normalized(z, row_max, total, LOG: tl.constexpr, MASKED: tl.constexpr):
    """A tile of y, from one of z and its rows' maximum and sum."""
    if MASKED:
        row_max = tl.where(row_max == float("-inf"), 0.0, row_max)
        total = tl.where(total == 0.0, 1.0, total)
    shifted = z - row_max[:, None]
    if LOG:
        y = shifted - tl.log(total)[:, None]
    else:
        y = tl.exp(shifted) / total[:, None]
    return y


@triton.jit
def load_tile(x_ptr, stride_xm, row, offs_n, rows, cols):
    """A tile (BLOCK_M, BLOCK_N) of a tensor, 0 outside of it."""
    inside = (row < rows)[:, None] & (offs_n < cols)[None, :]
    x = tl.load(x_ptr + (row * stride_xm)[:, None] + offs_n[None, :], inside, other=0.0)
    return x.to(accumulator_dtype(x_ptr))


@triton.jit
def store_gradient(dx_ptr, y, dy, shared, row, offs_n, rows, cols, scale, LOG: tl.constexpr):
    """Store a tile of dx."""
    if LOG:
        dx = dy - tl.exp(y) * shared[:, None]
    else:
        dx = y * (dy - shared[:, None])
    inside = (row < rows)[:, None] & (offs_n < cols)[None, :]
    dx = (dx * scale).to(dx_ptr.dtype.element_ty)
    tl.store(dx_ptr + (row * cols)[:, None] + offs_n[None, :], dx, inside)
