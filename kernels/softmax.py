r"""softmax and log_softmax over the last dimension, forward and backward.

With z = scale * x where a column is kept and -inf where it is masked, for each row:

    softmax       y = exp(z - max(z)) / sum(exp(z - max(z)))    dx = scale y (dy - sum(dy y))
    log_softmax   y = z - max(z) - log(sum(exp(z - max(z))))    dx = scale (dy - exp(y) sum(dy))

x, y and dy are (..., heads, queries, cols), of any number of dimensions. CAUSAL keeps the columns
up to query + cols - queries; a boolean mask of x's shape, broadcast by strides, keeps where it is
True. Under either, a row with nothing but -inf has y = 0 and dx = 0; without, it is NaN as torch's.
y alone is saved. All is computed in float32 (float64 for float64 x) and rounded once.

A row that fits the registers is read once; softmax_wide.py has the kernels for wider ones.
"""

import torch
import triton
import triton.language as tl

from .common import divisible
from .config import cdiv, softmax_backward_config, softmax_forward_config, target_of
from .launch import common_divisor, empty_rows, launchable, rows_of
from .softmax_tiles import load_scores, load_tile, normalized, store_gradient
from .softmax_wide import softmax_backward_wide_kernel, softmax_forward_wide_kernel


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
    x, stride_xm = rows_of(x, cols)
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
    dy, stride_dym = rows_of(dy, cols)
    y, stride_ym = rows_of(y, cols)
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
