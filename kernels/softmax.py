r"""softmax and log_softmax over the last dimension, forward and backward.

With z = scale * x where a column is kept and -inf where it is masked, for each row:

    softmax       y = exp(z - max(z)) / sum(exp(z - max(z)))    dx = scale y (dy - sum(dy y))
    log_softmax   y = z - max(z) - log(sum(exp(z - max(z))))    dx = scale (dy - exp(y) sum(dy))

x, y and dy are (..., heads, queries, cols), of any number of dimensions. CAUSAL keeps the columns
up to query + cols - queries; a boolean mask of x's shape, broadcast by strides, keeps where it is
True. Under either, a row with nothing but -inf has y = 0 and dx = 0; without, it is NaN as torch's.
y alone is saved. All is computed in float32 (float64 for float64 x) and rounded once.

A row that fits the registers is read once. A wider one is read in column tiles, twice: the second
read comes from the L2 cache.
"""

import torch
import triton
import triton.language as tl

from .common import accumulator_dtype, divisible
from .config import cdiv, softmax_backward_config, softmax_forward_config, target_of
from .launch import common_divisor, empty_rows, launchable, rows_of

# Columns that are read together or not at all.
GROUP = tl.constexpr(16)


@triton.jit
def accumulate_lanes(x, lane_max, lane_sum):
    """Take the tile x (BLOCK_M, LANES, LANE) into running maxima and sums (BLOCK_M, LANES).

    Each lane keeps a maximum of its own and its sum of exp(x - maximum). A lane is what one thread
    loads at once, so that no thread waits for another until `merge_lanes`.
    """
    new_max = tl.maximum(lane_max, tl.max(x, 2))
    # A lane that has seen nothing but -inf must not subtract it from itself.
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    lane_sum = lane_sum * tl.exp(lane_max - shift) + tl.sum(tl.exp(x - shift[:, :, None]), 2)
    return new_max, lane_sum


@triton.jit
def merge_lanes(lane_max, lane_sum):
    """Each row's maximum, and its sum of exp(x - maximum), which is 0 where all x are -inf."""
    row_max = tl.max(lane_max, 1)  # (BLOCK_M,)
    shift = tl.where(row_max == float("-inf"), 0.0, row_max)
    return row_max, tl.sum(lane_sum * tl.exp(lane_max - shift[:, None]), 1)


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


@launchable
@triton.jit(do_not_specialize=["stride_kb", "stride_kh", "stride_km", "rows", "heads", "queries"])
def softmax_forward_kernel(
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
):
    """One program a tile of BLOCK_M whole rows."""
    stride_xm = divisible(stride_xm, DIVISOR)
    stride_kb = divisible(stride_kb, MASK_DIVISOR)
    stride_kh = divisible(stride_kh, MASK_DIVISOR)
    stride_km = divisible(stride_km, MASK_DIVISOR)
    cols = divisible(cols, DIVISOR)
    MASKED: tl.constexpr = CAUSAL or mask_ptr is not None
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    offs_n = tl.arange(0, BLOCK_N)
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
    row_max = tl.max(z, 1)
    shift = row_max
    if MASKED:
        shift = tl.where(row_max == float("-inf"), 0.0, row_max)
    total = tl.sum(tl.exp(z - shift[:, None]), 1)
    y = normalized(z, row_max, total, LOG, MASKED)
    inside = (row < rows)[:, None] & (offs_n < cols)[None, :]
    y_offsets = (row * cols)[:, None] + offs_n[None, :]
    tl.store(y_ptr + y_offsets, y.to(y_ptr.dtype.element_ty), inside)


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


@launchable
@triton.jit(do_not_specialize=["rows"])
def softmax_backward_kernel(
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
    """One program a tile of BLOCK_M whole rows."""
    stride_dym = divisible(stride_dym, DIVISOR)
    stride_ym = divisible(stride_ym, DIVISOR)
    cols = divisible(cols, DIVISOR)
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    offs_n = tl.arange(0, BLOCK_N)
    dy = load_tile(dy_ptr, stride_dym, row, offs_n, rows, cols)
    y = load_tile(y_ptr, stride_ym, row, offs_n, rows, cols)
    shared = tl.sum(dy if LOG else y * dy, 1)
    store_gradient(dx_ptr, y, dy, shared, row, offs_n, rows, cols, scale, LOG)


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


def softmax_forward(
    x: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    y_dtype: torch.dtype,
    causal: bool,
    log: bool,
) -> torch.Tensor:
    """Launch the forward: y. The mask broadcasts to x's shape."""
    y = empty_rows(x, y_dtype)
    if x.numel() == 0:
        return y
    cols = x.shape[-1]
    queries = x.shape[-2] if x.dim() > 1 else 1
    heads = x.shape[-3] if x.dim() > 2 else 1
    mask_strides = (0, 0, 0, 0)
    if mask is not None:
        # A view, or a copy where more than four dimensions cannot be folded into four.
        mask = mask.expand(x.shape).reshape(-1, heads, queries, cols).view(torch.uint8)
        mask_strides = mask.stride()
    x, stride_xm = rows_of(x)
    rows = y.numel() // cols
    config = softmax_forward_config(cols, target_of(x))
    arguments = {
        "x_ptr": x,
        "mask_ptr": mask,
        "y_ptr": y,
        "stride_xm": stride_xm,
        "stride_kb": mask_strides[0],
        "stride_kh": mask_strides[1],
        "stride_km": mask_strides[2],
        "stride_kn": mask_strides[3],
        "rows": rows,
        "cols": cols,
        "heads": heads,
        "queries": queries,
        "scale": scale,
        "CAUSAL": causal,
        "LOG": log,
        "DIVISOR": common_divisor(cols, stride_xm),
        "MASK_DIVISOR": common_divisor(*mask_strides[:3]),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
    }
    grid = (cdiv(rows, config.block_m),)
    if config.whole_row:
        softmax_forward_kernel.launch(grid, config.num_warps, **arguments)
    else:
        lane = 16 // x.element_size()
        softmax_forward_wide_kernel.launch(grid, config.num_warps, **arguments, LANE=lane)
    return y


def softmax_backward(
    dy: torch.Tensor, y: torch.Tensor, scale: float, x_dtype: torch.dtype, log: bool
) -> torch.Tensor:
    """Launch the backward: dx."""
    dx = empty_rows(y, x_dtype)
    if y.numel() == 0:
        return dx
    cols = y.shape[-1]
    rows = y.numel() // cols
    dy, stride_dym = rows_of(dy)
    y, stride_ym = rows_of(y)
    config = softmax_backward_config(cols, target_of(y))
    kernel = softmax_backward_kernel if config.whole_row else softmax_backward_wide_kernel
    kernel.launch(
        (cdiv(rows, config.block_m),),
        dy_ptr=dy,
        y_ptr=y,
        dx_ptr=dx,
        stride_dym=stride_dym,
        stride_ym=stride_ym,
        rows=rows,
        cols=cols,
        scale=scale,
        LOG=log,
        DIVISOR=common_divisor(cols, stride_dym, stride_ym),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        num_warps=config.num_warps,
    )
    return dx
