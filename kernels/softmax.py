r"""softmax and log_softmax over the last dimension, forward and backward.

With z = scale * x where a column is kept and -inf where it is masked, for each row:

    softmax       y = exp(z - max(z)) / sum(exp(z - max(z)))    dx = scale y (dy - sum(dy y))
    log_softmax   y = z - max(z) - log(sum(exp(z - max(z))))    dx = scale (dy - exp(y) sum(dy))

x, y and dy are (..., heads, queries, cols), of any number of dimensions. `causal` keeps the columns
up to query + cols - queries; a boolean mask of x's shape, broadcast by strides, keeps where it is
True. Under either, a row with nothing but -inf has y = 0 and dx = 0; without, it is NaN as torch's.
y alone is saved. All is computed in float32 (float64 for float64 x) and rounded once.

A row that fits the registers is read once; softmax_wide.py has the kernels for wider ones.
"""

import functools

import torch
import triton
import triton.language as tl

from .common import divisible
from .config import (
    LOGITS_TILE,
    WIDEST_BACKWARD_ROW,
    WIDEST_FORWARD_ROW,
    RowConfig,
    Target,
    cdiv,
    choose_warps,
    choose_width,
    cut_whole_rows,
    find_target,
)
from .launch import common_divisor, empty_rows, flatten_rows, launchable
from .row_tiles import Blocks, load_tile, place_tile, store_tile
from .softmax_tiles import Mask, Scores, Softmax, load_scores, normalize, store_gradient
from .softmax_wide import softmax_backward_wide_kernel, softmax_forward_wide_kernel
from .structures import Rows


@functools.cache
def softmax_forward_config(cols: int, target: Target) -> RowConfig:
    """The configuration of softmax and log_softmax."""
    return _cut_rows(cols, WIDEST_FORWARD_ROW, target)


@functools.cache
def softmax_backward_config(cols: int, target: Target) -> RowConfig:
    """The configuration of their backward, which holds two tensors."""
    return _cut_rows(cols, WIDEST_BACKWARD_ROW, target)


def _cut_rows(cols: int, widest_row: int, target: Target) -> RowConfig:
    if choose_width(cols) > widest_row:
        return RowConfig(1, LOGITS_TILE, choose_warps(LOGITS_TILE // 2, target), whole_row=False)
    return cut_whole_rows(cols, target)


@launchable
@triton.jit(do_not_specialize=["rows", "queries"])
def softmax_forward_kernel(
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
    """One program a tile of BLOCK_M whole rows."""
    BLOCK_M: tl.constexpr = BLOCKS.block_m
    MASKED: tl.constexpr = SOFTMAX.causal or mask_view is not None
    cols = divisible(cols, BLOCKS.divisor)
    x = Rows(x_ptr, divisible(stride_xm, BLOCKS.divisor))
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    tile = place_tile(row, 0, rows, cols, BLOCKS.block_n)
    z = load_scores(Scores(x, mask_view, stride_kn, queries, cols, scale), tile, SOFTMAX)
    row_max = tl.max(z, 1)
    shift = row_max
    if MASKED:
        shift = tl.where(row_max == float("-inf"), 0.0, row_max)
    total = tl.sum(tl.exp(z - shift[:, None]), 1)
    store_tile(Rows(y_ptr, cols), tile, normalize(z, row_max, total, SOFTMAX.log, MASKED))


@launchable
@triton.jit(do_not_specialize=["rows"])
def softmax_backward_kernel(
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
    """One program a tile of BLOCK_M whole rows."""
    BLOCK_M: tl.constexpr = BLOCKS.block_m
    cols = divisible(cols, BLOCKS.divisor)
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    tile = place_tile(row, 0, rows, cols, BLOCKS.block_n)
    dy = load_tile(Rows(dy_ptr, divisible(stride_dym, BLOCKS.divisor)), tile)
    y = load_tile(Rows(y_ptr, divisible(stride_ym, BLOCKS.divisor)), tile)
    shared = tl.sum(dy if LOG else y * dy, 1)
    store_gradient(Rows(dx_ptr, cols), tile, y, dy, shared, scale, LOG)


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
    mask_view = None
    stride_kn, mask_divisor = 0, 16
    if mask is not None:
        # A view, or a copy where more than four dimensions cannot be folded into four.
        mask = mask.expand(x.shape).reshape(-1, heads, queries, cols).view(torch.uint8)
        kb, kh, km, stride_kn = mask.stride()
        mask_view = Mask(mask, 2 * heads + 3, 2 * kb + 3, 2 * kh + 3, 2 * km + 3)
        mask_divisor = common_divisor(kb, kh, km)
    x, stride_xm = flatten_rows(x, cols)
    rows = y.numel() // cols
    config = softmax_forward_config(cols, find_target(x))
    kernel = softmax_forward_kernel if config.whole_row else softmax_forward_wide_kernel
    kernel.launch(
        (cdiv(rows, config.block_m), 1, 1),
        x_ptr=x,
        mask_view=mask_view,
        y_ptr=y,
        stride_xm=stride_xm,
        stride_kn=stride_kn,
        rows=rows,
        cols=cols,
        queries=queries,
        scale=scale,
        SOFTMAX=Softmax(causal, log, mask_divisor),
        BLOCKS=Blocks(config.block_m, config.block_n, common_divisor(cols, stride_xm)),
        num_warps=config.num_warps,
    )
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
    dy, stride_dym = flatten_rows(dy, cols)
    y, stride_ym = flatten_rows(y, cols)
    config = softmax_backward_config(cols, find_target(y))
    kernel = softmax_backward_kernel if config.whole_row else softmax_backward_wide_kernel
    kernel.launch(
        (cdiv(rows, config.block_m), 1, 1),
        dy_ptr=dy,
        y_ptr=y,
        dx_ptr=dx,
        stride_dym=stride_dym,
        stride_ym=stride_ym,
        rows=rows,
        cols=cols,
        scale=scale,
        LOG=log,
        BLOCKS=Blocks(config.block_m, config.block_n, common_divisor(cols, stride_dym, stride_ym)),
        num_warps=config.num_warps,
    )
    return dx
